"""Products with packed and bfloat16 weights, and few rows in float32, on the CPU, from cpu.cpp: compiled at first use,
once a machine.

Where no C++ compiler is found, or GPTOSS_LAB_FAST=0, there is nothing here and the readable way is taken.
"""
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")


def folder() -> Path:
    """Where the compiled library is kept: GPTOSS_LAB_CACHE, or gptoss_lab in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GPTOSS_LAB_CACHE") or Path(base) / "gptoss_lab")


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be had."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None or os.environ.get("GPTOSS_LAB_FAST") == "0" or sys.platform == "win32":
        return None
    for native in (["-march=native"], []):
        for openmp in _openmp():
            if (path := _built(compiler, native, openmp)) is not None:
                try:
                    return ctypes.CDLL(str(path))
                except OSError:  # a library that it wants is not there
                    continue
    return None


def _openmp() -> list[list[str]]:
    """To compile with, and to link: torch's own OpenMP, so that no second pool of threads competes; else none."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [*(["-fopenmp", str(one)] for one in own), ["-fopenmp", "-fopenmp"], []]


def _built(compiler: str, native: list[str], openmp: list[str]) -> Path | None:
    """The library for these flags, made where it is not there; None where the compiler cannot."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30).stdout
        key = "\n".join([SOURCE.read_text("utf-8"), version, _processor(), *native, *openmp])
        path = folder() / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        part, loose = (path.with_suffix(f".{os.getpid()}.{end}") for end in ("part", "o"))
        steps = ([compiler, "-O3", "-std=c++17", "-fPIC", *native, *openmp[:1], "-c", str(SOURCE), "-o", str(loose)],
                 [compiler, "-shared", str(loose), *openmp[1:], "-o", str(part)])  # fmt: skip
        try:
            for step in steps:
                subprocess.run(step, capture_output=True, timeout=120, check=True)
            return part.replace(path)
        finally:
            part.unlink(missing_ok=True)
            loose.unlink(missing_ok=True)
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        import platform

        return platform.processor()


def serves(*tensors: Tensor) -> bool:
    """Are all on the CPU, whole, and is there a library?"""
    return all(x.device.type == "cpu" and x.is_contiguous() for x in tensors) and compiled() is not None


def _at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def multiply(blocks: Tensor, scales: Tensor, experts: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """Vector rows[i] of x through the packed matrix of experts[i].

    blocks [E out g 16], scales [E out g], experts and rows [n] int64, x [m g*32] -> [n out] float32
    """
    _, d_out, groups, _ = blocks.shape
    split = x.float().unflatten(-1, (-1, 2)).transpose(-1, -2).contiguous()  # evens, then odds
    y = torch.empty(len(experts), d_out)
    experts, rows = experts.contiguous(), rows.contiguous()
    compiled().mxfp4_multiply(_at(blocks), _at(scales), _at(experts), _at(rows), _at(split), _at(y),
                             ctypes.c_int64(len(experts)), ctypes.c_int64(d_out), ctypes.c_int64(groups),
                             torch.get_num_threads())  # fmt: skip
    return y


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """mxfp4.unpack to float32 or bfloat16.   blocks [... g 16], scales [... g] -> [... g*32]"""
    out = torch.empty(*scales.shape, 32, dtype=dtype)
    run = {torch.float32: compiled().mxfp4_unpack, torch.bfloat16: compiled().mxfp4_unpack_bf16}[dtype]
    run(_at(blocks), _at(scales), _at(out), ctypes.c_int64(scales.numel()), torch.get_num_threads())
    return out.flatten(-2)


def bf16_is_quick() -> bool:
    """Does the processor multiply bfloat16? Many rows are then quicker in it than in float32."""
    return bool(compiled().bf16_is_quick())


def bf16_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [n in] through a bfloat16 weight [out in], summed in float32.   -> [n out] float32"""
    x = x.float().contiguous()
    y = torch.empty(len(x), len(weight))
    compiled().bf16_multiply(_at(weight), _at(x), _at(y), ctypes.c_int64(len(x)), ctypes.c_int64(len(weight)),
                            ctypes.c_int64(weight.shape[1]), torch.get_num_threads())  # fmt: skip
    return y


# ------------------------------------------------------------------------------------------ few rows in float32


def _call(name: str, *given: Tensor | int | float | None) -> int:
    """A function of cpu.cpp, on as many threads as PyTorch uses."""
    function = getattr(compiled(), name)
    if function.argtypes is None:
        kinds = {int: ctypes.c_int64, float: ctypes.c_float}
        function.argtypes = [*(kinds.get(type(x), ctypes.c_void_p) for x in given), ctypes.c_int64]
    return function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in given], torch.get_num_threads())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear.   x [.. in], weight [out in] -> [.. out]"""
    d_out, d_in = weight.shape
    y = x.new_empty(*x.shape[:-1], d_out)
    _call("linear", x, weight, bias, y, x.numel() // d_in, d_in, d_out)
    return y


def norm(x: Tensor, weight: Tensor, eps: float, rms: Tensor | None = None, normalized: Tensor | None = None) -> Tensor:
    """x / rms(x) * weight; rms [.. 1] and x / rms [.. d] are filled where they are given.   [.. d] -> [.. d]"""
    y = x.new_empty(x.shape)
    _call("norm", x, weight, y, rms, normalized, x.numel() // x.shape[-1], x.shape[-1], eps)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.rotate.   x [b s H h], whose heads lie side by side; cos and sin [(b) s h/2] -> [b s H h]"""
    y = x.new_empty(x.shape)
    _call("rotate", x, cos, sin, y, *x.shape, x.stride(0), x.stride(1), cos.stride(0) if cos.dim() == 3 else 0)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, query: Tensor, key: Tensor, window: int | None,
           scores: Tensor | None = None, pattern: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with a sink, by the positions of kv_cache.Visible; scores and pattern are filled where they are given.

    q [b s H h], k and v [b t K h], sinks [b H s], query [s] or [b s], key [t] or [b t], scores and pattern [b H s t]
    -> z [b s H h], sink_mass [b H s]
    """
    (b, s, n_heads, h), (t, n_kv_heads) = q.shape, k.shape[1:3]
    z, sink_mass = q.new_empty(q.shape), q.new_empty(b, n_heads, s)
    rows = [s if query.dim() == 2 else 0, t if key.dim() == 2 else 0]
    _call("attend", q, k, v, sinks, query, key, z, sink_mass, scores, pattern, b, s, t, n_heads, n_kv_heads, h,
          *k.stride()[:2], *v.stride()[:2], *rows, 2**62 if window is None else window)  # fmt: skip
    return z, sink_mass


def top(x: Tensor, k: int) -> Tensor:
    """Where the k largest numbers of each row are, falling; of equal ones the first.   [.. E] -> [.. k]"""
    places = torch.empty(*x.shape[:-1], k, dtype=torch.int64)
    _call("top", x, places, x.numel() // x.shape[-1], x.shape[-1], k)
    return places


def swiglu(x: Tensor, limit: float, alpha: float, place: Tensor | None = None, parts=(None,) * 5) -> Tensor:
    """fast.swiglu. In `parts`, ordered as MoE.inner_points, row place[i] becomes what row i came from, and what it is.

    x [n 2f], place [n], parts [* f] -> [n f]
    """
    n, width = x.shape
    y = x.new_empty(n, width // 2)
    _call("swiglu", x, y, place, *parts, n, width // 2, float(limit), float(alpha))
    return y


def add_rows(y: Tensor, place: Tensor, weights: Tensor, out: Tensor, outs: Tensor | None) -> None:
    """Row place[i] // k of out grows by weights.flatten()[place[i]] * y[i]; row place[i] of outs becomes y[i].

    y [m d], place [m], weights [n k], out [n d], outs [n k d]
    """
    _call("add_rows", y, place, weights, out, outs, *place.shape, weights.shape[-1], y.shape[-1])


def mix(moe, x: Tensor, experts: Tensor, weights: Tensor, parts=(None,) * 6) -> Tensor:
    """fast.mix. `parts`, in the order of MoE.inner_points, are filled where they are given.

    x [b s d], experts and weights [b s k], parts [b s k f], the last [b s k d] -> [b s d]
    """
    k, (n_experts, d, f), c, y = experts.shape[-1], moe.down.weight.shape, moe.config, x.new_empty(x.shape)
    up, down = moe.gate_up, moe.down
    if not _call("mix", x, experts, weights, up.weight, up.bias, down.weight, down.bias, y, *parts, x.numel() // d, k,
                 n_experts, d, f, float(c.swiglu_limit), float(c.swiglu_alpha)):  # fmt: skip
        raise IndexError(f"experts {experts.min()} to {experts.max()} are asked for, there are 0 to {n_experts - 1}")
    return y
