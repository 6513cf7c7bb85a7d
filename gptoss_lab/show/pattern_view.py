"""An attention pattern to look around in: one piece of HTML that needs no kernel, no network and no library.

It lives in JupyterLab, in a page made by nbconvert, in any HTML page. Where scripts are taken out, as in a
notebook that is not trusted, a still picture of one query stands in its place.
"""
import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..hooks import Activations

MOST = 4_000_000  # values, one byte each; base64 makes 4/3 of it
PAGE = """\
<div id="{id}" role="group" aria-label="{title}"><div data-view>{still}</div>
<script data-for="{id}">(() => {{
const ID = "{id}", D = {data};
{script}}})();</script></div>"""


class PatternView:
    """Point at a token to see what it reads in a layer and head: its keys, and the sink.

    The keyboard works too: Tab reaches the menus and the tokens, the arrow keys walk along them.
    Probabilities are kept to 1/255. The same input gives the same HTML, byte by byte.

    Args:
        pattern: [L H s s], the rows of `hook_pattern`.
        sink: [L H s], `hook_sink_mass`.
        words: s names, one a position.
        layers: numbers of the L layers; None counts from 0.
        title: heading of the view.

    Raises:
        ValueError: the shapes do not fit together, or there are more than MOST values.
    """

    def __init__(self, pattern: Tensor, sink: Tensor, words: Sequence[str], *,
                 layers: Sequence[int] | None = None, title: str = "attention pattern"):  # fmt: skip
        self.words, self.title, s = list(words), title, len(words)
        self.layers = list(range(len(pattern)) if layers is None else layers)
        fit = sink.dim() == 3 and sink.shape[2] == s and len(sink) == len(self.layers)
        if not fit or pattern.shape != (*sink.shape, s):
            raise ValueError(f"pattern {tuple(pattern.shape)}, sink {tuple(sink.shape)}, {s} words and "
                             f"{len(self.layers)} layers do not fit together: they must be [L H s s], "
                             "[L H s], s and L")  # fmt: skip
        self.values = torch.cat([sink[..., None], pattern], dim=-1).detach().float().cpu()
        if self.values.numel() > MOST:
            shape = " x ".join(map(str, self.values.shape))
            raise ValueError(f"{shape} (layers, heads, queries, keys and sink) are {self.values.numel():,} "
                             f"values, a view holds {MOST:,}: give fewer layers or positions")  # fmt: skip

    @classmethod
    def recorded(
        cls, acts: "Activations", words: Sequence[str], *, layers: Sequence[int], note: str = ""
    ) -> "PatternView":
        """The first row of a recording that holds `pattern` and `sink_mass` of these layers."""
        pattern = torch.stack([acts["pattern", layer][0] for layer in layers])
        sink = torch.stack([acts["sink_mass", layer][0] for layer in layers])
        title = f"attention pattern ({note})" if note else "attention pattern"
        return cls(pattern, sink, words, layers=layers, title=title)

    def __repr__(self) -> str:
        return f"PatternView of {self.title}: layers {self.layers}, {len(self.words)} tokens"

    def _repr_html_(self) -> str:
        values = (self.values.clamp(0, 1) * 255).round().to(torch.uint8).numpy().tobytes()
        css, script = (Path(__file__).with_suffix(end).read_text("utf-8") for end in (".css", ".js"))
        data = {"title": self.title, "words": self.words, "layers": self.layers, "css": css,
                "heads": self.values.shape[1], "values": base64.b64encode(values).decode()}  # fmt: skip
        data = json.dumps(data).replace("<", "\\u003c")  # a token may spell </script>
        ident = "pattern-" + hashlib.sha256((data + script).encode()).hexdigest()[:12]
        title = html.escape(self.title)
        return PAGE.format(id=ident, title=title, still=self._still(title), data=data, script=script)

    def _still(self, title: str) -> str:
        """What the last token reads in the first layer's first head."""
        cells = []
        for name, p in zip(["sink", *self.words], self.values[0, 0, -1].tolist(), strict=True):
            ink, text = p**0.5, "white" if p > 0.36 else "inherit"
            style = f"background: rgba(0, 114, 178, {ink:.2f}); color: {text}"
            cells.append(f'<span style="{style}">{html.escape(name)}</span>&nbsp;<small>{p:.2f}</small>')
        return (f"<p><b>{title}</b>: what the last token reads in layer {self.layers[0]}, head 0. In a "
                f"trusted notebook all can be chosen.</p><p>{' '.join(cells)}</p>")  # fmt: skip
