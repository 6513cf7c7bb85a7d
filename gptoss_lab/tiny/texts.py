"""What the tiny model was trained on, for whichever model to read: in words of its own vocabulary, at any length.

    texts       rows of made-up text, and which of their tokens can be foreseen
    lookups     a list of pairs, and a question for one of them after many others: what `Retrieval.measure` asks
    by_domain   a few rows of each domain: what differs between kinds of text
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..hooks import unwrapped
from . import data

SEED = 10**12  # training draws from far smaller seeds
ROOM = 512  # tokens of a row, before another vocabulary reads it


def texts(model: nn.Module, rows: int, length: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Stories, code, dialogues and lists of the tiny model's generator, without its strings of random tokens.

    For the tiny vocabulary the generator says which tokens nothing before them tells. In another vocabulary every
    token counts.

    Returns:
        tokens [rows length+1], and counts: bool [rows length], which predictions count, as `LossByPosition` takes them.

    Raises:
        ValueError: the model has no vocabulary; no rows, or rows of no tokens.
    """
    if rows < 1 or length < 1:
        raise ValueError(f"rows = {rows}, length = {length}: both must be at least 1")
    tokenizer, device = _tokenizer(model), unwrapped(model).device
    mixture = {name: share for name, share in data.MIXTURE.items() if name != "repeat"}
    if tokenizer.name == "tiny":
        made = data.batch(seed + 1, rows, length, mixture)
        return made.tokens.to(device), ~made.given[:, 1:].to(device)
    wanted, ids = rows * (length + 1), []
    tiny = data.tokenizer.tiny()
    while len(ids) < wanted:
        seed += 1
        text = tiny.decode(data.batch(seed, 16, ROOM, mixture).tokens.flatten().tolist())
        ids += tokenizer.encode(text, allowed_special="all")
    tokens = torch.tensor(ids[:wanted], device=device).view(rows, length + 1)
    return tokens, torch.ones(rows, length, dtype=torch.bool, device=device)


def lookups(model: nn.Module, n: int = 12, seed: int = SEED) -> Callable[[int, float], tuple[list, list]]:
    """`make(length, depth)` for `Retrieval.measure`: n prompts of at least `length` tokens, and their answers.

    Each holds six things with a colour each, `depth` of the way in; then it asks for five of the colours again and
    again and answers; at its end stands the sixth thing, for the first time since the list.

    Raises:
        ValueError: the model has no vocabulary.
    """
    encode = _tokenizer(model).encode_ordinary

    def make(length: int, depth: float) -> tuple[list[list[int]], list[list[int]]]:
        draw, prompts, answers = data.Draw(seed + length), [], []
        for row in range(n):
            things, colours = data.pairs(draw, 6)
            asked = draw.between(0, 5)
            start, question = encode(data.question(things, colours)), encode(f" {things[asked]}")
            before = int(depth * max(0, length - len(start) - len(question)))
            prompt = texts(model, 1, before, seed + length + row)[0][0, :before].tolist() if before else []
            prompt += start
            while len(prompt) < length - len(question):
                other = draw.one([i for i in range(6) if i != asked])
                prompt += encode(f" {things[other]} {colours[other]},")
            prompts.append(prompt + question)
            answers.append(encode(f" {colours[asked]}"))
        return prompts, answers

    return make


def by_domain(
    model: nn.Module, rows: int = 2, length: int = 128, seed: int = 7, domains: tuple[str, ...] = data.DOMAINS
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`rows` rows of each domain, in order; drawn anew from the seed, from one that training never used.

    A model with another vocabulary reads the same words in its own tokens; there nothing tells which of them can be
    foreseen, and the first half of every `repeat` is among them.

    Returns:
        tokens [b s] to read; domain [b s], its number in `domains`; foreseen [b s], the same, -1 where nothing before a
        token tells what it will be: labels for losses.

    Raises:
        ValueError: the model has no vocabulary, or a domain does not exist.
    """
    inner, own = unwrapped(model), data.tokenizer.tiny()
    if wrong := [name for name in domains if name not in data.DOMAINS]:
        raise ValueError(f"no domain {wrong[0]!r}: there are {', '.join(data.DOMAINS)}")
    reader = _tokenizer(model)
    batches = [data.batch(10**11 + seed, rows, length, {name: 1.0}) for name in domains]
    tokens, given = (torch.cat([getattr(one, x) for one in batches])[:, :length] for x in ("tokens", "given"))
    domain = torch.arange(len(domains)).repeat_interleave(rows)[:, None].expand_as(tokens).contiguous()
    if reader.name != own.name:
        read = [reader.encode(own.decode(row), allowed_special="all") for row in tokens.tolist()]
        shortest = min(map(len, read))
        tokens, domain = torch.tensor([text[:shortest] for text in read]), domain[:, :1].expand(-1, shortest)
        given = torch.zeros_like(tokens, dtype=torch.bool)
    foreseen = domain.masked_fill(given, -1)
    return tuple(x.to(inner.device) for x in (tokens, domain, foreseen))


def _tokenizer(model: nn.Module):
    tokenizer = unwrapped(model).tokenizer
    if tokenizer is None:
        raise ValueError("this model has no vocabulary to write texts in: load one with a tokenizer, or give "
                         "LossByPosition and Retrieval tokens of your own")  # fmt: skip
    return tokenizer
