"""How much memory is free, how much may be mapped, and room for large values that come and go."""
import math
import mmap
import os
import weakref
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor


def free_bytes(device: torch.device) -> int | None:
    """Memory that is still free there; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as meminfo:
            return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def address_space() -> int | None:
    """Bytes that this process may still map (`ulimit -v`); None where nothing limits it, or the system does not say."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    except (ImportError, OSError):
        return None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - used)


# ------------------------------------------------------------------------------------------ room for what is recorded

SMALL, PAGE = 2**18, 2**21  # bytes that malloc serves well; bytes of a large page
KEPT = 2**28  # bytes of recorded values that are gone, kept for the next ones
_unused: dict[int, list[mmap.mmap]] = {}


def followed() -> bool:
    """Does a compiler, or a transform of torch.func, follow the operations?"""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def large(x: Tensor) -> bool:
    return x.nbytes >= SMALL and x.is_cpu and not followed()


def room(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """like.new_empty(shape), a large one on the CPU in memory that was used before.

    The system makes each page of 4 KiB at its first touch. For recorded values, hundreds of megabytes that come and go
    with each pass, that took as long as computing them. So memory that large ones leave is kept, up to `KEPT` bytes,
    and begins as pages of 2 MiB where the system has them.
    """
    n = like.itemsize * math.prod(shape)
    if n < SMALL or not like.is_cpu or type(like) is not Tensor or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    size = _rounded(n)
    try:
        memory = _taken(size)
    except OSError:  # no room: PyTorch says so in its own words
        return like.new_empty(shape)
    whole = np.frombuffer(memory, np.uint8)
    begin = -whole.ctypes.data % PAGE if size >= PAGE else 0
    mine = whole[begin : begin + n]
    weakref.finalize(mine, _give_back, memory, size).atexit = False
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(torch.from_numpy(mine).untyped_storage(), 0, shape)


def copied(x: Tensor) -> Tensor:
    """x.clone(), contiguous, a large one in such memory."""
    return room(x, x.shape).copy_(x) if large(x) else x.clone(memory_format=torch.contiguous_format)


def _taken(size: int) -> mmap.mmap:
    try:
        return _unused[size].pop()
    except (KeyError, IndexError):
        pass
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if size < PAGE:
        return mmap.mmap(-1, size, flags=private)
    memory = mmap.mmap(-1, size + PAGE, flags=private)
    begin = -np.frombuffer(memory, np.uint8).ctypes.data % PAGE
    with suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE, begin, size // PAGE * PAGE)  # the rest would take a whole one
    return memory


def _rounded(n: int) -> int:
    """By at most a quarter, so that texts of other lengths find memory too."""
    step = 2 ** (n.bit_length() - 3)
    return -(-n // step) * step


def _give_back(memory: mmap.mmap, size: int) -> None:
    """Keep it; what goes beyond `KEPT` goes back to the system, other sizes first. Other threads may do the same."""
    if size > KEPT:
        return
    _unused.setdefault(size, []).append(memory)
    for other in sorted(list(_unused), key=size.__eq__):
        while sum(n * len(several) for n, several in list(_unused.items())) > KEPT:
            try:
                _unused[other].pop(0)
            except IndexError:
                break
