"""What every test stands on: data found before tiktoken looks for it, fixed seeds, runs that repeat."""
import os
import random
from pathlib import Path

import hypothesis
import hypothesis.configuration
import numpy as np
import pytest
import shared  # noqa: F401  sets where tiktoken finds its vocabulary: before anything imports that
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: see kernels.py

ROOT = Path(__file__).resolve().parent.parent

# Fixed, so that a sum is made in the same order on every machine; not one, so that threaded code is tested.
torch.set_num_threads(2)

# The same examples in every run. To look for new ones: pytest --hypothesis-profile=explore
hypothesis.configuration.set_hypothesis_home_dir(ROOT / ".cache" / "hypothesis")
hypothesis.settings.register_profile("repeat", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeat")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from seed 0, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
