"""The exercises of lesson 07, The sliding window."""
import torch
from torch import Tensor

from .exercise import Exercise, whole


def visible(n: int, window: int) -> Tensor:
    """Which keys each query may read: itself, and window - 1 before it.   -> [query key] bool"""
    mask = torch.zeros(n, n, dtype=torch.bool)
    for query in range(n):
        for key in range(n):
            mask[query, key] = key <= query and query - key < window
    return mask


def reach(windows: list) -> int:
    """How many positions back a value can come from, layer after layer; a full layer is None, and reaches all: -1."""
    back = 0
    for window in windows:
        if window is None:
            return -1
        back += window - 1
    return back


EXERCISES = (
    Exercise(
        "07.2", visible, inputs=lambda g: {"n": whole(g, 2, 12), "window": whole(g, 1, 6)}, axes=("query", "key"),
        hint="Make the distance query - key of every pair first: torch.arange(n)[:, None] - torch.arange(n). "
             "A key may be read where that lies from 0 to window - 1.",
        point="A window of w shows w keys, the query's own among them. An off-by-one here changes no shape and raises "
              "no error: only numbers show it.",
        solution='''\
def visible(n, window):
    """[query key] True where the query may read the key."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (distance >= 0) & (distance < window)
''',
        mistakes={
            "the window leaves out the query's own key and so holds one too many": '''\
def visible(n, window):
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (distance >= 0) & (distance <= window)
''',
            "keys after the query are let in": '''\
def visible(n, window):
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return distance < window
''',
            "queries and keys have changed places": '''\
def visible(n, window):
    distance = torch.arange(n) - torch.arange(n)[:, None]
    return (distance >= 0) & (distance < window)
''',
        },
    ),
    Exercise(
        "07.3", reach,
        inputs=lambda g: {"windows": [None if whole(g, 0, 5) == 0 else whole(g, 1, 9) for _ in range(whole(g, 1, 4))]},
        hint="One layer moves a value at most window - 1 positions. The next layer can pick it up there.",
        point="Sliding layers add up: 12 of them with 128 keys reach 12 x 127 positions back, but only by handing on, "
              "and one full layer reaches everything at once.",
        solution='''\
def reach(windows):
    """How many positions back a value can come from; -1 for all. A window of None is a full layer."""
    if None in windows:
        return -1
    return sum(window - 1 for window in windows)
''',
        mistakes={
            "each layer adds its whole window, its own position counted again": '''\
def reach(windows):
    return -1 if None in windows else sum(windows)
''',
            "only the widest layer counts, as if nothing were handed on": '''\
def reach(windows):
    return -1 if None in windows else max(windows) - 1
''',
            "a full layer is passed over, though one of them is enough to reach everything": '''\
def reach(windows):
    return sum(window - 1 for window in windows if window is not None)
''',
        },
    ),
)  # fmt: skip
