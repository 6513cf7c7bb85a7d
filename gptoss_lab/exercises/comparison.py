"""Where two results first differ, in words and as pictures."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .exercise import Exercise

if TYPE_CHECKING:
    from ..show.picture import Picture

NUMBERS = (bool, int, float, np.generic, np.ndarray, Tensor)


@dataclass(frozen=True)
class Difference:
    """What is wrong with an answer, in a sentence; and where both are arrays of one shape, the arrays and the place."""

    text: str
    yours: Tensor | None = None
    target: Tensor | None = None
    at: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()


def difference(yours, target, exercise: Exercise, part: str = "") -> Difference | None:
    """The first difference from the target; None if there is none."""
    what = f"for {part} " if part else ""
    if isinstance(target, Mapping):
        if not isinstance(yours, Mapping):
            return Difference(f"{what}is {_kind(yours)}; a dict with {_listed(target)} is wanted")
        if {*yours} != {*target}:
            if missing := [key for key in target if key not in yours]:
                return Difference(f"{what}lacks {_listed(missing)}")
            extra = [key for key in yours if key not in target]
            return Difference(f"{what}has {_listed(extra)}, which is not asked for")
        found = (difference(yours[key], target[key], exercise, f"{key!r}") for key in target)
        return next(filter(None, found), None)
    if isinstance(target, str) or isinstance(target, tuple) and all(type(x) is int for x in target):  # words, a shape
        if yours == target:
            return None
        said = repr(yours) if isinstance(yours, (str, tuple, list, int)) else _kind(yours)
        return Difference(f"{what}is {said}, " + (f"the target {target!r}" if exercise.inputs else "which is not it"))
    if isinstance(target, tuple):
        if not isinstance(yours, (tuple, list)) or len(yours) != len(target):
            return Difference(f"{what}is {_kind(yours)}; {len(target)} results are wanted, in a tuple")
        pairs = enumerate(zip(yours, target), 1)
        found = (difference(y, t, exercise, f"number {i} of {len(target)}") for i, (y, t) in pairs)
        return next(filter(None, found), None)
    if isinstance(target, list):  # of words: the target is not told
        if isinstance(yours, (str, Mapping)) or not isinstance(yours, Sequence) or len(yours) != len(target):
            return Difference(f"{what}is {_kind(yours)}; a list of {len(target)} is wanted")
        at = next((i for i, (y, t) in enumerate(zip(yours, target)) if y != t), None)
        if at is None:
            return None
        wrong = "comes too early or too late" if yours[at] in target else f"is none of {_listed(target)}"
        return Difference(f"{what}is right up to place {at}; {yours[at]!r} there {wrong}")
    return _numbers(yours, torch.as_tensor(target).detach(), exercise, what, part)


def _numbers(yours, target: Tensor, exercise: Exercise, what: str, part: str) -> Difference | None:
    axes = exercise.axes.get(part.strip("'"), ()) if isinstance(exercise.axes, Mapping) else exercise.axes
    if len(axes) != target.ndim:
        axes = tuple(f"axis {i}" for i in range(target.ndim))
    wanted = f"[{' '.join(axes)}] = {tuple(target.shape)}" if target.ndim else "one number"
    if not isinstance(yours, (*NUMBERS, list, tuple)):
        return Difference(f"{what}is {_kind(yours)}; {'a tensor ' if target.ndim else ''}{wanted} is wanted")
    try:
        yours = torch.as_tensor(yours).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        return Difference(f"{what}is {_kind(yours)}, which is no array of numbers: {error}")
    if yours.shape != target.shape:
        if yours.ndim != target.ndim:
            return Difference(f"{what}has the shape {tuple(yours.shape)}; {wanted} is wanted")
        axis = next(i for i in range(target.ndim) if yours.shape[i] != target.shape[i])
        return Difference(f"{what}has the shape {tuple(yours.shape)}; {wanted} is wanted: "
                          f"along {axes[axis]} it is {yours.shape[axis]} long, not {target.shape[axis]}")  # fmt: skip
    a, b = yours.to("cpu", torch.float64), target.to("cpu", torch.float64)
    size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    wrong = ~((a - b).abs() <= exercise.tolerance * max(1.0, size)) & ~(a == b)  # -inf is -inf; NaN equals nothing
    if not wrong.any():
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0])
    place = "at " + ", ".join(f"{name} {i}" for name, i in zip(axes, at)) if at else ""
    share = f" ({int(wrong.sum())} of {wrong.numel()} differ)" if wrong.numel() > 1 else ""
    told = f"is {_number(yours[at])}, the target {_number(target[at])}{share}" if exercise.inputs or target.ndim else \
        f"is {_number(yours[at])}, which is not it"  # fmt: skip
    if a[at].isnan():
        told += ": NaN comes from 0/0, inf - inf, or the root or logarithm of a negative number"
    return Difference(f"first difference {what}{place}: yours {told}".replace(" :", ":"), a, b, at, axes)


def picture(found: Difference) -> "Picture":
    """Yours beside the target, on one scale of colours, the first difference in a frame."""
    from matplotlib.patches import Rectangle

    from ..show.figures import ATTENTION, EXPERTS, _figure

    lead, axes = found.at[:-2], found.axes[-2:]
    pair = [x[lead].float().numpy() for x in (found.yours, found.target)]
    where = ", ".join(f"{name} {i}" for name, i in zip(found.axes, lead))
    title = "yours beside the target: the frame is the first difference" + (f" ({where})" if where else "")
    if pair[0].ndim == 1:
        with _figure(8, 2.2, title) as fig:
            ax, n = fig.subplots(), np.arange(pair[0].size)
            for x, shift, colour, label in zip(pair, (-0.2, 0.2), (EXPERTS, ATTENTION), ("yours", "target")):
                ax.bar(n + shift, np.nan_to_num(x, nan=0, posinf=0, neginf=0), 0.4, color=colour, label=label)
            ax.axvspan(found.at[-1] - 0.5, found.at[-1] + 0.5, color="#999999", alpha=0.35, lw=0)
            ax.set(xlabel=axes[-1], ylabel="value")
            ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
        return fig
    finite = np.concatenate([x[np.isfinite(x)] for x in pair])
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
    with _figure(8, 3.4, title) as fig:
        for ax, x, label in zip(fig.subplots(1, 2), pair, ("yours", "target")):
            ax.set_facecolor("#ececec")
            image = ax.imshow(np.where(np.isfinite(x), x, np.nan), cmap="viridis", vmin=low, vmax=high, aspect="auto",
                              interpolation="nearest")  # fmt: skip
            ax.add_patch(Rectangle((found.at[-1] - 0.5, found.at[-2] - 0.5), 1, 1, fill=False, ec=EXPERTS, lw=2.5))
            ax.set(title=label, xlabel=axes[1], ylabel=axes[0])
        fig.colorbar(image, ax=fig.axes, label="value; grey: not finite", pad=0.01)
    return fig


def _number(x: Tensor) -> str:
    return str(x.item()) if not x.is_floating_point() else f"{x.item():.6g}"


def _kind(x) -> str:
    if x is None:
        return "None (is a `return` missing?)"
    size = f" of {len(x)}" if isinstance(x, (list, tuple, dict)) else ""
    return f"{'an' if type(x).__name__[0] in 'aeiou' else 'a'} {type(x).__name__}{size}"


def _listed(keys) -> str:
    return ", ".join(map(repr, keys))
