"""The exercises of lesson 08, Attention sinks."""
import math

import torch
from torch import Tensor

from .exercise import Exercise, normal, whole


def with_sink(scores: Tensor, sink: float) -> tuple[Tensor, Tensor]:
    """One more logit in each row that no key has.   [query key] -> pattern [query key], mass [query]"""
    pattern, mass = torch.zeros(scores.shape), torch.zeros(len(scores))
    for query, row in enumerate(scores.tolist()):
        whole_row = sum(math.exp(score) for score in row) + math.exp(sink)
        for key, score in enumerate(row):
            pattern[query, key] = math.exp(score) / whole_row
        mass[query] = math.exp(sink) / whole_row
    return pattern, mass


def resting(scores: Tensor, sink: float) -> Tensor:
    """What each query gives to the sink.   [query key] -> [query]"""
    return with_sink(scores, sink)[1]


def attend(scores: Tensor, values: Tensor, sink: float) -> Tensor:
    """What each query reads.   scores [query key], values [key dimension] -> [query dimension]"""
    pattern, _ = with_sink(scores, sink)
    out = torch.zeros(len(scores), values.shape[1])
    for query in range(len(scores)):
        for key in range(len(values)):
            out[query] += pattern[query, key] * values[key]
    return out


def _row(g) -> dict:
    return {"scores": normal(g, whole(g, 2, 5), whole(g, 2, 6), scale=2), "sink": 2 * normal(g, 1).item()}


def _row_and_values(g) -> dict:
    drawn = _row(g)
    return {"scores": drawn["scores"], "values": normal(g, drawn["scores"].shape[1], 3), "sink": drawn["sink"]}


EXERCISES = (
    Exercise(
        "08.2", with_sink, inputs=_row,
        axes={"number 1 of 2": ("query", "key"), "number 2 of 2": ("query",)},
        hint="Put the sink beside the scores as one more column: torch.cat([scores, column], -1), where column is "
             "torch.full((len(scores), 1), sink). One softmax, then take the last column off.",
        point="The sink takes part in the softmax like a key, and is then dropped: the rows sum to 1 less its mass.",
        solution='''\
def with_sink(scores, sink):
    """pattern [query key], whose rows sum to 1 - mass; mass [query] on the sink"""
    column = torch.full((len(scores), 1), sink)
    probability = torch.cat([scores, column], -1).softmax(-1)
    return probability[:, :-1], probability[:, -1]
''',
        mistakes={
            "the rows are scaled to sum to 1 again after the sink is dropped, which takes away all that it did": '''\
def with_sink(scores, sink):
    column = torch.full((len(scores), 1), sink)
    return scores.softmax(-1), torch.cat([scores, column], -1).softmax(-1)[:, -1]
''',
            "the sink's logit is added to every score: softmax does not notice a shift": '''\
def with_sink(scores, sink):
    return (scores + sink).softmax(-1), torch.zeros(len(scores))
''',
            "the sink's logit itself is added to the denominator, not its exponential": '''\
def with_sink(scores, sink):
    whole_row = scores.exp().sum(-1) + sink
    return scores.exp() / whole_row[:, None], sink / whole_row
''',
            "1 is added to the denominator, as if every sink's logit were 0": '''\
def with_sink(scores, sink):
    probability = torch.cat([scores, torch.zeros(len(scores), 1)], -1).softmax(-1)
    return probability[:, :-1], probability[:, -1]
''',
        },
    ),
    Exercise(
        "08.3", resting, inputs=_row, axes=("query",),
        hint="The keys together weigh exp(lse), the sink exp(sink). Its share is exp(sink) / (exp(sink) + exp(lse)), "
             "which is 1 / (1 + exp(lse - sink)): a sigmoid.",
        point="The sink is a threshold on lse, which sums up all there is to read: below it the head rests, above it "
              "the head reads.",
        solution='''\
def resting(scores, sink):
    """[query] the mass on the sink, from the log-sum-exp of each row"""
    return torch.sigmoid(sink - scores.logsumexp(-1))
''',
        mistakes={
            "the two have changed places: this is what the keys get together": '''\
def resting(scores, sink):
    return torch.sigmoid(scores.logsumexp(-1) - sink)
''',
            "only the largest score is set against the sink": '''\
def resting(scores, sink):
    return torch.sigmoid(sink - scores.amax(-1))
''',
            "the mean score stands for all of them, so that many keys weigh no more than one": '''\
def resting(scores, sink):
    return torch.sigmoid(sink - scores.mean(-1))
''',
        },
    ),
    Exercise(
        "08.4", attend, inputs=_row_and_values, axes=("query", "dimension"),
        hint="Plain attention first, scores.softmax(-1) @ values. Then multiply each query's output by what its sink "
             "leaves, torch.sigmoid(lse - sink), with [:, None] to give it the second axis.",
        point="A sink changes no ratio between keys: it turns the head's output down, by one number for each query. "
              "Attention code that gives lse needs no extra column.",
        solution='''\
def attend(scores, values, sink):
    """[query dimension] attention with a sink, without one more column"""
    plain = scores.softmax(-1) @ values
    return plain * torch.sigmoid(scores.logsumexp(-1) - sink)[:, None]
''',
        mistakes={
            "the output is multiplied by what the sink takes, not by what it leaves": '''\
def attend(scores, values, sink):
    return scores.softmax(-1) @ values * torch.sigmoid(sink - scores.logsumexp(-1))[:, None]
''',
            "the sink is left out": '''\
def attend(scores, values, sink):
    return scores.softmax(-1) @ values
''',
            "the largest score stands in the place of lse": '''\
def attend(scores, values, sink):
    return scores.softmax(-1) @ values * torch.sigmoid(scores.amax(-1) - sink)[:, None]
''',
        },
    ),
)  # fmt: skip
