"""The wiring of network namespaces, drawn from what netlink says of them now.

One dashed frame a namespace, one box a link (veth(4), ip-link(8)), a bold line for a veth pair, a thin line
between a bridge and its ports, or between a link and the one that it lies upon (macvlan, ipvlan, vxlan).

The two ends of a veth pair say of each other only an ifindex (IFLA_LINK) and, where the other end is in
another namespace, the number by which their own namespace knows that one (IFLA_LINK_NETNSID); which
namespace that is, RTM_GETNSID tells (rtnetlink(7), `ip netns list-id`).

A picture says the same on every run: MAC addresses, ifindexes and random names are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from labs import netlink, show
from labs.errors import BadInput
from labs.netlink import Link
from labs.netns import DIRECTORY, Netns

TITLE = "Topology"
NEW = "  [new]"
# Docker names the host's end of a veth pair at random.
RANDOM_VETH = re.compile(r"\bveth[0-9a-f]{7}\b")
LOOPBACK, LINK_LOCAL = {"127.0.0.1/8", "::1/128"}, "fe80:"

Key = tuple[str, int]


class Wire(NamedTuple):
    """A link as it is drawn.

    Attributes:
        space: the name of its namespace.
        link: what netlink says of it.
        other: namespace and ifindex of a veth's other end, or of the link it lies upon; None if it has none,
            or if that one is in a namespace that is not drawn.
        master: namespace and ifindex of the bridge it is a port of, or None.
    """

    space: str
    link: Link
    other: Key | None
    master: Key | None

    @property
    def key(self) -> Key:
        """Namespace and ifindex: what no other link has."""
        return self.space, self.link.index


@dataclass(frozen=True, repr=False)
class Drawing(show.Picture):
    """A picture that knows what it shows, so that a later one can tell what is new."""

    said: Mapping[Key, str] = field(default_factory=dict, compare=False)
    joins: Set[tuple[Key, Key]] = field(default_factory=set, compare=False)


def wires(*namespaces: Netns | str) -> list[Wire]:
    """Every link of the namespaces, with its other end and its master found: namespace by namespace.

    A str is the name of a namespace in /run/netns (ip-netns(8)).
    """
    spaces = [_netns(given) for given in namespaces]
    with netlink.connect(*spaces) as kernels:
        return [wire for space, kernel in zip(spaces, kernels, strict=True)
                for wire in _in_one(space.name, netlink.read_links(kernel), _numbers(kernel, spaces))]


def draw(*namespaces: Netns | str, since: Drawing | None = None, around: str = "",
         addresses: bool = True) -> Drawing:
    """Draw the links of some network namespaces and how they are joined.

    lo is left out where another link is drawn, unless it bears an address of its own.

    Args:
        namespaces: Netns, or names in /run/netns; one frame each, in this order.
        since: an earlier picture; what it did not say yet is outlined in colour.
        around: the name of a link; draw only what is joined with it, directly or by way of others.
        addresses: write addresses into the boxes.
    """
    found = {wire.key: wire for wire in wires(*namespaces)}
    kept = _joined(found, around) if around else {key for key, wire in found.items() if not _is_plain_lo(wire, found)}
    spaces = [_netns(given).name for given in namespaces]
    order = sorted(kept, key=lambda key: _place(found[key], spaces))
    return _draw({key: found[key] for key in order}, addresses, since)


def _netns(given: Netns | str) -> Netns:
    return Netns(given, f"{DIRECTORY}/{given}") if isinstance(given, str) else given


def _numbers(kernel: netlink.Rtnl, spaces: Sequence[Netns]) -> dict[int, str]:
    """The numbers by which the socket's namespace knows the others: RTM_GETNSID, rtnetlink(7)."""
    found = ((netlink.read_nsid(kernel, space), space.name) for space in spaces)
    return {number: name for number, name in found if number is not None}


def _in_one(space: str, links: Sequence[Link], numbers: Mapping[int, str]) -> Iterator[Wire]:
    names = {link.name: link.index for link in links}
    for link in links:
        where = space if link.peer_ns is None else numbers.get(link.peer_ns)
        other = (where, link.peer) if link.peer and where is not None else None
        yield Wire(space, link, other, (space, names[link.master]) if link.master else None)


def _is_plain_lo(wire: Wire, found: Mapping[Key, Wire]) -> bool:
    alone = sum(other.space == wire.space for other in found.values()) == 1
    return wire.link.name == "lo" and not alone and set(wire.link.addresses) <= LOOPBACK


def _joined(found: Mapping[Key, Wire], name: str) -> set[Key]:
    """The links of that name, and all that are joined with them."""
    kept, edges = {key for key, wire in found.items() if wire.link.name == name}, list(_edges(found))
    if not kept:
        raise BadInput("around", name, "no link of that name in these namespaces")
    while more := {end for edge in edges if kept & set(edge) for end in edge} - kept:
        kept |= more
    return kept


def _edges(found: Mapping[Key, Wire]) -> Iterator[tuple[Key, Key]]:
    """Pairs of links that are joined; a veth pair comes once from each end."""
    for key, wire in found.items():
        yield from ((end, key) for end in (wire.master, wire.other) if end in found and end is not None)


def _place(wire: Wire, spaces: Sequence[str]) -> tuple[int, bool, int, str, int]:
    """By namespace; in it bridges first, then what leads to the other namespaces, in their order, then by name."""
    link, leads_to = wire.link, wire.other[0] if wire.other else ""
    towards = spaces.index(leads_to) if leads_to in spaces else len(spaces)
    return spaces.index(wire.space), link.kind != "bridge", towards, _name(link), link.index


def _name(link: Link) -> str:
    return RANDOM_VETH.sub("veth…", link.name)


def _state(link: Link) -> str:
    return "down" if not link.up else "" if link.carrier else "no carrier"


def _facts(link: Link, addresses: bool) -> list[str]:
    """What stands in a box beside the name: the kind where the lines do not show it, addresses, and whether it is up.

    Not the addresses that are everywhere: lo's, and the IPv6 ones that the kernel makes (ip-link(8), addrgenmode).
    """
    kind = "" if link.kind in ("", "loopback", "veth") else link.kind
    given = [one for one in link.addresses if one not in LOOPBACK and not one.startswith(LINK_LOCAL)]
    return [word for word in (kind, *(given if addresses else ()), _state(link)) if word]


def _words(wire: Wire, shown: Mapping[Key, Wire], addresses: bool) -> str:
    """One link as a line of text, for those who do not see the picture."""
    facts = _facts(wire.link, addresses) + ([f"in {wire.link.master}"] if wire.link.master else [])
    return _name(wire.link) + (f" ({', '.join(facts)})" if facts else "") + _other(wire, shown)


def _other(wire: Wire, shown: Mapping[Key, Wire]) -> str:
    if not wire.link.peer:
        return ""
    sign = " ── " if wire.link.kind == "veth" else " on "
    if wire.other not in shown or wire.other is None:
        return sign + "elsewhere"
    end = shown[wire.other]
    return sign + (_name(end.link) if end.space == wire.space else f"{end.space} {_name(end.link)}")


def _draw(shown: Mapping[Key, Wire], addresses: bool, since: Drawing | None) -> Drawing:
    """Put frames, boxes and lines together."""
    said = {key: _words(wire, shown, addresses) for key, wire in shown.items()}
    joins = {(a, b): shown[b].link.kind == "veth" and shown[b].other == a for a, b in _joins(shown)}
    old = since or Drawing("", said=said, joins=set(joins))
    alt, frames = [TITLE], dict[str, dict[str, show.Box]]()
    for space in dict.fromkeys(key[0] for key in shown):
        keys = [key for key in shown if key[0] == space]
        fresh = {key: old.said.get(key) != said[key] for key in keys}
        rows = [said[key] + (NEW if fresh[key] else "") for key in keys]
        alt += [space, *("├─ " + row for row in rows[:-1]), *("└─ " + row for row in rows[-1:])]
        frames[space] = {str(key): _box(shown[key].link, addresses, fresh[key]) for key in keys}
    lines = [show.Join(str(a), str(b), bold, (a, b) not in old.joins) for (a, b), bold in joins.items()]
    picture = show.diagram("\n".join(alt), frames, lines)
    return Drawing(picture.alt, picture.html, said=said, joins=set(joins))


def _joins(shown: Mapping[Key, Wire]) -> Iterator[tuple[Key, Key]]:
    """Each joined pair once, the one to be drawn above first: a bridge, a lower link, the earlier namespace."""
    order = list(shown)
    for upper, key in _edges(shown):
        if shown[key].link.kind != "veth" or shown[key].master == upper or order.index(upper) < order.index(key):
            yield upper, key


def _box(link: Link, addresses: bool, fresh: bool) -> show.Box:
    return show.Box((_name(link), *_facts(link, addresses)), bool(_state(link)), fresh)
