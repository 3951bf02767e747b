"""A project for the eye: who depends on whom, in which networks, with which volumes; and what happened when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from labs import compose, show
from labs.compose_file import Project
from labs.compose_supervisor import Event
from labs.compose_unit import State

RUNNING, HEALTHY, WAITING, OVER = "running", "healthy", "waiting to restart", "exited"
# What an event makes of a container, until the next one.
TURNS = {"started": RUNNING, "healthy": HEALTHY, "unhealthy": RUNNING, "restarting": WAITING, "exited": OVER}


def draw(project: Project, states: Sequence[State] = ()) -> show.Picture:
    """Services with their containers, status, health and published ports; arrows to what they need and use."""
    boxes: dict[str, Sequence[str]] = {}
    arrows: list[tuple[str, str]] = []
    for name in reversed([name for level in compose.order(project) for name in level]):
        boxes[name] = _service(project, name, [one for one in states if one.service == name])
        arrows += [(name, other) for other in compose.needs(project, name)]
    for kind in ("networks", "volumes"):
        for key in getattr(project, kind):
            boxes[f"{kind}.{key}"] = (f"{kind.removesuffix('s')} {key}",)
    for name, service in project.services.items():
        arrows += [(name, f"networks.{key}") for key in service.get("networks") or {}]
        arrows += [(name, f"volumes.{one['source']}") for one in service.get("volumes") or ()
                   if one["type"] == "volume" and one.get("source")]
    return show.graph(f"project {project.name}", boxes, arrows)


def _service(project: Project, name: str, states: Sequence[State]) -> list[str]:
    lines = [name, *(" ".join(filter(None, (str(one.number), one.status, one.health))) for one in states)]
    lines += [f"port {port['published']} → {port['target']}" for port in project.services[name].get("ports") or ()
              if port.get("published")]
    return lines


def timeline(events: Sequence[Event], until: float | None = None) -> show.Picture:
    """What each container was over time, from the first event to the last, or until some seconds since the epoch."""
    names = dict.fromkeys(one.container for one in events)
    said = {name: ", ".join(one.what for one in events if one.container == name) for name in names}
    return show.timeline(spans(events, until), alt="\n".join(f"{name}: {text}" for name, text in said.items()))


def spans(events: Sequence[Event], until: float | None = None) -> dict[str, list[tuple[float, float, str]]]:
    """Container → from when to when it was what, in seconds since the first event."""
    begin, end = events[0].time, events[-1].time if until is None else until
    found: dict[str, list[tuple[float, float, str]]] = {one.container: [] for one in events}
    for name, rows in found.items():
        turns = [(one.time - begin, TURNS.get(one.what, OVER)) for one in events if one.container == name]
        for (start, kind), (stop, _) in zip(turns, [*turns[1:], (end - begin, OVER)], strict=True):
            if kind != OVER and stop > start:
                rows.append((start, stop, kind))
    return found


def summary(states: Sequence[State]) -> Mapping[str, str]:
    """Container → its status and health in words: "running (healthy)", "exited (0)"."""
    return {one.name: f"exited ({one.exit_code})" if one.status == OVER
            else f"{one.status} ({one.health})" if one.health else one.status for one in states}
