"""The GPU's attention in Triton's interpreter against the readable one in float64; that it compiles for GPUs."""
import pytest
import torch
from kernels import TARGETS, as_on_a_gpu, compiled, interpreted  # noqa: F401
from models import tiny_config

from gptoss_lab import KVCache
from gptoss_lab.kv_cache import Visible
from gptoss_lab.model import Attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Results and weights are rounded once each: two units in the last place.
ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture
def gpu(monkeypatch):
    """The module, with blocks so small that few tokens fill several."""
    module = interpreted("attention")
    monkeypatch.setattr(module, "flash_blocks", lambda cores: dict(ROWS=32, COLUMNS=16, num_warps=4))
    shares = lambda n_heads, group, n_slots, cores: dict(ROWS=16, COLUMNS=16, SPLITS=1 if n_slots < 40 else 4)
    monkeypatch.setattr(module, "split_blocks", shares)
    return module


def readable(q, k, v, sinks, visible):
    """By the readable model, in float64."""
    config = tiny_config(n_heads=q.shape[2], n_kv_heads=k.shape[2], d_head=q.shape[3])
    q, k, v, sinks = (x.double() for x in (q, k, v, sinks))
    return Attention(config, 0).attend(q, k, v, sinks, visible.mask, 0)


def draw(b, s, t, n_kv_heads, group, h, dtype, spread=1.5, c=None):
    shapes = (b, s, n_kv_heads * group, h), (b, t, n_kv_heads, h), (b, t, n_kv_heads, c or h)
    return [(torch.randn(shape) * spread).to(dtype) for shape in shapes]


def agree(found, expected, dtype, factor=1.0):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, atol=ERROR[dtype] * factor, rtol=ERROR[dtype])


# ------------------------------------------------------------------------------------------ many queries


@torch.no_grad()
@pytest.mark.parametrize("window, dtype", [*zip([None] * 3, DTYPES), *zip([1, 5, 40], DTYPES)])
@pytest.mark.parametrize("b, s, t, n_kv_heads, group, h", [
    (1, 1, 1, 1, 1, 16), (2, 1, 30, 2, 4, 16), (1, 37, 37, 2, 8, 64), (2, 20, 51, 1, 3, 20), (1, 33, 64, 3, 1, 8),
])  # fmt: skip
def test_many_queries_read_as_in_the_readable_way(gpu, b, s, t, n_kv_heads, group, h, window, dtype):
    q, k, v = draw(b, s, t, n_kv_heads, group, h, dtype)
    columns = torch.arange(7, 7 + t)  # a sliding layer has dropped the first seven
    visible = Visible(columns[t - s :], columns, window)
    sinks = torch.randn(n_kv_heads * group)[:, None].expand(b, -1, s).to(dtype)
    agree(gpu.attention(q, k, v, sinks, visible), readable(q, k, v, sinks, visible), dtype)


PADDING = {
    "left": [[0, 0, 0] + [1] * 27, [0] * 9 + [1] * 21], "right": [[1] * 30, [1] * 13 + [0] * 17],
    "middle": [[1] * 5 + [0] * 12 + [1] * 13, [1] * 30], "both": [[0] * 17 + [1] * 6 + [0] * 7, [0] * 30],
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("start", [0, 11, 26])
@pytest.mark.parametrize("where", PADDING)
def test_a_padded_batch_and_a_chunk_after_a_cache_read_as_in_the_readable_way(gpu, where, start, window):
    config, mask = tiny_config(), torch.tensor(PADDING[where])
    cache = KVCache(config)
    if start:
        cache.commit(cache.place(mask[:, :start], mask[:, :start]))
    visible = cache.place(mask[:, start:], mask[:, start:]).visible(window)
    assert visible.key.dim() == 2
    q, k, v = draw(2, 30 - start, visible.key.shape[-1], 2, 2, 16, torch.float32)
    sinks = torch.randn(2, 4, 30 - start)
    sinks[:, 0] = -torch.inf
    real = mask[:, start:] == 1
    parts = []
    for z, sink_mass in (gpu.attention(q, k, v, sinks, visible), readable(q, k, v, sinks, visible)):
        assert z.isfinite().all() and sink_mass.isfinite().all()  # what padding reads is of no use, but a number
        parts.append((z[real], sink_mass.transpose(1, 2)[real]))
    agree(*parts, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sink", [-torch.inf, -60.0, 60.0, 3e4])
def test_any_sink_can_be_served(gpu, sink, dtype):
    q, k, v = draw(1, 9, 20, 2, 2, 16, dtype, spread=4)
    columns = torch.arange(20)
    visible, sinks = Visible(columns[11:], columns, None), torch.full((1, 4, 9), sink)
    agree(gpu.attention(q, k, v, sinks, visible), readable(q, k, v, sinks, visible), dtype, 4)
    found = gpu.next_token(q[:, -1], k, v, sinks[0, :, 0], torch.tensor([19]))
    expected = readable(q[:, -1:], k, v, sinks[..., :1], Visible(columns[19:], columns, None))
    agree(found, (expected[0][:, 0], expected[1][..., 0]), dtype, 4)


@torch.no_grad()
def test_scores_of_hundreds_do_not_overflow(gpu):
    q, k, v = draw(1, 20, 20, 1, 2, 16, torch.float32, spread=20)
    columns = torch.arange(20)
    visible, sinks = Visible(columns, columns, None), torch.zeros(1, 2, 20)
    agree(gpu.attention(q, k, v, sinks, visible), readable(q, k, v, sinks, visible), torch.float32, 100)


@torch.no_grad()
def test_views_are_read_as_they_lie(gpu):
    """q, k and v as parts of one product, keys in a longer buffer, and a last axis that is not the innermost."""
    qkv, columns = torch.randn(2, 30, 8, 16), torch.arange(30)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    visible, sinks = Visible(columns, columns, None), torch.randn(2, 4, 30)
    expected = readable(q, k, v, sinks, visible)
    longer = torch.full((2, 50, 2, 16), torch.nan)
    longer[:, :30] = k
    turned = v.mT.contiguous().mT
    assert turned.stride(-1) != 1
    agree(gpu.attention(q, longer[:, :30], turned, sinks, visible), expected, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 10])
def test_blocks_of_keys_that_no_query_of_a_block_sees_are_not_read(gpu, window):
    """Keys that are no numbers: reading them, even with weight 0, would leave a trace."""
    columns, sinks = torch.arange(100), torch.zeros(1, 2, 8)
    q, k, v = draw(1, 8, 100, 1, 2, 16, torch.float32)
    first = (92 - 9) // 16 * 16 if window else 0
    v[:, :first] = torch.nan
    visible = Visible(columns[92:], columns, window)
    z, sink_mass = gpu.attention(q, k, v, sinks, visible)
    assert z.isfinite().all() and sink_mass.isfinite().all() and bool(window) == bool(first)
    v[:, 48:] = torch.nan  # queries 0 to 15 read blocks 0 to 2 at most
    v[:, :48] = 0
    visible = Visible(columns[:8] + 30, columns, window)
    assert gpu.flash(q, k, v, visible.query, visible.key, window).out.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded, window", [(False, None), (False, 8), (True, None), (True, 8)])
def test_without_tensor_cores_pytorchs_kernel_gives_the_same(gpu, monkeypatch, padded, window, dtype):
    """The kernel runs on GPUs alone: here something else computes what it would, and looks at what it is given."""

    def efficient(q, k, v, bias, compute_log_sumexp):
        assert bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2]) and compute_log_sumexp
        assert all(x.stride(-1) == 1 for x in (q, k, v, bias))
        assert bias.stride(2) * bias.itemsize % 16 == 0 and bias.data_ptr() % 16 == 0
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5 + bias
        lse = scores.logsumexp(-1)
        z = ((scores - lse.unsqueeze(-1)).exp() @ v.float()).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        padding = lse.new_full((*lse.shape[:2], -lse.shape[2] % 32), torch.inf)
        return z, torch.cat([lse, padding], dim=-1), None, None

    monkeypatch.setattr(gpu, "tensor_cores", lambda device: False)
    monkeypatch.setattr(gpu, "efficient", efficient)
    monkeypatch.setattr(gpu, "ROWS", 7)
    columns = torch.arange(30)
    if padded:
        mask = torch.tensor(PADDING["middle"])
        visible = KVCache(tiny_config()).place(mask, mask).visible(window)
    else:
        visible = Visible(columns[10:], columns, window)
    s = visible.query.shape[-1]
    q, k, v = draw(2, s, 30, 2, 3, 16, dtype)
    sinks = torch.randn(2, 6, s)
    agree(gpu.attention(q, k, v, sinks, visible), readable(q, k, v, sinks, visible), dtype)


# ------------------------------------------------------------------------------------------ streams


def dense(q, k, v, query, key, window, bias=None, later=False):
    """What gpu.flash promises, with the matrix, in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    n_heads = max(q.shape[1], k.shape[1])
    q, k, v = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + (0 if bias is None else bias.double().unsqueeze(2))
    distance = query[:, None] - key
    along = -distance if later else distance
    seen = (along >= 0) & (along < (window or 10**9))
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
    return lse, (weights * scores).sum(-1), (weights * distance).sum(-1), (weights @ v).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("window, c, dtype", [
    (None, 3, torch.float32), (9, 16, torch.float16), (None, 65, torch.bfloat16), (9, 128, torch.float32),
])  # fmt: skip
def test_a_stream_gives_sums_means_and_values_of_another_width(gpu, window, c, dtype):
    q, k, v = draw(1, 21, 50, 2, 2, 16, dtype, c=c)
    key = torch.arange(100_003, 100_053)
    found = gpu.flash(q, k, v, key[29:], key, window, means=True)
    lse, score, distance, out = dense(q, k, v, key[29:], key, window)
    agree([found.out], [out], dtype)
    agree([found.lse, found.mean_score], [lse, score], torch.float32, 4)
    agree([found.mean_distance], [distance], torch.float32, 20)
    alone = gpu.flash(q, k, None, key[29:], key, window)
    assert alone.out is alone.mean_score is alone.mean_distance is None
    assert torch.equal(alone.lse, found.lse)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 9, 30])
def test_queries_and_keys_can_change_places(gpu, window):
    """What each key gets: it asks the queries after it, whose totals lower their scores."""
    q, k, _ = draw(1, 21, 50, 2, 3, 16, torch.float32)
    key = torch.arange(50)
    total = dense(q, k, k, key[29:], key, window)[0]
    found = gpu.flash(k, q, None, key, key[29:], window, bias=-total.float(), later=True)
    expected = dense(k, q, q, key, key[29:], window, bias=-total, later=True)[0]
    assert found.lse.shape == (1, 6, 50)
    torch.testing.assert_close(found.lse.double(), expected, atol=1e-5, rtol=1e-5)
    if window == 9:
        assert (found.lse[..., :20] == -torch.inf).all()  # no query sees them
    assert found.lse.exp().sum(-1).sub(21).abs().max() < 1e-3  # every query gives 1


# ------------------------------------------------------------------------------------------ one query


def buffer(x, n_slots):
    """Columns x [b t K h] where a ring of n_slots holds them; what has not been written is no number."""
    b, t, *rest = x.shape
    made = torch.full((b, n_slots, *rest), torch.nan, dtype=x.dtype)
    for column in range(max(0, t - n_slots), t):
        made[:, column % n_slots] = x[:, column]
    return made


@torch.no_grad()
@pytest.mark.parametrize("n_slots, position", [
    (8, 0), (8, 7), (8, 8), (8, 29), (33, 12), (33, 70), (200, 0), (200, 63), (200, 64), (200, 150), (200, 199), (64, 90),
])  # fmt: skip
@pytest.mark.parametrize("b, n_kv_heads, group, h, dtype", [
    (1, 1, 8, 64, torch.bfloat16), (2, 1, 3, 20, torch.float16), (1, 2, 1, 16, torch.float32),
])  # fmt: skip
def test_the_next_token_reads_a_buffer_or_a_ring(gpu, b, n_kv_heads, group, h, dtype, n_slots, position):
    q, k, v = draw(b, 1, position + 1, n_kv_heads, group, h, dtype)
    columns, sinks = torch.arange(position + 1), torch.randn(n_kv_heads * group)
    z, sink_mass = readable(q, k, v, sinks[:, None].expand(b, -1, 1), Visible(columns[-1:], columns, n_slots))
    found = gpu.next_token(q[:, 0], buffer(k, n_slots), buffer(v, n_slots), sinks.to(dtype), torch.tensor([position]))
    agree(found, (z[:, 0], sink_mass[..., 0]), dtype)


@torch.no_grad()
@pytest.mark.parametrize("n_slots, position", [(8, 5), (8, 29), (33, 40), (200, 120), (64, 90)])
def test_the_next_token_does_not_read_the_padding_before_its_row(gpu, n_slots, position):
    first = torch.tensor([0, 3, position - 2, position])
    q, k, v = draw(4, 1, position + 1, 2, 2, 16, torch.float32)
    columns, sinks = torch.arange(position + 1), torch.randn(4)
    key = (columns - first[:, None]).clamp(min=-1)
    visible = Visible(key[:, -1:], key, n_slots)
    z, sink_mass = readable(q, k, v, sinks[:, None].expand(4, -1, 1), visible)
    at = torch.tensor([position])
    found = gpu.next_token(q[:, 0], buffer(k, n_slots), buffer(v, n_slots), sinks, at, first)
    agree(found, (z[:, 0], sink_mass[..., 0]), torch.float32)


def test_shares_fill_a_gpu_and_a_ring_is_read_by_one_program():
    from gptoss_lab.fast.gpu.attention import split_blocks

    assert split_blocks(8, 8, 131_072, True) == dict(ROWS=16, COLUMNS=64, SPLITS=64)
    assert split_blocks(8, 8, 128, True)["SPLITS"] == 1 and split_blocks(8, 8, 600, True)["SPLITS"] == 8
    assert split_blocks(24, 8, 131_072, True)["SPLITS"] == 16 and split_blocks(2000, 8, 131_072, True)["SPLITS"] == 1
    assert split_blocks(8, 8, 65_536, False) == dict(ROWS=8, COLUMNS=32, SPLITS=64)


# ------------------------------------------------------------------------------------------ on GPUs that are not here

SHARED_MEMORY = {75: 64, 80: 163, 89: 99, 90: 227}  # KiB that a block may have
# What flash_kernel is given: of absent tensors nothing, and strides and sizes of the 20B.
GIVEN = dict(q="*", k="*", v="*", query="*i64", key="*i64", sinks="*", bias=None, out="*", sink_mass="*", lse=None,
             mean_score=None, mean_distance=None, s="i32", t="i32", window="i32", scale="fp32")  # fmt: skip
SIZES = dict(
    q_batch=0, q_token=5120, q_head=64, query_batch=0, key_batch=0, sink_batch=0, sink_head=1, sink_token=0, bias_batch=0,
    bias_head=0, K=8, GROUP=8, SHARED=1, H=64, C=64, H_BLOCK=64, C_BLOCK=64, PADDED=False, WINDOWED=False, LATER=False,
    k_batch=2**26, k_token=512, k_head=64, v_batch=2**26, v_token=512, v_head=64,
)  # fmt: skip
NO_SINK = dict(sinks=None, sink_mass=None, lse="*fp32")
VARIANTS = {
    "prefill": {}, "a padded window": dict(PADDED=True, WINDOWED=True),
    "labels": NO_SINK | dict(mean_score="*fp32", mean_distance="*fp32", C=16, C_BLOCK=16, v_token=16),
    "received": NO_SINK | dict(v=None, out=None, bias="*fp32", K=64, GROUP=1, SHARED=8, LATER=True),
}  # fmt: skip


def made_for(target, kernel, given, num_warps=4):
    """`given`: what each argument is, "*" for a pointer to the dtype that such a GPU multiplies, or its value."""
    given = {name: ("*fp16" if target == 75 else "*bf16") if x == "*" else x for name, x in given.items()}
    types = {name: x for name, x in given.items() if isinstance(x, str)}
    constants = {name: x for name, x in given.items() if not isinstance(x, str)}
    made = compiled("attention", kernel, target, types, constants, num_warps=num_warps)
    assert made.shared <= SHARED_MEMORY[target] * 1024
    assert (made.spills or 0) <= 16  # bytes: ptxas puts a number or two aside below its limit of registers
    return made.ptx


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_of_keys_compiles(variant, target):
    from gptoss_lab.fast.gpu.attention import flash_blocks

    blocks = flash_blocks(target >= 80)
    num_warps = blocks.pop("num_warps")
    ptx = made_for(target, "flash_kernel", GIVEN | SIZES | VARIANTS[variant] | blocks, num_warps)
    assert {75: "fma.rn.f32", 80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async"}[target] in ptx
    assert ("cp.async.cg.shared.global" if target >= 80 else "ld.global.v4.b32") in ptx  # 16 bytes at a time


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n_slots", [128, 131_072])
def test_the_next_token_compiles(n_slots, target):
    from gptoss_lab.fast.gpu.attention import split_blocks

    blocks = split_blocks(8, 8, n_slots, target >= 80)
    share = dict.fromkeys(["tops", "totals", "sums"], "*fp32" if n_slots > 128 else None)
    given = dict(sinks="*", position="*i64", out="*", sink_mass="*", n_slots="i32", H=64, H_BLOCK=64) | share
    more = dict(q="*", k="*", v="*", first="*i64", scale="fp32", q_batch=4096, q_head=64, K=8, GROUP=8, k_batch=2**26,
                k_slot=512, k_head=64, v_batch=2**26, v_slot=512, v_head=64)  # fmt: skip
    ptx = made_for(target, "split_kernel", given | more | blocks)
    assert ("mma.sync" if target >= 80 else "fma.rn.f32") in ptx
    assert ("cp.async.cg.shared.global" if target >= 80 else "ld.global.v4.b32") in ptx
    if n_slots > 128:
        del blocks["ROWS"]
        made_for(target, "combine_kernel", given | blocks | dict(HEADS=64))
