"""labs.netns, labs.netlink and labs.network, compared with ip(8) -json; what bad input and kill -9 leave: nothing."""

import json
import os
import subprocess

import pytest

from labs import network


def ip(ns, *arguments):
    """What ip(8) says of a namespace, as JSON."""
    return json.loads(subprocess.run(["ip", "-n", ns.name, "-json", "-details", *arguments], capture_output=True,
                                     text=True, check=True).stdout or "[]")


@pytest.fixture(scope="module")
def spaces():
    """A host and two containers' namespaces."""
    with network.namespace("host") as host, network.namespace("web") as web, network.namespace("db") as db:
        yield host, web, db


@pytest.fixture
def net(spaces):
    with network.network(spaces[0], subnet6="fd42::/64") as made:
        yield made


def test_a_namespace_is_one_of_ip_netns_with_lo_up():
    with network.namespace("one") as one:
        assert one == ("labs-one", "/run/netns/labs-one")
        listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
        assert "labs-one" in listed
        assert "LOOPBACK" in ip(one, "link")[0]["flags"] and "UP" in ip(one, "link")[0]["flags"]
        assert one.call(os.readlink, "/proc/self/ns/net") != os.readlink("/proc/self/ns/net")
    assert not os.path.exists(one.path)


def test_two_containers_talk_over_the_bridge(net, spaces):
    host, web, db = spaces
    with net.attach(web) as left, net.attach(db, address="10.42.0.9") as right:
        assert left == ("10.42.0.2/24", "fd42::2/64", "10.42.0.1", "02:42:0a:2a:00:02", "veth-web", "eth0")
        assert right.address == "10.42.0.9/24"
        for address in ("10.42.0.1", "10.42.0.9", "fd42::1", "fd42::3"):
            assert "1 received" in web.run(["ping", "-c", "1", "-W", "5", address])
        assert {row["ifname"] for row in ip(host, "link", "show", "master", "br0")} == {"veth-web", "veth-db"}
    assert [link.name for link in network.links(web)] == ["lo"]
    assert net.pool.owners() == {}
