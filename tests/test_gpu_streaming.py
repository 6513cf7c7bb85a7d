"""The streaming probes by the GPU's flash kernel, in Triton's interpreter, beside the same by the CPU's."""
from types import SimpleNamespace

import pytest
import torch
from kernels import interpreted
from models import random_model, random_tokens, tiny_config

from gptoss_lab import KVCache
from gptoss_lab.probes import streaming


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 13])
def test_every_quantity_is_the_same_by_either_kernel(start, monkeypatch):
    module = interpreted("attention")
    monkeypatch.setattr(module, "flash_blocks", lambda cores: dict(ROWS=32, COLUMNS=16, num_warps=4))
    model = random_model(tiny_config(n_layers=2), dtype=torch.float32)
    tokens, labels, made = random_tokens(model.config, 2, 40), torch.arange(40) % 3, []
    for by_kernel in (False, True):  # the probe alone: the model itself reads on a CPU
        monkeypatch.setattr(streaming, "gpu", SimpleNamespace(serves=lambda *_, yes=by_kernel: yes))
        with streaming.attention(model, streaming.QUANTITIES, windows=[1, 5, 30], labels=labels, block=16) as stream:
            cache = KVCache(model.config)
            for some in (tokens[:, :start], tokens[:, start:]):
                if some.shape[1]:
                    model(some, cache=cache)
        made.append(stream.result())
    for name in ("sink_mass", "entropy", "mean_distance", "within", "on", "received"):
        cpu, gpu = (getattr(result, name) for result in made)
        torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
