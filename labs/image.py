"""Images: blobs named by what is in them, and the few JSON documents that lead from a name to the layers.

An image is a manifest, its configuration and its layers, each named by the digest of its bytes
(image-spec: descriptor.md, manifest.md, config.md).  A directory of such blobs with an index of names is an image
layout (image-layout.md).  A blob enters a layout only after its size and digest were checked.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

import zstandard

from labs import layer, machine
from labs.errors import BadInput, Mismatch
from labs.oci_schema import errors as schema_errors

# image-spec/media-types.md; Docker's own are from before the specification and mean the same.
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES, MANIFESTS = (INDEX, DOCKER_INDEX), (MANIFEST, DOCKER_MANIFEST)
LAYERS = (LAYER, LAYER + "+gzip", LAYER + "+zstd", "application/vnd.docker.image.rootfs.diff.tar.gzip",
          "application/vnd.docker.image.rootfs.diff.tar")
NAME = "org.opencontainers.image.ref.name"
MANIFEST_LIMIT = 4 << 20  # distribution-spec/spec.md, "Pushing Manifests": at least this much is to be taken
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


class Platform(NamedTuple):
    """What an image is for, in Go's words: "linux", "amd64" or "arm64", and maybe a variant such as "v8"."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, self))


HOST = Platform("linux", ARCHITECTURES.get(os.uname().machine, os.uname().machine))


class Descriptor(NamedTuple):
    """A typed pointer: what kind of bytes, their digest, how many they are (image-spec/descriptor.md)."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = {}
    platform: Platform | None = None
    artifact_type: str = ""

    def json(self) -> dict[str, Any]:
        """As it stands in an index or a manifest."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        if self.platform:
            value["platform"] = {key: text for key, text in self.platform._asdict().items() if text}
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        return value


def descriptor(value: Any, field: str) -> Descriptor:
    """A descriptor from JSON; BadInput with the field, the value and the rule it breaks."""
    if not isinstance(value, dict):
        raise BadInput(field, value, "must be a descriptor: an object")
    media_type, size, where = value.get("mediaType"), value.get("size"), value.get("platform")
    if not isinstance(media_type, str) or not media_type:
        raise BadInput(f"{field}.mediaType", media_type, "must be a media type")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise BadInput(f"{field}.size", size, "must be a number of bytes")
    notes = value.get("annotations") or {}
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise BadInput(f"{field}.annotations", notes, "must be texts by name")
    platform = None
    if isinstance(where, dict):
        platform = Platform(*(str(where.get(key, "")) for key in Platform._fields))
    digest_ = check_digest(value.get("digest"), f"{field}.digest")
    return Descriptor(media_type, digest_, size, notes, platform, str(value.get("artifactType") or ""))


def digest(data: bytes) -> str:
    """The name of these bytes: "sha256:" and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(text: object, field: str = "digest") -> str:
    """A digest in one of the registered algorithms, well formed; it becomes a file name, so nothing else may pass."""
    if not isinstance(text, str) or not DIGEST.fullmatch(text):
        raise BadInput(field, text, "must be sha256: and 64, or sha512: and 128 lower-case hexadecimal digits")
    return text


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The name of each stack of layers: ChainID of image-spec/config.md, lowest layer first."""
    chains: list[str] = []
    for diff_id in diff_ids:
        chains.append(digest(f"{chains[-1]} {diff_id}".encode()) if chains else diff_id)
    return chains


def canonical(value: object) -> bytes:
    """JSON without white space and in order of the keys: the same value is always the same bytes."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()


class Incoming:
    """A blob on its way in; offset says how many bytes of it an earlier attempt left."""

    def __init__(self, path: str, expected: Descriptor | None) -> None:
        self.path, self.expected = path, expected
        algorithm = expected.digest.partition(":")[0] if expected else "sha256"
        self._hash = hashlib.new(algorithm)
        self._file = open(path, "ab")  # noqa: SIM115  closed by Layout.incoming
        with open(path, "rb") as earlier:
            while data := earlier.read(layer.BLOCK):
                self._hash.update(data)
        self.offset = self._file.tell()

    def write(self, data: bytes) -> int:
        """Take more bytes; Mismatch at the first one too many."""
        if self.expected and self.offset + len(data) > self.expected.size:
            raise Mismatch("blob", "size", self.expected.size, f"at least {self.offset + len(data)}")
        self._hash.update(data)
        self.offset += len(data)
        return self._file.write(data)

    def restart(self) -> None:
        """Throw away what is there: the sender begins anew."""
        self._file.truncate(0)
        self._hash, self.offset = hashlib.new(self._hash.name), 0

    @property
    def digest(self) -> str:
        """The digest of what is there."""
        return f"{self._hash.name}:{self._hash.hexdigest()}"

    def check(self) -> None:
        """Raise Mismatch unless size and digest are those expected."""
        if self.expected and self.offset != self.expected.size:
            raise Mismatch("blob", "size", self.expected.size, self.offset)
        if self.expected and self.digest != self.expected.digest:
            raise Mismatch("blob", "digest", self.expected.digest, self.digest)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()


class Layout:
    """An image layout: blobs/ALGORITHM/DIGITS, index.json, oci-layout (image-spec/image-layout.md).

    What is only partly here stands in partial/, which the specification leaves to us.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(f"{self.path}/oci-layout", encoding="utf-8") as file:
                version = json.load(file).get("imageLayoutVersion")
        except (OSError, ValueError, AttributeError) as error:
            raise BadInput("layout", self.path, "must be a directory with a file oci-layout") from error
        if version != "1.0.0":
            raise BadInput("layout", version, "imageLayoutVersion must be 1.0.0")

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Layout:
        """An empty layout in a new or empty directory; the one that is there, if it is one."""
        os.makedirs(f"{os.fspath(path)}/blobs/sha256", exist_ok=True)
        if not os.path.exists(f"{os.fspath(path)}/oci-layout"):
            index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
            _replace(f"{os.fspath(path)}/index.json", canonical(index))
            _replace(f"{os.fspath(path)}/oci-layout", canonical({"imageLayoutVersion": "1.0.0"}))
        return cls(path)

    def blob(self, name: str) -> str:
        """Where the blob of that digest is, or would be."""
        algorithm, _, digits = check_digest(name).partition(":")
        return f"{self.path}/blobs/{algorithm}/{digits}"

    def has(self, name: str) -> bool:
        """Whether the blob of that digest is here."""
        return os.path.isfile(self.blob(name))

    def open(self, name: str) -> BinaryIO:
        """The blob of that digest, opened; BadInput where it is not here."""
        try:
            return open(self.blob(name), "rb")
        except FileNotFoundError as error:
            raise BadInput("digest", name, "no such blob in the layout") from error

    def read(self, what: Descriptor, limit: int = MANIFEST_LIMIT) -> bytes:
        """A small blob, checked against its descriptor."""
        if what.size > limit:
            raise BadInput("size", what.size, f"must not be over {limit} bytes")
        with self.open(what.digest) as file:
            data = file.read(what.size + 1)
        if len(data) != what.size:
            raise Mismatch("blob", "size", what.size, os.path.getsize(self.blob(what.digest)))
        found = f"{what.digest.partition(':')[0]}:{hashlib.new(what.digest.partition(':')[0], data).hexdigest()}"
        if found != what.digest:
            raise Mismatch("blob", "digest", what.digest, found)
        return data

    @contextmanager
    def incoming(self, expected: Descriptor | None = None) -> Iterator[Incoming]:
        """Take in a blob: it is checked and in its place at the end of the block, or not here at all.

        With expected, what an interrupted block has written stays in partial/, and the next block goes on there;
        what turned out to be wrong does not stay.
        """
        folder = f"{self.path}/partial"
        os.makedirs(folder, exist_ok=True)
        name = expected.digest.replace(":", "-") if expected else f"new-{os.urandom(6).hex()}"
        blob = Incoming(f"{folder}/{name}", expected)
        keep = False
        try:
            yield blob
            blob.check()
            blob.close()
            os.makedirs(os.path.dirname(self.blob(blob.digest)), exist_ok=True)
            os.rename(blob.path, self.blob(blob.digest))
        except Mismatch:
            raise
        except BaseException:
            keep = expected is not None
            raise
        finally:
            blob.close()
            if not keep and os.path.exists(blob.path):
                os.unlink(blob.path)
            if not os.listdir(folder):
                os.rmdir(folder)

    def add(self, data: bytes, media_type: str, **more: Any) -> Descriptor:
        """Put bytes in as a blob; more: the other fields of its Descriptor."""
        with self.incoming() as blob:
            blob.write(data)
        return Descriptor(media_type, blob.digest, len(data), **more)

    def add_json(self, value: object, media_type: str, **more: Any) -> Descriptor:
        """Put a JSON document in as a blob, in canonical form."""
        return self.add(canonical(value), media_type, **more)

    def index(self) -> list[Descriptor]:
        """What index.json names, in its order."""
        with open(f"{self.path}/index.json", "rb") as file:
            value = parse(file.read(), "index.json")
        check(value, "image-index-schema.json", "index.json")
        return [descriptor(one, f"manifests[{n}]") for n, one in enumerate(value["manifests"])]

    def names(self) -> list[str]:
        """The names of the images here."""
        return [one.annotations[NAME] for one in self.index() if NAME in one.annotations]

    def find(self, name: str) -> Descriptor:
        """What a name (or a digest) in index.json points to."""
        for one in self.index():
            if name in (one.annotations.get(NAME), one.digest):
                return one
        raise BadInput("image", name, f"must be one of {', '.join(self.names()) or 'none: the layout is empty'}")

    def tag(self, name: str, what: Descriptor) -> None:
        """Let a name point to a manifest or an index; it no longer points to what it did."""
        if not name or any(ord(letter) <= 32 for letter in name):
            raise BadInput("name", name, "must not be empty or have white space in it")
        others = [one for one in self.index() if one.annotations.get(NAME) != name]
        self._write_index([*others, what._replace(annotations={**what.annotations, NAME: name})])

    def untag(self, name: str) -> None:
        """Take a name away; blobs stay until gc()."""
        self.find(name)
        self._write_index([one for one in self.index() if one.annotations.get(NAME) != name])

    def _write_index(self, manifests: Iterable[Descriptor]) -> None:
        value = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [one.json() for one in manifests]}
        _replace(f"{self.path}/index.json", canonical(value))

    def reachable(self) -> set[str]:
        """The digests of every blob that a name leads to."""
        found: set[str] = set()
        waiting = self.index()
        while waiting:
            one = waiting.pop()
            if one.digest not in found:
                found.add(one.digest)
                if one.media_type in (*INDEXES, *MANIFESTS) and self.has(one.digest):
                    waiting += children(parse(self.read(one), one.media_type))
        return found

    def gc(self) -> list[str]:
        """Remove every blob that no name leads to; their digests."""
        kept, gone = self.reachable(), []
        for algorithm in os.listdir(f"{self.path}/blobs"):
            for digits in os.listdir(f"{self.path}/blobs/{algorithm}"):
                if f"{algorithm}:{digits}" not in kept:
                    os.unlink(f"{self.path}/blobs/{algorithm}/{digits}")
                    gone.append(f"{algorithm}:{digits}")
        return sorted(gone)


def _replace(path: str, data: bytes) -> None:
    """Write a file in one step: whoever reads it sees the old one or the new one."""
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.rename(file.name, path)


def parse(data: bytes, what: str) -> Any:
    """A JSON document, or BadInput."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(what, data[:40].decode("utf-8", "replace"), f"must be JSON: {error}") from error


def check(value: Any, schema: str, what: str) -> None:
    """Hold a document against a schema of the image specification; the first thing wrong is a BadInput."""
    found = schema_errors(value, schema, "image-spec")
    if found:
        field, _, rule = found[0].partition(": ")
        raise BadInput(what, field, rule)


def children(value: Mapping[str, Any]) -> list[Descriptor]:
    """The descriptors in a manifest or an index: what must be there before it means anything."""
    own = [("config", value["config"])] if "config" in value else []
    for key in ("layers", "manifests"):
        own += [(f"{key}[{n}]", one) for n, one in enumerate(value.get(key) or [])]
    return [descriptor(one, field) for field, one in own]


class Image(NamedTuple):
    """One image for one platform.

    Attributes:
        manifest, config, layers: descriptors, the lowest layer first.
        settings: the configuration as it stands: config.md.
    """

    manifest: Descriptor
    config: Descriptor
    layers: tuple[Descriptor, ...]
    settings: dict[str, Any]

    @property
    def diff_ids(self) -> list[str]:
        """The digest of each layer's tar, the lowest first."""
        return list(self.settings["rootfs"]["diff_ids"])

    @property
    def run(self) -> dict[str, Any]:
        """What a container of it runs by default: Env, Cmd, Entrypoint, User, WorkingDir and so on."""
        return self.settings.get("config") or {}


def choose(manifests: Sequence[Descriptor], platform: Platform = HOST) -> Descriptor:
    """The first entry of an index for a platform, an equal variant before others (image-index.md)."""
    fitting = [one for one in manifests if one.platform and one.platform[:2] == platform[:2]]
    fitting = [one for one in fitting if one.platform and one.platform.variant == platform.variant] or fitting
    if not fitting:
        there = ", ".join(sorted({str(one.platform) for one in manifests if one.platform})) or "none"
        raise BadInput("platform", str(platform), f"must be one that the index has: {there}")
    return fitting[0]


def load(layout: Layout, name: str | Descriptor, platform: Platform = HOST) -> Image:
    """Follow a name to an image: index, manifest, configuration, each checked by digest and by its schema."""
    one = layout.find(name) if isinstance(name, str) else name
    seen: set[str] = set()
    while one.media_type in INDEXES:
        if one.digest in seen:
            raise BadInput("index", one.digest, "must not lead to itself")
        seen.add(one.digest)
        value = parse(layout.read(one), "index")
        check(value, "image-index-schema.json", "index")
        one = choose(children(value), platform)
    if one.media_type not in MANIFESTS:
        raise BadInput("mediaType", one.media_type, f"must be an index or a manifest: {', '.join(INDEXES + MANIFESTS)}")
    value = parse(layout.read(one), "manifest")
    check(value, "image-manifest-schema.json", "manifest")
    config, *layers = children(value)
    settings = parse(layout.read(config), "config")
    check(settings, "config-schema.json", "config")
    image = Image(one, config, tuple(layers), settings)
    if len(image.diff_ids) != len(layers):
        raise BadInput("config.rootfs.diff_ids", len(image.diff_ids), f"must be as many as layers: {len(layers)}")
    for number, part in enumerate(layers):
        if part.media_type not in LAYERS:
            raise BadInput(f"layers[{number}].mediaType", part.media_type, f"must be one of {', '.join(LAYERS)}")
    return image


# Unpacking


def _verified(layout: Layout, image: Image, number: int, target: str, **options: Any) -> layer.Unpacked:
    """Unpack one layer and hold it against descriptor and diffID; raises after the fact, so target is thrown away."""
    part = image.layers[number]
    with layout.open(part.digest) as source:
        if (size := os.fstat(source.fileno()).st_size) != part.size:
            raise Mismatch(f"layers[{number}]", "size", part.size, size)
        done = layer.unpack(source, target, **options)
    if part.digest.startswith("sha256:") and done.digest != part.digest:
        raise Mismatch(f"layers[{number}]", "digest", part.digest, done.digest)
    if done.diff_id != image.diff_ids[number]:
        raise Mismatch(f"layers[{number}]", "diffID", image.diff_ids[number], done.diff_id)
    return done


@contextmanager
def _all_or_nothing(target: str) -> Iterator[str]:
    """A directory beside target that becomes target at the end of the block, or is gone."""
    if os.path.exists(target):
        raise BadInput("target", target, "must not be there yet")
    folder = tempfile.mkdtemp(prefix=".labs-", dir=os.path.dirname(os.path.abspath(target)))
    os.chmod(folder, 0o755)  # noqa: S103  the root directory of a container
    try:
        yield folder
        os.rename(folder, target)
    finally:
        if os.path.exists(folder):
            machine.remove_tree(folder)


def unpack(layout: Layout, image: Image, target: str, *, progress: Callable[[layer.Unpacked], object] = bool,
           **options: Any) -> str:
    """Unpack all layers onto one another into one new root file system; options are those of layer.unpack.

    All or nothing: target is there only when every layer had its digest, size and diffID.
    """
    with _all_or_nothing(target) as folder:
        for number in range(len(image.layers)):
            progress(_verified(layout, image, number, folder, whiteouts="apply", **options))
    return target


def unpack_layers(layout: Layout, image: Image, folder: str, *,
                  progress: Callable[[layer.Unpacked], object] = bool, **options: Any) -> list[str]:
    """Unpack each layer into a directory of its own, named by its chainID, that overlay can mount; lowest first.

    A directory that is there already was complete and checked when it got its name, and is used again.  The name is
    that of the whole stack: directories that a layer does not list are as the layers below have them.
    """
    os.makedirs(folder, exist_ok=True)
    targets = [f"{folder}/{chain_id.partition(':')[2][:16]}" for chain_id in chain_ids(image.diff_ids)]
    for number, target in enumerate(targets):
        if not os.path.exists(target):
            lower = targets[:number][::-1]
            with _all_or_nothing(target) as fresh:
                progress(_verified(layout, image, number, fresh, whiteouts="overlay", lower=lower, **options))
    return targets


# Making images


def add_layer(layout: Layout, upper: str, *, compression: str = "gzip", epoch: int | None = None,
              skip: Sequence[str] = ()) -> tuple[Descriptor, str]:
    """Pack an overlay's upper directory as a layer blob; its descriptor and its diffID.

    compression: "gzip" (without a time or a name in its header, so that the same tar gives the same blob), "zstd", "".
    """
    if compression not in ("gzip", "zstd", ""):
        raise BadInput("compression", compression, 'must be "gzip", "zstd" or ""')
    with layout.incoming() as blob, _compressor(blob, compression) as out:
        packed = layer.pack(upper, out, epoch=epoch, skip=skip)
    media_type = f"{LAYER}+{compression}" if compression else LAYER
    return Descriptor(media_type, blob.digest, blob.offset), packed.diff_id


@contextmanager
def _compressor(out: Any, compression: str) -> Iterator[Any]:
    if compression == "gzip":
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=out, mtime=0) as stream:
            yield stream
    elif compression == "zstd":
        with zstandard.ZstdCompressor(level=3).stream_writer(out, closefd=False) as stream:
            yield stream
    else:
        yield out


def add_image(layout: Layout, layers: Sequence[tuple[Descriptor, str]], *, config: Mapping[str, Any] | None = None,
              history: Sequence[Mapping[str, Any]] = (), platform: Platform = HOST, epoch: int | None = None,
              name: str | None = None) -> Image:
    """Write configuration and manifest for layers (descriptor, diffID), and maybe name the image.

    epoch: the time of creation in seconds; none is written without it.
    """
    settings: dict[str, Any] = {
        **{key: text for key, text in platform._asdict().items() if text}, "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]}}
    if epoch is not None:
        settings["created"] = timestamp(epoch)
    if history:
        settings["history"] = [dict(one) for one in history]
    settings_at = layout.add_json(settings, CONFIG)
    manifest = layout.add_json({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": settings_at.json(),
        "layers": [one.json() for one, _ in layers]}, MANIFEST)
    if name:
        layout.tag(name, manifest)
    return load(layout, manifest)


def timestamp(epoch: int) -> str:
    """Seconds since 1970 as RFC 3339 has it, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))


def copy(source: Layout, name: str, target: Layout, new_name: str | None = None) -> Descriptor:
    """Copy an image (or a whole index) with all that it needs from one layout to another; blobs are checked again."""
    top = source.find(name)
    waiting = [top]
    while waiting:
        one = waiting.pop()
        if one.media_type in (*INDEXES, *MANIFESTS):
            waiting += children(parse(source.read(one), one.media_type))
        if not target.has(one.digest):
            with source.open(one.digest) as file, target.incoming(one) as blob:
                shutil.copyfileobj(file, blob, layer.BLOCK)
    target.tag(new_name or name, top._replace(annotations={}))
    return top
