"""The drawing of network namespaces: what it says agrees with ip(8), twice the same, and nothing is said of one run."""

import json
import subprocess
import xml.etree.ElementTree as ET
from contextlib import ExitStack

import pytest

from labs import network, topology
from labs.errors import BadInput

SVG = "{http://www.w3.org/2000/svg}"
STAR = """\
Topology
labs-host
├─ br0 (bridge, 10.42.0.1/24)
├─ veth-web (in br0) ── labs-web eth0
└─ veth-db (in br0) ── labs-db eth0
labs-web
└─ eth0 (10.42.0.2/24) ── labs-host veth-web
labs-db
└─ eth0 (10.42.0.3/24) ── labs-host veth-db"""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def spaces():
    """labs-host, labs-web and labs-db, and nothing in them but lo."""
    with ExitStack() as stack:
        yield [stack.enter_context(network.namespace(name)) for name in ("host", "web", "db")]


@pytest.fixture
def star(spaces):
    """A bridge in labs-host with the two others on it."""
    host, *others = spaces
    with network.network(host) as net, ExitStack() as stack:
        for other in others:
            stack.enter_context(net.attach(other))
        yield spaces


def drawn(picture):
    """What a reader sees: the texts of the picture, its dashed outlines and its bold lines."""
    (svg,) = ET.fromstring(picture._repr_mimebundle_()[0]["text/html"])
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    dashed = [one for group in svg.iter(f"{SVG}g") if group.get("class") == "node"
              for one in group if one.get("stroke-dasharray")]
    bold = [path for path in svg.iter(f"{SVG}path") if path.get("stroke-width") == "2.5"]
    return texts, len(dashed), len(bold), svg


def test_alone(spaces):
    assert topology.draw(*spaces).alt.splitlines()[1:] == [
        "labs-host", "└─ lo", "labs-web", "└─ lo",
        "labs-db", "└─ lo"]
    ip("-n", "labs-web", "link", "set", "lo", "down")
    assert "labs-web\n└─ lo (down)" in topology.draw(*spaces).alt
    assert drawn(topology.draw("labs-web"))[1] == 1


def test_star(star):
    picture = topology.draw(*star)
    assert picture.alt == STAR
    assert picture == topology.draw("labs-host", "labs-web", "labs-db")
    texts, dashed, bold, svg = drawn(picture)
    assert [texts.count(word) for word in ("eth0", "labs-web", "10.42.0.1/24", "bridge", "lo")] == [2, 1, 1, 1, 0]
    assert (dashed, bold) == (0, 2)
    assert float(svg.get("width")) <= 358  # a phone of 390 px, with the page's margins


def test_the_other_end_is_the_one_that_the_kernel_means(star):
    """ip(8) finds the same pair from its other end."""
    for wire in topology.wires(*star):
        if wire.link.kind != "veth":
            continue
        there, index = wire.other
        (end,) = [row for row in json.loads(ip("-j", "-n", there, "link")) if row["ifindex"] == index]
        assert end["link_index"] == wire.link.index
        assert f"link-netns {wire.space}" in ip("-n", there, "link", "show", end["ifname"])


def test_equal_ifindexes_in_two_namespaces_are_not_mixed_up(spaces):
    """eth0 is 2 in both, and both are told of a peer 2 or 3 elsewhere: only the nsid says where."""
    for name in ("web", "db"):
        ip("-n", "labs-host", "link", "add", f"veth-{name}", "type", "veth", "peer", "eth0", "netns", f"labs-{name}")
    ends = {(wire.space, wire.link.name): wire.other for wire in topology.wires(*spaces)}
    index = {(wire.space, wire.link.name): wire.key for wire in topology.wires(*spaces)}
    for name in ("web", "db"):
        assert ends[f"labs-{name}", "eth0"] == index["labs-host", f"veth-{name}"]
        assert ends["labs-host", f"veth-{name}"] == index[f"labs-{name}", "eth0"]


def test_namespaces_without_a_cable_stand_in_a_row_with_those_that_have_one(spaces):
    ip("-n", "labs-host", "link", "add", "veth-web", "type", "veth", "peer", "eth0", "netns", "labs-web")
    ip("-n", "labs-host", "link", "add", "br0", "type", "bridge")
    ip("-n", "labs-host", "link", "set", "veth-web", "master", "br0")
    rows = {text.text: float(text.get("y")) for text in drawn(topology.draw(*spaces))[3].iter(f"{SVG}text")}
    assert abs(rows["labs-web"] - rows["labs-db"]) < 20 < rows["labs-web"] - rows["labs-host"]


def test_up_down_and_no_carrier(star):
    ip("-n", "labs-web", "link", "set", "eth0", "down")
    alt = topology.draw(*star).alt
    assert "eth0 (10.42.0.2/24, down) ── labs-host veth-web" in alt
    assert "veth-web (no carrier, in br0)" in alt
    assert drawn(topology.draw(*star))[1] == 2


def test_since_marks_what_is_new(star):
    before = topology.draw(*star)
    assert topology.draw(*star, since=before) == before
    ip("-n", "labs-db", "address", "add", "10.42.0.9/24", "dev", "eth0")
    ip("-n", "labs-host", "link", "set", "veth-web", "nomaster")
    after = topology.draw(*star, since=before)
    assert [line for line in after.alt.splitlines() if line.endswith("[new]")] == [
        "├─ veth-web ── labs-web eth0  [new]", "└─ eth0 (10.42.0.3/24, 10.42.0.9/24) ── labs-host veth-db  [new]"]
    assert "var(--labs-c1" in after.html
    assert "var(--labs-c1" not in before.html


def test_an_end_that_is_not_drawn(star):
    assert "veth-web (in br0) ── elsewhere" in topology.draw("labs-host").alt


def test_around_leaves_out_what_is_not_joined(star):
    ip("-n", "labs-host", "link", "add", "br9", "type", "bridge")
    picture = topology.draw(*star, around="veth-web", addresses=False)
    assert picture.alt == STAR.replace(", 10.42.0.1/24", "").replace(" (10.42.0.2/24)", "").replace(
        " (10.42.0.3/24)", "")
    assert "br9 (bridge, down)" in topology.draw(*star).alt
    with pytest.raises(BadInput, match="around: 'br7'"):
        topology.draw(*star, around="br7")


def test_lo_is_drawn_where_it_has_an_address_of_its_own(star):
    ip("-n", "labs-host", "address", "add", "192.0.2.1/32", "dev", "lo")
    assert "lo (192.0.2.1/32)" in topology.draw(*star).alt


def test_a_link_that_lies_upon_another_one(star):
    ip("-n", "labs-host", "link", "add", "link", "br0", "name", "mac0", "type", "macvlan")
    assert "mac0 (macvlan, down) on br0" in topology.draw(*star).alt
    assert drawn(topology.draw(*star))[2] == 2
    ip("-n", "labs-host", "link", "set", "mac0", "netns", "labs-db")
    assert "mac0 (macvlan, down) on labs-host br0" in topology.draw(*star).alt


def test_random_names_are_cut(spaces):
    ip("-n", "labs-host", "link", "add", "veth1a2b3c4", "type", "veth", "peer", "veth0")
    alt = topology.draw("labs-host").alt
    assert "├─ veth0 (down) ── veth…" in alt
    assert "└─ veth… (down) ── veth0" in alt


def test_a_namespace_that_is_gone(spaces):
    with pytest.raises(BadInput, match="labs-none"):
        topology.draw("labs-host", "labs-none")
