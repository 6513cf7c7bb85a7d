"""Tokens -> messages, as the tokens arrive."""

import codecs
import operator
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_lab import tokenizer
from gptoss_lab.harmony.messages import CONSTRAIN, ROLES, Message

if TYPE_CHECKING:
    import tiktoken


class HarmonyError(ValueError):
    """A stream of tokens that is not Harmony. `position` is the index, from 0, of the token that shows it.

    Where a stream ends too early, the position is the number of its tokens.
    """

    def __init__(self, position: int, fault: str):
        super().__init__(f"token {position}: {fault}")
        self.position = position


class Parser:
    """Reads a stream of Harmony tokens one by one.

    `feed` each token, then `finish`. `messages` holds what is complete; `role`, `name`, `recipient`,
    `channel`, `content_type` and `content` describe the message that is arriving, its header from
    `<|message|>` on; `delta` is the text that the last token brought. A character split over several tokens
    arrives with its last one; bytes that are not UTF-8 become U+FFFD. `position` counts the tokens read. A
    token that is refused changes nothing.

    The parser follows openai-harmony 0.0.8, with these differences: a special token inside a header or a content
    is an error at that token, where the package reads on and takes its name for text; so is an id that the
    vocabulary lacks; `user:bob` is the user named bob, where the package finds no such role; a lone
    `<|constrain|>json` is a content type, where the package makes it the recipient.
    Like the package it takes the one unmarked word of `assistant<|channel|>analysis code` for a recipient, and
    knows a tool by its name being followed by something, such as ` to=assistant`.

    Args:
        encoding: the vocabulary.
        role: who speaks first, where the prompt already ends with `<|start|>` and that role; None for a
            stream that begins with `<|start|>`.

    Raises:
        ValueError: the role is not system, developer, user or assistant; the vocabulary lacks a special
            token.

    Examples:
        >>> from gptoss_lab.harmony import render
        >>> from gptoss_lab.tokenizer import tiny
        >>> parser = Parser(tiny())
        >>> answer = [Message("assistant", "One red fish", channel="final")]
        >>> for token in render(answer, tiny(), next_role=None):
        ...     if parser.feed(token):
        ...         print(parser.channel, repr(parser.delta))
        final 'One'
        final ' red'
        final ' fish'
        >>> parser.messages  # doctest: +NORMALIZE_WHITESPACE
        [Message(role='assistant', content='One red fish', name=None, recipient=None, channel='final',
         content_type=None)]
    """

    def __init__(self, encoding: "tiktoken.Encoding", role: str | None = None):
        if role not in (None, *ROLES[:4]):
            raise ValueError(f"role is one of {', '.join(ROLES[:4])} or None, not {role!r}")
        self.encoding = encoding
        self.messages: list[Message] = []
        self.position = 0
        self.delta = ""
        self._start, self._message, self._channel, self._constrain = (
            tokenizer.special(encoding, s) for s in ("<|start|>", "<|message|>", "<|channel|>", CONSTRAIN)
        )
        self._ends = {tokenizer.special(encoding, s) for s in ("<|end|>", "<|return|>", "<|call|>")}
        self._given_role = role
        self._header_tokens: list[int] | None = None if role is None else []  # None outside a header
        self._header: Message | None = None  # the message that is arriving, still without its content
        self._content: list[str] = []

    @property
    def role(self) -> str | None:
        """Who is speaking; None between messages and in a header that does not begin with a given role."""
        return self._given_role if self._header is None else self._header.role

    @property
    def name(self) -> str | None:
        """Which user, assistant or tool is speaking, where the header says so."""
        return None if self._header is None else self._header.name

    @property
    def recipient(self) -> str | None:
        """To whom, where the header says so."""
        return None if self._header is None else self._header.recipient

    @property
    def channel(self) -> str | None:
        """On which channel, where the header says so."""
        return None if self._header is None else self._header.channel

    @property
    def content_type(self) -> str | None:
        """In what form, where the header says so."""
        return None if self._header is None else self._header.content_type

    @property
    def content(self) -> str:
        """The text of the message so far; "" between messages."""
        return "".join(self._content)

    def feed(self, token: int) -> str:
        """Read one token; returns the text that it adds to the content, often "".

        Raises:
            HarmonyError: the token cannot stand here, or is not in the vocabulary.
        """
        token = operator.index(token)
        try:
            piece = self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            raise self._error(f"{token} is not an id of {self.encoding.name!r}") from None
        is_special = self.encoding.is_special_token(token)
        delta = ""
        if self._header is not None:
            if token in self._ends:
                delta = self._close()
            elif is_special:
                raise self._error(f"expected text, <|end|>, <|return|> or <|call|>, found {piece.decode()}")
            else:
                delta = self._decoder.decode(piece)
                self._content.append(delta)
        elif self._header_tokens is not None:
            if token == self._message:
                self._open(self._parse_header())
            elif is_special and token not in {self._channel, self._constrain}.difference(self._header_tokens):
                raise self._error(f"expected the rest of a header and <|message|>, found {piece.decode()}")
            else:
                self._header_tokens.append(token)
        elif token == self._start:
            self._header_tokens = []
        else:
            raise self._error(f"expected <|start|>, found {piece.decode(errors='replace')!r}")
        self.delta = delta
        self.position += 1
        return delta

    def finish(self) -> str:
        """End the stream. A message whose content is still open, as when sampling was cut off, is closed.

        Returns the U+FFFD of a character that was cut off with it, if there is one.

        Raises:
            HarmonyError: the stream ends inside a header.
        """
        if self._header_tokens is not None:
            raise self._error("expected the rest of a header and <|message|>, found the end of the stream")
        self.delta = "" if self._header is None else self._close()
        return self.delta

    def _error(self, fault: str, position: int | None = None) -> HarmonyError:
        return HarmonyError(self.position if position is None else position, fault)

    def _open(self, header: Message):
        self._header, self._header_tokens, self._given_role = header, None, None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def _close(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self.messages.append(replace(self._header, content=self.content + rest))
        self._header, self._content = None, []
        return rest

    def _parse_header(self) -> Message:
        tokens, begin = self._header_tokens, self.position - len(self._header_tokens)
        at = tokens.index(self._channel) if self._channel in tokens else len(tokens)
        try:
            text, after = (self.encoding.decode_bytes(part).decode() for part in (tokens[:at], tokens[at + 1 :]))
        except UnicodeDecodeError:
            raise self._error("expected a header in UTF-8", begin) from None
        channel = None
        if at < len(tokens):
            channel = re.match(r"[^\s<]*", after)[0]
            if not channel:
                raise self._error("expected a channel's name after <|channel|>", begin + at)
            text += after.removeprefix(channel)
        words = text.replace(CONSTRAIN, f" {CONSTRAIN}").split()
        role, name = self._author(words, begin)
        try:
            recipient, content_type = _recipient_and_type(words)
            return Message(role, "", name, recipient, channel, content_type)
        except ValueError as error:
            raise self._error(f"a header that is none, {text!r}: {error}", begin) from None

    def _author(self, words: list[str], begin: int) -> tuple[str, str | None]:
        """Takes the author off `words`: role and name."""
        if self._given_role is not None:
            if words and words[0] == self._given_role:
                words.pop(0)
            return self._given_role, None
        if not words or words[0].startswith("to="):
            raise self._error(f"expected a role, found {words[0]!r}" if words else "expected a role", begin)
        word = words.pop(0)
        role, colon, name = word.partition(":")
        if role in ROLES[:4] and bool(name) == bool(colon):
            return role, name or None
        if word == "tool" or words:
            return "tool", word
        raise self._error(f"expected a role or the name of a tool with a recipient, found {word!r}", begin)


def _recipient_and_type(words: list[str]) -> tuple[str | None, str | None]:
    """The words of a header after its author: [to=]recipient, then a content type; either may be missing."""
    match words:
        case []:
            return None, None
        case [word] if word.startswith(CONSTRAIN):
            return None, word
        case [word]:
            return word.removeprefix("to="), None
        case [recipient, content_type] if not content_type.startswith("to="):
            return recipient.removeprefix("to="), content_type
    raise ValueError("expected at most a recipient and a content type")


def parse(tokens: Iterable[int], encoding: "tiktoken.Encoding", role: str | None = None) -> list[Message]:
    """The messages in a stream of tokens. `role` as in Parser: "assistant" for a completion.

    Raises:
        HarmonyError: the stream is not Harmony; `.position` says where.

    Examples:
        >>> from gptoss_lab.tokenizer import tiny
        >>> completion = tiny().encode("<|channel|>final<|message|>Hello<|return|>", allowed_special="all")
        >>> parse(completion, tiny(), role="assistant")[0].content
        'Hello'
        >>> parse(completion, tiny())
        Traceback (most recent call last):
            ...
        gptoss_lab.harmony.parse.HarmonyError: token 0: expected <|start|>, found '<|channel|>'
    """
    parser = Parser(encoding, role)
    for token in tokens:
        parser.feed(token)
    parser.finish()
    return parser.messages
