"""The site: notebooks become pages, the registry becomes a page, and nothing is loaded from elsewhere."""
import base64
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

import gptoss_lab
from gptoss_lab.hooks import POINTS
from gptoss_lab.show import TokenView

pytest.importorskip("material", reason="mkdocs-material is missing: pip install '.[docs]'")
pytest.importorskip("mkdocstrings_handlers.python", reason="mkdocstrings-python is missing: pip install '.[docs]'")

ROOT = Path(__file__).resolve().parent.parent
PIXEL = base64.b64encode(b"\x89PNG of one pixel").decode()
WIDGET = "application/vnd.jupyter.widget-view+json"
HEAD = "# 42 · A lesson\n\n**Why?**\n\nAbout 25 minutes. Difficulty ● ● ○. It needs Python."


def hook(name: str):
    """As MkDocs loads one: while it does, what lies beside it can be imported."""
    folder = ROOT / "etc" / "site"
    spec = importlib.util.spec_from_file_location(f"site_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("notebooks", None)
    return module


notebooks, hook_points = hook("notebooks"), hook("hook_points")


def text(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source: str, *outputs: dict, count: int | None = 1) -> dict:
    return {"cell_type": "code", "metadata": {}, "source": source, "execution_count": count, "outputs": list(outputs)}


def said(words: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": words.splitlines(keepends=True)}


def gave(bundle: dict, **about) -> dict:
    return {"output_type": "execute_result", "execution_count": 1, "data": bundle, "metadata": about}


def written(folder: Path, *cells: dict, name: str = "42_lesson") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), "utf-8")
    return path


@pytest.fixture
def page(tmp_path):
    return lambda *cells: notebooks.convert(written(tmp_path, *cells))


# ------------------------------------------------------------------------------------------ one notebook


def test_text_and_code_stand_as_they_are_and_what_was_printed_follows(page):
    made, _ = page(text("## A *heading*"), code("print(1)", said("\x1b[31mone\x1b[0m\n"), said("warned", "stderr"), said("two")))
    assert made == "## A *heading*\n\n```python\nprint(1)\n```\n\n```{.text .no-copy .nb-text}\none\ntwo\n```\n"


def test_code_that_holds_a_fence_gets_a_longer_one(page):
    made, _ = page(code('x = """\n```\n"""'))
    assert made == '````python\nx = """\n```\n"""\n````\n'


def test_a_picture_becomes_a_file_with_its_alt_text(page):
    made, files = page(text("x"), code("show()", gave({"image/png": PIXEL, "text/plain": "<Figure>"}, **{"image/png": {"alt": "a [b] of $1"}})))
    assert files == {"42_lesson/1.png": base64.b64decode(PIXEL)}
    assert "[![a \\[b\\] of &#36;1](42_lesson/1.png)](42_lesson/1.png)" in made and "<Figure>" not in made


def test_two_pictures_of_a_cell_have_two_files(page):
    picture = gave({"image/png": PIXEL}, **{"image/png": {"alt": "a"}})
    assert [*page(code("show()", picture, picture))[1]] == ["42_lesson/0.png", "42_lesson/0_1.png"]


def test_a_picture_without_alt_text_is_refused(page):
    with pytest.raises(ValueError, match=r"42_lesson.ipynb, cell 0, 'show\(\)': .*alt"):
        page(code("show()", gave({"image/png": PIXEL})))


def test_html_is_one_block_and_comes_before_a_picture(page):
    view = TokenView(["a", "b"], [0.5, 1.0])._repr_html_()
    made, files = page(code("v", gave({"text/html": view, "image/png": PIXEL, "text/plain": "v"})))
    block = made.split("```\n\n", 1)[1].strip()
    assert block.startswith('<div class="nb-html" markdown="0"') and "\n\n" not in block and files == {}
    assert re.sub(r"\s+", "", view) in re.sub(r"\s+", "", block)


def test_svg_loses_the_prolog_that_no_page_may_have(page):
    made, _ = page(code("v", gave({"image/svg+xml": '<?xml version="1.0"?>\n<svg><title>t</title></svg>'})))
    assert "<svg><title>t</title></svg></div>" in made and "<?xml" not in made


def test_markdown_comes_before_plain_text(page):
    assert page(code("v", gave({"text/markdown": "**a**", "text/plain": "a"})))[0].endswith("```\n\n**a**\n")
    assert page(code("v", gave({"text/plain": "a"})))[0].endswith(".nb-text}\na\n```\n")


def test_a_widget_is_shown_by_its_still(page):
    made, _ = page(code("v", gave({WIDGET: {"model_id": "1"}, "text/html": "<p>still</p>", "text/plain": "Explorer()"})))
    assert "<p>still</p>" in made and "Explorer" not in made and "model_id" not in made


def test_a_widget_without_a_still_is_refused(page):
    with pytest.raises(ValueError, match="GPTOSS_LAB_STILL"):
        page(code("v", gave({WIDGET: {"model_id": "1"}, "text/plain": "Explorer()"})))


def test_a_cell_that_failed_is_refused(page):
    failed = {"output_type": "error", "ename": "KeyError", "evalue": "'q'", "traceback": []}
    with pytest.raises(ValueError, match=r"42_lesson.ipynb, cell 1, 'acts\[q\]': it failed with KeyError: 'q'"):
        page(text("x"), code("acts[q]", failed))


def test_a_cell_that_was_not_run_is_refused(page):
    with pytest.raises(ValueError, match="42_lesson.ipynb, cell 0, 'x = 1': it has not been run"):
        page(code("x = 1", count=None))


def test_links_lead_to_pages(page):
    made, _ = page(text("[a](07_window.ipynb) [b](07_window.ipynb#the-gap) [c](../docs/tiny.md) [d](https://x.org/a.ipynb)"))
    assert made == "[a](07_window.md) [b](07_window.md#the-gap) [c](../tiny.md) [d](https://x.org/a.ipynb)\n"


def test_a_check_is_followed_by_its_hint_and_its_solution(page, monkeypatch):
    known = {"42.1": SimpleNamespace(hint="Think.\nTwice.", solution="def f(x):\n\n    return x\n")}
    monkeypatch.setattr(gptoss_lab, "exercises", SimpleNamespace(exercise=known.__getitem__), raising=False)
    made, _ = page(code('def f(x): ...\ncheck("42.1", f)', gave({"text/plain": "not yet"})))
    hint = '??? tip "Hint"\n\n    Think.\n    Twice.\n\n'
    assert made.endswith(f'not yet\n```\n\n{hint}??? success "Solution"\n\n    ```python\n    def f(x):\n\n        return x\n    ```\n')
    assert "???" not in page(code('# check("42.1", f)'))[0]


def test_a_check_of_an_unknown_exercise_is_refused(page, monkeypatch):
    monkeypatch.setattr(gptoss_lab, "exercises", SimpleNamespace(exercise={}.__getitem__), raising=False)
    with pytest.raises(ValueError, match="42_lesson.ipynb, cell 0.*42.9"):
        page(code('check("42.9", f)'))


def test_the_overview_says_what_the_first_cells_say(tmp_path):
    made = notebooks.overview([written(tmp_path, text(HEAD))])
    assert '| [42 · A lesson](42_lesson.md) | Why? | 25 | <span role="img" aria-label="2 of 3">' in made
    with pytest.raises(ValueError, match="42_lesson.ipynb: its first cell must begin"):
        notebooks.overview([written(tmp_path, text("# 42 · A lesson"))])


def test_a_lesson_leads_to_colab_where_the_repository_is_known():
    assert notebooks.badge("# T\ntext", "42_lesson.ipynb", "") == "# T\ntext"
    made = notebooks.badge("# T\ntext", "42_lesson.ipynb", "https://github.com/some/one")
    assert made.startswith("# T\n\n[Open in Colab](https://colab.research.google.com/github/some/one/blob/main/notebooks/42_lesson.ipynb)")


# ------------------------------------------------------------------------------------------ the reference


def test_the_reference_names_every_hook_point_and_every_other_name():
    made = hook_points.page()
    for point in POINTS:
        [row] = [line for line in made.splitlines() if line.startswith(f"| `{point.name}`{{")]
        assert f"`[{point.shape}]`" in row and ("**derived**" in row) != point.writable
        assert [alias for alias in point.aliases if f"`{alias}`" not in row] == []
    assert {point.place[0] for point in POINTS} == set(hook_points.PLACES)


def test_the_reference_says_what_a_record_costs():
    rows = {line.split("`")[1]: line for line in hook_points.page().splitlines() if line.startswith("| `")}
    assert "| 5.6&nbsp;KiB |" in rows["blocks.{l}.hook_resid_pre"]  # 2880 values of 2 bytes
    assert "| 128&nbsp;B&nbsp;×&nbsp;keys |" in rows["blocks.{l}.attn.hook_pattern"]  # 64 heads


# ------------------------------------------------------------------------------------------ the whole site


def build(config: Path, site: Path, folder: Path) -> subprocess.CompletedProcess:
    env = {**os.environ, "GPTOSS_LAB_NOTEBOOKS": str(folder), "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    env.pop("GPTOSS_LAB_SITE_URL", None), env.pop("GPTOSS_LAB_REPO_URL", None)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def small_site(tmp_path):
    """A site of one page, one API page and the notebooks that it is given."""

    def make(*cells):
        docs = tmp_path / "docs"
        docs.mkdir(exist_ok=True)
        (docs / "index.md").write_text("# Home\n\n## A part\n\n::: gptoss_lab.rope\n")
        config = tmp_path / "mkdocs.yml"
        config.write_text(json.dumps({
            "INHERIT": str(ROOT / "mkdocs.yml"), "docs_dir": str(docs), "extra_css": [], "extra_javascript": [],
            "theme": {"custom_dir": str(ROOT / "etc/site/theme")}, "hooks": [str(ROOT / "etc/site/notebooks.py")],
            "watch": [], "nav": [{"Home": "index.md"}, {"Lessons": ["lessons/index.md"]}]}))  # fmt: skip
        written(tmp_path / "notebooks", text(HEAD), *cells)
        return build(config, tmp_path / "site", tmp_path / "notebooks")

    return make


def test_a_strict_build_sees_a_broken_link_an_anchor_and_a_reference_inside_a_notebook(small_site):
    broken = "[a](43_none.ipynb) [b](../docs/index.md#no-part) [c][gptoss_lab.rope.no_such] [d](#nowhere)"
    done = small_site(text(broken))
    assert done.returncode != 0
    for told in ("'43_none.md'", "'../index.md#no-part'", "gptoss_lab.rope.no_such", "'#nowhere'"):
        assert re.search(rf"WARNING.*lessons/42_lesson.md.*{re.escape(told)}", done.stderr), done.stderr


def test_a_strict_build_takes_a_notebook_whose_links_lead_somewhere(small_site, tmp_path):
    alt = "a [b] _c_ `d` <e> \"f\" & *g* \\h $i$ #j !k"
    view = TokenView(["a", "b"], [0.5, 1.0])._repr_html_()
    good = "[b](../docs/index.md#a-part) [c][gptoss_lab.rope.rotate] $a_1 < b$\n\n$$\n\\begin{aligned} x &= y \\end{aligned}\n$$"
    done = small_site(text(good), code("a", gave({"image/png": PIXEL}, **{"image/png": {"alt": alt}})),
                      code("b", gave({"text/html": view})))  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = read(tmp_path / "site/lessons/42_lesson/index.html")
    [picture] = [attrs for tag, attrs in made.tags if tag == "img"]
    assert picture["alt"] == alt and not missing(tmp_path / "site", made.path, picture["src"])
    assert '<span class="arithmatex">\\(a_1 &lt; b\\)</span>' in made.text and '<div class="arithmatex">' in made.text
    assert re.sub(r"\s+", "", view) in re.sub(r"\s+", "", made.text)  # its script, too


def test_a_notebook_that_was_not_run_stops_the_build(tmp_path, monkeypatch):
    written(tmp_path, text(HEAD), code("x = 1", count=None))
    monkeypatch.setenv("GPTOSS_LAB_NOTEBOOKS", str(tmp_path))
    with pytest.raises(notebooks.PluginError, match="42_lesson.ipynb, cell 1, 'x = 1': it has not been run"):
        notebooks.on_files([], SimpleNamespace(nav=[], repo_url=""))


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.path, self.tags, self.text = path, [], path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))


def read(path: Path) -> Page:
    return Page(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder, ROOT / "notebooks")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """All but 404.html, which a server shows at any address and so names its files from the root."""
    return [read(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"]


LOADING = {"script": "src", "img": "src", "source": "src", "video": "src", "audio": "src", "iframe": "src",
           "embed": "src", "object": "data", "image": "href", "use": "href"}  # fmt: skip


def loaded(page: Page):
    """Every address that a browser loads by itself."""
    for tag, attrs in page.tags:
        if tag == "link" and not {"canonical", "prev", "next", "edit", "alternate"} & {*attrs.get("rel", "").split()}:
            yield attrs["href"]
        if tag in LOADING and LOADING[tag] in attrs:
            yield attrs[LOADING[tag]]
        yield from (part.split()[0] for part in attrs.get("srcset", "").split(",") if part)
        yield from in_css(attrs.get("style", ""))
    for style in re.findall(r"<style[^>]*>(.*?)</style>", page.text, re.S):
        yield from in_css(style)


def in_css(css: str) -> list[str]:
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
    found = re.findall(r"""url\(\s*(?:"([^"]*)"|'([^']*)'|([^)"']*))\s*\)|@import\s+["']([^"']+)""", css)
    return ["".join(one).strip() for one in found]


def missing(site: Path, base: Path, address: str) -> bool:
    """Is the address anything else than a relative one of a file of the site?"""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc or address.startswith("/"):
        return True
    target = (base.parent / unquote(parts.path)).resolve() if parts.path else base
    target = target / "index.html" if target.is_dir() else target
    return not (target.is_file() and target.is_relative_to(site.resolve()))


def test_every_notebook_is_a_page(site):
    lessons = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert lessons and {path.parent.name for path in (site / "lessons").glob("*/index.html")} == lessons


def test_the_home_page_has_a_live_view(site):
    home = (site / "index.html").read_text("utf-8")
    assert re.search(r'<div id="pattern-\w+" role="group".*<script', home, re.S) and "live-view" not in home


def test_pages_load_nothing_from_elsewhere_and_work_in_a_subfolder(site, pages):
    assert len(pages) > 20
    wrong = [(str(page.path.relative_to(site)), address) for page in pages for address in loaded(page)
             if not address.startswith("data:") and missing(site, page.path, address)]  # fmt: skip
    assert wrong == []


def test_style_sheets_load_nothing_from_elsewhere(site):
    sheets = [*site.rglob("*.css")]
    assert site / "assets/katex/katex.min.css" in sheets
    wrong = [(sheet.name, address) for sheet in sheets for address in in_css(sheet.read_text("utf-8"))
             if not address.startswith(("data:", "#")) and missing(site, sheet, address)]  # fmt: skip
    assert wrong == []


def test_every_link_within_the_site_is_relative_and_leads_somewhere(site, pages):
    links = [(page.path, attrs["href"]) for page in pages for tag, attrs in page.tags if tag == "a" and "href" in attrs]
    inner = [(path, href) for path, href in links if not re.match(r"(https?|mailto):", href)]
    assert len(inner) > 500 and [pair for pair in inner if missing(site, *pair)] == []


def test_every_picture_has_alt_text(pages):
    pictures = [(str(page.path), attrs) for page in pages for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) >= 10 and [one for one in pictures if not one[1].get("alt", "").strip()] == []


def test_the_api_pages_show_examples_as_code(site, pages):
    api = [page for page in pages if page.path.is_relative_to(site / "api")]
    assert any("&gt;&gt;&gt; " in page.text for page in api)
    assert [str(page.path) for page in api if "<blockquote>" in page.text] == []  # >>> outside of an Examples: section


def test_everything_public_is_on_an_api_page(pages):
    named = {attrs["id"] for page in pages for tag, attrs in page.tags if attrs.get("id", "").startswith("gptoss_lab.")}
    ways_in = {"harmony", "show", "explore", "exercises"}  # what they import is what they offer
    for part in ways_in:
        package = importlib.import_module(f"gptoss_lab.{part}")
        own = {name: f"{getattr(package, name).__module__}.{name}" for name in package.__all__}
        assert [name for name in own if not {f"gptoss_lab.{part}.{name}", own[name]} & named] == []
    files = [path.relative_to(ROOT / "gptoss_lab").with_suffix("") for path in (ROOT / "gptoss_lab").rglob("*.py")]
    modules = {".".join(path.parts) for path in files if path.parts[0] not in {*ways_in, "fast"} and path.name != "__init__"}  # fmt: skip
    left_out = {"cli", "memory", "tiny.page", "tiny.words"}
    assert {module for module in modules if f"gptoss_lab.{module}" not in named} == left_out
