import json
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from mpi_mlx.data import Dataset, Example, load_dataset
from mpi_mlx.data.dataset import load_dataset_folder
from mpi_mlx.data.scenes import Scene
from mpi_mlx.data.write import write_dataset
from mpi_mlx.documents import PolicyDocument, load_document
from mpi_mlx.errors import DataError


def spec(**values):
    plain = dict(
        benchmark="clevr_policy",
        depth=2,
        conditions=("exists",),
        seed=3,
        document_seed=None,
        wording="natural",
        modality="text",
        rl=12,
        style="flat",
        image_size=None,
        max_objects=5,
        train=8,
        validation=6,
        test=10,
    )
    return SimpleNamespace(**{**plain, **values})


def files_of(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def built():
    return load_dataset(spec())


@pytest.fixture(scope="module")
def written(built, tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "out", built, recipe="seed: 0\n")


def test_splits_share_no_scene(built):
    keys = {name: [Scene.from_dict(e.meta["scene"]).key for e in rows] for name, rows in built.splits.items()}
    assert [len(k) for k in keys.values()] == [8, 12, 6, 10]
    every = [key for split in keys.values() for key in split]
    assert len(set(every)) == len(every)


def test_same_seed_same_bytes_other_seed_other_scenes(built, written, tmp_path):
    again = write_dataset(tmp_path / "again", load_dataset(spec()), recipe="seed: 0\n", workers=2)
    assert files_of(again) == files_of(written)
    other = write_dataset(tmp_path / "other", load_dataset(spec(seed=4, document_seed=3)))
    assert (other / "document/policy.md").read_bytes() == (written / "document/policy.md").read_bytes()
    assert (other / "train.jsonl").read_bytes() != (written / "train.jsonl").read_bytes()


def test_what_is_written_trains_the_same_way(built, written):
    read = load_dataset(
        SimpleNamespace(
            document="document",
            train="train.jsonl",
            rl="rl.jsonl",
            validation="validation.jsonl",
            test="test.jsonl",
        ),
        written,
    )
    assert read == load_dataset_folder(written)
    assert read.document.sha256 == built.document.sha256 and read.document.text == built.document.text
    for name, rows in built.splits.items():
        for before, after in zip(rows, read.splits[name], strict=True):
            assert (before.id, before.query, before.reasoning, before.answer, before.meta) == (
                after.id,
                after.query,
                after.reasoning,
                after.answer,
                after.meta,
            )
            assert Image.open(after.images[0]).tobytes() == before.images[0].open().tobytes()
    assert read.rl[0].reasoning is None and read.train[0].reasoning
    # Moved as a whole, it still holds together: paths are relative.
    row = json.loads((written / "train.jsonl").read_text().split("\n")[0])
    assert row["messages"][0]["content"][0]["image"] == "images/train/train-00000.png"


def test_an_illustrated_document_comes_back(tmp_path):
    built = load_dataset(spec(modality="multimodal", train=2, rl=None, validation=0, test=0))
    assert len(built.document.images) == 3
    folder = write_dataset(tmp_path / "out", built)
    assert load_document(folder / "document").sha256 == built.document.sha256
    assert sorted(p.name for p in folder.iterdir()) == ["document", "images", "train.jsonl"]
    assert load_dataset_folder(folder).rl == load_dataset_folder(folder).train


def test_files_are_copied_in(tmp_path):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.jpg")
    content = [{"type": "image", "image": str(tmp_path / "a.jpg")}]
    rows = tuple(Example(i, ({"role": "user", "content": content},), answer="x") for i in ("a", "b"))
    folder = write_dataset(tmp_path / "out", Dataset(PolicyDocument.from_text("Rules."), rows, rl=rows))
    assert [p.name for p in (folder / "images/train").iterdir()] == ["a.jpg"]
    shutil.move(folder, tmp_path / "moved")
    read = load_dataset_folder(tmp_path / "moved")
    assert (
        read.train[0].images
        == read.train[1].images
        == (str((tmp_path / "moved/images/train/a.jpg").resolve()),)
    )


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out: exists already; choose another name or remove it"):
        write_dataset(tmp_path / "out", Dataset(None, ()))

    class Broken:
        key = "x"

        def open(self):
            raise KeyboardInterrupt

    example = Example("a", ({"role": "user", "content": [{"type": "image", "image": Broken()}]},), answer="x")
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "new", Dataset(None, (example,)))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(DataError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        write_dataset(tmp_path / "file" / "out", Dataset(None, ()))


def test_own_data_names_what_is_missing(tmp_path):
    own = SimpleNamespace(document="rules.md", train="train.jsonl", rl=None, validation=None, test=None)
    with pytest.raises(
        DataError, match=r"rules\.md: no such document.*\n.*train\.jsonl: no such file of examples"
    ):
        load_dataset(own, tmp_path)
    (tmp_path / "rules.md").write_text("Say yes.")
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1: answer: missing"):
        load_dataset(own, tmp_path)
    (tmp_path / "train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hi"}], "answer": "yes"}\n'
    )
    dataset = load_dataset(own, tmp_path)
    assert dataset.rl == dataset.train and dataset.test == ()
    with pytest.raises(DataError, match="no train.jsonl in it"):
        load_dataset_folder(tmp_path / "nowhere")
