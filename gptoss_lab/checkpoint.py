"""Checkpoint folders -> GptOss. Everything is checked before anything is allocated or read."""
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from . import hub, shards, tiny, tokenizer
from .config import TINY, Config, read_config
from .fast.gpu import tensor_cores
from .layouts import Piece, dtypes, pieces, recognise, table
from .memory import address_space
from .model import GptOss
from .plan import plan
from .shards import CheckpointError, Stored

SMALL = 256 << 20  # bytes; the checksums of larger files are compared by `verify` only


# ---------------------------------------------------------------------------------------- what a folder holds


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose every tensor has the name, shape and dtype that its config.json asks for."""

    folder: Path
    config: Config
    layout: str
    stored: dict[str, Stored]  # by the name in the file

    @property
    def files(self) -> list[str]:
        """The names of the files that the model is made of."""
        weights = sorted({stored.path.name for stored in self.stored.values()})
        beside = ("config.json", "generation_config.json", shards.INDEX, tokenizer.FILE)
        return weights + [name for name in beside if (self.folder / name).is_file()]

    @property
    def n_bytes(self) -> int:
        return sum(stored.n_bytes for stored in self.stored.values())


def local(source: str | Path) -> Path | None:
    """The folder with the weights that `source` names; None where it can only be a name on the hub.

    Raises:
        FileNotFoundError, CheckpointError: it is neither, or it is a file.
    """
    folder = tiny.WEIGHTS if source == "tiny" else Path(source).expanduser()
    if folder.is_file():
        pickle = folder.suffix in shards.PICKLES
        raise CheckpointError(f"{folder} is a file" + ", a pickle: it can run any program and is never opened" * pickle
                              + "; give a folder with config.json and *.safetensors")  # fmt: skip
    if folder.is_dir():
        return _weights_in(folder)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        return None
    raise FileNotFoundError(f"{str(source)!r} is no folder here, and no name on the hub such as openai/gpt-oss-20b; "
                            "tiny and tiny-random are the models that come with this package")  # fmt: skip


def find(source: str | Path) -> Path:
    """The folder with the weights of `source`, fetched from the hub where it is a name there."""
    return local(source) or _weights_in(hub.download(str(source)))


def _weights_in(folder: Path) -> Path:
    """The folder itself, or its original/ where only that has weights."""
    bare = not (any(folder.glob("*.safetensors")) or (folder / shards.INDEX).is_file())
    return folder / "original" if bare and any(folder.glob("original/*.safetensors")) else folder


def examine(folder: Path) -> Checkpoint:
    """Read a folder's config and the headers of its files, and compare every name, shape and dtype.

    Raises:
        FileNotFoundError: there is no config.json.
        ConfigError: it does not describe a gpt-oss model.
        CheckpointError: files are damaged, or tensors are missing, surplus, misshapen or of a wrong dtype; all of
            them are listed.
    """
    config, stored = read_config(folder), shards.find_tensors(folder)
    return Checkpoint(folder, config, match(config, stored, str(folder)), stored)


def match(config: Config, stored: dict[str, Stored], source: str) -> str:
    """The layout of these tensors, which must be all that `config` asks for and no other."""
    layout = recognise(set(stored), config)
    if layout is None:
        raise CheckpointError(f"{source} has {len(stored)} tensors, and none has a name of gpt-oss; the first are "
                              f"{', '.join([*stored][:3])}")  # fmt: skip
    wanted = {piece.name: piece for piece in pieces(config, layout)}
    faults = [f"{name} {list(piece.shape)} is missing" for name, piece in wanted.items() if name not in stored]
    faults += [f"{name} {list(one.shape)} is surplus" for name, one in stored.items() if name not in wanted]
    for name, piece in wanted.items():
        if name in stored and stored[name].shape != piece.shape:
            faults.append(f"{name} has shape {list(stored[name].shape)}, not {list(piece.shape)}")
        codes = ["U8"] if piece.packed else [code for code in shards.DTYPES if code != "U8"]
        if name in stored and stored[name].code not in codes:
            faults.append(f"{name} has dtype {stored[name].code}, not {' or '.join(codes)}")
    if faults:
        raise CheckpointError(f"the tensors in {source} ({layout}) are not those of the model in its config.json; one "
                              "of the two is of another model:\n  " + "\n  ".join(faults))  # fmt: skip
    return layout


# ---------------------------------------------------------------------------------------- loading


def chosen(default: str) -> str:
    """The model that the environment variable GPTOSS_LAB_MODEL names, or `default`: one notebook, many models."""
    return os.environ.get("GPTOSS_LAB_MODEL") or default


def load(
    source: str | Path, *, device=None, dtype: torch.dtype | None = None, max_context: int | None = None
) -> GptOss:
    """A model in eval mode, with its `.config` and `.tokenizer`.

    MXFP4 experts stay packed, byte for byte. On the CPU a tensor that needs no change is the file itself, mapped:
    its pages are read when they are first used, the file must not be rewritten in place meanwhile, and what is
    written to the tensor does not reach the file. What is copied is in memory twice 64 MiB at a time. On a GPU that
    has no room for the whole context beside it, the embedding table stays in the host's memory.

    Args:
        source: a folder in any of the three layouts, or one with such a folder original/ in it; a name on the
            Hugging Face hub, such as "openai/gpt-oss-20b"; "tiny", the trained model that comes with this package,
            or "tiny-random", the same before training.
        device: where the model shall be; None is torch's default device.
        dtype: of all weights that are not packed, and so of what is computed with packed ones. None: as stored;
            where dtypes are mixed, the widest of them, and norm gains as they are. The tiny models are float32, and
            bfloat16 becomes float16 on a GPU that cannot multiply it (a T4); the residual stream is float32 then.
        max_context: use fewer positions than the model has.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: see `local` and `examine`; or a file of at most 256 MiB
            differs from the folder's SHA256SUMS.
        ImportError, ConnectionError, OSError: see `hub.download`.
        MemoryError: the model does not fit the device with `max_context` positions (None: with one), by `plan`, whose
            table it shows; or the process may not map its files (`ulimit -v`). Nothing has been read then.
        ValueError: max_context is beyond the model's context, or dtype is no floating one.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype}: weights are floating, such as torch.bfloat16")
    if source == "tiny-random":
        return tiny.untrained(_shortened(TINY, max_context)).to(device, dtype)
    if source == "tiny":
        dtype = dtype or torch.float32  # a CPU is slow in the bfloat16 of the file
    checkpoint = examine(find(source))
    dtype = dtype or _suited(checkpoint, device)
    with torch.device("meta"):
        model = GptOss(_shortened(checkpoint.config, max_context), packed=checkpoint.layout != "hf-dense")
    steps = _plan(checkpoint, model, device, dtype)
    room = plan(checkpoint, context=max_context, device=device, dtype=dtype)
    on_host = room.embedding_on_host
    if not room.fits and max_context is None:  # fewer positions than the model has will do
        room, on_host = room.at(1), device.type == "cuda"
    if not room.fits:
        raise MemoryError(room.refusal())
    files = {one.stored[0].path for one in steps if one.as_is}
    n_mapped, left = sum(path.stat().st_size for path in files), address_space()
    if left is not None and n_mapped > left:
        raise MemoryError(f"{checkpoint.folder}: {n_mapped:,} bytes of files are to be mapped, and this process may "
                          f"map {left:,} more: raise its limit of address space (ulimit -v)\n\n{room}")  # fmt: skip
    if faults := shards.checksum_faults(checkpoint.folder, checkpoint.files, largest=SMALL):
        raise CheckpointError(f"{checkpoint.folder} is not as it was saved:\n  " + "\n  ".join(faults))
    vocabulary = _vocabulary(checkpoint)

    mapped, state = cache(shards.map_file), {}
    with shards.progress("loading", checkpoint.n_bytes) as note:
        for step in steps:
            if step.as_is:
                state[step.ours] = step.stored[0].view(mapped(step.stored[0].path))
            else:
                host = on_host and step.ours == "embed.weight"
                place = dict(device="cpu", pin_memory=True) if host else dict(device=device)
                state[step.ours] = torch.empty(step.shape, dtype=step.dtype, **place)
                for piece, stored in zip(step.parts, step.stored, strict=True):
                    whole = piece.of(state[step.ours])
                    for rows, part in stored.parts():
                        whole[rows].copy_(part)
            note(sum(stored.n_bytes for stored in step.stored))
    model.load_state_dict(state, assign=True)
    model.read_tokenizer = vocabulary
    return model.eval()


def _suited(checkpoint: Checkpoint, device: torch.device) -> torch.dtype | None:
    made_of = table(checkpoint.config, checkpoint.layout)
    kept = dtypes(made_of, lambda name: checkpoint.stored[name].dtype)["unembed.weight"]
    slow = device.type == "cuda" and kept == torch.bfloat16 and not tensor_cores(device)
    return torch.float16 if slow else None


def _shortened(config: Config, max_context: int | None) -> Config:
    if max_context is None:
        return config
    if not 1 <= max_context <= config.n_ctx:
        raise ValueError(f"max_context = {max_context}: the model has 1 to {config.n_ctx:,} positions")
    return config.with_(n_ctx=max_context)


@dataclass(frozen=True)
class _Step:
    """How one tensor of the model is made."""

    ours: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Piece, ...]
    stored: list[Stored]
    as_is: bool  # a part of the mapped file


def _plan(checkpoint: Checkpoint, model: GptOss, device: torch.device, dtype: torch.dtype | None) -> list[_Step]:
    shapes = {ours: tuple(tensor.shape) for ours, tensor in model.state_dict().items()}
    made_of = table(checkpoint.config, checkpoint.layout)
    kept = dtypes(made_of, lambda name: checkpoint.stored[name].dtype, dtype)
    stored = {ours: [checkpoint.stored[piece.name] for piece in parts] for ours, parts in made_of.items()}

    def as_is(ours: str) -> bool:
        first, whole = stored[ours][0], len(made_of[ours]) == 1 and not made_of[ours][0].transposed
        return device.type == "cpu" and whole and first.dtype == kept[ours] and first.aligned

    return [_Step(ours, shapes[ours], kept[ours], made_of[ours], stored[ours], as_is(ours)) for ours in made_of]


def _vocabulary(checkpoint: Checkpoint) -> Callable:
    """What reads the tokenizer at its first use. The folder's own is read at once, so that a bad one is told."""
    own, d_vocab = tokenizer.load(checkpoint.folder), checkpoint.config.d_vocab
    if own is not None and own.n_vocab > d_vocab:
        raise CheckpointError(f"{tokenizer.FILE} has {own.n_vocab} ids and the embedding {d_vocab} rows: they do not "
                              "belong together")  # fmt: skip
    return tokenizer.o200k_harmony if own is None and d_vocab == 201_088 else lambda: own
