from __future__ import annotations

import numpy as np
import pytest

from hubdiff.encodings import ENCODINGS
from hubdiff.errors import CorruptPayload

PLAIN = ENCODINGS["plain"]


def test_the_bytes_are_little_endian() -> None:
    assert PLAIN.encode(np.array([0x0102, 0xFFFE], np.uint16)) == b"\x02\x01\xfe\xff"
    assert PLAIN.encode(np.array([0x01020304], np.uint32)) == b"\x04\x03\x02\x01"


def test_nothing_is_added() -> None:
    assert len(PLAIN.encode(np.zeros(1000, np.uint64))) == 8000


def test_another_size_is_named() -> None:
    with pytest.raises(CorruptPayload, match="5 bytes, expected 6"):
        PLAIN.decode(b"12345", np.empty(3, np.uint16))
