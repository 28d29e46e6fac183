"""Encoding: the template's text, the trained tokens, and the borders between them."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mpi_mlx.errors import DataError, ModelError


def picture(width=84, height=84, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
    }


def assistant(text):
    return {"role": "assistant", "content": text}


def template_text(model, messages, **options):
    """What transformers itself renders, placeholders expanded by the processor's rule."""
    return model.tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_text_is_the_templates_own(qwen):
    messages = [
        {"role": "system", "content": "Rules."},
        user("How many?", picture()),
        assistant("Two."),
        user("And now?", picture(112, 56)),
        assistant("<think>x</think>\nOne."),
    ]
    encoded = qwen.encode(messages)
    text = template_text(qwen, messages)
    nine, eight = "<|image_pad|>" * 9, "<|image_pad|>" * 8
    first, second, rest = text.split("<|image_pad|>")
    expected = qwen.tokenizer(first + nine + second + eight + rest, add_special_tokens=False)["input_ids"]
    # the template ends the last turn with a newline, which is not trained on and not kept
    assert qwen.tokenizer.decode(encoded.ids) + "\n" == qwen.tokenizer.decode(expected)
    assert encoded.visual.sum() == 17 and [image.num_tokens for image in encoded.images] == [9, 8]


def test_assistant_marks_exactly_the_turns(qwen):
    encoded = qwen.encode([user("a"), assistant("Yes."), user("b"), assistant("<think>t</think>\nNo.")])
    runs = np.flatnonzero(np.diff(np.concatenate([[0], encoded.assistant, [0]]))).reshape(-1, 2)
    assert [qwen.tokenizer.decode(encoded.ids[a:b]) for a, b in runs] == [
        "Yes.<|im_end|>",
        "<think>t</think>\nNo.<|im_end|>",
    ]
    assert encoded.ids[-1] == qwen.end_of_turn_id


def test_prompt_and_completion_make_the_whole(qwen):
    prompt = [user("a", picture()), assistant("one"), user("b", picture(140, 84, 1))]
    text = " leading space, <think>\nr</think>\nend "
    whole = qwen.encode([*prompt, assistant(text)])
    joined = qwen.encode(prompt, generation_prompt=True).concat(qwen.encode_completion(text))
    assert np.array_equal(whole.ids, joined.ids)
    assert np.array_equal(whole.position_ids, joined.position_ids)
    assert np.array_equal(whole.visual, joined.visual)
    assert whole.assistant[-len(qwen.encode_completion(text)) :].all()


def test_decode_keeps_reasoning_and_drops_special(qwen):
    ids = qwen.encode_completion("<think>why</think>\nbecause é 漢")
    assert qwen.decode(ids) == "<think>why</think>\nbecause é 漢"


def test_positions_equal_mlx_vlm(qwen):
    messages = [
        user("Look", picture(84, 84), picture(140, 56, 1)),
        assistant("A"),
        user("more", picture(56, 168)),
    ]
    encoded = qwen.encode(messages, generation_prompt=True)
    grids = mx.array([image.grid for image in encoded.images])
    expected, deltas = qwen.net.language_model.get_rope_index(
        mx.array(encoded.ids)[None], image_grid_thw=grids
    )
    assert np.array_equal(np.array(expected)[:, 0], encoded.position_ids)
    assert encoded.next_position == len(encoded) + int(np.array(deltas).item())


def test_equal_images_are_processed_once(qwen, tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    one = qwen.encode([user("x", str(tmp_path / "a.png"), str(tmp_path / "b.png"))]).images
    assert one[0] is one[1]
    assert one[0].key != qwen.image(picture(84, 84, 1)).key
    assert one[0].pixel_values.shape == (36, 1176)


def test_pictures_drawn_on_demand_are_drawn_once(qwen):
    class Drawn:
        key, drawn = "scene 7", 0

        def open(self):
            Drawn.drawn += 1
            return picture()

    one, two = qwen.encode([user("x", Drawn(), Drawn())]).images
    assert one is two and Drawn.drawn == 1
    assert np.array_equal(one.pixel_values, qwen.image(picture()).pixel_values)


def test_max_pixels_reaches_the_processor(qwen_folder):
    from mpi_mlx.models import load_model

    model = load_model(qwen_folder, max_pixels=56 * 56)
    assert model.image(picture(448, 448)).num_tokens == 4
    assert load_model(qwen_folder).image(picture(448, 448)).num_tokens == 256
    with pytest.raises(ModelError, match="min_pixels"):
        load_model(qwen_folder, max_pixels=100)


def test_tools_are_described_where_the_template_knows_none(qwen):
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "zoom", "arguments": {"x": 1}}}],
    }
    encoded = qwen.encode(
        [user("go"), call, {"role": "tool", "content": "done"}, assistant("ok")],
        tools=[{"type": "function", "function": {"name": "zoom"}}],
    )
    text = qwen.tokenizer.decode(encoded.ids)
    assert '<tools>\n{"type": "function", "function": {"name": "zoom"}}\n</tools>' in text
    assert '<tool_call>\n{"name": "zoom", "arguments": {"x": 1}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\ndone\n</tool_response>" in text
    turns = qwen.tokenizer.decode(encoded.ids[encoded.assistant])
    assert turns.startswith("<tool_call>") and turns.endswith("ok<|im_end|>")


@pytest.mark.parametrize(
    "messages, words",
    [
        ([user("x", "/nowhere/a.png")], "does not exist"),
        ([user("<|image_pad|>")], "placeholder"),
        ([], "no messages"),
        ([{"role": "assistant", "content": [{"type": "image", "image": "x"}]}, user("x")], "image"),
    ],
)
def test_bad_conversations_are_one_clear_line(qwen, messages, words):
    with pytest.raises(DataError, match=words) as error:
        qwen.encode(messages)
    assert "\n" not in str(error.value)


def test_broken_image_is_named(qwen, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="bad.png cannot be read"):
        qwen.encode([user("x", str(tmp_path / "bad.png"))])


def test_no_text_stands_for_a_turn(qwen):
    """Turns are cut out by a mark: a message that holds it is a message like any other."""
    parts = [{"type": "text", "text": "a \u2402tu"}, {"type": "text", "text": "rn0\u2403 \U000f0000turn0\u2403"}]
    tool = {"type": "function", "function": {"name": "f", "description": "\u2402turn1\u2403", "parameters": {}}}
    for content in ("a \u2402turn0\u2403 b", "\u2402turn0\u2403", parts):
        messages = [{"role": "user", "content": content}, assistant("SECRET"), user("b"), assistant("two"), user("c")]
        encoded = qwen.encode(messages, generation_prompt=True)
        assert qwen.tokenizer.decode(encoded.ids) == template_text(qwen, messages, add_generation_prompt=True)
        text = qwen.tokenizer.decode(encoded.ids[encoded.assistant])
        assert text == "SECRET<|im_end|>two<|im_end|>"
        told = qwen.encode(messages, tools=[tool], generation_prompt=True)
        assert qwen.tokenizer.decode(told.ids[told.assistant]) == text
    (head, marked), turn = qwen._chat.segments([assistant("SECRET")], [tool], False)
    assert "turn1" in head and not marked and turn == ("SECRET<|im_end|>", True)


def test_tokens_that_begin_and_end_turns(qwen):
    assert set(qwen.turn_tokens) == {"<|im_start|>", "<|im_end|>"}  # not those of images, nor tags of traces
