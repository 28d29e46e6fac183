"""Safetensors read and written as raw bytes, one tensor at a time.

Tensors keep their bits: nothing is loaded into a framework unless an edit asks for it, so bfloat16 survives
exactly and memory stays at one copy buffer (or one edited tensor), however large the shards are. The format
is the one of https://github.com/huggingface/safetensors: 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpi_mlx.errors import ConversionError, ModelError

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
NUMPY_TYPES = {
    "F64": np.float64, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "I32": np.int32,
    "U32": np.uint32, "F16": np.float16, "BF16": np.uint16, "I16": np.int16, "U16": np.uint16,
    "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip
DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
COPY_BYTES = 16 << 20
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: ``offset`` is absolute in ``path``; ``dtype`` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[bytes]:
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            left = self.nbytes
            while left:
                block = f.read(min(left, COPY_BYTES))
                if not block:
                    raise ConversionError(f"{self.path.name} ends inside {self.name}: copy the file again")
                left -= len(block)
                yield block

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the first axis as stored; bfloat16 comes as its uint16 bits."""
        inner = int(np.prod(self.shape[1:], dtype=np.int64))
        at = self.offset + start * inner * ITEM_BYTES[self.dtype]
        data = np.fromfile(self.path, NUMPY_TYPES[self.dtype], (stop - start) * inner, offset=at)
        return data.reshape(stop - start, *self.shape[1:])

    def read(self) -> np.ndarray:
        """The whole tensor; see :meth:`rows`."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1).reshape(())


def to_float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """Exact widening of a stored float tensor (bfloat16 given as its uint16 bits)."""
    if dtype == "BF16":
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def from_float32(data: np.ndarray, dtype: str, name: str = "a tensor") -> np.ndarray:
    """Round to nearest even into a stored float type (bfloat16 comes as its uint16 bits, NaN kept NaN).

    Raises ConversionError, about ``name``, for a finite value that the type cannot hold.
    """
    if dtype == "BF16":
        bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        out = np.where(np.isnan(data), np.uint16(0x7FC0), rounded)
        infinite = (out & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            out = data.astype(NUMPY_TYPES[dtype])
        infinite = np.isinf(out)
    if infinite.any() and np.isfinite(lost := data[infinite]).any():
        most = np.abs(lost[np.isfinite(lost)]).max()
        raise ConversionError(
            f"{name} has values up to {most:.1e}, which are infinite in {dtype}: choose another --dtype"
        )
    return out


def _entry(name: str, info: dict) -> tuple[str, str, tuple[int, ...], int, int]:
    """(name, type, shape, start, stop) of a header's entry; ValueError, TypeError or KeyError if it is none."""
    start, stop = info["data_offsets"]
    shape = tuple(info["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(name)
    return name, str(info["dtype"]), shape, start, stop


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of one safetensors file; a truncated or corrupt one is refused."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ConversionError(
                f"{path} is no safetensors file or is cut off ({size} bytes): fetch it again"
            )
        try:
            header = json.loads(f.read(length))
            metadata = header.pop("__metadata__", {})
            entries = [_entry(name, info) for name, info in header.items()]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConversionError(f"the header of {path} is corrupt: fetch the file again") from None
    tensors, end = {}, 0
    for name, dtype, shape, start, stop in entries:
        if dtype not in ITEM_BYTES:
            raise ConversionError(f"{name} in {path} has the unsupported type {dtype}")
        nbytes = int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]
        if stop - start != nbytes:
            raise ConversionError(
                f"{name} in {path} claims {stop - start} bytes, its shape needs {nbytes}"
            )
        tensors[name] = Stored(name, dtype, shape, path, 8 + length + start, nbytes)
        end = max(end, stop)
    if 8 + length + end != size:
        raise ConversionError(
            f"{path} is truncated or padded: {size} bytes, its header needs {8 + length + end}; fetch "
            "it again"
        )
    return tensors, metadata


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by the one rule that loading has too."""
    from mpi_mlx.models.folders import checkpoint_files

    try:
        return checkpoint_files(folder)
    except ModelError as e:
        raise ConversionError(str(e)) from None


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a folder. ``format`` is the files' own metadata entry ("pt", "mlx" or None)."""

    folder: Path
    tensors: dict[str, Stored]
    format: str | None
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def largest_shard(self) -> int:
        return max(p.stat().st_size for p in self.files)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read every header (no data) of a folder's safetensors."""
    files = shard_files(folder)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for path in files:
        found, meta = read_header(path)
        twice = set(found) & set(tensors)
        if twice:
            raise ConversionError(f"{sorted(twice)[0]} is in {path.name} and in another shard of {folder}")
        tensors.update(found)
        metadata.update(meta or {})
    return Checkpoint(folder, tensors, metadata.get("format"), tuple(files))


@dataclass(frozen=True)
class Output:
    """One tensor to write: its bytes come from ``make()`` when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


def copied(source: Stored, name: str | None = None) -> Output:
    """A bit-exact copy, streamed in blocks."""
    return Output(name or source.name, source.dtype, source.shape, source.chunks)


def edited(
    name: str, dtype: str, shape: tuple[int, ...], blocks: Callable[[], Iterable[np.ndarray]]
) -> Output:
    """A tensor computed when its turn comes; ``blocks`` gives runs of rows in their stored form."""

    def make() -> Iterator[bytes]:
        for block in blocks():
            if block.size:
                yield memoryview(np.ascontiguousarray(block)).cast("B")

    return Output(name, dtype, tuple(shape), make)


def split(outputs: list[Output], limit: int) -> list[list[Output]]:
    """Group tensors, in order, into files of at most ``limit`` bytes (one larger tensor has its own)."""
    groups: list[list[Output]] = [[]]
    size = 0
    for out in outputs:
        if groups[-1] and size + out.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(out)
        size += out.nbytes
    return groups


def write_file(path: Path, outputs: list[Output], format: str) -> None:
    """Write one safetensors file: header first, then each tensor as it is made; flushed to disk."""
    # aligned: wider types first, as safetensors' own writer does
    outputs = sorted(outputs, key=lambda o: (-ITEM_BYTES[o.dtype], o.name))
    header: dict = {"__metadata__": {"format": format}}
    at = 0
    for out in outputs:
        header[out.name] = {
            "dtype": out.dtype,
            "shape": list(out.shape),
            "data_offsets": [at, at + out.nbytes],
        }
        at += out.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for out in outputs:
            before = f.tell()
            for block in out.make():
                f.write(block)
            if f.tell() - before != out.nbytes:
                raise ConversionError(f"{out.name} came out with {f.tell() - before} bytes, not {out.nbytes}")
        f.flush()
        os.fsync(f.fileno())


def write_checkpoint(
    folder: Path, outputs: list[Output], *, format: str = "pt", limit: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors as ``model.safetensors``, or as shards of ``limit`` bytes with an index."""
    groups = split(outputs, limit)
    if len(groups) == 1:
        write_file(folder / "model.safetensors", groups[0], format)
        return [folder / "model.safetensors"]
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, group, format)
    index = {
        "metadata": {"total_size": sum(o.nbytes for o in outputs)},
        "weight_map": {o.name: n for n, g in zip(names, groups, strict=True) for o in g},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [folder / n for n in names]
