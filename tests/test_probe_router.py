"""The router probe: every number against slow loops, on recorded choices of the real 20B, and its edits."""
import functools
import itertools
import math
import sys
import types
from collections import Counter

import pytest
import torch
from models import one_thread, random_model, random_tokens, tiny_config  # noqa: F401
from shared import facts

from gptoss_lab import KVCache, edit, generate, record
from gptoss_lab.probes.effect import Effect
from gptoss_lab.probes.router import Routing, drop, evenness, force, reweight
from gptoss_lab.probes.specialisation import Specialisation

CONFIG = tiny_config(n_layers=3)
TOKENS = random_tokens(CONFIG, 2, 24)
L, B, S, E, K = 3, 2, 24, 8, 3
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
nothing = dict(rtol=0, atol=0)
near = dict(rtol=0, atol=1e-10)


@functools.cache
def model(packed=False):
    return random_model(CONFIG, packed=packed)


@functools.cache
def routing(packed=False) -> Routing:
    return Routing.measure(model(packed), TOKENS)


def loops(probe: Routing):
    """(layer, row, position, experts, weights) of every valid token, as plain numbers."""
    for l, b, s in itertools.product(*map(range, probe.experts.shape[:3])):
        if probe.valid[b, s]:
            yield l, b, s, probe.experts[l, b, s].tolist(), probe.weights[l, b, s].tolist()


def slow_information(pairs) -> float:
    """Mutual information of a list of (x, y), in nats, from probabilities."""
    n, both = len(pairs), Counter(pairs)
    x, y = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    return sum(c / n * math.log((c / n) / (x[a] / n * (y[b] / n))) for (a, b), c in both.items())


def same(one: Routing, other: Routing):
    torch.testing.assert_close(one.experts, other.experts, **nothing)
    torch.testing.assert_close(one.weights, other.weights, **near)
    torch.testing.assert_close(one.logits, other.logits, **near)
    assert (one.layers, one.n_experts) == (other.layers, other.n_experts)


# ------------------------------------------------------------------------------------------ the real model


@functools.cache
def traces() -> Routing:
    """Three recorded answers of the real 20B, of 32, 49 and 36 tokens, as a batch filled up with -1."""
    given = facts("golden_20b_router_traces.json")["traces"]
    longest = max(len(trace["routing_experts"]) for trace in given)
    experts = torch.full((24, 3, longest, 4), -1)
    weights = torch.full((24, 3, longest, 4), torch.nan, dtype=torch.float64)
    valid = torch.zeros(3, longest, dtype=torch.bool)
    for row, trace in enumerate(given):
        n = len(trace["routing_experts"])
        experts[:, row, :n] = torch.tensor(trace["routing_experts"]).transpose(0, 1)
        weights[:, row, :n] = torch.tensor(trace["routing_weights"], dtype=torch.float64).transpose(0, 1)
        valid[row, :n] = True
    return Routing.from_choices(experts, weights, n_experts=32, valid=valid)


def test_the_recorded_20b_gives_its_four_experts_the_published_weights_by_rank():
    assert traces().n_tokens == 117
    assert [round(w, 3) for w in traces().mean_weights.mean(0).tolist()] == [0.364, 0.262, 0.205, 0.169]


def test_neighbouring_tokens_of_the_recorded_20b_share_1_534_of_4_experts():
    assert round(traces().persistence().mean().item(), 3) == 1.534
    shares = [len({*x} & {*y}) for trace in facts("golden_20b_router_traces.json")["traces"]
              for one, two in itertools.pairwise(trace["routing_experts"]) for x, y in zip(one, two)]  # fmt: skip
    assert len(shares) == 114 * 24  # 117 tokens in three texts are 114 pairs
    assert traces().persistence().mean().item() == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_neighbours_in_the_first_layers_of_the_recorded_20b_share_least_and_all_more_than_chance():
    shared = traces().persistence()
    assert shared[0] < shared[1] < shared[2:].min()
    assert (shared > traces().k ** 2 / traces().n_experts).all()


def test_the_published_loads_of_the_20b_have_the_published_entropies():
    given = facts("router_load_20b.json")
    load = torch.tensor(given["freq"], dtype=torch.float64)
    assert round(evenness(load).mean().item(), 3) == 0.913
    for layer, row in enumerate(given["by_layer"]):
        assert evenness(load)[layer].item() == pytest.approx(row["pct"], abs=1e-4)  # the loads have 5 decimals
    assert (load[22].argmax().item(), round(load[22].max().item(), 3)) == (25, 0.555)


def test_choices_alone_have_no_logits_to_take_an_entropy_of():
    for name in ("entropy", "margin"):
        with pytest.raises(ValueError, match="needs the router's logits"):
            getattr(traces(), name)
    assert torch.allclose(traces().weight_entropy[:, traces().valid].exp().mean(), torch.tensor(3.7).double(), atol=0.3)


# ------------------------------------------------------------------------------------------ against slow loops


@PACKED
def test_choices_weights_entropy_and_margin_are_those_of_the_logits(packed):
    probe = routing(packed)
    with record(model(packed), *Routing.points) as acts:
        model(packed)(TOKENS)
    for l, b, s, experts, weights in loops(probe):
        logits = acts["router_logits", l][b, s].tolist()
        order = sorted(range(E), key=lambda e: -logits[e])
        assert experts == order[:K]
        p = [math.exp(x) for x in logits]
        top = [math.exp(logits[e]) for e in experts]
        assert weights == pytest.approx([x / sum(top) for x in top], abs=1e-12)
        slow = -sum(x / sum(p) * math.log(x / sum(p)) for x in p)
        assert probe.entropy[l, b, s].item() == pytest.approx(slow, abs=1e-10)
        assert probe.weight_entropy[l, b, s].item() == pytest.approx(-sum(w * math.log(w) for w in weights), abs=1e-10)
        assert probe.margin[l, b, s].item() == pytest.approx(logits[order[K - 1]] - logits[order[K]], abs=1e-12)


def half_valid() -> Routing:
    """The same choices, of a batch whose second row is padded by seven on the left."""
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, :7] = False
    one = routing()
    return Routing.from_choices(one.experts, one.weights, E, one.logits, valid)


@pytest.mark.parametrize("probe", [routing, half_valid])
def test_load_co_use_mean_weights_and_persistence_are_counts(probe):
    probe = probe()
    load, together = torch.zeros(L, E).double(), torch.zeros(L, E, E).double()
    ranks, at = torch.zeros(L, K).double(), {}
    for l, b, s, experts, weights in loops(probe):
        at[l, b, s] = set(experts)
        for i in experts:
            load[l, i] += 1
            for j in experts:
                together[l, i, j] += 1
        ranks[l] += torch.tensor(weights, dtype=torch.float64)
    n = probe.n_tokens
    assert n == len(at) / L
    torch.testing.assert_close(probe.loads, load / n, **near)
    torch.testing.assert_close(probe.together(), together / n, **near)
    torch.testing.assert_close(probe.mean_weights, ranks / n, **near)
    for lag in (1, 3):
        for l in range(L):
            pairs = [len(at[l, b, s] & at[l, b, s + lag]) for b in range(B) for s in range(S)
                     if (l, b, s) in at and (l, b, s + lag) in at]  # fmt: skip
            assert probe.persistence(lag)[l].item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_evenness_is_one_for_even_loads_and_zero_for_a_single_worker():
    torch.testing.assert_close(evenness(torch.ones(2, 32)), torch.ones(2).double())
    assert evenness(torch.eye(5)[1]).item() == 0
    load = [0.5, 0.25, 0.25, 0.0]
    slow = -sum(p * math.log(p) for p in load if p) / math.log(4)
    assert evenness(torch.tensor(load)).item() == pytest.approx(slow, abs=1e-12)


def drawn(n: int, n_experts=32, k=4, seed=0) -> Routing:
    """Choices at random."""
    scores = torch.rand(1, 1, n, n_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights, experts = scores.sort(-1, descending=True)
    return Routing.from_choices(experts[..., :k], weights[..., :k].softmax(-1), n_experts)


def test_choices_at_random_reach_every_chance_level():
    probes = [drawn(400, seed=seed) for seed in range(30)]
    mean = lambda values: sum(values) / len(values)
    assert mean([evenness(p.loads).item() for p in probes]) == pytest.approx(probes[0].fair_evenness, abs=5e-4)
    assert mean([p.persistence().item() for p in probes]) == pytest.approx(0.5, abs=0.02)
    off_diagonal = ~torch.eye(32, dtype=torch.bool)
    assert mean([p.together()[0][off_diagonal].mean().item() for p in probes]) == pytest.approx(12 / (32 * 31), abs=1e-9)


def test_a_path_is_one_token_through_all_layers():
    experts, weights = routing().path(5, row=1)
    assert experts.tolist() == routing().experts[:, 1, 5].tolist()
    assert weights.shape == (L, K)
    torch.testing.assert_close(weights.sum(-1), torch.ones(L).double())
    torch.testing.assert_close(routing().path()[0], routing().experts[:, 0, -1], **nothing)


# ------------------------------------------------------------------------------------------ specialisation


LABELS = (TOKENS + torch.arange(S)) % 3


@pytest.mark.parametrize("rank", [None, 0, 2])
def test_information_is_that_of_the_counted_pairs(rank):
    told = routing().specialisation(LABELS, rank=rank)
    for l in range(L):
        pairs = [(e, LABELS[b, s].item()) for layer, b, s, experts, _ in loops(routing()) if layer == l
                 for e in (experts if rank is None else [experts[rank]])]  # fmt: skip
        assert told.information[l].item() == pytest.approx(slow_information(pairs), abs=1e-10)
        for c in range(3):
            share = [sum(x == (e, c) for x in pairs) / (LABELS == c).sum().item() for e in range(E)]
            assert told.share[l, c].tolist() == pytest.approx(share, abs=1e-12)
    assert told.tokens.tolist() == [(LABELS == c).sum().item() for c in range(3)]
    assert told.labels == (0, 1, 2)


def test_information_given_the_token_is_the_mean_over_tokens():
    tokens = TOKENS % 4
    told = routing().specialisation(LABELS, tokens)
    for l in range(L):
        slow = 0
        for token in range(4):
            pairs = [(e, LABELS[b, s].item()) for layer, b, s, experts, _ in loops(routing())
                     if layer == l and tokens[b, s] == token for e in experts]  # fmt: skip
            slow += len(pairs) / (B * S * K) * slow_information(pairs)
        assert told.information[l].item() == pytest.approx(slow, abs=1e-10)


def test_a_label_that_the_token_decides_looks_like_a_specialisation_until_the_token_is_given():
    tokens = random_tokens(CONFIG, 4, 200) % 12
    hashed = torch.rand(12, E, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :K]  # a router that is a hash
    probe = Routing.from_choices(hashed[tokens][None], torch.full((1, 4, 200, K), 1 / K), E)
    labels = tokens // 6
    assert (probe.specialisation(labels).excess > 20 * probe.specialisation(labels).spread).all()
    given = probe.specialisation(labels, tokens)
    assert given.information.abs().max() < 1e-12 and given.chance.abs().max() < 1e-12


def test_labels_are_shuffled_among_the_occurrences_of_one_token():
    tokens = TOKENS % 4
    told = routing().specialisation(tokens // 2, tokens)  # experts vary within a token, its label does not
    assert told.information.abs().max() < 1e-12 and told.chance.abs().max() < 1e-12


def test_an_expert_for_each_label_tells_everything_and_random_labels_nothing():
    labels = random_tokens(CONFIG, 2, 300) % 2
    experts = labels[None, ..., None] * 4  # expert 0 for label 0, expert 4 for label 1
    probe = Routing.from_choices(experts, torch.ones(1, 2, 300, 1), E)
    p = labels.double().mean().item()
    told = probe.specialisation(labels, random_tokens(CONFIG, 2, 300, seed=3) % 5)
    assert probe.specialisation(labels).information.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert told.excess.item() > 0.5
    unrelated = drawn(600).specialisation(random_tokens(CONFIG, 1, 600, seed=5) % 6)
    assert unrelated.information.item() > 0.005  # never negative, whatever the truth
    assert abs(unrelated.excess.item()) < 3 * unrelated.spread.item()


def test_labels_that_last_for_long_need_whole_rows_shuffled():
    """Texts of one domain each, and experts that only wander: tokens shuffled one by one see a specialisation."""
    rng = torch.Generator().manual_seed(2)
    texts, length = 16, 120
    steps = torch.rand(texts, length, generator=rng) < 0.02
    experts = ((steps.cumsum(1) + torch.randint(E, (texts, 1), generator=rng)) % E)[None, ..., None]
    probe = Routing.from_choices(experts, torch.ones(1, texts, length, 1), E)
    domains = (torch.arange(texts) % 2)[:, None].expand(texts, length)
    one_by_one, by_rows = probe.specialisation(domains), probe.specialisation(domains, rows=True)
    assert one_by_one.excess.item() > 10 * one_by_one.spread.item()
    assert abs(by_rows.excess.item()) < 2 * by_rows.spread.item()


def test_a_negative_label_and_padding_count_for_nothing():
    probe, labels = half_valid(), LABELS.clone()
    labels[0, :5] = -1
    kept = [(l, e, labels[b, s].item()) for l, b, s, experts, _ in loops(probe) if labels[b, s] >= 0 for e in experts]
    told = probe.specialisation(labels, rows=True)
    for l in range(L):
        slow = slow_information([(e, c) for layer, e, c in kept if layer == l])
        assert told.information[l].item() == pytest.approx(slow, abs=1e-10)
    assert told.tokens.sum() == S - 5 + S - 7


def test_the_same_seed_shuffles_in_the_same_way():
    one, two, other = (routing().specialisation(LABELS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.chance, two.chance) and not torch.equal(one.chance, other.chance)


# ------------------------------------------------------------------------------------------ every way to run


@PACKED
def test_a_prompt_alone_chunks_with_a_cache_and_generate_give_what_one_pass_gives(packed):
    whole, one = routing(packed), Routing.measure(model(packed), TOKENS[:1])
    torch.testing.assert_close(one.experts, whole.experts[:, :1], **nothing)
    torch.testing.assert_close(one.entropy, whole.entropy[:, :1], **near)
    cache = KVCache(CONFIG)
    with torch.no_grad(), record(model(packed), *Routing.points) as acts:
        for chunk in TOKENS.split([9, 1, 14], dim=1):
            model(packed)(chunk, cache=cache)
    same(Routing.of(acts), whole)
    with record(model(packed), *Routing.points) as acts:
        made = generate(model(packed), TOKENS[:, :20], 5, stop=())
    read = torch.cat([TOKENS[:, :20], torch.tensor(made)[:, :-1]], dim=1)
    same(Routing.of(acts), Routing.measure(model(packed), read))


def test_prompts_of_two_lengths_give_the_numbers_of_each_alone():
    prompts = [TOKENS[0, :12].tolist(), TOKENS[1, :7].tolist()]
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    with record(model(), *Routing.points) as acts:
        generate(model(), prompts, 1)
    both = Routing.of(acts, valid)
    alone = [Routing.measure(model(), torch.tensor([prompt])) for prompt in prompts]
    torch.testing.assert_close(both.loads, (12 * alone[0].loads + 7 * alone[1].loads) / 19, **near)
    shared = (11 * alone[0].persistence() + 6 * alone[1].persistence()) / 17
    torch.testing.assert_close(both.persistence(), shared, **near)


def test_some_layers_only():
    with record(model(), *Routing.points) as acts:
        model()(TOKENS)
    some = Routing.of(acts, layers=[2, 0])
    assert some.layers == (2, 0)
    torch.testing.assert_close(some.loads, routing().loads[[2, 0]], **nothing)


def test_a_probe_changes_neither_weights_nor_hooks():
    lab = random_model(CONFIG)
    before = {name: x.clone() for name, x in lab.state_dict().items()}
    Routing.measure(lab, TOKENS).specialisation(LABELS)
    Effect.measure(lab, TOKENS, drop(1, 2), force(2, 0), reweight(0, 1, 0.5), labels=LABELS)
    with pytest.raises(ValueError, match="experts"):
        Effect.measure(lab, TOKENS, drop(1, E))
    assert all(torch.equal(x, before[name]) for name, x in lab.state_dict().items())
    assert lab.recordings == () and not any(getattr(m, "listeners", None) for m in lab.modules())


# ------------------------------------------------------------------------------------------ edits, and their effect


@PACKED
def test_a_dropped_expert_is_never_chosen_and_the_next_best_is(packed):
    with edit(model(packed), drop(1, [0, 5])):
        probe = Routing.measure(model(packed), TOKENS)
    assert probe.loads[1, [0, 5]].tolist() == [0, 0]
    torch.testing.assert_close(probe.experts[0], routing(packed).experts[0], **nothing)
    for l, b, s, experts, _ in loops(probe):
        if l == 1:
            logits = routing(packed).logits[1, b, s].tolist()
            assert experts == sorted({*range(E)} - {0, 5}, key=lambda e: -logits[e])[:K]
    assert probe.entropy[1].isfinite().all() and probe.margin.isfinite().all()


@PACKED
def test_a_forced_expert_works_on_every_token_with_the_weight_of_its_logit(packed):
    with edit(model(packed), force(1, [6, 2])):
        probe = Routing.measure(model(packed), TOKENS)
    for l, b, s, experts, weights in loops(probe):
        if l == 1:
            usual, logits = routing(packed).experts[1, b, s].tolist(), probe.logits[1, b, s].tolist()
            assert experts == [2, 6, next(e for e in usual if e not in (2, 6))]
            top = [math.exp(logits[e]) for e in experts]
            assert weights == pytest.approx([x / sum(top) for x in top], abs=1e-12)


@PACKED
@pytest.mark.parametrize("factor", [0.0, 2.5])
def test_a_reweighted_expert_adds_that_much_of_its_output(packed, factor):
    names = "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_expert_out", *Routing.points
    with torch.no_grad(), record(model(packed), *names) as plain:
        model(packed)(TOKENS)
    with torch.no_grad(), edit(model(packed), reweight(1, [3, 4], factor)), record(model(packed), *names) as changed:
        model(packed)(TOKENS)
    slow = plain["mlp_out", 1].clone()
    for b, s, r in itertools.product(range(B), range(S), range(K)):
        if plain["expert_indices", 1][b, s, r].item() in (3, 4):
            slow[b, s] += (factor - 1) * plain["expert_weights", 1][b, s, r] * plain["expert_out", 1][b, s, r]
    torch.testing.assert_close(changed["mlp_out", 1], slow, **near)


@PACKED
def test_the_effect_of_an_edit_is_the_change_of_each_tokens_loss(packed):
    effect = Effect.measure(model(packed), TOKENS, drop(1, 2), labels=LABELS)
    with torch.no_grad():
        plain = model(packed)(TOKENS)
        with edit(model(packed), drop(1, 2)):
            edited = model(packed)(TOKENS)
    rows = {0: [], 1: [], 2: []}
    for b, s in itertools.product(range(B), range(S - 1)):
        p, q = ([math.exp(x) for x in logits[b, s].tolist()] for logits in (plain, edited))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        token = TOKENS[b, s + 1].item()
        assert effect.before[b, s].item() == pytest.approx(-math.log(p[token]), abs=1e-10)
        assert effect.after[b, s].item() == pytest.approx(-math.log(q[token]), abs=1e-10)
        assert effect.kl[b, s].item() == pytest.approx(sum(x * math.log(x / y) for x, y in zip(p, q)), abs=1e-10)
        rows[LABELS[b, s + 1].item()].append(math.log(p[token] / q[token]))
    table = effect.by_label()
    assert table["label"].tolist() == [0, 1, 2]
    for c, changes in rows.items():
        mean = sum(changes) / len(changes)
        error = (sum((x - mean) ** 2 for x in changes) / (len(changes) - 1) / len(changes)) ** 0.5
        assert table["tokens"][c] == len(changes)
        assert table["change"][c].item() == pytest.approx(mean, abs=1e-10)
        assert table["error"][c].item() == pytest.approx(error, abs=1e-10)
    assert effect.change == pytest.approx(sum(sum(rows.values(), [])) / (B * (S - 1)), abs=1e-10)


def test_no_edit_and_an_edit_that_changes_nothing_have_no_effect():
    for edits in ([], [reweight(1, 3, 1.0)]):
        effect = Effect.measure(model(), TOKENS, *edits)
        assert effect.change == 0 and effect.kl.abs().max() == 0


def test_edits_of_one_layer_act_one_after_the_other():
    effect = Effect.measure(model(), TOKENS, drop(1, 2), reweight(1, 3, 0.0))
    with torch.no_grad(), edit(model(), drop(1, 2)), edit(model(), reweight(1, 3, 0.0)):
        logits = model()(TOKENS)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert effect.after.mean().item() == pytest.approx(loss.item(), abs=1e-10)


def test_edits_act_on_every_chunk_that_a_cache_continues():
    cache = KVCache(CONFIG)
    with torch.no_grad(), record(model(), *Effect.points) as plain:
        model()(TOKENS)
    with torch.no_grad(), edit(model(), force(0, 7)), record(model(), *Effect.points) as chunks:
        for chunk in TOKENS.split([10, 1, 13], dim=1):
            model()(chunk, cache=cache)
    whole = Effect.measure(model(), TOKENS, force(0, 7), labels=LABELS)
    torch.testing.assert_close(Effect.of(plain, chunks, LABELS).after, whole.after, **near)


# ------------------------------------------------------------------------------------------ kept, tabulated, drawn


def results() -> list:
    effect = Effect.measure(model(), TOKENS, drop(1, 2), labels=LABELS)
    return [routing(), half_valid(), routing().specialisation(LABELS, TOKENS), effect]


def test_each_result_comes_back_from_disk_as_it_was(tmp_path):
    for i, result in enumerate(results()):
        result.save(tmp_path / str(i))
        back = type(result).load(tmp_path / str(i))
        for name, value in vars(result).items():
            kept = getattr(back, name)
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(kept, value, equal_nan=True, **nothing)
            else:
                assert kept == value, name


def test_each_result_is_a_table_of_equal_columns(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=dict))
    for result in results():
        table = result.frame()
        assert len({len(column) for column in table.values()}) == 1
    table = routing().frame()
    assert table["layer"] == [0, 1, 2]
    assert table["busiest"].tolist() == routing().loads.argmax(-1).tolist()


def test_each_result_is_drawn_with_a_title_and_named_axes():
    for result in results():
        fig = result.plot(note="a test")
        assert fig.get_suptitle().endswith("(a test)")
        assert all(ax.get_xlabel() for ax in fig.axes if ax.get_label() != "<colorbar>")
    (left, even, last, *_) = half_valid().plot().axes
    torch.testing.assert_close(torch.tensor(left.images[0].get_array().data).double(), half_valid().loads.float().double())
    assert even.lines[0].get_xdata().tolist() == pytest.approx(evenness(half_valid().loads).tolist())
    assert last.lines[1].get_xdata().tolist() == pytest.approx(half_valid().persistence().tolist())


# ------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_named():
    one = routing()
    args = one.experts, one.weights, E
    cases = [
        (lambda: one.specialisation(LABELS[:, :5]), r"labels is torch.int64 \(2, 5\).*\(2, 24\)"),
        (lambda: one.specialisation(LABELS, TOKENS[0]), r"tokens is .*\(24,\)"),
        (lambda: one.specialisation(LABELS.float()), "labels is torch.float32"),
        (lambda: one.specialisation(torch.zeros_like(LABELS)), r"are \[0\]: specialisation needs two"),
        (lambda: one.specialisation(LABELS - 9), r"are \[\]: specialisation needs two"),
        (lambda: one.specialisation(LABELS, rank=3), "rank 3: a token takes 3 experts"),
        (lambda: one.specialisation(LABELS, permutations=1), "permutations = 1"),
        (lambda: Routing.measure(model(), TOKENS[:1]).specialisation(LABELS[:1], rows=True), "there is only one"),
        (lambda: Routing.from_choices(one.experts[:, 0], one.weights[:, 0], E), "one text gets a batch axis"),
        (lambda: Routing.from_choices(*args, one.logits[..., :4]), r"logits \(3, 2, 24, 4\)"),
        (lambda: Routing.from_choices(*args, valid=torch.zeros(B, S)), "valid is torch.bool|no token is left"),
        (lambda: Routing.from_choices(*args, valid=torch.ones(S, dtype=torch.bool)), r"valid is .*\(24,\)"),
        (lambda: Routing.from_choices(*args, layers=[0]), "layers names 1 layers, experts holds 3"),
        (lambda: Routing.from_choices(one.experts, one.weights, 4), "but there are 4: 0 to 3"),
        (lambda: Routing.from_choices(one.experts * 0, one.weights, E), "the same expert twice"),
        (lambda: Routing.from_choices(one.experts, one.weights / 0 * 0, E), "weights hold NaN"),
        (lambda: one.persistence(S), "lag = 24 positions apart"),
        (lambda: one.persistence(0), "lag = 0 positions apart"),
        (lambda: one.path(S), "position 24 is not among the 24"),
        (lambda: Routing.from_choices(one.experts, one.weights, K, valid=None), "but there are 3"),
        (lambda: Effect.measure(model(), TOKENS, drop(1, 8)), r"experts \[8\] of layer 1: name one or more of 0 to 7"),
        (lambda: Effect.measure(model(), TOKENS, drop(1, range(E))), "drop names all 8"),
        (lambda: Effect.measure(model(), TOKENS, force(1, range(4))), "force names 4 experts, but a token takes 3"),
        (lambda: Effect.measure(model(), TOKENS, reweight(1, -1, 0.0)), r"experts \[-1\]"),
        (lambda: Effect.measure(model(), TOKENS, drop(1, [])), r"experts \[\]"),
        (lambda: Effect.measure(model(), TOKENS, labels=LABELS[:1]), r"labels is .*\(1, 24\)"),
        (lambda: Effect.measure(model(), TOKENS, labels=LABELS - 9), "nothing is left"),
        (lambda: Effect.measure(model(), TOKENS[:, :1]), "two positions or more"),
        (lambda: one.specialisation(LABELS).plot(names=["a"]), "1 names for the 3 labels"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(KeyError, match="layers 0 to 2"):
        Effect.measure(model(), TOKENS, drop(3, 0))
    with record(model(), *Routing.points) as acts:
        model()(TOKENS)
    with pytest.raises(KeyError, match="layers 0 to 2"):
        Routing.of(acts, layers=[3])


def test_recordings_of_two_texts_are_not_compared():
    kept = []
    for tokens in (TOKENS, TOKENS.flip(1)):
        with record(model(), *Effect.points) as acts:
            model()(tokens)
        kept.append(acts)
    with pytest.raises(ValueError, match="different tokens"):
        Effect.of(*kept)


def test_logits_that_are_not_numbers_are_named():
    lost = {"blocks.1.mlp.hook_router_logits": lambda x: torch.full_like(x, -torch.inf)}
    with pytest.raises(ValueError, match="logits hold NaN"):
        Effect.measure(model(), TOKENS, lost)
    with edit(model(), lost), pytest.raises(ValueError, match="holds NaN"):
        Routing.measure(model(), TOKENS)


def test_a_saved_result_of_one_class_is_not_loaded_as_another(tmp_path):
    routing().save(tmp_path / "x")
    with pytest.raises(ValueError, match="not the saved result of Specialisation"):
        Specialisation.load(tmp_path / "x")
