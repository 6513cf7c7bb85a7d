"""How does the model tell positions apart, and what do the ways of stretching RoPE to longer texts cost and give?

    extended         the model with its positions stretched in one of five ways
    Planes           wavelength and turns of each rotary plane; which are kept, blended, stretched

The ways, as the YaRN paper compares them (Peng et al. 2023, arXiv 2309.00071). `factor` is the extended length over the
trained one, h is d_head, theta RoPE's base:

    none            every plane as trained: angles never seen in training come beyond the trained length
    interpolation   all planes slowed by the factor (Chen et al. 2023): near tokens come closer than in training
    ntk             the base theta * factor^(h / (h - 2)): the first plane kept, the last slowed by the factor
    by-parts        YaRN's blend of planes without its concentration: by turns within the trained length
    yarn            the same, and q and k multiplied by 0.1 ln(factor) + 1
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config import Config, Yarn
from ..hooks import unwrapped
from ..rope import RotaryEmbedding, blend_ends, frequencies
from .result import Result, frame

WAYS = ("none", "interpolation", "ntk", "by-parts", "yarn")
COLOURS = dict(zip(WAYS, ("#444444", "#E69F00", "#56B4E9", "#009E73", "#D55E00")))  # Okabe and Ito's palette
DASHES = dict(zip(WAYS, (":", "--", "-.", (0, (5, 1)), "-")))


def trained_length(config: Config) -> int:
    """Positions that the model was trained on, before YaRN extended them."""
    return config.yarn.n_ctx_trained if config.yarn else config.n_ctx


def rope(config: Config, way: str, factor: float | None = None) -> RotaryEmbedding:
    """The rotary embedding of a model that reaches `factor` times its trained length in one of WAYS.

    Args:
        factor: None takes that of the config's own YaRN, for which "yarn" is the model as it is.

    Raises:
        ValueError: no such way; a factor below 1, or none given where the config has none above 1.
    """
    if way not in WAYS:
        raise ValueError(f"way = {way!r}: there are {', '.join(WAYS)}")
    factor = factor_of(config, factor)
    trained, own = trained_length(config), config.yarn
    yarn = replace(own or Yarn(factor, trained), factor=factor)
    if own is None or factor != own.factor:
        yarn = replace(yarn, attention_factor=None)  # a checkpoint's own holds for its own factor
    stretched_base = config.rope_theta * factor ** (config.d_head / (config.d_head - 2)) if way == "ntk" else 0
    changes = {
        "none": dict(yarn=None), "interpolation": dict(yarn=None), "ntk": dict(yarn=None, rope_theta=stretched_base),
        "by-parts": dict(yarn=replace(yarn, attention_factor=1.0)), "yarn": dict(yarn=yarn),
    }  # fmt: skip
    n_ctx = max(config.n_ctx, math.ceil(factor * trained))
    embedding = RotaryEmbedding(config.with_(n_ctx=n_ctx, **changes[way]))
    if way == "interpolation":
        embedding.frequencies = embedding.frequencies / factor
    return embedding


def factor_of(config: Config, factor: float | None) -> float:
    if factor is None and (config.yarn is None or config.yarn.factor == 1):
        raise ValueError("factor is not given, and this model's positions are not stretched, so that it has none to "
                         "take: give one, such as factor=4")  # fmt: skip
    factor = config.yarn.factor if factor is None else factor
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor = {factor}: must be at least 1, the extended length over the trained one")
    return float(factor)


def as_loaded(model: nn.Module) -> Config:
    """The model's config, also inside `extended`, which leaves this one alone."""
    return unwrapped(model).rotary_emb.config


@contextmanager
def extended(model: nn.Module, way: str, factor: float | None = None) -> Iterator[nn.Module]:
    """The model with `factor` times its trained positions, reached in one of WAYS; afterwards, in any case, as it was.

    `model.config.n_ctx` grows to hold them. Hooks, also those opened before, work inside; gradients flow. A KVCache
    belongs to one way: make it inside. Of two blocks, one in the other, the inner one counts alone.

    Args:
        factor: None takes that of the model's own YaRN.
    """
    inner = unwrapped(model)
    embedding, other = inner.rotary_emb, rope(as_loaded(model), way, factor)
    config, kept = inner.config, (embedding.frequencies, embedding.concentration)
    try:  # the module stays, and who listens to it: its numbers change
        inner.config = config.with_(**{name: getattr(other.config, name) for name in ("n_ctx", "yarn", "rope_theta")})
        embedding.frequencies, embedding.concentration = other.frequencies, other.concentration
        yield model
    finally:
        inner.config = config
        embedding.frequencies, embedding.concentration = kept


# ------------------------------------------------------------------------------------------ the planes


@dataclass(frozen=True)
class Planes(Result):
    """The d_head/2 planes in which q and k are turned, each at its own speed.

    trained        [p]  radians a token before stretching, float64
    frequency      [p]  radians a token as stretched
    n_ctx_trained  positions in training
    n_ctx          positions after stretching: n_ctx_trained * factor
    factor, way    how it was stretched
    concentration  what q and k are multiplied by
    ends           the planes between which YaRN blends, not rounded; None where nothing is blended
    """

    trained: Tensor
    frequency: Tensor
    n_ctx_trained: int
    n_ctx: int
    factor: float
    way: str
    concentration: float
    ends: tuple[float, float] | None

    @classmethod
    def of(cls, config: Config, *, way: str = "yarn", factor: float | None = None) -> "Planes":
        """Of a config alone: `Planes.of(published("gpt-oss-20b"))`. `way` and `factor` are those of `rope`.

        With neither given, the model as it is.
        """
        if factor is None and way == "yarn":
            factor = config.yarn.factor if config.yarn else 1
        made = rope(config, way, factor)
        factor, length = factor_of(config, factor), trained_length(config)
        ends = blend_ends(made.config) if made.config.yarn else None
        return cls(frequencies(config.with_(yarn=None)), made.frequencies, length, math.ceil(length * factor),
                   factor, way, made.concentration, ends)  # fmt: skip

    @classmethod
    def measure(cls, model: nn.Module, tokens: Tensor | None = None, **about) -> "Planes":
        """Of a model's config; the planes do not depend on what it reads."""
        return cls.of(as_loaded(model), **about)

    @property
    def wavelength(self) -> Tensor:
        """Tokens that one turn takes, as stretched.   [p]"""
        return 2 * math.pi / self.frequency

    @property
    def turns_trained(self) -> Tensor:
        """Turns within the trained length, before stretching: what the model has seen.   [p]"""
        return self.trained * self.n_ctx_trained / (2 * math.pi)

    @property
    def turns(self) -> Tensor:
        """Turns within the extended length, as stretched.   [p]

        A plane that made less than a turn in training meets angles that it never saw where this is more.
        """
        return self.frequency * self.n_ctx / (2 * math.pi)

    @property
    def kept(self) -> Tensor:
        """1: the frequency is the trained one, 0: it is slowed by the whole factor.   [p]"""
        if self.factor == 1:
            return torch.ones_like(self.frequency)
        return ((self.frequency / self.trained - 1 / self.factor) / (1 - 1 / self.factor)).clamp(0, 1)

    @property
    def kind(self) -> tuple[str, ...]:
        """"kept", "blended" or "stretched".   [p]"""
        return tuple("kept" if k > 1 - 1e-9 else "stretched" if k < 1e-9 else "blended" for k in self.kept.tolist())

    def frame(self):
        """A pandas DataFrame: one row a plane."""
        return frame({"plane": torch.arange(len(self.frequency)), "wavelength": self.wavelength, "kept": self.kept,
                      "turns_trained": self.turns_trained, "turns": self.turns, "kind": list(self.kind)})  # fmt: skip

    def plot(self, note: str = ""):
        """Wavelength of each plane, trained and stretched, against the two lengths."""
        from matplotlib.ticker import MaxNLocator

        from ..show.figures import ATTENTION, EXPERTS, PALE, STREAM, _array, _figure

        about = f"{self.way}, factor {self.factor:g}, concentration {self.concentration:.4f}"
        title = "rotary planes: planes that turn often are kept, those that never turned once are stretched"
        with _figure(9, 4.4, title, note) as fig:
            ax = fig.subplots()
            plane = range(len(self.frequency))
            shades = {"kept": "#ffffff", "blended": "#f2f2f2", "stretched": "#e2e2e2"}
            for kind, shade in shades.items():
                at = [p for p in plane if self.kind[p] == kind]
                if at:
                    ax.axvspan(at[0] - 0.5, at[-1] + 0.5, color=shade, lw=0)
                    ax.text((at[0] + at[-1]) / 2, 0.98, f"{kind}\n{at[0]}–{at[-1]}", ha="center", va="top", fontsize=8,
                            transform=ax.get_xaxis_transform())  # fmt: skip
            ax.plot(plane, 2 * math.pi / _array(self.trained), "o", mfc="white", color=ATTENTION, label="as trained")
            ax.plot(plane, _array(self.wavelength), ".", ms=7, color=EXPERTS, label=about)
            for length, name in ((self.n_ctx_trained, "trained"), (self.n_ctx, "extended")):
                ax.axhline(length, color=STREAM if name == "trained" else PALE, lw=1, ls="--")
                ax.text(0, length, f"{name} length {length:,}", va="bottom", fontsize=8)
            ax.set(yscale="log", xlabel="plane", ylabel="wavelength, tokens a turn", xlim=(-0.5, len(plane) - 0.5))
            ax.set_ylim(top=ax.get_ylim()[1] * 4)
            ax.yaxis.set_major_formatter("{x:,.0f}")
            ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
            ax.legend(loc="lower right")
        return fig
