"""Triton kernels without a GPU: run in Triton's interpreter, or compiled for a GPU that is not there.

Triton decides when it is imported whether kernels are interpreted: here they are (conftest.py sets TRITON_INTERPRET),
and a process of its own compiles.
"""
import importlib
import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch

TARGETS = (75, 80, 89, 90)  # T4, A100, RTX 4090 and L4, H100 and H200


def interpreted(name: str):
    """The module gptoss_lab.fast.gpu.`name`, its kernels run by the interpreter on CPU tensors. Skips without triton."""
    pytest.importorskip("triton", reason="triton is not installed: kernels cannot be run")
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before the tests, as tests/conftest.py does"
    return importlib.import_module(f"gptoss_lab.fast.gpu.{name}")


@pytest.fixture(autouse=True, scope="module")
def as_on_a_gpu():
    """In a module that imports this: bfloat16 in the interpreter as in compiled kernels.

    Its own conversions cut off what does not fit instead of rounding to even, and lose subnormal numbers; its tl.dot
    multiplies the raw bits.
    """
    pytest.importorskip("triton", reason="triton is not installed: kernels cannot be run")
    from triton.runtime import interpreter

    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder
    dot, wide = builder.create_dot, lambda x: torch.tensor(x).view(torch.bfloat16).float().numpy()

    def converted(x, source, target, mode):
        match str(source), str(target):
            case "fp32", "bf16":
                return torch.tensor(x).bfloat16().view(torch.uint16).numpy()
            case "bf16", "fp32":
                return wide(x)
        return convert(x, source, target, mode)

    def multiplied(self, a, b, d, *others):
        if str(a.dtype.scalar) == "bf16":
            a, b = (interpreter.TensorHandle(wide(x.data), d.dtype.scalar) for x in (a, b))
        return dot(self, a, b, d, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", converted)
        patch.setattr(builder, "create_dot", multiplied)
        yield


@contextmanager
def within_reach():
    """Inside, kernels take CPU tensors too: what runs on a GPU runs here in the interpreter."""
    from gptoss_lab.fast import gpu

    before, gpu.reaches = gpu.reaches, lambda x: True
    try:
        yield
    finally:
        gpu.reaches = before


@cache
def _compiler() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _not_interpreted)


def _not_interpreted() -> None:
    os.environ["TRITON_INTERPRET"] = "0"


def compiled(name: str, kernel: str, target: int, types: dict[str, str], constants: dict, **options):
    """One kernel of gptoss_lab.fast.gpu.`name`, compiled for sm_`target` with its pointers at multiples of 16 bytes.

    types: argument -> "*bf16", "i32", ...; constants: argument -> value; triton's own dtypes as their names, "bf16";
    options: num_warps and the others that a launch takes.
    Returns `.ptx` (the instructions), `.shared` (bytes of shared memory), `.registers` and `.spills` (None where
    ptxas does not say).
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: kernels cannot be compiled")
    return _compiler().submit(_compile, name, kernel, target, types, constants, options).result()


def _compile(name, kernel, target, types, constants, options) -> SimpleNamespace:
    import re
    import subprocess
    import tempfile

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert not triton.knobs.runtime.interpret
    dtypes = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    function = getattr(importlib.import_module(f"gptoss_lab.fast.gpu.{name}"), kernel)
    signature = {arg: types.get(arg, "constexpr") for arg in function.arg_names}
    at = {arg: (i,) for i, arg in enumerate(function.arg_names)}
    aligned = {at[arg]: [["tt.divisibility", 16]] for arg, type_ in types.items() if type_.startswith("*")}
    values = {at[arg]: dtypes.get(value, value) if isinstance(value, str) else value for arg, value in constants.items()}
    made = triton.compile(ASTSource(function, signature, values, aligned), target=GPUTarget("cuda", target, 32),
                          options=options)  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        ptxas = triton.knobs.nvidia.ptxas.path
        said = subprocess.run([ptxas, "-v", f"--gpu-name=sm_{target}{'a' if target == 90 else ''}", file.name, "-o", "/dev/null"],
                              capture_output=True, text=True).stderr  # fmt: skip
    number = lambda pattern: int(found[1]) if (found := re.search(pattern, said)) else None
    return SimpleNamespace(ptx=made.asm["ptx"], shared=made.metadata.shared, registers=number(r"Used (\d+) registers"),
                           spills=number(r"(\d+) bytes spill stores"))  # fmt: skip
