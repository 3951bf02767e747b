"""labs.process: wait status, the error pipe, pidfds, init; compared with sh(1), ps(1) and the files."""

import errno
import os
import signal
import subprocess
import time

import pytest

from labs import process, syscalls
from labs.errors import BadInput, ChildFailed, CommandNotFound, KernelError, NotExecutable, Timeout


def shell(script):
    """The status that sh(1) itself would show for a child."""
    return subprocess.run(["sh", "-c", f"({script}); echo $?"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("script", ["exit 0", "exit 1", "exit 127", "exit 255", "exec timeout -s KILL 0.1 sleep 100"])
def test_wait_status_is_what_a_shell_shows(script):
    with process.spawn(["sh", "-c", script]) as child:
        assert f"{child.wait(20).shell}\n" == shell(script)


def test_code_and_signal_exclude_each_other():
    with process.spawn(["sh", "-c", "exit 3"]) as child:
        assert child.wait(20) == (3, None, 3)
    with process.spawn(["sleep", "100"]) as child:
        child.kill(signal.SIGKILL)
        assert child.wait(20) == (None, 9, 137)
    assert process.wait_status(9) == (None, 9, 137)
    assert process.wait_status(143 << 8) == (143, None, 143)


def test_wait_has_a_deadline():
    with process.spawn(["sleep", "100"]) as child:
        started = time.monotonic()
        with pytest.raises(Timeout):
            child.wait(0.1)
        assert 0.1 <= time.monotonic() - started < 20


def test_a_child_is_killed_and_reaped_on_the_way_out():
    with pytest.raises(ZeroDivisionError), process.spawn(["sleep", "100"]) as child:
        raise ZeroDivisionError
    assert not os.path.exists(f"/proc/{child.pid}")


def test_stop_asks_first_and_kills_after_the_grace():
    with process.spawn(["sleep", "100"]) as child:
        assert child.stop(grace=20) == (None, 15, 143)
    deaf = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    reader, writer = os.pipe()
    def stubborn():
        os.dup2(writer, 1)
        process.execute(["sh", "-c", deaf])
    with process.fork(stubborn) as child:
        os.close(writer)
        assert os.read(reader, 6) == b"ready\n"
        assert child.stop(grace=0.2) == (None, 9, 137)
    os.close(reader)


def test_fork_gives_the_functions_int_as_the_exit_code():
    with process.fork(lambda: 7) as child:
        assert child.wait(20).code == 7
    with process.fork(lambda: None) as child:
        assert child.wait(20).code == 0


def test_errors_come_with_step_errno_and_path():
    def child():
        with process.step("open the door"):
            os.open("/no/door", os.O_RDONLY)
    with pytest.raises(ChildFailed) as caught:
        process.call(child)
    assert (caught.value.step, caught.value.errno, caught.value.path) == ("open the door", errno.ENOENT, "/no/door")


def test_a_system_calls_own_name_is_the_step():
    with pytest.raises(ChildFailed, match=r"^umount2: Invalid argument$") as caught:
        process.call(syscalls.umount2, "/etc")
    assert caught.value.path == "/etc"


def test_other_exceptions_arrive_with_their_text():
    def child():
        raise ValueError("three is not two")
    with pytest.raises(ChildFailed, match="ValueError: three is not two"):
        process.call(child)


def test_a_refused_write_stays_a_kernel_error():
    error = process.revive(process.describe(KernelError("write pids.max", errno.EINVAL, "/x/pids.max", "many")))
    assert isinstance(error, KernelError)
    assert (error.step, error.errno, error.path, error.value) == ("write pids.max", errno.EINVAL, "/x/pids.max", "many")


def test_call_returns_what_the_child_said_even_when_long():
    assert process.call(lambda n: "x" * n, 300_000) == "x" * 300_000
    assert process.call(os.getppid) == os.getpid()
    assert process.call(lambda: None) is None


def test_command_not_found_and_not_executable_are_told_apart(tmp_path):
    with pytest.raises(CommandNotFound) as missing:
        process.spawn(["no-such-command"])
    assert f"{missing.value.code}\n" == shell("no-such-command 2>/dev/null")
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    with pytest.raises(NotExecutable) as refused:
        process.spawn([str(plain)])
    assert f"{refused.value.code}\n" == shell(f"{plain} 2>/dev/null")


def test_execute_searches_the_path_of_the_environment_given(tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\nexit 5\n")
    tool.chmod(0o755)
    with process.spawn(["tool"], {"PATH": f"/nowhere:{tmp_path}"}) as child:
        assert child.wait(20).code == 5
    with pytest.raises(CommandNotFound):
        process.spawn(["tool"], {"PATH": "/nowhere"})


def test_children_start_with_default_signals_and_an_empty_mask():
    with process.spawn(["sleep", "100"]) as child:
        fields = process.status_fields(child.pid)
        assert [int(fields[name], 16) for name in ("SigBlk", "SigIgn")] == [0, 0]


def test_status_children_and_tree_agree_with_ps():
    with process.spawn(["sh", "-c", "sleep 100 & sleep 101 & wait"]) as child:
        process.until(lambda: [p.name for p in process.tree(child.pid).children] == ["sleep", "sleep"])
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(child.pid)],
                                capture_output=True, text=True, check=True)
        below = process.children(child.pid)
        assert below == sorted(int(word) for word in listed.stdout.split())
        assert process.status(below[0]).ppid == child.pid
        assert child.pid in process.children(os.getpid())
        assert process.cmdline(below[0]) == ["sleep", "100"]
        for pid in below:
            os.kill(pid, signal.SIGKILL)
        child.wait(20)


def test_zombies_are_counted_until_they_are_waited_for():
    def parent():
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        before = process.until(lambda: process.zombies(os.getpid()))
        os.waitpid(pid, 0)
        return [before == [pid], process.zombies(os.getpid())]
    assert process.call(parent) == [True, []]


ORPHANS = "for i in 1 2 3; do sh -c 'sleep 0.05 & exit 0'; done; exec sleep 100"


def as_subreaper(init):
    """A process that orphans below it are given to, and that then does what init says."""
    def reaper():
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        return init()
    return process.fork(reaper)


def below(child):
    return sorted((p.name, p.state) for p in process.tree(child.pid).children)


def test_an_init_reaps_orphans_and_a_careless_parent_does_not():
    def careless():
        child = process.spawn(["sh", "-c", ORPHANS])
        return process.wait(child.pidfd).shell
    with as_subreaper(careless) as parent:
        process.until(lambda: len(process.zombies(parent.pid)) == 3 and below(parent)[0] == ("sleep", "S"))
        first = [p.pid for p in process.tree(parent.pid).children if p.state == "S"]
        os.kill(first[0], signal.SIGKILL)
        assert parent.wait(20).code == 137
    with as_subreaper(lambda: process.reap(["sh", "-c", ORPHANS])) as parent:
        process.until(lambda: below(parent) == [("sleep", "S")])
        os.kill(process.children(parent.pid)[0], signal.SIGKILL)
        assert parent.wait(20).code == 137


def test_reap_forwards_signals_and_gives_the_shells_status():
    with process.fork(lambda: process.reap(["sleep", "100"])) as init:
        process.until(lambda: [c.name for c in process.tree(init.pid).children] == ["sleep"])
        init.kill(signal.SIGTERM)
        assert init.wait(20).code == 143
    with process.fork(lambda: process.reap(["sh", "-c", "exit 6"])) as init:
        assert init.wait(20).code == 6


def test_until_gives_up_at_the_deadline():
    with pytest.raises(Timeout, match="the moon"):
        process.until(lambda: False, 0.05, "the moon")


@pytest.mark.parametrize("argv", ["ls", b"ls", [], [1], [b"ls"]])
def test_argv_must_be_a_list_of_strings(argv):
    with pytest.raises(BadInput, match="argv"):
        process.check_argv(argv)


def test_a_signal_goes_to_the_process_and_never_to_a_later_one():
    with process.spawn(["true"]) as child:
        child.wait(20)
        with pytest.raises(ProcessLookupError):
            child.kill(signal.SIGTERM)
