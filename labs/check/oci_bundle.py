"""The exercises of 02-oci-and-runtime/01-bundle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from labs import mounts, process
from labs.check import Steps, exercise
from labs.errors import Timeout
from labs.oci_schema import errors

NULL = os.makedev(1, 3)  # null(4)
GONE = "そのコンテナのプロセスはもうありません。`create` のセルから、やり直してください。"


@exercise
def legal(config: dict[str, Any]) -> Steps:
    """A config.json that the schema accepts, and that says what it was meant to say."""
    wrong = errors(config)
    yield not wrong, f"スキーマが断りました。`{wrong[0] if wrong else ''}`"
    written = config.get("root", {}).get("readonly") is True
    yield written, "スキーマには合格しましたが、`root.readonly` が `true` になっていません。知らない項目は黙って無視されます。大文字と小文字まで、仕様と見比べてください。"
    kinds = [namespace["type"] for namespace in config.get("linux", {}).get("namespaces", [])]
    yield "mount" in kinds, "mount namespace がありません。このままでは、呼び出した人の mount namespace にマウントが残ります。"
    targets = [mount["destination"] for mount in config.get("mounts", []) if mount.get("type") == "proc"]
    yield "/proc" in targets, "`/proc` がマウントされません。型が `proc` のマウントを `/proc` に置いてください。"
    return "形はスキーマが、つづりと組み合わせの意味は書いた人が確かめました。"


@exercise
def by_hand(pid: int, fifo: Path) -> Steps:
    """A container that somebody else than `runc start` has started."""
    yield Path(f"/proc/{pid}").exists(), GONE
    try:
        process.until(lambda: not process.status(pid).name.startswith("runc"), 1)
    except Timeout:
        yield fifo.exists(), "`runc init` が待っているのに、fifo の名前を消しました。もう誰も読み側を開けません。`delete` して、やり直してください。"
        yield False, "まだ `runc init` が fifo の前で待っています。反対側、つまり読み側を開いてください。"
    yield not fifo.exists(), "プログラムは走り出しましたが、`exec.fifo` が残っています。runc はこれがあるかぎり `created` と答えます。"
    return "fifo を読んで消すこと、それが `runc start` のしていることのすべてです。"


@exercise
def guarded(said: str) -> Steps:
    """A container in which /proc/version is hidden and /proc/irq cannot be written; said is what `runc state` says."""
    yield said.startswith("{"), "runc がこの設定を断り、コンテナはありません。二つの項目の値は、実在するパスを並べた一覧です。"
    pid = json.loads(said)["pid"]
    yield Path(f"/proc/{pid}").exists(), GONE
    hidden = os.stat(f"/proc/{pid}/root/proc/version").st_rdev == NULL
    over = {mount.target: mount.options.split(",") for mount in mounts.table(pid)}
    yield "/proc" not in over or over["/proc"][0] != "ro", "`/proc` の全体を読み取り専用にしました。`/proc/irq` だけにしてください。"
    yield hidden or "/proc/version" not in over, "`/proc/version` は読み取り専用になりましたが、まだ読めます。隠すには別の項目を使います。"
    yield hidden, "`/proc/version` がまだ読めます。隠すパスの一覧に入れてください。"
    yield "/proc/irq" in over, "`/proc/version` は隠れました。`/proc/irq` には、まだ何も重なっていません。"
    kept = bool(os.listdir(f"/proc/{pid}/root/proc/irq"))
    yield kept, "`/proc/irq` は空になりました。隠すのではなく、読めるまま書けなくしてください。"
    yield over["/proc/irq"][0] == "ro", "`/proc/irq` に重ねたマウントが、まだ書けます。"
    return "`/proc/version` には `/dev/null` が、`/proc/irq` には読み取り専用の自分自身が重なっています。"
