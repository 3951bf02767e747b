"""The exercises of 01-container/02-namespaces: each wrong state gives its own hint, and the solution passes."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import machine, mounts, namespaces, process
from labs.check import Verdict
from labs.check import container as check


def hint(verdict: Verdict, part: str) -> None:
    """The verdict is a hint that says this."""
    assert not verdict.passed
    assert part in verdict.message


def checked(exercise: object, *argv: str) -> Verdict:
    """The exercise's verdict on a process that was started by this command."""
    with process.spawn(argv) as child:
        return exercise(child.pid)  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(("argv", "part"), [
    (["sleep", "60"], "共有しています"),
    (["unshare", "--uts", "--ipc", "sleep", "60"], "`ipc` も新しく"),
    (["unshare", "--uts", "sleep", "60"], "hostname kyoto"),
    (["unshare", "--uts", "sh", "-c", "hostname nara; exec sleep 60"], "hostname kyoto"),
])
def test_renamed_hints(argv: list[str], part: str) -> None:
    hint(checked(check.renamed, *argv), part)


def test_renamed() -> None:
    with process.spawn(["unshare", "--uts", "sh", "-c", "hostname kyoto; exec sleep 60"]) as child:
        process.until(lambda: process.status(child.pid).name == "sleep")
        assert check.renamed(child.pid)


@pytest.mark.parametrize(("argv", "part"), [
    (["sleep", "60"], "共有しています"),
    (["unshare", "--mount", "sleep", "60"], "private"),
    (["unshare", "--mount", "--propagation", "unchanged", "sleep", "60"], "漏れます"),
])
def test_receives_hints(argv: list[str], part: str) -> None:
    hint(checked(check.receives, *argv), part)


def test_receives() -> None:
    assert checked(check.receives, "unshare", "--mount", "--propagation", "slave", "sleep", "60")


def test_mapped_shared() -> None:
    hint(checked(check.mapped, "sleep", "60"), "共有しています")


@pytest.mark.parametrize(("uid", "gid", "part"), [
    ([], [], "`uid_map` がまだ空"),
    ([(0, 200_000, 1)], [], "`0 200000 1`"),
    ([(0, 200_000, 1000)], [], "`gid_map` がまだ空"),
    ([(0, 200_000, 1000)], [(200_000, 0, 1000)], "`200000 0 1000`"),
    ([(0, 200_000, 1000)], [(0, 200_000, 1000)], "200033"),
])
def test_mapped(uid: list[namespaces.Map], gid: list[namespaces.Map], part: str) -> None:
    with process.spawn(["unshare", "--user", "sleep", "60"]) as child:
        process.until(lambda: process.status(child.pid).name == "sleep")
        for name, rows in (("uid_map", uid), ("gid_map", gid)):
            if rows:
                machine.write_file(f"/proc/{child.pid}/{name}", " ".join(map(str, rows[0])))
        verdict = check.mapped(child.pid)
    assert part in verdict.message
    assert verdict.passed == (gid == [(0, 200_000, 1000)])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    """A file on a private mount, to put a namespace on."""
    with mounts.bind(str(tmp_path), str(tmp_path)):
        path = tmp_path / "nara"
        path.touch()
        yield str(path)


def unshare(kind: str, place: str, *argv: str) -> None:
    """Make a namespace, hold it by the file, run a command in it, and wait for its end."""
    subprocess.run(["unshare", f"--{kind}={place}", *argv], check=True)


def test_outlives_hints(place: str) -> None:
    hint(check.outlives(place + "-not"), "touch")
    hint(check.outlives(place), "普通のファイル")
    with mounts.bind("/proc/self/ns/uts", place):
        hint(check.outlives(place), "ノートブック自身")
    unshare("ipc", place, "true")
    hint(check.outlives(place), "`ipc` の namespace")


def test_outlives_with_a_process(place: str) -> None:
    unshare("uts", place, "true")
    with process.spawn(["nsenter", f"--uts={place}", "sleep", "60"]) as child:
        process.until(lambda: process.status(child.pid).name == "sleep")
        hint(check.outlives(place), "まだ住人")
    hint(check.outlives(place), "`nara` になる")


def test_outlives(place: str) -> None:
    unshare("uts", place, "hostname", "nara")
    assert check.outlives(place)


@pytest.mark.parametrize("exercise", [check.renamed, check.outlives, check.receives, check.mapped])
def test_unanswered(exercise: object) -> None:
    hint(exercise(...), "まだ答えが入っていません")  # type: ignore[operator]
