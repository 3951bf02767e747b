"""The exercises of 03-image/02-oci-image."""

from __future__ import annotations

import os
import subprocess
import tempfile
from typing import Any

from labs import explore
from labs.check import Steps, exercise
from labs.errors import BadInput, Mismatch
from labs.image import INDEX, LAYER, MANIFEST, Layout, children, descriptor, digest, load, parse, unpack
from labs.layer import decompressed
from labs.oci_schema import errors

NAME = "labs-exercise"
MAGIC = {b"\x1f\x8b": LAYER + "+gzip", b"\x28\xb5": LAYER + "+zstd"}


@exercise
def waste(layout: Layout, name: str, answer: tuple[int, str]) -> Steps:
    """The layer that holds the largest file that nobody can see, and the file's path."""
    yield isinstance(answer, tuple) and len(answer) == 2, "答えは、layer の番号とパスの組 `(番号, パス)` で書いてください。"
    number, path = answer[0], str(answer[1]).lstrip("/")
    hidden, seen = explore.waste(layout, name), explore.layers(layout, name)[-1].tree
    yield path in {one.path for one in hidden} or path not in seen, f"`{path}` は、いちばん上からいまも見えているファイルです。むだになったのは、もう見えないのに layer に残っているものです。"
    yield path in {one.path for one in hidden}, f"`{path}` は、どの layer のファイルでもありません。図で `wasted` と書かれた行を探してください。"
    largest = hidden[0]
    yield path == largest.path, f"`{path}` も確かにむだですが、もっと大きいものがあります。"
    yield number != largest.by, f"layer {number} は `{path}` を隠した側です。そこには小さな whiteout が入っているだけで、中身のバイトは別の layer に残っています。"
    yield number == largest.layer, f"`{path}` の中身は layer {number} にはありません。"
    return f"消したのは layer {largest.by} でも、{explore.size(largest.size)} は layer {largest.layer} に残り、運ばれ続けます。"


@exercise
def platforms(layout: Layout, index: dict[str, Any], wanted: tuple[str, ...] = ("amd64", "riscv64")) -> Steps:
    """An index of several platforms that tells the truth, so that skopeo finds its way through it."""
    wrong = errors(index, "image-index-schema.json", "image-spec")
    yield not wrong, f"スキーマが断りました。`{wrong[0] if wrong else ''}`"
    there = [one.get("platform", {}).get("architecture") for one in index["manifests"]]
    yield None not in there, "`platform` のない項目があります。スキーマは通りますが、どの機械のためのものか、誰にも選べません。"
    missing = [one for one in wanted if one not in there]
    yield not missing, f"`{' '.join(missing)}` のための項目がありません。"
    for number, architecture in enumerate(there):
        one = index["manifests"][number]
        yield _has(layout, one["digest"]), f"`manifests[{number}].digest` の blob が、layout にありません。digest は、指す先のファイルの名前です。"
        size = os.path.getsize(layout.blob(one["digest"]))
        yield one["size"] == size, f"`manifests[{number}].size` が、指す先の大きさと違います。"
        yield one["mediaType"] == MANIFEST, f"`manifests[{number}].mediaType` が、manifest のものではありません。"
        inside = load(layout, descriptor(one, f"manifests[{number}]")).settings["architecture"]
        yield inside == architecture, f"`{architecture}` と書いた項目の先の config には、`{inside}` と書いてあります。ラベルだけ貼り替えても、中身は変わりません。"
    layout.tag(NAME, layout.add_json(index, INDEX))
    try:
        for architecture in wanted:
            asked = ["skopeo", "inspect", "--override-os", "linux", "--override-arch", architecture, f"oci:{layout.path}:{NAME}"]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            yield done.returncode == 0, f"skopeo が断りました。`{done.stderr.strip()}`"
    finally:
        layout.untag(NAME)
    return "skopeo も、機械ごとに正しい manifest を選びました。"


@exercise
def mended(layout: Layout, manifest: dict[str, Any]) -> Steps:
    """A manifest in which every descriptor says what is there, in the order of the configuration's diffIDs."""
    wrong = errors(manifest, "image-manifest-schema.json", "image-spec")
    yield not wrong, f"スキーマが断りました。`{wrong[0] if wrong else ''}`"
    for field, one in [("config", manifest["config"]), *((f"layers[{n}]", part) for n, part in enumerate(manifest["layers"]))]:
        yield _has(layout, one["digest"]), f"`{field}.digest` の blob が、layout にありません。"
        size = os.path.getsize(layout.blob(one["digest"]))
        yield one["size"] == size, f"`{field}.size` は {one['size']} ですが、その digest のファイルの大きさは違います。"
    for number, one in enumerate(manifest["layers"]):
        with layout.open(one["digest"]) as file:
            kind = MAGIC.get(file.read(2), LAYER)
        yield one["mediaType"] == kind, f"`layers[{number}].mediaType` は `{one['mediaType']}` ですが、先頭の二バイトは別の形式だと言っています。"
    config, *parts = children(manifest)
    expected = parse(layout.read(config), "config")["rootfs"]["diff_ids"]
    found = [_diff_id(layout, one.digest) for one in parts]
    yield len(found) == len(expected), f"config は layer が {len(expected)} 枚だと言い、manifest は {len(found)} 枚を並べています。"
    yield found == expected or sorted(found) != sorted(expected), "layer はそろっていますが、順番が違います。config の `diff_ids` が、下から順に並んでいます。"
    yield found == expected, "ほどいた layer の diffID が、config の言うものと合いません。"
    with tempfile.TemporaryDirectory(prefix="labs-exercise-") as folder:
        try:
            unpack(layout, load(layout, layout.add_json(manifest, MANIFEST)), f"{folder}/root")
        except (BadInput, Mismatch) as error:
            yield False, f"展開できませんでした。`{error}`"
    return "どの矢印も、指す先の大きさと中身のとおりになりました。"


def _has(layout: Layout, name: object) -> bool:
    try:
        return layout.has(str(name))
    except BadInput:
        return False


def _diff_id(layout: Layout, name: str) -> str:
    with layout.open(name) as file:
        return digest(decompressed(file).read())
