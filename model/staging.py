"""The staged copy of a checkpoint: host memory laid out as the safetensors files that it becomes.

    stage(files, buffer) -> Staged      copy once; training goes on as soon as that is done
    Staged.files[i].pieces(most)        what to write: the header, then the staged bytes from where they lie

A save takes the memory of one copy: nothing is serialised beside it, and the next save's copy goes into the same place.
On a GPU the memory is pinned and the copies are queued behind the step that was just asked for: the host waits for
none of them, and no later step can overtake them.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import cut, sealed
from model.weights import entries, stream

State = dict[str, Tensor]

ALIGNED = 64
"""Bytes: a file's tensors begin in the buffer at a multiple of it, so that each is aligned for its dtype."""


@dataclass(frozen=True)
class StagedFile:
    """A safetensors file to be: `part` of the checkpoint, `name` in its folder."""

    part: str
    name: str
    header: bytes
    data: memoryview

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.header) + len(self.data)

    def pieces(self, most: int) -> Iterator[bytes | memoryview]:
        """The file from its beginning to its end: the header, then pieces of at most `most` bytes."""
        yield self.header
        for start in range(0, len(self.data), most):
            yield self.data[start : start + most]


@dataclass(frozen=True)
class Staged:
    """What one process saves of a checkpoint."""

    files: tuple[StagedFile, ...]
    buffer: Tensor  # uint8, on the host; as long as files are written from it nothing else may be staged there
    copying: tuple[torch.cuda.Event, torch.cuda.Event] | None  # its begin and end on a GPU; None: done at once
    seconds: float  # that the host spent in `stage`

    @property
    def size(self) -> int:
        """In bytes, of all files."""
        return sum(file.size for file in self.files)

    def arrived(self) -> float:
        """Waits until all is there. Returns how long training stood still for it, in seconds."""
        if self.copying is None:
            return self.seconds
        begin, end = self.copying
        end.synchronize()
        return self.seconds + float(begin.elapsed_time(end)) / 1000


def stage(files: Iterable[tuple[str, str, State]], buffer: Tensor | None = None) -> Staged:
    """Copy tensors to the host: (part, file name, tensors) for each file; of cut tensors the rows of this process.

    `buffer`: that of an earlier `Staged` whose files are written; it is used again if it is large enough.
    """
    began, size = time.monotonic(), 0
    laid: list[_Laid] = []
    for part, name, tensors in files:
        laid.append(_Laid.of(part, name, tensors, start=-(-size // ALIGNED) * ALIGNED))
        size = laid[-1].stop
    on_gpu = any(tensor.is_cuda for one in laid for tensor in one.tensors)
    if buffer is not None and buffer.nbytes < size:
        buffer = None  # it goes before the larger one comes
    if buffer is None:
        buffer = _pinned(size) if on_gpu else torch.empty(size, dtype=torch.uint8)
    begin = _now() if on_gpu else None
    for one in laid:
        one.copy_into(buffer)
    copying = (begin, _now()) if begin is not None else None
    view: memoryview = buffer.numpy().data
    staged = tuple(StagedFile(one.part, one.name, one.header, view[one.start : one.stop]) for one in laid)
    return Staged(staged, buffer, copying, time.monotonic() - began)


@dataclass(frozen=True)
class _Laid:
    """A file's place in the buffer: from `start` its tensors, one behind the other as the header says."""

    part: str
    name: str
    header: bytes
    tensors: tuple[Tensor, ...]
    start: int

    @classmethod
    def of(cls, part: str, name: str, tensors: State, start: int) -> _Laid:
        own = {key: cut.local(tensor.detach()) for key, tensor in tensors.items()}
        # Wide dtypes first, as safetensors does it: then none is out of line for the tensors behind it.
        order = sorted(own, key=lambda key: (-own[key].element_size(), key))
        rows = _rows(tensors)
        told = {sealed.ROWS: json.dumps(rows)} if rows else {}
        header = stream.header({key: entries.of(own[key]) for key in order}, told)
        return cls(part, name, header, tuple(own[key] for key in order), start)

    @property
    def stop(self) -> int:
        return self.start + sum(tensor.nbytes for tensor in self.tensors)

    def copy_into(self, buffer: Tensor) -> None:
        at = self.start
        for tensor in self.tensors:
            room = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            room.copy_(tensor, non_blocking=True)
            at += tensor.nbytes


def _rows(tensors: State) -> dict[str, list[int]]:
    """Of the tensors that this process has not whole: the first row that it has, and how many there are in all."""
    return {
        name: [rows.start, tensor.shape[0]]
        for name, tensor in tensors.items()
        if len(rows := cut.rows(tensor)) < (tensor.shape[0] if tensor.ndim else 1)
    }


def _now() -> torch.cuda.Event:
    """This moment of the device's work."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _pinned(size: int) -> Tensor:
    """Memory that a GPU copies into by itself. Registered here, as torch's own pinned memory comes in powers of two."""
    buffer, runtime = torch.empty(size, dtype=torch.uint8), torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostRegister(buffer.data_ptr(), size, 0)))
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer
