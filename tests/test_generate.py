"""Tokens made one after the other are those of the plain loop, and everything on the way can be seen and changed."""
import functools
import itertools
import math
import sys

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

from gptoss_lab import KVCache, edit, generate, plan, record, stream
from gptoss_lab.generate import Stopped, sample

CONFIG = tiny_config(n_layers=3)
PROMPTS = [random_tokens(CONFIG, 1, length, seed=length)[0].tolist() for length in (11, 3, 17)]


@functools.cache
def model(packed: bool = False, **changes):
    return random_model(CONFIG.with_(**changes), seed=7, packed=packed)  # of its greedy texts none repeats itself


def greedy_by_hand(lab, prompt: list[int], n: int) -> list[int]:
    """Without a cache, without a batch: the whole text again for every token."""
    text = list(prompt)
    for _ in range(n):
        text.append(lab(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt) :]


def assert_close(x, y, tolerance=1e-10) -> None:
    assert x.shape == y.shape
    x, y = x.double(), y.double()
    assert torch.equal(x.isfinite(), y.isfinite())
    if x.isfinite().any():
        assert (x - y)[x.isfinite()].abs().max() < tolerance


# ------------------------------------------------------------------------------------------------ which tokens


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("prefill_chunk", [1, 4, 2048])
def test_greedy_generation_is_the_plain_loop_for_each_of_several_prompts(packed, prefill_chunk):
    lab = model(packed)
    made = generate(lab, PROMPTS, 20, prefill_chunk=prefill_chunk)
    assert made == [greedy_by_hand(lab, prompt, 20) for prompt in PROMPTS]
    assert min(len(set(row)) for row in made) > 8


@torch.no_grad()
def test_a_prompt_may_be_ids_or_a_tensor_or_text():
    alone = generate(model(), PROMPTS[0], 5)
    assert alone == generate(model(), [PROMPTS[0]], 5) == [greedy_by_hand(model(), PROMPTS[0], 5)]
    assert generate(model(), torch.tensor(PROMPTS[0]), 5) == alone
    assert generate(model(), torch.tensor([PROMPTS[0]] * 2, dtype=torch.int32), 5) == alone * 2
    assert generate(model(), [torch.tensor(PROMPTS[0]), PROMPTS[1]], 5) == alone + generate(model(), PROMPTS[1], 5)
    assert generate(model(), tuple(PROMPTS[0]), 5) == alone

    class Letters:
        def encode(self, text):
            return [ord(letter) - ord("a") for letter in text]

    lab = random_model(CONFIG)
    lab.read_tokenizer = Letters
    assert generate(lab, "lab", 5) == generate(lab, [11, 0, 1], 5)
    assert generate(lab, ["lab", [11, 0, 1], "hooks"], 5)[:2] == generate(lab, "lab", 5) * 2


@torch.no_grad()
def test_a_prompt_ends_with_its_stop_token_and_the_others_go_on_as_alone():
    free = generate(model(), PROMPTS, 20, stop=())
    stop = free[1][6]
    assert stop not in free[1][:6]
    made = generate(model(), PROMPTS, 20, stop=[stop])
    assert made == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert made[1] == free[1][:7]
    assert made == generate(model(stop_tokens=(stop,)), PROMPTS, 20)
    assert generate(model(stop_tokens=(stop,)), PROMPTS, 20, stop=()) == free
    assert generate(model(), PROMPTS, 20, stop={row[0] for row in free}) == [row[:1] for row in free]


@torch.no_grad()
def test_a_stream_gives_a_list_a_step_and_none_for_a_prompt_that_has_ended():
    free = generate(model(), PROMPTS, 12, stop=())
    stop = free[1][4]
    steps = list(stream(model(), PROMPTS, 12, stop=[stop]))
    assert all(len(step) == 3 for step in steps)
    columns = [list(column) for column in zip(*steps, strict=True)]
    for column, row in zip(columns, generate(model(), PROMPTS, 12, stop=[stop]), strict=True):
        assert column == row + [None] * (len(steps) - len(row))
    everyone = {row[2] for row in free}
    assert len(list(stream(model(), PROMPTS, 12, stop=everyone))) <= 3  # ends when all have ended


def test_a_stream_computes_a_step_when_it_is_asked_for():
    passes = []
    with model().hooks([("hook_embed", lambda x: passes.append(x.shape[1]))]):
        steps = stream(model(), PROMPTS[:1], 12)
        assert passes == []
        next(steps), next(steps)
        assert passes == [11, 1]
        steps.close()
    assert model()(torch.tensor(PROMPTS[:1])).requires_grad  # gradients are on outside, and between the steps


def test_between_the_steps_of_a_stream_gradients_are_as_the_caller_had_them():
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in stream(model(), PROMPTS[:1], 3):
                assert torch.is_grad_enabled() == grad


@torch.no_grad()
def test_the_context_can_be_filled_to_its_last_position_and_no_further():
    lab = model(n_ctx=30)
    assert len(generate(lab, PROMPTS[2], 14)[0]) == 14  # 17 + 14 tokens, of which the last is never read
    with pytest.raises(ValueError, match=r"max_new_tokens = 15 need 31 positions, the context has 30"):
        generate(lab, PROMPTS[2], 15)


# ------------------------------------------------------------------------------------------------ sampling


def by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> dict[int, float]:
    """Token -> probability, as the settings say it."""
    best = max(logits)
    weights = {token: math.exp((x - best) / temperature) for token, x in enumerate(logits)}
    kept = sorted(weights, key=lambda token: -weights[token])[:top_k]
    total = sum(weights[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if top_p is not None and reached >= top_p:
            break
        nucleus.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in nucleus)
    return {token: weights[token] / total for token in nucleus}


@pytest.mark.parametrize("settings", [*itertools.product([0.5, 2.0], [None, 1, 5, 100], [None, 0.2, 0.9, 1.0])], ids=str)
def test_tokens_are_drawn_with_the_probabilities_that_the_settings_mean(settings):
    logits = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 2
    expected, draws = by_hand(logits.tolist(), *settings), 20_000
    drawn = sample(logits.expand(draws, -1), *settings, generator=torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=24)
    assert set(counts.nonzero().flatten().tolist()) <= set(expected)  # nothing outside is ever drawn
    common = {token: p * draws for token, p in expected.items() if p * draws >= 5}
    chi_square = sum((counts[token].item() - mean) ** 2 / mean for token, mean in common.items())
    assert chi_square < len(common) + 5 * math.sqrt(2 * len(common))


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()

    def support(**settings):
        kept = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
        drawn = sample(logits.expand(2000, -1), **kept, generator=torch.Generator().manual_seed(1))
        return set(drawn.tolist())

    assert support(top_p=0.3) == {0}
    assert support(top_p=0.499) == {0}
    assert support(top_p=0.6) == {0, 1}
    assert support(top_p=0.8) == {0, 1, 2}  # of equal tokens the first
    assert support(top_p=1.0) == {0, 1, 2, 3}
    assert support(top_k=3) == {0, 1, 2}
    assert support(top_k=2, top_p=0.66) == {0}  # top_k first: the two left have 2/3 and 1/3
    assert support(top_k=2, top_p=0.67) == {0, 1}
    assert support(temperature=1e-3) == {0}


@torch.no_grad()
def test_a_seed_repeats_the_draws_and_another_does_not():
    draw = functools.partial(generate, model(), PROMPTS, 16, temperature=1.5)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw() != draw()  # without a seed, no two are alike
    before = torch.random.get_rng_state()
    draw(seed=1), draw()
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator is not touched
    assert draw(seed=1, temperature=0) == draw(seed=2, temperature=0) == generate(model(), PROMPTS, 16)
    assert draw(seed=1, top_k=1) == generate(model(), PROMPTS, 16)


@torch.no_grad()
def test_sampled_tokens_are_drawn_from_the_distribution_after_the_text_so_far():
    generator = torch.Generator().manual_seed(7)
    text, made = list(PROMPTS[0]), []
    for _ in range(10):
        logits = model()(torch.tensor([text]))[:, -1]
        made.append(sample(logits, 1.3, 7, 0.9, generator).item())
        text.append(made[-1])
    assert generate(model(), PROMPTS[0], 10, temperature=1.3, top_k=7, top_p=0.9, seed=7) == [made]


# ------------------------------------------------------------------------------------------------ hooks at every step


@torch.no_grad()
@pytest.mark.parametrize("prefill_chunk", [5, 2048])
def test_what_is_recorded_of_all_steps_is_what_one_pass_over_the_text_records(prefill_chunk):
    with record(model(), "*") as acts:
        (made,) = generate(model(), PROMPTS[0], 14, prefill_chunk=prefill_chunk)
    read = torch.tensor([PROMPTS[0] + made[:-1]])  # the last token is nobody's input
    _, whole = model().run_with_cache(read, "*")
    assert list(acts) == list(whole)
    for name, x in acts.items():
        assert_close(x, whole[name])


@torch.no_grad()
@pytest.mark.parametrize("prefill_chunk", [4, 2048])
def test_what_is_recorded_of_a_batch_of_unequal_prompts_is_what_each_records_alone(prefill_chunk):
    points = model().hook_points
    with record(model(), "*") as acts:
        made = generate(model(), PROMPTS, 10, prefill_chunk=prefill_chunk)
    width = max(map(len, PROMPTS))
    for row, (prompt, new) in enumerate(zip(PROMPTS, made, strict=True)):
        _, alone = model().run_with_cache(torch.tensor([prompt + new[:-1]]), "*")
        left = width - len(prompt)
        for name, x in acts.items():
            letters = points[name].shape.split()
            x = x[row : row + 1].narrow(letters.index("s") - len(letters), left, x.shape[letters.index("s") - len(letters)] - left)
            if "t" in letters:
                padding = x[..., :left]
                assert (padding == (0 if name.endswith("pattern") else -torch.inf)).all(), name
                x = x[..., left:]
            assert_close(x, alone[name] if x.dim() == alone[name].dim() else alone[name][None])


@torch.no_grad()
def test_in_a_sliding_layer_the_recorded_pattern_is_zero_outside_the_window_at_every_step():
    with record(model(), "*.hook_pattern", "*.hook_attn_scores") as acts:
        generate(model(), PROMPTS[2], 20)
    query, key = torch.arange(36)[:, None], torch.arange(36)
    for layer, window in ((0, 8), (1, 36), (2, 8)):
        visible = (key <= query) & (query - key < window)
        assert ((acts["pattern", layer] > 0) == visible).all()
        assert (acts["attn_scores", layer].isfinite() == visible).all()


@torch.no_grad()
def test_an_edit_acts_at_every_step():
    edits = {("z", 1): lambda z: z * 0.3, ("router_logits", 2): lambda x: x.flip(-1)}
    plain = generate(model(), PROMPTS, 12)
    with edit(model(), edits):
        made = generate(model(), PROMPTS, 12)
        assert made == [greedy_by_hand(model(), prompt, 12) for prompt in PROMPTS]
    assert made != plain == generate(model(), PROMPTS, 12)


@torch.no_grad()
def test_a_slice_of_positions_is_kept_of_every_pass():
    with record(model(), "hook_tokens", pos_slice=-1) as acts:
        (made,) = generate(model(), PROMPTS[0], 6)
    assert acts["hook_tokens"].tolist() == [[PROMPTS[0][-1], *made[:-1]]]


# ------------------------------------------------------------------------------------------------ stopping, going on


@torch.no_grad()
def test_a_cache_is_continued_with_the_prompt_as_the_next_tokens():
    cache = KVCache(CONFIG)
    first = generate(model(), PROMPTS[0], 5, cache=cache)[0]
    assert cache.length == 11 + 4
    second = generate(model(), [first[-1:] + PROMPTS[1]], 6, cache=cache)
    assert second == [greedy_by_hand(model(), PROMPTS[0] + first + PROMPTS[1], 6)]
    assert cache.length == 11 + 5 + 3 + 5
    with pytest.raises(ValueError, match=r"need 129 positions, the context has 128"):
        generate(model(), PROMPTS[1], 128 - 24 - 3 + 2, cache=cache)


@torch.no_grad()
def test_rows_that_ended_early_are_continued_from_where_they_ended():
    free = generate(model(), PROMPTS, 12, stop=())
    stop = free[1][4]
    cache = KVCache(CONFIG)
    made = generate(model(), PROMPTS, 12, stop=[stop], cache=cache)
    assert len(set(map(len, made))) > 1
    more = [[row[-1], 5, 6, 7] for row in made]
    second = generate(model(), more, 6, stop=(), cache=cache)
    assert second == [greedy_by_hand(model(), prompt + row + [5, 6, 7], 6) for prompt, row in zip(PROMPTS, made, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("where", ["hook_embed", "blocks.1.attn.hook_z", "unembed.hook_out"])
def test_after_ctrl_c_the_model_is_clean_and_the_cache_goes_on(where):
    lab, cache, calls = model(), KVCache(CONFIG), []
    (uninterrupted,) = generate(lab, PROMPTS[0], 12)

    def interrupt(x):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    made = []
    with pytest.raises(KeyboardInterrupt), record(lab, "*") as acts, lab.hooks([(where, interrupt)]):
        for (token,) in stream(lab, PROMPTS[0], 12, cache=cache):
            made.append(token)
    assert made == uninterrupted[:4] and cache.length == 11 + 3
    assert lab.recordings == () and not any(getattr(m, "listeners", None) for m in lab.modules())
    assert torch.equal(acts["hook_tokens"][:, :14], torch.tensor([PROMPTS[0] + made[:-1]]))
    assert generate(lab, [made[-1:]], 8, cache=cache) == [uninterrupted[4:]]


@torch.no_grad()
def test_a_stream_that_is_left_early_leaves_a_cache_that_goes_on():
    (all_of_it,) = generate(model(), PROMPTS[0], 12)
    cache = KVCache(CONFIG)
    made = [token for (token,) in itertools.islice(stream(model(), PROMPTS[0], 12, cache=cache), 5)]
    assert made == all_of_it[:5]
    assert generate(model(), [made[-1:]], 7, cache=cache) == [all_of_it[5:]]


# ------------------------------------------------------------------------------------------------ settings that mean nothing


@pytest.mark.parametrize(("settings", "message"), [
    ({"max_new_tokens": 0}, r"max_new_tokens = 0: must be a whole number of at least 1"),
    ({"max_new_tokens": 1.5}, r"max_new_tokens = 1.5: must be a whole number"),
    ({"temperature": -1}, r"temperature = -1: must be at least 0"),
    ({"temperature": math.nan}, r"temperature = nan: must be at least 0"),
    ({"top_k": 0, "temperature": 1}, r"top_k = 0: must be a whole number of at least 1"),
    ({"top_p": 0.0, "temperature": 1}, r"top_p = 0.0: must be above 0 and at most 1"),
    ({"top_p": 1.5, "temperature": 1}, r"top_p = 1.5: must be above 0 and at most 1"),
    ({"prefill_chunk": 0}, r"prefill_chunk = 0: must be a whole number of at least 1"),
    ({"max_new_tokens": 200}, r"max_new_tokens = 200 need 210 positions, the context has 128"),
], ids=str)  # fmt: skip
def test_a_setting_that_means_nothing_is_refused_with_its_value_and_bounds(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), PROMPTS[0], **settings)


@pytest.mark.parametrize(("prompts", "message"), [
    ([], "there is no prompt"), ([[1, 2], []], "prompt 1 is empty"), (torch.zeros(2, 0, dtype=torch.int64), "prompt 0 is empty"),
    ("some text", "this model has no tokenizer: give token ids"), (torch.rand(1, 3), r"prompts must be ids \[s\] or \[b s\]"),
    (torch.zeros(1, 2, 3, dtype=torch.int64), r"prompts must be ids \[s\] or \[b s\]"),
    ([[1, 61]], "token id 61 is outside the vocabulary of 61"), ([[1, -1]], "token id -1 is outside the vocabulary"),
], ids=str)  # fmt: skip
def test_a_prompt_that_is_none_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), prompts, 2)


# ------------------------------------------------------------------------------------------ memory, and devices that fail


def test_more_positions_than_fit_are_refused_with_the_largest_that_do(monkeypatch):
    lab = model()
    module = sys.modules["gptoss_lab.generate"]
    monkeypatch.setattr(module, "UNASKED", 0)
    room = plan.plan(lab, context=60, device="cpu", memory=None)
    monkeypatch.setattr(plan, "free_bytes", lambda device: room.total)
    with record(lab) as acts, pytest.raises(MemoryError, match="The largest context that fits is 60"):
        generate(lab, random_tokens(lab.config, 1, 50), 11, stop=())
    assert not len(acts)
    assert len(generate(lab, random_tokens(lab.config, 1, 50), 10, stop=())[0]) == 10


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
    torch.AcceleratorError("CUDA error: device-side assert"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
])  # fmt: skip
def test_a_device_that_fails_leaves_the_tokens_so_far_and_a_model_that_works(error):
    lab = model()
    prompt, calls = random_tokens(lab.config, 1, 5), []
    expected = generate(lab, prompt, 12, stop=())[0]

    def fail(x):
        calls.append(0)
        if len(calls) == 6:
            raise error

    cache = KVCache(lab.config)
    with edit(lab, {("mlp_out", 2): fail}), pytest.raises(Stopped) as caught:
        generate(lab, prompt, 12, stop=(), cache=cache)
    said = str(caught.value)
    assert caught.value.tokens == [expected[:5]] and caught.value.layer == 2 and caught.value.__cause__ is error
    assert "in layer 2 of 3" in said and str(error).splitlines()[0] in said and "more\n" not in said
    assert cache.length == 9 and not cache._pending and not lab.listened_to
    rest = generate(lab, [[expected[4]]], 7, stop=(), cache=cache)[0]
    assert rest == expected[5:]


def test_an_error_of_another_kind_is_left_as_it_is():
    lab = model()
    def fail(x):
        raise RuntimeError("mine")

    with edit(lab, {("mlp_out", 2): fail}), pytest.raises(RuntimeError, match="^mine$"):
        generate(lab, random_tokens(lab.config, 1, 5), 3, stop=())
