"""Is a folder whole, is it what OpenAI published, and does it continue the golden prompts?"""
import math
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint, examine, find, load
from .config import ConfigError
from .generate import generate
from .shards import SUMS, CheckpointError, checksum_faults, progress, sha256
from .tokenizer import VocabularyMissing

# Bytes and sha256 of the weights on the hub, shard after shard. 20B: revision 6cee5e81ee83917806bbde320786a8fb61efebee,
# 120B: b5c939de8f754692c1647ca79fbf85e8c1e70f8a. Of original/ only the size of the 20B file was found published.
_SHARDS = {
    "openai/gpt-oss-20b": [
        (4792272488, "16d0f997dcfc4462089d536bffe51b4bcea2f872f5c430be09ef8ed392312427"),
        (4798702184, "4fbe328ab445455d6f58dc73852b85873bd626986310abd91cd4d2ce3245eaea"),
        (4170342232, "a18106b209e9ab35c3406db4f6f12a927364a058b21e9d1373d682e20674b303"),
    ],
    "openai/gpt-oss-120b": [
        (4625017896, "695218884684c611fe08a74751ee443f971e9bd9bc062edba822da3fe45969b7"),
        (4115586736, "a881aa5f561b26a22b14a8262aa61849ace349ffd73d74769e030ac90a1fcf8a"),
        (4625017888, "022478dd04398c5bdb545a5be0a6437ecc2eb53d1dbd29edafcfff4b3ddf0a41"),
        (4115586752, "47aee9e7b9d5bedb215042c01ccededd9bd9c30b0dddea862dc2506b9d6c74de"),
        (4625017896, "f6c2752acda607b1d5ca52df9e75c1b9b2761e6875ff10c9bd6ddac473c0262e"),
        (4115586696, "0c8dd401544c31cb93b8459eee7da20ea2a07626a59455d7d92b85257df9b46c"),
        (4625017856, "28d839f2e027985a8b14e45f2323798862eddb7770ee9800ea6b7c803abee489"),
        (4060267176, "c8958c5f183c04f6ea959cfd90562b5128124154b2bbf979b8a22b9405b30ed8"),
        (4625017896, "bf1f2a88868ffc37d520dcf77d26f0e823710b5e682d473ff10f6974fa3b7517"),
        (4170906304, "f72d34a4004241b45c332b61f8ffa124e9a913bc1ab442b66e717d3e94e741ce"),
        (4625017896, "f48c867c2cb0a44bfc2f8768cb98e4aec9a350946fceacfebdcad5d32ad4a471"),
        (4115586752, "a06851b2cfd35f48722f823bc1ab8f7bcb4a878a5b8e975f4d3544f230454eeb"),
        (4064660808, "3af33667c307e20ae2a7648ea52653de46dd0171601ec5c696e47a2f5d5bf1e4"),
        (4625017896, "bcbcb74b043e071d1e05471d500d74dcf661175e00878ed302ccdf1801a75aef"),
        (4115586736, "54b1be1609696c307cc5ca117b1fa54feaddebffa04e9c2db117652a01964230"),
    ],
}
PUBLISHED: dict[str, dict[str, tuple[int, str | None]]] = {
    name: {f"model-{i:05}-of-{len(shards) - 1:05}.safetensors": shard for i, shard in enumerate(shards)}
    for name, shards in _SHARDS.items()
} | {"openai/gpt-oss-20b, original/": {"model.safetensors": (13_761_300_984, None)}}


_SYSTEM = """<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06

Reasoning: medium

# Valid channels: analysis, commentary, final. Channel must be included for every message."""


def _harmony(user: str) -> str:
    return f"{_SYSTEM}<|end|><|start|>user<|message|>{user}<|end|><|start|>assistant"


def _segments(n: int) -> str:
    greek = "alpha beta gamma delta epsilon zeta eta theta"
    return " ".join(f"Segment {i:02}: {greek}." for i in range(n)) + " Summarize the repeated pattern in one sentence."


_TOOL = """
Calls to these tools must go to the commentary channel: 'functions'.<|end|><|start|>developer<|message|># Tools

## functions

namespace functions {

// Return current weather for a city
type get_weather = (_: {
// City to inspect
city: string,
}) => any;

} // namespace functions<|end|><|start|>user<|message|>What is the weather in Boston?<|end|><|start|>assistant to=\
functions.get_weather<|channel|>commentary<|message|>{"city":"Boston"}<|call|><|start|>functions.get_weather to=\
assistant<|channel|>commentary<|message|>{"city":"Boston","temperature_f":72,"conditions":"sunny"}<|end|><|start|>user\
<|message|>Given the tool result, answer the user's weather question briefly.<|end|><|start|>assistant"""


@dataclass(frozen=True)
class Golden:
    """What the real weights make of a prompt, greedily; known implementations agree on the first `sure` tokens."""

    model: str
    name: str
    prompt: str
    continuation: str
    sure: int


# First two: huggingface/transformers tests/models/gpt_oss/test_modeling_gpt_oss.py, from OpenAI's implementation.
# Third: its tests/fixtures/gpt_oss/integration_tests.json. The rest, OpenAI's operators in bf16 on a CPU: gracee3/
# gpt-oss-rs, crates/gpt-oss-bench/fixtures/cpu_harmony_parity.json (llama.cpp leaves the second after three tokens).
_ANALYSIS = "<|channel|>analysis<|message|>"
GOLDEN = [
    Golden("gpt-oss-20b", "roses", "Roses are red, violets", " are blue, I love you, and I love you too.", 12),
    Golden("gpt-oss-120b", "roses", "Roses are red, violets",
           " are blue,\nI am a language model, not a human being", 2),
    Golden("gpt-oss-20b", "president", "How are you? Tell me the name of the president of", ' the United States." The '
           "assistant should respond with the name of the president. The user is asking for", 20),
    Golden("gpt-oss-20b", "harmony_63", _harmony("Reply with exactly one short greeting."),
           _ANALYSIS + 'The user says: "', 3),
    *(Golden("gpt-oss-20b", f"harmony_{length}", _harmony(_segments(n)), _ANALYSIS + text, 3) for length, n, text in [
        (122, 4, "The user gives segments "), (136, 5, "The user gives segments "),
        (262, 14, "The user gives segments "), (346, 20, "The user provided a list"),
        (444, 27, "The user provided a list")]),
    Golden("gpt-oss-20b", "tool_history_180", _SYSTEM + _TOOL, _ANALYSIS + "We need to answer briefly", 3),
]  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` is None where it says nothing about the folder's health."""

    ok: bool | None
    what: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'BAD', None: '-'}[self.ok]:<4}{self.what}"


@dataclass(frozen=True)
class Verification:
    """All findings; `ok` where none of them is bad."""

    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return all(finding.ok is not False for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def verify(folder: str | Path, *, hashes: bool = False, golden: bool = True, device=None) -> Verification:
    """Look at a checkpoint folder: names, shapes, dtypes, sizes, checksums, origin, and what it says.

    The golden prompts are run where the files have the published sizes. Nobody has run them with this package on the
    real weights yet; the code that runs them is tested on a small model.

    Args:
        folder: what is verified. A folder with original/ only is looked at there.
        hashes: compare sha256 with the published ones too; reads every byte.
        golden: run the golden prompts.
        device: where to run them.
    """
    try:
        checkpoint = examine(find(folder))
    except (FileNotFoundError, ConfigError, CheckpointError) as error:
        return Verification([Finding(False, str(error))])
    count = len(checkpoint.stored)
    findings = [Finding(True, f"{checkpoint.layout}, {count} tensors, {checkpoint.n_bytes:,} bytes: every name, shape, "
                              "dtype and size is what config.json asks for")]  # fmt: skip
    findings += _saved(checkpoint)
    origin = None
    for name, files in PUBLISHED.items():
        finding = _published(checkpoint, name, files, hashes)
        findings.append(finding)
        if finding.ok:
            origin = name
    if golden and origin is not None:
        findings += _golden(checkpoint, origin, device)
    return Verification(findings)


def _saved(checkpoint: Checkpoint) -> list[Finding]:
    """Is every file as SHA256SUMS says?"""
    folder, names = checkpoint.folder, checkpoint.files
    if not (folder / SUMS).is_file():
        return [Finding(None, f"there is no {SUMS} to compare the files with")]
    with progress("reading", sum((folder / name).stat().st_size for name in names)) as note:
        faults = checksum_faults(folder, names, math.inf, note)
    return [Finding(False, fault) for fault in faults] or [Finding(True, f"the files are as {SUMS} says")]


def _published(checkpoint: Checkpoint, name: str, files: dict, hashes: bool) -> Finding:
    sizes = {stored.path: stored.path.stat().st_size for stored in checkpoint.stored.values()}
    seen = {path.name: size for path, size in sizes.items()}
    if seen != {file: size for file, (size, _) in files.items()}:
        differs = sorted(file for file in seen.keys() | files.keys() if seen.get(file) != files.get(file, (None,))[0])
        return Finding(None, f"not the published {name}: {differs[0]} " + (
            f"has {seen[differs[0]]:,} bytes" if differs[0] in seen else "is not here"))  # fmt: skip
    if not hashes:
        return Finding(True, f"{name}: every file has its published size; sha256 was not compared")
    with progress("hashing", sum(seen.values())) as note:
        wrong = [path.name for path in sizes if files[path.name][1] not in (None, sha256(path, note))]
    if wrong:
        return Finding(False, f"{name}: the published sizes, but another sha256 in {', '.join(sorted(wrong))}")
    unknown = " (its sha256 is not known)" if None in (digest for _, digest in files.values()) else ""
    return Finding(True, f"{name}: every file is the published one{unknown}")


def _golden(checkpoint: Checkpoint, origin: str, device) -> list[Finding]:
    try:
        model = load(checkpoint.folder, device=device)
        encode = lambda text: model.tokenizer.encode(text, allowed_special="all")
        known = [(one, encode(one.prompt), encode(one.continuation)) for one in GOLDEN if one.model in origin]
    except (VocabularyMissing, MemoryError) as error:
        return [Finding(None, f"the golden prompts were not run: {error}")]
    findings = []
    for one, prompt, wanted in known:
        made = generate(model, [prompt], max_new_tokens=len(wanted), stop=())[0]
        agree = next((i for i, pair in enumerate(zip(made, wanted, strict=True)) if pair[0] != pair[1]), len(wanted))
        said = model.tokenizer.decode(made)
        what = f"the first {agree} of {len(wanted)} tokens agree, {one.sure} must; it says {said!r}"
        findings.append(Finding(agree >= one.sure, f"golden prompt {one.name}: {what}"))
    return findings
