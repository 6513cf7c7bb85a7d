"""Rotary position embedding: the frequencies, the YaRN blend, the rotation."""
import math

import torch
from torch import Tensor

from .config import Config
from .hooks import Hooked


def blend_ends(config: Config) -> tuple[float, float]:
    """The planes between which YaRN blends: below `low` a frequency is kept, above `high` it is slowed.

    A plane i makes n_ctx_trained / wavelength_i turns; low and high are where that is beta_fast and beta_slow.
    For the published models 8.0928 and 17.3980 of 32 planes (gpt_oss/torch/model.py, not rounded there).
    """
    yarn, half = config.yarn, config.d_head / 2
    low, high = (
        half * math.log(yarn.n_ctx_trained / (turns * 2 * math.pi)) / math.log(config.rope_theta)
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, config.d_head - 1)


def frequencies(config: Config) -> Tensor:
    """Radians that each of the d_head/2 planes turns per position.   -> [h/2], float64"""
    half = config.d_head // 2
    kept = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if config.yarn is None:
        return kept
    low, high = blend_ends(config)
    slowed = ((torch.arange(half, dtype=torch.float64) - low) / ((high - low) or 1e-3)).clamp(0, 1)
    return kept * (1 - slowed) + kept / config.yarn.factor * slowed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + h/2]) by its angle: halves, not neighbours.   x [b s H h], cos [(b) s h/2]"""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RotaryEmbedding(Hooked):
    """Positions -> the cosines and sines that turn q and k, YaRN's concentration included.

    The tables are float64 until the last step: float32 angles are off by 1e-3 at position 131,071.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        with torch.device("cpu"):
            self.frequencies = frequencies(config)
        self.concentration = config.yarn.concentration if config.yarn else 1.0

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [s] or [b s] -> cos and sin [s h/2] or [b s h/2]"""
        self.frequencies = self.frequencies.to(positions.device)  # to stay there: a CUDA graph cannot fetch them
        angle = positions.double().unsqueeze(-1) * self.frequencies
        cos = self.hook("cos", (angle.cos() * self.concentration).to(dtype))
        sin = self.hook("sin", (angle.sin() * self.concentration).to(dtype))
        return cos, sin
