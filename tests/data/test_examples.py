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
