"""Landlock: a process gives up, for itself and all that it starts, what it will not need.

landlock(7), landlock_create_ruleset(2), landlock_add_rule(2), landlock_restrict_self(2); the kernel's
Documentation/userspace-api/landlock.rst.  A ruleset *handles* some rights: these are denied from now on, but for
what its rules allow.  A right that no ruleset handles is as free as before.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from labs import process, syscalls
from labs.errors import BadInput, ChildFailed, KernelError
from labs.mounts import o_path, opened

# <linux/landlock.h>: the position is the bit.
FS = tuple(f"LANDLOCK_ACCESS_FS_{name}" for name in (
    "EXECUTE", "WRITE_FILE", "READ_FILE", "READ_DIR", "REMOVE_DIR", "REMOVE_FILE", "MAKE_CHAR", "MAKE_DIR", "MAKE_REG",
    "MAKE_SOCK", "MAKE_FIFO", "MAKE_BLOCK", "MAKE_SYM", "REFER", "TRUNCATE", "IOCTL_DEV"))
NET = ("LANDLOCK_ACCESS_NET_BIND_TCP", "LANDLOCK_ACCESS_NET_CONNECT_TCP")
SCOPE = ("LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET", "LANDLOCK_SCOPE_SIGNAL")
# The ABI version that brought a name in; all others are of version 1: landlock(7), "VERSIONS".
SINCE = {FS[13]: 2, FS[14]: 3, **dict.fromkeys(NET, 4), FS[15]: 5, **dict.fromkeys(SCOPE, 6)}


def short(name: str) -> str:
    """A name without what all of its family begin with: READ_FILE, BIND_TCP, SIGNAL."""
    return name.removeprefix("LANDLOCK_").removeprefix("ACCESS_").removeprefix("FS_").removeprefix("NET_").removeprefix(
        "SCOPE_")


_BITS = {short(name): 1 << bit for family in (FS, NET, SCOPE) for bit, name in enumerate(family)}


def mask(names: Iterable[str]) -> int:
    """The bits of rights of one family, as people write them: "READ_FILE" or "LANDLOCK_ACCESS_FS_READ_FILE"."""
    found = 0
    for name in names:
        if short(name) not in _BITS:
            raise BadInput("Landlock right", name, "must be a name of <linux/landlock.h>, as READ_FILE")
        found |= _BITS[short(name)]
    return found


def names(bits: int, family: tuple[str, ...] = FS) -> list[str]:
    """The rights of a mask, short."""
    return [short(name) for bit, name in enumerate(family) if bits >> bit & 1]


ALL = (1 << len(FS)) - 1
READ = mask(["READ_FILE", "READ_DIR"])
EXECUTE = READ | mask(["EXECUTE"])
WRITE = READ | mask(["WRITE_FILE", "TRUNCATE", "REFER", "REMOVE_DIR", "REMOVE_FILE", "MAKE_DIR", "MAKE_REG",
                     "MAKE_SOCK", "MAKE_FIFO", "MAKE_SYM"])
# What can be done to a file itself; the other rights are those of a directory to what lies in it.
OF_A_FILE = mask(["EXECUTE", "WRITE_FILE", "READ_FILE", "TRUNCATE", "IOCTL_DEV"])


def abi() -> int:
    """The version of Landlock's interface in this kernel, 0 where it has none or it was not switched on at boot."""
    try:
        return syscalls.landlock_create_ruleset(None, syscalls.LANDLOCK_CREATE_RULESET_VERSION)
    except KernelError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def known(version: int, family: tuple[str, ...] = FS) -> int:
    """The rights of a family that an ABI version has."""
    return sum(1 << bit for bit, name in enumerate(family) if version >= SINCE.get(name, 1))


class Ruleset:
    """A ruleset in the making: the rights that it handles (masks), then the rules that allow.

    As a context manager its descriptor is closed on the way out; a process that it restricts needs it no more.
    BadInput where this kernel is too old for a right: to leave it out would be a weaker wall than was asked for.
    """

    def __init__(self, fs: int = 0, net: int = 0, scoped: int = 0) -> None:
        version = abi()
        for bits, family in ((fs, FS), (net, NET), (scoped, SCOPE)):
            for name in [name for bit, name in enumerate(family) if bits >> bit & 1]:
                if version < SINCE.get(name, 1):
                    rule = f"needs version {SINCE.get(name, 1)} of Landlock, this kernel has {version}"
                    raise BadInput("Landlock right", name, rule)
        self.fd = syscalls.landlock_create_ruleset(struct.pack("=3Q", fs, net, scoped))

    def __enter__(self) -> Ruleset:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def allow(self, path: str, rights: int) -> None:
        """These rights on all beneath a directory, or on one file (where rights of directories are EINVAL)."""
        with opened(o_path(path)) as fd:
            self._allow(fd, rights, path)

    def allow_what_fits(self, path: str, rights: int) -> None:
        """The same, but on a file only those of the rights that are a file's."""
        with opened(o_path(path)) as fd:
            self._allow(fd, rights & (ALL if stat.S_ISDIR(os.fstat(fd).st_mode) else OF_A_FILE), path)

    def _allow(self, fd: int, rights: int, path: str) -> None:
        rule = struct.pack("=Qi", rights, fd)  # struct landlock_path_beneath_attr
        syscalls.landlock_add_rule(self.fd, syscalls.LANDLOCK_RULE_PATH_BENEATH, rule, path)

    def allow_port(self, port: int, rights: int) -> None:
        """These rights of NET on a TCP port."""
        if not 0 <= port <= 0xFFFF:
            raise BadInput("TCP port", port, "must be from 0 to 65535")
        syscalls.landlock_add_rule(self.fd, syscalls.LANDLOCK_RULE_NET_PORT, struct.pack("=2Q", rights, port))

    def restrict(self) -> None:
        """The calling thread, and what it starts, obey from now on; EPERM without no_new_privs or CAP_SYS_ADMIN."""
        syscalls.landlock_restrict_self(self.fd)


def restrict(read: Iterable[str] = (), write: Iterable[str] = (), execute: Iterable[str] = (), *,
             bind: Iterable[int] | None = None, connect: Iterable[int] | None = None,
             scoped: Iterable[str] = ()) -> None:
    """Confine the calling process, for ever: of the file system only these paths are left, and all beneath them.

    Sets no_new_privs.  Only for a process with one thread, as in process.call and process.fork: others stay free.
    All is prepared before anything is given up, and what cannot be had is raised: BadInput, KernelError.

    Args:
        read: may be read.
        write: may be read, written, made and removed; no device nodes.
        execute: may be read and executed.
        bind: None, or the TCP ports that may be listened on (no others).
        connect: None, or the TCP ports that may be connected to.
        scoped: names in SCOPE, as "SIGNAL": what shall reach no process outside.
    """
    ports = {"BIND_TCP": bind, "CONNECT_TCP": connect}
    net = mask(name for name, given in ports.items() if given is not None)
    handled = known(abi()) or ALL  # without Landlock at all, Ruleset says so
    with Ruleset(handled, net, mask(scoped)) as ruleset:
        for paths, rights in ((read, READ), (write, WRITE), (execute, EXECUTE)):
            for path in paths:
                ruleset.allow_what_fits(path, rights & handled)
        for name, given in ports.items():
            for port in given or ():
                ruleset.allow_port(port, mask([name]))
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        ruleset.restrict()


class Trial(NamedTuple):
    """One operation that a right of FS stands for: does it in a folder that has what `prepare` makes."""

    right: str
    what: str
    do: Callable[[str], object]


def _ioctl(_: str) -> None:
    with opened(os.open("/dev/null", os.O_RDONLY)) as fd:
        try:
            fcntl.ioctl(fd, 0x5401)  # TCGETS, <asm-generic/ioctls.h>: /dev/null is no terminal
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise


def _open_and_close(flags: int, folder: str) -> None:
    os.close(os.open(f"{folder}/file", flags))


TRIALS = tuple(Trial(right, what, do) for right, what, do in (
    ("EXECUTE", "execve a program", lambda folder: process.spawn([f"{folder}/program"]).wait()),
    ("WRITE_FILE", "open to write", partial(_open_and_close, os.O_WRONLY)),
    ("READ_FILE", "open to read", partial(_open_and_close, os.O_RDONLY)),
    ("READ_DIR", "list a directory", os.listdir),
    ("REMOVE_DIR", "rmdir", lambda folder: os.rmdir(f"{folder}/empty")),
    ("REMOVE_FILE", "unlink", lambda folder: os.unlink(f"{folder}/file")),
    # The device of /dev/null: one with number 0, 0 is a whiteout, which newer kernels count as a file.
    ("MAKE_CHAR", "mknod c", lambda folder: os.mknod(f"{folder}/new", stat.S_IFCHR, os.makedev(1, 3))),
    ("MAKE_DIR", "mkdir", lambda folder: os.mkdir(f"{folder}/new")),
    ("MAKE_REG", "make a file", lambda folder: os.mknod(f"{folder}/new", stat.S_IFREG)),
    ("MAKE_SOCK", "make a socket", lambda folder: os.mknod(f"{folder}/new", stat.S_IFSOCK)),
    ("MAKE_FIFO", "make a named pipe", lambda folder: os.mkfifo(f"{folder}/new")),
    ("MAKE_BLOCK", "mknod b", lambda folder: os.mknod(f"{folder}/new", stat.S_IFBLK)),
    ("MAKE_SYM", "make a symbolic link", lambda folder: os.symlink("file", f"{folder}/new")),
    ("REFER", "rename into another directory", lambda folder: os.rename(f"{folder}/file", f"{folder}/empty/file")),
    ("TRUNCATE", "truncate", lambda folder: os.truncate(f"{folder}/file", 0)),
    ("IOCTL_DEV", "ioctl of a device", _ioctl),
))


def prepare(folder: str) -> str:
    """What the trials work on, made anew: a file, an empty directory and a program."""
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(f"{folder}/empty")
    with open(f"{folder}/file", "w", encoding="ascii") as file:
        file.write("text\n")
    shutil.copy("/usr/bin/true", f"{folder}/program")
    return folder


def attempt(trial: Trial, handled: int, allowed: int, folder: str) -> str:
    """What the trial ends with under a ruleset that handles some rights and allows some everywhere: "ok" or an errno.

    folder: a directory that may be made and removed.
    """
    prepare(folder)
    try:
        return process.call(_attempt, trial, handled, allowed, folder)
    finally:
        shutil.rmtree(folder)


def _attempt(trial: Trial, handled: int, allowed: int, folder: str) -> str:
    with Ruleset(handled) as ruleset:
        if allowed & handled:
            ruleset.allow("/", allowed & handled)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        ruleset.restrict()
    return outcome(lambda: trial.do(folder))


def outcome(fn: Callable[[], object]) -> str:
    """What a call ends with: "ok", or the name of its errno."""
    try:
        fn()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except ChildFailed as error:
        return errno.errorcode.get(error.errno, str(error))
    return "ok"
