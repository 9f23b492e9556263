"""Safetensors files as byte ranges: read headers with care, write shards as a stream.

The safetensors library writes only tensors that are all in memory; a conversion must not need that.
Files written here are byte for byte what `safetensors.torch.save_file` writes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from meo_hf.errors import CheckpointError, UnsupportedError

CHUNK = 2**20
MAX_HEADER = 100 * 2**20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# the library orders tensors by its own list of types, widest and rarest last, from the end
_LIBRARY_ORDER = ["BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a tensor on disk; `dtype` is the safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class TensorRef:
    """A tensor in a file: its spec and where its bytes begin."""

    spec: TensorSpec
    path: Path
    offset: int

    def chunks(self, size: int = CHUNK) -> Iterator[memoryview]:
        """Yield the raw bytes in pieces of at most `size` bytes."""
        buffer = memoryview(bytearray(min(size, max(self.spec.nbytes, 1))))
        left = self.spec.nbytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                read = file.readinto(buffer[: min(left, len(buffer))])
                if not read:
                    raise CheckpointError(
                        f"{self.path} ended while reading {self.spec.name}: it changed during the run"
                    )
                left -= read
                yield buffer[:read]

    def load(self) -> torch.Tensor:
        """Read the whole tensor."""
        data = bytearray(self.spec.nbytes)
        at = 0
        for chunk in self.chunks():
            data[at : at + len(chunk)] = chunk
            at += len(chunk)
        if not data:
            return torch.empty(self.spec.shape, dtype=DTYPES[self.spec.dtype])
        return torch.frombuffer(data, dtype=DTYPES[self.spec.dtype]).reshape(self.spec.shape)


def read_header(path: Path) -> dict[str, TensorRef]:
    """Read a safetensors header; raises CheckpointError if the file is truncated or the header is damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is truncated or no safetensors file: download it again")
        try:
            header = json.loads(file.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            return {name: _entry(path, name, entry, 8 + length, size) for name, entry in entries.items()}
        except UnsupportedError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"the header of {path} is damaged ({error}): download it again") from None


def known_spec(where: str, name: str, dtype: str, shape: Iterable[int]) -> TensorSpec:
    """Return a tensor's spec; raises UnsupportedError for a type that no dense model is stored in."""
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"{where}: {name} has type {dtype}, which is not converted: cast it to one of {', '.join(DTYPES)}"
        )
    return TensorSpec(name, dtype, tuple(shape))


def _entry(path: Path, name: str, entry: dict, data_start: int, size: int) -> TensorRef:
    begin, end = entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*entry["shape"], begin, end)):
        raise ValueError(f"{name} has no whole numbers as shape or offsets")
    spec = known_spec(str(path), name, entry["dtype"], entry["shape"])
    if end - begin != spec.nbytes:
        raise CheckpointError(
            f"the header of {path} is damaged: {name} should have {spec.nbytes} bytes, not {end - begin}"
        )
    if data_start + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {data_start + end} of {size}; download it again"
        )
    return TensorRef(spec, path, data_start + begin)


def library_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Order tensors as the safetensors library writes them."""
    return sorted(specs, key=lambda spec: (-_LIBRARY_ORDER.index(spec.dtype), spec.name))


class ShardWriter:
    """Write one safetensors file as a stream, in `library_order`, hashing as it goes."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self.specs = library_order(specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for spec in self.specs:
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
            at += spec.nbytes
        self._expected = at
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._file = path.open("xb", buffering=0)
        self._reserve(8 + len(text) + at)
        self._emit(len(text).to_bytes(8, "little") + text)
        self._written = 0

    def _reserve(self, size: int) -> None:
        """Claim the disk space at once: a full disk shows before the work, and writing is faster."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system can
                    self._file.close()
                    raise

    def write(self, data: memoryview | bytes) -> None:
        """Append bytes of the tensor whose turn it is."""
        self._emit(data)
        self._written += len(data)

    def _emit(self, data: memoryview | bytes) -> None:
        hashed = self._hasher.submit(self._hash.update, data)  # hashing costs more than writing to the page cache
        view = memoryview(data)
        while view:  # a raw write may take less than all
            view = view[self._file.write(view) :]
        hashed.result()

    def close(self) -> str:
        """Finish the file and return its sha256; raises CheckpointError if bytes are missing or too many."""
        self._file.close()
        if self._written != self._expected:
            raise CheckpointError(f"{self._file.name}: wrote {self._written} of {self._expected} bytes")
        return self._hash.hexdigest()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hasher.shutdown()
        self._file.close()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:  # type: ignore[no-untyped-def]
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def within(folder: Path, name: str) -> Path:
    """Return folder/name; raises CheckpointError if the name leads out of the folder."""
    path = Path(os.path.normpath(folder / name))
    if path.parent != Path(os.path.normpath(folder)):
        raise CheckpointError(f"the index of {folder} names {name!r}, a file outside the folder: refused")
    return path
