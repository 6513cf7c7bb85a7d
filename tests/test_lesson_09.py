"""Every expert dropped in turn, against one edit at a time; texts by domain, in any vocabulary."""
import pytest
import tiktoken
import torch
from models import random_model, tiny_config

import gptoss_lab
from gptoss_lab import tokenizer
from gptoss_lab.probes.effect import Effect
from gptoss_lab.probes.needed import Needed
from gptoss_lab.probes.router import drop
from gptoss_lab.tiny import data
from gptoss_lab.tiny.texts import by_domain

TOKENS = torch.arange(3, 27).view(2, 12)
LABELS = torch.tensor([[0] * 12, [-1] * 6 + [5] * 6])


@pytest.fixture
def model():
    return random_model(tiny_config(d_vocab=512, n_layers=2))


def test_each_change_is_that_of_one_expert_dropped_by_itself(model):
    needed = Needed.measure(model, TOKENS, LABELS)
    assert needed.labels == (0, 5) and needed.tokens.tolist() == [11, 6]
    assert needed.change.shape == (model.config.n_layers, model.config.n_experts, 2)
    for layer, expert in ((0, 0), (1, 3), (model.config.n_layers - 1, model.config.n_experts - 1)):
        alone = Effect.measure(model, TOKENS, drop(layer, expert), labels=LABELS).by_label()["change"]
        torch.testing.assert_close(needed.change[layer, expert], alone, rtol=1e-4, atol=1e-6)
    assert needed.change.abs().max() > 1e-4


def test_chosen_layers_keep_their_numbers(model):
    last = model.config.n_layers - 1
    needed = Needed.measure(model, TOKENS, LABELS, [last])
    assert needed.layers == (last,) and needed.alone(1)[0][0] == last
    torch.testing.assert_close(needed.change[0], Needed.measure(model, TOKENS, LABELS).change[last])


def test_the_expert_that_one_label_needs_beyond_all_others_comes_first():
    change = torch.zeros(2, 3, 3, dtype=torch.double)
    change[0, 1] = torch.tensor([2.0, 1.9, 0.0])  # needed most, but by two
    change[1, 2] = torch.tensor([0.1, 0.0, 0.9])
    needed = Needed(change, torch.tensor([4, 4, 4]), (4, 7), (10, 11, 12))
    assert needed.alone(1) == [(7, 2, 12)]
    assert needed.elsewhere[0, 1].item() == pytest.approx(1.9)


def test_the_picture_has_a_row_for_each_label(model):
    needed = Needed.measure(model, TOKENS, LABELS, [0])
    picture = needed.plot(["first", "second"], note="random weights")
    assert picture.get_suptitle().endswith("(random weights)")
    assert [tick.get_text() for tick in picture.axes[0].get_yticklabels()] == ["first", "second"]
    with pytest.raises(ValueError, match="1 names for the 2 labels"):
        needed.plot(["first"])


@pytest.mark.parametrize("labels, layers, said", [
    (LABELS[:1], None, "labels is"), (-torch.ones_like(LABELS), None, "no predicted token"), (LABELS, [9], "layer 9"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(model, labels, layers, said):
    with pytest.raises(ValueError, match=said):
        Needed.measure(model, TOKENS, labels, layers)


def test_a_measurement_can_be_kept(model, tmp_path):
    needed = Needed.measure(model, TOKENS, LABELS, [0])
    needed.save(tmp_path / "needed")
    assert torch.equal(Needed.load(tmp_path / "needed").change, needed.change)


def test_texts_come_domain_by_domain_and_what_cannot_be_foreseen_is_marked():
    model = gptoss_lab.load("tiny-random")
    tokens, domain, foreseen = by_domain(model, rows=2, length=64)
    assert tokens.shape == domain.shape == foreseen.shape == (2 * len(data.DOMAINS), 64)
    assert domain[:, 0].tolist() == [i for i in range(len(data.DOMAINS)) for _ in range(2)]
    assert ((foreseen == domain) | (foreseen == -1)).all()
    repeat = data.DOMAINS.index("repeat")
    assert (foreseen[domain == repeat] == -1).any() and (foreseen[domain == data.DOMAINS.index("story")] >= 0).all()
    again = by_domain(model, rows=2, length=64)[0]
    assert torch.equal(tokens, again) and not torch.equal(tokens, by_domain(model, rows=2, length=64, seed=8)[0])


def test_another_vocabulary_reads_the_same_words():
    own, model = tokenizer.tiny(), random_model(tiny_config(d_vocab=512))
    ids = {bytes([i]): i for i in range(256)}
    model.read_tokenizer = lambda: tiktoken.Encoding(
        "bytes", pat_str=r"[\s\S]", mergeable_ranks=ids, special_tokens={name: 256 + i for i, name in enumerate(tokenizer.SPECIALS)})  # fmt: skip
    tokens, domain, foreseen = by_domain(model, rows=1, length=32, domains=("story", "hop"))
    plain, *_ = by_domain(gptoss_lab.load("tiny-random"), rows=1, length=32, domains=("story", "hop"))
    assert tokens.shape == domain.shape == foreseen.shape
    for row, other in zip(tokens.tolist(), plain.tolist()):
        assert own.decode(other).startswith(model.tokenizer.decode(row))


def test_a_domain_or_a_vocabulary_that_is_missing_is_named():
    with pytest.raises(ValueError, match="no domain 'poem'"):
        by_domain(gptoss_lab.load("tiny-random"), domains=("poem",))
    with pytest.raises(ValueError, match="no vocabulary"):
        by_domain(random_model(tiny_config()))
