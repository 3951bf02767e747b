"""The pictures of a project say in words what they show."""

import threading
import xml.etree.ElementTree as ET

import pytest

from labs import compose_file, compose_run, compose_show
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
    web, app = "web, 1: exited (3), port 8080 → 80", "app, 1: running (healthy), 2: restarting"
    assert set(said[1:]) == {f"{web} → {app}", f"{web} → network front", f"{app} → network front",
                             f"{app} → network back", f"{app} → volume data"}
    words = {"".join(one.itertext()).strip() for one in ET.fromstring(picture.html).iter() if one.tag.endswith("}text")}
    assert {"web", "app", "network front", "volume data", "port 8080 → 80"} <= words


def test_before_anything_runs(project):
    assert "web, port 8080 → 80 → app" in compose_show.draw(project).alt


def looks(project, states):
    """Service → how its box is drawn."""
    svg = ET.fromstring(compose_show.draw(project, states).html)
    found = {}
    for node in svg.iter("{http://www.w3.org/2000/svg}g"):
        if node.get("class") == "node":
            shape, text = node[0], next(one for one in node if one.tag.endswith("text"))
            colour = "colour" if "--labs-c1" in shape.get("style", "") else "plain"
            found[text.text] = colour + " dashed" * bool(shape.get("stroke-dasharray"))
    return {name: found[name] for name in ("web", "app")}


def test_how_a_service_is_tells_its_box(project):
    assert looks(project, None) == {"web": "plain", "app": "plain"}
    assert looks(project, []) == {"web": "plain dashed", "app": "plain dashed"}
    assert looks(project, STATES) == {"web": "plain dashed", "app": "plain"}
    sick = STATES[0]._replace(health="starting")
    assert looks(project, [sick]) == {"web": "plain dashed", "app": "plain"}
    assert looks(project, STATES[:1]) == {"web": "plain dashed", "app": "colour"}


@pytest.fixture
def waiting(tmp_path):
    """Two services, one of which waits for the other's health; what is up at the end goes down."""
    (tmp_path / "compose.yaml").write_text("""name: labtest
services:
  db: {image: "busybox:lab", command: sh -c "sleep 2; touch /ready; exec sleep 1000", stop_signal: SIGKILL,
       healthcheck: {test: "test -e /ready", interval: 200ms, retries: 50}}
  app: {image: "busybox:lab", command: sleep 1000, stop_signal: SIGKILL, depends_on: {db: {condition: service_healthy}}}
""")
    yield compose_file.load(str(tmp_path / "compose.yaml"), env={})
    compose_run.down("labtest")


def test_live_shows_what_changes_while_it_changes(waiting, capsys):
    with compose_show.live(waiting):
        compose_run.up(waiting)
    told = [line.partition(" → ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("db")]
    seen = list(dict.fromkeys(told))
    assert seen[0] in ("db", "db, 1: created")
    assert seen[-2:] == ["db, 1: running (starting)", "db, 1: running (healthy)"]
    assert told[-1] == "db, 1: running (healthy)"


def test_live_ends_with_the_block_and_shows_how_it_ended(waiting, capsys):
    compose_run.up(waiting)
    before = threading.active_count()
    with pytest.raises(KeyError), compose_show.live(waiting):
        compose_run.stop("labtest")
        raise KeyError
    assert "app, 1: exited (137) → db, 1: exited (137)" in capsys.readouterr().out.splitlines()
    assert threading.active_count() == before


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
