"""The float64 reference is proved here, against Hugging Face and published numbers, before it may judge."""
import base64

import numpy as np
import pytest
import reference
import torch
from hf import hf_activations, hf_config, hf_model
from reference import forward, random_config, random_weights, softmax
from shared import facts

N_POS = 300
YARN_20B = dict(d_head=64, rope_theta=150000.0, yarn_factor=32.0, yarn_beta_fast=32.0, yarn_beta_slow=1.0,
                yarn_truncate=False, n_ctx_trained=4096)
# A window far below N_POS, three query heads to each kv head, a YaRN ramp whose ends truncation moves.
# The limit is low because at gpt-oss's 7 a gate clamped below too differs by 4e-5 only: silu(-7) is nearly 0.
SMALL = dict(n_layers=2, d_model=40, n_heads=6, n_kv_heads=2, d_head=16, d_ff=27, n_experts=8,
             experts_per_token=3, d_vocab=101, layer_windows=[8, None], rope_theta=1000.0, yarn_factor=16.0,
             yarn_beta_fast=8.0, yarn_beta_slow=1.0, yarn_truncate=False, n_ctx_trained=256, swiglu_limit=1.5,
             norm_eps=1e-3)


def drawn(seed: int, cfg: dict | None = None) -> tuple[dict, dict, np.ndarray]:
    rng = np.random.default_rng(seed)
    cfg = cfg or random_config(rng)
    return random_weights(cfg, rng), cfg, rng.integers(0, cfg["d_vocab"], N_POS)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference as a fraction of the largest value."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def small():
    weights, cfg, tokens = drawn(0, SMALL)
    truth = hf_activations(hf_model(weights, cfg, torch.float64), tokens)["unembed.hook_out"][0].numpy()
    return weights, cfg, tokens, truth


@pytest.mark.parametrize("seed", range(10))
def test_every_point_hugging_face_shows_equals_the_reference_in_float64(seed):
    weights, cfg, tokens = drawn(seed)
    ours = forward(weights, cfg, tokens)
    theirs = hf_activations(hf_model(weights, cfg, torch.float64), tokens)
    assert len(theirs) == 5 + 15 * cfg["n_layers"]
    for name, value in theirs.items():
        assert ours[name].shape == value.shape[1:], name
        assert difference(ours[name], value[0].numpy()) < 1e-12, (name, cfg)


def test_hugging_face_in_float32_agrees_to_float32s_digits(small):
    weights, cfg, tokens, truth = small
    logits = hf_activations(hf_model(weights, cfg), tokens)["unembed.hook_out"]
    assert logits.dtype == torch.float32
    assert 1e-9 < difference(logits[0].numpy(), truth) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_same_tokens_alone(small, side):
    weights, cfg, tokens, _ = small
    n_pad = 40
    short, pad = tokens[:-n_pad], np.zeros(n_pad, int)
    row = np.concatenate([pad, short] if side == "left" else [short, pad])
    mask = np.ones((2, N_POS), int)
    real = slice(n_pad, None) if side == "left" else slice(None, -n_pad)
    mask[1] = 0
    mask[1, real] = 1
    theirs = hf_activations(hf_model(weights, cfg, torch.float64), np.stack([tokens, row]), mask)
    for row, ids, rows in [(0, tokens, slice(None)), (1, short, real)]:
        ours = forward(weights, cfg, ids)
        for name in ("blocks.1.attn.hook_z", "blocks.1.mlp.hook_expert_weights", "unembed.hook_out"):
            assert difference(ours[name], theirs[name][row, rows].numpy()) < 1e-12, (name, row)


def test_hugging_face_cannot_express_two_windows():
    with pytest.raises(ValueError, match=r"\[4, 8\]"):
        hf_config(SMALL | dict(layer_windows=[8, 4]))


def test_yarn_has_the_published_ramp_concentration_and_frequencies():
    published = facts("yarn_reference.json")
    theta, concentration = reference.rope_frequencies(YARN_20B)
    truncated, _ = reference.rope_frequencies(YARN_20B | dict(yarn_truncate=True))
    assert reference.yarn_ramp(YARN_20B) == pytest.approx((published["low"], published["high"]), rel=1e-15)
    assert reference.yarn_ramp(YARN_20B | dict(yarn_truncate=True)) == (8, 18)
    assert concentration == pytest.approx(published["concentration"], rel=1e-15)
    # The frequencies were published in float32.
    assert theta == pytest.approx(published["inv_freq"], rel=2**-22)
    assert truncated == pytest.approx(published["inv_freq_truncate_true"], rel=2**-22)


def test_yarn_frequencies_are_hugging_faces_computed_in_float64():
    cfg = SMALL | YARN_20B
    for truncate in (False, True):
        cfg["yarn_truncate"] = truncate
        model = hf_model(random_weights(cfg, np.random.default_rng(0)), cfg, torch.float64)
        theta, concentration = reference.rope_frequencies(cfg)
        assert theta == pytest.approx(model.model.rotary_emb.inv_freq.numpy(), rel=1e-15)
        assert concentration == model.model.rotary_emb.attention_scaling


def test_the_sink_only_scales_ordinary_attention_by_the_sigmoid_of_lse_minus_sink(small):
    weights, cfg, tokens, _ = small
    acts = forward(weights, cfg, tokens)
    for layer in range(cfg["n_layers"]):
        name = f"blocks.{layer}.attn"
        scores, sink = acts[f"{name}.hook_attn_scores"], acts[f"{name}.hook_sink_scores"]
        lse = np.log(np.exp(scores).sum(-1))
        kept = reference.sigmoid(lse - sink)
        v = np.repeat(acts[f"{name}.hook_v"], cfg["n_heads"] // cfg["n_kv_heads"], axis=1)
        z = np.einsum("hst,thd->shd", kept[:, :, None] * softmax(scores), v)
        assert difference(z, acts[f"{name}.hook_z"]) < 1e-14
        assert np.abs(acts[f"{name}.hook_sink_mass"] - reference.sigmoid(sink - lse)).max() < 1e-15
        assert np.abs(acts[f"{name}.hook_pattern"].sum(-1) - kept).max() < 1e-14


def test_attention_is_the_sum_of_its_heads_and_its_bias(small):
    weights, cfg, tokens, _ = small
    acts = forward(weights, cfg, tokens)
    whole = acts["blocks.0.attn.hook_z"].reshape(N_POS, -1) @ weights["block.0.attn.out.weight"].T
    assert difference(acts["blocks.0.attn.hook_result"].sum(1), whole) < 1e-14
    assert difference(whole + weights["block.0.attn.out.bias"], acts["blocks.0.hook_attn_out"]) < 1e-14


def test_stopping_early_gives_the_same_values_and_no_more(small):
    weights, cfg, tokens, _ = small
    whole, part = forward(weights, cfg, tokens), forward(weights, cfg, tokens, stop=1)
    assert set(part) == {name for name in whole if not name.startswith(("blocks.1", "ln_final", "unembed"))}
    assert all(np.array_equal(part[name], whole[name]) for name in part)


@pytest.mark.parametrize("seed", range(5))
def test_the_drawn_weights_reach_both_ends_of_the_clamp_and_fill_the_sinks(seed):
    weights, cfg, tokens = drawn(seed)
    acts = forward(weights, cfg, tokens)
    for layer in range(cfg["n_layers"]):
        name, limit = f"blocks.{layer}", cfg["swiglu_limit"]
        gate, linear = acts[f"{name}.mlp.hook_pre"], acts[f"{name}.mlp.hook_pre_linear"]
        for part in (gate > limit, linear > limit, linear < -limit):
            assert 0.01 < part.mean() < 0.12
        assert 0.01 < acts[f"{name}.attn.hook_sink_mass"].mean() < 0.9
    assert 1 < acts["unembed.hook_out"].std() < 5


def test_every_drawn_weight_is_a_bfloat16():
    weights, _, _ = drawn(0)
    for name, value in weights.items():
        assert value.dtype == np.float64
        assert np.array_equal(torch.as_tensor(value).bfloat16().double().numpy(), value), name


def test_drawn_configurations_differ_where_a_mistake_could_hide():
    drawn_ = [random_config(np.random.default_rng(seed)) for seed in range(300)]
    assert {cfg["n_layers"] for cfg in drawn_} == {1, 2, 3, 4}
    assert {cfg["n_heads"] // cfg["n_kv_heads"] for cfg in drawn_} == {1, 2, 3, 4}
    assert {cfg["experts_per_token"] for cfg in drawn_} == {1, 2, 3, 4}
    assert {cfg["n_experts"] for cfg in drawn_} == set(range(4, 13))
    assert {w for cfg in drawn_ for w in cfg["layer_windows"]} == {None, *range(1, 33)}
    assert {tuple(w is None for w in cfg["layer_windows"]) for cfg in drawn_ if cfg["n_layers"] == 2} == {
        (True, True), (True, False), (False, True), (False, False)}
    assert {(cfg["yarn_factor"] > 1, cfg["yarn_truncate"]) for cfg in drawn_} == {
        (True, True), (True, False), (False, True), (False, False)}
    for cfg in drawn_:
        assert cfg["d_head"] % 2 == 0 and cfg["d_ff"] % 2 == 1 and cfg["d_ff"] != cfg["d_model"]
        if cfg["yarn_factor"] > 1:
            low, high = reference.yarn_ramp(cfg)
            assert 1 <= low < high < cfg["d_head"] / 2 - 1
            assert cfg["yarn_beta_slow"] < cfg["yarn_beta_fast"] < cfg["n_ctx_trained"] / (2 * np.pi)


# Mistakes made on purpose: drawn weights that could not tell them from the truth would prove nothing.

def scaled(pattern: str, factor: float):
    def mistake(w, cfg, replace):
        w |= {name: factor * w[name] for name in w if name.endswith(pattern)}
    return mistake


def no_sink(w, cfg, replace):
    w |= {name: np.full_like(w[name], -np.inf) for name in w if name.endswith("sinks")}


def config(**changes):
    def mistake(w, cfg, replace):
        cfg |= changes
    return mistake


def function(name: str, wrong):
    def mistake(w, cfg, replace):
        replace(reference, name, wrong)
    return mistake


def mlp1_rows(order):
    def mistake(w, cfg, replace):
        rows = np.arange(2 * cfg["d_ff"])
        for name in w:
            if "mlp1" in name:
                w[name] = w[name][:, order(rows)]
    return mistake


def groups_before_kv_heads(w, cfg, replace):
    H, K, h = cfg["n_heads"], cfg["n_kv_heads"], cfg["d_head"]
    heads = np.arange(H).reshape(H // K, K).T.ravel()
    for name in w:
        if name.endswith("sinks"):
            w[name] = w[name][heads]
        elif "qkv" in name:
            q = w[name][:H * h]
            w[name] = np.concatenate([q.reshape(H, h, -1)[heads].reshape(q.shape), w[name][H * h:]])
        elif name.endswith("attn.out.weight"):
            w[name] = w[name].reshape(-1, H, h)[:, heads].reshape(w[name].shape)


def interleaved(x, cos, sin):
    x1, x2, c, s = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    return np.stack([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1).reshape(x.shape)


def concentration(power: int):
    right = reference.rope_frequencies
    return function("rope_frequencies", lambda cfg: (right(cfg)[0], right(cfg)[1] ** power))


def softmax_over_all_experts(logits, k):
    indices = np.argsort(-logits, kind="stable")[:, :k]
    return indices, np.take_along_axis(softmax(logits), indices, axis=-1)


def bias_after_weighting(w, cfg, replace):
    right = reference.moe

    def wrong(x, w, cfg, layer, acts):
        out, name = right(x, w, cfg, layer, acts), f"blocks.{layer}.mlp"
        biases = w[f"block.{layer}.mlp.mlp2_bias"][acts[f"{name}.hook_expert_indices"]]
        return out + ((1 - acts[f"{name}.hook_expert_weights"][..., None]) * biases).sum(1)
    replace(reference, "moe", wrong)


MISTAKES = {
    "no clamp": config(swiglu_limit=np.inf),
    "gate clamped on both sides": function("clamp", lambda g, u, m: (np.clip(g, -m, m), np.clip(u, -m, m))),
    "linear not clamped": function("clamp", lambda g, u, m: (np.minimum(g, m), u)),
    "linear clamped above only": function("clamp", lambda g, u, m: (np.minimum(g, m), np.minimum(u, m))),
    "alpha 1": function("SWIGLU_ALPHA", 1.0),
    "no + 1": function("swiglu", lambda gate, linear: gate * reference.sigmoid(1.702 * gate) * linear),
    "gate and linear swapped": mlp1_rows(lambda rows: rows ^ 1),
    "gate and linear as halves": mlp1_rows(lambda rows: rows.reshape(2, -1).T.ravel()),
    "no second bias": scaled("mlp2_bias", 0),
    "second bias after weighting": bias_after_weighting,
    "softmax over all experts": function("top_k", softmax_over_all_experts),
    "one expert fewer": config(experts_per_token=2),
    "no sink": no_sink,
    "sink of zero": scaled("sinks", 0),
    "sink scaled like the scores": scaled("sinks", 1 / 4),
    "window on the odd layers": config(layer_windows=[None, 8]),
    "no window": config(layer_windows=[None, None]),
    "window of one key more": config(layer_windows=[9, None]),
    "window of one key fewer": config(layer_windows=[7, None]),
    "query heads as (group, kv)": groups_before_kv_heads,
    "interleaved pairs": function("rotate", interleaved),
    "no yarn": config(yarn_factor=1.0),
    "no concentration": concentration(0),
    "concentration twice": concentration(2),
    "yarn ends rounded": config(yarn_truncate=True),
    "eps of 1e-5": config(norm_eps=1e-5),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_equations_shows(small, mistake, monkeypatch):
    weights, cfg, tokens, truth = small
    weights, cfg = dict(weights), dict(cfg)
    MISTAKES[mistake](weights, cfg, monkeypatch.setattr)
    error = np.abs(forward(weights, cfg, tokens)["unembed.hook_out"] - truth).max()
    print(f"{mistake}: max |difference of logits| {error:.2g}")
    assert error > 0.05


def test_a_prompt_no_longer_than_the_window_cannot_show_a_longer_window(small):
    weights, cfg, tokens, _ = small
    right = forward(weights, cfg, tokens)["unembed.hook_out"]
    for windows in ([9, None], [None, None]):
        wrong = forward(weights, cfg | dict(layer_windows=windows), tokens)["unembed.hook_out"]
        assert np.array_equal(wrong[:8], right[:8])
        assert np.abs(wrong - right).max() > 0.1


# Layer 0 of gpt-oss-20b itself, last of 74 tokens, as OpenAI's implementation computed it in bfloat16.

def published(name: str) -> np.ndarray:
    tensor = facts("golden_20b_reference_intermediates.json")["boundaries"][f"layer0_final_token_{name}"]
    bits = np.frombuffer(base64.b64decode(tensor["values_bf16_b64"]), "<u2").astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64).reshape(tensor["shape"])


def test_softmax_with_a_sink_gives_gpt_oss_20bs_published_probabilities():
    scores_and_sink = published("masked_scaled_qk_logits_pre_softmax")
    assert scores_and_sink.shape == (64, 75)
    assert softmax(scores_and_sink) == pytest.approx(published("attention_probs_post_softmax"), rel=2**-8)


def test_swiglu_gives_gpt_oss_20bs_published_activation():
    y = published("expert30_mlp1_output_before_swiglu")
    post = reference.swiglu(*reference.clamp(y[0::2], y[1::2], 7.0))
    assert difference(post, published("expert30_swiglu_output_before_mlp2")) < 2**-7


def test_routing_gives_gpt_oss_20bs_published_experts_weights_and_sum():
    routing = facts("golden_20b_reference_intermediates.json")["layer0_routing"]
    indices, weights = reference.top_k(published("mlp_router_logits_before_routing")[None], 4)
    assert indices[0].tolist() == routing["experts"]
    assert weights[0] == pytest.approx(routing["weights"], rel=2**-8)
    total = weights[0] @ published("selected_expert_outputs_before_routing_weighted_sum")
    assert difference(total, published("mlp_output_after_routing_weighted_sum_before_residual")) < 2**-8
