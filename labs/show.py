"""Pictures of live kernel state: process trees, namespaces, cgroups, mounts, measurements.

Every function reads the kernel once and returns a `Picture`, which a notebook shows by itself.
What a picture says is the same on every run: process numbers, inodes and random names are left out,
and letters say what is equal to what. A measurement (`plot`, `bars`) differs from run to run, so it is
a PNG, and only its alt text is compared.
"""

from __future__ import annotations

import base64
import html
import io
import logging
import re
import string
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import count, cycle, product
from pathlib import Path
from typing import Any, NamedTuple

from labs import mounts, process
from labs.errors import BadInput
from labs.namespaces import KINDS, of

SVG = "http://www.w3.org/2000/svg"
# The site defines --labs-f1 … for light and dark pages; these are for JupyterLab, which knows no such variables.
TINTS = ("#e3eefa", "#fdf0d5", "#e2f3e5", "#efe6fa", "#fbe5e5", "#eceff3")
# What is new in a diagram.
FRESH = "#1d5b94"
# The names that labs (six hexadecimal digits), Docker and Podman (12 to 64) make up.
RANDOM_NAME = re.compile(r"(labs-[a-z]+-)[0-9a-f]{6}\b|([-/])[0-9a-f]{12,64}(?![0-9a-z])")


@dataclass(frozen=True)
class Picture:
    """Something to look at, and the words that stand for it.

    Attributes:
        alt: what the picture says, in words; also its text/plain.
        html: a complete HTML fragment, or empty where the picture is a PNG.
        png: the bytes of a PNG at twice the size it is shown in, or empty.
        size: width and height in CSS pixels of the PNG.
    """

    alt: str
    html: str = ""
    png: bytes = b""
    size: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        return self.alt

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        if self.html:
            return {"text/plain": self.alt, "text/html": self.html}, {}
        data = {"text/plain": self.alt, "image/png": base64.b64encode(self.png).decode()}
        return data, {"image/png": {"width": self.size[0], "height": self.size[1]}}


class Node(NamedTuple):
    """One box of a tree: its lines of text, what is under it, and how it looks.

    Attributes:
        lines: the text, first line first.
        children: the nodes under this one, in the order in which they are drawn.
        group: a label; neighbours with the same label stand in one dashed frame. Empty: no frame.
        faded: drawn dashed, for what exists but does nothing (a zombie, an empty cgroup).
    """

    lines: tuple[str, ...]
    children: tuple[Node, ...] = ()
    group: str = ""
    faded: bool = False


def process_tree(
    pid: int, *, ancestors: bool = False, argv: bool = False, names: Mapping[int, str] | None = None
) -> Picture:
    """Draw the processes from `pid` down, as /proc/PID/task/TID/children lists them (proc_pid_task(5)).

    A process in another PID namespace than the top of the picture stands in a frame, with the number it has in there.

    Args:
        pid: the root of the tree.
        ancestors: draw the line of parents up to PID 1 too.
        argv: label a process with its arguments, not only with its name.
        names: labels for some processes, by pid, in place of what the kernel says.
    """
    above = list(_parents(pid)) if ancestors else []
    own = _pid_namespace(above[-1] if above else pid)
    root = _process_node(pid, argv, names or {}, own, own)
    for parent in above:
        root = Node((_process_label(parent, argv, names or {}),), (root,))
    return _tree("Process tree", root)


def namespaces(pids: Mapping[str, int], *, kinds: Iterable[str] = KINDS) -> Picture:
    """Show which processes share which namespaces: in a row, equal letters mean the same namespace.

    Args:
        pids: label → pid, one column each; the first column is always A.
        kinds: the rows, in order.
    """
    columns, rows = [of(pid) for pid in pids.values()], []
    for kind in kinds:
        letters = Letters()
        rows.append([kind, *(letters[column[kind].inode] for column in columns)])
    return table(["namespace", *pids], rows, title="Namespaces: the same letter in a row is the same namespace")


def cgroup_tree(
    path: str | Path, *, limits: bool = False, usage: bool = False, names: Mapping[str, str] | None = None
) -> Picture:
    """Draw the cgroups from `path` down, with the names of the processes in each (cgroup.procs).

    Args:
        path: a directory under /sys/fs/cgroup.
        limits: add the interface files which hold something else than the kernel's default.
        usage: add memory.current and pids.current; these differ from run to run.
        names: labels for some cgroups, by directory name.
    """
    return _tree("cgroup tree", _cgroup_node(Path(path), limits, usage, names or {}))


def mount_tree(
    pid: int | str = "self", *, under: str = "/", only: Container[str] = (), propagation: bool = False
) -> Picture:
    """Draw the mounts a process sees, as /proc/PID/mountinfo lists them (proc_pid_mountinfo(5)).

    Args:
        pid: whose mount namespace.
        under: only the mounts at or below this path.
        only: only the mounts at exactly these paths, where given; list those in between too.
        propagation: add shared, slave or private; peers of one group bear the same letter.
    """
    rows = [row for row in mounts.table(pid) if not only or row.target in only]
    return _tree("Mount tree", _mount_root(rows, under, propagation), rankdir="LR")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> Picture:
    """Show rows of short texts as a table; cells that hold one capital letter are tinted by that letter."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{_row(row)}</tr>" for row in rows)
    markup = (
        f'<table class="labs-table"><caption>{html.escape(title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return Picture("\n".join([title, *lines]), markup)


class Box(NamedTuple):
    """One box of a diagram or a graph: its lines of text, and how it looks.

    Attributes:
        lines: the text, first line first.
        faded: drawn dashed, for what is there but does nothing (a link that is down).
        fresh: outlined in colour, for what was not there before, or is as it should be.
    """

    lines: tuple[str, ...]
    faded: bool = False
    fresh: bool = False


def graph(
    title: str, boxes: Mapping[str, Sequence[str] | Box], arrows: Sequence[tuple[str, str]], *, rankdir: str = "LR"
) -> Picture:
    """Draw boxes with arrows between them, for what is no tree: two may lead to the same one.

    Args:
        title: what it shows; the first line of its words.
        boxes: key → a box, or its lines of text, in the order in which they are drawn.
        arrows: (from, to), by key.
        rankdir: LR from left to right, TB from top to bottom.
    """
    drawing, names = _digraph(rankdir), {key: f"n{number}" for number, key in enumerate(boxes)}
    told = {key: one if isinstance(one, Box) else Box(tuple(one)) for key, one in boxes.items()}
    for key, box in told.items():
        _node(drawing, names[key], box)
    for start, end in arrows:
        drawing.edge(names[start], names[end])
    said = {key: ", ".join(box.lines) for key, box in told.items()}
    alt = "\n".join([title, *(f"{said[start]} → {said[end]}" for start, end in arrows)])
    return _drawn(drawing, alt)


class Join(NamedTuple):
    """A line of a diagram between two boxes, by key: no arrow; the first one is drawn above the second one."""

    first: str
    second: str
    bold: bool = False
    fresh: bool = False


def diagram(alt: str, frames: Mapping[str, Mapping[str, Box]], joins: Sequence[Join]) -> Picture:
    """Draw boxes in labelled dashed frames, joined by lines within and across the frames.

    Args:
        alt: what the picture says, in words.
        frames: label of a frame → key of a box → the box, in the order in which they are drawn.
        joins: the lines, by key.
    """
    keys = [key for boxes in frames.values() for key in boxes]
    drawing, names = _digraph("TB"), {key: f"n{number}" for number, key in enumerate(keys)}
    drawing.attr(ranksep="0.45")
    for number, (label, boxes) in enumerate(frames.items()):
        # Lines come from above: there they would cross the label.
        frame = {"label": _escape(label), "labelloc": "b" if number else "t", "style": "dashed", "margin": "7"}
        with drawing.subgraph(name=f"cluster_{number}", graph_attr=frame | {"labeljust": "l"}) as inner:
            for key, box in boxes.items():
                _node(inner, names[key], box)
            with inner.subgraph(graph_attr={"rank": "same"}) as row:
                for key in _leaving(boxes, joins):
                    row.node(names[key])
    for join in joins:
        width = {"penwidth": "2.5" if join.bold else "1"}
        drawing.edge(names[join.first], names[join.second], dir="none", **_fresh(join.fresh) | width)
    for upper, lower in _alone(frames, joins):
        drawing.edge(names[upper], names[lower], style="invis")
    return _drawn(drawing, alt)


def _node(drawing: Any, name: str, box: Box) -> None:
    style = "dashed" if box.faded else "rounded"
    drawing.node(name, "\n".join(map(_escape, box.lines)), style=style, **_fresh(box.fresh))


def _drawn(drawing: Any, alt: str) -> Picture:
    svg = _svg(str(drawing.pipe(format="svg", encoding="utf-8")), alt)
    return Picture(alt, svg.replace(f'stroke="{FRESH}"', f'style="stroke:var(--labs-c1,{FRESH})"'))


def _leaving(boxes: Mapping[str, Box], joins: Sequence[Join]) -> list[str]:
    """The boxes from which lines lead down into other frames."""
    return [join.first for join in joins if join.first in boxes and join.second not in boxes]


def _alone(frames: Mapping[str, Mapping[str, Box]], joins: Sequence[Join]) -> Iterator[tuple[str, str]]:
    """Frames that no line leads to stand in a row with those that a line from the first frame leads to."""
    first, *others = frames.values()
    for boxes in others:
        if not any((join.first in boxes) != (join.second in boxes) for join in joins):
            yield (_leaving(first, joins) or list(first))[0], next(iter(boxes))


def _fresh(fresh: bool) -> dict[str, str]:
    return {"color": FRESH, "penwidth": "2"} if fresh else {}


def plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x: str,
    y: str,
    alt: str = "",
    limit: float | None = None,
    step: bool = False,
) -> Picture:
    """Plot measurements over time or size: one line for each label in `series`.

    Args:
        series: label → points (x, y).
        x: what the horizontal axis counts, with its unit.
        y: what the vertical axis counts, with its unit.
        alt: what the reader should see in it; made from the labels where not given.
        limit: a horizontal dashed line, for the limit the kernel was given.
        step: hold each value until the next one (for counters and quotas).
    """

    def draw(axes: Any) -> None:
        for (label, points), style in zip(series.items(), _styles(), strict=False):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, style, label=label, drawstyle="steps-post" if step else "default")
        if limit is not None:
            axes.axhline(limit, color="black", linestyle="--", linewidth=1, label="limit")
        axes.set_ylim(bottom=0)
        if all(isinstance(value, int) for points in series.values() for _, value in points):
            axes.yaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1 or limit is not None:
            axes.legend(frameon=False)

    return _figure(draw, x, y, alt or f"Plot of {y} against {x}: {', '.join(series)}")


def bars(values: Mapping[str, float], *, unit: str, alt: str = "", log: bool = False) -> Picture:
    """Compare one measurement of several things: one horizontal bar each, in the order given.

    Args:
        values: label → value.
        unit: what is measured, with its unit.
        alt: what the reader should see in it; made from the labels where not given.
        log: a logarithmic axis, where the values lie far apart.
    """

    def draw(axes: Any) -> None:
        drawn = axes.barh(list(values), list(values.values()), log=log)
        axes.bar_label(drawn, fmt=lambda value: f"{float(f'{value:.3g}'):g}", padding=4)
        axes.margins(x=0.15)
        axes.invert_yaxis()

    return _figure(draw, unit, "", alt or f"Bars of {unit}: {', '.join(values)}", height=1.2 + 0.45 * len(values))


def timeline(rows: Mapping[str, Sequence[tuple[float, float, str]]], *, x: str = "seconds", alt: str) -> Picture:
    """Draw what lasted from when to when: one row for each label, one look for each kind.

    Args:
        rows: label → spans (begin, end, kind), drawn in the order given.
        x: what the axis counts.
        alt: what the reader should see in it.
    """
    kinds = list(dict.fromkeys(kind for spans in rows.values() for _, _, kind in spans))

    greys = {kind: str(0.85 - 0.6 * number / max(len(kinds) - 1, 1)) for number, kind in enumerate(kinds)}

    def draw(axes: Any) -> None:
        for height, (spans, kind) in enumerate(product(rows.values(), kinds)):
            mine = [(begin, end - begin) for begin, end, one in spans if one == kind]
            axes.broken_barh(mine, (height // len(kinds) - 0.3, 0.6), facecolor=greys[kind], edgecolor="black",
                             label=kind if height < len(kinds) else None)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.legend(frameon=False, ncols=len(kinds), loc="lower left", bbox_to_anchor=(0, 1))

    return _figure(draw, x, "", alt, height=1.5 + 0.4 * len(rows))


def stable(name: str) -> str:
    """Cut the random part out of a name that labs, Docker or Podman made: labs-c-3fa21b becomes labs-c-…."""
    return RANDOM_NAME.sub(r"\1\2…", name)


# Processes


def _process_node(pid: int, argv: bool, names: Mapping[int, str], outside: int, parents: int) -> Node:
    """A tree of nodes; `outside` and `parents` are the PID namespaces of the picture's root and of pid's parent."""
    status, own = process.status(pid), _pid_namespace(pid, parents)
    lines = [_process_label(pid, argv, names)]
    if own != outside:
        lines.append(f"PID {status.nspid[-1]}")
    if zombie := status.state == "Z":
        lines.append("zombie")
    children = []
    for child in sorted(process.children(pid), key=_started):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we were drawing
            children.append(_process_node(child, argv, names, outside, own))
    return Node(tuple(lines), tuple(children), "PID namespace" if own != parents else "", zombie)


def _process_label(pid: int, argv: bool, names: Mapping[int, str]) -> str:
    if pid in names:
        return names[pid]
    if argv and (words := process.cmdline(pid)):
        return _clip(" ".join(words))
    return process.status(pid).name


def _pid_namespace(pid: int, otherwise: int = 0) -> int:
    """Its inode number, or `otherwise` where the kernel does not let us see it (ptrace(2), access mode checking)."""
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except PermissionError:
        return otherwise


def _parents(pid: int) -> Iterator[int]:
    while (pid := process.status(pid).ppid) > 0:
        yield pid


def _started(pid: int) -> tuple[int, int]:
    """Field 22 of /proc/PID/stat (proc_pid_stat(5)): when it started, as process numbers wrap around."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]), pid
    except (FileNotFoundError, ProcessLookupError):
        return 0, pid


# cgroups

# What the kernel puts into these files when a cgroup is made (cgroup-v2.rst); only other values are limits.
DEFAULTS = {
    "memory.max": "max",
    "memory.high": "max",
    "memory.low": "0",
    "memory.min": "0",
    "memory.swap.max": "max",
    "memory.oom.group": "0",
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "cpuset.cpus": "",
    "pids.max": "max",
    "io.max": "",
    "cgroup.freeze": "0",
}
USAGE = ("memory.current", "pids.current")


def _cgroup_node(path: Path, limits: bool, usage: bool, names: Mapping[str, str]) -> Node:
    members = [process.status(int(pid)).name for pid in _read(path / "cgroup.procs").split()]
    lines = [names.get(path.name, stable(path.name)), *_counted(members)]
    if limits:
        found = ((file, _read(path / file)) for file in DEFAULTS if (path / file).exists())
        lines += [f"{file}  {_size(file, value)}" for file, value in found if value != DEFAULTS[file]]
    if usage:
        lines += [f"{file}  {_size(file, _read(path / file))}" for file in USAGE if (path / file).exists()]
    below = sorted((entry for entry in path.iterdir() if entry.is_dir()), key=lambda entry: stable(entry.name))
    children = tuple(_cgroup_node(entry, limits, usage, names) for entry in below)
    return Node(tuple(lines), children, faded=not members)


def _counted(members: Iterable[str]) -> list[str]:
    """["sleep", "sh", "sleep"] → ["sh", "sleep ×2"]."""
    counts = Counter(members)
    return [name if counts[name] == 1 else f"{name} ×{counts[name]}" for name in sorted(counts)]


def _size(file: str, value: str) -> str:
    if not (file.startswith("memory.") and value.isdigit() and int(value) >= 1 << 20):
        return value
    return f"{int(value) / (1 << 20):g} MiB" if file not in USAGE else f"{int(value) / (1 << 20):.1f} MiB"


def _read(path: Path) -> str:
    return path.read_text().strip()


# Mounts


def _mount_root(rows: Sequence[mounts.Mount], under: str, propagation: bool) -> Node:
    inside = [row for row in rows if row.target == under or row.target.startswith(under.rstrip("/") + "/")]
    if not inside:
        raise BadInput("under", under, "must be a mount point, or have one below it")
    known, peers = {row.id for row in inside}, Letters()
    tops = [row for row in inside if row.parent not in known or row.parent == row.id]
    nodes = tuple(_mount_node(row, inside, propagation, peers) for row in tops)
    return nodes[0] if len(nodes) == 1 else Node((under,), nodes, faded=True)


def _mount_node(row: mounts.Mount, rows: Sequence[mounts.Mount], propagation: bool, peers: Letters) -> Node:
    kind = row.fstype + (" (read-only)" if "ro" in row.options.split(",") else "")
    lines = [_clip(stable(row.target)), kind]
    if propagation:
        lines.append(_propagation(row, peers))
    below = (other for other in rows if other.parent == row.id and other.id != row.id)
    return Node(tuple(lines), tuple(_mount_node(child, rows, propagation, peers) for child in below))


def _propagation(row: mounts.Mount, peers: Letters) -> str:
    """The optional fields, with a letter in place of each peer group's number: shared:312 → shared A."""
    fields = [re.sub(r":(\d+)", lambda found: " " + peers[found[1]], word) for word in row.propagation.split()]
    return ", ".join(fields)


class Letters(dict[Any, str]):
    """A letter for each number that differs from run to run: the first key asked for is A, the next new one B."""

    def __missing__(self, key: Any) -> str:
        self[key] = string.ascii_uppercase[len(self)] if len(self) < 26 else f"Z{len(self)}"
        return self[key]


def _row(cells: Sequence[str]) -> str:
    head, *rest = cells
    return f'<th scope="row">{html.escape(head)}</th>' + "".join(map(_cell, rest))


def _cell(text: str) -> str:
    if len(text) != 1 or text not in string.ascii_uppercase:
        return f"<td>{html.escape(text)}</td>"
    number = string.ascii_uppercase.index(text) % len(TINTS)
    style = f"background:var(--labs-f{number + 1},{TINTS[number]});color:var(--labs-ink,#1b2430)"
    return f'<td class="labs-same" style="{style}">{text}</td>'


# Drawing


def _tree(title: str, root: Node, rankdir: str = "TB") -> Picture:
    alt = "\n".join([title, *_outline(root)])
    return Picture(alt, _svg(_dot(root, rankdir), alt))


def _outline(node: Node, first: str = "", rest: str = "") -> Iterator[str]:
    """The same tree as lines of text, for those who do not see the picture."""
    head, *notes = node.lines
    yield first + head + (f" ({', '.join(notes)})" if notes else "") + (f" [{node.group}]" if node.group else "")
    for number, child in enumerate(node.children, 1):
        last = number == len(node.children)
        yield from _outline(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


def _dot(root: Node, rankdir: str) -> str:
    drawing = _digraph(rankdir)
    _place(drawing, root, count())
    return str(drawing.pipe(format="svg", encoding="utf-8"))


def _digraph(rankdir: str) -> Any:
    # Not at the top of the module: most cells draw nothing, and this would make the first one slower.
    import graphviz

    look = {"fontname": "sans-serif", "fontsize": "12"}
    return graphviz.Digraph(
        graph_attr={"rankdir": rankdir, "bgcolor": "transparent", "nodesep": "0.2", "ranksep": "0.35", **look},
        node_attr={"shape": "box", "height": "0.3", "margin": "0.12,0.06", **look},
        edge_attr={"arrowsize": "0.6"},
    )


def _place(graph: Any, node: Node, numbers: Iterator[int]) -> str:
    """Put `node` and what is under it into the dot graph; return the node's name there, made from its order."""
    name = f"n{next(numbers)}"
    frame = {"label": node.group, "style": "dashed", "labeljust": "l"}
    with graph.subgraph(name=f"cluster_{name}", graph_attr=frame) if node.group else nullcontext(graph) as inner:
        inner.node(name, "\n".join(map(_escape, node.lines)), style="dashed" if node.faded else "rounded")
        for child in node.children:
            inner.edge(name, _place(inner, child, numbers))
    return name


def _escape(text: str) -> str:
    """Graphviz reads backslash sequences in labels."""
    return text.replace("\\", "\\\\")


def _svg(source: str, alt: str) -> str:
    """Make dot's SVG part of a page: its colour and letters from the page, a title, and nothing that varies."""
    ET.register_namespace("", SVG)
    root = ET.fromstring(source)  # noqa: S314 (dot's own output)
    for parent in root.iter():
        for child in [child for child in parent if child.tag == f"{{{SVG}}}title"]:
            parent.remove(child)
        parent.attrib.pop("id", None)
        for name in ("fill", "stroke"):
            if parent.get(name) == "black":
                parent.set(name, "currentColor")
        if parent.tag == f"{{{SVG}}}text":
            parent.set("fill", "currentColor")
            del parent.attrib["font-family"]
    title = ET.Element(f"{{{SVG}}}title")
    title.text = alt
    root.insert(0, title)
    root.attrib |= {name: root.attrib[name].replace("pt", "") for name in ("width", "height")}
    root.attrib |= {"role": "img", "style": "max-width:100%;height:auto;font-family:inherit"}
    return f'<div class="labs-figure">{ET.tostring(root, encoding="unicode")}</div>'


def _figure(draw: Callable[[Any], None], x: str, y: str, alt: str, height: float = 3.2) -> Picture:
    # A slow machine would print that its font cache takes time, and be another page than a quick one.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    # Not at the top of the module: matplotlib alone takes seconds on an emulated machine.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=200)
    return Picture(alt, png=png.getvalue(), size=(640, round(height * 100)))


def _styles() -> Iterator[str]:
    """Lines that can be told apart without colour."""
    return cycle(["-", "--", ":", "-."])


def _clip(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
