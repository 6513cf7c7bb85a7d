"""gptoss_lab: look at any value inside gpt-oss while it works, change it, and see what follows.

>>> import torch, gptoss_lab as lab
>>> model = lab.load("tiny")
>>> with lab.record(model, "blocks.1.attn.hook_pattern") as acts:
...     logits = model(torch.arange(20)[None])
"""
from .checkpoint import CheckpointError, chosen, load
from .config import Config, ConfigError, Yarn
from .generate import generate, stream
from .hooks import Activations, HookPoint, cost, edit, record
from .kv_cache import KVCache
from .model import GptOss
from .saving import save

__version__ = "0.1.0"
__all__ = ["Activations", "CheckpointError", "Config", "ConfigError", "GptOss", "HookPoint", "KVCache", "Yarn",
           "chosen", "cost", "edit", "generate", "load", "record", "save", "stream"]  # fmt: skip
