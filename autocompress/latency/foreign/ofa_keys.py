"""The keys by which ProxylessNAS and once-for-all name what runs, and the keys of a block.

Source: Cai et al., ProxylessNAS, ICLR 2019; Once-for-All, ICLR 2020. A key has a type and shapes, height x
width x channels; `expand` is the ratio of the middle to the input channels in ProxylessNAS's tables and the
number of middle channels in once-for-all's.
"""

import re
from collections.abc import Iterable
from typing import Final, Literal

from autocompress.errors import TableError
from autocompress.ops import Add, Conv2d, GlobalAvgPool, Linear, Ops, OpSpec, SqueezeExcite, block_key

Expand = Literal["ratio", "channels"]

HARD_SWISH: Final = {"relu": 0, "relu6": 0, "hard_swish": 1}
KEY: Final = re.compile(r"([A-Za-z][A-Za-z0-9_]*)-input:[0-9]+(?:x[0-9]+)*-output:[0-9]+(?:x[0-9]+)*")
EXPANDED: Final = re.compile(
    r"expanded_conv-input:[0-9]{1,6}x[0-9]{1,6}x([0-9]{1,6})-output:[0-9]{1,6}x[0-9]{1,6}x[0-9]{1,6}"
    r"-expand:([0-9]{1,6})-kernel:[0-9]{1,6}-stride:[0-9]{1,6}-idskip:[01](-se:[01]-hs:[01])?"
)
# Ratios in use are 1, 3, 4 and 6; a network with fewer channels than this is not of these families.
MAX_RATIO: Final = 8


def check_keys(keys: Iterable[str]) -> None:
    """Refuse keys of another form.

    Raises:
        TableError: A key is none, or only some blocks say `se` and `hs`.
    """
    suffixed: dict[bool, str] = {}
    for key in keys:
        block = EXPANDED.fullmatch(key)
        other = KEY.fullmatch(key)
        if block is None and (other is None or other.group(1) == "expanded_conv"):
            raise TableError(
                f"a key must be TYPE-input:HxWxC-output:HxWxC, and for expanded_conv also "
                f"-expand:N-kernel:N-stride:N-idskip:0|1[-se:0|1-hs:0|1], got {key[:120]!r}"
            )
        if block is not None:
            suffixed.setdefault(block.group(3) is not None, key)
    if len(suffixed) == 2:
        raise TableError(f"either all expanded_conv keys or none must end in -se:-hs:, got {suffixed}")


def has_attention(keys: Iterable[str]) -> bool:
    """Return whether keys say `se` and `hs`; `check_keys` made sure that all blocks agree."""
    return any("-se:" in key for key in keys)


def meaning_of_expand(keys: Iterable[str]) -> Expand | None:
    """Return what `expand` means in a table, or `None` if its numbers do not decide it.

    It is a ratio if no number is over 8 and one is below the input channels of its block, which a number of
    middle channels never is. It is a number of channels if none is below the input channels of its block and
    one is over 8, which no ratio in use is.
    """
    pairs = [(int(m.group(1)), int(m.group(2))) for key in keys if (m := EXPANDED.fullmatch(key))]
    narrower = any(expand < channels for channels, expand in pairs)
    large = any(expand > MAX_RATIO for _, expand in pairs)
    if narrower == large:
        return None
    return "ratio" if narrower else "channels"


def ofa_keys(ops: Ops, *, expand: Expand, attention: bool) -> list[str]:
    """Return the keys whose rows together are a block.

    Args:
        ops: The operations of one block: a stem, an inverted residual, or a head of MobileNetV2 or V3.
        expand: What `expand` means in the table.
        attention: Whether the table's keys say `se` and `hs`.

    Raises:
        TableError: No keys say what the block runs.
    """
    match ops:
        case (Conv2d() as stem,):
            return [f"Conv-{_shapes(stem, stem)}"]
        case (Conv2d() as mix, GlobalAvgPool(), Linear() as classifier):
            height, width = mix.out_shape[1:]
            return [
                f"Conv_1-{_shapes(mix, mix)}",
                f"Logits-input:{height}x{width}x{classifier.in_features}-output:{classifier.out_features}",
            ]
        case (Conv2d() as last, GlobalAvgPool() as pool, Conv2d() as mix, Linear() as classifier):
            return [
                f"Conv_1-{_shapes(last, last)}",
                f"AvgPool2D-{_shapes(pool, pool)}",
                f"Conv_2-{_shapes(mix, mix)}",
                f"Logits-input:1x1x{classifier.in_features}-output:{classifier.out_features}",
            ]
    return [_inverted_residual(ops, expand, attention)]


def _shapes(first: OpSpec, last: OpSpec) -> str:
    (channels, height, width), (out, out_height, out_width) = first.in_shape, last.out_shape
    return f"input:{height}x{width}x{channels}-output:{out_height}x{out_width}x{out}"


def _inverted_residual(ops: Ops, expand: Expand, attention: bool) -> str:
    parts = list(ops)
    skip = bool(parts) and isinstance(parts[-1], Add)
    if skip:
        parts.pop()
    squeeze = len(parts) >= 2 and isinstance(parts[-2], SqueezeExcite)
    if squeeze:
        parts.pop(-2)
    # The first block of a network has no expansion.
    match parts:
        case (Conv2d() as widen, Conv2d() as depthwise, Conv2d() as project) if _pointwise(widen):
            pass
        case (Conv2d() as depthwise, Conv2d() as project):
            widen = depthwise
        case _:
            raise _unknown(ops, "it is no stem, inverted residual or head")
    if not (depthwise.depthwise and _pointwise(project) and project.activation == "none"):
        raise _unknown(ops, "it is not expansion, depthwise convolution and linear projection")
    if {widen.activation, depthwise.activation} - set(HARD_SWISH) or widen.activation != depthwise.activation:
        raise _unknown(ops, f"its activation is not one of {', '.join(HARD_SWISH)}")
    hard_swish = HARD_SWISH[depthwise.activation]
    if not attention and (squeeze or hard_swish):
        raise _unknown(ops, "the table's keys do not say squeeze-excite and hard swish")
    ratio, rest = divmod(depthwise.in_channels, widen.in_channels)
    if expand == "ratio" and rest:
        raise _unknown(ops, f"{depthwise.in_channels} is no whole multiple of {widen.in_channels} channels")
    key = (
        f"expanded_conv-{_shapes(widen, project)}"
        f"-expand:{ratio if expand == 'ratio' else depthwise.in_channels}-kernel:{depthwise.kernel}"
        f"-stride:{depthwise.stride}-idskip:{int(skip)}"
    )
    return f"{key}-se:{int(squeeze)}-hs:{hard_swish}" if attention else key


def _pointwise(op: Conv2d) -> bool:
    return (op.kernel, op.stride, op.groups) == (1, 1, 1)


def _unknown(ops: Ops, reason: str) -> TableError:
    return TableError(
        f"no OFA key says what block {block_key(ops)!r} runs: {reason}; measure it with "
        "`autocompress profile`"
    )
