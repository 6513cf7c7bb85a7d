"""Controls above a picture that is drawn anew when one of them moves.

Without ipywidgets, and wherever no kernel runs (GitHub, nbconvert), an explorer is the picture of its first settings.
Nothing here uses ipywidgets' `interact`, `interactive` or `Output`: nbclient can wait for those for ever.
"""
import base64
import html
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..hooks import unwrapped

if TYPE_CHECKING:
    from ..show.picture import Picture

QUICK = 20_000_000  # numbers in a model that can answer while a hand moves; a larger one has a Run button
STILL = "GPTOSS_LAB_STILL"  # environment variable: if set, explorers show only their picture
VIEW = "application/vnd.jupyter.widget-view+json"
WIDE = {"description_width": "initial"}


# ------------------------------------------------------------------------------------------ controls


@dataclass(frozen=True)
class Text:
    """A line of text."""

    value: str

    def widgets(self, library, label: str) -> dict:
        kind = library.Textarea if "\n" in self.value else library.Text
        return {"": kind(value=self.value, description=label, continuous_update=False, style=WIDE,
                         placeholder="type, then Enter", layout=library.Layout(width="99%"))}  # fmt: skip

    def check(self, name: str) -> None:
        if not isinstance(self.value, str):
            raise ValueError(f"{name} = {self.value!r}: must be text")


@dataclass(frozen=True)
class Whole:
    """A whole number from low to high, on a slider."""

    value: int
    low: int
    high: int

    def widgets(self, library, label: str) -> dict:
        slider = library.IntSlider(value=self.value, min=self.low, max=self.high, description=label,
                                   continuous_update=False, style=WIDE)  # fmt: skip
        return {"": slider}

    def check(self, name: str) -> None:
        whole = isinstance(self.value, int) and not isinstance(self.value, bool)
        if not whole or not self.low <= self.value <= self.high:
            raise ValueError(f"{name} = {self.value!r}: must be a whole number from {self.low} to {self.high}")


@dataclass(frozen=True)
class OneOf:
    """One of some options, in a menu."""

    value: object
    options: Sequence

    def widgets(self, library, label: str) -> dict:
        menu = library.Dropdown(value=self.value, options=list(self.options), description=label, style=WIDE,
                                layout=library.Layout(width="max-content"))  # fmt: skip
        return {"": menu}

    def check(self, name: str) -> None:
        if self.value not in self.options:
            raise ValueError(f"{name} = {self.value!r}: must be one of {', '.join(map(repr, self.options))}")


@dataclass(frozen=True)
class Some:
    """Any of the numbers 0 to n - 1, each with a box to tick."""

    value: Sequence[int]
    n: int

    def widgets(self, library, label: str) -> dict:
        layout = library.Layout(width="max-content", margin="0 0.8em 0 0")
        box = lambda i: library.Checkbox(value=i in self.value, description=str(i), indent=False, layout=layout)
        return {f" {i}": box(i) for i in range(self.n)}

    def check(self, name: str) -> None:
        wrong = [i for i in self.value if i not in range(self.n)]
        if wrong:
            raise ValueError(f"{name} names {wrong}: there are 0 to {self.n - 1}")


Control = Text | Whole | OneOf | Some


# ------------------------------------------------------------------------------------------ the explorer


class Explorer:
    """A picture of what a model does, and the controls that it depends on.

    The last line of a notebook cell shows it. A small model answers at every change; a larger one waits for its Run
    button. What goes wrong is said in the picture's place. Nothing about the model is different afterwards.

    controls: the ipywidgets by name; of a choice of several, "sliding 0", "sliding 1" and so on.
    output, status: HTML widgets: the picture or what went wrong; "working …" while the model runs.

    Args:
        name: what is explored.
        draw: `draw(model, **values)` -> Picture. It leaves the model as it was.
        controls: by the name of the argument that `draw` takes; the label is the name with spaces.
        live: answer at every change; None: if the model is small.

    Raises:
        ValueError: a control's first value is none that it can have.
    """

    def __init__(
        self, name: str, model: nn.Module, draw: Callable[..., "Picture"], controls: Mapping[str, Control], *,
        live: bool | None = None,
    ):  # fmt: skip
        for one, control in controls.items():
            control.check(one)
        if live is None:
            live = sum(x.numel() for x in unwrapped(model).state_dict().values()) <= QUICK
        self.name, self.model, self.live = name, model, live
        self._draw, self._specs = draw, dict(controls)
        self._drawn: tuple[bytes, str] | None = None  # the picture and its title
        self._wrong: str | None = None
        self._widget = None

    @property
    def values(self) -> dict:
        """What the controls say now."""
        if self._widget is None:
            return {name: control.value for name, control in self._specs.items()}
        values = {}
        for name, control in self._specs.items():
            if isinstance(control, Some):
                values[name] = tuple(i for i in range(control.n) if self.controls[f"{name} {i}"].value)
            else:
                values[name] = self.controls[name].value
        return values

    def picture(self) -> "Picture":
        """The picture of what the controls say now.

        Raises:
            ValueError: what they say cannot be done, such as a prompt that is too long.
        """
        return self._draw(self.model, **self.values)

    @property
    def widget(self):
        """The controls with the picture below, an ipywidgets VBox.

        Raises:
            ImportError: ipywidgets is not installed.
        """
        return self._built()._widget

    @property
    def controls(self) -> dict:
        return self._built()._controls

    @property
    def output(self):
        return self._built()._output

    @property
    def status(self):
        return self._built()._status

    @property
    def button(self):
        """The Run button; None where every change is answered at once."""
        return self._built()._button

    def run(self, *_) -> None:
        """Ask the model, and show the picture or what went wrong."""
        if self._widget is not None:
            self._show("working …", busy=True)
        self._drawn = self._wrong = None
        try:
            picture = self.picture()
            picture.set_layout_engine("none")  # it is laid out: a second time would cost a third of the wait
            self._drawn = picture.png(), picture.get_suptitle()
        except (ValueError, KeyError, MemoryError) as error:  # what the package says of what it was given
            self._wrong = str(error.args[0] if error.args else error) or type(error).__name__
        except Exception as error:  # in a callback a traceback would be lost
            self._wrong = f"{type(error).__name__}: {error}"
        finally:
            if self._widget is not None:
                self._output.value = self._html()
                self._show("")

    @property
    def _answered(self) -> bool:
        return self._drawn is not None or self._wrong is not None

    # -------------------------------------------------------------------------------- widgets

    def _built(self) -> "Explorer":
        if self._widget is None:
            self._build(_ipywidgets())
        return self

    def _build(self, library) -> None:
        if self.live and not self._answered:
            self.run()
        self._controls, rows, small = {}, [], []
        for name, control in self._specs.items():
            made = control.widgets(library, name.replace("_", " "))
            self._controls |= {name + end: one for end, one in made.items()}
            if isinstance(control, Text):
                rows.append(next(iter(made.values())))
            elif isinstance(control, Some):
                label = library.Label(name.replace("_", " "), layout=library.Layout(margin="0 0.6em 0 2px"))
                rows.append(_wrapped(library, [label, *made.values()]))
            else:
                small.append(next(iter(made.values())))
        self._button = None if self.live else library.Button(description="Run", button_style="primary")
        self._status, self._output = library.HTML(), library.HTML(value=self._html())
        row = library.Layout(min_height="2.4em", align_items="center")  # always there: nothing jumps when it speaks
        state = library.Box([one for one in (self._button, self._status) if one is not None], layout=row)
        for one in self._controls.values():
            one.observe(self._changed, names="value")
        if self._button is not None:
            self._button.on_click(self.run)
        self._widget = library.VBox([*rows, _wrapped(library, small), state, self._output])
        if not self._answered:
            self._show("press Run")

    def _changed(self, _) -> None:
        if self.live:
            self.run()
        else:
            self._show("changed: press Run")

    def _show(self, status: str, busy: bool = False) -> None:
        self._status.value = f"<em>{status}</em>" if status else ""
        if self._button is not None:
            self._button.disabled = busy

    # -------------------------------------------------------------------------------- in a notebook

    def _html(self) -> str:
        if self._wrong is not None:
            return (f'<p role="alert" style="border-left: 4px solid #D55E00; padding: 0.3em 0.8em; margin: 0.5em 0">'
                    f"{html.escape(self._wrong)}</p>")  # fmt: skip
        if self._drawn is None:
            return ""
        png, title = self._drawn
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        return f'<img alt="{html.escape(title)}" style="max-width: 100%; height: auto" src="{source}">'

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """The live view, and beside it the picture for where nothing is alive."""
        if not self._answered:
            self.run()
        bundle, about = {"text/plain": repr(self)}, {}
        if self._drawn is not None:
            png, title = self._drawn
            bundle["image/png"], about["image/png"] = base64.b64encode(png).decode(), {"alt": title}
        else:
            bundle["text/html"] = self._html()
        if not os.environ.get(STILL):
            try:
                view = self.widget.model_id
            except ImportError as error:
                bundle["text/plain"] += f"\n{error}"
            else:
                bundle[VIEW] = {"version_major": 2, "version_minor": 0, "model_id": view}
        return bundle, about

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        return f"Explorer of {self.name}: {said}"


def _wrapped(library, children: Sequence):
    layout = library.Layout(flex_flow="row wrap", align_items="center")
    return library.Box(list(children), layout=layout)


def _ipywidgets():
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("the controls of an explorer need ipywidgets: pip install 'ipywidgets>=7.7'") from error
    return ipywidgets
