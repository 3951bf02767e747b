"""A proxy before a real registry that forwards everything, and misbehaves as it is told: `with Wicked(host) as it`."""

import contextlib
import dataclasses
import http.client
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Twist:
    """What to do wrong, and with which requests: those whose "METHOD path" has `match` in it, at most `times` times.

    flip: turn over one bit of the byte at this offset of the body.
    cut: close the connection after so many bytes of the body.
    length: add so much to Content-Length, and send the whole body all the same.
    grow: so many blanks behind the body, with a fitting Content-Length.
    status, body: answer this instead of asking the registry.
    headers: of the answer, replaced (None: left out).
    hide: headers of the request that the registry is not to see.
    dead: close the connection without an answer.
    stall: seconds without a word before the answer.
    """

    match: str = "."
    times: int = 1000
    flip: int | None = None
    cut: int | None = None
    length: int = 0
    grow: int = 0
    status: int = 0
    body: bytes = b""
    headers: dict = dataclasses.field(default_factory=dict)
    hide: tuple = ()
    dead: bool = False
    stall: float = 0


class Wicked:
    """The proxy: `host` is its address, `twist` what it does wrong, `seen` what it was asked (method, path, headers).

    relative: cut scheme and host out of every Location, which is no wrong.
    """

    def __init__(self, upstream):
        self.upstream, self.twist, self.seen, self.relative = upstream, None, [], False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.wicked = self
        self.server.daemon_threads = False
        self.host = f"127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def take(self, line):
        """The twist for this request, or one that changes nothing."""
        twist = self.twist
        if twist is None or twist.times < 1 or not re.search(twist.match, line):
            return Twist()
        twist.times -= 1
        return twist

    def asked(self, method):
        return [(path, headers) for seen, path, headers in self.seen if seen == method]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection a request: closing it harms no other

    def forward(self):
        wicked = self.server.wicked
        wicked.seen.append((self.command, self.path, self.headers))
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        twist = wicked.take(f"{self.command} {self.path}")
        if twist.dead:
            return
        time.sleep(twist.stall)
        status, headers, body = (twist.status, {}, twist.body) if twist.status else self.ask(twist, data)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.answer(twist, status, headers, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = forward  # noqa: N815  http.server looks for these

    def ask(self, twist, data):
        client = http.client.HTTPConnection(self.server.wicked.upstream, timeout=60)
        kept = {name: value for name, value in self.headers.items() if name not in twist.hide}
        client.request(self.command, self.path, data, kept)
        answer = client.getresponse()
        body = answer.read()
        client.close()
        return answer.status, dict(answer.getheaders()), body

    def answer(self, twist, status, headers, body):
        if twist.flip is not None and body:
            body = body[:twist.flip] + bytes([body[twist.flip] ^ 1]) + body[twist.flip + 1:]
        body += b" " * twist.grow
        if self.command != "HEAD":
            headers["Content-Length"] = str(len(body) + twist.length)
        headers.pop("Date", None)
        if self.server.wicked.relative and "Location" in headers:
            headers["Location"] = headers["Location"].partition(self.server.wicked.host)[2]
        self.send_response(status)
        for name, value in {**headers, **twist.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if twist.cut is None else body[:twist.cut])

    def log_message(self, *args):
        pass
