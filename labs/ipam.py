"""Who has which address of a subnet: IP address management, as CNI's host-local plugin does it.

The state is one JSON file a pool below /run/labs, changed only under flock(2), so that two processes
never give out the same address.  An empty pool has no file.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from labs import machine, netlink
from labs.errors import BadInput
from labs.netns import Netns

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse(subnet: str, field: str = "subnet") -> Subnet:
    """The subnet that a text like 10.42.0.0/24 or fd42::/64 stands for, with room for two hosts; or BadInput."""
    try:
        network = ipaddress.ip_network(subnet)
    except ValueError as error:
        raise BadInput(field, subnet, f"must be a subnet as 10.42.0.0/24 or fd42::/64: {error}") from None
    if network.num_addresses < 2:
        raise BadInput(field, subnet, "must have room for two hosts")
    return network


class Pool(NamedTuple):
    """The addresses of a subnet; taken ones are never given out, and name tells pools of one subnet apart."""

    subnet: str
    taken: tuple[str, ...] = ()
    name: str = "pool"

    @property
    def path(self) -> str:
        """The file with the state."""
        return f"{machine.STATE}/ipam-{self.name}-{self.subnet.replace('/', '-')}.json"

    def allocate(self, owner: str, address: str = "") -> str:
        """Give owner the lowest free address, or the one it asks for.

        BadInput when that is taken or not one of the subnet's hosts, when owner has one already, or when none is left.
        """
        machine.require()
        hosts = parse(self.subnet)
        with self._locked() as owners:
            if owner in owners.values():
                raise BadInput("owner", owner, f"is in {self.subnet} already")
            wanted = host_of(hosts, address) if address else _free(hosts, {*owners, *self.taken}, self.subnet)
            if wanted in self.taken or wanted in owners:
                raise BadInput("address", wanted, f"is taken by {owners.get(wanted, 'the network itself')}")
            owners[wanted] = owner
        return wanted

    def release(self, owner: str) -> None:
        """Take back what owner has, if anything."""
        with self._locked() as owners:
            for address in [one for one, who in owners.items() if who == owner]:
                del owners[address]

    def owners(self) -> dict[str, str]:
        """Who has what now: address → owner."""
        with self._locked() as owners:
            return dict(owners)

    @contextmanager
    def _locked(self) -> Iterator[dict[str, str]]:
        """The state, to read and change under the lock; written back, in one step, unless the block fails."""
        os.makedirs(machine.STATE, exist_ok=True)
        lock = os.open(machine.STATE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            owners = self._read()
            yield owners
            self._write(owners)
        finally:
            os.close(lock)

    def _read(self) -> dict[str, str]:
        try:
            with open(self.path, encoding="utf-8") as file:
                return dict(json.load(file))
        except FileNotFoundError:
            return {}

    def _write(self, owners: dict[str, str]) -> None:
        """rename(2) puts the new state in the place of the old one, whole; an empty pool has no file."""
        if not owners:
            with suppress(FileNotFoundError):
                os.unlink(self.path)
            return
        with open(self.path + ".new", "w", encoding="utf-8") as file:
            json.dump(owners, file)
        os.rename(self.path + ".new", self.path)


def host_of(hosts: Subnet, address: str, field: str = "address") -> str:
    """An address that was asked for, in its usual form: that of a host in the subnet, or BadInput."""
    try:
        wanted = ipaddress.ip_address(address)
    except ValueError:
        raise BadInput(field, address, "must be an IP address without a prefix length") from None
    edges = [hosts.network_address, hosts.broadcast_address][:2 if hosts.version == 4 else 1]  # IPv6: the anycast one
    if wanted not in hosts or (hosts.num_addresses > 2 and wanted in edges):
        raise BadInput(field, address, f"must be a host's address in {hosts}")
    return str(wanted)


def _free(hosts: Subnet, used: set[str], subnet: str) -> str:
    """The lowest address of a host that nobody has."""
    for host in hosts.hosts():
        if str(host) not in used:
            return str(host)
    raise BadInput("subnet", subnet, f"all {len(used)} addresses are taken")


def overlaps(subnet: str, ns: Netns) -> list[netlink.Route]:
    """The routes of a namespace, but for the default ones, that lead to addresses of the subnet."""
    wanted = parse(subnet)
    return [route for route in netlink.routes(ns) if route.destination != "default"
            and wanted.overlaps(ipaddress.ip_network(route.destination))]
