"""The exercises of chapter 01."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from labs import cgroup, machine, mounts, namespaces, process, syscalls
from labs.check import Steps, exercise
from labs.errors import ChildFailed, Timeout

CAP_SYS_CHROOT = 18  # <linux/capability.h>


def _soon(condition: Callable[[], bool]) -> bool:
    """Whether it is so now, or within two seconds: a signal or a new shell takes a moment."""
    try:
        return process.until(condition, 2, "the answer")
    except (Timeout, FileNotFoundError, ProcessLookupError):
        return False


def _in_mask(pid: int, field: str, number: int) -> bool:
    """Whether a signal is in a mask of /proc/PID/status; bit 0 is signal 1."""
    return bool(int(process.status_fields(pid)[field], 16) >> number - 1 & 1)


def _a_zombie(pid: int) -> Steps:
    yield Path(f"/proc/{pid}").exists(), "そのプロセスはもうありません。`wait` を呼ぶと表から消えてしまいます。"
    yield process.status(pid).ppid == os.getpid(), "このノートブックの子ではありません。`fork` した子を渡します。"
    ended = _soon(lambda: process.status(pid).state == "Z")
    yield process.status(pid).state != "T", "止まっているだけです。`SIGCONT` で動かし、終わらせてください。"
    yield ended, "まだ動いています。子を終わらせ、`wait` は呼びません。"
    return "終わったのに `wait` されていない子は、終了状態を渡すためにプロセス表に残ります。"


@exercise
def zombie(pid: int) -> Steps:
    """A child of this notebook that has ended and was not waited for."""
    return (yield from _a_zombie(pid))


@exercise
def terminated_zombie(pid: int) -> Steps:
    """A zombie of this notebook that SIGTERM ended: a shell would say 143."""
    yield from _a_zombie(pid)
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # looks at the status, and leaves it there
    assert end is not None
    by_signal = end.si_code != os.CLD_EXITED
    yield by_signal, f"ゾンビですが、`exit({end.si_status})` で自分から終わりました。シグナルで終わらせてください。"
    name = signal.Signals(end.si_status).name
    yield name == "SIGTERM", f"{name} で終わったので {128 + end.si_status} です。143 になるシグナルを送ってください。"
    return "下の 7 ビットに 15、上の 8 ビットに 0。シェルが 143 と呼ぶ終了状態が、受け取られるのを待っています。"


@exercise
def guest(pid: int, host: int) -> Steps:
    """A child of this notebook in the UTS namespace of process `host`, and in no other namespace of it."""
    yield Path(f"/proc/{host}").exists(), "コンテナがもう終わっています。コンテナを動かすセルから、やり直してください。"
    alive = Path(f"/proc/{pid}").exists() and process.status(pid).state != "Z"
    yield alive, "子はもう終わっています。関数の最後の `signal.pause()` で待たせてください。"
    own, asked = not namespaces.same("self", host)["uts"], lambda: namespaces.same(pid, host)["uts"]
    yield own, "ノートブック自身が入りました。カーネルを再起動し、`setns` は子の中で呼んでください。"
    yield _soon(asked), "子の UTS namespace は、まだノートブックと同じです。子の中で `setns` を呼んでください。"
    yield process.status(pid).ppid == os.getpid(), "コンテナの側のプロセスです。`fork` した子の `.pid` が答えです。"
    shared, before = namespaces.same(pid, host), namespaces.same("self", host)
    extra = [kind for kind in namespaces.KINDS if shared[kind] and not before[kind] and kind != "uts"]
    yield not extra, f"`{' '.join(extra)}` にも入っています。`setns` に渡すフラグを一つにしてください。"
    return "UTS namespace だけがコンテナのもので、残りの namespace はノートブックのままです。"


@exercise
def listens(pid: int) -> Steps:
    """Process 1 of a container that has a handler of its own for SIGTERM."""
    yield Path(f"/proc/{pid}").exists(), "コンテナがもう終わっています。`trap` のあと、終わらずに待つ処理が要ります。"
    ids = process.status(pid).nspid
    yield len(ids) > 1 and ids[-1] == 1, "コンテナの PID 1 ではありません。`Container` の `.pid` が答えです。"
    yield process.cmdline(pid) != process.cmdline(os.getpid()), "PID 1 が `labs` の init です。`init=True` は外します。"
    caught = _soon(lambda: _in_mask(pid, "SigCgt", signal.SIGTERM))
    ignored = _in_mask(pid, "SigIgn", signal.SIGTERM)
    yield not ignored, "SIGTERM を無視する設定です。`trap` の一つ目の引数に、動かすコマンドを書いてください。"
    yield caught, "`SigCgt` の SIGTERM のビットが 0 です。このままでは、TERM は届く前に捨てられます。"
    return "`SigCgt` の SIGTERM のビットが 1 です。PID 1 でも、ハンドラのあるシグナルは届きます。"


class _World(NamedTuple):
    """What the kernel says of a child that has made the calls of an answer."""

    failed: str
    root: str = ""
    cwd: str = ""
    folders: tuple[str, ...] = ()
    same_mounts: bool = True
    mounts: tuple[mounts.Mount, ...] = ()
    may_chroot: bool = True


def _world_after(calls: Sequence[Callable[[], object]]) -> _World:
    """Make the calls in a child, let it stand still, and look at it from outside."""
    def answer() -> None:
        for call in calls:
            call()
        signal.raise_signal(signal.SIGSTOP)
    with process.fork(answer) as child:
        process.until(lambda: process.status(child.pid).state in "TZ", what="the end of the calls")
        if process.status(child.pid).state == "Z":
            return _World(_what_stopped(child))
        root, cwd = (os.readlink(f"/proc/{child.pid}/{link}") for link in ("root", "cwd"))
        allowed = int(process.status_fields(child.pid)["CapEff"], 16) >> CAP_SYS_CHROOT & 1
        return _World("", root, cwd, tuple(_open_folders(child.pid)), namespaces.same("self", child.pid)["mnt"],
                      tuple(mounts.table(child.pid)), bool(allowed))


def _what_stopped(child: process.Child) -> str:
    try:
        child.wait()
    except ChildFailed as error:
        return f"{error.step}: {error.detail}"
    return "exit"


def _open_folders(pid: int) -> Iterator[str]:
    """The directories that a process has open, as seen from outside."""
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            if entry.is_dir():
                yield os.readlink(entry.path)


STOPPED = "子は途中で止まりました（`{}`）。呼び出しの順番と、欠けている条件を見直してください。"


@exercise
def sealed(calls: Sequence[Callable[[], object]]) -> Steps:
    """Calls that chroot into the busybox root and leave no way out: cwd, open directories, CAP_SYS_CHROOT."""
    world, jail = _world_after(calls), machine.ROOTFS["busybox"]
    def inside(path: str) -> bool:
        return path == jail or path.startswith(jail + "/")
    yield not world.failed, STOPPED.format(world.failed)
    yield world.root != "/", "ルートがまだホストの `/` です。`os.chroot` を呼んでください。"
    yield inside(world.root), "ルートが busybox の rootfs の外にあります。`BUSYBOX` に `chroot` してください。"
    yield inside(world.cwd), "作業ディレクトリが檻の外に残っています。`..` で外へ歩いて出られます。"
    fds = "檻の外のディレクトリを開いた fd が残っています。`fchdir` で出られるので、閉じてください。"
    yield all(map(inside, world.folders)), fds
    again = "CAP_SYS_CHROOT が残っています。二度目の `chroot` で出られるので、一般ユーザーになってください。"
    yield not world.may_chroot, again
    return "作業ディレクトリ、fd、二度目の `chroot`。三つの抜け道がすべて塞がりました。"


@exercise
def new_root(calls: Sequence[Callable[[], object]]) -> Steps:
    """Calls after which a child's mounts are a new root and a new /proc, and nothing of the host's."""
    world, host = _world_after(calls), mounts.root(mounts.table())
    yield not world.failed, STOPPED.format(world.failed)
    yield not world.same_mounts, "まだホストの mount namespace にいます。`pivot_root` の前に `unshare` が要ります。"
    top = mounts.root(world.mounts)
    yield top is not None, "ルートがマウントではありません。`chroot` ではなく `pivot_root` で替えてください。"
    yield not _same_tree(top, host), "ルートがまだホストのままです。`pivot_root` を呼んでください。"
    old = [mount.target for mount in world.mounts if _same_tree(mount, host)]
    yield not old, f"古いルートが `{''.join(old[:1])}` に残っています。`umount2` と `MNT_DETACH` で外してください。"
    new = [mount.fstype for mount in world.mounts if mount.target == "/proc"]
    yield new == ["proc"], "`/proc` が空です。新しく `proc` をマウントしてください。"
    return "見えるマウントから、ホストのものがすべて消えました。"


def _same_tree(a: mounts.Mount | None, b: mounts.Mount | None) -> bool:
    return a is not None and b is not None and (a.dev, a.root) == (b.dev, b.root)


@exercise
def device_rules(rules: Sequence[str]) -> Steps:
    """Rules that allow null for reading and writing and fuse for reading, and nothing else, not even mknod."""
    with cgroup.create() as group:
        group.devices(rules)
        null, zero, fuse, made = process.call(_devices_in, group)
    yield "r" in null and "w" in null, "`/dev/null`（1:3）が読み書きできません。なくてはならないノードです。"
    yield not zero, "`/dev/zero`（1:5）まで開けます。番号を書いて、許すものだけを並べてください。"
    yield "r" in fuse, "`/dev/fuse`（10:229）が読めません。規則を一つ足してください。"
    yield "w" not in fuse, "`/dev/fuse` に書けてしまいます。文字は `r` だけにします。"
    yield not made, "`mknod` が通ってしまいます。規則から `m` を除いてください。"
    return "ノードがあっても root でも、並べた番号と使い方のほかは通りません。"


def _devices_in(group: cgroup.Cgroup) -> tuple[str, str, str, bool]:
    """How a process in the group may open null, zero and fuse ("r", "w", "rw"), and whether it may make a node."""
    group.add(os.getpid())
    null, zero, fuse = (_ways(f"/dev/{name}") for name in ("null", "zero", "fuse"))
    return null, zero, fuse, _makes_node()


def _ways(path: str) -> str:
    found = ""
    for letter, flags in (("r", os.O_RDONLY), ("w", os.O_WRONLY)):
        with suppress(PermissionError):
            os.close(os.open(path, flags))
            found += letter
    return found


def _makes_node() -> bool:
    """Whether mknod(2) of a null device is allowed; the node is removed at once."""
    os.makedirs(machine.STATE, exist_ok=True)
    path = f"{machine.STATE}/{machine.new_name('node')}"
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        return False
    os.unlink(path)
    return True


@exercise
def leaf_layout(path: str) -> Steps:
    """A group without processes that offers memory to its leaves front and back; a process is alive in front."""
    group = cgroup.Cgroup(path)
    leaves = {child.name: child for child in group.children()}
    missing = [name for name in ("front", "back") if name not in leaves]
    yield not missing, f"`{' '.join(missing)}` がありません。`{group.name}` の下に作ってください。"
    yield not group.procs(), f"`{group.name}` 自身にプロセスがいます。葉に移さないと、`+memory` は EBUSY です。"
    offered = group.read("cgroup.subtree_control").split()
    yield "memory" in offered, f"葉にまだ `memory.max` がありません。`{group.name}` から memory を配ってください。"
    yield not leaves["back"].procs(), "プロセスが `back` にいます。`front` の `cgroup.procs` に PID を書いてください。"
    yield bool(leaves["front"].procs()), "`front` に誰もいません。プロセスを生かしたまま移してください。"
    return "枝は配るだけ、プロセスは葉だけ。no internal processes の規則どおりの木です。"


@exercise
def dies_together(path: str) -> Steps:
    """A group in which an OOM kill took every process, because memory.oom.group was 1 before."""
    group = cgroup.Cgroup(path)
    events, together = group.keyed("memory.events"), group.read("memory.oom.group") == "1"
    yield group.read("memory.max") != "max", "`memory.max` がまだ `max` です。壁がなければ、誰も倒れません。"
    swap = "スワップへ逃げています。`memory.swap.max` を 0 にしてください。"
    yield events["oom_kill"] > 0 or int(group.read("memory.swap.current")) == 0, swap
    yield events["oom_kill"] > 0, "まだ OOM kill が起きていません。グループの中で、メモリを使い切ってください。"
    yield together, "太ったプロセスだけが倒れました。`memory.oom.group` が 0 のままです。"
    yield events["oom_group_kill"] > 0, "`memory.oom.group` は 1 ですが、書いたのは倒れたあとです。初めからやり直してください。"
    yield not group.procs(), "一度は全員倒れましたが、いまは別のプロセスがいます。"
    return "`oom_group_kill` が数えられ、中には誰も残っていません。"


@exercise
def same_as_docker(path: str) -> Steps:
    """The limits of `docker run --memory 96m --cpus 1.5 --pids-limit 50`, its swap limit too."""
    group, wanted = cgroup.Cgroup(path), 96 << 20
    memory, swap, pids = (group.read(f"{name}.max") for name in ("memory", "memory.swap", "pids"))
    quota, period = group.read("cpu.max").split()
    yield memory != "max", "`memory.max` がまだ `max` です。"
    yield memory == str(wanted), f"`memory.max` が {memory} です。Docker の `m` は 1000×1000 ではなく 1024×1024 です。"
    yield swap != str(2 * wanted), "`memory.swap.max` は合計ではなく、スワップだけの量です。メモリの分を引いてください。"
    yield swap == str(wanted), f"`memory.swap.max` が {swap} です。省いたときの Docker は、メモリと同じ量にします。"
    yield quota != "max", "`cpu.max` の持ち時間がまだ `max` です。"
    share = int(quota) / int(period)
    yield share == 1.5, f"`cpu.max` は {share:g} CPU 分です。持ち時間 ÷ 周期が 1.5 になるようにしてください。"
    yield pids == "50", f"`pids.max` が {pids} です。"
    return "四つのファイルが、Docker の書く値とそろいました。"


def _settled(pid: int) -> None:
    """Wait until unshare(1) or nsenter(1) has done its part and become the command it was asked to run."""
    with suppress(Timeout):
        process.until(lambda: process.status(pid).name not in ("unshare", "nsenter"), 5.0)


def _new_kinds(pid: int) -> list[str]:
    """The kinds of namespace in which the process is not with this notebook."""
    return [kind for kind, shared in namespaces.same("self", pid).items() if not shared]


def _hostname_in(path: str) -> str:
    syscalls.setns(os.open(path, os.O_RDONLY), syscalls.CLONE_NEWUTS)
    return os.uname().nodename


@exercise
def renamed(pid: int) -> Steps:
    """A process in a UTS namespace of its own, named kyoto, and in no other new namespace."""
    _settled(pid)
    new = _new_kinds(pid)
    yield "uts" in new, "ホスト名をノートブックと共有しています。`unshare --uts` で新しい uts namespace を作ります。"
    more = " ".join(kind for kind in new if kind != "uts")
    yield not more, f"uts のほかに、`{more}` も新しくなっています。要らない選択肢を外してください。"
    name = process.call(_hostname_in, f"/proc/{pid}/ns/uts")
    yield name == "kyoto", "分かれました。次は、その中で `hostname kyoto` を実行してから `sleep` に exec します。"
    return "ホスト名だけを分けたプロセスです。ほかの七つは、ノートブックと同じ namespace のままです。"


@exercise
def outlives(path: str) -> Steps:
    """A UTS namespace named nara, with a mount that keeps it and without a process."""
    yield Path(path).exists(), f"`{path}` がありません。`touch` で、マウントする先のファイルを先に作ります。"
    held = [mount.root for mount in mounts.table() if mount.target == path and mount.fstype == "nsfs"]
    yield bool(held), f"`{path}` は普通のファイルです。`unshare --uts=FILE` か `mount --bind` で namespace を載せます。"
    kind = held[-1].partition(":")[0]
    yield kind == "uts", f"載っているのは `{kind}` の namespace です。uts の namespace を載せてください。"
    living = [pid for pid in process.pids() if _uts_of(pid) == held[-1]]
    yield os.getpid() not in living, "ノートブック自身の namespace です。新しいものを載せてください。"
    yield not living, "まだ住人がいます。プロセスを終わらせてから、もう一度確かめてください。"
    yield process.call(_hostname_in, path) == "nara", "無人になりました。ホスト名が `nara` になるように作り直してください。"
    return "住人がいなくても、bind mount が namespace を生かしています。`ip netns add` も同じ仕組みです。"


def _uts_of(pid: int) -> str:
    """The link of a process's UTS namespace, or nothing where it has just ended."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/uts")
    return ""


@exercise
def receives(pid: int) -> Steps:
    """A mount namespace whose mounts are all slaves: what the host mounts comes in, and nothing goes out."""
    _settled(pid)
    yield "mnt" in _new_kinds(pid), "マウントの表をノートブックと共有しています。`unshare --mount` で分けます。"
    tags = {mount.target: mount.propagation for mount in mounts.table(pid)}
    leaking = sorted(target for target, tag in tags.items() if "shared:" in tag)
    yield not leaking, f"`{leaking and leaking[0]}` が shared です。中のマウントがホストへ漏れます。"
    slave = any("master:" in tag for tag in tags.values())
    yield slave, "すべて private なので、ホストのマウントが届きません。`--propagation` を調べてください。"
    return "すべて slave です。ホストのマウントは届き、中のマウントは外へ出ません。"


@exercise
def mapped(pid: int) -> Steps:
    """A user namespace whose ids 0 to 999 are 200000 to 200999 outside."""
    _settled(pid)
    yield "user" in _new_kinds(pid), "user namespace をノートブックと共有しています。`unshare --user` で分けます。"
    maps, wanted = namespaces.maps(pid), [(0, 200_000, 1000)]
    for name, rows in (("uid_map", maps.uid), ("gid_map", maps.gid)):
        shown = ", ".join(" ".join(map(str, row)) for row in rows)
        yield bool(rows), f"`{name}` がまだ空です。`中の先頭 外の先頭 個数` の一行を書きます。"
        yield rows == wanted, f"`{name}` は `{shown}` です。一度しか書けないので、プロセスから作り直してください。"
    return "中の 33 番は、外では 200033 番です。中の root（0 番）も、外では何の権限もない 200000 番です。"


@exercise
def shares_network(pid: int) -> Steps:
    """A container with at most 24 MiB that keeps the host's network, as `docker run --network host` makes one."""
    yield Path(f"/proc/{pid}").exists(), "そのプロセスはもうありません。判定のあいだ動き続けるコマンドにしてください。"
    kept = namespaces.same(os.getpid(), pid)
    yield not kept["pid"], "PID の namespace がホストのままです。`unshare` で作ったなら、渡すのは `unshare` ではなくその子です。"
    rest = [kind for kind in ("uts", "mnt", "ipc") if kept[kind]]
    yield not rest, f"`{'` と `'.join(rest)}` の namespace がホストのままです。新しくするのは `net` のほかの部品です。"
    yield not os.path.samestat(os.stat(f"/proc/{pid}/root"), os.stat("/")), "ルートがホストのままです。`pivot_root` が要ります。"
    yield kept["net"], "ネットワークの namespace まで新しくなっています。`net` だけは作らないでください。"
    limit = cgroup.of(pid).read("memory.max")
    yield limit != "max", "メモリの上限がありません。cgroup の `memory.max` は `max` のままです。"
    yield limit == str(24 << 20), f"上限は {limit} バイトです。24 MiB は {24 << 20} バイトです。"
    return "部品は一つずつ選べます。`net` を作らないことが、`--network host` の中身です。"


# The calls that make a container: what must come before what, and what goes wrong otherwise.
ASSEMBLY = (
    ("write memory.max", "clone3", "プロセスが先に生まれると、上限のない時間ができます。"),
    ("clone3", "mount overlay", "新しいマウント namespace より先に overlay を重ねると、ホストの表に残ります。"),
    ("mount overlay", "pivot_root", "`pivot_root` の新しいルートは、マウントポイントでなければなりません。"),
    ("clone3", "mount proc", "`/proc` は、マウントしたプロセスの PID namespace を映します。"),
    ("pivot_root", "umount2", "`pivot_root` より前の `/` は、まだ使っている唯一のルートです。"),
    ("mount proc", "execve", "`execve` のあとは、組み立てるコードが残っていません。"),
    ("umount2", "execve", "古いルートが見えるまま `execve` すると、中のコマンドがホストのファイルに届きます。"),
)


@exercise
def assembly_order(calls: Sequence[str]) -> Steps:
    """The calls of ASSEMBLY in an order that makes a container."""
    names = {name for before, after, _ in ASSEMBLY for name in (before, after)}
    yield sorted(calls) == sorted(names), f"{len(names)} 個の名前を、一度ずつ並べてください。"
    for before, after, why in ASSEMBLY:
        yield calls.index(before) < calls.index(after), f"`{after}` が `{before}` より先になっています。{why}"
    return "どの二つを入れ替えると何が起きるかまで言えれば、この順番は覚えるものではなく、導けるものになります。"
