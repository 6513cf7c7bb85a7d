"""The exercises of lesson 13, Hooks."""
import torch
from torch import Generator, Tensor

from ..config import FULL, SLIDING, Config
from ..hooks import record
from ..model import GptOss
from .exercise import Exercise, normal, whole

SHAPES = ("attn.hook_k", "attn.hook_sink_mass", "attn.hook_result", "mlp.hook_expert_out")


@torch.no_grad()
def small_model(g: Generator, *, d: int = 8, H: int = 4, K: int = 2, h: int = 4, E: int = 6, k: int = 3) -> GptOss:
    """A model of two layers, every weight of it drawn. The letters are those of `model.hook_points`."""
    model = GptOss(Config(
        n_layers=2, d_model=d, n_heads=H, n_kv_heads=K, d_head=h, d_ff=6, n_experts=E, experts_per_token=k, d_vocab=23,
        n_ctx=32, sliding_window=4, layer_types=(SLIDING, FULL),
    ))  # fmt: skip
    for weight in model.parameters():
        weight.copy_(normal(g, *weight.shape, scale=0.7))
    return model.eval()


def shapes(b: int, s: int, d: int, H: int, K: int, h: int, E: int, k: int) -> dict:
    """What a model of these sizes really gives."""
    model = small_model(torch.Generator().manual_seed(0), d=d, H=H, K=K, h=h, E=E, k=k)
    with torch.no_grad(), record(model, *(f"blocks.0.{name}" for name in SHAPES)) as acts:
        model(torch.zeros(b, s, dtype=torch.long))
    return {name: tuple(acts[f"blocks.0.{name}"].shape) for name in SHAPES}


def read(model: GptOss, tokens: Tensor, name: str) -> Tensor:
    """What the package's own `record` gives."""
    with torch.no_grad(), record(model, name) as acts:
        model(tokens)
    return acts[name]


def without_head(z: Tensor, head: int) -> Tensor:
    """What the heads read, one of them silenced.   [b s H h]"""
    out = torch.zeros_like(z)
    for one in range(z.shape[2]):
        if one != head:
            out[:, :, one] = z[:, :, one]
    return out


def _sizes(g: Generator) -> dict:
    K = whole(g, 1, 2)
    return {"b": whole(g, 1, 3), "s": whole(g, 2, 5), "d": whole(g, 5, 9), "H": K * whole(g, 2, 3), "K": K,
            "h": 2 * whole(g, 1, 3), "E": whole(g, 5, 8), "k": whole(g, 2, 4)}  # fmt: skip


def _run(g: Generator) -> dict:
    model = small_model(g)
    names = list(model.hook_points)
    return {"model": model, "tokens": torch.randint(23, (2, whole(g, 2, 6)), generator=g),
            "name": names[whole(g, 0, len(names) - 1)]}  # fmt: skip


def _heads(g: Generator) -> dict:
    n_heads = whole(g, 2, 5)
    return {"z": normal(g, whole(g, 1, 3), whole(g, 2, 5), n_heads, whole(g, 2, 6)), "head": whole(g, 0, n_heads - 1)}


EXERCISES = (
    Exercise(
        "13.2", shapes, inputs=_sizes,
        hint="Look the four up in the table above. Query heads and key heads are not equally many; where a score or a "
             "share is meant, heads come before positions.",
        point="Batch first, position second, then heads or expert slots. Only what belongs to a [query key] matrix "
              "has its heads before its positions.",
        solution='''\
def shapes(b, s, d, H, K, h, E, k):
    """The shapes of four recorded values, as tuples."""
    return {
        "attn.hook_k": (b, s, K, h),
        "attn.hook_sink_mass": (b, H, s),
        "attn.hook_result": (b, s, H, d),
        "mlp.hook_expert_out": (b, s, k, d),
    }
''',
        mistakes={
            "there are as many key heads as query heads": '''\
def shapes(b, s, d, H, K, h, E, k):
    return {"attn.hook_k": (b, s, H, h), "attn.hook_sink_mass": (b, H, s),
            "attn.hook_result": (b, s, H, d), "mlp.hook_expert_out": (b, s, k, d)}
''',
            "every expert answers, not only the chosen ones": '''\
def shapes(b, s, d, H, K, h, E, k):
    return {"attn.hook_k": (b, s, K, h), "attn.hook_sink_mass": (b, H, s),
            "attn.hook_result": (b, s, H, d), "mlp.hook_expert_out": (b, s, E, d)}
''',
            "the experts see a flat list of tokens": '''\
def shapes(b, s, d, H, K, h, E, k):
    return {"attn.hook_k": (b, s, K, h), "attn.hook_sink_mass": (b, H, s),
            "attn.hook_result": (b, s, H, d), "mlp.hook_expert_out": (b * s, k, d)}
''',
            "a head's write is as short as what it read": '''\
def shapes(b, s, d, H, K, h, E, k):
    return {"attn.hook_k": (b, s, K, h), "attn.hook_sink_mass": (b, H, s),
            "attn.hook_result": (b, s, H, h), "mlp.hook_expert_out": (b, s, k, d)}
''',
        },
    ),
    Exercise(
        "13.3", read, inputs=_run,
        hint="`path, leaf = model.hook_points[name].place` says who makes the value and what it calls it. Set "
             "`model.get_submodule(path).listeners = {leaf: (listener,)}`, where the listener keeps x and returns it.",
        point="This is all that a hook is: a function that is called with the value on its way. What `record` adds "
              "is order, names, joined passes, and that it cleans up whatever happens.",
        solution='''\
def read(model, tokens, name):
    """The value of one hook point, taken while the model runs."""
    path, leaf = model.hook_points[name].place
    module, kept = model.get_submodule(path), []

    def listener(x):
        kept.append(x.clone())
        return x

    module.listeners = {leaf: (listener,)}
    try:
        model(tokens)
    finally:
        module.listeners = {}
    return kept[0]
''',
        mistakes={
            "nobody is called: the model itself says q where the full name says hook_q": '''\
def read(model, tokens, name):
    path, _, leaf = name.rpartition(".")
    module, kept = model.get_submodule(path), []

    def listener(x):
        kept.append(x.clone())
        return x

    module.listeners = {leaf: (listener,)}
    model(tokens)
    module.listeners = {}
    return kept[0]
''',
            "the listener gives nothing back, and the model goes on with None": '''\
def read(model, tokens, name):
    path, leaf = model.hook_points[name].place
    module, kept = model.get_submodule(path), []
    module.listeners = {leaf: (kept.append,)}
    try:
        model(tokens)
    finally:
        module.listeners = {}
    return kept[0]
''',
            "the module's output is taken in place of the value inside it": '''\
def read(model, tokens, name):
    path, leaf = model.hook_points[name].place
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: kept.append(output))
    model(tokens)
    handle.remove()
    return kept[0]
''',
        },
    ),
    Exercise(
        "13.4", without_head, inputs=_heads, axes=("batch", "position", "head", "component"),
        hint="z is [b s H h]: the head is the third axis. Change a copy, z.clone().",
        point="An edit is a function from a value to a value of the same shape. `lab.edit` hands yours a copy; "
              "anywhere else, changing the input would change what the caller holds.",
        solution='''\
def without_head(z, head):
    """What the heads read, with one of them silenced: zero.   [b s H h]"""
    z = z.clone()
    z[:, :, head] = 0
    return z
''',
        mistakes={
            "a position is silenced for all heads": '''\
def without_head(z, head):
    z = z.clone()
    z[:, head % z.shape[1]] = 0
    return z
''',
            "all heads are silenced but this one": '''\
def without_head(z, head):
    out = torch.zeros_like(z)
    out[:, :, head] = z[:, :, head]
    return out
''',
            "one component of every head is zero": '''\
def without_head(z, head):
    z = z.clone()
    z[..., head % z.shape[-1]] = 0
    return z
''',
            "the caller's own values are overwritten": '''\
def without_head(z, head):
    z[:, :, head] = 0
    return z
''',
        },
    ),
)  # fmt: skip
