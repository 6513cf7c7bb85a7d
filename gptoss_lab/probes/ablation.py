"""What is a part worth? Take it away and measure; or push the stream into a direction and see what is written."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hooks import edit, record, unwrapped
from .result import Result, frame

HOW = ("zero", "mean", "resample")


@dataclass(frozen=True)
class Part:
    """A part of the model: Part("head", 3, 1), Part("attention", 2), Part("experts", 2), Part("expert", 2, 5),
    Part("neuron", 2, 5, 40) (of expert 5), Part("sink", 3, 1)."""

    kind: str
    layer: int
    index: int | None = None
    neuron: int | None = None

    def __str__(self) -> str:
        return " ".join(str(x) for x in (self.kind, self.layer, self.index, self.neuron) if x is not None)


@contextmanager
def ablated(
    model: nn.Module, parts: Part | Sequence[Part], how: str = "zero", reference: Tensor | None = None
) -> Iterator[None]:
    """The model without some parts, inside the block.

    Args:
        how: "zero": what a part writes is 0; a sink is removed. "mean": it is the mean over `reference`. "resample": it
            is what the part did on the rows of `reference`, position by position. An expert's mean is over the tokens
            that chose it; experts and neurons are not resampled: other tokens choose others. A sink is only removed.
        reference: tokens [n s]; for "resample" of the shape of what is run.

    Raises:
        ValueError: no such part, no such way, or no reference where one is needed.
    """
    inner, parts = unwrapped(model), [parts] if isinstance(parts, Part) else list(parts)
    if how not in HOW:
        raise ValueError(f"how = {how!r}: there are {', '.join(HOW)}")
    if how != "zero" and reference is None:
        raise ValueError(f"how = {how!r} needs reference tokens")
    for part in parts:
        _check(part, inner.config, how)
    recorded = None
    if how != "zero":
        names = {f"blocks.{part.layer}.{name}" for part in parts for name in _POINTS[part.kind]}
        with torch.no_grad(), record(model, *names) as recorded:
            model(reference)
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(edit(model, _edits(part, how, recorded)))
        yield


_POINTS = {"head": ("attn.hook_z",), "attention": ("hook_attn_out",), "experts": ("hook_mlp_out",),
           "expert": ("mlp.hook_expert_indices", "mlp.hook_expert_out"), "sink": ("attn.hook_sink_scores",),
           "neuron": ("mlp.hook_expert_indices", "mlp.hook_post")}  # fmt: skip


def _check(part: Part, config, how: str) -> None:
    sizes = {"head": config.n_heads, "sink": config.n_heads, "expert": config.n_experts, "neuron": config.n_experts}
    if part.kind not in _POINTS:
        raise ValueError(f"{part}: there are {', '.join(_POINTS)}")
    if not 0 <= part.layer < config.n_layers:
        raise ValueError(f"{part}: the model has layers 0 to {config.n_layers - 1}")
    if part.kind in sizes and not (part.index is not None and 0 <= part.index < sizes[part.kind]):
        raise ValueError(f"{part}: a {part.kind} of 0 to {sizes[part.kind] - 1} is needed")
    if part.kind == "neuron" and not (part.neuron is not None and 0 <= part.neuron < config.d_ff):
        raise ValueError(f"{part}: a neuron of 0 to {config.d_ff - 1} is needed")
    if (part.kind == "sink" and how != "zero") or (part.kind in ("expert", "neuron") and how == "resample"):
        raise ValueError(f"{part} cannot be ablated by {how!r}: use " + ("'zero'" if part.kind == "sink" else "'mean'"))


def _edits(part: Part, how: str, recorded) -> dict[str, Callable]:
    *before, name = (f"blocks.{part.layer}.{point}" for point in _POINTS[part.kind])
    if part.kind == "sink":
        return {name: _put(-torch.inf, (slice(None), part.index))}
    if part.kind in ("expert", "neuron"):
        return _expert_edits(part, how, recorded, before[0], name)
    where = (slice(None), slice(None), part.index) if part.kind == "head" else (...,)
    value = 0.0 if how == "zero" else recorded[name][where]
    return {name: _put(value.mean((0, 1)) if how == "mean" else value, where)}


def _put(value, where) -> Callable:
    def fn(x: Tensor) -> Tensor:
        x[where] = value
        return x

    return fn


def _expert_edits(part: Part, how: str, recorded, indices: str, name: str) -> dict[str, Callable]:
    chosen = {}
    column = ... if part.neuron is None else (..., part.neuron)
    value = 0.0
    if how == "mean":
        mine = recorded[name][recorded[indices] == part.index]
        value = mine[column].mean(0) if len(mine) else 0.0

    def note(x: Tensor) -> None:
        chosen["here"] = x == part.index

    def fn(x: Tensor) -> Tensor:
        mine = x[chosen["here"]]
        mine[column] = value
        x[chosen["here"]] = mine
        return x

    return {indices: note, name: fn}


@dataclass(frozen=True)
class Ablation(Result):
    """What each part is worth: the metric without it, less the metric with it.

    parts: their names. change [P b]: by row. plain [b]: the metric with everything in place.
    """

    parts: tuple[str, ...]
    change: Tensor
    plain: Tensor

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: Tensor, *, parts: Sequence[Part], metric: Callable[[Tensor], Tensor],
                how: str = "zero", reference: Tensor | None = None) -> "Ablation":  # fmt: skip
        """Each part alone. `metric`: logits [b s V] -> [b]."""
        if not parts:
            raise ValueError("no parts: nothing to ablate")
        plain, changes = metric(model(tokens)), []
        for part in parts:
            with ablated(model, part, how, reference):
                changes.append(metric(model(tokens)) - plain)
        return cls(tuple(map(str, parts)), torch.stack(changes), plain)

    def frame(self):
        """One line a part, mean over rows."""
        return frame({"part": list(self.parts), "change": self.change.mean(1)})

    def plot(self, note: str = ""):
        """One bar a part: which ones does the metric need?"""
        from ..show.maps import bars

        return bars(self.change.mean(1), self.parts, title="without each part alone: how far the metric moves",
                    value="change of the metric", note=note)  # fmt: skip


@contextmanager
def steered(
    model: nn.Module, layer: int, vector: Tensor, scale: float = 1.0, point: str = "hook_resid_post"
) -> Iterator[None]:
    """Add scale * vector [d] to the residual stream after a layer, at every position and every step of `generate`.

    Raises:
        ValueError: the vector is of another width, or holds NaN.
    """
    config = unwrapped(model).config
    if vector.shape != (config.d_model,) or vector.isnan().any():
        raise ValueError(f"a steering vector is {config.d_model} numbers, not {tuple(vector.shape)}"
                         + " with NaN" * bool(vector.isnan().any()))  # fmt: skip
    with edit(model, {f"blocks.{layer}.{point}": lambda x: x + (scale * vector).to(x)}):
        yield


@torch.no_grad()
def difference_of_means(model: nn.Module, one: Tensor, other: Tensor, layer: int, position: int | None = -1) -> Tensor:
    """A steering vector: mean stream after a layer over texts `one` [n s] less that over `other`.   -> [d]

    Args:
        position: which token's; None takes the mean over all.
    """
    means = []
    for tokens in (one, other):
        with record(model, f"blocks.{layer}.hook_resid_post") as acts:
            model(tokens)
        x = acts["resid_post", layer]
        means.append(x.flatten(0, 1).mean(0) if position is None else x[:, position].mean(0))
    return means[0] - means[1]
