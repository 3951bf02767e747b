"""The exercises of 02-oci-and-runtime/03-docker-run: each wrong state gives its hint, the solution passes."""

import os
import signal
from pathlib import Path

import pytest

from labs import process
from labs.check import Verdict
from labs.check import oci_docker_run as check

ABSENT = {path for path in check.MASKED if not os.path.exists(path)}


def hint(verdict: Verdict, part: str) -> None:
    assert not verdict
    assert part in verdict.message


@pytest.mark.parametrize(("answer", "part"), [
    (..., "まだ答えが"),
    ({'"/proc/scsi"'}, "引用符"),
    ({"/proc/keys"}, "このカーネルにあります"),
    (set(), f"あと {len(ABSENT)} 個"),
])
def test_absent_hints(answer: object, part: str) -> None:
    hint(check.absent(answer), part)  # type: ignore[arg-type]


def test_absent() -> None:
    assert check.absent(ABSENT)


def contained(*argv: str) -> process.Child:
    """Something like a container: its process is the child of a process of its own, as with a shim."""
    kinds = ["--mount", "--uts", "--ipc", "--net", "--pid", "--fork"]
    return process.spawn(["unshare", *kinds, "--kill-child", *(argv or ("sleep", "60"))])


def only_child(pid: int) -> int:
    (child,) = process.until(lambda: process.children(pid))
    process.until(lambda: process.status(child).name == "sleep")
    return child


@pytest.mark.machine
def test_entered() -> None:
    with contained() as outer:
        target = only_child(outer.pid)
        hint(check.entered(target, target), "最初のプロセス")
        hint(check.entered(1 << 22, target), "もうありません")
        hint(check.entered(os.getpid(), target), "mnt uts ipc net pid")
        with process.spawn(["nsenter", "-t", str(target), "-a", "sleep", "60"]) as door:
            inside = only_child(door.pid)
            hint(check.entered(door.pid, target), "その子です")
            assert check.entered(inside, target)
            with moved(inside):
                hint(check.entered(inside, target), "cgroup はホスト")


@pytest.mark.machine
def test_a_child_of_the_shim_is_refused() -> None:
    script = "sleep 60 & exec sleep 60"
    with process.spawn(["sh", "-c", script]) as shim:
        first = process.until(lambda: process.children(shim.pid))[0]
        with process.spawn(["sleep", "60"]) as sibling:
            hint(check.entered(sibling.pid, shim.pid), "親が shim です")
        assert check.entered(first, shim.pid)
        os.kill(first, signal.SIGKILL)  # its parent ends without waiting for it


class moved:  # noqa: N801  reads as what it does
    """A process for a while in another cgroup."""

    def __init__(self, pid: int) -> None:
        self.pid, self.here = pid, Path(f"/proc/{pid}/cgroup").read_text().strip()[3:]
        self.there = Path("/sys/fs/cgroup/labs-moved")

    def __enter__(self) -> None:
        self.there.mkdir()
        (self.there / "cgroup.procs").write_text(str(self.pid))

    def __exit__(self, *_: object) -> None:
        Path(f"/sys/fs/cgroup{self.here}/cgroup.procs").write_text(str(self.pid))
        self.there.rmdir()
