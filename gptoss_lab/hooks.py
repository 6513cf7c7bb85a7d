"""Hook points: named values inside the forward pass that can be read and replaced while it runs.

A module names a value where it makes it, `q = self.hook("q", q)`. With nobody listening that returns q.
Listeners exist only inside a `with` block (`record`, `edit`, `listening`), which removes what it added, also after an
exception. Edits run first, in the order in which they were opened; a record then sees what the model goes on with.
"""
import difflib
import html
import inspect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from operator import attrgetter

import torch
from torch import Tensor, nn

from .memory import copied, free_bytes, large


class Hooked(nn.Module):
    """A module whose forward names its values with `self.hook(name, value)`."""

    listeners: dict[str, tuple] = {}  # shared and empty until a `with` block gives the instance its own

    def hook(self, name: str, x: Tensor) -> Tensor:
        for listener in self.listeners.get(name, ()):
            x = listener(x)
        return x

    def heard(self, *names: str) -> bool:
        """Is anyone listening to one of these values? What is dear is computed only then."""
        listeners = self.listeners
        for name in names:  # in half of the time of any(...), in every module of every pass
            if name in listeners:
                return True
        return False

    def give(self, name: str, x: Tensor) -> None:
        """Tell those who read, and do not edit, a value that nobody else holds."""
        for listener in self.listeners.get(name, ()):
            listener.give(x)

    def edited(self, *names: str) -> bool:
        """May one who listens replace one of these values? All but `Read` may."""
        return any(type(one) is not Read for name in names for one in self.listeners.get(name, ()))


# ------------------------------------------------------------------------------------------ the registry


@dataclass(frozen=True)
class HookPoint:
    """One named value. `shape` uses b batch, s position, t keys, d d_model, H heads, K kv heads, h d_head,
    E experts, k experts per token, f d_ff, V vocabulary, p d_head/2."""

    name: str
    shape: str
    what: str
    writable: bool = True
    shared: bool = False  # part of memory that the model or another point holds: a record copies it
    dtype: str = "model"  # "model", "stream" (float32 beside a float16 model), "float32" (at least), "int64"
    aliases: tuple[str, ...] = ()

    def layer(self) -> int | None:
        """The layer that the point is in, as TransformerLens's `hook.layer()`; None outside the blocks."""
        found = re.match(r"blocks\.(\d+)\.", self.name)
        return int(found[1]) if found else None

    @cached_property
    def place(self) -> tuple[str, str]:
        """The path of the module that makes the value, and what it calls it there."""
        path, _, leaf = self.name.rpartition(".")
        return path, leaf.removeprefix("hook_")

    def axis(self, letter: str) -> int | None:
        """Where `letter` stands in the shape, counted from the end; None where it does not."""
        letters = self.shape.split()
        return letters.index(letter) - len(letters) if letter in letters else None


def _points() -> list[HookPoint]:
    def point(name, shape, what, *aliases, derived=False, shared=False, dtype="model"):
        return HookPoint(name, shape, what, not derived, shared, dtype, aliases)

    def norm(name, of, *aliases):
        return [
            point(f"{name}.hook_scale", "b s 1", f"sqrt(mean({of}²) + eps): the rms", dtype="float32"),
            point(f"{name}.hook_normalized", "b s d", f"{of} / scale, before the gain", dtype="float32"),
            point(f"{name}.hook_out", "b s d", "normalized * weight", *aliases, dtype="stream"),
        ]

    b, hf = "blocks.{l}", "model.layers.{l}"
    return [
        point("hook_tokens", "b s", "token ids", "embed.hook_in", derived=True, shared=True, dtype="int64"),
        point("hook_embed", "b s d", "embed.weight[tokens]", "embed.hook_out", "model.embed_tokens", dtype="stream"),
        point("rotary_emb.hook_cos", "s p", "cos(position * frequency) * concentration; b s p where a mask gives "
              "each row its own positions", f"{b}.attn.hook_cos", shared=True),
        point("rotary_emb.hook_sin", "s p", "sin(position * frequency) * concentration", f"{b}.attn.hook_sin",
              shared=True),
        point(f"{b}.hook_resid_pre", "b s d", "the residual stream before the layer", f"{b}.hook_in",
              f"{b}.ln1.hook_in", shared=True, dtype="stream"),
        *norm(f"{b}.ln1", "resid_pre", f"{b}.attn.hook_in", f"{b}.attn.q.hook_in", f"{b}.attn.k.hook_in",
              f"{b}.attn.v.hook_in", f"{hf}.input_layernorm"),
        point(f"{b}.attn.hook_q", "b s H h", "W_q ln1.out + b_q, before RoPE", f"{b}.attn.q.hook_out",
              f"{hf}.self_attn.q_proj", shared=True),
        point(f"{b}.attn.hook_k", "b s K h", "W_k ln1.out + b_k, before RoPE", f"{b}.attn.k.hook_out",
              f"{hf}.self_attn.k_proj", shared=True),
        point(f"{b}.attn.hook_v", "b s K h", "W_v ln1.out + b_v", f"{b}.attn.v.hook_out", f"{hf}.self_attn.v_proj",
              shared=True),
        point(f"{b}.attn.hook_rot_q", "b s H h", "q turned by its position"),
        point(f"{b}.attn.hook_rot_k", "b s K h", "k turned by its position"),
        point(f"{b}.attn.hook_sink_scores", "b H s", "the head's learned sink logit; -inf removes the sink",
              shared=True),
        point(f"{b}.attn.hook_attn_scores", "b H s t", "rot_q · rot_k / sqrt(h); -inf where the key is not visible"),
        point(f"{b}.attn.hook_pattern", "b H s t", "softmax([attn_scores, sink_score]) without its last column: a row "
              "sums to 1 - sink_mass"),
        point(f"{b}.attn.hook_sink_mass", "b H s", "the last column: probability spent on the sink", derived=True),
        point(f"{b}.attn.hook_z", "b s H h", "sum over t of pattern * v", f"{b}.attn.o.hook_in"),
        point(f"{b}.attn.hook_result", "b s H d", "W_o[head] z[head]: each head's write, without b_o"),
        point(f"{b}.hook_attn_out", "b s d", "sum over heads of result, + b_o: what is added", f"{b}.attn.hook_out",
              f"{b}.attn.o.hook_out", f"{hf}.self_attn", f"{hf}.self_attn.o_proj"),
        point(f"{b}.hook_resid_mid", "b s d", "resid_pre + attn_out", f"{b}.ln2.hook_in", dtype="stream"),
        *norm(f"{b}.ln2", "resid_mid", f"{b}.mlp.hook_in", f"{b}.mlp.router.hook_in",
              f"{hf}.post_attention_layernorm"),
        point(f"{b}.mlp.hook_router_logits", "b s E", "W_r ln2.out + b_r, before top-k: an edit re-routes",
              f"{b}.mlp.router.hook_out", f"{hf}.mlp.router"),
        point(f"{b}.mlp.hook_expert_indices", "b s k", "the k largest router logits, falling; an edit forces experts",
              f"{b}.mlp.router.hook_expert_indices", dtype="int64"),
        point(f"{b}.mlp.hook_expert_weights", "b s k", "softmax over the chosen logits; 0 removes an expert",
              f"{b}.mlp.router.hook_expert_weights"),
        point(f"{b}.mlp.hook_pre", "b s k f", "the SwiGLU's gate of each chosen expert, before the clamp"),
        point(f"{b}.mlp.hook_pre_linear", "b s k f", "its linear part, before the clamp"),
        point(f"{b}.mlp.hook_pre_clamped", "b s k f", "min(pre, 7)"),
        point(f"{b}.mlp.hook_pre_linear_clamped", "b s k f", "pre_linear held in ±7"),
        point(f"{b}.mlp.hook_post", "b s k f", "g sigmoid(1.702 g) (u + 1), g and u the clamped gate and linear"),
        point(f"{b}.mlp.hook_expert_out", "b s k d", "W_down post + b_down of each chosen expert, unweighted"),
        point(f"{b}.hook_mlp_out", "b s d", "sum over k of expert_weights * expert_out: what is added",
              f"{b}.mlp.hook_out", f"{hf}.mlp", f"{hf}.mlp.experts"),
        point(f"{b}.hook_resid_post", "b s d", "resid_mid + mlp_out", f"{b}.hook_out", hf, dtype="stream"),
        *norm("ln_final", "last resid_post", "unembed.hook_in", "model.norm"),
        point("unembed.hook_out", "b s V", "W_u ln_final.out: the logits", "hook_logits", "hook_unembed", "lm_head",
              shared=True),
    ]  # fmt: skip


POINTS = _points()
DEFAULT = ("*.hook_resid_post", "*.hook_router_logits", "*.hook_expert_indices", "*.hook_expert_weights",
           "*.hook_sink_mass")  # fmt: skip
UNASKED = 2**26  # bytes that are recorded without a look at the free memory, which takes longer than recording
Names = str | tuple | Callable[[str], bool] | Iterable | None


class HookPoints(Mapping):
    """The hook points of one model, in the order in which they fire: name -> HookPoint."""

    def __init__(self, n_layers: int):
        self.n_layers = n_layers
        in_block = [p for p in POINTS if "{l}" in p.name]
        first = POINTS.index(in_block[0])
        rows = [*POINTS[:first], *(_in_layer(p, l) for l in range(n_layers) for p in in_block),
                *POINTS[first + len(in_block):]]  # fmt: skip
        self._points = {p.name: p for p in rows}
        self._aliases = {}
        for p in rows:
            for l in range(n_layers):
                self._aliases |= {alias.replace("{l}", str(l)): p.name for alias in p.aliases}
            path, leaf = p.place
            self._aliases[".".join(filter(None, p.place))] = p.name
            if p.layer() is not None:
                part = path.split(".")[2:]
                for layer in (p.layer(), p.layer() - n_layers):
                    self._aliases[(leaf, layer, *part)] = p.name
                    if part not in (["ln1"], ["ln2"]):  # both have a scale, a normalized and an out
                        self._aliases[(leaf, layer)] = p.name
        self._aliases["ln_final.hook_in"] = f"blocks.{n_layers - 1}.hook_resid_post"
        self._resolved: dict[tuple, list[HookPoint]] = {}

    def __getitem__(self, key) -> HookPoint:
        name = key if key in self._points else self._aliases.get(key)
        if name is None:
            raise KeyError(self._unknown(key))
        return self._points[name]

    def __contains__(self, key):
        return key in self._points or key in self._aliases

    def __iter__(self):
        return iter(self._points)

    def __len__(self):
        return len(self._points)

    def resolve(self, names: Names = None) -> list[HookPoint]:
        """The points that `names` means, in firing order.

        Args:
            names: a name ("blocks.3.attn.hook_q", "blocks.3.attn.q", a TransformerLens 4 name, a Hugging Face module
                path), a glob ("*.hook_pattern"), a shorthand tuple ("resid_post", 5) or ("scale", 5, "ln1"), a function
                name -> bool, or several of these. None means the cheap default group: residual streams, router and
                sink mass.

        Raises:
            KeyError: one of them matches nothing; the message suggests the nearest names.
        """
        names = DEFAULT if names is None else (names,) if _is_one(names) else tuple(names)
        if not all(isinstance(one, str) for one in names):
            return self._resolve(names)
        if names not in self._resolved:
            self._resolved[names] = self._resolve(names)
        return list(self._resolved[names])

    def _resolve(self, names: tuple) -> list[HookPoint]:
        found = {name for one in names for name in self._match(one)}
        return [p for p in self._points.values() if p.name in found]

    def _match(self, one) -> list[str]:
        if callable(one):
            matches = [name for name in self._points if one(name)]
        elif isinstance(one, Iterable) and not _is_one(one):
            return [p.name for p in self.resolve(one)]
        elif one in self._points or one in self._aliases:
            matches = [self[one].name]
        elif isinstance(one, str):
            matches = _fitting(tuple(self._points), one)
            matches = matches or [name for alias, name in self._aliases.items()
                                  if isinstance(alias, str) and fnmatchcase(alias, one)]  # fmt: skip
        else:
            matches = []
        if not matches:
            raise KeyError(self._unknown(one))
        return matches

    def _unknown(self, key) -> str:
        known = [*self._points, *(a for a in self._aliases if isinstance(a, str))]
        text = f"blocks.{key[1]}.{key[0]}" if isinstance(key, tuple) and _is_one(key) else str(key)
        near = [name for name in known if name.startswith(text)]
        near = near or difflib.get_close_matches(text, known, n=3, cutoff=0.5)
        near = list(dict.fromkeys(self._aliases.get(n, n) for n in near))[:3]
        layers = f"; this model has layers 0 to {self.n_layers - 1}" if re.search(r"\d", str(key)) else ""
        return (f"no hook point matches {key!r}{layers}."
                + (f" Nearest: {', '.join(near)}." if near else " Print model.hook_points for all."))  # fmt: skip

    def __repr__(self):
        return _table(self._rows(), "{:<44} {:<8} {:<8} {}".format)

    def _repr_html_(self):
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._rows())
        rows = "".join(f"<tr>{row}</tr>" for row in cells)
        return ("<table><thead><tr><th>name</th><th>shape</th><th></th><th>what</th></tr></thead>"
                f"<tbody>{rows}</tbody></table>")  # fmt: skip

    def _rows(self):
        """One row a point, the layers folded into {l}."""
        return [(p.name, p.shape, "" if p.writable else "derived", p.what) for p in POINTS]


@lru_cache
def _fitting(names: tuple[str, ...], glob: str) -> tuple[str, ...]:
    return tuple(name for name in names if fnmatchcase(name, glob))


def _table(rows, line) -> str:
    return "\n".join([line("name", "shape", "", "what").rstrip(), *(line(*row) for row in rows)])


def _in_layer(p: HookPoint, layer: int) -> HookPoint:
    put = lambda text: text.replace("{l}", str(layer))
    return HookPoint(put(p.name), p.shape, p.what, p.writable, p.shared, p.dtype, tuple(map(put, p.aliases)))


def _is_one(names) -> bool:
    shorthand = isinstance(names, tuple) and len(names) in (2, 3) and isinstance(names[1], int)
    return isinstance(names, str) or callable(names) or shorthand or not isinstance(names, Iterable)


# ------------------------------------------------------------------------------------------ reading and changing


class Edit:
    """Replaces a value by what `fn` makes of a copy of it."""

    last = False

    def __init__(self, fn: Callable | Tensor, point: HookPoint):
        if isinstance(fn, Tensor):
            value, fn = fn, lambda x: value
        self.point, self.fn = point, _given(fn, point)

    def __call__(self, x: Tensor) -> Tensor:
        mine = x.clone()
        made = self.fn(mine)
        name = self.point.name
        if not self.point.writable:
            if made is not None or not torch.allclose(mine, x, rtol=0, atol=0, equal_nan=True):
                raise TypeError(f"{name} is derived ({self.point.what}): it can be read, but not edited")
            return x
        made = mine if made is None else made  # changed in place, or only read
        if not isinstance(made, Tensor):
            raise TypeError(f"the hook on {name} returned a {type(made).__name__}; return a tensor, or None")
        for what in ("shape", "dtype", "device"):
            if getattr(made, what) != getattr(x, what):
                raise ValueError(f"the hook on {name} returned {what} {_show(getattr(made, what))}, "
                                 f"the model needs {_show(getattr(x, what))}")  # fmt: skip
        return made.clone()  # fn may have kept it


class Read:
    """Hands a value to `keep(point, x)`, which returns it, or an equal one that depends on what was kept."""

    __slots__ = ("keep", "point")
    last = True

    def __init__(self, keep: Callable, point: HookPoint):
        self.keep, self.point = keep, point

    def __call__(self, x: Tensor) -> Tensor:
        keep = self.keep
        if x.requires_grad and torch.compiler.is_compiling():  # inside a compiled graph it would have no gradient
            keep = torch.compiler.disable(keep)
        return keep(self.point, x)

    def give(self, x: Tensor) -> None:
        """x is nobody else's: a record that keeps all of it need not copy it."""
        acts = getattr(self.keep, "__self__", None)
        if type(acts) is Activations and not acts.apart:
            acts.take(self.point, x)
        else:
            self(x)


def _given(fn: Callable, point: HookPoint) -> Callable[[Tensor], Tensor | None]:
    """`fn(tensor, hook)` with its point, given by name as TransformerLens does; `fn(tensor)` as it is."""
    try:
        _, *others = inspect.signature(fn).parameters.values()
    except ValueError:  # a built-in without a signature
        return fn
    if any(p.name == "hook" for p in others):
        return lambda x: fn(x, hook=point)
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in others):
        return lambda x: fn(x, point)
    return fn


def _show(value):
    return tuple(value) if isinstance(value, torch.Size) else value


def pytorch_hooks(module: nn.Module) -> bool:
    """Does anyone listen to this module through PyTorch?"""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def unwrapped(model: nn.Module) -> nn.Module:
    """The GptOss inside what torch.compile returned."""
    return getattr(model, "_orig_mod", model)


@contextmanager
def listening(model: nn.Module, listeners: Iterable[Edit | Read]):
    """Inside the block the listeners hear their points; afterwards, in any case, they are gone."""
    inner, by_path, opened = unwrapped(model), {}, []
    for listener in listeners:
        path, name = listener.point.place
        by_path.setdefault(path, []).append((name, listener))
    try:
        for path, added in by_path.items():
            module = _module(inner, path)
            before, heard = module.listeners, dict(module.listeners)
            for name, listener in added:
                others = heard.get(name)
                heard[name] = tuple(sorted((*others, listener), key=lambda one: one.last)) if others else (listener,)
            _let_hear(module, heard)
            opened.append((module, before, heard, added))
        vars(inner)["changes"] = inner.changes + 1
        yield
    finally:
        vars(inner)["changes"] = inner.changes + 1
        for module, before, heard, added in opened:
            if module.listeners is not heard:  # a block that was opened later is still open
                gone = [listener for _, listener in added]
                left = {name: [x for x in several if x not in gone] for name, several in module.listeners.items()}
                before = {name: tuple(several) for name, several in left.items() if several}
            _let_hear(module, before)


def _module(model: nn.Module, path: str) -> nn.Module:
    found = model
    try:  # quicker than attribute by attribute
        for part in path.split(".") if path else ():
            found = found._modules[part]
    except KeyError:  # a part that somebody wrapped
        return attrgetter(path)(model)
    return found


def _let_hear(module: nn.Module, listeners: dict[str, tuple]) -> None:
    if isinstance(module, Hooked):
        vars(module)["listeners"] = listeners  # nn.Module's own way takes 5 us
    else:  # a wrapper, which hands it on
        module.listeners = listeners


@contextmanager
def edit(model: nn.Module, edits: Mapping):
    """Change values while the model runs: `with edit(model, {"blocks.2.attn.hook_z": fn}): model(tokens)`.

    Args:
        edits: what `HookPoints.resolve` takes -> `fn(tensor)`, `fn(tensor, hook)` or a tensor. `fn` gets a copy; it
            may change it in place and return None, or return a tensor of the same shape, dtype and device.

    Raises:
        KeyError: a name matches nothing.
        TypeError: `edits` is no dict; or a point is derived: nothing is computed from it, so an edit had no effect.
        ValueError: from the forward pass, where `fn` returns another shape, dtype or device.
    """
    if not isinstance(edits, Mapping):
        raise TypeError(f"edits = {edits!r}: give a dict of names and functions, such as {{('z', 3): lambda z: 0 * z}}")
    points = unwrapped(model).hook_points
    chosen = [(point, fn) for names, fn in edits.items() for point in points.resolve(names)]
    for point, _ in chosen:
        if not point.writable:
            raise TypeError(f"{point.name} is derived ({point.what}) and cannot be edited; "
                            "edit a value that it is computed from")  # fmt: skip
    with listening(model, [Edit(fn, point) for point, fn in chosen]):
        yield


def _folded(names: Iterable[str]) -> str:
    """Names with their layers taken together: blocks.0-23.attn.hook_q."""
    layers: dict[str, list[int]] = {}
    for name in names:
        layer = re.search(r"(?<=^blocks\.)\d+", name)
        layers.setdefault(re.sub(r"(?<=^blocks\.)\d+", "{}", name), []).extend([int(layer[0])] if layer else [])
    short = lambda some: str(some[0]) if len(some) == 1 else f"{min(some)}-{max(some)}"
    return ", ".join(name.replace("{}", short(some)) if some else name for name, some in layers.items())


class Activations(Mapping):
    """Recorded values by name. Positions of successive forward passes over one KV cache are joined.

    `acts["blocks.3.attn.hook_q"]`, `acts["q", 3]` and every alias give the same tensor. In [b H s t] values t counts
    every key seen; keys that came later, and keys that a sliding layer no longer holds, are 0 in hook_pattern and -inf
    in hook_attn_scores. Each tensor is the caller's own: nothing that happens later changes it.
    """

    def __init__(self, points: HookPoints, wanted: list[HookPoint], device=None, pos_slice=None):
        self.points, self.wanted = points, wanted
        self._device = None if device is None else torch.device(device)
        self._slice = slice(pos_slice, pos_slice + 1 or None) if isinstance(pos_slice, int) else pos_slice
        self._kept: dict[str, list[Tensor]] = defaultdict(list)
        self._cache_id, self._first, self._length = None, 0, 0  # positions _first to _length are kept
        self.apart = False  # are there others who record, or are parts kept, or elsewhere?

    @cached_property
    def kinds(self) -> Counter:
        return kinds(self.wanted)

    def begin(self, cache_id, start: int, length: int, alone: bool) -> None:
        """A forward pass over positions start to start + length begins; it continues what is kept, or replaces it.

        `alone`: nobody else records this pass, so that what is fresh need not be copied.
        """
        self.apart = not alone or self._slice is not None or self._device is not None
        rewound = start != self._length
        if cache_id is None or cache_id != self._cache_id or not self._first < start <= self._length:
            self._kept = defaultdict(list)
        elif rewound and self._slice is not None:
            self._kept = defaultdict(list)
        elif rewound:
            before = {p.name: [self._before(p, start)] for p in self.wanted if p.name in self._kept}
            self._kept = defaultdict(list, before)
        if not self._kept:
            self._first = start
        self._cache_id, self._length = cache_id, start + length

    def _before(self, point: HookPoint, position: int) -> Tensor:
        x = self[point.name].narrow(point.axis("s"), 0, position - self._first)
        return x if point.axis("t") is None else x[..., :position]

    def keep(self, point: HookPoint, x: Tensor) -> Tensor:
        """Take x. What the model goes on with is made from what was taken, so that gradients reach it."""
        # What is large on the CPU is copied in any case: see `memory.room`.
        if not self.apart and not point.shared and x.is_contiguous() and (x.requires_grad or not large(x)):
            self._kept[point.name].append(x)
            return x
        where = (..., slice(None) if self._slice is None else self._slice, *[slice(None)] * (-1 - point.axis("s")))
        taken = x if self._slice is None else x[where]
        moved = taken if self._device is None else taken.to(self._device)
        if moved.device != x.device:
            self._kept[point.name].append(moved)
            return x
        taken = taken.clone() if x.requires_grad else copied(taken)
        self._kept[point.name].append(taken)
        if self._slice is None and not x.is_contiguous():
            return taken  # the model goes on with the copy, which is quicker to read than the view
        if taken.requires_grad:
            x = x.clone()
            x[where] = taken
        return x

    def take(self, point: HookPoint, x: Tensor) -> None:
        """Keep x itself: it is nobody else's."""
        self._kept[point.name].append(x)

    def __getitem__(self, key) -> Tensor:
        point = self.points[key]
        if point.name not in self._kept:
            asked = any(point.name == p.name for p in self.wanted)
            raise KeyError(f"{point.name} " + ("has not fired: run the model inside the `with` block" if asked else
                           f"was not recorded: ask for \"*.{point.name.rpartition('.')[2]}\". "
                           f"Recorded are {_folded(self._kept) or 'no points'}"))  # fmt: skip
        kept = self._kept[point.name]
        if len(kept) > 1:
            kept[:] = [_join(point, kept)]
        return kept[0]

    def __iter__(self):
        return (p.name for p in self.wanted if p.name in self._kept)

    def __len__(self):
        return len(self._kept)

    def __repr__(self):
        lines = [f"{name:<44} {str(tuple(x.shape)):<22} {x.dtype}" for name, x in self.items()]
        return "\n".join(lines) or f"Activations of {len(self.wanted)} points, nothing recorded yet"


def _join(point: HookPoint, parts: list[Tensor]) -> Tensor:
    """Chunks one after the other along positions; the key axis of earlier ones grows to that of the last."""
    if point.axis("t") is not None:
        keys = max(part.shape[-1] for part in parts)
        fill = 0.0 if point.name.endswith("pattern") else -torch.inf
        parts = [nn.functional.pad(part, (0, keys - part.shape[-1]), value=fill) for part in parts]
    if len({part.dim() for part in parts}) > 1:  # rope tables with and without rows of their own
        rows = max(part.shape[0] for part in parts if part.dim() == 3)
        parts = [part if part.dim() == 3 else part.expand(rows, *part.shape) for part in parts]
    return torch.cat(parts, dim=point.axis("s"))


@contextmanager
def record(model: nn.Module, *names, device=None, pos_slice=None):
    """Read values while the model runs: `with record(model, "*.hook_pattern") as acts: model(tokens)`.

    Args:
        names: what `HookPoints.resolve` takes; none given means the cheap default group.
        device: where recorded values are kept; None keeps them where they are made, as gradients need it.
        pos_slice: an int or slice of the position axis to keep.

    Yields:
        Activations, filled by each forward pass. A pass that continues a KV cache is appended along positions, so
        `generate` inside the block records every step; any other pass replaces what was there. The tensors of
        one pass keep their graph where gradients are on:
        `torch.autograd.grad(logits[0, -1, 42], acts["resid_post", 3])`.

    Raises:
        KeyError: a name matches nothing.
        MemoryError: from the forward pass, before it computes: what is asked for cannot fit, with the bytes.
    """
    with _recorded(unwrapped(model), unwrapped(model).hook_points.resolve(names or None), device, pos_slice) as acts:
        yield acts


@contextmanager
def _recorded(model, points: list[HookPoint], device, pos_slice):
    acts = Activations(model.hook_points, points, device, pos_slice)
    vars(model)["recordings"] = *model.recordings, acts
    try:
        with listening(model, [Read(acts.keep, point) for point in points]):
            yield acts
    finally:
        vars(model)["recordings"] = tuple(one for one in model.recordings if one is not acts)


def cost(model: nn.Module, names: Names = None, batch: int = 1, pos: int = 1) -> int:
    """Bytes that recording `names` over `batch` sequences of `pos` positions keeps, known before anything runs."""
    inner = unwrapped(model)
    return _bytes(inner, kinds(inner.hook_points.resolve(names)), batch, pos, pos)


def widths(dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a number of each kind of point, in a model of this dtype."""
    own, wide = dtype.itemsize, max(4, dtype.itemsize)
    return {"model": own, "stream": wide if dtype == torch.float16 else own, "float32": wide, "int64": 8}


def kinds(points: Iterable[HookPoint]) -> Counter:
    """How many there are of each shape and dtype."""
    return Counter((p.shape, p.dtype) for p in points)


def _bytes(model, kinds: Counter, batch: int, pos: int, keys: int) -> int:
    c, width = model.config, widths(model.dtype)
    sizes = dict(b=batch, s=pos, t=keys, d=c.d_model, H=c.n_heads, K=c.n_kv_heads, h=c.d_head, E=c.n_experts,
                 k=c.experts_per_token, f=c.d_ff, V=c.d_vocab, p=c.d_head // 2) | {"1": 1}  # fmt: skip
    numbers = lambda shape: math.prod(sizes[letter] for letter in shape.split())
    return sum(n * width[dtype] * numbers(shape) for (shape, dtype), n in kinds.items())


class HookedModel(Hooked):
    """What a whole model offers over its hook points; TransformerLens's names and signatures."""

    recordings: tuple[Activations, ...] = ()
    changes = 0  # how often listeners came or went
    hook_points: HookPoints

    @property
    def listened_to(self) -> bool:
        """Is anyone listening to any value, here or through PyTorch's own hooks?"""
        return any(getattr(m, "listeners", None) or pytorch_hooks(m) for m in self.modules())

    def begin(self, cache_id, start: int, batch: int, pos: int, stop_at_layer: int | None) -> None:
        """Before a forward pass: whatever was asked for must be reached, and must fit."""
        if stop_at_layer is not None:
            silent = [p.name for p in self.hook_points.values() if not self._reached(p, stop_at_layer)
                      and p.place[1] in self.get_submodule(p.place[0]).listeners]  # fmt: skip
            if silent:
                names = ", ".join(silent)
                raise ValueError(f"stop_at_layer={stop_at_layer} ends before {names}, which would never fire")
        for acts in self.recordings:
            acts.begin(cache_id, start, pos, alone=len(self.recordings) == 1)
            kept, keys, c = pos if acts._slice is None else len(range(pos)[acts._slice]), start + pos, self.config
            slot, head = c.experts_per_token * max(c.d_ff, c.d_model), c.n_heads * max(c.d_model, c.d_head, keys)
            most = 8 * len(acts.wanted) * batch * kept * max(c.d_vocab, c.n_experts, slot, head)
            if most <= UNASKED:  # which takes less time to know than the sum
                continue
            device, need = acts._device or self.device, _bytes(self, acts.kinds, batch, kept, keys)
            free = free_bytes(device) if need > UNASKED else None
            if free is not None and need > free:
                raise MemoryError(f"recording {len(acts.wanted)} points over {batch} x {pos} positions needs "
                                  f"{need / 2**30:.2f} GiB, {device} has {free / 2**30:.2f} GiB free: record fewer "
                                  "points, fewer positions, or to another device")  # fmt: skip

    def _reached(self, point: HookPoint, stop_at_layer: int) -> bool:
        early = ("hook_tokens", "hook_embed", "rotary_emb.hook_cos", "rotary_emb.hook_sin")
        return point.name in early or (point.layer() is not None and point.layer() < stop_at_layer)

    def run_with_cache(self, tokens, names_filter: Names = None, *, stop_at_layer=None, pos_slice=None, device=None,
                       **forward) -> tuple[Tensor, Activations]:  # fmt: skip
        """Run once and record. Returns (logits, activations).

        A glob or function in `names_filter` means the points before `stop_at_layer`; a full name beyond it raises.
        `names_filter=None` records the cheap default group, "*" every point. Other arguments go to the forward pass.
        """
        names = DEFAULT if names_filter is None else [names_filter] if _is_one(names_filter) else list(names_filter)
        points = self.hook_points.resolve(names)
        stop = self._stop(stop_at_layer)
        if stop is not None and points:
            named = {self.hook_points[one].name for one in names if _is_one(one) and one in self.hook_points}
            points = [p for p in points if self._reached(p, stop) or p.name in named]
            if not points:
                raise ValueError(f"stop_at_layer={stop_at_layer} ends before every point that {names} means")
        with _recorded(self, points, device, pos_slice) as acts:
            logits = self(tokens, stop_at_layer=stop_at_layer, **forward)
        return logits, acts

    def run_with_hooks(self, tokens, fwd_hooks=(), **forward) -> Tensor:
        """Run once with `fn(tensor, hook)` on the named points. Returns the logits."""
        with self.hooks(fwd_hooks):
            return self(tokens, **forward)

    @contextmanager
    def hooks(self, fwd_hooks=()):
        """`with model.hooks([(names, fn), ...]):` Each fn may read its tensor, or change it as in `edit`.

        On a derived point fn may read; returning a value there raises.
        """
        chosen = [(point, fn) for names, fn in fwd_hooks for point in self.hook_points.resolve(names)]
        with listening(self, [Edit(fn, point) for point, fn in chosen]):
            yield self

    def _stop(self, stop_at_layer: int | None) -> int | None:
        n = self.hook_points.n_layers
        if stop_at_layer is None:
            return None
        if not isinstance(stop_at_layer, int) or not -n <= stop_at_layer <= n:
            raise ValueError(f"stop_at_layer = {stop_at_layer!r}: this model has {n} layers, give {-n} to {n}")
        return stop_at_layer % n if stop_at_layer < 0 else stop_at_layer
