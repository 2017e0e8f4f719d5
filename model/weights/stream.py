"""Safetensors files tensor by tensor. Written: the header from the shapes, then one tensor after the other."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from model.weights.entries import Entries, Entry, WeightsError, in_file

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""As the format spells them (https://huggingface.co/docs/safetensors)."""

_TYPES = {text: dtype for dtype, text in DTYPES.items()}


LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


def open_file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file, not read yet, and the strings of its header. Raises WeightsError if it is torn."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            described = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        metadata = described.pop("__metadata__", {})
        entries = {name: _entry(path, 8 + length, size, **about) for name, about in described.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise WeightsError(f"{path} is no safetensors file, or a torn one: {error}") from error
    if not entries:
        raise WeightsError(f"{path} is no safetensors file, or holds no tensors")
    return entries, metadata


def _entry(path: Path, start: int, size: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    first, last = data_offsets
    entry = in_file(path, start + first, shape, _TYPES[dtype])
    if not 0 <= first <= last <= size - start or entry.count * entry.dtype.itemsize != last - first:
        raise ValueError(f"a tensor of {dtype} {shape} cannot lie at {data_offsets}")
    return entry


def write(path: Path, entries: Entries, metadata: Mapping[str, str]) -> int:
    """Write a new file `path`, on disk when this returns. Returns its size in bytes.

    At most one tensor is in memory. Raises FileExistsError, OSError, WeightsError for a dtype that the format lacks.
    """
    with path.open("xb") as file:
        file.write(header(entries, metadata))
        for name, entry in entries.items():
            tensor = entry.read()
            if (tuple(tensor.shape), tensor.dtype) != (entry.shape, entry.dtype):
                raise WeightsError(f"{name} was read as {tensor.dtype} {list(tensor.shape)}, not as announced")
            if entry.count:
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def header(entries: Entries, metadata: Mapping[str, str]) -> bytes:
    """The length of the JSON (8 bytes, little endian), then the JSON, padded to 8 bytes so that tensors lie aligned."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, entry in entries.items():
        size = _bytes(name, entry)
        described[name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(name: str, entry: Entry) -> int:
    if entry.dtype not in DTYPES:
        raise WeightsError(f"{name} is {entry.dtype}, which safetensors has no name for")
    return entry.count * entry.dtype.itemsize
