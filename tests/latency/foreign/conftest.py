"""Small faithful samples of every format, and the real files where they are at hand."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

SHARED = Path(__file__).parents[4] / "shared" / "data"

# Two rows of the Note10 table at 224 pixels (once-for-all, MIT), one made up; `expand` counts channels.
OFA = {
    "Conv-input:224x224x3-output:112x112x24": {"mean": 0.994418, "std": 0.01726798413249215, "count": 500},
    "expanded_conv-input:112x112x24-output:56x56x32-expand:144-kernel:3-stride:2-idskip:0-se:0-hs:0": {
        "mean": 4.812240740740741,
        "std": 0.08956353738593026,
        "count": 54,
    },
    "expanded_conv-input:112x112x24-output:112x112x24-expand:24-kernel:3-stride:1-idskip:1-se:0-hs:0": {
        "mean": 1.75,
        "count": 500,
    },
}
# Keys as ProxylessNAS writes them, made-up times; `expand` is a ratio.
PROXYLESS = """\
Conv-input:224x224x3-output:112x112x16: {count: 7, mean: 1.5, var: 0.25}
expanded_conv-input:112x112x16-output:56x56x24-expand:3-kernel:5-stride:2-idskip:0:
  count: 10
  mean: 2.5
  var: 0.04
expanded_conv-input:56x56x24-output:56x56x24-expand:6-kernel:3-stride:1-idskip:1: {mean: 1.25}
Conv_1-input:7x7x24-output:7x7x48: {mean: 0.5}
Logits-input:7x7x48-output:10: {mean: 0.25}
"""
# Made up after the published lists (Zhen-Dong/HAWQ, MIT): every number can be worked out by hand.
HAWQ = {
    "source": "made up",
    "network": "two layers and a shortcut",
    "note": "",
    "ties": [[1, 2]],
    "layers": 3,
    "hutchinson_trace": [0.5, 0.25, 0.125],
    "delta_weights_sq_8": [0.5, 1.0, 2.0],
    "delta_weights_sq_4": [4.0, 8.0, 16.0],
    "parameters_m": [1.0, 2.0, 3.0],
    "bops_m_32x32": [1024.0, 2048.0, 512.0],
    "latency_int4": [0.25, 0.5, 1.0],
    "latency_int8": [0.5, 1.0, 2.0],
    "published_bits": {"latency_0.5": "844"},
}
# Two layers of three operations; the first row is published (HW-NAS-Bench, MIT), the rest made up.
HW_NAS_BENCH = """\
layer,op_index,op,key,raspi4_delta_ms_vs_skip,fpga_delta_ms_vs_skip
0,0,k3_e1,ConvBlock_H32_W32_Cin16_Cout16_exp1_kernel3_stride1_group1,0.595037342,0.36864
0,1,k5_e1,ConvBlock_H32_W32_Cin16_Cout16_exp1_kernel5_stride1_group1,1.5,2.5
0,2,skip,Skip_H32_W32_Cin16_Cout16_stride1,0.0,0.0
1,0,k3_e1,ConvBlock_H32_W32_Cin16_Cout24_exp1_kernel3_stride1_group1,0.25,4.5
1,1,k5_e1,ConvBlock_H32_W32_Cin16_Cout24_exp1_kernel5_stride1_group1,0.75,8.5
1,2,skip,Skip_H32_W32_Cin16_Cout24_stride1,0.0,0.0
"""
HW_NAS_BENCH_BASE = {"raspi4": 7.5, "fpga": 0.0}
# First and last rows of the published table (APQ, MIT), and one made up.
BITFUSION = """\
in_c,out_c,in_size,kernel,stride,pad,groups,w_bits,a_bits,latency_ms,energy_mJ
96,456,14,1,1,0,1,4,4,0.062192,0.10688197403091196
96,456,14,1,1,0,1,8,4,0.125,0.25
112,112,56,3,1,1,112,8,8,0.7954519999999999,0.8764909197900798
head,,,,,,,,,0.295904,0.5061844841862639
tail,,,,,,,,,0.081608,0.15180756309769594
"""
PLAIN = """\
key,median_us,spread_us,count
"Conv2d(in_channels=3,out_channels=8,height=8,width=8,kernel=3)",250,10.5,30
"GlobalAvgPool(channels=8,height=8,width=8) > Linear(in_features=8,out_features=3)",1e2,0,20
"""


def haq_values() -> NDArray[np.int64]:
    """Two layers: the cost of layer l is `1000 l + 10 w + a` at w and a bits."""
    layer, weights, activations = np.ogrid[0:2, 1:9, 1:9]
    return np.asarray(1000 * layer + 10 * weights + activations, dtype=np.int64)


def npy(values: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def samples() -> dict[str, bytes]:
    """Return a valid file of each format, by the name it is to have."""
    return {
        "ofa.json": json.dumps(OFA).encode(),
        "proxyless.yaml": PROXYLESS.encode(),
        "haq.npy": npy(haq_values()),
        "hawq.json": json.dumps(HAWQ).encode(),
        "blocks.csv": HW_NAS_BENCH.encode(),
        "base.json": json.dumps(HW_NAS_BENCH_BASE).encode(),
        "bitfusion.csv": BITFUSION.encode(),
        "plain.csv": PLAIN.encode(),
    }


@pytest.fixture
def folder(samples: dict[str, bytes], tmp_path: Path) -> Path:
    """Return a folder with a valid file of each format."""
    for name, content in samples.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture
def changed(folder: Path) -> Callable[[str, str, str], Path]:
    """Replace a text that stands once in a sample."""

    def change(name: str, old: str, new: str) -> Path:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, (old, text.count(old))
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
        return folder / name

    return change


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Find a real file; without it the test is skipped."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {path}, which is no part of the distribution")
        return path

    return find
