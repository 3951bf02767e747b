"""The exercises of 04-network/01-veth-bridge: judged from netlink, and in the end by real packets."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterator
from typing import Any

from labs import machine, topology
from labs.check import Steps, exercise
from labs.netns import Netns
from labs.topology import Wire

LAN, TEA, CUP = "labs-lan", "labs-tea", "labs-cup"
OUTSIDE = "192.0.2.1"
SUBNET = ipaddress.ip_network("10.43.0.0/24")
# ip-netns(8) and, for each namespace, a batch of ip(8): one fault for each thing a packet needs.
FAULTY = {
    LAN: """\
link set lo up
address add 192.0.2.1/32 dev lo
link add br0 type bridge
link set br0 up
address add 10.43.0.1/24 dev br0
link add veth-tea up type veth peer name eth0 netns labs-tea
link add veth-cup up master br0 type veth peer name eth0 netns labs-cup
""",
    TEA: """\
link set lo up
address add 10.43.0.2/24 dev eth0
link set eth0 up
""",
    CUP: """\
link set lo up
address add 10.43.0.3/32 dev eth0
""",
}


def broken() -> None:
    """Make the network of the first exercise anew: three namespaces, four faults."""
    machine.require()
    remove()
    for name in FAULTY:
        subprocess.run(["ip", "netns", "add", name], check=True)
    for name, batch in FAULTY.items():
        subprocess.run(["ip", "-n", name, "-batch", "-"], input=batch, text=True, check=True)


def remove() -> None:
    """Remove the network of the first exercise, as far as it is there."""
    there = [name for name in FAULTY if name in _names()]
    for name in there:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def _names() -> set[str]:
    return {row["name"] for row in _json(["ip", "-j", "netns", "list"])}


def _json(argv: list[str]) -> list[dict[str, Any]]:
    answer = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    rows: list[dict[str, Any]] = json.loads(answer or "[]")
    return rows


def _ipv4(wire: Wire) -> list[ipaddress.IPv4Interface]:
    return [ipaddress.IPv4Interface(address) for address in wire.link.addresses if ":" not in address]


def _default(path: str) -> str:
    """The gateway of the default route in a namespace, or ""."""
    rows = _json(["nsenter", f"--net={path}", "ip", "-j", "-4", "route", "show", "default"])
    return next((row.get("gateway", "") for row in rows), "")


def _answers(path: str, address: str) -> bool:
    """Whether the address answers a ping from the namespace within two seconds."""
    argv = ["nsenter", f"--net={path}", "ping", "-c", "1", "-W", "2", "-q", address]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def _table(*spaces: Netns | str) -> dict[tuple[str, str], Wire]:
    """Every link by namespace and name."""
    return {(wire.space, wire.link.name): wire for wire in topology.wires(*spaces)}


@exercise
def repaired() -> Steps:
    """The network of broken() carries packets again: every link up, one LAN, and a way out of it."""
    yield set(FAULTY) <= _names(), "実験用の namespace がありません。`check.broken()` で作り直してください。"
    table = _table(*FAULTY)
    for name in (TEA, CUP):
        yield (name, "eth0") in table, f"`{name}` の `eth0` がなくなりました。`check.broken()` で作り直せます。"
        yield from _speaks(name, table[name, "eth0"])
    for name in (TEA, CUP):
        yield from _plugged(name, table[name, "eth0"], {wire.key: wire for wire in table.values()})
    yield "10.43.0.1/24" in map(str, _ipv4(table[LAN, "br0"])), "`br0` のアドレス 10.43.0.1/24 がなくなりました。LAN の中から見た出口です。"
    for name in (TEA, CUP):
        yield from _way_out(name)
    for name, address in ((TEA, "10.43.0.3"), (CUP, "10.43.0.2"), (TEA, OUTSIDE), (CUP, OUTSIDE)):
        yield _answers(f"/run/netns/{name}", address), f"形は整いましたが、`{name}` から {address} への ping に返事がありません。"
    return "四つの故障がすべて直りました。up、プレフィックス、ポート、経路。どれか一つでも欠けると、パケットは届きません。"


def _speaks(name: str, wire: Wire) -> Iterator[tuple[bool, str]]:
    link = wire.link
    yield link.up, f"`{name}` の `eth0` が down のままです。アドレスがあっても、経路表には何も入りません。"
    ours = [address for address in _ipv4(wire) if address.ip in SUBNET]
    yield bool(ours), f"`{name}` の `eth0` に、10.43.0.0/24 のアドレスがありません。"
    wide = [address for address in ours if address.network == SUBNET]
    yield bool(wide), f"`{name}` のアドレスは `{ours[0]}` です。この長さのプレフィックスでは、同じ LAN の相手への経路ができません。"


def _plugged(name: str, wire: Wire, by_key: dict[tuple[str, int], Wire]) -> Iterator[tuple[bool, str]]:
    yield wire.other is not None and wire.other[0] == LAN, f"`{name}` のケーブルのもう片端が、`{LAN}` にありません。"
    end = by_key[wire.other or wire.key]
    yield end.link.up, f"`{LAN}` の `{end.link.name}` が down です。ケーブルは、両端が up で初めて通じます。"
    port = f"`{LAN}` の `{end.link.name}` は、どの bridge のポートでもありません。`{name}` の ARP は、そこで行き止まりです。"
    yield end.link.master == "br0", port
    bridge = by_key[end.master or end.key].link
    yield bridge.up, "`br0` が down です。ポートが揃っていても、フレームを通しません。"


def _way_out(name: str) -> Iterator[tuple[bool, str]]:
    gateway = _default(f"/run/netns/{name}")
    yield gateway != "", f"LAN の中は通じるはずです。`{name}` から {OUTSIDE} へは、まだ `Network is unreachable` です。"
    yield gateway == "10.43.0.1", f"`{name}` の既定の経路は {gateway} へ向かっています。出口は `br0` のアドレスです。"


@exercise
def attached(pid: int, *spaces: Netns | str) -> Steps:
    """The container whose process is pid has been plugged into br0 of the first namespace by hand.

    spaces: that host, and whoever else is on its bridge.
    """
    box = Netns.of_pid(pid, "box")
    table = _table(box, *spaces)
    inside = [wire for key, wire in table.items() if key[0] == "box" and wire.link.name != "lo"]
    yield bool(inside), _not_moved(table)
    eth0 = table.get(("box", "eth0"), inside[0])
    yield eth0.link.name == "eth0", f"中の片端の名前が `{eth0.link.name}` です。移すときに `name eth0` と付けられます。"
    host = [wire for wire in table.values() if wire.space != "box"]
    yield eth0.link.kind == "veth" and eth0.other in {wire.key for wire in host}, "`eth0` のもう片端が、`labs-host` に見当たりません。"
    end = next(wire for wire in host if wire.key == eth0.other)
    yield end.link.master == "br0", f"ホスト側の `{end.link.name}` が、まだ `br0` のポートではありません。"
    yield end.link.up, f"ホスト側の `{end.link.name}` が down です。"
    yield eth0.link.up, "コンテナの `eth0` が down です。namespace を移ると、リンクは down に戻ります。"
    bridge = next(_ipv4(wire) for wire in host if wire.key == end.master)
    yield bool(bridge), "`br0` のアドレスがなくなりました。このノートブックを、初めから実行し直してください。"
    yield from _addressed(_ipv4(eth0), bridge[0], {address.ip for wire in host for address in _ipv4(wire)})
    gateway, expected = _default(box.path), str(bridge[0].ip)
    yield gateway == expected, f"既定の経路が{f' {gateway} へ向かっています' if gateway else 'ありません'}。出口は `br0` の {expected} です。"
    yield _answers(box.path, expected), f"{expected} への ping に返事がありません。"
    return "動いているプロセスは何も知らないまま、ネットワークにつながりました。コンテナを起動するたびに Docker がしていることの骨組みです。"


def _not_moved(table: dict[tuple[str, str], Wire]) -> str:
    both = [wire for wire in table.values() if wire.link.kind == "veth" and wire.other and wire.other[0] == wire.space]
    if both:
        return f"`{both[0].link.name}` の両端が、まだ `{both[0].space}` にあります。片端を、コンテナのプロセスがいる namespace へ移してください。"
    return "コンテナの中には、まだ `lo` しかありません。veth の片端を、そのプロセスがいる namespace に置きます。"


def _addressed(own: list[ipaddress.IPv4Interface], bridge: ipaddress.IPv4Interface,
               used: set[ipaddress.IPv4Address]) -> Iterator[tuple[bool, str]]:
    yield bool(own), "`eth0` にアドレスがありません。namespace を移ると、付けてあったアドレスも消えます。"
    yield own[0].ip not in used, f"{own[0].ip} は、もうほかのリンクが使っています。ARP に二人が答えてしまいます。"
    yield own[0].network == bridge.network, f"`eth0` のアドレスは `{own[0]}` です。`br0` と同じ {bridge.network} の中から、同じ長さのプレフィックスで選んでください。"


@exercise
def separated(host: str, first: str, second: str, third: str) -> Steps:
    """Nothing passes between first and second; both still talk to third and to the host's bridge."""
    table = _table(host, first, second, third)
    by_key = {wire.key: wire for wire in table.values()}
    wanted = {host: "br0", first: "eth0", second: "eth0", third: "eth0"}
    lost = [name for name in wanted.items() if name not in table or not _ipv4(table[name])]
    yield not lost, f"{''.join(f'`{name}` の `{link}`' for name, link in lost[:1])} か、そのアドレスがなくなりました。初めから実行し直してください。"
    ends = [by_key[table[name, "eth0"].other or (host, 0)] for name in (first, second, third)]
    unplugged = [wire.link.name for wire in ends if not (wire.link.up and wire.link.master == "br0")]
    yield not unplugged, f"`{''.join(unplugged[:1])}` を bridge から外すと、だれとも話せなくなります。ポートはつないだままにしてください。"
    address = {name: str(_ipv4(table[name, link])[0].ip) for name, link in wanted.items()}
    isolated = [wire.link.name for wire in ends if _isolated(host, wire.link.name)]
    passes = _answers(f"/run/netns/{first}", address[second])
    yield not passes, _still_passes(first, second, isolated)
    for name in (first, second):
        for goal in (address[host], address[third]):
            yield _answers(f"/run/netns/{name}", goal), _too_much(name, goal, ends[2].link.name in isolated)
    return "同じ bridge の上でも、ポートの印一つで、隣だけを見えなくできました。フレームは bridge の中で捨てられています。"


def _isolated(host: str, port: str) -> bool:
    """The port's flag IFLA_BRPORT_ISOLATED: bridge(8), "bridge link set"."""
    rows = _json(["bridge", "-n", host, "-d", "-j", "link", "show", "dev", port])
    return any(row.get("isolated") for row in rows)


def _still_passes(first: str, second: str, isolated: list[str]) -> str:
    if len(isolated) == 1:
        return f"印が付いたポートは `{isolated[0]}` だけです。`isolated` は、印の付いたポート**どうし**の間だけを止めます。"
    return f"`{first}` から `{second}` へ、まだ届きます。bridge(8) の `bridge link set` に、ポートを隔てる印があります。"


def _too_much(name: str, goal: str, third: bool) -> str:
    why = "三つ目のポートにも印を付けたので、そことも隔てられました。" if third else "隔てるのは、二つのポートの間だけです。"
    return f"`{name}` から {goal} へも届かなくなりました。{why}"
