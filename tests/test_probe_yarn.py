"""Rotary planes, the ways to stretch them, and what a model does under each."""
import math
import sys
import types

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401
from shared import facts, needs_facts

import gptoss_lab as lab
from gptoss_lab import KVCache, Yarn, record
from gptoss_lab.config import TINY, published
from gptoss_lab.probes.long_texts import LossByPosition, Retrieval
from gptoss_lab.probes.score_by_distance import ScoreByDistance
from gptoss_lab.probes.yarn import WAYS, Planes, extended, rope, trained_length
from gptoss_lab.rope import rotate
from gptoss_lab.tiny import WEIGHTS

BIG = published("gpt-oss-20b")


@pytest.fixture(scope="module")
def model():
    return random_model()  # trained length 32, factor 4, context 128


@pytest.fixture
def pandas(monkeypatch):
    stub = types.ModuleType("pandas")
    stub.DataFrame = dict
    monkeypatch.setitem(sys.modules, "pandas", stub)


def state(model):
    embedding = model.rotary_emb
    heard = [dict(m.listeners) for m in model.modules() if hasattr(m, "listeners")]
    return (model.config, embedding, embedding.config, embedding.frequencies, embedding.concentration, heard,
            model.recordings, {name: x.clone() for name, x in model.state_dict().items()})  # fmt: skip


def assert_unchanged(model, before):
    now = state(model)
    assert all(a is b for a, b in zip(now[:4], before[:4])) and now[4:7] == before[4:7]
    assert all(torch.equal(now[7][name], x) for name, x in before[7].items())


def by_hand(config, way, factor):
    """Radians a token of each plane and the concentration, from the paper's definitions, in plain floats."""
    h, theta, trained = config.d_head, config.rope_theta, trained_length(config)
    base = theta * factor ** (h / (h - 2)) if way == "ntk" else theta
    out = []
    for i in range(h // 2):
        plain = base ** (-2 * i / h)
        if way == "interpolation":
            plain /= factor
        if way in ("by-parts", "yarn"):
            fast, slow = config.yarn.beta_fast, config.yarn.beta_slow
            low, high = (h * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
            ramp = min(1, max(0, (i - low) / (high - low)))
            plain = plain * (1 - ramp) + plain / factor * ramp
        out.append(plain)
    return torch.tensor(out, dtype=torch.float64), 0.1 * math.log(factor) + 1 if way == "yarn" else 1.0


# ------------------------------------------------------------------------------------------ the ways


@pytest.mark.parametrize("config", [BIG, TINY, tiny_config()], ids=["20b", "tiny", "random"])
@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 8.0, 32.0])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_turns_planes_as_the_paper_defines_it(config, way, factor):
    made = rope(config, way, factor)
    frequency, concentration = by_hand(config, way, factor)
    torch.testing.assert_close(made.frequencies, frequency, rtol=1e-12, atol=0)
    assert made.concentration == pytest.approx(concentration, rel=1e-15)
    assert made.config.n_ctx == max(config.n_ctx, factor * trained_length(config))


@needs_facts
def test_the_20b_models_frequencies_are_the_recorded_ones():
    golden = facts("yarn_reference.json")
    planes = Planes.of(BIG)
    close = lambda x, name: torch.testing.assert_close(x, torch.tensor(golden[name]).double(), rtol=3e-7, atol=0)
    close(planes.frequency, "inv_freq")
    close(planes.wavelength, "wavelength")
    assert planes.ends == pytest.approx((golden["low"], golden["high"]), rel=1e-14)
    assert planes.concentration == golden["concentration"]
    rounded = BIG.with_(yarn=Yarn(32.0, 4096, truncate=True))
    close(rope(rounded, "yarn").frequencies, "inv_freq_truncate_true")


def test_the_20b_model_keeps_nine_planes_blends_nine_and_stretches_fourteen():
    planes = Planes.of(BIG)
    assert planes.kind == ("kept",) * 9 + ("blended",) * 9 + ("stretched",) * 14
    assert (planes.n_ctx_trained, planes.n_ctx, planes.factor) == (4096, 131_072, 32.0)
    turns = [4096 * 150_000 ** (-2 * i / 64) / (2 * math.pi) for i in range(32)]
    assert planes.turns_trained.tolist() == pytest.approx(turns, rel=1e-12)
    assert turns[8] > 32 > turns[9] and turns[17] > 1 > turns[18]
    torch.testing.assert_close(planes.turns[18:], planes.turns_trained[18:])  # as many as in training
    torch.testing.assert_close(planes.turns[:9], 32 * planes.turns_trained[:9])


def test_each_way_stretches_its_own_planes():
    kinds = {way: Planes.of(TINY, way=way, factor=4).kind for way in WAYS}
    assert set(kinds["none"]) == {"kept"} and set(kinds["interpolation"]) == {"stretched"}
    assert kinds["ntk"] == ("kept",) + ("blended",) * 14 + ("stretched",)
    assert kinds["by-parts"] == kinds["yarn"] and set(kinds["yarn"]) == {"kept", "blended", "stretched"}
    assert set(Planes.of(TINY, factor=1).kind) == {"kept"}
    assert Planes.of(BIG, way="none").ends is None and Planes.of(BIG, way="by-parts").concentration == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [False, True])
def test_an_extended_model_is_one_whose_rotary_tables_were_made_so(way, packed):
    model = random_model(packed=packed)
    tokens = random_tokens(model.config, 2, 60)
    frequency, concentration = by_hand(model.config, way, 8.0)
    angle = torch.arange(60).double()[:, None] * frequency
    tables = {"rotary_emb.hook_cos": angle.cos() * concentration, "rotary_emb.hook_sin": angle.sin() * concentration}
    before = state(model)
    with torch.no_grad():
        with lab.edit(model, tables):
            expected = model(tokens)
        with extended(model, way, 8):
            torch.testing.assert_close(model(tokens), expected)
            assert model.config.n_ctx == 256
            model(random_tokens(model.config, 1, 256))
            cache = KVCache(model.config)
            chunks = torch.cat([model(chunk, cache=cache) for chunk in tokens.split(17, 1)], 1)
            torch.testing.assert_close(chunks, expected)
            assert [row[0] for row in lab.generate(model, tokens, 1)] == expected[:, -1].argmax(-1).tolist()
    assert_unchanged(model, before)


def test_yarn_at_the_models_own_factor_is_the_model(model):
    tokens = random_tokens(model.config, 1, 100)
    with torch.no_grad():
        plain = model(tokens)
        for factor in (None, 4.0):
            with extended(model, "yarn", factor):
                assert torch.equal(model(tokens), plain)


def test_a_checkpoints_own_concentration_holds_for_its_own_factor_only():
    config = tiny_config(yarn=Yarn(4.0, 32, beta_fast=4.0, attention_factor=1.5))
    assert rope(config, "yarn").concentration == 1.5
    assert rope(config, "yarn", 2).concentration == pytest.approx(0.1 * math.log(2) + 1)


def test_a_model_without_yarn_can_be_extended_from_its_context():
    config = tiny_config(yarn=None, n_ctx=32)
    assert trained_length(config) == 32
    model = random_model(config)
    with torch.no_grad(), extended(model, "yarn", 2):
        model(random_tokens(config, 1, 64))
    assert Planes.of(config).n_ctx == 32 and set(Planes.of(config).kind) == {"kept"}
    for same in (config, config.with_(yarn=Yarn(1.0, 32))):
        with pytest.raises(ValueError, match="factor is not given, and this model's positions are not stretched"):
            rope(same, "ntk")


def test_a_record_opened_before_hears_inside_and_gradients_flow(model):
    tokens = random_tokens(model.config, 1, 10)
    with record(model, "rotary_emb.hook_cos", "blocks.0.hook_resid_pre") as acts:
        with extended(model, "interpolation", 4):
            logits = model(tokens)
    angle = 9 * by_hand(model.config, "interpolation", 4)[0]
    torch.testing.assert_close(acts["rotary_emb.hook_cos"][9], angle.cos())
    assert torch.autograd.grad(logits.sum(), acts["resid_pre", 0])[0].abs().sum() > 0


def test_nothing_stays_extended_after_an_exception_nested_or_refused(model):
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), extended(model, "ntk", 2), extended(model, "none", 8):
        raise RuntimeError("stop")
    for way, factor, words in (("linear", 2, "way = 'linear': there are none, interpolation"),
                               ("yarn", 0.5, "factor = 0.5: must be at least 1"),
                               ("yarn", math.nan, "factor = nan")):  # fmt: skip
        with pytest.raises(ValueError, match=words), extended(model, way, factor):
            pass
    assert_unchanged(model, before)


def test_of_nested_blocks_the_inner_one_counts_and_other_windows_stay(model):
    from gptoss_lab.probes.windowed import windowed

    tokens = random_tokens(model.config, 1, 40)
    before = state(model)
    with torch.no_grad():
        with windowed(model, window=3), extended(model, "yarn", 2):
            expected = model(tokens)
        with extended(model, "none", 8), windowed(model, window=3), extended(model, "yarn", 2):
            assert torch.equal(model(tokens), expected)
            assert Planes.measure(model).n_ctx == 128  # of the model as it was loaded
            assert ScoreByDistance.measure(model, tokens, layer=0, head=0).n_ctx_trained == 32
    assert_unchanged(model, before)


def test_a_cache_of_another_way_is_refused(model):
    tokens, cache = random_tokens(model.config, 1, 8), KVCache(model.config)
    with torch.no_grad():
        model(tokens, cache=cache)
        with extended(model, "ntk"), pytest.raises(ValueError, match="made for another config"):
            model(tokens, cache=cache)


# ------------------------------------------------------------------------------------------ one head


def test_a_heads_score_by_distance_is_the_mean_over_all_pairs_put_so_far_apart(model):
    tokens = random_tokens(model.config, 2, 6)
    result = ScoreByDistance.measure(model, tokens, layer=2, head=3, factor=2.0)
    with torch.no_grad(), record(model, "blocks.2.attn.hook_q", "blocks.2.attn.hook_k") as acts:
        model(tokens)
    assert result.score.shape == (5, 64) and result.ways == WAYS
    for w, way in enumerate(WAYS):
        frequency, concentration = by_hand(model.config, way, 2.0)
        for distance in (0, 1, 7, 63):
            cos, sin = ((f(distance * frequency) * concentration)[None] for f in (torch.cos, torch.sin))
            still = concentration * torch.ones(1, 8).double(), torch.zeros(1, 8).double()
            total = 0.0
            for a in range(2):
                for i in range(6):
                    q = rotate(acts["q", 2][a, i, 3][None, None, None], cos, sin).flatten().tolist()
                    for b in range(2):
                        for j in range(6):
                            k = rotate(acts["k", 2][b, j, 1][None, None, None], *still).flatten().tolist()
                            total += sum(x * y for x, y in zip(q, k)) / 4  # sqrt of d_head 16
            assert result.score[w, distance].item() == pytest.approx(total / 144, abs=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_the_score_of_one_pair_is_the_one_that_the_model_computes(way):
    model = random_model(packed=True)
    tokens = random_tokens(model.config, 1, 40)
    with torch.no_grad(), extended(model, way), record(model, "blocks.1.attn.hook_[qk]", "*.hook_attn_scores") as acts:
        model(tokens)
    config = model.config
    for head, query, key in ((0, 39, 2), (3, 30, 29), (2, 5, 5)):
        made = ScoreByDistance.of(acts, config=config, layer=1, head=head, ways=(way,), query=query, key=key)
        got, expected = made.score[0, query - key].item(), acts["attn_scores", 1][0, head, query, key].item()
        assert got == pytest.approx(expected, rel=1e-9)


def test_scores_of_chunks_with_a_cache_are_those_of_one_pass(model):
    tokens, cache = random_tokens(model.config, 2, 20), KVCache(model.config)
    whole = ScoreByDistance.measure(model, tokens, layer=1, head=0)
    with torch.no_grad(), record(model, *ScoreByDistance.points) as acts:
        for chunk in tokens.split(9, 1):
            model(chunk, cache=cache)
    torch.testing.assert_close(ScoreByDistance.of(acts, config=model.config, layer=1, head=0).score, whole.score)


def test_scores_during_generation_are_those_of_the_whole_text(model):
    prompt = random_tokens(model.config, 1, 9)
    with record(model, *ScoreByDistance.points) as acts:
        new = lab.generate(model, prompt, 5, stop=())
    text = torch.cat([prompt, torch.tensor(new)], 1)[:, :-1]
    made = ScoreByDistance.of(acts, config=model.config, layer=3, head=1)
    torch.testing.assert_close(made.score, ScoreByDistance.measure(model, text, layer=3, head=1).score)


def test_scores_of_the_20b_models_whole_context_take_no_matrix_of_it():
    generator = torch.Generator().manual_seed(0)
    acts = {f"blocks.0.attn.hook_{name}": torch.randn(1, 2, heads, 64, generator=generator)
            for name, heads in (("q", 64), ("k", 8))}  # fmt: skip
    made = ScoreByDistance.of(acts, config=BIG, layer=0, head=63, ways=("by-parts", "yarn"))
    assert made.score.shape == (2, 131_072)
    torch.testing.assert_close(made.score[1], made.score[0] * 1.3465735902799727**2)
    assert 1.3465735902799727**2 == pytest.approx(1.81326, abs=5e-6)  # what concentration makes of every logit


def test_bad_heads_layers_positions_and_values_are_refused(model):
    tokens = random_tokens(model.config, 1, 5)
    measure = lambda **about: ScoreByDistance.measure(model, tokens, **({"layer": 0, "head": 0} | about))
    with pytest.raises(ValueError, match="head = 4: layer 0 has heads 0 to 3"):
        measure(head=4)
    with pytest.raises(KeyError, match="layers 0 to 3"):
        measure(layer=7)
    with pytest.raises(ValueError, match="key = 5: 5 positions"):
        measure(key=5)
    with pytest.raises(ValueError, match="way = 'x'"):
        measure(ways=("x",))
    with lab.edit(model, {"blocks.0.attn.hook_k": lambda k: k * math.nan}), pytest.raises(ValueError, match="NaN"):
        measure()


# ------------------------------------------------------------------------------------------ the whole model


@pytest.mark.parametrize("packed", [False, True])
def test_loss_by_position_is_minus_the_log_probability_of_each_next_token(packed):
    model = random_model(packed=packed)
    tokens = random_tokens(model.config, 2, 8 * 32 + 1)
    result = LossByPosition.measure(model, tokens, factors=(1, 8), ways=("none", "yarn"), chunk=100)
    assert result.loss.shape == (2, 2, 2, 256) and result.loss[0, :, :, 32:].isnan().all()
    for f, (factor, length) in enumerate(((1, 32), (8, 256))):
        for w, way in enumerate(("none", "yarn")):
            with torch.no_grad(), extended(model, way, factor):
                logits = model(tokens[:, :length])
            for row in range(2):
                for s in range(0, length, 13):
                    z = logits[row, s].tolist()
                    loss = math.log(sum(math.exp(x - max(z)) for x in z)) + max(z) - z[tokens[row, s + 1]]
                    assert result.loss[f, w, row, s].item() == pytest.approx(loss, rel=1e-5)


def test_means_of_the_loss_leave_out_what_does_not_count(model):
    tokens = random_tokens(model.config, 3, 65)
    counts = torch.rand(3, 64) < 0.6
    result = LossByPosition.measure(model, tokens, factors=(1, 2), counts=counts)
    plain = LossByPosition.measure(model, tokens, factors=(1, 2))
    mean, error = result.by_position(16)
    assert mean.shape == error.shape == (2, 5, 4) and mean[0, :, 2:].isnan().all() and error[0, :, 2:].isnan().all()
    for f, length in ((0, 32), (1, 64)):
        kept = [plain.loss[f, 3, b, s].item() for b in range(3) for s in range(length) if counts[b, s]]
        assert result.by_length()[f, 3].item() == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    rows = [[plain.loss[1, 3, b, s].item() for s in range(48, 64) if counts[b, s]] for b in range(3)]
    assert mean[1, 3, 3].item() == pytest.approx(sum(map(sum, rows)) / sum(map(len, rows)), rel=1e-5)
    means = [sum(row) / len(row) for row in rows]
    spread = sum((m - sum(means) / 3) ** 2 for m in means) / 2
    assert error[1, 3, 3].item() == pytest.approx((spread / 3) ** 0.5, rel=1e-4)


def test_at_the_trained_length_all_ways_are_one(model):
    loss = LossByPosition.measure(model, random_tokens(model.config, 1, 33), factors=(1,)).loss
    torch.testing.assert_close(loss, loss[:, :1].expand_as(loss))


def test_bad_texts_are_refused_with_a_reason(model):
    tokens = random_tokens(model.config, 2, 65)
    with pytest.raises(ValueError, match="rows of 65 tokens are too short: 8 times the trained length of 32 needs 257"):
        LossByPosition.measure(model, tokens)
    with pytest.raises(ValueError, match=r"counts is torch.bool \(1, 64\): must be bool \(2, 64\)"):
        LossByPosition.measure(model, tokens, factors=(2,), counts=torch.ones(1, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one way"):
        LossByPosition.measure(model, tokens, factors=(2,), ways=())
    with lab.edit(model, {"unembed.hook_out": lambda x: x * math.nan}), pytest.raises(ValueError, match="loss is NaN"):
        LossByPosition.measure(model, tokens, factors=(2,))


def echo(model, right):
    """A maker whose answers are the model's own under plain YaRN, made wrong where `right` says no."""

    def make(length, depth):
        prompts = random_tokens(model.config, 3, length, seed=int(100 * depth) + length).tolist()
        prompts[0] = prompts[0][2:]  # of another length: the model pads it
        answers = [lab.generate(model, [prompt], 2, stop=())[0] for prompt in prompts]
        return prompts, [a if right(length, depth, i) else [a[0], (a[1] + 1) % 61] for i, a in enumerate(answers)]

    return make


@pytest.mark.parametrize("packed", [False, True])
def test_retrieval_counts_the_prompts_whose_whole_answer_comes(packed):
    model = random_model(packed=packed)
    right = lambda length, depth, i: i < length // 20 and depth > 0
    result = Retrieval.measure(model, echo(model, right), lengths=(20, 50), depths=(0, 0.5, 1), ways=("yarn", "none"))
    assert result.found[0].tolist() == [[0, 1, 1], [0, 2, 2]] and (result.tries == 3).all()
    torch.testing.assert_close(result.share[0, 1, 1], torch.tensor(2 / 3))
    for t, length in enumerate((20, 50)):
        for d, depth in enumerate((0, 0.5, 1)):
            hits = 0
            prompts, answers = echo(model, right)(length, depth)
            for prompt, answer in zip(prompts, answers):
                with torch.no_grad(), extended(model, "none"):
                    made = []
                    for _ in answer:
                        made.append(model(torch.tensor([prompt + made]))[0, -1].argmax().item())
                hits += made == answer
            assert result.found[1, t, d] == hits
    share = (2 + 1) / (3 + 2)
    assert result.error[0, 1, 1].item() == pytest.approx((share * (1 - share) / 3) ** 0.5)


def test_an_answer_may_be_one_id_and_a_tensor_of_them(model):
    def make(length, depth):
        prompts = random_tokens(model.config, 4, length)
        with torch.no_grad():
            return prompts.tolist(), model(prompts)[:, -1].argmax(-1)

    assert Retrieval.measure(model, make, lengths=(9,), depths=(0,), ways=("yarn",)).share.tolist() == [[[1.0]]]


def test_makers_that_give_nothing_or_too_much_are_refused(model):
    measure = lambda *made, **more: Retrieval.measure(model, lambda *_: made, lengths=(9,), depths=(0,), **more)
    for prompts, answers in (([], []), ([[1, 2]], [[]]), ([[1, 2]], [3, 4])):
        with pytest.raises(ValueError, match=r"make\(9, 0\) gave \d prompts and \d answers"):
            measure(prompts, answers)
    with pytest.raises(ValueError, match="need 130 positions, the context has 128"):
        measure([[1] * 130], [2])


def needles(n):
    """A maker of lists of six pairs in the tiny vocabulary, of which the last question is for the pair at `depth`."""
    from gptoss_lab.tiny import data

    def make(length, depth):
        draw, prompts, answers = data.Draw(length), [], []
        for _ in range(n):
            things, colours = data.pairs(draw, 6)
            pair = lambda i, things=things, colours=colours: data.encode(f" {things[i]} {colours[i]},")
            filler = [pair(draw.between(0, 4)) for _ in range(length // 3)]
            head, told = data.encode(data.question(things[:5], colours[:5])), False
            for piece in filler:
                if not told and len(head) >= depth * length:
                    head, told = head + pair(5), True
                head += piece if len(head) < length - 1 or not told else []
            prompts.append(head + data.encode(f" {things[5]}"))
            answers.append(data.encode(f" {colours[5]}"))
        return prompts, answers

    return make


def test_needles_in_the_tiny_vocabulary_are_asked_of_the_tiny_model():
    result = Retrieval.measure(lab.load("tiny-random"), needles(2), lengths=(64, 160), depths=(0, 0.9), factor=4)
    assert result.found.shape == (5, 2, 2) and result.factor == 4


trained = pytest.mark.skipif(not (WEIGHTS / "model.safetensors").is_file(), reason="the trained tiny model is not here")


@trained
def test_the_trained_tiny_model_finds_far_needles_with_yarn_and_loses_them_without():
    about = dict(lengths=(96, 192), depths=(0.3,), ways=("none", "yarn"), factor=4)
    result = Retrieval.measure(lab.load("tiny"), needles(20), **about)
    (_, none_far), (yarn_near, yarn_far) = result.share[..., 0].tolist()
    assert yarn_near > 0.9 and yarn_far > 0.9 and none_far < 0.7


@trained
def test_interpolation_costs_the_trained_tiny_model_its_loss_and_the_other_ways_do_not():
    from gptoss_lab.tiny import data

    batch = data.batch(10**12 + 1, 4, 256)
    loss = LossByPosition.measure(lab.load("tiny"), batch.tokens, factors=(1, 2), counts=~batch.given[:, 1:]).by_length()
    short, (_, interpolation, *others) = loss[0].tolist(), loss[1].tolist()
    assert interpolation > 3 * short[0] and max(others) < 1.5 * short[0]


# ------------------------------------------------------------------------------------------ all of them


@pytest.fixture(scope="module")
def results(model):
    tokens, make = random_tokens(model.config, 2, 65), echo(model, lambda length, depth, i: True)
    before = state(model)
    made = [Planes.measure(model, tokens), ScoreByDistance.measure(model, tokens, layer=1, head=2),
            LossByPosition.measure(model, tokens, factors=(1, 2)),
            Retrieval.measure(model, make, lengths=(10, 20), depths=(0, 1))]  # fmt: skip
    assert_unchanged(model, before)
    return made


def test_results_survive_saving(results, tmp_path):
    for result in results:
        again = type(result).load(result.save(tmp_path / type(result).__name__))
        for name, value in vars(result).items():
            other = getattr(again, name)
            same = torch.allclose(value, other, rtol=0, atol=0, equal_nan=True) if torch.is_tensor(value) else value == other
            assert same, name


def test_frames_have_equal_columns_and_true_values(results, pandas):
    planes, scores, losses, found = (result.frame() for result in results)
    for columns, rows in ((planes, 8), (scores, 128), (losses, 2 * 5 * 8), (found, 5 * 2 * 2)):
        assert {len(column) for column in columns.values()} == {rows}
    assert scores["yarn"][7] == results[1].score[4, 7].item()
    at = 1 * 5 * 8 + 4 * 8 + 3  # factor 2, yarn, the fourth stretch of 8 positions
    assert (losses["factor"][at], losses["way"][at], losses["position"][at]) == (2, "yarn", 24)
    assert losses["loss"][at] == results[2].by_position()[0][1, 4, 3].item()
    at = 4 * 4 + 1 * 2 + 0  # yarn, 20 tokens, depth 0
    assert (found["way"][at], found["length"][at], found["depth"][at], found["share"][at]) == ("yarn", 20, 0, 1)


def test_pictures_say_what_to_look_for(results):
    pytest.importorskip("matplotlib")
    words = ("rotary planes", "score of layer 1, head 2", "loss beyond the trained length", "is a fact found again?")
    for result, start in zip(results, words):
        picture = result.plot()
        assert picture.get_suptitle().startswith(start) and len(picture.png()) > 5000
