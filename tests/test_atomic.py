import os
from pathlib import Path

import pytest

from mpi_mlx import atomic
from mpi_mlx.atomic import atomic_write, replace_dir, temporary_dir, write_json_atomic, write_text_atomic


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole_with_its_suffix_and_the_usual_rights(tmp_path):
    target = tmp_path / "new" / "a.json"
    with atomic_write(target) as temporary:
        assert temporary.suffix == ".json" and temporary.parent == target.parent and not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole" and names(target.parent) == ["a.json"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text_atomic(target, "old")
    target.chmod(0o600)
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]
    write_text_atomic(target, "new\n")
    assert target.read_bytes() == b"new\n" and target.stat().st_mode & 0o777 == 0o600


def test_json_that_is_not_json_is_refused(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"é": [1, None]})
    assert '"é"' in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "a.json", {"loss": float("nan")})
    assert '"é"' in (tmp_path / "a.json").read_text(encoding="utf-8") and names(tmp_path) == ["a.json"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    target = tmp_path / "run"
    for content in ("1", "2"):
        with temporary_dir(target) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / f"{content}.txt").write_text(content)
            replace_dir(temporary, target)
        assert names(tmp_path) == ["run"] and names(target / "sub") == [f"{content}.txt"]


def test_a_folder_that_fails_is_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with temporary_dir(tmp_path / "run") as temporary:
            (temporary / "half").touch()
            raise ZeroDivisionError
    assert names(tmp_path) == []


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(atomic, "_flush", lambda path: order.append(("flush", Path(path).name)))
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (order.append(("rename", Path(b).name)), replace(a, b))[1]
    )
    with atomic_write(tmp_path / "a.bin") as temporary:
        pass
    assert order == [("flush", temporary.name), ("rename", "a.bin"), ("flush", tmp_path.name)]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text_atomic(tmp_path / "a", "x")
    assert names(tmp_path) == []
