"""Lesson 05: its specifications say what the package does; its long texts and questions are what they claim to be."""
import pytest
import torch
from models import random_model, tiny_config

import gptoss_lab as lab
from gptoss_lab import tokenizer
from gptoss_lab.config import TINY, Yarn, published
from gptoss_lab.exercises import lesson_05
from gptoss_lab.probes.yarn import Planes
from gptoss_lab.tiny import measure, words
from gptoss_lab.tiny.texts import lookups, texts


@pytest.mark.parametrize("config, factor", [(published("gpt-oss-20b"), 32), (published("gpt-oss-120b"), 8), (TINY, 4)])
def test_turns_and_ramp_give_the_frequencies_of_the_model(config, factor):
    planes = Planes.of(config, factor=factor)
    turns = lesson_05.turns(config.d_head, config.rope_theta, config.yarn.n_ctx_trained)
    torch.testing.assert_close(turns, planes.turns_trained, rtol=1e-12, atol=0)
    slowed = lesson_05.ramp(turns, config.yarn.beta_fast, config.yarn.beta_slow)
    torch.testing.assert_close(planes.trained * (1 - slowed + slowed / factor), planes.frequency, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [1, 2, 4.5, 32])
def test_the_concentration_that_is_asked_for_is_the_configs(factor):
    each, score = lesson_05.concentration(factor)
    assert each == Yarn(factor, 128).concentration and score == each**2


def test_what_the_lesson_says_on_success_is_what_32_gives():
    said = {one.name: one.point for one in lesson_05.EXERCISES}["05.4"]
    assert all(f"{number:.4f}" in said for number in lesson_05.concentration(32))


@pytest.fixture(scope="module")
def tiny():
    return lab.load("tiny")


def test_texts_are_the_generators_and_count_what_can_be_foreseen(tiny):
    tokens, counts = texts(tiny, 3, 200)
    made = measure.long_texts(3, length=200)
    assert torch.equal(tokens, made.tokens) and torch.equal(counts, ~made.given[:, 1:])
    assert counts.shape == (3, 200) and 0 < counts.float().mean() < 1
    assert not torch.equal(texts(tiny, 3, 200, seed=5)[0], tokens)


def renamed():
    """A model whose vocabulary goes by another name, as a checkpoint's own would."""
    other = random_model(tiny_config(d_vocab=512))
    known = tokenizer.tiny()
    other.read_tokenizer = lambda: type(known)("other", pat_str=known._pat_str, mergeable_ranks=known._mergeable_ranks,
                                               special_tokens=known._special_tokens)  # fmt: skip
    return other


def test_texts_in_another_vocabulary_are_written_in_it_and_all_count():
    other = renamed()
    tokens, counts = texts(other, 2, 700)
    assert tokens.shape == (2, 701) and counts.all() and counts.shape == (2, 700)
    said = other.tokenizer.decode(tokens[0].tolist())
    assert "<|endoftext|>" in said and tokenizer.special(other.tokenizer, "<|endoftext|>") in tokens[0]


@pytest.mark.parametrize("length, depth", [(128, 0), (200, 0.5), (200, 1)])
def test_a_lookup_asks_for_the_one_colour_that_was_not_asked_for_since_the_list(tiny, length, depth):
    prompts, answers = lookups(tiny, n=5)(length, depth)
    assert len(prompts) == len(answers) == 5
    for prompt, answer in zip(prompts, answers):
        before, _, listed = tiny.tokenizer.decode(prompt).rpartition("find ")
        pairs, _, questions = listed.partition("?")
        [*asked, last] = questions.split(", ") if "," in questions else [questions]
        colours = dict(pair.split() for pair in pairs.split(", "))
        assert colours[last.strip()] == tiny.tokenizer.decode(answer).strip() in words.COLOURS
        assert all(pair.split()[0] != last.strip() and colours[pair.split()[0]] == pair.split()[1] for pair in asked)
        assert length <= len(prompt) <= length + 25
        at = len(tiny.tokenizer.encode(before, allowed_special="all"))
        assert abs(at - depth * length) <= 25, (at, depth * length)


def test_lookups_repeat_and_differ_from_row_to_row(tiny):
    make = lookups(tiny, n=4)
    assert make(150, 0.5) == make(150, 0.5)
    assert len({*map(tuple, make(150, 0.5)[0])}) == 4


def test_a_model_without_a_vocabulary_is_told_so():
    model = random_model(tiny_config())
    for ask in (lambda: texts(model, 1, 10), lambda: lookups(model)):
        with pytest.raises(ValueError, match="no vocabulary"):
            ask()


@pytest.mark.parametrize("rows, length", [(0, 10), (1, 0)])
def test_no_rows_or_no_tokens_are_refused(tiny, rows, length):
    with pytest.raises(ValueError, match="at least 1"):
        texts(tiny, rows, length)
