"""The root file system of an image while it is being built: its layers stacked by overlay, mounted nowhere.

fsmount(2) gives an overlay as an open directory, before it is attached anywhere.  Every path in it is resolved
by openat2(2) with that directory as "/", so that no symbolic link of an image leads out of it.  What is written
goes to the upper directory: that is the layer.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from labs import layer, machine, mounts, syscalls
from labs.container import Ids
from labs.errors import BadInput, KernelError
from labs.mounts import opened

IN_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
WHOLE_FILE = 1 << 20  # passwd and group larger than this are not read


class Item(NamedTuple):
    """A file to copy: where it can be read now, its path below the destination ("": that itself), what it is."""

    place: str
    path: str
    status: os.stat_result


class Root:
    """An image's root file system as an open directory; ``upper`` is the path of its upper directory."""

    def __init__(self, fd: int, upper: str) -> None:
        self.fd, self.upper = fd, upper

    def open(self, path: str, flags: int = os.O_PATH) -> int:
        """openat2(2): no path and no symbolic link leads out of the image."""
        return syscalls.openat2(self.fd, path.strip("/") or ".", flags, IN_ROOT)

    def is_folder(self, path: str) -> bool:
        """Whether a path leads to a directory."""
        try:
            os.close(self.open(path, os.O_PATH | os.O_DIRECTORY))
        except KernelError:
            return False
        return True

    def folder(self, path: str, owner: tuple[int, int] = (0, 0)) -> int:
        """A directory, opened; what is missing of it is made, with mode 755 and that owner."""
        try:
            return self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except KernelError as error:
            if error.errno == errno.ENOTDIR:
                raise BadInput("destination", path, "must be a directory; the image has something else") from error
            if error.errno != errno.ENOENT:
                raise
        above, name = os.path.split(path.rstrip("/"))
        with opened(self.folder(above, owner)) as parent:
            _make_folder(parent, name, path, owner)
        return self.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def real(self, path: str) -> str:
        """A path without the symbolic links that are in it, relative to the root; what is missing stays as written."""
        try:
            fd = self.open(path)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise
            above, name = os.path.split(path.rstrip("/"))
            return os.path.join(self.real(above), name)
        with opened(fd):
            return os.readlink(f"/proc/self/fd/{fd}").removeprefix("/")

    def before(self, paths: Iterable[str]) -> dict[str, os.stat_result | None]:
        """What is at each of those paths and on the way to it, or None: forget() asks for it."""
        found: dict[str, os.stat_result | None] = {}
        for real in map(self.real, paths):
            path = real
            while path and path not in found:
                try:
                    found[path] = os.stat(path, dir_fd=self.fd, follow_symlinks=False)
                except FileNotFoundError:
                    found[path] = None
                path = os.path.dirname(path)
        return found

    # Who somebody is: passwd(5) and group(5) of the image

    def lines(self, path: str) -> list[list[str]]:
        """The lines of a table such as /etc/passwd, taken apart; none where there is no such file."""
        try:
            fd = self.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return []
            raise
        with open(fd, encoding="utf-8", errors="surrogateescape") as file:
            return [line.split(":") for line in file.read(WHOLE_FILE).splitlines() if line.count(":") >= 3]

    def user(self, given: str) -> tuple[Ids, str]:
        """USER: name or uid, then maybe : and group or gid.  The ids, and the home directory.

        Without a group: that of passwd(5) and those that group(5) lists the user in; of an unknown uid, group 0.
        """
        name, _, group = (given or "0").partition(":")
        row = next((row for row in self.lines("/etc/passwd") if name in (row[0], row[2]) and len(row) >= 6), None)
        if row is None and not name.isdecimal():
            raise BadInput("user", name, "no such user in the image's /etc/passwd")
        uid, gid, home = (int(row[2]), int(row[3]), row[5]) if row else (int(name), 0, "/")
        if group:
            return Ids(uid, self.group(group)), home
        table = self.lines("/etc/group")
        return Ids(uid, gid, tuple(int(line[2]) for line in table if row and row[0] in line[3].split(","))), home

    def group(self, given: str) -> int:
        """A group's number, from its name or its number."""
        row = next((row for row in self.lines("/etc/group") if given == row[0]), None)
        if row is None and not given.isdecimal():
            raise BadInput("group", given, "no such group in the image's /etc/group")
        return int(row[2] if row else given)

    def owner(self, given: str) -> tuple[int, int]:
        """--chown: as USER, but a number alone is the group's number too."""
        ids, _ = self.user(f"{given}:{given}" if given.isdecimal() else given)
        return ids.uid, ids.gid

    # What is put into it

    def put(self, items: Sequence[Item], destination: str, *, owner: tuple[int, int] | None, mode: int | None) -> None:
        """Copy items to a destination, which is made; owner and mode: None leaves those that they have.

        A directory that is there already keeps its own if it is the destination itself.
        """
        folders, first = list[tuple[str, Item]](), dict[tuple[int, int], str]()
        for item in items:
            path = os.path.join(destination, item.path) if item.path else destination
            if not stat.S_ISDIR(item.status.st_mode):
                with opened(self.folder(os.path.dirname(path), owner or (0, 0))) as parent:
                    target = f"/proc/self/fd/{parent}/{os.path.basename(path)}"
                    _clear(target, path)
                    known = first.setdefault((item.status.st_dev, item.status.st_ino), path)
                    if known != path:  # a further name of a file that is copied already
                        os.link(known.lstrip("/"), target, src_dir_fd=self.fd, follow_symlinks=False)
                    else:
                        _copy(item, target)
                        _dress(target, item, owner, mode)
            elif item.path or not self.is_folder(path):
                with opened(self.folder(path, owner or (0, 0))) as folder:
                    _dress(f"/proc/self/fd/{folder}", item, owner, mode)
                folders.append((path, item))
        for path, item in reversed(folders):  # each entry made in a directory changed its time
            with opened(self.folder(path)) as folder:
                os.utime(folder, ns=(item.status.st_mtime_ns, item.status.st_mtime_ns))


def _make_folder(parent: int, name: str, path: str, owner: tuple[int, int]) -> None:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError as error:
        raise BadInput("destination", path, "the image has a symbolic link there that leads nowhere") from error
    os.chown(name, *owner, dir_fd=parent)
    os.chmod(name, 0o755, dir_fd=parent)  # noqa: S103  as mkdir(1) makes it; the umask would take from it


def _clear(target: str, path: str) -> None:
    """Make way for a file: another that has the name is replaced."""
    try:
        os.unlink(target)
    except FileNotFoundError:
        pass
    except IsADirectoryError as error:
        raise BadInput("destination", path, "must not be a directory: a file is copied there") from error


def _copy(item: Item, target: str) -> None:
    """Make one file that is no directory."""
    kind = stat.S_IFMT(item.status.st_mode)
    if kind == stat.S_IFREG:
        with open(item.place, "rb") as source, open(target, "xb") as out:
            shutil.copyfileobj(source, out, layer.BLOCK)
    elif kind == stat.S_IFLNK:
        os.symlink(os.readlink(item.place), target)
    elif kind != stat.S_IFSOCK:
        os.mknod(target, kind | 0o600, item.status.st_rdev)


def _dress(target: str, item: Item, owner: tuple[int, int] | None, mode: int | None) -> None:
    """Owner, mode, attributes, times, in this order: a change of owner clears set-user-ID, chown(2)."""
    follow = stat.S_ISDIR(item.status.st_mode)  # a directory is given by its descriptor
    uid, gid = owner or (item.status.st_uid, item.status.st_gid)
    os.chown(target, uid, gid, follow_symlinks=follow)
    if not stat.S_ISLNK(item.status.st_mode):
        os.chmod(target, stat.S_IMODE(item.status.st_mode) if mode is None else mode)
        for name in os.listxattr(item.place):
            if not name.startswith(layer.OVERLAY_ATTRIBUTES):
                os.setxattr(target, name, os.getxattr(item.place, name))
    os.utime(target, ns=(item.status.st_mtime_ns, item.status.st_mtime_ns), follow_symlinks=follow)


@contextmanager
def mounted(folder: str, layers: Sequence[str]) -> Iterator[Root]:
    """The layers (directories, the lowest first; maybe none), and over them a new upper directory inside folder."""
    machine.require()
    place = tempfile.mkdtemp(dir=folder)
    try:
        for part in ("upper", "work", "empty"):
            os.mkdir(f"{place}/{part}")
        os.chmod(f"{place}/upper", 0o755)  # noqa: S103  the root directory of the image
        tree = mounts.overlay_tree(layers[::-1] or [f"{place}/empty"], f"{place}/upper", f"{place}/work")
        with opened(tree), opened(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)) as fd:
            yield Root(fd, f"{place}/upper")
    finally:
        machine.remove_tree(place)


def forget(upper: str, before: Mapping[str, os.stat_result | None]) -> None:
    """Take out of an upper directory what only served as a mount point: what is empty there, and was not made before.

    A directory of a lower layer was copied up when a mount point was made in it, with all that it had.
    """
    for path, was in sorted(before.items(), reverse=True):
        place = os.path.join(upper, path)
        with suppress(FileNotFoundError, NotADirectoryError):
            now = os.lstat(place)
            if stat.S_ISREG(now.st_mode) and was is None and now.st_size == 0:
                os.unlink(place)
            elif stat.S_ISDIR(now.st_mode) and not os.listdir(place) and (was is None or _same(place, was, now)):
                os.rmdir(place)


def _same(place: str, was: os.stat_result, now: os.stat_result) -> bool:
    """Whether a directory still is what it was in the lower layers, and shows what they have in it."""
    return (was.st_mode, was.st_uid, was.st_gid) == (now.st_mode, now.st_uid, now.st_gid) and (
        layer.OVERLAY_OPAQUE not in os.listxattr(place))
