"""Lesson 14: its specifications give the probes' numbers; a fold of value biases is exact only without sinks."""
import torch
from models import random_model, random_tokens, tiny_config

import gptoss_lab as lab
from gptoss_lab.exercises.lesson_14 import by_head, lens, parts
from gptoss_lab.probes.attribution import Attribution
from gptoss_lab.probes.lens import read_out

CONFIG = tiny_config(n_layers=2)


@torch.no_grad()
def recorded():
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 1, 6)
    _, acts = model.run_with_cache(tokens, "*")
    return model, tokens, acts


def test_the_lens_that_is_asked_for_is_the_probes():
    model, _, acts = recorded()
    x = acts["resid_mid", 1][0]
    ours = lens(x, model.ln_final.weight, model.unembed.weight, CONFIG.norm_eps)
    torch.testing.assert_close(ours, read_out(model, x))


def test_the_parts_of_embedding_attention_and_experts_are_the_probes_and_sum_to_the_logit():
    model, tokens, acts = recorded()
    shares = Attribution.measure(model, tokens, answer=torch.tensor([7]))
    writes = [acts["hook_embed"], *(acts[point, i] for i in range(2) for point in ("attn_out", "mlp_out"))]
    ours = parts(torch.stack([x[0, -1] for x in writes]), model.ln_final.weight,
                 acts["ln_final.hook_scale"][0, -1].item(), model.unembed.weight[7])  # fmt: skip
    torch.testing.assert_close(ours, torch.cat([shares.embed, shares.by_layer().flatten()]))
    torch.testing.assert_close(ours.sum(), acts["hook_logits"][0, -1, 7])


def test_a_heads_share_is_the_probes_head_and_sink_together():
    model, tokens, acts = recorded()
    shares = Attribution.measure(model, tokens, answer=torch.tensor([7]))
    direction = model.unembed.weight[7] * model.ln_final.weight / acts["ln_final.hook_scale"][0, -1]
    ours = by_head(acts["z", 1][0, -1], model.blocks[1].attn.out.weight, direction)
    torch.testing.assert_close(ours, (shares.head + shares.sink)[1, 0])


@torch.no_grad()
def test_moving_value_biases_into_the_output_bias_is_exact_without_sinks_and_another_model_with_them():
    model, tokens = random_model(CONFIG), random_tokens(CONFIG, 1, 6)
    folded = {}
    for i, block in enumerate(model.blocks):
        bias = block.attn.qkv.bias[-CONFIG.n_kv_heads * CONFIG.d_head :].view(CONFIG.n_kv_heads, -1)
        folded[("v", i)] = bias.neg().add
        folded[("attn_out", i)] = (block.attn.out.weight @ bias.repeat_interleave(CONFIG.n_groups, 0).flatten()).add
    changes = {}
    for sinks, rest in (("with", {}), ("without", {"*.hook_sink_scores": lambda x: torch.full_like(x, -torch.inf)})):
        with lab.edit(model, rest):
            before = model(tokens)
            with lab.edit(model, folded):
                changes[sinks] = (model(tokens) - before).abs().max()
    assert changes["with"] > 0.1 and changes["without"] < 1e-10
