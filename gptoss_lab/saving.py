"""GptOss -> checkpoint folders, in any layout, whole or not at all."""
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from . import mxfp4, tokenizer
from .config import to_hf, to_original
from .hooks import unwrapped
from .layouts import LAYOUTS, Piece, layouts_of, pieces
from .model import Experts, GptOss
from .shards import CODES, INDEX, SUMS, progress, sha256, write_file

# openai/gpt-oss-20b, config.json
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def save(
    model: nn.Module, folder: str | Path, layout: str | None = None, *, max_shard_bytes: int = 5_000_000_000
) -> Path:
    """Write a checkpoint folder: weights, config, the tokenizer's own vocabulary if it has one, and SHA256SUMS.

    Packed experts are written as they are, or unpacked exactly for "hf-dense"; dense ones are packed by `mxfp4.pack`
    for "original" and "hf-mxfp4". All other weights keep their dtype. The folder is made beside its place and moved
    there when it is whole, so that it is there whole or not at all. A folder that holds a checkpoint and nothing
    else is replaced, also the one that `model` was loaded from; any other is refused unless it is empty. At most one
    tensor is in memory besides the model.

    Args:
        layout: "original", "hf-mxfp4" or "hf-dense"; None is Hugging Face's, packed where the model is packed.
        max_shard_bytes: weights go into files of at most so many bytes, or one tensor.

    Raises:
        ValueError, ConfigError: the layout cannot hold this model.
        FileExistsError: there is something else in the folder.
        OSError: it cannot be written, with the bytes needed. Nothing is left behind.
    """
    model, folder = unwrapped(model), Path(folder).expanduser().resolve()
    layout = layout or ("hf-mxfp4" if model.blocks[0].mlp.down.packed else "hf-dense")
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: there are {', '.join(LAYOUTS)}")
    if layout not in layouts_of(model.config):
        raise ValueError(f"layout = {layout!r} packs multiples of {mxfp4.BLOCK} numbers; this model has d_model = "
                         f"{model.config.d_model} and d_ff = {model.config.d_ff}: save it as 'hf-dense'")  # fmt: skip
    parts = {piece.name: piece for piece in pieces(model.config, layout)}
    entries = [(name, _dtype_on_disk(model, piece), piece.shape) for name, piece in parts.items()]
    need = sum(map(_n_bytes, entries))
    files = _divide(entries, max_shard_bytes)
    documents = _documents(model, layout, files)
    packed = lru_cache(1)(_pack)  # blocks and scales of one matrix are asked for one after the other

    def tensor(name: str) -> Tensor:
        return _on_disk(model, parts[name], packed)

    with _replacing(folder, need) as new, progress("saving", need) as note:
        sums = {file: write_file(new / file, inside, tensor, note) for file, inside in files.items()}
        for file, content in documents.items():
            (new / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if model.config.d_vocab != 201_088 and model.tokenizer is not None:  # o200k is tiktoken's to keep
            tokenizer.save(model.tokenizer, new)
        sums |= {path.name: sha256(path) for path in new.iterdir() if path.name not in sums}
        lines = [f"{digest}  {file}\n" for file, digest in sorted(sums.items())]
        (new / SUMS).write_text("".join(lines), encoding="utf-8")
    return folder


def _n_bytes(entry: tuple[str, torch.dtype, tuple[int, ...]]) -> int:
    return math.prod(entry[2]) * entry[1].itemsize


def _divide(entries: list[tuple], most: int) -> dict[str, list[tuple]]:
    """The files and what is in each: as much as fits, in order."""
    files, size = [[]], 0
    for entry in entries:
        if files[-1] and size + _n_bytes(entry) > most:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += _n_bytes(entry)
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": inside for i, inside in enumerate(files, 1)}


def _documents(model: GptOss, layout: str, files: dict[str, list[tuple]]) -> dict[str, dict]:
    """The JSON files."""
    config, entries = model.config, [entry for inside in files.values() for entry in inside]
    tokens = {"eos_token_id": list(config.stop_tokens), "pad_token_id": config.pad_token}
    generation = {"do_sample": True} | {name: value for name, value in tokens.items() if value not in (None, [])}
    documents = {"generation_config.json": generation}
    if layout == "original":
        words = {"blocks": "FP4", "scales": "UE8"}  # as in the published dtypes.json
        documents["config.json"] = to_original(config)
        documents["dtypes.json"] = {name: words.get(name.rpartition(".")[2], CODES[dtype])
                                    for name, dtype, _ in entries}  # fmt: skip
    else:
        documents["config.json"] = to_hf(config) | {"dtype": str(model.dtype).removeprefix("torch.")}
    if layout == "hf-mxfp4":
        documents["config.json"]["quantization_config"] = QUANTIZATION
    if len(files) > 1:
        documents[INDEX] = {
            "metadata": {"total_size": sum(map(_n_bytes, entries))},
            "weight_map": {name: file for file, inside in files.items() for name, _, _ in inside},
        }
    return documents


def _dtype_on_disk(model: GptOss, piece: Piece) -> torch.dtype:
    path, _, leaf = piece.ours.rpartition(".")
    module = model.get_submodule(path)
    return torch.uint8 if piece.packed else getattr(module, leaf if hasattr(module, leaf) else "bias").dtype


def _on_disk(model: GptOss, piece: Piece, packed: Callable) -> Tensor:
    """The tensor that the file holds. Only experts that are packed or unpacked take memory of their own."""
    path, _, leaf = piece.ours.rpartition(".")
    module = model.get_submodule(path)
    if hasattr(module, leaf):
        return piece.of(getattr(module, leaf))
    return packed(module, path)[leaf == "scales"] if piece.packed else piece.of(_unpack(module))


def _pack(experts: Experts, path: str) -> list[Tensor]:
    """The blocks and the scales, [E out in/32 16] and [E out in/32]."""
    try:
        parts = [mxfp4.pack(matrix) for matrix in experts.weight]
    except ValueError as error:
        raise ValueError(f"{path}.weight cannot be packed: {error}") from error
    return [torch.stack(one) for one in zip(*parts, strict=True)]


def _unpack(experts: Experts) -> Tensor:
    """[E out in]"""
    n_experts, d_out, n_blocks, _ = experts.blocks.shape
    weight = experts.bias.new_empty(n_experts, d_out, n_blocks * mxfp4.BLOCK)
    for expert in range(n_experts):
        weight[expert] = experts.matrix(expert)
    return weight


@contextmanager
def _replacing(folder: Path, need: int) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends, and is gone when it fails."""
    inside = list(folder.iterdir()) if folder.is_dir() else [folder] if folder.exists() else []
    if foreign := sorted(path.name for path in inside if not _is_part(path)):
        raise FileExistsError(f"{folder} holds {', '.join(foreign[:5])}, which is no part of a checkpoint: choose an "
                              "empty or a new folder")  # fmt: skip
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    old = new.with_suffix(".old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if need > free:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
        new.mkdir()
        yield new
        for path in (*new.iterdir(), new):
            _sync(path)
        if folder.is_dir():
            folder.rename(old)
        new.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise OSError(error.errno, f"{folder} could not be saved, which takes {need:,} bytes: {error.strerror}. What "
                      "was there before is unchanged") from error  # fmt: skip
    finally:
        if old.is_dir() and not folder.exists():
            old.rename(folder)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _is_part(path: Path) -> bool:
    """Is it a file that `save` writes?"""
    names = ("config.json", "generation_config.json", "dtypes.json", INDEX, SUMS, tokenizer.FILE)
    return path.is_file() and not path.is_symlink() and (path.name in names or path.suffix == ".safetensors")


def _sync(path: Path) -> None:
    """Only now is it on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
