"""The page of all hook points, from the registry in gptoss_lab/hooks.py. A hook of MkDocs."""
import html
import re
from types import SimpleNamespace

import torch
from mkdocs.structure.files import File

from gptoss_lab import show
from gptoss_lab.config import published
from gptoss_lab.hooks import DEFAULT, POINTS, HookPoint, HookPoints, _bytes, kinds
from notebooks import raw  # beside this file: MkDocs looks there while it loads a hook

PLACES = {
    "": "Tokens and embedding",
    "rotary_emb": "Rotary tables",
    "blocks.{l}": "The residual stream",
    "blocks.{l}.ln1": "The norm before attention",
    "blocks.{l}.attn": "Attention",
    "blocks.{l}.ln2": "The norm before the experts",
    "blocks.{l}.mlp": "The router and its experts",
    "ln_final": "The last norm",
    "unembed": "Logits",
}
INTRO = """# Hook points

Every value inside the model that has a name. `lab.record` reads them and `lab.edit` replaces them;
[Hooks](../api/hooks.md) has both. `{{l}}` stands for the number of a layer. `gptoss-lab hooks` prints this list,
and `model.hook_points` shows it in a notebook.

Shapes: **b** batch, **s** position, **t** keys, **d** d_model, **H** heads, **K** kv heads, **h** d_head, **E**
experts, **k** experts per token, **f** d_ff, **V** vocabulary, **p** half of d_head.

Names that mean the same point, with `blocks.3.attn.hook_q` as the example: without `hook_`, `blocks.3.attn.q`; as a
pair, `("q", 3)`, with `("q", -1)` for the last layer; a glob such as `*.hook_q` means all that fit. Scale,
normalized and out need their norm as well: `("scale", 3, "ln1")`. The tables give two kinds more: *also*, names of
TransformerLens 4 and short ones, and the *Hugging Face* module whose output the value is.

A **derived** point can be read and not edited: it is a reading of values that are points themselves. Types are the
model's, except where a table says float32 or int64; the residual stream of a float16 model is float32, and its norms.

*Cost* is what recording keeps for one token and one layer of gpt-oss-20b in bfloat16; `keys` is the number of keys.
[`lab.cost`][gptoss_lab.hooks.cost] says it for your model. No names means the cheap group {default}: {total} a
token in all.
"""


def size(n: float) -> str:
    return f"{n:,.0f} B" if n < 1024 else f"{n / 1024:,.1f} KiB" if n < 1024**2 else f"{n / 1024**2:,.1f} MiB"


def bytes_a_token(point: HookPoint, config) -> int:
    """What a record keeps for one token; for values with a row of keys, for each of them."""
    model = SimpleNamespace(config=config, dtype=torch.bfloat16)
    return _bytes(model, kinds([point]), batch=1, pos=1, keys=1)


def anchor(point: HookPoint) -> str:
    """blocks.{l}.attn.hook_q -> attn.hook_q"""
    return point.name.removeprefix("blocks.{l}.")


def plain(text: str) -> str:
    """Text that Markdown leaves as it is, in a cell of a table."""
    return re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", html.escape(text))


def row(point: HookPoint, config) -> str:
    cost = size(bytes_a_token(point, config)) + (" × keys" if point.axis("t") is not None else "")
    what = plain(point.what)
    if not point.writable:
        what += ", **derived**"
    if point.dtype not in ("model", "stream"):
        what += f", {point.dtype}"
    hf = [alias for alias in point.aliases if re.match(r"model\.|lm_head", alias)]
    for label, names in ("Also", [alias for alias in point.aliases if alias not in hf]), ("Hugging Face", hf):
        if names:
            what += f"<br><small>{label}: {', '.join(f'`{name}`' for name in names)}</small>"
    return f"| `{point.name}`{{ #{anchor(point)} }} | `[{point.shape}]` | {what} | {cost.replace(' ', '&nbsp;')} |"


def page() -> str:
    config = published("gpt-oss-20b")
    cheap = HookPoints(config.n_layers).resolve()
    total = size(sum(bytes_a_token(p, config) for p in cheap))
    parts = [INTRO.format(default=", ".join(f"`{glob}`" for glob in DEFAULT), total=total)]
    parts.append(raw(show.ModelView.of(config, title="the points in reading order: choose a box")._repr_html_()))
    for place in dict.fromkeys(p.place[0] for p in POINTS):
        parts.append(f"## {PLACES.get(place, place)}")
        rows = [row(p, config) for p in POINTS if p.place[0] == place]
        head = "| name | shape | what | cost |\n|---|---|---|---:|"
        parts.append("\n".join([head, *rows]))
    return "\n\n".join(parts) + "\n"


def on_files(files, config):
    files.append(File.generated(config, "reference/hook-points.md", content=page()))
    return files
