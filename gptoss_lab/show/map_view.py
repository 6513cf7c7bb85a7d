"""A matrix of colours to walk around in: patching's heat map, the logit lens's table with a word in each cell."""
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .view import Numbers, View, chip, noted, packed, texts

if TYPE_CHECKING:
    import tiktoken

    from ..probes.lens import LogitLens
    from ..probes.patching import Patching

STILL = 400  # cells of the still


class MapView(View):
    """Point at a cell, or reach it by Tab and the arrow keys, to read its row, its column and its numbers.

    Args:
        values: [R C], or a dict of several such maps by name, to switch between.
        rows, columns: R and C names.
        title: what to look for.
        unit: of the numbers, or a dict by name.
        down, across: what the rows and the columns are.
        cells: R lists of C words, which stand in the cells, or of C lists of k words, the first of which does.
        shares: [R C k], the probabilities of those k words; a cell tells them all.
        signed: colours go both ways from 0; by default where a value is negative.
        root: a square-root scale of colours, for probabilities; or a dict by name.
        limit: the value of the full colour, by default each map's largest size; or a dict by name.
        gaps: NaN is a cell without a number; otherwise it is an error.
        note: ends the title and says whose values they are.

    Raises:
        ValueError: no cells, shapes that do not fit, values that are not finite, or a view of more than 150 kB.
    """

    kind = "map"

    def __init__(
        self, values: Tensor | Mapping[str, Tensor], rows: Sequence[str], columns: Sequence[str], *, title: str,
        unit: str | Mapping[str, str] = "", down: str = "", across: str = "",
        cells: Sequence[Sequence[str | Sequence[str]]] | None = None, shares: Tensor | None = None,
        signed: bool | None = None, root: bool | Mapping[str, bool] = False,
        limit: float | Mapping[str, float] | None = None, gaps: bool = False, note: str = "",
    ):  # fmt: skip
        self.rows, self.columns, self.title = texts(rows, "rows"), texts(columns, "columns"), noted(title, note)
        self.down, self.across = texts([down, across], "down and across")
        shape = [len(self.rows), len(self.columns)]
        if 0 in shape:
            raise ValueError(f"{shape[0]} rows and {shape[1]} columns: a map needs one of each or more")
        self.numbers = Numbers(values, shape, unit=unit, limit=limit, root=root, signed=signed, gaps=gaps)
        self.cells = self.shares = None
        if cells is not None:
            self.cells = [[texts([cell] if isinstance(cell, str) else cell, "cells") for cell in row] for row in cells]
            sizes = {len(cell) for row in self.cells for cell in row}
            if [len(row) for row in self.cells] != [shape[1]] * shape[0] or len(sizes) != 1 or 0 in sizes:
                raise ValueError(f"cells must be {shape[0]} lists of {shape[1]} words, or lists of words of one length")
            shape.append(sizes.pop())
        if shares is not None:
            if len(shape) == 2:
                raise ValueError("shares are the probabilities of the words in cells: give cells too")
            self.shares = Numbers({"shares": shares}, shape).arrays["shares"]
        self._fits("rows, columns, maps or words a cell")

    @classmethod
    def of_patching(cls, result: "Patching", words: Sequence[str], *, note: str = "") -> "MapView":
        """Sites by positions; `words` names those of the whole text."""
        sites = [site.removeprefix("blocks.").replace("hook_", "") for site in result.sites]
        title = "patched in: 0 leaves the answer, 1 turns it whole"
        return cls({"effect": result.mean}, sites, result.named(words), title=title, down="site", across="position",
                   signed=True, limit=1, note=note)  # fmt: skip

    @classmethod
    def of_lens(
        cls, lens: "LogitLens", tokens: Tensor, tokenizer: "tiktoken.Encoding | None", *, row: int = 0,
        readings: Sequence[int] | None = None, positions: Sequence[int] | None = None, top: int = 3, note: str = "",
    ) -> "MapView":  # fmt: skip
        """Readings by positions, the likeliest token in each cell; maps of its probability, the target's, entropy, KL.

        Args:
            tokens: [b s], those that were run.
            row: of the batch.
            readings, positions: which to show; all by default.
            top: tokens that a cell tells.

        Raises:
            ValueError: besides the above, a row, reading, position or `top` that the lens does not hold.
        """
        from .figures import words

        n, b, s, k = lens.top_prob.shape
        if tuple(tokens.shape) != (b, s):
            raise ValueError(f"tokens are {tuple(tokens.shape)}, the lens read {(b, s)}")
        readings = list(range(n) if readings is None else readings)
        positions = list(range(s) if positions is None else positions)
        asked = ("row", [row], b), ("reading", readings, n), ("position", positions, s), ("top", [top - 1], k)
        for name, given, size in asked:
            if wrong := [i for i in given if not 0 <= i < size]:
                raise ValueError(f"{name} {wrong[0] + (name == 'top')} does not exist: there are {size}")
        at = lambda x: x[readings][:, row][:, positions].cpu()
        ids, label = at(lens.top_ids)[..., :top], lens.labels
        cells = [[words(cell, tokenizer) for cell in line] for line in ids]
        maps = {"probability of the likeliest token": at(lens.top_prob)[..., 0],
                "probability of the target": at(lens.target_prob), "entropy": at(lens.entropy),
                "KL from the output": at(lens.kl).clamp(min=0)}  # fmt: skip  (rounding leaves -1e-9)
        likely = dict.fromkeys(list(maps)[:2], True)
        return cls(maps, [label[i] for i in readings], words(tokens[row, positions], tokenizer), cells=cells,
                   shares=at(lens.top_prob)[..., :top], root=likely, limit=dict.fromkeys(likely, 1),
                   unit={"entropy": "nats", "KL from the output": "nats"}, gaps=True, down="read after",
                   across="token", title="the likeliest next token, layer by layer: where does the answer appear?",
                   note=note)  # fmt: skip

    def __repr__(self) -> str:
        maps = ", ".join(filter(None, self.numbers.arrays)) or "one map"
        return f"MapView of {self.title}: {len(self.rows)} rows, {len(self.columns)} columns, {maps}"

    def _data(self) -> dict:
        data = {"rows": self.rows, "columns": self.columns, "down": self.down, "across": self.across,
                "maps": self.numbers.data()}  # fmt: skip
        if self.cells:
            flat = [word for row in self.cells for cell in row for word in cell]
            number = {word: i for i, word in enumerate(dict.fromkeys(flat))}
            data |= {"words": list(number), "k": len(self.cells[0][0]),
                     "cells": packed(np.array([number[word] for word in flat], np.uint32))}  # fmt: skip
        return data | ({} if self.shares is None else {"shares": packed(self.shares)})

    def _still(self) -> str:
        """The first map: the last columns of all rows, or of every second, where there are many."""
        about, values, shares = self.numbers.still()
        step = -(-len(self.rows) // 40)
        lines = range((len(self.rows) - 1) % step, len(self.rows), step)
        first = max(0, len(self.columns) - min(14 if self.cells else 40, max(1, STILL // len(lines))))
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in self.columns[first:])
        body = []
        for y in lines:
            cells = [chip(self.cells[y][x][0] if self.cells else values[y, x], shares[y, x].item(), "td")
                     for x in range(first, len(self.columns))]
            name = f'<th scope="row" style="white-space:nowrap">{html.escape(self.rows[y])}</th>'
            body.append(f"<tr>{name}{''.join(cells)}</tr>")
        part = " (a part: the rest can be seen in a trusted notebook)" if first or step > 1 else ""
        return (f"<p><b>{html.escape(self.title)}</b>{': ' * bool(about)}{html.escape(about)}{part}</p>"
                f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>")  # fmt: skip
