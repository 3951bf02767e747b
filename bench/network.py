"""Attach a container to a bridge network and detach it, by labs and by the real tools; then what the wire does.

Each tool has a host of its own (a network namespace), a bridge with one resident container, so that it stays, and the
same targets: namespaces without processes.  netavark gets its JSON on stdin as Podman gives it, once as Podman runs it
(with nftables rules) and once with no firewall, which is all that labs does; the CNI bridge plugin has host-local for
its addresses.  Docker is asked through the Engine API, without the cost of its client; its containers run.
What starts a program is timed around that program alone, in a child that is in the tool's host already.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

from bench.table import Row, main, show
from labs import network, process
from labs.netns import Netns

NETAVARK, CNI = "/usr/lib/podman/netavark", "/usr/lib/cni"
TARGETS, DOCKERS = 100, 10
PINGS, SECONDS, GIB = 500, 2, 1 << 30


class Way(NamedTuple):
    """Attach and detach target number N (0 is the resident): seconds each took; up to `most` targets."""

    attach: Callable[[int], float]
    detach: Callable[[int], float]
    most: int = 100


def _timed(argv: Sequence[str], stdin: str, env: Mapping[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(argv, input=stdin, env={**os.environ, **env}, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stdout} {done.stderr}")
    return taken


def _clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def ours(targets: Sequence[Netns]) -> Iterator[Way]:
    """Network.attach."""
    held: dict[int, AbstractContextManager[network.Attachment]] = {}
    with network.namespace("b-ours") as host, network.network(host) as net:

        def attach(number: int) -> float:
            held[number] = net.attach(targets[number])
            return _clock(held[number].__enter__)

        yield Way(attach, lambda number: _clock(lambda: held.pop(number).__exit__(None, None, None)))


def _netavark(number: int) -> str:
    """What Podman writes to netavark's stdin for one container in one network."""
    subnet = {"subnet": "10.42.0.0/24", "gateway": "10.42.0.1"}
    info = {
        "name": "bench",
        "id": "b" * 64,
        "driver": "bridge",
        "network_interface": "br0",
        "subnets": [subnet],
        "ipv6_enabled": False,
        "internal": False,
        "dns_enabled": False,
        "ipam_options": {"driver": "host-local"},
    }
    place = {"static_ips": [f"10.42.0.{number + 2}"], "interface_name": "eth0"}
    name = f"{number:064x}"
    return json.dumps(
        {
            "container_id": name,
            "container_name": name,
            "networks": {"bench": place},
            "network_info": {"bench": info},
        }
    )


@contextmanager
def netavark(targets: Sequence[Netns], firewall: str) -> Iterator[Way]:
    """`netavark setup` and `teardown`."""
    with network.namespace(f"b-{firewall}") as host, tempfile.TemporaryDirectory() as place:

        def run(verb: str, number: int) -> float:
            argv = [NETAVARK, "--config", place, verb, targets[number].path]
            return host.call(_timed, argv, _netavark(number), {"NETAVARK_FW": firewall})

        yield Way(lambda number: run("setup", number), lambda number: run("teardown", number))


@contextmanager
def cni(targets: Sequence[Netns]) -> Iterator[Way]:
    """The bridge plugin's ADD and DEL."""
    with network.namespace("b-cni") as host, tempfile.TemporaryDirectory() as place:
        ipam = {"type": "host-local", "dataDir": place, "subnet": "10.42.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}
        config = {"cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "br0", "isGateway": True}
        stdin = json.dumps({**config, "ipam": ipam})

        def run(verb: str, number: int) -> float:
            env = {
                "CNI_COMMAND": verb,
                "CNI_CONTAINERID": f"bench-{number}",
                "CNI_NETNS": targets[number].path,
                "CNI_IFNAME": "eth0",
                "CNI_PATH": CNI,
            }
            return host.call(_timed, [f"{CNI}/bridge"], stdin, env)

        yield Way(lambda number: run("ADD", number), lambda number: run("DEL", number))


@contextmanager
def docker(count: int) -> Iterator[tuple[Way, list[Any]]]:
    """`docker network connect` and `disconnect` of running containers, which are given too."""
    from docker import from_env

    with ExitStack() as undo:
        client = from_env(timeout=300)
        undo.callback(client.close)
        boxes = []
        for number in range(count + 1):
            command = {"image": "busybox:lab", "command": ["sleep", "1000000"], "detach": True}
            boxes.append(client.containers.run(name=f"labs-bench-{number}", **command))
            undo.callback(boxes[-1].remove, force=True)
        net = client.networks.create("labs-bench", driver="bridge")
        undo.callback(net.remove)
        yield (
            Way(
                lambda number: _clock(lambda: net.connect(boxes[number])),
                lambda number: _clock(lambda: net.disconnect(boxes[number], force=True)),
                count,
            ),
            boxes,
        )


@contextmanager
def resident(way: Way) -> Iterator[Way]:
    """The way, with target 0 attached: the bridge is there before and stays after."""
    way.attach(0)
    try:
        yield way
    finally:
        way.detach(0)


def _row(who: str, times: Sequence[float]) -> Row:
    return Row(who, statistics.median(times), min(times), len(times))


def _table(title: str, attach: Mapping[str, list[float]], detach: Mapping[str, list[float]]) -> list[Row]:
    """Print both halves with their ratios to ours, the first one; give all rows."""
    rows = []
    for verb, times in (("attach", attach), ("detach", detach)):
        half = [_row(who, taken) for who, taken in times.items()]
        show(f"{title}, {verb}", half, [half[0].who])
        rows += [row._replace(who=f"{row.who}, {title}, {verb}") for row in half]
    return rows


def one_container(ways: Mapping[str, Way], runs: int) -> list[Row]:
    """One more container beside the resident one, each way in turn."""
    attach: dict[str, list[float]] = {who: [] for who in ways}
    detach: dict[str, list[float]] = {who: [] for who in ways}
    for round_ in range(-1, runs):
        for who, way in ways.items():
            taken = way.attach(1), way.detach(1)
            if round_ >= 0:
                attach[who].append(taken[0])
                detach[who].append(taken[1])
    return _table("one container", attach, detach)


def growth(ways: Mapping[str, Way]) -> list[Row]:
    """1, 10 and 100 containers in one network: seconds for each of them."""
    rows = []
    for count in (1, 10, TARGETS):
        able = {who: way for who, way in ways.items() if count <= way.most}
        for who in ways.keys() - able.keys():
            print(f"\n{who}: not with {count} containers, which take too long to start")
        numbers = range(1, count + 1)
        attach, detach = {}, {}
        for who, way in able.items():
            attach[who] = [way.attach(number) for number in numbers]
            detach[who] = [way.detach(number) for number in numbers]
        rows += _table(f"each of {count}", attach, detach)
    return rows


class Place(NamedTuple):
    """Two containers on one bridge, and the second one's address."""

    a: Netns
    b: Netns
    address: str


def _ping(place: Place) -> float:
    """Seconds of a thousand round trips, from ping's mean in milliseconds."""
    words = place.a.run(["ping", "-q", "-c", str(PINGS), "-i", "0.002", place.address]).split("=")[-1]
    return float(words.split("/")[1])


def _iperf(place: Place) -> float:
    """Seconds for a GiB, as the receiver saw it."""
    with place.b.spawn(["iperf3", "--server", "--one-off", "--logfile", "/dev/null"]):
        process.until(lambda: ":5201" in place.b.run(["ss", "-Hltn"]))
        answer = json.loads(place.a.run(["iperf3", "--client", place.address, "--time", str(SECONDS), "--json"]))
    total = answer["end"]["sum_received"]
    return float(total["seconds"] / total["bytes"] * GIB)


def wire(places: Mapping[str, Place], runs: int) -> list[Row]:
    """Round trip and bulk transfer between two containers on a bridge: the kernel does it, whoever made it."""
    rows = []
    works = {"a thousand round trips": _ping}
    if shutil.which("iperf3"):
        works["a GiB over TCP"] = _iperf
    for title, work in works.items():
        times: dict[str, list[float]] = {who: [] for who in places}
        for _ in range(runs):
            for who, place in places.items():
                times[who].append(work(place))
        half = [_row(who, taken) for who, taken in times.items()]
        show(title, half, [half[0].who])
        rows += [row._replace(who=f"{row.who}, {title}") for row in half]
    return rows


def measure(runs: int) -> Sequence[Row]:
    """All of it; rows in the order they were printed."""
    makers = {
        "labs": ours,
        "netavark": lambda targets: netavark(targets, "nftables"),
        "netavark, no firewall": lambda targets: netavark(targets, "none"),
        "CNI bridge": cni,
    }
    with ExitStack() as stack:
        targets = [stack.enter_context(network.namespace(f"b-{number}")) for number in range(TARGETS)]
        ways, places = {}, {}
        for number, (who, make) in enumerate(makers.items()):
            first = stack.enter_context(network.namespace(f"b-r{number}"))
            ways[who] = stack.enter_context(resident(stack.enter_context(make([first, *targets]))))
            places[who] = first
        if os.path.exists("/run/docker.sock"):
            way, boxes = stack.enter_context(docker(DOCKERS))
            ways["docker"] = stack.enter_context(resident(way))
        rows = [*one_container(ways, runs), *growth(ways)]
        ways["labs"].attach(1)
        stack.callback(ways["labs"].detach, 1)
        across = {"labs": Place(places["labs"], targets[0], "10.42.0.3")}
        if "docker" in ways:
            ways["docker"].attach(1)
            stack.callback(ways["docker"].detach, 1)
            a, b = (Netns.of_pid(box.attrs["State"]["Pid"]) for box in _reloaded(boxes[:2]))
            across["docker"] = Place(a, b, boxes[1].attrs["NetworkSettings"]["Networks"]["labs-bench"]["IPAddress"])
        return rows + wire(across, runs)


def _reloaded(boxes: Sequence[Any]) -> Sequence[Any]:
    for box in boxes:
        box.reload()
    return boxes


if __name__ == "__main__":
    main("network", measure)
