"""Container networks from the kernel's parts: veth pairs, a bridge, addresses and routes, over netlink.

What notebook 01 does by hand with ip(8) is a function here::

    labs-web ┌ eth0 ┐        labs-host         ┌ eth0 ┐ labs-db
             └──┬───┘                          └──┬───┘
                └── veth-web ─┬─ br0 ─┬─ veth-db ─┘         veth(4): what goes in at one end comes out at the other

The host itself is a network namespace, so nothing done here reaches the machine's own network.
Everything is a context manager and undone on every exit path; what a kill -9 leaves, lab.clean() removes.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from labs import ipam, machine, netlink
from labs.errors import BadInput, KernelError
from labs.netlink import Address, Link, Neighbour, Route, addresses, links, neighbours, nsid, routes
from labs.netns import Netns, namespace

__all__ = ["Address", "Attachment", "Link", "Neighbour", "Netns", "Network", "Route", "addresses", "bridge", "links",
           "namespace", "neighbours", "network", "nsid", "routes", "veth"]

IFNAMSIZ = 16  # <linux/if.h>, with the NUL at the end
MTU = (68, 65535)  # RFC 791: what every link must carry; the most of a veth


def check_link(name: str, field: str = "name") -> str:
    """A link's name as dev_valid_name() of the kernel wants it."""
    if not 0 < len(os.fsencode(name)) < IFNAMSIZ or name in (".", "..") or any(c in "/:" or c.isspace() for c in name):
        raise BadInput(field, name, f"must have 1 to {IFNAMSIZ - 1} bytes, without / : and white space (IFNAMSIZ)")
    return name


def check_mtu(mtu: int) -> int:
    """Bytes of the largest packet."""
    if not MTU[0] <= mtu <= MTU[1]:
        raise BadInput("mtu", mtu, f"must be {MTU[0]} to {MTU[1]} bytes")
    return mtu


def require_absent(kernel: netlink.Rtnl, name: str, where: Netns) -> None:
    """A name in use is BadInput, said before anything is made."""
    with netlink.suppress_errno(errno.ENODEV):
        kernel.index(check_link(name))
        raise BadInput("name", name, f"{where.name} has a link of that name")


@contextmanager
def veth(a: Netns, name_a: str, b: Netns, name_b: str, *, mtu: int = 1500) -> Iterator[tuple[Link, Link]]:
    """A veth pair, one end in each namespace, both up: veth(4).  Deleting one end deletes the other."""
    machine.require()
    with netlink.connect(a, b) as (near, far), b.open() as there:
        require_absent(near, name_a, a)
        require_absent(far, name_b, b)
        near.request("add", "link", ifname=name_a, kind="veth", state="up", mtu=check_mtu(mtu),
                     peer={"ifname": name_b, "net_ns_fd": there, "mtu": mtu})
    with ExitStack() as undo:
        undo.callback(_delete, a, name_a)
        with netlink.connect(b) as (far,):
            far.request("set", "link", ifname=name_b, state="up")
        yield _find(a, name_a), _find(b, name_b)


def _find(where: Netns, name: str) -> Link:
    return next(link for link in links(where) if link.name == name)


def _delete(where: Netns, name: str, opener: netlink.Opener | None = None) -> None:
    """Delete a link, unless its namespace is gone: then the kernel has done so."""
    with suppress(BadInput), netlink.connect(where, opener=opener) as (kernel,):
        kernel.delete_link(name)


@contextmanager
def bridge(ns: Netns, name: str = "br0", *, address: str = "", mtu: int = 1500) -> Iterator[Link]:
    """A bridge that is up, with an address such as 10.42.0.1/24 (or none): `ip link add br0 type bridge`."""
    machine.require()
    given = _interface(address) if address else None
    with ExitStack() as undo:
        with netlink.connect(ns) as (kernel,):
            require_absent(kernel, name, ns)
            kernel.request("add", "link", ifname=name, kind="bridge", mtu=check_mtu(mtu), state="up",
                           **({"address": mac_of(given.ip)} if given else {}))
            undo.callback(_delete, ns, name)
            if given:
                _add_address(kernel, kernel.index(name), given)
        yield _find(ns, name)


Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def _interface(address: str) -> Interface:
    try:
        return ipaddress.ip_interface(address)
    except ValueError as error:
        raise BadInput("address", address, f"must be as 10.42.0.1/24: {error}") from None


def mac_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """A MAC address from an IP address, as Docker does: 02 says "made up here" (bit 1 of byte 0), 42 is Docker's."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0x42, *address.packed[-4:]))


def _add_address(kernel: netlink.Rtnl, index: int, given: Interface) -> None:
    """`ip addr add`; IPv6 without duplicate address detection, for the pool knows who has what."""
    flags = netlink.IFA_F_NODAD if given.version == 6 else 0
    kernel.request("add", "addr", index=index, address=str(given.ip), prefixlen=given.network.prefixlen, flags=flags)


class Attachment(NamedTuple):
    """A namespace's place in a network: its addresses (CIDR, "" for none) and the two ends of its veth pair."""

    address: str
    address6: str
    gateway: str
    mac: str
    host_link: str
    link: str


class Network(NamedTuple):
    """A bridge in a host namespace, a subnet, and who has which address of it."""

    host: Netns
    opener: netlink.Opener
    name: str
    bridge: int
    pool: ipam.Pool
    pool6: ipam.Pool | None
    gateway: str
    gateway6: str
    mtu: int
    internal: bool

    @contextmanager
    def attach(self, target: Netns, name: str = "eth0", *, address: str = "") -> Iterator[Attachment]:
        """Give target a link in this network, with an address and a default route: all or nothing.

        A target that has a default route already keeps it.  BadInput for an address that is taken or not of the
        subnet, a name that is too long or in use, and a namespace that is gone.
        """
        machine.require()
        check_link(name)
        with ExitStack() as undo:
            leases = self._lease(undo, f"{target.name} {name}", address)
            made = Attachment(str(leases[0]), str(leases[1]) if self.pool6 else "",
                              "" if self.internal else self.gateway, mac_of(leases[0].ip),
                              host_end(target.name, name), name)
            with netlink.connect(self.host, target, opener=self.opener) as (host, inside), target.open() as there:
                self._plug(host, made, there)
                undo.callback(_delete, self.host, made.host_link, self.opener)
                self._configure(inside, made, leases)
            yield made

    def _lease(self, undo: ExitStack, owner: str, address: str) -> list[Interface]:
        """An address of each pool, with its prefix length."""
        found: list[Interface] = []
        for pool in filter(None, (self.pool, self.pool6)):
            one = pool.allocate(owner, "" if found else address)
            undo.callback(pool.release, owner)
            found.append(_interface(f"{one}/{pool.subnet.partition('/')[2]}"))
        return found

    def _plug(self, host: netlink.Rtnl, made: Attachment, there: int) -> None:
        """`ip link add VETH-NAME master BR up type veth peer name eth0 netns TARGET`, in one message."""
        try:
            host.request("add", "link", ifname=made.host_link, kind="veth", mtu=self.mtu, state="up",
                         master=self.bridge,
                         peer={"ifname": made.link, "net_ns_fd": there, "mtu": self.mtu, "address": made.mac})
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            raise BadInput("name", made.link, f"it, or {made.host_link} on the host, is there already") from None

    def _configure(self, inside: netlink.Rtnl, made: Attachment, leases: list[Interface]) -> None:
        """Inside: the addresses, `ip link set eth0 up`, and the default routes."""
        index = inside.index(made.link)
        for lease in leases:
            _add_address(inside, index, lease)
        inside.request("set", "link", index=index, state="up")
        for gateway in () if self.internal else filter(None, (self.gateway, self.gateway6)):
            family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
            with netlink.suppress_errno(errno.EEXIST):  # an earlier network's default route stays
                inside.request("add", "route", family=family, dst="default", gateway=gateway)


def host_end(target: str, name: str) -> str:
    """The name of a veth pair's end on the host: veth-web, or veth- and ten digits of a hash where that is too long."""
    long = f"veth-{target.removeprefix(machine.PREFIX)}" + ("" if name == "eth0" else f"-{name}")
    plain = len(os.fsencode(long)) < IFNAMSIZ and " " not in long
    return long if plain else f"veth-{hashlib.sha256(long.encode()).hexdigest()[:10]}"


@contextmanager
def network(host: Netns, name: str = "br0", subnet: str = "10.42.0.0/24", *, subnet6: str = "", gateway: str = "",
            mtu: int = 1500, internal: bool = False) -> Iterator[Network]:
    """A network in host: a bridge with the gateway's address (the first of the subnet), and a pool for the rest.

    internal: those who attach get no default route, so they reach each other and the host alone.  BadInput for a
    subnet that overlaps a route of the host, a name that is too long or in use, an MTU out of range.
    """
    machine.require()
    check_link(name)
    gateways = [_gateway(one, wanted, host) for one, wanted in ((subnet, gateway), (subnet6, "")) if one]
    pools = [ipam.Pool(str(one.network), (str(one.ip),), f"{host.name}-{name}") for one in gateways]
    second, pool6 = (gateways[1], pools[1]) if subnet6 else (None, None)
    with bridge(host, name, address=str(gateways[0]), mtu=mtu) as made, netlink.Opener() as opener:
        if second:
            with netlink.connect(host, opener=opener) as (kernel,):
                _add_address(kernel, made.index, second)
        yield Network(host, opener, name, made.index, pools[0], pool6, str(gateways[0].ip),
                      str(second.ip) if second else "", mtu, internal)


def _gateway(subnet: str, wanted: str, host: Netns) -> Interface:
    """The gateway's address with the prefix length of its subnet, which must be new to the host."""
    hosts = ipam.parse(subnet)
    for route in ipam.overlaps(subnet, host):
        raise BadInput("subnet", subnet, f"overlaps the route {route.destination} dev {route.link} of {host.name}")
    first = wanted or str(next(iter(hosts.hosts())))
    return _interface(f"{ipam.host_of(hosts, first, 'gateway')}/{hosts.prefixlen}")
