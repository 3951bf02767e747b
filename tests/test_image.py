"""labs.image against independent tools: trees of umoci and of overlay, digests of skopeo, Docker, containerd.

The class named Engines needs dockerd and containerd; the rest runs wherever skopeo and umoci do.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
import zstandard

from labs import errors, image, layer, machine, mounts
from labs.image import Descriptor, Platform

IMAGES = "/opt/labs/images"
NAMES = ("busybox", "debian", "webapp", "redis", "nginx")
LAB = image.Layout(IMAGES)
SKOPEO = ("skopeo", "--insecure-policy")


def tool(*command):
    done = subprocess.run([os.fspath(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def sha256(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def facts(place, status):
    """All that a file is, but for its inode number and where it lies."""
    attributes = {name: os.getxattr(place, name, follow_symlinks=False)
                  for name in os.listxattr(place, follow_symlinks=False) if not name.startswith("trusted.overlay.")}
    content = None
    if os.path.islink(place):
        content = os.readlink(place)
    elif os.path.isfile(place):
        with open(place, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    return status.st_mode, status.st_uid, status.st_gid, status.st_rdev, status.st_mtime_ns, attributes, content


def tree(root):
    """Path → facts of everything below a directory and of itself, and which paths are names of one file."""
    root = os.fspath(root)
    found, names = {".": facts(root, os.lstat(root))}, defaultdict(list)
    for path, status in layer.walk(root):
        found[path] = facts(os.path.join(root, path), status)
        if status.st_nlink > 1 and not os.path.isdir(os.path.join(root, path)):
            names[status.st_dev, status.st_ino].append(path)
    return found, sorted(map(tuple, names.values()))


def differences(one, other):
    """What two trees do not share, path by path, so that a failure says it in a few lines."""
    return {path: (one[0].get(path), other[0].get(path)) for path in {*one[0], *other[0]}
            if one[0].get(path) != other[0].get(path)}, set(one[1]) ^ set(other[1])


SAME = ({}, set())


@contextlib.contextmanager
def stacked(folder, layers):
    """The layered directories as overlay shows them, with an upper one that stays empty."""
    for part in ("upper", "work", "merged"):
        (folder / part).mkdir()
    with mounts.overlay(layers[::-1], str(folder / "upper"), str(folder / "work"), str(folder / "merged")) as merged:
        # overlay's own root stands for the upper directory, which we have just made
        status = os.lstat(layers[-1])
        os.chown(folder / "upper", status.st_uid, status.st_gid)
        os.chmod(folder / "upper", status.st_mode & 0o7777)
        os.utime(folder / "upper", ns=(status.st_mtime_ns, status.st_mtime_ns))
        yield merged


@pytest.fixture
def layout(tmp_path):
    return image.Layout.create(tmp_path / "layout")


@pytest.fixture
def disk():
    """A directory on the lab's disk: overlay wants its upper directory there."""
    path = Path(machine.DATA, machine.new_name("t"))
    path.mkdir(parents=True)
    yield path
    machine.remove_tree(str(path))


def tar(*entries, **pax):
    """An uncompressed layer: (name, bytes), (name, "target") for a symbolic link, ("name/", None)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers=pax) as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.mode, member.mtime = 0o755, 1_700_000_000
            if content is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b"") if isinstance(content, bytes) else None)
    return out.getvalue()


def add(layout, *tars, **options):
    """An image of those layers, as they are."""
    blobs = [(layout.add(data, image.LAYER), sha256(data)) for data in tars]
    return image.add_image(layout, blobs, **options)


# The same tree as everybody else's


# nginx stands on the debian layer, as the other two do: a tree more is minutes more on an emulated machine.
@pytest.fixture(scope="module", params=("busybox", "nginx"))
def unpacked(request, tmp_path_factory):
    """One of the lab's images as umoci unpacks it."""
    bundle = tmp_path_factory.mktemp("umoci") / request.param
    tool("umoci", "unpack", "--image", f"{IMAGES}:{request.param}", bundle)
    yield request.param, tree(bundle / "rootfs")
    machine.remove_tree(str(bundle))


def test_unpacked_onto_one_another_it_is_umocis_tree(unpacked, tmp_path):
    name, expected = unpacked
    done = []
    one = image.load(LAB, name)
    image.unpack(LAB, one, str(tmp_path / "root"), progress=done.append)
    assert differences(tree(tmp_path / "root"), expected) == SAME
    assert [step.diff_id for step in done] == one.diff_ids
    assert [step.size for step in done] == [part.size for part in one.layers]


def test_unpacked_in_layers_it_is_umocis_tree_under_overlay(unpacked, disk):
    name, expected = unpacked
    layers = image.unpack_layers(LAB, image.load(LAB, name), str(disk / "layers"))
    with stacked(disk, layers) as merged:
        assert differences(tree(merged), expected) == SAME


def rich(folder):
    """A directory with everything that a layer can say: twice as names, once each as kinds."""
    folder.mkdir()
    (folder / "dir/sub").mkdir(parents=True)
    (folder / "dir/file").write_bytes(b"content" * 1000)
    os.link(folder / "dir/file", folder / "dir/sub/second name")
    os.symlink("../dir/file", folder / "dir/link")
    os.link(folder / "dir/link", folder / "link-twice", follow_symlinks=False)
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "null", 0o020666, os.makedev(1, 3))
    (folder / "naïve-名前").write_text("x")
    (folder / ("n" * 200)).mkdir()
    (folder / ("n" * 200) / ("m" * 200)).write_text("long")
    for path, mode in (("dir/file", 0o4751), ("dir", 0o1770), ("dir/sub", 0o2755)):
        os.chmod(folder / path, mode)
    os.chown(folder / "fifo", 4_000_000, 3_000_000)
    os.setxattr(folder / "dir/file", "user.colour", b"blue\xff\x01=")
    os.setxattr(folder / "dir", "user.empty", b"")
    for number, path in enumerate(("dir/file", "dir/sub", "dir/link", "fifo", "dir")):
        moment = 1_234_567_890_123_456_789 + number
        os.utime(folder / path, ns=(moment, moment), follow_symlinks=False)
    return folder


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_what_was_packed_comes_back_whole(layout, disk, compression):
    source = rich(disk / "source")
    one = image.add_image(layout, [image.add_layer(layout, str(source), compression=compression)], name="rich")
    expected = tree(source)
    image.unpack(layout, one, str(disk / "root"))
    layers = image.unpack_layers(layout, one, str(disk / "layers"))
    for got in (tree(disk / "root"), tree(layers[0])):
        got[0].pop("."), expected[0].pop(".", None)
        assert differences(got, expected) == SAME


def test_what_was_packed_is_the_same_for_umoci(layout, disk):
    source = rich(disk / "source")
    os.removexattr(source / "dir", "user.empty")  # Go's archive/tar reads an empty value as "take it away"
    image.add_image(layout, [image.add_layer(layout, str(source))], name="rich")
    tool("umoci", "unpack", "--image", f"{layout.path}:rich", disk / "bundle")
    got, expected = tree(disk / "bundle/rootfs"), tree(source)
    got[0].pop("."), expected[0].pop(".")
    assert differences(got, expected) == SAME


WHITEOUTS = (
    tar(("a/", None), ("a/1", b"1"), ("a/2", b"2"), ("b/", None), ("b/sub/", None), ("b/sub/x", b"x"), ("c", b"c"),
        ("link", "a")),
    tar(("a/", None), ("a/.wh.1", b""), ("b/", None), ("b/.wh..wh..opq", b""), ("b/new", b"n"), (".wh.c", b""),
        ("d/", None)),
    tar(("c/", None), ("c/now a directory", b""), (".wh.link", b""), ("a/.wh.never was", b""), ("d", b"now a file")),
)


def test_whiteouts_mean_the_same_to_all_three(layout, disk):
    one = add(layout, *WHITEOUTS, name="w")
    tool("umoci", "unpack", "--image", f"{layout.path}:w", disk / "bundle")
    expected = tree(disk / "bundle/rootfs")
    expected[0].pop(".")  # no layer lists it
    assert sorted(expected[0]) == ["a", "a/2", "b", "b/new", "c", "c/now a directory", "d"]
    image.unpack(layout, one, str(disk / "root"))
    with stacked(disk, image.unpack_layers(layout, one, str(disk / "layers"))) as merged:
        for found in (tree(disk / "root"), tree(merged)):
            found[0].pop(".")
            assert differences(found, expected) == SAME


@pytest.mark.parametrize("entries", [
    (("d/new", b"n"), (".wh.d", b"")),
    ((".wh.d", b""), ("d/new", b"n")),
    (("d/", None), ("d/new", b"n"), (".wh.d", b"")),
    (("d/", None), ("d/sub/new", b"n"), ("d/.wh..wh..opq", b"")),
    (("d/sub/new", b"n"), ("d/.wh..wh..opq", b"")),
])
def test_a_whiteout_hides_only_what_is_below_wherever_it_stands(layout, disk, entries):
    one = add(layout, tar(("d/", None), ("d/old", b"o"), ("d/sub/", None), ("d/sub/old", b"o")), tar(*entries))
    image.unpack(layout, one, str(disk / "root"))
    with stacked(disk, image.unpack_layers(layout, one, str(disk / "layers"))) as merged:
        for root in (str(disk / "root"), merged):
            assert [path for path, _ in layer.walk(root) if path.endswith(("old", "new"))] == [
                name for name, _ in entries if name.endswith("new")]


def test_a_directory_that_a_layer_does_not_list_stays_as_it_was(layout, disk):
    """Owner, mode, attributes and time of d are those of the layer below, though the upper one writes into it."""
    source = rich(disk / "source")
    os.chown(source / "dir", 7, 8)
    for moment, path in enumerate(("dir/sub", "dir", "."), 1000):
        os.utime(source / path, (moment, moment))
    first = image.add_layer(layout, str(source))
    more = tar(("dir/sub/deep/new", b"n"), ("dir/.wh.link", b""))
    one = image.add_image(layout, [first, (layout.add(more, image.LAYER), sha256(more))], name="i")
    expected = tree(source)[0]
    tool("umoci", "unpack", "--image", f"{layout.path}:i", disk / "bundle")
    image.unpack(layout, one, str(disk / "root"))
    with stacked(disk, image.unpack_layers(layout, one, str(disk / "layers"))) as merged:
        for root in (disk / "root", merged):
            found = tree(root)[0]
            assert {path: found[path] for path in ("dir", "dir/sub")} == {
                path: expected[path] for path in ("dir", "dir/sub")}


BEHIND_A_LINK = (tar(("usr/", None), ("usr/lib/", None), ("usr/lib/old", b"o"), ("lib", "usr/lib")),
                 tar(("lib/new", b"n")))


def test_an_entry_behind_a_lower_layers_link_follows_it_as_umoci_does(layout, tmp_path):
    one = add(layout, *BEHIND_A_LINK, name="l")
    image.unpack(layout, one, str(tmp_path / "root"))
    tool("umoci", "unpack", "--image", f"{layout.path}:l", tmp_path / "bundle")
    for root in (tmp_path / "root", tmp_path / "bundle/rootfs"):
        assert os.readlink(root / "lib") == "usr/lib"
        assert sorted(os.listdir(root / "usr/lib")) == ["new", "old"]


def test_unpacked_alone_the_same_entry_makes_a_directory(layout, disk):
    """The known difference: overlay's layers are unpacked each alone, nobody sees the link below; so with overlay2."""
    layers = image.unpack_layers(layout, add(layout, *BEHIND_A_LINK), str(disk / "layers"))
    with stacked(disk, layers) as merged:
        assert os.listdir(f"{merged}/lib") == ["new"]
        assert os.listdir(f"{merged}/usr/lib") == ["old"]


def test_layers_that_are_there_are_used_again(tmp_path):
    first = image.unpack_layers(LAB, image.load(LAB, "busybox"), str(tmp_path))
    inode = os.stat(first[0]).st_ino
    assert image.unpack_layers(LAB, image.load(LAB, "busybox"), str(tmp_path)) == first
    assert os.stat(first[0]).st_ino == inode
    assert os.listdir(tmp_path) == [os.path.basename(first[0])]


def test_equal_layers_of_one_image_are_directories_of_their_own(layout, disk):
    empty = tar()
    layers = image.unpack_layers(layout, add(layout, tar(("file", b"x")), empty, empty, empty), str(disk / "layers"))
    with stacked(disk, layers) as merged:
        assert os.listdir(merged) == ["file"]


# The same names as everybody else's


@pytest.mark.parametrize("name", NAMES)
def test_skopeo_reads_the_same_digests(name):
    one = image.load(LAB, name)
    seen = json.loads(tool(*SKOPEO, "inspect", f"oci:{IMAGES}:{name}"))
    assert (seen["Digest"], seen["Layers"]) == (one.manifest.digest, [part.digest for part in one.layers])
    assert seen["Env"] == one.run["Env"]
    raw = json.loads(tool(*SKOPEO, "inspect", "--raw", "--config", f"oci:{IMAGES}:{name}"))
    assert raw["rootfs"]["diff_ids"] == one.diff_ids
    for part, diff_id in zip(one.layers, one.diff_ids, strict=True):
        assert "sha256:" + tool("sh", "-c", f"gzip -dc {LAB.blob(part.digest)} | sha256sum").split()[0] == diff_id


def test_skopeo_copies_what_we_made_and_we_read_what_it_copied(layout, tmp_path):
    blobs = [(layout.add(gzip.compress(data), image.LAYER + "+gzip"), sha256(data)) for data in WHITEOUTS]
    one = image.add_image(layout, blobs, name="made", epoch=0, config={"Cmd": ["x"]})
    tool(*SKOPEO, "copy", f"oci:{layout.path}:made", f"dir:{tmp_path}/dir")
    assert sha256((tmp_path / "dir/manifest.json").read_bytes()) == one.manifest.digest
    tool(*SKOPEO, "copy", f"dir:{tmp_path}/dir", f"oci:{tmp_path}/back:made")
    again = image.load(image.Layout(tmp_path / "back"), "made")
    assert again[1:] == one[1:]
    assert again.manifest.digest == one.manifest.digest


def test_a_docker_archive_keeps_the_diff_ids(tmp_path):
    one = image.load(LAB, "webapp")
    tool(*SKOPEO, "copy", f"oci:{IMAGES}:webapp", f"docker-archive:{tmp_path}/a.tar:webapp:test")
    with tarfile.open(tmp_path / "a.tar") as archive:
        listed = json.load(archive.extractfile("manifest.json"))[0]
        assert [f"sha256:{name.removesuffix('.tar')}" for name in listed["Layers"]] == one.diff_ids
    tool(*SKOPEO, "copy", f"docker-archive:{tmp_path}/a.tar:webapp:test", f"oci:{tmp_path}/back:webapp")
    assert image.load(image.Layout(tmp_path / "back"), "webapp").diff_ids == one.diff_ids


def test_zstd_layers_have_other_digests_and_the_same_tree(tmp_path):
    one = image.load(LAB, "busybox")
    tool(*SKOPEO, "copy", "--dest-compress-format", "zstd", f"oci:{IMAGES}:busybox", f"oci:{tmp_path}/z:busybox")
    there = image.Layout(tmp_path / "z")
    two = image.load(there, "busybox")
    assert two.layers[0].media_type == image.LAYER + "+zstd"
    assert two.layers[0].digest != one.layers[0].digest
    assert two.diff_ids == one.diff_ids
    with there.open(two.layers[0].digest) as file:
        assert file.read(4) == zstandard.FRAME_HEADER
    image.unpack(LAB, one, str(tmp_path / "gzip"))
    image.unpack(there, two, str(tmp_path / "zstd"))
    assert differences(tree(tmp_path / "gzip"), tree(tmp_path / "zstd")) == SAME


def test_dockers_own_media_types_mean_the_same(layout, tmp_path):
    tool(*SKOPEO, "copy", "--format", "v2s2", f"oci:{IMAGES}:busybox", f"dir:{tmp_path}/dir")
    for path in (tmp_path / "dir").iterdir():
        data = path.read_bytes()
        if path.name == "manifest.json":
            layout.tag("busybox", layout.add(data, image.DOCKER_MANIFEST))
        elif path.name != "version":
            layout.add(data, "any")
    one = image.load(layout, "busybox")
    assert one.layers[0].media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    assert one.diff_ids == image.load(LAB, "busybox").diff_ids
    image.unpack(layout, one, str(tmp_path / "root"))
    image.unpack(LAB, image.load(LAB, "busybox"), str(tmp_path / "other"))
    assert differences(tree(tmp_path / "root"), tree(tmp_path / "other")) == SAME


def test_chain_ids_are_those_of_the_specification():
    ids = [sha256(letter) for letter in (b"a", b"b", b"c")]
    second = sha256(f"{ids[0]} {ids[1]}".encode())
    assert image.chain_ids(ids) == [ids[0], second, sha256(f"{second} {ids[2]}".encode())]
    assert image.chain_ids([]) == []


class TestEngines:
    @pytest.mark.machine
    def test_docker_names_its_layers_by_chain_id(self):
        """The lab's images stand in Docker; the directories of its layer database are named by chain ids."""
        for name in ("busybox", "webapp"):
            told = json.loads(tool("docker", "image", "inspect", f"{name}:lab"))[0]
            one = image.load(LAB, name)
            assert told["RootFS"]["Layers"] == one.diff_ids
            for chain, diff_id in zip(image.chain_ids(one.diff_ids), one.diff_ids, strict=True):
                place = Path("/var/lib/docker/image/overlay2/layerdb", chain.replace(":", "/"))
                assert (place / "diff").read_text() == diff_id

    @pytest.mark.machine
    def test_containerd_names_its_snapshots_by_chain_id(self, tmp_path):
        ctr = ("ctr", "--namespace", machine.new_name("t"))
        tool(*SKOPEO, "copy", f"oci:{IMAGES}:webapp", f"oci-archive:{tmp_path}/a.tar:labs/webapp:test")
        try:
            tool(*ctr, "images", "import", tmp_path / "a.tar")
            named = tool(*ctr, "images", "list", "-q").split()
            rows = [line.split()[0] for line in tool(*ctr, "snapshots", "list").splitlines()[1:]]
            assert sorted(rows) == sorted(image.chain_ids(image.load(LAB, "webapp").diff_ids))
            tool(*ctr, "images", "remove", "--sync", *named)
        finally:
            tool("ctr", "namespaces", "remove", ctr[-1])

    @pytest.mark.machine
    def test_docker_too_makes_a_directory_in_the_place_of_a_lower_layers_link(self, layout, disk):
        image.copy(LAB, "busybox", layout)
        busybox = image.load(layout, "busybox")
        base = (busybox.layers[0], busybox.diff_ids[0])
        more = [(layout.add(data, image.LAYER), sha256(data)) for data in (
            tar(("opt/", None), ("opt/real/", None), ("opt/link", "real")), tar(("opt/link/new", b"n")))]
        one = image.add_image(layout, [base, *more], name="linked", epoch=0)
        tool(*SKOPEO, "copy", f"oci:{layout.path}:linked", "docker-daemon:labs-linked:test")
        try:
            seen = tool("docker", "run", "--rm", "labs-linked:test", "/bin/sh", "-c", "ls /opt/real; ls /opt/link/")
        finally:
            tool("docker", "image", "rm", "labs-linked:test")
        with stacked(disk, image.unpack_layers(layout, one, str(disk / "layers"))) as merged:
            assert os.path.isdir(f"{merged}/opt/link") and not os.path.islink(f"{merged}/opt/link")
            assert os.listdir(f"{merged}/opt/real") == []
            assert seen.split() == os.listdir(f"{merged}/opt/link") == ["new"]


# Platforms


@pytest.fixture
def platforms(layout):
    """An index named "all": amd64, arm64/v8, arm/v7, arm/v6."""
    parts = []
    for platform in (Platform("linux", "amd64"), Platform("linux", "arm64", "v8"), Platform("linux", "arm", "v6"),
                     Platform("linux", "arm", "v7")):
        made = add(layout, tar(("what", str(platform).encode())), platform=platform)
        parts.append(made.manifest._replace(platform=platform))
    index = {"schemaVersion": 2, "mediaType": image.INDEX, "manifests": [one.json() for one in parts]}
    layout.tag("all", layout.add_json(index, image.INDEX))
    return layout


@pytest.mark.parametrize("platform", [("amd64", ""), ("arm64", "v8"), ("arm64", ""), ("arm", "v7"), ("arm", "v6")])
def test_platform_is_chosen_as_skopeo_does(platforms, tmp_path, platform):
    architecture, variant = platform
    options = ["--override-os", "linux", "--override-arch", architecture]
    options += ["--override-variant", variant] if variant else []
    tool(*SKOPEO, *options, "copy", f"oci:{platforms.path}:all", f"dir:{tmp_path}/dir")
    one = image.load(platforms, "all", Platform("linux", architecture, variant))
    assert sha256((tmp_path / "dir/manifest.json").read_bytes()) == one.manifest.digest


def test_a_platform_that_the_index_has_not(platforms):
    with pytest.raises(errors.BadInput) as caught:
        image.load(platforms, "all", Platform("linux", "s390x"))
    assert str(caught.value) == ("platform: 'linux/s390x': must be one that the index has: "
                                 "linux/amd64, linux/arm/v6, linux/arm/v7, linux/arm64/v8")


def test_an_index_in_an_index(platforms):
    outer = {"schemaVersion": 2, "manifests": [platforms.find("all")._replace(
        annotations={}, platform=Platform("linux", "arm64")).json()]}
    platforms.tag("outer", platforms.add_json(outer, image.INDEX))
    one = image.load(platforms, "outer", Platform("linux", "arm64"))
    assert one.settings["variant"] == "v8"


# A layout


def listing(folder):
    return sorted(path for path, status in layer.walk(str(folder)))


def test_a_new_layout_is_one_to_skopeo(layout):
    add(layout, tar(("a", b"")), name="one")
    add(layout, tar(("b", b"")), name="two")
    assert sorted(layout.names()) == ["one", "two"]
    for name in layout.names():
        assert tool(*SKOPEO, "inspect", "--raw", f"oci:{layout.path}:{name}")
    assert json.loads(Path(layout.path, "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert image.Layout.create(layout.path).names() == layout.names()


DATA = b"0123456789" * 10
WANTED = Descriptor("text/plain", sha256(DATA), len(DATA))


def test_incoming_is_in_its_place_only_at_the_end(layout):
    with layout.incoming(WANTED) as blob:
        blob.write(DATA[:50])
        assert not layout.has(WANTED.digest)
        blob.write(DATA[50:])
    assert layout.read(WANTED) == DATA
    assert not os.path.exists(f"{layout.path}/partial")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DATA[:-1], "blob: size is 99, not 100"),
        (DATA + b"!", "blob: size is at least 101, not 100"),
        (b"", "blob: size is 0, not 100"),
        (b"x" * 100, f"blob: digest is {sha256(b'x' * 100)}, not {WANTED.digest}"),
    ],
)
def test_incoming_that_is_not_what_was_announced(layout, data, message):
    before = listing(layout.path)
    with pytest.raises(errors.Mismatch) as caught, layout.incoming(WANTED) as blob:
        blob.write(data)
    assert str(caught.value) == message
    assert listing(layout.path) == before


def test_incoming_goes_on_where_it_was_interrupted(layout):
    for end in (30, 60):
        with pytest.raises(ConnectionError), layout.incoming(WANTED) as blob:
            blob.write(DATA[blob.offset:end])
            raise ConnectionError
    with layout.incoming(WANTED) as blob:
        assert blob.offset == 60
        blob.write(DATA[60:])
    assert layout.read(WANTED) == DATA
    assert not os.path.exists(f"{layout.path}/partial")


def test_incoming_begins_anew_when_told_to(layout):
    with pytest.raises(ConnectionError), layout.incoming(WANTED) as blob:
        blob.write(b"rubbish")
        raise ConnectionError
    with layout.incoming(WANTED) as blob:
        blob.restart()
        assert blob.offset == 0
        blob.write(DATA)
    assert layout.read(WANTED) == DATA


def test_what_an_interruption_spoilt_is_thrown_away(layout):
    with pytest.raises(ConnectionError), layout.incoming(WANTED) as blob:
        blob.write(b"rubbish")
        raise ConnectionError
    with pytest.raises(errors.Mismatch), layout.incoming(WANTED) as blob:
        blob.write(DATA[7:])
    with layout.incoming(WANTED) as blob:
        assert blob.offset == 0
        blob.write(DATA)


def test_incoming_without_a_name_leaves_nothing_when_it_fails(layout):
    before = listing(layout.path)
    with pytest.raises(ConnectionError), layout.incoming() as blob:
        blob.write(DATA)
        raise ConnectionError
    assert listing(layout.path) == before


def test_sha512(layout):
    wanted = Descriptor("text/plain", f"sha512:{hashlib.sha512(DATA).hexdigest()}", len(DATA))
    with layout.incoming(wanted) as blob:
        blob.write(DATA)
    assert layout.read(wanted) == DATA


@pytest.mark.parametrize("name", ["sha256:../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, "", None,
                                  "sha256:" + "0" * 63, "sha256:" + "0" * 64 + "\n"])
def test_a_digest_that_is_none_never_becomes_a_path(layout, name):
    with pytest.raises(errors.BadInput, match="must be sha256: and 64"):
        layout.blob(name)


def test_tag_moves_and_untag_keeps_the_blobs(layout):
    one, two = add(layout, tar(("a", b"")), name="x"), add(layout, tar(("b", b"")))
    layout.tag("x", two.manifest)
    layout.tag("y", two.manifest)
    assert layout.find("x").digest == layout.find("y").digest == layout.find(two.manifest.digest).digest
    layout.untag("x")
    assert layout.names() == ["y"]
    assert layout.has(one.manifest.digest)
    with pytest.raises(errors.BadInput, match="image: 'x': must be one of y"):
        layout.untag("x")
    for bad in ("", "a b", "a\n"):
        with pytest.raises(errors.BadInput, match="white space"):
            layout.tag(bad, one.manifest)


def test_gc_removes_what_no_name_leads_to(platforms):
    kept = add(platforms, tar(("what", b"linux/amd64"), ("more", b"")), name="kept")
    assert platforms.gc() == []
    before = {one.digest for one in platforms.index()}
    platforms.untag("all")
    gone = platforms.gc()
    assert len(gone) == 1 + 4 * 3
    assert before - set(gone) == {kept.manifest.digest}
    assert image.load(platforms, "kept")[1:] == kept[1:]
    assert platforms.gc() == []


def test_copy_takes_all_that_is_needed_and_no_more(platforms, tmp_path):
    add(platforms, tar(("other", b"")), name="other")
    there = image.Layout.create(tmp_path / "there")
    image.copy(platforms, "all", there, "new")
    assert there.names() == ["new"]
    assert there.reachable() == {f"sha256:{Path(path).name}" for path in listing(f"{there.path}/blobs/sha256")}
    assert image.load(there, "new", Platform("linux", "arm", "v7")).settings["variant"] == "v7"
    assert tool(*SKOPEO, "inspect", "--override-arch", "amd64", f"oci:{there.path}:new")


def test_copy_of_a_broken_blob_stops(layout, tmp_path):
    one = add(layout, tar(("a", b"")), name="a")
    Path(layout.blob(one.layers[0].digest)).write_bytes(tar(("b", b"")))
    there = image.Layout.create(tmp_path / "there")
    with pytest.raises(errors.Mismatch, match="digest"):
        image.copy(layout, "a", there)
    assert there.names() == []
    assert not there.has(one.layers[0].digest)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must be a directory with a file oci-layout"),
        ({"oci-layout": "{"}, "must be a directory with a file oci-layout"),
        ({"oci-layout": "[]"}, "must be a directory with a file oci-layout"),
        ({"oci-layout": '{"imageLayoutVersion": "2.0.0"}'}, "layout: '2.0.0': imageLayoutVersion must be 1.0.0"),
    ],
)
def test_what_is_no_layout(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(errors.BadInput, match=message):
        image.Layout(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json: '{': must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "index.json: "),
        ('{"schemaVersion": 2}', "index.json: .*'manifests' is a required property"),
        ('{"schemaVersion": 2, "manifests": [{}]}', r"index.json: 'manifests\[0\]': .*required property"),
        ('{"schemaVersion": 1, "manifests": []}', "index.json: 'schemaVersion'"),
    ],
)
def test_a_broken_index(layout, text, message):
    Path(layout.path, "index.json").write_text(text)
    with pytest.raises(errors.BadInput, match=message):
        layout.names()


# Manifests that lie


@pytest.fixture
def lie(layout):
    """Changes one document of a good image and everything above it, so that only the lie itself is wrong."""

    def change(what, value):
        one = add(layout, tar(("a", b"1")), tar(("b", b"2")))
        manifest, settings = json.loads(layout.read(one.manifest)), dict(one.settings)
        inner = {"manifest": manifest, "config": settings}
        *path, last = what.split(".")
        for key in path:
            inner = inner[int(key) if key.isdigit() else key]
        inner[int(last) if last.isdigit() else last] = value
        if what.startswith("config."):
            manifest["config"] = layout.add_json(settings, image.CONFIG).json()
        layout.tag("lie", layout.add_json(manifest, image.MANIFEST))
        return layout

    return change


OTHER = sha256(b"other")


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("manifest.layers.0.size", 7, "layers[0]: size is 10240, not 7"),
        ("manifest.layers.1.size", 10**15, "layers[1]: size is 10240, not 1000000000000000"),
        ("manifest.layers.0.size", -1, "layers[0].size: -1: must be a number of bytes"),
        ("manifest.layers.0.size", True, "layers[0].size"),
        ("manifest.layers.0.digest", OTHER, "no such blob in the layout"),
        ("manifest.layers.0.digest", "sha256:..", "layers[0].digest"),
        ("manifest.layers.0.mediaType", "text/html", "layers[0].mediaType: 'text/html': must be one of"),
        ("manifest.layers", [], "manifest: 'layers'"),
        ("manifest.layers", "all", "manifest: 'layers'"),
        ("manifest.config.size", 1, "blob: size is"),
        ("manifest.config.size", 10**9, "size: 1000000000: must not be over 4194304 bytes"),
        ("manifest.config.digest", OTHER, "no such blob in the layout"),
        ("manifest.schemaVersion", 1, "manifest: 'schemaVersion'"),
        ("config.rootfs.diff_ids", [OTHER], "config.rootfs.diff_ids: 1: must be as many as layers: 2"),
        ("config.rootfs.diff_ids.1", OTHER, f"layers[1]: diffID is {sha256(tar(('b', b'2')))}, not {OTHER}"),
        ("config.rootfs.type", "tree", "config: 'rootfs.type'"),
        ("config.rootfs", None, "config: 'rootfs'"),
    ],
)
def test_a_lie_is_told_in_one_line_and_nothing_is_made(lie, tmp_path, what, value, message):
    layout = lie(what, value)
    (tmp_path / "out").mkdir()
    for unpack in (image.unpack, image.unpack_layers):
        with pytest.raises((errors.BadInput, errors.Mismatch)) as caught:
            unpack(layout, image.load(layout, "lie"), str(tmp_path / "out/root"))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert [path for path in listing(tmp_path / "out") if path.endswith("/b") or ".labs-" in path] == []
    assert not os.path.exists(tmp_path / "out/root/a")


def test_a_flipped_bit_in_a_layer(layout, tmp_path):
    one = image.add_image(layout, [image.add_layer(layout, str(rich(tmp_path / "source")))], name="x")
    blob = Path(layout.blob(one.layers[0].digest))
    good = blob.read_bytes()
    for at in (0, 5, len(good) // 2, len(good) - 1):
        blob.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        with pytest.raises((errors.Mismatch, errors.BadInput)):
            image.unpack(layout, one, str(tmp_path / "root"))
        assert sorted(os.listdir(tmp_path)) == ["layout", "source"]


@pytest.mark.parametrize("packed", [gzip.compress, zstandard.compress])
def test_bytes_behind_a_layer_are_part_of_its_digest(layout, tmp_path, packed):
    data = tar(("a", b"1"))
    whole = packed(data) + b"\0" * 10
    one = image.add_image(layout, [(layout.add(whole, image.LAYER + "+gzip"), sha256(data))])
    with contextlib.suppress(errors.BadInput):
        image.unpack(layout, one, str(tmp_path / "root"))
    Path(layout.blob(one.layers[0].digest)).write_bytes(whole[:-1] + b"x")
    with pytest.raises((errors.Mismatch, errors.BadInput)):
        image.unpack(layout, one, str(tmp_path / "other"))
    assert not os.path.exists(tmp_path / "other")


def test_an_index_that_says_it_leads_to_itself_is_found_out(layout):
    """No document can hold its own digest, so such a one is not what its name says."""
    index = {"schemaVersion": 2, "manifests": [Descriptor(image.INDEX, OTHER, 0, platform=image.HOST).json()]}
    size = len(image.canonical(index)) + 2
    index["manifests"][0]["size"] = size
    data = image.canonical(index)
    Path(layout.blob(OTHER)).write_bytes(data)
    layout.tag("loop", Descriptor(image.INDEX, OTHER, len(data)))
    for look in (lambda: image.load(layout, "loop"), layout.gc):
        with pytest.raises(errors.Mismatch, match="digest"):
            look()


def test_a_hundred_indexes_in_one_another(layout):
    one = add(layout, tar(("a", b""))).manifest
    for _ in range(100):
        inner = one._replace(platform=image.HOST).json()
        one = layout.add_json({"schemaVersion": 2, "manifests": [inner]}, image.INDEX)
    assert image.load(layout, one).settings["architecture"] == image.HOST.architecture


def test_a_target_that_is_there_is_left_alone(layout, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/mine").write_text("kept")
    with pytest.raises(errors.BadInput, match="must not be there yet"):
        image.unpack(layout, add(layout, tar(("a", b""))), str(tmp_path / "root"))
    assert os.listdir(tmp_path / "root") == ["mine"]


# Making images


def test_the_same_directory_is_the_same_image_twice(layout, tmp_path):
    source = rich(tmp_path / "source")
    made = [image.add_image(layout, [image.add_layer(layout, str(source), epoch=0)], epoch=0) for _ in range(2)]
    os.utime(source / "dir/file")
    made.append(image.add_image(layout, [image.add_layer(layout, str(source), epoch=0)], epoch=0))
    assert len({one.manifest.digest for one in made}) == 1
    assert made[0].settings["created"] == "1970-01-01T00:00:00Z"


def test_compression_by_name_only(layout, tmp_path):
    with pytest.raises(errors.BadInput, match="compression: 'xz'"):
        image.add_layer(layout, str(tmp_path), compression="xz")
    assert not os.path.exists(f"{layout.path}/partial")
