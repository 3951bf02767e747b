"""A web application that counts its visits in redis: what the compose chapter runs behind nginx."""

import os
import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server

import redis

store = redis.Redis(host=os.environ["REDIS_HOST"], port=int(os.environ.get("REDIS_PORT", "6379")))


class ThreadingServer(ThreadingMixIn, WSGIServer):
    """A thread a request."""

    daemon_threads = True


def application(environ: dict[str, str], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Answer `/` with the visit count and this host's name, `/healthz` with redis's state; 503 without redis."""
    status = "200 OK"
    try:
        if environ["PATH_INFO"] == "/healthz":
            store.ping()
            body = "ok\n"
        else:
            body = f"visits {store.incr('visits')} from {socket.gethostname()}\n"
    except redis.RedisError as error:
        status, body = "503 Service Unavailable", f"redis: {error}\n"
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [body.encode()]


if __name__ == "__main__":
    with make_server("", int(os.environ.get("PORT", "8000")), application, server_class=ThreadingServer) as server:
        server.serve_forever()
