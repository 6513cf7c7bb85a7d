"""The commands, as typed."""
import builtins
import sys

import pytest
import torch
from models import tiny_random

from gptoss_lab import harmony, load, save, tokenizer
from gptoss_lab.cli import main
from gptoss_lab.config import TINY
from gptoss_lab.hooks import POINTS
from gptoss_lab.tiny import data
from gptoss_lab.tiny.words import pieces


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def test_hooks_lists_every_point(capsys):
    status, out, _ = run(capsys, "hooks")
    assert status == 0
    for point in POINTS:
        assert point.name in out


@pytest.mark.parametrize(("name", "figures"), [
    ("gpt-oss-20b", ("19,119,145,728", "637,203,456", "1,158,266,880", "20,914,757,184", "3,608,307,264", "12.8 GiB")),
    ("gpt-oss-120b", ("114,714,874,368", "955,805,184", "1,158,266,880", "116,829,156,672", "5,132,849,472", "60.8 GiB")),
])  # fmt: skip
def test_inspect_prints_the_model_cards_table(capsys, name, figures):
    status, out, _ = run(capsys, "inspect", name)
    assert status == 0
    for figure in figures:
        assert figure in out


def test_generate_prints_the_prompt_and_what_follows(capsys):
    status, out, _ = run(capsys, "generate", "tiny", "One sunny day", "--max-new-tokens", "5")
    assert status == 0
    model = load("tiny")
    with torch.no_grad():
        tokens = model.tokenizer.encode("One sunny day")
        for _ in range(5):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert out == model.tokenizer.decode(tokens) + "\n"


def test_generate_repeats_with_a_seed(capsys):
    command = ("generate", "tiny-random", "I", "--temperature", "1", "--seed", "3", "--max-new-tokens", "20")
    assert run(capsys, *command)[1] == run(capsys, *command)[1]
    assert run(capsys, *command)[1] != run(capsys, *command[:6], "4", *command[7:])[1]


def test_verify_says_that_a_saved_folder_is_whole_and_which_tensor_is_not(capsys, tmp_path):
    save(load("tiny-random"), tmp_path / "model", layout="hf-dense")
    status, out, _ = run(capsys, "verify", str(tmp_path / "model"))
    assert status == 0, out
    path = next((tmp_path / "model").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-7])
    status, out, err = run(capsys, "verify", str(tmp_path / "model"))
    assert status == 1
    assert path.name in out + err


def test_an_error_is_one_line_without_a_traceback(capsys, tmp_path):
    status, out, err = run(capsys, "inspect", str(tmp_path / "nowhere"))
    assert status == 1
    assert out == ""
    assert "nowhere" in err and "Traceback" not in err and err.startswith("gptoss-lab: ")


def typed(monkeypatch, *lines):
    """What the user types, then Ctrl-D."""
    left = list(lines)

    def read(prompt=""):
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr(builtins, "input", read)


def scripted(monkeypatch, *answers):
    """A model that answers in Harmony as told; returns the prompts that it was given."""
    prompts, left = [], [list(answer) for answer in answers]

    def stream(model, prompts_now, max_new_tokens, **settings):
        prompts.append(prompts_now[0])
        for token in left.pop(0):
            if isinstance(token, BaseException):
                raise token
            yield [token]

    monkeypatch.setattr(sys.modules["gptoss_lab.generate"], "stream", stream)
    return prompts


def answer(encoding, *messages) -> list[int]:
    tokens = [t for m in messages for t in harmony.render_message(m, encoding)]
    tokens[-1] = harmony.stop_tokens(encoding)[0]
    return tokens[2:]  # <|start|>assistant is in the prompt


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that is not the tiny one: it has a full system message, and remembers."""
    model = tiny_random(TINY.with_(n_ctx=1024))  # a system message spelt in bytes is long
    model.read_tokenizer = lambda: tokenizer.build(pieces(), "other")
    return str(save(model, tmp_path_factory.mktemp("talker") / "model"))


def test_chat_shows_each_channel_and_goes_on_with_what_was_said(capsys, monkeypatch, talker):
    encoding = load(talker).tokenizer
    say = lambda text, channel: harmony.Message("assistant", text, channel=channel)
    prompts = scripted(monkeypatch, answer(encoding, say("red or blue", "analysis"), say("Roses are red", "final")),
                       answer(encoding, say("violets", "final")))  # fmt: skip
    typed(monkeypatch, "Roses?", "And?")
    status, out, _ = run(capsys, "chat", talker, "--effort", "low", "--instructions", "Rhyme.")
    assert status == 0
    assert "[analysis] red or blue" in out and "[final] Roses are red" in out and "[final] violets" in out
    first, second = (encoding.decode(prompt) for prompt in prompts)
    assert "Reasoning: low" in first and "Rhyme." in first and first.endswith("<|start|>assistant")
    assert "Roses are red" in second and "red or blue" not in second, "earlier chain of thought is not read again"


def test_chat_forgets_an_answer_that_was_stopped_or_is_not_harmony(capsys, monkeypatch, talker):
    encoding = load(talker).tokenizer
    whole = answer(encoding, harmony.Message("assistant", "Roses", channel="final"))
    prompts = scripted(monkeypatch, [*whole[:4], KeyboardInterrupt()], whole[-1:] * 2, whole)
    typed(monkeypatch, "one", "two", "three")
    status, out, _ = run(capsys, "chat", talker)
    assert status == 0
    assert "stopped" in out and "not Harmony" in out and "[final] Roses" in out
    last = encoding.decode(prompts[2])
    assert "three" in last and "one" not in last.split("<|start|>user")[1] and "two" not in last


def test_chat_asks_the_tiny_model_one_question_at_a_time_as_it_was_trained(capsys, monkeypatch):
    encoding = tokenizer.tiny()
    whole = answer(encoding, harmony.Message("assistant", "=7", channel="final"))
    prompts = scripted(monkeypatch, whole, whole)
    typed(monkeypatch, "add 3+4", "add 2+5")
    assert run(capsys, "chat", "tiny", "--effort", "high")[0] == 0
    assert prompts == [data.prompt("high", "add 3+4"), data.prompt("high", "add 2+5")]


def test_the_tiny_model_thinks_before_it_answers_where_the_effort_is_high(capsys, monkeypatch):
    for effort, thinks in (("high", True), ("low", False)):
        typed(monkeypatch, "add 3+4+2")
        status, out, _ = run(capsys, "chat", "tiny", "--effort", effort, "--temperature", "0")
        assert status == 0 and "[final] =" in out and ("[analysis] 3+4=7+2=9" in out) is thinks, out
        assert not thinks or "[final] =9" in out


def test_ctrl_c_ends_a_command_with_status_130(capsys, monkeypatch):
    scripted(monkeypatch, [KeyboardInterrupt()])
    assert run(capsys, "generate", "tiny-random", "I")[0] == 130


def test_the_console_script_is_installed():
    from importlib.metadata import entry_points

    assert [e.value for e in entry_points(group="console_scripts", name="gptoss-lab")] == ["gptoss_lab.cli:main"]
