"""What a source holds: the model card's table, to the parameter."""
import pytest
import torch
from models import tiny_random
from shared import facts, needs_facts

from gptoss_lab import shards
from gptoss_lab.checkpoint import CheckpointError
from gptoss_lab.config import FULL, SLIDING, TINY
from gptoss_lab.inspect import inspect
from gptoss_lab.saving import save

# arXiv 2508.10925, table 1: MLP, attention, embed + unembed, active, total, GiB; and the exact counts of the manifests.
CARD = {"gpt-oss-20b": "19.12 0.64 1.16 3.61 20.91 12.8", "gpt-oss-120b": "114.71 0.96 1.16 5.13 116.83 60.8"}
EXACT = {
    "gpt-oss-20b": (19_119_145_728, 637_203_456, 1_158_266_880, 3_608_307_264, 20_914_757_184, 13_761_264_768),
    "gpt-oss-120b": (114_714_874_368, 955_805_184, 1_158_266_880, 5_132_849_472, 116_829_156_672, 65_248_815_744),
}


@pytest.mark.parametrize("name", sorted(CARD))
def test_the_published_models_have_the_model_cards_numbers(name):
    report = inspect(name)
    parts = report.parts
    both = parts["embedding"] + parts["unembedding"]
    assert (parts["MLP"], parts["attention"], both, report.active, report.total, report.n_bytes) == EXACT[name]
    rows = {row[:24].strip(): row.split()[-2] for row in str(report).splitlines()[4:]}
    shown = [rows[row] for row in ("MLP", "attention", "embedding + unembedding", "active", "total", "bytes")]
    assert shown == CARD[name].split()


@needs_facts
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_the_table_is_that_of_the_manifests(size):
    report, counts = inspect(f"gpt-oss-{size}"), facts("param_counts.json")[size]
    assert report.parts == {"MLP": counts["mlp_plus_router"], "attention": counts["attention"],
                            "norms": counts["norms"], "embedding": counts["embed"],
                            "unembedding": counts["unembed"]}  # fmt: skip
    assert (report.total, report.active) == (counts["total"], counts["active_excluding_input_embedding"])
    tensors = facts(f"manifest_{size}_hf.json")["tensors"].values()
    assert report.n_bytes == sum(tensor["bytes"] for tensor in tensors)
    for dtype, count in report.dtypes.items():
        assert count == sum(tensor["dtype"] == dtype for tensor in tensors)


@pytest.mark.parametrize("layout", ["original", "hf-mxfp4", "hf-dense"])
def test_a_folder_is_counted_without_reading_weights(layout, tmp_path, monkeypatch):
    model = tiny_random(TINY.with_(n_layers=2, layer_types=(SLIDING, FULL), d_ff=32, yarn=None)).to(torch.bfloat16)
    folder = save(model, tmp_path / "x", layout)
    monkeypatch.setattr(shards.Stored, "parts", None)
    monkeypatch.setattr(shards, "map_file", None)
    report = inspect(folder)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.n_bytes == (folder / "model.safetensors").stat().st_size - shards.read_header(
        folder / "model.safetensors")[0].begin  # fmt: skip
    assert report.layout == layout and str(folder) in str(report) and report.config == model.config
    assert set(report.dtypes) == ({"BF16"} if layout == "hf-dense" else {"BF16", "U8"})


def test_active_parameters_are_those_that_one_token_meets():
    """Counted here from the model: all but the embedding and the experts that a token does not use."""
    model = tiny_random()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".gate_up." in name or ".down." in name)
    rest = sum(p.numel() for p in model.parameters()) - experts - model.embed.weight.numel()
    assert inspect("tiny-random").active == rest + experts * 4 // 16
    assert inspect("tiny-random").n_bytes == sum(p.numel() * 4 for p in model.parameters())


def test_what_load_refuses_inspect_refuses(tmp_path):
    folder = save(tiny_random(), tmp_path / "x")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        inspect(folder)
    with pytest.raises(FileNotFoundError, match="no folder here"):
        inspect(tmp_path / "nothing")
