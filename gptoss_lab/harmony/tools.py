"""The tools that a conversation offers to the model, and how Harmony writes them down: as TypeScript.

The quirks below (an enum's default without quotes, `"x" | "y"[]`, comments inside types) are those of the
openai-harmony package, because the model was trained on text like this; each is pinned by a test against it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters`: its argument's JSON schema; None for no argument."""

    name: str
    description: str = ""
    parameters: dict | None = None


@dataclass(frozen=True)
class Namespace:
    """Tools under a common name: the model calls `name.tool`, or `name` itself where there are no tools."""

    name: str
    tools: Sequence[Tool] = ()
    description: str | None = None


def functions(*tools: Tool) -> Namespace:
    """The namespace that a developer's own functions live in.

    Examples:
        >>> print(tools_section([functions(Tool("now", "The time of day."))]))
        # Tools
        <BLANKLINE>
        ## functions
        <BLANKLINE>
        namespace functions {
        <BLANKLINE>
        // The time of day.
        type now = () => any;
        <BLANKLINE>
        } // namespace functions
    """
    return Namespace("functions", tools)


def browser() -> Namespace:
    """The browser that gpt-oss was trained with, for a system message (text: openai-harmony 0.0.8).

    Examples:
        >>> [tool.name for tool in browser().tools]
        ['search', 'open', 'find']
    """
    line = {"type": "number", "default": -1}
    return Namespace(
        "browser",
        (
            Tool(
                "search",
                "Searches for information related to `query` and displays `topn` results.",
                {
                    "type": "object",
                    "properties": {
                        "query": {"type": "string"},
                        "topn": {"type": "number", "default": 10},
                        "source": {"type": "string"},
                    },
                    "required": ["query"],
                },
            ),
            Tool(
                "open",
                "Opens the link `id` from the page indicated by `cursor` starting at line number `loc`, "
                "showing `num_lines` lines.\n"
                "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
                "If `cursor` is not provided, the most recent page is implied.\n"
                "If `id` is a string, it is treated as a fully qualified URL associated with `source`.\n"
                "If `loc` is not provided, the viewport will be positioned at the beginning of the document "
                "or centered on the most relevant passage, if available.\n"
                "Use this function without `id` to scroll to a new location of an opened page.",
                {
                    "type": "object",
                    "properties": {
                        "id": {"type": ["number", "string"], "default": -1},
                        "cursor": line,
                        "loc": line,
                        "num_lines": line,
                        "view_source": {"type": "boolean", "default": False},
                        "source": {"type": "string"},
                    },
                },
            ),
            Tool(
                "find",
                "Finds exact matches of `pattern` in the current page, or the page given by `cursor`.",
                {
                    "type": "object",
                    "properties": {"pattern": {"type": "string"}, "cursor": line},
                    "required": ["pattern"],
                },
            ),
        ),
        "Tool for browsing.\n"
        "The `cursor` appears in brackets before each browsing display: `[{cursor}]`.\n"
        "Cite information from the tool using the following format:\n"
        "`【{cursor}†L{line_start}(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\n"
        "Do not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)",
    )


def python() -> Namespace:
    """The python that gpt-oss was trained with, for a system message (text: openai-harmony 0.0.8).

    Examples:
        >>> python().tools
        ()
    """
    return Namespace(
        "python",
        description="Use this tool to execute Python code in your chain of thought. The code will not be "
        "shown to the user. This tool should be used for internal reasoning, but not for code that is "
        "intended to be visible to the user (e.g. when creating plots, tables, or files).\n\n"
        "When you send a message containing Python code to python, it will be executed in a stateful Jupyter "
        "notebook environment. python will respond with the output of the execution or time out after 120.0 "
        "seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet access for "
        "this session is UNKNOWN. Depends on the cluster.",
    )


def tools_section(namespaces: Sequence[Namespace]) -> str:
    """The `# Tools` part of a system or developer message, namespaces in the order of their names."""
    return "\n\n".join(["# Tools", *map(_namespace, sorted(namespaces, key=lambda n: n.name))])


def _namespace(namespace: Namespace) -> str:
    comment = "// " if namespace.tools else ""
    out = [f"## {namespace.name}\n"]
    out += [comment + line for line in _lines(namespace.description or "")]
    if namespace.tools:
        out.append(f"namespace {namespace.name} {{\n")
        for tool in namespace.tools:
            out += [f"// {line}" for line in _lines(tool.description)]
            argument = "" if tool.parameters is None else f"_: {typescript(tool.parameters)}"
            out.append(f"type {tool.name} = ({argument}) => any;\n")
        out.append(f"}} // namespace {namespace.name}")
    return "\n".join(out)


def _lines(text: str) -> list[str]:
    """Lines as Rust's `lines` cuts them, at newlines; Python's splitlines also cuts at form feeds."""
    lines = re.split(r"\r?\n", text)
    return lines if lines[-1] else lines[:-1]


def typescript(schema: dict, indent: str = "") -> str:
    """A JSON schema as the TypeScript type that Harmony shows to the model.

    Properties keep their order; a property not in `required` gets a `?`. Descriptions, titles, examples and
    defaults become comments. What has no TypeScript form here (anyOf, $ref, null, an unknown type) is `any`.

    Raises:
        ValueError: a default is NaN or infinite, which JSON cannot hold.

    Examples:
        >>> print(typescript({
        ...     "type": "object",
        ...     "properties": {
        ...         "city": {"type": "string", "description": "where"},
        ...         "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
        ...     },
        ...     "required": ["city"],
        ... }))
        {
        // where
        city: string,
        unit?: "C" | "F", // default: C
        }
    """
    if (variants := _get(schema, "oneOf", list)) is not None:
        return "".join(f"\n{indent} | {_top_variant(variant, indent)}" for variant in variants)
    if names := [t for t in _get(schema, "type", list) or () if isinstance(t, str)]:
        return " | ".join("number" if name == "integer" else name for name in names)
    match _get(schema, "type", str):
        case "object":
            return _object(schema, indent)
        case "string":
            values = [v for v in _get(schema, "enum", list) or () if isinstance(v, str)]
            return " | ".join(f'"{value}"' for value in values) or "string"
        case "number" | "integer":
            return "number"
        case "boolean":
            return "boolean"
        case "array":
            return f"{typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return "any"


def _get(schema, key: str, kind: type):
    """schema[key] if it is there and of that kind; schemas come from outside and may hold anything."""
    value = schema.get(key) if isinstance(schema, dict) else None
    return value if isinstance(value, kind) else None


def _object(schema: dict, indent: str) -> str:
    required = _get(schema, "required", list) or []
    properties = _get(schema, "properties", dict) or {}
    description = _get(schema, "description", str)
    head = f"{indent}// {description}\n" if description is not None else ""
    body = "".join(_property(key if key in required else f"{key}?", value, indent) for key, value in properties.items())
    return f"{head}{{\n{body}{indent}}}"


def _property(key: str, schema: dict, indent: str) -> str:
    comments = []
    if (title := _get(schema, "title", str)) is not None:
        comments += [title, None]
    has_one_of = isinstance(schema, dict) and "oneOf" in schema
    description = _get(schema, "description", str)
    if description is not None and not has_one_of:
        comments.append(description)
    if examples := _get(schema, "examples", list):
        comments += ["Examples:", *(f'- "{example}"' for example in examples if isinstance(example, str))]

    if (variants := _get(schema, "oneOf", list)) is not None:
        first = _get(variants[0], "description", str) if variants else None
        described_above = description is not None and description != first
        comments += [description] * described_above + _default(schema)
        type_ = f"{indent}{key}:\n"
        for i, variant in enumerate(variants):
            own = _get(variant, "description", str)
            said = own is None or own == description or (i == 0 and described_above)
            trailing = ([] if said else [own]) + _default(variant)
            type_ += f"{indent} | {_nullable(variant, indent + '   ')}{_trailing(trailing)}\n"
        type_ += f"{indent},\n"
    else:
        default = [] if has_one_of else _default(schema)
        type_ = f"{indent}{key}: {_nullable(schema, indent + '    ')},{_trailing(default)}\n"
    return "".join(f"{indent}//{'' if c is None else f' {c}'}\n" for c in comments) + type_


def _top_variant(variant: dict, indent: str) -> str:
    description = _get(variant, "description", str)
    comments = ([] if description is None else [description]) + _default(variant, enum_as_json=True)
    return _nullable(variant, indent + "   ") + _trailing(comments)


def _nullable(schema: dict, indent: str) -> str:
    type_ = typescript(schema, indent)
    return f"{type_} | null" if _get(schema, "nullable", bool) and "null" not in type_ else type_


def _trailing(comments: list[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""


def _default(schema: dict, enum_as_json: bool = False) -> list[str]:
    """The comment on a default, if there is one. A string is quoted but not escaped; an enum's is bare."""
    if not isinstance(schema, dict) or "default" not in schema:
        return []
    value = schema["default"]
    if isinstance(value, str) and not _get(schema, "enum", list):
        return [f'default: "{value}"']
    if isinstance(value, str) and not enum_as_json:
        return [f"default: {value}"]
    return [f"default: {_json(value)}"]


def _json(value) -> str:
    """JSON as Rust's serde_json writes it: no spaces, 1e16 for Python's 1e+16, big integers as floats."""
    match value:
        case dict():
            return "{" + ",".join(f"{_json(str(key))}:{_json(item)}" for key, item in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(_json, value)) + "]"
        case int() if not -(2**63) <= value < 2**64:
            return _json(float(value))
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, float) or "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    return f"{Decimal(text):f}" if int(exponent) == -5 else f"{mantissa}e{int(exponent)}"
