"""Attention with a sink on a GPU: keys stream past blocks of queries, and no matrix of queries by keys is made.

Sums are kept in float32, in powers of two: exp(x) is exp2(x * log2(e)). Products are made of numbers as the tensors
hold them; a weight exp(score - most) is rounded to their dtype before it multiplies a value.
"""
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kv_cache import Visible
from . import tensor_cores

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # under every score, and finite: -inf less itself would be no number

# ------------------------------------------------------------------------------------------ many queries


@triton.jit(do_not_specialize=["s", "t", "window"])
def flash_kernel(
    q, k, v, query, key, sinks, bias, out, sink_mass, lse, mean_score, mean_distance, s, t, window, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, query_batch, key_batch,
    sink_batch, sink_head, sink_token, bias_batch, bias_head,
    K: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    H_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PADDED: tl.constexpr, WINDOWED: tl.constexpr, LATER: tl.constexpr,
):  # fmt: skip
    """One block of (query, head-in-group) rows of a key head. Absent inputs and outputs are None."""
    # The last blocks read the most keys of a text: they go first, so that no long one is left for the end.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch, head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    row = first_row + tl.arange(0, ROWS)
    token, real = row // GROUP, row < s * GROUP
    q_at = q + batch * q_batch + (head // SHARED * GROUP + row % GROUP) * q_head + token.to(tl.int64) * q_token
    dims = tl.arange(0, H_BLOCK)
    if H == H_BLOCK:
        queries = tl.load(q_at[:, None] + dims[None, :], mask=real[:, None], other=0.0)
    else:
        queries = tl.load(q_at[:, None] + dims[None, :], mask=real[:, None] & (dims < H)[None, :], other=0.0)
    position = tl.load(query + batch * query_batch + token, mask=real, other=0).to(tl.int32)

    # Which columns can these rows see at all? Without padding positions are consecutive, and columns count them.
    first_token, last_token = first_row // GROUP, tl.minimum((first_row + ROWS - 1) // GROUP, s - 1)
    begin, whole, end = 0, 0, t
    key_first, lowest = 0, 0
    if PADDED:
        end = t - s + last_token + 1
    else:
        key_first = tl.load(key).to(tl.int32)
        lowest = tl.load(query + first_token).to(tl.int32) - key_first  # the first row's own column
        highest = tl.load(query + last_token).to(tl.int32) - key_first
        if LATER:
            begin = tl.maximum(lowest, 0)
            if WINDOWED:
                end = tl.minimum(highest + window, t)
        else:
            end = tl.minimum(highest + 1, t)
            if WINDOWED:
                begin = tl.maximum(lowest - window + 1, 0)
            else:
                whole = tl.minimum(lowest + 1, t)  # every row sees all the columns before this one
        begin, whole = begin // COLUMNS * COLUMNS, whole // COLUMNS * COLUMNS

    lanes, values = tl.arange(0, COLUMNS), tl.arange(0, C_BLOCK)
    k_at = k + batch * k_batch + head.to(tl.int64) * k_head + tl.cast(begin, tl.int64) * k_token
    k_tile = lanes[None, :] * k_token + dims[:, None]  # added in each turn: pointers that move would fill registers
    if v is not None:
        v_at = v + batch * v_batch + head.to(tl.int64) * v_head + tl.cast(begin, tl.int64) * v_token
        v_tile = lanes[:, None] * v_token + values[None, :]
    most = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    sum_of_scores = tl.full([ROWS], 0.0, tl.float32)
    sum_of_distances = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, C_BLOCK], 0.0, tl.float32)
    # Twice the same loop: over blocks that all rows see whole, then over those where positions must be compared.
    for part in tl.static_range(0 if not (PADDED or WINDOWED or LATER) else 1, 2):
        if part == 0:
            start, stop = begin, whole
        else:
            start, stop = tl.maximum(begin, whole), end
        for at in range(start, stop, COLUMNS):
            column = at + lanes
            inside = column < t
            if part == 1 or H != H_BLOCK:
                keys = tl.load(k_at + k_tile, mask=inside[None, :] & (dims < H)[:, None], other=0.0)
            else:
                keys = tl.load(k_at + k_tile)
            scores = tl.dot(queries, keys, input_precision="ieee")
            if bias is not None:
                added = tl.load(bias + batch * bias_batch + head * bias_head + column, mask=inside, other=0.0)
                scores += added[None, :] / scale
            if part == 1:
                if PADDED:
                    place = tl.load(key + batch * key_batch + column, mask=inside, other=-1).to(tl.int32)
                else:
                    place = key_first + column
                distance = position[:, None] - place[None, :]
                if LATER:
                    distance = -distance
                seen = distance >= 0
                if WINDOWED:
                    seen = seen & (distance < window)
                if PADDED:  # a token of padding reads itself, so that no row is empty
                    seen = (seen & (place >= 0)[None, :]) | ((t - s + token)[:, None] == column[None, :])
                scores = tl.where(seen & inside[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1) * (scale * LOG2E))
            weights = tl.exp2(scores * (scale * LOG2E) - higher[:, None])
            shrink = tl.exp2(most - higher)
            most = higher
            total = total * shrink + tl.sum(weights, 1)
            if mean_score is not None:
                sum_of_scores = sum_of_scores * shrink + tl.sum(weights * tl.where(weights > 0, scores, 0.0), 1)
            if mean_distance is not None:  # from the first row: near keys then count in small numbers
                far = (lowest - column).to(tl.float32)
                sum_of_distances = sum_of_distances * shrink + tl.sum(weights * far[None, :], 1)
            if v is not None:
                if part == 1 or C != C_BLOCK:
                    of_keys = tl.load(v_at + v_tile, mask=inside[:, None] & (values < C)[None, :], other=0.0)
                else:
                    of_keys = tl.load(v_at + v_tile)
                acc = tl.dot(weights.to(of_keys.dtype), of_keys, acc * shrink[:, None], input_precision="ieee")
                v_at += COLUMNS * v_token
            k_at += COLUMNS * k_token

    heads = K * GROUP
    out_head = head * GROUP + row % GROUP
    out_at = (batch * heads + out_head) * s + token  # in [b H s]
    some = total > 0  # a row that sees nothing gets zeros
    once = 1 / tl.where(some, total, 1.0)
    if mean_score is not None:
        tl.store(mean_score + out_at, sum_of_scores * once * scale, mask=real)
    if mean_distance is not None:
        from_first = (position - key_first - lowest).to(tl.float32)
        tl.store(mean_distance + out_at, sum_of_distances * once + from_first, mask=real)
    if lse is not None:
        tl.store(lse + out_at, tl.where(some, (most - tl.log2(once)) / LOG2E, float("-inf")), mask=real)
    if sinks is not None:
        sink_at = sinks + batch * sink_batch + out_head * sink_head + token * sink_token
        sink = tl.load(sink_at, mask=real, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(most, sink)
        on_keys, on_sink = tl.exp2(most - higher), tl.exp2(sink - higher)
        total = total * on_keys + on_sink
        once = on_keys / total
        tl.store(sink_mass + out_at, on_sink / total, mask=real)
    if v is not None:
        out_at = out + ((batch * s + token) * heads + out_head) * C  # in [b s H c]
        tl.store(out_at[:, None] + values[None, :], acc * once[:, None], mask=real[:, None] & (values < C)[None, :])


def flash_blocks(cores: bool) -> dict:
    """Rows and columns of scores at a time, and warps; `cores`: do tensor cores make the products?

    128 x 64 on 8 warps: 128 registers a thread on sm_90, so that two blocks share a processor; 4 warps spill.
    Plain FMAs keep a row's and a column's numbers in registers: small blocks, or they spill.
    """
    return dict(ROWS=128, COLUMNS=64, num_warps=8) if cores else dict(ROWS=32, COLUMNS=32, num_warps=8)


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))  # tl.dot takes 16 or more


def _cores(x: Tensor) -> bool:
    return tensor_cores(x.device) and x.dtype != torch.float32  # float32 keeps its digits in plain products alone


def _read(q, k, v, query, key, window, scale, outputs, sinks=None, bias=None, later=False) -> None:
    """Launch flash_kernel; it fills `outputs`."""
    (b, s, n_q, h), (_, t, n_k, _) = q.shape, k.shape
    c = 1 if v is None else v.shape[-1]
    q, k, v = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    group, shared = max(n_q // n_k, 1), max(n_k // n_q, 1)
    blocks = flash_blocks(_cores(q))
    strides = lambda x, n: (0,) * n if x is None else x.stride()[:n]
    by_row = lambda x: x.stride(0) if x.dim() == 2 else 0
    query, key = query.contiguous(), key.contiguous()
    flash_kernel[triton.cdiv(s * group, blocks["ROWS"]), b * n_k](
        q, k, v, query, key, sinks, bias, *outputs, s, t, window or 0, scale,
        *strides(q, 3), *strides(k, 3), *strides(v, 3), by_row(query), by_row(key), *strides(sinks, 3),
        *strides(bias, 2), K=n_k, GROUP=group, SHARED=shared, H=h, C=c, H_BLOCK=_block(h), C_BLOCK=_block(c),
        PADDED=key.dim() == 2, WINDOWED=window is not None, LATER=later, **blocks)  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
    """q [b s H h], k [b t K h], v [b t K c], sinks [b H s] -> z [b s H c], sink_mass [b H s], both in q's dtype."""
    b, s, n_heads, h = q.shape
    if not tensor_cores(q.device):
        return memory_efficient(q, k, v, sinks, visible)
    z, sink_mass = q.new_empty(b, s, n_heads, v.shape[-1]), q.new_empty(b, n_heads, s)
    outputs = z, sink_mass, None, None, None
    _read(q, k, v, visible.query, visible.key, visible.window, h**-0.5, outputs, sinks=sinks)
    return z, sink_mass


@dataclass(frozen=True)
class Streamed:
    """What a pass over the keys gives, [b H s] in float32, of the visible keys alone, without a sink.

    lse: the log of the sum of exp(score); -inf where nothing is visible. mean_score, mean_distance (of positions): by
    the weights exp(score - lse). out: mean of the values [b s H c] in q's dtype, None without values.
    """

    lse: Tensor
    mean_score: Tensor | None
    mean_distance: Tensor | None
    out: Tensor | None


def flash(
    q: Tensor, k: Tensor, v: Tensor | None, query: Tensor, key: Tensor, window: int | None = None, *,
    means: bool = False, bias: Tensor | None = None, later: bool = False,
) -> Streamed:  # fmt: skip
    """Attention without a sink, over consecutive positions.   q [b s H h], k [b t K h], v [b t K c]

    Heads are shared either way: H a multiple of K, or K of H, and then `H` above is the larger of the two.

    Args:
        q, k, v: of one dtype; c is at most 128, best a multiple of 8. Without v only sums are made.
        query, key: positions [s] and [t], each one more than the last.
        window: keys that a query may read, its own among them.
        means: give mean_score and mean_distance too.
        bias: [b H t], float32, added to the scores of a key.
        later: a query reads its own key and those after it, instead of those before: queries and keys changing places.
    """
    b, s, h = q.shape[0], q.shape[1], q.shape[-1]
    n_heads = max(q.shape[2], k.shape[2])
    number = lambda: torch.empty(b, n_heads, s, dtype=torch.float32, device=q.device)
    out = None if v is None else q.new_empty(b, s, n_heads, v.shape[-1])
    made = Streamed(number(), number() if means else None, number() if means else None, out)
    outputs = out, None, made.lse, made.mean_score, made.mean_distance
    _read(q, k, v, query, key, window, h**-0.5, outputs, bias=bias, later=later)
    return made


# ---------------------------------------------------------- many queries, without Triton's matrix products

ROWS = 128  # queries at a time: their mask over 65,536 keys, made of int64 distances, takes 0.1 GB
efficient = torch.ops.aten._scaled_dot_product_efficient_attention


def memory_efficient(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Visible) -> tuple[Tensor, Tensor]:
    """As `attention`, by PyTorch's own kernel and its log-sum-exp (see fast.attention), some queries at a time."""
    z, sink_mass = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(*sinks.shape)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    groups = q.shape[2] // k.shape[2]
    for begin in range(0, q.shape[1], ROWS):
        some = slice(begin, begin + ROWS)
        seen, columns = visible.of(some)
        # The kernel wants a mask of the queries' dtype, every row of it at a multiple of 16 bytes.
        n, width = seen.mask.shape[-2:]
        mask = q.new_zeros(len(seen.mask), 1, 1, n, -(-width // 16) * 16)[..., :width]
        mask = mask.masked_fill_(~seen.mask.unsqueeze(1), -torch.inf)
        for row in range(len(q)):
            queries = q[row, some].unflatten(1, (-1, groups)).permute(1, 2, 0, 3)  # [K g n h]
            keys, values = (x[row, columns].transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v))
            bias = mask[row % len(mask)].expand(*queries.shape[:3], -1)
            out, lse, *_ = efficient(queries, keys, values, bias, True)
            lse, sink = lse[..., :n].flatten(0, 1), sinks[row, :, some].float()  # [H n]; lse is padded
            out = out.flatten(0, 1).transpose(0, 1)
            z[row, some] = out * torch.sigmoid(lse - sink).T.unsqueeze(-1).to(out.dtype)
            sink_mass[row, :, some] = torch.sigmoid(sink - lse)
    return z, sink_mass


# ------------------------------------------------------------------------------------------ one query


@triton.jit
def _share(filled, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Slots that a program reads: whole blocks of columns."""
    each = (filled + SPLITS - 1) // SPLITS
    return (each + COLUMNS - 1) // COLUMNS * COLUMNS


@triton.jit
def split_kernel(
    q, k, v, sinks, position, first, out, sink_mass, tops, totals, sums, n_slots, scale,
    q_batch, q_head, k_batch, k_slot, k_head, v_batch, v_slot, v_head,
    K: tl.constexpr, GROUP: tl.constexpr, H: tl.constexpr, H_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The query heads of a key head over one share of the slots. A share that is all there is gets the sink here."""
    batch, head, split = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K, tl.program_id(1)
    now = tl.load(position).to(tl.int32)
    filled = tl.minimum(now + 1, n_slots)
    share = _share(filled, SPLITS, COLUMNS)
    begin, end = split * share, tl.minimum((split + 1) * share, filled)

    row, dims, lanes = tl.arange(0, ROWS), tl.arange(0, H_BLOCK), tl.arange(0, COLUMNS)
    q_at = q + batch * q_batch + (head * GROUP + row[:, None]) * q_head + dims[None, :]
    queries = tl.load(q_at, mask=(row < GROUP)[:, None] & (dims < H)[None, :], other=0.0)
    k_at = k + batch * k_batch + head * k_head + tl.cast(begin, tl.int64) * k_slot
    v_at = v + batch * v_batch + head * v_head + tl.cast(begin, tl.int64) * v_slot
    k_tile, v_tile = lanes[None, :] * k_slot + dims[:, None], lanes[:, None] * v_slot + dims[None, :]
    most = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, H_BLOCK], 0.0, tl.float32)
    for at in range(begin, end, COLUMNS):
        slot = at + lanes
        seen = slot < end
        keys = tl.load(k_at + k_tile, mask=seen[None, :] & (dims < H)[:, None], other=0.0)
        values = tl.load(v_at + v_tile, mask=seen[:, None] & (dims < H)[None, :], other=0.0)
        if first is not None:
            newest = now % n_slots  # slots behind it are from the round before
            column = now - newest + slot - tl.where(slot > newest, n_slots, 0)
            seen = seen & (column >= tl.minimum(tl.load(first + batch).to(tl.int32), now))
        scores = tl.dot(queries, keys, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(most - higher)
        most = higher
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        k_at += COLUMNS * k_slot
        v_at += COLUMNS * v_slot

    at = (batch * K + head) * GROUP + row
    if SPLITS == 1:
        sink = tl.load(sinks + head * GROUP + row, mask=row < GROUP, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(most, sink)
        on_keys, on_sink = tl.exp2(most - higher), tl.exp2(sink - higher)
        total = total * on_keys + on_sink
        tl.store(sink_mass + at, on_sink / total, mask=row < GROUP)
        z = acc * (on_keys / total)[:, None]
        tl.store(out + at[:, None] * H + dims[None, :], z, mask=(row < GROUP)[:, None] & (dims < H)[None, :])
    else:
        real = (row < GROUP) & (begin < end)
        at = at * SPLITS + split
        tl.store(tops + at, most, mask=real)
        tl.store(totals + at, total, mask=real)
        tl.store(sums + at[:, None] * H + dims[None, :], acc, mask=real[:, None] & (dims < H)[None, :])


@triton.jit
def combine_kernel(
    tops, totals, sums, sinks, position, out, sink_mass, n_slots,
    HEADS: tl.constexpr, H: tl.constexpr, H_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The shares of one query head, and its sink."""
    at, split, dims = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, H_BLOCK)
    filled = tl.minimum(tl.load(position).to(tl.int32) + 1, n_slots)
    used = split * _share(filled, SPLITS, COLUMNS) < filled  # the others wrote nothing
    top = tl.load(tops + at * SPLITS + split, mask=used, other=LOWEST)
    total = tl.load(totals + at * SPLITS + split, mask=used, other=0.0)
    sums_at = sums + (at * SPLITS + split[:, None]) * H + dims[None, :]
    acc = tl.load(sums_at, mask=used[:, None] & (dims < H)[None, :], other=0.0)
    sink = tl.load(sinks + at % HEADS).to(tl.float32) * LOG2E
    higher = tl.maximum(tl.max(top, 0), sink)
    weights, on_sink = tl.exp2(top - higher), tl.exp2(sink - higher)
    everything = tl.sum(total * weights, 0) + on_sink
    z = tl.sum(acc * weights[:, None], 0) / everything
    tl.store(out + at * H + dims, z, mask=dims < H)
    tl.store(sink_mass + at, on_sink / everything)


PROGRAMS = 512  # over all key heads: four on each of an H200's 132 processors, what their shared memory holds


def split_blocks(n_heads: int, group: int, n_slots: int, cores: bool) -> dict:
    """Rows and columns of scores at a time, and into how many shares the slots of each of `n_heads` key heads are cut.

    Tensor cores multiply 16 rows whether or not a group has as many; plain FMAs are spared. One share for the ring of
    a sliding layer: a second kernel would take longer than one program that reads its 32 KB.
    """
    rows, columns = (max(16, triton.next_power_of_2(group)), 64) if cores else (triton.next_power_of_2(group), 32)
    wanted = 1 if n_slots <= 256 else min(PROGRAMS // n_heads, triton.cdiv(n_slots, columns))
    return dict(ROWS=rows, COLUMNS=columns, SPLITS=1 << max(wanted, 1).bit_length() - 1)


def next_token(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, position: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The newest token of each row reads the keys that a fixed buffer holds, its own among them; fit for a CUDA graph.

    Column c lies in slot c mod C: a buffer of the whole context, or a ring of a sliding layer's window.

    Args:
        q: [b H h], rotated.
        k, v: [b C K h].
        sinks: [H].
        position: [1], int64, on the device: the newest column, the same for all rows.
        first: [b], int64: each row's first column that is no padding.

    Returns:
        z [b H h] and sink_mass [b H], in q's dtype.
    """
    (b, n_heads, h), (_, n_slots, n_kv_heads, _) = q.shape, k.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    z, sink_mass = q.new_empty(q.shape), q.new_empty(b, n_heads)
    group, sizes = n_heads // n_kv_heads, dict(H=h, H_BLOCK=_block(h))
    blocks = split_blocks(b * n_kv_heads, group, n_slots, _cores(q))
    n, tops, totals, sums = blocks["SPLITS"], None, None, None
    if n > 1:
        tops, totals, sums = torch.empty(b * n_heads * n * (h + 2), dtype=torch.float32, device=q.device).split(
            [b * n_heads * n, b * n_heads * n, b * n_heads * n * h])  # fmt: skip
    split_kernel[b * n_kv_heads, n](
        q, k, v, sinks, position, first, z, sink_mass, tops, totals, sums, n_slots, h**-0.5,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], K=n_kv_heads, GROUP=group, **blocks, **sizes)  # fmt: skip
    if n > 1:
        combine_kernel[(b * n_heads,)](
            tops, totals, sums, sinks, position, z, sink_mass, n_slots, HEADS=n_heads, SPLITS=n,
            COLUMNS=blocks["COLUMNS"], **sizes)  # fmt: skip
    return z, sink_mass
