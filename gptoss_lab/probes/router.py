"""Which experts each token takes, and how sure the router is; edits that drop, force or re-weight experts.

    routing = Routing.measure(model, tokens)              # choices; also of recorded ones, without a model
    told = routing.specialisation(labels, tokens)         # what an expert tells about a label
    cost = Effect.measure(model, tokens, drop(3, 7))      # what the loss becomes without an expert (effect.py)
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..hooks import Activations
from .result import Result, fits, frame, stacked
from .specialisation import Specialisation, counts_by, information, shuffled_within

POINTS = ("router_logits", "expert_indices", "expert_weights")


@dataclass(frozen=True)
class Routing(Result):
    """The router's choices. Means are over the tokens that `valid` keeps; entropies are in nats.

    experts [L b s k]: the experts taken, by falling logit.
    weights [L b s k]: what each one's output is multiplied by; they sum to 1.
    valid [b s]: False where a position is padding, or beyond the end of a shorter text.
    layers: the number of each layer, L of them.
    n_experts: E.
    logits [L b s E]: the router's logits; None where only choices were recorded.
    """

    experts: Tensor
    weights: Tensor
    valid: Tensor
    layers: tuple[int, ...]
    n_experts: int
    logits: Tensor | None = None

    points: ClassVar = tuple(f"*.mlp.hook_{name}" for name in POINTS)

    @classmethod
    def of(cls, acts: Activations, valid: Tensor | None = None, layers: Sequence[int] | None = None) -> Self:
        """The choices in `layers` (all that were recorded), at the positions where `valid` [b s] is True (all).

        Raises:
            KeyError: a layer does not exist, or was not recorded.
            ValueError: see `from_choices`.
        """
        logits, experts, weights = (stacked(acts, f"mlp.hook_{name}", layers) for name in POINTS)
        if layers is None:
            layers = [int(name.split(".")[1]) for name in acts if name.endswith("hook_router_logits")]
        return cls.from_choices(experts, weights, logits.shape[-1], logits, valid, layers)

    @classmethod
    def from_choices(
        cls, experts: Tensor, weights: Tensor, n_experts: int, logits: Tensor | None = None,
        valid: Tensor | None = None, layers: Sequence[int] | None = None,
    ) -> Self:  # fmt: skip
        """Choices that came from elsewhere, such as a published trace. Shapes as in the class; nothing is copied.

        Raises:
            ValueError: shapes that do not fit, an expert beyond n_experts or taken twice by one token, NaN, or no
                position left.
        """
        shape = tuple(experts.shape)
        if len(shape) != 4 or weights.shape != experts.shape:
            raise ValueError(f"experts {shape} and weights {tuple(weights.shape)} must both be [layer, batch, "
                             "position, rank]: one text gets a batch axis with experts[:, None]")  # fmt: skip
        if logits is not None and tuple(logits.shape) != (*shape[:3], n_experts):
            raise ValueError(f"logits {tuple(logits.shape)} do not fit experts {shape} of {n_experts}: they must be "
                             f"{(*shape[:3], n_experts)}")  # fmt: skip
        layers = tuple(range(shape[0]) if layers is None else layers)
        if len(layers) != shape[0]:
            raise ValueError(f"layers names {len(layers)} layers, experts holds {shape[0]}")
        valid = torch.ones(shape[1:3], dtype=torch.bool) if valid is None else valid.bool()
        valid = fits(valid, shape[1:3], "valid").to(experts.device)
        if not valid.any():
            raise ValueError("valid is False everywhere: no token is left to look at")
        kept = experts[:, valid]
        if not 0 <= kept.min() <= kept.max() < n_experts:
            raise ValueError(f"experts go from {kept.min()} to {kept.max()}, but there are {n_experts}: 0 to "
                             f"{n_experts - 1}")  # fmt: skip
        if (kept.sort(-1).values.diff(dim=-1) == 0).any():
            raise ValueError("a token takes the same expert twice: each rank must name another one")
        if weights[:, valid].isnan().any():
            raise ValueError("weights hold NaN: a token's router logits were all -inf, or not numbers")
        return cls(experts, weights, valid, layers, n_experts, logits)

    @property
    def k(self) -> int:
        """Experts a token."""
        return self.experts.shape[-1]

    @property
    def n_tokens(self) -> int:
        return int(self.valid.sum())

    # -------------------------------------------------------------------------------- one token

    @property
    def entropy(self) -> Tensor:
        """Of the softmax over all router logits: 0 is certain, ln E knows nothing.   -> [L b s]"""
        return torch.special.entr(self._logits().softmax(-1)).sum(-1)

    @property
    def weight_entropy(self) -> Tensor:
        """Of the weights of the experts taken: ln k where all have one say.   -> [L b s]"""
        return torch.special.entr(self.weights.double()).sum(-1)

    @property
    def margin(self) -> Tensor:
        """Logit of the last expert taken less that of the first one not taken; 0 is a tie.   -> [L b s]"""
        logits = self._logits().sort(-1, descending=True).values
        if self.k == self.n_experts:
            raise ValueError(f"every token takes all {self.k} experts: there is no next one to have a margin to")
        return logits[..., self.k - 1] - logits[..., self.k]

    def path(self, position: int = -1, row: int = 0) -> tuple[Tensor, Tensor]:
        """One token's way through the layers: its experts and their weights.   -> [L k], [L k]"""
        if not -self.experts.shape[2] <= position < self.experts.shape[2]:
            raise ValueError(f"position {position} is not among the {self.experts.shape[2]} recorded")
        return self.experts[:, row, position], self.weights[:, row, position]

    def _logits(self) -> Tensor:
        if self.logits is None:
            raise ValueError("only choices and weights were recorded: this needs the router's logits")
        return self.logits.double()

    # -------------------------------------------------------------------------------- all tokens

    @property
    def taken(self) -> Tensor:
        """Whether an expert works on a token; never at a position that is left out.   -> [L b s E]"""
        experts = self.experts.clamp(0, self.n_experts - 1)  # what is left out may be filled with anything
        none = torch.zeros(*experts.shape[:3], self.n_experts, dtype=torch.bool, device=experts.device)
        return none.scatter(-1, experts, self.valid[..., None].expand_as(experts))

    @property
    def mean_weights(self) -> Tensor:
        """By rank.   -> [L k]"""
        return self.weights[:, self.valid].double().mean(1)

    @property
    def loads(self) -> Tensor:
        """Share of the tokens that take each expert; a row sums to k, an even load is k / E.   -> [L E]"""
        return self.taken.sum((1, 2)).double() / self.n_tokens

    @property
    def fair_evenness(self) -> float:
        """The evenness that k different experts drawn at random for each token reach, on average.

        Less than 1, since few draws are never even; to first order 1 - (E - k) / (2 n k ln E). A text that repeats
        its tokens repeats their experts, so a random router stays below this.
        """
        e, k = self.n_experts, self.k
        return 1 - (e - k) / (2 * self.n_tokens * k * math.log(e))

    def together(self) -> Tensor:
        """Share of the tokens that take both experts; the diagonal is the load.   -> [L E E]

        Experts chosen at random are together in k (k - 1) / (E (E - 1)) of the tokens.
        """
        taken = self.taken[:, self.valid].double()
        return taken.mT @ taken / self.n_tokens

    def persistence(self, lag: int = 1) -> Tensor:
        """Mean number of experts that a token shares with the one `lag` before it, from 0 to k.   -> [L]

        Choices at random share k²/E; choices that follow nothing but the load share the sum of load².

        Raises:
            ValueError: no two valid positions are `lag` apart.
        """
        taken, valid, s = self.taken, self.valid, self.valid.shape[1]
        if not 1 <= lag < s or not (both := valid[:, lag:] & valid[:, :-lag]).any():
            raise ValueError(f"no two of the {self.n_tokens} tokens are lag = {lag} positions apart")
        shared = (taken[:, :, lag:] & taken[:, :, :-lag]).sum(-1)
        return shared[:, both].double().mean(-1)

    @torch.no_grad()
    def specialisation(
        self, labels: Tensor, tokens: Tensor | None = None, *, rank: int | None = None, permutations: int = 20,
        rows: bool = False, seed: int = 0,
    ) -> "Specialisation":  # fmt: skip
        """How much an expert tells about a label: mutual information, and what shuffled labels give.

        Args:
            labels: [b s] integers (token class, language, channel, domain); negative ones are left out.
            tokens: [b s] ids: information beyond what the token itself tells. A random router is a hash of the
                token, so anything that depends on the token looks like a specialisation. Only tokens seen under two
                labels or more can tell anything then. Labels are shuffled among the occurrences of one token.
            rank: which of the k choices counts, 0 the first; None counts all of them, a k-th each.
            permutations: shuffles that give the chance level and its spread.
            rows: shuffle whole rows of labels. For labels that last for long, such as a domain, whose
                neighbouring tokens are no independent evidence; needs many rows.
            seed: of the shuffles.

        Raises:
            ValueError: labels of another shape, fewer than two different ones, a rank beyond k, or fewer than two
                permutations.
        """
        shape = self.valid.shape
        valid = self.valid.cpu()
        labels = fits(labels, shape, "labels").cpu().where(valid, -1)
        tokens = torch.zeros(shape, dtype=torch.int64) if tokens is None else fits(tokens, shape, "tokens").cpu()
        if rank is not None and not 0 <= rank < self.k:
            raise ValueError(f"rank {rank}: a token takes {self.k} experts, ranks 0 to {self.k - 1}")
        if permutations < 2:
            raise ValueError(f"permutations = {permutations}: two are the least that have a spread")
        if rows and shape[0] < 2:
            raise ValueError("rows=True shuffles whole rows, but there is only one")
        ids = labels[labels >= 0].unique()
        if len(ids) < 2:
            raise ValueError(f"labels at valid positions are {ids.tolist()}: specialisation needs two or more")
        choices = (self.experts if rank is None else self.experts[..., rank : rank + 1]).cpu()
        _, groups = tokens.unique(return_inverse=True)
        rng = torch.Generator().manual_seed(seed)

        def counted(labels: Tensor) -> Tensor:
            kept = valid & (labels >= 0)
            return counts_by(choices[:, kept], torch.searchsorted(ids, labels[kept]), groups[kept], self.n_experts)

        def shuffled() -> Tensor:
            if rows:
                return labels[torch.randperm(len(labels), generator=rng)]
            kept, new = labels >= 0, labels.clone()
            new[kept] = shuffled_within(groups[kept], labels[kept], rng)
            return new

        counts = counted(labels)
        chance = torch.stack([information(counted(shuffled())) for _ in range(permutations)])
        per_label = counts.sum(1)  # [L C E]
        n = per_label[0].sum(-1) / choices.shape[-1]
        return Specialisation(information(counts), chance.mean(0), chance.std(0), per_label / n[:, None], n.long(),
                              self.layers, tuple(ids.tolist()))  # fmt: skip

    # -------------------------------------------------------------------------------- to look at

    def frame(self):
        """One row a layer: evenness, the busiest expert and its share, persistence and its two chance levels."""
        load, n = self.loads, len(self.layers)
        columns = {"layer": list(self.layers), "evenness": evenness(load), "fair": [self.fair_evenness] * n,
                   "busiest": load.argmax(-1), "share": load.amax(-1), "persistence": self.persistence(),
                   "by load": load.square().sum(-1), "at random": [self.k**2 / self.n_experts] * n}  # fmt: skip
        if self.logits is not None:
            columns |= {"entropy": self.entropy[:, self.valid].mean(-1)}
        return frame(columns)

    def plot(self, note: str = ""):
        """The load of every expert; beside it, by layer, how even it is and how long choices last."""
        from ..show.figures import EXPERTS, PALE, STREAM, _array, _figure, _probabilities, _scale

        load, at = self.loads, range(len(self.layers))
        title = "a bright cell is an expert that many tokens take; dashed: choices at random"
        with _figure(10, min(2.1 + 0.16 * len(self.layers), 6), title, note) as fig:
            left, even, last = fig.subplots(1, 3, width_ratios=[2, 1, 1], sharey=True)
            image = _probabilities(left, load)
            left.set(xlabel="expert", ylabel="layer", title=f"share of tokens (even: {self.k / self.n_experts:.1%})",
                     yticks=at[:: math.ceil(len(at) / 12)],
                     xticks=range(0, self.n_experts, math.ceil(self.n_experts / 8)))  # fmt: skip
            left.set_yticklabels([self.layers[i] for i in left.get_yticks().astype(int)])
            _scale(fig, image, [left], "share of tokens")
            even.plot(_array(evenness(load)), at, "o-", ms=3, color=EXPERTS)
            even.axvline(self.fair_evenness, color=STREAM, lw=1, ls="--")
            even.set(title="evenness", xlabel="entropy of load / ln E")
            last.plot(_array(load.square().sum(-1)), at, "o-", ms=3, color=PALE, label="if by load alone")
            last.plot(_array(self.persistence()), at, "o-", ms=3, color=EXPERTS, label="measured")
            last.axvline(self.k**2 / self.n_experts, color=STREAM, lw=1, ls="--")
            last.set(title="shared with the token before", xlabel=f"shared experts, of {self.k}")
            last.legend(loc="best")
        return fig


def evenness(load: Tensor) -> Tensor:
    """Entropy of the load / ln E: 1 where all experts work equally, 0 where one does everything.   [... E] -> [...]"""
    share = load.double() / load.double().sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1) / math.log(load.shape[-1])


# ------------------------------------------------------------------------------------------ specialisation


# ------------------------------------------------------------------------------------------ edits


def drop(layer: int, experts: int | Sequence[int]) -> dict[str, Callable]:
    """An edit: these experts are never chosen; the next best take their places."""

    def never(logits: Tensor) -> Tensor:
        gone = _named(experts, logits, layer)
        if len(gone) == logits.shape[-1]:
            raise ValueError(f"drop names all {len(gone)} experts of layer {layer}: leave one")
        logits[..., gone] = -torch.inf
        return logits

    return {f"blocks.{layer}.mlp.hook_router_logits": never}


def force(layer: int, experts: int | Sequence[int]) -> dict[str, Callable]:
    """An edit: every token takes these experts, in place of its last ones; weights follow from their logits."""
    state = {}

    def look(logits: Tensor) -> None:
        state["wanted"] = _named(experts, logits, layer)

    def taken(indices: Tensor) -> Tensor:
        first, k = state["wanted"], indices.shape[-1]
        if len(first) > k:
            raise ValueError(f"force names {len(first)} experts, but a token takes {k}")
        others_first = torch.isin(indices, first).int().argsort(dim=-1, stable=True)
        others = indices.gather(-1, others_first)[..., : k - len(first)]
        return torch.cat([first.expand(*indices.shape[:-1], -1), others], dim=-1)

    path = f"blocks.{layer}.mlp"
    return {f"{path}.hook_router_logits": look, f"{path}.hook_expert_indices": taken}


def reweight(layer: int, experts: int | Sequence[int], factor: float) -> dict[str, Callable]:
    """An edit: the weight of these experts is multiplied, wherever they are chosen; the others keep theirs.

    A factor of 0 takes their output away and, other than `drop`, puts nothing in its place.
    """
    state = {}

    def look(logits: Tensor) -> None:
        state["wanted"] = _named(experts, logits, layer)

    def find(indices: Tensor) -> None:
        state["chosen"] = torch.isin(indices, state["wanted"])

    def scaled(weights: Tensor) -> Tensor:
        return torch.where(state["chosen"], weights * factor, weights)

    path = f"blocks.{layer}.mlp"
    return {f"{path}.hook_router_logits": look, f"{path}.hook_expert_indices": find,
            f"{path}.hook_expert_weights": scaled}  # fmt: skip


def _named(experts: int | Sequence[int], logits: Tensor, layer: int) -> Tensor:
    """The experts as a tensor, once the layer's size is known."""
    named, n = sorted({experts} if isinstance(experts, int) else set(experts)), logits.shape[-1]
    if not named or named[0] < 0 or named[-1] >= n:
        raise ValueError(f"experts {named} of layer {layer}: name one or more of 0 to {n - 1}")
    return torch.tensor(named, device=logits.device)
