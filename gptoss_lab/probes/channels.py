"""Where in a Harmony conversation is a token? Labels for other probes: analysis beside final, user beside assistant."""
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokenizer import special

if TYPE_CHECKING:
    import tiktoken

LABELS = ("header", "system", "developer", "user", "tool", "analysis", "commentary", "final", "none")
ROLES = ("system", "developer", "user")


def slices(tokens: Tensor, encoding: "tiktoken.Encoding") -> Tensor:
    """The label of each token, an index in LABELS.   tokens [s] -> [s]

    Headers are everything from <|start|> to <|message|>, with the token that ends a message; content belongs to its
    channel, or where there is none to its role (another role is a tool). Tokens outside of any message are "none".

    Raises:
        ValueError: tokens are not one row, or the vocabulary lacks Harmony's special tokens.
    """
    if tokens.dim() != 1:
        raise ValueError(f"slices() takes one row of tokens, not shape {tuple(tokens.shape)}")
    start, message, channel = (special(encoding, f"<|{name}|>") for name in ("start", "message", "channel"))
    ends = {special(encoding, f"<|{name}|>") for name in ("end", "return", "call")}
    labels, inside, header, content = [], None, [], "none"
    for token in tokens.tolist():
        if token == start:
            inside, header = "header", []
        elif inside is None and token == channel:  # a completion: its <|start|>assistant is in the prompt
            inside, header = "header", [*encoding.encode_ordinary("assistant")]
        if inside == "header":
            labels.append("header")
            header.append(token)
            if token == message:
                inside, content = "content", _content(header, channel, encoding)
        elif inside == "content":
            labels.append("header" if token in ends else content)
            inside = None if token in ends else inside
        else:
            labels.append("none")
    return torch.tensor([LABELS.index(label) for label in labels])


def _content(header: list[int], channel: int, encoding: "tiktoken.Encoding") -> str:
    plain = lambda ids: encoding.decode([token for token in ids if not encoding.is_special_token(token)])
    author = plain(header)
    if author.startswith("assistant"):
        after = plain(header[header.index(channel) + 1 :]).split() if channel in header else []
        return after[0] if after and after[0] in ("analysis", "commentary") else "final"
    return next((role for role in ROLES if author.startswith(role)), "tool")


def mean_by(values: Tensor, labels: Tensor) -> dict[str, float]:
    """The mean of values [..., s] over the tokens of each label that occurs: what differs between analysis and final.

    Raises:
        ValueError: there are not as many labels as positions.
    """
    if values.shape[-1] != len(labels):
        raise ValueError(f"{len(labels)} labels for {values.shape[-1]} positions")
    present = [i for i in range(len(LABELS)) if (labels == i).any()]
    return {LABELS[i]: float(values[..., labels == i].double().mean()) for i in present}
