"""What every head attends to, without ever holding a [s t] matrix: memory grows with the text, not with its square.

A flash kernel gives, besides its output, the log-sum-exp of a query's visible scores. From it follow, exactly:

    mass of the sink              sigmoid(sink - lse)
    mass within the last w keys   exp(lse of these keys - total), total = log(exp(lse) + exp(sink))
    mass on a label               attention with V := one-hot labels
    mean distance                 attention with V := positions
    entropy                       total - mean score, the mean score being q · (attention with V := K) / sqrt(h)
    attention that a key receives sum over queries of exp(score - total): attention with q and k changing places
    most attended keys            the largest scores of a block of queries
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..fast import gpu
from ..hooks import Activations, HookPoint, Read, listening, unwrapped
from .result import Result, frame

HEARD = ("rot_q", "rot_k", "sink_scores")
QUANTITIES = ("sink_mass", "entropy", "mean_distance", "received")


@dataclass(frozen=True)
class Attended(Result):
    """By layer L, batch b, head H and query position s; a quantity that was not asked for is None.

    sink_mass, entropy (nats, the sink among the outcomes), mean_distance (tokens, of the mass on keys): [L b H s].
    within: mass on the last w keys, the query's own among them [W L b H s]. on: mass by label of the key [C L b H s].
    received: sum over queries of the mass that a key gets [L b H t]. top_keys and top_mass: [L b H s k], key -1 where
    fewer are visible.
    """

    layers: tuple[int, ...]
    sink_mass: Tensor | None = None
    entropy: Tensor | None = None
    mean_distance: Tensor | None = None
    within: Tensor | None = None
    on: Tensor | None = None
    received: Tensor | None = None
    top_keys: Tensor | None = None
    top_mass: Tensor | None = None

    def by_head(self, quantity: str) -> Tensor:
        """The mean of a quantity over rows and positions.   -> [L H], or [W L H] and [C L H] for within and on

        Raises:
            ValueError: it was not asked for.
        """
        x = getattr(self, quantity, None)
        if x is None or quantity.startswith("top"):
            raise ValueError(f"{quantity} was not streamed, or has no mean by head")
        return x.mean((-3, -1))

    def frame(self):
        """One line a layer and head, with the means of what has one number a query."""
        names = [name for name in ("sink_mass", "entropy", "mean_distance") if getattr(self, name) is not None]
        means = {name: self.by_head(name) for name in names}
        heads = next(iter(means.values())).shape[1] if means else 0
        return frame({"layer": [layer for layer in self.layers for _ in range(heads)],
                      "head": list(range(heads)) * len(self.layers)}
                     | {name: x.flatten() for name, x in means.items()})  # fmt: skip

    def plot(self, quantity: str = "sink_mass", note: str = ""):
        """Layers by heads: which heads stand out?"""
        from ..show.maps import heat

        x = self.by_head(quantity)
        if x.dim() != 2:
            raise ValueError(f"{quantity} has a matrix for each window or label: draw one of by_head({quantity!r})")
        unit = {"sink_mass": "mass", "entropy": "nats", "mean_distance": "tokens", "received": "mass a key"}[quantity]
        rows, columns = [f"layer {layer}" for layer in self.layers], [str(i) for i in range(x.shape[1])]
        title = f"{quantity.replace('_', ' ')}, mean over the text: which heads stand out?"
        return heat(x, rows, columns, across="head", title=title, value=unit, note=note)


def flash(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention without a sink.   q [b K n h], k [b K m h], v [b K m c], visible [n m] -> [b K n c], lse [b K n]

    lse is the log-sum-exp of the visible scores. A row that sees nothing has output 0 and lse -inf.
    """
    mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
    if q.device.type == "cpu":
        kernel, parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))  # the kernel does not look
        for columns in v.split(q.shape[-1], dim=-1):  # the kernel wants v as wide as q
            padded = nn.functional.pad(columns, (0, q.shape[-1] - columns.shape[-1]))
            out, lse = kernel(q, k, padded, attn_mask=mask, scale=scale)
            parts.append(out[..., : columns.shape[-1]])
        out = torch.cat(parts, dim=-1)
    else:
        scores = (q @ k.mT * scale + mask).to(torch.promote_types(q.dtype, torch.float32))
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v
    blind = ~visible.any(-1)
    return out.masked_fill(blind[:, None], 0.0), lse.masked_fill(blind, -torch.inf)


class Stream(Activations):
    """Listens to the queries, keys and sinks of some layers and keeps what was asked for, chunk by chunk."""

    def __init__(self, model: nn.Module, layers: list[int], quantities: Sequence[str], windows: Sequence[int],
                 labels: Tensor | None, top: int, reduce: Callable | None, block: int):  # fmt: skip
        super().__init__(model.hook_points, [])  # what is heard is not what is kept
        self.config, self.layers, self.quantities, self.windows = model.config, layers, set(quantities), windows
        self.labels, self.top, self.reduce, self.block = labels, top, reduce, block
        self.n_labels = 0 if labels is None else int(labels.max()) + 1
        self._forget()

    def _forget(self) -> None:
        self._keys: dict[int, Tensor] = {}  # [b t K h], on sliding layers those that a later query can see
        self._queries: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}
        self._made: dict[int, list] = {layer: [] for layer in self.layers}

    def begin(self, cache_id, start: int, length: int, alone: bool) -> None:
        if cache_id is None or cache_id != self._cache_id or start == 0:
            self._forget()
        elif start != self._length:
            raise ValueError(f"the cache was rewound to {start} after {self._length} positions: use a new one")
        if self.labels is not None and len(self.labels) < start + length:
            raise ValueError(f"{len(self.labels)} labels for a text of {start + length} positions: one each is needed")
        self._cache_id, self._first, self._length = cache_id, start, start + length

    def keep(self, point: HookPoint, x: Tensor) -> Tensor:
        layer, name = point.layer(), point.place[1]
        if name == "cos" and x.dim() == 3:
            raise ValueError("a padded batch cannot be streamed: its rows stand at different positions. Run them alone")
        if name == "rot_q":
            self._queries[layer] = x.detach()
        elif name == "rot_k":
            old = self._keys.get(layer)
            self._keys[layer] = x.detach() if old is None else torch.cat([old, x.detach()], dim=1)
        elif name == "sink_scores":  # the last of the three
            self._read(layer, self._queries.pop(layer), self._keys[layer], x.detach())
            if window := self.config.window(layer):
                self._keys[layer] = self._keys[layer][:, -max(window - 1, 1) :].clone()
        return x

    def __repr__(self):
        done = max((len(made) for made in self._made.values()), default=0)
        return f"Stream of layers {self.layers}: {self._length} positions in {done} blocks; see result() or reduced()"

    @torch.no_grad()
    def _read(self, layer: int, q: Tensor, k: Tensor, sinks: Tensor) -> None:
        """The queries of this pass, q [b s H h] and sinks [b H s], over the keys k [b t K h]."""
        gone = self._length - k.shape[1]  # keys before these no query here can see
        for at in range(0, q.shape[1], self.block):
            part = slice(at, at + self.block)
            made = _Block(self, layer, q[:, part], k, sinks[..., part], self._first + at, gone).quantities()
            self._made[layer].append(self.reduce(made) if self.reduce else made)

    def result(self) -> Attended:
        """What has been gathered. Where there is a reduction, `reduced` has it.

        Raises:
            ValueError: nothing has run inside the block, or all of it was reduced.
        """
        if self.reduce or not any(self._made.values()):
            raise ValueError("all was reduced: see reduced()" if self.reduce else
                             "nothing was streamed: run the model inside the `with` block")  # fmt: skip
        whole = {}
        for name in self._made[self.layers[0]][0]:
            along = -2 if name.startswith("top_") else -1
            parts = [torch.cat([made[name] for made in self._made[layer]], dim=along) for layer in self.layers]
            whole[name] = torch.stack(parts, dim=int(name in ("within", "on")))
        if self._received:
            whole["received"] = torch.stack([self._received[layer] for layer in self.layers])
        return Attended(tuple(self.layers), **whole)

    def reduced(self) -> dict[int, list]:
        """What the reduction made of each block of queries, by layer, in order."""
        return self._made


class _Block:
    """Some neighbouring queries of one layer, and the keys that they can see."""

    def __init__(self, stream: Stream, layer: int, q: Tensor, k: Tensor, sinks: Tensor, first: int, gone: int):
        self.stream, self.layer, self.sinks, self.first = stream, layer, sinks, first
        self.groups, self.n, self.scale = stream.config.n_groups, q.shape[1], stream.config.d_head**-0.5
        self.window = stream.config.window(layer)
        self.begin, end = max(0, first - self.window + 1) if self.window else 0, first + self.n
        self.position, self.columns = (torch.arange(begin, end, device=q.device) for begin in (first, self.begin))
        self.given = q, k[:, self.begin - gone : end - gone]  # [b n H h], [b m K h]
        self.on_gpu = gpu.serves(q, k)
        self.q = q.transpose(1, 2)  # [b H n h]
        # Heads that share a key head become further rows of it, so that no key is repeated.
        self.rows = q.unflatten(2, (-1, self.groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [b K (g n) h]
        self.keys = k[:, self.begin - gone : end - gone].transpose(1, 2)  # [b K m h]

    @cached_property
    def distance(self) -> Tensor:
        """[n m]"""
        return self.position[:, None] - self.columns

    @cached_property
    def visible(self) -> Tensor:
        """[n m], bool"""
        return (self.distance >= 0) & (self.distance < (self.window or self.first + self.n))

    def streamed(self, values: Tensor | None, window: int | None, means: bool = False):
        """By the GPU's kernel, which compares positions as it goes."""
        from ..fast.gpu.attention import flash

        return flash(*self.given, values, self.position, self.columns, window, means=means)

    def attend(self, values: Tensor, visible: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """-> [b H n c], lse [b H n]"""
        out, lse = flash(self.rows, keys, values, visible.repeat(self.groups, 1), self.scale)
        return self.by_head(out), self.by_head(lse.unsqueeze(-1)).squeeze(-1).to(self.sinks.dtype)

    def by_head(self, x: Tensor) -> Tensor:
        """[b K (g n) c] -> [b H n c]"""
        return x.unflatten(2, (self.groups, self.n)).flatten(1, 2)

    def quantities(self) -> dict[str, Tensor]:
        wanted = self.stream.quantities
        lse, score, distance, on = (self.on_a_gpu if self.on_gpu else self.on_a_cpu)()
        total = torch.logaddexp(lse, self.sinks)  # of keys and sink together
        on_keys, on_sink = (lse - total).exp(), (self.sinks - total).exp()

        made = {"sink_mass": on_sink} if "sink_mass" in wanted else {}
        if "entropy" in wanted:
            made["entropy"] = total - on_keys * score - torch.where(on_sink > 0, on_sink * self.sinks, 0.0)
        if "mean_distance" in wanted:
            made["mean_distance"] = distance
        if on is not None:
            made["on"] = (on_keys.unsqueeze(-1) * on).permute(3, 0, 1, 2)
        if self.stream.windows:
            made["within"] = torch.stack([self.within(width, total) for width in self.stream.windows])
        if self.stream.top:
            made |= self.top(total)
        if "received" in wanted:
            self.receive(total)
        return made

    def labels(self, dtype: torch.dtype) -> Tensor | None:
        """One-hot, of the keys here.   -> [m C]"""
        if (labels := self.stream.labels) is None:
            return None
        mine = labels[self.begin : self.first + self.n].to(self.position.device)
        return (mine[:, None] == torch.arange(self.stream.n_labels, device=mine.device)).to(dtype)

    def on_a_cpu(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """lse, mean score and mean distance by the weights on keys [b H n], mass on each label [b H n C], as asked."""
        wanted, one, values = self.stream.quantities, torch.ones_like(self.keys[..., :1]), {}
        if "entropy" in wanted:
            values["entropy"] = self.keys
        if "mean_distance" in wanted:
            values["mean_distance"] = one * self.distance[-1].to(one.dtype)[:, None]  # from the last query
        if (labels := self.labels(one.dtype)) is not None:
            values["on"] = one * labels
        every = list(values.values()) or [one]  # the kernel gives lse only beside an output
        out, lse = self.attend(torch.cat(every, dim=-1), self.visible, self.keys)
        out = dict(zip(values, out.split([v.shape[-1] for v in every], dim=-1)))
        score = (self.q * out["entropy"]).sum(-1) * self.scale if "entropy" in out else None
        far = out["mean_distance"][..., 0] - (self.position[-1] - self.position) if "mean_distance" in out else None
        return lse, score, far, out.get("on")

    def on_a_gpu(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As `on_a_cpu`, in float32; score and distance come from the scores themselves, in the same pass."""
        labels, k = self.labels(self.keys.dtype), self.given[1]
        if labels is not None:
            labels = labels[:, None].expand(k.shape[0], -1, k.shape[2], -1)
        made = self.streamed(labels, self.window, means=bool(self.stream.quantities & {"entropy", "mean_distance"}))
        return made.lse, made.mean_score, made.mean_distance, None if labels is None else made.out.transpose(1, 2)

    def within(self, width: int, total: Tensor) -> Tensor:
        if self.on_gpu:
            return (self.streamed(None, min(width, self.window or width)).lse - total).exp()
        near = slice(max(0, self.first - width + 1 - self.begin), None)  # what is before is too far for all of them
        visible, keys = (self.visible & (self.distance < width))[:, near], self.keys[:, :, near]
        return (self.attend(keys, visible, keys)[1] - total).exp()

    def top(self, total: Tensor) -> dict[str, Tensor]:
        scores = (self.rows @ self.keys.mT * self.scale).masked_fill(~self.visible.repeat(self.groups, 1), -torch.inf)
        best = scores.topk(min(self.stream.top, scores.shape[-1]), dim=-1)
        score, key = self.by_head(best.values), self.by_head(best.indices) + self.begin
        missing = (0, self.stream.top - score.shape[-1])
        return {"top_keys": nn.functional.pad(key.masked_fill(score == -torch.inf, -1), missing, value=-1),
                "top_mass": nn.functional.pad((score - total.unsqueeze(-1)).exp(), missing)}  # fmt: skip

    def received_on_a_gpu(self, total: Tensor) -> Tensor:
        """As `received_on_a_cpu`; the totals stay in float32.   total [b H n] -> [b H m]"""
        from ..fast.gpu.attention import flash

        q, k = self.given
        return flash(k, q, None, self.columns, self.position, self.window, bias=-total, later=True).lse.exp()

    def received_on_a_cpu(self, total: Tensor) -> Tensor:
        """What each key gets from these queries: keys ask, and a query's total lowers its score."""
        asking, got = torch.cat([self.keys, torch.ones_like(self.keys[..., :1])], dim=-1), []
        totals = total.unflatten(1, (-1, self.groups))  # [b K g n]
        for group, q in enumerate(self.rows.split(self.n, dim=2)):
            lowered = (-totals[:, :, group] / self.scale).unsqueeze(-1).to(q.dtype)
            answering = torch.cat([q, lowered], dim=-1)
            got.append(flash(asking, answering, answering, self.visible.mT, self.scale)[1].exp())
        return torch.stack(got, dim=2).flatten(1, 2)

    def receive(self, total: Tensor) -> None:
        """Add what each key gets from these queries."""
        got = self.received_on_a_gpu(total) if self.on_gpu else self.received_on_a_cpu(total)  # [b H m]
        before = self.stream._received.get(self.layer, got[..., :0])
        after = nn.functional.pad(before, (0, self.begin + got.shape[-1] - before.shape[-1]))
        after[..., self.begin :] += got
        self.stream._received[self.layer] = after


@contextmanager
def attention(
    model: nn.Module, quantities: Sequence[str] = ("sink_mass", "entropy"), *, layers: Sequence[int] | None = None,
    windows: Sequence[int] = (), labels: Tensor | None = None, top: int = 0, reduce: Callable | None = None,
    block: int | None = None,
) -> Iterator[Stream]:  # fmt: skip
    """`with attention(model, ["sink_mass"], windows=[16]) as stream: model(tokens)`, then `stream.result()`.

    Works on a whole text, on chunks read with a KV cache, and around `generate`. Exact, in memory that grows with the
    text and not with its square.

    Args:
        quantities: of QUANTITIES.
        layers: all by default.
        windows: for each w the mass on the last w keys.
        labels: [t], a whole number from 0 for each position of the text: mass on each label.
        top: so many most attended keys.
        reduce: called with {quantity: [b H n] of a block of n queries}; what it returns is kept instead. For results
            that would not fit.
        block: queries looked at together; None is 256, and 1,024 on a GPU, which fewer would leave half idle.

    Raises:
        ValueError: an unknown quantity or layer, a window below 1, labels that are no whole numbers from 0; from the
            pass, labels that are too few, a padded batch, a rewound cache.
    """
    inner = unwrapped(model)
    layers = list(range(inner.config.n_layers) if layers is None else layers)
    quantities = [quantities] if isinstance(quantities, str) else quantities
    if unknown := set(quantities) - set(QUANTITIES):
        raise ValueError(f"unknown quantities {sorted(unknown)}: there are {', '.join(QUANTITIES)}")
    if wrong := [layer for layer in layers if not 0 <= layer < inner.config.n_layers]:
        raise ValueError(f"layers {wrong}: the model has 0 to {inner.config.n_layers - 1}")
    if block is None:  # the most attended keys need [block t] scores
        block = 1024 if gpu.reaches(inner.unembed.weight) and not top else 256
    if not layers or min(windows, default=1) < 1 or block < 1:
        raise ValueError(f"layers = {layers}, windows = {list(windows)}, block = {block}: one or more, from 1 on")
    if labels is not None and (labels.dim() != 1 or labels.is_floating_point() or not len(labels) or labels.min() < 0):
        raise ValueError(f"labels are whole numbers from 0, one a position, not {labels.dtype} {tuple(labels.shape)}")
    stream = Stream(inner, layers, quantities, windows, labels, top, reduce, block)
    points = [inner.hook_points[f"blocks.{layer}.attn.hook_{name}"] for layer in layers for name in HEARD]
    points.append(inner.hook_points["rotary_emb.hook_cos"])
    inner.recordings = (*inner.recordings, stream)
    try:
        with listening(model, [Read(stream.keep, point) for point in points]):
            yield stream
    finally:
        inner.recordings = tuple(one for one in inner.recordings if one is not stream)


def extremes(bins: int = 20) -> Callable:
    """A reduction: sum, number, least and most of each quantity, and a histogram of those that lie in 0 to 1."""

    def reduce(made: dict[str, Tensor]) -> dict[str, dict]:
        out = {}
        for name, x in made.items():
            edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
            share = name in ("sink_mass", "within", "on", "top_mass")
            histogram = torch.histogram(x.double().clamp(0, 1).flatten().cpu(), edges).hist if share else None
            out[name] = dict(sum=x.sum(-1), n=x.shape[-1], least=x.amin(-1), most=x.amax(-1), histogram=histogram)
        return out

    return reduce
