"""The texts of the tiny model: what they say is right, and they are the same everywhere."""
import ast
import hashlib
import itertools
import re

import pytest
import torch

from gptoss_lab import harmony, tokenizer
from gptoss_lab.tiny import data, words
from gptoss_lab.tiny.data import DOMAINS, MAKERS, Draw, batch

ENCODING = tokenizer.tiny()
HARMONY = ("sum", "hop", "tool")


def documents(domain, n=100, room=128):
    draw = Draw(7)
    return [MAKERS[domain](draw, room) for _ in range(n)]


def whole(document):
    return [token for part, _ in document for token in part]


def texts(domain, n=100, room=128):
    return [ENCODING.decode(whole(document)) for document in documents(domain, n, room)]


# --- the same everywhere ---


def test_the_texts_are_those_that_the_shipped_model_was_trained_on():
    """Recorded on Linux, CPython 3.11. Another machine or Python that differs here would train another model."""
    digest = hashlib.sha256()
    for seed, length, mixture in ((0, 32, data.SHORT), (1, 64, data.MIXTURE), (2_000_006, 128, data.MIXTURE)):
        one = batch(seed, 16, length, mixture)
        for part in (one.tokens, one.domains, one.given.long()):
            digest.update(part.to(torch.int16).numpy().astype("<i2").tobytes())
    assert digest.hexdigest() == DIGEST


DIGEST = "d7bbe3cad197f6694ab4962e1438c3694ac510ff7c12ebefdfc46cf1a172d6d6"


def test_draws_are_even_and_different():
    draw = Draw(3)
    counts = torch.tensor([draw.between(2, 5) for _ in range(8000)]).bincount(minlength=7)
    assert counts[[0, 1, 6]].sum() == 0 and (counts[2:6] - 2000).abs().max() < 150
    firsts = [draw.some("abc", 2) for _ in range(6000)]
    assert {tuple(pair) for pair in firsts} == set(itertools.permutations("abc", 2))
    assert all(abs(sum(pair == list(p) for pair in firsts) - 1000) < 120 for p in itertools.permutations("abc", 2))
    assert sorted(draw.some(range(9), 9)) == list(range(9))


# --- what is said is right ---


@pytest.mark.parametrize("domain", DOMAINS[1:])  # repeat is random tokens
def test_a_document_is_text_in_the_o200k_pattern_however_it_was_put_together(domain):
    for document, text in zip(documents(domain), texts(domain)):
        assert ENCODING.encode(text, allowed_special="all") == whole(document)


def test_repeated_tokens_repeat():
    for document in documents("repeat"):
        (segment, first), (rest, later) = document
        assert first and not later and len(rest) % len(segment) == 0
        assert rest == segment * (len(rest) // len(segment))
    assert len({len(document[0][0]) for document in documents("repeat")}) > 20


def test_every_answer_of_recall_is_in_its_list():
    for text in texts("recall"):
        listed, asked = re.fullmatch(r"find (.*)\? (.*)", text).groups()
        colours = dict(pair.split() for pair in listed.split(", "))
        assert len(colours) == listed.count(",") + 1, "each thing once"
        assert all(colours[thing] == colour for thing, colour in (pair.split() for pair in asked.split(", ")))


def test_code_is_python_and_brackets_are_closed():
    for text in texts("code"):
        if text.startswith("brackets "):
            text = text.removeprefix("brackets ")
            while pair := re.search(r"\(\)|\[\]|\{\}", text):
                text = text[: pair.start()] + text[pair.end() :]
            assert text == ""
        else:
            ast.parse(text)


def test_stories_are_spelt_with_whole_words_in_both_languages():
    names = set(words.NAMES)
    for domain in ("story", "cuento"):
        for document, text in zip(documents(domain), texts(domain)):
            loose = [t for t in whole(document) if t < 256 and bytes([t]).isalpha()]
            assert set(loose) <= {ord("I")}, (text, bytes(loose))  # of a quotation
            assert names & set(re.findall(r"\w+", text))


def _solve(question):
    if question.startswith("add"):
        return f"={sum(map(int, question.removeprefix('add ').split('+')))}"
    shown, hops, name = re.fullmatch(r"map (.*)\.\n(\d) (\w+)", question).groups()
    points = dict(pair.split() for pair in shown.split(", "))
    for _ in range(int(hops)):
        name = points[name]
    return f"= {name}"


@pytest.mark.parametrize("domain", ["sum", "hop"])
def test_answers_are_right_and_thought_through_exactly_where_the_effort_says_so(domain):
    efforts = set()
    for document in documents(domain):
        messages = harmony.parse(whole(document), ENCODING)
        system, user, *thought, final = messages
        effort = system.content.removeprefix("Reasoning: ")
        efforts.add(effort)
        assert [m.channel for m in thought] == ["analysis"] * (effort != "low")
        assert final.channel == "final" and final.content == _solve(user.content)
        for line in thought and thought[0].content.split("\n"):
            if domain == "sum":
                digits = [int(line[0]), *map(int, re.findall(r"\+(\d)=", line))]
                totals = [int(total) for total in re.findall(r"=(\d+)", line)]
                assert totals == list(itertools.accumulate(digits))[1:]
            else:
                left, a, b = line.split()
                assert f"{a} {b}" in user.content
    assert efforts == {"low", "medium", "high"}


def test_the_calculator_is_called_where_it_is_offered_and_only_there():
    called = 0
    for document in documents("tool"):
        messages = harmony.parse(whole(document), ENCODING)
        of = next(m.content for m in messages if m.role == "user").removeprefix("times ")
        a, b = map(int, of.split("*"))
        if any(m.role == "developer" for m in messages):
            called += 1
            call, result, final = messages[-3:]
            assert (call.recipient, call.channel, call.content) == ("functions.calc", "commentary", f'{{"of":"{of}"}}')
            assert (result.name, result.content, final.content) == ("functions.calc", str(a * b), f"={a * b}")
        else:
            assert messages[-1].content == "no tool"
    assert 50 < called < 90


@pytest.mark.parametrize("domain", HARMONY)
def test_a_dialogue_ends_its_turn_and_marks_what_the_model_cannot_know(domain):
    for document in documents(domain):
        assert document[-1][0][-1] == tokenizer.special(ENCODING, "<|return|>")
        for part, given in document:
            role = harmony.parse([*part[:-1], tokenizer.special(ENCODING, "<|end|>")], ENCODING)[0].role
            assert given == (role in ("user", "tool"))


def test_a_prompt_is_the_beginning_of_a_document():
    for document in documents("sum", 5):
        messages = harmony.parse(whole(document), ENCODING)
        effort = messages[0].content.removeprefix("Reasoning: ")
        prompt = data.prompt(effort, messages[1].content)
        assert whole(document)[: len(prompt)] == prompt


# --- batches ---


def test_a_batch_is_rows_of_whole_documents_one_after_another():
    one = batch(5, 16, 128)
    assert one.tokens.shape == one.domains.shape == one.given.shape == (16, 129)
    assert one.read.shape == one.predicted.shape == (16, 128)
    assert torch.equal(one.read[:, 1:], one.predicted[:, :-1])
    starts = one.tokens == tokenizer.special(ENCODING, "<|endoftext|>")
    changes = (one.domains.flatten()[1:] != one.domains.flatten()[:-1]).nonzero().flatten() + 1
    assert starts.flatten()[changes].all() and not one.given[starts].any()
    assert torch.equal(one.tokens, batch(5, 16, 128).tokens) and not torch.equal(one.tokens, batch(6, 16, 128).tokens)


@pytest.mark.parametrize("mixture, length", [(data.MIXTURE, 128), (data.MIXTURE, 64), (data.SHORT, 32)])
def test_each_domain_gets_its_share_of_the_tokens(mixture, length):
    assert sum(mixture.values()) == pytest.approx(1)
    domains = torch.cat([batch(seed, 64, length, mixture).domains.flatten() for seed in range(6)])
    for name, share in mixture.items():
        assert (domains == DOMAINS.index(name)).double().mean() == pytest.approx(share, abs=0.03), name


def test_every_piece_of_the_vocabulary_is_used_outside_random_tokens():
    seen = set()
    for domain in DOMAINS[1:]:
        for document in documents(domain, 600):
            seen |= set(whole(document))
    assert not {ENCODING.decode([t]) for t in range(256, 502) if t not in seen}
