"""Links that need no bridge, or reach past one: macvlan and ipvlan share a card, vxlan joins two hosts.

Each is one RTM_NEWLINK request of rtnetlink(7); the kinds and their attributes are those of ip-link(8) and
<linux/if_link.h>.  A link made here is gone at the end of its block, or earlier with its parent or its namespace.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from labs import machine
from labs.errors import BadInput, KernelError
from labs.netlink import Rtnl, connect, suppress_errno
from labs.netns import Netns
from labs.network import check_link, require_absent

VNI_MAX = (1 << 24) - 1  # RFC 7348, section 5
VXLAN_PORT = 4789  # RFC 7348, section 5; without being told, the kernel takes an older one, 8472
MACVLAN_MODES = ("private", "vepa", "bridge")  # enum macvlan_mode, without passthru, which takes the whole card
IPVLAN_MODES = {"l2": 0, "l3": 1, "l3s": 2}  # enum ipvlan_mode


@contextmanager
def macvlan(host: Netns, parent: str, target: Netns, name: str = "eth0", *, address: str = "",
            mode: str = "bridge") -> Iterator[None]:
    """A link of target with a MAC of its own, on the card `parent` of host; address is CIDR: "192.0.2.10/24".

    Raises BadInput for a mode that there is not, and for a parent, a name or an address that the kernel refuses.
    """
    _one_of("mode", mode, MACVLAN_MODES)
    with _on_card(host, parent, target, name, address, {"kind": "macvlan", "macvlan_mode": mode}):
        yield


@contextmanager
def ipvlan(host: Netns, parent: str, target: Netns, name: str = "eth0", *, address: str = "",
           mode: str = "l2") -> Iterator[None]:
    """A link of target with the MAC of the card `parent` of host, known by its IP address alone (ipvlan.rst).

    Raises BadInput as macvlan does, and also where the parent carries a macvlan: a card has one receiver.
    """
    _one_of("mode", mode, IPVLAN_MODES)
    with _on_card(host, parent, target, name, address, {"kind": "ipvlan", "ipvlan_mode": IPVLAN_MODES[mode]}):
        yield


@contextmanager
def vxlan(host: Netns, name: str, vni: int, *, device: str, remote: str, master: str = "",
          port: int = VXLAN_PORT) -> Iterator[None]:
    """A link of host that wraps each frame into UDP to `remote`, by way of `device` (RFC 7348); a port of `master`.

    The kernel sets its MTU to that of the device less 50 bytes (70 over IPv6): Ethernet, IP, UDP and VXLAN headers.
    Raises BadInput for a vni of more than 24 bits, and for what the kernel refuses.
    """
    if not 0 < vni <= VNI_MAX:
        raise BadInput("vni", vni, f"must be 1 to {VNI_MAX}")
    _check("remote", remote, ipaddress.ip_address)
    group = "vxlan_group6" if ":" in remote else "vxlan_group"
    with connect(host) as (kernel,):
        request = {"kind": "vxlan", "vxlan_id": vni, "vxlan_link": _index(kernel, "device", device), group: remote,
                   "vxlan_port": port}
        port_of = {"master": _index(kernel, "master", master)} if master else {}
        with _made(kernel, kernel, host, name, request) as index:
            kernel.request("set", "link", index=index, state="up", **port_of)
            yield


@contextmanager
def _on_card(host: Netns, parent: str, target: Netns, name: str, address: str,
             request: Mapping[str, Any]) -> Iterator[None]:
    """A link made in host and put straight into target: IFLA_NET_NS_FD."""
    if address:
        _check("address", address, ipaddress.ip_interface)
    with connect(host, target) as (outside, inside), target.open() as place:
        lower = _index(outside, "parent", parent)
        with _made(outside, inside, target, name, {**request, "link": lower, "net_ns_fd": place}) as index:
            if address:
                with _refused("address", address):
                    own = ipaddress.ip_interface(address)
                    inside.request("add", "addr", index=index, address=str(own.ip), prefixlen=own.network.prefixlen)
            inside.request("set", "link", index=index, state="up")
            yield


@contextmanager
def _made(maker: Rtnl, inside: Rtnl, home: Netns, name: str, request: Mapping[str, Any]) -> Iterator[int]:
    """A link that maker asks for and that lives in home, as `inside` does: its index.  Removed if it is there still.

    It is born with a name that nobody has: Linux 6.12 refuses one that is in use where the request is made.
    """
    require_absent(inside, check_link(name), home)
    born = name if maker is inside else machine.new_name("l")
    with _refused("name", name):
        maker.request("add", "link", ifname=born, **request)
    index = inside.index(born)
    try:
        if born != name:
            inside.request("set", "link", index=index, ifname=name)
        yield index
    finally:
        with suppress_errno(errno.ENODEV):
            inside.request("del", "link", index=index)


@contextmanager
def _refused(field: str, value: str) -> Iterator[None]:
    """The kernel's refusal as one line: its own words, or what its errno means."""
    try:
        yield
    except KernelError as error:
        words = error.value or os.strerror(error.errno or 0)
        raise BadInput(field, value, f"the kernel refuses it: {words}") from None


def _index(kernel: Rtnl, field: str, name: str) -> int:
    try:
        return kernel.index(name)
    except KernelError as error:
        if error.errno != errno.ENODEV:
            raise
        raise BadInput(field, name, "no such link in this namespace") from None


def _one_of(field: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise BadInput(field, value, f"must be one of {', '.join(known)}")


def _check(field: str, value: str, parse: Any) -> None:
    try:
        parse(value)
    except ValueError as error:
        raise BadInput(field, value, str(error)) from None
