"""The sizes of a gpt-oss model, read from either published config.json."""
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# <|return|>, <|endoftext|>, <|call|>: generation_config.json of both published models
O200K_STOPS = (200_002, 199_999, 200_012)
SLIDING, FULL = "sliding_attention", "full_attention"


class ConfigError(ValueError):
    """A config.json that does not describe one gpt-oss model. The message lists every fault found."""


@dataclass(frozen=True)
class Yarn:
    """Context extension by YaRN (Peng et al. 2023, arXiv 2309.00071): n_ctx_trained * factor positions.

    Planes that turn more than `beta_fast` times within n_ctx_trained keep their frequency, planes that turn
    less than `beta_slow` times are slowed by `factor`, those between are blended. With `truncate` the ends of
    the blend are rounded to whole planes; the published models do not round.
    """

    factor: float
    n_ctx_trained: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False
    attention_factor: float | None = None

    @property
    def concentration(self) -> float:
        """What cos and sin, and so q and k, are multiplied by: 0.1 ln(factor) + 1 (YaRN, eq. 22)."""
        return self.attention_factor or (0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0)


@dataclass(frozen=True)
class Config:
    """Every number that the forward pass depends on. Field names are those of the interpretability literature.

    `layer_types` holds "sliding_attention" or "full_attention" for each layer; a sliding layer's query sees
    `sliding_window` keys, its own included. `yarn` is None where RoPE is not extended.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    n_experts: int
    experts_per_token: int
    d_vocab: int
    n_ctx: int
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_theta: float = 150_000.0
    yarn: Yarn | None = None
    swiglu_limit: float = 7.0  # gpt-oss ModelConfig.swiglu_limit
    swiglu_alpha: float = 1.702  # gpt_oss/torch/model.py: swiglu(x, alpha=1.702)
    norm_eps: float = 1e-5
    stop_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    def __post_init__(self):
        faults = _faults(self)
        if faults:
            raise ConfigError("this is not a gpt-oss model:\n  " + "\n  ".join(faults))

    def window(self, layer: int) -> int | None:
        """Keys that a query of `layer` sees, its own included; None where it sees all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    @property
    def n_groups(self) -> int:
        """Query heads that read one key head."""
        return self.n_heads // self.n_kv_heads

    def with_(self, **changes) -> "Config":
        """A copy with some sizes changed, checked again."""
        return replace(self, **changes)


def _faults(c: Config) -> list[str]:
    whole = "n_layers d_model n_heads n_kv_heads d_head d_ff n_experts experts_per_token d_vocab n_ctx".split()
    faults = [f"{name} = {getattr(c, name)!r}: must be a whole number of at least 1" for name in whole
              if not _is_int(getattr(c, name)) or getattr(c, name) < 1]  # fmt: skip
    for name in "rope_theta swiglu_limit swiglu_alpha norm_eps".split():
        value = getattr(c, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            faults.append(f"{name} = {value!r}: must be a positive number")
    if not _is_int(c.sliding_window) or c.sliding_window < (SLIDING in c.layer_types):
        faults.append(f"sliding_window = {c.sliding_window!r}: must be at least 1, the query's own key")
    if unknown := set(c.layer_types) - {SLIDING, FULL}:
        faults.append(f"layer_types holds {sorted(unknown)}: only {SLIDING!r} and {FULL!r} exist")
    if faults:
        return faults
    if len(c.layer_types) != c.n_layers:
        faults.append(f"layer_types names {len(c.layer_types)} layers, but n_layers = {c.n_layers}")
    if c.n_heads % c.n_kv_heads:
        faults.append(f"n_heads = {c.n_heads} is no multiple of n_kv_heads = {c.n_kv_heads}")
    if c.d_head % 2:
        faults.append(f"d_head = {c.d_head}: must be even, RoPE turns pairs")
    if c.experts_per_token > c.n_experts:
        faults.append(f"experts_per_token = {c.experts_per_token}, but there are {c.n_experts} experts")
    for token in (*c.stop_tokens, *(() if c.pad_token is None else (c.pad_token,))):
        if not _is_int(token) or not 0 <= token < c.d_vocab:
            faults.append(f"stop or pad token {token!r} is not in the vocabulary of {c.d_vocab}")
    return faults + (_yarn_faults(c) if c.yarn else [])


def _yarn_faults(c: Config) -> list[str]:
    y = c.yarn
    numbers = {"factor": y.factor, "n_ctx_trained": y.n_ctx_trained, "beta_fast": y.beta_fast, "beta_slow": y.beta_slow}
    faults = [f"yarn {name} = {value!r}: must be a positive number" for name, value in numbers.items()
              if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf]  # fmt: skip
    if faults:
        return faults
    if y.factor < 1:
        faults.append(f"yarn factor = {y.factor}: must be at least 1")
    if y.beta_fast <= y.beta_slow:
        faults.append(f"yarn beta_fast = {y.beta_fast} must be above beta_slow = {y.beta_slow}")
    return faults


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------ config.json

_SIZES = {  # ours: (Hugging Face, original)
    "n_layers": ("num_hidden_layers", "num_hidden_layers"),
    "d_model": ("hidden_size", "hidden_size"),
    "n_heads": ("num_attention_heads", "num_attention_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_key_value_heads"),
    "d_head": ("head_dim", "head_dim"),
    "d_ff": ("intermediate_size", "intermediate_size"),
    "n_experts": ("num_local_experts", "num_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token"),
    "d_vocab": ("vocab_size", "vocab_size"),
    "sliding_window": ("sliding_window", "sliding_window"),
}
_ORIGINAL_ONLY = {"rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta"}
_HF_OTHER = set(  # read below, or known to change nothing in the forward pass
    "max_position_embeddings rope_scaling rope_parameters rope_theta swiglu_limit swiglu_alpha rms_norm_eps layer_types"
    " initial_context_length experts_per_token num_experts eos_token_id pad_token_id bos_token_id model_type"
    " quantization_config attention_bias tie_word_embeddings hidden_act"
    " architectures attention_dropout initializer_range output_router_logits router_aux_loss_coef use_cache dtype"
    " torch_dtype transformers_version return_dict output_hidden_states output_attentions auto_map"
    " id2label label2id problem_type is_encoder_decoder chunk_size_feed_forward".split()
)
_TOKENS = ("eos_token_id", "pad_token_id")
_NUMBERS = {name for names in _SIZES.values() for name in names} | _ORIGINAL_ONLY | set(
    "max_position_embeddings initial_context_length rope_theta swiglu_limit swiglu_alpha rms_norm_eps factor beta_fast"
    " beta_slow original_max_position_embeddings attention_factor".split()
)  # fmt: skip
_YARN_KEYS = {"rope_type", "type", "rope_theta", "factor", "beta_fast", "beta_slow", "truncate",
              "original_max_position_embeddings", "attention_factor"}  # fmt: skip


def read_config(folder: str | Path) -> Config:
    """The Config of a checkpoint folder: its config.json, and generation_config.json where there is one.

    Raises:
        FileNotFoundError: no config.json in the folder.
        ConfigError: a size is missing, unknown, negative or contradicts another; all faults are listed.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        inside = Path(folder) / "model"  # where `train-tiny` puts it
        mend = f": did you mean {inside}?" if (inside / "config.json").is_file() else \
            ": a checkpoint folder holds one beside its safetensors"  # fmt: skip
        raise FileNotFoundError(f"{path} does not exist{mend}")
    generation = path.with_name("generation_config.json")
    stops = _read_object(generation) if generation.is_file() else {}
    return parse_config(_read_object(path), {k: stops[k] for k in _TOKENS if stops.get(k) is not None})


def _read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object with names")
    return content


def parse_config(raw: dict, generation: dict | None = None) -> Config:
    """A Config from the content of either published config.json (OpenAI's has no `model_type`)."""
    parse = _parse_hf if "model_type" in raw or "num_local_experts" in raw else _parse_original
    raw = raw | (generation or {})
    faults = _type_faults(raw)
    fields = parse(raw, faults) if not faults else {}
    if faults:
        raise ConfigError("config.json:\n  " + "\n  ".join(faults))
    if fields["d_vocab"] == 201_088 and not fields["stop_tokens"]:  # original/ has no generation_config.json
        fields["stop_tokens"] = O200K_STOPS
    return Config(**fields)


def _type_faults(raw: dict) -> list[str]:
    """Values that are no number, list or object where one belongs: whatever reads them may then rely on that."""
    ropes = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name) is not None}
    faults = [f"{name} = {rope!r}: must be an object" for name, rope in ropes.items() if not isinstance(rope, dict)]
    for where, values in (("", raw), *((f"{name}.", rope) for name, rope in ropes.items() if isinstance(rope, dict))):
        faults += [f"{where}{name} = {value!r}: must be a number" for name, value in values.items()
                   if name in _NUMBERS and value is not None and not _is_number(value)]  # fmt: skip
    for name, kind in (("layer_types", str), ("eos_token_id", int)):
        items = raw.get(name)
        if isinstance(items, list) and not all(isinstance(item, kind) for item in items):
            faults.append(f"{name} = {items!r}: must be a list of {kind.__name__}")
    if not isinstance(raw.get("layer_types") or [], list):
        faults.append(f"layer_types = {raw['layer_types']!r}: must be a list")
    return faults


def _is_number(value) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _sizes(raw: dict, column: int, known: set[str], faults: list[str]) -> dict:
    names = {ours: names[column] for ours, names in _SIZES.items()}
    for ours, name in names.items():
        if raw.get(name) is None:
            faults.append(f"{name} is missing ({ours})")
    for name in sorted(set(raw) - known - set(names.values())):
        if not isinstance(raw[name], str | None):  # a word cannot be a size
            faults.append(f"{name} = {raw[name]!r} is not a setting of gpt-oss; if it changes nothing, remove it")
    return {ours: raw.get(name) for ours, name in names.items()}


def _parse_original(raw: dict, faults: list[str]) -> dict:
    known = _ORIGINAL_ONLY | {"initial_context_length", "rope_theta", "swiglu_limit"}
    known |= {"eos_token_id", "pad_token_id"}
    fields = _sizes(raw, 1, known, faults)
    for name in sorted(known - {"eos_token_id", "pad_token_id"}):
        if raw.get(name) is None:
            faults.append(f"{name} is missing")
    if faults:
        return fields
    factor, trained = raw["rope_scaling_factor"], raw["initial_context_length"]
    yarn = Yarn(factor, trained, beta_fast=raw["rope_ntk_beta"], beta_slow=raw["rope_ntk_alpha"])
    # gpt_oss/torch/model.py: `sliding_window if layer_idx % 2 == 0 else 0`, and 0 means no window.
    kinds = (SLIDING if fields["sliding_window"] else FULL, FULL)
    layers = fields["n_layers"] if _is_int(fields["n_layers"]) else 0
    return fields | dict(
        layer_types=tuple(kinds[i % 2] for i in range(layers)), n_ctx=int(trained * factor),
        rope_theta=raw["rope_theta"], yarn=yarn if factor != 1 else None, swiglu_limit=raw["swiglu_limit"],
        stop_tokens=_as_tuple(raw.get("eos_token_id")), pad_token=raw.get("pad_token_id"),
    )  # fmt: skip


def _parse_hf(raw: dict, faults: list[str]) -> dict:
    fields = _sizes(raw, 0, _HF_OTHER, faults)
    if raw.get("model_type", "gpt_oss") != "gpt_oss":
        faults.append(f"model_type = {raw['model_type']!r}: only 'gpt_oss' is read here")
    for name, wanted in (("attention_bias", True), ("tie_word_embeddings", False), ("hidden_act", "silu")):
        if raw.get(name, wanted) != wanted:
            faults.append(f"{name} = {raw[name]!r}: gpt-oss has {name} = {wanted!r}")
    for other, main in (("experts_per_token", "num_experts_per_tok"), ("num_experts", "num_local_experts")):
        if None not in (raw.get(other), raw.get(main)) and raw[other] != raw[main]:
            faults.append(f"{other} = {raw[other]} contradicts {main} = {raw[main]}")
    layers = fields["n_layers"] if _is_int(fields["n_layers"]) else 0
    types = raw.get("layer_types") or [SLIDING if i % 2 == 0 else FULL for i in range(layers)]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = {name: r["rope_theta"] for name, r in (("rope_theta", raw), ("rope_parameters.rope_theta", rope))
             if r.get("rope_theta") is not None}  # fmt: skip
    if not theta:
        faults.append("rope_theta is missing")
    if len(set(theta.values())) > 1:
        faults.append(f"rope_theta contradicts itself: {theta}")
    yarn = _parse_hf_yarn(raw, rope, faults)
    trained = yarn.n_ctx_trained * yarn.factor if yarn else None
    n_ctx = raw.get("max_position_embeddings", trained)
    if n_ctx is None:
        faults.append("max_position_embeddings is missing (n_ctx)")
    return fields | dict(
        layer_types=tuple(types), n_ctx=n_ctx, rope_theta=next(iter(theta.values()), None), yarn=yarn,
        swiglu_limit=raw.get("swiglu_limit", 7.0), swiglu_alpha=raw.get("swiglu_alpha", 1.702),
        norm_eps=raw.get("rms_norm_eps", 1e-5), stop_tokens=_as_tuple(raw.get("eos_token_id")),
        pad_token=raw.get("pad_token_id"),
    )  # fmt: skip


def _parse_hf_yarn(raw: dict, rope: dict, faults: list[str]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("yarn", "default"):
        faults.append(f"rope_type = {kind!r}: only 'yarn' and 'default' are implemented")
    if kind != "yarn":
        return None
    if unknown := sorted(set(rope) - _YARN_KEYS):
        faults.append(f"rope_parameters holds {unknown}, which this RoPE does not know")
    trained = rope.get("original_max_position_embeddings", raw.get("initial_context_length"))
    initial = raw.get("initial_context_length")
    if None not in (trained, initial) and initial != trained:
        faults.append(f"initial_context_length = {initial} contradicts original_max_position_embeddings = {trained}")
    if trained is None or rope.get("factor") is None:
        faults.append("yarn needs factor and original_max_position_embeddings in rope_parameters")
        return None
    return Yarn(rope["factor"], trained, rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0,
                bool(rope.get("truncate", True)), rope.get("attention_factor"))  # fmt: skip


def _as_tuple(tokens) -> tuple[int, ...]:
    return () if tokens is None else tuple(tokens) if isinstance(tokens, list | tuple) else (tokens,)


def to_hf(c: Config) -> dict:
    """The content of a Hugging Face config.json that describes the same model."""
    rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if c.yarn:
        y = asdict(c.yarn)
        rope |= {"rope_type": "yarn", "original_max_position_embeddings": y.pop("n_ctx_trained")}
        rope |= {name: value for name, value in y.items() if value is not None}
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "hidden_act": "silu",
        "attention_dropout": 0.0, "tie_word_embeddings": False, "max_position_embeddings": c.n_ctx,
        "layer_types": list(c.layer_types), "rope_parameters": rope, "rms_norm_eps": c.norm_eps,
        "swiglu_limit": c.swiglu_limit, "swiglu_alpha": c.swiglu_alpha,
        "eos_token_id": list(c.stop_tokens) or None, "pad_token_id": c.pad_token,
    } | {hf: getattr(c, ours) for ours, (hf, _) in _SIZES.items()}  # fmt: skip


def to_original(c: Config) -> dict:
    """The content of OpenAI's config.json, or ConfigError where that format cannot say it."""
    yarn = c.yarn or Yarn(1.0, c.n_ctx)
    content = {original: getattr(c, ours) for ours, (_, original) in _SIZES.items()} | {
        "swiglu_limit": c.swiglu_limit, "initial_context_length": yarn.n_ctx_trained, "rope_theta": c.rope_theta,
        "rope_scaling_factor": yarn.factor, "rope_ntk_alpha": yarn.beta_slow, "rope_ntk_beta": yarn.beta_fast,
    }  # fmt: skip
    again = parse_config(content)
    if c.yarn and c.yarn.factor == 1:  # as if there were none
        again = again.with_(yarn=c.yarn)
    for name in ("layer_types", "n_ctx", "yarn", "norm_eps", "swiglu_alpha"):
        if getattr(again, name) != getattr(c, name):
            raise ConfigError(f"OpenAI's config.json has no field for {name} = {getattr(c, name)!r}; "
                              f"it would be read as {getattr(again, name)!r}. Use another layout.")  # fmt: skip
    return content


def published(name: str) -> Config:
    """The Config of "gpt-oss-20b" or "gpt-oss-120b" (openai/gpt-oss model card, arXiv 2508.10925, table 1)."""
    sizes = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}
    if name not in sizes:
        raise KeyError(f"no published model {name!r}: there are {sorted(sizes)}")
    n_layers, n_experts = sizes[name]
    return Config(
        n_layers=n_layers, n_experts=n_experts, d_model=2880, n_heads=64, n_kv_heads=8, d_head=64, d_ff=2880,
        experts_per_token=4, d_vocab=201_088, n_ctx=131_072, sliding_window=128,
        layer_types=(SLIDING, FULL) * (n_layers // 2), yarn=Yarn(32.0, 4096),
        stop_tokens=O200K_STOPS, pad_token=199_999,
    )  # fmt: skip


# The tiny model: small enough for any CPU, with every part of the architecture in play. The window is far smaller
# than the context, four query heads read two key heads. YaRN is defined and its factor is 1: the model was trained
# on 128 positions and never on more; `probes.yarn.extended` goes beyond them.
TINY = Config(
    n_layers=4, d_model=96, n_heads=4, n_kv_heads=2, d_head=32, d_ff=64, n_experts=16, experts_per_token=4,
    d_vocab=512, n_ctx=128, sliding_window=16, layer_types=(SLIDING, FULL) * 2, rope_theta=1000.0,
    yarn=Yarn(1.0, 128, beta_fast=8.0), stop_tokens=(504, 510),
)  # fmt: skip
