"""`python bench/gpu.py`: on a machine with an NVIDIA GPU, correctness first, then every measurement of the 20B there.

Weights are random numbers in the 20B's shapes, made on the device. Each part has its share of the time and what earlier
parts left of theirs; what time does not suffice for is listed as not measured, and a part that fails does not stop the
next. Where a fast path disagrees with the readable one nothing is measured. Kernels are compiled when they are first
used and kept on the disk: a second run has more time for the rest.
"""
import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: Python looks beside it, and not where `bench` and `gptoss_lab` are
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from bench import gpu_checks, gpu_peers, whole  # noqa: E402
from bench.gpu_models import FIRST, SMALL, fill, first_layers, key_bytes  # noqa: E402
from bench.gpu_run import GIB, REHEARSAL, Row, Run, Sizes, of  # noqa: E402
from bench.timing import ratios  # noqa: E402
from gptoss_lab import KVCache, fast, generate, record, stream  # noqa: E402
from gptoss_lab.config import published  # noqa: E402
from gptoss_lab.probes.streaming import attention  # noqa: E402
from gptoss_lab.synth import synthesise  # noqa: E402

# ------------------------------------------------------------------------------------------ parts


def machine(run: Run) -> Iterator[Row]:
    """What this is, and its two limits."""
    run.facts |= {"date": time.strftime("%Y-%m-%d %H:%M"), "Python": platform.python_version(),
                  "torch": torch.__version__, "layers": str(run.config.n_layers)}  # fmt: skip
    if run.device.type == "cuda":
        import triton

        p = torch.cuda.get_device_properties(run.device)
        run.facts |= {"GPU": p.name, "compute capability": f"{p.major}.{p.minor}", "triton": triton.__version__,
                      "memory": f"{p.total_memory / GIB:.2f} GiB", "CUDA": str(torch.version.cuda)}  # fmt: skip
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            run.facts["driver"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError):
            run.facts["driver"] = "unknown"
    source = torch.randn(run.sizes.copied // 4, device=run.device)
    target = torch.empty_like(source)
    copies = [2 * source.nbytes / run.timed(lambda: target.copy_(source))[1] for _ in range(13)][3:]
    run.bandwidth = statistics.median(copies)
    yield of("copy on the device, read and written", [x / 1e12 for x in copies], "TB/s")
    n = run.sizes.product
    a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
    products = [2 * n**3 / run.timed(lambda: a @ b)[1] / 1e12 for _ in range(13)][3:]
    yield of(f"matrix product of {n}, {run.dtype}, random numbers", products, "TFLOP/s")


def correctness(run: Run) -> Iterator[Row]:
    """Fast paths against the readable one: small models in float32 and in 16 bits, two layers of the real sizes."""
    for dtype in (torch.float32, run.dtype) if run.device.type == "cuda" else (torch.float32,):
        yield from map(Row.of_check, gpu_checks.small(run.device, dtype, run.sizes.checked))
    yield from map(Row.of_check, gpu_checks.layers(run.config, run.device, run.dtype, run.sizes.filled))


def filled(run: Run, context: int) -> KVCache:
    """A cache whose keys and values are random: a prefill of 131,072 tokens is measured elsewhere."""
    steps = 2 * (run.sizes.windows + 2) * (run.sizes.warm + run.sizes.timed)
    context = min(context, run.config.n_ctx - steps)
    return fill(run.model, KVCache(run.config, capacity=context + steps), context)


def window(run: Run, cache: KVCache, names=()) -> tuple[float, float]:
    """Seconds a token, by the clock and by events: tokens of `stream`, after those in which it makes its graph."""
    warm, n = run.sizes.warm, run.sizes.timed
    with record(run.model, *names) if names else nullcontext():
        steps = stream(run.model, [FIRST], warm + n, stop=(), cache=cache)
        deque(islice(steps, warm), maxlen=0)
        taken = run.timed(lambda: deque(islice(steps, n), maxlen=0))
        steps.close()
    return taken[0] / n, taken[1] / n


def decode(run: Run) -> Iterator[Row]:
    """One token after another, batch 1, at a short and at the longest context."""
    weights = whole.read_a_token(run.model)
    for context, bounds in ((run.sizes.short, (0.55, 0.70)), (run.config.n_ctx, (0.60, 0.74))):
        cache = filled(run, context)
        context = cache.length
        taken = [window(run, cache) for _ in range(run.sizes.windows + 1)][1:]
        clock, events = zip(*taken)
        read = weights + key_bytes(run.model, (context + cache.length) // 2)
        name = f"decode after {context:,} (random keys and values)"
        yield of(name, [1 / x for x in clock], "tokens/s", note="by the clock")
        yield of(f"{name}, events", [1 / x for x in events], "tokens/s")
        if run.bandwidth:
            limit = f"limit {run.bandwidth / read:,.0f} tokens/s: {read:,} bytes a token at the copy's bandwidth"
            yield of(f"{name}, share of the limit", [read / x / run.bandwidth for x in clock], "", *bounds, note=limit)
        yield from profiled(run, cache)


def profiled(run: Run, cache: KVCache) -> Iterator[Row]:
    """Where one step spends its time."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = run.device.type == "cuda"
    steps = stream(run.model, [FIRST], run.sizes.warm + 2, stop=(), cache=cache)
    deque(islice(steps, run.sizes.warm), maxlen=0)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen:
        wall, _ = run.timed(lambda: next(steps))
    steps.close()
    spent, calls = Counter(), Counter()
    for event in seen.events():
        if (event.device_type.name == "CUDA") == on_gpu:
            spent[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            calls[event.name] += 1
    total = sum(spent.values())
    note = f"{calls.total()} of them; the step took {1000 * wall:.2f} ms"
    yield Row("one step under the profiler: its kernels", total / 1000, "ms", note=note)
    if on_gpu:
        launched = sum(event.name == "cudaGraphLaunch" for event in seen.events())
        yield Row("one step: CUDA graphs launched", launched, "", 1, note="0: the step ran without one")
    for name, us in spent.most_common(12):
        yield Row(f"of one step: {name[:60]}", us / total, "", note=f"{calls[name]} times, {us:,.0f} us")


def recording(run: Run) -> Iterator[Row]:
    """Residuals, router and sink mass of every layer recorded while `stream` runs, over the same without."""
    cache = filled(run, run.sizes.short)
    calls = {"plain": lambda: window(run, cache)[0], "recorded": lambda: window(run, cache, gpu_checks.RECORDED)[0]}
    run.in_turn(calls, 1)
    taken = run.in_turn(calls, run.sizes.windows)
    note = f"{1 / statistics.median(taken['plain']):,.0f} tokens/s without"
    yield of("decode recorded over not recorded", ratios(taken["recorded"], taken["plain"]), "x", 1.03, 1.01,
             note=note, at_most=True)  # fmt: skip


def reading(run: Run, tokens: torch.Tensor, chunk: int) -> float:
    """Seconds until the first new token."""
    return run.timed(lambda: generate(run.model, tokens, 1, stop=(), prefill_chunk=chunk))[0]


def prefill(run: Run) -> Iterator[Row]:
    """A prompt read in chunks, as `generate` does, to the first new token."""
    tokens = run.text(run.sizes.prompt)
    calls = {str(chunk): lambda chunk=chunk: reading(run, tokens, chunk) for chunk in run.sizes.chunks}
    run.in_turn(calls, 1)
    taken = run.in_turn(calls, run.sizes.rounds)
    name = lambda chunk: f"prefill of {tokens.numel():,}, {int(chunk):,} at a time"
    for chunk, seconds in taken.items():
        yield of(name(chunk), [tokens.numel() / x for x in seconds], "tokens/s", *run.on_h200(25e3, 45e3))
    chunk = min(taken, key=lambda one: statistics.median(taken[one]))
    tokens = run.text(run.config.n_ctx)
    seconds = run.in_turn({"": lambda: reading(run, tokens, int(chunk))}, 3)[""]
    yield of(name(chunk), seconds, "s", *run.on_h200(10, 6), at_most=True)


def probes(run: Run) -> Iterator[Row]:
    """Sink mass, entropy and mass on five roles of every head, layer and position over the same prefill without."""
    sums = lambda made: {name: x.sum(-1) for name, x in made.items()}
    for n in (run.sizes.probed, run.config.n_ctx):
        tokens, labels = run.text(n), (torch.arange(n) * 5 // n).to(run.device)

        def probed(tokens=tokens, labels=labels) -> float:
            with attention(run.model, ["sink_mass", "entropy"], labels=labels, reduce=sums) as found:
                seconds = reading(run, tokens, run.sizes.chunks[0])
            assert all(x.isfinite().all() for made in found.reduced().values() for x in made[-1].values())
            return seconds

        calls = {"plain": lambda tokens=tokens: reading(run, tokens, run.sizes.chunks[0]), "probed": probed}
        if n == run.sizes.probed:
            run.in_turn(calls, 1)
        taken = run.in_turn(calls, run.sizes.rounds)
        bounds = (2.0, 1.5) if n == run.config.n_ctx else (None, None)
        yield of(f"streaming probes over plain prefill, {n:,}", ratios(taken["probed"], taken["plain"]), "x", *bounds,
                 note=f"plain {statistics.median(taken['plain']):.2f} s", at_most=True)  # fmt: skip


def alone(run: Run, what: str) -> tuple[dict, int | None]:
    """What a process of its own measures; and by how much the device's memory shrank meanwhile, all of it included."""
    command = [sys.executable, "-m", "bench.gpu_memory", what, "--device", run.device.type]
    command += ["--layers", str(run.config.n_layers)] + ["--small"] * (run.device.type != "cuda")
    free = (lambda: torch.cuda.mem_get_info()[0]) if run.device.type == "cuda" else lambda: 0
    before = least = free()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            while child.poll() is None:
                least = min(least, free())
                time.sleep(0.01)
        finally:
            child.kill()  # out of time: it would go on
        out, err = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{what}: {(err.strip().splitlines() or [f'ended with {child.returncode}'])[-1]}")
    return json.loads(out.splitlines()[-1]), before - least


def memory(run: Run) -> Iterator[Row]:
    """What a process takes at a context, CUDA context included, beside the plan; what loading takes over what stays."""
    run.release()
    for context, goal in zip(run.sizes.contexts, (13.2, 15.5)):
        found, device = alone(run, str(context))
        goal = goal if run.config.n_layers == published("gpt-oss-20b").n_layers else None
        note = (f"16 GiB emulated on a device of {run.facts.get('memory')}; all of the process, as the device sees it; "
                f"chunk {found['chunk']}, embedding on the {'host' if found['host'] else 'device'}; filled with random "
                "keys, then a chunk read and some tokens made")  # fmt: skip
        yield Row(f"memory at {context:,}", device / GIB, "GiB", goal, at_most=True, note=note)
        note = f"reserved; {found['allocated'] / GIB:.2f} GiB allocated"
        yield Row(f"memory at {context:,}, PyTorch's", found["reserved"] / GIB, "GiB", note=note)
        note = f"of which {found['own'] / GIB:.2f} GiB assumed for the CUDA context"
        yield Row(f"memory at {context:,}, planned", found["plan"] / GIB, "GiB", note=note)
    with TemporaryDirectory() as folder:
        config = first_layers(run.config, 2)
        found, _ = alone(run, str(synthesise(config, Path(folder, "model"))))
    for where, peak in found.items():
        yield Row(f"loading two layers: {where}'s peak over what stays", peak / 2**20, "MiB", 300, at_most=True)


def half(run: Run) -> Iterator[Row]:
    """float16, as on a card without bfloat16."""
    if run.device.type == "cuda" and run.dtype != torch.float16:
        yield from map(Row.of_check, gpu_checks.small(run.device, torch.float16))
    yield from map(Row.of_check, gpu_checks.large_values(run.device))


@dataclass(frozen=True)
class Part:
    """One part of the measurements: what makes its rows, and its share of the time."""

    rows: Callable[[Run], Iterator[Row]]
    seconds: int

    @property
    def what(self) -> str:
        return self.rows.__doc__.splitlines()[0].rstrip(".")


PARTS = {
    "machine": Part(machine, 10), "correctness": Part(correctness, 170), "decode": Part(decode, 50),
    "recording": Part(recording, 20), "prefill": Part(prefill, 45), "probes": Part(probes, 45),
    "memory": Part(memory, 75), "peers": Part(gpu_peers.rows, 40), "half": Part(half, 25),
}  # fmt: skip
ALWAYS = ("machine", "correctness")  # the limits, and what makes other figures mean something


# ------------------------------------------------------------------------------------------ all of them


class OutOfTime(Exception):
    """A part has used its time."""


@contextmanager
def limit(seconds: float):
    """Raises OutOfTime inside the block when it takes longer."""

    def late(*_):
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, late)
    before = signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def measure(run: Run, parts: dict[str, Part], seconds: float, note: Callable[[list[Row]], None]):
    """-> all rows, and whether all is well: no part failed, nothing disagreed. `note` gets them after every part.

    Correctness that disagrees or fails ends it: what comes after would mean nothing.
    """
    rows, well, begun = [], True, time.monotonic()
    total, given = sum(part.seconds for part in parts.values()), 0
    for name, part in parts.items():
        found, failed, given = [], False, given + part.seconds
        run.deadline = begun + seconds * given / total
        try:
            with limit(run.left):
                for row in part.rows(run):
                    found.append(row)
        except OutOfTime:
            found.append(Row(f"not measured, the time was up: the rest of {name}", note=part.what))
            well = well and name != "correctness"
        except Exception as error:
            said = (str(error).strip().splitlines() or ["no message"])[0]
            found.append(Row(f"FAILED: {type(error).__name__}: {said}", note=f"the rest of {name}"))
            failed = True
        wrong = [row for row in found if row.unit == gpu_checks.UNIT and not row.reaches(row.goal)]
        for row in found:
            row.part = name
        rows, well = rows + found, well and not failed and not wrong
        note(rows)
        print(f"{name}: {len(found)} rows, {time.monotonic() - begun:.0f} s so far", flush=True)
        for row in wrong:
            print(f"DISAGREES: {row.name}: {row.measured:.2e}, at most {row.goal:.2e}", flush=True)
        if name == "correctness" and (wrong or failed):
            print("STOPPED: the fast paths do not give what the readable one gives, and no other figure would mean "
                  "anything", flush=True)  # fmt: skip
            break
    return rows, well


def number(x: float | None) -> str:
    return "" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def table(facts: dict[str, str], rows: list[Row]) -> str:
    """Markdown."""
    lines = ["; ".join(f"{name} {value}" for name, value in facts.items()), "",
             "| part | what | median | quartiles | unit | goal | stretch | verdict | note |", f"{'|---' * 9}|"]
    for row in rows:
        quartiles = " to ".join(map(number, row.quartiles or ()))
        sign = "at most " if row.at_most else "at least "
        bounds = [sign + number(bound) if bound is not None else "" for bound in (row.goal, row.stretch)]
        cells = [row.part, row.name, number(row.measured), quartiles, row.unit, *bounds, row.verdict, row.note]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, facts: dict[str, str], rows: list[Row]) -> None:
    """gpu.json and gpu.md: a reader finds the old file or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    finite = lambda x: x if x is not None and math.isfinite(x) else None  # JSON has no other numbers
    content = {"facts": facts, "rows": [asdict(row) | {"measured": finite(row.measured), "verdict": row.verdict}
                                        for row in rows]}  # fmt: skip
    for name, text in (("gpu.json", json.dumps(content, indent=1) + "\n"), ("gpu.md", table(facts, rows))):
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"of {', '.join(PARTS)}; {' and '.join(ALWAYS)} are always among them")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=480, help="for all parts together; default 480")
    parser.add_argument("--layers", type=int, help="so many layers of the 20B, for a trial; default all 24")
    parser.add_argument("--out", type=Path, help="a folder for gpu.json and gpu.md, written after every part, and not "
                                                 "by a rehearsal")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="run all of it on the CPU, very small, for no figures")
    args = parser.parse_args(arguments)
    parts = {name: part for name, part in PARTS.items() if name in (*args.parts, *ALWAYS)}
    if args.rehearse:
        torch.set_num_threads(1)  # tensors are too small for more
        config = first_layers(SMALL.with_(n_ctx=640), args.layers or 2)
        run = Run(torch.device("cpu"), torch.bfloat16, config, REHEARSAL)
    elif not torch.cuda.is_available():
        print("PyTorch finds no NVIDIA GPU here: nothing is measured. --rehearse runs the script without one.")
        return 1
    elif not fast.gpu.installed() or os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("There are no kernels: Triton is missing, or GPTOSS_LAB_FAST=0 or TRITON_INTERPRET is set. Nothing is "
              "measured.")  # fmt: skip
        return 1
    else:
        config = published("gpt-oss-20b")
        narrow = torch.cuda.get_device_capability() < (8, 0)
        run = Run(torch.device("cuda"), torch.float16 if narrow else torch.bfloat16,
                  first_layers(config, args.layers or config.n_layers), Sizes())  # fmt: skip
    note = (lambda rows: write(args.out, run.facts, rows)) if args.out and not args.rehearse else lambda rows: None
    with torch.no_grad():
        rows, well = measure(run, parts, args.seconds, note)
    if args.rehearse:
        for row in rows:
            if row.name.startswith(("FAILED", "not measured")):
                print(f"{row.part}: {row.name}")
        print("rehearsal: no figure here means anything")
    else:
        print(table(run.facts, rows))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
