"""An attention pattern to look around in: choose a layer and a head, point at a token, see what it reads."""
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .view import View, chip, noted, packed

if TYPE_CHECKING:
    from ..hooks import Activations

MOST = 4_000_000  # values, one byte each; base64 makes 4/3 of it


class PatternView(View):
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

    kind = "pattern"

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
        cls, acts: "Activations", words: Sequence[str], *, layers: Sequence[int], title: str = "attention pattern",
        note: str = "",
    ) -> "PatternView":  # fmt: skip
        """The first row of a recording that holds `pattern` and `sink_mass` of these layers."""
        pattern = torch.stack([acts["pattern", layer][0] for layer in layers])
        sink = torch.stack([acts["sink_mass", layer][0] for layer in layers])
        return cls(pattern, sink, words, layers=layers, title=noted(title, note))

    def __repr__(self) -> str:
        return f"PatternView of {self.title}: layers {self.layers}, {len(self.words)} tokens"

    def _data(self) -> dict:
        values = (self.values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return {"words": self.words, "layers": self.layers, "heads": self.values.shape[1], "values": packed(values)}

    def _still(self) -> str:
        """What the last token reads in the first layer's first head."""
        cells = [f"{chip(name, p**0.5)}&nbsp;<small>{p:.2f}</small>" for name, p in
                 zip(["sink", *self.words], self.values[0, 0, -1].tolist(), strict=True)]  # fmt: skip
        return (f"<p><b>{html.escape(self.title)}</b>: what the last token reads in layer {self.layers[0]}, head 0. In "
                f"a trusted notebook all can be chosen.</p><p>{' '.join(cells)}</p>")  # fmt: skip
