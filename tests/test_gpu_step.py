"""Decoding by a captured step: on a CPU, with Triton's interpreter for the kernels and a tape for the CUDA graph."""
import pytest
import tape
import torch
from kernels import interpreted, within_reach
from models import random_model, random_tokens, tiny_config

from gptoss_lab import edit, generate, record
from gptoss_lab.generate import ENOUGH, Stopped, stream
from gptoss_lab.kv_cache import KVCache

CLOSE = dict(atol=2e-4, rtol=2e-4)
NEW = 10


@pytest.fixture
def graphs(monkeypatch):
    """Every step is captured on tape; gives the steps that were made."""
    rows, experts, step = (interpreted(name) for name in ("rows", "experts", "step"))
    made = []
    # The interpreter takes a millisecond a program: few large ones. Blocks of the sizes used on a GPU are tested elsewhere.
    monkeypatch.setattr(rows, "blocks", lambda d_out, d_in, n, size: (n, 128, 64))
    for name, size in (("PAIRS", 64), ("ROWS", 32), ("STEP", 2)):
        monkeypatch.setattr(experts, name, size)
    monkeypatch.setattr(step, "captured", tape.captured)
    monkeypatch.setattr(step.Step, "__init__", lambda self, *a, _init=step.Step.__init__: (made.append(self), _init(self, *a))[1])
    with within_reach():
        yield made


def readable(model, *args, names=(), **settings):
    """Tokens, and what was recorded, without any kernel."""
    from gptoss_lab.fast import gpu

    reaches, gpu.reaches = gpu.reaches, lambda x: False
    try:
        with record(model, "*.hook_pre", *names) as acts:
            return generate(model, *args, stop=(), **settings), acts
    finally:
        gpu.reaches = reaches


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(n_layers=2, sliding_window=4), dtype=torch.float32, packed=True)


def test_a_graph_makes_the_tokens_of_the_readable_way_past_the_window(model, graphs):
    prompt = random_tokens(model.config, 1, 5)
    assert generate(model, prompt, NEW, stop=()) == readable(model, prompt, NEW)[0]
    assert len(graphs) == 1 and graphs[0].length == 5 + NEW - 1 > 2 * model.config.sliding_window


def test_what_is_recorded_inside_the_graph_is_what_the_readable_way_records(model, graphs):
    names = ("*.hook_resid_*", "*.hook_router_logits", "*.hook_expert_*s", "*.hook_sink_mass", "*.hook_z", "hook_logits", "*.hook_mlp_out")
    prompt = random_tokens(model.config, 1, 5)
    with record(model, *names) as acts:
        made = generate(model, prompt, NEW, stop=())
    tokens, expected = readable(model, prompt, NEW, names=names)
    assert made == tokens and len(graphs) == 1 and len(acts) > 15
    for name, x in acts.items():
        torch.testing.assert_close(x, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        assert x.shape[model.hook_points[name].axis("s")] == 5 + NEW - 1


def test_recorded_steps_are_their_own_memory(model, graphs):
    with record(model, "*.hook_resid_post") as acts:
        seen = []
        for _ in stream(model, random_tokens(model.config, 1, 5), NEW, stop=()):
            seen.append(acts["resid_post", 0][:, -1].clone())
    torch.testing.assert_close(acts["resid_post", 0][:, 4:], torch.stack(seen, 1), atol=0, rtol=0)


def test_slices_and_other_listeners_hear_each_step(model, graphs):
    prompt, norms = random_tokens(model.config, 1, 5), []
    with record(model, "*.hook_z", pos_slice=slice(-1, None)) as acts, record(model, "*.hook_z") as whole:
        generate(model, prompt, NEW, stop=())
    assert len(graphs) == 1 and not norms
    torch.testing.assert_close(acts["z", 1][:, -1:], whole["z", 1][:, -1:], atol=0, rtol=0)


def test_prompts_of_different_lengths_are_read_side_by_side(model, graphs):
    prompts = [random_tokens(model.config, 1, n, seed=n)[0].tolist() for n in (3, 11)]
    assert generate(model, prompts, NEW, stop=()) == readable(model, prompts, NEW)[0]
    assert len(graphs) == 1 and graphs[0].fixed.first.tolist() == [8, 0]


def test_a_cache_of_ones_own_goes_on_after_the_steps(model, graphs):
    prompt, cache = random_tokens(model.config, 1, 5), KVCache(model.config)
    made = generate(model, prompt, NEW, stop=(), cache=cache)[0]
    assert len(graphs) == 1 and cache.length == 5 + NEW - 1
    ids = prompt[0].tolist() + made
    with torch.no_grad():
        after = model(torch.tensor([[made[-1], 7]]), cache=cache)
        whole = model(torch.tensor([[*ids, 7]]))[:, -2:]
    torch.testing.assert_close(after, whole, **CLOSE)
    cache.truncate(cache.length - 1)


def test_a_record_that_is_closed_midway_is_told_no_more(model, graphs):
    prompt = random_tokens(model.config, 1, 5)
    steps = stream(model, prompt, NEW, stop=())
    with record(model, "*.hook_resid_post") as acts:
        made = [next(steps)[0] for _ in range(4)]
    made += [step[0] for step in steps]
    assert [made] == readable(model, prompt, NEW)[0]
    assert acts["resid_post", 0].shape[1] == 5 + 3 and len(graphs) == 2


@pytest.mark.parametrize("name", ["pattern", "pre", "result", "q", "rot_k", "sink_scores"])
def test_what_only_the_readable_way_makes_is_read_there(model, graphs, name):
    prompt = random_tokens(model.config, 1, 5)
    with record(model, f"*.hook_{name}") as acts:
        made = generate(model, prompt, NEW, stop=())
    assert not graphs and made == readable(model, prompt, NEW)[0]
    assert acts[name, 1].shape[model.hook_points[name, 1].axis("s")] == 5 + NEW - 1


def test_edits_are_applied_at_every_step(model, graphs):
    prompt, change = random_tokens(model.config, 1, 5), {("mlp_out", 0): lambda x: -2 * x}
    with edit(model, change):
        made = generate(model, prompt, NEW, stop=())
        assert not graphs and made == readable(model, prompt, NEW)[0]
    assert made != generate(model, prompt, NEW, stop=())


def test_a_generation_that_is_left_gives_its_columns_back(model, graphs):
    prompt, cache = random_tokens(model.config, 1, 5), KVCache(model.config)
    steps = stream(model, prompt, NEW, stop=(), cache=cache)
    for _ in range(4):
        next(steps)
    steps.close()
    assert len(graphs) == 1 and cache.length == 5 + 3


def test_a_gpu_that_fails_in_mid_graph_leaves_tokens_and_cache(model, graphs):
    prompt, cache = random_tokens(model.config, 1, 5), KVCache(model.config)
    steps = stream(model, prompt, NEW, stop=(), cache=cache)
    made = [next(steps)[0] for _ in range(4)]

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    graphs[0].replay = fail
    with pytest.raises(Stopped, match="outside the layers, after 8 tokens read and 4 new ones: CUDA out of memory") as caught:
        next(steps)
    assert caught.value.tokens == [made] and cache.length == 5 + 3
    rest = generate(model, [[made[-1]]], 2, stop=(), cache=cache)[0]
    assert [made + rest] == readable(model, prompt, 6)[0]


def test_a_step_that_read_nothing_leaves_the_cache_as_it_was(model, graphs):
    prompt, cache = random_tokens(model.config, 1, 9), KVCache(model.config)
    with torch.no_grad():
        model(prompt, cache=cache)
        before = {layer: tuple(x.clone() for x in kept) for layer, kept in cache.layers.items()}
        interpreted("step").following(None, model, cache, 20).close()
    for layer, kept in before.items():
        assert all(torch.equal(x[:, :9], old[:, :9]) for x, old in zip(cache.layers[layer], kept)), layer


def test_more_rows_than_experts_take_without_a_look_are_read_the_usual_way(model, graphs, monkeypatch):
    monkeypatch.setattr(interpreted("experts"), "FEW_ALONE", 1)
    prompts = random_tokens(model.config, 2, 3)
    assert generate(model, prompts, ENOUGH + 1, stop=()) == readable(model, prompts, ENOUGH + 1)[0]
    assert not graphs


def test_the_tape_sees_a_look_at_a_value():
    interpreted("rows")
    x = torch.arange(3.0)
    for look in (lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x[0] > 1), lambda: int(x[1])):
        with pytest.raises(tape.Looked):
            tape.captured(look)
