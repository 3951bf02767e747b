"""The exercises of 05-storage/04-ownership."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from labs import container, idmap, mounts
from labs.check import Steps, exercise

LEARNER = 1000
# A disk that another machine wrote: files of its user 501, whose group is 20, and one of its root.
FOREIGN = {"notes": (501, 20), "notes/todo": (501, 20), "system": (0, 0)}
WWW = 33
# A tree as it was before somebody moved every id in it; the mode where it is not the usual one.
MOVED = {".": 0, "cache": WWW, "cache/page": WWW, "latest": WWW, "tool": 0}
STEP, TOOL_MODE = 100_000, 0o4755


def foreign(disk: str) -> None:
    """Make what stands in FOREIGN in a new directory, which belongs to 501 too."""
    Path(disk, "notes").mkdir(parents=True)
    for name in ("notes/todo", "system"):
        Path(disk, name).write_text(f"{name}\n")
    for name, (uid, gid) in {**FOREIGN, ".": (501, 20)}.items():
        os.chown(f"{disk}/{name}", uid, gid)


@exercise
def borrowed(disk: str, seen: str) -> Steps:
    """On seen, what 501:20 has on the disk belongs to learner, and root's file to nobody; the disk is as it was."""
    row = mounts.holding(seen)
    yield row.target == os.path.realpath(seen), f"`{seen}` はまだマウントの入り口ではありません。"
    kept = all(_owner(f"{disk}/{name}") == owner for name, owner in FOREIGN.items())
    yield kept, "ディスクの上の持ち主が書き換わっています。`chown` は使わず、`check.foreign` からやり直してください。"
    same = os.path.samestat(os.stat(f"{disk}/notes"), os.stat(f"{seen}/notes"))
    yield same, f"`{seen}` に見えているのは、`{disk}` ではありません。"
    yield "idmapped" in row.options.split(","), "ふつうの bind mount です。持ち主を読み替える表が付いていません。"
    uid, gid = _owner(f"{seen}/notes/todo")
    yield uid == LEARNER, f"`notes/todo` の UID は、マウントを通すと {uid} 番に見えます。{_unmapped(uid, 501)}"
    yield gid == LEARNER, f"UID は合いました。GID は {gid} 番に見えます。{_unmapped(gid, 20)}"
    uid, _ = _owner(f"{seen}/system")
    yield uid == idmap.OVERFLOW_ID, f"root のファイルまで {uid} 番に見えます。借りた人に要るのは、501 番の一行だけです。"
    made = _made(seen)
    yield made == "", f"`learner` が新しいファイルを書けません（{made}）。"
    return "ディスクの持ち主は一つも変わらず、`learner` が書いたファイルは、向こうの機械の 501:20 のものになりました。"


def _owner(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def _unmapped(shown: int, wanted: int) -> str:
    if shown == idmap.OVERFLOW_ID:
        return f"ディスクの {wanted} 番が、どの行の範囲にもないからです。行の先頭の数は、ディスクの上の番号です。"
    return f"行の二つめの数は、マウントを通して見せる番号です。{LEARNER} 番にしてください。"


def _made(seen: str) -> str:
    """Why learner cannot make a file there; "" if it can."""
    path = f"{seen}/notes/labs-check"
    words = ["setpriv", f"--reuid={LEARNER}", f"--regid={LEARNER}", "--clear-groups", "touch", path]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        os.unlink(path)
    return done.stderr.strip().rpartition(": ")[2]


@exercise
def served(site: str, seen: str) -> Steps:
    """A container with ids of its own sees learner's files on seen as those of www-data, who may write there."""
    row = mounts.holding(seen)
    yield row.target == os.path.realpath(seen), f"`{seen}` はまだマウントの入り口ではありません。"
    yield os.stat(site).st_uid == LEARNER, f"`{site}` の持ち主が替わっています。`chown` を使わずに解いてください。"
    shown = os.stat(seen).st_uid
    inside = int(_in_container(seen, "stat -c %u /site"))
    hint = f"ホストでは、マウントを通して {shown} 番に見えます。コンテナの中では {inside} 番です。"
    outside = idmap.translate([container.SUBORDINATE], WWW)
    yield inside != idmap.OVERFLOW_ID, hint + f"コンテナの `uid_map` にある外の番号は {container.SUBORDINATE[1]} からです。"
    yield inside == WWW, hint + f"中の {WWW} 番は、ホストの {outside} 番です。"
    said = _in_container(seen, "touch /site/labs-check && echo ok")
    yield said == "ok", f"番号は合いましたが、コンテナの {WWW} 番が書き込めません。"
    uid, gid = _owner(f"{site}/labs-check")
    os.unlink(f"{site}/labs-check")
    yield uid == gid == LEARNER, f"コンテナが書いたファイルが、ディスクでは {uid}:{gid} のものになりました。"
    return f"中の {WWW}、ホストから見た {outside}、ディスクの {LEARNER}。三つの番号が、二枚の表でつながりました。"


def _in_container(seen: str, script: str) -> str:
    found = container.run(["sh", "-c", script], user=True, run_as=container.Ids(WWW, WWW),
                          mounts=[(os.path.realpath(seen), "/site")])
    return found.stdout.strip()


def moved(top: str) -> None:
    """Make top/tree as MOVED says, with a link that leads out of it, and add STEP to every owner as chown(1) would."""
    Path(top, "tree/cache").mkdir(parents=True)
    for name in ("letter", "tree/cache/page", "tree/tool"):
        Path(top, name).write_text(f"{name}\n")
    os.symlink("../letter", f"{top}/tree/latest")
    os.chown(f"{top}/letter", LEARNER, LEARNER)
    os.chmod(f"{top}/tree/tool", TOOL_MODE)
    for name, owner in MOVED.items():
        os.lchown(f"{top}/tree/{name}", owner + STEP, owner + STEP)


@exercise
def undone(top: str) -> Steps:
    """The tree has the owners and modes it had before moved(), and the file that its link leads to has kept its own."""
    letter = _owner(f"{top}/letter")[0]
    hint = f"`latest` の指す先の `letter` まで {letter} 番になりました。リンクそのものの持ち主を替えるのは `lchown` です。"
    yield letter == LEARNER, hint
    found = {name: _owner(f"{top}/tree/{name}") for name in MOVED}
    one = len(set(found.values())) == 1 and found["."][0] < STEP
    yield not one, f"みな {found['.'][0]} 番になりました。元は一人ではありません。番号を一つずつ読んで引いてください。"
    for name, owner in MOVED.items():
        wrong = f"`{name}` はまだ `{found[name][0]}:{found[name][1]}` のものです。元は `{owner}:{owner}` でした。"
        yield found[name] == (owner, owner), wrong
    mode = stat.S_IMODE(os.stat(f"{top}/tree/tool").st_mode)
    hint = f"持ち主は戻りましたが、`tool` のモードが {mode:o} です。`chown` は setuid ビットを消します。元は {TOOL_MODE:o} でした。"
    yield mode == TOOL_MODE, hint
    return "表を引き算でたどれば戻せました。ただし、消えた setuid ビットは、どこにも控えがありません。"
