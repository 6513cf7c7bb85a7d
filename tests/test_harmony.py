"""Harmony, against the openai-harmony package (an independent implementation in Rust) and by its own rules."""

import doctest
import functools
import importlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import facts, needs_facts, needs_vocabulary

from gptoss_lab import harmony, tokenizer
from gptoss_lab.harmony import (
    DeveloperContent,
    HarmonyError,
    Message,
    Namespace,
    Parser,
    SystemContent,
    Tool,
    messages_from,
    parse,
    render,
    render_for_training,
    render_message,
    render_text,
)

SPECIALS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
START, END, MESSAGE, CHANNEL, CONSTRAIN, RETURN, CALL = SPECIALS

vocabularies = pytest.mark.parametrize("encoding_name", ["tiny", pytest.param("o200k_harmony", marks=needs_vocabulary)])


def encoding_called(name):
    return getattr(tokenizer, name)()


def test_the_examples_in_the_docs_run():
    for name in ("", ".messages", ".tools", ".render", ".parse"):
        assert doctest.testmod(importlib.import_module(f"gptoss_lab.harmony{name}")).failed == 0


# --- the package: its JSON to our types, and strategies that draw conversations in its JSON ---


@functools.cache
def theirs():
    """The openai-harmony package and its encoding."""
    package = pytest.importorskip("openai_harmony")
    return package, package.load_harmony_encoding("HarmonyGptOss")


def ours(message: dict) -> Message:
    """A message in the package's JSON as one of ours."""
    content = message["content"]
    content = {"type": "text", "text": content} if isinstance(content, str) else content[0]

    def namespaces():
        return tuple(
            Namespace(n["name"], tuple(Tool(**tool) for tool in n["tools"]), n.get("description"))
            for n in (content.get("tools") or {}).values()
        )

    match content["type"]:
        case "text":
            body = content["text"]
        case "system_content":
            effort, channels = content.get("reasoning_effort"), content.get("channel_config")
            body = SystemContent(
                content.get("model_identity"),
                None if effort is None else effort.lower(),
                content.get("knowledge_cutoff"),
                content.get("conversation_start_date"),
                () if channels is None else channels["valid_channels"],
                channels is not None and channels["channel_required"],
                namespaces(),
            )
        case "developer_content":
            body = DeveloperContent(content.get("instructions"), namespaces())
    fields = ("name", "recipient", "channel", "content_type")
    return Message(message["role"], body, **{field: message.get(field) for field in fields})


lookalikes = st.sampled_from([*SPECIALS, "<|endoftext|>", "<|reserved_200018|>", "<|", "|>", "\r\n", "é", "🙂"])
texts = st.lists(st.one_of(st.text(max_size=12), lookalikes), max_size=5).map("".join)
words = st.one_of(
    st.sampled_from(["functions.f", "browser.search", "python", "assistant", "all", "bob"]),
    st.text(st.characters(exclude_categories=["Cs", "Z"], exclude_characters="<:="), min_size=1, max_size=8).filter(
        lambda word: re.fullmatch(r"\S+", word)
    ),
)


def maybe(strategy):
    return st.none() | strategy


# the package's JSON reader is exact for these and one unit in the last place off for some longer ones
short_floats = st.builds(lambda m, e: float(f"{m}e{e}"), st.integers(-(10**6), 10**6), st.integers(-22, 16))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | short_floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)


def some_of(required, optional):
    return st.fixed_dictionaries(required, optional=optional)


def schemas_with(inner):
    comments = {
        "title": texts,
        "description": st.sampled_from("de") | texts,
        "default": json_values,
        "nullable": st.booleans(),
    }
    comments |= {"examples": st.lists(texts | st.integers(), max_size=2), "enum": st.lists(texts, max_size=3)}
    properties = st.dictionaries(texts, inner, max_size=3)
    required = properties.flatmap(lambda p: st.lists(st.sampled_from([*p, "absent"]), max_size=2))
    kinds = ["string", "number", "integer", "boolean", "array", "object", "null", "unknown"]
    return st.one_of(
        some_of({"type": st.sampled_from(kinds)}, comments),
        some_of({"type": st.just("object")}, {"properties": properties, "required": required} | comments),
        some_of({"type": st.just("array")}, {"items": inner} | comments),
        some_of({"oneOf": st.lists(inner, max_size=3)}, {"type": st.sampled_from(kinds)} | comments),
        some_of({"type": st.lists(st.sampled_from(kinds), max_size=3)}, comments),
    )


junk = st.sampled_from([{}, {"type": 3}, {"oneOf": "x", "default": 1, "description": "d"}, {"enum": []}, True, None])
schemas = schemas_with(st.recursive(junk | schemas_with(junk), schemas_with, max_leaves=6))
tools = some_of({"name": texts, "description": texts}, {"parameters": schemas})


def namespaces_of(names):
    namespace = some_of({"name": names, "tools": st.lists(tools, max_size=2)}, {"description": texts})
    return st.lists(namespace, max_size=2).map(lambda many: {n["name"]: n for n in many})


builtin_names = st.sampled_from(["browser", "python", "zoo"])
function_names = st.sampled_from(["functions", "functions", "aux"])
system_contents = some_of(
    {"type": st.just("system_content")},
    {
        "model_identity": maybe(texts),
        "reasoning_effort": maybe(st.sampled_from(["Low", "Medium", "High"])),
        "knowledge_cutoff": maybe(texts),
        "conversation_start_date": maybe(texts),
        "channel_config": st.fixed_dictionaries(
            {"valid_channels": st.lists(texts, max_size=3), "channel_required": st.booleans()}
        ),
        "tools": namespaces_of(builtin_names),
    },
)
developer_contents = some_of(
    {"type": st.just("developer_content")},
    {"instructions": maybe(texts), "tools": namespaces_of(function_names)},
)
plain_contents = texts.map(lambda text: {"type": "text", "text": text})


def messages_of(role, names, contents):
    return st.fixed_dictionaries(
        {
            "role": st.just(role),
            "name": names,
            "content": contents.map(lambda content: [content]),
            "recipient": maybe(words),
            "channel": maybe(st.sampled_from(["analysis", "commentary", "final"]) | words),
            "content_type": maybe(st.sampled_from([CONSTRAIN, f"{CONSTRAIN}json", "json"]) | words),
        }
    )


tool_names = st.just("tool") | words.filter(lambda word: word not in ("assistant", "user", "system", "developer"))
plain_messages = st.one_of(
    messages_of("user", maybe(words), plain_contents),
    messages_of("tool", tool_names, plain_contents),
    messages_of("assistant", maybe(words), plain_contents),
    # the usual course of a conversation, often enough that analysis is dropped
    messages_of("assistant", st.none(), plain_contents).map(lambda m: m | {"channel": "analysis", "recipient": None}),
    messages_of("assistant", st.none(), plain_contents).map(lambda m: m | {"channel": "final", "recipient": None}),
)
any_messages = st.one_of(
    plain_messages,
    messages_of("system", maybe(words), plain_contents | system_contents),
    messages_of("developer", maybe(words), plain_contents | developer_contents),
)


def their_message(package, message):
    """As Message.from_dict, but what is left out of a system content is None, not the package's default."""
    content = message["content"][0]
    if content["type"] == "system_content":
        keys = [
            "model_identity",
            "reasoning_effort",
            "knowledge_cutoff",
            "conversation_start_date",
            "channel_config",
        ]
        content = dict.fromkeys([*keys, "tools"]) | content
    return package.Message.from_dict(message | {"content": [content]})


# --- rendering equals the package's ---


@needs_facts
@needs_vocabulary
@pytest.mark.parametrize("index", range(52))
def test_a_recorded_call_of_the_package_gives_the_same_tokens_and_messages(index):
    vectors = facts("harmony_vectors.json")["vectors"]
    assert len(vectors) == 52
    vector, encoding = vectors[index], tokenizer.o200k_harmony()
    drop = "openai" if (vector.get("config") or {}).get("auto_drop_analysis", True) else "none"
    conversation = [ours(message) for message in vector.get("conversation", {}).get("messages", [])]
    match vector["method"]:
        case "render_conversation_for_completion":
            got = render(conversation, encoding, next_role=vector["role"], drop_analysis=drop)
            assert render_text(conversation, next_role=vector["role"], drop_analysis=drop) == vector["text"]
        case "render_conversation":
            got = render(conversation, encoding, next_role=None, drop_analysis=drop)
            assert render_text(conversation, next_role=None, drop_analysis=drop) == vector["text"]
        case "render_conversation_for_training":
            got = render_for_training(conversation, encoding, drop_analysis=drop)
        case "render":
            got = render_message(ours(vector["message"]), encoding)
        case "parse_messages_from_completion_tokens" if vector["error"]:
            with pytest.raises(HarmonyError):
                parse(vector["tokens"], encoding, vector["role"])
            return
        case "parse_messages_from_completion_tokens":
            assert parse(vector["tokens"], encoding, vector["role"]) == [ours(m) for m in vector["result"]]
            return
    assert got == vector["result"]
    assert encoding.decode(got) == vector["text"]


@needs_vocabulary
@given(
    st.lists(any_messages, max_size=6),
    st.sampled_from(["assistant", "user", "system", "developer", "tool"]),
    st.booleans(),
)
def test_a_random_conversation_renders_as_the_package_renders_it(drawn, next_role, auto_drop):
    package, encoding = theirs()
    conversation = package.Conversation.from_messages([their_message(package, m) for m in drawn])
    config = package.RenderConversationConfig(auto_drop_analysis=auto_drop)
    mine, o200k, drop = [ours(m) for m in drawn], tokenizer.o200k_harmony(), "openai" if auto_drop else "none"

    want = encoding.render_conversation_for_completion(conversation, package.Role(next_role), config)
    assert render(mine, o200k, next_role=next_role, drop_analysis=drop) == want
    assert render_text(mine, next_role=next_role, drop_analysis=drop) == encoding.decode_utf8(want)
    want = encoding.render_conversation(conversation, config)
    assert render(mine, o200k, next_role=None, drop_analysis=drop) == want
    want = encoding.render_conversation_for_training(conversation, config)
    assert render_for_training(mine, o200k, drop_analysis=drop) == want


@needs_vocabulary
@given(any_messages, st.booleans())
def test_a_random_message_renders_as_the_package_renders_it(drawn, has_function_tools):
    package, encoding = theirs()
    options = package.RenderOptions(conversation_has_function_tools=has_function_tools)
    want = encoding.render(their_message(package, drawn), options)
    assert render_message(ours(drawn), tokenizer.o200k_harmony(), has_function_tools=has_function_tools) == want


def writes_the_packages_typescript(schema):
    package, encoding = theirs()
    content = package.DeveloperContent.new().with_function_tools([package.ToolDescription.new("f", "", schema)])
    want = encoding.decode_utf8(encoding.render(package.Message.from_role_and_content("developer", content)))
    assert f"type f = (_: {harmony.typescript(schema)}) => any;\n\n}}" in want


QUIRKS = [
    {"oneOf": [{"type": "string", "enum": ["a"], "default": 'a"b'}, {"default": 'a"b'}], "description": "d"},
    {"oneOf": [{"type": "string", "enum": ["a"], "default": "a"}], "default": "a", "enum": ["a"]},
    {"oneOf": [{"description": "d"}, {"description": "e"}], "description": "d"},
    {"oneOf": [{"description": "d"}, {"description": "e"}], "description": "e"},
    {"oneOf": [{"description": "d"}, {"description": "e"}], "description": "f"},
    {"oneOf": [], "description": "d"},
    {"oneOf": "not a list", "description": "d", "default": 1},
    {"oneOf": [{"type": "object", "properties": {"a": {"type": "object"}}}, {"type": ["null"], "nullable": True}]},
    {"type": "array", "items": {"type": "string", "enum": ["x", "y"]}},
    {"type": "string", "enum": ["x", 1], "default": "x", "title": "", "examples": ["x", 1]},
    {"type": ["integer", "null", 3], "nullable": True},
    {"type": [], "nullable": True, "examples": []},
    {"anyOf": [{"type": "string"}], "description": "two\nlines"},
    *({"default": value} for value in (1e-5, -1.5e-5, 1e-4, 1e-6, 1e16, 1e15, -0.0, 1.0, 2**64 - 1, 2**64, -(2**63))),
    *({"default": value} for value in (-(2**63) - 1, None, True, "é\n", {"b": [1, {}], "a": "\x1f\x7f"}, [])),
]


@needs_vocabulary
@pytest.mark.parametrize("schema", QUIRKS)
def test_a_quirk_of_the_packages_typescript_is_ours(schema):
    for whole in (schema, {"type": "object", "properties": {"x": schema, "y": {"oneOf": [schema]}}, "required": ["y"]}):
        writes_the_packages_typescript(whole)


@needs_vocabulary
@given(schemas)
def test_a_random_json_schema_becomes_the_typescript_that_the_package_writes(schema):
    writes_the_packages_typescript(schema)


@needs_vocabulary
@pytest.mark.parametrize(
    "content",
    [
        {"type": "system_content"},
        {
            "type": "system_content",
            "model_identity": "",
            "channel_config": {"valid_channels": ["final"], "channel_required": True},
        },
        {"type": "developer_content"},
        {"type": "developer_content", "instructions": ""},
        {"type": "developer_content", "tools": {"functions": {"name": "functions", "tools": []}}},
        {"type": "developer_content", "tools": {"aux": {"name": "aux", "tools": [{"name": "f", "description": ""}]}}},
    ],
)
def test_a_content_with_little_in_it_renders_as_the_packages(content):
    package, encoding = theirs()
    channels = {"valid_channels": ["final"], "channel_required": False}
    system = {"role": "system", "content": [{"type": "system_content", "channel_config": channels}]}
    drawn = [system, {"role": content["type"].removesuffix("_content"), "content": [content]}]
    conversation = package.Conversation.from_messages([their_message(package, m) for m in drawn])
    want = encoding.decode_utf8(encoding.render_conversation(conversation))
    assert render_text([ours(m) for m in drawn], next_role=None) == want


@needs_vocabulary
def test_the_builtin_tools_are_the_packages():
    package, encoding = theirs()
    content = package.SystemContent.new().with_browser_tool().with_python_tool()
    want = encoding.render(package.Message.from_role_and_content("system", content))
    mine = Message("system", SystemContent(tools=[harmony.python(), harmony.browser()]))
    assert render_message(mine, tokenizer.o200k_harmony()) == want


@needs_vocabulary
def test_the_stop_tokens_are_the_packages():
    _, encoding = theirs()
    assert set(harmony.stop_tokens(tokenizer.o200k_harmony())) == set(encoding.stop_tokens_for_assistant_actions())


# --- which analysis is dropped ---

think = [Message("assistant", f"thought {i}", channel="analysis") for i in range(4)]
say = [Message("assistant", f"answer {i}", channel="final") for i in range(4)]
ask = [Message("user", f"question {i}") for i in range(4)]
call = Message("assistant", "{}", recipient="functions.f", channel="commentary")
result = Message("tool", "42", name="functions.f", recipient="assistant", channel="commentary")


def thoughts(messages, drop_analysis, *, training=False):
    """Which of the thoughts 0, 1, 2, 3 the model gets to see."""
    encoding = tokenizer.tiny()
    if training:
        tokens = render_for_training(messages, encoding, drop_analysis=drop_analysis)
    else:
        tokens = render(messages, encoding, drop_analysis=drop_analysis)
    return [int(i) for i in re.findall(r"thought (\d)", encoding.decode(tokens))]


def test_between_turns_openai_drops_the_first_turns_analysis_and_all_drops_every_turns():
    talk = [ask[0], think[0], say[0], ask[1], think[1], say[1], ask[2]]
    assert thoughts(talk, "none") == [0, 1]
    assert thoughts(talk, "openai") == [1]
    assert thoughts(talk, "all") == []


def test_during_a_tool_call_openai_keeps_all_analysis_and_all_keeps_that_of_the_open_turn():
    talk = [ask[0], think[0], say[0], ask[1], think[1], call, result]
    assert thoughts(talk, "openai") == [0, 1]
    assert thoughts(talk, "all") == [1]
    assert thoughts([ask[0], think[0], call, result], "all") == [0]


def test_once_the_answer_is_final_the_analysis_around_its_tool_calls_is_dropped():
    talk = [ask[0], think[0], call, result, think[1], say[0], ask[1]]
    assert thoughts(talk, "openai") == thoughts(talk, "all") == []


def test_training_with_all_keeps_the_analysis_of_the_turn_to_be_learnt_and_openai_drops_it():
    assert thoughts([ask[0], think[0], say[0]], "all", training=True) == [0]
    assert thoughts([ask[0], think[0], say[0]], "openai", training=True) == []
    two_turns = [ask[0], think[0], say[0], ask[1], think[1], call, result, think[2], say[1]]
    assert thoughts(two_turns, "all", training=True) == [1, 2]
    assert thoughts(two_turns, "openai", training=True) == [1, 2]
    assert thoughts(two_turns, "none", training=True) == [0, 1, 2]
    assert thoughts([*two_turns, ask[2]], "all", training=True) == []


def test_only_analysis_is_ever_dropped():
    talk = [ask[0], think[0], call, result, say[0], ask[1]]
    kept = parse(render(talk, tokenizer.tiny(), next_role=None, drop_analysis="all"), tokenizer.tiny())
    assert kept == [message for message in talk if message.channel != "analysis"]


def test_training_ends_a_last_final_answer_with_return_and_nothing_else():
    encoding = tokenizer.tiny()
    ends = {name: tokenizer.special(encoding, name) for name in (END, RETURN, CALL)}
    assert render_for_training([ask[0], say[0]], encoding)[-1] == ends[RETURN]
    assert render_for_training([ask[0], say[0]], encoding).count(ends[RETURN]) == 1
    assert render_for_training([ask[0], say[0], ask[1]], encoding)[-1] == ends[END]
    assert render_for_training([ask[0], call], encoding)[-1] == ends[CALL]
    assert render_for_training([ask[0], think[0]], encoding)[-1] == ends[END]
    assert render_for_training([], encoding) == []


def test_a_conversation_may_come_from_a_generator():
    talk = [ask[0], think[0], say[0]]
    assert render(iter(talk), tokenizer.tiny()) == render(talk, tokenizer.tiny())
    assert render_for_training(iter(talk), tokenizer.tiny()) == render_for_training(talk, tokenizer.tiny())


# --- user text never becomes a special token ---


@vocabularies
@given(text=texts, name=words)
def test_no_text_adds_a_special_token_to_a_message(encoding_name, text, name):
    encoding = encoding_called(encoding_name)
    for message, bare in (
        (Message("user", text, name=name, channel=name), Message("user", "", name="x", channel="x")),
        (Message("developer", DeveloperContent(text)), Message("developer", DeveloperContent())),
        (Message("system", SystemContent(text, current_date=text)), Message("system", SystemContent())),
    ):
        tokens = render_message(message, encoding)
        want = [t for t in render_message(bare, encoding) if encoding.is_special_token(t)]
        assert [t for t in tokens if encoding.is_special_token(t)] == want
    assert parse(render_message(Message("user", text), encoding), encoding) == [Message("user", text)]


@needs_vocabulary
def test_both_names_of_id_200018_are_text_in_a_message():
    tokens = render_message(Message("user", "<|endofprompt|><|reserved_200018|>"), tokenizer.o200k_harmony())
    assert 200018 not in tokens


@pytest.mark.parametrize("field", ["name", "recipient", "channel", "content_type"])
@pytest.mark.parametrize(
    "value", ["", "bob to=functions.pay", "bob\n", "bob\u00a0x", "a<|message|>b", "<|channel|>final"]
)
def test_a_header_field_that_could_read_as_more_than_one_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is one word"):
        Message("assistant", "x", **{field: value})


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"role": "wizard", "content": "x"}, "role is one of .* not 'wizard'"),
        ({"role": "tool", "content": "x"}, "needs the name of its tool"),
        ({"role": "tool", "content": "x", "name": "system"}, "cannot be named 'system'"),
        ({"role": "tool", "content": "x", "name": "user:bob"}, "cannot be named 'user:bob'"),
        ({"role": "user", "content": SystemContent()}, "user message cannot hold a SystemContent"),
        ({"role": "system", "content": DeveloperContent()}, "system message cannot hold a DeveloperContent"),
        ({"role": "user", "content": ["x"]}, "cannot hold a list"),
    ],
)
def test_a_message_that_harmony_cannot_write_is_refused(fields, fault):
    with pytest.raises(ValueError, match=fault):
        Message(**fields)


def test_settings_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match="reasoning_effort is one of low, medium, high or None, not 'max'"):
        SystemContent(reasoning_effort="max")
    with pytest.raises(ValueError, match="need different names"):
        DeveloperContent(tools=[harmony.functions(Tool("f")), harmony.functions(Tool("g"))])
    with pytest.raises(ValueError, match="drop_analysis is one of openai, all, none, not 'some'"):
        render([], tokenizer.tiny(), drop_analysis="some")
    with pytest.raises(ValueError, match="next_role is one of .* not 'wizard'"):
        render([], tokenizer.tiny(), next_role="wizard")
    with pytest.raises(ValueError, match="role is one of .* not 'tool'"):
        Parser(tokenizer.tiny(), role="tool")
    with pytest.raises(ValueError, match="not JSON compliant"):
        harmony.typescript({"type": "object", "properties": {"x": {"default": float("nan")}}})


# --- messages from dictionaries ---


def test_dictionaries_become_messages():
    got = messages_from(
        [
            {"role": "system", "content": {"reasoning_effort": "high", "tools": ["browser"]}},
            {
                "role": "developer",
                "content": {"instructions": "Be brief.", "tools": [{"name": "f", "parameters": {}}]},
            },
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "{}", "recipient": "functions.f", "channel": "commentary"},
        ]
    )
    assert got == [
        Message("system", SystemContent(reasoning_effort="high", tools=(harmony.browser(),))),
        Message("developer", DeveloperContent("Be brief.", (harmony.functions(Tool("f", parameters={})),))),
        Message("user", "Hello"),
        Message("assistant", "{}", recipient="functions.f", channel="commentary"),
    ]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "user"}, "message 1 has no 'content'"),
        ({"content": "x"}, "message 1 has no 'role'"),
        ({"role": "user", "content": "x", "to": "y"}, "message 1: .*unexpected keyword argument 'to'"),
        ({"role": "wizard", "content": "x"}, "message 1: role is one of"),
        (
            {"role": "user", "content": {"instructions": "x"}},
            "message 1: the content of a user message is a string",
        ),
        (
            {"role": "system", "content": {"effort": "low"}},
            "message 1: .*unexpected keyword argument 'effort'",
        ),
        (
            {"role": "system", "content": {"tools": [{"name": "f"}]}},
            "message 1: a system message's tools are",
        ),
        ({"role": "developer", "content": {"tools": [{}]}}, "message 1: .*missing 1 required.*'name'"),
    ],
)
def test_a_dictionary_that_is_no_message_is_refused_by_its_index(message, fault):
    with pytest.raises(ValueError, match=fault):
        messages_from([{"role": "user", "content": "fine"}, message])


# --- parsing equals the package's ---


def their_parse(tokens, role=None):
    """The package's messages as ours, or its error. A constraint it took for a recipient is put right."""
    package, encoding = theirs()
    try:
        parsed = encoding.parse_messages_from_completion_tokens(tokens, None if role is None else package.Role(role))
    except package.HarmonyError as error:
        return error
    return [ours(with_its_constraint(message.to_dict())) for message in parsed]


def with_its_constraint(message):
    """The released 0.0.8 reads `<|channel|>final <|constrain|>json` as a message to `<|constrain|>json`."""
    if "content_type" not in message and message.get("recipient", "").startswith(CONSTRAIN):
        message["content_type"] = message.pop("recipient")
    return message


def without_name(message):
    return message if message["role"] == "tool" else message | {"name": None}


@needs_vocabulary
@given(st.lists(plain_messages.map(without_name), max_size=5))
def test_a_random_conversation_is_parsed_as_the_package_parses_it(drawn):
    encoding = tokenizer.o200k_harmony()
    tokens = render([ours(m) for m in drawn], encoding, next_role=None, drop_analysis="none")
    want = their_parse(tokens)
    if isinstance(want, Exception):  # a tool with nothing after its name is no role that the parser knows
        with pytest.raises(HarmonyError):
            parse(tokens, encoding)
    else:
        assert parse(tokens, encoding) == want


@needs_vocabulary
@given(st.lists(plain_messages.map(without_name), min_size=1, max_size=3), st.data())
def test_every_step_of_a_stream_shows_what_the_packages_stream_shows(drawn, data):
    package, their_encoding = theirs()
    encoding = tokenizer.o200k_harmony()
    mine, other = Parser(encoding), package.StreamableParser(their_encoding, None)
    for token in render([ours(m) for m in drawn], encoding, next_role=None, drop_analysis="none"):
        try:
            other.process(token)
        except package.HarmonyError:
            with pytest.raises(HarmonyError):
                mine.feed(token)
            return
        assert mine.feed(token) == mine.delta == (other.last_content_delta or "")
        assert mine.role == (None if other.current_role is None else other.current_role.value)
        assert mine.channel == other.current_channel
        header = {"recipient": other.current_recipient or "", "content_type": other.current_content_type}
        header = with_its_constraint({key: value for key, value in header.items() if value is not None})
        assert mine.recipient == (header.get("recipient") or None)
        assert mine.content_type == header.get("content_type")
        assert mine.content == other.current_content
        assert mine.messages == [ours(with_its_constraint(m.to_dict())) for m in other.messages]
    assert mine.position == len(other.tokens)


@needs_vocabulary
@given(st.lists(st.integers(0, 199_997) | st.integers(128, 255), max_size=30), st.booleans())
def test_content_that_is_not_utf8_reads_as_the_package_reads_it(content, closed):
    tokens = [200008, *content] + [200007] * closed
    assert parse(tokens, tokenizer.o200k_harmony(), "user") == their_parse(tokens, "user")


HEADERS = [
    " to=functions.f<|channel|>commentary <|constrain|>json",
    "<|channel|>commentary to=functions.f <|constrain|>json",
    "<|channel|>commentary to=functions.f<|constrain|>json",
    "<|channel|>commentary<|constrain|>json",
    " to=python code<|channel|>analysis",
    " to=python<|channel|>analysis code",
    "<|channel|>analysis code",
    "<|channel|>final",
    "assistant<|channel|>final",
    "  to=a  ",
    "",
    "<|constrain|>json",
    "<|constrain|>",
    "<|channel|>",
    " to=a to=b",
    " a b c",
    "<|channel|>analysis to=a b c",
    "<|constrain|>json to=a",
]


@needs_vocabulary
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("role", [None, "assistant"])
def test_a_header_in_any_order_reads_as_the_package_reads_it(header, role):
    stream = f"{header}<|message|>x<|end|>" if role else f"<|start|>assistant{header}<|message|>x<|end|>"
    tokens = tokenizer.o200k_harmony().encode(stream, allowed_special="all")
    want = their_parse(tokens, role)
    if isinstance(want, Exception):
        with pytest.raises(HarmonyError):
            parse(tokens, tokenizer.o200k_harmony(), role)
    else:
        assert parse(tokens, tokenizer.o200k_harmony(), role) == want


# --- where we differ from the package, on purpose ---


@needs_vocabulary
def test_difference_the_package_takes_id_201088_which_is_beyond_the_embedding():
    tokens = [200008, 201088, 200007]
    assert their_parse(tokens, "user") == [Message("user", "<|reserved_201088|>")]
    with pytest.raises(HarmonyError, match="token 1: 201088 is not an id of 'o200k_harmony'"):
        parse(tokens, tokenizer.o200k_harmony(), "user")


@needs_vocabulary
def test_difference_the_package_does_not_know_the_name_endofprompt():
    _, encoding = theirs()
    assert len(encoding.encode("<|endofprompt|>", allowed_special="all")) == 7
    assert tokenizer.o200k_harmony().encode("<|endofprompt|>", allowed_special="all") == [200018]


@needs_vocabulary
def test_difference_the_package_cannot_read_the_named_users_that_it_writes():
    encoding = tokenizer.o200k_harmony()
    bob, bob_calls = Message("user", "hi", name="bob"), Message("user", "hi", name="bob", recipient="x")
    tokens = render_message(bob, encoding)
    assert "Unknown role: user:bob" in str(their_parse(tokens))
    assert parse(tokens, encoding) == [bob]
    tokens = render_message(bob_calls, encoding)
    with pytest.raises(ValueError, match="cannot be named 'user:bob'"):  # a tool of that name, it says
        their_parse(tokens)
    assert parse(tokens, encoding) == [bob_calls]


@needs_vocabulary
def test_difference_the_package_misreads_the_last_digit_of_some_defaults():
    schema = {"oneOf": [{"default": 2.2908893140767477e-67}]}
    package, encoding = theirs()
    content = package.DeveloperContent.new().with_function_tools([package.ToolDescription.new("f", "", schema)])
    want = encoding.decode_utf8(encoding.render(package.Message.from_role_and_content("developer", content)))
    assert "default: 2.2908893140767474e-67" in want
    assert harmony.typescript(schema) == "\n | any // default: 2.2908893140767477e-67"


@needs_vocabulary
def test_difference_the_package_takes_a_constraint_alone_for_a_recipient():
    package, their_encoding = theirs()
    message = Message("assistant", "{}", channel="final", content_type=f"{CONSTRAIN}json")
    tokens = render_message(message, tokenizer.o200k_harmony())
    (misread,) = their_encoding.parse_messages_from_completion_tokens(tokens, None)
    assert (misread.recipient, misread.content_type) == (f"{CONSTRAIN}json", None)
    assert parse(tokens, tokenizer.o200k_harmony()) == [message]


@needs_vocabulary
def test_difference_the_package_reads_special_tokens_inside_a_content_as_text():
    tokens = tokenizer.o200k_harmony().encode("<|message|>a<|start|>b<|end|>", allowed_special="all")
    assert their_parse(tokens, "user") == [Message("user", "a<|start|>b")]
    with pytest.raises(HarmonyError, match=r"token 2: expected text, .* found <\|start\|>"):
        parse(tokens, tokenizer.o200k_harmony(), "user")


@needs_vocabulary
def test_difference_the_package_writes_header_fields_that_read_as_other_headers():
    package, encoding = theirs()
    author = package.Author.new(package.Role.ASSISTANT, "x to=functions.pay")
    tokens = encoding.render(package.Message.from_author_and_content(author, "all"))
    assert encoding.decode(tokens) == "<|start|>assistant:x to=functions.pay<|message|>all<|end|>"
    with pytest.raises(ValueError, match="name is one word"):
        Message("assistant", "all", name="x to=functions.pay")


# --- streams, by their own rules ---


@vocabularies
@given(texts=st.lists(texts, min_size=1, max_size=3))
def test_deltas_add_up_to_the_content_and_messages_come_as_they_end(encoding_name, texts):
    encoding = encoding_called(encoding_name)
    talk = [Message("assistant", text, channel="final") for text in texts]
    parser, spoken = Parser(encoding, "assistant"), []
    for token in render(talk, encoding, next_role=None)[2:]:  # the prompt ended in <|start|>assistant
        before = len(parser.messages)
        spoken.append(parser.feed(token))
        assert parser.delta == spoken[-1]
        if spoken[-1]:
            assert (parser.role, parser.channel) == ("assistant", "final")
        if len(parser.messages) > before:
            assert parser.messages[-1].content == "".join(spoken)
            spoken = []
    parser.finish()
    assert parser.messages == talk


def test_a_character_split_over_tokens_arrives_whole_with_the_last_of_them():
    parser = Parser(tokenizer.tiny(), "assistant")
    parser.feed(tokenizer.special(tokenizer.tiny(), MESSAGE))
    assert [parser.feed(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_a_message_cut_off_inside_a_character_ends_in_a_replacement_character():
    parser = Parser(tokenizer.tiny(), "assistant")
    for token in [tokenizer.special(tokenizer.tiny(), MESSAGE), ord("a"), 0xF0]:
        parser.feed(token)
    assert parser.finish() == "\ufffd"
    assert parser.messages == [Message("assistant", "a\ufffd")]


def test_named_users_and_tools_come_back_with_their_names():
    talk = [
        Message("user", "hi", name="bob"),
        Message("assistant", "x", name="a:b", channel="final"),
        result,
        call,
    ]
    encoding = tokenizer.tiny()
    assert parse(render(talk, encoding, next_role=None), encoding) == talk


def test_the_role_that_is_given_is_that_of_the_first_message_only():
    encoding = tokenizer.tiny()
    talk = [Message("assistant", "Hello", channel="final"), Message("user", "What"), result]
    parser = Parser(encoding, "assistant")
    assert parser.role == "assistant"
    for token in render(talk, encoding, next_role=None)[2:]:
        parser.feed(token)
    assert parser.role is None
    assert parser.messages == talk


def test_tokens_may_be_any_kind_of_integer_and_nothing_else():
    np = pytest.importorskip("numpy")
    talk = [Message("user", "Roses are red")]
    encoding = tokenizer.tiny()
    assert parse(np.array(render(talk, encoding, next_role=None)), encoding) == talk
    with pytest.raises(TypeError):
        parse([1.0], encoding)


MALFORMED = [
    # stream, who speaks first, the token that shows the fault, what the error says
    ("red", None, 0, r"expected <\|start\|>, found '(red|r)'"),
    ("<|end|>", None, 0, r"expected <\|start\|>, found '<\|end\|>'"),
    ("<|start|>user<|message|>I<|end|>you", None, 5, r"expected <\|start\|>, found '(you|y)'"),
    ("<|start|>user<|message|>I<|start|>", None, 4, r"expected text, <\|end\|>.*found <\|start\|>"),
    ("<|start|>user<|message|>I<|channel|>", None, 4, r"expected text"),
    ("<|start|>user<|end|>", None, 2, r"expected the rest of a header and <\|message\|>, found <\|end\|>"),
    ("<|start|>user<|start|>", None, 2, "expected the rest of a header"),
    ("<|channel|>final<|channel|>", "assistant", 2, r"found <\|channel\|>"),
    ("<|constrain|>json<|constrain|>", "assistant", 2, r"found <\|constrain\|>"),
    ("<|channel|>final<|return|>", "assistant", 2, r"found <\|return\|>"),
    ("<|start|>user", None, 2, "found the end of the stream"),
    ("<|start|>", None, 1, "found the end of the stream"),
    ("", "assistant", 0, "found the end of the stream"),
    ("<|start|>wizard<|message|>", None, 1, "found 'wizard'"),
    ("<|start|><|message|>", None, 1, "expected a role"),
    ("<|start|>to=functions.f<|message|>", None, 1, "expected a role, found 'to=functions.f'"),
    ("<|start|>assistant<|channel|><|message|>", None, 2, "expected a channel's name"),
    ("<|start|>assistant<|channel|> final<|message|>", None, 2, "expected a channel's name"),
    ("<|start|>user:<|message|>", None, 1, "found 'user:'"),
    ("<|start|>user to=<|message|>", None, 1, "recipient is one word"),
    ("<|start|>user one two three<|message|>", None, 1, "at most a recipient and a content type"),
    ("<|channel|>final to=a<b<|message|>", "assistant", 0, "recipient is one word"),
]


@vocabularies
@pytest.mark.parametrize(("stream", "role", "position", "fault"), MALFORMED)
def test_a_malformed_stream_is_refused_at_the_token_that_shows_it(encoding_name, stream, role, position, fault):
    encoding = encoding_called(encoding_name)
    tokens = encoding.encode(stream, allowed_special="all")
    with pytest.raises(HarmonyError, match=fault) as caught:
        parse(tokens, encoding, role)
    assert str(caught.value).startswith(f"token {caught.value.position}: ")
    assert caught.value.position == position


@pytest.mark.parametrize("token", [-1, 512, 201_088, 2**70])
def test_an_id_outside_the_vocabulary_is_refused(token):
    for before in ([], [tokenizer.special(tokenizer.tiny(), MESSAGE)]):
        with pytest.raises(HarmonyError, match=f"token {len(before)}: {token} is not an id of 'tiny'"):
            parse([*before, token], tokenizer.tiny(), "assistant")


def test_a_refused_token_changes_nothing_and_the_stream_may_go_on():
    encoding = tokenizer.tiny()
    parser = Parser(encoding)
    talk = [Message("assistant", "Roses are red", channel="final"), Message("user", "violets")]
    for token in render(talk, encoding, next_role=None):
        for wrong in (-1, tokenizer.special(encoding, "<|endoftext|>")):
            before = (parser.position, parser.role, parser.channel, parser.content, list(parser.messages))
            with pytest.raises(HarmonyError):
                parser.feed(wrong)
            assert (parser.position, parser.role, parser.channel, parser.content, parser.messages) == before
        parser.feed(token)
    assert parser.messages == talk


@needs_vocabulary
@given(st.lists(plain_messages.map(without_name), min_size=1, max_size=3), st.data())
def test_a_damaged_stream_gives_the_packages_messages_or_an_error_with_a_position(drawn, data):
    encoding = tokenizer.o200k_harmony()
    tokens = render([ours(m) for m in drawn], encoding, next_role=None, drop_analysis="none")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(tokens)))
        insert = data.draw(
            st.lists(st.sampled_from([200002, 200003, 200005, 200006, 200007, 200008, 200012, 220, 1428]))
        )
        tokens = tokens[:at] + insert + tokens[at + data.draw(st.integers(0, 2)) :]
    try:
        got = parse(tokens, encoding)
    except HarmonyError as error:
        assert 0 <= error.position <= len(tokens)
    else:
        assert got == their_parse(tokens)
