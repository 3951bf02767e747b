"""What goes with an image: a bill of materials and a signature, each a manifest of its own that points to the image.

A registry keeps them as it keeps images.  What describes an image names it as its ``subject`` and is found through the
list of referrers (image-spec/manifest.md, distribution-spec/spec.md "Listing Referrers"); a signature in cosign's form
stands under a tag made from the image's digest, which is where Podman, skopeo and cosign look for it.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from labs import image, machine, mounts
from labs.errors import BadInput, KernelError, Mismatch, RegistryError
from labs.image import Descriptor, Layout
from labs.registry import Registry

SBOM = "application/vnd.cyclonedx+json"
STATUS = "var/lib/dpkg/status"
# cosign: specs/SIGNATURE_SPEC.md; containers/image: docs/containers-sigstore-signing.
PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
CLAIM = "cosign container image signature"
REGISTRIES_D = "/etc/containers/registries.d"


# A bill of materials


class Package(NamedTuple):
    """An installed Debian package, as dpkg wrote it down."""

    name: str
    version: str
    architecture: str


def packages(root: str) -> list[Package]:
    """The packages of an unpacked image, by name, from its /var/lib/dpkg/status: dpkg-query(1), deb822(5)."""
    found = []
    for paragraph in _within(root, STATUS).decode("utf-8", "replace").split("\n\n"):
        lines = [line.partition(": ") for line in paragraph.splitlines() if not line.startswith((" ", "\t"))]
        fields = {key: value for key, _, value in lines}
        if fields.get("Status", "").endswith(" installed"):
            found.append(Package(*(fields[key] for key in ("Package", "Version", "Architecture"))))
    return sorted(found)


def _within(root: str, path: str) -> bytes:
    """A file of an image; a link in it leads to the image's files, never to ours."""
    try:
        with open(mounts.beneath(root, path, os.O_RDONLY), "rb") as file:
            return file.read()
    except KernelError as error:
        if error.errno != errno.ENOENT:
            raise
        raise BadInput("root", path, "must be there: only packages that dpkg has installed are known") from error


def sbom(found: Sequence[Package], subject: Descriptor, name: str) -> bytes:
    """A bill of materials in CycloneDX 1.6, JSON, for the image of that manifest; the same in, the same bytes out."""
    from cyclonedx.model import Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"oci:{subject.digest}"))
    bom.metadata.component = Component(name=name, version=subject.digest, type=ComponentType.CONTAINER, bom_ref="image")
    for one in found:
        url = PackageURL("deb", "debian", one.name, one.version, {"arch": one.architecture})
        bom.components.add(Component(name=one.name, version=one.version, purl=url, bom_ref=str(url)))
    bom.register_dependency(bom.metadata.component, bom.components)
    bom.metadata.properties.add(Property(name="labs:source", value=f"/{STATUS}"))
    value = json.loads(JsonV1Dot6(bom).output_as_string())
    del value["metadata"]["timestamp"]
    return image.canonical(value)


def check_sbom(data: bytes) -> dict[str, Any]:
    """A CycloneDX document, held against the schema of its specification; BadInput says what is wrong."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(data.decode("utf-8", "replace")):
        raise BadInput("sbom", str(error).splitlines()[0][:80], "must be CycloneDX 1.6")
    return dict(image.parse(data, "sbom"))


# Artifacts: manifests of something that is no image


def artifact(layout: Layout, subject: Descriptor, data: bytes, media_type: str) -> Descriptor:
    """Put bytes into a layout as an artifact about an image: manifest.md, "Guidelines for Artifact Usage"."""
    config, blob = layout.add(b"{}", image.EMPTY), layout.add(data, media_type)
    return layout.add_json({
        "schemaVersion": 2, "mediaType": image.MANIFEST, "artifactType": media_type, "config": config.json(),
        "layers": [blob.json()], "subject": Descriptor(*subject[:3]).json()}, image.MANIFEST)


def attach(registry: Registry, repository: str, layout: Layout, what: Descriptor, reference: str = "") -> None:
    """Send a manifest and its blobs, under its digest or a tag; the subject's list of referrers then has it."""
    data = layout.read(what)
    for blob in image.children(image.parse(data, "manifest")):
        registry.push_blob(repository, blob, layout)
    registry.put_manifest(repository, reference or what.digest, data, what.media_type)


def fetch(registry: Registry, repository: str, layout: Layout, reference: str) -> list[tuple[Descriptor, bytes]]:
    """The layers of an artifact by digest or tag, each with its bytes, which have the digest that the manifest says."""
    _, data = registry.manifest(repository, reference)
    value = image.parse(data, "manifest")
    image.check(value, "image-manifest-schema.json", "manifest")
    found = []
    for number, one in enumerate(value["layers"]):
        what = image.descriptor(one, f"layers[{number}]")
        registry.blob(repository, what, layout)
        found.append((what, layout.read(what)))
    return found


# Signatures


def new_key(folder: str) -> tuple[str, str]:
    """Make a key pair on the curve P-256; the files of the private and the public key: openssl-genpkey(1)."""
    private, public = f"{folder}/key.pem", f"{folder}/key.pub"
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", private)
    os.chmod(private, 0o600)
    _openssl("pkey", "-in", private, "-pubout", "-out", public)
    return private, public


def _openssl(*argv: str, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *argv], input=data, capture_output=True, check=True).stdout


class Claim(NamedTuple):
    """What is signed: "this name means this digest"."""

    reference: str
    digest: str

    def text(self) -> bytes:
        """The claim as simple signing writes it: containers-signature(5), with cosign's type."""
        critical = {"identity": {"docker-reference": self.reference}, "image": {"docker-manifest-digest": self.digest},
                    "type": CLAIM}
        return image.canonical({"critical": critical, "optional": None})

    @classmethod
    def of(cls, text: bytes) -> Claim:
        """The claim in a text, or BadInput."""
        value = image.parse(text, "claim")
        try:
            critical = value["critical"]
            found = cls(critical["identity"]["docker-reference"], critical["image"]["docker-manifest-digest"])
        except (LookupError, TypeError) as error:
            raise BadInput("claim", text[:40].decode("utf-8", "replace"), "must have a name and a digest") from error
        if critical.get("type") != CLAIM:
            raise BadInput("claim.critical.type", critical.get("type"), f"must be {CLAIM!r}")
        return found


def signature_tag(digest: str) -> str:
    """Where the signatures of a manifest stand: sha256-….sig."""
    return f"{digest.replace(':', '-')}.sig"


def sign(registry: Registry, repository: str, tag: str, layout: Layout, key: str) -> Descriptor:
    """Sign what a tag points to now (ECDSA with SHA-256), beside the signatures that it has; the manifest of them."""
    what, _ = registry.manifest(repository, tag)
    text = Claim(f"{registry.host}/{repository}:{tag}", what.digest).text()
    signature = base64.b64encode(_openssl("dgst", "-sha256", "-sign", key, data=text)).decode()
    layers = [one for one, _ in signatures(registry, repository, what.digest, layout)]
    layers.append(layout.add(text, PAYLOAD, annotations={SIGNATURE: signature}))
    config = layout.add_json({
        "architecture": "", "os": "", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [one.digest for one in layers]}}, image.CONFIG)
    manifest = layout.add_json({"schemaVersion": 2, "mediaType": image.MANIFEST, "config": config.json(),
                                "layers": [one.json() for one in layers]}, image.MANIFEST)
    attach(registry, repository, layout, manifest, signature_tag(what.digest))
    return manifest


def signatures(registry: Registry, repository: str, digest: str, layout: Layout) -> list[tuple[Descriptor, bytes]]:
    """The claims that stand beside a manifest, each with the annotation that should sign it; nothing is verified."""
    try:
        return fetch(registry, repository, layout, signature_tag(digest))
    except RegistryError as error:
        if error.status == 404:
            return []
        raise


def check_claim(text: bytes, signature: str, public: str) -> Claim:
    """The claim in these bytes, read only when the key's owner has signed them (base64); BadInput otherwise."""
    with tempfile.NamedTemporaryFile() as file:
        try:
            file.write(base64.b64decode(signature, validate=True))
            file.flush()
            _openssl("dgst", "-sha256", "-verify", public, "-signature", file.name, data=text)
        except (ValueError, subprocess.CalledProcessError):
            name = os.path.basename(public)
            raise BadInput("signature", name, "must be made with this key over these bytes") from None
    return Claim.of(text)


def verify(registry: Registry, repository: str, tag: str, layout: Layout, public: str) -> Descriptor:
    """What a tag points to now, if one signature of the key says that just this name means just this digest.

    Raises Mismatch for a signed claim about another digest or name, BadInput where no signature is of the key.
    """
    what, _ = registry.manifest(repository, tag)
    error: Exception = BadInput("signature", tag, "there is none for what the tag points to")
    for one, text in signatures(registry, repository, what.digest, layout):
        try:
            claim = check_claim(text, one.annotations.get(SIGNATURE, ""), public)
            _about(claim, f"{registry.host}/{repository}", tag, what.digest)
        except (BadInput, Mismatch) as refused:
            error = refused
        else:
            return what
    raise error


def _about(claim: Claim, name: str, tag: str, digest: str) -> None:
    if claim.digest != digest:
        raise Mismatch("claim", "docker-manifest-digest", digest, claim.digest)
    if claim.reference not in (name, f"{name}:{tag}"):
        raise Mismatch("claim", "docker-reference", f"{name}:{tag}", claim.reference)


# For Podman and skopeo


@contextmanager
def policy(host: str, public: str) -> Iterator[str]:
    """A policy for the block's time: of that registry only what the key has signed, of others nothing; its file.

    containers-policy.json(5), sigstoreSigned; containers-registries.d(5) says that signatures are looked for.
    """
    machine.require()
    requirement = {"type": "sigstoreSigned", "keyPath": public, "signedIdentity": {"type": "matchRepository"}}
    os.makedirs(REGISTRIES_D, exist_ok=True)
    lookaside = f"{REGISTRIES_D}/{machine.new_name('signed')}.yaml"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"default": [{"type": "reject"}], "transports": {"docker": {host: [requirement]}}}, file)
        file.flush()
        try:
            with open(lookaside, "w", encoding="utf-8") as attachments:
                json.dump({"docker": {host: {"use-sigstore-attachments": True}}}, attachments)  # JSON is YAML
            yield file.name
        finally:
            os.unlink(lookaside)
