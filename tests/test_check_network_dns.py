"""The exercises of 04-network/03-dns: each wrong state gives its hint, the solution passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from labs import dns, network
from labs.check import Verdict
from labs.check import network_dns as check

RECORDS = {"web": ["10.42.0.2"], "db": ["10.42.0.3"]}
WORKERS = check.WORKERS
TABLE = "add table ip labs-dns; add chain ip labs-dns out {{ type nat hook output priority -100; }}; {}"


class Lab(NamedTuple):
    web: network.Netns
    server: dns.Server


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A namespace with a server on its loopback, which answers for example.com too."""
    with contextlib.ExitStack() as undo:
        web = undo.enter_context(network.namespace("web"))
        for address in ("10.42.0.2/32", "fd42::2/128"):  # without, glibc asks for no such (AI_ADDRCONFIG)
            web.run(["ip", "addr", "add", address, "dev", "lo"])
        abroad = {"example.com": "198.51.100.7", "db.example.com": "198.51.100.8"}
        server = undo.enter_context(dns.serve(web, "127.0.0.1", RECORDS | abroad, domain="labs.internal"))
        yield Lab(web, server)
        server.update(RECORDS)


def hint(verdict: Verdict, part: str) -> None:
    assert not verdict
    assert part in verdict.message


def test_named(lab: Lab) -> None:
    with dns.serve(lab.web, "127.0.0.5", RECORDS) as server:
        for records, part in [
            (RECORDS, "まだ `worker`"), ({"worker": WORKERS}, "`web` が消えました"),
            (RECORDS | {"worker": WORKERS[:2]}, "2 個です"),
            (RECORDS | {"worker": [*WORKERS[:2], "10.42.0.9"]}, "10.42.0.9"),
            (RECORDS | {"worker": WORKERS}, "まだ別名"), (RECORDS | {"worker": WORKERS, "jobs": WORKERS}, "CNAME"),
            (RECORDS | {"worker": WORKERS, "jobs": "web"}, "`web.`"),
        ]:
            server.update(records)
            hint(check.named(server, lab.web), part)
        server.update(RECORDS | {"worker": WORKERS, "jobs": "worker"})
        assert check.named(server, lab.web)


def test_asked(lab: Lab) -> None:
    good = ["nameserver 127.0.0.1", "search labs.internal", "options ndots:1"]
    for lines, part in [
        (good[1:], "`nameserver 127.0.0.1`"), (good[:1], "`db` は `db` として"),
        ([*good[:1], "search nowhere.example"], "`db` は `db` として"),
        ([*good[:2], "options ndots:5"], "先に `example.com.labs.internal.`"),
    ]:
        hint(check.asked("\n".join(lines) + "\n", lab.server, lab.web), part)
    hint(check.asked(None, lab.server, lab.web), "まだ答えが")  # type: ignore[arg-type]
    hint(check.asked(good, lab.server, lab.web), "文字列")  # type: ignore[arg-type]
    verdict = check.asked("\n".join(good[:2]) + "\n", lab.server, lab.web)
    assert verdict and "2 個の質問" in verdict.message
    with dns.serve(lab.web, "127.0.0.5", {"web": "10.42.0.2"}, domain="labs.internal") as other:
        hint(check.asked("nameserver 127.0.0.5\n", other, lab.web), "`db` が見つかりません")
        other.update(RECORDS)
        text = "nameserver 127.0.0.5\nsearch labs.internal\n"
        hint(check.asked(text, other, lab.web), "`example.com` が見つかりません")


def test_redirected(lab: Lab) -> None:
    rule = "add rule ip labs-dns out {} {} dport 53 dnat to 127.0.0.11:5353; "
    only = "ip daddr 127.0.0.11"
    # A server on 127.0.0.1 as the lab's would hide what is refused there.
    with contextlib.ExitStack() as undo:
        web = undo.enter_context(network.namespace("other"))
        undo.enter_context(dns.serve(web, "127.0.0.11", RECORDS, port=5353))
        hint(check.redirected(web), "UDP で尋ねても")
        for rules, part in [
            (rule.format(only, "tcp"), "UDP で尋ねても"), (rule.format(only, "udp"), "TCP の規則も"),
            (rule.format("", "udp") + rule.format("", "tcp"), "`127.0.0.1` の 53 番まで"),
        ]:
            web.run(["nft", "-f", "-"], stdin=TABLE.format(rules))
            hint(check.redirected(web), part)
            web.run(["nft", "delete", "table", "ip", "labs-dns"])
        web.run(["nft", "-f", "-"], stdin=TABLE.format(rule.format(only, "udp") + rule.format(only, "tcp")))
        assert check.redirected(web)
