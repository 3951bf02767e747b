"""up, ps, logs, exec, stop, down and scale: what a project's supervisor is asked, and how it comes to be there.

The caller may be a notebook whose kernel ends: the supervisor goes on, and the next caller finds it by the project's
name. One that was killed takes its containers with it (PR_SET_PDEATHSIG); what it left on disk and in the network is
cleared away by the next call.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from labs import build, compose, compose_refuse, compose_supervisor, image, machine, process, registry, syscalls
from labs.cgroup import Cgroup
from labs.compose import Action
from labs.compose_file import Project, error
from labs.compose_supervisor import FOLDER, Event, UpFailed
from labs.compose_unit import State
from labs.errors import BadInput, KernelError, LabError, RegistryError, Timeout

LAYOUT = "/opt/labs/images"
LAYERS = f"{machine.DATA}/{machine.PREFIX}compose"  # unpacked layers, while any project is up
COLOURS = (36, 33, 32, 35, 34, 96, 93, 92)  # of console_codes(4)
DEADLINE = 60.0  # seconds that a supervisor has to come up


class Ended(LabError):
    """The supervisor ended while it was asked."""


class Result(NamedTuple):
    """What a command in a container came to."""

    exit_code: int
    stdout: str
    stderr: str


def up(project: Project, *, services: Collection[str] = (), scale: Mapping[str, int] | None = None, wait: bool = False,
       build: bool = False, tell: Callable[[str], object] = bool) -> list[Action]:
    """Make a project what its file says: start what is missing, recreate what changed, leave the rest alone.

    services: only those and what they depend on.  scale: service → number of containers, over the file's.
    wait: return when everything runs, and what has a healthcheck is healthy.  build: images that the file builds are
    built even if they are there.  tell: is given a line a step.

    Raises ComposeError for what labs does not do, CycleError, BadInput for an image that is nowhere: then nothing has
    been touched.  Raises UpFailed where something did not start or never became healthy; what was started stays.
    """
    machine.require()
    compose.refuse_unsupported(project)
    compose_refuse.refuse(project)
    names = [name for level in compose.order(project, services) for name in level]
    for name, count in (scale or {}).items():
        if name not in project.services or count < 0:
            raise BadInput("scale", {name: count}, "must be services of the file, and 0 or more")
    with _alone():
        images = {name: _image(project, name, build, tell) for name in names}
        _begin(project.name)
    request = {"do": "up", "project": {key: value for key, value in project._asdict().items() if key != "places"},
               "images": images, "scale": dict(scale or {}), "services": list(services), "wait": wait}
    try:
        return [Action(*row) for row in _ask(project.name, request, tell)]
    except UpFailed:
        if not ps(project.name):
            down(project.name)
        raise


def ps(name: str) -> list[State]:
    """The containers of a project, by service and number; none where there is no project of that name."""
    return [State(**row) for row in _ask(name, {"do": "ps"})] if _is_up(name) else []


def events(name: str) -> list[Event]:
    """Everything that happened since the project came up."""
    return [Event(*row) for row in _ask(name, {"do": "events"})]


def ports(name: str) -> dict[str, list[str]]:
    """The published ports of every container, as "0.0.0.0:8080->80/tcp", in the project's network namespace."""
    return dict(_ask(name, {"do": "ports"}))


def logs(name: str, services: Collection[str] = (), *, colour: bool = False, prefix: bool = True) -> str:
    """What containers wrote, in the order of time, each line after the name of its container."""
    rows: list[tuple[float, str, str]] = []
    for state in ps(name):
        if not services or state.service in services:
            rows += [(row["time"], state.name, row["text"]) for row in _log(name, state.name)]
    width = max((len(one) for _, one, _ in rows), default=0)
    colours = {one: COLOURS[number % len(COLOURS)] for number, one in enumerate(sorted({one for _, one, _ in rows}))}
    return "".join(_prefix(one, width, colours[one] if colour else 0) * prefix + text + "\n"
                   for _, one, text in sorted(rows, key=lambda row: row[0]))


def _log(name: str, container: str) -> Iterator[dict[str, Any]]:
    with suppress(FileNotFoundError), open(f"{FOLDER}/{name}/units/{container}/log", encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.endswith("\n"))  # the last may be being written


def _prefix(name: str, width: int, colour: int) -> str:
    text = f"{name:<{width}} | "
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def execute(name: str, container: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> Result:
    """Run a command in a container, given by its name or its service's (then the first one)."""
    return Result(*_ask(name, {"do": "exec", "container": container, "argv": process.check_argv(argv),
                               "env": dict(env or {})}))


def kill(name: str, container: str, number: int) -> None:
    """Send a signal to process 1 of a container; its restart policy then does what it says."""
    _ask(name, {"do": "kill", "container": container, "signal": int(number)})


def stop(name: str, services: Collection[str] = (), grace: float | None = None) -> None:
    """Stop containers, each after those that depend on it.  grace: seconds, over the file's stop_grace_period."""
    _ask(name, {"do": "stop", "services": list(services), "grace": grace})


def start(name: str, services: Collection[str] = ()) -> None:
    """Start again what was stopped, with the files that it had written."""
    _ask(name, {"do": "start", "services": list(services)})


def scale(project: Project, **counts: int) -> list[Action]:
    """`up` with other numbers of containers: `docker compose up --scale`."""
    return up(project, services=list(counts), scale=counts)


def down(name: str, *, volumes: bool = False) -> None:
    """Stop and remove the containers and networks of a project; volumes: its named volumes too.

    A project that is not there is no mistake.
    """
    with _held(name) as supervisor:
        if supervisor is not None:
            with suppress(Ended, BadInput):  # another `down` was faster
                _ask(name, {"do": "down", "volumes": volumes})
            if not process.readable(supervisor, DEADLINE):
                raise Timeout(f"the end of the supervisor of {name}", DEADLINE)
    _clear(name)
    if volumes:
        compose_supervisor.remove_volumes(name)
    with _alone():
        pass


@contextmanager
def _alone() -> Iterator[None]:
    """One call at a time, of all projects, makes images and supervisors; the images go with the last project."""
    os.makedirs(machine.DATA, exist_ok=True)
    lock = os.open(machine.DATA, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        if not glob.glob(f"{FOLDER}/*"):
            machine.remove_tree(LAYERS)
            with suppress(OSError):
                os.rmdir(FOLDER)
        os.close(lock)


# Images


def _image(project: Project, service: str, anew: bool, tell: Callable[[str], object]) -> dict[str, Any]:
    """The layers of a service's image as directories, and its config; built, from the layout, or from a registry."""
    given = project.services[service]
    policy, own = given.get("pull_policy") or "missing", _own_layout()
    name = str(given.get("image") or f"{project.name}-{service}")
    if "build" in given:
        if anew or policy == "build" or name not in own.names():
            _build(project, service, own, name, tell)
        return _unpacked(own, image.load(own, name))
    repository, _, tag = name.partition(":")
    theirs = image.Layout(LAYOUT)
    if tag in ("", "lab", "latest") and repository in theirs.names():
        return _unpacked(theirs, image.load(theirs, repository))
    try:
        if name not in own.names() or policy == "always":
            _pull(own, name, policy, tell)
        return _unpacked(own, image.load(own, name))
    except (RegistryError, BadInput, OSError) as problem:
        raise error(project, ("services", service, "image"), name, f"no such image: {problem}") from None


def _pull(layout: image.Layout, name: str, policy: str, tell: Callable[[str], object]) -> None:
    """Fetch HOST:PORT/REPOSITORY:TAG or …@DIGEST into a layout, under that name."""
    host, _, rest = name.partition("/")
    if not rest or not (":" in host or "." in host):
        raise BadInput("image", name, "is neither in the lab's layout nor on a registry HOST:PORT/NAME")
    if policy == "never":
        raise BadInput("image", name, "is not here, and pull_policy: never")
    repository, _, reference = rest.partition("@" if "@" in rest else ":")
    tell(f"{name} pull")
    with registry.Registry(host) as there:
        registry.pull(there, repository, reference or "latest", layout, name=name)


def _build(project: Project, service: str, layout: image.Layout, name: str, tell: Callable[[str], object]) -> None:
    given = project.services[service]["build"]
    args = {key: value for key, value in (given.get("args") or {}).items() if value is not None}
    tell(f"{name} build")
    build.build(given["context"], layout, name, dockerfile=given.get("dockerfile", "Dockerfile"),
                target=given.get("target"), args=args, bases=image.Layout(LAYOUT))


def _own_layout() -> image.Layout:
    path = f"{LAYERS}/images"
    os.makedirs(LAYERS, exist_ok=True)
    return image.Layout.create(path)


def _unpacked(layout: image.Layout, one: image.Image) -> dict[str, Any]:
    return {"layers": image.unpack_layers(layout, one, f"{LAYERS}/layers"), "run": one.run}


# The supervisor


def _is_up(name: str) -> bool:
    """Whether a supervisor answers."""
    with socket.socket(socket.AF_UNIX) as line, suppress(OSError):
        line.connect(f"{FOLDER}/{name}/socket")
        return True
    return False


@contextmanager
def _held(name: str) -> Iterator[int | None]:
    """A pidfd of the supervisor, readable when it has ended (unix(7), SO_PEERCRED; pidfd_open(2)); None without one."""
    descriptor = None
    with socket.socket(socket.AF_UNIX) as line, suppress(OSError):
        line.connect(f"{FOLDER}/{name}/socket")
        pid = int.from_bytes(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
        descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _begin(name: str) -> None:
    """Make sure that there is a supervisor; what a killed one left is cleared away first."""
    if _is_up(name):
        return
    _clear(name)
    folder = f"{FOLDER}/{name}"
    os.makedirs(f"{folder}/units")
    with open(f"{folder}/supervisor.log", "w", encoding="utf-8") as log:
        subprocess.run(["setsid", "--fork", sys.executable, "-m", compose_supervisor.__name__, name], cwd="/",
                       stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, close_fds=True,
                       env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})
    def answers() -> bool:
        return _is_up(name) or bool(Path(folder, "supervisor.log").read_text(encoding="utf-8"))
    process.until(answers, DEADLINE)
    if not _is_up(name):
        reason = Path(folder, "supervisor.log").read_text(encoding="utf-8").strip().splitlines()[-1]
        _clear(name)
        raise LabError(f"{name}: the supervisor did not start: {reason}")


def _ask(name: str, request: Mapping[str, Any], tell: Callable[[str], object] = bool) -> Any:
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(f"{FOLDER}/{name}/socket")
        except OSError:
            raise BadInput("project", name, "is not up") from None
        with suppress(ConnectionError):
            line.sendall(json.dumps(request).encode() + b"\n")
            for row in map(json.loads, line.makefile("rb")):
                if "say" in row:
                    tell(row["say"])
                elif "error" in row:
                    raise UpFailed(row["error"], row["left"])
                else:
                    return row["done"]
    raise Ended(f"{name}: the supervisor ended while it was asked")


def _clear(name: str) -> None:
    """Remove what a killed supervisor left: processes by their cgroups, mounts, namespaces, files."""
    folder = f"{FOLDER}/{name}"
    if not os.path.isdir(folder):
        return
    containers = os.listdir(f"{folder}/units") if os.path.isdir(f"{folder}/units") else []
    for container in containers:
        with suppress(OSError):
            Cgroup(f"{machine.CGROUP}/{machine.PREFIX}{container}").delete()
        with suppress(KernelError):
            syscalls.umount2(f"{folder}/units/{container}/rootfs", syscalls.MNT_DETACH)
        with suppress(OSError):
            machine.remove_tree(Path(folder, "units", container, "dns").read_text(encoding="utf-8"))
    for space in (name, *containers):
        path = f"/run/netns/{machine.PREFIX}{space}"
        with suppress(KernelError):
            syscalls.umount2(path, syscalls.MNT_DETACH)
        with suppress(FileNotFoundError):
            os.unlink(path)
    for pool in glob.glob(f"{machine.STATE}/ipam-{machine.PREFIX}{name}-*"):
        os.unlink(pool)
    machine.remove_tree(folder)
