"""The exercises of lesson 06, Grouped-query attention."""
import torch
from torch import Generator, Tensor

from .exercise import Exercise, normal, whole


def key_heads(n_heads: int, n_kv_heads: int) -> Tensor:
    """Which key head each query head reads: neighbours share one.   -> [query head]"""
    readers, reads, key_head = n_heads // n_kv_heads, [], 0
    while key_head < n_kv_heads:
        for _ in range(readers):
            reads.append(key_head)
        key_head += 1
    return torch.tensor(reads)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q [s H h], k [t K h] -> [H s t]: the product of each query with each key of the key head that it reads."""
    (s, n_heads, width), (t, n_kv_heads, _) = q.shape, k.shape
    out, reads = torch.zeros(n_heads, s, t, dtype=q.dtype), key_heads(n_heads, n_kv_heads).tolist()
    for head in range(n_heads):
        for query in range(s):
            for key in range(t):
                for i in range(width):
                    out[head, query, key] += q[query, head, i] * k[key, reads[head], i]
    return out


def cache_bytes(n_tokens: int, n_kv_heads: int, d_head: int, windows: list, width: int) -> int:
    """Bytes of the keys and values that stay after n_tokens, layer by layer; a window of None keeps all tokens."""
    total = 0
    for window in windows:
        kept = n_tokens if window is None else min(n_tokens, window)
        for _ in ("key", "value"):
            total += kept * n_kv_heads * d_head * width
    return total


def _heads(g: Generator) -> dict:
    n_kv_heads, readers = whole(g, 2, 5), whole(g, 2, 6)
    return {"n_heads": n_kv_heads * readers, "n_kv_heads": n_kv_heads}


def _queries_and_keys(g: Generator) -> dict:
    n_kv_heads, readers, width = whole(g, 2, 3), whole(g, 2, 4), whole(g, 1, 4)
    q = normal(g, whole(g, 1, 3), n_kv_heads * readers, width)
    return {"q": q, "k": normal(g, whole(g, 2, 5), n_kv_heads, width)}


def _cache(g: Generator) -> dict:
    windows = [None if whole(g, 0, 1) else whole(g, 2, 64) for _ in range(whole(g, 1, 5))]
    return {"n_tokens": whole(g, 1, 99), "n_kv_heads": whole(g, 1, 8), "d_head": 2 * whole(g, 1, 32),
            "windows": windows, "width": 2 ** whole(g, 1, 3)}  # fmt: skip


EXERCISES = (
    Exercise(
        "06.3", key_heads, inputs=_heads, axes=("query head",),
        hint="n_heads // n_kv_heads neighbours read the same key head. Divide a head's number by that, and drop "
             "the rest.",
        point="Query head i reads key head i // (n_heads // n_kv_heads). In gpt-oss 64 // 8 is again 8, so a formula "
              "that divides by the wrong 8 looks right there.",
        solution='''\
def key_heads(n_heads, n_kv_heads):
    """[query head] The number of the key head that each query head reads."""
    return torch.arange(n_heads) // (n_heads // n_kv_heads)
''',
        mistakes={
            "the query heads are dealt out in turn, like cards, instead of neighbours staying together": '''\
def key_heads(n_heads, n_kv_heads):
    return torch.arange(n_heads) % n_kv_heads
''',
            "you divide by the number of key heads, not by the readers of one; with 64 and 8 nobody would notice": '''\
def key_heads(n_heads, n_kv_heads):
    return torch.arange(n_heads) // n_kv_heads
''',
        },
    ),
    Exercise(
        "06.4", scores, inputs=_queries_and_keys, axes=("query head", "query", "key"),
        hint='Give the readers an axis of their own: q.unflatten(1, (k.shape[1], -1)) is [s K g h]. Then '
             'torch.einsum("sKgh,tKh->Kgst", ...), and join K and g again.',
        point="K appears in both operands and in the result, g only in the queries: each key is used g times and "
              "never copied. There are as many products as without groups; what is saved is keys to keep and to fetch.",
        solution='''\
def scores(q, k):
    """q [s H h], k [t K h] -> [H s t]: every query times every key of the head that it reads."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return torch.einsum("sKgh,tKh->Kgst", grouped, k).flatten(0, 1)
''',
        mistakes={
            "the heads are split as (g K): readers of one key head then stand K apart": '''\
def scores(q, k):
    grouped = q.unflatten(1, (-1, k.shape[1]))
    return torch.einsum("sgKh,tKh->gKst", grouped, k).flatten(0, 1)
''',
            "each head reads the right keys, but g stands before K in the result and the heads change places": '''\
def scores(q, k):
    grouped = q.unflatten(1, (k.shape[1], -1))
    return torch.einsum("sKgh,tKh->gKst", grouped, k).flatten(0, 1)
''',
            "g is missing in the result: einsum then adds the readers of a key head up": '''\
def scores(q, k):
    grouped = q.unflatten(1, (k.shape[1], -1))
    return torch.einsum("sKgh,tKh->Kst", grouped, k)
''',
        },
    ),
    Exercise(
        "06.6", cache_bytes, inputs=_cache,
        hint="Each layer keeps keys and values, so twice n_kv_heads * d_head numbers of `width` bytes for each token "
             "that stays: all of them in a full layer, at most `window` in a sliding one.",
        point="The number of query heads is not in the formula, and nor is d_model: only the key/value heads are kept. "
              "In a long text only full layers still grow.",
        solution='''\
def cache_bytes(n_tokens, n_kv_heads, d_head, windows, width):
    """Bytes of keys and values after n_tokens. A window of None keeps all tokens."""
    kept = sum(n_tokens if window is None else min(n_tokens, window) for window in windows)
    return 2 * kept * n_kv_heads * d_head * width
''',
        mistakes={
            "the keys are counted and the values forgotten": '''\
def cache_bytes(n_tokens, n_kv_heads, d_head, windows, width):
    kept = sum(n_tokens if window is None else min(n_tokens, window) for window in windows)
    return kept * n_kv_heads * d_head * width
''',
            "one layer is counted, a full one, and the others are forgotten": '''\
def cache_bytes(n_tokens, n_kv_heads, d_head, windows, width):
    return 2 * n_tokens * n_kv_heads * d_head * width
''',
            "sliding layers keep every token too": '''\
def cache_bytes(n_tokens, n_kv_heads, d_head, windows, width):
    return 2 * n_tokens * len(windows) * n_kv_heads * d_head * width
''',
            "a sliding layer keeps a whole window even of a text that is shorter": '''\
def cache_bytes(n_tokens, n_kv_heads, d_head, windows, width):
    kept = sum(n_tokens if window is None else window for window in windows)
    return 2 * kept * n_kv_heads * d_head * width
''',
        },
    ),
)  # fmt: skip
