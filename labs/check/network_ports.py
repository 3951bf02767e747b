"""The exercises of 04-network/02-port-mapping: rules are put in for the length of the check, and packets are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from labs import firewall
from labs.check import Steps, exercise
from labs.errors import BadInput, ChildFailed
from labs.netns import Netns

HOST, DB = "192.0.2.1", "10.42.0.3"
SILENT = "no answer"
FILTER = """
table ip labs-exercise {{
  chain prerouting {{
    type nat hook prerouting priority dstnat
    tcp dport 8080 counter dnat to 10.42.0.2:80
  }}
  chain forward {{
    type filter hook forward priority filter
    ct state established,related counter accept
    {accept} counter accept
    iifname "eth0" counter drop
  }}
}}
"""
BEHIND_DOCKER = """
table ip labs-exercise {
  chain prerouting {
    type nat hook prerouting priority dstnat
    fib daddr type local tcp dport 8080 counter dnat to 10.42.0.2:80
  }
}
"""


def ask(ns: Netns, where: str) -> str:
    """What a web server says to curl, or SILENT."""
    return ns.run(["curl", "-sm0.8", where], check=False).strip() or SILENT


@exercise
def published(host: Netns, out: Netns, rules: str) -> Steps:
    """Rules of nft that publish port 5432 of the host as port 80 of labs-db."""
    yield isinstance(rules, str), "`rules` には、nft の規則を文字列で入れてください。"
    with ExitStack() as stack:
        refused = _refusal(lambda: stack.enter_context(firewall.ruleset(host, rules)))
        yield not refused, f"nft が断りました。`{refused}`"
        yield from _published(host, out)
    return "外からも host からも db に届き、db には外の人の本当のアドレスが見えています。これが `-p 5432:80` の正体です。"


def _published(host: Netns, out: Netns) -> Iterator[tuple[bool, str]]:
    with firewall.counting(host) as hits:
        found = ask(out, f"{HOST}:5432")
    counted = any(hit.after > hit.before for hit in hits)
    yield "labs-web" not in found, f"届いた先は web でした。db のアドレスは `{DB}` です。"
    yield counted or found != SILENT, (
        "外から頼んでも、どの規則のカウンタも増えません。外から来たパケットが宛先を替えられるのは、prerouting の nat チェインです。"
        "規則に `counter` も付けておきましょう。")
    yield found != SILENT, f"規則は数えましたが、返事がありません。書き換えた先は `{DB}:80` ですか。"
    yield "sees 192.0.2.2" in found, f"db に見えたのは `{found.split()[-1]}` です。masquerade をかけると、外の人の本当のアドレスがわからなくなります。"
    yield ask(out, f"{HOST}:5433") == SILENT, "5433 番でも db に届きます。`tcp dport` で 5432 番だけを選んでください。"
    yield "labs-db" in ask(host, f"{HOST}:5432"), "外からは届きますが、host 自身からは届きません。host で生まれたパケットは prerouting を通らず、output を通ります。"
    with firewall.answering(out, 5432):
        elsewhere = ask(host, "192.0.2.2:5432")
    yield "labs-out" in elsewhere, "host から外の 5432 番へ行くパケットまで曲げています。`fib daddr type local` で、自分あてだけを選んでください。"


@exercise
def filtered(host: Netns, out: Netns, accept: str) -> Steps:
    """A condition for the forward chain that lets the published port through, and nothing else."""
    yield isinstance(accept, str), "`accept` には、規則の条件を文字列で入れてください。"
    with ExitStack() as stack:
        refused = _refusal(lambda: stack.enter_context(firewall.ruleset(host, FILTER.format(accept=accept))))
        yield not refused, f"nft が断りました。`{refused}`"
        yield from _filtered(host, out)
    return "forward に来たときには、宛先はもう書き換わっています。だから書くのは 8080 ではなく、行き先の言葉です。"


def _filtered(host: Netns, out: Netns) -> Iterator[tuple[bool, str]]:
    with firewall.counting(host, "labs-exercise") as hits:
        found = ask(out, f"{HOST}:8080")
    arrived, _, *yours, rest = (hit.after > hit.before for hit in hits)
    yield not rest or any(yours), (
        f"DNAT の規則は{'数えた' if arrived else '数えなかった'}のに、あなたの規則は 0 のままで、最後の drop が数えました。"
        "forward は DNAT のあとにあります。そのときの宛先ポートは何番ですか。")
    yield "labs-web" in found, "パケットは最後の drop まで行かずに消えました。書くのは条件だけで、`drop` は要りません。"
    yield ask(out, f"{DB}:80") == SILENT, f"公開していない `{DB}:80` にも、外から直接届きます。宛先のアドレスか、`ct status dnat` で絞ってください。"


@exercise
def docker_user(host: Netns, out: Netns, saved: str, commands: Sequence[str]) -> Steps:
    """Commands of iptables that let a published port through Docker's FORWARD, without opening the rest."""
    yield not isinstance(commands, str), "`commands` は、`iptables` に渡す引数の文字列を並べたリストです。"
    with firewall.own_tables(host):
        host.run(["iptables-restore"], stdin=saved)
        firewall.nft(host, BEHIND_DOCKER)
        refused = _refusal(lambda: [host.run(["iptables", *one.split()]) for one in commands])
        yield not refused, f"iptables が断りました。`{refused}`"
        yield from _docker_user(host, out)
    return "Docker の規則には触らず、Docker が空けておいてくれた場所に、通してよいものだけを書けました。"


def _docker_user(host: Netns, out: Netns) -> Iterator[tuple[bool, str]]:
    policy, *_ = host.run(["iptables", "-S", "FORWARD"]).splitlines()
    yield policy == "-P FORWARD DROP", "policy を ACCEPT に変えると、どの bridge へも、公開していないポートへも素通しです。policy は DROP のままにします。"
    added = [rule.chain for rule in firewall.rules(host, "filter") if '"br0"' in rule.text]
    yield set(added) <= {"DOCKER-USER"}, f"規則が `{next((c for c in added if c != 'DOCKER-USER'), '')}` にあります。Docker が起動し直すと並び順が変わったり消えたりします。`DOCKER-USER` に入れてください。"
    with firewall.counting(host, "filter") as hits:
        found = ask(out, f"{HOST}:8080")
    rose = [hit for hit in hits if hit.chain == "DOCKER-USER" and '"br0"' in hit.text and hit.after > hit.before]
    yield bool(rose) or found != SILENT, "`DOCKER-USER` に足した規則は、まだ一つもパケットを数えていません。外から来るパケットは br0 から出ていきます（`-o br0`）。"
    yield found != SILENT, "行きは数えましたが、返事が FORWARD の policy に捨てられています。返事は br0 から入ってきます（`-i br0`）。"
    yield ask(out, f"{DB}:80") == SILENT, f"公開していない `{DB}:80` にも、外から届きます。新しい接続は `--ctstate DNAT` のものだけにしましょう。"


def _refusal(act: Callable[[], object]) -> str:
    """What nft or iptables said against it, or ""."""
    try:
        act()
    except (BadInput, ChildFailed) as error:
        return str(error)
    return ""
