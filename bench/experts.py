"""The experts of one layer of the 20B on the CPU: packed, as they are stored; beside ggml's and Hugging Face's.

One token: what an expert takes, what the memory's bandwidth would allow, and its two products beside ggml's. Many: the
layer's mixture, over Hugging Face's eager experts in float32 on the same weights, unpacked. Random contents.
"""
import statistics

import torch

from gptoss_lab import GptOss, fast
from gptoss_lab.config import FULL, published
from gptoss_lab.fast import cpu
from gptoss_lab.memory import free_bytes
from gptoss_lab.synth import FIRST_SCALE, N_SCALES

from . import ggml, models
from .timing import Goal, interleave, report

TOKENS = 512
OURS, GGML, REPACKED = "ours, exact", "ggml, vector in 8 bits", "ggml, repacked, vector in 8 bits"
PRODUCT_GOALS = [Goal(OURS, GGML), Goal(OURS, REPACKED)]
GOALS = [Goal("ours, packed", "Hugging Face, dense float32", at_most=1.0)]


def layer(seed: int = 0):
    """The mixture of one layer, packed, its other weights in float32."""
    config = published("gpt-oss-20b").with_(n_layers=1, layer_types=(FULL,), d_vocab=32, stop_tokens=(), pad_token=None)
    model, g = GptOss(config, packed=True), torch.Generator().manual_seed(seed)
    moe = model.blocks[0].mlp
    for experts in (moe.gate_up, moe.down):
        experts.blocks.copy_(torch.randint(256, experts.blocks.shape, generator=g, dtype=torch.uint8))
        experts.scales.copy_(FIRST_SCALE + torch.randint(N_SCALES, experts.scales.shape, generator=g))
        experts.bias.data.normal_(0, 0.1, generator=g)
    moe.router.weight.data.normal_(0, config.d_model**-0.5, generator=g)
    return moe


def theirs(moe):
    """Hugging Face's experts with the same numbers, dense."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    c = moe.config
    config = GptOssConfig(hidden_size=c.d_model, intermediate_size=c.d_ff, num_local_experts=c.n_experts)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    state = {"gate_up_proj_bias": moe.gate_up.bias.data, "down_proj_bias": moe.down.bias.data}
    for name, ours in ("gate_up_proj", moe.gate_up), ("down_proj", moe.down):
        state[name] = torch.empty_like(getattr(experts, name), requires_grad=False)
        for i, dense in enumerate(state[name]):
            dense.copy_(ours.matrix(i).T)
    experts.load_state_dict(state, assign=True)
    return experts


def products(moe, rounds: int) -> None:
    """The two products of an expert and a vector beside ggml's, each checked against float64."""
    inputs = [torch.randn(1, 32 * layer.scales.shape[-1]) for layer in (moe.gate_up, moe.down)]
    pairs = list(zip((moe.gate_up, moe.down), inputs))

    def ours(expert):
        at = torch.tensor([expert]), torch.tensor([0])
        return [cpu.multiply(layer.blocks, layer.scales, *at, x)[0] for layer, x in pairs]

    ways = {OURS: ours}
    if why := ggml.missing():
        print(why)
    else:
        for name, repacked in {GGML: False, REPACKED: True}.items():
            theirs = [ggml.Matrices(layer.blocks, layer.scales, repacked) for layer, _ in pairs]
            ways[name] = lambda expert, theirs=theirs: [m(expert, x[0]) for m, (_, x) in zip(theirs, pairs)]

    exact = [layer.matrix(1).double() @ x[0].double() for layer, x in pairs]
    off = {name: max(((y - z).norm() / z.norm()).item() for y, z in zip(way(1), exact)) for name, way in ways.items()}
    for name, error in off.items():
        assert error < (1e-6 if name == OURS else 2e-2), f"{name}: relative error {error:.1e}"
    in_turn = {name: iter(range(10**9)) for name in ways}  # another expert each time, so that none lies in the cache
    calls = {name: lambda n=name: ways[n](next(in_turn[n]) % moe.config.n_experts) for name in ways}
    report("the two products of one expert, one token", interleave(calls, rounds), PRODUCT_GOALS)
    for name, error in off.items():
        print(f"    {name:<44} relative error {error:.1e} over float64")


def routed(moe, x):
    logits = moe.router(x)
    indices = logits.topk(moe.config.experts_per_token).indices
    return indices, logits.gather(-1, indices).softmax(-1)


@torch.no_grad()
def main(rounds: int) -> None:
    if cpu.compiled() is None:
        print("no C++ compiler: packed experts are unpacked whole, and there is nothing to measure here")
        return
    moe, g = layer(), torch.Generator().manual_seed(1)
    one, many = (torch.randn(1, n, moe.config.d_model, generator=g) for n in (1, TOKENS))
    in_turn = iter(range(10**9))  # another expert each time, so that none lies in the cache

    def expert():
        index = torch.tensor([[[next(in_turn) % moe.config.n_experts]]])
        return fast.mix_packed(moe, one, index, torch.ones(1, 1, 1))

    big = torch.randn(2**27)  # 512 MiB
    times = interleave({"one expert": expert, "reading 512 MiB": big.sum}, rounds)
    report("one token", times, [])
    n_bytes = sum(x[0].nbytes for e in (moe.gate_up, moe.down) for x in (e.blocks, e.scales))
    ms, read = (1000 * statistics.median(times[name].cpu) for name in ("one expert", "reading 512 MiB"))
    bandwidth = big.nbytes / read / 1e6
    print(f"    {n_bytes / ms / 1e6:.1f} GB/s of {n_bytes:,} packed bytes; summing floats reads {bandwidth:.1f} GB/s")
    for goal, name in ((5.5, "goal"), (3.5, "stretch")):
        print(f"    {name}: at most {goal} ms: {'reached' if ms <= goal else 'MISSED'}")
    products(moe, rounds)

    indices, weights = routed(moe, many)
    ways = {"ours, packed": lambda: fast.mix_packed(moe, many, indices, weights)}
    dense, free = 4 * 32 * sum(layer.scales.numel() for layer in (moe.gate_up, moe.down)), free_bytes(big.device)
    if why := models.missing("transformers"):
        print(why)
    elif free is not None and free < 1.25 * dense:
        print(f"Hugging Face's experts need {dense / 2**30:.1f} GiB, {free / 2**30:.1f} are free: left out")
    else:
        peer = theirs(moe)
        flat = many[0], indices[0], weights[0]
        torch.testing.assert_close(peer(*flat), ways["ours, packed"]()[0], atol=2e-3, rtol=2e-3)
        ways["Hugging Face, dense float32"] = lambda: peer(*flat)
    report(f"the mixture of one layer, {TOKENS} tokens", interleave(ways, max(2, rounds // 3), warm_up=1), GOALS)
