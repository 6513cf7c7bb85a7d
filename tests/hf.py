"""Hugging Face's gpt-oss with the weights of `reference.py`; its activations under the package's names."""
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding


@contextmanager
def float32_means_float64():
    """Run Hugging Face's own lines wholly in float64.

    Norms and rotary tables say `.to(torch.float32)` or `.float()` whatever the dtype of the model; inside
    this block both mean float64.
    """
    with (mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
          mock.patch.object(torch.Tensor, "float", torch.Tensor.double)):
        yield


def _precision(dtype: torch.dtype):
    return float32_means_float64() if dtype == torch.float64 else nullcontext()


def hf_config(cfg: dict) -> GptOssConfig:
    """The Hugging Face configuration of a `reference.py` configuration.

    Raises:
        ValueError: if layers slide by different windows, which Hugging Face cannot express.
    """
    windows = sorted({window for window in cfg["layer_windows"] if window is not None})
    if len(windows) > 1:
        raise ValueError(f"layer_windows has windows {windows}; Hugging Face has one sliding_window a model")
    rope = {"rope_type": "default", "rope_theta": cfg["rope_theta"]}
    if cfg["yarn_factor"] != 1.0:
        rope |= {"rope_type": "yarn", "factor": cfg["yarn_factor"], "truncate": cfg["yarn_truncate"],
                 "beta_fast": cfg["yarn_beta_fast"], "beta_slow": cfg["yarn_beta_slow"],
                 "original_max_position_embeddings": cfg["n_ctx_trained"]}
    return GptOssConfig(
        num_hidden_layers=cfg["n_layers"],
        hidden_size=cfg["d_model"],
        num_attention_heads=cfg["n_heads"],
        num_key_value_heads=cfg["n_kv_heads"],
        head_dim=cfg["d_head"],
        intermediate_size=cfg["d_ff"],
        num_local_experts=cfg["n_experts"],
        num_experts_per_tok=cfg["experts_per_token"],
        vocab_size=cfg["d_vocab"],
        layer_types=["full_attention" if w is None else "sliding_attention" for w in cfg["layer_windows"]],
        sliding_window=windows[0] if windows else 1,  # without sliding layers unused, but None is refused
        rope_parameters=rope,
        max_position_embeddings=int(cfg["yarn_factor"] * cfg["n_ctx_trained"]),
        swiglu_limit=cfg["swiglu_limit"],
        rms_norm_eps=cfg["norm_eps"],
        attn_implementation="eager",
        experts_implementation="eager",
    )


def hf_model(weights: dict, cfg: dict, dtype: torch.dtype = torch.float32) -> GptOssForCausalLM:
    """`GptOssForCausalLM` with eager attention and experts, carrying the weights of `reference.forward`.

    With `dtype=torch.float64` its rotary frequencies are float64 too (Hugging Face's are float32).
    """
    config = hf_config(cfg)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = GptOssForCausalLM(config)
    state = {name: torch.tensor(w, dtype=dtype) for name, w in hf_names(weights, cfg).items()}
    model.load_state_dict(state, strict=True, assign=True)
    # The first threaded torch.cos of a process is now and then off by 1e-4 (1e-9 in float64): let it be this.
    torch.zeros(1, dtype=dtype).cos()
    with _precision(dtype):
        model.model.rotary_emb = GptOssRotaryEmbedding(config)
    return model.eval()


def hf_names(weights: dict, cfg: dict) -> dict:
    """The same arrays under Hugging Face's names: qkv in three, experts transposed to [E in out]."""
    H, K, h = cfg["n_heads"], cfg["n_kv_heads"], cfg["d_head"]
    named = {"model.embed_tokens.weight": weights["embedding.weight"],
             "model.norm.weight": weights["norm.scale"],
             "lm_head.weight": weights["unembedding.weight"]}
    for n in range(cfg["n_layers"]):
        attn, mlp, layer = f"block.{n}.attn", f"block.{n}.mlp", f"model.layers.{n}"
        for kind in ("weight", "bias"):
            qkv = weights[f"{attn}.qkv.{kind}"]
            named |= {f"{layer}.self_attn.q_proj.{kind}": qkv[:H * h],
                      f"{layer}.self_attn.k_proj.{kind}": qkv[H * h:(H + K) * h],
                      f"{layer}.self_attn.v_proj.{kind}": qkv[(H + K) * h:],
                      f"{layer}.self_attn.o_proj.{kind}": weights[f"{attn}.out.{kind}"],
                      f"{layer}.mlp.router.{kind}": weights[f"{mlp}.gate.{kind}"]}
        named |= {f"{layer}.input_layernorm.weight": weights[f"{attn}.norm.scale"],
                  f"{layer}.self_attn.sinks": weights[f"{attn}.sinks"],
                  f"{layer}.post_attention_layernorm.weight": weights[f"{mlp}.norm.scale"],
                  f"{layer}.mlp.experts.gate_up_proj": weights[f"{mlp}.mlp1_weight"].swapaxes(1, 2),
                  f"{layer}.mlp.experts.gate_up_proj_bias": weights[f"{mlp}.mlp1_bias"],
                  f"{layer}.mlp.experts.down_proj": weights[f"{mlp}.mlp2_weight"].swapaxes(1, 2),
                  f"{layer}.mlp.experts.down_proj_bias": weights[f"{mlp}.mlp2_bias"]}
    return named


@torch.no_grad()
def hf_activations(model: GptOssForCausalLM, tokens, attention_mask=None) -> dict[str, torch.Tensor]:
    """What module hooks can see of a Hugging Face forward, under the package's names, batch first.

    A float64 model runs in float64 throughout.

    Args:
        model: from `hf_model`.
        tokens: ids [s] or [b s].
        attention_mask: [b s], 1 for a token and 0 for padding on either side. Positions count tokens only,
            as in `generate`; rows of padding hold no meaning.

    Returns:
        Tensors without a graph. Norm scales, rotated queries and keys, scores, per-head results and all
        that is inside an expert are not among them: no module returns them.
    """
    tokens = torch.atleast_2d(torch.as_tensor(tokens))
    b, s = tokens.shape
    h = model.config.head_dim
    position_ids = None
    if attention_mask is not None:
        attention_mask = torch.as_tensor(attention_mask)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)

    acts, handles = {}, []

    def on_input(module: torch.nn.Module, named) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, args: acts.update(named(args[0]))))

    def on_output(module: torch.nn.Module, named) -> None:
        handles.append(module.register_forward_hook(lambda _, args, out: acts.update(named(out))))

    def listen_to_block(name: str, block: torch.nn.Module) -> None:
        attn = block.self_attn
        on_input(block, lambda x: {f"{name}.hook_resid_pre": x})
        on_output(block.input_layernorm, lambda x: {f"{name}.ln1.hook_out": x})
        on_output(attn.q_proj, lambda x: {f"{name}.attn.hook_q": x.view(b, s, -1, h)})
        on_output(attn.k_proj, lambda x: {f"{name}.attn.hook_k": x.view(b, s, -1, h)})
        on_output(attn.v_proj, lambda x: {f"{name}.attn.hook_v": x.view(b, s, -1, h)})
        on_input(attn.o_proj, lambda x: {f"{name}.attn.hook_z": x.view(b, s, -1, h)})
        on_output(attn, lambda out: {f"{name}.hook_attn_out": out[0], f"{name}.attn.hook_pattern": out[1]})
        on_input(block.post_attention_layernorm, lambda x: {f"{name}.hook_resid_mid": x})
        on_output(block.post_attention_layernorm, lambda x: {f"{name}.ln2.hook_out": x})
        on_output(block.mlp.router, lambda out: {f"{name}.mlp.hook_router_logits": out[0].view(b, s, -1),
                                                 f"{name}.mlp.hook_expert_weights": out[1].view(b, s, -1),
                                                 f"{name}.mlp.hook_expert_indices": out[2].view(b, s, -1)})
        on_output(block.mlp, lambda out: {f"{name}.hook_mlp_out": out[0]})
        on_output(block, lambda x: {f"{name}.hook_resid_post": x})

    on_output(model.model.embed_tokens, lambda x: {"hook_embed": x})
    on_output(model.model.rotary_emb,
              lambda out: {"rotary_emb.hook_cos": out[0], "rotary_emb.hook_sin": out[1]})
    for layer, block in enumerate(model.model.layers):
        listen_to_block(f"blocks.{layer}", block)
    on_output(model.model.norm, lambda x: {"ln_final.hook_out": x})
    on_output(model.lm_head, lambda x: {"unembed.hook_out": x})
    try:
        with _precision(model.dtype):
            model(tokens, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return acts
