"""Which experts work on a token, layer by layer, and which other tokens go the same way."""
import html
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .view import View, chip, noted, packed, texts

if TYPE_CHECKING:
    from ..hooks import Activations
    from ..probes.router import Routing

STILL = 40  # layers of the still


class RiverView(View):
    """Point at a token to see its experts in every layer, as large as their weights.

    Bands from layer to layer are as wide as the product of two weights: they guide the eye, they were not measured.
    Experts of one number in two layers have nothing to do with each other. The other tokens are coloured by the share
    of its experts that they take too. Click, Enter or the space bar keeps a token to compare others with; Escape lets
    it go.

    Args:
        experts, weights: [L s k], the experts that each token takes and what their outputs are multiplied by.
        words: s names, one a position.
        n_experts: E.
        layers: numbers of the L layers; None counts from 0.
        title: what to look for.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: nothing to show, shapes that do not fit, an expert beyond E or taken twice, weights that are not
            finite, or a view of more than 150 kB.
    """

    kind = "river"

    def __init__(
        self, experts: Tensor, weights: Tensor, words: Sequence[str], *, n_experts: int,
        layers: Sequence[int] | None = None, title: str = "which experts work on each token, layer by layer",
        note: str = "",
    ):  # fmt: skip
        self.words, self.title, self.n_experts = texts(words, "words"), noted(title, note), operator.index(n_experts)
        self.layers = [operator.index(layer) for layer in (range(len(experts)) if layers is None else layers)]
        shape = tuple(experts.shape)
        if shape != tuple(weights.shape) or shape[:-1] != (len(self.layers), len(self.words)) or 0 in shape:
            raise ValueError(f"experts {shape}, weights {tuple(weights.shape)}, {len(self.words)} words and "
                             f"{len(self.layers)} layers do not fit together: they must be [L s k] twice, s and L, "
                             "none of them 0")  # fmt: skip
        self.weights, self.experts = weights.detach().float().cpu().numpy(), experts.detach().cpu().numpy()
        if not np.isfinite(self.weights).all():
            raise ValueError("weights hold NaN or infinity: the model's values there are not numbers")
        if self.experts.dtype.kind not in "iu" or not 0 <= self.experts.min() <= self.experts.max() < n_experts:
            raise ValueError(f"experts are {experts.dtype} from {experts.min()} to {experts.max()}: they must be whole "
                             f"numbers from 0 to {n_experts - 1}")  # fmt: skip
        if (np.diff(np.sort(self.experts), axis=-1) == 0).any():
            raise ValueError("a token takes the same expert twice: each of its k must be another one")
        self._fits("layers or tokens")

    @classmethod
    def of(cls, routing: "Routing", words: Sequence[str], *, layers: Sequence[int] | None = None, row: int = 0,
           note: str = "") -> "RiverView":  # fmt: skip
        """One row of a Routing, without the positions that are padding. `words` names all of its positions.

        Raises:
            ValueError: besides the above, a layer that was not recorded or a row that does not exist.
        """
        layers = routing.layers if layers is None else list(layers)
        if wrong := [layer for layer in layers if layer not in routing.layers]:
            raise ValueError(f"layer {wrong[0]} is not among those recorded: {', '.join(map(str, routing.layers))}")
        rows, s = routing.valid.shape
        if not 0 <= row < rows:
            raise ValueError(f"row {row} does not exist: there are {rows}, from 0")
        if len(words) != s:
            raise ValueError(f"{len(words)} words for {s} positions: give one for each, padding too")
        at, kept = [routing.layers.index(layer) for layer in layers], routing.valid[row].cpu()
        experts, weights = (x[at, row].cpu()[:, kept] for x in (routing.experts, routing.weights))
        words = [word for word, keep in zip(words, kept.tolist()) if keep]
        return cls(experts, weights, words, n_experts=routing.n_experts, layers=layers, note=note)

    @classmethod
    def recorded(cls, acts: "Activations", words: Sequence[str], *, layers: Sequence[int] | None = None, row: int = 0,
                 note: str = "") -> "RiverView":  # fmt: skip
        """One row of a recording that holds `router_logits`, `expert_indices` and `expert_weights`; as `of`."""
        from ..probes.router import Routing

        return cls.of(Routing.of(acts), words, layers=layers, row=row, note=note)

    def __repr__(self) -> str:
        return f"RiverView of {self.title}: layers {self.layers}, {len(self.words)} tokens, {self.n_experts} experts"

    def _data(self) -> dict:
        experts = self.experts.astype(np.uint8 if self.n_experts <= 256 else np.uint16)
        return {"words": self.words, "layers": self.layers, "n": self.n_experts, "k": experts.shape[2],
                "experts": packed(experts), "weights": packed(self.weights)}  # fmt: skip

    def _still(self) -> str:
        """The way of the last token, its strongest expert first."""
        word, step = html.escape(self.words[-1]), -(-len(self.layers) // STILL)
        rows = []
        for i in range(0, len(self.layers), step):
            experts, weights = torch.as_tensor(self.experts[i, -1]), torch.as_tensor(self.weights[i, -1])
            cells = [chip(f"{experts[j]}: {weights[j]:.2f}", weights[j].clamp(-1, 1).item(), "td")
                     for j in weights.argsort(descending=True, stable=True)]  # fmt: skip
            rows.append(f'<tr><th scope="row">layer {self.layers[i]}</th>{"".join(cells)}</tr>')
        return (f"<p><b>{html.escape(self.title)}</b>: the experts of the last token, “{word}”, and their weights. In "
                f"a trusted notebook all tokens can be chosen.</p><table>{''.join(rows)}</table>")  # fmt: skip
