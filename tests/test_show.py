"""Pictures: what they say, that they say it the same way twice, and that a page can carry them."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from labs import process, show

SVG = "{http://www.w3.org/2000/svg}"
FAMILY = """
import os, signal, subprocess, sys
children = [subprocess.Popen(["sleep", "300"]), subprocess.Popen(["true"])]
os.waitid(os.P_PID, children[1].pid, os.WEXITED | os.WNOWAIT)
print("ready", flush=True)
sys.stdin.read()
children[0].kill()
"""


def start(*command):
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def family():
    """A process with a sleeping child and a zombie."""
    with start(sys.executable, "-c", FAMILY) as parent:
        assert parent.stdout.readline() == "ready\n"
        yield parent.pid
        parent.stdin.close()


@pytest.fixture
def inner():
    """unshare(1) with a sleep that is PID 1 of a namespace of its own."""
    with start(
        "unshare", "--pid", "--fork", "--kill-child", "--uts", "sh", "-c", "echo ready; exec sleep 300"
    ) as outer:
        assert outer.stdout.readline() == "ready\n"
        process.until(lambda: process.status(process.children(outer.pid)[0]).name == "sleep")
        yield outer.pid
        outer.kill()


def markup(picture):
    (svg,) = ET.fromstring(picture._repr_mimebundle_()[0]["text/html"])
    return svg


def test_process_tree_says_who_is_there(family):
    picture = show.process_tree(family, names={family: "parent"})
    assert picture.alt.splitlines() == ["Process tree", "parent", "├─ sleep", "└─ true (zombie)"]
    words = [text.text for text in markup(picture).iter(f"{SVG}text")]
    assert words == ["parent", "sleep", "true", "zombie"]


def test_process_tree_frames_another_pid_namespace(inner):
    assert show.process_tree(inner).alt.splitlines()[1:] == ["unshare", "└─ sleep (PID 1) [PID namespace]"]


def test_process_tree_with_arguments_and_parents(family):
    picture = show.process_tree(family, argv=True, ancestors=True)
    assert "├─ sleep 300" in picture.alt
    assert picture.alt.splitlines()[1].startswith(show.process_tree(1, argv=True).alt.splitlines()[1])


def test_a_tree_is_the_same_twice_and_holds_no_pid(family, inner):
    for pid in (family, inner):
        first, second = show.process_tree(pid), show.process_tree(pid)
        assert first == second
        assert str(pid) not in first.html
        assert "<!--" not in first.html


def test_svg_takes_its_looks_from_the_page(family):
    root = markup(show.process_tree(family))
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root[0].tag == f"{SVG}title"
    assert root[0].text.startswith("Process tree")
    colours = {element.get(name) for element in root.iter() for name in ("fill", "stroke")} - {None}
    assert colours <= {"none", "transparent", "currentColor"}
    assert not any("font-family" in element.attrib or "id" in element.attrib for element in root.iter())


def test_namespaces_letters_follow_the_kernel(inner):
    child = process.children(inner)[0]
    picture = show.namespaces({"notebook": os.getpid(), "child": child}, kinds=("uts", "pid", "net"))
    assert [line.split() for line in picture.alt.splitlines()[1:]] == [
        ["namespace", "notebook", "child"],
        ["uts", "A", "B"],
        ["pid", "A", "B"],
        ["net", "A", "A"],
    ]
    told = subprocess.check_output(["lsns", "-n", "-o", "NS", "-t", "uts", "-p", str(child)], text=True)
    assert told.strip() == Path(f"/proc/{child}/ns/uts").readlink().name[5:-1]
    assert picture.html.count('class="labs-same"') == 6


def test_table_escapes_what_it_shows():
    picture = show.table(["name", "<b>"], [["a&b", "A"]], title="x < y")
    assert "x &lt; y" in picture.html
    assert "<b>" not in picture.html
    assert "a&amp;b" in picture.html


def test_graph_joins_at_one_box():
    boxes = {"a": ["top"], "b": ["left"], "c": ["right"], "d": ["end", "x\\ny"]}
    picture = show.graph("Graph", boxes, [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    assert picture.alt.splitlines() == ["Graph", "top → left", "top → right", "left → end, x\\ny", "right → end, x\\ny"]
    words = [text.text for text in markup(picture).iter(f"{SVG}text")]
    assert sorted(words) == ["end", "left", "right", "top", "x\\ny"]


def cgroup(path, procs="", **files):
    path.mkdir()
    (path / "cgroup.procs").write_text(procs)
    for name, value in files.items():
        (path / name.replace("_", ".")).write_text(value + "\n")


def test_cgroup_tree_shows_limits_only_when_asked(tmp_path):
    top = tmp_path / "labs"
    cgroup(top, memory_max="max", pids_max="max")
    cgroup(
        top / "labs-c-1a2b3c", f"{os.getpid()}\n", memory_max="67108864", cpu_max="max 100000", memory_current="1048576"
    )
    me = process.status(os.getpid()).name
    assert show.cgroup_tree(top).alt.splitlines() == ["cgroup tree", "labs", f"└─ labs-c-… ({me})"]
    assert show.cgroup_tree(top, limits=True).alt.endswith(f"({me}, memory.max  64 MiB)")
    assert show.cgroup_tree(top, usage=True).alt.endswith(f"({me}, memory.current  1.0 MiB)")
    assert "web" in show.cgroup_tree(top, names={"labs-c-1a2b3c": "web"}).alt


def test_mount_tree_of_a_private_namespace(tmp_path):
    mount = "mount -t tmpfs t $0 && mkdir $0/in && mount -t tmpfs -o ro t $0/in && echo ready && exec cat"
    with start("unshare", "--mount", "sh", "-c", mount, str(tmp_path)) as child:
        assert child.stdout.readline() == "ready\n"
        picture = show.mount_tree(child.pid, under=str(tmp_path), propagation=True)
        child.stdin.close()
    lines = picture.alt.splitlines()
    assert lines[1].endswith("(tmpfs, private)")
    assert lines[2].endswith("(tmpfs (read-only), private)")


def test_mount_tree_of_named_places_only():
    assert show.mount_tree(only=["/", "/proc"]).alt.splitlines()[2:] == ["└─ /proc (proc)"]


def test_mount_tree_of_a_place_without_mounts_is_refused():
    with pytest.raises(show.BadInput, match="under"):
        show.mount_tree(under="/nowhere")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("labs-c-1a2b3c", "labs-c-…"),
        ("docker-" + "0123456789abcdef" * 4 + ".scope", "docker-….scope"),
        ("/var/lib/docker/overlay2/" + "ab" * 32 + "/merged", "/var/lib/docker/overlay2/…/merged"),
        ("system.slice", "system.slice"),
        ("/facade", "/facade"),
    ],
)
def test_random_names_are_cut(name, shown):
    assert show.stable(name) == shown


def test_plot_and_bars_are_png_whose_words_do_not_vary():
    picture = show.plot(
        {"throttled": [(0, 1), (1, 3)], "used": [(0, 2), (1, 2)]}, x="time (s)", y="CPU (ms)", limit=2.5
    )
    other = show.plot({"throttled": [(0, 9), (1, 3)], "used": [(0, 2), (1, 2)]}, x="time (s)", y="CPU (ms)", limit=2.5)
    assert picture.alt == other.alt == "Plot of CPU (ms) against time (s): throttled, used"
    data, metadata = picture._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"}
    width = int.from_bytes(picture.png[16:20])
    assert width == 2 * metadata["image/png"]["width"]
    assert show.bars({"crun": 0.02, "docker": 0.4}, unit="start (s)").alt == "Bars of start (s): crun, docker"
