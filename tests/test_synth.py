"""Checkpoints with random contents: of the published shapes, the same for a seed, gone on with where they stopped."""
import hashlib

import pytest
import torch
from models import tiny_config
from shared import facts

import gptoss_lab as lab
from gptoss_lab import synth
from gptoss_lab.cli import main
from gptoss_lab.config import published
from gptoss_lab.shards import header_of

CONFIG = tiny_config(n_layers=2)


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synth.synthesise(CONFIG, tmp_path_factory.mktemp("synth") / "one")


def test_the_files_of_a_20b_have_the_published_headers_and_sizes():
    manifest = facts("manifest_20b_hf.json")
    files = synth._divided(published("gpt-oss-20b"))
    assert list(files) == list(manifest["shards"])
    for name, entries in files.items():
        header, shard = header_of(entries), manifest["shards"][name]
        assert hashlib.sha256(header).hexdigest() == shard["header_sha256"], name
        assert len(header) + sum(map(synth._n_bytes, entries)) == shard["file_bytes"], name


def test_it_loads_packed_and_its_logits_are_finite_and_varied(made):
    model = lab.load(made)
    logits = model(torch.arange(20)[None] % CONFIG.d_vocab)
    assert model.blocks[0].mlp.down.packed and model.dtype == torch.bfloat16 and model.config == CONFIG
    assert logits.isfinite().all() and 0.1 < logits.float().std() < 100


def test_no_weight_is_trivial(made):
    for name, x in lab.load(made).state_dict().items():
        assert x.float().std() > 0, name


def test_a_seed_gives_the_same_bytes_and_another_seed_others(made, tmp_path):
    assert digests(synth.synthesise(CONFIG, tmp_path / "again")) == digests(made)
    other = digests(synth.synthesise(CONFIG, tmp_path / "other", seed=1))
    assert other["model.safetensors"] != digests(made)["model.safetensors"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.31, 0.77, 0.999])
def test_what_was_interrupted_is_gone_on_with(made, tmp_path, share, monkeypatch):
    monkeypatch.setattr(synth, "CHUNK", 512)  # tensors of several chunks
    whole = synth.synthesise(CONFIG, tmp_path / "whole")
    part = tmp_path / "part"
    part.mkdir()
    content = (whole / "model.safetensors").read_bytes()
    (part / "model.safetensors.part").write_bytes(content[: int(share * len(content))])
    (part / "synth.json").write_bytes((whole / "synth.json").read_bytes())
    assert digests(synth.synthesise(CONFIG, part)) == digests(whole)


def test_until_it_is_whole_the_folder_is_no_checkpoint(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, "_random", broken)
    with pytest.raises(KeyboardInterrupt):
        synth.synthesise(CONFIG, tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        lab.load(tmp_path / "x")


def test_what_was_begun_otherwise_or_holds_something_else_is_refused(made, tmp_path):
    with pytest.raises(FileExistsError, match="another seed or other shapes"):
        synth.synthesise(CONFIG, made, seed=3)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds letter.txt"):
        synth.synthesise(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_too_small_a_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(synth.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"needs 13,[\d,]+ more bytes, 1,000 are free"):
        synth.synthesise(published("gpt-oss-20b"), tmp_path / "x")
    assert list((tmp_path / "x").iterdir()) == []


def test_sizes_that_cannot_be_packed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiples of 32 numbers: d_model = 32, d_ff = 40"):
        synth.synthesise(tiny_config(d_ff=40), tmp_path / "x")


def test_the_command_writes_a_model_of_fewer_layers(tmp_path, capsys):
    main(["synth", str(tmp_path / "x"), "--like", "tiny", "--layers", "1", "--seed", "2"])
    assert lab.load(tmp_path / "x").config.n_layers == 1
    assert "1 layers" in capsys.readouterr().out
