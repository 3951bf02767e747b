"""The exercises of 06-security/02-seccomp: each wrong answer gives its hint, the solution passes, nothing is left."""

import errno
import os

import pytest

from labs import seccomp
from labs.check import security_seccomp as check
from labs.seccomp import ARCH, ARGUMENTS, JEQ, JGE, JUMP, LOAD, NUMBER, RETURN, X32_BIT

KILL = seccomp.resolve("kill")
NO, YES = (RETURN, 0, 0, seccomp.action("SCMP_ACT_ERRNO", 1)), (RETURN, 0, 0, seccomp.ACTIONS["SCMP_ACT_ALLOW"])
DIE = (RETURN, 0, 0, 0)
SIGNAL = ARGUMENTS + 8
SIMPLE = [(LOAD, 0, 0, NUMBER), (JEQ, 0, 3, KILL), (LOAD, 0, 0, SIGNAL), (JEQ, 0, 1, 9), NO, YES]
NATIVE = [(LOAD, 0, 0, ARCH), (JEQ, 1, 0, seccomp.AUDIT), DIE]
NOT_X32 = [(LOAD, 0, 0, NUMBER), (JGE, 0, 1, X32_BIT), DIE]
BOTH_HALVES = [(LOAD, 0, 0, NUMBER), (JEQ, 0, 5, KILL), (LOAD, 0, 0, SIGNAL + 4), (JEQ, 0, 3, 0),
               (LOAD, 0, 0, SIGNAL), (JEQ, 0, 1, 9), NO, YES]


@pytest.mark.parametrize(("program", "hint"), [
    (["return"], "四つの数のタプル"),
    ([(JEQ, 256, 0, KILL), NO, YES], "255 までです"),
    ([(LOAD, 0, 0, 1 << 32), YES], "四つの数のタプル"),
    ([(LOAD, 0, 0, NUMBER), (0x04, 0, 0, 1), YES], "1 番の命令は、ここでは使いません"),
    ([], "四つの数のタプル"),
    ([(JUMP, 0, 0, 9), YES], "カーネルが受け取りません（`seccomp: Invalid argument`）"),
    ([YES], "シグナル 9 が通ります"),
    ([*SIMPLE[:4], (RETURN, 0, 0, seccomp.action("SCMP_ACT_ERRNO", 38)), YES], "答えが `ERRNO ENOSYS`"),
    ([NO], "`kill(1, 15)`"),
    ([(LOAD, 0, 0, SIGNAL), (JEQ, 0, 1, 9), NO, YES], f"`{seccomp.name(KILL + 1)}(1, 9)`"),
    (BOTH_HALVES, "上位 32 ビットに 1 を立てた 9"),
    (SIMPLE, "32 ビットの入口"),
    (NATIVE + SIMPLE, "x32 の kill"),
])
def test_no_sigkill_says_where_the_way_around_is(program, hint):
    found = check.no_sigkill(program)
    assert not found
    assert hint in found.message


def test_no_sigkill_passes():
    assert check.no_sigkill(NATIVE + NOT_X32 + SIMPLE)


def test_no_sigkill_does_not_believe_its_own_interpreter(monkeypatch):
    monkeypatch.setattr(check, "EPERM", seccomp.action("SCMP_ACT_ERRNO", 2))
    other = [*SIMPLE[:4], (RETURN, 0, 0, seccomp.action("SCMP_ACT_ERRNO", 2)), YES]
    assert "カーネルの中での答えは [3, 2, 2]" in check.no_sigkill(NATIVE + NOT_X32 + other).message


def entry(op, value, action="SCMP_ACT_ERRNO", two=0, **more):
    test = {"index": 0, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": two}
    return {"names": ["socket"], "action": action, "args": [test]} | more


def profile(*entries, default="SCMP_ACT_ALLOW"):
    return {"defaultAction": default, "syscalls": [*entries]}


@pytest.mark.parametrize(("given", "hint"), [
    (profile(default="ALLOW"), "プロファイルを読めませんでした（`defaultAction: 'ALLOW'"),
    (profile(entry("NEAR", 17)), "args[0].op"),
    (profile(default="SCMP_ACT_ERRNO"), "`defaultAction` を `SCMP_ACT_ALLOW` に"),
    (profile({"names": ["socket"], "action": "SCMP_ACT_ERRNO"}), "`AF_UNIX AF_INET` のソケットまで作れません"),
    (profile(entry("NE", 17, "SCMP_ACT_ALLOW"), entry("NE", 40, "SCMP_ACT_ALLOW")), "`AF_PACKET` も `AF_VSOCK` も"),
    (profile(entry("EQ", 17)), "`AF_VSOCK` がまだ `EPERM` で"),
    (profile(entry("EQ", 17, errnoRet=22), entry("EQ", 40)), "`AF_PACKET` がまだ `EPERM` で"),
    (profile(entry("EQ", 17, errnoRet=22), entry("EQ", 40, errnoRet=22)), "`AF_PACKET AF_VSOCK` がまだ `EPERM` で"),
    (profile(entry("EQ", 17, "SCMP_ACT_KILL_PROCESS")), "断る項目を `SCMP_ACT_ERRNO` に"),
    (profile(entry("GE", 17)), "（18、19、20 番など）まで断って"),
    (profile(entry("EQ", 17), entry("EQ", 40)), "上半分を捨てます"),
])
def test_no_odd_sockets_says_which_family(given, hint):
    found = check.no_odd_sockets(given)
    assert not found
    assert hint in found.message


def test_no_odd_sockets_passes():
    low = 0xFFFFFFFF
    assert check.no_odd_sockets(profile(entry("MASKED_EQ", low, two=17), entry("MASKED_EQ", low, two=40)))


@pytest.fixture
def folder(tmp_path):
    yield str(tmp_path)
    assert os.listdir(tmp_path) == []


def allowed(listener, call):
    above, name = listener.text(call, 0).split("/")[-2:]
    return name.startswith("ok-") and not above.startswith("ok-")


def everything(listener, call):
    listener.proceed(call)


def silent(listener, call):
    if allowed(listener, call):
        listener.proceed(call)


def wrong_errno(listener, call):
    listener.reply(call, error=errno.EPERM)


def by_substring(listener, call):
    path = listener.text(call, 0)
    if "/ok-" in path:
        listener.proceed(call)
    else:
        listener.reply(call, error=errno.EACCES)


def racing(listener, call):
    if allowed(listener, call):
        listener.proceed(call)
    else:
        listener.reply(call, error=errno.EACCES)


def stubborn(listener, call):
    listener.reply(call, error=errno.EACCES)


def lying(listener, call):
    listener.reply(call, error=0 if allowed(listener, call) else errno.EACCES)


def deep(listener, call):
    path = listener.text(call, 0)
    if path.rpartition("/")[2].startswith("ok-"):
        os.mkdir(path)
        listener.reply(call)
    else:
        listener.reply(call, error=errno.EACCES)


def looking_again(listener, call):
    if allowed(listener, call):
        os.mkdir(listener.text(call, 0))
        listener.reply(call)
    else:
        listener.reply(call, error=errno.EACCES)


def looking_again_too_deep(listener, call):
    if listener.text(call, 0).rpartition("/")[2].startswith("ok-"):
        os.mkdir(listener.text(call, 0))
        listener.reply(call)
    else:
        listener.reply(call, error=errno.EACCES)


def answers_twice(listener, call):
    listener.reply(call, error=errno.EACCES)
    listener.reply(call, error=errno.EACCES)


@pytest.mark.parametrize(("handler", "hint"), [
    ("proceed", "という関数を渡して"), (silent, "眠ったままです"), (everything, "`evil` ができました。名前が"),
    (wrong_errno, "`EPERM` が返りました"), (by_substring, "`ok-…/../evil` が通りました"),
    (racing, "カーネルがもう一度メモリを読みます"), (stubborn, "`ok-good` まで `EACCES` で"),
    (lying, "`ok-good` ができていません"), (deep, "`ok-…/ok-inner` が通りました"),
    (looking_again, "パスを 2 回読み"), (looking_again_too_deep, "パスを 2 回読み"),
    (answers_twice, "返事は、一つの呼び出しに一度だけです")])
def test_gatekeeper_reacts_to_the_handler(folder, handler, hint):
    found = check.gatekeeper(handler, folder)
    assert not found
    assert hint in found.message


def test_gatekeeper_passes(folder):
    def honest(listener, call):
        path = listener.text(call, 0)
        if os.path.dirname(path) == folder and os.path.basename(path).startswith("ok-"):
            os.mkdir(path)
            listener.reply(call)
        else:
            listener.reply(call, error=errno.EACCES)

    assert check.gatekeeper(honest, folder)


def test_gatekeeper_wants_a_clean_place(tmp_path):
    (tmp_path / "evil").mkdir()
    assert "もうあります" in check.gatekeeper(racing, str(tmp_path)).message
    assert os.listdir(tmp_path) == ["evil"]


def test_nothing_is_not_an_answer(folder):
    assert not check.no_sigkill(...)
    assert not check.gatekeeper(None, folder)
