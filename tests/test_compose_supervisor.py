"""What a project's holder does when things go wrong, change or come at once."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from labs import compose_file, compose_run, firewall, image, lab, process, registry, registry_server
from labs.compose_supervisor import FOLDER, UpFailed
from labs.compose_yaml import ComposeError
from labs.errors import BadInput
from labs.netns import Netns

IDLE = "{image: 'busybox:lab', command: sleep 1000, stop_signal: SIGKILL"
NEVER = "healthcheck: {test: [CMD, 'false'], interval: 100ms, start_period: 1h}"
NAME = "labtest"
HOST = Netns(f"labs-{NAME}", f"/run/netns/labs-{NAME}")
PYTHON = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


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


def until(condition):
    return process.until(condition, 30.0)


def running(*words):
    """The processes whose command line ends so, each with its parent."""
    found = {}
    for pid in process.pids():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            if process.cmdline(pid)[-len(words):] == list(words):
                found[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    return found


def supervisors():
    """Without the DNS servers, which are children of the one."""
    found = running("labs.compose_supervisor", NAME)
    return [pid for pid, parent in found.items() if parent not in found]


# The application of the book


SHOP = """
redis: {image: 'redis:lab', command: redis-server --bind 0.0.0.0 --protected-mode no --save "", stop_signal: SIGKILL}
app:
  image: webapp:lab
  environment: {REDIS_HOST: redis, GREETING: %s}
  depends_on: [redis]
  stop_signal: SIGKILL
  healthcheck: {test: [CMD, bash, -c, 'echo >/dev/tcp/127.0.0.1/8000'], interval: 200ms, retries: 100}
web:
  image: nginx:lab
  ports: ['8080:80']
  configs: [{source: proxy, target: /etc/nginx/sites-available/default}]
  depends_on: {app: {condition: service_healthy}}
  stop_signal: SIGKILL
"""
PROXY = """configs:
  proxy:
    content: |
      server {
        listen 80;
        resolver 127.0.0.11 valid=1s;
        set $$app app;
        location / { proxy_pass http://$$app:8000; }
      }
"""


def visits():
    """What the application counts, asked through nginx; until there is an answer."""
    text = until(lambda: HOST.run(["curl", "-sf", "http://127.0.0.1:8080/"], check=False))
    return int(re.fullmatch(rf"visits (\d+) from {NAME}-app-1\n", text)[1])


def test_nginx_webapp_and_redis(project):
    compose_run.up(project(SHOP % "hello", top=PROXY))
    before, first = states(), visits()
    actions = compose_run.up(project(SHOP % "konnichiwa", top=PROXY))
    assert {one.service: one.kind for one in actions} == {"redis": "keep", "app": "recreate", "web": "keep"}
    assert visits() > first  # redis is the same container, and counts on
    assert [name for name, one in states().items() if one != before[name]] == ["app-1"]
    assert "GREETING=konnichiwa" in compose_run.execute(NAME, "app", ["env"]).stdout.splitlines()


# Asked for twice, or not to the end


def waits_forever(project):
    return project(f"db: {IDLE}, {NEVER}}}\napp: {IDLE}, depends_on: {{db: {{condition: service_healthy}}}}}}")


def test_up_that_is_interrupted_leaves_the_project_to_the_next(project, tmp_path):
    waits_forever(project)
    script = f"from labs import compose_file, compose_run; compose_run.up(compose_file.load('{tmp_path}/compose.yaml'))"
    with subprocess.Popen([sys.executable, "-c", script], env=PYTHON) as client:
        until(lambda: "db-1" in states())
        client.kill()
    assert list(states()) == ["db-1"]
    assert [one.kind for one in compose_run.up(project(f"db: {IDLE}}}"))] == ["recreate"]


def test_down_ends_an_up_that_waits(project):
    what, caught = waits_forever(project), []

    def up():
        with pytest.raises(UpFailed, match="ended by another call") as failure:
            compose_run.up(what)
        caught.append(failure)

    waiting = threading.Thread(target=up)
    waiting.start()
    until(lambda: "db-1" in states())
    compose_run.down(NAME)
    waiting.join(30)
    assert caught
    assert not os.path.exists(f"{FOLDER}/{NAME}")


def test_two_at_once_make_one_project(project):
    what = project(f"a: {IDLE}}}")
    kinds = []
    both = [threading.Thread(target=lambda: kinds.extend(one.kind for one in compose_run.up(what))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert sorted(kinds) == ["create", "keep"]
    assert len(supervisors()) == 1


def test_two_may_take_it_down(project):
    compose_run.up(project("a: {image: 'busybox:lab', command: sleep 1000, stop_grace_period: 1s}"))
    other = subprocess.Popen([sys.executable, "-c", f"from labs import compose_run; compose_run.down('{NAME}')"],
                             env=PYTHON)
    os.kill(*supervisors(), signal.SIGTERM)
    compose_run.down(NAME)
    assert other.wait(60) == 0
    assert not os.path.exists(f"{FOLDER}/{NAME}")
    assert not os.path.exists(compose_run.LAYERS)


def test_a_command_ends_with_whoever_asked_for_it(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(f"{FOLDER}/{NAME}/socket")
        line.sendall(json.dumps({"do": "exec", "container": "a", "argv": ["sleep", "999"], "env": {}}).encode() + b"\n")
        until(lambda: running("sleep", "999"))
    until(lambda: not running("sleep", "999"))


def test_clean_ends_the_supervisor_too(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    lab.clean(engines=False)
    assert supervisors() == []
    assert compose_run.ps(NAME) == []
    assert not os.path.exists(compose_run.LAYERS)


def test_a_supervisor_that_is_told_to_end_takes_all_down(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    pid = states()["a-1"].pid
    os.kill(*supervisors(), signal.SIGTERM)
    until(lambda: not supervisors())
    assert not os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"{FOLDER}/{NAME}")


def test_what_is_not_known_is_said_and_nothing_ends(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    with pytest.raises(UpFailed, match="nonsense"):
        compose_run._ask(NAME, {"do": "nonsense"})
    with pytest.raises(UpFailed, match="b: no such container or service"):
        compose_run.execute(NAME, "b", ["true"])
    assert states()["a-1"].status == "running"


# Changed in between


def test_a_network_that_changed_is_made_anew_with_those_in_it(project):
    services = f"a: {IDLE}, networks: [n]}}\nb: {IDLE}}}"
    nets = "networks:\n  n: {ipam: {config: [{subnet: %s, gateway: %s}]}}\n"
    compose_run.up(project(services, top=nets % ("10.77.1.0/24", "10.77.1.9")))
    before = states()
    assert "via 10.77.1.9 " in compose_run.execute(NAME, "a", ["ip", "route"]).stdout
    actions = compose_run.up(project(services, top=nets % ("10.77.2.0/24", "10.77.2.1")))
    assert [(one.service, one.kind, one.why) for one in actions] == [
        ("a", "recreate", "network n changed"), ("b", "keep", "as it should be")]
    assert states()["a-1"].networks["n"].startswith("10.77.2.")
    assert states()["b-1"] == before["b-1"]


def test_a_network_that_changed_is_kept_while_others_are_in_it(project):
    services = f"a: {IDLE}, networks: [n]}}\nb: {IDLE}, networks: [n]}}"
    compose_run.up(project(services, top="networks:\n  n:\n"))
    before = states()
    with pytest.raises(UpFailed, match=f"network n changed, but {NAME}-b-1 is in it"):
        compose_run.up(project(services, top="networks:\n  n: {internal: true}\n"), services=["a"])
    assert states() == before


def test_an_image_built_anew_makes_its_container_anew(project, tmp_path):
    what = project(f"a: {{build: {{context: .}}, command: sleep 1000, stop_signal: SIGKILL}}\nb: {IDLE}}}")
    for number, given, kinds in ((1, {}, ["create", "create"]), (2, {}, ["keep", "keep"]),
                                 (3, {"build": True}, ["recreate", "keep"]), (3, {"build": True}, ["keep", "keep"])):
        (tmp_path / "Dockerfile").write_text(f"FROM busybox\nENV N={number}\n")
        assert [one.kind for one in compose_run.up(what, **given)] == kinds
    assert "N=3" in compose_run.execute(NAME, "a", ["env"]).stdout.splitlines()


def test_what_lives_in_anothers_network_follows_it(project):
    services = f"a: {IDLE}, environment: {{X: '%s'}}}}\nb: {IDLE}, network_mode: 'service:a'}}\nc: {IDLE}}}"
    for number in (1, 2):
        compose_run.up(project(services % number))
        inside = [os.readlink(f"/proc/{states()[one].pid}/ns/net") for one in ("a-1", "b-1")]
        assert inside[0] == inside[1]
        assert states()["c-1"].networks["default"] in compose_run.execute(NAME, "b", ["nslookup", "c"]).stdout
        names = [compose_run.execute(NAME, one, ["cat", "/etc/hosts", "/etc/resolv.conf"]).stdout for one in "ab"]
        assert names[0] == names[1]
    compose_run.down(NAME)
    compose_run.up(project(f"a: {IDLE}, network_mode: host}}\nb: {IDLE}, network_mode: 'service:a'}}"))
    assert os.readlink(f"/proc/{states()['b-1'].pid}/ns/net") == f"net:[{os.stat(HOST.path).st_ino}]"


# Waiting


def test_no_healthcheck_is_no_reason_to_wait(project):
    off = f"{IDLE}, healthcheck: {{disable: true}}}}"
    compose_run.up(project(f"a: {off}\nb: {IDLE}, healthcheck: {{test: [NONE]}}}}"), wait=True)
    assert {one.health for one in states().values()} == {""}
    with pytest.raises(UpFailed, match=f"{NAME}-a-1 has no healthcheck"):
        compose_run.up(project(f"a: {off}\nc: {IDLE}, depends_on: {{a: {{condition: service_healthy}}}}}}"))


def test_who_waits_is_told_of_an_end_that_nobody_asked_for(project):
    services = """
a: {image: 'busybox:lab', command: 'true'}
b: {image: 'busybox:lab', command: sleep 1000, stop_signal: SIGKILL, depends_on: {a: {condition: %s}},
  healthcheck: {test: [CMD, 'true'], interval: 500ms}}
"""
    compose_run.up(project(services % "service_completed_successfully"), wait=True)
    assert states()["b-1"].health == "healthy"
    compose_run.down(NAME)
    with pytest.raises(UpFailed, match=rf"{NAME}-a-1 exited \(0\)"):
        compose_run.up(project(services % "service_started"), wait=True)


def test_the_healthcheck_of_an_image(project, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM busybox\nHEALTHCHECK --interval=100ms CMD test -e /ready\n")
    compose_run.up(project("""
a: {build: {context: .}, command: "sh -c 'sleep 0.3; touch /ready; exec sleep 1000'", stop_signal: SIGKILL}
b: {build: {context: .}, command: sleep 1000, stop_signal: SIGKILL, healthcheck: {disable: true}}
c: {build: {context: .}, command: sleep 1000, stop_signal: SIGKILL, healthcheck: {retries: 1}}
"""))
    until(lambda: [one.health for one in states().values()] == ["healthy", "", "unhealthy"])


def test_start_goes_forwards(project):
    compose_run.up(project(f"a: {IDLE}, depends_on: [b]}}\nb: {IDLE}, depends_on: [c]}}\nc: {IDLE}}}"))
    compose_run.stop(NAME)
    compose_run.start(NAME)
    started = [one.container for one in compose_run.events(NAME) if one.what == "started"]
    assert started[3:] == started[:3] == [f"{NAME}-{one}-1" for one in "cba"]


# Images


def test_an_image_comes_from_a_registry_once(project):
    lab_image = image.Layout(compose_run.LAYOUT)
    with registry_server.serve() as server:
        with registry.Registry(server.host) as there:
            registry.push(there, "tools/busybox", "v1", lab_image, "busybox")
        name = f"{server.host}/tools/busybox:v1"
        what = project(f"a: {IDLE.replace('busybox:lab', name)}}}")
        never = project(f"a: {IDLE.replace('busybox:lab', name)}, pull_policy: never}}")
        with pytest.raises(ComposeError, match="pull_policy: never"):
            compose_run.up(never)
        compose_run.up(what)
    assert [one.kind for one in compose_run.up(what)] == ["keep"]  # the registry is gone
    assert [one.kind for one in compose_run.up(never)] == ["keep"]
    with pytest.raises(ComposeError, match="no such image"):
        compose_run.up(project(f"a: {IDLE.replace('busybox:lab', name)}, pull_policy: always}}"))
    assert states()["a-1"].status == "running"


def test_only_what_is_asked_for_needs_its_image(project):
    compose_run.up(project(f"a: {IDLE}}}\nb: {IDLE}, depends_on: [a]}}\nc: {{image: 'gone:lab'}}"), services=["b"])
    assert sorted(states()) == ["a-1", "b-1"]


# Ports


def test_ports_of_a_range_and_any(project):
    idle = IDLE.replace("sleep 1000", "httpd -f -p 80 -h /etc")
    what = project(f"web: {idle}, ports: ['8085-8087:80', '80'], scale: 2}}")
    compose_run.up(what)
    ports = compose_run.ports(NAME)
    assert [ports[f"{NAME}-web-{number}"][0] for number in (1, 2)] == ["0.0.0.0:8085->80/tcp", "0.0.0.0:8086->80/tcp"]
    every = {int(one.split(":")[1].split("-")[0]) for row in ports.values() for one in row}
    assert len(every) == 4
    for port in every:
        get = ["curl", "-s", f"http://127.0.0.1:{port}/passwd"]
        until(lambda get=get: "root:x:0:0" in HOST.run(get, check=False))
    with pytest.raises(UpFailed, match=f"{NAME}-web-4: port: .*8085-8087.* left as they are: .*web-3"):
        compose_run.up(what, scale={"web": 4})


def test_a_port_that_somebody_has(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    with firewall.answering(HOST, 8085), pytest.raises(UpFailed, match=f"{NAME}-b-1: port: '8085': .*in use"):
        compose_run.up(project(f"a: {IDLE}}}\nb: {IDLE}, ports: ['8085:80']}}"))
    assert list(states()) == ["a-1"]


# Refused by name


@pytest.mark.parametrize(("services", "top", "match"), [
    ("ports: ['80:80']}\nb: {image: x, ports: ['80:81']", "", r"yaml:4:25: services\.b\.ports\.0: '80'.*by a"),
    ("ports: ['80:80']}\nb: {image: x, ports: ['127.0.0.1:80:81']", "", r"services\.b\.ports\.0"),
    ("ports: ['[::1]:80:80']", "", r"services\.a\.ports\.0\.host_ip"),
    ("network_mode: bridge", "", r"yaml:3:\d+: services\.a\.network_mode: 'bridge'"),
    ("network_mode: 'container:x'", "", r"services\.a\.network_mode"),
    ("network_mode: host, ports: ['80:80']", "", r"services\.a\.ports.*network_mode"),
    ("networks: {default: {mac_address: '02:00:00:00:00:01'}}", "", r"services\.a\.networks\.default\.mac_address"),
    ("volumes: [{type: bind, source: ., target: /d, bind: {propagation: shared}}]", "",
     r"services\.a\.volumes\.0\.bind\.propagation"),
    ("volumes: [{type: volume, source: v, target: /d, volume: {subpath: x}}]", "volumes: {v: }\n",
     r"services\.a\.volumes\.0\.volume\.subpath"),
    ("tmpfs: ['/x:size=1m']", "", r"services\.a\.tmpfs\.0"),
    ("volumes: [{type: tmpfs, target: /d, tmpfs: {size: 1m}}]", "", r"services\.a\.volumes\.0\.tmpfs\.size"),
    ("secrets: [{source: k, uid: '5'}]", "secrets: {k: {file: ./k}}\n", r"services\.a\.secrets\.0\.uid"),
    ("secrets: [k]", "secrets:\n  k: {external: true}\n", r"yaml:5:\d+: secrets\.k\.external"),
    ("secrets: [k]", "secrets: {k: {environment: X}}\n", r"secrets\.k\.environment"),
    ("networks: [n]", "networks:\n  n: {ipam: {config: [{subnet: 10.1.0.0/24, ip_range: 10.1.0.0/25}]}}\n",
     r"networks\.n\.ipam\.config\.0\.ip_range"),
    ("networks: [n]", "networks:\n  n: {ipam: {driver: x}}\n", r"networks\.n\.ipam\.driver"),
    ("networks: [n]", "networks:\n  n: {ipam: {config: [{subnet: 'fd42::/64'}]}}\n", r"networks\.n\.ipam\.config\.0"),
])
def test_what_would_be_ignored_is_refused(project, services, top, match):
    with pytest.raises(ComposeError, match=match):
        compose_run.up(project(f"a: {{image: 'busybox:lab', {services}}}", top=top))
    assert not os.path.exists(f"{FOLDER}/{NAME}")


def test_a_bind_whose_source_must_be_there(project, tmp_path):
    row = f"a: {IDLE}, volumes: [{{type: bind, source: ./no, target: /d, bind: {{create_host_path: %s}}}}]}}"
    with pytest.raises(ComposeError, match=r"services\.a\.volumes\.0\.source: '.*/no': .*not there"):
        compose_run.up(project(row % "false"))
    assert not (tmp_path / "no").exists()
    compose_run.up(project(row % "true"))
    assert (tmp_path / "no").is_dir()


def test_nocopy_and_the_host_as_a_name(project):
    compose_run.up(project(f"a: {IDLE}, extra_hosts: ['up:host-gateway'], volumes: ["
                           "{type: volume, source: v, target: /etc/x, volume: {nocopy: true}},"
                           "{type: volume, source: w, target: /bin/}]}", top="volumes: {v: , w: }\n"))
    assert compose_run.execute(NAME, "a", ["ls", "/etc/x"]).stdout == ""
    assert "10.88.0.1\tup" in compose_run.execute(NAME, "a", ["cat", "/etc/hosts"]).stdout


def test_a_line_half_written_is_read_later(project):
    compose_run.up(project(f"a: {IDLE}}}"))
    with open(f"{FOLDER}/{NAME}/units/{NAME}-a-1/log", "a", encoding="utf-8") as log:
        log.write(json.dumps({"time": 1.0, "stream": "stdout", "text": "whole"}) + '\n{"time": 2')
        log.flush()
        assert compose_run.logs(NAME, prefix=False) == "whole\n"


def test_a_name_that_is_not_up():
    for ask in (compose_run.stop, compose_run.start, compose_run.events):
        with pytest.raises(BadInput, match="is not up"):
            ask("labs-nobody")
    began = time.monotonic()
    compose_run.down("labs-nobody")
    assert time.monotonic() - began < 5
