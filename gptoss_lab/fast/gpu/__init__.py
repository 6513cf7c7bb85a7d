"""The same numbers sooner on a GPU, by Triton kernels; each is tested in Triton's interpreter on a CPU.

A kernel is chosen by what the tensors are, never by a setting of the model. Triton is imported when the first tensor
lies on a GPU.
"""
import os
from functools import cache

import torch
from torch import Tensor

FEW = 4  # rows for which the time of a product is that of reading the weight


def reaches(x: Tensor) -> bool:
    """Does a kernel see this memory? They start on the current GPU."""
    return x.is_cuda and x.get_device() == torch.cuda.current_device()


@cache
def installed() -> bool:
    """Is there a Triton to compile with? GPTOSS_LAB_FAST=0 says no."""
    if os.environ.get("GPTOSS_LAB_FAST") == "0":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def serves(*tensors: Tensor) -> bool:
    """All within a kernel's reach, in numbers that kernels take, and neither gradients nor a compiler follow them."""
    if not reaches(tensors[0]) or torch.is_grad_enabled() or torch.compiler.is_compiling() or not installed():
        return False
    narrow = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int32, torch.int64)
    return all(reaches(x) and x.dtype in narrow for x in tensors)


@cache
def tensor_cores(device: torch.device) -> bool:
    """Do Triton's matrix products become tensor-core instructions there? From sm_80 on; on a T4, sm_75, they do not."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
