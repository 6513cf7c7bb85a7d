"""float16, in which a T4 computes: a residual stream in float32, and nothing that overflows."""
import pytest
import torch
from models import random_model, random_tokens, tiny_config

from gptoss_lab import checkpoint, cost, generate, load, record, save


@pytest.mark.parametrize("packed", [False, True])
def test_float16_is_close_to_float64(packed):
    exact, half = (random_model(tiny_config(), dtype=dtype, packed=packed) for dtype in (torch.float64, torch.float16))
    tokens = random_tokens(exact.config, 2, 40)
    with torch.no_grad(), record(exact, "*") as wide, record(half, "*") as narrow:
        expected, logits = exact(tokens), half(tokens)
    same = (narrow["expert_indices", 0] == wide["expert_indices", 0]).all(-1)  # where rounding did not re-route
    assert logits.dtype == torch.float16 and same.float().mean() > 0.95
    for name in ("attn_out", "mlp_out", "resid_post"):
        got, want = narrow[name, 0].double()[same], wide[name, 0][same]
        assert (got - want).norm() < 4e-3 * want.norm(), name
    assert torch.corrcoef(torch.stack([logits.double().flatten(), expected.flatten()]))[0, 1] > 0.999


def test_a_residual_stream_beyond_float16_stays_finite():
    half = random_model(tiny_config(), dtype=torch.float16)
    tokens = random_tokens(half.config, 1, 12)
    with torch.no_grad():
        half.embed.weight[tokens[0, 0]] = 60_000.0
        half.blocks[0].attn.out.bias += 60_000.0
        with record(half, "*.hook_resid_*", "hook_embed", "*.hook_scale") as acts:
            logits = half(tokens)
    assert acts["resid_mid", 0].max() > 65_504 and acts["resid_mid", 0].dtype == acts["hook_embed"].dtype == torch.float32
    assert logits.isfinite().all() and all(x.isfinite().all() for x in acts.values())


def test_what_recording_costs_counts_the_wide_stream():
    half = random_model(tiny_config(), dtype=torch.float16)
    with record(half, "*") as acts, torch.no_grad():
        half(random_tokens(half.config, 2, 7))
    assert cost(half, "*", 2, 7) == sum(x.nbytes for x in acts.values())


def test_steps_continue_as_one_pass_does():
    half = random_model(tiny_config(), dtype=torch.float16, packed=True)
    prompt = random_tokens(half.config, 1, 6)
    with record(half, "unembed.hook_out") as acts:
        made = generate(half, prompt, 10, stop=())[0]
    with torch.no_grad():
        whole = half(torch.cat([prompt, torch.tensor([made[:-1]])], dim=1))
    torch.testing.assert_close(acts["unembed.hook_out"], whole, atol=0.05, rtol=0.02)


def test_a_bfloat16_folder_is_loaded_as_float16(tmp_path):
    model = random_model(tiny_config(), dtype=torch.bfloat16, packed=True)
    save(model, tmp_path / "m", "hf-mxfp4")
    half = load(tmp_path / "m", dtype=torch.float16)
    assert half.dtype == torch.float16 and half.blocks[0].mlp.gate_up.packed
    with torch.no_grad():
        assert half(random_tokens(model.config, 1, 9)).isfinite().all()


@pytest.mark.parametrize("stored, device, cores, expected", [
    (torch.bfloat16, "cuda", False, torch.float16), (torch.bfloat16, "cuda", True, None),
    (torch.float32, "cuda", False, None), (torch.bfloat16, "cpu", False, None),
])  # fmt: skip
def test_what_a_gpu_without_bfloat16_computes_in(stored, device, cores, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "tensor_cores", lambda device: cores)
    save(random_model(tiny_config(), dtype=stored), tmp_path / "m", "hf-dense")
    assert checkpoint._suited(checkpoint.examine(tmp_path / "m"), torch.device(device)) == expected
