"""Values recorded inside the real gpt-oss-20b pass through our equations to the recorded results.

The recordings (bf16, official PyTorch implementation on a CPU, one 74-token prompt, the last token of layers 0
and 1) and their source are described beside the data.
"""
import base64

import numpy as np
import pytest
import torch
from einops import einsum
from shared import facts

from gptoss_lab.config import published
from gptoss_lab.model import route, softmax_with_sink, swiglu

LIMIT, ALPHA = published("gpt-oss-20b").swiglu_limit, published("gpt-oss-20b").swiglu_alpha


@pytest.fixture(scope="module")
def recorded():
    data = facts("golden_20b_reference_intermediates.json")

    def tensor(name: str) -> torch.Tensor:
        (found,) = [v for k, v in data["boundaries"].items() if k == name or k == f"layer0_final_token_{name}"]
        bits = np.frombuffer(base64.b64decode(found["values_bf16_b64"]), dtype="<u2").astype(np.int32)
        return torch.from_numpy(bits << 16).view(torch.float32).reshape(found["shape"]).bfloat16()

    tensor.data = data
    return tensor


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference in steps of bf16 at the size of the value (256 steps a power of two)."""
    step = theirs.double().abs().clamp(min=2.0**-20).log2().floor().exp2() / 128
    return float(((ours.double() - theirs.double()).abs() / step).max())


def test_softmax_with_the_real_sinks_gives_the_recorded_probabilities(recorded):
    logits = recorded("masked_scaled_qk_logits_pre_softmax")
    expected = recorded("attention_probs_post_softmax")
    sinks = torch.tensor(recorded.data["layer0_sinks"]).bfloat16()
    assert torch.equal(logits[:, -1], sinks)
    pattern, mass = softmax_with_sink(logits[None, :, None, :-1], sinks[None, :, None])
    assert torch.equal(pattern[0, :, 0], expected[:, :-1])
    assert torch.equal(mass[0, :, 0], expected[:, -1])


def test_the_sink_mass_of_layer_0_is_what_was_found_in_it(recorded):
    """mean .434, median .371, 26 of 64 heads over .5; the first token gets .0009 on average."""
    logits = recorded("masked_scaled_qk_logits_pre_softmax").double()
    pattern, mass = softmax_with_sink(logits[None, :, None, :-1], logits[None, :, None, -1])
    mass = mass.flatten()
    assert mass.mean() == pytest.approx(0.434, abs=5e-4)
    assert mass.median() == pytest.approx(0.371, abs=1e-3)  # of 64, the lower of the middle two
    assert int((mass > 0.5).sum()) == 26
    assert pattern[0, :, 0, 0].mean() == pytest.approx(0.0009, abs=5e-5)


def test_swiglu_gives_the_recorded_activation_of_expert_30(recorded):
    rows = recorded("expert30_mlp1_output_before_swiglu")
    gate, linear = rows[0::2].clamp(max=LIMIT), rows[1::2].clamp(-LIMIT, LIMIT)
    assert torch.equal(swiglu(gate, linear, ALPHA), recorded("expert30_swiglu_output_before_mlp2"))
    halves = swiglu(rows[:2880].clamp(max=LIMIT), rows[2880:].clamp(-LIMIT, LIMIT), ALPHA)
    assert ulps(halves, recorded("expert30_swiglu_output_before_mlp2")) > 1000  # the order of rows matters


@pytest.mark.parametrize("layer", [0, 1])
def test_the_router_picks_the_recorded_experts_with_the_recorded_weights(recorded, layer):
    logits = recorded(f"layer{layer}_final_token_mlp_router_logits_before_routing")[None, None]
    indices = route(logits, 4)
    expected = recorded.data[f"layer{layer}_routing"]
    assert indices.flatten().tolist() == expected["experts"]
    assert logits.gather(-1, indices).softmax(-1).flatten().tolist() == expected["weights"]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_weighted_sum_of_experts_gives_the_recorded_output(recorded, layer):
    at = f"layer{layer}_final_token_"
    out = recorded(at + "selected_expert_outputs_before_routing_weighted_sum")[None, None]
    weights = torch.tensor(recorded.data[f"layer{layer}_routing"]["weights"]).bfloat16()[None, None]
    mixed = einsum(weights, out, "b s k, b s k d -> b s d").flatten()
    expected = recorded(at + "mlp_output_after_routing_weighted_sum_before_residual")
    terms = (weights.unsqueeze(-1).double() * out.double()).abs().sum(2).flatten()  # what rounding is relative to
    assert ((mixed.double() - expected.double()).abs() <= terms / 128).all()
    assert (mixed == expected).float().mean() > 0.95


def test_the_residual_stream_adds_up_as_recorded(recorded):
    before = recorded("hidden_state_after_attention_residual_add_before_mlp")
    added = recorded("mlp_output_after_routing_weighted_sum_before_residual")
    assert torch.equal(before + added, recorded("hidden_state_after_mlp_residual_add"))



def test_in_float16_nothing_recorded_overflows(recorded):
    """As on a card without bfloat16: what attention, the experts and the router make of the real values."""
    half = lambda name: recorded(name).half()
    scores = half("masked_scaled_qk_logits_pre_softmax")
    assert scores.isfinite().logical_or(recorded("masked_scaled_qk_logits_pre_softmax").isinf()).all()
    pattern, mass = softmax_with_sink(scores[None, :, None, :-1], scores[None, :, None, -1])
    got = torch.cat([pattern, mass[..., None]], -1)[0, :, 0].float()
    torch.testing.assert_close(got, recorded("attention_probs_post_softmax").float(), atol=2e-3, rtol=2**-7)
    rows = half("expert30_mlp1_output_before_swiglu")
    post = swiglu(rows[0::2].clamp(max=LIMIT), rows[1::2].clamp(-LIMIT, LIMIT), ALPHA).float()
    wide = recorded("expert30_mlp1_output_before_swiglu").double()
    exact = swiglu(wide[0::2].clamp(max=LIMIT), wide[1::2].clamp(-LIMIT, LIMIT), ALPHA).float()
    torch.testing.assert_close(post, exact, atol=1e-2, rtol=2**-8)
    at = "layer1_final_token_"
    out = half(at + "selected_expert_outputs_before_routing_weighted_sum")[None, None]
    weights = torch.tensor(recorded.data["layer1_routing"]["weights"]).half()[None, None]
    added = einsum(weights, out, "b s k, b s k d -> b s d").flatten()
    after = recorded("hidden_state_after_attention_residual_add_before_mlp").float() + added.float()
    assert after.isfinite().all() and added.abs().max() < 65_504
