"""torch.compile changes no number and no hook: opened before it, after it, closed again."""
import functools

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401

from gptoss_lab import KVCache, edit, record

CONFIG = tiny_config(n_layers=1)  # a sliding layer; every other one costs as long again to compile
TOKENS = random_tokens(CONFIG, 2, 20)
NAMES = ("hook_tokens", "*.hook_q", "*.hook_pattern", "*.hook_post", "*.hook_resid_post")


@functools.cache
def model():
    return random_model(CONFIG)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gap(x, y) -> float:
    assert x.shape == y.shape and torch.equal(x.isfinite(), y.isfinite())
    return (x - y)[x.isfinite()].abs().max().item()


def recorded(run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with record(run, *NAMES) as acts:
        logits = run(TOKENS)
    return logits, dict(acts.items())


def same_record(compiled, eager) -> None:
    assert gap(compiled[0], eager[0]) < 1e-11
    assert list(compiled[1]) == list(eager[1])
    assert max(gap(x, eager[1][name]) for name, x in compiled[1].items()) < 1e-11


@torch.no_grad()
def test_hooks_opened_after_compiling_are_heard_and_closed_ones_are_not():
    eager, compiled = model(), torch.compile(model(), backend="eager")
    plain = eager(TOKENS)
    assert gap(compiled(TOKENS), plain) < 1e-11
    same_record(recorded(compiled), recorded(eager))
    assert gap(compiled(TOKENS), plain) < 1e-11
    halve = {("z", 0): lambda z: z / 2}
    with edit(eager, halve):
        changed = eager(TOKENS)
    with edit(compiled, halve):
        assert gap(compiled(TOKENS), changed) < 1e-11
    assert gap(changed, plain) > 0.1
    assert gap(compiled(TOKENS), plain) < 1e-11
    cache = KVCache(CONFIG)
    parts = [compiled(TOKENS[:, :18], cache=cache), compiled(TOKENS[:, 18:19], cache=cache)]
    assert gap(torch.cat(parts, 1), plain[:, :19]) < 1e-11


@torch.no_grad()
def test_hooks_opened_before_compiling_are_heard_and_closed_ones_are_not():
    eager, compiled = model(), torch.compile(model(), backend="eager")
    same_record(recorded(compiled), recorded(eager))
    assert gap(compiled(TOKENS), eager(TOKENS)) < 1e-11
    same_record(recorded(compiled), recorded(eager))
    with pytest.raises(ValueError, match="token id 61 is outside the vocabulary"):
        compiled(TOKENS * 0 + 61)
    with pytest.raises(ValueError, match="blocks.0.attn.hook_z returned shape"), edit(compiled, {("z", 0): lambda z: z[:1]}):
        compiled(TOKENS)


def test_gradients_by_recorded_values_are_those_of_the_eager_model():
    gradients = []
    for run in (model(), torch.compile(model(), backend="aot_eager")):
        with record(run, "*.hook_resid_pre", "*.hook_q", "*.hook_post") as acts:
            logits = run(TOKENS)
        gradients.append(torch.autograd.grad(logits[0, -1, 3], list(acts.values())))
    for x, y in zip(*gradients, strict=True):
        assert y.abs().max() > 0 and gap(x, y) < 1e-11


@torch.no_grad()
def test_the_compiler_that_makes_machine_code_gives_the_same_numbers():
    lab, compiled, point = model(), torch.compile(model()), ("resid_mid", 0)
    assert gap(compiled(TOKENS), lab(TOKENS)) < 1e-11
    with record(lab, point) as eager, edit(lab, {point: lambda x: x / 2}):
        changed = lab(TOKENS)
    with record(compiled, point) as acts, edit(compiled, {point: lambda x: x / 2}):
        assert gap(compiled(TOKENS), changed) < 1e-11
    assert gap(acts[point], eager[point]) < 1e-11
