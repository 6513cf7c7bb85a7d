"""How do 4 bits hold a number? One block of MXFP4: 32 codes in 16 bytes, and the power of two that they share."""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..mxfp4 import BIAS, BLOCK, pack, unpack
from .panel import Bits, Explorer, Whole

if TYPE_CHECKING:
    from ..show.picture import Picture

BITS = ("sign", "exponent 2", "exponent 1", "mantissa")  # of E2M1, from the highest


def block(
    x: Tensor | None = None, *, index: int = 0, code: int | None = None, exponent: int | None = None,
    kept: Mapping[str, Sequence] | None = None, note: str = "",
) -> Explorer:  # fmt: skip
    """Flip the bits of one of a block's 32 numbers, change the exponent that they share, and see the values.

    Args:
        x: 32 numbers, which are packed; None: random ones, always the same.
        index: whose bits are flipped.
        code: its four bits, 0 to 15; None: as packed.
        exponent: the scale is 2 to this; None: as packed.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: all 16 codes.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: not 32 finite numbers; no such index, code or exponent.
    """
    if x is None:
        x, note = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)), note or "random numbers"
    codes, own = packed(x)
    Whole(index, 0, BLOCK - 1).check("index")
    code = codes[index].item() if code is None else code
    exponent = own if exponent is None else exponent
    controls = {"index": Whole(index, 0, BLOCK - 1), "code": Bits(code, BITS),
                "exponent": Whole(exponent, max(-BIAS, own - 8), min(BIAS, own + 8))}  # fmt: skip
    kept = {"code": range(16)} if kept is None else kept
    return Explorer("a block of MXFP4", partial(block_picture, x, note=note), controls, kept=kept)


def packed(x: Tensor) -> tuple[Tensor, int]:
    """32 numbers -> their codes [32], 0 to 15, and the exponent that they share.

    Raises:
        ValueError: not 32 numbers, or not all finite.
    """
    if x.numel() != BLOCK:
        raise ValueError(f"x {tuple(x.shape)} holds {x.numel()} numbers: a block of MXFP4 holds {BLOCK}")
    blocks, scales = pack(x.detach().flatten().cpu())
    low, high = blocks[0] & 15, blocks[0] >> 4  # the even number of a byte lies in its low four bits
    return torch.stack([low, high], -1).flatten(), int(scales[0]) - BIAS


def held(codes: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """The bytes and the values of 32 codes.   codes [32] -> bytes [16] uint8, values [32] float64

    Raises:
        ValueError: an exponent that a scale byte cannot hold.
    """
    if not -BIAS <= exponent <= BIAS:
        raise ValueError(f"exponent = {exponent}: must be from {-BIAS} to {BIAS}, a byte less {BIAS}")
    low, high = codes.to(torch.uint8).view(-1, 2).unbind(-1)
    blocks = low + 16 * high
    return blocks, unpack(blocks[None], torch.tensor([exponent + BIAS], dtype=torch.uint8), torch.float64)


def block_picture(x: Tensor, index: int, code: int, exponent: int, *, note: str = "") -> "Picture":
    """Above: the 32 values, beside what was packed. Then the 16 bytes. Below: all that 4 bits can say.

    Args:
        x: 32 numbers. index, code: the number at `index` gets this code. exponent: of the scale, 2 to it.

    Raises:
        ValueError: not 32 finite numbers; no such index, code or exponent.
    """
    from ..show.figures import ATTENTION, EXPERTS, PALE, STREAM, _array, _figure

    codes, own = packed(x)
    Whole(index, 0, BLOCK - 1).check("index")
    Bits(code, BITS).check("code")
    codes[index] = code
    raw, values = held(codes, exponent)
    _, book = held(torch.arange(16).repeat(2), exponent)
    at, given = torch.arange(BLOCK).numpy(), x.detach().flatten().double().cpu()
    error = (values - given).abs().max().item()
    title = (f"number {index}: bits {code:04b} with scale 2^{exponent} say {values[index] + 0.0:g}; largest error of "
             f"the block {error:.3g}")  # fmt: skip
    with _figure(10, 5.6, title, note) as fig:
        above, middle, below = fig.subplots(3, 1, height_ratios=[2, 0.55, 1])
        above.bar(at, _array(values), 0.7, color=[EXPERTS if i == index else ATTENTION for i in at])
        above.bar(0, 0, color=ATTENTION, label="held")
        above.plot(at, _array(given), "_", ms=11, mew=2, color=STREAM, label="before it was packed")
        above.axhline(0, color=PALE, lw=0.8)
        most = 6.3 * 2.0 ** max(own, exponent)
        above.set(ylabel="value", xlim=(-0.6, BLOCK - 0.4), ylim=(-most, most), xticks=range(BLOCK))
        above.tick_params(axis="x", length=0)
        above.legend(loc="upper right", ncols=2)

        middle.set(xlim=(-0.6, BLOCK - 0.4), ylim=(-0.5, 1.5), yticks=[0, 1], yticklabels=["bits", "byte"], xticks=[],
                   xlabel="16 bytes, the even number in the low half of each, and the scale's: "
                          f"{exponent + BIAS} = {exponent} + {BIAS}")  # fmt: skip
        for spine in middle.spines.values():
            spine.set_visible(False)
        middle.tick_params(length=0)
        for i in range(BLOCK):
            centred = dict(ha="center", va="center", family="monospace")
            middle.text(i, 0, f"{codes[i].item():04b}", fontsize=7, color=EXPERTS if i == index else STREAM, **centred)
            if i % 2 == 0:
                colour = EXPERTS if i == index - index % 2 else STREAM
                middle.text(i + 0.5, 1, f"{raw[i // 2].item():02x}", fontsize=9, color=colour, **centred)

        below.axhline(0, color=PALE, lw=0.8)
        for c in range(16):
            mine = c == code
            value = book[c].item()
            height = 0.55 if c < 8 else -0.55
            below.plot([value, value], [0, height], color=EXPERTS if mine else ATTENTION, lw=3 if mine else 1.5)
            below.text(value, height * 1.15, f"{c:04b}", ha="center", va="bottom" if c < 8 else "top", fontsize=7,
                       family="monospace", rotation=90, color=EXPERTS if mine else STREAM)  # fmt: skip
        below.set(xlabel=f"all that 4 bits can say: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives, times 2^{exponent}",
                  yticks=[], ylim=(-1.5, 1.5), xlim=(-6.6 * 2.0**exponent, 6.6 * 2.0**exponent))  # fmt: skip
        below.spines["left"].set_visible(False)
    return fig
