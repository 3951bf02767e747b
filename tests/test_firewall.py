"""Rule sets, counters and published ports, judged by nft's JSON, curl, ss, conntrack, and Docker's own proxy.

The topology is made by `ip` alone: two containers on br0 of labs-host, and labs-out on a wire to it.
"""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import pytest

from labs import firewall, lab, process
from labs.errors import BadInput
from labs.netns import Netns, namespace

HOST = """
link add br0 type bridge
addr add 10.42.0.1/24 dev br0
link set br0 up
link add veth-web type veth peer name eth0 netns labs-web
link add veth-db type veth peer name eth0 netns labs-db
link add eth0 type veth peer name eth0 netns labs-out
link set veth-web master br0 up
link set veth-db master br0 up
addr add 192.0.2.1/24 dev eth0
link set eth0 up
"""
INSIDE = """
addr add {} dev eth0
link set eth0 up
"""
WEB, DB, HOST_ADDRESS, OUT = "10.42.0.2", "10.42.0.3", "192.0.2.1", "192.0.2.2"


class Lan(NamedTuple):
    host: Netns
    web: Netns
    db: Netns
    out: Netns


@contextmanager
def lan() -> Iterator[Lan]:
    with ExitStack() as undo:
        made = Lan(*(undo.enter_context(namespace(name)) for name in Lan._fields))
        made.host.run(["ip", "-batch", "-"], stdin=HOST)
        for ns, address in ((made.web, WEB), (made.db, DB), (made.out, OUT)):
            route = "" if ns is made.out else "route add default via 10.42.0.1\n"
            ns.run(["ip", "-batch", "-"], stdin=INSIDE.format(address + "/24") + route)
        made.host.sysctl("net.ipv4.ip_forward", 0)
        yield made


@pytest.fixture(scope="module")
def net() -> Iterator[Lan]:
    """All tests here share one topology, with a web server in labs-web and one in labs-out."""
    with lan() as made, firewall.answering(made.web, 80), firewall.answering(made.out, 80):
        yield made


def ask(ns: Netns, where: str) -> str:
    """What curl gets, or ""."""
    return ns.run(["curl", "-s", "-m", "0.7", f"http://{where}"], check=False).strip()


def listing(ns: Netns) -> str:
    return ns.run(["nft", "list", "ruleset"])


TWO = """
table ip labs-a {
  chain in {
    type filter hook input priority filter
    tcp dport { 22, 23 } counter accept
    icmp type echo-request counter
    meta l4proto udp drop
  }
  set addresses { type ipv4_addr; elements = { 192.0.2.7, 192.0.2.8 }; }
}
table inet labs-b {
  chain in {
    type filter hook input priority filter
    ip saddr 192.0.2.0/24 counter comment "# handle 9"
  }
}
"""


# The next two come first: they have the names of the topology that all others share.


def test_namespace_gone_in_the_middle() -> None:
    with namespace("gone") as ns, ExitStack() as undo:
        undo.enter_context(firewall.outbound(ns))
        undo.enter_context(firewall.ruleset(ns, TWO))
        process.call(os.system, f"ip netns delete {ns.name}")
        with pytest.raises(BadInput, match="gone"):
            firewall.rules(ns)


def test_killed_with_everything_up() -> None:
    """After kill -9 the next one may publish the same port, and lab.clean() leaves nothing at all."""
    ready, told = socket.socketpair()
    def hold() -> None:
        with lan() as made, firewall.published(made.host, 8080, WEB, 80), firewall.answering(made.web, 80), \
                firewall.docker_proxy(made.host, 8081, WEB, 80):
            told.send(b"x")
            signal.pause()
    with ready, told, process.fork(hold) as child:
        assert process.readable(ready.fileno(), 30)
        children = process.children(child.pid)
        child.kill()
        child.wait()
    process.until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in children))
    host = Netns("labs-host", "/run/netns/labs-host")
    assert len(firewall.rules(host)) == 5
    with firewall.published(host, 8080, WEB, 80):
        assert len(firewall.rules(host)) == 5
    assert listing(host) == ""
    lab.clean(engines=False)
    assert not os.path.exists(host.path)


def test_ruleset_is_read_as_nft_reads_it(net: Lan) -> None:
    with firewall.ruleset(net.host, TWO):
        net.out.run(["ping", "-c", "2", "-i", "0.2", HOST_ADDRESS])
        found = firewall.rules(net.host)
        every = json.loads(net.host.run(["nft", "--json", "list", "ruleset"]))["nftables"]
        told = [one["rule"] for one in every if "rule" in one]
        assert [rule[:4] for rule in found] == [(r["family"], r["table"], r["chain"], r["handle"]) for r in told]
        counters = [next((e["counter"] for e in r["expr"] if "counter" in e), {}) for r in told]
        assert [(rule.packets, rule.bytes) for rule in found] == [(c.get("packets"), c.get("bytes")) for c in counters]
        assert [rule.packets for rule in found] == [0, 2, None, 2]
        assert found[0].text == "tcp dport { 22, 23 } counter accept"
        assert [rule.table for rule in firewall.rules(net.host, "labs-b")] == ["labs-b"]
    assert listing(net.host) == ""


def test_ruleset_removes_only_what_it_made(net: Lan) -> None:
    with firewall.ruleset(net.host, "table ip labs-kept\n"):
        with pytest.raises(RuntimeError, match="in the middle"), firewall.ruleset(net.host, TWO):
            raise RuntimeError("in the middle")
        with firewall.ruleset(net.host, "table ip labs-kept { chain c { }; }"):
            net.host.run(["nft", "delete", "table", "ip", "labs-kept"])
        net.host.run(["nft", "add", "table", "ip", "labs-kept"])
    assert listing(net.host) == ""


HEAD = "table ip labs-a {\n  chain in {"


@pytest.mark.parametrize(("text", "message"), [
    ("table ip labs-a { }\nadd rule ip labs-a in accept", "2: 'add rule ip labs-a in accept': Could not process rule"),
    (HEAD + "\n    tcp port 80 accept\n  }\n}", "3: 'tcp port 80 accept': syntax error"),
    (HEAD + " type nat hook forward priority 0; }\n}", "2: 'chain in { type nat hook forward priority 0; }': Chain of"),
    (HEAD + "\n    ip saddr 10.0.0.300 drop\n  }\n}", "3: 'ip saddr 10.0.0.300 drop': "),
    ("table", "1: 'table': syntax error, unexpected end of file"),
])
def test_refused_rules_are_one_line_and_leave_nothing(net: Lan, text: str, message: str) -> None:
    with pytest.raises(BadInput) as refused, firewall.ruleset(net.host, text):
        pass
    assert str(refused.value).startswith(f"nft line {message}")
    assert "\n" not in str(refused.value) and "/dev/stdin" not in str(refused.value)
    assert listing(net.host) == ""


def test_counting_tells_what_rose(net: Lan) -> None:
    with firewall.ruleset(net.host, TWO), firewall.counting(net.host, "labs-a") as hits:
        net.out.run(["ping", "-c", "1", HOST_ADDRESS])
    assert [(hit.chain, hit.before, hit.after) for hit in hits] == [("in", 0, 0), ("in", 0, 1)]


def test_outbound_masquerades(net: Lan) -> None:
    assert ask(net.web, OUT) == ""
    with firewall.outbound(net.host):
        assert ask(net.web, OUT) == "labs-out sees 192.0.2.1"
        flows = net.host.run(["conntrack", "-L", "-s", WEB])
        assert "src=192.0.2.2 dst=192.0.2.1" in flows
        assert ask(net.host, WEB) == "labs-web sees 10.42.0.1"
        assert firewall.rules(net.host)[0].packets == 1
    assert net.host.sysctl("net.ipv4.ip_forward") == "0"
    assert listing(net.host) == ""
    assert ask(net.web, OUT) == ""


def test_outbound_keeps_the_outside_out(net: Lan) -> None:
    net.out.run(["ip", "route", "add", "10.42.0.0/24", "via", HOST_ADDRESS])
    net.host.sysctl("net.ipv4.ip_forward", 1)
    assert ask(net.out, WEB) == "labs-web sees 192.0.2.2"
    with firewall.outbound(net.host), firewall.counting(net.host) as hits:
        assert ask(net.out, WEB) == ""
    assert [hit.after > 0 for hit in hits if hit.text.endswith("drop")] == [True]
    net.out.run(["ip", "route", "del", "10.42.0.0/24"])
    net.host.sysctl("net.ipv4.ip_forward", 0)


def test_published_from_everywhere(net: Lan) -> None:
    with firewall.outbound(net.host), firewall.published(net.host, 8080, WEB, 80):
        assert ask(net.out, f"{HOST_ADDRESS}:8080") == "labs-web sees 192.0.2.2"
        assert ask(net.host, f"{HOST_ADDRESS}:8080") == "labs-web sees 192.0.2.1"
        assert ask(net.host, "127.0.0.1:8080") == "labs-web sees 10.42.0.1"
        assert ask(net.db, f"{HOST_ADDRESS}:8080") == "labs-web sees 10.42.0.1"
        assert ask(net.web, f"{HOST_ADDRESS}:8080") == "labs-web sees 10.42.0.1"
        assert ask(net.out, f"{HOST_ADDRESS}:8081") == ""
        counted = {rule.chain: rule.packets for rule in firewall.rules(net.host, "labs-publish-8080-tcp")}
        assert counted == {"prerouting": 3, "output": 2, "postrouting": 1, "guard": 0}
    assert ask(net.out, f"{HOST_ADDRESS}:8080") == ""
    assert listing(net.host) == ""
    assert net.host.sysctl("net.ipv4.conf.br0.route_localnet") == "0"
    assert net.host.run(["sysctl", "-ne", firewall.BRIDGED]) in ("1\n", "")  # "": br_netfilter is not loaded


def test_published_on_one_address(net: Lan) -> None:
    with firewall.outbound(net.host), firewall.published(net.host, 8080, WEB, 80, address="127.0.0.1"):
        assert ask(net.out, f"{HOST_ADDRESS}:8080") == ""
        assert ask(net.host, "127.0.0.1:8080") == "labs-web sees 10.42.0.1"


def test_two_ports_at_once_and_udp(net: Lan) -> None:
    """The one that came first may go first: what both need stays until the last."""
    localnet = "net.ipv4.conf.br0.route_localnet"
    with ExitStack() as second:
        with firewall.published(net.host, 53, WEB, 53, protocol="udp"):
            second.enter_context(firewall.published(net.host, 53, WEB, 53))
            assert {name for _, name in firewall.tables(net.host)} == {"labs-publish-53-udp", "labs-publish-53-tcp"}
        assert net.host.sysctl(localnet) == "1"
    assert net.host.sysctl(localnet) == "0"
    net.host.sysctl(localnet, 1)
    with firewall.published(net.host, 53, WEB, 53), firewall.published(net.host, 54, WEB, 53):
        pass
    assert net.host.sysctl(localnet) == "1"
    net.host.sysctl(localnet, 0)


def test_loopback_services_stay_out_of_reach(net: Lan) -> None:
    """route_localnet lets a neighbour ask 127.0.0.1 of the host (CVE-2020-8558); the guard of the table does not."""
    evil = """
      table ip labs-evil {
        chain out { type filter hook postrouting priority 300; ip daddr 198.51.100.9 ip daddr set 127.0.0.1; }
        chain in { type filter hook prerouting priority raw; ip saddr 127.0.0.1 ip saddr set 198.51.100.9; }
      }"""
    localnet = "net.ipv4.conf.br0.route_localnet"
    with firewall.answering(net.host, 6379, "127.0.0.1"), firewall.ruleset(net.db, evil):
        net.host.sysctl(localnet, 1)
        assert ask(net.db, "198.51.100.9:6379") == "labs-host sees 10.42.0.3"
        net.host.sysctl(localnet, 0)
        with firewall.published(net.host, 8080, WEB, 80), firewall.counting(net.host) as hits:
            assert ask(net.db, "198.51.100.9:6379") == ""
    assert [hit.after > 0 for hit in hits if hit.chain == "guard"] == [True]


def test_port_taken(net: Lan) -> None:
    message = "port: 8080: cannot be taken on 0.0.0.0: Address already in use"
    def refused() -> bool:
        with pytest.raises(BadInput, match=message), firewall.published(net.host, 8080, WEB, 80):
            pass
        return str(firewall.tables(net.host)).count("publish") <= 1
    with firewall.answering(net.host, 8080):
        assert refused()
    with firewall.docker_proxy(net.host, 8080, WEB, 80):
        assert refused()
    with firewall.published(net.host, 8080, WEB, 80):
        assert refused()
        assert len(firewall.rules(net.host)) == 5
        words = "listen tcp4 0.0.0.0:8080: bind: address already in use"
        with pytest.raises(BadInput, match=words), firewall.docker_proxy(net.host, 8080, WEB, 80):
            pass
    assert listing(net.host) == ""
    assert net.host.run(["ss", "-Hltn"]) == ""


@pytest.mark.parametrize(("change", "field"), [
    ({"port": 0}, "port"), ({"port": 65536}, "port"), ({"to_port": 70000}, "to_port"),
    ({"protocol": "icmp"}, "protocol"),
    ({"to": "192.0.2.2"}, "to"), ({"to": "web"}, "to"), ({"subnet": "10.42.0.1/24"}, "subnet"),
    ({"address": "192.0.2.99"}, "port"),
])
def test_bad_ports_change_nothing(net: Lan, change: dict[str, object], field: str) -> None:
    given = {"port": 8080, "to": WEB, "to_port": 80} | change
    with pytest.raises(BadInput, match=f"^{field}: "), firewall.published(net.host, **given):  # type: ignore[arg-type]
        pass
    assert listing(net.host) == ""
    assert net.host.run(["ss", "-Hltun"]) == ""


def test_docker_proxy_speaks_for_the_host(net: Lan) -> None:
    with firewall.docker_proxy(net.host, 8080, WEB, 80):
        for ns, where in ((net.host, "127.0.0.1"), (net.out, HOST_ADDRESS), (net.web, "10.42.0.1")):
            assert ask(ns, f"{where}:8080") == "labs-web sees 10.42.0.1"
        assert "docker-proxy" in net.host.run(["ss", "-Hltnp"])
    assert net.host.run(["ss", "-Hltn"]) == ""
