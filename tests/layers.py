"""What the tests of layers share: a tree written down as facts, tars made by GNU tar, and tars made entry by entry."""

import hashlib
import io
import os
import stat
import subprocess
import tarfile

from labs import layer


def run(*argv, **options):
    """A command that must succeed; its output as bytes."""
    return subprocess.run([os.fspath(one) for one in argv], check=True, capture_output=True, **options).stdout


def facts(root, times=True):
    """All that a tar can say about what is below a directory: path → type, mode, owner, time, content, attributes.

    Read with lstat(2), readlink(2) and getxattr(2) alone; files with several names are told by the first of them.
    """
    root, found, names = os.fsencode(root), {}, {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            place = os.path.join(folder, name)
            path, status = os.path.relpath(place, root), os.lstat(place)
            kind = stat.S_IFMT(status.st_mode)
            extra = None
            if kind == stat.S_IFREG:
                with open(place, "rb") as file:
                    extra = hashlib.file_digest(file, "sha256").hexdigest()
            elif kind == stat.S_IFLNK:
                extra = os.readlink(place)
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                extra = status.st_rdev
            attributes = {key: os.getxattr(place, key, follow_symlinks=False)
                          for key in os.listxattr(place, follow_symlinks=False)}
            if kind != stat.S_IFDIR and status.st_nlink > 1:
                names.setdefault(status.st_ino, []).append(path)
            found[path] = (kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid,
                           status.st_mtime_ns if times else 0, extra, attributes)
    links = sorted(sorted(group) for group in names.values())
    return found, links


def unpacked(data, target, **options):
    """Unpack bytes with labs.layer into a new directory; its path."""
    os.makedirs(target, exist_ok=True)
    layer.unpack(io.BytesIO(data), os.fspath(target), **options)
    return target


def packed(folder, **options):
    """A directory as the bytes of a layer."""
    out = io.BytesIO()
    layer.pack(os.fspath(folder), out, **options)
    return out.getvalue()


def entry(name, content=b"", kind=tarfile.REGTYPE, **fields):
    """One entry: a TarInfo and its content."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(content)
    if kind == tarfile.DIRTYPE:
        member.mode = 0o755
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def folder(name, **fields):
    """A directory's entry."""
    return entry(name, kind=tarfile.DIRTYPE, **fields)


def symlink(name, target):
    """A symbolic link's entry."""
    return entry(name, kind=tarfile.SYMTYPE, linkname=target)


def hard_link(name, target):
    """A hard link's entry."""
    return entry(name, kind=tarfile.LNKTYPE, linkname=target)


def tar(*entries, form=tarfile.PAX_FORMAT):
    """The bytes of a tar of these entries, in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for member, content in entries:
            file.addfile(member, io.BytesIO(content))
    return out.getvalue()


def raw(name, content=b"", kind=b"0", end=False, **fields):
    """A header block written by hand, and its content: what no tarfile would write.  Fields are bytes."""
    values = {"mode": b"0000644\0", "uid": b"0000000\0", "gid": b"0000000\0", "size": b"%011o\0" % len(content),
              "mtime": b"00000000000\0", "linkname": b"", "magic": b"ustar\0", "version": b"00",
              "uname": b"", "gname": b"", "devmajor": b"0000000\0", "devminor": b"0000000\0", "prefix": b"", **fields}
    head = name.ljust(100, b"\0") + values["mode"] + values["uid"] + values["gid"] + values["size"] + values["mtime"]
    tail = kind + values["linkname"].ljust(100, b"\0") + values["magic"] + values["version"]
    tail += values["uname"].ljust(32, b"\0") + values["gname"].ljust(32, b"\0")
    tail += values["devmajor"] + values["devminor"] + values["prefix"]
    tail = tail.ljust(512 - 156, b"\0")
    total = sum(head) + sum(tail) + 8 * 32
    block = head + b"%06o\0 " % total + tail
    assert len(block) == 512, len(block)
    return block + content + bytes(-len(content) % 512) + (bytes(1024) if end else b"")


def pax(**records):
    """The content of a pax header: LENGTH KEY=VALUE lines; __ in a key stands for a dot."""
    lines = b""
    for key, value in records.items():
        body = b" %s=%s\n" % (key.replace("__", ".").encode(), value)
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length = len(b"%d" % length) + len(body)
        lines += b"%d" % length + body
    return lines


def mutated(data, changes, mend):
    """Bytes changed at (position, value); mend: then every header's checksum is made right, so that more is read."""
    out = bytearray(data)
    for position, value in changes:
        out[position % len(out)] = value
    if mend:
        for start in range(0, len(out) - 511, 512):
            if out[start + 257:start + 262] == b"ustar":
                total = sum(out[start:start + 148]) + sum(out[start + 156:start + 512]) + 8 * 32
                out[start + 148:start + 156] = b"%06o\0 " % total
    return bytes(out)
