"""What a model says to input that it cannot serve: the thing, the value, the mend; and nothing is half-done."""
import functools

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

from gptoss_lab import KVCache, record

CONFIG = tiny_config(n_layers=2, n_ctx=32)
TOKENS = random_tokens(CONFIG, 2, 10)


@functools.cache
def model(**changes):
    return random_model(CONFIG.with_(**changes))


def refused(error, message, *args, lab=None, **kwargs) -> None:
    """The call raises this; no hook has fired, nothing was recorded and the model works as before."""
    lab, fired = lab or model(), []
    with pytest.raises(error, match=message), record(lab, "*") as acts, lab.hooks([("*", lambda x: fired.append(1))]):
        lab(*args, **kwargs)
    assert fired == [] and len(acts) == 0
    assert lab.recordings == () and not any(getattr(m, "listeners", None) for m in lab.modules())


@pytest.mark.parametrize("bad", [61, 201_088, -1, -61, 2**40])
def test_a_token_id_outside_the_vocabulary_is_named_with_the_bounds(bad):
    tokens = TOKENS.clone()
    tokens[1, 7] = bad
    refused(ValueError, rf"token id {bad} is outside the vocabulary of 61 \(0 to 60\)", tokens)
    tokens[1, 7] = 60
    assert model()(tokens).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.uint8, torch.complex64], ids=str)
def test_ids_that_are_no_whole_numbers_of_32_or_64_bits_are_refused(dtype):
    refused(TypeError, rf"tokens must be a tensor of int64 or int32 token ids, got dtype {dtype}", TOKENS.to(dtype))


@pytest.mark.parametrize(("tokens", "kind"), [([[1, 2]], "list"), ("text", "str"), (None, "NoneType"), (3, "int")])
def test_tokens_that_are_no_tensor_are_refused(tokens, kind):
    refused(TypeError, rf"tokens must be a tensor of int64 or int32 token ids, got {kind}", tokens)


@torch.no_grad()
def test_ids_of_32_bits_are_those_of_64():
    assert torch.equal(model()(TOKENS.int()), model()(TOKENS))


@pytest.mark.parametrize("shape", [(10,), (), (2, 5, 1)], ids=str)
def test_tokens_without_a_batch_axis_are_refused_with_how_to_add_one(shape):
    tokens = torch.zeros(shape, dtype=torch.int64)
    refused(ValueError, r"tokens must be \[batch, position\], got shape .* add a batch axis with tokens\[None\]", tokens)


@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (0, 0)], ids=str)
def test_an_empty_prompt_is_refused(shape):
    refused(ValueError, r"tokens is empty, shape .* a prompt needs at least one token",
            torch.zeros(shape, dtype=torch.int64))  # fmt: skip


@torch.no_grad()
def test_a_text_over_the_context_is_refused_with_both_lengths_and_one_of_its_length_is_read():
    tokens = random_tokens(CONFIG, 1, 33)
    refused(ValueError, "33 positions do not fit the context of 32", tokens)
    assert model()(tokens[:, :32]).shape == (1, 32, 61)
    cache = KVCache(CONFIG)
    model()(tokens[:, :30], cache=cache)
    refused(ValueError, "33 positions do not fit the context of 32", tokens[:, 30:], cache=cache)
    model()(tokens[:, 30:32], cache=cache)
    assert cache.length == 32
    refused(ValueError, "33 positions do not fit the context of 32", tokens[:, 32:], cache=cache)


@pytest.mark.parametrize("shape", [(2, 9), (1, 10), (10,), (2, 10, 1)], ids=str)
def test_a_mask_of_another_shape_is_refused_with_both_shapes(shape):
    refused(ValueError, r"attention_mask has shape \(.*\), tokens \(2, 10\)", TOKENS, torch.ones(shape))


@pytest.mark.parametrize("value", [2, -1, 0.5, -torch.inf, torch.nan])
def test_a_mask_of_other_values_than_0_and_1_is_refused(value):
    mask = torch.ones(2, 10, dtype=torch.float64)
    mask[0, 3] = value
    refused(ValueError, "attention_mask must hold 0 and 1, got values from", TOKENS, mask)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.uint8], ids=str)
def test_a_mask_of_0_and_1_may_have_any_type(dtype):
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, :4] = 0
    assert torch.equal(model()(TOKENS, mask.to(dtype)), model()(TOKENS, mask))


@torch.no_grad()
def test_pad_ids_without_a_mask_are_refused_with_both_ways_out():
    lab = model(pad_token=TOKENS[1, 3].item())
    message = rf"tokens hold the pad id {TOKENS[1, 3]} and there is no attention_mask: .*torch\.ones_like\(tokens\)"
    refused(ValueError, message, TOKENS, lab=lab)
    assert torch.equal(lab(TOKENS, torch.ones_like(TOKENS)), model()(TOKENS))
    other = torch.where(TOKENS == lab.config.pad_token, 0 if lab.config.pad_token else 1, TOKENS)
    assert torch.equal(lab(other), model()(other))
    assert torch.equal(model()(TOKENS), lab(TOKENS, torch.ones_like(TOKENS)))  # a model without one has nothing to ask


@pytest.mark.parametrize("stop", [3, -3, 99, 1.5, "1", torch.tensor(1.0)], ids=str)
def test_a_layer_that_is_not_there_cannot_be_stopped_at(stop):
    refused(ValueError, r"stop_at_layer = .*: this model has 2 layers", TOKENS, stop_at_layer=stop)
    with pytest.raises(ValueError, match=r"this model has 2 layers"):
        model().run_with_cache(TOKENS, "hook_embed", stop_at_layer=stop)


@torch.no_grad()
def test_every_layer_and_the_end_can_be_stopped_at():
    _, acts = model().run_with_cache(TOKENS, "*")
    for stop, name in ((0, "hook_embed"), (-2, "hook_embed"), (1, "blocks.0.hook_resid_post"),
                       (-1, "blocks.0.hook_resid_post"), (2, "blocks.1.hook_resid_post")):  # fmt: skip
        assert (model()(TOKENS, stop_at_layer=stop) - acts[name]).abs().max() < 1e-12


@pytest.mark.parametrize("beyond", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_cos", "unembed.hook_out", "ln_final.hook_scale"])
def test_whoever_listens_beyond_the_layer_that_is_stopped_at_is_told_so(beyond):
    lab = model()
    reached = beyond.endswith("cos")  # the rotary tables are made before the first block
    for stop in (1, -1):
        for block in (record(lab, beyond), lab.hooks([(beyond, lambda x: None)])):
            with block:
                if reached:
                    lab(TOKENS, stop_at_layer=stop)
                    continue
                with pytest.raises(ValueError, match=rf"stop_at_layer=1 ends before {beyond}, which would never fire"):
                    lab(TOKENS, stop_at_layer=stop)
    with record(lab, "*"), pytest.raises(ValueError, match="which would never fire"):
        lab(TOKENS, stop_at_layer=2)  # the final norm and the logits


def test_a_full_name_beyond_the_layer_that_is_stopped_at_is_never_dropped_in_silence():
    lab = model()
    for names in ("blocks.1.hook_resid_post", ("resid_post", 1), ("resid_post", -1), "model.layers.1",
                  ["hook_embed", "blocks.1.hook_resid_post"], ["hook_embed", ("resid_post", 1)],
                  {"hook_embed", "blocks.1.hook_out"}, (name for name in ["blocks.1.hook_resid_post"])):  # fmt: skip
        with pytest.raises(ValueError, match="ends before blocks.1.hook_resid_post, which would never fire"):
            lab.run_with_cache(TOKENS, names, stop_at_layer=1)
    for names in ("unembed.*", lambda name: name.startswith("blocks.1"), ["blocks.1.*", "ln_final.*"]):
        with pytest.raises(ValueError, match="ends before every point that"):
            lab.run_with_cache(TOKENS, names, stop_at_layer=1)


@torch.no_grad()
def test_a_cache_of_another_batch_is_refused_with_both_sizes():
    full = ("full_attention",) * 2  # there a batch of one would broadcast into a larger buffer
    for lab in (model(), model(layer_types=full)):
        for batch in (1, 3):
            cache = KVCache(lab.config)
            lab(TOKENS, cache=cache)
            refused(ValueError, rf"tokens hold {batch} sequences and the cache 2", random_tokens(CONFIG, batch, 1),
                    cache=cache, lab=lab)  # fmt: skip


@pytest.mark.parametrize("bad", [-1, 8, 99])
def test_an_edit_that_forces_an_expert_that_is_not_there_is_refused(bad):
    for names in ([], ["*.hook_pre"]):
        with pytest.raises((RuntimeError, IndexError, ValueError), match="out of bounds"), \
                record(model(), names), model().hooks([(("expert_indices", 1), lambda x: x * 0 + bad)]):  # fmt: skip
            model()(TOKENS)


def test_a_mask_that_is_no_tensor_is_refused():
    refused(TypeError, "attention_mask must be a tensor like tokens, got list", TOKENS, TOKENS.tolist())


@pytest.mark.parametrize("keep", [-1, 1.5])
def test_logits_to_keep_must_be_a_count(keep):
    refused(ValueError, rf"logits_to_keep = {keep}", TOKENS, logits_to_keep=keep)


def test_a_cache_of_another_model_is_refused():
    refused(ValueError, "another config", TOKENS, cache=KVCache(CONFIG.with_(sliding_window=3)))
