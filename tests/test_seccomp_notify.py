"""User notification: what the caller gets, what the supervisor sees, and what it may not believe."""

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest

from labs import process, seccomp, syscalls
from labs import seccomp_notify as notify
from labs.errors import BadInput, ChildFailed, KernelError, Timeout
from tests import oci

MKDIR = ("mkdir", "mkdirat")
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def buffer():
    """A page that a child shares with us, and its address: what another thread of the caller would write to."""
    with tempfile.TemporaryDirectory() as folder:
        page = mmap.mmap(-1, mmap.PAGESIZE)
        word = ctypes.c_char.from_buffer(page)
        yield folder, page, ctypes.addressof(word)
        del word
        page.close()


def result(fn):
    """The errno of a call, or its value."""
    try:
        return fn()
    except OSError as error:
        return error.errno


def test_the_caller_gets_the_answer_and_the_kernel_does_nothing(tmp_path):
    wanted = [(0, 0), (0, errno.ENOSPC), (7, 0)]

    def caller():
        return json.dumps([libc.mkdir(str(tmp_path / str(n)).encode(), 0o755) for n in range(3)])

    reader, writer = os.pipe()
    with notify.supervised(MKDIR, lambda: os.write(writer, caller().encode()) and None) as (child, listener):
        seen = []
        for call, (value, error) in zip(listener.calls(), wanted, strict=True):
            seen.append((call.name, call.pid == child.pid, Path(listener.text(call, 0)).name))
            listener.reply(call, value, error)
            if len(seen) == 3:
                break
        assert child.wait(10).code == 0
    os.close(writer)
    assert json.loads(process.read_all(reader)) == [0, -1, 7]
    assert seen == [("mkdir", True, str(n)) for n in range(3)]
    assert list(tmp_path.iterdir()) == []


def test_the_caller_sees_the_errno():
    with notify.supervised(MKDIR, lambda: result(lambda: os.mkdir("/x"))) as (child, listener):
        call = listener.receive()
        assert call.number == seccomp.resolve(call.name)
        assert call.arguments[1] == 0o777
        listener.reply(call, error=errno.EXDEV)
        assert child.wait(10).code == errno.EXDEV
        assert listener.receive() is None


def test_proceed_lets_the_kernel_do_it(tmp_path):
    with notify.supervised(MKDIR, lambda: os.mkdir(tmp_path / "made")) as (child, listener):
        listener.proceed(listener.receive())
        assert child.wait(10).code == 0
    assert (tmp_path / "made").is_dir()


def test_what_was_read_is_not_what_proceed_does(buffer):
    """The race of seccomp_unotify(2), "Caveats", without leaving it to chance: we write between look and answer."""
    folder, page, address = buffer
    page.write(f"{folder}/good\0".encode())
    with notify.supervised(MKDIR, lambda: libc.mkdir(ctypes.c_void_p(address), 0o755)) as (child, listener):
        call = listener.receive()
        assert listener.text(call, 0) == f"{folder}/good"
        page.seek(0)
        page.write(f"{folder}/evil\0".encode())
        listener.proceed(call)
        assert child.wait(10).code == 0
    assert os.listdir(folder) == ["evil"]


def test_a_descriptor_is_put_into_the_caller(tmp_path):
    (tmp_path / "secret").write_text("open sesame")
    reader, writer = os.pipe()

    def caller():
        fd = os.open("/no/such/file", os.O_RDONLY)
        os.write(writer, os.read(fd, 100))

    with notify.supervised(["openat"], caller) as (child, listener), (tmp_path / "secret").open() as secret:
        os.close(writer)
        call = listener.receive()
        number = listener.add_fd(call, secret.fileno())
        assert process.read_all(reader) == b"open sesame"
        assert number > 2
        assert child.wait(10).code == 0


def test_a_call_whose_caller_is_gone_is_no_longer_valid():
    with notify.supervised(MKDIR, lambda: os.mkdir("/x")) as (child, listener):
        call = listener.receive()
        assert listener.valid(call)
        child.stop(signal.SIGKILL)
        assert not listener.valid(call)
        for answer in (lambda: listener.reply(call), lambda: listener.proceed(call), lambda: listener.text(call, 0)):
            with pytest.raises(OSError, match="No such file") as caught:
                answer()
            assert caught.value.errno == errno.ENOENT
        reborn = call._replace(pid=os.getpid())
        with pytest.raises(KernelError, match="seccomp notification"):
            listener.text(reborn, 0)
        assert listener.receive() is None


def test_a_caller_that_goes_before_it_is_heard_is_skipped():
    def two():
        pid = os.fork()
        if pid == 0:
            os.mkdir("/x")
            os._exit(0)
        process.until(lambda: "seccomp" in Path(f"/proc/{pid}/wchan").read_text() or process.status(pid).state == "S")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return result(lambda: os.rmdir("/nowhere"))

    with notify.supervised((*MKDIR, "rmdir"), two) as (child, listener):
        process.until(lambda: not process.children(child.pid) and process.status(child.pid).state == "S")
        call = listener.receive()
        assert call.name == "rmdir"
        listener.reply(call, error=errno.ENOTEMPTY)
        assert child.wait(10).code == errno.ENOTEMPTY


def test_a_text_is_read_across_pages_and_not_beyond_its_end(tmp_path):
    page = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    word = ctypes.c_char.from_buffer(page)
    start = ctypes.addressof(word)
    libc.munmap(ctypes.c_void_p(start + 2 * mmap.PAGESIZE), mmap.PAGESIZE)
    text = "/x" * 20
    page[mmap.PAGESIZE - 10:mmap.PAGESIZE + 31] = text.encode() + b"\0"
    page[2 * mmap.PAGESIZE - 3:2 * mmap.PAGESIZE] = b"/e\0"
    for at, expected in ((start + mmap.PAGESIZE - 10, text), (start + 2 * mmap.PAGESIZE - 3, "/e")):
        with notify.supervised(MKDIR, lambda: libc.mkdir(ctypes.c_void_p(at), 0)) as (_, listener):  # noqa: B023
            call = listener.receive()
            assert listener.text(call, 0) == expected
            listener.reply(call)
    with notify.supervised(MKDIR, lambda: libc.mkdir(ctypes.c_void_p(8), 0)) as (_, listener):
        call = listener.receive()
        with pytest.raises(OSError, match="Input/output"):
            listener.text(call, 0)


def test_receive_waits_no_longer_than_it_was_told():
    with notify.supervised(MKDIR, signal.pause) as (_, listener), pytest.raises(Timeout, match="not within 0.1 s"):
        listener.receive(0.1)


def test_a_call_that_the_handover_needs_is_refused():
    with pytest.raises(BadInput, match="names: 'sendmsg'"), notify.supervised(["mkdir", "sendmsg"], bool):
        pass
    with pytest.raises(BadInput, match="'mkdri': is no system call"), notify.supervised(["mkdri"], bool):
        pass


def test_a_child_that_cannot_be_confined_is_an_error():
    def nested():
        with notify.supervised(["mkdir"], bool):  # a second listener: EBUSY, seccomp(2)
            pass

    with notify.supervised(["rmdir"], nested) as (child, _), pytest.raises(ChildFailed, match="seccomp: Device or res"):
        child.wait(10)


def test_an_error_in_the_block_ends_the_child():
    with pytest.raises(ZeroDivisionError), notify.supervised(MKDIR, lambda: os.mkdir("/x")) as (child, _):
        raise ZeroDivisionError
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


# --- for a container ---


@pytest.mark.parametrize("runtime", ["labs", "crun", "runc"])
def test_the_agent_makes_a_node_for_a_container_that_may_not(runtime):
    script = "mknod /tmp/sea c 1 3 && mknod /tmp/mem c 1 1; echo $?; stat -c '%F %t:%T' /tmp/sea"
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "@BUNDLE@/agent", "listenerMetadata": "ours",
               "syscalls": [{"names": ["mknod", "mknodat"], "action": "SCMP_ACT_NOTIFY"}]}
    tmp = {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}
    with oci.bundle(script, {"linux.seccomp": profile, "mounts+": [tmp]}) as made, \
            notify.Agent(str(made.path / "agent")) as agent:
        line = [*made.line(runtime), "run", made.name]
        with subprocess.Popen(line, cwd=made.path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as box:
            state, listener = agent.accept()
            with listener:
                asked = [answered(listener, call) for call in listener.calls()]
            output = box.communicate(timeout=30)[0]
    assert state["fds"] == ["seccompFd"]
    assert state["metadata"] == "ours"
    assert state["state"]["bundle"] == str(made.path)
    assert asked == [("/tmp/sea", os.makedev(1, 3)), ("/tmp/mem", os.makedev(1, 1))]
    assert output.splitlines() == ["1", "character special file 1:3"]


def answered(listener, call):
    """Only /dev/null's number is made; the arguments of mknodat(2) begin with a directory."""
    first = call.name == "mknodat"
    path, (mode, device) = listener.text(call, first), call.arguments[first + 1:first + 3]
    if device == os.makedev(1, 3):
        notify.make_node(f"/proc/{call.pid}/root", path, mode, device)
        listener.reply(call)
    else:
        listener.reply(call, error=errno.EPERM)
    return path, device


def test_a_node_is_made_beneath_the_root_whatever_the_links_say(tmp_path):
    (tmp_path / "root/real").mkdir(parents=True)
    (tmp_path / "root/link").symlink_to("/real")
    (tmp_path / "root/up").symlink_to("../..")
    for path in ("/link/a", "/up/b", "c", "../../d"):
        notify.make_node(str(tmp_path / "root"), path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["b", "c", "d", "link", "real", "up"]
    assert (tmp_path / "root/real/a").is_char_device()
    with pytest.raises(KernelError, match="openat2"):
        notify.make_node(str(tmp_path / "root"), "/nowhere/e", stat.S_IFCHR, 0)


def test_an_agent_says_what_is_wrong(tmp_path):
    with notify.Agent(str(tmp_path / "agent")) as agent:
        with pytest.raises(KernelError, match="bind: Address already in use"), notify.Agent(agent.path):
            pass
        with pytest.raises(Timeout):
            agent.accept(0.05)
        with socket.socket(socket.AF_UNIX) as runtime:
            runtime.connect(agent.path)
            runtime.send(b"{}")
            runtime.shutdown(socket.SHUT_WR)
            with pytest.raises(BadInput, match="without a descriptor"):
                agent.accept()
    assert not (tmp_path / "agent").exists()


def test_the_numbers_are_those_of_the_header():
    source = """#include <linux/seccomp.h>
#include <stdio.h>
#include <sys/ioctl.h>
int main(void) { printf("%lu %lu %lu %lu %zu %zu %zu", SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_IOCTL_NOTIF_ID_VALID, SECCOMP_IOCTL_NOTIF_ADDFD, sizeof(struct seccomp_notif),
    sizeof(struct seccomp_notif_resp), sizeof(struct seccomp_notif_addfd)); }"""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["cc", "-x", "c", "-o", f"{folder}/a", "-"], input=source, text=True, check=True)
        said = subprocess.run([f"{folder}/a"], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in said.split()] == [
        notify.SECCOMP_IOCTL_NOTIF_RECV, notify.SECCOMP_IOCTL_NOTIF_SEND, notify.SECCOMP_IOCTL_NOTIF_ID_VALID,
        notify.SECCOMP_IOCTL_NOTIF_ADDFD, notify.NOTIF.size, notify.RESPONSE.size, notify.ADDFD.size]
    assert syscalls.PTRACE_SECCOMP_GET_FILTER == 0x420C
