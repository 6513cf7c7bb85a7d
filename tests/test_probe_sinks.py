"""The sink probe: every number against slow loops, on recorded rows of the real 20B, and its edits."""
import base64
import functools
import itertools
import math
import sys
import types

import numpy as np
import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401
from shared import facts

from gptoss_lab import KVCache, edit, generate, record
from gptoss_lab.probes.effect import Effect
from gptoss_lab.probes.sinks import Sinks, remove, swap, zero

CONFIG = tiny_config(n_layers=2)
TOKENS = random_tokens(CONFIG, 2, 24)
LABELS = TOKENS % 3
L, B, H, S = 2, 2, 4, 24
FIELDS = "mass", "first", "entropy", "entropy_without"
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
near = dict(rtol=0, atol=1e-10)


@functools.cache
def model(packed=False):
    return random_model(CONFIG, packed=packed)


@functools.cache
def sinks(packed=False) -> Sinks:
    return Sinks.measure(model(packed), TOKENS)


def same(one: Sinks, other: Sinks):
    for name in FIELDS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **near)
    assert one.layers == other.layers


def slow_entropy(p) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


# ------------------------------------------------------------------------------------------ the real model


def recorded_rows() -> torch.Tensor:
    """Attention of the last of 74 tokens in layer 0 of the real 20B, the sink last.   -> [64, 75] bfloat16"""
    row = facts("golden_20b_reference_intermediates.json")["boundaries"]["layer0_final_token_attention_probs_post_softmax"]
    bits = np.frombuffer(base64.b64decode(row["values_bf16_b64"]), dtype="<i2").copy()
    return torch.from_numpy(bits).view(torch.bfloat16).view(row["shape"])


@functools.cache
def recorded() -> Sinks:
    rows = recorded_rows()
    return Sinks.from_rows(rows[None, :, None, :-1], rows[None, :, None, -1])


def test_the_recorded_heads_of_the_20b_give_their_sinks_434_thousandths_on_average():
    mass = recorded().by_head()[0]
    assert round(mass.mean().item(), 3) == 0.434
    assert round(mass.median().item(), 3) == 0.371  # the lower of the two in the middle; between them lies 0.374
    assert round(mass.max().item(), 3) == 0.992


def test_26_of_64_recorded_heads_of_the_20b_rest():
    assert len(recorded().resting_heads()) == 26
    assert int(recorded().resting().sum()) == 26


def test_the_recorded_heads_of_the_20b_hardly_look_at_the_first_token():
    assert round(recorded().by_head(recorded().first).mean().item(), 4) == 0.0009


def test_the_recorded_sink_mass_is_that_of_the_recorded_scores():
    given = facts("golden_20b_reference_intermediates.json")
    bits = given["boundaries"]["layer0_final_token_masked_scaled_qk_logits_pre_softmax"]["values_bf16_b64"]
    scores = torch.from_numpy(np.frombuffer(base64.b64decode(bits), dtype="<i2").copy()).view(torch.bfloat16)
    for head, row in enumerate(scores.view(64, 75).tolist()):
        total = sum(math.exp(x) for x in row)
        assert recorded().mass[0, 0, head, 0].item() == pytest.approx(math.exp(row[-1]) / total, rel=0.01)
        assert row[-1] == given["layer0_sinks"][head]


# ------------------------------------------------------------------------------------------ against slow loops


def rows_of(acts, l, b, h, s):
    return acts["pattern", l][b, h, s].tolist(), acts["sink_mass", l][b, h, s].item()


@PACKED
def test_mass_first_token_and_both_entropies_are_those_of_each_row(packed):
    probe = sinks(packed)
    with record(model(packed), *Sinks.points) as acts:
        model(packed)(TOKENS)
    for l, b, h, s in itertools.product(*map(range, (L, B, H, S))):
        keys, sink = rows_of(acts, l, b, h, s)
        at = l, b, h, s
        assert probe.mass[at].item() == sink
        assert probe.first[at].item() == keys[0]
        assert probe.entropy[at].item() == pytest.approx(slow_entropy([*keys, sink]), abs=1e-10)
        assert probe.entropy_without[at].item() == pytest.approx(slow_entropy([x / sum(keys) for x in keys]), abs=1e-10)


def test_the_two_entropies_differ_by_the_choice_between_sink_and_keys():
    m = sinks().mass
    choice = torch.special.entr(m) + torch.special.entr(1 - m)
    torch.testing.assert_close(sinks().entropy, choice + (1 - m) * sinks().entropy_without, **near)


def test_entropies_survive_a_head_that_gives_its_sink_everything_or_nothing():
    rows = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [1e-30, 1e-30, 1.0]])
    probe = Sinks.from_rows(rows[None, :, None, :-1], rows[None, :, None, -1])
    assert probe.entropy_without.flatten().tolist() == pytest.approx([0, math.log(2), math.log(2)], abs=1e-5)
    assert probe.entropy.flatten().tolist() == pytest.approx([0, math.log(2), 0], abs=1e-6)


def padded() -> tuple[Sinks, torch.Tensor]:
    """A batch whose second row is padded by seven on the left, and which positions are valid."""
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, :7] = False
    with torch.no_grad(), record(model(), *Sinks.points) as acts:
        model()(TOKENS, valid.long())
    return Sinks.of(acts, valid), valid


@pytest.mark.parametrize("probe", [lambda: sinks(), lambda: padded()[0]], ids=["whole", "padded"])
def test_means_by_head_and_label_and_resting_are_counts(probe):
    probe = probe()
    labels = LABELS.clone()
    labels[0, 3:6] = -1
    ids, queries, mass = probe.by_label(labels)
    assert ids.tolist() == [0, 1, 2]
    for l, h in itertools.product(range(L), range(H)):
        at = [(b, s) for b in range(B) for s in range(S) if probe.valid[b, s]]
        of = lambda cells, l=l, h=h: [probe.mass[l, b, h, s].item() for b, s in cells]
        average = sum(of(at)) / len(at)
        assert probe.by_head()[l, h].item() == pytest.approx(average, abs=1e-12)
        assert ((l, h) in probe.resting_heads()) == (average > 0.5)
        assert probe.resting(0.3)[l, h].item() == pytest.approx(sum(m > 0.3 for m in of(at)) / len(at), abs=1e-12)
        for c in range(3):
            cells = [(b, s) for b, s in at if labels[b, s] == c]
            assert queries[c] == len(cells)
            assert mass[l, h, c].item() == pytest.approx(sum(of(cells)) / len(cells), abs=1e-12)


def test_token_ids_serve_as_labels():
    ids, queries, mass = sinks().by_label(TOKENS)
    assert ids.tolist() == TOKENS.unique().tolist()
    torch.testing.assert_close((mass * queries).sum(-1) / B / S, sinks().by_head(), **near)


def test_the_head_most_at_rest_comes_first():
    heads = sinks().resting_heads(0.0)
    assert len(heads) == L * H
    masses = [sinks().by_head()[pair].item() for pair in heads]
    assert masses == sorted(masses, reverse=True)


def test_the_first_token_is_out_of_a_sliding_layers_sight_behind_its_window():
    first = sinks().first
    assert (first[0, :, :, CONFIG.sliding_window :] == 0).all()  # layer 0 slides
    assert (first[1] > 0).all()
    torch.testing.assert_close(first[..., 0], 1 - sinks().mass[..., 0], **near)


# ------------------------------------------------------------------------------------------ every way to run


@PACKED
def test_a_prompt_alone_chunks_with_a_cache_and_generate_give_what_one_pass_gives(packed):
    whole, one = sinks(packed), Sinks.measure(model(packed), TOKENS[:1])
    for name in FIELDS:
        torch.testing.assert_close(getattr(one, name), getattr(whole, name)[:, :1], **near)
    cache = KVCache(CONFIG)
    with torch.no_grad(), record(model(packed), *Sinks.points) as acts:
        for chunk in TOKENS.split([9, 1, 14], dim=1):
            model(packed)(chunk, cache=cache)
    same(Sinks.of(acts), whole)
    with record(model(packed), *Sinks.points) as acts:
        made = generate(model(packed), TOKENS[:, :20], 5, stop=())
    read = torch.cat([TOKENS[:, :20], torch.tensor(made)[:, :-1]], dim=1)
    same(Sinks.of(acts), Sinks.measure(model(packed), read))


def test_a_padded_prompt_has_the_numbers_of_the_prompt_alone():
    probe, _ = padded()
    alone = Sinks.measure(model(), TOKENS[1:, 7:])
    for name in FIELDS:
        torch.testing.assert_close(getattr(probe, name)[:, 1:, :, 7:], getattr(alone, name), **near)


def test_a_recording_that_begins_behind_a_cache_knows_the_first_token():
    cache = KVCache(CONFIG)
    with torch.no_grad():
        model()(TOKENS[:, :10], cache=cache)
        with record(model(), *Sinks.points) as acts:
            model()(TOKENS[:, 10:], cache=cache)
    late = Sinks.of(acts)
    for name in FIELDS:
        torch.testing.assert_close(getattr(late, name), getattr(sinks(), name)[..., 10:], **near)


def test_some_layers_only():
    with record(model(), *Sinks.points) as acts:
        model()(TOKENS)
    one = Sinks.of(acts, layers=[1])
    assert one.layers == (1,)
    torch.testing.assert_close(one.mass, sinks().mass[1:], **near)
    assert all(layer == 1 for layer, _ in one.resting_heads(0.0))


def test_bfloat16_rows_count_as_whole():
    low = random_model(CONFIG, dtype=torch.bfloat16)
    torch.testing.assert_close(Sinks.measure(low, TOKENS).by_head(), sinks().by_head(), rtol=0, atol=0.02)


def test_a_probe_changes_neither_weights_nor_hooks():
    lab = random_model(CONFIG)
    before = {name: x.clone() for name, x in lab.state_dict().items()}
    Sinks.measure(lab, TOKENS).by_label(LABELS)
    Effect.measure(lab, TOKENS, remove(), zero(0, [1]), swap(1, 0, 3), labels=LABELS)
    with pytest.raises(ValueError, match="heads"):
        Effect.measure(lab, TOKENS, remove(0, 4))
    assert all(torch.equal(x, before[name]) for name, x in lab.state_dict().items())
    assert lab.recordings == () and not any(getattr(m, "listeners", None) for m in lab.modules())


# ------------------------------------------------------------------------------------------ edits


def with_sinks(layer: int, values: list[float], packed=False) -> torch.Tensor:
    """Logits of a model whose sinks in one layer are these."""
    other = random_model(CONFIG, packed=packed)
    with torch.no_grad():
        other.blocks[layer].attn.sinks.copy_(torch.tensor(values, dtype=torch.float64))
        return other(TOKENS)


CHANGES = [
    (remove(1), lambda s: [-math.inf] * 4),
    (remove(1, 2), lambda s: [s[0], s[1], -math.inf, s[3]]),
    (remove(1, [0, 3]), lambda s: [-math.inf, s[1], s[2], -math.inf]),
    (zero(1), lambda s: [0.0] * 4),
    (zero(1, [1]), lambda s: [s[0], 0.0, s[2], s[3]]),
    (swap(1, 0, 3), lambda s: [s[3], s[1], s[2], s[0]]),
    (swap(1, 2, 2), lambda s: s),
]


@PACKED
@pytest.mark.parametrize("edits, values", CHANGES)
def test_an_edit_is_a_model_with_other_sinks(edits, values, packed):
    with torch.no_grad(), edit(model(packed), edits):
        edited = model(packed)(TOKENS)
    usual = model(packed).blocks[1].attn.sinks.tolist()
    torch.testing.assert_close(edited, with_sinks(1, values(usual), packed), **near)


def test_an_edit_of_no_layer_in_particular_is_of_all():
    with edit(model(), remove()):
        probe = Sinks.measure(model(), TOKENS)
    assert probe.mass.max() == 0
    torch.testing.assert_close(probe.entropy, probe.entropy_without, **near)
    with edit(model(), zero(heads=1)):
        probe = Sinks.measure(model(), TOKENS)
    with record(model(), "*.hook_attn_scores") as acts:
        with edit(model(), zero(heads=1)):
            model()(TOKENS)
    for l, s in itertools.product(range(L), range(S)):
        total = 1 + sum(math.exp(x) for x in acts["attn_scores", l][0, 1, s].tolist())
        assert probe.mass[l, 0, 1, s].item() == pytest.approx(1 / total, abs=1e-12)


def test_without_its_sink_a_head_of_the_first_layer_writes_1_over_1_minus_mass_times_as_much():
    z = "blocks.0.attn.hook_z"
    with torch.no_grad(), record(model(), z) as plain:
        model()(TOKENS)
    with torch.no_grad(), edit(model(), remove(0, 2)), record(model(), z) as freed:
        model()(TOKENS)
    scale = 1 / (1 - sinks().mass[0, :, 2])[..., None]
    torch.testing.assert_close(freed[z][:, :, 2], plain[z][:, :, 2] * scale, **near)
    torch.testing.assert_close(freed[z][:, :, 3], plain[z][:, :, 3], rtol=0, atol=0)


@pytest.mark.parametrize("edits", [remove(), zero(1), swap(0, 0, 1)])
def test_the_effect_on_the_loss_is_that_of_two_runs(edits):
    effect = Effect.measure(model(), TOKENS, edits, labels=LABELS)
    with torch.no_grad():
        plain = model()(TOKENS)
        with edit(model(), edits):
            edited = model()(TOKENS)
    table = effect.by_label()
    for c in range(3):
        changes = []
        for b, s in itertools.product(range(B), range(S - 1)):
            if LABELS[b, s + 1] == c:
                p, q = ([math.exp(x) for x in logits[b, s].tolist()] for logits in (plain, edited))
                token = TOKENS[b, s + 1]
                changes.append(math.log(p[token] / sum(p)) - math.log(q[token] / sum(q)))
        assert table["change"][c].item() == pytest.approx(sum(changes) / len(changes), abs=1e-10)
    assert effect.kl.min() > 0


# ------------------------------------------------------------------------------------------ kept, tabulated, drawn


def test_a_result_comes_back_from_disk_as_it_was(tmp_path):
    sinks().save(tmp_path / "sinks")
    back = Sinks.load(tmp_path / "sinks")
    same(back, sinks())
    assert torch.equal(back.valid, sinks().valid) and back.layers == (0, 1)


def test_a_table_has_one_row_a_head(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
    table = sinks().frame()
    assert {len(column) for column in table.values()} == {L * H}
    at = [i for i in range(L * H) if (table["layer"][i], table["head"][i]) == (1, 2)]
    assert table["mass"][at[0]] == sinks().by_head()[1, 2].item()


def test_a_figure_shows_the_mass_of_every_head_and_names_its_axes():
    fig = sinks().plot(note="a test")
    left, right = fig.axes[:2]
    assert fig.get_suptitle().endswith("(a test)")
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in (left, right))
    mass = sinks().by_head()
    assert np.allclose(left.images[0].get_array(), mass, atol=1e-6)
    dots = torch.tensor(right.collections[0].get_offsets().data).double()
    first = sinks().by_head(sinks().first)
    torch.testing.assert_close(dots, torch.stack([mass.flatten(), first.flatten()], 1), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_named():
    with record(model(), *Sinks.points) as acts:
        model()(TOKENS)
    pattern, mass = acts["pattern", 0], acts["sink_mass", 0]
    cases = [
        (lambda: sinks().by_label(LABELS[:, :4]), r"labels is torch.int64 \(2, 4\).*\(2, 24\)"),
        (lambda: sinks().by_label(LABELS.float()), "labels is torch.float32"),
        (lambda: sinks().by_label(LABELS - 3), "no valid query"),
        (lambda: sinks().resting(1.5), "threshold = 1.5"),
        (lambda: Sinks.from_rows(pattern[0], mass[0]), r"must be \[batch, head, query, key\]"),
        (lambda: Sinks.from_rows(pattern, mass[:1]), r"mass \(1, 4, 24\)"),
        (lambda: Sinks.from_rows(pattern, mass * 0, layer=7), "a row of layer 7 and its sink sum to 1 ±.*edited"),
        (lambda: Sinks.from_rows(pattern / 0, mass), "sum to 1 ± nan"),
        (lambda: Sinks.from_rows(pattern, mass, torch.zeros(B, S, dtype=torch.bool)), "no query is left"),
        (lambda: Sinks.from_rows(pattern, mass, torch.ones(B, 3, dtype=torch.bool)), r"valid is .*\(2, 3\)"),
        (lambda: Sinks.of(acts, layers=[]), "layers is empty"),
        (lambda: Effect.measure(model(), TOKENS, remove(0, 4)), r"heads \[4\]: name one or more of 0 to 3"),
        (lambda: Effect.measure(model(), TOKENS, swap(0, 1, -1)), r"heads \[1, -1\]"),
        (lambda: Effect.measure(model(), TOKENS, zero(0, [])), r"heads \[\]"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(KeyError, match="layers 0 to 1"):
        Effect.measure(model(), TOKENS, remove(2))
    with record(model(), *Sinks.points) as acts:
        model()(TOKENS)
    with pytest.raises(KeyError, match="layers 0 to 1"):
        Sinks.of(acts, layers=[2])
    with pytest.raises(ValueError, match="sink_mass was not recorded"), record(model(), "hook_embed") as acts:
        Sinks.of(acts)


def test_a_pattern_that_an_edit_changed_is_refused():
    with edit(model(), {"blocks.1.attn.hook_pattern": lambda p: p * 0.5}), pytest.raises(ValueError, match="layer 1"):
        Sinks.measure(model(), TOKENS)


def test_values_that_are_not_numbers_are_named():
    lost = {"blocks.0.hook_resid_post": lambda x: x * torch.nan}
    with edit(model(), lost), pytest.raises(ValueError, match=r"blocks.1.attn.hook_(pattern|sink_mass) holds NaN"):
        Sinks.measure(model(), TOKENS)


def test_an_edit_of_a_model_in_the_place_of_a_layer_is_refused():
    with pytest.raises(TypeError, match="layer = GptOss: an edit is made for a layer's number"):
        remove(model())
