"""The same numbers sooner. What nobody listens to need not be made; what is made inside can be read, not edited."""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import rope
from ..kv_cache import Visible
from ..memory import followed, room
from . import cpu, gpu

# ------------------------------------------------------------------------------------------ what is made inside


def made_for(module, x: Tensor, shapes: list[tuple]) -> list[Tensor | None]:
    """Room for each of the module's inner points that somebody reads, for C++ to fill."""
    heard = module.listeners
    return [room(x, shape) if name in heard else None for name, shape in zip(module.inner_points, shapes)]


def tell(module, made: list[Tensor | None]) -> None:
    """Those who read it get it."""
    for name, x in zip(module.inner_points, made):
        if x is not None:
            module.give(name, x)


# ------------------------------------------------------------------------------------------ rows


def lookup(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows of a table that lies in another memory than the tokens.   [V d], [b s] -> [b s d]"""
    if gpu.serves(tokens) and weight.is_pinned():
        from .gpu import rows

        return rows.lookup(weight, tokens)
    return F.embedding(tokens.to(weight.device), weight).to(tokens.device)


def norm_serves(layer, x: Tensor, heard: bool) -> bool:
    """In one operation instead of eight."""
    if gpu.serves(x, layer.weight):
        return not heard
    return plain(x, layer.weight) and layer.weight.is_contiguous() and not (heard and layer.edited(*layer.inner_points))


def norm(layer, x: Tensor, heard: bool) -> Tensor:
    """RMSNorm.   [.. d] -> [.. d]"""
    if gpu.serves(x, layer.weight):
        from .gpu import rows

        return rows.rms_norm(x, layer.weight, layer.eps, x.dtype)
    made = made_for(layer, x, [(*x.shape[:-1], 1), x.shape]) if heard else (None, None)
    out = cpu.norm(x.contiguous(), layer.weight, layer.eps, *made)
    tell(layer, made)
    return out


def route_serves(logits: Tensor) -> bool:
    """In one operation instead of several."""
    return gpu.serves(logits) or plain(logits)


def route(logits: Tensor, k: int) -> Tensor:
    """The k largest, of equal ones the first.   [b s E] -> [b s k]"""
    if plain(logits):
        return cpu.top(logits.contiguous(), k)
    from .gpu import rows

    return rows.route(logits, k)


def step(model, cache, capacity: int, last=None):
    """On a GPU, the CUDA graph that reads one token after another, `last` or a new one; None where none serves."""
    if not gpu.reaches(model.unembed.weight):
        return None
    from .gpu.step import following

    return following(last, model, cache, capacity)


# ------------------------------------------------------------------------------------------ products


ROWS = 32  # of float32 that C++ multiplies: beyond, PyTorch's product is quicker
FEW = 8  # rows for which a weight is widened while it is read; more share a widened copy


def narrow_serves(x: Tensor, weight: Tensor) -> bool:
    """A large bfloat16 weight, which PyTorch reads at half the speed of the memory for one row."""
    large = weight.dtype == torch.bfloat16 and weight.numel() >= 2**20
    return large and by_hand(x) and cpu.serves(weight)


def product_is_turned(n: int, d_in: int, d_out: int, x: Tensor) -> bool:
    """Measured with MKL on an AMD EPYC: up to 8 rows and a small weight, not in bfloat16. Else F.linear is quicker."""
    small = n <= 8 and d_in * d_out <= 2**18
    return small and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, for few rows in C++ or as weight @ x.T instead of x @ weight.T.   [.. in] -> [.. out]"""
    n = x.shape[:-1].numel()
    if n <= gpu.FEW and gpu.serves(x, weight):
        from .gpu import rows

        return rows.product(x.reshape(n, -1), weight, bias).view(*x.shape[:-1], -1)
    if n <= ROWS and plain(x, weight) and weight.is_contiguous():
        return cpu.linear(x.contiguous(), weight, None if bias is None else bias.contiguous())
    if n <= FEW and narrow_serves(x, weight):
        y = cpu.bf16_product(x.reshape(n, -1), weight).view(*x.shape[:-1], -1)
        return (y if bias is None else y + bias).to(x.dtype)
    if not product_is_turned(n, x.shape[-1], weight.shape[0], x):
        return F.linear(x, weight, bias)
    columns = x.reshape(n, -1)
    columns = (torch.cat([columns, columns]) if n == 1 else columns).t()  # two columns are quicker than one
    y = torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(-1), weight, columns)
    return y.t()[:n].view(*x.shape[:-1], -1)


def by_hand(x: Tensor) -> bool:
    """May a forward pass look at values? Neither gradients nor a compiler are to follow it."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def plain(*tensors: Tensor) -> bool:
    """Float32 on the CPU, for C++: no gradient, compiler, transform or mode (one that counts, say) is to follow."""
    if torch.is_grad_enabled() or followed() or cpu.compiled() is None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    return all(x.dtype == torch.float32 and x.is_cpu and type(x) in (Tensor, Parameter) for x in tensors)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.rotate, in one operation instead of eleven."""
    if plain(x, cos, sin) and x.stride()[2:] == (x.shape[3], 1) and cos.is_contiguous() and sin.is_contiguous():
        return cpu.rotate(x, cos, sin)
    return rope.rotate(x, cos, sin)


# ------------------------------------------------------------------------------------------ attention


QUERIES = 512  # of a full layer at a time


INSIDE = ("q", "k", "v", "rot_q", "rot_k", "sink_scores", "attn_scores", "pattern")  # values that `next_token` skips


def next_token_serves(x: Tensor, cache) -> bool:
    """One token after those in a cache."""
    if cache is None or x.shape[1] != 1:
        return False
    return cache.fixed or x.shape[0] == 1 and by_hand(x) and not plain(x)


def next_token(attn, x: Tensor, cos: Tensor, sin: Tensor, visible: Visible, cache) -> tuple[Tensor, Tensor]:
    """All of attention for one token, in few operations: query heads (K g) are the rows of key head K's product.

    x [b 1 d] -> z [b 1 H h], sink_mass [b H 1]
    """
    if cache.fixed:
        return cache.next_token(attn, x, cos, sin)
    n_heads, n_kv_heads, h = attn.config.n_heads, attn.config.n_kv_heads, attn.config.d_head
    qkv = attn.qkv(x).view(1, 1, -1, h)
    qk, v = qkv.split_with_sizes([n_heads + n_kv_heads, n_kv_heads], 2)
    q, k = rotate(qk, cos, sin).split_with_sizes([n_heads, n_kv_heads], 2)
    k, v = cache.extend(attn.layer, k, v)
    q = q.view(n_kv_heads, -1, h) * h**-0.5
    scores = torch.bmm(q, k[0].permute(1, 2, 0)).masked_fill_(~visible.mask[0], -torch.inf)
    probability = torch.cat([scores, attn.sinks.view(n_kv_heads, -1, 1)], dim=-1).softmax(dim=-1)
    z = torch.bmm(probability[..., :-1], v[0].transpose(0, 1))
    return z.view(1, 1, n_heads, h), probability[..., -1].reshape(1, n_heads, 1)


NEAR = 1024  # keys that C++ reads for many queries: they stay in the cache, and only the visible ones are read


def attention_serves(attn, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, heard: bool) -> bool:
    """Flash kernels give no gradient through their log-sum-exp, on which the sink depends, and tell no scores."""
    if gpu.serves(q, k):
        return not heard
    if heard:
        return near(q, k, v, sinks) and not attn.edited(*attn.inner_points)
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return q.device.type == "cpu" and not grad


def near(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> bool:
    """Few keys, or one query: C++ is quicker than a flash kernel, and tells its scores."""
    return (q.shape[1] == 1 or k.shape[1] <= NEAR) and plain(q, k, v, sinks)


def attention(
    attn, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Visible, heard: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [b s H h], k and v [b t K h], sinks [b H s] -> z [b s H h], sink_mass [b H s]

    A softmax over [scores, sink] is the softmax over the scores times sigmoid(lse - sink), lse being the log of the
    sum of exp(scores), which flash kernels return; sigmoid(sink - lse) is the sink's mass.
    """
    if gpu.serves(q, k):
        from .gpu import attention as kernels

        return kernels.attention(q, k, v, sinks, visible)
    if near(q, k, v, sinks):
        k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (k, v))
        made = made_for(attn, q, [(*sinks.shape, k.shape[1])] * 2) if heard else (None, None)
        z, sink_mass = cpu.attend(q.contiguous(), k, v, sinks.contiguous(), visible.query.contiguous(),
                                  visible.key.contiguous(), visible.window, *made)  # fmt: skip
        tell(attn, made)
        return z, sink_mass
    # Some queries at a time: the mask does not grow with the square of the text, and a window skips the keys before it.
    rows = QUERIES if visible.window is None else max(visible.window, 64)
    if q.shape[1] > rows:
        parts = []
        for begin in range(0, q.shape[1], rows):
            some = slice(begin, begin + rows)
            seen, keys = visible.of(some)
            parts.append(attention(attn, q[:, some], k[:, keys], v[:, keys], sinks[..., some], seen, heard))
        z, sink_mass = zip(*parts)
        return torch.cat(z, dim=1), torch.cat(sink_mass, dim=2)
    z, lse = flash(q, k, v, visible.mask)
    keep = torch.sigmoid(lse - sinks).unsqueeze(-1).to(z.dtype)
    return (z * keep).transpose(1, 2), torch.sigmoid(sinks - lse).to(z.dtype)


def flash(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Without a sink.   q [b s H h], k and v [b t K h], visible [b or 1, 1, s, t] -> [b H s h], lse [b H s]"""
    b, s, n_heads, _ = q.shape
    groups = n_heads // k.shape[2]
    # The kernel wants a key head for each query head: a key head and its queries become a sequence of their own.
    q = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k, v = (x.transpose(1, 2).flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v))
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    if len(mask) > 1:
        mask = mask.repeat_interleave(len(q) // b, dim=0)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the kernel does not look
    z, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    return z.reshape(b, n_heads, s, -1), lse.reshape(b, n_heads, s)


# ------------------------------------------------------------------------------------------ experts

SLOTS = 256  # tokens times experts of each that C++ multiplies
PIECE = 96  # rows of a matrix unpacked at a time, in bfloat16 192: 1.1 MB at the published width, the second cache


def mix_serves(moe, x: Tensor, heard: bool) -> bool:
    """Not for layers that somebody replaced or hooked: `MoE.mix` calls them."""
    return moe.as_built and not (heard and (moe.edited(*moe.inner_points) or not plain_experts(moe, x)))


def plain_experts(moe, x: Tensor) -> bool:
    """Of float32 numbers, for C++."""
    if moe.gate_up.packed or moe.down.packed:
        return False
    weights = moe.gate_up.weight, moe.gate_up.bias, moe.down.weight, moe.down.bias
    return plain(x, *weights) and all(weight.is_contiguous() for weight in weights)


def mix(moe, x: Tensor, indices: Tensor, weights: Tensor, heard: bool) -> Tensor:
    """The chosen experts, each over the tokens that chose it.   x [b s d], indices and weights [b s k] -> [b s d]"""
    if moe.gate_up.packed and moe.down.packed and gpu.serves(x, moe.gate_up.blocks, moe.down.blocks):
        from .gpu import experts as kernels

        return kernels.mix(moe, *(y.flatten(0, 1) for y in (x, indices, weights))).view_as(x)
    if packed_serves(moe, x):
        return mix_packed(moe, x, indices, weights)
    if plain_experts(moe, x):
        d, f = moe.config.d_model, moe.config.d_ff
        made = made_for(moe, x, [(*indices.shape, f)] * 5 + [(*indices.shape, d)]) if heard else (None,) * 6
        if indices.numel() <= SLOTS:
            out = cpu.mix(moe, x.contiguous(), indices.contiguous(), weights.contiguous(), made)
        else:
            out = mix_sorted(moe, x, indices, weights, made)
        tell(moe, made)
        return out
    one_token = x.shape[:-1].numel() == 1
    if one_token and by_hand(x) and product_is_turned(1, x.shape[-1], moe.gate_up.bias.shape[1], x):
        return mix_one_token(moe, x.flatten(0, 1), indices.flatten(), weights.flatten(0, 1)).view_as(x)
    return mix_sorted(moe, x, indices, weights)


def mix_sorted(moe, x: Tensor, indices: Tensor, weights: Tensor, made=(None,) * 6) -> Tensor:
    """One expert's rows after another's. What is made inside goes to `made` as well."""
    tokens, experts = x.flatten(0, 1), indices.flatten()
    order, counts = experts.argsort(), experts.bincount(minlength=moe.config.n_experts).tolist()
    rows = order // indices.shape[-1]
    used = [(e, n) for e, n in enumerate(counts) if n]
    out, end = torch.zeros_like(tokens, memory_format=torch.contiguous_format), 0
    # Few rows: fewer operations over all of them. Many: one expert after the other, each while it is in the cache.
    for group in [used] if len(rows) <= 256 else [[one] for one in used]:
        group, sizes = zip(*group)
        mine = slice(end, end := end + sum(sizes))
        parts = zip(group, tokens.index_select(0, rows[mine]).split(sizes))
        h = _join([product(part, moe.gate_up.matrix(e), moe.gate_up.bias[e]) for e, part in parts])
        parts = zip(group, swiglu(h, moe.config, order[mine], made[:5]).split(sizes))
        y = _join([product(part, moe.down.matrix(e), moe.down.bias[e]) for e, part in parts])
        if plain(y, weights):
            cpu.add_rows(y.contiguous(), order[mine], weights.contiguous(), out, made[5])
        else:
            out = out.index_add_(0, rows[mine], y * weights.flatten()[order[mine]].unsqueeze(-1))
    return out.view_as(x)


def mix_one_token(moe, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Nothing to sort; products of two columns, as above.   x [1 d], experts [k], weights [1 k] -> [1 d]"""
    chosen = experts.tolist()
    pair = torch.cat([x, x]).t()
    h = torch.stack([torch.mm(moe.gate_up.matrix(expert), pair) for expert in chosen]).select(-1, 0)
    post = swiglu(h + moe.gate_up.bias[experts], moe.config)
    pairs = post.unsqueeze(1).expand(-1, 2, -1).contiguous().mT.unbind()
    y = torch.stack([torch.mm(moe.down.matrix(expert), pair) for expert, pair in zip(chosen, pairs)]).select(-1, 0)
    return torch.mm(weights, y + moe.down.bias[experts])


def packed_serves(moe, x: Tensor) -> bool:
    """MXFP4 as it is stored, with what multiplies it without unpacking it whole."""
    if not (moe.gate_up.packed and moe.down.packed and by_hand(x) and x.dtype in (torch.float32, torch.bfloat16)):
        return False
    return cpu.serves(moe.gate_up.blocks, moe.gate_up.scales, moe.down.blocks, moe.down.scales)


def mix_packed(moe, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """As `mix`; sums in float32, rounded to x's dtype where the readable way rounds."""
    (n, d), k, experts = x.flatten(0, 1).shape, indices.shape[-1], indices.flatten()
    at = torch.arange(n * k)
    post = swiglu(packed_product(moe.gate_up, x.reshape(n, d), experts, at // k), moe.config)
    y = packed_product(moe.down, post, experts, at).float()
    return (weights.reshape(n, k, 1).float() * y.view(n, k, d)).sum(1).to(x.dtype).view_as(x)


def packed_product(layer, x: Tensor, experts: Tensor, rows: Tensor) -> Tensor:
    """Row rows[i] of x through expert experts[i], bias and all.   x [m in], experts and rows [n] -> [n out]

    A vector or a few are multiplied by the packed numbers; many by a piece of the matrix that stays in the cache: of
    bfloat16 where x is and the processor multiplies it, in 0.4 of the time.
    """
    counts = experts.bincount(minlength=len(layer.bias))
    if counts.max() <= FEW:
        y = cpu.multiply(layer.blocks, layer.scales, experts, rows, x)
        return (y + layer.bias[experts]).to(x.dtype)
    wide = x.dtype if cpu.bf16_is_quick() else torch.float32
    y, order, begin = x.new_empty(len(experts), layer.bias.shape[1]), experts.argsort(stable=True), 0
    for expert, count in enumerate(counts.tolist()):
        mine = order[begin : begin + count]
        begin += count
        if 0 < count <= FEW:
            part = cpu.multiply(layer.blocks, layer.scales, experts[mine], rows[mine], x)
            y[mine] = (part + layer.bias[expert]).to(x.dtype)
        elif count:
            part, bias = x.index_select(0, rows[mine]).to(wide), layer.bias[expert].to(wide)
            out, n = part.new_empty(count, y.shape[1]), PIECE * 4 // wide.itemsize
            for at in range(0, y.shape[1], n):
                piece = slice(at, at + n)
                w = cpu.unpack(layer.blocks[expert, piece], layer.scales[expert, piece], wide)
                out[:, piece] = F.linear(part, w, bias[piece])
            y[mine] = out.to(x.dtype)
    return y


def swiglu(h: Tensor, config, place: Tensor | None = None, made=(None,) * 5) -> Tensor:
    """gate * sigmoid(alpha * gate) * (linear + 1), clamped; for `place` and `made` see cpu.swiglu.   [n 2f] -> [n f]"""
    limit = config.swiglu_limit
    if plain(h):
        return cpu.swiglu(h.contiguous(), limit, config.swiglu_alpha, place, made)
    gate, linear = h.view(h.shape[0], -1, 2).unbind(-1)  # rows alternate: gate 0, linear 0, gate 1, ...
    gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    post = (config.swiglu_alpha * gate).sigmoid_() * gate
    return torch.addcmul(post, post, linear)


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
