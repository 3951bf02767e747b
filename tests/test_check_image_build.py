"""The exercises of 03-image/04-build: each hint is given for the answer it is meant for."""

import pytest

from labs import build, image
from labs.check import image_build as check

LAB = image.Layout("/opt/labs/images")
FIRST = """FROM busybox
WORKDIR /app
COPY . .
RUN sort requirements.txt > installed
"""
GOOD = """FROM busybox
WORKDIR /app
COPY requirements.txt .
RUN sort requirements.txt > installed
COPY . .
"""
STAMPED = "FROM busybox\nARG SOURCE_DATE_EPOCH\nRUN date -u -d @$SOURCE_DATE_EPOCH > /built\n"


@pytest.fixture
def context(tmp_path):
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "requirements.txt").write_text("b\na\n")
    (folder / "app.sh").write_text("echo hello\n")
    return str(folder)


@pytest.fixture
def layout(tmp_path):
    made = image.Layout.create(tmp_path / "layout")
    image.copy(LAB, "busybox", made)
    return made


@pytest.mark.parametrize(("text", "hint"), [
    ("FROM busybox\nRUM x", "ビルドできませんでした"), ("FROM busybox\nRUN false", "exit code 1"),
    ("FROM busybox\nCOPY . /app/", "`/app/installed` がイメージにありません"),
    (GOOD.replace("COPY . .\n", ""), "`/app/app.sh` がイメージにありません"),
    (GOOD.replace("COPY . .", "RUN echo x > app.sh"), "イメージの中身が変わりません"),
    (FIRST, "`RUN` の鍵も変わります"),
    (GOOD.replace("COPY requirements.txt .\nRUN sort requirements.txt > installed", "RUN echo a > installed"),
     "`requirements.txt` を変えても")])
def test_hints_of_order(context, layout, text, hint):
    verdict = check.order(text, context, layout)
    assert not verdict and hint in verdict.message
    assert layout.names() == ["busybox"]


def test_order_is_solved(context, layout):
    assert check.order(GOOD, context, layout)


@pytest.mark.parametrize(("answer", "hint"), [
    (7, "`bytes` か文字列"), (b"", "空です"), ("something", "`root/key` の中身ではありません")])
def test_hints_and_solution_of_recovered(context, layout, answer, hint):
    with open(f"{context}/Dockerfile", "w", encoding="utf-8") as file:
        file.write("FROM busybox\nRUN echo hunter2 > /root/key\nRUN rm /root/key\n")
    made = build.build(context, layout, "leaky").image
    verdict = check.recovered(answer, layout, made, "root/key")
    assert not verdict and hint in verdict.message
    assert check.recovered(b"hunter2\n", layout, made, "root/key")
    assert check.recovered("hunter2", layout, made, "root/key")


@pytest.mark.parametrize(("text", "hint"), [
    ("FROM no", "ビルドできませんでした"), ("FROM busybox\nRUN true", "`/built` がありません"),
    ("FROM busybox\nRUN date > /built", "中身が違います"), ("FROM busybox\nRUN echo now > /built", "2023 年"),
    (STAMPED + "RUN cat /proc/sys/kernel/random/uuid > /id", "digest が違います")])
def test_hints_of_reproducible(context, layout, text, hint):
    verdict = check.reproducible(text, context, layout)
    assert not verdict and hint in verdict.message


def test_reproducible_is_solved(context, layout):
    assert check.reproducible(STAMPED, context, layout)
