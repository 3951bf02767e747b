"""labs.dns: what dig, busybox and glibc make of its answers; broken questions; that nothing stays.

One small network for all tests: the host labs-host with a bridge, two containers' namespaces on it, and an
outside with a DNS server of its own.
"""

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
from typing import NamedTuple

import dns.flags
import dns.message
import dns.query
import dns.rcode
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labs import container, errors, machine, network, process
from labs import dns as names

GATEWAY, OUTSIDE = "10.42.0.1", "192.0.2.53"
RECORDS = {
    "web": ["10.42.0.2", "10.42.0.3"], "web-1": "10.42.0.2", "web-2": ["10.42.0.3"], "db": ["10.42.0.4", "fd42::4"],
    "database": "db", "storage": "database", "idle": [], "many": [f"10.42.1.{n}" for n in range(100)],
    "a-service": ["10.42.0.2", "10.42.0.3", "10.42.0.4"], "some": [f"10.42.2.{n}" for n in range(40)],
}
ABROAD = {"example.com": "198.51.100.7", "many.example.com": [f"198.51.100.{n}" for n in range(100)]}
HEADER = struct.Struct("!6H")


class Net(NamedTuple):
    host: network.Netns
    web: network.Netns
    db: network.Netns
    outside: network.Netns
    server: names.Server
    abroad: names.Server


@pytest.fixture(scope="module")
def net():
    with contextlib.ExitStack() as undo:
        host, web, db, outside = (undo.enter_context(network.namespace(n)) for n in ("host", "web", "db", "outside"))
        bridge = undo.enter_context(network.network(host))
        for inside, address in ((web, "10.42.0.2"), (db, "10.42.0.3")):
            undo.enter_context(bridge.attach(inside, address=address))
        undo.enter_context(network.veth(host, "uplink", outside, "eth0"))
        host.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "uplink"])
        outside.run(["ip", "addr", "add", f"{OUTSIDE}/24", "dev", "eth0"])
        abroad = undo.enter_context(names.serve(outside, OUTSIDE, ABROAD))
        server = undo.enter_context(names.serve(host, GATEWAY, RECORDS, upstream=OUTSIDE, domain="labs.internal"))
        yield Net(host, web, db, outside, server, abroad)


def dig(where, *question, server=GATEWAY):
    return names.dig(where, server, *question)


def addresses(said):
    return said.of("A") + said.of("AAAA")


# What the names say


def test_names_are_found_alone_and_below_the_domain_whatever_their_case(net):
    for name in ("web-1", "web-1.labs.internal", "WeB-1", "WEB-1.Labs.Internal."):
        said = dig(net.web, name)
        assert (said.rcode, said.of("A"), len(said.records)) == ("NOERROR", ["10.42.0.2"], 1)
        assert said.flags == "qr aa rd ra"
    assert "WeB-1." in net.web.run(["dig", f"@{GATEWAY}", "+noall", "+answer", "WeB-1"])


def test_several_addresses_take_turns(net):
    first = [addresses(dig(net.web, "web"))[0] for _ in range(4)]
    assert sorted(first[:2]) == ["10.42.0.2", "10.42.0.3"] and first[:2] == first[2:]
    assert sorted(addresses(dig(net.web, "web"))) == ["10.42.0.2", "10.42.0.3"]


def test_questions_for_ipv6_do_not_disturb_the_turns_of_ipv4(net):
    seen = set()
    for _ in range(2):
        seen.add(addresses(dig(net.web, "web", "A"))[0])
        dig(net.web, "web", "AAAA")
    assert seen == {"10.42.0.2", "10.42.0.3"}


def test_an_alias_leads_to_the_name_and_its_addresses(net):
    assert dig(net.web, "database").records == ["database. CNAME db.", "db. A 10.42.0.4"]
    assert dig(net.web, "storage", "AAAA").records == ["storage. CNAME db.", "db. AAAA fd42::4"]
    assert dig(net.web, "storage.labs.internal").records == [
        "storage.labs.internal. CNAME db.labs.internal.", "db.labs.internal. A 10.42.0.4"]
    assert dig(net.web, "database", "CNAME").records == ["database. CNAME db."]
    assert dig(net.web, "database", "TXT").records == ["database. CNAME db."]
    assert dig(net.web, "+notcp", "db", "ANY").records == ["db. A 10.42.0.4", "db. AAAA fd42::4"]


@pytest.mark.parametrize("question", [("web", "AAAA"), ("web", "MX"), ("idle", "A"), ("web.labs.internal", "TXT")])
def test_a_name_without_such_data_is_no_error(net, question):
    said = dig(net.web, *question)
    assert (said.rcode, said.records, "aa" in said.flags) == ("NOERROR", [], True)


@pytest.mark.parametrize("name", ["nothing", "nothing.labs.internal", "a.web.labs.internal", "localdomain"])
def test_a_name_that_is_ours_and_unknown_does_not_exist(net, name):
    before = len(net.abroad.queries())
    said = dig(net.web, name)
    assert (said.rcode, said.records, "aa" in said.flags) == ("NXDOMAIN", [], True)
    assert len(net.abroad.queries()) == before


def test_an_address_leads_back_to_its_names_the_most_particular_first(net):
    assert dig(net.web, "-x", "10.42.0.2").of("PTR") == [
        "web-1.labs.internal.", "web.labs.internal.", "a-service.labs.internal."]
    assert dig(net.web, "-x", "fd42::4").of("PTR") == ["db.labs.internal."]
    assert dig(net.web, "-x", "10.42.0.99").rcode == "NXDOMAIN"
    assert dig(net.web, "2.0.42.10.in-addr.arpa", "A")[::2] == ("NOERROR", [])


# Names of others


def test_other_names_are_asked_of_the_server_above(net):
    said = dig(net.web, "example.com")
    assert said == ("NOERROR", "qr rd ra", ["example.com. A 198.51.100.7"])
    assert net.abroad.queries()[-1][:3] == ("192.0.2.1", "udp", "example.com.")
    assert dig(net.web, "example.com", "AAAA")[::2] == ("NOERROR", [])
    assert dig(net.web, "-x", "8.8.8.8").rcode == "REFUSED"


def test_what_is_not_desired_is_not_passed_on(net):
    before = len(net.abroad.queries())
    assert dig(net.web, "+norecurse", "example.com").rcode == "REFUSED"
    assert dig(net.web, "version.bind", "CH", "TXT").rcode == "REFUSED"
    assert len(net.abroad.queries()) == before


def test_without_a_server_above_other_names_are_refused(net):
    with names.serve(net.web, "127.0.0.1", {"web": "10.42.0.2"}):
        said = dig(net.web, "example.com", server="127.0.0.1")
        assert said[:2] == ("REFUSED", "qr rd")
        assert dig(net.web, "web", server="127.0.0.1").rcode == "NOERROR"


@contextlib.contextmanager
def false_server(where, reply):
    """Answer each datagram on 127.0.0.2 of a namespace with reply(datagram): a list of datagrams."""
    def serve():
        fd = os.open(where.path, os.O_RDONLY)
        os.setns(fd, os.CLONE_NEWNET)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("127.0.0.2", 53))
            os.write(writer, b"!")
            while True:
                data, client = udp.recvfrom(65535)
                for answer in reply(data):
                    udp.sendto(answer, client)
    reader, writer = os.pipe()
    with process.fork(serve):
        assert os.read(reader, 1)
        yield
    os.close(reader)
    os.close(writer)


def forged(data):
    """A wrong ID, another question, a question; then the right answer."""
    query = dns.message.from_wire(data)
    other = dns.message.make_response(dns.message.make_query("other.example", "A", id=query.id))
    right = dns.message.make_response(query)
    right.answer = [dns.rrset.from_text("example.com.", 5, "IN", "A", "198.51.100.9")]
    wrong = right.to_wire()
    right.answer = [dns.rrset.from_text("example.com.", 5, "IN", "A", "198.51.100.8")]
    return [bytes([wrong[0] ^ 1]) + wrong[1:], other.to_wire(), data, b"", b"x", right.to_wire()]


def test_forged_answers_are_not_passed_on(net):
    with false_server(net.db, forged), names.serve(net.db, "127.0.0.1", {}, upstream="127.0.0.2"):
        assert dig(net.db, "example.com", server="127.0.0.1").of("A") == ["198.51.100.8"]


def test_codes_that_nobody_has_named_are_passed_on(net):
    with false_server(net.db, lambda data: [data[:2] + b"\x80\x0f" + data[4:]]), \
            names.serve(net.db, "127.0.0.1", {}, upstream="127.0.0.2") as server:
        assert "15" in dig(net.db, "example.com", server="127.0.0.1").rcode
        assert server.queries()[-1].rcode == "15"


def test_a_silent_server_above_ends_in_servfail_and_delays_nobody_else(net):
    with false_server(net.db, lambda _: []), names.serve(net.db, "127.0.0.1", RECORDS, upstream="127.0.0.2") as server:
        with net.db.spawn(["dig", "@127.0.0.1", "+tries=1", "+timeout=8", "example.com"]) as waiting:
            process.until(lambda: process.descriptors(waiting.pid))
            assert dig(net.db, "web-1", server="127.0.0.1").rcode == "NOERROR"
            assert [query.name for query in server.queries()] == ["web-1."]
            assert waiting.wait(20).code == 0
        assert server.queries()[-1][2:] == ("example.com.", "A", "SERVFAIL")
    with names.serve(net.db, "127.0.0.1", {}, upstream="127.0.0.2"):  # nobody there: ICMP says so at once
        assert dig(net.db, "example.com", server="127.0.0.1").rcode == "SERVFAIL"
        assert dig(net.db, "+tcp", "example.com", server="127.0.0.1").rcode == "SERVFAIL"


def test_those_who_wait_for_others_do_not_keep_our_own_names_waiting(net):
    def crowd():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect(("127.0.0.1", 53))
            for number in range(names.MOST_AT_ONCE + 20):
                udp.send(dns.message.make_query(f"{number}.example.com", "A", id=number).to_wire())
            udp.send(dns.message.make_query("web-1", "A", id=9999).to_wire())
            udp.settimeout(5)
            return [dns.message.from_wire(udp.recv(1000)).rcode() for _ in range(21)]
    with false_server(net.db, lambda _: []), names.serve(net.db, "127.0.0.1", RECORDS, upstream="127.0.0.2") as server:
        assert net.db.call(crowd) == [dns.rcode.SERVFAIL] * 20 + [dns.rcode.NOERROR]
        assert [query.name for query in server.queries()] == [
            *(f"{number}.example.com." for number in range(names.MOST_AT_ONCE, names.MOST_AT_ONCE + 20)), "web-1."]


# UDP and TCP


def test_what_does_not_fit_a_datagram_comes_by_tcp(net):
    since = len(net.server.queries())
    short = dig(net.web, "+ignore", "many")
    assert "tc" in short.flags and short.records == []
    assert len(dig(net.web, "many").records) == 100
    assert [query.via for query in net.server.queries(since)] == ["udp", "udp", "tcp"]


def test_a_client_that_takes_more_gets_more(net):
    assert "tc" in dig(net.web, "+ignore", "+noedns", "some").flags
    said = dig(net.web, "+ignore", "+bufsize=1232", "some")
    assert "tc" not in said.flags and len(said.records) == 40
    assert "tc" in dig(net.web, "+ignore", "+bufsize=4096", "many").flags


def test_tcp_and_truncation_pass_through_to_the_server_above(net):
    assert "tc" in dig(net.web, "+ignore", "many.example.com").flags
    assert len(dig(net.web, "many.example.com").records) == 100
    assert [query.via for query in net.abroad.queries()[-2:]] == ["udp", "tcp"]


def test_one_connection_carries_many_questions(net):
    text = net.web.run(["dig", f"@{GATEWAY}", "+tcp", "+keepopen", "+short", "web-1", "db", "database"])
    assert text.split() == ["10.42.0.2", "10.42.0.4", "db.", "10.42.0.4"]


# Broken questions


def told(wire, records=RECORDS, via="udp"):
    """What the server answers to some bytes, asked without a network."""
    service = names._Service(names.Names(records, "labs.internal"), None)
    return asyncio.run(service.reply(wire, via, "test"))


QUESTION = dns.message.make_query("web", "A", use_edns=True).to_wire()


@settings(max_examples=100, deadline=None)
@given(st.one_of(
    st.binary(max_size=600),
    st.tuples(st.lists(st.tuples(st.integers(0, len(QUESTION) - 1), st.integers(0, 255)), max_size=6),
              st.binary(max_size=40), st.integers(0, len(QUESTION))).map(
        lambda drawn: mutated(*drawn))))
@example(b"")
@example(QUESTION[:12] + b"\xc0\x0c\x00\x01\x00\x01")
def test_no_bytes_break_it(wire):
    answer = told(wire)
    if len(wire) < HEADER.size or wire[2] & 0x80:
        assert answer == b""
        return
    assert answer[:2] == wire[:2] and answer[2] & 0x80
    assert len(answer) <= names.EDNS_BYTES
    dns.message.from_wire(answer, question_only=True)


def mutated(changes, tail, keep):
    wire = bytearray(QUESTION[:keep] if tail else QUESTION)
    for place, value in changes:
        if place < len(wire):
            wire[place] = value
    return bytes(wire) + tail


def rcode(wire):
    return dns.message.from_wire(told(wire)).rcode()


def test_each_kind_of_broken_question_has_its_code():
    query = dns.message.make_query("web", "A")
    plain = query.to_wire()
    two = HEADER.pack(7, 0x0100, 2, 0, 0, 0) + plain[12:] * 2
    none = HEADER.pack(7, 0x0100, 0, 0, 0, 0)
    assert rcode(plain) == dns.rcode.NOERROR
    for broken in (two, none, plain[:-1], plain + b"x", plain[:12] + b"\xff" * 20, plain[:12] + b"\xc0\x0c\0\1\0\1"):
        assert rcode(broken) == dns.rcode.FORMERR
    for opcode in (1, 2, 4, 5, 6, 15):
        answer = told(HEADER.pack(7, opcode << 11, 1, 0, 0, 0) + plain[12:])
        assert HEADER.unpack(answer) == (7, 0x8000 | opcode << 11 | dns.rcode.NOTIMP, 0, 0, 0, 0)
    newer = dns.message.make_query("web", "A", use_edns=1).to_wire()
    assert rcode(newer) == dns.rcode.BADVERS
    assert told(plain[:11]) == b"" and told(told(plain)) == b""


def test_broken_bytes_over_the_network_and_the_next_one_is_answered(net):
    def talk():
        with socket.create_connection((GATEWAY, 53), timeout=5) as tcp:
            tcp.sendall(b"\0\0")
            assert tcp.recv(100) == b""
        with socket.create_connection((GATEWAY, 53), timeout=5) as tcp:
            tcp.sendall(b"\xff\xffnever the rest")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.settimeout(5)
            udp.connect((GATEWAY, 53))
            for wire in (b"", b"x", QUESTION[:11], b"\xff" * 5000, os.urandom(2) + b"\x80" + bytes(20)):
                udp.send(wire)
            udp.send(QUESTION + b"x")
            return list(udp.recv(100))
    assert names.exchange(net.web, GATEWAY, b"short") == b""
    assert names.exchange(net.web, GATEWAY, QUESTION + b"x") == QUESTION[:2] + b"\x81\x01" + bytes(8)
    assert bytes(net.web.call(talk)) == QUESTION[:2] + b"\x81\x01" + bytes(8)
    assert net.server.queries()[-1][1:] == ("udp", "", "", "FORMERR")
    assert dig(net.web, "web-1").rcode == "NOERROR"


def test_idle_connections_do_not_keep_others_out(net):
    def crowd():
        held = [socket.create_connection((GATEWAY, 53), timeout=5) for _ in range(names.MOST_AT_ONCE + 5)]
        answer = dns.query.udp(dns.message.make_query("web-1", "A"), GATEWAY, timeout=5)
        closed = held[-1].recv(10) == b""
        for one in held:
            one.close()
        return answer.answer[0][0].address, closed
    assert net.web.call(crowd) == ["10.42.0.2", True]
    assert dig(net.web, "+tcp", "web-1").rcode == "NOERROR"


# Bad input


def folders():
    return sorted(name for name in os.listdir(machine.STATE) if name.startswith("labs-dns-"))


@pytest.mark.parametrize(("records", "said"), [
    ({"a": "b"}, "records: 'a': is an alias that leads to no name with addresses"),
    ({"a": "b", "b": "a"}, "records: 'a': is an alias that leads to no name with addresses"),
    ({"a": ["10.42.0.256"]}, "records: '10.42.0.256': must be an IPv4 or IPv6 address"),
    ({"": "10.42.0.2"}, "records: '': must not be empty"),
    ({"a..b": "10.42.0.2"}, "records: 'a..b': is no DNS name: a dns label is empty"),
    ({"x" * 64: "10.42.0.2"}, f"records: '{'x' * 64}': is no DNS name: a dns label is > 63 octets long"),
])
def test_bad_records(net, records, said):
    with pytest.raises(errors.BadInput) as caught, names.serve(net.web, "127.0.0.1", records):
        pass
    assert str(caught.value) == said
    with pytest.raises(errors.BadInput):
        net.server.update(records)
    assert dig(net.web, "web-1").rcode == "NOERROR"


@pytest.mark.parametrize(("options", "said"), [
    ({"address": "10.42.0.77"}, "address: '10.42.0.77': no interface of the namespace has it"),
    ({"address": "web"}, "address: 'web': must be an IPv4 or IPv6 address"),
    ({"address": GATEWAY}, f"port: 53: another server has it on {GATEWAY}"),
    ({"address": "127.0.0.1", "upstream": "127.0.0.1"}, "upstream: '127.0.0.1': is this server itself"),
    ({"address": "127.0.0.1", "domain": "a..b"}, "domain: 'a..b': is no DNS name: a dns label is empty"),
])
def test_bad_places(net, options, said):
    with pytest.raises(errors.BadInput) as caught, names.serve(net.host, records={}, **options):
        pass
    assert str(caught.value) == said
    assert folders() == sorted(os.path.basename(one.folder) for one in (net.server, net.abroad))


def test_a_namespace_that_is_gone(net):
    gone = network.Netns("labs-gone", "/run/netns/labs-gone")
    for options in ({"ns": gone}, {"ns": net.web, "sockets": gone}):
        with pytest.raises(errors.BadInput, match="namespace: 'labs-gone'"), \
                names.serve(address="127.0.0.1", records={}, **options):
            pass
    assert len(folders()) == 2


# While it runs


def test_names_come_and_go(net):
    with names.serve(net.web, "127.0.0.1", {"one": "10.42.0.2"}, domain="labs.internal") as server:
        server.update({"two": ["10.42.0.3"]})
        assert dig(net.web, "one", server="127.0.0.1").rcode == "NXDOMAIN"
        assert addresses(dig(net.web, "two.labs.internal", server="127.0.0.1")) == ["10.42.0.3"]
        assert server.queries(1) == [names.Query("127.0.0.1", "udp", "two.labs.internal.", "A", "NOERROR")]


def test_a_server_that_was_killed_says_so(net):
    with names.serve(net.web, "127.0.0.1", {}) as server:
        server._child.kill()
        with pytest.raises(errors.ChildFailed, match="dns server: it was killed"):
            server.queries()


def test_it_ends_with_its_caller_even_by_sigkill(net):
    script = ("import sys; from labs import dns, network\n"
              f"with dns.serve(network.Netns(*{tuple(net.web)}), '127.0.0.1', {{}}) as server:\n"
              "    print(server.pid, flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as caller:
        pidfd = os.pidfd_open(int(caller.stdout.readline()))
        caller.kill()
    assert process.readable(pidfd, 20)
    os.close(pidfd)
    mine = {os.path.basename(one.folder) for one in (net.server, net.abroad)}
    left, = set(folders()) - mine  # lab.clean() would remove it, and all of this test's network too
    machine.remove_tree(f"{machine.STATE}/{left}")


# Where the sockets stand


def test_the_sockets_may_stand_in_another_namespace_than_the_process(net):
    with names.serve(net.host, "127.0.0.11", RECORDS, upstream=OUTSIDE, port=5353, sockets=net.web) as server:
        assert os.stat(f"/proc/{server.pid}/ns/net").st_ino == os.stat(net.host.path).st_ino
        assert net.web.run(["ss", "-Hlun", "src", "127.0.0.11:5353"]).split()[3] == "127.0.0.11:5353"
        assert net.host.run(["ss", "-Hlun", "src", "127.0.0.11:5353"]) == ""
        assert addresses(dig(net.web, "-p", "5353", "example.com", server="127.0.0.11")) == ["198.51.100.7"]
        assert net.abroad.queries()[-1].client == "192.0.2.1"


# Containers


def inside(net, argv, rootfs="busybox", **options):
    bind = net.server.resolv_conf(**options)
    try:
        return container.run(argv, rootfs=rootfs, network=net.web.path, mounts=[bind], timeout=60)
    finally:
        os.unlink(bind.source)


def test_busybox_in_a_container(net):
    found = inside(net, ["nslookup", "web-1"])
    assert found.code == 0 and "Address: 10.42.0.2\n" in found.stdout
    assert "NXDOMAIN" in inside(net, ["nslookup", "nothing"]).stdout
    assert "name = web-1.labs.internal" in inside(net, ["nslookup", "10.42.0.2"]).stdout
    since = len(net.server.queries())
    assert inside(net, ["ping", "-c", "1", "-w", "5", "web-2"], search=["labs.internal"]).code == 0
    assert net.server.queries(since)[0].name == "web-2.labs.internal."


def test_glibc_in_a_container(net):
    def getent(*argv, **options):
        since = len(net.server.queries())
        found = inside(net, ["getent", *argv], "debian", **options)
        return [line.split() for line in found.stdout.splitlines()], net.server.queries(since)

    rows, asked = getent("ahostsv4", "storage")
    assert rows[0] == ["10.42.0.4", "STREAM", "db"]
    rows, asked = getent("ahosts", "nothing", search=["labs.internal"], options=["ndots:1"])
    assert rows == [] and [query.name for query in asked][::2] == ["nothing.labs.internal.", "nothing."]
    rows, asked = getent("ahostsv4", "many")
    assert len(rows) == 300 and [query.via for query in asked[:2]] == ["udp", "tcp"]
    assert getent("hosts", "10.42.0.3")[0] == [["10.42.0.3", "web-2.labs.internal"]]
    assert getent("ahostsv4", "example.com")[0][0][0] == "198.51.100.7"


def test_resolv_conf():
    text = names.resolv_conf(["10.42.0.1", "fd42::1"], ["labs.internal", "example.com."], ["ndots:1", "timeout:2"])
    assert text.splitlines() == ["nameserver 10.42.0.1", "nameserver fd42::1", "search labs.internal example.com",
                                 "options ndots:1 timeout:2"]
    with pytest.raises(errors.BadInput):
        names.resolv_conf(["gateway"])
