"""The logit lens, the tuned lens, and direct attribution."""
import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

import gptoss_lab as lab
from gptoss_lab import KVCache
from gptoss_lab.probes.attribution import Attribution
from gptoss_lab.probes.lens import LogitLens, TunedLens, read_out, readings

CONFIG = tiny_config()


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "packed"])
def model(request):
    return random_model(CONFIG, packed=request.param)


def tokens(batch=2, length=30, seed=0):
    return random_tokens(CONFIG, batch, length, seed)


# --- the lens ---


def test_each_reading_is_the_last_step_of_the_model_on_an_earlier_stream(model):
    x = tokens()
    lens = LogitLens.measure(model, x, top=3)
    assert lens.kl.shape == (9, 2, 30) and lens.labels[:3] == ["embed", "0 attention", "0 experts"]
    for layer in range(4):  # stopping the model before layer + 1 and going on by hand
        with torch.no_grad():
            stream = model(x, stop_at_layer=layer) if layer else model.embed(x)
            for b, s in ((0, 3), (1, 29)):
                row = stream[b, s]
                normed = row / (row.square().mean() + CONFIG.norm_eps).sqrt() * model.ln_final.weight
                p = torch.softmax(torch.stack([normed @ w for w in model.unembed.weight]), 0)
                i = 2 * layer
                assert torch.allclose(lens.top_prob[i, b, s], p.topk(3).values)
                assert torch.equal(lens.top_ids[i, b, s], p.topk(3).indices)
                assert lens.entropy[i, b, s] == pytest.approx(float(-(p * p.log()).sum()))
                if s < 29:
                    assert lens.target_prob[i, b, s] == pytest.approx(float(p[x[b, s + 1]]))


def test_the_last_reading_is_the_output(model):
    x = tokens()
    lens = LogitLens.measure(model, x)
    with torch.no_grad():
        p = model(x).softmax(-1)
    assert torch.allclose(lens.top_prob[-1], p.topk(5).values) and lens.kl[-1].abs().max() < 1e-12
    assert (lens.kl[:-1] > 0).all() and lens.target_prob[..., -1].isnan().all()


def test_a_target_of_ones_own_may_be_asked_for(model):
    x = tokens()
    want = torch.full_like(x, 5)
    lens = LogitLens.measure(model, x, target=want)
    with torch.no_grad():
        assert torch.allclose(lens.target_prob[-1], model(x).softmax(-1)[..., 5])


def test_the_lens_reads_chunks_and_generation_too(model):
    x = tokens(1)
    whole = LogitLens.measure(model, x)
    cache = KVCache(CONFIG)
    with lab.record(model, *LogitLens.points) as acts, torch.no_grad():
        for chunk in x.split([11, 1, 18], dim=1):
            model(chunk, cache=cache)
    assert torch.allclose(LogitLens.of(acts, model=model, tokens=x).kl, whole.kl)
    with lab.record(model, *LogitLens.points) as acts:
        [new] = lab.generate(model, x, 4, stop=())
    text = torch.cat([x, torch.tensor([new[:-1]])], 1)
    assert torch.equal(LogitLens.of(acts, model=model, tokens=text).top_ids[-1, 0, -4:, 0], torch.tensor(new))


def test_what_does_not_belong_together_is_refused(model):
    with lab.record(model, *LogitLens.points) as acts, torch.no_grad():
        model(tokens())
    with pytest.raises(ValueError, match=r"tokens are \(2, 29\), the recorded stream \(2, 30\)"):
        LogitLens.of(acts, model=model, tokens=tokens()[:, 1:])
    with pytest.raises(ValueError, match=r"target is \(2, 3\)"):
        LogitLens.of(acts, model=model, tokens=tokens(), target=tokens()[:, :3])
    with lab.record(model, "hook_embed") as acts, torch.no_grad():
        model(tokens())
    with pytest.raises(ValueError, match="hook_resid_mid was not recorded"):
        readings(acts)
    with pytest.raises(ValueError, match="no batches"):
        TunedLens.train_on(model, [])


def test_a_tuned_lens_begins_as_the_plain_one_and_comes_nearer_to_the_output(model):
    x = tokens(4)
    plain = LogitLens.measure(model, x)
    assert torch.equal(LogitLens.measure(model, x, lens=TunedLens(model)).kl, plain.kl)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lens = TunedLens.train_on(model, [tokens(8, 40, seed) for seed in range(1, 60)], lr=1e-2)
    tuned = LogitLens.measure(model, x, lens=lens)
    assert lens.losses[-1] < 0.8 * lens.losses[0]
    assert tuned.kl[:-1].mean() < 0.8 * plain.kl[:-1].mean() and torch.equal(tuned.kl[-1], plain.kl[-1])
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def test_read_out_is_in_float32_for_narrow_models():
    narrow = random_model(CONFIG, dtype=torch.bfloat16)
    assert read_out(narrow, torch.zeros(3, 32, dtype=torch.bfloat16)).dtype == torch.float32
    assert LogitLens.measure(narrow, tokens()).kl.isfinite().all()


# --- attribution ---


@pytest.mark.parametrize("position", [-1, 0, 17])
def test_the_parts_sum_to_the_logit(model, position):
    x, answer = tokens(3), torch.tensor([4, 9, 60])
    parts = Attribution.measure(model, x, answer=answer, position=position)
    with torch.no_grad():
        logits = model(x)[torch.arange(3), position, answer]
    assert torch.allclose(parts.logit, logits)
    assert (parts.total - logits).abs().max() < 1e-10 * logits.abs().max()
    assert parts.head.shape == parts.sink.shape == (4, 3, 4) and parts.expert.shape == parts.experts.shape == (4, 3, 3)


def test_a_difference_of_logits_is_the_difference_of_the_parts(model):
    x, answer, against = tokens(2), torch.tensor([4, 9]), torch.tensor([7, 7])
    both = Attribution.measure(model, x, answer=answer, against=against)
    one, other = (Attribution.measure(model, x, answer=ids) for ids in (answer, against))
    for name in ("embed", "head", "sink", "bias", "expert", "logit"):
        assert torch.allclose(getattr(both, name), getattr(one, name) - getattr(other, name)), name
    assert torch.allclose(both.by_layer().sum((0, 1)) + both.embed, both.logit)


def test_a_part_is_what_a_plain_loop_makes_of_the_weights(model):
    x, position, row, token = tokens(), 12, 1, 33
    parts = Attribution.measure(model, x, answer=torch.tensor([0, token]), position=position)
    with torch.no_grad(), lab.record(model, "*") as acts:
        model(x)
    direction = (model.unembed.weight[token] * model.ln_final.weight).detach() / acts["ln_final.hook_scale"][row, position]
    for layer in range(4):
        block = model.blocks[layer]
        for head in range(4):
            p, v = acts["pattern", layer][row, head, position], acts["v", layer][row, :, head // 2]
            z = sum(p[t] * v[t] for t in range(30))
            alone = z / p.sum()  # what the head would read if its tokens had all of the mass
            w = block.attn.out.weight.detach()[:, head * 16 : head * 16 + 16]
            assert float(parts.head[layer, row, head]) == pytest.approx(float((w @ alone) @ direction))
            assert float(parts.sink[layer, row, head]) == pytest.approx(float((w @ (z - alone)) @ direction))
        for k in range(3):
            expert, weight = acts["expert_indices", layer][row, position, k], acts["expert_weights", layer][row, position, k]
            assert int(parts.experts[layer, row, k]) == int(expert)
            out = acts["expert_out", layer][row, position, k]
            assert float(parts.expert[layer, row, k]) == pytest.approx(float(weight * (out @ direction)))


def test_with_the_final_norm_frozen_taking_a_part_away_takes_its_logit(model):
    """Causally: the last layer's attention, removed, changes the frozen logit by what is attributed to it."""
    x, answer = tokens(1), torch.tensor([3])
    parts = Attribution.measure(model, x, answer=answer)
    with torch.no_grad(), lab.record(model, "ln_final.hook_scale", ("resid_post", 3), ("expert_out", 3), ("expert_weights", 3)) as acts:
        model(x)
    final, scale = acts["resid_post", 3][0, -1], acts["ln_final.hook_scale"][0, -1]
    without = final - acts["expert_weights", 3][0, -1, 0] * acts["expert_out", 3][0, -1, 0]
    change = (final - without) / scale * model.ln_final.weight.detach() @ model.unembed.weight[3].detach()
    assert float(parts.expert[3, 0, 0]) == pytest.approx(float(change))


def test_wrong_answers_and_positions_are_named(model):
    with pytest.raises(ValueError, match=r"answer has shape \(1,\): one id for each of 2 rows"):
        Attribution.measure(model, tokens(), answer=torch.tensor([1]))
    with pytest.raises(ValueError, match="position 30: the text has 30"):
        Attribution.measure(model, tokens(), answer=torch.tensor([1, 2]), position=30)


def test_a_head_that_gives_its_sink_everything_is_named():
    model = random_model(CONFIG)
    with torch.no_grad():
        model.blocks[2].attn.sinks[1] = 1e9
    with pytest.raises(ArithmeticError, match="head 1 of layer 2"):
        Attribution.measure(model, tokens(), answer=torch.tensor([1, 2]))


def test_results_are_saved_loaded_and_listed(model, tmp_path, monkeypatch):
    import sys
    import types

    parts = Attribution.measure(model, tokens(), answer=torch.tensor([1, 2]))
    again = Attribution.load(parts.save(tmp_path / "parts"))
    assert torch.allclose(again.total, parts.total) and torch.equal(again.experts, parts.experts)
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
    rows = parts.frame(row=1)
    assert sum(rows["logit"]) == pytest.approx(float(parts.logit[1])) and rows["part"][0] == "embed"
    lens = LogitLens.measure(model, tokens()).frame()
    assert len(lens["kl"]) == len(lens["reading"]) == len(lens["position"]) == 9 * 30
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="frame.. needs pandas"):
        parts.frame()


def test_the_lens_is_drawn_as_a_table_of_words(model):
    from gptoss_lab import tokenizer

    x = tokens(1, 12)
    picture = LogitLens.measure(model, x).plot(tokenizer.tiny(), x, note="random weights")
    [ax, bar] = picture.axes
    assert len(ax.texts) == 9 * 12 and "random weights" in picture.get_suptitle()
    assert ax.get_yticklabels()[0].get_text() == "embed" and bar.get_ylabel() == "probability"
    assert picture.png()[:4] == b"\x89PNG"


def test_the_table_of_a_row_that_was_not_read_is_refused(model):
    x = tokens()
    lens = LogitLens.measure(model, x)
    for other, row in ((x, len(x)), (x[:, 1:], 0)):
        with pytest.raises(ValueError, match="were read"):
            lens.plot(None, other, row=row)
