"""Text read in pieces over a KV cache: the same numbers as in one pass, in no more memory than the windows need."""
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

from gptoss_lab import KVCache, edit, record
from gptoss_lab.config import FULL, SLIDING

CONFIG = tiny_config(n_layers=3)  # sliding, full, sliding; a window of 8
TOKENS = random_tokens(CONFIG, 2, 40)
KEY_BYTES = CONFIG.n_kv_heads * CONFIG.d_head * 8  # one key, or one value, of one token in float64


@functools.cache
def model(window: int = 8, layer_types: tuple[str, ...] = CONFIG.layer_types, packed: bool = False):
    return random_model(CONFIG.with_(sliding_window=window, layer_types=layer_types), packed=packed)


def new_cache(lab=None, **settings) -> KVCache:
    return KVCache((lab or model()).config, **settings)


def read(lab, tokens, cache, lengths, mask=None) -> torch.Tensor:
    """The logits of `tokens` read in chunks of these lengths."""
    assert sum(lengths) == tokens.shape[1]
    masks = [None] * len(lengths) if mask is None else mask.split(lengths, dim=1)
    return torch.cat([lab(part, m, cache=cache) for part, m in zip(tokens.split(lengths, dim=1), masks, strict=True)], 1)


def pieces(total: int):
    """Lengths of at least 1 that add up to `total`."""
    cuts = st.sets(st.integers(1, total - 1))
    return cuts.map(lambda at: [b - a for a, b in zip([0, *sorted(at)], [*sorted(at), total], strict=True)])


def assert_close(x, y, tolerance=1e-10) -> None:
    assert x.shape == y.shape
    assert torch.equal(x.isfinite(), y.isfinite())
    assert (x - y)[x.isfinite()].abs().max() < tolerance


# ------------------------------------------------------------------------------------------------ chunks


@torch.no_grad()
@settings(max_examples=25)
@given(lengths=pieces(40), window=st.integers(1, 12), packed=st.booleans(), capacity=st.sampled_from([0, 17, 64]),
       layer_types=st.tuples(*[st.sampled_from([SLIDING, FULL])] * 3))  # fmt: skip
def test_a_text_read_in_any_pieces_gives_the_logits_of_one_pass(lengths, window, packed, capacity, layer_types):
    lab = model(window, layer_types, packed)
    assert_close(read(lab, TOKENS, new_cache(lab, capacity=capacity), lengths), lab(TOKENS))


@torch.no_grad()
def test_one_token_after_the_other_gives_the_logits_of_one_pass():
    assert_close(read(model(), TOKENS, new_cache(), [1] * 40), model()(TOKENS))
    assert_close(read(model(), TOKENS, new_cache(), [25] + [1] * 15), model()(TOKENS))


@torch.no_grad()
@settings(max_examples=12)
@given(lengths=pieces(24))
def test_what_is_recorded_of_the_pieces_is_joined_to_what_one_pass_records(lengths):
    tokens = TOKENS[:, :24]
    _, whole = model().run_with_cache(tokens, "*")
    with record(model(), "*") as acts:
        read(model(), tokens, new_cache(), lengths)
    assert list(acts) == list(whole)
    for name, x in acts.items():
        assert x.dtype == whole[name].dtype
        assert_close(x, whole[name]) if x.is_floating_point() else assert_equal(x, whole[name])


def assert_equal(x, y) -> None:
    assert torch.equal(x, y)


@torch.no_grad()
def test_in_pieces_the_pattern_of_a_sliding_layer_is_zero_outside_its_window_and_its_scores_minus_infinity():
    with record(model(), "*.hook_pattern", "*.hook_attn_scores") as acts:
        read(model(), TOKENS, new_cache(), [13, 1, 1, 20, 5])
    query, key = torch.arange(40)[:, None], torch.arange(40)
    for layer, window in ((0, 8), (1, 40), (2, 8)):
        visible = (key <= query) & (query - key < window)
        assert ((acts["pattern", layer] > 0) == visible).all()
        assert (acts["attn_scores", layer].isfinite() == visible).all()


def padding(draw_lengths, total, side) -> torch.Tensor:
    """1 where a row of so many tokens has one, 0 where it is padded."""
    column = torch.arange(total)
    lengths = torch.tensor(draw_lengths)[:, None]
    return ((column >= total - lengths) if side == "left" else (column < lengths)).long()


@torch.no_grad()
@settings(max_examples=15)
@given(rows=st.lists(st.integers(1, 30), min_size=2, max_size=4), side=st.sampled_from(["left", "right"]),
       lengths=pieces(30), window=st.integers(1, 9))  # fmt: skip
def test_rows_of_different_lengths_padded_on_either_side_and_read_in_pieces_get_what_each_gets_alone(
        rows, side, lengths, window):  # fmt: skip
    lab = model(window)
    tokens = random_tokens(CONFIG, len(rows), 30, seed=3)
    mask = padding(rows, 30, side)
    logits = read(lab, tokens, new_cache(lab), lengths, mask)
    assert_close(lab(tokens, mask)[mask.bool()], logits[mask.bool()])
    for row, real in enumerate(mask.bool()):
        assert_close(logits[row : row + 1, real], lab(tokens[row : row + 1, real]))


@torch.no_grad()
def test_padding_is_a_number_everywhere_even_where_a_row_is_nothing_else():
    mask = torch.stack([padding([7], 20, "left")[0], padding([9], 20, "right")[0], torch.zeros(20, dtype=torch.int64)])
    tokens = random_tokens(CONFIG, 3, 20)
    assert model()(tokens, mask).isfinite().all()
    logits, acts = model().run_with_cache(tokens, "*", attention_mask=mask)
    assert logits.isfinite().all()
    for name, x in acts.items():
        assert not x.isnan().any(), name
        assert x.isfinite().all() or name.endswith("hook_attn_scores"), name


@torch.no_grad()
def test_without_sinks_a_padded_row_still_gets_what_it_gets_alone():
    mask = padding([20, 8], 20, "left")  # rows of padding would have nothing at all to attend to
    with edit(model(), {"*.hook_sink_scores": lambda x: x.fill_(-torch.inf)}):
        alone = model()(TOKENS[1:, 12:20])
        assert_close(model()(TOKENS[:, :20], mask)[1:, 12:], alone)
        assert_close(read(model(), TOKENS[:, :20], new_cache(), [5, 10, 5], mask)[1:, 12:], alone)
        with record(model(), "*.hook_pattern"):
            assert_close(model()(TOKENS[:, :20], mask)[1:, 12:], alone)
            assert_close(read(model(), TOKENS[:, :20], new_cache(), [5, 10, 5], mask)[1:, 12:], alone)


@torch.no_grad()
def test_rows_padded_on_the_right_go_on_where_their_text_ended():
    tokens, mask = TOKENS[:, :20], padding([20, 11], 20, "right")
    more = random_tokens(CONFIG, 2, 6, seed=9)
    cache = new_cache()
    model()(tokens, mask, cache=cache)
    logits = model()(more, cache=cache)
    assert_close(logits[1:], model()(torch.cat([tokens[1:, :11], more[1:]], 1))[:, 11:])
    assert_close(logits[:1], model()(torch.cat([tokens[:1], more[:1]], 1))[:, 20:])


@pytest.mark.parametrize("capacity", [0, 64])
def test_a_cache_filled_with_gradients_gives_the_gradients_of_one_pass(capacity):
    tokens = TOKENS[:, :12]
    for grad_first in (True, False):
        lab = random_model(CONFIG)
        cache = new_cache(lab, capacity=capacity)
        with torch.set_grad_enabled(grad_first):
            lab(tokens[:, :7], cache=cache)
        logits = lab(tokens[:, 7:], cache=cache)
        assert_close(logits, model()(tokens)[:, 7:])
        if grad_first:
            logits.logsumexp(-1).sum().backward()
            whole = random_model(CONFIG)
            whole(tokens)[:, 7:].logsumexp(-1).sum().backward()
            for p, q in zip(lab.parameters(), whole.parameters(), strict=True):
                assert_close(p.grad, q.grad, 1e-9)
        with torch.no_grad():
            assert_close(lab(TOKENS[:, 12:15], cache=cache), model()(TOKENS[:, :15])[:, 12:])


# ------------------------------------------------------------------------------------------------ rewinding


@torch.no_grad()
@settings(max_examples=25)
@given(window=st.integers(1, 9), steps=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=6),
       sliding=st.sampled_from([(SLIDING, FULL, SLIDING), (FULL, FULL, FULL)]))  # fmt: skip
def test_a_rewound_cache_goes_on_as_if_the_text_had_been_that_or_refuses(window, steps, sliding):
    lab = model(window, sliding)
    cache, text, dropped = new_cache(lab), torch.zeros(2, 0, dtype=torch.int64), 0
    for seed, (more, back) in enumerate(steps):
        new = random_tokens(CONFIG, 2, more, seed=seed)
        text = torch.cat([text, new], 1)
        assert_close(lab(new, cache=cache), lab(text)[:, -more:])
        dropped = max(dropped, text.shape[1] - window) if SLIDING in sliding else 0
        target = max(0, text.shape[1] - back)
        first_needed = max(0, target - window + 1)  # the next token sees its own key and the window - 1 before it
        if target > 0 and first_needed < dropped:
            with pytest.raises(ValueError, match=f"cannot truncate to {target}"):
                cache.truncate(target)
        else:
            cache.truncate(target)
            text, dropped = text[:, :target], min(dropped, target)
        assert cache.length == text.shape[1]
    last = random_tokens(CONFIG, 2, 3, seed=99)
    assert_close(lab(last, cache=cache), lab(torch.cat([text, last], 1))[:, -3:])


@torch.no_grad()
def test_a_padded_cache_rewinds_to_what_each_row_gets_alone():
    mask = padding([12, 9], 12, "left")
    for length in (12, 11, 0):
        cache = new_cache()
        model()(TOKENS[:, :12], mask, cache=cache)
        cache.truncate(length)
        logits = model()(TOKENS[:, 20:23], cache=cache)
        for row, real in enumerate(mask[:, :length].bool()):
            text = torch.cat([TOKENS[row, :length][real], TOKENS[row, 20:23]])
            assert_close(logits[row : row + 1], model()(text[None])[:, -3:])


@torch.no_grad()
def test_a_rewind_is_refused_with_what_the_ring_holds_and_what_the_next_token_would_see():
    cache = new_cache()
    model()(TOKENS[:, :30], cache=cache)
    with pytest.raises(ValueError, match=r"cannot truncate to 20: a sliding layer keeps 8 keys, from column 22 on, and "
                                         r"the token at 20 would see column 13\. Read the first 20 tokens again"):  # fmt: skip
        cache.truncate(20)
    for length in (-1, 31):
        with pytest.raises(ValueError, match=rf"cannot truncate to {length}: the cache holds 30 columns"):
            cache.truncate(length)
    assert_close(model()(TOKENS[:, 30:], cache=cache), model()(TOKENS)[:, 30:])  # a refusal changes nothing


@torch.no_grad()
def test_exactly_one_token_can_be_taken_back_once_the_ring_is_full():
    for length in (8, 9, 10, 30):
        cache = new_cache()
        model()(TOKENS[:, :length], cache=cache)
        other = random_tokens(CONFIG, 2, 4, seed=5)
        cache.truncate(length)
        cache.truncate(length - 1)
        assert_close(model()(other, cache=cache), model()(torch.cat([TOKENS[:, : length - 1], other], 1))[:, -4:])
        cache = new_cache()
        model()(TOKENS[:, :length], cache=cache)
        if length == 8:  # nothing was dropped yet
            cache.truncate(3)
        else:
            with pytest.raises(ValueError, match="cannot truncate"):
                cache.truncate(length - 2)


@torch.no_grad()
def test_taking_everything_back_starts_anew_at_any_length():
    for length in (0, 5, 30):
        cache = new_cache()
        if length:
            model()(TOKENS[:, :length], cache=cache)
        cache.truncate(0)
        assert cache.length == 0
        assert_close(model()(TOKENS[:, 30:], cache=cache), model()(TOKENS[:, 30:]))


@torch.no_grad()
def test_a_record_is_rewound_with_its_cache():
    lab, other = model(), random_tokens(CONFIG, 2, 2, seed=4)
    cache = new_cache()
    with record(lab, "*") as acts:
        lab(TOKENS[:, :5], cache=cache)
        lab(TOKENS[:, 5:8], cache=cache)
        before = acts["pattern", 1]
        cache.truncate(4)
        lab(other, cache=cache)
    _, whole = lab.run_with_cache(torch.cat([TOKENS[:, :4], other], 1), "*")
    for name, x in acts.items():
        assert_close(x.double(), whole[name].double())
    assert before.shape == (2, 4, 8, 8)


@torch.no_grad()
def test_a_record_opened_in_the_middle_of_a_text_has_its_positions_and_all_keys():
    lab, cache = model(), new_cache()
    whole = lab.run_with_cache(TOKENS[:, :9], "*.hook_pattern")[1]["pattern", 0]
    lab(TOKENS[:, :6], cache=cache)
    with record(lab, "*.hook_pattern", "hook_tokens") as acts:
        lab(TOKENS[:, 6:8], cache=cache)
        lab(TOKENS[:, 8:9], cache=cache)
        assert torch.equal(acts["hook_tokens"], TOKENS[:, 6:9])
        assert_close(acts["pattern", 0], whole[:, :, 6:])
        cache.truncate(8)
        lab(TOKENS[:, 20:21], cache=cache)
        assert torch.equal(acts["hook_tokens"], TOKENS[:, [6, 7, 20]])
    cache = new_cache()
    lab(TOKENS[:, :7], cache=cache)
    with record(lab, "hook_tokens") as acts:
        lab(TOKENS[:, 7:8], cache=cache)
        cache.truncate(3)  # to before the first recorded position
        lab(TOKENS[:, 30:32], cache=cache)
    assert torch.equal(acts["hook_tokens"], TOKENS[:, 30:32])


@torch.no_grad()
def test_a_record_of_another_cache_begins_anew():
    lab, first, second = model(), new_cache(), new_cache()
    with record(lab, "hook_tokens") as acts:
        lab(TOKENS[:, :5], cache=first)
        lab(TOKENS[:, 5:7], cache=first)
        assert torch.equal(acts["hook_tokens"], TOKENS[:, :7])
        lab(TOKENS[:1, :5], cache=second)
        assert torch.equal(acts["hook_tokens"], TOKENS[:1, :5])
        lab(TOKENS[:, 7:9], cache=first)
        assert torch.equal(acts["hook_tokens"], TOKENS[:, 7:9])
        lab(TOKENS)
        assert torch.equal(acts["hook_tokens"], TOKENS)


# ------------------------------------------------------------------------------------------------ failing


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_at_any_point_leaves_the_cache_as_it_was(error):
    lab, full = model(), model()(TOKENS[:, :21])

    def fail(x):
        raise error

    for capacity in (0, 64):
        cache = new_cache(capacity=capacity)
        read(lab, TOKENS[:, :15], cache, [10, 5])
        for name in lab.hook_points:
            with pytest.raises(error), lab.hooks([(name, fail)]):
                lab(random_tokens(CONFIG, 2, 3, seed=1), cache=cache)
            assert cache.length == 15, name
        assert_close(lab(TOKENS[:, 15:21], cache=cache), full[:, 15:])


@torch.no_grad()
def test_a_pass_refused_before_it_began_leaves_the_cache_and_its_record_as_they_were():
    lab, cache = model(), new_cache()
    with record(lab, "hook_tokens") as acts:
        lab(TOKENS[:, :10], cache=cache)
        for bad in (TOKENS[:, :200].repeat(1, 10), TOKENS + 100, TOKENS[:1], TOKENS.double()):
            with pytest.raises((ValueError, TypeError)):
                lab(bad, cache=cache)
        with pytest.raises(ValueError, match="attention_mask"):
            lab(TOKENS[:, 10:], torch.ones(2, 3), cache=cache)
        with pytest.raises(ValueError, match="stop_at_layer with a cache"):
            lab(TOKENS[:, 10:], cache=cache, stop_at_layer=1)
        lab(TOKENS[:, 10:12], cache=cache)
    assert torch.equal(acts["hook_tokens"], TOKENS[:, :12])


@torch.no_grad()
def test_a_record_goes_on_after_a_pass_that_failed_half_way():
    lab, cache = model(), new_cache()

    def fail(x):
        raise KeyboardInterrupt

    with record(lab, "*") as acts:
        lab(TOKENS[:, :10], cache=cache)
        with pytest.raises(KeyboardInterrupt):
            lab.run_with_hooks(TOKENS[:, 10:13], [(("z", 1), fail)], cache=cache)
        lab(TOKENS[:, 10:14], cache=cache)
    _, whole = lab.run_with_cache(TOKENS[:, :14], "*")
    for name, x in acts.items():
        assert_close(x.double(), whole[name].double())


@torch.no_grad()
def test_an_edit_that_reads_a_key_which_the_ring_has_dropped_is_refused():
    cache = new_cache()
    model()(TOKENS[:, :30], cache=cache)
    with pytest.raises(ValueError, match=r"layer 0 reads keys 0 to 21.*run the whole text in one pass"), \
            edit(model(), {("pattern", 0): lambda x: x + 0.01}):  # fmt: skip
        model()(TOKENS[:, 30:31], cache=cache)
    with edit(model(), {("pattern", 0): lambda x: x * 2, ("attn_scores", 0): lambda x: x + 1}):
        logits = model()(TOKENS[:, 30:31], cache=cache)
    with edit(model(), {("pattern", 0): lambda x: torch.cat([x[:, :, :-1], x[:, :, -1:] * 2], 2),
                        ("attn_scores", 0): lambda x: torch.cat([x[:, :, :-1], x[:, :, -1:] + 1], 2)}):  # fmt: skip
        assert_close(logits, model()(TOKENS[:, :31])[:, -1:])


# ------------------------------------------------------------------------------------------------ memory


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[40], [1] * 40, [5, 30, 5], [8, 32], [39, 1]], ids=str)
def test_a_sliding_layer_holds_its_window_and_no_more_and_a_full_layer_every_key(lengths):
    cache = new_cache(capacity=40)
    read(model(), TOKENS, cache, lengths)
    assert cache.n_bytes == 2 * 2 * KEY_BYTES * (8 + 40 + 8)
    only_sliding = model(8, (SLIDING,) * 3)
    cache = new_cache(only_sliding)
    read(only_sliding, TOKENS, cache, lengths)
    assert cache.n_bytes == 2 * 2 * KEY_BYTES * 3 * 8
    read(only_sliding, TOKENS, cache, lengths)
    assert cache.n_bytes == 2 * 2 * KEY_BYTES * 3 * 8 and cache.length == 80


@torch.no_grad()
def test_before_the_window_is_full_a_sliding_layer_holds_what_was_read():
    cache = new_cache(capacity=6)
    assert cache.n_bytes == 0
    for length in range(1, 7):
        model()(TOKENS[:, length - 1 : length], cache=cache)
        assert cache.n_bytes == 2 * 2 * KEY_BYTES * (length + 6 + length)


@torch.no_grad()
def test_without_a_capacity_a_full_layer_never_holds_more_than_twice_what_was_read():
    lab = model(8, (FULL,) * 3)
    cache = new_cache(lab)
    for length in range(1, 41):
        lab(TOKENS[:, length - 1 : length], cache=cache)
        assert cache.n_bytes <= 2 * 2 * KEY_BYTES * 3 * 2 * length


@torch.no_grad()
def test_padding_on_the_left_costs_a_sliding_layer_nothing():
    cache, mask = new_cache(capacity=40), padding([40, 12], 40, "left")
    read(model(), TOKENS, cache, [20, 20], mask)
    assert cache.n_bytes == 2 * 2 * KEY_BYTES * (8 + 40 + 8)
