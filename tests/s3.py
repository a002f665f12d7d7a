"""A server of S3's protocol on this machine, which counts what it is asked for and fails when told to."""

from collections.abc import Callable
from contextlib import contextmanager
from urllib.request import Request, urlopen

import fsspec
import pytest


class Server:
    """moto's, stopped and started again at the same port.

    `fault`: asked about each request, by its method, path and range; what it returns in place of None is answered: "503", "cut" (half of
    the body, then the end of the connection).
    """

    def __init__(self) -> None:
        self._moto = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.requests: list[tuple[str, str, str]] = []
        self.fault: Callable[[str, str, str], str | None] = lambda method, path, range_: None
        self.start()
        host, port = self._moto.get_host_and_port()
        self._moto._port = port  # the same, when it is started again
        self.url = f"http://{host}:{port}"

    def start(self) -> None:
        self._moto.start()
        inner = self._moto._server.app
        self._moto._server.app = lambda environ, start: self._answer(inner, environ, start)

    def stop(self) -> None:
        self._moto.stop()

    def fetched(self, name: str) -> list[str]:
        """Ranges of a file that were asked for."""
        return [range_ for method, path, range_ in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def _answer(self, inner, environ, start):
        asked = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""))
        self.requests.append(asked)
        fault = self.fault(*asked)
        if fault == "503":
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        answer = inner(environ, start)
        if fault == "cut":
            body = b"".join(answer)
            return [body[: len(body) // 2]]
        return answer


@contextmanager
def serving():
    """A server with an empty bucket, `bucket`; this process, and those it starts, find it."""
    pytest.importorskip("s3fs")
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        store = fsspec.get_filesystem_class("s3")
        store.clear_instance_cache()  # one that knows another server
        urlopen(Request(f"{server.url}/moto-api/reset", method="POST")).close()  # moto has one memory for all servers
        fsspec.filesystem("s3").mkdir("bucket")
        yield server
        store.clear_instance_cache()
    server.stop()
