"""labs.layer against GNU tar, umoci and the kernel: what goes in comes out, whoever packed and whoever unpacked.

What a layer must not do stands in test_layer_attacks.py.
"""

import contextlib
import gzip
import io
import os
import socket
import stat
import struct
import subprocess
import tarfile

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labs import errors, image, layer, mounts
from tests import layers
from tests.layers import entry, facts, folder, packed, run, symlink, tar, unpacked

EVERY_DEVICE = {"devices": None}
LONG = "/".join(["d" * 60] * 6)


@pytest.fixture
def source(tmp_path):
    """A tree with everything in it that a tar can say."""
    root = tmp_path / "source"
    for path in ("bin", "dev", "empty", "acl", LONG, "odd"):
        (root / path).mkdir(parents=True)
    (root / "bin/tool").write_bytes(os.urandom(70_000))
    os.chown(root / "bin/tool", 3, 4)
    os.chmod(root / "bin/tool", 0o4755)
    (root / "bin/capable").write_bytes(b"#!")
    run("setcap", "cap_net_raw+ep", root / "bin/capable")
    os.link(root / "bin/tool", root / "bin/again")
    os.symlink("tool", root / "bin/link")
    os.link(root / "bin/link", root / "bin/link2", follow_symlinks=False)
    os.symlink("/nowhere/" + "x" * 200, root / "bin/dangling")
    os.mkfifo(root / "dev/fifo")
    os.mknod(root / "dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "dev/disk", 0o660 | stat.S_IFBLK, os.makedev(8, 17))
    (root / LONG / "file").write_text("far down")
    os.chmod(root / "empty", 0o1777)
    os.chmod(root / "dev/null", 0o666)
    for name in (b"latin-\xe9\xff", "日本語".encode(), b" spaces ", b"-rf", b"back\\slash", b"*"):
        with open(os.path.join(os.fsencode(root / "odd"), name), "wb") as file:
            file.write(name)
    with open(root / "hole", "wb") as file:
        for offset in (0, 1 << 20, 5 << 20):
            file.seek(offset)
            file.write(b"data" * 1024)
        file.truncate(7 << 20)
    (root / "all-hole").touch()
    os.truncate(root / "all-hole", 1 << 20)
    os.setxattr(root / "hole", "security.labs", bytes(range(256)))
    os.setxattr(root / "odd", "security.labs", b"on a directory")
    for number, place in enumerate(sorted(root.rglob("*"))):
        os.utime(place, ns=(0, (1_600_000_000 + number) * 10**9 + number * 1_234_567), follow_symlinks=False)
    return root


def gnu(root, *options):
    """The tar that GNU tar makes of what is in a directory."""
    own = ["--xattrs", "--xattrs-include=*"] if "--format=pax" in options else []
    return run("tar", "--numeric-owner", *own, *options, "--sort=name", "-C", root, "-cf", "-", ".")


def by_gnu(data, target):
    """What GNU tar makes of a tar."""
    os.makedirs(target)
    run("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", "-", "-C", target, input=data)
    return target


# What GNU tar packs


@pytest.mark.parametrize("options", [
    ["--format=gnu"], ["--format=gnu", "--sparse"], ["--format=pax"],
    ["--format=pax", "--sparse", "--sparse-version=0.0"], ["--format=pax", "--sparse", "--sparse-version=0.1"],
    ["--format=pax", "--sparse", "--sparse-version=1.0"]], ids=" ".join)
def test_a_tar_of_gnu_tar_becomes_the_tree_that_gnu_tar_makes(options, source, tmp_path):
    data = gnu(source, *options)
    ours, theirs = unpacked(data, tmp_path / "ours", **EVERY_DEVICE), by_gnu(data, tmp_path / "theirs")
    assert facts(ours) == facts(theirs)
    if "--format=pax" in options:
        assert facts(ours) == facts(source)
    if "--sparse" in options:
        assert os.stat(ours / "hole").st_blocks * 512 < 1 << 20


def test_a_ustar_of_gnu_tar(source, tmp_path):
    run("rm", "-r", source / "bin/dangling", source / LONG.partition("/")[0])
    data = gnu(source, "--format=ustar")
    ours, theirs = unpacked(data, tmp_path / "ours", **EVERY_DEVICE), by_gnu(data, tmp_path / "theirs")
    assert facts(ours) == facts(theirs)


@pytest.mark.parametrize("sparse", ["gnu", "0.0", "0.1", "1.0"])
def test_a_sparse_file_of_very_many_pieces(sparse, tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    with open(root / "comb", "wb") as file:
        for offset in range(0, 4 << 20, 16384):
            file.seek(offset)
            file.write(b"x" * 100)
    run("sync", "-f", root)
    form = ["--format=gnu"] if sparse == "gnu" else ["--format=pax", f"--sparse-version={sparse}"]
    ours = unpacked(gnu(root, "--sparse", *form), tmp_path / "ours")
    assert (ours / "comb").read_bytes() == (root / "comb").read_bytes()


def test_busybox_tar(tmp_path):
    """Another tar altogether: it knows ustar and GNU's long names, and no time below a second."""
    root = tmp_path / "source"
    (root / LONG).mkdir(parents=True)
    (root / LONG / "file").write_text("far down")
    os.link(root / LONG / "file", root / "again")
    os.symlink("y" * 150, root / "link")
    ours = unpacked(run("busybox", "tar", "-C", root, "-cf", "-", "."), tmp_path / "ours")
    assert facts(ours, times=False) == facts(root, times=False)


# What we pack


def test_gnu_tar_makes_the_same_tree_of_our_tar(source, tmp_path):
    assert facts(by_gnu(packed(source), tmp_path / "theirs")) == facts(source)


def test_there_and_back(source, tmp_path):
    data = packed(source)
    ours = unpacked(data, tmp_path / "ours", **EVERY_DEVICE)
    assert facts(ours) == facts(source)
    assert packed(ours) == data


def test_gnu_tar_lists_our_tar_with_the_same_facts(source):
    """A listing is read by a person: names, modes, owners, link targets, in one order."""
    listed = run("tar", "--numeric-owner", "--full-time", "-tvf", "-", input=packed(source)).decode(errors="replace")
    assert "-rwsr-xr-x 3/4" in listed
    assert "link to bin/again" in listed
    assert "crw-rw-rw- 0/0" in listed
    assert "1,3 " in listed
    names = run("tar", "--quoting-style=literal", "-tf", "-", input=packed(source)).splitlines()
    assert [name.rstrip(b"/") for name in names] == [os.fsencode(path) for path, _ in layer.walk(os.fspath(source))]


def test_umoci_unpacks_what_we_packed(source, tmp_path):
    os.unlink(source / "dev/disk")
    layout = image.Layout.create(tmp_path / "layout")
    one = image.add_image(layout, [image.add_layer(layout, os.fspath(source))], name="test")
    run("umoci", "unpack", "--image", f"{layout.path}:test", tmp_path / "bundle")
    theirs, ours = tmp_path / "bundle/rootfs", image.unpack(layout, one, os.fspath(tmp_path / "ours"))
    assert facts(ours) == facts(theirs)


def test_the_same_tree_gives_the_same_bytes_and_a_later_epoch_changes_nothing(source):
    assert packed(source) == packed(source)
    assert packed(source, epoch=1 << 32) == packed(source)
    with tarfile.open(fileobj=io.BytesIO(packed(source, epoch=1_600_000_003))) as found:
        times = sorted({member.mtime for member in found})
    assert times[-1] == 1_600_000_003
    assert len(times) == 4


@pytest.mark.parametrize("moment", [0, -1, -500_000_000, -1_500_000_000, 10**9 + 1, (1 << 33) * 10**9 // 4 + 5])
def test_times_to_the_nanosecond_and_before_1970(moment, tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    (root / "file").touch()
    os.utime(root / "file", ns=(moment, moment))
    for tree in (by_gnu(packed(root), tmp_path / "theirs"), unpacked(packed(root), tmp_path / "ours")):
        assert os.stat(tree / "file").st_mtime_ns == moment


def test_sockets_and_skipped_paths_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("source")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("source/socket")
    (tmp_path / "source/kept").touch()
    (tmp_path / "source/left").touch()
    with tarfile.open(fileobj=io.BytesIO(packed("source", skip={"left"}))) as found:
        assert found.getnames() == ["kept"]


@pytest.mark.parametrize("kind", ["redirect", "metacopy"])
def test_an_upper_directory_that_leans_on_a_lower_one_cannot_be_packed(kind, tmp_path):
    (tmp_path / "d").mkdir()
    os.setxattr(tmp_path / "d", f"trusted.overlay.{kind}", b"/x")
    with pytest.raises(errors.BadInput, match=f"upper: 'd': trusted.overlay.{kind}: what it stands for is in a lower"):
        packed(tmp_path)


def test_a_name_that_would_be_a_whiteout_cannot_be_packed(tmp_path):
    (tmp_path / ".wh.x").touch()
    with pytest.raises(errors.BadInput, match=r"a name that begins with .wh. cannot stand in a layer"):
        packed(tmp_path)


# Access control lists: acl(5)


def acl(*entries):
    """An access control list as the kernel stores it, for mode 640 with one more user: <linux/posix_acl_xattr.h>."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)


WITH_USER = acl((1, 6, 0xFFFFFFFF), (2, 4, 1234), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))


def test_an_acl_goes_there_and_back_and_getfacl_reads_it(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    (root / "file").touch()
    os.setxattr(root / "file", "system.posix_acl_access", WITH_USER)
    ours = unpacked(packed(root), tmp_path / "ours")
    assert facts(ours) == facts(root)
    assert b"user:1234:r--" in run("getfacl", "-n", ours / "file")


@pytest.mark.parametrize("way", ["overlay", "apply"])
def test_a_default_acl_is_not_inherited_by_what_is_unpacked(way, tmp_path):
    root = tmp_path / "source"
    (root / "d/e").mkdir(parents=True)
    (root / "d/file").touch()
    os.setxattr(root / "d", "system.posix_acl_default", WITH_USER)
    ours = unpacked(packed(root), tmp_path / "ours", whiteouts=way)
    assert facts(ours) == facts(root)
    if way == "apply":
        unpacked(tar(entry("d/later")), ours, whiteouts=way)
        assert os.listxattr(ours / "d/later") == []
        assert os.listxattr(ours / "d") == ["system.posix_acl_default"]


# Details of a tar


def test_the_last_entry_of_a_name_wins(tmp_path):
    ours = unpacked(tar(entry("f", b"1"), folder("d", mtime=5, mode=0o700), entry("f", b"2"), folder("d", mtime=7)),
                    tmp_path / "ours")
    assert (ours / "f").read_bytes() == b"2"
    assert (stat.S_IMODE(os.stat(ours / "d").st_mode), os.stat(ours / "d").st_mtime) == (0o755, 7)


def test_a_directorys_time_is_its_entrys_even_where_a_link_took_its_place(tmp_path):
    ours = unpacked(tar(folder("d", mtime=5), folder("e", mtime=6), entry("d/f"), entry("d/g"), symlink("d", "e")),
                    tmp_path / "ours", whiteouts="apply")
    assert os.stat(ours / "e").st_mtime == 6
    assert os.readlink(ours / "d") == "e"


@pytest.mark.parametrize("count", [100, 101])
def test_a_hard_link_between_two_of_very_many_directories(count, tmp_path):
    """More than are kept open, and the one closed for the next is not the one that a link is made in."""
    many = [part for number in range(count) for part in (folder(f"d{number}"), entry(f"d{number}/f", b"%d" % number))]
    links = [layers.hard_link(f"d{number}/l", f"d{(number + 50) % count}/f") for number in range(count)]
    ours = unpacked(tar(*many, *links), tmp_path / "ours")
    assert [(ours / f"d{n}/l").read_bytes() for n in range(count)] == [b"%d" % ((n + 50) % count) for n in range(count)]


def test_directories_without_an_entry_are_made_for_everybody(tmp_path):
    ours = unpacked(tar(entry("a/b/c/f", b"x")), tmp_path / "ours")
    assert {stat.S_IMODE(os.stat(ours / path).st_mode) for path in ("a", "a/b", "a/b/c")} == {0o755}


def test_a_global_header_is_not_applied_as_go_does_not(tmp_path):
    data = layers.raw(b"g", layers.pax(path=b"elsewhere", uid=b"77"), kind=b"g") + layers.raw(b"f", b"x", end=True)
    ours = unpacked(data, tmp_path / "ours")
    assert os.listdir(ours) == ["f"]
    assert os.stat(ours / "f").st_uid == 0


def test_what_is_unpacked_is_what_the_result_says(source, tmp_path):
    data = packed(source)
    squeezed = gzip.compress(data)
    (tmp_path / "ours").mkdir()
    done = layer.unpack(io.BytesIO(squeezed), os.fspath(tmp_path / "ours"), devices=None)
    sums = [run("sha256sum", input=one).split()[0].decode() for one in (squeezed, data)]
    assert [done.digest, done.diff_id] == [f"sha256:{one}" for one in sums]
    assert (done.size, done.unpacked) == (len(squeezed), len(data))
    assert done.entries == len(run("tar", "-tf", "-", input=data).splitlines())


# Compression


def _by_tool(*argv):
    return lambda data: run(*argv, input=data)


def _halves(squeeze):
    return lambda data: squeeze(data[:len(data) // 2]) + squeeze(data[len(data) // 2:])


SQUEEZED = {
    "plain": lambda data: data,
    "gzip": _by_tool("gzip", "-c"), "gzip of two members": _halves(_by_tool("gzip", "-c")),
    "gzip with a name": lambda data: gzip.compress(data, mtime=5), "zstd": _by_tool("zstd", "-c"),
    "zstd -19 --long": _by_tool("zstd", "-19", "--long=27", "-c"),
    "zstd of two frames": _halves(_by_tool("zstd", "-c")),
    "zstd, a skippable frame after": lambda data: zstandard.compress(data) + b"\x50\x2a\x4d\x18\x05\0\0\0index",
    "zeros after the tar": lambda data: gzip.compress(data + bytes(100_000)),
}


@pytest.mark.parametrize("how", SQUEEZED)
def test_compressed_in_every_way(how, source, tmp_path):
    data = packed(source)
    squeezed = SQUEEZED[how](data)
    (tmp_path / "ours").mkdir()
    done = layer.unpack(io.BytesIO(squeezed), os.fspath(tmp_path / "ours"), devices=None)
    assert facts(tmp_path / "ours") == facts(source)
    assert done.digest == image.digest(squeezed)


@pytest.mark.parametrize("squeeze", [gzip.compress, zstandard.compress])
def test_bytes_after_the_compressed_ones_are_refused_or_in_the_digest(squeeze, tmp_path):
    """gzip(1) ignores them with a warning; who checks only what was unpacked would not see them."""
    squeezed = squeeze(tar(entry("f"))) + b"and something more that is none of it"
    with contextlib.suppress(errors.BadInput):
        done = layer.unpack(io.BytesIO(squeezed), os.fspath(tmp_path))
        assert done.digest == image.digest(squeezed)


@pytest.mark.parametrize("squeeze", [gzip.compress, zstandard.compress, bytes])
def test_every_truncation_is_refused(squeeze, tmp_path):
    data = squeeze(tar(entry("f", os.urandom(3000)), folder("d"), entry("d/g", b"x" * 600)).rstrip(b"\0") + bytes(512))
    for length in [*range(0, len(data) - 512, 211), len(data) - 513]:
        with pytest.raises(errors.BadInput, match="must be a tar archive"):
            unpacked(data[:length], tmp_path / str(length))


# Whiteouts: image-spec/layer.md, and overlayfs.rst for the other way of saying it

LOWER = [folder("d"), entry("d/old", b"old"), folder("d/sub"), entry("d/sub/old", b"old"), entry("f", b"old"),
         symlink("l", "d"), entry("other", b"old")]
LAYERS = {
    "a file": [entry(".wh.f")],
    "a directory": [entry(".wh.d")],
    "a link": [entry(".wh.l")],
    "below": [folder("d"), entry("d/.wh.old")],
    "what is not there": [entry(".wh.nothing")],
    "a file, then a new one": [entry(".wh.f"), entry("f", b"new")],
    "a new one, then the whiteout": [entry("f", b"new"), entry(".wh.f")],
    "a directory, then a new one": [entry(".wh.d"), folder("d"), entry("d/new", b"new")],
    "a new directory, then the whiteout": [folder("d"), entry("d/new", b"new"), entry(".wh.d")],
    "a directory, then a file in it": [entry(".wh.d"), entry("d/new", b"new")],
    "a file in it, then the directory": [entry("d/new", b"new"), entry(".wh.d")],
    "a file deep in it, then the directory": [entry("d/sub/new", b"new"), entry(".wh.d")],
    "a directory, then a file of that name": [entry(".wh.d"), entry("d", b"new")],
    "a directory, then a link of that name": [entry(".wh.d"), symlink("d", "other")],
    "opaque": [folder("d"), entry("d/.wh..wh..opq"), entry("d/new", b"new")],
    "opaque at the end": [folder("d"), entry("d/new", b"new"), entry("d/.wh..wh..opq")],
    "opaque without a directory": [entry("d/.wh..wh..opq"), entry("d/new", b"new")],
    "opaque, something below": [entry("d/sub/new", b"new"), entry("d/.wh..wh..opq")],
    "a file instead of a directory": [entry("d", b"new")],
    "a directory instead of a file": [folder("f"), entry("f/new", b"new")],
    "a directory instead of a file, unsaid": [entry("f/new", b"new")],
    "a directory instead of a link": [folder("l"), entry("l/new", b"new")],
    "file, directory, file": [entry("d", b"1"), folder("d"), entry("d/new", b"2"), entry("d", b"3")],
    "directory, file, directory": [folder("d"), entry("d/gone"), entry("d", b"2"), folder("d"), entry("d/new", b"3")],
    "opaque, file, directory": [folder("d"), entry("d/.wh..wh..opq"), entry("d", b"2"), folder("d")],
    "twice": [entry(".wh.f"), entry(".wh.f"), entry(".wh.d"), entry(".wh.d")],
}


def apart(tmp_path, *parts, times=False):
    """Each layer in a directory of its own, overlay above: what is seen there."""
    places = [unpacked(tar(*part), tmp_path / f"layer{number}") for number, part in enumerate(parts)]
    seen = tmp_path / "seen"
    seen.mkdir()
    with mounts.overlay([os.fspath(place) for place in reversed(places)], None, None, os.fspath(seen)):
        return facts(seen, times)


def onto(tmp_path, *parts, times=False):
    """The layers one onto the other."""
    for part in parts:
        unpacked(tar(*part), tmp_path / "one", whiteouts="apply")
    return facts(tmp_path / "one", times)


@pytest.mark.parametrize("name", LAYERS)
def test_overlay_shows_what_applying_gives(name, tmp_path):
    assert apart(tmp_path, LOWER, LAYERS[name]) == onto(tmp_path, LOWER, LAYERS[name])


def test_an_opaque_root_is_applied_and_refused_where_overlay_would_not_heed_it(tmp_path):
    part = [entry("new", b"new"), entry(".wh..wh..opq")]
    assert list(onto(tmp_path, LOWER, part)[0]) == [b"new"]
    with pytest.raises(errors.BadInput, match="overlay has no way to make its root opaque"):
        unpacked(tar(*part), tmp_path / "layer")


# umoci makes no directory where a file is, unless it is told to.
@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"a directory instead of a file, unsaid"}))
def test_umoci_sees_the_same(name, tmp_path):
    layout = image.Layout.create(tmp_path / "layout")
    parts = []
    for part in (LOWER, LAYERS[name]):
        data = tar(*part)
        parts.append((layout.add(data, image.LAYER), image.digest(data)))
    one = image.add_image(layout, parts, name="test")
    run("umoci", "unpack", "--image", f"{layout.path}:test", tmp_path / "bundle")
    ours = image.unpack(layout, one, os.fspath(tmp_path / "ours"))
    assert facts(ours, times=False) == facts(tmp_path / "bundle/rootfs", times=False)


@pytest.mark.parametrize("name", LAYERS)
def test_an_overlay_directory_packed_and_applied_is_the_same(name, tmp_path):
    upper = unpacked(tar(*LAYERS[name]), tmp_path / "upper")
    unpacked(tar(*LOWER), tmp_path / "a", whiteouts="apply")
    unpacked(packed(upper), tmp_path / "a", whiteouts="apply")
    assert facts(tmp_path / "a", times=False) == onto(tmp_path, LOWER, LAYERS[name])


def test_a_whiteout_hides_nothing_of_its_own_layer(tmp_path):
    ours = onto(tmp_path, LOWER, LAYERS["a file deep in it, then the directory"])[0]
    assert {b"d", b"d/sub", b"d/sub/new"} == {path for path in ours if path.startswith(b"d")}


def test_what_overlay_itself_wrote_goes_through_a_tar(tmp_path):
    """The kernel makes the whiteouts, pack reads them, and applying gives what the mount showed."""
    lower, upper, work, seen = (tmp_path / name for name in ("lower", "upper", "work", "seen"))
    for place in (upper, work, seen):
        place.mkdir()
    unpacked(tar(*LOWER), lower)
    with mounts.overlay([os.fspath(lower)], os.fspath(upper), os.fspath(work), os.fspath(seen)):
        run("sh", "-ec", "rm f; rm -r d; mkdir d; echo new > d/new; rm l; mkdir l; chmod 600 other", cwd=seen)
        shown = facts(seen)
    applied = unpacked(tar(*LOWER), tmp_path / "applied", whiteouts="apply")
    unpacked(packed(upper), applied, whiteouts="apply")
    assert facts(applied) == shown


def test_a_directory_has_the_attributes_of_the_uppermost_layer(tmp_path):
    low = entry("d", kind=tarfile.DIRTYPE, pax_headers={"SCHILY.xattr.security.labs": "low"})
    assert apart(tmp_path, [low], [folder("d")]) == onto(tmp_path, [low], [folder("d")])
    assert os.listxattr(tmp_path / "one/d") == []


def test_links_of_lower_layers_lead_within_the_root(tmp_path):
    """An absolute link, and one with more .. than there are directories, both end inside."""
    for number, target in enumerate(("/real", "../../../../real")):
        root = tmp_path / str(number)
        unpacked(tar(folder("real"), symlink("l", target)), root, whiteouts="apply")
        unpacked(tar(entry("l/f", b"x")), root, whiteouts="apply")
        assert (root / "real/f").read_bytes() == b"x"
    assert not os.path.lexists("/real")


def test_a_kept_open_link_is_not_used_when_it_was_replaced(tmp_path):
    root = unpacked(tar(folder("real"), symlink("l", "real")), tmp_path / "root", whiteouts="apply")
    unpacked(tar(entry("l/first"), folder("l"), entry("l/second")), root, whiteouts="apply")
    assert (sorted(os.listdir(root / "real")), os.listdir(root / "l")) == (["first"], ["second"])


def test_a_kept_open_link_is_not_used_when_what_it_led_to_was_replaced(tmp_path):
    root = unpacked(tar(folder("real"), symlink("l", "real")), tmp_path / "root", whiteouts="apply")
    unpacked(tar(entry("l/first"), entry("real", b"file"), folder("real"), entry("l/second")), root, whiteouts="apply")
    assert os.listdir(root / "real") == ["second"]


# Trees made up by hypothesis

NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda name: not set(name) & {*range(32), 127, ord("/")} and name not in (b".", b"..") and name[:4] != b".wh.")
FILES = st.tuples(st.just("file"), st.binary(max_size=2000), st.integers(0, 0o7777), st.integers(0, 70_000))
LINKS = st.tuples(st.just("link"), st.binary(min_size=1, max_size=120).filter(lambda text: 0 not in text))
OTHERS = st.tuples(st.sampled_from(["fifo", "null", "same"]))
TREES = st.recursive(FILES | LINKS | OTHERS, lambda inner: st.dictionaries(NAMES, inner, max_size=4), max_leaves=12)


def plant(place, tree, seen):
    """Make a made-up tree real; "same" is another name of the first file."""
    if isinstance(tree, dict):
        os.mkdir(place)
        for name, inner in tree.items():
            plant(os.path.join(place, name), inner, seen)
    elif tree[0] == "file":
        with open(place, "wb") as file:
            file.write(tree[1])
        os.chown(place, tree[3], tree[3])
        os.chmod(place, tree[2])
        os.utime(place, ns=(0, tree[3] * 1_000_003))
        seen.append(place)
    elif tree[0] == "link":
        os.symlink(tree[1], place)
    elif tree[0] == "fifo":
        os.mkfifo(place)
    elif tree[0] == "null":
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif seen:
        os.link(seen[0], place)


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(NAMES, TREES, max_size=5))
def test_any_tree_goes_there_and_back(tree, tmp_path_factory):
    base = tmp_path_factory.mktemp("any")
    plant(os.fsencode(base / "source"), tree, [])
    data = packed(base / "source")
    assert facts(unpacked(data, base / "ours")) == facts(base / "source")
    assert packed(base / "ours") == data
    subprocess.run(["rm", "-rf", base], check=True)
