"""The exercises of 02-oci-and-runtime/04-docker-vs-podman."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from labs import namespaces, process
from labs.check import Steps, exercise

SEALS = {
    "F_SEAL_WRITE": fcntl.F_SEAL_WRITE,
    "F_SEAL_GROW": fcntl.F_SEAL_GROW,
    "F_SEAL_SHRINK": fcntl.F_SEAL_SHRINK,
    "F_SEAL_SEAL": fcntl.F_SEAL_SEAL,
}


@exercise
def ordinary_user(pid: int) -> Steps:
    """A process of a rootless container that is user 1000 in there, and neither root nor learner on the host."""
    yield Path(f"/proc/{pid}").exists(), "そのプロセスはもうありません。待ち続けるコマンドをコンテナで動かしてください。"
    shared, owner = namespaces.same("self", pid)["user"], process.status(pid).uid[0]
    yield not shared, "user namespace がホストと同じです。`learner` の Podman で動かしてください。"
    yield owner != 1000, "コンテナの中では root です。ホストで見ると `learner` 本人のままです。`--user` を使ってください。"
    inside = [first + owner - outside for first, outside, count in _map(pid) if 0 <= owner - outside < count]
    yield inside == [1000], f"中の番号は {inside[0] if inside else '不明'} です。1000 番になるようにしてください。"
    return "中の 1000 番が、ホストでは誰のログイン名でもない番号になっています。写したのは `uid_map` の二行目です。"


def _map(pid: int) -> list[tuple[int, int, int]]:
    """The rows of /proc/PID/uid_map: first id inside, first id outside, how many (user_namespaces(7))."""
    lines = Path(f"/proc/{pid}/uid_map").read_text().splitlines()
    return [(int(inside), int(outside), int(count)) for inside, outside, count in map(str.split, lines)]


@exercise
def sealed_copy(fd: int, path: str) -> Steps:
    """An open file with the same bytes as path, in memory, that nobody can ever change."""
    where = os.readlink(f"/proc/self/fd/{fd}")
    yield where.startswith("/memfd:"), "メモリー上のファイルではありません。`os.memfd_create` で作ってください。"
    seals = _seals(fd)
    yield seals >= 0, "封印のできない memfd です。`os.MFD_ALLOW_SEALING` を付けて作ってください。"
    same = Path(f"/proc/self/fd/{fd}").read_bytes() == Path(path).read_bytes()
    yield same, "中身が元のファイルと違います。封印する前に、全部を書き写してください。"
    missing = [name for name, bit in SEALS.items() if not seals & bit]
    yield not missing, f"まだ `{' '.join(missing)}` がありません。`F_ADD_SEALS` に渡す値に足してください。"
    return "root でも、もう一バイトも変えられません。封印を解く操作は、カーネルに存在しません。"


def _seals(fd: int) -> int:
    """The seals of a memfd, -1 for one that takes none at all (F_GET_SEALS in fcntl(2))."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1
    return -1 if seals == fcntl.F_SEAL_SEAL else seals
