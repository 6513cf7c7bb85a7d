"""What kind of head is it? Scores on a text of random tokens that comes twice (Olsson et al. 2022)."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..hooks import Activations
from .result import Result, frame, stacked

SCORES = ("previous", "duplicate", "induction", "first", "sink")


@dataclass(frozen=True)
class HeadScores(Result):
    """Mean attention mass by layer and head, from 0 to 1, of each row [L b H].

    previous: on the token before. duplicate: from the second copy, on the same token of the first. induction: on the
    token that followed it. first: on the first token of the text. sink: on no token at all.
    """

    points: ClassVar[tuple[str, ...]] = ("*.hook_pattern", "*.hook_sink_mass")

    previous: Tensor
    duplicate: Tensor
    induction: Tensor
    first: Tensor
    sink: Tensor

    @classmethod
    def of(cls, acts: Activations, *, period: int) -> "HeadScores":
        """Of recorded patterns over a text whose first `period` tokens are repeated from there on.

        Raises:
            ValueError: the text is shorter than two periods, or rows and sink do not sum to 1.
        """
        pattern, sink = stacked(acts, "attn.hook_pattern"), stacked(acts, "attn.hook_sink_mass")  # [L b H s t]
        s = pattern.shape[-2]
        if not 1 < period <= s // 2:
            raise ValueError(f"period {period} in a text of {s}: two copies of at least 2 tokens are needed")
        gap = (pattern.float().sum(-1) + sink.float() - 1).abs().max()
        if gap > 1e-2:
            raise ValueError(f"pattern rows and their sinks do not sum to 1 (off by {gap:.2g}): were they edited?")

        def back(distance: int, begin: int) -> Tensor:
            query = torch.arange(begin, s, device=pattern.device)
            return pattern[..., query, query - distance].mean(-1)

        first, sinks = pattern[..., 1:, 0].mean(-1), sink.mean(-1)
        return cls(back(1, 1), back(period, period), back(period - 1, period), first, sinks)

    def best(self, score: str, n: int = 5) -> list[tuple[int, int, float]]:
        """(layer, head, score) of the n highest, mean over rows."""
        if score not in SCORES:
            raise ValueError(f"score = {score!r}: there are {', '.join(SCORES)}")
        mean = getattr(self, score).mean(1)
        order = mean.flatten().argsort(descending=True)[:n]
        return [(int(i) // mean.shape[1], int(i) % mean.shape[1], float(mean.flatten()[i])) for i in order]

    def frame(self):
        """One line a head, mean over rows."""
        layers, _, heads = self.previous.shape
        return frame({"layer": [i for i in range(layers) for _ in range(heads)], "head": list(range(heads)) * layers}
                     | {name: getattr(self, name).mean(1).flatten() for name in SCORES})  # fmt: skip

    def plot(self, score: str = "induction", note: str = ""):
        """Layers by heads: which head does it, and in which kind of layer?"""
        from ..show.maps import heat

        x = getattr(self, score).mean(1)
        return heat(x, [f"layer {i}" for i in range(len(x))], [str(i) for i in range(x.shape[1])],
                    title=f"{score} score: in which layers do its heads live?", value="attention mass", across="head",
                    limit=1, note=note)  # fmt: skip


def repeated(tokens: Tensor, copies: int = 2) -> Tensor:
    """[b p] -> [b copies*p]: the text on which `HeadScores.measure(model, repeated(x), period=x.shape[1])` is taken."""
    return tokens.repeat(1, copies)
