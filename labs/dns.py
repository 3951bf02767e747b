"""Names for containers: a small DNS server, and the resolv.conf that leads a container to it.

A message is taken apart and put together by dnspython; here is what a server decides: what a name is,
whose it is, and what to say when there is nothing to say.  RFC 1034 and RFC 1035, with RFC 2308 (no such
name, or no such data), RFC 6891 (EDNS) and RFC 7766 (TCP).

The server is one child process.  Its sockets stand in one network namespace and its own questions, to the
server above it, leave from another or the same one.  It ends when the caller closes its control socket, and
so too when the caller is killed.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import json
import os
import re
import socket
import struct
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdata
import dns.reversename
import dns.rrset
from dns.message import Message
from dns.name import Name
from dns.opcode import Opcode
from dns.rcode import Rcode
from dns.rdataclass import RdataClass
from dns.rdatatype import RdataType
from dns.rrset import RRset

from labs import machine, process
from labs.container import Bind
from labs.errors import BadInput, ChildFailed
from labs.monitor import close_all_but
from labs.netns import Netns, enter

Records: TypeAlias = Mapping[str, str | Sequence[str]]
Found: TypeAlias = tuple[Rcode, list[RRset]]

PORT = 53
TTL = 0  # for this one question only (RFC 1035, 3.2.1): the container may be gone at the next
HEADER = struct.Struct("!6H")  # ID, flags, and how many entries each of the four sections has: RFC 1035, 4.1.1
UDP_BYTES = 512  # RFC 1035, 4.2.1: what every client takes
EDNS_BYTES = 1232  # the most we send by UDP where the client takes more: it fits a packet of IPv6 everywhere
UPSTREAM_SECONDS, STREAM_SECONDS = 3.0, 10.0
MOST_AT_ONCE = 200  # connections, and questions that wait for the server above
MOST_REMEMBERED = 10_000
REVERSE = (dns.reversename.ipv4_reverse_domain, dns.reversename.ipv6_reverse_domain)  # in-addr.arpa, ip6.arpa
RESOLV_CONF = "/etc/resolv.conf"


# What the server knows


class Names:
    """Names and their addresses.

    records: name → an address, several addresses, or another name of which it is an alias.  A name is found
    alone ("web") and below the domain ("web.labs.internal"), where one is given.
    """

    def __init__(self, records: Records, domain: str = "") -> None:
        self.domain = _name("domain", domain) if domain else dns.name.root
        self._addresses: dict[Name, dict[RdataType, list[str]]] = {}
        self._aliases: dict[Name, Name] = {}
        self._owners: dict[str, list[Name]] = {}
        self._turns: Counter[tuple[Name, RdataType]] = Counter()
        for text, value in records.items():
            if _is_alias(value):
                self._aliases[_name("records", text)] = _name("records", value)
            else:
                self._add(_name("records", text), [value] if isinstance(value, str) else value)
        for alias in self._aliases:
            self._aliases[alias] = self._end_of(alias)

    def _add(self, name: Name, addresses: Sequence[str]) -> None:
        kinds = self._addresses.setdefault(name, {RdataType.A: [], RdataType.AAAA: []})
        for text in addresses:
            address = _address("records", text)
            kinds[RdataType.A if address.version == 4 else RdataType.AAAA].append(str(address))
            self._owners.setdefault(str(address), []).append(name)

    def _end_of(self, alias: Name) -> Name:
        """The name with addresses that an alias leads to."""
        name = alias
        for _ in self._aliases:
            if (name := self._aliases.get(name, name)) in self._addresses:
                return name
        raise BadInput("records", _text(alias), "is an alias that leads to no name with addresses")

    def find(self, name: Name, kind: RdataType) -> Found | None:
        """What there is of that kind under that name, or None: it is not ours to say.

        A name without a dot, one below the domain and a private address are always ours, known or not.
        """
        if any(name.is_subdomain(top) for top in REVERSE):
            return self._find_address(name, kind)
        below = self.domain != dns.name.root and name.is_subdomain(self.domain)
        key = name.relativize(self.domain).derelativize(dns.name.root) if below else name
        owner, answer = name, []
        if key in self._aliases:
            key = self._aliases[key]
            owner = key.relativize(dns.name.root).derelativize(self.domain) if below else key
            answer.append(_rrset(name, RdataType.CNAME, [owner.to_text()]))
        if key in self._addresses:
            return Rcode.NOERROR, answer + self._in_turn(owner, key, kind)
        return (Rcode.NXDOMAIN, []) if below or len(name) <= 2 else None

    def _in_turn(self, owner: Name, key: Name, kind: RdataType) -> list[RRset]:
        """The addresses of that kind; each time another one is the first."""
        found = []
        for each, addresses in self._addresses[key].items():
            if addresses and kind in (each, RdataType.ANY):
                start = self._turns[key, each] % len(addresses)
                self._turns[key, each] += 1
                found.append(_rrset(owner, each, addresses[start:] + addresses[:start]))
        return found

    def _find_address(self, name: Name, kind: RdataType) -> Found | None:
        """The names of an address (PTR): that of one container before that of a service of several."""
        try:
            address = dns.reversename.to_address(name)
        except (dns.exception.DNSException, ValueError):
            return None
        owners = sorted(self._owners.get(address, ()), key=lambda owner: sum(map(len, self._addresses[owner].values())))
        if owners:
            full = [owner.relativize(dns.name.root).derelativize(self.domain).to_text() for owner in owners]
            return Rcode.NOERROR, [_rrset(name, RdataType.PTR, full)] if kind in (RdataType.PTR, RdataType.ANY) else []
        return (Rcode.NXDOMAIN, []) if ipaddress.ip_address(address).is_private else None  # RFC 6303


def _is_alias(value: str | Sequence[str]) -> bool:
    if not isinstance(value, str):
        return False
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return True
    return False


def _address(field: str, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise BadInput(field, text, "must be an IPv4 or IPv6 address") from None


def _name(field: str, text: object) -> Name:
    """A name of at most 255 bytes, in labels of at most 63: RFC 1035, 3.1."""
    try:
        name = dns.name.from_text(str(text))
    except dns.exception.DNSException as error:
        raise BadInput(field, text, f"is no DNS name: {str(error).lower().rstrip('.')}") from None
    if name == dns.name.root:
        raise BadInput(field, text, "must not be empty")
    return name


def _text(name: Name) -> str:
    return name.to_text(omit_final_dot=True)


def _rrset(owner: Name, kind: RdataType, values: Sequence[str]) -> RRset:
    return dns.rrset.from_text(owner, TTL, RdataClass.IN, kind, *values)


# What it says


def answer(names: Names, query: Message, forwards: bool = False) -> Message | None:
    """The answer to a well-formed question, or None: it is to be passed on.

    A name that is not ours is REFUSED, unless the server forwards and the client asks for that (RD).
    """
    response = dns.message.make_response(query, recursion_available=forwards, our_payload=EDNS_BYTES)
    if len(query.question) != 1:  # RFC 9619
        response.set_rcode(Rcode.FORMERR)
        return response
    asked = query.question[0]
    if query.edns > 0:
        response.set_rcode(Rcode.BADVERS)
        return response
    found = names.find(asked.name, asked.rdtype) if asked.rdclass == RdataClass.IN else (Rcode.REFUSED, [])
    if found is None and forwards and query.flags & dns.flags.RD:
        return None
    rcode, response.answer = found or (Rcode.REFUSED, [])
    response.set_rcode(rcode)
    if found and rcode != Rcode.REFUSED:
        response.flags |= dns.flags.AA
    return response


def to_wire(response: Message, via: str) -> bytes:
    """The bytes of an answer; what does not fit a datagram of the client's is left out, and TC says so."""
    payload = max(UDP_BYTES, min(response.request_payload, EDNS_BYTES))
    size = payload if via == "udp" else 65535
    return bytes(response.to_wire(max_size=size, prefer_truncation=True, want_shuffle=False))


def only_header(wire: bytes, rcode: Rcode) -> bytes:
    """An answer of twelve bytes to what cannot be read further than its header."""
    identity, flags, *_ = HEADER.unpack_from(wire)
    kept = flags & (0x7800 | dns.flags.RD)  # the opcode, and whether recursion was desired
    return HEADER.pack(identity, dns.flags.QR | kept | rcode, 0, 0, 0, 0)


# The server, in its own process


class Query(NamedTuple):
    """One question as the server saw it: who asked how ("udp" or "tcp"), for what, and the code of the answer."""

    client: str
    via: str
    name: str
    type: str
    rcode: str


class _Service:
    """What the child process holds while it serves."""

    def __init__(self, names: Names, upstream: str | None) -> None:
        self.names, self.upstream = names, upstream
        self.log: deque[Query] = deque(maxlen=MOST_REMEMBERED)
        self._work: set[asyncio.Task[None]] = set()
        self._streams, self._asked_above = asyncio.Semaphore(MOST_AT_ONCE), asyncio.Semaphore(MOST_AT_ONCE)

    async def reply(self, wire: bytes, via: str, client: str) -> bytes:
        """The answer to some bytes, or nothing: they are too short to have an ID, or are an answer themselves."""
        if len(wire) < HEADER.size or wire[2] & 0x80:
            return b""
        query, answered = None, b""
        if (wire[2] >> 3) & 15 != Opcode.QUERY:
            answered = only_header(wire, Rcode.NOTIMP)
        else:
            try:
                query = dns.message.from_wire(wire)
            except Exception:  # noqa: BLE001  whatever a stranger's bytes do to the parser, it is their format
                answered = only_header(wire, Rcode.FORMERR)
        if query is not None:
            response = answer(self.names, query, self.upstream is not None)
            answered = to_wire(response, via) if response else await self._forward(wire, query, via)
        self._remember(query, via, client, answered)
        return answered

    def _remember(self, query: Message | None, via: str, client: str, answered: bytes) -> None:
        asked = query.question[0] if query and query.question else None
        name, kind = ("", "") if asked is None else (asked.name.to_text(), RdataType.to_text(asked.rdtype))
        self.log.append(Query(client, via, name, kind, Rcode.to_text(Rcode.make(answered[3] & 15))))

    async def _forward(self, wire: bytes, query: Message, via: str) -> bytes:
        """What the server above says, with the client's ID; SERVFAIL if it says nothing in time.

        Our question has an ID and a port of its own that nobody can guess, and the answer must repeat the
        question byte by byte: RFC 5452.
        """
        identity, labels = os.urandom(2), query.question[0].name.labels
        end = HEADER.size + sum(len(label) + 1 for label in labels) + 4  # behind the question's type and class

        def fits(told: bytes) -> bool:
            same = told[:2] == identity and told[HEADER.size:end] == wire[HEADER.size:end]
            return same and told[2] & 0x80 != 0

        ask = _ask_udp if via == "udp" else _ask_tcp
        with suppress(OSError, EOFError):  # TimeoutError and ConnectionError among them
            if self._asked_above.locked():
                raise EOFError
            async with self._asked_above, asyncio.timeout(UPSTREAM_SECONDS):
                told = await ask(str(self.upstream), identity + wire[2:], fits)
                flags = int.from_bytes(told[2:4]) & ~dns.flags.AA | dns.flags.RA  # hearsay, but we do ask around
                return wire[:2] + flags.to_bytes(2) + told[4:]
        return only_header(wire, Rcode.SERVFAIL)

    async def datagrams(self, udp: socket.socket) -> None:
        """Answer what comes by UDP, each question in a task of its own: the server above may be slow."""
        loop = asyncio.get_running_loop()
        while True:
            wire, client = await loop.sock_recvfrom(udp, 65535)
            task = asyncio.create_task(self._datagram(udp, wire, client))
            self._work.add(task)
            task.add_done_callback(self._work.discard)

    async def _datagram(self, udp: socket.socket, wire: bytes, client: tuple[str, int]) -> None:
        if answered := await self.reply(wire, "udp", client[0]):
            with suppress(OSError):  # nobody there any more
                await asyncio.get_running_loop().sock_sendto(udp, answered, client)

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes over one TCP connection: each message after two bytes that tell its length."""
        with closing(writer), suppress(OSError, EOFError):
            while not self._streams.locked():
                async with self._streams, asyncio.timeout(STREAM_SECONDS):
                    wire = await _read_message(reader)
                    answered = await self.reply(wire, "tcp", writer.get_extra_info("peername")[0])
                    if not answered:
                        break
                    writer.write(len(answered).to_bytes(2) + answered)
                    await writer.drain()

    async def control(self, control: socket.socket) -> None:
        """Do what the caller says, a line of JSON each, until it lets go."""
        reader, writer = await asyncio.open_unix_connection(sock=control, limit=1 << 24)
        writer.write(b"[]\n")
        while line := await reader.readline():
            said = json.loads(line)
            if "records" in said:
                self.names = Names(said["records"], said["domain"])
            writer.write(json.dumps([*self.log][said.get("since", MOST_REMEMBERED):]).encode() + b"\n")


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))


async def _ask_udp(server: str, wire: bytes, fits: Callable[[bytes], bool]) -> bytes:
    """The first datagram that fits; a connected socket takes none from elsewhere: connect(2)."""
    loop = asyncio.get_running_loop()
    with socket.socket(_family(server), socket.SOCK_DGRAM) as asking:
        asking.setblocking(False)
        await loop.sock_connect(asking, (server, PORT))
        await loop.sock_sendall(asking, wire)
        while not fits(told := await loop.sock_recv(asking, 65535)):
            continue
        return told


async def _ask_tcp(server: str, wire: bytes, fits: Callable[[bytes], bool]) -> bytes:
    reader, writer = await asyncio.open_connection(server, PORT)
    with closing(writer):
        writer.write(len(wire).to_bytes(2) + wire)
        if not fits(told := await _read_message(reader)):
            raise EOFError
        return told


async def _first_end(*parts: Coroutine[Any, Any, None]) -> None:
    """Run several coroutines until one of them ends; what stopped it is raised."""
    tasks = [asyncio.create_task(part) for part in parts]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


class _Place(NamedTuple):
    """Where a server listens and where its own questions leave: open network namespaces."""

    address: str
    port: int
    listens: int
    asks: int


def _main(service: _Service, place: _Place, control: socket.socket, errors: int) -> None:
    """The child: open the sockets in one namespace, go to the other, and serve."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    close_all_but(control.fileno(), errors, place.listens, place.asks)
    enter(place.listens)
    udp, tcp = (_bound(kind, place) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
    enter(place.asks)
    os.close(place.listens)
    os.close(place.asks)
    gc.freeze()  # what came with the fork is left alone, and its pages stay shared
    gc.enable()
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(_serve(service, udp, tcp, control))


async def _serve(service: _Service, udp: socket.socket, tcp: socket.socket, control: socket.socket) -> None:
    await asyncio.start_server(service.stream, sock=tcp)
    await _first_end(service.datagrams(udp), service.control(control))


def _bound(kind: int, place: _Place) -> socket.socket:
    """A socket of the namespace that the process is in now: that is decided here, once and for all."""
    bound = socket.socket(_family(place.address), kind)
    bound.setblocking(False)
    if kind == socket.SOCK_STREAM:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with process.step("bind"):
        bound.bind((place.address, place.port))
    return bound


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# The caller's side


class Server:
    """A running server; serve() makes one.

    Attributes:
        address, port: where it is asked.
        pid: its process.
        folder: where its resolv.conf files are.
    """

    def __init__(self, service: _Service, place: _Place, folder: str) -> None:
        self.address, self.port, self.folder = place.address, place.port, folder
        self._domain = service.names.domain.to_text() if service.names.domain != dns.name.root else ""
        self._open = ExitStack()
        self._control, theirs = socket.socketpair()
        self._lines = self._control.makefile("rb")
        reader, errors = os.pipe()
        pid = os.fork()
        if pid == 0:
            process.fresh_signals()
            process.child_main(lambda: _main(service, place, theirs, errors), errors)
        os.close(errors)
        theirs.close()
        self._child, self.pid = process.Child(pid, reader), pid
        for part in (self._lines, self._control, self._child):
            self._open.enter_context(part)

    def close(self) -> None:
        """End it: it holds nothing that must be undone.  May be called twice."""
        self._open.close()

    def ready(self) -> None:
        """Return when it listens, or raise what stopped it."""
        self._answer()

    def _answer(self) -> Any:
        with suppress(ConnectionError):
            if line := self._lines.readline():
                return json.loads(line)
        self._child.wait(10.0)
        raise ChildFailed("dns server", detail="it was killed")

    def _say(self, **what: object) -> Any:
        with suppress(ConnectionError):  # it has ended: _answer says of what
            self._control.sendall(json.dumps(what).encode() + b"\n")
        return self._answer()

    def update(self, records: Records) -> None:
        """From now on these names, and no others."""
        Names(records, self._domain)
        self._say(records=records, domain=self._domain)

    def queries(self, since: int = 0) -> list[Query]:
        """What was asked, from number `since` on: broken questions too, what was not answered at all not."""
        return [Query(*row) for row in self._say(since=since)]

    def resolv_conf(self, *, search: Sequence[str] = (), options: Sequence[str] = ()) -> Bind:
        """A resolv.conf(5) that names this server, to be bound into a container; it goes with the server."""
        path = f"{self.folder}/{len(os.listdir(self.folder))}"
        with open(path, "w", encoding="ascii") as file:
            file.write(resolv_conf([self.address], search, options))
        return Bind(path, RESOLV_CONF)


class Told(NamedTuple):
    """What dig(1) made of an answer.

    Attributes:
        rcode: "NOERROR", "NXDOMAIN" and so on; "" where there was no answer.
        flags: as dig prints them: qr (an answer), aa (from who knows it), tc (cut), rd and ra (recursion).
        records: of the answer section, each "NAME TYPE DATA".
    """

    rcode: str
    flags: str
    records: list[str]

    def of(self, kind: str) -> list[str]:
        """The data of the records of one type."""
        return [row.split(" ", 2)[2] for row in self.records if row.split(" ", 2)[1] == kind]


def dig(ns: Netns, address: str, *question: str) -> Told:
    """Ask a server from a network namespace, once, with Debian's dig: a name, a type, and options such as "+tcp"."""
    text = ns.run(["dig", f"@{address}", "+tries=1", "+timeout=5", "+noall", "+comments", "+answer", *question],
                  check=False)
    rcode = re.search(r"status: (\w+)", text)
    flags = re.search(r"^;; flags: ([a-z ]+);", text, re.MULTILINE)
    rows = [line.split(None, 4) for line in text.splitlines() if line and not line.startswith(";")]
    return Told(rcode[1] if rcode else "", flags[1] if flags else "", [f"{row[0]} {row[3]} {row[4]}" for row in rows])


def exchange(ns: Netns, address: str, wire: bytes) -> bytes:
    """What a server answers to any bytes sent over TCP from a network namespace; nothing if it hangs up."""
    def talk() -> str:
        with socket.create_connection((address, PORT), 10) as line:
            line.sendall(len(wire).to_bytes(2) + wire)
            return line.recv(65537)[2:].hex()
    return bytes.fromhex(ns.call(talk))


def resolv_conf(nameservers: Sequence[str], search: Sequence[str] = (), options: Sequence[str] = ()) -> str:
    """The text of a resolv.conf(5): who is asked, which suffixes are tried, and options such as "ndots:1"."""
    lines = [f"nameserver {_address('nameservers', one)}" for one in nameservers]
    lines += ["search " + " ".join(_text(_name("search", one)) for one in search)] if search else []
    lines += ["options " + " ".join(options)] if options else []
    return "\n".join(lines) + "\n"


@contextmanager
def serve(ns: Netns, address: str, records: Records, *, upstream: str | None = None, domain: str = "",
          port: int = PORT, sockets: Netns | None = None) -> Iterator[Server]:
    """A DNS server until the end of the block: UDP and TCP, in that network namespace.

    address: where it listens, an address that the namespace has.  upstream: the server that is asked for
    names that are not ours (REFUSED without).  sockets: the namespace in which it listens, if that is another
    one than the one its own questions leave from, as with Docker.  Raises BadInput for an address that is not
    there or is taken; then nothing is left.
    """
    machine.require()
    where = str(_address("address", address))
    if upstream and str(_address("upstream", upstream)) == where:
        raise BadInput("upstream", upstream, "is this server itself")
    service = _Service(Names(records, domain), upstream)
    dns.rdata.load_all_types()  # type: ignore[no-untyped-call]  # nothing is imported after the fork
    folder = f"{machine.STATE}/{machine.new_name('dns')}"
    with ExitStack() as undo:
        os.makedirs(folder)
        undo.callback(machine.remove_tree, folder)
        with (sockets or ns).open() as listens, ns.open() as asks:
            place = _Place(where, port, listens, asks)
            server = Server(service, place, folder)
        undo.callback(server.close)
        try:
            server.ready()
        except ChildFailed as error:
            raise _bad_place(error, place) or error from None
        yield server


def _bad_place(error: ChildFailed, place: _Place) -> BadInput | None:
    """What bind(2) refused, in the caller's words."""
    if error.errno == errno.EADDRNOTAVAIL:
        return BadInput("address", place.address, "no interface of the namespace has it")
    if error.errno == errno.EADDRINUSE:
        return BadInput("port", place.port, f"another server has it on {place.address}")
    return None
