"""Packing and unpacking, against tables, an independent encoder and Hugging Face's decoder."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mxfp4_encoder import decode, encode
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gptoss_lab import mxfp4

# OCP Microscaling Formats v1.0, table 5 (FP4 E2M1), by code.
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def every_byte_and_scale() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """blocks [256 16 16]: all bytes under each scale; scales [256 16]; the values in float64 [256 512]."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16).contiguous()
    pairs = torch.tensor([[VALUES[byte & 15], VALUES[byte >> 4]] for byte in range(256)], dtype=torch.float64)
    exact = pairs.flatten() * torch.exp2(torch.arange(256, dtype=torch.float64) - 127)[:, None]
    return blocks, scales, exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_under_every_scale_is_its_value_in_every_dtype(dtype):
    blocks, scales, exact = every_byte_and_scale()
    got = mxfp4.unpack(blocks, scales, dtype)
    assert torch.equal(got, exact.float().to(dtype) if dtype == torch.float16 else exact.to(dtype))
    assert torch.equal(torch.signbit(got), torch.signbit(exact))  # the eighth code is -0
    assert not got.isnan().any()


def test_float32_and_bfloat16_hold_every_value_that_does_not_overflow():
    blocks, scales, exact = every_byte_and_scale()
    for dtype in (torch.float32, torch.bfloat16):
        got = mxfp4.unpack(blocks, scales, dtype).double()
        finite = exact.abs() <= torch.finfo(dtype).max
        assert torch.equal(got[finite], exact[finite])
        assert torch.equal(got[~finite], exact[~finite].sign() * torch.inf)


def test_the_largest_scales_overflow_only_where_the_value_does():
    codes = torch.tensor([[0x71] + [0x80] * 15], dtype=torch.uint8)  # 0.5 and 6, then 0 and -0
    for scale, half in ((254, 2.0**126), (255, 2.0**127)):
        got = mxfp4.unpack(codes, torch.tensor([scale], dtype=torch.uint8))
        assert got[:2].tolist() == [half, torch.inf] and got[2:].eq(0).all()


def test_the_low_nibble_is_the_even_element():
    one = mxfp4.unpack(torch.tensor([[0x21] + [0] * 15], dtype=torch.uint8), torch.tensor([127], dtype=torch.uint8))
    assert one[:2].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hugging_face_unpacks_the_same_numbers(dtype):
    blocks, scales, exact = every_byte_and_scale()
    # Theirs is transposed, [E in out]; it overflows to nan at 0 * 2^128, so scales stop below.
    blocks, scales, exact = blocks[:255, None], scales[:255, None], exact[:255]
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    ours = mxfp4.unpack(blocks, scales, dtype)
    finite = exact.abs() <= torch.finfo(dtype).max
    assert torch.equal(ours[:, 0][finite], theirs[..., 0][finite])


@given(hnp.arrays(np.float32, (3, 64), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_pack_agrees_with_an_independent_encoder_on_any_numbers(x):
    blocks, scales = mxfp4.pack(torch.from_numpy(x))
    wanted = encode(x)
    some = x.reshape(3, 2, 32).any(-1)  # any scale will do for a block of zeros
    np.testing.assert_array_equal(scales.numpy()[some], wanted[1][some])
    np.testing.assert_array_equal(blocks.numpy(), wanted[0])
    np.testing.assert_array_equal(mxfp4.unpack(blocks, scales, torch.float64).numpy(), decode(*wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pack_agrees_with_an_independent_encoder_on_normal_numbers_of_every_dtype(dtype):
    x = torch.randn(8, 96, 64).to(dtype)
    blocks, scales = mxfp4.pack(x)
    wanted_blocks, wanted_scales = encode(x.double().numpy())
    assert np.array_equal(scales.numpy(), wanted_scales) and np.array_equal(blocks.numpy(), wanted_blocks)


def test_half_way_numbers_go_to_the_even_code():
    # With 4 in the block the scale is 1. Codes 0 to 7 are 0, .5, 1, 1.5, 2, 3, 4, 6; the even ones 0, 1, 2, 4.
    x = torch.zeros(32)
    x[:8] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x[8:16] = -x[:8]
    got = mxfp4.unpack(*mxfp4.pack(x), torch.float32)
    nearest = torch.tensor([4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(got[:16], torch.cat([nearest, -nearest]))
    assert torch.signbit(got[9])  # -0.25 becomes -0


def test_what_lies_over_six_becomes_six():
    x = torch.zeros(32)
    x[:4] = torch.tensor([7.9, -7.9, 6.0, 5.1])
    assert mxfp4.unpack(*mxfp4.pack(x), torch.float32)[:4].tolist() == [6.0, -6.0, 6.0, 6.0]


def test_packing_what_was_unpacked_changes_nothing():
    """All bytes under all scales that a finite number can need: values come back, though not always the same bytes."""
    blocks, scales, exact = every_byte_and_scale()
    once = mxfp4.unpack(blocks, scales, torch.float64)
    assert torch.equal(mxfp4.unpack(*mxfp4.pack(once[:253]), torch.float64), exact[:253])
    again = mxfp4.pack(mxfp4.unpack(*mxfp4.pack(once[:253]), torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(again, mxfp4.pack(once[:253]), strict=True))


def test_the_error_on_normal_numbers_is_eleven_percent():
    """Relative rms 0.115 (18.8 dB), 2.3 % saturated: what the OCP rule gives on N(0, 1)."""
    x = torch.randn(1 << 20, dtype=torch.float64)
    blocks, scales = mxfp4.pack(x)
    y = mxfp4.unpack(blocks, scales, torch.float64)
    relative = float((x - y).square().mean().sqrt() / x.square().mean().sqrt())
    largest = 6 * torch.exp2(scales.double() - 127).repeat_interleave(32)
    saturated = float((x.abs() > largest).double().mean())
    print(f"MXFP4 on N(0,1): relative rms {relative:.4f}, {saturated:.2%} saturated")
    assert relative == pytest.approx(0.115, abs=0.001)
    assert saturated == pytest.approx(0.023, abs=0.001)


def test_numbers_that_mxfp4_cannot_hold_are_refused():
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.zeros(64)
        x[40] = bad
        with pytest.raises(ValueError, match="finite"):
            mxfp4.pack(x)
    with pytest.raises(ValueError, match="33 numbers.*multiples of 32"):
        mxfp4.pack(torch.zeros(2, 33))


def test_zeros_and_the_smallest_numbers_pack():
    assert mxfp4.unpack(*mxfp4.pack(torch.zeros(32)), torch.float64).eq(0).all()
    tiny = torch.full((32,), 2.0**-130, dtype=torch.float64)  # below half of the smallest code, 2^-128
    assert mxfp4.unpack(*mxfp4.pack(tiny), torch.float64).eq(0).all()
    assert mxfp4.unpack(*mxfp4.pack(tiny * 4), torch.float64).eq(2.0**-128).all()


def test_an_expert_gives_only_its_own_matrix():
    from gptoss_lab.model import Experts

    experts = Experts(n_experts=3, d_in=64, d_out=5, packed=True)
    blocks, scales = mxfp4.pack(torch.randn(3, 5, 64))
    experts.blocks, experts.scales = blocks, scales
    for expert in range(3):
        want = decode(blocks[expert].numpy(), scales[expert].numpy())
        assert np.array_equal(experts.matrix(expert).detach().double().numpy(), want)
