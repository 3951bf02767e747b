"""Talk to the kernel about links, addresses, routes and neighbours: rtnetlink(7), through pyroute2.

A request is one message, and the kernel has answered it when the method returns.  A netlink socket
belongs for ever to the network namespace that it was made in, whoever holds it: so a child enters the
namespace, makes the socket there, and passes it back (SCM_RIGHTS, unix(7)).
pyroute2 writes and reads the messages; its own sockets would start an event loop, which a notebook has already.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from pyroute2.common import AddrPool
from pyroute2.iproute.linux import get_arguments_processor
from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, rtnl
from pyroute2.netlink.nlsocket import NetlinkRequest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.marshal import MarshalRtnl
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.nsidmsg import nsidmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from labs import process
from labs.errors import KernelError
from labs.monitor import close_all_but
from labs.netns import Netns, enter

# What a request is about: its message, and the types for new, delete and dump, <linux/rtnetlink.h>.
SUBJECTS = {
    "link": (ifinfmsg, rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK, rtnl.RTM_GETLINK),
    "addr": (ifaddrmsg, rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR, rtnl.RTM_GETADDR),
    "route": (rtmsg, rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE, rtnl.RTM_GETROUTE),
    "neigh": (ndmsg, rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH, rtnl.RTM_GETNEIGH),
}
VERBS = {"add": (1, "create"), "set": (1, "req"), "del": (2, "req"), "get": (3, "get"), "dump": (3, "dump")}
BUFFER, MOST_FDS = 1 << 16, 64
SOL_NETLINK, NETLINK_EXT_ACK = 270, 11  # <linux/socket.h>, <linux/netlink.h>
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000  # <linux/if.h>
IFA_F_NODAD = 0x02  # <linux/if_addr.h>
RT_TABLE_MAIN, RTN_UNICAST = 254, 1
SCOPES = {0: "global", 200: "site", 253: "link", 254: "host", 255: "nowhere"}  # enum rt_scope_t
# NUD_*, <linux/neighbour.h>
STATES = {0x00: "NONE", 0x01: "INCOMPLETE", 0x02: "REACHABLE", 0x04: "STALE", 0x08: "DELAY", 0x10: "PROBE",
          0x20: "FAILED", 0x40: "NOARP", 0x80: "PERMANENT"}
NSID_NONE = 0xFFFFFFFF  # NETNSA_NSID_NOT_ASSIGNED, <linux/net_namespace.h>
Message = Any  # a pyroute2 message: fields by [], attributes by get(), both under their kernel names


class Rtnl:
    """A socket of the family NETLINK_ROUTE in one network namespace, with NETLINK_EXT_ACK: netlink(7)."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        # What pyroute2's requests ask of the socket that they are for.
        self.marshal, self.addr_pool, self.epid, self.status = MarshalRtnl(), AddrPool(), 0, {"nlm_echo": False}

    def __enter__(self) -> Rtnl:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def request(self, verb: str, subject: str, **settings: object) -> list[Message]:
        """Send one message and give the answers: request("add", "link", ifname="br0", kind="bridge").

        subject is one of SUBJECTS, verb one of VERBS; settings are attributes as pyroute2 names them (IFLA_MTU is
        mtu).  A refusal is a KernelError with the kernel's errno, and in value the kernel's own words.
        """
        make, *types = SUBJECTS[subject]
        place, mode = VERBS[verb]
        if subject == "route" and verb != "dump":
            settings = {"proto": "static", "type": "unicast", **settings}
        arguments = get_arguments_processor(subject, verb, settings, {"strict_check": False})
        ask = NetlinkRequest(self, make(), verb, {verb: (types[place - 1], mode)}, None, arguments)
        return self.converse(ask.msg, f"{verb} {subject}")

    def converse(self, message: Message, step: str) -> list[Message]:
        """Send a message, and read up to its acknowledgement or the end of its dump: netlink(7)."""
        message.encode()
        number = message["header"]["sequence_number"]
        try:
            while True:
                self._socket.send(message.data)
                answers = list(self._answers(number, step))
                if not any(answer["header"]["flags"] & NLM_F_DUMP_INTR for answer in answers):
                    return answers  # else the tables changed under the dump
        finally:
            self.addr_pool.free(number, ban=0xFF)

    def _answers(self, number: int, step: str) -> Iterator[Message]:
        while True:
            for answer in self.marshal.parse(self._socket.recv(BUFFER)):
                head = answer["header"]
                if head["sequence_number"] != number:
                    continue
                if head["error"]:
                    code, words = head["error"].args
                    raise KernelError(step, code, value=words if words != os.strerror(code) else None)
                if head["type"] in (NLMSG_DONE, NLMSG_ERROR):
                    return
                yield answer

    def index(self, name: str) -> int:
        """The number of the link of that name: if_nametoindex(3); KernelError ENODEV without one."""
        return int(self.request("get", "link", ifname=name)[0]["index"])

    def delete_link(self, name: str) -> None:
        """Delete a link, if it is there still."""
        with suppress_errno(errno.ENODEV):
            self.request("del", "link", ifname=name)


@contextmanager
def suppress_errno(*numbers: int) -> Iterator[None]:
    """Go on where the kernel refuses with one of these: what was asked for is so already."""
    try:
        yield
    except KernelError as error:
        if error.errno not in numbers:
            raise


class Opener:
    """A child that makes netlink sockets in other namespaces, as often as it is asked: a context manager.

    It has no file but its socket, and goes back to its own namespace, so that it keeps no other one alive.
    """

    def __enter__(self) -> Opener:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._turn = threading.Lock()
        with theirs:
            self._child = process.fork(lambda: _make_sockets(theirs))
        return self

    def __exit__(self, *exc: object) -> None:
        self._control.close()
        self._child.__exit__()

    @property
    def alive(self) -> bool:
        """Whether the child can still be asked."""
        return not process.readable(self._child.pidfd, 0)

    def open(self, descriptors: list[int]) -> list[int]:
        """Descriptors of a netlink socket in each of the namespaces that descriptors stand for."""
        with self._turn:
            socket.send_fds(self._control, [b"?"], descriptors)
            answer, made, _, _ = socket.recv_fds(self._control, 16, len(descriptors))
        if not made:
            raise KernelError("setns", int(answer or errno.ESRCH))
        return made


def _make_sockets(control: socket.socket) -> None:
    """In the child: sockets for descriptors of namespaces, until the parent closes its end."""
    os.setsid()  # where no Ctrl-C reaches it
    close_all_but(control.fileno())
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    while wanted := socket.recv_fds(control, 1, MOST_FDS)[1]:
        try:
            _answer(control, wanted)
        except OSError as error:
            control.send(b"%d" % (error.errno or 0))
        enter(own)


def _answer(control: socket.socket, wanted: list[int]) -> None:
    with ExitStack() as closing:
        made = []
        for descriptor in wanted:
            closing.callback(os.close, descriptor)
            enter(descriptor)
            made.append(closing.enter_context(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)))
        socket.send_fds(control, [b"!"], [one.fileno() for one in made])


@contextmanager
def connect(*namespaces: Netns, opener: Opener | None = None) -> Iterator[tuple[Rtnl, ...]]:
    """A socket in each of the namespaces, made by the opener or a child of its own; BadInput when one is gone."""
    with ExitStack() as stack:
        descriptors = [stack.enter_context(one.open()) for one in namespaces]
        maker = opener if opener and opener.alive else stack.enter_context(Opener())
        yield tuple(stack.enter_context(Rtnl(descriptor)) for descriptor in maker.open(descriptors))


class Address(NamedTuple):
    """An address of a link, as 10.42.0.2/24; scope as ip-address(8) names it."""

    link: str
    address: str
    scope: str


class Link(NamedTuple):
    """A link: peer is the ifindex of a veth's other end (or of what a macvlan or VLAN stands on), 0 if none.

    peer_ns is the nsid, in this namespace, of the one that the peer is in; None: this one.  carrier: the other end
    is up too, as IFF_LOWER_UP says (netdevice(7)).
    """

    index: int  # type: ignore[assignment]  # tuple.index() is of no use here
    name: str
    kind: str
    up: bool
    carrier: bool
    mac: str
    mtu: int
    master: str
    peer: int
    peer_ns: int | None
    addresses: tuple[str, ...]


class Route(NamedTuple):
    """A unicast route of the main table: destination is "default" or 10.42.0.0/24, gateway "" on the link itself."""

    destination: str
    gateway: str
    link: str
    source: str
    metric: int


class Neighbour(NamedTuple):
    """Who has an address: mac is "" while nobody answers; state as ip-neighbour(8) names it."""

    address: str
    mac: str
    link: str
    state: str


def links(ns: Netns) -> list[Link]:
    """The links of a namespace, in the order they were made."""
    with connect(ns) as (kernel,):
        return read_links(kernel)


def read_links(kernel: Rtnl) -> list[Link]:
    """The links of the socket's namespace, in the order they were made."""
    found = kernel.request("dump", "link")
    names = _names(found)
    held = _addresses(kernel, names)
    return [_link(message, names, held) for message in found]


def _names(found: list[Message]) -> dict[int, str]:
    return {message["index"]: message.get("ifname") for message in found}


def _link(message: Message, names: dict[int, str], held: list[Address]) -> Link:
    name, kind = message.get("ifname"), message.get(("linkinfo", "kind")) or ""
    return Link(message["index"], name, kind or ("loopback" if name == "lo" else ""),
                bool(message["flags"] & IFF_UP), bool(message["flags"] & IFF_LOWER_UP),
                message.get("address") or "", message.get("mtu"),
                names.get(message.get("master") or 0, ""), message.get("link") or 0, message.get("link_netnsid"),
                tuple(one.address for one in held if one.link == name))


def addresses(ns: Netns) -> list[Address]:
    """The addresses of all links, IPv4 first."""
    with connect(ns) as (kernel,):
        return _addresses(kernel, _names(kernel.request("dump", "link")))


def _addresses(kernel: Rtnl, names: dict[int, str]) -> list[Address]:
    found = kernel.request("dump", "addr", family=socket.AF_UNSPEC)
    return [Address(names.get(m["index"], ""), f"{m.get('local') or m.get('address')}/{m['prefixlen']}",
                    SCOPES.get(m["scope"], str(m["scope"]))) for m in found]


def routes(ns: Netns) -> list[Route]:
    """The unicast routes of the main table, IPv4 first: what `ip route` and `ip -6 route` show."""
    with connect(ns) as (kernel,):
        names = _names(kernel.request("dump", "link"))
        found = [message for family in (socket.AF_INET, socket.AF_INET6)
                 for message in kernel.request("dump", "route", family=family)]
    return [_route(m, names) for m in found if m.get("table") == RT_TABLE_MAIN and m["type"] == RTN_UNICAST]


def _route(message: Message, names: dict[int, str]) -> Route:
    to = message.get("dst")
    return Route(f"{to}/{message['dst_len']}" if to else "default", message.get("gateway") or "",
                 names.get(message.get("oif") or 0, ""), message.get("prefsrc") or "", message.get("priority") or 0)


def neighbours(ns: Netns) -> list[Neighbour]:
    """The neighbour tables, ARP's and IPv6's, without multicast: arp(7), what `ip neigh` shows."""
    with connect(ns) as (kernel,):
        names = _names(kernel.request("dump", "link"))
        found = kernel.request("dump", "neigh", family=socket.AF_UNSPEC)
    return [Neighbour(m.get("dst"), m.get("lladdr") or "", names.get(m["ifindex"], ""), STATES.get(m["state"], "?"))
            for m in found if m["state"] not in (0x00, 0x40)]


def nsid(ns: Netns, other: Netns) -> int | None:
    """The number by which ns knows the namespace other, if it has one: `ip netns list-id`, Link.peer_ns."""
    with connect(ns) as (kernel,):
        return read_nsid(kernel, other)


def read_nsid(kernel: Rtnl, other: Netns) -> int | None:
    """The number by which the socket's namespace knows the other one: RTM_GETNSID, rtnetlink(7)."""
    with other.open() as descriptor:
        message = nsidmsg()
        message["attrs"] = [("NETNSA_FD", descriptor)]
        ask = NetlinkRequest(kernel, message, msg_type=rtnl.RTM_GETNSID, msg_flags=NLM_F_REQUEST | NLM_F_ACK)
        number = kernel.converse(ask.msg, "get nsid")[0].get("NETNSA_NSID")
    return None if number == NSID_NONE else number
