"""The same compose file under labs, `docker compose` and `podman-compose`, and what came of it, in one form.

Docker is asked through its API (labs.engine), Podman by `podman ps` and `podman inspect`, whose answers have Docker's
form. Every tool gets a project name of its own, so that they may run side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from labs import compose, compose_file, compose_run, process
from labs.compose_supervisor import UpFailed
from labs.errors import LabError

TOOLS = ("labs", "docker", "podman")
DEADLINE = 120.0  # seconds that containers have to become what they should be
KEPT = ("running", "exited")


class Service(NamedTuple):
    """What one service came to.

    Attributes:
        containers: how many there are.
        status: "running" or "exited".
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
        succeeded: whether `up` said so.
        order: "db, app" for every service that started after one that it depends on.
        services: by name.
    """

    succeeded: bool
    order: tuple[str, ...]
    services: Mapping[str, Service]


LABEL = compose.LABEL
COMMON = ("PATH=", "HOME=", "HOSTNAME=", "TERM=", "container=")


@contextmanager
def running(tool: str, file: str, name: str) -> Iterator[Outcome]:
    """A file up under one of TOOLS, as project name; down at the end, volumes too."""
    path = os.path.abspath(file)  # podman-compose goes to its directory first
    try:
        yield {"labs": _labs, "docker": _docker, "podman": _podman}[tool](path, name)
    finally:
        _down(tool, path, name)


def outcomes(file: str, tools: Sequence[str] = TOOLS) -> dict[str, Outcome]:
    """One after the other, each alone."""
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


def _labs(file: str, name: str) -> Outcome:
    project = compose_file.load(file, project=name)
    try:
        compose_run.up(project)
        succeeded = True
    except UpFailed:
        succeeded = False
    def settled() -> bool:
        return all(one.status in KEPT and one.health != "starting" for one in compose_run.ps(name))
    process.until(settled, DEADLINE)
    states = compose_run.ps(name)
    started = {one.service: one.started for one in reversed(states) if one.started}
    services = {}
    for one in (one for one in states if one.number == 1):
        count = sum(other.service == one.service for other in states)
        env = _environment(f"/run/labs/compose/{name}/units/{one.name}/config.json")
        services[one.service] = Service(count, one.status, one.exit_code, one.health, tuple(sorted(one.networks)), env)
    return Outcome(succeeded, _order(file, started), services)


def _environment(config: str) -> tuple[str, ...]:
    with open(config, encoding="utf-8") as file:
        return _own(json.load(file)["process"]["env"])


def _own(env: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(one for one in env if not one.startswith(COMMON)))


def _order(file: str, started: Mapping[str, object]) -> tuple[str, ...]:
    """The dependencies that were kept, by when the first container of each service started."""
    project = compose_file.load(file)
    pairs = [(need, name) for name in project.services for need in compose.needs(project, name)]
    return tuple(f"{need}, {name}" for need, name in sorted(pairs)
                 if {need, name} <= set(started) and str(started[need]) < str(started[name]))


def _docker(file: str, name: str) -> Outcome:
    done = _run("docker", "compose", "-f", file, "-p", name, "up", "-d")
    return _outcome(done.returncode == 0, file, name, "docker")


def _podman(file: str, name: str) -> Outcome:
    done = _run("podman-compose", "-f", file, "-p", name, "up", "-d")
    return _outcome(done.returncode == 0, file, name, "podman")


def _outcome(succeeded: bool, file: str, name: str, engine: str) -> Outcome:
    """The containers of a project, once none is about to change."""
    def rows() -> list[dict[str, Any]]:
        ids = _run(engine, "ps", "-aq", "--filter", f"label={LABEL}project={name}").stdout.split()
        return json.loads(_run(engine, "inspect", *ids).stdout) if ids else []

    def settled() -> bool:
        return all(_status(one) in (*KEPT, "created") and _health(one) != "starting" for one in rows())
    process.until(settled, DEADLINE)
    found = sorted(rows(), key=lambda row: row["State"]["StartedAt"], reverse=True)
    started = {row["Config"]["Labels"][f"{LABEL}service"]: row["State"]["StartedAt"] for row in found
               if not row["State"]["StartedAt"].startswith("0001")}
    return Outcome(succeeded, _order(file, started), dict(_services(found, name)))


def _status(row: Mapping[str, Any]) -> str:
    return str(row["State"]["Status"])


def _health(row: Mapping[str, Any]) -> str:
    """Docker leaves Health out where there is no check, Podman gives it empty."""
    return str((row["State"].get("Health") or row["State"].get("Healthcheck") or {}).get("Status") or "")


def _services(rows: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[str, Service]]:
    for row in rows:
        labels = row["Config"]["Labels"]
        service = labels[f"{LABEL}service"]
        if labels[f"{LABEL}container-number"] != "1":
            continue
        count = sum(one["Config"]["Labels"][f"{LABEL}service"] == service for one in rows)
        networks = sorted(one.removeprefix(f"{name}_") for one in row["NetworkSettings"]["Networks"]
                          if one not in ("none", "host"))
        yield service, Service(count, _status(row), row["State"]["ExitCode"], _health(row), tuple(networks),
                               _own(row["Config"]["Env"] or ()))


def _down(tool: str, file: str, name: str) -> None:
    if tool == "labs":
        compose_run.down(name, volumes=True)
        return
    line = {"docker": ["docker", "compose"], "podman": ["podman-compose"]}[tool]
    done = _run(*line, "-f", file, "-p", name, "down", "-v", "-t", "1")
    if done.returncode:
        raise LabError(f"{tool}: down failed: {done.stderr.strip().splitlines()[-1]}")


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"COMPOSE_ANSI": "never", "PODMAN_COMPOSE_WARNING_LOGS": "false"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=env)
