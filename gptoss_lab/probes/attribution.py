"""Who wrote the answer? A logit as a sum over everything that ever wrote into the residual stream."""
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..hooks import Activations, record, unwrapped
from ..model import GptOss
from .result import Result, frame, stacked


@dataclass(frozen=True)
class Attribution(Result):
    """What each part adds to a logit (or to the difference of two), with the final norm's scale as it was.

    embed [b]; head [L b H], what the head reads, as if it had no sink; sink [L b H], what the sink takes from that:
    -mass / (1 - mass) of the head's write; bias [L b], the attention's output bias; expert [L b k], each chosen expert
    times its weight; experts [L b k], which they are; logit [b], the model's own. The parts sum to it:
    embed + head + sink + bias + expert = logit. No weight is folded: with sinks, a value bias is not a constant.
    """

    points: ClassVar[tuple[str, ...]] = (
        "hook_embed", "*.attn.hook_result", "*.attn.hook_sink_mass", "*.mlp.hook_expert_weights",
        "*.mlp.hook_expert_indices", "*.mlp.hook_expert_out", "ln_final.hook_scale", "hook_logits",
    )  # fmt: skip

    embed: Tensor
    head: Tensor
    sink: Tensor
    bias: Tensor
    expert: Tensor
    experts: Tensor
    logit: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, acts: Activations, *, model: GptOss, answer: Tensor, against: Tensor | None = None,
           position: int = -1) -> "Attribution":  # fmt: skip
        """Args:
            answer: [b] ids of the tokens whose logits are explained.
            against: [b] ids whose logits are subtracted.
            position: where in the text.

        Raises:
            ValueError: ids of another number than the rows, or no such position.
            ArithmeticError: a head gives its sink everything, so that nothing says what it would have read.
        """
        model, logits = unwrapped(model), acts["hook_logits"]
        b, s = logits.shape[:2]
        answer = torch.as_tensor(answer).reshape(-1) if not isinstance(answer, Tensor) or answer.dim() == 0 else answer
        for name, ids in (("answer", answer), ("against", against)):
            if ids is not None and ids.shape != (b,):
                raise ValueError(f"{name} has shape {tuple(ids.shape)}: one id for each of {b} rows is needed")
        if not -s <= position < s:
            raise ValueError(f"position {position}: the text has {s}")
        wide = torch.promote_types(logits.dtype, torch.float32)
        direction = model.unembed.weight[answer].to(wide)
        direction = direction if against is None else direction - model.unembed.weight[against].to(wide)
        direction = direction * model.ln_final.weight / acts["ln_final.hook_scale"][:, position]  # [b d]
        at = lambda x: x.select(2, position).to(wide)
        result, mass = at(stacked(acts, "attn.hook_result")), stacked(acts, "attn.hook_sink_mass")[..., position]
        if (mass >= 1).any():
            layer, _, head = (mass >= 1).nonzero()[0].tolist()
            raise ArithmeticError(f"head {head} of layer {layer} gives its sink all of its mass")
        written = torch.einsum("LbHd, bd -> LbH", result, direction)
        output = at(stacked(acts, "mlp.hook_expert_out")) * at(stacked(acts, "mlp.hook_expert_weights")).unsqueeze(-1)
        biases = torch.stack([block.attn.out.bias for block in model.blocks]).to(wide)
        picked = logits[:, position].to(wide)
        logit = picked.gather(1, answer[:, None])[:, 0]
        if against is not None:
            logit = logit - picked.gather(1, against[:, None])[:, 0]
        return cls(
            embed=(acts["hook_embed"][:, position].to(wide) * direction).sum(-1), head=written / (1 - mass),
            sink=-written * mass / (1 - mass), bias=torch.einsum("Ld, bd -> Lb", biases, direction),
            expert=torch.einsum("Lbkd, bd -> Lbk", output, direction),
            experts=stacked(acts, "mlp.hook_expert_indices").select(2, position), logit=logit,
        )  # fmt: skip

    @classmethod
    @torch.no_grad()
    def measure(cls, model: nn.Module, tokens: Tensor, **about) -> "Attribution":
        with record(model, *cls.points) as acts:
            model(tokens)
        return cls.of(acts, model=model, **about)

    @property
    def total(self) -> Tensor:
        """The sum of all parts, which is the logit up to rounding.   -> [b]"""
        parts = (self.head.sum((0, 2)), self.sink.sum((0, 2)), self.bias.sum(0), self.expert.sum((0, 2)))
        return self.embed + sum(parts)

    def by_layer(self) -> Tensor:
        """What attention and experts of each layer add.   -> [L 2 b]"""
        attention = (self.head + self.sink).sum(-1) + self.bias
        return torch.stack([attention, self.expert.sum(-1)], dim=1)

    def frame(self, row: int = 0):
        """One line a part of one row of the batch."""
        lines = [("embed", None, None, self.embed[row])]
        for layer in range(len(self.head)):
            lines += [("head", layer, i, x) for i, x in enumerate(self.head[layer, row])]
            lines += [("sink", layer, i, x) for i, x in enumerate(self.sink[layer, row])]
            lines += [("bias", layer, None, self.bias[layer, row])]
            lines += [("expert", layer, int(i), x) for i, x in zip(self.experts[layer, row], self.expert[layer, row])]
        names = ("part", "layer", "index", "logit")
        return frame({name: [float(x) if name == "logit" else x for x in column]
                      for name, column in zip(names, zip(*lines))})  # fmt: skip

    def plot(self, row: int = 0, note: str = ""):
        """Layers by parts: which heads, sinks and experts wrote the logit, and which wrote against it?"""
        from ..show.maps import heat

        parts = {"head": self.head, "sink": self.sink, "expert": self.expert}
        columns = [f"{name} {i}" if name != "expert" else f"expert, rank {i + 1}"
                   for name, x in parts.items() for i in range(x.shape[-1])]  # fmt: skip
        x = torch.cat([x[:, row] for x in parts.values()], dim=-1)
        return heat(x, [f"layer {i}" for i in range(len(x))], columns, signed=True, value="logit", note=note,
                    title="who wrote the logit: green for, brown against")  # fmt: skip
