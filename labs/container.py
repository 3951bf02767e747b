"""A container from the kernel's parts: namespaces, a cgroup and a root filesystem around one process.

Three processes take part, as with Docker (daemon, shim, container)::

    parent (the notebook)  fork(2) →  monitor  clone3(2) →  the container's process 1
       keeps its namespaces            makes the cgroup       mounts, pivot_root(2),
       reads output and report         and the layer, waits,  execve(2)
                                       removes them again

The monitor holds everything that must be undone.  It ends when the parent closes its socket, and so
too when the parent is killed; then it kills the cgroup and cleans up.  Process 1 dies with the
monitor (PR_SET_PDEATHSIG).  Nothing is imported after the fork.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from labs import cgroup, machine, mounts, namespaces, process, syscalls
from labs import devices as device_rules
from labs.errors import BadInput, KernelError, Timeout
from labs.monitor import Channels, Monitor, Report, close_all_but, tell, watch

SUBORDINATE: namespaces.Map = (0, 100_000, 65_536)
TTY_GROUP = 5


class Usage(NamedTuple):
    """What a container used: CPU time in seconds, most memory in bytes (None without a memory controller)."""

    cpu_seconds: float
    peak_bytes: int | None


class Result(NamedTuple):
    """How a command ended and what it wrote; exactly one of code and signal is None."""

    code: int | None
    signal: int | None
    stdout: str
    stderr: str
    usage: Usage
    oom: bool


class Bind(NamedTuple):
    """A host directory or file shown in the container."""

    source: str
    target: str
    readonly: bool = False


class Ids(NamedTuple):
    """Who a command runs as: credentials(7)."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Spec(NamedTuple):
    """What to start, checked: the parent builds it, the monitor and process 1 read it."""

    argv: list[str]
    layers: tuple[str, ...]
    hostname: str
    limits: dict[str, str]
    env: dict[str, str]
    cwd: str
    user: namespaces.Map | None
    time_offset: int | None
    network: bool | str
    readonly: bool
    init: bool
    binds: list[Bind]
    devices: tuple[str, ...] | None
    run_as: Ids | None
    stay: bool = True  # cgroup and layer outlive process 1, until the caller lets go


def run(argv: Sequence[str], *, rootfs: str | Sequence[str] = "busybox", hostname: str | None = None,
        memory: int | str | None = None, swap: int | str | None = None, cpus: float | None = None,
        pids: int | None = None, env: Mapping[str, str] | None = None, cwd: str = "/", stdin: bytes = b"",
        timeout: float = 60, user: bool | namespaces.Map = False, time_offset: int | None = None,
        network: bool | str = False, readonly: bool = False, init: bool = False,
        mounts: Sequence[Bind | tuple[str, str]] = (),
        devices: Sequence[str] | None = device_rules.DEFAULT, run_as: Ids | None = None) -> Result:
    """Run a command in a container of its own and remove it: the arguments are those of Container.

    Raises Timeout after timeout seconds, CommandNotFound, NotExecutable, BadInput, KernelError or
    ChildFailed; in every case nothing is left.
    """
    container = Container(argv, rootfs=rootfs, hostname=hostname, memory=memory, swap=swap, cpus=cpus, pids=pids,
                          env=env, cwd=cwd, stdin=stdin, user=user, time_offset=time_offset, network=network,
                          readonly=readonly, init=init, mounts=mounts, devices=devices, run_as=run_as)
    container.spec = container.spec._replace(stay=False)
    with container:
        return container.wait(timeout)


class Container:
    """A container that lives as long as the with block; its cgroup and layer stay until the end of it.

    rootfs: "busybox", "debian" or a directory, the read-only lower layer, or several, the lowest first (as
    image.unpack_layers gives them).  run_as: the ids of the command; root without.  memory, swap: bytes or "64M";
    cpus: processors; pids: tasks.  user: True for a user namespace whose ids are SUBORDINATE, or a map
    row.  time_offset: seconds added to the monotonic and boot clocks.  network: False for a network
    namespace with only loopback, True for the host's, a path (network.Netns.path, /proc/PID/ns/net) for one that is
    there.  init: a small init as process 1.  mounts: Bind or (source, target).  devices: rules of the device
    controller, None for no filter.
    Output goes to pipes of 1 MiB, which wait() and logs() empty: a command that writes more while nobody
    calls them blocks in write(2) until somebody does.
    """

    def __init__(self, argv: Sequence[str], *, rootfs: str | Sequence[str] = "busybox", hostname: str | None = None,
                 memory: int | str | None = None, swap: int | str | None = None, cpus: float | None = None,
                 pids: int | None = None, env: Mapping[str, str] | None = None, cwd: str = "/",
                 stdin: bytes = b"", user: bool | namespaces.Map = False, time_offset: int | None = None,
                 network: bool | str = False, readonly: bool = False, init: bool = False,
                 mounts: Sequence[Bind | tuple[str, str]] = (),
                 devices: Sequence[str] | None = device_rules.DEFAULT, run_as: Ids | None = None) -> None:
        if user and network:
            raise BadInput("network", network, "a user namespace cannot mount the sysfs of another network")
        self.id = machine.new_name("c")
        name = self.id if hostname is None else hostname
        self.spec = Spec(
            process.check_argv(argv), _check_layers(rootfs, user), _check_hostname(name),
            cgroup.limits(memory, swap, cpus, pids), _environment(name, env), _absolute("cwd", cwd),
            _check_user(user), time_offset, _check_network(network), readonly, init,
            [_check_bind(bind) for bind in mounts], None if devices is None else tuple(devices), run_as)
        self.upper = f"{machine.DATA}/{self.id}/upper"
        self.cgroup = cgroup.Cgroup(f"{machine.CGROUP}/{self.id}")
        self._stdin = stdin
        self._monitor: Monitor | None = None

    def __enter__(self) -> Container:
        machine.require()
        program = None if self.spec.devices is None else device_rules.load(self.spec.devices)
        top = cgroup.top()
        self._monitor = Monitor(lambda channels: _supervise_container(self.id, self.spec, top, program, channels),
                                self._stdin, () if program is None else (program,))
        self._monitor.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._monitor is not None:
            self._monitor.close()

    @property
    def _running(self) -> Monitor:
        if self._monitor is None:
            raise BadInput("container", self.id, "is started by a with statement")
        return self._monitor

    @property
    def pid(self) -> int:
        """Process 1 of the container, as the host numbers it."""
        return self._running.pid

    @property
    def pidfd(self) -> int:
        """A pidfd of that process, open until the end of the with block."""
        return self._running.pidfd

    def wait(self, timeout: float | None = 60) -> Result:
        """Wait for the end of process 1, at most timeout seconds; the result may be asked again."""
        return _result(self._running, timeout)

    def logs(self) -> tuple[str, str]:
        """What the container has written so far: stdout, stderr."""
        return self._running.logs()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send process 1 a signal."""
        process.kill(self.pidfd, number)

    def stop(self, signal: int = signal.SIGTERM, grace: float = 10.0) -> Result:
        """End it as `docker stop` does: the signal, up to grace seconds, then SIGKILL."""
        self.kill(signal)
        try:
            return self.wait(grace)
        except Timeout:
            self.kill()
            return self.wait()

    def pause(self) -> None:
        """Freeze every process of the container: cgroup.freeze."""
        self.cgroup.freeze()

    def resume(self) -> None:
        """Let the frozen processes go on."""
        self.cgroup.thaw()

    def exec(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "/",
             stdin: bytes = b"", timeout: float = 60) -> Result:
        """Run a further command in the running container: setns(2) and the same cgroup.

        Its usage has the CPU time of the command alone, and no peak.
        """
        spec = self.spec._replace(argv=process.check_argv(argv), cwd=_absolute("cwd", cwd),
                                  env=self.spec.env | dict(env or {}))
        if self.cgroup.events()["frozen"]:
            raise BadInput("exec", argv[0], "the container is paused")
        pidfd, group = self.pidfd, self.cgroup.path
        monitor = Monitor(lambda channels: _supervise_exec(pidfd, group, spec, channels), stdin, (pidfd,))
        monitor.start()
        try:
            return _result(monitor, timeout)
        finally:
            monitor.close()


def _result(monitor: Monitor, timeout: float | None) -> Result:
    report = monitor.wait(timeout)
    end = process.wait_status(report.status)
    return Result(end.code, end.signal, *monitor.logs(), Usage(report.cpu_seconds, report.peak_bytes), report.oom)


def _environment(hostname: str, env: Mapping[str, str] | None) -> dict[str, str]:
    """What Docker sets, and over it what was asked for."""
    for key, value in (env or {}).items():
        if not isinstance(value, str) or not key or "=" in key or "\0" in key + value:
            raise BadInput("env", f"{key}={value}", "must be a name without = and a text without NUL")
    return {"PATH": process.DEFAULT_PATH, "HOSTNAME": hostname, "HOME": "/root", **(env or {})}


def _check_hostname(name: str) -> str:
    if not 0 < len(os.fsencode(name)) <= 64:
        raise BadInput("hostname", name, "must have 1 to 64 bytes")
    return name


def _absolute(field: str, path: str) -> str:
    if not path.startswith("/"):
        raise BadInput(field, path, "must be an absolute path")
    return path


def _check_bind(given: Bind | tuple[str, str]) -> Bind:
    bind = Bind(*given)
    if not os.path.exists(bind.source):
        raise BadInput("mounts", bind.source, "no such file or directory")
    return bind._replace(target=_absolute("mounts", bind.target))


def _check_layers(rootfs: str | Sequence[str], user: object) -> tuple[str, ...]:
    layers = (rootfs,) if isinstance(rootfs, str) else tuple(rootfs)
    if not layers or (user and len(layers) > 1):
        raise BadInput("rootfs", rootfs, "must be a directory or several; with a user namespace, one")
    return tuple(machine.rootfs(one) for one in layers)


def _check_network(network: bool | str) -> bool | str:
    if isinstance(network, str) and not os.path.exists(network):
        raise BadInput("network", network, "must be True, False or the path of a network namespace")
    return network


def _check_user(user: bool | namespaces.Map) -> namespaces.Map | None:
    ids = SUBORDINATE if user is True else user or None
    if ids and (ids[0] != 0 or ids[2] <= TTY_GROUP):
        raise BadInput("user", ids, f"must map id 0 and at least {TTY_GROUP + 1} ids: terminals belong to group tty")
    return ids


# What follows runs in the monitor.


def _supervise_container(name: str, spec: Spec, top: cgroup.Cgroup, program: int | None, channels: Channels) -> None:
    """Make the layer and the cgroup, start process 1 in them, wait for it, and undo all in reverse."""
    with ExitStack() as undo:
        layer = undo.enter_context(_layer(name, spec.user))
        group = undo.enter_context(cgroup.create(name, top, files=spec.limits))
        group_fd = os.open(group.path, os.O_RDONLY | os.O_DIRECTORY)
        if program is not None:
            device_rules.attach(program, group_fd)
        if spec.time_offset is not None:
            _offset_clocks(spec.time_offset)
        ours, gate = socket.socketpair() if spec.user else (None, None)
        pid = syscalls.clone3(_new_namespaces(spec), group_fd)
        if pid == 0:
            process.child_main(lambda: _process_one(spec, layer, gate, channels.errors), channels.errors)
        if spec.user and ours:
            _grant_ids(pid, spec.user, spec.layers[0], ours)
        status, _ = watch(pid, channels, group.kill)
        tell(channels, _account(status, group))
        if spec.stay:
            channels.control.recv(1)


def _new_namespaces(spec: Spec) -> int:
    """All that clone3(2) makes; the cgroup one comes later, when the process is in its cgroup."""
    kinds = ["uts", "pid", "mnt", "ipc"]
    kinds += [] if spec.network else ["net"]
    kinds += ["user"] if spec.user else []
    return namespaces.flags(kinds)


def _account(status: int, group: cgroup.Cgroup) -> Report:
    """What the cgroup's files say at the end, as far as they are there."""
    cpu, peak, oom = 0.0, None, False
    with suppress(KernelError):  # no memory controller, or lab.clean() has just removed the group
        cpu = group.keyed("cpu.stat")["usage_usec"] / 1e6
        peak = int(group.read("memory.peak"))
        oom = group.keyed("memory.events")["oom_kill"] > 0
    return Report(status, cpu, peak, oom)


@contextmanager
def _layer(name: str, user: namespaces.Map | None) -> Iterator[str]:
    """The directory of a container on disk: upper and work for its overlay."""
    folder = f"{machine.DATA}/{name}"
    os.makedirs(folder, 0o711)
    try:
        for part in ("upper", "work"):
            os.mkdir(f"{folder}/{part}")
            if user:
                os.chown(f"{folder}/{part}", user[1], user[1])
        yield folder
    finally:
        machine.remove_tree(folder)


def _offset_clocks(seconds: int) -> None:
    """A time namespace for the children to come; offsets are fixed when the first one enters it: time_namespaces(7)."""
    syscalls.unshare(syscalls.CLONE_NEWTIME)
    machine.write_file("/proc/self/timens_offsets", f"monotonic {seconds} 0\nboottime {seconds} 0\n")


def _grant_ids(pid: int, ids: namespaces.Map, rootfs: str, gate: socket.socket) -> None:
    """Write the ID maps, and hand in the root filesystem as an ID-mapped mount: mount_setattr(2)."""
    namespaces.write_maps(pid, [ids], [ids], setgroups="allow")
    tree = syscalls.open_tree(rootfs)
    user_namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)
    syscalls.mount_setattr(tree, attr_set=syscalls.MOUNT_ATTR_IDMAP, userns_fd=user_namespace,
                           propagation=syscalls.MS_PRIVATE)
    socket.send_fds(gate, [b"!"], [tree])
    os.close(tree)
    os.close(user_namespace)


def _supervise_exec(pidfd: int, group: str, spec: Spec, channels: Channels) -> None:
    """Start one more process in the container's cgroup and namespaces, and wait for it."""
    group_fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
    syscalls.setns(pidfd, syscalls.CLONE_NEWPID)  # only for the child: setns(2)
    pid = syscalls.clone3(0, group_fd)
    if pid == 0:
        process.child_main(lambda: _process_joining(pidfd, spec, channels.errors), channels.errors)
    status, used = watch(pid, channels, lambda: os.kill(pid, signal.SIGKILL))
    tell(channels, Report(status, used.ru_utime + used.ru_stime, None, False))


# What follows runs in the container's processes, up to execve(2).


def _process_one(spec: Spec, layer: str, gate: socket.socket | None, errors: int) -> int:
    """Turn the child of clone3(2) into process 1 of the container."""
    lower = -1
    if gate:
        _, (lower, *_), _, _ = socket.recv_fds(gate, 1, 1)
        _become_root()
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    syscalls.unshare(syscalls.CLONE_NEWCGROUP)
    os.umask(0)
    if isinstance(spec.network, str):
        _join_network(spec.network)
    _enter_root(spec, layer, lower)
    syscalls.sethostname(spec.hostname)
    if not spec.network:
        namespaces.loopback_up()
    return _execute(spec, errors)


def _join_network(path: str) -> None:
    """setns(2), before /sys is mounted: a sysfs shows the network namespace of whoever mounted it, sysfs(5)."""
    with process.step("join network"):
        descriptor = os.open(path, os.O_RDONLY)
    syscalls.setns(descriptor, syscalls.CLONE_NEWNET)
    os.close(descriptor)


def _process_joining(pidfd: int, spec: Spec, errors: int) -> int:
    """Turn the child of clone3(2) into a further process of the container."""
    kinds = ["uts", "mnt", "ipc", "cgroup"]
    kinds += [] if spec.network is True else ["net"]
    kinds += ["user"] if spec.user else []
    kinds += [] if spec.time_offset is None else ["time"]
    syscalls.setns(pidfd, namespaces.flags(kinds))
    if spec.user:
        _become_root()
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    return _execute(spec._replace(init=False), errors)


def _become_root() -> None:
    """Take id 0 of the user namespace: until now the process has no mapped id.  Clears PR_SET_PDEATHSIG."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _execute(spec: Spec, errors: int) -> int:
    """The last steps before the command; as an init it stays, and returns the command's status."""
    with process.step("chdir"):
        os.chdir(spec.cwd)
    os.umask(0o022)
    close_all_but(errors)
    if spec.run_as:
        with process.step("run as"):
            os.setgroups(spec.run_as.groups)
            os.setresgid(*[spec.run_as.gid] * 3)
            os.setresuid(*[spec.run_as.uid] * 3)
    if spec.init:
        return process.reap(spec.argv, spec.env, started=lambda: os.close(errors))
    process.fresh_signals()
    return process.execute(spec.argv, spec.env)


def _enter_root(spec: Spec, layer: str, lower: int) -> None:
    """Mount the overlay, make it the root, mount what belongs on it, and let the old root go.

    The overlay is mounted over its own lower directory: only this mount namespace sees that.  It is
    volatile, since the layer is thrown away: its end need not wait until the disk has all (overlayfs.rst).
    """
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    trees = [_copy_tree(bind) for bind in spec.binds]
    root = spec.layers[0]
    if lower >= 0:
        syscalls.move_mount(lower, root)
    if len(spec.layers) > 1:
        tree = mounts.overlay_tree(spec.layers[::-1], f"{layer}/upper", f"{layer}/work")
        syscalls.move_mount(tree, root)
    else:
        extra = ",volatile,userxattr" if spec.user else ",volatile"
        options = mounts.overlay_options([root], f"{layer}/upper", f"{layer}/work", extra)
        syscalls.mount("overlay", root, "overlay", 0, options)
    _pivot(root)
    _mount_api()
    _make_devices(bind=spec.user is not None)
    syscalls.umount2(".", syscalls.MNT_DETACH)
    for tree, bind in zip(trees, spec.binds, strict=True):
        _attach(tree, bind.target)
    _hide()
    if spec.readonly:
        mounts.make_readonly("/")


def _pivot(root: str) -> None:
    """pivot_root(".", "."): the old root lies on the new one; it is the working directory until it is unmounted.

    Until then "/.." leads to the host, so nothing is created on the root filesystem before.
    """
    old = os.open("/", os.O_PATH | os.O_DIRECTORY)
    os.chdir(root)
    syscalls.pivot_root(".", ".")
    os.fchdir(old)
    os.close(old)


def _mount_api() -> None:
    """/proc, /dev, /sys and what is on them."""
    for target, fstype, flags, data in mounts.api_filesystems():
        with process.step(f"mkdir {target}"):
            _make_folder(target)
        syscalls.mount(fstype, target, fstype, flags, data)


def _make_folder(path: str) -> None:
    with suppress(FileExistsError):
        os.mkdir(path, 0o755)


def _make_devices(bind: bool) -> None:
    """The OCI default devices: mknod(2), or the host's by bind mounts where mknod is refused (user_namespaces(7))."""
    with process.step("make devices"):
        for path, major, minor in mounts.DEVICES:
            if bind:
                _make_file(path)
                syscalls.mount("." + path, path, None, syscalls.MS_BIND)
            else:
                os.mknod(path, 0o020666, os.makedev(major, minor))  # S_IFCHR and rw for all
        for path, target in mounts.DEV_LINKS.items():
            os.symlink(target, path)


def _make_file(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o644))


def _copy_tree(bind: Bind) -> int:
    """A detached copy of a host path's mounts, to attach when the host's tree is gone: open_tree(2)."""
    copy = syscalls.OPEN_TREE_CLONE | syscalls.OPEN_TREE_CLOEXEC | syscalls.AT_RECURSIVE
    tree = syscalls.open_tree(bind.source, copy)
    if bind.readonly:
        syscalls.mount_setattr(tree, attr_set=syscalls.MOUNT_ATTR_RDONLY, recursive=True)
    return tree


def _attach(tree: int, target: str) -> None:
    """Attach it where target leads to, which is inside: / is the container's.

    What is missing is made in the upper layer.  move_mount(2) alone follows no link at the end of a path.
    """
    with process.step("mount point"):
        folder = stat.S_ISDIR(os.stat(tree).st_mode)
        os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
        if not folder:
            _make_file(target)
        onto = os.open(target, os.O_PATH | os.O_CLOEXEC)
    syscalls.move_mount(tree, target_fd=onto)
    os.close(onto)


def _hide() -> None:
    """Masked paths: /dev/null over a file, an empty tmpfs over a directory.  Then read-only paths."""
    for path in filter(os.path.exists, mounts.MASKED):
        if os.path.isdir(path):
            syscalls.mount("tmpfs", path, "tmpfs", syscalls.MS_RDONLY, "size=0")
        else:
            syscalls.mount("/dev/null", path, None, syscalls.MS_BIND)
    for path in filter(os.path.exists, mounts.READONLY):
        syscalls.mount(path, path, None, syscalls.MS_BIND | syscalls.MS_REC)
        mounts.make_readonly(path, recursive=True)
