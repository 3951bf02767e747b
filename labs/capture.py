r"""What passes where: packets heard in several network namespaces at once, on the clock they share.

    with capture.listen(client, host, web) as heard:        # one socket in each namespace
        ...                                                  # something is sent
        packets = heard.until(lambda packets: len(packets) > 9)
    print(*packets, sep="\n")

A packet socket (packet(7)) belongs for ever to the namespace it was made in, so one process can hold those of
several: a child enters, makes it and hands it over; nobody stays inside.
`flows` and `follow` read conntrack(8), `trace` the way of a packet through nftables (nft(8), "monitor trace").
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import NamedTuple

from labs import process, show
from labs.errors import BadInput, ChildFailed
from labs.netns import Netns

ETH_P_ALL, ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0003, 0x0800, 0x0806, 0x86DD  # <linux/if_ether.h>
PACKET_OUTGOING = 4  # sll_pkttype in <linux/if_packet.h>
SOL_PACKET, PACKET_STATISTICS = 263, 6  # <linux/if_packet.h>
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35  # <asm-generic/socket.h>
BUFFER = 8 << 20
LARGEST = 1 << 17  # a frame that the sender leaves to the hardware to cut may have over 64 KiB
IPPROTO = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6"}
FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")  # RFC 9293, 3.1, from the lowest bit
ECHO = {(1, 8): "request", (1, 0): "reply", (58, 128): "request", (58, 129): "reply"}
NETLINK_NETFILTER = 12  # <linux/netlink.h>
PCAP = struct.Struct("<LHHLLLL")  # pcap-savefile(5)
NANOSECONDS, ETHERNET = 0xA1B23C4D, 1  # the magic number for times in nanoseconds; LINKTYPE_ETHERNET


class Packet(NamedTuple):
    """One frame, seen at one link of one namespace.

    Attributes:
        time: when, in nanoseconds since the epoch, on the kernel's clock.
        namespace: where, by the name of the namespace.
        link: the network interface there.
        way: "in" or "out", as that namespace sees it.
        macs: source and target address of the Ethernet frame.
        protocol: TCP, UDP, ICMP, ICMPv6, ARP, or the number of what is not taken apart.
        source: address, with the port where there is one.
        target: the same of the receiver.
        ttl: hops that are left (IPv6: hop limit); 0 for ARP.
        flags: of TCP, as "SYN,ACK"; "request" or "reply" of ARP and echo.
        sequence: the sequence number of TCP or echo, else 0.
        payload: bytes after the last header that is taken apart.
        data: the frame.
    """

    time: int
    namespace: str
    link: str
    way: str
    macs: tuple[str, str]
    protocol: str
    source: str
    target: str
    ttl: int
    flags: str
    sequence: int
    payload: bytes
    data: bytes

    @property
    def place(self) -> str:
        """Namespace and link: "labs-host br0"."""
        return f"{self.namespace} {self.link}"

    def __str__(self) -> str:
        words = f"{self.place:<19}{self.way:>3}  {self.protocol} {self.source} > {self.target} {self.flags}"
        size = f" {len(self.payload)} bytes" if self.payload else ""
        return words.rstrip() + (f" ttl {self.ttl}" if self.ttl else "") + size


class Upper(NamedTuple):
    """What a protocol above IP says."""

    ports: tuple[int, int] | None
    flags: str
    sequence: int
    payload: bytes


# Hearing


class Capture:
    """Packet sockets that listen; `packets` is what has been read of them so far."""

    def __init__(self, sockets: Mapping[str, socket.socket], keep: Callable[[Packet], bool]) -> None:
        self.packets: list[Packet] = []
        self._sockets, self._keep = sockets, keep

    def read(self) -> list[Packet]:
        """All packets up to now, in order of time; those of one namespace stay in the order they came in."""
        for name, listener in self._sockets.items():
            self.packets += filter(self._keep, _drain(name, listener))
        self.packets.sort(key=lambda packet: packet.time)
        return self.packets

    def until(self, enough: Callable[[list[Packet]], object], timeout: float = 30.0) -> list[Packet]:
        """Read until enough(packets) is true, and return them; Timeout after timeout seconds."""
        process.until(lambda: enough(self.read()), timeout, "the packets waited for")
        return self.packets

    def lost(self) -> int:
        """Packets that found the buffer full since this was last asked: PACKET_STATISTICS in packet(7)."""
        counted = (one.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8) for one in self._sockets.values())
        return sum(struct.unpack("II", pair)[1] for pair in counted)


@contextmanager
def listen(*places: Netns, keep: Callable[[Packet], bool] = bool) -> Iterator[Capture]:
    """Hear every packet on every link of these namespaces, and keep those for which keep(packet) is true."""
    with ExitStack() as stack:
        yield Capture({place.name: stack.enter_context(_packet_socket(place)) for place in places}, keep)


def _packet_socket(place: Netns) -> socket.socket:
    """A socket that hears every link of the namespace: packet(7)."""
    return place.open_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL), _prepare)


def _prepare(listener: socket.socket) -> None:
    listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    listener.setblocking(False)


def _drain(name: str, listener: socket.socket) -> Iterator[Packet]:
    """Every frame that waits in the socket; the time comes beside it, as SO_TIMESTAMPNS asks (socket(7))."""
    room = socket.CMSG_SPACE(16)
    while True:
        try:
            data, beside, _, (link, _, kind, *_) = listener.recvmsg(LARGEST, room)
        except BlockingIOError:
            return
        seconds, nanoseconds = struct.unpack("ll", beside[0][2])
        way = "out" if kind == PACKET_OUTGOING else "in"
        yield dissect(data, seconds * 10**9 + nanoseconds, name, link, way)


# Taking apart


def dissect(data: bytes, when: int = 0, namespace: str = "", link: str = "", way: str = "in") -> Packet:
    """An Ethernet frame as a Packet; what is cut short or unknown keeps the number of its type."""
    kind = int.from_bytes(data[12:14], "big")
    try:
        rest = {ETH_P_ARP: _arp, ETH_P_IP: _ipv4, ETH_P_IPV6: _ipv6}[kind](data[14:])
    except (KeyError, struct.error, IndexError, ValueError):
        rest = (f"0x{kind:04x}", "", "", 0, "", 0, data[14:])
    return Packet(when, namespace, link, way, (_mac(data[6:12]), _mac(data[:6])), *rest, data)


Fields = tuple[str, str, str, int, str, int, bytes]


def _mac(data: bytes) -> str:
    return data.hex(":")


def _arp(data: bytes) -> Fields:
    """RFC 826, for IPv4 over Ethernet: opcode, then sender and target, hardware and protocol address each."""
    opcode, sender, target = struct.unpack("!6xH6x4s6x4s", data[:28])
    flags = {1: "request", 2: "reply"}.get(opcode, str(opcode))
    return "ARP", _address(sender), _address(target), 0, flags, 0, b""


def _ipv4(data: bytes) -> Fields:
    """RFC 791, 3.1.  Ethernet may pad a short packet, so the length counts, not the frame's end."""
    first, length, fragment, ttl, protocol, source, target = struct.unpack("!BxH2xHBB2x4s4s", data[:20])
    upper = data[(first & 15) * 4 : length or len(data)]
    return _whole(protocol, upper, ttl, source, target, whole=not fragment & 0x1FFF)


def _ipv6(data: bytes) -> Fields:
    """RFC 8200, 3, without extension headers."""
    length, protocol, ttl, source, target = struct.unpack("!4xHBB16s16s", data[:40])
    return _whole(protocol, data[40 : 40 + length], ttl, source, target)


def _whole(protocol: int, data: bytes, ttl: int, source: bytes, target: bytes, *, whole: bool = True) -> Fields:
    upper = _upper(protocol, data) if whole else Upper(None, "fragment", 0, data)
    ends = [_address(end) for end in (source, target)]
    if upper.ports is not None:
        ends = [_join(end, port) for end, port in zip(ends, upper.ports, strict=True)]
    return IPPROTO.get(protocol, str(protocol)), ends[0], ends[1], ttl, upper.flags, upper.sequence, upper.payload


def _join(address: str, port: object) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _address(data: bytes) -> str:
    return str(ipaddress.ip_address(data))


def _upper(protocol: int, data: bytes) -> Upper:
    if protocol == 6:
        source, target, sequence, offset, bits = struct.unpack("!HHL4xBB", data[:14])
        flags = ",".join(name for number, name in enumerate(FLAGS) if bits & 1 << number)
        return Upper((source, target), flags, sequence, data[(offset >> 4) * 4 :])
    if protocol == 17:
        source, target, length = struct.unpack("!HHH", data[:6])
        return Upper((source, target), "", 0, data[8:length])
    if protocol in (1, 58):
        kind, sequence = struct.unpack("!B5xH", data[:8])
        return Upper(None, ECHO.get((protocol, kind), f"type {kind}"), sequence, data[8:])
    return Upper(None, "", 0, data)


def write(packets: Iterable[Packet], path: str) -> None:
    """Save frames for tcpdump(8), option -r, and Wireshark: pcap-savefile(5)."""
    with open(path, "wb") as file:
        file.write(PCAP.pack(NANOSECONDS, 2, 4, 0, 0, LARGEST, ETHERNET))
        for packet in packets:
            size = len(packet.data)
            file.write(struct.pack("<LLLL", *divmod(packet.time, 10**9), size, size) + packet.data)


# Drawing


def rewritten(before: Packet, after: Packet) -> list[str]:
    """What differs between two sightings of one packet: "target A → B", "ttl 64 → 63", "MAC addresses"."""
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in ("source", "target", "ttl")]
    changes = [f"{name} {old} → {new}" for name, old, new in pairs if old != new]
    return changes + (["MAC addresses"] if before.macs != after.macs else [])


def path(packets: Sequence[Packet], title: str = "The path of a packet") -> show.Picture:
    """Draw the sightings of one packet from top to bottom, namespace by namespace, and what was rewritten between two.

    A change that lies between two namespaces stands in the later one.
    """
    if not packets:
        raise BadInput("packets", packets, "there must be at least one")
    frames: dict[str, dict[str, show.Box]] = {packet.namespace: {} for packet in packets}
    for number, packet in enumerate(packets):
        frame = frames[packet.namespace]
        changes = rewritten(packets[number - 1], packet) if number else []
        if changes:
            frame[f"change {number}"] = show.Box(("rewritten here", *changes), fresh=True)
        frame[f"{number}"] = show.Box((f"{packet.link} {packet.way}", f"{packet.source} → {packet.target}"))
    drawn = [(name, key, box) for name, boxes in frames.items() for key, box in boxes.items()]
    joins = [show.Join(first[1], second[1]) for first, second in pairwise(drawn)]
    lines = [f"{name}: {', '.join(box.lines)}" for name, _, box in drawn]
    return show.diagram("\n".join([title, *lines]), frames, joins)


# What netfilter says


class Lines:
    """What a running command has written so far; after its end, all that it wrote."""

    def __init__(self, output: int) -> None:
        self._output, self._text = output, b""

    def read(self) -> list[str]:
        """The finished lines."""
        if self._output >= 0:
            self._text = os.pread(self._output, os.fstat(self._output).st_size, 0)
        return [line.strip() for line in self._text.decode().split("\n")[:-1]]

    def close(self) -> None:
        """Keep what there is, and let the file go."""
        self.read()
        os.close(self._output)
        self._output = -1

    def until(self, enough: Callable[[list[str]], object], timeout: float = 30.0) -> list[str]:
        """Read until enough(lines) is true, and return them; Timeout after timeout seconds."""
        process.until(lambda: enough(self.read()), timeout, "the lines waited for")
        return self.read()


@contextmanager
def follow(place: Netns, argv: Sequence[str]) -> Iterator[Lines]:
    """Run what tells of events in the namespace (nft monitor, conntrack -E), from when it hears them."""
    output = os.memfd_create("labs-follow")
    lines = Lines(output)
    try:
        with place.spawn(argv, first=lambda: os.dup2(output, 1)) as child:
            process.until(lambda: _subscribed(child), what=f"{argv[0]} listening")
            yield lines
    finally:
        lines.close()


def _subscribed(child: process.Child) -> bool:
    """Whether a child has a socket of NETLINK_NETFILTER that has joined a group: proc_pid_net(5)."""
    if process.readable(child.pidfd, 0):
        raise ChildFailed("listen to netfilter", detail=f"the command ended with status {child.wait().shell}")
    try:
        sockets = process.descriptors(child.pid).values()
        with open(f"/proc/{child.pid}/net/netlink", encoding="utf-8") as file:
            rows = [line.split() for line in file][1:]
    except OSError:  # it ended since then: the next look tells
        return False
    return any(int(row[1]) == NETLINK_NETFILTER and int(row[3], 16) and f"socket:[{row[9]}]" in sockets
               for row in rows)


class Flow(NamedTuple):
    """A connection as conntrack(8) prints it.

    Attributes:
        event: NEW, UPDATE or DESTROY, where an event was told.
        protocol: tcp, udp, icmp.
        state: of TCP, else "".
        original: source and target of the first packet.
        reply: source and target that an answer must have; what differs from the turned original is NAT.
        marks: ASSURED, UNREPLIED.
    """

    event: str
    protocol: str
    state: str
    original: tuple[str, str]
    reply: tuple[str, str]
    marks: tuple[str, ...]

    def __str__(self) -> str:
        head = " ".join(word for word in (self.event, self.protocol, self.state) if word)
        lines = [f"{name:>9} {source} > {target}" for name, (source, target) in
                 (("original", self.original), ("reply", self.reply))]
        return "\n".join([" ".join([head, *self.marks]), *lines])


FLOW = re.compile(r"(?:\[(?P<event>[A-Z]+)\] +)?(?P<protocol>\w+) +\d+ +(?:\d+ +)?(?P<state>[A-Z][A-Z_0-9]+)?")


def flow(line: str) -> Flow:
    """One line of `conntrack -L` or `conntrack -E`."""
    head, words = FLOW.match(line.strip()), re.findall(r"(src|dst|sport|dport)=(\S+)", line)
    if head is None or sum(key == "src" for key, _ in words) != 2:
        raise BadInput("conntrack", line, "must be a line of `conntrack -L` or `conntrack -E`")
    middle = [number for number, (key, _) in enumerate(words) if key == "src"][1]
    marks = tuple(re.findall(r"\[(ASSURED|UNREPLIED)\]", line))
    return Flow(head["event"] or "", head["protocol"], head["state"] or "", _ends(words[:middle]),
                _ends(words[middle:]), marks)


def _ends(words: Iterable[tuple[str, str]]) -> tuple[str, str]:
    said = dict(words)
    ends = [_join(said[end], said[port]) if port in said else said[end]
            for end, port in (("src", "sport"), ("dst", "dport"))]
    return ends[0], ends[1]


def flows(place: Netns, protocol: str = "tcp") -> list[Flow]:
    """The connections that the namespace's conntrack knows now."""
    return [flow(line) for line in place.run(["conntrack", "-L", "-p", protocol]).splitlines() if "src=" in line]


class Step(NamedTuple):
    """One step of a packet through the rules of nftables.

    Attributes:
        table: family and name, "ip nat".
        chain: the chain it is in.
        what: packet (it comes in), rule (one matched), policy or verdict (it leaves).
        text: the packet's headers, the rule, or the verdict.
    """

    table: str
    chain: str
    what: str
    text: str

    def header(self, field: str) -> str:
        """The value of one header field, "" if it was not told: header("ip daddr")."""
        found = re.search(rf"(?:^| ){re.escape(field)} (\S+)", self.text)
        return found[1].strip('"') if found else ""


TRACE = re.compile(r"trace id (?P<id>\w+) (?P<table>\w+ \S+) (?P<chain>\S+) "
                   r"(?P<what>packet|rule|policy|verdict)(?:: | )(?P<text>.*)")
TRACING = "labs-trace"


@contextmanager
def trace(place: Netns, match: str) -> Iterator[Lines]:
    """Have nftables tell the way of every packet that matches, from the first hook on: `nft monitor trace`.

    match: as a rule of nft(8) says it, "tcp dport 8080".  The table labs-trace is removed in the end.
    """
    chains = "\n".join(f"chain {hook} {{ type filter hook {hook} priority -400; {match} meta nftrace set 1; }}"
                       for hook in ("prerouting", "output"))
    place.run(["nft", "-f", "-"], stdin=f"table inet {TRACING} {{\n{chains}\n}}\n")
    try:
        with follow(place, ["nft", "monitor", "trace"]) as lines:
            yield lines
    finally:
        place.run(["nft", "delete", "table", "inet", TRACING])


def steps(lines: Iterable[str]) -> list[list[Step]]:
    """The steps of each packet traced, without those in the table that starts the tracing.

    The kernel makes a trace's id from the address of the packet's buffer, which a later packet may get: so a packet
    is known by what its headers say too.
    """
    found: dict[tuple[str, ...], list[Step]] = {}
    current: dict[str, tuple[str, ...]] = {}
    for match in filter(None, map(TRACE.match, lines)):
        step, number = Step(*match.group("table", "chain", "what", "text")), match["id"]
        if step.what == "packet":
            current[number] = (number, step.header("ip id"), step.header("tcp flags =="))
        if step.table != f"inet {TRACING}" and number in current:
            found.setdefault(current[number], []).append(step)
    return list(found.values())
