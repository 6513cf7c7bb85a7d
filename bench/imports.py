"""What an import costs: the CPU time of a fresh process, over one that imports torch alone."""
import os
import random
import statistics
import subprocess
import sys

from . import models
from .timing import spread

BASE, OURS = "import torch", "import gptoss_lab"
STATEMENTS = {
    BASE: None,
    OURS: None,
    "from transformers import GptOssForCausalLM": "transformers",
    "from transformer_lens.model_bridge import TransformerBridge": "transformer-lens",
    "import nnsight": "nnsight",
}
GOAL = 0.5  # seconds over torch


def cpu_seconds(statement: str) -> float:
    """User and system time of a Python process that runs `statement`."""
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main(rounds: int) -> None:
    """Time every import in turn, in a random order each round, after one round that warms the disk."""
    order, seconds = random.Random(0), {s: [] for s, peer in STATEMENTS.items() if not peer or not models.missing(peer)}
    for number in range(-1, rounds):
        for statement in order.sample(sorted(seconds), len(seconds)):
            spent = cpu_seconds(statement)
            if number >= 0:
                seconds[statement].append(spent)
    print(f"\nimports: {rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for statement, spent in seconds.items():
        over = spread([a - b for a, b in zip(spent, seconds[BASE], strict=True)])
        verdict = f"at most {GOAL:.2f}: {'reached' if over.median <= GOAL else 'MISSED'}" if statement == OURS else ""
        line = f"    {statement:<60} CPU {statistics.median(spent):6.2f} s    over torch {over} s    {verdict}"
        print(line.rstrip(), flush=True)
