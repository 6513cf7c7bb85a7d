"""Streamed attention is the dense one, without the matrix."""
import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

import gptoss_lab as lab
from gptoss_lab import KVCache
from gptoss_lab.probes import streaming
from gptoss_lab.probes.result import Result
from gptoss_lab.probes.streaming import Attended, attention

LONG = tiny_config(n_layers=2, n_ctx=4096, d_model=32)
WINDOWS = (1, 5, 40)


def dense(model, tokens, labels) -> dict:
    """Every quantity by its definition, from the whole pattern."""
    with lab.record(model, "*.hook_pattern", "*.hook_sink_mass") as acts, torch.no_grad():
        model(tokens)
    layers = range(model.config.n_layers)
    p = torch.stack([acts["pattern", i] for i in layers])  # [L b H s t]
    sink = torch.stack([acts["sink_mass", i] for i in layers])
    s = tokens.shape[1]
    distance = torch.arange(s)[:, None] - torch.arange(s)
    whole = torch.cat([p, sink.unsqueeze(-1)], -1)
    return {
        "sink_mass": sink,
        "entropy": -torch.where(whole > 0, whole * whole.log(), 0.0).sum(-1),
        "mean_distance": (p * distance).sum(-1) / p.sum(-1),
        "within": torch.stack([(p * (distance < w)).sum(-1) for w in WINDOWS]),
        "on": torch.stack([p[..., labels == label].sum(-1) for label in range(3)]),
        "received": p.sum(-2),
        "pattern": p,
    }


def streamed(model, tokens, labels, **settings):
    with attention(model, streaming.QUANTITIES, windows=WINDOWS, labels=labels, top=4, **settings) as stream, torch.no_grad():
        model(tokens)
    return stream.result()


def agree(result: Attended, want: dict, tolerance=1e-9):
    for name in ("sink_mass", "entropy", "mean_distance", "within", "on", "received"):
        got = getattr(result, name)
        assert got.shape == want[name].shape, name
        assert (got - want[name]).abs().max() < tolerance * max(1, want[name].abs().max()), name
    mass, keys = want["pattern"].topk(4, dim=-1)
    assert (result.top_mass - mass).abs().max() < tolerance
    clear = (mass > 1e-6) & (mass - mass.roll(-1, -1) > 1e-9).logical_and(mass.roll(1, -1) - mass > 1e-9).index_fill(-1, torch.tensor([0, 3]), False)
    assert torch.equal(result.top_keys[clear], keys[clear]) and clear.any()


def test_every_quantity_is_the_dense_one_at_two_thousand_tokens_in_float64():
    model, tokens = random_model(LONG), random_tokens(LONG, 1, 2048)
    labels = torch.randint(0, 3, (2048,))
    agree(streamed(model, tokens, labels), dense(model, tokens, labels), 1e-5)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_of_any_size_give_the_same(block):
    model, tokens, labels = random_model(), random_tokens(tiny_config(), 2, 90), torch.arange(90) % 3
    agree(streamed(model, tokens, labels, block=block), dense(model, tokens, labels))


def test_chunks_with_a_cache_give_what_the_whole_text_gives():
    model, tokens, labels = random_model(), random_tokens(tiny_config(), 2, 90), torch.arange(90) % 3
    want, cache = dense(model, tokens, labels), KVCache(model.config)
    with attention(model, streaming.QUANTITIES, windows=WINDOWS, labels=labels, top=4, block=16) as stream, torch.no_grad():
        for chunk in tokens.split([1, 30, 8, 50, 1], dim=1):
            model(chunk, cache=cache)
    agree(stream.result(), want)


def test_generation_is_streamed_step_by_step():
    model, tokens = random_model(), random_tokens(tiny_config(), 1, 20)
    with attention(model, ["sink_mass", "entropy"]) as stream:
        [new] = lab.generate(model, tokens, 10, stop=())
    whole = torch.cat([tokens, torch.tensor([new[:-1]])], 1)
    want = dense(model, whole, torch.zeros(29, dtype=torch.long))
    assert (stream.result().sink_mass - want["sink_mass"]).abs().max() < 1e-9
    assert (stream.result().entropy - want["entropy"]).abs().max() < 1e-9


def test_packed_models_and_single_layers_and_float32_are_served():
    model, tokens, labels = random_model(packed=True, dtype=torch.float32), random_tokens(tiny_config(), 1, 60), torch.arange(60) % 3
    want = dense(model, tokens, labels)
    with attention(model, layers=[3, 1]) as stream, torch.no_grad():
        model(tokens)
    result = stream.result()
    assert result.layers == (3, 1) and result.within is None
    assert (result.sink_mass - want["sink_mass"][[3, 1]]).abs().max() < 1e-5


def test_flash_is_a_softmax_and_blind_rows_are_empty():
    q, k, v = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64), torch.randn(1, 2, 9, 13, dtype=torch.float64)
    visible = torch.rand(6, 9) > 0.4
    visible[2] = False
    out, lse = streaming.flash(q, k, v, visible, 0.3)
    scores = (q @ k.mT * 0.3).masked_fill(~visible, -torch.inf)
    assert torch.allclose(lse, scores.logsumexp(-1))
    assert torch.allclose(out, scores.softmax(-1).nan_to_num(0) @ v)
    assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -torch.inf).all()


def test_edited_and_removed_sinks_are_those_that_count():
    model, tokens = random_model(), random_tokens(tiny_config(), 1, 40)
    with lab.edit(model, {"*.hook_sink_scores": lambda sinks: sinks - torch.inf}), attention(model) as stream, torch.no_grad():
        model(tokens)
    result = stream.result()
    assert (result.sink_mass == 0).all() and result.entropy.isfinite().all()
    assert (result.entropy[..., 0].abs() < 1e-9).all(), "the first token has one choice"


def test_memory_grows_with_the_text_and_not_with_its_square():
    largest = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                if isinstance(one, torch.Tensor):
                    largest[length] = max(largest.get(length, 0), one.numel())
            return out

    model = random_model(LONG, dtype=torch.float32)
    for length in (512, 1024, 2048):
        with attention(model, streaming.QUANTITIES, windows=(64,), block=64) as stream, torch.no_grad(), Watch():
            cache = KVCache(LONG)
            for chunk in random_tokens(LONG, 1, length).split(128, dim=1):
                model(chunk, cache=cache, logits_to_keep=1)
        assert stream.result().sink_mass.shape[-1] == length
    assert largest[2048] < 2.5 * largest[1024] < 6.5 * largest[512]


def test_a_reduction_replaces_what_would_not_fit():
    model, tokens, labels = random_model(), random_tokens(tiny_config(), 1, 90), torch.arange(90) % 3
    want = dense(model, tokens, labels)["sink_mass"]
    with attention(model, ["sink_mass"], reduce=streaming.extremes(), block=32) as stream, torch.no_grad():
        model(tokens)
    for layer, parts in stream.reduced().items():
        masses = [part["sink_mass"] for part in parts]
        assert sum(one["n"] for one in masses) == 90
        assert torch.allclose(sum(one["sum"] for one in masses), want[layer].sum(-1))
        assert torch.allclose(torch.stack([one["most"] for one in masses]).amax(0), want[layer].amax(-1))
        assert torch.allclose(torch.stack([one["least"] for one in masses]).amin(0), want[layer].amin(-1))
        assert sum(float(one["histogram"].sum()) for one in masses) == 90 * 4
    with pytest.raises(ValueError, match="reduced"):
        stream.result()


def test_the_model_is_as_before():
    model, tokens = random_model(), random_tokens(tiny_config(), 1, 40)
    before, logits = {n: p.clone() for n, p in model.named_parameters()}, model(tokens).detach()
    with pytest.raises(RuntimeError, match="stop"), attention(model):
        model(tokens)
        raise RuntimeError("stop")
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(model(tokens), logits) and model.recordings == () and not model.blocks[0].attn.listeners


def test_results_are_saved_and_loaded(tmp_path):
    model, tokens = random_model(), random_tokens(tiny_config(), 1, 30)
    with attention(model, windows=(4,)) as stream, torch.no_grad():
        model(tokens)
    one = stream.result()
    one.save(tmp_path / "attended")
    again = Attended.load(tmp_path / "attended")
    assert again.layers == one.layers and torch.equal(again.within, one.within) and again.on is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attended.json", "attended.safetensors"]
    (tmp_path / "attended.json").write_text("{}")
    with pytest.raises(ValueError, match="not the saved result of Attended"):
        Attended.load(tmp_path / "attended")
    (tmp_path / "attended.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        Attended.load(tmp_path / "attended")
    assert issubclass(Attended, Result)


@pytest.mark.parametrize("settings, message", [
    (dict(quantities=["sinks"]), r"unknown quantities \['sinks'\]: there are sink_mass"),
    (dict(layers=[0, 7]), r"layers \[7\]: the model has 0 to 3"),
    (dict(layers=[]), "layers = "),
    (dict(windows=[0]), "windows = "),
    (dict(labels=torch.tensor([0.5])), "labels are whole numbers"),
    (dict(labels=torch.tensor([-1, 0])), "labels are whole numbers"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(settings, message):
    with pytest.raises(ValueError, match=message), attention(random_model(), **settings):
        pass


def test_what_cannot_be_streamed_is_refused():
    model, tokens = random_model(), random_tokens(tiny_config(), 2, 20)
    with attention(model) as stream:
        with pytest.raises(ValueError, match="nothing was streamed"):
            stream.result()
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        with pytest.raises(ValueError, match="padded batch"):
            model(tokens, mask)
        cache = KVCache(model.config)
        model(tokens[:, :5], cache=cache)
        cache.truncate(3)
        with pytest.raises(ValueError, match="rewound to 3 after 5"):
            model(tokens[:, 5:6], cache=cache)
    with attention(model, labels=torch.zeros(19, dtype=torch.long)), pytest.raises(ValueError, match="19 labels for a text of 20"):
        model(tokens)
