"""Checkpoints from the Hugging Face hub, in huggingface_hub's own cache folder.

huggingface_hub finds the files, keeps the cache and signs the requests. The weights are fetched here, because since 2.0
it throws away a file that was interrupted, and a shard of gpt-oss has up to 4.8 GB.
"""
import errno
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from .shards import INDEX, PICKLES, SUMS, CheckpointError, Stored, indexed_files, progress, sha256
from .tokenizer import FILE

# All that is needed beside the weights: no original/, no metal/, no tokenizer.json.
SMALL_FILES = ["config.json", "generation_config.json", INDEX, SUMS, FILE]


def download(name: str) -> Path:
    """The folder of the checkpoint `name` in the cache; what is missing in it is fetched, with progress shown.

    An interrupted file goes on where it stopped, and is compared with its sha256 before it gets its name. What is
    whole in the cache needs no network; HF_HUB_OFFLINE=1 saves asking the hub for a newer revision.

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: the hub has no such model, or shows it to others only.
        ConnectionError: no connection, and the cache does not hold all of it; what came so far is kept.
        CheckpointError: the model has no safetensors, or a file came damaged.
        OSError: it does not fit the disk.
    """
    with _told(name):
        folder, weights = _small_files(name)
        missing = [file for file in weights if not (folder / file).exists()]
        if missing:
            _fetch(name, folder, missing)
    return folder


def tensors(name: str) -> tuple[Path, dict[str, Stored]]:
    """The small files of `name` in the cache, and what its safetensors files hold; only their headers are fetched."""
    with _told(name):
        from huggingface_hub import HfApi

        folder, weights = _small_files(name)
        stored = {}
        for file in weights:
            header = HfApi().parse_safetensors_file_metadata(name, file, revision=folder.name)
            for tensor, info in header.tensors.items():
                begin, end = info.data_offsets
                stored[tensor] = Stored(folder / file, tensor, info.dtype, tuple(info.shape), begin, end - begin)
        return folder, stored


def _small_files(name: str) -> tuple[Path, list[str]]:
    """The snapshot folder with the small files in it, and the names of the files with the weights."""
    from huggingface_hub import HfApi, snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=SMALL_FILES))
    if (folder / INDEX).exists():
        return folder, indexed_files(folder / INDEX)
    if (folder / "model.safetensors").exists():
        return folder, ["model.safetensors"]
    files = HfApi().list_repo_files(name, revision=folder.name)
    if "model.safetensors" not in files:
        pickles = ", ".join(file for file in files if file.endswith(PICKLES))
        raise CheckpointError(f"{name} on the hub has no model.safetensors" + (
            f"; {pickles}: a pickle can run any program and is never opened here" if pickles else ""))  # fmt: skip
    return folder, ["model.safetensors"]


def _fetch(name: str, folder: Path, files: list[str]) -> None:
    """Bring `files` into the cache: blobs/<sha256>, with a link from the snapshot folder."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    repo = folder.parent.parent
    urls = {file: hf_hub_url(name, file, revision=folder.name) for file in files}
    wanted = {file: get_hf_file_metadata(url) for file, url in urls.items()}
    blobs = {file: repo / "blobs" / one.etag for file, one in wanted.items()}
    total = sum(one.size for one in wanted.values())
    need = total - sum(_size(_part(blob)) for blob in blobs.values())
    free = shutil.disk_usage(repo).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{name} needs {need:,} more bytes in {repo}, where {free:,} are free: make room, "
                      "or set HF_HOME to a folder on a larger disk")  # fmt: skip
    with progress(f"downloading {name}", total, shown=0) as note:
        for file, one in wanted.items():
            blob, lock = blobs[file], repo.parent / ".locks" / repo.name / f"{one.etag}.lock"  # huggingface_hub's own
            blob.parent.mkdir(exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not blob.exists():
                    _fetch_one(urls[file], _part(blob), one.size, note)
                    if re.fullmatch("[0-9a-f]{64}", one.etag) and sha256(_part(blob)) != one.etag:
                        _part(blob).unlink()
                        raise CheckpointError(f"{file} of {name} came damaged and was removed: load it again")
                    _part(blob).replace(blob)
            hf_hub_download(name, file, revision=folder.name)  # finds the blob and links to it


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_one(url: str, part: Path, size: int, note) -> None:
    """Append to `part` what is missing of `url`; a connection that breaks is tried again while it brings anything."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    have = _size(part)
    note(have)
    while have < size:
        before = have
        headers = build_hf_headers() | {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
        try:
            with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:  # the server sends all of it
                    note(-have)
                    have = 0
                with open(part, "r+b" if have else "wb") as file:
                    file.seek(have)
                    for chunk in response.iter_raw():
                        file.write(chunk)
                        have += len(chunk)
                        note(len(chunk))
        except HfHubHTTPError:
            raise
        except HTTPError:
            if have == before:
                raise
    if have != size:
        part.unlink()
        raise CheckpointError(f"{url} has {have:,} bytes, the hub said {size:,}: load it again")


@contextmanager
def _told(name: str):
    """What huggingface_hub raises, in words that say what to do."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(f"{name!r} is no folder here, and to fetch it from the Hugging Face hub takes "
                          "huggingface_hub: pip install 'gptoss-lab[hub]'") from error  # fmt: skip
    try:
        yield
    except GatedRepoError as error:
        raise FileNotFoundError(f"{name} asks you to accept its terms on {constants.ENDPOINT}/{name}; then set "
                                "HF_TOKEN") from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{constants.ENDPOINT} has no model {name!r}: check the name; a private one needs "
                                "HF_TOKEN") from error  # fmt: skip
    except (LocalEntryNotFoundError, HTTPError, ConnectionError) as error:
        how = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} did not give the rest"
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(f"{name} is not complete in the cache {constants.HF_HUB_CACHE}, and {how} ({why}). What "
                              "came is kept: load it again with a network, or load a folder") from error  # fmt: skip
