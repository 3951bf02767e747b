"""labs.strace: its reading of real output of strace(1), and strace itself attached to a shell."""

import subprocess

import pytest

from labs import strace

CREATE = """\
10 clone(child_stack=NULL, flags=CLONE_VM|CLONE_PIDFD|CLONE_VFORK|SIGCHLD <unfinished ...>
11 prctl(PR_SET_PDEATHSIG, SIGKILL) = 0
11 execve("/usr/sbin/runc", ["runc", "--bundle", "/run/a, b", "create", "x"], 0xc0 /* 14 vars */ <unfinished ...>
10 <... clone resumed>, parent_tid=[18]) = 11
11 <... execve resumed>) = 0
12 --- SIGCHLD {si_signo=SIGCHLD, si_code=CLD_EXITED, si_pid=1} ---
11 clone3({flags=CLONE_VM|CLONE_THREAD, child_tid=0x7f} => {parent_tid=[12]}, 88) = 12
12 clone(child_stack=0x7f, flags=CLONE_PARENT|SIGCHLD <unfinished ...>
13 unshare(CLONE_NEWNS|CLONE_NEWUTS) = 0
12 <... clone resumed>) = 13
13 seccomp(SECCOMP_SET_MODE_STRICT, 0x1, NULL) = -1 EINVAL (Invalid argument)
13 prctl(PR_CAPBSET_DROP, CAP_BPF) = 0
13 prctl(PR_CAPBSET_DROP, CAP_MKNOD) = 0
99 unshare(CLONE_NEWNET) = 0
13 +++ exited with 0 +++
"""
CALLS = strace.parse(CREATE.splitlines())


def shown(text: str) -> str:
    (call,) = strace.parse([f"7 {text}"])
    return str(call)


@pytest.mark.parametrize(("text", "words"), [
    ("", ()),
    ("0", ("0",)),
    ('"a, b", [1, 2], {x=3, y=f(4, 5)}', ('"a, b"', "[1, 2]", "{x=3, y=f(4, 5)}")),
    (r'"quote \", and [", 1', (r'"quote \", and ["', "1")),
    (r'"backslash \\", 1', (r'"backslash \\"', "1")),
])
def test_split(text: str, words: tuple[str, ...]) -> None:
    assert strace.split(text) == words


def test_parse_joins_halves_and_drops_signals_and_exits() -> None:
    names = ["clone", "prctl", "execve", "clone3", "clone", "unshare", "seccomp", "prctl", "prctl", "unshare"]
    assert [call.name for call in CALLS] == names  # what a child did while its maker's clone was not over comes after
    assert CALLS[2].args[0] == '"/usr/sbin/runc"'
    assert [call.made for call in CALLS if call.made] == [11, 12, 13]
    assert [call.name for call in CALLS if call.failed] == ["seccomp"]


def test_family_follows_threads_and_children() -> None:
    assert {call.pid for call in strace.family(CALLS, 11)} == {11, 12, 13}
    assert {call.pid for call in strace.family(CALLS, 99)} == {99}


def test_runtime_begins_at_its_own_execve() -> None:
    assert strace.runtime(CALLS)[0].name == "execve"
    assert strace.runtime(CALLS, "start") == []


def test_story() -> None:
    told = ["execve(/usr/sbin/runc)", "clone(PARENT)", "unshare(NEWNS|NEWUTS)", "prctl(CAPBSET_DROP) ×2"]
    assert strace.story(strace.runtime(CALLS)) == told


@pytest.mark.parametrize(("line", "short"), [
    ('mount("proc", "/proc/self/fd/6", "proc", MS_NOSUID|MS_NODEV, NULL) = 0', "mount(proc, proc, NOSUID|NODEV)"),
    (f'mount("/var/lib/docker/overlay2/{"a1" * 32}/merged", "/x", 0xc0, MS_BIND, NULL) = 0', "mount(merged, /x, BIND)"),
    ("clone3({flags=CLONE_NEWNS|CLONE_NEWPID, exit_signal=SIGCHLD, stack=NULL}, 88) = 8", "clone3(NEWNS|NEWPID)"),
    ('mount_setattr(4, "", AT_EMPTY_PATH, {attr_set=MOUNT_ATTR_RDONLY, attr_clr=0, propagation=MS_PRIVATE}, 32) = 0',
     "mount_setattr(RDONLY|PRIVATE)"),
    ('execve("/proc/627/exe", ["setkey", "a"], 0x0 /* 1 var */) = 0', "execve(/proc/N/exe)"),
    ('prctl(PR_SET_NAME, "runc:[0:PARENT]"...) = 0', "prctl(SET_NAME, runc:[0:PARENT])"),
    (("capset({version=_LINUX_CAPABILITY_VERSION_3, pid=0}, {effective=1<<CAP_CHOWN|1<<CAP_KILL, "
     "permitted=1<<CAP_CHOWN, inheritable=0}) = 0"), "capset(2 effective)"),
    ('sethostname("docked", 6) = 0', "sethostname(docked)"),
    ('pivot_root(".", ".") = 0', "pivot_root(., .)"),
])
def test_short_form(line: str, short: str) -> None:
    assert shown(line) == short


def test_attach_sees_what_a_shell_starts() -> None:
    shell = subprocess.Popen(["sh"], stdin=subprocess.PIPE, text=True)
    assert shell.stdin
    with strace.attach(shell.pid, ["execve", "unshare"]) as calls:
        shell.communicate("unshare --uts true\n")
    assert [call.args[0].rpartition("/")[2] for call in calls if call.name == "execve" and not call.failed][:2] == [
        'unshare"', 'true"']
    assert "unshare(NEWUTS)" in strace.story(calls)
