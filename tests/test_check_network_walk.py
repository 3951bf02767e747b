"""The exercises of 04-network/05-packet-walk: each wrong state gives its hint, the solution passes."""

import contextlib
from types import SimpleNamespace

import pytest

from labs import firewall, machine, netns, network, process
from labs.check import network_walk as check

RULES = """table ip walk {
  chain prerouting { type nat hook prerouting priority dstnat; tcp dport 8080 counter dnat to 10.42.0.2:80; }
}
"""


@pytest.fixture(scope="module")
def walk():
    """What the notebook builds: a client, a host that publishes port 8080, a web server, and one more namespace."""
    with contextlib.ExitStack() as stack:
        client, host, web, db = (stack.enter_context(netns.namespace(name)) for name in ("client", "host", "web", "db"))
        stack.enter_context(network.veth(host, "wan0", client, "eth0"))
        host.run(["ip", "address", "add", "192.0.2.1/24", "dev", "wan0"])
        client.run(["ip", "address", "add", "192.0.2.2/24", "dev", "eth0"])
        stack.enter_context(stack.enter_context(network.network(host)).attach(web))
        host.sysctl("net.ipv4.ip_forward", 1)
        stack.enter_context(firewall.answering(web, 80))
        yield SimpleNamespace(client=client, host=host, web=web, db=db)


@pytest.fixture
def published(walk):
    """The rule that leads to the web server."""
    with firewall.ruleset(walk.host, RULES):
        yield walk


def repaired(walk):
    return check.repaired(walk.client, walk.host, walk.web)


def test_repaired_passes_where_nothing_is_broken(published):
    assert "五か所" in repaired(published).message
    assert repaired(published)


def test_repaired_and_the_fault_of_the_exercise(published):
    check.spoil(published.web)
    assert "SYN は `labs-web eth0` まで届いているのに" in repaired(published).message
    published.web.run(["ip", "route", "replace", "default", "via", "10.42.0.1"])
    assert repaired(published)


@pytest.mark.parametrize(("where", "broken", "mended", "hint"), [
    ("client", "link set eth0 down", "link set eth0 up", "SYN が一つも出ていません"),
    ("host", "link set veth-web down", "link set veth-web up", "SYN は `labs-host"),
])
def test_repaired_says_where_the_packet_was_last_seen(published, where, broken, mended, hint):
    place = getattr(published, where)
    place.run(["ip", *broken.split()])
    try:
        assert hint in repaired(published).message
    finally:
        place.run(["ip", *mended.split()])
    process.until(lambda: repaired(published))  # the kernel tells of a carrier at most once a second


@pytest.mark.parametrize(("chain", "hint"), [
    ("type filter hook forward priority 0; ip daddr 10.42.0.2 drop;", "`labs-host wan0` を最後に"),
    ("type filter hook forward priority 0; ip saddr 10.42.0.2 drop;", "SYN,ACK は `labs-host br0` を最後に"),
])
def test_repaired_and_a_rule_that_drops(published, chain, hint):
    with firewall.ruleset(published.host, f"table ip broken {{\n  chain one {{ {chain} }}\n}}\n"):
        assert hint in repaired(published).message


def test_repaired_without_the_rule(walk):
    assert "host が自分で RST" in repaired(walk).message


def test_repaired_and_an_answer_that_nobody_tracks(published):
    # The client hears an answer from an address that it has not called.
    rule = "table ip odd {\n  chain one { type filter hook prerouting priority raw; ip saddr 10.42.0.2 notrack; }\n}\n"
    with firewall.ruleset(published.host, rule):
        assert "返事の送り元が `10.42.0.2:80` です" in repaired(published).message


# The record of a connection

GOOD = ("192.0.2.2:9000", "192.0.2.1:50000")


@pytest.mark.parametrize(("answer", "hint"), [
    ("192.0.2.2:9000", "二つ並べて"),
    (("192.0.2.2", "192.0.2.1"), "二つ並べて"),
    ((1, 2), "二つ並べて"),
    (7, "二つ並べて"),
    (("10.42.0.2:50000", "192.0.2.2:9000"), "行きの組"),
    (("192.0.2.2:9000", "10.42.0.2:50000"), "裏返しただけ"),
    (GOOD[::-1], "送り元を先に"),
    (("192.0.2.7:9000", "192.0.2.1:50000"), "返事の送り元が違います"),
    (("192.0.2.2:9000", "10.42.0.1:50000"), "返事の宛先が違います"),
    (("192.0.2.2:9000", "192.0.2.1:50001"), "アドレスは合っています"),
    (..., "まだ答えが入っていません"),
])
def test_recorded_hints(walk, answer, hint):
    verdict = check.recorded(walk.client, walk.host, walk.web, answer)
    assert not verdict
    assert hint in verdict.message


def test_recorded_passes_twice(walk):
    for _ in range(2):
        assert check.recorded(walk.client, walk.host, walk.web, GOOD)
    assert "labs-check" not in walk.host.run(["nft", "list", "tables"])


# A configuration list


@pytest.fixture
def leases():
    """What host-local writes down is gone after the test."""
    yield
    machine.remove_tree("/run/labs/cni")


IPAM = {"type": "host-local", "subnet": "10.44.0.0/24", "dataDir": "/run/labs/cni", "routes": [{"dst": "0.0.0.0/0"}]}
BRIDGE = {"type": "bridge", "bridge": "cni1", "isGateway": True, "ipam": IPAM}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}


def listed(*plugins, **more):
    return {"cniVersion": "1.0.0", "name": "exercise", "plugins": list(plugins), **more}


@pytest.mark.parametrize(("config", "hint"), [
    ([], "`plugins`"),
    ({"plugins": []}, "`plugins`"),
    (listed(BRIDGE), "いまのリストは `bridge`"),
    (listed(PORTMAP, BRIDGE), "`portmap` が先頭"),
    (listed(BRIDGE, {"type": "portmap"}), "手を挙げていない"),
    (listed(BRIDGE, PORTMAP, cniVersion="9.9.9"), "incompatible"),
    ({"plugins": [BRIDGE, PORTMAP]}, "KeyError: 'cniVersion'"),
    (listed({**BRIDGE, "ipam": {"type": "nobody"}}, PORTMAP), "nobody"),
    (listed({**BRIDGE, "type": "none"}, PORTMAP), "find plugin none"),
    (listed({**BRIDGE, "isGateway": False}, PORTMAP), "8083 番へ届きません"),
])
def test_published_hints(walk, leases, config, hint):
    verdict = check.published(walk.client, walk.host, walk.db, config)
    assert not verdict
    assert hint in verdict.message
    assert [link.name for link in network.links(walk.db)] == ["lo"]


@pytest.mark.parametrize(("kind", "subnet"), [("bridge", "10.45.0.0/24"), ("labs-cni", "10.46.0.0/24")])
def test_published_passes(walk, leases, kind, subnet):
    own = {**BRIDGE, "type": kind, "bridge": f"cni-{kind}", "ipam": {**IPAM, "subnet": subnet}}
    for _ in range(2):
        assert check.published(walk.client, walk.host, walk.db, listed(own, PORTMAP))
    assert [link.name for link in network.links(walk.db)] == ["lo"]
