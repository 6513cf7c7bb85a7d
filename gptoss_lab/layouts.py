"""Where each tensor of the model lies in a checkpoint file: one table for reading, writing and checking."""
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from itertools import groupby

import torch
from torch import Tensor

from .config import Config
from .model import GptOss

# OpenAI's original/ folder and Hugging Face's MXFP4 files hold the same expert bytes; dense Hugging Face files are
# what `save_pretrained` writes after fine-tuning.
LAYOUTS = ("original", "hf-mxfp4", "hf-dense")

# Ours, OpenAI's, Hugging Face's; {l} is a layer. {q,k,v}: three tensors hold the rows of ours, one after the other.
_TABLE = """
embed.weight                   embedding.weight                  model.embed_tokens.weight
blocks.{l}.ln1.weight          block.{l}.attn.norm.scale         model.layers.{l}.input_layernorm.weight
blocks.{l}.attn.qkv.weight     block.{l}.attn.qkv.weight         model.layers.{l}.self_attn.{q,k,v}_proj.weight
blocks.{l}.attn.qkv.bias       block.{l}.attn.qkv.bias           model.layers.{l}.self_attn.{q,k,v}_proj.bias
blocks.{l}.attn.sinks          block.{l}.attn.sinks              model.layers.{l}.self_attn.sinks
blocks.{l}.attn.out.weight     block.{l}.attn.out.weight         model.layers.{l}.self_attn.o_proj.weight
blocks.{l}.attn.out.bias       block.{l}.attn.out.bias           model.layers.{l}.self_attn.o_proj.bias
blocks.{l}.ln2.weight          block.{l}.mlp.norm.scale          model.layers.{l}.post_attention_layernorm.weight
blocks.{l}.mlp.router.weight   block.{l}.mlp.gate.weight         model.layers.{l}.mlp.router.weight
blocks.{l}.mlp.router.bias     block.{l}.mlp.gate.bias           model.layers.{l}.mlp.router.bias
blocks.{l}.mlp.gate_up.blocks  block.{l}.mlp.mlp1_weight.blocks  model.layers.{l}.mlp.experts.gate_up_proj_blocks
blocks.{l}.mlp.gate_up.scales  block.{l}.mlp.mlp1_weight.scales  model.layers.{l}.mlp.experts.gate_up_proj_scales
blocks.{l}.mlp.gate_up.weight  -                                 model.layers.{l}.mlp.experts.gate_up_proj
blocks.{l}.mlp.gate_up.bias    block.{l}.mlp.mlp1_bias           model.layers.{l}.mlp.experts.gate_up_proj_bias
blocks.{l}.mlp.down.blocks     block.{l}.mlp.mlp2_weight.blocks  model.layers.{l}.mlp.experts.down_proj_blocks
blocks.{l}.mlp.down.scales     block.{l}.mlp.mlp2_weight.scales  model.layers.{l}.mlp.experts.down_proj_scales
blocks.{l}.mlp.down.weight     -                                 model.layers.{l}.mlp.experts.down_proj
blocks.{l}.mlp.down.bias       block.{l}.mlp.mlp2_bias           model.layers.{l}.mlp.experts.down_proj_bias
ln_final.weight                norm.scale                        model.norm.weight
unembed.weight                 unembedding.weight                lm_head.weight
"""
_NAMES = {ours: (original, hf) for ours, original, hf in map(str.split, _TABLE.strip().splitlines())}


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, and which part of which tensor of the model it is."""

    name: str  # in the file
    ours: str  # in the model's state dict
    shape: tuple[int, ...]  # in the file
    rows: tuple[int, int] | None = None  # of ours; None is all of them
    transposed: bool = False  # Hugging Face's dense experts are [E in out], ours [E out in]

    @property
    def packed(self) -> bool:
        """Is it a part of MXFP4 numbers: bytes, not numbers?"""
        return self.ours.endswith((".blocks", ".scales"))

    def of(self, tensor: Tensor) -> Tensor:
        """The view of our tensor that this piece holds, shaped as in the file."""
        return _part(tensor, self.rows, self.transposed)


def _part(tensor: Tensor, rows: tuple[int, int] | None, transposed: bool) -> Tensor:
    part = tensor if rows is None else tensor[slice(*rows)]
    return part.mT if transposed else part


@cache
def pieces(config: Config, layout: str) -> tuple[Piece, ...]:
    """Every tensor that a checkpoint of this layout holds, in the order of the model's state dict."""
    with torch.device("meta"):
        tensors = GptOss(config, packed=layout != "hf-dense").state_dict()
    q, kv = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    bounds = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    found = []
    for ours, tensor in tensors.items():
        layer = re.match(r"blocks\.(\d+)\.|", ours)[1] or ""
        name = _NAMES[ours.replace(layer, "{l}", bool(layer))][layout != "original"].replace("{l}", layer)
        if "{q,k,v}" in name:
            parts = [(name.replace("{q,k,v}", one), rows, False) for one, rows in bounds.items()]
        else:
            parts = [(name, None, ours.endswith(("gate_up.weight", "down.weight")))]
        found += [Piece(name, ours, tuple(_part(tensor, *how).shape), *how) for name, *how in parts]
    return tuple(found)


def recognise(names: set[str], config: Config) -> str | None:
    """The layout with which these tensor names have most in common; None where no layout has any."""
    common = {layout: len(names & {piece.name for piece in pieces(config, layout)}) for layout in layouts_of(config)}
    best = max(common, key=common.get)
    return best if common[best] else None


def layouts_of(config: Config) -> tuple[str, ...]:
    """The layouts that can hold this model: MXFP4 packs rows of a multiple of 32 numbers."""
    return LAYOUTS if config.d_model % 32 == config.d_ff % 32 == 0 else ("hf-dense",)


@cache
def table(config: Config, layout: str) -> dict[str, tuple[Piece, ...]]:
    """Each tensor of the model, and what it is made of."""
    return {ours: tuple(some) for ours, some in groupby(pieces(config, layout), lambda piece: piece.ours)}


is_gain = re.compile(r"(.*\.ln[12]|ln_final)\.weight").fullmatch


def dtypes(made_of: dict[str, tuple[Piece, ...]], stored: Callable[[str], torch.dtype], dtype=None) -> dict:
    """Of each tensor in the model: `dtype`, else the widest of those stored; packed bytes, then gains, as stored."""
    kept = {ours: reduce(torch.promote_types, (stored(one.name) for one in some)) for ours, some in made_of.items()}
    numbers = [ours for ours, some in made_of.items() if not some[0].packed]
    widest = reduce(torch.promote_types, (kept[ours] for ours in numbers if not is_gain(ours)))
    return kept | {ours: dtype or (kept[ours] if is_gain(ours) else widest) for ours in numbers}
