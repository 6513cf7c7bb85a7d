"""A head without its sink, but as quiet as it was on average: what a sink does beyond turning a head down.

    volume = 1 - sinks.by_head()[3]                                # of a probes.sinks.Sinks of all layers
    cost = Effect.measure(model, tokens, fixed_volume(3, volume))  # as loud as before, but no longer by the text

With o the output of plain softmax attention, a head with a sink writes (1 - mass) o. `sinks.remove` makes the factor
1 everywhere, which changes two things at once: how loud the head is on average, and when it is quiet. Here the factor
is one number a head, so that only the second is lost.
"""
from collections.abc import Callable

from torch import Tensor

from .sinks import remove


def fixed_volume(layer: int, volume: Tensor) -> dict[str, Callable]:
    """An edit: no sinks in this layer, and each head's output times its `volume` [H], whatever there is to read.

    Raises:
        ValueError: `volume` is not one finite number for each head; their number is seen when the model runs.
    """
    if volume.dim() != 1 or not volume.isfinite().all():
        raise ValueError(f"volume = {volume.tolist()}: must be one finite number for each head, such as "
                         "1 - sinks.by_head()[layer]")  # fmt: skip

    def scaled(z: Tensor) -> Tensor:
        if len(volume) != z.shape[2]:
            raise ValueError(f"volume has {len(volume)} numbers, but layer {layer} has {z.shape[2]} heads")
        return z * volume.to(z)[:, None]

    return remove(layer) | {f"blocks.{layer}.attn.hook_z": scaled}
