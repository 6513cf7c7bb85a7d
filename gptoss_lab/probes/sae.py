"""Sparse autoencoders in SAELens's format, on this package's activations: encode, reconstruct, steer by a feature.

A folder holds cfg.json and sae_weights.safetensors. The arithmetic follows SAELens (sae_lens/saes/*.py, version 6).
"""
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..hooks import edit

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
EXTRA = {"standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "topk": ("b_enc",),
         "gated": ("b_gate", "r_mag", "b_mag")}  # fmt: skip
NORMS = ("none", "layer_norm", "constant_norm_rescale")


class SAE:
    """features = act(x W_enc + b), reconstruction = features W_dec + b_dec.   x [... d], features [... F]"""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        self.architecture, self.norm = config["architecture"], config.get("normalize_activations") or "none"
        self.hook_name = (config.get("metadata") or config).get("hook_name")
        self.centred, self.weights = bool(config.get("apply_b_dec_to_input")), weights
        self.k = (config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
                  if self.architecture == "topk" else None)  # fmt: skip

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "SAE":
        """Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: they are damaged, do not fit each other, or are of a kind not read here.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} does not exist: SAELens saves {CONFIG} and {WEIGHTS}")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            weights = {name: x.to(dtype) for name, x in load_file(folder / WEIGHTS).items()}
        except (json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"{folder} is damaged: {error}") from error
        if faults := _faults(config, weights):
            raise ValueError(f"{folder} is no SAE that can be used here:\n  " + "\n  ".join(faults))
        return cls(config, weights)

    @property
    def n_features(self) -> int:
        return self.weights["W_dec"].shape[0]

    def encode(self, x: Tensor) -> Tensor:
        """[... d] -> [... F]"""
        return self._encode(self._normalised(x)[0])

    def decode(self, features: Tensor) -> Tensor:
        """[... F] -> [... d]. Where inputs are normalised, use `reconstruct`: the scale is the input's."""
        return features @ self.weights["W_dec"] + self.weights["b_dec"]

    def reconstruct(self, x: Tensor) -> Tensor:
        """[... d] -> [... d]"""
        normalised, shift, scale = self._normalised(x)
        return (self.decode(self._encode(normalised)) * scale + shift).to(x.dtype)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input, and what undoes its normalisation."""
        if x.shape[-1] != self.weights["b_dec"].shape[0]:
            raise ValueError(f"activations of width {x.shape[-1]}, the SAE reads {self.weights['b_dec'].shape[0]}")
        x = x.to(self.weights["W_dec"].dtype)
        shift, scale = torch.zeros_like(x[..., :1]), torch.ones_like(x[..., :1])
        if self.norm == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            scale = (x - shift).std(-1, keepdim=True) + 1e-5
        elif self.norm == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return (x - shift) / scale, shift, scale

    def _encode(self, x: Tensor) -> Tensor:
        w = self.weights
        x = x - w["b_dec"] if self.centred else x
        if self.architecture == "gated":
            on = x @ w["W_enc"] + w["b_gate"] > 0
            return on * torch.relu(x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
        pre = x @ w["W_enc"] + w["b_enc"]
        if self.architecture == "topk":
            best = pre.topk(int(self.k), dim=-1)
            return torch.zeros_like(pre).scatter(-1, best.indices, torch.relu(best.values))
        return torch.relu(pre) * (pre > w["threshold"]) if self.architecture == "jumprelu" else torch.relu(pre)


def _faults(config: dict, weights: dict[str, Tensor]) -> list[str]:
    kind, norm = config.get("architecture", "standard"), config.get("normalize_activations") or "none"
    config.setdefault("architecture", kind)
    if kind not in EXTRA:
        return [f"architecture = {kind!r}: {', '.join(EXTRA)} are read here"]
    faults = []
    if norm not in NORMS:
        faults.append(f"normalize_activations = {norm!r}: {', '.join(NORMS)} are known; fold its factor in")
    if kind == "topk" and not (config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")):
        faults.append("a topk SAE needs k")
    d, n = config.get("d_in"), config.get("d_sae")
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)} | {name: (n,) for name in EXTRA[kind]}
    for name, shape in shapes.items():
        if name not in weights:
            faults.append(f"{name} {list(shape)} is missing")
        elif tuple(weights[name].shape) != shape:
            faults.append(f"{name} has shape {list(weights[name].shape)}, {CONFIG} says {list(shape)}")
    return faults


@contextmanager
def replaced(model: nn.Module, sae: SAE, hook_name: str | None = None) -> Iterator[None]:
    """The model goes on with the reconstruction: what it loses by that says what the SAE misses."""
    with edit(model, {_point(sae, hook_name): sae.reconstruct}):
        yield


@contextmanager
def steered(model: nn.Module, sae: SAE, feature: int, amount: float, hook_name: str | None = None) -> Iterator[None]:
    """Add `amount` of a feature's decoder row to the activations, at every position.

    Raises:
        ValueError: the SAE has no such feature, or names no hook point and none is given.
    """
    if not 0 <= feature < sae.n_features:
        raise ValueError(f"feature {feature}: the SAE has 0 to {sae.n_features - 1}")
    direction = sae.weights["W_dec"][feature]
    with edit(model, {_point(sae, hook_name): lambda x: x + (amount * direction).to(x)}):
        yield


def _point(sae: SAE, hook_name: str | None) -> str:
    if (hook_name or sae.hook_name) is None:
        raise ValueError(f"{CONFIG} names no hook point: give hook_name, such as 'blocks.3.hook_resid_post'")
    return hook_name or sae.hook_name
