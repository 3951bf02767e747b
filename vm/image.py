"""The lab machine's image: a Debian disk built natively, booted once in QEMU and frozen.

cache/vm-KEY/            one finished image; KEY is a hash of everything that goes into it
    disk.raw             the file system, never written again
    boot.qcow2 ram.zst   the booted machine: what changed on the disk, and its memory (the snapshot)
    vmlinuz initrd       what QEMU boots
    qemu/                the QEMU that emulates, out of the disk, with its libraries and firmware
    id_ed25519 host_key  the ssh keys of this machine; token: JupyterLab's
    meta.json            written last: sizes and checksums of the files above
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from vm.qemu import MEMORY_MIB, Machine, accelerator, arch
from vm.steps import LabError, run, step

REPO = Path(__file__).resolve().parent.parent
CACHE = Path(
    os.environ.get("LAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "read.container"
)
SUITE = "trixie"
DISK_BYTES = 24 << 30
NEED_DISK = 12 << 30
NEED_MEMORY = (MEMORY_MIB + 512) << 20
FILES = ("disk.raw", "boot.qcow2", "ram.zst", "vmlinuz", "initrd", "id_ed25519", "token", "host_key.pub")


# ── the key and the cache ────────────────────────────────────────────────────────────────────────────────────────


def inputs() -> list[Path]:
    """Return every file of the repository that goes into the image, sorted."""
    vm = REPO / "vm"
    fixed = [vm / "image.py", vm / "qemu.py", vm / "provision.sh", vm / "packages.txt", vm / "requirements.txt"]
    images = [p for p in (vm / "images").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return sorted([*fixed, REPO / "requirements.txt", REPO / "constraints.txt", *images])


def key() -> str:
    """Return the cache key: a hash of the inputs, the architecture, the accelerator and QEMU's version."""
    digest = hashlib.sha256()
    for path in inputs():
        digest.update(str(path.relative_to(REPO)).encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run([arch().qemu, "--version"], capture_output=True, check=True).stdout
    digest.update(f"{platform.machine()} {accelerator()} {MEMORY_MIB}".encode() + version)
    return digest.hexdigest()[:12]


BLOCK = 1 << 20


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the blocks of a file that hold something, each behind its offset.

    lseek(2)'s SEEK_DATA only spares the reading of holes: what counts as data may change when the file system writes
    a file back, so that blocks of zeros are left out here.
    """
    with path.open("rb", buffering=0) as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError:
                return
            block = os.pread(file.fileno(), BLOCK, at)
            if block.count(0) < len(block):
                yield at.to_bytes(8, "little") + block
            at += BLOCK


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's contents: it finds damage, not malice."""
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return crc


def broken(image: Path) -> str | None:
    """Return why a cached image cannot be used, or None when every file is as it was written."""
    try:
        meta = json.loads((image / "meta.json").read_text())["files"]
        for name in {*FILES, *meta}:
            size, crc = meta[name]
            if (image / name).stat().st_size != size:
                return f"{name} has another size than was written"
            if checksum(image / name) != crc:
                return f"{name} has another checksum than was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"meta.json or a file it names: {error}"
    return None


def image() -> Path:
    """Return the finished image for this repository, building it when there is none or a broken one."""
    CACHE.mkdir(parents=True, exist_ok=True)
    place = CACHE / f"vm-{key()}"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            with step("image cache: check"):
                why = broken(place)
            if why is None:
                os.utime(place)
                return place
            print(f"  the cached image is broken ({why}): building it again")
            shutil.rmtree(place)
        build(place)
    return place


def require_free(what: str, have: int, need: int) -> None:
    """Raise LabError unless `have` bytes are at least `need`."""
    if have < need:
        raise LabError(f"{what}: {have / 2**30:.1f} GiB free, {need / 2**30:.1f} GiB needed")


def memory_available() -> int:
    """Return MemAvailable of proc_meminfo(5) in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────


def build(place: Path) -> None:
    """Build the image into `place`: file system, disk, first boot, snapshot. Nothing half-made is left at `place`."""
    require_free(f"disk at {CACHE}", shutil.disk_usage(CACHE).free, NEED_DISK)
    require_free("memory", memory_available(), NEED_MEMORY)
    log = CACHE / "build.log"
    log.write_text("")
    for old in CACHE.glob("vm-*.partial"):
        Machine(old, old, old / "boot.qcow2").kill()
        run([*as_root(), "rm", "-rf", "--one-file-system", old], log)
    part = place.with_name(place.name + ".partial")
    part.mkdir()
    _keys(part)
    with step("build: Debian packages, Python, container images"):
        _file_system(part, log)
    with step("build: disk"):
        _disk(part, log)
    with step("build: first boot"):
        _first_boot(part, log)
    names = [*FILES, *(str(path.relative_to(part)) for path in (part / "qemu").iterdir())]
    files = {name: ((part / name).stat().st_size, checksum(part / name)) for name in names}
    (part / "meta.json").write_text(json.dumps({"files": files, "built": time.strftime("%F %T")}, indent=1))
    part.rename(place)
    for old in sorted(CACHE.glob("vm-????????????"), key=lambda p: p.stat().st_mtime)[:-2]:
        shutil.rmtree(old)


def _keys(part: Path) -> None:
    for name in ("id_ed25519", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", part / name], check=True)
    (part / "token").write_text(secrets.token_hex(24))
    (part / "token").chmod(0o600)


def debian_mirror() -> str | None:
    """Return the URI of the host's own Debian archive from its apt configuration, or None for the tools' default."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
    ).stdout
    rows = (line.split() for line in found.splitlines())
    return next((row[2] for row in rows if row[:2] == ["Debian", "main"] and "security" not in row[2]), None)


def ca_bundle() -> Path | None:
    """Return the certificate bundle this host trusts: what the usual variables name, else the system's own."""
    names = [os.environ.get(v) for v in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_CERT")]
    candidates = [*filter(None, names), "/etc/ssl/certs/ca-certificates.crt"]
    return next((Path(c) for c in candidates if Path(c).is_file()), None)


def _host_settings() -> tuple[list[str], dict[str, str]]:
    """Return the host's apt options that concern fetching, and its pip and proxy settings as environment variables."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout.splitlines()
    apt = [
        line
        for line in dump
        if line.startswith(("Acquire::http", "Acquire::Check", "Acquire::Retries")) and not line.endswith('"";')
    ]
    index = subprocess.run(
        ["python3", "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    ).stdout.strip()
    env = {
        name: value for name, value in os.environ.items() if name.lower() in ("http_proxy", "https_proxy", "no_proxy")
    }
    return apt, env | ({"PIP_INDEX_URL": index} if index else {})


def packages() -> list[str]:
    """Return the Debian packages of packages.txt that this architecture has."""
    found = []
    for line in (REPO / "vm/packages.txt").read_text().splitlines():
        name, _, only = line.partition("#")[0].strip().partition(" ")
        if name and only.strip(" []") in ("", arch().debian):
            found.append(name)
    return found


def as_root() -> list[str]:
    """Return what a command that needs root begins with: nothing for root, sudo for others; LabError without sudo."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo"):
        return ["sudo"]
    raise LabError("user: building the image needs root: run ./lab as root or install sudo")


def _file_system(part: Path, log: Path) -> None:
    """Make the root file system with mmdebstrap(1), without the right to mount: so it builds in a container too."""
    seed, own, bundle = part / "seed", part / "own", ca_bundle()
    for path in inputs():
        copy = seed / path.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    _machine_files(part, own)
    apt, env = _host_settings()
    env |= {"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LABS_BACKEND": "qemu"}
    env |= {"LABS_JUPYTER_TOKEN": (part / "token").read_text()}
    inside = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    hooks = [
        f'mkdir "$1/lab"; {_COPY_IN} {shlex.quote(str(seed))}/. "$1/lab/"',
        f'cp {shlex.quote(str(bundle))} "$1/etc/labs-host-ca.pem"' if bundle else "true",
        f'chroot "$1" env -i {inside} /lab/vm/provision.sh install',
        f'{_COPY_IN} {shlex.quote(str(own))}/. "$1/"',
        'chroot "$1" systemctl --quiet enable systemd-networkd',
        'chroot "$1" systemctl --quiet mask systemd-networkd-wait-online systemd-timesyncd',
        'rm -f "$1/etc/labs-host-ca.pem" "$1/etc/apt/apt.conf.d/99mmdebstrap"',
    ]
    argv = [*as_root(), *NO_MOUNTS, "mmdebstrap", "--mode=root", "--variant=apt", f"--architectures={arch().debian}"]
    argv += [f"--aptopt={line}" for line in apt]
    argv += [f"--include={','.join([*packages(), f'linux-image-{arch().debian}', 'initramfs-tools'])}"]
    argv += [f"--essential-hook={_SMALL_INITRD}", *(f"--customize-hook={hook}" for hook in hooks)]
    run([*argv, SUITE, part / "root", *filter(None, [debian_mirror()])], log)
    shutil.rmtree(seed)
    shutil.rmtree(own)


# An ordinary container's root lacks CAP_SYS_ADMIN. Nobody builds with it, so that there is one way to build.
NO_MOUNTS = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
# what is copied in belongs to root there, whoever builds
_COPY_IN = "cp -r --preserve=mode"
# a small initrd boots faster: the guest has virtio and nothing else
_SMALL_INITRD = """
mkdir -p "$1/etc/initramfs-tools/conf.d"
echo MODULES=list >"$1/etc/initramfs-tools/conf.d/lab"
printf '%s\\n' virtio_pci virtio_blk virtio_net ext4 >"$1/etc/initramfs-tools/modules"
"""


def _machine_files(part: Path, own: Path) -> None:
    """Write what makes the file system this machine: host name, network, keys, mount table."""

    def write(name: str, text: str, mode: int = 0o644) -> None:
        path = own / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    write("etc/hostname", "lab\n")
    write("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 lab\n::1 localhost\n")
    write("etc/fstab", "LABEL=lab / ext4 noatime 0 1\n")
    write("etc/resolv.conf", "nameserver 10.0.2.3\n")
    write("etc/systemd/network/lab.network", "[Match]\nName=eth0\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n")
    write("root/.ssh/authorized_keys", (part / "id_ed25519.pub").read_text(), 0o600)
    (own / "root").chmod(0o700)
    (own / "root/.ssh").chmod(0o700)
    write(
        "etc/ssh/sshd_config.d/lab.conf",
        "PasswordAuthentication no\nHostKey /etc/ssh/lab_host_key\nUseDNS no\nAcceptEnv LAB_* LABS_*\n",
    )
    write("etc/ssh/lab_host_key", (part / "host_key").read_text(), 0o600)


# the loader and the libraries are those that ldd(1) names; `tar -h` packs what a link leads to within the root
_EMULATOR = """
cd "$2" && mkdir qemu && chroot "$1" sh -c 'tar -chf - --transform="s,.*/,," "$0" \
	$(ldd "$0" | grep -o "/[^ ]*") $(ls /usr/share/seabios/*.bin /usr/share/qemu/*.bin)' "$3" | tar -C qemu -xf -
"""


def _disk(part: Path, log: Path) -> None:
    root = part / "root"
    run([*as_root(), "sh", "-euc", _EMULATOR, "sh", root, part, f"/usr/bin/{arch().qemu}"], log)
    for name in ("vmlinuz", "initrd"):
        newest = max((root / "boot").glob(f"{name}*"))
        run([*as_root(), "install", "-m", "644", newest, part / name], log)
    disk = part / "disk.raw"
    disk.touch()
    run([*as_root(), "mke2fs", "-q", "-t", "ext4", "-L", "lab", "-d", root, disk, f"{DISK_BYTES >> 20}M"], log)
    run([*as_root(), "rm", "-rf", "--one-file-system", root], log)


def _first_boot(part: Path, log: Path) -> None:
    """Boot the disk, run the start-up half of the provisioner, and freeze the machine into boot.qcow2 and ram.zst."""
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "disk.raw", part / "boot.qcow2"], log)
    with tempfile.TemporaryDirectory(prefix="labvm-") as place:
        vm = Machine(Path(place), part, part / "boot.qcow2")
        vm.launch({})
        try:
            vm.wait_ssh(600)
            run([*vm.ssh(), "/lab/vm/provision.sh start"], log)
            run([*vm.ssh(), _SETTLE], log)
            vm.save(part / "ram.zst")
        except BaseException:
            vm.kill()
            raise


# wait until JupyterLab answers, then leave little in memory to save
_SETTLE = """
for i in $(seq 300); do curl -fsS -o /dev/null http://127.0.0.1:8888/api 2>/dev/null && break; sleep 1; done
curl -fsS http://127.0.0.1:8888/api; sync; echo 3 >/proc/sys/vm/drop_caches
"""
