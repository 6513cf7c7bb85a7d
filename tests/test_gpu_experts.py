"""Packed experts on a GPU, in Triton's interpreter: the readable mixture's numbers, and what compilers make of it."""
import copy

import kernels
import pytest
import torch
from kernels import as_on_a_gpu  # noqa: F401
from models import random_model, tiny_config
from torch import Tensor

from gptoss_lab import mxfp4

experts = kernels.interpreted("experts")

PAIRS, ROWS = experts.PAIRS, experts.ROWS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WAYS = ["mix_few", "mix_grouped", "mix_one_by_one"]


@pytest.fixture(autouse=True)
def large_programs(monkeypatch):
    """Fewer than on a GPU: the interpreter is slow."""
    monkeypatch.setattr(experts, "PAIRS", 16)
    monkeypatch.setattr(experts, "ROWS", 16)
    with torch.no_grad():
        yield


def mixture(dtype: torch.dtype, **changes):
    sizes = dict(n_layers=1, d_model=96, d_ff=64, n_experts=4, experts_per_token=2) | changes
    return random_model(tiny_config(**sizes), packed=True).blocks[0].mlp.to(dtype)


def choices(moe, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [n d], of which some reach the clamp; indices and weights [n k]"""
    c, dtype = moe.config, moe.down.bias.dtype
    indices = torch.rand(n, c.n_experts).argsort(-1)[:, : c.experts_per_token]
    return (2 * torch.randn(n, c.d_model)).to(dtype), indices, torch.randn(indices.shape).softmax(-1).to(dtype)


def readable(moe, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return moe.mix(x[None], indices[None], weights[None])[0]


def assert_as_exact(ours: Tensor, moe, x: Tensor, indices: Tensor, weights: Tensor) -> None:
    """float32: what sums lose. 16 bits: no farther from the float64 result than the readable way and a quarter more."""
    exact = readable(copy.deepcopy(moe).double(), x.double(), indices, weights.double())
    far = lambda y: (y.double() - exact).norm() / exact.norm()
    assert ours.dtype == x.dtype and ours.shape == x.shape and ours.isfinite().all()
    if x.dtype == torch.float32:
        assert far(ours) < 1e-6 and ((ours - exact).abs() <= 1e-5 * exact.abs().amax(-1, keepdim=True)).all()
    else:
        assert far(ours) <= 1.25 * far(readable(moe, x, indices, weights)) + torch.finfo(x.dtype).eps / 4


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_under_every_scale_is_unpacked_to_the_bit(dtype):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16).contiguous()
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(experts.unpack(blocks, scales, dtype).view(bits), mxfp4.unpack(blocks, scales, dtype).view(bits))


def test_a_number_of_blocks_that_fills_no_program_is_unpacked():
    blocks, scales = (torch.randint(256, shape, dtype=torch.uint8) for shape in ((3, 45, 16), (3, 45)))
    assert torch.equal(experts.unpack(blocks, scales, torch.float32), mxfp4.unpack(blocks, scales, torch.float32))


# ------------------------------------------------------------------------------------------ mixtures


@pytest.mark.parametrize("n, dtype", zip([1, 2, 3], DTYPES))
@pytest.mark.parametrize("way", WAYS)
def test_a_few_tokens_get_the_readable_mixture(n, way, dtype):
    moe = mixture(dtype)
    given = choices(moe, n)
    assert_as_exact(getattr(experts, way)(moe, *given), moe, *given)


def test_one_token_gets_the_readable_mixture_from_programs_of_the_size_for_gpus(monkeypatch):
    monkeypatch.setattr(experts, "PAIRS", PAIRS)
    monkeypatch.setattr(experts, "ROWS", ROWS)
    moe = mixture(torch.bfloat16)
    given = choices(moe, 1)
    assert_as_exact(experts.mix(moe, *given), moe, *given)


@pytest.mark.parametrize("n, dtype", [(9, torch.float32), (9, torch.bfloat16), (40, torch.float16), (40, torch.bfloat16)])
@pytest.mark.parametrize("way", WAYS[1:])
def test_many_tokens_get_the_readable_mixture(n, way, dtype):
    moe = mixture(dtype)
    given = choices(moe, n)
    assert_as_exact(getattr(experts, way)(moe, *given), moe, *given)


@pytest.mark.parametrize("d, f, k, E", [(32, 96, 3, 5), (160, 32, 1, 3), (64, 32, 4, 4)])
@pytest.mark.parametrize("way", WAYS)
def test_sizes_that_fill_no_block_give_the_readable_mixture(way, d, f, k, E, monkeypatch):
    monkeypatch.setattr(experts, "STEP", 2)  # the reduction goes on over several steps
    moe = mixture(torch.float32, d_model=d, d_ff=f, experts_per_token=k, n_experts=E)
    given = choices(moe, 2)
    assert_as_exact(getattr(experts, way)(moe, *given), moe, *given)


@pytest.mark.parametrize("way", WAYS)
def test_one_expert_for_all_and_none_for_the_others(way):
    moe = mixture(torch.float32, d_model=32, d_ff=32)
    for first, second in ((3, 0), (2, 2)):  # the last and the first, one twice
        x, indices, weights = choices(moe, 3)
        indices = torch.tensor([[first, second]]).repeat(3, 1)
        assert_as_exact(getattr(experts, way)(moe, x, indices, weights), moe, x, indices, weights)


def test_groups_of_every_size_fall_into_tiles():
    """The kernel's layout of tiles, by what it computes: 0, 1, 15, 16, 17 and 33 rows of an expert, tiles of 16."""
    moe = mixture(torch.float32, n_experts=6, experts_per_token=1, d_model=32, d_ff=32)
    indices = torch.arange(6).repeat_interleave(torch.tensor([0, 1, 15, 16, 17, 33]))[torch.randperm(82), None]
    x, weights = torch.randn(82, 32), torch.rand(82, 1)
    assert experts.tile_rows(82, 6) == (16, 4)
    assert_as_exact(experts.mix_grouped(moe, x, indices, weights), moe, x, indices, weights)


@pytest.mark.parametrize("n, rows", [(90, 64), (200, 128)])
def test_experts_with_more_rows_than_a_larger_tile_give_the_readable_mixture(n, rows):
    moe = mixture(torch.float32, n_experts=3, d_model=32, d_ff=32)
    x, _, weights = choices(moe, n)
    indices = torch.tensor([[2, 0]]).repeat(n, 1)
    assert experts.tile_rows(2 * n, 3)[0] == rows
    assert_as_exact(experts.mix_grouped(moe, x, indices, weights), moe, x, indices, weights)


@pytest.mark.parametrize("way", WAYS)
def test_extreme_scales_count_and_make_no_nan(way):
    moe = mixture(torch.float32, d_model=32, d_ff=32)
    x, indices, weights = choices(moe, 2)
    plain = getattr(experts, way)(moe, x, indices, weights)
    moe.gate_up.scales[:, 5], moe.gate_up.blocks[:, 5] = 255, 0  # 0 * 2^128
    moe.gate_up.scales[:, 7], moe.gate_up.scales[:, 8] = 0, 1
    moe.down.scales[:, 3], moe.down.blocks[:, 3] = 254, 0x80  # 0 and -0
    moe.down.scales[:, 4] = 0
    ours = getattr(experts, way)(moe, x, indices, weights)
    assert not torch.equal(ours, plain)
    assert_as_exact(ours, moe, x, indices, weights)


@pytest.mark.parametrize("scale, size, back", [(255, 2.0**-112, 92), (254, 2.0**-111, 92), (1, 2.0**34, 210), (0, 2.0**34, 210)])
@pytest.mark.parametrize("way", WAYS)
def test_the_first_and_the_last_scales_are_exact(way, scale, size, back):
    """Weights of +-2^(scale - 128) with x of about the inverse size, no clamp, and a `down` that scales back."""
    moe = mixture(torch.float32, d_model=32, d_ff=32, swiglu_limit=2.0**30)
    _, indices, weights = choices(moe, 2)
    moe.gate_up.blocks.copy_(torch.tensor([0x11, 0x19, 0x91, 0x99])[torch.randint(4, moe.gate_up.blocks.shape)])
    moe.gate_up.scales[:], moe.down.scales[:] = scale, back
    moe.gate_up.bias[:], moe.down.bias[:] = 0, 0
    x = torch.zeros(2, 32)
    x[:, 3:5] = torch.randint(1, 4, (2, 2)) * size
    exact = readable(copy.deepcopy(moe).double(), x.double(), indices, weights.double())
    ours = getattr(experts, way)(moe, x, indices, weights).double()
    assert exact.abs().max() > 1e-3 and (ours - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("way", WAYS)
def test_nan_and_infinite_rows_stay_what_they_are_and_among_themselves(way):
    moe = mixture(torch.float32, d_model=32, d_ff=32)
    x, indices, weights = choices(moe, 3)
    clean = getattr(experts, way)(moe, x, indices, weights)
    x[1, 4] = torch.nan
    ours = getattr(experts, way)(moe, x, indices, weights)
    assert ours[1].isnan().all() and torch.equal(ours[[0, 2]], clean[[0, 2]])


def test_a_second_run_gives_the_same_bits():
    moe = mixture(torch.bfloat16, d_model=32, d_ff=32)
    few, many = choices(moe, 2), choices(moe, 20)
    assert torch.equal(experts.mix(moe, *few), experts.mix(moe, *few))
    assert torch.equal(experts.mix(moe, *many), experts.mix(moe, *many))


def test_strided_choices_are_read_as_they_are():
    """The router's indices are the first k columns of all that it sorted."""
    moe = mixture(torch.float32, d_model=32, d_ff=32)
    x, indices, weights = choices(moe, 3)
    wide = torch.cat([indices, indices.flip(0)], dim=1)[:, :2]
    assert not wide.is_contiguous()
    for way in WAYS:
        mix = getattr(experts, way)
        assert torch.equal(mix(moe, x, wide, weights), mix(moe, x, indices, weights))


def test_the_way_depends_on_the_tokens_the_numbers_and_the_gpu(monkeypatch):
    taken = []
    for way in WAYS:
        monkeypatch.setattr(experts, way, lambda *given, way=way: taken.append(way))
    for cores, dtype, n in ((True, torch.bfloat16, 8), (True, torch.bfloat16, 9), (True, torch.float32, 64),
                            (True, torch.float32, 65), (False, torch.float16, 64), (False, torch.float16, 65)):  # fmt: skip
        monkeypatch.setattr(experts, "tensor_cores", lambda device, cores=cores: cores)
        experts.mix(None, torch.zeros(n, 32, dtype=dtype), None, None)
    assert taken == ["mix_few", "mix_grouped", "mix_few", "mix_one_by_one", "mix_few", "mix_one_by_one"]


def test_decoding_and_groups_do_not_wait_for_the_gpu(monkeypatch):
    """What waits: reading a value, a shape that depends on values, and bincount, which looks for the largest."""
    moe, launched = mixture(torch.bfloat16), []
    given = choices(moe, 12)
    for kernel in ("few_gate_up", "few_down", "many_gate_up", "many_down"):
        monkeypatch.setattr(experts, kernel, Launches(launched))
    for owner, names in ((Tensor, ("item", "tolist", "__bool__", "__int__", "__index__", "nonzero", "bincount", "unique")),
                         (torch, ("bincount", "nonzero", "unique"))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, lambda *given, **more: pytest.fail("waits for the GPU"))
    experts.mix_few(moe, *given)
    experts.mix_grouped(moe, *given)
    assert launched == [(4, 24), (6, 12), (1, 12 * 2 // 16 + 4), (1, 12 * 2 // 16 + 4)]


class Launches:
    """In a kernel's place: notes the grids."""

    def __init__(self, grids: list):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *given, **more: None


# ------------------------------------------------------------------------------------------ compiled

SHARED = {75: 64, 80: 163, 89: 99, 90: 227}  # KB that a program can have
PUBLISHED = dict(F=2880, D=2880, G=90, S=4, E=32, PE=32)
POINTERS = dict(blocks="*i32", scales="*u8", indices="*i64", order="*i64", ends="*i64")
NUMBERS = dict(k="i32", limit="fp32", alpha="fp32", groups="i32")
ARGUMENTS = {
    "unpack_kernel": "blocks scales out groups BG",
    "few_gate_up": "x indices blocks scales bias post k limit alpha F G BF BG",
    "few_down": "post indices weights blocks scales bias out k D G S BD BG",
    "many_gate_up": "x order ends blocks scales bias post k limit alpha E PE F G BM BF BG",
    "many_down": "post order ends weights blocks scales bias y E PE D G BM BD BG",
}


def built(kernel: str, target: int, dtype: str, num_warps: int, **blocks):
    names = ARGUMENTS[kernel].split()
    types = {name: POINTERS.get(name) or NUMBERS.get(name) or f"*{dtype}" for name in names if name == name.lower()}
    constants = {name: blocks.get(name) or PUBLISHED[name] for name in names if name != name.lower()}
    made = kernels.compiled(kernel=kernel, name="experts", target=target, types=types, constants=constants,
                            num_warps=num_warps)  # fmt: skip
    assert made.shared <= SHARED[target] * 1024 and made.spills in (0, None)
    assert ".ftz" not in "".join(line for line in made.ptx.splitlines() if "fma" in line or "mul" in line)
    return made


FEW = [(75, "fp16"), (80, "bf16"), (89, "bf16"), (90, "bf16")]


@pytest.mark.parametrize("target, dtype", FEW)
def test_decoding_compiles_to_wide_loads_without_spills_and_keeps_subnormal_numbers(target, dtype):
    for made in (built("few_gate_up", target, dtype, 1, BF=PAIRS, BG=experts.STEP),
                 built("few_down", target, dtype, 4, BD=ROWS, BG=experts.STEP)):  # fmt: skip
        assert "ld.global.cg.v4.b32" in made.ptx and made.ptx.count("fma.rn.f32") >= 700 / 2
    built("unpack_kernel", target, dtype, 4, BG=128)


@pytest.mark.parametrize("target, slots", [(80, 8192), (89, 8192), (90, 8192), (90, 2048), (90, 64)])
def test_groups_compile_to_tensor_core_instructions_without_spills(target, slots):
    rows, num_warps = experts.tile_rows(slots, 32)
    blocks = dict(BM=rows, BF=experts.COLUMNS // 2, BD=experts.COLUMNS, BG=experts.DEPTH)
    for kernel in ("many_gate_up", "many_down"):
        made = built(kernel, target, "bf16", num_warps, **blocks)
        assert ("wgmma.mma_async" if target == 90 and rows > 16 else "mma.sync") in made.ptx
