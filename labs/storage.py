"""Volumes: directories with a name that outlive every container, filled once, saved and restored as a tar.

A volume is no object of the kernel's: it is a directory, and what makes it a volume is that it is bound
into mount namespaces, mount(2) and open_tree(2).  Whether one is in use is therefore asked of the kernel, in
proc_pid_mountinfo(5) of every process, and of nobody's list.

The store is one directory; Docker's is /var/lib/docker/volumes, this one's has the same shape::

    STORE/NAME/_data           what is bound
    STORE/NAME/volume.json     labels and the time it was made
    STORE/.NAME-3fa94e         one that is being made or removed: it has no name yet, or none any more
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

from labs import machine, mounts, process
from labs.errors import BadInput, ChildFailed

STORE = f"{machine.DATA}/volumes"
DATA = "_data"
# moby: daemon/names, RestrictedNamePattern
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")


class Volume(NamedTuple):
    """One volume.

    Attributes:
        name: unique in its store.
        path: the directory that holds its data, on the host.
        labels: what its maker wrote on it.
        created: seconds since the epoch.
    """

    name: str
    path: str
    labels: dict[str, str]
    created: float


class Volumes:
    """The volumes of one store.

    Every change is one rename(2) or holds a lock on the store (flock(2)), so that two programs may work on the same
    store, and one that is killed leaves no half volume under a name.
    """

    def __init__(self, store: str = STORE) -> None:
        self.store = store

    def create(self, name: str | None = None, labels: Mapping[str, str] | None = None) -> Volume:
        """Make an empty volume of root's, or return the one of that name; without a name it gets 64 hex digits.

        Raises BadInput for a name that Docker refuses, and for other labels on a volume that is there.
        """
        machine.require()
        name, labels = _check_name(name or os.urandom(32).hex()), dict(labels or {})
        os.makedirs(self.store, mode=0o711, exist_ok=True)
        with self._locked(), self._half_made(name) as place:
            if not os.path.exists(f"{self.store}/{name}"):
                _made(f"{place}/{DATA}")
                self._name(place, name, labels)
        volume = self.get(name)
        if labels not in ({}, volume.labels):
            raise BadInput("labels", labels, f"volume {name} is there with {volume.labels}")
        return volume

    def get(self, name: str) -> Volume:
        """The volume of that name; BadInput when there is none."""
        place = f"{self.store}/{_check_name(name)}"
        try:
            with open(f"{place}/volume.json", encoding="utf-8") as file:
                facts = json.load(file)
        except FileNotFoundError:
            raise BadInput("volume", name, "no such volume") from None
        return Volume(name, f"{place}/{DATA}", facts["labels"], facts["created"])

    def list(self, labels: Mapping[str, str] | None = None) -> list[Volume]:
        """Every volume with all of those labels, by name."""
        if not os.path.isdir(self.store):
            return []
        found = [self.get(name) for name in sorted(os.listdir(self.store)) if not name.startswith(".")]
        return [volume for volume in found if (labels or {}).items() <= volume.labels.items()]

    def users(self, name: str) -> list[int]:
        """The processes that have the volume, or a part of it, mounted."""
        path = self.get(name).path
        here = mounts.holding(path)
        inside = mounts.within(here, path)
        return [pid for pid in process.pids() if _binds(pid, here.dev, inside)]

    def remove(self, name: str) -> None:
        """Remove a volume and its data; BadInput while a process has it mounted."""
        with self._locked():
            if users := self.users(name):
                raise BadInput("volume", name, f"is mounted by process {users[0]}")
            gone = f"{self.store}/.{name}-{os.urandom(3).hex()}"
            os.rename(f"{self.store}/{name}", gone)
        machine.remove_tree(gone)

    def prune(self, labels: Mapping[str, str] | None = None) -> list[str]:
        """Remove every volume that no process has mounted, with labels only those that bear them; their names.

        What a killed program left half made goes too.
        """
        with self._locked():
            for place in self._abandoned():
                machine.remove_tree(place)
        unused = [volume.name for volume in self.list(labels) if not self.users(volume.name)]
        for name in unused:
            self.remove(name)
        return unused

    def fill(self, name: str, source: str) -> bool:
        """Copy a directory of an image into an empty volume; False, and nothing is done, when it holds anything.

        Owners, modes, times, links and extended attributes come along, those of the directory itself too: so Docker
        does it at the first start of a container that mounts the volume there.
        """
        volume = self.get(name)
        with self._locked(), self._half_made(name) as place:
            if os.listdir(volume.path):
                return False
            _tar("--create", source, out := f"{place}/tar")
            _tar("--extract", _made(f"{place}/{DATA}"), out)
            os.rename(f"{place}/{DATA}", volume.path)  # rename(2) replaces an empty directory
        return True

    def backup(self, name: str, file: str) -> int:
        """Write all that the volume holds as a tar file, which appears when it is whole; its size in bytes."""
        part = f"{file}.{os.urandom(3).hex()}"
        try:
            _tar("--create", self.get(name).path, part)
            os.rename(part, file)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)
        return os.stat(file).st_size

    def restore(self, name: str, file: str, labels: Mapping[str, str] | None = None) -> Volume:
        """Make a new volume from a tar file; the name is there only when all of it has been read."""
        os.makedirs(self.store, mode=0o711, exist_ok=True)
        with self._half_made(_check_name(name)) as place:
            _tar("--extract", _made(f"{place}/{DATA}"), file)
            with self._locked():
                if os.path.exists(f"{self.store}/{name}"):
                    raise BadInput("volume", name, "is there already")
                self._name(place, name, labels or {})
        return self.get(name)

    def _name(self, place: str, name: str, labels: Mapping[str, str]) -> None:
        """Turn a directory that is ready into the volume of that name."""
        with open(f"{place}/volume.json", "w", encoding="utf-8") as out:
            json.dump({"labels": dict(labels), "created": time.time()}, out)
        os.chmod(place, 0o711)  # noqa: S103  as Docker's: who knows the path may pass
        os.rename(place, f"{self.store}/{name}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One change of the store at a time."""
        with open(f"{self.store}/.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _half_made(self, name: str) -> Iterator[str]:
        """A directory beside the volumes, held by a lock of its own; removed at the end if it is still there."""
        place = tempfile.mkdtemp(prefix=f".{name}-", dir=self.store)
        held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield place
        finally:
            os.close(held)
            machine.remove_tree(place)

    def _abandoned(self) -> Iterator[str]:
        """The directories whose maker was killed: nobody holds their lock."""
        for entry in os.scandir(self.store):
            if not (entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)):
                continue
            held = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield entry.path
            except BlockingIOError:
                continue
            finally:
                os.close(held)


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadInput("volume", name, "must be letters, digits, _ . and -, two at least, and begin with no sign")
    return name


def _made(folder: str) -> str:
    os.mkdir(folder, 0o755)
    return folder


def _tar(action: str, folder: str, file: str) -> None:
    """tar(1) from or to a directory: numbers of owners, holes, links, attributes and access lists as they are."""
    words = ["tar", action, f"--file={file}", f"--directory={folder}", "--numeric-owner", "--acls", "--xattrs",
             "--xattrs-include=*"]
    words += ["--sparse", "--one-file-system", "."] if action == "--create" else ["--same-permissions", "--same-owner"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildFailed("tar", detail=done.stderr.strip().splitlines()[0])


def _binds(pid: int, dev: str, path: str) -> bool:
    """Whether a process has that directory of that filesystem bound, or one in it: the root field of its mounts."""
    with suppress(OSError):  # it ended meanwhile
        return any(row.dev == dev and f"{row.root}/".startswith(f"{path}/") for row in mounts.table(pid))
    return False
