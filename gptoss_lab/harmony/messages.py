"""What is said in a conversation: messages, and the structured content of system and developer messages."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptoss_lab.harmony.tools import Namespace, Tool, browser, functions, python, tools_section

ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")
CONSTRAIN = "<|constrain|>"


def _different_names(tools: Sequence[Namespace]):
    names = [namespace.name for namespace in tools]
    if len(set(names)) < len(names):
        raise ValueError(f"namespaces need different names, here are {names}; put the tools into one of them")


@dataclass(frozen=True)
class SystemContent:
    """What a system message tells the model about itself. Each field set to None, or empty, is left out.

    The defaults are those of the openai-harmony package. `tools` is for `browser()` and `python()`; the
    developer's own functions belong into DeveloperContent.

    Examples:
        >>> print(SystemContent(reasoning_effort="high", current_date="2025-06-28").text())
        You are ChatGPT, a large language model trained by OpenAI.
        Knowledge cutoff: 2024-06
        Current date: 2025-06-28
        <BLANKLINE>
        Reasoning: high
        <BLANKLINE>
        # Valid channels: analysis, commentary, final. Channel must be included for every message.
    """

    model_identity: str | None = "You are ChatGPT, a large language model trained by OpenAI."
    reasoning_effort: str | None = "medium"
    knowledge_cutoff: str | None = "2024-06"
    current_date: str | None = None
    channels: Sequence[str] = ("analysis", "commentary", "final")
    channel_required: bool = True
    tools: Sequence[Namespace] = ()

    def __post_init__(self):
        if self.reasoning_effort not in (None, *EFFORTS):
            known = ", ".join(EFFORTS)
            raise ValueError(f"reasoning_effort is one of {known} or None, not {self.reasoning_effort!r}")
        _different_names(self.tools)

    def text(self, has_function_tools: bool = False) -> str:
        """The message's text. `has_function_tools`: a developer message of the conversation has some."""
        about = [
            self.model_identity,
            None if self.knowledge_cutoff is None else f"Knowledge cutoff: {self.knowledge_cutoff}",
            None if self.current_date is None else f"Current date: {self.current_date}",
        ]
        sections = ["\n".join(line for line in about if line is not None)] if about != [None] * 3 else []
        if self.reasoning_effort is not None:
            sections.append(f"Reasoning: {self.reasoning_effort}")
        if self.tools:
            sections.append(tools_section(self.tools))
        if self.channels:
            line = f"# Valid channels: {', '.join(self.channels)}."
            if self.channel_required:
                line += " Channel must be included for every message."
            if has_function_tools:
                line += "\nCalls to these tools must go to the commentary channel: 'functions'."
            sections.append(line)
        return "\n\n".join(sections)


@dataclass(frozen=True)
class DeveloperContent:
    """The developer's instructions (elsewhere called the system prompt) and the functions the model may call.

    Examples:
        >>> print(DeveloperContent("Answer in rhyme.").text())
        # Instructions
        <BLANKLINE>
        Answer in rhyme.
    """

    instructions: str | None = None
    tools: Sequence[Namespace] = ()

    def __post_init__(self):
        _different_names(self.tools)

    @property
    def has_function_tools(self) -> bool:
        return any(namespace.name == "functions" and namespace.tools for namespace in self.tools)

    def text(self) -> str:
        """The message's text."""
        sections = [] if self.instructions is None else ["# Instructions", self.instructions]
        if self.tools:
            sections.append(tools_section(self.tools))
        return "\n\n".join(sections)


@dataclass(frozen=True)
class Message:
    """One message: who says what, to whom, on which channel, in what form.

    Args:
        role: system, developer, user, assistant or tool.
        content: text; or a SystemContent in a system message, a DeveloperContent in a developer message.
        name: which user or assistant; for a tool, its full name such as `functions.get_weather` (required).
        recipient: the tool that an assistant calls, or `assistant` for a tool's answer.
        channel: analysis (chain of thought), commentary (calls, and text between them) or final (the answer).
        content_type: the form of the content, such as `code`, or `<|constrain|>json`, whose mark becomes a
            special token.

    Raises:
        ValueError: an unknown role, a tool without a name or named like another role, structured content in
            another role's message, or a header field that is not one word without `<`. The package writes any
            field; a name such as "bob to=functions.pay" then reads as a header of its own making.

    Examples:
        >>> Message("assistant", '{"city": "Paris"}', recipient="functions.get_weather", channel="commentary",
        ...         content_type="<|constrain|>json").recipient
        'functions.get_weather'
    """

    role: str
    content: str | SystemContent | DeveloperContent
    name: str | None = None
    recipient: str | None = None
    channel: str | None = None
    content_type: str | None = None

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"role is one of {', '.join(ROLES)}, not {self.role!r}")
        if self.role == "tool" and self.name is None:
            raise ValueError("a tool message needs the name of its tool, such as functions.get_weather")
        if self.role == "tool" and self.name.partition(":")[0] in ROLES[:4]:
            raise ValueError(f"a tool cannot be named {self.name!r}: its header would read as that role's")
        kinds = {"system": str | SystemContent, "developer": str | DeveloperContent}
        if not isinstance(self.content, kinds.get(self.role, str)):
            raise ValueError(f"a {self.role} message cannot hold a {type(self.content).__name__}")
        for field in ("name", "recipient", "channel", "content_type"):
            value = getattr(self, field)
            if field == "content_type" and value is not None and value.startswith(CONSTRAIN):
                value = value.removeprefix(CONSTRAIN) or None
            if value is not None and not re.fullmatch(r"[^\s<]+", value):
                raise ValueError(f"{field} is one word without spaces or '<', not {getattr(self, field)!r}")


def messages_from(dicts: Iterable[Mapping]) -> list[Message]:
    """Messages from plain dictionaries, such as those of a JSON file. The keys are the fields of Message.

    The content of a system or developer message may be a dictionary of SystemContent's or DeveloperContent's
    fields; there the tools are "browser" and "python" for system, and for developer dictionaries of Tool's
    fields.

    Raises:
        ValueError: a message with an unknown or missing key, or one that Message refuses. It names the
            message.

    Examples:
        >>> conversation = messages_from([
        ...     {"role": "system", "content": {"reasoning_effort": "low", "tools": ["python"]}},
        ...     {"role": "developer", "content": {"tools": [{"name": "now", "description": "The time."}]}},
        ...     {"role": "user", "content": "What time is it?"},
        ... ])
        >>> [message.role for message in conversation]
        ['system', 'developer', 'user']
    """
    messages = []
    for i, fields in enumerate(dicts):
        try:
            messages.append(Message(**{**fields, "content": _content(fields["role"], fields["content"])}))
        except KeyError as error:
            raise ValueError(f"message {i} has no {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"message {i}: {error}") from error
    return messages


def _content(role: str, content) -> str | SystemContent | DeveloperContent:
    if not isinstance(content, Mapping):
        return content
    fields = dict(content)
    tools = fields.pop("tools", ())
    if role == "system":
        if unknown := [tool for tool in tools if tool not in ("browser", "python")]:
            raise ValueError(f'a system message\'s tools are "browser" and "python", not {unknown}')
        builtin = tuple(browser() if tool == "browser" else python() for tool in tools)
        return SystemContent(**fields, tools=builtin)
    if role == "developer":
        own = (functions(*(Tool(**tool) for tool in tools)),) if tools else ()
        return DeveloperContent(**fields, tools=own)
    raise ValueError(f"the content of a {role} message is a string")
