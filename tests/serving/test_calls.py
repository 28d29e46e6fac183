import pytest
from mlx_vlm.tools.parsers import mistral, pythonic, qwen3_coder

from mpi_mlx.models.tools import call_parser
from mpi_mlx.serving.calls import CallFormat

HERMES = 'See.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CODER = "See.\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}]  # fmt: skip


@pytest.mark.parametrize(
    ("parser", "answer"),
    [
        (None, HERMES),
        (None, HERMES.removesuffix("\n</tool_call>")),  # ended by the turn
        (qwen3_coder, CODER),
        (mistral, 'See.\n[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'),
        (mistral, 'See.\n[TOOL_CALLS]f[ARGS]{"a": 1}'),
        (pythonic, "See.\n<|tool_call_start|>[f(a=1)]<|tool_call_end|>"),
    ],
)
def test_calls_in_the_forms_of_families(parser, answer):
    calls = CallFormat(parser)
    assert calls.parse(answer, TOOLS) == [{"name": "f", "arguments": {"a": 1}}]
    assert calls.text(answer) == "See."
    shown = ""
    for end in range(len(answer)):  # what is shown while it is written only ever grows
        text = calls.text(answer[:end], over=False)
        assert text.startswith(shown) and "See.".startswith(text.rstrip())
        shown = text.rstrip()


def test_what_is_no_call():
    calls = CallFormat()
    assert calls.parse("yes <b>") == [] and calls.text("yes <b>") == "yes <b>"
    assert calls.text("see <tool_c", over=False) == "see" and calls.text("see <tool_c") == "see <tool_c"
    for parser, answer in ((None, "<tool_call>{nonsense"), (qwen3_coder, "<tool_call>nonsense</tool_call>")):
        assert CallFormat(parser).parse(answer) == [{"name": None, "arguments": {}}]


def test_bare_json_is_held_back_where_it_may_be_a_call():
    call = '{"name": "f", "arguments": {}}'
    calls = CallFormat()
    assert calls.text(call[:9], over=False, bare=True) == "" == calls.text(call, bare=True)
    assert calls.text('{"a": 1}', bare=True) == '{"a": 1}' and calls.text(call) == call


def test_the_template_tells_the_form():
    with_tools = "{% if tools %}{{ tools }}{% endif %}{{ message.tool_calls }}"
    assert call_parser("{{ messages }}") is None  # tools are described in the Hermes form
    assert call_parser(with_tools + "<tool_call>{{ tool_call.name }}") is None
    assert call_parser(with_tools + "[TOOL_CALLS]") is mistral
    assert call_parser(with_tools + "<tool_call>\n<function={{ f }}>") is qwen3_coder


@pytest.mark.parametrize(
    ("answer", "called"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', True),
        ('{"name": "f", "parameters": {"a": 1}}', True),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', True),
        ('[{"name": "f", "arguments": {"a": 1}}]', True),
        ('{"name": "Alice", "age": 5}', False),
        ('{"name": "f"}', False),  # no arguments
        ('{"name": "g", "arguments": {"a": 1}}', False),  # not offered
        ('{"name": ["f"], "arguments": {"a": 1}}', False),
        ('[{"name": "f", "arguments": {"a": 1}}, {"name": "Alice"}]', False),
        ('[{"name": "f", "arguments": {"a": 1}}, 5]', False),
    ],
)
def test_untagged_json_is_a_call_of_an_offered_tool_or_an_answer(answer, called):
    calls = CallFormat()
    assert calls.parse(answer, TOOLS) == called * [{"name": "f", "arguments": {"a": 1}}]
    assert calls.text(answer, bare=True, tools=TOOLS) == ("" if called else answer)
    assert calls.parse(answer, [{}]) == [] and calls.text(answer, bare=True, tools=[{}]) == answer
    assert calls.parse(f"<tool_call>{answer}</tool_call>", TOOLS)  # what is tagged is always taken for a call
