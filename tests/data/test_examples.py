import json

import pytest
from PIL import Image

from mpi_mlx.data import Example, load_examples, write_examples
from mpi_mlx.errors import DataError


def save(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def user(text="Hi"):
    return {"role": "user", "content": text}


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3, 3), "red").save(tmp_path / "pictures" / "1.png")
    return tmp_path / "pictures" / "1.png"


def test_reads_the_fixed_shape(tmp_path, picture):
    content = [{"type": "image", "image": "pictures/1.png"}, {"type": "text", "text": "What now?"}]
    row = {
        "id": "a",
        "messages": [{"role": "user", "content": content}],
        "reasoning": "red",
        "answer": "stop",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "meta": {"leaf": 3},
    }
    [example] = load_examples(save(tmp_path / "train.jsonl", row, ""))
    assert example.images == (str(picture.resolve()),)
    assert (example.id, example.query, example.reasoning, example.answer) == ("a", "What now?", "red", "stop")
    assert example.tools[0]["function"]["name"] == "f" and example.meta == {"leaf": 3}


def test_images_by_other_people_s_shapes(tmp_path, picture):
    rows = [
        {"messages": [user([{"type": "image"}])], "images": ["pictures/1.png"]},
        {"messages": [user([{"type": "image_url", "image_url": {"url": "pictures/1.png"}}])]},
        {"messages": [user([{"type": "image", "path": str(picture)}])]},
    ]
    examples = load_examples(save(tmp_path / "train.jsonl", *rows))
    assert [e.images for e in examples] == [(str(picture.resolve()),)] * 3
    assert [e.id for e in examples] == ["train-1", "train-2", "train-3"]


def test_a_final_assistant_turn_is_split_and_own_keys_win(tmp_path):
    said = {"role": "assistant", "content": "<think>red</think>\nstop"}
    earlier = {"role": "assistant", "content": "Hello"}
    rows = [
        {"messages": [user(), said]},
        {"messages": [user(), said], "answer": "go"},
        {"messages": [user(), earlier, user("And now?"), {"role": "assistant", "content": "plain"}]},
    ]
    one, two, three = load_examples(save(tmp_path / "a.jsonl", *rows))
    assert (one.reasoning, one.answer, len(one.messages)) == ("red", "stop", 1)
    assert (two.reasoning, two.answer) == ("red", "go")
    assert (three.reasoning, three.answer) == (None, "plain")
    assert [m["role"] for m in three.messages] == ["user", "assistant", "user"]


def test_a_final_tool_call_becomes_text(tmp_path):
    call = {"type": "function", "function": {"name": "refund", "arguments": '{"days": 3}'}}
    rows = [{"messages": [user(), {"role": "assistant", "content": None, "tool_calls": [call]}]}]
    [example] = load_examples(save(tmp_path / "a.jsonl", *rows))
    assert example.answer == '<tool_call>\n{"name": "refund", "arguments": {"days": 3}}\n</tool_call>'


def calling(*calls):
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def test_arguments_of_earlier_calls_are_objects_however_they_are_written(tmp_path):
    """OpenAI's API gives them as JSON text, which a template's ``tojson`` would write as JSON within JSON."""
    function = {"name": "refund", "arguments": '{"days": 3}'}
    whole = {"id": "call_1", "type": "function", "function": function}
    given = [[whole], [function], [{"function": {"name": "refund", "arguments": {"days": 3}}}]]
    tail = [{"role": "tool", "content": "done"}]
    rows = [{"messages": [user(), calling(*calls), *tail]} for calls in given]
    rows += [{"messages": [user(), calling({"name": "now", "arguments": a}), *tail]} for a in ("", None, {}, "{}")]
    read = [e.messages[1]["tool_calls"] for e in load_examples(save(tmp_path / "a.jsonl", *rows))]
    parsed = {"name": "refund", "arguments": {"days": 3}}
    assert read[0] == [whole | {"function": parsed}]
    assert read[1] == [{"type": "function", "function": parsed}] and read[2] == [{"function": parsed}]
    assert read[3:] == [[{"type": "function", "function": {"name": "now", "arguments": {}}}]] * 4


def test_arguments_in_json_text_are_rendered_once(tmp_path):
    from mpi_mlx.models import load_model

    each = "{% for m in messages %}{% for c in m.tool_calls %}"
    template = each + "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    calls = [{"function": {"name": "f", "arguments": a}} for a in ('{"a": 1}', {"a": 1})]
    rows = [{"messages": [user(), calling(call), {"role": "tool", "content": "1"}]} for call in calls]
    render = load_model("embedded:tiny", init="random").tokenizer.apply_chat_template
    for example in load_examples(save(tmp_path / "a.jsonl", *rows)):
        assert render(list(example.messages), chat_template=template, tokenize=False) == '{"a": 1}'


CALLS = r"a\.jsonl:2: messages\[1\]\.tool_calls: expected objects with name and JSON arguments"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"function": {"name": "f", "arguments": '{"a": '}},
         r"; tool_calls\[0\]\.function\.arguments \(of 'f'\) is not JSON \(Expecting value at column 7\)$"),
        ({"function": {"name": "f", "arguments": "[1]"}}, r"\.arguments \(of 'f'\) is no JSON object$"),
        ({"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}, r"\.arguments \(of 'f'\) holds \\ud800, half"),
        ({"function": {"name": "f", "arguments": "[" * 100_000}}, r"\(of 'f'\) is not JSON \(.*thousands of brackets"),
        ({"name": "f", "arguments": 3}, r"; tool_calls\[0\]\.arguments \(of 'f'\) is no JSON object$"),
        ({"function": {"arguments": {}}}, r"; tool_calls\[0\]\.function has no name$"),
        ({"function": {"name": ""}}, r"; tool_calls\[0\]\.function has no name$"),
        ({"function": "f"}, r"; tool_calls\[0\]\.function is none$"),
        ("f", r"; tool_calls\[0\] is none$"),
    ],
)  # fmt: skip
def test_an_earlier_call_that_cannot_be_read_is_one_clear_line(tmp_path, call, message):
    row = {"messages": [user(), calling(call), {"role": "tool", "content": "1"}]}
    for bad in (row, {"messages": row["messages"][:2]}):  # in the middle, and at the end
        path = save(tmp_path / "a.jsonl", {"messages": [user()]}, bad)
        with pytest.raises(DataError, match=f"{CALLS}.*{message}") as caught:
            load_examples(path)
        assert "\n" not in str(caught.value)
    row["messages"][1]["tool_calls"] = {"name": "f"}
    with pytest.raises(DataError, match=CALLS + " in a list$"):
        load_examples(save(tmp_path / "a.jsonl", {"messages": [user()]}, row))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"messages": [{"role": "user", "content": "a\ud83d b"}]}',
         r"messages\[0\]\.content: holds \\ud83d, half of a character, which is no text; write the whole one$"),
        (r'{"messages": [{"role": "user", "content": [{"type": "text", "text": "\uDC00"}]}]}',
         r"messages\[0\]\.content\[0\]\.text: holds \\udc00"),
        (r'{"messages": [{"role": "user", "content": ""}], "meta": {"a": ["\ud800"]}}', r"meta\.a\[0\]: holds \\ud800"),
        (r'{"messages": [{"role": "user", "content": ""}], "meta": {"\ud800": 1}}', r"meta: holds \\ud800"),
        (r'{"\ud800": 1}', r"a\.jsonl:1: holds \\ud800"),
        ('{"meta": ' + "[" * 100_000, r"not JSON \(.*thousands of brackets\); one object must fill one line"),
        ('{"meta": ' + "1" * 5000 + "}", r"not JSON \(a number of thousands of digits"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_one_clear_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(tmp_path / "a.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:1: ") and "\n" not in str(caught.value)


def test_whole_characters_by_two_escapes_and_backslashes_are_text(tmp_path):
    line = r'{"messages": [{"role": "user", "content": "\ud83d\ude00 \\ud800"}]}'
    [example] = load_examples(save(tmp_path / "a.jsonl", line))
    assert example.query == "\U0001f600 \\ud800"


def test_a_picture_in_base64_is_one_clear_line(tmp_path):
    text = "iVBORw0KGgo" * 500
    with pytest.raises(DataError, match=r"a\.jsonl:1: messages\[0\]\.content\[0\]\.image: .* it is base64") as caught:
        load_examples(save(tmp_path / "a.jsonl", image(text)))
    assert len(str(caught.value)) < 600


def image(path):
    return {"messages": [user([{"type": "image", "image": path}])]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [', r"a\.jsonl:2: not JSON \(.* at column \d+\)"),
        ("[1]", r"a\.jsonl:2: expected a JSON object, found a list"),
        ({"id": "x"}, r"a\.jsonl:2: messages: expected a list of chat turns, found nothing"),
        ({"messages": []}, r"messages: .*found an empty list"),
        ({"messages": [user()], "reasonng": "x"}, r"2: reasonng: unknown field; did you mean 'reasoning'\?"),
        ({"messages": [user()], "colour": "x"}, r"colour: unknown field; keep your own fields under 'meta'"),
        ({"messages": [{"role": "human", "content": ""}]}, r"messages\[0\]\.role: expected one of .*'human'"),
        ({"messages": [user(7)]}, r"messages\[0\]\.content: expected a text or a list of parts, found 7"),
        ({"messages": [user([{"type": "audio"}])]}, r"messages\[0\]\.content\[0\]: .*found type 'audio'"),
        ({"messages": [user()], "answer": ["stop"]}, r"answer: expected a text, found a list"),
        ({"messages": [user()], "id": "first"}, r"id: 'first' was used in line 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, r"messages: must end in a user or tool turn"),
        ({"messages": [user()], "meta": 3}, r"meta: expected a JSON object, found 3"),
        ({"messages": [user()], "tools": {}}, r"tools: expected a list of tool schemas"),
        ({"messages": [user([{"type": "image"}])]}, r"content\[0\]\.image: expected a path"),
        ({"messages": [user()], "images": ["pictures/1.png"]}, r"images: 1 more than the messages have"),
        (image("gone.png"), r":2: messages\[0\]\.content\[0\]\.image: image '.*gone\.png' does not exist"),
        (image("cut.png"), r"image '.*cut\.png' cannot be read"),
        (image("https://example.org/1.png"), r"is not a local file; save it beside a\.jsonl"),
        (
            {"messages": [user(), {"role": "assistant", "content": "", "tool_calls": [{"arguments": "{"}]}]},
            r"messages\[1\]\.tool_calls: expected objects with name and JSON arguments",
        ),
    ],
)
def test_one_bad_line_is_one_clear_line(tmp_path, picture, row, message):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    path = save(tmp_path / "a.jsonl", {"id": "first", "messages": [user()]}, row)
    with pytest.raises(DataError, match=message) as caught:
        load_examples(path)
    assert "\n" not in str(caught.value)


def test_all_errors_of_a_file_come_at_once_ten_shown(tmp_path):
    rows = [{"messages": [user()], "answer": 1}] * 13
    with pytest.raises(DataError) as caught:
        load_examples(save(tmp_path / "a.jsonl", *rows))
    lines = str(caught.value).split("\n")
    assert lines[0].endswith("13 errors") and len(lines) == 12 and lines[-1].strip() == "... and 3 more"
    assert ":10: answer: " in lines[10]


def test_missing_empty_undecodable_and_required(tmp_path):
    with pytest.raises(DataError, match="no such file of examples"):
        load_examples(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="the file is empty"):
        load_examples(save(tmp_path / "a.jsonl", ""))
    with pytest.raises(DataError, match=r"a\.jsonl:1: answer: missing"):
        load_examples(save(tmp_path / "a.jsonl", {"messages": [user()]}), require=("answer",))
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "caf\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        load_examples(tmp_path / "a.jsonl")


def test_thorough_reading_decodes_pixels(tmp_path):
    Image.effect_noise((256, 256), 90).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-4000])
    path = save(tmp_path / "a.jsonl", image("cut.jpg"))
    assert load_examples(path)
    with pytest.raises(DataError, match=r"cut\.jpg' cannot be read .*truncated"):
        load_examples(path, thorough=True)


def test_write_then_read_gives_the_same(tmp_path, picture):
    drawn = Image.new("RGB", (2, 2), "blue")
    content = [{"type": "image", "image": drawn}, {"type": "image", "image": str(picture)}]
    examples = [
        Example("a/1", ({"role": "user", "content": content},), "r", "answer ä"),
        Example("b", ({"role": "user", "content": [{"type": "image", "image": drawn}]},), meta={"leaf": 1}),
        Example("c", (user(),), tools=({"type": "function"},)),
    ]
    assert write_examples(tmp_path / "train.jsonl", examples) == [tmp_path / "images/train/a_1.png"]
    first, second, third = load_examples(tmp_path / "train.jsonl")
    assert first.images == (str((tmp_path / "images/train/a_1.png").resolve()), str(picture.resolve()))
    assert second.images == first.images[:1]
    assert Image.open(first.images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert (first.reasoning, first.answer, second.meta, second.answer) == ("r", "answer ä", {"leaf": 1}, None)
    assert third == examples[2]
    before = (tmp_path / "train.jsonl").read_bytes()
    write_examples(tmp_path / "train.jsonl", examples)
    assert (tmp_path / "train.jsonl").read_bytes() == before
    assert '"image": "pictures/1.png"' in before.decode()
