"""The benchmark runs and its statistics are right. Nothing here is timed."""
import ast
import sys
import time
from pathlib import Path

import pytest
import torch
from models import one_thread, random_model, random_tokens  # noqa: F401

import gptoss_lab
from bench import __main__, decode, experts, forward, ggml, models, timing
from gptoss_lab import GptOss, mxfp4
from gptoss_lab.config import TINY, published
from gptoss_lab.fast import cpu
from gptoss_lab.synth import synthesise

PACKAGE = Path(gptoss_lab.__file__).parent


def attributes(source: str | ast.AST) -> set[str]:
    """Every name that is read as an attribute of something."""
    tree = ast.parse(source) if isinstance(source, str) else source
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_a_ratio_is_taken_within_each_round():
    ours, theirs = [1.0, 10.0, 3.0, 40.0, 5.0], [2.0, 40.0, 3.0, 20.0, 4.0]  # 0.5 0.25 1 2 1.25
    assert timing.spread(timing.ratios(ours, theirs)) == timing.Spread(0.5, 1.0, 1.25)
    with pytest.raises(ValueError):
        timing.ratios(ours, theirs[:-1])


def test_quartiles_lie_between_values():
    assert timing.spread([4.0, 1.0, 2.0, 3.0]) == timing.Spread(1.75, 2.5, 3.25)


def test_every_run_is_called_once_a_round_in_changing_order():
    seen = []
    times = timing.interleave({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=20, warm_up=2)
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 22 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert all(len(each.cpu) == len(each.wall) == 20 for each in times.values())


def test_a_bound_is_reached_up_to_its_value():
    at_most, at_least = timing.Goal("a", "b", at_most=0.5), timing.Goal("a", "b", at_least=2.0)
    assert at_most.verdict(0.5).endswith("reached") and at_most.verdict(0.51).endswith("MISSED")
    assert at_least.verdict(2.0).endswith("reached") and at_least.verdict(1.99).endswith("MISSED")
    assert timing.Goal("a", "b").verdict(1.0) == ""


def test_every_file_that_names_a_hook_point_loses_its_hooks_for_the_comparison():
    mechanism, asked = {"hook", "heard", "edited", "give", "listeners"}, {"hooks", "fast/gpu/step", "fast/__init__"}
    named = lambda path: path.relative_to(PACKAGE).with_suffix("").as_posix()
    hooked = {named(path) for path in PACKAGE.rglob("*.py") if mechanism & attributes(path.read_text())} - asked
    assert hooked == set(models.HOOKED_FILES)
    for file in hooked:
        bare = models.without_hook_calls((PACKAGE / f"{file}.py").read_text())
        assert not (mechanism | {"begin"}) & attributes(bare)


def test_the_model_without_hooks_gives_the_same_logits_and_hears_nobody():
    ours = models.ours(TINY)
    bare, tokens = models.without_hooks(ours), random_tokens(TINY, 2, 40)
    silent = []
    with torch.no_grad():
        torch.testing.assert_close(bare(tokens), ours(tokens), rtol=0, atol=0)
        for model in (ours, bare):
            with gptoss_lab.record(model, "*.hook_resid_post") as acts:
                model(tokens)
            silent.append(len(acts) == 0)
    assert silent == [False, True]
    assert type(ours) is gptoss_lab.GptOss and bare.embed.weight.data_ptr() == ours.embed.weight.data_ptr()


def test_the_products_alone_end_in_the_logits():
    ours, tokens = models.ours(TINY), random_tokens(TINY, 1, 20)
    with torch.no_grad(), forward.Products() as products:
        logits = ours(tokens)
    assert len(products.given) > 4 * TINY.n_layers
    torch.testing.assert_close(products.again(), logits, rtol=0, atol=0)


@pytest.mark.parametrize("part", [forward, decode])
def test_a_part_runs_beside_hugging_face_and_prints_its_goals(part, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(forward, "SIZES", {(1, 8): 0.5})
    monkeypatch.setattr(decode, "NEW", 3)
    ours = models.ours(TINY)
    part.main(ours, {"transformers": models.hugging_face(ours)}, rounds=2)
    printed = capsys.readouterr().out
    assert "2 rounds, load" in printed or "20 rounds, load" in printed
    assert printed.count("at most") + printed.count("at least") == {forward: 4, decode: 1}[part]


def test_a_run_with_other_logits_is_not_timed(monkeypatch):
    monkeypatch.setattr(forward, "SIZES", {(1, 8): 0.5})
    ours = models.ours(TINY)
    other = models.ours(TINY, seed=1)
    monkeypatch.setattr(models, "without_hooks", lambda model: other)
    with pytest.raises(AssertionError, match="ours, hooks deleted"):
        forward.main(ours, {}, rounds=2)


def test_streamed_and_dense_attention_give_one_summary():
    from bench import streaming

    with torch.no_grad():
        for shape in streaming.SHAPES:
            ways = streaming.calls(shape, 40)
            values = {name: torch.stack(call()) for name, call in ways.items()}
            assert {"streamed", "dense"} <= set(values)
            for name, value in values.items():
                torch.testing.assert_close(value, values["streamed"], atol=1e-5, rtol=1e-4, msg=name)


def packed(*shape):
    blocks, scales = torch.randint(256, (*shape, 16)), torch.randint(118, 122, shape)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def test_ggml_blocks_hold_the_same_numbers_in_their_order():
    blocks, scales = packed(3, 5, 2)
    theirs = ggml.blocks_of(blocks, scales)
    assert theirs.shape == (3, 5, 2, 17) and theirs.dtype == torch.uint8
    # dequantize_row_mxfp4 of ggml-quants.c: the low four bits of byte j are number j, the high four number j + 16
    values = torch.tensor(mxfp4.MAGNITUDES + tuple(-m for m in mxfp4.MAGNITUDES))
    numbers = torch.stack([values[(theirs[..., 1 + i % 16] >> 4 * (i // 16) & 15).int()] for i in range(32)], dim=-1)
    numbers = numbers * torch.exp2(theirs[..., :1].float() - mxfp4.BIAS)
    assert torch.equal(numbers.flatten(-2), mxfp4.unpack(blocks, scales, torch.float32))


@pytest.mark.skipif(bool(ggml.missing()), reason=str(ggml.missing()))
@pytest.mark.parametrize("repacked", [False, True])
def test_ggml_multiplies_by_the_expert_that_is_asked_for(repacked):
    blocks, scales = packed(3, 64, 8)
    matrices, x = ggml.Matrices(blocks, scales, repacked), torch.randn(256)
    for expert in (2, 0, 1):
        exact = mxfp4.unpack(blocks[expert], scales[expert], torch.float64) @ x.double()
        assert (matrices(expert, x) - exact).norm() < 0.02 * exact.norm()  # the vector is rounded to 8 bits


@pytest.mark.skipif(cpu.compiled() is None, reason="no C++ compiler is here")
def test_the_products_of_an_expert_are_checked_before_they_are_timed(capsys, monkeypatch):
    moe = random_model(TINY.with_(n_layers=1, layer_types=TINY.layer_types[:1]), packed=True).blocks[0].mlp
    with torch.no_grad():
        experts.products(moe, rounds=2)
        assert "relative error" in capsys.readouterr().out
        multiply = cpu.multiply
        monkeypatch.setattr(cpu, "multiply", lambda *given: 1.001 * multiply(*given))
        with pytest.raises(AssertionError, match="ours, exact: relative error 1"):
            experts.products(moe, rounds=2)


def test_a_token_of_the_20b_reads_3_708_gigabytes():
    from bench import whole

    with torch.device("meta"):
        model = GptOss(published("gpt-oss-20b"), packed=True).bfloat16()
    assert whole.read_a_token(model) == 3_708_089_088


linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")


@linux
def test_the_peak_is_of_memory_that_no_file_stands_behind():
    from bench import whole

    with whole.Peak() as peak:
        before = whole.anonymous()
        x = torch.ones(2**24)
        time.sleep(0.1)  # it is looked for every 5 ms, and the machine may have other work
        del x
    assert 60 * 2**20 < peak.n_bytes - before < 100 * 2**20


@linux
def test_a_whole_checkpoint_is_measured_in_a_process_of_its_own(tmp_path):
    from bench import whole

    folder = str(synthesise(TINY, tmp_path / "model"))
    result = whole.measured("decode", folder, threads=1)
    assert len(result["seconds"]) == whole.TIMED and 0 < result["kv"] < result["peak"]
    assert whole.measured("prefill", folder, threads=1)["n"] == TINY.n_ctx
    with pytest.raises(RuntimeError, match="prefill with 1 threads failed: .*nothing"):
        whole.measured("prefill", str(tmp_path / "nothing"), threads=1)


@pytest.mark.parametrize("given, said", [(["whole"], "of which checkpoint"), (["fast"], "no part fast"),
                                         (["--rounds", "1"], "at least 2")])  # fmt: skip
def test_a_wrong_part_is_told_before_anything_is_timed(given, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *given])
    with pytest.raises(SystemExit):
        __main__.main()
    assert said in capsys.readouterr().err


def test_it_starts_again_with_a_heap_that_keeps_what_is_freed(monkeypatch):
    started = []
    monkeypatch.setattr(__main__.os, "execve", lambda *given: started.append(given))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "bench", "forward"])
    for name in __main__.HEAP:
        monkeypatch.delenv(name, raising=False)
    __main__.with_a_steady_heap()
    (program, arguments, environment), = started
    assert arguments == [program, "-X", "dev", "-m", "bench", "forward"] and environment.items() >= __main__.HEAP.items()
    for name, value in __main__.HEAP.items():
        monkeypatch.setenv(name, value)
    __main__.with_a_steady_heap()
    assert len(started) == 1
