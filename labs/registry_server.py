"""A real registry of one's own: Debian's docker-registry on a free port of the loopback interface.

It keeps everything in one directory below /var/lib/labs that is gone with it, writes down each request, and dies with
whoever started it.  With a user and a password it asks for tokens, as the registries on the Internet do (distribution:
docs/content/spec/auth/token.md); a token service of a few lines signs them with a key that openssl makes.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from labs import machine, process, syscalls
from labs.errors import BadInput, ChildFailed
from labs.image import DIGEST

SERVICE = "labs-registry"
STORE = "docker/registry/v2"  # below the root directory: where the registry's filesystem driver begins
TOKEN_SECONDS = 300
# One line of the access log, in the Combined Log Format.
ACCESS = re.compile(r'"(\w+) ([^ ?]+)\S* HTTP/[\d.]+" (\d+) (\d+) "[^"]*" "([^"]*)"')
KINDS = {"/manifests/sha256:": "manifest by digest", "/manifests/": "manifest by tag", "/blobs/uploads/": "upload",
         "/blobs/": "blob", "/tags/list": "tags", "/referrers/": "referrers"}


class Request(NamedTuple):
    """One request as the registry saw it.

    Attributes:
        method, path: of HTTP; the path without its query.
        status, size: of the answer; size is bytes of body.
        agent: the program that asked, as it calls itself.
    """

    method: str
    path: str
    status: int
    size: int
    agent: str

    @property
    def what(self) -> str:
        """What was asked for: "manifest by tag", "blob", "upload" and so on."""
        return next((name for part, name in KINDS.items() if part in self.path), "ping")

    @property
    def digest(self) -> str:
        """The digest in the path, or nothing."""
        return (DIGEST.search(self.path) or [""])[0]


class Server:
    """A running registry.

    Attributes:
        host: "127.0.0.1:PORT", as it stands in an image's name.
        root: the directory in which it keeps blobs and repositories (STORE is below it).
        pid: the process, another one after garbage_collect().
    """

    def __init__(self, folder: str, port: int, auth: dict[str, Any]) -> None:
        self.host, self.root, self._folder = f"127.0.0.1:{port}", f"{folder}/store", folder
        self._config = f"{folder}/config.yml"
        with open(self._config, "w", encoding="utf-8") as file:
            json.dump(_config(self.root, self.host, auth), file, indent=1)  # JSON is YAML
        self.start()

    def start(self) -> None:
        """Start the registry and wait until it answers."""
        self._child = process.spawn(["docker-registry", "serve", self._config], first=self._prepare)
        self.pid = self._child.pid
        try:
            process.until(self._answers, 60, "an answer of the registry")
        except BaseException:
            self.stop()
            raise

    def _prepare(self) -> None:
        """In the child: die with the parent, stand in the folder (lab.clean finds it there), write the log."""
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(self._folder)
        for fd, name in ((1, "access.log"), (2, "error.log")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), fd)

    def _answers(self) -> bool:
        if process.readable(self._child.pidfd, 0):
            raise ChildFailed("docker-registry serve", detail="ended at its start")
        client = http.client.HTTPConnection(self.host, timeout=5)
        try:
            client.request("GET", "/v2/", headers={"User-Agent": "labs-ready"})
            return client.getresponse().status in (200, 401)
        except ConnectionRefusedError:
            return False
        finally:
            client.close()

    def stop(self) -> None:
        """End the registry and wait for its end; may be called twice."""
        if self._child.ended is None:
            with self._child as child:
                child.stop()

    def garbage_collect(self, untagged: bool = False) -> list[str]:
        """Stop, remove the blobs that no manifest needs, start again on the same port; their digests.

        untagged: first remove the manifests that no tag names.
        """
        self.stop()
        try:
            command = ["docker-registry", "garbage-collect", *(["--delete-untagged"] * untagged), self._config]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        finally:
            self.start()
        return sorted(re.findall(r"^blob eligible for deletion: (\S+)$", told, re.MULTILINE))

    def requests(self, after: int = 0) -> list[Request]:
        """The access log from its line number `after` on, without the questions whether it is ready."""
        with open(f"{self._folder}/access.log", encoding="utf-8") as file:
            rows = [found.groups() for line in file if (found := ACCESS.search(line))]
        return [Request(method, path, int(status), int(size), agent)
                for method, path, status, size, agent in rows if agent != "labs-ready"][after:]

    def files(self) -> list[tuple[str, str]]:
        """Every blob and every link that it keeps: the path below STORE, and the digest of the blob it is or names."""
        top, found = f"{self.root}/{STORE}", []
        for folder, _, names in os.walk(top):
            for name in names:
                with open(f"{folder}/{name}", encoding="ascii", errors="replace") as file:
                    digest = file.read() if name == "link" else f"sha256:{os.path.basename(folder)}"
                found.append((os.path.relpath(f"{folder}/{name}", top), digest))
        return sorted(found)

    def size(self) -> int:
        """The bytes of all blobs on its disk."""
        return sum(os.path.getsize(self.blob(digest)) for path, digest in self.files() if path.endswith("/data"))

    def blob(self, digest: str) -> str:
        """The file in which it keeps a blob."""
        algorithm, _, digits = digest.partition(":")
        return f"{self.root}/{STORE}/blobs/{algorithm}/{digits[:2]}/{digits}/data"


@contextmanager
def serve(*, auth: tuple[str, str] | None = None, under: str = machine.DATA) -> Iterator[Server]:
    """A registry until the end of the block; auth: the one user and password that it lets in (else: everybody).

    It lives in a new directory under the one given, which goes with it.
    """
    machine.require()
    os.makedirs(under, exist_ok=True)
    folder = f"{under}/{machine.new_name('registry')}"
    os.mkdir(folder, 0o700)
    os.mkdir(f"{folder}/store")
    with ExitStack() as undo:
        undo.callback(machine.remove_tree, folder)
        token = undo.enter_context(_token_service(folder, auth)) if auth else {}
        server = Server(folder, _free_port(), token)
        undo.callback(server.stop)
        yield server


def _free_port() -> int:
    """A port that nobody listens on now: bind(2) with port 0 lets the kernel choose."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _config(root: str, host: str, auth: dict[str, Any]) -> dict[str, Any]:
    """The registry's configuration (distribution: docs/configuration.md): storage with delete on, one address."""
    return {
        "version": "0.1", "log": {"level": "warn"}, **auth,
        "storage": {"filesystem": {"rootdirectory": root}, "delete": {"enabled": True},
                    "maintenance": {"uploadpurging": {"enabled": False}}},
        "http": {"addr": host, "secret": os.urandom(16).hex()}}


# Tokens


@contextmanager
def _token_service(folder: str, auth: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """Answer requests for tokens in a thread; what the registry's configuration needs to trust them."""
    if ":" in auth[0]:
        raise BadInput("user", auth[0], "must not have a colon in it: RFC 7617")
    key, certificate = f"{folder}/key.pem", f"{folder}/certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "2", "-subj", f"/CN={SERVICE}",
                    "-keyout", key, "-out", certificate], check=True, capture_output=True)
    service = ThreadingHTTPServer(("127.0.0.1", 0), _TokenHandler)
    service.__dict__.update(key=key, certificate=certificate, basic=_basic(*auth), user=auth[0])
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield {"auth": {"token": {"realm": f"http://127.0.0.1:{service.server_port}/token", "service": SERVICE,
                                  "issuer": SERVICE, "rootcertbundle": certificate}}}
    finally:
        service.shutdown()
        thread.join()
        service.server_close()


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class _TokenHandler(BaseHTTPRequestHandler):
    """GET /token?service=…&scope=…: a token for the user, 401 for everybody else."""

    timeout = 10

    def do_GET(self) -> None:
        own: Any = self.server
        allowed = self.headers.get("Authorization") == own.basic
        scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
        token = sign(claims(own.user, scopes), own.key, own.certificate) if allowed else ""
        body = json.dumps({"token": token, "expires_in": TOKEN_SECONDS} if allowed else
                          {"errors": [{"code": "UNAUTHORIZED", "message": "wrong user or password"}]}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name in http.server
        """Nothing on standard error."""


def claims(user: str, scopes: list[str]) -> dict[str, Any]:
    """What a token says: who may do what, from when to when (distribution: spec/auth/jwt.md)."""
    access = []
    for scope in " ".join(scopes).split():
        kind, _, rest = scope.partition(":")
        name, _, actions = rest.rpartition(":")
        access.append({"type": kind, "name": name, "actions": actions.split(",")})
    now = int(time.time())
    return {"iss": SERVICE, "sub": user, "aud": SERVICE, "jti": os.urandom(8).hex(), "access": access,
            "iat": now, "nbf": now - 10, "exp": now + TOKEN_SECONDS}


def sign(value: dict[str, Any], key: str, certificate: str) -> str:
    """A JSON Web Token: header.claims.signature, each in base64url without padding (RFC 7515, RS256)."""
    with open(certificate, encoding="ascii") as file:
        der = "".join(file.read().split("-----")[2].split())
    header = {"typ": "JWT", "alg": "RS256", "x5c": [der]}
    text = b".".join(_base64url(json.dumps(part).encode()) for part in (header, value))
    command = ["openssl", "dgst", "-sha256", "-sign", key]
    signature = subprocess.run(command, input=text, capture_output=True, check=True).stdout
    return (text + b"." + _base64url(signature)).decode()


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
