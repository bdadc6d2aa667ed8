"""Storages that fail when they are told to: an HTTP server, and a file system of fsspec's."""

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
from fsspec.registry import _registry


class Server:
    """An HTTP server of a few files on this machine.

    `fault` is how it answers: `None` well; `plain` without ranges; `cut` hangs up in the middle of
    what comes after the first block; `page` answers that with a short page; `busy` with status 503.
    """

    def __init__(self):
        self.files = {}
        self.requests = []
        self.fault = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                server.answer(self, body=False)

            def do_GET(self):
                server.answer(self, body=True)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request, body):
        wanted = request.headers.get("Range")
        self.requests.append((request.command, request.path, wanted))
        name = request.path.split("?")[0]
        data = self.files.get(name)
        if name == "/":
            data = "".join(f'<a href="{n}">{n}</a>' for n in self.files).encode()
        if data is None:
            return request.send_error(404)
        first, last = 0, len(data) - 1
        if wanted and self.fault != "plain":
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        later = body and first > 0
        if later and self.fault == "busy":
            return request.send_error(503)
        if later and self.fault == "page":
            part = b"<html>one moment, please</html>"
        request.send_response(206 if wanted and self.fault != "plain" else 200)
        request.send_header("Accept-Ranges", "none" if self.fault == "plain" else "bytes")
        request.send_header("Content-Type", "text/html" if name == "/" else "application/x-tar")
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if later and self.fault == "cut":
            request.wfile.write(part[: len(part) // 2])
            request.close_connection = True
            return request.connection.shutdown(2)
        if body:
            request.wfile.write(part)

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    pytest.importorskip("aiohttp")
    running = Server()
    yield running
    running.stop()


class FlakyFile(io.BytesIO):
    """Fails as soon as a byte beyond `fail_at` is read."""

    def __init__(self, data, storage):
        super().__init__(data)
        self.storage = storage

    def read(self, size=-1):
        end = len(self.getbuffer()) if size is None or size < 0 else self.tell() + size
        if self.storage.fail_at is not None and end > self.storage.fail_at:
            raise ConnectionResetError("connection reset by peer")
        data = super().read(size)
        self.storage.bytes_read += len(data)
        return data


class FlakyStorage(fsspec.AbstractFileSystem):
    """`flaky://NAME`: files in memory whose reading and listing can fail."""

    protocol = "flaky"
    cachable = False
    files: dict[str, bytes] = {}  # noqa: RUF012
    fail_at: int | None = None
    fail_listing = False
    bytes_read = 0

    def info(self, path, **_):
        if self.fail_listing:
            raise PermissionError("access denied")
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.files[path]), "type": "file"}

    def ls(self, path, detail=True, **_):
        if self.fail_listing:
            raise PermissionError("access denied")
        return [self.info(name) for name in self.files]

    def open(self, path, mode="rb", **_):
        if path not in self.files:
            raise FileNotFoundError(path)
        return FlakyFile(self.files[path], type(self))


@pytest.fixture
def flaky(monkeypatch):
    """The class of `flaky://`; set `files` and `fail_at` on it."""
    storage = type("FlakyStorage", (FlakyStorage,), {"files": {}})
    monkeypatch.setitem(_registry, "flaky", storage)
    return storage


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    storage = fsspec.filesystem("memory")
    storage.store.clear()
    yield storage
    storage.store.clear()
