"""What does a text beyond the trained length cost, with positions stretched in one way or another?"""
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..probes.long_texts import LossByPosition
from ..probes.yarn import COLOURS, DASHES, WAYS, as_loaded, trained_length
from .panel import Explorer, OneOf, Whole, small
from .texts import random_tokens

if TYPE_CHECKING:
    from ..show.picture import Picture

ROWS = 2


def context(
    model: nn.Module, way: str = "yarn", *, factor: int = 4, period: int | None = None, live: bool | None = None,
    kept: Mapping[str, Sequence] | None = None, note: str = "",
) -> Explorer:  # fmt: skip
    """Choose a way of stretching positions and how far; see the loss along a text of that length.

    Args:
        way: one of `probes.yarn.WAYS`.
        factor: text length over trained length: 1, 2, 4, 8, and on to the model's own.
        period: the text is this many random tokens, again and again; None: 24, or less in a short context.
        live: answer at every change; None: if the model is small.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: two ways and four factors.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: no such way or factor; a period that does not fit.
    """
    config = as_loaded(model)
    trained = trained_length(config)
    reach = max(8, config.yarn.factor if config.yarn else 1)
    factors = [2**i for i in range(int(reach).bit_length())]
    controls = {"way": OneOf(way, WAYS), "factor": OneOf(factor, factors),
                "period": Whole(min(24, trained // 2) if period is None else period, 2, trained // 2)}  # fmt: skip
    if kept is None:
        kept = {"way": ["interpolation", "yarn"], "factor": factors[:4]}
    draw = partial(context_picture, model, note=note)
    return Explorer("a longer context", draw, controls, live=small(model) if live is None else live, kept=kept)


def stretched(model: nn.Module, way: str, factor: float, period: int) -> LossByPosition:
    """Loss along random tokens that come again every `period`, `factor` times the trained length, in two ways.

    The ways are "none", which is the model with no help, and `way`.

    Raises:
        ValueError: no such way, a factor below 1, a period that does not fit the trained length twice.
    """
    trained = trained_length(as_loaded(model))
    if not 2 <= period <= trained // 2:
        raise ValueError(f"period = {period}: must be from 2 to {trained // 2}, half the trained length")
    if not factor >= 1:
        raise ValueError(f"factor = {factor}: must be at least 1, the length of the text over the trained one")
    length = int(factor * trained) + 1
    tokens = random_tokens(model, ROWS, period).repeat(1, -(-length // period))[:, :length]
    return LossByPosition.measure(model, tokens, ways=tuple(dict.fromkeys(["none", way])), factors=(factor,))


def context_picture(model: nn.Module, way: str, factor: float, period: int, *, note: str = "") -> "Picture":
    """The mean loss of each copy, as far as the text goes; dotted: positions as they are.

    Raises:
        ValueError: see `stretched`.
    """
    from ..show.figures import PALE, STREAM, _array, _figure

    found = stretched(model, way, factor, period)
    trained, (mean, _) = found.n_ctx_trained, found.by_position(period)
    length = found.loss.shape[-1]
    beyond = found.loss[0, ..., trained:].nanmean((1, 2)) if factor > 1 else None
    with _figure(10, 4.2, f"is the text beyond the trained length still copied? {way}, factor {factor:g}: "
                 "a good way stays low right of the line", note) as fig:  # fmt: skip
        ax = fig.subplots()
        middle = torch.tensor([(i + min(length, i + period)) / 2 for i in range(0, length, period)])
        for w, one in enumerate(found.ways):
            name = "positions as they are" if one == "none" else f"{one}, {factor:g}×"
            if beyond is not None:
                name += f": {beyond[w]:.2f} beyond the line"
            ax.plot(middle, _array(mean[0, w]), marker=".", color=COLOURS[one], ls=DASHES[one], lw=1.5, label=name)
        ax.axhline(torch.tensor(as_loaded(model).d_vocab).log().item(), color=PALE, lw=1, label="knows nothing: ln V")
        ax.axvline(trained, color=STREAM, lw=1)
        ax.set(xlabel=f"position, tokens (line: trained length {trained:,}; text: {period} random tokens again and "
               "again)", ylabel="loss of one copy, nats a token", xlim=(0, length))  # fmt: skip
        ax.set_ylim(bottom=0)
        ax.legend(loc="best")
    return fig
