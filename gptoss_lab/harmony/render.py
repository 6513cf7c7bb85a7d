"""Messages -> tokens. Text is encoded as text, so nothing that a message says can become a special token."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from gptoss_lab import tokenizer
from gptoss_lab.harmony.messages import CONSTRAIN, ROLES, DeveloperContent, Message, SystemContent

if TYPE_CHECKING:
    import tiktoken

DROPS = ("openai", "all", "none")


class Special(str):
    """The name of a special token. A plain str beside it is text, whatever it looks like."""


def render(
    messages: Iterable[Message],
    encoding: "tiktoken.Encoding",
    *,
    next_role: str | None = "assistant",
    drop_analysis: str = "openai",
) -> list[int]:
    """The tokens of a conversation and, by default, of `<|start|>assistant`: the prompt for an answer.

    Args:
        next_role: who speaks next; None renders the conversation alone.
        drop_analysis: which chain of thought is left out, before the model is asked again.
            "openai": what the openai-harmony package leaves out. If the last assistant message is final, the
                analysis before the *first* final; the analysis of later turns stays.
            "all": what the written guide and the Hugging Face template leave out. All analysis before the
                *last* final; what follows it stays, for during tool calls the model goes on thinking from it.
            "none": nothing is left out.

    Raises:
        ValueError: an unknown role or way to drop; a special token that `encoding` lacks.

    Examples:
        >>> from gptoss_lab.tokenizer import tiny
        >>> tiny().decode(render([Message("user", "Hello <|end|>")], tiny()))
        '<|start|>user<|message|>Hello <|end|><|end|><|start|>assistant'
        >>> render([Message("user", "Hello <|end|>")], tiny()).count(tokenizer.special(tiny(), "<|end|>"))
        1
    """
    return _encode(_conversation(messages, next_role, drop_analysis), encoding)


def render_text(
    messages: Iterable[Message], *, next_role: str | None = "assistant", drop_analysis: str = "openai"
) -> str:
    """What `render` renders, as a string to look at; it needs no vocabulary.

    Do not encode it: a `<|end|>` that somebody typed looks here like the token that ends a message.

    Examples:
        >>> render_text([Message("user", "Hello")])
        '<|start|>user<|message|>Hello<|end|><|start|>assistant'
    """
    return "".join(_conversation(messages, next_role, drop_analysis))


def render_for_training(
    messages: Iterable[Message], encoding: "tiktoken.Encoding", *, drop_analysis: str = "all"
) -> list[int]:
    """The tokens of a conversation to train on; a final message at the end closes with `<|return|>`.

    `drop_analysis` is as in `render`, but "all" leaves out only the analysis of turns before the one that
    ends the conversation, so the model learns to think from what it will see. "openai" is the package's
    default; it also leaves out the chain of thought of a single turn, the very one to be learnt.

    Examples:
        >>> from gptoss_lab.tokenizer import tiny
        >>> tiny().decode(render_for_training([Message("assistant", "Hello", channel="final")], tiny()))
        '<|start|>assistant<|channel|>final<|message|>Hello<|return|>'
    """
    messages = list(messages)
    tokens = _encode(_conversation(messages, None, drop_analysis, training=True), encoding)
    if _ends_in_final(messages):
        tokens[-1] = tokenizer.special(encoding, "<|return|>")
    return tokens


def render_message(message: Message, encoding: "tiktoken.Encoding", *, has_function_tools: bool = False) -> list[int]:
    """The tokens of one message. `has_function_tools` adds the line about functions to a system message.

    Examples:
        >>> from gptoss_lab.tokenizer import tiny
        >>> render_message(Message("user", "One red fish"), tiny())
        [507, 449, 509, 471, 296, 291, 508]
    """
    return _encode(_message(message, has_function_tools), encoding)


def stop_tokens(encoding: "tiktoken.Encoding") -> tuple[int, int]:
    """The ids that end an assistant's turn: `<|return|>` (it has answered), `<|call|>` (it waits for a tool).

    Examples:
        >>> from gptoss_lab.tokenizer import tiny
        >>> stop_tokens(tiny())
        (504, 510)
    """
    return tokenizer.special(encoding, "<|return|>"), tokenizer.special(encoding, "<|call|>")


def _encode(pieces: Iterable[str], encoding: "tiktoken.Encoding") -> list[int]:
    tokens = []
    for piece in pieces:
        if isinstance(piece, Special):
            tokens.append(tokenizer.special(encoding, piece))
        else:
            tokens += encoding.encode_ordinary(piece)
    return tokens


def _conversation(
    messages: Iterable[Message], next_role: str | None, drop_analysis: str, training: bool = False
) -> Iterator[str]:
    if next_role not in (None, *ROLES):
        raise ValueError(f"next_role is one of {', '.join(ROLES)} or None, not {next_role!r}")
    messages = list(messages)
    contents = [message.content for message in messages]
    has_function_tools = any(isinstance(c, DeveloperContent) and c.has_function_tools for c in contents)
    kept_from = _kept_from(messages, drop_analysis, training)
    for i, message in enumerate(messages):
        if i >= kept_from or message.channel != "analysis":
            yield from _message(message, has_function_tools)
    if next_role is not None:
        yield Special("<|start|>")
        yield next_role


def _kept_from(messages: Sequence[Message], drop_analysis: str, training: bool) -> int:
    """The index of the message from which analysis is kept."""
    finals = [i for i, message in enumerate(messages) if message.channel == "final"]
    match drop_analysis:
        case "openai":
            spoken = [message for message in messages if message.role == "assistant"]
            return finals[0] if spoken and spoken[-1].channel == "final" else 0
        case "all":
            if training and _ends_in_final(messages):
                finals.pop()
            return finals[-1] if finals else 0
        case "none":
            return 0
    raise ValueError(f"drop_analysis is one of {', '.join(DROPS)}, not {drop_analysis!r}")


def _ends_in_final(messages: Sequence[Message]) -> bool:
    return len(messages) > 0 and messages[-1].role == "assistant" and messages[-1].channel == "final"


def _message(message: Message, has_function_tools: bool) -> Iterator[str]:
    yield Special("<|start|>")
    if message.role == "tool":
        yield message.name
    else:
        yield message.role
        if message.name is not None:
            yield f":{message.name}"
    if message.recipient not in (None, "all"):
        yield f" to={message.recipient}"
    if message.channel is not None:
        yield Special("<|channel|>")
        yield message.channel
    if message.content_type is not None:
        if message.content_type.startswith(CONSTRAIN):
            yield " "
            yield Special(CONSTRAIN)
            yield message.content_type.removeprefix(CONSTRAIN)
        else:
            yield f" {message.content_type}"
    yield Special("<|message|>")
    match message.content:
        case SystemContent():
            yield message.content.text(has_function_tools)
        case DeveloperContent():
            yield message.content.text()
        case text:
            yield text
    is_call = message.role == "assistant" and message.recipient is not None
    yield Special("<|call|>" if is_call else "<|end|>")
