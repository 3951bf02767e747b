"""The mounts of a container, each with its origin on the host, and where what is written to a path ends up.

proc_pid_mountinfo(5) says of a mount which filesystem it shows (major:minor) and which directory of it (root).
The host's own table says where that directory is found on the host; that it is the same one, stat(2) confirms.

A picture says the same on every run: mount IDs, peer group numbers and random names are left out.
"""

from __future__ import annotations

import errno
import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from labs import mounts, show
from labs.errors import BadInput, KernelError
from labs.mounts import Mount

LAYER, HOST, MEMORY, KERNEL, COVER, REFUSED = "layer", "host", "memory", "kernel", "cover", "refused"
# Filesystems that hold no data: the kernel makes up what is read from them (filesystems(5)).
MADE_UP = {"proc", "sysfs", "cgroup2", "mqueue", "devpts", "securityfs", "debugfs", "tracefs", "bpf", "nsfs"}
# What the kernel puts after the name of a file that is no longer there: in mountinfo, and in links of /proc.
UNLINKED, GONE = "//deleted", " (deleted)"
WORDS = {LAYER: "the container's own layer", HOST: "the host's", MEMORY: "memory, gone with the container",
         KERNEL: "the kernel", COVER: "nothing: it covers what is below", REFUSED: "refused: read-only"}
TINTS = {LAYER: ("f2", "#fdf0d5"), HOST: ("f1", "#e3eefa"), MEMORY: ("f4", "#efe6fa"), KERNEL: ("f6", "#eceff3"),
         COVER: ("f6", "#eceff3"), REFUSED: ("f5", "#fbe5e5")}


class Place(NamedTuple):
    """One mount of a container.

    Attributes:
        row: its line of mountinfo.
        depth: how many mounts it hangs under.
        kind: LAYER (an overlay's upper directory), HOST (found on the host too), MEMORY, KERNEL, or COVER (over a part
            of the kernel's).
        origin: the directory or file on the host, of an overlay the upper one; "" where there is none.
        readonly: whether this mount, or its whole filesystem, refuses to be written to.
    """

    row: Mount
    depth: int
    kind: str
    origin: str
    readonly: bool


class Landing(NamedTuple):
    """Where a write to a path lands.

    Attributes:
        target: the mount that takes it.
        kind: one of a Place, or REFUSED.
        where: the path on the host, or "".
        covered: whether something else is mounted over that path on the host, so that the host does not see it.
    """

    path: str
    target: str
    kind: str
    where: str
    covered: bool = False


def places(pid: int) -> list[Place]:
    """The mounts of a process, from its root down; a mount that another one covers comes before that one."""
    rows, host = mounts.table(pid), mounts.table()
    if (top := mounts.root(rows)) is None:
        raise BadInput("pid", pid, "its root is not a mount, so it sees none")
    return list(_walk(_place(pid, top, host), pid, rows, host))


def lands(pid: int, path: str) -> Landing:
    """What becomes of a write to a path of a process: the kernel says on which mount it is, links stay inside."""
    row, inside = _find(pid, path)
    place = next(place for place in places(pid) if place.row.id == row.id)
    if place.readonly:
        return Landing(path, row.target, REFUSED, "")
    where = os.path.normpath(f"{place.origin}/{inside}") if place.origin else ""
    return Landing(path, row.target, place.kind, where, place.kind == HOST and _is_covered(where, row))


def draw(pid: int, writes: Sequence[str] = (), *, whole: bool = False) -> show.Picture:
    """Draw a container's mounts as a tree: origin on the host, read-only or not, peer group; then the fate of writes.

    Args:
        pid: a process of the container.
        writes: paths in the container; for each, where a write lands.
        whole: the kernel's own too (/proc, /sys, …, and what covers parts of them), which are else only counted.
    """
    found, groups = places(pid), _groups()
    shown = [place for place in found if whole or not _is_made_up(place, found)]
    rows = [(place, _tags(place.row, groups)) for place in shown]
    fates = [lands(pid, path) for path in writes]
    rest = f"… and {len(found) - len(shown)} of the kernel's own" if len(shown) < len(found) else ""
    alt = ["Mounts of a container", *(_line(*row) for row in rows), *([rest] if rest else [])]
    alt += ["Where a write lands", *(f"{one.path} → {_fate(one)}" for one in fates)] if fates else []
    cards = "".join(_card(*row) for row in rows) + (f'<p style="margin:.4em 0;opacity:.75">{rest}</p>' if rest else "")
    head = '<p style="margin:.9em 0 .3em;font-weight:600">Where a write lands</p>'
    return show.Picture("\n".join(alt), f'<div class="labs-figure" style="line-height:1.5">{cards}'
                        f'{head + "".join(map(_arrow, fates)) if fates else ""}</div>')


def propagation(path: str, pids: Mapping[str, int | str]) -> show.Picture:
    """Draw how a mount made below path spreads among some processes' mounts there: mount_namespaces(7).

    An arrow leads from each mount of a peer group to its peers, and to the slaves of the group; the same letter is
    the same group.

    Args:
        path: a mount point, the same one in each of their mount namespaces.
        pids: label → pid, in the order in which they are drawn.
    """
    rows = {label: [row for row in mounts.table(pid) if row.target == path][-1] for label, pid in pids.items()}
    letters = show.Letters()
    boxes = {label: (label, _tags(row, lambda number: letters[number])) for label, row in rows.items()}
    group = {label: mounts.peers(row) for label, row in rows.items()}
    arrows = [(one, other) for one in rows for other in rows if one != other and "shared" in group[one]
              and group[one]["shared"] in (group[other].get("shared"), group[other].get("master"))]
    return show.graph("Mount propagation", boxes, arrows)


def _walk(place: Place, pid: int, rows: Sequence[Mount], host: Sequence[Mount]) -> Iterator[Place]:
    """A mount and all that hang under it, by path; those that it cannot reach are left out."""
    yield place
    for row in sorted((row for row in rows if row.parent == place.row.id), key=lambda row: row.target):
        below = _place(pid, row, host)._replace(depth=place.depth + 1)
        if place.kind == KERNEL and below.kind == MEMORY:
            below = below._replace(kind=COVER)
        yield from _walk(below, pid, rows, host)


def _place(pid: int, row: Mount, host: Sequence[Mount]) -> Place:
    readonly = "ro" in row.options.split(",") or "ro" in row.super_options.split(",")
    if row.fstype in MADE_UP:
        return Place(row, 0, KERNEL, "", readonly)
    if row.fstype == "overlay":
        upper = _option(row.super_options, "upperdir")
        return Place(row, 0, LAYER, os.path.normpath(upper + row.root) if upper else "", readonly or not upper)
    origin = _on_host(pid, row, host)
    return Place(row, 0, HOST if origin else MEMORY, origin, readonly)


def _option(options: str, name: str) -> str:
    """One option of an overlay; a comma in a path is escaped by a backslash (overlayfs.rst)."""
    words = options.replace("\\,", "\0").split(",")
    return next((word.partition("=")[2].replace("\0", ",") for word in words if word.startswith(f"{name}=")), "")


def _on_host(pid: int, row: Mount, host: Sequence[Mount]) -> str:
    """The path on the host of what a mount shows: a host's mount of the same filesystem holds it, or ""."""
    for one in host:
        if one.dev == row.dev and f"{row.root}/".startswith(one.root.rstrip("/") + "/"):
            inside = os.path.relpath(row.root.removesuffix(UNLINKED), one.root)
            path = os.path.normpath(os.path.join(one.target, inside))
            with suppress(OSError):  # something else is mounted over it, or it is gone
                if row.root.endswith(UNLINKED):
                    return path + GONE
                if os.path.samestat(os.stat(path), os.stat(f"/proc/{pid}/root{row.target}")):
                    return path
    return ""


def _is_covered(where: str, row: Mount) -> bool:
    with suppress(KernelError):  # no such directory: what is on top of it does not have it
        return mounts.holding(os.path.dirname(where)).dev != row.dev
    return True


def _find(pid: int, path: str) -> tuple[Mount, str]:
    """The mount that a path lies on, or would lie on if it were made, and the rest of the path from there."""
    try:
        row, real = _opened(pid, path)
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        parent, name = os.path.split(path.rstrip("/"))
        row, folder = _opened(pid, parent or "/")
        real = f"{folder}/{name}"
        with suppress(OSError):  # no link, and nothing else either
            return _find(pid, os.path.join(folder, os.readlink(f"/proc/{pid}/root{real}")))
    return row, os.path.relpath(real, row.target)


def _opened(pid: int, path: str) -> tuple[Mount, str]:
    """The mount of a path and the path without links, both as the process sees them."""
    fd = mounts.beneath(f"/proc/{pid}/root", path)
    try:
        return mounts.holding_fd(fd, pid), os.readlink(f"/proc/self/fd/{fd}").removesuffix(GONE)
    finally:
        os.close(fd)


def _is_made_up(place: Place, found: Sequence[Place]) -> bool:
    """Whether it is a filesystem of the kernel, or hides or protects a part of one."""
    tops = [one.row.target for one in found if one.kind == KERNEL]
    return any(f"{place.row.target}/".startswith(f"{top}/") for top in tops)


Groups = Callable[[int], str]


def _groups() -> Groups:
    """A letter for each peer group, with the host's mount that is in it."""
    letters = show.Letters()
    host = {mounts.peers(row).get("shared"): row.target for row in mounts.table()}

    def name(number: int) -> str:
        return letters[number] + (f" (with the host's {show.stable(host[number])})" if number in host else "")

    return name


def _tags(row: Mount, name: Groups) -> str:
    words = {"shared": "shared {}", "master": "slave of {}", "unbindable": "unbindable"}
    tags = [words[kind].format(name(number) if number else "")
            for kind, number in mounts.peers(row).items() if kind in words]
    return ", ".join(tags) or "private"


def _origin(place: Place) -> str:
    return show.stable(place.origin) or WORDS[place.kind]


def _line(place: Place, group: str) -> str:
    mode = "ro" if place.readonly else "rw"
    return f"{'  ' * place.depth}{place.row.target} ({place.row.fstype}, {mode}) ← {_origin(place)} [{group}]"


def _fate(one: Landing) -> str:
    return f"{WORDS[one.kind]}: {_path(one)}" if one.where else WORDS[one.kind]


def _path(one: Landing) -> str:
    return show.stable(one.where) + (" (under another mount there)" if one.covered else "")


def _card(place: Place, group: str) -> str:
    mode = "ro" if place.readonly else "rw"
    tint, plain = TINTS[place.kind]
    return (f'<div style="margin:.35em 0 .35em {place.depth * 0.9:.1f}em;padding:.25em .6em;'
            f'border-left:4px solid var(--labs-c{tint[1]},#4d5a69);background:var(--labs-{tint},{plain});'
            'color:var(--labs-ink,#1b2430);overflow-wrap:anywhere">'
            f'<strong>{html.escape(place.row.target)}</strong> <small>{place.row.fstype}, {mode}</small><br>'
            f'<span>← {html.escape(_origin(place))}</span><br><small>{html.escape(group)}</small></div>')


def _arrow(one: Landing) -> str:
    tint, plain = TINTS[one.kind]
    where = f"<br><span>{html.escape(_path(one))}</span>" if one.where else ""
    return (f'<div style="margin:.3em 0;padding:.2em .6em;background:var(--labs-{tint},{plain});'
            'color:var(--labs-ink,#1b2430);overflow-wrap:anywhere">'
            f'<strong>{html.escape(one.path)}</strong> → {WORDS[one.kind]}{where}</div>')
