"""Ablation, steering, head scores, activity inside experts, growth of the stream, Harmony slices."""
import sys
import types

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config, tiny_random  # noqa: F401

import gptoss_lab as lab
from gptoss_lab import harmony, mxfp4, tokenizer
from gptoss_lab.probes import channels
from gptoss_lab.probes.ablation import Ablation, Part, ablated, difference_of_means, steered
from gptoss_lab.probes.activity import Activity, PackingError
from gptoss_lab.probes.heads import HeadScores, repeated
from gptoss_lab.probes.residual import Growth

CONFIG = tiny_config()
TOKENS, OTHER = random_tokens(CONFIG, 2, 25), random_tokens(CONFIG, 2, 25, seed=1)
METRIC = lambda logits: logits[:, -1, 7]


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "packed"])
def model(request):
    return random_model(CONFIG, packed=request.param)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- ablation ---


def by_hand(model, layer, attn_out=None, mlp_out=None):
    """The logits where one layer writes something else."""
    with lab.record(model, ("resid_pre", layer), ("attn_out", layer), ("mlp_out", layer)) as acts:
        model(TOKENS)
    edits = {}
    if attn_out is not None:
        edits[f"blocks.{layer}.hook_resid_mid"] = acts["resid_pre", layer] + attn_out(acts)
    if mlp_out is not None:
        edits[f"blocks.{layer}.hook_mlp_out"] = mlp_out(acts)
    with lab.edit(model, edits):
        return model(TOKENS)


def test_a_head_taken_away_writes_nothing_and_its_mean_writes_the_mean(model):
    with lab.record(model, ("result", 2)) as here:
        model(TOKENS)
    with lab.record(model, ("result", 2)) as there:
        model(OTHER)
    own = here["result", 2][:, :, 1]
    for how, write in (("zero", 0 * own), ("mean", there["result", 2][:, :, 1].mean((0, 1)).expand_as(own)), ("resample", there["result", 2][:, :, 1])):
        want = by_hand(model, 2, attn_out=lambda acts, write=write: acts["attn_out", 2] - own + write)
        with ablated(model, Part("head", 2, 1), how, None if how == "zero" else OTHER):
            assert torch.allclose(model(TOKENS), want), how


def test_an_expert_taken_away_is_chosen_and_says_nothing(model):
    with lab.record(model, *(f"blocks.1.mlp.hook_expert_{n}" for n in ("indices", "weights", "out"))) as acts:
        model(TOKENS)
    expert = int(acts["expert_indices", 1][0, -1, 0])
    weights = acts["expert_weights", 1] * (acts["expert_indices", 1] != expert)
    want = by_hand(model, 1, mlp_out=lambda _: torch.einsum("bsk, bskd -> bsd", weights, acts["expert_out", 1]))
    with ablated(model, Part("expert", 1, expert)):
        assert torch.allclose(model(TOKENS), want)
    mine = acts["expert_out", 1][acts["expert_indices", 1] == expert].mean(0)
    out = torch.where((acts["expert_indices", 1] == expert)[..., None], mine, acts["expert_out", 1])
    want = by_hand(model, 1, mlp_out=lambda _: torch.einsum("bsk, bskd -> bsd", acts["expert_weights", 1], out))
    with ablated(model, Part("expert", 1, expert), "mean", TOKENS):
        assert torch.allclose(model(TOKENS), want)


def test_a_neuron_is_a_column_of_one_experts_second_matrix(model):
    with lab.record(model, "blocks.3.mlp.hook_post", "blocks.3.mlp.hook_expert_indices", "blocks.3.mlp.hook_expert_weights") as acts:
        plain = model(TOKENS)
    expert = int(acts["expert_indices", 3][0, -1, 0])
    mine = (acts["expert_indices", 3] == expert) * acts["expert_weights", 3]
    write = torch.einsum("bsk, bsk, d -> bsd", mine, acts["post", 3][..., 9], model.blocks[3].mlp.down.matrix(expert)[:, 9])
    want = by_hand(model, 3, mlp_out=lambda a: a["mlp_out", 3] - write)
    with ablated(model, Part("neuron", 3, expert, 9)):
        assert torch.allclose(model(TOKENS), want)
    assert not torch.allclose(plain, want, atol=1e-9)


def test_layers_and_sinks_go_too_and_several_at_once(model):
    with ablated(model, [Part("attention", 1), Part("experts", 1)]), lab.record(model, ("resid_pre", 1), ("resid_post", 1)) as acts:
        model(TOKENS)
    assert torch.equal(acts["resid_pre", 1], acts["resid_post", 1])
    with ablated(model, [Part("sink", 1, 0), Part("sink", 1, 3)]), lab.record(model, ("sink_mass", 1)) as acts:
        model(TOKENS)
    assert (acts["sink_mass", 1][:, [0, 3]] == 0).all() and (acts["sink_mass", 1][:, [1, 2]] > 0).all()


def test_the_worth_of_parts_is_a_difference_of_metrics(model, monkeypatch):
    parts = [Part("head", 0, 2), Part("experts", 3), Part("sink", 2, 1)]
    result = Ablation.measure(model, TOKENS, parts=parts, metric=METRIC)
    assert result.parts == ("head 0 2", "experts 3", "sink 2 1") and torch.allclose(result.plain, METRIC(model(TOKENS)))
    for part, change in zip(parts, result.change):
        with ablated(model, part):
            assert torch.allclose(METRIC(model(TOKENS)) - result.plain, change)
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
    assert list(result.frame()["change"]) == pytest.approx(result.change.mean(1).tolist())


@pytest.mark.parametrize("part, how, message", [
    (Part("limb", 0), "zero", "limb 0: there are head"),
    (Part("head", 4, 0), "zero", "layers 0 to 3"),
    (Part("head", 0, 4), "zero", "a head of 0 to 3"),
    (Part("head", 0), "zero", "a head of 0 to 3"),
    (Part("neuron", 0, 1, 64), "zero", "a neuron of 0 to 63"),
    (Part("head", 0, 1), "mean", "needs reference tokens"),
    (Part("head", 0, 1), "half", "how = 'half': there are zero"),
])  # fmt: skip
def test_what_cannot_be_ablated_is_named(model, part, how, message):
    with pytest.raises(ValueError, match=message), ablated(model, part, how):
        pass
    with pytest.raises(ValueError, match="cannot be ablated by 'resample'"), ablated(model, Part("expert", 0, 1), "resample", OTHER):
        pass
    with pytest.raises(ValueError, match="no parts"):
        Ablation.measure(model, TOKENS, parts=[], metric=METRIC)


# --- steering ---


def test_a_steering_vector_is_added_everywhere_and_taken_from_means(model):
    vector = difference_of_means(model, TOKENS, OTHER, 1)
    with lab.record(model, ("resid_post", 1)) as a:
        model(TOKENS)
    with lab.record(model, ("resid_post", 1)) as b:
        model(OTHER)
    assert torch.allclose(vector, (a["resid_post", 1][0, -1] + a["resid_post", 1][1, -1] - b["resid_post", 1][0, -1] - b["resid_post", 1][1, -1]) / 2)
    assert torch.allclose(difference_of_means(model, TOKENS, OTHER, 1, None), a["resid_post", 1].mean((0, 1)) - b["resid_post", 1].mean((0, 1)))
    with steered(model, 1, vector, 2.0), lab.record(model, ("resid_pre", 2)) as acts:
        model(TOKENS)
    assert torch.allclose(acts["resid_pre", 2], a["resid_post", 1] + 2 * vector)
    with pytest.raises(ValueError, match=r"32 numbers, not \(31,\)"), steered(model, 1, vector[1:]):
        pass
    with pytest.raises(ValueError, match="with NaN"), steered(model, 1, vector * torch.nan):
        pass


# --- heads ---


def test_head_scores_are_means_of_the_pattern_along_diagonals(model):
    tokens = repeated(random_tokens(CONFIG, 2, 12))
    scores = HeadScores.measure(model, tokens, period=12)
    with lab.record(model, "*.hook_pattern", "*.hook_sink_mass") as acts:
        model(tokens)
    for layer, row, head in ((0, 0, 0), (3, 1, 2), (2, 0, 3)):
        p = acts["pattern", layer][row, head]
        mean = lambda pairs, p=p: sum(float(p[q, k]) for q, k in pairs) / len(pairs)
        at = (layer, row, head)
        assert float(scores.previous[at]) == pytest.approx(mean([(q, q - 1) for q in range(1, 24)]))
        assert float(scores.duplicate[at]) == pytest.approx(mean([(q, q - 12) for q in range(12, 24)]))
        assert float(scores.induction[at]) == pytest.approx(mean([(q, q - 11) for q in range(12, 24)]))
        assert float(scores.first[at]) == pytest.approx(mean([(q, 0) for q in range(1, 24)]))
        assert float(scores.sink[at]) == pytest.approx(float(acts["sink_mass", layer][row, head].mean()))
    assert (scores.induction[[0, 2]] == 0).all(), "a window of 8 cannot see 11 back"
    best = scores.best("induction", 3)
    assert best[0][2] == max(scores.induction.mean(1).flatten().tolist()) and best[0][0] in (1, 3)
    assert scores.plot(note="random").get_suptitle().startswith("induction score")
    for wrong in (1, 13):
        with pytest.raises(ValueError, match=f"period {wrong} in a text of 24"):
            HeadScores.measure(model, tokens, period=wrong)
    acts._kept["blocks.1.attn.hook_pattern"][0] *= 0.5
    with pytest.raises(ValueError, match="do not sum to 1"):
        HeadScores.of(acts, period=12)


# --- inside the experts ---


def test_clamp_rates_count_inputs_beyond_the_limit(model):
    activity = Activity.measure(model, TOKENS, limit=2.0)
    with lab.record(model, *Activity.points) as acts:
        model(TOKENS)
    for layer in range(4):
        gate, linear, post = (acts[name, layer].flatten().tolist() for name in ("pre", "pre_linear", "post"))
        assert float(activity.gate_clamped[layer]) == pytest.approx(sum(x > 2 for x in gate) / len(gate))
        assert float(activity.linear_clamped[layer]) == pytest.approx(sum(abs(x) > 2 for x in linear) / len(linear))
        assert float(activity.gate_max[layer]) == max(gate) and float(activity.linear_max[layer]) == max(map(abs, linear))
        largest = max(map(abs, post))
        assert float(activity.sparsity[layer]) == pytest.approx(sum(abs(x) < 0.01 * largest for x in post) / len(post))
    assert activity.gate_clamped.max() > 0


def test_the_gini_of_equal_neurons_is_none_and_of_one_speaker_all():
    from gptoss_lab.hooks import Activations

    model = random_model(CONFIG)
    for post, want in ((torch.ones(1, 5, 3, 64), 0.0), (torch.zeros(1, 5, 3, 64).index_fill(3, torch.tensor([7]), 1.0), 1 - 1 / 64)):
        kept = Activations(model.hook_points, [model.hook_points[f"blocks.0.mlp.hook_{n}"] for n in ("pre", "pre_linear", "post")])
        kept._kept = {p.name: [post] for p in kept.wanted}
        assert float(Activity.of(kept).gini[0]) == pytest.approx(want, abs=1e-5)


def test_packing_errors_are_those_of_each_block():
    model = tiny_random()
    result = PackingError.measure(model)
    w = model.blocks[2].mlp.down.weight.double()
    back = torch.stack([mxfp4.unpack(*mxfp4.pack(one), torch.float64) for one in w])
    assert float(result.relative[2, 1]) == pytest.approx(float((back - w).norm() / w.norm()))
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(back.view(-1, 32), w.view(-1, 32)))
    assert float(result.worst[2, 1]) == pytest.approx(worst)
    assert torch.allclose(result.codes.sum(-1), torch.ones(4, 2)) and 0.05 < result.relative.mean() < 0.2
    packed = PackingError.measure(random_model(CONFIG, packed=True))
    assert (packed.relative == 0).all() and (packed.worst == 0).all()


# --- the stream ---


def test_growth_is_the_norms_of_the_stream_and_of_what_is_written(model):
    growth = Growth.measure(model, TOKENS)
    with lab.record(model, "hook_embed", "*.hook_resid_mid", "*.hook_resid_post", "*.hook_attn_out", "*.hook_mlp_out") as acts:
        model(TOKENS)
    assert torch.allclose(growth.norm[0], acts["hook_embed"].norm(dim=-1)) and torch.allclose(growth.norm[8], acts["resid_post", 3].norm(dim=-1))
    assert torch.allclose(growth.written[4], acts["attn_out", 2].norm(dim=-1)) and torch.allclose(growth.written[5], acts["mlp_out", 2].norm(dim=-1))
    a, b = acts["resid_mid", 1][0, 5], acts["resid_post", 1][0, 5]
    assert float(growth.turn[3, 0, 5]) == pytest.approx(float(a @ b / a.norm() / b.norm()))
    x = acts["resid_post", 3]
    assert float(growth.largest[8, 4]) == pytest.approx(float(x[..., 4].abs().max() / x.square().mean().sqrt()))
    assert growth.outliers(n=2)[0][1] == float(growth.largest[8].max())
    assert growth.plot([str(i) for i in range(25)]).axes


# --- Harmony ---


def test_every_token_of_a_conversation_gets_its_channel():
    encoding = tokenizer.tiny()
    talk = [
        harmony.Message("system", harmony.SystemContent()), harmony.Message("developer", "be brief"), harmony.Message("user", "add 3+4"),
        harmony.Message("assistant", "3+4=7", channel="analysis"),
        harmony.Message("assistant", "{}", recipient="functions.calc", channel="commentary", content_type="<|constrain|>json"),
        harmony.Message("tool", "7", name="functions.calc", recipient="assistant", channel="commentary"),
        harmony.Message("assistant", "=7", channel="final"),
    ]  # fmt: skip
    parts = [harmony.render_message(message, encoding) for message in talk]
    labels = channels.slices(torch.tensor([t for part in parts for t in part]), encoding)
    names = [channels.LABELS[i] for i in labels]
    at = 0
    for part, want in zip(parts, ("system", "developer", "user", "analysis", "commentary", "tool", "final")):
        here, body = names[at : at + len(part)], part.index(tokenizer.special(encoding, "<|message|>")) + 1
        assert set(here[:body]) == {"header"} and here[-1] == "header" and set(here[body:-1]) == {want}, want
        at += len(part)
    completion = encoding.encode("<|channel|>analysis<|message|>3<|end|><|start|>assistant<|channel|>final<|message|>4<|return|> red", allowed_special="all")
    names = [channels.LABELS[i] for i in channels.slices(torch.tensor(completion), encoding)]
    assert names == ["header"] * 3 + ["analysis"] + ["header"] * 6 + ["final", "header", "none"]
    with pytest.raises(ValueError, match="one row of tokens"):
        channels.slices(torch.zeros(1, 3, dtype=torch.long), encoding)


def test_a_value_is_averaged_by_channel():
    labels = torch.tensor([0, 5, 5, 7])
    assert channels.mean_by(torch.tensor([[1.0, 2, 4, 8], [1, 2, 4, 8]]), labels) == {"header": 1.0, "analysis": 3.0, "final": 8.0}
    with pytest.raises(ValueError, match="4 labels for 3 positions"):
        channels.mean_by(torch.zeros(3), labels)


def test_nothing_here_changes_the_model(model):
    before, logits = {n: p.clone() for n, p in model.named_parameters()}, model(TOKENS)
    with ablated(model, [Part("head", 0, 0), Part("expert", 1, 2), Part("neuron", 2, 3, 4), Part("sink", 3, 1)]):
        model(TOKENS)
    for probe, about in ((Activity, {}), (Growth, {}), (HeadScores, {"period": 12})):
        probe.measure(model, TOKENS, **about)
    PackingError.measure(model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(model(TOKENS), logits) and not model.recordings and not model.blocks[1].mlp.listeners


def test_every_result_is_drawn_with_a_title_and_tabulated(model, monkeypatch):
    from gptoss_lab.probes.attribution import Attribution
    from gptoss_lab.probes.streaming import attention

    with attention(model, ["sink_mass", "entropy", "mean_distance", "received"], windows=(4,)) as stream:
        model(TOKENS)
    streamed = stream.result()
    results = [
        Ablation.measure(model, TOKENS, parts=[Part("head", 0, 2), Part("experts", 3)], metric=METRIC), Activity.measure(model, TOKENS),
        Attribution.measure(model, TOKENS, answer=torch.tensor([1, 2])), PackingError.measure(model), streamed,
        HeadScores.measure(model, TOKENS, period=12),
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
    for result in results:
        picture = result.plot(note="random weights")
        assert "random weights" in picture.get_suptitle() and picture.png()[:4] == b"\x89PNG"
        table = result.frame()
        assert len({len(column) for column in table.values()}) == 1, type(result)
    for layer in range(4):
        for head in range(4):
            mass = [float(streamed.sink_mass[layer, b, head, s]) for b in range(2) for s in range(25)]
            assert float(streamed.by_head("sink_mass")[layer, head]) == pytest.approx(sum(mass) / 50)
    with pytest.raises(ValueError, match="on was not streamed"):
        streamed.by_head("on")
    with pytest.raises(ValueError, match="for each window"):
        streamed.plot("within")
