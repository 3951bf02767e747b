"""A container's root filesystem from config.json: mounts, devices, pivot_root, what is hidden.

config.md "Mounts" and config-linux.md of the OCI runtime specification.  Process 1 of the container
does this in its own mount namespace.  Nothing here trusts a path of the image: each target is opened
beneath the root (openat2(2), RESOLVE_IN_ROOT) and a mount is attached to the open target
(move_mount(2)), so that no link planted in the image leads out of it.
"""

from __future__ import annotations

import errno
import os
import stat

from labs import syscalls
from labs.errors import BadInput, KernelError
from labs.oci_config import clean
from labs.syscalls import (
    AT_FDCWD,
    AT_RECURSIVE,
    FSCONFIG_CMD_CREATE,
    FSCONFIG_SET_FLAG,
    FSCONFIG_SET_STRING,
    MOUNT_ATTR_RDONLY,
    MS_PRIVATE,
    MS_REC,
    MS_SHARED,
    MS_SLAVE,
    MS_UNBINDABLE,
    OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
    RESOLVE_IN_ROOT,
    RESOLVE_NO_SYMLINKS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

S = syscalls
# Attributes of a mount: option to (bits to clear, bits to set), mount_setattr(2).
ATTRIBUTES = {
    "ro": (0, MOUNT_ATTR_RDONLY), "rw": (MOUNT_ATTR_RDONLY, 0),
    "nosuid": (0, S.MOUNT_ATTR_NOSUID), "suid": (S.MOUNT_ATTR_NOSUID, 0),
    "nodev": (0, S.MOUNT_ATTR_NODEV), "dev": (S.MOUNT_ATTR_NODEV, 0),
    "noexec": (0, S.MOUNT_ATTR_NOEXEC), "exec": (S.MOUNT_ATTR_NOEXEC, 0),
    "nosymfollow": (0, S.MOUNT_ATTR_NOSYMFOLLOW), "symfollow": (S.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "nodiratime": (0, S.MOUNT_ATTR_NODIRATIME), "diratime": (S.MOUNT_ATTR_NODIRATIME, 0),
    "relatime": (S.MOUNT_ATTR__ATIME, 0), "norelatime": (S.MOUNT_ATTR__ATIME, 0), "atime": (S.MOUNT_ATTR__ATIME, 0),
    "noatime": (S.MOUNT_ATTR__ATIME, S.MOUNT_ATTR_NOATIME), "nostrictatime": (S.MOUNT_ATTR__ATIME, 0),
    "strictatime": (S.MOUNT_ATTR__ATIME, S.MOUNT_ATTR_STRICTATIME), "defaults": (0, 0),
}
FILESYSTEM = {"sync", "dirsync", "mand", "lazytime", "silent"}  # flags of the filesystem, not of the mount
OPPOSITES = {"async", "nomand", "nolazytime", "loud"}
PROPAGATION = {"private": MS_PRIVATE, "shared": MS_SHARED, "slave": MS_SLAVE, "unbindable": MS_UNBINDABLE}
CLONE = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
         "ptmx": "pts/ptmx", "core": "/proc/kcore"}


class MountOptions:
    """The options of one mount, sorted by what they are for."""

    def __init__(self, words: list[str]) -> None:
        self.bind = self.deep = self.copy_up = self.idmap = False
        self.clear = self.set = self.deep_clear = self.deep_set = self.propagation = 0
        self.data: list[str] = []
        for word in words:
            self._take(word)

    def _take(self, word: str) -> None:
        deep, plain = word.startswith("r") and word[1:] in ATTRIBUTES and word not in ATTRIBUTES, word[1:]
        if word in ("bind", "rbind"):
            self.bind, self.deep = True, self.deep or word == "rbind"
        elif word in ("idmap", "ridmap", "tmpcopyup"):
            self.idmap, self.copy_up = self.idmap or word != "tmpcopyup", self.copy_up or word == "tmpcopyup"
        elif word in PROPAGATION or plain in PROPAGATION:
            self.propagation = PROPAGATION.get(word) or PROPAGATION[plain] | MS_REC
        elif word in ATTRIBUTES:
            clear, bits = ATTRIBUTES[word]
            self.clear, self.set = self.clear | clear | bits, self.set & ~clear | bits
        elif deep:
            clear, bits = ATTRIBUTES[plain]
            self.deep_clear, self.deep_set = self.deep_clear | clear | bits, self.deep_set & ~clear | bits
        elif word not in OPPOSITES and word not in ("remount", "copyup"):
            self.data.append(word)


def sources(config: dict[str, Any], bundle: str, user_namespace: Any) -> list[int]:
    """Before the container: a detached copy of the source of each bind mount (open_tree(2)), -1 for the others.

    Done with the caller's rights and in its mount namespace; user_namespace(uid_map, gid_map) gives a
    user namespace of these maps for an ID-mapped mount.
    """
    trees = []
    for at, mount in enumerate(config.get("mounts") or []):
        options = MountOptions(mount.get("options") or [])
        if options.copy_up:
            import shutil  # noqa: F401  process 1 may import nothing
        if mount.get("type") == "bind":
            options.bind = True
        trees.append(_source(f"mounts[{at}].source", mount, options, bundle, user_namespace) if options.bind else -1)
    return trees


def _source(field: str, mount: dict[str, Any], options: MountOptions, bundle: str, user_namespace: Any) -> int:
    path = os.path.join(bundle, mount.get("source") or "")
    try:
        tree = S.open_tree(path, CLONE | (AT_RECURSIVE if options.deep else 0))
    except KernelError as error:
        raise BadInput(field, mount.get("source"), error.strerror or "cannot be opened") from error
    if mount.get("uidMappings") or mount.get("gidMappings") or options.idmap:
        namespace = user_namespace(mount.get("uidMappings"), mount.get("gidMappings"))
        S.mount_setattr(tree, attr_set=S.MOUNT_ATTR_IDMAP, userns_fd=namespace, recursive=options.deep)
        os.close(namespace)
    if options.set or options.clear:
        S.mount_setattr(tree, attr_set=options.set, attr_clr=_clears(options.clear, options.set))
    if options.deep_set or options.deep_clear:
        S.mount_setattr(tree, attr_set=options.deep_set, attr_clr=_clears(options.deep_clear, options.deep_set),
                        recursive=True)
    S.mount_setattr(tree, propagation=MS_SLAVE, recursive=True)
    return tree


def _clears(clear: int, bits: int) -> int:
    """The attributes to clear; the access time is one value of three bits: all of it, or none."""
    return clear & ~bits & ~S.MOUNT_ATTR__ATIME | (S.MOUNT_ATTR__ATIME if clear & S.MOUNT_ATTR__ATIME else 0)


class Root:
    """The root filesystem while it is put together; all paths are beneath it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = -1
        self._readonly: list[int] = []

    def enter(self, propagation: str) -> None:
        """Cut the namespace's mounts off from the host's, and make the root a mount of its own."""
        first = PROPAGATION[propagation.removeprefix("r") if propagation not in PROPAGATION else propagation] \
            if propagation else MS_SLAVE
        S.mount(None, "/", None, MS_REC | (first if first in (MS_PRIVATE, MS_SLAVE) else MS_SLAVE))
        tree = S.open_tree(self.path, CLONE | AT_RECURSIVE)
        S.mount_setattr(tree, propagation=MS_PRIVATE)
        S.move_mount(tree, self.path)
        os.close(tree)
        self.fd = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, path: str, resolve: int = RESOLVE_IN_ROOT, flags: int = os.O_PATH) -> int:
        """An existing file or directory beneath the root: openat2(2)."""
        return S.openat2(self.fd, path.lstrip("/") or ".", flags, resolve)

    def make(self, path: str, folder: bool, mode: int = 0o755) -> int:
        """The same, and what is missing of it is made: every part is opened before the next is made in it."""
        path = clean(path)
        try:
            return self.open(path)
        except KernelError as error:
            if error.errno != errno.ENOENT:
                raise BadInput("mounts.destination", path, error.strerror or "cannot be opened") from error
        parent = self.make(os.path.dirname(path), folder=True) if path != "/" else os.dup(self.fd)
        try:
            if folder:
                os.mkdir(os.path.basename(path), mode, dir_fd=parent)
            else:
                os.close(os.open(os.path.basename(path), os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))
        except FileExistsError:
            raise BadInput("mounts.destination", path, "is a link that leads nowhere beneath the root") from None
        finally:
            os.close(parent)
        return self.open(path)

    def mount(self, mount: dict[str, Any], tree: int, cgroup: str) -> None:
        """One entry of "mounts": mount(8)'s options, filesystems(5)."""
        options, target = MountOptions(mount.get("options") or []), mount["destination"]
        kind = mount.get("type") or "none"
        if kind == "tmpfs" and not any(word.startswith("mode=") for word in options.data):
            options.data += self._mode_of(target)
        if tree < 0 and kind == "cgroup":
            tree = self._cgroup(mount, options, cgroup)
        elif tree < 0:
            tree = self._filesystem(mount, options, kind)
        folder = stat.S_ISDIR(os.fstat(tree).st_mode)
        onto = self._plain(target) if kind in ("proc", "sysfs") else self.make(target, folder)
        if options.copy_up:
            _copy(f"/proc/self/fd/{onto}", f"/proc/self/fd/{tree}")
        S.move_mount(tree, target_fd=onto)
        if options.propagation:
            S.mount_setattr(tree, propagation=options.propagation & ~MS_REC,
                            recursive=bool(options.propagation & MS_REC))
        os.close(onto)

    def _mode_of(self, target: str) -> list[str]:
        """A tmpfs without a mode has that of the directory it covers, as runc and crun have it."""
        fd = self._existing(target)
        if fd < 0:
            return []
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        os.close(fd)
        return [f"mode={mode:o}"]

    def _plain(self, target: str) -> int:
        """The target of proc and sysfs, through no link: what reads them trusts them."""
        os.close(self.make(target, folder=True))
        try:
            return self.open(clean(target), RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS, os.O_PATH | os.O_DIRECTORY)
        except KernelError as error:
            rule = "must be a directory, not a link, for proc and sysfs"
            raise BadInput("mounts.destination", target, rule) from error

    def _filesystem(self, mount: dict[str, Any], options: MountOptions, kind: str) -> int:
        """A new filesystem, mounted nowhere yet: fsopen(2), fsconfig(2), fsmount(2)."""
        words = [*options.data, *(["ro"] if options.set & MOUNT_ATTR_RDONLY and kind != "tmpfs" else [])]
        context = -1
        try:
            context = S.fsopen(kind)
            S.fsconfig(context, FSCONFIG_SET_STRING, "source", mount.get("source") or kind)
            for word in words:
                key, has_value, value = word.partition("=")
                command = FSCONFIG_SET_STRING if has_value else FSCONFIG_SET_FLAG
                S.fsconfig(context, command, key, value if has_value else None)
            S.fsconfig(context, FSCONFIG_CMD_CREATE)
        except KernelError as error:
            raise BadInput("mounts", f"{kind} on {mount['destination']}", _reason(context, error)) from error
        tree = S.fsmount(context, options.set & ~(MOUNT_ATTR_RDONLY if kind == "tmpfs" else 0))
        if options.deep_set:
            S.mount_setattr(tree, attr_set=options.deep_set)
        if kind == "tmpfs" and options.set & MOUNT_ATTR_RDONLY:
            self._readonly.append(tree)  # later mounts and devices may need a place in it
        os.close(context)
        return tree

    def _cgroup(self, mount: dict[str, Any], options: MountOptions, cgroup: str) -> int:
        """The cgroup filesystem: a new mount in a cgroup namespace, else the container's own directory."""
        options.data = []
        try:
            return self._filesystem({**mount, "source": "cgroup"}, options, "cgroup2")
        except BadInput:
            tree = S.open_tree(cgroup, CLONE)
            S.mount_setattr(tree, attr_set=options.set)
            return tree

    def device(self, path: str, kind: int, number: tuple[int, int], mode: int, owner: tuple[int, int],
               bind: bool) -> None:
        """A device node: mknod(2), or a bind mount of the host's where a user namespace forbids mknod."""
        if bind:
            tree = S.open_tree(path, CLONE)
            S.move_mount(tree, target_fd=self.make(path, folder=False))
            os.close(tree)
            return
        parent, name = self.make(os.path.dirname(path), folder=True), os.path.basename(path)
        try:
            os.mknod(name, kind | mode, os.makedev(*number), dir_fd=parent)
        except FileExistsError:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_IFMT(there.st_mode) != kind or there.st_rdev != os.makedev(*number):
                raise BadInput("linux.devices", path, "is another file in the root filesystem") from None
        os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)
        os.close(parent)

    def devices(self, extra: list[dict[str, Any]], bind: bool) -> None:
        """The default devices and linux.devices, and the links of /dev (config-linux.md, "Default Devices")."""
        given = {clean(entry["path"]) for entry in extra}
        for name, number in DEVICES.items():
            if f"/dev/{name}" not in given:
                self.device(f"/dev/{name}", stat.S_IFCHR, number, 0o666, (0, 0), bind)
        for entry in extra:
            kind = {"b": stat.S_IFBLK, "p": stat.S_IFIFO}.get(entry["type"], stat.S_IFCHR)
            number = (entry.get("major", 0), entry.get("minor", 0))
            self.device(clean(entry["path"]), kind, number, entry.get("fileMode", 0o666) & 0o7777,
                        (entry.get("uid", 0), entry.get("gid", 0)), bind)
        folder = self.make("/dev", folder=True)
        for name, target in LINKS.items():
            try:
                os.symlink(target, name, dir_fd=folder)
            except FileExistsError:
                _replace_ptmx(folder, name, target)
        os.close(folder)

    def console(self, terminal: int) -> None:
        """/dev/console: the container's terminal over a plain file, through no link (CVE-2025-52565)."""
        folder = self.make("/dev", folder=True)
        try:
            os.close(os.open("console", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder))
        except FileExistsError:
            pass  # opened below, without following it
        onto = self.open("/dev/console", RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)
        tree = S.open_tree("", CLONE | S.AT_EMPTY_PATH, terminal)
        S.move_mount(tree, target_fd=onto)
        for fd in (folder, onto, tree):
            os.close(fd)

    def pivot(self, no_pivot: bool) -> None:
        """pivot_root(2): the root becomes "/", and the host's tree goes; with --no-pivot by MS_MOVE and chroot(2)."""
        os.fchdir(self.fd)
        if no_pivot:
            S.mount(self.path, "/", None, S.MS_MOVE)
            os.chroot(".")
        else:
            old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            S.pivot_root(".", ".")
            os.fchdir(old)
            os.close(old)
            S.mount(None, ".", None, MS_SLAVE | MS_REC)
            S.umount2(".", S.MNT_DETACH)
        os.chdir("/")

    def chroot(self) -> None:
        """Without a mount namespace of its own: chroot(2) only."""
        os.chroot(self.path)
        os.chdir("/")
        self.fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def mask(self, path: str) -> None:
        """maskedPaths: the host's /dev/null over a file, an empty read-only tmpfs over a directory.

        Done before the pivot, while /dev/null is still the host's: an image's could be anything (CVE-2025-31133).
        """
        target = self._existing(path)
        if target < 0:
            return
        if stat.S_ISDIR(os.fstat(target).st_mode):
            S.move_mount(_new("tmpfs", {"size": "0"}, MOUNT_ATTR_RDONLY), target_fd=target)
        else:
            tree = S.open_tree("/dev/null", CLONE)
            S.mount_setattr(tree, propagation=MS_PRIVATE)  # nothing of the host's /dev comes in
            S.move_mount(tree, target_fd=target)
            os.close(tree)
        os.close(target)

    def readonly(self, path: str) -> None:
        """readonlyPaths: the same file or directory over itself, read-only with all that is mounted beneath."""
        target = self._existing(path)
        if target < 0:
            return
        tree = S.open_tree("", CLONE | AT_RECURSIVE | S.AT_EMPTY_PATH, target)
        S.mount_setattr(tree, attr_set=MOUNT_ATTR_RDONLY, recursive=True)
        S.move_mount(tree, target_fd=target)
        os.close(tree)
        os.close(target)

    def _existing(self, path: str) -> int:
        try:
            return self.open(path)
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                raise
            return -1

    def finish(self, readonly: bool, propagation: str) -> None:
        """After the pivot: root.readonly, rootfsPropagation, and the tmpfs mounts that were to be read-only."""
        for tree in self._readonly:
            S.mount_setattr(tree, attr_set=MOUNT_ATTR_RDONLY)
        if propagation:
            kind = PROPAGATION[propagation] if propagation in PROPAGATION else PROPAGATION[propagation[1:]] | MS_REC
            S.mount(None, "/", None, kind)
        if readonly:
            S.mount_setattr(AT_FDCWD, "/", attr_set=MOUNT_ATTR_RDONLY)


def _new(fstype: str, options: dict[str, str], attributes: int) -> int:
    """A small filesystem of the runtime's own, mounted nowhere yet."""
    context = S.fsopen(fstype)
    for key, value in options.items():
        S.fsconfig(context, FSCONFIG_SET_STRING, key, value)
    S.fsconfig(context, FSCONFIG_CMD_CREATE)
    tree = S.fsmount(context, attributes)
    os.close(context)
    return tree


def _reason(context: int, error: KernelError) -> str:
    """What the filesystem itself says of an option it refuses: fsopen(2), "message retrieval"."""
    try:
        said = os.read(context, 4096).decode(errors="replace").strip()
    except OSError:
        said = ""
    return f"{error.strerror}{': ' + said[2:] if said else ''}"


def _copy(source: str, target: str) -> None:
    """tmpcopyup: what the image has under the mount point is copied into the tmpfs."""
    from shutil import copytree
    copytree(source + "/.", target + "/.", symlinks=True, dirs_exist_ok=True)
    for folder, names, files in os.walk(source):
        for name in (".", *names, *files):
            there = os.lstat(f"{folder}/{name}")
            os.chown(f"{target}{folder.removeprefix(source)}/{name}", there.st_uid, there.st_gid, follow_symlinks=False)


def _replace_ptmx(folder: int, name: str, target: str) -> None:
    """A ptmx of the image would be of another devpts: it is replaced; any other link of the image stands."""
    if name == "ptmx":
        os.unlink(name, dir_fd=folder)
        os.symlink(target, name, dir_fd=folder)
