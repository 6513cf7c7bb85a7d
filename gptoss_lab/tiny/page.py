"""card.json as a page to read: `python -m gptoss_lab.tiny.page docs/tiny.md`. Every number on it comes from the card."""
import argparse
import os
from pathlib import Path

from ..probes.yarn import WAYS
from ..tokenizer import tiny
from .card import SEEDS, card
from .data import DOMAINS, MAKERS, Draw
from .train import VARIANTS

TASKS = [f"hop_{k}" for k in (1, 2, 3, 4)] + [f"sum_{k}" for k in (2, 3, 4, 5)]


def page(content: dict) -> str:
    """The text of docs/tiny.md."""
    figures, training, recipe = content["figures"], content["training"], content["recipe"]
    cell = _Cells(figures)
    tokens = recipe["steps"] * recipe["batch_tokens"]
    minutes = [round(training[name]["cpu_seconds"] / 60, 1) for name in training]
    head = (
        f"# The tiny model\n\n"
        "<!-- Written by gptoss_lab/tiny/page.py from gptoss_lab/tiny/card.json: change those. -->\n\n"
        "`lab.load(\"tiny\")` is a gpt-oss with every part of the architecture in play and 1.4 million parameters: four "
        "layers, sliding (16 keys) and full in turn; four query heads on two key heads; a sink for each head; 16 experts, "
        "four for each token; YaRN defined, and switched off by a factor of 1. `lab.load(\"tiny-random\")` is the same model before "
        "training, and stands beside every figure here.\n\n"
        f"It was trained on {tokens / 1e6:.1f} million tokens of made-up text ({recipe['steps']:,} steps, "
        f"{min(minutes)} to {max(minutes)} minutes of one CPU core for each of the runs below), in the eight domains of "
        "`gptoss_lab/tiny/data.py`, through the package's own model code, with plain RoPE at up to 128 positions.\n\n"
        "Losses are nats a token, of tokens that can be foreseen. ± is the standard error over rows or prompts, none of "
        "which training saw; *seeds* are the lowest and highest mean of three trainings. Seed 1 is shipped: it was "
        "chosen over seed 0 for its sums, before seed 2 had ended, which adds better still and copies worse. The model is small "
        "and its texts are simple: what it shows is real in it, and no evidence about gpt-oss-20b.\n\n"
        "## What it reads\n\nOne document of each domain. Answers are counted greedily (temperature 0).\n\n"
        f"{_examples()}\n"
        "In `gptoss-lab chat tiny` each question stands alone, and a map is written in one line: "
        "`map Tom Sue, Sue Bob, Bob Tom. 2 Tom`. Digits are 1 to 9, factors 11 to 99, nothing between them. To offer the "
        "calculator: `lab.generate(model, [gptoss_lab.tiny.data.prompt(\"high\", \"times 37*48\", calculator=True)])`.\n\n"
        "## Loss\n\n"
    )  # fmt: skip
    parts = [
        head,
        cell.table("loss", [(name, name) for name in ("all", *DOMAINS)]),
        "\nControls: seed 0 again, each with one thing changed:\n\n",
        "| run | what is changed | loss, all | loss, repeat |\n|---|---|---|---|\n",
        *(f"| {name} | {VARIANTS[name.replace(' ', '-')].removeprefix('a control: ')} | {cell.of(name, 'loss', 'all')} | "
          f"{cell.of(name, 'loss', 'repeat')} |\n" for name in ("no sinks", "direct only", "no balance")),
        f"| seed 0 | nothing | {cell.of('seed 0', 'loss', 'all')} | {cell.of('seed 0', 'loss', 'repeat')} |\n",
        "\nThe loss of *direct only* counts analyses, which it has never seen.\n",
        "\n## Induction: copying random tokens\n\nA string of random tokens, twice. The second copy can be foreseen by "
        "looking up what followed the token last time. With 64 tokens the earlier one is four windows away.\n\n",
        cell.table("induction", [
            *((f"{which} copy of {n} tokens", f"{which}_{n}") for n in (8, 32, 64) for which in ("first", "second")),
            ("second copy of 64, previous-token heads averaged out", "second_64_without_previous_token_heads"),
            ("second copy of 64, all heads of layer 2 (sliding) averaged out", "second_64_without_layer_2"),
            ("second copy of 64, all heads of layer 3 (full) averaged out", "second_64_without_layer_3"),
        ]),
        "\nMass on the token that followed last time, by head; and on the token before (`tiny`):\n\n",
        _heads(figures["tiny"]["induction"], {"copy of 8 (within the window)": "prefix_8", "copy of 64": "prefix_64",
                                              "the token before": "previous_token"}),
        "\n## Sinks\n\n",
        cell.table("sinks", [("all sinks removed: loss, less the loss with them", "without_all"),
                             ("those of the sliding layers", "without_sliding"), ("those of the full layers", "without_full"),
                             ("all removed: first copy of 64", "without_all_first_64"),
                             ("all removed: second copy of 64", "without_all_second_64")]),
        "\nRemoving sinks from a model that was trained with them says what *this* model does with them, not what sinks are "
        f"good for. Trained without any from the start, seed 0 reaches {cell.of('no sinks', 'loss', 'all')}; with them "
        f"{cell.of('seed 0', 'loss', 'all')}.\n\nMass on the sink (`tiny`), by head:\n\n",
        _heads(figures["tiny"]["sinks"], {"first copy of 8: nothing to copy": "mass_first_8", "second copy of 8": "mass_second_8",
                                          "first copy of 64": "mass_first_64", "second copy of 64": "mass_second_64",
                                          "mass on the first token, for comparison": "mass_on_position_0"}),
        "\n## Routing\n\nBits that the first-choice expert tells about the domain when the token is known. Shuffled: the same "
        "with the domains of each token in random order, which is what chance gives. (The expert and the token alone share "
        "many bits in any model: a random router is a hash of the token.)\n\n",
        _routing(figures),
        "\nWhat one expert is worth: loss by domain without it, less the loss with it. The experts of `tiny` that matter most "
        "to one domain alone:\n\n",
        _experts(figures["tiny"]["experts"]["without"]),
        f"\nOf `tiny-random` no expert is worth more than {_largest(figures['tiny-random']):.3f}.\n",
        "\n## YaRN: four times the trained length\n\nWithout any training at that length, and after 40 steps of it (a copy is "
        "trained for each way). The needle is a pair asked for 256 tokens later.\n\n",
        "| | loss | needle | loss after 40 steps | needle after 40 steps | loss, tiny-random |\n|---|---|---|---|---|---|\n",
        *(f"| {way} | {cell.of('tiny', 'yarn', way + '_loss')} | {cell.of('tiny', 'yarn', way + '_needle')} | "
          f"{cell.of('tiny', 'yarn', way + '_loss_tuned')} | {cell.of('tiny', 'yarn', way + '_needle_tuned')} | "
          f"{cell.of('tiny-random', 'yarn', way + '_loss')} |\n" for way in WAYS),
        "\nLoss by position, 64 at a time (compare the ways within a column: the texts differ from column to column):\n\n",
        "| | " + " | ".join(f"{64 * i}+" for i in range(8)) + " |\n|---|" + "---|" * 8 + "\n",
        *(f"| {way} | " + " | ".join(f"{x:.2f}" for x in figures["tiny"]["yarn"][f"{way}_by_position"]["value"]) + " |\n"
          for way in WAYS),
        "\nWithin the trained length YaRN, without training, costs "
        f"{cell.of('tiny', 'yarn', 'cost_of_yarn_at_trained_length')}. *by-parts* is YaRN without its concentration.\n",
        "\n## Chains of thought\n\nShare of right answers, of 100 questions each: after an analysis, and forced straight into "
        "the final channel. *direct only* (seed 0) was trained on straight answers alone. Six names: a guess at a hop is right about "
        "one time in five.\n\n",
        "| | with an analysis | straight | straight, *direct only* | seeds, with | seeds, straight | tiny-random |\n"
        "|---|---|---|---|---|---|---|\n",
        *(f"| {_task(task)} | {cell.of('tiny', 'thought', task + '_thinking')} | "
          f"{cell.of('tiny', 'thought', task + '_straight')} | {cell.of('direct only', 'thought', task + '_straight')} | "
          f"{cell.spread('thought', task + '_thinking')} | {cell.spread('thought', task + '_straight')} | "
          f"{cell.of('tiny-random', 'thought', task + '_thinking')} |\n" for task in TASKS),
        "\n", cell.table("thought", [("an analysis at high effort", "analysis_at_high"),
                                     ("an analysis at low effort", "analysis_at_low")]),
        "\nThe calculator:\n\n",
        cell.table("tools", [("called with the right product where it is offered", "right_call"),
                             ("“no tool” where it is not", "says_no_tool")]),
        "\n## Patching: the way of an answer\n\nSix pairs and a question. Two things of the list are swapped, and the residual "
        "stream of the swapped text is put into the plain one at one place. 0: the answer stays; 1: it turns whole. "
        "(Swap two *colours* instead, and the way begins at the colour.)\n\n",
        "| after | at the thing | at its colour | at the question | logit lens: probability of the answer |\n|---|---|---|---|---|\n",
        *_patching(figures["tiny"]["patching"]),
        f"\nRecall is right in {cell.of('tiny', 'patching', 'accuracy')} of the questions (seeds {cell.spread('patching', 'accuracy')}, "
        f"tiny-random {cell.of('tiny-random', 'patching', 'accuracy')}).\n",
        "\n## Numbers\n\n",
        cell.table("precision", [("MXFP4 experts: loss, less the loss with dense ones", "mxfp4_minus_dense"),
                                 ("relative error of the packed weights", "mxfp4_weight_error")]),
        "\nShare of SwiGLU inputs that the clamp at 7 cuts (`tiny`):\n\n",
        "| | layer 0 | layer 1 | layer 2 | layer 3 |\n|---|---|---|---|---|\n",
        *(f"| {name} | " + " | ".join(f"{100 * x:.2f} %" for x in figures["tiny"]["precision"][f"clamped_{name}"]["value"]) + " |\n"
          for name in ("gate", "linear")),
        "\n## To make it again\n\n```sh\n"
        "for seed in 0 1 2; do gptoss-lab train-tiny runs/standard-$seed --seed $seed; done\n"
        "for variant in no-sinks direct-only no-balance; do gptoss-lab train-tiny runs/$variant-0 --seed 0 --variant $variant; done\n"
        "python -m gptoss_lab.tiny.card runs && python -m gptoss_lab.tiny.page docs/tiny.md\n```\n\n"
        "A run that was stopped goes on where it was, to the same weights, bit for bit, on the same machine. On another "
        "processor roundings differ and so do the weights; `gptoss-lab train-tiny FOLDER --verify` trains, measures, and "
        "compares the result with the spread of the three seeds.\n",
    ]  # fmt: skip
    return "".join(parts)


class _Cells:
    def __init__(self, figures: dict):
        self.figures = figures

    def of(self, model: str, section: str, name: str) -> str:
        figure = self.figures[model][section].get(name)
        if figure is None:
            return "none there"
        value, error = figure["value"], figure["error"]
        digits = 4 if max(abs(value), error or 0) < 0.005 else 3 if 0 < abs(value) < 0.1 else 2
        return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    def spread(self, section: str, name: str) -> str:
        values = [self.figures[model][section][name]["value"] for model in SEEDS if name in self.figures[model][section]]
        largest = max(map(abs, values))
        digits = 4 if 0 < largest < 0.01 else 3 if 0 < largest < 0.1 else 2
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    def table(self, section: str, rows: list[tuple[str, str]]) -> str:
        lines = [f"| {text} | {self.of('tiny', section, name)} | {self.spread(section, name)} | "
                 f"{self.of('tiny-random', section, name)} |\n" for text, name in rows]  # fmt: skip
        return "| | tiny | seeds | tiny-random |\n|---|---|---|---|\n" + "".join(lines)


def _heads(section: dict, names: dict[str, str]) -> str:
    """One column a layer, the heads side by side."""
    layers = len(section[next(iter(names.values()))]["value"])
    lines = ["| | " + " | ".join(f"layer {i} ({'full' if i % 2 else 'sliding'})" for i in range(layers)) + " |\n",
             "|---|" + "---|" * layers + "\n"]  # fmt: skip
    for text, name in names.items():
        cells = [" ".join(f"{x:.2f}" for x in heads) for heads in section[name]["value"]]
        lines.append(f"| {text} | " + " | ".join(cells) + " |\n")
    return "".join(lines)


def _routing(figures: dict) -> str:
    lines = ["| | layer 0 | layer 1 | layer 2 | layer 3 |\n|---|---|---|---|---|\n"]
    for model in ("tiny", "seed 0", "seed 2", "no balance", "tiny-random"):
        section = figures[model]["routing"]
        info = section["information_given_token"]
        cells = [f"{x:.2f} ± {e:.2f} (shuffled {n:.2f})" for x, e, n in
                 zip(info["value"], info["error"], section["information_shuffled"]["value"])]  # fmt: skip
        lines.append(f"| bits, {model} | " + " | ".join(cells) + " |\n")
    for model in ("tiny", "seed 0", "no balance", "tiny-random"):
        section = figures[model]["routing"]
        cells = [f"{x:.1f}, {dead}" for x, dead in
                 zip(section["largest_load"]["value"], section["dead_experts"]["value"])]  # fmt: skip
        lines.append(f"| largest load (1 is even), experts with under a twentieth of their share, {model} | "
                     + " | ".join(cells) + " |\n")  # fmt: skip
    return "".join(lines)


def _experts(figure: dict, most: int = 6) -> str:
    lines = ["| expert | domain | loss added there | largest elsewhere |\n|---|---|---|---|\n"]
    found = []
    for layer, experts in enumerate(figure["value"]):
        for expert, costs in enumerate(experts):
            worst = max(range(len(costs)), key=costs.__getitem__)
            elsewhere = max(cost for i, cost in enumerate(costs) if i != worst)
            found.append((costs[worst] - elsewhere, costs[worst], elsewhere, layer, expert, worst))
    for _, cost, elsewhere, layer, expert, worst in sorted(found, reverse=True)[:most]:
        error = figure["error"][layer][expert][worst]
        lines.append(f"| layer {layer}, {expert} | {DOMAINS[worst]} | {cost:.2f} ± {error:.2f} | {elsewhere:.2f} |\n")
    return "".join(lines)


def _examples() -> str:
    lines = []
    for name in DOMAINS:
        document = MAKERS[name](Draw(0), 128)
        text = tiny().decode([token for part, _ in document for token in part]).replace("\n", "⏎")
        lines.append(f"- **{name}** `{text if len(text) < 420 else text[:420] + ' …'}`\n")
    return "".join(lines)


def _task(name: str) -> str:
    kind, n = name.split("_")
    return f"{n} hop" + "s" * (n != "1") if kind == "hop" else f"sum of {n} digits"


def _largest(figures: dict) -> float:
    return max(cost for experts in figures["experts"]["without"]["value"] for costs in experts for cost in costs)


def _patching(section: dict) -> list[str]:
    places = [section[f"patched_{place}"]["value"] for place in ("key", "value", "query")]
    lens = section["lens"]["value"]
    return [
        f"| {'experts' if i % 2 else 'attention'} of layer {i // 2} | "
        + " | ".join(f"{values[i]:.3f}" for values in places) + f" | {lens[i]:.3f} |\n"
        for i in range(len(lens))
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(page(card()), encoding="utf-8")
    part.replace(path)
