"""labs.links: what `ip` and tcpdump say of the links, who can talk to whom, and that a refusal leaves nothing."""

import json
import re
import subprocess
from contextlib import ExitStack

import pytest

from labs import links, network, process
from labs.errors import BadInput


@pytest.fixture(scope="module")
def lan():
    """A host with a card, 192.0.2.1; what is at the other end of its cable, 192.0.2.2; two namespaces without links."""
    with ExitStack() as stack:
        made = {name: stack.enter_context(network.namespace(name)) for name in ("host", "out", "one", "two")}
        stack.enter_context(network.veth(made["host"], "eth0", made["out"], "eth0"))
        for name, address in (("host", "192.0.2.1/24"), ("out", "192.0.2.2/24")):
            made[name].run(["ip", "address", "add", address, "dev", "eth0"])
        yield made


def shown(ns, name):
    """What `ip` knows of a link; {} where there is none."""
    return next((row for row in json.loads(ns.run(["ip", "-j", "-d", "address"])) if row["ifname"] == name), {})


def names(ns):
    return {row["ifname"] for row in json.loads(ns.run(["ip", "-j", "link"]))}


def reaches(source, address, *words):
    source.run(["ip", "neigh", "flush", "all"])
    return "ttl=" in source.run(["ping", "-c", "1", "-W", "2", *words, address], check=False)


def mac(ns, name="eth0"):
    return shown(ns, name)["address"]


@pytest.mark.parametrize("mode", links.MACVLAN_MODES)
def test_macvlan_has_the_mode_the_address_and_a_mac_of_its_own(lan, mode):
    with links.macvlan(lan["host"], "eth0", lan["one"], "lan0", address="192.0.2.10/24", mode=mode):
        row = shown(lan["one"], "lan0")
        assert row["linkinfo"] == {"info_kind": "macvlan", "info_data": row["linkinfo"]["info_data"]}
        assert row["linkinfo"]["info_data"]["mode"] == mode
        assert [(a["local"], a["prefixlen"]) for a in row["addr_info"] if a["family"] == "inet"] == [("192.0.2.10", 24)]
        assert "UP" in row["flags"]
        assert row["address"] != mac(lan["host"])
    assert names(lan["one"]) == {"lo"}


def test_macvlan_reaches_the_lan_and_a_sibling_but_not_its_own_host(lan):
    with links.macvlan(lan["host"], "eth0", lan["one"], address="192.0.2.10/24"), \
         links.macvlan(lan["host"], "eth0", lan["two"], address="192.0.2.11/24"):
        assert [reaches(lan[name], "192.0.2.10") for name in ("out", "two", "host")] == [True, True, False]


def test_private_macvlans_do_not_reach_each_other(lan):
    with links.macvlan(lan["host"], "eth0", lan["one"], address="192.0.2.10/24", mode="private"), \
         links.macvlan(lan["host"], "eth0", lan["two"], address="192.0.2.11/24", mode="private"):
        assert [reaches(lan[name], "192.0.2.10") for name in ("out", "two")] == [True, False]


@pytest.mark.machine
@pytest.mark.parametrize("mode", links.IPVLAN_MODES)
def test_ipvlan_has_the_mode_and_the_mac_of_the_card(lan, mode):
    with links.ipvlan(lan["host"], "eth0", lan["one"], address="192.0.2.10/24", mode=mode):
        info = shown(lan["one"], "eth0")["linkinfo"]
        assert (info["info_kind"], info["info_data"]["mode"]) == ("ipvlan", mode)
        assert mac(lan["one"]) == mac(lan["host"])
        if mode == "l2":
            assert reaches(lan["out"], "192.0.2.10")
    assert names(lan["one"]) == {"lo"}


def test_vxlan_makes_one_lan_of_two_bridges_and_is_seen_as_udp(lan):
    host, out, one, two = lan.values()
    with ExitStack() as stack:
        sides = ((host, "10.42.0.1", one, "10.42.0.2"), (out, "10.42.0.254", two, "10.42.0.3"))
        for side, gateway, target, address in sides:
            bridge = stack.enter_context(network.network(side, "br0", "10.42.0.0/24", gateway=gateway))
            stack.enter_context(bridge.attach(target, address=address))
        assert not reaches(one, "10.42.0.3")
        for side, remote in ((host, "192.0.2.2"), (out, "192.0.2.1")):
            stack.enter_context(links.vxlan(side, "vx7", 7, device="eth0", remote=remote, master="br0"))
        process.until(lambda: reaches(one, "10.42.0.3"))
        row = shown(host, "vx7")
        data = row["linkinfo"]["info_data"]
        assert (data["id"], data["remote"], data["port"], data["link"]) == (7, "192.0.2.2", 4789, "eth0")
        assert (row["mtu"], row["master"], "UP" in row["flags"]) == (1450, "br0", True)
        assert reaches(one, "10.42.0.3")
        assert re.search(r"dst 192\.0\.2\.2", host.run(["bridge", "fdb", "show", "dev", "vx7"]))
        with subprocess.Popen(["ip", "netns", "exec", out.name, "tcpdump", "-nt", "-c", "1", "-i", "eth0",
                               "udp port 4789 and udp[39] = 1"], stdout=-1, stderr=-1, text=True) as tcpdump:
            while "listening" not in tcpdump.stderr.readline():
                assert tcpdump.poll() is None
            assert reaches(one, "10.42.0.3")
            seen, _ = tcpdump.communicate(timeout=30)
        assert re.search(r"192\.0\.2\.1\.\d+ > 192\.0\.2\.2\.4789: VXLAN.* vni 7\n.*10\.42\.0\.2 > 10\.42\.0\.3", seen)
    assert names(host) == {"lo", "eth0"}


def test_vxlan_over_ipv6_leaves_70_bytes_less(lan):
    with links.vxlan(lan["host"], "vx6", 6, device="eth0", remote="2001:db8::2"):
        row = shown(lan["host"], "vx6")
    assert (row["mtu"], row["linkinfo"]["info_data"]["remote6"]) == (1430, "2001:db8::2")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda host, one: links.macvlan(host, "eth9", one), "parent: 'eth9': no such link in this namespace"),
        (lambda host, one: links.macvlan(host, "eth0", one, "lo"), "name: 'lo': labs-one has a link of that name"),
        (lambda host, one: links.macvlan(host, "eth0", one, "n" * 16), "must have 1 to 15 bytes"),
        (lambda host, one: links.macvlan(host, "eth0", one, ""), "must have 1 to 15 bytes"),
        (lambda host, one: links.macvlan(host, "eth0", one, mode="bride"), "must be one of private, vepa, bridge"),
        (lambda host, one: links.macvlan(host, "eth0", one, address="192.0.2.300/24"), "address: '192.0.2.300/24'"),
        (lambda host, one: links.macvlan(host, "eth0", one, address="::ffff:0:0/200"), "address: '::ffff:0:0/200'"),
        (lambda host, one: links.ipvlan(host, "eth0", one, mode="l4"), "mode: 'l4': must be one of l2, l3, l3s"),
        (lambda host, one: links.vxlan(host, "vx", 0, device="eth0", remote="192.0.2.2"), "must be 1 to 16777215"),
        (lambda host, one: links.vxlan(host, "vx", 1 << 24, device="eth0", remote="192.0.2.2"), "vni: 16777216"),
        (lambda host, one: links.vxlan(host, "vx", 1, device="eth9", remote="192.0.2.2"), "device: 'eth9'"),
        (lambda host, one: links.vxlan(host, "vx", 1, device="eth0", remote="far"), "remote: 'far'"),
        (lambda host, one: links.vxlan(host, "vx", 1, device="eth0", remote="192.0.2.2", master="br9"), "'br9'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(lan, make, line):
    before = names(lan["host"]), names(lan["one"])
    with pytest.raises(BadInput) as caught, make(lan["host"], lan["one"]):
        pass
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (names(lan["host"]), names(lan["one"])) == before


def test_an_address_the_kernel_refuses_takes_the_link_with_it(lan):
    with pytest.raises(BadInput, match="address"), \
         links.macvlan(lan["host"], "eth0", lan["one"], address="ff02::1/64"):
        pass
    assert names(lan["one"]) == {"lo"}


def test_a_card_has_one_receiver(lan):
    with links.macvlan(lan["host"], "eth0", lan["one"]), pytest.raises(BadInput, match="refuses it"), \
         links.ipvlan(lan["host"], "eth0", lan["two"]):
        pass
    assert names(lan["two"]) == {"lo"}


def test_the_parent_may_go_before_the_link(lan):
    with network.veth(lan["host"], "eth1", lan["out"], "eth1"), links.macvlan(lan["host"], "eth1", lan["one"]):
        lan["host"].run(["ip", "link", "delete", "eth1"])
        assert names(lan["one"]) == {"lo"}


def test_the_namespace_may_go_before_the_link(lan):
    with network.namespace("gone") as gone, links.macvlan(lan["host"], "eth0", gone):
        lan["host"].run(["ip", "netns", "delete", gone.name])
    assert names(lan["host"]) == {"lo", "eth0"}
