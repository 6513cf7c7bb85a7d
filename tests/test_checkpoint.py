"""Checkpoint folders: three layouts read and written, and what a bad one gets."""
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_random
from mxfp4_encoder import decode, encode
from safetensors import safe_open
from safetensors.numpy import save_file
from shared import facts, needs_facts

import gptoss_lab as lab
from gptoss_lab import layouts, mxfp4, plan, saving, shards, tokenizer
from gptoss_lab.checkpoint import CheckpointError, load
from gptoss_lab.config import FULL, SLIDING, TINY, ConfigError, Yarn, published
from gptoss_lab.saving import save

# Two layers; d_model, d_ff, the heads' width and the experts all differ, so that no transpose or mix-up is silent.
SMALL = TINY.with_(n_ctx=512, yarn=Yarn(4.0, 128, beta_fast=8.0), n_layers=2, layer_types=(SLIDING, FULL), n_experts=6, sliding_window=8, stop_tokens=(502, 501),
                   pad_token=502)  # fmt: skip
LAYOUTS = ("original", "hf-mxfp4", "hf-dense")
TOKENS = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))


def states_equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def model():
    return tiny_random(SMALL)


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    return load(save(model, tmp_path_factory.mktemp("packed") / "model", "hf-mxfp4"))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A dense checkpoint to damage."""
    return save(model, tmp_path / "checkpoint", "hf-dense")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS, torch.ones_like(TOKENS))


def disk(folder: Path) -> dict[str, np.ndarray]:
    """What the safetensors library reads in a folder, in torch."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


# ---------------------------------------------------------------------------------------- the layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_dense_model_comes_back_as_it_was_in_every_dtype(dtype, tmp_path):
    model = tiny_random(SMALL).to(dtype)
    again = load(save(model, tmp_path / "x"))
    assert states_equal(model, again) and again.config == SMALL and not again.training
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("layout", ["original", "hf-mxfp4"])
def test_a_packed_model_comes_back_byte_for_byte(layout, packed, tmp_path):
    again = load(save(packed, tmp_path / "x", layout))
    assert again.blocks[0].mlp.down.packed and states_equal(packed, again)
    assert again.config == SMALL


def test_a_packed_model_is_unpacked_exactly_for_the_dense_layout(packed, tmp_path):
    dense = load(save(packed, tmp_path / "x", "hf-dense"))
    for layer, block in enumerate(packed.blocks):
        for name in ("gate_up", "down"):
            experts = getattr(block.mlp, name)
            want = decode(experts.blocks.numpy(), experts.scales.numpy())
            assert np.array_equal(getattr(dense.blocks[layer].mlp, name).weight.detach().double().numpy(), want)
    torch.testing.assert_close(logits(dense), logits(packed), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", ["original", "hf-mxfp4"])
def test_dense_to_mxfp4_to_dense_is_what_an_independent_encoder_makes(layout, model, tmp_path):
    stored = disk(save(model, tmp_path / "packed", layout))
    name = {"original": "block.1.mlp.mlp2_weight.{}", "hf-mxfp4": "model.layers.1.mlp.experts.down_proj_{}"}[layout]
    blocks, scales = encode(model.blocks[1].mlp.down.weight.detach().numpy())
    assert np.array_equal(stored[name.format("blocks")].numpy(), blocks)
    assert np.array_equal(stored[name.format("scales")].numpy(), scales)
    dense = load(save(load(tmp_path / "packed"), tmp_path / "dense", "hf-dense"))
    assert np.array_equal(dense.blocks[1].mlp.down.weight.detach().double().numpy(), decode(blocks, scales))
    rest = [name for name in model.state_dict() if ".gate_up.weight" not in name and ".down.weight" not in name]
    assert all(torch.equal(dense.state_dict()[name], model.state_dict()[name]) for name in rest)


def test_a_hand_written_original_checkpoint_is_read(tmp_path):
    """Names, rows and bytes from facts about OpenAI's files, written without the package's table."""
    rng, c = np.random.default_rng(0), SMALL
    q, kv, d = c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.d_model
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tensors = {"embedding.weight": draw(c.d_vocab, d), "norm.scale": draw(d), "unembedding.weight": draw(c.d_vocab, d)}
    dense = {}
    for n in range(c.n_layers):
        attn, mlp = f"block.{n}.attn", f"block.{n}.mlp"
        tensors |= {f"{attn}.norm.scale": draw(d), f"{attn}.qkv.weight": draw(q + 2 * kv, d),
                    f"{attn}.qkv.bias": draw(q + 2 * kv), f"{attn}.sinks": draw(c.n_heads),
                    f"{attn}.out.weight": draw(d, q), f"{attn}.out.bias": draw(d), f"{mlp}.norm.scale": draw(d),
                    f"{mlp}.gate.weight": draw(c.n_experts, d), f"{mlp}.gate.bias": draw(c.n_experts),
                    f"{mlp}.mlp1_bias": draw(c.n_experts, 2 * c.d_ff), f"{mlp}.mlp2_bias": draw(c.n_experts, d)}
        for one, out, width in (("mlp1_weight", 2 * c.d_ff, d), ("mlp2_weight", d, c.d_ff)):
            blocks, scales = encode(draw(c.n_experts, out, width))
            tensors |= {f"{mlp}.{one}.blocks": blocks, f"{mlp}.{one}.scales": scales}
            dense[n, one] = decode(blocks, scales)
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "num_hidden_layers": 2, "num_experts": 6, "experts_per_token": 4, "vocab_size": 512, "hidden_size": 96,
        "intermediate_size": 64, "swiglu_limit": 7.0, "head_dim": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "sliding_window": 8, "initial_context_length": 128, "rope_theta": 1000.0,
        "rope_scaling_factor": 4.0, "rope_ntk_alpha": 1.0, "rope_ntk_beta": 8.0}))  # fmt: skip
    model = load(tmp_path)  # the folder has no weights of its own, original/ has
    assert model.config == SMALL.with_(stop_tokens=(), pad_token=None)
    block = model.blocks[1]
    same = {
        "embedding.weight": model.embed.weight, "unembedding.weight": model.unembed.weight,
        "norm.scale": model.ln_final.weight, "block.1.attn.norm.scale": block.ln1.weight,
        "block.1.mlp.norm.scale": block.ln2.weight, "block.1.attn.sinks": block.attn.sinks,
        "block.1.attn.qkv.weight": block.attn.qkv.weight, "block.1.attn.qkv.bias": block.attn.qkv.bias,
        "block.1.attn.out.weight": block.attn.out.weight, "block.1.attn.out.bias": block.attn.out.bias,
        "block.1.mlp.gate.weight": block.mlp.router.weight, "block.1.mlp.gate.bias": block.mlp.router.bias,
        "block.1.mlp.mlp1_bias": block.mlp.gate_up.bias, "block.1.mlp.mlp2_bias": block.mlp.down.bias,
    }  # fmt: skip
    for theirs, ours in same.items():
        assert np.array_equal(ours.detach().numpy(), tensors[theirs]), theirs
    for e in range(c.n_experts):
        assert np.array_equal(block.mlp.gate_up.matrix(e).detach().numpy(), dense[1, "mlp1_weight"][e])
        assert np.array_equal(block.mlp.down.matrix(e).detach().numpy(), dense[1, "mlp2_weight"][e])


@needs_facts
@pytest.mark.parametrize("size", ["20b", "120b"])
@pytest.mark.parametrize("form", ["original", "hf"])
def test_the_published_models_match_the_manifests_tensor_by_tensor(size, form):
    config, layout = published(f"gpt-oss-{size}"), {"original": "original", "hf": "hf-mxfp4"}[form]
    with torch.device("meta"):
        model = lab.GptOss(config, packed=True).to(torch.bfloat16)
    manifest = facts(f"manifest_{size}_{form}.json")
    seen = {}
    for piece in layouts.pieces(config, layout):
        dtype = saving._dtype_on_disk(model, piece)
        size = math.prod(piece.shape) * dtype.itemsize
        seen[piece.name] = {"dtype": shards.CODES[dtype], "shape": list(piece.shape), "bytes": size}
    wanted = {name: {key: one[key] for key in ("dtype", "shape", "bytes")} for name, one in manifest["tensors"].items()}
    assert seen == wanted
    total = manifest.get("total_size", manifest.get("total_bytes"))
    assert sum(one["bytes"] for one in seen.values()) == total
    assert sum(x.numel() * x.element_size() for x in model.state_dict().values()) == total
    filled = {name: torch.zeros(x.shape, dtype=torch.int8, device="meta") for name, x in model.state_dict().items()}
    for piece in layouts.pieces(config, layout):  # every piece is a part of ours that has its shape
        assert tuple(piece.of(filled[piece.ours]).shape) == piece.shape


@needs_facts
def test_the_published_index_and_dtypes_files_name_the_same_tensors():
    config = published("gpt-oss-20b")
    index = facts("model.safetensors.index_20b.json")["weight_map"]
    assert index.keys() == {piece.name for piece in layouts.pieces(config, "hf-mxfp4")}
    with torch.device("meta"):
        model = lab.GptOss(config, packed=True).to(torch.bfloat16)
    entries = [(piece.name, saving._dtype_on_disk(model, piece), piece.shape)
               for piece in layouts.pieces(config, "original")]  # fmt: skip
    documents = saving._documents(model, "original", {"model.safetensors": entries})
    assert documents["dtypes.json"] == facts("dtypes_20b.json")


# ---------------------------------------------------------------------------------------- Hugging Face


@torch.no_grad()
def hf_logits(folder: Path, **settings) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    settings |= {"attn_implementation": "eager", "experts_implementation": "eager", "output_loading_info": True}
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, **settings)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return theirs(TOKENS).logits


def test_hugging_face_reads_the_same_mxfp4_files_as_we_do(packed, tmp_path):
    from transformers import Mxfp4Config

    folder = save(packed, tmp_path / "x", "hf-mxfp4", max_shard_bytes=300_000)
    theirs = hf_logits(folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True))
    ours = logits(load(folder))
    assert (ours - theirs).abs().max() / theirs.std() < 5e-5


@pytest.mark.parametrize("size", [10**9, 300_000])
def test_hugging_face_reads_our_dense_files(model, size, tmp_path):
    folder = save(model, tmp_path / "x", "hf-dense", max_shard_bytes=size)
    theirs = hf_logits(folder)
    assert theirs.dtype == torch.float32
    assert (logits(model) - theirs).abs().max() / theirs.std() < 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_save_pretrained_writes_is_read_as_it_is(dtype, model, tmp_path):
    from transformers import AutoModelForCausalLM

    save(model, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype, experts_implementation="eager")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    kept = {name: p.dtype for name, p in theirs.named_parameters()}
    again = load(tmp_path / "theirs")
    assert again.dtype == dtype and again.config == SMALL
    assert again.ln_final.weight.dtype == kept["model.norm.weight"]  # float32 in a float16 model
    want = tiny_random(SMALL).to(dtype).state_dict()
    for name, x in again.state_dict().items():
        exact = model.state_dict()[name].to(x.dtype) if layouts.is_gain(name) else want[name]
        assert torch.equal(x, exact), name
    assert torch.isfinite(logits(again)).all()
    with torch.no_grad():
        reference = theirs.float()(TOKENS).logits
    wide = load(tmp_path / "theirs", dtype=torch.float32)
    assert (logits(wide) - reference).abs().max() / reference.std() < 5e-5


# ---------------------------------------------------------------------------------------- loading


def test_tensors_that_need_no_change_are_the_mapped_file(packed, tmp_path):
    folder = save(packed, tmp_path / "x", "original")
    again = load(folder)
    file = Path(f"/proc/{os.getpid()}/maps")
    assert not file.exists() or str(folder / "model.safetensors") in file.read_text()
    storages = {x.untyped_storage().data_ptr() for x in again.state_dict().values()}
    assert len(storages) == 1
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        again.blocks[0].mlp.down.blocks.fill_(7)
        again.embed.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_dtype_converts_all_that_is_not_packed(packed, tmp_path):
    folder = save(packed, tmp_path / "x")
    again = load(folder, dtype=torch.bfloat16)
    for name, x in again.state_dict().items():
        want = packed.state_dict()[name]
        assert torch.equal(x, want if want.dtype == torch.uint8 else want.bfloat16()), name
    assert logits(again).dtype == torch.bfloat16


def test_mixed_dtypes_become_the_widest_and_norm_gains_stay(model, tmp_path):
    mixed = tiny_random(SMALL).to(torch.bfloat16)
    mixed.blocks[0].mlp.router.float()
    mixed.ln_final.double()
    again = load(save(mixed, tmp_path / "x"))
    assert again.ln_final.weight.dtype == torch.float64 and again.blocks[0].ln1.weight.dtype == torch.bfloat16
    assert {p.dtype for name, p in again.named_parameters() if not layouts.is_gain(name)} == {torch.float32}
    assert all(torch.equal(again.state_dict()[name], x.to(again.state_dict()[name].dtype))
               for name, x in mixed.state_dict().items())  # fmt: skip
    logits(again)


def test_a_tensor_at_an_odd_byte_is_copied_and_right(packed, tmp_path):
    """The format allows it; a view would be refused by torch, or slow."""
    folder = save(packed, tmp_path / "x", "original")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :])
    (folder / "SHA256SUMS").unlink()
    assert states_equal(load(folder), packed)


def test_max_context_lowers_the_context_and_never_raises_it(folder):
    short = load(folder, max_context=10)
    assert short.config == SMALL.with_(n_ctx=10)
    with pytest.raises(ValueError, match="do not fit the context of 10"):
        short(TOKENS, torch.ones_like(TOKENS))
    for wrong in (0, -1, 513):
        with pytest.raises(ValueError, match=f"max_context = {wrong}: the model has 1 to 512 positions"):
            load(folder, max_context=wrong)
    assert load("tiny-random", max_context=7).config.n_ctx == 7


def test_a_dtype_that_is_not_floating_is_refused(folder):
    with pytest.raises(ValueError, match=r"torch\.int8.*floating"):
        load(folder, dtype=torch.int8)


def test_a_folder_brings_its_own_vocabulary(folder, tmp_path):
    assert load(folder).tokenizer.n_vocab == 512  # tiny_random's, saved with it
    (folder / tokenizer.FILE).unlink()
    (folder / "SHA256SUMS").unlink()
    assert load(folder).tokenizer is None


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    small = tiny_random(SMALL.with_(d_vocab=300, stop_tokens=(), pad_token=None))
    small.tokenizer = None
    folder = save(small, tmp_path / "x")
    tokenizer.save(tokenizer.tiny(), folder)
    with pytest.raises(CheckpointError, match="512 ids and the embedding 300 rows"):
        load(folder)


def test_loading_a_model_of_the_published_vocabulary_does_not_need_the_vocabulary(tmp_path, monkeypatch):
    def missing():
        raise tokenizer.VocabularyMissing("it is not here")

    monkeypatch.setattr(tokenizer, "o200k_harmony", missing)
    large = SMALL.with_(d_vocab=201_088, d_model=32, n_layers=1, layer_types=(FULL,), d_ff=32)
    model = load(save(tiny_random(large), tmp_path / "x"))
    assert not (tmp_path / "x" / tokenizer.FILE).exists()
    with pytest.raises(tokenizer.VocabularyMissing):
        _ = model.tokenizer


def test_tiny_random_is_the_same_every_time():
    model = load("tiny-random")
    assert states_equal(model, load("tiny-random")) and model.config == TINY and not model.training
    assert model.tokenizer.n_vocab == model.config.d_vocab
    assert load("tiny-random", dtype=torch.float64).dtype == torch.float64


MEASURE = """
import sys, torch
from gptoss_lab.checkpoint import load

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

load(sys.argv[2])  # a small one: what any first load of a process allocates
before = memory("VmRSS:")
model = load(sys.argv[1])
for x in model.state_dict().values():
    x.view(torch.uint8).flatten()[::4096].max()  # touch every page
print(memory("VmRSS:") - before, memory("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which is not here")
@pytest.mark.parametrize("layout, n_experts", [("hf-mxfp4", 56), ("hf-dense", 20)])
def test_memory_after_loading_is_the_checkpoint_and_two_percent(layout, n_experts, tmp_path):
    wide = SMALL.with_(d_model=1024, d_ff=1280, n_experts=n_experts, d_vocab=12_000, n_heads=16, n_layers=1,
                       layer_types=(FULL,))  # fmt: skip
    with torch.device("meta"):
        model = lab.GptOss(wide, packed=layout == "hf-mxfp4").to(torch.bfloat16)
    model.to_empty(device="cpu").load_state_dict({name: x.zero_() for name, x in model.state_dict().items()})
    folder, small = save(model, tmp_path / "wide", layout), save(tiny_random(SMALL), tmp_path / "small", layout)
    sizes = [x.numel() * x.element_size() for x in model.state_dict().values()]
    out = subprocess.run([sys.executable, "-c", MEASURE, folder, small], capture_output=True, text=True, check=True)
    after, peak = map(int, out.stdout.split())
    print(f"{layout}, {sum(sizes):,} bytes: {after / sum(sizes):.4f} after, {peak / sum(sizes):.4f} at most")
    slack = 1 << 20  # headers, modules
    assert after <= 1.02 * sum(sizes) + slack
    assert peak <= 1.02 * sum(sizes) + (max(sizes) if layout == "hf-dense" else 0) + slack


# ---------------------------------------------------------------------------------------- bad input


def test_a_folder_without_config_json_is_told_so(folder):
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load(folder)


def test_a_source_that_is_nowhere_is_told_what_there_could_be(tmp_path):
    for source in (tmp_path / "nowhere", "nowhere", "./a/b", "a/b/c", ""):
        with pytest.raises((FileNotFoundError, CheckpointError), match="no folder here|config.json"):
            load(source)


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder by `change(dict)` and remove the checksums."""
    from safetensors.torch import save_file

    tensors = disk(folder)
    change(tensors)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")


def test_missing_surplus_misshapen_and_mistyped_tensors_are_all_listed(folder):
    def change(tensors):
        del tensors["model.layers.0.self_attn.sinks"], tensors["model.layers.1.mlp.router.bias"]
        tensors["model.layers.2.self_attn.sinks"] = torch.zeros(4)
        tensors["lm_head.weight"] = torch.zeros(512, 95)
        tensors["model.norm.weight"] = torch.zeros(95)
        tensors["model.layers.1.mlp.experts.down_proj_bias"] = torch.zeros(6, 96, dtype=torch.uint8)
        tensors["model.layers.1.mlp.router.weight"] = torch.zeros(6, 96, dtype=torch.int64)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  model.layers.0.self_attn.sinks [4] is missing",
        "  model.layers.1.mlp.router.bias [6] is missing",
        "  model.layers.2.self_attn.sinks [4] is surplus",
        "  model.layers.1.mlp.router.weight has dtype I64, not BF16 or F16 or F32 or F64",
        "  model.layers.1.mlp.experts.down_proj_bias has dtype U8, not BF16 or F16 or F32 or F64",
        "  model.norm.weight has shape [95], not [96]",
        "  lm_head.weight has shape [512, 95], not [512, 96]",
    ]


def test_experts_that_are_not_transposed_are_misshapen(folder):
    """[E out in] where Hugging Face has [E in out]: seen because d_ff is not d_model."""
    rewrite(folder, lambda t: t.update({n: x.mT for n, x in t.items() if n.endswith("down_proj")}))
    with pytest.raises(CheckpointError, match=r"down_proj has shape \[6, 96, 64\], not \[6, 64, 96\]"):
        load(folder)


def test_the_files_of_another_model_are_told_in_one_line(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors)] and tensors.update(wte=torch.ones(2)))
    with pytest.raises(CheckpointError, match="1 tensors, and none has a name of gpt-oss; the first are wte"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
def test_a_file_cut_short_is_named_with_its_bytes(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors has {len(data[:keep]):,} bytes"):
        load(folder)


def test_a_file_with_something_added_is_named_with_its_bytes(folder):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=f"has {size + 4:,} bytes, its header describes {size:,}: something"):
        load(folder)


@pytest.fixture(scope="module")
def one_of_each(model, tmp_path_factory) -> list[Path]:
    base = tmp_path_factory.mktemp("each")
    return [save(model, base / layout, layout, max_shard_bytes=size) for layout in LAYOUTS for size in (200_000, 10**9)
            if not base.joinpath(layout).exists()]  # fmt: skip


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_noticed(data, one_of_each):
    unchecked = ("SHA256SUMS", "dtypes.json")
    folder = data.draw(st.sampled_from(one_of_each))
    path = data.draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.name not in unchecked)))
    good = path.read_bytes()
    content, bits = bytearray(good), 8 * len(good)
    bit = data.draw(st.integers(0, min(bits, 32_000) - 1) | st.integers(0, bits - 1))
    content[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(content)
        with pytest.raises((CheckpointError, ConfigError)):
            load(folder)
    finally:
        path.write_bytes(good)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 10**6))
def test_a_flipped_bit_in_a_header_is_noticed_without_checksums(bit, tmp_path_factory):
    """Or changes nothing: a flip may turn a blank into another blank."""
    folder = tmp_path_factory.getbasetemp() / "header"
    if not folder.exists():
        save(tiny_random(SMALL), folder)
        (folder / "SHA256SUMS").unlink()
    path = folder / "model.safetensors"
    good = path.read_bytes()
    content = bytearray(good)
    bit %= 8 * (8 + struct.unpack("<Q", good[:8])[0])
    content[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(content)
        assert states_equal(load(folder), tiny_random(SMALL))
    except CheckpointError:
        pass
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}', b"\xff" * 20,
     b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
     b'{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
     b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
     b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
     b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
     b' "b": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}',
     b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', b"null", b'{"a": null}'],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_refused(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        shards.read_header(path)


@pytest.fixture
def sharded(model, tmp_path) -> Path:
    folder = save(model, tmp_path / "sharded", max_shard_bytes=200_000)
    (folder / "SHA256SUMS").unlink()
    return folder


def test_shards_may_end_inside_a_layer(sharded, model):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    layer = {file for name, file in index["weight_map"].items() if ".layers.1." in name}
    assert len(layer) > 1
    assert states_equal(load(sharded), model)
    assert index["metadata"]["total_size"] == sum(x.numel() * 4 for x in model.parameters())


def test_an_index_naming_files_that_are_not_there_names_them_all(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1:3]
    for path in gone:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        load(sharded)
    assert all(f"names {path.name}, which is not there" in str(caught.value) for path in gone)


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def test_an_index_that_contradicts_the_files_is_refused(sharded):
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    moved = "model.layers.0.self_attn.sinks"  # not alone in its file
    held = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"][moved]
    edit_index(sharded, lambda index: index.update({moved: files[-1], "other": files[1]}))
    with pytest.raises(CheckpointError) as caught:
        load(sharded)
    assert f"{moved} is in {files[-1]}, it is in {held}" in str(caught.value)
    assert f"other is in {files[1]}, it is in no file" in str(caught.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "weights.bin", "", 3, ["x"], None])
def test_an_index_that_points_elsewhere_is_refused(sharded, name):
    edit_index(sharded, lambda index: index.update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="no safetensors file beside it"):
        load(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(sharded)


def test_a_tensor_in_two_files_is_refused(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    files = sorted(sharded.glob("*.safetensors"))
    shutil.copy(files[0], sharded / "again.safetensors")
    with pytest.raises(CheckpointError, match=f"is in again.safetensors and in {files[0].name}"):
        load(sharded)


class Bomb:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.ckpt"])
def test_a_pickle_is_refused_and_never_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "opened"), folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: a pickle can run any program"):
        load(folder)
    with pytest.raises(CheckpointError, match="a pickle: it can run any program"):
        load(folder / name)
    assert not (tmp_path / "opened").exists()


def test_a_folder_without_weights_is_told_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        load(folder)


@pytest.mark.parametrize("dtype, bytes_each", [(torch.bfloat16, 2), (torch.float64, 8)])
def test_what_cannot_fit_is_told_before_a_byte_is_read(folder, model, dtype, bytes_each, monkeypatch):
    def never(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(shards.Stored, "parts", never)
    monkeypatch.setattr(shards, "map_file", never)
    monkeypatch.setattr(shards, "checksum_faults", never)
    monkeypatch.setattr(plan, "free_bytes", lambda device: 1000)
    weights = bytes_each * sum(x.numel() for x in model.parameters())
    with pytest.raises(MemoryError) as caught:
        load(folder, dtype=dtype)
    said = str(caught.value)
    need = int(said.split("needs ")[1].split(" ")[0].replace(",", ""))
    assert weights < need < 2 * weights  # the weights, and a part of one while it is transposed
    assert "1,000 bytes" in said and "cpu" in said and "weights: experts" in said and "No context fits" in said


def test_what_is_mapped_needs_no_room(folder, model, monkeypatch):
    state = model.state_dict()
    copied = sum(x.nbytes for name, x in state.items() if "qkv" in name or name.endswith(("gate_up.weight", "down.weight")))
    one = plan.plan(folder, context=1, device="cpu")
    assert sum(n for name, n in one.parts.items() if name.startswith("weights")) == copied < sum(one.weights.values())
    monkeypatch.setattr(plan, "free_bytes", lambda device: one.total)
    assert load(folder).config == model.config
    monkeypatch.setattr(plan, "free_bytes", lambda device: one.total - 1)
    with pytest.raises(MemoryError):
        load(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_process_that_may_not_map_the_files_is_told(folder):
    program = f"""
import resource
from gptoss_lab import checkpoint, memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
assert memory.address_space() is None
resource.setrlimit(resource.RLIMIT_AS, (used + 50_000_000, resource.RLIM_INFINITY))
assert 40_000_000 < memory.address_space() <= 50_000_000
checkpoint.address_space = lambda: 1000
try:
    checkpoint.load({str(folder)!r})
except MemoryError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "this process may map 1,000 more" in said and "ulimit -v" in said and "weights: experts" in said


def test_a_folder_that_goes_or_changes_while_it_is_mapped_is_told_at_the_next_load(folder, model):
    tokens = torch.arange(9)[None]
    before, mapped = load(folder), load(folder)
    with torch.no_grad():
        expected = before(tokens)
    moved = folder.with_name("moved")
    folder.rename(moved)
    with torch.no_grad():
        assert torch.equal(mapped(tokens), expected)  # what is mapped stays
    with pytest.raises(FileNotFoundError, match=str(folder)):
        load(folder)
    copy = folder.with_name("copy")
    shutil.copytree(moved, copy)
    size = (copy / "model.safetensors").stat().st_size
    with open(copy / "model.safetensors", "r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load(copy)


def test_a_large_tensor_is_copied_in_parts(folder, monkeypatch):
    whole = load(folder, dtype=torch.float64).state_dict()
    monkeypatch.setattr(shards, "PART", 300)
    sizes, parts = [], shards.Stored.parts

    def noted(self):
        for rows, part in parts(self):
            sizes.append((part.nbytes, self.n_bytes // self.shape[0], self.n_bytes))
            yield rows, part

    monkeypatch.setattr(shards.Stored, "parts", noted)
    for name, x in load(folder, dtype=torch.float64).state_dict().items():
        assert torch.equal(x, whole[name]), name
    assert all(n <= max(300, row) for n, row, _ in sizes) and any(n < whole for n, _, whole in sizes)


def test_a_folder_of_which_a_file_was_changed_is_told_which_and_how_to_go_on(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"swiglu_limit": 5.0}))
    with pytest.raises(CheckpointError, match=r"config\.json has sha256 .* remove its line"):
        load(folder)
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if "config.json" not in line))
    assert load(folder).config.swiglu_limit == 5.0


def test_the_checksums_are_those_of_the_standard_tool(folder):
    out = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    names = {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert out.returncode == 0 and {line.split(":")[0] for line in out.stdout.splitlines()} == names


def test_damaged_checksums_are_told(folder):
    (folder / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS line 1 is damaged: 'nonsense'"):
        load(folder)


def test_ctrl_c_while_loading_leaves_nothing(folder, monkeypatch):
    import gc
    import weakref

    made, parts = [], shards.Stored.parts

    def interrupted(self):
        for rows, x in parts(self):
            made.append(weakref.ref(x))
            if len(made) == 3:
                raise KeyboardInterrupt
            yield rows, x

    monkeypatch.setattr(shards.Stored, "parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    gc.collect()
    assert len(made) == 3 and all(ref() is None for ref in made)
    monkeypatch.undo()
    load(folder)


# ---------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saving_over_the_folder_that_the_model_is_mapped_from_is_safe(packed, layout, tmp_path):
    folder = save(packed, tmp_path / "x", "hf-mxfp4")
    mapped = load(folder)
    before = logits(mapped)
    save(mapped, folder, layout)
    assert torch.equal(logits(mapped), before)
    torch.testing.assert_close(logits(load(folder)), before, rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_every_tensor_that_is_written_begins_at_a_multiple_of_its_width(tmp_path):
    mixed = tiny_random(SMALL.with_(n_heads=3, n_kv_heads=1, n_experts=5)).to(torch.bfloat16)  # sinks of six bytes
    for block in mixed.blocks:
        block.ln2.double()
    folder = save(mixed, tmp_path / "x", "original")
    assert all(stored.aligned for stored in shards.read_header(folder / "model.safetensors"))
    assert disk(folder).keys() == {piece.name for piece in layouts.pieces(mixed.config, "original")}


def test_a_folder_with_something_else_in_it_is_refused_and_untouched(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="notes.txt"):
        save(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    with pytest.raises(FileExistsError, match="notes.txt"):
        save(model, tmp_path / "notes.txt")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "config.json").symlink_to(tmp_path / "config.json")  # such as a snapshot in the hub's cache
    with pytest.raises(FileExistsError, match="config.json"):
        save(model, tmp_path / "link")


def test_an_empty_folder_and_a_deep_one_are_filled(model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert states_equal(load(save(model, tmp_path / "empty")), model)
    assert states_equal(load(save(model, tmp_path / "a" / "b" / "c")), model)


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_345))
    need = sum(x.numel() * 4 for x in model.parameters())
    with pytest.raises(OSError, match=f"takes {need:,} bytes: 12,345 bytes are free"):
        save(model, tmp_path / "x")
    assert left_behind(tmp_path) == []


def test_a_disk_that_fills_up_while_saving_leaves_what_was_there(model, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # files of more bytes cannot be written
    try:
        with pytest.raises(OSError, match="could not be saved, which takes .* bytes") as caught:
            save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno is not None
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("moment", ["a tensor", "the last step"])
def test_ctrl_c_while_saving_leaves_what_was_there(model, folder, monkeypatch, moment):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if moment == "a tensor":
        monkeypatch.setattr(saving, "_on_disk", interrupt)
    else:
        rename = Path.rename

        def rename_once(self, target):  # the old folder is away, the new one not yet there
            if self.name.endswith(".part"):
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        save(model, folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_layout_that_cannot_hold_the_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="layout = 'gguf': there are original, hf-mxfp4, hf-dense"):
        save(model, tmp_path / "x", "gguf")
    odd = tiny_random(SMALL.with_(d_ff=40))
    with pytest.raises(ValueError, match="multiples of 32.*d_ff = 40.*hf-dense"):
        save(odd, tmp_path / "x", "hf-mxfp4")
    assert states_equal(load(save(odd, tmp_path / "odd")), odd)
    with pytest.raises(ConfigError, match="no field for layer_types"):
        save(tiny_random(SMALL.with_(layer_types=(FULL, FULL))), tmp_path / "x", "original")
    broken = tiny_random(SMALL)
    with torch.no_grad():
        broken.blocks[1].mlp.down.weight[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.down\.weight cannot be packed.*finite"):
        save(broken, tmp_path / "x", "hf-mxfp4")
    assert left_behind(tmp_path) == [path for path in left_behind(tmp_path) if path.startswith("odd")]


def test_a_compiled_model_is_saved_under_its_own_names(model, tmp_path):
    assert states_equal(load(save(torch.compile(model, backend="eager"), tmp_path / "x")), model)


def test_packing_keeps_what_mxfp4_holds(packed, tmp_path):
    dense = load(save(packed, tmp_path / "dense", "hf-dense"))
    again = load(save(dense, tmp_path / "again", "hf-mxfp4"))
    for mine, theirs in zip(packed.blocks, again.blocks, strict=True):
        for name in ("gate_up", "down"):
            one, other = getattr(mine.mlp, name), getattr(theirs.mlp, name)
            values = [mxfp4.unpack(x.blocks, x.scales, torch.float64) for x in (one, other)]
            assert torch.equal(*values)
