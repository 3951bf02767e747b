"""The pictures of a project say in words what they show."""

import xml.etree.ElementTree as ET

import pytest

from labs import compose_file, compose_show
from labs.compose_supervisor import Event
from labs.compose_unit import State

TEXT = """name: shop
services:
  web: {image: x, depends_on: [app], ports: ["8080:80"], networks: [front]}
  app: {image: x, networks: [front, back], volumes: ["data:/data", "/tmp:/tmp"]}
networks: {front: , back: }
volumes: {data: }
"""
STATES = [State("shop-app-1", "app", 1, "", "running", 5, health="healthy"),
          State("shop-app-2", "app", 2, "", "restarting"), State("shop-web-1", "web", 1, "", "exited", exit_code=3)]
EVENTS = [Event(100.0, "a", "created", ""), Event(101.0, "a", "started", ""), Event(103.0, "a", "healthy", ""),
          Event(103.0, "b", "started", ""), Event(104.0, "b", "died", "exit 1"), Event(104.0, "b", "restarting", ""),
          Event(104.5, "b", "started", ""), Event(106.0, "a", "died", "exit 0"), Event(106.0, "a", "exited", "")]


@pytest.fixture
def project(tmp_path):
    (tmp_path / "compose.yaml").write_text(TEXT)
    return compose_file.load(str(tmp_path / "compose.yaml"), env={})


def test_the_graph(project):
    picture = compose_show.draw(project, STATES)
    said = picture.alt.splitlines()
    assert said[0] == "project shop"
    web, app = "web, 1 exited, port 8080 → 80", "app, 1 running healthy, 2 restarting"
    assert set(said[1:]) == {f"{web} → {app}", f"{web} → network front", f"{app} → network front",
                             f"{app} → network back", f"{app} → volume data"}
    words = {"".join(one.itertext()).strip() for one in ET.fromstring(picture.html).iter() if one.tag.endswith("}text")}
    assert {"web", "app", "network front", "volume data", "port 8080 → 80"} <= words


def test_before_anything_runs(project):
    assert "web, port 8080 → 80 → app" in compose_show.draw(project).alt


def test_what_was_when():
    assert compose_show.spans(EVENTS) == {"a": [(1.0, 3.0, "running"), (3.0, 6.0, "healthy")],
                     "b": [(3.0, 4.0, "running"), (4.0, 4.5, "waiting to restart"), (4.5, 6.0, "running")]}
    assert compose_show.timeline(EVENTS).alt.splitlines()[1] == "b: started, died, restarting, started"


def test_the_time_axis_is_a_picture():
    picture = compose_show.timeline(EVENTS, until=110.0)
    assert picture.png.startswith(b"\x89PNG")
    assert picture.size == (640, 230)


def test_states_in_words():
    assert compose_show.summary(STATES) == {"shop-app-1": "running (healthy)", "shop-app-2": "restarting",
                                            "shop-web-1": "exited (3)"}
