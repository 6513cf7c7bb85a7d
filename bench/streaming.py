"""What every head attends to: streamed beside the dense way, time and peak memory as the text grows.

Asked for: sink mass, entropy and mass on the last 128 keys, of every head and position. Dense: ours, from recorded
patterns; and Hugging Face's `output_attentions`, which gives patterns without the sink's own column.
"""
import gc
import subprocess
import sys

import torch

from gptoss_lab import KVCache, record
from gptoss_lab.config import FULL, TINY, published
from gptoss_lab.probes.streaming import attention

from . import models
from .timing import interleave, ratios, spread

WINDOW, CHUNK = 128, 512
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SHAPES = ("tiny", "20b-layer")


def model_of(shape: str, length: int) -> torch.nn.Module:
    """The tiny model's shape, or one full layer of the 20B with two experts and a small vocabulary; random weights."""
    config = TINY.with_(yarn=None, n_ctx=length)
    if shape == "20b-layer":
        config = published("gpt-oss-20b").with_(n_layers=1, layer_types=(FULL,), n_experts=2, experts_per_token=1,
                                                d_vocab=512, d_ff=64, stop_tokens=(), pad_token=None)  # fmt: skip
    return models.ours(config)


def streamed(model, tokens):
    cache = KVCache(model.config, capacity=tokens.shape[1])
    with attention(model, ["sink_mass", "entropy"], windows=[WINDOW]) as stream:
        for chunk in tokens.split(CHUNK, dim=1):  # one pass over all would make a [s s] mask of its own
            model(chunk, cache=cache, logits_to_keep=1)
    result = stream.result()
    return result.sink_mass.mean(), result.entropy.mean(), result.within.mean()


def dense(model, tokens):
    with record(model, "*.hook_pattern", "*.hook_sink_mass") as acts:
        model(tokens, logits_to_keep=1)
    return summary([acts["pattern", i] for i in range(model.config.n_layers)],
                   [acts["sink_mass", i] for i in range(model.config.n_layers)])  # fmt: skip


def summary(patterns, sinks):
    sink_mass, entropy, within = [], [], []
    for pattern, sink in zip(patterns, sinks):
        at = torch.arange(pattern.shape[-1])
        near = at[:, None] - at < WINDOW
        sink_mass.append(sink.mean())
        entropy.append((torch.special.entr(pattern).sum(-1) + torch.special.entr(sink)).mean())
        within.append((pattern * near).sum(-1).mean())
    return tuple(torch.stack(x).mean() for x in (sink_mass, entropy, within))


def hugging_face(peer, tokens):
    patterns = peer(tokens, output_attentions=True, logits_to_keep=1).attentions
    return summary(patterns, [1 - pattern.sum(-1) for pattern in patterns])


def calls(shape: str, length: int) -> dict:
    """What can be run at this length: the dense ways only where four [H s s] matrices fit into what is free."""
    from gptoss_lab.memory import free_bytes

    model = model_of(shape, length)
    tokens = torch.randint(model.config.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))
    ways = {"streamed": lambda: streamed(model, tokens)}
    need = 4 * (model.config.n_layers + 2) * model.config.n_heads * length**2
    if need < (free_bytes(torch.device("cpu")) or 0):
        ways["dense"] = lambda: dense(model, tokens)
        if not models.missing("transformers"):
            peer = models.hugging_face(model)
            ways["Hugging Face"] = lambda: hugging_face(peer, tokens)
    return ways


def main(rounds: int, lengths=LENGTHS, shapes=SHAPES) -> None:
    for shape in shapes:
        print(f"\n{shape}: CPU seconds a pass; as a multiple of streamed; MiB that the process grows by")
        for length in lengths:
            ways = calls(shape, length)
            with torch.no_grad():
                values = {name: torch.stack(call()) for name, call in ways.items()}
                for name, value in values.items():
                    torch.testing.assert_close(value, values["streamed"], atol=1e-3, rtol=1e-3,
                                               msg=lambda m, name=name: f"{name}: {m}")  # fmt: skip
                times = {name: one.cpu for name, one in interleave(ways, rounds, warm_up=0).items()}
            del ways
            gc.collect()
            for name, seconds in times.items():
                ratio, memory = spread(ratios(seconds, times["streamed"])), growth(shape, length, name)
                print(f"  {length:>6} {name:13} {spread(seconds).median:8.2f} s {ratio} {memory:8.0f} MiB", flush=True)


GROWTH = """
import re, sys, torch
from pathlib import Path
from bench import streaming
torch.set_num_threads(1), torch.set_grad_enabled(False)
shape, length, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
call = streaming.calls(shape, length)[way]
streaming.calls(shape, 256)[way]()
resident = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = resident("VmRSS")
call()
print(resident("VmHWM") - before)
"""


def growth(shape: str, length: int, way: str) -> float:
    """MiB by which the resident memory of a process of its own peaks in one pass, after a short one. Linux only."""
    done = subprocess.run([sys.executable, "-c", GROWTH, shape, str(length), way], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{way} at {length} tokens failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)
