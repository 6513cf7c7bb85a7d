"""How far heads look, which positions reach an output, and what another window changes."""
import base64
import sys
import types

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401
from shared import facts, needs_facts

import gptoss_lab as lab
from gptoss_lab import KVCache, edit, record
from gptoss_lab.config import FULL, SLIDING, ConfigError, published
from gptoss_lab.probes.receptive_field import ReceptiveField, reachable
from gptoss_lab.probes.windowed import Moved, windowed
from gptoss_lab.probes.windows import Distances, windows_of
from gptoss_lab.tiny import WEIGHTS

LENGTH = 30  # the window is 8


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokens(model):
    return random_tokens(model.config, 2, LENGTH)


def recorded(model, tokens, *more):
    with torch.no_grad(), record(model, *Distances.points, *more) as acts:
        model(tokens)
    return acts


def by_hand(pattern, queries):
    """Mass by distance of one layer, [H][D], with loops: pattern [b][H][s][t], queries a set of (row, query)."""
    rows, heads, s, t = pattern.shape
    mass = [[0.0] * t for _ in range(heads)]
    for b, i in queries:
        for h in range(heads):
            for j in range(t):
                back = t - s + i - j
                if back >= 0:
                    mass[h][back] += pattern[b, h, i, j].item() / len(queries)
    return torch.tensor(mass, dtype=torch.float64)


def frozen(model):
    """All that a probe must leave as it is."""
    weights = {name: (x.clone(), x.grad, x.requires_grad) for name, x in model.state_dict(keep_vars=True).items()}
    heard = [(dict(m.listeners), m) for m in model.modules() if hasattr(m, "listeners")]
    return weights, heard, model.config, [(b.attn.config, b.attn.window) for b in model.blocks], model.recordings


def assert_unchanged(model, before):
    weights, heard, config, attentions, recordings = before
    for name, x in model.state_dict(keep_vars=True).items():
        assert torch.equal(x, weights[name][0]) and x.grad is weights[name][1] and x.requires_grad == weights[name][2]
    assert all(module.listeners == listeners for listeners, module in heard)
    assert model.config is config and [(b.attn.config, b.attn.window) for b in model.blocks] == attentions
    assert model.recordings == recordings == ()


@pytest.fixture
def pandas(monkeypatch):
    stub = types.ModuleType("pandas")
    stub.DataFrame = dict
    monkeypatch.setitem(sys.modules, "pandas", stub)


# ------------------------------------------------------------------------------------------ distances


@pytest.mark.parametrize("packed", [False, True])
def test_mass_by_distance_is_the_mean_along_diagonals(tokens, packed):
    model = random_model(packed=packed)
    result, acts = Distances.measure(model, tokens), recorded(model, tokens)
    every = {(b, i) for b in range(2) for i in range(LENGTH)}
    for layer in range(4):
        torch.testing.assert_close(result.mass[layer], by_hand(acts["pattern", layer], every))
        torch.testing.assert_close(result.sink[layer], acts["sink_mass", layer].mean((0, 2)))
    torch.testing.assert_close(result.mass.sum(-1) + result.sink, torch.ones(4, 4).double())
    torch.testing.assert_close(result.on_keys, 1 - result.sink)
    assert result.layers == (0, 1, 2, 3) and result.windows == (8, None, 8, None)


def test_no_mass_lies_behind_the_window_of_a_sliding_layer(model, tokens):
    result = Distances.measure(model, tokens)
    assert (result.cut(8)[0::2] == 0).all() and (result.cut(7)[0::2] > 0).all() and (result.cut(8)[1::2] > 0).all()


def test_only_chosen_queries_count(model, tokens):
    queries = torch.rand(2, LENGTH) < 0.3
    result, acts = Distances.measure(model, tokens, queries=queries), recorded(model, tokens)
    chosen = {tuple(pair) for pair in queries.nonzero().tolist()}
    torch.testing.assert_close(result.mass[1], by_hand(acts["pattern", 1], chosen))
    mean = sum(acts["sink_mass", 1][b, :, i] for b, i in chosen) / len(chosen)
    torch.testing.assert_close(result.sink[1], mean)


def test_reach_cut_and_mean_distance_follow_from_the_mass():
    mass = torch.tensor([[[0.1, 0.2, 0.0, 0.2], [0.5, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.float64)
    result = Distances(mass, 1 - mass.sum(-1), (0,))
    assert result.reach(0.5).tolist() == [[1, 0, -1]]  # 0.3 of 0.5 lie within 1
    assert result.reach(0.6).tolist() == [[1, 0, -1]] and result.reach(0.61).tolist() == [[3, 0, -1]]
    assert result.reach(1).tolist() == [[3, 0, -1]]
    assert result.cut(1).tolist() == [[0.4, 0, 0]] and result.cut(9).tolist() == [[0, 0, 0]]
    torch.testing.assert_close(result.mean_distance[0, :2], torch.tensor([0.8 / 0.5, 0.0]).double())
    assert result.mean_distance[0, 2].isnan()


def test_reach_agrees_with_a_search_on_a_real_run(model, tokens):
    result = Distances.measure(model, tokens)
    for layer in range(4):
        for head in range(4):
            mass, total = result.mass[layer, head].tolist(), result.mass[layer, head].sum().item()
            d = next(d for d in range(LENGTH) if sum(mass[: d + 1]) >= 0.9 * total - 1e-12)
            assert result.reach()[layer, head] == d


def test_chunks_with_a_cache_and_one_pass_have_the_same_distances(model, tokens):
    whole = Distances.measure(model, tokens)
    cache = KVCache(model.config)
    with torch.no_grad(), record(model, *Distances.points) as acts:
        for chunk in tokens.split(11, 1):
            model(chunk, cache=cache)
    torch.testing.assert_close(Distances.of(acts).mass, whole.mass)


def test_the_last_chunk_alone_knows_how_far_back_its_keys_are(model, tokens):
    cache = KVCache(model.config)
    with torch.no_grad():
        model(tokens[:, :20], cache=cache)
        with record(model, *Distances.points) as acts:
            model(tokens[:, 20:], cache=cache)
    late = torch.arange(LENGTH) >= 20
    whole = Distances.measure(model, tokens, queries=late.expand(2, -1))
    torch.testing.assert_close(Distances.of(acts).mass, whole.mass)


def test_distances_during_generation_of_padded_prompts_are_those_of_each_alone(model, tokens):
    prompts = [tokens[0, :20].tolist(), tokens[1, :13].tolist()]
    with record(model, *Distances.points) as acts:
        new = lab.generate(model, prompts, 6, stop=())
    read = 20 + 5
    padding = torch.zeros(2, read, dtype=torch.bool)
    padding[1, :7] = True
    both = Distances.of(acts, queries=~padding)
    alone = [Distances.measure(model, torch.tensor([p + n])[:, :-1]) for p, n in zip(prompts, new)]
    sizes = torch.tensor([25, 18])
    second = torch.nn.functional.pad(alone[1].mass, (0, 7))
    torch.testing.assert_close(both.mass, (alone[0].mass * sizes[0] + second * sizes[1]) / sizes.sum())


def test_half_precision_rows_are_near_enough_to_1(tokens):
    model = random_model(dtype=torch.bfloat16)
    assert Distances.measure(model, tokens).mass.dtype == torch.float64


def test_bad_distances_are_refused_with_a_reason(model, tokens):
    acts = recorded(model, tokens)
    with pytest.raises(ValueError, match=r"queries is torch.bool \(2, 3\): must be bool \(2, 30\)"):
        Distances.of(acts, queries=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="queries chooses no position"):
        Distances.of(acts, queries=torch.zeros(2, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="windows names 2 layers, recorded is layer 3"):
        Distances.of(acts, windows=(8, None))
    with pytest.raises(ValueError, match="attn.hook_pattern was not recorded"):
        Distances.of({})
    halve = {"blocks.2.attn.hook_pattern": lambda p: p / 2}
    with edit(model, halve), pytest.raises(ValueError, match="layer 2: a row of the pattern and its sink sum to"):
        Distances.measure(model, tokens)
    with edit(model, {"blocks.1.attn.hook_q": lambda q: q * torch.nan}), pytest.raises(ValueError, match="1.attn.*NaN"):
        Distances.measure(model, tokens)
    result = Distances.of(acts)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="share"):
            result.reach(share)
    with pytest.raises(ValueError, match="window = 0"):
        result.cut(0)


@needs_facts
def test_recorded_rows_of_the_20b_model_have_the_known_sink_mass_and_almost_nothing_on_the_first_token():
    entry = facts("golden_20b_reference_intermediates.json")["boundaries"]
    raw = entry["layer0_final_token_attention_probs_post_softmax"]
    bits = bytearray(base64.b64decode(raw["values_bf16_b64"]))
    rows = torch.frombuffer(bits, dtype=torch.bfloat16).view(raw["shape"])  # [H, keys + sink]
    acts = {"blocks.0.attn.hook_pattern": rows[None, :, None, :-1], "blocks.0.attn.hook_sink_mass": rows[None, :, -1:]}
    result = Distances.of(acts, windows=windows_of(published("gpt-oss-20b")))
    assert result.windows == (128,) and result.mass.shape == (1, 64, 74)
    assert result.sink.mean().item() == pytest.approx(0.434, abs=5e-4)
    assert result.mass[0, :, 73].mean().item() == pytest.approx(0.0009, abs=5e-5)  # the first token is 73 back
    assert (result.cut(128) == 0).all()


# ------------------------------------------------------------------------------------------ receptive field


def walk(config, position):
    """By following every edge of the graph, one layer after the other."""
    rows, reached = [], {position}
    for layer in reversed(range(config.n_layers)):
        window = config.window(layer)
        reached = {j for i in reached for j in range(i + 1) if window is None or i - j < window}
        rows.append([j in reached for j in range(position + 1)])
    return torch.tensor(rows[::-1])


KINDS = {
    "alternating": (SLIDING, FULL, SLIDING, FULL), "all slide": (SLIDING,) * 4, "none slides": (FULL,) * 4,
    "last three slide": (FULL, SLIDING, SLIDING, SLIDING), "swapped": (FULL, SLIDING, FULL, SLIDING),
}  # fmt: skip


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("window", [1, 2, 5])
def test_reachable_positions_are_those_that_a_walk_over_the_graph_finds(kinds, window):
    config = tiny_config(layer_types=kinds, sliding_window=window)
    for position in (0, 3, 29):
        assert torch.equal(reachable(config, position), walk(config, position))


def test_sliding_layers_alone_carry_three_windows_less_their_own_keys():
    config = tiny_config(layer_types=(SLIDING,) * 4, sliding_window=8)
    assert reachable(config, 60).sum(1).tolist() == [4 * 7 + 1, 3 * 7 + 1, 2 * 7 + 1, 7 + 1]


def test_the_20b_model_reaches_everything_below_its_last_full_layer():
    can = reachable(published("gpt-oss-20b"), 5000)
    assert can.shape == (24, 5001) and can.all()  # layer 23 is full


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_gradient_is_zero_exactly_where_there_is_no_path(kinds):
    model = random_model(tiny_config(layer_types=kinds, sliding_window=5))
    result = ReceptiveField.measure(model, random_tokens(model.config, 2, LENGTH), position=24)
    assert torch.equal(result.norm > 0, result.can[:, None].expand_as(result.norm))
    assert torch.equal(result.can[:, :25], walk(model.config, 24)) and not result.can[:, 25:].any()


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_what_small_steps_of_the_stream_do(packed):
    model = random_model(packed=packed)
    tokens = random_tokens(model.config, 2, 12)
    choose = lambda logits: logits[:, 7]
    result = ReceptiveField.measure(model, tokens, position=10, output=choose)
    step, place = 1e-5, [(0, 0, 3), (1, 1, 10), (3, 0, 2)]
    for layer, row, position in place:
        slopes = []
        for dimension in range(model.config.d_model):
            values = []
            for sign in (1, -1):
                def nudge(x, sign=sign, dimension=dimension, row=row, position=position):
                    x[row, position, dimension] += sign * step
                    return x

                with torch.no_grad(), edit(model, {f"blocks.{layer}.hook_resid_pre": nudge}):
                    values.append(model(tokens)[row, 10, 7].item())
            slopes.append((values[0] - values[1]) / (2 * step))
        norm = sum(slope**2 for slope in slopes) ** 0.5
        assert result.norm[layer, row, position].item() == pytest.approx(norm, rel=1e-5)


def test_rows_of_a_batch_have_the_field_that_each_has_alone(model, tokens):
    both = ReceptiveField.measure(model, tokens)
    for row in range(2):
        alone = ReceptiveField.measure(model, tokens[row : row + 1])
        torch.testing.assert_close(both.norm[:, row], alone.norm[:, 0])
    assert both.position == LENGTH - 1


def test_field_share_and_reach_follow_from_the_norm():
    norm = torch.tensor([[[3.0, 0, 1, 2, 0]]]).double()
    result = ReceptiveField(norm, norm[:, 0] > 0, 3)
    torch.testing.assert_close(result.share, norm**2 / 14)
    assert result.reach(0.25).tolist() == [[0]] and result.reach(5 / 14).tolist() == [[1]]
    assert result.reach(0.36).tolist() == [[3]] and result.reach(1).tolist() == [[3]]


def test_a_field_of_frozen_weights_and_under_no_grad_is_the_same(model, tokens):
    expected = ReceptiveField.measure(model, tokens)
    other = random_model().requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(ReceptiveField.measure(other, tokens).norm, expected.norm)


def test_a_field_of_what_was_recorded_with_gradients_is_that_of_measure(model, tokens):
    with record(model, *ReceptiveField.points) as acts:
        model(tokens)
    for position in (5, -1):
        made = ReceptiveField.of(acts, config=model.config, position=position)
        torch.testing.assert_close(made.norm, ReceptiveField.measure(model, tokens, position=position).norm)


def test_bad_fields_are_refused_with_a_reason(model, tokens):
    of = lambda acts, **about: ReceptiveField.of(acts, config=model.config, **about)
    with pytest.raises(ValueError, match="position = 30: there are 30 positions, give -30 to 29"):
        ReceptiveField.measure(model, tokens, position=30)
    with pytest.raises(ValueError, match="must be at least 0"):
        reachable(model.config, -1)
    with pytest.raises(ValueError, match=r"output gave shape \(2, 61\)"):
        ReceptiveField.measure(model, tokens, output=lambda logits: logits)
    with torch.no_grad(), record(model, *ReceptiveField.points) as acts:
        model(tokens)
    with pytest.raises(ValueError, match="recorded without gradients"):
        of(acts)
    with record(model, "blocks.1.hook_resid_pre", "unembed.hook_out") as acts:
        model(tokens)
    with pytest.raises(ValueError, match=r"recorded in layers \(1,\): this probe needs all 4"):
        of(acts)
    cache = KVCache(model.config)
    with record(model, *ReceptiveField.points) as acts:
        for chunk in tokens.split(15, 1):
            model(chunk, cache=cache)
    with pytest.raises(ValueError, match="record one pass, without a cache"):
        of(acts)


# ------------------------------------------------------------------------------------------ another window


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("change", [dict(window=3), dict(window=20), dict(sliding=()), dict(sliding=(1, 3)),
                                    dict(sliding=range(4), window=2)], ids=str)  # fmt: skip
def test_a_windowed_model_is_the_model_that_was_built_so(tokens, change, packed):
    model = random_model(packed=packed)
    types = model.config.layer_types
    if "sliding" in change:
        types = tuple(SLIDING if layer in change["sliding"] else FULL for layer in range(4))
    config = model.config.with_(sliding_window=change.get("window", 8), layer_types=types)
    built = random_model(config, packed=packed)
    with torch.no_grad():
        plain = model(tokens)
        with windowed(model, **change):
            torch.testing.assert_close(model(tokens), built(tokens), rtol=0, atol=0)
            cache = KVCache(model.config)
            chunks = torch.cat([model(chunk, cache=cache) for chunk in tokens.split(7, 1)], 1)
            torch.testing.assert_close(chunks, built(tokens))
            assert lab.generate(model, tokens, 4, stop=()) == lab.generate(built, tokens, 4, stop=())
        assert torch.equal(model(tokens), plain)


def test_windows_are_restored_after_an_exception_and_when_nested(model):
    before = frozen(model)
    with pytest.raises(RuntimeError, match="stop"), windowed(model, window=3), windowed(model, sliding=()):
        assert windows_of(model.config) == (None,) * 4 and model.config.sliding_window == 3
        raise RuntimeError("stop")
    assert_unchanged(model, before)


def test_a_cache_of_other_windows_is_refused(model, tokens):
    cache = KVCache(model.config)
    with torch.no_grad():
        model(tokens[:, :5], cache=cache)
        with windowed(model, window=4), pytest.raises(ValueError, match="made for another config"):
            model(tokens[:, 5:], cache=cache)


def test_windows_that_cannot_be_are_refused_and_change_nothing(model):
    before = frozen(model)
    with pytest.raises(ValueError, match=r"sliding names layers \[4\]: this model has layers 0 to 3"):
        with windowed(model, sliding=(0, 4)):
            pass
    with pytest.raises(ConfigError, match="sliding_window = 0"):
        with windowed(model, window=0):
            pass
    assert_unchanged(model, before)


@pytest.mark.parametrize("packed", [False, True])
def test_what_moved_is_the_difference_of_the_two_runs_head_by_head(tokens, packed):
    model = random_model(packed=packed)
    result = Moved.measure(model, tokens, window=3)
    acts = recorded(model, tokens, "*.hook_result", "unembed.hook_out")
    with windowed(model, window=3):
        other = recorded(model, tokens, "*.hook_result", "unembed.hook_out")
    for layer in range(4):
        for head in range(4):
            moved = change = wrote = 0.0
            for b in range(2):
                for s in range(LENGTH):
                    row = [x["pattern", layer][b, head, s].tolist() + [x["sink_mass", layer][b, head, s].item()]
                           for x in (acts, other)]  # fmt: skip
                    moved += sum(abs(p - q) for p, q in zip(*row)) / 2 / (2 * LENGTH)
                    y, z = (x["result", layer][b, s, head].tolist() for x in (acts, other))
                    change += sum((p - q) ** 2 for p, q in zip(y, z)) ** 0.5
                    wrote += sum(p**2 for p in y) ** 0.5
            assert result.pattern[layer, head].item() == pytest.approx(moved, abs=1e-12)
            assert result.output[layer, head].item() == pytest.approx(change / wrote, rel=1e-9, abs=1e-12)
    p, q = (x["unembed.hook_out"].softmax(-1) for x in (acts, other))
    torch.testing.assert_close(result.kl, (p * (p / q).log()).sum(-1))
    assert result.before == (8, None, 8, None) and result.after == (3, None, 3, None) and not result.direct


def test_a_layer_whose_window_stays_does_not_move_directly(model, tokens):
    total, direct = Moved.measure(model, tokens, window=3), Moved.measure(model, tokens, window=3, direct=True)
    assert (direct.pattern[1::2] < 1e-12).all() and (direct.output[1::2] < 1e-9).all()
    assert (direct.pattern[0::2] > 1e-3).all() and (total.pattern[1::2] > 1e-3).all()
    torch.testing.assert_close(direct.pattern[0], total.pattern[0])  # nothing before the first layer changed
    assert (direct.kl < 1e-12).all()  # the last layer is full


def test_the_same_windows_move_nothing(model, tokens):
    result = Moved.measure(model, tokens, window=8, sliding=(0, 2))
    assert result.pattern.max() == result.output.max() == result.kl.abs().max() == 0


def test_runs_that_do_not_match_are_refused(model, tokens):
    acts, short = (recorded(model, x, *Moved.points) for x in (tokens, tokens[:, :9]))
    out = [block.attn.out.weight for block in model.blocks]
    with pytest.raises(ValueError, match="run the same tokens"):
        Moved.of(acts, short, out=out)
    with pytest.raises(ValueError, match="there are 3 output projections"):
        Moved.of(acts, acts, out=out[1:])


# ------------------------------------------------------------------------------------------ all three


def results(model, tokens):
    return [Distances.measure(model, tokens), ReceptiveField.measure(model, tokens), Moved.measure(model, tokens, window=3)]


def test_measuring_leaves_the_model_as_it_was(model, tokens):
    before = frozen(model)
    results(model, tokens)
    assert_unchanged(model, before)


def test_results_survive_saving(model, tokens, tmp_path):
    for result in results(model, tokens):
        again = type(result).load(result.save(tmp_path / type(result).__name__))
        for name, value in vars(result).items():
            same = torch.equal(value, getattr(again, name)) if torch.is_tensor(value) else value == getattr(again, name)
            assert same, name


def test_frames_have_one_row_a_head_or_place(model, tokens, pandas):
    distances, field, moved = (result.frame() for result in results(model, tokens))
    for columns, rows in ((distances, 16), (field, 4 * 2 * LENGTH), (moved, 16)):
        assert {len(column) for column in columns.values()} == {rows}
    assert distances["layer"].tolist() == sorted([0, 1, 2, 3] * 4) and distances["head"].tolist() == [0, 1, 2, 3] * 4
    at = 2 * 2 * LENGTH + LENGTH + 5  # layer 2, row 1, position 5
    expected = ReceptiveField.measure(model, tokens)
    assert field["norm"][at] == expected.norm[2, 1, 5].item() and field["can"][at] == expected.can[2, 5].item()
    assert (field["layer"][at], field["row"][at], field["position"][at]) == (2, 1, 5)
    assert moved["after"][:5] == [3, 3, 3, 3, None]


def test_pictures_say_what_to_look_for(model, tokens):
    pytest.importorskip("matplotlib")
    for result, words in zip(results(model, tokens), ("how far back", "which positions", "which heads")):
        picture = result.plot()
        assert picture.get_suptitle().startswith(words) and len(picture.png()) > 5000
    Distances.of(recorded(model, tokens[:, :1])).plot()


def test_distances_of_a_shipped_model_need_nothing_but_its_name():
    model = lab.load("tiny-random")
    result = Distances.measure(model, random_tokens(model.config, 1, 60))
    assert result.windows == (16, None, 16, None) and (result.cut(16)[0::2] == 0).all()


@pytest.mark.skipif(not (WEIGHTS / "model.safetensors").is_file(), reason="the trained tiny model is not here")
def test_full_layers_of_the_trained_tiny_model_look_further_than_its_sliding_ones():
    from gptoss_lab.tiny import data

    model, tokens = lab.load("tiny"), data.batch(10**12, 4, 128).read
    result = Distances.measure(model, tokens, queries=(torch.arange(128) >= 64).expand(4, -1))
    assert result.reach()[1::2].max() > 16 > result.reach()[0::2].max()
    assert result.cut(16)[1::2].max() > 0.2
    moved = Moved.measure(model, tokens, window=8)
    assert 0 < moved.kl.mean() < 1 and moved.pattern.max() < 0.9
