"""The exercises of 03-image/02-oci-image: each wrong state gives its hint."""

import os
import stat
from copy import deepcopy

import pytest

from labs import image
from labs.check import UNANSWERED
from labs.check import image_oci as check
from labs.image import Platform


@pytest.fixture
def layout(tmp_path):
    return image.Layout.create(tmp_path / "layout")


def layer(layout, folder, files):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return image.add_layer(layout, str(folder), epoch=0)


@pytest.fixture
def fat(layout, tmp_path):
    """A large file that the second layer removes, and a small one that the third replaces."""
    first = layer(layout, tmp_path / "first", {"big": "x" * 1000, "small": "x", "kept": "k"})
    second = layer(layout, tmp_path / "second", {"other": "o"})
    (tmp_path / "third").mkdir()
    os.mknod(tmp_path / "third/big", stat.S_IFCHR, 0)
    third = layer(layout, tmp_path / "third", {"small": "y"})
    image.add_image(layout, [first, second, third], name="fat")
    return layout


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (..., UNANSWERED),
        (1, "番号とパスの組"),
        ((1, "kept"), "いまも見えている"),
        ((1, "nowhere"), "どの layer のファイルでもありません"),
        ((1, "small"), "もっと大きい"),
        ((3, "big"), "隠した側"),
        ((2, "big"), "layer 2 にはありません"),
    ],
)
def test_waste_hints(fat, answer, hint):
    verdict = check.waste(fat, "fat", answer)
    assert not verdict
    assert hint in verdict.message


def test_waste_passes(fat):
    assert "layer 3 でも、1000 B は layer 1" in check.waste(fat, "fat", (1, "/big")).message
    assert check.waste(fat, "fat", (1, "big"))


@pytest.fixture
def entries(layout, tmp_path):
    """Index entries of two images, by architecture."""
    found = {}
    for architecture in ("amd64", "riscv64"):
        part = layer(layout, tmp_path / architecture, {"what": architecture})
        made = image.add_image(layout, [part], platform=Platform("linux", architecture))
        found[architecture] = {**made.manifest.json(), "platform": {"os": "linux", "architecture": architecture}}
    return found


def index(*manifests):
    return {"schemaVersion": 2, "mediaType": image.INDEX, "manifests": list(manifests)}


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda amd, riscv: {"manifests": []}, "スキーマが断りました。`$: 'schemaVersion'"),
        (lambda amd, riscv: index(without(amd, "size"), riscv), "スキーマ"),
        (lambda amd, riscv: index(amd, without(riscv, "platform")), "`platform` のない"),
        (lambda amd, riscv: index(amd), "`riscv64` のための項目がありません"),
        (lambda amd, riscv: index(amd, {**riscv, "digest": image.digest(b"")}), "`manifests[1].digest` の blob"),
        (lambda amd, riscv: index(amd, {**riscv, "digest": "sha256:abc"}), "`manifests[1].digest` の blob"),
        (lambda amd, riscv: index({**amd, "size": 1}, riscv), "`manifests[0].size`"),
        (lambda amd, riscv: index({**amd, "mediaType": image.LAYER}, riscv), "`manifests[0].mediaType`"),
        (lambda amd, riscv: index(amd, {**amd, "platform": riscv["platform"]}), "config には、`amd64`"),
        (lambda amd, riscv: index(amd, {**riscv, "platform": {**riscv["platform"], "os": "plan9"}}), "skopeo が断り"),
    ],
)
def test_platforms_hints(layout, entries, change, hint):
    verdict = check.platforms(layout, change(*entries.values()))
    assert not verdict
    assert hint in verdict.message
    assert layout.names() == []


def test_platforms_passes_and_leaves_no_name(layout, entries):
    assert check.platforms(layout, index(*entries.values()))
    assert layout.names() == []


@pytest.fixture
def manifest(layout, tmp_path):
    parts = [layer(layout, tmp_path / name, {name: name}) for name in ("a", "b")]
    return image.parse(layout.read(image.add_image(layout, parts).manifest), "manifest")


def changed(manifest, *path):
    *path, last, value = path
    config = deepcopy(manifest)
    inner = config
    for key in path:
        inner = inner[key]
    inner[last] = value
    return config


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda good: ..., UNANSWERED),
        (lambda good: without(good, "config"), "スキーマが断りました。`$: 'config'"),
        (lambda good: changed(good, "config", "digest", image.digest(b"")), "`config.digest` の blob"),
        (lambda good: changed(good, "config", "size", 1), "`config.size` は 1"),
        (lambda good: changed(good, "layers", 1, "size", 1), "`layers[1].size` は 1"),
        (lambda good: changed(good, "layers", 0, "mediaType", image.LAYER + "+zstd"), "先頭の二バイト"),
        (lambda good: changed(good, "layers", good["layers"][:1]), "layer が 2 枚だと言い、manifest は 1 枚"),
        (lambda good: changed(good, "layers", good["layers"][::-1]), "順番が違います"),
        (lambda good: changed(good, "layers", good["layers"][:1] * 2), "diffID が"),
    ],
)
def test_mended_hints(layout, manifest, change, hint):
    verdict = check.mended(layout, change(manifest))
    assert not verdict
    assert hint in verdict.message


def test_mended_says_what_unpacking_said(layout, tmp_path):
    data = b"no tar" * 200
    broken = image.add_image(layout, [(layout.add(data, image.LAYER), image.digest(data))])
    assert "展開できませんでした" in check.mended(layout, image.parse(layout.read(broken.manifest), "manifest")).message


def test_mended_passes(layout, manifest):
    assert check.mended(layout, manifest)
