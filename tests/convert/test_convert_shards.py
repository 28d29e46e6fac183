import json
import re
import struct

import numpy as np
import pytest

from mpi_mlx.convert.shards import (
    Output,
    copied,
    from_float32,
    open_checkpoint,
    read_header,
    split,
    to_float32,
    write_checkpoint,
)
from mpi_mlx.errors import ConversionError


def out(name, data, dtype):
    return Output(name, dtype, data.shape, lambda: [data.tobytes()])


def test_bfloat16_rounds_to_nearest_even():
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7: even is 1; 1 + 3 * 2^-8 goes up to 1 + 2^-6
    data = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, np.inf, 1 + 2**-8 + 2**-20], np.float32)
    bits = from_float32(data, "BF16")
    assert to_float32(bits, "BF16").tolist() == [1.0, 1.0, 1 + 2**-6, -2.5, np.inf, 1 + 2**-7]
    assert np.isnan(to_float32(from_float32(np.array([np.nan], np.float32), "BF16"), "BF16")[0])


def test_every_bfloat16_survives_widening():
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[~np.isnan(to_float32(bits, "BF16"))]
    assert np.array_equal(from_float32(to_float32(bits, "BF16"), "BF16"), bits)


def test_files_agree_with_the_safetensors_library(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(5, dtype=np.float16)
    write_checkpoint(tmp_path, [out("b", b, "F16"), out("a", a, "F32")])
    read = safetensors.load_file(tmp_path / "model.safetensors")
    assert np.array_equal(read["a"], a) and np.array_equal(read["b"], b)
    safetensors.save_file({"x": a}, tmp_path / "theirs.safetensors")
    tensors, _ = read_header(tmp_path / "theirs.safetensors")
    assert np.array_equal(tensors["x"].read(), a)


def test_shards_and_index(tmp_path):
    data = {f"t{i}": np.full(10, i, np.float32) for i in range(5)}
    files = write_checkpoint(tmp_path, [out(k, v, "F32") for k, v in data.items()], limit=90)
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    checkpoint = open_checkpoint(tmp_path)
    assert all(np.array_equal(checkpoint.tensors[k].read(), v) for k, v in data.items())
    assert checkpoint.format == "pt"
    (tmp_path / "again").mkdir()
    write_checkpoint(tmp_path / "again", [copied(t) for t in checkpoint.tensors.values()])
    again = open_checkpoint(tmp_path / "again")
    assert all(np.array_equal(again.tensors[k].read(), v) for k, v in data.items())


def test_one_tensor_larger_than_the_limit_has_its_own_file():
    sizes = [Output(str(i), "U8", (n,), lambda: []) for i, n in enumerate((3, 20, 3, 3))]
    assert [[o.name for o in g] for g in split(sizes, 10)] == [["0"], ["1"], ["2", "3"]]


@pytest.mark.parametrize("cut", [4, 30, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    write_checkpoint(tmp_path, [out("a", np.zeros(64, np.float32), "F32")])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ConversionError, match="model.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json at all}",
        b"[1, 2, 3]",
        b"\xff\xfe\xfd{}",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": "no", "data_offsets": [0, 8]}}',
    ],
)
def test_a_corrupt_header_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ConversionError, match=f"the header of {re.escape(str(path))} is corrupt: fetch the file again"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": [1]}', "{}"])
def test_a_broken_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConversionError, match="is no index: it needs a weight_map"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_checkpoint(tmp_path, [out(f"t{i}", np.zeros(10, np.float32), "F32") for i in range(3)], limit=40)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match="model-00002-of-00003"):
        open_checkpoint(tmp_path)


def two_checkpoints(folder):
    """As transformers leaves a folder that it saved into twice: in shards, then whole with other values."""
    shards = write_checkpoint(folder, [out(f"t{i}", np.zeros(10, np.float32), "F32") for i in range(3)], limit=40)
    write_checkpoint(folder, [out(f"t{i}", np.ones(10, np.float32), "F32") for i in range(3)])
    return shards


def test_a_whole_file_beside_a_stale_index_is_the_checkpoint(tmp_path):
    for shard in two_checkpoints(tmp_path):
        shard.unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert [p.name for p in checkpoint.files] == ["model.safetensors"]
    assert all((t.read() == 1).all() for t in checkpoint.tensors.values())


@pytest.mark.parametrize("index", [True, False])
def test_a_whole_file_and_shards_are_refused(tmp_path, index):
    two_checkpoints(tmp_path)
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    match = "model.safetensors and the shards model-00001-of-00003.safetensors and 2 more; delete"
    with pytest.raises(ConversionError, match=match):
        open_checkpoint(tmp_path)


def test_an_index_may_name_the_whole_file(tmp_path):
    write_checkpoint(tmp_path, [out("a", np.ones(4, np.float32), "F32")])
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_sizes_are_checked_when_written(tmp_path):
    with pytest.raises(ConversionError, match="3 bytes, not 4"):
        write_checkpoint(tmp_path, [Output("a", "F32", (1,), lambda: [b"abc"])])
