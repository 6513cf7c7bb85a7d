"""The tiny model: a gpt-oss of 1.4 million parameters, small enough to ship and trained enough to be true.

    words.py     its vocabulary          data.py      what it reads: eight domains of seeded text
    train.py     `gptoss-lab train-tiny` measure.py   what it has learnt, as numbers
    card.py      all of it: card.json      page.py      that as docs/tiny.md
    texts.py     its texts for any model
    weights/     the checkpoint, in Hugging Face's layout
"""
from pathlib import Path

from ..config import TINY, Config
from ..model import GptOss

WEIGHTS = Path(__file__).parent / "weights"


def untrained(config: Config = TINY) -> GptOss:
    """What the shipped model was before training: `load("tiny-random")`."""
    from .train import Recipe, initial

    return initial(Recipe(config=config)).eval()
