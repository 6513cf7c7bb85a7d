"""Lesson 04: its specifications say what the model does."""
import pytest
import torch
from models import random_model, tiny_config

import gptoss_lab as lab
from gptoss_lab import rope
from gptoss_lab.exercises import lesson_04


def angles(s: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 3 * torch.randn(s, half)
    return angle.cos(), angle.sin()


def test_the_rotation_that_is_asked_for_is_the_models():
    x, (cos, sin) = torch.randn(5, 8), angles(5, 4)
    torch.testing.assert_close(lesson_04.rotate(x, cos, sin), rope.rotate(x[None, :, None], cos, sin)[0, :, 0])


@pytest.mark.parametrize("h", [4, 6, 16])
def test_code_that_pairs_neighbours_gives_the_models_numbers_in_the_order_that_is_asked_for(h):
    x, (cos, sin) = torch.randn(3, h), angles(3, h // 2)
    order = lesson_04.order(h)
    even, odd = x[:, order][:, 0::2], x[:, order][:, 1::2]
    neighbours = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(1)
    torch.testing.assert_close(neighbours, lesson_04.rotate(x, cos, sin)[:, order])
    assert sorted(order.tolist()) == list(range(h))


def test_the_score_by_distance_is_the_one_that_the_model_computes_at_any_place():
    model = random_model(tiny_config(), dtype=torch.float64)
    config, rotary = model.config, model.rotary_emb
    with torch.no_grad(), lab.record(model, ("q", 1), ("k", 1), ("attn_scores", 1)) as acts:
        model(torch.randint(config.d_vocab, (1, 20)))
    q, k, scores = acts["q", 1][0], acts["k", 1][0], acts["attn_scores", 1][0]
    scale = rotary.concentration**2 * config.d_head**-0.5
    for head in range(config.n_heads):
        for query, key in ((19, 18), (19, 4), (7, 6), (3, 3)):
            one = lesson_04.score(q[query, head], k[key, head // config.n_groups], query - key, rotary.frequencies)
            if scores[head, query, key].isfinite():
                assert one * scale == pytest.approx(scores[head, query, key].item(), rel=1e-9, abs=1e-9)
