import pytest

from mpi_mlx.data.completion import after_opening, completion_text, split_completion, with_opening


def test_the_turn_is_written_as_fixed():
    assert completion_text("a red cube", "stop") == "<think>a red cube</think>\nstop"
    assert completion_text(None, "stop") == "stop"
    assert completion_text("only a trace", None) == "<think>only a trace</think>\n"


@pytest.mark.parametrize("reasoning", ["a red cube", None, "", "a\n\nb"])
@pytest.mark.parametrize("answer", ["stop", "two\nlines"])
def test_round_trip(reasoning, answer):
    assert split_completion(completion_text(reasoning, answer)) == (reasoning, answer)


@pytest.mark.parametrize("reasoning", ["a red cube", None, "a\n\nb"])
def test_where_the_prompt_has_opened_the_trace(reasoning):
    turn = completion_text(reasoning, "stop")
    rest = after_opening(turn)
    assert rest == ("</think>\nstop" if reasoning is None else f"{reasoning}</think>\nstop")
    assert with_opening(rest) == turn and split_completion(rest)[1] == "stop"
    assert with_opening("<think>a</think>\nb").count("<think>") == 2  # opened twice: not well formed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  stop \n", (None, "stop")),
        ("trace</think> stop", ("trace", "stop")),
        ("<think>a</think> b <think>c</think>\nd", ("a</think> b <think>c", "d")),
        ("<think>cut off in the mid", ("cut off in the mid", "")),
        ("the tag <think> is text", (None, "the tag <think> is text")),
        ("", (None, "")),
    ],
)
def test_what_models_write(text, expected):
    assert split_completion(text) == expected
