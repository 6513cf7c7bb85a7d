"""Many readers, few books: what do the query heads read that share one key/value head?"""
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..hooks import unwrapped
from .attention import PROMPT, attended
from .panel import Explorer, Text, Whole, small, spread
from .texts import check_layer, read

if TYPE_CHECKING:
    from ..show.picture import Picture


def groups(
    model: nn.Module, prompt: str = PROMPT, *, layer: int = 0, group: int = 0, live: bool | None = None,
    kept: Mapping[str, Sequence] | None = None, note: str = "",
) -> Explorer:  # fmt: skip
    """Choose a layer and a key/value head, see the patterns of the query heads that read it, side by side.

    Args:
        group: the key/value head; its query heads are group * G to group * G + G - 1, G of them.
        live: answer at every change; None: if the model is small.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: four layers of two groups.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: no such layer or group.
    """
    config = unwrapped(model).config
    controls = {"prompt": Text(prompt), "layer": Whole(layer, 0, config.n_layers - 1),
                "group": Whole(group, 0, config.n_kv_heads - 1)}  # fmt: skip
    if kept is None:
        kept = {"layer": spread(config.n_layers, 4), "group": spread(config.n_kv_heads, 2)}
    draw = partial(groups_picture, model, note=note)
    return Explorer("grouped-query attention", draw, controls, live=small(model) if live is None else live, kept=kept)


def shared(pattern: Tensor, sink: Tensor) -> float:
    """Probability that every head spends on the same, mean over queries: 1 if all read alike, 0 if nothing in common.

    Args:
        pattern: [G s s] and sink [G s], rows that sum to 1 together.
    """
    return (pattern.amin(0).sum(-1) + sink.amin(0)).mean().item()


def groups_picture(model: nn.Module, prompt: str, layer: int, group: int, *, note: str = "") -> "Picture":
    """The patterns of one group's heads: a row is a query, a column a key; the sink stands at the left.

    Raises:
        ValueError: a prompt that is empty or too long; no such layer or group.
    """
    from ..show import words
    from ..show.figures import _figure, _name, _probabilities, _scale, _short

    inner = unwrapped(model)
    config, tokens = inner.config, read(model, prompt)
    check_layer(model, layer, group=group)
    heads = range(group * config.n_groups, (group + 1) * config.n_groups)
    pattern, sink = (x[heads.start : heads.stop].float() for x in attended(model, tokens, layer))
    names, s = words(tokens, inner.tokenizer), tokens.shape[1]
    across = min(len(heads), 4)
    down = math.ceil(len(heads) / across)
    said = s <= 24 and across <= 2
    title = (f"layer {layer}: {len(heads)} query heads read the keys of key head {group}; "
             f"{shared(pattern, sink):.0%} of what they read is the same in all")  # fmt: skip
    wide = max(1, s / 16)  # of the sink's column, in keys
    left = -0.5 - 0.9 * wide
    size = 9 / across
    with _figure(10, down * size * 0.86 + (1.2 if said else 0.8), title, note) as fig:
        grid = fig.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        seen = (pattern != 0).any(0)
        for i, ax in enumerate(grid.flat):
            if i >= len(heads):
                ax.axis("off")
                continue
            _probabilities(ax, sink[i][:, None], extent=(left - wide / 2, left + wide / 2, s - 0.5, -0.5))
            image = _probabilities(ax, pattern[i], seen, extent=(-0.5, s - 0.5, s - 0.5, -0.5))
            ax.set_xlim(left - wide / 2, s - 0.5)
            ax.set_title(f"head {heads[i]}: sink {sink[i].mean():.0%}", pad=3)
            _name(ax.yaxis, names if said else [], most=40)
            ticks = range(s) if said else []
            ax.set_xticks([left, *ticks], ["sink", *(_short(names[t]) for t in ticks)], rotation=90)
            ax.tick_params(length=0)
        fig.supxlabel("key: the token read (grey: out of sight)", fontsize=9)
        fig.supylabel("query: the token that reads", fontsize=9)
        _scale(fig, image, grid, "probability")
    return fig
