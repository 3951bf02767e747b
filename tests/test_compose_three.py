"""Small compose files under labs, docker compose and podman-compose; each file says in x-outcome what must come of it.

labs runs all of them natively. In the lab machine all three do, but for what is in HANGS; where docker compose or
podman-compose comes to something else, EXPLAINED says what, and why: whatever is not in it fails, and so does an entry
that no longer occurs.
"""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from labs import compose_file, compose_three
from labs.compose_three import Outcome, Service

RUNS = Path(__file__).parent / "compose_runs"
FILES = {path.stem if path.parent == RUNS else path.parent.name: str(path)
         for path in sorted(RUNS.rglob("*.yaml")) if path.stem != "part"}
PLAIN = Service(1, "exited", 0, "", (), ())
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
HELD = ("bind", "chain", "circle", "config", "dotenv", "entrypoint", "env-file", "env-list", "env-types", "extends",
        "gate-completed", "gate-failed", "gate-healthy", "include", "network-service", "network-two", "no-command",
        "profiles", "restart", "scale", "secret-target", "shell", "unhealthy", "unknown-key", "unknown-need", "user",
        "variable-required", "variables", "volume-kinds")
HANGS = {}
EXPLAINED = {}


@pytest.fixture(scope="module")
def ours():
    return compose_three.outcomes_of("labs", {f"labs-three-{name}": file for name, file in FILES.items()})


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
def test_the_three_agree_but_for_what_is_explained():
    def run(tool):
        files = {f"labs-{tool}-{name}": file for name, file in FILES.items() if (name, tool) not in HANGS}
        found = compose_three.outcomes_of(tool, files)
        return {name: found[f"labs-{tool}-{name}"] for name in FILES if f"labs-{tool}-{name}" in found}

    with ThreadPoolExecutor() as pool:
        found = dict(zip(compose_three.TOOLS, pool.map(run, compose_three.TOOLS), strict=True))
    others = {(name, tool): one for tool, all_ in found.items() for name, one in all_.items()
              if one != found["labs"][name]}
    assert others == {key: one for key, (one, _) in EXPLAINED.items()}


def test_every_explanation_says_why():
    assert all(why and one != wanted(name) for (name, _), (one, why) in EXPLAINED.items())
    assert all((*HANGS.values(), *READ.values()))
