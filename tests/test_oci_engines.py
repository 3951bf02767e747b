"""Podman and Docker run containers on labs-runtime: what they see is what their own runtime gives."""

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from labs import machine, process

pytestmark = pytest.mark.machine

RUNTIME = str(Path(__file__).resolve().parent.parent / "bin" / "labs-runtime")
PODMAN = {"labs": ["podman", "--runtime", RUNTIME], "own": ["podman"]}
DOCKER = {"labs": ["--runtime=labs"], "own": ["--runtime=runc"]}
FACTS = r"""id; grep -E 'Cap|NoNew|Seccomp:' /proc/self/status
cat /proc/self/attr/current; hostname; pwd; ulimit -n; ls /dev
awk '{print $5, $5 ~ "^/(proc|sys)/" ? "" : $6}' /proc/self/mountinfo | sort | grep -v -e /etc/ -e /run/
cat /proc/sys/net/ipv4/ping_group_range"""


def out(*argv, check=True):
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=240)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def code(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=240).returncode


@pytest.fixture
def name():
    given = machine.new_name("e")
    yield given
    for engine in ("podman", "docker"):
        subprocess.run([engine, "rm", "--force", "--volumes", given], capture_output=True, check=False)


def on_a_terminal(argv):
    """What a command prints whose standard input and output are a terminal, and its status."""
    pid, main = pty.fork()
    if pid == 0:
        os.execvp(argv[0], argv)
    said = b""
    while True:
        try:
            said += os.read(main, 4096)
        except OSError:  # EIO: the other end is closed
            break
    os.close(main)
    return said.decode(), process.wait_status(os.waitpid(pid, 0)[1]).code


def test_podman_gives_the_same_container_on_both():
    options = ["run", "--rm", "--network=none", "--hostname=h", "--memory=64m", "--pids-limit=50", "--cap-drop=MKNOD",
               "--read-only", "--user=1000:1000", "--ulimit=nofile=77:77", "busybox:lab", "sh", "-c", FACTS]
    ours, theirs = out(*PODMAN["labs"], *options), out(*PODMAN["own"], *options)
    assert "uid=1000" in ours
    assert ours == theirs


def test_docker_gives_the_same_container_on_both():
    options = ["--rm", "--network=none", "--hostname=h", "--memory=64m", "--pids-limit=50", "--cap-drop=MKNOD",
               "--read-only", "--user=1000:1000", "--ulimit=nofile=77:77", "busybox:lab", "sh", "-c", FACTS]
    ours, theirs = (out("docker", "run", *DOCKER[who], *options) for who in ("labs", "own"))
    assert "docker-default (enforce)" in ours
    assert ours == theirs


def test_podman_limits_are_in_the_cgroup_files(name):
    out(*PODMAN["labs"], "run", "-d", "--name", name, "--network=none", "--memory=64m", "--memory-swap=96m",
        "--cpus=0.5", "--pids-limit=50", "busybox:lab", "sleep", "300")
    pid = int(out("podman", "inspect", "--format", "{{.State.Pid}}", name))
    group = Path("/sys/fs/cgroup" + Path(f"/proc/{pid}/cgroup").read_text().strip().partition("::")[2])
    wanted = {"memory.max": str(64 << 20), "memory.swap.max": str(32 << 20), "cpu.max": "50000 100000",
              "pids.max": "50"}
    assert {file: (group / file).read_text().strip() for file in wanted} == wanted
    assert out("podman", "inspect", "--format", "{{.OCIRuntime}}", name).strip() == RUNTIME


def test_podman_life_of_a_container(name, tmp_path):
    (tmp_path / "file").write_text("from the host")
    out(*PODMAN["labs"], "run", "-d", "--name", name, "--network=none", "-v", f"{tmp_path}:/data:ro", "busybox:lab",
        "sh", "-c", "echo started; sleep 300")
    podman = [*PODMAN["labs"]]
    assert out(*podman, "exec", name, "cat", "/data/file") == "from the host"
    assert code(*podman, "exec", name, "touch", "/data/no") == 1
    assert code(*podman, "exec", name, "sh", "-c", "exit 9") == 9
    assert code(*podman, "exec", name, "nosuch") == 127
    assert "sleep 300" in out(*podman, "top", name)
    out(*podman, "pause", name)
    assert out("podman", "inspect", "--format", "{{.State.Status}}", name).strip() == "paused"
    out(*podman, "unpause", name)
    assert out("podman", "logs", name) == "started\n"
    out(*podman, "stop", "--time", "0", name)
    assert out("podman", "inspect", "--format", "{{.State.ExitCode}}", name).strip() == "137"


def test_a_pod_shares_its_namespaces():
    pod = machine.new_name("p")
    podman = PODMAN["labs"]
    try:
        out(*podman, "pod", "create", "--name", pod, "--network=none")
        for member in "ab":
            out(*podman, "run", "-d", "--pod", pod, "--name", f"{pod}-{member}", "busybox:lab", "sleep", "300")
        pids = json.loads(out("podman", "inspect", f"{pod}-a", f"{pod}-b"))
        a, b = (entry["State"]["Pid"] for entry in pids)
        same = {kind: os.readlink(f"/proc/{a}/ns/{kind}") == os.readlink(f"/proc/{b}/ns/{kind}")
                for kind in ("net", "ipc", "uts", "mnt", "pid")}
        assert same == {"net": True, "ipc": True, "uts": True, "mnt": False, "pid": False}
    finally:
        subprocess.run([*podman, "pod", "rm", "--time", "0", "--force", pod], capture_output=True, check=False)
        pause = out("podman", "images", "--quiet", "--filter", "reference=localhost/podman-pause").split()
        subprocess.run(["podman", "rmi", *pause], capture_output=True, check=False)


def test_both_engines_with_a_terminal():
    script = ["busybox:lab", "sh", "-c", "tty; exit 7"]
    for argv in ([*PODMAN["labs"], "run"], ["docker", "run", *DOCKER["labs"]]):
        said, status = on_a_terminal([*argv, "-it", "--rm", "--network=none", *script])
        assert "/dev/pts/0" in said
        assert status == 7


def test_docker_life_of_a_container(name):
    out("docker", "run", "-d", "--name", name, *DOCKER["labs"], "--network=none", "--memory=64m", "busybox:lab",
        "sh", "-c", "echo started; echo wrong >&2; sleep 300")
    assert "docker-default (enforce)" in out("docker", "exec", name, "cat", "/proc/self/attr/current")
    said, status = on_a_terminal(["docker", "exec", "-it", name, "sh", "-c", "tty; exit 5"])
    assert "/dev/pts/0" in said and status == 5
    assert code("docker", "exec", name, "sh", "-c", "exit 9") == 9
    assert code("docker", "exec", name, "nosuch") == 126  # Docker's own answer with runc too
    assert "sleep 300" in out("docker", "top", name)
    assert "64MiB" in out("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", name)
    out("docker", "pause", name)
    assert out("docker", "inspect", "--format", "{{.State.Status}}", name).strip() == "paused"
    out("docker", "unpause", name)
    logs = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True)
    assert (logs.stdout, logs.stderr) == ("started\n", "wrong\n")
    out("docker", "stop", "--time", "1", name)
    assert out("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip() == "137"


def test_docker_restart_policy(name):
    out("docker", "run", "-d", "--name", name, *DOCKER["labs"], "--network=none", "--restart=on-failure:2",
        "busybox:lab", "sh", "-c", "exit 3")
    def given_up():
        state = out("docker", "inspect", "--format", "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}", name)
        return state.split() == ["2", "exited", "3"]
    process.until(given_up, 120, "two restarts")


def test_a_command_that_is_not_there_says_so():
    for argv in ([*PODMAN["labs"], "run"], ["docker", "run", *DOCKER["labs"]]):
        words = [*argv, "--rm", "--network=none", "busybox:lab", "nosuch"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 127
        assert "nosuch" in done.stderr


def test_limits_are_systemds_own_so_that_it_does_not_write_over_them(name):
    limits = ["--memory=32m", "--memory-swap=48m", "--pids-limit=16", "--cpus=0.5"]
    run = ["docker", "run", "-d", "--name", name, *DOCKER["labs"], "--network=none"]
    out(*run, *limits, "busybox:lab", "sleep", "1000")
    pid = out("docker", "inspect", "--format={{.State.Pid}}", name).strip()
    scope = Path("/sys/fs/cgroup" + Path(f"/proc/{pid}/cgroup").read_text().split(":")[2].strip())
    shown = out("systemctl", "show", "-p", "MemoryMax,MemorySwapMax,TasksMax,CPUQuotaPerSecUSec", scope.name)
    assert sorted(shown.split()) == [
        "CPUQuotaPerSecUSec=500ms", "MemoryMax=33554432", "MemorySwapMax=16777216", "TasksMax=16"]
    out("systemctl", "daemon-reload")
    files = ("memory.max", "memory.swap.max", "pids.max", "cpu.max")
    assert [(scope / file).read_text().strip() for file in files] == ["33554432", "16777216", "16", "50000 100000"]
