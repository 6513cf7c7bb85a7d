"""What stands between the large kernels of a step: norms, rotation, routing, lookup, and products for few rows.

In PyTorch each is two to ten operations, or reads a weight at less than the memory's speed. Here each is one launch.
Sums are float32. Nothing waits for the GPU, and what changes from step to step is read from its memory: a CUDA graph
can hold all of it.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gpu

# ------------------------------------------------------------------------------------------ norms


@triton.jit
def norm_kernel(x, weight, out, eps, d: tl.constexpr, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * d
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    row = tl.load(x + begin + columns, mask=inside, other=0).to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.sum(row * row, axis=0) / d + eps)
    gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + begin + columns, (row * scale * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, rounded once.   x [.. d], weight [d] -> [.. d] in `dtype`"""
    d = x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(d)
    warps = min(max(block // 512, 1), 16)  # 16 numbers a thread: two loads of 16 bytes, and the row stays in registers
    norm_kernel[(x.numel() // d,)](x.contiguous(), weight, out, eps, d, block, num_warps=warps)
    return out


# ------------------------------------------------------------------------------------------ rotation


@triton.jit
def turned(first, second, cos, sin, narrow: tl.constexpr):
    """rope.rotate of two halves: products and sums float32, each rounded to `narrow` as PyTorch's operations do."""
    first, second, cos, sin = first.to(tl.float32), second.to(tl.float32), cos.to(tl.float32), sin.to(tl.float32)
    ac, bs = (first * cos).to(narrow).to(tl.float32), (second * sin).to(narrow).to(tl.float32)
    bc, as_ = (second * cos).to(narrow).to(tl.float32), (first * sin).to(narrow).to(tl.float32)
    return (ac - bs).to(narrow), (bc + as_).to(narrow)


@triton.jit
def rotate_into_cache_kernel(
    qkv, cos, sin, q, k_cache, v_cache, position, capacity, n_heads, n_kv_heads, cache_batch, cache_row, cos_batch,
    half: tl.constexpr, HALF: tl.constexpr, narrow: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    planes = tl.arange(0, HALF)
    inside = planes < half
    qkv += (batch * (n_heads + 2 * n_kv_heads) + head) * (2 * half) + planes
    first, second = tl.load(qkv, mask=inside), tl.load(qkv + half, mask=inside)
    slot = batch * cache_batch + tl.load(position).to(tl.int32) % capacity * cache_row.to(tl.int64) + planes
    if head >= n_heads + n_kv_heads:
        v = v_cache + slot + (head - n_heads - n_kv_heads) * (2 * half)
        tl.store(v, first, mask=inside)
        tl.store(v + half, second, mask=inside)
    else:
        angle = batch * cos_batch + planes
        cosine, sine = tl.load(cos + angle, mask=inside), tl.load(sin + angle, mask=inside)
        first, second = turned(first, second, cosine, sine, narrow)
        if head < n_heads:
            out = q + (batch * n_heads + head) * (2 * half) + planes
            tl.store(out, first.to(q.dtype.element_ty), mask=inside)
            tl.store(out + half, second.to(q.dtype.element_ty), mask=inside)
        else:
            k = k_cache + slot + (head - n_heads) * (2 * half)
            tl.store(k, first.to(k_cache.dtype.element_ty), mask=inside)
            tl.store(k + half, second.to(k_cache.dtype.element_ty), mask=inside)


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def rotate_into_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor
) -> Tensor:  # fmt: skip
    """One new token a sequence: queries and keys turned as by rope.rotate, keys and values written into their slot.

    qkv [b H+2K h], its last two axes joined or not; cos and sin [1 h/2] or [b 1 h/2]; caches [b C K h] in qkv's dtype;
    position [1] int64: the token's column, written to slot position mod C   -> q [b H h]

    Bit for bit: every product and sum is rounded where PyTorch rounds it, so the compiler may not fuse a product and
    a sum.
    """
    b, capacity, n_kv_heads, h = k_cache.shape
    heads = qkv.numel() // (b * h)
    n_heads = heads - 2 * n_kv_heads
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    assert qkv.dtype == k_cache.dtype == v_cache.dtype
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[2:] == (h, 1)
    q = torch.empty(b, n_heads, h, dtype=qkv.dtype, device=qkv.device)
    narrow = TYPES[torch.promote_types(qkv.dtype, cos.dtype)]  # in which PyTorch multiplies them
    # A warp a head: 80 small programs end sooner than few large ones.
    rotate_into_cache_kernel[(heads, b)](
        qkv, cos, sin, q, k_cache, v_cache, position, capacity, n_heads, n_kv_heads, *k_cache.stride()[:2],
        cos.stride(0) if cos.dim() == 3 else 0, h // 2, triton.next_power_of_2(h // 2), narrow, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return q


# ------------------------------------------------------------------------------------------ routing


@triton.jit
def route_kernel(logits, indices, k: tl.constexpr, n_experts: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_experts
    expert = tl.arange(0, BLOCK)
    x = tl.load(logits + expert, mask=expert < n_experts, other=-float("inf")).to(tl.float32)
    # Nothing is sorted: a logit's place is the number of those that come before it. Before the padding come all.
    place = tl.zeros([BLOCK], tl.int32)
    for other in tl.static_range(n_experts):
        y = tl.broadcast_to(tl.load(logits + other).to(tl.float32), [BLOCK])
        larger = (y > x) | ((y != y) & (x == x))
        equal = (y == x) | ((y != y) & (x != x))
        place += (larger | (equal & (other < expert))).to(tl.int32)
    tl.store(indices + row * k + place, expert.to(tl.int64), mask=place < k)


def route(logits: Tensor, k: int) -> Tensor:
    """The experts with the k largest logits, falling, of equal ones the first, as model.route.   [.. E] -> [.. k] int64

    NaN counts as the largest. E may be at most 128: every logit is compared with every other.
    """
    n_experts = logits.shape[-1]
    assert k <= n_experts <= 128
    indices = torch.empty((*logits.shape[:-1], k), dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(n_experts)
    warps = max(block // 32, 1)  # a thread an expert
    route_kernel[(logits.numel() // n_experts,)](logits.contiguous(), indices, k, n_experts, block, num_warps=warps)
    return indices


# ------------------------------------------------------------------------------------------ lookup


@triton.jit
def lookup_kernel(weight, tokens, out, d: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    row = tl.load(weight + tl.load(tokens + at).to(tl.int64) * d + columns, mask=inside)
    tl.store(out + at * d + columns, row, mask=inside)


def lookup(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows of an embedding, which may lie in pinned memory of the host.   weight [V d], tokens [..] -> [.. d]

    The kernel reads the host's memory itself, 5.8 KB a token at the published width: Triton's launcher asks CUDA for
    the device's address of a pointer (cuPointerGetAttribute) and refuses only what has none, a tensor not pinned. The
    result lies where `tokens` lie.
    """
    d = weight.shape[1]
    assert weight.is_contiguous()
    out = torch.empty(*tokens.shape, d, dtype=weight.dtype, device=tokens.device)
    block = triton.next_power_of_2(d)
    warps = min(max(block // 256, 1), 16)  # every thread one load of 16 bytes: the whole row is asked for at once
    lookup_kernel[(tokens.numel(),)](weight, tokens.contiguous(), out, d, block, num_warps=warps)
    return out


# ------------------------------------------------------------------------------------------ products


@triton.jit
def product_kernel(
    x, weight, bias, y, n, d_out,
    d_in: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    weight += first * d_in  # 64 bits once: inside a program 32 do
    rows, tokens, columns = tl.arange(0, ROWS), tl.arange(0, N), tl.arange(0, COLUMNS)
    real, ours = tokens < n, first + rows < d_out
    total = tl.zeros([N, ROWS, COLUMNS], tl.float32)
    for at in tl.static_range(0, d_in, COLUMNS):
        inside = at + columns < d_in
        w = tl.load(
            weight + rows[:, None] * d_in + (at + columns)[None, :], mask=ours[:, None] & inside[None, :], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        a = tl.load(
            x + tokens[:, None] * d_in + (at + columns)[None, :], mask=real[:, None] & inside[None, :], other=0
        )  # fmt: skip
        total += a.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    out = tl.sum(total, axis=2)
    if bias is not None:
        out += tl.load(bias + first + rows, mask=ours, other=0).to(tl.float32)[None, :]
    tl.store(y + tokens[:, None] * d_out + (first + rows)[None, :], out.to(y.dtype.element_ty),
             mask=real[:, None] & ours[None, :])  # fmt: skip


WARPS = 4


def blocks(d_out: int, d_in: int, n: int, size: int) -> tuple[int, int, int]:
    """Rows of x, rows and columns of the weight that a program multiplies at a time; `size` bytes a number."""
    n, numbers = triton.next_power_of_2(n), 16 // size
    # The threads lie along the columns, each with one load of 16 bytes of every row: the numbers of x that a thread
    # holds serve all its rows.
    columns = min(WARPS * 32 * numbers, triton.next_power_of_2(d_in))
    # More rows use x more often, and cost registers: n * rows * numbers sums, 64 at most. At least 1024 programs, 8 for
    # each of an H200's 132 multiprocessors, so that none is idle long while the last ones end.
    rows = max(numbers // n, 1)
    while rows > 1 and d_out // rows < 1024:
        rows //= 2
    return n, rows, columns


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias).   x [.. in] of at most 4 rows, weight [out in] -> [.. out]

    Sums and bias float32, rounded once, to the weight's dtype.
    """
    d_out, d_in = weight.shape
    rows = x.numel() // d_in
    assert rows <= gpu.FEW and weight.is_contiguous()
    y = torch.empty(*x.shape[:-1], d_out, dtype=weight.dtype, device=x.device)
    n, per_program, columns = blocks(d_out, d_in, rows, weight.element_size())
    product_kernel[(triton.cdiv(d_out, per_program),)](
        x.contiguous(), weight, bias, y, rows, d_out, d_in, n, per_program, columns, num_warps=WARPS
    )  # fmt: skip
    return y
