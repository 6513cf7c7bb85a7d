"""The faster ways give the numbers of the readable one, and step aside where somebody would notice them."""
import pytest
import torch
import torch.nn.functional as F
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401
from torch import nn

from gptoss_lab import KVCache, edit, fast, generate, record
from gptoss_lab.generate import stream

CONFIG = tiny_config(n_ctx=512)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 8, 9])
def test_a_product_for_few_rows_is_the_linear_layer(n, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((n, 40), (24, 40), (24,)))
    for b in (None, bias):
        torch.testing.assert_close(fast.product(x, weight, b), F.linear(x, weight, b))
        torch.testing.assert_close(fast.product(x[None], weight, b), F.linear(x[None], weight, b))


def test_a_product_is_turned_for_few_rows_of_a_small_weight_only():
    x = torch.zeros(1, 2880)
    assert fast.product_is_turned(8, 256, 512, x) and fast.product_is_turned(1, 256, 1000, x.double())
    assert not fast.product_is_turned(9, 256, 512, x) and not fast.product_is_turned(1, 2880, 5760, x)
    assert not fast.product_is_turned(1, 256, 512, x.bfloat16()) and not fast.product_is_turned(1, 256, 512, x.to("meta"))


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch, length", [(1, 1), (1, 5), (2, 1), (2, 20), (3, 100)])
def test_with_nobody_listening_the_logits_are_those_of_the_readable_way(batch, length, packed):
    model, tokens = random_model(CONFIG, packed=packed), random_tokens(CONFIG, batch, length)
    with record(model, "*"):
        readable = model(tokens)
    assert (model(tokens) - readable).abs().max() < 1e-10


@torch.no_grad()
def test_the_next_token_is_read_as_the_readable_way_reads_it():
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 1, 30)
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    for given in (None, mask):
        with record(model, "*"):
            readable = model(tokens, given)
        cache = KVCache(CONFIG)
        parts = [model(tokens[:, :7], None if given is None else given[:, :7], cache=cache)]
        parts += [model(tokens[:, [i]], None if given is None else given[:, [i]], cache=cache) for i in range(7, 30)]
        assert (torch.cat(parts, 1) - readable)[:, 4:].abs().max() < 1e-10


def test_gradients_are_those_of_the_readable_way():
    tokens, found = random_tokens(CONFIG, 2, 20), []
    for names in ((), ("*",)):
        model = random_model(CONFIG)
        with record(model, *names or ["hook_embed"]):
            model(tokens).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for ours, readable in zip(*found, strict=True):
        torch.testing.assert_close(ours, readable, rtol=1e-9, atol=1e-12)


def test_a_layer_that_was_replaced_or_hooked_is_called_at_every_step():
    model, tokens, calls = random_model(CONFIG), random_tokens(CONFIG, 1, 5), []
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda *given: calls.append("qkv"))
    generate(model, tokens, 4, stop=())
    assert len(calls) == 4
    handle.remove()

    class Other(nn.Module):
        def forward(self, z):
            calls.append("out")
            return torch.zeros(*z.shape[:-1], CONFIG.d_model, dtype=z.dtype)

    model.blocks[0].attn.out = Other()
    generate(model, tokens, 4, stop=())
    assert calls[4:] == ["out"] * 4


def test_what_is_recorded_in_the_middle_of_a_stream_is_of_use_outside():
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 1, 5)
    expected = generate(model, tokens, 12, stop=())[0]
    steps = stream(model, tokens, 12, stop=())
    made = [next(steps)[0] for _ in range(3)]
    with record(model, "*.hook_resid_post", "*.hook_z") as acts, edit(model, {("q", 1): lambda q: q}):
        made += [next(steps)[0] for _ in range(4)]
    made += [step[0] for step in steps]
    assert made == expected
    probe = nn.Linear(CONFIG.d_model, 1, dtype=torch.float64)
    assert acts["resid_post", 3].shape[1] == 4 and not any(x.is_inference() for x in acts.values())
    probe(acts["resid_post", 3]).sum().backward()


@pytest.mark.parametrize("packed", [False, True])
def test_after_generating_the_model_gives_gradients(packed):
    model, tokens = random_model(CONFIG, packed=packed), random_tokens(CONFIG, 1, 5)
    generate(model, tokens, 3, stop=())
    model(tokens).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(x.is_inference() for x in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("point", ["q", "k", "v", "rot_q", "rot_k"])
def test_a_value_that_an_edit_left_with_other_strides_is_read_as_it_is(point):
    model = random_model(tiny_config(n_layers=1))
    tokens = random_tokens(model.config, 1, 20)  # of more than one sequence a copy would be made
    turned = lambda x: x.mT.contiguous().mT
    with torch.no_grad(), edit(model, {f"blocks.0.attn.hook_{point}": turned}):
        fast = model(tokens)
        with record(model, "*.hook_pattern"):  # the readable way
            readable = model(tokens)
    torch.testing.assert_close(fast, readable, atol=1e-10, rtol=0)
