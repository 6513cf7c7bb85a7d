"""For `bench/gpu.py`: random packed models made where they are used, and caches filled without reading a text."""
import torch
from torch import Tensor

from gptoss_lab import Config, GptOss, KVCache, Yarn
from gptoss_lab.config import FULL, SLIDING
from gptoss_lab.synth import FIRST_SCALE, N_SCALES

FIRST = 5  # the token that a measurement of decoding begins with; any will do

# Eight query heads share a key head of 64 numbers, as published; d_ff != d_model shows a transposed product.
SMALL = Config(
    n_layers=4, d_model=256, n_heads=16, n_kv_heads=2, d_head=64, d_ff=192, n_experts=8, experts_per_token=4,
    d_vocab=512, n_ctx=2048, sliding_window=32, layer_types=(SLIDING, FULL) * 2, yarn=Yarn(8.0, 256),
)  # fmt: skip


def first_layers(config: Config, n: int) -> Config:
    return config.with_(n_layers=n, layer_types=config.layer_types[:n])


def random_state(
    config: Config, device, dtype: torch.dtype, seed: int = 0, sharp: bool = False, embedding_on_host: bool = False
) -> dict[str, Tensor]:
    """Weights in MXFP4 and `dtype`, sized as `gptoss_lab.synth` does; each is made in place, no second copy exists.

    sharp: attention looks at few keys and writes as much as the experts do, and these pass the clamp of SwiGLU: a wrong
    key or a missing clamp then shows.
    """
    with torch.device("meta"):
        wanted = GptOss(config, packed=True).state_dict()
    g, state = torch.Generator(device).manual_seed(seed), {}
    for name, like in wanted.items():
        if like.dtype == torch.uint8:
            low, high = 0, 256
            if name.endswith("scales"):  # synth's are right for rows of 2,880 numbers
                shift = round(torch.tensor(90 / like.shape[-1]).log2().item() / 2)
                low = FIRST_SCALE + shift + sharp * (1 if "gate_up" in name else -2)
                high = low + N_SCALES
            state[name] = torch.randint(low, high, like.shape, generator=g, dtype=torch.uint8, device=device)
            continue
        mean, spread = (1.0, 0.1) if ".ln" in name or name.startswith("ln") else (0.0, 0.1)
        if name.endswith(("sinks", "embed.weight")) and not name.startswith("unembed"):
            spread = 1.0
        elif like.dim() > 1 and not name.endswith("bias"):
            spread = like.shape[-1] ** -0.5 * (1.5 if sharp and ".attn." in name else 1)
        state[name] = torch.empty(like.shape, dtype=dtype, device=device).normal_(mean, spread, generator=g)
        if embedding_on_host and name == "embed.weight":
            state[name] = state[name].cpu().pin_memory()
    return state


def model_of(config: Config, state: dict[str, Tensor]) -> GptOss:
    """These tensors themselves, no copies, in a model."""
    with torch.device("meta"):
        model = GptOss(config, packed=True)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def converted(state: dict[str, Tensor], device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same numbers elsewhere and in another dtype; packed ones stay packed."""
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in state.items()}


@torch.no_grad()
def fill(model: GptOss, cache: KVCache, n: int, seed: int = 0, chunk: int = 2048) -> KVCache:
    """Add n columns of random keys and values, as a pass over n tokens would, without the pass."""
    c, device = model.config, model.unembed.weight.device
    g = torch.Generator(device).manual_seed(seed)
    for at in range(0, n, chunk):
        here = min(chunk, n - at)
        positions = cache.place(torch.zeros(1, here, dtype=torch.long, device=device), None)
        for layer in range(c.n_layers):
            shape = 2, 1, here, c.n_kv_heads, c.d_head
            k, v = torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16).to(model.unembed.weight.dtype)
            cache.extend(layer, k, v)
        cache.commit(positions)
    return cache


def key_bytes(model: GptOss, context: int) -> int:
    """Bytes of keys and values that one token after `context` others reads."""
    c = model.config
    seen = sum(min(c.window(layer) or context, context) for layer in range(c.n_layers))
    return seen * 2 * c.n_kv_heads * c.d_head * model.unembed.weight.dtype.itemsize
