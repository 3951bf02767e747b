"""Layers: a tar stream becomes a directory that overlay can mount, and such a directory becomes a tar again.

A layer holds what changed against the layers below it, image-spec/layer.md.  What was removed stands in
the tar as an empty file ``.wh.NAME`` (a whiteout) or ``.wh..wh..opq`` (an opaque whiteout); overlay
writes a character device 0:0 and the attribute ``trusted.overlay.opaque``, overlayfs.rst.

Nothing in a layer is believed.  Every path is resolved by the kernel beneath the target (openat2(2)),
and what no honest tool writes is refused by name before anything of that entry is made.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import queue
import stat
import tarfile
import threading
import zlib
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from decimal import Decimal, InvalidOperation
from typing import Any, BinaryIO, Literal, NamedTuple

import zstandard
from isal import igzip, igzip_lib

from labs import machine, mounts, syscalls
from labs.errors import BadInput, KernelError

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
OVERLAY_OPAQUE = "trusted.overlay.opaque"
OVERLAY_ATTRIBUTES = ("trusted.overlay.", "user.overlay.")
XATTR = "SCHILY.xattr."  # the key of an extended attribute in a pax header, star(5)
BLOCK = 1 << 20
AHEAD = 8  # blocks that the reading thread may be ahead
HEADER_BYTES = 1 << 20  # what the headers of one entry may hold
OPEN = 64  # directories kept open
NOBODY_AT_ALL = (1 << 32) - 1  # (uid_t) -1
DEFAULT_ACL = "system.posix_acl_default"  # what new files in a directory inherit, acl(5)
DEVICES = {(stat.S_IFCHR, d.major, d.minor) for d in mounts.DEVICES} | {(stat.S_IFCHR, 5, 1), (stat.S_IFCHR, 5, 2)}
BROKEN: tuple[type[Exception], ...] = (
    tarfile.TarError, EOFError, zlib.error, igzip.BadGzipFile, igzip_lib.IsalError, zstandard.ZstdError,  # type: ignore[assignment]
    InvalidOperation, RecursionError, OverflowError, ValueError)


class Limits(NamedTuple):
    """How much one layer may hold: bytes when unpacked (headers and holes count too), and entries."""

    size: int = 16 << 30
    entries: int = 2_000_000


LIMITS = Limits()


class Unpacked(NamedTuple):
    """What was unpacked.

    Attributes:
        digest: of the bytes as they came, compressed or not: what a descriptor names.
        size: how many those were.
        diff_id: the digest of the tar itself: what the image's configuration names.
        entries: how many entries the tar has.
        unpacked: bytes of the tar.
    """

    digest: str
    size: int
    diff_id: str
    entries: int
    unpacked: int


class Packed(NamedTuple):
    """What was packed: the digest of the tar, its entries, its bytes."""

    diff_id: str
    entries: int
    size: int


# Reading ahead: one thread reads, hashes and decompresses (all without the interpreter's lock), one writes files.


class _Hashing(io.RawIOBase):
    """Passes bytes on from a file, and takes their digest."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self.sha256, self.size = source, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[:len(data)] = data
        return len(data)


def decompressed(source: BinaryIO) -> BinaryIO:
    """The bytes of a gzip (RFC 1952) or zstd (RFC 8878) stream, or of a plain one: told by its first bytes."""
    start = source.read(4)
    whole: Any = io.BufferedReader(_Chain(start, source), BLOCK)
    if start.startswith(b"\x1f\x8b"):
        return igzip.IGzipFile(fileobj=whole, mode="rb")  # type: ignore[no-untyped-call, return-value]
    if start == b"\x28\xb5\x2f\xfd":
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        return reader.stream_reader(whole, read_across_frames=True)
    return whole  # type: ignore[no-any-return]


class _Chain(io.RawIOBase):
    """A few bytes that were read already, and then the rest of the file."""

    def __init__(self, start: bytes, source: BinaryIO) -> None:
        self._start, self._source = start, source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self._start = self._start[:len(buffer)] or self._source.read(len(buffer)), self._start[len(buffer):]
        buffer[:len(data)] = data
        return len(data)


class _Ahead:
    """What tarfile and the writer read from: blocks that another thread has ready; forward only.

    read() is for headers and refuses more than HEADER_BYTES an entry; content() is for a file's bytes.
    """

    def __init__(self, source: BinaryIO, limit: int) -> None:
        self.raw, self.sha256, self._limit = _Hashing(source), hashlib.sha256(), limit
        self._blocks: queue.Queue[bytes | BaseException] = queue.Queue(AHEAD)
        self._block, self._at, self._position, self.headers = memoryview(b""), 0, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for block in self._plain():
                if not self._put(block):
                    return
            while self.raw.read(BLOCK):
                pass  # what follows a zstd frame belongs to the digest too
            self._put(b"")
        except BaseException as error:  # noqa: BLE001  it is raised where the blocks are read
            self._put(error)

    def _plain(self) -> Iterator[bytes]:
        plain, left = decompressed(self.raw), self._limit  # type: ignore[arg-type]
        while block := plain.read(BLOCK):
            self.sha256.update(block)
            left -= len(block)
            if left < 0:
                raise BadInput("layer", f"over {self._limit} bytes", "must not unpack to more than the limit")
            yield block

    def _put(self, item: bytes | BaseException) -> bool:
        self._blocks.put(item)
        return not self._stop.is_set()

    def close(self) -> None:
        """Stop the thread, which may be waiting for room."""
        self._stop.set()
        with suppress(queue.Empty):
            while True:
                self._blocks.get_nowait()
        self._thread.join()

    def _next(self) -> bool:
        item = self._blocks.get()
        if isinstance(item, BaseException):
            self._blocks.put(item)
            raise item
        if not item:
            self._blocks.put(item)
        self._block, self._at = memoryview(item), 0
        return bool(item)

    def content(self, size: int) -> Iterator[memoryview]:
        """The next size bytes in pieces; EOFError where the tar ends before."""
        while size:
            if self._at == len(self._block) and not self._next():
                raise EOFError("the tar ends within an entry")
            piece = self._block[self._at:self._at + size]
            self._at += len(piece)
            self._position += len(piece)
            size -= len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        """Bytes of a header; fewer only at the end."""
        self.headers += size
        if self.headers > HEADER_BYTES:
            raise BadInput("layer", f"over {HEADER_BYTES} bytes", "the headers of one entry must not be larger")
        parts = []
        with suppress(EOFError):
            parts += [bytes(piece) for piece in self.content(size)]
        return b"".join(parts)

    def tell(self) -> int:
        """The offset in the tar."""
        return self._position

    def seek(self, offset: int) -> None:
        """Go forward to an offset."""
        if offset < self._position:
            raise tarfile.ReadError("the tar leads backwards")
        for _ in self.content(offset - self._position):
            pass

    def drain(self) -> None:
        """Read on to the end, so that both digests are of everything."""
        self._position += len(self._block) - self._at
        while self._next():
            self._position += len(self._block)


class _Unheard(dict[str, str]):
    """Global pax headers: Go's archive/tar, with which the engines read layers, does not apply them, nor do we."""

    def __setitem__(self, key: str, value: str) -> None:
        pass


class _Headers(tarfile.TarFile):
    """A tar of which tarfile reads nothing by itself: it takes a broken header for the end."""

    def next(self) -> None:
        return None


def _members(stream: _Ahead) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The entries of a tar one after the other, each with how many bytes are stored for it; none is kept."""
    source: Any = stream
    tar: Any = _Headers(fileobj=source, encoding="utf-8", pax_headers=_Unheard())
    while True:
        stream.headers = 0
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        yield member, tar.offset - member.offset_data
        stream.seek(tar.offset)


def entries(source: BinaryIO) -> Generator[tarfile.TarInfo, None, Unpacked]:
    """The entries of a layer, plain, gzip or zstd, in its order; the contents of files are passed over.

    Returns what unpack returns: `done = yield from entries(...)`.  Raises BadInput for what is no tar.
    """
    with closing(_Ahead(source, LIMITS.size)) as stream:
        number = 0
        try:
            for member, _ in _members(stream):
                number += 1
                yield member
            stream.drain()
        except BadInput:
            raise
        except BROKEN as error:
            raise _no_tar(error) from error
        return _account(stream, number)


def _no_tar(error: Exception) -> BadInput:
    return BadInput("layer", type(error).__name__, f"must be a tar archive, plain, gzip or zstd: {error}")


def _account(stream: _Ahead, number: int) -> Unpacked:
    raw = stream.raw
    return Unpacked(f"sha256:{raw.sha256.hexdigest()}", raw.size, f"sha256:{stream.sha256.hexdigest()}",
                    number, stream.tell())


# What an entry may be.


def _refuse(name: str, rule: str) -> BadInput:
    return BadInput("layer", name, rule)


def check_path(name: str, what: str = "path") -> str:
    """A path of an entry relative to the layer's root ("." is that root), or BadInput for what leads elsewhere."""
    if name.startswith("/"):
        raise _refuse(name, f"{what} must not be absolute")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _refuse(name, f"{what} must not have .. in it")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise _refuse(name, f"{what} must not have control characters in it")
    if any(part.startswith(WHITEOUT) for part in parts[:-1]):
        raise _refuse(name, f"{what} must not lead through a whiteout")
    if any(len(os.fsencode(part)) > 255 for part in parts) or len(os.fsencode(name)) >= 4096:
        raise _refuse(name, f"{what} must be shorter than 4096 bytes, each part than 256")
    return "/".join(parts) or "."


def _check_whiteout(path: str) -> str:
    """What a whiteout file hides: a name in its directory."""
    hidden = os.path.basename(path).removeprefix(WHITEOUT)
    if hidden in ("", ".", "..") or hidden.startswith(WHITEOUT):
        raise _refuse(path, "must name what it hides: .wh. and a plain name")
    return hidden


def _kind_of_device(member: tarfile.TarInfo) -> int:
    return stat.S_IFCHR if member.ischr() else stat.S_IFBLK


def _check_device(member: tarfile.TarInfo, path: str, allowed: Container[Any] | None) -> None:
    device = _kind_of_device(member), member.devmajor, member.devminor
    if device == (stat.S_IFCHR, 0, 0) or (allowed is not None and device not in allowed):
        letter = "c" if member.ischr() else "b"
        raise _refuse(path, f"device {letter} {member.devmajor}:{member.devminor} is not one that a layer may bring")


def _check_numbers(member: tarfile.TarInfo, path: str) -> None:
    """A size is never negative; the owner -1 would mean "leave as it is" to chown(2)."""
    for key in ("size", "uid", "gid"):
        if not member.pax_headers.get(key, "0").isdecimal():  # tarfile would take it for 0
            raise _refuse(path, f"{key} {member.pax_headers[key][:20]!r} must be a number")
    if member.size < 0:
        raise _refuse(path, f"size {member.size} must not be negative")
    if not (0 <= member.uid < NOBODY_AT_ALL and 0 <= member.gid < NOBODY_AT_ALL):
        raise _refuse(path, f"owner {member.uid}:{member.gid} must be numbers from 0 to {NOBODY_AT_ALL - 1}")


def _attributes(member: tarfile.TarInfo, path: str) -> dict[str, bytes]:
    """Its extended attributes: xattr(7).  Those of overlay itself would rewire the mount."""
    found = {key.removeprefix(XATTR): value.encode("utf-8", "surrogateescape")
             for key, value in member.pax_headers.items() if key.startswith(XATTR)}
    for name in found:
        if name.startswith(("trusted.", *OVERLAY_ATTRIBUTES)):
            raise _refuse(path, f"a layer must not bring the attribute {name}")
    return found


def _parts(member: tarfile.TarInfo, path: str, stored: int) -> list[tuple[int, int]] | None:
    """The parts of a sparse file: in order, within its size, as many bytes as are stored; empty ones say nothing."""
    everything: Any = member.sparse
    if everything is None:
        return None
    parts, end = [(offset, size) for offset, size in everything if size], 0
    for offset, size in parts:
        if size < 0 or offset < end or offset + size > member.size:
            raise _refuse(path, "parts of a sparse file must lie in order and within its size")
        end = offset + size
    if -(-sum(size for _, size in parts) // 512) * 512 != stored:
        raise _refuse(path, "parts of a sparse file must add up to what is stored")
    return parts


def _mtime(member: tarfile.TarInfo) -> int:
    """Its time of change in nanoseconds; a pax header has more digits than a float."""
    text = member.pax_headers.get("mtime")
    seconds = Decimal(text) if text else Decimal(int(member.mtime))
    if not -(1 << 32) < seconds < 1 << 32:
        raise _refuse(member.name, "time of change must be within 136 years of 1970")
    return int(seconds * 10**9)


class _Entry(NamedTuple):
    """An entry that was checked: what it is called here, its attributes, its time, the parts of a sparse file."""

    member: tarfile.TarInfo
    path: str
    attributes: dict[str, bytes]
    moment: int
    parts: list[tuple[int, int]] | None


def _checked(member: tarfile.TarInfo, stored: int) -> _Entry:
    path = check_path(member.name)
    _check_numbers(member, path)
    return _Entry(member, path, _attributes(member, path), _mtime(member), _parts(member, path, stored))


# The target directory, which nothing leaves.


class _Tree:
    """A directory and what is made in it: every path is resolved by openat2(2), never by this program.

    overlay: it is one layer, and says what it hides as overlay does; no symbolic link is followed.  Otherwise layers
    are applied one onto the other: links of lower layers are followed, with the directory as their root, links of
    this layer never, and what is hidden is removed.
    lower: the directories of the layers below, the uppermost first, where this one stands alone.
    """

    def __init__(self, target: str, overlay: bool, lower: Sequence[str] = ()) -> None:
        self.root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.overlay = overlay
        self._resolve = syscalls.RESOLVE_NO_MAGICLINKS | (
            syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS if overlay else syscalls.RESOLVE_IN_ROOT)
        self._open: dict[str, int] = {}  # the last used at the end
        self._made: dict[str, bool] = {}  # only where layers are applied: made by this one, or on the way to such
        self._links: set[str] = set()
        self._times: dict[str, int] = {}
        self._acls: dict[str, bytes] = {}
        self._seen: set[tuple[int, int]] = set()
        self._lower = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in lower]
        self._inherit(".", self.root)
        self._begin(".", self.root)

    def close(self) -> None:
        """Close what is open."""
        self.forget("")
        for fd in (self.root, *self._lower):
            os.close(fd)

    def forget(self, path: str) -> None:
        """Close the directories kept open, but for those that lead to a path: one of them may be gone now."""
        for known in [known for known in self._open if not path.startswith(known + "/")]:
            os.close(self._open.pop(known))

    def folder(self, path: str, make: bool = True) -> int:
        """A descriptor of a directory; missing ones are made, with mode 755.  It and the one before it stay open."""
        if path in ("", "."):
            return self.root
        fd = self._open.pop(path, None)
        if fd is None:
            self._check_links(path)
            fd = self._enter(path, make)
            if len(self._open) >= OPEN:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[path] = fd
        return fd

    def _check_links(self, path: str) -> None:
        """No tool that reads a directory writes an entry behind a symbolic link of the same layer."""
        while path:
            if path in self._links:
                raise _refuse(path, "nothing may be written through a symbolic link of the same layer")
            path = os.path.dirname(path)

    def _enter(self, path: str, make: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            fd = syscalls.openat2(self.root, path, flags, self._resolve)
        except KernelError as error:
            if error.errno == errno.ELOOP:
                raise _refuse(path, "nothing may be written through a symbolic link") from error
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            if not make:
                raise _refuse(path, "no such directory in the layer") from error
            parent, name = self.folder(os.path.dirname(path)), os.path.basename(path)
            replaced = self.directory(parent, name, path, 0o755)
            fd = syscalls.openat2(parent, name, flags, syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
            if not replaced:
                self._inherit(path, fd)
        self._begin(path, fd)
        return fd

    def _begin(self, path: str, fd: int) -> None:
        """Before anything is changed in a directory: what it is to have again in the end, unless the layer lists it.

        A default ACL comes off until then: what a layer's files have, the layer says.
        """
        if DEFAULT_ACL in os.listxattr(fd):
            self._acls[path] = os.getxattr(fd, DEFAULT_ACL)
            os.removexattr(fd, DEFAULT_ACL)
        status = os.fstat(fd)
        if not self.overlay and (status.st_dev, status.st_ino) not in self._seen:
            self._seen.add((status.st_dev, status.st_ino))
            self._times.setdefault(path, status.st_mtime_ns)

    def _inherit(self, path: str, fd: int) -> None:
        """A directory that the layer does not list is as the layers below have it, as containerd does too."""
        for lower in self._lower:
            try:
                source = syscalls.openat2(lower, path, os.O_RDONLY | os.O_DIRECTORY,
                                          syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
            except KernelError as error:
                if error.errno == errno.ENOENT:
                    continue
                return  # something else is there
            try:
                _copy_status(source, fd)
                self._times[path] = os.fstat(source).st_mtime_ns
            finally:
                os.close(source)
            return

    def directory(self, parent: int, name: str, path: str, mode: int) -> bool:
        """Make a directory; whether it replaces a file or a whiteout of its layer, for then it hides what they did."""
        replaced = self.remove(parent, name, path)
        os.mkdir(name, mode, dir_fd=parent)
        if replaced and self.overlay:
            self.opaque(parent, name)
        self.note(path)
        return replaced

    def opaque(self, parent: int, name: str) -> None:
        """Tell overlay that a directory hides all that lower layers have in it."""
        os.setxattr(f"/proc/self/fd/{parent}/{name}", OVERLAY_OPAQUE, b"y", follow_symlinks=False)

    def note(self, path: str, link: bool = False) -> None:
        """Remember what this layer brought, as far as somebody will ask."""
        if self.overlay:
            return
        self._links.discard(path)
        if link:
            self._links.add(path)
        self._made[path] = True
        while (path := os.path.dirname(path)) and path not in self._made:
            self._made[path] = False

    def existing(self, parent: int, name: str) -> os.stat_result | None:
        """What stands at a name now, without following a link."""
        try:
            return os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def remove(self, parent: int, name: str, path: str) -> bool:
        """Take away what stands at a name, with everything below it; whether there was something."""
        found = self.existing(parent, name)
        if found is None:
            return False
        if stat.S_ISDIR(found.st_mode) or stat.S_ISLNK(found.st_mode):
            self.forget(path)
        if stat.S_ISDIR(found.st_mode):
            machine.remove_tree(f"/proc/self/fd/{parent}/{name}")
        else:
            os.unlink(name, dir_fd=parent)
        return True

    def hide(self, folder: str, name: str) -> None:
        """Remove what lower layers have at a name; what this layer has brought stays, in whatever order it came."""
        parent, path = self.folder(folder), os.path.join(folder, name)
        found = self.existing(parent, name)
        if found and stat.S_ISDIR(found.st_mode) and path in self._made:
            for inner in os.listdir(self.folder(path)):
                self.hide(path, inner)
        elif not self._made.get(path):
            self.remove(parent, name, path)

    def later(self, path: str, moment: int, acl: bytes | None) -> None:
        """What a directory gets at the end: each entry made in it changes its time, and would inherit its ACL."""
        self._times[path] = moment
        self._acls.pop(path, None)
        if acl:
            self._acls[path] = acl

    def finish(self) -> None:
        """Give the directories what was put off."""
        for path in self._acls | self._times:
            try:
                fd = syscalls.openat2(self.root, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, self._resolve)
            except KernelError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # a later entry took its place
                    raise
                continue
            try:
                if path in self._acls:
                    os.setxattr(fd, DEFAULT_ACL, self._acls[path])
                if path in self._times:
                    os.utime(fd, ns=(self._times[path], self._times[path]))
            finally:
                os.close(fd)


def _copy_status(source: int, target: int) -> None:
    """Owner, mode and attributes of one open directory for another, but what overlay has noted there."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(OVERLAY_ATTRIBUTES):
            os.setxattr(target, name, os.getxattr(source, name))


class _Writer:
    """Makes the entries of one layer in a tree."""

    def __init__(self, tree: _Tree, stream: _Ahead, devices: Container[Any] | None) -> None:
        self.tree, self.stream, self.devices = tree, stream, devices

    def entries(self, limits: Limits) -> int:
        """Make every entry; how many they were."""
        number = size = 0
        for member, stored in _members(self.stream):
            number, size = number + 1, size + member.size
            if number > limits.entries or size > limits.size:
                rule = f"must not hold more than {limits.entries} entries and {limits.size} bytes"
                raise _refuse(member.name, rule)
            try:
                self.entry(member, stored)
            except OSError as error:
                if error.errno is None or isinstance(error, KernelError):
                    raise
                raise KernelError("unpack", error.errno, error.filename, member.name) from error
        return number

    def entry(self, member: tarfile.TarInfo, stored: int) -> None:
        """Make what one entry says, or raise BadInput before anything of it is made; stored: its bytes in the tar."""
        one = _checked(member, stored)
        name = os.path.basename(one.path)
        if name.startswith(WHITEOUT):
            self._whiteout(one)
        elif member.isdir():
            self._directory(one)
        elif one.path == ".":
            raise _refuse(member.name, "the root of a layer must be a directory")
        else:
            make = self._kind(one)
            parent = self.tree.folder(os.path.dirname(one.path))
            self.tree.remove(parent, name, one.path)
            make(one, parent, name)
            self.tree.note(one.path, link=member.issym())
            if not member.islnk():
                _finish(one, parent, name)

    def _kind(self, one: _Entry) -> Callable[[_Entry, int, str], None]:
        member = one.member
        if member.isreg():
            return self._file
        if member.issym():
            return self._symlink
        if member.islnk():
            if check_path(member.linkname, "link target") == one.path:
                raise _refuse(one.path, "a hard link must not be to itself")
            return self._hard_link
        if member.isfifo():
            return self._node
        if member.isdev():
            _check_device(member, one.path, self.devices)
            return self._node
        raise _refuse(one.path, f"type {member.type!r} is not one of a layer")

    def _whiteout(self, one: _Entry) -> None:
        """Hide what lower layers have: whiteouts apply to them only, image-spec/layer.md."""
        folder, name = os.path.split(one.path)
        hidden = "" if name == OPAQUE else _check_whiteout(one.path)
        parent = self.tree.folder(folder)
        if not self.tree.overlay:
            for lower in [hidden] if hidden else os.listdir(parent):
                self.tree.hide(folder, lower)
        elif not hidden:
            if not folder:
                raise _refuse(one.path, "overlay has no way to make its root opaque")
            self.tree.opaque(parent, ".")
        elif (found := self.tree.existing(parent, hidden)) is None:
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
        elif stat.S_ISDIR(found.st_mode):  # the same layer has put a new directory there
            self.tree.opaque(parent, hidden)

    def _directory(self, one: _Entry) -> None:
        folder, name = os.path.split(one.path)
        parent = self.tree.folder(folder)
        found = self.tree.existing(parent, name)
        if found is None or not stat.S_ISDIR(found.st_mode):
            self.tree.directory(parent, name, one.path, 0o700)
        else:
            _clear(f"/proc/self/fd/{parent}/{name}")
            self.tree.note(one.path)
        acl = one.attributes.pop(DEFAULT_ACL, None)
        _finish(one, parent, name)
        self.tree.later(one.path, one.moment, acl)

    def _file(self, one: _Entry, parent: int, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=parent)
        try:
            if one.parts is None:
                self._content(fd, one.member.size)
            else:
                os.ftruncate(fd, one.member.size)
                for offset, size in one.parts:
                    os.lseek(fd, offset, os.SEEK_SET)
                    self._content(fd, size)
        finally:
            os.close(fd)

    def _content(self, fd: int, size: int) -> None:
        for piece in self.stream.content(size):
            while piece:
                piece = piece[os.write(fd, piece):]  # noqa: PLW2901  what write(2) left

    def _symlink(self, one: _Entry, parent: int, name: str) -> None:
        target = one.member.linkname
        if not 0 < len(os.fsencode(target)) < 4096 or "\0" in target:
            raise _refuse(one.path, "a symbolic link must have a target, shorter than 4096 bytes")
        os.symlink(target, name, dir_fd=parent)

    def _hard_link(self, one: _Entry, parent: int, name: str) -> None:
        folder, target = os.path.split(check_path(one.member.linkname, "link target"))
        source = self.tree.folder(folder, make=False)
        found = self.tree.existing(source, target) if target != "." else None
        if found is None or stat.S_ISDIR(found.st_mode) or _is_whiteout(found):
            raise _refuse(one.path, f"hard link to {one.member.linkname!r}, which is no file of the layer")
        os.link(target, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)

    def _node(self, one: _Entry, parent: int, name: str) -> None:
        kind = stat.S_IFIFO if one.member.isfifo() else _kind_of_device(one.member)
        number = 0 if one.member.isfifo() else os.makedev(one.member.devmajor, one.member.devminor)
        os.mknod(name, kind | 0o600, number, dir_fd=parent)


def _finish(one: _Entry, parent: int, name: str) -> None:
    """Owner, mode, attributes, times, in this order: a change of owner clears set-user-ID, chown(2)."""
    os.chown(name, one.member.uid, one.member.gid, dir_fd=parent, follow_symlinks=False)
    if not one.member.issym():
        os.chmod(name, one.member.mode & 0o7777, dir_fd=parent)
    for attribute, value in one.attributes.items():
        os.setxattr(f"/proc/self/fd/{parent}/{name}", attribute, value, follow_symlinks=False)
    os.utime(name, ns=(one.moment, one.moment), dir_fd=parent, follow_symlinks=False)


def _clear(place: str) -> None:
    """A directory shows the attributes of the last entry that says it, and no others but overlay's own."""
    for attribute in os.listxattr(place, follow_symlinks=False):
        if not attribute.startswith(OVERLAY_ATTRIBUTES):
            os.removexattr(place, attribute, follow_symlinks=False)


def _is_whiteout(status: os.stat_result) -> bool:
    """Whether overlay reads a file as "nothing is here": a character device 0:0."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def unpack(source: BinaryIO, target: str, *, whiteouts: Literal["overlay", "apply"] = "overlay",
           limits: Limits = LIMITS, devices: Container[tuple[int, int, int]] | None = DEVICES,
           lower: Sequence[str] = ()) -> Unpacked:
    """Unpack one layer, plain, gzip or zstd, into an existing directory.

    whiteouts: "overlay" makes a directory that overlay mounts as one layer (the directory should be empty);
    "apply" puts the layer onto the tree that is there and removes what it hides.  devices: the device nodes
    a layer may bring, as (stat.S_IFCHR or S_IFBLK, major, minor); None allows every one.  lower: with "overlay",
    the directories of the layers below, the uppermost first: a directory that the tar has entries in, but does
    not list, gets owner, mode, attributes and time from there.

    Raises BadInput with the entry's name and the rule for what is refused, KernelError with the entry's name for
    what the kernel refuses; what came before it in the tar has been made by then: give a directory that can be
    thrown away (image.unpack does).
    """
    with ExitStack() as undo:
        stream = undo.enter_context(closing(_Ahead(source, limits.size)))
        tree = undo.enter_context(closing(_Tree(target, whiteouts == "overlay", lower)))
        try:
            number = _Writer(tree, stream, devices).entries(limits)
            stream.drain()
        except BadInput:
            raise
        except BROKEN as error:
            raise _no_tar(error) from error
        tree.finish()
        return _account(stream, number)


# The way back: a directory becomes a tar.


class _Counting:
    """Passes bytes on to a file, and takes their digest and number."""

    def __init__(self, out: BinaryIO) -> None:
        self._out, self.sha256, self.size = out, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._out.write(data)


def walk(folder: str, path: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Every path below a directory, relative to it, parents first and names in byte order; links are not followed."""
    with os.scandir(os.path.join(folder, path)) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        name, status = os.path.join(path, entry.name), entry.stat(follow_symlinks=False)
        yield name, status
        if stat.S_ISDIR(status.st_mode):
            yield from walk(folder, name)


def pack(upper: str, out: BinaryIO, *, epoch: int | None = None, skip: Container[str] = ()) -> Packed:
    """Write the upper directory of an overlay as a layer: a POSIX.1-2001 (pax) tar in a fixed order.

    Whiteouts and opaque directories become the files that the image specification wants; sockets are left
    out.  epoch: no time of change is later than this, in seconds (SOURCE_DATE_EPOCH).  skip: paths not packed.
    """
    counting, entries, seen = _Counting(out), 0, dict[tuple[int, int], str]()
    with tarfile.open(fileobj=counting, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:  # type: ignore[call-overload]
        for path, status in walk(upper):
            if path in skip or stat.S_ISSOCK(status.st_mode):
                continue
            for member in _entries(upper, path, status, seen, epoch):
                _add(tar, upper, member)
                entries += 1
    return Packed(f"sha256:{counting.sha256.hexdigest()}", entries, counting.size)


def _add(tar: tarfile.TarFile, upper: str, member: tarfile.TarInfo) -> None:
    if member.isreg() and member.size:
        with open(os.path.join(upper, member.name), "rb") as content:
            tar.addfile(member, content)
    else:
        tar.addfile(member)


def _entries(upper: str, path: str, status: os.stat_result, seen: dict[tuple[int, int], str],
             epoch: int | None) -> Iterator[tarfile.TarInfo]:
    """What stands in the tar for one path: itself or its whiteout, and for an opaque directory one entry more."""
    folder, name = os.path.split(path)
    if name.startswith(WHITEOUT):
        raise BadInput("upper", path, "a name that begins with .wh. cannot stand in a layer")
    if _is_whiteout(status):
        yield _member(os.path.join(folder, WHITEOUT + name), status, epoch, stat.S_IFREG)
        return
    attributes = _overlay_free(os.path.join(upper, path), path)
    member = _member(path, status, epoch, stat.S_IFMT(status.st_mode))
    if stat.S_ISLNK(status.st_mode):
        member.linkname = os.readlink(os.path.join(upper, path))
    first = seen.setdefault((status.st_dev, status.st_ino), path) if status.st_nlink > 1 else path
    if first != path and not member.isdir():
        member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
    else:
        opaque = attributes.pop(OVERLAY_OPAQUE, b"") == b"y"
        own = {XATTR + key: value.decode("utf-8", "surrogateescape") for key, value in attributes.items()}
        member.pax_headers = {**member.pax_headers, **own}
        if opaque:
            yield member
            member = _member(os.path.join(path, OPAQUE), status, epoch, stat.S_IFREG)
    yield member


def _overlay_free(place: str, path: str) -> dict[str, bytes]:
    """Its extended attributes, of overlay's own only the one that a tar can say."""
    names = os.listxattr(place, follow_symlinks=False)
    found = {name: os.getxattr(place, name, follow_symlinks=False) for name in names}
    for name in names:
        if name.startswith(OVERLAY_ATTRIBUTES) and name != OVERLAY_OPAQUE:
            if name.endswith((".redirect", ".metacopy")):
                raise BadInput("upper", path, f"{name}: what it stands for is in a lower layer")
            del found[name]
    return found


TYPES = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE,
         stat.S_IFCHR: tarfile.CHRTYPE, stat.S_IFBLK: tarfile.BLKTYPE, stat.S_IFIFO: tarfile.FIFOTYPE}


def _member(path: str, status: os.stat_result, epoch: int | None, kind: int) -> tarfile.TarInfo:
    """An entry with owner, mode and time; names of owners are left out, they differ between machines."""
    member = tarfile.TarInfo(path)
    member.type, member.mode = TYPES[kind], stat.S_IMODE(status.st_mode)
    member.uid, member.gid = status.st_uid, status.st_gid
    if kind == stat.S_IFREG and stat.S_ISREG(status.st_mode):
        member.size = status.st_size
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    moment = status.st_mtime_ns if epoch is None else min(status.st_mtime_ns, epoch * 10**9)
    member.mtime = moment // 10**9
    if moment % 10**9:
        member.pax_headers = {"mtime": f"{Decimal(moment).scaleb(-9):f}"}
    return member
