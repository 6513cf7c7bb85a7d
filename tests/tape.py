"""What a CUDA graph does, on a CPU: the operations of one call again, on the same memory, and no look at a value."""
from collections.abc import Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Looked(RuntimeError):
    """The host looked at a value while a graph was captured."""


class Tape(TorchDispatchMode):
    """Inside, operations and Triton kernels are written down; `replay` does them again."""

    def __init__(self):
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise Looked(str(func))
        out = func(*args, **(kwargs or {}))

        def again():
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **(kwargs or {})))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.steps.append(again)
        return out

    def replay(self) -> None:
        for step in self.steps:
            step()


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """As gptoss_lab.fast.gpu.step.captured."""
    from triton.runtime.interpreter import InterpretedFunction

    for _ in range(2):
        run()
    tape, launch = Tape(), InterpretedFunction.run

    def kernel(self, *args, **kwargs):
        with tape_off(tape), mock.patch.multiple(torch.Tensor, **looks):
            launch(self, *args, **kwargs)
        tape.steps.append(lambda: launch(self, *args, **kwargs))

    def refuse(self, *args, **kwargs):
        raise Looked("a value was read on the host")

    looks = {name: getattr(torch.Tensor, name) for name in ("tolist", "item", "numpy", "__bool__", "__int__")}
    with mock.patch.object(InterpretedFunction, "run", kernel), mock.patch.multiple(
        torch.Tensor, **dict.fromkeys(looks, refuse)
    ), tape:
        run()
    return tape.replay


class tape_off:
    """Inside, the tape does not listen."""

    def __init__(self, tape: Tape):
        self.tape = tape

    def __enter__(self):
        self.tape.__exit__(None, None, None)

    def __exit__(self, *_):
        self.tape.__enter__()
