"""The exercises of 06-security/01-capabilities."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from labs import capabilities, machine, process
from labs.capabilities import FileCaps
from labs.check import Steps, exercise
from labs.errors import BadInput, ChildFailed

NOBODY = 65534
SHADOW = "/etc/shadow"
READ_SEARCH, BIND = capabilities.parse(["DAC_READ_SEARCH"]), capabilities.parse(["NET_BIND_SERVICE"])


def _said(names: Sequence[str] | int) -> str:
    """Names for a hint, or a word for none."""
    found = capabilities.names(names) if isinstance(names, int) else names
    return f"`{' '.join(found)}`" if found else "空"


def _run(argv: Sequence[str], sets: Mapping[str, int], uid: int) -> str:
    """In a child: begin with these sets, and execute; what the command wrote."""
    capabilities.assume(dict(sets), uid)
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def after(program: str, sets: Mapping[str, int], uid: int) -> dict[str, int] | str:
    """The sets of a real process after execve(2) of a copy of cat, or the name of the errno."""
    try:
        return capabilities.from_status(process.call(_run, [program, "/proc/self/status"], sets, uid))
    except ChildFailed as error:
        return errno.errorcode.get(error.errno, error.detail)


def _reads(program: str) -> bool:
    """Whether nobody, who has no capability, reads SHADOW with that copy of cat."""
    try:
        return bool(process.call(_run, [program, SHADOW], {}, NOBODY) == machine.read_file(SHADOW))
    except ChildFailed:
        return False


@exercise
def reads_shadow(path: str) -> Steps:
    """A copy of cat that reads SHADOW for everybody, by a file capability and not by more than it takes."""
    yield os.path.exists(path), f"`{path}` がありません。`cat` を写すところから始めます。"
    mode = os.stat(path).st_mode
    yield not mode & stat.S_ISUID, "set-user-ID ビットが立っています。読むだけのプログラムに、root の力を丸ごと渡しています。"
    yield not mode & stat.S_ISGID, "set-group-ID ビットが立っています。root のグループの力まで渡しています。"
    yield bool(mode & stat.S_IXOTH), "nobody には実行できません。`chmod 755` にしてください。"
    caps = capabilities.read_file(path)
    yield caps is not None, "`security.capability` が付いていません。書いたあとで中身を書き換えると、消えてしまいます。"
    assert caps is not None
    yield caps.rootid is None, f"rootid が {caps.rootid} です。その user namespace の中でしか効きません。"
    both = caps.permitted | caps.inheritable
    override = both & capabilities.parse(["DAC_OVERRIDE"])
    yield not override, "`CAP_DAC_OVERRIDE` は、書くことまで許します。読むだけなら、もっと小さい capability があります。"
    yield not both & ~READ_SEARCH, f"{_said(both & ~READ_SEARCH)} は要りません。読むのに要るものだけにしてください。"
    inherited = "`inheritable` だけでは、プロセスの `inheritable` にもないと効きません。nobody のそこは空です。"
    yield caps.permitted == READ_SEARCH, inherited if both else "二つの集合がどちらも空です。"
    yield caps.effective, "permitted には入りますが、effective は空のままです。`cat` は、自分で有効にすることを知りません。"
    yield _reads(path), f"それでも nobody は `{SHADOW}` を読めません。途中のディレクトリの権限と、`nosuid` を確かめてください。"
    return "nobody が、この一つのプログラムを通してだけ読めます。ほかの力は何も渡していません。"


@exercise
def for_a_script(given: Mapping[str, Sequence[str]]) -> Steps:
    """The sets of a nobody whose program, a file without capabilities, has CAP_NET_BIND_SERVICE and never more."""
    odd = [name for name in given if name not in capabilities.SETS]
    yield not odd, f"`{' '.join(odd)}` という集合はありません。名前は `labs.capabilities.SETS` にあります。"
    wrong = "".join(_unknown(names) for names in given.values())
    yield not wrong, wrong
    sets = dict.fromkeys(capabilities.SETS, 0) | {name: capabilities.parse(names) for name, names in given.items()}
    yield bool(sets["ambient"] & BIND), "`ambient` にありません。ファイルに何も付いていなければ、ほかの集合は exec で消えます。"
    lacking = [name for name in ("permitted", "inheritable") if not sets[name] & BIND]
    raise_ambient = f"`ambient` に上げられるのは、permitted と inheritable の両方にあるものだけです。{_said(lacking)} が足りません。"
    yield not lacking, raise_ambient
    over = sets["effective"] & ~sets["permitted"]
    yield not over, f"effective の {_said(over)} は、permitted にありません。`capset` が EPERM で断ります。"
    found = after("/usr/bin/cat", sets, NOBODY)
    if isinstance(found, str):
        yield False, f"この集合では始められません（`{found}`）。ノートブックが持たない力は、子にも渡せません。"
        return ""
    yield found["effective"] == BIND, f"exec のあとの effective が {_said(found['effective'])} です。一つだけにします。"
    more = found["bounding"] & ~BIND
    yield not more, f"bounding に {more.bit_count()} 個残っています。setuid root のプログラムを exec すれば、それが全部戻ります。"
    spare = found["inheritable"] & ~BIND
    yield not spare, f"inheritable の {_said(spare)} は要りません。同じものを持つファイルを exec すると、permitted に入ります。"
    return "何も付いていないプログラムに、一つだけ渡りました。これより増えることは、もうありません。"


def _unknown(names: Sequence[str]) -> str:
    """A hint for what is no list of names, or names no capability; "" where there is nothing to say."""
    if isinstance(names, str):
        return "文字列ではなく、名前のリストにします。"
    try:
        capabilities.parse(names)
    except BadInput as error:
        return f"`{error.value}` という capability はありません。"
    return ""


class Case(NamedTuple):
    """A process before execve(2), and the file it executes."""

    text: str
    uid: int
    sets: dict[str, int]
    file: FileCaps | None
    why: str


RAW, CHOWN = capabilities.parse(["NET_RAW"]), capabilities.parse(["CHOWN"])
TWO = RAW | CHOWN
CASES = {
    "a": Case("nobody, bounding=RAW,CHOWN permitted=inheritable=ambient=RAW; plain file", NOBODY,
              {"bounding": TWO, "permitted": RAW, "inheritable": RAW, "ambient": RAW}, None,
              "何も付いていないファイルなら、P'(effective) は P'(ambient) です。"),
    "b": Case("nobody, bounding=RAW,CHOWN permitted=inheritable=ambient=RAW; file CHOWN=p", NOBODY,
              {"bounding": TWO, "permitted": RAW, "inheritable": RAW, "ambient": RAW}, FileCaps(CHOWN),
              "capability の付いたファイルは ambient を空にします。そして、このファイルには effective のビットがありません。"),
    "c": Case("nobody, bounding=CHOWN inheritable=RAW; file RAW=ei", NOBODY,
              {"bounding": CHOWN, "inheritable": RAW}, FileCaps(0, RAW, True),
              "P(inheritable) & F(inheritable) の項には、bounding が出てきません。"),
    "d": Case("root, bounding=CHOWN inheritable=RAW; plain file", 0,
              {"bounding": CHOWN, "inheritable": RAW}, None,
              "root の exec では F(permitted) と F(inheritable) が全部 1 とみなされます。二つの項を、それぞれ計算してください。"),
    "e": Case("nobody, bounding=CHOWN; file RAW,CHOWN=ep", NOBODY, {"bounding": CHOWN}, FileCaps(TWO, 0, True),
              "effective のビットがあるのに permitted を全部はもらえないとき、exec そのものが断られます。"),
}


@contextmanager
def cat_with(file: FileCaps | None) -> Iterator[str]:
    """A copy of cat with these capabilities, where no mount is nosuid."""
    folder = f"{machine.DATA}/{machine.new_name('check')}"
    os.makedirs(folder, 0o755)
    try:
        shutil.copy("/usr/bin/cat", folder)
        if file:
            capabilities.write_file(f"{folder}/cat", file)
        yield f"{folder}/cat"
    finally:
        shutil.rmtree(folder)


@exercise
def foretell(answer: Mapping[str, Sequence[str] | str]) -> Steps:
    """What is effective after execve(2) in each of CASES: a list of names, or "EPERM"."""
    missing = [key for key in CASES if not isinstance(answer.get(key), Sequence)]
    yield not missing, f"`{' '.join(missing)}` の答えがありません。"
    for key, case in CASES.items():
        said = answer[key]
        if said != "EPERM":
            wrong = _unknown(said)
            yield not wrong, f"`{key}`: {wrong}"
        with cat_with(case.file) as program:
            found = after(program, case.sets, case.uid)
        same = said == found if isinstance(found, str) or said == "EPERM" else capabilities.parse(said) == found["effective"]
        yield same, f"`{key}` は、カーネルの答えと違います。{case.why}"
    return "五つとも、カーネルの答えと同じです。式を読める人は、exec の前に結果を言えます。"
