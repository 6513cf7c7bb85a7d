"""The notebooks as they are kept: short cells, outputs of a clean run, nothing that differs from run to run."""
import json
import os
import re
from pathlib import Path

import pytest
import torch
from models import random_model, tiny_config
from runs import asked, joined

import gptoss_lab
import gptoss_lab.model
from gptoss_lab import rope, show, tokenizer

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
OURS = "run `make notebooks` and keep what it writes"
REPOSITORY = re.search(r'Repository = "https://github.com/(.+?)"', (NOTEBOOKS[0].parents[1] / "pyproject.toml").read_text())[1]
RUN = os.environ.get("GPTOSS_LAB_NOTEBOOKS")  # where `make test` has run them anew

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in joined(cell["outputs"])]


def test_there_is_a_first_notebook():
    assert NOTEBOOKS[0].name == "00_one_token.ipynb"


@every_notebook
def test_code_is_short_and_narrow_and_defines_no_helper(path):
    for cell in cells(path, "code"):
        lines = text(cell).splitlines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 100, text(cell)
        assert asked(cell) or not re.search(r"^\s*(def|class) ", text(cell), re.M), text(cell)


@every_notebook
def test_it_begins_with_its_question_what_it_takes_and_what_one_can_do_afterwards(path):
    head = text(cells(path, "markdown")[0])
    number = path.stem[:2]
    assert re.match(rf"# {number} · .+\n\n\*\*.+\?\*\*\n\nAbout \d\d minutes\. Difficulty (●|○)( ●| ○){{2}}\. ", head), head
    assert 20 <= int(re.search(r"About (\d+) minutes", head)[1]) <= 45
    assert "It needs" in head and "Afterwards you can" in head
    assert head.endswith(f"[Open in Colab](https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name})")


@every_notebook
def test_its_first_cell_sets_up_what_colab_lacks_and_takes_the_model_that_is_asked_for(path):
    first = text(cells(path, "code")[0])
    assert first.startswith(f'''\
try:
    import gptoss_lab as lab
except ImportError:  # on Colab: takes seconds, torch is there
    %pip install -q --no-deps git+https://github.com/{REPOSITORY}
    import gptoss_lab as lab
import torch
''')
    assert 'name = lab.chosen("tiny")\nmodel, note = lab.load(name), show.whose(name)' in first


@every_notebook
def test_every_prediction_comes_before_its_outcome_which_is_computed(path):
    code = [text(cell) for cell in cells(path, "code")]
    said = [(i, *found) for i, cell in enumerate(code) for found in re.findall(r'^(predict|outcome)\(\s*"(\d\d\.\d)"(.*)', cell, re.M)]
    names = [name for _, kind, name, _ in said if kind == "predict"]
    assert names and sorted(names) == sorted(name for _, kind, name, _ in said if kind == "outcome")
    for name in names:
        (at, *_), (later, *_, rest) = [one for one in said if one[2] == name]
        assert at < later and code[later].rstrip().splitlines()[-1].startswith("outcome("), name
        assert not re.fullmatch(r', "[^"]*"\)', rest), f"the outcome of {name} is a literal"


@every_notebook
def test_it_ends_with_what_would_prove_it_wrong_and_with_sources(path):
    *_, keep, hypothesis, last = map(text, cells(path, "markdown"))
    ending = keep + hypothesis + last
    assert "What to keep, and what would prove it wrong" in ending and "wrong if" in ending
    assert "**Next question:**" in last and "**Sources:**" in last


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
def test_no_view_or_explorer_tells_of_an_error(path):
    pages = ["".join(o["data"]["text/html"]) for o in outputs(path) if "text/html" in o.get("data", {})]
    assert not [page[:300] for page in pages if 'role="alert"' in page]


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
        thing = eval(text(cell)[len("show.source(") : -1], vars(gptoss_lab.model) | {"rotate": rope.rotate})
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
    assert [any(title in view for view in views) for title in
            ("attention pattern (the tiny model)", "choose a box (the tiny model)")] == [True, True]  # fmt: skip


def run(path: Path, capsys) -> tuple[dict, str]:
    """The variables and the text that the code leaves, without a kernel."""
    from IPython.core.inputtransformer2 import TransformerManager

    scope = {}
    with torch.enable_grad():  # a notebook may switch gradients off: in here only
        for cell in cells(path, "code"):
            exec(compile(TransformerManager().transform_cell(text(cell)), path.name, "exec"), scope)
    return scope, capsys.readouterr().out


def told(path: Path) -> list[str]:
    """The words and numbers that the outputs hold, pictures and pages apart."""
    kept = []
    for output in outputs(path):
        if output["output_type"] == "stream":
            kept += "".join(output["text"]).split()
        elif "text/html" not in output["data"]:
            kept += "".join(output["data"].get("text/plain", "")).split()
    return kept


def alike(one: str, other: str) -> bool:
    """The same word, or numbers that rounding can set apart: processors differ."""
    pattern = r"-?\d+\.?\d*(?:e[-+]?\d+)?"
    if re.sub(pattern, "#", one) != re.sub(pattern, "#", other):
        return False
    pairs = zip(re.findall(pattern, one), re.findall(pattern, other))
    return all(a == b or abs(float(a) - float(b)) <= 0.011 * max(1, abs(float(b))) and set(".e") & set(a + b) for a, b in pairs)


@every_notebook
@pytest.mark.skipif(RUN is None, reason="GPTOSS_LAB_NOTEBOOKS names no folder of fresh runs: `make test` makes one")
def test_the_kept_outputs_are_what_it_gives_today(path):
    kept, fresh = told(path), told(Path(RUN) / path.name)
    differ = [(a, b) for a, b in zip(kept, fresh) if not alike(a, b)]
    assert len(kept) == len(fresh) and not differ, (OURS, differ[:5])
    mimes = [[sorted(o.get("data", {})) for o in outputs(one)] for one in (path, Path(RUN) / path.name)]
    assert mimes[0] == mimes[1], OURS


def test_the_first_notebook_runs_in_bfloat16(tmp_path, monkeypatch, capsys):
    scope = on_another(NOTEBOOKS[0], torch.bfloat16, tmp_path, monkeypatch, capsys)
    assert scope["note"] == "another" and scope["model"].dtype == torch.bfloat16


@every_notebook
def test_it_runs_on_another_model(path, tmp_path, monkeypatch, capsys):
    scope = on_another(path, torch.float32, tmp_path, monkeypatch, capsys)
    assert scope["note"] == "another" and scope["model"].config.n_heads == 6


def on_another(path, dtype, tmp_path, monkeypatch, capsys) -> dict:
    config = tiny_config(n_layers=3, n_heads=6, d_vocab=512)
    model = random_model(config, dtype=dtype)
    model.read_tokenizer = tokenizer.tiny
    gptoss_lab.save(model, tmp_path / "another")
    monkeypatch.setenv("GPTOSS_LAB_MODEL", str(tmp_path / "another"))
    monkeypatch.setenv("GPTOSS_LAB_STILL", "1")
    return run(path, capsys)[0]
