"""SAEs in SAELens's format, written to disk and read back."""
import json

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401
from safetensors.torch import save_file

import gptoss_lab as lab
from gptoss_lab.probes import sae
from gptoss_lab.probes.sae import SAE

D, F = 32, 20
MODEL, TOKENS = random_model(tiny_config()), random_tokens(tiny_config(), 2, 15)


def written(folder, architecture="standard", drop=(), **config):
    folder.mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=rng)
    weights = {"W_enc": draw(D, F), "W_dec": draw(F, D), "b_dec": draw(D), "b_enc": draw(F), "threshold": draw(F).abs(),
               "b_gate": draw(F), "r_mag": 0.3 * draw(F), "b_mag": draw(F)}  # fmt: skip
    keep = ("W_enc", "W_dec", "b_dec", *sae.EXTRA.get(architecture, ("b_enc",)))
    save_file({name: weights[name] for name in keep if name not in drop}, folder / sae.WEIGHTS)
    cfg = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False, "normalize_activations": "none",
           "reshape_activations": "none", "metadata": {"sae_lens_version": "6.21.0", "hook_name": "blocks.2.hook_resid_post",
           "model_name": "openai/gpt-oss-20b"}, "architecture": architecture} | config  # fmt: skip
    (folder / sae.CONFIG).write_text(json.dumps(cfg))
    return weights


def by_hand(x, w, architecture, centred, norm, k=4):
    """Feature by feature, as SAELens computes it. x [d]"""
    mean, scale = 0.0, 1.0
    if norm == "layer_norm":
        mean = sum(x.tolist()) / D
        scale = (sum((v - mean) ** 2 for v in x.tolist()) / (D - 1)) ** 0.5 + 1e-5
    if norm == "constant_norm_rescale":
        scale = sum(v * v for v in x.tolist()) ** 0.5 / D**0.5
    z = [(v - mean) / scale - (float(w["b_dec"][i]) if centred else 0) for i, v in enumerate(x.tolist())]
    dot = lambda j: sum(z[i] * float(w["W_enc"][i, j]) for i in range(D))
    if architecture == "gated":
        pre = [dot(j) * float(w["r_mag"][j].exp()) + float(w["b_mag"][j]) for j in range(F)]
        features = [max(p, 0) * (dot(j) + float(w["b_gate"][j]) > 0) for j, p in enumerate(pre)]
    else:
        pre = [dot(j) + float(w["b_enc"][j]) for j in range(F)]
        features = [max(p, 0) for p in pre]
        if architecture == "jumprelu":
            features = [f * (p > float(w["threshold"][j])) for j, (f, p) in enumerate(zip(features, pre))]
        if architecture == "topk":
            cut = sorted(pre)[-k]
            features = [f * (p >= cut) for f, p in zip(features, pre)]
    out = [sum(features[j] * float(w["W_dec"][j, i]) for j in range(F)) + float(w["b_dec"][i]) for i in range(D)]
    return features, [v * scale + mean for v in out]


@pytest.mark.parametrize("architecture", sorted(sae.EXTRA))
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("norm", sae.NORMS)
def test_each_kind_encodes_and_reconstructs_as_its_equations_say(tmp_path, architecture, centred, norm):
    w = written(tmp_path / "sae", architecture, apply_b_dec_to_input=centred, normalize_activations=norm, **({"k": 4} if architecture == "topk" else {}))
    one, x = SAE.load(tmp_path / "sae", torch.float64), torch.randn(3, D, dtype=torch.float64)
    for row, features, out in zip(x, one.encode(x), one.reconstruct(x)):
        want, rebuilt = by_hand(row, w, architecture, centred, norm)
        assert features.tolist() == pytest.approx(want, abs=1e-5) and out.tolist() == pytest.approx(rebuilt, abs=1e-5)
    assert one.n_features == F and one.hook_name == "blocks.2.hook_resid_post"


def test_the_form_of_older_versions_is_read(tmp_path):
    written(tmp_path / "sae", "topk", metadata=None, hook_name="blocks.1.hook_resid_pre", activation_fn_kwargs={"k": 3})
    one = SAE.load(tmp_path / "sae")
    assert one.hook_name == "blocks.1.hook_resid_pre" and (one.encode(torch.randn(9, D)) > 0).sum(-1).max() <= 3


def test_the_model_goes_on_with_the_reconstruction(tmp_path):
    written(tmp_path / "sae")
    one = SAE.load(tmp_path / "sae", torch.float64)
    with lab.record(MODEL, "blocks.2.hook_resid_post") as acts, torch.no_grad():
        plain = MODEL(TOKENS)
    with sae.replaced(MODEL, one), torch.no_grad():
        got = MODEL(TOKENS)
    with lab.edit(MODEL, {"blocks.2.hook_resid_post": one.reconstruct(acts["resid_post", 2])}), torch.no_grad():
        assert torch.equal(got, MODEL(TOKENS)) and not torch.allclose(got, plain)
    assert torch.allclose(MODEL(TOKENS), plain)


def test_steering_adds_a_decoder_row_also_while_it_writes(tmp_path):
    w = written(tmp_path / "sae")
    one = SAE.load(tmp_path / "sae", torch.float64)
    with sae.steered(MODEL, one, 5, 3.0), lab.record(MODEL, "blocks.2.hook_resid_post", "blocks.3.hook_resid_pre") as acts, torch.no_grad():
        MODEL(TOKENS)
    with lab.record(MODEL, "blocks.2.hook_resid_post") as plain, torch.no_grad():
        MODEL(TOKENS)
    assert torch.allclose(acts["resid_pre", 3] - plain["resid_post", 2], 3 * w["W_dec"][5].double().expand(2, 15, D))
    with sae.steered(MODEL, one, 5, 30.0, "blocks.1.hook_resid_post"):
        steered = lab.generate(MODEL, TOKENS, 8, stop=())
    assert steered != lab.generate(MODEL, TOKENS, 8, stop=())


@pytest.mark.parametrize("change, message", [
    (dict(architecture="transcoder"), "architecture = 'transcoder': standard"),
    (dict(normalize_activations="expected_average_only_in"), "normalize_activations = 'expected_average_only_in'"),
    (dict(d_in=31), r"W_enc has shape \[32, 20\], cfg.json says \[31, 20\]"),
    (dict(architecture="topk"), "needs k"),
    (dict(drop=("b_enc",)), r"b_enc \[20\] is missing"),
])  # fmt: skip
def test_what_is_no_sae_of_a_known_kind_is_refused(tmp_path, change, message):
    written(tmp_path / "sae", **change)
    with pytest.raises(ValueError, match=message):
        SAE.load(tmp_path / "sae")


def test_damage_and_wrong_use_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cfg.json does not exist: SAELens saves"):
        SAE.load(tmp_path)
    written(tmp_path / "sae", metadata={})
    one = SAE.load(tmp_path / "sae")
    with pytest.raises(ValueError, match="names no hook point"), sae.replaced(MODEL, one):
        pass
    with pytest.raises(ValueError, match="feature 20: the SAE has 0 to 19"), sae.steered(MODEL, one, 20, 1.0):
        pass
    with pytest.raises(ValueError, match="width 31, the SAE reads 32"):
        one.encode(torch.zeros(31))
    (tmp_path / "sae" / sae.WEIGHTS).write_bytes(b"12345678")
    with pytest.raises(ValueError, match="is damaged"):
        SAE.load(tmp_path / "sae")
