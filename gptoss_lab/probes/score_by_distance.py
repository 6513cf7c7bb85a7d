"""What a head's score makes of distance alone, under each way of stretching RoPE."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Config
from ..hooks import Activations, record, unwrapped
from .result import Result, frame
from .yarn import COLOURS, DASHES, WAYS, as_loaded, factor_of, rope, trained_length


@dataclass(frozen=True)
class ScoreByDistance(Result):
    """A head's attention score if queries and keys stood d tokens apart, wherever they really stood.

    The mean over all pairs of a recorded query and a recorded key: what the head prefers by distance alone.
    q and k are those of the model as it ran; only the turning differs between ways.

    score          [W D]  q · k / sqrt(d_head), as hook_attn_scores
    distance       [D]    tokens
    ways           [W]
    layer, head    whose
    factor         extended length over trained
    n_ctx_trained  positions in training
    """

    score: Tensor
    distance: Tensor
    ways: tuple[str, ...]
    layer: int
    head: int
    factor: float
    n_ctx_trained: int

    points = ("blocks.*.attn.hook_q", "blocks.*.attn.hook_k")

    @classmethod
    def of(
        cls, acts: Activations, *, config: Config, layer: int, head: int, ways: Sequence[str] = WAYS,
        factor: float | None = None, distances: Tensor | None = None, query: int | None = None, key: int | None = None,
    ) -> "ScoreByDistance":  # fmt: skip
        """Args:
            distances: tokens [D]; None: every one up to the extended length.
            query, key: take that position's only, in place of the mean of all.

        Raises:
            KeyError: the layer was not recorded. ValueError: no such head, way or position; NaN.
        """
        q, k = (acts[f"blocks.{layer}.attn.hook_{name}"].double() for name in "qk")
        if not 0 <= head < q.shape[2]:
            raise ValueError(f"head = {head}: layer {layer} has heads 0 to {q.shape[2] - 1}")
        for name, at in (("query", query), ("key", key)):
            if at is not None and not -q.shape[1] <= at < q.shape[1]:
                raise ValueError(f"{name} = {at}: {q.shape[1]} positions were recorded")
        k = k[:, :, head // (q.shape[2] // k.shape[2])]  # of the queries' group
        q = q[:, :, head]
        q, k = (x.mean(1) if at is None else x[:, at] for x, at in ((q, query), (k, key)))
        q, k = q.mean(0).cpu(), k.mean(0).cpu()
        if q.isnan().any() or k.isnan().any():
            raise ValueError(f"q or k of layer {layer}, head {head} holds NaN: the model's values are not numbers")
        if not ways:
            raise ValueError("ways is empty: name at least one")
        factor = factor_of(config, factor)
        length = math.ceil(trained_length(config) * factor)
        distances = torch.arange(length) if distances is None else torch.as_tensor(distances)
        # A pair (x[i], x[i + h/2]) is a complex number, turned by a unit one: q · k is the real part of q conj(k).
        product = torch.complex(*q.chunk(2)) * torch.complex(*k.chunk(2)).conj()
        scores = []
        for way in ways:
            made = rope(config, way, factor)
            angle = distances.double()[:, None] * made.frequencies
            turned = product.real * angle.cos() - product.imag * angle.sin()
            scores.append(made.concentration**2 * turned.sum(-1) / config.d_head**0.5)
        return cls(torch.stack(scores), distances, tuple(ways), layer, head, factor, trained_length(config))

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: Tensor, *, layer: int, head: int, **about) -> "ScoreByDistance":
        """Run the model on tokens [b s], up to the layer asked for."""
        with record(model, *(f"blocks.{layer}.attn.hook_{name}" for name in "qk")) as acts:
            unwrapped(model)(tokens, stop_at_layer=layer + 1)
        return cls.of(acts, **{"config": as_loaded(model), "layer": layer, "head": head} | about)

    def frame(self):
        """A pandas DataFrame: one row a distance, one column a way."""
        return frame({"distance": self.distance} | dict(zip(self.ways, self.score)))

    def plot(self, note: str = ""):
        """Score against distance, a line a way: far planes make it flicker, so means are drawn over it."""
        from ..show.figures import _array, _figure

        title = f"score of layer {self.layer}, head {self.head} by distance alone: right of the line is untrained"
        with _figure(9, 3.6, title, note or f"factor {self.factor:g}") as fig:
            ax = fig.subplots()
            bins = (8 * (self.distance.double() + 1).log2()).long()  # eighths of an octave
            each = bins.unique()
            for way, score in zip(self.ways, self.score):
                ax.plot(_array(self.distance), _array(score), color=COLOURS[way], lw=0.6, alpha=0.3)
                mean = [[x[bins == one].double().mean().item() for one in each] for x in (self.distance, score)]
                ax.plot(*mean, color=COLOURS[way], ls=DASHES[way], lw=1.6, label=way)
            ax.axvline(self.n_ctx_trained, color="#444444", lw=0.8)
            ax.set(xscale="symlog", xlim=(0, None), ylabel="q · k / sqrt(d_head)",
                   xlabel="distance from query to key, tokens (thin: each distance; thick: means of an eighth octave)")
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.legend(ncols=len(self.ways), loc="lower center", bbox_to_anchor=(0.5, 1))
        return fig
