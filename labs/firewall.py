"""nftables in a network namespace: rules put in as one and taken out again, their counters, and ports published.

A published port is what `docker run -p` asks of the kernel, in a table that can be read: nft(8).

::

    from outside  → prerouting   dnat → forward → postrouting
    from the host → output       dnat           → postrouting   masquerade when it came from 127.0.0.1
    from inside   → prerouting   dnat → forward → postrouting   masquerade, so that the answer comes back this way

Everything belongs to the namespace it was put into, and goes with it.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple, NoReturn

from labs import machine, process
from labs.errors import BadInput, ChildFailed
from labs.netns import Netns, begin

ANY = "0.0.0.0"  # noqa: S104  INADDR_ANY, ip(7)
PROTOCOLS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
PUBLISH = machine.PREFIX + "publish-"
ERROR = re.compile(r":(\d+):[\d-]+: Error: (.*)")
HANDLE = re.compile(r"(.*?)(?: \{)? # handle (\d+)")
COUNTER = re.compile(r"\bcounter packets (\d+) bytes (\d+)")
BRIDGED = "net.bridge.bridge-nf-call-iptables"  # there while the module br_netfilter is loaded
PROXY_STATUS = 3  # the descriptor on which docker-proxy says how it went (moby, cmd/docker-proxy/main_linux.go)

PUBLISH_TABLE = """
table ip {table} {{
  chain prerouting {{
    type nat hook prerouting priority dstnat
    {where} {protocol} dport {port} counter dnat to {to}:{to_port}
  }}
  chain output {{
    type nat hook output priority dstnat
    {where} {protocol} dport {port} counter dnat to {to}:{to_port}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    ip saddr {subnet} ip daddr {to} {protocol} dport {to_port} ct status dnat counter masquerade
    ip saddr 127.0.0.0/8 ip daddr {to} {protocol} dport {to_port} counter masquerade
  }}
  chain guard {{
    type filter hook prerouting priority raw
    iifname != "lo" ip daddr 127.0.0.0/8 counter drop
  }}
}}
"""
OUTBOUND_TABLE = """
table ip {table} {{
  chain postrouting {{
    type nat hook postrouting priority srcnat
    ip saddr {subnet} oifname != "{bridge}" counter masquerade
  }}
  chain forward {{
    type filter hook forward priority filter
    ct state established,related counter accept
    ct status dnat counter accept
    iifname != "{bridge}" oifname "{bridge}" counter drop
  }}
}}
"""


class NftRule(NamedTuple):
    """One rule as the kernel holds it; packets and bytes are None where it does not count."""

    family: str
    table: str
    chain: str
    handle: int
    text: str
    packets: int | None
    bytes: int | None


class Hit(NamedTuple):
    """A rule that counts, and its packets before and after something was tried."""

    chain: str
    text: str
    before: int
    after: int


def nft(ns: Netns, text: str) -> None:
    """Give a script to `nft -f -`: all of it is done, or nothing; a refusal is one BadInput in nft's own words."""
    try:
        ns.run(["nft", "-f", "-"], stdin=text)
    except ChildFailed as error:
        raise _refusal(text, error.detail) from None


def _refusal(text: str, detail: str) -> BadInput:
    """What nft says as "/dev/stdin:LINE:COLUMNS: Error: WORDS", with the line after it: a field, a value and a rule."""
    found = ERROR.search(detail)
    if found is None:
        return BadInput("nft", text.strip(), detail)
    lines = ["", *text.splitlines()]
    line = " ".join(lines[min(int(found[1]), len(lines) - 1)].split())
    words = found[2].partition(line)[0] if line else found[2]
    return BadInput(f"nft line {found[1]}", line, words.strip())


def tables(ns: Netns) -> set[tuple[str, str]]:
    """The tables of the namespace: (family, name)."""
    listed = (line.split() for line in ns.run(["nft", "list", "tables"]).splitlines())
    return {(family, name) for _, family, name in listed}


@contextmanager
def ruleset(ns: Netns, text: str) -> Iterator[None]:
    """Put the rules of an nft script in for the length of the block; the tables that it makes are removed after it."""
    before, made = tables(ns), None
    try:
        nft(ns, text)
        made = tables(ns) - before
        yield
    finally:
        _remove(ns, before, made)


@contextmanager
def own_tables(ns: Netns) -> Iterator[None]:
    """Whatever tables the block makes, with nft or iptables, are removed after it."""
    before = tables(ns)
    try:
        yield
    finally:
        _remove(ns, before, None)


def _remove(ns: Netns, before: set[tuple[str, str]], made: set[tuple[str, str]] | None) -> None:
    """Remove those tables, or where nobody counted them, all that were not there before."""
    with suppress(BadInput):  # the namespace is gone, and its rules with it
        doomed = tables(ns) - before if made is None else made
        nft(ns, "".join(f"destroy table {family} {name}\n" for family, name in doomed))


def rules(ns: Netns, table: str = "") -> list[NftRule]:
    """The rules of the namespace (or of one table in it), in the order in which `nft --handle list ruleset` has them.

    Its JSON has no text of a rule, and no words at all for what iptables-nft put in.
    """
    found = list(_read(ns.run(["nft", "--handle", "list", "ruleset"])))
    return [rule for rule in found if table in ("", rule.table)]


def _read(listing: str) -> Iterator[NftRule]:
    family = table = chain = ""
    for line in map(str.strip, listing.splitlines()):
        if (found := HANDLE.fullmatch(line)) is None:
            continue
        words = found[1].split()
        if words[0] == "table" and line.endswith(f"{{ # handle {found[2]}"):
            family, table = words[1:]
        elif words[0] in ("chain", "set", "map", "flowtable") and len(words) == 2:
            chain = words[1]
        else:
            yield _rule(family, table, chain, int(found[2]), found[1])


def _rule(family: str, table: str, chain: str, handle: int, text: str) -> NftRule:
    counted = COUNTER.search(text)
    packets, size = map(int, counted.groups()) if counted else (None, None)
    return NftRule(family, table, chain, handle, COUNTER.sub("counter", text), packets, size)


@contextmanager
def counting(ns: Netns, table: str = "") -> Iterator[list[Hit]]:
    """What counted while the block ran: the list is filled at its end, one Hit for each rule with a counter."""
    hits: list[Hit] = []
    before = {rule[:4]: rule.packets or 0 for rule in rules(ns, table)}
    yield hits
    hits += [Hit(rule.chain, rule.text, before.get(rule[:4], 0), rule.packets)
             for rule in rules(ns, table) if rule.packets is not None]


# Ports


@contextmanager
def outbound(host: Netns, *, bridge: str = "br0", subnet: str = "10.42.0.0/24") -> Iterator[None]:
    """Let a subnet out: forwarding on, its address masqueraded, and from outside only answers and published ports."""
    before = host.sysctl("net.ipv4.ip_forward")
    with ExitStack() as undo:
        undo.callback(_restore, host, "net.ipv4.ip_forward", before)
        host.sysctl("net.ipv4.ip_forward", 1)
        table = f"{machine.PREFIX}outbound-{bridge}"
        undo.enter_context(ruleset(host, OUTBOUND_TABLE.format(table=table, subnet=_subnet(subnet), bridge=bridge)))
        yield


@contextmanager
def published(host: Netns, port: int, to: str, to_port: int, *, address: str = ANY, protocol: str = "tcp",
              bridge: str = "br0", subnet: str = "10.42.0.0/24") -> Iterator[None]:
    """Port `port` of the host leads to `to`:`to_port` behind a bridge, from outside, from the host and from inside.

    address: 0.0.0.0 for every address of the host, or one of them.  A port that is taken is BadInput.
    The port is held by a listening socket, so a table of that name without one is what a killed process left.
    """
    _check(port, to, to_port, protocol, subnet)
    table = f"{PUBLISH}{port}-{protocol}"
    where = "fib daddr type local" if address == ANY else f"ip daddr {address}"
    text = PUBLISH_TABLE.format(table=table, where=where, protocol=protocol, port=port, to=to, to_port=to_port,
                                subnet=subnet)
    with ExitStack() as undo:
        held = undo.enter_context(bound(host, port, address, protocol))
        if protocol == "tcp":
            held.listen()  # else another socket with SO_REUSEADDR could be bound beside it: socket(7)
        nft(host, f"destroy table ip {table}")
        undo.enter_context(_settings(host, bridge))
        undo.enter_context(ruleset(host, text))
        yield


@contextmanager
def _settings(host: Netns, bridge: str) -> Iterator[None]:
    """What published ports need (ip-sysctl.rst, bridge.rst); as it was, once no published port is left.

    route_localnet lets packets of 127.0.0.1 out to the bridge.  A frame that only crosses the bridge must not meet
    the rules: a container that asks for its own port would have its answer sent back where it came from.
    """
    usual = {f"net.ipv4.conf.{bridge}.route_localnet": "0"}
    if os.path.exists("/proc/sys/" + BRIDGED.replace(".", "/")):
        usual[BRIDGED] = "1"
    before = usual if _has_published(host) else {name: host.sysctl(name) for name in usual}
    try:
        for name, value in usual.items():
            host.sysctl(name, 1 - int(value))
        yield
    finally:
        with suppress(BadInput):  # the namespace is gone
            for name, value in before.items() if not _has_published(host) else ():
                host.sysctl(name, value)


def _has_published(host: Netns) -> bool:
    return any(name.startswith(PUBLISH) for _, name in tables(host))


def _restore(host: Netns, name: str, value: str) -> None:
    with suppress(BadInput):  # the namespace is gone
        host.sysctl(name, value)


def _check(port: int, to: str, to_port: int, protocol: str, subnet: str) -> None:
    for field, value in (("port", port), ("to_port", to_port)):
        if not 1 <= value <= 65535:
            raise BadInput(field, value, "must be from 1 to 65535")
    if protocol not in PROTOCOLS:
        raise BadInput("protocol", protocol, f"must be one of {', '.join(PROTOCOLS)}")
    if to not in map(str, _subnet(subnet).hosts()):
        raise BadInput("to", to, f"must be an address in {subnet}")


def _subnet(text: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(text)
    except ValueError:
        raise BadInput("subnet", text, "must be an IPv4 network, as 10.42.0.0/24") from None


@contextmanager
def bound(ns: Netns, port: int, address: str = ANY, protocol: str = "tcp") -> Iterator[socket.socket]:
    """A socket bound in the namespace, which nobody else can then bind; the caller stays where it is."""
    try:
        taken = ns.open_socket(socket.AF_INET, PROTOCOLS[protocol], 0, lambda made: _bind(made, address, port))
    except ChildFailed as error:
        raise BadInput("port", port, f"cannot be taken on {address}: {error.detail}") from None
    with taken:
        yield taken


def _bind(made: socket.socket, address: str, port: int) -> None:
    if made.type == socket.SOCK_STREAM:  # connections that linger in TIME_WAIT do not count: socket(7)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))


@contextmanager
def answering(ns: Netns, port: int, address: str = ANY) -> Iterator[process.Child]:
    """A web server in the namespace that answers "labs-web sees 192.0.2.2": who asked, as the server sees it."""
    with bound(ns, port, address) as listener, ns.open() as descriptor:
        listener.listen()
        child = process.fork(lambda: _answer(descriptor, listener, ns.name))
    with child:
        yield child


def _answer(descriptor: int, listener: socket.socket, name: str) -> NoReturn:
    begin(descriptor)
    while True:
        client, (address, _) = listener.accept()
        client.settimeout(5)
        with client, suppress(OSError):  # it went away
            client.recv(4096)
            client.sendall(f"HTTP/1.0 200 OK\r\n\r\n{name} sees {address}\n".encode())


@contextmanager
def docker_proxy(host: Netns, port: int, to: str, to_port: int, *, address: str = ANY,
                 protocol: str = "tcp") -> Iterator[process.Child]:
    """Docker's own docker-proxy in the namespace, as dockerd starts it: on descriptor 3 it says "0", or "1" and why."""
    argv = ["docker-proxy", "-proto", protocol, "-host-ip", address, "-host-port", str(port),
            "-container-ip", to, "-container-port", str(to_port)]
    reader, writer = os.pipe()
    def first() -> None:
        os.dup2(writer, PROXY_STATUS)
        os.set_inheritable(PROXY_STATUS, True)
    child = host.spawn(argv, first)
    os.close(writer)
    with child:
        status, _, words = os.fsdecode(process.read_all(reader)).strip().partition("\n")
        if status != "0":
            raise BadInput("port", port, words or "docker-proxy did not say that it listens")
        yield child
