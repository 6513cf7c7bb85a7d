"""MXFP4: blocks of 32 four-bit numbers that share a power of two (OCP Microscaling Formats v1.0).

A byte holds two numbers, the even one in its low four bits. A code is a sign bit and one of eight magnitudes; the value
is magnitude * 2^(scale - 127). 17 bytes hold 32 numbers: 4.25 bits each.
"""
from functools import cache

import torch
from torch import Tensor

BLOCK = 32  # numbers that share a scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7 of E2M1; codes 8 to 15 are their negatives
BIAS = 127


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[256, 2] twice the two values of each byte; [256] half of each scale.

    Half a scale is finite for all 256 scale bytes, a scale of 2^128 is not: so 0 stays 0 and 0.5 becomes 2^127 there.
    """
    values = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), dtype=torch.float64)
    byte = torch.arange(256)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=-1) * 2
    halves = torch.ldexp(torch.ones(256, dtype=torch.float64), (byte - BIAS - 1).double())
    return pairs.to(device, dtype), halves.to(device, dtype)


def unpack(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The numbers, exactly.   blocks [... g 16] uint8, scales [... g] uint8 -> [... g*32]

    bfloat16, float32 and float64 hold every value below their overflow, subnormal scales included; float16 cannot, so
    there the result is the float32 value rounded once.
    """
    if dtype == torch.float16:
        return unpack(blocks, scales, torch.float32).to(dtype)
    pairs, halves = _tables(dtype, blocks.device)
    values = pairs.index_select(0, blocks.reshape(-1).int()).view(*scales.shape, BLOCK)
    return (values * halves[scales.int()].unsqueeze(-1)).flatten(-2)


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest MXFP4 numbers, ties to the even code.   x [... n*32] -> blocks [... n 16], scales [... n], uint8

    The scale is the OCP rule: the power of two of the block's largest magnitude, over 4, the power of two of the
    largest code. What then lies over 6 becomes 6. Numbers that MXFP4 holds come back as they are.

    Raises:
        ValueError: a last axis that is no multiple of 32, or a value that is not finite.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"the last axis has {x.shape[-1]} numbers, MXFP4 packs multiples of {BLOCK}")
    if not torch.isfinite(x).all():
        raise ValueError("MXFP4 holds finite numbers only, and this tensor has NaN or infinite ones")
    x = x.detach().double().unflatten(-1, (-1, BLOCK))
    exponent = torch.frexp(x.abs().amax(-1))[1] - 1  # floor(log2), exact
    scales = (exponent - 2 + BIAS).clamp(0, 254)
    scaled = x.abs() / torch.ldexp(torch.ones_like(x[..., 0]), (scales - BIAS).double()).unsqueeze(-1)
    codes = _nearest_code(scaled) + 8 * torch.signbit(x)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8), scales.to(torch.uint8)


def _nearest_code(magnitude: Tensor) -> Tensor:
    """0 to 7, the nearest of MAGNITUDES; half-way between two, the even code."""
    steps = torch.tensor(MAGNITUDES, dtype=torch.float64, device=magnitude.device)
    middles = (steps[1:] + steps[:-1]) / 2
    below = torch.bucketize(magnitude, middles)  # middles strictly below: a tie goes down
    tie = magnitude == middles[below.clamp(max=6)]
    return below + (tie & (below % 2 == 1))
