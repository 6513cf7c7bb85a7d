"""A map of the model in reading order: click a box, see its hook point and, where it was recorded, its tensor."""
import html
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..hooks import POINTS, Activations, HookPoint, HookPoints, Names, unwrapped, widths
from .figures import words as named
from .view import View, chip, noted, packed, texts

if TYPE_CHECKING:
    import tiktoken

    from ..model import GptOss

STEPS = 127  # of each sign, in which a value is kept
HIDDEN = -128  # stands for -inf
LOGITS = 48  # columns that are kept of the vocabulary's
LETTERS = {"b": "batch", "s": "positions", "t": "keys", "d": "d_model", "H": "heads", "K": "key heads", "h": "d_head",
           "E": "experts", "k": "slots of chosen experts", "f": "d_ff", "V": "vocabulary", "p": "planes",
           "1": "one number"}  # fmt: skip
# Where a row of boxes begins, and what its step does. The points themselves, and their order, are the registry's.
ROWS = {"tokens": "look up", "rotary_emb.cos": "angles", "ln1.scale": "normalise", "attn.q": "project",
        "attn.rot_q": "turn by position", "attn.sink_scores": "compare", "attn.pattern": "softmax",
        "attn.z": "read values", "attn.result": "write, by head", "ln2.scale": "normalise",
        "mlp.router_logits": "score experts", "mlp.expert_indices": "choose", "mlp.pre": "gate, linear",
        "mlp.pre_clamped": "clamp", "mlp.post": "SwiGLU", "mlp.expert_out": "project back",
        "ln_final.scale": "normalise", "unembed.out": "unembed"}  # fmt: skip
# What a value is computed from, weights aside. The tests run the model to see that it is from these and no others.
MADE_FROM = {
    "embed": "tokens", "resid_pre": "embed", "ln1.scale": "resid_pre", "ln1.normalized": "resid_pre ln1.scale",
    "ln1.out": "ln1.normalized", "attn.q": "ln1.out", "attn.k": "ln1.out", "attn.v": "ln1.out",
    "attn.rot_q": "attn.q rotary_emb.cos rotary_emb.sin", "attn.rot_k": "attn.k rotary_emb.cos rotary_emb.sin",
    "attn.attn_scores": "attn.rot_q attn.rot_k", "attn.pattern": "attn.attn_scores attn.sink_scores",
    "attn.sink_mass": "attn.attn_scores attn.sink_scores", "attn.z": "attn.pattern attn.v", "attn.result": "attn.z",
    "attn_out": "attn.result", "resid_mid": "resid_pre attn_out", "ln2.scale": "resid_mid",
    "ln2.normalized": "resid_mid ln2.scale", "ln2.out": "ln2.normalized", "mlp.router_logits": "ln2.out",
    "mlp.expert_indices": "mlp.router_logits", "mlp.expert_weights": "mlp.router_logits mlp.expert_indices",
    "mlp.pre": "ln2.out mlp.expert_indices", "mlp.pre_linear": "ln2.out mlp.expert_indices",
    "mlp.pre_clamped": "mlp.pre", "mlp.pre_linear_clamped": "mlp.pre_linear",
    "mlp.post": "mlp.pre_clamped mlp.pre_linear_clamped", "mlp.expert_out": "mlp.post mlp.expert_indices",
    "mlp_out": "mlp.expert_weights mlp.expert_out", "resid_post": "resid_mid mlp_out",
    "ln_final.scale": "resid_post", "ln_final.normalized": "resid_post ln_final.scale",
    "ln_final.out": "ln_final.normalized", "unembed.out": "ln_final.out",
}  # fmt: skip
# An edit to try: zeros, except where a zero would be no number, or no change worth seeing.
EDITS = {"scale": "2 * x", "attn_scores": "2 * x", "sink_scores": 'x - float("inf")',
         "expert_indices": "x.roll(1, dims=1)"}  # fmt: skip


class ModelView(View):
    """The model as a map of boxes in reading order, each of them a hook point.

    A chosen box shows its full name, shape, formula, what it is made from, and the lines that record and edit it.
    Where it was recorded, its values too: as a heat map of which the mouse or the arrow keys read single numbers. The
    stripe in a box is the chosen token's values. Make one with `recorded`, or with `of` for the hook points alone.

    Values are kept in 127 steps of each sign, even on a square-root scale and up to the largest of their tensor: a
    number that is read is rounded, and says how much. Whole numbers are kept exactly.

    Args:
        n_layers: of the model.
        sizes: what is known of the letters in the registry's shapes.
        dtype: the model's.
        layers: those that can be chosen.
        values: name of a hook point -> [S m c], what is recorded of it: S positions, m heads or slots, c columns.
        words: names of the S positions.
        positions: their numbers.
        keys: names of the t keys.
        ids, names: which tokens the logits' columns stand for, and how they are written.
        start: the hook point that is shown first; by default the attention pattern of the first layer.
        title, note: heading of the view; the note says whose values they are.

    Raises:
        ValueError: values that are NaN or +inf, or a view of more than 150 kB.
    """

    kind = "model"

    def __init__(
        self, n_layers: int, sizes: dict[str, int], dtype: torch.dtype, *, layers: Sequence[int],
        values: dict[str, np.ndarray] | None = None, words: Sequence[str] = (), positions: Sequence[int] = (),
        keys: Sequence[str] = (), ids: Sequence[int] = (), names: Sequence[str] = (), start: str | tuple = "",
        title: str = "", note: str = "",
    ):  # fmt: skip
        self.title, self.n_layers, self.sizes, self.widths = noted(title, note), n_layers, sizes, widths(dtype)
        self.layers, self.positions, self.ids = list(layers), list(positions), list(ids)
        self.words, self.keys, self.names = (texts(x, "words") for x in (words, keys, names))
        self.values = values or {}
        self.start = HookPoints(n_layers)[start or ("pattern", self.layers[0])]
        if self.start.layer() not in (None, *self.layers):
            raise ValueError(f"start is {self.start.name}: that layer is not among those shown, {self.layers}")
        self.kept = {name: _kept(name, x) for name, x in self.values.items()}
        first = {}  # what is equal, as the embedding and the stream of layer 0, is kept once
        for name, row in self.kept.items():
            if (same := first.setdefault(row["data"] + str(row.get("limit")), name)) != name:
                self.kept[name] = same
        self._fits("layers, positions or points")

    @classmethod
    def of(cls, model: "GptOss | Config", *, title: str = "the hook points in reading order: choose a box",
           note: str = "") -> "ModelView":  # fmt: skip
        """The hook points alone, of a model or of a config.

        Raises:
            TypeError: it is neither.
        """
        c = model if isinstance(model, Config) else getattr(unwrapped(model), "config", None)
        if not isinstance(c, Config):
            raise TypeError(f"model must be a GptOss or a Config, got {type(model).__name__}")
        sizes = {"1": 1, "d": c.d_model, "H": c.n_heads, "K": c.n_kv_heads, "h": c.d_head, "E": c.n_experts,
                 "f": c.d_ff, "k": c.experts_per_token, "V": c.d_vocab, "p": c.d_head // 2}  # fmt: skip
        dtype = torch.bfloat16 if model is c else unwrapped(model).dtype  # the published models'
        return cls(c.n_layers, sizes, dtype, layers=range(c.n_layers), title=title, note=note)

    @classmethod
    def recorded(
        cls, acts: Activations, words: Sequence[str], *, layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None, points: Names = "*", row: int = 0,
        tokenizer: "tiktoken.Encoding | None" = None, start: str | tuple = "",
        title: str = "the model in reading order: choose a box", note: str = "",
    ) -> "ModelView":  # fmt: skip
        """One row of a recording. What was not recorded, or is not asked for, has its box without values.

        Args:
            acts: what `record` or `run_with_cache(tokens, "*")` gives.
            words: names of all recorded positions.
            layers: those that can be chosen; by default all in which something was recorded.
            positions: whose values are kept; negative ones count from the end. All by default.
            points: whose values are kept, as `record` takes them.
            row: of the batch.
            tokenizer: names the columns of the logits, of which the 48 largest are kept.
            start: the hook point that is shown first, as ("pattern", 3).

        Raises:
            ValueError: besides the above, nothing recorded, words that do not fit, or a layer, position or row that
                does not exist or is given twice.
            KeyError: `points` or `start` matches nothing.
        """
        if not isinstance(acts, Activations) or not len(acts):
            what = f"got {type(acts).__name__}" if not isinstance(acts, Activations) else "which holds nothing yet"
            raise ValueError(f'acts must be what record or run_with_cache(tokens, "*") gives, {what}')
        of, sizes, dtype = acts.points, {"1": 1}, torch.float32
        for name, x in acts.items():
            sizes |= zip(reversed(of[name].shape.split()), reversed(x.shape))
            dtype = x.dtype if of[name].dtype in ("model", "stream") and dtype != torch.float16 else dtype
        seen = sorted({of[name].layer() for name in acts} - {None})
        layers = _some("layer", layers, range(of.n_layers), seen)
        if seen and (wrong := set(layers) - set(seen)):
            raise ValueError(f"layer {min(wrong)} is not among those recorded: {', '.join(map(str, seen))}")
        positions = _some("position", positions, range(sizes["s"]), range(sizes["s"]))
        [row] = _some("row", [row], range(sizes.get("b", 1)), [])
        if len(words := texts(words, "words")) != sizes["s"]:
            raise ValueError(f"{len(words)} words for {sizes['s']} recorded positions: give one for each")
        values, ids = {}, []
        for point in of.resolve(points):
            if point.name in acts and point.layer() in (None, *layers):
                x = _arranged(point, acts[point.name], row)[positions]
                if point.shape.endswith("V"):
                    ids = x.amax(dim=(0, 1)).topk(min(LOGITS, x.shape[-1])).indices
                    ids = ids[x[-1, 0, ids].argsort(descending=True, stable=True)]
                    x, ids = x[..., ids], ids.tolist()
                values[point.name] = x.numpy()
        return cls(of.n_layers, sizes, dtype, layers=layers, values=values, words=[words[i] for i in positions],
                   positions=positions, keys=words if sizes.get("t") == len(words) else [], ids=ids,
                   names=named(ids, tokenizer), start=start, title=title, note=note)  # fmt: skip

    def __repr__(self) -> str:
        what = f"{len(self.words)} tokens" if self.values else "hook points alone"
        return f"ModelView of {self.title}: layers {self.layers}, {what}"

    def _data(self) -> dict:
        layer = self.start.layer()
        place = [POINTS.index(next(p for p in POINTS if p.name.replace("{l}", str(layer)) == self.start.name)),
                 0 if layer is None else self.layers.index(layer)]  # fmt: skip
        return {"start": place, "layers": self.layers, "of": self.n_layers, "points": self._points(),
                "words": self.words, "positions": self.positions, "keys": self.keys, "ids": self.ids,
                "names": self.names, "letters": LETTERS, "sizes": self.sizes, "values": self.kept}  # fmt: skip

    def _points(self) -> list[dict]:
        shorts = [_short(p) for p in POINTS]
        at = lambda names: [shorts.index(name) for name in names.split()]
        rows, one = [], HookPoints(1)
        for p, short in zip(POINTS, shorts):
            leaf, layered = p.place[1], "{l}" in p.name
            part = short.split(".")[0] if "." in short else ""
            panel = {"ln1": "attention", "attn": "attention", "ln2": "experts", "mlp": "experts"}.get(part)
            panel = panel or ("stream" if layered else "in" if not any("{l}" in r["name"] for r in rows) else "out")
            alone = (leaf, 0) in one  # ln1 and ln2 both have an out
            key = ", ".join([f'"{leaf}"', "{l}", *([] if alone else [f'"{part}"'])]) if layered else f'"{p.name}"'
            rows.append({
                "name": p.name, "panel": panel, "row": ROWS.get(short, ""), "shape": p.shape, "what": p.what,
                "also": list(p.aliases), "key": key, "edit": EDITS.get(leaf, "0 * x") if p.writable else "",
                "from": at(MADE_FROM.get(short, "")), "cost": self._cost(p),
            })  # fmt: skip
        return rows

    def _cost(self, p: HookPoint) -> str:
        letters = [x for x in p.shape.split() if x not in "bst"]
        if any(x not in self.sizes for x in letters):
            return ""
        size = self.widths[p.dtype] * math.prod(self.sizes[x] for x in letters)
        return f"{size:,} bytes a position" + " and key" * ("t" in p.shape.split())

    def _still(self) -> str:
        """All points in reading order; those of attention are blue, those of the experts vermilion."""
        share = {"attention": 0.3, "experts": -0.3}
        head = "".join(f'<th scope="col">{name}</th>' for name in ("hook point", "shape", "what it is"))
        body = "".join(
            f"<tr>{chip(p['name'], share.get(p['panel'], math.nan), 'td')}<td>{html.escape(p['shape'])}</td>"
            f"<td>{html.escape(p['what'])}{'' if p['edit'] else ' (derived)'}</td></tr>"
            for p in self._points())  # fmt: skip
        return (f"<p><b>{html.escape(self.title)}</b>: the hook points of the model; blue is attention, vermilion the "
                "experts. In a trusted notebook each can be chosen.</p>"
                f"<table><tr>{head}</tr>{body}</table>")  # fmt: skip


def _short(p: HookPoint) -> str:
    """`attn.q` for blocks.{l}.attn.hook_q."""
    return ".".join(filter(None, p.place)).removeprefix("blocks.{l}.")


def _some(what: str, given: Sequence[int] | None, all_: range, default: Sequence[int]) -> list[int]:
    """The numbers that are asked for, checked; negative ones count from the end."""
    if given is None:
        return list(default or all_)
    given = [operator.index(i) for i in given]
    if wrong := [i for i in given if not -len(all_) <= i < len(all_)]:
        raise ValueError(f"{what} {wrong[0]} does not exist: there are {len(all_)}, from 0")
    found = [i % len(all_) for i in given]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{what}s {given}: give one or more, each of them once")
    return found


def _arranged(point: HookPoint, x: Tensor, row: int) -> Tensor:
    """One row of a recorded value as [s m c]: position, head or slot where there is one, column."""
    letters = point.shape.split()
    if x.dim() > len(letters):  # rope tables of which each row has its own
        letters = ["b", *letters]
    x = x.detach().cpu()
    x = x.double() if x.is_floating_point() else x
    if letters[0] == "b":
        x, letters = x[row], letters[1:]
    x = x.movedim(letters.index("s"), 0)
    return x.reshape(x.shape[0], 1, -1) if x.dim() < 3 else x


def _kept(name: str, x: np.ndarray) -> dict:
    """[S m c] in bytes: whole numbers as they are, others as sign(x) sqrt(|x| / limit) in STEPS."""
    if x.dtype.kind in "iu":
        return {"m": x.shape[1], "c": x.shape[2], "exact": True, "data": packed(x.astype(np.uint32))}
    if not (np.isfinite(x) | (x == -np.inf)).all():
        raise ValueError(f"{name} holds NaN or +inf: the model's values there are not numbers")
    hidden = np.isneginf(x)
    size = np.where(hidden, 0, np.abs(x))
    limit = float(f"{size.max():.6g}") or 1.0
    level = np.where(hidden, HIDDEN, np.rint(np.sign(x) * np.sqrt(size / limit) * STEPS))
    return {"m": x.shape[1], "c": x.shape[2], "limit": limit, "data": packed(level.astype(np.int8))}
