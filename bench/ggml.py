"""ggml's product of a packed expert and a vector, on one thread: llama.cpp's, from the library in llama-cpp-python.

ggml rounds the vector to 8-bit numbers, 32 to a scale; gptoss_lab does not. A block is 17 bytes there: the scale, then
16 bytes whose low four bits are numbers 0 to 15 and whose high four are 16 to 31 (ggml/src/ggml-quants.c).
"""
import ctypes
import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

PEER, MEASURED = "llama-cpp-python", "0.3.36"
F32, I32, MXFP4 = 0, 26, 39  # enum ggml_type, ggml/include/ggml.h


def missing() -> str | None:
    """Why ggml is left out; None where it is here."""
    try:
        version(PEER)
    except PackageNotFoundError:
        return f"{PEER} is not installed: left out (measured with {PEER}=={MEASURED})"
    return None if _found("ggml-cpu") else f"{PEER} brings no libggml-cpu of its own: left out"


def _found(name: str) -> Path | None:
    [folder] = importlib.util.find_spec("llama_cpp").submodule_search_locations
    return min(Path(folder, "lib").glob(f"lib{name}.*"), default=None)


class _Settings(ctypes.Structure):
    _fields_ = [("n_bytes", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@cache
def _library() -> dict:
    """The functions of ggml that are needed here, by name without `ggml_`."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    signatures = {
        "init": (pointer, _Settings), "tensor_overhead": (size,), "graph_overhead": (size,), "nbytes": (size, pointer),
        "new_tensor_3d": (pointer, pointer, ctypes.c_int, number, number, number),
        "new_tensor_2d": (pointer, pointer, ctypes.c_int, number, number),
        "mul_mat_id": (pointer, pointer, pointer, pointer, pointer), "new_graph": (pointer, pointer),
        "build_forward_expand": (None, pointer, pointer),
        "backend_alloc_ctx_tensors_from_buft": (pointer, pointer, pointer), "backend_cpu_buffer_type": (pointer,),
        "backend_tensor_set": (None, pointer, pointer, size, size),
        "backend_tensor_get": (None, pointer, pointer, size, size), "backend_cpu_init": (pointer,),
        "backend_cpu_set_n_threads": (None, pointer, ctypes.c_int), "backend_cpu_reg": (pointer,),
        "backend_graph_compute": (ctypes.c_int, pointer, pointer),
        "backend_reg_dev_get": (pointer, pointer, size), "backend_buft_name": (ctypes.c_char_p, pointer),
        "backend_reg_get_proc_address": (pointer, pointer, ctypes.c_char_p),
    }  # fmt: skip
    libraries = [ctypes.CDLL(str(_found(name)), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")]
    found = {}
    for name, (result, *arguments) in signatures.items():
        owner = next(library for library in libraries if hasattr(library, f"ggml_{name}"))
        function = getattr(owner, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return found


def _repacking() -> int | None:
    """The buffer type in which ggml stores rows of a matrix side by side, as llama.cpp does where it can."""
    g = _library()
    registry = g["backend_cpu_reg"]()
    address = g["backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
    types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
    for one in types(g["backend_reg_dev_get"](registry, 0)):
        if one is None or g["backend_buft_name"](one) == b"CPU_REPACK":
            return one


def blocks_of(blocks: Tensor, scales: Tensor) -> Tensor:
    """ggml's blocks with the same numbers.   blocks [.. g 16], scales [.. g] -> [.. g 17] uint8"""
    low, high = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).chunk(2, dim=-1)
    return torch.cat([scales.unsqueeze(-1), low | high << 4], dim=-1)


class Matrices:
    """The packed matrices of a layer's experts in ggml's memory: `matrices(expert, x)` is a product with one of them.

    Args:
        blocks: [E out in/32 16], as the checkpoint has them.
        scales: [E out in/32].
        repacked: stored as llama.cpp stores them where the processor has a kernel for that: rows side by side.

    Raises:
        RuntimeError: ggml has no room, or no such storage.
    """

    def __init__(self, blocks: Tensor, scales: Tensor, repacked: bool = False):
        n_experts, self.d_out, groups, _ = blocks.shape
        self.d_in = 32 * groups
        g = self._g = _library()
        where = _repacking() if repacked else g["backend_cpu_buffer_type"]()
        if where is None:
            raise RuntimeError("this ggml has no repacked matrices")
        weights, inputs = (g["init"](_Settings(16 * g["tensor_overhead"]() + g["graph_overhead"](), None, True))
                           for _ in range(2))  # fmt: skip
        matrices = g["new_tensor_3d"](weights, MXFP4, self.d_in, self.d_out, n_experts)
        self._x = g["new_tensor_3d"](inputs, F32, self.d_in, 1, 1)
        self._expert = g["new_tensor_2d"](inputs, I32, 1, 1)
        self._y = g["mul_mat_id"](inputs, matrices, self._x, self._expert)
        self._graph = g["new_graph"](inputs)
        g["build_forward_expand"](self._graph, self._y)
        for context, buffer in (weights, where), (inputs, g["backend_cpu_buffer_type"]()):
            if not g["backend_alloc_ctx_tensors_from_buft"](context, buffer):
                raise RuntimeError("ggml could not allocate its tensors")
        packed = torch.empty(n_experts, self.d_out, groups, 17, dtype=torch.uint8)
        for expert in range(n_experts):
            packed[expert] = blocks_of(blocks[expert], scales[expert])
        assert packed.nbytes == g["nbytes"](matrices)
        g["backend_tensor_set"](matrices, packed.data_ptr(), 0, packed.nbytes)
        self._backend = g["backend_cpu_init"]()
        g["backend_cpu_set_n_threads"](self._backend, 1)

    def __call__(self, expert: int, x: Tensor) -> Tensor:
        """x [in] float32 -> [out] float32"""
        index, y = ctypes.c_int32(expert), torch.empty(self.d_out)
        self._g["backend_tensor_set"](self._x, x.data_ptr(), 0, 4 * self.d_in)
        self._g["backend_tensor_set"](self._expert, ctypes.addressof(index), 0, 4)
        if self._g["backend_graph_compute"](self._backend, self._graph) != 0:
            raise RuntimeError("ggml could not compute the product")
        self._g["backend_tensor_get"](self._y, y.data_ptr(), 0, y.nbytes)
        return y
