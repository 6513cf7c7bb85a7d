"""The same numbers sooner. The model comes here only where nobody listens to a value that is not made here."""
import torch
import torch.nn.functional as F
from torch import Tensor


def attention_serves(q: Tensor, k: Tensor) -> bool:
    """The CPU flash kernel gives no gradient through its log-sum-exp, on which the sink depends."""
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    return q.device.type == "cpu" and not grad


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """q [b s H h], k and v [b t K h], sinks [b H s], visible [b 1 s t] -> z [b s H h], sink_mass [b H s]

    A softmax over [scores, sink] is the softmax over the scores times sigmoid(lse - sink), lse being the log of the
    sum of exp(scores), which flash kernels return; sigmoid(sink - lse) is the sink's mass.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k, v))
    mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    z, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.transpose(1, 2), k, v, attn_mask=mask)
    keep = torch.sigmoid(lse - sinks).unsqueeze(-1).to(z.dtype)
    return (z * keep).transpose(1, 2), torch.sigmoid(sinks - lse).to(z.dtype)


def mix(moe, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The chosen experts one after the other, each over the tokens that chose it.   [b s d] -> [b s d]"""
    tokens, experts = x.flatten(0, 1), indices.flatten()
    order = experts.argsort()
    rows, counts = order // indices.shape[-1], experts.bincount(minlength=moe.config.n_experts).tolist()
    limit, alpha = moe.config.swiglu_limit, moe.config.swiglu_alpha
    parts = []
    for expert, chosen in enumerate(tokens[rows].split(counts)):
        if len(chosen):
            h = F.linear(chosen, moe.gate_up.matrix(expert), moe.gate_up.bias[expert])
            gate, linear = h.unflatten(-1, (-1, 2)).unbind(-1)  # rows alternate: gate 0, linear 0, gate 1, ...
            gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
            post = gate * torch.sigmoid(alpha * gate) * (linear + 1)
            parts.append(F.linear(post, moe.down.matrix(expert), moe.down.bias[expert]))
    y = torch.cat(parts) * weights.flatten()[order].unsqueeze(-1)
    return torch.zeros_like(tokens).index_add_(0, rows, y).view_as(x)
