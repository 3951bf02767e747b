"""A controller in miniature: containers of Docker that should be there, and those that are.

They bear the label LABEL and a name below PREFIX; Docker is asked through its API. reconcile() looks at the state
(level-triggered); news() is what Docker told while somebody listened (edge-triggered): "Controllers" in the Kubernetes
documentation, "List containers" and "Monitor events" in the Docker Engine API.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import NamedTuple
from urllib.parse import urlencode

from labs import engine, machine
from labs.errors import BadInput

LABEL = "labs.controller"
PREFIX = machine.PREFIX + "copy-"
FILTER = urlencode({"filters": json.dumps({"label": [LABEL]})})
SETTINGS = {"Image": "busybox:lab", "Cmd": ["sleep", "1000"], "Labels": {LABEL: ""}}


class Done(NamedTuple):
    """What one turn of the loop did: names."""

    started: list[str]
    removed: list[str]


def observed() -> set[str]:
    """The names of the copies that are running."""
    rows = engine.ask("GET", f"/containers/json?{FILTER}").json
    return {row["Names"][0].removeprefix(f"/{PREFIX}") for row in rows}


def start(name: str) -> None:
    """Create a copy and start it."""
    _ask("POST", f"/containers/create?name={PREFIX}{name}", SETTINGS)
    _ask("POST", f"/containers/{PREFIX}{name}/start")


def remove(name: str) -> None:
    """Kill a copy and remove it: `docker rm -f`."""
    _ask("DELETE", f"/containers/{PREFIX}{name}?force=true")


def reconcile(desired: Collection[str]) -> Done:
    """One turn: look, start what is missing, remove what is too much.  The same call twice does nothing."""
    have = observed()
    done = Done(sorted(set(desired) - have), sorted(have - set(desired)))
    for name in done.started:
        start(name)
    for name in done.removed:
        remove(name)
    return done


def news(since: float, until: float) -> list[str]:
    """The names of the copies that were removed in that time (seconds since the epoch), as Docker's events tell."""
    lines = _ask("GET", f"/events?since={since:.6f}&until={until:.6f}&{FILTER}").decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["Actor"]["Attributes"]["name"].removeprefix(PREFIX) for row in rows if row["Action"] == "destroy"]


def _ask(method: str, path: str, body: object = None) -> bytes:
    reply = engine.ask(method, path, body)
    if reply.status >= 400:
        raise BadInput("docker", path.partition("?")[0], reply.json["message"])
    return reply.body
