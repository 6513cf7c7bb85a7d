"""A checkpoint of the whole 20B on the CPU, mapped: tokens a second, prefill, and the memory that is the process's own.

`gptoss-lab synth FOLDER` writes one with random contents. Every measurement is a process of its own, so that peaks are
its own too. The files are read once before each, so that they lie in the page cache as far as it has room: pages that
come from the disk all the same are counted. Linux only.
"""
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import gptoss_lab as lab

from .timing import spread

READ, WARM_UP, TIMED = 64, 16, 48  # tokens: a prompt that touches most experts, steps not counted, steps counted
PROMPT = 512
GIB = 2**30
GOALS = {"tokens": (2.3, 3.5), "memory": 2 * GIB}


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def pages_from_disk() -> int:
    """Waits of this process for a page of a file that memory did not hold (major faults)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class Peak:
    """The most that `anonymous` was, looked at every 5 ms inside the `with`."""

    def __enter__(self):
        self.n_bytes, self._ended = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self):
        while not self._ended.wait(0.005):
            self.n_bytes = max(self.n_bytes, anonymous())

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self.n_bytes = max(self.n_bytes, anonymous())


def read_a_token(model: lab.GptOss) -> int:
    """Bytes of weights that one token needs: the chosen experts, one row of the embedding, all of the rest."""
    c, total = model.config, 0
    for name, weight in model.state_dict().items():
        experts = ".gate_up." in name or ".down." in name
        share = c.experts_per_token / c.n_experts if experts else 1 / c.d_vocab if name.startswith("embed.") else 1
        total += weight.nbytes * share
    return round(total)


def bandwidth(n_bytes: int = GIB) -> float:
    """Bytes a second at which floats are summed, the best of five."""
    x, seconds = torch.ones(n_bytes // 4), []
    for _ in range(5):
        began = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - began)
    return n_bytes / min(seconds)


@torch.inference_mode()
def decode(folder: str) -> dict:
    """Steps of one token after a prompt; every token is drawn, so that the router chooses anew."""
    with Peak() as peak:
        model, g = lab.load(folder), torch.Generator().manual_seed(0)
        cache = lab.KVCache(model.config, capacity=READ + WARM_UP + TIMED)
        model(torch.randint(model.config.d_vocab // 2, (1, READ), generator=g), cache=cache, logits_to_keep=1)
        seconds, cpu = [], []
        for i, token in enumerate(torch.randint(model.config.d_vocab // 2, (WARM_UP + TIMED, 1, 1), generator=g)):
            if i == WARM_UP:
                before = pages_from_disk()
            wall, own = time.perf_counter(), time.process_time()
            logits = model(token, cache=cache)
            logits.argmax(-1).item()
            seconds.append(time.perf_counter() - wall)
            cpu.append(time.process_time() - own)
        assert logits.isfinite().all()
    faults = pages_from_disk() - before
    return {"seconds": seconds[WARM_UP:], "cpu": cpu[WARM_UP:], "first": seconds[:WARM_UP], "peak": peak.n_bytes,
            "kv": cache.n_bytes, "faults": faults, "read": read_a_token(model), "bandwidth": bandwidth()}  # fmt: skip


@torch.inference_mode()
def prefill(folder: str) -> dict:
    """A prompt in one pass, after a short one that has touched most of the pages."""
    with Peak() as peak:
        model, g = lab.load(folder), torch.Generator().manual_seed(0)
        for length in (READ, min(PROMPT, model.config.n_ctx)):
            tokens = torch.randint(model.config.d_vocab // 2, (1, length), generator=g)
            cache = lab.KVCache(model.config, capacity=length)
            wall, cpu, before = time.perf_counter(), time.process_time(), pages_from_disk()
            logits = model(tokens, cache=cache, logits_to_keep=1)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert logits.isfinite().all()
    faults = pages_from_disk() - before
    return {"n": length, "wall": wall, "cpu": cpu, "faults": faults, "peak": peak.n_bytes, "kv": cache.n_bytes}


def measured(what: str, folder: str, threads: int) -> dict:
    """One measurement in a process of its own, the files read through before it."""
    for path in Path(folder).glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    command = [sys.executable, "-m", "bench.whole", what, folder, str(threads)]
    # A thread that waits sleeps: where others work too, one that spins takes the core its partner needs.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"]
        raise RuntimeError(f"{what} with {threads} threads failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(result: dict) -> str:
    own = result["peak"] - result["kv"]
    return (f"{result['faults']:,} waits for the disk; anonymous memory at most {result['peak'] / GIB:.2f} GiB, of "
            f"which keys and values {result['kv'] / 2**20:.0f} MiB    at most 2 GiB without them: "
            + ("reached" if own <= GOALS["memory"] else "MISSED"))  # fmt: skip


def main(folder: str) -> None:
    """Print the table."""
    load = lambda: f"load {os.getloadavg()[0]:.1f}"
    print(f"\n{folder} on the CPU, mapped")
    result = measured("decode", folder, threads=2)
    steps, cpu = spread(result["seconds"]), statistics.median(result["cpu"])
    rate, limit = 1 / steps.median, result["bandwidth"] / result["read"]
    print(f"  decode, 2 threads, {TIMED} tokens after {READ} and {WARM_UP}, {load()}")
    first = 1 / statistics.median(result["first"])
    print(f"    {steps} s a token, CPU {cpu:.3f} s: {rate:.2f} tokens/s; the first {WARM_UP}: {first:.2f}")
    for goal, name in zip(GOALS["tokens"], ("goal", "stretch")):
        print(f"    {name}: at least {goal}: {'reached' if rate >= goal else 'MISSED'}")
    print(f"    {result['read']:,} bytes of weights a token: {result['read'] * rate / 1e9:.1f} GB/s. Summing floats "
          f"reads {result['bandwidth'] / 1e9:.1f} GB/s: {rate / limit:.0%} of {limit:.2f} tokens/s")  # fmt: skip
    print(f"    {memory(result)}", flush=True)
    for threads in (1, 2):
        result = measured("prefill", folder, threads)
        print(f"  prefill of {result['n']} tokens, {threads} thread{'s' * (threads > 1)}, {load()}")
        print(f"    {result['wall']:.1f} s, CPU {result['cpu']:.1f} s: {result['n'] / result['wall']:.1f} tokens/s")
        print(f"    {memory(result)}", flush=True)


if __name__ == "__main__":
    what, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps({"decode": decode, "prefill": prefill}[what](folder)))
