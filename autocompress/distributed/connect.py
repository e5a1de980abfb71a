"""The one place that starts Ray or connects to it."""

import logging
import os
import socket
from contextlib import ExitStack
from typing import Any

from autocompress.errors import AutocompressError
from autocompress.machine import cores

ANSWERS_WITHIN_S = 10.0
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""An empty frame of settings, with which both sides of HTTP/2 begin (RFC 9113, section 3.4); its fourth byte
is the kind of frame. Ray's servers speak gRPC, which is HTTP/2."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS
# Read by Ray when it is imported or started; what is set outside stays.
ENVIRONMENT = {
    # Ctrl-C ends `tune` as it ends everything else; Ray would end the tuning as if it were done.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Workers of Ray give way to everything else (niceness 15): beside any load they would stand still, and
    # latencies that they measure would be those of a busy machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Of Ray Tune: state is written every second, and nothing is printed.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def check_cores(workers: int, threads: int, address: str | None) -> None:
    """Refuse more workers than a Ray on this machine would have cores for.

    Raises:
        AutocompressError: There are too few.
    """
    needed = workers * threads
    if address is None and needed > cores():
        raise AutocompressError(
            f"{workers} workers of {threads} threads need {needed} cores, but this process may use {cores()}"
            ": take fewer workers or threads"
        )


def connected(opened: ExitStack, *, workers: int, threads: int, address: str | None) -> Any:
    """Return the module of Ray, connected; what is started here is stopped with `opened`.

    A Ray of this process that runs already is used, and left as it is.

    Args:
        opened: Closes the connection.
        workers: Processes that are to run at the same time.
        threads: Cores that each of them takes.
        address: Of a running cluster, `host:port` or `auto`; without, Ray is started on this machine.

    Raises:
        AutocompressError: Ray is not installed or cannot be started, nothing answers at the address, or there
            are too few cores for workers and threads.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise AutocompressError(
            f"more than one process is the work of Ray, which cannot be imported ({error}): "
            "pip install 'ray[tune]', or take one worker where that is possible"
        ) from error
    needed = workers * threads
    wanted = f"{workers} workers of {threads} threads need {needed} cores"
    if ray.is_initialized():
        if address is not None:
            raise AutocompressError(
                f"Ray is initialised in this process already: leave out address, got {address!r}"
            )
    else:
        check_cores(workers, threads, address)
        opened.callback(ray.shutdown, wait_for_processes=True)
        _start(ray, needed, address)
    there = int(ray.cluster_resources().get("CPU", 0))
    if needed > there:
        raise AutocompressError(f"{wanted}, but this Ray has {there}: take fewer workers or threads")
    return ray


def _start(ray: Any, needed: int, address: str | None) -> None:
    """Start Ray here, or connect to the one at the address."""
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {"address": "local", "num_cpus": needed, "include_dashboard": False}
    else:
        _check_answers(address)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except Exception as error:  # Ray raises plain ones too, when a busy machine takes it over 30 s
        what = "started" if address is None else f"reached at {address!r}"
        raise AutocompressError(f"Ray cannot be {what}: {error}") from error


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens: Ray tries to reach it for minutes, and complains."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise AutocompressError(f"address must be host:port or 'auto', got {address!r}")
    hint = "it is what `ray start --head` prints on the first machine of the cluster"
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWERS_WITHIN_S) as there:
            if os.environ.get("RAY_USE_TLS") == "1":
                return
            there.sendall(HELLO)
            said = there.recv(len(SETTINGS))
    except (OSError, OverflowError) as error:
        raise AutocompressError(f"nothing answers at address {address!r}: {error}; {hint}") from None
    if said[3:4] != SETTINGS[3:4]:
        raise AutocompressError(f"what answers at address {address!r} is no Ray cluster; {hint}")
