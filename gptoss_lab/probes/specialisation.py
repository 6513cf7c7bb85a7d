"""What an expert tells about a label: mutual information beside what chance gives."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .result import Result, frame


@dataclass(frozen=True)
class Specialisation(Result):
    """What an expert tells about a label. Information is in nats (1 nat is 1.44 bits).

    information [L]: mutual information of expert and label, given the token where one was asked for.
    chance [L], spread [L]: mean and standard deviation of the same with shuffled labels. Information from counts is
        never negative and grows with few tokens: only the excess over chance says something.
    share [L C E]: of the tokens with a label, the share that takes each expert.
    tokens [C]: how many tokens have each label.
    layers, labels: the numbers of the L layers and C labels.
    """

    information: Tensor
    chance: Tensor
    spread: Tensor
    share: Tensor
    tokens: Tensor
    layers: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def excess(self) -> Tensor:
        """Information beyond chance.   -> [L]"""
        return self.information - self.chance

    def frame(self):
        """One row a layer."""
        return frame({"layer": list(self.layers), "information": self.information, "chance": self.chance,
                      "spread": self.spread, "excess": self.excess})  # fmt: skip

    def plot(self, names: Sequence[str] | None = None, note: str = ""):
        """Information by layer beside its chance level; the experts of each label in the most telling layer.

        Args:
            names: one for each label.
        """
        from ..show.figures import EXPERTS, STREAM, _array, _figure, _name, _probabilities, _scale

        names, best = [str(label) for label in self.labels] if names is None else names, int(self.excess.argmax())
        if len(names) != len(self.labels):
            raise ValueError(f"{len(names)} names for the {len(self.labels)} labels {self.labels}")
        title = "information above the chance band is specialisation"
        with _figure(9.6, max(2.9, 1.4 + 0.22 * len(names)), title, note) as fig:
            left, right = fig.subplots(1, 2, width_ratios=[1, 1.6])
            left.bar([str(layer) for layer in self.layers], _array(self.information), color=EXPERTS, width=0.7)
            left.errorbar(range(len(self.layers)), _array(self.chance), yerr=_array(2 * self.spread), fmt="_",
                          color=STREAM, capsize=3, label="shuffled labels, ± 2 s.d.")  # fmt: skip
            left.set(xlabel="layer", ylabel="information, nats")
            left.tick_params(axis="x", labelrotation=90 if len(self.layers) > 12 else 0)
            left.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
            image = _probabilities(right, self.share[best])
            _name(right.yaxis, names)
            n_experts = self.share.shape[-1]
            right.set(xlabel="expert", title=f"layer {self.layers[best]}: share of a label's tokens",
                      xticks=range(0, n_experts, math.ceil(n_experts / 8)))  # fmt: skip
            _scale(fig, image, [right], "share of tokens")
        return fig


def counts_by(choices: Tensor, labels: Tensor, groups: Tensor, n_experts: int) -> Tensor:
    """How often a label's tokens of a group go to an expert.   [L n k], [n], [n] -> [L G C E]"""
    sizes = int(groups.max()) + 1, int(labels.max()) + 1, n_experts
    place = ((groups * sizes[1] + labels) * n_experts)[:, None]
    counts = [(place + layer).flatten().bincount(minlength=math.prod(sizes)) for layer in choices]
    return torch.stack(counts).view(len(choices), *sizes).double()


def information(counts: Tensor) -> Tensor:
    """I(expert; label | group) in nats.   [L G C E] -> [L]"""
    total = lambda n: torch.xlogy(n, n).flatten(1).sum(1)
    joint = total(counts) + total(counts.sum((2, 3)))
    return (joint - total(counts.sum(3)) - total(counts.sum(2))) / counts.sum((1, 2, 3))


def shuffled_within(groups: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """The labels of each group's members, in random order.   [n], [n] -> [n]"""
    order = torch.randperm(len(groups), generator=rng)
    out = torch.empty_like(labels)
    out[groups.argsort(stable=True)] = labels[order][groups[order].argsort(stable=True)]
    return out
