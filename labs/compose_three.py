"""The same compose files under labs, `docker compose` and `podman-compose`, and what came of them, in one form.

Docker and Podman are asked by `ps` and `inspect`, whose answers have the same form. Every project bears a name of its
tool, so that the tools may run side by side. Many small files are brought up one by one, and looked at and removed
together: what costs time is asking.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from labs import compose, compose_file, compose_run, process
from labs.compose_unit import State
from labs.errors import LabError, Timeout

TOOLS = ("labs", "docker", "podman")
DEADLINE = 120.0  # seconds that `up` may take, and then containers to become what they should be
STEADY = 1.0  # seconds without a change after which nothing more is expected
WORKERS = 2  # files that are brought up side by side: while one waits, the other starts
LABEL = compose.LABEL
COMMON = ("PATH=", "HOME=", "HOSTNAME=", "TERM=", "container=")


class Service(NamedTuple):
    """What one service came to.

    Attributes:
        containers: how many there are.
        status: "running", "exited", or "created" where it could not be started.
        exit_code: of the first container, 0 while it runs.
        health: "", "healthy" or "unhealthy".
        networks: by the names that the file has.
        environment: what process 1 was given, without what every tool and image sets.
    """

    containers: int
    status: str
    exit_code: int
    health: str
    networks: tuple[str, ...]
    environment: tuple[str, ...]


class Outcome(NamedTuple):
    """What a whole project came to.

    Attributes:
        succeeded: whether `up` said so; where it hung, it did not.
        order: "db, app" for every service that started after one that it depends on.
        services: by name; none where the file was refused.
    """

    succeeded: bool
    order: tuple[str, ...]
    services: Mapping[str, Service]


class Container(NamedTuple):
    """One container as any of the tools shows it; started orders those of one tool, "" if it never was."""

    project: str
    service: str
    number: int
    started: str
    as_service: Service


@contextmanager
def running(tool: str, file: str, name: str) -> Iterator[Outcome]:
    """A file up under one of TOOLS, as project name; down at the end, volumes too."""
    with running_all(tool, {name: file}) as found:
        yield found[name]


@contextmanager
def running_all(tool: str, files: Mapping[str, str]) -> Iterator[dict[str, Outcome]]:
    """Files up side by side, as the projects that they are given by; all down at the end, volumes too.

    The first one is up before the others begin, and until they have ended: what all share is made and removed once.
    Raises LabError where something could not be removed.
    """
    paths = {name: os.path.abspath(file) for name, file in files.items()}  # podman-compose goes to the directory first
    first, *rest = paths
    try:
        succeeded = {first: _up(tool, paths[first], first)}
        succeeded |= dict(zip(rest, _side_by_side(lambda name: _up(tool, paths[name], name), rest), strict=True))
        containers = _settled(tool, list(paths))
        yield {name: _outcome(succeeded[name], paths[name], [one for one in containers if one.project == name])
               for name in paths}
    finally:
        _down(tool, list(paths))


def outcomes(file: str, tools: Sequence[str] = TOOLS) -> dict[str, Outcome]:
    """One tool after the other, each alone."""
    found = {}
    for tool in tools:
        with running(tool, file, f"labs-{tool}") as outcome:
            found[tool] = outcome
    return found


def differences(found: Mapping[str, Outcome]) -> dict[str, dict[str, object]]:
    """Field, such as "order" or "web.health" → tool → value, where the tools do not agree."""
    flat = {tool: dict(_flat(outcome)) for tool, outcome in found.items()}
    fields = sorted({field for one in flat.values() for field in one})
    rows = {field: {tool: one.get(field) for tool, one in flat.items()} for field in fields}
    return {field: row for field, row in rows.items() if len(set(row.values())) > 1}


def _flat(outcome: Outcome) -> Iterator[tuple[str, object]]:
    yield "succeeded", outcome.succeeded
    yield "order", outcome.order
    for name, service in outcome.services.items():
        yield from ((f"{name}.{field}", value) for field, value in service._asdict().items())


def _side_by_side(work: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, names))


def _settled(tool: str, names: Sequence[str]) -> list[Container]:
    """Their containers, once none is about to change and none did for STEADY seconds; after DEADLINE as they are."""
    seen: list[Container] = []
    since = 0.0

    def steady() -> bool:
        nonlocal seen, since
        now = sorted(_look(tool, names))
        if now != seen:
            seen, since = now, time.monotonic()
        waiting = any(one.as_service.health == "starting" or one.as_service.status == "restarting" for one in now)
        return not waiting and (not now or time.monotonic() - since >= STEADY)
    with suppress(Timeout):
        process.until(steady, DEADLINE)
    return seen


def _outcome(succeeded: bool, file: str, containers: Sequence[Container]) -> Outcome:
    count = Counter(one.service for one in containers)
    services = {one.service: one.as_service._replace(containers=count[one.service])
                for one in containers if one.number == 1}
    return Outcome(succeeded, _order(file, containers), services)


def _order(file: str, containers: Sequence[Container]) -> tuple[str, ...]:
    """The dependencies that were kept, by when the first container of each service started."""
    started = {one.service: one.started for one in containers if one.number == 1 and one.started}
    if len(started) < 2:
        return ()
    project = compose_file.load(file)
    pairs = [(need, name) for name in project.services for need in compose.needs(project, name)]
    return tuple(f"{need}, {name}" for need, name in sorted(pairs)
                 if {need, name} <= set(started) and started[need] < started[name])


# What each tool does


def _up(tool: str, file: str, name: str) -> bool:
    """Whether it succeeded."""
    if tool == "labs":
        try:
            compose_run.up(compose_file.load(file, project=name))
        except LabError:
            return False
        return True
    with suppress(subprocess.TimeoutExpired):
        return _run(*_client(tool), "-f", file, "-p", name, "up", "-d").returncode == 0
    return False


def _down(tool: str, names: Sequence[str]) -> None:
    """Remove what bears the names of those projects: a `down` for each would take as long as its `up`."""
    if tool == "labs":
        _side_by_side(lambda name: compose_run.down(name, volumes=True), names[1:])
        compose_run.down(names[0], volumes=True)
        return
    together = ("--depend", "--ignore") if tool == "podman" else ()  # its containers name those they depend on
    _remove(tool, "rm", "-f", "-v", *together, having=[row["Id"] for row in _rows(tool, names)])
    if tool == "podman":
        _remove(tool, "pod", "rm", "-f", "--ignore", having=[f"pod_{name}" for name in names])
    for kind in ("network", "volume"):
        found = _run(tool, kind, "ls", "--format", "{{.Name}}").stdout.split()
        _remove(tool, kind, "rm", having=[one for one in found if one.startswith(tuple(f"{name}_" for name in names))])


def _remove(tool: str, *words: str, having: Sequence[str]) -> None:
    if having and (done := _run(tool, *words, *having)).returncode:
        raise LabError(f"{tool}: {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")


def _look(tool: str, names: Sequence[str]) -> list[Container]:
    """The containers of those projects."""
    if tool == "labs":
        return [_own(name, state) for name in names for state in compose_run.ps(name)]
    return [_inspected(row) for row in _rows(tool, names)]


def _rows(tool: str, names: Sequence[str]) -> list[Any]:
    """What `docker inspect` or `podman inspect` says of them."""
    ids = _run(tool, "ps", "-aq", "--filter", f"label={LABEL}project").stdout.split()
    rows = json.loads(_run(tool, "inspect", *ids).stdout) if ids else []
    return [row for row in rows if row["Config"]["Labels"][f"{LABEL}project"] in names]


def _own(project: str, state: State) -> Container:
    """As labs shows it; the environment is that of config.json, which labs-runtime was given."""
    with open(f"/run/labs/compose/{project}/units/{state.name}/config.json", encoding="utf-8") as file:
        env = json.load(file)["process"]["env"]
    started = f"{state.started:.6f}" if state.started else ""
    return Container(project, state.service, state.number, started, Service(
        1, state.status, state.exit_code, state.health, tuple(sorted(state.networks)), _given(env)))


def _inspected(row: Mapping[str, Any]) -> Container:
    """As `docker inspect` and `podman inspect` show it; the year 1 stands for never."""
    labels, state = row["Config"]["Labels"], row["State"]
    project, started = labels[f"{LABEL}project"], state["StartedAt"]
    networks = sorted(one.removeprefix(f"{project}_") for one in row["NetworkSettings"]["Networks"] or ()
                      if one not in ("none", "host"))
    return Container(project, labels[f"{LABEL}service"], int(labels[f"{LABEL}container-number"]),
                     "" if started.startswith("0001") else started, Service(
        1, state["Status"], state["ExitCode"], _health(state), tuple(networks), _given(row["Config"]["Env"] or ())))


def _health(state: Mapping[str, Any]) -> str:
    """Docker leaves Health out where there is no check, Podman gives it empty."""
    return str((state.get("Health") or state.get("Healthcheck") or {}).get("Status") or "")


def _given(env: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(one for one in env if not one.startswith(COMMON)))


def _client(tool: str) -> list[str]:
    return {"docker": ["docker", "compose"], "podman": ["podman-compose"]}[tool]


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COMPOSE_ANSI": "never", "PODMAN_COMPOSE_WARNING_LOGS": "false"}
    return subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False, env=env)
