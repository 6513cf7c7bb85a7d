"""What is written in C++ gives the numbers of the readable way, on every instruction set."""
import copy
import ctypes
import platform
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401
from torch import nn

from gptoss_lab import KVCache, edit, fast, generate, model, mxfp4, record, rope
from gptoss_lab.fast import cpu
from gptoss_lab.kv_cache import Visible

COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is here")
INTEL = platform.machine() in ("x86_64", "AMD64")
FLAGS = {"native": ["-march=native"], "AVX2": ["-mavx2"], "plain": []} if INTEL else {"native": [], "plain": []}


@pytest.fixture(scope="module", params=FLAGS, autouse=False)
def variant(request, tmp_path_factory):
    """The library built for one instruction set."""
    if request.param == "AVX2" and "avx2" not in cpu._processor():
        pytest.skip("this processor has no AVX2")
    path = tmp_path_factory.mktemp("cpu") / "cpu.so"
    command = [COMPILER, "-O3", "-std=c++17", "-fPIC", "-shared", *FLAGS[request.param], "-o", str(path), str(cpu.SOURCE)]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def built(variant, monkeypatch):
    monkeypatch.setattr(cpu, "compiled", lambda: variant)


def packed(*shape, low=0, high=255, seed=0):
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (*shape, 16), generator=g, dtype=torch.uint8)
    return blocks, torch.randint(low, high + 1, shape, generator=g).to(torch.uint8)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_at_every_scale_is_the_number_that_mxfp4_unpacks(built, dtype):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, -1, -1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()
    ours, theirs = cpu.unpack(blocks, scales, dtype), mxfp4.unpack(blocks, scales, dtype)
    assert torch.equal(ours, theirs) and torch.equal(ours.signbit(), theirs.signbit())


@needs_compiler
@pytest.mark.parametrize("d_out, groups, n, m", [(1, 1, 1, 1), (7, 3, 5, 2), (64, 2, 12, 4), (5, 90, 3, 3)])
def test_a_product_with_packed_numbers_is_that_with_unpacked_ones(built, d_out, groups, n, m):
    blocks, scales = packed(4, d_out, groups, low=110, high=130, seed=n)
    x, g = torch.randn(m, groups * 32), torch.Generator().manual_seed(1)
    experts, rows = torch.randint(4, (n,), generator=g), torch.randint(m, (n,), generator=g)
    w = mxfp4.unpack(blocks, scales, torch.float64)
    target = torch.stack([w[e] @ x[r].double() for e, r in zip(experts.tolist(), rows.tolist())])
    torch.testing.assert_close(cpu.multiply(blocks, scales, experts, rows, x).double(), target,
                               atol=2e-6 * target.abs().max().item(), rtol=0)  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("n, d_out, d_in", [(1, 3, 1), (2, 5, 31), (3, 4, 96), (8, 9, 130)])
def test_a_product_with_bfloat16_rows_is_that_with_the_numbers(built, n, d_out, d_in):
    weight, x = torch.randn(d_out, d_in).bfloat16(), torch.randn(n, d_in)
    target = x.double() @ weight.double().T
    torch.testing.assert_close(cpu.bf16_product(x, weight).double(), target, atol=2e-6 * d_in**0.5, rtol=0)


@needs_compiler
@pytest.mark.parametrize("piece", [96, 16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_experts_are_those_of_the_readable_way(built, tokens, piece, monkeypatch):
    monkeypatch.setattr(fast, "PIECE", piece)
    moe = random_model(tiny_config(n_experts=4), dtype=torch.float32, packed=True).blocks[0].mlp
    x = torch.randn(2, tokens, 32)
    indices = torch.randint(4, (2, tokens, 3))
    weights = torch.rand(2, tokens, 3)
    with torch.no_grad():
        assert fast.packed_serves(moe, x)
        ours, readable = fast.mix_packed(moe, x, indices, weights), moe.mix(x, indices, weights)
    torch.testing.assert_close(ours, readable, atol=1e-5 * readable.abs().max().item(), rtol=0)


@needs_compiler
@pytest.mark.parametrize("quick", [False, True])
def test_in_bfloat16_it_is_nearer_to_the_exact_numbers_than_the_readable_way(built, quick, monkeypatch):
    monkeypatch.setattr(cpu, "bf16_is_quick", lambda: quick)
    config = tiny_config(n_experts=4)
    narrow, exact = (random_model(config, dtype=dtype, packed=True).blocks[0].mlp for dtype in (torch.bfloat16, torch.float64))
    for mine, its in zip(narrow.parameters(), exact.parameters()):
        its.data.copy_(mine)
    x, indices = torch.randn(2, 30, 32).bfloat16(), torch.randint(4, (2, 30, 3))
    weights = torch.rand(2, 30, 3).bfloat16()
    with torch.no_grad():
        target = exact.mix(x.double(), indices, weights.double())
        ours, readable = fast.mix_packed(narrow, x, indices, weights), narrow.mix(x, indices, weights)
    off = [(y.double() - target).square().mean().item() for y in (ours, readable)]
    assert off[0] <= 1.1 * off[1]


def close(ours, exact, units=8):
    """Within a few units of the last place of the largest number."""
    assert ours.dtype == torch.float32 and ours.shape == exact.shape
    torch.testing.assert_close(ours.double(), exact.double(), atol=units * 6e-8 * exact.abs().max().item(), rtol=0)


@needs_compiler
@pytest.mark.parametrize("n, d_out, d_in", [(1, 1, 1), (2, 3, 15), (3, 4, 16), (4, 9, 33), (5, 6, 40), (11, 10, 130), (32, 8, 64)])
def test_a_float32_product_is_that_of_float64(built, n, d_out, d_in):
    x, weight, bias = torch.randn(n, d_in), torch.randn(d_out, d_in), torch.randn(d_out)
    for b in (None, bias):
        close(cpu.linear(x, weight, b), F.linear(x.double(), weight.double(), None if b is None else b.double()))


INNER = {name: at for at, name in enumerate(model.MoE.inner_points)}


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("tokens, d, f", [(1, 40, 5), (3, 32, 16), (9, 33, 24)])
@pytest.mark.parametrize("told", [(), tuple(INNER), ("post",), ("pre", "expert_out")])
def test_the_mixture_of_a_few_tokens_and_what_is_made_inside_are_those_of_float64(built, tokens, d, f, told):
    moe = model.MoE(tiny_config(n_experts=5, d_model=d, d_ff=f), packed=False)
    for weight in moe.parameters():
        weight.normal_(std=2 * weight.shape[-1] ** -0.5)
    exact = copy.deepcopy(moe).double()
    x, experts, weights = torch.randn(1, tokens, d), torch.rand(1, tokens, 5).argsort(-1)[..., :3].contiguous(), torch.rand(1, tokens, 3)
    parts = [torch.full((1, tokens, 3, d if name == "expert_out" else f), torch.nan) if name in told else None for name in INNER]
    seen = {}
    exact.hook = lambda name, value: seen.setdefault(name, value)
    close(cpu.mix(moe, x, experts, weights, parts), exact.mix(x.double(), experts, weights.double()), units=30)
    for name in told:
        close(parts[INNER[name]], seen[name], units=30)
    for none in (-1, 5):
        experts[0, -1, -1] = none
        with pytest.raises(IndexError, match="there are 0 to 4"):
            cpu.mix(moe, x, experts, weights)


@needs_compiler
@pytest.mark.parametrize("d", [1, 15, 16, 96, 130])
def test_the_norm_and_what_is_made_inside_are_those_of_float64(built, d):
    x, weight, scale, normalized = torch.randn(2, 3, d), torch.randn(d), torch.empty(2, 3, 1), torch.empty(2, 3, d)
    rms = (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    close(cpu.norm(x, weight, 1e-3, scale, normalized), x.double() / rms * weight)
    close(scale, rms)
    close(normalized, x.double() / rms)
    assert torch.equal(cpu.norm(x, weight, 1e-3), cpu.norm(x, weight, 1e-3, None, normalized))


@needs_compiler
def test_expert_outputs_are_added_by_their_weights_and_handed_out(built):
    y, place, weights, out = torch.randn(5, 33), torch.tensor([7, 0, 2, 3, 6]), torch.rand(4, 2), torch.randn(4, 33)
    outs, exact = torch.zeros(8, 33), out.double()
    for row, slot in enumerate(place.tolist()):
        exact[slot // 2] += weights.double()[slot // 2, slot % 2] * y[row]
    cpu.add_rows(y, place, weights, out, outs)
    close(out, exact)
    assert torch.equal(outs[place], y) and not outs[[1, 4, 5]].any()


@needs_compiler
@pytest.mark.parametrize("rows", [None, 3])
def test_the_rotation_is_that_of_the_readable_way(built, rows):
    qkv = torch.randn(3, 5, 7, 24)
    x = qkv[:, :, 1:4]  # as q and k lie in one product
    cos, sin = (torch.randn(*[rows] if rows else [], 5, 12) for _ in range(2))
    close(cpu.rotate(x, cos, sin), rope.rotate(x.double(), cos.double(), sin.double()))


@needs_compiler
@pytest.mark.parametrize("batch, s, t, n_heads, n_kv_heads, h, window", [
    (1, 1, 1, 1, 1, 2, None), (1, 1, 77, 8, 2, 32, None), (2, 5, 5, 6, 2, 24, 3), (3, 7, 20, 7, 1, 16, 8),
    (1, 33, 40, 16, 2, 64, None), (2, 1, 17, 5, 5, 6, 4)])  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_attention_and_what_is_made_inside_are_those_of_the_readable_way(built, batch, s, t, n_heads, n_kv_heads, h, window, padded):
    config = tiny_config(n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=h)
    q, k, v = torch.randn(batch, s, n_heads, h), torch.randn(batch, t + 3, n_kv_heads, h), torch.randn(batch, t, n_kv_heads + 2, h)
    k, v = k[:, :t], v[:, :, 1:-1]  # a buffer with room, a view of q, k and v
    sinks = torch.randn(n_heads)[:, None].expand(batch, -1, s).contiguous()
    sinks[:, 0] = -torch.inf
    key = torch.arange(t)
    if padded:  # each row has its own, at any place
        mask = torch.randint(2, (batch, t)).bool()
        key = torch.where(mask, mask.cumsum(-1) - 1, -1)
    query = key[..., t - s :].clamp(min=0)
    scores, pattern = torch.empty(2, batch, n_heads, s, t)
    attention = model.Attention(config, 0)
    seen = {}
    attention.hook = lambda name, value: seen.setdefault(name, value)
    visible = Visible(query, key, window)
    readable = attention.attend(q.double(), k.double(), v.double(), sinks.double(), visible.mask, 0)
    for ours, exact in zip(cpu.attend(q, k, v, sinks, query, key, window, scores, pattern), readable):
        close(ours, exact, units=30)
    assert torch.equal(scores.isinf(), seen["attn_scores"].isinf())
    close(scores.masked_fill(scores.isinf(), 0), seen["attn_scores"].masked_fill(scores.isinf(), 0), units=30)
    close(pattern, seen["pattern"], units=30)


@needs_compiler
def test_two_threads_give_the_numbers_of_one(monkeypatch):
    x, h = torch.randn(9, 40), torch.randn(9, 40)
    weight, bias, (q, k) = torch.randn(5, 11, 40), torch.randn(5, 11), torch.randn(2, 3, 7, 4, 8)
    moe, at = random_model(tiny_config(n_experts=5), dtype=torch.float32).blocks[0].mlp, torch.arange(7)
    tokens, chosen = torch.randn(1, 3, 32), torch.randint(5, (1, 3, 3))
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append([cpu.linear(x, weight[0], bias[0]), cpu.mix(moe, tokens, chosen, tokens[..., :3].contiguous()), cpu.swiglu(h, 2.0, 1.7),
                      cpu.rotate(q, q[0, :, 0, :4].contiguous(), q[0, :, 1, :4].contiguous()),
                      *cpu.attend(q, k, k, torch.zeros(3, 4, 7), at, at, None)])  # fmt: skip
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@needs_compiler
def test_the_exponential_is_near_and_ends_where_float32_does(built):
    sigmoid = lambda x: cpu.swiglu(torch.stack([x, torch.zeros_like(x)], -1), 1e30, 1.0)[:, 0] / x
    x = torch.cat([torch.linspace(-87, 87, 100_000), torch.tensor([-1e4, -100.0, 100.0, 1e4])])
    close(sigmoid(x), x.double().sigmoid(), units=4)
    small = torch.linspace(-80, -20, 100_000)  # where a sigmoid is the exponential
    assert (sigmoid(small) / small.double().exp() - 1).abs().max() < 5e-7


@needs_compiler
@pytest.mark.parametrize("f", [1, 7, 16, 33])
def test_the_swiglu_is_that_of_the_readable_way(built, f):
    h = 4 * torch.randn(5, 2 * f)
    gate, linear = h.double()[:, 0::2].clamp(max=2), h.double()[:, 1::2].clamp(-2, 2)
    close(cpu.swiglu(h, 2.0, 1.702), model.swiglu(gate, linear, 1.702))


@needs_compiler
@pytest.mark.parametrize("n_experts, k", [(1, 1), (5, 5), (8, 4), (128, 4)])
def test_the_largest_are_those_of_a_stable_sort_also_among_equals_and_without_numbers(built, n_experts, k):
    x = torch.randint(6, (3, 100, n_experts)).float()
    x[torch.rand_like(x) < 0.05], x[torch.rand_like(x) < 0.05] = torch.nan, torch.inf
    assert torch.equal(cpu.top(x, k), x.sort(dim=-1, descending=True, stable=True).indices[..., :k])


@needs_compiler
def test_nan_in_what_is_read_is_nan_in_what_comes_out(built):
    nan = torch.tensor([[torch.nan, 1.0, 1.0, torch.nan]])
    assert cpu.swiglu(nan, 7.0, 1.702).isnan().all() and cpu.norm(nan, nan[0], 1e-5).isnan().all()
    q, k = torch.ones(1, 1, 1, 4), torch.ones(1, 3, 1, 4)
    k[0, 1] = torch.nan
    for window, same in ((None, torch.Tensor.isnan), (1, torch.Tensor.isfinite)):  # with the key, and without it
        z, mass = cpu.attend(q, k, torch.ones_like(k), torch.zeros(1, 1, 1), torch.tensor([2]), torch.arange(3), window)
        assert same(z).all() and same(mass).all()


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("d_ff", [64, 96])
def test_a_model_in_float32_is_as_near_to_float64_as_the_readable_way(built, d_ff, monkeypatch):
    """Whole, padded, in chunks and token by token past the window: with the library and without."""
    config = tiny_config(n_ctx=512, d_ff=d_ff, n_heads=6, n_kv_heads=2)
    lab, exact = (random_model(config, dtype=dtype) for dtype in (torch.float32, torch.float64))
    exact.load_state_dict(lab.state_dict())
    tokens, mask = random_tokens(config, 2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :9] = 0

    def all_ways(given):
        with record(given) as acts:
            yield given(tokens)
        yield from acts.values()
        yield given(tokens, mask)[:, 9:]
        cache = KVCache(config)
        yield torch.cat([given(part, m, cache=cache) for part, m in zip(tokens.split(13, 1), mask.split(13, 1))], 1)[:, 9:]
        cache = KVCache(config)
        yield torch.cat([given(tokens[:1, [i]], cache=cache) for i in range(40)], 1)

    ours, targets = list(all_ways(lab)), list(all_ways(exact))
    monkeypatch.setattr(cpu, "compiled", lambda: None)
    for mine, readable, target in zip(ours, all_ways(lab), targets, strict=True):
        scale = target.double().std() if target.is_floating_point() else 1
        assert (mine - target).abs().max() <= 2 * (readable - target).abs().max() + 2e-6 * scale


@needs_compiler
@torch.no_grad()
def test_few_rows_go_through_the_library_and_through_every_layer_that_somebody_put_in_place_or_hooked(monkeypatch):
    lab, tokens, called = random_model(tiny_config(), dtype=torch.float32), random_tokens(tiny_config(), 1, 5), []
    real = cpu._call
    monkeypatch.setattr(cpu, "_call", lambda name, *given: called.append(name) or real(name, *given))
    lab(tokens)
    assert set(called) == {"linear", "norm", "rotate", "attend", "top", "mix"}
    for path in ("ln1", "attn.qkv", "attn.out", "mlp.router", "mlp.gate_up", "mlp.down"):
        called.clear()
        handle = lab.blocks[1].get_submodule(path).register_forward_hook(lambda *given: called.append("hook"))
        generate(lab, tokens, 3, stop=())
        assert called.count("hook") == 3, path
        handle.remove()


READ = lambda name: not name.endswith("hook_result")  # whose sum is the output then


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 40), (3, 120)])
@pytest.mark.parametrize("padded", [False, True])
def test_reading_every_value_changes_no_bit_of_the_logits_and_gives_the_numbers_of_the_readable_way(shape, padded, monkeypatch):
    lab, tokens = random_model(tiny_config(), dtype=torch.float32), random_tokens(tiny_config(), *shape)
    mask = torch.ones_like(tokens)
    mask[0, : shape[1] // 3] = 1 - padded
    idle = lab(tokens, mask)
    logits, acts = lab.run_with_cache(tokens, READ, attention_mask=mask)
    few, default = lab.run_with_cache(tokens, attention_mask=mask)
    assert torch.equal(logits, idle) and torch.equal(few, idle)
    assert all(torch.equal(x, acts[name]) for name, x in default.items())
    called = []
    monkeypatch.setattr(fast, "made_for", lambda *given: called.append(given))
    with edit(lab, {name: lambda x: x for name in acts if lab.hook_points[name].writable}):
        _, slow = lab.run_with_cache(tokens, READ, attention_mask=mask)
    assert not called  # who may edit gets each value before the next is made from it
    for name, x in slow.items():
        assert torch.equal(acts[name].isinf(), x.isinf()), name
        finite = x.masked_fill(x.isinf(), 0)
        torch.testing.assert_close(acts[name].masked_fill(x.isinf(), 0), finite, atol=1e-5 * (1 + finite.abs().max().item()), rtol=0,
                                   msg=lambda said, name=name: f"{name}: {said}")  # fmt: skip


@needs_compiler
@torch.no_grad()
def test_parts_and_several_records_of_what_is_made_inside_have_numbers_of_their_own():
    lab, tokens = random_model(tiny_config(), dtype=torch.float32), random_tokens(tiny_config(), 2, 30)
    inner = "*.hook_pattern", "*.hook_post", "*.hook_normalized"
    with record(lab, *inner) as one, record(lab, *inner) as two, record(lab, *inner, pos_slice=-1) as last:
        lab(tokens)
    for name, x in one.items():
        assert torch.equal(x, two[name]) and x.untyped_storage().data_ptr() != two[name].untyped_storage().data_ptr()
        assert torch.equal(last[name], x.narrow(lab.hook_points[name].axis("s"), 29, 1))
    with record(lab, *inner, pos_slice=-1) as last:
        lab(tokens)
    assert all(torch.equal(x, one[name].narrow(lab.hook_points[name].axis("s"), 29, 1)) for name, x in last.items())


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("length", [3, 120])
@pytest.mark.parametrize("end", ["", "bias"])  # of all weights, and with matrices that C++ takes
def test_weights_that_are_views_of_others_are_read_as_they_are(end, length):
    lab, tokens = random_model(tiny_config(), dtype=torch.float32), random_tokens(tiny_config(), 1, length)
    expected = lab(tokens)
    weights = [weight for name, weight in lab.named_parameters() if name.endswith(end)]
    for weight in weights:
        weight.data = torch.stack([weight.data, torch.full_like(weight.data, torch.nan)], -1)[..., 0]
    assert not any(weight.is_contiguous() for weight in weights)
    torch.testing.assert_close(lab(tokens), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(lab.run_with_cache(tokens, "*")[0], expected, atol=1e-4, rtol=0)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [3, 120])
def test_experts_that_somebody_hooked_or_patched_are_called_whatever_the_way(packed, length):
    lab, tokens, called = random_model(tiny_config(), dtype=torch.float32, packed=packed), random_tokens(tiny_config(), 1, length), []
    expected = lab(tokens)
    down = lab.blocks[2].mlp.down
    down.forward = lambda x, experts: type(down).forward(down, x, experts) * 0
    assert not lab.run_with_cache(tokens, ("expert_out", 2))[1]["expert_out", 2].any()
    del down.forward
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *given: called.append(layer))
    lab(tokens)
    assert sum(type(layer) is model.Experts for layer in called) == 2 * len(lab.blocks)
    handle.remove()
    called.clear()
    for part in ("gate_up", "down"):
        handle = lab.blocks[1].mlp.get_submodule(part).register_forward_hook(lambda *given: called.append(given))
        torch.testing.assert_close(lab(tokens), expected, atol=1e-4, rtol=0)
        handle.remove()
    assert len(called) == 2


@needs_compiler
def test_who_follows_the_operations_gets_operations(monkeypatch):
    x, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
    assert not fast.plain(x, weight)  # gradients may be asked for
    with torch.no_grad():
        assert fast.plain(x, weight) and not fast.plain(x, weight.double()) and not fast.plain(x.to("meta"))
        with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
            assert not fast.plain(x, weight)
            fast.product(x, weight)
        assert flops.get_total_flops() == 2 * 6 * 4 * 8
        with torch.device("cpu"):
            assert not fast.plain(x)


def test_without_a_compiler_or_when_it_is_turned_off_there_is_no_library(monkeypatch, tmp_path):
    fresh = cpu.compiled.__wrapped__
    monkeypatch.setenv("GPTOSS_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("GPTOSS_LAB_FAST", "0")
    assert fresh() is None
    monkeypatch.delenv("GPTOSS_LAB_FAST")
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert fresh() is None
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert fresh() is None and list(tmp_path.iterdir()) == []


def test_without_the_library_the_readable_way_serves(monkeypatch):
    monkeypatch.setattr(cpu, "compiled", lambda: None)
    model = random_model(tiny_config(n_layers=1), dtype=torch.float32, packed=True)
    with torch.no_grad():
        assert not fast.packed_serves(model.blocks[0].mlp, torch.randn(1, 1, 32))
        assert model(torch.arange(9)[None]).isfinite().all()


@needs_compiler
def test_the_library_is_built_once_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTOSS_LAB_CACHE", str(tmp_path))
    assert cpu.compiled.__wrapped__() is not None
    [path] = tmp_path.iterdir()
    at = path.stat().st_mtime_ns
    assert cpu.compiled.__wrapped__() is not None and [p.stat().st_mtime_ns for p in tmp_path.iterdir()] == [at]
