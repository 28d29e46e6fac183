import json

import pytest

from mpi_mlx.errors import ServingError
from mpi_mlx.serving.tools import load_tools

SOURCE = '''
from typing import Literal
from PIL import Image

CALLS = []

def weather(city: str, unit: Literal["C", "F"] = "C", days: int = 1) -> dict:
    """The weather in a city.

    Of the coming days.
    """
    CALLS.append(city)
    return {"city": city, "degrees": 20, "unit": unit, "days": days}

def look(title: str):
    return ["a view", Image.new("RGB", (3, 4))]

def breaks(x: float):
    raise RuntimeError(f"no {x}")

def _private(x):
    pass
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(SOURCE)
    return path


def test_functions_are_described_by_their_types(file):
    box = load_tools(file)
    assert box.names == ["weather", "look", "breaks"]
    described = box.descriptions[0]["function"]
    assert described["description"].startswith("The weather in a city.\n\nOf the")
    schema = described["parameters"]
    assert schema["required"] == ["city"] and schema["properties"]["unit"]["enum"] == ["C", "F"]
    assert schema["properties"]["city"] == {"type": "string"} and "title" not in schema
    assert box.descriptions[1]["function"]["parameters"]["properties"] == {"title": {"type": "string"}}


def test_calls_check_their_arguments(file):
    box = load_tools(file)
    assert json.loads(box.call("weather", {"city": "Oslo", "days": 2}))["days"] == 2
    assert box.call("weather", {"town": "Oslo"}).startswith(
        "error: weather cannot take these arguments: city"
    )
    assert box.call("weather", {"city": "Oslo", "unit": "K"}).startswith("error:")
    assert box.call("breaks", {"x": 1.5}) == "error: breaks failed: RuntimeError: no 1.5"
    assert box.call("nothing", {}).startswith("error: there is no tool 'nothing'")
    text, image = box.call("look", {"title": "x"})
    assert text == {"type": "text", "text": "a view"} and image["image"].size == (3, 4)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(x): pass", "give x a type"),
        ("def f(*x: int): pass", "name each parameter"),
        ("x = 1", "no public function"),
        ("1/0", "ZeroDivisionError"),
        ("import threading\ndef f(x: threading.Lock): pass", "type"),
    ],
)
def test_files_that_are_no_tools(tmp_path, source, said):
    path = tmp_path / "t.py"
    path.write_text(source)
    with pytest.raises(ServingError, match=said):
        load_tools(path)
