"""What a project comes to: order, names, labels, hashes, plan, and what is refused."""

import json
import subprocess

import pytest

from labs import compose, compose_file
from labs.compose_unit import State
from labs.compose_yaml import ComposeError

CHAIN = """name: shop
services:
  web: {image: x, depends_on: [app, log]}
  app: {image: x, depends_on: {db: {condition: service_healthy, restart: true}}}
  db: {image: x}
  log: {image: x}
"""


@pytest.fixture
def read(tmp_path):
    def inner(text):
        (tmp_path / "compose.yaml").write_text(text)
        return compose_file.load(str(tmp_path / "compose.yaml"), env={})

    return inner


def state(project, service, number=1, status="running", digest=""):
    digest = digest or compose.config_hash(project.services[service])
    return State(compose.container_name(project, service, number), service, number, digest, status)


def steps(actions):
    return [(one.kind, one.service, one.number) for one in actions]


def test_levels_are_what_may_start_together(read):
    project = read(CHAIN)
    assert compose.order(project) == [["db", "log"], ["app"], ["web"]]
    assert compose.order(project, ["app"]) == [["db"], ["app"]]
    assert compose.needs(project, "app") == {"db": "service_healthy"}
    with pytest.raises(ComposeError, match="'gone': no such service"):
        compose.order(project, ["gone"])


@pytest.mark.parametrize(("needs", "cycle", "column"), [
    ({"a": "a"}, "a → a", 17), ({"a": "b", "b": "a"}, "a → b → a", 17),
    ({"c": "a", "a": "b", "b": "c", "d": "a"}, "a → b → c → a", 17)])
def test_a_circle_is_named_with_its_place(read, needs, cycle, column):
    rows = [f"  {name}: {{image: x, depends_on: [{other}]}}" for name, other in sorted(needs.items())]
    project = read("services:\n" + "\n".join(rows) + "\n")
    place = rf"compose\.yaml:2:{column}: services\.a\.depends_on"
    with pytest.raises(compose.CycleError, match=f"{place}.*{cycle}") as caught:
        compose.order(project)
    assert caught.value.cycle == cycle.split(" → ")


def test_the_hash_is_of_what_makes_a_container(read):
    base = "services:\n  b: {image: x}\n  a:\n    image: x\n    environment: {A: 1}\n"
    known = compose.config_hash(read(base).services["a"])
    for same in ("    depends_on: [b]\n", "    scale: 3\n"):
        assert compose.config_hash(read(base + same).services["a"]) == known, same
    two, four = (read(base + f"    deploy: {{replicas: {number}}}\n").services["a"] for number in (2, 4))
    assert compose.config_hash(two) == compose.config_hash(four)
    for other in ("    command: x\n", "    labels: {a: b}\n", "    ports: ['1:1']\n", "    restart: always\n"):
        assert compose.config_hash(read(base + other).services["a"]) != known, other


def test_names_and_labels(read):
    project = read(CHAIN + "  own: {image: x, container_name: mine, labels: {a: b}}\n")
    assert compose.container_name(project, "web", 2) == "shop-web-2"
    assert compose.container_name(project, "own") == "mine"
    found = compose.labels(project, "app")
    assert found["com.docker.compose.depends_on"] == "db:service_healthy:true"
    assert {key.rpartition(".")[2] for key in found} == {
        "project", "service", "container-number", "config-hash", "oneoff", "depends_on", "working_dir"}
    assert compose.labels(project, "own")["a"] == "b"


@pytest.mark.machine
def test_docker_writes_the_same_labels(read, tmp_path):
    project = read("name: labs-labels\nservices:\n  a: {image: 'busybox:lab', command: 'true', depends_on: [b]}\n"
                   "  b: {image: 'busybox:lab', command: 'true'}\n")
    line = ["docker", "compose", "-f", str(tmp_path / "compose.yaml")]
    try:
        subprocess.run([*line, "create"], check=True, capture_output=True)
        told = subprocess.run(["docker", "inspect", "labs-labels-a-1"], check=True, capture_output=True).stdout
        theirs = json.loads(told)[0]["Config"]["Labels"]
    finally:
        subprocess.run([*line, "down"], check=True, capture_output=True)
    ours = compose.labels(project, "a")
    assert set(ours) <= set(theirs)
    different = {key for key, value in ours.items() if theirs[key] != value}
    assert different == {"com.docker.compose.config-hash"}  # of another form of the same configuration


def test_nothing_there_everything_is_made(read):
    assert steps(compose.plan(read(CHAIN), [])) == [
        ("create", "db", 1), ("create", "log", 1), ("create", "app", 1), ("create", "web", 1)]


def test_everything_there_nothing_is_done(read):
    project = read(CHAIN)
    actions = compose.plan(project, [state(project, name) for name in project.services])
    assert {one.kind for one in actions} == {"keep"}


def test_only_what_changed_is_made_anew(read):
    project = read(CHAIN)
    have = [state(project, name) for name in project.services if name != "app"] + [state(project, "app", digest="old")]
    assert steps(compose.plan(project, have)) == [
        ("keep", "db", 1), ("keep", "log", 1), ("recreate", "app", 1), ("keep", "web", 1)]


def test_what_exited_is_started(read):
    project = read(CHAIN)
    have = [state(project, name, status="exited" if name == "log" else "running") for name in project.services]
    assert ("start", "log", 1) in steps(compose.plan(project, have))


def test_scale_adds_and_takes_the_last_away(read):
    project = read(CHAIN)
    have = [state(project, "db"), state(project, "log"), state(project, "app"), state(project, "web", 1),
            state(project, "web", 2), state(project, "web", 3)]
    actions = compose.plan(project, have, {"web": 1, "log": 2})
    assert steps(actions)[:2] == [("remove", "web", 3), ("remove", "web", 2)]
    assert ("create", "log", 2) in steps(actions)
    assert ("keep", "web", 1) in steps(actions)


def test_a_service_that_is_gone_is_removed_first(read):
    project = read(CHAIN)
    have = [state(project, "db"), state(project, "db")._replace(service="old", name="shop-old-1")]
    assert steps(compose.plan(project, have))[0] == ("remove", "old", 1)


def test_one_name_is_not_for_two_containers(read):
    project = read("services:\n  a: {image: x, container_name: mine}\n")
    with pytest.raises(ComposeError, match=r"compose\.yaml:2:.*container_name: 'mine': one name"):
        compose.plan(project, [], {"a": 2})


@pytest.mark.parametrize(("line", "place"), [
    ("    privileged: true", "4:5: services.a.privileged"), ("    devices: ['/dev/fuse']", "4:5: services.a.devices"),
    ("    stop_signal: SIGDFL", "4:5: services.a.stop_signal"),
    ("    stop_signal: RTMIN+x", "4:5: services.a.stop_signal"),
    ("    logging: {driver: none}", "4:5: services.a.logging"), ("    init: true", "4:5: services.a.init"),
    ("    deploy: {mode: global}", "4:14: services.a.deploy.mode"),
    ("    deploy: {resources: {reservations: {memory: 1m}}}", "4:26: services.a.deploy.resources.reservations"),
    ("    healthcheck: {test: x, start_interval: 1s}", "4:28: services.a.healthcheck.start_interval"),
    ("    networks: [n]\nnetworks:\n  n: {driver: overlay}", "6:7: networks.n.driver"),
    ("    volumes: ['v:/v']\nvolumes:\n  v: {external: true}", "6:7: volumes.v.external")])
def test_what_labs_does_not_do_is_refused_by_name(read, line, place):
    project = read(f"services:\n  a:\n    image: x\n{line}\n")
    with pytest.raises(ComposeError) as caught:
        compose.refuse_unsupported(project)
    assert str(caught.value).startswith(f"compose.yaml:{place}: "), str(caught.value)
