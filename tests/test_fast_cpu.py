"""Products with packed and bfloat16 weights on the CPU are those of the unpacked numbers, on every instruction set."""
import ctypes
import platform
import shutil
import subprocess

import pytest
import torch
from models import random_model, tiny_config

from gptoss_lab import fast, mxfp4
from gptoss_lab.fast import cpu

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
def test_every_byte_at_every_scale_is_the_number_that_mxfp4_unpacks(built):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, -1, -1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 16).contiguous()
    ours, theirs = cpu.unpack(blocks, scales), mxfp4.unpack(blocks, scales, torch.float32)
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
def test_in_bfloat16_it_is_nearer_to_the_exact_numbers_than_the_readable_way(built):
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
