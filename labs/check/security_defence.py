"""The exercises of 06-security/05-defence-in-depth: answers are tried against real containers, and a real link."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from labs.check import Steps, exercise
from labs.errors import BadInput, ChildFailed
from labs.security import LAYERS, OPEN, Matrix, Stage

TOGETHER = ["leaked fd", "ptrace", "setuid program"]
FLAGS_AGAINST = ["ARP spoof", "docker.sock", "setuid program", "fork bomb"]


def fewest(found: Matrix, attacks: Sequence[str]) -> int:
    """The least number of layers that stop all of these attacks, as measured one by one."""
    stops = [set(found.stoppers(attack)) for attack in attacks]
    return next(size for size in range(len(LAYERS) + 1)
                if any(all(set(some) & each for each in stops) for some in combinations(LAYERS, size)))


@exercise
def smallest(stage: Stage, found: Matrix, layers: Sequence[str]) -> Steps:
    """As few layers as possible that stop the attacks of TOGETHER and let the app work."""
    yield not isinstance(layers, str) and all(isinstance(one, str) for one in layers), "層の名前を並べたリストを渡してください。"
    unknown = [layer for layer in layers if layer not in LAYERS]
    yield not unknown, f"`{'`、`'.join(unknown)}` という層はありません。名前は `security.LAYERS` にあります。"
    results = stage.measure(layers, [*TOGETHER, "app"])
    through = [name for name in TOGETHER if results[name] == OPEN]
    yield not through, f"そのコンテナを動かしたところ、`{'`、`'.join(through)}` がまだ通ります。その行で止めている列を、表から探してください。"
    yield results["app"] == OPEN, f"攻撃は止まりましたが、アプリも `{results['app']}` で動かなくなりました。"
    least = fewest(found, TOGETHER)
    yield len(set(layers)) <= least, f"すべて止まりましたが、{len(set(layers))} 層も使っています。二つ以上の行を一度に止める列を探せば、{least} 層で足ります。"
    return f"{least} 層で {len(TOGETHER)} つとも止まり、アプリも動きました。これより少ない組はありません。"


@exercise
def hardened(stage: Stage, flags: Sequence[str]) -> Steps:
    """Options of `docker run` that stop the attacks of FLAGS_AGAINST and let the app work."""
    yield not isinstance(flags, str) and all(isinstance(one, str) and one.startswith("-") for one in flags), \
        'オプションを一つずつの文字列にして、`["--read-only"]` のようなリストで渡してください。'
    yield "--privileged" not in flags, "`--privileged` は、層をまとめて外すオプションです。"
    try:
        results = stage.engine(*flags, tried=[*FLAGS_AGAINST, "app"])
    except ChildFailed as error:
        yield False, f"コンテナが動きませんでした（`{error.detail}`）。オプションの綴りと値を確かめてください。"
    hints = {"ARP spoof": "CAP_NET_RAW を持つのは誰か", "docker.sock": "ソケットの持ち主は root です。中のユーザーは誰か",
             "setuid program": "`exec` で権限が増えるのを止める旗は何か", "fork bomb": "cgroup のどの上限か"}
    for name in FLAGS_AGAINST:
        yield results[name] != OPEN, f"`{name}` が通りました。{hints[name]}を考えてください。"
    yield results["app"] == OPEN, f"攻撃はすべて止まりましたが、アプリも `{results['app']}` で動かなくなりました。"
    return f"{len(FLAGS_AGAINST)} つの攻撃がすべて止まり、アプリは動いています。"


Reader = Callable[[str], str]


def _read(reader: Reader, folder: str) -> str:
    """What the reader returns, "" where it refuses by an error of the kernel's or of labs'."""
    try:
        return str(reader(folder))
    except (OSError, BadInput):
        return ""


@exercise
def careful_reader(reader: Reader) -> Steps:
    """reader(folder) returns the text of folder/logs/report, and never what a link leads to outside the folder."""
    yield callable(reader), "`reader(folder)` という関数を渡してください。"
    place = tempfile.mkdtemp(prefix="labs-reader-", dir="/var/tmp")
    folder, outside = f"{place}/volume", f"{place}/outside"
    try:
        os.makedirs(f"{folder}/logs")
        os.mkdir(outside)
        report = Path(f"{folder}/logs/report")
        Path(f"{outside}/report").write_text("secret", encoding="utf-8")
        report.write_text("all is well", encoding="utf-8")
        yield _read(reader, folder) == "all is well", "ふつうの報告が読めません。`folder` の下の `logs/report` の文字列を返してください。"
        report.unlink()
        report.symlink_to(f"{outside}/report")
        yield "secret" not in _read(reader, folder), "`report` を外へのリンクに替えられ、外の秘密を読みました。"
        report.unlink()
        os.rmdir(f"{folder}/logs")
        os.symlink(outside, f"{folder}/logs")
        yield "secret" not in _read(reader, folder), "今度は途中の `logs` がリンクでした。最後の一段だけを確かめても足りません。"
    finally:
        shutil.rmtree(place)
    return "最後の一段でも途中でも、リンクで外へ連れ出されませんでした。層では止まらない攻撃が、読み方で止まりました。"
