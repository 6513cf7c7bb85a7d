"""Where every byte goes: weights, keys and values, one pass over a prompt; counted before any is taken.

The published 20B in 16 GiB: experts of 4 bits take 9.5, the rest, in bfloat16, 3.4, of which 1.1 are an embedding table
that can lie on the host. 131,072 positions take 3.0 in the layers that keep them all, next to nothing in those with a
window. One pass takes 0.2, because it reads a chunk of the prompt and no [s t] matrix is made.
"""
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import product

import torch

from . import fast, hub
from .config import TINY, Config, published, read_config
from .hooks import cost
from .layouts import dtypes, layouts_of, table
from .memory import free_bytes
from .model import GptOss
from .shards import PART, Stored

CUDA_CONTEXT = 450 * 2**20  # driver, kernels and workspaces of a process: assumed, no GPU has confirmed it here
CHUNKS = (2048, 1024, 512, 256)  # prompt tokens read in one pass, where nobody says how many
MASK = 10  # bytes a query and key while the CPU makes a mask: their distance in int64, and two comparisons
UNITS = {"": 1, "mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def n_bytes(text: str | int) -> int:
    """The bytes that "16GiB", "15500 MiB", "16GB", "500MB" or a plain number means.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", str(text).strip().lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no amount of memory: write 16GiB, 15500MiB, 16GB, 500MB or a number of bytes")
    return int(Fraction(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class Plan:
    """What one context takes, in bytes. `print(plan)` gives the table.

    `parts` is what is needed on the device, and adds up to `total`. `beside` is what the model has elsewhere: an
    embedding table in host memory, or, on the CPU, pages of the file, which are given up where memory is short.
    """

    source: str
    device: torch.device
    context: int  # positions of each sequence, prompt and answer together
    memory: int | None  # there for all of it; None where the system does not say
    chunk: int  # prompt tokens read in one pass
    record: tuple  # names of hook points whose values are kept over the whole context
    batch: int
    weights: dict[str, int]  # of each part of the model, wherever they lie
    elsewhere: dict[str, int]  # of these, what takes none of `memory`
    why: str  # where that is
    twice: int  # of a tensor that is copied, what is in memory twice
    own: int  # what the device takes for itself
    chunks: tuple[int, ...]  # to choose among, the best first
    model: GptOss = field(repr=False, compare=False)  # for its config, dtype and hook points
    embedding_on_host: bool = False

    @property
    def _sizes(self) -> tuple[Config, int, int, int, int]:
        """The config, a number's bytes, those of one token's key and value, sliding layers, tokens in a pass."""
        c, itemsize = self.model.config, self.model.dtype.itemsize
        sliding = sum(c.window(layer) is not None for layer in range(c.n_layers))
        return c, itemsize, 2 * c.n_kv_heads * c.d_head * itemsize, sliding, self.batch * min(self.chunk, self.context)

    @property
    def keys_values(self) -> dict[str, int]:
        """What a `KVCache` of this capacity holds: all positions in full layers, a ring of the last in sliding ones."""
        c, _, each, sliding, _ = self._sizes
        return {"full layers": self.batch * each * (c.n_layers - sliding) * self.context,
                "sliding layers": self.batch * each * sliding * min(c.sliding_window, self.context)}  # fmt: skip

    @property
    def steps(self) -> dict[str, int]:
        """What a layer makes of one chunk, step after step: only the largest counts."""
        c, i, _, _, n = self._sizes
        heads = 3 * c.n_heads + 3 * c.n_kv_heads  # q k v; q and k turned; attention's output
        attention, slot = n * heads * c.d_head * i, (c.d_ff + c.d_model) * i
        if self.device.type == "cpu":  # a mask; float32 sums, to which biases are added
            attention += MASK * self.batch * min(fast.QUERIES, self.chunk) * self.context
            slot = 2 * c.d_ff * (4 + i + 4)
        experts = n * (c.n_experts * i + c.experts_per_token * (slot + 8 + i))  # logits; and an index and a weight
        return {"norms": n * 3 * 4 * c.d_model, "attention": attention, "experts": experts}

    @property
    def one_pass(self) -> dict[str, int]:
        """What is there while a chunk of a prompt is read, beside what was read before."""
        c, i, each, sliding, n = self._sizes
        wide = 4 if self.model.dtype == torch.float16 else i  # the residual stream overflows float16
        step = max(self.steps, key=self.steps.get)
        return {
            "residual stream": n * c.d_model * (2 * wide + i),  # before and after a step, and normalized
            # Until the pass has succeeded a sliding layer holds its old ring, and a new one with the chunk behind it.
            "sliding layers": each * sliding * (self.batch * min(c.sliding_window, self.context) + n),
            f"{step} of a layer": self.steps[step],
            "logits of one row": self.batch * c.d_vocab * 4,
        }

    @cached_property
    def recorded(self) -> int:
        """What `record(model, *record)` keeps of the whole context."""
        return cost(self.model, list(self.record), self.batch, self.context) if self.record else 0

    @cached_property
    def parts(self) -> dict[str, int]:
        """Everything that is needed on the device."""
        weights = {f"weights: {part}": n - self.elsewhere.get(part, 0) for part, n in self.weights.items()}
        weights["weights: embedding"] *= not self.embedding_on_host
        running = {f"keys and values: {name}": n for name, n in self.keys_values.items()}
        running |= {f"one pass: {name}": n for name, n in self.one_pass.items()} | {"recorded values": self.recorded}
        loading = max(0, self.twice - sum(running.values()))  # given back before anything runs
        rest = {"what is copied, twice while loading": loading, "the device itself (assumed)": self.own}
        return {name: n for name, n in (weights | running | rest).items() if n}

    @property
    def beside(self) -> dict[str, int]:
        """What takes none of the device's memory."""
        found = {f"weights: {part}, {self.why}": n for part, n in self.elsewhere.items() if n}
        pinned = 1 << (self.weights["embedding"] - 1).bit_length()  # PyTorch pins powers of two
        host = {"weights: embedding, pinned on the host": pinned}
        return found | (host if self.embedding_on_host else {})

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.memory is None or self.total <= self.memory

    def at(self, context: int) -> "Plan":
        """The same for another context, with the largest chunk that fits, the embedding on the host if it has to be.

        Where nothing fits, with the first chunk and the embedding on the device.
        """
        hosts = (False,) if self.device.type == "cpu" else (False, True)
        for chunk, host in product(self.chunks, hosts):
            way = replace(self, context=context, chunk=chunk, embedding_on_host=host)
            if way.fits:
                return way
        return replace(self, context=context, chunk=self.chunks[0], embedding_on_host=False)

    @cached_property
    def largest_context(self) -> int:
        """The most positions that fit, at most those of the model; 0 where not even one does."""
        fits, too_many = 0, self.model.config.n_ctx + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self.at(middle).fits else (fits, middle)
        return fits

    def refusal(self, source: str | None = None) -> str:
        """What a MemoryError says where it does not fit: bytes, the largest context that would, and the table."""
        return (f"{source or self.source} needs {self.total:,} bytes ({_gib(self.total)}) on {self.device} for "
                f"{self.context:,} positions, where {self.memory:,} bytes ({_gib(self.memory)}) are there. "
                f"{self._largest}. Choose fewer positions, fewer recorded points, a narrower dtype, a smaller model "
                f"or another device.\n\n{self}")  # fmt: skip

    @property
    def _largest(self) -> str:
        n = self.largest_context
        return f"The largest context that fits is {n:,}" if n else "No context fits"

    def __str__(self) -> str:
        row = lambda name, n: f"{name:<40}{n:>20,} {_gib(n):>12} {n / (self.memory or self.total):>8.1%}"
        rows = lambda some: [row(*one) for one in some.items()]
        lines = [f"{self.source} on {self.device}: " + f"{self.batch} sequences of " * (self.batch > 1)
                 + f"{self.context:,} positions in {str(self.model.dtype).removeprefix('torch.')}, prompts read "
                 f"{min(self.chunk, self.context):,} tokens at a time", "",
                 *rows(self.parts), "", row("needed", self.total)]  # fmt: skip
        if self.memory is not None:
            left = self.memory - self.total
            lines += [row("there", self.memory), row("left" if self.fits else "too much", abs(left))]
        if self.beside:
            lines += ["", "not counted:", *rows(self.beside)]
        return "\n".join([*lines, "", f"It {'fits' if self.fits else 'does not fit'}. {self._largest}."])


def _gib(n: int) -> str:
    return f"{n / 2**30:.3f} GiB"


def plan(
    source, *, context: int | None = None, memory: int | str | None = None, device=None,
    dtype: torch.dtype | None = None, chunk: int | None = None, record=(), batch: int = 1,
) -> Plan:  # fmt: skip
    """Where the memory goes for one context, and the largest that fits.

    Args:
        source: what `inspect` takes; a Checkpoint; a Config, of which packed bfloat16 files are assumed; or a model,
            whose weights are there already: with `memory=None` they are shown and not counted.
        context: positions of each sequence; None is all that the model has.
        memory: bytes, or text as `n_bytes` reads it; None is what is free there now. On a GPU a number has to hold the
            CUDA context too; of what is free it is no part, for asking has already made one.
        device: None is the model's, otherwise "cuda". A GPU's pass is that of the kernels in `fast`.
        dtype: as for `load`.
        chunk: prompt tokens read in one pass; None takes the largest of 2,048, 1,024, 512 and 256 that fits.
        record: names that `record` will keep over the whole context.
        batch: sequences side by side.

    Raises:
        ValueError: a number that means nothing or is beyond the model's context; or there is no GPU to be asked.
        KeyError: a name to record matches nothing.
        FileNotFoundError, ConfigError, CheckpointError, ConnectionError: as `inspect`.
    """
    loaded = isinstance(source, GptOss)
    device = torch.device(device or (source.unembed.weight.device if loaded else "cuda"))
    if memory is None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError('there is no GPU here to ask what is free: say memory="16GiB" (--memory 16GiB), or plan for '
                         'device="cpu"')  # fmt: skip
    if loaded:
        name, model, twice, why = "the model", source, 0, "already there"
        weights = _by_part((tensor, value.nbytes) for tensor, value in model.state_dict().items())
        elsewhere = weights if memory is None else {}
    else:
        name, config, layout, stored = _known(source)
        dtype = dtype or (torch.float32 if source in ("tiny", "tiny-random") else None)  # as `load`
        tensors = list(_tensors(config, layout, stored, dtype))
        copied = [largest for *_, as_is, largest in tensors if not as_is]
        twice, why = min(max(copied, default=0), PART) if device.type == "cpu" else 0, "pages of the file"
        weights = _by_part((tensor, n) for tensor, _, n, *_ in tensors)
        elsewhere = _by_part((tensor, n) for tensor, _, n, as_is, _ in tensors if as_is and device.type == "cpu")
        with torch.device("meta"):
            model = GptOss(config, packed=layout != "hf-dense").to(tensors[0][1])
    for what, n, most in (("context", context, model.config.n_ctx), ("chunk", chunk, None), ("batch", batch, None)):
        if n is not None and not 1 <= n <= (most or n):
            raise ValueError(f"{what} = {n}: must be " + (f"1 to {most:,}, as the model has" if most else "at least 1"))
    asked, chunks = memory is None, CHUNKS if chunk is None else (chunk,)
    first = Plan(
        name, device, context or model.config.n_ctx, free_bytes(device) if asked else n_bytes(memory), chunks[0],
        (record,) if isinstance(record, str) else tuple(record), batch, weights, elsewhere, why, twice,
        CUDA_CONTEXT if device.type == "cuda" and not asked else 0, chunks, model,
    )  # fmt: skip
    return first.at(first.context)


def _known(source) -> tuple[str, Config, str, dict[str, Stored] | None]:
    """What to call it, its config and layout, and what its files hold; None where there are none."""
    from .checkpoint import Checkpoint, examine, local, match

    if isinstance(source, Config):
        return "the model", source, "hf-mxfp4" if "hf-mxfp4" in layouts_of(source) else "hf-dense", None
    if source in ("gpt-oss-20b", "gpt-oss-120b"):
        return source, published(source), "hf-mxfp4", None
    if source == "tiny-random":
        return source, TINY, "hf-dense", None
    if isinstance(source, Checkpoint):
        return str(source.folder), source.config, source.layout, source.stored
    if (folder := local(source)) is not None:
        return str(source), *_known(examine(folder))[1:]
    folder, stored = hub.tensors(str(source))
    config = read_config(folder)
    return str(source), config, match(config, stored, str(source)), stored


def _tensors(
    config: Config, layout: str, stored: dict[str, Stored] | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.dtype, int, bool, int]]:
    """Each tensor as `load` makes it: name, dtype, bytes, is it a part of the file as it is, and the bytes of the
    largest tensor in the file that it is made from."""
    made_of = table(config, layout)
    kinds = {one.name: stored[one.name].dtype if stored else torch.uint8 if one.packed else torch.bfloat16
             for some in made_of.values() for one in some}  # fmt: skip
    kept = dtypes(made_of, kinds.get, dtype)
    for ours, some in made_of.items():
        sizes, first = {one.name: math.prod(one.shape) for one in some}, some[0]
        as_is = len(some) == 1 and not first.transposed and kinds[first.name] == kept[ours]
        as_is = as_is and (stored is None or stored[first.name].aligned)
        largest = max(size * kinds[name].itemsize for name, size in sizes.items())
        yield ours, kept[ours], sum(sizes.values()) * kept[ours].itemsize, as_is, largest


def _by_part(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The bytes of named tensors, summed over the parts of the model."""
    found = dict.fromkeys(("experts", "attention", "router and norms", "embedding", "unembedding"), 0)
    own = {"gate_up": "experts", "down": "experts", "embed": "embedding", "unembed": "unembedding"}
    for name, n in sizes:
        names = name.split(".")
        found["attention" if "attn" in names else own.get(names[-2], "router and norms")] += n
    return found
