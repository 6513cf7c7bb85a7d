"""Which labels need which expert: every expert dropped in turn, and the loss by label."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks import edit, unwrapped
from .result import Result, fits, frame
from .router import drop


@dataclass(frozen=True)
class Needed(Result):
    """What the loss becomes without an expert, label by label, in nats a token.

    change [L E C]: mean loss of a label's tokens without the expert, less that with it.
    tokens [C]: how many tokens were predicted of each label. Of few, a change is mostly noise: the largest of many is
        larger than it would be on other texts.
    layers, labels: the numbers of the L layers and C labels.
    """

    change: Tensor
    tokens: Tensor
    layers: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: Tensor, labels: Tensor, layers: Sequence[int] | None = None) -> Self:
        """Run tokens [b s] once as the model is, and once for each expert of `layers` (all), that expert dropped.

        Args:
            labels: [b s], of the token predicted; those with a negative one are left out.

        Raises:
            ValueError: labels of another shape or all negative, or a layer that does not exist.
        """
        config = unwrapped(model).config
        layers = tuple(range(config.n_layers) if layers is None else layers)
        if wrong := [layer for layer in layers if not 0 <= layer < config.n_layers]:
            raise ValueError(f"layer {wrong[0]} does not exist: this model has layers 0 to {config.n_layers - 1}")
        labels = fits(labels, tokens.shape, "labels")[:, 1:].to(tokens.device)
        kept = labels >= 0
        if not kept.any():
            raise ValueError("no predicted token has a label of 0 or more: nothing is left to look at")
        ids, place, counts = labels[kept].unique(return_inverse=True, return_counts=True)

        def by_label() -> Tensor:
            logits = model(tokens)[:, :-1][kept]
            loss = F.cross_entropy(logits.float(), tokens[:, 1:][kept], reduction="none").double()
            return torch.zeros(len(ids), dtype=torch.double, device=loss.device).index_add_(0, place, loss) / counts

        before, rows = by_label(), []
        for layer in layers:
            for expert in range(config.n_experts):
                with edit(model, drop(layer, expert)):
                    rows.append(by_label() - before)
        change = torch.stack(rows).view(len(layers), config.n_experts, len(ids))
        return cls(change.cpu(), counts.cpu(), layers, tuple(ids.tolist()))

    @property
    def elsewhere(self) -> Tensor:
        """The second largest change: what an expert is worth beyond its own label.   -> [L E]"""
        return self.change.topk(2, -1).values[..., 1]

    def alone(self, n: int = 6) -> list[tuple[int, int, int]]:
        """(layer, expert, label) of the n experts that one label needs most beyond all others, the first first."""
        lead = self.change.amax(-1) - self.elsewhere
        at = [divmod(i, lead.shape[1]) for i in lead.flatten().argsort(descending=True)[:n].tolist()]
        return [(self.layers[row], expert, self.labels[self.change[row, expert].argmax()]) for row, expert in at]

    def frame(self):
        """One row an expert and label."""
        shape = self.change.shape
        layers, labels = (torch.tensor(x) for x in (self.layers, self.labels))
        return frame({"layer": layers[:, None, None].expand(shape).flatten(),
                      "expert": torch.arange(shape[1])[:, None].expand(shape).flatten(),
                      "label": labels.expand(shape).flatten(), "change": self.change.flatten()})  # fmt: skip

    def plot(self, names: Sequence[str] | None = None, *, limit: float | None = None, note: str = ""):
        """A column an expert, a row a label: green where the loss grows without the expert.

        Args:
            names: one for each label.
            limit: the change of the full colour, to compare two models; None: the largest here.
        """
        import numpy as np

        from ..show.figures import STREAM, _array, _figure, _name

        names, (rows, experts, _) = list(map(str, self.labels)) if names is None else names, self.change.shape
        if len(names) != len(self.labels):
            raise ValueError(f"{len(names)} names for the {len(self.labels)} labels {self.labels}")
        x = _array(self.change.flatten(0, 1).T)
        limit = limit or np.abs(x).max() or 1
        title = "which texts need which expert: a green cell alone in its column is needed by one only"
        with _figure(10.5, 1.6 + 0.22 * len(names), title, note) as fig:
            ax = fig.subplots()
            image = ax.imshow(x, cmap="BrBG", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            for edge in range(1, rows):
                ax.axvline(edge * experts - 0.5, color=STREAM, lw=0.8)
            _name(ax.yaxis, names)
            ax.set_xticks([row * experts + experts / 2 - 0.5 for row in range(rows)],
                          [f"layer {layer}" for layer in self.layers])  # fmt: skip
            ax.tick_params(axis="x", length=0)
            ax.set_xlabel(f"experts 0 to {experts - 1} of each layer")
            fig.colorbar(image, label="change, nats a token", pad=0.01)
        return fig
