"""Byte ranges against a server that answers in ways it should not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hubdiff.errors import CheckpointError, HubError, HubUnavailable
from hubdiff.files import FileInfo
from hubdiff.hub import ranges, retry
from hubdiff.hub.ranges import RemoteFile, RemoteReader
from hubdiff.refs import ModelRef, PinnedRef

DATA = bytes(range(256)) * 40

Answer = Callable[["Handler", int, int], None]


class Handler(BaseHTTPRequestHandler):
    """Pops the next answer off the server's list; the last one stays."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.asked.append((first, last))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self, first, last)

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(body))} | named).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = [good]
        self.asked: list[tuple[int, int]] = []


def good(handler: Handler, first: int, last: int) -> None:
    span = f"bytes {first}-{last}/{len(DATA)}"
    handler.reply(206, DATA[first : last + 1], Content_Range=span)


def another_range(handler: Handler, first: int, last: int) -> None:
    span = f"bytes 0-{last - first}/{len(DATA)}"
    handler.reply(206, DATA[: last - first + 1], Content_Range=span)


def another_size(handler: Handler, first: int, last: int) -> None:
    handler.reply(206, DATA[first : last + 1], Content_Range=f"bytes {first}-{last}/5")


def no_range_header(handler: Handler, first: int, last: int) -> None:
    handler.reply(206, DATA[first : last + 1])


def too_much(handler: Handler, first: int, last: int) -> None:
    span = f"bytes {first}-{last}/{len(DATA)}"
    handler.reply(206, DATA[first : last + 50], Content_Range=span)


def too_little(handler: Handler, first: int, last: int) -> None:
    """The lengths of the answer agree with each other, not with what was asked."""
    span = f"bytes {first}-{last}/{len(DATA)}"
    handler.reply(206, DATA[first : first + 3], Content_Range=span)


def cut_off(handler: Handler, first: int, last: int) -> None:
    span, size = f"bytes {first}-{last}/{len(DATA)}", str(last - first + 1)
    handler.reply(206, DATA[first : first + 3], Content_Range=span, Content_Length=size)
    handler.close_connection = True


def compressed(handler: Handler, first: int, last: int) -> None:
    span = f"bytes {first}-{last}/{len(DATA)}"
    handler.reply(206, b"x" * (last - first + 1), Content_Range=span, Content_Encoding="gzip")


def whole(handler: Handler, first: int, last: int) -> None:
    handler.reply(200, DATA)


def whole_cut_off(handler: Handler, first: int, last: int) -> None:
    handler.reply(200, DATA[: first + 3])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def reader(server: Server, monkeypatch: pytest.MonkeyPatch) -> RemoteReader:
    monkeypatch.setattr(retry, "BACKOFF_SECONDS", 0.0)
    commit = "0" * 40
    ref = ModelRef(repo="org/name", revision=None, path=None)
    pin = PinnedRef(repo="org/name", commit=commit, path=None, ref=ref)
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    return RemoteReader(RemoteFile(pin, FileInfo("config.json", len(DATA)), endpoint))


def read(reader: RemoteReader, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    reader.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize(
    "broken", [another_range, another_size, no_range_header, too_much, too_little, cut_off,
               compressed, whole_cut_off],
)  # fmt: skip
def test_an_answer_that_is_not_the_range_is_asked_again_and_then_refused(
    reader: RemoteReader, server: Server, broken: Answer
) -> None:
    server.answers = [broken, good]
    assert read(reader, 700, 100) == DATA[700:800]
    server.answers = [broken]
    # A body that breaks off brings bytes each time; this range is too long for the tries.
    with pytest.raises(HubUnavailable) as caught:
        read(reader, 700, 100)
    assert caught.value.next_step


def test_a_broken_body_is_continued_where_it_stopped(reader: RemoteReader, server: Server) -> None:
    server.answers = [cut_off, cut_off, good]
    assert read(reader, 700, 100) == DATA[700:800]
    assert server.asked == [(700, 799), (703, 799), (706, 799)]


@pytest.mark.parametrize(("offset", "count"), [(0, len(DATA)), (0, 10), (700, 100), (10239, 1)])
def test_a_small_file_is_read_from_a_server_that_ignores_ranges(
    reader: RemoteReader, server: Server, offset: int, count: int
) -> None:
    server.answers = [whole]
    assert read(reader, offset, count) == DATA[offset : offset + count]


def test_a_large_file_is_not_read_from_a_server_that_ignores_ranges(
    reader: RemoteReader, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MAX_UNRANGED", 1000)
    server.answers = [whole]
    assert read(reader, 900, 100) == DATA[900:1000]
    with pytest.raises(HubError, match="ignores byte ranges") as caught:
        read(reader, 901, 100)
    assert "--cache" in (caught.value.next_step or "")


def test_past_the_end_is_refused_without_asking(reader: RemoteReader, server: Server) -> None:
    with pytest.raises(CheckpointError, match="too early"):
        read(reader, len(DATA) - 5, 6)
    assert read(reader, len(DATA), 0) == b""
    assert server.asked == []


def test_bytes_go_into_memory_of_any_shape(reader: RemoteReader) -> None:
    buffer = bytearray(64)
    reader.read_into(16, memoryview(buffer).cast("I")[2:10])
    assert buffer == bytes(8) + DATA[16:48] + bytes(24)


def test_a_server_that_is_gone_is_named(
    reader: RemoteReader, server: Server, tmp_path: Path
) -> None:
    server.server_close()
    with pytest.raises(HubUnavailable, match="can't be reached") as caught:
        read(reader, 0, 10)
    assert caught.value.next_step
