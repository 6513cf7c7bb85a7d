"""The exercises of lesson 04, RoPE."""
import math

import torch
from torch import Generator, Tensor

from .exercise import Exercise, normal, whole


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + h/2]) turned by its angle.   x [s h], cos and sin [s h/2] -> [s h]"""
    out = torch.zeros_like(x)
    half = x.shape[1] // 2
    for s in range(x.shape[0]):
        for i in range(half):
            a, b = x[s, i], x[s, i + half]
            out[s, i] = a * cos[s, i] - b * sin[s, i]
            out[s, i + half] = b * cos[s, i] + a * sin[s, i]
    return out


def order(h: int) -> Tensor:
    """Which number of gpt-oss's head stands at each place of a head whose pairs are neighbours.   -> [h]"""
    places = torch.zeros(h, dtype=torch.long)
    for i in range(h // 2):
        places[2 * i] = i
        places[2 * i + 1] = i + h // 2
    return places


def score(q: Tensor, k: Tensor, distance: int, frequencies: Tensor) -> Tensor:
    """The dot product of a query and a key that stands `distance` before it.   q, k [h], frequencies [h/2] -> []"""
    half, total = len(q) // 2, torch.zeros(())
    for i in range(half):
        angle = distance * frequencies[i].item()
        first = q[i] * math.cos(angle) - q[i + half] * math.sin(angle)
        second = q[i + half] * math.cos(angle) + q[i] * math.sin(angle)
        total = total + first * k[i] + second * k[i + half]
    return total


def _turned(g: Generator) -> dict:
    s, half = whole(g, 1, 5), whole(g, 2, 4)
    angle = 3 * normal(g, s, half)
    return {"x": normal(g, s, 2 * half), "cos": angle.cos(), "sin": angle.sin()}


def _apart(g: Generator) -> dict:
    half = whole(g, 2, 5)
    frequencies = 1000.0 ** (-torch.arange(half) / half)
    return {"q": normal(g, 2 * half), "k": normal(g, 2 * half), "distance": whole(g, 1, 30), "frequencies": frequencies}


EXERCISES = (
    Exercise(
        "04.2", rotate, inputs=_turned, axes=("position", "number"),
        hint="first, second = x.chunk(2, dim=-1) are the halves. The new first half is first * cos - second * sin. "
             "Where does the plus stand, and what does sin multiply there?",
        point="A head of h numbers is h/2 arrows: number i with number i + h/2. Turning keeps their lengths, so "
              "position changes no size, only directions.",
        solution='''\
def rotate(x, cos, sin):
    """[s h] Each pair (x[i], x[i + h/2]) turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
''',
        mistakes={
            "neighbours are paired, (0, 1), (2, 3) and so on, where gpt-oss pairs the halves": '''\
def rotate(x, cos, sin):
    first, second = x[:, 0::2], x[:, 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(1)
''',
            "the pairs are neighbours going in and halves coming out": '''\
def rotate(x, cos, sin):
    first, second = x[:, 0::2], x[:, 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
''',
            "the arrows are turned the other way round": '''\
def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
''',
            "the second half is reckoned from a first half that has been turned already": '''\
def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    first = first * cos - second * sin
    return torch.cat([first, second * cos + first * sin], dim=-1)
''',
        },
    ),
    Exercise(
        "04.4", order, inputs=lambda g: {"h": 2 * whole(g, 2, 8)}, axes=("place",),
        hint="Places 0 and 1 hold the first pair. In gpt-oss these are the numbers 0 and h/2. Places 2 and 3 hold 1 "
             "and h/2 + 1.",
        point="Both ways are the same mathematics with the numbers stored in another order. What matters is that the "
              "weights and the code agree, and nothing but numbers shows when they do not.",
        solution='''\
def order(h):
    """[h] Which of gpt-oss's h numbers stands at each place where pairs are neighbours."""
    return torch.arange(h).view(2, h // 2).T.flatten()
''',
        mistakes={
            "the order is the way back, from neighbours to halves": '''\
def order(h):
    return torch.cat([torch.arange(0, h, 2), torch.arange(1, h, 2)])
''',
            "nothing is moved, so that the neighbours are no pairs": '''\
def order(h):
    return torch.arange(h)
''',
            "the second half comes in front": '''\
def order(h):
    return torch.arange(h).view(2, h // 2).flip(0).T.flatten()
''',
        },
    ),
    Exercise(
        "04.5", score, inputs=_apart,
        hint="Leave the key as it is and turn the query by distance * frequencies: that is where they would stand with "
             "the key at 0. Then take the dot product, of both halves of every pair.",
        point="No position is left in the formula, only the difference of two. A model that knows what one token back "
              "looks like knows it at every place of the text.",
        solution='''\
def score(q, k, distance, frequencies):
    """A number: q · k, the query turned `distance` positions further than the key."""
    angle = distance * frequencies
    (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
    return ((q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin()).sum()
''',
        mistakes={
            "the key is turned in place of the query, as if it stood behind it": '''\
def score(q, k, distance, frequencies):
    angle = distance * frequencies
    (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
    return ((q1 * k1 + q2 * k2) * angle.cos() - (q1 * k2 - q2 * k1) * angle.sin()).sum()
''',
            "query and key are both turned by the distance, which cancels out": '''\
def score(q, k, distance, frequencies):
    return (q * k).sum()
''',
            "only the cosine is there, so that one token back looks like one token ahead": '''\
def score(q, k, distance, frequencies):
    angle = distance * frequencies
    (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
    return ((q1 * k1 + q2 * k2) * angle.cos()).sum()
''',
        },
    ),
)  # fmt: skip
