"""Small random models on which every part of the architecture matters."""
import pytest
import torch

from gptoss_lab import Config, GptOss, Yarn, mxfp4, tokenizer
from gptoss_lab.config import FULL, SLIDING, TINY

# The end of a parameter's name: the mean and spread of a vector, or of what a matrix makes of inputs of size 1.
SPREADS = {
    "unembed.weight": (0, 2), "embed.weight": (0, 1), "ln1.weight": (1, 0.3), "ln2.weight": (1, 0.3),
    "ln_final.weight": (1, 0.3), "qkv.weight": (0, 1.2), "qkv.bias": (0, 0.5), "sinks": (0.5, 1.5),
    "out.weight": (0, 1.5), "out.bias": (0, 0.3), "router.weight": (0, 1.5), "router.bias": (0, 0.5),
    "gate_up.weight": (0, 3.7), "gate_up.bias": (0, 1.2), "down.weight": (0, 0.2), "down.bias": (0, 0.5),
}  # fmt: skip


def tiny_config(**changes) -> Config:
    """Four layers of 32, a window of 8 in a context of 128, rows that MXFP4 can pack; some sizes changed."""
    sizes = dict(
        n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_head=16, d_ff=64, n_experts=8, experts_per_token=3,
        d_vocab=61, n_ctx=128, sliding_window=8, rope_theta=1000.0, yarn=Yarn(4.0, 32, beta_fast=4.0),
    ) | changes  # fmt: skip
    sizes.setdefault("layer_types", tuple((SLIDING, FULL)[layer % 2] for layer in range(sizes["n_layers"])))
    return Config(**sizes)


def random_model(config: Config | None = None, seed: int = 0, dtype=torch.float64, packed=False) -> GptOss:
    """A model with no trivial weight: sinks, biases and gains count, some pre-activations pass the clamp of 7.

    Dense and packed models of one seed hold the same numbers; those of the experts are ones that MXFP4 holds.
    """
    config = config or tiny_config()
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, empty in GptOss(config).named_parameters():
        mean, spread = next(SPREADS[end] for end in SPREADS if name.endswith(end))
        if empty.dim() > 1 and name != "embed.weight" and not name.endswith("bias"):
            spread /= empty.shape[-1] ** 0.5
        x = mean + spread * torch.randn(empty.shape, generator=rng, dtype=torch.float64)
        if name.endswith(("gate_up.weight", "down.weight")):
            blocks, scales = mxfp4.pack(x)
            x = mxfp4.unpack(blocks, scales, torch.float64)
            if packed:
                path = name.removesuffix("weight")
                state |= {f"{path}blocks": blocks, f"{path}scales": scales}
                continue
        state[name] = x
    model = GptOss(config, packed=packed).to(dtype)
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def tiny_random(config: Config = TINY) -> GptOss:
    """The tiny model's shape and vocabulary; no sink, bias or gain is trivial, its logits vary by 1.5."""
    model, generator = GptOss(config), torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, device="cpu")
        if "ln" in name:
            weight.copy_(1 + 0.3 * noise)
        elif name.endswith("sinks"):
            weight.copy_(3 + noise)  # draws about a tenth of a head's probability
        elif name.endswith("bias"):
            weight.copy_(0.3 * noise)
        else:
            weight.copy_(noise if name == "embed.weight" else 1.5 * weight.shape[-1] ** -0.5 * noise)
    model.read_tokenizer = tokenizer.tiny
    return model.eval()


def random_tokens(config: Config, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch length]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(config.d_vocab, (batch, length), generator=rng)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """In a module that imports this: on tensors this small two threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
