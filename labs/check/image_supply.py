"""The exercises of 03-image/05-supply-chain, and the tars that attack."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Mapping

from labs import image, layer, supply
from labs.check import Steps, exercise
from labs.errors import BadInput, Mismatch
from labs.image import Layout
from labs.registry import Registry

# What find(1) calls the types of files, and h for a hard link.
KINDS = {"f": tarfile.REGTYPE, "d": tarfile.DIRTYPE, "l": tarfile.SYMTYPE, "h": tarfile.LNKTYPE,
         "c": tarfile.CHRTYPE, "b": tarfile.BLKTYPE}
ALIVE = "alive"


def tar(*entries: tuple[str, str, str | bytes]) -> bytes:
    """A tar of entries as given, whatever they say: (type, name, and what fits it).

    f: the content.  l, h: where the link leads.  c, b: the numbers as "MAJOR:MINOR".  d: "" or "ATTRIBUTE=VALUE".
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for kind, name, more in entries:
            text = more if isinstance(more, str) else ""
            member, content = tarfile.TarInfo(name), b""
            member.type = KINDS[kind]
            if kind == "f":
                content = more.encode() if isinstance(more, str) else more
                member.size = len(content)
            elif kind in "lh":
                member.linkname = text
            elif kind in "cb":
                member.devmajor, member.devminor = map(int, text.split(":"))
            elif text:
                key, _, value = text.partition("=")
                member.pax_headers = {layer.XATTR + key: value}
            file.addfile(member, io.BytesIO(content))
    return out.getvalue()


def lexical(data: bytes) -> str | None:
    """The first name or link target that leads out, when only the letters of the path are looked at; or None."""
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        for member in file:
            folder = "" if member.islnk() else os.path.dirname(member.name)
            link = [os.path.join(folder, member.linkname)] if member.linkname else []
            for path in [member.name, *link]:
                if os.path.isabs(path) or os.path.normpath(path).split("/")[0] == "..":
                    return path
    return None


def killed(data: bytes, place: str) -> bool:
    """Whether an extractor that believes everything kills the canary in place/outside; it is alive again afterwards."""
    target = f"{place}/try"
    os.mkdir(target)
    canary = f"{place}/outside/canary"
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as file:
            file.extractall(target, filter="fully_trusted")  # noqa: S202  the attack itself
    except (OSError, tarfile.TarError):
        pass  # what came before has been done
    finally:
        shutil.rmtree(target)
    with open(canary, encoding="utf-8", errors="replace") as file:
        dead = file.read() != ALIVE
    with open(canary, "w", encoding="utf-8") as file:
        file.write(ALIVE)
    return dead


@exercise
def past_the_letters(data: bytes, place: str) -> Steps:
    """A tar in which no name and no link leads out by its letters, and which kills the canary all the same."""
    yield isinstance(data, bytes) and data[257:262] == b"ustar", "tar のバイト列ではありません。`check.tar(...)` が返す値を入れてください。"
    leading = lexical(data)
    yield leading is None, f"`{leading}` は、文字を見ただけで外に出るとわかります。リンクの行き先も、正規化すると中に収まるようにしてください。"
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        links = [member for member in file if member.issym()]
    yield bool(links), "シンボリックリンクが一つもありません。文字とたどり着く先が食い違うのは、途中にリンクがあるときです。"
    hint = "canary は生きています。`x/up` が `..` を指すリンクなら、`x/up/..` は文字の上では `x` です。カーネルがたどると、どこに着くでしょうか。"
    yield killed(data, place), hint
    line = _refusal(data)
    yield line != "", "canary は死にましたが、`labs.layer` も断りませんでした。これは教科書の側の誤りです。"
    return f"文字の検査をすり抜けて外へ書けました。同じ tar を `labs.layer` に渡すと、カーネルがリンクで止まるので `{line}` と断ります。"


def _refusal(data: bytes) -> str:
    with tempfile.TemporaryDirectory(prefix="labs-") as target:
        try:
            layer.unpack(io.BytesIO(data), target)
        except BadInput as error:
            return str(error)
    return ""


@exercise
def vouched(tag: str, host: str, repository: str, public: str) -> Steps:
    """A tag of the repository that the key's owner has signed as it is now."""
    with Registry(host) as client, tempfile.TemporaryDirectory(prefix="labs-") as folder:
        known = [one for one in client.tags(repository) if not one.startswith("sha256-")]
        yield tag in known, f"`{tag}` という tag はありません。いまあるのは `{'` `'.join(sorted(known))}` です。"
        layout = Layout.create(folder)
        what, _ = client.manifest(repository, tag)
        found = supply.signatures(client, repository, what.digest, layout)
        yield bool(found), f"`{repository}:{tag}` がいま指す manifest には、署名が一つもありません。`supply.sign` を使ってください。"
        reason = _reason(client, repository, tag, layout, public)
        yield reason != "BadInput", "署名はありますが、この公開鍵の持ち主が作ったものではありません。対になる秘密鍵で署名してください。"
        yield reason != "digest", "署名は別の digest についてのものです。署名を写すのではなく、いまの manifest に署名し直してください。"
        yield reason == "", f"署名は別の名前についてのものです。`{repository}:{tag}` という名前で署名してください。"
    return "鍵の持ち主が、いまこの名前が指す manifest を確かに名指ししています。"


def _reason(client: Registry, repository: str, tag: str, layout: Layout, public: str) -> str:
    try:
        supply.verify(client, repository, tag, layout, public)
    except BadInput:
        return "BadInput"
    except Mismatch as error:
        return "digest" if error.field == "docker-manifest-digest" else "name"
    return ""


@exercise
def piece(data: bytes, toc: Mapping[str, tuple[int, int, str]], path: str, whole: int) -> Steps:
    """The gzip member of one file, as it lies in a blob of so many bytes; toc: start, size, digest of the content."""
    _, size, digest = toc[path]
    yield isinstance(data, bytes), "バイト列を入れてください。応答の `content` がそれです。"
    yield len(data) != whole, f"blob を丸ごと（{whole} バイト）受け取りました。`Range` ヘッダーを付けて、必要なところだけを頼みます。"
    yield data[:2] == b"\x1f\x8b", "gzip の印（`1f 8b`）で始まっていません。`Range` の始まりを、目次の一つ目の数に合わせてください。"
    yield len(data) != size + 1, "一バイト多く受け取りました。`Range` の終わりは、その位置のバイトも含みます。"
    yield len(data) == size, f"長さが {len(data)} バイトです。目次の二つ目の数は {size} です。"
    content = zlib.decompress(data, 31)[tarfile.BLOCKSIZE:]
    length = next((n for n in range(len(content), -1, -1) if n == 0 or content[n - 1]), 0)
    same = any(image.digest(content[:n]) == digest for n in range(length, len(content) + 1))
    yield same, f"伸長できましたが、`{path}` の中身ではありません。目次の行を取り違えていないでしょうか。"
    return f"`{path}` だけを受け取り、目次の digest と合うことまで確かめました。残りのバイトは、まだレジストリにあります。"
