"""For `bench/gpu.py`: what a process of its own takes on a card that is made small.

`python -m bench.gpu_memory CONTEXT` makes a random model as a plan lays it out, fills the cache, reads the last chunk
of a prompt and decodes; `python -m bench.gpu_memory FOLDER` loads a checkpoint. Prints one line of JSON.
"""
import argparse
import json

import torch

from bench.gpu_models import FIRST, SMALL, fill, first_layers, model_of, random_state
from bench.whole import Peak, anonymous
from gptoss_lab import Config, KVCache, generate, load
from gptoss_lab.config import published
from gptoss_lab.plan import plan

MEMORY = 16 * 2**30
NEW = 32  # tokens: a decode step is captured with the rest in place


def peaks(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {"allocated": 0, "reserved": 0}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def running(context: int, config: Config, device: torch.device, dtype: torch.dtype) -> dict:
    """The last chunk of a prompt and some new tokens, at the end of the context."""
    planned = plan(config, context=context, memory=MEMORY, device=device, dtype=dtype)
    if device.type == "cuda":  # the rest of a small card is the CUDA context's, which this does not bound
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (MEMORY - planned.own) / total))
    host = planned.embedding_on_host
    model = model_of(config, random_state(config, device, dtype, embedding_on_host=host))
    chunk = min(planned.chunk, context - NEW - 1)
    cache = fill(model, KVCache(config, capacity=context), context - NEW - chunk, chunk=chunk)
    generate(model, [FIRST] * chunk, NEW, stop=(), cache=cache, prefill_chunk=chunk)
    return peaks(device) | {"plan": planned.total, "own": planned.own, "chunk": planned.chunk, "host": host}


def loading(folder: str, device: torch.device) -> dict:
    """How far device and host memory rise over what stays, while a checkpoint is loaded."""
    torch.zeros(1, device=device)  # the CUDA context is none of it
    before = anonymous()
    with Peak() as peak:
        model = load(folder, device=device)
    tensors = model.state_dict().values()
    here = sum(x.nbytes for x in tensors if x.device.type == "cuda")
    pinned = sum(x.nbytes for x in tensors if x.device.type == "cpu") if device.type == "cuda" else 0
    return {"device": max(0, peaks(device)["allocated"] - here), "host": max(0, peak.n_bytes - before - pinned)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    config = SMALL if args.small else published("gpt-oss-20b")
    config = first_layers(config, args.layers or config.n_layers)
    narrow = args.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    with torch.no_grad():
        result = (running(int(args.what), config, args.device, torch.float16 if narrow else torch.bfloat16)
                  if args.what.isdigit() else loading(args.what, args.device))  # fmt: skip
    print(json.dumps(result))
