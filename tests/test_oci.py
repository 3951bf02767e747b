"""labs-runtime: the life of a container by the commands of runc, step by step, and that nothing of it stays."""

import array
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from labs import machine
from tests import oci

SLEEP = "trap 'exit 7' TERM; echo started; while :; do sleep 0.1; done"


@pytest.fixture
def made():
    with oci.bundle() as one:
        yield one
        assert oci.left(one) == [] or one.call("delete", "--force", one.name).returncode == 0
        assert oci.left(one) == []


def quietly(made, *words):
    """A command whose container outlives it: no pipe of ours may stay open in it."""
    with open(made.path / "errors", "w+", encoding="utf-8") as errors:
        done = made.call(*words, stdout=subprocess.DEVNULL, stderr=errors)
        errors.seek(0)
        assert (done.returncode, errors.read()) == (0, "")


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def valid_state(state):
    """What the specification's schema of a state asks for: five properties, their types, and known words."""
    assert set(state) >= {"ociVersion", "id", "status", "bundle"}
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+(-.*)?", state["ociVersion"])
    assert state["status"] in {"creating", "created", "running", "stopped", "paused"}
    assert isinstance(state["pid"], int) and state["pid"] >= 0
    assert state["status"] == "stopped" or state["pid"] > 0
    assert os.path.isabs(state["bundle"])
    assert all(isinstance(value, str) for value in state.get("annotations", {}).values())
    return state


def state(made, runtime="labs"):
    return valid_state(json.loads(made.good("state", made.name, runtime=runtime)))


def test_created_running_stopped_deleted(made):
    made.write("echo once > /here; exec sleep 1000", {"annotations": {"a.b": "c"}})
    quietly(made, "create", "--pid-file", "pid", made.name)
    created = state(made)
    assert (created["status"], created["pid"]) == ("created", int((made.path / "pid").read_text()))
    assert (created["annotations"], created["bundle"], created["rootfs"]) == (
        {"a.b": "c"}, str(made.path), str(made.rootfs))
    assert not (made.rootfs / "here").exists()
    quietly(made, "start", made.name)
    assert made.status() == "running"
    until((made.rootfs / "here").exists)
    refused = made.call("delete", made.name)
    assert refused.returncode and "running" in refused.stderr
    made.good("kill", made.name, "KILL")
    until(lambda: made.status() == "stopped")
    assert state(made)["pid"] == 0
    made.good("delete", made.name)
    assert made.call("state", made.name).returncode == 1


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_the_state_has_what_the_others_have(made, runtime):
    made.write("exec sleep 1000", {"annotations": {"a.b": "c"}})
    shown = {}
    for each in ("labs", runtime):
        done = made.call("create", made.name, runtime=each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert done.returncode == 0
        shown[each] = state(made, each)
        oci.kill(shown[each]["pid"])
        made.good("delete", made.name, runtime=each)
    assert set(shown["labs"]) - {"owner"} == set(shown[runtime]) - {"owner", "systemd-scope", "command"}
    assert shown[runtime].pop("rootfs") in (shown["labs"].pop("rootfs"), "rootfs")  # crun has it as config.json does
    for key in ("id", "status", "bundle", "annotations"):
        assert shown["labs"][key] == shown[runtime][key], key


def test_the_exit_status_is_that_of_the_command(made):
    for script, status in (("exit 0", 0), ("exit 42", 42)):
        assert made.write(script).run().returncode == status
    assert made.write("exec 2>/dev/null; kill -KILL $$", {"linux.namespaces": [{"type": "mount"}, {"type": "ipc"}],
                      "hostname": None}).run().returncode == 137


def test_signals_reach_process_1_by_name_and_number(made):
    for text in ("TERM", "SIGTERM", "15", "term"):
        made.write(SLEEP)
        with subprocess.Popen([*made.line(), "run", made.name], cwd=made.path, stdout=subprocess.PIPE) as running:
            assert running.stdout.readline() == b"started\n"
            made.good("kill", made.name, text)
            assert running.wait(60) == 7


def test_run_passes_its_own_signals_on(made):
    made.write(SLEEP)
    with subprocess.Popen([*made.line(), "run", made.name], cwd=made.path, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"started\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 7


def test_a_signal_that_comes_before_the_runtime_waits_is_not_lost(made):
    script = "while [ ! -e /ready ]; do sleep 0.05; done; kill -TERM $PPID"
    made.write("trap 'exit 7' TERM; > /ready; while :; do sleep 0.1; done", {"hooks": {"poststart": [
        {"path": "/bin/sh", "args": ["sh", "-c", script.replace("/ready", str(made.rootfs / "ready"))]}]}})
    assert made.run().returncode == 7


def test_a_killed_container_ends_with_137(made):
    made.write(SLEEP)
    with subprocess.Popen([*made.line(), "run", made.name], cwd=made.path, stdout=subprocess.PIPE) as running:
        running.stdout.readline()
        made.good("kill", made.name, "KILL")
        assert running.wait(60) == 137


def test_kill_all_without_a_pid_namespace_reaches_everybody(made):
    made.write("sleep 1001 & sleep 1002; exit", {"linux.namespaces": [{"type": "mount"}, {"type": "uts"}]})
    quietly(made, "run", "--detach", made.name)
    until(lambda: len(json.loads(made.good("ps", "--format", "json", made.name))) == 3)
    made.good("kill", "--all", made.name, "KILL")
    until(lambda: made.status() == "stopped")
    until(lambda: json.loads(made.good("ps", "--format", "json", made.name)) == [])
    made.good("delete", made.name)


def test_run_detached_and_kept(made):
    made.write("exit 0")
    assert made.call("run", "--keep", made.name).returncode == 0
    assert made.status() == "stopped"
    made.good("delete", made.name)
    assert made.run().returncode == 0
    assert oci.left(made) == []


def test_list_and_ps_show_what_is_there(made):
    made.write("exec sleep 1000")
    assert made.good("list", "--quiet") == ""
    quietly(made, "run", "-d", "--pid-file", "pid", made.name)
    assert made.good("list", "-q") == f"{made.name}\n"
    assert json.loads(made.good("list", "--format", "json"))[0]["id"] == made.name
    assert made.good("list").splitlines()[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    pid = int((made.path / "pid").read_text())
    assert json.loads(made.good("ps", "--format", "json", made.name)) == [pid]
    assert "sleep 1000" in made.good("ps", made.name)


def test_pause_and_resume(made):
    made.write("while :; do echo x >> /n; sleep 0.05; done")
    quietly(made, "run", "-d", made.name)
    made.good("pause", made.name)
    assert made.status() == "paused"
    assert made.call("exec", made.name, "true").returncode == 255
    size = (made.rootfs / "n").stat().st_size if (made.rootfs / "n").exists() else 0
    time.sleep(0.3)
    assert (not (made.rootfs / "n").exists() and not size) or (made.rootfs / "n").stat().st_size == size
    assert made.call("pause", made.name).returncode == 1
    made.good("resume", made.name)
    assert made.status() == "running"
    assert made.call("resume", made.name).returncode == 1
    made.good("pause", made.name)
    made.good("delete", "--force", made.name)


# exec


SCOPED = ["--systemd-cgroup"]


@pytest.fixture
def scope(made):
    """The unit of a container that systemd makes the group of; its bundle is written."""
    made.write(SLEEP, {"linux.cgroupsPath": f"system.slice:labs:{made.name}", "linux.resources.memory.limit": 16 << 20,
                       "linux.resources.memory.swap": 16 << 20})
    return f"labs-{made.name}.scope"


def unit(name):
    """What systemd says of it: ActiveState, and the line of `systemctl list-units --all`."""
    show = ["systemctl", "show", "-P", "ActiveState", name]
    units = ["systemctl", "list-units", "--all", "--no-legend", name]
    return tuple(subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
                 for words in (show, units))


GONE = ("inactive", "")


@pytest.mark.machine
@pytest.mark.parametrize("kind", ["scope", "slice"])
def test_a_unit_is_ended_by_systemd_which_made_it(made, scope, kind):
    if kind == "slice":
        scope = f"system-{made.name.rpartition('-')[2]}.slice"
        made.write(SLEEP, {"linux.cgroupsPath": f"system.slice:labs:{scope}"})
    quietly(made, *SCOPED, "create", made.name)
    quietly(made, "start", made.name)
    assert unit(scope)[0] == "active"
    # Systemd now looks at each of its groups again, and makes the one that it misses.
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    made.good("delete", "--force", made.name)
    assert unit(scope) == GONE
    assert not list(Path("/sys/fs/cgroup").rglob(scope))


@pytest.mark.machine
def test_a_scope_whose_command_was_killed_for_its_memory_is_not_kept_as_failed(made, scope):
    made.config["process"]["args"] = ["tail", "/dev/zero"]
    made.write_config(made.config)
    quietly(made, *SCOPED, "create", made.name)
    events = Path("/sys/fs/cgroup/system.slice", scope, "memory.events")
    assert "oom_kill 0" in events.read_text()
    quietly(made, "start", made.name)
    until(lambda: made.status() == "stopped")
    made.good("delete", made.name)
    assert unit(scope) == GONE


@pytest.mark.machine
def test_a_scope_of_somebody_else_is_refused_and_stays(made, scope):
    with subprocess.Popen(["systemd-run", "--quiet", "--scope", f"--unit={scope}", "sleep", "1000"]) as other:
        until(lambda: unit(scope)[0] == "active")
        refused = made.call(*SCOPED, "create", made.name)
        assert (refused.returncode, unit(scope)[0], other.poll()) == (1, "active", None)
        assert refused.stderr.count("\n") == 1 and "linux.cgroupsPath" in refused.stderr and scope in refused.stderr
        assert made.call("state", made.name).returncode
        other.terminate()
    until(lambda: unit(scope) == GONE)


@pytest.mark.machine
def test_a_limit_that_the_kernel_refuses_leaves_no_scope(made, scope):
    made.config["linux"]["resources"]["unified"] = {"memory.high": "much"}
    made.write_config(made.config)
    refused = made.call(*SCOPED, "create", made.name)
    assert refused.returncode == 1 and "memory.high" in refused.stderr
    assert unit(scope) == GONE


@pytest.fixture
def running(made):
    made.write("exec sleep 1000")
    quietly(made, "run", "-d", made.name)
    return made


def test_exec_runs_in_all_of_the_container(running):
    script = "hostname; cat /proc/1/cmdline | tr '\\0' ' '; grep CapEff /proc/self/status; pwd; cat /proc/self/cgroup"
    done = running.good("exec", "--cwd", "/tmp", "--env", "A=b", running.name, "sh", "-c", f"{script}; echo $A")
    assert done.splitlines()[:4] == ["box", "sleep 1000 CapEff:\t0000000020000420", "/tmp", done.splitlines()[3]]
    assert "0::/" in done.splitlines() and done.splitlines()[-1] == "b"
    theirs = {kind: os.readlink(f"/proc/{state(running)['pid']}/ns/{kind}") for kind in ("pid", "net", "mnt", "cgroup")}
    for kind, link in theirs.items():
        assert running.good("exec", running.name, "readlink", f"/proc/self/ns/{kind}") == f"{link}\n"


@pytest.mark.parametrize(("words", "status"), [
    (["true"], 0), (["sh", "-c", "exit 3"], 3), (["sh", "-c", "kill -9 $$"], 137), (["sh", "-c", "kill -15 $$"], 143)])
def test_exec_status(running, words, status):
    assert running.call("exec", running.name, *words).returncode == status


def test_exec_of_what_is_not_there(running):
    for words in (["nothing-here"], ["/etc"], ["/etc/passwd"], ["/no/such"]):
        done = running.call("exec", running.name, *words)
        assert done.returncode == 255 and words[0] in done.stderr and len(done.stderr.splitlines()) == 1
    assert len(json.loads(running.good("ps", "--format", "json", running.name))) == 1


def test_exec_as_another_user(running):
    script = "id -u; id -g; id -G; grep -E 'NoNew' /proc/self/status"
    done = running.good("exec", "--user", "5:6", "--additional-gids", "7", "--additional-gids", "8", running.name,
                        "sh", "-c", script)
    assert done.split() == ["5", "6", "6", "7", "8", "NoNewPrivs:", "1"]


def test_exec_of_a_process_file_detached_with_its_pid(running):
    process = {"args": ["sh", "-c", "echo $X > /said; umask > /umask; exec sleep 500"], "cwd": "/tmp",
               "env": [oci.PATH, "X=y"], "user": {"uid": 0, "gid": 0, "umask": 0o27}, "oomScoreAdj": 700,
               "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 50, "hard": 60}]}
    (running.path / "process.json").write_text(json.dumps(process))
    quietly(running, "exec", "--process", "process.json", "--detach", "--pid-file", "two", running.name)
    pid = int((running.path / "two").read_text())
    until(lambda: (running.rootfs / "umask").exists() and (running.rootfs / "umask").read_text())
    assert ((running.rootfs / "said").read_text(), (running.rootfs / "umask").read_text()) == ("y\n", "0027\n")
    assert machine.read_file(f"/proc/{pid}/oom_score_adj") == "700\n"
    assert re.search("open files +50 +60 ", machine.read_file(f"/proc/{pid}/limits"))
    assert pid in json.loads(running.good("ps", "--format", "json", running.name))


def test_exec_in_a_created_container_and_not_in_a_stopped_one(made):
    made.write("exit 0")
    quietly(made, "create", made.name)
    assert made.good("exec", made.name, "hostname") == "box\n"
    made.good("start", made.name)
    until(lambda: made.status() == "stopped")
    done = made.call("exec", made.name, "true")
    assert done.returncode == 255 and "stopped" in done.stderr


# descriptors, terminals, logs


def test_preserved_descriptors_come_in_and_no_others(made):
    made.write("ls /proc/self/fd; cat <&3")
    reader, writer = os.pipe()
    os.write(writer, b"through\n")
    os.close(writer)

    def place():
        os.dup2(reader, 3)
        os.dup2(reader, 5)

    done = made.call("run", "--preserve-fds", "1", made.name, preexec_fn=place, close_fds=False)
    os.close(reader)
    assert done.stdout.split() == ["0", "1", "2", "3", "4", "through"]  # 4 is ls reading the directory


@contextlib.contextmanager
def terminal_of(made, runtime, *words):
    """The main end of a terminal, as a runtime sends it to the console socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        path = str(made.path / "console")
        listening.bind(path)
        listening.listen(1)
        null = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        assert made.call(*words, "--console-socket", path, made.name, runtime=runtime, **null).returncode == 0
        os.unlink(path)
        with listening.accept()[0] as sender:
            _, ancillary, _, _ = sender.recvmsg(4096, socket.CMSG_SPACE(4))
    fd = array.array("i", ancillary[0][2])[0]
    yield fd
    os.close(fd)


def test_a_terminal_is_the_same_as_runcs(made):
    script = ("tty; stty size; stat -c '%F %a %u %t:%T' /dev/console /proc/self/fd/0; readlink /proc/self/fd/2; "
              "cut -d' ' -f6,7 /proc/1/stat; grep console /proc/self/mountinfo | cut -d' ' -f4-6; exit")
    made.write(script, {"process.terminal": True, "process.consoleSize": {"height": 33, "width": 77}})
    shown = {}
    for runtime in ("labs", "runc"):
        with terminal_of(made, runtime, "create") as fd:
            made.good("start", made.name, runtime=runtime)
            data = b""
            with contextlib.suppress(OSError):
                while part := os.read(fd, 4096):
                    data += part
            shown[runtime] = data.decode().splitlines()
        until(lambda each=runtime: json.loads(made.good("state", made.name, runtime=each))["status"] == "stopped")
        made.good("delete", made.name, runtime=runtime)
    assert shown["labs"][:2] == ["/dev/pts/0", "33 77"]
    assert shown["labs"] == shown["runc"]


def test_a_terminal_of_run_itself(made):
    made.write("tty; echo typed $(head -c 3)", {"process.terminal": True})
    done = subprocess.run([*made.line(), "run", made.name], cwd=made.path, input="abc\n", capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "/dev/pts/0" in done.stdout and "typed abc" in done.stdout


def test_the_log_is_json_where_that_is_asked_for(made):
    made.write("true")
    done = made.call("--log", "log", "--log-format", "json", "start", "not-there")
    assert done.returncode == 1
    entry = json.loads((made.path / "log").read_text())
    assert set(entry) == {"level", "msg", "time"} and entry["level"] == "error" and "not-there" in entry["msg"]
    made.call("--log", "log2", "start", "not-there")
    assert re.match(r'time="[^"]+" level=error msg="', (made.path / "log2").read_text())


# hooks

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def hooks(made):
    """Two hooks of every kind: each adds its name and the state's status to a file in the root filesystem."""
    script = 'read s; echo "$1 $(echo "$s" | grep -o \'"status": *"[a-z]*"\' | tr -d \' \')" >> {}'
    found = {}
    for kind in KINDS:
        file = "/said" if kind == "startContainer" else f"{made.rootfs}/said"
        args = [["sh", "-c", script.format(file), "sh", f"{kind}{n}"] for n in range(2)]
        found[kind] = [{"path": "/bin/sh", "args": each} for each in args]
    return found


def test_hooks_run_in_their_order_with_the_state(made):
    shown = {}
    made.write("echo command >> /said", {"hooks": hooks(made)})
    for runtime in ("labs", "runc"):
        assert made.run(runtime).returncode == 0
        shown[runtime] = (made.rootfs / "said").read_text().splitlines()
        (made.rootfs / "said").unlink()
    order = [line.split()[0] for line in shown["labs"]]
    assert [line for line in order if line not in ("command", "poststart0", "poststart1")] == [
        f"{kind}{n}" for kind in KINDS if kind != "poststart" for n in range(2)]
    assert order.index("startContainer1") < order.index("command") < order.index("poststop0")
    # runtime.md, "Lifecycle": poststart comes when the command runs; runc still says "created"
    theirs = [re.sub('^(poststart. "status":)"created"', r'\1"running"', line) for line in shown["runc"]]
    assert sorted(shown["labs"]) == sorted(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_that_fails(made, kind):
    made.write("echo ran", {"hooks": {kind: [{"path": "/bin/false"}]}})
    ours, theirs = made.run(), made.run("runc")
    # config.md, "Posix-platform Hooks": after poststart a warning, and life goes on; runc ends the container
    assert bool(ours.returncode) == bool(theirs.returncode and kind != "poststart"), theirs
    assert ours.stdout == ("ran\n" if kind.startswith("post") else "")
    assert f"hooks.{kind}[0]" in ours.stderr
    assert oci.left(made) == []


def test_a_hook_that_does_not_end_in_time(made):
    slow = {"path": "/bin/sleep", "args": ["sleep", "99"], "timeout": 1}
    made.write("echo ran", {"hooks": {"createRuntime": [slow]}})
    begun = time.monotonic()
    done = made.run()
    assert done.returncode == 1 and "within 1 s" in done.stderr and done.stdout == ""
    assert time.monotonic() - begun < 60


def test_features_names_what_the_specification_has(made):
    shown = json.loads(made.good("features"))
    assert shown["ociVersionMin"] == "1.0.0"
    assert set(shown["hooks"]) == set(KINDS)
    assert {"rro", "rbind", "idmap"} <= set(shown["mountOptions"])
    assert set(shown["linux"]["namespaces"]) == {"cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"}
