"""MXFP4 by another hand: numpy and ml_dtypes' four-bit float, with nothing of the package."""
import ml_dtypes
import numpy as np


def encode(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [... n*32] -> blocks uint8 [... n 16], scales uint8 [... n], by the rule of OCP MX 1.0, section 6.3."""
    groups = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1)
    with np.errstate(divide="ignore"):
        exponent = np.where(largest > 0, np.floor(np.log2(largest)) - 2, -127)
    scales = np.clip(exponent + 127, 0, 254).astype(np.uint8)
    scaled = groups / np.exp2(scales.astype(np.float64) - 127)[..., None]
    codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 [... n*32]"""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (values * np.exp2(scales.astype(np.float64) - 127)[..., None]).reshape(*scales.shape[:-1], -1)
