"""A project for the eye: who depends on whom, in which networks, with which volumes; and what happened when."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from labs import compose, compose_run, show
from labs.compose_file import Project
from labs.compose_supervisor import Event
from labs.compose_unit import State
from labs.errors import LabError

RUNNING, HEALTHY, WAITING, OVER = "running", "healthy", "waiting to restart", "exited"
# What an event makes of a container, until the next one.
TURNS = {"started": RUNNING, "healthy": HEALTHY, "unhealthy": RUNNING, "restarting": WAITING, "exited": OVER}


def draw(project: Project, states: Sequence[State] | None = None) -> show.Picture:
    """Services with their containers, status, health and published ports; arrows to what they need and use.

    states: as `compose_run.ps` tells them; a box is then outlined in colour where all of a service's containers run
    and are healthy, and dashed where none runs.  None: only what the file says.
    """
    boxes: dict[str, Sequence[str] | show.Box] = {}
    arrows: list[tuple[str, str]] = []
    for name in reversed([name for level in compose.order(project) for name in level]):
        boxes[name] = _service(project, name, states)
        arrows += [(name, other) for other in compose.needs(project, name)]
    for kind in ("networks", "volumes"):
        for key in getattr(project, kind):
            boxes[f"{kind}.{key}"] = (f"{kind.removesuffix('s')} {key}",)
    for name, service in project.services.items():
        arrows += [(name, f"networks.{key}") for key in service.get("networks") or {}]
        arrows += [(name, f"volumes.{one['source']}") for one in service.get("volumes") or ()
                   if one["type"] == "volume" and one.get("source")]
    return show.graph(f"project {project.name}", boxes, arrows)


def _service(project: Project, name: str, states: Sequence[State] | None) -> show.Box:
    own = [one for one in states or () if one.service == name]
    lines = [name, *(f"{one.number}: {_words(one)}" for one in own)]
    lines += [f"port {port['published']} → {port['target']}" for port in project.services[name].get("ports") or ()
              if port.get("published")]
    ready = [one.status == RUNNING and one.health in ("", HEALTHY) for one in own]
    idle = states is not None and not any(one.status == RUNNING for one in own)
    return show.Box(tuple(lines), faded=idle, fresh=bool(ready) and all(ready))


@contextmanager
def live(project: Project, every: float = 0.3) -> Iterator[None]:
    """Draw a project while the block runs, anew when a container has changed; how it ended stays as the output.

    every: seconds between two looks at the containers.
    """
    # Not at the top of the module: a kernel has it already, anyone else would wait for it.
    from IPython.display import DisplayHandle, display

    frame, over = DisplayHandle(), threading.Event()
    blank = {"text/plain": "", "text/html": ""}
    frame.display(blank, raw=True)

    def watch() -> None:
        shown = None
        while not over.is_set():
            with suppress(LabError):
                states = compose_run.ps(project.name)
                if shown != (shown := summary(states)):
                    frame.update(draw(project, states))
            over.wait(every)

    # A cell's output goes where the context says, and a new thread has none.
    watcher = threading.Thread(target=contextvars.copy_context().run, args=(watch,))
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        frame.update(blank, raw=True)
        display(draw(project, compose_run.ps(project.name)))


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
    return {one.name: _words(one) for one in states}


def _words(state: State) -> str:
    more = state.exit_code if state.status == OVER else state.health
    return state.status if more == "" else f"{state.status} ({more})"
