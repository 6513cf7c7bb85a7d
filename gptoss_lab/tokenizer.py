"""Text <-> token ids: gpt-oss's own vocabulary through tiktoken, and small vocabularies of our own.

Every vocabulary here is a `tiktoken.Encoding`: `encode_ordinary(text)` for text, `decode(tokens)` back. The
names of special tokens inside text are refused by `encode` and are ordinary text to `encode_ordinary`.
"""

import base64
import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

# tiktoken_ext/openai_public.py: where o200k_base comes from, its hash, and the name tiktoken caches it under.
URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
CACHE_NAME = hashlib.sha1(URL.encode()).hexdigest()

# tiktoken_ext/openai_public.py, o200k_base: how text is cut into pieces before any piece becomes tokens.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTION,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endofprompt|>",
)

FILE = "tokenizer.tiktoken.json"


class VocabularyMissing(RuntimeError):
    """The o200k vocabulary is neither on this machine nor within reach. The message says how to bring it."""


@functools.cache
def o200k_harmony() -> "tiktoken.Encoding":
    """The vocabulary of gpt-oss: 201,088 ids, 199,998 of them text and the rest special.

    Id 200018 has two names, `<|endofprompt|>` and `<|reserved_200018|>`; both encode to it. The first call
    reads 3.6 MB, from tiktoken's cache folder or else from the network.

    Raises:
        VocabularyMissing: no valid copy in the cache folder, and the network does not answer.

    Examples:
        >>> o200k_harmony().encode_ordinary("Roses are red")  # doctest: +SKIP
        [49, 14301, 553, 3592]
    """
    import requests
    import tiktoken

    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    default = Path(tempfile.gettempdir(), "data-gym-cache")
    file = Path(default if folder is None else folder, CACHE_NAME)
    found = "is not there"
    if folder != "" and file.is_file():  # "" switches tiktoken's cache off
        found = "is damaged"
        if hashlib.sha256(file.read_bytes()).hexdigest() == SHA256:
            return tiktoken.get_encoding("o200k_harmony")
    try:
        requests.head(URL, timeout=5).raise_for_status()  # tiktoken's own download waits without limit
        return tiktoken.get_encoding("o200k_harmony")
    except (OSError, ValueError) as error:
        raise VocabularyMissing(
            f"the o200k vocabulary cannot be had: {file} {found}, and the download failed ({error}).\n"
            "To bring it by hand, on a machine with a network:\n"
            "  TIKTOKEN_CACHE_DIR=vocabulary python -c 'import tiktoken; "
            'tiktoken.get_encoding("o200k_harmony")\'\n'
            f"then copy vocabulary/{CACHE_NAME} (3,613,922 bytes, sha256 {SHA256[:8]}...)\n"
            "to a folder here and set TIKTOKEN_CACHE_DIR to that folder."
        ) from error


def special(encoding: "tiktoken.Encoding", name: str) -> int:
    """The id of the special token called `name`, such as `<|call|>`.

    Raises:
        ValueError: `encoding` has no special token of that name.

    Examples:
        >>> special(tiny(), "<|start|>")
        507
    """
    try:
        token = encoding.encode_single_token(name)
    except KeyError:
        token = None
    if token is None or not encoding.is_special_token(token):
        known = ", ".join(sorted(s for s in encoding.special_tokens_set if not s.startswith("<|reserved_")))
        raise ValueError(f"the vocabulary {encoding.name!r} has no special token {name!r}; it has {known}")
    return token


def build(pieces: list[str], name: str) -> "tiktoken.Encoding":
    """A vocabulary of 256 bytes (ids 0 to 255), then `pieces`, then the ten `SPECIALS`.

    tiktoken cuts text with `PATTERN` and looks each cut up whole before it merges anything, so a listed piece
    is one token without any merges leading to it. A cut that is not listed falls back to bytes, joined where
    two neighbours happen to spell a listed piece; any text comes back unchanged from `decode`.

    Raises:
        ValueError: a piece is listed twice, is a single byte, or is one that `PATTERN` would cut apart and so
            could never be a token.

    Examples:
        >>> roses = build(["Roses", " are", " red"], "roses")
        >>> roses.n_vocab, roses.encode_ordinary("Roses are red!")
        (269, [256, 257, 258, 33])
    """
    ranks = {bytes([b]): b for b in range(256)}
    for piece in pieces:
        if piece.encode() in ranks:
            raise ValueError(f"the piece {piece!r} of {name!r} is already in the vocabulary")
        ranks[piece.encode()] = len(ranks)
    encoding = _encoding(name, PATTERN, ranks, {s: len(ranks) + i for i, s in enumerate(SPECIALS)})
    for piece in pieces:
        if encoding.encode_ordinary(piece) != [ranks[piece.encode()]]:
            raise ValueError(f"the piece {piece!r} of {name!r} can never be a token: the pattern cuts it")
    return encoding


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> "tiktoken.Encoding":
    import tiktoken

    ids = [*ranks.values(), *set(specials.values())]  # two names may share one special id
    if sorted(ids) != list(range(len(ids))):
        raise ValueError(f"the ids of {name!r} are not 0 to {len(ids) - 1}, each once")
    if absent := [b for b in range(256) if bytes([b]) not in ranks]:
        raise ValueError(f"{name!r} has no token for the bytes {absent}: it cannot encode every text")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


@functools.cache
def tiny() -> "tiktoken.Encoding":
    """The vocabulary of the tiny model, 512 ids: 256 bytes, 246 pieces, ten specials. It needs no file.

    The pieces are the words and signs of the texts that the model is trained on, listed in tiny/words.py.
    Most of the bytes are not: their embeddings stay nearly what they were before training.

    Examples:
        >>> tiny().n_vocab, tiny().encode_ordinary("One dog saw a red fish")
        (512, [471, 288, 333, 350, 296, 291])
    """
    from .tiny.words import pieces

    return build(pieces(), "tiny")


def save(encoding: "tiktoken.Encoding", folder: str | Path) -> Path:
    """Write a vocabulary into `folder` as JSON (`tokenizer.tiktoken.json`), whole or not at all.

    Raises:
        OSError: the folder is missing or cannot be written.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(tiny(), folder).name, load(folder).n_vocab
        ('tokenizer.tiktoken.json', 512)
    """
    text = json.dumps(
        {
            "name": encoding.name,
            "pattern": encoding._pat_str,
            "ranks": {base64.b64encode(p).decode(): rank for p, rank in encoding._mergeable_ranks.items()},
            "specials": encoding._special_tokens,
        },
        indent=0,
    )
    path = Path(folder, FILE)
    part = path.with_name(f"{FILE}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load(folder: str | Path) -> "tiktoken.Encoding | None":
    """The vocabulary that `save` wrote into `folder`; None where there is none.

    Raises:
        ValueError: the file is there and does not describe a vocabulary.

    Examples:
        >>> load("no such folder") is None
        True
    """
    path = Path(folder, FILE)
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
        ranks = {base64.b64decode(piece, validate=True): rank for piece, rank in stored["ranks"].items()}
        return _encoding(stored["name"], stored["pattern"], ranks, stored["specials"])
    except KeyError as error:
        raise ValueError(f"{path} has no entry {error}; write it with gptoss_lab.tokenizer.save") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a saved vocabulary: {error}") from error
