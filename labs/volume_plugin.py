"""A volume driver for Docker and Podman: the plugin protocol over our own store of volumes.

Docker: "Docker volume plugins" and "Plugin API" (docs.docker.com/engine/extend).  An engine finds the driver called
NAME at its socket /run/docker/plugins/NAME.sock, asks once what it implements, and then posts JSON to
/VolumeDriver.Create, Mount, Path, Unmount, Remove, Get, List and Capabilities.  Every answer has "Err", which is empty
where all is well.  The engine binds what Mount names into the container: data never passes through the plugin.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple

from labs import machine
from labs.errors import BadInput, LabError
from labs.storage import Volume, Volumes

SOCKETS = "/run/docker/plugins"
MEDIA_TYPE = "application/vnd.docker.plugins.v1.2+json"


class Call(NamedTuple):
    """One request of an engine and our answer."""

    method: str
    request: dict[str, Any]
    answer: dict[str, Any]


class Driver:
    """The driver: one method a request, and the list of what was asked.

    Attributes:
        volumes: the store.
        calls: every Call so far, the oldest first.
        mounted: for each volume, the ids under which engines have asked for it.
    """

    def __init__(self, volumes: Volumes) -> None:
        self.volumes, self.calls, self.mounted = volumes, list[Call](), dict[str, set[str]]()
        self._lock, self._told = threading.Lock(), 0

    def answer(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request; what cannot be done stands in "Err"."""
        with self._lock:
            try:
                reply = self._methods()[method](request)
            except KeyError as missing:
                reply = {"Err": f"{method}: {missing} is not known"}
            except LabError as error:
                reply = {"Err": str(error)}
            self.calls.append(Call(method, request, reply))
            return reply

    def news(self) -> list[str]:
        """What was asked since news() was called last, in short: ["Create", "Mount"]."""
        with self._lock:
            fresh, self._told = self.calls[self._told:], len(self.calls)
        return [call.method.removeprefix("VolumeDriver.") for call in fresh]

    def _methods(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {
            "Plugin.Activate": lambda _: {"Implements": ["VolumeDriver"]},
            "VolumeDriver.Capabilities": lambda _: {"Capabilities": {"Scope": "local"}, "Err": ""},
            "VolumeDriver.Create": self._create,
            "VolumeDriver.Remove": self._remove,
            "VolumeDriver.Mount": self._mount,
            "VolumeDriver.Unmount": self._unmount,
            "VolumeDriver.Path": lambda asked: {"Mountpoint": self.volumes.get(asked["Name"]).path, "Err": ""},
            "VolumeDriver.Get": lambda asked: {"Volume": _row(self.volumes.get(asked["Name"])), "Err": ""},
            "VolumeDriver.List": lambda _: {"Volumes": [_row(one) for one in self.volumes.find()], "Err": ""},
        }

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        if options := asked.get("Opts"):
            raise BadInput("Opts", options, "this driver has no options")
        self.volumes.create(asked["Name"])
        return {"Err": ""}

    def _remove(self, asked: dict[str, Any]) -> dict[str, Any]:
        if users := self.mounted.get(asked["Name"]):
            raise BadInput("volume", asked["Name"], f"is mounted for {min(users)[:12]}")
        self.volumes.remove(asked["Name"])
        return {"Err": ""}

    def _mount(self, asked: dict[str, Any]) -> dict[str, Any]:
        path = self.volumes.get(asked["Name"]).path
        self.mounted.setdefault(asked["Name"], set()).add(asked["ID"])
        return {"Mountpoint": path, "Err": ""}

    def _unmount(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.mounted.get(asked["Name"], set()).discard(asked["ID"])
        return {"Err": ""}


def _row(volume: Volume) -> dict[str, Any]:
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(volume.created))
    return {"Name": volume.name, "Mountpoint": volume.path, "CreatedAt": created, "Status": {}}


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, driver: Driver) -> None:
        self.driver = driver
        super().__init__(path, _Handler)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, one request a connection: nobody is served any more when the driver has gone."""

    server: _Server
    timeout = 30.0

    def do_POST(self) -> None:
        """One request: the path is the method, the body its JSON, which Docker leaves out where there is nothing."""
        try:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = json.loads(body or b"{}") or {}
        except ValueError:
            request = None
        if isinstance(request, dict):
            answer = self.server.driver.answer(self.path[1:], request)
        else:
            answer = {"Err": "the body is no JSON object"}
        text = json.dumps(answer).encode()
        self.send_response(500 if answer.get("Err") else 200)
        self.send_header("Content-Type", MEDIA_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        """A socket without an address: unix(7)."""
        return ""

    def log_message(self, *_: object) -> None:
        """Driver.calls is the log."""


def _answers(path: str) -> bool:
    """Whether somebody listens there; a program that was killed leaves its socket's file behind."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


@contextmanager
def serve(volumes: Volumes, name: str = "labs") -> Iterator[Driver]:
    """A driver called name, as long as the block lasts; BadInput when one of that name answers already."""
    machine.require()
    os.makedirs(SOCKETS, exist_ok=True)
    driver, path = Driver(volumes), f"{SOCKETS}/{name}.sock"
    with suppress(FileNotFoundError):
        if _answers(path):
            raise BadInput("name", name, f"{path} has a driver already")
        os.unlink(path)
    with _Server(path, driver) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield driver
        finally:
            server.shutdown()
            thread.join()
            os.unlink(path)
