"""How the residual stream grows, and which of its dimensions are far larger than the others."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..hooks import Activations
from .lens import readings
from .result import Result, frame


@dataclass(frozen=True)
class Growth(Result):
    """At the R places of the stream (embeddings, then after attention and after experts of each layer).

    norm [R b s]: length of the vector. written [R-1 b s]: length of what was added there. turn [R-1 b s]: cosine of
    the stream before and after. largest [R d]: largest absolute value of each dimension over rows and positions, in
    units of the stream's root mean square there.
    """

    points: ClassVar[tuple[str, ...]] = ("hook_embed", "*.hook_resid_mid", "*.hook_resid_post")

    norm: Tensor
    written: Tensor
    turn: Tensor
    largest: Tensor

    @classmethod
    def of(cls, acts: Activations) -> "Growth":
        stream = readings(acts)
        stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        added = stream[1:] - stream[:-1]
        rms = stream.square().mean((1, 2, 3)).sqrt()
        return cls(stream.norm(dim=-1), added.norm(dim=-1), torch.cosine_similarity(stream[1:], stream[:-1], dim=-1),
                   stream.abs().amax((1, 2)) / rms[:, None])  # fmt: skip

    def outliers(self, reading: int = -1, n: int = 5) -> list[tuple[int, float]]:
        """(dimension, size in rms) of the n largest of one reading."""
        best = self.largest[reading].topk(n)
        return list(zip(best.indices.tolist(), best.values.tolist()))

    def frame(self):
        """One line a reading, means over rows and positions."""
        pad = lambda x: torch.cat([x.new_full((1,), torch.nan), x.mean((1, 2))])
        return frame({"reading": list(range(len(self.norm))), "norm": self.norm.mean((1, 2)), "turn": pad(self.turn),
                      "written": pad(self.written), "largest": self.largest.amax(1)})  # fmt: skip

    def plot(self, words, note: str = ""):
        """Readings by positions: where does the stream become long, and at which tokens?"""
        from ..show.maps import heat

        layers = (len(self.norm) - 1) // 2
        names = ["embed", *(f"{layer} {part}" for layer in range(layers) for part in ("attention", "experts"))]
        return heat(self.norm[:, 0], names, words, title="length of the residual stream: where does it grow?",
                    value="norm", across="position", note=note)  # fmt: skip
