"""The exercises of 03-image/05-supply-chain: each wrong state gives its hint, the solution passes."""

import gzip
import os
import tarfile

import pytest

from labs import image, registry, registry_server, supply
from labs.check import image_supply as check
from labs.image import Layout


@pytest.fixture
def place(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/canary").write_text("alive")
    yield str(tmp_path)
    assert (tmp_path / "outside/canary").read_text() == "alive"
    assert os.listdir(tmp_path) == ["outside"]


CHAIN = (("d", "x", ""), ("l", "x/up", ".."), ("l", "out", "x/up/.."))


@pytest.mark.parametrize(("entries", "hint"), [
    ((("f", "../outside/canary", "dead"),), "`../outside/canary` は、文字を見ただけで"),
    ((("f", "/labs-escaped", "dead"),), "`/labs-escaped` は、文字を見ただけで"),
    ((("l", "door", "../outside"), ("f", "door/canary", "dead")), "`../outside` は、文字を見ただけで"),
    ((("d", "x", ""), ("l", "x/door", "../../outside")), "`x/../../outside` は、文字を見ただけで"),
    ((("h", "twin", "../outside/canary"),), "`../outside/canary` は、文字を見ただけで"),
    ((("f", "harmless", "x"),), "シンボリックリンクが一つもありません"),
    ((("l", "door", "x"), ("f", "x", "dead")), "canary は生きています"),
    (CHAIN, "canary は生きています"),
])
def test_past_the_letters_hints(entries, hint, place):
    verdict = check.past_the_letters(check.tar(*entries), place)
    assert not verdict
    assert hint in verdict.message


def test_past_the_letters_wants_a_tar(place):
    assert "tar のバイト列ではありません" in check.past_the_letters(b"nonsense", place).message
    assert not check.past_the_letters(..., place)


def test_past_the_letters_passes(place):
    verdict = check.past_the_letters(check.tar(*CHAIN, ("f", "out/outside/canary", "dead")), place)
    assert verdict
    assert "nothing may be written through a symbolic link" in verdict.message


def test_every_kind_of_entry(tmp_path):
    (tmp_path / "a.tar").write_bytes(check.tar(
        ("f", "f", b"\xff"), ("d", "d", "user.x=y"), ("l", "l", "f"), ("h", "h", "f"), ("c", "c", "1:3"),
        ("b", "b", "8:0")))
    with tarfile.open(tmp_path / "a.tar") as file:
        assert [member.type for member in file] == [b"0", b"5", b"2", b"1", b"3", b"4"]
        assert file.getmember("d").pax_headers == {"SCHILY.xattr.user.x": "y"}
        assert (file.getmember("b").devmajor, file.getmember("b").devminor) == (8, 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with registry_server.serve(under=str(tmp_path_factory.mktemp("registry"))) as running:
        yield running


@pytest.fixture
def shop(server, tmp_path):
    """Two tags of one repository, a client, a layout, and two key pairs."""
    layout = Layout.create(tmp_path / "layout")
    keys = []
    for number in ("1", "2"):
        folder = tmp_path / number
        folder.mkdir()
        (folder / "f").write_text(number)
        image.add_image(layout, [image.add_layer(layout, os.fspath(folder))], name=number)
        keys.append(supply.new_key(os.fspath(folder)))
    with registry.Registry(server.host) as client:
        name = f"shop{abs(hash(str(tmp_path)))}"
        for tag in ("1", "2"):
            registry.push(client, name, tag, layout, tag)
        yield client, name, layout, keys


def test_vouched_hints_and_passes(shop, server):
    client, name, layout, ((private, public), (other, _)) = shop

    def message(tag):
        return check.vouched(tag, server.host, name, public).message

    assert "`9` という tag はありません。いまあるのは `1` `2` です" in message("9")
    assert "署名が一つもありません" in message("1")
    supply.sign(client, name, "1", layout, other)
    assert "この公開鍵の持ち主が作ったものではありません" in message("1")
    signed = supply.sign(client, name, "2", layout, private)
    supply.attach(client, name, layout, signed, supply.signature_tag(client.head(name, "1").digest))
    assert "別の digest についてのもの" in message("1")
    registry.push(client, name, "copy", layout, "2")
    assert "別の名前についてのもの" in message("copy")
    assert check.vouched("2", server.host, name, public)


def test_piece_hints_and_passes():
    member = tarfile.TarInfo("f")
    content = b"zero at the end\0\0"
    member.size = len(content)
    data = gzip.compress(member.tobuf() + content + bytes(512 - len(content)))
    toc = {"f": (10, len(data), image.digest(content)), "g": (0, len(data), image.digest(b"other"))}
    whole = b"\x1f\x8b" + bytes(2000)
    assert "バイト列" in check.piece("text", toc, "f", 2002).message
    assert "丸ごと（2002 バイト）" in check.piece(whole, toc, "f", 2002).message
    assert "gzip の印" in check.piece(data[1:], toc, "f", 2002).message
    assert "一バイト多く" in check.piece(data + b"x", toc, "f", 2002).message
    assert f"長さが 20 バイトです。目次の二つ目の数は {len(data)}" in check.piece(data[:20], toc, "f", 2002).message
    assert "`g` の中身ではありません" in check.piece(data, toc, "g", 2002).message
    assert check.piece(data, toc, "f", 2002)
