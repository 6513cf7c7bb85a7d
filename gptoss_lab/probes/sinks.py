"""How much of its attention a head gives to its sink, for which tokens, and what the sink is worth.

    sinks = Sinks.measure(model, tokens)                      # mass by head and token; also of recorded rows
    cost = Effect.measure(model, tokens, remove(3))           # the loss without the sinks of layer 3 (effect.py)

A sink is a learned logit without a value: mass on it is attention that reads nothing. With o the output of plain
softmax attention, the head writes (1 - mass) o.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..hooks import Activations
from .result import Result, fits, frame, stacked


@dataclass(frozen=True)
class Sinks(Result):
    """Sink mass, head by head. Means are over the queries that `valid` keeps; entropies are in nats.

    mass [L b H s]: probability that a query spends on the sink, from 0 to 1.
    first [L b H s]: probability on the first token, the sink of models that have no other. It is 0 where a sliding
        window no longer reaches it; at the first token itself it is 1 - mass.
    entropy [L b H s]: of the whole row, the sink counted as one more key.
    entropy_without [L b H s]: of the row over its keys alone, scaled to sum to 1; 0 where the sink has everything.
    valid [b s]: False where a position is padding.
    layers: the number of each layer, L of them.
    """

    mass: Tensor
    first: Tensor
    entropy: Tensor
    entropy_without: Tensor
    valid: Tensor
    layers: tuple[int, ...]

    points: ClassVar = ("*.attn.hook_pattern", "*.attn.hook_sink_mass")

    @classmethod
    def of(cls, acts: Activations, valid: Tensor | None = None, layers: Sequence[int] | None = None) -> Self:
        """The sinks of `layers` (all that were recorded), at the positions where `valid` [b s] is True (all).

        Raises:
            KeyError: a layer does not exist, or was not recorded.
            ValueError: see `from_rows`.
        """
        if layers is None:
            layers = [int(name.split(".")[1]) for name in acts if name.endswith("hook_sink_mass")]
            stacked(acts, "attn.hook_sink_mass")  # raises where there is none
        row = lambda layer: (stacked(acts, f"attn.hook_{name}", [layer])[0] for name in ("pattern", "sink_mass"))
        parts = [cls.from_rows(*row(layer), valid, layer) for layer in layers]  # patterns are large: one at a time
        if not parts:
            raise ValueError("layers is empty: name one or more")
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in
                  ("mass", "first", "entropy", "entropy_without"))  # fmt: skip
        return cls(*joined, parts[0].valid, tuple(layers))

    @classmethod
    def from_rows(cls, pattern: Tensor, mass: Tensor, valid: Tensor | None = None, layer: int = 0) -> Self:
        """One layer's attention rows, from wherever: pattern [b H s t] and sink mass [b H s].

        Raises:
            ValueError: shapes that do not fit, NaN, no position left, or a row that does not sum to 1 with its sink.
        """
        if pattern.dim() != 4 or pattern.shape[:3] != mass.shape:
            raise ValueError(f"pattern {tuple(pattern.shape)} must be [batch, head, query, key], and mass "
                             f"{tuple(mass.shape)} the same without key")  # fmt: skip
        b, _, s, t = pattern.shape
        valid = torch.ones(b, s, dtype=torch.bool) if valid is None else fits(valid.bool(), (b, s), "valid")
        valid = valid.to(mass.device)
        if not valid.any():
            raise ValueError("valid is False everywhere: no query is left to look at")
        wide = torch.promote_types(pattern.dtype, torch.float32)
        keys, mass = pattern.sum(-1, dtype=wide), mass.to(wide)
        off = (keys + mass - 1).abs().transpose(1, 2)[valid]
        most = max(1e-5, 4 * torch.finfo(pattern.dtype).eps)  # bfloat16 rounds every probability of a row
        if not off.max() <= most:
            raise ValueError(f"a row of layer {layer} and its sink sum to 1 ± {off.max():.2g}, not 1: the pattern was "
                             "edited, or the two were not recorded in one pass")  # fmt: skip
        # Where rows are padded on the left, the first token is the first that is valid.
        start = valid.int().argmax(-1) if s == t else torch.zeros(b, dtype=torch.int64, device=valid.device)
        first = pattern.gather(-1, start.view(b, 1, 1, 1).expand(*mass.shape, 1)).squeeze(-1).to(wide)
        over_keys = torch.special.entr(pattern.to(wide)).sum(-1)
        entropy = over_keys + torch.special.entr(mass)
        without = torch.where(keys > 0, over_keys / keys + keys.log(), 0.0)  # that of pattern / keys
        return cls(mass[None], first[None], entropy[None], without[None], valid, (layer,))

    def by_head(self, values: Tensor | None = None) -> Tensor:
        """The mean of `mass`, or of another field, over the queries.   [L b H s] -> [L H]"""
        return (self.mass if values is None else values).transpose(2, 3)[:, self.valid].double().mean(1)

    def by_label(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean sink mass of the queries with each label.   labels [b s] -> labels [C], queries [C], mass [L H C]

        Labels are any whole numbers: token classes, channels, or token ids; negative ones are left out.

        Raises:
            ValueError: labels of another shape, or no query left.
        """
        labels = fits(labels, self.valid.shape, "labels").to(self.mass.device)
        kept = self.valid & (labels >= 0)
        if not kept.any():
            raise ValueError("no valid query has a label of 0 or more: nothing is left to look at")
        ids, place, queries = labels[kept].unique(return_inverse=True, return_counts=True)
        mass = self.mass.transpose(2, 3)[:, kept].mT.double()  # [L H n]
        sums = mass.new_zeros(*mass.shape[:2], len(ids)).index_add_(-1, place, mass)
        return ids, queries, sums / queries

    def resting(self, threshold: float = 0.5) -> Tensor:
        """Share of the queries in which a head gives its sink more than `threshold`.   -> [L H]"""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold = {threshold}: sink mass lies between 0 and 1")
        return self.by_head(self.mass > threshold)

    def resting_heads(self, threshold: float = 0.5) -> list[tuple[int, int]]:
        """(layer, head) of the heads whose mean sink mass is more than `threshold`, the most at rest first."""
        mass = self.by_head()
        at = mass.flatten().argsort(descending=True).tolist()
        pairs = [divmod(i, mass.shape[1]) for i in at if mass.flatten()[i] > threshold]
        return [(self.layers[row], head) for row, head in pairs]

    def frame(self):
        """One row a layer and head."""
        n_heads = self.mass.shape[2]
        columns = {"layer": [layer for layer in self.layers for _ in range(n_heads)],
                   "head": list(range(n_heads)) * len(self.layers), "resting": self.resting().flatten()}  # fmt: skip
        names = "mass", "first", "entropy", "entropy_without"
        return frame(columns | {name: self.by_head(getattr(self, name)).flatten() for name in names})

    def plot(self, note: str = ""):
        """Each head's mean mass on its sink; beside it, against its mass on the first token."""
        from ..show.figures import ATTENTION, STREAM, _array, _figure, _name, _probabilities, _scale

        mass, first = _array(self.by_head()), _array(self.by_head(self.first))
        title = "a bright head rests; right: heads below the line use the sink, above it the first token"
        with _figure(10, min(2.9 + 0.08 * len(mass), 5.5), title, note) as fig:
            left, right = fig.subplots(1, 2, width_ratios=[1.6, 1])
            image = _probabilities(left, torch.from_numpy(mass))
            _name(left.yaxis, [str(layer) for layer in self.layers], most=12)
            left.set(xlabel="head", ylabel="layer", title="mean mass on the sink",
                     xticks=range(0, mass.shape[1], math.ceil(mass.shape[1] / 8)))  # fmt: skip
            _scale(fig, image, [left], "probability")
            right.plot([0, 1], [0, 1], color=STREAM, lw=0.8, ls="--")
            right.scatter(mass, first, s=12, color=ATTENTION, alpha=0.6, lw=0)
            right.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="mean mass on the sink, probability",
                      ylabel="on the first token, probability", title="one dot a head")  # fmt: skip
        return fig


# ------------------------------------------------------------------------------------------ edits


def remove(layer: int | None = None, heads: int | Sequence[int] | None = None) -> dict[str, Callable]:
    """An edit: no sink, so that a row sums to 1. Of all layers where none is named, of all heads likewise."""
    return _put(layer, heads, -torch.inf)


def zero(layer: int | None = None, heads: int | Sequence[int] | None = None) -> dict[str, Callable]:
    """An edit: a sink logit of 0, which is the softmax with one added to its denominator."""
    return _put(layer, heads, 0.0)


def swap(layer: int, one: int, other: int) -> dict[str, Callable]:
    """An edit: two heads of a layer have each other's sink logit."""

    def swapped(sinks: Tensor) -> Tensor:
        pair = _named([one, other], sinks)
        return sinks.index_copy(1, torch.tensor(pair, device=sinks.device), sinks[:, pair[::-1]])

    return {_point(layer): swapped}


def _put(layer: int | None, heads: int | Sequence[int] | None, logit: float) -> dict[str, Callable]:
    def put(sinks: Tensor) -> Tensor:
        sinks[:, slice(None) if heads is None else _named([heads] if isinstance(heads, int) else heads, sinks)] = logit
        return sinks

    return {_point(layer): put}


def _point(layer: int | None) -> str:
    if layer is not None and not isinstance(layer, int):
        raise TypeError(f"layer = {type(layer).__name__}: an edit is made for a layer's number, or for all with None; "
                        "it meets its model in lab.edit(model, ...)")  # fmt: skip
    return f"blocks.{'*' if layer is None else layer}.attn.hook_sink_scores"


def _named(heads: Sequence[int], sinks: Tensor) -> list[int]:
    if not heads or not all(0 <= head < sinks.shape[1] for head in heads):
        raise ValueError(f"heads {list(heads)}: name one or more of 0 to {sinks.shape[1] - 1}")
    return list(heads)
