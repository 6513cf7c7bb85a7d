"""The model with another window, or other layers sliding: which heads change?"""
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import FULL, SLIDING
from ..hooks import Activations, edit, record, unwrapped
from .result import Result, frame, stacked
from .windows import Distances, by_head, check_rows, layers_of, windows_of


@contextmanager
def windowed(model: nn.Module, window: int | None = None, sliding: Iterable[int] | None = None) -> Iterator[None]:
    """The model with another window, or other layers sliding; afterwards, in any case, as it was.

    A KVCache belongs to one pattern: make it inside the block. The model refuses one of another pattern.

    Args:
        window: keys that a query of a sliding layer sees, its own included; None keeps the model's.
        sliding: the layers that slide, all others see everything: `()` for none. None keeps the model's.

    Raises:
        ValueError: no such layer, or a window below 1.
    """
    inner = unwrapped(model)
    config, attentions = inner.config, [block.attn for block in inner.blocks]
    kept = [(attn.config, attn.window) for attn in attentions]
    types = config.layer_types
    if sliding is not None:
        chosen = set(sliding)
        if wrong := sorted(chosen - set(range(config.n_layers))):
            raise ValueError(f"sliding names layers {wrong}: this model has layers 0 to {config.n_layers - 1}")
        types = tuple(SLIDING if layer in chosen else FULL for layer in range(config.n_layers))
    other = config.with_(sliding_window=config.sliding_window if window is None else window, layer_types=types)
    try:
        inner.config = other
        for layer, attn in enumerate(attentions):
            attn.config, attn.window = other, other.window(layer)
        yield
    finally:
        inner.config = config
        for attn, before in zip(attentions, kept):
            attn.config, attn.window = before


@dataclass(frozen=True)
class Moved(Result):
    """Which heads move when the windows change. Means over batch and positions; 0 is a head that nothing changed.

    pattern  [L H]  total variation between a query's two rows, sink included: the share of probability that moved
    output   [L H]  length of the change of what the head writes into the stream, over the length of what it wrote
    kl       [b s]  nats from the model's prediction to the one with the other windows
    before   [L]    keys that a query of the layer sees, None: all
    after    [L]    the same with the other windows
    direct   every layer read the stream of the unchanged model: what moved did so for its own window's sake
    """

    pattern: Tensor
    output: Tensor
    kl: Tensor
    before: tuple[int | None, ...]
    after: tuple[int | None, ...]
    direct: bool

    points = (*Distances.points, "blocks.*.attn.hook_z", "unembed.hook_out")

    @classmethod
    def of(
        cls, acts: Activations, other: Activations, *, out: list[Tensor], before: tuple[int | None, ...] = (),
        after: tuple[int | None, ...] = (), direct: bool = False,
    ) -> "Moved":  # fmt: skip
        """Args:
            acts, other: the two runs, of all layers.
            out: each layer's output projection, `block.attn.out.weight` [d (H h)].
        """
        layers = layers_of(acts, "attn.hook_pattern")
        others = layers_of(other, "attn.hook_pattern")
        if len(out) != len(layers) or layers != others:
            raise ValueError(f"layers {layers} and {others} were recorded, and there are "
                             f"{len(out)} output projections: they must be the same layers")  # fmt: skip
        moved, outputs = [], []
        for layer, weight in zip(layers, out):
            both = lambda name, i=layer: [stacked(x, f"attn.hook_{name}", [i])[0].double() for x in (acts, other)]
            (p, q), (a, b), (y, z) = both("pattern"), both("sink_mass"), both("z")
            if p.shape != q.shape:
                raise ValueError(f"the runs have patterns {tuple(p.shape)} and {tuple(q.shape)}: run the same tokens")
            check_rows(p, a, layer, acts)
            check_rows(q, b, layer, other)
            moved.append(((p - q).abs().sum(-1) + (a - b).abs()).mean((0, 2)) / 2)
            heads = weight.detach().double().unflatten(1, (z.shape[2], -1))
            gram = torch.einsum("dHh,dHi->Hhi", heads, heads)
            outputs.append(_length(z - y, gram) / _length(y, gram))
        kl = []
        for one, two in zip(acts["unembed.hook_out"], other["unembed.hook_out"]):  # a row at a time: V is large
            one, two = (x.double().log_softmax(-1) for x in (one, two))
            kl.append((one.exp() * (one - two)).sum(-1))
        return cls(torch.stack(moved), torch.stack(outputs), torch.stack(kl), before, after, direct)

    @classmethod
    @torch.no_grad()
    def measure(
        cls, model: nn.Module, tokens: Tensor, *, window: int | None = None, sliding: Iterable[int] | None = None,
        direct: bool = False,
    ) -> "Moved":  # fmt: skip
        """Run tokens [b s] as the model is and with other windows: `window` and `sliding` are those of `windowed`.

        Args:
            direct: give every layer the unchanged model's stream, so that only its own window tells. `kl` is then the
                last layer's doing alone.
        """
        inner = unwrapped(model)
        stream = ["blocks.*.hook_resid_pre"] if direct else []
        with record(model, *cls.points, *stream) as acts:
            model(tokens)
        same = {name: acts[name] for name in acts if name.endswith("hook_resid_pre")}
        with windowed(model, window, sliding), edit(model, same), record(model, *cls.points) as other:
            model(tokens)
            after = windows_of(inner.config)
        out = [block.attn.out.weight for block in inner.blocks]
        return cls.of(acts, other, out=out, before=windows_of(inner.config), after=after, direct=direct)

    def frame(self):
        """A pandas DataFrame: one row a head."""
        layers, heads = self.pattern.shape
        columns = {name: [w for w in windows for _ in range(heads)]
                   for name, windows in (("before", self.before), ("after", self.after)) if windows}  # fmt: skip
        moved = {"pattern": self.pattern.flatten(), "output": self.output.flatten()}
        return frame(by_head(range(layers), heads) | columns | moved)

    def plot(self, note: str = ""):
        """Layer over head: how much of its probability moved, and how much its write changed."""
        from matplotlib.ticker import MaxNLocator

        from ..show.figures import _array, _figure, _probabilities, _scale

        layers, _ = self.pattern.shape
        changed = [f"{i}: {a or 'all'}→{b or 'all'}" if a != b else str(i) for i, (a, b) in
                   enumerate(zip(self.before, self.after))] or [str(i) for i in range(layers)]  # fmt: skip
        title = "which heads another window moves: bright ones" + (", each by its own layer's window" * self.direct)
        note = note or f"mean KL {self.kl.mean():.3g} nats" + ", from the last layer alone" * self.direct
        with _figure(9.5, 1.5 + min(0.32 * layers, 6), title, note) as fig:
            left, right = fig.subplots(1, 2, sharey=True)
            _scale(fig, _probabilities(left, self.pattern), [left], "probability moved")
            image = right.imshow(_array(self.output), cmap="cividis", vmin=0, aspect="auto", interpolation="nearest")
            fig.colorbar(image, ax=right, label="|change| / |write|", pad=0.01)
            left.set(title="pattern", ylabel="layer: window", yticks=range(layers), yticklabels=changed)
            right.set(title="output")
            for ax in (left, right):
                ax.set_xlabel("head")
                ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        return fig


def _length(z: Tensor, gram: Tensor) -> Tensor:
    """Mean length of W z, W being [d h] of each head: |W z|² = z · W'W z, and W'W is small.   [b s H h] -> [H]"""
    return (torch.einsum("bsHh,Hhi->bsHi", z, gram) * z).sum(-1).clamp(min=0).sqrt().mean((0, 1))
