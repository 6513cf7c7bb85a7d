"""Lesson 13: its small models have no trivial weight, and its specifications are what the package does."""
import torch

import gptoss_lab as lab
from gptoss_lab.exercises.lesson_13 import SHAPES, read, shapes, small_model, without_head
from gptoss_lab.probes.ablation import Part, ablated


def drawn(seed: int = 0, **sizes):
    return small_model(torch.Generator().manual_seed(seed), **sizes)


def test_every_weight_of_a_small_model_is_drawn_and_only_from_the_seed():
    one, same, other = drawn(1), drawn(1), drawn(2)
    for name, weight in one.named_parameters():
        assert weight.abs().min() > 0, name
        assert torch.equal(weight, same.get_parameter(name)) and not torch.equal(weight, other.get_parameter(name)), name


def test_the_shapes_that_are_asked_for_follow_the_registry():
    sizes = {"b": 2, "s": 5, "d": 9, "H": 6, "K": 2, "h": 4, "E": 7, "k": 3}
    points = drawn().hook_points
    for name, shape in shapes(**sizes).items():
        assert shape == tuple(sizes[letter] for letter in points[f"blocks.0.{name}"].shape.split())
    assert {*shapes(**sizes)} == {*SHAPES}


def test_reading_leaves_the_model_as_it_was():
    model, tokens = drawn(), torch.arange(5)[None]
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(read(model, tokens, "hook_logits"), logits) and not model.listened_to


def test_silencing_a_head_is_its_ablation():
    model, tokens = drawn(), torch.arange(6)[None]
    with torch.no_grad():
        with lab.edit(model, {("z", 1): lambda z: without_head(z, 2)}):
            ours = model(tokens)
        with ablated(model, Part("head", 1, 2)):
            theirs = model(tokens)
        assert torch.equal(ours, theirs) and not torch.allclose(ours, model(tokens))
