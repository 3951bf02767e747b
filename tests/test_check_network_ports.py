"""The exercises of 04-network/02-port-mapping: each wrong answer gives its hint, the solution passes."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from labs import firewall
from labs.check import Verdict
from labs.check import network_ports as check
from tests.test_firewall import HOST_ADDRESS, Lan, lan

# What iptables-save says on a machine where Docker has just started, cut to the table filter.
DOCKER = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A DOCKER-USER -j RETURN
COMMIT
"""


def hint(verdict: Verdict, part: str) -> None:
    assert not verdict
    assert part in verdict.message


@pytest.fixture(scope="module")
def net() -> Iterator[Lan]:
    with lan() as made, ExitStack() as stack:
        for ns in (made.web, made.db):
            stack.enter_context(firewall.answering(ns, 80))
        made.host.sysctl("net.ipv4.ip_forward", 1)
        made.out.run(["ip", "route", "add", "10.42.0.0/24", "via", HOST_ADDRESS])
        yield made
        assert made.host.run(["nft", "list", "ruleset"]) == ""


def rules(arrive: str, output: str = "", leave: str = "") -> str:
    return f"""table ip labs-mine {{
      chain arrive {{ type nat hook prerouting priority dstnat; {arrive}; }}
      chain output {{ type nat hook output priority dstnat; {output}; }}
      chain leave {{ type nat hook postrouting priority srcnat; {leave}; }}
    }}"""


def test_published(net: Lan) -> None:
    local = "fib daddr type local tcp dport 5432 counter dnat to 10.42.0.3:80"
    for answer, part in [
        (..., "まだ答えが"), (80, "文字列"), (rules("tcp port 5432"), "nft line 2"),
        (rules("tcp dport 5432 counter dnat to 10.42.0.2:80"), "web でした"),
        (rules("", local), "どの規則のカウンタも増えません"),
        (rules("tcp dport 5432 counter dnat to 10.42.0.3:81"), "返事がありません"),
        (rules(local, local, "counter masquerade"), "`10.42.0.1` です"),
        (rules("meta l4proto tcp counter dnat to 10.42.0.3:80"), "5433 番でも"),
        (rules(local), "output を通ります"),
        (rules(local, "tcp dport 5432 counter dnat to 10.42.0.3:80"), "fib daddr type local"),
    ]:
        hint(check.published(net.host, net.out, answer), part)  # type: ignore[arg-type]
    assert check.published(net.host, net.out, rules(local, local))


def test_filtered(net: Lan) -> None:
    for answer, part in [
        (..., "まだ答えが"), (80, "文字列"), ("tcp port 80", "nft line 10"),
        ("tcp dport 8080", "0 のまま"), ("counter drop; ct status dnat", "`drop` は要りません"),
        ("tcp dport 80", "10.42.0.3:80"),
    ]:
        hint(check.filtered(net.host, net.out, answer), part)  # type: ignore[arg-type]
    for answer in ("ip daddr 10.42.0.2 tcp dport 80", "ct status dnat"):
        assert check.filtered(net.host, net.out, answer)


def test_docker_user(net: Lan) -> None:
    answers = "-I DOCKER-USER -i br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    arrive = "-I DOCKER-USER -o br0 -m conntrack --ctstate DNAT -j ACCEPT"
    for commands, part in [
        (..., "まだ答えが"), (arrive, "リストです"), (["-I DOCKER-USER -o"], "iptables が断りました"),
        (["-P FORWARD ACCEPT"], "policy を ACCEPT"),
        ([arrive.replace("DOCKER-USER", "FORWARD"), answers], "`FORWARD` にあります"),
        ([answers], "まだ一つも"), ([arrive], "返事が FORWARD の policy"),
        (["-I DOCKER-USER -o br0 -j ACCEPT", answers], "10.42.0.3:80"),
    ]:
        hint(check.docker_user(net.host, net.out, DOCKER, commands), part)  # type: ignore[arg-type]
    assert check.docker_user(net.host, net.out, DOCKER, [arrive, answers])
