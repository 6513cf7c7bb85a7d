"""Mixture of experts on weights that stay packed in MXFP4: for few tokens as matrix times vector, for many by groups.

A word of 32 bits holds the numbers of eight neighbouring columns, the first in its low bits: `blocks` seen as int32 is
[E out in/32 4], and one thread loads the 16 bytes of a block at once.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import swiglu
from . import tensor_cores

# ------------------------------------------------------------------------------------------ numbers


@triton.jit
def number(words, j: tl.constexpr):
    """Number j of each word, times 2^-126, exact, in float32.

    E2M1 lies inside float32: the sign in bit 31, the other three in bits 24 to 22, the low end of the exponent and the
    high end of the mantissa. There too 0 and 0.5 are subnormal. No flag of these kernels flushes subnormals to zero.
    """
    bits = ((words << (28 - 4 * j)) >> 6) & -0x7E400000  # 0x81C00000; the shift to the right repeats the sign
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def half(scales):
    """2^(scale - 128), finite for all 256 bytes, in float32: an exponent, and for bytes 0 and 1 a subnormal number."""
    s = scales.to(tl.int32)
    return tl.maximum((s - 1) * 0x800000, (s + 1) * 0x200000).to(tl.float32, bitcast=True)


@triton.jit
def scaled(words, j: tl.constexpr, scale, dtype: tl.constexpr):
    """2^127 first: with 2^-126 half a small scale would be lost, and twice a large one infinite."""
    return (number(words, j) * 1.7014118346046923e38 * scale).to(dtype)


@triton.jit
def numbers(words, scales, dtype: tl.constexpr):
    """Unpacked.   words [.. g 4] int32, scales [.. g] -> [.. g 4 2 2 2], the last three axes the eight of a word"""
    scale = tl.expand_dims(half(scales), len(scales.shape))
    # The axis of the first join is the slowest of the three, so numbers j and j + 4 meet first.
    a = tl.join(scaled(words, 0, scale, dtype), scaled(words, 4, scale, dtype))
    b = tl.join(scaled(words, 1, scale, dtype), scaled(words, 5, scale, dtype))
    c = tl.join(scaled(words, 2, scale, dtype), scaled(words, 6, scale, dtype))
    d = tl.join(scaled(words, 3, scale, dtype), scaled(words, 7, scale, dtype))
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def unpack_kernel(blocks, scales, out, groups, BG: tl.constexpr):
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    word = g[:, None] * 4 + tl.arange(0, 4)
    w = tl.load(blocks + word, mask=g[:, None] < groups, other=0)
    s = tl.load(scales + g, mask=g < groups, other=0)
    values = tl.reshape(numbers(w, s, out.dtype.element_ty), [BG, 32])
    tl.store(out + g[:, None] * 32 + tl.arange(0, 32), values, mask=g[:, None] < groups)


# ------------------------------------------------------------------------------------------ few tokens


@triton.jit
def activation(gate, linear, limit, alpha):
    gate = tl.where(gate > limit, limit, gate)  # nan stays nan
    linear = tl.where(linear > limit, limit, tl.where(linear < -limit, -limit, linear))
    return gate / (1 + tl.exp(-alpha * gate)) * (linear + 1)


@triton.jit
def rows_times_vectors(blocks, scales, x, experts, some, rows, N: tl.constexpr, G: tl.constexpr, BG: tl.constexpr):
    """Row rows[r] of matrix experts[s] times vector x[s], for the slots in `some`, eight multiplications a word.

    blocks [E N G 4] words, scales [E N G], x [S] a pointer to each vector, experts [S] int64, some [S], rows [R]
    -> [R S] float32
    """
    row = experts[None, :] * N + rows[:, None]
    valid = some[None, :] & (rows[:, None] < N)
    acc = tl.zeros([rows.shape[0], experts.shape[0], BG], tl.float32)
    for first in tl.static_range(0, G, BG):
        g = first + tl.arange(0, BG)
        mask = valid[:, :, None] & (g < G)
        at = row[:, :, None] * G + g
        w = tl.load(blocks + (at[:, :, :, None] * 4 + tl.arange(0, 4)), mask=mask[:, :, :, None], other=0,
                    cache_modifier=".cg")  # fmt: skip
        s = tl.load(scales + at, mask=mask, other=0)
        column = g[:, None, None] * 32 + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)
        seen = some[:, None, None, None] & (g < G)[:, None, None]
        xs = tl.load(x[:, None, None, None] + column, mask=seen, other=0).to(tl.float32) * 1.2379400392853803e27  # 2^90
        even, odd = tl.split(tl.reshape(xs, [xs.shape[0], BG, 4, 2, 2, 2]))
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        p = number(w, 0) * x0[None]
        p = number(w, 1) * x1[None] + p
        p = number(w, 2) * x2[None] + p
        p = number(w, 3) * x3[None] + p
        p = number(w, 4) * x4[None] + p
        p = number(w, 5) * x5[None] + p
        p = number(w, 6) * x6[None] + p
        p = number(w, 7) * x7[None] + p
        acc += tl.sum(p, 3) * 137438953472.0 * half(s)  # 2^37
    return tl.sum(acc, 2)


@triton.jit
def few_gate_up(x, indices, blocks, scales, bias, post, k, limit, alpha,
                F: tl.constexpr, G: tl.constexpr, BF: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    slot = tl.program_id(1)
    expert = tl.load(indices + slot + tl.arange(0, 1))
    some = tl.full([1], True, tl.int1)
    rows = tl.program_id(0) * (2 * BF) + tl.arange(0, 2 * BF)
    vector = x + (slot // k).to(tl.int64) * (G * 32) + tl.arange(0, 1)
    h = tl.reshape(rows_times_vectors(blocks, scales, vector, expert, some, rows, 2 * F, G, BG), [2 * BF])
    h += tl.load(bias + expert * (2 * F) + rows, mask=rows < 2 * F, other=0).to(tl.float32)
    gate, linear = tl.split(tl.reshape(h, [BF, 2]))
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    y = activation(gate, linear, limit, alpha).to(post.dtype.element_ty)
    tl.store(post + slot.to(tl.int64) * F + f, y, mask=f < F)


@triton.jit
def few_down(post, indices, weights, blocks, scales, bias, out, k,
             D: tl.constexpr, G: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    token = tl.program_id(1)
    s = tl.arange(0, S)
    slot = token * k + s
    expert = tl.load(indices + slot, mask=s < k, other=0)
    weight = tl.load(weights + slot, mask=s < k, other=0).to(tl.float32)
    rows = tl.program_id(0) * BD + tl.arange(0, BD)
    y = rows_times_vectors(blocks, scales, post + slot.to(tl.int64) * (G * 32), expert, s < k, rows, D, G, BG)
    valid = (rows < D)[:, None] & (s < k)
    y += tl.load(bias + expert * D + rows[:, None], mask=valid, other=0).to(tl.float32)
    y = tl.sum(y * weight, 1).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * D + rows, y, mask=rows < D)


# ------------------------------------------------------------------------------------------ many tokens


@triton.jit
def tile(ends, t, E: tl.constexpr, PE: tl.constexpr, BM: tl.constexpr):
    """The t-th tile of at most BM slots of one expert.   ends [E]: where each expert's slots end, sorted by expert

    -> expert (E when there are fewer tiles), first slot, end of the expert's slots
    """
    e = tl.arange(0, PE)
    end = tl.load(ends + e, mask=e < E, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (end - begin + BM - 1) // BM, 0)
    after = tl.cumsum(tiles)
    expert = tl.sum((after <= t).to(tl.int32) * (e < E).to(tl.int32))
    mine = e == expert
    first = tl.sum(tl.where(mine, begin + (t - after + tiles) * BM, 0))
    return expert, first, tl.sum(tl.where(mine, end, 0))


@triton.jit
def weight_tile(blocks, scales, row, first, G: tl.constexpr, BG: tl.constexpr):
    """The next BG blocks of some rows.   row [BN], of all experts' rows -> words [BN BG 4], scales [BN BG]"""
    g = first + tl.arange(0, BG)
    at = row[:, None] * G + g
    mask = (row >= 0)[:, None] & (g < G)
    s = tl.load(scales + at, mask=mask, other=0)
    return tl.load(blocks + (at[:, :, None] * 4 + tl.arange(0, 4)), mask=mask[:, :, None], other=0), s


@triton.jit
def product(x, valid, blocks, scales, row, G: tl.constexpr, BG: tl.constexpr):
    """x [BM] pointers to vectors, some of them valid, times packed rows `row` [BN] (-1: none) -> [BM BN] float32"""
    dtype: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros([x.shape[0], row.shape[0]], tl.float32)
    w, s = weight_tile(blocks, scales, row, 0, G, BG)
    for first in range(0, G, BG):
        column = first * 32 + tl.arange(0, BG * 32)
        some = tl.load(x[:, None] + column, mask=valid[:, None] & (column < G * 32), other=0)
        part = tl.reshape(numbers(w, s, dtype), [row.shape[0], BG * 32])
        w, s = weight_tile(blocks, scales, row, first + BG, G, BG)  # on their way while the product is made
        acc = tl.dot(some, tl.trans(part), acc, input_precision="ieee")
    return acc


@triton.jit
def many_gate_up(x, order, ends, blocks, scales, bias, post, k, limit, alpha, E: tl.constexpr, PE: tl.constexpr,
                 F: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    expert, first, end = tile(ends, tl.program_id(1), E, PE, BM)
    if expert < E:
        at = first + tl.arange(0, BM)
        slot = tl.load(order + at, mask=at < end, other=0)
        r = tl.program_id(0) * (2 * BF) + tl.arange(0, 2 * BF)
        row = expert.to(tl.int64) * (2 * F) + r
        h = product(x + (slot // k) * (G * 32), at < end, blocks, scales, tl.where(r < 2 * F, row, -1), G, BG)
        h += tl.load(bias + row, mask=r < 2 * F, other=0).to(tl.float32)
        gate, linear = tl.split(tl.reshape(h, [BM, BF, 2]))
        f = tl.program_id(0) * BF + tl.arange(0, BF)
        y = activation(gate, linear, limit, alpha).to(post.dtype.element_ty)
        tl.store(post + at.to(tl.int64)[:, None] * F + f, y, mask=(at < end)[:, None] & (f < F))


@triton.jit
def many_down(post, order, ends, weights, blocks, scales, bias, y, E: tl.constexpr, PE: tl.constexpr,
              D: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    expert, first, end = tile(ends, tl.program_id(1), E, PE, BM)
    if expert < E:
        at = first + tl.arange(0, BM)
        valid = at < end
        slot = tl.load(order + at, mask=valid, other=0)
        r = tl.program_id(0) * BD + tl.arange(0, BD)
        row = expert.to(tl.int64) * D + r
        out = product(post + at.to(tl.int64) * (G * 32), valid, blocks, scales, tl.where(r < D, row, -1), G, BG)
        out += tl.load(bias + row, mask=r < D, other=0).to(tl.float32)
        out *= tl.load(weights + slot, mask=valid, other=0).to(tl.float32)[:, None]
        tl.store(y + slot[:, None] * D + r, out.to(y.dtype.element_ty), mask=valid[:, None] & (r < D))


# ------------------------------------------------------------------------------------------ from PyTorch

# No size below was timed on a GPU: the reasons are arithmetic.
FEW = 8  # tokens: of 32 experts their 32 choices meet 20, so at most 1.6 times the bytes that groups would read
FEW_ALONE = 64  # tokens, where an expert is unpacked for a product: written and read again it is 8.5 times its bytes
PAIRS = 4  # rows of gate and linear a program: one warp, 2880 programs a token, and 8 rows share a loaded x
ROWS = 4  # rows of all the k chosen down matrices a program: a warp a matrix, 720 programs a token
STEP = 32  # blocks of a row at a time, one a thread: 512 bytes in a row; 90 blocks are three steps
COLUMNS = 128  # weights' rows a program of the grouped kernels: 64 KB of shared memory on sm_90, 48 KB before
DEPTH = 2  # blocks at a time there: 90 is a multiple of 2


def tile_rows(slots: int, n_experts: int) -> tuple[int, int]:
    """Rows a tile and warps: the average group in one tile; a weight is decoded once a tile, so large ones for many."""
    each = slots / n_experts
    return (16, 4) if each <= 16 else (64, 8) if each <= 64 else (128, 8)


def words(blocks: Tensor) -> Tensor:
    """[.. g 16] uint8 -> [.. g 4] int32, the same memory"""
    return blocks.view(torch.int32)


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers, bit by bit those of mxfp4.unpack.   blocks [.. g 16], scales [.. g], uint8 -> [.. g*32]"""
    out = torch.empty(*scales.shape[:-1], scales.shape[-1] * 32, dtype=dtype, device=scales.device)
    unpack_kernel[(triton.cdiv(scales.numel(), 128),)](words(blocks), scales, out, scales.numel(), BG=128)
    return out


def mix(moe, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The chosen experts of each token, weighted and added.

    moe: a packed gptoss_lab.model.MoE   x [n d] float32, float16 or bfloat16   indices [n k] int64
    weights [n k] in x's dtype   -> [n d] in x's dtype

    Sums are float32. The readable way rounds gate and linear, their clamps, the steps of SwiGLU, each expert's output
    and the sum to x's dtype; for few tokens only `post` and the sum are rounded here, for groups also each weighted
    output. Groups serve 16-bit numbers from sm_80 on. Only many tokens without them wait for the GPU (counts).
    """
    grouped = tensor_cores(x.device) and x.dtype != torch.float32
    if x.shape[0] <= (FEW if grouped else FEW_ALONE):
        return mix_few(moe, x, indices, weights)
    return (mix_grouped if grouped else mix_one_by_one)(moe, x, indices, weights)


def sizes(moe) -> tuple[int, int, int, int]:
    """d, f, blocks a row of gate_up, blocks a row of down"""
    (_, d, g_down), (_, rows, g_up) = moe.down.scales.shape, moe.gate_up.scales.shape
    return d, rows // 2, g_up, g_down


def mix_few(moe, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `mix`, in two kernels that read each chosen expert once a token, and which it is from `indices` there.

    x and `post` are multiplied by 2^90, numbers of weights by 2^-126: |x| below 2^37 does not overflow, and products
    of x lose bits below 2^-90, before scales.
    """
    (n, k), (d, f, g_up, g_down), c = indices.shape, sizes(moe), moe.config
    x, indices, weights = x.contiguous(), indices.contiguous(), weights.contiguous()
    post, out = x.new_empty(n * k, f), torch.empty_like(x)
    few_gate_up[(triton.cdiv(f, PAIRS), n * k)](
        x, indices, words(moe.gate_up.blocks), moe.gate_up.scales, moe.gate_up.bias, post, k, c.swiglu_limit,
        c.swiglu_alpha, F=f, G=g_up, BF=PAIRS, BG=STEP, num_warps=1)  # fmt: skip
    few_down[(triton.cdiv(d, ROWS), n)](
        post, indices, weights, words(moe.down.blocks), moe.down.scales, moe.down.bias, out, k,
        D=d, G=g_down, S=triton.next_power_of_2(k), BD=ROWS, BG=STEP, num_warps=4)  # fmt: skip
    return out


def mix_grouped(moe, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `mix`, expert by expert in one kernel: tiles of rows that share an expert, laid out on the device."""
    (n, k), (d, f, g_up, g_down), c = indices.shape, sizes(moe), moe.config
    ordered, order = indices.flatten().sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(c.n_experts, device=x.device), right=True)
    rows, num_warps = tile_rows(n * k, c.n_experts)
    tiles = n * k // rows + min(c.n_experts, n * k)  # as many as there can be; what is too many ends at once
    post, y = x.new_empty(n * k, f), x.new_empty(n * k, d)
    shared = dict(E=c.n_experts, PE=triton.next_power_of_2(c.n_experts), BM=rows, BG=DEPTH, num_warps=num_warps)
    many_gate_up[(triton.cdiv(2 * f, COLUMNS), tiles)](
        x.contiguous(), order, ends, words(moe.gate_up.blocks), moe.gate_up.scales, moe.gate_up.bias, post, k,
        c.swiglu_limit, c.swiglu_alpha, F=f, G=g_up, BF=COLUMNS // 2, **shared)  # fmt: skip
    many_down[(triton.cdiv(d, COLUMNS), tiles)](
        post, order, ends, weights.contiguous(), words(moe.down.blocks), moe.down.scales, moe.down.bias, y,
        D=d, G=g_down, BD=COLUMNS, **shared)  # fmt: skip
    return y.view(n, k, d).sum(1)  # PyTorch adds in float32 and rounds once


def mix_one_by_one(moe, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `mix`, with the library's products, on one unpacked expert at a time; waits once for the GPU.

    Rounds where the readable way does, the weighted sum excepted.
    """
    k, experts = indices.shape[1], indices.flatten()
    order, counts = experts.argsort(stable=True), experts.bincount(minlength=moe.config.n_experts).tolist()
    y, end = x.new_empty(len(order), x.shape[1]), 0
    for expert, count in enumerate(counts):
        if count:
            mine = order[end : (end := end + count)]
            w = unpack(moe.gate_up.blocks[expert], moe.gate_up.scales[expert], x.dtype)
            h = torch.addmm(moe.gate_up.bias[expert], x.index_select(0, mine // k), w.t())
            w = unpack(moe.down.blocks[expert], moe.down.scales[expert], x.dtype)
            y[mine] = torch.addmm(moe.down.bias[expert], swiglu(h, moe.config), w.t())
    return (y.view(*indices.shape, -1).float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)
