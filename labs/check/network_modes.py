"""The exercises of 04-network/04-modes."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from labs import links, machine, namespaces, network, process
from labs.check import Steps, exercise
from labs.errors import Timeout
from labs.network import Netns

OUTSIDE = "192.0.2.2"
UNDERLAY_MTU, VXLAN_HEADERS = 1400, 50
IP_AND_ICMP = 28
DISCARD_PORT = 9  # nobody listens there: the kernel counts in UdpNoPorts what arrives


class Site(NamedTuple):
    """The namespaces of an exercise; web is 10.42.0.2, db 10.43.0.2 (two_networks) or 10.42.0.3 (tunnel)."""

    host: Netns
    far: Netns
    web: Netns
    db: Netns


@contextmanager
def _site() -> Iterator[tuple[Site, ExitStack]]:
    """A host and what is beyond its eth0, addresses 192.0.2.1 and 192.0.2.2, and two namespaces not yet attached."""
    with ExitStack() as undo:
        site = Site(*(undo.enter_context(network.namespace(name)) for name in ("host", "far", "web", "db")))
        undo.enter_context(network.veth(site.host, "eth0", site.far, "eth0"))
        site.host.run(["ip", "address", "add", "192.0.2.1/24", "dev", "eth0"])
        site.far.run(["ip", "address", "add", OUTSIDE + "/24", "dev", "eth0"])
        yield site, undo


@contextmanager
def two_networks() -> Iterator[Site]:
    """A host that forwards between web's network on br0, db's on br1, and the outside."""
    with _site() as (site, undo):
        for name, subnet, target in (("br0", "10.42.0.0/24", site.web), ("br1", "10.43.0.0/24", site.db)):
            bridge = undo.enter_context(network.network(site.host, name, subnet))
            undo.enter_context(bridge.attach(target))
        site.far.run(["ip", "route", "add", "default", "via", "192.0.2.1"])
        site.host.sysctl("net.ipv4.ip_forward", 1)
        yield site


@contextmanager
def tunnel() -> Iterator[Site]:
    """A LAN of two hosts, web behind host and db behind far: vx42 over a cable that carries 1400 bytes."""
    with _site() as (site, undo):
        sides = [(site.host, OUTSIDE, "10.42.0.1", site.web, "10.42.0.2"),
                 (site.far, "192.0.2.1", "10.42.0.254", site.db, "10.42.0.3")]
        for side, remote, gateway, target, address in sides:
            side.run(["ip", "link", "set", "eth0", "mtu", str(UNDERLAY_MTU)])
            bridge = undo.enter_context(network.network(side, "br0", "10.42.0.0/24", gateway=gateway))
            undo.enter_context(bridge.attach(target, address=address))
            undo.enter_context(links.vxlan(side, "vx42", 42, device="eth0", remote=remote, master="br0"))
        yield site


@exercise
def pod(pause: int, web: int, helper: int) -> Steps:
    """Three processes in one network namespace, which the first one holds and which has a link to a bridge."""
    owner = "pause が web か helper と同じプロセスです。そのアプリを作り直すと、netns も新しくなってしまいます。眠るだけのプロセスを、別に動かしてください。"
    yield pause not in (web, helper), owner
    yield not namespaces.same("self", pause)["net"], "pause はラボの機械の netns にいます。`network=` を渡さずに、新しい netns で動かしてください。"
    for name, pid in (("web", web), ("helper", helper)):
        joined = namespaces.same(pause, pid)["net"]
        yield joined, f"{name} は、pause と別の netns にいます。`network=` に、pause の `/proc/PID/ns/net` を渡してください。"
    cards = [link for link in network.links(Netns.of_pid(pause)) if link.name != "lo"]
    yield bool(cards), "pod の netns には `lo` しかありません。`Netns.of_pid(pause.pid, 'labs-pod')` を、bridge に attach してください。"
    return "アプリが何度生まれ変わっても、アドレスは pause のものです。"


@exercise
def fence(site: Site) -> Steps:
    """Neither of web and db reaches the other, in either direction, and both still reach the outside."""
    forward = _arrives(site.web, site.db, "10.43.0.2")
    backward = _arrives(site.db, site.web, "10.42.0.2")
    yield not (forward and backward), "web と db は、まだ互いに届きます。`hook forward` の chain に規則を書いてください。"
    open_way = "web から db" if forward else "db から web"
    yield not (forward or backward), f"ping は往復なので止まって見えますが、{open_way} への片道（UDP）は、まだ届いています。逆向きの規則も要ります。"
    forwards = site.host.sysctl("net.ipv4.ip_forward") == "1"
    yield forwards, "`ip_forward` を止めると隔離はできますが、外へも出られません。転送は許したまま、規則で選んで断ってください。"
    for name, source in (("web", site.web), ("db", site.db)):
        yield _answers(source, OUTSIDE), f"{name} が外へ出られなくなりました。入ってきた bridge だけでなく、出ていく先も見て断ってください。"
    return "二つのネットワークは互いに届かず、外へはどちらも出られます。規則は向きごとに要りました。"


@exercise
def widest(site: Site) -> Steps:
    """The MTU of web and db is the largest that passes the tunnel."""
    best = UNDERLAY_MTU - VXLAN_HEADERS
    for name, ns in (("web", site.web), ("db", site.db)):
        mtu = next(link.mtu for link in network.links(ns) if link.name == "eth0")
        forgot = "線の MTU そのものです。包む皮のぶんも引いてください。" if mtu == UNDERLAY_MTU else "線を通れる大きさを超えています。"
        yield mtu <= best, f"{name} の MTU は {mtu} です。{forgot}いまは {mtu - IP_AND_ICMP} バイトの ping が、黙って消えます。"
        yield mtu == best, f"{name} の MTU は {mtu} で、確かに届きます。ただ、あと {best - mtu} バイト大きくできます。"
    full = str(best - IP_AND_ICMP)
    passes = _answers(site.web, "10.42.0.3", "-M", "do", "-s", full)
    yield passes, f"MTU は合っていますが、{full} バイトの ping が届きません。トンネルを変えていませんか。"
    return f"線の {UNDERLAY_MTU} から皮の {VXLAN_HEADERS} を引いた {best} が、黙って消えない最大です。"


def _answers(source: Netns, address: str, *words: str) -> bool:
    return "ttl=" in source.run(["ping", "-c", "1", "-W", "2", *words, address], check=False)


def _arrives(source: Netns, target: Netns, address: str) -> bool:
    """Whether one UDP datagram gets there, whatever happens to an answer."""
    before = _no_ports(target)
    source.call(_send, address)
    try:
        return process.until(lambda: _no_ports(target) > before, timeout=2.0)
    except Timeout:
        return False


def _send(address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        any_socket.sendto(b"?", (address, DISCARD_PORT))


def _no_ports(ns: Netns) -> int:
    """UdpNoPorts of /proc/net/snmp: datagrams that came for a port where nobody listens (proc_pid_net(5))."""
    names, values = (line.split()[1:] for line in ns.call(machine.read_file, "/proc/self/net/snmp").splitlines()
                     if line.startswith("Udp:"))
    return int(dict(zip(names, values, strict=True))["NoPorts"])
