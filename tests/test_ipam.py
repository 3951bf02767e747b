"""labs.ipam: nobody gets an address twice, not even two processes at once; clash, exhaustion, overlap."""

import contextlib
import ipaddress
import json
import os

import pytest

from labs import errors, ipam, machine, network, process


@pytest.fixture
def pool():
    made = ipam.Pool("10.42.0.0/29", ("10.42.0.1",), "test")
    yield made
    for owner in set(made.owners().values()):
        made.release(owner)
    assert not os.path.exists(made.path)


def test_the_lowest_free_address_is_given_and_taken_back(pool):
    assert [pool.allocate(owner) for owner in "abc"] == ["10.42.0.2", "10.42.0.3", "10.42.0.4"]
    pool.release("b")
    pool.release("b")
    assert pool.owners() == {"10.42.0.2": "a", "10.42.0.4": "c"}
    assert pool.allocate("d") == "10.42.0.3"
    assert pool.allocate("e", "10.42.0.6") == "10.42.0.6"


def test_the_state_is_a_file_that_goes_with_the_last_owner(pool):
    pool.allocate("a")
    assert pool.path == f"{machine.STATE}/ipam-test-10.42.0.0-29.json"
    with open(pool.path, encoding="utf-8") as file:
        assert json.load(file) == {"10.42.0.2": "a"}
    pool.release("a")
    assert not [name for name in os.listdir(machine.STATE) if name.startswith("ipam-test")]


CLASHES = [
    ("b", "10.42.0.2", "address: '10.42.0.2': is taken by a"),
    ("b", "10.42.0.1", "address: '10.42.0.1': is taken by the network itself"),
    ("b", "10.42.0.7", r"address: '10.42.0.7': must be a host's address in 10.42.0.0/29"),
    ("b", "10.42.0.8", "address: '10.42.0.8': must be"), ("b", "10.42.0.2/29", "address: '10.42.0.2/29': must be an"),
    ("a", "", "owner: 'a': is in 10.42.0.0/29 already")]


def test_a_clash_is_one_line_and_changes_nothing(pool):
    pool.allocate("a")
    for owner, address, text in CLASHES:
        with pytest.raises(errors.BadInput, match=f"^{text}"):
            pool.allocate(owner, address)
        assert pool.owners() == {"10.42.0.2": "a"}


def test_exhaustion_is_told(pool):
    assert len({pool.allocate(str(number)) for number in range(5)}) == 5
    with pytest.raises(errors.BadInput, match="^subnet: '10.42.0.0/29': all 6 addresses are taken"):
        pool.allocate("late")
    pool.release("3")
    assert pool.allocate("late") == "10.42.0.5"


def test_the_hosts_of_a_subnet_are_those_that_python_knows():
    for subnet in ("10.42.0.0/30", "10.42.0.0/31", "fd42::/126", "fd42::/127"):
        small = ipam.Pool(subnet, name="hosts")
        wanted = [str(host) for host in ipaddress.ip_network(subnet).hosts()]
        assert [small.allocate(str(number)) for number in range(len(wanted))] == wanted
        with pytest.raises(errors.BadInput, match="are taken"):
            small.allocate("late")
        for number in range(len(wanted)):
            small.release(str(number))


def test_the_edges_of_a_subnet_are_no_hosts():
    for subnet, address, good in (
            ("10.42.0.0/30", "10.42.0.0", False), ("10.42.0.0/30", "10.42.0.3", False),
            ("10.42.0.0/31", "10.42.0.0", True), ("10.42.0.0/31", "10.42.0.1", True), ("fd42::/64", "fd42::", False),
            ("fd42::/126", "fd42::3", True), ("fd42::/127", "fd42::", True)):
        hosts = ipaddress.ip_network(subnet)
        assert good == (ipaddress.ip_address(address) in (hosts.hosts() if hosts.prefixlen > 64 or hosts.version == 4
                                                          else [ipaddress.ip_address("fd42::1")]))
        with contextlib.nullcontext() if good else pytest.raises(errors.BadInput, match="must be a host's address"):
            assert ipam.host_of(hosts, address) == address


def test_a_huge_subnet_costs_nothing(pool):
    huge = ipam.Pool("fd42::/64", ("fd42::1",), "huge")
    assert huge.allocate("a") == "fd42::2"
    huge.release("a")


def test_pools_of_one_subnet_with_other_names_are_apart(pool):
    other = pool._replace(name="other")
    assert pool.allocate("a") == other.allocate("a") == "10.42.0.2"
    other.release("a")
    assert pool.owners() == {"10.42.0.2": "a"}


def test_processes_at_once_never_get_the_same(pool):
    crowd = ipam.Pool("10.42.0.0/24", name="crowd")
    def take(number):
        for turn in range(25):
            crowd.allocate(f"{number} {turn}")
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(process.fork(lambda number=number: take(number))) for number in range(4)]
        assert [child.wait(60).code for child in children] == [0, 0, 0, 0]
    assert sorted(crowd.owners().values()) == sorted(f"{number} {turn}" for number in range(4) for turn in range(25))
    for owner in crowd.owners().values():
        crowd.release(owner)


def test_a_write_that_was_killed_spoils_nothing(pool):
    pool.allocate("a")
    with open(pool.path + ".new", "w", encoding="utf-8") as file:
        file.write('{"10.42')
    assert pool.allocate("b") == "10.42.0.3"
    assert pool.owners() == {"10.42.0.2": "a", "10.42.0.3": "b"}


def test_a_bad_subnet_is_one_line():
    for subnet in ("10.42.0.0", "10.42.0.1/24", "10.42.0.0/33", "x", ""):
        with pytest.raises(errors.BadInput, match=f"^subnet: '{subnet}': "):
            ipam.Pool(subnet).allocate("a")


def test_overlaps_are_those_that_ip_route_shows():
    with network.namespace("host") as host, network.bridge(host, address="10.42.0.1/24"):
        host.run(["ip", "route", "add", "default", "via", "10.42.0.9"])
        host.run(["ip", "route", "add", "10.43.0.0/16", "via", "10.42.0.9"])
        found = {subnet: [route.destination for route in ipam.overlaps(subnet, host)] for subnet in (
            "10.42.0.0/24", "10.42.0.64/26", "10.0.0.0/8", "10.43.7.0/24", "10.44.0.0/16", "fd42::/64")}
        assert found == {"10.42.0.0/24": ["10.42.0.0/24"], "10.42.0.64/26": ["10.42.0.0/24"],
                         "10.0.0.0/8": ["10.42.0.0/24", "10.43.0.0/16"], "10.43.7.0/24": ["10.43.0.0/16"],
                         "10.44.0.0/16": [], "fd42::/64": []}
        used = json.loads(host.run(["ip", "-json", "route", "show", "root", "10.0.0.0/8"]))
        assert [row["dst"] for row in used] == ["10.42.0.0/24", "10.43.0.0/16"]
