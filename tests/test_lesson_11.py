"""Lesson 11's specifications are what the package does, and its picture of the error shows the error."""
import pytest
import torch
from shared import facts

from gptoss_lab import mxfp4
from gptoss_lab.exercises.lesson_11 import MAGNITUDES, pack, packed_bytes, unpack
from gptoss_lab.show.rounding import errors, rounding


def blocks_with_ties() -> torch.Tensor:
    """[40 32] numbers, half of them half-way between two codes, or beyond the last."""
    x = (3 * torch.randn(40, 32)).clamp(-7.5, 7.5)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5])
    x[:, ::2] = middles[torch.randint(8, (40, 16))] * (1 - 2 * torch.randint(2, (40, 16)))
    x[:, 1] = 7  # every scale is 1
    return x


def test_the_loop_packs_as_the_package_does_ties_and_cuts_too():
    x = blocks_with_ties()
    blocks, scales = mxfp4.pack(x)
    assert scales.eq(127).all()
    for row, block, scale in zip(x, blocks[:, 0], scales[:, 0]):
        assert pack(row, int(scale)).tolist() == block.tolist()


def test_the_loop_unpacks_every_byte_as_the_package_does():
    assert MAGNITUDES == mxfp4.MAGNITUDES
    for scale in (0, 1, 119, 127, 140):
        for block in torch.arange(256, dtype=torch.uint8).view(16, 16):
            scales = torch.tensor([scale], dtype=torch.uint8)
            assert torch.equal(unpack(block, scale), mxfp4.unpack(block[None], scales, torch.float32))


@pytest.mark.parametrize("name, layers, experts", [("20b", 24, 32), ("120b", 36, 128)])
def test_the_counted_bytes_are_those_of_the_published_file(name, layers, experts):
    tensors = facts(f"manifest_{name}_hf.json")["tensors"]
    stored = [one["bytes"] for key, one in tensors.items() if key.endswith(("_blocks", "_scales"))]
    assert packed_bytes(layers, experts, 2880, 2880) == sum(stored) > 0


def test_errors_are_those_of_the_rounded_weights_and_cuts_are_told():
    x = torch.zeros(2, 32)
    x[0, :5] = torch.tensor([7.0, 0.5, -2.25, 5.0, 6.5])  # scale 1: cut, exact, a quarter off, a tie, cut
    error, cut, relative = errors(x)
    assert error[0, :5].tolist() == [-1.0, 0.0, 0.25, -1.0, -0.5]
    assert cut.nonzero().tolist() == [[0, 0], [0, 4]]
    torch.testing.assert_close(relative[0].item(), (1 + 0.25**2 + 1 + 0.5**2) ** 0.5 / x[0].norm().item())
    assert relative[1] == 0


def test_the_picture_says_whose_weights_it_shows_and_how_many_were_cut():
    x = torch.zeros(2, 32)
    x[:, 0] = 7
    picture = rounding({"mine": x, "another": torch.randn(4, 32)})
    left, right = picture.axes
    said = [text.get_text() for text in left.get_legend().get_texts()]
    assert picture.get_suptitle().endswith("(mine)") and f"cut to 6: {1 / 32:.1%}" in said and "another" in said
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["mine", "another"]
    with pytest.raises(ValueError, match="no weights"):
        rounding({})
