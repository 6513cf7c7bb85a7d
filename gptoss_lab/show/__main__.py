"""Draw the README's picture: `python -m gptoss_lab.show docs/img`."""
import argparse
from pathlib import Path

import torch

from ..checkpoint import load
from . import path, words

PROMPT = "One sunny day, Tom had a red ball and Sue had a blue kite. Sue found the blue"


def draw(folder: str | Path) -> Path:
    """Write one_token.png into `folder`: what "tiny" really computes on PROMPT."""
    model = load("tiny")
    tokens = torch.tensor([model.tokenizer.encode_ordinary(PROMPT)])
    with torch.no_grad():
        _, acts = model.run_with_cache(tokens, "*")
    fig = path(acts, words(tokens, model.tokenizer), model.tokenizer, note="the tiny model")
    file = Path(folder, "one_token.png")
    part = file.with_suffix(".part")
    part.write_bytes(fig.png())
    return part.replace(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="where the picture goes; it must exist")
    print(draw(parser.parse_args().folder))
