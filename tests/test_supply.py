"""labs.supply: what it signs, Podman and skopeo accept; what skopeo signs, it accepts; whatever was moved is refused.

The bill of materials is compared with dpkg-query, and held against the schema of CycloneDX.
"""

import base64
import json
import os
import subprocess

import pytest

from labs import image, registry, registry_server, supply
from labs.errors import BadInput, Mismatch
from labs.image import Layout

LAB, DEBIAN = "/opt/labs/images", "/opt/labs/rootfs/debian"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with registry_server.serve(under=str(tmp_path_factory.mktemp("registry"))) as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return supply.new_key(str(tmp_path_factory.mktemp("keys")))


@pytest.fixture
def client(server):
    with registry.Registry(server.host) as one:
        yield one


@pytest.fixture
def mine(tmp_path):
    return Layout.create(tmp_path / "mine")


@pytest.fixture
def app(client, mine, tmp_path):
    """A repository of its own with two small images, tagged 1 and 2, of which 1 is signed by nobody yet."""
    name = f"app-{os.path.basename(tmp_path)}".lower().replace("_", "-").rstrip("-")
    for tag in ("1", "2"):
        folder = tmp_path / f"root{tag}"
        folder.mkdir()
        (folder / "version").write_text(tag)
        image.add_image(mine, [image.add_layer(mine, os.fspath(folder))], name=tag)
        registry.push(client, name, tag, mine, tag)
    return name


def skopeo(*argv):
    return subprocess.run(["skopeo", *map(str, argv)], capture_output=True, text=True, check=False)


# The bill of materials


def test_packages_are_those_that_dpkg_query_lists():
    form = "${db:Status-Status} ${Package} ${Version} ${Architecture}\n"
    told = subprocess.run(
        ["dpkg-query", f"--admindir={DEBIAN}/var/lib/dpkg", "-Wf", form], capture_output=True, text=True,
        check=True).stdout.splitlines()
    wanted = [tuple(line.split()[1:]) for line in told if line.startswith("installed ")]
    assert len(wanted) > 20
    assert [tuple(one) for one in supply.packages(DEBIAN)] == sorted(wanted)


def test_a_removed_package_is_not_there(tmp_path):
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    text = "Package: {}\nStatus: {}\nArchitecture: all\nVersion: 1\nDescription: x\n Package: no\n"
    (tmp_path / supply.STATUS).write_text("\n".join(
        [text.format("kept", "install ok installed"), text.format("gone", "deinstall ok config-files")]))
    assert supply.packages(os.fspath(tmp_path)) == [("kept", "1", "all")]


def test_a_root_without_dpkg_and_one_whose_status_leads_out(tmp_path):
    with pytest.raises(BadInput, match="only packages that dpkg has installed are known"):
        supply.packages(os.fspath(tmp_path))
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    os.symlink(f"{DEBIAN}/var/lib/dpkg/status", tmp_path / supply.STATUS)
    with pytest.raises(BadInput, match="must be there"):
        supply.packages(os.fspath(tmp_path))


def test_the_bill_is_cyclonedx_and_the_same_each_time():
    found = supply.packages(DEBIAN)
    subject = image.Descriptor(image.MANIFEST, f"sha256:{'a' * 64}", 1)
    data = supply.sbom(found, subject, "debian")
    assert data == supply.sbom(found, subject, "debian")
    value = supply.check_sbom(data)
    assert (value["bomFormat"], value["specVersion"]) == ("CycloneDX", "1.6")
    assert value["metadata"]["component"]["version"] == subject.digest
    assert [(one["name"], one["version"]) for one in value["components"]] == [one[:2] for one in found]
    bash = next(one for one in value["components"] if one["name"] == "bash")
    assert bash["purl"].startswith("pkg:deb/debian/bash@")
    assert len(value["components"]) == len({one["bom-ref"] for one in value["components"]})


@pytest.mark.parametrize("change", [{"bomFormat": "other"}, {"components": 5}, {"unknown": 1}])
def test_what_is_no_cyclonedx(change):
    value = json.loads(supply.sbom([], image.Descriptor(image.MANIFEST, f"sha256:{'a' * 64}", 1), "x"))
    with pytest.raises(BadInput, match=r"must be CycloneDX 1\.6"):
        supply.check_sbom(json.dumps({**value, **change}).encode())


def test_the_bill_is_found_through_the_image(client, mine, app, server):
    """docker-registry 2.8 has no list of referrers: the fallback tag of the specification is it."""
    what = client.head(app, "1")
    data = supply.sbom([supply.Package("bash", "5", "all")], what, app)
    supply.attach(client, app, mine, supply.artifact(mine, what, data, supply.SBOM))
    (found,) = client.referrers(app, what.digest, supply.SBOM)
    assert [text for _, text in supply.fetch(client, app, mine, found.digest)] == [data]
    assert client.referrers(app, what.digest, "something/else") == []
    assert client.referrers(app, client.head(app, "2").digest) == []
    told = json.loads(skopeo("inspect", "--raw", "--tls-verify=false",
                             f"docker://{server.host}/{app}:{what.digest.replace(':', '-')}").stdout)
    assert [one["digest"] for one in told["manifests"]] == [found.digest]
    manifest = image.parse(client.manifest(app, found.digest)[1], "manifest")
    image.check(manifest, "image-manifest-schema.json", "manifest")
    assert manifest["subject"]["digest"] == what.digest


# Signatures


def test_openssl_verifies_what_we_sign(client, mine, app, keys, tmp_path):
    supply.sign(client, app, "1", mine, keys[0])
    ((one, text),) = supply.signatures(client, app, client.head(app, "1").digest, mine)
    (tmp_path / "signature").write_bytes(base64.b64decode(one.annotations[supply.SIGNATURE]))
    done = subprocess.run(["openssl", "dgst", "-sha256", "-verify", keys[1], "-signature", tmp_path / "signature"],
                          input=text, capture_output=True, check=True)
    assert done.stdout == b"Verified OK\n"
    assert os.stat(keys[0]).st_mode & 0o777 == 0o600


def test_skopeo_and_podman_take_the_signed_one_alone(client, mine, app, keys, server, tmp_path):
    supply.sign(client, app, "1", mine, keys[0])
    with supply.policy(server.host, keys[1]) as policy:
        assert skopeo("--policy", policy, "copy", "--src-tls-verify=false", f"docker://{server.host}/{app}:1",
                      f"dir:{tmp_path}/one").returncode == 0
        refused = skopeo("--policy", policy, "copy", "--src-tls-verify=false", f"docker://{server.host}/{app}:2",
                         f"dir:{tmp_path}/two")
        assert "A signature was required, but no signature exists" in refused.stderr
        other = skopeo("--policy", policy, "copy", f"oci:{LAB}:busybox", f"dir:{tmp_path}/three")
        assert "is rejected by policy" in other.stderr
        pull = ["podman", f"--root={tmp_path}/graph", f"--runroot={tmp_path}/run", "--storage-driver=vfs", "pull", "-q",
                "--tls-verify=false", "--signature-policy", policy]
        done = [subprocess.run([*pull, f"{server.host}/{app}:{tag}"], capture_output=True, text=True, check=False)
                for tag in ("1", "2")]
    assert [one.returncode == 0 for one in done] == [True, False]
    assert "A signature was required" in done[1].stderr
    assert not os.path.exists(policy)
    assert "labs-signed" not in str(os.listdir(supply.REGISTRIES_D))


def test_what_skopeo_signs_we_verify_and_both_may_stand_together(client, mine, app, keys, server, tmp_path):
    (tmp_path / "pass").write_text("secret")
    subprocess.run(["skopeo", "generate-sigstore-key", "--output-prefix", tmp_path / "theirs", "--passphrase-file",
                    tmp_path / "pass"], check=True, capture_output=True)
    with supply.policy(server.host, keys[1]) as policy:
        supply.sign(client, app, "1", mine, keys[0])
        done = skopeo("--policy", policy, "copy", "--sign-by-sigstore-private-key", tmp_path / "theirs.private",
                      "--sign-passphrase-file", tmp_path / "pass", "--src-tls-verify=false", "--dest-tls-verify=false",
                      f"docker://{server.host}/{app}:1", f"docker://{server.host}/{app}:1")
        assert done.returncode == 0, done.stderr
        for public in (keys[1], os.fspath(tmp_path / "theirs.pub")):
            assert supply.verify(client, app, "1", mine, public).digest == client.head(app, "1").digest
        supply.sign(client, app, "1", mine, keys[0])
        assert len(supply.signatures(client, app, client.head(app, "1").digest, mine)) == 3
        assert skopeo("--policy", policy, "copy", "--src-tls-verify=false", f"docker://{server.host}/{app}:1",
                      f"dir:{tmp_path}/again").returncode == 0


def test_nobody_has_signed(client, mine, app, keys):
    with pytest.raises(BadInput, match="signature: '1': there is none for what the tag points to"):
        supply.verify(client, app, "1", mine, keys[1])


def test_somebody_else_has_signed(client, mine, app, keys, tmp_path):
    supply.sign(client, app, "1", mine, supply.new_key(os.fspath(tmp_path))[0])
    with pytest.raises(BadInput, match="must be made with this key over these bytes"):
        supply.verify(client, app, "1", mine, keys[1])


def test_the_tag_was_moved(client, mine, app, keys):
    """The old signature stays where it was, beside the old digest."""
    supply.sign(client, app, "1", mine, keys[0])
    registry.push(client, app, "1", mine, "2")
    with pytest.raises(BadInput, match="there is none for what the tag points to"):
        supply.verify(client, app, "1", mine, keys[1])


def test_an_old_signature_put_beside_another_image(client, mine, app, keys, server, tmp_path):
    signed = supply.sign(client, app, "1", mine, keys[0])
    supply.attach(client, app, mine, signed, supply.signature_tag(client.head(app, "2").digest))
    with pytest.raises(Mismatch, match="claim: docker-manifest-digest is sha256:"):
        supply.verify(client, app, "2", mine, keys[1])
    with supply.policy(server.host, keys[1]) as policy:
        refused = skopeo("--policy", policy, "copy", "--src-tls-verify=false", f"docker://{server.host}/{app}:2",
                         f"dir:{tmp_path}/two")
    assert "does not match" in refused.stderr


def test_a_signature_of_another_name(client, mine, app, keys):
    signed = supply.sign(client, app, "1", mine, keys[0])
    registry.push(client, "elsewhere", "1", mine, "1")
    supply.attach(client, "elsewhere", mine, signed, supply.signature_tag(client.head(app, "1").digest))
    with pytest.raises(Mismatch, match=f"claim: docker-reference is {client.host}/{app}:1, not "):
        supply.verify(client, "elsewhere", "1", mine, keys[1])


def test_two_names_of_one_digest_are_both_signed(client, mine, app, keys):
    for tag in ("1", "also"):
        registry.push(client, app, tag, mine, "1")
        supply.sign(client, app, tag, mine, keys[0])
    assert supply.verify(client, app, "1", mine, keys[1]) == supply.verify(client, app, "also", mine, keys[1])


@pytest.mark.parametrize("position", [0, 40, -1])
def test_one_byte_of_the_claim(position, keys):
    claim = supply.Claim("127.0.0.1:1/app:1", f"sha256:{'a' * 64}")
    text = claim.text()
    signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", keys[0]], input=text, capture_output=True,
                               check=True).stdout
    assert supply.check_claim(text, base64.b64encode(signature).decode(), keys[1]) == claim
    changed = bytearray(text)
    changed[position] ^= 1
    with pytest.raises(BadInput, match="must be made with this key over these bytes"):
        supply.check_claim(bytes(changed), base64.b64encode(signature).decode(), keys[1])


@pytest.mark.parametrize("signature", ["", "not base64!", base64.b64encode(b"nonsense").decode()])
def test_no_signature_at_all(signature, keys):
    with pytest.raises(BadInput, match="must be made with this key over these bytes"):
        supply.check_claim(b"{}", signature, keys[1])


@pytest.mark.parametrize("text", [b"nonsense", b"{}", b"[]", b'{"critical": 5}', b'{"critical": {"type": "other"}}',
                                  b'{"critical": {"type": "cosign container image signature"}}'])
def test_a_signed_claim_that_is_none(text, client, mine, app, keys):
    """Even the key's owner may sign nonsense: it is refused with a line."""
    digest = client.head(app, "1").digest
    signature = subprocess.run(["openssl", "dgst", "-sha256", "-sign", keys[0]], input=text, capture_output=True,
                               check=True).stdout
    layer = mine.add(text, supply.PAYLOAD, annotations={supply.SIGNATURE: base64.b64encode(signature).decode()})
    manifest = mine.add_json({"schemaVersion": 2, "mediaType": image.MANIFEST,
                              "config": mine.add(b"{}", image.CONFIG).json(), "layers": [layer.json()]}, image.MANIFEST)
    supply.attach(client, app, mine, manifest, supply.signature_tag(digest))
    with pytest.raises(BadInput, match="claim"):
        supply.verify(client, app, "1", mine, keys[1])


def test_a_byte_of_the_claim_in_the_registry(client, mine, app, keys, server):
    """The claim is a blob: its own digest is the first thing that no longer fits."""
    supply.sign(client, app, "1", mine, keys[0])
    digest = client.head(app, "1").digest
    ((one, text),) = supply.signatures(client, app, digest, mine)
    os.unlink(mine.blob(one.digest))
    with open(server.blob(one.digest), "wb") as file:
        file.write(text.replace(b'"critical"', b'"Critical"'))
    with pytest.raises(Mismatch, match="blob: digest is"):
        supply.verify(client, app, "1", mine, keys[1])
