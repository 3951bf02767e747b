"""The exercises of 03-image/03-registry: each wrong state gives its hint, the solution passes."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import image, registry, registry_server
from labs.check import Verdict
from labs.check import image_registry as check
from labs.image import Layout


def hint(verdict: Verdict, part: str) -> None:
    assert not verdict
    assert part in verdict.message


@pytest.fixture
def server(tmp_path: Path) -> Iterator[registry_server.Server]:
    """Two images in the repository app: v1 and v2, with the same lower layer."""
    with registry_server.serve(under=str(tmp_path)) as running, registry.Registry(running.host) as client:
        layout = layout_of(tmp_path)
        for name in ("v1", "v2"):
            registry.push(client, "app", name, layout, name)
        yield running


def layout_of(tmp_path: Path) -> Layout:
    layout = Layout.create(tmp_path / "layout")
    for name in ("v1", "v2"):
        texts = [b"shared", f"only {name}".encode()]
        blobs = [layout.add(gzip.compress(text, mtime=0), image.LAYER + "+gzip") for text in texts]
        layers = list(zip(blobs, map(image.digest, texts), strict=True))
        image.add_image(layout, layers, name=name)
    return layout


def test_fetched(server: registry_server.Server, tmp_path: Path) -> None:
    layout = layout_of(tmp_path)
    one = image.load(layout, "v1")
    config, lower, upper = (Path(layout.blob(part.digest)).read_bytes() for part in (one.config, *one.layers))
    for answer, part in [
        (..., "まだ答えが"), (one.layers[1].digest, "bytes"), (layout.read(one.manifest), "それは manifest です"),
        (config, "設定（config）"), (lower, "下の層"), (gzip.decompress(upper), "伸長したあと"),
        (upper[:10], "途中まで"), (b"something", "digest が違います"),
    ]:
        hint(check.fetched(answer, server, "app", "v1"), part)  # type: ignore[arg-type]
    assert check.fetched(upper, server, "app", "v1")


def test_retagged(server: registry_server.Server, tmp_path: Path) -> None:
    layout, since = layout_of(tmp_path), len(server.requests())
    with registry.Registry(server.host) as client:
        what, data = client.manifest("app", "v1")
        hint(check.retagged(server, "app", "none", "copy", since), "元の")
        hint(check.retagged(server, "app", "v1", "copy", since), "まだ `app:copy`")
        client.put_manifest("app", "copy", json.dumps(json.loads(data), indent=1).encode(), what.media_type)
        hint(check.retagged(server, "app", "v1", "copy", since), "digest が違います")
        client.put_manifest("app", "copy", data, what.media_type)
        assert check.retagged(server, "app", "v1", "copy", since)
        registry.pull(client, "app", "v1", Layout.create(tmp_path / "pulled"))
        hint(check.retagged(server, "app", "v1", "copy", since), "`GET`")
        since = len(server.requests())
        client.push_blob("app", layout.add(b"more", image.LAYER), layout)
        hint(check.retagged(server, "app", "v1", "copy", since), "`POST`")


def test_freed(server: registry_server.Server, tmp_path: Path) -> None:
    layout = layout_of(tmp_path)
    only = image.load(layout, "v2").layers[1].digest
    with registry.Registry(server.host) as client:
        hint(check.freed(server, "app", "v1", "v2", only), "まだ `v2` があります")
        client.delete("app", image.load(layout, "v2").manifest.digest)
        hint(check.freed(server, "app", "v1", "v2", only), "garbage_collect")
        server.garbage_collect()
        assert check.freed(server, "app", "v1", "v2", only)
        os.unlink(server.blob(image.load(layout, "v1").layers[0].digest))
        hint(check.freed(server, "app", "v1", "v2", only), "（1 個）")
        manifest = Path(server.blob(image.load(layout, "v1").manifest.digest))
        manifest.rename(f"{manifest}.away")
        hint(check.freed(server, "app", "v1", "v2", only), "（1 個）")
        Path(f"{manifest}.away").rename(manifest)
        client.delete("app", image.load(layout, "v1").manifest.digest)
        hint(check.freed(server, "app", "v1", "v2", only), "`v1` まで消えました")
    hint(check.freed(server, "nothing", "v1", "v2", only), "`v1` まで消えました")
