"""A small GGUF reader: metadata, and tensors dequantized a block of rows at a time.

The format is the one of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little
endian. Blocks hold 32 values of a row. Dequantization is exact in float32.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpi_mlx.errors import ConversionError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
BLOCK = 32
ROW_VALUES = 8 << 20  # values dequantized at once

# names of the types that are not read, for the message
_OTHER = {
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
}


def _half(data: np.ndarray) -> np.ndarray:
    """float16 in the first two bytes of each block (..., bytes) -> float32 (..., 1)."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """(..., 16) bytes -> (..., 32) values 0..15: low halves first, then high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1).astype(np.float32)


def _f32(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view("<f4").astype(np.float32)


def _f16(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view("<f2").astype(np.float32)


def _bf16(rows: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(rows).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks[..., :2]) * np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks[..., :2]) * (_nibbles(blocks[..., 2:]) - 8.0)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks[..., :2]) * _nibbles(blocks[..., 4:]) + _half(blocks[..., 2:4])


@dataclass(frozen=True)
class _Type:
    """``values`` values take ``nbytes`` bytes; ``decode``: uint8 (..., nbytes) to float32 (..., values)."""

    name: str
    values: int
    nbytes: int
    decode: Callable[[np.ndarray], np.ndarray]


TYPES = {
    0: _Type("F32", 1, 4, _f32),
    1: _Type("F16", 1, 2, _f16),
    2: _Type("Q4_0", BLOCK, 18, _q4_0),
    3: _Type("Q4_1", BLOCK, 20, _q4_1),
    8: _Type("Q8_0", BLOCK, 34, _q8_0),
    30: _Type("BF16", 1, 2, _bf16),
}


@dataclass(frozen=True)
class GGUFTensor:
    """``shape`` is (rows, values of a row) as in PyTorch (GGUF writes it reversed); a vector is (values,)."""

    name: str
    kind: _Type
    shape: tuple[int, ...]
    data: np.ndarray  # uint8 (rows, bytes of a row), a view of the mapped file

    def blocks_of_rows(self, order: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """float32 (some rows, values): all rows, in ``order`` (indices of stored rows) if given."""
        width = self.shape[-1]
        step = max(1, ROW_VALUES // width)
        for start in range(0, len(self.data), step):
            rows = (
                self.data[start : start + step] if order is None else self.data[order[start : start + step]]
            )
            grouped = np.asarray(rows).reshape(len(rows), -1, self.kind.nbytes)
            yield self.kind.decode(grouped).reshape(len(rows), width)

    def read(self) -> np.ndarray:
        """The whole tensor in float32."""
        return np.concatenate(list(self.blocks_of_rows())).reshape(self.shape)


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.at, self.path = data, 0, path

    def unpack(self, code: str):
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.data):
            raise ConversionError(f"{self.path.name} ends inside its header: fetch it again")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        n = self.unpack("Q")
        if n > len(self.data) - self.at:
            raise ConversionError(f"{self.path.name} ends inside its header: fetch it again")
        self.at += n
        return self.data[self.at - n : self.at].decode("utf-8", "replace")

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, n = self.unpack("I"), self.unpack("Q")
            if inner in _SCALARS:
                dtype = np.dtype("<" + {"?": "u1"}.get(_SCALARS[inner], _np_code(_SCALARS[inner])))
                if self.at + n * dtype.itemsize > len(self.data):
                    raise ConversionError(f"{self.path.name} ends inside its header: fetch it again")
                out = np.frombuffer(self.data, dtype, n, self.at).tolist()
                self.at += n * dtype.itemsize
                return out
            return [self.value(inner) for _ in range(n)]
        if kind not in _SCALARS:
            raise ConversionError(f"{self.path.name} has a metadata value of unknown type {kind}")
        return self.unpack(_SCALARS[kind])


def _np_code(code: str) -> str:
    return {"B": "u1", "b": "i1", "H": "u2", "h": "i2", "I": "u4", "i": "i4", "f": "f4", "Q": "u8", "q": "i8",
            "d": "f8"}.get(code, "u1")  # fmt: skip


@dataclass(frozen=True)
class GGUF:
    """An open GGUF file: ``metadata`` by key, ``tensors`` by GGUF name."""

    path: Path
    metadata: dict
    tensors: dict[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUF:
    """Map a GGUF file and read its header.

    Raises ConversionError for another format or version, a truncated file, or a tensor type that is not read.
    """
    path = Path(path)
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            raise ConversionError(f"{path.name} is no GGUF file")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    r = _Reader(data, path)
    r.at = 4
    version = r.unpack("I")
    if version not in (2, 3):
        raise ConversionError(
            f"{path.name} is GGUF version {version} or big endian: only little-endian 2 and 3 are read"
        )
    count, keys = r.unpack("Q"), r.unpack("Q")
    metadata = {}
    for _ in range(keys):
        key = r.string()
        metadata[key] = r.value(r.unpack("I"))
    infos = []
    for _ in range(count):
        name, dims = r.string(), r.unpack("I")
        shape = tuple(r.unpack("Q") for _ in range(dims))[::-1]
        infos.append((name, shape, r.unpack("I"), r.unpack("Q")))
    align = metadata.get("general.alignment", 32)
    start = r.at + -r.at % align
    tensors = {}
    for name, shape, kind, offset in infos:
        if kind not in TYPES:
            raise ConversionError(
                f"{name} in {path.name} is {_OTHER.get(kind, f'of type {kind}')}: F32, F16, BF16, Q8_0, Q4_0 "
                "and Q4_1 are read; llama.cpp rewrites it: `llama-quantize --allow-requantize "
                f"{path.name} OUT.gguf F16`"
            )
        spec = TYPES[kind]
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        if shape[-1] % spec.values:
            raise ConversionError(
                f"{name} in {path.name} has rows of {shape[-1]} values, no multiple of {spec.values}"
            )
        width = shape[-1] // spec.values * spec.nbytes
        if start + offset + rows * width > len(data):
            raise ConversionError(f"{path.name} is truncated: {name} lies past its end; fetch it again")
        view = np.frombuffer(data, np.uint8, rows * width, start + offset).reshape(rows, width)
        tensors[name] = GGUFTensor(name, spec, shape, view)
    return GGUF(path, metadata, tensors)
