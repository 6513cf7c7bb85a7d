"""Every hook point, by every road, in every backend: what is read, what is changed, what is left behind."""
import functools
import gc
import math
import pickle
import weakref
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

from gptoss_lab import GptOss, KVCache, cost, edit, fast, record
from gptoss_lab.hooks import DEFAULT, POINTS

CONFIG = tiny_config(n_layers=2)
LAYERS = range(CONFIG.n_layers)
TOKENS = random_tokens(CONFIG, 2, 20)
BACKENDS = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
GRADIENTS = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])  # the fast attention has none

# The table of hook points, written down a second time: name -> shape. b 2, s 20, t 20 in these tests.
SHAPES = {
    "hook_tokens": "b s", "hook_embed": "b s d", "rotary_emb.hook_cos": "s p", "rotary_emb.hook_sin": "s p",
    "hook_resid_pre": "b s d", "ln1.hook_scale": "b s 1", "ln1.hook_normalized": "b s d", "ln1.hook_out": "b s d",
    "attn.hook_q": "b s H h", "attn.hook_k": "b s K h", "attn.hook_v": "b s K h", "attn.hook_rot_q": "b s H h",
    "attn.hook_rot_k": "b s K h", "attn.hook_attn_scores": "b H s t", "attn.hook_sink_scores": "b H s",
    "attn.hook_pattern": "b H s t", "attn.hook_sink_mass": "b H s", "attn.hook_z": "b s H h",
    "attn.hook_result": "b s H d", "hook_attn_out": "b s d", "hook_resid_mid": "b s d", "ln2.hook_scale": "b s 1",
    "ln2.hook_normalized": "b s d", "ln2.hook_out": "b s d", "mlp.hook_router_logits": "b s E",
    "mlp.hook_expert_indices": "b s k", "mlp.hook_expert_weights": "b s k", "mlp.hook_pre": "b s k f",
    "mlp.hook_pre_linear": "b s k f", "mlp.hook_pre_clamped": "b s k f", "mlp.hook_pre_linear_clamped": "b s k f",
    "mlp.hook_post": "b s k f", "mlp.hook_expert_out": "b s k d", "hook_mlp_out": "b s d", "hook_resid_post": "b s d",
    "ln_final.hook_scale": "b s 1", "ln_final.hook_normalized": "b s d", "ln_final.hook_out": "b s d",
    "unembed.hook_out": "b s V",
}  # fmt: skip
SIZES = {"b": 2, "s": 20, "t": 20, "d": 32, "H": 4, "K": 2, "h": 16, "p": 8, "E": 8, "k": 3, "f": 64, "V": 61, "1": 1}
OUTSIDE = ("hook_tokens", "hook_embed", "rotary_emb", "ln_final", "unembed")  # not in a block
INTEGERS = ("hook_tokens", "hook_expert_indices")
DERIVED = ("hook_tokens", "hook_sink_mass")


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Full name -> shape in numbers, of every point of a model of CONFIG."""
    rows = [(name, tuple(SIZES[letter] for letter in shape.split())) for name, shape in SHAPES.items()]
    outside = {name: shape for name, shape in rows if name.startswith(OUTSIDE)}
    return outside | {f"blocks.{l}.{name}": shape for l in LAYERS for name, shape in rows if name not in outside}


NAMES = list(expected_shapes())
FLOATS = [name for name in NAMES if not name.endswith(INTEGERS)]
WRITABLE = [name for name in NAMES if not name.endswith(DERIVED)]


@functools.cache
def model(packed=False, dtype=torch.float64):
    return random_model(CONFIG, packed=packed, dtype=dtype)


NAMES_IN_ORDER = list(model().hook_points)


def is_clean(model) -> bool:
    """Nobody listens anywhere."""
    return model.recordings == () and not any(getattr(m, "listeners", None) for m in model.modules())


@contextmanager
def calls_of(monkeypatch, module, name: str):
    """Inside the block, counts how often `module.name` is called."""
    real, calls = getattr(module, name), []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *args: calls.append(1) or real(*args))
        yield calls


def largest_gap(x, y) -> float:
    """The largest difference; infinities must be in the same places."""
    x, y = x.double(), y.double()
    assert x.shape == y.shape, f"{tuple(x.shape)} against {tuple(y.shape)}"
    assert torch.equal(x.isfinite(), y.isfinite())
    return (x - y)[x.isfinite()].abs().max().item() if x.numel() else 0.0


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    assert is_clean(model()) and is_clean(model(packed=True))


# ------------------------------------------------------------------------------------------------ the points


@torch.no_grad()
def test_no_part_of_the_models_in_these_tests_is_trivial():
    logits, acts = model().run_with_cache(TOKENS, "*")
    assert 1 < logits.std() < 5
    for l in LAYERS:
        assert 0.01 < (acts["pre", l] > 7).double().mean() < 0.2
        assert 0.01 < (acts["pre_linear", l].abs() > 7).double().mean() < 0.3
        assert 0.05 < acts["sink_mass", l].mean() < 0.6
        assert acts["expert_indices", l].unique().numel() > 4
        assert (acts["mlp_out", l].std() / acts["resid_pre", l].std()) > 0.2
    assert torch.equal(model()(TOKENS), model(packed=True)(TOKENS))


@BACKENDS
@GRADIENTS
def test_every_point_exists_with_its_shape_and_its_kind_of_number(packed, grad):
    with torch.set_grad_enabled(grad), record(model(packed), "*") as acts:
        model(packed)(TOKENS)
    assert list(acts) == list(model(packed).hook_points)
    assert {name: tuple(x.shape) for name, x in acts.items()} == expected_shapes()
    for name, x in acts.items():
        assert x.dtype == (torch.int64 if name.endswith(INTEGERS) else torch.float64), name


@torch.no_grad()
def test_in_bfloat16_the_norms_are_recorded_in_the_float32_that_they_are_computed_in():
    logits, acts = model(dtype=torch.bfloat16).run_with_cache(TOKENS, "*")
    for name, x in acts.items():
        wide = name.endswith(("hook_scale", "hook_normalized"))
        assert x.dtype == (torch.int64 if name.endswith(INTEGERS) else torch.float32 if wide else torch.bfloat16), name
    assert logits.dtype == torch.bfloat16


@BACKENDS
@GRADIENTS
@pytest.mark.parametrize("how", ["alone", "all at once"])
def test_every_point_fires_exactly_once_a_forward_in_the_order_of_the_table(packed, grad, how):
    groups = [[name] for name in NAMES] if how == "alone" else [NAMES]
    for group in groups:
        fired = []
        with torch.set_grad_enabled(grad):
            model(packed).run_with_hooks(TOKENS, [(group, lambda x, hook, fired=fired: fired.append(hook.name))])
        assert fired == [name for name in model().hook_points if name in group]


@torch.no_grad()
def test_every_point_fires_once_in_a_padded_batch_and_in_each_pass_over_a_cache():
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    cache, fired = KVCache(CONFIG), []
    with model().hooks([("*", lambda x, hook: fired.append(hook.name))]):
        model()(TOKENS[:, :12], mask[:, :12], cache=cache)
        model()(TOKENS[:, 12:], mask[:, 12:], cache=cache)
    assert fired == NAMES_IN_ORDER * 2


@torch.no_grad()
@BACKENDS
def test_the_fast_path_is_taken_exactly_where_nobody_listens_to_an_inner_point(packed, monkeypatch):
    inner = {"attention": ("attn_scores", "pattern"),
             "mix": ("pre", "pre_linear", "pre_clamped", "pre_linear_clamped", "post", "expert_out")}  # fmt: skip
    for name, leaves in inner.items():
        with calls_of(monkeypatch, fast, name) as calls:
            model(packed)(TOKENS)
            assert len(calls) == CONFIG.n_layers
            calls.clear()
            for point in model().hook_points.values():
                if point.layer() == 1:
                    with record(model(packed), point.name):
                        model(packed)(TOKENS)
                    readable = point.place[1] in leaves
                    assert len(calls) == CONFIG.n_layers - readable, f"{point.name}: fast {name}"
                    calls.clear()


@torch.no_grad()
@BACKENDS
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_recording_changes_no_number_beyond_rounding(packed, dtype, rounding):
    # Seen: 1.2e-14 and 6e-6 of logits whose standard deviation is 2, all of it from the readable path's other order.
    lab = model(packed, dtype)
    logits = lab(TOKENS)
    assert largest_gap(lab.run_with_cache(TOKENS, "*")[0], logits) < rounding * logits.std()
    outer = [n for n in NAMES if not n.endswith(("attn_scores", "pattern", "result", "post", "expert_out"))
             and "mlp.hook_pre" not in n] + [f"blocks.{l}.hook_resid_post" for l in LAYERS]  # fmt: skip
    assert torch.equal(lab.run_with_cache(TOKENS, outer)[0], logits)
    assert torch.equal(lab(TOKENS), logits)


@torch.no_grad()
@BACKENDS
def test_a_value_is_the_same_whether_it_is_recorded_alone_or_with_all_others(packed):
    _, together = model(packed).run_with_cache(TOKENS, "*")
    for name in NAMES:
        _, alone = model(packed).run_with_cache(TOKENS, name)
        assert list(alone) == [name]
        assert largest_gap(alone[name], together[name]) < 1e-12, name


# ------------------------------------------------------------------------------------------------ what the names mean


@torch.no_grad()
@BACKENDS
def test_the_residual_stream_is_the_sum_of_what_is_written_to_it_on_every_layer(packed):
    logits, acts = model(packed).run_with_cache(TOKENS, "*")
    assert torch.equal(acts["hook_embed"], acts["resid_pre", 0])
    for l in LAYERS:
        assert largest_gap(acts["resid_pre", l] + acts["attn_out", l], acts["resid_mid", l]) < 1e-12
        assert largest_gap(acts["resid_mid", l] + acts["mlp_out", l], acts["resid_post", l]) < 1e-12
        if l + 1 in LAYERS:
            assert torch.equal(acts["resid_post", l], acts["resid_pre", l + 1])
    assert torch.equal(acts["hook_logits"], logits)


@torch.no_grad()
@BACKENDS
def test_the_parts_of_a_layer_add_up_to_what_it_writes(packed):
    lab = model(packed)
    _, acts = lab.run_with_cache(TOKENS, "*")
    for l in LAYERS:
        attn = lab.blocks[l].attn
        assert largest_gap(acts["result", l].sum(2) + attn.out.bias, acts["attn_out", l]) < 1e-12
        mixed = (acts["expert_weights", l].unsqueeze(-1) * acts["expert_out", l]).sum(2)
        assert largest_gap(mixed, acts["mlp_out", l]) < 1e-12
        rows = acts["pattern", l].sum(-1) + acts["sink_mass", l]
        assert largest_gap(rows, torch.ones_like(rows)) < 1e-12
        chosen = acts["router_logits", l].gather(-1, acts["expert_indices", l])
        assert largest_gap(chosen.softmax(-1), acts["expert_weights", l]) < 1e-12
        assert torch.equal(acts["pre_clamped", l], acts["pre", l].clamp(max=7))
        assert torch.equal(acts["pre_linear_clamped", l], acts["pre_linear", l].clamp(-7, 7))
        gate, linear = acts["pre_clamped", l], acts["pre_linear_clamped", l]
        assert largest_gap(gate / (1 + (-1.702 * gate).exp()) * (linear + 1), acts["post", l]) < 1e-12
        assert torch.equal(acts["sink_scores", l], attn.sinks[None, :, None].expand(2, -1, 20))
        for part, into in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
            x, weight = acts[into, l], getattr(lab.blocks[l], part).weight
            assert largest_gap((x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), acts["scale", l, part]) < 1e-12
            assert largest_gap(x / acts["scale", l, part], acts["normalized", l, part]) < 1e-12
            assert largest_gap(acts["normalized", l, part] * weight, acts["out", l, part]) < 1e-12


@torch.no_grad()
def test_the_pattern_is_zero_and_the_score_minus_infinity_where_a_key_is_not_visible():
    _, acts = model().run_with_cache(TOKENS, "*")
    query, key = torch.arange(20)[:, None], torch.arange(20)
    for l in LAYERS:
        window = CONFIG.window(l) or 20
        visible = (key <= query) & (query - key < window)
        assert ((acts["pattern", l] > 0) == visible).all()
        assert (acts["attn_scores", l].isfinite() == visible).all()


# ------------------------------------------------------------------------------------------------ names


TRANSFORMERLENS_4 = {  # the names that TransformerLens 4.3 gives the values of a gpt-oss block, one by one
    "blocks.0.hook_in": "blocks.0.hook_resid_pre", "blocks.0.ln1.hook_in": "blocks.0.hook_resid_pre",
    "blocks.0.attn.hook_in": "blocks.0.ln1.hook_out", "blocks.0.attn.q.hook_in": "blocks.0.ln1.hook_out",
    "blocks.0.attn.k.hook_in": "blocks.0.ln1.hook_out", "blocks.0.attn.v.hook_in": "blocks.0.ln1.hook_out",
    "blocks.0.attn.q.hook_out": "blocks.0.attn.hook_q", "blocks.0.attn.k.hook_out": "blocks.0.attn.hook_k",
    "blocks.0.attn.v.hook_out": "blocks.0.attn.hook_v", "blocks.0.attn.hook_cos": "rotary_emb.hook_cos",
    "blocks.0.attn.hook_sin": "rotary_emb.hook_sin", "blocks.0.attn.o.hook_in": "blocks.0.attn.hook_z",
    "blocks.0.attn.o.hook_out": "blocks.0.hook_attn_out", "blocks.0.attn.hook_out": "blocks.0.hook_attn_out",
    "blocks.0.ln2.hook_in": "blocks.0.hook_resid_mid", "blocks.0.mlp.hook_in": "blocks.0.ln2.hook_out",
    "blocks.0.mlp.router.hook_in": "blocks.0.ln2.hook_out",
    "blocks.0.mlp.router.hook_out": "blocks.0.mlp.hook_router_logits",
    "blocks.0.mlp.router.hook_expert_weights": "blocks.0.mlp.hook_expert_weights",
    "blocks.0.mlp.router.hook_expert_indices": "blocks.0.mlp.hook_expert_indices",
    "blocks.0.mlp.hook_out": "blocks.0.hook_mlp_out", "blocks.0.hook_out": "blocks.0.hook_resid_post",
    "embed.hook_in": "hook_tokens", "embed.hook_out": "hook_embed", "ln_final.hook_in": "blocks.1.hook_resid_post",
    "unembed.hook_in": "ln_final.hook_out", "hook_unembed": "unembed.hook_out", "hook_logits": "unembed.hook_out",
}  # fmt: skip
HUGGING_FACE = {
    "model.embed_tokens": "hook_embed", "model.layers.1": "blocks.1.hook_resid_post",
    "model.layers.1.input_layernorm": "blocks.1.ln1.hook_out", "model.layers.1.self_attn": "blocks.1.hook_attn_out",
    "model.layers.1.self_attn.q_proj": "blocks.1.attn.hook_q",
    "model.layers.1.self_attn.k_proj": "blocks.1.attn.hook_k",
    "model.layers.1.self_attn.v_proj": "blocks.1.attn.hook_v",
    "model.layers.1.self_attn.o_proj": "blocks.1.hook_attn_out",
    "model.layers.1.post_attention_layernorm": "blocks.1.ln2.hook_out",
    "model.layers.1.mlp": "blocks.1.hook_mlp_out", "model.layers.1.mlp.router": "blocks.1.mlp.hook_router_logits",
    "model.layers.1.mlp.experts": "blocks.1.hook_mlp_out", "model.norm": "ln_final.hook_out",
    "lm_head": "unembed.hook_out",
}  # fmt: skip


def resolved(names) -> list[str]:
    return [point.name for point in model().hook_points.resolve(names)]


@pytest.mark.parametrize("names", [TRANSFORMERLENS_4, HUGGING_FACE], ids=["TransformerLens 4", "Hugging Face"])
def test_the_names_of_other_libraries_resolve_to_the_same_point(names):
    assert {alias: resolved(alias) for alias in names} == {alias: [ours] for alias, ours in names.items()}
    _, acts = model().run_with_cache(TOKENS, list(names))
    for alias, ours in names.items():
        assert acts[alias] is acts[ours]


def test_every_point_answers_to_its_name_without_hook_and_to_its_shorthand():
    for name in NAMES:
        assert resolved(name) == [name]
        assert resolved(name.replace("hook_", "")) == [name]
    for l in LAYERS:
        for name in [name for name in NAMES if name.startswith(f"blocks.{l}.")]:
            _, _, *part, leaf = name.split(".")
            for layer in (l, l - CONFIG.n_layers):
                assert resolved((leaf.removeprefix("hook_"), layer, *part)) == [name]
                if part not in (["ln1"], ["ln2"]):
                    assert resolved((leaf.removeprefix("hook_"), layer)) == [name]


def test_no_name_means_two_points():
    seen = {}
    for point in model().hook_points.values():
        for name in (point.name, *point.aliases):
            for alias in {name.replace("{l}", str(l)) for l in LAYERS}:
                assert seen.setdefault(alias, point.name) == point.name


def test_a_shorthand_that_could_mean_either_norm_is_refused_with_both_names():
    with pytest.raises(KeyError, match=r"blocks\.0\.ln1\.hook_scale") as error:
        resolved(("scale", 0))
    assert "blocks.0.ln2.hook_scale" in str(error.value)


def test_globs_functions_and_collections_of_names_resolve_in_firing_order():
    patterns = [f"blocks.{l}.attn.hook_pattern" for l in LAYERS]
    assert resolved("*.hook_pattern") == patterns
    assert resolved("blocks.[1-9].attn.hook_pattern") == patterns[1:]
    assert resolved("model.layers.*.self_attn.q_proj") == [f"blocks.{l}.attn.hook_q" for l in LAYERS]
    assert resolved(lambda name: name.endswith("pattern")) == patterns
    assert resolved([patterns[1], patterns[0]]) == patterns
    assert resolved({patterns[1], "hook_embed"}) == ["hook_embed", patterns[1]]
    assert resolved((patterns[1], "*.attn.hook_pattern")) == patterns
    assert resolved(name for name in patterns) == patterns
    assert resolved([("pattern", -1), "hook_embed", ["blocks.0.attn.pattern"]]) == ["hook_embed", *patterns]
    assert resolved("*") == list(model().hook_points)
    assert resolved([]) == []


def test_without_names_the_cheap_group_is_meant():
    leaves = ("resid_post", "router_logits", "expert_indices", "expert_weights", "sink_mass")
    assert set(resolved(None)) == {name for l in LAYERS for leaf in leaves for name in resolved((leaf, l))}
    assert len(resolved(None)) == 5 * CONFIG.n_layers
    with torch.no_grad(), record(model()) as acts:
        model()(TOKENS)
    assert list(acts) == resolved(None) == resolved(DEFAULT)


@pytest.mark.parametrize("names", ["blocks.0.hook_resid_pst", "blocks.9.hook_resid_post", "*.hook_gate", ("resid_pst", 0),
                                   ("resid_post", 2), ("resid_post", -3), 3, lambda name: False,
                                   ["hook_embed", "hook_embde"], ""], ids=str)  # fmt: skip
def test_a_name_that_matches_nothing_raises_everywhere(names):
    roads = [lambda: resolved(names), lambda: cost(model(), names), lambda: model().run_with_cache(TOKENS, names),
             lambda: model().run_with_hooks(TOKENS, [(names, lambda x: None)]),
             lambda: record(model(), names).__enter__()]  # fmt: skip
    for road in roads:
        with pytest.raises(KeyError, match="no hook point matches"):
            road()
    if not isinstance(names, list):
        with pytest.raises(KeyError, match="no hook point matches"):
            edit(model(), {names: lambda x: x}).__enter__()


@pytest.mark.parametrize(("wrong", "right"), [
    ("blocks.0.hook_resid_pst", "blocks.0.hook_resid_post"), ("blocks.0.attn.hook_patern", "blocks.0.attn.hook_pattern"),
    ("blocks.1.mlp.hook_gate_logits", "blocks.1.mlp.hook_router_logits"), ("resid_pst", "hook_resid_post"),
    (("router_logit", 1), "blocks.1.mlp.hook_router_logits"), ("model.layers.1.mlp.routr", "blocks.1.mlp.hook_router_logits"),
    ("blocks.0.attn.hook_sink", "blocks.0.attn.hook_sink_scores"),
])  # fmt: skip
def test_an_unknown_name_suggests_the_nearest(wrong, right):
    with pytest.raises(KeyError, match="Nearest") as error:
        resolved(wrong)
    assert right in str(error.value).split("Nearest")[1]


def test_a_layer_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(KeyError, match="layers 0 to 1"):
        resolved("blocks.2.hook_resid_post")


def test_the_table_of_points_prints_as_text_and_as_html():
    class Rows(HTMLParser):
        rows: list[list[str]] = []

        def handle_starttag(self, tag, attrs):
            if tag == "tr":
                self.rows.append([])
            if tag in ("td", "th"):
                self.rows[-1].append("")

        def handle_data(self, data):
            self.rows[-1][-1] += data

    parser = Rows()
    parser.feed(model().hook_points._repr_html_())
    text = repr(model().hook_points).splitlines()
    assert len(parser.rows) == len(text) == 1 + len(POINTS) == 1 + len(SHAPES)
    for point, cells, line in zip(POINTS, parser.rows[1:], text[1:], strict=True):
        assert cells == [point.name, point.shape, "" if point.writable else "derived", point.what]
        assert line.split()[0] == point.name and point.what in line and ("derived" in line.split()) == (not point.writable)
        assert SHAPES[point.name.removeprefix("blocks.{l}.")] == point.shape


def test_a_hook_knows_its_name_and_its_layer():
    seen = {}
    model().run_with_hooks(TOKENS, [("*", lambda x, hook: seen.update({hook.name: hook.layer()}))])
    assert seen == {name: int(name.split(".")[1]) if name.startswith("blocks.") else None for name in NAMES}


# ------------------------------------------------------------------------------------------------ edits


def nudge(x: torch.Tensor) -> torch.Tensor:
    """Another value of the same kind: for ids of experts the next one."""
    if x.dtype == torch.int64:
        return (x + 1) % CONFIG.n_experts
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(x.dtype)


def nudge_in_place(x: torch.Tensor) -> None:
    x.copy_(nudge(x))


@BACKENDS
@GRADIENTS
def test_every_writable_point_changes_the_logits_on_the_fast_and_on_the_readable_path(packed, grad):
    lab = model(packed)
    inner = ["*.hook_pattern", "*.hook_expert_out"]
    with torch.set_grad_enabled(grad):
        plain = lab(TOKENS)
        for name in WRITABLE:
            with edit(lab, {name: nudge}):
                fast_path = lab(TOKENS)
                with record(lab, inner):
                    readable = lab(TOKENS)
            assert fast_path.isfinite().all()
            assert (fast_path - plain).abs().max() > 1e-3, f"an edit of {name} changes nothing"
            assert largest_gap(fast_path, readable) < 1e-11, name


@torch.no_grad()
@BACKENDS
def test_an_edit_reaches_what_comes_after_and_nothing_that_came_before(packed):
    _, before = model(packed).run_with_cache(TOKENS, "*")
    for name in WRITABLE:
        with edit(model(packed), {name: nudge}):
            _, after = model(packed).run_with_cache(TOKENS, "*")
        at = NAMES_IN_ORDER.index(name)
        for earlier in NAMES_IN_ORDER[:at]:
            assert torch.equal(before[earlier], after[earlier]), f"{name} changed {earlier}"
        assert torch.equal(after[name], nudge(before[name])), name


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(DERIVED)])
def test_a_derived_point_can_be_read_and_refuses_an_edit_by_name(name):
    with pytest.raises(TypeError, match=rf"{name} is derived"):
        edit(model(), {name: lambda x: x}).__enter__()
    for attempt in (lambda x: x, lambda x: x + 1, lambda x, hook: x.add_(1), nudge_in_place):
        with pytest.raises(TypeError, match=rf"{name} is derived"):
            model().run_with_hooks(TOKENS, [(name, attempt)])
    assert not model().hook_points[name].writable
    seen = []
    model().run_with_hooks(TOKENS, [(name, lambda x: seen.append(x.shape))])
    assert seen == [expected_shapes()[name]]


def test_a_glob_that_includes_a_derived_point_cannot_be_edited():
    with pytest.raises(TypeError, match=r"hook_sink_mass is derived"):
        edit(model(), {"blocks.*": lambda x: x}).__enter__()
    assert is_clean(model())


@torch.no_grad()
def test_a_derived_value_that_is_not_a_number_can_still_be_read():
    seen = []
    model().run_with_hooks(TOKENS, [("hook_embed", lambda x: x * math.nan),
                                    ("*.hook_sink_mass", lambda x: seen.append(x.isnan().all()))])  # fmt: skip
    assert len(seen) == CONFIG.n_layers and all(seen)


WRONG = {
    "shape": lambda x: x[:1], "more axes": lambda x: x[None], "dtype": lambda x: x.to(torch.float16),
    "device": lambda x: x.to("meta"), "type": lambda x: x.tolist(), "a number": lambda x: 0.0,
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_hook_that_returns_something_else_is_named(wrong):
    for name in WRITABLE:
        kind = "a (list|float)" if wrong in (WRONG["type"], WRONG["a number"]) else "(shape|dtype|device)"
        with pytest.raises((TypeError, ValueError), match=rf"hook on {name} returned {kind}"):
            model().run_with_hooks(TOKENS, [(name, wrong)])
        with pytest.raises((TypeError, ValueError), match=rf"hook on {name} returned {kind}"), edit(model(), {name: wrong}):
            model()(TOKENS)
    with pytest.raises(ValueError, match=r"rotary_emb.hook_cos returned shape \(1, 8\), the model needs \(20, 8\)"):
        model().run_with_hooks(TOKENS, [("rotary_emb.hook_cos", lambda x: x[:1])])


def test_a_tensor_given_as_an_edit_must_fit_too():
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.hook_z returned shape \(3,\)"), \
            edit(model(), {("z", 1): torch.zeros(3)}):  # fmt: skip
        model()(TOKENS)


@torch.no_grad()
def test_every_way_to_write_a_hook_does_the_same():
    point = "blocks.1.hook_resid_pre"
    half = model().run_with_hooks(TOKENS, [(point, lambda x: x / 2)])

    def in_place(x):
        x /= 2

    def keyword(x, *, hook):
        return x / 2 if hook.name == point else x

    def scaled(x, factor, hook):
        return x * factor if hook.layer() == 1 else x

    class Halve:
        def __call__(self, x, hook):
            return x / 2

    forms = [in_place, keyword, functools.partial(scaled, factor=0.5), Halve(), lambda x, hook: x / 2,
             lambda x, factor=0.5: x * factor, lambda x, *, hook=None: x / 2 if hook else x, lambda x, h: x / 2,
             model().run_with_cache(TOKENS, point)[1][point] / 2]  # fmt: skip
    for fn in forms:
        with edit(model(), {point: fn}):
            assert torch.equal(model()(TOKENS), half)
        with model().hooks([(point, fn)]) as same:
            assert torch.equal(same(TOKENS), half)
        assert torch.equal(model().run_with_hooks(TOKENS, fwd_hooks=[(point, fn)]), half)
    zero = model().run_with_hooks(TOKENS, [(point, torch.zeros_like)])
    assert torch.equal(zero, model().run_with_hooks(TOKENS, [(point, lambda x: x * 0)]))


@torch.no_grad()
def test_edits_of_one_point_run_in_the_order_in_which_they_were_opened_and_a_record_sees_the_last():
    with record(model(), ("resid_pre", 1)) as first:
        model()(TOKENS)
    x = first["resid_pre", 1]
    with record(model(), ("resid_pre", 1)) as acts, edit(model(), {("resid_pre", 1): lambda x: x + 1}), \
            model().hooks([(("resid_pre", 1), lambda x: x * 2)]):  # fmt: skip
        model()(TOKENS)
    assert torch.equal(acts["resid_pre", 1], (x + 1) * 2)


@torch.no_grad()
def test_an_edit_in_place_changes_no_weight_no_input_and_no_later_run():
    plain, tokens = model()(TOKENS), TOKENS.clone()
    weights = {key: x.clone() for key, x in model().state_dict().items()}
    for name in WRITABLE:
        with edit(model(), {name: nudge_in_place}):
            assert not torch.equal(model()(TOKENS), plain)
        assert torch.equal(tokens, TOKENS), name
        assert all(torch.equal(x, weights[key]) for key, x in model().state_dict().items()), name
        assert torch.equal(model()(TOKENS), plain), name


# ------------------------------------------------------------------------------------------------ records are one's own


def snapshot(acts) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in acts.items()}


def assert_unchanged(acts, kept) -> None:
    changed = [name for name, x in acts.items() if not torch.equal(x, kept[name])]
    assert not changed


@torch.no_grad()
@BACKENDS
def test_recorded_values_survive_changes_of_logits_tokens_mask_and_later_runs(packed):
    lab, tokens, mask = random_model(CONFIG, packed=packed), TOKENS.clone(), torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with record(lab, "*") as acts:
        logits = lab(tokens, mask)
    kept = snapshot(acts)
    for x in (logits, tokens, mask):
        x.zero_()
    for p in lab.parameters():
        p.add_(1)
    lab(TOKENS)
    assert_unchanged(acts, kept)


@torch.no_grad()
@pytest.mark.parametrize("pos_slice", [None, slice(3, None)], ids=["whole", "sliced"])
def test_no_recorded_tensor_shares_memory_with_another_or_with_the_model(pos_slice):
    with record(model(), "*", pos_slice=pos_slice) as acts, record(model(), "*", pos_slice=pos_slice) as others:
        logits = model()(TOKENS)
    taken = [logits, TOKENS, *model().state_dict().values(), *acts.values(), *others.values()]
    owners = [x.untyped_storage().data_ptr() for x in taken]
    assert len(set(owners)) == len(owners)


@torch.no_grad()
def test_a_recorded_residual_stream_is_not_what_stop_at_layer_returned():
    for layer, last in ((0, "hook_embed"), (1, "blocks.0.hook_resid_post"), (2, "blocks.1.hook_resid_post")):
        with record(model(), last) as acts:
            x = model()(TOKENS, stop_at_layer=layer)
        kept = snapshot(acts)
        assert torch.equal(x, kept[last])
        x.zero_()
        assert_unchanged(acts, kept)


@torch.no_grad()
def test_a_recorded_value_is_not_what_an_edit_downstream_or_a_hook_that_kept_it_changes():
    _, plain = model().run_with_cache(TOKENS, "*")
    for name in WRITABLE:
        later = [n for n in NAMES_IN_ORDER[NAMES_IN_ORDER.index(name) + 1 :] if n in WRITABLE]
        stash = []
        with record(model(), name) as acts, model().hooks([(name, stash.append)]), \
                edit(model(), {n: nudge_in_place for n in later}):  # fmt: skip
            model()(TOKENS)
        assert largest_gap(acts[name], plain[name]) < 1e-12, name
        kept = acts[name].clone()
        stash[0].zero_()
        assert torch.equal(acts[name], kept), name


def test_an_optimiser_step_leaves_recorded_values_alone():
    lab = random_model(CONFIG)
    step = torch.optim.SGD(lab.parameters(), lr=1.0)
    with record(lab, "*") as acts:
        logits = lab(TOKENS)
    kept = snapshot(acts)
    logits.logsumexp(-1).sum().backward()
    step.step()
    assert not torch.equal(lab.blocks[0].attn.sinks[None, :, None].expand(2, -1, 20), acts["sink_scores", 0])
    assert_unchanged(acts, kept)


@torch.no_grad()
def test_another_run_in_the_block_replaces_what_was_there_and_leaves_the_old_tensors_alone():
    with record(model(), "*") as acts:
        model()(TOKENS)
        old, kept = dict(acts.items()), snapshot(acts)
        model()(TOKENS[:1, :7].flip(1))
    assert acts["hook_tokens"].tolist() == TOKENS[:1, :7].flip(1).tolist()
    assert acts["pattern", 1].shape == (1, 4, 7, 7)
    assert all(torch.equal(x, kept[name]) for name, x in old.items())


def test_a_record_answers_by_every_name_and_says_what_is_missing():
    with torch.no_grad(), record(model(), "*.hook_q", "hook_embed") as acts:
        assert len(acts) == 0 and "nothing recorded yet" in repr(acts)
        with pytest.raises(KeyError, match="blocks.1.attn.hook_q has not fired"):
            acts["q", 1]
        model()(TOKENS)
    assert acts["q", 1] is acts["blocks.1.attn.hook_q"] is acts["blocks.1.attn.q"] is acts["q", -1]
    assert len(acts) == 3 == len(list(acts)) == len(repr(acts).splitlines())
    assert "blocks.1.attn.hook_q" in repr(acts) and "(2, 20, 4, 16)" in repr(acts) and "torch.float64" in repr(acts)
    assert ("q", 0) in acts and ("k", 0) not in acts
    with pytest.raises(KeyError, match=r'hook_k was not recorded: ask for "\*.hook_k". Recorded are hook_embed, blocks.0'):
        acts["k", 1]
    with pytest.raises(KeyError, match="Nearest: blocks.1.attn.hook_rot_q"):
        acts["blocks.1.attn.rotq"]


# ------------------------------------------------------------------------------------------------ with blocks


class Boom(Exception):
    pass


def boom(x):
    raise Boom


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["body", "hook", "forward", "record"])
def test_an_exception_leaves_no_hook_and_no_recording(error, where, monkeypatch):
    lab = model()
    plain = lab(TOKENS)

    def fail(*args):
        raise error

    if where == "record":
        monkeypatch.setattr("gptoss_lab.hooks.Activations.keep", fail)
    with pytest.raises(error), record(lab, "*.hook_z"), edit(lab, {"*.hook_z": fail if where == "hook" else nudge}), \
            lab.hooks([("*.hook_pattern", lambda x: None)]):  # fmt: skip
        if where == "body":
            fail()
        if where == "forward":
            monkeypatch.setattr("gptoss_lab.fast.mix", fail)
        lab(TOKENS)
    monkeypatch.undo()
    assert is_clean(lab)
    assert torch.equal(lab(TOKENS), plain)


def test_a_call_that_fails_leaves_no_hook_and_no_recording():
    for call in (lambda: model().run_with_hooks(TOKENS, [("*.hook_z", nudge), ("hook_embed", boom)]),
                 lambda: model().run_with_hooks(TOKENS, [("*.hook_z", nudge), ("hook_nothing", nudge)]),
                 lambda: model().run_with_cache(TOKENS, "*", attention_mask=torch.ones(1)),
                 lambda: model().run_with_cache(TOKENS, "*.hook_z", no_such_argument=1)):  # fmt: skip
        with pytest.raises((Boom, KeyError, ValueError, TypeError)):
            call()
        assert is_clean(model())


@torch.no_grad()
@pytest.mark.parametrize("order", ["abcd", "dcba", "cadb", "bdac"])
def test_blocks_close_in_any_order_and_take_only_their_own_with_them(order):
    lab, point = model(), ("resid_pre", 1)
    x = lab.run_with_cache(TOKENS, point)[1][point]
    blocks = {"a": edit(lab, {point: lambda x: x + 1}), "b": record(lab, point),
              "c": lab.hooks([(point, lambda x: x * 2)]), "d": record(lab, point, "*.hook_z")}  # fmt: skip
    stacks = {name: ExitStack() for name in blocks}
    entered = {name: stacks[name].enter_context(block) for name, block in blocks.items()}
    for end in order:
        value = lab.run_with_cache(TOKENS, point)[1][point]
        assert torch.equal(value, (x + 1 if "a" in stacks else x) * (2 if "c" in stacks else 1))
        for name in {"b", "d"} & stacks.keys():
            assert torch.equal(entered[name][point], value)
        stacks.pop(end).close()
    assert is_clean(lab)


def test_the_same_hook_opened_twice_is_heard_twice_and_closed_once_each():
    calls = []
    hooks = [("hook_embed", lambda x: calls.append(1))]
    with model().hooks(hooks):
        with model().hooks(hooks):
            model()(TOKENS)
        assert len(calls) == 2
        model()(TOKENS)
    assert len(calls) == 3
    model()(TOKENS)
    assert len(calls) == 3


def test_two_models_do_not_hear_each_other():
    other = random_model(CONFIG, seed=5)
    with record(model(), "hook_embed") as acts:
        other(TOKENS)
        assert len(acts) == 0 and is_clean(other)


def test_a_hook_may_run_the_model_itself():
    alone, inside = model()(TOKENS[:1, :3]), []

    def once(x):
        if not inside:
            inside.append(None)
            inside[0] = model()(TOKENS[:1, :3])

    assert torch.equal(model().run_with_hooks(TOKENS, [(("z", 1), once)]), model()(TOKENS))
    assert torch.equal(inside[0], alone)


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


@GRADIENTS
def test_a_hundred_recorded_runs_leave_memory_flat(grad):
    lab, counts = model(), []
    kept = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]  # nothing of earlier tests goes meanwhile
    with torch.set_grad_enabled(grad):
        for run in range(111):
            with record(lab, "*") as acts, edit(lab, {("z", 1): lambda x: x * 0.5}):
                lab(TOKENS[:, :4])
            gone = weakref.ref(acts)
            del acts
            assert gone() is None, "a record is alive after its last reference has gone"
            if run in (10, 60, 110):
                counts.append(tensors_alive())
    assert len(kept) <= counts[0] == counts[1] == counts[2]


def test_a_model_that_was_recorded_can_be_freed():
    lab = random_model(CONFIG)
    with record(lab, "*") as acts:
        lab(TOKENS[:, :4])
    dead = weakref.ref(lab)
    acts = snapshot(acts)
    acts = {name: x.detach() for name, x in acts.items()}
    del lab
    gc.collect()
    assert dead() is None


# ------------------------------------------------------------------------------------------------ run_with_cache, cost


@torch.no_grad()
def test_run_with_cache_stops_slices_and_passes_the_rest_on():
    lab = model()
    logits, acts = lab.run_with_cache(TOKENS, "*")
    resid, early = lab.run_with_cache(TOKENS, "*", stop_at_layer=1)
    assert torch.equal(resid, acts["resid_post", 0])
    assert list(early) == [n for n in NAMES_IN_ORDER if n in ("hook_tokens", "hook_embed") or n.startswith(
        ("rotary", "blocks.0."))]  # fmt: skip
    assert all(torch.equal(x, acts[name]) for name, x in early.items())
    assert list(lab.run_with_cache(TOKENS, None, stop_at_layer=-1)[1]) == resolved(None)[:5]
    assert list(lab.run_with_cache(TOKENS, lambda name: True, stop_at_layer=0)[1]) == [
        "hook_tokens", "hook_embed", "rotary_emb.hook_cos", "rotary_emb.hook_sin"]  # fmt: skip
    assert torch.equal(lab.run_with_cache(TOKENS, [], logits_to_keep=3)[0], lab(TOKENS, logits_to_keep=3))
    assert len(lab.run_with_cache(TOKENS, [])[1]) == 0
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    assert torch.equal(lab.run_with_cache(TOKENS, attention_mask=mask)[0], lab(TOKENS, mask))


@torch.no_grad()
@pytest.mark.parametrize("pos", [0, -1, -2, 7, slice(None, 3), slice(-4, None), slice(2, 15, 4), slice(30, 40)], ids=str)
def test_pos_slice_keeps_those_positions_of_every_point(pos):
    _, acts = model().run_with_cache(TOKENS, "*")
    _, part = model().run_with_cache(TOKENS, "*", pos_slice=pos)
    wanted = torch.arange(20)[pos].reshape(-1)
    for name, x in acts.items():
        shape = model().hook_points[name].shape.split()
        assert torch.equal(part[name], x.index_select(shape.index("s"), wanted)), name


@torch.no_grad()
def test_a_record_on_another_device_has_the_same_shapes_there():
    _, acts = model().run_with_cache(TOKENS, "*", device="meta")
    assert {name: tuple(x.shape) for name, x in acts.items()} == expected_shapes()
    assert {x.device.type for x in acts.values()} == {"meta"}
    _, here = model().run_with_cache(TOKENS, "*")
    _, there = model().run_with_cache(TOKENS, "*", device="cpu")
    assert_unchanged(there, here)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cost_is_the_memory_that_a_record_holds_to_the_byte(dtype):
    lab = model(dtype=dtype)
    total = 0
    for name in NAMES:
        _, acts = lab.run_with_cache(TOKENS, name)
        x = acts[name]
        assert x.nbytes == x.untyped_storage().nbytes() == cost(lab, name, batch=2, pos=20), name
        total += x.nbytes
    assert total == cost(lab, "*", batch=2, pos=20)
    _, acts = lab.run_with_cache(TOKENS)
    assert sum(x.nbytes for x in acts.values()) == cost(lab, batch=2, pos=20)
    assert cost(lab, []) == 0 and cost(lab, "hook_embed") == 32 * dtype.itemsize


@torch.no_grad()
def test_a_record_that_cannot_fit_is_refused_with_its_bytes_before_anything_is_computed(monkeypatch):
    lab, fired = model(), []
    monkeypatch.setattr("gptoss_lab.hooks.UNASKED", 0)
    need = cost(lab, "*", batch=2, pos=20)
    monkeypatch.setattr("gptoss_lab.hooks.free_bytes", lambda device: need)
    with record(lab, "*") as acts:
        lab(TOKENS)
    assert len(acts) == len(NAMES)
    monkeypatch.setattr("gptoss_lab.hooks.free_bytes", lambda device: need - 1)
    with pytest.raises(MemoryError, match=rf"70 points over 2 x 20 positions.*{need / 2**30:.2f} GiB.*cpu has"), \
            record(lab, "*") as acts, lab.hooks([("*", lambda x: fired.append(1))]):  # fmt: skip
        lab(TOKENS)
    assert fired == [] and len(acts) == 0 and is_clean(lab)
    with pytest.raises(MemoryError):
        lab.run_with_cache(TOKENS, "*")
    assert len(lab.run_with_cache(TOKENS, "*", pos_slice=slice(0, 10))[1]) == len(NAMES)
    with pytest.raises(MemoryError, match="fewer positions"):
        lab.run_with_cache(torch.cat([TOKENS] * 3), "*", pos_slice=slice(0, 10))
    monkeypatch.setattr("gptoss_lab.hooks.free_bytes", lambda device: None)  # the system does not say
    assert len(lab.run_with_cache(TOKENS, "*")[1]) == len(NAMES)


# ------------------------------------------------------------------------------------------------ gradients


def directional(name: str, x: torch.Tensor) -> torch.Tensor:
    """A random direction in which x can move: not along scores of minus infinity."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name)), dtype=x.dtype)
    return torch.where(x.isfinite(), v, 0)


@torch.no_grad()
def slope(lab, name: str, v: torch.Tensor, epsilon=1e-5) -> float:
    """How fast a logit moves when the value at `name` moves along v: by central difference."""
    ends = [lab.run_with_hooks(TOKENS, [(name, lambda x, e=e: x + e * v)])[0, -1, 3] for e in (epsilon, -epsilon)]
    return ((ends[0] - ends[1]) / (2 * epsilon)).item()


@pytest.mark.parametrize(("packed", "sliced"), [(True, None), (False, slice(10, None))],
                         ids=["packed, whole", "dense, the last ten positions"])  # fmt: skip
def test_the_gradient_of_a_logit_by_every_recorded_value_is_its_slope(packed, sliced):
    lab, points = model(packed), model().hook_points
    wanted = [name for name in FLOATS if points[name].writable]
    constants = ["rotary_emb.hook_cos", "rotary_emb.hook_sin"]  # made of positions: no weight is behind them
    with edit(lab, {name: lambda x: x.requires_grad_() for name in constants}), \
            record(lab, wanted, pos_slice=sliced) as acts:  # fmt: skip
        logits = lab(TOKENS)
    gradients = torch.autograd.grad(logits[0, -1, 3], [acts[name] for name in wanted], allow_unused=False)
    for name, gradient in zip(wanted, gradients, strict=True):
        where = (slice(None),) * points[name].shape.split().index("s") + (sliced or slice(None),)
        full = directional(name, lab.run_with_cache(TOKENS, name)[1][name].detach())
        v = torch.zeros_like(full)
        v[where] = full[where]
        by_slope, by_gradient = slope(lab, name, v), (gradient.nan_to_num(0, 0, 0) * v[where]).sum().item()
        assert by_gradient == pytest.approx(by_slope, rel=1e-5, abs=1e-8), name


def test_the_gradient_by_the_logits_themselves_is_one_at_the_logit():
    with record(model(), "hook_logits") as acts:
        logits = model()(TOKENS)
    (gradient,) = torch.autograd.grad(logits[1, 4, 7], acts["hook_logits"])
    assert gradient[1, 4, 7] == 1 and gradient.sum() == 1


@pytest.mark.parametrize("leaf", ["q", "k", "v", "rot_q", "rot_k", "sink_scores", "z", "attn_scores", "pattern"])
def test_in_a_frozen_model_the_gradient_by_an_edited_value_is_its_slope(leaf):
    lab = random_model(CONFIG).requires_grad_(False)
    for layer in (0, 1):
        leaves = []
        with edit(lab, {(leaf, layer): lambda x, leaves=leaves: leaves.append(x.requires_grad_())}):
            logits = lab(TOKENS)
        (gradient,) = torch.autograd.grad(logits[0, -1, 3], leaves)
        v = directional(leaf, leaves[0].detach())
        by_slope = slope(lab, lab.hook_points[leaf, layer].name, v)
        assert (gradient.nan_to_num(0, 0, 0) * v).sum().item() == pytest.approx(by_slope, rel=1e-5, abs=1e-8)


def test_recording_changes_no_gradient_of_a_weight():
    lab = random_model(CONFIG)
    for names in ([], ["*"]):
        lab.zero_grad()
        with record(lab, *names), record(lab, names):
            lab(TOKENS).logsumexp(-1).sum().backward()
        if not names:
            plain = {name: p.grad.clone() for name, p in lab.named_parameters()}
    for name, p in lab.named_parameters():
        assert largest_gap(p.grad, plain[name]) < 1e-10 * max(1, plain[name].abs().max())
        assert p.grad.abs().max() > 0, name


def test_without_gradients_a_record_keeps_no_graph():
    with torch.no_grad(), record(model(), "*") as acts:
        model()(TOKENS)
    assert not any(x.requires_grad for x in acts.values())
    with torch.inference_mode(), record(model(), "*") as acts:
        model()(TOKENS)
    assert len(acts) == len(NAMES)


class Wrapped(torch.nn.Module):
    """As torch.compile and others wrap a part: what it has not, the part has."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *given):
        return self.part(*given)

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "part" else getattr(self.part, name)

    def __setattr__(self, name, value):
        return super().__setattr__(name, value) if name in ("part", "training") else setattr(self.part, name, value)


@torch.no_grad()
@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn", "blocks.1.mlp", "ln_final"])
@pytest.mark.parametrize("wrap", [Wrapped, functools.partial(torch.compile, backend="eager")])
def test_a_part_that_somebody_wrapped_is_heard_and_edited(path, wrap):
    lab, names = model(), [("resid_post", 1), ("z", 1), ("post", 1), "ln_final.hook_out", ("resid_pre", 0)]
    fresh = GptOss(lab.config).double()
    fresh.load_state_dict(lab.state_dict())
    parent, _, leaf = path.rpartition(".")
    with record(lab, *names) as expected:
        lab(TOKENS)
    holder, part = fresh.get_submodule(parent), wrap(fresh.get_submodule(path))
    if leaf.isdigit():
        holder[int(leaf)] = part
    else:
        setattr(holder, leaf, part)
    with record(fresh, *names) as acts:
        logits = fresh(TOKENS)
    assert all(torch.allclose(acts[name], x) for name, x in expected.items())
    for name in expected:
        with edit(fresh, {name: lambda x: -2 * x}):
            assert not torch.allclose(fresh(TOKENS), logits), name
    assert torch.allclose(fresh(TOKENS), logits)


def test_what_was_recorded_can_be_pickled():
    _, acts = model().run_with_cache(TOKENS)
    again = pickle.loads(pickle.dumps(acts))
    assert list(again) == list(acts) and all(torch.equal(again[name], x) for name, x in acts.items())


def test_a_device_that_fails_while_a_value_goes_there_leaves_no_trace(monkeypatch):
    real = torch.Tensor.to
    failing = lambda x, to, **named: 1 / 0 if to == torch.device("meta") else real(x, to, **named)
    with record(model(), "*.hook_resid_post", device="meta") as acts:
        monkeypatch.setattr(torch.Tensor, "to", failing)
        with pytest.raises(ZeroDivisionError):
            model()(TOKENS)
        monkeypatch.undo()
    assert len(acts) == 0
    with pytest.raises(KeyError, match="has not fired"):
        acts["resid_post", 0]
