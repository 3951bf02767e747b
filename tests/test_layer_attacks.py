"""Layers that want out: each is refused with the one line that names it, and nothing beside the target is touched.

Where a real extractor can be hurt by the same bytes, it is, in a directory that is thrown away: an attack that harms
nobody would prove nothing.
"""

import contextlib
import gzip
import io
import os
import re
import stat
import struct
import subprocess
import tarfile
import tracemalloc

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labs import errors, layer
from tests import layers
from tests.layers import entry, facts, folder, hard_link, pax, raw, symlink, tar, unpacked

SMALL = layer.Limits(size=1 << 20, entries=100)
END = bytes(1024)


@pytest.fixture
def place(tmp_path):
    """A target with canaries around it: whatever escapes changes one of them, or adds something."""
    (tmp_path / "target").mkdir()
    (tmp_path / "canary").write_text("alive")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/canary").write_text("alive")
    before = facts(tmp_path / "beside"), (tmp_path / "canary").stat()
    yield tmp_path
    after = facts(tmp_path / "beside"), (tmp_path / "canary").stat()
    assert (tmp_path / "canary").read_text() == "alive"
    assert before[0] == after[0]
    assert [before[1][field] for field in (0, 1, 3, 4, 5, 6, 8)] == [after[1][field] for field in (0, 1, 3, 4, 5, 6, 8)]
    assert sorted(os.listdir(tmp_path)) == ["beside", "canary", "target"]
    assert not os.path.lexists("/labs-escaped")


WAYS = pytest.mark.parametrize("way", ["overlay", "apply"])


def refused(data, place, way="overlay", **options):
    """Unpack what must be refused; the line that says so."""
    with pytest.raises(errors.BadInput) as caught:
        layer.unpack(io.BytesIO(data), os.fspath(place / "target"), whiteouts=way, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("layer: ")
    return line


# Where an entry leads. Each: the entries, and the line.

OUT = "must not have .. in it"
THROUGH = "nothing may be written through a symbolic link"
NO_FILE = "which is no file of the layer"
LEADING_OUT = {
    "dot dot": ([entry("../escaped")], f"layer: '../escaped': path {OUT}"),
    "dot dot in the middle": ([entry("a/../../escaped")], f"path {OUT}"),
    "dot dot at the end": ([folder("a/..")], f"path {OUT}"),
    "dot dot within": ([folder("a"), entry("a/../b")], f"path {OUT}"),
    "absolute": ([entry("/labs-escaped")], "layer: '/labs-escaped': path must not be absolute"),
    "absolute, twice": ([entry("//labs-escaped")], "path must not be absolute"),
    "a whiteout outside": ([entry("../.wh.canary")], f"path {OUT}"),
    "an opaque whiteout outside": ([entry("../beside/.wh..wh..opq")], f"path {OUT}"),
    "a link, then a file through it": ([symlink("l", "../beside"), entry("l/canary", b"dead")], THROUGH),
    "an absolute link, then a file": ([symlink("l", "/"), entry("l/labs-escaped", b"dead")], THROUGH),
    "a link to itself above": ([symlink("l", "."), entry("l/x")], THROUGH),
    "a link, then a directory through it": ([symlink("l", ".."), folder("l/new")], THROUGH),
    "a link, then a link through it": ([symlink("l", ".."), symlink("l/new", "x")], THROUGH),
    "a link, then a whiteout through it": ([symlink("l", ".."), entry("l/.wh.canary")], THROUGH),
    "a link, then an opaque whiteout": ([symlink("l", "../beside"), entry("l/.wh..wh..opq")], THROUGH),
    "two links": ([symlink("a", ".."), symlink("b", "a/beside"), entry("b/canary")], THROUGH),
    "a link in a directory": ([folder("d"), symlink("d/l", "../.."), entry("d/l/canary")], THROUGH),
    "a loop of links": ([symlink("a", "b"), symlink("b", "a"), entry("a/x")], THROUGH),
    "a directory swapped for a link": (
        [folder("d"), entry("d/first"), symlink("d", "../beside"), entry("d/canary", b"dead")], THROUGH),
    "a hard link out": ([hard_link("h", "../canary"), entry("h", b"dead")], f"link target {OUT}"),
    "an absolute hard link": ([hard_link("h", "/etc/passwd")], "link target must not be absolute"),
    "a hard link through a link": ([symlink("l", ".."), hard_link("h", "l/canary")], THROUGH),
    "a hard link in a link": ([symlink("l", ".."), hard_link("l/h", "l")], THROUGH),
    "a hard link to nothing": ([hard_link("h", "missing")], f"hard link to 'missing', {NO_FILE}"),
    "a hard link to nothing far down": ([hard_link("h", "a/b/missing")], "no such directory in the layer"),
    "a hard link to a directory": ([folder("d"), hard_link("h", "d")], NO_FILE),
    "a hard link to the root": ([hard_link("h", ".")], NO_FILE),
    "a hard link to itself": ([entry("f"), hard_link("f", "./f")], "a hard link must not be to itself"),
    "a hard link to what is hidden": ([entry(".wh.f"), hard_link("h", "f")], NO_FILE),
    "a hard link to a whiteout": ([entry(".wh.f"), hard_link("h", ".wh.f")], NO_FILE),
    "the root as a file": ([entry(".", b"x")], "the root of a layer must be a directory"),
    "the root as a link": ([symlink("./", "/")], "the root of a layer must be a directory"),
    "the root as a hard link": ([entry("f"), hard_link(".", "f")], "the root of a layer must be a directory"),
    "an empty link": ([symlink("l", "")], "a symbolic link must have a target"),
    "a whiteout of nothing": ([entry(".wh.")], "must name what it hides"),
    "a whiteout of the directory": ([entry("d/.wh..")], "must name what it hides"),
    "a whiteout of the one above": ([entry(".wh...")], "must name what it hides"),
    "a whiteout of a whiteout": ([entry(".wh..wh.x")], "must name what it hides"),
    "aufs's own": ([entry(".wh..wh.plnk")], "must name what it hides"),
    "through a whiteout": ([entry(".wh.d/x")], "path must not lead through a whiteout"),
    "a newline": ([entry("a\nb")], r"layer: 'a\nb': path must not have control characters in it"),
    "an escape": ([entry("\x1b[2J")], "path must not have control characters in it"),
    "delete": ([entry("a\x7f")], "path must not have control characters in it"),
    "a newline in a hard link": ([entry("f"), hard_link("h", "f\n")], "link target must not have control characters"),
    "a long name": ([entry("x" * 256)], "path must be shorter than 4096 bytes, each part than 256"),
    "a long path": ([entry("x/" * 2048 + "f")], "path must be shorter than 4096 bytes"),
    "a long link": ([symlink("l", "x" * 4096)], "a symbolic link must have a target, shorter than 4096 bytes"),
    "an owner that is none": ([entry("f", uid=0xFFFFFFFF)], "owner 4294967295:0 must be numbers from 0 to 4294967294"),
    "a time past all days": ([entry("f", mtime=1 << 40)], "time of change must be within 136 years of 1970"),
}


@WAYS
@pytest.mark.parametrize("name", LEADING_OUT)
def test_what_leads_elsewhere_is_refused(name, way, place):
    entries, line = LEADING_OUT[name]
    data = tar(entry("before", b"x"), *entries)
    if way == "apply" and name == "a hard link to a whiteout":
        line = NO_FILE
    assert line in refused(data, place, way)
    refused(gzip.compress(data), place, way)


@pytest.mark.parametrize("name", ["dot dot", "absolute", "a link, then a file through it", "a hard link out"])
def test_the_same_attack_hurts_who_believes(name, tmp_path):
    """tarfile without its filter is the naive extractor: the canary dies, or the file is there."""
    (tmp_path / "target").mkdir()
    (tmp_path / "beside").mkdir()
    for path in ("canary", "beside/canary"):
        (tmp_path / path).write_text("alive")
    entries = LEADING_OUT[name][0] if name != "absolute" else [entry(f"{tmp_path}/escaped")]
    with tarfile.open(fileobj=io.BytesIO(tar(*entries))) as file:
        file.extractall(tmp_path / "target", filter="fully_trusted")
    escaped = [path.name for path in (tmp_path / "escaped",) if path.exists()]
    dead = [path for path in ("canary", "beside/canary") if (tmp_path / path).read_text() != "alive"]
    assert escaped or dead


@WAYS
@pytest.mark.parametrize("path", [b"a\0b", b"a/b\0/x"])
def test_a_nul_in_a_name(path, way, place):
    data = raw(b"x", pax(path=path), kind=b"x") + raw(b"f", b"x", end=True)
    assert "must not have control characters in it" in refused(data, place, way)


@pytest.mark.parametrize("target", ["../beside", "../../../../../labs-escaped", "/labs-escaped", "/proc/self/root"])
def test_a_lower_layers_link_is_followed_within_the_root_alone(target, place):
    """The classic against docker cp and the likes: here the root directory of the container is the end of the world."""
    for part in ([symlink("l", target)], [entry("l/canary", b"dead")]):
        layer.unpack(io.BytesIO(tar(*part)), os.fspath(place / "target"), whiteouts="apply")
    found = [path for path, fact in facts(place / "target")[0].items() if stat.S_ISREG(fact[0])]
    assert len(found) == 1


def test_a_lower_link_out_cannot_hide_or_link_what_is_out_there(place):
    unpacked(tar(symlink("l", "../beside"), symlink("m", str(place))), place / "target", whiteouts="apply")
    unpacked(tar(entry("l/.wh.canary"), entry("l/.wh..wh..opq"), entry("m/.wh.canary")), place / "target",
             whiteouts="apply")
    assert NO_FILE in refused(tar(hard_link("h", "l/canary")), place, "apply")


# Devices


@WAYS
@pytest.mark.parametrize(("kind", "letter", "major", "minor"), [
    (tarfile.BLKTYPE, "b", 8, 0), (tarfile.CHRTYPE, "c", 1, 1), (tarfile.CHRTYPE, "c", 10, 229),
    (tarfile.BLKTYPE, "b", 1, 3)])
def test_a_device_that_no_container_has(kind, letter, major, minor, way, place):
    data = tar(entry("dev/x", kind=kind, devmajor=major, devminor=minor, mode=0o666))
    assert f"device {letter} {major}:{minor} is not one that a layer may bring" in refused(data, place, way)
    assert not os.path.lexists(place / "target/dev/x")


@WAYS
@pytest.mark.parametrize("allowed", [layer.DEVICES, None])
def test_a_whiteout_is_not_smuggled_in_as_a_device(allowed, way, place):
    data = tar(entry("etc", kind=tarfile.CHRTYPE, devmajor=0, devminor=0))
    assert "device c 0:0 is not one that a layer may bring" in refused(data, place, way, devices=allowed)


@WAYS
def test_what_is_written_later_does_not_go_into_a_device_or_a_fifo(way, place):
    data = tar(entry("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3), entry("null", b"content"),
               entry("fifo", kind=tarfile.FIFOTYPE), entry("fifo", b"content"))
    unpacked(data, place / "target", whiteouts=way)
    assert [(place / "target" / name).read_bytes() for name in ("null", "fifo")] == [b"content"] * 2


@WAYS
def test_what_is_written_later_does_not_go_through_a_link(way, place):
    """Through the link itself: its name is given again, as a file."""
    data = tar(symlink("f", "../canary"), entry("f", b"dead"), entry("g", b"1"), hard_link("h", "g"), entry("h", b"2"))
    unpacked(data, place / "target", whiteouts=way)
    assert [(place / "target" / name).read_bytes() for name in ("f", "g", "h")] == [b"dead", b"1", b"2"]


@WAYS
def test_swaps_with_children_end_as_the_last_entry_says(way, place):
    data = tar(*[part for n in range(5) for part in (folder("x"), entry("x/y"), folder("x/d"), entry("x/d/z"),
                                                    entry("x", b"%d" % n), symlink("x", "../beside"))], folder("x"))
    unpacked(data, place / "target", whiteouts=way)
    assert os.listdir(place / "target/x") == []


@WAYS
@pytest.mark.parametrize("kind", [b"D", b"M", b"V", b"N", b"Z", b"\xff"])
def test_types_that_no_layer_has(kind, way, place):
    assert re.search(r"type b'.*' is not one of a layer", refused(raw(b"x", kind=kind, end=True), place, way))


# Attributes


@WAYS
@pytest.mark.parametrize("name", ["trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.metacopy",
                                  "user.overlay.redirect", "trusted.anything"])
def test_a_layer_does_not_rewire_the_overlay(name, way, place):
    data = tar(entry("d", kind=tarfile.DIRTYPE, pax_headers={f"SCHILY.xattr.{name}": "/../../x"}))
    assert f"layer: 'd': a layer must not bring the attribute {name}" == refused(data, place, way)
    assert os.listdir(place / "target") == []


@WAYS
@pytest.mark.parametrize("name", ["nonsense", "user.", "user.x\0y", ""])
def test_an_attribute_that_cannot_be(name, way, place):
    data = raw(b"x", pax(**{f"SCHILY__xattr__{name}": b"v"}), kind=b"x") + raw(b"f", end=True)
    with pytest.raises((errors.BadInput, errors.KernelError)):
        layer.unpack(io.BytesIO(data), os.fspath(place / "target"), whiteouts=way)


# Too much


@pytest.mark.parametrize("squeeze", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_bomb_ends_at_the_limit(squeeze, place):
    bomb = squeeze(tar(entry("zeros", bytes(40 << 20))))
    assert len(bomb) < SMALL.size
    tracemalloc.start()
    line = refused(bomb, place, limits=SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "100 entries and 1048576 bytes" in line
    assert sum(fact.st_size for fact in map(os.stat, (place / "target").iterdir())) <= SMALL.size
    assert peak < 32 << 20


@pytest.mark.parametrize("squeeze", [gzip.compress, zstandard.compress, bytes], ids=["gzip", "zstd", "plain"])
def test_a_bomb_after_the_end_of_the_tar(squeeze, place):
    assert "must not unpack to more than the limit" in refused(squeeze(tar(entry("f")) + bytes(4 << 20)), place,
                                                              limits=SMALL)


def test_a_bomb_of_a_bomb_is_unpacked_once(place):
    inner = gzip.compress(bytes(10 << 20))
    unpacked(gzip.compress(tar(entry("inner.gz", inner))), place / "target", limits=SMALL)
    assert (place / "target/inner.gz").read_bytes() == inner


@WAYS
def test_more_entries_than_the_limit(way, place):
    exactly = tar(*(entry(f"f{number}") for number in range(100)))
    unpacked(exactly, place / "target", limits=SMALL, whiteouts=way)
    more = tar(*(entry(f"f{number}") for number in range(101)))
    assert "must not hold more than 100 entries and 1048576 bytes" in refused(more, place, way, limits=SMALL)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_header_that_says_it_is_huge(kind, place):
    """Nothing of it is read: eight gigabytes are not even asked for."""
    data = raw(b"long", kind=kind, size=b"77777777777\0") + bytes(1 << 16)
    assert "the headers of one entry must not be larger" in refused(data, place)


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_a_header_that_is_huge(kind, place):
    content = b"x" * (2 << 20) if kind == b"L" else pax(comment=b"x" * (2 << 20))
    assert "the headers of one entry must not be larger" in refused(raw(b"long", content, kind=kind), place)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_headers_before_headers_before_headers(kind, place):
    content = pax(path=b"f") if kind in b"xg" else b"f\0"
    line = refused(raw(b"h", content, kind=kind) * 5000 + raw(b"f", end=True), place)
    assert "headers of one entry must not be larger" in line or "RecursionError" in line


def test_global_headers_are_not_kept(place):
    """Each would be copied to every entry that comes: memory and time without end."""
    one = b"".join(raw(b"g", pax(**{f"labs{number}_{n}": b"x" * 1000 for n in range(20)}), kind=b"g") + raw(b"f")
                   for number in range(60))
    tracemalloc.start()
    layer.unpack(io.BytesIO(one + END), os.fspath(place / "target"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


# Sparse files: the map may lie


def sparse_01(parts, size, stored=b""):
    """A sparse file, PAX 0.1, whose map says what it wants."""
    text = ",".join(f"{offset},{length}" for offset, length in parts).encode()
    head = pax(GNU__sparse__size=b"%d" % size, GNU__sparse__numblocks=b"%d" % len(parts), GNU__sparse__map=text)
    return raw(b"x", head, kind=b"x") + raw(b"hole", stored, end=True)


def sparse_10(parts, size, stored=b""):
    """A sparse file, PAX 1.0: its map stands before the content."""
    text = b"%d\n" % len(parts) + b"".join(b"%d\n%d\n" % part for part in parts)
    head = pax(GNU__sparse__major=b"1", GNU__sparse__minor=b"0", GNU__sparse__name=b"hole",
               GNU__sparse__realsize=b"%d" % size)
    return raw(b"x", head, kind=b"x") + raw(b"hole", text + bytes(-len(text) % 512) + stored, end=True)


def sparse_gnu(parts, size, stored=b""):
    """A sparse file as old GNU tar has it: up to four parts in the header block."""
    fields = b"".join(b"%011o\0%011o\0" % part for part in parts).ljust(96, b"\0") + b"\0" + b"%011o\0" % size
    return raw(b"hole", stored, kind=b"S", magic=b"ustar ", version=b" \0", prefix=bytes(41) + fields, end=True)


SPARSE = pytest.mark.parametrize("form", [sparse_01, sparse_10, sparse_gnu])


@SPARSE
def test_an_honest_map(form, place):
    unpacked(form([(0, 3), (1000, 3)], 5000, b"abcdef"), place / "target")
    assert (place / "target/hole").read_bytes() == b"abc" + bytes(997) + b"def" + bytes(3997)


@SPARSE
@pytest.mark.parametrize(("parts", "size", "rule"), [
    ([(0, 3), (2, 3)], 5000, "must lie in order and within its size"),
    ([(1000, 3), (0, 3)], 5000, "must lie in order and within its size"),
    ([(0, 3), (4998, 3)], 5000, "must lie in order and within its size"),
    ([(6000, 6)], 5000, "must lie in order and within its size"),
    ([(0, 600)], 5000, "must add up to what is stored"),
    ([(0, 6)], 1 << 30, "must not hold more than 100 entries and 1048576 bytes"),
])
def test_a_map_that_lies(form, parts, size, rule, place):
    assert rule in refused(form(parts, size, b"abcdef"), place, limits=SMALL)
    assert not (place / "target/hole").exists()


@pytest.mark.parametrize(("parts", "size"), [([(-5, 6)], 5000), ([(0, -6)], 5000), ([(0, 6)], -5000)])
@pytest.mark.parametrize("form", [sparse_01, sparse_10])
def test_a_map_with_negative_numbers(form, parts, size, place):
    assert re.search("must lie in order|must not be negative", refused(form(parts, size, b"abcdef"), place))


@pytest.mark.parametrize("text", [b"", b"1", b"0,x", b"9" * 5000 + b",1", b"0,6,7"])
def test_a_map_that_is_none(text, place):
    data = raw(b"x", pax(GNU__sparse__size=b"50", GNU__sparse__map=text), kind=b"x") + raw(b"hole", b"abcdef", end=True)
    if text == b"0,6,7":
        unpacked(data, place / "target")  # GNU tar pads nothing either: half a pair says nothing
    else:
        refused(data, place)


def test_a_map_of_a_million_parts(place):
    data = raw(b"x", pax(GNU__sparse__major=b"1", GNU__sparse__minor=b"0", GNU__sparse__realsize=b"50"), kind=b"x")
    data += raw(b"hole", b"1000000\n" + b"0\n" * (2 << 20), end=True)
    assert "the headers of one entry must not be larger" in refused(data, place)


# Numbers and bytes that no tar should have


def base_256(number, width=12):
    """A number as GNU tar writes what does not fit in octal; negative ones too."""
    return (number % (1 << 8 * width)).to_bytes(width, "big") if number < 0 else (
        b"\x80" + number.to_bytes(width - 1, "big"))


@WAYS
@pytest.mark.parametrize(("field", "value", "line"), [
    ("size", base_256(-1), "invalid offset|must not be negative|leads backwards"),
    ("size", base_256(-(1 << 40)), "invalid offset|must not be negative|leads backwards"),
    ("size", base_256(1 << 62), "must not hold more than"),
    ("uid", base_256(-1, 8), "owner -1:0 must be numbers"),
    ("gid", base_256(1 << 40, 8), "owner 0:1099511627776 must be numbers"),
    ("mtime", base_256(1 << 60), "time of change must be within"),
    ("size", b"nonsense!!!!", "must be a tar archive"),
    ("size", b"-0000000001\0", "must be a tar archive"),
])
def test_numbers_out_of_range(field, value, line, way, place):
    """A negative size would lead back to the header just read, for ever."""
    data = raw(b"f", b"content", **{field: value}) + raw(b"g", b"content", end=True)
    assert re.search(line, refused(data, place, way))


@pytest.mark.parametrize(("key", "value"), [
    ("size", b"-1"), ("size", b"99999999999999999999"), ("uid", b"-1"), ("uid", b"1e300"), ("gid", b"99999999999999"),
    ("mtime", b"nan"), ("mtime", b"inf"), ("mtime", b"1e999999"), ("mtime", b"-1e999990"), ("mtime", b"x"),
    ("mtime", b"9" * 4000)])
def test_pax_numbers_out_of_range(key, value, place):
    refused(raw(b"x", pax(**{key: value}), kind=b"x") + raw(b"f", b"content", end=True), place)


@pytest.mark.parametrize("content", [
    b"nonsense", b"5 x=\n", b"999 path=x\n", b"0 path=x\n", b"9 path=xx", b"-1 path=x\n", b"11 path=x\n" * 3 + b"7"])
def test_pax_headers_that_are_none(content, place):
    data = raw(b"x", content, kind=b"x") + raw(b"f", b"x", end=True)
    with contextlib.suppress(errors.BadInput):
        unpacked(data, place / "target")


def test_garbage_between_two_entries(place):
    good = raw(b"f", b"x" * 600)
    assert "must be a tar archive" in refused(good + os.urandom(512) + good + END, place)
    assert "must be a tar archive" in refused(good + b"x" * 512 + good + END, place)


def test_a_header_whose_checksum_is_wrong(place):
    block = bytearray(raw(b"f", b"x", end=True))
    block[0] ^= 1
    assert "must be a tar archive" in refused(bytes(block), place)


@pytest.mark.parametrize("data", [
    b"", b"\x1f\x8b", b"\x1f\x8b\x08\x00" + bytes(20), b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, b"{}",
    b"BZh91AY&SY", b"\xfd7zXZ\x00", os.urandom(2000)])
def test_what_is_no_layer_at_all(data, place):
    assert "must be a tar archive, plain, gzip or zstd" in refused(data, place)


def test_a_zstd_window_of_two_gigabytes_is_not_given(place):
    """The frame's header alone would have the reader take the memory: RFC 8878, 3.1.1.1.2."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(31 - 10) << 3]) + struct.pack("<I", 1 | 5 << 3)[:3] + b"hello"
    assert "must be a tar archive" in refused(frame, place)


def test_a_directory_tree_deeper_than_a_path_is_long(place):
    data = tar(*(folder("/".join("d" * depth)) for depth in range(1, 900)))
    unpacked(data, place / "target")
    subprocess.run(["rm", "-r", place / "target/d"], check=True)
    refused(tar(entry("/".join("d" * 2000) + "/f")), place)


def test_what_the_kernel_refuses_is_told_with_the_entry(place):
    """A full disk, or here a kind of attribute that does not exist."""
    data = tar(entry("a/b", pax_headers={"SCHILY.xattr.nonsense": "v"}))
    with pytest.raises(errors.KernelError, match="unpack 'a/b': Operation not supported"):
        layer.unpack(io.BytesIO(data), os.fspath(place / "target"))


# Made up by hypothesis

PARTS = st.sampled_from(["a", "b", "..", ".", "", "l", ".wh.a", ".wh..wh..opq", ".wh.", "\n", "x" * 256, "beside",
                         "canary"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                         tarfile.CHRTYPE, tarfile.BLKTYPE])
ENTRIES = st.builds(lambda kind, name, target, content: entry(
    name, content if kind == tarfile.REGTYPE else b"", kind=kind, linkname=target, devmajor=1, devminor=3),
    KINDS, PATHS, PATHS, st.binary(max_size=20))
LISTED = (errors.BadInput, errors.KernelError)
BOUNDED = settings(max_examples=100, deadline=None, derandomize=True, database=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])


@BOUNDED
@given(parts=st.lists(st.lists(ENTRIES, max_size=8), min_size=1, max_size=3))
@WAYS
def test_no_sequence_of_entries_leaves_the_target(way, parts, place):
    """The canaries stand around the target; the fixture looks at them in the end."""
    target = place / "target"
    subprocess.run(["rm", "-rf", target], check=True)
    target.mkdir()
    for part in parts:
        with contextlib.suppress(*LISTED):
            layer.unpack(io.BytesIO(tar(*part)), os.fspath(target), whiteouts=way)
    assert (place / "canary").read_text() == (place / "beside/canary").read_text() == "alive"


SEED = tar(folder("d", mtime=1.5), entry("d/f", b"content" * 50, pax_headers={"SCHILY.xattr.user.x": "y"}),
           symlink("l", "d/f"), hard_link("d/g", "d/f"), entry("x" * 120, b"y"), entry(".wh.z")).rstrip(b"\0") + END
SEEDS = [SEED, sparse_10([(0, 3), (1000, 3)], 5000, b"abcdef"), sparse_gnu([(0, 3), (1000, 3)], 5000, b"abcdef"),
         tar(entry("y" * 200, b"y"), form=tarfile.GNU_FORMAT), gzip.compress(SEED), zstandard.compress(SEED)]


@BOUNDED
@given(seed=st.sampled_from(SEEDS), mend=st.booleans(),
       changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6))
def test_any_change_of_bytes_is_unpacked_or_refused(seed, changes, mend, place):
    data = layers.mutated(seed, changes, mend)
    subprocess.run(["rm", "-rf", place / "target"], check=True)
    (place / "target").mkdir()
    with contextlib.suppress(*LISTED):
        layer.unpack(io.BytesIO(data), os.fspath(place / "target"), limits=SMALL)
