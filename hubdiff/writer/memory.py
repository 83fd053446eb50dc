"""A result in memory: its weights as tensors on a device, its small files in a folder.

No byte of the weights touches a disk. Every tensor is allocated once, in its final place, and
filled from whichever spans the work comes to first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hubdiff.errors import CheckpointError
from hubdiff.hashing import hash_bytes
from hubdiff.manifest import FileRecord, WrittenFile
from hubdiff.refs import PinnedRef
from hubdiff.safetensors_io import Header, TensorEntry
from hubdiff.writer.output import OutputFile
from hubdiff.writer.sink import Published

if TYPE_CHECKING:
    import torch


class TensorFile(OutputFile):
    """A safetensors file that exists as its tensors only. The header is dropped: it is known."""

    def __init__(self, header: Header, device: torch.device) -> None:
        self.device = device
        self._start = len(header.raw)
        # Empty tensors have no bytes to find them by.
        self._entries = [entry for entry in header.tensors if entry.nbytes]
        self._begins = [entry.begin for entry in self._entries]
        self.tensors = {entry.name: _allocate(entry, device) for entry in header.tensors}

    def is_on(self, device: str) -> bool:
        import torch

        return self.device == torch.device(device)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        import torch

        skip = max(0, self._start - offset)
        if skip < len(data):
            rest = np.frombuffer(memoryview(data)[skip:], np.uint8)
            self.place(offset + skip, torch.from_numpy(rest))

    def place(self, offset: int, content: torch.Tensor) -> None:
        """Bytes of the file (uint8, any device), at an offset behind the header."""
        import torch

        index = bisect_right(self._begins, offset) - 1
        while len(content):
            entry = self._entries[index]
            start = offset - entry.begin
            count = min(len(content), entry.nbytes - start)
            whole = self.tensors[entry.name].view(-1).view(torch.uint8)
            whole[start : start + count].copy_(content[:count])
            content, offset, index = content[count:], offset + count, index + 1

    def close(self) -> None:
        pass


def _allocate(entry: TensorEntry, device: torch.device) -> torch.Tensor:
    import torch

    from hubdiff import numerics

    try:
        dtype = numerics.torch_dtype(entry.dtype)
    except (KeyError, AttributeError) as error:
        raise CheckpointError(
            f"tensor {entry.name!r} is {entry.dtype}, which this torch has no dtype for",
            next_step="Use hubdiff apply --output DIR and load the folder with its own library.",
        ) from error
    return torch.empty(entry.shape, dtype=dtype, device=device)


class Memory:
    """A sink for ``headers``, the weights files of a result by path: after the work ``tensors`` has
    them on ``device``. All other files go into ``folder``."""

    def __init__(self, folder: Path, headers: Mapping[str, Header], device: torch.device) -> None:
        self.staging = folder
        self._headers, self._device = headers, device
        self._files: dict[str, TensorFile] = {}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: t for file in self._files.values() for name, t in file.tensors.items()}

    def done(self, path: str) -> WrittenFile | None:
        return None

    def open(self, path: str, size: int) -> OutputFile:
        if path not in self._headers:
            return OutputFile(self.staging / path, size)
        self._files[path] = TensorFile(self._headers[path], self._device)
        if self._device.type == "cuda":
            import torch

            # The memory may still be in use by what this thread asked for before; other streams
            # write to it now.
            torch.cuda.current_stream(self._device).synchronize()
        return self._files[path]

    def finish(self, record: WrittenFile) -> None:
        pass

    def put(self, path: str, data: bytes) -> FileRecord:
        output = self.open(path, len(data))
        output.write_at(0, data)
        output.close()
        return FileRecord(path, len(data), hash_bytes(data))

    def copy(self, path: str, pin: PinnedRef, source: str) -> bool:
        return False  # the bytes are what is wanted

    def deposit(self) -> list[dict[str, Any]]:
        return []  # a model in memory is one process's

    def accept(self, deposit: list[dict[str, Any]]) -> None:
        pass

    def publish(self, message: str) -> Published:
        return Published("memory")
