"""The exercises of lesson 05, YaRN."""
import math

import torch
from torch import Generator, Tensor

from .exercise import Exercise, whole


def turns(h: int, theta: float, length: int) -> Tensor:
    """How often each plane of a head turns within a text of that length.   -> [h/2]"""
    made = torch.zeros(h // 2, dtype=torch.float64)
    for i in range(h // 2):
        frequency = theta ** (-2 * i / h)  # radians a token
        made[i] = length * frequency / (2 * math.pi)
    return made


def ramp(turns: Tensor, fast: float, slow: float) -> Tensor:
    """How far each plane is slowed: 0 not at all, 1 by the whole factor.   turns [p] -> [p]"""
    slowed = torch.zeros(len(turns), dtype=torch.float64)
    for i, t in enumerate(turns.tolist()):
        if t >= fast:
            slowed[i] = 0
        elif t <= slow:
            slowed[i] = 1
        else:
            slowed[i] = (math.log(fast) - math.log(t)) / (math.log(fast) - math.log(slow))
    return slowed


def concentration(factor: float) -> tuple[float, float]:
    """What q and k are each multiplied by, and what the score is thereby.   -> a number each"""
    each = 1.0
    if factor > 1:
        each = 0.1 * math.log(factor) + 1
    return each, each * each


def _head(g: Generator) -> dict:
    return {"h": 2 * whole(g, 2, 8), "theta": float(whole(g, 2, 150) * 1000), "length": 2 ** whole(g, 5, 12)}


def _turned(g: Generator) -> dict:
    slow = whole(g, 1, 3)
    most = whole(g, 3, 6)
    made = 4.0**most * 2.0 ** (-torch.arange(2 * most + 6) - torch.rand(1, generator=g))
    return {"turns": made, "fast": float(slow * whole(g, 4, 16)), "slow": float(slow)}


EXERCISES = (
    Exercise(
        "05.2", turns, inputs=_head, axes=("plane",), tolerance=1e-5,
        hint="Plane i turns by theta ** (-2 * i / h) radians a token: the first by 1, the last by nearly 1 / theta. A "
             "turn is 2 * math.pi radians.",
        point="In one text some planes turn hundreds of times and some not once. The first have shown training every "
              "angle there is, the last only a few of them.",
        solution='''\
def turns(h, theta, length):
    """[h/2] How often each plane of a head turns within a text of that length."""
    frequency = theta ** (-2 * torch.arange(h // 2) / h)
    return length * frequency / (2 * math.pi)
''',
        mistakes={
            "the exponent goes half as far as it should: a head of h numbers has h/2 planes": '''\
def turns(h, theta, length):
    return length * theta ** (-torch.arange(h // 2) / h) / (2 * math.pi)
''',
            "these are the radians, not yet the turns": '''\
def turns(h, theta, length):
    return length * theta ** (-2 * torch.arange(h // 2) / h)
''',
            "these are wavelengths, the tokens that one turn takes": '''\
def turns(h, theta, length):
    return 2 * math.pi / theta ** (-2 * torch.arange(h // 2) / h)
''',
        },
    ),
    Exercise(
        "05.3", ramp, inputs=_turned, axes=("plane",), tolerance=1e-5,
        hint="Take the logarithms first. A straight line from 0 where turns = fast to 1 where turns = slow, then "
             ".clamp(0, 1).",
        point="Planes are evenly spaced in the logarithm of their speed, so a straight line over the planes is a "
              "straight line in that logarithm. Three numbers decide everything: fast, slow, and the trained length.",
        solution='''\
def ramp(turns, fast, slow):
    """[p] How far each plane is slowed: 0 not at all, 1 by the whole factor."""
    done = math.log(fast) - turns.log()
    return (done / (math.log(fast) - math.log(slow))).clamp(0, 1)
''',
        mistakes={
            "the line is straight in the turns themselves and not in their logarithm": '''\
def ramp(turns, fast, slow):
    return ((fast - turns) / (fast - slow)).clamp(0, 1)
''',
            "the fast planes are slowed and the slow ones kept": '''\
def ramp(turns, fast, slow):
    return 1 - ((math.log(fast) - turns.log()) / (math.log(fast) - math.log(slow))).clamp(0, 1)
''',
            "nothing holds the line between 0 and 1": '''\
def ramp(turns, fast, slow):
    return (math.log(fast) - turns.log()) / (math.log(fast) - math.log(slow))
''',
            "there is a step where a ramp is wanted: every plane is kept or slowed, none is blended": '''\
def ramp(turns, fast, slow):
    return (turns < slow).double()
''',
        },
    ),
    Exercise(
        "05.4", concentration, inputs=lambda g: {"factor": float(whole(g, 1, 64))}, tolerance=1e-6,
        hint="math.log is the natural logarithm. The score is a product of q and k, and each of them carries "
             "the number.",
        point="At the published factor of 32 it is 1.3466 on q and on k, and 1.8133 on the score: the softmax is "
              "sharper, to make up for the many more keys that share it.",
        solution='''\
def concentration(factor):
    """(what q and k are each multiplied by, what the score is multiplied by)"""
    each = 0.1 * math.log(factor) + 1
    return each, each**2
''',
        mistakes={
            "the logarithm is one to the base 2": '''\
def concentration(factor):
    each = 0.1 * math.log2(factor) + 1
    return each, each**2
''',
            "only q is multiplied, so that the score gets the number once": '''\
def concentration(factor):
    each = 0.1 * math.log(factor) + 1
    return each, each
''',
            "the whole number is put on the score, and its root on q and k": '''\
def concentration(factor):
    whole = 0.1 * math.log(factor) + 1
    return whole**0.5, whole
''',
        },
    ),
)  # fmt: skip
