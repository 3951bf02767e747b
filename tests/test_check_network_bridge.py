"""The exercises of 04-network/01-veth-bridge: each wrong state gives its hint; packets agree."""

import subprocess
from contextlib import ExitStack

import pytest

from labs import container, network
from labs.check import UNANSWERED
from labs.check import network_bridge as check

NAMES = ["labs-host", "labs-web", "labs-db", "labs-cache"]
MENDED = """\
-n labs-cup link set eth0 up
-n labs-cup address del 10.43.0.3/32 dev eth0
-n labs-cup address add 10.43.0.3/24 dev eth0
-n labs-lan link set veth-tea master br0
-n labs-tea route add default via 10.43.0.1
-n labs-cup route add default via 10.43.0.1"""


def ip(script):
    for line in script.splitlines():
        subprocess.run(["ip", *line.split()], check=True)


@pytest.fixture(scope="module")
def lan():
    """The network that stands at the end of the notebook: labs-host with labs-web, labs-db and labs-cache."""
    with ExitStack() as stack:
        host, *others = [stack.enter_context(network.namespace(name)) for name in ("host", "web", "db", "cache")]
        net = stack.enter_context(network.network(host))
        for other in others:
            stack.enter_context(net.attach(other))
        yield


@pytest.fixture
def broken():
    check.broken()
    yield
    check.remove()


def test_repaired_hints_step_by_step(broken):
    """Each line of the solution leads to the next hint, the last one to success."""
    hints = ["`labs-cup` の `eth0` が down", "`10.43.0.3/32` です", "10.43.0.0/24 のアドレスがありません",
             "`veth-tea` は、どの bridge の", "`labs-tea` から 192.0.2.1", "`labs-cup` から 192.0.2.1"]
    for line, hint in zip(MENDED.splitlines(), hints, strict=True):
        verdict = check.repaired()
        assert not verdict
        assert hint in verdict.message
        ip(line)
    assert check.repaired()


def test_repaired_sees_new_faults(broken):
    """One fault after another, each taken back before the next; the last ones cannot be."""
    ip(MENDED)
    for hint, change, back in [
        ("`labs-tea` の `eth0` が down", "-n labs-tea link set eth0 down",
         "-n labs-tea link set eth0 up\n-n labs-tea route add default via 10.43.0.1"),
        ("`veth-cup` が down です", "-n labs-lan link set veth-cup down", "-n labs-lan link set veth-cup up"),
        ("`veth-cup` は、どの bridge の", "-n labs-lan link set veth-cup nomaster",
         "-n labs-lan link set veth-cup master br0"),
        ("`br0` が down です", "-n labs-lan link set br0 down", "-n labs-lan link set br0 up"),
        ("`br0` のアドレス", "-n labs-lan address del 10.43.0.1/24 dev br0",
         "-n labs-lan address add 10.43.0.1/24 dev br0"),
        ("10.43.0.2 へ向かって", "-n labs-cup route replace default via 10.43.0.2",
         "-n labs-cup route replace default via 10.43.0.1"),
        ("192.0.2.1 への ping に返事がありません", "-n labs-lan address del 192.0.2.1/32 dev lo", ""),
        ("もう片端が、`labs-lan` に", ("-n labs-cup link delete eth0\n"
         "-n labs-cup link add eth0 up type veth peer name eth9\n-n labs-cup link set eth9 up\n"
         "-n labs-cup address add 10.43.0.3/24 dev eth0"), ""),
        ("`labs-tea` の `eth0` がなくなりました", "-n labs-lan link delete veth-tea", ""),
        ("`check.broken()` で作り直してください", "netns delete labs-tea", ""),
    ]:
        ip(change)
        verdict = check.repaired()
        assert not verdict
        assert hint in verdict.message
        ip(back)


def test_broken_twice_is_as_once(broken):
    check.broken()
    assert "`labs-cup` の `eth0` が down" in check.repaired().message


@pytest.fixture(scope="module")
def running(lan):
    with container.Container(["sleep", "600"]) as box:
        yield box.pid


@pytest.fixture
def box(running):
    """The process of a container that has lo alone, before and after."""
    yield running
    for name in ("eth0", "veth9"):
        subprocess.run(["nsenter", f"--net=/proc/{running}/ns/net", "ip", "link", "delete", name], capture_output=True)
    subprocess.run(["ip", "-n", "labs-host", "link", "delete", "veth-box"], capture_output=True)


def attach(pid, address="10.42.0.9/24", name="eth0"):
    """The solution, line by line: what to type, and the hint before it."""
    inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
    host = ["ip", "-n", "labs-host"]
    return [
        ("まだ `lo` しか", [*host, "link", "add", "veth-box", "type", "veth", "peer", "name", name]),
        ("両端が、まだ `labs-host`", [*host, "link", "set", name, "netns", str(pid)]),
        ("`veth-box` が、まだ `br0` の", [*host, "link", "set", "veth-box", "master", "br0"]),
        ("`veth-box` が down", [*host, "link", "set", "veth-box", "up"]),
        ("`eth0` が down", [*inside, "link", "set", "eth0", "up"]),
        ("アドレスがありません", [*inside, "address", "add", address, "dev", "eth0"]),
        ("既定の経路がありません", [*inside, "route", "add", "default", "via", "10.42.0.1"]),
    ]


def test_attached_hints_step_by_step(box):
    for hint, command in attach(box):
        verdict = check.attached(box, *NAMES)
        assert not verdict
        assert hint in verdict.message
        subprocess.run(command, check=True)
    assert check.attached(box, *NAMES)


@pytest.mark.parametrize(
    ("address", "hint"),
    [("10.42.0.3/24", "もうほかのリンクが"), ("10.42.0.9/16", "同じ長さの"), ("10.44.0.9/24", "同じ 10.42.0.0/24")],
)
def test_attached_wants_a_free_address_of_the_network(box, address, hint):
    for _, command in attach(box, address)[:-1]:
        subprocess.run(command, check=True)
    assert hint in check.attached(box, *NAMES).message


def test_attached_wants_the_bridge_as_gateway_and_the_name_eth0(box):
    steps = attach(box, name="veth9")
    for _, command in steps[:2]:
        subprocess.run(command, check=True)
    assert "`veth9` です" in check.attached(box, *NAMES).message
    inside = ["nsenter", f"--net=/proc/{box}/ns/net", "ip"]
    subprocess.run([*inside, "link", "set", "veth9", "name", "eth0"], check=True)
    for _, command in steps[2:-1]:
        subprocess.run(command, check=True)
    subprocess.run([*inside, "route", "add", "default", "via", "10.42.0.2"], check=True)
    assert "10.42.0.2 へ向かって" in check.attached(box, *NAMES).message
    subprocess.run([*inside, "route", "replace", "default", "via", "10.42.0.1"], check=True)
    subprocess.run(["bridge", "-n", "labs-host", "link", "set", "dev", "veth-box", "state", "0"], check=True)
    assert "返事がありません" in check.attached(box, *NAMES).message


def test_attached_wants_the_address_of_the_bridge(box):
    for _, command in attach(box):
        subprocess.run(command, check=True)
    ip("-n labs-host address del 10.42.0.1/24 dev br0")
    assert "`br0` のアドレスがなくなりました" in check.attached(box, *NAMES).message
    ip("-n labs-host address add 10.42.0.1/24 dev br0")


def test_attached_wants_the_other_end_on_the_host(box):
    inside = ["nsenter", f"--net=/proc/{box}/ns/net", "ip"]
    subprocess.run([*inside, "link", "add", "eth0", "type", "veth", "peer", "eth1"], check=True)
    assert "もう片端が、`labs-host` に" in check.attached(box, *NAMES).message


@pytest.fixture
def ports(lan):
    port = ["bridge", "-n", "labs-host", "link", "set", "dev"]
    yield port
    for name in ("veth-web", "veth-db", "veth-cache"):
        ip(f"-n labs-host link set {name} up master br0")
        subprocess.run([*port, name, "isolated", "off"], check=True)


@pytest.mark.parametrize(
    ("isolated", "hint"),
    [
        ([], "まだ届きます"),
        (["veth-web"], "`veth-web` だけ"),
        (["veth-web", "veth-cache"], "まだ届きます"),
        (["veth-web", "veth-db", "veth-cache"], "三つ目のポート"),
    ],
)
def test_separated_hints(ports, isolated, hint):
    for name in isolated:
        subprocess.run([*ports, name, "isolated", "on"], check=True)
    verdict = check.separated(*NAMES)
    assert not verdict
    assert hint in verdict.message


def test_separated_passes(ports):
    for name in ("veth-web", "veth-db"):
        subprocess.run([*ports, name, "isolated", "on"], check=True)
    assert check.separated(*NAMES)


def test_separated_wants_the_ports_where_they_were(ports):
    ip("-n labs-host link set veth-db nomaster")
    assert "`veth-db` を bridge から外すと" in check.separated(*NAMES).message


def test_separated_wants_the_addresses_where_they_were(ports):
    ip("-n labs-db address del 10.42.0.3/24 dev eth0")
    assert "`labs-db` の `eth0` か、そのアドレスが" in check.separated(*NAMES).message
    ip("-n labs-db address add 10.42.0.3/24 dev eth0\n-n labs-db route add default via 10.42.0.1")


def test_separated_wants_the_host_to_be_reached(ports):
    for name in ("veth-web", "veth-db"):
        subprocess.run([*ports, name, "isolated", "on"], check=True)
    ip("-n labs-web route add blackhole 10.42.0.4/32")
    assert "10.42.0.4 へも届かなくなりました。隔てるのは" in check.separated(*NAMES).message
    ip("-n labs-web route del blackhole 10.42.0.4/32")


def test_unanswered():
    assert check.attached(..., *NAMES).message == UNANSWERED
