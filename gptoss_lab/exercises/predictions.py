"""Say what you expect before you look; see it again beside what came.

A prediction lives in the running notebook, and is gone when its kernel ends. On a page without a kernel the choice
is marked on the page itself, and no further.
"""
import html
import json
import os
from collections.abc import Sequence

from ..explore.panel import STILL, VIEW

PREDICTIONS: dict[str, "Prediction"] = {}
FRAME = '<div style="border-left: 4px solid {colour}; padding: 0.1em 0.9em">{body}</div>'
ROW = '<label style="display: block; margin: 0.25em 0"><input type="radio" name="predict-{name}"> {option}</label>'
MARK = """<script>(() => {{
  const says = document.currentScript.previousElementSibling.querySelector("[data-yours]");
  const look = () => {{
    const at = [...document.getElementsByName({name})].findIndex(x => x.checked);
    if (at >= 0) says.textContent = "You predicted: " + {options}[at] + ".";
  }};
  document.addEventListener("change", look); look();
}})();</script>"""


class Prediction:
    """A question with its options; in a notebook, with a button for each. The last line of a cell shows it.

    mine: the option that was chosen; None before that.
    """

    def __init__(self, name: str, question: str, options: Sequence[str]):
        if isinstance(options, str) or len(options) < 2 or len({*options}) < len(options):
            raise ValueError(f"options = {options!r}: a prediction needs two different options or more, in a list")
        self.name, self.question, self.options = name, question, list(options)
        self.mine: str | None = None
        self._widget = None

    def choose(self, option: str | int) -> "Prediction":
        """Commit to an option, by its words or its number from 1 on. You may change your mind until you have looked.

        Raises:
            ValueError: there is no such option.
        """
        numbers = range(1, len(self.options) + 1)
        if option in self.options:
            self.mine = option
        elif isinstance(option, int) and option in numbers:
            self.mine = self.options[option - 1]
        else:
            raise ValueError(f"{option!r} is none of the options: {', '.join(map(repr, self.options))}")
        return self

    @property
    def widget(self):
        """The question and its options as ipywidgets."""
        if self._widget is None:
            import ipywidgets

            title = ipywidgets.HTML(f"<b>Predict {self.name}.</b> {html.escape(self.question)}")
            self.buttons = ipywidgets.RadioButtons(options=self.options, value=self.mine,
                                                   layout=ipywidgets.Layout(width="max-content"))  # fmt: skip
            self.status = ipywidgets.HTML(self._status())
            self.buttons.observe(self._chosen, names="value")
            self._widget = ipywidgets.VBox([title, self.buttons, self.status])
        return self._widget

    def _chosen(self, change) -> None:
        self.mine = change["new"]
        self.status.value = self._status()

    def _status(self) -> str:
        return f"<em>{'kept: read on' if self.mine else 'choose one before you read on'}</em>"

    def __repr__(self) -> str:
        rows = [f"  {i}  {option}" for i, option in enumerate(self.options, 1)]
        return "\n".join([f"Predict {self.name}. {self.question}", *rows, "Choose one before you read on."])

    def _repr_html_(self) -> str:
        rows = "".join(ROW.format(name=self.name, option=html.escape(option)) for option in self.options)
        body = f"<p><b>Predict {self.name}.</b> {html.escape(self.question)}</p>{rows}"
        return FRAME.format(colour="#CC79A7", body=f"{body}<p><em>Choose one before you read on.</em></p>")

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        bundle = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if not os.environ.get(STILL):
            try:
                bundle[VIEW] = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
            except ImportError:
                pass  # the options can still be read
        return bundle


class Outcome:
    """What came of a prediction."""

    def __init__(self, prediction: Prediction, came: str):
        self.prediction, self.came, self.mine = prediction, came, prediction.mine

    @property
    def right(self) -> bool | None:
        """None if nothing was predicted."""
        return None if self.mine is None else self.mine == self.came

    def _said(self) -> tuple[str, str]:
        yours = "You made no prediction." if self.mine is None else f"You predicted: {self.mine}."
        return yours, f"{'So it is' if self.right else 'It is'}: {self.came}."

    def __repr__(self) -> str:
        return f"{self.prediction.name}: " + "\n".join(self._said())

    def _repr_html_(self) -> str:
        yours, came = map(html.escape, self._said())
        colour = "#0072B2" if self.right else "#CC79A7" if self.right is None else "#D55E00"
        if self.mine is None:  # nobody has committed to anything yet: what came is not thrust upon them
            came = f"<details><summary>What came</summary>{came}</details>"
        body = f"<p><b>{self.prediction.name}</b> <span data-yours>{yours}</span></p><div>{came}</div>"
        frame = FRAME.format(colour=colour, body=body)
        if self.mine is not None:
            return frame
        options, name = (json.dumps(x).replace("<", "\\u003c")
                         for x in (self.prediction.options, f"predict-{self.prediction.name}"))  # fmt: skip
        return frame + MARK.format(name=name, options=options)


def predict(name: str, question: str, options: Sequence[str]) -> Prediction:
    """Ask for a prediction, and keep it for `outcome`. Run again, the cell keeps what was chosen.

    Raises:
        ValueError: fewer than two options, or one twice.
    """
    made = Prediction(name, question, options)
    before = PREDICTIONS.get(name)
    if before is not None and before.mine in made.options:
        made.mine = before.mine
    PREDICTIONS[name] = made
    return made


def outcome(name: str, came: str) -> Outcome:
    """What came, one of the prediction's options, beside what was predicted.

    Raises:
        KeyError: nothing of that name was asked: the cell with `predict` was not run.
        ValueError: what came is none of the options.
    """
    if name not in PREDICTIONS:
        raise KeyError(f"{name!r} was not asked: run the cell with predict({name!r}, ...) first")
    prediction = PREDICTIONS[name]
    if came not in prediction.options:
        raise ValueError(f"{came!r} is none of the options of {name}: {', '.join(map(repr, prediction.options))}")
    return Outcome(prediction, came)
