"""What each layer of an image did to the one tree that a container sees, and what of it is in vain.

A file that an upper layer replaces or removes is still in the lower one, is stored and is sent: those bytes
are wasted.  The layers are read as streams of entries, nothing is unpacked (image-spec/layer.md).
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from labs import layer, show
from labs.errors import Mismatch
from labs.image import INDEXES, MANIFESTS, NAME, Descriptor, Image, Layout, children, load, parse

ADDED, CHANGED, REMOVED, KEPT = "+", "~", "-", " "
LINES = 12  # of a directory in the picture; the rest is counted


class Change(NamedTuple):
    """What a layer did to one path: ADDED, CHANGED or REMOVED; size: bytes the layer holds for it."""

    kind: str
    path: str
    size: int = 0


class Hidden(NamedTuple):
    """A file that is in a layer and that nobody can see: its bytes, its layer, the layer that hides it (from 1)."""

    path: str
    size: int
    layer: int
    by: int


class LayerView(NamedTuple):
    """One layer.

    Attributes:
        number: from 1, the lowest.
        created_by: what the image's history says of it, or "".
        changes: by path; a directory only where its owner or mode is new.
        added: bytes of the files in the layer.
        hidden: its files that upper layers replace or remove.
        tree: path → bytes of a file, 0 for a link or a node, None for a directory: all that is seen with this
            layer on top.
    """

    number: int
    created_by: str
    blob: Descriptor
    diff_id: str
    changes: tuple[Change, ...]
    added: int
    hidden: tuple[Hidden, ...]
    tree: Mapping[str, int | None]

    @property
    def wasted(self) -> int:
        """Bytes of the files that are hidden."""
        return sum(one.size for one in self.hidden)

    def paths(self, kind: str) -> list[str]:
        """The paths that were ADDED, CHANGED or REMOVED."""
        return [one.path for one in self.changes if one.kind == kind]


def layers(layout: Layout, image: Image | str) -> list[LayerView]:
    """Look into each layer of an image, the lowest first; image: as load() gives it, or a name in the layout.

    Raises Mismatch where a blob is not what its descriptor and the image's configuration say.
    """
    one = load(layout, image) if isinstance(image, str) else image
    stack, views, created_by = _Stack(), list[LayerView](), _history(one)
    for number, (blob, diff_id) in enumerate(zip(one.layers, one.diff_ids, strict=True), 1):
        changes = tuple(sorted(stack.put(_entries(layout, blob, diff_id), number), key=lambda change: change.path))
        said = created_by[number - 1] if number <= len(created_by) else ""
        views.append(LayerView(number, said, blob, diff_id, changes, sum(change.size for change in changes), (),
                               stack.sizes()))
    hidden = sorted(stack.hidden)
    return [view._replace(hidden=tuple(lost for lost in hidden if lost.layer == view.number)) for view in views]


def waste(layout: Layout, image: Image | str) -> list[Hidden]:
    """Every file of the image that nobody can see, the largest first."""
    found = [lost for view in layers(layout, image) for lost in view.hidden]
    return sorted(found, key=lambda lost: (-lost.size, lost.path))


def _history(image: Image) -> list[str]:
    """What made each layer: history in config.md, without the entries that made none."""
    steps = image.settings.get("history") or []
    return [str(step.get("created_by", "")) for step in steps if not step.get("empty_layer")]


class _Entry(NamedTuple):
    """What an entry of a tar says about a path: same is what makes a directory the same; link: a hard link's target."""

    size: int | None
    same: object
    link: str = ""


def _entries(layout: Layout, blob: Descriptor, diff_id: str) -> dict[str, _Entry]:
    """The paths of a layer, checked; the last entry of a path counts."""
    found: dict[str, _Entry] = {}
    with layout.open(blob.digest) as source:
        reading = layer.entries(source)
        while True:
            try:
                member = next(reading)
            except StopIteration as end:
                done: layer.Unpacked = end.value
                break
            directory = (member.mode, member.uid, member.gid) if member.isdir() else None
            link = layer.check_path(member.linkname, "link target") if member.islnk() else ""
            held = None if member.isdir() else member.size if member.isreg() else 0
            found[layer.check_path(member.name)] = _Entry(held, directory, link)
    for field, expected, is_now in (("digest", blob.digest, done.digest), ("diffID", diff_id, done.diff_id)):
        if expected != is_now:
            raise Mismatch("layer", field, expected, is_now)
    found.pop(".", None)
    return found


@dataclass
class _File:
    """One inode: the layer that brought it, and how many names it still has."""

    layer: int
    size: int | None
    same: object
    names: int = 1


class _Stack:
    """The tree as it grows, layer by layer, and what has fallen out of it."""

    def __init__(self) -> None:
        self.tree: dict[str, _File] = {}
        self.hidden: list[Hidden] = []

    def sizes(self) -> dict[str, int | None]:
        """Path → bytes, or None for a directory."""
        return {path: file.size for path, file in self.tree.items()}

    def put(self, entries: Mapping[str, _Entry], number: int) -> Iterator[Change]:
        """Put a layer on top: first all that it removes from below, then what it brings, whatever the tar's order."""
        before = dict(self.tree)
        for path in entries:
            folder, name = os.path.split(path)
            if name.startswith(layer.WHITEOUT):
                inside = f"{folder}/" if folder else ""
                hides = inside if name == layer.OPAQUE else inside + name.removeprefix(layer.WHITEOUT)
                yield from self._remove(hides, entries, number)
        brought = (path for path in entries if not os.path.basename(path).startswith(layer.WHITEOUT))
        for path in sorted(brought, key=lambda path: (entries[path].link != "", path)):
            self._parents(path, number)
            if change := self._bring(path, entries[path], before, number):
                yield change

    def _remove(self, hides: str, entries: Mapping[str, _Entry], number: int) -> Iterator[Change]:
        """A path, or with a / at its end all that is below it; said once, for the uppermost that does not come back."""
        below = not hides or hides.endswith("/")
        gone = self._take(hides, number)
        tops = [path for path in gone if path == hides or (below and "/" not in path[len(hides):])]
        yield from (Change(REMOVED, path) for path in tops if path not in entries)

    def _take(self, hides: str, number: int) -> list[str]:
        file = self.tree.get(hides)
        if file and file.same is None:
            gone = [hides]
        elif file or not hides or hides.endswith("/"):
            inside = hides if not file else hides + "/"
            gone = [path for path in self.tree if path == hides or path.startswith(inside)]
        else:
            return []
        for path in gone:
            file = self.tree.pop(path)
            file.names -= 1
            if file.size and not file.names:
                self.hidden.append(Hidden(path, file.size, file.layer, number))
        return gone

    def _parents(self, path: str, number: int) -> None:
        """Directories that a layer takes for granted; a link in such a place gives way, as overlay has it."""
        folder = os.path.dirname(path)
        if folder and (folder not in self.tree or self.tree[folder].same is None):
            self._parents(folder, number)
            self._take(folder, number)
            self.tree[folder] = _File(number, None, (0o755, 0, 0))

    def _bring(self, path: str, entry: _Entry, before: Mapping[str, _File], number: int) -> Change | None:
        old = before.get(path)
        kind = CHANGED if old else ADDED
        if entry.same and old and old.same and path in self.tree:  # a directory that stays, with what is in it
            self.tree[path] = _File(number, None, entry.same)
            return Change(kind, path) if old.same != entry.same else None
        self._take(path, number)
        target = self.tree.get(entry.link) if entry.link else None
        if target:
            target.names += 1
        self.tree[path] = target or _File(number, entry.size, entry.same)
        return Change(kind, path, entry.size or 0)


# Pictures


def picture(layout: Layout, image: Image | str) -> show.Picture:
    """Draw the layers of an image: a box each, to be opened, with the tree as it is with that layer on top."""
    views = layers(layout, image)
    added, wasted = sum(view.added for view in views), sum(view.wasted for view in views)
    title = f"Layers: {len(views)}, with {size(added)} in files, {size(wasted)} of it wasted"
    rows = {view.number: list(_Outline(view).rows()) for view in views}
    small = sum(map(len, rows.values())) <= 100
    alt, boxes = [title], []
    for view in views:
        alt += ["", _headline(view), *(row.text() for row in rows[view.number])]
        boxes.append(_box(view, rows[view.number], max(one.added for one in views), small))
    top = f'<p style="margin:0 0 .6rem">{title}</p>'
    return show.Picture("\n".join(alt), f'<div class="labs-figure">{top}{"".join(boxes)}</div>')


def size(number: int) -> str:
    """Bytes as a reader takes them in: 512 B, 1.5 KiB, 28 MiB."""
    value, units = float(number), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


class _Row(NamedTuple):
    """A line of a layer's tree."""

    depth: int
    kind: str
    name: str
    note: str

    def text(self) -> str:
        """The line for those who do not see the picture."""
        return f"{self.kind} {'  ' * self.depth}{self.name}" + (f"  ({self.note})" if self.note else "")

    def markup(self) -> str:
        """The line as an item of a list."""
        mark = MARKS[self.kind]
        name = f"<del>{html.escape(self.name)}</del>" if self.kind == REMOVED else html.escape(self.name)
        faded = ";opacity:.75" if self.kind == KEPT else ""
        return (f'<li style="display:flex;gap:.5em;margin:0;padding-left:{self.depth * 1.1:.1f}em{faded}">'
                f'{mark}<span style="overflow-wrap:anywhere">{name}'
                f'<small style="margin-left:.8em">{html.escape(self.note)}</small></span></li>')


def _badge(tint: str, plain: str, sign: str, word: str) -> str:
    return (f'<span role="img" aria-label="{word}" style="flex:none;width:1.3em;height:1.3em;line-height:1.3em;'
            f'text-align:center;border-radius:.2em;margin-top:.2em;background:var(--labs-{tint},{plain});'
            f'color:var(--labs-ink,#1b2430)">{sign}</span>')


MARKS = {ADDED: _badge("f3", "#e2f3e5", "+", "added"), CHANGED: _badge("f2", "#fdf0d5", "~", "changed"),
         REMOVED: _badge("f5", "#fbe5e5", "−", "removed"), KEPT: '<span style="flex:none;width:1.3em"></span>'}


class _Outline:
    """The tree with one layer on top, as few lines: what did not change, and what is all new, stands in one."""

    def __init__(self, view: LayerView) -> None:
        self.view, self.kinds = view, {change.path: change.kind for change in view.changes}
        self.touched = {one for path in self.kinds for one in (path, *_ancestors(path))}
        self.below: dict[str, list[str]] = {}  # directory → every path below it, at any depth
        self.children: dict[str, list[str]] = {}
        for path in sorted({*view.tree, *view.paths(REMOVED)}):
            self.children.setdefault(os.path.dirname(path), []).append(path)
            for folder in _ancestors(path):
                self.below.setdefault(folder, []).append(path)

    def rows(self, folder: str = "", depth: int = 0) -> Iterator[_Row]:
        """The lines for what is in a directory: what this layer touched before the rest, LINES at most."""
        paths = self.children.get(folder, [])
        shown = paths
        if len(paths) > LINES:
            shown = [path for path in paths if path in self.touched][:LINES] or paths[:LINES]
        for path in shown:
            inside = self.below.get(path, [])
            kinds = {self.kinds.get(one, KEPT) for one in inside}
            whole = kinds == {KEPT} or (kinds == {self.kinds.get(path)} and len(inside) > LINES)
            yield _Row(depth, self.kinds.get(path, KEPT), self._name(path), self._note(path, whole))
            if not whole:
                yield from self.rows(path, depth + 1)
        if rest := set(paths) - set(shown):
            touched = len(rest & self.touched)
            yield _Row(depth, KEPT, f"… {len(rest)} more", f"{touched} of them touched" if touched else "untouched")

    def _name(self, path: str) -> str:
        return os.path.basename(path) + ("/" if path in self.below or self.view.tree.get(path, 0) is None else "")

    def _note(self, path: str, whole: bool) -> str:
        """How large, how many where only this line stands for them, and what of it is in vain."""
        paths = {path, *self.below.get(path, ())} if whole else {path}
        files = [number for one in paths if (number := self.view.tree.get(one)) is not None]
        lost = [one for one in self.view.hidden if one.path in paths]
        words = [f"{len(files)} file{'s' * (len(files) != 1)}"] if path in self.below and whole else []
        words += [size(sum(files))] if sum(files) else []
        if lost:
            words.append(f"{size(sum(one.size for one in lost))} wasted" if path in self.below
                         else f"wasted: hidden by layer {lost[0].by}")
        return ", ".join(words)


def _ancestors(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path


def _headline(view: LayerView) -> str:
    done = ", ".join(f"{len(view.paths(kind))} {word}" for kind, word in
                     ((ADDED, "added"), (CHANGED, "changed"), (REMOVED, "removed")) if view.paths(kind)) or "nothing"
    wasted = f", {size(view.wasted)} wasted" if view.wasted else ""
    return f"layer {view.number}: {view.created_by or 'no history'} ({done}; {size(view.added)}{wasted})"


def _box(view: LayerView, rows: Sequence[_Row], largest: int, opened: bool) -> str:
    """One layer as a folded list, under a bar as long as its bytes, with the wasted part of it apart."""
    head, _, rest = _headline(view).partition(" (")
    parts = ((view.added - view.wasted, "var(--labs-c3,#226b3c)"), (view.wasted, "var(--labs-c5,#a8322f)"))
    bar = "".join(f'<span style="display:inline-block;height:.5em;width:{100 * part / (largest or 1):.1f}%;'
                  f'background:{colour}"></span>' for part, colour in parts if part)
    return (f'<details style="margin:.5em 0;border-top:1px solid var(--pst-color-border,#d5dbe2)"{" open" * opened}>'
            '<summary style="cursor:pointer;padding:.4em 0;overflow-wrap:anywhere">'
            f'<strong>{html.escape(head)}</strong> <span style="opacity:.75">{html.escape(rest[:-1])}</span>'
            f'<span style="display:block;line-height:0" aria-hidden="true">{bar}</span></summary>'
            f'<ul style="list-style:none;padding:0;margin:0 0 .5em;font-size:.92em;line-height:1.7">'
            f'{"".join(row.markup() for row in rows)}</ul></details>')


def graph(layout: Layout, *names: str, digits: bool = True) -> show.Picture:
    """Draw how index.json leads to every blob of some images (of all, without names); a shared blob is one box.

    digits: show the beginning of each digest; without, number them: the lab's own images differ on each machine.
    """
    boxes: dict[str, list[str]] = {"index.json": ["index.json"]}
    arrows: list[tuple[str, str]] = []
    waiting = [("index.json", one, one.annotations.get(NAME, "")) for one in layout.index()
               if not names or one.annotations.get(NAME) in names]
    while waiting:
        above, one, note = waiting.pop(0)
        if one.digest not in boxes:
            short = one.digest[7:14] if digits else f"#{len(boxes)}"
            boxes[one.digest] = [f"{_role(one)} {short}", *filter(None, [note])]
            waiting += [(one.digest, child, str(child.platform or "")) for child in _below(layout, one)]
        elif note and note not in boxes[one.digest]:
            boxes[one.digest].append(note)
        arrows.append((above, one.digest))
    return show.graph("From the index to the blobs", boxes, list(dict.fromkeys(arrows)))


def _below(layout: Layout, one: Descriptor) -> Iterable[Descriptor]:
    if one.media_type not in (*INDEXES, *MANIFESTS) or not layout.has(one.digest):
        return []
    return children(parse(layout.read(one), one.media_type))


def _role(one: Descriptor) -> str:
    """What a blob is, by its media type."""
    if one.media_type in INDEXES:
        return "index"
    if one.media_type in MANIFESTS:
        return "manifest"
    return "config" if ".config." in one.media_type or "container.image.v1" in one.media_type else "layer"
