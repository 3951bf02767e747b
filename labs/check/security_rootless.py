"""The exercises of 06-security/03-rootless."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from labs import idmap, machine, namespaces, process, syscalls, userns
from labs.check import Steps, exercise
from labs.errors import BadInput
from labs.namespaces import Map
from labs.userns import LEARNER

SUBUID = "/etc/subuid"
KEPT = 1000
LAST = 65536
WWW = 33

BROKEN = """\
learner:100000
backup:165000:65536
"""
BOTH, WANTED, LOWEST = ("learner", "backup"), 65536, 100_000


def _rows(given: object) -> tuple[list[Map], str]:
    """The rows, and what is wrong with their form or with a rule of the kernel's."""
    try:
        rows = [(int(a), int(b), int(c)) for a, b, c in given]  # type: ignore[attr-defined]
        return userns.check(rows), ""
    except BadInput as error:
        return [], f"カーネルは EINVAL で断ります（`{error.value}`: {error.rule}）。"
    except (TypeError, ValueError):
        return [], "行は `(中の先頭, 外の先頭, 個数)` という三つの整数の組です。"


def newuidmap(user: str, rows: Sequence[Map], pid: int) -> str:
    """What newuidmap(1) says when that user asks for these rows; "" when they are written."""
    info = pwd.getpwnam(user)
    words = ["setpriv", f"--reuid={info.pw_uid}", f"--regid={info.pw_gid}", "--clear-groups", "newuidmap", str(pid)]
    done = subprocess.run([*words, *(str(number) for row in rows for number in row)],
                          capture_output=True, text=True, check=False)
    return done.stderr.strip().replace(str(pid), "PID")


def _written(user: str, rows: Sequence[Map]) -> str:
    """The same for a new process of that user."""
    info = pwd.getpwnam(user)
    with userns.held(info.pw_uid, info.pw_gid) as pid:
        return newuidmap(user, rows, pid)


@exercise
def keeps(given: Sequence[Map]) -> Steps:
    """The map of `podman run --userns=keep-id`: learner keeps his number, and 0 to LAST all have one."""
    rows, wrong = _rows(given)
    yield not wrong, wrong
    kept = idmap.translate(rows, KEPT)
    yield kept == LEARNER, f"中の {KEPT} 番は、外では {kept} 番です。`learner` 自身の {LEARNER} 番にします。"
    gap = next((n for n in range(LAST + 1) if idmap.translate(rows, n) == idmap.OVERFLOW_ID), None)
    yield gap is None, f"中の {gap} 番が、どの行にもありません。0 番から {LAST} 番までを、すき間なく並べます。"
    said = _written("learner", rows)
    yield not said, f"`newuidmap` が断りました（`{said}`）。`learner` が使えるのは、自分の番号と `/etc/subuid` の範囲だけです。"
    outside = idmap.translate(rows, 0)
    return f"`newuidmap` が書きました。中の root は外の {outside} 番、中の {KEPT} 番が `learner` です。"


# What root of the user namespace shall come to, and why it does not, where it does not.
WISH = {
    "mount tmpfs": ("ok", "マウントの表の持ち主が、まだ最初の user namespace です。"),
    "sethostname": ("ok", "ホスト名を持つ namespace の持ち主が、まだ最初の user namespace です。"),
    "raw socket": ("EPERM", "ネットワークまで自分のものになっています。ホストのものを使い続けるには、分けません。"),
    "signal own uid's process": ("ok", "ホストのプロセスが見えなくなっています。PID まで分けています。"),
}


@exercise
def reaches(answer: Mapping[str, Any]) -> Steps:
    """Namespaces and a map by which root reaches just what WISH says, and one id besides its own: WWW."""
    missing = [name for name in ("kinds", "uid_map") if name not in answer]
    yield not missing, f"`{' '.join(missing)}` の答えがありません。"
    kinds = list(answer["kinds"])
    odd = [kind for kind in kinds if kind not in userns.OWN]
    yield not odd, f"`{' '.join(odd)}` は選べません。選べるのは `{' '.join(userns.OWN)}` です。"
    rows, wrong = _rows(answer["uid_map"])
    yield not wrong, wrong
    yield idmap.translate(rows, 0) == LEARNER, f"中の 0 番を `learner`（{LEARNER} 番）にしてください。"
    trials = {trial.what: trial.prepare for trial in userns.TRIALS}
    with userns.held() as pid:
        said = newuidmap("learner", rows, pid)
        yield not said, f"`newuidmap` が断りました（`{said}`）。"
        machine.write_file(f"/proc/{pid}/gid_map", f"0 {LEARNER} 1")
        for what, (wanted, why) in WISH.items():
            found = userns.attempt(trials[what], pid, kinds)
            yield found == wanted, f"`{what}` が `{found}` になりました。{why}"
        www = userns.attempt(lambda: lambda: os.setresuid(WWW, WWW, WWW), pid)
    yield www == "ok", f"中の root は {WWW} 番になれません（`{www}`）。`uid_map` に行がないからです。"
    more = sum(count for _, _, count in rows)
    yield more == 2, f"番号が {more} 個あります。要るのは 0 番と {WWW} 番の二つだけです。"
    spare = [kind for kind in kinds if kind not in ("mnt", "uts")]
    yield not spare, f"願いに要らない namespace があります（`{' '.join(spare)}`）。"
    return "届くものは `mnt` と `uts` の持ち主だから届き、届かないものはホストが持ったままです。"


@exercise
def lends(text: str) -> Steps:
    """The text of /etc/subuid lends WANTED ids to each of BOTH, none of them to two, and none that a user has."""
    with _instead(text) as path:
        for user in BOTH:
            try:
                ranges = userns.lent(user, path)
            except BadInput as error:
                yield False, f"`{error.value}` は読めない行です。`名前:先頭:個数` の形にします。"
                return ""
            yield bool(ranges), f"`{user}` の行がありません。"
            count = sum(one.size for one in ranges)
            yield count == WANTED, f"`{user}` に貸す番号は {count} 個です。{WANTED} 個にします。"
            low, last = min(one.first for one in ranges), max(one.first + one.size - 1 for one in ranges)
            yield low >= LOWEST, f"`{user}` に {low} 番から貸しています。{LOWEST} 番より前には、ホストの利用者がいるかもしれません。"
            yield last <= userns.LAST_ID, f"`{user}` に {last} 番まで貸しています。番号は {userns.LAST_ID} 番までしかありません。"
        clash = _clash(*(userns.lent(user, path) for user in BOTH))
        shared = f"{clash} 番が二人に貸されています。一方のコンテナから、もう一方のファイルに手が届きます。"
        yield clash is None, shared
        for user in BOTH:
            said = process.call(_as_subuid, path, user)
            yield not said, f"`{user}` の `newuidmap` が断りました（`{said}`）。"
    return "二人とも、この表で `newuidmap` に番号を書かせました。重なりはありません。"


def _clash(ours: Sequence[userns.Range], theirs: Sequence[userns.Range]) -> int | None:
    """The first id that two users have both been lent."""
    both = [max(a.first, b.first) for a in ours for b in theirs
            if max(a.first, b.first) < min(a.first + a.size, b.first + b.size)]
    return min(both, default=None)


@contextmanager
def _instead(text: str) -> Iterator[str]:
    """A file with that text, which everybody may read."""
    path = f"{machine.STATE}/{machine.new_name('subuid')}"
    os.makedirs(machine.STATE, exist_ok=True)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        yield path
    finally:
        os.unlink(path)


def _as_subuid(path: str, user: str) -> str:
    """In a child with a mount table of its own, in which that file is SUBUID: what newuidmap says to all that is lent."""
    syscalls.unshare(namespaces.flags(["mnt"]))
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount(path, SUBUID, None, syscalls.MS_BIND)
    return _written(user, userns.rootless_map(user))
