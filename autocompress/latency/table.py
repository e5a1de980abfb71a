"""The latency table: what every block of a space takes on one target, with the correction to whole networks.

The file is JSON, described in docs/latency-table.md. It is read strictly: a table that anything is wrong with
is refused, naming the key.
"""

import difflib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, get_args

from autocompress.atomic import write_json
from autocompress.cost import AdditiveCost, compile_cost
from autocompress.errors import MissingRowError, NegativeLatencyError, TableError
from autocompress.latency.correction import (
    CheckedNetwork,
    Correction,
    ErrorReport,
    Figures,
    Form,
    Granularity,
)
from autocompress.latency.keys import parse_block, parse_op
from autocompress.latency.measure import Measurement
from autocompress.latency.reading import parse_json, read_text, reading
from autocompress.latency.strict import Node
from autocompress.latency.target import Target, describe_device, read_target
from autocompress.latency.widths import (
    WidthGrid,
    WidthReport,
    axes_of,
    family_of,
    grid_of_rows,
    ms_of,
    read_grid,
)
from autocompress.ops import SEPARATOR, Ops, OpSpec, block_key, border_elements
from autocompress.space import SearchSpace

SCHEMA: Final = "autocompress.latency_table"
VERSION: Final = 2
UNIT: Final = "ms"
METRIC: Final = "latency_ms"
KEYS: Final = (
    "schema", "version", "unit", "target", "provenance", "granularity", "width_grid", "width_report",
    "correction", "error_report", "rows",
)  # fmt: skip
# A fitted price of the cheapest block may come out a rounding error below zero.
ROUNDING_MS: Final = 1e-9


@dataclass(frozen=True)
class LatencyTable:
    """Times of blocks on a target, in milliseconds.

    Attributes:
        target: Device, runtime, threads, batch and number format.
        rows: Key of a block or of one operation (`autocompress.ops.block_key`) to what its single runs took.
        granularity: Which of them networks are priced from.
        grid: If given, operations of other widths are priced between the rows at its knots; such prices are
            marked by `interpolates`.
        width_report: How the grid was measured and how far it is off.
        correction: From sums of rows to whole networks.
        error_report: How far predictions can be trusted; `None` if no whole network was measured.
        provenance: Device, versions, date and space: where the numbers come from.
    """

    target: Target
    rows: Mapping[str, Measurement]
    correction: Correction
    error_report: ErrorReport | None
    provenance: Mapping[str, Any]
    granularity: Granularity = "block"
    grid: WidthGrid | None = None
    width_report: WidthReport | None = None

    @cached_property
    def row_ms(self) -> Mapping[str, float]:
        """Key of a row to its median in ms, uncorrected."""
        return {key: row.median_ms for key, row in self.rows.items()}

    def parts(self, ops: Ops) -> list[Ops]:
        """Return what a block is priced from: itself, or each of its operations."""
        return [ops] if self.granularity == "block" else [(op,) for op in ops]

    def row_keys(self, ops: Ops) -> list[str]:
        """Return the keys of the rows that a block is priced from."""
        return [block_key(part) for part in self.parts(ops)]

    def price(self, ops: Ops) -> float:
        """Return the predicted ms of one block within a network; the constant of a network comes apart.

        Raises:
            MissingRowError: The table has no row for the block.
        """
        total = 0.0
        correction = self.correction
        for part in self.parts(ops):
            ms = ms_of(block_key(part), self.row_ms, self.grid)
            if ms is None:
                raise self._missing([block_key(part)])
            total += correction.scale * ms + correction.per_row_ms
            total += correction.per_element_ms * border_elements(part)
        return total

    def interpolates(self, ops: Ops) -> bool:
        """Whether the price of a block comes from rows of other widths, in part or wholly."""
        return any(key not in self.rows for key in self.row_keys(ops))

    def interpolated(self) -> "LatencyTable":
        """Return the table with permission to price widths between those it has, where they form a grid.

        Rows of whole blocks are never interpolated; nothing is extrapolated.
        """
        return self if self.grid else replace(self, grid=grid_of_rows(self.row_ms))

    def cost(self, space: SearchSpace) -> AdditiveCost:
        """Compile the predicted latency of every architecture of a space, in ms.

        Raises:
            MissingRowError: Blocks of the space have no row.
            NegativeLatencyError: A network of the space would take less than no time.
            CostError: A block of the space depends on too many options.
        """
        missing: list[str] = []

        def price(ops: Ops) -> float:
            try:
                return self.price(ops)
            except MissingRowError:
                missing.extend(
                    key for key in self.row_keys(ops) if ms_of(key, self.row_ms, self.grid) is None
                )
                return 0.0

        cost = compile_cost(space, price, METRIC)
        if missing:
            raise self._missing(list(dict.fromkeys(missing)))
        cost = cost.scaled(1.0, self.correction.constant_ms)
        if cost.minimum < 0:
            raise NegativeLatencyError(
                f"the latency table of {self.target.name!r} predicts {cost.minimum:.4g} ms for the smallest "
                f"network of space {space.name!r}: its correction ({self.correction.form}, constant "
                f"{self.correction.constant_ms:.4g} ms) does not hold there; measure this space "
                "(`autocompress profile`), or more whole networks (profile.networks)"
            )
        return cost

    def _missing(self, keys: list[str]) -> MissingRowError:
        nearest = difflib.get_close_matches(keys[0], self.rows, n=1, cutoff=0.0)
        return MissingRowError(
            f"the latency table of {self.target.name!r} has no row for {len(keys)} "
            f"block{'s' * (len(keys) > 1)}; the first is {keys[0]!r}; the nearest row is "
            f"{nearest[0] if nearest else None!r}; measure what is missing with `autocompress profile`"
        )

    def check_target(self, target: Target, *, device: Mapping[str, Any] | None = None) -> None:
        """Refuse a table that was measured for another target or on another machine.

        Args:
            target: What the table is to be used for.
            device: Where; as `describe_device` says it of this machine, which is the default.

        Raises:
            TableError: Runtime, threads, batch, number format or device differ; names both.
        """
        device = describe_device(target.device) if device is None else device
        measured = {**self.target.conditions(), "device": dict(self.provenance.get("device", {}))}
        wanted = {**target.conditions(), "device": dict(device)}
        different = [name for name in wanted if measured[name] != wanted[name]]
        if different:
            said = "; ".join(f"{name} is {measured[name]}, not {wanted[name]}" for name in different)
            raise TableError(
                f"the latency table of {self.target.name!r} is not for {target.name!r} on this machine: "
                f"{said}; measure another with `autocompress profile`"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the table as it stands in a file."""
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "unit": UNIT,
            "target": self.target.describe(),
            "provenance": dict(self.provenance),
            "granularity": self.granularity,
            "width_grid": None if self.grid is None else asdict(self.grid),
            "width_report": None if self.width_report is None else asdict(self.width_report),
            "correction": asdict(self.correction),
            "error_report": None if self.error_report is None else asdict(self.error_report),
            "rows": {key: asdict(row) for key, row in self.rows.items()},
        }

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all.

        Raises:
            StorageError: It cannot be written.
        """
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> "LatencyTable":
        """Read a table.

        Raises:
            TableError: The file is absent, damaged, of another schema, version or unit, or a number in it is
                negative, not finite or not a number; names the key.
        """
        with reading("latency table", path, described="docs/latency-table.md"):
            return _read(parse_json(read_text(path)))


def _read(node: Node) -> LatencyTable:
    # Before the names: another version may have other ones.
    node.object()
    node.member("schema").equal(SCHEMA)
    node.member("version").equal(VERSION)
    top = node.object(KEYS)
    top["unit"].equal(UNIT)
    target = read_target(top["target"])
    provenance = {name: member.value for name, member in top["provenance"].object().items()}
    top["provenance"].member("device").object()
    rows = {key: _read_row(row) for key, row in top["rows"].object().items()}
    granularity: Granularity = top["granularity"].equal(*get_args(Granularity))
    priced = {key: row for key, row in rows.items() if (SEPARATOR in key) == (granularity == "block")}
    correction = _read_correction(top["correction"], priced)
    report = None if top["error_report"].value is None else _read_report(top["error_report"])
    grid = None if top["width_grid"].value is None else read_grid(top["width_grid"])
    if grid is not None:
        _check_grid(grid, rows, top["width_grid"])
    widths = None if top["width_report"].value is None else _read_width_report(top["width_report"])
    return LatencyTable(target, rows, correction, report, provenance, granularity, grid, widths)


def _check_grid(grid: WidthGrid, rows: Mapping[str, Measurement], node: Node) -> None:
    """Refuse a grid that has no row for one of its knots: it could not be interpolated."""
    examples: dict[str, OpSpec] = {}
    for key in rows:
        if SEPARATOR not in key:
            with suppress(TableError):
                op = parse_op(key)
                examples.setdefault(family_of(op), op)
    for family in grid.knots:
        if family not in examples or len(grid.knots[family]) != len(axes_of(examples[family])):
            raise node.member("knots").member(family).wrong("of a family that has rows, one list an axis")
    # Before they are enumerated: lists of a damaged file could have any number of combinations.
    if grid.size > len(rows):
        raise node.member("knots").wrong(f"of no more combinations than there are rows ({len(rows)})")
    absent = [key for key in grid.operations(examples.values()) if key not in rows]
    if absent:
        raise TableError(f"{node.path}: the grid has a knot at {absent[0]!r}, for which there is no row")


def _read_width_report(node: Node) -> WidthReport:
    members = node.object(field.name for field in fields(WidthReport))
    return WidthReport(
        measured_rows=members["measured_rows"].integer(),
        priced_rows=members["priced_rows"].integer(),
        families=members["families"].integer(1),
        seconds=members["seconds"].number(),
        held_out_rows=members["held_out_rows"].integer(1),
        held_out=read_figures(members["held_out"]),
    )


def _read_row(node: Node) -> Measurement:
    row = node.object(field.name for field in fields(Measurement))
    return Measurement(
        row["median_ms"].number(),
        row["low_ms"].number(),
        row["high_ms"].number(),
        row["spread_ms"].number(),
        row["p95_ms"].number(),
        row["count"].integer(1),
    )


def _read_correction(node: Node, rows: Mapping[str, Measurement]) -> Correction:
    members = node.object(field.name for field in fields(Correction))
    correction = Correction(
        members["form"].equal(*get_args(Form)),
        members["scale"].number(),
        members["per_row_ms"].number(-math.inf),
        members["constant_ms"].number(-math.inf),
        members["per_element_ms"].number(-math.inf),
    )
    for key, row in rows.items():
        price = correction.scale * row.median_ms + correction.per_row_ms
        if correction.per_element_ms:
            try:
                price += correction.per_element_ms * border_elements(parse_block(key))
            except TableError as error:
                raise members["per_element_ms"].wrong(f"0 where a row cannot be read ({error})") from None
        if price < -ROUNDING_MS:
            raise node.wrong(f"such that no row gets a negative price, as {key[:80]!r} does")
    return correction


def _read_report(node: Node) -> ErrorReport:
    members = node.object(field.name for field in fields(ErrorReport))
    networks = []
    for entry in members["networks"].list():
        network = entry.object(field.name for field in fields(CheckedNetwork))
        networks.append(
            CheckedNetwork(
                network["name"].text(),
                network["rows"].integer(1),
                network["sum_ms"].number(),
                network["measured_ms"].number(),
                network["predicted_ms"].number(-math.inf),
            )
        )
    forms = _read_forms(members["forms"])
    curve = []
    for entry in members["learning_curve"].list():
        pair = entry.list()
        if len(pair) != 2:
            raise entry.wrong("a pair: networks, error in %")
        curve.append((pair[0].integer(1), pair[1].number()))
    drift = members["drift_percent"]
    return ErrorReport(
        networks=tuple(networks),
        forms=forms,
        chosen=members["chosen"].equal(*forms),
        repeat_noise_percent=members["repeat_noise_percent"].number(),
        learning_curve=tuple(curve),
        drift_percent=None if drift.value is None else drift.number(),
        unstable_rows=members["unstable_rows"].integer(),
        disturbed_percent=members["disturbed_percent"].number(),
        granularity=members["granularity"].equal(*get_args(Granularity)),
        other_forms=_read_forms(members["other_forms"]),
        method=members["method"].equal("leave-one-out"),
    )


def _read_forms(node: Node) -> dict[Form, Figures]:
    forms: dict[Form, Figures] = {}
    for name, entry in node.object().items():
        form: Form = Node(name, entry.path).equal(*get_args(Form))
        forms[form] = read_figures(entry)
    return forms


def read_figures(node: Node) -> Figures:
    """Read the figures of an error report.

    Raises:
        TableError: A key is missing or unknown, or a number is wrong.
    """
    values = node.object(field.name for field in fields(Figures))
    return Figures(
        values["bias_percent"].number(-math.inf),
        values["mape_percent"].number(),
        values["max_error_percent"].number(),
        values["within_5_percent"].number(),
        values["within_10_percent"].number(),
        *(
            None if values[name].value is None else values[name].number(-1 - 1e-9)
            for name in ("spearman", "kendall")
        ),
    )
