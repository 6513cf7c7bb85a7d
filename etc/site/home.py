"""The live view of the home page, computed when the site is built. A hook of MkDocs."""
import torch

import gptoss_lab as lab
from gptoss_lab import show
from notebooks import raw  # beside this file: MkDocs looks there while it loads a hook

MARK = "<!-- live-view -->"
TEXT = "One sunny day, Tom had a red ball and Sue had a blue kite. Sue found the blue"


def view() -> str:
    """What every head of the tiny model reads in TEXT, the last layer first: it looks the kite up."""
    model = lab.load("tiny")
    tokens = torch.tensor([model.tokenizer.encode_ordinary(TEXT)])
    with torch.no_grad(), lab.record(model, "*.hook_pattern", "*.hook_sink_mass") as acts:
        model(tokens)
    layers = [*reversed(range(model.config.n_layers))]
    words = show.words(tokens, model.tokenizer)
    title = "the last layer reads back to the kite: choose a layer, a head, a word"
    return show.PatternView.recorded(acts, words, layers=layers, title=title, note="the tiny model")._repr_html_()


def on_page_markdown(markdown, page, config, files):
    return markdown.replace(MARK, raw(view())) if MARK in markdown else markdown
