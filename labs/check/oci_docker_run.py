"""The exercises of 02-oci-and-runtime/03-docker-run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from labs import namespaces, process
from labs.check import Steps, exercise

# What Docker masks in every container (moby, oci/defaults.go), as far as it is a path.
MASKED = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
KINDS = ("mnt", "uts", "ipc", "net", "pid")


@exercise
def absent(paths: Iterable[str]) -> Steps:
    """The paths that Docker asks to mask and this kernel does not have."""
    given = set(paths)
    strange = sorted(given - set(MASKED))
    yield not strange, f"`{strange[:1]}` は maskedPaths にありません。`mount` の二番目の引数から、引用符を除いたものを集めます。"
    there = sorted(path for path in given if os.path.exists(path))
    yield not there, f"`{there[:1]}` はこのカーネルにあります。`ENOENT` のものだけを残してください。"
    missing = sorted(path for path in MASKED if path not in given and not os.path.exists(path))
    yield not missing, f"あと {len(missing)} 個あります。`runc create` の子孫すべての、失敗した `mount` を見てください。"
    return "隠すべきものがないとき、runc は `ENOENT` を見て先へ進みます。失敗した呼び出しも仕様の一部です。"


@exercise
def entered(pid: int, target: int) -> Steps:
    """A process that this notebook's own commands put into a container: namespaces and cgroup."""
    yield pid != target, "それはコンテナの最初のプロセスです。新しく送り込んだプロセスの番号を渡します。"
    yield Path(f"/proc/{pid}").exists(), "そのプロセスはもうありません。`sleep 600` のように、しばらく動くものを送り込みます。"
    same = namespaces.same(pid, target)
    outside = [kind for kind in KINDS if not same[kind]]
    hint = "`nsenter` は fork します。中に入るのは `nsenter` 自身ではなく、その子です。" if outside == ["pid"] else ""
    yield not outside, f"まだ外にいます（違う namespace: `{' '.join(outside)}`）。{hint}"
    shim = process.status(target).ppid
    yield process.status(pid).ppid != shim, "親が shim です。`docker exec` を使わずに入ってください。"
    groups = [Path(f"/proc/{one}/cgroup").read_text() for one in (pid, target)]
    yield groups[0] == groups[1], "namespace は同じですが、cgroup はホストのままです。メモリーの上限が効きません。"
    return "`docker exec` の骨組みは、`setns` と cgroup への引っ越しです。権限と seccomp は、まだ付いていません。"
