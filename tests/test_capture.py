"""labs.capture: what is heard and how it is read, compared with tcpdump, conntrack and nft."""

import contextlib
import os
import random
import re
import subprocess
import xml.etree.ElementTree as ET
from itertools import pairwise
from types import SimpleNamespace

import pytest

from labs import capture, errors, firewall, netns, network, process

RULES = """table ip walk {
  chain prerouting { type nat hook prerouting priority dstnat; tcp dport 8080 counter dnat to 10.42.0.2:80; }
  chain forward { type filter hook forward priority filter; counter; }
}
"""
PLACES = ["labs-client eth0", "labs-host wan0", "labs-host br0", "labs-host veth-web", "labs-web eth0"]
LETTERS = {"SYN": "S", "ACK": ".", "FIN": "F", "RST": "R", "PSH": "P", "URG": "U"}
SYN = bytes.fromhex("0242c0000201 0242c0000202 0800"
                    "4500 0028 0001 4000 40 06 0000 c0000202 c0000201"
                    "9c41 1f90 0000002a 00000000 5002 ffff 0000 0000".replace(" ", ""))


@pytest.fixture(scope="module")
def walk():
    """A client, a host that publishes port 8080, and a web server behind its bridge."""
    with contextlib.ExitStack() as stack:
        client, host, web = (stack.enter_context(netns.namespace(name)) for name in ("client", "host", "web"))
        stack.enter_context(network.veth(host, "wan0", client, "eth0"))
        host.run(["ip", "address", "add", "192.0.2.1/24", "dev", "wan0"])
        client.run(["ip", "address", "add", "192.0.2.2/24", "dev", "eth0"])
        stack.enter_context(stack.enter_context(network.network(host)).attach(web))
        host.sysctl("net.ipv4.ip_forward", 1)
        stack.enter_context(firewall.ruleset(host, RULES))
        stack.enter_context(firewall.answering(web, 80))
        yield SimpleNamespace(client=client, host=host, web=web)


def fetch(walk, port):
    return walk.client.run(["curl", "-s", "-m", "20", "--local-port", str(port), "http://192.0.2.1:8080/"]).strip()


def read_with_tcpdump(path, *more):
    return subprocess.run(["tcpdump", "-nn", "-t", *more, "-r", path], capture_output=True, text=True,
                          check=True).stdout.splitlines()


def once(packets):
    """Without what was sent again: a loaded machine answers later than TCP likes to wait."""
    seen = set()
    keys = [(one.place, one.way, one.flags, one.sequence, one.payload) for one in packets]
    return [one for one, key in zip(packets, keys, strict=True) if not (key in seen or seen.add(key))]


# Heard


def test_one_packet_at_five_places_in_order(walk):
    before = os.readlink("/proc/self/ns/net")
    with capture.listen(walk.client, walk.host, walk.web) as heard:
        assert fetch(walk, 41001) == "labs-web sees 192.0.2.2"
        packets = once(heard.until(lambda seen: any("FIN" in one.flags for one in seen)))
        assert heard.lost() == 0
    assert os.readlink("/proc/self/ns/net") == before
    syn = [one for one in packets if one.flags == "SYN"]
    assert [one.place for one in syn] == PLACES
    assert [one.way for one in syn] == ["out", "in", "out", "out", "in"]
    assert [one.target for one in syn] == ["192.0.2.1:8080"] * 2 + ["10.42.0.2:80"] * 3
    assert [one.ttl for one in syn] == [64, 64, 63, 63, 63]
    assert len({one.sequence for one in syn}) == 1
    assert [bool(capture.rewritten(*pair)) for pair in pairwise(syn)] == [False, True, False, False]
    answer = [one for one in packets if one.flags == "SYN,ACK"]
    assert [one.place for one in answer] == PLACES[::-1]
    assert {one.source for one in answer} == {"10.42.0.2:80", "192.0.2.1:8080"}
    assert [one.time for one in packets] == sorted(one.time for one in packets)
    text = b"".join(one.payload for one in packets if (one.place, one.way, one.protocol) == (PLACES[0], "in", "TCP"))
    assert text == b"HTTP/1.0 200 OK\r\n\r\nlabs-web sees 192.0.2.2\n"


def test_tcpdump_hears_the_same(walk, tmp_path):
    theirs, ours = tmp_path / "theirs.pcap", tmp_path / "ours.pcap"
    dump = ["tcpdump", "-i", "eth0", "-U", "-w", str(theirs), "--immediate-mode", "-Z", "root", "tcp"]
    with walk.client.spawn(["sh", "-c", 'exec "$@" 2> /dev/null', "sh", *dump]) as judge:
        process.until(lambda: theirs.exists() and theirs.stat().st_size >= 24)
        with capture.listen(walk.client, keep=lambda one: one.protocol == "TCP") as heard:
            fetch(walk, 41002)
            heard.until(lambda seen: sum("FIN" in one.flags for one in seen) == 2 and seen[-1].flags == "ACK")
            process.until(lambda: len(read_whole(theirs)) == len(heard.read()))
            capture.write(heard.packets, str(ours))
        judge.stop()
    assert read_with_tcpdump(str(ours), "-vvv", "-XX") == read_with_tcpdump(str(theirs), "-vvv", "-XX")


def read_whole(path):
    """The lines of a file that is being written, [] while its last record is half there."""
    done = subprocess.run(["tcpdump", "-nn", "-r", str(path)], capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def test_every_protocol_is_read_as_tcpdump_reads_it(walk, tmp_path):
    with capture.listen(walk.client) as heard:
        fetch(walk, 41003)
        walk.client.run(["ip", "neigh", "flush", "dev", "eth0"])
        walk.client.run(["ping", "-c", "1", "-s", "3000", "192.0.2.1"])
        walk.client.run(["ping", "-c", "1", "-t", "9", "192.0.2.1"])
        walk.client.run(["ping", "-c", "1", "-W", "1", "ff02::1%eth0"], check=False)
        walk.client.run(["python3", "-c", "import socket; socket.socket(2, 2).sendto(b'x' * 7, ('192.0.2.1', 99))"])
        packets = heard.until(lambda seen: any(one.protocol == "UDP" for one in seen))
    capture.write(packets, str(tmp_path / "all.pcap"))
    text = "\n".join(read_with_tcpdump(str(tmp_path / "all.pcap"), "-v", "--number"))
    said = [" ".join(part.split()) for part in re.split(r"(?m)^ *\d+ +(?=ARP|IP)", text)[1:]]
    assert len(said) == len(packets)
    assert {one.protocol for one in packets} >= {"TCP", "UDP", "ICMP", "ICMPv6", "ARP"}
    assert {"fragment", "request", "reply", "SYN"} <= {one.flags for one in packets}
    for packet, line in zip(packets, said, strict=True):
        check_against(packet, line)


def check_against(packet, line):
    """One line of `tcpdump -v` says the same."""
    if packet.protocol == "ARP":
        who = f"who-has {packet.target} tell {packet.source}" if packet.flags == "request" else f"Reply {packet.source}"
        assert who in line or f"who-has {packet.target} (" in line
        return
    ends = [re.sub(r"\]?:(\d+)$", r".\1", end).replace("[", "") if packet.protocol in ("TCP", "UDP") else end
            for end in (packet.source, packet.target)]
    assert f"{ends[0]} > {ends[1]}:" in line
    assert re.search(rf"(ttl|hlim) {packet.ttl}\b", line)
    if packet.protocol == "TCP":
        order = ("SYN", "FIN", "RST", "PSH", "ACK", "URG")
        letters = "".join(LETTERS[name] for name in order if name in packet.flags.split(","))
        assert f"Flags [{letters}]" in line
        assert f"length {len(packet.payload)}" in line
    if packet.protocol == "UDP":
        assert f"UDP, length {len(packet.payload)}" in line
    if packet.flags in ("request", "reply"):
        assert f"echo {packet.flags}" in line
        assert f"seq {packet.sequence}" in line


def test_only_what_is_kept_and_only_where_it_listens(walk):
    with capture.listen(walk.web, keep=lambda one: one.protocol == "TCP") as heard:
        fetch(walk, 41004)
        packets = heard.until(len)
    assert {one.namespace for one in packets} == {"labs-web"}
    assert {one.protocol for one in packets} == {"TCP"}


def test_what_finds_the_buffer_full_is_counted(walk, monkeypatch):
    monkeypatch.setattr(capture, "BUFFER", 0)
    with capture.listen(walk.client) as heard:
        fetch(walk, 41005)
        assert heard.lost() > 0


def test_waiting_ends(walk):
    with capture.listen(walk.client) as heard, pytest.raises(errors.Timeout):
        heard.until(lambda seen: False, timeout=0.01)


def test_a_namespace_that_is_gone():
    with pytest.raises(errors.BadInput, match="labs-gone"), capture.listen(netns.Netns("labs-gone", "/run/netns/no")):
        pass


# Taken apart


def test_a_frame_of_known_bytes():
    packet = capture.dissect(SYN, 7, "labs-x", "eth0", "out")
    assert packet[:12] == (7, "labs-x", "eth0", "out", ("02:42:c0:00:02:02", "02:42:c0:00:02:01"), "TCP",
                           "192.0.2.2:40001", "192.0.2.1:8080", 64, "SYN", 42, b"")
    assert str(packet) == "labs-x eth0        out  TCP 192.0.2.2:40001 > 192.0.2.1:8080 SYN ttl 64"


@pytest.mark.parametrize("length", range(len(SYN)))
def test_a_frame_cut_short_is_no_error(length):
    assert capture.dissect(SYN[:length]).payload is not None


def test_nonsense_is_no_error():
    dice = random.Random(4)
    for _ in range(2000):
        data = bytearray(SYN + dice.randbytes(30))
        for _ in range(dice.randrange(1, 9)):
            data[dice.randrange(12, len(data))] = dice.randrange(256)
        str(capture.dissect(bytes(data)))


def test_ipv6_bears_brackets_only_with_a_port():
    head = bytes.fromhex("333300000001 0242c0000202 86dd 60000000 000c 11 ff".replace(" ", ""))
    ends = bytes.fromhex("fd42" + "00" * 13 + "01" + "fd42" + "00" * 13 + "02")
    packet = capture.dissect(head + ends + bytes.fromhex("0001 0002 000c 0000".replace(" ", "")) + b"1234")
    assert packet[5:9] == ("UDP", "[fd42::1]:1", "[fd42::2]:2", 255)
    assert packet.payload == b"1234"


def test_the_path_drawn():
    first = capture.dissect(SYN, 0, "labs-client", "eth0", "out")
    second = first._replace(namespace="labs-host", link="br0", target="10.42.0.2:80", ttl=63)
    picture = capture.path([first, second], "A walk")
    assert picture.alt.splitlines() == [
        "A walk", "labs-client: eth0 out, 192.0.2.2:40001 → 192.0.2.1:8080",
        "labs-host: rewritten here, target 192.0.2.1:8080 → 10.42.0.2:80, ttl 64 → 63",
        "labs-host: br0 out, 192.0.2.2:40001 → 10.42.0.2:80"]
    assert "labs-host" in picture.html
    with pytest.raises(errors.BadInput, match="at least one"):
        capture.path([])


# Netfilter


def test_flows_are_those_of_conntrack(walk):
    fetch(walk, 41006)
    shown = ET.fromstring(walk.host.run(["conntrack", "-L", "-p", "tcp", "-o", "xml"]))  # its other form
    told = {}
    for entry in shown.iter("flow"):
        ends = [tuple(f"{meta.find(f'layer3/{end}').text}:{meta.find(f'layer4/{port}').text}"
                      for end, port in (("src", "sport"), ("dst", "dport")))
                for meta in entry.findall("meta") if meta.get("direction") in ("original", "reply")]
        told[ends[0]] = (ends[1], entry.find("meta[@direction='independent']/state").text)
    ours = {one.original: (one.reply, one.state) for one in capture.flows(walk.host)}
    assert ours == told
    assert ours["192.0.2.2:41006", "192.0.2.1:8080"][0] == ("10.42.0.2:80", "192.0.2.2:41006")


NEW = ("    [NEW] tcp      6 120 SYN_SENT src=192.0.2.2 dst=192.0.2.1 sport=1 dport=2 [UNREPLIED] "
       "src=10.42.0.2 dst=192.0.2.2 sport=3 dport=1")


@pytest.mark.parametrize(("line", "expected"), [
    (NEW,
     ("NEW", "tcp", "SYN_SENT", ("192.0.2.2:1", "192.0.2.1:2"), ("10.42.0.2:3", "192.0.2.2:1"), ("UNREPLIED",))),
    ("udp      17 29 src=fd42::2 dst=fd42::1 sport=1 dport=53 src=fd42::1 dst=fd42::2 sport=53 dport=1 [ASSURED]",
     ("", "udp", "", ("[fd42::2]:1", "[fd42::1]:53"), ("[fd42::1]:53", "[fd42::2]:1"), ("ASSURED",))),
    ("icmp     1 29 src=192.0.2.2 dst=192.0.2.1 type=8 code=0 id=9 src=192.0.2.1 dst=192.0.2.2 type=0 code=0 id=9",
     ("", "icmp", "", ("192.0.2.2", "192.0.2.1"), ("192.0.2.1", "192.0.2.2"), ())),
    ("[DESTROY] tcp      6 src=192.0.2.2 dst=192.0.2.1 sport=1 dport=2 src=192.0.2.1 dst=192.0.2.2 sport=2 dport=1",
     ("DESTROY", "tcp", "", ("192.0.2.2:1", "192.0.2.1:2"), ("192.0.2.1:2", "192.0.2.2:1"), ())),
])
def test_lines_of_conntrack(line, expected):
    assert tuple(capture.flow(line)) == expected


@pytest.mark.parametrize("line", ["", "conntrack v1.4.8: 0 flow entries have been shown.", "tcp 6 1 src=1.1.1.1"])
def test_what_is_no_flow(line):
    with pytest.raises(errors.BadInput, match="conntrack"):
        capture.flow(line)


def test_events_of_a_connection(walk):
    with capture.follow(walk.host, ["conntrack", "-E", "-p", "tcp"]) as lines:
        fetch(walk, 41007)
        lines.until(lambda told: any("TIME_WAIT" in line for line in told))
    told = [capture.flow(line) for line in lines.read()]
    assert [one.state for one in told][:3] == ["SYN_SENT", "SYN_RECV", "ESTABLISHED"]
    assert [one.event for one in told][:2] == ["NEW", "UPDATE"]
    assert str(told[0]).splitlines() == ["NEW tcp SYN_SENT UNREPLIED", " original 192.0.2.2:41007 > 192.0.2.1:8080",
                                         "    reply 10.42.0.2:80 > 192.0.2.2:41007"]


def test_the_rules_a_packet_goes_through(walk):
    with capture.trace(walk.host, "tcp dport 8080") as lines:
        assert "labs-trace" in walk.host.run(["nft", "list", "tables"])
        fetch(walk, 41008)
        lines.until(lambda told: any(" forward policy" in line for line in told))
    assert "labs-trace" not in walk.host.run(["nft", "list", "tables"])
    syn = next(steps for steps in capture.steps(lines.read()) if "syn" in steps[0].text)
    seen = [(one.chain, one.header("ip daddr"), one.header("tcp dport"), one.header("ip ttl"))
            for one in syn if one.what == "packet"]
    assert seen == [("prerouting", "192.0.2.1", "8080", "64"), ("forward", "10.42.0.2", "80", "63")]
    assert [one.chain for one in syn if one.what == "rule"] == ["prerouting", "forward"]
    assert syn[0].header("iif") == "wan0"
    assert syn[0].header("no such field") == ""


def test_two_packets_with_one_trace_id():
    lines = ['trace id 1 ip a in packet: iif "w" ip id 5 tcp flags == syn tcp window 1',
             "trace id 1 ip a in rule counter (verdict accept)",
             'trace id 1 ip a in packet: iif "w" ip id 6 tcp flags == ack tcp window 1',
             "trace id 1 ip a in policy accept", "trace id 1 inet labs-trace in policy accept", "something else"]
    assert [[one.what for one in steps] for steps in capture.steps(lines)] == [["packet", "rule"], ["packet", "policy"]]


def test_a_match_that_nft_refuses_leaves_nothing(walk):
    with pytest.raises((errors.BadInput, errors.ChildFailed), match="syntax error|nft"), \
            capture.trace(walk.host, "nonsense 1"):
        pass
    assert "labs-trace" not in walk.host.run(["nft", "list", "tables"])


def test_a_command_that_ends_at_once(walk):
    with pytest.raises(errors.ChildFailed, match="status 1"), capture.follow(walk.host, ["false"]):
        pass


def test_a_command_that_ends_between_two_looks(monkeypatch):
    with process.spawn(["false"]) as child:
        process.until(lambda: process.readable(child.pidfd, 0))
        with monkeypatch.context() as patched:
            patched.setattr(process, "readable", lambda *_: False)
            assert capture._subscribed(child) is False
