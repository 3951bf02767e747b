"""The exercises of 05-storage/01-bind-mount."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from labs import machine, mounts, namespaces, process, syscalls
from labs.check import Steps, exercise
from labs.errors import ChildFailed, KernelError, LabError
from labs.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC, MS_SHARED

Calls = Sequence[Callable[[], object]]


def _writable(folder: str) -> bool:
    """Whether a file can be made in a directory; it is removed again."""
    path = f"{folder}/.labs-check-{os.urandom(3).hex()}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return False
    os.unlink(path)
    return True


def _is_mount_point(path: str) -> bool:
    """os.path.ismount does not see a bind mount within one filesystem: it compares device numbers."""
    return mounts.holding(path).target == os.path.realpath(path)


@exercise
def readonly(source: str, target: str) -> Steps:
    """On target is source with what is mounted below it, all of it read-only there, and source can still be written."""
    below = [os.path.relpath(row.target, os.path.realpath(source)) for row in mounts.table()
             if row.target.startswith(os.path.realpath(source) + "/")]
    yield _is_mount_point(target), f"`{target}` はマウントポイントではありません。まず bind mount します。"
    same = os.path.samefile(source, target)
    yield same, f"`{target}` に見えているのは `{source}` ではありません。何をマウントしたか確かめてください。"
    missing = [name for name in below if not _is_mount_point(f"{target}/{name}")]
    hint = "の下にあるはずのマウントが見えず、空です。下ごと写す旗（`MS_REC`）が要ります。"
    yield not missing, f"`{target}/{''.join(missing[:1])}` {hint}"
    yield _writable(source), f"`{source}` のほうまで書けなくなりました。`MS_BIND` なしの remount は、ファイルシステムの旗を替えます。"
    hint = "に、まだ書けます。bind mount のときに渡した `MS_RDONLY` は捨てられます。"
    yield not _writable(target), f"`{target}` {hint}"
    open_still = [name for name in below if _writable(f"{target}/{name}")]
    hint = "には、まだ書けます。remount が替えるのは一つのマウントだけです。`mount_setattr` の `recursive` を調べてください。"
    yield not open_still, f"`{target}` には書けませんが、`{target}/{''.join(open_still[:1])}` {hint}"
    options = mounts.holding(target).options.split(",")
    lost = [word for word in ("nosuid", "nodev") if word in mounts.holding(source).options and word not in options]
    hint = "が消えました。remount は、書かなかった旗を落とします。足したい旗だけを渡せる呼び出しを使います。"
    yield not lost, f"書けなくなりましたが、`{''.join(lost[:1])}` {hint}"
    return "下のマウントまで読み取り専用になり、元の場所にはこれまでどおり書けます。"


@contextmanager
def _shared_place() -> Iterator[str]:
    """A mount of its own that is shared, as a host's is."""
    os.makedirs(machine.STATE, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="labs-check-", dir=machine.STATE) as folder, mounts.tmpfs(folder):
        syscalls.mount(None, folder, None, MS_SHARED)
        for name in ("early", "late", "inside"):
            os.mkdir(f"{folder}/{name}")
        yield folder


def _room(calls: Calls) -> Callable[[], None]:
    """The child: make the calls and stop, so that it can be looked at."""

    def steps() -> None:
        for call in calls:
            call()
        signal.raise_signal(signal.SIGSTOP)

    return steps


def _mounted(pid: int, path: str) -> bool:
    return any(row.target == path for row in mounts.table(pid))


def _stopped(child: process.Child) -> str:
    """Wait until the child has made its calls; what stopped it before, or ""."""
    process.until(lambda: process.readable(child.pidfd, 0) or process.status(child.pid).state == "T")
    if not process.readable(child.pidfd, 0):
        return ""
    try:
        child.wait()
    except (ChildFailed, KernelError) as error:
        return str(error)
    return "the child has ended"


def _mount_inside(child: process.Child, path: str) -> None:
    syscalls.setns(child.pidfd, CLONE_NEWNS)
    syscalls.mount("tmpfs", path, "tmpfs")


@exercise
def one_way(calls: Callable[[str], Calls]) -> Steps:
    """What calls(folder) returns: the mounts that the host makes below folder later come in, and none goes out."""
    with ExitStack() as stack:
        folder = stack.enter_context(_shared_place())
        child = stack.enter_context(process.fork(_room(calls(folder))))
        failed = _stopped(child)
        yield not failed, f"途中で止まりました（`{failed}`）。呼び出しの順番と引数を確かめてください。"
        own = not namespaces.same("self", child.pid)["mnt"]
        yield own, "まだホストの mount namespace にいます。最初に `unshare(CLONE_NEWNS)` を呼びます。"
        syscalls.mount("tmpfs", f"{folder}/late", "tmpfs")
        came = _mounted(child.pid, f"{folder}/late")
        process.call(_mount_inside, child, f"{folder}/inside")
        left = _mounted(os.getpid(), f"{folder}/inside")
        others = [row for row in mounts.table(child.pid) if "shared" in mounts.peers(row)]
        yield came, "ホストがあとからつないだものが入ってきません。private や unbindable では、知らせが届きません。"
        yield not left, "中でつないだものが、ホストに出ていきました。まだ同じ peer group（shared）にいます。"
        hint = "など、ほかのマウントが shared のままです。`/` から下をまとめて替えるには `MS_REC` を添えます。"
        yield not others, f"`folder` はよいのですが、`{others[0].target if others else ''}` {hint}"
    return "入ってくるものは届き、出ていくものはありません。slave は一方通行です。"


LINKS = ("", "../outside", "/outside", "inside/../../outside", "../../../../../outside")


def _image(top: str, link: str) -> str:
    """A root file system whose /data is a directory, or a link; /outside is there inside and outside of it."""
    root = f"{top}/root"
    for folder in (f"{top}/outside", f"{top}/source", f"{root}/outside", f"{root}/inside"):
        os.makedirs(folder)
    if link:
        os.symlink(link, f"{root}/data")
    else:
        os.mkdir(f"{root}/data")
    return root


def _attempt(attach: Callable[[str, str, str], object], link: str) -> tuple[str, list[str]]:
    """In a child with mounts of its own: the error that attach raised, and where its mounts are, from the top."""
    syscalls.unshare(CLONE_NEWNS)
    syscalls.mount(None, "/", None, MS_REC | MS_PRIVATE)
    os.makedirs(machine.STATE, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="labs-check-", dir=machine.STATE) as top, mounts.tmpfs(top):
        root, before = _image(top, link), {row.id for row in mounts.table()}
        try:
            attach(root, f"{top}/source", "/data")
        except (LabError, OSError) as error:
            return str(error), []
        made = [row.target for row in mounts.table() if row.id not in before]
        return "", [os.path.relpath(target, top) for target in made]


@exercise
def inside(attach: Callable[[str, str, str], object]) -> Steps:
    """attach(root, source, target) mounts source on target as a container with that root would see target."""
    for link in LINKS:
        error, made = process.call(_attempt, attach, link)
        what = f"`/data` が `{link}` へのリンクのとき、" if link else "`/data` がただのディレクトリのとき、"
        yield not error, f"{what}`{error}` で終わりました。コンテナから見た行き先は、ルートの中にあります。"
        yield bool(made), f"{what}マウントが一つも増えていません。`open_tree` の写しを `move_mount` で付けます。"
        out = [one for one in made if not one.startswith("root/")]
        hint = "（ルートの外）にマウントされました。リンクが、ホストの側からたどられています。"
        yield not out, f"{what}`{''.join(out[:1])}` {hint}"
        wanted = "root/outside" if link else "root/data"
        yield made == [wanted], f"{what}`{made[0]}` にマウントされました。`{wanted}` のはずです。"
    return "どのリンクも、コンテナのルートの中へ着地しました。"
