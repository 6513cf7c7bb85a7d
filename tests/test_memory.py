"""Room for large recorded values: each is its own while it lives, and serves another when it is gone."""
import gc

import pytest
import torch
from models import random_model, random_tokens, tiny_config

from gptoss_lab import edit, memory, record

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not hasattr(memory.mmap, "MADV_HUGEPAGE"), reason="only Linux has large pages to ask for")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    gc.collect()
    monkeypatch.setattr(memory, "_unused", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(1, 3), (7, 100_003), (3, 5, 333_333)])
def test_it_is_a_tensor_as_any_other(shape, dtype):
    x = memory.room(torch.zeros(1, dtype=dtype), shape)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous() and x._base is None
    assert x.untyped_storage().nbytes() == x.nbytes and x.data_ptr() % 64 == 0
    x.fill_(3).view(-1)[1] = 4
    assert x.double().sum() == 3 * x.numel() + 1
    copy = memory.copied(x.mT)
    assert torch.equal(copy, x.mT) and copy.is_contiguous()


def test_what_is_gone_serves_the_next_and_what_lives_nobody_else():
    like, shape = torch.zeros(()), (2, 2**18)
    first, second = memory.room(like, shape), memory.room(like, shape)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2 and not memory._unused
    part = first[1, 5:]  # keeps the whole
    del first
    third = memory.room(like, shape)
    assert third.data_ptr() not in places
    del part, second
    assert {memory.room(like, shape).data_ptr(), third.data_ptr()} - places == {third.data_ptr()}
    kept = [memory.room(like, (2, 2**18 - 1000)) for _ in range(2)]  # nearly as many
    assert {x.data_ptr() for x in kept} == places


def test_no_more_is_kept_than_said(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 5 * 2**20)
    several = [memory.room(torch.zeros(()), (2**19,)) for _ in range(4)]  # of 2 MiB
    several.append(memory.room(torch.zeros(()), (2**21,)))
    while several:
        del several[0]
    assert [len(some) for some in memory._unused.values()] == [2]


def test_a_size_that_is_no_longer_asked_for_makes_way(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 16 * 2**20)
    old = [memory.room(torch.zeros(()), (2**19,)) for _ in range(8)]
    del old
    for _ in range(3):
        new = memory.room(torch.zeros(()), (2**21,))  # of 8 MiB
        place = new.data_ptr()
        del new
        assert len(memory._unused[2**23]) == 1 and len(memory._unused[2**21]) == 4
    assert memory.room(torch.zeros(()), (2**21,)).data_ptr() == place
    assert sum(size * len(some) for size, some in memory._unused.items()) <= memory.KEPT


def test_it_takes_what_is_counted_and_little_address_space():
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

    before, mapped = resident(), int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    values = [memory.room(torch.zeros(()), (n,)).fill_(1) for n in [655_360] * 40 + [65_536] * 100]  # 2.5 MiB, 256 KiB
    need = sum(x.nbytes for x in values)
    assert resident() - before < 1.25 * need
    assert int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() - mapped < 2 * need


@pytest.mark.parametrize("n", [2**18, 2**18 + 1, 10**6, 2**23 - 5, 10**9 + 7])
def test_sizes_are_rounded_by_a_quarter_at_most(n):
    assert n <= memory._rounded(n) <= 1.25 * n and memory._rounded(memory._rounded(n)) == memory._rounded(n)


def test_without_address_space_pytorch_says_so(monkeypatch):
    def fail(*given, **named):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", fail)
    assert memory.room(torch.zeros(()), (2**20,)).shape == (2**20,)


@torch.no_grad()
def test_recording_again_and_again_takes_no_new_memory_and_changes_nothing_recorded():
    model, tokens = random_model(tiny_config(n_ctx=512), dtype=torch.float32), random_tokens(tiny_config(), 4, 400)
    runs = []
    for seed in range(3):
        with record(model, "*") as acts:
            model(tokens.roll(seed, 1))
        runs.append((acts, {name: x.clone() for name, x in acts.items()}))
    for acts, copies in runs:
        assert all(torch.equal(x, copies[name]) for name, x in acts.items())
        assert len({x.data_ptr() for x in acts.values()}) == len(acts)
    del runs, acts, copies
    before = None
    for turn in range(12):
        with record(model, "*"):
            model(tokens)
        if turn == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB


def test_under_a_transform_and_with_another_default_device_it_is_a_tensor_as_any_other():
    model, tokens = random_model(tiny_config(n_ctx=512), dtype=torch.float32), random_tokens(tiny_config(), 4, 400)
    model.requires_grad_(False)

    def loss(d):
        with edit(model, {("resid_pre", 1): lambda x: x + d}), record(model, "*") as acts:
            model(tokens)
        return acts["resid_post", 2].square().mean()

    assert torch.func.grad(loss)(torch.zeros(32)).abs().sum() > 0
    torch.set_default_device("meta")
    try:
        x = memory.copied(torch.ones(2**20, device="cpu"))
    finally:
        torch.set_default_device(None)
    assert x.device.type == "cpu" and x.sum() == 2**20
