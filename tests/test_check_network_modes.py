"""The exercises of 04-network/04-modes: each wrong state gives its hint, and the kernel agrees with the right one."""

from contextlib import ExitStack

import pytest

from labs import network, process
from labs.check import UNANSWERED
from labs.check import network_modes as check
from labs.container import Container
from labs.network import Netns

SLEEP = ["sleep", "1000"]


THERE, BACK = 'iifname "br0" oifname "br1" drop', 'iifname "br1" oifname "br0" drop'


class TestPod:
    @pytest.fixture(scope="class")
    def boxes(self):
        """A pause container on a bridge and one beside it that is not; who joins the first, and who the second."""
        with ExitStack() as stack:
            host = stack.enter_context(network.namespace("host"))
            bridge = stack.enter_context(network.network(host))
            pause, bare = (stack.enter_context(Container(SLEEP)) for _ in range(2))
            stack.enter_context(bridge.attach(Netns.of_pid(pause.pid, "labs-pod")))
            made = {"pause": pause, "bare": bare}
            for name, where in (("web", pause), ("helper", pause), ("bare web", bare)):
                made[name] = stack.enter_context(Container(SLEEP, network=f"/proc/{where.pid}/ns/net"))
            made["hosted"] = stack.enter_context(Container(SLEEP, network=True))
            yield {name: box.pid for name, box in made.items()}

    def test_passes(self, boxes):
        assert check.pod(boxes["pause"], boxes["web"], boxes["helper"])

    def test_unanswered(self, boxes):
        assert check.pod(boxes["pause"], boxes["web"], ...).message == UNANSWERED

    @pytest.mark.parametrize(
        ("given", "hint"),
        [
            (("web", "web", "helper"), "pause が web か helper と同じプロセスです"),
            (("helper", "web", "helper"), "pause が web か helper と同じプロセスです"),
            (("hosted", "web", "helper"), "ラボの機械の netns"),
            (("pause", "bare", "helper"), "web は、pause と別の netns"),
            (("pause", "web", "bare"), "helper は、pause と別の netns"),
            (("bare", "bare web", "bare web"), "`lo` しかありません"),
        ],
    )
    def test_hints(self, boxes, given, hint):
        verdict = check.pod(*(boxes[name] for name in given))
        assert not verdict
        assert hint in verdict.message


class TestFence:
    @pytest.fixture(scope="class")
    def site(self):
        with check.two_networks() as made:
            yield made

    def load(self, site, rules, forward=1):
        chain = "\n".join(("type filter hook forward priority 0;", *rules))
        text = f"flush ruleset\ntable ip labs-test {{ chain forward {{\n{chain}\n}}\n}}"
        site.host.run(["nft", "-f", "-"], stdin=text)
        site.host.sysctl("net.ipv4.ip_forward", forward)

    @pytest.mark.parametrize(
        ("rules", "forward", "hint"),
        [
            ((), 1, "まだ互いに届きます"),
            ((THERE,), 1, "db から web への片道"),
            ((BACK,), 1, "web から db への片道"),
            ((), 0, "`ip_forward` を止めると"),
            (('iifname "br0" drop', BACK), 1, "web が外へ"),
            (('iifname "br1" drop', THERE), 1, "db が外へ"),
        ],
    )
    def test_hints(self, site, rules, forward, hint):
        self.load(site, rules, forward)
        verdict = check.fence(site)
        assert not verdict
        assert hint in verdict.message

    @pytest.mark.parametrize("rules", [
        (THERE, BACK),
        ('iifname { "br0", "br1" } oifname { "br0", "br1" } drop',),
    ])
    def test_passes_whichever_way_it_is_written(self, site, rules):
        self.load(site, rules)
        assert check.fence(site)


class TestWidest:
    @pytest.fixture(scope="class")
    def site(self):
        with check.tunnel() as made:
            yield made

    def set_mtu(self, site, web, db):
        for ns, mtu in ((site.web, web), (site.db, db)):
            ns.run(["ip", "link", "set", "eth0", "mtu", str(mtu)])

    @pytest.mark.parametrize(
        ("web", "db", "hint"),
        [
            (1500, 1500, "web の MTU は 1500 です。線を通れる大きさを超えています。"),
            (1400, 1350, "web の MTU は 1400 です。線の MTU そのものです。"),
            (1350, 1351, "db の MTU は 1351 です。"),
            (1300, 1350, "あと 50 バイト大きくできます"),
            (1350, 1280, "あと 70 バイト大きくできます"),
        ],
    )
    def test_hints(self, site, web, db, hint):
        self.set_mtu(site, web, db)
        verdict = check.widest(site)
        assert not verdict
        assert hint in verdict.message

    def test_a_broken_tunnel(self, site):
        self.set_mtu(site, 1350, 1350)
        site.host.run(["ip", "link", "set", "vx42", "down"])
        verdict = check.widest(site)
        site.host.run(["ip", "link", "set", "vx42", "up"])
        process.until(lambda: check._answers(site.web, "10.42.0.3"), what="the bridge to hear that its port is up")
        assert "トンネルを変えていませんか" in verdict.message

    def test_passes_and_one_byte_more_is_lost(self, site):
        self.set_mtu(site, 1350, 1350)
        assert check.widest(site)
        self.set_mtu(site, 1500, 1500)
        lost = site.web.run(["ping", "-c", "1", "-W", "1", "-M", "do", "-s", "1323", "10.42.0.3"], check=False)
        assert "100% packet loss" in lost
