"""The package, the Makefile and the notebooks as a stranger meets them."""
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(text) for text in texts] for extra, texts in PROJECT["optional-dependencies"].items()
}
DECLARED = CORE + sum(EXTRAS.values(), [])

# What Google Colab carried in August 2026 (github.com/googlecolab/backend-info).
COLAB = {
    "torch": "2.11.0",
    "numpy": "2.1.3",
    "safetensors": "0.8.0",
    "tiktoken": "0.14.0",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "ipykernel": "6.17.1",
}

# Imported without being declared: what others bring, and what `make bench` compares with where it is there.
BROUGHT = {"IPython": "ipykernel", "PIL": "matplotlib", "requests": "tiktoken", "tiktoken_ext": "tiktoken"}
OPTIONAL = {"pandas"}  # used where it is installed: `frame()` of a probe's result
RIVALS = {"transformer_lens", "nnsight", "triton_kernels", "vllm"}

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not here")


def tracked_files() -> list[Path]:
    """The files git tracks; skips the test outside a checkout."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = git.stdout.split("\0")
    if git.returncode or "pyproject.toml" not in names:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_importing_the_package_brings_only_torch_numpy_safetensors_and_einops():
    code = """
import sys
import einops, numpy, safetensors.torch, torch
before = {name.partition(".")[0] for name in sys.modules}
import gptoss_lab
after = {name.partition(".")[0] for name in sys.modules}
print(sorted(after - before - sys.stdlib_module_names - {"gptoss_lab"}))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_version_is_the_same_in_the_package_and_in_pyproject():
    source = (ROOT / "gptoss_lab" / "__init__.py").read_text()
    assert f'__version__ = "{PROJECT["version"]}"' in source


def test_every_library_that_is_imported_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    known = sys.stdlib_module_names | BROUGHT.keys() | RIVALS | OPTIONAL | {"gptoss_lab", "bench"}
    known |= {path.stem for path in (ROOT / "tests").glob("*.py")}
    missing = {}
    for folder in ("gptoss_lab", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                for name in {name.partition(".")[0] for name in names}:
                    if name not in known and canonicalize_name(name) not in declared:
                        missing[name] = path.relative_to(ROOT).as_posix()
    assert missing == {}


def test_the_core_asks_for_no_part_of_a_notebook_server():
    assert not {"jupyterlab", "ipykernel", "ipywidgets", "matplotlib"} & {req.name for req in CORE}


def test_constraints_pin_every_declared_library_inside_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in pairs}
    assert [req.name for req in DECLARED if canonicalize_name(req.name) not in pins] == []
    assert [str(req) for req in DECLARED if pins[canonicalize_name(req.name)] not in req.specifier] == []


def test_the_declared_ranges_admit_what_colab_carries():
    refused = [str(req) for req in DECLARED if req.name in COLAB and COLAB[req.name] not in req.specifier]
    assert refused == []


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what set-up reads, with an empty folder `bin` beside it."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def fake(clone: Path, name: str, script: str) -> None:
    """Puts a command `name` that runs `script` first on the PATH of `make`."""
    path = clone.parent / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs make in `clone`, as from a shell: not as a part of the make that may be running this test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    env["PATH"] = f"{clone.parent / 'bin'}{os.pathsep}{env['PATH']}"
    command = ["make", *arguments]
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=60)


@needs_make
@pytest.mark.parametrize("target", ["lab", "test"])
def test_make_refuses_an_old_python_before_it_makes_anything(clone, target):
    fake(clone, "python3", "echo 3.9")
    result = make(clone, target, "PYTHON=python3 python3.99")
    assert result.returncode != 0
    assert "Python 3.11, 3.12, 3.13 or 3.14 is needed" in result.stderr
    assert "(python3 is 3.9)" in result.stderr
    assert not (clone / ".venv").exists()


@needs_make
def test_make_names_the_package_that_is_missing_where_python_has_no_ensurepip(clone):
    fake(clone, "python3", 'case "$*" in *ensurepip*) exit 1 ;; esac; echo 3.11')
    result = make(clone, "test", "PYTHON=python3")
    assert result.returncode != 0
    assert "apt install python3-venv" in result.stderr
    assert not (clone / ".venv").exists()


@needs_make
def test_make_takes_a_later_python_where_python3_is_too_old(clone):
    fake(clone, "python3", "echo 3.9")
    fake(clone, "python3.12", 'case "$*" in *"venv --clear"*) exit 7 ;; esac; echo 3.12')
    result = make(clone, "test", "PYTHON=python3 python3.12")
    assert "Setting up .venv with python3.12 (3.12)" in result.stdout
    assert result.returncode != 0


# Stands for python3 and, copied into .venv by "venv", for .venv/bin/python. Each environment made leaves a
# line in `made`, each call of pip one in `pip`. A file `broken` fails the install, `offline` every index.
FAKE_PYTHON = """
case "$*" in *"-m pip"*) echo "$*" >>pip ;; esac
case "$*" in
    *"venv --clear"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo >>made ;;
    *--no-index*) exit 1 ;;
    *"index versions"*) [ ! -e offline ] ;;
    *--editable*) [ ! -e broken ] ;;
    *version_info*) echo 3.11 ;;
esac"""


@needs_make
def test_torch_comes_from_the_cpu_index_where_that_answers_and_without_it_where_not(clone):
    fake(clone, "python3", FAKE_PYTHON)
    fake(clone, "timeout", 'shift; exec "$@"')
    arguments = (".venv/ok", "PYTHON=python3", "TORCH_INDEX=https://cpu.example")
    result = make(clone, *arguments)
    assert result.returncode == 0 and "gave no torch" not in result.stdout
    assert "--no-deps --index-url https://cpu.example torch\n" in (clone / "pip").read_text()
    shutil.rmtree(clone / ".venv")
    (clone / "pip").unlink()
    (clone / "offline").touch()
    result = make(clone, *arguments)
    assert result.returncode == 0
    assert result.stdout.splitlines()[1:] == [
        "https://cpu.example gave no torch: taking it from the default index, which may bring CUDA."
    ]
    assert "--no-deps --index-url" not in (clone / "pip").read_text()
    assert "--editable" in (clone / "pip").read_text()


@needs_make
def test_a_machine_with_an_nvidia_gpu_takes_torch_from_the_default_index(clone):
    fake(clone, "python3", FAKE_PYTHON)
    fake(clone, "nvidia-smi", "")
    assert make(clone, ".venv/ok", "PYTHON=python3").returncode == 0
    assert "index-url" not in (clone / "pip").read_text()


@needs_make
def test_an_install_that_fails_leaves_no_stamp_and_the_next_starts_from_nothing(clone):
    fake(clone, "python3", FAKE_PYTHON)
    (clone / "broken").touch()
    assert make(clone, ".venv/ok", "PYTHON=python3").returncode != 0
    assert not (clone / ".venv" / "ok").exists()
    (clone / "broken").unlink()
    assert make(clone, ".venv/ok", "PYTHON=python3").returncode == 0
    assert (clone / ".venv" / "ok").read_text().strip() == str(clone.resolve())
    assert (clone / "made").read_text() == "\n\n"


@needs_make
def test_a_changed_pin_updates_the_environment_and_a_moved_clone_or_a_lost_python_remakes_it(clone):
    fake(clone, "python3", FAKE_PYTHON)

    def environments_and_installs(folder: Path) -> tuple[int, int]:
        assert make(folder, ".venv/ok", "PYTHON=python3").returncode == 0
        return (folder / "made").read_text().count("\n"), (folder / "pip").read_text().count("--editable")

    assert environments_and_installs(clone) == (1, 1)
    assert environments_and_installs(clone) == (1, 1)
    os.utime(clone / ".venv" / "ok", (0, 0))  # older than constraints.txt
    assert environments_and_installs(clone) == (1, 2)
    moved = clone.rename(clone.with_name("moved"))
    assert environments_and_installs(moved) == (2, 3)
    (moved / ".venv" / "bin" / "python").unlink()
    assert environments_and_installs(moved) == (3, 4)
    assert environments_and_installs(moved) == (3, 4)


@needs_make
def test_make_lab_prints_the_address_of_the_first_notebook_and_leaves_the_home_folder_alone(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    if subprocess.run(["make", "--question", ".venv/ok"], cwd=ROOT, env=env, capture_output=True).returncode:
        pytest.skip("make has not set up .venv here")
    env |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    command = ["make", "lab", "JUPYTER_ARGS=--no-browser"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **output)
    try:
        match = None
        while not match and (line := server.stdout.readline()):
            match = re.search(r"(http://127\.0\.0\.1:\d+)/lab/tree/(notebooks/00\S+)\?(token=\S+)", line)
        assert match, "JupyterLab ended without an address"
        base, notebook, token = match.groups()

        def get(path: str) -> dict:
            deadline = time.monotonic() + 30  # the address is printed a moment before it answers
            while True:
                try:
                    with urllib.request.urlopen(f"{base}/{path}?{token}", timeout=30) as response:
                        return json.load(response)
                except urllib.error.URLError as error:
                    if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)

        cells = get(f"api/contents/{notebook}")["content"]["cells"]
        news = get("lab/api/settings/@jupyterlab/apputils-extension:notification")["schema"]["properties"]
        assert all(cell["metadata"]["trusted"] for cell in cells if cell["cell_type"] == "code")
        assert news["fetchNews"]["default"] == "false"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)
    assert list(tmp_path.iterdir()) == []


def test_no_cell_of_a_notebook_is_longer_than_15_lines():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                assert len(source.splitlines()) <= 15, f"{path.name}:\n{source}"


def test_no_tracked_file_names_a_folder_of_somebody_s_machine_or_a_foreign_package_index():
    machine = re.compile(r"(?<![\w.~$}/-])/(?:root|work|home/\w+|Users/\w+)(?:/|\b)")
    index = re.compile(r"https?://(?!download\.pytorch\.org/whl\b)[^\s'\"<>)]*/(?:simple|whl)\b")
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}: {line.strip()[:100]}" for n, line in enumerate(lines, 1)
                  if machine.search(line) or index.search(line)]
    assert found == []
