"""What the README says is so."""
import re
from pathlib import Path

import pytest

from gptoss_lab import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_runs_as_it_stands(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_example_has_ten_lines_and_shows_what_it_says(capsys):
    block = BLOCKS[0]
    assert len([line for line in block.splitlines() if line.strip()]) == 10
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    first, sums, without = capsys.readouterr().out.split("\n")[:3]
    assert first.startswith(" pink,") and not without.startswith(" pink")
    assert sums == "tensor([1., 1., 1., 1.])" or "1.0000" in sums


def test_the_file_map_names_every_file_of_the_package_and_no_other():
    [tree] = re.findall(r"^```\n(gptoss_lab/\n.*?)^```", README, re.S | re.M)
    named, folders = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, phrase = re.fullmatch(r" *(\S+?)/?(?:, \S+)?(?:\s{2,}(.*))?", line).groups()
        folders[depth:] = [name]
        assert phrase or name == "gptoss_lab", f"{name} has no phrase"
        path = "/".join(folders)
        named |= {one.relative_to(ROOT).as_posix() for one in ROOT.glob(path)} if "*" in path else {path}
    package = {path for path in (ROOT / "gptoss_lab").rglob("*")
               if path.is_file() and path.suffix == ".py" and path.name != "__init__.py"}  # fmt: skip
    files = {path.relative_to(ROOT).as_posix() for path in package}
    assert files - named == set(), "not in the README's file map"
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_link_inside_the_project_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert "docs/img/one_token.png" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_and_make_target_it_names_exists(capsys):
    commands = set(re.findall(r"`gptoss-lab ([\w-]+)", README))
    assert commands == {"inspect", "verify", "hooks", "generate", "chat", "train-tiny", "synth", "plan"}
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
    targets = set(re.findall(r"(?:`|^)(?:\w+=\S+ )?make (\w+)", README, re.M))
    assert {"lab", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.M)] == []


def test_it_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 240
