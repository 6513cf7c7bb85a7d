"""Lesson 06's specifications are what the model does."""
import torch
from models import random_model, tiny_config

import gptoss_lab as lab
from gptoss_lab.exercises.lesson_06 import cache_bytes, key_heads, scores
from gptoss_lab.probes.windows import windows_of


def test_the_plain_loop_pairs_heads_and_keys_as_the_model_does():
    model = random_model(tiny_config(n_heads=6, n_kv_heads=2))
    with lab.record(model, ("rot_q", 1), ("rot_k", 1), ("attn_scores", 1)) as acts, torch.no_grad():
        model(torch.arange(7)[None])
    ours = scores(acts["rot_q", 1][0], acts["rot_k", 1][0]) * model.config.d_head**-0.5
    seen = acts["attn_scores", 1][0].isfinite()
    assert seen.any()
    torch.testing.assert_close(ours[seen], acts["attn_scores", 1][0][seen], check_dtype=False)
    assert key_heads(6, 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_the_counted_bytes_are_those_of_the_cache():
    config = tiny_config()
    model, window = random_model(config), config.sliding_window
    for n in (window - 1, 3 * window):
        cache = lab.KVCache(config)
        with torch.no_grad():
            model(torch.zeros(1, n, dtype=torch.int64), cache=cache)
        width = model.dtype.itemsize
        assert cache.n_bytes == cache_bytes(n, config.n_kv_heads, config.d_head, windows_of(config), width)
