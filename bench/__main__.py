"""`python -m bench`: gptoss_lab beside other libraries, on one small random model, on one thread of the CPU.

Runs take turns in a random order, so that what else the machine does meets all of them; a figure is the median of the
ratios within rounds, and its quartiles. CPU time is the judge, the clock is shown beside it.
"""
import argparse
import importlib.metadata
import os
import sys

import torch

from . import decode, experts, forward, ggml, imports, models, streaming, whole

DEFAULT, ASKED_FOR = ("forward", "decode", "imports", "experts"), ("streaming", "whole")


# For glibc. Without it the top of the heap goes back to the system whenever nothing happens to lie above it, and comes
# again page by page: a forward pass of Hugging Face's then took 300 ms in one run and 196 in another.
HEAP = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


def with_a_steady_heap() -> None:
    """Start this program again, if need be, in an environment in which freed memory stays with the process."""
    if not HEAP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], HEAP | os.environ)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part",
                        help=f"{', '.join(DEFAULT)}: all of these by default; streaming: half an hour; "
                             "whole FOLDER: a checkpoint of the 20B's shape, some minutes")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=31, help="rounds of a part; default 31")
    args = parser.parse_args()
    parts, folder = args.parts or [*DEFAULT], None
    if "whole" in parts[:-1]:
        folder = parts.pop(parts.index("whole") + 1)
    elif parts[-1] == "whole":
        parser.error("whole: of which checkpoint? `gptoss-lab synth FOLDER` writes one, then: whole FOLDER")
    if unknown := set(parts) - {*DEFAULT, *ASKED_FOR}:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(DEFAULT + ASKED_FOR)}")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")

    if {"forward", "decode"} & set(parts):
        with_a_steady_heap()
    torch.set_num_threads(1)
    installed = {peer: importlib.metadata.version(peer) for peer in models.PEERS if not models.missing(peer)}
    if not ggml.missing():
        installed[ggml.PEER] = importlib.metadata.version(ggml.PEER)
    print(", ".join(f"{name} {version}" for name, version in {"torch": torch.__version__, **installed}.items()))
    for why in (*map(models.missing, models.PEERS), ggml.missing()):
        if why:
            print(why)
    if {"forward", "decode"} & set(parts):
        ours = models.ours()
        peers = models.peers(ours)
        if hf := peers.get("transformers"):
            c = hf.config
            print(f"Hugging Face as it comes: {c._attn_implementation} attention, {c._experts_implementation} experts")
        if "forward" in parts:
            forward.main(ours, peers, args.rounds)
        if "decode" in parts:
            decode.main(ours, peers, args.rounds)
    if "imports" in parts:
        imports.main(args.rounds)
    if "experts" in parts:
        experts.main(args.rounds)
    if "streaming" in parts:
        streaming.main(args.rounds)
    if folder is not None:
        whole.main(folder)


if __name__ == "__main__":
    main()
