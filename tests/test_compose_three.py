"""The same files under labs, docker compose and podman-compose."""

import shutil
from pathlib import Path

import pytest
import yaml

from labs import compose_file, compose_three
from labs.compose_three import Outcome, Service

CORNERS = str(Path(__file__).parent / "compose/corners.yaml")
# What the services of corners.yaml must come to, whoever runs them.
EXITS = {"words": 0, "text": 4, "entry": 6, "user": 0, "where": 0, "readonly": 0, "scratch": 0,
         "secret": 0, "inside": 0, "hosts": 0, "caps": 0, "lookup": 0}
HEALTH = {"well": "healthy", "ill": "unhealthy"}
# Which of them all three run.
SHARED = ("text", "file", "both", "well", "ill", "gate")
# Field → what Docker and Podman have otherwise than labs, and why.
DIFFERENCES = {}


@pytest.fixture(scope="module")
def ours():
    with compose_three.running("labs", CORNERS, "labs-three") as outcome:
        yield outcome


def test_every_corner_comes_out_as_it_should(ours):
    project = compose_file.load(CORNERS)
    assert set(ours.services) == set(project.services)
    assert {name: one.exit_code for name, one in ours.services.items() if one.status == "exited"} == EXITS
    assert {name: one.health for name, one in ours.services.items() if one.health} == HEALTH
    assert ours.succeeded
    assert set(ours.order) == {"plain, short", "plain, lookup", "well, gate", "words, done"}


@pytest.mark.parametrize(("service", "env"), [
    ("list", ("A=1", "B=", "C=x y=z")), ("mapping", ("A=1", "F=1.5", "T=true")), ("file", ("B=here",)),
    ("filled", ("X=default", "Y=$HOME")), ("again", ("ONE=1", "TWO=2"))])
def test_environments(ours, service, env):
    assert ours.services[service].environment == env


@pytest.mark.parametrize(("service", "networks"), [
    ("plain", ("default",)), ("both", ("back", "front")), ("named", ("front",)), ("alone", ())])
def test_networks(ours, service, networks):
    assert ours.services[service].networks == networks


def test_differences_name_field_tool_and_value():
    one = Service(1, "running", 0, "", ("default",), ())
    found = compose_three.differences({"labs": Outcome(True, ("a, b",), {"a": one}),
                                       "docker": Outcome(True, ("a, b",), {"a": one._replace(exit_code=3)}),
                                       "podman": Outcome(True, (), {"a": one, "b": one})})
    assert found["a.exit_code"] == {"labs": 0, "docker": 3, "podman": 0}
    assert found["order"] == {"labs": ("a, b",), "docker": ("a, b",), "podman": ()}
    assert found["b.status"] == {"labs": None, "docker": None, "podman": "running"}
    assert "a.status" not in found


@pytest.mark.machine
def test_the_three_agree_but_for_what_is_explained(tmp_path):
    """On the services of SHARED: each costs the engines seconds on an emulated machine."""
    corners = yaml.safe_load(Path(CORNERS).read_text())
    corners["services"] = {name: corners["services"][name] for name in SHARED}
    (tmp_path / "corners.yaml").write_text(yaml.safe_dump(corners))
    shutil.copy(Path(CORNERS).with_suffix(".env"), tmp_path)
    found = compose_three.differences(compose_three.outcomes(str(tmp_path / "corners.yaml")))
    others = {field: {tool: value for tool, value in row.items() if value != row["labs"]}
              for field, row in found.items()}
    assert others == DIFFERENCES
