"""Timing in turn, and the paired statistics that other load on the machine disturbs least."""
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Times:
    """Seconds of one run, one number a round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def interleave(runs: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3, seed: int = 0) -> dict[str, Times]:
    """Call every run once a round, each round in an order of its own; the first `warm_up` rounds are not kept."""
    times, order = {name: Times() for name in runs}, random.Random(seed)
    for number in range(-warm_up, rounds):
        for name in order.sample(sorted(runs), len(runs)):
            cpu, wall = time.process_time(), time.perf_counter()
            runs[name]()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if number >= 0:
                times[name].cpu.append(cpu)
                times[name].wall.append(wall)
    return times


@dataclass(frozen=True)
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    def __str__(self):
        return f"{self.median:6.3f} ({self.low:.3f} to {self.high:.3f})"


def spread(values: list[float]) -> Spread:
    """The quartiles of at least two values, by linear interpolation."""
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Round by round: what slowed a whole round cancels."""
    return [a / b for a, b in zip(over, under, strict=True)]


@dataclass(frozen=True)
class Goal:
    """A bound on the median of `over` / `under`."""

    over: str
    under: str
    at_most: float | None = None
    at_least: float | None = None

    def verdict(self, median: float) -> str:
        """What the bound is and whether it holds; nothing where there is none."""
        if self.at_most is not None:
            return f"at most {self.at_most:.2f}: " + ("reached" if median <= self.at_most else "MISSED")
        if self.at_least is not None:
            return f"at least {self.at_least:.2f}: " + ("reached" if median >= self.at_least else "MISSED")
        return ""


def report(title: str, times: dict[str, Times], goals: list[Goal]) -> None:
    """Print medians in milliseconds, then every ratio whose two runs are there, in CPU time and by the clock."""
    rounds = len(next(iter(times.values())).cpu)
    print(f"\n{title}: {rounds} rounds, load {os.getloadavg()[0]:.1f}", flush=True)
    for name, each in times.items():
        cpu, wall = (1000 * statistics.median(x) for x in (each.cpu, each.wall))
        print(f"    {name:<44} CPU {cpu:9.2f} ms    wall {wall:9.2f} ms")
    for goal in goals:
        if goal.over in times and goal.under in times:
            over, under = times[goal.over], times[goal.under]
            cpu, wall = spread(ratios(over.cpu, under.cpu)), spread(ratios(over.wall, under.wall))
            what = f"{goal.over} / {goal.under}"
            line = f"    {what:<58} CPU {cpu}    wall {wall.median:6.3f}    {goal.verdict(cpu.median)}"
            print(line.rstrip(), flush=True)
