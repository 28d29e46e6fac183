"""What of a text becomes reasoning, content and calls: in pieces, as a whole, and cut."""

import json

import pytest

pytest.importorskip("openai")
from http_server import Says  # noqa: E402

from mpi_mlx.serving.answers import Answer  # noqa: E402
from mpi_mlx.serving.calls import CallFormat  # noqa: E402
from mpi_mlx.serving.protocol import ChatRequest, CompletionRequest, parse  # noqa: E402


def answer(kind=ChatRequest, opened=False, **options):
    prompt = {"messages": [{"role": "user", "content": "x"}]} if kind is ChatRequest else {"prompt": "x"}
    asked = parse(json.dumps({"model": "tiny"} | prompt | options).encode(), kind)
    made = Answer(asked, chat=kind is ChatRequest, calls=CallFormat() if options.get("tools") else None)
    made.begin(("begin", 1, 0, opened))
    return made


def streamed(made, text, reason="stop"):
    """What a client puts together of one character an event: (reasoning, content, the last chunk's reason)."""
    events = [("text", letter) for letter in text] + [("end", reason)]
    chunks = [chunk for event in events for chunk in made.take([event])] + made.last(len(text))
    deltas = [chunk["choices"][0].get("delta", {}) for chunk in chunks]
    parts = ["".join(delta.get(name, "") for delta in deltas) for name in ("reasoning_content", "content")]
    return (*parts, chunks[-1]["choices"][0]["finish_reason"])


def whole(made, text, reason="stop"):
    made.take([("text", text), ("end", reason)])
    choice = made.whole(len(text))["choices"][0]
    message = choice["message"]
    return message["reasoning_content"] or "", message["content"], choice["finish_reason"]


@pytest.mark.parametrize(
    ("opened", "text", "reason", "expected"),
    [
        (True, "red cube, so rule 2</think>\nstop", "stop", ("red cube, so rule 2", "stop")),
        (True, "\nred cube</think>\n\nstop", "stop", ("red cube", "stop")),
        (True, "red cube, so", "length", ("red cube, so", "")),  # cut within the trace
        (True, "red</thin", "length", ("red</thin", "")),
        (True, "</think>\nstop", "stop", ("", "stop")),
        (True, "<think>red</think>stop", "stop", ("red", "stop")),  # opened twice
        (False, "<think>red</think>\nstop", "stop", ("red", "stop")),
        (False, "<think>red", "length", ("red", "")),
        (False, "stop", "stop", ("", "stop")),
        (False, "<", "stop", ("", "<")),  # no tag came of it
        (False, "<thin", "length", ("", "<thin")),
    ],
)
def test_traces_are_told_from_answers(opened, text, reason, expected):
    assert streamed(answer(opened=opened), text, reason) == (*expected, reason)
    assert whole(answer(opened=opened), text, reason) == (*expected, reason)


def test_a_call_that_was_cut_after_another_is_told():
    one = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for text, reason, told in ((one, "stop", "tool_calls"), (one + '<tool_call>{"na', "length", "length")):
        made = answer(tools=[{}])
        assert streamed(made, text, reason)[2] == told and len(made._called()) == 1
        assert whole(answer(tools=[{}]), text, reason) == ("", None, told)


def test_an_answer_in_json_is_no_call():
    tool = {"type": "function", "function": {"name": "refund", "parameters": {"type": "object", "properties": {}}}}
    text = '{"name": "Alice", "age": 5}'
    assert streamed(answer(tools=[tool]), text) == ("", text, "stop") == whole(answer(tools=[tool]), text)
    call = '{"name": "refund", "arguments": {}}'
    assert streamed(answer(tools=[tool]), call) == ("", "", "tool_calls")
    assert whole(answer(tools=[tool]), call) == ("", None, "tool_calls")


def test_a_plain_completion_has_no_trace():
    made = answer(CompletionRequest, opened=True)  # its prompt may end with the tag
    made.take([("text", "red</think>stop"), ("end", "stop")])
    assert made.whole(3)["choices"][0]["text"] == "red</think>stop"


def test_a_template_that_opens_the_trace(server, monkeypatch):
    model = server.engine.model
    turn = "<|im_start|>assistant\n{% endif %}"
    assert model._chat.template.endswith(turn)
    opening = model._chat.template.replace(turn, "<|im_start|>assistant\n<think>\n{% endif %}")
    monkeypatch.setattr(model._chat, "template", opening)
    asked = dict(model="tiny", messages=[{"role": "user", "content": "yes"}])
    for most, expected in ((None, ("red cube, so rule 2", "stop", "stop")), (4, (None, "", "length"))):
        for stream in (False, True):
            monkeypatch.setattr(server.engine, "_draw", Says(model, "red cube, so rule 2</think>\nstop"))
            made = server.client().chat.completions.create(**asked, max_tokens=most, stream=stream)
            if stream:
                chunks = [chunk.choices[0] for chunk in made]
                deltas = [chunk.delta.model_dump() for chunk in chunks]
                trace, text = ("".join(d.get(name) or "" for d in deltas) for name in ("reasoning_content", "content"))
                reason = chunks[-1].finish_reason
            else:
                (choice,) = made.choices
                trace, text, reason = choice.message.reasoning_content, choice.message.content, choice.finish_reason
            assert (text, reason) == expected[1:]
            assert trace and "red cube, so rule 2".startswith(trace) and trace == (expected[0] or trace)
            assert server.idle()
