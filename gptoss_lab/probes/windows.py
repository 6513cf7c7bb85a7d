"""How far back does each head look, and what would a window cut?"""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Config
from ..hooks import Activations, unwrapped
from .result import Result, frame, stacked


@dataclass(frozen=True)
class Distances(Result):
    """Where each head's probability goes, by how far back the key stands. Means over the queries that were chosen.

    A query at position p has only p + 1 keys: choose late ones (`queries`) to compare distances fairly.

    mass     [L H D]  probability on the key d tokens back, 0 being the query's own; with `sink` it sums to 1
    sink     [L H]    probability on the sink
    layers   [L]      which layers these are
    windows  [L]      keys that a query of the layer sees; None: all. Empty where it was not said
    """

    mass: Tensor
    sink: Tensor
    layers: tuple[int, ...]
    windows: tuple[int | None, ...] = ()

    points = ("blocks.*.attn.hook_pattern", "blocks.*.attn.hook_sink_mass")

    @classmethod
    def of(
        cls, acts: Activations, *, windows: tuple[int | None, ...] = (), queries: Tensor | None = None
    ) -> "Distances":
        """Args:
            windows: of every layer of the model, as `windows_of(config)` gives them; the figure shows them.
            queries: bool [b s], which positions count. Leave out padding, whose row is not attention. None: all.

        Raises:
            ValueError: nothing recorded or chosen, a row that does not sum to 1, or `queries` of another shape.
        """
        layers = layers_of(acts, "attn.hook_pattern")
        if windows and len(windows) <= max(layers):
            raise ValueError(f"windows names {len(windows)} layers, recorded is layer {max(layers)}: "
                             "windows_of(model.config) names all")  # fmt: skip
        mass, sinks = [], []
        for layer in layers:
            pattern = stacked(acts, "attn.hook_pattern", [layer])[0].double()
            sink = stacked(acts, "attn.hook_sink_mass", [layer])[0].double()
            check_rows(pattern, sink, layer, acts)
            weight = _weights(queries, pattern)
            s, t = pattern.shape[-2:]
            distance = torch.arange(t - s, t)[:, None] - torch.arange(t)
            seen = (distance >= 0).to(pattern.device)
            rows = torch.einsum("bHst,bs->Hst", pattern, weight)[:, seen]
            by = rows.new_zeros(len(rows), t).index_add_(1, distance.to(rows.device)[seen], rows)
            mass.append(by)
            sinks.append(torch.einsum("bHs,bs->H", sink, weight))
        return cls(torch.stack(mass), torch.stack(sinks), layers, tuple(windows[i] for i in layers if windows))

    @classmethod
    def measure(cls, model: nn.Module, tokens: Tensor, **about) -> "Distances":
        return super().measure(model, tokens, **{"windows": windows_of(unwrapped(model).config)} | about)

    @property
    def on_keys(self) -> Tensor:
        """Probability on keys: 1 - sink.   [L H]"""
        return self.mass.sum(-1)

    @property
    def mean_distance(self) -> Tensor:
        """Of the mass that is on keys, in tokens; NaN where there is none.   [L H]"""
        return (self.mass * torch.arange(self.mass.shape[-1], device=self.mass.device)).sum(-1) / self.on_keys

    def reach(self, share: float = 0.9) -> Tensor:
        """The smallest distance within which a head has `share` of its mass on keys; -1 where it has none.   [L H]"""
        if not 0 < share <= 1:
            raise ValueError(f"share = {share}: must be above 0 and at most 1")
        reach = (self.mass.cumsum(-1) < share * (1 - 1e-12) * self.on_keys.unsqueeze(-1)).sum(-1)  # 1e-12: rounding
        return torch.where(self.on_keys > 0, reach.clamp(max=self.mass.shape[-1] - 1), -1)

    def cut(self, window: int) -> Tensor:
        """Probability that lies behind a window of so many keys, the query's own among them.   [L H]"""
        if window < 1:
            raise ValueError(f"window = {window}: must be at least 1, the query's own key")
        return self.mass[..., window:].sum(-1)

    def frame(self):
        """A pandas DataFrame: one row a head."""
        return frame(by_head(self.layers, self.sink.shape[1]) | {
            "sink": self.sink.flatten(), "mean_distance": self.mean_distance.flatten(),
            "reach_50": self.reach(0.5).flatten(), "reach_90": self.reach(0.9).flatten(),
        })  # fmt: skip

    def plot(self, share: float = 0.9, note: str = ""):
        """One panel a layer, one row a head; distances in bins that double. Dots: reach; grey: behind the window."""
        import matplotlib.ticker

        from ..show.figures import EXPERTS, _figure, _probabilities, _scale

        edges = [0, 1]
        while edges[-1] < self.mass.shape[-1]:
            edges.append(2 * edges[-1])
        bins = torch.stack([self.mass[..., a:b].sum(-1) for a, b in zip(edges, edges[1:])], -1)
        names = [str(a) if b - a < 2 else f"{a}–{b - 1}" for a, b in zip(edges, edges[1:])]
        place = lambda distance: max(distance, 1).bit_length() - (distance < 1)  # the bin; 0 is the query's own key
        n, heads = len(self.layers), self.sink.shape[1]
        across = min(n, 4 if n <= 8 else 6)
        down = -(-n // across)
        title = "how far back each head looks: bright bins hold its mass, the dot its reach"
        note = note or f"{share:.0%} of what is on keys"
        with _figure(10, 1.4 + down * min(1 + 0.16 * heads, 2.6), title, note) as fig:
            grid = fig.subplots(down, across, squeeze=False, sharex=True, sharey=True)
            for i, ax in zip(range(n), grid.flat):
                window = self.windows[i] if self.windows else None
                seen = torch.tensor([True, *(window is None or a < window for a in edges[:-1])])
                image = _probabilities(ax, torch.cat([self.sink[i, :, None], bins[i]], 1), seen.expand(heads, -1))
                dots = [place(int(d)) + 1 if d >= 0 else 0 for d in self.reach(share)[i]]
                ax.plot(dots, range(heads), "o", ms=4 if heads <= 16 else 1.8, color=EXPERTS, mec="white",
                        mew=0.5 if heads <= 16 else 0)  # fmt: skip
                ax.axvline(0.5, color="white", lw=2)
                ax.set_title(f"layer {self.layers[i]}" + (f": {window} keys" if window else ""), pad=3)
                ticks = ["sink", *names]
                ax.set_xticks(*zip(*list(enumerate(ticks))[:: 1 if across <= 4 else 2]), rotation=90)
                ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))
            for ax in grid.flat[n:]:
                ax.axis("off")
            fig.supxlabel("distance from query to key, tokens", fontsize=9)
            fig.supylabel("head", fontsize=9)
            _scale(fig, image, grid, "probability", aspect=25 if down < 3 else 60)
        return fig


def windows_of(config: Config) -> tuple[int | None, ...]:
    """Keys that a query of each layer sees, its own included; None: all before it."""
    return tuple(config.window(layer) for layer in range(config.n_layers))


def layers_of(acts: Activations, point: str) -> tuple[int, ...]:
    """The layers that a point was recorded in."""
    layers = tuple(int(name.split(".")[1]) for name in acts if name.endswith(point))
    if not layers:
        stacked(acts, point)  # raises, saying what to record
    return layers


def check_rows(pattern: Tensor, sink: Tensor, layer: int, acts: Activations) -> None:
    """Does every row of the pattern, with its sink, sum to 1?"""
    recorded = acts[f"blocks.{layer}.attn.hook_pattern"].dtype
    off = (pattern.sum(-1) + sink - 1).abs().max().item()
    if off > max(1e-5, 2 * torch.finfo(recorded).eps):
        raise ValueError(f"layer {layer}: a row of the pattern and its sink sum to 1 ± {off:.3g}, not to 1: was the "
                         "pattern edited? Edit hook_attn_scores or hook_sink_scores instead")  # fmt: skip


def _weights(queries: Tensor | None, pattern: Tensor) -> Tensor:
    """1 / n for each of n chosen queries, else 0.   -> [b s]"""
    shape = pattern.shape[0], pattern.shape[2]
    if queries is None:
        queries = torch.ones(shape, dtype=torch.bool)
    if queries.shape != shape or queries.dtype != torch.bool:
        raise ValueError(f"queries is {queries.dtype} {tuple(queries.shape)}: must be bool {shape}, as recorded")
    if not queries.any():
        raise ValueError("queries chooses no position")
    return queries.to(pattern.device).double() / queries.sum().item()


def by_head(layers: Iterable[int], heads: int) -> dict[str, Tensor]:
    layers = torch.tensor(list(layers))
    return {"layer": layers.repeat_interleave(heads), "head": torch.arange(heads).repeat(len(layers))}
