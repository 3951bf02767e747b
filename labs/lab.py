"""The lab as a whole: what is on the machine now, what changed, and how everything of labs is removed.

Clean-up touches what bears the prefix "labs-", or lies in the directories of labs, and nothing else.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from labs import apparmor, cgroup, engine, machine, mounts, namespaces, process, syscalls
from labs.errors import KernelError, LabError, Timeout

ENGINES = ("docker", "podman")
# Docker Engine API, "List containers" and so on: one client a question would take seconds on an emulated machine.
DOCKER = {"container": "/containers/json?all=1", "image": "/images/json?all=1",
          "network": "/networks", "volume": "/volumes"}
LISTINGS = {
    "container": ("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Names}}"),
    "image": ("images", "-a", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"),
    "network": ("network", "ls", "--format", "{{.Name}}"),
    "volume": ("volume", "ls", "--format", "{{.Name}}"),
}
# What comes and goes by itself: systemd's helpers, logins and ssh connections, Podman's pause process,
# and whoever waits for the lock under which a lab machine is compared.
CHURN = ("(udev-worker)", "(sd-", "systemd", "sshd", "agetty", "login", "dbus-daemon", "apt", "catatonit", "flock")
TMP = "/tmp"  # noqa: S108  only looked at
CHURN_FILES = ("systemd-private-", ".", "ssh-", "pytest-of-", "tmp.")
# Where Podman writes down what it holds: while these are as they were, so is its answer.
PODMAN_FOLDERS = ("/var/lib/containers/storage", "/var/lib/containers/storage/overlay-images",
                  "/var/lib/containers/storage/overlay-containers", "/var/lib/containers/storage/volumes",
                  "/etc/containers/networks")
# What a first use binds and leaves so, or lets go at a time of its own: Podman's store onto itself, the directory of
# `ip netns add` (ip-netns(8)), and Docker's name for the machine's own network namespace (`--network host`); and what
# the kernel mounts by itself when somebody, like bpftrace, looks there (debugfs_create_automount, tracefs).
NETNS_DIRECTORY = "/run/netns"
LASTING_MOUNTS = ("/var/lib/containers/storage/overlay", NETNS_DIRECTORY, "/run/docker/netns/default",
                  "/sys/kernel/debug/tracing")
CHURN_MOUNTS = ("/run/user/", "/proc/sys/fs/binfmt_misc", "/run/credentials/")


class Leftover(LabError):
    """Something is on the machine that was not there before, or is missing; ``changes`` lists it."""

    def __init__(self, changes: list[str]) -> None:
        self.changes = changes
        super().__init__("the machine is not as it was:\n" + "\n".join(changes))


class Snapshot(NamedTuple):
    """The state of a machine as sets of lines, one set a field."""

    namespaces: frozenset[str]
    links: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    processes: frozenset[str]
    files: frozenset[str]
    profiles: frozenset[str]
    nft: frozenset[str]
    engines: frozenset[str]

    def diff(self, later: Snapshot) -> list[str]:
        """What changed from this snapshot to a later one: "+ process sleep 100 (1234)", "- link veth0"."""
        changes: list[str] = []
        for before, after in zip(self, later, strict=True):
            changes += [f"- {line}" for line in sorted(before - after)]
            changes += [f"+ {line}" for line in sorted(after - before)]
        return changes


def snapshot(full: bool = False) -> Snapshot:
    """The state now.  full adds what slow commands tell: nft rules, and what Docker and Podman hold."""
    running = dict(_processes())
    return Snapshot(
        frozenset(_namespaces(running)),
        frozenset(f"link {name}" for name in os.listdir("/sys/class/net")),
        frozenset(f"mount {m.fstype} {m.target}" for m in mounts.table()
                  if not m.target.startswith(CHURN_MOUNTS) and m.target not in LASTING_MOUNTS),
        frozenset(f"cgroup {path}" for path in _cgroups()),
        frozenset(f"process {name} ({_service(pid) or pid})" for pid, name in running.items()),
        frozenset(f"file {path}" for path in _files()),
        frozenset(f"apparmor {name}" for name in _profiles()),
        frozenset(_nft() if full else ()),
        frozenset(_engines() if full else ()))


class _Stat(NamedTuple):
    name: str
    state: str
    parent: int


def _processes() -> Iterator[tuple[int, str]]:
    """Processes of user space that do not come and go by themselves, nor belong to another login."""
    table = dict(_stats())
    own = set(_ancestors(os.getpid(), table))
    for pid, stat in table.items():
        if stat.name.startswith(CHURN) or any(_is_login(p, table) and p not in own for p in _ancestors(pid, table)):
            continue
        with suppress(FileNotFoundError, ProcessLookupError):
            arguments = process.cmdline(pid)
            if arguments or stat.state == "Z":  # else a kernel thread
                yield pid, " ".join(arguments) or f"{stat.name} <defunct>"


def _service(pid: int) -> str:
    """docker.service or containerd.service, or "": a daemon is the same after a restart, its pid is not."""
    with suppress(OSError):  # it ended
        group = os.path.basename(cgroup.of(pid).path)
        return group if group in ("docker.service", "containerd.service") else ""
    return ""


def _stats() -> Iterator[tuple[int, _Stat]]:
    """Name, state and parent of every process: proc_pid_stat(5)."""
    for pid in process.pids():
        with suppress(OSError):  # it ended
            left, _, right = machine.read_file(f"/proc/{pid}/stat").rpartition(")")
            state, parent = right.split()[:2]
            yield pid, _Stat(left.partition("(")[2], state, int(parent))


def _ancestors(pid: int, table: Mapping[int, _Stat]) -> Iterator[int]:
    """The process itself, its parent, and so on."""
    while pid in table:
        yield pid
        pid = table[pid].parent


def _is_login(pid: int, table: Mapping[int, _Stat]) -> bool:
    """What a connection of ssh started: its parent is an sshd."""
    parent = table.get(table[pid].parent)
    return parent is not None and parent.name.startswith("sshd")


def _namespaces(pids: Iterable[int]) -> Iterator[str]:
    """The namespaces that those processes are in, and those that a mount keeps alive."""
    for pid in pids:
        with suppress(OSError):  # it ended, or is a zombie
            for kind in namespaces.KINDS:
                yield "namespace " + os.readlink(f"/proc/{pid}/ns/{kind}")
    for mount in mounts.table():
        if mount.fstype == "nsfs":
            yield f"namespace {mount.root}"


def _cgroups() -> Iterator[str]:
    """Groups, without those that systemd makes for services and logins."""
    for folder, below, _ in os.walk(machine.CGROUP_ROOT):
        below[:] = [name for name in below if not name.endswith((".service", ".mount", ".socket"))
                    and name not in ("user.slice", "init.scope")]
        if folder != machine.CGROUP:
            yield folder


def _files() -> Iterator[str]:
    """What lies in the directories of labs, directly in /tmp, and at the top of the trees that all labs share."""
    for top in (machine.STATE, machine.DATA):
        for folder, _, names in os.walk(top):
            yield from (f"{folder}/{name}" for name in names)
            if folder not in (top, f"{machine.STATE}/ns", f"{machine.STATE}/oci"):  # kept when empty
                yield folder
    yield from (f"{TMP}/{name}" for name in os.listdir(TMP) if not name.startswith(CHURN_FILES))
    for root in machine.ROOTFS.values():  # where a runtime would make mount points: /run, /etc/resolv.conf
        yield from glob.iglob(f"{root}/*")
        yield from glob.iglob(f"{root}/*/*")


def _profiles() -> list[str]:
    """AppArmor profiles of labs: those of Docker and Podman are loaded at a first use, and stay."""
    return [name for name in apparmor.profiles() if name.startswith(machine.PREFIX)]


def _lines(*command: str) -> list[str]:
    """What a command prints, line by line; nothing where it is not installed or cannot answer."""
    if shutil.which(command[0]) is None:
        return []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []


def _nft() -> Iterator[str]:
    """Every rule, without counters and handles: nft(8), --stateless."""
    table = chain = ""
    for line in map(str.strip, _lines("nft", "--stateless", "list", "ruleset")):
        if line.startswith("table "):
            table, chain = line.rstrip(" {"), ""
        elif line.startswith(("chain ", "set ", "map ")):
            chain = line.rstrip(" {")
        if line.strip("}"):
            yield f"nft {table} {chain} {line}"


def _engines() -> Iterator[str]:
    yield from (f"docker {line}" for line in _docker())
    yield from (f"podman {line}" for line in _podman())


def _docker() -> Iterator[str]:
    """What Docker's client lists, asked of the daemon itself; nothing where none answers."""
    with suppress(OSError):
        for what, path in DOCKER.items():
            answer = engine.ask("GET", path).json
            for row in answer["Volumes"] or () if what == "volume" else answer:
                yield from (f"{what} {line}" for line in _named(what, row))


def _named(what: str, row: Mapping[str, Any]) -> list[str]:
    """One row as LISTINGS has it; an image has a line for each of its names."""
    if what == "container":
        return [f"{row['Id']} {row['Names'][0].removeprefix('/')}"]
    if what == "image":
        return [f"{row['Id']} {name}" for name in row["RepoTags"] or ["<none>:<none>"]]
    return [row["Name"]]


_podman_known: dict[tuple[str, ...], list[str]] = {}  # the last state and its answer


def _podman() -> list[str]:
    """What Podman lists; it is asked again only when its files have changed."""
    if (state := _podman_state()) not in _podman_known:
        lines = [f"{what} {line}" for what, listing in LISTINGS.items() for line in _lines("podman", *listing)]
        _podman_known.clear()
        _podman_known[_podman_state()] = lines  # asking may itself have written something
        return lines
    return _podman_known[state]


def _podman_state() -> tuple[str, ...]:
    return tuple(f"{entry.path} {entry.stat().st_mtime_ns} {entry.stat().st_size}"
                 for folder in PODMAN_FOLDERS if os.path.isdir(folder)
                 for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
                 if not entry.name.endswith((".lock", "-shm")))


@contextmanager
def unchanged(full: bool = False, timeout: float = 30.0) -> Iterator[Snapshot]:
    """Raise Leftover unless the machine after the block is as before; timeout: seconds to settle."""
    before = snapshot(full)
    yield before
    try:
        process.until(lambda: before == snapshot(full), timeout)
    except Timeout:
        changes = before.diff(snapshot(full))
        if changes:
            raise Leftover(changes) from None


def clean(engines: bool = True) -> list[str]:
    """Remove every trace of labs and say what was removed; may be called at any time, and twice.

    Processes first, then what they held: cgroups, mounts, network namespaces and links, nft tables,
    AppArmor profiles, files; with engines also the containers, networks and volumes named labs-… of Docker and Podman.
    """
    machine.require()
    done = [*_kill_processes(), *_remove_cgroups(), *_unmount(), *_remove_network(), *_remove_profiles(),
            *_remove_files()]
    return done + list(_remove_from_engines()) if engines else done


def _kill_processes() -> Iterator[str]:
    """Kill every process in a cgroup of labs, and each whose root, working directory or network is one of labs."""
    if os.path.exists(machine.CGROUP):
        pids = [pid for folder, _, _ in os.walk(machine.CGROUP) for pid in cgroup.Cgroup(folder).procs()]
        cgroup.Cgroup(machine.CGROUP).kill()
        yield from (f"process {pid}" for pid in pids)
    places = (machine.STATE + "/", machine.DATA + "/", *machine.ROOTFS.values())
    networks = {f"net:[{os.stat(path).st_ino}]" for path in glob.glob(f"{NETNS_DIRECTORY}/{machine.PREFIX}*")}
    for pid in process.pids():
        with suppress(OSError):  # it ended
            pidfd = os.pidfd_open(pid)
            held = [os.readlink(f"/proc/{pid}/{link}") for link in ("root", "cwd", "ns/net")]
            if pid != os.getpid() and any(path.startswith(places) or path in networks for path in held):
                process.kill(pidfd, signal.SIGKILL)
                process.readable(pidfd, 10.0)
                yield f"process {pid}"
            os.close(pidfd)


def _remove_cgroups() -> Iterator[str]:
    if os.path.exists(machine.CGROUP):
        yield from (f"cgroup {group.name}" for group in cgroup.Cgroup(machine.CGROUP).children())
        cgroup.Cgroup(machine.CGROUP).delete()


def _unmount() -> Iterator[str]:
    places = (machine.STATE + "/", machine.DATA + "/", "/run/netns/" + machine.PREFIX)
    for mount in mounts.table():
        if mount.target.startswith(places):
            with suppress(KernelError):  # a shared mount's copy goes with the first one
                syscalls.umount2(mount.target, syscalls.MNT_DETACH)
            yield f"mount {mount.target}"


def _remove_network() -> Iterator[str]:
    """Links, network namespaces that `ip netns` made, and nft tables with the prefix."""
    for name in os.listdir("/sys/class/net"):
        if name.startswith(machine.PREFIX):
            _lines("ip", "link", "delete", name)
            yield f"link {name}"
    if os.path.isdir("/run/netns"):
        for name in os.listdir("/run/netns"):
            if name.startswith(machine.PREFIX):
                os.unlink(f"/run/netns/{name}")
                yield f"netns {name}"
    for line in _lines("nft", "list", "tables"):
        _, family, name = line.split()
        if name.startswith(machine.PREFIX):
            _lines("nft", "delete", "table", family, name)
            yield f"nft {family} {name}"


def _remove_profiles() -> Iterator[str]:
    for name in _profiles():
        if "//" not in name:  # one inside another goes with it
            apparmor.remove(name)
        yield f"apparmor {name}"


def _remove_files() -> Iterator[str]:
    """All of STATE, and what bears the prefix in DATA; a container's monitor may be doing the same now."""
    for top, prefix in ((machine.STATE, ""), (machine.DATA, machine.PREFIX)):
        for name in os.listdir(top) if os.path.isdir(top) else ():
            if name.startswith(prefix):
                with suppress(FileNotFoundError):
                    _remove(f"{top}/{name}")
                yield f"file {top}/{name}"


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        machine.remove_tree(path)
    else:
        os.unlink(path)


def _remove_from_engines() -> Iterator[str]:
    commands = {"container": ("rm", "--force", "--volumes"), "network": ("network", "rm"), "volume": ("volume", "rm")}
    for client in ENGINES:
        for what, remove in commands.items():
            for line in _lines(client, *LISTINGS[what]):
                name = line.split()[-1]
                if name.startswith(machine.PREFIX):
                    _lines(client, *remove, name)
                    yield f"{client} {what} {name}"
