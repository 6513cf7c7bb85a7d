"""`python -m bench`: gptoss_lab beside other libraries, on one small random model, on one thread of the CPU.

Runs take turns in a random order, so that what else the machine does meets all of them; a figure is the median of the
ratios within rounds, and its quartiles. CPU time is the judge, the clock is shown beside it.
"""
import argparse
import importlib.metadata

import torch

from . import decode, experts, forward, imports, models, streaming


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part",
                        help="forward, decode, imports: all three by default; experts: at 20B shapes; "
                             "streaming: half an hour")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=31, help="rounds of a part; default 31")
    args = parser.parse_args()
    parts = args.parts or ["forward", "decode", "imports"]
    if unknown := set(parts) - {"forward", "decode", "imports", "experts", "streaming"}:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are forward, decode, imports, experts, streaming")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")

    torch.set_num_threads(1)
    installed = {peer: importlib.metadata.version(peer) for peer in models.PEERS if not models.missing(peer)}
    print(", ".join(f"{name} {version}" for name, version in {"torch": torch.__version__, **installed}.items()))
    for peer in models.PEERS:
        if why := models.missing(peer):
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


if __name__ == "__main__":
    main()
