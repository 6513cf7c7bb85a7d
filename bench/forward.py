"""One forward pass over a batch: idle, and with values recorded."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import models
from .timing import Goal, interleave, report

PRODUCTS = "ours, its matrix products alone"
HF, OURS, BARE = "Hugging Face", "ours, idle", "ours, hooks deleted"
DEFAULT, ALL = "ours, default group recorded", "ours, all but hook_result recorded"
TL, TL_ALL = "TransformerLens, idle", "TransformerLens, all recorded"
NNSIGHT, NNSIGHT_FOUR = "nnsight, logits", "nnsight, logits and every layer's output"
RECORDING = (DEFAULT, ALL, TL_ALL, NNSIGHT_FOUR)

SIZES = {(4, 256): 0.7, (1, 16): 0.5}  # batch, positions: the goal for our time over Hugging Face's


def everything(name: str) -> bool:
    """Every point but the d_model numbers a head and position of `hook_result`."""
    return not name.endswith("hook_result")


def runs(ours: nn.Module, peers: dict[str, nn.Module], tokens: Tensor) -> dict:
    """Calls that return logits, by name, for the libraries at hand."""
    bare = models.without_hooks(ours)
    with Products() as products:
        ours(tokens)
    calls = {
        OURS: lambda: ours(tokens),
        BARE: lambda: bare(tokens),
        PRODUCTS: products.again,
        DEFAULT: lambda: ours.run_with_cache(tokens)[0],
        ALL: lambda: ours.run_with_cache(tokens, everything)[0],
    }
    if hf := peers.get("transformers"):
        calls[HF] = lambda: hf(tokens).logits
    if tl := peers.get("transformer-lens"):
        calls[TL] = lambda: tl(tokens)
        calls[TL_ALL] = lambda: tl.run_with_cache(tokens)[0]
    if wrapped := peers.get("nnsight"):
        calls[NNSIGHT] = lambda: traced(wrapped, tokens, [])
        calls[NNSIGHT_FOUR] = lambda: traced(wrapped, tokens, wrapped.model.layers)
    return calls


class Products(TorchFunctionMode):
    """Notes every product with a weight inside the `with` block."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.linear, torch.mm, torch.addmm):
            self.given.append((function, args))
        return function(*args, **(kwargs or {}))

    def again(self) -> Tensor:
        """Every product once more, nothing between them. Returns the last: the logits."""
        for function, args in self.given:
            y = function(*args)
        return y if y.dim() == 3 else y.t()[None]  # few rows are columns


def traced(wrapped, tokens: Tensor, layers) -> Tensor:
    """The logits, after saving the outputs of `layers` with them."""
    with wrapped.trace(tokens):
        for layer in layers:
            layer.output.save()
        logits = wrapped.lm_head.output.save()
    return logits


def goals(over_hf: float) -> list[Goal]:
    return [
        Goal(OURS, HF, at_most=over_hf),
        Goal(OURS, BARE, at_most=1.03),
        Goal(DEFAULT, BARE, at_most=1.05),
        Goal(ALL, BARE, at_most=1.3),
        Goal(ALL, HF),
        Goal(PRODUCTS, HF),
        *(Goal(other, HF) for other in (TL, TL_ALL, NNSIGHT, NNSIGHT_FOUR)),
    ]


def main(ours: nn.Module, peers: dict[str, nn.Module], rounds: int) -> None:
    """Assert that all give equal logits, then time them; the short size in ten times as many rounds.

    Recording has rounds of its own: hundreds of megabytes that come and go slow whoever is next.
    """
    for (batch, length), over_hf in SIZES.items():
        rng = torch.Generator().manual_seed(1)
        tokens = torch.randint(ours.config.d_vocab, (batch, length), generator=rng)
        with torch.no_grad():
            calls = runs(ours, peers, tokens)
            expected = calls[HF if HF in calls else OURS]()
            for name, call in calls.items():
                torch.testing.assert_close(call(), expected, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
            idle = {name: call for name, call in calls.items() if name not in RECORDING}
            recording = {name: call for name, call in calls.items() if name in (*RECORDING, HF, BARE)}
            for what, group in {"idle": idle, "recording": recording}.items():
                times = interleave(group, rounds if batch * length > 100 else 10 * rounds)
                report(f"forward, {batch} x {length} tokens, {what}", times, goals(over_hf))
