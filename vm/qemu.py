"""One QEMU process: its command line, its ssh_config, its control socket, its snapshot.

The guest has no way out (`restrict=on`): only the forwarded ports on 127.0.0.1 reach it.
See qemu(1) and the QEMU manual's chapters "Disk Images" and "QMP".
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from vm.steps import LabError, run

MEMORY_MIB = 4096
# What emulation pays for at every page and system call and no lab needs: 5-level page tables, SMAP and SMEP (a second
# set of TLBs), and on the kernel's command line zeroed allocations, checked copies and a stack that moves at each call.
TCG_CPU = "max,la57=off,smap=off,smep=off"
KERNEL = "psi=1 mitigations=off init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off nowatchdog"


class Arch(NamedTuple):
    """What differs between the machine architectures QEMU can run for us."""

    debian: str
    qemu: str
    machine: str
    console: str
    tcg_cpu: str


ARCHES = {
    "x86_64": Arch("amd64", "qemu-system-x86_64", "q35", "ttyS0", TCG_CPU),
    "aarch64": Arch("arm64", "qemu-system-aarch64", "virt", "ttyAMA0", "max"),
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


def emulator(image: Path) -> list[str | Path]:
    """Return the command that starts QEMU: the host's where it accelerates, else the one in the image.

    The image's is Debian 13's, which emulates faster than Debian 12's; it comes with its own libraries and loader.
    """
    own = image / "qemu"
    if accelerator() == "kvm" or not own.is_dir():
        return [arch().qemu]
    (loader,) = own.glob("ld-linux*")
    return ["env", f"QEMU_MODULE_DIR={own}", loader, "--library-path", own, own / arch().qemu, "-L", own]


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Machine:
    """One QEMU process: `place` holds its run-time files, `image` what it was built from, `disk` its own overlay.

    Its pid stands beside the disk, so that whoever finds the disk of an interrupted job can end it.
    """

    def __init__(self, place: Path, image: Path, disk: Path) -> None:
        self.place, self.image, self.disk = place, image, disk
        self.config, self.pidfile, self.qmp_path = place / "ssh_config", disk.with_suffix(".pid"), place / "qmp"

    def launch(self, forwards: dict[int, int], incoming: str | None = None) -> None:
        """Start QEMU in the background; `forwards` maps ports of 127.0.0.1 to the guest's. LabError when it refuses."""
        self.ssh_port = free_port()
        ports = "".join(
            f",hostfwd=tcp:127.0.0.1:{host}-:{guest}" for host, guest in {self.ssh_port: 22, **forwards}.items()
        )
        a, kvm = arch(), accelerator() == "kvm"
        cpus = min(4, os.cpu_count() or 1)
        argv = [
            *emulator(self.image),
            *("-name", "read.container-lab", "-machine", a.machine, "-smp", str(cpus), "-m", str(MEMORY_MIB)),
            *(
                ("-accel", "kvm", "-cpu", "host")
                if kvm
                else ("-accel", "tcg,thread=multi,tb-size=1024", "-cpu", a.tcg_cpu)
            ),
            *("-kernel", self.image / "vmlinuz", "-initrd", self.image / "initrd"),
            *("-append", f"root=/dev/vda rw console={a.console} quiet net.ifnames=0 {KERNEL}"),
            *("-drive", f"file={self.disk},if=virtio,format=qcow2,cache=unsafe,discard=unmap"),
            *("-netdev", f"user,id=net,restrict=on{ports}", "-device", "virtio-net-pci,netdev=net,romfile="),
            *(
                "-device",
                "virtio-rng-pci",
                "-display",
                "none",
                "-monitor",
                "none",
                "-serial",
                f"file:{self.place / 'console.log'}",
            ),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off", "-pidfile", self.pidfile, "-daemonize"),
            *(("-incoming", incoming) if incoming else ()),
        ]
        run(argv, self.place / "qemu.log")
        self.config.write_text(
            f"""Host lab
  HostName 127.0.0.1
  Port {self.ssh_port}
  User root
  IdentityFile "{self.image / "id_ed25519"}"
  IdentitiesOnly yes
  HostKeyAlias lab
  UserKnownHostsFile "{self.place / "known_hosts"}"
  StrictHostKeyChecking yes
  SendEnv LAB_* LABS_*
  ServerAliveInterval 30
  ServerAliveCountMax 20
  LogLevel ERROR
"""
        )
        host_key = " ".join((self.image / "host_key.pub").read_text().split()[:2])
        (self.place / "known_hosts").write_text(f"lab {host_key}\n")

    def ssh(self) -> list[str]:
        """Return the command line that reaches the guest's root shell."""
        return ["ssh", "-F", str(self.config), "lab"]

    def wait_ssh(self, timeout: float) -> None:
        """Wait until a command runs in the guest, and set its clock; LabError after `timeout` seconds or QEMU's end."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            clock = f"date -u -s @{time.time():.0f} >/dev/null"
            done = subprocess.run([*self.ssh()[:-1], "-o", "ConnectTimeout=20", "lab", clock], capture_output=True)
            if done.returncode == 0:
                return
            if not self.alive():
                raise LabError(f"QEMU ended; its log: {self.place / 'qemu.log'}")
            time.sleep(1)
        raise LabError(
            f"the machine did not answer ssh within {timeout:.0f} s; its console: {self.place / 'console.log'}"
        )

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
                raise LabError(
                    f"the snapshot was not read within {timeout:.0f} s; QEMU's log: {self.place / 'qemu.log'}"
                )
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
