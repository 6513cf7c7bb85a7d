"""Controls with a model behind them: move one, and see what the model does now. One question a file.

    attention.py   what does a head read of your text, and what goes to its sink?      attention(model)
    experts.py     what changes when an expert is taken away?                          experts(model)
    window.py      which heads copy when other layers slide, or see more or less?      window(model)
    context.py     what does a text beyond the trained length cost?                    context(model)

Each gives an Explorer (panel.py) that the last line of a notebook cell shows. What it draws comes from a plain
function of its file, which needs no notebook: `head_picture`, `expert_picture`, `window_picture`, `context_picture`.
"""
from .attention import attention, head_picture
from .context import context, context_picture
from .experts import expert_picture, experts
from .panel import Explorer
from .window import window, window_picture

__all__ = ["Explorer", "attention", "context", "context_picture", "expert_picture", "experts", "head_picture",
           "window", "window_picture"]  # fmt: skip
