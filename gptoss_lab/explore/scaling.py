"""How does a short training reach a long text? YaRN: which rotary planes are kept, blended, stretched."""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config import Config
from ..probes.yarn import Planes, as_loaded
from .panel import Explorer, Whole

if TYPE_CHECKING:
    from ..show.picture import Picture

MOST = 64
KINDS = {"kept": ("#0072B2", "o"), "blended": ("#009E73", "s"), "stretched": ("#D55E00", "^")}  # Okabe and Ito


def scaling(
    model: nn.Module | Config, *, factor: int | None = None, kept: Mapping[str, Sequence] | None = None,
    note: str = "",
) -> Explorer:  # fmt: skip
    """Slide the factor by which positions are stretched, and see what YaRN does with each rotary plane.

    Args:
        model: a model, or a config alone: `scaling(config.published("gpt-oss-20b"))` needs no weights.
        factor: extended length over the trained one, from 1 to 64; None: the model's own.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: powers of 2.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: a factor that is no whole number from 1 to 64.
    """
    config = model if isinstance(model, Config) else as_loaded(model)
    if factor is None:
        factor = min(MOST, round(config.yarn.factor)) if config.yarn else 1
    kept = {"factor": [2**i for i in range(7)]} if kept is None else kept
    draw = partial(scaling_picture, config, note=note)
    return Explorer("YaRN's factor", draw, {"factor": Whole(factor, 1, MOST)}, kept=kept)


def scaling_picture(model: nn.Module | Config, factor: float, *, note: str = "") -> "Picture":
    """Left: the wavelength of each plane, and how far it is kept. Right: the concentration by factor.

    Raises:
        ValueError: a factor below 1.
    """
    from matplotlib.ticker import MaxNLocator

    from ..show.figures import PALE, STREAM, _array, _figure

    config = model if isinstance(model, Config) else as_loaded(model)
    found = Planes.of(config, factor=factor)
    n = len(found.frequency)
    counts = ", ".join(f"{found.kind.count(kind)} {kind}" for kind in KINDS)
    low, high = found.ends
    # With a factor of 1 nothing is slowed, and nothing tells the planes apart: the ramp stands all the same.
    ramp = (1 - (torch.arange(n) - low) / ((high - low) or 1e-3)).clamp(0, 1)
    with _figure(10, 5.4, f"{found.n_ctx_trained:,} positions × {factor:g} = {found.n_ctx:,}: of {n} planes {counts}",
                 note) as fig:  # fmt: skip
        grid = fig.add_gridspec(2, 2, width_ratios=[2.2, 1], height_ratios=[2, 1])
        above, below, right = (fig.add_subplot(grid[place]) for place in ((0, 0), (1, 0), (slice(None), 1)))
        wavelength, trained = found.wavelength, 2 * torch.pi / found.trained
        above.plot(range(n), _array(trained), "-", color=PALE, lw=1, label="as trained")
        for kind, (colour, mark) in KINDS.items():
            at = [p for p in range(n) if found.kind[p] == kind]
            above.plot(at, _array(wavelength[at]), mark, ms=6, color=colour, label=f"{kind}: {len(at)}")
            below.plot(at, _array(ramp[at]), mark, ms=6, color=colour)
        lengths = {"extended": (found.n_ctx, KINDS["stretched"][0]), "trained": (found.n_ctx_trained, STREAM)}
        for name, (length, colour) in lengths.items():
            if name == "trained" or length > found.n_ctx_trained:
                above.axhline(length, color=colour, lw=1, ls="--")
                above.text(0, length, f"{name} length {length:,}", va="bottom", fontsize=8, color=colour)
        above.set(yscale="log", ylabel="wavelength, tokens a turn", xlim=(-0.5, n - 0.5))
        above.set_ylim(4, 100 * trained[-1].item())
        above.yaxis.set_major_formatter("{x:,.0f}")
        above.legend(loc="lower right")
        x = torch.linspace(0, n - 1, 200)
        below.plot(_array(x), _array((1 - (x - low) / ((high - low) or 1e-3)).clamp(0, 1)), color=PALE, lw=1, zorder=0)
        for end in (low, high):
            below.axvline(end, color=STREAM, lw=0.8, ls=":")
        below.set(xlabel=f"plane (dotted: the ramp's ends, {low:.2f} and {high:.2f})", ylabel="frequency kept",
                  xlim=(-0.5, n - 0.5), ylim=(-0.08, 1.08))  # fmt: skip
        for ax in (above, below):
            ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
        s = torch.linspace(1, MOST, 200)
        right.plot(_array(s), _array(0.1 * s.log() + 1), color=PALE, lw=1.5, label="0.1 ln s + 1")
        right.plot(factor, found.concentration, "o", ms=9, color=STREAM)
        right.set(xlabel="factor s", ylabel="q and k are multiplied by", xlim=(0, MOST + 1), ylim=(0.98, 1.46),
                  title=f"concentration {found.concentration:.4f}")  # fmt: skip
        right.legend(loc="lower right")
    return fig
