"""What the tiny model has learnt, as numbers with their standard errors: the figures of card.json.

Every function takes a model of the tiny vocabulary, makes its own texts from a fixed seed that training never used,
and returns {name: Figure}. Losses are nats a token. An error is the standard error of the mean over rows or prompts;
where two runs on the same texts are compared, of their paired difference.
"""
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import mxfp4, tokenizer
from ..generate import generate
from ..hooks import edit, record
from ..model import GptOss
from ..probes.yarn import WAYS, extended
from ..tokenizer import special
from . import data, words
from .train import N_CTX, token_losses

SEED = 10**12  # of what is measured; training draws from seed * 1,000,003 + step


@dataclass(frozen=True)
class Figure:
    """A mean and its standard error: a number, or nested lists of them (layer, then head or expert)."""

    value: float | list
    error: float | list | None = None


def mean(x: Tensor) -> Figure:
    """Over the first axis, whose entries are independent.   x [n ...]"""
    x = x.double()
    error = x.std(0) / len(x) ** 0.5
    return Figure(_short(x.mean(0)), _short(error))


def proportion(hits: list[bool]) -> Figure:
    """Of independent trials. The error is that of (hits + 1) / (n + 2): none of 100 is not known to be none at all."""
    n, share = len(hits), (sum(hits) + 1) / (len(hits) + 2)
    return Figure(round(sum(hits) / n, 4), round((share * (1 - share) / n) ** 0.5, 4))


def _short(x: Tensor):
    """Four decimals, as plain numbers."""
    return torch.round(x.double(), decimals=4).tolist()


def _layers(model: GptOss, point: str) -> list[str]:
    return [f"blocks.{layer}.{point}" for layer in range(model.config.n_layers)]


# ---------------------------------------------------------------------------------------- loss


def held_out(rows: int = 64, length: int = N_CTX, mixture=data.MIXTURE) -> data.Batch:
    return data.batch(SEED, rows, length, mixture)


def row_losses(model: GptOss, batch: data.Batch, rows: int = 16) -> Tensor:
    """Nats for every predicted token, in chunks of rows.   -> [b s]"""
    parts = [data.Batch(*parts) for parts in zip(*(x.split(rows) for x in (batch.tokens, batch.domains, batch.given)))]
    return torch.cat([token_losses(model(part.read), part) for part in parts])


def _by_domain(losses: Tensor, batch: data.Batch) -> dict[str, Figure]:
    """Means of what can be foreseen: over rows, each weighted by how much of it is of the domain."""
    chosen = {"all": ~batch.given[:, 1:]}
    chosen |= {name: chosen["all"] & (batch.domains[:, 1:] == i) for i, name in enumerate(data.DOMAINS)}
    return {name: _ratio((losses * kept).sum(1), kept.sum(1)) for name, kept in chosen.items() if kept.any()}


def _ratio(numerator: Tensor, denominator: Tensor) -> Figure:
    """Sum / sum over rows, with the error of a ratio estimate.   [n], [n]"""
    numerator, denominator = numerator.double(), denominator.double()
    ratio, n = numerator.sum() / denominator.sum(), len(numerator)
    residual = (numerator - ratio * denominator) / denominator.mean()
    return Figure(_short(ratio), _short(residual.std() / n**0.5))


def loss(model: GptOss) -> dict[str, Figure]:
    """Loss by domain on 64 held-out rows of the training length, and over all of them."""
    batch = held_out()
    return _by_domain(row_losses(model, batch), batch)


# ---------------------------------------------------------------------------------------- induction


def copies(length: int, rows: int = 48) -> data.Batch:
    """`length` random tokens, twice."""
    draw = data.Draw(SEED + length)
    tokens = torch.tensor([sum((part for part, _ in data.repeated(draw, length)), []) for _ in range(rows)])
    return data.Batch(tokens, torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool))


def _halves(losses: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Mean loss of each row in the first copy and in the second, whose first token nobody can know."""
    return losses[:, : length - 1].mean(1), losses[:, length:].mean(1)


def _patterns(model: GptOss, tokens: Tensor) -> Tensor:
    """[L b H s t]"""
    with record(model, *_layers(model, "attn.hook_pattern")) as acts:
        model(tokens)
    return torch.stack([acts[name] for name in _layers(model, "attn.hook_pattern")])


def _along(patterns: Tensor, back: int, begin: int, end: int) -> Tensor:
    """Mean mass on the key `back` positions before the query, of queries begin to end - 1.   -> [b L H]"""
    query = torch.arange(begin, end)
    return patterns[..., query, query - back].mean(-1).permute(1, 0, 2)


def previous_token_heads(model: GptOss) -> list[tuple[int, int]]:
    """(layer, head) of the heads with more than half of their mass on the token before."""
    score = _along(_patterns(model, copies(64, 16).tokens), 1, 4, 128).mean(0)
    return [tuple(pair) for pair in (score > 0.5).nonzero().tolist()]


@contextmanager
def without_heads(model: GptOss, heads: list[tuple[int, int]], tokens: Tensor) -> Iterator[None]:
    """Each head's z is its mean over `tokens`, whatever it reads."""
    names = {layer: f"blocks.{layer}.attn.hook_z" for layer, _ in heads}
    with record(model, *names.values()) as acts:
        model(tokens)

    def averaged(layer: int) -> Callable:
        gone = [head for at, head in heads if at == layer]
        average = acts[names[layer]].mean((0, 1))[gone]

        def fn(z: Tensor) -> Tensor:
            z[:, :, gone] = average
            return z

        return fn

    with edit(model, {name: averaged(layer) for layer, name in names.items()}):
        yield


def induction(model: GptOss) -> dict[str, Figure]:
    """Copying of random tokens: losses, which heads look where, and what is left without them.

    `prefix_64` is each head's mass on the token after the earlier occurrence, 64 back, four windows away.
    """
    out = {}
    for length in (8, 32, 64):
        batch = copies(length)
        first, second = _halves(row_losses(model, batch), length)
        out |= {f"first_{length}": mean(first), f"second_{length}": mean(second)}
    for length in (8, 64):
        patterns = _patterns(model, copies(length, 16).tokens)
        out[f"prefix_{length}"] = mean(_along(patterns, length - 1, length, 2 * length - 1))
    out["previous_token"] = mean(_along(patterns, 1, 4, 128))
    batch, heads = copies(64), previous_token_heads(model)
    out["previous_token_heads"] = Figure([list(head) for head in heads])
    last = model.config.n_layers - 1
    sets = {"previous_token_heads": heads} if heads else {}
    sets |= {f"layer_{layer}": [(layer, head) for head in range(model.config.n_heads)] for layer in (last - 1, last)}
    for name, gone in sets.items():
        with without_heads(model, gone, batch.read):
            out[f"second_64_without_{name}"] = mean(_halves(row_losses(model, batch), 64)[1])
    return out


# ---------------------------------------------------------------------------------------- sinks


def no_sinks(model: GptOss, layers: range | None = None) -> dict[str, float]:
    """Edits that remove the sinks of some layers, or all."""
    gone = lambda sinks: torch.full_like(sinks, -math.inf)
    return {f"blocks.{layer}.attn.hook_sink_scores": gone for layer in layers or range(model.config.n_layers)}


def sinks(model: GptOss) -> dict[str, Figure]:
    """Mass on the sink by layer and head in the first copy (nothing to read) and the second, and what sinks are worth.

    `without_*` is the loss with the sinks removed from a model trained with them, less the loss with them.
    """
    out = {"logit": Figure([_short(block.attn.sinks) for block in model.blocks])}
    for length in (8, 64):
        batch = copies(length, 32)
        with record(model, *_layers(model, "attn.hook_sink_mass")) as acts:
            model(batch.read)
        mass = torch.stack([acts[name] for name in _layers(model, "attn.hook_sink_mass")])  # [L b H s]
        begin = length // 4
        out[f"mass_first_{length}"] = mean(mass[..., begin:length].mean(-1).permute(1, 0, 2))
        out[f"mass_second_{length}"] = mean(mass[..., length : 2 * length - 1].mean(-1).permute(1, 0, 2))
    out["mass_on_position_0"] = mean(_patterns(model, copies(64, 32).tokens)[..., 8:, 0].mean(-1).permute(1, 0, 2))
    batch, pair = held_out(), copies(64)
    plain, plain_pair = row_losses(model, batch), _halves(row_losses(model, pair), 64)
    n_layers = model.config.n_layers
    for name, layers in {"sliding": range(0, n_layers, 2), "full": range(1, n_layers, 2)}.items():
        with edit(model, no_sinks(model, layers)):
            out[f"without_{name}"] = _by_domain(row_losses(model, batch) - plain, batch)["all"]
    with edit(model, no_sinks(model)):
        costs = _by_domain(row_losses(model, batch) - plain, batch)
        halves = _halves(row_losses(model, pair), 64)
    out |= {f"without_{name}": figure for name, figure in costs.items()}
    return out | {f"without_all_{which}_64": mean(new - old)
                  for which, new, old in zip(("first", "second"), halves, plain_pair)}  # fmt: skip


# ---------------------------------------------------------------------------------------- routing


def information_given_token(counts: Tensor, least: int = 50) -> float:
    """I(expert; domain | token) in bits.   counts [V D E]: how often a token of a domain went to an expert

    Of the tokens that occur `least` times in two domains or more. What expert and token share says nothing: a random
    router is a hash of the token.
    """
    counts = counts * (counts.sum(-1, keepdim=True) >= least)
    counts = counts[(counts.sum(-1) > 0).sum(-1) >= 2].double()
    total = counts.sum((1, 2), keepdim=True)
    ratio = counts * total / (counts.sum(2, keepdim=True) * counts.sum(1, keepdim=True))
    bits = torch.where(counts > 0, counts * ratio.log2(), 0.0)
    return float(bits.sum() / total.sum()) if len(counts) else 0.0


def _counts(model: GptOss, token: Tensor, domain: Tensor, expert: Tensor) -> Tensor:
    """-> [V D E]"""
    sizes = model.config.d_vocab, len(data.DOMAINS), model.config.n_experts
    flat = (token * sizes[1] + domain) * sizes[2] + expert
    return flat.bincount(minlength=sizes[0] * sizes[1] * sizes[2]).view(sizes)


def _shuffled_within(token: Tensor, domain: Tensor, seed: int) -> Tensor:
    """The domains of each token's occurrences, in random order."""
    order = torch.randperm(len(token), generator=torch.Generator().manual_seed(seed))
    out = torch.empty_like(domain)
    out[token.argsort(stable=True)] = domain[order][token[order].argsort(stable=True)]
    return out


def routing(model: GptOss) -> dict[str, Figure]:
    """What the router's first choice tells about the domain, and how even the load is (1 is an even share)."""
    batch, blocks = held_out(384), 8
    names = _layers(model, "mlp.hook_expert_indices")
    choices = []
    for rows in batch.read.split(48):
        with record(model, *names) as acts:
            model(rows)
        choices.append([acts[name] for name in names])
    n_experts, out, load = model.config.n_experts, {}, []
    token, domain = batch.read.flatten(), batch.domains[:, :-1].flatten()
    info, error, null = [], [], []
    for layer in zip(*choices):
        chosen = torch.cat(layer).flatten(0, 1)
        load.append(chosen.flatten().bincount(minlength=n_experts) / chosen.numel() * n_experts)
        parts = zip(*(x.chunk(blocks) for x in (token, domain, chosen[:, 0])))
        counts = torch.stack([_counts(model, *part) for part in parts])
        without = torch.tensor([information_given_token(counts.sum(0) - one, 50 * 7 // 8) for one in counts])
        info.append(round(information_given_token(counts.sum(0)), 4))
        error.append(round(float(without.std(unbiased=False) * (blocks - 1) ** 0.5), 4))  # the jackknife's
        shuffled = _counts(model, token, _shuffled_within(token, domain, 0), chosen[:, 0])
        null.append(round(information_given_token(shuffled), 4))
    out |= {"information_given_token": Figure(info, error), "information_shuffled": Figure(null)}
    out["load"] = Figure(_short(torch.stack(load)))
    out["largest_load"] = Figure(_short(torch.stack(load).amax(1)))
    out["dead_experts"] = Figure([int((one < 0.05).sum()) for one in load])
    return out


def experts(model: GptOss) -> dict[str, Figure]:
    """`without` [L E domain]: the loss by domain with one expert never chosen, less the loss with it."""
    batch = held_out(48)
    losses = row_losses(model, batch, rows=48)
    value, error = [], []
    for layer in range(model.config.n_layers):
        figures = [_by_domain(_without_expert(model, layer, expert, batch) - losses, batch)
                   for expert in range(model.config.n_experts)]  # fmt: skip
        value.append([[one[name].value for name in data.DOMAINS] for one in figures])
        error.append([[one[name].error for name in data.DOMAINS] for one in figures])
    return {"without": Figure(value, error)}


def _without_expert(model: GptOss, layer: int, expert: int, batch: data.Batch) -> Tensor:
    def never(logits: Tensor) -> Tensor:
        logits[..., expert] = -math.inf
        return logits

    with edit(model, {f"blocks.{layer}.mlp.hook_router_logits": never}):
        return row_losses(model, batch, rows=48)


# ---------------------------------------------------------------------------------------- YaRN

FACTOR = 4


def long_texts(rows: int = 24, seed: int = SEED, length: int = FACTOR * N_CTX) -> data.Batch:
    mixture = {name: share for name, share in data.MIXTURE.items() if name != "repeat"}
    return data.batch(seed + 1, rows, length, mixture)


def needles(distance: int, n: int = 60) -> tuple[list[list[int]], Tensor]:
    """Lists of six pairs, questions for five of them, and one for the sixth, which stands `distance` or up to two
    tokens more back.   -> n prompts, answers [n]"""
    draw, prompts, answers = data.Draw(SEED + distance), [], []
    for _ in range(n):
        things, colours = data.pairs(draw, 6)
        asked = draw.between(0, 5)
        prompt = data.encode(data.question(things, colours))
        at = prompt.index(data.encode(f" {things[asked]}")[0])
        while len(prompt) < at + distance:
            other = draw.one([i for i in range(6) if i != asked])
            prompt += data.encode(f" {things[other]} {colours[other]},")
        prompts.append(prompt + data.encode(f" {things[asked]}"))
        answers += data.encode(f" {colours[asked]}")
    return prompts, torch.tensor(answers)


def yarn(model: GptOss, steps: int = 40, ways: tuple[str, ...] = WAYS) -> dict[str, Figure]:
    """At four times the trained length: loss, loss by position, a needle 256 back; `_tuned` after some more steps."""
    out, batch = {}, long_texts()
    for way in ways:
        with extended(model, way, FACTOR):
            out |= _long(model, batch, way)
        if steps:
            tuned = _tuned(model, way, steps)
            with extended(tuned, way, FACTOR):
                out |= {f"{name}_tuned": figure for name, figure in _long(tuned, batch, way).items()}
    short = held_out()
    plain = row_losses(model, short)
    with extended(model, "yarn", FACTOR):
        cost = row_losses(model, short) - plain
    return out | {"cost_of_yarn_at_trained_length": _by_domain(cost, short)["all"]}


def _long(model: GptOss, batch: data.Batch, way: str, bucket: int = N_CTX // 2) -> dict[str, Figure]:
    losses, kept = row_losses(model, batch, rows=4), ~batch.given[:, 1:]
    buckets = [_ratio((x * k).sum(1), k.sum(1)) for x, k in zip(losses.split(bucket, 1), kept.split(bucket, 1))]
    prompts, answers = needles(2 * N_CTX)
    found = torch.tensor(generate(model, prompts, 1))[:, 0] == answers
    return {
        f"{way}_loss": _ratio((losses * kept).sum(1), kept.sum(1)),
        f"{way}_by_position": Figure([one.value for one in buckets], [one.error for one in buckets]),
        f"{way}_needle": proportion(found.tolist()),
    }


def _tuned(model: GptOss, way: str, steps: int) -> GptOss:
    """A copy, trained for some more steps at four times the length."""
    tuned = GptOss(model.config)
    tuned.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.enable_grad(), extended(tuned, way, FACTOR):
        for step in range(steps):
            batch = long_texts(4, SEED + 100 + step)
            kept = ~batch.given[:, 1:]
            losses = token_losses(tuned(batch.read), batch)
            optimiser.zero_grad()
            (losses * kept).sum().div(kept.sum()).backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimiser.step()
    return tuned.eval()


# ---------------------------------------------------------------------------------------- chains of thought


def _answers(model: GptOss, prompts: list[list[int]], most: int) -> list[str]:
    texts = generate(model, prompts, max_new_tokens=most)
    return [tokenizer.tiny().decode(tokens) for tokens in texts]


def _final(answer: str) -> str:
    return answer.split("final<|message|>")[-1].removesuffix("<|return|>")


def thought(model: GptOss, n: int = 100) -> dict[str, Figure]:
    """Sums and hops answered after an analysis, and forced straight to the final channel; is the effort obeyed?

    A hop among six names is guessed in 1 of 5 or 6 times.
    """
    out, used, forced = {}, {"high": [], "low": []}, data.encode("final")
    straight = [special(tokenizer.tiny(), "<|channel|>"), *forced, special(tokenizer.tiny(), "<|message|>")]
    tasks = {f"hop_{k}": lambda draw, k=k: data.hop_task(draw, k, 6) for k in (1, 2, 3, 4)}
    tasks |= {f"sum_{k}": lambda draw, k=k: data.sum_task(draw, k) for k in (2, 3, 4, 5)}
    for name, task in tasks.items():
        draw = data.Draw(SEED + len(out))
        drawn = [task(draw) for _ in range(n)]
        asked = {effort: [data.prompt(effort, user) for user, _, _ in drawn] for effort in used}
        replies = {"thinking": _answers(model, asked["high"], 64), "low": _answers(model, asked["low"], 64),
                   "straight": _answers(model, [prompt + straight for prompt in asked["high"]], 8)}  # fmt: skip
        for way, texts in replies.items():
            right = [_final(text) == final for text, (_, _, final) in zip(texts, drawn)]
            out[f"{name}_{way}"] = proportion(right)
        for effort, way in (("high", "thinking"), ("low", "low")):
            used[effort] += [text.startswith("<|channel|>analysis") for text in replies[way]]
    return out | {f"analysis_at_{effort}": proportion(uses) for effort, uses in used.items()}


def tools(model: GptOss, n: int = 100) -> dict[str, Figure]:
    """Is the calculator called, with the right product, where there is one; and does the model say no where not?"""
    draw = data.Draw(SEED + 77)
    products = [f"{draw.between(11, 99)}*{draw.between(11, 99)}" for _ in range(n)]
    offered = [data.prompt("high", f"times {of}", calculator=True) for of in products]
    bare = [data.prompt("high", f"times {of}") for of in products]
    call = " to=functions.calc<|channel|>commentary <|constrain|>json<|message|>"
    calls = [text == f'{call}{{"of":"{of}"}}<|call|>' for text, of in zip(_answers(model, offered, 40), products)]
    no = [_final(text) == "no tool" for text in _answers(model, bare, 40)]
    return {"right_call": proportion(calls), "says_no_tool": proportion(no)}


# ---------------------------------------------------------------------------------------- patching


@dataclass(frozen=True)
class Recalls:
    """Six pairs and one question, all of one length; and the same with two of the things swapped in the list."""

    clean: Tensor  # [n s]
    swapped: Tensor  # [n s]
    answer: Tensor  # [n]: of the clean text
    other: Tensor  # [n]: of the swapped one
    key: Tensor  # [n 2]: positions of the two swapped things; their colours follow


def recalls(n: int = 64) -> Recalls:
    draw, rows = data.Draw(SEED + 5), []
    for _ in range(n):
        things = draw.some(words.OBJECTS + words.ANIMALS, 6)
        colours, (i, j) = draw.some(words.COLOURS, 6), draw.some(range(6), 2)
        other = list(things)
        other[i], other[j] = other[j], other[i]
        texts = [data.encode(data.question(list_, colours) + f" {things[i]}") for list_ in (things, other)]
        keys = [texts[0].index(data.encode(f" {things[k]}")[0]) for k in (i, j)]
        rows.append((*texts, data.encode(f" {colours[i]}")[0], data.encode(f" {colours[j]}")[0], keys))
    return Recalls(*(torch.tensor(column) for column in zip(*rows)))


def patching(model: GptOss) -> dict[str, Figure]:
    """Where the answer is on its way: the residual stream of the swapped text put into the clean one, place by place.

    0 leaves the answer as it is, 1 turns it whole: how far the difference of the two answers' logits moves.
    Also the logit lens: probability of the answer, read from the residual stream before its last layers.
    """
    texts, out = recalls(), {}
    n = torch.arange(len(texts.clean))
    points = [f"blocks.{layer}.hook_resid_{at}" for layer in range(model.config.n_layers) for at in ("mid", "post")]
    with record(model, *points) as swapped:
        turned = model(texts.swapped)[:, -1]
    with record(model, *points) as clean:
        straight = model(texts.clean)[:, -1]
    difference = lambda logits: logits[n, texts.other] - logits[n, texts.answer]
    low, high = difference(straight), difference(turned)
    out["accuracy"] = proportion((straight.argmax(-1) == texts.answer).tolist())
    query = torch.full_like(texts.key, texts.clean.shape[1] - 1)
    for place, position in {"key": texts.key, "value": texts.key + 1, "query": query}.items():
        moved = []
        for point in points:
            def put(x: Tensor, point=point, position=position) -> Tensor:
                x[n[:, None], position] = swapped[point][n[:, None], position]
                return x

            with edit(model, {point: put}):
                moved.append((difference(model(texts.clean)[:, -1]) - low) / (high - low).mean())
        out[f"patched_{place}"] = mean(torch.stack(moved, 1))
    lens = [model.unembed(model.ln_final(clean[point][:, -1:]))[:, 0].softmax(-1)[n, texts.answer] for point in points]
    out["lens"] = mean(torch.stack(lens, 1))
    return out


# ---------------------------------------------------------------------------------------- numbers


def precision(model: GptOss) -> dict[str, Figure]:
    """What MXFP4 experts cost, and how often the clamp of the SwiGLU acts, by layer."""
    batch = held_out()
    before = row_losses(model, batch)
    packed, errors = GptOss(model.config), []
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith(("gate_up.weight", "down.weight")):
            state[name] = mxfp4.unpack(*mxfp4.pack(weight), weight.dtype)
            errors.append((state[name] - weight).norm() / weight.norm())
    packed.load_state_dict(state)
    out = {"mxfp4_minus_dense": _by_domain(row_losses(packed.eval(), batch) - before, batch)["all"],
           "mxfp4_weight_error": Figure(_short(torch.stack(errors).mean()))}  # fmt: skip
    limit, rates = model.config.swiglu_limit, {"gate": [], "linear": []}
    for layer in range(model.config.n_layers):
        with record(model, f"blocks.{layer}.mlp.hook_pre", f"blocks.{layer}.mlp.hook_pre_linear") as acts:
            model(batch.read)
        rates["gate"].append((acts[f"blocks.{layer}.mlp.hook_pre"] > limit).double().mean((1, 2, 3)))
        rates["linear"].append((acts[f"blocks.{layer}.mlp.hook_pre_linear"].abs() > limit).double().mean((1, 2, 3)))
    return out | {f"clamped_{name}": mean(torch.stack(layers, 1)) for name, layers in rates.items()}


SECTIONS: dict[str, Callable[[GptOss], dict[str, Figure]]] = dict(
    loss=loss, induction=induction, sinks=sinks, routing=routing, experts=experts, yarn=yarn, thought=thought,
    tools=tools, patching=patching, precision=precision,
)  # fmt: skip


def measure(model: GptOss, sections=tuple(SECTIONS)) -> dict[str, dict]:
    """{section: {figure: {"value": ..., "error": ...}}}, as in card.json. Shows a bar; takes minutes."""
    from tqdm.auto import tqdm

    with torch.no_grad():
        return {name: {key: vars(figure) for key, figure in SECTIONS[name](model).items()}
                for name in tqdm(sections, desc="measuring", unit="section")}  # fmt: skip
