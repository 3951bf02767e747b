"""What a project comes to, without touching anything: order, names, labels, hashes, and the plan of a reconcile.

The order follows depends_on (Compose Specification, 05-services.md). Names, labels and what goes into the hash of a
service are those of Docker Compose, whose `up` finds a project again by nothing but them. A plan is made from what is
wanted and what is there, never from what was done before: the same call repairs, changes and extends.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError as GraphCycle
from graphlib import TopologicalSorter
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

from labs.compose_file import Project, error
from labs.compose_yaml import ComposeError, Path, Position
from labs.errors import BadInput

LABEL = "com.docker.compose."
STARTED, HEALTHY, COMPLETED = "service_started", "service_healthy", "service_completed_successfully"
# What does not change a container.  Docker Compose leaves these out too, but for depends_on (in 2.26): there a new
# order of start makes a service anew.
NOT_HASHED = ("build", "pull_policy", "scale", "depends_on", "profiles", "deploy.replicas")
# What the runner carries out, by the key of a service; every other key is refused by name.
SERVICE_KEYS = {
    "annotations", "build", "cap_add", "cap_drop", "command", "configs", "container_name", "cpus", "depends_on",
    "deploy", "entrypoint", "environment", "expose", "extra_hosts", "healthcheck", "hostname", "image", "labels",
    "mem_limit", "network_mode", "networks", "pids_limit", "ports", "profiles", "pull_policy", "read_only", "restart",
    "scale", "secrets", "stop_grace_period", "stop_signal", "sysctls", "tmpfs", "user", "volumes", "working_dir"}
BELOW = {
    "deploy": {"replicas", "resources", "placement", "labels"}, "deploy.resources": {"limits"},
    "deploy.resources.limits": {"cpus", "memory", "pids"}, "deploy.placement": set(),
    "healthcheck": {"test", "interval", "timeout", "retries", "start_period", "disable"},
    "build": {"context", "dockerfile", "args", "target"}}
NETWORK_KEYS = {"name", "internal", "ipam", "labels"}
VOLUME_KEYS = {"name", "labels"}


class CycleError(ComposeError):
    """Services that wait for one another; ``cycle`` is the way round, its first name also its last."""

    cycle: list[str]


class Held(Protocol):
    """What the plan asks of a container that is there."""

    @property
    def service(self) -> str: ...  # noqa: D102
    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def hash(self) -> str: ...  # noqa: D102
    @property
    def status(self) -> str: ...  # noqa: D102


class Action(NamedTuple):
    """One step of a plan.

    Attributes:
        kind: "create", "recreate", "start", "remove" or "keep".
        service, number: which container.
        why: in a few words: "new", "configuration changed", "exited".
    """

    kind: str
    service: str
    number: int
    why: str


def needs(project: Project, service: str) -> dict[str, str]:
    """The services that one depends on, each with its condition."""
    given = project.services[service].get("depends_on") or {}
    return {name: one["condition"] for name, one in given.items()}


def order(project: Project, names: Collection[str] = ()) -> list[list[str]]:
    """Levels of services: those of one level may start together once the earlier levels are ready.

    With names only those and what they depend on.  Raises CycleError.
    """
    wanted = set(_with_needs(project, names or project.services))
    sorter = TopologicalSorter({name: set(needs(project, name)) for name in sorted(wanted)})
    try:
        sorter.prepare()
    except GraphCycle as problem:
        raise _cycle(project, list(problem.args[1])) from None
    levels = []
    while sorter.is_active():
        levels.append(sorted(sorter.get_ready()))
        sorter.done(*levels[-1])
    return levels


def _with_needs(project: Project, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in project.services:
            raise error(project, ("services",), name, "no such service")
        if name not in seen:
            seen.add(name)
            yield name
            waiting += needs(project, name)


def _cycle(project: Project, found: list[str]) -> CycleError:
    """A circle as graphlib gives it, written as "waits for": from the smallest name round to itself."""
    around = found[:0:-1]  # each one depends on the next
    first = around.index(min(around))
    names = [*around[first:], *around[:first + 1]]
    plain = error(project, ("services", names[0], "depends_on", names[1]), names[1],
                  f"a circle: {' → '.join(names)}")
    made = CycleError(Position(plain.file, plain.line, plain.column), plain.key, plain.value, plain.rule)
    made.cycle = names
    return made


def config_hash(service: Mapping[str, Any]) -> str:
    """SHA-256 of a service's canonical JSON, in hex, without what NOT_HASHED names."""
    kept = {key: value for key, value in service.items() if key not in NOT_HASHED}
    if "deploy" in kept:
        kept["deploy"] = {key: value for key, value in kept["deploy"].items() if f"deploy.{key}" not in NOT_HASHED}
    return sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def container_name(project: Project, service: str, number: int = 1) -> str:
    """shop-web-1, or the service's own container_name."""
    return str(project.services[service].get("container_name") or f"{project.name}-{service}-{number}")


def labels(project: Project, service: str, number: int = 1) -> dict[str, str]:
    """The labels by which a project is found again, over those that the file gives."""
    own = project.services[service]
    waits = ",".join(f"{name}:{one['condition']}:{str(bool(one.get('restart'))).lower()}"
                     for name, one in sorted((own.get("depends_on") or {}).items()))
    return (own.get("labels") or {}) | {
        LABEL + "project": project.name, LABEL + "service": service, LABEL + "container-number": str(number),
        LABEL + "config-hash": config_hash(own), LABEL + "oneoff": "False", LABEL + "depends_on": waits,
        LABEL + "project.working_dir": project.directory}


def replicas(project: Project, service: str, scale: Mapping[str, int] | None = None) -> int:
    """How many containers a service should have."""
    own = project.services[service]
    wanted = (scale or {}).get(service, own.get("scale", own.get("deploy", {}).get("replicas", 1)))
    if wanted > 1 and "container_name" in own:
        raise error(project, ("services", service, "container_name"), own["container_name"],
                    f"one name cannot be given to {wanted} containers")
    return int(wanted)


def plan(project: Project, have: Sequence[Held], scale: Mapping[str, int] | None = None,
         names: Collection[str] = ()) -> list[Action]:
    """What turns what is there into what is wanted: removals in reverse order, then the rest in the order of start.

    Containers of services that the file no longer has (orphans) are removed too.
    """
    levels = [name for level in order(project, names) for name in level]
    there = {(one.service, one.number): one for one in have}
    wanted = {(name, number): name for name in levels for number in range(1, replicas(project, name, scale) + 1)}
    too_many = [key for key in there if key not in wanted
                and (key[0] not in project.services or key[0] in levels)]
    rank = {name: position for position, name in enumerate(levels)}
    removals = [Action("remove", *key, "too many" if key[0] in project.services else "no longer in the file")
                for key in sorted(too_many, key=lambda key: (rank.get(key[0], len(rank)), key), reverse=True)]
    return removals + [_step(project, there.get(key), *key) for key in wanted]


def _step(project: Project, one: Held | None, service: str, number: int) -> Action:
    if one is None:
        return Action("create", service, number, "new")
    if one.hash != config_hash(project.services[service]):
        return Action("recreate", service, number, "configuration changed")
    if one.status in ("running", "restarting"):
        return Action("keep", service, number, "as it should be")
    return Action("start", service, number, one.status)


def signal_number(name: str) -> int:
    """A signal as stop_signal may give it: SIGTERM, TERM, 15, SIGRTMIN+3 (signal(7)).  Raises BadInput."""
    base, _, more = name.upper().removeprefix("SIG").partition("+")
    number = int(base) if base.isdigit() else getattr(signal, f"SIG{base}", 0)
    if (more and not more.isdigit()) or number + int(more or 0) not in signal.valid_signals():
        raise BadInput("stop_signal", name, "must be a signal's name or number")
    return number + int(more or 0)


def refuse_unsupported(project: Project) -> None:
    """Refuse by name, with line and column, what the runner would have to ignore."""
    for name, service in project.services.items():
        _refuse(project, ("services", name), service, SERVICE_KEYS)
        try:
            signal_number(str(service.get("stop_signal") or "SIGTERM"))
        except BadInput as problem:
            raise error(project, ("services", name, "stop_signal"), problem.value, problem.rule) from None
        for key, known in BELOW.items():
            value: Any = service
            for part in key.split("."):
                value = (value or {}).get(part)
            if value:
                _refuse(project, ("services", name, *key.split(".")), value, known)
    for kind, known in (("networks", NETWORK_KEYS), ("volumes", VOLUME_KEYS)):
        for name, given in getattr(project, kind).items():
            _refuse(project, (kind, name), given, known)


def _refuse(project: Project, path: Path, value: Mapping[str, Any], known: Collection[str]) -> None:
    for key, one in value.items():
        if key not in known and one not in (None, [], {}):
            raise error(project, (*path, key), one, "labs does not do this; docker compose does")
