"""Keys and values of tokens already read: full layers keep all of them, sliding layers the last `sliding_window`."""
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch
from torch import Tensor

from .config import Config

_ids = count(1)


@dataclass(frozen=True)
class Positions:
    """Where tokens stand in their own sequence: padding is -1 as a key, and turned by 0 as a query."""

    query: Tensor  # [s], or [b s] where a mask gives each row its own
    key: Tensor  # [t] or [b t]: every column seen, the queries' own last
    dropped: int = 0  # columns that sliding layers no longer hold

    def visible(self, window: int | None) -> "Visible":
        """Which of the columns that a layer holds each query may read."""
        return Visible(self.query, self.key if window is None else self.key[..., self.dropped :], window)


@dataclass(frozen=True)
class Visible:
    """May a query read a key? By their positions: a kernel compares them as it goes, `mask` is the whole matrix."""

    query: Tensor  # [s] or [b s]
    key: Tensor  # [t] or [b t], padding -1, the queries' own last
    window: int | None  # keys, the query's own among them; None: all before it

    @cached_property
    def mask(self) -> Tensor:
        """[b or 1, 1, s, t], bool"""
        query, key = self.query.unsqueeze(-1), self.key.unsqueeze(-2)
        distance = query - key
        visible = (distance >= 0) & (key >= 0)
        if self.window is not None:
            visible &= distance < self.window  # the query's own key is one of the window's
        if visible.dim() == 2:
            return visible[None, None]
        column = torch.arange(key.shape[-1], device=key.device)
        own = column == column[-query.shape[-2] :, None]  # padding reads itself, so that its row is never empty
        return (visible | own).unsqueeze(1)

    def of(self, rows: slice) -> tuple["Visible", slice]:
        """The same for some of the queries, over the columns that they can see at all."""
        s, t = self.query.shape[-1], self.key.shape[-1]
        begin, end, _ = rows.indices(s)
        # Without padding columns count positions, and what lies before the first query's window is out of sight.
        first = max(0, t - s + begin + 1 - self.window) if self.window is not None and self.key.dim() == 1 else 0
        keys = slice(first, t - s + end)
        return Visible(self.query[..., rows], self.key[..., keys], self.window), keys


class KVCache:
    """`model(tokens, cache=cache)` reads the next tokens of the same sequences: a chunk of a prompt, or one token.

    Columns count every token seen, padding included. A forward pass that fails leaves the cache as it was.

    Args:
        config: the model's.
        capacity: columns to reserve in full layers; without it a full buffer doubles.
    """

    fixed = False  # may its tensors move, and their length change?

    def __init__(self, config: Config, capacity: int = 0):
        self.config, self.capacity, self.id = config, capacity, next(_ids)
        self.length = 0  # columns seen
        self.dropped = 0  # of these, the first ones that sliding layers no longer hold
        self.positions: Tensor | None = None  # [b length] once a mask was given; None: 0, 1, 2, ...
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values [b t K h]
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}

    def place(self, tokens: Tensor, mask: Tensor | None) -> Positions:
        """Positions of the next `tokens` [b s], of which `mask` [b s] marks the ones that are no padding."""
        (batch, s), device = tokens.shape, tokens.device
        if mask is not None and not torch.compiler.is_compiling() and mask.all():
            mask = None
        if mask is None and self.positions is None:
            columns = torch.arange(self.length + s, device=device)
            return Positions(columns[self.length :], columns, self.dropped)
        before = self.positions
        if before is None:
            before = torch.arange(self.length, device=device).expand(batch, -1)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        start = before.amax(-1, keepdim=True) + 1 if self.length else 0
        new = torch.where(mask, start + mask.cumsum(-1) - 1, -1)
        return Positions(new.clamp(min=0), torch.cat([before, new], dim=-1), self.dropped)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values that `layer` holds, the new ones last.   [b s K h] -> [b t K h]"""
        old = self.layers.get(layer, (k[:, :0], v[:, :0]))
        if self.config.window(layer) is not None or k.requires_grad:
            held = self._held(layer)
            joined = tuple(torch.cat([kept[:, :held], new], dim=1) for kept, new in zip(old, (k, v)))
        else:
            joined = tuple(self._append(buffer, new) for buffer, new in zip(old, (k, v)))
        self._pending[layer] = joined
        return tuple(kept[:, : self._held(layer) + k.shape[1]] for kept in joined)

    def _held(self, layer: int) -> int:
        return self.length - (self.dropped if self.config.window(layer) is not None else 0)

    def _append(self, buffer: Tensor, new: Tensor) -> Tensor:
        need = self.length + new.shape[1]
        if buffer.shape[1] < need or buffer.is_inference() != torch.is_inference_mode_enabled():
            buffer = self._larger(buffer, max(need, self.capacity, 2 * self.length), new)
        buffer[:, self.length : need] = new
        return buffer

    def _larger(self, buffer: Tensor, room: int, like: Tensor) -> Tensor:
        larger = like.new_empty(like.shape[0], room, *like.shape[2:])
        larger[:, : self.length] = buffer[:, : self.length]
        return larger

    def reserve(self, capacity: int) -> None:
        """Give full layers room for so many columns."""
        for layer, kept in self.layers.items():
            if self.config.window(layer) is None and kept[0].shape[1] < capacity:
                self.layers[layer] = tuple(self._larger(x, capacity, x) for x in kept)

    def advance(self, length: int) -> None:
        """Somebody else has read the columns up to `length`, none of them padding, and put them into `layers`."""
        if self.positions is not None:
            new = torch.arange(1, 1 + length - self.length, device=self.positions.device)
            self.positions = torch.cat([self.positions, self.positions[:, -1:] + new], dim=-1)
        self.length = length
        self.dropped = max(self.dropped, self._first_in_window(length, self.config.sliding_window))

    def forget_pass(self) -> None:
        """Let go of what a forward pass that failed has left."""
        self._pending = {}

    def commit(self, positions: Positions) -> None:
        """The pass that `extend` served has succeeded: its tokens count as read."""
        self.positions = positions.key if positions.key.dim() == 2 else None
        self.length, before = positions.key.shape[-1], self.dropped
        self.dropped = max(before, self._first_in_window(self.length, self.config.sliding_window))
        for layer, kept in self._pending.items():
            if self.config.window(layer) is not None and self.dropped > before:
                kept = tuple(x[:, self.dropped - before :].clone() for x in kept)  # a view would hold the chunk
            self.layers[layer] = kept
        self._pending = {}

    def truncate(self, length: int) -> None:
        """Forget every column from `length` on.

        Raises:
            ValueError: `length` is negative or more than was read, or a sliding layer has dropped a key that the
                next token would see.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} columns")
        sliding = any(self.config.window(layer) is not None for layer in self.layers)
        needed = self._first_in_window(length, self.config.sliding_window - 1)
        if sliding and needed < min(length, self.dropped):  # truncate(0) needs nothing
            raise ValueError(
                f"cannot truncate to {length}: a sliding layer keeps {self.config.sliding_window} keys, from column "
                f"{self.dropped} on, and the token at {length} would see column {needed}. Read the first {length} "
                "tokens again into a new cache")  # fmt: skip
        for layer, kept in self.layers.items():
            if self.config.window(layer) is not None:
                self.layers[layer] = tuple(x[:, : max(0, length - self.dropped)] for x in kept)
        self.dropped = min(self.dropped, length)
        self.length = length
        if self.positions is not None:
            self.positions = self.positions[:, :length] if length else None

    def _first_in_window(self, length: int, window: int) -> int:
        """The first of `length` columns that is among the last `window` tokens of any row."""
        if self.positions is None or length == 0:
            return max(0, length - window)
        positions = self.positions[:, :length]
        inside = (positions >= 0) & (positions > positions.amax(-1, keepdim=True) - window)
        first = torch.where(inside.any(-1), inside.int().argmax(-1), length)
        return int(first.min())

    @property
    def batch(self) -> int | None:
        """Sequences read side by side; None before the first pass."""
        return next((k.shape[0] for k, _ in self.layers.values()), None)

    @property
    def n_bytes(self) -> int:
        """Bytes that the keys and values take."""
        return sum(x.untyped_storage().nbytes() for kept in self.layers.values() for x in kept)
