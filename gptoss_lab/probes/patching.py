"""Which values carry the answer? Put those of another text into this one, place by place, and see what turns."""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hooks import Activations, edit, record, unwrapped
from .result import Result, frame

Metric = Callable[[Tensor], Tensor]  # logits [b s V] -> [b]
STREAM = ("*.hook_resid_pre", "*.hook_attn_out", "*.hook_mlp_out")


def logit_difference(answer: Tensor, other: Tensor, position: int = -1) -> Metric:
    """The logit of each row's other answer less that of its answer; ids [b]."""
    rows = torch.arange(len(answer))
    return lambda logits: logits[rows, position, other] - logits[rows, position, answer]


@dataclass(frozen=True)
class Patching(Result):
    """How far the metric moves from its value on the clean text (0) to that on the other (1).

    effect [S P b]: sites by position and row. sites: "blocks.2.attn.hook_z head 3". positions: the P that were patched.
    clean, other [b]: the metric.
    """

    sites: tuple[str, ...]
    positions: tuple[int, ...]
    effect: Tensor
    clean: Tensor
    other: Tensor

    @classmethod
    @torch.no_grad()
    def measure(
        cls, model: nn.Module, tokens: Tensor, *, other: Tensor, metric: Metric, points: Sequence[str] = STREAM,
        each: bool = False, positions: Sequence[int] | None = None,
    ) -> "Patching":  # fmt: skip
        """Args:
            tokens, other: [b s], the clean texts and those whose values are put in.
            points: those with a position axis in second place: the stream, z, q, k, v, router logits, expert outputs.
            each: one site for each head or expert slot, where the point has such an axis.
            positions: of the patches; each alone, all by default.

        Raises:
            ValueError: texts of different shapes, a point without positions, or a metric that both texts share.
        """
        names = _names(model, points)
        sources, low, high = _both(model, tokens, other, metric, names)
        at = tuple(range(tokens.shape[1]) if positions is None else positions)
        if not at or wrong_position(at, tokens):
            raise ValueError(f"positions {at}: the texts have 0 to {tokens.shape[1] - 1}")
        sites, effects = [], []
        for site, name, where in _sites(sources, names, each):
            row = []
            for position in at:
                def put(x: Tensor, name=name, where=where, position=position) -> Tensor:
                    x[:, position, where] = sources[name][:, position, where]
                    return x

                with edit(model, {name: put}):
                    row.append((metric(model(tokens)) - low) / (high - low).mean())
            sites.append(site)
            effects.append(torch.stack(row))
        return cls(tuple(sites), at, torch.stack(effects), low, high)

    @property
    def mean(self) -> Tensor:
        """[S P]"""
        return self.effect.mean(-1)

    def named(self, words: Sequence[str]) -> list[str]:
        """The words at the patched positions; `words` are those of the whole text."""
        if len(words) <= max(self.positions):
            raise ValueError(f"{len(words)} words, but position {max(self.positions)} was patched: name the whole text")
        return [words[i] for i in self.positions]

    def frame(self):
        """One line a site and position."""
        n, p = self.mean.shape
        return frame({"site": [site for site in self.sites for _ in range(p)], "position": list(self.positions) * n,
                      "effect": self.mean.flatten()})  # fmt: skip

    def plot(self, words: Sequence[str], note: str = ""):
        """Sites by positions: where the colour is strong, the answer is on its way. `words` name the whole text."""
        from ..show.maps import heat

        sites = [site.removeprefix("blocks.").replace("hook_", "") for site in self.sites]
        title = "patched in: 0 leaves the answer, 1 turns it whole"
        return heat(self.mean, sites, self.named(words), title=title, value="effect", across="position of the patch",
                    signed=True, limit=1, note=note)  # fmt: skip


def attribution(
    model: nn.Module, tokens: Tensor, *, other: Tensor, metric: Metric, points: Sequence[str] = STREAM,
    each: bool = False,
) -> Patching:  # fmt: skip
    """Patching to first order: (other - clean) · gradient, all sites and positions in two passes and one backward.

    Nanda 2023. Compare with `Patching.measure` on some sites before you trust it: `disagreement` gives the error.
    """
    names = _names(model, points)
    with torch.no_grad():
        sources, low, high = _both(model, tokens, other, metric, names)
    with torch.enable_grad(), record(model, *names) as clean:
        value = metric(model(tokens)).sum()
    if not value.requires_grad:
        raise ValueError("no weight of the model requires a gradient: call model.requires_grad_() first")
    grads = torch.autograd.grad(value, [clean[name] for name in names], allow_unused=True)
    grads = {name: torch.zeros_like(clean[name]) if grad is None else grad for name, grad in zip(names, grads)}
    sites, effects = [], []
    for site, name, where in _sites(sources, names, each):
        change = ((sources[name] - clean[name].detach()) * grads[name])[:, :, where]
        sites.append(site)
        effects.append(change.flatten(2).sum(-1).T / (high - low).mean())
    return Patching(tuple(sites), tuple(range(tokens.shape[1])), torch.stack(effects), low, high)


def disagreement(estimate: Patching, real: Patching) -> dict[str, float]:
    """Largest and root-mean-square error of the estimate's means, and their correlation with the real ones.

    Raises:
        ValueError: they are not of the same sites and positions.
    """
    if estimate.sites != real.sites or estimate.effect.shape != real.effect.shape:
        raise ValueError("the estimate and the real patching are of different sites or positions")
    a, b = estimate.mean.flatten().double(), real.mean.flatten().double()
    return {"largest": float((a - b).abs().max()), "rms": float((a - b).square().mean().sqrt()),
            "correlation": float(torch.corrcoef(torch.stack([a, b]))[0, 1])}  # fmt: skip


@torch.no_grad()
def path_patching(
    model: nn.Module, tokens: Tensor, *, other: Tensor, metric: Metric, sender: str, head: int | None = None,
    expert: int | None = None, receivers: Sequence[str] = ("hook_logits",),
) -> Tensor:  # fmt: skip
    """The effect of what a sender writes on the receivers *directly*, everything between them as it was.

    Wang et al. 2022, arXiv 2211.00593. The residual stream is a sum: with all else frozen, a receiver reads the clean
    stream plus the change of the sender's write. It is computed so, exactly, without freezing anything by hand.

    Args:
        sender: "blocks.1.attn" (all heads, or `head`), or "blocks.1.mlp" (all experts, or `expert`).
        receivers: hook_q, hook_k, hook_v, hook_router_logits, ln1.hook_out or ln2.hook_out of later layers, or
            hook_logits.

    Returns:
        [b]: 0 leaves the metric as on the clean text, 1 moves it to that on the other.

    Raises:
        ValueError: no such sender, head or expert; a receiver that does not read the stream after the sender wrote.
    """
    inner = unwrapped(model)
    layer = _sender(inner, sender, head, expert)
    names = ["*.hook_resid_pre", "*.hook_resid_mid", "*.hook_resid_post"]
    names += [f"{sender}.hook_{name}" for name in
              (("z",) if sender.endswith("attn") else ("expert_out", "expert_weights", "expert_indices"))]  # fmt: skip
    sources, low, high = _both(model, tokens, other, metric, names)
    with record(model, *names) as clean:
        model(tokens)
    if sender.endswith("attn"):
        z = sources["z", layer] - clean["z", layer]
        if head is not None:
            z = z * nn.functional.one_hot(torch.tensor(head, device=z.device), z.shape[2]).to(z)[:, None]
        change = z.flatten(2) @ inner.blocks[layer].attn.out.weight.T
    else:
        writes = []
        for acts in (sources, clean):
            weights = acts["expert_weights", layer]
            if expert is not None:
                weights = weights * (acts["expert_indices", layer] == expert)
            writes.append(torch.einsum("bsk, bskd -> bsd", weights, acts["expert_out", layer]))
        change = writes[0] - writes[1]

    edits, direct = {}, None
    for receiver in receivers:
        point = inner.hook_points[receiver]
        at = point.layer()
        if at is None:
            direct = inner.unembed(inner.ln_final(clean["resid_post", inner.config.n_layers - 1] + change))
            continue
        before = f"blocks.{at}.hook_resid_{'mid' if '.mlp.' in point.name or '.ln2.' in point.name else 'pre'}"
        if at < layer or (at == layer and (before.endswith("pre") or sender.endswith("mlp"))):
            raise ValueError(f"{point.name} does not read the stream after {sender} has written to it")
        with edit(model, {before: clean[before] + change}), record(model, point.name) as acts:
            model(tokens, stop_at_layer=at + 1 if at + 1 < inner.config.n_layers else None)
        edits[point.name] = acts[point.name]
    with edit(model, edits):
        logits = model(tokens)
    if direct is not None:
        logits = logits + direct - model(tokens)  # what the sender tells the logits itself comes on top
    return (metric(logits) - low) / (high - low).mean()


def _sender(model: nn.Module, sender: str, head: int | None, expert: int | None) -> int:
    """The layer of "blocks.1.attn" or "blocks.1.mlp"."""
    found, config = re.fullmatch(r"blocks\.(\d+)\.(attn|mlp)", sender), model.config
    if not found or int(found[1]) >= config.n_layers:
        raise ValueError(f"sender = {sender!r}: must be blocks.L.attn or blocks.L.mlp, L 0 to {config.n_layers - 1}")
    for name, value, part, n in ("head", head, "attn", config.n_heads), ("expert", expert, "mlp", config.n_experts):
        if value is not None and (found[2] != part or not 0 <= value < n):
            raise ValueError(f"{name} = {value} of {sender}: an {part} has {name}s 0 to {n - 1}, and no other part has")
    return int(found[1])


def wrong_position(positions: Sequence[int], tokens: Tensor) -> bool:
    return any(not 0 <= position < tokens.shape[1] for position in positions)


def _names(model: nn.Module, points: Sequence[str]) -> list[str]:
    found = unwrapped(model).hook_points.resolve(list(points))
    if wrong := [point.name for point in found if point.shape.split()[:2] != ["b", "s"]]:
        raise ValueError(f"{wrong[0]} is not [b s ...]: a position of it cannot be patched")
    return [point.name for point in found]


def _both(model, tokens: Tensor, other: Tensor, metric: Metric, names) -> tuple[Activations, Tensor, Tensor]:
    if tokens.shape != other.shape:
        raise ValueError(f"the texts have shapes {tuple(tokens.shape)} and {tuple(other.shape)}: positions must match")
    low = metric(model(tokens))
    with record(model, *names) as sources:
        high = metric(model(other))
    if low.shape != tokens.shape[:1]:
        raise ValueError(f"the metric gave {tuple(low.shape)} for {len(tokens)} rows: one number each is needed")
    if not (high - low).mean().abs() > 1e-12:
        raise ValueError("the metric is the same on both texts: there is nothing to be patched in")
    return sources, low, high


def _sites(sources: Activations, names: list[str], each: bool):
    for name in names:
        if each and sources[name].dim() == 4:
            kind = "head" if ".attn." in name else "slot"
            for i in range(sources[name].shape[2]):
                yield f"{name} {kind} {i}", name, i
        else:
            yield name, name, ...
