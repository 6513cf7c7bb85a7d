"""Inside the experts: how often the clamp acts, how few neurons speak, and what four bits cost."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import mxfp4
from ..hooks import Activations, unwrapped
from .result import Result, frame, stacked


@dataclass(frozen=True)
class Activity(Result):
    """Of the chosen experts' neurons, by layer L.

    gate_clamped, linear_clamped [L]: share of the SwiGLU's inputs beyond the limit (gate above it, linear beyond it on
    either side). gate_max, linear_max [L]: the largest input, of either sign for linear. sparsity [L]: share of outputs
    smaller than a hundredth of the layer's largest. gini [L]: 0 where all neurons speak alike, near 1 where few do.
    """

    points: ClassVar[tuple[str, ...]] = ("*.mlp.hook_pre", "*.mlp.hook_pre_linear", "*.mlp.hook_post")

    gate_clamped: Tensor
    linear_clamped: Tensor
    gate_max: Tensor
    linear_max: Tensor
    sparsity: Tensor
    gini: Tensor

    @classmethod
    def of(cls, acts: Activations, *, limit: float = 7.0) -> "Activity":
        """`limit`: the model's config.swiglu_limit."""
        gate, linear, post = (stacked(acts, f"mlp.hook_{name}").flatten(1) for name in ("pre", "pre_linear", "post"))
        size = post.abs().float()
        ordered = size.sort(dim=1).values
        rank = torch.arange(1, ordered.shape[1] + 1, device=post.device)
        gini = (2 * (rank * ordered).sum(1) / ordered.sum(1) - (len(rank) + 1)) / len(rank)
        return cls((gate > limit).double().mean(1), (linear.abs() > limit).double().mean(1), gate.amax(1),
                   linear.abs().amax(1), (size < 0.01 * size.amax(1, keepdim=True)).double().mean(1), gini)  # fmt: skip

    def frame(self):
        """One line a layer."""
        names = ("gate_clamped", "linear_clamped", "gate_max", "linear_max", "sparsity", "gini")
        return frame({"layer": list(range(len(self.gini)))} | {name: getattr(self, name) for name in names})

    def plot(self, note: str = ""):
        """Layers: where does the clamp act, and where are few neurons awake?"""
        from ..show.maps import heat

        names = ("gate_clamped", "linear_clamped", "sparsity", "gini")
        x = torch.stack([getattr(self, name).double() for name in names], dim=1)
        rows, columns = [f"layer {i}" for i in range(len(x))], [name.replace("_", " ") for name in names]
        title = "inside the chosen experts: clamped inputs, silent neurons"
        return heat(x, rows, columns, limit=1, title=title, value="share", note=note)


@dataclass(frozen=True)
class PackingError(Result):
    """What rounding expert weights to MXFP4 changes, by layer and matrix M (gate_up, down) [L M]; 0 for packed models.

    relative: norm of the error over norm of the weights. worst: the largest error of a 32-value block relative to the
    block's largest value. codes [L M 8]: share of each magnitude 0, .5, 1, 1.5, 2, 3, 4, 6.
    """

    relative: Tensor
    worst: Tensor
    codes: Tensor

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module) -> "PackingError":
        rows = []
        for block in unwrapped(model).blocks:
            for experts in (block.mlp.gate_up, block.mlp.down):
                matrices = [experts.matrix(i).double() for i in range(len(experts.bias))]
                packed = [mxfp4.pack(w) for w in matrices]
                weights = torch.stack(matrices)
                errors = torch.stack([mxfp4.unpack(*both, torch.float64) for both in packed]) - weights
                error, size = (x.unflatten(-1, (-1, mxfp4.BLOCK)).abs().amax(-1) for x in (errors, weights))
                pairs = torch.stack([blocks for blocks, _ in packed]).flatten().long()
                codes = torch.cat([pairs & 7, pairs >> 4 & 7]).bincount(minlength=8)
                worst = (error / size.clamp(min=1e-300)).max()
                rows.append((errors.norm() / weights.norm(), worst, codes / codes.sum()))
        relative, worst, codes = (torch.stack(column).unflatten(0, (-1, 2)) for column in zip(*rows))
        return cls(relative, worst, codes)

    def frame(self):
        """One line a layer and matrix."""
        n = len(self.relative)
        return frame({"layer": [i for i in range(n) for _ in range(2)], "matrix": ["gate_up", "down"] * n,
                      "relative": self.relative.flatten(), "worst": self.worst.flatten()})  # fmt: skip

    def plot(self, note: str = ""):
        """Which of the eight magnitudes the weights become: is the grid well used?"""
        from ..show.maps import heat

        rows = [f"layer {i} {name}" for i in range(len(self.codes)) for name in ("gate_up", "down")]
        title = "weights by MXFP4 magnitude, in units of their block's scale: is the grid well used?"
        return heat(self.codes.flatten(0, 1), rows, ["0", "0.5", "1", "1.5", "2", "3", "4", "6"], title=title,
                    value="share of weights", note=note)  # fmt: skip
