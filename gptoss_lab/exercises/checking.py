"""Your function against a specification in plain loops, on small random inputs."""
import base64
import copy
import dis
import html
import linecache
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .comparison import Difference, difference, picture
from .exercise import Exercise, exercise

N_INPUTS = 20
EMPTY, PASSED, FAILED = "empty", "passed", "failed"


@dataclass(frozen=True)
class Verdict:
    """What came of an answer: the last line of a cell shows it.

    state: "empty" while nothing is written, "passed" or "failed".
    text: what is right or wrong, in a sentence or two.
    found: the first difference, if the answer gave numbers of the right shape.
    """

    exercise: Exercise
    state: str
    text: str
    found: Difference | None = None

    @property
    def passed(self) -> bool:
        return self.state == PASSED

    @property
    def failed(self) -> bool:
        return self.state == FAILED

    def _lines(self) -> list[str]:
        name = self.exercise.name
        if self.state == EMPTY:
            return [f"{name}: {self.text}"]
        if self.passed:
            return [f"✓ {name}: right{self.text}.", self.exercise.point]
        return [f"✗ {name}: {self.text}", f"Hint: {self.exercise.hint}", f'To see a solution: solution("{name}")']

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        colour = {EMPTY: "#888888", PASSED: "#0072B2", FAILED: "#D55E00"}[self.state]
        said = [html.escape(line).replace("\n", "<br>") for line in self._lines()]
        if self.found is not None and self.found.yours is not None and self.found.yours.ndim:
            drawn = picture(self.found)
            source = base64.b64encode(drawn.png()).decode()
            said.insert(1, f'<img alt="{html.escape(drawn.get_suptitle())}" style="max-width: 100%" '
                           f'src="data:image/png;base64,{source}">')  # fmt: skip
        body = "".join(f'<p style="margin: 0.3em 0">{line}</p>' for line in said)
        return f'<div role="status" style="border-left: 4px solid {colour}; padding: 0.1em 0.9em">{body}</div>'


def check(name: str, answer, **given) -> Verdict:
    """Is the answer right?

    A function is called with 20 small random inputs, or with what is `given` by name, and its results are compared
    with those of the exercise's specification. Anything else is compared with what the specification gives.

    Raises:
        KeyError: there is no such exercise.
    """
    asked = exercise(name)
    if answer is ... or callable(answer) and _unwritten(answer):
        return Verdict(asked, EMPTY, "not written yet: put your answer in the place of the dots, run the cell again")
    if not callable(answer):
        found = difference(answer, asked.specification(**given), asked)
        return Verdict(asked, FAILED, f"your answer {found.text}.", found) if found else Verdict(asked, PASSED, "")
    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    inputs = [asked.inputs(g) for _ in range(N_INPUTS)] if asked.inputs else [given]
    for drawn in inputs:
        if (wrong := _wrong(asked, answer, drawn)) is not None:
            return replace(wrong, text=wrong.text + _known(asked, answer, inputs)) if wrong.found else wrong
    return Verdict(asked, PASSED, f" on {len(inputs)} random inputs" if asked.inputs else "")


def solution(name: str):
    """The code of a full answer, to look at."""
    from ..show.source import Source

    return Source(f"a solution of {name}", exercise(name).solution.strip())


def _wrong(asked: Exercise, answer, drawn: dict) -> Verdict | None:
    target = asked.specification(**_copied(drawn))
    handed = _copied(drawn)
    try:
        yours = answer(**handed)
    except Exception as error:  # the learner's: it is explained, not dumped
        return Verdict(asked, FAILED, _explained(error, answer, drawn))
    if yours is ...:
        return Verdict(asked, EMPTY, "not written yet: it returns the dots")
    changed = [one for one, x in handed.items() if not _same(x, drawn[one])]
    if changed:
        text = f"your function changed its input `{changed[0]}` in place: the caller's values are gone. Work on a copy."
        return Verdict(asked, FAILED, text)
    found = difference(yours, target, asked)
    if found is None:
        return None
    text = f"with {_told(drawn)}, your result {found.text}." if found.yours is None else \
           f"with {_told(drawn)}: {found.text}."  # fmt: skip
    return Verdict(asked, FAILED, text, found)


def _known(asked: Exercise, answer, inputs: list[dict]) -> str:
    """The sentence of a common mistake that gives on every input what the answer gives."""
    yours = [_result(answer, drawn) for drawn in inputs]
    for sentence, code in asked.mistakes.items():
        its = [_result(asked.run(code), drawn) for drawn in inputs]
        if all(mine == other if isinstance(other, type) else difference(mine, other, asked) is None
               for mine, other in zip(yours, its)):  # fmt: skip
            return f"\nThis is what comes out if {sentence}."
    return ""


def _result(answer, drawn: dict):
    """What a function gives, or the kind of exception that it raises."""
    try:
        return answer(**_copied(drawn))
    except Exception as error:
        return type(error)


def _explained(error: Exception, answer, drawn: dict) -> str:
    where, trace = "", error.__traceback__
    code = getattr(answer, "__code__", None)
    while trace is not None:
        if code is not None and trace.tb_frame.f_code.co_filename == code.co_filename:
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            where = f" at `{line}`" if line else f" at its line {trace.tb_lineno - code.co_firstlineno + 1}"
        trace = trace.tb_next
    said = str(error) or "no more is said"
    if isinstance(error, TypeError) and "argument" in said and not where:
        said += f". It is called by name: keep the arguments {', '.join(drawn)} as they were"
    return f"your function stopped{where}.\n{type(error).__name__}: {said}\nIt had been called with {_told(drawn)}."


def _told(drawn: dict) -> str:
    return ", ".join(f"{name} {_shape(x)}" for name, x in drawn.items()) or "nothing"


def _shape(x) -> str:
    if isinstance(x, Tensor):
        return f"= {x.tolist()}" if x.numel() <= 4 and x.ndim < 2 else f"of shape {tuple(x.shape)}"
    said = repr(x)
    return f"= {said}" if len(said) <= 60 else f"(a {type(x).__name__})"


def _unwritten(answer) -> bool:
    """Is the body of the function nothing but dots, or `pass`?"""
    code = getattr(answer, "__code__", None)
    plain = {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOP"}
    return code is not None and {op.opname for op in dis.get_instructions(code)} <= plain and \
        all(x is None or x is ... or x == code.co_consts[0] and isinstance(x, str) for x in code.co_consts)  # fmt: skip


def _copied(drawn: dict) -> dict:
    return {name: _copy(x) for name, x in drawn.items()}


def _copy(x):
    if isinstance(x, Tensor):
        return x.clone()
    return copy.deepcopy(x) if isinstance(x, (list, dict, set, np.ndarray)) else x


def _same(one, other) -> bool:
    if isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in other)
    return one is other or bool(one == other)
