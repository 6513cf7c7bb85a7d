"""What the pages of the site say: their code runs, prints what they show, and their links lead somewhere."""
import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from models import one_thread  # noqa: F401

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "log.md")
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.S | re.M)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
# Titles of Python blocks that are not run here, for want of these packages or of the weights.
ELSEWHERE = ("TransformerLens", "nnsight", "SAELens", "gpt-oss-20b")


def blocks(page: str) -> list[tuple[str, str, int]]:
    """Each fence's info string, its content without the indent, and its line."""
    found = []
    for fence in FENCE.finditer(page):
        body = re.sub(f"^{fence['indent']}", "", fence["body"], flags=re.M)
        found.append((fence["info"].strip(), body, page.count("\n", 0, fence.start()) + 2))
    return found


def elsewhere(info: str) -> bool:
    title = re.search(r'title="([^"]*)"', info)
    return title is not None and title[1].startswith(ELSEWHERE)


def run(page: str, name: str) -> None:
    """Every Python block in one namespace, in order; a block titled "prints" shows what the one before it printed."""
    scope, printed = {"__name__": "__main__"}, ""
    for info, body, line in blocks(page):
        if info.startswith("python") and not elsewhere(info):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * (line - 1) + body, name, "exec"), scope)
            printed = out.getvalue()
        elif 'title="prints"' in info:
            assert printed.strip() == body.strip(), f"{name}, line {line}"


with_code = [path for path in PAGES if any(info.startswith("python") for info, _, _ in blocks(path.read_text("utf-8")))]


@pytest.mark.parametrize("path", with_code, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_python_block_of_a_page_runs_and_prints_what_the_page_shows(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.enable_grad():  # a page may turn gradients off for itself
        run(path.read_text("utf-8"), path.relative_to(DOCS).as_posix())


def test_a_page_whose_code_fails_or_prints_something_else_is_found():
    run('```python\nprint(1 + 1)\n```\n```text title="prints"\n2\n```\n```python title="nnsight"\n1 / 0\n```\n', "page")
    with pytest.raises(ZeroDivisionError):
        run("1. A step\n\n    ```python\n    1 / 0\n    ```\n", "page")
    with pytest.raises(AssertionError, match="page, line 5"):
        run('```python\nprint(1 + 1)\n```\n```text title="prints"\n3\n```\n', "page")


def made(target: Path) -> bool:
    """Is this a page that the build makes? Lessons from notebooks, the reference from the registry."""
    name = target.relative_to(DOCS).as_posix()
    lesson = re.fullmatch(r"lessons/(\w+)\.md", name)
    if lesson and lesson[1] != "index":
        return (DOCS.parent / "notebooks" / f"{lesson[1]}.ipynb").exists()
    return name in ("lessons/index.md", "reference/hook-points.md")


def broken(path: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    targets = LINK.findall(FENCE.sub("", text)) + [target for _, target in IMAGE.findall(text)]
    files = [link.partition("#")[0] for link in targets if not re.match(r"\w+:|#", link)]
    paths = {file: (path.parent / file).resolve() for file in files}
    return [file for file, target in paths.items() if not target.exists() and not made(target)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_relative_link_leads_to_a_page_that_is_there_or_that_the_build_makes(path):
    assert broken(path, path.read_text("utf-8")) == []


def test_a_link_that_leads_nowhere_is_found():
    text = "[a](tiny.md) [b](nothing.md#x) [c](lessons/99_none.md) [d](https://example.org) ![e](img/none.png)"
    assert broken(DOCS / "page.md", text) == ["nothing.md", "lessons/99_none.md", "img/none.png"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_picture_has_an_alt_text(path):
    assert [target for alt, target in IMAGE.findall(path.read_text("utf-8")) if len(alt) < 20] == []
