"""Recorded values -> matplotlib figures.

Every function returns a Picture: a matplotlib Figure that the last line of a notebook cell shows, and that
`savefig` keeps. `words` names the positions (`words(tokens, tokenizer)`); `note` ends the title and says whose
values they are. Of a batch the first row is shown. Colour-blind readers can tell the colours apart: viridis is
for probabilities, on a square-root scale, so that small shares are seen; brown over white to green is for
values with a sign.
"""
import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import tiktoken
    from matplotlib.axes import Axes

    from ..hooks import Activations
    from .picture import Picture

ATTENTION, EXPERTS, STREAM = "#0072B2", "#D55E00", "#444444"  # blue and vermilion of Okabe and Ito's palette
UNSEEN, PALE = "#ececec", "#bbbbbb"
STYLE = {
    "figure.dpi": 100, "figure.titlesize": 11, "font.size": 9, "axes.titlesize": 10,
    "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "text.parse_math": False,  # a token may be "$"
}  # fmt: skip


def words(tokens: Tensor | Sequence[int], tokenizer: "tiktoken.Encoding | None") -> list[str]:
    """What each token stands for: ␣ for a space, ⏎ for a line's end, \\xe2 for part of a character.

    Args:
        tokens: ids [s], or [1 s].
        tokenizer: None gives the ids themselves.
    """
    ids = torch.as_tensor(tokens).flatten().tolist()
    if tokenizer is None:
        return [str(token) for token in ids]
    pieces = (tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace") for token in ids)
    return ["".join(_visible(letter) for letter in piece) for piece in pieces]


def whose(name: str) -> str:
    """What to call a model in a title: "the tiny model", "random weights", or the last part of its name or path."""
    known = {"tiny": "the tiny model", "tiny-random": "random weights"}
    parts = [part for part in name.split("/") if part]
    return known.get(name) or (parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1])


def _visible(letter: str) -> str:
    known = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    return known.get(letter) or (letter if letter.isprintable() else repr(letter)[1:-1])


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tensors of one shape, as a share of `other`'s largest value.

    Where nothing but rounding sets them apart it is near `torch.finfo(dtype).eps`: 1e-7 for float32, 8e-3 for
    bfloat16.

    Raises:
        ValueError: the shapes differ, so that an element would be compared with several.
    """
    if one.shape != other.shape:
        raise ValueError(f"shapes {tuple(one.shape)} and {tuple(other.shape)} cannot be compared one to one")
    return ((one.double() - other.double()).abs().max() / other.double().abs().max()).item()


# ------------------------------------------------------------------------------------------ one value each


def tokens(tokens: Tensor | Sequence[int], tokenizer: "tiktoken.Encoding | None") -> "Picture":
    """The text as the model reads it: one box a token, its id below."""
    from matplotlib.patches import FancyBboxPatch

    ids = torch.as_tensor(tokens).flatten().tolist()
    width, x, rows = 96, 0, [[]]
    for word, token in zip(words(ids, tokenizer), ids, strict=True):
        name = _short(word, 24)
        size = max(len(name), len(str(token))) + 2
        if x + size > width:
            x, rows = 0, [*rows, []]
        rows[-1].append((x, size, name, token))
        x += size
    with _figure(9, 0.4 + 0.5 * len(rows), f"{len(ids)} tokens: a piece of text, and its id") as fig:
        ax = fig.subplots()
        ax.set(xlim=(0, width), ylim=(len(rows) - 0.15, 0))
        ax.axis("off")
        shape = dict(boxstyle="round,pad=0,rounding_size=0.15", facecolor="#e8f1f8", edgecolor=ATTENTION)
        for y, row in enumerate(rows):
            for x, size, name, token in row:
                ax.add_patch(FancyBboxPatch((x + 0.25, y + 0.02), size - 0.5, 0.5, lw=0.8, **shape))
                ax.text(x + size / 2, y + 0.28, name, ha="center", va="center", family="monospace")
                ax.text(x + size / 2, y + 0.7, token, ha="center", va="center", fontsize=7, color="#666666")
    return fig


def vectors(
    values: Tensor | Sequence[Tensor], labels: Sequence[str], *, title: str, note: str = ""
) -> "Picture":
    """Vectors [n d] of the residual stream's space as n rows of colour, all on one scale."""
    x = _array(values if isinstance(values, Tensor) else torch.stack([v.flatten() for v in values]))
    limit = np.abs(x).max() or 1
    with _figure(9, 1.1 + 0.3 * min(len(x), 16), title, note) as fig:
        ax = fig.subplots()
        image = ax.imshow(x, cmap="BrBG", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        _name(ax.yaxis, labels, most=16)
        ax.set_xlabel("dimension")
        for edge in range(1, len(x)):
            ax.axhline(edge - 0.5, color="white", lw=2 if len(x) < 9 else 0.5)
        fig.colorbar(image, label="value", pad=0.01)
    return fig


def pattern(acts: "Activations", layer: int, words: Sequence[str], *, note: str = "") -> "Picture":
    """Where each head of a layer looks: a row is a query, a column a key; the sink has a column of its own.

    A row and its sink sum to 1. Grey keys are seen by no head: they come later, or lie behind the window.

    Args:
        acts: holds `pattern` and `sink_mass` of that layer.

    Raises:
        KeyError: here and in every function that takes `acts`: naming what was not recorded.
    """
    p, sink = acts["pattern", layer][0], acts["sink_mass", layer][0]
    seen = (p != 0).any(0)
    heads, s, _ = p.shape
    across = min(heads, 4 if heads <= 16 else 8)
    down = math.ceil(heads / across)
    names = across <= 4 and s <= 18
    wide = max(1, s / 12)  # of the sink's column, in keys
    height = down * 8.5 / across + (1.2 if names else 0.8)
    with _figure(9.6, height, f"attention pattern of layer {layer}", note) as fig:
        grid = fig.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for head, ax in enumerate(grid.flat[:heads]):
            _probabilities(ax, sink[head][:, None], extent=(-0.5 - 2 * wide, -0.5 - wide, s - 0.5, -0.5))
            image = _probabilities(ax, p[head], seen, extent=(-0.5, s - 0.5, s - 0.5, -0.5))
            ax.set_title(f"head {head}", pad=3, fontsize=9 if across <= 4 else 7)
            ax.set_xlim(-0.5 - 2 * wide, s - 0.5)
            ax.set_xticks([-0.5 - 1.5 * wide], ["sink"], rotation=90 if names else 0)
            _name(ax.yaxis, words if names else [])
            if names:
                ax.set_xticks([-0.5 - 1.5 * wide, *range(s)], ["sink", *map(_short, words)], rotation=90)
            ax.tick_params(length=0)
        for ax in grid.flat[heads:]:
            ax.axis("off")
        fig.supylabel("query" if names else f"query, position 0 to {s - 1}", fontsize=9)
        fig.supxlabel("key" if names else f"key, position 0 to {s - 1}", fontsize=9)
        _scale(fig, image, grid, "probability", aspect=25 if down < 3 else 60)
    return fig


def router(
    acts: "Activations", layer: int, words: Sequence[str], *, position: int = -1, note: str = ""
) -> "Picture":
    """The router's choice for one token: a logit an expert, and the weights of the experts that it takes.

    Args:
        acts: holds `router_logits`, `expert_indices` and `expert_weights` of that layer.
        position: the token.
    """
    names = "router_logits", "expert_indices", "expert_weights"
    logits, indices, weights = (_array(acts[name, layer][0, position]) for name in names)
    with _figure(9, 2.9, f"the router of layer {layer} on “{words[position]}”", note) as fig:
        ax = fig.subplots()
        every = np.arange(len(logits))
        ax.bar(every, logits, color=np.where(np.isin(every, indices), EXPERTS, PALE), width=0.8)
        for expert, weight in zip(indices, weights, strict=True):
            top = logits[expert]
            offset, align = (2, "bottom") if top >= 0 else (-2, "top")
            ax.annotate(f"{weight:.2f}", (expert, top), (0, offset), textcoords="offset points", ha="center",
                        va=align, color=EXPERTS, fontsize=8)  # fmt: skip
        ax.axhline(0, color=STREAM, lw=0.8)
        ax.margins(x=0.01, y=0.15)
        ax.set(xlabel=f"expert (orange: the {len(indices)} taken, with their weights)", ylabel="router logit",
               xticks=range(0, len(logits), math.ceil(len(logits) / 32)))  # fmt: skip
    return fig


def routes(acts: "Activations", words: Sequence[str], *, note: str = "") -> "Picture":
    """Which experts each token takes, layer by layer; the colour is the weight that the expert's output gets.

    Args:
        acts: holds `router_logits`, `expert_indices` and `expert_weights` of every layer.
    """
    layers = _layers(acts, "expert_weights")
    chosen = [_scattered(acts, layer) for layer in layers]
    s, n_experts = chosen[0].shape
    across = min(len(layers), 4 if len(layers) <= 8 else 6)
    down = math.ceil(len(layers) / across)
    tall = min(0.8 + 0.17 * s, 5) if down == 1 else min(0.5 + 0.12 * s, 2.2)
    with _figure(9.6, down * tall + 0.7, "which experts each token takes, and with what weight", note) as fig:
        grid = fig.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for ax, layer, weights in zip(grid.flat, layers, chosen, strict=False):
            image = _probabilities(ax, weights, weights > 0)
            ax.set_title(f"layer {layer}", pad=3)
            ax.set_xticks(range(0, n_experts, math.ceil(n_experts / (8 if across <= 4 else 4))))
            _name(ax.yaxis, words, most=24 if down == 1 else 12)
        for ax in grid.flat[len(layers) :]:
            ax.axis("off")
        for ax in grid[-1]:
            ax.set_xlabel("expert")
        _scale(fig, image, grid, "weight", aspect=25 if down < 3 else 60)
    return fig


def residual(acts: "Activations", words: Sequence[str], *, note: str = "") -> "Picture":
    """The length of the residual stream at every position: as embedded, then after each layer.

    Args:
        acts: holds `hook_embed` and every layer's `resid_post`.
    """
    layers = _layers(acts, "resid_post")
    stream = torch.stack([acts["hook_embed"][0], *(acts["resid_post", layer][0] for layer in layers)])
    norms = _norms(stream)
    with _figure(9, min(1.6 + 0.28 * len(norms), 7), "length of the residual stream", note) as fig:
        ax = fig.subplots()
        image = ax.imshow(norms, cmap="cividis", vmin=0, aspect="auto", origin="lower")
        _name(ax.xaxis, words, most=40, rotation=90 if len(words) > 12 else 0)
        _name(ax.yaxis, ["embed", *(f"layer {layer}" for layer in layers)])
        if norms.size <= 120:
            for (y, x), norm in np.ndenumerate(norms):
                colour = "black" if norm > norms.max() / 2 else "white"
                ax.text(x, y, f"{norm:.3g}", ha="center", va="center", fontsize=7, color=colour)
        ax.set_xlabel("token")
        fig.colorbar(image, label="Euclidean norm", pad=0.01)
    return fig


def logits(
    logits: Tensor, tokenizer: "tiktoken.Encoding | None", *, k: int = 10, note: str = ""
) -> "Picture":
    """The k most likely next tokens. Of logits [b s V] or [s V] the last position is taken.

    The dashed line is what every token would get if the model had no opinion.
    """
    with _figure(9, 0.9 + 0.26 * k, "the next token", note) as fig:
        _top_tokens(fig.subplots(), logits, tokenizer, k)
    return fig


def _top_tokens(ax: "Axes", logits: Tensor, tokenizer, k: int) -> None:
    from matplotlib.ticker import MaxNLocator

    last = logits.detach().flatten(0, -2)[-1].float().cpu()
    probability, ids = last.softmax(-1).topk(min(k, len(last)))
    values = [f"{p:.1%}, logit {l:.2f}" for p, l in torch.stack([probability, last[ids]], 1).tolist()]
    bars = ax.barh(range(len(ids)), _array(probability), color=ATTENTION, height=0.75)
    ax.bar_label(bars, values, padding=3, fontsize=7)
    ax.axvline(1 / len(last), color=EXPERTS, lw=1, ls="--", zorder=3)
    ax.set_yticks(range(len(ids)), [_short(word) for word in words(ids, tokenizer)], family="monospace")
    ax.set(xlabel=f"probability (dashed: 1/{len(last):,})", xlim=(0, 1.65 * probability[0].item()))
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, 1.65 * probability[0].item())
    ax.set_xticks([x for x in ticks if 0 <= x <= 1 and x <= 1.65 * probability[0]])  # the rest is room for words
    ax.xaxis.set_major_formatter("{x:.1%}" if probability[0] < 0.02 else "{x:.0%}")
    ax.invert_yaxis()


# ------------------------------------------------------------------------------------------ the whole way


def path(
    acts: "Activations", words: Sequence[str], tokenizer: "tiktoken.Encoding | None", *, note: str = ""
) -> "Picture":
    """The last token's way through the model, layers from left to right, to the next token.

    Above: the keys that it reads, averaged over the heads, and the sinks. In the middle: its experts. Below:
    the length of its residual stream, and of what attention and the experts add to it.

    Args:
        acts: every layer's `pattern`, `sink_mass`, `router_logits`, `expert_indices`, `expert_weights`,
            `resid_pre`, `attn_out`, `resid_mid`, `mlp_out` and `resid_post`, and `unembed.hook_out`. A
            recording of "*" holds them.
    """
    layers = _layers(acts, "resid_post")
    n = len(layers)
    last = lambda name: torch.stack([acts[name, layer][0, -1] for layer in layers])
    keys = torch.stack([acts["pattern", layer][0, :, -1].float() for layer in layers])  # [L H t]
    sinks = torch.stack([acts["sink_mass", layer][0, :, -1].float().mean() for layer in layers])
    weights = torch.stack([_scattered(acts, layer)[-1] for layer in layers]).T
    stops = _norms(torch.stack([last("resid_pre"), last("resid_mid"), last("resid_post")], 1))

    with _figure(10.5, 7.6, f"“{words[-1]}”: from the last token read to the next one", note) as fig:
        grid = fig.add_gridspec(4, 2, width_ratios=[2.3, 1], height_ratios=[1.25, 0.12, 1, 0.9])
        above, strip, middle, below = axes = [fig.add_subplot(grid[row, 0]) for row in range(4)]
        image = _probabilities(above, keys.mean(1).T, (keys != 0).any(1).T)
        _probabilities(strip, sinks[None])
        above.set(title="1  attention: what it reads (mean of the heads)", ylabel="key")
        _name(above.yaxis, words, most=16)
        _name(strip.yaxis, ["sink"])
        _scale(fig, image, [above, strip], "probability")

        image = _probabilities(middle, weights, weights > 0)
        middle.set(title="2  router: which experts work on it", ylabel="expert",
                   yticks=range(0, len(weights), math.ceil(len(weights) / 8)))  # fmt: skip
        _scale(fig, image, [middle], "weight")

        x = np.arange(n)[:, None] + [-0.5, 0, 0.5]  # before a layer, between its halves, after it
        below.bar(x[:, 0] + 0.25, _norms(last("attn_out")), 0.44, color=ATTENTION, label="attention adds")
        below.bar(x[:, 1] + 0.25, _norms(last("mlp_out")), 0.44, color=EXPERTS, label="experts add")
        below.plot(x.flatten(), stops.flatten(), color=STREAM, marker=".", ms=5, label="the stream")
        below.set(title="3  residual stream: what is added to it", ylabel="Euclidean norm", xlabel="layer",
                  ylim=(0, 1.25 * stops.max()))  # fmt: skip
        below.legend(loc="upper left", ncols=3, borderaxespad=0.1)
        for ax in axes:
            ax.set(xlim=(-0.5, n - 0.5), xticks=range(0, n, math.ceil(n / 12)))
            ax.tick_params(labelbottom=ax is below)

        right = fig.add_subplot(grid[:, 1])
        _top_tokens(right, acts["unembed.hook_out"], tokenizer, 16)
        right.set_title("4  logits: the next token")
    return fig


# ------------------------------------------------------------------------------------------ shared


@contextmanager
def _figure(width: float, height: float, title: str, note: str = ""):
    """A picture in the package's style."""
    import matplotlib

    from .picture import Picture

    with matplotlib.rc_context(STYLE):
        fig = Picture(figsize=(width, height), layout="constrained")
        fig.suptitle(f"{title} ({note})" if note else title, x=0.01, ha="left")
        yield fig
        fig.draw_without_rendering()  # some text is only made now, and must get the style


def _array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x).numpy()  # NumPy has no bfloat16


def _norms(x: Tensor) -> np.ndarray:
    return _array(x.float().norm(dim=-1))


def _layers(acts: "Activations", name: str) -> list[int]:
    """The layers that `name` was recorded in."""
    layers = [int(full.split(".")[1]) for full in acts if full.endswith(f".hook_{name}")]
    if not layers:
        raise KeyError(f"hook_{name} was recorded in no layer; recorded are {', '.join(acts) or 'no points'}")
    return layers


def _scattered(acts: "Activations", layer: int) -> Tensor:
    """The weight of every expert, 0 for those not taken.   -> [s E]"""
    none = torch.zeros_like(acts["router_logits", layer][0])
    return none.scatter(-1, acts["expert_indices", layer][0], acts["expert_weights", layer][0])


def _probabilities(ax: "Axes", p: Tensor, seen: Tensor | None = None, **where):
    """An image of values from 0 to 1, grey where `seen` is False."""
    import matplotlib
    from matplotlib.colors import PowerNorm

    image = np.ma.masked_array(_array(p), None if seen is None else ~_array(seen))
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=UNSEEN)
    return ax.imshow(image, cmap=colours, norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest",
                     **where)  # fmt: skip


def _scale(fig: "Picture", image, axes, label: str, aspect: int = 25) -> None:
    ticks = [0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1]
    fig.colorbar(image, ax=axes, label=label, pad=0.01, aspect=aspect, ticks=ticks)


def _name(axis, labels: Sequence[str], most: int = 26, **text) -> None:
    """Ticks with names: every second or third only, where there are more than `most`."""
    at = range(0, len(labels), max(1, math.ceil(len(labels) / most)))
    axis.set_ticks(at, [_short(labels[i]) for i in at], **text)


def _short(word: str, most: int = 14) -> str:
    return word if len(word) <= most else word[: most - 1] + "…"
