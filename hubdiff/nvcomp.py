"""zstd frames decoded on an NVIDIA GPU by nvCOMP, where its Python package is installed.

The package is an extra (``pip install "hubdiff[nvcomp]"``), and it is used only where
``HUBDIFF_NVCOMP=1`` asks for it: on an H200 nvCOMP 6.0, left to its usual chunk size of 64 KiB,
wrote past its memory with frames of 1 MiB. The size is given now, and that has not run on a GPU
since. Otherwise frames are decoded on the CPU and their contents copied over.

nvCOMP checks no zstd checksum: what protects the result is the hash of the whole payload, as it is
for streams that are stored without a frame.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hubdiff.encodings import Stream

LARGEST = 1 << 21  # bytes in a frame: more than a stream of one segment has


def frame_decoder(device: torch.device) -> Callable[[Stream, Tensor], Tensor] | None:
    """What turns a framed stream and its body on ``device`` (uint8) into its bytes there. None
    without nvCOMP, where it can't be loaded, and where nobody asked for it."""
    if device.type != "cuda" or os.environ.get("HUBDIFF_NVCOMP") != "1":
        return None
    try:
        from nvidia import nvcomp
    except (ImportError, OSError):
        return None
    return Frames(nvcomp, device)


class Frames:
    """One codec for each thread, on that thread's stream: a codec is not to be shared."""

    def __init__(self, nvcomp: Any, device: torch.device) -> None:
        self._nvcomp, self._device = nvcomp, device
        self._local = threading.local()

    def __call__(self, stream: Stream, body: Tensor) -> Tensor:
        stream.check_frame()
        try:
            source = self._nvcomp.as_array(body, cuda_stream=self._stream())
            content = torch.from_dlpack(self._codec().decode(source)).view(torch.uint8)
        except (RuntimeError, ValueError) as error:
            raise stream.fail(f"can't be read ({error})") from error
        if content.numel() != stream.raw_size:
            raise stream.fail(f"gave {content.numel()} bytes, expected {stream.raw_size}")
        return content

    def _codec(self) -> Any:
        if not hasattr(self._local, "codec"):
            self._local.codec = self._nvcomp.Codec(
                algorithm="Zstd",
                device_id=self._device.index or 0,
                cuda_stream=self._stream(),
                bitstream_kind=self._nvcomp.BitstreamKind.RAW,
                uncomp_chunk_size=LARGEST,
            )
        return self._local.codec

    def _stream(self) -> int:
        handle: int = torch.cuda.current_stream(self._device).cuda_stream
        return handle
