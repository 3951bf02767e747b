"""The exercises of 05-storage/02-volumes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from labs import mounts, storage
from labs.check import Steps, exercise
from labs.container import Bind, Container
from labs.errors import BadInput
from labs.storage import Volumes
from labs.volume_plugin import Driver

FATES = ("layer", "volume", "bind", "tmpfs")
PUZZLE = """\
mkdir -p /data/cache /opt
mount -t tmpfs -o size=1m none /data/cache
ln -s /data/orders /opt/orders
ln -s /tmp /data/spool
touch /data/orders /data/cache/page /data/spool/job /conf/app.ini /var/note
touch /tmp/ready
exec sleep 1000"""
PATHS = ("/data/orders", "/data/cache/page", "/data/spool/job", "/opt/orders", "/conf/app.ini", "/var/note")
LOST = {
    "missing": "`{path}` が写っていません。",
    "added": "元にはない `{path}` があります。",
    "content": "`{path}` の中身が違います。リンクの先をたどって写していませんか。",
    "owner": "`{path}` の持ち主の番号が変わりました。この持ち主で動くデータベースは、もう書けません。",
    "mode": "`{path}` の権限が変わりました。",
    "links": "`{path}` は、二つの名前を持つ一つのファイルでした。写した先では、別々のファイルになっています。",
    "attributes": "`{path}` の拡張属性が落ちました。写す道具に、拡張属性も写すよう頼んでください。",
    "time": "`{path}` の変更時刻が変わりました。時刻で差分を見る道具が、すべてを写し直すことになります。",
}
# What is told first: a copy that lacks files differs in everything else too.
ORDER = tuple(LOST)
SPECIAL = """\
echo order 1 > ledger; ln ledger ledger.today; ln -s ledger current; mkdir -m 2750 archive; echo old > archive/1
setfattr -n user.origin -v shop ledger; chown -hR 999:999 .; chmod 640 ledger; chmod 750 .
touch -d @1700000000 ledger archive/1 archive"""


@contextmanager
def puzzle(volumes: Volumes, folder: str) -> Iterator[Container]:
    """A container with a volume on /data, a directory of the host on /conf, a tmpfs inside the volume, and two links."""
    volume = volumes.create("puzzle")
    with Container(["sh", "-c", PUZZLE], mounts=[Bind(volume.path, "/data"), Bind(folder, "/conf")]) as box:
        yield box


def _fate(volumes: Volumes, box: Container, real: str) -> str:
    """On what a path of the container without links lies: the deepest mount above it."""
    rows = [row for row in mounts.table(box.pid) if f"{real}/".startswith(f"{row.target.rstrip('/')}/")]
    row = max(rows, key=lambda row: len(row.target))
    if row.target == "/":
        return "layer"
    here = mounts.holding(volumes.store)
    store = mounts.within(here, volumes.store)
    if row.dev == here.dev and row.root.startswith(f"{store}/"):
        return "volume"
    return "tmpfs" if row.fstype == "tmpfs" and row.root == "/" else "bind"


@exercise
def fates(volumes: Volumes, box: Container, answer: Mapping[str, str]) -> Steps:
    """On what each of PATHS lies; the mounts of the container decide."""
    for path in PATHS:
        given = answer.get(path, "")
        yield bool(given), f"`{path}` の答えがまだありません。"
        yield given in FATES, f"`{path}` の答え `{given}` は、{'、'.join(f'`{word}`' for word in FATES)} のどれでもありません。"
        real = box.exec(["readlink", "-f", path]).stdout.strip()
        yield given == _fate(volumes, box, real), _why(path, real, given)
    return "運命を決めるのは、パスの見た目ではありません。リンクをたどり終えた場所の、いちばん深いマウントです。"


def _why(path: str, real: str, given: str) -> str:
    if path != real:
        return f"`{path}` は `{given}` にありません。シンボリックリンクです。コンテナの中でたどると、どこへ着くでしょうか。"
    return f"`{path}` は `{given}` にありません。`mounts.table(box.pid)` で、このパスにいちばん近いマウントを探してください。"


def original(volumes: Volumes) -> str:
    """The volume "ledger-1" of the second exercise, with everything that a careless copy loses; its directory."""
    path = volumes.create("ledger-1").path
    subprocess.run(["sh", "-euc", SPECIAL], cwd=path, check=True)
    return path


@exercise
def moved(volumes: Volumes, name: str) -> Steps:
    """A volume that is a full copy of ledger-1."""
    path = _path(volumes, name)
    yield path != "", f"ボリューム `{name}` がありません。"
    source = volumes.get("ledger-1").path
    yield os.path.realpath(path) != os.path.realpath(source), "`ledger-1` そのものです。別の名前のボリュームへ写してください。"
    found = storage.compare(source, path)
    for field in ORDER:
        places = [where for where, fields in found.items() if field in fields]
        yield not places, LOST[field].format(path="".join(places[:1]))
    return "中身だけでなく、持ち主、権限、リンク、時刻、拡張属性まで同じです。コンテナは、引っ越したことに気づきません。"


def _path(volumes: Volumes, name: str) -> str:
    try:
        return volumes.get(name).path
    except BadInput:
        return ""


@exercise
def shared(driver: Driver, name: str) -> Steps:
    """A volume of the driver that two containers have mounted and one has left, and that could not be removed."""
    asked = [call for call in driver.calls if call.request.get("Name") == name]
    said = [call.method.removeprefix("VolumeDriver.") for call in asked if not call.answer.get("Err")]
    refused = [call.answer["Err"] for call in asked if call.answer.get("Err")]
    yield bool(asked), f"`{name}` についての依頼が、まだ一つも来ていません。"
    yield "Create" in said, f"`{name}` は作られていません。最後の断りは「{''.join(refused[-1:])}」でした。"
    ids = {call.request.get("ID") for call in asked if call.method == "VolumeDriver.Mount"}
    yield bool(ids), "`Mount` がまだありません。Docker は、コンテナを動かすたびに呼びます。"
    yield len(ids) > 1, "`Mount` の `ID` が一つだけです。二つのコンテナなら、違う `ID` で二度呼ばれます。"
    yield "Unmount" in said, "どちらのコンテナも、まだ終わっていません。片方の `ID` で `Unmount` を送ってください。"
    left = len(driver.mounted.get(name, set()))
    yield left > 0, "両方とも `Unmount` されました。残る一つが使っている間に、消そうとしてみてください。"
    yield left == 1, "`Unmount` の `ID` が、`Mount` のときのどれとも合いません。使っている人数が減っていません。"
    yield any(call.method == "VolumeDriver.Remove" for call in asked), "最後に、使用中のまま `Remove` を送ってください。"
    yield _path(driver.volumes, name) != "", f"`{name}` は、もう消えています。使っている人がいる間に `Remove` を送ってください。"
    return "名前一つに利用者が二人。数えているのはドライバで、最後の一人が去るまで消させません。"
