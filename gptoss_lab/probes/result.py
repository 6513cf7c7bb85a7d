"""What a probe gives back: named arrays that can be drawn, tabulated, saved and loaded."""
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..hooks import Activations, record


@dataclass(frozen=True)
class Result:
    """The base of every probe's result. A subclass says what its fields hold, with shapes and units.

    Each result is made from recorded values, `of(acts)`, or by running the model, `measure(model, tokens)`. Recorded
    values may come from one pass, from chunks with a cache, or from `generate`: `record` joins them along positions.
    """

    points: ClassVar[tuple[str, ...]] = ()  # what `of` needs recorded

    @classmethod
    def of(cls, acts: Activations, **about) -> Self:
        """The result of recorded values."""
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: Tensor, **about) -> Self:
        """Run the model on tokens [b s] and read what it did."""
        with record(model, *cls.points) as acts:
            model(tokens)
        return cls.of(acts, **about)

    def save(self, path: str | Path) -> Path:
        """Write `path`.safetensors (the tensors) and `path`.json (the rest), each whole or not at all."""
        path = Path(path)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x.detach().contiguous() for name, x in values.items() if isinstance(x, Tensor)}
        rest = {"probe": type(self).__name__} | {name: x for name, x in values.items() if name not in tensors}
        _write(path.with_name(path.name + ".safetensors"), safetensors.torch.save(tensors))
        _write(path.with_name(path.name + ".json"), json.dumps(rest, indent=1).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote to `path`.

        Raises:
            FileNotFoundError: one of the two files is not there.
            ValueError: they hold another probe's result, or are damaged.
        """
        path = Path(path)
        try:
            rest = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
            tensors = safetensors.torch.load(path.with_name(path.name + ".safetensors").read_bytes())
        except (json.JSONDecodeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if rest.pop("probe", None) != cls.__name__ or {*rest, *tensors} != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is not the saved result of {cls.__name__}")
        kept = {name: tuple(x) if isinstance(x, list) else x for name, x in rest.items()}
        return cls(**kept, **tensors)


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def frame(columns: dict):
    """A pandas DataFrame of equally long columns.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("frame() needs pandas: pip install pandas") from error
    return pandas.DataFrame({name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in columns.items()})


def stacked(acts: Activations, point: str, layers: list[int] | None = None) -> Tensor:
    """One recorded point of several layers, all that were recorded by default.   -> [L ...]

    Raises:
        ValueError: the point was not recorded in any layer, or a value in it is NaN.
    """
    every = [name for name in acts if name.endswith(point)]
    names = every if layers is None else [f"blocks.{layer}.{point}" for layer in layers]
    if not names:
        raise ValueError(f"{point} was not recorded: this probe needs record(model, '*.{point.rpartition('.')[2]}')")
    x = torch.stack([acts[name] for name in names])
    if x.isnan().any():
        bad = [name for name, one in zip(names, x) if one.isnan().any()]
        raise ValueError(f"{bad[0]} holds NaN: the model's values there are not numbers")
    return x


def fits(x: Tensor, shape: Sequence[int], name: str) -> Tensor:
    if x.is_floating_point() or tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}: it must hold one whole number for each recorded "
                         f"position, {tuple(shape)}")  # fmt: skip
    return x
