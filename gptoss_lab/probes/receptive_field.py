"""Which positions can influence an output, by the graph of layers, and which do, by gradient?"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Config
from ..hooks import Activations, edit, record, unwrapped
from .result import Result, frame
from .windows import layers_of, windows_of


def reachable(config: Config, position: int) -> Tensor:
    """Which positions of each layer's input have a path to the output at `position`.   -> [L position+1], bool

    A sliding layer carries information window - 1 tokens further, a full layer any distance: k sliding layers in a row
    reach k * (window - 1) back, and below one full layer everything is in reach. Row 0 is the embedding's.
    """
    if position < 0:
        raise ValueError(f"position = {position}: must be at least 0")
    first, firsts = position, []
    for window in reversed(windows_of(config)):
        first = 0 if window is None else max(0, first - (window - 1))
        firsts.append(first)
    return torch.arange(position + 1) >= torch.tensor(firsts[::-1])[:, None]


def top_log_probability(logits: Tensor) -> Tensor:
    """Log-probability of the likeliest next token.   [b V] -> [b]"""
    return logits.double().log_softmax(-1).amax(-1)


@dataclass(frozen=True)
class ReceptiveField(Result):
    """Which positions can influence an output, by the graph, and which do, by the gradient.

    The norm says how far a small step in the best direction at that place moves the output. It is of the same unit at
    every position of a layer; layers differ also because the stream grows. Routing counts as fixed: a step across a
    router's tie is not seen.

    norm      [L b s]  |d output / d resid_pre| of each layer; row 0 is the embedding's
    can       [L s]    bool, whether there is a path: `reachable`
    position  whose output it is
    """

    norm: Tensor
    can: Tensor
    position: int

    points = ("blocks.*.hook_resid_pre", "unembed.hook_out")

    @classmethod
    def of(
        cls, acts: Activations, *, config: Config, position: int = -1,
        output: Callable[[Tensor], Tensor] = top_log_probability,
    ) -> "ReceptiveField":  # fmt: skip
        """Args:
            acts: recorded with gradients on, in one pass.
            position: whose output; negative counts from the end.
            output: from that position's logits [b V] to one number a row [b].

        Raises:
            ValueError: recorded without gradients, in several passes, or on another device; no such position; NaN.
        """
        logits = acts["unembed.hook_out"]
        s = logits.shape[1]
        if not -s <= position < s:
            raise ValueError(f"position = {position}: there are {s} positions, give {-s} to {s - 1}")
        layers = layers_of(acts, "hook_resid_pre")
        if layers != tuple(range(config.n_layers)):
            raise ValueError(f"resid_pre was recorded in layers {layers}: this probe needs all {config.n_layers}")
        if not logits.requires_grad:
            raise ValueError("recorded without gradients: run inside torch.enable_grad(), with weights that require "
                             "them, or use ReceptiveField.measure")  # fmt: skip
        value = output(logits[:, position])
        if value.shape != logits.shape[:1]:
            raise ValueError(f"output gave shape {tuple(value.shape)}: must be ({len(logits)},), a number a row")
        inputs = [acts[f"blocks.{layer}.hook_resid_pre"] for layer in layers]
        grads = torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True)
        if any(grad is None for grad in grads):
            raise ValueError("a recorded value is not part of the output's graph: record one pass, without a cache, "
                             "and leave the values on the model's device")  # fmt: skip
        norm = torch.stack([grad.double().norm(dim=-1) for grad in grads])
        if norm.isnan().any():
            raise ValueError("a gradient is NaN: the model's values are not numbers")
        can = torch.zeros(len(layers), s, dtype=torch.bool, device=norm.device)
        can[:, : position % s + 1] = reachable(config, position % s).to(norm.device)
        return cls(norm, can, position % s)

    @classmethod
    def measure(cls, model: nn.Module, tokens: Tensor, **about) -> "ReceptiveField":
        """Run the model on tokens [b s] with gradients, which stop at the embedding: no weight gets one."""
        start = {"hook_embed": lambda x: x.detach().requires_grad_()}
        with torch.enable_grad(), edit(model, start), record(model, *cls.points) as acts:
            model(tokens)
            return cls.of(acts, **{"config": unwrapped(model).config} | about)

    @property
    def share(self) -> Tensor:
        """Of the squared gradient, by position.   [L b s], each row sums to 1"""
        return self.norm.square() / self.norm.square().sum(-1, keepdim=True)

    def reach(self, share: float = 0.9) -> Tensor:
        """The smallest distance within which `share` of the squared gradient lies.   [L b]"""
        if not 0 < share <= 1:
            raise ValueError(f"share = {share}: must be above 0 and at most 1")
        back = self.share[..., : self.position + 1].flip(-1).cumsum(-1)
        return (back < share * (1 - 1e-12)).sum(-1).clamp(max=self.position)

    def frame(self):
        """A pandas DataFrame: one row a layer, row of the batch and position."""
        index = torch.cartesian_prod(*map(torch.arange, self.norm.shape))
        can = self.can[:, None].expand_as(self.norm)
        return frame(dict(zip(("layer", "row", "position"), index.T)) | {
            "norm": self.norm.flatten(), "share": self.share.flatten(), "can": can.flatten(),
        })  # fmt: skip

    def plot(self, row: int = 0, note: str = ""):
        """Layer over position: the share of the squared gradient; grey has no path to the output."""
        from ..show.figures import EXPERTS, _figure, _probabilities, _scale

        layers = len(self.can)
        title = f"which positions the output at {self.position} comes from: bright ones move it, grey cannot"
        with _figure(9, 1.5 + min(0.3 * layers, 5), title, note) as fig:
            ax = fig.subplots()
            image = _probabilities(ax, self.share[:, row], self.can, origin="lower")
            for layer, back in enumerate(self.reach()[:, row].tolist()):
                ax.plot([self.position - back - 0.5] * 2, [layer - 0.5, layer + 0.5], color=EXPERTS, lw=2)
            ax.set(xlabel="position (orange: from here on lie 90 % of it)", ylabel="input of layer",
                   yticks=range(0, layers, max(1, layers // 12)))  # fmt: skip
            _scale(fig, image, [ax], "share of squared gradient")
        return fig
