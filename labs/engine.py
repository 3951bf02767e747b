"""The Docker Engine API by hand: HTTP on a Unix socket, and the frames in which it sends a container's output."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

SOCKET = "/var/run/docker.sock"
STREAMS = ("stdin", "stdout", "stderr")
HEADER = struct.Struct(">BxxxL")  # which stream, three zero bytes, how many bytes follow


class Reply(NamedTuple):
    """What the daemon answered.

    Attributes:
        status: of HTTP: 200 OK, 201 Created, 204 No Content, 404 Not Found, …
        body: as it came.
    """

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body as a value."""
        return json.loads(self.body)


def connect() -> socket.socket:
    """A connection to dockerd; it is a stream of bytes, unix(7)."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(SOCKET)
    except OSError:
        connection.close()
        raise
    return connection


def ask(method: str, path: str, body: object = None) -> Reply:
    """One request, and the whole answer: ask("GET", "/version").json."""
    client = http.client.HTTPConnection("docker")  # no host is asked for: the socket is there already
    client.sock = connect()
    try:
        text = None if body is None else json.dumps(body)
        client.request(method, path, text, {"Content-Type": "application/json"})
        answer = client.getresponse()
        return Reply(answer.status, answer.read())
    finally:
        client.close()


def frames(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """What a container without a terminal wrote: (stream, bytes), until the stream ends."""
    while len(header := stream.read(HEADER.size)) == HEADER.size:
        number, size = HEADER.unpack(header)
        yield STREAMS[number], stream.read(size)
