"""The notebooks as they are run: as shipped, and with every exercise answered wrongly and then rightly.

    python tests/runs.py make FOLDER        writes FOLDER/shipped/*.ipynb and FOLDER/solved/*.ipynb, not yet run
    python tests/runs.py clean FILE ...     takes out of notebooks that were run what differs from run to run
"""
import copy
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat

from gptoss_lab.exercises import exercise

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CHECK = re.compile(r'^check\("(\d\d\.\d+)", (\w+)(?:, .*)?\)$')


def source(cell: dict) -> str:
    return "".join(cell["source"])


def asked(cell: dict) -> re.Match | None:
    """The check in the last line of an exercise's cell."""
    lines = source(cell).rstrip().splitlines()
    return CHECK.match(lines[-1]) if cell["cell_type"] == "code" and lines else None


def answered(cell: dict) -> list[dict]:
    """An exercise's cell with each common mistake, which must fail, and with the solution, which must pass."""
    found = asked(cell)
    task, cells = exercise(found[1]), []
    for code, state in [*((wrong, "failed") for wrong in task.mistakes.values()), (task.solution, "passed")]:
        filled = copy.deepcopy(cell)
        filled["source"] = f"{code.strip()}\n\n\nverdict = {found[0]}\nassert verdict.{state}, verdict\nverdict"
        filled["id"] = f"{cell['id']}-{len(cells)}"
        cells.append(filled)
    return cells


def solved(notebook: dict) -> dict:
    cells = [new for cell in notebook["cells"] for new in (answered(cell) if asked(cell) else [cell])]
    return {**notebook, "cells": cells}


def make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("shipped", "solved"):
        (folder / name).mkdir(parents=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        (folder / "shipped" / path.name).write_text(json.dumps(notebook), "utf-8")
        (folder / "solved" / path.name).write_text(json.dumps(solved(notebook)), "utf-8")


def cleaned(notebook: dict) -> dict:
    """No times, no versions, no random ids; what was printed in one piece, however it came."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = []
    for i, cell in enumerate(notebook["cells"]):
        new = {"cell_type": cell["cell_type"], "id": str(i), "metadata": {}, "source": source(cell)}
        if cell["cell_type"] == "code":
            new |= {"execution_count": cell["execution_count"], "outputs": joined(cell["outputs"])}
        cells.append(new)
    metadata = {"kernelspec": kernel, "language_info": {"file_extension": ".py", "mimetype": "text/x-python",
                                                        "name": "python"}}  # fmt: skip
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def joined(outputs: list[dict]) -> list[dict]:
    out: list[dict] = []
    for one in outputs:
        if one["output_type"] == "stream" and out and out[-1].get("name") == one["name"]:
            out[-1] = {**one, "text": "".join(out[-1]["text"]) + "".join(one["text"])}
        else:
            out.append(one)
    return out


def clean(path: Path) -> None:
    notebook = nbformat.from_dict(cleaned(json.loads(path.read_text("utf-8"))))
    part = path.with_suffix(".part")
    part.write_text(nbformat.writes(notebook) + "\n", "utf-8")
    part.replace(path)


if __name__ == "__main__":
    what, *paths = sys.argv[1:]
    for path in map(Path, paths):
        {"make": make, "clean": clean}[what](path)
