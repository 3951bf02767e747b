"""The exercises of 02-oci-and-runtime/02-labs-runtime: containers made from a changed config.json."""

from __future__ import annotations

from pathlib import Path

from labs import mounts, process
from labs.check import Steps, exercise

CAP_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def _process_one(pid: int) -> Steps:
    yield Path(f"/proc/{pid}").exists(), "コンテナがもう終わっています。`boot` からやり直してください。"
    ids = process.status(pid).nspid
    yield len(ids) > 1 and ids[-1] == 1, "コンテナの PID 1 ではありません。`pid_of()` の値が答えです。"
    return ""


@exercise
def scratch(pid: int) -> Steps:
    """A container with a tmpfs of 1 MiB on /tmp from which nothing can be executed."""
    yield from _process_one(pid)
    found = [row for row in mounts.table(pid) if row.target.strip("/") == "tmp"]
    yield bool(found), "`/tmp` にマウントがありません。`mounts` に足した項目の `destination` を確かめてください。"
    yield found[-1].fstype == "tmpfs", f"`/tmp` は {found[-1].fstype} です。`type` を tmpfs にしてください。"
    yield "noexec" in found[-1].options.split(","), "tmpfs はありますが、実行を止める属性が付いていません。`options` に一語足します。"
    size = next((word for word in found[-1].super_options.split(",") if word.startswith("size=")), "")
    yield bool(size), "大きさの上限がありません（メモリーの半分まで入ります）。`options` に `size=…` を足してください。"
    yield size == "size=1024k", f"カーネルは {size} と答えています。1 MiB は 1024k です。"
    return "`noexec` はマウントの属性に、`size` はファイルシステムの設定になり、mountinfo の別々の欄に現れました。"


@exercise
def confined(pid: int) -> Steps:
    """A container without any capability, behind a seccomp filter."""
    yield from _process_one(pid)
    fields = process.status_fields(pid)
    left = [name for name in CAP_SETS if int(fields[name], 16)]
    bounding = "CapBnd" in left and len(left) == 1
    yield not bounding, "`CapBnd` だけが残っています。setuid のファイルから取り戻せるので、`bounding` も空にしてください。"
    yield not left, f"`{' '.join(left)}` が空ではありません。`capabilities` のほかの集合も見てください。"
    yield fields["Seccomp"] == "2", "capability は空です。`Seccomp` がまだ 0 なので、`linux.seccomp` を書いてください。"
    return "五つの集合がすべて 0 で、`Seccomp` は 2（フィルター）です。root の力もシステムコールの口も、ともに絞られました。"
