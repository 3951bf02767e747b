"""The exercises of 05-storage/03-storage-drivers."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence

from labs import disks, drivers, layer, process, syscalls
from labs.check import Steps, exercise

MIB = 1 << 20
CAP_SYS_RESOURCE = 24  # <linux/capability.h>
# What may be done to the file /big of a lower layer.
OPERATIONS = {
    "read": "cat big >/dev/null",
    "append": "echo x >>big",
    "chmod": "chmod 600 big",
    "truncate": ": >big",
    "rename": "mv big other",
    "delete": "rm big",
}


@exercise
def copied(driver: drivers.Driver, answer: Sequence[str]) -> Steps:
    """Which of OPERATIONS make overlay2 copy all of a file; every one is done, and its layer is measured."""
    yield not isinstance(answer, str), "操作の名前を一つずつの文字列にして、リストに並べてください。"
    unknown = sorted(set(answer) - set(OPERATIONS))
    yield not unknown, f"`{''.join(unknown[:1])}` という操作はありません。"
    grown = {name: _grown(driver, script) for name, script in OPERATIONS.items()}
    for name, size in grown.items():
        big = size >= 4 * MIB
        yield not big or name in answer, f"`{name}` を実際に動かすと、その層は {size // MIB} MiB を超えました。{_why(name)}"
        yield big or name not in answer, f"`{name}` を実際に動かしても、その層は {size // 1024} KiB でした。{_why(name)}"
    return "中身が写るのは、下の層のファイルを「中身ごと残したまま変える」ときです。読むだけ、捨てるだけなら、一バイトも写りません。"


def _why(name: str) -> str:
    return {
        "read": "読むだけなら、下の層のファイルがそのまま開かれます。",
        "append": "書けるモードで開くと、元の中身を残すために丸ごと写します。",
        "chmod": "権限を変えるだけでも、upper にファイルがなければ変えた権限の置き場がありません。",
        "truncate": "中身を捨てて開くので、写すべき中身がありません。",
        "rename": "新しい名前のファイルは upper に要ります。下の層では名前を変えられません。",
        "delete": "消すのに要るのは、隠すための印だけです。",
    }[name]


def _grown(driver: drivers.Driver, script: str) -> int:
    """Bytes of a layer on "base" after a shell has run that script in it."""
    driver.prepare("check", "base")
    try:
        with driver.mount("check") as path:
            subprocess.run(["sh", "-e", "-c", script], cwd=path, check=True)
        return sum(status.st_blocks * 512 for _, status in layer.walk(f"{driver.store}/check/diff"))
    finally:
        driver.remove("check")


def image(driver: drivers.Driver) -> None:
    """Make the layers of the second exercise: build writes a large file, and clean on it deletes that again."""
    driver.prepare("build", "base")
    with driver.mount("build") as path:
        drivers.write(f"{path}/app/program", 1000)
        drivers.write(f"{path}/cache.bin", 4 * MIB)
    driver.prepare("clean", "build")
    with driver.mount("clean") as path:
        os.unlink(f"{path}/cache.bin")


def _seen(driver: drivers.Driver, name: str) -> dict[str, tuple[int, int]]:
    """Path → mode and size of what a layer shows; a directory's size says nothing."""
    with driver.mount(name) as path:
        return {inner: (status.st_mode, 0 if stat.S_ISDIR(status.st_mode) else status.st_size)
                for inner, status in layer.walk(path)}


def _below(driver: drivers.Driver, name: str) -> Iterator[str]:
    while found := driver.parent(name):
        name = found
        yield name


@exercise
def slim(driver: drivers.Driver) -> Steps:
    """A layer "slim" that shows what "clean" shows, and stores no large file."""
    yield "slim" in driver.layers(), "`slim` という層がまだありません。`prepare` で作ってください。"
    wanted, seen = _seen(driver, "clean"), _seen(driver, "slim")
    yield "cache.bin" not in seen, "`slim` に `cache.bin` が見えています。"
    yield "app/program" in seen, "`slim` に `app/program` がありません。これを残すためのビルドでした。"
    below = list(_below(driver, "slim"))
    yield "build" not in below, "`slim` の下に `build` があります。`cache.bin` は見えなくても、4 MiB を占めたままです。"
    yield "base" in below, "`slim` の下に `base` がありません。`base` の中身まで写すと、同じ `base` を使うほかのイメージと分け合えません。"
    missing = sorted(set(wanted) - set(seen))
    yield not missing, f"`clean` に見える `{''.join(missing[:1])}` が、`slim` にはありません。"
    extra = sorted(set(seen) - set(wanted))
    yield not extra, f"`clean` にない `{''.join(extra[:1])}` が、`slim` にはあります。"
    marks = [path for path, status in layer.walk(f"{driver.store}/slim/diff") if stat.S_ISCHR(status.st_mode)]
    yield not marks, f"`slim` に `{''.join(marks[:1])}` の whiteout があります。`base` にない名前なので、隠すものがありません。"
    other = sorted(path for path in wanted if wanted[path] != seen[path])
    yield not other, f"`{''.join(other[:1])}` の大きさか権限が、`clean` のものと違います。"
    return "見えるものは同じで、`cache.bin` はどの層にもありません。マルチステージビルドの `COPY --from` がしているのは、これです。"


def shares(folder: str) -> None:
    """Make the directories of the third exercise; log holds an old file already."""
    for name in ("web", "log"):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
    drivers.write(f"{folder}/log/old", 2 * MIB)


@exercise
def fenced(folder: str) -> Steps:
    """All that is in log, the old file too, may hold 4 MiB together; web is free."""
    log, web = f"{folder}/log", f"{folder}/web"
    number = disks.project(log)
    yield number != 0, "`log` に project の番号がまだありません。`disks.limit` で付けられます。"
    yield disks.project(web) != number, "`web` も `log` と同じ project です。二つ合わせて 4 MiB になってしまいます。"
    limit = disks.usage(folder, number).limit
    yield limit != 0, "`log` の project に上限がありません。上限 0 は「限りなし」です。"
    yield limit == 4 * MIB, f"`log` の上限は {limit // 1024} KiB です。4 MiB にしてください。"
    yield os.path.exists(f"{log}/old"), "`log/old` を消してしまいました。大事な記録です。`check.shares` で作り直してください。"
    yield os.path.getsize(f"{log}/old") == 2 * MIB, "`log/old` の中身が欠けました。`check.shares` で作り直してください。"
    counted = disks.project(f"{log}/old") == number
    yield counted, "`log/old` が数に入っていません。番号を継ぐのは、番号を付けたあとに作られたファイルだけです。"
    written = process.call(_fill, f"{log}/fill", 16 * MIB)
    yield written < 3 * MIB, f"`log` に、`old` のほかに {written // 1024} KiB も書けました。"
    free = process.call(_fill, f"{web}/fill", 5 * MIB)
    yield free == 5 * MIB, f"`log` を埋めたあと、`web` に書けたのは {free // 1024} KiB だけでした。"
    return "`log` は、前からあった 2 MiB を含めて 4 MiB で止まりました。そのあとも `web` は自由に書けます。"


def _fill(path: str, most: int) -> int:
    """Write until the disk or the quota says no; how many bytes went in.  The file is removed again.

    Called in a child, which lets go of the capability that no quota stops.
    """
    sets = syscalls.capget()
    sets.effective &= ~(1 << CAP_SYS_RESOURCE)
    syscalls.capset(sets)
    try:
        with open(path, "wb", buffering=0) as file:
            return _write(file.fileno(), most)
    finally:
        os.unlink(path)


def _write(fd: int, most: int) -> int:
    done = 0
    while done < most:
        try:
            done += os.write(fd, bytes(min(64 << 10, most - done)))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            break
    return done
