"""The exercises of 03-image/04-build."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from labs import image, process
from labs.build import Built, build
from labs.check import Steps, exercise
from labs.dockerfile import DockerfileError

EPOCH = 1_700_000_000
NO_BUILD = "ビルドできませんでした。`{}`"


@contextmanager
def _copy(context: str) -> Iterator[str]:
    """A copy of a context that may be changed."""
    with tempfile.TemporaryDirectory(prefix="labs-check-") as folder:
        shutil.copytree(context, f"{folder}/context", symlinks=True)
        yield f"{folder}/context"


def _write(context: str, name: str, text: str) -> None:
    with open(f"{context}/{name}", "w", encoding="utf-8") as file:
        file.write(text)


def _build(text: str, context: str, layout: image.Layout, epoch: int | None = None, cache: bool = True) -> Built | str:
    """Build a Dockerfile's text, or what was wrong with it."""
    _write(context, "Dockerfile", text)
    try:
        return build(context, layout, "check", epoch=epoch, cache=cache)
    except DockerfileError as error:
        return str(error).splitlines()[0]
    finally:
        if "check" in layout.names():
            layout.untag("check")


def _content(layout: image.Layout, made: image.Image, path: str) -> bytes | None:
    """What the uppermost layer that has a file has in it."""
    for layer in reversed(made.layers):
        with tarfile.open(layout.blob(layer.digest)) as tar:
            for member in tar:
                if member.name == path and (file := tar.extractfile(member)):
                    return file.read()
    return None


@exercise
def order(text: str, context: str, layout: image.Layout) -> Steps:
    """A Dockerfile in which a change of app.sh leaves the layer of the installation in the cache."""
    with _copy(context) as folder:
        first = _build(text, folder, layout)
        yield not isinstance(first, str), NO_BUILD.format(first)
        assert isinstance(first, Built)
        installed = _content(layout, first.image, "app/installed")
        yield installed is not None, "`/app/installed` がイメージにありません。`RUN sort requirements.txt > installed` は残してください。"
        yield _content(layout, first.image, "app/app.sh") is not None, "`/app/app.sh` がイメージにありません。どこかでコピーしてください。"
        _write(folder, "app.sh", "echo changed\n")
        second = _build(text, folder, layout)
        assert isinstance(second, Built)
        changed = _content(layout, second.image, "app/app.sh") == b"echo changed\n"
        yield changed, "`app.sh` を書き換えたのに、イメージの中身が変わりません。コンテキストの `app.sh` をコピーしてください。"
        runs = [step.cached for step in second.steps if step.text.upper().startswith("RUN") and "installed" in step.text]
        yield all(runs), "`app.sh` を変えると、`RUN` の鍵も変わります。`RUN` より前の `COPY` に、`app.sh` を含めないでください。"
        _write(folder, "requirements.txt", "other\n")
        third = _build(text, folder, layout)
        assert isinstance(third, Built)
        follows = _content(layout, third.image, "app/installed") == b"other\n"
        yield follows, "`requirements.txt` を変えても、`installed` が変わりません。`RUN` の前に、`requirements.txt` だけをコピーしてください。"
    return "`RUN` の鍵は、その前にコピーしたものだけで決まります。`app.sh` はあとから来るので、鍵に入りません。"


@exercise
def recovered(answer: object, layout: image.Layout, made: image.Image, path: str) -> Steps:
    """The content of a file that a later layer removed."""
    secret = _content(layout, made, path)
    given = answer.encode() if isinstance(answer, str) else answer
    yield isinstance(given, bytes), "答えは、取り出した中身（`bytes` か文字列）にしてください。"
    assert isinstance(given, bytes)
    yield given != b"", "空です。`.wh.` で始まる名前は、消したという印で、中身はありません。一つ下の層を開いてください。"
    yield given.strip() == (secret or b"").strip(), f"`{path}` の中身ではありません。名前が `{path}` のエントリを、どの層が持っているか調べてください。"
    return "消す `RUN` より前の層は、消したあとも、そのまま配られます。"


@exercise
def reproducible(text: str, context: str, layout: image.Layout) -> Steps:
    """A Dockerfile that gives the same digest twice, and still says in /built when it was made."""
    with _copy(context) as folder:
        first = _build(text, folder, layout, EPOCH, cache=False)
        yield not isinstance(first, str), NO_BUILD.format(first)
        assert isinstance(first, Built)
        stamp = _content(layout, first.image, "built")
        yield bool(stamp), "`/built` がありません（または空です）。日時を書く `RUN` は残してください。"
        start = int(time.time())
        process.until(lambda: int(time.time()) > start, what="the next second")
        os.utime(f"{folder}/app.sh")
        second = _build(text, folder, layout, EPOCH, cache=False)
        assert isinstance(second, Built)
        same = _content(layout, second.image, "built") == stamp
        yield same, "二度のビルドで `/built` の中身が違います。`date` に、今の時刻ではなく `SOURCE_DATE_EPOCH` を渡してください。"
        fixed = b"2023" in (stamp or b"")
        yield fixed, "二度とも同じですが、`/built` が `SOURCE_DATE_EPOCH`（2023 年）の日時ではありません。`ARG SOURCE_DATE_EPOCH` で受け取れます。"
        equal = first.image.manifest.digest == second.image.manifest.digest
        yield equal, "`/built` は同じですが、digest が違います。ほかにも、実行するたびに変わるものを書いています。"
    return "時刻を外から渡したので、いつ、何度作っても同じ digest です。"
