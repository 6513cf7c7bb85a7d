"""For `bench/gpu.py`: a row of its table, and what its parts share: the model, the clock, the time that is left."""
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from bench import gpu_checks
from bench.gpu_models import model_of, random_state
from bench.timing import spread
from gptoss_lab import Config, GptOss

GIB = 2**30


@dataclass
class Row:
    """One line of the table: a median with its quartiles, and what it should be."""

    name: str
    measured: float | None = None
    unit: str = ""
    goal: float | None = None
    stretch: float | None = None
    at_most: bool = False  # less is better
    quartiles: tuple[float, float] | None = None
    note: str = ""
    part: str = ""

    @classmethod
    def of_check(cls, check: gpu_checks.Check) -> "Row":
        name, error, allowed = check
        return cls(name, error, gpu_checks.UNIT, allowed, at_most=True)

    def reaches(self, bound: float | None) -> bool:
        return bound is not None and (self.measured <= bound if self.at_most else self.measured >= bound)

    @property
    def verdict(self) -> str:
        if self.measured is None or self.goal is None:
            return ""
        if self.unit == gpu_checks.UNIT:
            return "agrees" if self.reaches(self.goal) else "DISAGREES"
        return "stretch" if self.reaches(self.stretch) else "goal" if self.reaches(self.goal) else "MISSED"


def of(name: str, values: list[float], unit: str = "", *bounds: float | None, note: str = "", at_most=False) -> Row:
    """A row of repeated values; bounds: goal, stretch."""
    quartiles = None
    if len(values) > 1:
        some = spread(values)
        quartiles = some.low, some.high
    runs = f"{len(values)} run{'s' * (len(values) > 1)}"
    note = f"{runs}; {note}" if note else runs
    return Row(name, statistics.median(values), unit, *bounds, quartiles=quartiles, note=note, at_most=at_most)


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are the goals'."""

    short: int = 1024
    checked: int = 200
    filled: int = 4700
    prompt: int = 8192
    probed: int = 16_384
    contexts: tuple[int, ...] = (32_768, 131_072)
    windows: int = 7
    warm: int = 12
    timed: int = 96
    rounds: int = 5
    chunks: tuple[int, ...] = (2048, 8192)
    copied: int = 2 * GIB
    product: int = 8192


REHEARSAL = Sizes(20, 75, 80, 48, 40, (128,), windows=2, warm=10, timed=3, rounds=2, chunks=(256,), copied=2**16,
                  product=64)  # fmt: skip


@dataclass
class Run:
    """What the parts share."""

    device: torch.device
    dtype: torch.dtype
    config: Config
    sizes: Sizes
    deadline: float = float("inf")  # of the part that runs, on the monotonic clock
    bandwidth: float | None = None  # bytes read and written a second, measured in this run
    facts: dict[str, str] = field(default_factory=dict)

    @cached_property
    def model(self) -> GptOss:
        return model_of(self.config, random_state(self.config, self.device, self.dtype))

    def release(self) -> None:
        """Give the model's memory back; who asks for it again makes it again."""
        vars(self).pop("model", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def on_h200(self, *bounds: float) -> tuple[float | None, ...]:
        """Bounds in seconds or tokens, which were set for one card and the whole model."""
        there = "H200" in self.facts.get("GPU", "") and self.config.n_layers == 24
        return bounds if there else (None,) * len(bounds)

    def timed(self, call: Callable) -> tuple[float, float]:
        """Seconds by the clock, and between two events on the device; all work on it is waited for."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began,) * 2
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return time.perf_counter() - began, begin.elapsed_time(end) / 1000

    def in_turn(self, calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
        """What each returns, each round in another order; fewer rounds where time is short, at least one."""
        found, order, longest = {name: [] for name in calls}, random.Random(0), 0.0
        for number in range(rounds):
            if number and self.left < 1.5 * longest:
                break
            began = time.monotonic()
            for name in order.sample(sorted(calls), len(calls)):
                found[name].append(calls[name]())
            longest = max(longest, time.monotonic() - began)
        return found

    def text(self, n: int) -> torch.Tensor:
        """Random tokens, none of them special.   -> [1 n]"""
        return torch.randint(self.config.d_vocab // 2, (1, n), generator=torch.Generator().manual_seed(0))
