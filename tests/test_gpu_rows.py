"""The small kernels of a step, in Triton's interpreter: the readable functions' numbers, and what compilers make of them."""
import re

import kernels
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import as_on_a_gpu  # noqa: F401
from torch import Tensor

from gptoss_lab import rope
from gptoss_lab.model import RMSNorm, route

rows = kernels.interpreted("rows")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = st.sampled_from(DTYPES)
widths = st.sampled_from([1, 3, 32, 45, 64, 100, 2880])
leading = st.sampled_from([(1,), (3,), (2, 1), (2, 3)])


def assert_rounded(ours: Tensor, exact: Tensor, terms: Tensor | float = 0.0) -> None:
    """Half a unit in the last place from the exact value, and what float32 loses of `terms`, those that were added."""
    info = torch.finfo(ours.dtype)
    bound = exact.abs() * (info.eps / 2 + 1e-6) + terms * 1e-6 + info.tiny * info.eps
    assert ours.shape == exact.shape and ((ours.double() - exact).abs() <= bound).all()


# ------------------------------------------------------------------------------------------ norms


def exact_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@settings(max_examples=40)
@given(shape=leading, d=widths, dtype=dtypes, gain=dtypes, out=dtypes, eps=st.sampled_from([1e-5, 0.5]))
def test_the_norm_is_the_readable_one_rounded_once(shape, d, dtype, gain, out, eps):
    x, weight = (3 * torch.randn(*shape, d)).to(dtype), torch.randn(d).to(gain)
    ours = rows.rms_norm(x, weight, eps, out)
    assert ours.dtype == out
    assert_rounded(ours, exact_norm(x, weight, eps))
    if dtype == gain == out:
        readable = RMSNorm(d, eps).to(dtype).requires_grad_(False)
        readable.weight.copy_(weight)
        torch.testing.assert_close(ours, readable(x), atol=1e-7, rtol=2 * torch.finfo(dtype).eps)


def test_the_norm_reads_a_slice_of_a_longer_text():
    x, weight = torch.randn(2, 5, 40)[:, -1:], torch.rand(40)
    assert_rounded(rows.rms_norm(x, weight, 1e-5, x.dtype), exact_norm(x, weight, 1e-5))


# ------------------------------------------------------------------------------------------ rotation


def angles(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = 7 * torch.randn(shape)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@settings(max_examples=25)
@given(b=st.integers(1, 2), n_heads=st.sampled_from([1, 6, 8]), n_kv_heads=st.integers(1, 3), half=st.sampled_from([1, 3, 8, 32]),
       capacity=st.integers(1, 9), position=st.integers(0, 30), dtype=dtypes, each=st.booleans(), joined=st.booleans())  # fmt: skip
def test_one_token_is_turned_and_written_into_its_slot_alone(b, n_heads, n_kv_heads, half, capacity, position, dtype, each, joined):
    qkv = torch.randn(b, n_heads + 2 * n_kv_heads, 2 * half).to(dtype)
    cos, sin = angles(*((b, 1) if each else (1,)), half, dtype=dtype)
    # A cache that reserved more than this layer reads: rows lie further apart than they are long.
    k_cache, v_cache = torch.randn(2, b, capacity + 3, n_kv_heads, 2 * half).to(dtype)[:, :, :capacity]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    q, k, v = qkv.unsqueeze(1).split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    expected_k[:, position % capacity] = rope.rotate(k, cos, sin)[:, 0]
    expected_v[:, position % capacity] = v[:, 0]
    given_qkv = qkv.flatten(1) if joined else qkv
    ours = rows.rotate_into_cache(given_qkv, cos, sin, k_cache, v_cache, torch.tensor([position]))
    assert torch.equal(ours, rope.rotate(q, cos, sin)[:, 0])
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)


# ------------------------------------------------------------------------------------------ routing


def assert_chosen(logits: Tensor, k: int) -> None:
    indices = rows.route(logits, k)
    assert indices.dtype == torch.int64 and torch.equal(indices, route(logits, k))


@settings(max_examples=20)
@given(shape=leading, n_experts=st.sampled_from([1, 2, 5, 32, 33, 128]), k=st.integers(1, 6), dtype=dtypes, levels=st.sampled_from([1, 3, 1000]))
def test_the_router_chooses_as_the_readable_one(shape, n_experts, k, dtype, levels):
    """Few levels: many logits are equal."""
    assert_chosen((torch.randint(levels, (*shape, n_experts)) / 8 - 5).to(dtype), min(k, n_experts))


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")  # numpy's, of infinities
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_router_chooses_among_infinities_zeros_and_nan_as_the_readable_one(dtype):
    nan, inf = float("nan"), float("inf")
    for row in ([0.0, -0.0, 0.0, -0.0, -1.0], [-inf, 2.0, -inf, -inf, -inf], [-inf] * 5, [1.0, inf, 2.0, inf, -inf],
                [1.0, nan, inf, nan, 3.0], [nan] * 5, [-inf, -inf, nan, -inf, -inf]):  # fmt: skip
        for k in (1, 4):
            assert_chosen(torch.tensor([row, row[::-1]]).to(dtype), k)


# ------------------------------------------------------------------------------------------ lookup


@settings(max_examples=20)
@given(shape=leading, d=widths, dtype=dtypes, index=st.sampled_from([torch.int32, torch.int64]))
def test_a_lookup_gives_the_rows_of_the_embedding(shape, d, dtype, index):
    weight, tokens = torch.randn(11, d).to(dtype), torch.randint(11, shape, dtype=index)
    assert torch.equal(rows.lookup(weight, tokens), F.embedding(tokens, weight))


# ------------------------------------------------------------------------------------------ products


@settings(max_examples=40)
@given(n=st.integers(1, 4), d_in=st.sampled_from([1, 7, 64, 700, 2880]), d_out=st.sampled_from([1, 5, 11]), dtype=dtypes,
       biased=st.booleans())  # fmt: skip
def test_a_product_is_the_linear_layer_rounded_once(n, d_in, d_out, dtype, biased):
    x, weight = torch.randn(n, d_in).to(dtype), torch.randn(d_out, d_in).to(dtype)
    bias = torch.randn(d_out).to(dtype) if biased else None
    ours = rows.product(x, weight, bias)
    assert ours.dtype == dtype
    exact = F.linear(x.double(), weight.double(), bias if bias is None else bias.double())
    assert_rounded(ours, exact, terms=x.double().abs() @ weight.double().abs().T)


@pytest.mark.parametrize("d_out", [16, 19, 25])
def test_programs_of_several_rows_leave_none_out(d_out, monkeypatch):
    monkeypatch.setattr(rows, "blocks", lambda *given: (4, 8, 16))
    x, weight, bias = torch.randn(3, 1, 33), torch.randn(d_out, 33), torch.randn(d_out)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_rounded(rows.product(x, weight, bias), exact, terms=99)


SHAPES = {"qkv": (5120, 2880), "out": (2880, 4096), "unembed": (201088, 2880), "router": (32, 2880)}


def test_a_product_keeps_every_multiprocessor_busy_where_the_weight_is_large_enough():
    for d_out, d_in in SHAPES.values():
        for n in (1, 2, 3, 4):
            for size in (2, 4):
                padded, per_program, columns = rows.blocks(d_out, d_in, n, size)
                assert n <= padded <= 4 and columns * size == rows.WARPS * 32 * 16
                assert padded * per_program * 16 // size <= 64 and (d_out // per_program >= 1024 or per_program == 1)
    assert rows.blocks(*SHAPES["unembed"], 1, 2)[1] == 8 and rows.blocks(*SHAPES["router"], 1, 2)[1] == 1


# ------------------------------------------------------------------------------------------ compiled


# Each target in the numbers that the published weights have; float16 where there is no other choice.
PAIRS = [(75, "fp16"), *((target, "bf16") for target in kernels.TARGETS), (90, "fp32")]


def widest_loads_only(made, narrow: int) -> bool:
    """16 bytes a thread and load, but for `narrow` loads of one number; nothing kept outside the registers."""
    loads = [line for line in made.ptx.splitlines() if "ld.global" in line]
    return sum(".v4.b32" not in line for line in loads) == narrow and not made.spills and made.shared <= 48 * 1024


@pytest.mark.parametrize("target, kind, name, n", [
    *((*pair, name, n) for pair in PAIRS for name, n in (("qkv", 1), ("out", 4))),
    *((*pair, name, 1) for pair in ((75, "fp16"), (90, "bf16")) for name in ("unembed", "router")),
])  # fmt: skip
def test_products_load_16_bytes_at_a_time(target, kind, name, n):
    (d_out, d_in), size = SHAPES[name], 4 if kind == "fp32" else 2
    padded, per_program, columns = rows.blocks(d_out, d_in, n, size)
    types = {arg: f"*{kind}" for arg in ("x", "weight", "bias", "y")} | {"n": "i32", "d_out": "i32"}
    constants = {"d_in": d_in, "N": padded, "ROWS": per_program, "COLUMNS": columns}
    made = kernels.compiled("rows", "product_kernel", target, types, constants, num_warps=rows.WARPS)
    assert widest_loads_only(made, narrow=1)  # the bias
    assert made.ptx.count("fma.rn.f32") == padded * per_program * -(-d_in // columns) * 16 // size


@pytest.mark.parametrize("target, kind", PAIRS)
def test_the_other_kernels_compile_without_spills(target, kind):
    def made(kernel, pointers, constants, warps, **types):
        types |= {arg: f"*{kind}" for arg in pointers.split()}
        return kernels.compiled("rows", kernel, target, types, constants, num_warps=warps)

    row = {"d": 2880, "BLOCK": 4096}
    assert widest_loads_only(made("norm_kernel", "x weight out", row, 8, eps="fp32"), narrow=0)
    experts = 128 if target == 90 else 32
    constants = {"k": 4, "n_experts": experts, "BLOCK": experts}
    assert made("route_kernel", "logits", constants, experts // 32, indices="*i64").spills == 0
    assert widest_loads_only(made("lookup_kernel", "weight out", row, 16, tokens="*i64"), narrow=1)  # the token


@pytest.mark.parametrize("target, kind", PAIRS)
def test_the_rotation_compiles_to_four_products_and_two_sums_none_of_them_fused(target, kind):
    numbers = ("capacity", "n_heads", "n_kv_heads", "cache_batch", "cache_row", "cos_batch")
    types = {arg: f"*{kind}" for arg in ("qkv", "cos", "sin", "q", "k_cache", "v_cache")} | dict.fromkeys(numbers, "i32")
    constants = {"half": 32, "HALF": 32, "narrow": kind}
    made = kernels.compiled("rows", "rotate_into_cache_kernel", target, types | {"position": "*i64"}, constants,
                            num_warps=1, enable_fp_fusion=False)  # fmt: skip
    assert made.spills == 0 and made.registers <= 64
    # sm_80 and sm_89 have no product or sum of bfloat16 but as a fused one, times one or plus zero; fused are four.
    alone = ["fma"] * 6 if kind == "bf16" and target in (80, 89) else ["add", "mul", "mul", "mul", "mul", "sub"]
    assert sorted(re.findall(r"\b(fma|mul|add|sub)\.(?:rn\.)?b?f\d+", made.ptx)) == alone
