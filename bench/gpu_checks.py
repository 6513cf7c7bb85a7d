"""What `bench/gpu.py` checks before it measures: the fast paths on a GPU against the readable one in more digits.

Every check is a name, an error and what may be. An error is |x - exact| / |exact| of a position; of several positions
the quantile `SHARE`, because rounding now and then sends a token to another expert, the more so the fewer digits. What
may be is `ALLOWED`, or twice the error of the readable path itself, on the same device with as few digits.
"""
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from bench.gpu_models import FIRST, SMALL, converted, fill, first_layers, model_of, random_state
from gptoss_lab import Config, GptOss, KVCache, generate, record

RECORDED = ("*.hook_resid_post", "*.hook_router_logits", "*.hook_sink_mass")  # fast paths make these
READABLE = ("*.hook_pattern", "*.hook_pre")  # and not these: whoever asks for them gets the path that can be read
ALLOWED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SHARE = {torch.float32: 0.9, torch.float16: 0.5, torch.bfloat16: 0.5}
NEW = 16  # tokens: more than generate needs for a CUDA graph

UNIT = "relative error"  # or standard deviations of a token's logits

Check = tuple[str, float, float]


def off(x: Tensor, exact: Tensor, share: float, keep: Tensor | None = None) -> float:
    """x and exact [b s ..], keep [b s]: the positions that count."""
    x, exact = (y.detach().cpu().double().flatten(2) for y in (x, exact))
    relative = (x - exact).norm(dim=-1) / exact.norm(dim=-1)
    relative = relative.flatten() if keep is None else relative[keep]
    return relative.quantile(share).item() if relative.isfinite().all() else math.inf


def values(model: GptOss, run: Callable, names=RECORDED) -> dict[str, Tensor]:
    """What `run` returns (logits, or nothing) and what is recorded meanwhile, [b s ..]."""
    with record(model, *names) if names else nullcontext() as acts:  # no names would mean the default group
        logits = run()
    found = {} if logits is None else {"logits": logits}
    if names:
        wanted = [point for point in model.hook_points.resolve(RECORDED) if point.name in acts]
        found |= {point.name: acts[point.name].movedim(point.axis("s"), 1) for point in wanted}
    return found


def compare(name: str, ours: dict, plain: dict, exact: dict, dtype: torch.dtype, keep: Tensor | None = None) -> Check:
    """The value that is furthest off, compared with what may be; `plain`: by the readable path with as few digits."""
    errors = {key: off(x, exact[key], SHARE[dtype], keep) for key, x in ours.items()}
    allowed = {key: max(ALLOWED[dtype], 2 * off(plain[key], exact[key], SHARE[dtype], keep)) for key in ours}
    worst = max(errors, key=lambda key: errors[key] / allowed[key])
    return f"{name}; worst: {worst}", errors[worst], allowed[worst]


def drawn(name: str, tokens: list[int], logits: Tensor, dtype: torch.dtype) -> Check:
    """How far the drawn tokens' exact logits lie below the largest, in standard deviations.   logits [s V]"""
    logits = logits.detach().cpu().double()
    below = (logits.amax(-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]) / logits.std(-1)
    below = below.quantile(SHARE[dtype]).item() if below.isfinite().all() else math.inf
    return f"{name}: drawn tokens are the most likely", below, ALLOWED[dtype]


def reading(model: GptOss, tokens: Tensor, *args, names=RECORDED, **settings) -> dict[str, Tensor]:
    return values(model, lambda: model(tokens.to(model.device), *args, **settings), names)


def readable(model: GptOss, tokens: Tensor, *args, **settings) -> dict[str, Tensor]:
    return reading(model, tokens, *args, names=RECORDED + READABLE, **settings)


def new_tokens(to: list[int], model: GptOss, prompt: list[int], cache: KVCache | None = None) -> None:
    to.extend(generate(model, prompt, NEW, stop=(), cache=cache)[0])


def few_digits(dtype: torch.dtype) -> Config:
    """Where a choice of experts would hang on rounding, all of them are chosen."""
    return SMALL if dtype == torch.float32 else SMALL.with_(n_experts=SMALL.experts_per_token)


@torch.no_grad()
def small(device: torch.device, dtype: torch.dtype, n: int = 200) -> Iterator[Check]:
    """Four small layers, sliding and full, against the readable path in float64 on the CPU."""
    config, label = few_digits(dtype), str(dtype).removeprefix("torch.")
    state = random_state(config, "cpu", dtype, sharp=True)
    exact = model_of(config, converted(state, "cpu", torch.float64))
    model = model_of(config, converted(state, device, dtype))
    text = torch.randint(config.d_vocab, (8, n), generator=torch.Generator().manual_seed(1))
    at = lambda name: f"small, {label}, {name}"

    for few in (1, 3, 37):
        some = text[:, :few]
        got, plain, whole = reading(model, some, names=()), readable(model, some), readable(exact, some)
        yield compare(at(f"{few} at once"), got, plain, whole, dtype)
    text = text[:2]
    plain, whole = readable(model, text), readable(exact, text)
    yield compare(at(f"{n} at once"), reading(model, text, names=()), plain, whole, dtype)
    yield compare(at(f"{n} at once, recorded"), reading(model, text), plain, whole, dtype)
    if dtype == torch.float32:  # with fewer digits it is the measure, not the measured
        none_allowed = {key: whole[key] for key in plain}
        yield compare(at(f"{n} at once, the readable path on this device"), plain, none_allowed, whole, dtype)
    cache = KVCache(config)
    chunks = lambda: torch.cat([model(part.to(device), cache=cache) for part in text.split(64, dim=1)], dim=1)
    yield compare(at("in chunks of 64"), values(model, chunks), plain, whole, dtype)
    keep = torch.ones_like(text, dtype=torch.bool)
    keep[0, : n // 3] = keep[1, -13:] = False
    mask = keep.to(device)
    got, plain, whole = reading(model, text, mask), readable(model, text, mask), readable(exact, text, keep)
    yield compare(at("padding on both sides"), got, plain, whole, dtype, keep)

    prompts = [text[0, :50].tolist(), text[1, :19].tolist(), text[1, 40:73].tolist()]
    afterwards = lambda model, prompt, new: readable(model, torch.tensor([prompt + new[:-1]]))
    for name, listened in (("nobody listening", ()), ("recorded", RECORDED), ("readable", RECORDED + READABLE)):
        tokens: list[int] = []
        got = values(model, partial(new_tokens, tokens, model, prompts[0]), listened)
        plain, whole = (afterwards(one, prompts[0], tokens) for one in (model, exact))
        yield drawn(at(f"generate, {name}"), tokens, whole["logits"][0, -NEW:], dtype)
        if got:
            yield compare(at(f"generate, {name}"), got, plain, whole, dtype)
    few = generate(model, prompts[0], 8, stop=())[0]  # so few that no graph is made of a step
    yield drawn(at("generate, 8 tokens"), few, afterwards(exact, prompts[0], few)["logits"][0, -8:], dtype)
    cache = KVCache(config)
    tokens = generate(model, prompts[0], NEW, stop=(), cache=cache)[0]
    tokens += generate(model, [tokens[-1]], NEW, stop=(), cache=cache)[0]
    whole = afterwards(exact, prompts[0], tokens)
    yield drawn(at("generate, a cache continued"), tokens, whole["logits"][0, -2 * NEW :], dtype)
    for row, tokens in enumerate(generate(model, prompts, NEW, stop=())):
        whole = afterwards(exact, prompts[row], tokens)
        yield drawn(at(f"generate, row {row} of a padded batch"), tokens, whole["logits"][0, -NEW:], dtype)


@torch.no_grad()
def layers(config: Config, device: torch.device, dtype: torch.dtype, filled: int = 4700) -> Iterator[Check]:
    """A sliding and a full layer of the real sizes against the readable path in float32, with the same numbers."""
    config = first_layers(config, 2)
    state = random_state(config, device, dtype, sharp=True)
    wide = model_of(config, converted(state, device, torch.float32))
    for model in (wide, model_of(config, state)):
        kind, g = model.dtype, torch.Generator().manual_seed(2)
        label = f"real sizes, {str(kind).removeprefix('torch.')}"
        ours, plains, exacts = (KVCache(config, capacity=filled + 1000) for _ in range(3))
        for context, n in ((0, 300), (filled, 200)):
            for one, cache in (model, ours), (model, plains), (wide, exacts):
                fill(one, cache, context)
            name = f"{label}, {n} tokens after {ours.length}"
            text = torch.randint(config.d_vocab // 2, (1, n), generator=g)
            plain = readable(model, text, cache=plains, logits_to_keep=3)
            exact = readable(wide, text, cache=exacts, logits_to_keep=3)
            yield compare(name, reading(model, text, cache=ours, logits_to_keep=3), plain, exact, kind)
            tokens: list[int] = []
            got = values(model, partial(new_tokens, tokens, model, [FIRST], cache=ours))
            text = torch.tensor([[FIRST, *tokens[:-1]]])
            plain, exact = readable(model, text, cache=plains), readable(wide, text, cache=exacts)
            name = f"{name}, {NEW} more one by one"
            yield compare(name, got, plain, exact, kind)
            yield drawn(name, tokens, exact["logits"][0], kind)


@torch.no_grad()
def large_values(device: torch.device) -> Iterator[Check]:
    """float16 with what real weights make: residual values of 124, attention scores around -100."""
    config = few_digits(torch.float16)
    state = random_state(config, "cpu", torch.float16, sharp=True)
    state["embed.weight"][:, 7] = 124
    for layer in range(config.n_layers):
        state[f"blocks.{layer}.attn.qkv.bias"] *= 100
    exact = model_of(config, converted(state, "cpu", torch.float64))
    model = model_of(config, converted(state, device, torch.float16))
    text = torch.randint(config.d_vocab, (1, 200), generator=torch.Generator().manual_seed(3))
    got, plain, whole = reading(model, text), readable(model, text), readable(exact, text)
    finite = all(x.isfinite().all() for x in got.values())
    yield "float16, residuals of 124 and scores of 100: values that are not finite", 0.0 if finite else math.inf, 0.0
    yield compare("float16, residuals of 124 and scores of 100", got, plain, whole, torch.float16)
