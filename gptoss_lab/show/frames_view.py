"""Pictures drawn beforehand, and a slider to go through them: an explorer for where no kernel runs."""
import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .view import LARGEST, View, noted, texts

if TYPE_CHECKING:
    from .picture import Picture

COLOURS = 64, 32, 16  # of all pictures together: the first that makes them fit


class FramesView(View):
    """Move a slider, by hand or by the arrow keys, and see the picture of that value. Two sliders make a grid.

    The pictures share one palette. The one at the start is kept whole, of the others what differs from it: so let them
    have the same axes. Smaller ones get a white margin. The same pictures give the same HTML, byte by byte.

    still: the picture at the start as the bytes of a PNG.

    Args:
        pictures: one for each value, or for each pair of values, the last control's running fastest.
        controls: the values of each slider by its name: `{"layer": [0, 1], "head": [0, 1, 2]}` takes six pictures.
        title: what can be moved.
        start: the value of each control at the beginning, by name; by default the first.
        alts: what each picture shows, in words; by default the pictures' titles. Pictures given as bytes need them.
        note: ends the title and says whose values they are.
        most: bytes that the HTML may take.

    Raises:
        ValueError: no pictures, or more or fewer than the controls have values; no words for one; no such start; or a
            view of more than `most` bytes even in 16 colours.
    """

    kind = "frames"

    def __init__(
        self, pictures: "Sequence[Picture | bytes]", controls: Mapping[str, Sequence], *, title: str,
        start: Mapping[str, object] | None = None, alts: Sequence[str] | None = None, note: str = "",
        most: int = LARGEST,
    ):  # fmt: skip
        self.title = noted(title, note)
        self.controls = {name: texts([str(x) for x in values], name) for name, values in controls.items()}
        sizes = [len(values) for values in self.controls.values()]
        if not 1 <= len(sizes) <= 2 or 0 in sizes or len(pictures) != math.prod(sizes):
            shape = " x ".join(map(str, sizes)) or "no"
            raise ValueError(f"{len(pictures)} pictures for {shape} values: give one or two controls, and one picture "
                             "for each value or pair of values")  # fmt: skip
        if alts is None:
            alts = ["" if isinstance(one, bytes) else one.get_suptitle() for one in pictures]
        self.alts = texts(alts, "alts")
        if len(self.alts) != len(pictures) or not all(self.alts):
            raise ValueError(f"{sum(map(bool, self.alts))} of {len(pictures)} pictures have words: who cannot see a "
                             "picture needs them: give it a title, or alts")  # fmt: skip
        self.start = [self._place(name, start) for name in self.controls]
        self.first = int(np.ravel_multi_index(self.start, sizes))
        images = [_opened(one) for one in pictures]
        for colours in COLOURS:
            self.still, self.patches = _patched(images, self.first, colours)
            if (size := len(self._repr_html_().encode())) <= most:
                return
        raise ValueError(f"the view would take {size:,} bytes, {most:,} are allowed: give fewer or smaller pictures")

    def _place(self, name: str, start: Mapping[str, object] | None) -> int:
        if start and (wrong := [one for one in start if one not in self.controls]):
            raise ValueError(f"start names {wrong[0]!r}: the controls are {', '.join(map(repr, self.controls))}")
        value, values = (start or {}).get(name), self.controls[name]
        if start and name in start and str(value) not in values:
            raise ValueError(f"start of {name} is {value!r}: its values are {', '.join(values)}")
        return values.index(str(value)) if start and name in start else 0

    @property
    def alt(self) -> str:
        """What the picture at the start shows, in words."""
        return self.alts[self.first]

    def __repr__(self) -> str:
        about = " x ".join(f"{len(values)} of {name}" for name, values in self.controls.items())
        return f"FramesView of {self.title}: {about}"

    def _data(self) -> dict:
        controls = [{"name": name, "labels": values} for name, values in self.controls.items()]
        patches = [base64.b64encode(webp).decode() for webp in self.patches]
        return {"controls": controls, "start": self.start, "alts": self.alts, "patches": patches}

    def _still(self) -> str:
        """The picture at the start. The script takes it from here."""
        at = [f"{name} {values[i]}" for (name, values), i in zip(self.controls.items(), self.start)]
        source = "data:image/png;base64," + base64.b64encode(self.still).decode()
        return (f"<p><b>{html.escape(self.title)}</b>: {html.escape(', '.join(at))}. In a trusted notebook the others "
                f'can be chosen.</p><p><img alt="{html.escape(self.alt)}" '
                f'style="max-width: 100%; height: auto" src="{source}"></p>')  # fmt: skip


def _opened(picture: "Picture | bytes") -> Image.Image:
    if not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.savefig(file, format="png")
        picture = file.getvalue()
    try:
        return Image.open(io.BytesIO(picture)).convert("RGB")
    except OSError as error:
        raise ValueError(f"a picture of {len(picture)} bytes is no PNG: {error}") from error


def _patched(images: Sequence[Image.Image], first: int, colours: int) -> tuple[bytes, list[bytes]]:
    """One picture whole, and of each what differs from it, transparent elsewhere."""
    width, height = (max(image.size[side] for image in images) for side in (0, 1))
    whites = [Image.new("RGB", (width, height), "white") for _ in images]
    for white, image in zip(whites, images):
        white.paste(image)
    codes, rgb = _few(np.stack([np.asarray(white) for white in whites]), colours)
    patch = lambda one: np.dstack([rgb[one], np.full_like(one, 255)]) * (one != codes[first])[..., None]
    whole = Image.fromarray(codes[first])
    whole.putpalette(rgb.tobytes())
    # Lossless WebP is a third smaller than PNG, which GitHub wants of the still.
    return _file(whole, "png", optimize=True), [_file(Image.fromarray(patch(one)), "webp", lossless=True, quality=100)
                                                for one in codes]  # fmt: skip


def _few(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """x [... 3] in n colours of all -> codes [...], rgb [n 3]"""
    packed = x.astype(np.int32) @ [65536, 256, 1]
    count = np.bincount(packed.flat)
    known = count.nonzero()[0]
    every = np.stack([known >> 16, known >> 8 & 255, known & 255], -1)
    # By the root of its count: a thin line covers little and means much.
    sample = np.repeat(every, np.ceil(np.sqrt(count[known])).astype(int), 0)[None].astype(np.uint8)
    found = Image.fromarray(sample).quantize(n, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    rgb = np.array(found.getpalette(), np.uint8).reshape(-1, 3)
    code = np.zeros(len(count), np.uint8)
    near = every @ (2.0 * rgb.T) - (rgb.astype(float) ** 2).sum(-1)  # up to what all have alike
    code[known] = near.argmax(1)
    return code[packed], rgb


def _file(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
