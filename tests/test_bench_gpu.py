"""`bench/gpu.py` runs from end to end without a GPU, and sees what is wrong. Nothing here is timed."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import one_thread  # noqa: F401

from bench import gpu, gpu_checks, gpu_models, gpu_peers, gpu_run
from bench.gpu import Part
from bench.gpu_models import SMALL, fill, model_of, random_state
from bench.gpu_run import Row, Run
from gptoss_lab import GptOss, KVCache, fast
from gptoss_lab.kv_cache import Visible

ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "rehearsal: no figure here means anything"


def a_run(**changes) -> Run:
    config = gpu_models.first_layers(SMALL.with_(n_ctx=640), 2)
    return Run(**dict(device=torch.device("cpu"), dtype=torch.float32, config=config, sizes=gpu_run.REHEARSAL) | changes)


def check(name: str, error: float, allowed: float) -> Row:
    return Row.of_check((name, error, allowed))


def measured(parts: dict, seconds: float = 60.0) -> tuple[list[Row], bool, list[int]]:
    """The rows, whether all is well, and how many rows there were after each part."""
    lengths: list[int] = []
    parts = {name: part if isinstance(part, Part) else Part(part, 1) for name, part in parts.items()}
    rows, well = gpu.measure(a_run(), parts, seconds, lambda rows: lengths.append(len(rows)))
    return rows, well, lengths


def good(run):
    """Two rows."""
    yield Row("one", 1.0)
    yield Row("two", 2.0)


def bad(run):
    """A row and a mistake."""
    yield Row("before", 1.0)
    raise ValueError("no such thing")


def test_every_part_runs_on_a_cpu_and_no_figure_is_shown(tmp_path):
    command = [sys.executable, "bench/gpu.py", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == SENTENCE
    ran = {line.split(":")[0]: int(line.split()[1]) for line in lines if " rows, " in line}
    assert list(ran) == list(gpu.PARTS) and min(ran.values()) >= 1
    assert "FAILED" not in done.stdout and "|" not in done.stdout and "tokens/s" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().out == ("PyTorch finds no NVIDIA GPU here: nothing is measured. --rehearse runs the "
                                       "script without one.\n")


def test_without_kernels_nothing_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fast.gpu, "installed", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert gpu.main([]) == 1 and "no kernels" in capsys.readouterr().out
    monkeypatch.setattr(fast.gpu, "installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main([]) == 1 and "no kernels" in capsys.readouterr().out


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(capsys):
    rows, well, lengths = measured({"machine": bad, "decode": good})
    assert [row.name for row in rows] == ["before", "FAILED: ValueError: no such thing", "one", "two"]
    assert [row.part for row in rows] == ["machine", "machine", "decode", "decode"]
    assert not well and lengths == [2, 4]


def test_nothing_is_measured_after_a_disagreement(capsys):
    wrong = lambda run: iter([check("fine", 1e-4, 1e-3), check("off", 2e-3, 1e-3)])
    rows, well, _ = measured({"correctness": Part(wrong, 1), "decode": good})
    assert [row.verdict for row in rows] == ["agrees", "DISAGREES"] and not well
    printed = capsys.readouterr().out
    assert "DISAGREES: off: 2.00e-03, at most 1.00e-03" in printed and "STOPPED" in printed


def test_nothing_is_measured_where_correctness_could_not_be_checked(capsys):
    rows, well, _ = measured({"correctness": bad, "decode": good})
    assert [row.part for row in rows] == ["correctness"] * 2 and not well
    assert "STOPPED" in capsys.readouterr().out


def test_a_disagreement_elsewhere_is_told_and_stops_nothing(capsys):
    rows, well, _ = measured({"half": Part(lambda run: iter([check("nan", float("nan"), 1.0)]), 1), "decode": good})
    assert len(rows) == 3 and not well and "DISAGREES: nan" in capsys.readouterr().out


def test_what_no_time_was_left_for_is_listed_and_the_next_part_gets_its_own(capsys):
    def slow(run):
        """Rows, the second of them late."""
        yield Row("first", 1.0)
        time.sleep(10)
        yield Row("late", 1.0)

    rows, well, _ = measured({"decode": slow, "prefill": good}, seconds=0.6)
    assert [row.name for row in rows] == ["first", "not measured, the time was up: the rest of decode", "one", "two"]
    assert rows[1].note == "Rows, the second of them late" and well


def test_correctness_that_was_not_finished_does_not_end_well(capsys):
    def slow(run):
        """Checks."""
        yield check("fine", 0.0, 1.0)
        time.sleep(10)

    rows, well, _ = measured({"correctness": slow, "decode": good}, seconds=0.4)
    assert len(rows) == 4 and not well


_attention, _mix = fast.attention, fast.mix


def narrower(attn, q, k, v, sinks, visible, heard):
    return _attention(attn, q, k, v, sinks, Visible(visible.query, visible.key, visible.window and visible.window - 1), heard)


def without_sink(attn, q, k, v, sinks, visible, heard):
    return _attention(attn, q, k, v, torch.full_like(sinks, -torch.inf), visible, heard)


def equal_weights(moe, x, indices, weights, heard):
    return _mix(moe, x, indices, torch.full_like(weights, 0.25), heard)


def never_written(moe, x, indices, weights, heard):
    return _mix(moe, x, indices, weights, heard).index_fill_(-1, torch.tensor([7]), torch.nan)


@pytest.mark.parametrize("wrong", [narrower, without_sink, equal_weights, never_written])
def test_the_checks_see_a_fast_path_that_is_wrong(wrong, monkeypatch):
    monkeypatch.setattr(fast, "attention" if wrong in (narrower, without_sink) else "mix", wrong)
    assert any(not error <= allowed for _, error, allowed in gpu_checks.small(torch.device("cpu"), torch.float32, 60))


def test_the_checks_see_keys_that_were_not_kept(monkeypatch):
    commit = KVCache.commit

    def forgetful(cache, positions):
        commit(cache, positions)
        cache.layers[1][0][:, cache.length - 1] = 0

    monkeypatch.setattr(KVCache, "commit", forgetful)
    assert any(not error <= allowed for _, error, allowed in gpu_checks.small(torch.device("cpu"), torch.float32, 60))


def test_a_filled_cache_is_as_one_that_has_read():
    config = SMALL.with_(n_layers=2, layer_types=SMALL.layer_types[:2])
    model = model_of(config, random_state(config, "cpu", torch.float32))
    filled, read = fill(model, KVCache(config), 100, chunk=33), KVCache(config)
    model(torch.zeros(1, 100, dtype=torch.long), cache=read)
    assert (filled.length, filled.dropped, filled.batch) == (read.length, read.dropped, read.batch)
    for layer in range(2):
        for ours, theirs in zip(filled.layers[layer], read.layers[layer]):
            held = 100 if config.window(layer) is None else config.sliding_window
            assert ours[:, :held].shape == theirs[:, :held].shape and ours[:, :held].std() > 0.9
    assert model(torch.ones(1, 1, dtype=torch.long), cache=filled).isfinite().all()


def test_random_weights_repeat_have_no_trivial_part_and_pass_the_clamp():
    one, again, other = (random_state(SMALL, "cpu", torch.float32, seed, sharp=True) for seed in (0, 0, 1))
    assert all(torch.equal(x, again[name]) and not torch.equal(x, other[name]) for name, x in one.items())
    assert set(one) == set(GptOss(SMALL, packed=True).state_dict()) and all(x.double().std() > 0 for x in one.values())
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        _, acts = model_of(SMALL, one).run_with_cache(tokens, "*.hook_pre")
    assert all(1e-3 < (x > SMALL.swiglu_limit).double().mean() < 0.2 for x in acts.values())


def test_hugging_faces_model_has_the_same_numbers_and_says_what_a_token_reads():
    pytest.importorskip("transformers")
    model = model_of(SMALL, random_state(SMALL, "cpu", torch.float32))
    hf, tokens = gpu_peers.hugging_face(model), torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(hf(tokens).logits, model(tokens), rtol=0, atol=1e-4)
    c, experts = SMALL, SMALL.d_model * SMALL.d_ff * 3 + 2 * SMALL.d_ff + SMALL.d_model
    rest = sum(x.numel() for name, x in hf.state_dict().items() if "experts" not in name and "embed" not in name)
    used = rest + c.d_model + c.n_layers * c.experts_per_token * experts
    assert gpu_peers.read_a_token(hf) == 4 * used


def test_a_verdict_says_which_bound_is_reached():
    verdict = lambda x, at_most: Row("", x, "", *((2.0, 1.0) if at_most else (1.0, 2.0)), at_most=at_most).verdict
    assert [verdict(x, True) for x in (2.1, 2.0, 1.0)] == ["MISSED", "goal", "stretch"]
    assert [verdict(x, False) for x in (0.9, 1.0, 2.0)] == ["MISSED", "goal", "stretch"]
    assert Row("", 1.0).verdict == Row("", None, "", 1.0).verdict == ""


def test_repeats_take_turns_and_end_when_time_does():
    seen = []
    call = lambda name: lambda: seen.append(name) or time.sleep(0.02) or 1.0
    run = a_run(deadline=time.monotonic() + 60)
    assert run.in_turn({"a": call("a"), "b": call("b")}, 3) == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert [sorted(seen[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
    run.deadline = time.monotonic() - 1
    assert run.in_turn({"a": call("a")}, 3) == {"a": [1.0]}


def test_the_results_are_written_whole(tmp_path):
    rows = [gpu_run.of("speed", [1.0, 2.0, 3.0], "tokens/s", 1.5, 4.0, note="a | b"), check("off", float("inf"), 0.1)]
    gpu.write(tmp_path, {"GPU": "none"}, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    found = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)
    assert found["rows"][0] | {"part": ""} == found["rows"][0]
    assert (found["rows"][0]["verdict"], found["rows"][0]["quartiles"]) == ("goal", [1.5, 2.5])
    assert (found["rows"][1]["verdict"], found["rows"][1]["measured"]) == ("DISAGREES", None)
    line = (tmp_path / "gpu.md").read_text().splitlines()[4]
    assert line == "|  | speed | 2 | 1.5 to 2.5 | tokens/s | at least 1.5 | at least 4 | goal | 3 runs; a / b |"
