"""What the explorers read: a typed prompt, or random tokens."""
import torch
from torch import Tensor, nn

from ..hooks import unwrapped

MOST = 512  # tokens that a picture can still show


def read(model: nn.Module, prompt: str, least: int = 1) -> Tensor:
    """A typed prompt as tokens. Special tokens may be spelt out.   -> [1 s]

    A model without a vocabulary takes ids with spaces between them.

    Raises:
        ValueError: fewer than `least` or more than MOST tokens, more than the context holds, or no ids.
    """
    inner = unwrapped(model)
    if inner.tokenizer is not None:
        ids = inner.tokenizer.encode(prompt, allowed_special="all")
    else:
        try:
            ids = [int(word) for word in prompt.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f"{prompt!r} is no list of token ids, and this model has no vocabulary to read words "
                             "with: type numbers with spaces between them, such as 3 1 4") from None  # fmt: skip
    if len(ids) < least:
        raise ValueError(f"the prompt has {len(ids)} tokens: type at least {least}")
    most = min(MOST, inner.config.n_ctx)
    if len(ids) > most:
        why = "the model's context" if most < MOST else "what a picture can show"
        raise ValueError(f"the prompt has {len(ids)} tokens, {why} is {most}: make it shorter")
    return torch.tensor([ids], device=inner.device)


def random_tokens(model: nn.Module, rows: int, length: int, seed: int = 0) -> Tensor:
    """Tokens drawn alike from the vocabulary, without special ones and single bytes.   -> [rows length]"""
    inner = unwrapped(model)
    known = inner.config.d_vocab if inner.tokenizer is None else len(inner.tokenizer.token_byte_values())
    first = 256 if inner.tokenizer is not None and known > 256 else 0
    pool = torch.tensor([i for i in range(first, min(known, inner.config.d_vocab)) if i != inner.config.pad_token])
    drawn = torch.randint(len(pool), (rows, length), generator=torch.Generator().manual_seed(seed))
    return pool[drawn].to(inner.device)


def check_layer(model: nn.Module, layer: int, **part: int) -> None:
    """Is there such a layer, and such a head, group or expert in it: `check_layer(model, 2, head=5)`?

    Raises:
        ValueError: there is not.
    """
    config = unwrapped(model).config
    sizes = {"layer": config.n_layers, "head": config.n_heads, "expert": config.n_experts,
             "group": config.n_kv_heads}  # fmt: skip
    for name, value in {"layer": layer, **part}.items():
        if not 0 <= value < sizes[name]:
            raise ValueError(f"{name} {value} does not exist: this model has {name}s 0 to {sizes[name] - 1}")
