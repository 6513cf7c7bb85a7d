"""The memory plan: beside a budget made independently, and beside the bytes that real models and caches take."""
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

from gptoss_lab import KVCache, cost, load, save
from gptoss_lab import plan as module
from gptoss_lab.checkpoint import examine
from gptoss_lab.cli import main
from gptoss_lab.config import FULL, SLIDING
from gptoss_lab.plan import CHUNKS, CUDA_CONTEXT, n_bytes, plan
from gptoss_lab.shards import Stored

GIB = 2**30
CONFIG = tiny_config()

# A budget made apart from this code: GiB with a chunk of 2,048, logits of the last row, no CUDA context; positions,
# keys and values of full layers, all with the embedding on the GPU, all with it on the host.
BUDGET = [(4096, 0.094, 13.07, 11.99), (32_768, 0.750, 13.73, 12.65), (65_536, 1.500, 14.48, 13.40),
          (131_072, 3.000, 15.98, 14.90)]  # fmt: skip


def without_context(p) -> float:
    return (p.total - CUDA_CONTEXT) / GIB


@pytest.mark.parametrize("context, full, on_device, on_host", BUDGET)
def test_the_20b_takes_what_an_independent_budget_says(context, full, on_device, on_host):
    p = plan("gpt-oss-20b", context=context, memory="80GiB")
    assert p.keys_values["full layers"] / GIB == pytest.approx(full, abs=5e-4)
    assert not p.embedding_on_host and without_context(p) == pytest.approx(on_device, abs=0.02)
    assert without_context(replace(p, embedding_on_host=True)) == pytest.approx(on_host, abs=0.02)


def test_the_parts_of_the_published_models_are_their_published_bytes():
    small, large = (plan(f"gpt-oss-{size}", memory="80GiB") for size in ("20b", "120b"))
    assert sum(small.weights.values()) == 13_761_264_768 and sum(large.weights.values()) == 65_248_815_744
    assert (sum(small.weights.values()) - small.weights["embedding"]) / GIB == pytest.approx(11.737, abs=5e-4)
    experts = 13_219_200 + (5760 + 2880) * 2  # 17 bytes for 32 weights; biases
    assert small.weights["experts"] == 24 * 32 * experts and large.weights["experts"] == 36 * 128 * experts
    assert small.weights["embedding"] == small.weights["unembedding"] == 201_088 * 2880 * 2
    assert round(small.weights["attention"] / 1e9, 3) == 1.274
    assert small.keys_values == {"full layers": 3 * GIB, "sliding layers": 12 * 128 * 2048}
    assert large.keys_values["full layers"] == 4.5 * GIB and large.fits and not large.embedding_on_host


def test_all_131072_positions_fit_16_gib_with_the_embedding_on_the_host_and_not_without():
    p = plan("gpt-oss-20b", context=131_072, memory="16GiB")
    assert p.fits and p.embedding_on_host and p.chunk == 2048 and p.largest_context == 131_072
    assert not replace(p, embedding_on_host=False).fits
    assert "weights: embedding" not in p.parts and p.beside == {
        "weights: embedding, pinned on the host": 2**31}  # fmt: skip
    assert p.total <= 15.5 * GIB  # the goal for the whole process, with the context that is assumed
    assert not plan("gpt-oss-20b", context=32_768, memory="16GiB").embedding_on_host


def test_65536_positions_fit_what_a_t4_shows_in_float16_with_a_float32_residual_stream():
    p = plan("gpt-oss-20b", context=65_536, memory="14.6GiB", dtype=torch.float16)
    assert p.fits and p.chunk == 2048
    narrow = plan("gpt-oss-20b", context=65_536, memory="14.6GiB")
    assert p.one_pass["residual stream"] - narrow.one_pass["residual stream"] == 2048 * 2880 * 2 * 2
    assert p.keys_values == narrow.keys_values and p.weights == narrow.weights


# ------------------------------------------------------------------------------------------------ real models


def by_part(state) -> dict[str, int]:
    found = dict.fromkeys(("experts", "attention", "router and norms", "embedding", "unembedding"), 0)
    for name, x in state.items():
        part = ("embedding" if name.startswith("embed") else "unembedding" if name.startswith("unembed") else
                "attention" if ".attn." in name else
                "experts" if ".gate_up." in name or ".down." in name else "router and norms")  # fmt: skip
        found[part] += x.nbytes
    return found


@pytest.mark.parametrize("wanted", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["original", "hf-mxfp4", "hf-dense"])
def test_the_weights_are_those_of_the_loaded_model_and_what_is_mapped_is_not_counted(layout, wanted, tmp_path):
    made = random_model(CONFIG, dtype=torch.bfloat16, packed=layout != "hf-dense")
    made.ln_final.float()  # a gain keeps its own dtype
    save(made, tmp_path / "x", layout)
    model, p = load(tmp_path / "x", dtype=wanted, device="cpu"), plan(tmp_path / "x", dtype=wanted, device="cpu")
    state = model.state_dict()
    assert p.weights == by_part(state) == plan(model, memory=10**9, device="cpu").weights
    mapped = {name: x for name, x in state.items() if x.untyped_storage().nbytes() > x.nbytes}  # a part of the file
    assert p.elsewhere == by_part(mapped) and mapped
    counted = sum(n for name, n in p.parts.items() if name.startswith("weights"))
    assert counted == sum(x.nbytes for name, x in state.items() if name not in mapped)
    assert sum(p.beside.values()) == sum(x.nbytes for x in mapped.values())
    assert p.model.dtype == model.dtype and p.total < plan(tmp_path / "x", dtype=wanted, memory=10**9).total
    assert plan(examine(tmp_path / "x"), dtype=wanted, device="cpu").parts == p.parts


def test_a_tensor_that_does_not_begin_where_its_numbers_may_is_copied_and_counted(tmp_path, monkeypatch):
    save(random_model(CONFIG, dtype=torch.bfloat16, packed=True), tmp_path / "x", "original")
    assert not any(name.startswith("weights") for name in plan(tmp_path / "x", device="cpu", memory=10**9).parts)
    monkeypatch.setattr(Stored, "aligned", False)
    p = plan(tmp_path / "x", device="cpu", memory=10**9)
    assert not p.beside and sum(n for name, n in p.parts.items() if name.startswith("weights")) == sum(p.weights.values())


@pytest.mark.parametrize("name", ["tiny", "tiny-random"])
def test_the_models_that_come_with_the_package_are_planned_as_they_are_loaded(name):
    p = plan(name, device="cpu")
    assert p.weights == by_part(load(name).state_dict()) and p.model.dtype == torch.float32 and p.source == name


def test_on_a_cpu_a_tensor_that_is_in_memory_twice_while_it_is_loaded_is_counted_until_more_is_needed(tmp_path):
    model = random_model(tiny_config(d_ff=512), dtype=torch.float32)
    save(model, tmp_path / "x", "hf-dense")  # gate_up is transposed
    once = plan(tmp_path / "x", device="cpu", context=1, memory=10**9)
    largest = max(x.nbytes for x in model.parameters())
    running = sum(once.keys_values.values()) + sum(once.one_pass.values())
    assert once.parts["what is copied, twice while loading"] == largest - running > 0
    assert "what is copied, twice while loading" not in plan(tmp_path / "x", device="cpu", batch=200, memory=10**9).parts
    packed = random_model(tiny_config(n_experts=64), dtype=torch.float32, packed=True)
    save(packed, tmp_path / "y", "hf-mxfp4")  # q, k and v are joined, the rest is mapped
    p = plan(tmp_path / "y", device="cpu", context=1, memory=10**9)
    assert p.twice == 4 * 4 * 16 * 32 < max(p.weights.values())


@torch.no_grad()
@settings(max_examples=15)
@given(window=st.integers(1, 40), layer_types=st.tuples(*[st.sampled_from([SLIDING, FULL])] * 3),
       context=st.integers(1, 100), chunk=st.integers(1, 30), batch=st.integers(1, 3))  # fmt: skip
def test_keys_and_values_are_those_of_a_cache_with_this_capacity(window, layer_types, context, chunk, batch):
    config = tiny_config(n_layers=3, sliding_window=window, layer_types=layer_types, d_model=32)
    model = random_model(config, dtype=torch.float32)
    tokens, cache = random_tokens(config, batch, context), KVCache(config, capacity=context)
    p = plan(config, context=context, chunk=chunk, batch=batch, dtype=torch.float32, memory=10**9)
    for part in tokens.split(chunk, dim=1):
        model(part, cache=cache, logits_to_keep=1)
    assert cache.n_bytes == sum(p.keys_values.values())


@torch.no_grad()
def test_until_a_pass_has_succeeded_a_sliding_layer_holds_its_old_ring_and_a_new_one_with_the_chunk(monkeypatch):
    held = []

    def commit(cache, positions, real=KVCache.commit):
        dicts = [value for value in vars(cache).values() if isinstance(value, dict)]  # what is kept, what is new
        kept = [x for one in dicts for layer, pair in one.items() if CONFIG.window(layer) for x in pair]
        held.append(sum(x.untyped_storage().nbytes() for x in kept))
        real(cache, positions)

    monkeypatch.setattr(KVCache, "commit", commit)
    model, cache = random_model(CONFIG, dtype=torch.float32), KVCache(CONFIG, capacity=60)
    for part in random_tokens(CONFIG, 2, 60).split(20, dim=1):
        model(part, cache=cache)
    p = plan(CONFIG, context=60, chunk=20, batch=2, dtype=torch.float32, memory=10**9)
    assert max(held) == p.keys_values["sliding layers"] + p.one_pass["sliding layers"]


def test_one_pass_takes_what_its_tensors_take_counted_by_hand():
    p = plan("gpt-oss-20b", chunk=1024, batch=2, memory="80GiB")
    n, bf16, f32 = 2 * 1024, 2, 4
    assert p.steps == {
        "norms": 3 * n * 2880 * f32,
        "attention": bf16 * n * (5120 + (64 + 8) * 64 + 4096),  # what qkv makes; q and k turned; z
        "experts": n * (32 * bf16 + 4 * 8 + 4 * bf16 + 4 * (2880 + 2880) * bf16),
    }
    assert p.one_pass == {
        "residual stream": 3 * n * 2880 * bf16, "sliding layers": 12 * 2 * 8 * 64 * bf16 * (n + 2 * 128),
        "experts of a layer": p.steps["experts"], "logits of one row": 2 * 201_088 * f32,
    }  # fmt: skip
    on_cpu = plan("gpt-oss-20b", chunk=1024, batch=2, device="cpu", memory="80GiB").steps
    # A float32 product of 2 * d_ff numbers a row, its bias, and their sum.
    assert on_cpu["experts"] - p.steps["experts"] == n * 4 * (5760 * (f32 + bf16 + f32) - 5760 * bf16)


def test_what_is_recorded_is_what_cost_says_and_patterns_grow_with_the_square():
    model, names = random_model(CONFIG, dtype=torch.bfloat16), ["*.hook_resid_post", ("q", 1)]
    p = plan(CONFIG, context=50, record=names, batch=2, memory=10**9)
    assert p.parts["recorded values"] == cost(model, names, 2, 50)
    assert "recorded values" not in plan(CONFIG, memory=10**9).parts
    patterns = plan("gpt-oss-20b", record="*.hook_pattern", memory="16GiB")
    assert patterns.recorded == 24 * 64 * 131_072**2 * 2
    assert not patterns.fits and 100 < patterns.largest_context < 1500
    with pytest.raises(KeyError, match="no hook point matches 'nix'"):
        plan(CONFIG, record=["nix"], memory=10**9)


def test_of_a_model_that_is_there_the_weights_are_not_counted_unless_all_the_memory_is_given(monkeypatch):
    model = random_model(CONFIG, dtype=torch.float32)
    monkeypatch.setattr(module, "free_bytes", lambda device: 10**6)
    there, whole = plan(model), plan(model, memory=10**6)
    assert there.device.type == "cpu" and there.memory == 10**6
    assert sum(there.beside.values()) == whole.total - there.total == sum(x.nbytes for x in model.state_dict().values())
    assert all("already there" in name for name in there.beside)


def test_where_the_system_does_not_say_what_is_free_everything_fits(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: None)
    p = plan("gpt-oss-120b", device="cpu")
    assert p.fits and p.memory is None and p.largest_context == 131_072 and "there" not in str(p)


# ------------------------------------------------------------------------------------------------ what fits


@st.composite
def settings_of_a_plan(draw) -> dict:
    return dict(
        device=draw(st.sampled_from(["cuda", "cpu"])), chunk=draw(st.sampled_from([None, 1, 7, 300])),
        record=draw(st.sampled_from([(), ("*.hook_resid_post",), ("*.hook_pattern",)])),
        batch=draw(st.integers(1, 3)), dtype=draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
    )  # fmt: skip


LONG = tiny_config(n_layers=2, n_ctx=5000, d_vocab=2000)


@given(how=settings_of_a_plan(), share=st.floats(0, 1.05))
def test_the_largest_context_fits_and_one_more_does_not(how, share):
    least, most = (plan(LONG, context=n, memory=0, **how).total for n in (1, LONG.n_ctx))
    p = plan(LONG, memory=int(0.8 * least + share * (most - 0.8 * least)), **how)
    n = p.largest_context
    assert n == 0 or p.at(n).fits
    assert n == LONG.n_ctx or not p.at(n + 1).fits
    assert p.fits == (n == LONG.n_ctx)
    assert p.at(max(n, 1)).largest_context == n  # whichever context was asked for


@given(how=settings_of_a_plan(), memory=st.integers(0, 2 * 10**7), more=st.integers(0, 10**7))
def test_more_memory_never_makes_the_largest_context_smaller_nor_the_chunk(how, memory, more):
    some, all_of_it = (plan(LONG, memory=CUDA_CONTEXT + n, **how) for n in (memory, memory + more))
    assert some.largest_context <= all_of_it.largest_context
    assume(some.fits)
    assert all_of_it.fits and some.chunk <= all_of_it.chunk


@given(how=settings_of_a_plan(), context=st.integers(1, LONG.n_ctx - 1))
def test_a_longer_context_never_takes_less(how, context):
    p = plan(LONG, memory=0, **how)
    assert p.at(context).total <= p.at(context + 1).total


def test_the_chunk_is_the_largest_that_fits_and_the_first_where_none_does():
    full = {chunk: plan("gpt-oss-20b", chunk=chunk, memory="80GiB") for chunk in CHUNKS}
    on_host = {chunk: replace(p, embedding_on_host=True).total for chunk, p in full.items()}
    assert sorted(on_host.values(), reverse=True) == list(on_host.values())
    for chunk, need in on_host.items():
        assert plan("gpt-oss-20b", memory=need).chunk == chunk
        less = plan("gpt-oss-20b", memory=need - 1)
        assert less.chunk == (chunk // 2 if chunk > 256 else 2048) and less.fits == (chunk > 256)
    assert plan("gpt-oss-20b", memory=on_host[2048] - 1, chunk=2048).fits is False
    assert full[1024].total < full[2048].total - 1  # a large chunk and the embedding on the host come first
    assert (moved := plan("gpt-oss-20b", memory=full[2048].total - 1)).chunk == 2048 and moved.embedding_on_host
    assert not less.embedding_on_host  # it would not have helped


def test_on_a_cpu_no_embedding_is_moved_and_a_mask_is_counted():
    p = plan("gpt-oss-20b", device="cpu", memory="3GiB")
    assert not p.fits and not p.embedding_on_host and 0 < p.largest_context < 131_072
    assert p.steps["attention"] - plan("gpt-oss-20b", memory="80GiB").steps["attention"] == 10 * 512 * 131_072


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize("text, n", [("16GiB", 2**34), ("16 gib", 2**34), ("14.6GiB", int(146 * GIB / 10)),
                                     ("500MiB", 500 * 2**20), ("16GB", 16 * 10**9), ("1.5MB", 1_500_000),
                                     ("9007199254740993", 9007199254740993), (12, 12)])  # fmt: skip
def test_an_amount_of_memory_is_read(text, n):
    assert n_bytes(text) == n


@pytest.mark.parametrize("text", ["16G", "GiB", "", "-1GiB", "1e9", "1.2.3GB", "16 GiB free", "16TiB", "inf", "1,000"])
def test_what_is_no_amount_of_memory_is_refused_with_examples(text):
    with pytest.raises(ValueError, match="is no amount of memory: write 16GiB, 15500MiB"):
        n_bytes(text)


def test_numbers_that_mean_nothing_are_refused():
    for wrong, words in (({"context": 0}, "context = 0: must be 1 to 128"), ({"context": 129}, "1 to 128"),
                         ({"chunk": 0}, "chunk = 0: must be at least 1"), ({"batch": -1}, "batch = -1")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            plan(CONFIG, memory=10**9, **wrong)
    with pytest.raises(FileNotFoundError, match="no name on the hub"):
        plan("nowhere at all", memory=10**9)


def test_the_table_adds_up(capsys):
    p = plan("gpt-oss-20b", memory="16GiB", record=["*.hook_sink_mass"])
    lines = [line.rsplit("GiB", 1)[0].rsplit(None, 2) for line in str(p).splitlines() if " GiB " in line]
    figures = {name.strip(): (int(n.replace(",", "")), float(gib)) for name, n, gib in lines}
    assert {name: n for name, (n, _) in figures.items() if name in p.parts} == p.parts
    assert figures["needed"][0] == sum(p.parts.values()) == p.total
    assert figures["left"][0] == figures["there"][0] - figures["needed"][0] and figures["there"][0] == 2**34
    assert all(gib == round(n / GIB, 3) for n, gib in figures.values())
    assert len({len(line) for line in str(p).splitlines() if " GiB " in line}) == 1  # aligned
    assert str(p).endswith("It fits. The largest context that fits is 131,072.")
    assert "(assumed)" in str(p)  # no GPU has confirmed what a context takes


def test_a_refusal_names_the_bytes_the_largest_context_and_the_table():
    p = plan("gpt-oss-20b", memory="14GiB")
    words = p.refusal("openai/gpt-oss-20b")
    assert words.startswith(f"openai/gpt-oss-20b needs {p.total:,} bytes (16.430 GiB) on cuda for 131,072 positions, "
                            f"where {14 * GIB:,} bytes (14.000 GiB) are there. The largest context that fits is "
                            f"{p.largest_context:,}. ") and str(p) in words  # fmt: skip
    assert 65_536 < p.largest_context < 131_072
    [too_much] = [line for line in words.splitlines() if line.startswith("too much")]
    assert too_much.split()[2] == f"{p.total - p.memory:,}"
    assert "No context fits." in plan("gpt-oss-20b", memory="8GiB").refusal()


def test_the_command_prints_the_table_and_its_status_says_whether_it_fits(capsys, monkeypatch):
    arguments = ["plan", "gpt-oss-20b", "--context", "131072"]
    assert main([*arguments, "--memory", "16GiB"]) == 0
    assert capsys.readouterr().out == f"{plan('gpt-oss-20b', memory='16GiB')}\n"
    assert main([*arguments, "--memory", "15GiB", "--dtype", "float16", "--chunk", "512", "--record", "*.hook_z",
                 "*.hook_resid_post"]) == 1  # fmt: skip
    out = capsys.readouterr().out
    assert "It does not fit. The largest context" in out and "float16, prompts read 512 tokens" in out
    assert "recorded values" in out
    assert main(["plan", "tiny", "--device", "cpu"]) == 0
    assert "tiny on cpu: 128 positions in float32" in capsys.readouterr().out
    assert main([*arguments, "--memory", "16 elephants"]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments) == 1
    assert "there is no GPU here to ask what is free: say memory=" in capsys.readouterr().err


def test_a_gpu_that_is_asked_what_is_free_has_its_context_already(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "free_bytes", lambda device: 10**9)
    asked, told = plan(CONFIG), plan(CONFIG, memory=10**9)
    assert told.total - asked.total == CUDA_CONTEXT and asked.memory == told.memory
