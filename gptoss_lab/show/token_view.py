"""A text coloured by a number for each of its tokens: loss, entropy, a feature, whatever was measured."""
import html
from collections.abc import Mapping, Sequence

from torch import Tensor

from .view import Numbers, View, chip, noted, texts

STILL = 300  # tokens of the still


class TokenView(View):
    """The tokens in reading order, each in the colour of its number: blue above 0, vermilion below.

    Point at a token, or reach it by Tab and the arrow keys, to read its numbers; a box writes them all under the words.

    Args:
        words: s names, one a position: `show.words(tokens, tokenizer)`.
        values: s numbers, or a dict of several such rows by name, to switch between.
        title: what to look for.
        unit: of the numbers ("nats"), or a dict by name.
        note: ends the title and says whose values they are.
        root: a square-root scale of colours, for probabilities; or a dict by name.
        limit: the value of the full colour, by default each row's largest size; or a dict by name.
        gaps: NaN is a token without a number, such as the loss of the first; otherwise it is an error.

    Raises:
        ValueError: no tokens, rows of another length, values that are not finite, or a view of more than 150 kB.
    """

    kind = "token"

    def __init__(
        self, words: Sequence[str], values: Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]], *,
        title: str = "the deeper a token's colour, the larger its number", unit: str | Mapping[str, str] = "",
        note: str = "", root: bool | Mapping[str, bool] = False, limit: float | Mapping[str, float] | None = None,
        gaps: bool = False,
    ):  # fmt: skip
        self.words, self.title = texts(words, "words"), noted(title, note)
        if not self.words:
            raise ValueError("words is empty: a view needs one token or more")
        self.numbers = Numbers(values, [len(self.words)], unit=unit, limit=limit, root=root, gaps=gaps)
        self._fits("tokens or rows of numbers")

    def __repr__(self) -> str:
        rows = ", ".join(filter(None, self.numbers.arrays)) or "one row of numbers"
        return f"TokenView of {self.title}: {len(self.words)} tokens, {rows}"

    def _data(self) -> dict:
        return {"words": self.words, "rows": self.numbers.data()}

    def _still(self) -> str:
        about, values, shares = self.numbers.still()
        cells = [f"{chip(word, share)}&nbsp;<small>{x}</small>{'<br>' * ('⏎' in word)}"
                 for word, x, share in zip(self.words[:STILL], values, shares.tolist())]  # fmt: skip
        more = f" … and {len(self.words) - STILL} tokens more" if len(self.words) > STILL else ""
        return (f"<p><b>{html.escape(self.title)}</b>{': ' * bool(about)}{html.escape(about)}</p>"
                f"<p>{' '.join(cells)}{more}</p>")  # fmt: skip
