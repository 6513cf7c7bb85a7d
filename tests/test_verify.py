"""Verification, on a small model that stands in for the published ones."""
import shutil
from pathlib import Path

import pytest
import torch
from models import tiny_random
from shared import facts, needs_facts, needs_vocabulary

from gptoss_lab import tokenizer, verify
from gptoss_lab.checkpoint import load
from gptoss_lab.config import FULL, SLIDING, TINY
from gptoss_lab.generate import generate
from gptoss_lab.saving import save
from gptoss_lab.shards import sha256

MODEL = TINY.with_(n_layers=2, layer_types=(SLIDING, FULL))
ROSES = "Roses are red, violets"


# The tokens that begin with a blank: any row of them is text that is cut into the same tokens again.
WORDS = [token for token in range(512) if tokenizer.tiny().decode_single_token_bytes(token)[:1] == b" "][1:]


@pytest.fixture(scope="module")
def speaker():
    """A random model that says nothing but words."""
    model = tiny_random(MODEL)
    mute = torch.ones(512, dtype=torch.bool).index_fill(0, torch.tensor(WORDS), False)
    with torch.no_grad():
        model.unembed.weight[mute] = 0
    return model


@pytest.fixture
def folder(speaker, tmp_path) -> Path:
    return save(speaker, tmp_path / "x", "hf-mxfp4", max_shard_bytes=400_000)


@pytest.fixture
def published(folder, monkeypatch) -> Path:
    """The folder as if OpenAI had published it, with what it really says after a prompt."""
    files = {path.name: (path.stat().st_size, sha256(path)) for path in folder.glob("*.safetensors")}
    assert len(files) > 2
    monkeypatch.setattr(verify, "PUBLISHED", {"openai/gpt-oss-0b": files})
    model = load(folder)
    said = generate(model, [model.tokenizer.encode(ROSES)], max_new_tokens=8)[0]
    text = model.tokenizer.decode(said)
    assert set(said) <= set(WORDS) and model.tokenizer.encode(text) == said
    monkeypatch.setattr(verify, "GOLDEN", [verify.Golden("gpt-oss-0b", "roses", ROSES, text, 8),
                                           verify.Golden("gpt-oss-9b", "other", ROSES, text, 8)])  # fmt: skip
    return folder


def test_a_whole_folder_is_found_whole_and_not_published(folder):
    found = verify.verify(folder)
    assert found.ok and "ok  hf-mxfp4, 41 tensors" in str(found)
    assert "ok  the files are as SHA256SUMS says" in str(found)
    assert str(found).count("-   not the published openai/gpt-oss-") == 3
    (folder / "SHA256SUMS").unlink()
    assert verify.verify(folder).ok and "there is no SHA256SUMS" in str(verify.verify(folder))


def test_a_large_file_is_compared_with_its_checksum_too(folder, monkeypatch):
    monkeypatch.setattr("gptoss_lab.checkpoint.SMALL", 10)
    path = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    load(folder)  # it is too large to be read at every start
    found = verify.verify(folder)
    assert not found.ok and f"BAD {path.name} has sha256" in str(found)


def test_what_is_wrong_with_a_folder_is_a_finding(folder, tmp_path):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-9])
    found = verify.verify(folder)
    assert not found.ok and f"BAD {folder} is damaged" in str(found) and "cut short" in str(found)
    shutil.rmtree(folder)
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in str(verify.verify(tmp_path / "empty"))


def test_published_files_are_known_by_their_sizes_and_their_sha256(published):
    found = str(verify.verify(published, golden=False))
    assert "ok  openai/gpt-oss-0b: every file has its published size; sha256 was not compared" in found
    assert "golden" not in found
    found = verify.verify(published, hashes=True, golden=False)
    assert found.ok and "ok  openai/gpt-oss-0b: every file is the published one" in str(found)


def test_another_content_of_the_same_size_is_found_by_sha256(published):
    path = sorted(published.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (published / "SHA256SUMS").unlink()
    assert verify.verify(published, golden=False).ok
    found = verify.verify(published, hashes=True)
    assert not found.ok and f"another sha256 in {path.name}" in str(found)
    assert "golden" not in str(found)  # another model says other things


def test_the_golden_prompts_of_the_published_model_are_run(published):
    found = verify.verify(published)
    assert found.ok and "golden prompt roses: the first 8 of 8 tokens agree, 8 must" in str(found)
    assert "other" not in str(found)


def test_agreement_is_counted_by_prefix(published, monkeypatch):
    encoding = tokenizer.tiny()
    tokens = encoding.encode(verify.GOLDEN[0].continuation)
    tokens[5] = next(word for word in WORDS if word != tokens[5])
    text = encoding.decode(tokens)
    for sure, ok in ((5, True), (6, False)):
        monkeypatch.setattr(verify, "GOLDEN", [verify.Golden("gpt-oss-0b", "roses", ROSES, text, sure)])
        found = verify.verify(published)
        assert found.ok is ok and f"the first 5 of 8 tokens agree, {sure} must" in str(found), str(found)


def test_without_the_vocabulary_the_golden_prompts_are_left_out_and_said_so(published, monkeypatch):
    def missing(_):
        raise tokenizer.VocabularyMissing("no o200k here")

    monkeypatch.setattr("gptoss_lab.model.GptOss.tokenizer", property(missing))
    found = verify.verify(published)
    assert found.ok and "-   the golden prompts were not run: no o200k here" in str(found)


def test_where_the_model_does_not_fit_the_golden_prompts_are_left_out_and_said_so(published, monkeypatch):
    monkeypatch.setattr("gptoss_lab.plan.free_bytes", lambda device: 1000)
    found = verify.verify(published)
    assert found.ok and "-   the golden prompts were not run:" in str(found) and "1,000 bytes" in str(found)


@needs_facts
def test_the_published_sizes_and_hashes_are_those_of_the_manifests():
    for size in ("20b", "120b"):
        files = facts(f"manifest_{size}_hf.json")["shards"]
        assert verify.PUBLISHED[f"openai/gpt-oss-{size}"] == {
            name: (one["file_bytes"], one["file_sha256"]) for name, one in files.items()}  # fmt: skip
    original = verify.PUBLISHED["openai/gpt-oss-20b, original/"]
    assert original == {"model.safetensors": (facts("manifest_20b_original.json")["single_file_size"], None)}


@needs_facts
@needs_vocabulary
def test_the_golden_prompts_are_token_by_token_those_that_were_recorded():
    encode = lambda text: tokenizer.o200k_harmony().encode(text, allowed_special="all")
    entries = {entry["id"]: entry for entry in facts("golden.json")["entries"]}
    recorded = {("gpt-oss-20b", one["id"]): (one["prompt_token_ids"], one["greedy_tokens"])
                for one in entries["gpt_oss_rs_official_greedy_20b"]["scenarios"]}  # fmt: skip
    for size in ("20b", "120b"):
        one = entries[f"hf_original_{size}_logprobs"]
        recorded[f"gpt-oss-{size}", "roses"] = one["prompt_token_ids"], one["continuation_token_ids"]
    texts = entries["hf_integration_tests"]
    for golden in verify.GOLDEN:
        if golden.name == "president":
            assert encode(golden.prompt) == texts["prompt_token_ids"][1]
            said = [two[1] for key, two in texts["expected"].items() if "model=20b" in key and "mode=eval" in key]
            assert said and all(text == golden.prompt + golden.continuation for text in said)
        else:
            prompt, continuation = recorded.pop((golden.model, golden.name))
            assert (encode(golden.prompt), encode(golden.continuation)) == (prompt, continuation), golden.name
        assert 0 < golden.sure <= len(encode(golden.continuation))
    assert not recorded
