"""The lab machine without Vagrant: a Debian disk built natively, booted once in QEMU, and restored from a snapshot.

    cache/vm-KEY/            one finished image; KEY is a hash of everything that goes into it
        disk.raw             the file system, never written again
        boot.qcow2 ram.zst   the booted machine: what changed on the disk, and its memory (the snapshot)
        vmlinuz initrd       what QEMU boots
        id_ed25519 host_key  the ssh keys of this machine; token: JupyterLab's
        meta.json            written last: sizes and checksums of the files above
    run/NAME/                one running machine: its own overlay disk, QEMU's pid, ssh_config

Each start is a new overlay over the same snapshot, so every machine is clean and several can run side by side.
The guest has no way out (`restrict=on`): only the forwarded ports on 127.0.0.1 reach it.
See qemu(1) and the QEMU manual's chapters "Disk Images" and "QMP".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vm.steps import LabError, run, step

REPO = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "read.container")
RUN = REPO / ".lab"
SUITE = "trixie"
DISK_BYTES = 24 << 30
MEMORY_MIB = 4096
NEED_DISK = 12 << 30
NEED_MEMORY = (MEMORY_MIB + 512) << 20
FILES = ("disk.raw", "boot.qcow2", "ram.zst", "vmlinuz", "initrd", "id_ed25519", "token", "host_key.pub")


class Arch(NamedTuple):
    """What differs between the machine architectures QEMU can run for us."""

    debian: str
    qemu: str
    machine: str
    console: str


ARCHES = {
    "x86_64": Arch("amd64", "qemu-system-x86_64", "q35", "ttyS0"),
    "aarch64": Arch("arm64", "qemu-system-aarch64", "virt", "ttyAMA0"),
}


def arch() -> Arch:
    """Return this machine's row of ARCHES; LabError on any other machine."""
    try:
        return ARCHES[platform.machine()]
    except KeyError:
        raise LabError(f"machine: {platform.machine()}: the lab runs on {' and '.join(ARCHES)}") from None


def accelerator() -> str:
    """Return "kvm" only where the CPU has vmx or svm (or is arm64) and /dev/kvm can be opened, else "tcg".

    A /dev/kvm alone proves nothing: on some hosts guests hang on it.
    """
    flags = Path("/proc/cpuinfo").read_text().split()
    able = platform.machine() == "aarch64" or "vmx" in flags or "svm" in flags
    return "kvm" if able and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


# ── the key and the cache ────────────────────────────────────────────────────────────────────────────────────────


def inputs() -> list[Path]:
    """Return every file of the repository that goes into the image, sorted."""
    vm = REPO / "vm"
    fixed = [vm / "labvm.py", vm / "provision.sh", vm / "packages.txt", vm / "requirements.txt"]
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


def _extents(path: Path) -> Iterator[bytes]:
    """Yield the data of a file in pieces, holes left out (lseek(2), SEEK_DATA)."""
    with path.open("rb", buffering=0) as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            os.lseek(file.fileno(), at, os.SEEK_SET)
            while at < end:
                piece = file.read(min(1 << 22, end - at))
                at += len(piece)
                yield piece


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's data: it finds damage, not malice."""
    crc = 0
    for piece in _extents(path):
        crc = zlib.crc32(piece, crc)
    return crc


def broken(image: Path) -> str | None:
    """Return why a cached image cannot be used, or None when every file is as it was written."""
    try:
        meta = json.loads((image / "meta.json").read_text())["files"]
        for name in FILES:
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


def _require(what: str, have: int, need: int) -> None:
    if have < need:
        raise LabError(f"{what}: {have / 2**30:.1f} GiB free, {need / 2**30:.1f} GiB needed")


def memory_available() -> int:
    """Return MemAvailable of proc_meminfo(5) in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────


def build(place: Path) -> None:
    """Build the image into `place`: file system, disk, first boot, snapshot. Nothing half-made is left at `place`."""
    _require(f"disk at {CACHE}", shutil.disk_usage(CACHE).free, NEED_DISK)
    _require("memory", memory_available(), NEED_MEMORY)
    log = CACHE / "build.log"
    log.write_text("")
    for old in CACHE.glob("vm-*.partial"):
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
    files = {name: ((part / name).stat().st_size, checksum(part / name)) for name in FILES}
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
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"], capture_output=True, text=True
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
    apt = [line for line in dump if line.startswith(("Acquire::http", "Acquire::Check", "Acquire::Retries")) and not line.endswith('"";')]
    index = subprocess.run(["python3", "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True).stdout.strip()
    env = {name: value for name, value in os.environ.items() if name.lower() in ("http_proxy", "https_proxy", "no_proxy")}
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
    """Make the root file system with mmdebstrap(1); where root may not mount, mmdebstrap goes on without."""
    seed, own = part / "seed", part / "own"
    apt, env = _host_settings()
    for path in inputs():
        copy = seed / path.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    _machine_files(part, own)
    bundle = ca_bundle()
    inside = " ".join(f"{name}='{value}'" for name, value in env.items())
    token = (part / "token").read_text()
    copy_in = "cp -r --preserve=mode"
    run(
        [
            *(*as_root(), "mmdebstrap", "--mode=root", "--variant=apt", f"--architectures={arch().debian}"),
            *(f"--aptopt={line}" for line in apt),
            f"--include={','.join([*packages(), f'linux-image-{arch().debian}', 'initramfs-tools'])}",
            # a small initrd boots faster: the guest has virtio and nothing else
            '--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d"; echo MODULES=list >"$1/etc/initramfs-tools/conf.d/lab"; '
            'printf "%s\\n" virtio_pci virtio_blk virtio_net ext4 >"$1/etc/initramfs-tools/modules"',
            f'--customize-hook=mkdir "$1/lab"; {copy_in} "{seed}/." "$1/lab/"',
            *([f'--customize-hook=cp "{bundle}" "$1/etc/labs-host-ca.pem"'] if bundle else []),
            f"--chrooted-customize-hook=env -i {inside} HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LABS_BACKEND=qemu "
            f"LABS_JUPYTER_TOKEN={token} /lab/vm/provision.sh install",
            f'--customize-hook={copy_in} "{own}/." "$1/"',
            "--chrooted-customize-hook=systemctl --quiet enable systemd-networkd; "
            "systemctl --quiet mask systemd-networkd-wait-online systemd-timesyncd",
            '--customize-hook=rm -f "$1/etc/labs-host-ca.pem" "$1/etc/apt/apt.conf.d/99mmdebstrap"',
            *(SUITE, part / "root", *filter(None, [debian_mirror()])),
        ],
        log,
    )
    shutil.rmtree(seed)
    shutil.rmtree(own)


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
    write("etc/ssh/sshd_config.d/lab.conf", "PasswordAuthentication no\nHostKey /etc/ssh/lab_host_key\nUseDNS no\nAcceptEnv LAB_* LABS_*\n")
    write("etc/ssh/lab_host_key", (part / "host_key").read_text(), 0o600)


def _disk(part: Path, log: Path) -> None:
    root = part / "root"
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


# ── one machine ──────────────────────────────────────────────────────────────────────────────────────────────────


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Machine:
    """One QEMU process: `place` holds its run-time files, `image` what it was built from, `disk` its own overlay."""

    def __init__(self, place: Path, image: Path, disk: Path) -> None:
        self.place, self.image, self.disk = place, image, disk
        self.config, self.pidfile, self.qmp_path = place / "ssh_config", place / "qemu.pid", place / "qmp"

    def launch(self, forwards: dict[int, int], incoming: str | None = None) -> None:
        """Start QEMU in the background; `forwards` maps ports of 127.0.0.1 to the guest's. LabError when it refuses."""
        self.ssh_port = free_port()
        ports = "".join(f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in {self.ssh_port: 22, **forwards}.items())
        a, kvm = arch(), accelerator() == "kvm"
        cpus = min(4, os.cpu_count() or 1)
        argv = [
            *(a.qemu, "-name", "read.container-lab", "-machine", a.machine, "-smp", str(cpus), "-m", str(MEMORY_MIB)),
            *(("-accel", "kvm", "-cpu", "host") if kvm else ("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", "max")),
            *("-kernel", self.image / "vmlinuz", "-initrd", self.image / "initrd"),
            *("-append", f"root=/dev/vda rw console={a.console} quiet net.ifnames=0 psi=1 mitigations=off"),
            *("-drive", f"file={self.disk},if=virtio,format=qcow2,cache=unsafe,discard=unmap"),
            *("-netdev", f"user,id=net,restrict=on{ports}", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-rng-pci", "-display", "none", "-monitor", "none", "-serial", f"file:{self.place / 'console.log'}"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off", "-pidfile", self.pidfile, "-daemonize"),
            *(("-incoming", incoming) if incoming else ()),
        ]
        run(argv, self.place / "qemu.log")
        self.config.write_text(
            f"Host lab\n  HostName 127.0.0.1\n  Port {self.ssh_port}\n  User root\n  IdentityFile {self.image / 'id_ed25519'}\n"
            f"  IdentitiesOnly yes\n  HostKeyAlias lab\n  UserKnownHostsFile {self.place / 'known_hosts'}\n  StrictHostKeyChecking yes\n"
            "  SendEnv LAB_* LABS_*\n  ServerAliveInterval 30\n  ServerAliveCountMax 20\n  LogLevel ERROR\n"
        )
        host_key = " ".join((self.image / "host_key.pub").read_text().split()[:2])
        (self.place / "known_hosts").write_text(f"lab {host_key}\n")

    def ssh(self) -> list[str]:
        """Return the command line that reaches the guest's root shell."""
        return ["ssh", "-F", str(self.config), "lab"]

    def wait_ssh(self, timeout: float) -> None:
        """Wait until a command runs in the guest and set its clock; LabError after `timeout` seconds or when QEMU ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            clock = f"date -u -s @{time.time():.0f} >/dev/null"
            done = subprocess.run([*self.ssh()[:-1], "-o", "ConnectTimeout=20", "lab", clock], capture_output=True)
            if done.returncode == 0:
                return
            if not self.alive():
                raise LabError(f"QEMU ended; its log: {self.place / 'qemu.log'}")
            time.sleep(1)
        raise LabError(f"the machine did not answer ssh within {timeout:.0f} s; its console: {self.place / 'console.log'}")

    def pid(self) -> int | None:
        """Return QEMU's pid when that process is still this machine's (its command line names our disk)."""
        try:
            pid = int(self.pidfile.read_text())
            return pid if str(self.disk).encode() in Path(f"/proc/{pid}/cmdline").read_bytes() else None
        except (OSError, ValueError):
            return None

    def alive(self) -> bool:
        """Return whether QEMU runs."""
        return self.pid() is not None

    def kill(self) -> None:
        """End QEMU and wait until it is gone."""
        pid = self.pid()
        if pid is None:
            return
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        deadline = time.monotonic() + 30
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Send one QMP command and return its answer; LabError with QEMU's own words when it refuses."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.qmp_path))
            stream = s.makefile("rw")
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer: dict[str, Any] = {}
                while not ("return" in answer or "error" in answer):
                    line = stream.readline()
                    if not line:
                        raise LabError(f"QEMU closed its control socket on {command}")
                    answer = json.loads(line)
            if "error" in answer:
                raise LabError(f"QEMU refused {command}: {answer['error']['desc']}")
            return answer["return"]

    def resume(self, timeout: float = 120) -> None:
        """Wait until the memory of a snapshot is read, then let the guest run on."""
        deadline = time.monotonic() + timeout
        while self.qmp("query-status")["status"] == "inmigrate":
            if time.monotonic() > deadline:
                raise LabError(f"the snapshot was not read within {timeout:.0f} s; QEMU's log: {self.place / 'qemu.log'}")
            time.sleep(0.1)
        self.qmp("cont")

    def save(self, ram: Path) -> None:
        """Stop the guest, write its memory and devices to `ram` and quit QEMU: the snapshot."""
        self.qmp("stop")
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 0})
        self.qmp("migrate", uri=f"exec:zstd -q -1 -T0 -f -o '{ram}'")
        deadline = time.monotonic() + 300
        while (status := self.qmp("query-migrate")["status"]) != "completed":
            if status == "failed" or time.monotonic() > deadline:
                raise LabError(f"the snapshot could not be written: {status}")
            time.sleep(0.2)
        pid = self.pid()
        self.qmp("quit")
        while pid and self.alive():
            time.sleep(0.1)


def machine(name: str) -> Machine | None:
    """Return the running machine called `name` of this clone, or None."""
    try:
        state = json.loads((RUN / name / "vm.json").read_text())
    except (OSError, ValueError):
        return None
    vm = Machine(Path(state["place"]), Path(state["image"]), RUN / name / "disk.qcow2")
    return vm if vm.alive() else None


def start(name: str, forwards: dict[int, int]) -> Machine:
    """Restore a clean machine called `name`, or return the one that runs; builds the image first where needed."""
    running = machine(name)
    if running:
        return running
    _require("memory", memory_available(), NEED_MEMORY)
    source = image()
    stop(name)
    here = RUN / name
    here.mkdir(parents=True, exist_ok=True)
    # a unix socket's path has 108 bytes at most, and a clone may lie deeper
    place = Path(tempfile.mkdtemp(prefix="labvm-"))
    vm = Machine(place, source, here / "disk.qcow2")
    (here / "vm.json").write_text(json.dumps({"place": str(place), "image": str(source)}))
    with step(f"restore the machine ({accelerator()})"):
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", source / "boot.qcow2", vm.disk], place / "qemu.log")
        try:
            vm.launch(forwards, incoming=f"exec:zstd -qdc '{source / 'ram.zst'}'")
            vm.resume()
            vm.wait_ssh(120)
        except BaseException:
            stop(name)
            raise
    return vm


def stop(name: str) -> bool:
    """End the machine called `name` and remove its files; return whether one ran."""
    running = machine(name)
    if running:
        running.kill()
    with contextlib.suppress(OSError, ValueError, KeyError):
        shutil.rmtree(json.loads((RUN / name / "vm.json").read_text())["place"])
    shutil.rmtree(RUN / name, ignore_errors=True)
    return running is not None
