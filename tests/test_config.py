"""Every size of a model, read from either config.json, and what a wrong one gets."""
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import facts, needs_facts

from gptoss_lab.config import (
    FULL,
    O200K_STOPS,
    SLIDING,
    TINY,
    Config,
    ConfigError,
    Yarn,
    parse_config,
    published,
    read_config,
    to_hf,
    to_original,
)

# openai/gpt-oss-20b, config.json (the legacy form: rope_scaling and rope_theta apart), and original/config.json.
HF_20B = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "layer_types": [SLIDING, FULL] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999, "quantization_config": {"quant_method": "mxfp4"}, "rms_norm_eps": 1e-05,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
ORIGINAL_20B = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
}  # fmt: skip
GENERATION = {"bos_token_id": 199998, "do_sample": True, "eos_token_id": [200002, 199999, 200012],
              "pad_token_id": 199999}  # fmt: skip


def test_both_published_forms_give_the_same_model():
    hf = parse_config(HF_20B, {k: GENERATION[k] for k in ("eos_token_id", "pad_token_id")})
    original = parse_config(ORIGINAL_20B)
    assert hf == published("gpt-oss-20b")
    assert original == hf.with_(pad_token=None)
    assert original.stop_tokens == O200K_STOPS


@needs_facts
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_the_published_files_are_the_published_configs(size):
    tokens = {k: v for k, v in facts("generation_config.json").items() if k in ("eos_token_id", "pad_token_id")}
    assert parse_config(facts(f"config_{size}_hf.json"), tokens) == published(f"gpt-oss-{size}")
    assert parse_config(facts(f"config_{size}_original.json")).with_(pad_token=199_999) == published(f"gpt-oss-{size}")


def test_the_layer_pattern_of_openais_config_is_sliding_first():
    c = parse_config(ORIGINAL_20B)
    assert [c.window(layer) for layer in range(4)] == [128, None, 128, None]
    assert parse_config(ORIGINAL_20B | {"sliding_window": 0}).layer_types == (FULL,) * 24


@st.composite
def configs(draw) -> Config:
    number = lambda low, high: draw(st.integers(low, high))
    kv_heads, layers = number(1, 4), number(1, 5)
    experts, vocab = number(1, 9), number(20, 300)
    yarn = draw(st.none() | st.builds(
        Yarn, st.floats(1, 64), st.integers(1, 5000), st.floats(4.0, 64), st.floats(0.1, 3), st.booleans(),
        st.none() | st.floats(0.5, 2)))  # fmt: skip
    return Config(
        n_layers=layers, d_model=number(1, 99), n_heads=kv_heads * number(1, 4), n_kv_heads=kv_heads,
        d_head=2 * number(1, 40), d_ff=number(1, 99), n_experts=experts, experts_per_token=number(1, experts),
        d_vocab=vocab, n_ctx=number(1, 10_000), sliding_window=number(1, 200),
        layer_types=tuple(draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers, max_size=layers))),
        rope_theta=draw(st.floats(1, 1e7)), yarn=yarn, swiglu_limit=draw(st.floats(0.1, 100)),
        swiglu_alpha=draw(st.floats(0.1, 4)), norm_eps=draw(st.floats(1e-12, 1e-2)),
        stop_tokens=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=3))),
        pad_token=draw(st.none() | st.integers(0, vocab - 1)),
    )  # fmt: skip


@given(configs())
def test_any_config_survives_hugging_faces_form(config):
    assert parse_config(json.loads(json.dumps(to_hf(config)))) == config


@given(configs())
def test_openais_form_holds_a_config_or_says_what_it_cannot_hold(config):
    try:
        content = to_original(config)
    except ConfigError as error:
        assert "no field for" in str(error) or "must" in str(error)
    else:
        again = parse_config(content)
        assert again.with_(stop_tokens=config.stop_tokens, pad_token=config.pad_token) == config


def test_openais_form_holds_the_tiny_model_and_not_another_layer_pattern():
    assert parse_config(to_original(TINY)) == TINY.with_(stop_tokens=(), yarn=None)  # a factor of 1 changes nothing
    stretched = TINY.with_(stop_tokens=(), n_ctx=512, yarn=replace(TINY.yarn, factor=4.0))
    assert parse_config(to_original(stretched)) == stretched
    with pytest.raises(ConfigError, match="no field for layer_types"):
        to_original(TINY.with_(layer_types=(FULL,) * 4))
    with pytest.raises(ConfigError, match="no field for n_ctx"):
        to_original(TINY.with_(n_ctx=100))


SIZES = {
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "num_local_experts", "num_experts_per_tok", "vocab_size", "sliding_window",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_missing_size_is_named(name):
    with pytest.raises(ConfigError, match=name):
        parse_config({key: value for key, value in HF_20B.items() if key != name})


@pytest.mark.parametrize("name", sorted(ORIGINAL_20B))
def test_a_missing_field_of_openais_config_is_named(name):
    with pytest.raises(ConfigError, match=name):
        parse_config({key: value for key, value in ORIGINAL_20B.items() if key != name})


@pytest.mark.parametrize("value", [-1, 0, 2.5, True, "128", [4], None])
@pytest.mark.parametrize("name", sorted(SIZES - {"sliding_window"}))
def test_a_size_that_is_no_positive_whole_number_is_refused_with_its_value(name, value):
    with pytest.raises(ConfigError) as caught:
        parse_config(HF_20B | {name: value})
    assert (name if value is None else str(value)) in str(caught.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_attention_heads": 60}, "n_heads = 60 is no multiple of n_kv_heads = 8"),
        ({"head_dim": 63}, "d_head = 63: must be even"),
        ({"num_experts_per_tok": 40, "experts_per_token": 40}, "experts_per_token = 40, but there are 32 experts"),
        ({"experts_per_token": 8}, "experts_per_token = 8 contradicts num_experts_per_tok = 4"),
        ({"num_experts": 16}, "num_experts = 16 contradicts num_local_experts = 32"),
        ({"num_hidden_layers": 20}, "layer_types names 24 layers, but n_layers = 20"),
        ({"layer_types": ["sliding_attention", "linear_attention"] * 12}, "linear_attention"),
        ({"sliding_window": 0}, "sliding_window = 0: must be at least 1"),
        ({"sliding_window": -5}, "sliding_window = -5"),
        ({"eos_token_id": 201_088}, "token 201088 is not in the vocabulary of 201088"),
        ({"initial_context_length": 8192}, "initial_context_length = 8192 contradicts"),
        ({"attention_bias": False}, "gpt-oss has attention_bias = True"),
        ({"tie_word_embeddings": True}, "gpt-oss has tie_word_embeddings = False"),
        ({"hidden_act": "gelu"}, "gpt-oss has hidden_act = 'silu'"),
        ({"model_type": "llama"}, "only 'gpt_oss' is read"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2 is not a setting of gpt-oss"),
        ({"rms_norm_eps": 0}, "norm_eps = 0: must be a positive number"),
        ({"rope_theta": -1}, "rope_theta = -1: must be a positive number"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 32.0, "rope_theta": 1}}, "rope_theta contradicts itself"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        ({"rope_scaling": HF_20B["rope_scaling"] | {"mscale": 1.0}}, "mscale"),
        ({"rope_scaling": HF_20B["rope_scaling"] | {"factor": 0.5}}, "factor = 0.5: must be at least 1"),
        ({"rope_scaling": HF_20B["rope_scaling"] | {"beta_fast": 0.5}}, "beta_fast = 0.5 must be above"),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 4096}}, "yarn needs factor"),
    ],
)
def test_a_contradiction_is_refused_with_its_values(change, says):
    with pytest.raises(ConfigError) as caught:
        parse_config(HF_20B | change)
    assert says in str(caught.value)


def test_all_faults_are_listed_and_not_the_first():
    with pytest.raises(ConfigError) as caught:
        parse_config(HF_20B | {"hidden_size": -3, "head_dim": 0, "num_hidden_layers": 2.5})
    for fault in ("d_model = -3", "d_head = 0", "n_layers = 2.5"):
        assert fault in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse_config(HF_20B | {"hidden_size": "wide", "rope_theta": [1], "layer_types": [1, 2]})
    for fault in ("hidden_size = 'wide': must be a number", "rope_theta = [1]", "layer_types = [1, 2]"):
        assert fault in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300)
@given(st.sampled_from([HF_20B, ORIGINAL_20B]), st.data())
def test_whatever_stands_in_a_field_gives_a_config_or_a_config_error(good, data):
    name = data.draw(st.sampled_from(sorted(good)))
    value = data.draw(JSON)
    try:
        assert isinstance(parse_config(good | {name: value}), Config)
    except ConfigError:
        pass


@given(st.sampled_from(sorted(HF_20B["rope_scaling"])), JSON)
def test_whatever_stands_in_rope_scaling_gives_a_config_or_a_config_error(name, value):
    try:
        assert isinstance(parse_config(HF_20B | {"rope_scaling": HF_20B["rope_scaling"] | {name: value}}), Config)
    except ConfigError:
        pass


def test_a_folder_is_read_with_its_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_20B))
    assert read_config(tmp_path).stop_tokens == (200_002,)
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION))
    assert read_config(tmp_path) == published("gpt-oss-20b")


def test_a_folder_without_config_json_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_config(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{", "[1]", "\x00", ""])
def test_a_file_that_is_no_json_object_is_named(tmp_path, file, text):
    (tmp_path / "config.json").write_text(json.dumps(HF_20B))
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=file.replace(".", r"\.")):
        read_config(tmp_path)


def test_an_unknown_published_name_is_told_which_there_are():
    with pytest.raises(KeyError, match="gpt-oss-120b"):
        published("gpt-oss-7b")
