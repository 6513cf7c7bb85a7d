"""The experts of one layer of the 20B on the CPU: packed, as they are stored; beside Hugging Face's dense ones.

One token: what an expert takes, and what the memory's bandwidth would allow. Many: the layer's mixture, over Hugging
Face's eager experts in float32 on the same weights, unpacked. Random contents.
"""
import statistics

import torch

from gptoss_lab import GptOss, fast
from gptoss_lab.config import FULL, published
from gptoss_lab.fast import cpu
from gptoss_lab.synth import FIRST_SCALE, N_SCALES

from . import models
from .timing import Goal, interleave, report

TOKENS = 512
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
        state[name] = torch.stack([ours.matrix(i).T for i in range(c.n_experts)])
    experts.load_state_dict(state, assign=True)
    return experts


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
    ms, read = (1000 * statistics.median(times[name].wall) for name in ("one expert", "reading 512 MiB"))
    bandwidth = big.nbytes / read / 1e6
    print(f"    {n_bytes / ms / 1e6:.1f} GB/s of {n_bytes:,} packed bytes; summing floats reads {bandwidth:.1f} GB/s")
    for goal, name in ((5.5, "goal"), (3.5, "stretch")):
        print(f"    {name}: at most {goal} ms: {'reached' if ms <= goal else 'MISSED'}")

    indices, weights = routed(moe, many)
    ways = {"ours, packed": lambda: fast.mix_packed(moe, many, indices, weights)}
    if why := models.missing("transformers"):
        print(why)
    else:
        peer = theirs(moe)
        flat = many[0], indices[0], weights[0]
        torch.testing.assert_close(peer(*flat), ways["ours, packed"]()[0], atol=2e-3, rtol=2e-3)
        ways["Hugging Face, dense float32"] = lambda: peer(*flat)
    report(f"the mixture of one layer, {TOKENS} tokens", interleave(ways, max(2, rounds // 3), warm_up=1), GOALS)
