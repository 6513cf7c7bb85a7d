"""What does a head read of a text, and how much goes to its sink?"""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..hooks import record, unwrapped
from .panel import Explorer, Text, Whole, small, spread
from .texts import check_layer, read

if TYPE_CHECKING:
    from ..show.picture import Picture

PROMPT = "find cat red, dog blue? dog"


def attention(
    model: nn.Module, prompt: str = PROMPT, *, layer: int = 0, head: int = 0, live: bool | None = None,
    kept: Mapping[str, Sequence] | None = None, note: str = "",
) -> Explorer:  # fmt: skip
    """Type a prompt, choose a layer and a head, see its pattern with the sink.

    Args:
        live: answer at every change; None: if the model is small.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: four layers of four heads.
        note: ends the title and says whose values they are.
    """
    config = unwrapped(model).config
    controls = {"prompt": Text(prompt), "layer": Whole(layer, 0, config.n_layers - 1),
                "head": Whole(head, 0, config.n_heads - 1)}  # fmt: skip
    if kept is None:
        kept = {"layer": spread(config.n_layers, 4), "head": spread(config.n_heads, 4)}
    draw = partial(head_picture, model, note=note)
    return Explorer("attention", draw, controls, live=small(model) if live is None else live, kept=kept)


@torch.no_grad()
def attended(model: nn.Module, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """What each query of a layer spends on each key, and on the sink; both together sum to 1.

    Args:
        tokens: [1 s].

    Returns:
        pattern [H s s] and sink [H s].
    """
    check_layer(model, layer)
    with record(model, ("pattern", layer), ("sink_mass", layer)) as acts:
        model(tokens)
    return acts["pattern", layer][0], acts["sink_mass", layer][0]


def head_picture(model: nn.Module, prompt: str, layer: int, head: int, *, note: str = "") -> "Picture":
    """One head's pattern on a prompt: a row is a query, a column a key; the sink stands at the left.

    Raises:
        ValueError: a prompt that is empty or too long; no such layer or head.
    """
    from ..show import words

    check_layer(model, layer, head=head)
    inner, tokens = unwrapped(model), read(model, prompt)
    pattern, sink = attended(model, tokens, layer)
    window = inner.config.window(layer)
    sees = "sees all before it" if window is None else f"window of {window} keys"
    return drawn(pattern[head], sink[head], (pattern != 0).any(0), words(tokens, inner.tokenizer),
                 f"layer {layer} ({sees}), head {head}: a bright cell is a token read; "
                 f"{sink[head].float().mean():.0%} of all goes to the sink", note)  # fmt: skip


def drawn(pattern: Tensor, sink: Tensor, seen: Tensor, words: list[str], title: str, note: str) -> "Picture":
    """pattern [s s], sink [s], seen [s s] where a key is visible, s words"""
    from ..show.figures import _figure, _name, _probabilities, _scale, _short

    s = len(words)
    wide = max(1, s / 16)  # of the sink's column, in keys
    left = -0.5 - 0.9 * wide
    size = min(4 + 0.17 * s, 7.5)
    with _figure(size + 2.2, size, title, note) as fig:
        ax = fig.subplots()
        _probabilities(ax, sink[:, None], extent=(left - wide / 2, left + wide / 2, s - 0.5, -0.5))
        image = _probabilities(ax, pattern, seen, extent=(-0.5, s - 0.5, s - 0.5, -0.5))
        ax.set_xlim(left - wide / 2, s - 0.5)
        _name(ax.yaxis, words, most=40)
        at = range(0, s, max(1, -(-s // 40)))
        ax.set_xticks([left, *at], ["sink", *(_short(words[i]) for i in at)], rotation=90)
        ax.tick_params(length=0)
        ax.set(xlabel="key: the token read (grey: out of sight)", ylabel="query: the token that reads")
        _scale(fig, image, [ax], "probability")
    return fig
