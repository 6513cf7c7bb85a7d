"""Controls above a picture that is drawn anew when one of them moves.

Without ipywidgets an explorer is the picture of its first settings. In a notebook that is run to be kept (GitHub, the
site), where no kernel will answer, it is a slider through pictures drawn beforehand.
Nothing here uses ipywidgets' `interact`, `interactive` or `Output`: nbclient can wait for those for ever.
"""
import base64
import html
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from ..hooks import unwrapped

if TYPE_CHECKING:
    from ..show.frames_view import FramesView
    from ..show.picture import Picture

QUICK = 20_000_000  # numbers in a model that can answer while a hand moves; a larger one has a Run button
STILL = "GPTOSS_LAB_STILL"  # environment variable: if set, explorers show pictures drawn beforehand, and no widget
KEPT = 150_000  # bytes of those pictures; the first is kept once more, as the still
VIEW = "application/vnd.jupyter.widget-view+json"
WIDE = {"description_width": "initial"}


# ------------------------------------------------------------------------------------------ controls


class Control:
    """What one argument of a picture is chosen with. A frozen dataclass, whose `value` is the first one."""

    boxes = False  # several widgets, in a row of their own

    def widgets(self, library, label: str) -> dict:
        """ipywidgets by what their names add to the control's."""
        raise NotImplementedError

    def read(self, made: Mapping[str, object]):
        """The value that these widgets have now."""
        return made[""].value

    def written(self, value) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    def check(self, name: str) -> None:
        """Raises:
            ValueError: the value is none that there can be.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Control):
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
class Whole(Control):
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
class OneOf(Control):
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
class Along(OneOf):
    """One of some options that have an order, on a slider.

    format: how an option is written; by default as it is.
    """

    format: Callable[[object], str] | None = None

    def widgets(self, library, label: str) -> dict:
        options = [(self.written(option), option) for option in self.options]
        slider = library.SelectionSlider(value=self.value, options=options, description=label, continuous_update=False,
                                         style=WIDE)  # fmt: skip
        return {"": slider}

    def written(self, value) -> str:
        return self.format(value) if self.format else super().written(value)


@dataclass(frozen=True)
class Some(Control):
    """Any of the numbers 0 to n - 1, each with a box to tick."""

    value: Sequence[int]
    n: int
    boxes = True

    def widgets(self, library, label: str) -> dict:
        layout = library.Layout(width="max-content", margin="0 0.8em 0 0")
        box = lambda i: library.Checkbox(value=i in self.value, description=str(i), indent=False, layout=layout)
        return {f" {i}": box(i) for i in range(self.n)}

    def read(self, made: Mapping[str, object]) -> tuple[int, ...]:
        return tuple(i for i in range(self.n) if made[f" {i}"].value)

    def written(self, value) -> str:
        return ", ".join(map(str, value)) or "none"

    def check(self, name: str) -> None:
        wrong = [i for i in self.value if i not in range(self.n)]
        if wrong:
            raise ValueError(f"{name} names {wrong}: there are 0 to {self.n - 1}")


@dataclass(frozen=True)
class Bits(Control):
    """A whole number, each of its bits with a box to tick, the highest first."""

    value: int
    names: Sequence[str]
    boxes = True

    def widgets(self, library, label: str) -> dict:
        layout, top = library.Layout(width="max-content", margin="0 0.8em 0 0"), len(self.names) - 1
        box = lambda i, name: library.Checkbox(value=bool(self.value >> top - i & 1), description=name, indent=False,
                                               layout=layout)  # fmt: skip
        return {f" {name}": box(i, name) for i, name in enumerate(self.names)}

    def read(self, made: Mapping[str, object]) -> int:
        return sum(made[f" {name}"].value << i for i, name in enumerate(reversed(self.names)))

    def written(self, value) -> str:
        return f"{value:0{len(self.names)}b}"

    def check(self, name: str) -> None:
        Whole(self.value, 0, 2 ** len(self.names) - 1).check(name)


# ------------------------------------------------------------------------------------------ the explorer


class Explorer:
    """A picture of what a model does, and the controls that it depends on.

    The last line of a notebook cell shows it. A small model answers at every change; a larger one waits for its Run
    button. What goes wrong is said in the picture's place. Nothing about the model is different afterwards.

    controls: the ipywidgets by name; of a choice of several, "sliding 0", "sliding 1" and so on.
    kept: the values of one or two controls of which a notebook that is run to be kept shows the pictures.
    output, status: HTML widgets: the picture or what went wrong; "working …" while the model runs.

    Args:
        name: what is explored.
        draw: `draw(**values)` -> Picture. It leaves everything as it was.
        controls: by the name of the argument that `draw` takes; the label is the name with spaces.
        live: answer at every change; else wait for the Run button.
        kept: values by the name of a control, of one or two controls: `{"window": [2, 4, 8]}`. The value that a control
            has is among them in any case. `{}` keeps one picture alone.

    Raises:
        ValueError: a control's first value, or one to be kept, is none that it can have; no such control to be kept.
    """

    def __init__(
        self, name: str, draw: Callable[..., "Picture"], controls: Mapping[str, Control], *, live: bool = True,
        kept: Mapping[str, Sequence] | None = None,
    ):  # fmt: skip
        for one, control in controls.items():
            control.check(one)
        self.name, self.live, self.kept = name, live, {}
        self._draw, self._specs = draw, dict(controls)
        for one, values in (kept or {}).items():
            if one not in controls or len(kept) > 2:
                raise ValueError(f"kept names {', '.join(map(repr, kept))}: name one or two of the controls "
                                 f"{', '.join(map(repr, controls))}")  # fmt: skip
            for value in values:
                replace(controls[one], value=value).check(one)
            self.kept[one] = _with(controls[one].value, values)
        self._drawn: tuple[bytes, str] | None = None  # the picture and its title
        self._wrong: str | None = None
        self._widget = None

    @property
    def values(self) -> dict:
        """What the controls say now."""
        if self._widget is None:
            return {name: control.value for name, control in self._specs.items()}
        return {name: control.read(self._made[name]) for name, control in self._specs.items()}

    def picture(self) -> "Picture":
        """The picture of what the controls say now.

        Raises:
            ValueError: what they say cannot be done, such as a prompt that is too long.
        """
        return self._draw(**self.values)

    def frames(self) -> "FramesView":
        """The pictures of all kept values, the other controls as they are now, with a slider to go through them.

        Raises:
            ValueError: nothing is kept, one of the pictures cannot be drawn, or they take too many bytes.
        """
        from ..show.frames_view import FramesView

        if not self.kept:
            raise ValueError(f"the explorer of {self.name} keeps no values: give kept={{control: values}}")
        now = self.values
        kept = {name: _with(now[name], values) for name, values in self.kept.items()}
        pictures = [self._draw(**now | dict(zip(kept, values))) for values in itertools.product(*kept.values())]
        written = lambda name, values: [self._specs[name].written(value) for value in values]
        labels = {name.replace("_", " "): written(name, values) for name, values in kept.items()}
        start = {name.replace("_", " "): self._specs[name].written(now[name]) for name in kept}
        return FramesView(pictures, labels, title=self.name, start=start, most=KEPT)

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
        self._controls, self._made, rows, small = {}, {}, [], []
        for name, control in self._specs.items():
            made = self._made[name] = control.widgets(library, name.replace("_", " "))
            self._controls |= {name + end: one for end, one in made.items()}
            if isinstance(control, Text):
                rows.append(next(iter(made.values())))
            elif control.boxes:
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
        """The live view, and beside it the picture for where nothing is alive; or the pictures of all kept values."""
        bundle, about = {"text/plain": repr(self)}, {}
        if os.environ.get(STILL) and self.kept:
            try:
                frames = self.frames()
            except ValueError as error:
                self._wrong = str(error)
            else:
                still = base64.b64encode(frames.still).decode()
                bundle |= {"text/html": frames._repr_html_(), "image/png": still}
                return bundle, {"image/png": {"alt": frames.alt}}
        if not self._answered:
            self.run()
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


def small(model: nn.Module) -> bool:
    """Can the model answer while a hand moves?"""
    return sum(x.numel() for x in unwrapped(model).state_dict().values()) <= QUICK


def spread(n: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 to n - 1, evenly apart, 0 among them."""
    return list(range(0, n, -(-n // most)))


def _with(value, values: Sequence) -> list:
    """The values with that one among them, numbers in order."""
    values = list(values)
    if value in values:
        return values
    values.append(value)
    return sorted(values) if all(isinstance(x, int | float) for x in values) else values


def _wrapped(library, children: Sequence):
    layout = library.Layout(flex_flow="row wrap", align_items="center")
    return library.Box(list(children), layout=layout)


def _ipywidgets():
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("the controls of an explorer need ipywidgets: pip install 'ipywidgets>=7.7'") from error
    return ipywidgets
