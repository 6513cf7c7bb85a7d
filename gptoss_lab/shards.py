"""Safetensors files: their headers, checked; one tensor at a time, read, mapped or written.

A file is 8 bytes that give the header's length, a JSON header that gives each tensor's dtype, shape and place,
and the tensors one after the other (https://github.com/huggingface/safetensors#format). Read here and not by the
library, so that a damaged file is named with its byte counts and no tensor is in memory twice.
"""
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
PART = 2**26  # bytes of a tensor that are in memory twice while it is copied
SUMS = "SHA256SUMS"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER = 100_000_000  # the library's own limit


class CheckpointError(ValueError):
    """Files that are not a whole gpt-oss checkpoint, or do not fit. The message lists every fault found."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: `n_bytes` from byte `begin` on."""

    path: Path
    name: str
    code: str  # the file's word for the dtype: BF16
    shape: tuple[int, ...]
    begin: int
    n_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows after rows, copies of at most PART bytes or one row: never the whole of a large tensor twice."""
        row = self.n_bytes // self.shape[0]
        some = max(1, PART // row)
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            for first in range(0, self.shape[0], some):
                rows = slice(first, min(first + some, self.shape[0]))
                raw = torch.empty((rows.stop - first) * row, dtype=torch.uint8, device="cpu")
                if file.readinto(raw.numpy()) != len(raw):
                    raise CheckpointError(f"{self.path} became shorter while it was read")
                yield rows, raw.view(self.dtype).view(-1, *self.shape[1:])

    @property
    def aligned(self) -> bool:
        """Does it begin at a multiple of its numbers' width, as memory must?"""
        return self.begin % self.dtype.itemsize == 0

    def view(self, file: torch.UntypedStorage) -> Tensor:
        """The tensor as a part of `map_file(path)`, without a copy."""
        whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(file)
        return whole[self.begin : self.begin + self.n_bytes].view(self.dtype).view(self.shape)


def map_file(path: Path) -> torch.UntypedStorage:
    """The file as memory. Pages are read when touched; what is written to them does not reach the file."""
    return torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)


@contextmanager
def progress(what: str, n_bytes: int, shown: int = 1 << 30) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of bytes just done; moves a bar where there are `shown` or more to do."""
    if n_bytes < shown:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=n_bytes, desc=what, unit="B", unit_scale=True) as bar:
        yield bar.update


# ------------------------------------------------------------------------------------------ reading headers


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, by name. Only headers are read.

    Raises:
        CheckpointError: there are none, or files are damaged or contradict their index; all faults are listed.
    """
    paths, weight_map, faults = _files(folder)
    found: dict[str, Stored] = {}
    for path in paths:
        try:
            header = read_header(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for stored in header:
            if stored.name in found:
                faults.append(f"{stored.name} is in {found[stored.name].path.name} and in {path.name}")
            found[stored.name] = stored
    for name, file in weight_map.items():
        where = found[name].path.name if name in found else "no file"
        if where != file and folder / file in paths:
            faults.append(f"{INDEX} says that {name} is in {file}, it is in {where}")
    if faults:
        raise CheckpointError(f"{folder} is damaged; bring the files again:\n  " + "\n  ".join(faults))
    return found


def _files(folder: Path) -> tuple[list[Path], dict[str, str], list[str]]:
    """The safetensors files that count, the index's map of tensors to files, and what is wrong with it."""
    if not (folder / INDEX).is_file():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(_no_safetensors(folder))
        return paths, {}, []
    paths = [folder / name for name in indexed_files(folder / INDEX)]
    faults = [f"{INDEX} names {path.name}, which is not there" for path in paths if not path.is_file()]
    return [path for path in paths if path.is_file()], read_json(folder / INDEX)["weight_map"], faults


def indexed_files(index: Path) -> list[str]:
    """The names of the files that an index spreads the tensors over.

    Raises:
        CheckpointError: it is no index, or names a file elsewhere.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensor names to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}, which is no safetensors file beside it")
    return sorted(set(weight_map.values()))


def _no_safetensors(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (f"{folder} offers {', '.join(pickles)}: a pickle can run any program and is never opened here. If "
                "you trust it, load it with transformers and write it again with save_pretrained")  # fmt: skip
    return f"{folder} holds no *.safetensors file"


def read_header(path: Path) -> list[Stored]:
    """What one safetensors file holds.

    Raises:
        CheckpointError: the file is shorter or longer than its header says, or the header is damaged.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length > _MAX_HEADER or not 0 < length <= size - 8:
            raise CheckpointError(f"{path.name} has {size:,} bytes and begins with a header length of {length:,}: it "
                                  "was cut short, or is no safetensors file")  # fmt: skip
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [_entry(path, 8 + length, name, value) for name, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: the header of {length:,} bytes is damaged ({error})") from error
    end = 8 + length
    entries.sort(key=lambda stored: (stored.begin, stored.n_bytes))
    for stored in entries:
        if stored.begin != end:
            raise CheckpointError(f"{path.name}: the header is damaged, it says that {stored.name} begins at byte "
                                  f"{stored.begin:,} and what is before it ends at {end:,}")  # fmt: skip
        end += stored.n_bytes
    if end != size:
        raise CheckpointError(f"{path.name} has {size:,} bytes, its header describes {end:,}: "
                              + ("cut short" if size < end else "something was added"))  # fmt: skip
    return entries


def _entry(path: Path, data: int, name: str, value: dict) -> Stored:
    code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} and place {begin} to {end}")
    if code in DTYPES and end - begin != math.prod(shape) * DTYPES[code].itemsize:
        raise ValueError(f"{name}, {code} {shape}, has {end - begin} bytes")
    return Stored(path, name, code, tuple(shape), data + begin, end - begin)


def read_json(path: Path):
    """The content of a JSON file, or CheckpointError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


# ------------------------------------------------------------------------------------------ checksums


def checksum_faults(
    folder: Path, names: Iterable[str], largest: float = math.inf, note: Callable = lambda n: None
) -> list[str]:
    """Which of the files `names` differ from the folder's SHA256SUMS. Files that it does not list count as right.

    Args:
        largest: files of more bytes are not read.
        note: called with the number of bytes just read.
    """
    if not (folder / SUMS).is_file():
        return []
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines]
    if None in matches:
        return [f"{SUMS} line {matches.index(None) + 1} is damaged: {lines[matches.index(None)][:80]!r}"]
    wanted = {match[2]: match[1] for match in matches}
    faults = []
    for name in names:
        path = folder / name
        if name in wanted and path.is_file() and path.stat().st_size <= largest:
            seen = sha256(path, note)
            if seen != wanted[name]:
                faults.append(f"{name} has sha256 {seen[:12]}..., {SUMS} says {wanted[name][:12]}...: it was "
                              "damaged or changed after it was saved. Bring it again; if the change is meant, remove "
                              f"its line from {SUMS}")  # fmt: skip
    return faults


def sha256(path: Path, note: Callable = lambda n: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            note(len(chunk))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ writing


def header_of(entries: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file with these tensors (name, code of the dtype, shape), one after the other."""
    header, end = {}, 0
    for name, code, shape in entries:
        begin, end = end, end + math.prod(shape) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 8)
    return struct.pack("<Q", len(text)) + text


def write_file(
    path: Path, entries: list[tuple], tensor: Callable[[str], Tensor], note: Callable = lambda n: None
) -> str:
    """Write one safetensors file of (name, dtype, shape) entries. Returns its sha256.

    `tensor(name)` is asked for one tensor after the other; `note` is called with the bytes just written.

    Wider numbers come first, as in files of the library, so that each begins at a multiple of its width.
    """
    entries = sorted(entries, key=lambda entry: -entry[1].itemsize)
    digest = hashlib.sha256()

    with open(path, "wb") as file:

        def put(data) -> None:
            digest.update(data)
            file.write(data)

        put(header_of([(name, CODES[dtype], shape) for name, dtype, shape in entries]))
        for name, dtype, shape in entries:
            value = tensor(name)
            assert value.dtype == dtype and tuple(value.shape) == tuple(shape), name
            note(value.nbytes)
            put(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
