"""The exercises of 04-network/03-dns."""

from __future__ import annotations

import os
import re

from labs import container, machine
from labs.check import Steps, exercise
from labs.container import Bind
from labs.dns import RESOLV_CONF, Query, Server, dig
from labs.netns import Netns

WORKERS = ["10.42.0.21", "10.42.0.22", "10.42.0.23"]


@exercise
def named(server: Server, inside: Netns) -> Steps:
    """A service of three addresses and an alias, beside the names that were there before."""
    told = dig(inside, server.address, "worker")
    yield told.rcode != "NXDOMAIN", "まだ `worker` という名前がありません。`server.update(...)` に渡す辞書に足します。"
    yield dig(inside, server.address, "web").rcode == "NOERROR", "`web` が消えました。`update` は名前をすべて置き換えるので、前からある名前も一緒に渡します。"
    found = sorted(told.of("A"))
    yield len(found) == len(WORKERS), f"`worker` のアドレスは {len(found)} 個です。三つをリストにして渡します。"
    yield found == WORKERS, f"`worker` のアドレスが `{' '.join(found)}` になっています。"
    alias = dig(inside, server.address, "jobs")
    yield alias.rcode == "NOERROR", "まだ別名 `jobs` がありません。"
    yield bool(alias.of("CNAME")), "`jobs` は答えますが、別名（CNAME）ではありません。アドレスの代わりに、指す先の**名前**を値にします。"
    yield alias.of("CNAME") == ["worker."], f"`jobs` が指しているのは `{alias.of('CNAME')[0]}` です。"
    return "別名の答えには、CNAME と一緒に三つのアドレスも入っています。`worker` を増やしても、`jobs` を書き直す必要はありません。"


@exercise
def asked(text: str, server: Server, inside: Netns) -> Steps:
    """A resolv.conf with which a short name gets its suffix, and a full one costs no question too many."""
    yield isinstance(text, str), "`resolv.conf` の中身を、文字列で渡してください。"
    yield re.search(rf"^nameserver +{re.escape(server.address)}$", text, re.MULTILINE) is not None, \
        f"`nameserver {server.address}` の行がありません。"
    canonical, _ = _getent(text, "db", server, inside)
    yield canonical != "", "`db` が見つかりません。綴りを確かめてください。"
    yield canonical == "db.labs.internal", f"`db` は `{canonical}` として見つかりました。`search` の行で `labs.internal` を補わせます。"
    canonical, queries = _getent(text, "example.com", server, inside)
    tried = list(dict.fromkeys(query.name for query in queries))
    yield tried[0] == "example.com.", \
        f"`example.com` を引くのに、先に `{tried[0]}` が尋ねられました。点がいくつあれば、そのまま尋ねてよいのでしょうか。"
    yield canonical == "example.com", "`example.com` が見つかりません。`nameserver` の行を確かめてください。"
    return f"`db` には `labs.internal` が補われ、`example.com` は補われずに {len(queries)} 個の質問で済みました。"


def _getent(text: str, name: str, server: Server, inside: Netns) -> tuple[str, list[Query]]:
    """What glibc in a container makes of a name: the name it found, and what it asked for that."""
    os.makedirs(machine.STATE, exist_ok=True)
    path, since = f"{machine.STATE}/{machine.new_name('answer')}", len(server.queries())
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    try:
        done = container.run(["getent", "ahosts", name], rootfs="debian", network=inside.path,
                             mounts=[Bind(path, RESOLV_CONF)])
    finally:
        os.unlink(path)
    first = done.stdout.split("\n", 1)[0].split()
    return (first[2] if len(first) > 2 else ""), server.queries(since)


@exercise
def redirected(inside: Netns, address: str = "127.0.0.11") -> Steps:
    """Port 53 of that address leads to a server that listens elsewhere, by UDP and TCP, and no other port 53 does."""
    yield dig(inside, address, "web").rcode != "", \
        f"`{address}` の 53 番に UDP で尋ねても、答えがありません。`output` フックの `nat` のチェインで、宛先を書き換えます。"
    yield dig(inside, address, "+tcp", "web").rcode != "", \
        "UDP は届きましたが、TCP の 53 番には誰もいません。入りきらない答えを取りに来る人のために、TCP の規則も要ります。"
    yield dig(inside, "127.0.0.1", "web").rcode == "", \
        f"`127.0.0.1` の 53 番まで奪っています。コンテナが自分の DNS サーバーを動かせるように、`ip daddr {address}` に限ります。"
    return "53 番を塞がずに、53 番への質問に答えられました。Docker がコンテナの namespace の中に書いている規則と、同じ働きです。"
