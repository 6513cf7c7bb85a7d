"""Continuing prompts, one token a step, with the model's hooks open all the while."""
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from . import fast
from .hooks import UNASKED, unwrapped
from .kv_cache import KVCache
from .model import Block
from .plan import plan

ENOUGH = 8  # new tokens for which a step is worth capturing


class Stopped(RuntimeError):
    """The device failed in mid-generation. `tokens` holds what each prompt got before, `layer` how far the pass came.

    The model and its hooks are as they were, and so is a cache that was given.
    """

    def __init__(self, message: str, tokens: list[list[int]], layer: int | None):
        super().__init__(message)
        self.tokens, self.layer = tokens, layer


def generate(model: nn.Module, prompts, max_new_tokens: int | None = None, **settings) -> list[list[int]]:
    """The new tokens of each prompt, a stop token included where one ended it.

    Args:
        model: a GptOss, compiled or not.
        prompts: text, token ids, a list of either, or a tensor [b s].
        max_new_tokens: tokens to make at most; None is 128, or as many as the context still holds.
        settings: those of `stream`.

    Raises:
        Stopped: the device is lost or out of memory; its `tokens` are what had been made.

    Interrupted (Ctrl-C) it raises KeyboardInterrupt and keeps nothing; with `stream` what came before is yours.
    """
    rows: list[list[int]] = [[] for _ in _as_ids(model, prompts)]
    for step in stream(model, prompts, max_new_tokens, **settings):
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
    return rows


@torch.no_grad()
def stream(
    model: nn.Module, prompts, max_new_tokens: int | None = None, *, temperature: float = 0.0, top_k: int | None = None,
    top_p: float | None = None, seed: int | None = None, stop: Iterable[int] | None = None, prefill_chunk: int = 2048,
    cache: KVCache | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """One list a step: the new token of each prompt, None for a prompt that has ended.

    `record` around it joins every step along positions: prompt and new tokens, except the last one, which nobody reads.
    Prompts of different lengths are padded on the left; each gets what it gets alone.

    Args:
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
        top_k: draw among the k most likely tokens.
        top_p: draw among the fewest tokens whose probabilities sum to top_p or more (nucleus sampling).
        seed: makes the draws repeatable, for the same prompts in the same order.
        stop: token ids that end a prompt; None means the model's own, () means none.
        prefill_chunk: prompt tokens read in one pass; bounds the memory that a long prompt takes.
        cache: continue what it holds, with the prompts as the next tokens; new tokens are added to it.

    Raises:
        ValueError: an empty prompt, settings that mean nothing, or more positions than the context has.
        MemoryError: keys, values and one pass do not fit what is free, by `plan`, which names the largest context that
            does. Nothing has been computed then.
        Stopped: the device is lost or out of memory.
    """
    inner = unwrapped(model)
    ids = _as_ids(model, prompts)
    if max_new_tokens is None:
        read = max(map(len, ids), default=0) + (cache.length if cache is not None else 0)
        max_new_tokens = max(1, min(128, inner.config.n_ctx - read + 1))
    _check(inner, ids, max_new_tokens, temperature, top_k, top_p, prefill_chunk, cache)
    _check_room(inner, max(map(len, ids)) + max_new_tokens, len(ids), prefill_chunk)
    tokens, mask = _left_padded(ids, inner.device)
    closed = model is inner and cache is None  # no tensor leaves the loop
    capacity = tokens.shape[1] + max_new_tokens + (cache.length if cache is not None else 0)
    cache = KVCache(inner.config, capacity) if cache is None else cache
    stops = set(inner.config.stop_tokens if stop is None else stop)
    generator = torch.Generator(inner.device)
    generator.seed() if seed is None else generator.manual_seed(seed)

    alive, rows, step = [True] * len(ids), [[] for _ in ids], None
    # In a step no row is padding: one that has ended goes on unseen, in a cache that nobody else looks at.
    stepping = model is inner and max_new_tokens > ENOUGH and (closed or len(ids) == 1)
    try:
        for made in range(max_new_tokens):
            # Inference mode is quicker; whoever gets its tensors could not put them into a graph of their own.
            with torch.inference_mode() if closed and not inner.listened_to else torch.no_grad():
                if made and stepping:
                    step = fast.step(inner, cache, capacity, step)
                if step is not None:
                    logits = step(tokens)
                else:
                    for start in range(0, tokens.shape[1], prefill_chunk):
                        chunk = slice(start, start + prefill_chunk)
                        logits = model(tokens[:, chunk], mask[:, chunk], cache=cache, logits_to_keep=1)
                drawn = sample(logits[:, -1], temperature, top_k, top_p, generator)
                found = drawn.tolist()
            now = [token if going else None for token, going in zip(found, alive)]
            for row, token in zip(rows, now):
                if token is not None:
                    row.append(token)
            yield now
            alive = [token is not None and token not in stops for token in now]
            if not any(alive):
                return
            tokens = drawn[:, None]
            mask = torch.tensor(alive, device=inner.device)[:, None]
    except RuntimeError as error:
        if not _is_the_device(error):
            raise
        with suppress(RuntimeError):  # a GPU that is lost gives nothing back
            if step is not None:
                step.close()
        step = None
        raise _stopped(error, inner, cache, rows) from error
    finally:
        if step is not None:
            step.close()


def _is_the_device(error: RuntimeError) -> bool:
    """Out of memory, or lost; PyTorch has no class of its own for a CPU that is out of memory."""
    known = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
    return known or "can't allocate memory" in str(error)


def _stopped(error: RuntimeError, model, cache: KVCache, rows: list[list[int]]) -> Stopped:
    places = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    layer = next((place.attn.layer for place in places if isinstance(place, Block)), None)
    cache.forget_pass()
    where = f"in layer {layer} of {model.config.n_layers}" if layer is not None else "outside the layers"
    said = str(error).strip().splitlines()[0]
    return Stopped(f"{model.device} stopped {where}, after {cache.length:,} tokens read and {len(max(rows, key=len))} "
                   f"new ones: {said} A shorter text, a smaller prefill_chunk or fewer recorded values take less. What "
                   "was made before is in this error's `tokens`", rows, layer)  # fmt: skip


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator=None) -> Tensor:
    """One token a row.   logits [b V] -> [b]"""
    if temperature == 0:
        return logits.argmax(-1)
    probability, order = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probability[:, top_k:] = 0
    if top_p is not None:
        probability = probability / probability.sum(-1, keepdim=True)
        probability[probability.cumsum(-1) - probability >= top_p] = 0  # what comes before already reaches top_p
    drawn = torch.multinomial(probability, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


def _as_ids(model: nn.Module, prompts) -> list[list[int]]:
    if hasattr(prompts, "tolist"):  # a tensor or a numpy array
        prompts = torch.as_tensor(prompts)
        if prompts.dim() not in (1, 2) or prompts.is_floating_point():
            raise ValueError(f"prompts must be ids [s] or [b s], got {prompts.dtype} {tuple(prompts.shape)}")
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if any(isinstance(p, str) for p in prompts):
        encoding = unwrapped(model).tokenizer
        if encoding is None:
            raise ValueError("this model has no tokenizer: give token ids instead of text")
        prompts = [encoding.encode(p) if isinstance(p, str) else p for p in prompts]
    return [list(p) for p in prompts]


def _left_padded(ids: Sequence[Sequence[int]], device) -> tuple[Tensor, Tensor]:
    width = max(map(len, ids))
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    return tokens, mask


def _check(model, ids, max_new_tokens, temperature, top_k, top_p, prefill_chunk, cache) -> None:
    if not ids:
        raise ValueError("there is no prompt")
    for row, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: the model needs at least one token to continue")
    rules = [
        ("max_new_tokens", max_new_tokens, _whole(max_new_tokens), "a whole number of at least 1"),
        ("temperature", temperature, temperature >= 0, "at least 0"),
        ("top_k", top_k, top_k is None or _whole(top_k), "a whole number of at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("prefill_chunk", prefill_chunk, _whole(prefill_chunk), "a whole number of at least 1"),
    ]
    for name, value, good, wanted in rules:
        if not good:
            raise ValueError(f"{name} = {value}: must be {wanted}")
    need = max(map(len, ids)) + max_new_tokens - 1 + (cache.length if cache is not None else 0)
    if need > model.config.n_ctx:
        raise ValueError(f"the longest prompt and max_new_tokens = {max_new_tokens} need {need} positions, "
                         f"the context has {model.config.n_ctx}")  # fmt: skip


def _check_room(model, positions: int, batch: int, chunk: int) -> None:
    c = model.config
    if batch * positions * 2 * c.n_kv_heads * c.d_head * model.dtype.itemsize * c.n_layers < UNASKED:
        return
    room = plan(model, context=min(positions, c.n_ctx), batch=batch, chunk=chunk)
    if not room.fits:
        raise MemoryError(room.refusal("the prompt with its answer"))


def _whole(value) -> bool:
    return isinstance(value, int) and value >= 1
