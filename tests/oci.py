"""What the tests of the OCI runtime share: a bundle, a runtime's command line, and what is seen inside."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labs import machine, process, syscalls

LABS = str(Path(__file__).parent.parent / "bin/labs-runtime")
RUNTIMES = {"labs": LABS, "runc": "runc", "crun": "crun"}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
BASE: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "env": [PATH, "TERM=xterm"], "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
                "noNewPrivileges": True},
    "root": {"path": "rootfs"},
    "hostname": "box",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
         "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
         "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}],
    "linux": {
        "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "maskedPaths": MASKED,
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]},
}
FACTS = """exec 2>&1
echo @status; grep -E '^(Uid|Gid|Groups|Umask|Cap...|NoNewPrivs|Seccomp|Sig(Blk|Ign)):' /proc/self/status
echo @mounts; cat /proc/self/mountinfo
echo @names; hostname; cat /proc/sys/kernel/domainname
echo @env; env | sort
echo @cwd; pwd
echo @limits; cat /proc/self/limits
echo @oom; cat /proc/self/oom_score_adj
echo @namespaces; stat -c %N /proc/self/ns/*
echo @dev; find /dev -xdev | sort | xargs stat -c '%N %F %a %u:%g %t:%T'
echo @maps; cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups
echo @files; for f in 0 1 2 3 4 5 6 7 8 9 10 11 12; do [ -e /proc/self/fd/$f ] && echo $f; done
echo @links; cat /sys/class/net/lo/flags
"""


def patched(config: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """config with "process.user.uid" set to a value; "mounts+" adds to a list, None takes away."""
    config = copy.deepcopy(config)
    for path, value in patch.items():
        *folders, name = path.split(".") if not path.startswith("linux.sysctl.") else ["linux", "sysctl", path[13:]]
        there = config
        for folder in folders:
            there = there.setdefault(folder, {})
        if value is None:
            there.pop(name, None)
        elif name.endswith("+"):
            there[name[:-1]] = [*there.get(name[:-1], []), *value]
        else:
            there[name] = value
    return config


class Bundle:
    """A directory with config.json and a copy of busybox's root; its containers bear names that nobody else's have."""

    def __init__(self, path: Path) -> None:
        self.path, self.rootfs = path, path / "rootfs"
        self.name = path.name
        self.state = path / "state"
        self.config: dict[str, Any] = {}
        subprocess.run(["cp", "-a", machine.ROOTFS["busybox"], str(self.rootfs)], check=True)

    def write(self, script: str = "", patch: dict[str, Any] | None = None) -> Bundle:
        """config.json: the base with the patch, and sh -c script as the command."""
        return self.write_config(patched(BASE, patch or {}), script)

    def write_config(self, config: dict[str, Any], script: str = "") -> Bundle:
        if script:
            config["process"]["args"] = ["sh", "-c", script]
        config["linux"].setdefault("cgroupsPath", f"/{self.name}")
        self.config = json.loads(json.dumps(config).replace("@BUNDLE@", str(self.path)))
        (self.path / "config.json").write_text(json.dumps(self.config))
        return self

    def call(self, *words: str, runtime: str = "labs", **more: Any) -> subprocess.CompletedProcess[str]:
        """One command of a runtime, with a state directory of the bundle's own."""
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        return subprocess.run([*self.line(runtime), *words], text=True, cwd=self.path, timeout=120, **more)

    def line(self, runtime: str = "labs") -> list[str]:
        return [RUNTIMES.get(runtime, runtime), "--root", str(self.state)]

    def run(self, runtime: str = "labs", *options: str) -> subprocess.CompletedProcess[str]:
        return self.call("run", *options, self.name, runtime=runtime)

    def good(self, *words: str, **more: Any) -> str:
        """A command that must succeed, quietly: its output."""
        done = self.call(*words, **more)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout or ""

    def status(self) -> str:
        return json.loads(self.good("state", self.name))["status"]

    def detached(self) -> str:
        """create and start, with nothing of ours held open: the container's name."""
        null = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        done = self.call("run", "--detach", self.name, **null)
        assert done.returncode == 0
        return self.name


def kill(pid: int) -> None:
    """Kill process 1 of a container and wait until it is reaped, if it is there.

    `runc delete --force` goes on when it is a zombie, whose threads may still be in the cgroup: then rmdir(2) fails.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    process.until(lambda: not Path(f"/proc/{pid}").exists())


@contextlib.contextmanager
def bundle(script: str = "", patch: dict[str, Any] | None = None) -> Iterator[Bundle]:
    """A bundle that is gone afterwards, with whatever was started from it."""
    path = Path(tempfile.mkdtemp(prefix="labs-oci-"))
    # A mount of its own: what the host's /tmp passes on (nosuid, nodev, shared) is no business of the runtimes'.
    syscalls.mount("bundle", str(path), "tmpfs", 0, "mode=755")
    syscalls.mount(None, str(path), None, syscalls.MS_PRIVATE)
    made = Bundle(path)
    try:
        if script or patch:
            made.write(script, patch)
        yield made
    finally:
        for name in os.listdir(made.state) if made.state.is_dir() else []:
            made.call("delete", "--force", name)
        syscalls.umount2(str(path), syscalls.MNT_DETACH)
        path.rmdir()


def left(made: Bundle) -> list[str]:
    """What is still there of a bundle's containers: state, cgroup, processes, mounts."""
    found = [str(path) for path in made.state.iterdir()] if made.state.is_dir() else []
    found += [folder for folder, _, _ in os.walk(machine.CGROUP_ROOT) if made.name in folder]
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return found + [line for line in mounts if f"{made.name}/rootfs" in line]


# --- what was seen inside, so that two runtimes can be compared ---


def facts(output: str, made: Bundle, known: dict[str, str]) -> dict[str, list[str]]:
    """The output of FACTS without what is new in every container: by section, and by mount, device and namespace."""
    found: dict[str, list[str]] = {"": []}
    lines = found[""]
    for line in output.replace(str(made.path), "BUNDLE").replace(made.name, "NAME").splitlines():
        if re.fullmatch("@[a-z_]+", line):
            lines = found.setdefault(line[1:], [])
        else:
            lines.append(line)
    for section, split in (("mounts", _mount), ("namespaces", _namespace), ("dev", _device)):
        for line in found.pop(section, []):
            what, text = split(line, made, known)
            found.setdefault(f"{section} {what}", []).append(text)
    if not os.path.exists("/proc/kcore"):  # a sandbox without it: runc leaves out the link, labs and crun do not
        found.pop("dev /dev/core", None)
    return found


def _namespace(line: str, _: Bundle, known: dict[str, str]) -> tuple[str, str]:
    kind, _, link = line.replace("'", "").removeprefix("/proc/self/ns/").partition(" -> ")
    if not link:
        return "", line
    return kind, "host" if link == os.readlink(f"/proc/self/ns/{kind}") else known.get(link, "new")


def _device(line: str, *_: object) -> tuple[str, str]:
    path, _, text = line.replace("'", "").partition(" ")
    return path, text


def _mount(line: str, made: Bundle, _: object) -> tuple[str, str]:
    """A mount as its target and "TYPE SOURCE ROOT OPTIONS SUPER PROPAGATION"; of a masked path only that it is."""
    left_half, dash, right_half = line.partition(" - ")
    if not dash:
        return "", line
    _, _, _, root, target, options, *tags = left_half.split()
    kind, source, more = right_half.split(" ")
    propagation = ",".join(re.sub(":.*", "", tag) for tag in tags) or "private"
    if target in (made.config["linux"].get("maskedPaths") or []):
        return target, "masked"
    if kind in ("cgroup2", "sysfs"):  # one filesystem, named and made by whoever mounted it first
        source = more = "-"
    options, more = (",".join(sorted(text.split(","))) for text in (options, more))
    return target, f"{kind} {source} {root} {options} {more} {propagation}"
