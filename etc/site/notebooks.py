"""Executed notebooks -> pages of the site, and a page that lists them. A hook of MkDocs: docs/ is left as it is.

The notebooks are read from the folder that GPTOSS_LAB_NOTEBOOKS names, notebooks/ if it is not set.
"""
import base64
import html
import json
import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"
HEAD = re.compile(r"# +(?P<title>.+)\n+\*\*(?P<question>.+?)\*\*\s+"
                  r"(?:About )?(?P<minutes>\d+)(?: to \d+)? minutes\.\s+Difficulty (?P<dots>[●○ ]*[●○])")  # fmt: skip
CHECK = re.compile(r"""^(?:\w+\.)*check\(\s*["']([^"']+)["']""", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def fence(text: str, lang: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{lang}\n{text.rstrip()}\n{ticks}"


def printed(text: str) -> str:
    return fence(ANSI.sub("", text), "{.text .no-copy .nb-text}") if text.strip() else ""


def raw(markup: str) -> str:
    """HTML that Markdown leaves alone: one block, without an empty line."""
    markup = re.sub(r"\n\s*\n", "\n", markup.strip())
    return f'<div class="nb-html" markdown="0" data-search-exclude>{markup}</div>'


def folded(kind: str, title: str, text: str) -> str:
    return f'??? {kind} "{title}"\n\n' + "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def shown(bundle: dict, about: dict, name: str, files: dict[str, bytes]) -> str:
    """One output of a cell. A picture goes into `files` under `name`."""
    if "text/html" in bundle:
        return raw(bundle["text/html"])
    if "image/svg+xml" in bundle:
        svg = bundle["image/svg+xml"]
        return raw(svg[svg.index("<svg"):])  # without its <?xml?> and doctype
    if "image/png" in bundle:
        alt = about.get("image/png", {}).get("alt", "")
        if not alt:
            raise ValueError("a picture has no alt text: give it a title, or image/png metadata with an alt")
        files[f"{name}.png"] = base64.b64decode(bundle["image/png"])
        alt = html.escape(re.sub(r"([\\`*_{}\[\]()#+.!-])", r"\\\1", alt)).replace("$", "&#36;")
        return f"[![{alt}]({name}.png)]({name}.png)"  # a link to its full size
    if WIDGET in bundle:
        raise ValueError("a widget has no still: run the notebooks with GPTOSS_LAB_STILL=1")
    return bundle.get("text/markdown") or printed(bundle.get("text/plain", ""))


def exercise(name: str) -> list[str]:
    """An exercise's hint and solution, folded."""
    try:
        from gptoss_lab import exercises

        asked = exercises.exercise(name)
    except (ImportError, LookupError, ValueError) as error:
        raise ValueError(f"check({name!r}): {error.args[0] if error.args else error}") from error
    return [folded("tip", "Hint", asked.hint), folded("success", "Solution", fence(asked.solution.strip(), "python"))]


def convert(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their path beside the page.

    Raises:
        ValueError: a cell has not been run or has failed, a picture has no alt text, an exercise is unknown.
    """
    parts, files = [], {}
    for i, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\]\(([\w./-]+)\.ipynb(#[\w-]*)?\)", r"](\1.md\2)", source)
            source = re.sub(r"\n+\[Open in Colab\]\(\S+\)$", "", source)  # the page has a badge of its own
            parts.append(source.replace("](../docs/", "](../"))
        elif cell["cell_type"] == "code" and source.strip():
            try:
                parts += [fence(source, "python"), *_outputs(cell, f"{path.stem}/{i}", files)]
                parts += exercise(asked[-1]) if (asked := CHECK.findall(source)) else []
            except ValueError as error:
                raise ValueError(f"{path.name}, cell {i}, {source.splitlines()[0]!r}: {error}") from error
    return "\n\n".join(filter(None, parts)) + "\n", files


def _outputs(cell: dict, name: str, files: dict[str, bytes]) -> list[str]:
    if cell["execution_count"] is None:
        raise ValueError("it has not been run; `make notebooks` runs them all")
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            raise ValueError(f"it failed with {output['ename']}: {output['evalue']}")
    streams = (o for o in cell["outputs"] if o["output_type"] == "stream" and o["name"] == "stdout")
    parts = [printed("".join("".join(o["text"]) for o in streams))]  # stderr is about the machine: left out
    results = [o for o in cell["outputs"] if "data" in o]
    for n, output in enumerate(results):
        bundle = {kind: "".join(x) if isinstance(x, list) else x for kind, x in output["data"].items()}
        parts.append(shown(bundle, output["metadata"], f"{name}_{n}" if n else name, files))
    return parts


def header(path: Path) -> dict[str, str]:
    """Title, question, minutes and difficulty, as the first cell says them."""
    first = "".join(json.loads(path.read_text("utf-8"))["cells"][0]["source"])
    if not (found := HEAD.match(first)):
        raise ValueError(f"{path.name}: its first cell must begin `# 07 · Title`, `**The question?**`, "
                         "`About 30 minutes. Difficulty ● ○ ○.`")  # fmt: skip
    return found.groupdict()


def overview(notebooks: list[Path]) -> str:
    rows = ["# Lessons",
            "Each lesson is a notebook: `make lab` opens them, and here they stand as they ran for this site.",
            "| Lesson | The question | Minutes | Difficulty |\n|---|---|---|---|"]  # fmt: skip
    for path in notebooks:
        h = header(path)
        dots = f'<span role="img" aria-label="{h["dots"].count("●")} of 3">{h["dots"].replace(" ", "&nbsp;")}</span>'
        rows[-1] += f"\n| [{h['title']}]({path.stem}.md) | {h['question']} | {h['minutes']} | {dots} |"
    return "\n\n".join(rows) + "\n"


def badge(page: str, name: str, repo: str) -> str:
    """Links to the notebook itself, below the title; none while nobody has said where the repository is."""
    found = re.match(r"https://github\.com/([\w.-]+/[\w.-]+?)/?$", repo or "")
    if not found:
        return page
    path = f"{found[1]}/blob/main/notebooks/{name}"
    links = (f"[Open in Colab](https://colab.research.google.com/github/{path}){{ .md-button .nb-button }} "
             f"[The notebook](https://github.com/{path}){{ .md-button .nb-button }}")  # fmt: skip
    title, rest = page.split("\n", 1)
    return f"{title}\n\n{links}\n{rest}"


def on_files(files, config):
    folder = ROOT / os.environ.get("GPTOSS_LAB_NOTEBOOKS", "notebooks")
    notebooks = sorted(folder.glob("[0-9]*.ipynb"))
    try:
        if not notebooks:
            raise ValueError(f"there is no notebook in {folder}: GPTOSS_LAB_NOTEBOOKS names their folder")
        pages = {"index.md": overview(notebooks)}
        for path in notebooks:
            page, pictures = convert(path)
            pages |= {f"{path.stem}.md": badge(page, path.name, config.repo_url), **pictures}
    except ValueError as error:
        raise PluginError(str(error)) from error
    for name, content in pages.items():
        files.append(File.generated(config, f"lessons/{name}", content=content))
    for entry in config.nav:
        if "Lessons" in entry:
            entry["Lessons"] = ["lessons/index.md", *(f"lessons/{path.stem}.md" for path in notebooks)]
    return files
