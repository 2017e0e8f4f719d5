"""Sources that are pickles, read without trusting them.

A file of torch.save is read by torch with `weights_only=True`. The index of a torch.distributed.checkpoint folder,
`.metadata`, can only be read as a pickle, and torch itself would unpickle it without limits
(`FileSystemReader.read_metadata` in torch 2.15). Here nothing but the records of such an index can come out of it: any
other name in it is an error before anything is called. The tensors' own files are read with `weights_only=True`.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from model.weights.entries import Entry, WeightsError, in_file, of

INDEX = ".metadata"

ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "Metadata", "MetadataIndex", "BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): {str(layout): layout for layout in (torch.strided,)}.__getitem__,
    ("collections", "OrderedDict"): dict,
    **{
        (module, name): PurePosixPath  # where it was saved: said, never opened
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values()
       if isinstance(dtype, torch.dtype)},
}  # fmt: skip
"""All that an index may name. None of these does anything but hold values."""


class _IndexUnpickler(pickle.Unpickler):
    """See "Restricting Globals" in the pickle module's documentation."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise WeightsError(f"names {module}.{name}, which no index of a checkpoint needs: not unpickled") from None


class _Reader(filesystem.FileSystemReader):
    """torch's reader, with an index that was read safely."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


def open_file(path: Path) -> dict[str, Entry]:
    """The tensors that torch.save wrote, not read yet, by the keys of its nested mappings joined with dots.

    torch tells where they lie when it loads under its FakeTensorMode, without reading them. Files of before torch 1.6,
    which do not tell, are read whole. Raises WeightsError.
    """
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = dict(_flat(content))
        if any(getattr(tensor.untyped_storage(), _OFFSET, None) is None for tensor in tensors.values()):
            return {name: of(value) for name, value in _flat(torch.load(path, map_location="cpu", weights_only=True))}
    except pickle.UnpicklingError as error:
        asked = next((f" ({line.strip()})" for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise WeightsError(
            f"{path} holds more than tensors, or is no file of torch.save; it is not unpickled{asked}"
        ) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise WeightsError(f"{path} is no file of torch.save: {error}") from error
    return {name: _entry(path, tensor) for name, tensor in tensors.items()}


_OFFSET = "_checkpoint_offset"
"""Where in the file a storage lies (torch's notes on serialization, "torch.load under FakeTensorMode")."""


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested mappings."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            else:
                yield from _flat(value, f"{prefix}{key}.")


def _entry(path: Path, tensor: Tensor) -> Entry:
    """Of a tensor without content. One that is a part of its storage is cut out of the whole of it."""
    storage, size = tensor.untyped_storage(), tensor.dtype.itemsize
    start = getattr(storage, _OFFSET) + tensor.storage_offset() * size
    shape, strides = tuple(tensor.shape), tensor.stride()
    if tensor.is_contiguous():
        return in_file(path, start, shape, tensor.dtype)
    span = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) if tensor.numel() else 0
    flat = in_file(path, start, (span,), tensor.dtype)
    return Entry(shape, tensor.dtype, lambda: flat.read().as_strided(shape, strides).contiguous())


def open_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of the checkpoint by their flat names; everything else in it is left alone.

    Reading one takes the memory of it and of its largest shard. Raises WeightsError.
    """
    index = read_index(folder / INDEX)
    reader = _Reader(folder, index)
    return {
        name: Entry(tuple(item.size), item.properties.dtype, partial(_read, reader, name, item))
        for name, item in index.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def read_index(path: Path) -> Metadata:
    """Raises WeightsError naming the file if it is not such an index, or asks for anything else."""
    try:
        with path.open("rb") as file:
            return _checked(_IndexUnpickler(file).load())
    except WeightsError as error:
        raise WeightsError(f"{path} {error}") from error
    except Exception as error:  # a torn or forged pickle can fail in any way
        raise WeightsError(
            f"{path} is no index of a distributed checkpoint: {type(error).__name__}: {error}"
        ) from error


def _checked(index: Any) -> Metadata:
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise WeightsError("is no index of a distributed checkpoint")
    for info in index.storage_data.values():
        if not isinstance(info, filesystem._StorageInfo) or Path(info.relative_path).name != info.relative_path:
            raise WeightsError(f"names a file outside of its folder: {info}")
    return index


def _read(reader: _Reader, name: str, item: TensorStorageMetadata) -> Tensor:
    state = {name: torch.empty(item.size, dtype=item.properties.dtype)}
    with warnings.catch_warnings():  # that there is one process is what is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(state, storage_reader=reader, no_dist=True)
    return state[name]
