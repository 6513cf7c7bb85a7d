"""The exercises of lesson 11, MXFP4."""
import math

import torch
from torch import Generator, Tensor

from .exercise import Exercise, normal, whole

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7: OCP Microscaling Formats v1.0, FP4 E2M1


def unpack(block: Tensor, scale: int) -> Tensor:
    """16 bytes and a scale byte -> 32 numbers: of each byte the low four bits, then the high ones."""
    numbers = []
    for byte in block.tolist():
        for code in (byte % 16, byte // 16):
            magnitude = MAGNITUDES[code % 8] * 2.0 ** (scale - 127)
            numbers.append(-magnitude if code >= 8 else magnitude)
    return torch.tensor(numbers)


def pack(x: Tensor, scale: int) -> Tensor:
    """32 numbers and a scale byte -> 16 bytes: each number becomes the nearest code, half-way the even one."""
    codes = []
    for number in x.double().tolist():
        size, best = abs(number) / 2.0 ** (scale - 127), 0
        for code in range(1, 8):
            gap, least = abs(size - MAGNITUDES[code]), abs(size - MAGNITUDES[best])
            if gap < least or gap == least and code % 2 == 0:
                best = code
        codes.append(best + (8 if math.copysign(1, number) < 0 else 0))
    return torch.tensor([low + 16 * high for low, high in zip(codes[0::2], codes[1::2])])


def packed_bytes(n_layers: int, n_experts: int, d_model: int, d_ff: int) -> int:
    """Bytes of all expert matrices in MXFP4: blocks of 32 along each row, 16 bytes and a scale byte for each."""
    total = 0
    for _ in range(n_layers):
        for _ in range(n_experts):
            for rows, columns in ((2 * d_ff, d_model), (d_model, d_ff)):  # gate and linear; down
                total += rows * (columns // 32) * (16 + 1)
    return total


def _bytes(g: Generator) -> dict:
    return {"block": torch.randint(256, (16,), generator=g).to(torch.uint8), "scale": whole(g, 118, 132)}


def _numbers(g: Generator) -> dict:
    """Every second one half-way between two codes, and some over 6."""
    scale = whole(g, 120, 130)
    x = normal(g, 32, scale=2.5)
    middles = torch.tensor([(a + b) / 2 for a, b in zip(MAGNITUDES, MAGNITUDES[1:])])
    sign = 1 - 2 * torch.randint(2, (16,), generator=g)
    x[0::2] = middles[torch.randint(7, (16,), generator=g)] * sign
    return {"x": x * 2.0 ** (scale - 127), "scale": scale}


def _sizes(g: Generator) -> dict:
    return {"n_layers": whole(g, 1, 4), "n_experts": whole(g, 1, 8), "d_model": 32 * whole(g, 1, 6),
            "d_ff": 32 * whole(g, 1, 6)}  # fmt: skip


EXERCISES = (
    Exercise(
        "11.2", unpack, inputs=_bytes, axes=("number",), tolerance=0,
        hint="byte & 15 is the code of the even number, byte >> 4 that of the odd one. A code from 8 on is the "
             "negative of the code 8 below. The scale byte s says 2.0 ** (s - 127).",
        point="A byte's low four bits come first: 0x21 holds 0.5, then 1. Each value is exact, no rounding is left "
              "to do.",
        solution='''\
def unpack(block, scale):
    """block [16] uint8, scale a byte as int -> the 32 numbers"""
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor(magnitudes + [-m for m in magnitudes])
    codes = torch.stack([block & 15, block >> 4], dim=-1).flatten().int()
    return values[codes] * 2.0 ** (scale - 127)
''',
        mistakes={
            "the high four bits come first: neighbours have changed places": '''\
def unpack(block, scale):
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor(magnitudes + [-m for m in magnitudes])
    codes = torch.stack([block >> 4, block & 15], dim=-1).flatten().int()
    return values[codes] * 2.0 ** (scale - 127)
''',
            "all low halves come before all high ones, instead of in turn": '''\
def unpack(block, scale):
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor(magnitudes + [-m for m in magnitudes])
    codes = torch.cat([block & 15, block >> 4]).int()
    return values[codes] * 2.0 ** (scale - 127)
''',
            "the scale's 127 is taken for 128, so that all is half as large": '''\
def unpack(block, scale):
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor(magnitudes + [-m for m in magnitudes])
    codes = torch.stack([block & 15, block >> 4], dim=-1).flatten().int()
    return values[codes] * 2.0 ** (scale - 128)
''',
            "the code is read as a whole number from 0 to 7 with a sign": '''\
def unpack(block, scale):
    values = torch.tensor([float(i) for i in range(8)] + [-float(i) for i in range(8)])
    codes = torch.stack([block & 15, block >> 4], dim=-1).flatten().int()
    return values[codes] * 2.0 ** (scale - 127)
''',
        },
    ),
    Exercise(
        "11.3", pack, inputs=_numbers, axes=("byte",), tolerance=0,
        hint="Divide by 2.0 ** (scale - 127), then take for each size the code whose magnitude is nearest. Of two "
             "equally near ones take the even code: try codes in the order 0, 2, 4, 6, 1, 3, 5, 7. Negative: plus 8.",
        point="Half-way goes to the even code, so that ties do not push all numbers up. What lies over 6 becomes 6: "
              "the scale has to be right before.",
        solution='''\
def pack(x, scale):
    """x [32], scale a byte as int -> 16 bytes: low four bits the even number, nearest code, ties to the even code"""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    gaps = (x.abs()[:, None] / 2.0 ** (scale - 127) - magnitudes[even_first]).abs()
    codes = even_first[gaps.argmin(dim=-1)] + 8 * (x < 0)
    return codes[0::2] + 16 * codes[1::2]
''',
        mistakes={
            "half-way always goes to the smaller magnitude": '''\
def pack(x, scale):
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = (x.abs()[:, None] / 2.0 ** (scale - 127) - magnitudes).abs().argmin(dim=-1) + 8 * (x < 0)
    return codes[0::2] + 16 * codes[1::2]
''',
            "half-way always goes to the larger magnitude": '''\
def pack(x, scale):
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(x.abs() / 2.0 ** (scale - 127), middles, right=True) + 8 * (x < 0)
    return codes[0::2] + 16 * codes[1::2]
''',
            "the sign is lost": '''\
def pack(x, scale):
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    codes = even_first[(x.abs()[:, None] / 2.0 ** (scale - 127) - magnitudes[even_first]).abs().argmin(dim=-1)]
    return codes[0::2] + 16 * codes[1::2]
''',
            "the even number sits in the high four bits": '''\
def pack(x, scale):
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    gaps = (x.abs()[:, None] / 2.0 ** (scale - 127) - magnitudes[even_first]).abs()
    codes = even_first[gaps.argmin(dim=-1)] + 8 * (x < 0)
    return codes[1::2] + 16 * codes[0::2]
''',
        },
    ),
    Exercise(
        "11.6", packed_bytes, inputs=_sizes,
        hint="One expert holds two matrices: 2 * d_ff rows of d_model (gate and linear) and d_model rows of d_ff. "
             "Every 32 numbers take 16 bytes and a scale byte.",
        point="17 bytes for 32 numbers are 4.25 bits a number: the scale costs a quarter of a bit.",
        solution='''\
def packed_bytes(n_layers, n_experts, d_model, d_ff):
    """Bytes of all experts' matrices, packed. Biases are not packed and not counted."""
    numbers = n_layers * n_experts * 3 * d_model * d_ff
    return numbers // 32 * 17
''',
        mistakes={
            "the scale bytes are forgotten: 4 bits a number instead of 4.25": '''\
def packed_bytes(n_layers, n_experts, d_model, d_ff):
    return n_layers * n_experts * 3 * d_model * d_ff // 2
''',
            "gate and linear are taken for one matrix": '''\
def packed_bytes(n_layers, n_experts, d_model, d_ff):
    return n_layers * n_experts * 2 * d_model * d_ff // 32 * 17
''',
            "each number is given a scale byte of its own": '''\
def packed_bytes(n_layers, n_experts, d_model, d_ff):
    return n_layers * n_experts * 3 * d_model * d_ff * 3 // 2
''',
        },
    ),
)  # fmt: skip
