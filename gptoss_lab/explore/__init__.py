"""Controls with a model behind them: move one, and see what the model does now. One question a file.

    attention.py   what does a head read of your text, and what goes to its sink?      attention(model)
    groups.py      what do the query heads read that share one key/value head?         groups(model)
    rotation.py    how does a head know distance?                                      rotation(model)
    scaling.py     which rotary planes does YaRN keep, blend, stretch?                 scaling(model or config)
    sink.py        what does a head do when its sink draws more, or less?              sink(model)
    window.py      which heads copy when other layers slide, or see more or less?      window(model)
    context.py     what does a text beyond the trained length cost?                    context(model)
    experts.py     what changes when an expert is taken away?                          experts(model)
    block.py       how do 4 bits hold a number?                                        block(), without a model

Each gives an Explorer (panel.py) that the last line of a notebook cell shows. What it draws comes from a plain
function of its file, which needs no notebook: `head_picture`, `groups_picture`, `rotation_picture` and so on. In a
notebook that is run to be kept, without a kernel to come, it is a slider through pictures drawn beforehand.
"""
from .attention import attention, head_picture
from .block import block, block_picture
from .context import context, context_picture
from .experts import expert_picture, experts
from .groups import groups, groups_picture
from .panel import Explorer
from .rotation import rotation, rotation_picture
from .scaling import scaling, scaling_picture
from .sink import sink, sink_picture
from .window import window, window_picture

__all__ = ["Explorer", "attention", "block", "block_picture", "context", "context_picture", "expert_picture", "experts",
           "groups", "groups_picture", "head_picture", "rotation", "rotation_picture", "scaling", "scaling_picture",
           "sink", "sink_picture", "window", "window_picture"]  # fmt: skip
