"""Explorers draw what the model does, answer their controls, say what goes wrong, and leave the model as it was."""
import base64
import html
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import one_thread, random_model, tiny_config, tiny_random  # noqa: F401

import gptoss_lab as lab
from gptoss_lab import GptOss, explore
from gptoss_lab.config import FULL, SLIDING, published
from gptoss_lab.explore import panel, texts
from gptoss_lab.explore.attention import attended
from gptoss_lab.explore.block import held, packed
from gptoss_lab.explore.context import ROWS, stretched
from gptoss_lab.explore.experts import WAYS, without
from gptoss_lab.explore.groups import shared
from gptoss_lab.explore.rotation import pair, turned
from gptoss_lab.explore.sink import OFF, OFFSETS, reading, written
from gptoss_lab.explore.window import copied
from gptoss_lab.probes.yarn import extended

PROMPT = "find cat red, dog blue? dog"
MOVES = {  # explorer: controls moved one after the other
    "attention": {"prompt": "Tom had a red ball", "layer": 2, "head": 3},
    "experts": {"prompt": "Tom had a red ball", "layer": 2, "expert": 3, "way": list(WAYS)[1]},
    "window": {"sliding 1": True, "window": 3, "period": 9, "layer": 0, "head": 2},
    "context": {"way": "ntk", "factor": 2, "period": 10},
    "sink": {"prompt": "Tom had a red ball", "layer": 2, "head": 1, "offset": OFF},
    "rotation": {"prompt": "find cat red, dog blue", "layer": 3, "head": 1, "key": 5, "distance": 9},
    "groups": {"prompt": "Tom had a red ball", "layer": 2, "group": 1},
    "scaling": {"factor": 8},
    "block": {"index": 7, "code sign": False, "code mantissa": True, "exponent": 2},
}
READS = [name for name in MOVES if name not in ("scaling", "block")]  # the others run no model


@pytest.fixture(scope="module")
def model():
    return tiny_random()


def tokens_of(model, prompt=PROMPT):
    return torch.tensor([model.tokenizer.encode(prompt)])


def made(model, name, **about):
    if name not in READS:
        about.pop("live", None)
    return explore.block(**about) if name == "block" else getattr(explore, name)(model, **about)


def frozen(model):
    """All that an explorer must leave as it is."""
    rotary = model.rotary_emb
    return {
        "weights": {name: x.detach().clone() for name, x in model.state_dict().items()},
        "rotary": (rotary.frequencies.clone(), torch.tensor(rotary.concentration)),
    }, {
        "config": model.config, "rotary config": rotary.config, "training": model.training,
        "attention": [(block.attn.config, block.attn.window) for block in model.blocks],
        "gradients": [(x.requires_grad, x.grad) for x in model.parameters()],
        "heard": model.listened_to, "recordings": model.recordings, "enabled": torch.is_grad_enabled(),
    }  # fmt: skip


def assert_unchanged(model, before):
    tensors, facts = frozen(model)
    assert facts == before[1] and not facts["heard"] and facts["recordings"] == ()
    assert all(torch.equal(x, before[0]["weights"][name]) for name, x in tensors["weights"].items())
    assert all(torch.equal(x, y) for x, y in zip(tensors["rotary"], before[0]["rotary"], strict=True))


def images(fig):
    return [image.get_array() for ax in fig.axes for image in ax.images]


def close(drawn, x):
    return np.allclose(np.ma.filled(drawn, 0), x.float().numpy(), atol=1e-6)


def shows_picture(output):
    found = re.fullmatch(r'<img alt="([^"]+)".* src="data:image/png;base64,([^"]+)">', output)
    return bool(found) and base64.b64decode(found[2]).startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------ what they read


def test_a_prompt_is_read_with_special_tokens_and_without_a_vocabulary_as_ids(model):
    assert texts.read(model, PROMPT).tolist() == tokens_of(model).tolist()
    [special] = model.tokenizer.encode("<|return|>", allowed_special="all")
    assert texts.read(model, "red<|return|>").tolist()[0][-1] == special
    assert texts.read(random_model(), "3, 1 4").tolist() == [[3, 1, 4]]


@pytest.mark.parametrize("prompt, least, words", [
    ("", 1, "0 tokens: type at least 1"), (" red", 2, "1 tokens: type at least 2"),
    (" red" * 129, 1, "129 tokens, the model's context is 128"),
])  # fmt: skip
def test_a_prompt_that_does_not_fit_is_refused(model, prompt, least, words):
    with pytest.raises(ValueError, match=words):
        texts.read(model, prompt, least)


def test_a_prompt_longer_than_a_picture_shows_is_refused_whatever_the_context():
    wide = random_model(tiny_config(n_ctx=2000, yarn=None))
    with pytest.raises(ValueError, match="513 tokens, what a picture can show is 512"):
        texts.read(wide, "1 " * 513)
    with pytest.raises(ValueError, match="type numbers with spaces"):
        texts.read(wide, "one two")


def test_random_tokens_are_neither_special_nor_bytes_nor_padding_and_come_again(model):
    drawn = texts.random_tokens(model, 4, 200)
    pieces = range(256, len(model.tokenizer.token_byte_values()))
    assert set(drawn.flatten().tolist()) <= set(pieces) and len(drawn.unique()) > 100
    assert torch.equal(drawn, texts.random_tokens(model, 4, 200))
    padded = random_model(tiny_config(pad_token=5))
    assert 5 not in texts.random_tokens(padded, 4, 400) and texts.random_tokens(padded, 4, 400).max() < 61


# ------------------------------------------------------------------------------------------ what they draw


@pytest.mark.parametrize("layer, head", [(0, 1), (3, 2)])
def test_head_picture_draws_the_pattern_and_its_sink_and_greys_what_the_layer_cannot_see(layer, head):
    model = random_model()  # its window is 8
    prompt = " ".join(map(str, torch.randint(0, 61, (20,)).tolist()))
    sink, pattern = images(explore.head_picture(model, prompt, layer, head))
    _, acts = model.run_with_cache(texts.read(model, prompt), "*")
    assert close(pattern, acts["pattern", layer][0, head].detach())
    assert close(sink[:, 0], acts["sink_mass", layer][0, head].detach())
    query, key = np.indices(pattern.shape)
    seen = (key <= query) & ((query - key < 8) | (layer % 2 == 1))
    assert (np.ma.getmaskarray(pattern) == ~seen).all()


def test_head_picture_says_the_share_of_the_sink_and_names_every_token(model):
    fig = explore.head_picture(model, PROMPT, 1, 0)
    _, sink = attended(model, tokens_of(model), 1)
    assert f"layer 1 (sees all before it), head 0: a bright cell is a token read; {sink[0].mean():.0%}" in fig.get_suptitle()
    assert [text.get_text() for text in fig.axes[0].get_xticklabels()][:3] == ["sink", "find", "␣cat"]


def test_dropping_an_expert_is_what_a_router_logit_of_minus_infinity_gives(model):
    tokens = tokens_of(model)
    logits, acts = model.run_with_cache(tokens, "*")
    expert = acts["expert_indices", 1][0, -1, 0].item()

    def never(logits):
        logits[..., expert] = -torch.inf

    with torch.no_grad(), lab.edit(model, {"blocks.1.mlp.hook_router_logits": never}):
        edited = model(tokens)
    found = without(model, tokens, 1, expert)
    assert torch.allclose(found.before, logits[0, -1].softmax(-1), atol=1e-6)
    assert torch.allclose(found.after, edited[0, -1].softmax(-1), atol=1e-6) and not torch.allclose(found.before, found.after)
    for i in range(1, tokens.shape[1]):
        for x, loss in ((logits, found.effect.before), (edited, found.effect.after)):
            assert loss[0, i - 1].item() == pytest.approx(-x[0, i - 1].log_softmax(-1)[tokens[0, i]].item(), abs=1e-5)
    assert found.taken.tolist() == [expert in row for row in acts["expert_indices", 1][0].tolist()]


def test_silencing_takes_the_output_away_and_leaving_it_changes_nothing(model):
    tokens = tokens_of(model)
    _, acts = model.run_with_cache(tokens, "*")
    expert = acts["expert_indices", 2][0, -1, 0].item()
    weights = acts["expert_weights", 2].masked_fill(acts["expert_indices", 2] == expert, 0).detach()
    with torch.no_grad(), lab.edit(model, {"blocks.2.mlp.hook_expert_weights": weights}):
        silent = model(tokens)
    drop, silence, leave = (without(model, tokens, 2, expert, way) for way in WAYS)
    assert torch.allclose(silence.after, silent[0, -1].softmax(-1), atol=1e-6)
    assert not torch.allclose(silence.after, drop.after, atol=1e-4)
    assert torch.equal(leave.before, leave.after) and leave.effect.change == 0


def test_expert_picture_draws_both_models_side_by_side_and_marks_who_took_the_expert(model):
    found = without(model, tokens_of(model), 0, 3)
    above, below = explore.expert_picture(model, PROMPT, 0, 3).axes
    ids = torch.maximum(found.before, found.after).topk(10).indices
    heights = [bar.get_height() for bar in above.patches]
    assert np.allclose(heights, torch.cat([found.before[ids], found.after[ids]]))
    assert np.allclose([bar.get_height() for bar in below.patches], torch.cat([found.effect.before[0], found.effect.after[0]]))
    assert below.lines[0].get_xdata().tolist() == found.taken.nonzero().flatten().tolist()


def test_copied_gives_loss_and_induction_scores_as_loops_do():
    model, period = random_model(dtype=torch.float32), 6
    tokens = texts.random_tokens(model, 1, period).repeat(1, 2)
    found = copied(model, tokens, period, 2, 1)
    logits, acts = model.run_with_cache(tokens, "*")
    for i in range(1, 2 * period):
        assert found.loss[i - 1].item() == pytest.approx(-logits[0, i - 1].log_softmax(-1)[tokens[0, i]].item(), abs=1e-5)
        for j in range(2 * period):
            assert found.seen[i, j].item() == (0 <= i - j < 8)
    for l in range(4):
        for h in range(4):
            pattern = acts["pattern", l][0, h]
            score = sum(pattern[i, i - period + 1].item() for i in range(period, 2 * period)) / period
            assert found.scores[l, h].item() == pytest.approx(score, abs=1e-6)
    assert torch.allclose(found.pattern, acts["pattern", 2][0, 1], atol=1e-6)


def test_window_picture_draws_the_model_as_it_is_and_one_made_with_the_other_windows():
    model, period = random_model(dtype=torch.float32), 10
    kinds = tuple(SLIDING if layer in (1, 2) else FULL for layer in range(4))
    other = GptOss(model.config.with_(sliding_window=5, layer_types=kinds))
    other.load_state_dict(model.state_dict())
    tokens = texts.random_tokens(model, 1, period).repeat(1, 2)
    before, after = (copied(m, tokens, period, 1, 2) for m in (model, other))
    fig = explore.window_picture(model, (1, 2), 5, period, 1, 2)
    assert all(close(drawn, x) for drawn, x in zip(images(fig), (before.pattern, after.pattern, before.scores, after.scores)))
    assert (np.ma.getmaskarray(images(fig)[1]) == ~after.seen.numpy()).all()
    below = next(ax for ax in fig.axes if len(ax.lines) == 3)
    assert np.allclose(below.lines[0].get_ydata(), before.loss) and np.allclose(below.lines[1].get_ydata(), after.loss)
    assert f"{before.scores[1, 2]:.2f} → {after.scores[1, 2]:.2f}" in fig.get_suptitle()


def test_window_explorer_begins_with_the_head_that_copies_best_and_the_models_own_windows(model):
    explorer = explore.window(model)
    tokens = texts.random_tokens(model, 1, 24).repeat(1, 2)
    best = copied(model, tokens, 24, 0, 0).scores.flatten().argmax().item()
    values = explorer.values
    assert (values["layer"], values["head"]) == divmod(best, model.config.n_heads)
    assert (list(values["sliding"]), values["window"]) == ([0, 2], model.config.sliding_window)
    assert explore.window(model, layer=2).values["layer"] == 2


def test_expert_explorer_begins_with_the_first_choice_of_the_last_token(model):
    _, acts = model.run_with_cache(tokens_of(model), "*.hook_expert_indices")
    assert explore.experts(model, layer=2).values["expert"] == acts["expert_indices", 2][0, -1, 0].item()
    assert explore.experts(model, "", layer=2).values["expert"] == 0
    assert explore.experts(model, expert=5).values["expert"] == 5


def test_stretched_gives_the_loss_of_the_model_in_both_ways(model):
    found = stretched(model, "ntk", 2, 20)
    assert found.ways == ("none", "ntk") and found.loss.shape == (1, 2, ROWS, 256)
    tokens = texts.random_tokens(model, ROWS, 20).repeat(1, 13)[:, :257]
    for w, way in enumerate(found.ways):
        with torch.no_grad(), extended(model, way, 2):
            logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        assert torch.allclose(found.loss[0, w], loss, atol=1e-4)


def test_context_picture_draws_the_mean_of_each_copy_and_says_it_beyond_the_line(model):
    found = stretched(model, "yarn", 2, 20)
    ax = explore.context_picture(model, "yarn", 2, 20).axes[0]
    for w, line in enumerate(ax.lines[:2]):
        loss = found.loss[0, w]
        by_hand = [loss[:, i : i + 20].mean().item() for i in range(0, 256, 20)]
        assert np.allclose(line.get_ydata(), by_hand, atol=1e-5)
        assert f"{loss[:, 128:].mean():.2f} beyond the line" in line.get_label()
    assert len(explore.context_picture(model, "none", 1, 20).axes[0].lines) == 3  # no second way, no loss beyond


def test_the_tiny_model_copies_until_the_layers_that_reach_the_first_copy_slide():
    model = lab.load("tiny")
    tokens = texts.random_tokens(model, 1, 24).repeat(1, 2)
    explorer = explore.window(model, live=False)
    layer, head = explorer.values["layer"], explorer.values["head"]
    assert copied(model, tokens, 24, layer, head).scores[layer, head] > 0.5
    for i in range(model.config.n_layers):
        explorer.controls[f"sliding {i}"].value = True
    explorer.button.click()
    assert "→ 0.00" in explorer.output.value


# A head of random_model whose sink takes a middling share of the last token.
IDS = "3 1 4 1 5 9 2 6 5 3 5 8"


@pytest.mark.parametrize("offset", [OFF, -2.0, 0.0, 3.0])
def test_a_sink_that_draws_more_or_less_gives_what_a_loop_over_the_scores_gives(offset):
    model, layer, head = random_model(), 2, 1  # a window of 8
    tokens = texts.read(model, IDS)
    with torch.no_grad():
        _, acts = model.run_with_cache(tokens, "*")
    scores = acts["attn_scores", layer][0, head, -1].tolist()
    logit = model.blocks[layer].attn.sinks[head].item() + offset
    most = max([*scores, logit])
    total = sum(math.exp(x - most) for x in [*scores, logit])
    keys = [math.exp(x - most) / total for x in scores]
    values = acts["v", layer][0, :, head // 2]
    z = sum(p * v for p, v in zip(keys, values))
    found = reading(model, tokens, layer, head, offset)
    assert found.logit == pytest.approx(logit) and found.mass == pytest.approx(math.exp(logit - most) / total, abs=1e-9)
    assert found.keys.tolist() == pytest.approx(keys, abs=1e-6) and found.norm == pytest.approx(z.norm().item())


def test_sink_picture_draws_the_head_as_learned_beside_the_other_and_the_keys_among_themselves():
    model, tokens = random_model(), texts.read(random_model(), IDS)
    before, after = (reading(model, tokens, 1, 2, offset) for offset in (0.0, -3.0))
    fig = explore.sink_picture(model, IDS, 1, 2, -3.0, note="random weights")
    above, shares, norm = fig.axes
    heights = lambda ax: [bar.get_height() for bar in ax.patches]
    assert np.allclose(heights(above), [before.mass, after.mass, *before.keys, *after.keys])
    half = len(shares.patches) // 2
    assert np.allclose(heights(shares)[:half], before.keys / (1 - before.mass), atol=1e-6)
    assert np.allclose(heights(shares)[:half], heights(shares)[half:], atol=1e-6)
    assert np.allclose([bar.get_width() for bar in norm.patches], [before.norm, after.norm]) and after.norm > before.norm
    assert f"logit {before.logit:.2f} → {after.logit:.2f} (random weights)" in fig.get_suptitle()


def test_sink_explorer_begins_with_the_head_that_rests_most_on_the_last_token(model):
    _, acts = model.run_with_cache(tokens_of(model), "*.hook_sink_mass")
    masses = torch.stack([acts["sink_mass", i][0, :, -1] for i in range(4)])
    values = explore.sink(model).values
    assert (values["layer"], values["head"]) == divmod(masses.argmax().item(), 4)
    assert explore.sink(model, layer=1).values["head"] == masses[1].argmax() and explore.sink(model, "").values["layer"] == 0


def test_a_turned_pair_scores_what_the_model_scored_and_what_a_loop_over_planes_gives():
    model, layer, head = random_model(), 3, 2  # YaRN of factor 4, concentration above 1
    tokens = texts.read(model, IDS)
    with torch.no_grad():
        _, acts = model.run_with_cache(tokens, "*")
    q, k = pair(model, tokens, layer, head)
    s, scale = tokens.shape[1], 16**-0.5
    score = lambda a, b: (turned(model, q, torch.tensor([a])) * turned(model, k, torch.tensor([b]))).sum().item() * scale
    assert score(s - 1, s - 2) == pytest.approx(acts["attn_scores", layer][0, head, -1, -2].item())
    frequencies, strength = model.rotary_emb.frequencies.tolist(), model.rotary_emb.concentration
    for a, b in ((9, 4), (25, 20), (4, 4)):
        by_hand = 0
        for i, f in enumerate(frequencies):
            (c, d), (x, y) = ([v[i].item(), v[i + 8].item()] for v in (q, k))
            turn = (a - b) * f
            by_hand += (c * math.cos(turn) - d * math.sin(turn)) * x + (d * math.cos(turn) + c * math.sin(turn)) * y
        assert score(a, b) == pytest.approx(by_hand * strength**2 * scale)


def test_rotation_picture_draws_the_score_by_distance_and_moving_both_changes_nothing_in_it(model):
    one, other = (explore.rotation_picture(model, PROMPT, 1, 1, key, 7).axes[-1] for key in (0, 30))
    q, k = pair(model, tokens_of(model), 1, 1)
    by_hand = [(turned(model, q, torch.tensor([d + 3])) @ turned(model, k, torch.tensor([3])).T).item() * 32**-0.5 for d in range(64)]
    for ax in (one, other):
        assert np.allclose(ax.lines[1].get_ydata(), by_hand, atol=1e-5)
        assert ax.lines[2].get_xdata() == [7] and np.allclose(ax.lines[2].get_ydata(), by_hand[7], atol=1e-5)


def test_rotation_explorer_begins_with_the_head_that_reads_the_token_before(model):
    _, acts = model.run_with_cache(texts.read(model, "Tom had a red ball"), "*.hook_pattern")
    scores = [[sum(acts["pattern", i][0, h, t, t - 1].item() for t in range(1, acts["pattern", i].shape[2])) for h in range(4)] for i in range(4)]
    values = explore.rotation(model).values
    assert scores[values["layer"]][values["head"]] == max(map(max, scores))


def test_scaling_picture_of_the_published_model_draws_its_ramp_its_lengths_and_its_concentration():
    fig = explore.scaling_picture(published("gpt-oss-20b"), 32)
    above, below, right = fig.axes
    low, high = (32 * math.log(4096 / (beta * 2 * math.pi)) / math.log(150_000) for beta in (32, 1))
    marks = {x: y for line in below.lines[:3] for x, y in zip(line.get_xdata(), line.get_ydata())}
    waves = {x: y for line in above.lines[1:4] for x, y in zip(line.get_xdata(), line.get_ydata())}
    for p in range(32):
        kept = min(1, max(0, 1 - (p - low) / (high - low)))
        assert marks[p] == pytest.approx(kept, abs=1e-6)
        frequency = 150_000 ** (-p / 32)
        assert waves[p] == pytest.approx(2 * math.pi / (frequency * kept + frequency / 32 * (1 - kept)), rel=1e-6)
    assert "4,096 positions × 32 = 131,072: of 32 planes 9 kept, 9 blended, 14 stretched" in fig.get_suptitle()
    assert right.get_title() == "concentration 1.3466" and right.lines[1].get_ydata() == [pytest.approx(0.1 * math.log(32) + 1)]


def test_scaling_explorer_takes_a_model_or_a_config_and_begins_with_its_own_factor(model):
    assert explore.scaling(published("gpt-oss-120b")).values == {"factor": 32} and explore.scaling(model).values == {"factor": 1}
    assert "of 16 planes 16 kept" in explore.scaling(model).picture().get_suptitle()


def test_groups_picture_draws_the_heads_of_the_group_and_says_what_they_share():
    model = random_model()
    pattern, sink = attended(model, texts.read(model, IDS), 2)
    fig = explore.groups_picture(model, IDS, 2, 1)
    drawn = images(fig)
    for i, head in enumerate((2, 3)):
        assert close(drawn[2 * i][:, 0], sink[head]) and close(drawn[2 * i + 1], pattern[head])
    alike = 0
    for query in range(12):
        alike += min(sink[2, query].item(), sink[3, query].item())
        alike += sum(min(pattern[2, query, t].item(), pattern[3, query, t].item()) for t in range(12))
    assert shared(pattern[2:], sink[2:]) == pytest.approx(alike / 12) and f"key head 1; {alike / 12:.0%} of what" in fig.get_suptitle()
    assert shared(pattern[:1], sink[:1]) == pytest.approx(1)


def test_a_block_holds_what_the_standard_says_of_each_code():
    x = torch.randn(32, generator=torch.Generator().manual_seed(1)) * 3
    codes, exponent = packed(x)
    assert exponent == math.floor(math.log2(x.abs().max().item())) - 2
    raw, values = held(codes, exponent)
    for i, code in enumerate(codes.tolist()):
        sign, e, m = code >> 3, code >> 1 & 3, code & 1
        magnitude = m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1)
        assert values[i].item() == (-1) ** sign * magnitude * 2.0**exponent
        assert raw[i // 2].item() >> (4 if i % 2 else 0) & 15 == code
    above, middle, _ = explore.block_picture(x, 5, 0b1101, exponent + 1).axes
    codes[5] = 0b1101
    _, values = held(codes, exponent + 1)
    assert np.allclose([bar.get_height() for bar in above.patches][:32], values) and values[5] == -3 * 2.0 ** (exponent + 1)
    assert np.allclose(above.lines[0].get_ydata(), x)
    told = [text.get_text() for text in middle.texts]
    assert "1101" in told and f"{13 * 16 + codes[4].item():02x}" in told


def test_the_boxes_of_the_bits_give_the_code_the_highest_first():
    explorer = explore.block(code=0b1010)
    assert [explorer.controls[f"code {name}"].value for name in ("sign", "exponent 2", "exponent 1", "mantissa")] == [True, False, True, False]
    explorer.controls["code mantissa"].value = True
    explorer.controls["code sign"].value = False
    assert explorer.values["code"] == 0b0011


@pytest.mark.parametrize("call, words", [
    (lambda m: explore.head_picture(m, PROMPT, 4, 0), "layer 4 does not exist: this model has layers 0 to 3"),
    (lambda m: explore.head_picture(m, PROMPT, 0, -1), "head -1 does not exist"),
    (lambda m: explore.expert_picture(m, PROMPT, 0, 16), "expert 16 does not exist: this model has experts 0 to 15"),
    (lambda m: explore.expert_picture(m, PROMPT, 0, 1, "kick"), "way = 'kick'"),
    (lambda m: explore.expert_picture(m, " red", 0, 1), "type at least 2"),
    (lambda m: explore.window_picture(m, (0,), 8, 65, 0, 0), "period = 65: two copies of 2 to 64"),
    (lambda m: explore.window_picture(m, (7,), 8, 9, 0, 0), r"layers \[7\]"),
    (lambda m: explore.window_picture(m, (0,), 0, 9, 0, 0), "sliding_window = 0"),
    (lambda m: explore.window_picture(m, (0,), 8, 9, 0, 4), "head 4 does not exist"),
    (lambda m: explore.window(m, layer=9), "layer 9 does not exist"),
    (lambda m: explore.experts(m, layer=9), "layer 9 does not exist"),
    (lambda m: explore.window(m, period=1), "period = 1"),
    (lambda m: explore.context_picture(m, "magic", 2, 9), "way = 'magic'"),
    (lambda m: explore.context_picture(m, "yarn", 0.5, 9), "factor = 0.5"),
    (lambda m: explore.context_picture(m, "yarn", 2, 65), "period = 65"),
    (lambda m: explore.attention(m, layer=4), "layer = 4: must be a whole number from 0 to 3"),
    (lambda m: explore.attention(m, prompt=5), "prompt = 5: must be text"),
    (lambda m: explore.context(m, factor=3), "factor = 3: must be one of 1, 2, 4, 8"),
    (lambda m: explore.sink_picture(m, PROMPT, 0, 4), "head 4 does not exist"),
    (lambda m: explore.sink_picture(m, PROMPT, 0, 0, math.inf), "offset = inf: must be a number of nats, or minus infinity"),
    (lambda m: explore.sink_picture(m, PROMPT, 0, 0, math.nan), "offset = nan"),
    (lambda m: explore.sink(m, offset=0.5), "offset = 0.5: must be one of -inf, -8.0"),
    (lambda m: explore.sink(m, layer=9), "layer 9 does not exist"),
    (lambda m: explore.rotation_picture(m, " red", 0, 0, 0, 1), "type at least 2"),
    (lambda m: explore.rotation_picture(m, PROMPT, 0, 0, 64, 1), "key = 64: must be from 0 to 63"),
    (lambda m: explore.rotation_picture(m, PROMPT, 0, 0, 0, -1), "distance = -1: must be from 0 to 63"),
    (lambda m: explore.rotation(m, head=4), "head 4 does not exist"),
    (lambda m: pair(m, tokens_of(m)[:, :1], 0, 0), "1 tokens: a query and another token's key need 2"),
    (lambda m: explore.groups_picture(m, PROMPT, 0, 2), "group 2 does not exist: this model has groups 0 to 1"),
    (lambda m: explore.groups(m, group=-1), "group = -1: must be a whole number from 0 to 1"),
    (lambda m: explore.scaling_picture(m, 0.5), "factor = 0.5"),
    (lambda m: explore.scaling(m, factor=65), "factor = 65: must be a whole number from 1 to 64"),
    (lambda m: explore.block(torch.zeros(31)), r"x \(31,\) holds 31 numbers: a block of MXFP4 holds 32"),
    (lambda m: explore.block(torch.full((32,), math.nan)), "finite numbers only"),
    (lambda m: explore.block(index=32), "index = 32: must be a whole number from 0 to 31"),
    (lambda m: explore.block(code=16), "code = 16: must be a whole number from 0 to 15"),
    (lambda m: explore.block_picture(torch.zeros(32), 0, 0, 128), "exponent = 128: must be from -127 to 127"),
    (lambda m: explore.attention(m, kept={"layer": [4]}), "layer = 4: must be a whole number from 0 to 3"),
    (lambda m: explore.attention(m, kept={"word": [4]}), "kept names 'word': name one or two of the controls 'prompt'"),
    (lambda m: explore.attention(m, kept={}).frames(), "keeps no values"),
])  # fmt: skip
def test_what_does_not_exist_is_named(model, call, words):
    before = frozen(model)
    with pytest.raises(ValueError, match=words):
        call(model)
    assert_unchanged(model, before)


def test_nan_is_named(model):
    broken = random_model(dtype=torch.float32)
    with torch.no_grad():
        broken.ln_final.weight[0] = torch.nan
    explorer = explore.experts(broken, prompt="1 2 3")
    assert "NaN" in explorer.output.value and not shows_picture(explorer.output.value)


# ------------------------------------------------------------------------------------------ the controls


@pytest.mark.parametrize("name", MOVES)
def test_every_control_changes_the_output_and_none_changes_the_model(model, name):
    before = frozen(model)
    explorer = made(model, name)
    seen = [explorer.output.value]
    assert set(explorer.controls) >= set(MOVES[name]) and explorer.button is None
    for control, value in MOVES[name].items():
        explorer.controls[control].value = value
        assert shows_picture(explorer.output.value) and explorer.output.value not in seen, control
        seen.append(explorer.output.value)
        assert_unchanged(model, before)
    assert explorer.status.value == ""


@pytest.mark.parametrize("name", ["attention", "experts"])
@pytest.mark.parametrize("prompt, words", [("", "0 tokens"), (" red" * 200, "200 tokens, the model's context is 128")])
def test_a_prompt_that_does_not_fit_is_said_in_the_output_and_mended_by_the_next(model, name, prompt, words):
    before, explorer = frozen(model), made(model, name)
    first = explorer.output.value
    explorer.controls["prompt"].value = prompt
    assert words in html.unescape(explorer.output.value) and "<img" not in explorer.output.value
    assert_unchanged(model, before)
    explorer.controls["prompt"].value = PROMPT
    assert explorer.output.value == first


@pytest.mark.parametrize("name", READS)
def test_a_model_that_fails_midway_is_put_back_and_its_words_are_shown_as_text(model, name, monkeypatch):
    explorer, before = made(model, name, live=False), frozen(model)
    passes, forward = [], model.unembed.forward

    def fails(x):
        passes.append(1)
        if len(passes) == (2 if name in ("experts", "window", "context", "sink") else 1):  # in the second pass, with the edit or the window in place
            raise RuntimeError("no <b>memory</b>")
        return forward(x)

    for control, value in MOVES[name].items():
        explorer.controls[control].value = value
    monkeypatch.setattr(model.unembed, "forward", fails)
    explorer.button.click()
    assert passes and not explorer.button.disabled and explorer.status.value == ""
    assert "RuntimeError: no &lt;b&gt;memory&lt;/b&gt;" in explorer.output.value
    assert_unchanged(model, before)


def test_a_large_model_waits_for_its_run_button_and_says_that_it_works(model):
    before, drawn, told = frozen(model), [], []

    def draw(**values):
        drawn.append(values)
        told.append((explorer.status.value, explorer.button.disabled))
        return explore.head_picture(model, **values)

    controls = {"prompt": panel.Text(PROMPT), "layer": panel.Whole(0, 0, 3), "head": panel.Whole(0, 0, 3)}
    explorer = panel.Explorer("attention", draw, controls, live=False)
    assert explorer.output.value == "" and "press Run" in explorer.status.value
    explorer.controls["layer"].value = 2
    explorer.controls["head"].value = 3
    assert not drawn and "changed: press Run" in explorer.status.value
    explorer.button.click()
    assert drawn == [{"prompt": PROMPT, "layer": 2, "head": 3}] and told == [("<em>working …</em>", True)]
    assert shows_picture(explorer.output.value) and explorer.status.value == "" and not explorer.button.disabled
    assert_unchanged(model, before)


def test_whether_it_waits_depends_on_the_size_of_the_model(model, monkeypatch):
    assert explore.attention(model).live and not explore.attention(model, live=False).live
    monkeypatch.setattr(panel, "QUICK", 1000)
    assert not explore.attention(model).live and explore.attention(model, live=True).live


def test_the_boxes_of_the_sliding_layers_give_their_numbers(model):
    explorer = explore.window(model, live=False)
    explorer.controls["sliding 0"].value = False
    explorer.controls["sliding 3"].value = True
    assert explorer.values["sliding"] == (2, 3)


def test_a_prompt_of_several_lines_gets_a_field_of_several_lines(model):
    assert type(explore.attention(model, "one\ntwo").controls["prompt"]).__name__ == "Textarea"
    assert type(explore.attention(model).controls["prompt"]).__name__ == "Text"


# ------------------------------------------------------------------------------------------ in a notebook


@pytest.mark.parametrize("name", MOVES)
def test_a_notebook_gets_the_view_and_a_still_picture_with_words_for_who_cannot_see_it(model, name):
    explorer = made(model, name)
    bundle, about = explorer._repr_mimebundle_()
    assert bundle[panel.VIEW] == {"version_major": 2, "version_minor": 0, "model_id": explorer.widget.model_id}
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert about["image/png"]["alt"] == explorer.picture().get_suptitle()
    assert bundle["text/plain"] == repr(explorer) and " at 0x" not in repr(explorer)
    assert bundle["image/png"] in explorer.output.value


def test_the_still_is_the_same_each_time(model):
    one, other = (explore.attention(model)._repr_mimebundle_()[0] for _ in range(2))
    assert one["image/png"] == other["image/png"]


def test_a_notebook_gets_words_where_there_is_no_picture(model):
    bundle, about = explore.attention(model, "")._repr_mimebundle_()
    assert "0 tokens" in bundle["text/html"] and "image/png" not in bundle and about == {}


def test_without_ipywidgets_the_still_is_shown_and_the_controls_say_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explorer = explore.attention(model)
    bundle, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG") and panel.VIEW not in bundle
    assert "pip install 'ipywidgets>=7.7'" in bundle["text/plain"]
    with pytest.raises(ImportError, match="need ipywidgets: pip install"):
        explorer.controls  # noqa: B018


def test_a_notebook_that_is_to_be_kept_gets_a_slider_through_pictures_of_the_model(model, monkeypatch):
    monkeypatch.setenv(panel.STILL, "1")
    explorer = explore.attention(model, layer=1, kept={"layer": [0, 2], "head": [0, 3]}, note="random weights")
    bundle, about = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", "text/html"} and explorer._widget is None
    frames = explorer.frames()
    assert bundle["text/html"] == frames._repr_html_() and base64.b64decode(bundle["image/png"]) == frames.still
    assert frames.controls == {"layer": ["0", "1", "2"], "head": ["0", "3"]} and frames.start == [1, 0]
    titles = [explore.head_picture(model, PROMPT, layer, head, note="random weights").get_suptitle() for layer in (0, 1, 2) for head in (0, 3)]
    assert frames.alts == titles and about == {"image/png": {"alt": titles[2]}} and titles[2].endswith("(random weights)")


def test_with_nothing_kept_or_with_too_much_a_notebook_gets_the_still_or_is_told(model, monkeypatch):
    monkeypatch.setenv(panel.STILL, "1")
    assert set(explore.attention(model, kept={})._repr_mimebundle_()[0]) == {"text/plain", "image/png"}
    monkeypatch.setattr(panel, "KEPT", 1000)
    bundle, _ = explore.groups(model, kept={"layer": [0]})._repr_mimebundle_()
    assert "bytes, 1,000 are allowed" in bundle["text/html"] and "image/png" not in bundle


def test_what_is_kept_by_default_takes_at_most_200_kb_of_an_output(monkeypatch):
    monkeypatch.setenv(panel.STILL, "1")
    model = lab.load("tiny")
    for name in MOVES:
        bundle, _ = made(model, name, note="the tiny model")._repr_mimebundle_()
        assert set(bundle) == {"text/plain", "image/png", "text/html"} and sum(map(len, bundle.values())) <= 200_000, name


def test_the_labels_of_what_is_kept_are_those_of_the_controls():
    assert explore.block(code=5, kept={"code": [5, 12]}).frames().controls == {"code": ["0101", "1100"]}
    assert panel.Along(OFF, OFFSETS, written).written(OFF) == "off"
    assert panel.Some((0,), 3).written(()) == "none" and panel.Some((0,), 3).written((0, 2)) == "0, 2"


@pytest.mark.parametrize("name", MOVES)
def test_nothing_is_used_that_nbclient_can_wait_for_for_ever(model, name):
    def kinds(widget):
        return {type(widget).__name__}.union(*map(kinds, getattr(widget, "children", ())))

    assert kinds(made(model, name, live=False).widget) <= {"VBox", "Box", "HTML", "Label", "Text", "IntSlider", "SelectionSlider", "Dropdown", "Checkbox", "Button"}


def test_it_is_imported_without_ipywidgets_and_matplotlib():
    code = "import sys, gptoss_lab.explore; print([m for m in ('ipywidgets', 'matplotlib', 'IPython') if m in sys.modules])"
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "[]"
