"""Golden data kept beside the checkout. A test that needs it skips, saying so, where it is absent."""
import json
import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("GPTOSS_LAB_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FACTS = SHARED / "facts"
TOKENIZER = SHARED / "tokenizer"

needs_facts = pytest.mark.skipif(not FACTS.is_dir(), reason="the golden data (../shared/facts) is not here")
needs_vocabulary = pytest.mark.skipif(
    not TOKENIZER.is_dir() and not os.environ.get("TIKTOKEN_CACHE_DIR"),
    reason="the o200k vocabulary (../shared/tokenizer or TIKTOKEN_CACHE_DIR) is not here",
)

# Set before tiktoken or openai_harmony is imported anywhere: both read their vocabulary from these folders.
if TOKENIZER.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TOKENIZER))
    os.environ.setdefault("TIKTOKEN_RS_CACHE_DIR", str(TOKENIZER))


def facts(name: str):
    """The parsed JSON file `name` of the golden data; skips the test where the data is absent."""
    if not (FACTS / name).is_file():
        pytest.skip(f"golden data {name} is not here (looked in {FACTS.name}/)")
    return json.loads((FACTS / name).read_text())
