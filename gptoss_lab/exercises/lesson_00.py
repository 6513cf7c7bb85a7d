"""The exercises of lesson 00, One token, end to end."""
from torch import Tensor

from .exercise import Exercise, normal, whole


def write(pre: Tensor, attn: Tensor, mlp: Tensor) -> Tensor:
    """The residual stream after a block.   all [s d]"""
    out = pre.clone()
    for position in range(pre.shape[0]):
        for one in range(pre.shape[1]):
            out[position, one] = pre[position, one] + attn[position, one] + mlp[position, one]
    return out


def order() -> list[str]:
    """The points of a block in the order in which it makes them."""
    return ["hook_resid_pre", "hook_q", "hook_pattern", "hook_attn_out", "hook_resid_mid", "hook_router_logits",
            "hook_expert_out", "hook_mlp_out", "hook_resid_post"]  # fmt: skip


def shapes(b: int, s: int, d_model: int, n_heads: int, n_experts: int) -> dict:
    """Three shapes, of a batch of b texts of s tokens."""
    return {"hook_resid_post": (b, s, d_model), "hook_pattern": (b, n_heads, s, s),
            "hook_router_logits": (b, s, n_experts)}  # fmt: skip


def _block(g) -> dict:
    s, d = whole(g, 2, 5), whole(g, 3, 8)
    return {name: normal(g, s, d) for name in ("pre", "attn", "mlp")}


EXERCISES = (
    Exercise(
        "00.1", write, inputs=_block, axes=("position", "component"),
        hint="Nothing is replaced: what attention gave and what the experts gave are both added to what was there.",
        point="The stream is a sum: what one layer wrote stays readable for every later one.",
        solution='''\
def stream_after(pre, attn, mlp):
    """The residual stream after a block, of the stream before it and of what was added.   [s d]"""
    return pre + attn + mlp
''',
        mistakes={
            "the block replaces the stream by what it made": '''\
def stream_after(pre, attn, mlp):
    return attn + mlp
''',
            "the experts' answer is forgotten": '''\
def stream_after(pre, attn, mlp):
    return pre + attn
''',
        },
    ),
    Exercise(
        "00.3", order,
        hint="A block reads the stream, asks its attention, adds; then it asks its experts, and adds again. "
             "resid_mid is the stream between the two.",
        point="Attention first, experts second, and each adds to the stream: every block of both models is built so.",
        solution='''\
order = [
    "hook_resid_pre", "hook_q", "hook_pattern", "hook_attn_out", "hook_resid_mid",
    "hook_router_logits", "hook_expert_out", "hook_mlp_out", "hook_resid_post",
]
''',
        mistakes={
            "the experts come first": '''\
order = [
    "hook_resid_pre", "hook_router_logits", "hook_expert_out", "hook_mlp_out", "hook_resid_mid",
    "hook_q", "hook_pattern", "hook_attn_out", "hook_resid_post",
]
''',
        },
    ),
    Exercise(
        "00.4", shapes,
        inputs=lambda g: {"b": whole(g, 1, 3), "s": whole(g, 2, 9), "d_model": whole(g, 4, 9),
                          "n_heads": whole(g, 2, 5), "n_experts": whole(g, 6, 12)},
        hint="The batch comes first and the position second, for experts too. Only a pattern is [b head query key].",
        point="Batch first, position second, at every point: a slice of positions never takes an expert by mistake.",
        solution='''\
def shapes(b, s, d_model, n_heads, n_experts):
    """The shapes of three recorded values."""
    return {
        "hook_resid_post": (b, s, d_model),
        "hook_pattern": (b, n_heads, s, s),
        "hook_router_logits": (b, s, n_experts),
    }
''',
        mistakes={
            "the router's logits lose their batch, as some libraries have it": '''\
def shapes(b, s, d_model, n_heads, n_experts):
    return {
        "hook_resid_post": (b, s, d_model),
        "hook_pattern": (b, n_heads, s, s),
        "hook_router_logits": (b * s, n_experts),
    }
''',
            "a pattern has the sink as one more key": '''\
def shapes(b, s, d_model, n_heads, n_experts):
    return {
        "hook_resid_post": (b, s, d_model),
        "hook_pattern": (b, n_heads, s, s + 1),
        "hook_router_logits": (b, s, n_experts),
    }
''',
        },
    ),
)  # fmt: skip
