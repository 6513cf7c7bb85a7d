"""Vocabularies: o200k_harmony as tiktoken knows it, and those that this package builds."""

import base64
import doctest
import json
import os
import socket
import subprocess
import sys

import pytest
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st
from shared import needs_vocabulary
from tiktoken_ext import openai_public

from gptoss_lab import tokenizer

SPECIAL_IDS = {  # facts of the published tokenizer
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}
PROMPT = "Roses are red, violets are blue, I love you, and I love you too."

# text in which whole pieces, parts of pieces and names of special tokens meet
texts = st.lists(
    st.one_of(st.text(), st.sampled_from([*SPECIAL_IDS, *PROMPT.split(), " are", " violet", "\n\n", "é", "\ud800"]))
).map("".join)


def test_the_examples_in_the_docs_run():
    assert doctest.testmod(tokenizer).failed == 0


# --- o200k_harmony ---


@needs_vocabulary
def test_o200k_harmony_has_the_published_size_and_special_ids():
    encoding = tokenizer.o200k_harmony()
    assert encoding.n_vocab == 201_088
    assert {name: tokenizer.special(encoding, name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert encoding.encode_ordinary("Roses are red") == [49, 14301, 553, 3592]  # as in the docstring


@needs_vocabulary
def test_id_200018_answers_to_both_of_its_names():
    encoding = tokenizer.o200k_harmony()
    assert tokenizer.special(encoding, "<|endofprompt|>") == 200018
    assert tokenizer.special(encoding, "<|reserved_200018|>") == 200018
    assert encoding.encode("<|endofprompt|><|reserved_200018|>", allowed_special="all") == [200018, 200018]
    assert encoding.decode([200018]) in ("<|endofprompt|>", "<|reserved_200018|>")


@needs_vocabulary
def test_our_copy_of_the_pattern_and_address_is_tiktokens(monkeypatch):
    asked, read = [], tiktoken.load.read_file_cached
    monkeypatch.setattr(tiktoken.load, "read_file_cached", lambda *a: asked.append(a) or read(*a))
    assert openai_public.o200k_base()["pat_str"] == tokenizer.PATTERN
    assert asked == [(tokenizer.URL, tokenizer.SHA256)]
    assert tokenizer.CACHE_NAME == "fb374d419588a4632f3f557e76b4b70aebbca790"


@needs_vocabulary
@given(texts)
def test_any_text_comes_back_from_o200k_harmony_without_special_tokens(text):
    _round_trips(tokenizer.o200k_harmony(), text)


def _ask_without_network(cache, port=9) -> subprocess.CompletedProcess:
    """Ask a fresh process, whose way to the network is a port where nobody answers."""
    nowhere = {name: f"http://127.0.0.1:{port}" for name in ("HTTPS_PROXY", "https_proxy")}
    nowhere |= {"NO_PROXY": "", "no_proxy": ""}
    return subprocess.run(
        [sys.executable, "-c", "from gptoss_lab.tokenizer import o200k_harmony; o200k_harmony()"],
        env={**os.environ, **nowhere, "TIKTOKEN_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_missing_vocabulary_is_refused_with_the_way_to_get_it_though_the_network_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked = _ask_without_network(tmp_path, silent.getsockname()[1])  # fails here after 60 s
    assert "VocabularyMissing" in asked.stderr
    for needed in ("is not there", "TIKTOKEN_CACHE_DIR", tokenizer.CACHE_NAME, "3,613,922 bytes", "446a9538"):
        assert needed in asked.stderr


def test_a_damaged_vocabulary_is_refused_and_left_where_it_is(tmp_path):
    damaged = tmp_path / tokenizer.CACHE_NAME
    damaged.write_bytes(b"IQ== 0\n")
    asked = _ask_without_network(tmp_path)
    assert "VocabularyMissing" in asked.stderr and "is damaged" in asked.stderr
    assert damaged.read_bytes() == b"IQ== 0\n"


# --- vocabularies of our own ---


def test_tiny_has_256_bytes_246_pieces_and_ten_specials():
    encoding = tokenizer.tiny()
    assert encoding.n_vocab == 256 + 246 + 10
    assert [encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert encoding.special_tokens_set == set(SPECIAL_IDS)
    assert sorted(tokenizer.special(encoding, name) for name in SPECIAL_IDS) == list(range(502, 512))


def test_every_word_of_a_story_is_one_tiny_token():
    encoding = tokenizer.tiny()
    pieces = [encoding.decode([token]) for token in encoding.encode_ordinary("One day, Ann saw a red fish. The fish ran.")]
    assert pieces == "One| day|,| Ann| saw| a| red| fish|.| The| fish| ran|.".split("|")


def test_each_word_of_a_harmony_header_is_one_tiny_token():
    for word in (
        "system",
        "developer",
        "user",
        "assistant",
        "analysis",
        "commentary",
        "final",
        " to",
    ):
        assert len(tokenizer.tiny().encode_ordinary(word)) == 1, word


@given(texts)
def test_any_text_comes_back_from_tiny_without_special_tokens(text):
    _round_trips(tokenizer.tiny(), text)


def _round_trips(encoding, text):
    tokens = encoding.encode_ordinary(text)
    assert not any(encoding.is_special_token(token) for token in tokens)
    # a lone surrogate is not a character: tiktoken reads it as U+FFFD
    assert encoding.decode(tokens) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_encode_refuses_the_name_of_a_special_token_in_text():
    with pytest.raises(ValueError, match="disallowed special token"):
        tokenizer.tiny().encode("Hello<|end|>")


def test_unlisted_words_fall_back_to_bytes_and_may_join_into_listed_pieces():
    encoding = tokenizer.build([" a", "lo"], "two")
    assert encoding.encode_ordinary("xyz") == list(b"xyz")
    assert encoding.encode_ordinary(" along") == [256, 257, *b"ng"]


def test_build_refuses_a_piece_that_is_listed_twice_or_a_byte():
    with pytest.raises(ValueError, match="' red' of 'x' is already"):
        tokenizer.build([" red", " red"], "x")
    with pytest.raises(ValueError, match="'a' of 'x' is already"):
        tokenizer.build(["a"], "x")


def test_build_refuses_a_piece_that_could_never_be_a_token():
    with pytest.raises(ValueError, match=r"' to=' of 'x' can never be a token"):
        tokenizer.build([" to="], "x")


def test_special_names_what_is_absent_and_what_is_there():
    with pytest.raises(ValueError, match=r"'tiny' has no special token '<\|refusal\|>'.*<\|call\|>"):
        tokenizer.special(tokenizer.tiny(), "<|refusal|>")
    with pytest.raises(ValueError, match="no special token ' red'"):  # a token, but not a special one
        tokenizer.special(tokenizer.tiny(), " red")


# --- files ---


def _same(a, b):
    fields = ("name", "_pat_str", "_mergeable_ranks", "_special_tokens", "max_token_value")
    return all(getattr(a, field) == getattr(b, field) for field in fields)


def test_a_saved_vocabulary_is_loaded_as_it_was(tmp_path):
    tokenizer.save(tokenizer.tiny(), tmp_path)
    assert _same(tokenizer.load(tmp_path), tokenizer.tiny())
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.tiktoken.json"]


@needs_vocabulary
def test_o200k_harmony_can_be_saved_with_both_names_of_id_200018(tmp_path):
    tokenizer.save(tokenizer.o200k_harmony(), tmp_path)
    assert _same(tokenizer.load(tmp_path), tokenizer.o200k_harmony())


def test_a_folder_without_a_vocabulary_loads_as_none(tmp_path):
    assert tokenizer.load(tmp_path) is None


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    old = tokenizer.save(tokenizer.tiny(), tmp_path)
    before = old.read_bytes()

    def full_disk(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tokenizer.build([" red"], "other"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert old.read_bytes() == before


BYTES = {base64.b64encode(bytes([b])).decode(): b for b in range(256)}
STORED = {"name": "bytes", "pattern": tokenizer.PATTERN, "ranks": BYTES, "specials": {"<|end|>": 256}}
NO_LAST_BYTE = {piece: rank for piece, rank in BYTES.items() if rank < 255}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "not a saved vocabulary"),
        ("[]", "not a saved vocabulary"),
        (json.dumps({key: value for key, value in STORED.items() if key != "pattern"}), "no entry 'pattern'"),
        (json.dumps(STORED | {"ranks": []}), "not a saved vocabulary"),
        (json.dumps(STORED | {"ranks": {"***": 0}}), "not a saved vocabulary"),
        (json.dumps(STORED | {"ranks": NO_LAST_BYTE, "specials": {"<|end|>": 255}}), r"bytes \[255\]"),
        (json.dumps(STORED | {"specials": {"<|end|>": 300}}), "are not 0 to 256, each once"),
        (json.dumps(STORED | {"specials": {"<|end|>": 5}}), "are not 0 to 256, each once"),
        (json.dumps(STORED | {"specials": {"<|end|>": "256"}}), "not a saved vocabulary"),
        (json.dumps(STORED | {"pattern": "("}), "not a saved vocabulary"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused_by_name(tmp_path, content, fault):
    (tmp_path / tokenizer.FILE).write_text(json.dumps(STORED))
    assert tokenizer.load(tmp_path).n_vocab == 257
    (tmp_path / tokenizer.FILE).write_text(content)
    with pytest.raises(ValueError, match=fault) as caught:
        tokenizer.load(tmp_path)
    assert tokenizer.FILE in str(caught.value)
