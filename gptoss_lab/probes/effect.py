"""What an edit changes in the model's predictions, by label."""
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..hooks import Activations, edit, record
from .result import Result, fits, frame


@dataclass(frozen=True)
class Effect(Result):
    """What an edit changes in the prediction of each token but the first, in nats.

    before, after [b s-1]: -log p(token), as the model is and edited.
    kl [b s-1]: KL divergence from the model's prediction to the edited one's.
    labels [b s-1]: the label of the token predicted; tokens with a negative one are left out of every mean.
    """

    before: Tensor
    after: Tensor
    kl: Tensor
    labels: Tensor

    points: ClassVar = ("hook_tokens", "unembed.hook_out")

    @classmethod
    def of(cls, acts: Activations, edited: Activations, labels: Tensor | None = None) -> Self:
        """Two recordings of the same tokens; labels [b s] are 0 by default.

        Raises:
            ValueError: the tokens differ, the labels have another shape or are all negative, or logits are NaN.
        """
        tokens = acts["hook_tokens"]
        if not torch.equal(tokens, edited["hook_tokens"]):
            raise ValueError("the two recordings are of different tokens: give both the same text")
        if tokens.shape[1] < 2:
            raise ValueError(f"tokens {tuple(tokens.shape)}: a loss needs two positions or more")
        labels = torch.zeros_like(tokens) if labels is None else fits(labels, tokens.shape, "labels")
        labels = labels[:, 1:].to(tokens.device)
        if not (labels >= 0).any():
            raise ValueError("no predicted token has a label of 0 or more: nothing is left to look at")
        log_p, log_q = (_log_probabilities(x["unembed.hook_out"][:, :-1]) for x in (acts, edited))
        loss = lambda log: -log.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return cls(loss(log_p), loss(log_q), (log_p.exp() * (log_p - log_q)).sum(-1), labels)

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: Tensor, *edits: Mapping, labels: Tensor | None = None) -> Self:
        """Run the model on tokens [b s] as it is, and with edits as `lab.edit` takes them, in that order.

        Several edits of one layer are given one after the other: `|` would keep one function a hook point.
        """
        with record(model, *cls.points) as acts:
            model(tokens)
        with ExitStack() as open_edits, record(model, *cls.points) as edited:
            for one in edits:
                if not isinstance(one, Mapping):
                    raise TypeError(f"an edit is a mapping such as drop(3, 7) gives, not {type(one).__name__}: give "
                                    "several one after the other")  # fmt: skip
                open_edits.enter_context(edit(model, one))
            model(tokens)
        return cls.of(acts, edited, labels)

    @property
    def change(self) -> float:
        """Mean loss after less before: above 0, the edit took something away that the model needs."""
        kept = self.labels >= 0
        return (self.after - self.before)[kept].double().mean().item()

    def by_label(self) -> dict[str, Tensor]:
        """Means for each label that occurs, in columns of equal length.

        `error` is the standard error of the change over tokens. Neighbours are alike, so the true one is larger.
        """
        labels, rows = self.labels[self.labels >= 0].unique(), []
        for label in labels:
            chosen = self.labels == label
            before, after, kl = (x[chosen].double() for x in (self.before, self.after, self.kl))
            change, n = after - before, before.numel()
            error = change.std() / n**0.5 if n > 1 else change.new_tensor(torch.nan)
            rows.append(torch.stack([before.mean(), after.mean(), change.mean(), error, kl.mean()]))
        tokens = torch.stack([(self.labels == label).sum() for label in labels])
        means = torch.stack(rows).unbind(1)
        return {"label": labels, "tokens": tokens} | dict(zip(("before", "after", "change", "error", "kl"), means))

    def frame(self):
        """One row a label."""
        return frame(self.by_label())

    def plot(self, names: Sequence[str] | None = None, note: str = ""):
        """The change of the loss by label. `names` has one for each label that occurs."""
        from ..show.figures import EXPERTS, STREAM, _array, _figure, _name

        rows = self.by_label()
        names = [str(label) for label in rows["label"].tolist()] if names is None else names
        if len(names) != len(rows["label"]):
            raise ValueError(f"{len(names)} names for the {len(rows['label'])} labels {rows['label'].tolist()}")
        with _figure(9, 1.3 + 0.28 * len(names), "what the edit costs: right of 0 it hurts", note) as fig:
            ax = fig.subplots()
            at = range(len(names))
            ax.barh(at, _array(rows["change"]), xerr=_array(rows["error"].nan_to_num(0)), color=EXPERTS, height=0.7,
                    error_kw=dict(ecolor=STREAM, capsize=2))  # fmt: skip
            ax.axvline(0, color=STREAM, lw=0.8)
            _name(ax.yaxis, names)
            ax.invert_yaxis()
            ax.set(xlabel="change of the loss, nats a token (lines: ± 1 s.e.)", ylabel="label")
        return fig


def _log_probabilities(logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise ValueError("the logits hold NaN: an edit left a row with nothing, such as all router logits at -inf")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
