"""Training of the tiny model: it learns, it goes on where it was stopped, and nothing is lost."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from models import one_thread  # noqa: F401

import gptoss_lab as lab
from gptoss_lab.cli import main
from gptoss_lab.config import FULL, SLIDING, TINY
from gptoss_lab.tiny import data, train
from gptoss_lab.tiny.train import STATE, Recipe, Run

SMALL = TINY.with_(n_layers=2, layer_types=(SLIDING, FULL), d_model=32, n_heads=2, n_kv_heads=1, d_head=16, d_ff=32,
                   n_experts=4, experts_per_token=2, yarn=None)  # fmt: skip


def recipe(**changes) -> Recipe:
    return Recipe(**{"config": SMALL, "steps": 30, "batch_tokens": 256, "warmup": 5} | changes)


def weights(run) -> dict:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def forward(run, n):
    for _ in range(n):
        run.step()


# --- learning ---


def test_the_loss_falls():
    run = Run("unwritten", recipe(steps=150, batch_tokens=512))
    forward(run, 150)
    first, last = run.log[0], run.log[-1]
    assert [entry["step"] for entry in run.log] == [50, 100, 150]
    for domain in ("recall", "story", "code"):  # copying takes a longer run
        assert last[domain] < first[domain] - 0.5 and first[domain] < math.log(512), (domain, first, last)
    assert run.done == 150


def test_the_model_begins_the_same_everywhere_and_knows_nothing():
    model = train.initial(Recipe(seed=0))
    assert model.embed.weight[0, :3].tolist() == pytest.approx([0.882026, 0.200079, 0.489369], abs=1e-5)  # RandomState(0)
    assert all(not block.attn.sinks.any() and not block.attn.qkv.bias.any() for block in model.blocks)
    batch = data.batch(0, 4, 128)
    with torch.no_grad():
        assert train.token_losses(model(batch.read), batch).mean() == pytest.approx(math.log(512), abs=0.1)


def test_every_weight_is_trained_once():
    run = Run("unwritten", recipe())
    trained = [id(w) for one in run.optimisers for group in one.param_groups for w in group["params"]]
    assert sorted(trained) == sorted(id(w) for w in run.model.parameters())
    before = weights(run)
    run.step()
    assert [name for name, tensor in weights(run).items() if torch.equal(tensor, before[name])] == []


def test_learning_rates_rise_stay_and_fall_to_nothing():
    rates = [Recipe(steps=1000, warmup=50).rate(step) for step in range(1001)]
    assert rates[0] == 1 / 50 and rates[49] == rates[600] == 1 and rates[1000] == 0
    assert rates[800] == pytest.approx(0.5)


def test_contexts_grow_and_the_first_ones_hold_only_what_fits():
    lengths = [Recipe(steps=100, batch_tokens=256).batch(step).read.shape for step in (0, 17, 18, 31, 32, 99)]
    assert lengths == [(8, 32), (8, 32), (4, 64), (4, 64), (2, 128), (2, 128)]
    assert set(Recipe(steps=100).batch(0).domains.unique().tolist()) <= {data.DOMAINS.index(name) for name in data.SHORT}


# --- its parts ---


def test_newton_schulz_brings_singular_values_near_one_of_stacks_of_matrices():
    for shape in ((5, 40, 24), (24, 40), (3, 16, 16)):
        x = torch.randn(shape)
        values = torch.linalg.svdvals(train.orthogonalised(x))
        assert values.min() > 0.3 and values.max() < 1.4
        u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
        assert torch.nn.functional.cosine_similarity((u @ v).flatten(), train.orthogonalised(x).double().flatten(), dim=0) > 0.9


def test_muon_is_torchs_on_single_matrices():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon to compare with")
    start, ours, theirs = torch.randn(24, 16), torch.nn.Parameter(torch.zeros(24, 16)), torch.nn.Parameter(torch.zeros(24, 16))
    for weight in (ours, theirs):
        weight.data.copy_(start)
    one = train.Muon([ours], 0.02, 0.95, 0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(4):
        gradient = torch.randn(24, 16)
        for weight, optimiser in ((ours, one), (theirs, other)):
            weight.grad = gradient.clone()
            optimiser.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved  # torch's works in bfloat16


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_when_one_gets_all():
    even = torch.zeros(1, 8, 4)
    assert train.balance_loss(even, torch.arange(8).view(1, 8, 1) % 4) == pytest.approx(1)
    one = torch.tensor([30.0, 0, 0, 0]).expand(1, 8, 4)
    assert train.balance_loss(one, torch.zeros(1, 8, 1, dtype=torch.long)) == pytest.approx(4)


def test_losses_by_domain_leave_out_what_nothing_foretells():
    batch = data.Batch(torch.zeros(1, 5, dtype=torch.long), torch.tensor([[0, 0, 0, 2, 2]]),
                       torch.tensor([[False, True, False, False, True]]))  # fmt: skip
    losses = torch.tensor([[9.0, 1, 3, 7]])
    assert train.by_domain(losses, batch) == {"repeat": 1.0, "story": 3.0}


def test_a_control_without_sinks_never_has_any():
    run = Run("unwritten", recipe(variant="no-sinks"))
    forward(run, 2)
    assert all((block.attn.sinks == -math.inf).all() for block in run.model.blocks)
    with lab.record(run.model, "*.hook_sink_mass") as acts, torch.no_grad():
        run.model(torch.arange(20)[None])
    assert all((mass == 0).all() for mass in acts.values())


def test_a_control_that_answers_at_once_never_sees_an_analysis():
    channel = data.encode("analysis")[0]
    seen = {variant: Recipe(variant=variant, steps=10).batch(9).tokens for variant in ("standard", "direct-only")}
    assert (seen["standard"] == channel).any() and not (seen["direct-only"] == channel).any()


def test_a_control_without_the_balance_loss_differs_from_the_second_step_on():
    one, other = Run("unwritten", recipe()), Run("unwritten", recipe(variant="no-balance"))
    forward(one, 1), forward(other, 1)
    routers = [run.model.blocks[0].mlp.router.weight for run in (one, other)]
    assert not torch.equal(*routers)


# --- stopping and going on ---


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = Run(tmp_path / "whole", recipe())
    forward(whole, 30)
    for stop in (7, 19):  # in two pieces, and in three
        part = Run(tmp_path / "parts", recipe())
        forward(part, stop - part.done)
        part.save_state()
    last = Run(tmp_path / "parts", recipe())
    assert last.done == 19
    forward(last, 11)
    assert equal(weights(last), weights(whole)) and last.log == whole.log


def test_a_killed_command_goes_on_and_ends_where_it_would_have(tmp_path, monkeypatch):
    program = ("import sys; from gptoss_lab.tiny import train; from test_tiny_train import recipe; "
               "train.train(sys.argv[1], recipe(steps=40), every=3)")  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    for how in (signal.SIGKILL, signal.SIGTERM):
        running = subprocess.Popen([sys.executable, "-c", program, tmp_path / "killed"], env=environment,
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        before = _done(tmp_path / "killed")
        deadline = time.monotonic() + 120
        while _done(tmp_path / "killed") <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(how)
        _, errors = running.communicate(timeout=60)
        assert running.returncode != 0, "it had finished already"
        assert how is signal.SIGKILL or "KeyboardInterrupt" in errors
    done = _done(tmp_path / "killed")
    assert 0 < done < 40
    resumed = train.train(tmp_path / "killed", recipe(steps=40), every=3)
    whole = train.train(tmp_path / "whole", recipe(steps=40))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def _done(folder) -> int:
    import safetensors

    if not (folder / STATE).exists():
        return 0
    with safetensors.safe_open(str(folder / STATE), "pt") as file:
        return json.loads(file.metadata()["run"])["done"]


def test_an_interrupted_write_leaves_the_last_good_state(tmp_path, monkeypatch):
    run = Run(tmp_path, recipe())
    forward(run, 2)
    run.save_state()
    good = (tmp_path / STATE).read_bytes()
    run.step()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.os, "fsync", full)
    with pytest.raises(OSError, match="state of step 3 could not be written to .*No space left.*unchanged"):
        run.save_state()
    assert (tmp_path / STATE).read_bytes() == good and [p.name for p in tmp_path.iterdir()] == [STATE]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "foreign"])
def test_a_damaged_state_is_told_and_never_trained_on(tmp_path, damage):
    run = Run(tmp_path, recipe())
    run.step()
    run.save_state()
    path = tmp_path / STATE
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-100] ^= 1
    path.write_bytes({"cut": content[:-9], "flipped": content, "text": b"hello"}.get(damage, content))
    if damage == "foreign":
        import safetensors.torch

        safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=rf"{STATE} is damaged \(.*remove it to begin anew"):
        Run(tmp_path, recipe())


def test_a_folder_with_another_run_is_refused_with_what_differs(tmp_path):
    run = Run(tmp_path, recipe())
    run.save_state()
    with pytest.raises(ValueError, match=r"other settings, \{'seed': 1\}: choose another folder"):
        Run(tmp_path, recipe(seed=2))


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_are_touched(tmp_path):
    run = Run(tmp_path, recipe())
    with torch.no_grad():
        run.model.unembed.weight[3, 4] = math.nan
    before = weights(run)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        run.step()
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before.values(), weights(run).values()))


# --- the command ---


def test_the_command_trains_saves_and_says_where(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Recipe, "__init__", _small_init)
    assert main(["train-tiny", str(tmp_path / "run"), "--steps", "4", "--seed", "3"]) == 0
    out = capsys.readouterr()
    assert f"gptoss_lab.load('{tmp_path}/run/model')" in out.out and "4/4" in out.err and "repeat" in out.err
    model = lab.load(tmp_path / "run" / "model")
    assert model.dtype == torch.bfloat16 and model.tokenizer.n_vocab == 512


_init = Recipe.__init__


def _small_init(self, *args, **kwargs):
    _init(self, *args, **{"config": SMALL, "batch_tokens": 256} | kwargs)


@pytest.mark.parametrize("wrong, message", [
    (["--steps", "0"], "steps = 0"),
    (["--seed", "-1"], "seed = -1"),
    (["--variant", "no-sinks", "--verify"], "--verify compares the standard model"),
])  # fmt: skip
def test_a_wrong_flag_is_told(tmp_path, capsys, wrong, message):
    assert main(["train-tiny", str(tmp_path / "run"), *wrong]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_variant_is_answered_with_those_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train-tiny", str(tmp_path), "--variant", "no-attention"])
    assert stopped.value.code == 2 and "direct-only" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(train.Recipe, "__init__", _small_init)
    assert main(["train-tiny", str(tmp_path / "file" / "run"), "--steps", "1"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
