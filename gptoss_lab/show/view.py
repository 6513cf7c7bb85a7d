"""What every view is built on: one piece of HTML that needs no kernel, no network and no library.

A view lives in JupyterLab, in a page made by nbconvert, in any HTML page. Where scripts are taken out, as in a
notebook that is not trusted, a still picture of one choice stands in its place. Colours are blue, and vermilion for
what is negative, of Okabe and Ito's palette; each number can also be read.
"""
import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LARGEST = 150_000  # bytes of a view's HTML: a notebook may hold several
INK, OTHER = (0, 114, 178), (213, 94, 0)
PAGE = """\
<div id="{id}" role="group" aria-label="{title}"><div data-view>{still}</div>
<script data-for="{id}">(() => {{
const ID = "{id}", D = {data};
{script}}})();</script></div>"""
FILE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title></head><body>
{view}
</body></html>
"""


class View:
    """The base of the views. A subclass `kind` brings kind_view.js and kind_view.css, its data and its still.

    The same input gives the same HTML, byte by byte.
    """

    kind: str
    title: str

    def _data(self) -> dict:
        """What the script gets as D, besides the title."""
        raise NotImplementedError

    def _still(self) -> str:
        """HTML without <div>, <script>, <style> or classes: what is left where scripts and style sheets are not run."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        css, script = (_read(f"view.{end}") + _read(f"{self.kind}_view.{end}") for end in ("css", "js"))
        data = json.dumps({"title": self.title, **self._data(), "css": css})
        data = data.replace("<", "\\u003c")  # a token may spell </script>
        ident = f"{self.kind}-" + hashlib.sha256((data + script).encode()).hexdigest()[:12]
        return PAGE.format(id=ident, title=html.escape(self.title), still=self._still(), data=data, script=script)

    def save(self, path: str | Path) -> Path:
        """Write a page that any browser opens, whole or not at all; it is forbidden to load anything."""
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is no folder: make it first, or save elsewhere")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(FILE.format(title=html.escape(self.title), view=self._repr_html_()), "utf-8")
            return part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _fits(self, fewer: str) -> None:
        if (size := len(self._repr_html_().encode())) > LARGEST:
            raise ValueError(f"the view would take {size:,} bytes, {LARGEST:,} are allowed: give fewer {fewer}")


class Numbers:
    """One or several named arrays of one shape, kept as float32, each with a unit and a scale of colours.

    Args:
        values: an array, or a dict of them by name.
        shape: what each must have.
        unit, limit, root: for all arrays, or a dict by name. `limit` has the full colour, by default the largest size;
            `root` puts the colours on a square-root scale, so that small shares are seen.
        signed: whether colours go both ways from 0; by default where a value is negative.
        gaps: NaN stands for "no value"; otherwise it is an error.

    Raises:
        ValueError: another shape, no array, a limit that is not positive, or values that are not finite numbers.
    """

    def __init__(self, values, shape: Sequence[int], *, unit="", limit=None, root=False, signed: bool | None = None,
                 gaps: bool = False):  # fmt: skip
        if not isinstance(values, Mapping):
            values = {"": values}
        if not values:
            raise ValueError("values is an empty dict: give one array of numbers or more, by name")
        of = lambda x, name, default: x.get(name, default) if isinstance(x, Mapping) else x
        for option in (unit, limit, root):
            if isinstance(option, Mapping) and (wrong := [name for name in option if name not in values]):
                raise ValueError(f"{wrong[0]!r} names none of the values: {', '.join(map(repr, values))}")
        names = texts(list(values), "the names of the values")
        self.arrays = {name: _array(x, shape, name, gaps) for name, x in zip(names, values.values())}
        self.scales = {}
        for name, x in self.arrays.items():
            size = np.nanmax(np.abs(x), initial=0)
            most = of(limit, name, None)
            if most is not None and not 0 < most < np.inf:
                raise ValueError(f"limit is {most}: the value of the full colour must be above 0")
            both = bool(np.nanmin(x, initial=0) < 0) if signed is None else signed
            [about] = texts([of(unit, name, "")], "unit")
            self.scales[name] = {"name": name, "unit": about, "limit": float(most or size or 1), "signed": both,
                                 "root": bool(of(root, name, False))}  # fmt: skip

    def data(self) -> list[dict]:
        return [{**self.scales[name], "values": packed(x)} for name, x in self.arrays.items()]

    def still(self) -> tuple[str, np.ndarray, np.ndarray]:
        """The first array as a still shows it: its name and unit, its values as text, their shares of the full colour.

        All values have the decimals that the largest needs to show three digits; NaN is the empty text.
        """
        (name, x), *_ = self.arrays.items()
        scale = self.scales[name]
        share = np.clip(x / scale["limit"], -1, 1)
        if scale["root"]:
            share = np.sign(share) * np.sqrt(np.abs(share))
        decimals = min(max(2 - math.floor(math.log10(scale["limit"])), 0), 12)
        written = [f"{round(value, decimals) + 0.0:.{decimals}f}" if value == value else "" for value in x.flat]
        return ", ".join(filter(None, (name, scale["unit"]))), np.array(written).reshape(x.shape), share


def noted(title: str, note: str) -> str:
    [title, note] = texts([title, note], "title and note")
    return f"{title} ({note})" if note else title


def texts(words: Sequence[str], name: str) -> list[str]:
    """The words as a list, checked; half characters (lone surrogates), which no file can hold, are spelt out."""
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        wrong = repr(words) if isinstance(words, str) else repr(next(x for x in words if not isinstance(x, str)))
        raise ValueError(f"{name} must be strings in a list, not {wrong[:60]}: use show.words(tokens, tokenizer)")
    return [word.encode("utf-8", "backslashreplace").decode() for word in words]


def packed(x: np.ndarray) -> str:
    """Little-endian bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(x, x.dtype.newbyteorder("<")).tobytes()).decode()


def chip(text: str, share: float, tag: str = "span") -> str:
    """A coloured cell of a still. The colours stand in the cell itself and hold on light and on dark pages.

    Args:
        share: of the full colour, -1 to 1; NaN is left without.
    """
    text = html.escape(text)
    if share != share:
        return f"<{tag}>{text}</{tag}>"
    rgb = [round(255 + (c - 255) * abs(share)) for c in (OTHER if share < 0 else INK)]
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179  # where black and white read alike
    style = "background-color:#{:02x}{:02x}{:02x};color:{}".format(*rgb, "#000" if light else "#fff")
    return f'<{tag} style="{style}">{text}</{tag}>'


def _array(x, shape: Sequence[int], name: str, gaps: bool) -> np.ndarray:
    what = f"values of {name!r}" if name else "values"
    try:
        x = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
        x = x.detach().cpu().to(torch.float64 if not x.is_complex() else x.dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} are not an array of numbers: {error}") from error
    if x.is_complex() or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{what} are {x.dtype} {tuple(x.shape)}: they must be real numbers, {tuple(shape)}")
    x = x.float().numpy()
    bad = np.isinf(x) if gaps else ~np.isfinite(x)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        mend = "" if gaps else "; gaps=True shows NaN as no value"
        raise ValueError(f"{what} hold {x[at]} at {at[0] if len(at) == 1 else at}: they must be finite{mend}")
    return x


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text("utf-8")
