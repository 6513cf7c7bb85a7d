"""When does the answer appear? The residual stream of every layer, read as if it were the last."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..hooks import Activations, record, unwrapped
from ..model import GptOss
from .result import Result, frame, stacked

AFTER = ("hook_resid_mid", "hook_resid_post")  # after attention, after the experts


@dataclass(frozen=True)
class LogitLens(Result):
    """Reading by reading: R = 1 + 2 L of them, the embeddings first, then each layer after attention and after experts.

    top_ids, top_prob: the k likeliest tokens and their probabilities [R b s k]. target_prob: probability of the given
    target, or of the token that really follows [R b s], NaN where none does. entropy (nats) [R b s]. kl: nats from this
    reading to the model's own output, KL(output | reading) [R b s].
    """

    points: ClassVar[tuple[str, ...]] = ("hook_embed", "*.hook_resid_mid", "*.hook_resid_post")

    top_ids: Tensor
    top_prob: Tensor
    target_prob: Tensor
    entropy: Tensor
    kl: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, acts: Activations, *, model: GptOss, tokens: Tensor, target: Tensor | None = None, top: int = 5,
           lens: "TunedLens | None" = None) -> "LogitLens":  # fmt: skip
        """Args:
            tokens: [b s], those that were run.
            target: [b s] token ids whose probability is wanted; the next tokens by default.
            lens: translators between the stream and the unembedding; None reads it as it is (nostalgebraist 2020).
        """
        model, stream = unwrapped(model), readings(acts)
        if stream.shape[1:3] != tokens.shape:
            raise ValueError(f"tokens are {tuple(tokens.shape)}, the recorded stream {tuple(stream.shape[1:3])}")
        if target is not None and target.shape != tokens.shape:
            raise ValueError(f"target is {tuple(target.shape)}, tokens are {tuple(tokens.shape)}: one id for each")
        known = torch.ones_like(tokens, dtype=torch.bool)
        if target is None:
            target, known[:, -1] = tokens.roll(-1, dims=1), False
        final = read_out(model, stream[-1]).log_softmax(-1)
        rows = []
        for i, x in enumerate(stream):
            x = x if lens is None or i == len(stream) - 1 else lens(x, i)
            log_p = read_out(model, x).log_softmax(-1)
            p, best = log_p.exp(), log_p.topk(top, dim=-1)
            hit = p.gather(-1, target.unsqueeze(-1)).squeeze(-1).masked_fill(~known, torch.nan)
            rows.append((best.indices, best.values.exp(), hit, -(p * log_p).sum(-1),
                         (final.exp() * (final - log_p)).sum(-1)))  # fmt: skip
        return cls(*(torch.stack(column) for column in zip(*rows)))

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: Tensor, **about) -> "LogitLens":
        with record(model, *cls.points) as acts:
            model(tokens)
        return cls.of(acts, model=model, tokens=tokens, **about)

    @property
    def labels(self) -> list[str]:
        layers = (len(self.kl) - 1) // 2
        return ["embed", *(f"{layer} {part}" for layer in range(layers) for part in ("attention", "experts"))]

    def frame(self, row: int = 0):
        """One line a reading and position of one row of the batch."""
        n, s = self.kl.shape[0], self.kl.shape[2]
        columns = {"reading": [label for label in self.labels for _ in range(s)], "position": list(range(s)) * n}
        values = {"top": self.top_ids[..., 0], "probability": self.top_prob[..., 0], "target": self.target_prob,
                  "entropy": self.entropy, "kl": self.kl}  # fmt: skip
        return frame(columns | {name: x[:, row].flatten() for name, x in values.items()})

    def plot(self, encoding, tokens: Tensor, row: int = 0, note: str = ""):
        """A table: each reading's likeliest token at each position, brighter where it is surer. tokens [b s] as run.

        Raises:
            ValueError: other tokens than were read, or no such row.
        """
        from ..show import words
        from ..show.maps import table

        if tuple(tokens.shape) != tuple(self.kl.shape[1:]) or not 0 <= row < len(tokens):
            raise ValueError(f"row {row} of tokens {tuple(tokens.shape)}: {tuple(self.kl.shape[1:])} were read")
        cells = [words(ids, encoding) for ids in self.top_ids[:, row, :, 0]]
        return table(self.top_prob[:, row, :, 0], cells, self.labels, words(tokens[row], encoding),
                     title="the likeliest next token, layer by layer: where does the answer appear?",
                     value="probability", note=note)  # fmt: skip


ROWS = 16_384  # of the unembedding that are widened at a time


def readings(acts: Activations) -> Tensor:
    """The residual stream at the R places where the lens reads it.   -> [R b s d]"""
    mid, post = (stacked(acts, point) for point in AFTER)
    return torch.cat([acts["hook_embed"].unsqueeze(0), torch.stack([mid, post], 1).flatten(0, 1)])


def read_out(model: GptOss, x: Tensor) -> Tensor:
    """The model's own last step: final norm, unembedding.   [... d] -> [... V]"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    normed = wide / scale * model.ln_final.weight
    # Some rows at a time: the published table, widened whole, would be 2.3 GB.
    return torch.cat([normed @ some.T.to(wide.dtype) for some in model.unembed.weight.split(ROWS)], dim=-1)


class TunedLens(nn.Module):
    """For each reading but the last an affine map x + A x + c that makes it speak the last one's language.

    Belrose et al. 2023, arXiv 2303.08112. Trained on the spot to the model's own output; `train` takes seconds on the
    tiny model.
    """

    def __init__(self, model: GptOss):
        super().__init__()
        n, d = 2 * model.config.n_layers, model.config.d_model
        dtype = torch.float32 if model.dtype == torch.float16 else model.dtype  # that of the residual stream
        self.weight = nn.Parameter(torch.zeros(n, d, d, dtype=dtype, device=model.device))
        self.bias = nn.Parameter(torch.zeros(n, d, dtype=dtype, device=model.device))

    def forward(self, x: Tensor, reading: int) -> Tensor:
        return x + x @ self.weight[reading].mT + self.bias[reading]

    @classmethod
    def train_on(cls, model: nn.Module, batches: Iterable[Tensor], lr: float = 3e-3) -> "TunedLens":
        """One step of Adam on each batch of tokens [b s], minimising KL(output | reading) of every reading.

        Raises:
            ValueError: there is no batch.
        """
        inner, losses = unwrapped(model), []
        lens = cls(inner)
        optimiser = torch.optim.Adam(lens.parameters(), lr=lr)
        for tokens in batches:
            with torch.no_grad(), record(model, *LogitLens.points) as acts:
                model(tokens)
            stream = readings(acts)
            final = read_out(inner, stream[-1]).log_softmax(-1)
            with torch.enable_grad():
                loss = sum(
                    nn.functional.kl_div(read_out(inner, lens(x, i)).log_softmax(-1).flatten(0, 1), final.flatten(0, 1),
                                         reduction="batchmean", log_target=True)
                    for i, x in enumerate(stream[:-1])
                )  # fmt: skip
                grads = torch.autograd.grad(loss, list(lens.parameters()))
            for parameter, grad in zip(lens.parameters(), grads):
                parameter.grad = grad
            optimiser.step()
            losses.append(loss.item())
        if not losses:
            raise ValueError("no batches: a tuned lens needs texts to be trained on")
        lens.losses = losses
        return lens.requires_grad_(False).eval()
