"""What an exercise is, and how its inputs are drawn."""
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Exercise:
    """A question with an answer that can be computed.

    name: the lesson's number, a dot and its own: "07.2".
    specification: what is asked for, in plain loops. It takes what `inputs` draws, by name; without `inputs`, what
        the notebook gives to `check` by name.
    solution: the code of a full answer, as the notebook's cell would hold it: `def visible(...)`, or `answer = ...`.
    hint: one sentence or two, shown after the first miss.
    point: what to keep, shown on success.
    inputs: draws one input: `inputs(g)` -> {name: value}, with a torch Generator; None for an answer that is a value.
    axes: what the axes of the result mean, or that by part where it has several.
    mistakes: answers that people give, as code, each under the sentence that says what it does.
    tolerance: of numbers, as a share of the target's largest value (or of 1, if that is smaller).
    """

    name: str
    specification: Callable
    solution: str
    hint: str
    point: str
    inputs: Callable[[Generator], dict] | None = None
    axes: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()
    mistakes: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-4

    @property
    def answer(self) -> str:
        """The name that the solution defines."""
        [name] = re.findall(r"^(?:def (\w+)\(|(\w+) = )", self.solution, re.M)[-1:]
        return name[0] or name[1]

    def run(self, code: str):
        """The answer that some code defines: the solution, or a mistake."""
        scope = {"torch": torch, "math": import_module("math")}
        exec(compile(code, f"<{self.name}>", "exec"), scope)
        return scope[self.answer]


def exercise(name: str) -> Exercise:
    """The exercise of that name, such as "07.2".

    Raises:
        KeyError: there is none; it says which there are.
    """
    lesson, _, _ = str(name).partition(".")
    module = f"{__package__}.lesson_{lesson}"
    if not re.fullmatch(r"\d\d", lesson) or find_spec(module) is None:
        raise KeyError(f"{name!r} is no exercise: a name is a lesson's number, a dot and its own, such as '07.2'")
    known = {one.name: one for one in import_module(module).EXERCISES}
    if name not in known:
        raise KeyError(f"lesson {lesson} has no exercise {name!r}: it has {', '.join(known)}")
    return known[name]


def whole(g: Generator, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=g))


def normal(g: Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers, float32."""
    return scale * torch.randn(*shape, generator=g)
