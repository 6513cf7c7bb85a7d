"""The tiny model that comes with the package: what its card says is so."""
import re
from pathlib import Path

import pytest
import torch
from models import one_thread  # noqa: F401

import gptoss_lab as lab
from gptoss_lab import tokenizer, verify
from gptoss_lab.config import TINY
from gptoss_lab.inspect import inspect
from gptoss_lab.shards import sha256
from gptoss_lab.tiny import WEIGHTS, card, data, measure, page, train

ROOT = Path(__file__).resolve().parent.parent
CARD = card.card()
FIGURES = CARD["figures"]


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny():
    return lab.load("tiny")


@pytest.fixture(scope="module")
def twin():
    return lab.load("tiny-random")


# --- the files ---


def test_it_is_small_whole_and_needs_no_download(tiny):
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 4_000_000
    assert sha256(WEIGHTS / "model.safetensors") == CARD["weights_sha256"]
    assert verify.verify(WEIGHTS).ok and inspect("tiny").n_bytes == 2 * sum(p.numel() for p in tiny.parameters())
    assert tiny.config == TINY and tiny.dtype == torch.float32 and not tiny.training
    assert tiny.tokenizer.n_vocab == TINY.d_vocab and tiny.tokenizer.name == "tiny"


def test_its_vocabulary_is_the_one_in_the_code(tiny):
    stored, built = tokenizer.load(WEIGHTS), tokenizer.tiny()
    assert stored._mergeable_ranks == built._mergeable_ranks and stored._special_tokens == built._special_tokens


def test_it_can_be_had_in_other_dtypes_and_with_a_shorter_context():
    assert lab.load("tiny", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert lab.load("tiny", max_context=100).config.n_ctx == 100
    assert lab.load("tiny-random", max_context=100).config.n_ctx == 100


def test_the_twin_has_its_shape_and_is_what_training_began_from(tiny, twin):
    begun = train.initial(train.Recipe()).state_dict()
    assert twin.config == tiny.config and twin.tokenizer.name == "tiny"
    assert all(torch.equal(begun[name], tensor) for name, tensor in twin.state_dict().items())
    assert begun.keys() == tiny.state_dict().keys()


def test_no_part_of_the_architecture_is_idle(tiny):
    for name, weight in tiny.named_parameters():
        assert weight.isfinite().all() and weight.std() > 0.02, name
    assert 0.5 < max(block.attn.sinks.abs().max() for block in tiny.blocks)


def test_hugging_face_loads_the_same_folder_and_agrees(tiny):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GptOssForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = data.batch(measure.SEED, 4, 128).read
    ours, other = tiny(tokens), theirs(tokens).logits
    assert (ours - other).abs().max() < 1e-3 * ours.std()
    assert (ours.argmax(-1) == other.argmax(-1)).float().mean() > 0.999


# --- the card ---


def again(figures: dict, section: str, tolerance: float, model: str = "tiny") -> None:
    """Measured now, each number is the card's."""
    for name, figure in figures.items():
        kept = torch.tensor(FIGURES[model][section][name]["value"], dtype=torch.float64)
        new = torch.tensor(figure.value, dtype=torch.float64)
        assert kept.shape == new.shape and (kept - new).abs().max() <= tolerance, (section, name, kept, new)


@pytest.mark.parametrize("section, tolerance", [
    ("loss", 0.005), ("induction", 0.02), ("sinks", 0.02), ("routing", 0.01), ("patching", 0.02), ("precision", 0.002),
])  # fmt: skip
def test_the_shipped_weights_give_the_cards_figures(tiny, section, tolerance):
    again(measure.SECTIONS[section](tiny), section, tolerance)


def test_so_does_the_twin(twin):
    again(measure.loss(twin), "loss", 0.005, "tiny-random")
    again(measure.sinks(twin), "sinks", 0.02, "tiny-random")


def test_so_does_yarn(tiny):
    again(measure.yarn(tiny, steps=0, ways=("none", "yarn")), "yarn", 0.02)


def test_so_do_chains_of_thought_and_calls_on_fewer_questions(tiny):
    few = measure.thought(tiny, n=20) | measure.tools(tiny, n=20)
    kept = FIGURES["tiny"]["thought"] | FIGURES["tiny"]["tools"]
    for name, figure in few.items():
        assert abs(figure.value - kept[name]["value"]) < 0.3, (name, figure, kept[name])


def test_headlines():
    """What the lessons stand on. Each is a figure of the card, which the tests above have measured again."""
    figures, random = FIGURES["tiny"], FIGURES["tiny-random"]
    value = lambda section, name: figures[section][name]["value"]
    assert value("loss", "all") < 1.2 < 6 < random["loss"]["all"]["value"]
    assert value("induction", "second_64") < 1 and value("induction", "first_64") > 5
    assert value("induction", "second_64_without_previous_token_heads") > 3
    assert max(value("patching", "lens")[:3]) < 0.2 and value("patching", "lens")[-1] > 0.9
    assert value("thought", "analysis_at_high") > 0.95 and value("thought", "analysis_at_low") < 0.05
    assert value("thought", "hop_3_thinking") > 0.9 and value("thought", "hop_3_straight") < 0.45


def test_every_seed_and_control_has_its_figures():
    assert {"tiny", "tiny-random", *card.SEEDS, *card.CONTROLS} == set(FIGURES)
    for name in ("tiny", "tiny-random", "seed 0", "seed 2"):
        assert set(FIGURES[name]) == set(measure.SECTIONS)
    for name, (_, sections) in card.CONTROLS.items():
        assert set(FIGURES[name]) == set(sections)
    assert all(run["cpu_seconds"] < 30 * 60 and run["steps"] == CARD["recipe"]["steps"] for run in CARD["training"].values())


def test_the_recipe_is_the_cards():
    import dataclasses
    import json

    kept = dict(CARD["recipe"])
    now = json.loads(json.dumps(dataclasses.asdict(train.Recipe())))
    del now["config"]
    assert kept == now


def test_a_new_run_is_compared_with_the_spread_of_the_seeds(monkeypatch):
    monkeypatch.setattr(card, "measure", lambda model: FIGURES["seed 0"])
    same = card.compare(WEIGHTS)
    assert same.ok and same.same_bytes and "byte for byte" in str(same)
    worse = {**FIGURES["seed 0"], "loss": {"all": {"value": 2.5}}}
    monkeypatch.setattr(card, "measure", lambda model: worse)
    monkeypatch.setattr(card, "sha256", lambda path: "other")
    other = card.compare(WEIGHTS)
    assert not other.ok and re.search(r"held-out loss.*2\.500  OUTSIDE", str(other))


def test_the_page_is_the_card():
    assert (ROOT / "docs" / "tiny.md").read_text(encoding="utf-8") == page.page(CARD), "python -m gptoss_lab.tiny.page docs/tiny.md"


# --- how it is measured ---


def test_information_given_the_token_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 60, (3, 2, 4), generator=generator)
    counts[2, 0] = 1  # too rare: this token is left out
    bits = total = 0.0
    for token in (0, 1):
        p = counts[token].double() / counts[token].sum()
        info = sum(float(p[d, e] * (p[d, e] / (p[d].sum() * p[:, e].sum())).log2())
                   for d in range(2) for e in range(4) if p[d, e] > 0)  # fmt: skip
        bits, total = bits + info * counts[token].sum(), total + counts[token].sum()
    assert measure.information_given_token(counts) == pytest.approx(float(bits / total))


def test_labels_are_shuffled_within_each_token_only():
    token, domain = torch.randint(0, 5, (400,)), torch.randint(0, 3, (400,))
    mixed = measure._shuffled_within(token, domain, 0)
    assert not torch.equal(mixed, domain)
    for one in range(5):
        assert torch.equal(mixed[token == one].sort().values, domain[token == one].sort().values)


def test_the_error_of_a_ratio_is_that_of_many_draws():
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 9, (4000, 50), generator=generator)
    sums = sizes * 2.0 + sizes.sqrt() * torch.randn(4000, 50, generator=generator)
    ratios = sums.sum(1) / sizes.sum(1)
    errors = torch.tensor([measure._ratio(a, b).error for a, b in zip(sums[:200], sizes[:200])])
    assert errors.mean() == pytest.approx(float(ratios.std()), rel=0.05)


def test_a_needle_is_as_far_back_as_it_says():
    prompts, answers = measure.needles(100, 8)
    for prompt, answer in zip(prompts, answers.tolist()):
        asked = prompt[-1]
        first = prompt.index(asked)
        assert prompt.count(asked) == 2 and prompt[first + 1] == answer
        assert 100 <= len(prompt) - 1 - first <= 102


def test_swapped_recalls_differ_only_in_the_two_things():
    texts = measure.recalls(10)
    for row in range(10):
        differ = (texts.clean[row] != texts.swapped[row]).nonzero().flatten().tolist()
        assert sorted(texts.key[row].tolist()) == differ
        assert texts.clean[row, -1] == texts.clean[row, texts.key[row, 0]] == texts.swapped[row, texts.key[row, 1]]
        assert texts.clean[row, texts.key[row, 0] + 1] == texts.answer[row]
        assert texts.swapped[row, texts.key[row, 1] + 1] == texts.other[row]
