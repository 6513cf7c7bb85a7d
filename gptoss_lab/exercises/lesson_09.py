"""The exercises of lesson 09, The router."""
import math

import torch
from torch import Tensor

from .exercise import Exercise, normal, whole


def weigh(logits: Tensor, k: int) -> Tensor:
    """What each expert's output is multiplied by: 0 for those not taken.   [token expert] -> [token expert]"""
    weights = torch.zeros(logits.shape)
    for token, row in enumerate(logits.tolist()):
        taken = sorted(range(len(row)), key=lambda expert: -row[expert])[:k]
        total = sum(math.exp(row[expert]) for expert in taken)
        for expert in taken:
            weights[token, expert] = math.exp(row[expert]) / total
    return weights


def load(experts: Tensor, n_experts: int) -> Tensor:
    """The share of the tokens that take each expert.   [token rank] -> [expert]"""
    share = torch.zeros(n_experts)
    for taken in experts.tolist():
        for expert in taken:
            share[expert] += 1 / len(experts)
    return share


def shared(experts: Tensor) -> float:
    """How many experts a token has in common with the one before it, on average.   [token rank] -> number"""
    rows = experts.tolist()
    return sum(len({*one} & {*other}) for one, other in zip(rows, rows[1:])) / (len(rows) - 1)


def _choices(g) -> dict:
    n_experts = whole(g, 4, 9)
    k, tokens = whole(g, 2, n_experts - 1), whole(g, 2, 6)
    return {"experts": torch.stack([torch.randperm(n_experts, generator=g)[:k] for _ in range(tokens)]),
            "n_experts": n_experts}  # fmt: skip


def _logits(g) -> dict:
    n_experts = whole(g, 3, 8)
    return {"logits": normal(g, whole(g, 1, 4), n_experts, scale=2), "k": whole(g, 1, n_experts - 1)}


EXERCISES = (
    Exercise(
        "09.2", weigh, inputs=_logits, axes=("token", "expert"),
        hint="values, experts = logits.topk(k) gives both; the softmax is over the k values. "
             "torch.zeros_like(logits).scatter(-1, experts, weights) puts them in their places.",
        point="Top-k, then softmax: the weights of the k taken sum to 1. Softmax over all, top-k, divided by the sum, "
              "is the same: both are exp(logit), over the sum of k of them.",
        solution='''\
def weigh(logits, k):
    """[token expert] the weight of each expert, 0 for those not taken"""
    values, experts = logits.topk(k)
    return torch.zeros_like(logits).scatter(-1, experts, values.softmax(-1))
''',
        mistakes={
            "the softmax is over all experts, and the k largest of it are kept: they no longer sum to 1": '''\
def weigh(logits, k):
    values, experts = logits.softmax(-1).topk(k)
    return torch.zeros_like(logits).scatter(-1, experts, values)
''',
            "softmax is taken twice: over all experts, then again over the k largest probabilities": '''\
def weigh(logits, k):
    values, experts = logits.softmax(-1).topk(k)
    return torch.zeros_like(logits).scatter(-1, experts, values.softmax(-1))
''',
            "logits of those not taken are set to 0, but exp(0) is 1: minus infinity leaves them out": '''\
def weigh(logits, k):
    least = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < least, 0).softmax(-1)
''',
            "logits are divided by their sum, without exp: those below 0 get weights below 0": '''\
def weigh(logits, k):
    values, experts = logits.topk(k)
    return torch.zeros_like(logits).scatter(-1, experts, values / values.sum(-1, keepdim=True))
''',
        },
    ),
    Exercise(
        "09.3", load, inputs=_choices, axes=("expert",),
        hint="experts.flatten().bincount(minlength=n_experts) counts how often each is taken. Divide by the number of "
             "tokens, len(experts).",
        point="Each token takes k experts, so the loads sum to k, and k / E is the load of each if all work equally.",
        solution='''\
def load(experts, n_experts):
    """[expert] the share of the tokens that take each expert"""
    return experts.flatten().bincount(minlength=n_experts) / len(experts)
''',
        mistakes={
            "counts are divided by all choices, k for each token, so that they sum to 1": '''\
def load(experts, n_experts):
    return experts.flatten().bincount(minlength=n_experts) / experts.numel()
''',
            "only the first choice of each token is counted": '''\
def load(experts, n_experts):
    return experts[:, 0].bincount(minlength=n_experts) / len(experts)
''',
            "experts after the last one taken get no place: bincount does not know how many there are": '''\
def load(experts, n_experts):
    return experts.flatten().bincount() / len(experts)
''',
        },
    ),
    Exercise(
        "09.4", shared, inputs=lambda g: {"experts": _choices(g)["experts"]},
        hint="experts[1:, :, None] == experts[:-1, None, :] compares each choice of a token with each of the one "
             "before: [token rank rank]. Sum over the ranks, mean over the tokens.",
        point="The order of the k choices does not matter here, only which they are. Two random choices of k among E "
              "share k²/E: 1 of 4 experts among 16, half of one among 32.",
        solution='''\
def shared(experts):
    """experts a token has in common with the token before it, on average"""
    same = experts[1:, :, None] == experts[:-1, None, :]
    return same.sum((1, 2)).float().mean()
''',
        mistakes={
            "choices are compared rank by rank: the same expert at another rank is not seen": '''\
def shared(experts):
    return (experts[1:] == experts[:-1]).sum(1).float().mean()
''',
            "the sum is divided by all tokens, but the first has none before it": '''\
def shared(experts):
    same = experts[1:, :, None] == experts[:-1, None, :]
    return same.sum() / len(experts)
''',
            "sets of tensors never meet, each number is an object of its own: call .tolist() first": '''\
def shared(experts):
    return sum(len({*one} & {*other}) for one, other in zip(experts, experts[1:])) / (len(experts) - 1)
''',
            "this is the share of the k experts, not how many": '''\
def shared(experts):
    same = experts[1:, :, None] == experts[:-1, None, :]
    return same.sum((1, 2)).float().mean() / experts.shape[1]
''',
        },
    ),
)  # fmt: skip
