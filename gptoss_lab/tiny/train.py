"""Training of the tiny model: `gptoss-lab train-tiny FOLDER`.

One run is a pure function of its settings: batch n is drawn from the seed and n, and a run that was killed goes on
from its last state to the same weights, bit for bit, on the same machine and number of threads.
"""
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tokenizer
from ..config import TINY, Config
from ..hooks import record
from ..model import GptOss
from ..saving import save
from . import data

N_CTX = TINY.n_ctx
STATE = "state.safetensors"
VARIANTS = {
    "standard": "the model that is shipped",
    "no-sinks": "a control: no head has a sink, from the first step on",
    "direct-only": "a control: sums and hops are always answered at once, never with an analysis",
    "no-balance": "a control: no loss keeps the experts' load even",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of a run."""

    seed: int = 1  # the shipped model's
    variant: str = "standard"
    steps: int = 2800
    batch_tokens: int = 2048
    config: Config = field(default=TINY.with_(yarn=None))
    # Muon (Jordan 2024) for attention and expert matrices: reached in 1 M tokens what AdamW did not.
    matrix_lr: float = 0.02
    matrix_decay: float = 0.02
    momentum: float = 0.95
    other_lr: float = 3e-3
    sink_lr: float = 12e-3
    warmup: int = 50
    decay_from: float = 0.6  # from this share of the steps the learning rates fall to 0
    balance: float = 0.01
    # Context grows: trained at 128 tokens from the start, the model did not find induction in a million tokens.
    lengths: tuple[tuple[float, int], ...] = ((0.18, N_CTX // 4), (0.32, N_CTX // 2), (1.0, N_CTX))
    unforeseen: tuple[float, float] = (0.45, 0.1)  # until this share, what nothing foretells counts this much

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant = {self.variant!r}: there are {', '.join(VARIANTS)}")
        if self.steps < 1 or self.seed < 0:
            raise ValueError(f"steps = {self.steps} and seed = {self.seed}: at least 1 and 0")

    def batch(self, step: int) -> data.Batch:
        length = next(length for until, length in self.lengths if step < until * self.steps)
        make = data.MAKERS | (_DIRECT if self.variant == "direct-only" else {})
        mixture = data.SHORT if length == self.lengths[0][1] else data.MIXTURE
        return data.batch(self.seed * 1_000_003 + step, self.batch_tokens // length, length, mixture, make)

    def rate(self, step: int) -> float:
        """The learning rates' factor: up, level, down to 0."""
        return min(1, (step + 1) / self.warmup, (self.steps - step) / (self.steps * (1 - self.decay_from)))


# The same questions, all of them with low effort and so without an analysis.
_DIRECT = {
    "sum": lambda draw, room: data.solved("low", data.any_sum(draw, room)),
    "hop": lambda draw, room: data.solved("low", data.any_hop(draw, room)),
}


@torch.no_grad()
def initial(recipe: Recipe) -> GptOss:
    """The model before training, from numpy's RandomState, whose stream is frozen. Biases and sinks are 0."""
    model, draw = GptOss(recipe.config), np.random.RandomState(recipe.seed)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            weight.zero_()
        if weight.dim() < 2 or name.endswith("bias"):
            continue
        scale = weight.shape[-1] ** -0.5
        if "out" in name or "down" in name:
            scale *= 0.5
        scale = {"embed.weight": 0.5, "unembed.weight": 0.02}.get(name, scale)
        weight.copy_(torch.from_numpy(draw.standard_normal(tuple(weight.shape))) * scale)
    if recipe.variant == "no-sinks":
        for block in model.blocks:
            block.attn.sinks.fill_(-math.inf).requires_grad_(False)
    model.read_tokenizer = tokenizer.tiny
    return model


# ---------------------------------------------------------------------------------------- losses


def token_losses(logits: Tensor, batch: data.Batch) -> Tensor:
    """Nats for every predicted token.   [b s V] -> [b s]"""
    return F.cross_entropy(logits.flatten(0, 1), batch.predicted.flatten(), reduction="none").view_as(batch.predicted)


def balance_loss(router_logits: Tensor, chosen: Tensor) -> Tensor:
    """1 where every expert gets the same share, up to E where one gets all (Switch Transformer, eq. 4).

    router_logits [b s E], chosen [b s k]
    """
    n_experts = router_logits.shape[-1]
    share = chosen.flatten().bincount(minlength=n_experts) / chosen.numel()
    return n_experts * (router_logits.softmax(-1).flatten(0, 1).mean(0) * share).sum()


def by_domain(losses: Tensor, batch: data.Batch) -> dict[str, float]:
    """Mean loss of what can be foreseen, by domain; of the domains that the batch has."""
    domains, foreseen = batch.domains[:, 1:], ~batch.given[:, 1:]
    chosen = {name: losses[(domains == i) & foreseen] for i, name in enumerate(data.DOMAINS)}
    return {name: values.mean().item() for name, values in chosen.items() if len(values)}


# ---------------------------------------------------------------------------------------- optimisers


def orthogonalised(gradient: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: five Newton-Schulz steps of Muon.   [... m n] -> [... m n]

    Coefficients: Keller Jordan, https://kellerjordan.github.io/posts/muon
    """
    x = gradient / (gradient.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon, which takes no stack of matrices: here each expert's is one of its own."""

    def __init__(self, weights: list[Tensor], lr: float, momentum: float, weight_decay: float):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalised(weight.grad.lerp(mean, group["momentum"]))
                update *= max(1, weight.shape[-2] / weight.shape[-1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def optimisers(model: GptOss, recipe: Recipe) -> list[torch.optim.Optimizer]:
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [w for name, w in trained.items() if w.dim() > 1 and name.endswith("weight") and _inside(name)]
    sinks = [w for name, w in trained.items() if name.endswith("sinks")]
    taken = {id(w) for w in matrices + sinks}
    groups = [{"params": [w for w in trained.values() if id(w) not in taken], "lr": recipe.other_lr}]
    if sinks:
        groups.append({"params": sinks, "lr": recipe.sink_lr})
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
            Muon(matrices, recipe.matrix_lr, recipe.momentum, recipe.matrix_decay)]  # fmt: skip


def _inside(name: str) -> bool:
    return any(part in name for part in (".qkv.", ".out.", ".gate_up.", ".down."))


# ---------------------------------------------------------------------------------------- the run


class Run:
    """A training run in a folder: its state, which is written whole or not at all, and its log."""

    def __init__(self, folder: str | Path, recipe: Recipe):
        self.path, self.recipe = Path(folder) / STATE, recipe
        self.model = initial(recipe)
        self.optimisers = optimisers(self.model, recipe)
        self.rates = [[group["lr"] for group in one.param_groups] for one in self.optimisers]
        self.done, self.cpu_seconds, self.log = 0, 0.0, []
        self._recent: list[dict] = []
        if self.path.exists():
            self._resume()

    def step(self) -> dict[str, float]:
        """One step. Returns the losses by domain, and `balance`."""
        begin, recipe = time.process_time(), self.recipe
        batch, share = recipe.batch(self.done), self.done / recipe.steps
        with record(self.model, "*.hook_router_logits", "*.hook_expert_indices") as acts:
            losses = token_losses(self.model(batch.read), batch)
        until, little = recipe.unforeseen
        weights = torch.where(batch.given[:, 1:], little if share < until else 1.0, 1.0)
        layers = [f"blocks.{layer}.mlp.hook_" for layer in range(recipe.config.n_layers)]
        uneven = [balance_loss(acts[mlp + "router_logits"], acts[mlp + "expert_indices"]) for mlp in layers]
        balance = sum(uneven) / len(uneven)
        loss = (losses * weights).sum() / weights.sum()
        total = loss + recipe.balance * balance if recipe.variant != "no-balance" else loss
        for one in self.optimisers:
            one.zero_grad(set_to_none=True)
        total.backward()
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss is {total.item()} at step {self.done}: the last good state is kept")
        torch.nn.utils.clip_grad_norm_([w for g in self.optimisers[0].param_groups for w in g["params"]], 1.0)
        for one, rates in zip(self.optimisers, self.rates):
            for group, rate in zip(one.param_groups, rates):
                group["lr"] = rate * recipe.rate(self.done)
            one.step()
        self.done += 1
        self.cpu_seconds += time.process_time() - begin
        self._recent.append(by_domain(losses.detach(), batch) | {"balance": balance.item()})
        if self.done % 50 == 0 or self.done == recipe.steps:
            self.log.append({"step": self.done, **self.means()})
            self._recent = []
        return self._recent[-1] if self._recent else self.log[-1]

    def means(self) -> dict[str, float]:
        """Of the steps since the last entry of the log."""
        names = {name: None for one in self._recent for name in one}
        return {name: float(np.mean([one[name] for one in self._recent if name in one])) for name in names}

    # -------------------------------------------------------------------- state

    def _tensors(self) -> dict[str, Tensor]:
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        tensors = {f"weight.{name}": weight for name, weight in self.model.named_parameters()}
        for one in self.optimisers:
            for weight, state in one.state.items():
                tensors |= {f"{key}.{names[id(weight)]}": value for key, value in state.items()}
        return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def save_state(self) -> None:
        """Write the state beside its place, then move it there: the last good one is kept until then."""
        tensors = self._tensors()
        about = {"recipe": _words(self.recipe), "done": self.done, "cpu_seconds": self.cpu_seconds, "log": self.log,
                 "recent": self._recent, "sha256": _digest(tensors)}  # fmt: skip
        part = self.path.with_name(f".{STATE}.{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(safetensors.torch.save(tensors, {"run": json.dumps(about)}))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        except OSError as error:
            raise OSError(error.errno, f"the state of step {self.done} could not be written to {self.path}: "
                          f"{error.strerror}. What was there before is unchanged") from error  # fmt: skip
        finally:
            part.unlink(missing_ok=True)

    @torch.no_grad()
    def _resume(self) -> None:
        try:
            with safetensors.safe_open(str(self.path), "pt") as file:
                about = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if _digest(tensors) != about["sha256"]:
                raise ValueError("its bytes are not those that were written")
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): remove it to begin anew") from error
        if about["recipe"] != _words(self.recipe):
            other = {key: value for key, value in about["recipe"].items() if value != _words(self.recipe)[key]}
            raise ValueError(f"{self.path.parent} holds a run with other settings, {other}: choose another folder")
        named = dict(self.model.named_parameters())
        optimiser = {id(w): one for one in self.optimisers for group in one.param_groups for w in group["params"]}
        for name, tensor in tensors.items():
            key, name = name.split(".", 1)
            if key == "weight":
                named[name].copy_(tensor)
            else:
                optimiser[id(named[name])].state[named[name]][key] = tensor
        self.done, self.cpu_seconds = about["done"], about["cpu_seconds"]
        self.log, self._recent = about["log"], about["recent"]


def _words(recipe: Recipe) -> dict:
    return json.loads(json.dumps(asdict(recipe)))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def train(folder: str | Path, recipe: Recipe, *, every: int = 100, threads: int = 1) -> Path:
    """Train into `folder`, from the state that lies there if there is one. Returns the folder of the model.

    Ctrl-C and SIGTERM end the run after the step in hand; the same call goes on from there.

    Args:
        every: steps between two states written.
        threads: of torch. More are quicker by the clock, not by CPU time.

    Raises:
        ValueError: the folder holds another run, or a damaged state.
        OSError: the folder cannot be written; the last good state is unchanged.
        KeyboardInterrupt: it was interrupted; the state is written.
        FloatingPointError: the loss is no longer finite.
    """
    from tqdm.auto import tqdm

    folder = Path(folder).expanduser()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    _keep_freed_memory()
    try:
        run = Run(folder, recipe)
        with _interruptible() as stop, tqdm(total=recipe.steps, initial=run.done, desc="training", unit="step") as bar:
            while run.done < recipe.steps:
                losses = run.step()
                bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in losses.items()), refresh=False)
                bar.update()
                if stop.is_set() or run.done % every == 0 or run.done == recipe.steps:
                    run.save_state()
                if stop.is_set() and run.done < recipe.steps:
                    raise KeyboardInterrupt
        return save(finished(run), folder / "model", layout="hf-dense")
    finally:
        torch.set_num_threads(before)


def finished(run: Run) -> GptOss:
    """What is shipped: the weights in bfloat16, and YaRN defined, with a factor of 1."""
    model = GptOss(run.recipe.config.with_(yarn=TINY.yarn))
    model.load_state_dict(run.model.state_dict())
    model.read_tokenizer = tokenizer.tiny
    return model.to(torch.bfloat16).eval()


@contextmanager
def _interruptible():
    """An event that Ctrl-C and SIGTERM set, so that no step is cut in two."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step instead of giving it back: 5,423 -> 6,666 tokens a CPU second."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in ((-3, 1 << 30), (-1, 1 << 30), (-2, 1 << 28)):  # mmap and trim thresholds, top pad
            libc.mallopt(option, value)
