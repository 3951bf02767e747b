"""The exercises of 06-security/02-seccomp: filters are tried in the kernel, a handler against a caller that cheats."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from labs import process, seccomp, syscalls
from labs import seccomp_notify as notify
from labs.check import Steps, exercise
from labs.errors import BadInput, LabError

ALLOW, EPERM = seccomp.ACTIONS["SCMP_ACT_ALLOW"], seccomp.action("SCMP_ACT_ERRNO", errno.EPERM)
SIGTERM, SIGKILL = 15, 9
KILL_OF_X86 = 37  # <asm/unistd_32.h>
_libc = ctypes.PyDLL(None, use_errno=True)


def _behind(code: bytes, fn: Callable[[], object]) -> Any:
    """What fn returns in a child behind the filter; KernelError where the kernel does not take it."""
    def confined() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        syscalls.seccomp(code)
        return fn()
    return process.call(confined)


def _errno(fn: Callable[[], object]) -> int:
    """The errno that a call fails with, 0 where it does not."""
    try:
        fn()
    except OSError as error:
        return error.errno or 0
    return 0


def _raw_kill(number: int) -> int:
    """kill(2) with all 64 bits of the signal: it goes to process group 2^30, which nobody has."""
    words = [ctypes.c_long(word) for word in (seccomp.resolve("kill") or 0, -(1 << 30), number)]
    return 0 if _libc.syscall(*words) == 0 else ctypes.get_errno()


def _raw_socket(family: int) -> int:
    """socket(2) with all 64 bits of the family; nothing is left open."""
    words = [ctypes.c_long(word) for word in (seccomp.resolve("socket") or 0, family, socket.SOCK_DGRAM, 0)]
    found = _libc.syscall(*words)
    if found < 0:
        return ctypes.get_errno()
    os.close(found)
    return 0


OPCODES = (seccomp.LOAD, seccomp.AND, seccomp.JUMP, seccomp.RETURN, *seccomp.TESTS)
LIMITS = (1 << 16, 1 << 8, 1 << 8, 1 << 32)  # the widths of struct sock_filter, <linux/filter.h>


def _is_program(program: object) -> bool:
    return isinstance(program, Sequence) and bool(program) and all(
        isinstance(line, tuple) and len(line) == 4
        and all(isinstance(n, int) and 0 <= n < limit for n, limit in zip(line, LIMITS, strict=True))
        for line in program)


@exercise
def no_sigkill(program: Sequence[seccomp.Instruction]) -> Steps:
    """A filter, by hand, that refuses signal 9 of kill(2) with EPERM and nothing else, on no way around."""
    shape = "命令は `(code, jt, jf, k)` の四つ組です。四つの数のタプルを並べたリストにしてください（`jt` と `jf` は 255 までです）。"
    yield _is_program(program), shape
    odd = [at for at, (code, *_) in enumerate(program) if code not in OPCODES]
    yield not odd, f"{'、'.join(map(str, odd))} 番の命令は、ここでは使いません。`LOAD`、`JEQ`、`JGE`、`RETURN` で書けます。"
    kill = seccomp.resolve("kill") or 0
    try:
        _behind(seccomp.assemble(program), int)
    except LabError as error:
        yield False, f"カーネルが受け取りません（`{error}`）。飛び先がプログラムの外に出ていないか、最後が `RETURN` かを確かめてください。"
    found = seccomp.answer(program, kill, (1, SIGKILL))
    yield found != ALLOW, "シグナル 9 が通ります。`args[1]` の下半分を読んで 9 と比べてください。"
    yield found == EPERM, f"シグナル 9 への答えが `{seccomp.describe(found)}` です。`ERRNO` に `EPERM` を添えてください。"
    others = [(kill, (1, SIGTERM)), (kill, (SIGKILL, 0)), (kill + 1, (1, SIGKILL)), (0, (0, SIGKILL))]
    stopped = [f"{seccomp.name(number)}{given}" for number, given in others
               if seccomp.answer(program, number, given) != ALLOW]
    yield not stopped, f"関係のない `{'`、`'.join(stopped)}` まで断っています。断るのは kill の、二つ目の引数が 9 のときだけです。"
    wide = seccomp.answer(program, kill, (1, 1 << 32 | SIGKILL))
    yield wide != ALLOW, "上位 32 ビットに 1 を立てた 9 が通ります。カーネルは `int` の引数の上半分を捨てるので、これも SIGKILL です。"
    foreign = seccomp.answer(program, KILL_OF_X86, (1, SIGKILL), seccomp.X86)
    yield foreign != ALLOW, "32 ビットの入口（arch が x86、番号 37 の kill）から入れば通ります。番号より先に `arch` を調べてください。"
    x32 = seccomp.answer(program, kill | seccomp.X32_BIT, (1, SIGKILL))
    yield x32 != ALLOW, "x32 の kill（番号に `X32_BIT` を足したもの）が通ります。`JGE` で `X32_BIT` 以上を断ってください。"
    behind = _behind(seccomp.assemble(program), lambda: [_raw_kill(n) for n in (SIGTERM, SIGKILL, 1 << 32 | SIGKILL)])
    yield behind == [errno.ESRCH, errno.EPERM, errno.EPERM], f"カーネルの中での答えは {behind} でした。`EPERM` は 1 です。"
    return "三つの入口のどこから呼んでも、上位のビットを汚しても、SIGKILL は送れません。カーネルの中でも同じ答えでした。"


FAMILIES = {"AF_UNIX": socket.AF_UNIX, "AF_INET": socket.AF_INET, "AF_PACKET": 17, "AF_VSOCK": 40}


def _tried() -> dict[str, int]:
    """The errno of socket(2) for each family; nothing is left open."""
    return {name: _errno(lambda: socket.socket(family, socket.SOCK_DGRAM).close())  # noqa: B023
            for name, family in FAMILIES.items()}


@exercise
def no_odd_sockets(profile: dict[str, Any]) -> Steps:
    """A profile that refuses AF_PACKET and AF_VSOCK to socket(2) with EPERM, whatever the upper half, and no other."""
    try:
        program = seccomp.compile_profile(seccomp.oci_profile(profile))
    except BadInput as error:
        yield False, f"プロファイルを読めませんでした（`{error}`）。"
    made = seccomp.assemble(program)
    found = _behind(made, _tried)
    ended = "フィルターの後ろの子が、答える前に終わりました。`defaultAction` を `SCMP_ACT_ALLOW` に、断る項目を `SCMP_ACT_ERRNO` にしてください。"
    yield bool(found), ended
    odd, plain = ["AF_PACKET", "AF_VSOCK"], ["AF_UNIX", "AF_INET"]
    broken = [name for name in plain if found[name]]
    yield not broken, f"`{' '.join(broken)}` のソケットまで作れません。`args` で一つ目の引数を調べてください。"
    numbers = [FAMILIES[name] for name in odd]
    answers = [_answer(program, family) for family in numbers]
    yield answers != [ALLOW, ALLOW], "`AF_PACKET` も `AF_VSOCK` も断られていません。「等しくない」の項目を二つ並べると、どの値も必ず片方に当てはまります。"
    free = [name for name in odd if found[name] != errno.EPERM]
    yield not free, f"`{' '.join(free)}` がまだ `EPERM` で断られていません。値ごとに一つの項目を書けます。"
    others = [family for family in range(64) if family not in numbers and _answer(program, family) != ALLOW]
    yield not others, f"ほかのアドレスファミリー（{'、'.join(map(str, others[:3]))} 番など）まで断っています。断るのは 17 と 40 だけです。"
    dirty = _behind(made, lambda: [_raw_socket(1 << 32 | family) for family in numbers])
    wide = "上位 32 ビットに 1 を立てた 17 や 40 が通ります。カーネルは `int` の引数の上半分を捨てます。`SCMP_CMP_MASKED_EQ` で、下半分だけを比べられます。"
    yield dirty == [errno.EPERM] * 2, wide
    return "ふだんのソケットは通り、二つのアドレスファミリーだけが断られました。上半分にごみを入れても、抜けられません。"


def _answer(program: Sequence[seccomp.Instruction], family: int) -> int:
    """What a filter says to socket(family, SOCK_DGRAM, 0)."""
    return seccomp.answer(program, seccomp.resolve("socket") or 0, (family, socket.SOCK_DGRAM))


class _Cheat(notify.Listener):
    """A listener whose caller changes the path as soon as somebody has looked at it, every time."""

    def __init__(self, fd: int, change: Callable[[], None]) -> None:
        super().__init__(fd)
        self.change, self.believed, self.answered, self.looks = change, False, False, 0

    def text(self, call: notify.Call, argument: int) -> str:
        """The first look is the only true one."""
        self.looks += 1
        found = super().text(call, argument)
        self.change()
        return found

    def proceed(self, call: notify.Call) -> None:
        """The race, always lost."""
        self.believed = True
        self.change()
        super().proceed(call)

    def _send(self, call: notify.Call, value: int, error: int, flags: int) -> None:
        self.answered = True
        super()._send(call, value, error, flags)


Handler = Callable[[notify.Listener, notify.Call], object]


class _Answered(NamedTuple):
    """What came of a call: the caller's errno, and what the handler did."""

    errno: int
    believed: bool
    answered: bool
    looks: int


def _mkdir(handler: Handler, path: str, then: str) -> _Answered:
    """mkdir(path) of a child which the handler answers.

    The path lies in memory shared with us, and is `then` when it is read again.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE)
    word = ctypes.c_char.from_buffer(page)
    address = ctypes.addressof(word)

    def write(text: str) -> None:
        page.seek(0)
        page.write(os.fsencode(text) + b"\0")

    write(path)
    caller = lambda: 0 if _libc.mkdir(ctypes.c_void_p(address), 0o755) == 0 else ctypes.get_errno()  # noqa: E731
    with notify.supervised(["mkdir"], caller) as (child, listener):
        cheat = _Cheat(listener.fd, lambda: write(then))
        call = cheat.receive()
        assert call is not None
        handler(cheat, call)
        ended = child.wait(10).code if cheat.answered else -1
    del word
    page.close()
    return _Answered(ended or 0, cheat.believed, cheat.answered, cheat.looks)


_AGAIN = "パスを {} 回読み、その間に書き換えられて、`evil` ができました。読むのは一度だけにして、その写しを使ってください。"


@exercise
def gatekeeper(handler: Handler, folder: str) -> Steps:
    """handler(listener, call) lets a caller make directories named ok-… in folder, nothing else, and is not raced."""
    yield callable(handler), "`handler(listener, call)` という関数を渡してください。"
    good, evil = f"{folder}/ok-good", f"{folder}/evil"
    yield not os.path.exists(good) and not os.path.exists(evil), "`folder` に `ok-good` か `evil` がもうあります。消してからやり直してください。"
    place = tempfile.mkdtemp(prefix="ok-", dir=folder)
    try:
        refused = _mkdir(handler, evil, evil)
        yield refused.answered, "呼んだ側が眠ったままです。どの道を通っても `reply` か `proceed` を一度呼んでください。"
        yield not os.path.exists(evil), "`evil` ができました。名前が `ok-` で始まらないものは `reply(call, error=…)` で断ってください。"
        code = errno.errorcode.get(refused.errno, refused.errno)
        yield refused.errno == errno.EACCES, f"断られた側に `{code}` が返りました。`EACCES` を返してください。"
        for way, path in {"ok-…/../evil": f"{place}/../evil", "ok-…/ok-inner": f"{place}/ok-inner"}.items():
            gone = _mkdir(handler, path, evil)
            yield gone.looks < 2 or not os.path.exists(evil), _AGAIN.format(gone.looks)
            yield gone.errno == errno.EACCES, f"`{way}` が通りました。パスの途中ではなく、`folder` の直下の名前だけを許してください。"
        ended = _mkdir(handler, good, evil)
        yield not ended.believed, "見たあとでパスを書き換えられ、`evil` ができました。`proceed` では、カーネルがもう一度メモリを読みます。"
        yield not os.path.exists(evil), _AGAIN.format(ended.looks)
        yield ended.errno == 0, f"`ok-good` まで `{errno.errorcode.get(ended.errno, ended.errno)}` で断られました。"
        yield os.path.isdir(good), "成功と答えましたが、`ok-good` ができていません。代わりに作るのはあなたです。"
    except OSError as error:
        yield False, f"`handler` が途中で失敗しました（`{error.strerror}`）。返事は、一つの呼び出しに一度だけです。"
    finally:
        for name in (os.path.basename(place), "ok-good", "evil"):
            shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
    return "見たパスを、そのまま自分で使いました。相手があとからメモリを書き換えても、何も変わりません。"
