"""Patching, its first-order estimate, and single paths."""
import re

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

import gptoss_lab as lab
from gptoss_lab.probes import patching
from gptoss_lab.probes.patching import Patching, attribution, disagreement, logit_difference, path_patching

CONFIG = tiny_config()
TOKENS, OTHER = random_tokens(CONFIG, 2, 12), random_tokens(CONFIG, 2, 12, seed=1)
METRIC = logit_difference(torch.tensor([3, 5]), torch.tensor([8, 9]))


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "packed"])
def model(request):
    return random_model(CONFIG, packed=request.param)


def test_a_patch_is_the_forward_pass_with_one_vector_exchanged(model):
    """By hand: the blocks called one after the other."""
    result = Patching.measure(model, TOKENS, other=OTHER, metric=METRIC, points=["*.hook_resid_pre"], positions=[0, 4, 11])
    assert result.sites == tuple(f"blocks.{i}.hook_resid_pre" for i in range(4)) and result.effect.shape == (4, 3, 2)
    from gptoss_lab.kv_cache import KVCache

    with torch.no_grad():
        positions = KVCache(CONFIG).place(TOKENS, None)
        cos, sin = model.rotary_emb(positions.query, torch.float64)
        low, high = METRIC(model(TOKENS)), METRIC(model(OTHER))
        for layer in range(4):
            for i, position in enumerate((0, 4, 11)):
                x, y = model(TOKENS, stop_at_layer=layer), model(OTHER, stop_at_layer=layer)
                x[:, position] = y[:, position]
                for block in model.blocks[layer:]:
                    x = block(x, cos, sin, positions.visible(block.attn.window), None)
                want = (METRIC(model.unembed(model.ln_final(x))) - low) / (high - low).mean()
                assert torch.allclose(result.effect[layer, i], want, atol=1e-9)


def test_all_positions_of_the_last_stream_turn_the_answer_whole(model):
    result = Patching.measure(model, TOKENS, other=OTHER, metric=METRIC, points=["blocks.3.hook_resid_post"])
    assert result.mean[0, -1] == pytest.approx(1) and result.mean[0, :-1].abs().max() < 1e-9
    assert torch.allclose(result.clean, METRIC(model(TOKENS))) and torch.allclose(result.other, METRIC(model(OTHER)))


def test_heads_and_expert_slots_are_sites_of_their_own(model):
    result = Patching.measure(model, TOKENS, other=OTHER, metric=METRIC, points=["blocks.2.attn.hook_z", "blocks.2.mlp.hook_expert_out"],
                              each=True, positions=[11])
    assert len(result.sites) == 4 + 3 and result.sites[1].endswith("hook_z head 1") and result.sites[-1].endswith("slot 2")
    with lab.record(model, ("z", 2)) as source, torch.no_grad():
        model(OTHER)

    def put(z):
        z[:, 11, 1] = source["z", 2][:, 11, 1]

    with lab.edit(model, {("z", 2): put}), torch.no_grad():
        got = METRIC(model(TOKENS))
    assert torch.allclose(result.effect[1, 0], (got - result.clean) / (result.other - result.clean).mean())


def test_attribution_is_the_slope_of_patching(model):
    """Where the other text is hardly another, first order is all there is."""
    embed = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight[60] = model.embed.weight[7] + 1e-5 * torch.randn(32, dtype=torch.float64)
    one = torch.full((2, 12), 7)
    near = one.clone()
    near[:, [2, 11]] = 60
    try:
        points = ["*.hook_resid_pre", "blocks.1.attn.hook_z", "blocks.2.mlp.hook_router_logits"]
        estimate = attribution(model, one, other=near, metric=METRIC, points=points)
        real = Patching.measure(model, one, other=near, metric=METRIC, points=points)
        error = disagreement(estimate, real)
        assert error["largest"] < 1e-3 and error["correlation"] > 0.9999, error
    finally:
        with torch.no_grad():
            model.embed.weight.copy_(embed)


def test_the_error_of_attribution_is_shown_where_texts_differ(model):
    estimate = attribution(model, TOKENS, other=OTHER, metric=METRIC, each=True, points=["*.hook_z"])
    real = Patching.measure(model, TOKENS, other=OTHER, metric=METRIC, each=True, points=["*.hook_z"])
    error = disagreement(estimate, real)
    assert 0 < error["rms"] <= error["largest"] and -1 <= error["correlation"] <= 1
    with pytest.raises(ValueError, match="different sites"):
        disagreement(estimate, Patching.measure(model, TOKENS, other=OTHER, metric=METRIC, points=["blocks.0.hook_resid_pre"]))


def frozen(model, sender_edit, receiver):
    """The path by brute force: the sender changed, every other write frozen, the receiver read."""
    with lab.record(model, "*.hook_attn_out", "*.hook_mlp_out", "*.hook_result", "*.hook_expert_out", "*.hook_expert_weights") as clean, torch.no_grad():
        model(TOKENS)
    edits = {name: clean[name] for name in clean if name.endswith(("attn_out", "mlp_out"))}
    edits |= sender_edit(clean)
    with lab.edit(model, edits), lab.record(model, receiver) as acts, torch.no_grad():
        model(TOKENS)
    return acts[receiver]


@pytest.mark.parametrize("receiver", ["blocks.2.attn.hook_k", "blocks.3.attn.hook_v", "blocks.1.mlp.hook_router_logits"])
def test_a_path_from_a_head_is_what_freezing_everything_else_gives(model, receiver):
    def sender(clean):
        with lab.record(model, ("result", 1)) as source, torch.no_grad():
            model(OTHER)
        out = clean["attn_out", 1] + source["result", 1][:, :, 2] - clean["result", 1][:, :, 2]
        return {"blocks.1.hook_attn_out": out}

    value = frozen(model, sender, receiver)
    with lab.edit(model, {receiver: value}), torch.no_grad():
        got = METRIC(model(TOKENS))
    with torch.no_grad():
        low, high = METRIC(model(TOKENS)), METRIC(model(OTHER))
    want = (got - low) / (high - low).mean()
    effect = path_patching(model, TOKENS, other=OTHER, metric=METRIC, sender="blocks.1.attn", head=2, receivers=[receiver])
    assert torch.allclose(effect, want, atol=1e-9) and effect.abs().max() > 1e-6


def test_the_path_from_experts_to_the_logits_is_direct(model):
    effect = path_patching(model, TOKENS, other=OTHER, metric=METRIC, sender="blocks.1.mlp")
    with torch.no_grad(), lab.record(model, ("mlp_out", 1), ("resid_post", 3)) as clean:
        low = METRIC(model(TOKENS))
    with torch.no_grad(), lab.record(model, ("mlp_out", 1)) as source:
        high = METRIC(model(OTHER))
    stream = clean["resid_post", 3] + source["mlp_out", 1] - clean["mlp_out", 1]
    with torch.no_grad():
        want = (METRIC(model.unembed(model.ln_final(stream))) - low) / (high - low).mean()
    assert torch.allclose(effect, want)


def test_the_paths_of_all_experts_sum_before_the_norm(model):
    """One receiver that is linear in the stream: the last residual. Each expert's change, added, is the layer's."""
    parts = [path_patching(model, TOKENS, other=OTHER, metric=lambda x: x[:, -1, 0], sender="blocks.3.mlp", expert=e) for e in range(8)]
    assert all(part.isfinite().all() for part in parts) and len({tuple(part.tolist()) for part in parts}) > 3


def test_the_model_is_as_before(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(TOKENS).detach()
    Patching.measure(model, TOKENS, other=OTHER, metric=METRIC, points=["*.hook_z"], positions=[3])
    attribution(model, TOKENS, other=OTHER, metric=METRIC)
    path_patching(model, TOKENS, other=OTHER, metric=METRIC, sender="blocks.0.attn")
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    assert torch.equal(model(TOKENS), logits) and not model.recordings


def test_it_is_saved_and_drawn(model, tmp_path):
    result = Patching.measure(model, TOKENS, other=OTHER, metric=METRIC)
    again = Patching.load(result.save(tmp_path / "x"))
    assert again.sites == result.sites and torch.equal(again.effect, result.effect)
    [ax, _] = result.plot([f"t{i}" for i in range(12)], note="random").axes
    assert ax.get_xlabel() == "position of the patch" and "random" in ax.figure.get_suptitle()


def test_chosen_positions_are_named_in_the_picture_and_the_table(model, monkeypatch):
    import sys
    import types

    result = Patching.measure(model, TOKENS, other=OTHER, metric=METRIC, points=["blocks.1.hook_resid_pre"], positions=[5, 10])
    [ax, _] = result.plot([f"t{i}" for i in range(12)]).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["t5", "t10"]
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
    assert result.frame()["position"] == [5, 10]
    with pytest.raises(ValueError, match="2 words, but position 10 was patched"):
        result.plot(["a", "b"])


@pytest.mark.parametrize("wrong, message", [
    (dict(positions=[50]), r"positions \(50,\): the texts have 0 to 11"),
    (dict(other=OTHER[:, :5]), r"shapes \(2, 12\) and \(2, 5\)"),
    (dict(points=["*.hook_pattern"]), "hook_pattern is not"),
    (dict(metric=lambda x: x.sum()), r"the metric gave \(\) for 2 rows"),
    (dict(other=TOKENS), "the same on both texts"),
])  # fmt: skip
def test_what_cannot_be_patched_is_refused(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        Patching.measure(model, TOKENS, **({"other": OTHER, "metric": METRIC} | wrong))


def test_a_receiver_before_its_sender_is_refused(model):
    for sender, receiver in (("blocks.2.attn", "blocks.1.attn.hook_q"), ("blocks.2.attn", "blocks.2.attn.hook_q"), ("blocks.2.mlp", "blocks.2.mlp.hook_router_logits")):
        with pytest.raises(ValueError, match="does not read the stream after"):
            path_patching(model, TOKENS, other=OTHER, metric=METRIC, sender=sender, receivers=[receiver])


def test_a_frozen_model_has_no_attribution():
    model = random_model(CONFIG).requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        attribution(model, TOKENS, other=OTHER, metric=METRIC)
    assert patching.STREAM


@pytest.mark.parametrize("about, says", [
    ({"sender": "blocks.9.attn"}, "sender = 'blocks.9.attn'"), ({"sender": "attn"}, "must be blocks.L.attn or blocks.L.mlp"),
    ({"sender": "blocks.1.mlp", "head": 0}, "head = 0 of blocks.1.mlp"), ({"sender": "blocks.1.attn", "head": 99}, "head = 99"),
    ({"sender": "blocks.1.attn", "expert": 0}, "expert = 0 of blocks.1.attn"),
])  # fmt: skip
def test_a_sender_that_does_not_exist_is_named(model, about, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        path_patching(model, TOKENS, other=OTHER, metric=METRIC, **about)
