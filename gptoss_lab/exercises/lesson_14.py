"""The exercises of lesson 14, Logit lens and attribution."""
import torch
from torch import Generator, Tensor

from .exercise import Exercise, normal, whole


def lens(x: Tensor, gain: Tensor, unembed: Tensor, eps: float) -> Tensor:
    """The final norm, then the unembedding.   x [s d], gain [d], unembed [V d] -> [s V]"""
    logits = torch.zeros(len(x), len(unembed), dtype=x.dtype)
    for position in range(len(x)):
        mean = sum(x[position, i] ** 2 for i in range(x.shape[1])) / x.shape[1]
        scale = (mean + eps) ** 0.5
        for token in range(len(unembed)):
            for i in range(x.shape[1]):
                logits[position, token] += x[position, i] / scale * gain[i] * unembed[token, i]
    return logits


def parts(writes: Tensor, gain: Tensor, scale: float, row: Tensor) -> Tensor:
    """What each write adds to a logit, the norm's scale held.   writes [n d], gain and row [d] -> [n]"""
    out = torch.zeros(len(writes), dtype=writes.dtype)
    for n in range(len(writes)):
        for i in range(writes.shape[1]):
            out[n] += writes[n, i] / scale * gain[i] * row[i]
    return out


def by_head(z: Tensor, w_out: Tensor, direction: Tensor) -> Tensor:
    """What each head's write adds along a direction.   z [H h], w_out [d H*h], direction [d] -> [H]"""
    n_heads, d_head = z.shape
    out = torch.zeros(n_heads, dtype=z.dtype)
    for head in range(n_heads):
        for i in range(len(direction)):
            for j in range(d_head):
                out[head] += direction[i] * w_out[i, head * d_head + j] * z[head, j]
    return out


def _stream(g: Generator) -> dict:
    d = whole(g, 3, 8)
    return {"x": 1 + normal(g, whole(g, 1, 5), d, scale=3.0), "gain": 1 + normal(g, d, scale=0.5),
            "unembed": normal(g, whole(g, 2, 7), d), "eps": 0.01 * whole(g, 1, 20)}  # fmt: skip


def _writes(g: Generator) -> dict:
    d, writes = whole(g, 3, 8), whole(g, 2, 6)
    writes = normal(g, writes, d, scale=2.0)
    return {"writes": writes, "gain": 1 + normal(g, d, scale=0.5),
            "scale": float(writes.sum(0).square().mean() + 1e-5) ** 0.5, "row": normal(g, d)}  # fmt: skip


def _heads(g: Generator) -> dict:
    n_heads, d_head, d = whole(g, 2, 4), whole(g, 2, 5), whole(g, 3, 7)
    return {"z": normal(g, n_heads, d_head), "w_out": normal(g, d, n_heads * d_head), "direction": normal(g, d)}


EXERCISES = (
    Exercise(
        "14.2", lens, inputs=_stream, axes=("position", "token"),
        hint="scale = sqrt(mean of the squares + eps), one for each position. Divide by it, multiply with the gain, "
             "then take the product with every row of the unembedding.",
        point="The lens has nothing of its own: it is the model's last step, taken early. That is why its last row "
              "is exact, and why an early row may speak another language.",
        solution='''\
def lens_logits(x, gain, unembed, eps):
    """The logits that the stream x [s d] would give if it were the last.   -> [s V]"""
    scale = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (x / scale * gain) @ unembed.T
''',
        mistakes={
            "the final norm is left out": '''\
def lens_logits(x, gain, unembed, eps):
    return x @ unembed.T
''',
            "the gain is left out": '''\
def lens_logits(x, gain, unembed, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() @ unembed.T
''',
            "the mean is taken away first, as LayerNorm does and RMSNorm does not": '''\
def lens_logits(x, gain, unembed, eps):
    x = x - x.mean(-1, keepdim=True)
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain) @ unembed.T
''',
            "one scale serves all positions": '''\
def lens_logits(x, gain, unembed, eps):
    return (x / (x.square().mean() + eps).sqrt() * gain) @ unembed.T
''',
        },
    ),
    Exercise(
        "14.3", parts, inputs=_writes, axes=("write",),
        hint="The scale is given: it is that of the whole stream, the same for every write. What remains is a "
             "product with gain and row, component by component, and a sum over components.",
        point="With the scale held, the logit is linear in the stream, and the stream is a sum. So the parts sum to "
              "the logit; nothing is left over.",
        solution='''\
def parts(writes, gain, scale, row):
    """What each of n writes [n d] adds to the logit of the token with that row of the unembedding.   -> [n]"""
    return writes / scale * gain @ row
''',
        mistakes={
            "each write is divided by its own size, and the parts no longer sum to the logit": '''\
def parts(writes, gain, scale, row):
    return writes / writes.square().mean(-1, keepdim=True).sqrt() * gain @ row
''',
            "the scale is left out": '''\
def parts(writes, gain, scale, row):
    return writes * gain @ row
''',
            "the gain is left out": '''\
def parts(writes, gain, scale, row):
    return writes / scale @ row
''',
            "shares are made that sum to 1": '''\
def parts(writes, gain, scale, row):
    x = writes / scale * gain @ row
    return x / x.sum()
''',
        },
    ),
    Exercise(
        "14.5", by_head, inputs=_heads, axes=("head",),
        hint="The output matrix takes all heads one after the other: w_out.view(d, H, h) separates them. Each head "
             "writes its own block times its z; then take the product with the direction.",
        point="Concatenating heads and multiplying once is the same as letting each head write by itself: attention "
              "is a sum over heads, so a head has a share.",
        solution='''\
def by_head(z, w_out, direction):
    """What each head adds along a direction [d]; z is [H h], w_out [d H*h].   -> [H]"""
    per_head = w_out.view(len(direction), *z.shape)  # [d H h]
    return torch.einsum("Hh, dHh, d -> H", z, per_head, direction)
''',
        mistakes={
            "the columns are read as if heads alternated": '''\
def by_head(z, w_out, direction):
    per_head = w_out.view(len(direction), z.shape[1], z.shape[0])  # [d h H]
    return torch.einsum("Hh, dhH, d -> H", z, per_head, direction)
''',
            "the length of what a head writes is taken, whatever its direction": '''\
def by_head(z, w_out, direction):
    per_head = w_out.view(len(direction), *z.shape)
    return torch.einsum("Hh, dHh -> Hd", z, per_head).norm(dim=-1) * direction.norm()
''',
            "every head gets an equal share of the sum": '''\
def by_head(z, w_out, direction):
    return (w_out @ z.flatten() @ direction / len(z)).repeat(len(z))
''',
        },
    ),
)  # fmt: skip
