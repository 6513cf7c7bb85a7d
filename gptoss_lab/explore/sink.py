"""What does a head do with nothing to read, and what when it may not rest? One query, its keys and its sink."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..hooks import edit, record, unwrapped
from .panel import Along, Explorer, Text, Whole, small
from .texts import check_layer, read

if TYPE_CHECKING:
    from ..show.picture import Picture

PROMPT = "find cat red, dog blue? dog"
OFF = -math.inf
OFFSETS = (OFF, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Reading:
    """What the last token reads in one head.

    logit: of the sink.
    keys [s]: probability on each token. mass: on the sink; both sum to 1.
    norm: length of the head's output z, before the output projection.
    """

    logit: float
    keys: Tensor
    mass: float
    norm: float


def sink(
    model: nn.Module, prompt: str = PROMPT, *, layer: int | None = None, head: int | None = None, offset: float = 0.0,
    live: bool | None = None, kept: Mapping[str, Sequence] | None = None, note: str = "",
) -> Explorer:  # fmt: skip
    """Slide the logit of one head's sink, and see what the prompt's last token reads and what the head then writes.

    Args:
        layer, head: None: the head that rests most on that token, found by running the model once.
        offset: nats above the learned logit, one of OFFSETS; OFF is no sink.
        live: answer at every change; None: if the model is small.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: all offsets.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: no such layer or head; an offset that is not among OFFSETS.
    """
    config = unwrapped(model).config
    if layer is None or head is None:
        layer, head = _most_at_rest(model, prompt, layer, head)
    controls = {"prompt": Text(prompt), "layer": Whole(layer, 0, config.n_layers - 1),
                "head": Whole(head, 0, config.n_heads - 1), "offset": Along(offset, OFFSETS, written)}  # fmt: skip
    draw = partial(sink_picture, model, note=note)
    kept = {"offset": OFFSETS} if kept is None else kept
    return Explorer("a sink", draw, controls, live=small(model) if live is None else live, kept=kept)


def written(offset: float) -> str:
    return "off" if offset == OFF else f"{offset:+g}" if offset else "as learned"


@torch.no_grad()
def _most_at_rest(model: nn.Module, prompt: str, layer: int | None, head: int | None) -> tuple[int, int]:
    config = unwrapped(model).config
    check_layer(model, layer or 0, head=head or 0)
    layers = range(config.n_layers) if layer is None else [layer]
    heads = range(config.n_heads) if head is None else [head]
    try:
        tokens = read(model, prompt)
    except ValueError:  # the explorer will say so
        return layers[0], heads[0]
    with record(model, *(("sink_mass", i) for i in layers)) as acts:
        model(tokens)
    return max(((i, j) for i in layers for j in heads), key=lambda at: acts["sink_mass", at[0]][0, at[1], -1].item())


@torch.no_grad()
def reading(model: nn.Module, tokens: Tensor, layer: int, head: int, offset: float = 0.0) -> Reading:
    """What the last of tokens [1 s] reads, with `offset` nats added to the logit of that head's sink.

    Raises:
        ValueError: no such layer or head; an offset of NaN or infinity: minus infinity alone has a meaning.
    """
    check_layer(model, layer, head=head)
    if not offset < math.inf:
        raise ValueError(f"offset = {offset}: must be a number of nats, or minus infinity for no sink")

    def moved(sinks: Tensor) -> Tensor:
        sinks[:, head] += offset
        return sinks

    names = "sink_scores", "pattern", "sink_mass", "z"
    points = [(name, layer) for name in names]
    with edit(model, {points[0]: moved} if offset else {}), record(model, *points) as acts:
        model(tokens)
    logit, keys, mass, z = (acts[name, layer][0] for name in names)
    return Reading(logit[head, -1].item(), keys[head, -1].float(), mass[head, -1].item(), z[-1, head].norm().item())


def sink_picture(
    model: nn.Module, prompt: str, layer: int, head: int, offset: float = 0.0, *, note: str = ""
) -> "Picture":
    """Above: what the last token spends on its sink and on each key. Below: the keys among themselves; the output.

    Grey is the head as learned, colour with `offset` nats on its sink's logit.

    Raises:
        ValueError: a prompt that is empty or too long; no such layer or head; an offset of NaN or infinity.
    """
    from ..show import words
    from ..show.figures import ATTENTION, EXPERTS, PALE, STREAM, _array, _figure, _name

    inner, tokens = unwrapped(model), read(model, prompt)
    before, after = (reading(model, tokens, layer, head, x) for x in (0.0, offset))
    names, s = words(tokens, inner.tokenizer), tokens.shape[1]
    at = torch.arange(s).numpy()
    title = (f"layer {layer}, head {head}: what “{names[-1]}” reads, its sink's logit "
             f"{before.logit:.2f} → {'none' if offset == OFF else f'{after.logit:.2f}'}")  # fmt: skip
    with _figure(10, 5, title, note) as fig:
        grid = fig.add_gridspec(2, 2, width_ratios=[3, 1], height_ratios=[1.4, 1])
        above, shares, norm = (fig.add_subplot(grid[place]) for place in ((0, slice(None)), (1, 0), (1, 1)))
        above.bar([-2.2, -1.8], [before.mass, after.mass], 0.4, color=[PALE, EXPERTS])
        for ax, x, y in ((above, before.keys, after.keys), (shares, _shares(before.keys), _shares(after.keys))):
            ax.bar(at - 0.2, _array(x), 0.4, color=PALE, label="as learned")
            ax.bar(at + 0.2, _array(y), 0.4, color=ATTENTION, label=f"sink {written(offset)}")
        above.axvline(-1, color=STREAM, lw=0.8)
        _name(above.xaxis, names, most=60, rotation=90 if s > 14 else 0)
        above.set_xticks([-2, *above.get_xticks()], ["sink", *(label.get_text() for label in above.get_xticklabels())])
        above.set(ylabel="probability", ylim=(0, 1), xlim=(-2.8, s - 0.4),
                  title=f"all sums to 1: on the sink {before.mass:.3f} → {after.mass:.3f}, on the keys "
                        f"{1 - before.mass:.3f} → {1 - after.mass:.3f}")  # fmt: skip
        above.legend(loc="upper right")
        shares.set(ylabel="share", xlabel="position of the key", xlim=(-0.6, s - 0.4), ylim=(0, 1),
                   title="the keys among themselves: their ratios stay")  # fmt: skip
        norm.barh([1, 0], [before.norm, after.norm], color=[PALE, ATTENTION], height=0.7)
        norm.set_yticks([1, 0], ["as learned", "now"])
        norm.set(xlabel="Euclidean norm", title="what the head gives out: "
                 + (f"× {after.norm / before.norm:.3g}" if before.norm else f"{after.norm:.3g}"))  # fmt: skip
        widest = before.norm / max(1 - before.mass, 1e-9)  # without a sink
        norm.set_xlim(0, 1.05 * max(widest, after.norm) or 1)
    return fig


def _shares(keys: Tensor) -> Tensor:
    return keys / keys.sum()  # all on the sink: NaN, no bars
