"""Projects under labs on the real kernel: up to down, and everything between."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labs import compose, compose_file, compose_run, errors, mounts, process
from labs.compose_supervisor import FOLDER, UpFailed
from labs.netns import Netns

IDLE = "{image: 'busybox:lab', command: sleep 1000, stop_signal: SIGKILL"
NAME = "labtest"
HOST = Netns(f"labs-{NAME}", f"/run/netns/labs-{NAME}")


@pytest.fixture
def project(tmp_path):
    """Reads a file of services; what is up at the end goes down."""
    def inner(services, name=NAME, top=""):
        rows = "".join(f"  {line}\n" for line in services.strip("\n").splitlines())
        (tmp_path / "compose.yaml").write_text(f"name: {name}\nservices:\n{rows}{top}")
        return compose_file.load(str(tmp_path / "compose.yaml"), env={})

    yield inner
    compose_run.down(NAME, volumes=True)


def states():
    return {one.name.removeprefix(f"{NAME}-"): one for one in compose_run.ps(NAME)}


def happened(what):
    return [one.container.removeprefix(f"{NAME}-") for one in compose_run.events(NAME) if one.what == what]


def until(condition):
    return process.until(condition, 30.0)


def test_up_and_down_leave_nothing(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    [one] = compose_run.ps(NAME)
    assert (one.name, one.status, one.health) == (f"{NAME}-a-1", "running", "")
    assert process.cmdline(one.pid) == ["sleep", "1000"]
    told = subprocess.run(["lsns", "-Jp", str(one.pid)], capture_output=True, check=True).stdout
    rows = json.loads(told)["namespaces"]
    assert {row["type"] for row in rows if row["nprocs"] == 1 and row["pid"] == one.pid} >= {"pid", "mnt", "uts", "ipc"}
    compose_run.down(NAME)
    assert not os.path.exists(f"/proc/{one.pid}")
    assert not os.path.exists(HOST.path)
    assert not [row for row in mounts.table() if row.target.startswith(FOLDER)]
    assert compose_run.ps(NAME) == []
    assert not os.path.exists(compose_run.LAYERS)
    compose_run.down(NAME)  # twice is no mistake


def test_up_twice_changes_nothing(project):
    what = project(f"a: {IDLE}}}\nb: {IDLE}, depends_on: [a]}}")
    assert [one.kind for one in compose_run.up(what)] == ["create", "create"]
    before = states()
    assert [one.kind for one in compose_run.up(what)] == ["keep", "keep"]
    assert states() == before
    assert happened("started") == ["a-1", "b-1"]


def test_one_service_changed_is_the_only_one_made_anew(project):
    services = f"a: {IDLE}}}\nb: {IDLE}, depends_on: [a], environment: {{X: '%s'}}}}\nc: {IDLE}, depends_on: [b]}}"
    compose_run.up(project(services % 1))
    before = states()
    actions = compose_run.up(project(services % 2))
    assert [(one.service, one.kind) for one in actions] == [("a", "keep"), ("b", "recreate"), ("c", "keep")]
    after = states()
    assert {name for name in after if after[name] != before[name]} == {"b-1"}
    assert "X=2" in compose_run.execute(NAME, "b", ["env"]).stdout.splitlines()


def test_another_process_finds_the_project(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    script = "\n".join(["from labs import compose_run", f"print(compose_run.ps('{NAME}')[0].status)",
                        f"compose_run.down('{NAME}')", f"print(compose_run.ps('{NAME}'))"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.stdout.split("\n") == ["running", "[]", ""]


def test_a_supervisor_that_is_killed_takes_its_containers_along(project):
    what = project(f"a: {IDLE}}}")
    compose_run.up(what)
    pid = states()["a-1"].pid
    supervisor = min(one for one in process.pids() if process.cmdline(one)[-2:] == ["labs.compose_supervisor", NAME])
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{supervisor}"))
    assert compose_run.ps(NAME) == []
    assert [one.kind for one in compose_run.up(what)] == ["create"]
    assert not os.path.exists(f"/proc/{pid}")


def test_names_lead_to_services_of_the_same_network_only(project):
    compose_run.up(project(f"""
a: {IDLE}, networks: [front, back]}}
b: {IDLE}, networks: {{back: {{aliases: [other]}}}}}}
c: {IDLE}, networks: [front]}}
d: {{image: 'busybox:lab', command: sleep 1000, stop_signal: SIGKILL, network_mode: none}}
""", top="networks:\n  front:\n  back: {internal: true, ipam: {config: [{subnet: 10.77.0.0/24}]}}\n"))
    address = states()["b-1"].networks["back"]
    assert address.startswith("10.77.0.")
    for name in ("b", "other", f"{NAME}-b-1"):
        assert address in compose_run.execute(NAME, "a", ["nslookup", name]).stdout
    refused = compose_run.execute(NAME, "c", ["nslookup", "b"])
    assert refused.exit_code != 0
    assert "NXDOMAIN" in refused.stdout + refused.stderr
    assert "default" in compose_run.execute(NAME, "a", ["ip", "route"]).stdout
    assert "default" not in compose_run.execute(NAME, "b", ["ip", "route"]).stdout
    assert compose_run.execute(NAME, "d", ["ip", "-o", "link"]).stdout.count("\n") == 1


def test_scale_and_round_robin(project):
    what = project(f"a: {IDLE}}}\nb: {IDLE}}}")
    compose_run.up(what)
    first = states()["b-1"]
    compose_run.scale(what, b=3)
    assert sorted(states()) == ["a-1", "b-1", "b-2", "b-3"]
    assert states()["b-1"] == first
    space = Netns("labs", f"/proc/{states()['a-1'].pid}/ns/net")
    answers = [space.run(["dig", "@127.0.0.11", "+short", "b"]).split() for _ in range(3)]
    assert {len(one) for one in answers} == {3}
    assert len({one[0] for one in answers}) == 3
    compose_run.scale(what, b=1)
    assert sorted(states()) == ["a-1", "b-1"]
    assert states()["b-1"] == first


def test_a_published_port_leads_in(project):
    idle = IDLE.replace("sleep 1000", "httpd -f -p 80 -h /etc")
    what = project(f"web: {idle}, ports: ['8085:80']}}")
    compose_run.up(what)
    until(lambda: "root:x:0:0" in HOST.run(["curl", "-s", "http://127.0.0.1:8085/passwd"], check=False))
    assert "dnat to" in HOST.run(["nft", "list", "ruleset"])


@pytest.mark.parametrize(("policy", "code", "runs"), [
    ("'no'", 3, 1), ("on-failure:2", 3, 3), ("on-failure:2", 0, 1)])
def test_restart_policies(project, policy, code, runs):
    compose_run.up(project(f"a: {{image: 'busybox:lab', command: sh -c 'echo run; exit {code}', restart: {policy}}}"))
    until(lambda: states()["a-1"].status == "exited")
    assert states()["a-1"].exit_code == code
    assert states()["a-1"].restarts == runs - 1
    assert compose_run.logs(NAME, prefix=False) == "run\n" * runs


def test_what_is_killed_comes_back_and_what_is_stopped_does_not(project):
    compose_run.up(project(f"a: {IDLE}, restart: always}}"))
    pid = states()["a-1"].pid
    compose_run.kill(NAME, "a", signal.SIGKILL)
    until(lambda: states()["a-1"].restarts == 1 and states()["a-1"].status == "running")
    assert states()["a-1"].pid != pid
    compose_run.stop(NAME)
    assert states()["a-1"].status == "exited"
    compose_run.start(NAME)
    assert states()["a-1"].status == "running"


def test_waits_between_restarts_grow(project):
    compose_run.up(project("a: {image: 'busybox:lab', command: 'false', restart: on-failure:4}"))
    until(lambda: states()["a-1"].status == "exited")
    times = {what: [one.time for one in compose_run.events(NAME) if one.what == what] for what in ("died", "started")}
    waits = [start - died for died, start in zip(times["died"], times["started"][1:], strict=False)]
    assert len(waits) == 4
    assert all(wait >= 0.1 * 2**number for number, wait in enumerate(waits))


@pytest.mark.parametrize(("trap", "code"), [("trap 'exit 7' TERM", 7), ("trap 'exit 8' USR1", 8), ("true", 137)])
def test_stop_signal_grace_and_exit_code(project, trap, code):
    number = "SIGUSR1" if "USR1" in trap else "SIGTERM"
    compose_run.up(project(f"""
a:
  image: busybox:lab
  command: ["sh", "-c", "{trap}; echo ready; while true; do sleep 0.05; done"]
  stop_signal: {number}
  stop_grace_period: 500ms
"""))
    until(lambda: "ready" in compose_run.logs(NAME))
    began = time.monotonic()
    compose_run.stop(NAME)
    assert states()["a-1"].exit_code == code
    assert code != 137 or time.monotonic() - began >= 0.5


def test_stop_goes_backwards(project):
    compose_run.up(project(f"a: {IDLE}}}\nb: {IDLE}, depends_on: [a]}}\nc: {IDLE}, depends_on: [b]}}"))
    compose_run.stop(NAME)
    assert happened("died") == ["c-1", "b-1", "a-1"]


def test_health_opens_the_gate(project):
    compose_run.up(project(f"""
db: {IDLE}, healthcheck: {{test: "test -e /ready", interval: 50ms, retries: 2, start_period: 1m}}}}
app: {IDLE}, depends_on: {{db: {{condition: service_started}}}}}}
open: {{image: 'busybox:lab', command: 'true'}}
"""))
    assert states()["db-1"].health == "starting"
    compose_run.execute(NAME, "db", ["touch", "/ready"])
    until(lambda: states()["db-1"].health == "healthy")
    compose_run.execute(NAME, "db", ["rm", "/ready"])
    until(lambda: states()["db-1"].health == "unhealthy")
    assert states()["db-1"].restarts == 0


def test_a_dependent_waits_for_health(project):
    compose_run.up(project(f"""
db: {{image: 'busybox:lab', command: "sh -c 'sleep 0.4; touch /ready; exec sleep 1000'", stop_signal: SIGKILL,
  healthcheck: {{test: "test -e /ready", interval: 50ms, retries: 100}}}}
app: {IDLE}, depends_on: {{db: {{condition: service_healthy}}}}}}
"""))
    rows = [(one.container, one.what) for one in compose_run.events(NAME)]
    assert rows.index((f"{NAME}-db-1", "healthy")) < rows.index((f"{NAME}-app-1", "created"))


def test_an_unhealthy_dependency_fails_up_and_stays(project):
    with pytest.raises(UpFailed, match=f"{NAME}-db-1 is unhealthy; left as they are: {NAME}-db-1") as caught:
        compose_run.up(project(f"""
db: {IDLE}, healthcheck: {{test: [CMD, "false"], interval: 50ms, retries: 2}}}}
app: {IDLE}, depends_on: {{db: {{condition: service_healthy}}}}}}
"""))
    assert caught.value.left == [f"{NAME}-db-1"] == [one.name for one in compose_run.ps(NAME)]


def test_failures_in_the_start_period_do_not_count(project):
    probe = "{test: [CMD, 'false'], interval: 50ms, retries: 1, start_period: 1s}"
    compose_run.up(project(f"a: {IDLE}, healthcheck: {probe}}}"))
    until(lambda: states()["a-1"].health == "unhealthy")
    times = {one.what: one.time for one in compose_run.events(NAME)}
    assert times["unhealthy"] - times["started"] >= 1.0


def test_a_one_shot_must_succeed(project):
    one_shot = f"""
job: {{image: 'busybox:lab', command: sh -c 'exit %d'}}
app: {IDLE}, depends_on: {{job: {{condition: service_completed_successfully}}}}}}
"""
    compose_run.up(project(one_shot % 0))
    assert {name: one.status for name, one in states().items()} == {"job-1": "exited", "app-1": "running"}
    compose_run.down(NAME)
    with pytest.raises(UpFailed, match='service "job" didn\'t complete successfully: exit 5'):
        compose_run.up(project(one_shot % 5))
    assert list(states()) == ["job-1"]


def test_a_dependent_that_asks_for_it_is_pulled_along(project):
    services = f"""
a: {IDLE}, environment: {{X: '%s'}}}}
b: {IDLE}, depends_on: {{a: {{condition: service_started, restart: true}}}}}}
c: {IDLE}, depends_on: [a]}}
"""
    compose_run.up(project(services % 1))
    before = states()
    compose_run.up(project(services % 2))
    assert states()["b-1"].pid != before["b-1"].pid
    assert states()["c-1"] == before["c-1"]


def test_logs_bear_the_name_of_their_container_and_both_streams(project):
    compose_run.up(project("""
one: {image: 'busybox:lab', command: "sh -c 'echo a; echo b >&2'"}
another: {image: 'busybox:lab', command: "echo c", depends_on: {one: {condition: service_completed_successfully}}}
"""))
    until(lambda: compose_run.logs(NAME).count("\n") == 3)
    lines = compose_run.logs(NAME).splitlines()
    assert sorted(lines[:2]) == [f"{NAME}-one-1     | a", f"{NAME}-one-1     | b"]
    assert lines[2] == f"{NAME}-another-1 | c"
    assert compose_run.logs(NAME, ["another"], prefix=False) == "c\n"
    assert compose_run.logs(NAME, ["another"], colour=True).startswith("\x1b[36m")


def test_volumes_outlive_down_unless_it_says_so(project):
    what = project("""
a:
  image: busybox:lab
  command: sh -c "date >>/data/x; wc -l </data/x"
  volumes: ["data:/data"]
""", top="volumes:\n  data:\n")
    for runs, volumes in ((1, False), (2, True), (1, True)):
        compose_run.up(what)
        until(lambda: states()["a-1"].status == "exited")
        until(lambda: compose_run.logs(NAME, prefix=False))
        assert compose_run.logs(NAME, prefix=False).strip() == str(runs)
        compose_run.down(NAME, volumes=volumes)


def test_files_users_and_limits_inside(project, tmp_path):
    (tmp_path / "key.txt").write_text("secret")
    compose_run.up(project(f"""
a: {IDLE}, user: nobody, working_dir: /tmp, hostname: kyoto, read_only: true, tmpfs: [/run], secrets: [key],
  configs: [{{source: note, target: /etc/note, mode: 0440}}], extra_hosts: ["far=192.0.2.1"],
  cap_drop: [ALL], cap_add: [NET_ADMIN], sysctls: {{net.ipv4.ip_unprivileged_port_start: 80}}}}
""", top="secrets:\n  key: {file: ./key.txt}\nconfigs:\n  note: {content: hello}\n"))
    def inside(*argv):
        return compose_run.execute(NAME, "a", argv).stdout.strip()
    assert inside("id", "-u") == "65534"
    assert inside("pwd") == "/tmp"
    assert inside("hostname") == "kyoto"
    assert inside("cat", "/run/secrets/key") == "secret"
    assert inside("stat", "-c", "%a", "/etc/note") == "440"
    assert "192.0.2.1\tfar" in inside("cat", "/etc/hosts")
    assert inside("cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start") == "80"
    assert f"CapBnd:\t{1 << 12:016x}" in inside("cat", "/proc/1/status")
    assert compose_run.execute(NAME, "a", ["touch", "/new"]).exit_code != 0
    script = "echo $X; echo no >&2; exit 4"
    assert compose_run.execute(NAME, "a", ["sh", "-c", script], {"X": "y"}) == (4, "y\n", "no\n")


def test_an_image_is_built_and_one_is_missing(project, tmp_path):
    lines = ["FROM busybox", "ARG WHAT", "ENV WHAT=$WHAT", "RUN echo built $WHAT >/made", 'CMD ["cat", "/made"]']
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    compose_run.up(project("a: {build: {context: ., args: {WHAT: it}}}"))
    until(lambda: compose_run.logs(NAME, prefix=False) == "built it\n")
    compose_run.down(NAME)
    missing = r"compose\.yaml:3:7: services\.a\.image: 'gone:lab': no such image"
    with pytest.raises(errors.BadInput, match=missing) as caught:
        compose_run.up(project("a: {image: 'gone:lab'}"))
    assert "\n" not in str(caught.value)
    assert compose_run.ps(NAME) == []


def test_bad_projects_touch_nothing(project):
    for services, error in ((f"a: {IDLE}, depends_on: [b]}}\nb: {IDLE}, depends_on: [a]}}", compose.CycleError),
                            (f"a: {IDLE}, privileged: true}}", errors.BadInput)):
        with pytest.raises(error):
            compose_run.up(project(services))
    with pytest.raises(errors.BadInput, match="scale"):
        compose_run.up(project(f"a: {IDLE}}}"), scale={"b": 2})
    assert not os.path.exists(f"{FOLDER}/{NAME}")


def test_a_command_that_is_not_there_fails_up(project):
    with pytest.raises(UpFailed, match=f"{NAME}-a-1: cannot start: .*no-such"):
        compose_run.up(project("a: {image: 'busybox:lab', command: no-such}"))


def test_a_user_that_is_not_there_leaves_nothing(project):
    with pytest.raises(UpFailed, match=r"user: 'nemo': no such user.*nothing is left"):
        compose_run.up(project(f"a: {IDLE}, user: nemo}}"))
    assert not os.path.exists(f"{FOLDER}/{NAME}")


def test_starts_are_as_parallel_as_the_graph_allows(project):
    waits = "healthcheck: {test: 'test -e /ready', interval: 50ms, retries: 200}"
    slow = IDLE.replace("sleep 1000", "\"sh -c 'sleep 4; touch /ready; exec sleep 1000'\"")
    rows = "\n".join(f"s{number}: {slow}, {waits}}}" for number in range(4))
    rows += f"\nlast: {IDLE}, depends_on: {{{', '.join(f's{n}: {{condition: service_healthy}}' for n in range(4))}}}}}"
    compose_run.up(project(rows))
    started = [one.time for one in compose_run.events(NAME) if one.what == "started" and "-s" in one.container]
    healthy = [one.time for one in compose_run.events(NAME) if one.what == "healthy"]
    assert max(started) < min(healthy)  # none waited for another's seconds of preparation
    assert happened("started")[-1] == "last-1"
