"""The measured facts of the tiny model: card.json, the page made of it, and whether a new run agrees.

    python -m gptoss_lab.tiny.card RUNS

measures the six runs RUNS/{standard-0, standard-1, standard-2, no-sinks-0, direct-only-0, no-balance-0} that
`gptoss-lab train-tiny RUNS/standard-0 --seed 0` and so on have made, and writes the weights of seed 1 and the card.
"""
import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..shards import sha256
from . import WEIGHTS, untrained
from .measure import SECTIONS, measure
from .train import Recipe, Run

CARD = WEIGHTS.parent / "card.json"
SEEDS = {"tiny": "standard-1", "seed 0": "standard-0", "seed 2": "standard-2"}
CONTROLS = {  # run, and the sections that are about the difference
    "no sinks": ("no-sinks-0", ("loss", "induction")),
    "direct only": ("direct-only-0", ("loss", "thought")),
    "no balance": ("no-balance-0", ("loss", "routing")),
}


def card() -> dict:
    """The content of card.json: {"recipe", "weights_sha256", "training", "figures": {model: {section: ...}}}."""
    return json.loads(CARD.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Headline:
    """One number of the card, and how far a run with another seed may be from the three of the card."""

    text: str
    section: str
    figure: str
    margin: float
    best: bool = False  # of nested figures the largest: the best head

    def of(self, figures: dict) -> float:
        value = figures[self.section][self.figure]["value"]
        return max(_flat(value)) if self.best else value


def _flat(value) -> list[float]:
    return [x for one in value for x in _flat(one)] if isinstance(value, list) else [value]


HEADLINES = (
    Headline("held-out loss, nats", "loss", "all", 0.15),
    Headline("second copy at four windows, nats", "induction", "second_64", 0.5),
    Headline("the same without previous-token heads", "induction", "second_64_without_previous_token_heads", 2.0),
    Headline("best induction head at four windows", "induction", "prefix_64", 0.2, best=True),
    Headline("removing all sinks, nats", "sinks", "without_all", 1.0),
    Headline("best head's sink mass with nothing to copy", "sinks", "mass_first_64", 0.3, best=True),
    Headline("I(expert; domain | token), best layer, bits", "routing", "information_given_token", 0.2, best=True),
    Headline("loss at four times the length, YaRN", "yarn", "yarn_loss", 0.3),
    Headline("loss at four times the length, no extension", "yarn", "none_loss", 0.6),
    Headline("chain of three hops with an analysis", "thought", "hop_3_thinking", 0.2),
    Headline("chain of three hops, straight", "thought", "hop_3_straight", 0.2),
    Headline("sum of five with an analysis", "thought", "sum_5_thinking", 0.3),
    Headline("analysis at high effort", "thought", "analysis_at_high", 0.05),
    Headline("analysis at low effort", "thought", "analysis_at_low", 0.05),
    Headline("right calculator calls", "tools", "right_call", 0.2),
    Headline("recall accuracy", "patching", "accuracy", 0.1),
    Headline("MXFP4 experts, nats", "precision", "mxfp4_minus_dense", 0.01),
)


@dataclass(frozen=True)
class Comparison:
    """A new run beside the card. `print` it for a table."""

    rows: list[tuple[str, float, float, float, bool]]  # text, lowest and highest of the card, new, inside
    same_bytes: bool

    @property
    def ok(self) -> bool:
        return self.same_bytes or all(row[-1] for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row[0]) for row in self.rows)
        lines = [f"{'':{width}}  card, three seeds     this run"]
        lines += [f"{text:{width}}  {low:8.3f} to {high:8.3f}  {new:8.3f}  {'' if inside else 'OUTSIDE'}".rstrip()
                  for text, low, high, new, inside in self.rows]  # fmt: skip
        lines.append("the weights are those of the card, byte for byte" if self.same_bytes else
                     "the weights are others than the card's: rounding differs with machine, torch and the code")
        return "\n".join(lines)


def compare(folder: str | Path) -> Comparison:
    """Measure the model in `folder` and compare it with the spread of the card's three seeds."""
    from ..checkpoint import load

    known, new = card(), measure(load(folder, dtype=torch.float32))
    rows = []
    for one in HEADLINES:
        values = [one.of(known["figures"][name]) for name in SEEDS]
        low, high, value = min(values), max(values), one.of(new)
        rows.append((one.text, low, high, value, low - one.margin <= value <= high + one.margin))
    return Comparison(rows, sha256(Path(folder) / "model.safetensors") == known["weights_sha256"])


# ---------------------------------------------------------------------------------------- making the card


def make(runs: str | Path) -> dict:
    """Measure the six runs, and put the weights of the one that is shipped, and the card, in their places."""
    from ..checkpoint import load

    runs = Path(runs)
    wanted = {name: (run, tuple(SECTIONS)) for name, run in SEEDS.items()} | CONTROLS
    missing = [run for run, _ in wanted.values() if not (runs / run / "model" / "model.safetensors").is_file()]
    if missing:
        raise FileNotFoundError(f"{runs} lacks {', '.join(missing)}: train them first, each with "
                                "gptoss-lab train-tiny FOLDER [--seed N] [--variant NAME]")  # fmt: skip
    figures, training = {}, {}
    for name, (run, sections) in wanted.items():
        state = Run(runs / run, Recipe(int(run[-1]), run[:-2]))
        training[name] = {"cpu_seconds": round(state.cpu_seconds), "steps": state.done, "log": _rounded(state.log)}
        model = load(runs / run / "model", dtype=torch.float32)
        figures[name] = _measured(runs / run / "measured.json", model, sections)
    figures["tiny-random"] = _measured(runs / "random.json", untrained(), tuple(SECTIONS))
    model = runs / SEEDS["tiny"] / "model"
    content = {"recipe": asdict(Recipe(config=None)), "weights_sha256": sha256(model / "model.safetensors"),
               "training": training, "figures": figures}  # fmt: skip
    del content["recipe"]["config"]
    WEIGHTS.mkdir(exist_ok=True)
    for file in model.iterdir():
        shutil.copyfile(file, WEIGHTS / file.name)
    _write(CARD, content)
    return content


def _measured(path: Path, model, sections: tuple[str, ...]) -> dict:
    """What was measured before, or is now."""
    if not path.is_file():
        _write(path, measure(model, sections))
    return json.loads(path.read_text(encoding="utf-8"))


def _rounded(log: list[dict]) -> list[dict]:
    return [{name: round(value, 3) for name, value in entry.items()} for entry in log]


def _write(path: Path, content: dict) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(path)




if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    make(parser.parse_args().runs)
