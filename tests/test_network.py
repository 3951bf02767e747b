"""labs.netns, labs.netlink and labs.network, compared with ip(8) -json; what bad input and kill -9 leave: nothing."""

import asyncio
import contextlib
import errno
import ipaddress
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from labs import container, errors, lab, machine, netlink, netns, network, process

OWN = netns.Netns("this", "/proc/self/ns/net")


def ip(ns, *arguments):
    """What ip(8) says of a namespace, as JSON."""
    command = ["ip", "-n", ns.name, "-json", "-details", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout or "[]")


def names(ns):
    return [row["ifname"] for row in ip(ns, "link")]


@pytest.fixture(scope="module")
def spaces():
    """A host and two containers' namespaces."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(network.namespace(name)) for name in ("host", "web", "db")]


@pytest.fixture
def net(spaces):
    with network.network(spaces[0], subnet6="fd42::/64") as made:
        yield made


def leases():
    return [str(path) for path in Path(machine.STATE).glob("ipam-*")]


@pytest.fixture
def untouched(spaces):
    """Links, addresses, routes and leases are the same after the test."""
    def state():
        return [(names(ns), network.addresses(ns), network.routes(ns)) for ns in spaces], leases()
    before = state()
    yield
    assert state() == before


# Namespaces with names


def test_a_namespace_is_one_of_ip_netns_with_lo_up():
    with network.namespace("one") as one:
        assert one == ("labs-one", "/run/netns/labs-one")
        listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
        assert "labs-one" in listed
        assert {"LOOPBACK", "UP"} <= set(ip(one, "link")[0]["flags"])
        assert one.call(os.readlink, "/proc/self/ns/net") != os.readlink("/proc/self/ns/net")
        with pytest.raises(errors.BadInput, match="^namespace: 'labs-one': is there already; lab.clean"), \
                network.namespace("one"):
            pass
        assert os.path.exists(one.path)
    assert not os.path.exists(one.path)


def test_what_ip_netns_made_and_deleted_is_no_trouble():
    with network.namespace("one") as one:
        subprocess.run(["ip", "netns", "delete", one.name], check=True)
        for use in (lambda: one.run(["true"]), lambda: one.call(os.getpid), lambda: network.links(one)):
            with pytest.raises(errors.BadInput, match="^namespace: 'labs-one': .* is it gone"):
                use()
        subprocess.run(["ip", "netns", "add", one.name], check=True)
        assert [link.name for link in network.links(one)] == ["lo"]
    assert not os.path.exists(one.path)


def test_a_name_whose_mount_is_gone_is_told():
    with network.namespace("one") as one:
        subprocess.run(["umount", one.path], check=True)
        with pytest.raises(errors.BadInput, match="is no network namespace"):
            network.links(one)


def test_inside_a_namespace(spaces):
    host = spaces[0]
    before = os.readlink("/proc/self/ns/net")
    assert host.run(["cat"], stdin="through") == "through"
    assert host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False) == "out\n"
    with pytest.raises(errors.ChildFailed, match="^ip: .*Cannot find device"):
        host.run(["ip", "link", "set", "nothing", "up"])
    with pytest.raises(errors.ChildFailed, match="^false: exit status 1"):
        host.run(["false"])
    with pytest.raises(errors.CommandNotFound, match="execve nothing"):
        host.run(["nothing"])
    with pytest.raises(errors.Timeout, match="the end of sleep"):
        host.run(["sleep", "100"], timeout=0.2)
    assert host.call(sum, [1, 2]) == 3
    with host.spawn(["sleep", "1000"]) as child:
        assert os.readlink(f"/proc/{child.pid}/ns/net") == host.call(os.readlink, "/proc/self/ns/net")
        assert network.links(netns.Netns.of_pid(child.pid)) == network.links(host)
    assert not os.path.exists(f"/proc/{child.pid}")
    assert os.readlink("/proc/self/ns/net") == before


def test_sysctl_is_the_namespaces_own(spaces):
    host, web, _ = spaces
    assert host.sysctl("net.ipv4.ip_forward", 1) == "1"
    assert web.sysctl("net.ipv4.ip_forward", 0) == "0"
    assert host.sysctl("net.ipv4.ip_forward") == host.run(["sysctl", "-n", "net.ipv4.ip_forward"]).strip() == "1"
    with pytest.raises(errors.KernelError, match="write ip_forward 'x': Invalid argument"):
        host.sysctl("net.ipv4.ip_forward", "x")


# What netlink says is what ip(8) says


def test_links_are_those_of_ip(net, spaces):
    host, web, db = spaces
    with net.attach(web), net.attach(db):
        for ns in spaces:
            for mine, theirs in zip(network.links(ns), ip(ns, "addr"), strict=True):
                assert (mine.index, mine.name, mine.mtu) == (theirs["ifindex"], theirs["ifname"], theirs["mtu"])
                assert mine.mac == theirs["address"]
                assert mine.up == ("UP" in theirs["flags"])
                kind = "loopback" if mine.name == "lo" else theirs["linkinfo"]["info_kind"]
                assert (mine.kind, mine.master) == (kind, theirs.get("master", ""))
                assert (mine.peer, mine.peer_ns) == (theirs.get("link_index", 0), theirs.get("link_netnsid"))
                held = [f"{row['local']}/{row['prefixlen']}" for row in theirs["addr_info"]]
                assert list(mine.addresses) == held
        eth0, = (link for link in network.links(web) if link.name == "eth0")
        assert eth0.peer_ns == network.nsid(web, host)
        assert {link.index: link.name for link in network.links(host)}[eth0.peer] == "veth-web"


def test_nsid_is_that_of_ip_netns(net, spaces):
    host, web, db = spaces
    with net.attach(web), net.attach(db):
        listed = {row["name"]: row["nsid"] for row in ip(host, "netns", "list-id") if "name" in row}
        assert {ns.name: network.nsid(host, ns) for ns in (web, db)} == listed
    assert network.nsid(host, OWN) is None


def test_addresses_routes_and_neighbours_are_those_of_ip(net, spaces):
    web, db = spaces[1:]
    with net.attach(web), net.attach(db):
        assert "1 received" in web.run(["ping", "-c", "1", "-W", "5", "10.42.0.3"])
        web.run(["ip", "neigh", "add", "10.42.0.77", "lladdr", "02:00:00:00:00:01", "dev", "eth0"])
        web.run(["ip", "route", "add", "192.0.2.0/24", "via", "10.42.0.1", "metric", "50", "src", "10.42.0.2"])
        web.run(["ip", "route", "add", "blackhole", "198.51.100.0/24"])
        process.until(lambda: not any(row.get("tentative") for link in ip(web, "addr") for row in link["addr_info"]))
        mine = {(one.link, one.address, one.scope) for one in network.addresses(web)}
        assert mine == {(link["ifname"], f"{row['local']}/{row['prefixlen']}", row["scope"])
                        for link in ip(web, "addr") for row in link["addr_info"]}
        shown = [row for row in ip(web, "route") + ip(web, "-6", "route") if row["type"] == "unicast"]
        full = {(str(ipaddress.ip_network(row["dst"])) if row["dst"] != "default" else "default",
                 row.get("gateway", ""), row["dev"], row.get("prefsrc", ""), row.get("metric", 0)) for row in shown}
        assert set(network.routes(web)) == full
        assert ("default", "10.42.0.1", "eth0", "", 0) in full
        seen = {one.address: one for one in network.neighbours(web)}
        assert seen["10.42.0.3"][1:3] == ("02:42:0a:2a:00:03", "eth0")
        assert seen["10.42.0.77"] == ("10.42.0.77", "02:00:00:00:00:01", "eth0", "PERMANENT")
        assert set(seen) == {row["dst"] for row in ip(web, "neigh")}
        web.run(["ip", "route", "del", "blackhole", "198.51.100.0/24"])


def test_a_refusal_has_the_kernels_own_words(spaces):
    with netlink.connect(spaces[0]) as (kernel,):
        with pytest.raises(errors.KernelError, match="add route 'Nexthop has invalid gateway': Network is unreach"):
            kernel.request("add", "route", dst="192.0.2.0/24", gateway="198.51.100.1")
        with pytest.raises(errors.KernelError) as caught:
            kernel.index("nothing")
        assert caught.value.errno == errno.ENODEV
        kernel.delete_link("nothing")
        with pytest.raises(errors.KernelError, match="del link: "):
            kernel.delete_link("lo")


def test_it_works_where_an_event_loop_runs(spaces):
    """A notebook's cells run in one."""
    async def cell():
        with network.network(spaces[0]) as net, net.attach(spaces[1]):
            return [link.name for link in network.links(spaces[1])]
    assert asyncio.run(cell()) == ["lo", "eth0"]


# veth, bridge, network


def test_a_veth_pair_is_in_two_namespaces_and_up(spaces, untouched):
    _, web, db = spaces
    with network.veth(web, "eth0", db, "veth-web", mtu=1400) as (near, far):
        assert (near.kind, near.up, near.mtu, near.peer, near.peer_ns) == (
            "veth", True, 1400, far.index, network.nsid(web, db))
        assert (far.name, far.up, far.mtu, far.peer) == ("veth-web", True, 1400, near.index)
        assert ip(web, "link", "show", "eth0")[0]["operstate"] == "UP"
    with network.veth(web, "left", web, "right") as (near, far):
        assert (near.peer, near.peer_ns) == (far.index, None)


def test_a_bridge_without_an_address_and_with_one(spaces, untouched):
    host = spaces[0]
    with network.bridge(host, "br5") as plain:
        assert (plain.kind, plain.up) == ("bridge", True)
        assert [one for one in plain.addresses if not one.startswith("fe80:")] == []
    with network.bridge(host, address="10.43.0.1/24", mtu=1400):
        row, = ip(host, "addr", "show", "br0")
        assert (row["mtu"], row["address"]) == (1400, "02:42:0a:2b:00:01")
        assert (row["addr_info"][0]["local"], row["addr_info"][0]["prefixlen"]) == ("10.43.0.1", 24)


def test_two_containers_talk_over_the_bridge(net, spaces):
    host, web, db = spaces
    with net.attach(web) as left, net.attach(db, address="10.42.0.9") as right:
        assert left == ("10.42.0.2/24", "fd42::2/64", "10.42.0.1", "02:42:0a:2a:00:02", "veth-web", "eth0")
        assert right.address == "10.42.0.9/24"
        for address in ("10.42.0.1", "10.42.0.9", "fd42::1", "fd42::3"):
            assert "1 received" in web.run(["ping", "-c", "1", "-W", "5", address])
        assert {row["ifname"] for row in ip(host, "link", "show", "master", "br0")} == {"veth-web", "veth-db"}
    assert names(web) == names(db) == ["lo"]
    assert net.pool.owners() == {}


def test_a_second_network_keeps_the_first_default_route(untouched, net, spaces):
    host, web, _ = spaces
    with network.network(host, "br1", "10.43.0.0/24", mtu=1400, internal=True) as inner, net.attach(web), \
            inner.attach(web, "eth1") as second, network.network(host, "br2", "10.44.0.0/24") as third, \
            third.attach(web, "eth2"):
        assert (second.host_link, second.gateway, second.address6) == ("veth-web-eth1", "", "")
        assert [route.gateway for route in network.routes(web) if route.destination == "default"] == [
            "10.42.0.1", "fd42::1"]
        assert {link.name: link.mtu for link in network.links(web)}["eth1"] == 1400
        assert "1 received" in web.run(["ping", "-c", "1", "-W", "5", "10.43.0.1"])


def test_internal_has_no_way_out(spaces, untouched):
    host, web, _ = spaces
    with network.network(host, internal=True) as net, net.attach(web):
        assert not [route for route in network.routes(web) if route.destination == "default"]
        with pytest.raises(errors.ChildFailed, match="^ping: .*Network is unreachable"):
            web.run(["ping", "-c", "1", "192.0.2.1"])


def test_the_gateway_may_be_chosen(spaces, untouched):
    host, web, _ = spaces
    with network.network(host, gateway="10.42.0.254") as net, net.attach(web) as made:
        assert (made.address, made.gateway) == ("10.42.0.1/24", "10.42.0.254")
        assert "1 received" in web.run(["ping", "-c", "1", "-W", "5", "10.42.0.254"])


def test_the_hosts_end_has_a_name_that_fits():
    for target, name, host_end in (
            ("labs-web", "eth0", "veth-web"), ("labs-web", "eth1", "veth-web-eth1"),
            ("labs-0123456789", "eth0", "veth-0123456789"), ("labs-01234567890", "eth0", "veth-bc8e87d6a0"),
            ("pid 7", "eth0", "veth-2d94444633")):
        assert network.host_end(target, name) == host_end
        assert len(host_end) < network.IFNAMSIZ


# Bad input: one line, and nothing is left


BAD = [
    (lambda h, w, d: network.network(h, "b" * 16), "name: 'bbbbbbbbbbbbbbbb': must have 1 to 15 bytes"),
    (lambda h, w, d: network.network(h, "a/b"), "name: 'a/b': "), (lambda h, w, d: network.bridge(h, ""), "name: ''"),
    (lambda h, w, d: network.veth(w, "a b", d, "x"), "name: 'a b': "),
    (lambda h, w, d: network.veth(w, "x", d, "."), "name: '.': "),
    (lambda h, w, d: network.veth(w, "x", d, "lo"), "name: 'lo': labs-db has a link of that name"),
    (lambda h, w, d: network.veth(w, "lo", d, "x"), "name: 'lo': labs-web has a link of that name"),
    (lambda h, w, d: network.network(h, "lo"), "name: 'lo': labs-host has a link of that name"),
    (lambda h, w, d: network.network(h, mtu=60), "mtu: 60: must be 68 to 65535 bytes"),
    (lambda h, w, d: network.veth(w, "x", d, "y", mtu=65536), "mtu: 65536: "),
    (lambda h, w, d: network.bridge(h, address="10.42.0.1/33"), "address: '10.42.0.1/33': must be as 10.42.0.1/24"),
    (lambda h, w, d: network.network(h, subnet="10.42.0.1/24"), "subnet: '10.42.0.1/24': .* host bits set"),
    (lambda h, w, d: network.network(h, subnet="ten"), "subnet: 'ten': must be a subnet"),
    (lambda h, w, d: network.network(h, subnet="10.42.0.0/32"), "subnet: '10.42.0.0/32': must have room"),
    (lambda h, w, d: network.network(h, gateway="10.43.0.1"), "gateway: '10.43.0.1': must be a host's address in"),
    (lambda h, w, d: network.network(h, gateway="10.42.0.255"), "gateway: '10.42.0.255': "),
    (lambda h, w, d: network.network(h, subnet6="fd42::"), "subnet: 'fd42::': must have room"),
    (lambda h, w, d: network.namespace("a/b"), "namespace: 'a/b': must have 1 to 64"),
    (lambda h, w, d: network.namespace("../x"), "namespace: '../x': "),
    (lambda h, w, d: network.network(netns.Netns("gone", "/run/netns/labs-gone")), "namespace: 'gone': no such"),
    (lambda h, w, d: network.network(netns.Netns("uts", "/proc/self/ns/uts")), "namespace: 'uts': is no network"),
]
BAD_ATTACHMENTS = [
    ({"address": "10.42.0.2"}, "address: '10.42.0.2': is taken by labs-web eth0"),
    ({"address": "10.42.0.1"}, "address: '10.42.0.1': is taken by the network itself"),
    ({"address": "10.42.0.0"}, "address: '10.42.0.0': must be a host's address in 10.42.0.0/24"),
    ({"address": "10.43.0.2"}, "address: '10.43.0.2': must be"), ({"address": "x"}, "address: 'x': must be an IP"),
    ({"address": "fd42::9"}, "address: 'fd42::9': must be a host's address in 10.42.0.0/24"),
    ({"name": "e" * 16}, "name: 'eeeeeeeeeeeeeeee': must have 1 to 15 bytes"),
    ({"name": "lo"}, "name: 'lo': it, or veth-db-lo on the host, is there already")]


def test_bad_input_is_one_line_and_leaves_nothing(spaces, untouched):
    for make, text in BAD:
        with pytest.raises(errors.BadInput, match=f"^{text}") as caught, make(*spaces):
            pass
        assert "\n" not in str(caught.value)


def test_a_bad_attachment_leaves_nothing(net, spaces):
    host, web, db = spaces
    with net.attach(web):
        before = (names(host), names(db), net.pool.owners(), net.pool6.owners())
        for change, text in BAD_ATTACHMENTS:
            with pytest.raises(errors.BadInput, match=f"^{text}"), net.attach(db, **change):
                pass
            assert (names(host), names(db), net.pool.owners(), net.pool6.owners()) == before
        with pytest.raises(errors.BadInput, match="^owner: 'labs-web eth0': is in 10.42.0.0/24 already"), \
                net.attach(web):
            pass


def test_a_subnet_that_overlaps_a_route_is_refused(net, spaces):
    host = spaces[0]
    host.run(["ip", "route", "add", "10.99.0.0/16", "via", "10.42.0.200"])
    for subnet in ("10.42.0.0/24", "10.42.0.128/25", "10.0.0.0/8", "10.99.5.0/24"):
        text = rf"^subnet: '{subnet}': overlaps the route 10\S+ dev br0 of labs-host"
        with pytest.raises(errors.BadInput, match=text), network.network(host, "br1", subnet):
            pass
    assert "br1" not in names(host)
    host.run(["ip", "route", "del", "10.99.0.0/16"])


def test_a_refusal_in_the_middle_leaves_nothing(net, spaces):
    host, web, _ = spaces
    web.run(["sysctl", "-w", "net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1"])
    with pytest.raises(errors.KernelError, match=r"add addr .*: Permission denied"), net.attach(web):
        pass
    web.run(["sysctl", "-w", "net.ipv6.conf.all.disable_ipv6=0", "net.ipv6.conf.default.disable_ipv6=0"])
    assert (names(web), names(host), net.pool.owners(), net.pool6.owners()) == (["lo"], ["lo", "br0"], {}, {})


def test_a_link_of_the_hosts_ends_name_stays(net, spaces):
    host, web, _ = spaces
    with network.veth(host, "veth-web", web, "mine"):
        with pytest.raises(errors.BadInput, match="^name: 'eth0': it, or veth-web on the host, is there already"), \
                net.attach(web):
            pass
        assert "veth-web" in names(host)
        assert net.pool.owners() == {}


def test_an_error_in_the_block_detaches(net, spaces):
    with pytest.raises(ZeroDivisionError), net.attach(spaces[1]):
        raise ZeroDivisionError
    assert (names(spaces[1]), net.pool.owners()) == (["lo"], {})


@pytest.mark.parametrize("gone", ["host", "web"])
def test_a_namespace_gone_in_the_middle_leaves_nothing(gone):
    with network.namespace("first") as first, network.namespace("second") as second:
        doomed, left = (first, second) if gone == "host" else (second, first)
        with network.network(first) as net:
            with net.attach(second):
                subprocess.run(["ip", "netns", "delete", doomed.name], check=True)
                process.until(lambda: not {"veth-second", "eth0"} & set(names(left)))
            with pytest.raises(errors.BadInput, match=f"^namespace: '{doomed.name}': no such network namespace"), \
                    net.attach(second):
                pass
            assert net.pool.owners() == {}


def test_links_that_somebody_else_deleted_are_no_trouble(spaces, untouched):
    host, web, _ = spaces
    with network.network(host) as net, net.attach(web):
        web.run(["ip", "link", "delete", "eth0"])
        host.run(["ip", "link", "delete", "br0"])


def test_an_interrupt_undoes_everything():
    code = """
import time
from labs import network
with network.namespace("first") as first, network.network(first) as net, network.namespace("second") as second:
    with net.attach(second):
        print("ready", flush=True)
        while True:
            time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True) as caller:
        assert caller.stdout.readline() == "ready\n"
        caller.send_signal(signal.SIGINT)
    assert not {"labs-first", "labs-second"} & set(os.listdir("/run/netns"))
    assert leases() == []


def test_no_file_descriptor_and_no_child_is_left(net, spaces):
    before = (sorted(os.listdir("/proc/self/fd")), process.children(os.getpid()))
    with net.attach(spaces[1]):
        network.links(spaces[1])
        network.routes(spaces[1])
    with contextlib.suppress(errors.BadInput), net.attach(spaces[1], "lo"):
        pass
    assert (sorted(os.listdir("/proc/self/fd")), process.children(os.getpid())) == before


def test_ctrl_c_misses_the_opener_and_the_opener_holds_no_file(net, spaces):
    opener, = process.children(os.getpid())
    assert os.getsid(opener) == opener
    with net.attach(spaces[1]):
        held = sorted(link for number, link in process.descriptors(opener).items() if number > 2)
    assert held[0] == os.readlink("/proc/self/ns/net") == os.readlink(f"/proc/{opener}/ns/net")
    assert held[1].startswith("socket:") and len(held) == 2


def test_a_network_outlives_its_opener(net, spaces):
    host, web, db = spaces
    with net.attach(web):
        opener, = process.children(os.getpid())
        os.kill(opener, signal.SIGKILL)
        process.until(lambda: not net.opener.alive)
        with net.attach(db):
            assert "1 received" in db.run(["ping", "-c", "1", "-W", "5", "10.42.0.2"])
    assert (names(host), names(web), names(db)) == (["lo", "br0"], ["lo"], ["lo"])


def test_a_dump_that_the_kernel_calls_inconsistent_is_asked_again(spaces, monkeypatch):
    with netlink.connect(spaces[0]) as (kernel,):
        parse, asked = kernel.marshal.parse, []
        def inconsistent(data):
            for message in parse(data):
                if message.get("ifname") == "lo" and len(asked) < 2:
                    asked.append(message)
                    message["header"]["flags"] |= netlink.NLM_F_DUMP_INTR
                yield message
        monkeypatch.setattr(kernel.marshal, "parse", inconsistent)
        assert [message.get("ifname") for message in kernel.request("dump", "link")] == names(spaces[0])
        assert len(asked) == 2


def test_many_targets_get_as_many_addresses(net):
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(network.namespace(f"t{number}")) for number in range(12)]
        made = [stack.enter_context(net.attach(target)) for target in targets]
        assert [one.address for one in made] == [f"10.42.0.{number}/24" for number in range(2, 14)]
        assert len(ip(net.host, "link", "show", "master", "br0")) == 12
        assert "1 received" in targets[0].run(["ping", "-c", "1", "-W", "5", "10.42.0.13"])
    assert names(net.host) == ["lo", "br0"]


def test_an_unmarked_machine_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "MARKER", str(tmp_path / "nothing"))
    for make in (lambda: network.namespace("x"), lambda: network.veth(OWN, "a", OWN, "b"), lambda: network.bridge(OWN),
                 lambda: network.network(OWN)):
        with pytest.raises(errors.NotALab), make():
            pass
    assert not Path("/run/netns/labs-x").exists()


def test_a_container_joins_by_path(net, spaces):
    web, db = spaces[1:]
    with net.attach(web), net.attach(db), container.Container(["sleep", "1000"], network=web.path) as box:
        assert os.readlink(f"/proc/{box.pid}/ns/net") == web.call(os.readlink, "/proc/self/ns/net")
        assert box.exec(["ls", "/sys/class/net"]).stdout == "eth0\nlo\n"
        assert "1 packets received" in box.exec(["ping", "-c", "1", "10.42.0.3"]).stdout
        shared = container.run(["ip", "route"], network=f"/proc/{box.pid}/ns/net").stdout
        assert shared.startswith("default via 10.42.0.1")
    assert "labs-web" in os.listdir("/run/netns")


# The last one: it removes the module's namespaces too


def test_kill_9_leaves_only_what_clean_removes():
    code = """
import time
from labs import network
with network.namespace("first") as first, network.namespace("second") as second:
    with network.network(first) as net, net.attach(second), second.spawn(["sleep", "1000"]) as child:
        print(child.pid, flush=True)
        while True:
            time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as caller:
        inside = os.pidfd_open(int(caller.stdout.readline()))
        caller.send_signal(signal.SIGKILL)
    assert process.readable(inside, 30)
    os.close(inside)
    assert {"labs-first", "labs-second"} <= set(os.listdir("/run/netns"))
    with pytest.raises(errors.BadInput, match="is there already; lab.clean"), network.namespace("first"):
        pass
    with process.spawn(["ip", "netns", "exec", "labs-first", "sleep", "1000"]) as stray:
        own = os.readlink("/proc/self/ns/net")
        process.until(lambda: os.readlink(f"/proc/{stray.pid}/ns/net") != own)
        removed = lab.clean(engines=False)
        assert stray.wait(30).signal == signal.SIGKILL
    assert {"netns labs-first", "netns labs-second"} <= set(removed)
    assert [line for line in removed if "ipam" in line]
    assert not {name for name in os.listdir("/run/netns") if name.startswith("labs-")}
    assert lab.clean(engines=False) == []
    with network.namespace("first") as first, network.network(first) as net, network.namespace("second") as second, \
            net.attach(second) as made:
        assert made.address == "10.42.0.2/24"
