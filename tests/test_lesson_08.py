"""A fixed volume in the place of a layer's sinks."""
import pytest
import torch
from models import random_model, tiny_config

import gptoss_lab
from gptoss_lab.probes.sinks import Sinks, remove
from gptoss_lab.probes.volume import fixed_volume

TOKENS = torch.arange(3, 15)[None]


@pytest.fixture
def model():
    return random_model(tiny_config())


@torch.no_grad()
def z(model, edits, layer=1):
    with gptoss_lab.edit(model, edits), gptoss_lab.record(model, ("z", layer)) as acts:
        model(TOKENS)
    return acts["z", layer]


def test_each_heads_output_is_that_without_its_sink_times_its_volume(model):
    volume = torch.linspace(0.1, 0.9, model.config.n_heads)
    torch.testing.assert_close(z(model, fixed_volume(1, volume)), z(model, remove(1)) * volume[:, None])


def test_where_a_sink_takes_the_same_from_every_query_its_mean_changes_nothing(model):
    keep = torch.full((model.config.n_heads,), 0.25, dtype=torch.double)
    with torch.no_grad(), gptoss_lab.record(model, ("attn_scores", 1)) as acts:
        model(TOKENS)
    lse = acts["attn_scores", 1].logsumexp(-1)
    three_quarters = {"blocks.1.attn.hook_sink_scores": lambda sinks: lse + torch.tensor(3.0).log()}
    torch.testing.assert_close(z(model, fixed_volume(1, keep)), z(model, three_quarters), rtol=1e-4, atol=1e-6)


def test_the_mean_volume_of_a_measurement_fits(model):
    volume = 1 - Sinks.measure(model, TOKENS).by_head()
    assert z(model, fixed_volume(1, volume[1])).shape == (1, 12, model.config.n_heads, model.config.d_head)


@pytest.mark.parametrize("volume", [torch.tensor(1.0), torch.tensor([1.0, torch.nan])])
def test_a_volume_that_is_not_one_finite_number_a_head_is_refused(volume):
    with pytest.raises(ValueError, match="one finite number for each head"):
        fixed_volume(0, volume)


def test_a_volume_for_another_number_of_heads_is_refused(model):
    with pytest.raises(ValueError, match="volume has 3 numbers, but layer 1 has"):
        z(model, fixed_volume(1, torch.ones(3)))
