"""Our model with the weights of `reference.py`, and how far it is from an oracle."""
import importlib
import importlib.abc
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import gptoss_lab

PACKAGE = Path(gptoss_lab.__file__).parent


def our_config(cfg: dict, package=gptoss_lab):
    """The configuration of `reference.py` as ours."""
    FULL, SLIDING, Yarn = package.config.FULL, package.config.SLIDING, package.Yarn
    windows = [w for w in cfg["layer_windows"] if w is not None]
    yarn = None
    if cfg["yarn_factor"] != 1.0:
        yarn = Yarn(cfg["yarn_factor"], cfg["n_ctx_trained"], cfg["yarn_beta_fast"], cfg["yarn_beta_slow"],
                    cfg["yarn_truncate"])  # fmt: skip
    same = "n_layers d_model n_heads n_kv_heads d_head d_ff n_experts experts_per_token d_vocab".split()
    return package.Config(
        **{name: cfg[name] for name in same}, n_ctx=4096, sliding_window=windows[0] if windows else 1,
        layer_types=tuple(FULL if w is None else SLIDING for w in cfg["layer_windows"]), yarn=yarn,
        rope_theta=cfg["rope_theta"], swiglu_limit=cfg["swiglu_limit"], norm_eps=cfg["norm_eps"],
    )  # fmt: skip


RENAMED = (("block.", "blocks."), ("attn.norm.scale", "ln1.weight"), ("mlp.norm.scale", "ln2.weight"),
           ("mlp.gate.", "mlp.router."), ("mlp1_", "gate_up."), ("mlp2_", "down."), ("norm.scale", "ln_final.weight"),
           ("unembedding.", "unembed."), ("embedding.", "embed."))  # fmt: skip


def our_names(weights: dict) -> dict[str, torch.Tensor]:
    """OpenAI's names -> ours; the arrays are the same."""
    renamed = {}
    for name, array in weights.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        renamed[name] = torch.as_tensor(array)
    return renamed


def our_model(weights: dict, cfg: dict, dtype=torch.float64, package=gptoss_lab):
    model = package.GptOss(our_config(cfg, package)).to(dtype)
    model.load_state_dict({name: x.to(dtype) for name, x in our_names(weights).items()}, strict=True)
    return model.eval()


def gap(ours, theirs) -> float:
    """The largest difference, over the standard deviation of `theirs`; infinities must be the same."""
    ours, theirs = (np.asarray(torch.as_tensor(x).detach().double()) for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    finite = np.isfinite(theirs)
    if not (finite == np.isfinite(ours)).all():
        return float("inf")
    spread = theirs[finite].std() if finite.sum() > 1 and theirs[finite].std() > 0 else 1.0
    return float(np.abs(ours[finite] - theirs[finite]).max(initial=0) / spread)


@contextmanager
def mutant(file: str, old: str, new: str):
    """The whole package imported anew, with one piece of one source file replaced."""

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname):
            source = Path(self.path).read_text()
            if Path(self.path) == PACKAGE / file:
                found = source.count(old)
                assert found == 1, f"{old!r} stands {found} times in {file}, the mutation needs 1"
                source = source.replace(old, new)
            return compile(source, self.path, "exec")

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path, target=None):
            if fullname.split(".")[0] != "gptoss_lab":
                return None
            base = PACKAGE.parent.joinpath(*fullname.split("."))
            origin = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            if not origin.is_file():
                return None
            loader = Loader(fullname, str(origin))
            return importlib.util.spec_from_file_location(
                fullname, origin, loader=loader, submodule_search_locations=[str(base)] if base.is_dir() else None)

    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "gptoss_lab"}
    finder = Finder()
    for name in kept:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("gptoss_lab")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "gptoss_lab"]:
            del sys.modules[name]
        sys.modules.update(kept)
