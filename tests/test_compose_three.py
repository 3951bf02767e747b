"""Small compose files under labs, docker compose and podman-compose; each file says in x-outcome what must come of it.

labs runs all of them natively, and docker compose reads them. In the lab machine docker compose and podman-compose run
those in HELD, but for what is in HANGS; where one comes to something else than labs, EXPLAINED says what, and why:
whatever is not in it fails, and so does an entry that no longer occurs.
"""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from labs import compose_file, compose_three
from labs.compose_three import Outcome, Service

RUNS = Path(__file__).parent / "compose_runs"
FILES = {path.stem if path.parent == RUNS else path.parent.name: str(path)
         for path in sorted(RUNS.rglob("*.yaml")) if path.stem != "part"}
PLAIN = Service(1, "exited", 0, "", (), ())
PLAIN_ALONE = Outcome(True, (), {"a": PLAIN})
REFUSED = Outcome(False, (), {})
# Refused when it is run, not when it is read.
LATE = {"bind-absent"}
# What docker compose reads otherwise.
READ = {
    "bind-absent": "create_host_path: false is left out",
    "env-date": "a date is a time, and becomes text as Go writes one: 2026-11-27 00:00:00 +0000 UTC",
    "shell": "a command ends at the first && and says nothing"}


def outcome(services, succeeded=True, order=()):
    """What differs from PLAIN, by service and field."""
    made = {name: PLAIN._replace(**{field: tuple(value) if isinstance(value, list) else value
                                    for field, value in fields.items()}) for name, fields in services.items()}
    return Outcome(succeeded, tuple(order), made)


def wanted(name):
    given = yaml.safe_load(Path(FILES[name]).read_text())
    if given["x-outcome"] == "refused":
        return REFUSED
    return outcome(given["x-outcome"], given.get("x-succeeded", True), given.get("x-order", ()))


# What all three are given. docker compose reads the other files too; running each by all takes the machine too long.
# Those with a health check stand last: each of Podman's checks is a process of a second.
HELD = ("bind", "circle", "config", "dotenv", "env-file", "env-list", "env-types", "extends", "gate-completed",
        "gate-failed", "include", "network-service", "network-two", "no-command", "profiles", "restart", "scale",
        "secret-target", "shell", "unknown-key", "unknown-need", "user", "variable-required", "variables",
        "volume-kinds", "unhealthy", "gate-healthy")
HANGS = {("circle", "podman"): "the first is refused, as its dependency is not there, and then waited for"}
# What comes of it otherwise, and why.
EXPLAINED = {
    ("env-list", "docker"): (outcome({"a": {"environment": ["A=1", "B=", "C=x y=z", "NOWHERE"]}}),
                             "a variable without a value is given to the Engine by name, and inspect shows the name"),
    ("gate-failed", "docker"): (outcome({"a": {"status": "created"}, "b": {"exit_code": 5}}, succeeded=False),
                                "every container is made before the first one starts"),
    ("no-command", "docker"): (outcome({"a": {"status": "created", "exit_code": 127}}, succeeded=False),
                               "a container that could not be started bears the code that a shell would give"),
    ("shell", "docker"): (PLAIN_ALONE, "a command ends at the first &&"),
    ("config", "podman"): (outcome({"a": {"exit_code": 2}}), "configs are read and left out: there is no such file"),
    ("dotenv", "podman"): (PLAIN_ALONE, ".env fills in the file, but is not where a name without a value is looked up"),
    ("env-types", "podman"): (outcome({"a": {"environment": [
        "BARS=1000", "F=1.5", "I=1", "OCTAL=0o17", "T=true", "TIME=90", "True=True"]}}),
        "YAML 1.1: yes is true even as a key, 1:30 is base sixty and 0o17 is text"),
    ("gate-completed", "podman"): (outcome({"a": {"exit_code": 1}, "b": {}}, order=["b, a"]),
                                   "the later one is started at once too, and then again"),
    ("gate-failed", "podman"): (outcome({"a": {}, "b": {"exit_code": 5}}, order=["b, a"]),
                                "only the end is waited for, whatever the exit code"),
    ("no-command", "podman"): (outcome({"a": {"status": "created"}}), "up says nothing of a start that failed"),
    ("scale", "podman"): (PLAIN_ALONE, "the key is ignored: only up --scale counts"),
    ("unknown-key", "podman"): (PLAIN_ALONE, "no schema: an unknown key is ignored"),
    ("unknown-need", "podman"): (outcome({"a": {}}, succeeded=False), "fails, but has started the container"),
    ("variables", "podman"): (outcome({"a": {"environment": [
        "A=none", "B=${PATH:+set}", "C=${NOBODY:+set}", "D=$HOME"]}}), "the form with + is not known"),
}


@pytest.fixture(scope="module")
def ours():
    with compose_three.running_all("labs", {f"labs-three-{name}": file for name, file in FILES.items()}) as found:
        yield found


@pytest.mark.parametrize("name", FILES)
def test_labs_comes_to_what_the_file_says(ours, name):
    assert ours[f"labs-three-{name}"] == wanted(name)


@pytest.mark.parametrize("name", FILES)
def test_docker_compose_reads_what_labs_reads(name):
    """The same files refused, and the same project otherwise."""
    done = subprocess.run(["docker", "compose", "-f", FILES[name], "config", "--format", "json"], capture_output=True,
                          text=True, check=False)
    assert (done.returncode != 0) == (wanted(name) == REFUSED and name not in LATE), done.stderr
    if not done.returncode:
        theirs = json.loads(done.stdout.replace("$$", "$"))["services"]  # printed to be read again
        assert (compose_file.load(FILES[name]).services == theirs) == (name not in READ)


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
@pytest.mark.parametrize("tool", ["docker", "podman"])
def test_the_others_come_to_the_same_but_for_what_is_explained(tool):
    projects = {name: f"labs-{tool}-{name}" for name in HELD if (name, tool) not in HANGS}
    with compose_three.running_all(tool, {project: FILES[name] for name, project in projects.items()}) as found:
        others = {name: found[project] for name, project in projects.items() if found[project] != wanted(name)}
    assert others == {name: one for (name, who), (one, _) in EXPLAINED.items() if who == tool}


def test_every_explanation_says_why():
    assert all(why and one != wanted(name) for (name, _), (one, why) in EXPLAINED.items())
    assert all((*HANGS.values(), *READ.values()))
