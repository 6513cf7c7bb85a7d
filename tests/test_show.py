"""Pictures show the recorded values, can be read, and are the same each time."""
import base64
import io
import json
import re
import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_model, tiny_config, tiny_random

from gptoss_lab import show, tokenizer
from gptoss_lab.model import Attention, Block

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "One sunny day, Tom had a red ball and Sue had a blue kite. Sue found the blue"


class Run:
    """One recorded forward pass, with what the figures take."""

    def __init__(self, model, tokens, note):
        self.model, self.tokens, self.note = model, tokens, note
        self.words = show.words(tokens, tokenizer.tiny())
        with torch.no_grad():
            self.logits, self.acts = model.run_with_cache(tokens, "*")

    @cached_property
    def figures(self) -> dict:
        """Every figure that shows values of the model, by the name of its function."""
        return {
            "vectors": show.vectors(self.acts["hook_embed"][0], self.words, title="embed", note=self.note),
            "pattern": show.pattern(self.acts, 0, self.words, note=self.note),
            "router": show.router(self.acts, 0, self.words, note=self.note),
            "routes": show.routes(self.acts, self.words, note=self.note),
            "residual": show.residual(self.acts, self.words, note=self.note),
            "logits": show.logits(self.logits, tokenizer.tiny(), note=self.note),
            "path": show.path(self.acts, self.words, tokenizer.tiny(), note=self.note),
        }


@pytest.fixture(scope="module")
def short() -> Run:
    model = tiny_random()
    return Run(model, torch.tensor([tokenizer.tiny().encode_ordinary(PROMPT)]), "random weights")


@pytest.fixture(scope="module")
def long() -> Run:
    """24 layers, 100 tokens of every kind."""
    config = tiny_config(n_layers=24, n_heads=12, d_vocab=512, n_experts=32)
    tokens = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(1))
    return Run(random_model(config, dtype=torch.bfloat16), tokens, "24 layers")


def images(fig) -> list[np.ma.MaskedArray]:
    return [image.get_array() for ax in fig.axes for image in ax.images]


def close(drawn, recorded) -> bool:
    return np.allclose(np.ma.filled(drawn, 0), recorded.detach().float().numpy(), atol=1e-6)


# ------------------------------------------------------------------------------------------ what they show


def test_words_make_spaces_ends_of_lines_and_parts_of_characters_visible():
    ids = tokenizer.tiny().encode_ordinary(" red\n\té\x07")
    assert show.words(torch.tensor([ids]), tokenizer.tiny()) == ["␣red", "⏎", "⇥", "\\xc3", "\\xa9", "\\x07"]
    assert show.words([7, 8], None) == ["7", "8"]


def test_tokens_stay_in_the_frame_and_each_stands_with_its_id(long):
    fig = show.tokens(long.tokens, tokenizer.tiny())
    [ax] = fig.axes
    texts = [text.get_text() for text in ax.texts]
    assert texts == [text for pair in zip(long.words, map(str, long.tokens[0].tolist()), strict=True) for text in pair]
    assert all(box.get_x() + box.get_width() <= ax.get_xlim()[1] for box in ax.patches)


def test_vectors_draw_zero_in_the_middle_of_their_scale(short):
    fig = show.vectors(short.acts["hook_embed"][0], short.words, title="embed")
    [image] = fig.axes[0].images
    assert close(image.get_array(), short.acts["hook_embed"][0])
    assert image.norm.vmin == -image.norm.vmax == -short.acts["hook_embed"].abs().max()


def test_pattern_draws_each_heads_keys_and_beside_them_its_sink_on_one_scale(short):
    drawn = images(show.pattern(short.acts, 1, short.words))
    heads = short.model.config.n_heads
    for head in range(heads):
        sink, keys = drawn[2 * head : 2 * head + 2]
        assert close(keys, short.acts["pattern", 1][0, head])
        assert close(sink[:, 0], short.acts["sink_mass", 1][0, head])
        assert np.allclose(keys.filled(0).sum(1) + sink[:, 0], 1, atol=1e-6)
    assert len(drawn) == 2 * heads


def test_pattern_greys_the_keys_that_the_window_hides_and_those_that_come_later(long):
    keys = images(show.pattern(long.acts, 0, long.words))[1]
    query, key = np.indices(keys.shape)
    seen = (key <= query) & (query - key < long.model.config.sliding_window)
    assert (np.ma.getmaskarray(keys) == ~seen).all()


def test_router_draws_every_logit_and_marks_the_chosen_experts_with_their_weights(short):
    [ax] = show.router(short.acts, 2, short.words, position=3).axes
    bars = ax.patches
    assert np.allclose([bar.get_height() for bar in bars], short.acts["router_logits", 2][0, 3])
    colours = {bar.get_facecolor() for bar in bars}
    chosen = short.acts["expert_indices", 2][0, 3].tolist()
    marked = {bars[expert].get_facecolor() for expert in chosen}
    assert len(colours) == 2 and len(marked) == 1
    assert sum(bar.get_facecolor() in marked for bar in bars) == len(chosen)
    weights = {int(text.xy[0]): text.get_text() for text in ax.texts}
    assert weights == {
        expert: f"{weight:.2f}"
        for expert, weight in zip(chosen, short.acts["expert_weights", 2][0, 3].tolist(), strict=True)
    }


def test_routes_draw_the_weight_of_every_chosen_expert_and_grey_the_others(short):
    for layer, drawn in enumerate(images(show.routes(short.acts, short.words))):
        indices, weights = short.acts["expert_indices", layer][0], short.acts["expert_weights", layer][0]
        assert (np.ma.getmaskarray(drawn).sum(1) == drawn.shape[1] - indices.shape[1]).all()
        assert np.allclose(np.take_along_axis(drawn.data, indices.numpy(), 1), weights)


def test_residual_draws_the_norm_as_embedded_and_after_each_layer(short):
    drawn = images(show.residual(short.acts, short.words))[0]
    assert close(drawn[0], short.acts["hook_embed"][0].norm(dim=-1))
    for layer in range(short.model.config.n_layers):
        assert close(drawn[layer + 1], short.acts["resid_post", layer][0].norm(dim=-1))


def test_logits_draw_the_likeliest_tokens_of_the_last_position_and_what_no_opinion_gives(short):
    [ax] = show.logits(short.logits, tokenizer.tiny(), k=5).axes
    probability = short.logits[0, -1].softmax(-1).sort(descending=True)
    assert np.allclose([bar.get_width() for bar in ax.patches], probability.values[:5])
    assert [t.get_text() for t in ax.get_yticklabels()] == show.words(probability.indices[:5], tokenizer.tiny())
    assert list(ax.lines[0].get_xdata()) == [1 / 512] * 2


def test_path_draws_the_last_token_in_every_layer(short):
    fig = show.path(short.acts, short.words, tokenizer.tiny())
    keys, sinks, weights = (ax.images[0].get_array() for ax in fig.axes[:3])
    below = fig.axes[3]
    layers = range(short.model.config.n_layers)
    stream = below.lines[0].get_ydata().reshape(-1, 3)
    for layer in layers:
        assert close(keys[:, layer], short.acts["pattern", layer][0, :, -1].mean(0))
        assert np.isclose(sinks[0, layer], short.acts["sink_mass", layer][0, :, -1].mean())
        chosen = short.acts["expert_indices", layer][0, -1].numpy()
        assert np.allclose(weights[chosen, layer], short.acts["expert_weights", layer][0, -1])
        for column, point in enumerate(("resid_pre", "resid_mid", "resid_post")):
            assert np.isclose(stream[layer, column], short.acts[point, layer][0, -1].norm())
    added = [bar.get_height() for bar in below.patches]
    points = [(point, layer) for point in ("attn_out", "mlp_out") for layer in layers]
    assert np.allclose(added, [short.acts[point][0, -1].norm() for point in points])


def test_a_recording_that_lacks_a_point_is_named(short):
    with torch.no_grad():
        _, few = short.model.run_with_cache(short.tokens, "*.hook_pattern")
    with pytest.raises(KeyError, match="hook_sink_mass was not recorded"):
        show.pattern(few, 0, short.words)
    for draw in (lambda: show.path(few, short.words, None), lambda: show.residual(few, short.words)):
        with pytest.raises(KeyError, match="hook_resid_post was recorded in no layer; recorded are blocks.0.attn"):
            draw()


def test_difference_is_a_share_of_the_largest_value_and_refuses_to_broadcast():
    assert show.difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, -2.0])) == 2.25
    assert show.difference(torch.ones(3), torch.ones(3)) == 0
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(1,\)"):
        show.difference(torch.ones(3), torch.ones(1))


# ------------------------------------------------------------------------------------------ how they look


@pytest.mark.parametrize("run", ["short", "long"])
def test_every_figure_says_whose_values_it_shows_and_names_its_axes(run, request):
    run = request.getfixturevalue(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = run.figures
    for name, fig in figures.items():
        assert fig.get_suptitle().endswith(f"({run.note})"), name
        labelled = [fig.get_supxlabel(), *(ax.get_xlabel() for ax in fig.axes)]
        assert any(labelled), name
        bars = [ax for ax in fig.axes if ax.get_label() == "<colorbar>"]
        assert all(bar.get_ylabel() for bar in bars), name


@pytest.mark.parametrize("run", ["short", "long"])
def test_no_two_labels_of_an_axis_overlap(run, request):
    for name, fig in request.getfixturevalue(run).figures.items():
        fig.savefig(io.BytesIO())  # where the labels lie is known once they are drawn
        for ax in fig.axes:
            for axis, low, high in (ax.xaxis, "x0", "x1"), (ax.yaxis, "y0", "y1"):
                labels = [t for t in axis.get_ticklabels() if t.get_text() and t.get_visible()]
                spans = sorted((getattr(box, low), getattr(box, high))
                               for box in (t.get_window_extent() for t in labels) if box.width and box.height)
                gaps = [after[0] - before[1] for before, after in zip(spans, spans[1:], strict=False)]
                assert min(gaps, default=0) > -3, (name, [t.get_text() for t in labels])


def test_a_dollar_sign_is_a_word_and_no_formula():
    fig = show.vectors(torch.eye(2), ["$x^2$", "$"], title="a $ and a $", note="$")
    labels = fig.axes[0].get_yticklabels()
    assert [t.get_text() for t in labels] == ["$x^2$", "$"]
    assert not any(t.get_parse_math() for t in [*labels, fig._suptitle])


def test_a_picture_is_the_same_bytes_each_time_in_256_colours_and_leaves_nothing_open(short):
    import matplotlib.pyplot as plt
    from PIL import Image

    one, two = (show.pattern(short.acts, 0, short.words, note="twice") for _ in range(2))
    (png, about), (again, _) = one._repr_png_(), two._repr_png_()
    assert png == again
    assert about == {"alt": "attention pattern of layer 0 (twice)"}
    assert Image.open(io.BytesIO(png)).mode == "P"
    assert plt.get_fignums() == []


def test_the_readme_picture_is_what_the_tiny_model_gives(tmp_path):
    from PIL import Image

    from gptoss_lab.show.__main__ import draw

    made, kept = (np.asarray(Image.open(path).convert("L"), dtype=float)
                  for path in (draw(tmp_path), ROOT / "docs" / "img" / "one_token.png"))  # fmt: skip
    assert made.shape == kept.shape, "draw it anew: python -m gptoss_lab.show docs/img"
    changed = (abs(made - kept) > 32).mean()
    assert changed < 0.01, "draw it anew: python -m gptoss_lab.show docs/img"


# ------------------------------------------------------------------------------------------ the view


def payload(view) -> dict:
    return json.loads(re.search(r"\bD = (\{.*\});", view._repr_html_())[1])


def test_the_view_holds_the_sink_and_the_keys_of_the_chosen_layers(short):
    view = show.PatternView.recorded(short.acts, short.words, layers=[1, 3], note="random weights")
    data = payload(view)
    s = len(short.words)
    held = np.frombuffer(base64.b64decode(data["values"]), np.uint8).reshape(2, -1, s, s + 1) / 255
    for row, layer in enumerate([1, 3]):
        assert np.allclose(held[row, ..., 0], short.acts["sink_mass", layer][0], atol=0.5 / 255 + 1e-6)
        assert np.allclose(held[row, ..., 1:], short.acts["pattern", layer][0], atol=0.5 / 255 + 1e-6)
    assert (data["words"], data["layers"], data["heads"]) == (short.words, [1, 3], short.model.config.n_heads)
    assert data["title"] == "attention pattern (random weights)"


def test_the_view_is_the_same_html_each_time_and_another_for_other_values(short):
    one, two = (show.PatternView.recorded(short.acts, short.words, layers=[0]) for _ in range(2))
    other = show.PatternView.recorded(short.acts, short.words, layers=[1])
    ident = lambda view: re.search(r'id="(pattern-\w+)"', view._repr_html_())[1]
    assert one._repr_html_() == two._repr_html_()
    assert ident(one) != ident(other)
    assert repr(one) == "PatternView of attention pattern: layers [0], 20 tokens"


def test_no_word_and_no_title_can_leave_its_place_in_the_view():
    evil = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!--", "&amp;"]
    sink, pattern = torch.full((1, 1, 4), 0.25), torch.full((1, 1, 4, 4), 0.1875)
    view = show.PatternView(pattern, sink, evil, title='"><b>')
    page = view._repr_html_()
    assert payload(view)["words"] == evil and payload(view)["title"] == '"><b>'
    assert page.count("<script") == page.count("</script>") == 1
    assert "<img" not in page and "<!--" not in page and '"><b>' not in page.replace('\\"><b>', "")


def test_without_scripts_the_view_says_what_the_last_token_reads(short):
    view = show.PatternView.recorded(short.acts, short.words, layers=[2])
    still = re.search(r"<div data-view>(.*?)</div>", view._repr_html_(), re.S)[1]
    p = [short.acts["sink_mass", 2][0, 0, -1], *short.acts["pattern", 2][0, 0, -1]]
    assert re.findall(r"<small>(.*?)</small>", still) == [f"{value:.2f}" for value in p]
    assert re.findall(r"<span[^>]*>(.*?)</span>", still) == ["sink", *short.words]


def test_the_view_refuses_what_does_not_fit_together_and_what_is_too_large():
    pattern, sink = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4)
    for bad in [
        (pattern[:, :, :3], sink, "abcd"), (pattern, sink[:, :2], "abcd"), (pattern, sink, "abc"),
        (pattern[0], sink, "abcd"), (pattern, sink[0], "abcd"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="do not fit together"):
            show.PatternView(*bad)
    with pytest.raises(ValueError, match="do not fit together"):
        show.PatternView(pattern, sink, "abcd", layers=[7])
    with pytest.raises(ValueError, match="24 x 64 x 60 x 61 .* 5,621,760 values, a view holds 4,000,000"):
        show.PatternView(torch.zeros(24, 64, 60, 60), torch.zeros(24, 64, 60), ["x"] * 60)


# ------------------------------------------------------------------------------------------ source


def test_source_is_the_code_that_runs_without_its_indentation():
    shown = show.source(Attention.forward)
    assert repr(shown).startswith("# gptoss_lab.model.Attention.forward\ndef forward(self, x: Tensor")
    assert shown._repr_markdown_() == f"```python\n{shown!r}\n```"
    assert repr(show.source(Block)).splitlines()[1] == "class Block(Hooked):"


@pytest.mark.parametrize("thing", [torch.ones(1), len, 3])
def test_source_refuses_what_has_none(thing):
    with pytest.raises(TypeError, match="has no Python source"):
        show.source(thing)
