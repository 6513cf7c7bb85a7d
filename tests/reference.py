"""gpt-oss in float64 numpy, one line per equation: the judge of the parity tests.

Written from the published equations alone (openai/gpt-oss `torch/model.py`, arXiv 2508.10925 section 2.2,
YaRN arXiv 2309.00071), not from any code of this package, and itself tested against Hugging Face's
implementation in float64 (`test_reference.py`).

Shapes: s positions, t keys, d d_model, H query heads, K key-value heads, h d_head, E experts,
k experts per token, f d_ff, V vocabulary. No batch axis.

A configuration is a plain dict: n_layers, d_model, n_heads, n_kv_heads, d_head, d_ff, n_experts,
experts_per_token, d_vocab, layer_windows (visible keys, own included, or None; one entry a layer),
rope_theta, yarn_factor (1.0 is plain RoPE), yarn_beta_fast, yarn_beta_slow, yarn_truncate, n_ctx_trained,
swiglu_limit, norm_eps.
"""
import numpy as np

SWIGLU_ALPHA = 1.702  # openai/gpt-oss torch/model.py, swiglu(alpha=1.702)


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; -inf entries get 0."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def yarn_ramp(cfg: dict) -> tuple[float, float]:
    """(low, high): the pairs whose waves turn beta_fast and beta_slow times in n_ctx_trained positions."""
    h, n_ctx, base = cfg["d_head"], cfg["n_ctx_trained"], cfg["rope_theta"]
    low = h / 2 * np.log(n_ctx / (2 * np.pi * cfg["yarn_beta_fast"])) / np.log(base)
    high = h / 2 * np.log(n_ctx / (2 * np.pi * cfg["yarn_beta_slow"])) / np.log(base)
    return (np.floor(low), np.ceil(high)) if cfg["yarn_truncate"] else (low, high)


def rope_frequencies(cfg: dict) -> tuple[np.ndarray, float]:
    """Radians per position of each dimension pair [h/2]; the concentration that multiplies cos and sin."""
    i = np.arange(cfg["d_head"] // 2)
    f = cfg["rope_theta"] ** (2 * i / cfg["d_head"])
    if cfg["yarn_factor"] == 1.0:
        return 1 / f, 1.0
    low, high = yarn_ramp(cfg)
    m = 1 - np.clip((i - low) / (high - low), 0, 1)
    theta = (1 - m) / (cfg["yarn_factor"] * f) + m / f
    return theta, 0.1 * np.log(cfg["yarn_factor"]) + 1


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Turn [s heads h] by tables [s h/2]; dimension i pairs with i + h/2 (half-split)."""
    x1, x2 = np.split(x, 2, axis=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1)


def visible(n_pos: int, window: int | None) -> np.ndarray:
    """Boolean [s t]: query i sees keys j <= i; in a sliding layer the last `window` of them, own included."""
    i, j = np.arange(n_pos)[:, None], np.arange(n_pos)[None, :]
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def clamp(gate: np.ndarray, linear: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """The gate is cut above the limit only, the linear half on both sides."""
    return np.minimum(gate, limit), np.clip(linear, -limit, limit)


def swiglu(gate: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """The expert's activation of its clamped halves [f]: a SwiGLU with the linear half shifted by 1."""
    return gate * sigmoid(SWIGLU_ALPHA * gate) * (linear + 1)


def top_k(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts by falling logit (of equals the lower number first) and the softmax over those, both [s k]."""
    indices = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return indices, softmax(np.take_along_axis(logits, indices, axis=-1))


def norm(x: np.ndarray, gain: np.ndarray, eps: float, acts: dict, name: str) -> np.ndarray:
    """RMSNorm [s d] -> [s d]."""
    scale = acts[f"{name}.hook_scale"] = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    normalized = acts[f"{name}.hook_normalized"] = x / scale
    out = acts[f"{name}.hook_out"] = normalized * gain
    return out


def attention(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, w: dict, cfg: dict, layer: int, acts: dict):
    """What attention adds to the residual [s d], from the normed residual [s d]."""
    H, K, h, s = cfg["n_heads"], cfg["n_kv_heads"], cfg["d_head"], len(x)
    block, name = f"block.{layer}.attn", f"blocks.{layer}.attn"

    qkv = x @ w[f"{block}.qkv.weight"].T + w[f"{block}.qkv.bias"]
    q, k, v = np.split(qkv, [H * h, (H + K) * h], axis=1)
    q, k, v = q.reshape(s, H, h), k.reshape(s, K, h), v.reshape(s, K, h)
    rot_q, rot_k = rotate(q, cos, sin), rotate(k, cos, sin)

    sees = visible(s, cfg["layer_windows"][layer])
    scores, sink_scores = np.empty((H, s, s)), np.empty((H, s))
    pattern, sink_mass = np.empty((H, s, s)), np.empty((H, s))
    z, result = np.empty((s, H, h)), np.empty((s, H, cfg["d_model"]))
    for head in range(H):
        kv = head // (H // K)
        scores[head] = np.where(sees, rot_q[:, head] @ rot_k[:, kv].T / np.sqrt(h), -np.inf)
        sink_scores[head] = w[f"{block}.sinks"][head]
        p = softmax(np.column_stack([scores[head], sink_scores[head]]))
        pattern[head], sink_mass[head] = p[:, :-1], p[:, -1]
        z[:, head] = pattern[head] @ v[:, kv]
        result[:, head] = z[:, head] @ w[f"{block}.out.weight"][:, head * h:(head + 1) * h].T

    acts |= {f"{name}.hook_q": q, f"{name}.hook_k": k, f"{name}.hook_v": v,
             f"{name}.hook_rot_q": rot_q, f"{name}.hook_rot_k": rot_k,
             f"{name}.hook_attn_scores": scores, f"{name}.hook_sink_scores": sink_scores,
             f"{name}.hook_pattern": pattern, f"{name}.hook_sink_mass": sink_mass,
             f"{name}.hook_z": z, f"{name}.hook_result": result}
    return result.sum(axis=1) + w[f"{block}.out.bias"]


def moe(x: np.ndarray, w: dict, cfg: dict, layer: int, acts: dict) -> np.ndarray:
    """What the mixture of experts adds to the residual [s d], from the normed residual [s d]."""
    s, k, f, limit = len(x), cfg["experts_per_token"], cfg["d_ff"], cfg["swiglu_limit"]
    block, name = f"block.{layer}.mlp", f"blocks.{layer}.mlp"

    logits = x @ w[f"{block}.gate.weight"].T + w[f"{block}.gate.bias"]
    indices, weights = top_k(logits, k)

    gate, linear, gate_clamped, linear_clamped, post = (np.empty((s, k, f)) for _ in range(5))
    out = np.empty((s, k, cfg["d_model"]))
    for at in np.ndindex(s, k):  # one position, one of its experts
        e = indices[at]
        y = w[f"{block}.mlp1_weight"][e] @ x[at[0]] + w[f"{block}.mlp1_bias"][e]
        gate[at], linear[at] = y[0::2], y[1::2]
        gate_clamped[at], linear_clamped[at] = clamp(gate[at], linear[at], limit)
        post[at] = swiglu(gate_clamped[at], linear_clamped[at])
        out[at] = w[f"{block}.mlp2_weight"][e] @ post[at] + w[f"{block}.mlp2_bias"][e]

    acts |= {f"{name}.hook_router_logits": logits,
             f"{name}.hook_expert_indices": indices, f"{name}.hook_expert_weights": weights,
             f"{name}.hook_pre": gate, f"{name}.hook_pre_linear": linear,
             f"{name}.hook_pre_clamped": gate_clamped, f"{name}.hook_pre_linear_clamped": linear_clamped,
             f"{name}.hook_post": post, f"{name}.hook_expert_out": out}
    return (weights[:, :, None] * out).sum(axis=1)


def forward(weights: dict, cfg: dict, tokens, *, stop: int | None = None) -> dict[str, np.ndarray]:
    """Every intermediate value of a forward pass, under the package's hook names, without a batch axis.

    Args:
        weights: float64 arrays under the names of OpenAI's checkpoint, `mlp1_weight` [E 2f d] and
            `mlp2_weight` [E d f] dense, rows of mlp1 alternating gate and linear.
        cfg: the sizes (see the top of this file).
        tokens: ids [s].
        stop: run only blocks 0 .. stop - 1, without the final norm and the unembedding.
    """
    w, eps, acts = weights, cfg["norm_eps"], {}
    tokens = np.asarray(tokens)

    theta, concentration = rope_frequencies(cfg)
    angle = np.arange(len(tokens))[:, None] * theta
    cos = acts["rotary_emb.hook_cos"] = concentration * np.cos(angle)
    sin = acts["rotary_emb.hook_sin"] = concentration * np.sin(angle)

    x = acts["hook_embed"] = w["embedding.weight"][tokens]
    for layer in range(cfg["n_layers"] if stop is None else stop):
        block, name = f"block.{layer}", f"blocks.{layer}"
        acts[f"{name}.hook_resid_pre"] = x
        t = norm(x, w[f"{block}.attn.norm.scale"], eps, acts, f"{name}.ln1")
        attn_out = acts[f"{name}.hook_attn_out"] = attention(t, cos, sin, w, cfg, layer, acts)
        x = acts[f"{name}.hook_resid_mid"] = x + attn_out
        t = norm(x, w[f"{block}.mlp.norm.scale"], eps, acts, f"{name}.ln2")
        mlp_out = acts[f"{name}.hook_mlp_out"] = moe(t, w, cfg, layer, acts)
        x = acts[f"{name}.hook_resid_post"] = x + mlp_out
    if stop is None:
        t = norm(x, w["norm.scale"], eps, acts, "ln_final")
        acts["unembed.hook_out"] = t @ w["unembedding.weight"].T
    return acts


def random_config(rng: np.random.Generator) -> dict:
    """Sizes unlike any preset, so that no two axes that could be confused have the same length by rule.

    Sliding layers share one window, as in gpt-oss; which layers slide is drawn. With YaRN on,
    1 <= low < high < h/2 - 1, also after `truncate`.
    """
    n_layers, n_kv_heads = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    window = int(rng.integers(1, 33))
    cfg = dict(
        n_layers=n_layers,
        d_model=int(rng.integers(20, 65)),
        n_heads=n_kv_heads * int(rng.integers(1, 5)),
        n_kv_heads=n_kv_heads,
        d_head=2 * int(rng.integers(4, 17)),
        d_ff=2 * int(rng.integers(8, 32)) + 1,
        n_experts=int(rng.integers(4, 13)),
        experts_per_token=int(rng.integers(1, 5)),
        d_vocab=int(rng.integers(40, 200)),
        layer_windows=[window if slides else None for slides in rng.random(n_layers) < 0.6],
        rope_theta=float(10 ** rng.uniform(2, 6)),
        yarn_factor=1.0,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_truncate=bool(rng.integers(2)),
        n_ctx_trained=4096,
        swiglu_limit=float(rng.uniform(0.5, 7)),
        norm_eps=float(10 ** rng.uniform(-6, -2)),
    )
    if cfg["d_ff"] == cfg["d_model"]:
        cfg["d_ff"] += 2
    yarn_on = rng.random() < 0.7
    while yarn_on:
        cfg["yarn_factor"] = float(rng.integers(2, 65))
        cfg["yarn_beta_fast"] = float(rng.uniform(2, 40))
        cfg["yarn_beta_slow"] = float(rng.uniform(0.3, 2))
        cfg["n_ctx_trained"] = int(2 ** rng.uniform(5, 13))
        low, high = yarn_ramp(cfg)
        if 1 <= low < high < cfg["d_head"] / 2 - 1:
            break
        cfg["rope_theta"] = float(10 ** rng.uniform(2, 6))
    return cfg


def random_weights(cfg: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights that exercise every equation: no sink, bias or gain is trivial and the SwiGLU clamp is reached.

    Every value is one that bfloat16 holds, so no dtype of a model under test rounds a weight.
    """
    d, H, K, h = cfg["d_model"], cfg["n_heads"], cfg["n_kv_heads"], cfg["d_head"]
    E, f, V = cfg["n_experts"], cfg["d_ff"], cfg["d_vocab"]

    def normal(mean: float, std: float, *shape: int) -> np.ndarray:
        x = rng.normal(mean, std, shape).astype(np.float32)
        return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)

    pre = cfg["swiglu_limit"] / 1.7  # std of gate and linear: about 4 % of either lie beyond one limit
    w = {"embedding.weight": normal(0, 1, V, d)}
    for n in range(cfg["n_layers"]):
        w |= {
            f"block.{n}.attn.norm.scale": normal(1, 0.3, d),
            f"block.{n}.attn.qkv.weight": normal(0, 1.2 / d**0.5, (H + 2 * K) * h, d),
            f"block.{n}.attn.qkv.bias": normal(0, 0.5, (H + 2 * K) * h),
            f"block.{n}.attn.sinks": normal(2, 2, H),
            f"block.{n}.attn.out.weight": normal(0, 1.5 / (H * h) ** 0.5, d, H * h),
            f"block.{n}.attn.out.bias": normal(0, 0.3, d),
            f"block.{n}.mlp.norm.scale": normal(1, 0.3, d),
            f"block.{n}.mlp.gate.weight": normal(0, 1.5 / d**0.5, E, d),
            f"block.{n}.mlp.gate.bias": normal(0, 0.5, E),
            f"block.{n}.mlp.mlp1_weight": normal(0, 0.9 * pre / d**0.5, E, 2 * f, d),
            f"block.{n}.mlp.mlp1_bias": normal(0, 0.3 * pre, E, 2 * f),
            f"block.{n}.mlp.mlp2_weight": normal(0, 1 / (f**0.5 * (0.5 + pre**2 / 2)), E, d, f),
            f"block.{n}.mlp.mlp2_bias": normal(0, 0.5, E, d),
        }
    return w | {"norm.scale": normal(1, 0.3, d), "unembedding.weight": normal(0, 2 / d**0.5, V, d)}
