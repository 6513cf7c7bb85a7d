"""Matrices -> matplotlib figures: what probes find, by layer and position, head or expert."""
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .figures import ATTENTION, EXPERTS, PALE, STREAM, _array, _figure, _name, _short
from .picture import Picture


def table(
    values: Tensor, cells: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str], *, title: str,
    value: str, note: str = "",
) -> Picture:  # fmt: skip
    """A word in each cell, its colour says how sure it is.   values [R C] from 0 to 1, cells R lists of C words"""
    p = _array(values)
    with _figure(1.6 + 0.72 * len(columns), 1.1 + 0.3 * len(rows), title, note) as fig:
        ax = fig.subplots()
        image = ax.imshow(np.sqrt(p), cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (y, x), share in np.ndenumerate(p):
            ax.text(x, y, _short(cells[y][x], 9), ha="center", va="center", fontsize=7, family="monospace",
                    color="black" if share > 0.36 else "white")  # fmt: skip
        _name(ax.yaxis, rows, most=80)
        _name(ax.xaxis, columns, most=60, rotation=90)
        bar = fig.colorbar(image, label=value, pad=0.01)
        bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.5", "1"])
    return fig


def heat(
    values: Tensor, rows: Sequence[str], columns: Sequence[str], *, title: str, value: str, across: str = "",
    down: str = "", signed: bool = False, limit: float | None = None, note: str = "",
) -> Picture:  # fmt: skip
    """A matrix of colours [R C]: brown over white to green about 0 where `signed`, else viridis from 0. NaN is grey."""
    x = _array(values)
    largest = limit or np.nanmax(np.abs(x), initial=0) or 1
    wide = 0.6 + 0.085 * len(title + note)  # the title's own width
    with _figure(max(wide, min(2.2 + 0.3 * len(columns), 14)), 1.3 + 0.26 * min(len(rows), 40), title, note) as fig:
        ax = fig.subplots()
        ax.set_facecolor(PALE)
        image = ax.imshow(x, cmap="BrBG" if signed else "viridis", vmin=-largest if signed else 0, vmax=largest,
                          aspect="auto", interpolation="nearest")  # fmt: skip
        _name(ax.yaxis, rows, most=40)
        _name(ax.xaxis, columns, most=60, rotation=90 if max(map(len, columns), default=0) > 3 else 0)
        ax.set(xlabel=across, ylabel=down)
        fig.colorbar(image, label=value, pad=0.01)
    return fig


def bars(values: Tensor, labels: Sequence[str], *, title: str, value: str, note: str = "") -> Picture:
    """One bar a label [n], from 0: vermilion to the right, blue to the left."""
    x = _array(values)
    with _figure(8, 1.1 + 0.26 * len(labels), title, note) as fig:
        ax = fig.subplots()
        ax.barh(range(len(labels)), x, color=[EXPERTS if one > 0 else ATTENTION for one in x], height=0.7)
        ax.axvline(0, color=STREAM, lw=0.8)
        _name(ax.yaxis, labels, most=60)
        ax.invert_yaxis()
        ax.set(xlabel=value)
    return fig
