"""The exercises of 03-image/03-registry."""

from __future__ import annotations

import json
import os
import zlib

from labs import image
from labs.check import Steps, exercise
from labs.errors import RegistryError
from labs.registry import Registry
from labs.registry_server import Server


@exercise
def fetched(data: bytes, server: Server, repository: str, tag: str) -> Steps:
    """The bytes of the top layer of an image, as they lie in the registry."""
    with Registry(server.host) as client:
        what, manifest = client.manifest(repository, tag)
    config, *_, layer = image.children(json.loads(manifest))
    yield isinstance(data, bytes), "欲しいのは層の中身（`bytes`）です。`answer.content` を入れてください。"
    yield data != manifest, "それは manifest です。その `layers` の最後の要素に、層の digest があります。"
    yield image.digest(data) != config.digest, "それは設定（config）の blob です。`layers` のほうの digest を使います。"
    others = {one.digest for one in image.children(json.loads(manifest))[1:-1]}
    yield image.digest(data) not in others, "それは下の層です。`layers` は下から順に並ぶので、一番上は最後の要素です。"
    with open(server.blob(layer.digest), "rb") as file:
        stored = file.read()
    yield data != zlib.decompress(stored, 31), "それは伸長したあとの tar です。digest は、送られてきた（gzip の）ままのバイト列から計算します。"
    yield not (stored.startswith(data) and data != stored), f"途中までしかありません（{len(data)} / {layer.size} バイト）。`Range` を付けて続きを取りましょう。"
    yield image.digest(data) == layer.digest, f"digest が違います。`{repository}:{tag}` の manifest `{what.digest[:15]}…` から、もう一度たどってください。"
    return "届いたバイト列の digest が、頼んだ名前と同じです。名前が中身を証明するので、どの経路で届いたかは問題になりません。"


@exercise
def retagged(server: Server, repository: str, old: str, new: str, since: int) -> Steps:
    """A second tag on the same manifest, with no byte of a layer sent since that line of the access log."""
    with Registry(server.host) as client:
        wanted, found = client.head(repository, old), client.head(repository, new)
    yield wanted is not None, f"元の `{repository}:{old}` がなくなっています。上のセルからやり直してください。"
    yield found is not None, f"まだ `{repository}:{new}` がありません。manifest を `PUT /v2/{repository}/manifests/{new}` で置きます。"
    same = found is not None and wanted is not None and found.digest == wanted.digest
    yield same, "tag は付きましたが、digest が違います。`answer.json()` を書き直すと空白や順番が変わるので、`answer.content` をそのまま送ります。"
    sent = [one for one in server.requests(since) if one.what == "upload" or (one.what == "blob" and one.method == "GET")]
    yield not sent, f"記録に blob への要求（`{sent[0].method if sent else ''}`）があります。blob はもうそこにあるので、manifest だけで足ります。"
    return "tag は manifest を指す短い札です。何ギガバイトのイメージでも、名前を増やすには manifest を一つ置けば足ります。"


@exercise
def freed(server: Server, repository: str, keep: str, drop: str, digest: str) -> Steps:
    """The blob that only `drop` needed is off the disk, and all that `keep` needs is there."""
    with Registry(server.host) as client:
        tags = client.tags(repository) if os.path.isdir(f"{server.root}/docker/registry/v2/repositories/{repository}") else []
        yield keep in tags, f"残すはずの `{keep}` まで消えました。同じ manifest を指す tag は、manifest と一緒に消えます。"
        yield drop not in tags, f"まだ `{drop}` があります。tag ではなく、それが指す manifest の digest を `DELETE` に渡します。"
        yield not os.path.exists(server.blob(digest)), "manifest は消えましたが、blob はまだディスクにあります。`server.garbage_collect()` を呼んでください。"
        missing = _missing(server, client, repository, keep)
    yield not missing, f"`{keep}` に要る blob までなくなりました（{missing} 個）。上のセルからやり直してください。"
    return "消えたのは、どの manifest からも指されなくなった blob だけです。共有している下の層は残っています。"


def _missing(server: Server, client: Registry, repository: str, tag: str) -> int:
    """How many blobs of an image are not on the registry's disk."""
    try:
        _, manifest = client.manifest(repository, tag)
    except RegistryError:
        return 1
    return sum(not os.path.exists(server.blob(one.digest)) for one in image.children(json.loads(manifest)))
