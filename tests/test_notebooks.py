"""The notebooks as they are kept: short cells, outputs of a clean run, nothing that differs from run to run."""
import json
import re
from pathlib import Path

import pytest
import torch
from models import random_model, tiny_config

import gptoss_lab
import gptoss_lab.model
from gptoss_lab import show, tokenizer

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
OURS = "run `make notebooks` and keep what it writes"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def test_there_is_a_first_notebook():
    assert NOTEBOOKS[0].name == "00_one_token.ipynb"


@every_notebook
def test_code_is_short_and_narrow_and_defines_no_helper(path):
    for cell in cells(path, "code"):
        lines = text(cell).splitlines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 100, text(cell)
        assert not re.search(r"^\s*(def|class) ", text(cell), re.M), text(cell)


@every_notebook
def test_text_is_fifteen_to_sixty_words_a_cell(path):
    for cell in cells(path, "markdown"):
        words = re.sub(r"^#.*$", "", text(cell), flags=re.M).split()
        assert 15 <= len(words) <= 60, f"{len(words)} words:\n{text(cell)}"


@every_notebook
def test_no_widget_stalls_the_run(path):  # nbclient now and then waits for an Output widget until the time is up
    for cell in cells(path, "code"):
        assert not re.search(r"\b(interact|interactive|interact_manual|Output)\(", text(cell)), text(cell)


@every_notebook
def test_the_kept_outputs_are_those_of_one_clean_run_from_top_to_bottom(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), OURS
    assert [o for o in outputs(path) if o["output_type"] == "error" or o.get("name") == "stderr"] == []


@every_notebook
def test_what_differs_from_run_to_run_is_not_kept(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}, OURS
    assert "version" not in notebook["metadata"]["language_info"], OURS
    assert [cell["id"] for cell in notebook["cells"]] == list(map(str, range(len(notebook["cells"])))), OURS
    assert [cell["metadata"] for cell in notebook["cells"] if cell["metadata"]] == [], OURS
    assert not re.search(r"object at 0x[0-9a-f]+", path.read_text("utf-8"))
    assert path.stat().st_size <= 400_000


@every_notebook
def test_the_first_picture_comes_by_the_second_code_cell(path):
    early = [output for cell in cells(path, "code")[:2] for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in early)


@every_notebook
def test_the_code_that_it_shows_is_the_code_that_runs(path):
    shown = [cell for cell in cells(path, "code") if text(cell).startswith("show.source(")]
    for cell in shown:
        thing = eval(text(cell)[len("show.source(") : -1], dict(vars(gptoss_lab.model)))
        [output] = cell["outputs"]
        assert "".join(output["data"]["text/plain"]) == repr(show.source(thing)), OURS


def test_every_picture_says_whose_values_it_shows():
    titles = [output["metadata"]["image/png"]["alt"] for output in outputs(NOTEBOOKS[0])
              if "image/png" in output.get("data", {})]  # fmt: skip
    views = ["".join(output["data"]["text/html"]) for output in outputs(NOTEBOOKS[0])
             if "text/html" in output.get("data", {})]  # fmt: skip
    of_the_text = [title for title in titles if re.match(r"\d+ tokens: a piece of text, and its id$", title)]
    rest = [title for title in titles if title not in of_the_text]
    assert len(rest) == 9 and all(title.endswith("(the tiny model)") for title in rest)
    assert len(views) == 1 and "attention pattern (the tiny model)" in views[0]


def run(path: Path, capsys) -> tuple[dict, str]:
    """The variables and the text that the code leaves, without a kernel."""
    scope = {}
    with torch.enable_grad():  # a notebook may switch gradients off: in here only
        for cell in cells(path, "code"):
            exec(compile(text(cell), path.name, "exec"), scope)
    return scope, capsys.readouterr().out


def test_the_kept_text_is_what_the_first_notebook_prints_today(monkeypatch, capsys):
    monkeypatch.delenv("GPTOSS_LAB_MODEL", raising=False)
    rounding = re.compile(r"(?<=within |off by )\S+$", re.M)  # differs from processor to processor
    kept = "".join("".join(o["text"]) for o in outputs(NOTEBOOKS[0]) if o["output_type"] == "stream")
    _, printed = run(NOTEBOOKS[0], capsys)
    assert rounding.sub("", printed) == rounding.sub("", kept), OURS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_notebook_runs_on_another_model(dtype, tmp_path, monkeypatch, capsys):
    config = tiny_config(n_layers=2, n_heads=6, d_vocab=512, layer_types=("full_attention",) * 2)
    model = random_model(config, dtype=dtype)
    model.read_tokenizer = tokenizer.tiny
    gptoss_lab.save(model, tmp_path / "another")
    monkeypatch.setenv("GPTOSS_LAB_MODEL", str(tmp_path / "another"))
    scope, printed = run(NOTEBOOKS[0], capsys)
    assert scope["note"] == "another" and scope["config"] == config
    assert "another: 2 layers of 8 experts, 512 tokens" in printed
