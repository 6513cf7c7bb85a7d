"""What changes in the model's predictions when an expert is taken away?"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..hooks import edit, record, unwrapped
from ..probes.effect import Effect
from ..probes.router import drop, reweight
from .panel import Explorer, OneOf, Text, Whole, small, spread
from .texts import check_layer, read

if TYPE_CHECKING:
    from ..show.picture import Picture

PROMPT = "find cat red, dog blue? dog"
WAYS = {
    "drop: the next best works": drop,
    "silence: nobody works": lambda layer, expert: reweight(layer, expert, 0.0),
    "leave it": None,
}
DROP = next(iter(WAYS))


@dataclass(frozen=True)
class Without:
    """A prompt read by the model as it is, and with an expert taken away.

    before, after [V]: probability of each next token.
    effect: the loss of each token of the prompt but the first, before and after (`probes.effect.Effect`).
    taken [s]: does the token take the expert in the model as it is?
    """

    before: Tensor
    after: Tensor
    effect: Effect
    taken: Tensor


def experts(
    model: nn.Module, prompt: str = PROMPT, *, layer: int = 0, expert: int | None = None, live: bool | None = None,
    kept: Mapping[str, Sequence] | None = None, note: str = "",
) -> Explorer:  # fmt: skip
    """Type a prompt, take an expert away, see the next token and the loss change.

    Args:
        expert: None: the first choice of the prompt's last token, found by running the model once.
        live: answer at every change; None: if the model is small.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: the experts that the last
            token takes, or with `expert` given eight of all; dropped and silenced.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: no such layer or expert.
    """
    config = unwrapped(model).config
    check_layer(model, layer)
    choices = _choices(model, prompt, layer) if expert is None else spread(config.n_experts, 8)
    expert = choices[0] if expert is None else expert
    controls = {"prompt": Text(prompt), "layer": Whole(layer, 0, config.n_layers - 1),
                "expert": Whole(expert, 0, config.n_experts - 1), "way": OneOf(DROP, tuple(WAYS))}  # fmt: skip
    kept = {"expert": choices, "way": tuple(WAYS)[:2]} if kept is None else kept
    draw = partial(expert_picture, model, note=note)
    return Explorer("experts", draw, controls, live=small(model) if live is None else live, kept=kept)


@torch.no_grad()
def _choices(model: nn.Module, prompt: str, layer: int) -> list[int]:
    try:
        tokens = read(model, prompt)
    except ValueError:  # the explorer will say so
        return [0]
    with record(model, ("expert_indices", layer)) as acts:
        model(tokens)
    return acts["expert_indices", layer][0, -1].tolist()


@torch.no_grad()
def without(model: nn.Module, tokens: Tensor, layer: int, expert: int, way: str = DROP) -> Without:
    """Run tokens [1 s] as the model is, and with an expert taken away in one of WAYS.

    Raises:
        ValueError: no such layer, expert or way; fewer than two tokens.
    """
    check_layer(model, layer, expert=expert)
    if way not in WAYS:
        raise ValueError(f"way = {way!r}: must be one of {', '.join(map(repr, WAYS))}")
    points = *Effect.points, ("expert_indices", layer)
    with record(model, *points) as acts:
        model(tokens)
    with edit(model, WAYS[way](layer, expert) if WAYS[way] else {}), record(model, *points) as edited:
        model(tokens)
    before, after = (x["unembed.hook_out"][0, -1].float().softmax(-1) for x in (acts, edited))
    taken = (acts["expert_indices", layer][0] == expert).any(-1)
    return Without(before, after, Effect.of(acts, edited), taken)


def expert_picture(
    model: nn.Module, prompt: str, layer: int, expert: int, way: str = DROP, *, note: str = ""
) -> "Picture":
    """Above: the next token's probabilities. Below: the loss of each token. Grey: the model as it is.

    Raises:
        ValueError: a prompt of fewer than two tokens, or too long; no such layer, expert or way.
    """
    from ..show import words
    from ..show.figures import EXPERTS, PALE, STREAM, _array, _figure, _name, _short

    inner, tokens = unwrapped(model), read(model, prompt, least=2)
    found, names = without(model, tokens, layer, expert, way), words(tokens, inner.tokenizer)
    s, share = len(names), int(found.taken.sum())
    change = f"change of the loss {found.effect.change:+.3f} nats a token"
    done = way.partition(":")[0]
    with _figure(10, 5.4, f"expert {expert} of layer {layer} ({done}): what hurts without it? {change}", note) as fig:
        above, below = fig.subplots(2, 1)
        ids = torch.maximum(found.before, found.after).topk(min(10, len(found.before))).indices
        at = torch.arange(len(ids)).numpy()
        above.bar(at - 0.2, _array(found.before[ids]), 0.4, color=PALE, label="the model as it is")
        above.bar(at + 0.2, _array(found.after[ids]), 0.4, color=EXPERTS, label=f"expert {expert}: {done}")
        above.set_xticks(at, [_short(word) for word in words(ids, inner.tokenizer)], family="monospace")
        above.set(title=f"the next token after “{names[-1]}”", xlabel="token", ylabel="probability")
        above.set_ylim(0, 1.1 * max(found.before.max(), found.after.max()).item())
        above.legend(loc="upper right")

        at = torch.arange(1, s).numpy()
        below.bar(at - 0.2, _array(found.effect.before[0]), 0.4, color=PALE)
        below.bar(at + 0.2, _array(found.effect.after[0]), 0.4, color=EXPERTS)
        took = _array(found.taken.nonzero().flatten())
        below.plot(took, [0.94] * len(took), "v", ms=6, color=STREAM, transform=below.get_xaxis_transform())
        _name(below.xaxis, names, most=60, rotation=90 if s > 12 else 0)
        below.tick_params(axis="x", length=0)
        below.set(title=f"the loss of each token, told by those before it; ▼: {share} of {s} tokens took the expert",
                  xlabel="token", ylabel="loss, nats", xlim=(-0.6, s - 0.4))  # fmt: skip
        below.set_ylim(0, 1.2 * max(found.effect.before.max(), found.effect.after.max()).item())
    return fig
