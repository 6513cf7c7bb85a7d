"""What rounding to MXFP4 does to weights: how large are the errors, and which blocks suffer?"""
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import mxfp4
from .figures import ATTENTION, EXPERTS, PALE, STREAM, _figure

if TYPE_CHECKING:
    from .picture import Picture


@torch.no_grad()
def errors(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weights [... n*32] -> of all blocks B: error [B 32] in units of the block's scale; was the number cut to 6, being
    larger [B 32]; and the length of the block's error over that of its weights [B], 0 for a block of zeros."""
    blocks, scales = mxfp4.pack(weights)
    x, rounded = (y.double().reshape(-1, mxfp4.BLOCK) for y in (weights, mxfp4.unpack(blocks, scales, torch.float64)))
    scale = torch.exp2(scales.flatten().double() - mxfp4.BIAS)[:, None]
    relative = (rounded - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    return (rounded - x) / scale, x.abs() > mxfp4.MAGNITUDES[-1] * scale, relative


def rounding(weights: Mapping[str, Tensor]) -> "Picture":
    """Two histograms of the error of MXFP4: by number, in units of the block's scale, and by block.

    Of the first weights in full colour, of any others the outline.

    Args:
        weights: [... n*32] each, under the words that say whose they are.

    Raises:
        ValueError: no weights, or as `mxfp4.pack`.
    """
    if not weights:
        raise ValueError("no weights: give {whose they are: tensor}")
    steps, shares = np.arange(-2.0625, 2.1, 0.125), np.linspace(0, 0.25, 51)
    with _figure(9.6, 3.1, "what rounding to four bits changes", next(iter(weights))) as fig:
        left, right = fig.subplots(1, 2)
        for i, (whose, x) in enumerate(weights.items()):
            error, cut, relative = (y.flatten().cpu().numpy() for y in errors(x))
            each, every = np.full(error.size, 1 / error.size), np.full(relative.size, 1 / relative.size)
            if i == 0:
                for kind, colour, label in ((~cut, ATTENTION, "to the nearest code"), (cut, EXPERTS, "cut to 6")):
                    said = f"{label}: {kind.mean():.1%}"
                    left.hist(error[kind], steps, weights=each[kind], color=colour, label=said, alpha=0.85)
                right.hist(relative, shares, weights=every, color=ATTENTION, label=whose)
            else:
                left.hist(error, steps, weights=each, histtype="step", color=STREAM, label=whose)
                right.hist(relative, shares, weights=every, histtype="step", color=STREAM, label=whose)
        for ax, what in ((left, "numbers"), (right, "blocks")):
            ax.axvline(0, color=PALE, lw=0.8, zorder=0)
            ax.set(ylabel=f"share of the {what}")
            ax.legend(loc="upper right")
        left.set(xlabel="error of a number, in units of its block's scale", yscale="log", ylim=(1e-4, 5))
        left.set_yticks([1e-4, 1e-3, 1e-2, 1e-1], ["0.0001", "0.001", "0.01", "0.1"])
        left.minorticks_off()
        right.set(xlabel="error of a block, as a share of its length")
    return fig
