"""Attacks against layers of defence, measured: the stage with its victims, the layers, and the matrix of both.

Each configuration is one container, which ``labs-runtime`` makes of a config.json.  The bare one is namespaces and
a root file system; a layer is one patch of config.json.  Inside runs ``labs.attacks``.  The stage lays out what the
attacks go for (a secret of the host, a disk, a key, a neighbour in memory and one on the wire) and is the referee:
an attack has reached its goal only when the stage sees it.

A container whose layers cannot all be put on is not started.  All of this needs a lab machine.
"""

from __future__ import annotations

import copy
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from labs import attacks, capabilities, disks, machine, mounts, netns, process, seccomp, syscalls, userns
from labs.attacks import ATTACKS, STAGE, WIRE
from labs.capability_trials import system_call
from labs.errors import BadInput, ChildFailed, Timeout
from labs.netns import Netns

Config: TypeAlias = dict[str, Any]
Results: TypeAlias = dict[str, str]

HERE = Path(__file__).resolve().parent
RUNTIME = str(HERE.parent / "bin/labs-runtime")
COMMAND = ["/usr/bin/python3", "-BSE", "-m", "labs.attacks"]
OPEN, NO_EFFECT = "open", "no effect"
FIRST_ID, IDS = 100_000, 65_536
USER, OWNER = 1000, 4242  # who the app is; whose the set-user-ID program is
OURS, SERVER, SPOOFED, MAC = "10.77.0.2", "10.77.0.1", "10.77.0.9", "02:00:00:00:00:66"
DATABASE, SERVICE = 6379, 80
TASKS, MOST_TASKS = 100, 64  # what the fork bomb makes, and what the layer allows
POLICY = "labs.network.allow"
UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid, unix(7)
BLKFLSBUF = 0x1261  # <linux/fs.h>
NETLINK_KOBJECT_UEVENT = 15  # <linux/netlink.h>
IMAGES = {"docker": "debian:lab", "podman": "localhost/debian:lab"}

# Calls that the profile of the engines allows and our app does not make.
UNUSED = ("mount", "umount2", "fsopen", "fsconfig", "fsmount", "move_mount", "open_tree", "pivot_root", "unshare",
          "ptrace", "process_vm_readv", "process_vm_writev", "keyctl", "adjtimex", "clock_adjtime", "syslog")
# The defaults of Docker and of the OCI runtime specification's example; /sys and /sys/fs/cgroup come with them.
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
          "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/sys"]


def profile() -> Config:
    """The linux.seccomp of the layer: what the engines allow a container without capabilities, less UNUSED."""
    found = seccomp.oci_profile(json.loads(machine.read_file(seccomp.PODMANS_PROFILE)))
    for entry in found["syscalls"]:
        entry["names"] = [name for name in entry["names"] if name not in UNUSED]
    found["syscalls"] = [entry for entry in found["syscalls"] if entry["names"]]
    return found


ROW = {"containerID": 0, "hostID": FIRST_ID, "size": IDS}
# Layer: what it changes in config.json, "a.b" a field and "a.b+" more of a list.
LAYERS: dict[str, Callable[[], Config]] = {
    "user namespace": lambda: {"linux.namespaces+": [{"type": "user"}], "linux.uidMappings": [ROW],
                               "linux.gidMappings": [ROW]},
    "capabilities": lambda: {"process.capabilities": {"bounding": [], "effective": [], "permitted": []}},
    "seccomp": lambda: {"linux.seccomp": profile()},
    "no_new_privs": lambda: {"process.noNewPrivileges": True},
    "LSM": lambda: {"process.apparmorProfile": "docker-default"},
    "paths": lambda: {"root.readonly": True, "linux.maskedPaths": MASKED, "linux.readonlyPaths": READONLY},
    "cgroup": lambda: {"linux.resources": {"pids": {"limit": MOST_TASKS}, "memory": {"limit": 256 << 20},
                                           "devices": [{"allow": False, "access": "rwm"}]}},
    "network policy": lambda: {"annotations": {POLICY: f"tcp dport {SERVICE}"}},
    "non-root": lambda: {"process.user": {"uid": USER, "gid": USER}},
}


def bare(folder: str = "/nowhere") -> Config:
    """config.json without a layer: namespaces, a root file system made of the host's /usr, every capability."""
    everything = capabilities.names(syscalls.capget().permitted)
    bind = {"type": "bind", "options": ["rbind", "ro"]}
    return {
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": COMMAND, "env": ["PATH=/usr/bin:/usr/sbin"],
                    "noNewPrivileges": False,
                    "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), everything)},
        "root": {"path": f"{folder}/root", "readonly": False},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                   {"destination": "/sys", "type": "sysfs", "source": "sysfs"},
                   {"destination": "/usr", "source": "/usr"} | bind,
                   {"destination": "/labs", "source": str(HERE)} | bind,
                   {"destination": STAGE, "source": f"{folder}/stage", "type": "bind", "options": ["rbind"]}],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
                  "resources": {"devices": [{"allow": True, "access": "rwm"}]}},
    }


def configuration(layers: Collection[str], changes: Mapping[str, Any] | None = None,
                  folder: str = "/nowhere") -> Config:
    """config.json of the bare container with these layers, and then with further changes in the same form; checked."""
    config = bare(folder)
    for layer in layers:
        for field, value in _layer(layer).items():
            _change(config, field, value)
    for field, value in (changes or {}).items():
        _change(config, field, value)
    return check(config)


def _layer(name: str) -> Config:
    if name not in LAYERS:
        raise BadInput("layer", name, f"must be one of {', '.join(LAYERS)}")
    return LAYERS[name]()


def _change(config: Config, field: str, value: Any) -> None:
    """Set config's field "a.b.c", or with "a.b+" add to a list."""
    *folders, name = field.split(".")
    for folder in folders:
        config = config.setdefault(folder, {})
    config[name.rstrip("+")] = [*config.get(name[:-1], []), *value] if name.endswith("+") else copy.deepcopy(value)


def check(config: Config) -> Config:
    """BadInput for what a runtime would pass over or find out too late: then less would be put on than was asked for.

    A name that is no capability, a system call that nobody knows, a filter that is too long, ID maps that overlap.
    """
    for kind, names in config["process"].get("capabilities", {}).items():
        if kind not in capabilities.SETS:
            raise BadInput("process.capabilities", kind, f"must be one of {', '.join(capabilities.SETS)}")
        capabilities.parse(names)
    for arch in config["linux"].get("seccomp", {}).get("architectures") or []:
        if arch not in seccomp.ARCHES:
            raise BadInput("linux.seccomp.architectures", arch, f"must be one of {', '.join(seccomp.ARCHES)}")
    if "seccomp" in config["linux"]:
        seccomp.compile_profile(config["linux"]["seccomp"], search=True, strict=True)
    for field in ("uidMappings", "gidMappings"):
        if rows := config["linux"].get(field):
            userns.check([(row["containerID"], row["hostID"], row["size"]) for row in rows], f"linux.{field}")
    return config


class Matrix(NamedTuple):
    """What was measured: attack → "open" or what stopped it, in each configuration.

    Attributes:
        bare: without any layer.
        full: with every layer.
        alone: layer → the bare container with exactly that layer.
        without: layer → the full container with all but that layer.
    """

    bare: Results
    full: Results
    alone: dict[str, Results]
    without: dict[str, Results]

    def stoppers(self, attack: str) -> list[str]:
        """The layers that stop an attack when they stand alone."""
        return [layer for layer, found in self.alone.items() if found[attack] != OPEN]

    def keys(self, attack: str) -> list[str]:
        """The layers without which an attack gets through the full container."""
        return [layer for layer, found in self.without.items() if found[attack] == OPEN != self.full[attack]]


# --- the stage ---


class Stage:
    """What the attacks go for, and the referee; ``stage()`` makes one.

    Attributes:
        folder: on the host: root/ (the root file system), stage/ (what the container sees as /stage), secret.
        token: 32 letters and digits, the content of every secret.
        runtime: what makes a container of config.json, labs-runtime or any other OCI runtime.
    """

    def __init__(self, folder: str, home: Netns, disk: disks.Disk, tried: Sequence[str]) -> None:
        self.folder, self.home, self.disk, self.tried = folder, home, disk, tried
        self.name, self.bundle = os.path.basename(folder), f"{folder}/bundle"
        self.token, self.runtime = os.urandom(16).hex(), RUNTIME
        self.stage, self.volume, self.secret = f"{folder}/stage", f"{folder}/stage/volume", f"{folder}/secret"
        self.log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.uevents = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
        self.uevents.setblocking(False)
        self.uevents.bind((0, 1))
        self.referee = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wires = 0

    def measure(self, layers: Collection[str], tried: Sequence[str] | None = None,
                changes: Mapping[str, Any] | None = None) -> Results:
        """Start one container with these layers and try every attack in it: attack → "open", or what stopped it.

        Raises BadInput or ChildFailed where a layer cannot be put on: then nothing has run.
        """
        config = configuration(layers, changes, self.folder)
        tried = check_attacks(self.tried if tried is None else tried)
        outside = (config["linux"].get("uidMappings") or [{"hostID": 0}])[0]["hostID"]
        policy = config.get("annotations", {}).get(POLICY)
        with (self._ready((outside + OWNER) % (1 << 32)), self._created(config) as pid,
              self._victims(pid, policy) as plan):
            self._runtime("start", self.name)
            with self._accepted(lambda: process.status(pid).state != "Z") as line:
                return self._judge_all(line, plan | {"attacks": tried})

    def matrix(self) -> Matrix:
        """Every configuration once: bare, full, and for each layer the one with it alone and the one without it."""
        layers = list(LAYERS)
        return Matrix(self.measure([]), self.measure(layers), {layer: self.measure([layer]) for layer in layers},
                      {layer: self.measure([other for other in layers if other != layer]) for layer in layers})

    def engine(self, *options: str, engine: str = "docker", tried: Sequence[str] | None = None,
               tasks: int = 2100) -> Results:
        """The same in a container that `docker run` or `podman run` starts with these options."""
        tried = check_attacks(self.tried if tried is None else tried)
        binds = [f"--volume={source}" for source in ("/usr:/usr:ro", f"{HERE}:/labs:ro", f"{self.stage}:{STAGE}")]
        argv = [engine, "run", "--rm", "--network=none", f"--name={self.name}", *binds, *options, IMAGES[engine],
                *COMMAND]
        with self._ready(OWNER), self._client(argv) as client:
            try:
                with self._accepted(lambda: client.poll() is None) as line:
                    pid, _, _ = UCRED.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
                    with self._victims(pid, None) as plan:
                        return self._judge_all(line, plan | {"attacks": tried, "tasks": tasks})
            except Timeout:
                said = client.communicate()[1].decode().splitlines() or ["no answer"]
                raise ChildFailed(f"{engine} run", detail=said[0].removeprefix("docker: ")) from None

    @contextmanager
    def _client(self, argv: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
        """The client of an engine; at the end of the block its container is gone."""
        null = subprocess.DEVNULL
        with subprocess.Popen(argv, stdin=null, stdout=null, stderr=subprocess.PIPE) as client:
            try:
                yield client
                client.wait(60)
            finally:
                if client.poll() != 0:
                    subprocess.run([argv[0], "rm", "--force", self.name], capture_output=True, check=False)

    @contextmanager
    def _ready(self, owner: int) -> Iterator[None]:
        """What every container begins with, and what is left of it in the end: an empty volume."""
        os.chown(f"{self.stage}/whoami", owner, owner)
        os.chmod(f"{self.stage}/whoami", 0o4755)  # noqa: S103  chown(2) takes the bit away
        os.lseek(self.log, 0, os.SEEK_END)
        self._heard(b"nothing: what was sent until now is passed over")
        try:
            yield
        finally:
            for name in os.listdir(self.volume):
                os.unlink(f"{self.volume}/{name}")

    @contextmanager
    def _created(self, config: Config) -> Iterator[int]:
        """A container that is made and waits; its process 1, as the host numbers it."""
        os.mkdir(self.bundle)
        try:
            Path(f"{self.bundle}/config.json").write_text(json.dumps(config), encoding="utf-8")
            self._runtime("create", f"--bundle={self.bundle}", f"--pid-file={self.bundle}/pid", self.name)
            yield int(machine.read_file(f"{self.bundle}/pid"))
        finally:
            self._runtime("delete", "--force", self.name)
            machine.remove_tree(self.bundle)

    def _runtime(self, verb: str, *words: str) -> None:
        """One command of the runtime; what it says becomes the error."""
        with open(f"{self.bundle}/log", "w+", encoding="utf-8") as log:
            line = [self.runtime, f"--root={self.bundle}/state", verb, *words]
            done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
            log.seek(0)
            said = log.read().strip().splitlines()
        if done.returncode:
            name = os.path.basename(self.runtime)
            raise ChildFailed(f"{name} {verb}", detail=said[-1].removeprefix(f"{name}: ") if said else "failed")

    @contextmanager
    def _accepted(self, alive: Callable[[], bool]) -> Iterator[socket.socket]:
        """The connection of the container that was just started; Timeout where it ended without one."""
        process.until(lambda: process.readable(self.referee.fileno(), 0.05) or not alive(), 60, "the container")
        if not process.readable(self.referee.fileno(), 0):
            raise Timeout("the container's answer", 0)
        line, _ = self.referee.accept()
        with line:
            line.settimeout(60)
            yield line

    @contextmanager
    def _victims(self, pid: int, policy: str | None) -> Iterator[attacks.Plan]:
        """What each container has of its own: the neighbour in its PID namespace and the wire; and the plan of all."""
        with _neighbour(pid, self.token) as (number, address), self._wire(pid, policy):
            device = os.stat(self.disk.device).st_rdev
            yield {"secret": self.secret, "neighbour": number, "address": address, "volume": self.volume,
                   "hierarchy": self.name, "disk": [os.major(device), os.minor(device)],
                   "device": os.path.basename(self.disk.device), "key": self.name, "mac": MAC, "spoofed": SPOOFED,
                   "server": SERVER, "port": DATABASE, "service": SERVICE, "tasks": TASKS}

    @contextmanager
    def _wire(self, pid: int, policy: str | None) -> Iterator[None]:
        """A veth pair from the container to our network; with a policy nothing goes in but what it names: nft(8)."""
        self.wires += 1
        link, inside = f"w{self.wires}", Netns.of_pid(pid)
        self.home.run(["ip", "-batch", "-"], stdin=f"""
            link add {link} type veth peer name {WIRE} address {MAC} netns {pid}
            addr add {SERVER}/24 dev {link}
            link set {link} up
            neigh replace {SPOOFED} lladdr 02:00:00:00:00:09 dev {link} nud stale""")
        try:
            if policy is not None:
                self.home.run(["nft", "-f", "-"], stdin=_policy(link, policy))
            inside.run(["ip", "-batch", "-"], stdin=f"addr add {OURS}/24 dev {WIRE}\nlink set {WIRE} up\n")
            yield
        finally:
            self.home.run(["ip", "link", "delete", link], check=False)  # it may have gone with the container

    def _judge_all(self, line: socket.socket, plan: attacks.Plan) -> Results:
        """Hand out the plan and look, after each attack, whether its goal was reached."""
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with mounts.opened(root):
            socket.send_fds(line, [json.dumps(plan).encode()], [root])
        results = {}
        for name in plan["attacks"]:
            message = line.recv(1 << 16)
            if not message:
                raise ChildFailed("labs.attacks", detail=f"ended before it had tried {name}")
            _, evidence, why = json.loads(message)
            results[name] = why or (OPEN if self._reached(name, evidence, plan) else NO_EFFECT)
            line.send(b"next")
        return results

    def _reached(self, name: str, evidence: str, plan: attacks.Plan) -> bool:
        """Whether the goal was reached, as the host sees it."""
        told = {"kernel module": "ENOEXEC", "clock": "set", "release_agent": "0", "fork bomb": str(plan["tasks"]),
                "setuid program": str(OWNER)}
        if name in told:
            return evidence == told[name]
        if name == "core_pattern":
            return evidence == machine.read_file("/proc/sys/kernel/core_pattern")
        if name == "symlink in volume":  # what a careless program of the host reads
            return Path(f"{self.volume}/report").read_text(encoding="utf-8") == self.token
        looks: dict[str, Callable[[], bool]] = {
            "sysrq": lambda: self._said("sysrq: HELP"),
            "uevent": lambda: self._heard(f"change@/devices/virtual/block/{plan['device']}\0".encode()),
            "ARP spoof": lambda: MAC in self.home.run(["ip", "neigh", "show", SPOOFED])}
        return _soon(looks[name]) if name in looks else evidence == self.token

    def _said(self, words: str) -> bool:
        """Whether the kernel's log says so since the last time: one record a read(2), /dev/kmsg."""
        found = False
        with suppress(BlockingIOError):
            while not found:
                found = words in os.read(self.log, 8192).decode(errors="replace")
        return found

    def _heard(self, words: bytes) -> bool:
        """Whether the kernel sent such an event to udev since the last time."""
        found = False
        with suppress(BlockingIOError):
            while not found:
                found = self.uevents.recv(8192).startswith(words)
        return found

    def close(self) -> None:
        """Close what the referee listens to."""
        os.close(self.log)
        self.uevents.close()
        self.referee.close()


def _soon(look: Callable[[], bool]) -> bool:
    """Whether it is so within some seconds: what the attack did may take its time to arrive."""
    with suppress(Timeout):
        return process.until(look, 5)
    return False


def _policy(link: str, rule: str) -> str:
    """An nftables ruleset at the host's end of the wire: its own ARP, what the rule names, and nothing else."""
    return (f"table netdev {link} {{\n chain in {{\n  type filter hook ingress device {link} priority 0; policy drop;\n"
            f"  arp saddr ip {OURS} accept\n  ip saddr {OURS} {rule} accept\n }}\n}}\n")


def check_attacks(names: Sequence[str]) -> list[str]:
    """The names, or BadInput for one that is no attack."""
    for name in names:
        if name not in ATTACKS and name != "app":
            raise BadInput("attack", name, f"must be one of {', '.join(ATTACKS)}")
    return list(names)


@contextmanager
def stage(tried: Sequence[str] = tuple(ATTACKS)) -> Iterator[Stage]:
    """Lay out the victims of these attacks; at the end of the block nothing of them is left."""
    machine.require()
    check_attacks(tried)
    name = machine.new_name("stage")
    folder = f"{machine.DATA}/{name}"
    with ExitStack() as undo:
        os.makedirs(f"{folder}/stage/volume")
        undo.callback(machine.remove_tree, folder)
        home = undo.enter_context(netns.namespace(name.removeprefix(machine.PREFIX)))
        disk = undo.enter_context(disks.disk(4 << 20))
        made = Stage(folder, home, disk, tried)
        undo.callback(made.close)
        _root(f"{folder}/root")
        _props(made)
        undo.enter_context(_servers(made))
        undo.enter_context(_key(name, made.token))
        if "release_agent" in tried:
            undo.enter_context(_hierarchy(folder, name))
        yield made


def _root(path: str) -> None:
    """A root file system of directories and links: its programs are the host's, which is mounted on /usr."""
    for name in ("usr", "labs", "dev", "proc", "sys", "mnt", "tmp", STAGE):
        os.makedirs(f"{path}/{name}")
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink(f"usr/{name}", f"{path}/{name}")


def _props(made: Stage) -> None:
    """The files of the stage: secrets of the host, a chroot to break out of, a device node, another user's program."""
    os.makedirs(f"{made.stage}/jail/deeper")
    os.chmod(made.volume, 0o777)  # noqa: S103  whoever the app is
    for path, text, mode in ((made.secret, made.token, 0o600), (f"{made.stage}/outside", made.token, 0o644),
                             (f"{made.disk.path}/secret", attacks.MARK.decode() + made.token, 0o644)):
        Path(path).write_text(text, encoding="utf-8")
        os.chmod(path, mode)
    with mounts.opened(os.open(made.disk.path, os.O_RDONLY | os.O_CLOEXEC)) as disk:
        syscalls.syncfs(disk)
    with mounts.opened(os.open(made.disk.device, os.O_RDONLY | os.O_CLOEXEC)) as device:
        fcntl.ioctl(device, BLKFLSBUF)  # what udev read of the empty disk stays in no cache
    node = os.stat(made.disk.device)
    os.mknod(f"{made.stage}/disk", node.st_mode, node.st_rdev)
    shutil.copy("/usr/bin/id", f"{made.stage}/whoami")


@contextmanager
def _servers(made: Stage) -> Iterator[None]:
    """The daemon behind docker.sock, the database and the service on the wire, and the referee's socket."""
    daemon = socket.socket(socket.AF_UNIX)
    daemon.bind(f"{made.stage}/docker.sock")
    os.chmod(f"{made.stage}/docker.sock", 0o660)
    made.referee.bind(f"{made.stage}/referee.sock")
    os.chmod(f"{made.stage}/referee.sock", 0o666)  # noqa: S103  whoever the app is
    made.referee.listen(1)
    with ExitStack() as undo:
        for one in (daemon, *(_port(made.home, number) for number in (DATABASE, SERVICE))):
            undo.enter_context(one)
            one.listen(8)
            undo.enter_context(process.fork(partial(_answer, one, made.token)))
        yield


def _port(home: Netns, number: int) -> socket.socket:
    return home.open_socket(socket.AF_INET, socket.SOCK_STREAM, 0, lambda new: new.bind(("", number)))


def _answer(server: socket.socket, text: str) -> None:
    """Tell everybody who connects; ends with the lab."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        line, _ = server.accept()
        with suppress(OSError), line:  # whoever asked may have gone
            line.send(text.encode())


@contextmanager
def _key(name: str, text: str) -> Iterator[None]:
    """A key in the user keyring of root: add_key(2), user-keyring(7)."""
    key = system_call("add_key", b"user", name.encode(), text.encode(), len(text), attacks.USER_KEYRING)
    try:
        yield
    finally:
        system_call("keyctl", attacks.KEYCTL_INVALIDATE, key)


@contextmanager
def _hierarchy(folder: str, name: str) -> Iterator[None]:
    """A hierarchy of cgroup v1 without controllers, as old machines have many: cgroups(7), "named hierarchies"."""
    os.mkdir(f"{folder}/v1")
    syscalls.mount("cgroup", f"{folder}/v1", "cgroup", 0, f"none,name={name}")
    with mounts.mounted(f"{folder}/v1"):
        yield


@contextmanager
def _neighbour(pid: int, text: str) -> Iterator[tuple[int, int]]:
    """A process of the host in the container's PID namespace: its number there, and where in its memory the text is.

    It has joined as `docker exec` and `--pid=container:` do, and has still the host's root directory.
    """
    memory = ctypes.create_string_buffer(text.encode())

    def join() -> None:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        with mounts.opened(os.pidfd_open(pid)) as target:
            syscalls.setns(target, syscalls.CLONE_NEWPID)
        with process.fork(stay) as inside:
            inside.wait()

    def stay() -> None:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pause()

    with process.fork(join) as outside:
        inner = process.until(lambda: process.children(outside.pid), 30, "the neighbour")[0]
        with mounts.opened(os.pidfd_open(inner)) as target:
            try:
                yield process.status(inner).nspid[-1], ctypes.addressof(memory)
            finally:
                with suppress(ProcessLookupError):  # it has ended with the container
                    process.kill(target, signal.SIGKILL)
                outside.wait(30)  # it reaps the one inside: without that no PID namespace ends
