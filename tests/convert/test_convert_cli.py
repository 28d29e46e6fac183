import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hand_made import LLAMA, write_model
from typer.testing import CliRunner

from mpi_mlx.convert import table
from mpi_mlx.convert.families import FAMILIES
from mpi_mlx.errors import ConversionError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def app():
    """The typer app by its path: the package may not be installed."""
    spec = importlib.util.spec_from_file_location("convert_cli", ROOT / "cli" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["convert_cli"] = module
    spec.loader.exec_module(module)
    return module.app


def run(app, *args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_to_mlx_and_back(app, tmp_path):
    write_model(tmp_path / "source", LLAMA)
    result = run(app, "to-mlx", tmp_path / "source", tmp_path / "mlx", "--no-check")
    assert result.exit_code == 0, result.output
    assert "to-mlx: llama, 20 tensors" in result.output and "none missing" in result.output
    result = run(app, "to-hf", tmp_path / "mlx", tmp_path / "hf", "--dtype", "float32")
    assert (
        result.exit_code == 0
        and "logits error, text: mlx on the result against mlx on the source" in result.output
    )
    result = run(app, "to-mlx", tmp_path / "source", tmp_path / "mlx", "--no-check")
    assert isinstance(result.exception, ConversionError) and "--overwrite" in str(result.exception)
    assert run(app, "to-mlx", tmp_path / "source", tmp_path / "x", "--dtype", "int8").exit_code == 2


@pytest.mark.parametrize("command", ["to-mlx", "to-hf", "from-peft", "to-peft", "fuse", "gguf", "table"])
def test_every_command_has_help(app, command):
    result = run(app, command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_help_imports_no_mlx():
    code = (
        "import importlib.util as u, sys\n"
        f"s = u.spec_from_file_location('c', {str(ROOT / 'cli' / 'convert.py')!r})\n"
        "m = u.module_from_spec(s)\n"
        "sys.modules['c'] = m; s.loader.exec_module(m)\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('mlx', 'torch', 'transformers')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_layout_table_lists_every_family(app):
    result = run(app, "table", "--layout-only")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in result.output.splitlines()[2:]]
    assert rows == list(FAMILIES)


def test_the_measured_part_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    table.write_into(page, "new")
    assert page.read_text() == f"before\n{table.START}\n\nnew\n\n{table.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ConversionError, match="has no lines"):
        table.write_into(page, "new")


def test_the_docs_hold_a_table_of_every_family():
    page = (ROOT / "docs" / "conversion.md").read_text()
    measured = page.split(table.START)[1].split(table.END)[0]
    for name, family in FAMILIES.items():
        assert re.search(rf"^\| {name} \|", measured, re.M), (
            f"run: mpi-mlx convert table --output docs/conversion.md ({name})"
        )
        if family.note:
            assert family.note[:40] in measured


def test_the_table_of_one_family():
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    (row,) = table.measure(["qwen2"])
    assert row.to_mlx["text"] < 1e-5 and row.to_hf < 1e-5 and row.peft < 1e-5
    assert row.exact[0] == row.exact[1] > 40
    assert f"| qwen2 | tied, untied | {row.to_mlx['text']:.0e} | - | - | - |" in table.markdown([row])
