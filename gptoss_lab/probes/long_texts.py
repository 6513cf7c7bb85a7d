"""Loss and retrieval beyond the trained length, under each way of stretching RoPE."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..generate import generate
from ..hooks import unwrapped
from ..kv_cache import KVCache
from .result import Result, frame
from .yarn import COLOURS, DASHES, WAYS, as_loaded, extended, factor_of, trained_length


@dataclass(frozen=True)
class LossByPosition(Result):
    """Loss of texts of 1, 2, 4, ... times the trained length, the model stretched to each in each of the ways.

    loss           [F W b s]  nats for the token after each position; NaN behind the length and where it does not count
    factors        [F]        text length over trained length, and the factor of the stretching
    ways           [W]
    n_ctx_trained  positions in training
    """

    loss: Tensor
    factors: tuple[float, ...]
    ways: tuple[str, ...]
    n_ctx_trained: int

    @classmethod
    @torch.no_grad()
    def measure(
        cls, model: nn.Module, tokens: Tensor, *, ways: Sequence[str] = WAYS, factors: Sequence[float] = (1, 2, 4, 8),
        counts: Tensor | None = None, chunk: int = 1024,
    ) -> "LossByPosition":  # fmt: skip
        """Args:
            tokens: rows [b s+1] of text, at least the largest factor times the trained length and one more.
            counts: bool [b s], which predictions count: leave out what nothing before it tells. None: all.
            chunk: positions read in one pass; bounds the memory that the logits take.

        Raises:
            ValueError: the rows are too short, `counts` has another shape or chooses nothing, or the loss is NaN.
        """
        trained = trained_length(as_loaded(model))
        lengths = [int(factor * trained) for factor in factors]
        if not factors or not ways:
            raise ValueError("there must be at least one way and one factor")
        if tokens.shape[1] <= max(lengths):
            raise ValueError(f"rows of {tokens.shape[1]} tokens are too short: {max(factors):g} times the trained "
                             f"length of {trained} needs {max(lengths) + 1}")  # fmt: skip
        shape = tokens.shape[0], max(lengths)
        counts = torch.ones(shape, dtype=torch.bool) if counts is None else counts[:, : shape[1]]
        if counts.shape != shape or counts.dtype != torch.bool or not counts[:, : min(lengths)].any():
            raise ValueError(f"counts is {counts.dtype} {tuple(counts.shape)}: must be bool {shape}, somewhere True "
                             f"within the first {min(lengths)}")  # fmt: skip
        loss = torch.full((len(factors), len(ways), *shape), math.nan)
        for f, (factor, length) in enumerate(zip(factors, lengths)):
            for w, way in enumerate(ways):
                with extended(model, way, factor):
                    loss[f, w, :, :length] = _losses(model, tokens[:, : length + 1], chunk)
                if loss[f, w, :, :length].isnan().any():
                    raise ValueError(f"a loss is NaN ({way}, factor {factor:g}): the model's values are not numbers")
        loss[..., ~counts.cpu()] = math.nan
        return cls(loss, tuple(map(float, factors)), tuple(ways), trained)

    def by_length(self) -> Tensor:
        """Mean loss of a whole text, by its length: what the paper's figures show, as exp(loss).   [F W]"""
        return self.loss.nanmean((2, 3))

    def by_position(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean loss in stretches of `width` positions, and its standard error over rows.   [F W n], [F W n]

        Args:
            width: None takes a quarter of the trained length. A shorter rest at the end is a stretch of its own.
        """
        width = max(1, self.n_ctx_trained // 4) if width is None else width
        parts = self.loss.double().split(width, -1)
        mean = torch.stack([part.nanmean((2, 3)) for part in parts], -1)
        rows = torch.stack([part.nanmean(3) for part in parts], -1)  # [F W b n]
        n = (~rows.isnan()).sum(2)
        spread = ((rows - rows.nanmean(2, keepdim=True)) ** 2).nansum(2) / (n - 1)
        return mean, torch.where(n > 1, (spread / n).sqrt(), math.nan)

    def frame(self):
        """A pandas DataFrame: one row a factor, way and stretch of positions."""
        mean, error = self.by_position()
        f, w, n = torch.cartesian_prod(*map(torch.arange, mean.shape)).T
        return frame({
            "factor": torch.tensor(self.factors)[f], "way": [self.ways[i] for i in w],
            "position": n * max(1, self.n_ctx_trained // 4), "loss": mean.flatten(), "error": error.flatten(),
        })  # fmt: skip

    def plot(self, note: str = ""):
        """Left: loss against the text's length. Right: loss by position of the longest text."""
        from matplotlib.ticker import MaxNLocator, NullLocator

        from ..show.figures import _array, _figure

        longest = max(range(len(self.factors)), key=lambda i: self.factors[i])
        mean, error = (_array(x[longest]) for x in self.by_position())
        width = max(1, self.n_ctx_trained // 4)
        with _figure(10, 3.9, "loss beyond the trained length: a good way stays flat", note) as fig:
            left, right = fig.subplots(1, 2)
            for w, way in enumerate(self.ways):
                style = dict(color=COLOURS[way], ls=DASHES[way], lw=1.4)
                left.plot(self.factors, _array(self.by_length()[:, w]), marker="o", ms=4, label=way, **style)
                middle = (torch.arange(mean.shape[1]) + 0.5) * width
                right.plot(middle, mean[w], **style)
                right.fill_between(middle, mean[w] - error[w], mean[w] + error[w], color=COLOURS[way], alpha=0.2, lw=0)
            right.axvline(self.n_ctx_trained, color="#444444", lw=0.8)
            left.set_xscale("log", base=2)
            left.set_xticks(self.factors, [f"{f:g}×" for f in self.factors])
            left.set(xlabel=f"length of the text, over {self.n_ctx_trained:,} trained", ylabel="loss, nats a token",
                     title="mean of a text, stretched to its length")  # fmt: skip
            right.set(xlabel="position (line: trained length)", ylabel="loss, nats a token",
                      title=f"stretched {self.factors[longest]:g}×; band: standard error")  # fmt: skip
            for ax in (left, right):  # a way that breaks the model must not flatten the others
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(MaxNLocator(8))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_locator(NullLocator())
            left.legend()
        return fig


Maker = Callable[[int, float], tuple[Sequence[Sequence[int]], Sequence]]


@dataclass(frozen=True)
class Retrieval(Result):
    """Is a fact found again? By way, length of the prompt and depth in it: 0 is its beginning, 1 its end.

    found    [W T D]  prompts answered right, by greedy decoding, every token of the answer
    tries    [T D]    prompts
    lengths  [T]      tokens, as asked of the maker
    depths   [D]      0 to 1
    ways     [W]
    factor   of the stretching
    """

    found: Tensor
    tries: Tensor
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    ways: tuple[str, ...]
    factor: float

    @classmethod
    def measure(
        cls, model: nn.Module, make: Maker, *, lengths: Sequence[int],
        depths: Sequence[float] = (0, 0.25, 0.5, 0.75, 1), ways: Sequence[str] = WAYS, factor: float | None = None,
    ) -> "Retrieval":  # fmt: skip
        """Args:
            make: `make(length, depth)` -> prompts and their answers, of token ids; an answer is one id or several.
                It decides what a fact is, in any vocabulary.
            factor: of the stretching, the same for all lengths; None takes that of the model's own YaRN.

        Raises:
            ValueError: from `make`'s texts: none, an empty answer, or more positions than the stretched context has.
        """
        grid = [[_pairs(make, length, depth) for depth in depths] for length in lengths]
        found = torch.zeros(len(ways), len(lengths), len(depths), dtype=torch.int64)
        for w, way in enumerate(ways):
            with extended(model, way, factor):
                for t, row in enumerate(grid):
                    for d, (prompts, answers) in enumerate(row):
                        made = generate(model, prompts, max(map(len, answers)), stop=())
                        found[w, t, d] = sum(new[: len(answer)] == answer for new, answer in zip(made, answers))
        tries = torch.tensor([[len(answers) for _, answers in row] for row in grid])
        about = tuple(lengths), tuple(map(float, depths)), tuple(ways), factor_of(as_loaded(model), factor)
        return cls(found, tries, *about)

    @property
    def share(self) -> Tensor:
        """Of the prompts, answered right.   [W T D]"""
        return self.found / self.tries

    @property
    def error(self) -> Tensor:
        """Standard error of the share, of (found + 1) / (tries + 2), which is never 0.   [W T D]"""
        share = (self.found + 1) / (self.tries + 2)
        return (share * (1 - share) / self.tries).sqrt()

    def frame(self):
        """A pandas DataFrame: one row a way, length and depth."""
        w, t, d = torch.cartesian_prod(*map(torch.arange, self.found.shape)).T
        return frame({
            "way": [self.ways[i] for i in w], "length": torch.tensor(self.lengths)[t],
            "depth": torch.tensor(self.depths)[d], "share": self.share.flatten(), "error": self.error.flatten(),
        })  # fmt: skip

    def plot(self, note: str = ""):
        """One panel a way: depth over length, bright is found."""
        from ..show.figures import _array, _figure

        ways = len(self.ways)
        title = "is a fact found again? dark squares are places that the way loses"
        with _figure(2 + 1.9 * ways, 1.6 + 0.32 * len(self.depths), title, note or f"factor {self.factor:g}") as fig:
            axes = fig.subplots(1, ways, squeeze=False, sharey=True)[0]
            for ax, way, share in zip(axes, self.ways, _array(self.share)):
                image = ax.imshow(share.T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
                ax.set_title(way)
                ax.set_xticks(range(len(self.lengths)), self.lengths, rotation=45 if len(self.lengths) > 3 else 0)
            axes[0].set_yticks(range(len(self.depths)), [f"{depth:g}" for depth in self.depths])
            axes[0].set_ylabel("depth (0: beginning)")
            fig.supxlabel("length of the prompt, tokens", fontsize=9)
            fig.colorbar(image, ax=axes, label="share found", pad=0.01)
        return fig


def _losses(model: nn.Module, tokens: Tensor, chunk: int) -> Tensor:
    """Nats for every token after the first, float32 on the CPU.   [b s+1] -> [b s]"""
    cache, parts = KVCache(unwrapped(model).config, capacity=tokens.shape[1]), []
    for read, predicted in zip(tokens[:, :-1].split(chunk, 1), tokens[:, 1:].split(chunk, 1)):
        logits = model(read, torch.ones_like(read), cache=cache)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        parts.append(nn.functional.cross_entropy(wide.flatten(0, 1), predicted.flatten(), reduction="none"))
        parts[-1] = parts[-1].view_as(read).float().cpu()
    return torch.cat(parts, 1)


def _pairs(make: Maker, length: int, depth: float) -> tuple[list[list[int]], list[list[int]]]:
    prompts, answers = make(length, depth)
    answers = answers.tolist() if isinstance(answers, Tensor) else list(answers)
    answers = [[one] if isinstance(one, int) else list(one) for one in answers]
    if not len(prompts) or len(prompts) != len(answers) or not all(answers):
        raise ValueError(f"make({length}, {depth}) gave {len(prompts)} prompts and {len(answers)} answers: it must "
                         "give as many of both, at least one, and no empty answer")  # fmt: skip
    return [list(prompt) for prompt in prompts], answers
