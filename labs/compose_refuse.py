"""What the runner would have to ignore below the keys that it knows: refused by name, with line and column.

compose.refuse_unsupported() sees to the keys of a service, a network, a volume; here are the entries of their lists,
and what cannot be had together. A file that passes both is carried out wholly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from labs.compose_file import Project, error
from labs.compose_yaml import Path

NOT_DONE = "labs does not do this; docker compose does"
# The keys of an entry, by where it stands; () for one that must be empty.
ENTRIES: dict[str, tuple[str, ...]] = {
    "ports": ("target", "published", "protocol", "host_ip", "mode", "name"),
    "volumes": ("type", "source", "target", "read_only", "bind", "volume", "tmpfs"),
    "volumes.bind": ("create_host_path",), "volumes.volume": ("nocopy",), "volumes.tmpfs": (),
    "networks": ("aliases", "ipv4_address"), "secrets": ("source", "target", "mode"),
    "configs": ("source", "target", "mode")}
GRANTED = ("name", "file", "content", "labels")  # the keys of a secret or config
EMPTY: tuple[object, ...] = (None, [], {}, "", False, 0)


def refuse(project: Project) -> None:
    """Raise ComposeError for the first thing that could not be carried out."""
    for name, service in project.services.items():
        for key in ENTRIES:
            _entries(project, name, service, key)
        _volumes(project, name, service)
        _ports(project, name, service)
        _mode(project, name, service)
    for kind in ("secrets", "configs"):
        for name, given in getattr(project, kind).items():
            _known(project, (kind, name), given, GRANTED)
    for name, given in project.networks.items():
        _ipam(project, name, given.get("ipam") or {})


def _known(project: Project, path: Path, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key, value in given.items():
        if key not in known and value not in EMPTY:
            raise error(project, (*path, key), value, NOT_DONE)


def _each(given: Any) -> Iterator[tuple[str | int, Any]]:
    """The entries of a list or a mapping, each with its place."""
    yield from given.items() if isinstance(given, dict) else enumerate(given or ())


def _entries(project: Project, name: str, service: Mapping[str, Any], key: str) -> None:
    top, _, below = key.partition(".")
    for place, entry in _each(service.get(top)):
        given, path = ((entry or {}).get(below), (place, below)) if below else (entry, (place,))
        _known(project, ("services", name, top, *path), given or {}, ENTRIES[key])


def _volumes(project: Project, name: str, service: Mapping[str, Any]) -> None:
    """The kinds of mounts; a tmpfs has no options; what must be there is."""
    for place, text in enumerate(service.get("tmpfs") or ()):
        if ":" in text:
            raise error(project, ("services", name, "tmpfs", place), text, NOT_DONE)
    for place, one in enumerate(service.get("volumes") or ()):
        path = ("services", name, "volumes", place)
        if one["type"] not in ("bind", "volume", "tmpfs"):
            raise error(project, (*path, "type"), one["type"], NOT_DONE)
        wanted = one["type"] == "bind" and not (one.get("bind") or {}).get("create_host_path", True)
        if wanted and not os.path.exists(one["source"]):
            raise error(project, (*path, "source"), one["source"], "it is not there, and is not to be made")


def _mode(project: Project, name: str, service: Mapping[str, Any]) -> None:
    mode = str(service.get("network_mode") or "")
    if mode and mode not in ("none", "host") and not mode.startswith("service:"):
        raise error(project, ("services", name, "network_mode"), mode, NOT_DONE)
    if mode and service.get("ports"):
        raise error(project, ("services", name, "ports"), len(service["ports"]),
                    f"cannot be published with network_mode {mode}")


def _ports(project: Project, name: str, service: Mapping[str, Any]) -> None:
    """Published on IPv4 only, which is what labs.firewall has."""
    for place, port in enumerate(service.get("ports") or ()):
        if ":" in str(port.get("host_ip") or ""):
            raise error(project, ("services", name, "ports", place, "host_ip"), port["host_ip"], NOT_DONE)


def _ipam(project: Project, name: str, ipam: Mapping[str, Any]) -> None:
    """One IPv4 subnet and its gateway."""
    path = ("networks", name, "ipam")
    if ipam.get("driver", "default") != "default":
        raise error(project, (*path, "driver"), ipam["driver"], NOT_DONE)
    for place, one in enumerate(ipam.get("config") or ()):
        _known(project, (*path, "config", place), one, ("subnet", "gateway"))
        if place or ":" in str(one.get("subnet", "")):
            raise error(project, (*path, "config", place), one, "must be one IPv4 subnet: " + NOT_DONE)

