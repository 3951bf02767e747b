"""The exercises of 06-security/04-lsm: a program runs behind the learner's wall, then what an attacker would do."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from labs import apparmor, landlock, machine, mounts, process, syscalls
from labs.check import Steps, exercise
from labs.errors import BadInput, LabError

ORDERS, COUNT, SECRET = "in/orders", "out/count", "keys/secret"
# Read the orders, count them, write the number: the whole work of the program.
SCRIPT = f"#!/bin/sh\nwc -l < {ORDERS} > {COUNT}\n"
PROFILE = "labs-report"


def workplace(folder: str) -> None:
    """The program `report`, what it reads, where it writes, and what is not its business."""
    for name, text in ((ORDERS, "tea\ncake\n"), (COUNT, ""), (SECRET, "key\n"), ("report", SCRIPT)):
        os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
        with open(f"{folder}/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _report(folder: str) -> str:
    """Run the program where we are: what it complained of, or ""."""
    try:
        done = subprocess.run(["/bin/sh", f"{folder}/report"], cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"/bin/sh: {error.strerror}"
    return "" if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"


def _counted(folder: str) -> bool:
    with open(f"{folder}/{COUNT}", encoding="ascii") as file:
        return file.read().strip() == "2"


def _read(path: str) -> None:
    with open(path, "rb") as file:
        file.read(1)


def _append(path: str) -> None:
    with open(path, "ab"):
        pass  # asking is enough, nothing is written


def _dial(port: int) -> None:
    with socket.socket() as caller:
        caller.connect(("127.0.0.1", port))


def _attacks(folder: str) -> dict[str, Callable[[], None]]:
    """What the program never does, by what it would be told as."""
    return {
        f"`{SECRET}` を読む": lambda: _read(f"{folder}/{SECRET}"),
        f"`{ORDERS}` を書き換える": lambda: _append(f"{folder}/{ORDERS}"),
        "`report` 自身を書き換える": lambda: _append(f"{folder}/report"),
        "`/etc/shadow` を読む": lambda: _read("/etc/shadow"),
        "`/etc/passwd` を書き換える": lambda: _append("/etc/passwd"),
    }


def _open_doors(attacks: Mapping[str, Callable[[], None]]) -> list[str]:
    return [what for what, attack in attacks.items() if landlock.outcome(attack) == "ok"]


def _behind(wall: Callable[[], object], folder: str, attacks: Mapping[str, Callable[[], None]]) -> tuple[str, list[str]]:
    """What the program complained of behind the wall, and the attacks that passed it; LabError where it cannot stand."""
    workplace(folder)
    def child() -> tuple[str, list[str]]:
        wall()
        return _report(folder), _open_doors(attacks)
    said, passed = process.call(child)
    return said, passed


@exercise
def least(answer: Mapping[str, Any], folder: str) -> Steps:
    """The arguments of landlock.restrict with which the program of workplace(folder) works, and no attack."""
    known = {"read", "write", "execute", "connect", "bind", "scoped"}
    odd = [name for name in answer if name not in known]
    yield not odd, f"`{'`、`'.join(odd)}` という引数はありません。`landlock.restrict` の引数を、辞書に書いてください。"
    texts = [name for name in ("read", "write", "execute") if isinstance(answer.get(name), str)]
    yield not texts, f"`{'`、`'.join(texts)}` は、パスの文字列ではなく、パスのリストにしてください。"
    with socket.create_server(("127.0.0.1", 0)) as server:
        attacks = _attacks(folder) | {"TCP で外へ送る": lambda: _dial(server.getsockname()[1])}
        try:
            said, passed = _behind(lambda: landlock.restrict(**answer), folder, attacks)
        except LabError as error:
            yield False, f"ルールセットができませんでした（`{error}`）。"
    yield not said, f"`report` が動きません（`{said.replace(folder + '/', '')}`）。{_missing(answer)}"
    yield _counted(folder), f"`report` は成功と言いましたが、`{COUNT}` に数が書かれていません。"
    yield not passed, _passed(passed) + _narrower(passed, answer)
    return "`report` は仕事を終え、六つの攻撃はどれも断られました。プログラムの側は一行も変えていません。"


def _missing(answer: Mapping[str, Any]) -> str:
    if not answer.get("execute"):
        return "`sh` と `wc` も、共有ライブラリも、`/usr` の下にあります。"
    return "シェルがスクリプト自身を読むことと、`out` に書くことも要ります。"


def _passed(attacks: list[str]) -> str:
    return f"`report` は動きますが、{attacks[0]}ことまでできます。" if attacks else ""


def _narrower(passed: list[str], answer: Mapping[str, Any]) -> str:
    if "TCP で外へ送る" in passed[:1]:
        return "ポートを一つも許さない `connect` を足してください。" if answer.get("connect") is None else \
            "`connect` は空のリストで足ります。"
    return f"`{'write' if '書き換える' in ''.join(passed[:1]) else 'read'}` のパスを、もっと狭くできます。"


@exercise
def rules(text: str, folder: str) -> Steps:
    """The rules of an AppArmor profile under which the program of workplace(folder) works, and no attack."""
    yield isinstance(text, str), "規則を並べた文字列を渡してください。"
    profile = f"abi <abi/4.0>,\ninclude <tunables/global>\nprofile {PROFILE} {{\n{text.strip()}\n}}\n"
    try:
        with apparmor.load(PROFILE, profile), apparmor.Log() as log:
            said, passed = _behind(lambda: apparmor.change(PROFILE), folder, _attacks(folder))
            denied = log.records(PROFILE)
    except BadInput as error:
        yield False, f"プロファイルを読み込めません（`{_renumbered(str(error))}`）。"
    first = denied[0] if denied else None
    why = f"カーネルの記録では、`{first.name.replace(folder + '/', '')}` への `{first.denied}` が断られています。" if first else ""
    yield not said, f"`report` が動きません（`{said.replace(folder + '/', '')}`）。{why}"
    yield _counted(folder), f"`report` は成功と言いましたが、`{COUNT}` に数が書かれていません。"
    yield not passed, _passed(passed) + "規則のパスか、`rw` の文字を減らしてください。"
    return f"`report` は仕事を終え、五つの攻撃は断られました。カーネルの記録には、断られた {len(denied)} 件が残っています。"


def _renumbered(message: str) -> str:
    """Line 4 of the profile is line 1 of the rules: three lines stand before them."""
    return re.sub(r"line (\d+)", lambda found: f"line {int(found[1]) - 3}", message, count=1)


@exercise
def writable(pid: int, answer: Iterable[str]) -> Steps:
    """The directories, mount points of a container, in which a file can be made."""
    yield not isinstance(answer, str), "パスを一つの文字列ではなく、リストにしてください。"
    given = {path.rstrip("/") or "/" for path in answer}
    fields = {row.target: row.options.split(",") for row in mounts.table(pid)}
    foreign = sorted(given - set(fields))
    yield not foreign, f"`{'`、`'.join(foreign)}` は、このコンテナのマウントの行にありません。`mounts.table(pid)` から選んでください。"
    found = set(process.call(_try_all, pid, sorted(fields)))
    shut = sorted(given - found)
    readonly = any("ro" in fields[path] for path in shut)
    why = "読み取り専用のマウントです。" if readonly else "マウントは `rw` ですが、ファイルシステムが新しい名前を受け付けません。"
    yield not shut, f"`{'`、`'.join(shut)}` にはファイルを作れません。{why}"
    left = len(found - given)
    yield not left, f"まだ {left} か所あります。マウントの行から、`rw` のディレクトリを全部試してください。"
    return f"{len(found)} か所とも、メモリの上にあります。コンテナを消せば消えますが、消えるまでは書けます。"


def _try_all(pid: int, targets: list[str]) -> list[str]:
    """Those of the directories in which we could make a file, seen from the process's own mounts."""
    with mounts.opened(os.pidfd_open(pid)) as pidfd:
        syscalls.setns(pidfd, syscalls.CLONE_NEWNS)
    return [path for path in targets if os.path.isdir(path) and _can_make(path)]


def _can_make(folder: str) -> bool:
    path = f"{folder.rstrip('/')}/{machine.new_name('try')}"
    with suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.unlink(path)
        return True
    return False
