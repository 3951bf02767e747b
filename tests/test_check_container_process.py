"""The exercises of 01-process: each wrong state gives exactly its own hint, and the solution passes."""

import os
import signal

import pytest

from labs import container, namespaces, process, syscalls
from labs.check import container as check

LOOP = "while :; do sleep 0.2; done"


def test_zombie_that_term_ended():
    with process.spawn(["sleep", "300"]) as child:
        assert "まだ動いています" in check.terminated_zombie(child.pid).message
        child.kill(signal.SIGSTOP)
        process.until(lambda: process.status(child.pid).state == "T")
        assert "止まっている" in check.terminated_zombie(child.pid).message
        child.kill(signal.SIGTERM)
        child.kill(signal.SIGCONT)
        assert check.terminated_zombie(child.pid).passed
        assert process.status(child.pid).state == "Z"  # the check took nothing away
        child.wait()
        assert "もうありません" in check.terminated_zombie(child.pid).message
    assert "子ではありません" in check.terminated_zombie(1).message


def test_zombie_that_something_else_ended():
    with process.fork(lambda: 143) as child:
        assert "`exit(143)`" in check.terminated_zombie(child.pid).message
    with process.spawn(["sleep", "300"]) as child:
        child.kill(signal.SIGKILL)
        assert "SIGKILL で終わったので 137" in check.terminated_zombie(child.pid).message


@pytest.fixture
def room():
    with container.Container(["sleep", "300"]) as room:
        yield room


def visitor(room, flags):
    def visit():
        syscalls.setns(room.pidfd, flags)
        signal.pause()
    return process.fork(visit)


def test_guest_in_the_wrong_namespaces(room):
    with process.fork(signal.pause) as child:
        assert "まだノートブックと同じ" in check.guest(child.pid, room.pid).message
    with visitor(room, syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWIPC) as child:
        process.until(lambda: namespaces.same(child.pid, room.pid)["ipc"])
        assert "`ipc` にも" in check.guest(child.pid, room.pid).message
    assert "コンテナの側" in check.guest(room.pid, room.pid).message


def test_guest_that_does_not_live(room):
    with process.fork(lambda: 0) as child:
        child.wait()
        assert "もう終わっています" in check.guest(child.pid, room.pid).message
    with process.fork(lambda: 0) as child:
        process.until(lambda: process.status(child.pid).state == "Z")
        assert "signal.pause" in check.guest(child.pid, room.pid).message
        assert "コンテナがもう" in check.guest(child.pid, 2**22).message


def test_guest_must_not_be_the_notebook_itself(room):
    def enter():
        syscalls.setns(room.pidfd, syscalls.CLONE_NEWUTS)
        return check.guest(os.getpid(), room.pid).message
    assert "ノートブック自身" in process.call(enter)


def test_guest(room):
    with visitor(room, syscalls.CLONE_NEWUTS) as child:
        assert check.guest(child.pid, room.pid).passed


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (LOOP, "`SigCgt` の SIGTERM のビットが 0"),
        (f"trap '' TERM; {LOOP}", "無視する設定"),
        (f"trap 'exit 0' TERM; {LOOP}", "ビットが 1"),
    ],
)
def test_listens_reads_the_masks(script, said):
    with container.Container(["sh", "-c", script]) as box:
        verdict = check.listens(box.pid)
    assert said in verdict.message
    assert verdict.passed is ("ビットが 1" in said)


def test_listens_wants_process_one_without_help(room):
    with container.Container(["sleep", "300"], init=True) as box:
        assert "`init=True`" in check.listens(box.pid).message
    assert "もう終わって" in check.listens(box.pid).message
    assert "PID 1 ではありません" in check.listens(os.getpid()).message
