"""Rewards, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpi_mlx.data.conditions import Condition, Filter
from mpi_mlx.data.examples import Example
from mpi_mlx.data.policy_tree import PolicyTree
from mpi_mlx.data.scenes import Scene, SceneObject
from mpi_mlx.errors import DataError, RecipeError
from mpi_mlx.rollouts.rewards import build_rewards, well_formed
from mpi_mlx.rollouts.tool_calls import parse_tool_calls, tool_call_score


def example(answer="stop", identity="a", **fields):
    return Example(identity, ({"role": "user", "content": "?"},), answer=answer, **fields)


def spec(kind, weight=1.0, **options):
    return SimpleNamespace(kind=kind, weight=weight, **options)


def values(kind, texts, examples=None, folder=".", **options):
    rewards = build_rewards([spec(kind, **options)], folder)
    _, parts = rewards(texts, examples or [example()] * len(texts))
    return next(iter(parts.values())).tolist()


def test_exact_match_ignores_case_blanks_and_the_trace():
    texts = ["<think>go</think>\nStop", "  sTOP \n", "<think>stop</think>\ngo", "<think>stop", "stop it"]
    assert values("exact_match", texts) == [1, 1, 0, 0, 0]
    assert values("exact_match", ["go  to\nHeron"], [example("Go to  heron ")]) == [1]


def test_exact_match_without_an_answer_names_the_example():
    with pytest.raises(DataError, match="'q7' has no answer"):
        values("exact_match", ["x"], [example(None, "q7")])


@pytest.mark.parametrize(
    ("text", "with_trace", "without"),
    [
        ("<think>red</think>\nstop", True, False),
        ("\n<think>red\nblue</think>stop\n", True, False),
        ("stop", False, True),
        ("", False, False),
        ("<think>red</think>\n", False, False),
        ("<think> </think>\nstop", False, False),
        ("well <think>red</think>\nstop", False, False),
        ("<think>red</think>\nstop</think>", False, False),
        ("<think>a<think>red</think>\nstop", False, False),
        ("<think>red", False, False),
        ("red</think>\nstop", False, False),
    ],
)
def test_format(text, with_trace, without):
    assert well_formed(text) is with_trace
    assert well_formed(text, reasoning=False) is without


def test_format_follows_the_stages_reasoning():
    total, _ = build_rewards([spec("format")], reasoning=False)(["stop"], [example()])
    assert total.tolist() == [1.0]


def test_regex_on_the_answer_or_all_of_it():
    text = "<think>rule 4</think>\nstop"
    assert values("regex", [text], pattern="rule \\d") == [0]
    assert values("regex", [text], pattern="rule \\d", of="completion") == [1]
    assert values("regex", [text], pattern="^stop$") == [1]
    with pytest.raises(RecipeError, match="does not compile"):
        values("regex", [text], pattern="(")


def test_json_parses_and_holds_keys():
    texts = ['{"a": 1, "b": 2}', "<think>x</think>\n[1]", "{'a': 1}", '{"a": NaN}', "[" * 100_000]
    assert values("json", texts) == [1, 1, 0, 0, 0]
    assert values("json", texts, keys=["a", "c"]) == [0.5, 0, 0, 0, 0]


CALL = '<tool_call>\n{"name": "book", "arguments": {"seat": "4A", "meals": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (CALL, 1.0),
        ('{"name": "book", "arguments": {"meals": 2.0, "seat": " 4A"}}', 1.0),
        ('{"function": {"name": "book", "arguments": "{\\"meals\\": 2, \\"seat\\": \\"4A\\"}"}}', 1.0),
        ('{"name": "book", "parameters": {"seat": "4A", "meals": 3}}', 0.75),
        ('{"name": "book", "arguments": {"seat": "4A"}}', 0.75),
        ('{"name": "book", "arguments": {"seat": "4A", "meals": 2, "x": 0, "y": 0}}', 0.75),
        ('{"name": "book", "arguments": {"seat": "4A", "meals": true}}', 0.75),
        ('{"name": "book"}', 0.5),
        ('{"name": "cancel", "arguments": {"seat": "4A", "meals": 2}}', 0.0),
        (CALL + CALL, 0.5),  # the second is one too many
        ('<tool_call>{"name": "book", </tool_call>', 0.0),
        ("<tool_call>oops</tool_call>" + CALL, 0.0),  # compared in order
        ("I would book.", 0.0),
        ('"book"', 0.0),
    ],
)
def test_tool_call_partial_credit(answer, score):
    assert tool_call_score(answer, CALL) == pytest.approx(score)


def test_tool_call_where_none_is_expected():
    assert tool_call_score("No seats are left.", "There are none.") == 1.0
    assert tool_call_score(CALL, "There are none.") == 0.0


def test_tool_calls_in_order_and_unclosed():
    two = '<tool_call>{"name": "a"}</tool_call> and <tool_call>{"name": "b", "arguments": {"x": [{"y": 2}]}}'
    found = [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": [{"y": 2}]}}]
    assert parse_tool_calls(two) == found
    assert tool_call_score(two, '<tool_call>{"name": "a"}</tool_call>') == 0.5


def test_tool_call_reward_reads_the_answer_only():
    text = f"<think>{CALL}</think>\n" + '{"name": "book", "arguments": {"seat": "4A"}}'
    assert values("tool_call", [text], [example(CALL)]) == [0.75]
    assert values("tool_call", [text], [example(CALL)], partial_credit=False) == [0]


def cube(name, value):
    return Condition("exists", Filter(((name, value), ("shape", "cube"))))


CONDITIONS = (cube("color", "red"), cube("size", "large"), cube("color", "green"))
TREE = PolicyTree(2, CONDITIONS, ("Owl", "Fox", "Elk"), ("a", "b", "c", "d"))


SCENE = Scene((SceneObject(shape="cube", color="red", size="small", material="metal", x=0.5, y=0.5),))


def test_trace_is_judged_by_the_tree_not_by_a_gold_trace():
    good = TREE.trace(SCENE)  # Owl yes, Fox no: b
    row = example("b", meta={"tree": TREE.to_dict()})
    texts = [
        f"<think>{good}</think>\nb",
        f"<think>{good}</think>\na",  # both steps right, wrong end: halved
        f"<think>{good.replace('Owl yes', 'Owl no')}</think>\nb",
        "b",
    ]
    assert values("trace", texts, [row] * 4) == [1.0, 0.5, 0.25, 0.0]
    with pytest.raises(DataError, match="meta.tree"):
        values("trace", ["b"], [example("b")])
    with pytest.raises(DataError, match="meta.tree"):  # a tree of the user's own
        values("trace", ["b"], [example("b", meta={"tree": "oak"})])


def test_a_trace_earns_nothing_where_none_is_wanted():
    row = example("b", meta={"tree": TREE.to_dict()})
    specs = [spec("exact_match"), spec("format", 0.1), spec("trace", 0.3)]
    traced, bare = f"<think>{TREE.trace(SCENE)}</think>\nb", "b"
    total, _ = build_rewards(specs)([traced, bare], [row] * 2)
    assert total.tolist() == pytest.approx([1.4, 1.0])
    total, parts = build_rewards(specs, reasoning=False)([traced, bare], [row] * 2)
    assert total.tolist() == pytest.approx([1.0, 1.1])  # the form counts, and what was thought does not
    assert parts["trace"].tolist() == [0.0, 0.0]


def test_total_is_the_weighted_sum_and_kinds_are_told_apart():
    rewards = build_rewards(
        [spec("exact_match", 1.0), spec("regex", 0.25, pattern="o"), spec("regex", -0.5, pattern="t")]
    )
    assert rewards.kinds == ("exact_match", "regex", "regex_2")
    total, parts = rewards(["stop", "no"], [example(), example()])
    assert total.tolist() == [0.75, 0.25] and total.dtype == np.float32  # 1 + .25 - .5, .25
    assert {k: v.tolist() for k, v in parts.items()} == {
        "exact_match": [1, 0], "regex": [1, 1], "regex_2": [1, 0]
    }
    assert rewards([], [])[0].shape == (0,)


def test_unknown_kind():
    with pytest.raises(RecipeError, match="exact_match, format"):
        build_rewards([spec("exact")])


def user(tmp_path, body):
    (tmp_path / "mine.py").write_text(body)
    return tmp_path


def test_a_users_function_takes_the_batch(tmp_path):
    (tmp_path / "helper.py").write_text("BONUS = 2.5\n")
    folder = user(
        tmp_path,
        "from helper import BONUS\n"
        "def length(completions, examples):\n"
        "    return [BONUS * len(c) + (e['answer'] == 'stop') for c, e in zip(completions, examples)]\n",
    )
    rewards = build_rewards([spec("function", 2.0, function="mine.py:length")], folder)
    total, parts = rewards(["ab", ""], [example(), example("go")])
    assert parts["length"].tolist() == [6.0, 0.0] and total.tolist() == [12.0, 0.0]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("def f(c, e):\n    x = 1\n    return c[7]\n", r"mine\.py:3: IndexError"),
        ("def f(c, e):\n    return [1.0]\n", r"mine\.py:1: .*2 numbers.*shape \(1,\)"),
        ("def f(c, e):\n    return None\n", r"must return 2 numbers"),
        ("def f(c, e):\n    return ['x', 'y']\n", r"must return 2 numbers.*list"),
        ("def f(c, e):\n    return [0.0, float('nan')]\n", r"nan for example 'second'"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path, body, error):
    rewards = build_rewards([spec("function", function="mine.py:f")], user(tmp_path, body))
    with pytest.raises(RecipeError, match=error) as caught:
        rewards(["x", "y"], [example(), example(identity="second")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "target", "error"),
    [
        ("def f(:\n", "mine.py:f", r"mine\.py:1"),
        ("x = 1\nimport no_such_module\n", "mine.py:f", r"mine\.py:2: ModuleNotFoundError"),
        ("def length(c, e): ...\n", "mine.py:lenght", "did you mean 'length'"),
        ("", "other.py:f", "no file .*other.py"),
        ("", "mine.f", "must be file.py:function"),
    ],
)
def test_a_users_file_that_cannot_be_used(tmp_path, body, target, error):
    with pytest.raises(RecipeError, match=error):
        build_rewards([spec("function", function=target)], user(tmp_path, body))
