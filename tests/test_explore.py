"""Explorers draw what the model does, answer their controls, say what goes wrong, and leave the model as it was."""
import base64
import html
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
from gptoss_lab.config import FULL, SLIDING
from gptoss_lab.explore import panel, texts
from gptoss_lab.explore.attention import attended
from gptoss_lab.explore.context import ROWS, stretched
from gptoss_lab.explore.experts import WAYS, without
from gptoss_lab.explore.window import copied
from gptoss_lab.probes.yarn import extended

PROMPT = "find cat red, dog blue? dog"
MOVES = {  # explorer: controls moved one after the other
    "attention": {"prompt": "Tom had a red ball", "layer": 2, "head": 3},
    "experts": {"prompt": "Tom had a red ball", "layer": 2, "expert": 3, "way": list(WAYS)[1]},
    "window": {"sliding 1": True, "window": 3, "period": 9, "layer": 0, "head": 2},
    "context": {"way": "ntk", "factor": 2, "period": 10},
}


@pytest.fixture(scope="module")
def model():
    return tiny_random()


def tokens_of(model, prompt=PROMPT):
    return torch.tensor([model.tokenizer.encode(prompt)])


def made(model, name, **about):
    return getattr(explore, name)(model, **about)


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


@pytest.mark.parametrize("name", MOVES)
def test_a_model_that_fails_midway_is_put_back_and_its_words_are_shown_as_text(model, name, monkeypatch):
    explorer, before = made(model, name, live=False), frozen(model)
    passes, forward = [], model.unembed.forward

    def fails(x):
        passes.append(1)
        if len(passes) == (1 if name == "attention" else 2):  # in the second pass, with the edit or the window in place
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

    def draw(model, **values):
        drawn.append(values)
        told.append((explorer.status.value, explorer.button.disabled))
        return explore.head_picture(model, **values)

    controls = {"prompt": panel.Text(PROMPT), "layer": panel.Whole(0, 0, 3), "head": panel.Whole(0, 0, 3)}
    explorer = panel.Explorer("attention", model, draw, controls, live=False)
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


def test_for_a_notebook_that_is_to_be_kept_the_still_alone_can_be_asked_for(model, monkeypatch):
    monkeypatch.setenv(panel.STILL, "1")
    bundle, _ = explore.attention(model)._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"}


@pytest.mark.parametrize("name", MOVES)
def test_nothing_is_used_that_nbclient_can_wait_for_for_ever(model, name):
    def kinds(widget):
        return {type(widget).__name__}.union(*map(kinds, getattr(widget, "children", ())))

    assert kinds(made(model, name, live=False).widget) <= {"VBox", "Box", "HTML", "Label", "Text", "IntSlider", "Dropdown", "Checkbox", "Button"}


def test_it_is_imported_without_ipywidgets_and_matplotlib():
    code = "import sys, gptoss_lab.explore; print([m for m in ('ipywidgets', 'matplotlib', 'IPython') if m in sys.modules])"
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "[]"
