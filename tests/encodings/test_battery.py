"""What every encoding in the table must do, whatever its bytes look like."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubdiff.encodings import ENCODINGS, SEGMENT, Encoding
from hubdiff.errors import CorruptPayload, HubdiffError

EVERY = [
    pytest.param(encoding, np.dtype(f"u{width // 8}"), id=f"{encoding.name}-{width}")
    for encoding in ENCODINGS.values()
    for width in sorted(encoding.widths)
]
every_encoding = pytest.mark.parametrize(("encoding", "dtype"), EVERY)

SIZES = [1, 2, 3, 255, 256, 257, 5000, (1 << 14) + 1]


def _random(count: int, dtype: np.dtype) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 1 << (8 * dtype.itemsize), count, dtype)


def _skewed(count: int, dtype: np.dtype) -> np.ndarray:
    """Few symbols make up most, as in differences; with a tail of rare ones."""
    ranks = np.random.default_rng(count).geometric(0.02, count) - 1
    return _random(4096, dtype)[ranks % 4096]


def _sparse(count: int, dtype: np.dtype) -> np.ndarray:
    bits = _skewed(count, dtype)
    bits[np.random.default_rng(1).random(count) > 0.05] = 1 << (8 * dtype.itemsize - 1)
    return bits


def _specials(count: int, dtype: np.dtype) -> np.ndarray:
    """Signed zeros, subnormals, infinities and NaN payloads of every float of this width."""
    width = 8 * dtype.itemsize
    exponents = {8: (4, 5), 16: (5, 8), 32: (8,), 64: (11,)}[width]
    patterns = {0, 1, (1 << width) - 1}
    for exponent in exponents:
        infinity = ((1 << exponent) - 1) << (width - 1 - exponent)
        patterns |= {infinity, infinity - 1, infinity + 1, infinity | (1 << (width - 1))}
    patterns |= {1 << bit for bit in range(width)}
    return np.resize(np.array(sorted(patterns), dtype), count)


KINDS: dict[str, Callable[[int, np.dtype], np.ndarray]] = {
    "zeros": lambda count, dtype: np.zeros(count, dtype),
    "ones": lambda count, dtype: np.full(count, np.iinfo(dtype).max, dtype),
    "random": _random,
    "skewed": _skewed,
    "sparse": _sparse,
    "specials": _specials,
}


def _decoded(encoding: Encoding, blob: bytes | memoryview, like: np.ndarray) -> np.ndarray:
    out = np.full(like.size, 0xA5, like.dtype)
    encoding.decode(blob, out)
    return out


@every_encoding
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", SIZES)
def test_every_bit_comes_back(encoding: Encoding, dtype: np.dtype, kind: str, count: int) -> None:
    bits = KINDS[kind](count, dtype)
    given_bits = bits.copy()
    blob = encoding.encode(bits)
    np.testing.assert_array_equal(_decoded(encoding, blob, bits), given_bits)
    np.testing.assert_array_equal(bits, given_bits)  # the input is left alone


@every_encoding
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_segment_comes_back(encoding: Encoding, dtype: np.dtype, kind: str) -> None:
    bits = KINDS[kind](SEGMENT, dtype)
    np.testing.assert_array_equal(_decoded(encoding, encoding.encode(bits), bits), bits)


@pytest.mark.parametrize("name", [e.name for e in ENCODINGS.values() if 16 in e.widths])
def test_all_65536_patterns_come_back(name: str) -> None:
    bits = np.random.default_rng(0).permutation(1 << 16).astype(np.uint16)
    np.testing.assert_array_equal(
        _decoded(ENCODINGS[name], ENCODINGS[name].encode(bits), bits), bits
    )


@every_encoding
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_array_comes_back(encoding: Encoding, dtype: np.dtype, data: st.DataObject) -> None:
    alphabet = data.draw(st.lists(st.integers(0, int(np.iinfo(dtype).max)), min_size=1, max_size=5))
    runs = data.draw(
        st.lists(st.tuples(st.sampled_from(alphabet), st.integers(1, 700)), min_size=1, max_size=12)
    )
    bits = np.concatenate([np.full(length, symbol, dtype) for symbol, length in runs])
    np.testing.assert_array_equal(_decoded(encoding, encoding.encode(bits), bits), bits)


@every_encoding
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_give_same_bytes(encoding: Encoding, dtype: np.dtype, kind: str) -> None:
    bits = KINDS[kind](20_000, dtype)
    strided = np.repeat(bits, 2)[::2]
    first = encoding.encode(bits)
    assert encoding.encode(bits.copy()) == first
    assert encoding.encode(strided) == first
    with ThreadPoolExecutor(1) as pool:  # a fresh thread has a fresh compressor
        assert pool.submit(encoding.encode, bits).result() == first


@every_encoding
def test_threads_do_not_disturb_each_other(encoding: Encoding, dtype: np.dtype) -> None:
    inputs = [KINDS[kind](30_000 + 7 * i, dtype) for i in range(3) for kind in KINDS]

    def round_trip(bits: np.ndarray) -> bool:
        return bool((_decoded(encoding, encoding.encode(bits), bits) == bits).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, inputs * 4))


@every_encoding
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 300, 70_001])
def test_never_much_larger_than_the_bits(
    encoding: Encoding, dtype: np.dtype, kind: str, count: int
) -> None:
    bits = KINDS[kind](count, dtype)
    assert len(encoding.encode(bits)) <= bits.nbytes + 8 * bits.itemsize + 1


@every_encoding
@pytest.mark.parametrize("kind", ["random", "skewed", "sparse"])
def test_reads_a_view_and_fills_a_slice(encoding: Encoding, dtype: np.dtype, kind: str) -> None:
    """Blobs are cut out of ranges and tensors filled piece by piece, at any alignment."""
    bits = KINDS[kind](5001, dtype)
    blob = encoding.encode(bits)
    buffer = memoryview(b"\x00" * 3 + blob + b"\x00" * 5)[3:-5]
    backing = np.zeros(1 + bits.nbytes, np.uint8)
    out = backing[1:].view(dtype)
    encoding.decode(buffer, out)
    np.testing.assert_array_equal(out, bits)


@every_encoding
@pytest.mark.parametrize("kind", KINDS)
def test_a_blob_must_end_where_it_ends(encoding: Encoding, dtype: np.dtype, kind: str) -> None:
    bits = KINDS[kind](600, dtype)
    blob = encoding.encode(bits)
    for wrong in (b"", blob[:-1], blob[1:], blob + b"\x00", blob[: len(blob) // 2]):
        with pytest.raises(CorruptPayload) as caught:
            _decoded(encoding, wrong, bits)
        assert encoding.name in str(caught.value)
        assert caught.value.next_step


@every_encoding
@pytest.mark.parametrize("kind", ["random", "skewed"])
def test_another_length_than_declared_is_refused(
    encoding: Encoding, dtype: np.dtype, kind: str
) -> None:
    """Blobs that say "the rest is unchanged" can't know; the tensor's hash covers those."""
    blob = encoding.encode(KINDS[kind](5000, dtype))
    for count in (1, 2500, 4999, 5001, SEGMENT):
        with pytest.raises(CorruptPayload):
            encoding.decode(blob, np.empty(count, dtype))


@every_encoding
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_allocates_a_small_multiple(
    encoding: Encoding, dtype: np.dtype, kind: str
) -> None:
    bits = KINDS[kind](1 << 18, dtype)
    blob = encoding.encode(bits)
    out = np.empty_like(bits)
    encoding.decode(blob, out)  # the thread's decompressor and numpy's caches exist from here
    tracemalloc.start()
    encoding.decode(blob, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * out.nbytes


@every_encoding
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_refused_or_harmless(
    encoding: Encoding, dtype: np.dtype, data: st.DataObject
) -> None:
    """Any other exception, or a crash, would fail here. Not every flip can be seen."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    count = data.draw(st.sampled_from([1, 2, 300, 5000]))
    bits = KINDS[kind](count, dtype)
    blob = bytearray(encoding.encode(bits))
    blob = blob[: data.draw(st.one_of(st.just(len(blob)), st.integers(0, len(blob))))]
    # Most damage goes to the first bytes: that is where the lengths are.
    near = st.integers(0, max(0, min(len(blob), 48) - 1))
    place = st.one_of(near, st.integers(0, max(0, len(blob) - 1)))
    for where, value in data.draw(
        st.lists(st.tuples(place, st.integers(0, 255)), max_size=4 if blob else 0)
    ):
        blob[where] = value
    out = np.zeros(count, dtype)
    try:
        encoding.decode(bytes(blob), out)
    except HubdiffError as error:
        assert type(error) is CorruptPayload  # noqa: PT017 - damage may also go unseen
