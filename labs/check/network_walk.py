"""The exercises of 04-network/05-packet-walk."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from labs import capture, cni, firewall
from labs.capture import Packet
from labs.check import Steps, exercise
from labs.errors import ChildFailed, LabError, Timeout
from labs.netns import Netns

PATIENCE = 2.0  # seconds: the first SYN is sent again after one
MASQUERADE = """table ip labs-check {
  chain postrouting {
    type nat hook postrouting priority srcnat
    ip saddr 10.42.0.0/24 oifname "wan0" masquerade
  }
}
"""


def spoil(web: Netns) -> None:
    """The fault of the first exercise; who looks here first misses the fun of finding it."""
    web.run(["ip", "route", "replace", "default", "via", "10.42.0.254"])
    web.run(["ip", "neigh", "flush", "dev", "eth0"])


def _knock(address: str, port: int, source: int = 0) -> int:
    """connect(2) once; 0, or the errno."""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        caller.settimeout(PATIENCE)
        caller.bind(("", source))
        return caller.connect_ex((address, port))


def _heard(client: Netns, host: Netns, web: Netns, port: int) -> list[Packet]:
    """What three namespaces hear of one attempt of the client to connect to the host."""
    with capture.listen(client, host, web, keep=lambda packet: packet.protocol == "TCP") as listening:
        client.call(_knock, "192.0.2.1", port)
        with suppress(Timeout):
            listening.until(lambda packets: any(_answer(one) and one.namespace == client.name for one in packets), 1.0)
        return listening.packets


def _answer(packet: Packet) -> bool:
    return packet.flags in ("SYN,ACK", "RST,ACK") and packet.way == "in"


@exercise
def repaired(client: Netns, host: Netns, web: Netns) -> Steps:
    """The client can connect to port 8080 of the host again, and it is the container that answers."""
    packets = _heard(client, host, web, 8080)
    syn = [one for one in packets if one.flags == "SYN"]
    back = [one for one in packets if one.flags == "SYN,ACK"]
    yield bool(syn), f"`{client.name}` から SYN が一つも出ていません。client の `eth0` と経路を確かめてください。"
    refused = any(one.flags == "RST,ACK" and one.namespace == host.name and one.way == "out" for one in packets)
    yield syn[-1].namespace == web.name or not refused, "host が自分で RST を返しました。DNAT の規則がなくなっています。"
    yield syn[-1].namespace == web.name, f"SYN は `{syn[-1].place}` を最後に消えています。その先へ進めない理由を、規則と経路の順に探してください。"
    hint = f"SYN は `{syn[-1].place}` まで届いているのに、SYN,ACK が出てきません。`keep` で TCP だけに絞らずに聞くと、`web` が返事の代わりに何を尋ねているかが聞こえます。"
    yield bool(back), hint
    yield back[-1].namespace == client.name, f"SYN,ACK は `{back[-1].place}` を最後に消えています。"
    yield back[-1].source == "192.0.2.1:8080", f"返事の送り元が `{back[-1].source}` です。これでは client は自分の接続の返事だとわかりません。"
    return "SYN が五か所、SYN,ACK が五か所で聞こえました。規則は一つも壊れておらず、消えていたのは帰り道でした。"


def _ends(answer: object) -> bool:
    """Whether it is a pair of texts ADDRESS:PORT."""
    pair = isinstance(answer, Sequence) and not isinstance(answer, str) and len(answer) == 2
    return pair and all(isinstance(end, str) and end.rpartition(":")[2].isdigit() for end in answer)  # type: ignore[attr-defined]


@exercise
def recorded(client: Netns, host: Netns, web: Netns, answer: tuple[str, str]) -> Steps:
    """What conntrack expects of an answer when web:50000 has called client:9000 and its address was masqueraded."""
    yield _ends(answer), '`("192.0.2.9:9000", "192.0.2.9:50000")` のように、「アドレス:ポート」の文字列を二つ並べてください。'
    track = ["conntrack", "-E", "-e", "NEW", "-p", "tcp", "--orig-port-src", "50000"]
    with firewall.ruleset(host, MASQUERADE), capture.follow(host, track) as lines:
        web.call(_knock, "192.0.2.2", 9000, 50000)
        flow = capture.flow(lines.until(len)[0])
    given, expected = tuple(answer), flow.reply
    yield given != flow.original, "それは行きの組（original）です。返事の組を答えてください。"
    yield given != flow.original[::-1], "original を裏返しただけです。書き換えがなければそうなりますが、client に見えている送り元は `10.42.0.2` でしょうか。"
    yield given != expected[::-1], "二つの端は合っています。返事の送り元を先に書いてください。"
    yield given[0] == expected[0], f"返事の送り元が違います。返事をするのは、web が話しかけた相手（`{flow.original[1]}`）です。"
    yield given[1].rpartition(":")[0] == expected[1].rpartition(":")[0], "返事の宛先が違います。client が返事を送る先は、client に見えている送り元です。"
    yield given[1] == expected[1], "アドレスは合っています。ほかの接続が使っていなければ、masquerade は送り元のポートを変えません。"
    return f"カーネルの控えもそのとおりでした。返事が `{expected[1]}` に届くと、宛先は `{flow.original[0]}` に直されます。"


def _problem(fn: Callable[[], object]) -> str:
    """What a plugin or the caller says against it, or ""."""
    try:
        fn()
    except (ChildFailed, LabError) as error:
        return str(error)
    except (KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@exercise
def published(client: Netns, host: Netns, target: Netns, config: dict[str, Any]) -> Steps:
    """A CNI configuration list with which port 8083 of the host leads to port 80 of the target."""
    shaped = isinstance(config, dict) and isinstance(config.get("plugins"), list) and bool(config["plugins"])
    yield shaped, "`cniVersion`、`name`、`plugins`（プラグインの設定のリスト）を持つ辞書を書いてください。"
    kinds = [plugin.get("type") for plugin in config["plugins"]]
    yield "portmap" in kinds, f"いまのリストは `{' '.join(map(str, kinds))}` です。ポートを公開するプラグインがありません。"
    yield kinds[0] != "portmap", "`portmap` が先頭にあります。公開する相手のアドレスは、前のプラグインの結果からしかわかりません。"
    asked = [plugin for plugin in config["plugins"] if plugin.get("capabilities", {}).get("portMappings")]
    yield bool(asked), "`portmap` が `capabilities` で手を挙げていないので、呼び手は公開するポートを渡せません。"
    ports = {"portMappings": [{"hostPort": 8083, "containerPort": 80, "protocol": "tcp"}]}
    caller, who = cni.Caller(host, config, ports), cni.Attachment("labs-check", target.path)
    seen: list[str] = []
    said = _problem(lambda: seen.append(_visit(client, caller, who, target)))
    yield not said, f"`ADD` が断られました。プラグインの言葉は `{said}` です。"
    yield seen == [f"{target.name} sees 192.0.2.2"], "`ADD` は通りましたが、client から 8083 番へ届きません。host の bridge にゲートウェイのアドレスがあるか（`isGateway`）、コンテナに経路があるかを確かめてください。"
    return "外から来た接続がコンテナに届きました。呼び手が渡したのはポートの番号だけで、アドレスは前のプラグインの結果から来ています。"


def _visit(client: Netns, caller: cni.Caller, who: cni.Attachment, target: Netns) -> str:
    """ADD, ask port 8083 once, DEL; what the server said."""
    caller.add(who)
    try:
        with firewall.answering(target, 80):
            return client.run(["curl", "-s", "-m", "3", "http://192.0.2.1:8083/"], check=False).strip()
    finally:
        caller.delete(who)
