"""Greedy decoding with a KV cache."""
import torch
from torch import nn

import gptoss_lab as lab

from .timing import Goal, interleave, report

HF, OURS, TL = "Hugging Face, generate", "ours, generate", "TransformerLens, generate"
RECORDED = "ours, generate, default group recorded"
PROMPT, NEW = 16, 64


def main(ours: nn.Module, peers: dict[str, nn.Module], rounds: int) -> None:
    """Assert that all continue a prompt with the same tokens, then time them."""
    rng = torch.Generator().manual_seed(2)
    prompt = torch.randint(ours.config.d_vocab, (1, PROMPT), generator=rng)

    def recorded() -> list[int]:
        with lab.record(ours):
            return lab.generate(ours, prompt, NEW, stop=())[0]

    calls = {OURS: lambda: lab.generate(ours, prompt, NEW, stop=())[0], RECORDED: recorded}
    if hf := peers.get("transformers"):
        settings = dict(attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, pad_token_id=0)
        calls[HF] = lambda: hf.generate(prompt, max_new_tokens=NEW, **settings)[0, PROMPT:].tolist()
    if tl := peers.get("transformer-lens"):
        settings_tl = dict(do_sample=False, stop_at_eos=False, verbose=False)
        calls[TL] = lambda: tl.generate(prompt, max_new_tokens=NEW, **settings_tl)[0, PROMPT:].tolist()
    with torch.no_grad():
        expected = calls[OURS]()
        for name, call in calls.items():
            assert call() == expected, f"{name} continues with other tokens than ours"
        times = interleave(calls, rounds)
    # tokens a second, ours over theirs, is their time over ours
    bounds = [Goal(HF, OURS, at_least=2.0), Goal(TL, OURS), Goal(RECORDED, OURS)]
    report(f"greedy decoding, {PROMPT} tokens and {NEW} new ones, {NEW} tokens a run", times, bounds)
