"""Each plausible mistake in the forward pass, made on purpose: the comparison with the float64 loop must see it."""
import functools

import numpy as np
import pytest
import reference
import torch
from parity import gap, mutant, our_model

MODEL, ROPE, FAST, CACHE, CONFIG, PACK = ("model.py", "rope.py", "fast/__init__.py", "kv_cache.py", "config.py",
                                          "mxfp4.py")  # fmt: skip
MISTAKES = {
    # facts known to go wrong in public implementations
    "RoPE turns neighbours instead of halves": (ROPE, "x.chunk(2, dim=-1)", "(x[..., 0::2], x[..., 1::2])"),
    "RoPE turns the other way": (ROPE, "first * cos - second * sin, second * cos + first * sin",
                                 "first * cos + second * sin, second * cos - first * sin"),
    "no YaRN": (ROPE, "return kept * (1 - slowed) + kept / config.yarn.factor * slowed", "return kept"),
    "position interpolation instead of YaRN": (
        ROPE, "return kept * (1 - slowed) + kept / config.yarn.factor * slowed", "return kept / config.yarn.factor"),
    "YaRN's blend reversed": (ROPE, "kept * (1 - slowed) + kept / config.yarn.factor * slowed",
                              "kept * slowed + kept / config.yarn.factor * (1 - slowed)"),
    "no concentration": (ROPE, "config.yarn.concentration if config.yarn else 1.0", "1.0"),
    "concentration twice": (ROPE, "config.yarn.concentration if config.yarn else 1.0", "config.yarn.concentration ** 2"),
    "YaRN's ramp rounded to whole planes": (ROPE, "if yarn.truncate:", "if True:"),
    "k is not rotated": (MODEL, 'self.hook("rot_k", rotate(k, cos, sin))', 'self.hook("rot_k", k)'),
    "v is rotated": (MODEL, "        sinks = self.hook(", "        v = rotate(v, cos, sin)\n        sinks = self.hook("),
    "heads are grouped the other way": (MODEL, 'q = rearrange(q, "b s (K g) h -> b s K g h"',
                                        'q = rearrange(q, "b s (g K) h -> b s K g h"'),
    "heads are grouped the other way, fast": (FAST, "q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4)",
                                              "q.unflatten(2, (groups, -1)).permute(0, 3, 2, 1, 4)"),
    "no sink": (MODEL, "sinks.unsqueeze(-1)]", "sinks.unsqueeze(-1) - torch.inf]"),
    "no sink, fast": (FAST, "keep = torch.sigmoid(lse - sinks)", "keep = torch.sigmoid(lse - sinks + torch.inf)"),
    "sink logits of 0": (MODEL, "sinks.unsqueeze(-1)]", "sinks.unsqueeze(-1) * 0]"),
    "the sink is scaled like a score": (MODEL, "self.sinks[:, None].expand",
                                        "(self.sinks * self.config.d_head**-0.5)[:, None].expand"),
    "the sink has the wrong sign, fast": (FAST, "torch.sigmoid(lse - sinks)", "torch.sigmoid(lse + sinks)"),
    "sink mass and what is kept do not add to 1, fast": (FAST, "torch.sigmoid(sinks - lse).to", "torch.sigmoid(sinks).to"),
    "the window is on the other layers": (
        CONFIG, "if self.layer_types[layer] == SLIDING else None", "if self.layer_types[layer] == FULL else None"),
    "no window": (CONFIG, "return self.sliding_window if self.layer_types[layer] == SLIDING else None", "return None"),
    "the window has one key more": (CACHE, "visible &= distance < self.window", "visible &= distance <= self.window"),
    "the window has one key less": (CACHE, "visible &= distance < self.window", "visible &= distance < max(self.window - 1, 1)"),
    "a block of queries is cut off from the first key of its window": (CACHE, "begin + 1 - self.window", "begin + 2 - self.window"),
    "a block of queries does not see its own last key": (CACHE, "keys = slice(first, t - s + end)", "keys = slice(first, t - s + end - 1)"),
    "the future is visible": (CACHE, "visible = (distance >= 0) &", "visible = (distance >= -1) &"),
    "a query does not see itself": (CACHE, "visible = (distance >= 0) &", "visible = (distance > 0) &"),
    "scores are not scaled": (MODEL, "* self.config.d_head**-0.5", "* 1.0"),
    "scores are scaled by the model's width": (MODEL, "* self.config.d_head**-0.5", "* self.config.d_model**-0.5"),
    "q, k, v come in another order": (MODEL, "q, k, v = self.qkv(x)", "k, v, q = self.qkv(x)"),
    "attention's output bias is left out": (MODEL, "return self.out(z.flatten(2))",
                                            "return F.linear(z.flatten(2), self.out.weight)"),
    "the output bias is left out beside head results": (MODEL, "result.sum(dim=2) + self.out.bias", "result.sum(dim=2)"),
    "next token: q and k are not rotated": (FAST, "rotate(qk, cos, sin)", "qk"),
    "next token: v is a key": (FAST, "cache.extend(attn.layer, k, v)", "cache.extend(attn.layer, k, k)"),
    "next token: heads are grouped the other way": (FAST, "q.view(n_kv_heads, -1, h)", "q.view(-1, n_kv_heads, h).transpose(0, 1)"),
    "next token: scores are not scaled": (FAST, "* h**-0.5", "* 1.0"),
    "next token: the window has one key more": (FAST, ".masked_fill_(~visible.mask[0], -torch.inf)", ""),
    "next token: no sink": (FAST, "attn.sinks.view(n_kv_heads, -1, 1)", "attn.sinks.view(n_kv_heads, -1, 1) - torch.inf"),
    "biases are left out": (MODEL, "self.weight, self.bias)\n\n\nclass Embed", "self.weight)\n\n\nclass Embed"),
    # the experts
    "gate and linear are halves": (MODEL, "h[..., 0::2])", "h[..., : h.shape[-1] // 2])"),
    "gate and linear are halves, fast": (
        FAST, "h.view(h.shape[0], -1, 2).unbind(-1)", "h.chunk(2, dim=-1)"),
    "gate and linear are swapped": (MODEL, "swiglu(gate, linear, self", "swiglu(linear, gate, self"),
    "gate and linear are swapped, fast": (FAST, "gate, linear = h.view", "linear, gate = h.view"),
    "no + 1": (MODEL, "gate * torch.sigmoid(alpha * gate) * (linear + 1)", "gate * torch.sigmoid(alpha * gate) * linear"),
    "no + 1, fast": (FAST, "torch.addcmul(post, post, linear)", "post * linear"),
    "SiLU: alpha is 1": (CONFIG, "swiglu_alpha: float = 1.702", "swiglu_alpha: float = 1.0"),
    "no clamp of the gate": (MODEL, "gate.clamp(max=limit)", "gate + 0"),
    "no clamp of the gate, fast": (FAST, "gate.clamp(max=limit)", "gate"),
    "no clamp of the linear part": (MODEL, "linear.clamp(-limit, limit)", "linear + 0"),
    "no clamp of the linear part, fast": (FAST, "linear.clamp(-limit, limit)", "linear"),
    "the gate is clamped below too": (MODEL, "gate.clamp(max=limit)", "gate.clamp(-limit, limit)"),
    "the linear part is clamped above only": (MODEL, "linear.clamp(-limit, limit)", "linear.clamp(max=limit)"),
    "the linear part is clamped above only, fast": (FAST, "linear.clamp(-limit, limit)", "linear.clamp(max=limit)"),
    "the clamp comes after the product": (
        MODEL, "post = self.hook(\"post\", swiglu(gate, linear, self.config.swiglu_alpha))",
        "post = self.hook(\"post\", swiglu(h[..., 0::2], h[..., 1::2], self.config.swiglu_alpha).clamp(-limit, limit))"),
    "expert biases are left out": (MODEL, "self.matrix(expert), self.bias[expert])", "self.matrix(expert))"),
    "the down bias is left out, fast": (FAST, "moe.down.bias[e])", "None)"),
    "the gate and linear bias is left out, fast": (FAST, "moe.gate_up.bias[e])", "None)"),
    "the down bias is added after the weighting, fast": (
        FAST, "y * weights.flatten()[order[mine]].unsqueeze(-1)",
        "(y - moe.down.bias[experts[order[mine]]]) * weights.flatten()[order[mine]].unsqueeze(-1) + moe.down.bias[experts[order[mine]]]"),
    "softmax over all experts, not the chosen": (MODEL, "logits.gather(-1, indices).softmax(dim=-1)",
                                                 "logits.softmax(dim=-1).gather(-1, indices)"),
    "weights are sigmoids": (MODEL, "logits.gather(-1, indices).softmax(dim=-1)", "logits.gather(-1, indices).sigmoid()"),
    "one expert too few": (MODEL, "route(logits, self.config.experts_per_token)",
                           "route(logits, self.config.experts_per_token)[..., :-1]"),
    "the smallest logits are chosen": (MODEL, "descending=True, stable=True", "descending=False, stable=True"),
    "experts are not weighted": (MODEL, 'einsum(weights, out, "b s k, b s k d -> b s d")', "out.mean(dim=2)"),
    "an expert's rows get another token's weight, fast": (FAST, "weights.flatten()[order[mine]]", "weights.flatten()[mine]"),
    "few rows: the bias is left out": (FAST, "torch.addmm(bias.unsqueeze(-1), weight,", "torch.addmm(0 * bias.unsqueeze(-1), weight,"),
    "one token: the gate and linear bias is left out": (FAST, "h + moe.gate_up.bias[experts]", "h"),
    "one token: the down bias is left out": (FAST, "y + moe.down.bias[experts]", "y"),
    "one token: the experts take each other's values": (FAST, "zip(chosen, pairs)", "zip(chosen, pairs[::-1])"),
    "one token: experts are not weighted": (FAST, "torch.mm(weights, y", "torch.mm(weights * 0 + 1 / len(y), y"),
    "the router's bias is left out": (MODEL, 'self.hook("router_logits", self.router(x))',
                                      'self.hook("router_logits", F.linear(x, self.router.weight))'),
    # norms and the residual stream
    "eps of 1e-6": (MODEL, "self.eps, self.weight = eps,", "self.eps, self.weight = 1e-6,"),
    "eps is added to the rms": (MODEL, "keepdim=True) + self.eps).sqrt()", "keepdim=True)).sqrt() + self.eps"),
    "the norm subtracts the mean": (MODEL, "wide = x.to(torch.promote_types(x.dtype, torch.float32))",
                                    "wide = x - x.mean(-1, keepdim=True)"),
    "the gain is 1 + weight": (MODEL, "(normalized * self.weight)", "(normalized * (1 + self.weight))"),
    "no final norm": (MODEL, "self.unembed(self.ln_final(x))", "self.unembed(x)"),
    "attention reads the stream unnormed": (MODEL, "self.attn(self.ln1(x),", "self.attn(x,"),
    "the experts read the stream before attention": (
        MODEL, 'x = x + self.hook("mlp_out", self.mlp(self.ln2(x)))', 'x = x + self.hook("mlp_out", self.mlp(self.ln1(x)))'),
    "the experts replace the stream": (MODEL, 'x = x + self.hook("mlp_out"', 'x = self.hook("mlp_out"'),
    "the embedding is scaled": (MODEL, 'x = self.embed(tokens)', 'x = self.embed(tokens) * 2'),
    "unembedding with the embedding": (MODEL, "x.to(self.weight.dtype), self.weight))", "x.to(self.weight.dtype), self.weight.flip(0)))"),
    "a block is left out": (MODEL, "for block in self.blocks[:stop]:", "for block in self.blocks[:-1]:"),
    # the cache and padding
    "cached: positions begin at 0 again": (CACHE, "return Positions(columns[self.length :], columns, self.dropped)",
                                           "return Positions(columns[: s], columns, self.dropped)"),
    "cached: the ring is one key short": (CACHE, "self._first_in_window(self.length, self.config.sliding_window))",
                                          "self._first_in_window(self.length, self.config.sliding_window - 2))"),
    "cached: old keys are overwritten": (CACHE, "buffer[:, self.length : need] = new", "buffer[:, : new.shape[1]] = new"),
    "padded: positions count padding": (CACHE, "mask.cumsum(-1) - 1, -1)", "torch.ones_like(mask).cumsum(-1) - 1, -1)"),
    "padded: padding is visible": (CACHE, "& (key >= 0)", "& (key >= -1)"),
    # the packing
    "packed: the high four bits come first": (PACK, "values[byte & 15], values[byte >> 4]", "values[byte >> 4], values[byte & 15]"),
    "packed: scales are off by one": (PACK, "BIAS = 127", "BIAS = 128"),
    "packed: no signs": (PACK, "tuple(-m for m in MAGNITUDES)", "MAGNITUDES"),
    "packed: the code for 5 instead of 6": (PACK, "4.0, 6.0)", "4.0, 5.0)"),
}  # fmt: skip
T, CHUNKS, PADDING = 72, (1, 20, 1, 1, 49), 9  # more than the 64 queries of a block


def cases():
    """Two models that between them bring every equation into play."""
    for seed, changes in ((1, dict(yarn_truncate=False)), (2, dict(d_model=64, d_ff=96))):
        rng = np.random.default_rng([11, seed])
        cfg = reference.random_config(rng) | dict(
            n_layers=3, layer_windows=[8, None, 8], n_heads=6, n_kv_heads=2, d_head=24, d_ff=33, experts_per_token=3,
            yarn_factor=16.0, n_ctx_trained=512, yarn_beta_fast=8.3, yarn_beta_slow=1.1, rope_theta=5000.0,
            swiglu_limit=2.0, norm_eps=1e-3) | changes  # fmt: skip
        weights = reference.random_weights(cfg, rng)
        yield cfg, weights, rng.integers(0, cfg["d_vocab"], T)


@functools.cache
def expected() -> list[tuple]:
    made = []
    for cfg, weights, tokens in cases():
        packs = cfg["d_model"] % 32 == 0 and cfg["d_ff"] % 32 == 0
        bits = None
        if packs:
            rng = np.random.default_rng(5)
            bits = {name: (rng.integers(0, 256, (*w.shape[:2], w.shape[2] // 32, 16), dtype=np.uint8),
                           rng.integers(121, 125, (*w.shape[:2], w.shape[2] // 32), dtype=np.uint8))
                    for name, w in weights.items() if name.endswith(("mlp1_weight", "mlp2_weight"))}  # fmt: skip
            weights = weights | {name: decoded(*pair) for name, pair in bits.items()}
        made.append((cfg, weights, tokens, bits, reference.forward(weights, cfg, tokens)))
    return made


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 bit by bit: sign, two bits of exponent, one of mantissa; the even number in the low four bits."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    exponent, mantissa = codes >> 1 & 3, codes & 1
    magnitude = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent.astype(float) - 1))
    values = np.where(codes & 8, -magnitude, magnitude) * 2.0 ** (scales.astype(float) - 127)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def gaps(package):
    """How far `package` is from the float64 loop: every point, the faster way, packed, cached, padded."""
    for cfg, weights, tokens, bits, acts in expected():
        models = [our_model(weights, cfg, package=package)]
        if bits is not None:
            models.append(packed_model(models[0], bits, package))
        ids = torch.as_tensor(tokens)[None]
        for model in models:
            with torch.no_grad(), package.record(model, "*") as ours:
                model(ids)
            with torch.no_grad(), package.record(model) as few:
                logits = model(ids)
            yield gap(logits[0], acts["unembed.hook_out"])
            yield from (gap(few[name][0], acts[name]) for name in few)
            yield from (gap(ours[name] if name.startswith("rotary") else ours[name][0], acts[name]) for name in acts)
        cache = package.KVCache(models[0].config)
        with torch.no_grad():
            cached = torch.cat([models[0](chunk, cache=cache) for chunk in ids.split(CHUNKS, dim=1)], dim=1)
            padded = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), ids], dim=1)
            mask = (torch.arange(T + PADDING)[None] >= PADDING).long()
            alone = models[0](padded, mask)[:, PADDING:]
            cache = package.KVCache(models[0].config)  # padding between what is read first and what is read later
            first = models[0](padded.roll(-PADDING, 1)[:, : T // 2], cache=cache)
            gaped = torch.cat([padded[:, :PADDING], ids[:, T // 2 : T // 2 + 5]], dim=1)
            second = models[0](gaped, mask[:, : PADDING + 5], cache=cache)[:, PADDING:]
            rest = models[0](ids[:, T // 2 + 5 :], cache=cache)
        for logits in (cached, alone, torch.cat([first, second, rest], dim=1)):
            yield gap(logits[0], acts["unembed.hook_out"])


def packed_model(dense, bits, package):
    model = package.GptOss(dense.config, packed=True).double()
    state = {name: x for name, x in dense.state_dict().items() if not name.endswith(("gate_up.weight", "down.weight"))}
    for name, (blocks, scales) in bits.items():
        layer, part = name.split(".")[1], "gate_up" if "mlp1" in name else "down"
        state |= {f"blocks.{layer}.mlp.{part}.blocks": torch.as_tensor(blocks),
                  f"blocks.{layer}.mlp.{part}.scales": torch.as_tensor(scales)}  # fmt: skip
    model.load_state_dict(state, strict=True)
    return model.eval()


def test_without_a_mistake_there_is_no_gap():
    import gptoss_lab

    assert max(gaps(gptoss_lab)) < 1e-10


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_mistake_is_seen(mistake):
    with mutant(*MISTAKES[mistake]) as package:
        try:
            seen = any(distance > 1e-7 for distance in gaps(package))
        except (AssertionError, RuntimeError, ValueError, LookupError) as error:
            assert "the mutation needs 1" not in str(error), error
            return
    assert seen, "the comparison did not notice"
