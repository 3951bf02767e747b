"""Compose files as labs reads them, against `docker compose config`, which needs no daemon."""

import json
import os
import re
import subprocess

import pytest

from labs import compose_file
from labs.compose_yaml import ComposeError
from labs.errors import BadInput

ENV = {"PATH": os.environ["PATH"], "HOME": "/root", "WHO": "kyoto", "EMPTY": ""}
BASE = "services:\n  a:\n    image: busybox:lab\n"
# name → files by name; the first, with those named over*.yaml, is what is loaded.
FILES = {
    "smallest": {"compose.yaml": BASE},
    "command as a string": {"compose.yaml": BASE + "    command: sh -c 'echo \"a b\" c'\n"},
    "command as a list": {
        "compose.yaml": BASE + "    command: [sh, -c, 'echo $$HOME']\n    entrypoint: [/bin/busybox]\n"},
    "an entrypoint of nothing": {"compose.yaml": BASE + "    entrypoint: []\n"},
    "environment as a list": {"compose.yaml": BASE + "    environment: [A=1, B=, WHO, NOBODY, 'C=x=y']\n"},
    "environment as a mapping": {
        "compose.yaml": BASE + "    environment: {A: 1, B: '', WHO: , NOBODY: , T: 'true', F: 1.5}\n"},
    "environment from files": {
        "compose.yaml": BASE + "    env_file: [one.env, two.env]\n    environment: [A=here]\n",
        "one.env": "A=1\nB='single $A'\nC=\"double $WHO\\n\"\n# a comment\nexport D=d # behind\nE\n",
        "two.env": "B=later\nF=${B}-${NOBODY:-none}\nG=a#b\n"},
    "an env file that may be missing": {"compose.yaml": BASE + "    env_file: [{path: no.env, required: false}]\n"},
    "variables": {"compose.yaml": BASE + """    environment:
      PLAIN: $WHO and ${WHO}
      DEFAULTS: ${NO-a} ${NO:-b} ${EMPTY-c} ${EMPTY:-d} ${WHO:-e}
      OTHERS: "[${NO+a}] [${NO:+b}] [${EMPTY+c}] [${EMPTY:+d}] [${WHO:+e}]"
      NESTED: ${NO:-${ALSO:-$WHO}} ${NO-${EMPTY:-deep}}
      REQUIRED: ${WHO?must be} ${WHO:?must be} ${EMPTY?may be empty}
      DOLLAR: $$WHO $${WHO} 5$$
      NOTHING: "[$NO] [${NO}]"
"""},
    "the file .env": {"compose.yaml": BASE + "    environment: {A: '${A}', B: '${B}', C: '${WHO}'}\n",
                      ".env": "A=from file\nB=${A} again\nWHO=not me\n"},
    "a variable that is a number": {
        "compose.yaml": BASE + "    scale: ${N:-3}\n    init: ${YES:-true}\n    read_only: ${NO:-false}\n"},
    "ports": {"compose.yaml": BASE + """    ports:
      - "8080:80"
      - 127.0.0.1:8081:81/udp
      - "9000-9002:90-92"
      - "70"
      - 71-72
      - {target: 5, published: 6, protocol: udp, host_ip: 127.0.0.1, mode: host}
      - "[::1]:8082:82"
      - "7000-7010:77"
"""},
    "ports in base sixty": {"compose.yaml": BASE + "    ports:\n      - 22:22\n      - 1:59\n"},
    "volumes": {"compose.yaml": BASE + """    volumes:
      - ./data:/data
      - /srv:/srv:ro
      - named:/named:ro
      - other:/other:nocopy
      - /anonymous
      - {type: tmpfs, target: /t, tmpfs: {size: 10m}}
      - {type: bind, source: ./x, target: /x, bind: {propagation: rslave}}
      - {type: volume, source: named, target: /again}
      - ../up:/up:rshared
volumes:
  named:
  other: {driver_opts: {type: tmpfs}, labels: [a=b]}
  unused:
"""},
    "networks": {"compose.yaml": BASE + """    networks: [front, back]
  b:
    image: busybox:lab
    networks: {front: {aliases: [one, two], ipv4_address: 10.9.0.7}, back: }
  c:
    image: busybox:lab
    network_mode: none
networks:
  front: {ipam: {config: [{subnet: 10.9.0.0/24, gateway: 10.9.0.1}]}}
  back: {internal: true, labels: {x: y}}
  unused:
  default: {driver: bridge}
"""},
    "external things": {"compose.yaml": BASE + """    networks: [out]
    volumes: ["kept:/v"]
networks:
  out: {external: true}
volumes:
  kept: {external: true, name: real}
"""},
    "depends_on in short": {"compose.yaml": BASE + "    depends_on: [b]\n  b: {image: busybox:lab}\n"},
    "depends_on in long": {"compose.yaml": BASE + """    depends_on:
      b: {condition: service_healthy, restart: true}
      c: {condition: service_completed_successfully, required: false}
      idle: {condition: service_started, required: false}
  b: {image: busybox:lab, healthcheck: {test: [CMD, "true"]}}
  c: {image: busybox:lab}
  idle: {image: busybox:lab, profiles: [never]}
"""},
    "implied dependencies": {"compose.yaml": BASE + """    network_mode: service:b
  b: {image: busybox:lab, links: ["c:alias"], ipc: "service:c"}
  c: {image: busybox:lab}
"""},
    "healthchecks": {"compose.yaml": BASE + """    healthcheck:
      {test: exit 0, interval: 90s, timeout: 1500ms, retries: 2, start_period: 1h2m3s, start_interval: 5ms}
  b: {image: busybox:lab, healthcheck: {disable: true}}
  c: {image: busybox:lab, healthcheck: {test: [NONE]}}
  d: {image: busybox:lab, healthcheck: {test: [CMD-SHELL, "exit 1"]}}
"""},
    "secrets and configs": {"compose.yaml": BASE + """    secrets:
      [one, {source: two, target: /etc/two, uid: "5", gid: "6", mode: 0440}]
    configs: [here, {source: there, target: /etc/there, mode: "0400"}]
secrets:
  one: {file: ./one.txt}
  two: {environment: WHO}
configs:
  here: {content: "hello ${WHO}"}
  there: {file: ./there.txt}
""", "one.txt": "1", "there.txt": "2"},
    "build": {"compose.yaml": """services:
  a: {build: .}
  b:
    image: mine
    build: {context: ./sub, dockerfile: Other, target: last, args: [A=1, WHO, NOBODY], labels: [x=y]}
  c: {build: {context: ., dockerfile_inline: "FROM scratch", args: {N: 1, B: true}}}
"""},
    "deploy": {"compose.yaml": BASE + """    deploy:
      {replicas: 3, resources: {limits: {cpus: "0.25", memory: 64m, pids: 9}, reservations: {memory: 1g}}}
  b: {image: busybox:lab, deploy: {labels: [a=b], placement: {max_replicas_per_node: 1}}}
"""},
    "sizes and times": {"compose.yaml": BASE + """    mem_limit: 1.5g
    mem_reservation: 64MB
    shm_size: 16kb
    cpus: 0.5
    pids_limit: 20
    stop_grace_period: 90s
    stop_signal: SIGQUIT
"""},
    "lists and single values": {"compose.yaml": BASE + """    dns: 1.1.1.1
    tmpfs: /run
    expose: [80, "81/udp"]
    cap_add: [NET_ADMIN]
    cap_drop: [ALL]
    security_opt: [no-new-privileges]
    extra_hosts: ["one:1.2.3.4", "two=::1"]
    group_add: [5, staff]
"""},
    "mappings that may be lists": {"compose.yaml": BASE + """    labels: [a=1, b]
    sysctls: {net.core.somaxconn: 1024}
    annotations: [x=y]
    extra_hosts: {one: 1.2.3.4}
  b: {image: busybox:lab, labels: {n: 1, t: true, nothing: }}
"""},
    "who and where": {"compose.yaml": BASE + """    user: "5:6"
    working_dir: /srv
    hostname: box
    container_name: mine
    restart: on-failure:3
    init: true
    tty: true
    stdin_open: true
    privileged: true
    read_only: true
"""},
    "profiles": {"compose.yaml": BASE + "    depends_on: [c]\n  b: {image: busybox:lab, profiles: [debug]}\n"
                                        "  c: {image: busybox:lab, profiles: [on, other]}\n"},
    "anchors and merge keys": {"compose.yaml": """x-common: &common
  image: busybox:lab
  environment: &env {A: 1, B: 2}
x-more: &more {restart: always, init: true}
services:
  a: {<<: *common, command: "true"}
  b:
    <<: [*more, *common]
    environment: {<<: *env, B: 3}
"""},
    "extends in one file": {"compose.yaml": BASE + """    environment: [A=1, B=2]
    expose: ["80"]
    command: one
  b:
    extends: {service: a}
    environment: [B=3]
    command: two
  c: {extends: b, image: other}
"""},
    "extends from another file": {
        "compose.yaml": """services:
  a:
    extends: {file: sub/common.yaml, service: base}
    labels: {own: 1}
""",
        "sub/common.yaml": BASE.replace("  a:", "  base:") + "    volumes: ['./here:/here']\n    labels: [theirs=2]\n"
                           "    extends: root\n  root: {image: old, env_file: r.env}\n", "sub/r.env": "R=1\n"},
    "include": {
        "compose.yaml": "include:\n  - sub/other.yaml\n" + BASE + "    depends_on: [b]\n",
        "sub/other.yaml": """services:
  b: {image: busybox:lab, volumes: ['./v:/v', 'data:/d'], environment: ['X=${X}']}
volumes:
  data:
""", "sub/.env": "X=below\n"},
    "include with its own folder": {
        "compose.yaml": """include:
  - {path: [sub/one.yaml, sub/two.yaml], project_directory: ., env_file: e.env}
""" + BASE,
        "sub/one.yaml": "services:\n  b: {image: '${IMAGE}', volumes: ['./v:/v']}\n",
        "sub/two.yaml": "services:\n  b: {environment: [A=1]}\n", "e.env": "IMAGE=busybox:lab\n"},
    "an override": {
        "compose.yaml": BASE + """    command: first
    environment: [A=1, B=2]
    ports: ["8080:80"]
    volumes: ["./one:/data", "./two:/two"]
    labels: {a: 1}
    dns: [1.1.1.1]
    healthcheck: {test: [CMD, a, b], retries: 3}
""",
        "over.yaml": """services:
  a:
    command: second
    environment: {B: 3, C: 4}
    ports: ["9090:80", "8080:80"]
    volumes: ["./other:/data"]
    labels: [b=2]
    dns: [2.2.2.2, 1.1.1.1]
    healthcheck: {test: [CMD, c], timeout: 1s}
  b: {image: new}
"""},
    "reset and override": {
        "compose.yaml": BASE + """    ports: ['80:80']
    environment: {A: 1, B: 2}
    command: x
    restart: always
""",
        "over.yaml": "services:\n  a:\n    ports: !override ['81:81']\n    command: !reset null\n"
                     "    environment: {A: !reset null}\n    restart: !reset null\n"},
    "a name": {"compose.yaml": "name: given-${WHO}\n" + BASE},
    "names that are also keys of Compose": {"compose.yaml": """services:
  init:
    build: {context: ., args: {init: "yes", mode: "0755", N: 1.0}}
    environment: {tty: "yes", external: "on", init: "1", scale: "010", mode: "0755"}
    labels: {disable: "0"}
    sysctls: {a.scale: "010"}
    logging: {driver: x, options: {mode: "010", max-file: 3, tty: "yes"}}
    volumes: ["data:/data"]
volumes:
  data: {driver_opts: {mode: "0755", init: "yes", n: 5}}
"""},
    "numbers as Go writes them": {"compose.yaml": BASE + """    environment:
      {A: 1.0, B: 1e3, C: 1234567.5, D: 0.00001, E: 123456.0, F: 1e6, G: -2.50, H: 0.0, I: 1e21, J: 0.0001}
    labels: {a: 1.50, b: 2.0}
"""},
    "targets with a slash behind": {"compose.yaml": BASE + """    volumes:
      - ./a/:/b/
      - {type: bind, source: ./x, target: /x/}
"""},
    "a build of all sorts": {"compose.yaml": """services:
  a: {build: {context: ., extra_hosts: ["a:1.2.3.4"], shm_size: 64m}}
  b: {build: "https://github.com/x/y.git#main"}
  c: {build: "git@github.com:x/y.git"}
"""},
    "false is said": {"compose.yaml": BASE + "    attach: false\n    init: false\n    memswap_limit: -1\n"},
    "volumes of another": {"compose.yaml": BASE + "    volumes_from: ['b:ro']\n  b: {image: x}\n"},
    "extensions": {"compose.yaml": "x-a: {b: c}\n" + BASE + "    x-own: 1\n"},
}
# What labs prints otherwise, and why: case → paths.
OTHERWISE = {
    "anchors and merge keys": ["x-common", "x-more"], "extensions": ["x-a"],  # read by nobody
    "depends_on in long": ["services.a.depends_on.idle"],  # optional, and not there: nothing waits for it
}
PROFILES = {"profiles": ["on"]}


def written(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return [str(folder / name) for name in files if name == "compose.yaml" or name.startswith("over")]


def judged(paths, folder, profiles=()):
    words = [word for path in paths for word in ("-f", path)]
    words += [word for one in profiles for word in ("--profile", one)]
    return subprocess.run(["docker", "compose", *words, "config", "--format", "json"], cwd=folder, env=ENV, text=True,
                          capture_output=True, check=False)


def differences(ours, theirs, path=""):
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(set(ours) | set(theirs)):
            yield from differences(ours.get(key, "absent"), theirs.get(key, "absent"), f"{path}.{key}".lstrip("."))
    elif ours != theirs:
        yield f"{path}: {json.dumps(ours)} != {json.dumps(theirs)}"


@pytest.mark.parametrize("case", FILES)
def test_as_docker_compose_reads_it(case, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    paths = written(folder, FILES[case])
    profiles = PROFILES.get(case, ())
    theirs = judged(paths, folder, profiles)
    assert theirs.returncode == 0, theirs.stderr
    ours = compose_file.load(*paths, env=ENV, profiles=profiles).json()
    found = list(differences(ours, json.loads(theirs.stdout.replace("$$", "$"))))  # printed to be read again
    assert [line.partition(":")[0] for line in found] == OTHERWISE.get(case, []), found


BAD = {
    "no mapping": ("[1, 2]", "1:1", "YAML|mapping"),
    "empty": ("", "", "empty"),
    "broken YAML": ("services:\n  a: {image: x\n  b: y\n", "3:", "YAML"),
    "a tab": ("services:\n\ta: 1\n", "2:1", "YAML"),
    "a key twice": (BASE + "    image: other\n", "4:5", "services.a.image.*twice"),
    "an unknown tag": (BASE + "    command: !mine x\n", "4:14", "services.a.command.*tag"),
    "an anchor in itself": ("services: &s\n  a: *s\n", "1:11", "anchor"),
    "an unknown key": (BASE + "    colour: red\n", "4:5", "services.a.colour.*no such key"),
    "an unknown key at the top": (BASE + "service: {}\n", "4:1", "service.*no such key"),
    "a wrong type": (BASE + "    environment: 5\n", "4:5", "services.a.environment"),
    "a wrong type below": (BASE + "    ports:\n      - [1]\n", "5:9", r"services.a.ports.0"),
    "no image": ("services:\n  a: {command: x}\n", "2:3", "services.a.*neither an image nor a build"),
    "no service": ("services: {}\n", "1:1", "services.*no service"),
    "an undefined dependency": (BASE + "    depends_on: [b]\n", "4:5", "services.a.depends_on.b.*no such service"),
    "a dependency of an idle profile": (BASE + "    depends_on: [b]\n  b: {image: x, profiles: [p]}\n", "4:5",
                                         "profile"),
    "an undefined network": (BASE + "    networks: [front]\n", "4:5", "services.a.networks.front.*not among"),
    "an undefined volume": (BASE + "    volumes: ['data:/data']\n", "4:15", "services.a.volumes.0.*not among"),
    "an undefined secret": (BASE + "    secrets: [key]\n", "4:15", "services.a.secrets.0.*not among"),
    "an undefined config": (BASE + "    configs: [{source: key}]\n", "4:15", "services.a.configs.0.*not among"),
    "a secret of nothing": (BASE + "    secrets: [k]\nsecrets:\n  k: {}\n", "6:3", "secrets.k.*must have a file"),
    "a required variable": ("services:\n  a:\n    image: x:${TAG:?no tag}\n", "3:5", "required variable TAG.*no tag"),
    "an empty required variable": ("services:\n  a:\n    image: x:${EMPTY:?no tag}\n", "3:5",
                                   "required variable EMPTY"),
    "an unclosed variable": ("services:\n  a:\n    image: x:${TAG\n", "3:5", "not closed"),
    "a broken variable": ("services:\n  a:\n    image: x:${1x}\n", "3:5", "must be"),
    "a port out of range": (BASE + "    ports: ['80:70000']\n", "4:13", "services.a.ports.0.*65535"),
    "a port that is none": (BASE + "    ports: ['x:80']\n", "4:13", "services.a.ports.0.*must be"),
    "a port range that does not fit": (BASE + "    ports: ['1-2:1-3']\n", "4:13", "same length"),
    "an address that is none": (BASE + "    ports: ['1.2.3:80:80']\n", "4:13", "IP address"),
    "a protocol that is none": (BASE + "    ports: ['80:80/xyz']\n", "4:13", "protocol"),
    "a port published twice": (BASE + "    ports: ['80:80']\n  b:\n    image: x\n    ports: ['80:81']\n", "7:13",
                               "services.b.ports.0.*already published by a"),
    "a port of all addresses and of one": (BASE + "    ports: ['0.0.0.0:80:80']\n  b:\n    image: x\n"
                                           "    ports: ['127.0.0.1:80:81']\n", "7:13", "already published by a"),
    "a port without target": (BASE + "    ports: [{published: 80}]\n", "4:13", "ports.0.*must have a target"),
    "a volume without target": (BASE + "    volumes: [{type: bind, source: /x}]\n", "4:15", "must have a target"),
    "a secret without source": (BASE + "    secrets: [{target: /x}]\n", "4:15", "secrets.0.*must have a source"),
    "a config without source": (BASE + "    configs: [{target: /x}]\n", "4:15", "configs.0.*must have a source"),
    "a secret of two sources": (BASE + "    secrets: [k]\nsecrets:\n  k: {file: f, environment: WHO}\n", "6:3",
                                "secrets.k.*environment and file"),
    "an external volume with a driver": (BASE + "    volumes: ['vol:/v']\nvolumes:\n  vol: {external: true, "
                                         "driver: x}\n", "6:25", "volumes.vol.driver.*external"),
    "a number that is none": (BASE + "    scale: abc\n", "4:5", "services.a.scale.*whole number"),
    "a truth that is none": (BASE + "    init: perhaps\n", "4:5", "services.a.init.*true or false"),
    "retries below none": (BASE + "    healthcheck: {retries: -1}\n", "4:5", "services.a.healthcheck.*0 or more"),
    "two scales": (BASE + "    scale: 2\n    deploy: {replicas: 3}\n", "4:5", "services.a.scale.*deploy.replicas"),
    "a key that is a number": (BASE + "    labels: {1: a}\n", "4:14", "services.a.labels.*a key must be a string"),
    "a tagged number that is none": (BASE + "    scale: !!int abc\n", "4:12", "services.a.scale.*no int"),
    "no end of a number": (BASE + "    cpus: .inf\n", "4:11", "services.a.cpus.*no float"),
    "nested without end": ("a: " + "[" * 3000 + "]" * 3000, "", "nested too deeply"),
    "a network of nobody": (BASE + "    network_mode: service:b\n", "4:5", "services.a.network_mode.*no such service"),
    "a link to nobody": (BASE + "    links: [b]\n", "4:5", "services.a.links.*no such service"),
    "a volume that is none": (BASE + "    volumes: ['a:b:c:d']\n", "4:15", "services.a.volumes.0"),
    "a mode that is none": (BASE + "    volumes: ['/a:/b:xx']\n", "4:15", "unknown mode xx"),
    "a duration that is none": (BASE + "    stop_grace_period: soon\n", "4:5", "services.a.stop_grace_period"),
    "a size that is none": (BASE + "    mem_limit: much\n", "4:5", "services.a.mem_limit.*size"),
    "two memory limits": (BASE + "    mem_limit: 1m\n    deploy: {resources: {limits: {memory: 2m}}}\n", "4:5",
                          "services.a.mem_limit.*differs"),
    "a test that is none": (BASE + "    healthcheck: {test: [curl, x]}\n", "4:5", "services.a.healthcheck.*CMD"),
    "a network and a mode": (BASE + "    network_mode: none\n    networks: [default]\n", "4:5", "network_mode"),
    "words that cannot be split": (BASE + "    command: sh -c 'x\n", "4:5", "services.a.command.*words"),
    "extends of nobody": (BASE + "    extends: b\n", "4:5", "no such service to extend"),
    "extends in a circle": (BASE + "    extends: b\n  b: {extends: c}\n  c: {extends: a}\n", "", "a → b → c → a"),
    "extends from no file": (BASE + "    extends: {file: no.yaml, service: b}\n", "4:5", "no such file"),
    "include of no file": ("include: [no.yaml]\n" + BASE, "1:11", "no such file"),
    "include of itself": ("include: [compose.yaml]\n" + BASE, "1:11", "includes itself"),
    "no env file": (BASE + "    env_file: no.env\n", "4:5", "services.a.env_file.*no such file"),
    "a name that is none": ("name: ß\n" + BASE, "1:1", "name.*lower case"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_file_line_column_and_key(case, tmp_path):
    text, place, rule = BAD[case]
    [path] = written(tmp_path, {"compose.yaml": text})
    with pytest.raises(ComposeError) as caught:
        compose_file.load(path, env=ENV)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"compose.yaml:{place}"), message
    assert re.search(rule, message), message


# What Docker takes although it cannot come about, or refuses later.
LATER = {"a port published twice", "a port of all addresses and of one", "an unknown tag", "a volume that is none",
         "a mode that is none", "no service"}


@pytest.mark.parametrize("case", sorted(set(BAD) - LATER))
def test_docker_refuses_the_same(case, tmp_path):
    written(tmp_path, {"compose.yaml": BAD[case][0]})
    assert judged([str(tmp_path / "compose.yaml")], tmp_path).returncode != 0


def test_what_an_include_brings_is_not_changed_in_the_same_file(tmp_path):
    written(tmp_path, {"compose.yaml": "include: [sub/b.yaml]\nservices:\n  b: {command: other}\n",
                       "sub/b.yaml": "services:\n  b: {image: busybox:lab}\n"})
    assert "conflicts with imported" in judged([str(tmp_path / "compose.yaml")], tmp_path).stderr
    with pytest.raises(ComposeError, match=r"b\.yaml:2:3: services\.b.*included"):
        compose_file.load(str(tmp_path / "compose.yaml"), env=ENV)


def test_aliases_that_unfold_without_end_are_refused(tmp_path):
    bomb = "x-a: &a [" + ", ".join("x" * 9) + "]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"x-{name}: &{name} [" + ", ".join(f"*{before}" for _ in range(9)) + "]\n"
    [path] = written(tmp_path, {"compose.yaml": bomb + BASE})
    with pytest.raises(ComposeError, match="aliases unfold into more values"):
        compose_file.load(path, env=ENV)


def test_the_files_of_a_directory_are_found(tmp_path):
    written(tmp_path, {"compose.yaml": BASE, "compose.override.yml": "services:\n  a: {command: over}\n"})
    assert compose_file.load(directory=str(tmp_path), env=ENV).services["a"]["command"] == ["over"]
    with pytest.raises(BadInput, match="holds none of"):
        compose_file.load(directory=str(tmp_path.parent), env=ENV)


def test_the_place_of_an_override_is_in_its_own_file(tmp_path):
    paths = written(tmp_path, {"compose.yaml": BASE, "over.yaml": "services:\n  a:\n    networks: [nowhere]\n"})
    with pytest.raises(ComposeError, match=r"over\.yaml:3:5: services\.a\.networks\.nowhere"):
        compose_file.load(*paths, env=ENV)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"compose file: 'no\.yaml': No such file"):
        compose_file.load(str(tmp_path / "no.yaml"), env=ENV)
