"""labs.registry and labs.registry_server: skopeo, docker and podman on the other end; a proxy that misbehaves between.

Nothing is made up: whatever goes wrong in the proxy is a real registry's answer, spoiled on its way.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from labs import image, machine, process, registry, registry_server
from labs.errors import BadInput, LabError, Mismatch, RegistryError
from labs.image import INDEX, MANIFEST, Descriptor, Layout
from tests.wicked import Twist, Wicked

LAB = "/opt/labs/images"
LOGIN = ("learner", "pass word: ü")
SBOM = "application/vnd.cyclonedx+json"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One registry for many tests; below pytest's own directory its files are not watched."""
    with registry_server.serve(under=str(tmp_path_factory.mktemp("registry"))) as running:
        client = registry.Registry(running.host)
        registry.push(client, "busybox", "lab", Layout(LAB), "busybox")
        client.close()
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    with registry_server.serve(auth=LOGIN, under=str(tmp_path_factory.mktemp("locked"))) as running:
        yield running


@pytest.fixture
def client(server):
    with registry.Registry(server.host) as one:
        yield one


@pytest.fixture
def wicked(server):
    with Wicked(server.host) as one:
        yield one


@pytest.fixture
def mine(tmp_path):
    return Layout.create(tmp_path / "mine")


def skopeo(*words, **options):
    return subprocess.run(["skopeo", *words], capture_output=True, text=True, check=True, **options).stdout


def blobs(path):
    """Every blob of a layout by name, with the digest of what is really in it."""
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(path, "blobs/sha256").iterdir()}
    assert all(name == real for name, real in found.items())
    return set(found)


def files(layout):
    return {str(path.relative_to(layout.path)) for path in Path(layout.path).rglob("*") if path.is_file()}


def busybox_layer():
    return image.load(Layout(LAB), "busybox").layers[0]


def small_image(layout, name, *texts, media_type=image.LAYER):
    """An image whose layers are some texts: a registry does not look into them."""
    layers = [(layout.add(text.encode(), media_type), image.digest(text.encode())) for text in texts]
    return image.add_image(layout, layers, name=name)


def two_layers(layout, name):
    """The lab's busybox with a layer on it that no other image has."""
    image.copy(Layout(LAB), "busybox", layout)
    base, folder = image.load(layout, "busybox"), Path(layout.path).parent / f"upper-{name}"
    folder.mkdir()
    (folder / "own").write_bytes(os.urandom(1000))
    layers = [(base.layers[0], base.diff_ids[0]), image.add_layer(layout, str(folder))]
    return image.add_image(layout, layers, name=name)


def index_of(*entries):
    return image.canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(entries)})


# Against skopeo


def test_what_we_push_skopeo_pulls(server, client, mine, tmp_path):
    two_layers(mine, "app")
    how = registry.push(client, "ours/app", "v1", mine, "app")
    skopeo("copy", "--src-tls-verify=false", f"docker://{server.host}/ours/app:v1", f"oci:{tmp_path}/theirs:v1")
    registry.pull(client, "ours/app", "v1", again := Layout.create(tmp_path / "again"))
    assert blobs(tmp_path / "theirs") == blobs(again.path) >= {digest.partition(":")[2] for digest in how}
    told = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{server.host}/ours/app:v1"))
    assert told["Digest"] == client.head("ours/app", "v1").digest == mine.find("app").digest


def test_what_skopeo_pushes_we_pull(server, client, mine, tmp_path):
    two_layers(source := Layout.create(tmp_path / "source"), "app")
    skopeo("copy", "--dest-tls-verify=false", f"oci:{source.path}:app", f"docker://{server.host}/theirs/app:v1")
    top = registry.pull(client, "theirs/app", "v1", mine, name="app")
    skopeo("copy", f"oci:{source.path}:app", f"oci:{tmp_path}/same:app")
    assert blobs(mine.path) == blobs(tmp_path / "same")
    assert image.load(mine, "app").manifest.digest == top.digest == source.find("app").digest


def test_dockers_own_media_types_come_through(server, client, mine):
    skopeo("copy", "--format=v2s2", "--dest-tls-verify=false", f"oci:{LAB}:busybox", f"docker://{server.host}/v2s2:x")
    top = registry.pull(client, "v2s2", "x", mine)
    assert top.media_type == image.DOCKER_MANIFEST
    assert image.load(mine, "v2s2").diff_ids == image.load(Layout(LAB), "busybox").diff_ids
    registry.push(client, "v2s2", "y", mine, "v2s2")
    assert client.head("v2s2", "y") == top


def test_tags_are_those_skopeo_lists_page_by_page(server, client):
    what, data = client.manifest("busybox", "lab")
    names = [f"t{number}" for number in range(7)]
    for name in names:
        client.put_manifest("busybox", name, data, what.media_type)
    told = json.loads(skopeo("list-tags", "--tls-verify=false", f"docker://{server.host}/busybox"))["Tags"]
    assert sorted(client.tags("busybox")) == sorted(told) == ["lab", *names]
    with Wicked(server.host) as proxy, registry.Registry(proxy.host) as watched:
        asked = watched.tags("busybox", page=3)
        assert (asked, len(proxy.seen)) == (sorted(told), 3) or asked == client.tags("busybox")


def test_tokens_are_those_skopeo_gets(locked, mine, tmp_path):
    creds = f"{LOGIN[0]}:{LOGIN[1]}"
    with registry.Registry(locked.host, *LOGIN) as inside:
        inside.ping()
        registry.push(inside, "secret/app", "v1", Layout(LAB), "busybox")
        skopeo("copy", "--src-tls-verify=false", f"--src-creds={creds}", f"docker://{locked.host}/secret/app:v1",
               f"oci:{tmp_path}/theirs:x")
        skopeo("copy", "--dest-tls-verify=false", f"--dest-creds={creds}", f"oci:{tmp_path}/theirs:x",
               f"docker://{locked.host}/secret/theirs:v1")
        registry.pull(inside, "secret/theirs", "v1", mine)
        assert blobs(mine.path) == blobs(tmp_path / "theirs")
        how = registry.push(inside, "secret/other", "v1", mine, "secret/theirs", mount="secret/app")
        assert set(how.values()) == {"mounted"}
        inside.delete("secret/other", inside.head("secret/other", "v1").digest)
    with pytest.raises(subprocess.CalledProcessError, match="exit status"):
        skopeo("inspect", "--tls-verify=false", f"docker://{locked.host}/secret/app:v1")


@pytest.mark.parametrize("login", [(), ("learner", "wrong"), ("nobody", LOGIN[1])])
def test_without_the_password_nobody_comes_in(locked, login):
    with registry.Registry(locked.host, *login) as outside, pytest.raises(RegistryError) as caught:
        outside.manifest("secret/app", "v1")
    assert (caught.value.step, caught.value.status) == ("token", 401)
    assert "wrong user or password" in str(caught.value)


def test_a_token_for_one_repository_opens_no_other(locked):
    with registry.Registry(locked.host, *LOGIN) as inside:
        with pytest.raises(RegistryError):
            inside.manifest("one", "x")
        token = inside._authorization["one", "pull"]
        found = subprocess.run(["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"Authorization: {token}",
                                f"http://{locked.host}/v2/two/manifests/x"], capture_output=True, text=True)
    assert found.stdout == "401"


def test_a_token_is_what_openssl_verifies(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-subj", "/CN=x", "-keyout", key,
                    "-out", certificate], check=True, capture_output=True)
    token = registry_server.sign(registry_server.claims("me", ["repository:a/b:pull,push"]), str(key), str(certificate))
    text, _, signature = token.rpartition(".")
    (tmp_path / "signature").write_bytes(decode(signature))
    (tmp_path / "public").write_bytes(
        subprocess.check_output(["openssl", "x509", "-pubkey", "-noout", "-in", certificate]))
    subprocess.run(["openssl", "dgst", "-sha256", "-verify", tmp_path / "public", "-signature", tmp_path / "signature"],
                   input=text.encode(), check=True, capture_output=True)
    assert json.loads(decode(text.split(".")[1]))["access"] == [
        {"type": "repository", "name": "a/b", "actions": ["pull", "push"]}]


def decode(text):
    return registry_server.base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# Pulling


def test_a_repeated_pull_asks_only_for_the_manifest(wicked, mine):
    with registry.Registry(wicked.host) as watched:
        registry.pull(watched, "busybox", "lab", mine)
        before = len(wicked.seen)
        registry.pull(watched, "busybox", "lab", mine)
    assert [path for _, path, _ in wicked.seen[before:]] == ["/v2/busybox/manifests/lab"]


def test_a_cut_pull_goes_on_where_it_stopped(wicked, mine):
    layer, cut = busybox_layer(), 500_000
    wicked.twist = Twist(match=f"GET .*{layer.digest}", times=1, cut=cut)
    with registry.Registry(wicked.host) as watched:
        with pytest.raises(RegistryError, match="the connection broke"):
            registry.pull(watched, "busybox", "lab", mine)
        kept = os.path.getsize(f"{mine.path}/partial/{layer.digest.replace(':', '-')}")
        assert cut - registry.BLOCK <= kept <= cut
        assert mine.names() == []
        registry.pull(watched, "busybox", "lab", mine)
    assert wicked.asked("GET")[-1][1]["Range"] == f"bytes={kept}-"
    assert image.load(mine, "busybox").layers == (layer,)
    assert not os.path.exists(f"{mine.path}/partial")


def test_a_registry_without_ranges_begins_anew(wicked, mine):
    layer = busybox_layer()
    wicked.twist = Twist(match=f"GET .*{layer.digest}", times=1, cut=500_000)
    with registry.Registry(wicked.host) as watched:
        with pytest.raises(RegistryError):
            registry.pull(watched, "busybox", "lab", mine)
        wicked.twist = Twist(match=f"GET .*{layer.digest}", hide=("Range",))
        registry.pull(watched, "busybox", "lab", mine)
    assert blobs(mine.path) >= {layer.digest.partition(":")[2]}


def test_a_spoiled_beginning_is_found_at_the_end_and_does_not_stay(client, mine):
    layer = busybox_layer()
    os.makedirs(f"{mine.path}/partial")
    Path(f"{mine.path}/partial/{layer.digest.replace(':', '-')}").write_bytes(b"x" * 1000)
    with pytest.raises(Mismatch, match="digest"):
        registry.pull(client, "busybox", "lab", mine)
    registry.pull(client, "busybox", "lab", mine)
    assert not os.path.exists(f"{mine.path}/partial")


def test_a_dead_server_in_the_middle(mine):
    with registry_server.serve() as dying, registry.Registry(dying.host) as client:
        registry.push(client, "busybox", "lab", Layout(LAB), "busybox")

        def kill(done, total):
            if done > total / 2:
                os.kill(dying.pid, signal.SIGSTOP)
                os.kill(dying.pid, signal.SIGKILL)

        layer = busybox_layer()
        with open(dying.blob(layer.digest), "ab") as file:
            file.truncate(64 << 20)  # more than the sockets' buffers hold; the registry tells the new length
        with pytest.raises(LabError):
            registry.pull(client, "busybox", "lab", mine, progress=kill)
        os.kill(dying.pid, signal.SIGKILL)
        process.until(lambda: process.readable(dying._child.pidfd, 0))
        with pytest.raises(RegistryError, match=r"^manifest lab: (connection refused|the connection broke)$"):
            registry.pull(client, "busybox", "lab", mine)
    assert mine.names() == []


SPOILED = {
    "a flipped byte": (Twist("GET .*LAYER", flip=70_000), Mismatch, "blob: digest is "),
    "a flipped byte in the config": (Twist("GET .*CONFIG", flip=3), Mismatch, "blob: digest is "),
    "a flipped byte in the manifest": (Twist("GET .*manifests", flip=3), Mismatch, "manifest lab: digest is "),
    "one byte too many": (Twist("GET .*LAYER", grow=1), Mismatch, "blob: Content-Length is "),
    "one byte too many, and no length": (
        Twist("GET .*LAYER", grow=1, headers={"Content-Length": None}), Mismatch, "blob: size is at least "),
    "truncated": (Twist("GET .*LAYER", cut=100), RegistryError, "blob: the connection broke"),
    "truncated, and no length": (
        Twist("GET .*LAYER", cut=100, headers={"Content-Length": None}), RegistryError, "blob: the answer ended early"),
    "a length too long": (Twist("GET .*LAYER", length=1), Mismatch, "blob: Content-Length is "),
    "a length too short": (Twist("GET .*LAYER", length=-1), Mismatch, "blob: Content-Length is "),
    "a manifest's length too long": (Twist("GET .*manifests", length=9), RegistryError, "lab: the connection broke"),
    "a manifest's length too short": (Twist("GET .*manifests", length=-9), Mismatch, "manifest lab: digest is "),
    "a manifest over the limit": (
        Twist("GET .*manifests", grow=image.MANIFEST_LIMIT), BadInput, "must not be longer"),
    "a wrong digest header": (
        Twist("GET .*manifests", headers={"Docker-Content-Digest": image.digest(b"")}), Mismatch, "lab: digest is "),
    "no digest in the header": (
        Twist("GET .*manifests", headers={"Docker-Content-Digest": "x"}), BadInput, "digest: 'x'"),
    "an unknown media type": (
        Twist("GET .*manifests", headers={"Content-Type": "text/html"}), BadInput, "Content-Type: 'text/html': must"),
    "a manifest that is called an index": (
        Twist("GET .*manifests", headers={"Content-Type": INDEX}), BadInput, "^manifest"),
    "no JSON": (
        Twist("GET .*manifests", status=200, body=b"<p>", headers={"Content-Type": MANIFEST}), BadInput, "be JSON"),
    "no JSON object": (
        Twist("GET .*manifests", status=200, body=b"[]", headers={"Content-Type": MANIFEST}), BadInput, "JSON object"),
    "no manifest": (
        Twist("GET .*manifests", status=200, body=b"{}", headers={"Content-Type": MANIFEST}), BadInput, "required"),
    "a redirect loop": (
        Twist("GET .*LAYER", status=307, headers={"Location": "?again"}), RegistryError, "blob: more than 5 redirects"),
    "a redirect out of http": (
        Twist("GET .*LAYER", status=307, headers={"Location": "file:///etc/passwd"}), RegistryError, "no http address"),
    "dead": (Twist(dead=True), RegistryError, "manifest lab: the connection broke"),
    "404": (Twist("GET .*LAYER", status=404, body=b"<h1>gone</h1>"), RegistryError, "blob: 404 Not Found"),
    "404 in words": (
        Twist(status=404, body=b'{"errors":[{"code":"NAME_UNKNOWN","message":"who?"}]}'),
        RegistryError, r"manifest lab: 404 NAME_UNKNOWN \(who\?\)"),
    "429": (Twist(status=429, headers={"Retry-After": "7"}), RegistryError, "429 Too Many Requests try again after 7"),
    "503": (Twist(status=503, body=b"\xff{"), RegistryError, "manifest lab: 503 Service Unavailable"),
    "strange errors": (Twist(status=500, body=b'{"errors":[7]}'), RegistryError, "manifest lab: 500 Internal Server"),
    "401 again and again": (
        Twist(status=401, headers={"WWW-Authenticate": "Basic realm=x"}), RegistryError, "asks for a user and a passw"),
    "401 in no known way": (
        Twist(status=401, headers={"WWW-Authenticate": "Negotiate"}), RegistryError, "asks for a user and a password"),
    "a token from anywhere": (
        Twist(status=401, headers={"WWW-Authenticate": 'Bearer realm="http://192.0.2.1/"'}), RegistryError,
        "not https"),
    "another range": (
        Twist("GET .*LAYER", headers={"Content-Range": "bytes 5-9/10"}, status=206), RegistryError, "another range"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_comes_spoiled_is_one_clear_error_and_does_not_stay(wicked, mine, case):
    """And once the registry is well again, a repeated pull ends well."""
    twist, kind, words = SPOILED[case]
    there = image.load(Layout(LAB), "busybox")
    match = twist.match.replace("LAYER", there.layers[0].digest).replace("CONFIG", there.config.digest)
    wicked.twist = Twist(**{**vars(twist), "match": match})
    empty = files(mine)
    with registry.Registry(wicked.host) as watched:
        with pytest.raises(kind, match=words) as caught:
            registry.pull(watched, "busybox", "lab", mine)
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert mine.names() == []
        assert {name.split("/")[0] for name in files(mine) - empty} <= {"blobs", "partial"}
        assert blobs(mine.path) <= {one.digest.partition(":")[2] for one in (there.config, *there.layers)}
        assert len(wicked.seen) <= registry.REDIRECTS + 3
        wicked.twist = None
        registry.pull(watched, "busybox", "lab", mine)
    assert image.load(mine, "busybox").manifest.digest == there.manifest.digest
    assert not os.path.exists(f"{mine.path}/partial")


def test_a_manifest_by_digest_must_be_that_one(wicked, client, mine):
    small_image(mine, "other", "other")
    registry.push(client, "busybox", "other", mine, "other")
    wanted, other = client.head("busybox", "lab").digest, client.manifest("busybox", "other")[1]
    headers = {"Content-Type": MANIFEST, "Docker-Content-Digest": wanted}
    wicked.twist = Twist(status=200, body=other, headers=headers)
    with registry.Registry(wicked.host) as watched, pytest.raises(Mismatch) as caught:
        watched.manifest("busybox", wanted)
    assert (caught.value.expected, caught.value.found) == (wanted, image.digest(other))


def test_a_manifest_is_of_one_type(wicked, client, mine):
    small_image(mine, "typed", "typed")
    registry.push(client, "busybox", "typed", mine, "typed")
    wicked.twist = Twist("GET .*manifests", headers={"Content-Type": image.DOCKER_MANIFEST})
    with registry.Registry(wicked.host) as watched, pytest.raises(BadInput, match="must be what Content-Type says"):
        watched.manifest("busybox", "typed")


def test_one_flipped_bit_on_the_registrys_own_disk_is_found(mine):
    with registry_server.serve() as own, registry.Registry(own.host) as client:
        registry.push(client, "busybox", "lab", Layout(LAB), "busybox")
        path = Path(own.blob(busybox_layer().digest))
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)
        with pytest.raises(Mismatch, match="blob: digest is"):
            registry.pull(client, "busybox", "lab", mine)
        path.write_bytes(data[:-1])
        with pytest.raises(Mismatch, match="blob: Content-Length is"):
            registry.pull(client, "busybox", "lab", mine)
        with pytest.raises(subprocess.CalledProcessError):
            skopeo("copy", "--src-tls-verify=false", f"docker://{own.host}/busybox:lab", f"oci:{mine.path}2:x")
    assert mine.names() == []


def test_the_platform_is_chosen_or_all_are_taken(client, mine, tmp_path):
    one, two = small_image(mine, "one", "one"), small_image(mine, "two", "two")
    entries = [one.manifest._replace(annotations={}, platform=image.HOST).json(),
               two.manifest._replace(annotations={}, platform=image.Platform("linux", "s390x")).json()]
    mine.tag("both", mine.add_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}, INDEX))
    registry.push(client, "both", "v1", mine, "both")
    host = Layout.create(tmp_path / "host")
    assert registry.pull(client, "both", "v1", host).digest == one.manifest.digest
    assert not host.has(two.layers[0].digest)
    every = Layout.create(tmp_path / "all")
    assert registry.pull(client, "both", "v1", every, platform=None).media_type == INDEX
    assert image.load(every, "both", image.Platform("linux", "s390x")).layers == two.layers
    with pytest.raises(BadInput, match="platform: 'linux/mips': must be one that the index has"):
        registry.pull(client, "both", "v1", host, platform=image.Platform("linux", "mips"))


def test_an_index_that_lies_about_its_manifests(client, mine, tmp_path):
    one = small_image(mine, "one", "lied about")
    registry.push(client, "liar", "one", mine, "one")
    entry = one.manifest._replace(annotations={}, platform=image.HOST, size=one.manifest.size + 1).json()
    client.put_manifest("liar", "v1", index_of(entry), INDEX)
    with pytest.raises(Mismatch, match="manifest: size is"):
        registry.pull(client, "liar", "v1", Layout.create(tmp_path / "x"))


def test_an_empty_index_has_no_platform(client, mine):
    client.put_manifest("empty", "v1", index_of(), INDEX)
    with pytest.raises(BadInput, match="platform: .*none"):
        registry.pull(client, "empty", "v1", mine)


# What is sent to whom


def test_a_redirect_to_another_host_is_followed_without_the_authorization(locked, mine):
    with (Wicked(locked.host) as proxy, Wicked(locked.host) as elsewhere,
          registry.Registry(proxy.host, *LOGIN) as client):
        registry.push(client, "moved", "v1", Layout(LAB), "busybox")
        layer = busybox_layer()
        data = Path(locked.blob(layer.digest)).read_bytes()
        proxy.twist = Twist(f"GET .*{layer.digest}", status=307, headers={"Location": f"http://{elsewhere.host}/there"})
        elsewhere.twist = Twist("/there", status=200, body=data)
        registry.pull(client, "moved", "v1", mine)
        assert [path for path, _ in elsewhere.asked("GET")] == ["/there"]
        assert not any("Authorization" in headers for _, headers in elsewhere.asked("GET"))
        assert any("Authorization" in headers for _, headers in proxy.asked("GET"))


def test_a_login_asked_for_by_another_host_is_refused(locked, mine):
    with (Wicked(locked.host) as proxy, Wicked(locked.host) as elsewhere,
          registry.Registry(proxy.host, *LOGIN) as client):
        proxy.twist = Twist("manifests", status=307, headers={"Location": f"http://{elsewhere.host}/there"})
        realm = f'Bearer realm="http://{elsewhere.host}/token"'
        elsewhere.twist = Twist("/there", status=401, headers={"WWW-Authenticate": realm})
        with pytest.raises(RegistryError, match="401"):
            registry.pull(client, "moved", "v1", mine)
        assert [path for path, _ in elsewhere.asked("GET")] == ["/there"]


@pytest.mark.parametrize(("match", "more"), [
    ("POST", {"Location": "http://192.0.2.1/v2/x"}),
    ("GET .*tags", {"Link": '<http://192.0.2.1/v2/x>; rel="next"'}),
])
def test_an_address_in_an_answer_must_not_lead_to_another_host(wicked, mine, match, more):
    wicked.twist = Twist(match, headers=more)
    small_image(mine, "other", "elsewhere")
    with registry.Registry(wicked.host) as watched, pytest.raises(RegistryError, match="leads to another host"):
        registry.push(watched, "elsewhere", "v1", mine, "other")
        watched.tags("busybox")


def test_pages_without_an_end(wicked):
    wicked.twist = Twist("tags", headers={"Link": '</v2/busybox/tags/list>; rel="next"'})
    with registry.Registry(wicked.host) as watched, pytest.raises(RegistryError, match="no end"):
        watched.tags("busybox")


def test_a_token_that_is_none(locked):
    with Wicked(locked.host) as proxy, registry.Registry(proxy.host, *LOGIN) as client:
        proxy.twist = Twist(status=401, headers={"WWW-Authenticate": f'Bearer realm="http://{proxy.host}/token"'})
        original = proxy.take
        for token in (b"", b"[]", b"{}", b'{"token": 5}', b'{"token": "a\\nb"}', b'{"token": ""}'):
            good = Twist(status=200, body=token)
            proxy.take = lambda line, good=good: good if "/token" in line else original(line)
            with pytest.raises(LabError, match="^token: "):
                client.ping()


def test_no_answer_in_time(wicked, monkeypatch):
    monkeypatch.setattr(registry, "TIMEOUT", (0.2, 0.2))
    wicked.twist = Twist(stall=1)
    with registry.Registry(wicked.host) as watched, pytest.raises(RegistryError, match="ping: no answer in time"):
        watched.ping()


def test_nobody_there():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with (registry.Registry(f"127.0.0.1:{taken.getsockname()[1]}") as nobody,
              pytest.raises(RegistryError, match="^ping: connection refused$")):
            nobody.ping()


def test_addresses_that_are_none():
    for host in ("", "http://x", "a b", "user@host", "host/path", "host:", "host:999999", "[::1]:x", "ホスト"):
        with pytest.raises(BadInput, match="registry"):
            registry.Registry(host)


def test_http_only_on_the_loopback_interface():
    for host in ("localhost:5000", "127.0.0.2", "[::1]:5000"):
        with registry.Registry(host) as one:
            assert one.url == f"http://{host}"
    for host in ("registry.example", "127.0.0.1.example", "localhost.example:80"):
        with registry.Registry(host) as one:
            assert one.url == f"https://{host}"


def test_names_that_are_none(client):
    for name in ("", "UPPER", "a//b", "/a", "a/", "../x", "a..b", "a b", "a?x=1", "ä"):
        for ask in (lambda: client.manifest(name, "x"), lambda: client.has_blob(name, image.digest(b"")),  # noqa: B023
                    lambda: client.tags(name)):  # noqa: B023
            with pytest.raises(BadInput, match="repository"):
                ask()
    for reference in ("", "-x", "a/b", "x" * 129, "sha256:abc", "a b", "..", "x?y"):
        with pytest.raises(BadInput, match="reference"):
            client.manifest("busybox", reference)


# Pushing


def test_blobs_that_are_there_are_not_sent_again(client):
    first = registry.push(client, "twice", "v1", Layout(LAB), "busybox")
    assert set(first.values()) == {"sent"}
    assert set(registry.push(client, "twice", "v2", Layout(LAB), "busybox").values()) == {"there"}


@pytest.mark.parametrize("chunk", [0, 300_000, 1 << 30])
def test_in_one_piece_and_in_chunks(server, wicked, tmp_path, chunk):
    layer, told = busybox_layer(), []
    with registry.Registry(wicked.host) as watched:
        registry.push(watched, f"chunked/{chunk}", "v1", Layout(LAB), "busybox", chunk=chunk,
                      progress=lambda *now: told.append(now))
    patches = [(headers["Content-Range"], int(headers["Content-Length"])) for _, headers in wicked.asked("PATCH")]
    if chunk == 300_000:
        whole = [f"{start}-{min(start + chunk, layer.size) - 1}" for start in range(0, layer.size, chunk)]
        assert [told for told, _ in patches if told in whole] == whole
    assert len(patches) == {0: 0, 1 << 30: 2}.get(chunk, -(-layer.size // 300_000) + 1)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    skopeo("copy", "--src-tls-verify=false", f"docker://{server.host}/chunked/{chunk}:v1", f"oci:{tmp_path}/x:x")
    assert blobs(tmp_path / "x") >= {layer.digest.partition(":")[2]}


def test_locations_may_be_relative(wicked, mine):
    small_image(mine, "one", "relative")
    wicked.relative = True
    with registry.Registry(wicked.host) as watched:
        registry.push(watched, "relative", "v1", mine, "one", chunk=3)
        assert watched.head("relative", "v1") == mine.find("one")._replace(annotations={})


def test_mounting_sends_no_byte(server, client, mine):
    registry.push(client, "mount/from", "v1", Layout(LAB), "busybox")
    before = len(server.requests())
    how = registry.push(client, "mount/to", "v1", Layout(LAB), "busybox", mount="mount/from")
    assert set(how.values()) == {"mounted"}
    assert {one.method for one in server.requests(before)} == {"HEAD", "POST", "PUT"}
    small_image(mine, "new", "not to be mounted")
    assert set(registry.push(client, "mount/to", "v2", mine, "new", mount="mount/from").values()) == {"sent"}


WRONG_PUSHES = {
    "no Location": (Twist("POST", headers={"Location": None}), 0, RegistryError, "no Location"),
    "a server that dies": (Twist("PUT .*uploads", dead=True), 0, RegistryError, "upload: the connection broke"),
    "a wrong digest": (
        Twist("PUT .*uploads", headers={"Docker-Content-Digest": "x"}), 0, Mismatch, "upload: digest is x"),
    "a wrong manifest digest": (
        Twist("PUT .*manifests", headers={"Docker-Content-Digest": "x"}), 0, Mismatch, "put manifest v1: digest is x"),
    "a lost chunk": (Twist("PATCH", headers={"Range": "0-1"}), 4, Mismatch, "upload: Range is 0-1, not 0-3"),
    "no space": (Twist("PATCH", status=507), 4, RegistryError, "upload: 507 Insufficient Storage"),
    "a redirect": (Twist("PUT", status=307, headers={"Location": "/x"}), 0, RegistryError, "upload: 307"),
    "denied": (
        Twist("POST", status=403, body=b'{"errors":[{"code":"DENIED"}]}'), 0, RegistryError, "upload: 403 DENIED"),
}


@pytest.mark.parametrize("case", WRONG_PUSHES)
def test_a_push_that_fails_leaves_no_upload_behind(server, wicked, mine, case):
    twist, chunk, kind, words = WRONG_PUSHES[case]
    small_image(mine, "one", f"text of {case}")
    name = f"wrong/p{list(WRONG_PUSHES).index(case)}"
    wicked.twist = Twist(**vars(twist))
    with registry.Registry(wicked.host) as watched:
        with pytest.raises(kind, match=words):
            registry.push(watched, name, "v1", mine, "one", chunk=chunk)
        uploads = Path(server.root, registry_server.STORE, "repositories", name, "_uploads")
        assert case == "no Location" or not list(uploads.rglob("data"))
        wicked.twist = None
        registry.push(watched, name, "v1", mine, "one", chunk=chunk)
        assert watched.head(name, "v1").digest == mine.find("one").digest


def test_the_registry_refuses_what_is_not_its_digest(server, mine):
    """The other side checks too: a blob that is spoiled in the layout never gets a name there."""
    layer = small_image(mine, "one", "sound").layers[0]
    Path(mine.blob(layer.digest)).write_text("spoil")
    with registry.Registry(server.host) as client, pytest.raises(RegistryError, match="DIGEST_INVALID"):
        registry.push(client, "spoiled", "v1", mine, "one")


def test_a_manifest_before_its_blobs_is_refused(client, mine):
    one = small_image(mine, "one", "not there")
    with pytest.raises(RegistryError, match=r"404 MANIFEST_BLOB_UNKNOWN|400 MANIFEST_BLOB_UNKNOWN"):
        client.put_manifest("early", "v1", mine.read(one.manifest), MANIFEST)


def test_a_missing_blob_is_missed_before_anything_is_sent(wicked, mine):
    one = small_image(mine, "one", "lost")
    os.unlink(mine.blob(one.layers[0].digest))
    with registry.Registry(wicked.host) as watched, pytest.raises(BadInput, match="no such blob in the layout"):
        registry.push(watched, "lost", "v1", mine, "one")
    assert not wicked.asked("PUT") or all("manifests" not in path for path, _ in wicked.asked("PUT"))


# Deleting and garbage


def test_deleting_and_what_it_frees(mine):
    with registry_server.serve() as own, registry.Registry(own.host) as client:
        one, two = small_image(mine, "one", "shared", "alone"), small_image(mine, "two", "shared")
        for name in ("one", "two"):
            registry.push(client, "app", name, mine, name)
        with pytest.raises(RegistryError) as caught:
            client.delete("app", "one")
        assert caught.value.status in (400, 404, 405)
        client.delete("app", one.manifest.digest)
        assert client.tags("app") == ["two"]
        assert client.head("app", "one") is None
        assert os.path.exists(own.blob(one.layers[1].digest))
        gone = own.garbage_collect()
        assert gone == sorted([one.manifest.digest, one.config.digest, one.layers[1].digest])
        assert not os.path.exists(own.blob(one.layers[1].digest))
        assert client.has_blob("app", two.layers[0].digest)
        registry.push(client, "app", "three", mine, "one")
        client.put_manifest("app", "three", mine.read(two.manifest), MANIFEST)
        assert one.manifest.digest in own.garbage_collect(untagged=True)
        client.delete_blob("app", two.layers[0].digest)
        assert not client.has_blob("app", two.layers[0].digest)
        with pytest.raises(RegistryError, match="404"):
            client.delete_blob("app", image.digest(b"never there"))


# Referrers


def artifact(subject, text, kind=SBOM):
    nothing = Descriptor(image.EMPTY, image.digest(b"{}"), 2).json()
    return image.canonical({
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": kind, "annotations": {"text": text},
        "config": nothing, "layers": [nothing], "subject": subject._replace(annotations={}).json()})


def test_referrers_by_the_fallback_tag(server, client, mine):
    what = client.head("busybox", "lab")
    assert client.referrers("busybox", what.digest) == []
    mine.add(b"{}", image.EMPTY)
    client.push_blob("busybox", Descriptor(image.EMPTY, image.digest(b"{}"), 2), mine)
    pushed = []
    for text, kind in (("first", SBOM), ("second", "application/x-signature"), ("first", SBOM)):
        data = artifact(what, text, kind)
        pushed.append(client.put_manifest("busybox", image.digest(data), data, MANIFEST))
    found = client.referrers("busybox", what.digest)
    assert [(one.digest, one.artifact_type, one.annotations["text"]) for one in found] == [
        (pushed[0].digest, SBOM, "first"), (pushed[1].digest, "application/x-signature", "second")]
    assert client.referrers("busybox", what.digest, SBOM) == found[:1]
    raw = skopeo("inspect", "--raw", "--tls-verify=false",
                 f"docker://{server.host}/busybox:{what.digest.replace(':', '-')}")
    assert [one["digest"] for one in json.loads(raw)["manifests"]] == [one.digest for one in found]


def test_referrers_by_the_api_where_there_is_one(wicked, client):
    """Debian's registry has none: the proxy answers with an index that a registry stored, as the API would."""
    what = client.head("busybox", "lab")
    entry = Descriptor(MANIFEST, image.digest(b"x"), 1, artifact_type=SBOM)
    answer = {"status": 200, "body": index_of(entry.json()), "headers": {"Content-Type": INDEX}}
    wicked.twist = Twist("GET .*/referrers/", **answer)
    with registry.Registry(wicked.host) as watched:
        assert watched.referrers("busybox", what.digest) == [entry]
        assert [path for path, _ in wicked.asked("GET")] == [f"/v2/busybox/referrers/{what.digest}"]


def test_a_registry_that_keeps_referrers_itself_needs_no_tag(wicked, client, mine):
    subject = small_image(mine, "one", "subject").manifest
    wicked.twist = Twist("PUT .*manifests", headers={"OCI-Subject": subject.digest})
    mine.add(b"{}", image.EMPTY)
    with registry.Registry(wicked.host) as watched:
        watched.push_blob("itself", Descriptor(image.EMPTY, image.digest(b"{}"), 2), mine)
        watched.put_manifest("itself", "sbom", artifact(subject, "x"), MANIFEST)
    assert client.tags("itself") == ["sbom"]


# The bar, and the server


def test_the_bar_grows_to_its_full_width_once(capsys):
    bar = registry.Bar("pull")
    for done in (0, 10, 10, 55, 100, 100):
        bar(done, 100)
    assert capsys.readouterr().out == f"pull {'#' * 40} 100 %\n"


def test_progress_begins_where_the_earlier_pull_stopped(wicked, mine):
    layer, told = busybox_layer(), []
    wicked.twist = Twist(match=f"GET .*{layer.digest}", times=1, cut=layer.size // 2)
    with registry.Registry(wicked.host) as watched:
        with pytest.raises(RegistryError):
            registry.pull(watched, "busybox", "lab", mine)
        registry.pull(watched, "busybox", "lab", mine, progress=lambda *now: told.append(now))
    assert told == sorted(told)
    assert told[0][0] > 0
    assert told[-1][0] == told[-1][1]


def test_two_registries_stand_beside_each_other_and_leave_nothing():
    with registry_server.serve() as one, registry_server.serve() as two:
        assert one.host != two.host
        folders = {Path(one.root).parent, Path(two.root).parent}
        assert {folder.parent for folder in folders} == {Path(machine.DATA)}
        assert {folder.stat().st_mode & 0o77 for folder in folders} == {0}
    assert not any(folder.exists() for folder in folders)
    assert not os.path.exists(f"/proc/{one.pid}")


def test_the_registry_dies_with_whoever_started_it(tmp_path):
    code = ("import os, sys; from labs import registry_server as r\n"
            "with r.serve() as s: print(s.pid, os.path.dirname(s.root), flush=True); sys.stdin.read()")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as child:
        pid, folder = child.stdout.readline().split()
        child.kill()
        child.wait()
        process.until(lambda: not os.path.exists(f"/proc/{pid}") or process.status(int(pid)).state == "Z")
    with contextlib.suppress(ChildProcessError):  # where this is process 1, the orphan is ours
        os.waitpid(int(pid), 0)
    shutil.rmtree(folder)


def test_a_registry_that_cannot_start_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(registry_server, "_config", lambda *_: {"version": "9"})
    with (pytest.raises(LabError, match="docker-registry serve: ended at its start"),
          registry_server.serve(under=str(tmp_path))):
        pass
    assert not os.listdir(tmp_path)


# The engines


@pytest.mark.machine
class TestEngines:
    """These need a Docker daemon, and Podman's store: they run in the lab machine."""

    @pytest.fixture
    def run(self, server):
        names = [f"{server.host}/engine/{name}:v1" for name in ("ours", "docker", "podman")]
        yield lambda *words: subprocess.run(words, capture_output=True, text=True, check=True).stdout
        for engine in ("docker", "podman"):
            subprocess.run([engine, "rmi", "-f", *names], capture_output=True)

    def test_what_we_push_they_pull_and_run(self, run, server, client):
        registry.push(client, "engine/ours", "v1", Layout(LAB), "busybox")
        for engine, more in (("docker", []), ("podman", ["--tls-verify=false"])):
            name = f"{server.host}/engine/ours:v1"
            run(engine, "pull", "-q", *more, name)
            assert run(engine, "run", "--rm", "--network=none", name, "echo", engine) == f"{engine}\n"

    def test_what_they_push_we_pull(self, run, server, client, tmp_path):
        for engine, more in (("docker", []), ("podman", ["--tls-verify=false"])):
            run(engine, "tag", "busybox:lab", f"{server.host}/engine/{engine}:v1")
            run(engine, "push", "-q", *more, f"{server.host}/engine/{engine}:v1")
            layout = Layout.create(tmp_path / engine)
            registry.pull(client, f"engine/{engine}", "v1", layout, name="it")
            pulled = image.load(layout, "it")
            assert pulled.diff_ids == image.load(Layout(LAB), "busybox").diff_ids
            with layout.open(pulled.layers[0].digest) as packed:
                assert image.digest(gzip.decompress(packed.read())) == pulled.diff_ids[0]

    def test_a_flipped_bit_is_refused_by_all(self, run, mine):
        with registry_server.serve() as own, registry.Registry(own.host) as client:
            bad = two_layers(mine, "bad")
            registry.push(client, "bad", "v1", mine, "bad")
            path = Path(own.blob(bad.layers[1].digest))
            sound = path.read_bytes()
            for spoiled in (sound[:-1] + bytes([sound[-1] ^ 1]), sound[:-1]):
                path.write_bytes(spoiled)
                for command in (["docker", "pull"], ["podman", "pull", "--tls-verify=false"]):
                    with pytest.raises(subprocess.CalledProcessError):
                        run(*command, f"{own.host}/bad:v1")
