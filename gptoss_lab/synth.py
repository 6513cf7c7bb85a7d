"""Checkpoints of the published shapes with random contents: for measuring and testing where the real ones are not.

Names, shapes, dtypes and layout are those of Hugging Face's files; for gpt-oss-20b headers and sizes too, byte for byte
(the 120B's were divided in another order). Every number follows from the seed and its place, so that a file can be gone
on with where it stopped.
"""
import errno
import json
import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

from .config import Config, to_hf
from .layouts import Piece, layouts_of, pieces
from .saving import QUANTIZATION
from .shards import INDEX, CheckpointError, header_of, progress

SHARD = 4_800_000_000  # bytes of tensors a file: what the published files were cut at
CHUNK = 1 << 24  # numbers made at a time
FIRST_SCALE, N_SCALES = 118, 4  # blocks between 2^-9 and 2^-6: weights of about 1 / sqrt(2880)


def synthesise(config: Config, folder: str | Path, seed: int = 0) -> Path:
    """Write a packed checkpoint with random contents. One that was begun with this seed is gone on with.

    Raises:
        ValueError: the sizes cannot be packed.
        FileExistsError: the folder holds something else.
        OSError: the disk has too little room, with the bytes needed. Nothing has been written then.
    """
    folder = Path(folder).expanduser()
    if "hf-mxfp4" not in layouts_of(config):
        raise ValueError(f"MXFP4 packs multiples of 32 numbers: d_model = {config.d_model}, d_ff = {config.d_ff}")
    files = _divided(config)
    ours = (*files, *_DOCUMENTS)
    if foreign := [path.name for path in folder.glob("*") if path.name.removesuffix(".part") not in ours]:
        raise FileExistsError(f"{folder} holds {', '.join(foreign[:5])}: choose an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    headers = {name: header_of(entries) for name, entries in files.items()}
    need = sum(len(headers[name]) + sum(map(_n_bytes, entries)) for name, entries in files.items())
    there = sum(path.stat().st_size for path in folder.iterdir())
    if need - there > (free := shutil.disk_usage(folder).free):
        raise OSError(errno.ENOSPC, f"{folder} needs {need - there:,} more bytes, {free:,} are free")

    mark = {"seed": seed, "config": to_hf(config)}
    _same_or_new(folder / "synth.json", mark)
    with progress("writing", need) as note:
        for name, entries in files.items():
            _write(folder / name, headers[name], entries, seed, note)
    weight_map = {piece: name for name, entries in files.items() for piece, _, _ in entries}
    total = sum(_n_bytes(entry) for entries in files.values() for entry in entries)
    documents = {
        INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map},
        "generation_config.json": {"do_sample": True, "eos_token_id": list(config.stop_tokens)},
        "config.json": to_hf(config) | {"dtype": "bfloat16", "quantization_config": QUANTIZATION},
    }  # config.json last: only with it is the folder a checkpoint
    for name, content in documents.items():
        _replace(folder / name, json.dumps(content, indent=2) + "\n")
    return folder


_DOCUMENTS = ("synth.json", INDEX, "generation_config.json", "config.json")


def _divided(config: Config) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """The files and their tensors (name, dtype, shape), divided and ordered as the published ones."""
    original = {piece.ours: piece.name for piece in pieces(config, "original")}
    inside: list[list[Piece]] = [[]]
    size = 0
    for piece in sorted(pieces(config, "hf-mxfp4"), key=lambda piece: original[piece.ours]):
        n = math.prod(piece.shape) * (1 if piece.packed else 2)
        if inside[-1] and size + n > SHARD:
            inside.append([])
            size = 0
        inside[-1].append(piece)
        size += n
    files = {}
    for i, some in enumerate(inside):
        some.sort(key=lambda piece: (piece.packed, piece.name))  # wider numbers first, as the library does
        name = f"model-{i:05}-of-{len(inside) - 1:05}" if len(inside) > 1 else "model"  # counted from 0, as published
        files[f"{name}.safetensors"] = [(piece.name, "U8" if piece.packed else "BF16", piece.shape) for piece in some]
    return files


def _n_bytes(entry: tuple[str, str, tuple[int, ...]]) -> int:
    return math.prod(entry[2]) * (1 if entry[1] == "U8" else 2)


def _write(path: Path, header: bytes, entries: list, seed: int, note) -> None:
    """The file, from where its .part ends."""
    part, end = path.with_name(path.name + ".part"), len(header) + sum(map(_n_bytes, entries))
    if path.exists():
        note(end)
        return
    if part.exists() and not part.read_bytes()[: len(header)] == header[: part.stat().st_size]:
        raise CheckpointError(f"{part} was begun with other shapes: remove it")
    with open(part, "ab") as file:
        done = file.tell()
        note(done)
        if done < len(header):
            file.write(header[done:])
            note(len(header) - done)
        begin = len(header)
        for entry in entries:
            width, n = (1 if entry[1] == "U8" else 2), math.prod(entry[2])
            for at in range(0, n, CHUNK):
                stop = begin + min(at + CHUNK, n) * width
                if stop > file.tell():
                    content = _random(entry, at, min(CHUNK, n - at), seed)
                    missing = content[len(content) - (stop - file.tell()) :]
                    file.write(missing)
                    note(len(missing))
            begin += n * width
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _random(entry: tuple[str, str, tuple[int, ...]], at: int, n: int, seed: int) -> bytes:
    """Numbers `at` to `at + n` of a tensor: uniform, of a size that a forward pass keeps finite and varied."""
    name, code, shape = entry
    words = np.random.SFC64([seed, zlib.crc32(name.encode()), at]).random_raw(-(-n * (1 if code == "U8" else 2) // 8))
    if name.endswith("_blocks"):
        return words.view(np.uint8)[:n].tobytes()
    if name.endswith("_scales"):
        return (FIRST_SCALE + words.view(np.uint8)[:n] % N_SCALES).tobytes()
    mean, spread = _size(name, shape)
    x = mean + spread * 3**0.5 * (words.view(np.int16)[:n].astype(np.float32) / 2**15)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to bfloat16, ties to even


def _size(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation: no gain, bias or sink is trivial."""
    if "norm" in name:
        return 1.0, 0.1
    if name.endswith("sinks"):
        return 0.0, 1.0
    if "embed" in name:
        return 0.0, 1.0
    if len(shape) == 1 or name.endswith("_bias"):
        return 0.0, 0.1
    return 0.0, shape[-1] ** -0.5


def _same_or_new(path: Path, mark: dict) -> None:
    text = json.dumps(mark, indent=2) + "\n"
    if path.exists() and path.read_text("utf-8") != text:
        raise FileExistsError(f"{path.parent} was begun with another seed or other shapes: choose another folder")
    _replace(path, text)


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
