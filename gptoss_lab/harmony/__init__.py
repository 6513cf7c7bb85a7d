"""Harmony, the format in which gpt-oss reads and writes conversations: messages <-> text and tokens.

A message is `<|start|>{header}<|message|>{content}<|end|>`; the header says who speaks, to whom, on which
channel and in what form. Every function that makes or reads tokens takes the vocabulary as an argument and
works with `tokenizer.o200k_harmony()` and with `tokenizer.tiny()` alike.

    messages.py   what is said: Message, SystemContent, DeveloperContent
    tools.py      what may be called: Tool, Namespace, the browser and python tools; JSON schema -> TypeScript
    render.py     messages -> tokens, for sampling and for training
    parse.py      tokens -> messages, one token at a time

The format: https://github.com/openai/harmony/blob/main/docs/format.md. What it leaves open is settled as the
openai-harmony package 0.0.8 does it; where this package differs, the docstring says so.

Examples:
    >>> from gptoss_lab.tokenizer import tiny
    >>> talk = [Message("user", "Roses are"), Message("assistant", "red", channel="final")]
    >>> render_text(talk, next_role=None)
    '<|start|>user<|message|>Roses are<|end|><|start|>assistant<|channel|>final<|message|>red<|end|>'
    >>> parse(render(talk, tiny(), next_role=None), tiny()) == talk
    True
"""

from gptoss_lab.harmony.messages import DeveloperContent, Message, SystemContent, messages_from
from gptoss_lab.harmony.parse import HarmonyError, Parser, parse
from gptoss_lab.harmony.render import render, render_for_training, render_message, render_text, stop_tokens
from gptoss_lab.harmony.tools import Namespace, Tool, browser, functions, python, typescript

__all__ = [
    "DeveloperContent",
    "HarmonyError",
    "Message",
    "Namespace",
    "Parser",
    "SystemContent",
    "Tool",
    "browser",
    "functions",
    "messages_from",
    "parse",
    "python",
    "render",
    "render_for_training",
    "render_message",
    "render_text",
    "stop_tokens",
    "typescript",
]
