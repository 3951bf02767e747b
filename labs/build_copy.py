"""What COPY and ADD copy: the files of a context, or of another image, that sources name and .dockerignore leaves.

Docker's reference, "COPY" and ".dockerignore files".  The build context ends at its directory: a source is
resolved by openat2(2) beneath it, so that neither ``..`` nor a symbolic link takes in a file from elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from labs import layer, syscalls
from labs.build_root import IN_ROOT, Item, Root
from labs.errors import BadInput, KernelError
from labs.mounts import opened

BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS
TAR_MAGIC = slice(257, 262)  # "ustar", tar(5)
OTHER_ARCHIVES = {b"BZh": "bzip2", b"\xfd7zX": "xz"}
_PIECES = re.compile(r"\*\*/|\*+|\?|\\.|\[\^?(?:\\.|[^\]\\])+\]|.", re.DOTALL)


def nothing(path: str) -> bool:
    """Hide no path."""
    return False


class Tree(NamedTuple):
    """Where sources are looked for.

    root: an open directory.  what: its name in messages.  resolve: RESOLVE_* for openat2(2).  hidden: what
    .dockerignore hides.  owned: whether its files have owners in the sense of the image (a context's have not).
    """

    root: int
    what: str
    resolve: int = IN_ROOT
    hidden: Callable[[str], bool] = nothing
    owned: bool = True

    def open(self, path: str, flags: int = os.O_PATH) -> int:
        """What a path leads to, opened; BadInput where it leads to nothing or out of the tree."""
        try:
            return syscalls.openat2(self.root, path or ".", flags, self.resolve)
        except KernelError as error:
            reason = "no such file in" if error.errno != errno.EXDEV else "a symbolic link leads out of"
            raise BadInput("source", path, f"{reason} {self.what}") from error


@contextmanager
def context(path: str, ignore: str = "") -> Iterator[Tree]:
    """The build context in a directory; ignore: the text of its .dockerignore."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BadInput("context", path, "must be a directory") from error
    with opened(fd) as root:
        yield Tree(root, "the context", BENEATH, ignored(ignore), owned=False)


# Patterns


def pattern(text: str, deep: bool = False) -> re.Pattern[str]:
    """A pattern as Go's path.Match has it (* ? [a-z] and a backslash); deep: ** stands for any directories too."""
    made = ""
    for piece in _PIECES.findall(text):
        if deep and piece.startswith("**"):
            made += "(?:.*/)?" if piece.endswith("/") else ".*"
        elif piece.startswith("*"):
            made += "[^/]*/" if piece.endswith("/") else "[^/]*"
        elif piece == "?":
            made += "[^/]"
        elif piece[0] == "[" and len(piece) > 2:
            made += "[" + re.sub(r"([\[&~|])", r"\\\1", piece[1:])
        elif piece in ("[", "\\"):
            raise BadInput("pattern", text, "an opening bracket or a backslash has nothing after it")
        else:
            made += re.escape(piece[-1])
    try:
        return re.compile(made, re.DOTALL)
    except re.error as error:
        raise BadInput("pattern", text, f"is no pattern: {error}") from error


def ignored(text: str) -> Callable[[str], bool]:
    """A .dockerignore as a question about a path: the last line that matches it, or a directory it is in, decides."""
    rules = []
    for line in text.removeprefix("\ufeff").splitlines():
        shown, given = line.strip().startswith("!"), line.strip().removeprefix("!").strip()
        if line.startswith("#") or not line.strip():
            continue
        if not given:
            raise BadInput(".dockerignore", line, "nothing stands after the !")
        clean = posixpath.normpath(given).lstrip("/")
        if clean != ".":
            rules.append((pattern(clean + "/**", deep=True), pattern(clean, deep=True), not shown))

    def hidden(path: str) -> bool:
        fitting = (hides for below, it, hides in reversed(rules) if it.fullmatch(path) or below.fullmatch(path))
        return next(fitting, False)

    return hidden


# Sources


def find(tree: Tree, source: str) -> list[str]:
    """The paths that a source stands for, relative to the tree: one, or all that its wildcards match."""
    clean = posixpath.normpath(source.lstrip("/") or ".")
    if clean.split("/")[0] == "..":
        raise BadInput("source", source, f"must not lead out of {tree.what}")
    paths = [""]
    for part in [] if clean == "." else clean.split("/"):
        if re.search(r"[*?[\\]", part):
            paths = [os.path.join(path, name) for path in paths for name in _matching(tree, path, pattern(part))]
        else:
            paths = [os.path.join(path, part) for path in paths]
    return paths


def _matching(tree: Tree, path: str, wanted: re.Pattern[str]) -> list[str]:
    with suppress(BadInput), opened(tree.open(path, os.O_RDONLY | os.O_DIRECTORY)) as folder:
        return sorted(name for name in os.listdir(folder) if wanted.fullmatch(name))
    return []


class Source(NamedTuple):
    """What one path gives: of a directory, what is in it (items); of a file, itself."""

    items: list[Item]
    folder: bool


def collect(tree: Tree, sources: Sequence[str], undo: ExitStack) -> list[Source]:
    """Everything that sources stand for; it can be read until undo is closed."""
    found = []
    for source in sources:
        some = [one for path in find(tree, source) if (one := _source(tree, path, undo)).items]
        if not some:
            raise BadInput("source", source, f"no such file in {tree.what}"
                           + (", or .dockerignore hides it" if not tree.owned else ""))
        found += some
    return found


def _source(tree: Tree, path: str, undo: ExitStack) -> Source:
    fd = tree.open(path)
    undo.callback(os.close, fd)
    place, status = f"/proc/self/fd/{fd}", os.fstat(fd)
    hidden = bool(path) and tree.hidden(path)
    if not stat.S_ISDIR(status.st_mode):
        return Source([] if hidden else [Item(place, os.path.basename(path), status)], folder=False)
    items, needed = list[Item](), {"" if not hidden else "."}
    for below, its in reversed([("", status), *layer.walk(place)]):
        if below in needed or (below and not tree.hidden(os.path.join(path, below))):
            items.append(Item(os.path.join(place, below) if below else place, below, its))
            needed.add(os.path.dirname(below))
    return Source(items[::-1], folder=True)


def digest(sources: Sequence[Source], owned: bool) -> str:
    """The digest of what is copied: names, kinds, modes, contents, and the owners if they count; no times.

    So a file that was only touched is the same file, as in BuildKit.
    """
    whole = hashlib.sha256()
    for item in (item for source in sources for item in source.items):
        status = item.status
        owner = (status.st_uid, status.st_gid) if owned else None
        facts = [item.path, status.st_mode, _content(item), status.st_rdev, owner]
        whole.update(json.dumps(facts).encode())
    return whole.hexdigest()


def _content(item: Item) -> str:
    if stat.S_ISLNK(item.status.st_mode):
        return os.readlink(item.place)
    if not stat.S_ISREG(item.status.st_mode):
        return ""
    with open(item.place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def archive(item: Item) -> bool:
    """Whether ADD unpacks a file: a tar, plain, gzip or zstd.  Other compressed ones are refused by name."""
    if not stat.S_ISREG(item.status.st_mode):
        return False
    with open(item.place, "rb") as file:
        kind = OTHER_ARCHIVES.get(file.read(4)) or OTHER_ARCHIVES.get(os.pread(file.fileno(), 3, 0))
        if kind:
            raise BadInput("source", item.path, f"{kind} is not unpacked here; gzip, zstd and plain tar are")
        file.seek(0)
        with suppress(*layer.BROKEN):
            return layer.decompressed(file).read(512)[TAR_MAGIC] == b"ustar"
    return False


class Copy(NamedTuple):
    """One COPY or ADD.

    path: the destination, absolute.  folder: whether it is meant as a directory.  chown, mode: None or "" for
    what the files have.  owned: whether they have owners already; root's otherwise.  unpack: archives too.
    """

    sources: list[Source]
    path: str
    folder: bool
    chown: str
    mode: int | None
    owned: bool
    unpack: bool

    def facts(self) -> list[object]:
        """What decides the layer, for the cache key."""
        return [digest(self.sources, self.owned), *self[1:]]

    def put(self, root: Root, scratch: str) -> None:
        """Write it into an image; scratch: a directory to unpack archives in."""
        given = root.owner(self.chown) if self.chown else None
        for source in self.sources:
            first = source.items[0]
            if self.unpack and not source.folder and archive(first):
                with _unpacked(first, scratch) as items:
                    root.put(items, self.path, owner=given, mode=self.mode)
                continue
            inside = not source.folder and (self.folder or root.is_folder(self.path))
            target = os.path.join(self.path, first.path) if inside else self.path
            items = source.items if source.folder else [first._replace(path="")]
            root.put(items, target, owner=given or (None if self.owned else (0, 0)), mode=self.mode)


@contextmanager
def _unpacked(item: Item, scratch: str) -> Iterator[list[Item]]:
    """What is in an archive, checked as a layer is; it is copied with the owners that it names."""
    folder = tempfile.mkdtemp(dir=scratch)
    os.chmod(folder, 0o755)  # noqa: S103  it may become a directory of the image
    with open(item.place, "rb") as file:
        layer.unpack(file, folder, whiteouts="apply")
    with context(folder) as tree, ExitStack() as undo:
        yield collect(tree, ["."], undo)[0].items
