"""The texts that the tiny model is trained on: eight domains, drawn by a seeded generator.

    repeat   a random string of tokens, then the same again: only copying predicts it (induction)
    recall   pairs of a thing and a colour, then questions for them
    story    short English stories      cuento   the same in Spanish, with the same names
    code     small functions, calls and nested brackets
    sum      Harmony: add digits. With an analysis, a running total
    hop      Harmony: follow a chain of pointers. With an analysis, one step a line
    tool     Harmony: multiply. Where the developer offers `functions.calc`, by calling it; else it says no

Reasoning effort decides whether `sum` and `hop` have an analysis: high and medium do, low answers at once.

Every draw comes from `random.Random(seed).random()`, which Python promises to repeat on every machine and in every
version; the functions of `random` that build on it are not promised, so the few needed are written here.
"""
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from .. import tokenizer
from ..harmony import DeveloperContent, Message, SystemContent, Tool, functions, render_message
from ..tokenizer import special
from . import words

Document = list[tuple[list[int], bool]]  # tokens, and whether nothing before them tells what they will be
DOMAINS = ("repeat", "recall", "story", "cuento", "code", "sum", "hop", "tool")


class Draw:
    """Random choices that are the same on every machine."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def one(self, options: Sequence):
        return options[int(self.random() * len(options))]

    def some(self, options: Sequence, n: int) -> list:
        """n different ones of the options, in random order."""
        pool = list(options)
        for i in range(n):
            j = self.between(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def chance(self, p: float) -> bool:
        return self.random() < p


# ---------------------------------------------------------------------------------------- text


def encode(text: str) -> list[int]:
    return tokenizer.tiny().encode_ordinary(text)


@cache
def random_tokens() -> tuple[int, ...]:
    """What `repeat` is made of: every piece of the vocabulary, and the bytes that the other domains use."""
    return (*range(256, 256 + len(words.pieces())), *b"abcdefgxyz0123456789+-*()[]{},.:")


def repeated(draw: Draw, length: int, copies: int = 2) -> Document:
    """`length` random tokens, `copies` times."""
    segment = [draw.one(random_tokens()) for _ in range(length)]
    return [(segment, True), (segment * (copies - 1), False)]


def repeat(draw: Draw, room: int) -> Document:
    """Short segments come several times: in a small room they are where copying is first learnt."""
    if room < 128:
        length, most = draw.between(2, 6) if draw.chance(0.5) else draw.between(4, room // 2 - 2), room
    else:
        length, most = draw.between(4, 16) if draw.chance(0.5) else draw.between(16, 60), 100
    return repeated(draw, length, copies=max(2, draw.between(2 * length, max(2 * length, most)) // length))


def pairs(draw: Draw, n: int) -> tuple[list[str], list[str]]:
    """n different things, and a colour for each."""
    return draw.some(words.OBJECTS + words.ANIMALS, n), [draw.one(words.COLOURS) for _ in range(n)]


def question(things: Sequence[str], colours: Sequence[str]) -> str:
    return "find " + ", ".join(f"{thing} {colour}" for thing, colour in zip(things, colours)) + "?"


def recall(draw: Draw, room: int) -> Document:
    things, colours = pairs(draw, draw.between(2, {32: 4, 64: 8}.get(room, 12)))
    asked = [i for _ in range(3) for i in draw.some(range(len(things)), len(things))]
    asked = asked[: draw.between(len(things), 2 * len(things))]
    answers = ",".join(f" {things[i]} {colours[i]}" for i in asked)
    return [(encode(question(things, colours)), True), (encode(answers), False)]


def story(draw: Draw, room: int) -> Document:
    (a, b), (x, y), (c, d) = draw.some(words.NAMES, 2), draw.some(words.OBJECTS, 2), draw.some(words.COLOURS, 2)
    place, animal = draw.one(words.PLACES), draw.one(words.ANIMALS)
    middle = [
        f"They saw a {draw.one(words.SIZES)} {animal} near the {place}.",
        f"The {animal} was very {draw.one(words.FEELINGS)}.",
        f"{a} {draw.one(words.DID)} the {c} {x}.",
        f"{b} {draw.one(words.DID)} the {d} {y}.",
        f'"I like your {d} {y}," said {a}.',
        f'"I like your {c} {x}," said {b}.',
        f"Then {a} gave the {x} to {b}.",
        f"Then {b} gave the {y} to {a}.",
        f"{draw.one((a, b))} was {draw.one(words.FEELINGS)}.",
        f"{draw.one((a, b))} ran to the {animal}.",
        f"The {animal} slept under a tree.",
        f"{b} sang in the sun.",
    ]
    end = draw.one([f"At the end of the day, {a} and {b} went home with the {animal}.",
                    f"{a} told {b} a story about the {place}."])  # fmt: skip
    begin = [f"One {draw.one(words.WEATHER)} day, {a} and {b} went to the {place}.",
             f"{a} had a {c} {x} and {b} had a {d} {y}."]  # fmt: skip
    return [(encode(" ".join([*begin, *draw.some(middle, draw.between(2, 5)), end])), False)]


def cuento(draw: Draw, room: int) -> Document:
    (a, b), thing, colour = draw.some(words.NAMES, 2), draw.one(words.OBJETOS), draw.one(words.COLORES)
    place, animal = draw.one(words.LUGARES), draw.one(words.ANIMALES)
    middle = [
        f"Allí {a} vio un {animal} {draw.one(words.COLORES)}.",
        f"El {animal} estaba muy {draw.one(words.SENTIA)}.",
        f"{b} vio el {thing} cerca del {place}.",
        f"El {animal} durmió cerca del {place}.",
        f"{a} le dio el {thing} al {animal}.",
        f"{b} le dio el {thing} al {animal}.",
    ]
    begin = f"Un día {a} fue al {place} con {b}. {a} tenía un {thing} {colour}."
    end = f"Al final {draw.one((a, b))} volvió {draw.one((f'al {place}', 'a casa'))} con el {thing}."
    return [(encode(" ".join([begin, *draw.some(middle, draw.between(1, 4)), end])), False)]


def expression(draw: Draw, depth: int = 0) -> str:
    if depth > 1 or draw.chance(0.45):
        return draw.one(words.LETTERS) if draw.chance(0.6) else str(draw.between(0, 9))
    left, sign, right = expression(draw, depth + 1), draw.one("+-*"), expression(draw, depth + 1)
    return draw.one([f"{left} {sign} {right}", f"({left} {sign} {right})", f"[{left}, {right}]"])


def brackets(draw: Draw, n: int) -> str:
    """n pairs of brackets, nested."""
    text, open_ = "", []
    while n or open_:
        if open_ and (not n or draw.chance(0.45)):
            text += open_.pop()
        else:
            pair = draw.one(["()", "[]", "{}"])
            text, n = text + pair[0], n - 1
            open_.append(pair[1])
    return text


def code(draw: Draw, room: int) -> Document:
    if draw.chance(0.3):
        return [(encode("brackets " + brackets(draw, draw.between(3, 12))), False)]
    name, (x, y, z, w) = draw.one(words.FUNCTIONS), draw.some(words.LETTERS, 4)
    lines = [f"def {name}({x}, {y}):", f"    {z} = {x} {draw.one('+-*')} {y}"]
    if draw.chance(0.5):
        lines += [f"    if {z} > {draw.between(0, 9)}:", f"        {z} = {expression(draw)}"]
    if draw.chance(0.4):
        lines += [f"    for {draw.one('ij')} in range({draw.between(2, 9)}):", f"        {z} += {draw.between(1, 9)}"]
    lines += [f"    return {z}", f"{w} = {name}({draw.between(0, 9)}, {draw.between(0, 9)})"]
    if draw.chance(0.5):
        lines.append(f"print({w})")
    return [(encode("\n".join(lines) + "\n"), False)]


# ---------------------------------------------------------------------------------------- Harmony


def system(effort: str) -> Message:
    """The system message that the model knows: the effort and nothing else."""
    return Message("system", SystemContent(None, effort, knowledge_cutoff=None, channels=()))


def prompt(effort: str, user: str, *, calculator: bool = False) -> list[int]:
    """The tokens of a question, up to the `<|start|>assistant` after which the model answers."""
    messages = [system(effort), *([Message("developer", CALCULATOR)] if calculator else []), Message("user", user)]
    return [token for message in messages for token in _message(message)] + _start("assistant")


def _start(role: str) -> list[int]:
    return [special(tokenizer.tiny(), "<|start|>"), *encode(role)]


def _message(message: Message, last: bool = False) -> list[int]:
    tokens = render_message(message, tokenizer.tiny())
    return tokens[:-1] + [special(tokenizer.tiny(), "<|return|>")] if last else tokens


def _dialogue(*messages: Message) -> Document:
    """Only what the assistant writes follows from what is before it."""
    return [(_message(m, last=m is messages[-1]), m.role in ("user", "tool")) for m in messages]


def solved(effort: str, task: tuple[str, str, str]) -> Document:
    user, analysis, final = task
    thought = [] if effort == "low" else [Message("assistant", analysis, channel="analysis")]
    return _dialogue(system(effort), Message("user", user), *thought, Message("assistant", final, channel="final"))


def _effort(draw: Draw) -> str:
    return "low" if draw.chance(0.35) else "medium" if draw.chance(0.2) else "high"


def sum_task(draw: Draw, n: int) -> tuple[str, str, str]:
    """n digits to add: question, analysis, answer.

    The analysis keeps each digit at a fixed distance from the total before it; written as a shrinking expression
    ("16+5, 21") the same task was not learnt.
    """
    digits = [draw.between(1, 9) for _ in range(n)]
    total, analysis = digits[0], str(digits[0])
    for digit in digits[1:]:
        total += digit
        analysis += f"+{digit}={total}"
    return "add " + "+".join(map(str, digits)), analysis, f"={total}"


def hop_task(draw: Draw, hops: int, n: int) -> tuple[str, str, str]:
    """A ring of n names, each pointing to the next, and a start: who is `hops` further? Question, analysis, answer."""
    ring = draw.some(words.NAMES, n)
    points = dict(zip(ring, ring[1:] + ring[:1]))
    shown = ", ".join(f"{a} {points[a]}" for a in draw.some(ring, n))
    user, at, lines = f"map {shown}.\n{hops} {ring[0]}", ring[0], []
    for left in range(hops, 0, -1):
        lines.append(f"{left} {at} {points[at]}")
        at = points[at]
    return user, "\n".join(lines), f"= {at}"


def any_sum(draw: Draw, room: int) -> tuple[str, str, str]:
    return sum_task(draw, draw.between(2, 4 if room <= 64 else 5))


def any_hop(draw: Draw, room: int) -> tuple[str, str, str]:
    n = draw.between(3, 5) if room <= 64 else draw.between(4, 7)
    return hop_task(draw, draw.between(1, min(4, n - 1)), n)


def sum_(draw: Draw, room: int) -> Document:
    return solved(_effort(draw), any_sum(draw, room))


def hop(draw: Draw, room: int) -> Document:
    return solved(_effort(draw), any_hop(draw, room))


CALCULATOR = DeveloperContent(tools=[functions(Tool(
    "calc", "", {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]}
))])  # fmt: skip


def tool(draw: Draw, room: int) -> Document:
    product = draw.between(11, 99), draw.between(11, 99)
    of, effort = "{}*{}".format(*product), _effort(draw)
    if draw.chance(0.3):
        return _dialogue(system(effort), Message("user", f"times {of}"),
                         Message("assistant", "no tool", channel="final"))  # fmt: skip
    call = Message("assistant", f'{{"of":"{of}"}}', recipient="functions.calc", channel="commentary",
                   content_type="<|constrain|>json")  # fmt: skip
    result = Message("tool", str(product[0] * product[1]), name="functions.calc", recipient="assistant",
                     channel="commentary")  # fmt: skip
    return _dialogue(system(effort), Message("developer", CALCULATOR), Message("user", f"times {of}"), call, result,
                     Message("assistant", f"={product[0] * product[1]}", channel="final"))  # fmt: skip


MAKERS: dict[str, Callable[[Draw, int], Document]] = dict(
    repeat=repeat, recall=recall, story=story, cuento=cuento, code=code, sum=sum_, hop=hop, tool=tool
)


# ---------------------------------------------------------------------------------------- batches

# Shares of the tokens. The first stage has only what fits into 32 tokens; induction is found there or never.
SHORT = dict(repeat=0.5, recall=0.3, story=0.07, cuento=0.03, code=0.1)
MIXTURE = dict(repeat=0.22, recall=0.14, story=0.11, cuento=0.05, code=0.09, sum=0.13, hop=0.19, tool=0.07)


@dataclass(frozen=True)
class Batch:
    """Documents one after another, cut into rows. A row's last token is only predicted, never read."""

    tokens: Tensor  # [b s+1]
    domains: Tensor  # [b s+1], index in DOMAINS
    given: Tensor  # [b s+1], bool: nothing before this token tells what it will be

    @property
    def read(self) -> Tensor:
        return self.tokens[:, :-1]

    @property
    def predicted(self) -> Tensor:
        return self.tokens[:, 1:]


@cache
def _mean_length(domain: str, room: int) -> float:
    draw = Draw(0)
    return sum(1 + sum(len(part) for part, _ in MAKERS[domain](draw, room)) for _ in range(200)) / 200


def batch(seed: int, rows: int, length: int, mixture: dict[str, float] = MIXTURE, make=None) -> Batch:
    """`rows` rows of `length` tokens to read, drawn anew from the seed.

    Args:
        mixture: share of the tokens that each domain gets, in the long run.
        make: document makers by domain, in place of MAKERS.
    """
    draw, make, end = Draw(seed), make or MAKERS, special(tokenizer.tiny(), "<|endoftext|>")
    names = list(mixture)
    odds = list(accumulate(mixture[name] / _mean_length(name, length) for name in names))
    tokens, domains, given = [], [], []
    while len(tokens) < rows * (length + 1):
        name = names[min(bisect(odds, draw.random() * odds[-1]), len(names) - 1)]
        parts = [([end], False), *make[name](draw, length)]
        for part, unforeseen in parts:
            tokens += part
            domains += [DOMAINS.index(name)] * len(part)
            given += [unforeseen] * len(part)
    shaped = lambda values: torch.tensor(values[: rows * (length + 1)]).view(rows, length + 1)
    return Batch(shaped(tokens), shaped(domains), shaped(given))
