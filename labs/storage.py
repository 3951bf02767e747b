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

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, NamedTuple

from labs import layer, machine, mounts, process
from labs.errors import BadInput, ChildFailed, KernelError

STORE = f"{machine.DATA}/{machine.PREFIX}volumes"
DATA = "_data"
# moby: daemon/names, RestrictedNamePattern
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
# tar(1): numbers of owners, holes, links, attributes and access lists as they are.
KEEP = ("--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*")
PACK = ("tar", "--create", *KEEP, "--sparse", "--one-file-system", ".")
UNPACK = ("tar", "--extract", *KEEP, "--same-permissions", "--same-owner")
# cp(1), the same for a copy from directory to directory.
COPY = ("cp", "--archive", "--one-file-system", "--no-target-directory", ".")
# POSIX, pax, "ustar Interchange Format": what every archive ends with.
END_OF_TAR = bytes(2 * 512)


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


class Facts(NamedTuple):
    """What a copy of one file must keep.

    Attributes:
        mode: type and permissions, as ls(1) writes them.
        owner: the numbers of user and group.
        links: how many names it has (1 for a directory).
        time: of the last change of the content, in seconds.
        attributes: the extended ones, xattr(7).
        content: SHA-256 of a file, where a link leads, the number of a device.
    """

    mode: str
    owner: tuple[int, int]
    links: int
    time: int
    attributes: dict[str, bytes]
    content: str


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
        name, labels = _check_name(name or os.urandom(32).hex()), dict(labels or {})
        self._open()
        with self._locked(), self._half_made(name) as place:
            if not os.path.exists(f"{self.store}/{name}"):
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
        except (FileNotFoundError, NotADirectoryError):
            raise BadInput("volume", name, "no such volume") from None
        return Volume(name, f"{place}/{DATA}", facts["labels"], facts["created"])

    def find(self, labels: Mapping[str, str] | None = None) -> list[Volume]:
        """Every volume with all of those labels, by name."""
        if not os.path.isdir(self.store):
            return []
        found = [self.get(name) for name in sorted(os.listdir(self.store))
                 if NAME.fullmatch(name) and os.path.exists(f"{self.store}/{name}/volume.json")]
        return [volume for volume in found if (labels or {}).items() <= volume.labels.items()]

    def users(self, name: str) -> list[int]:
        """The processes that have the volume, or a part of it, mounted."""
        path = self.get(name).path
        here = mounts.holding(path)
        inside = mounts.within(here, path)
        return [pid for pid in process.pids() if _binds(pid, here.dev, inside)]

    def remove(self, name: str) -> None:
        """Remove a volume and its data; BadInput while a process has it mounted."""
        self.get(name)
        with self._locked():
            if self.users(name):
                raise BadInput("volume", name, "a process has it mounted")
            gone = f"{self.store}/.{name}-{os.urandom(3).hex()}"
            os.rename(f"{self.store}/{name}", gone)
        machine.remove_tree(gone)

    def prune(self, labels: Mapping[str, str] | None = None) -> list[str]:
        """Remove every volume that no process has mounted, with labels only those that bear them; their names.

        What a killed program left half made goes too.
        """
        self._open()
        with self._locked():
            for place in self._abandoned():
                machine.remove_tree(place)
        unused = [volume.name for volume in self.find(labels) if not self.users(volume.name)]
        for name in unused:
            self.remove(name)
        return unused

    def fill(self, name: str, rootfs: str, path: str = "/") -> bool:
        """Copy what an image holds at path into an empty volume; False, and nothing is done, where Docker does nothing.

        That is: the volume holds anything or is in use, or the image has nothing there.  Owners, modes, times, links
        and extended attributes come along, those of the directory itself too.  The image is not believed: its symbolic
        links lead nowhere but into rootfs (openat2(2), RESOLVE_IN_ROOT).
        """
        volume = self.get(name)
        source = _open_in(rootfs, path)
        if source is None:
            return False
        with mounts.opened(source), self._locked(), self._half_made(name) as place:
            if os.listdir(volume.path) or self.users(name):
                return False
            _run([*COPY, f"{place}/{DATA}"], f"/proc/self/fd/{source}", hide=f"{place}/{DATA}")
            os.rename(f"{place}/{DATA}", volume.path)  # rename(2) replaces an empty directory
        return True

    def backup(self, name: str, file: str) -> int:
        """Write all that the volume holds as a tar file, which appears when it is whole; its size in bytes."""
        path = self.get(name).path
        if not os.path.isdir(folder := os.path.dirname(os.path.abspath(file))):
            raise BadInput("file", file, "there is no such directory")
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            try:
                _run(PACK, path, stdout=part)
                os.rename(part.name, file)
            except BaseException:
                os.unlink(part.name)
                raise
            return os.fstat(part.fileno()).st_size

    def restore(self, name: str, file: str, labels: Mapping[str, str] | None = None) -> Volume:
        """Make a new volume from a tar file, not a compressed one; the name is there only when all of it has been read.

        Raises BadInput for a name that is taken and for a file cut short, ChildFailed where tar fails.
        """
        self._open()
        with _whole_tar(file) as tar, self._half_made(_check_name(name)) as place:
            _run(UNPACK, f"{place}/{DATA}", stdin=tar)
            with self._locked():
                if os.path.exists(f"{self.store}/{name}"):
                    raise BadInput("volume", name, "is there already")
                self._name(place, name, labels or {})
        return self.get(name)

    def _open(self) -> None:
        machine.require()
        os.makedirs(self.store, mode=0o711, exist_ok=True)

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
            os.mkdir(f"{place}/{DATA}", 0o755)
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


def shows(pid: int, target: str, path: str) -> bool:
    """Whether what a process has mounted at target is that directory: device and root of its line in mountinfo."""
    here = mounts.holding(path)
    inside = mounts.within(here, path)
    return any((row.target, row.dev, row.root) == (target, here.dev, inside) for row in mounts.table(pid))


def listing(folder: str) -> dict[str, Facts]:
    """What a copy of a directory must keep: path → Facts, "." first."""
    below = ((path, f"{folder}/{path}", status) for path, status in layer.walk(folder))
    return {path: _facts(place, status) for path, place, status in ((".", folder, os.lstat(folder)), *below)}


def compare(folder: str, copy: str) -> dict[str, tuple[str, ...]]:
    """What differs between a directory and its copy: path → the fields of Facts; {} where all was kept."""
    ours, theirs = listing(folder), listing(copy)
    found = {path: _differing(ours.get(path), theirs.get(path)) for path in sorted(ours | theirs)}
    return {path: fields for path, fields in found.items() if fields}


def _differing(first: Facts | None, second: Facts | None) -> tuple[str, ...]:
    if first is None or second is None:
        return ("missing" if second is None else "added",)
    return tuple(field for field in Facts._fields if getattr(first, field) != getattr(second, field))


def _facts(path: str, status: os.stat_result) -> Facts:
    attributes = {name: os.getxattr(path, name, follow_symlinks=False)
                  for name in os.listxattr(path, follow_symlinks=False)}
    return Facts(stat.filemode(status.st_mode), (status.st_uid, status.st_gid),
                 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink, int(status.st_mtime), attributes,
                 _content(path, status))


def _content(path: str, status: os.stat_result) -> str:
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return os.readlink(path) if stat.S_ISLNK(status.st_mode) else str(status.st_rdev)


def _check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise BadInput("volume", name, "must be letters, digits, _ . and -, two at least, and begin with no sign")
    return name


def _open_in(rootfs: str, path: str) -> int | None:
    """A directory of an image, its links resolved as in a container; None where there is nothing."""
    try:
        return mounts.beneath(rootfs, path, os.O_RDONLY | os.O_DIRECTORY)
    except KernelError as error:
        if error.step != "openat2":  # it is rootfs that is not there
            raise
        if error.errno == errno.ENOENT:
            return None
        raise BadInput("path", path, f"is no directory of the image: {error.strerror}") from error


def _run(words: Sequence[str], folder: str, *, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None,
         hide: str = "") -> None:
    """Run tar or cp in a directory; what it complains of first is the error, without the path to hide."""
    with process.step(words[0]):
        done = subprocess.run(words, cwd=folder, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = os.fsdecode(done.stderr).replace(hide, "") if hide else os.fsdecode(done.stderr)
        # A write(2) of less than was asked for is how a disk gets full; tar only tells how much.
        said = re.sub(r"Wrote only .*", os.strerror(errno.ENOSPC), said.partition("\n")[0])
        raise ChildFailed(words[0], detail=said.removeprefix(f"{words[0]}: ") or f"status {done.returncode}")


@contextmanager
def _whole_tar(file: str) -> Iterator[IO[bytes]]:
    """An archive, open; tar(1) itself takes one that is cut off between two files, or empty, for a whole one."""
    try:
        tar = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise KernelError("open", error.errno or 0, file) from error
    with tar:
        tar.seek(-min(len(END_OF_TAR), os.fstat(tar.fileno()).st_size), os.SEEK_END)
        if tar.read() != END_OF_TAR:
            raise BadInput("file", file, "is no whole tar: it does not end with two blocks of zeros")
        tar.seek(0)
        yield tar


def _binds(pid: int, dev: str, path: str) -> bool:
    """Whether a process has that directory of that filesystem bound, or one in it: the root field of its mounts."""
    with suppress(OSError):  # it ended meanwhile
        return any(row.dev == dev and f"{row.root}/".startswith(f"{path}/") for row in mounts.table(pid))
    return False
