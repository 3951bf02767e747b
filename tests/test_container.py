"""labs.container: what stands inside, how it ends, and that nothing stays; compared with lsns, findmnt, runc.

The class named Limits needs the cgroup controllers; the rest runs wherever cgroup v2 is mounted.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from labs import cgroup, container, errors, lab, machine, mounts, namespaces, process

READY = "echo ready; exec sleep 1000"


def run(script, **options):
    return container.run(["sh", "-c", script], **options)


def in_container(box, script):
    return box.exec(["sh", "-c", script]).stdout


@contextlib.contextmanager
def sleeping(**options):
    with container.Container(["sleep", "1000"], **options) as box:
        yield box


def left_behind():
    """Groups and layers of containers that are there now."""
    groups = os.listdir(machine.CGROUP) if os.path.isdir(machine.CGROUP) else []
    layers = os.listdir(machine.DATA) if os.path.isdir(machine.DATA) else []
    return sorted(name for name in (*groups, *layers) if name.startswith("labs-c-"))


# What is inside


def test_result_has_output_exit_code_and_usage():
    result = run("echo out; echo err >&2; exit 3")
    assert (result.code, result.signal, result.stdout, result.stderr) == (3, None, "out\n", "err\n")
    assert 0 < result.usage.cpu_seconds < 20
    assert result.oom is False


def test_a_signal_is_told_apart_from_a_code():
    assert run("kill -KILL $$", init=True).code == 137
    with sleeping() as box:
        box.kill(signal.SIGKILL)
        assert box.wait()[:2] == (None, 9)


def test_every_namespace_but_user_and_time_is_new():
    with sleeping() as box:
        assert namespaces.same("self", box.pid) == {
            "uts": False, "pid": False, "mnt": False, "net": False, "ipc": False, "user": True, "cgroup": False,
            "time": True}
        shown = json.loads(subprocess.run(["lsns", "-J", "-o", "NS,TYPE", "-p", str(box.pid)], capture_output=True,
                                          text=True, check=True).stdout)["namespaces"]
    assert {row["type"] for row in shown} == {"mnt", "uts", "ipc", "pid", "user", "cgroup", "net", "time"}


def test_the_callers_own_namespaces_and_directory_do_not_change():
    before = (namespaces.of(), os.getcwd(), mounts.table(), os.umask(0o022))
    run("true", user=True, time_offset=10)
    assert (namespaces.of(), os.getcwd(), mounts.table(), os.umask(before[3])) == before


def test_it_is_process_1_and_sees_only_its_own():
    result = run("echo $$; ls /proc | grep -c '^[0-9]'")
    assert result.stdout.split()[0] == "1"
    assert int(result.stdout.split()[1]) <= 4


def test_hostname_is_set_inside_alone():
    before = os.uname().nodename
    assert run("hostname", hostname="inside").stdout == "inside\n"
    assert os.uname().nodename == before


def test_mounts_are_those_that_runc_makes(tmp_path):
    subprocess.run(["runc", "spec"], cwd=tmp_path, check=True)
    wanted = {m["destination"] for m in json.loads((tmp_path / "config.json").read_text())["mounts"]}
    with sleeping() as box:
        columns = "TARGET,FSTYPE,VFS-OPTIONS,PROPAGATION"
        listed = subprocess.run(["findmnt", "-N", str(box.pid), "-J", "--list", "-o", columns],
                                capture_output=True, text=True, check=True)
        rows = {row["target"]: row for row in json.loads(listed.stdout)["filesystems"]}
    assert {"/"} | wanted <= set(rows)
    assert rows["/"]["fstype"] == "overlay"
    assert {row["propagation"] for row in rows.values()} == {"private"}
    for target in ("/sys", "/sys/fs/cgroup", "/proc/sys", "/proc/bus"):
        assert "ro" in rows[target]["vfs-options"].split(","), target
    assert {"nosuid", "nodev", "noexec"} <= set(rows["/proc/sys"]["vfs-options"].split(","))


def test_nothing_of_the_hosts_tree_is_reachable():
    result = run("ls /; cd ..; cd ../..; pwd; ls -a /.. | sort; cat /proc/1/mountinfo")
    assert "/opt/labs" not in re.sub(r" - overlay .*", "", result.stdout)
    assert run("ls /srv /opt 2>/dev/null").stdout == ""


def test_masked_paths_are_empty_and_read_only_paths_refuse():
    script = """
    wc -c < /proc/timer_list; wc -c < /proc/keys; ls /sys/firmware /proc/scsi 2>/dev/null | wc -l
    (echo 1 > /proc/sys/kernel/domainname) 2>&1; mkdir /sys/fs/cgroup/x 2>&1; mkdir /sys/x 2>&1"""
    lines = run(script).stdout.splitlines()
    assert lines[0] == lines[1] == "0"
    assert not [line for line in lines[3:] if "Read-only" not in line]
    assert len(lines) == 6


def test_devices_are_there_and_work():
    script = "stat -c '%n %t:%T %a' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty; readlink /dev/ptmx"
    assert run(script).stdout.splitlines() == [
        "/dev/null 1:3 666", "/dev/zero 1:5 666", "/dev/full 1:7 666", "/dev/random 1:8 666", "/dev/urandom 1:9 666",
        "/dev/tty 5:0 666", "pts/ptmx"]
    script = "head -c 3 /dev/zero | wc -c; echo x > /dev/null; cat /dev/null; echo gone > /dev/stdout"
    assert run(script).stdout == "3\ngone\n"


def test_network_is_a_loopback_of_its_own():
    assert run("cat /sys/class/net/lo/flags; ls /sys/class/net; ping -c 1 127.0.0.1 >/dev/null && echo alive").stdout \
        == "0x9\nlo\nalive\n"
    with sleeping(network=True) as box:
        assert namespaces.same("self", box.pid)["net"]


def test_network_may_be_another_containers():
    with sleeping() as first, sleeping(network=f"/proc/{first.pid}/ns/net") as second:
        same = namespaces.same(first.pid, second.pid)
        assert (same["net"], same["mnt"]) == (True, False)
        script = "ls /sys/class/net; cat /sys/class/net/lo/flags; readlink /proc/self/ns/net"
        assert in_container(second, script) == f"lo\n0x9\n{os.readlink(f'/proc/{first.pid}/ns/net')}\n"


def test_the_cgroup_namespaces_root_is_the_containers_group():
    with sleeping() as box:
        assert box.cgroup.procs() == [box.pid]
        assert "0::/\n" in in_container(box, "cat /proc/1/cgroup")
        assert in_container(box, "cat /sys/fs/cgroup/cgroup.procs").split()[0] == "1"


def test_environment_working_directory_and_input():
    result = run("echo $GREETING $PATH $HOME; pwd; cat", env={"GREETING": "hi"}, cwd="/etc", stdin=b"from outside")
    assert result.stdout == f"hi {process.DEFAULT_PATH} /root\n/etc\nfrom outside"
    assert run("cat", stdin=b"x" * 3_000_000).stdout == "x" * 3_000_000
    assert "LANG" not in run("env").stdout


def test_signals_and_files_of_the_caller_do_not_come_in():
    with open("/etc/passwd", encoding="utf-8") as held:
        assert held.fileno() > 2
        files = run("ls -l /proc/$$/fd").stdout.splitlines()
    assert [line.split()[8] for line in files if "->" in line] == ["0", "1", "2"]
    signals = container.run(["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"]).stdout.splitlines()
    assert [int(line.split()[1], 16) for line in signals] == [0, 0]


def test_mounts_show_host_directories_and_files(tmp_path):
    (tmp_path / "file").write_text("from the host")
    binds = [container.Bind(str(tmp_path), "/data", readonly=True), (str(tmp_path / "file"), "/etc/new/file")]
    result = run("cat /data/file /etc/new/file; touch /data/x 2>&1; echo changed > /etc/new/file", mounts=binds)
    assert result.stdout == "from the hostfrom the hosttouch: /data/x: Read-only file system\n"
    assert (tmp_path / "file").read_text() == "changed\n"


def test_a_mount_point_that_is_a_link_stays_inside(tmp_path):
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", machine.ROOTFS["busybox"], str(root)], check=True)
    (root / "run").mkdir(exist_ok=True)
    (root / "escape").symlink_to("/../../../../../../../../run")
    (tmp_path / "data").mkdir()
    result = run("ls /run", rootfs=str(root), mounts=[(str(tmp_path / "data"), "/escape/labs-escaped")])
    assert result.stdout == "labs-escaped\n"
    assert not os.path.exists("/run/labs-escaped")


def test_readonly_root():
    assert "Read-only" in run("touch /x", readonly=True).stderr
    assert run("touch /dev/shm/x && echo yes", readonly=True).stdout == "yes\n"


def test_the_layer_keeps_what_was_written_and_the_rootfs_does_not_change():
    with container.Container(["sh", "-c", "echo new > /etc/new; rm /etc/passwd"]) as box:
        assert box.wait().code == 0
        assert Path(box.upper, "etc/new").read_text(encoding="utf-8") == "new\n"
        assert os.stat(f"{box.upper}/etc/passwd").st_rdev == 0
    assert not os.path.exists(os.path.dirname(box.upper))
    assert os.path.exists(machine.ROOTFS["busybox"] + "/etc/passwd")
    assert not os.path.exists(machine.ROOTFS["busybox"] + "/etc/new")


def test_a_user_namespace_makes_root_inside_somebody_outside():
    with sleeping(user=True) as box:
        assert in_container(box, "id -u; cat /proc/self/uid_map").split() == ["0", "0", "100000", "65536"]
        assert process.status(box.pid).uid == (100_000,) * 4
        assert not namespaces.same("self", box.pid)["user"]
        assert "nobody" not in in_container(box, "ls -l /etc")
        script = "echo hi > /etc/new && echo x >> /etc/passwd; mknod /n c 1 3; hostname new; hostname"
        written = box.exec(["sh", "-c", script])
        assert "mknod: /n: Operation not permitted" in written.stderr
        assert written.stdout == "new\n"
        assert os.stat(f"{box.upper}/etc/new").st_uid == 100_000
        assert os.stat(f"{box.upper}/etc/passwd").st_uid == 100_000
    assert run("id -u; cat /proc/self/uid_map", user=(0, 5000, 6)).stdout.split() == ["0", "0", "5000", "6"]


def test_a_user_namespaces_mounts_stay_inside():
    before = mounts.table()
    with sleeping(user=True):
        assert mounts.table() == before
    assert mounts.table() == before


def test_time_offset_moves_the_clocks_that_count_from_boot():
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    result = run("cat /proc/uptime; readlink /proc/self/ns/time", time_offset=1_000_000)
    inside, link = result.stdout.splitlines()
    assert 1_000_000 <= float(inside.split()[0]) - uptime < 1_000_600
    assert link != os.readlink("/proc/self/ns/time")


def test_init_reaps_and_forwards():
    orphan = "sh -c 'sleep 0.1 &'; sleep 0.5; ps -o stat,comm | grep -c '^Z'; exit 4"
    careful = run(orphan, init=True)
    assert (careful.code, careful.stdout) == (4, "0\n")
    with container.Container(["sh", "-c", READY], init=True) as box:
        process.until(lambda: box.logs()[0] == "ready\n")
        assert box.stop(grace=20).code == 143
    with sleeping(init=True) as box:
        files = {os.readlink(f"/proc/{box.pid}/fd/{fd}").split(":")[0] for fd in os.listdir(f"/proc/{box.pid}/fd")}
        assert files <= {"/dev/null", "pipe", "anon_inode"}


# A container that lives


def test_exec_joins_namespaces_and_cgroup():
    with sleeping(hostname="host", env={"A": "1"}) as box:
        script = "hostname; echo $A$B; pwd; cat; exit 5"
        result = box.exec(["sh", "-c", script], env={"B": "2"}, cwd="/etc", stdin=b"in")
        assert (result.code, result.stdout) == (5, "host\n12\n/etc\nin")
        with pytest.raises(errors.CommandNotFound):
            box.exec(["nothing"])
        script = "for n in uts pid mnt net ipc cgroup; do readlink /proc/1/ns/$n; readlink /proc/self/ns/$n; done"
        lines = in_container(box, script).split()
        assert lines[::2] == lines[1::2]
        assert len(lines) == 12
        with pytest.raises(errors.Timeout):
            box.exec(["sleep", "100"], timeout=0.3)
        process.until(lambda: box.cgroup.procs() == [box.pid])


def test_logs_come_while_it_runs():
    with container.Container(["sh", "-c", "echo one; echo two >&2; exec sleep 1000"]) as box:
        process.until(lambda: box.logs() == ("one\n", "two\n"))
        assert box.pid in process.pids()
    assert box.logs() == ("one\n", "two\n")


def test_much_output_arrives_whole():
    result = run("head -c 5000000 /dev/zero | tr '\\0' x; head -c 5000000 /dev/zero | tr '\\0' y >&2")
    assert (len(result.stdout), len(result.stderr)) == (5_000_000, 5_000_000)


def test_pause_and_resume():
    with container.Container(["sh", "-c", "while :; do echo tick; done"]) as box:
        process.until(lambda: box.logs()[0])
        box.pause()
        box.logs()
        before = len(box.logs()[0])
        time.sleep(0.2)
        assert len(box.logs()[0]) == before
        with pytest.raises(errors.BadInput, match="paused"):
            box.exec(["true"])
        box.resume()
        process.until(lambda: len(box.logs()[0]) > before)
        box.pause()


def test_stop_is_term_then_kill():
    with sleeping(init=True) as box:
        assert box.stop(grace=20).code == 143
    with sleeping() as box:
        assert box.stop(grace=0.2)[:2] == (None, 9)


def test_timeout_ends_the_container():
    with pytest.raises(errors.Timeout, match=r"not within 0\.3 s"):
        run("sleep 100", timeout=0.3)
    assert left_behind() == []


def test_the_end_of_process_1_ends_all():
    result = run("sleep 1000 & sleep 1000 & echo done")
    assert result.stdout == "done\n"
    assert left_behind() == []


# Bad input


@pytest.mark.parametrize(("options", "text"), [
    ({"argv": []}, "argv: \\[\\]"), ({"argv": "ls"}, "argv: 'ls'"),
    ({"rootfs": "fedora"}, "rootfs: 'fedora': must be one of"),
    ({"rootfs": "/nowhere"}, "rootfs: '/nowhere': no such directory"), ({"memory": "64Q"}, "memory: '64Q'"),
    ({"cpus": 0}, "cpus: 0"), ({"cwd": "etc"}, "cwd: 'etc'"), ({"hostname": "x" * 65}, "hostname: "),
    ({"hostname": ""}, "hostname: ''"), ({"env": {"A=B": "x"}}, "env: "), ({"env": {"A": 1}}, "env: "),
    ({"mounts": [("/nowhere", "/x")]}, "mounts: '/nowhere'"), ({"mounts": [("/etc", "x")]}, "mounts: 'x'"),
    ({"devices": ["c 1"]}, "devices: 'c 1'"), ({"user": True, "network": True}, "network: True"),
    ({"user": True, "network": "/proc/1/ns/net"}, "network: '/proc/1/ns/net'"),
    ({"network": "/nowhere"}, "network: '/nowhere': must be True, False or the path of a network namespace"),
    ({"user": (0, 5000, 1)}, "user: \\(0, 5000, 1\\)"), ({"user": (1, 5000, 10)}, "user: ")])
def test_bad_input_is_one_line_with_field_value_and_rule(options, text):
    with pytest.raises(errors.BadInput, match=f"^{text}") as caught:
        container.run(**{"argv": ["true"], **options})
    assert "\n" not in str(caught.value)
    assert left_behind() == []


@pytest.mark.parametrize(("argv", "kind", "code"), [
    (["nothing"], errors.CommandNotFound, 127), (["/bin/nothing"], errors.CommandNotFound, 127),
    (["/etc/passwd"], errors.NotExecutable, 126), (["/etc"], errors.NotExecutable, 126)])
@pytest.mark.parametrize("options", [{}, {"init": True}, {"user": True}])
def test_commands_that_cannot_run(argv, kind, code, options):
    with pytest.raises(kind) as caught:
        container.run(argv, **options)
    assert caught.value.code == code
    assert code == container.run(["sh", "-c", argv[0]]).code
    assert left_behind() == []


def test_a_failing_step_comes_with_its_name_errno_and_path():
    with pytest.raises(errors.ChildFailed) as caught:
        run("true", cwd="/nowhere")
    assert (caught.value.step, caught.value.errno, caught.value.path) == ("chdir", 2, "/nowhere")
    with pytest.raises(errors.ChildFailed, match="^setns: Invalid argument"):
        run("true", network="/proc/self/ns/uts")
    assert left_behind() == []


def test_a_rootfs_without_mount_points_gets_them(tmp_path):
    (tmp_path / "bin").mkdir()
    subprocess.run(["cp", "-a", machine.ROOTFS["busybox"] + "/bin/.", str(tmp_path / "bin")], check=True)
    result = container.run(["sh", "-c", "ls -d /proc/1 /dev/null /sys/fs/cgroup/cgroup.procs"], rootfs=str(tmp_path))
    assert result.code == 0
    assert os.listdir(tmp_path) == ["bin"]


def test_an_unmarked_machine_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MARKER", str(tmp_path / "nothing"))
    with pytest.raises(errors.NotALab, match=r"nothing is not there; .* ./lab up"):
        run("true")
    for change in (cgroup.create, lambda: mounts.tmpfs(str(tmp_path)).__enter__(), lab.clean):
        with pytest.raises(errors.NotALab):
            change()


@pytest.mark.parametrize(("files", "found"), [
    (["unified/cgroup.controllers"], "hybrid"), (["memory/memory.limit_in_bytes"], "cgroup v1"),
    ([], "not a cgroup mount")])
def test_other_cgroup_versions_are_refused_by_name(monkeypatch, tmp_path, files, found):
    for name in files:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    monkeypatch.setattr(machine, "CGROUP_ROOT", str(tmp_path))
    with pytest.raises(errors.NotALab, match=found):
        run("true")


# Nothing is left


def start_in_a_python_of_its_own(script):
    """A caller that can be killed, and the pid and the name of its container."""
    code = f"""
import sys, time
from labs import container
with container.Container(["sh", "-c", {script!r}]) as box:
    print(box.pid, box.id, flush=True)
    while True:
        time.sleep(0.1)  # short, because a signal that comes just before a sleep does not end it
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert caller.stdout
    pid, name = caller.stdout.readline().split()
    return caller, int(pid), name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_caller_is_killed(number):
    script = "sleep 1000 & sleep 1000 & (setsid sleep 1000 &); exec sleep 1000"
    caller, first, name = start_in_a_python_of_its_own(script)
    with caller:
        pidfd = os.pidfd_open(first)
        box = cgroup.of(first)
        process.until(lambda: len(box.procs()) == 4)
        caller.send_signal(number)
        caller.wait(30)
        assert process.readable(pidfd, 30)
        os.close(pidfd)
    process.until(lambda: name not in left_behind(), 60, "the end of the container")


def test_nothing_is_left_when_the_monitor_is_killed_but_what_clean_removes():
    with sleeping() as box:
        os.kill(process.status(box.pid).ppid, signal.SIGKILL)
        assert process.readable(box.pidfd, 30)
        with pytest.raises(errors.ChildFailed, match="monitor"):
            box.wait(30)
    assert left_behind() == [box.id, box.id]
    lab.clean(engines=False)
    assert left_behind() == []


def test_an_error_in_the_block_ends_the_container():
    with pytest.raises(ZeroDivisionError), sleeping() as box:
        raise ZeroDivisionError
    assert not os.path.exists(f"/proc/{box.pid}")
    assert left_behind() == []


def test_an_interrupt_of_a_waiting_caller_leaves_nothing():
    main = threading.main_thread().ident
    assert main
    timer = threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    with sleeping() as box, pytest.raises(KeyboardInterrupt):
        box.wait(60)
    timer.join()
    assert left_behind() == []


def test_deep_directories_and_odd_names_are_removed():
    script = """
    i=0; while [ $i -lt 300 ]; do mkdir ddddddddddddddddddddd; cd ddddddddddddddddddddd; i=$((i+1)); done
    ln -s / root; mkfifo 'a b'; touch -- '-rf'"""
    assert run(script, timeout=120).code == 0
    assert left_behind() == []


def test_no_file_descriptor_and_no_child_is_left():
    run("true")
    before = (sorted(os.listdir("/proc/self/fd")), process.children(os.getpid()))
    for options in ({}, {"user": True}, {"init": True}):
        run("true", **options)
        with contextlib.suppress(errors.CommandNotFound):
            container.run(["nothing"], **options)
    with sleeping() as box:
        box.exec(["true"])
    assert (sorted(os.listdir("/proc/self/fd")), process.children(os.getpid())) == before


def test_two_hundred_runs_leave_the_machine_as_it_was():
    with lab.unchanged():
        for _ in range(200):
            assert container.run(["true"]).code == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_fifty_at_once():
    with lab.unchanged():
        results = [None] * 50
        def one(index):
            results[index] = run(f"hostname; sleep 1; exit {index}", hostname=f"h{index}", timeout=300)
        threads = [threading.Thread(target=one, args=[index]) for index in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(r.code, r.stdout) for r in results] == [(i, f"h{i}\n") for i in range(50)]


def test_a_full_disk_is_an_error_inside_and_leaves_nothing(monkeypatch, tmp_path):
    with mounts.tmpfs(str(tmp_path), size="2m"):
        monkeypatch.setattr(machine, "DATA", str(tmp_path))
        result = run("dd if=/dev/zero of=/big bs=1M count=10; ls -l /big | wc -l")
        assert "No space left on device" in result.stderr
        assert result.stdout == "1\n"
        assert os.listdir(tmp_path) == []
        (tmp_path / "filler").write_bytes(bytes(os.statvfs(tmp_path).f_bavail * 4096))
        assert run("touch /x || echo full").stdout in ("full\n", "")
        assert os.listdir(tmp_path) == ["filler"]


def test_importing_is_light():
    code = "import sys; from labs import container; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONPATH": str(Path(container.__file__).parents[1])}).stdout.split()
    heavy = {"subprocess", "shutil", "dataclasses", "inspect", "logging", "asyncio", "labs.lab", "labs.show"}
    assert heavy & set(loaded) == set()


def test_nothing_is_imported_between_fork_and_exec():
    code = """
import builtins, os, sys
from labs import container
container.run(["true"])
parent, real = os.getpid(), builtins.__import__
def watched(name, *rest, **more):
    if os.getpid() != parent and name not in sys.modules:
        os.write(2, f"imported {name}\\n".encode())
        os._exit(99)
    return real(name, *rest, **more)
builtins.__import__ = watched
for options in ({}, {"user": True}, {"init": True}, {"time_offset": 1}, {"memory": None}):
    print(container.run(["true"], **options).code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0\n" * 5, "")


@pytest.mark.machine
class TestLimits:
    """What needs the controllers."""

    def test_limits_stand_before_the_process_runs(self):
        files = "memory.max memory.swap.max cpu.max pids.max"
        result = run(f"cd /sys/fs/cgroup; cat {files}", memory="64M", cpus=0.5, pids=20)
        assert result.stdout.split() == ["67108864", "0", "50000", "100000", "20"]

    def test_usage_is_that_of_the_cgroup(self):
        idle, busy = run("true"), run("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
        assert busy.usage.cpu_seconds > idle.usage.cpu_seconds
        eater = run("head -c 30000000 /dev/zero > /dev/shm/x; true")
        assert idle.usage.peak_bytes < 12_000_000
        assert 30_000_000 < eater.usage.peak_bytes < 60_000_000

    def test_an_oom_kill_is_told(self):
        result = run("x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo survived", memory="16M")
        assert result.oom is True
        assert "survived" not in result.stdout
        alone = container.run(["tail", "/dev/zero"], memory="16M")
        assert (alone.code, alone.signal, alone.oom) == (None, 9, True)
        assert alone.usage.peak_bytes <= 16 << 20

    def test_a_fork_bomb_is_contained(self):
        started = time.monotonic()
        with container.Container(["sh", "-c", "f() { f | f & }; f; while :; do sleep 1; done"], pids=40) as box:
            process.until(lambda: box.cgroup.keyed("pids.events")["max"] > 0, 120)
            assert int(box.cgroup.read("pids.peak")) <= 40
            assert subprocess.run(["true"], check=False).returncode == 0
        assert time.monotonic() - started < 300
        assert left_behind() == []

    @pytest.mark.parametrize(("options", "text"), [
        ({"pids": -3}, "write pids.max '-3': Invalid argument"),
        ({"cpus": 0.00001}, "write cpu.max '1 100000': Invalid argument")])
    def test_limits_that_the_kernel_refuses(self, options, text):
        with pytest.raises(errors.KernelError, match=f"^{text}"):
            run("true", **options)
        assert left_behind() == []

    def test_exec_is_limited_too(self):
        with sleeping(memory="16M") as box:
            result = box.exec(["tail", "/dev/zero"])
            assert (result.code, result.signal) == (None, 9)
            assert box.cgroup.keyed("memory.events")["oom_kill"] == 1


# Several layers, other ids


@pytest.fixture
def layers(tmp_path):
    """Busybox below 60 layers, more than one page of mount options could name; each has a file of its own."""
    made = [machine.rootfs("busybox")]
    for number in range(60):
        folder = tmp_path / f"{'long-' * 12}{number}"
        folder.mkdir()
        (folder / f"from-{number}").write_text(str(number))
        (folder / "same").write_text(str(number))
        made.append(str(folder))
    return made


def test_many_layers_are_one_root_and_the_last_one_wins(layers):
    result = run("ls / | grep -c from-; cat /same; touch /new", rootfs=layers)
    assert (result.code, result.stdout) == (0, "60\n59")
    assert not any((Path(layer) / "new").exists() for layer in layers)


def test_a_command_runs_as_the_ids_given():
    result = run("id -u; id -g; id -G; touch /x", run_as=container.Ids(1234, 5678, (91, 92)))
    assert result.stdout.split() == ["1234", "5678", "5678", "91", "92"]
    assert "Permission denied" in result.stderr


@pytest.mark.parametrize("rootfs", [[], ["busybox", "nowhere"]])
def test_bad_layers_are_refused(rootfs):
    with pytest.raises(errors.BadInput, match="rootfs"):
        run("true", rootfs=rootfs)


def test_a_user_namespace_takes_one_layer(layers):
    with pytest.raises(errors.BadInput, match="with a user namespace, one"):
        run("true", rootfs=layers, user=True)
