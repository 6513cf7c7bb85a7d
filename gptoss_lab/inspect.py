"""What a checkpoint holds: parts, parameters and bytes, from config and headers alone."""
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import hub
from .checkpoint import examine, local, match
from .config import TINY, Config, published, read_config
from .layouts import pieces
from .shards import Stored

_PART_OF = {"mlp": "MLP", "attn": "attention", "embed": "embedding", "unembed": "unembedding"}


@dataclass(frozen=True)
class Report:
    """The sizes of one model. `print(report)` gives the table of the model card (arXiv 2508.10925, table 1)."""

    source: str
    config: Config
    layout: str
    parts: dict[str, int]  # parameters of each part
    active: int  # that one token's forward pass multiplies with: the unembedding counts, the embedding does not
    dtypes: dict[str, int]  # the file's dtypes, and how many tensors have each
    n_bytes: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        c, parts = self.config, self.parts
        rows = [("MLP", parts["MLP"]), ("attention", parts["attention"]),
                ("embedding + unembedding", parts["embedding"] + parts["unembedding"]), ("norms", parts["norms"]),
                ("total", self.total), ("active", self.active)]  # fmt: skip
        (big, per), (unit, size) = _unit(self.total, 1000), _unit(self.n_bytes, 1024)
        tensors = ", ".join(f"{count} {dtype}" for dtype, count in sorted(self.dtypes.items()))
        return "\n".join([
            f"{self.source}: {self.layout}, tensors: {tensors}",
            f"{c.n_layers} layers, d_model {c.d_model}, {c.n_heads} heads for {c.n_kv_heads} key-value heads of "
            f"{c.d_head}, {c.n_experts} experts of {c.d_ff}, {c.experts_per_token} a token",
            f"vocabulary {c.d_vocab:,}, context {c.n_ctx:,}, window {c.sliding_window}", "",
            *(f"{name:<24}{count:>20,}  {count / per:>8.2f} {big}" for name, count in rows),
            f"{'bytes':<24}{self.n_bytes:>20,}  {self.n_bytes / size:>8.1f} {unit}",
        ])  # fmt: skip


def _unit(n: int, base: int) -> tuple[str, int]:
    """The largest unit that is in `n` at least once."""
    units = {1000: ["", "K", "M", "B", "T"], 1024: ["B", "KiB", "MiB", "GiB", "TiB"]}[base]
    return [(unit, base**i) for i, unit in enumerate(units) if base**i <= max(n, 1)][-1]


def inspect(source: str | Path) -> Report:
    """What `source` holds. Weights are neither loaded nor, for a hub name, fetched.

    Args:
        source: what `load` takes, or "gpt-oss-20b" and "gpt-oss-120b", which need no files.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError, ConnectionError: as `load`.
    """
    if source in ("gpt-oss-20b", "gpt-oss-120b"):
        return _report(str(source), published(str(source)), "hf-mxfp4", None)
    if source == "tiny-random":
        return _report(source, TINY, "hf-dense", None)
    folder = local(source)
    if folder is not None:
        checkpoint = examine(folder)
        return _report(str(source), checkpoint.config, checkpoint.layout, checkpoint.stored)
    folder, stored = hub.tensors(str(source))
    config = read_config(folder)
    return _report(str(source), config, match(config, stored, str(source)), stored)


def _report(source: str, config: Config, layout: str, stored: dict[str, Stored] | None) -> Report:
    parts = Counter()
    idle = 0  # of the experts that a token does not use
    for piece in pieces(config, "hf-dense"):
        count = math.prod(piece.shape)
        names = piece.ours.split(".")
        parts[next((_PART_OF[name] for name in names if name in _PART_OF), "norms")] += count
        if names[-2] in ("gate_up", "down"):
            idle += count // config.n_experts * (config.n_experts - config.experts_per_token)
    if stored is None:  # no files: the dtypes that the files would have
        wide = "F32" if layout == "hf-dense" else "BF16"
        sizes = [("U8", math.prod(p.shape)) if p.packed else (wide, math.prod(p.shape) * (4 if wide == "F32" else 2))
                 for p in pieces(config, layout)]  # fmt: skip
    else:
        sizes = [(one.code, one.n_bytes) for one in stored.values()]
    active = sum(parts.values()) - idle - parts["embedding"]
    dtypes = Counter(dtype for dtype, _ in sizes)
    return Report(source, config, layout, dict(parts), active, dict(dtypes), sum(n for _, n in sizes))
