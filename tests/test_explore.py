"""The layer explorer: what it says of each layer, against umoci's unpacked trees, tar(1) and du's arithmetic."""

import io
import os
import re
import subprocess
import tarfile
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from labs import errors, explore, image, layer

IMAGES = "/opt/labs/images"
SVG = "{http://www.w3.org/2000/svg}"
KIB = 1 << 10


def tar(*entries):
    """A layer: "dir/", "path" or (path, bytes), ("link", "=target") for a hard link."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for entry in entries:
            path, content = entry if isinstance(entry, tuple) else (entry, b"")
            member = tarfile.TarInfo(path.rstrip("/"))
            if path.endswith("/"):
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.LNKTYPE, content[1:]
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


@pytest.fixture
def layout(tmp_path):
    return image.Layout.create(tmp_path / "layout")


@pytest.fixture
def make(layout):
    """An image of the layers given, each a list of entries."""

    def make(*layers, **options):
        blobs = [layout.add(tar(*entries), image.LAYER) for entries in layers]
        return image.add_image(layout, [(blob, blob.digest) for blob in blobs], **options)

    return make


def test_added_changed_removed(layout, make):
    one = make(["etc/", ("etc/a", b"1"), ("etc/b", b"22"), ("etc/c", b"333")],
               ["etc/", ("etc/a", b"4444"), "etc/.wh.b", ("etc/d", b"55555")])
    first, second = explore.layers(layout, one)
    assert (first.number, first.added, first.paths("+")) == (1, 6, ["etc", "etc/a", "etc/b", "etc/c"])
    assert [second.paths(kind) for kind in "+~-"] == [["etc/d"], ["etc/a"], ["etc/b"]]
    assert second.tree == {"etc": None, "etc/a": 4, "etc/c": 3, "etc/d": 5}
    assert first.hidden == (explore.Hidden("etc/a", 1, 1, 2), explore.Hidden("etc/b", 2, 1, 2))
    assert (first.wasted, second.wasted) == (3, 0)


def test_a_directory_counts_only_where_its_owner_or_mode_is_new(layout, make):
    changed = tarfile.TarInfo("d")
    changed.type, changed.mode = tarfile.DIRTYPE, 0o700
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(changed)
    same, other = (layout.add(data, image.LAYER) for data in (tar("d/"), out.getvalue()))
    one = image.add_image(layout, [(blob, blob.digest) for blob in (same, same, other)])
    assert [view.changes for view in explore.layers(layout, one)[1:]] == [(), (explore.Change("~", "d"),)]


def test_a_removed_directory_is_said_once_and_all_in_it_is_wasted(layout, make):
    one = make([("d/x/1", b"1"), ("d/x/2", b"22"), ("keep", b"")], [".wh.d"])
    first, second = explore.layers(layout, one)
    assert second.changes == (explore.Change("-", "d"),)
    assert (first.wasted, set(second.tree)) == (3, {"keep"})


def test_an_opaque_directory_hides_what_is_below_it_and_nothing_else(layout, make):
    one = make([("d/x", b"1"), ("d/y/z", b"22"), ("dd", b"333")], ["d/", "d/.wh..wh..opq", ("d/x", b"4")])
    first, second = explore.layers(layout, one)
    assert [second.paths(kind) for kind in "+~-"] == [[], ["d/x"], ["d/y"]]
    assert set(second.tree) == {"d", "d/x", "dd"}
    assert first.wasted == 3
    assert not explore.layers(layout, make([("d/x", b"1")], [".wh..wh..opq"]))[1].tree


def test_a_whiteout_after_the_new_file_in_the_tar_hides_only_what_is_below(layout, make):
    one = make([("a", b"old")], [("a", b"new!"), ".wh.a"])
    view = explore.layers(layout, one)[1]
    assert view.tree == {"a": 4}
    assert view.changes == (explore.Change("~", "a", 4),)


def test_a_file_is_wasted_when_its_last_name_is_gone(layout, make):
    names = [("a", b"12345"), ("b", "=a")]
    assert explore.waste(layout, make(names, [".wh.a"])) == []
    assert explore.waste(layout, make(names, [".wh.a", ".wh.b"])) == [explore.Hidden("b", 5, 1, 2)]


def test_a_file_in_the_place_of_a_directory(layout, make):
    first, second = explore.layers(layout, make([("d/x", b"1")], [("d", b"22")]))
    assert (first.wasted, second.changes) == (1, (explore.Change("~", "d", 2),))
    first, second = explore.layers(layout, make([("d", b"22")], [("d/x", b"1")]))
    assert (first.wasted, second.tree) == (2, {"d": None, "d/x": 1})


def test_waste_has_the_largest_first(layout, make):
    one = make([("a", b"1"), ("b", b"22")], [("a", b"333")], [".wh.b", ("a", b"4")])
    assert [(lost.path, lost.size, lost.layer, lost.by) for lost in explore.waste(layout, one)] == [
        ("a", 3, 2, 3), ("b", 2, 1, 3), ("a", 1, 1, 2)]


def test_history_without_the_steps_that_made_no_layer(layout, make):
    history = [{"created_by": "COPY"}, {"created_by": "ENV", "empty_layer": True}, {"created_by": "RUN"}]
    assert [view.created_by for view in explore.layers(layout, make(["a"], ["b"], ["c"], history=history))] == [
        "COPY", "RUN", ""]


@pytest.mark.parametrize("compression", ["gzip", "zstd", ""])
def test_compressed_or_not(layout, tmp_path, compression):
    (tmp_path / "up/d").mkdir(parents=True)
    (tmp_path / "up/d/f").write_text("text")
    one = image.add_image(layout, [image.add_layer(layout, str(tmp_path / "up"), compression=compression)])
    assert explore.layers(layout, one)[0].tree == {"d": None, "d/f": 4}


def test_a_lie_is_found(layout, make):
    blob = layout.add(tar("a"), image.LAYER)
    with pytest.raises(errors.Mismatch, match="diffID"):
        explore.layers(layout, image.add_image(layout, [(blob, "sha256:" + "0" * 64)]))
    one = make(["b"])
    Path(layout.blob(one.layers[0].digest)).write_bytes(tar("c"))
    with pytest.raises(errors.Mismatch, match="digest"):
        explore.layers(layout, one)
    noise = layout.add(b"no tar" * 200, image.LAYER)
    with pytest.raises(errors.BadInput, match="must be a tar"):
        explore.layers(layout, image.add_image(layout, [(noise, noise.digest)]))


@pytest.mark.parametrize("name", ["busybox", "nginx"])
def test_the_tree_is_the_one_that_umoci_unpacks(name, tmp_path):
    layout = image.Layout(IMAGES)
    subprocess.run(["umoci", "unpack", "--image", f"{IMAGES}:{name}", tmp_path / "bundle"], check=True)
    root = str(tmp_path / "bundle/rootfs")
    there = dict(layer.walk(root))
    view = explore.layers(layout, name)[-1]
    assert set(view.tree) == set(there)
    files = {path: number for path, number in view.tree.items() if number and there[path].st_nlink == 1}
    assert files == {path: there[path].st_size for path in files}


def test_the_sums_are_those_of_tar():
    layout = image.Layout(IMAGES)
    for view in explore.layers(layout, "nginx"):
        listed = subprocess.check_output(["tar", "-tvzf", layout.blob(view.blob.digest)], text=True)
        assert view.added == sum(int(line.split()[2]) for line in listed.splitlines() if line.startswith("-"))
    removed = re.findall(r"^(?:\./)?(?:(.*)/)?\.wh\.(?!\.wh\.)(.*)$", subprocess.check_output(
        ["tar", "-tzf", layout.blob(view.blob.digest)], text=True), re.MULTILINE)
    assert sorted(view.paths("-")) == sorted(os.path.join(*parts) for parts in removed)


def demo(layout, make):
    return make([("etc/conf", b"1"), ("big", b"x" * 2 * KIB)], [("etc/conf", b"2"), ".wh.big"],
                history=[{"created_by": "COPY <all> /"}, {"created_by": "RUN rm /big"}], name="demo", epoch=0)


def test_picture_in_words(layout, make):
    assert explore.picture(layout, demo(layout, make)).alt.splitlines() == [
        "Layers: 2, with 2 KiB in files, 2 KiB of it wasted", "",
        "layer 1: COPY <all> / (2 added; 2 KiB, 2 KiB wasted)",
        "+ big  (2 KiB, wasted: hidden by layer 2)", "  etc/", "+   conf  (1 B, wasted: hidden by layer 2)", "",
        "layer 2: RUN rm /big (1 changed, 1 removed; 1 B)", "- big", "  etc/", "~   conf  (1 B)"]


def test_picture_is_a_fragment_for_every_page(layout, make):
    demo(layout, make)
    markup = explore.picture(layout, "demo").html
    root = ET.fromstring(markup.replace("<details open>", "<details>").replace(" open>", ">"))
    assert [box.find("summary/strong").text for box in root.iter("details")] == [
        "layer 1: COPY <all> /", "layer 2: RUN rm /big"]
    assert {badge.get("aria-label") for badge in root.iter("span")} >= {"added", "changed", "removed"}
    colours = re.findall(r"(?:color|background):([^;\"]+)", markup)
    assert colours and all(colour.startswith("var(--labs-") for colour in colours)
    assert "<script" not in markup and "http" not in markup


def test_picture_of_a_large_image_is_short():
    picture = explore.picture(image.Layout(IMAGES), "webapp")
    assert len(picture.html) < 120_000
    assert "<details open" not in picture.html and " open>" not in picture.html
    assert re.search(r"^\+ +python3\.13/  \(\d+ files, .* MiB\)$", picture.alt, re.MULTILINE)


def test_graph_has_a_box_for_each_blob_and_one_for_a_shared_one(layout, make):
    first = make(["a"], ["b"], name="one")
    make(["a"], ["c"], name="two")
    picture = explore.graph(layout)
    arrows = [line.split(" → ") for line in picture.alt.splitlines()[1:]]
    shared = f"layer {first.layers[0].digest[7:14]}"
    assert sum(end == shared for _, end in arrows) == 2
    (svg,) = ET.fromstring(picture.html)
    words = [text.text for text in svg.iter(f"{SVG}text")]
    assert words.count(shared) == 1 and "two" in words
    blobs = sum(len(files) for _, _, files in os.walk(f"{layout.path}/blobs"))
    assert len({end for _, end in arrows}) == blobs


def test_graph_of_an_index_of_platforms(layout, make):
    parts = [make(["a"], [name], platform=image.Platform("linux", name)).manifest._replace(
        platform=image.Platform("linux", name)) for name in ("amd64", "arm64")]
    index = layout.add_json({"schemaVersion": 2, "mediaType": image.INDEX, "manifests": [one.json() for one in parts]},
                            image.INDEX)
    layout.tag("both", index)
    alt = explore.graph(layout, "both", digits=False).alt.splitlines()
    assert alt[1:4] == ["index.json → index #1, both", "index #1, both → manifest #2, linux/amd64",
                        "index #1, both → manifest #3, linux/arm64"]
    assert len(alt) == 10


@pytest.mark.parametrize(("number", "said"), [(0, "0 B"), (999, "999 B"), (1023, "1023 B"), (1536, "1.5 KiB"),
                                              (1_048_576, "1 MiB"), (50 << 30, "50 GiB"), (5 << 40, "5120 GiB")])
def test_sizes(number, said):
    assert explore.size(number) == said
