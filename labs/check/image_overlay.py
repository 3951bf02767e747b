"""The exercises of 03-image/01-overlay."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from labs import layer, machine, mounts
from labs.check import Steps, exercise
from labs.layer import OPAQUE, OVERLAY_OPAQUE, WHITEOUT

SITE = ("cache/1", "cache/2", "debug.log", "index.html")
NAMES = ("app", "conf/a", "conf/b", "data/log", "data/old", "lib")
BASE = ("cache/1", "cache/2", "etc/hosts", "etc/motd", "log/app")
SCRIPT = """\
rm etc/motd
touch etc/new
rm etc/new
chmod 600 log/app
rm -r cache
mkdir cache
touch cache/3"""
# The layers of the second exercise, the lowest first; "!NAME" is a whiteout, "NAME/" an opaque directory.
STACK = (
    ("app", "conf/a", "conf/b", "data/old", "lib"),
    ("conf/a", "data/log", "data/old"),
    ("!lib", "app", "data/", "data/log"),
    ("!conf/b", "lib"),
    ("data/log",),
)


@contextmanager
def _folder() -> Iterator[Path]:
    os.makedirs(machine.DATA, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="labs-check-", dir=machine.DATA) as name:
        yield Path(name)


def _write(folder: Path, names: Sequence[str]) -> None:
    """Make the files (whiteouts, opaque directories) that the names stand for."""
    for name in names:
        path = folder / name.removeprefix("!")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("!"):
            os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
        elif name.endswith("/"):
            path.mkdir(exist_ok=True)
            os.setxattr(path, OVERLAY_OPAQUE, b"y")
        else:
            path.write_text("same\n")


def _shown(layers: Sequence[str]) -> dict[str, os.stat_result]:
    """What the kernel shows of layers, uppermost first, mounted read-only: path → status."""
    with _folder() as target, mounts.overlay(layers, None, None, str(target)):
        return dict(layer.walk(str(target)))


def _is_whiteout(path: Path) -> bool:
    status = path.lstat() if os.path.lexists(path) else None
    return status is not None and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _opaque(path: Path, attribute: str = OVERLAY_OPAQUE) -> str:
    """The value of the attribute, or "" where there is none."""
    return os.getxattr(path, attribute).decode() if attribute in os.listxattr(path) else ""


def site(folder: str) -> None:
    """Make the lower directory of the first exercise."""
    _write(Path(folder), SITE)


@exercise
def by_hand(lower: str, upper: str) -> Steps:
    """An upper directory, made without overlay, that removes debug.log and replaces cache."""
    top = Path(upper)
    left = {path for path, status in layer.walk(lower) if not stat.S_ISDIR(status.st_mode)}
    yield left == set(SITE), "lower を書き換えました。ほかの人も重ねている層です。`check.site` で作り直し、upper だけで同じことを見せてください。"
    written = [path for path, _ in layer.walk(upper) if os.path.basename(path).startswith(WHITEOUT)]
    yield not written, f"`{''.join(written[:1])}` は tar の中での書き方です。overlay は、ただのファイルとして見せてしまいます。"
    yield from _removed(top / "debug.log")
    yield from _replaced(top / "cache")
    traces = [name for name in os.listxattr(upper) if name.startswith("trusted.overlay.")]
    yield not traces, "答えの形は合っていますが、upper に overlay をマウントした跡があります。今度は `mknod` と `setxattr` だけで作ってください。"
    extra = sorted(set(_shown([upper, lower])) - {"index.html", "cache", "cache/fresh"})
    yield not extra, f"重ねると、余計な名前 `{''.join(extra[:1])}` も見えます。"
    return "重ねてみると、見えるのは `index.html` と `cache/fresh` だけでした。カーネルが書く印と、手で付けた印に違いはありません。"


def _removed(path: Path) -> Iterator[tuple[bool, str]]:
    yield os.path.lexists(path), "upper に `debug.log` の印がありません。重ねると、下の層の `debug.log` がそのまま見えます。"
    status = path.lstat()
    yield stat.S_ISCHR(status.st_mode), "upper の `debug.log` は whiteout ではありません。重ねると、消えるのではなく、このファイルが代わりに見えます。"
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    yield number == "0:0", f"`debug.log` は文字デバイスですが、番号が {number} です。whiteout の番号ではありません。"


def _replaced(path: Path) -> Iterator[tuple[bool, str]]:
    yield os.path.lexists(path), "`debug.log` は消えました。upper に `cache` がまだないので、下の層の中身が見えています。"
    yield path.is_dir(), "`cache` がディレクトリではありません。whiteout にすると、入れ替わるのではなく、消えてしまいます。"
    yield (path / "fresh").is_file(), "upper の `cache` に `fresh` がありません。"
    yield not _opaque(path, "user.overlay.opaque"), "`user.` で始まる属性は、`userxattr` を付けたマウントでしか読まれません。root のマウントが読むほうの名前を使ってください。"
    one_by_one = all(_is_whiteout(path / name) for name in ("1", "2"))
    yield not one_by_one, "下にある名前を一つずつ whiteout で消しました。下の層に名前が増えたら、それは見えてしまいます。ディレクトリごと隠してください。"
    value = _opaque(path)
    yield value != "", "`cache` は下の層の `cache` と混ざっています。ここから下を見るな、という印が要ります。"
    yield value == "y", f"`{OVERLAY_OPAQUE}` の値が `{value}` です。カーネルが opaque と読む値は別です。"


def stack(folder: str) -> dict[str, str]:
    """Make the layers of the second exercise: number → directory, uppermost first."""
    for number, names in enumerate(STACK, 1):
        _write(Path(folder, str(number)), names)
    return {str(number): f"{folder}/{number}" for number in range(len(STACK), 0, -1)}


@exercise
def sources(layers: Mapping[str, str], answer: Mapping[str, str]) -> Steps:
    """From which layer each of NAMES comes, "-" for one that is not seen; the kernel's inode numbers decide."""
    shown = _shown(list(layers.values()))
    for name in NAMES:
        given = answer.get(name, "")
        yield bool(given), f"`{name}` の答えがまだありません。"
        yield given in (*layers, "-"), f"`{name}` の答え `{given}` は、層の番号でも `-` でもありません。"
        right = next((number for number, folder in layers.items() if _is(shown.get(name), Path(folder, name))), "-")
        yield given == right, _why(name, given, layers, name in shown)
    return "名前の見つけ方はいつも同じです。上から一層ずつ探し、実体か、whiteout か、opaque なディレクトリに当たったところで止まります。"


def _is(status: os.stat_result | None, path: Path) -> bool:
    """Whether overlay's file is that one: with all layers on one filesystem it keeps the inode's number."""
    return status is not None and os.path.lexists(path) and path.lstat().st_ino == status.st_ino


def _why(name: str, given: str, layers: Mapping[str, str], seen: bool) -> str:
    if given == "-":
        return f"`{name}` は、重ねた木に見えています。"
    place = Path(layers[given], name)
    if not os.path.lexists(place):
        return f"層 {given} に `{name}` はありません。"
    if _is_whiteout(place):
        return f"層 {given} の `{name}` は文字デバイス 0:0、つまり「消えた」という印です。その下の層はもう見られません。"
    if seen:
        return f"`{name}` は層 {given} にもありますが、もっと上の層に同じ名前があります。"
    above = [Path(folder) for number, folder in layers.items() if int(number) > int(given)]
    if any(_is_whiteout(folder / name) for folder in above):
        return f"層 {given} の `{name}` は、上の層の whiteout に隠されています。"
    return f"層 {given} の `{name}` は、上の層の opaque なディレクトリに隠されています。`trusted.overlay.opaque` を調べてください。"


def packed() -> set[str]:
    """The names in the tar of what SCRIPT changes on BASE."""
    with _folder() as folder:
        for name in ("lower", "upper", "work", "merged"):
            (folder / name).mkdir()
        _write(folder / "lower", BASE)
        lower, upper, work, merged = (str(folder / name) for name in ("lower", "upper", "work", "merged"))
        with mounts.overlay([lower], upper, work, merged):
            subprocess.run(["sh", "-e", "-c", SCRIPT], cwd=merged, check=True)
        tar = io.BytesIO()
        layer.pack(upper, tar)
    tar.seek(0)
    with tarfile.open(fileobj=tar) as archive:
        return set(archive.getnames())


@exercise
def tar_names(answer: Sequence[str]) -> Steps:
    """The names that SCRIPT's changes get in a layer, told beforehand."""
    yield not isinstance(answer, str), "名前を一つずつの文字列にして、リストに並べてください。"
    given = {os.path.normpath(name) for name in answer}
    yield not given & {"etc/new", "etc/.wh.new"}, "`etc/new` は upper で生まれ、upper で消えました。下の層にない名前なので、消した印も要りません。"
    yield "etc/motd" not in given, "消した `etc/motd` は、その名前では tar に入りません。下の層の `etc/motd` を隠す名前にします。"
    yield not given & {"cache/.wh.1", "cache/.wh.2"}, "`cache` の中身には、一つずつの whiteout が付きません。ディレクトリごと隠す名前が一つあります。"
    yield ".wh.cache" not in given, "`cache` は消したあとに作り直しました。upper にあるのは whiteout ではなく、印の付いたディレクトリです。"
    right = packed()
    missing = right - given
    yield "etc/.wh.motd" not in missing, "`etc/motd` を消したことが、どの名前からもわかりません。"
    yield f"cache/{OPAQUE}" not in missing, "`cache` が、下の層の `cache` と混ざってしまいます。"
    yield "cache/3" not in missing, "作り直した `cache` に置いたファイルがありません。"
    yield "log/app" not in missing, "`chmod` だけでも copy-up は起きます。どのファイルが upper へ写ったでしょうか。"
    yield not missing, "ディレクトリそのものの名前が足りません。upper では、深いところを変えるときに、親のディレクトリも作られます。"
    extra = sorted(given - right)
    yield not extra, f"`{''.join(extra[:1])}` は、この層の tar にありません。"
    return "操作は七つ、tar の名前も七つですが、一対一ではありません。層が覚えているのは、したことではなく、残った差分です。"
