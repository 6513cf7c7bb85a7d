"""How does a head know distance? RoPE: the pairs of a query and a key, turned by their positions."""
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..hooks import record, unwrapped
from ..rope import rotate
from .panel import Explorer, Text, Whole, small
from .texts import check_layer, read

if TYPE_CHECKING:
    from ..show.picture import Picture

PROMPT = "Tom had a red ball"
REACH = 128  # distances that are drawn, and positions that the key can have
SHOWN = 5  # planes that are drawn


def rotation(
    model: nn.Module, prompt: str = PROMPT, *, layer: int | None = None, head: int | None = None, key: int = 0,
    distance: int = 1, live: bool | None = None, kept: Mapping[str, Sequence] | None = None, note: str = "",
) -> Explorer:  # fmt: skip
    """Drag a query away from its key, and see its pairs turn and their dot product change. Move both: nothing changes.

    The query is that of the prompt's last token, the key that of the token before; where they stand is up to you.

    Args:
        layer, head: None: the head that reads the token before most, found by running the model once.
        key: the key's position.
        distance: how far behind it the query stands.
        live: answer at every change; None: if the model is small.
        kept: the values of which a notebook that is run to be kept shows the pictures; None: some distances, the key
            at two positions.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: no such layer or head; a key or a distance that the context does not hold.
    """
    config = unwrapped(model).config
    if layer is None or head is None:
        layer, head = _best_at_the_token_before(model, prompt, layer, head)
    most = _reach(model) - 1
    controls = {"prompt": Text(prompt), "layer": Whole(layer, 0, config.n_layers - 1),
                "head": Whole(head, 0, config.n_heads - 1), "key": Whole(key, 0, most),
                "distance": Whole(distance, 0, most)}  # fmt: skip
    if kept is None:
        kept = {"key": [0, min(20, most)], "distance": [d for d in (0, 1, 2, 4, 8) if d <= most]}
    draw = partial(rotation_picture, model, note=note)
    return Explorer("rotation by position", draw, controls, live=small(model) if live is None else live, kept=kept)


def _reach(model: nn.Module) -> int:
    return max(1, min(REACH, unwrapped(model).config.n_ctx // 2))


@torch.no_grad()
def _best_at_the_token_before(model: nn.Module, prompt: str, layer: int | None, head: int | None) -> tuple[int, int]:
    config = unwrapped(model).config
    check_layer(model, layer or 0, head=head or 0)
    layers = range(config.n_layers) if layer is None else [layer]
    heads = range(config.n_heads) if head is None else [head]
    try:
        tokens = read(model, prompt, least=2)
    except ValueError:  # the explorer will say so
        return layers[0], heads[0]
    with record(model, *(("pattern", i) for i in layers)) as acts:
        model(tokens)
    before = lambda at: acts["pattern", at[0]][0, at[1]].diagonal(-1).float().mean().item()
    return max(((i, j) for i in layers for j in heads), key=before)


@torch.no_grad()
def pair(model: nn.Module, tokens: Tensor, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """The last token's query and the key of the token before, as yet unturned.   tokens [1 s] -> q [h], k [h], float64

    Raises:
        ValueError: no such layer or head; fewer than two tokens.
    """
    check_layer(model, layer, head=head)
    if tokens.shape[1] < 2:
        raise ValueError(f"the prompt has {tokens.shape[1]} tokens: a query and another token's key need 2")
    with record(model, ("q", layer), ("k", layer)) as acts:
        model(tokens)
    group = head // unwrapped(model).config.n_groups
    return acts["q", layer][0, -1, head].double().cpu(), acts["k", layer][0, -2, group].double().cpu()


def turned(model: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """x at each of these positions, as the model would turn it.   x [h], positions [n] -> [n h], float64"""
    rotary = unwrapped(model).rotary_emb
    angle = positions.double()[:, None] * rotary.frequencies.to(positions.device)
    cos, sin = angle.cos() * rotary.concentration, angle.sin() * rotary.concentration
    return rotate(x.double().expand(1, len(positions), 1, -1), cos, sin)[0, :, 0]


def rotation_picture(
    model: nn.Module, prompt: str, layer: int, head: int, key: int, distance: int, *, note: str = ""
) -> "Picture":
    """Above: directions of some pairs (i, i + h/2), pale as they are, strong as turned. Below: the score by distance.

    Raises:
        ValueError: a prompt of fewer than two tokens, or too long; no such layer or head; a key or a distance that is
            negative, or that is not drawn.
    """
    from matplotlib.patches import Circle

    from ..show import words
    from ..show.figures import ATTENTION, EXPERTS, PALE, STREAM, _array, _figure

    inner, tokens, reach = unwrapped(model), read(model, prompt, least=2), _reach(model)
    for name, value in (("key", key), ("distance", distance)):
        if not 0 <= value < reach:
            raise ValueError(f"{name} = {value}: must be from 0 to {reach - 1}")
    q, k = pair(model, tokens, layer, head)
    half, scale = len(q) // 2, len(q) ** -0.5
    at_q, at_k = turned(model, q, torch.tensor([key + distance]))[0], turned(model, k, torch.tensor([key]))[0]
    products = (at_q * at_k * scale).view(2, half).sum(0)  # of each plane
    distances = torch.arange(reach)
    curve = (turned(model, q, distances) * turned(model, k, torch.tensor([0])) * scale).sum(-1)
    [*_, name_k, name_q] = words(tokens, inner.tokenizer)
    title = (f"layer {layer}, head {head}: the query of “{name_q}” at {key + distance}, the key of “{name_k}” at "
             f"{key}: score {products.sum():.2f}")  # fmt: skip
    with _figure(10, 5.2, title, note) as fig:
        grid = fig.add_gridspec(2, SHOWN, height_ratios=[1.15, 1])
        planes = sorted({round(i * (half - 1) / (SHOWN - 1)) for i in range(SHOWN)})
        for n, i in enumerate(planes):
            ax = fig.add_subplot(grid[0, n])
            arrows = (q, ATTENTION, 0.25), (k, EXPERTS, 0.25), (at_q, ATTENTION, 1), (at_k, EXPERTS, 1)
            for x, colour, strength in arrows:
                one = torch.stack([x[i], x[i + half]])
                one = one / one.norm().clamp(min=1e-30)
                ax.annotate("", tuple(one.tolist()), (0, 0), arrowprops=dict(
                    arrowstyle="-|>", color=colour, alpha=strength, lw=2.5, shrinkA=0, shrinkB=0))  # fmt: skip
            turn = 2 * math.pi / inner.rotary_emb.frequencies[i].item()
            about = f"a turn in {turn:,.{0 if turn > 99 else 1}f} tokens\nadds {products[i] + 0.0:+.2f}"
            ax.add_patch(Circle((0, 0), 1, fill=False, color=PALE, lw=0.8))
            ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[], yticks=[],
                   title=f"dimensions {i} and {i + half}", xlabel=about)  # fmt: skip
            for edge in ax.spines.values():
                edge.set_visible(False)
        below = fig.add_subplot(grid[1, :])
        below.axhline(0, color=PALE, lw=0.8)
        name = f"all {half} planes, the key at 0"
        below.plot(_array(distances), _array(curve), ".-", color=STREAM, lw=1, ms=3, label=name)
        below.plot(distance, products.sum().item(), "o", ms=9, color=ATTENTION, label="as they stand now")
        below.set(xlabel="distance from the key to the query, tokens", ylabel="score, nats", xlim=(-1, reach))
        for colour, name in ((ATTENTION, "query"), (EXPERTS, "key"), (PALE, "pale: as yet unturned")):
            below.plot([], [], color=colour, lw=2.5, label=name)
        below.set_ylim(top=curve.max().item() + 0.3 * (curve.max() - curve.min()).item())
        below.legend(loc="upper right", ncols=5)
    return fig
