"""One decode step as a CUDA graph: the model's own forward pass for one token, captured once and replayed.

A graph repeats the same kernels on the same addresses. So keys and values get fixed places, the position is a number
on the device, and whatever is listened to is copied into one buffer inside the graph. Nothing of the model is written
twice: what is captured is `GptOss.read`.
"""
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...hooks import Read, pytorch_hooks
from ...kv_cache import KVCache
from .. import INSIDE, gpu

WARM_UP = 2  # passes before the capture: kernels are compiled and libraries make their workspaces


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """What repeats `run`, which must not look at values, on the same memory."""
    graph, side = torch.cuda.CUDAGraph(), side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    # A capture fills the random generator's state in place, which may not be a tensor of inference mode.
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.graph(graph, stream=side):
        run()
    return graph.replay


@cache
def side_stream(device: int) -> torch.cuda.Stream:
    """One a GPU: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


def serves(model, kept: KVCache) -> bool:
    """May a graph read what follows? Not with edits, nor with values that only the readable way makes."""
    moe, table, weight = model.blocks[0].mlp, model.embed.weight, model.unembed.weight
    if not (kept.length and gpu.serves(weight, moe.gate_up.bias) and moe.gate_up.packed):
        return False
    if not (gpu.reaches(table) or table.is_pinned()) or kept.batch > most_rows(weight):
        return False
    if any(map(pytorch_hooks, model.modules())):
        return False
    inside = {*INSIDE, "result", *moe.inner_points}
    heard = [(name, one) for m in model.modules() for name, several in getattr(m, "listeners", {}).items()
             for one in several]  # fmt: skip
    return all(isinstance(one, Read) and name not in inside for name, one in heard) and _padding(kept) is not False


def most_rows(weight: Tensor) -> float:
    """Tokens that experts take without a look at who chose whom."""
    from . import experts

    return math.inf if gpu.tensor_cores(weight.device) and weight.dtype != torch.float32 else experts.FEW_ALONE


def _padding(cache: KVCache) -> Tensor | None | bool:
    """Columns of padding on the left of each row [b]; None where there is none, False where it is elsewhere."""
    positions = cache.positions
    if positions is None:
        return None
    first = cache.length - 1 - positions[:, -1]
    straight = torch.arange(cache.length, device=positions.device) - first[:, None]
    return first if bool((positions == straight.clamp(min=-1)).all()) else False


class FixedCache:
    """The keys and values of a KVCache where they stay: column c lies in slot c modulo the layer's slots.

    Full layers have a slot for each column up to `capacity`, sliding ones a ring of as many as their window.
    """

    fixed = True

    def __init__(self, cache: KVCache, capacity: int):
        self.cache, self.config, self.id, self.batch = cache, cache.config, cache.id, cache.batch
        self.length, self.dropped = cache.length, cache.dropped
        cache.reserve(capacity)
        self.layers = {layer: tuple(self._ring(layer, x) for x in kept) for layer, kept in cache.layers.items()}
        device = next(iter(self.layers.values()))[0].device
        self.position = torch.full((1,), self.length, device=device)  # of the token that is read next, as a column
        self.first = _padding(cache)

    def _ring(self, layer: int, x: Tensor) -> Tensor:
        window = self.config.window(layer)
        if window is None:
            return x
        ring = x.new_zeros(len(x), window, *x.shape[2:])
        columns = torch.arange(max(self.dropped, self.length - window), self.length, device=x.device)
        ring[:, columns % window] = x[:, columns - self.dropped]
        return ring

    # What the forward pass asks of a cache and of the positions that it gave.

    @property
    def query(self) -> Tensor:
        """The position of the next token.   -> [1], or [b 1] with padding"""
        return self.position if self.first is None else (self.position - self.first).unsqueeze(-1)

    def visible(self, window: int | None) -> None:
        """Nothing: the kernel compares columns."""

    def commit(self, positions) -> None:
        """Nothing: whoever replays the graph sets the position. A pass before the capture must not move it: the next
        one would write over a key that a ring still needs."""

    def next_token(self, attn, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [b 1 d] -> z [b 1 H h], sink_mass [b H 1]"""
        from . import attention, rows

        k, v = self.layers[attn.layer]
        q = rows.rotate_into_cache(attn.qkv(x).flatten(0, 1), cos, sin, k, v, self.position)
        z, sink_mass = attention.next_token(q, k, v, attn.sinks, self.position, self.first)
        return z.unsqueeze(1), sink_mass.unsqueeze(-1)

    def give_back(self, length: int) -> None:
        """The KVCache continues after `length` columns."""
        if length == self.cache.length:
            return  # nothing was read, and a ring may hold what the passes before the capture wrote
        for layer, kept in self.layers.items():
            window = self.config.window(layer)
            if window is not None:
                columns = torch.arange(max(self.dropped, length - window), length, device=kept[0].device)
                kept = tuple(x[:, columns % window] for x in kept)
            self.cache.layers[layer] = kept
        self.cache.advance(length)


class Step:
    """`logits = step(tokens)`: the next tokens of the sequences in `cache`, [b 1] -> [b 1 V].

    What is listened to when the step is made is heard at every call: `heard_the_same` says whether it still is.
    `close` gives the columns back to the cache.

    Args:
        capacity: columns that full layers get.
    """

    def __init__(self, model, cache: KVCache, capacity: int):
        self.model, self.fixed = model, FixedCache(cache, capacity)
        self.length, self.capacity = cache.length, capacity
        self.tokens = torch.zeros(cache.batch, 1, dtype=torch.int64, device=model.device)
        self.heard, self.changes, self.modules = self._heard(), model.changes, list(model.modules())
        self.replay = captured(self._run)

    def _heard(self) -> list[tuple]:
        """Module, name and listeners of every value that is listened to."""
        return [(m, name, several) for m in self.model.modules() if getattr(m, "listeners", None)
                for name, several in m.listeners.items()]  # fmt: skip

    def heard_the_same(self) -> bool:
        """Are the listeners still those for which this step was made?"""
        return self.model.changes == self.changes and not any(map(pytorch_hooks, self.modules))

    def _run(self) -> None:
        """A forward pass in which values are collected instead of told to those who listen."""
        kept: list[tuple[tuple, Tensor]] = []
        collect = lambda several: Read(lambda point, x: kept.append((several, x)) or x, several[0].point)
        before = {module: module.listeners for module, _, _ in self.heard}
        try:
            for module, listeners in before.items():
                module.listeners = {name: (collect(several),) for name, several in listeners.items()}
            self.logits = self.model.read(self.tokens, self.fixed, self.fixed)
        finally:
            for module, listeners in before.items():
                module.listeners = listeners
        # One buffer a dtype, so that a call copies each of them once, however much is listened to.
        self.told = []
        for dtype in dict.fromkeys(x.dtype for _, x in kept):
            some = [one for one in kept if one[1].dtype == dtype]
            self.told.append((torch.cat([x.flatten() for _, x in some]), [(who, x.shape) for who, x in some]))

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.length >= self.capacity:
            raise ValueError(f"the step was made for {self.capacity} columns, all are taken")
        self.model.begin(self.fixed.id, self.length, *tokens.shape, None)
        self.tokens.copy_(tokens)
        self.fixed.position.fill_(self.length)
        self.replay()
        self.length += 1
        for buffer, values in self.told:
            parts = buffer.clone().split([shape.numel() for _, shape in values])
            for (listeners, shape), x in zip(values, parts, strict=True):
                for listener in listeners:
                    listener.give(x.view(shape))
        return self.logits

    def close(self) -> None:
        """The cache goes on from here."""
        self.fixed.give_back(self.length)


def following(step: Step | None, model, cache: KVCache, capacity: int) -> Step | None:
    """What reads the next token: the same step while the same is listened to, else a new one; None where none can."""
    if step is not None and step.heard_the_same():
        return step
    if step is not None:
        step.close()
    return Step(model, cache, capacity) if serves(model, cache) else None
