"""gpt-oss, in reading order.

b batch   s position   t key position   d d_model   H query heads   K key heads   g = H/K   h d_head
E experts   k experts per token   f d_ff   V vocabulary   n = b*s*k, one row a token and chosen expert

Source of every equation: openai/gpt-oss, gpt_oss/torch/model.py. `self.hook(name, value)` names a value that can be
read and replaced while the model runs; `model.hook_points` lists them.
"""
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from . import fast, mxfp4
from .config import Config
from .fast import rotate
from .hooks import Hooked, HookedModel, HookPoints, pytorch_hooks
from .kv_cache import KVCache, Visible
from .rope import RotaryEmbedding

if TYPE_CHECKING:
    import tiktoken


class Linear(nn.Linear):
    """x W' + b in the weight's dtype; for few rows by a quicker product.   [.. in] -> [.. out]"""

    def forward(self, x: Tensor) -> Tensor:
        return fast.product(x.to(self.weight.dtype), self.weight, self.bias)


class Embed(nn.Embedding):
    """A row of the table for each token. The table may stay in the host's memory, beside a GPU.   [b s] -> [b s d]"""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.weight.device != tokens.device:
            return fast.lookup(self.weight, tokens)
        return F.embedding(tokens, self.weight)


class RMSNorm(Hooked):
    """x / rms(x) * weight, computed in float32 or better.   [b s d] -> [b s d]"""

    inner_points = ("scale", "normalized")

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        heard = self.heard(*self.inner_points)
        if fast.norm_serves(self, x, heard):
            return self.hook("out", fast.norm(self, x, heard))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = self.hook("scale", (wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook("normalized", wide / scale)
        return self.hook("out", (normalized * self.weight).to(x.dtype))


def softmax_with_sink(scores: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of scores shares its probability with a sink: a logit that has no value to read.

    scores [b H s t], sinks [b H s] -> pattern [b H s t], whose rows sum to 1 - sink_mass; sink_mass [b H s]
    """
    probability = torch.cat([scores, sinks.unsqueeze(-1)], dim=-1).softmax(dim=-1)
    return probability[..., :-1], probability[..., -1].clone()  # a copy: it must not keep the [s t] matrix alive


class Attention(Hooked):
    """Grouped-query attention with a learned sink, on sliding layers over the last keys only.   [b s d] -> [b s d]"""

    inner_points = ("attn_scores", "pattern")

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, self.layer, self.window = config, layer, config.window(layer)
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        self.qkv = Linear(config.d_model, sum(self.heads) * config.d_head)
        self.sinks = nn.Parameter(torch.zeros(config.n_heads))
        self.out = Linear(config.n_heads * config.d_head, config.d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visible, cache: KVCache | None) -> Tensor:
        if not self.heard(*fast.INSIDE) and fast.next_token_serves(x, cache):
            return self.write(*fast.next_token(self, x, cos, sin, visible, cache))
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.config.d_head)).split(self.heads, dim=-2)
        q, k, v = self.hook("q", q), self.hook("k", k), self.hook("v", v)  # [b s H h], [b s K h], [b s K h]
        q = self.hook("rot_q", rotate(q, cos, sin))
        k = self.hook("rot_k", rotate(k, cos, sin))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        sinks = self.hook("sink_scores", self.sinks[:, None].expand(len(x), -1, x.shape[1]))  # [b H s]

        heard = self.heard(*self.inner_points)
        dropped = cache.dropped if heard and cache is not None and self.window is not None else 0
        if not dropped and fast.attention_serves(self, q, k, v, sinks, heard):
            z, sink_mass = fast.attention(self, q, k, v, sinks, visible, heard)
        else:
            z, sink_mass = self.attend(q, k, v, sinks, visible.mask, dropped)
        return self.write(z, sink_mass)

    def write(self, z: Tensor, sink_mass: Tensor) -> Tensor:
        """What the heads read, z [b s H h], on its way into the residual stream.   -> [b s d]"""
        self.hook("sink_mass", sink_mass)
        z = self.hook("z", z)
        if self.heard("result"):
            per_head = rearrange(self.out.weight, "d (H h) -> H h d", H=self.config.n_heads)
            result = self.hook("result", einsum(z, per_head, "b s H h, H h d -> b s H d"))
            return result.sum(dim=2) + self.out.bias
        return self.out(z.flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor, dropped: int):
        """q [b s H h], k and v [b t K h], sinks [b H s], visible [b 1 s t] -> z [b s H h], sink_mass [b H s]

        `dropped` columns that a sliding cache no longer holds come before t, so that recorded keys count from 0.
        """
        if dropped:
            k, v = (F.pad(x, (0, 0, 0, 0, dropped, 0)) for x in (k, v))
            visible = F.pad(visible, (dropped, 0))

        # Query heads (K g) read key head K: eight neighbouring query heads share one in the published models.
        q = rearrange(q, "b s (K g) h -> b s K g h", K=self.config.n_kv_heads)
        scores = einsum(q * self.config.d_head**-0.5, k, "b s K g h, b t K h -> b K g s t")
        scores = rearrange(scores, "b K g s t -> b (K g) s t")
        scores = scores.masked_fill_(~visible, -torch.inf)
        scores = self.hook("attn_scores", scores)
        pattern, sink_mass = softmax_with_sink(scores, sinks)
        pattern = self.hook("pattern", pattern)
        if dropped and pattern[..., :dropped].any():
            raise ValueError(f"an edit in layer {self.layer} reads keys 0 to {dropped - 1}, which the sliding layer's "
                             "cache no longer holds: run the whole text in one pass to reach them")  # fmt: skip
        pattern = rearrange(pattern, "b (K g) s t -> b K g s t", K=self.config.n_kv_heads)
        z = einsum(pattern, v, "b K g s t, b t K h -> b s K g h")
        return rearrange(z, "b s K g h -> b s (K g) h"), sink_mass


def route(logits: Tensor, k: int) -> Tensor:
    """The experts with the k largest logits, falling; of equal ones the first.   [b s E] -> [b s k]"""
    if fast.route_serves(logits):
        return fast.route(logits, k)
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def swiglu(gate: Tensor, linear: Tensor, alpha: float) -> Tensor:
    """gate * sigmoid(alpha * gate) * (linear + 1), of values already clamped."""
    return gate * torch.sigmoid(alpha * gate) * (linear + 1)


class Experts(nn.Module):
    """One weight matrix and bias an expert. The matrices are numbers (`weight` [E out in]), or MXFP4 as it is on disk
    (`blocks` [E out in/32 16] and `scales` [E out in/32]), of which only those in use are unpacked."""

    def __init__(self, n_experts: int, d_in: int, d_out: int, packed: bool):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n_experts, d_out))
        if packed:
            shape = n_experts, d_out, d_in // mxfp4.BLOCK
            self.register_buffer("blocks", torch.zeros(*shape, mxfp4.BLOCK // 2, dtype=torch.uint8))
            self.register_buffer("scales", torch.zeros(shape, dtype=torch.uint8))
        else:
            self.weight = nn.Parameter(torch.zeros(n_experts, d_out, d_in))

    @property
    def packed(self) -> bool:
        return "blocks" in self._buffers

    def matrix(self, expert: int) -> Tensor:
        """The weights of one expert, exact.   -> [out in]"""
        if self.packed:
            return mxfp4.unpack(self.blocks[expert], self.scales[expert], self.bias.dtype)
        return self.weight[expert]

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """Row n through expert experts[n].   x [n in], experts [n] -> [n out]"""
        y = x.new_empty(x.shape[0], self.bias.shape[1])
        counts = experts.bincount(minlength=len(self.bias)).tolist()
        for expert, rows in enumerate(experts.argsort().split(counts)):
            if len(rows):
                y = y.index_copy_(0, rows, F.linear(x.index_select(0, rows), self.matrix(expert), self.bias[expert]))
        return y


class MoE(Hooked):
    """A router picks k of E experts for each token; their outputs are weighted and added.   [b s d] -> [b s d]"""

    inner_points = ("pre", "pre_linear", "pre_clamped", "pre_linear_clamped", "post", "expert_out")

    def __init__(self, config: Config, packed: bool):
        super().__init__()
        self.config = config
        self.router = Linear(config.d_model, config.n_experts)
        self.gate_up = Experts(config.n_experts, config.d_model, 2 * config.d_ff, packed)
        self.down = Experts(config.n_experts, config.d_ff, config.d_model, packed)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.hook("router_logits", self.router(x))
        indices = self.hook("expert_indices", route(logits, self.config.experts_per_token))
        weights = self.hook("expert_weights", logits.gather(-1, indices).softmax(dim=-1))
        x = x.to(weights.dtype)  # beside a float16 model runs a float32 residual stream
        heard = self.heard(*self.inner_points)
        if fast.mix_serves(self, x, heard):
            return fast.mix(self, x, indices, weights, heard)
        return self.mix(x, indices, weights)

    @property
    def as_built(self) -> bool:
        """Are both layers Experts that nobody hooked or patched?"""
        untouched = lambda layer: type(layer) is Experts and not pytorch_hooks(layer) and "forward" not in vars(layer)
        everywhere = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
        return untouched(self.gate_up) and untouched(self.down) and not everywhere

    def mix(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [b s d], indices and weights [b s k] -> [b s d]"""
        k, limit = indices.shape[-1], self.config.swiglu_limit
        b, s, experts = *x.shape[:2], indices.flatten()
        slots = lambda y: rearrange(y, "(b s k) w -> b s k w", b=b, s=s)
        h = slots(self.gate_up(repeat(x, "b s d -> (b s k) d", k=k), experts))
        gate = self.hook("pre", h[..., 0::2])  # rows alternate: gate 0, linear 0, gate 1, linear 1, ...
        linear = self.hook("pre_linear", h[..., 1::2])
        gate = self.hook("pre_clamped", gate.clamp(max=limit))
        linear = self.hook("pre_linear_clamped", linear.clamp(-limit, limit))
        post = self.hook("post", swiglu(gate, linear, self.config.swiglu_alpha))
        out = self.hook("expert_out", slots(self.down(rearrange(post, "b s k f -> (b s k) f"), experts)))
        return einsum(weights, out, "b s k, b s k d -> b s d")


class Block(Hooked):
    """What attention and the experts write is added to the residual stream.   [b s d] -> [b s d]"""

    def __init__(self, config: Config, layer: int, packed: bool):
        super().__init__()
        self.ln1, self.attn = RMSNorm(config.d_model, config.norm_eps), Attention(config, layer)
        self.ln2, self.mlp = RMSNorm(config.d_model, config.norm_eps), MoE(config, packed)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Visible, cache: KVCache | None) -> Tensor:
        x = self.hook("resid_pre", x)
        x = x + self.hook("attn_out", self.attn(self.ln1(x), cos, sin, visible, cache))
        x = self.hook("resid_mid", x)
        x = x + self.hook("mlp_out", self.mlp(self.ln2(x)))
        return self.hook("resid_post", x)


class Unembed(Hooked):
    """The residual stream -> one logit a token of the vocabulary.   [b s d] -> [b s V]"""

    def __init__(self, d_model: int, d_vocab: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_vocab, d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.hook("out", fast.product(x.to(self.weight.dtype), self.weight))


class GptOss(HookedModel):
    """A gpt-oss model: `logits = model(tokens)`. `packed` keeps the experts in MXFP4."""

    def __init__(self, config: Config, packed: bool = False):
        super().__init__()
        self.config = config
        # Zeros, as every weight here: an Embedding's own random ones would take 1.5 s to import what draws them.
        self.embed = Embed.from_pretrained(torch.zeros(config.d_vocab, config.d_model), freeze=False)
        self.rotary_emb = RotaryEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, layer, packed) for layer in range(config.n_layers))
        self.ln_final = RMSNorm(config.d_model, config.norm_eps)
        self.unembed = Unembed(config.d_model, config.d_vocab)
        self.hook_points = HookPoints(config.n_layers)
        self.read_tokenizer = lambda: None  # `load` sets what reads it

    @cached_property
    def tokenizer(self) -> "tiktoken.Encoding | None":
        """The vocabulary, read at its first use; None where the checkpoint brings none.

        Raises:
            VocabularyMissing: o200k_harmony is neither on this machine nor within reach.
        """
        return self.read_tokenizer()

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unembed.weight.device

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, *, cache: KVCache | None = None,
        stop_at_layer: int | None = None, logits_to_keep: int = 0,
    ) -> Tensor:  # fmt: skip
        """tokens [b s] -> logits [b s V]

        Args:
            tokens: token ids.
            attention_mask: [b s], 0 where a token is padding, on either side. Each row gets what it gets alone.
            cache: what was read before; the tokens follow it, and are added to it.
            stop_at_layer: return the residual stream [b s d] before this layer; negative counts from the end.
            logits_to_keep: logits of the last so many positions only; 0 keeps all.

        Raises:
            TypeError, ValueError: naming the argument, what was seen and what would serve.
        """
        stop = self._stop(stop_at_layer)
        check, begin = _check, self.begin
        if torch.compiler.is_compiling():  # they look at values; as decorators this would cost 1.5 s at import
            check, begin = torch.compiler.disable(check), torch.compiler.disable(begin)
        check(self, tokens, attention_mask, cache, stop, logits_to_keep)
        start = cache.length if cache is not None else 0
        begin(cache.id if cache is not None else None, start, *tokens.shape, stop)
        positions = (cache or KVCache(self.config)).place(tokens, attention_mask)
        return self.read(tokens, positions, cache, stop, logits_to_keep)

    def read(self, tokens: Tensor, positions, cache: KVCache | None, stop: int | None = None, logits_to_keep: int = 0):
        """What `forward` does with arguments that have been checked."""
        tokens = self.hook("tokens", tokens)
        x = self.embed(tokens)
        x = self.hook("embed", x.float() if x.dtype == torch.float16 else x)  # float16 ends at 65,504
        cos, sin = self.rotary_emb(positions.query, self.dtype)
        visible = {window: positions.visible(window) for window in (None, self.config.sliding_window)}
        for block in self.blocks[:stop]:
            x = block(x, cos, sin, visible[block.attn.window], cache)
        if stop is not None:
            return x.clone()  # a record may hold x
        if not (self.ln_final.listeners or self.unembed.listeners):  # who listens hears every position
            x = x[:, -logits_to_keep:]
        logits = self.unembed(self.ln_final(x))[:, -logits_to_keep:]
        if cache is not None:
            cache.commit(positions)
        return logits


def _check(model: GptOss, tokens: Tensor, mask, cache: KVCache | None, stop: int | None, keep: int) -> None:
    c = model.config
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        what = f"dtype {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        mend = ": torch.tensor([model.tokenizer.encode_ordinary(text)])" if isinstance(tokens, str) else ""
        raise TypeError(f"tokens must be a tensor of int64 or int32 token ids, got {what}{mend}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [batch, position], got shape {tuple(tokens.shape)}: add a batch axis "
                         "with tokens[None]")  # fmt: skip
    if tokens.numel() == 0:
        raise ValueError(f"tokens is empty, shape {tuple(tokens.shape)}: a prompt needs at least one token")
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= c.d_vocab:
        raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {c.d_vocab} "
                         f"(0 to {c.d_vocab - 1})")  # fmt: skip
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor like tokens, got {type(mask).__name__}")
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, tokens {tuple(tokens.shape)}: it marks the "
                         "new tokens only, 1 for a token and 0 for padding")  # fmt: skip
    if mask is not None and mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"attention_mask must hold 0 and 1, got values from {mask.min()} to {mask.max()}")
    if mask is None and c.pad_token is not None and (tokens == c.pad_token).any():
        raise ValueError(f"tokens hold the pad id {c.pad_token} and there is no attention_mask: pass one with 0 where "
                         "there is padding, or torch.ones_like(tokens) if the id is part of the text")  # fmt: skip
    end = tokens.shape[1] + (cache.length if cache is not None else 0)
    if end > c.n_ctx:
        raise ValueError(f"{end} positions do not fit the context of {c.n_ctx}: shorten the text, or stretch the "
                         "context with gptoss_lab.probes.yarn.extended")  # fmt: skip
    if not isinstance(keep, int) or keep < 0:
        raise ValueError(f"logits_to_keep = {keep!r}: must be a whole number; 0 keeps the logits of every position")
    if cache is not None and cache.config is not c and cache.config != c:
        raise ValueError("the cache was made for another config: make it with KVCache(model.config)")
    if cache is not None and cache.batch not in (None, tokens.shape[0]):
        raise ValueError(f"tokens hold {tokens.shape[0]} sequences and the cache {cache.batch}: it continues those "
                         "that it was filled with, all of them")  # fmt: skip
    if cache is not None and stop is not None:
        raise ValueError("stop_at_layer with a cache would leave the later layers' keys out of it: use one of the two")
