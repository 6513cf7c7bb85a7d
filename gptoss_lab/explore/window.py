"""Which heads copy when other layers slide, or their window is wider or narrower?"""
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import SLIDING
from ..hooks import record, unwrapped
from ..probes.heads import HeadScores, repeated
from ..probes.windowed import windowed
from .panel import Explorer, Some, Whole, small
from .texts import check_layer, random_tokens

if TYPE_CHECKING:
    from ..show.picture import Picture

PERIOD = 24
LONGEST = 128


@dataclass(frozen=True)
class Copying:
    """Random tokens that come twice, read with some window.

    loss [s-1]: nats for each token after the first.
    pattern [s s], seen [s s]: what one head reads; which keys its layer sees.
    scores [L H]: attention from the second copy on the token that came next in the first: the induction score.
    """

    loss: Tensor
    pattern: Tensor
    seen: Tensor
    scores: Tensor


def window(
    model: nn.Module, *, period: int | None = None, layer: int | None = None, head: int | None = None,
    sliding: Sequence[int] | None = None, live: bool | None = None, kept: Mapping[str, Sequence] | None = None,
    note: str = "",
) -> Explorer:  # fmt: skip
    """Move the window or choose which layers slide; see an induction head, and the loss of a repeated text.

    Args:
        period: random tokens in one copy; None: 24, or what the context holds.
        layer, head: the head shown; None: the one that copies best, found by running the model once.
        sliding: the layers that slide at first; None: the model's own.
        live: answer at every change; None: if the model is small.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: some windows, from 1 on.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: no such layer or head; a period that the context does not hold twice.
    """
    config = unwrapped(model).config
    longest = min(LONGEST, config.n_ctx // 2)
    period = min(PERIOD, longest) if period is None else period
    if layer is None or head is None:
        layers = range(config.n_layers) if layer is None else [layer]
        heads = range(config.n_heads) if head is None else [head]
        check_layer(model, layers[0], head=heads[0])
        scores = copied(model, _text(model, period), period, 0, 0).scores
        layer, head = max(((l, h) for l in layers for h in heads), key=lambda at: scores[at].item())
    own = max(1, config.sliding_window)
    if sliding is None:
        sliding = [i for i, kind in enumerate(config.layer_types) if kind == SLIDING]
    controls = {
        "sliding": Some(tuple(sliding), config.n_layers),
        "window": Whole(own, 1, max(own, min(config.n_ctx, 2 * longest))),
        "period": Whole(period, 2, longest), "layer": Whole(layer, 0, config.n_layers - 1),
        "head": Whole(head, 0, config.n_heads - 1),
    }  # fmt: skip
    if kept is None:
        widest = controls["window"].high
        kept = {"window": [keys for keys in (1, 2, 4, 8, 16, 24, 32, 48, 128) if keys <= min(widest, 2 * period)]}
    draw = partial(window_picture, model, note=note)
    return Explorer("the sliding window", draw, controls, live=small(model) if live is None else live, kept=kept)


@torch.no_grad()
def copied(model: nn.Module, tokens: Tensor, period: int, layer: int, head: int) -> Copying:
    """Run tokens [1 s], which repeat after `period`, with the windows that the model now has.

    Raises:
        ValueError: no such layer or head; the text is shorter than two periods.
    """
    check_layer(model, layer, head=head)
    with record(model, *HeadScores.points) as acts:
        logits = model(tokens)[0, :-1]
    loss = nn.functional.cross_entropy(logits.float(), tokens[0, 1:], reduction="none")
    at = torch.arange(tokens.shape[1], device=tokens.device)
    back, width = at[:, None] - at, unwrapped(model).config.window(layer) or tokens.shape[1]
    scores = HeadScores.of(acts, period=period).induction[:, 0]
    return Copying(loss, acts["pattern", layer][0, head], (back >= 0) & (back < width), scores)


def window_picture(
    model: nn.Module, sliding: Iterable[int], window: int, period: int, layer: int, head: int, *,
    note: str = "",
) -> "Picture":  # fmt: skip
    """As the model is and with other windows: one head's pattern, every head's induction score, the loss.

    Args:
        sliding, window: which layers slide, and how many keys they see: `probes.windowed.windowed`.

    Raises:
        ValueError: no such layer or head, a window below 1, a period that the context does not hold twice.
    """
    from matplotlib.ticker import MaxNLocator

    from ..show.figures import EXPERTS, STREAM, _array, _figure, _probabilities, _scale

    check_layer(model, layer, head=head)
    tokens = _text(model, period)
    before = copied(model, tokens, period, layer, head)
    with windowed(model, window, sliding):
        after = copied(model, tokens, period, layer, head)
        config = unwrapped(model).config
        windows = [config.window(i) for i in range(config.n_layers)]
    title = f"does layer {layer}, head {head} still copy? its stripe is {period - 1} tokens back; "
    title += f"score {before.scores[layer, head]:.2f} → {after.scores[layer, head]:.2f}"
    with _figure(10.5, 6, title, note) as fig:
        grid = fig.add_gridspec(2, 4, width_ratios=[2, 2, 1, 1], height_ratios=[1.5, 1])
        patterns = [fig.add_subplot(grid[0, i]) for i in (0, 1)]
        scores = [fig.add_subplot(grid[0, i]) for i in (2, 3)]
        for ax, run, name in zip(patterns, (before, after), ("the model as it is", "with these windows")):
            image = _probabilities(ax, run.pattern, run.seen)
            ax.set(title=name, xlabel="key, position", ylabel="query, position" if run is before else "")
        for ax, run, name in zip(scores, (before, after), ("which heads copy", "and now")):
            _probabilities(ax, run.scores)
            ax.plot(head, layer, "s", ms=9, mfc="none", mec=EXPERTS, mew=1.5)
            ax.set(title=name, xlabel="head (square: shown)")
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        layers, small = range(len(windows)), {"fontsize": 8 if len(windows) <= 12 else 5}
        scores[0].set_ylabel("layer")
        scores[0].set_yticks(layers, layers, **small)
        scores[1].set_ylabel("keys that the layer sees")
        scores[1].set_yticks(layers, ["all" if keys is None else keys for keys in windows], **small)
        _scale(fig, image, [*patterns, *scores], "attention, score")

        below = fig.add_subplot(grid[1, :])
        at = range(1, tokens.shape[1])
        means = [run.loss[period:].mean().item() for run in (before, after)]
        below.plot(at, _array(before.loss), ".-", color=STREAM, lw=1, label=f"as it is: {means[0]:.2f} in the copy")
        below.plot(at, _array(after.loss), ".--", color=EXPERTS, lw=1, label=f"now: {means[1]:.2f} in the copy")
        below.axvline(period - 0.5, color=STREAM, lw=0.8)
        below.set(xlabel="position of the token (line: the second copy begins)", ylabel="loss, nats a token",
                  xlim=(0, tokens.shape[1]))  # fmt: skip
        top = 1.5 * math.log(config.d_vocab)  # alike for all windows, so that they can be compared
        below.set_ylim(0, max(top, 1.05 * before.loss.max().item(), 1.05 * after.loss.max().item()))
        below.legend(loc="lower left")
    return fig


def _text(model: nn.Module, period: int) -> Tensor:
    most = unwrapped(model).config.n_ctx // 2
    if not 2 <= period <= most:
        raise ValueError(f"period = {period}: two copies of 2 to {most} tokens fit the model's context")
    return repeated(random_tokens(model, 1, period))
