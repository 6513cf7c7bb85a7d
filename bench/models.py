"""One small random model: ours, ours with its hooks deleted, and the other libraries' where they are installed."""
import ast
import copy
import importlib
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from gptoss_lab import Config, GptOss, Yarn, save
from gptoss_lab.config import FULL, SLIDING

# What `pip install` calls each, and the version that docs/log.md has figures of.
PEERS = {"transformers": "5.23.0", "transformer-lens": "4.3.0", "nnsight": "0.8.1"}

# 28.6 MiB in float32, so that a forward pass is arithmetic and not only overhead; YaRN as in gpt-oss-20b.
CONFIG = Config(
    n_layers=4, d_model=256, n_heads=8, n_kv_heads=2, d_head=32, d_ff=256, n_experts=8, experts_per_token=4,
    d_vocab=1000, n_ctx=131_072, sliding_window=32, layer_types=(SLIDING, FULL) * 2, yarn=Yarn(32.0, 4096),
)  # fmt: skip


def missing(peer: str) -> str | None:
    """Why this peer is left out; None where it is installed."""
    try:
        version(peer)
    except PackageNotFoundError:
        return f"{peer} is not installed: left out (measured with {peer}=={PEERS[peer]})"
    return None


def ours(config: Config = CONFIG, seed: int = 0) -> GptOss:
    """A float32 model in which sinks, biases and gains count."""
    model, rng = GptOss(config), torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        mean = 1.0 if ".ln" in name or name.startswith("ln") else 0.0
        matrix = name.endswith("weight") and weight.dim() > 1 and not name.startswith("embed")
        std = weight.shape[-1] ** -0.5 if matrix else 1.0 if name.startswith("embed") else 0.3
        weight.copy_(mean + std * torch.randn(weight.shape, generator=rng))
    return model.eval()


# ------------------------------------------------------------------------------------------ ours, hooks deleted

HOOKED_FILES = ("rope", "model")  # every file of the package that names a hook point


GONE = {"heard": ast.Constant(False), "begin": ast.Constant(None), "listeners": ast.Tuple([], ast.Load())}


class Deleter(ast.NodeTransformer):
    """self.hook("name", x) -> x, self.heard(...) -> False, begin(...) -> None, module.listeners -> ()"""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called == "hook":
            return self.visit(node.args[1])
        return GONE.get(called) or self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        return GONE.get(node.attr) or self.generic_visit(node)


def without_hook_calls(source: str) -> ast.Module:
    """The syntax tree of a source file, less every call of the hook mechanism."""
    return ast.fix_missing_locations(Deleter().visit(ast.parse(source)))


def without_hooks(model: GptOss) -> nn.Module:
    """The same weights, not copies, in a GptOss whose source lost every call of the hook mechanism."""
    names = [f"gptoss_lab.{file}" for file in HOOKED_FILES]
    kept = {name: importlib.import_module(name) for name in names}
    try:
        for name, hooked in kept.items():  # in sys.modules, so that the model imports the rope without hooks
            tree = without_hook_calls(Path(hooked.__file__).read_text(encoding="utf-8"))
            bare = sys.modules[name] = types.ModuleType(name)
            bare.__package__ = "gptoss_lab"
            exec(compile(tree, f"{hooked.__file__} without hooks", "exec"), bare.__dict__)
    finally:
        sys.modules.update(kept)
    twin = bare.GptOss(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


# ------------------------------------------------------------------------------------------ the others


def hugging_face(model: GptOss) -> nn.Module:
    """The same weights as Hugging Face loads them, with its default attention and experts."""
    from transformers import GptOssForCausalLM

    with TemporaryDirectory() as folder:
        save(model, f"{folder}/model", "hf-dense")
        return GptOssForCausalLM.from_pretrained(f"{folder}/model").eval()


def _twin(hf: nn.Module) -> nn.Module:
    """A second Hugging Face model over the same memory, for a library that changes the one it is given."""
    twin = copy.deepcopy(hf)
    twin.load_state_dict(hf.state_dict(), assign=True)
    return twin


def transformer_lens(hf: nn.Module) -> nn.Module:
    """TransformerLens's bridge. `boot_transformers` would ask the hub for a tokenizer, this function does not."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(_twin(hf), "GptOssForCausalLM", hf_config=hf.config)


def nnsight(hf: nn.Module):
    """nnsight's wrapper."""
    from nnsight import NNsight

    return NNsight(_twin(hf))


def peers(model: GptOss) -> dict[str, nn.Module]:
    """The same model in every peer that is installed; the latter two stand on the first."""
    if missing("transformers"):
        return {}
    found = {"transformers": hugging_face(model)}
    for peer, wrap in {"transformer-lens": transformer_lens, "nnsight": nnsight}.items():
        if not missing(peer):
            found[peer] = wrap(found["transformers"])
    return found
