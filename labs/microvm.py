"""A micro VM to measure a container against: QEMU boots the lab's own kernel on a machine without disk or network.

The guest's root filesystem is that of the containers, unpacked from an initramfs into memory, and its
process 1 is a shell script that takes commands from the serial port::

    notebook ──pipe── QEMU: serial port ── guest kernel ── /init ── sh -c COMMAND

The processor is emulated (TCG) on every lab machine, so that no nested virtualisation is needed.
"""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import zstandard

from labs import cgroup, machine, process, syscalls
from labs.errors import BadInput, ChildFailed, Timeout


class Board(NamedTuple):
    """What QEMU emulates for one processor architecture, and the kernel's name of its serial port."""

    qemu: str
    arguments: tuple[str, ...]
    console: str


BOARDS = {
    "x86_64": Board("qemu-system-x86_64", ("-M", "microvm,acpi=off"), "ttyS0"),
    "aarch64": Board("qemu-system-aarch64", ("-M", "virt", "-cpu", "cortex-a57"), "ttyAMA0"),
}
# The kernel says nothing before init does; a guest that panics restarts at once, which -no-reboot makes an end.
# Guards against attackers, whom this guest does not have, the kernel's trials of its own ciphers and its checks of
# the emulated clock are off: emulated they are half of the boot.
KERNEL_PARAMETERS = ("loglevel=0 panic=-1 reboot=t mitigations=off lsm=capability audit=0 init_on_alloc=0 "
                     "rodata=off cryptomgr.notests tsc=reliable no_timer_check")
ZSTD = b"\x28\xb5\x2f\xfd"  # RFC 8878, section 3.1.1: the first bytes of a frame
BOOT_TIMEOUT = 600.0
READY = re.compile(rb"ready\n")
END = re.compile(rb"\x1e(\d+)\n")  # ASCII's record separator and the status end an answer
INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
stty -echo -onlcr
echo ready
while read -r line; do
    sh -c "$line" </dev/null 2>&1
    printf '\\036%d\\n' $?
done
"""


class MicroVM:
    """A booted guest for the length of a with block.

    QEMU runs in a cgroup of its own, so its memory is read as a container's is: cgroup.read("memory.peak").

    Attributes:
        memory: the guest's memory in bytes.
        boot_seconds: from the start of QEMU to the first line of the guest's init.
        cgroup: the group that QEMU runs in.
        pid: QEMU, as the host numbers it.
    """

    def __init__(self, memory: int | str = "128M", rootfs: str = "busybox") -> None:
        self.memory = cgroup.parse_size(memory, "memory")
        self.boot_seconds = 0.0
        self.pid = -1
        self._rootfs = machine.rootfs(rootfs)
        self._undo = ExitStack()
        self._unread, self._owed = b"", 0

    def __enter__(self) -> MicroVM:
        machine.require()
        with ExitStack() as undo:
            self.cgroup = undo.enter_context(cgroup.create(machine.new_name("vm")))
            folder = undo.enter_context(_folder())
            self._start(undo, qemu_command(self.memory, _initramfs(folder, self._rootfs), kernel=_kernel(folder)))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _start(self, undo: ExitStack, command: list[str]) -> None:
        stdin, self._input = os.pipe()
        self._output, stdout = os.pipe()
        undo.callback(os.close, self._input)
        undo.callback(os.close, self._output)
        began = time.perf_counter()
        try:
            self._qemu = undo.enter_context(process.spawn(command, first=lambda: self._prepare(stdin, stdout)))
        finally:
            os.close(stdin)
            os.close(stdout)
        self.pid = self._qemu.pid
        self._read_until(READY, BOOT_TIMEOUT)
        self.boot_seconds = time.perf_counter() - began

    def _prepare(self, stdin: int, stdout: int) -> None:
        """In the child, before QEMU: die with the notebook, count in the cgroup, talk through the pipes."""
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        self.cgroup.add(os.getpid())
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)

    def run(self, command: str, timeout: float = 300) -> str:
        """What one line of shell prints in the guest; ChildFailed if that ends it, Timeout after timeout seconds."""
        if "\n" in command:
            raise BadInput("command", command, "must be one line")
        os.write(self._input, f"{command}\n".encode())
        self._owed += 1
        while self._owed:  # more than one only after a Timeout
            answer = self._read_until(END, timeout)
            self._owed -= 1
        return answer.decode("utf-8", "replace")

    def wait(self, timeout: float = 60) -> process.WaitStatus:
        """Wait for the end of QEMU, at most timeout seconds."""
        return self._qemu.wait(timeout)

    def _read_until(self, end: re.Pattern[bytes], timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while not (found := end.search(self._unread)):
            if not process.readable(self._output, deadline - time.monotonic()):
                raise Timeout("an answer of the guest", timeout)
            chunk = os.read(self._output, 65536)
            if not chunk:
                raise ChildFailed("guest", detail="it has ended")
            self._unread += chunk.replace(b"\r", b"")
        answer, self._unread = self._unread[: found.start()], self._unread[found.end() :]
        return answer


def qemu_command(memory: int, initramfs: str, architecture: str | None = None, *, kernel: str) -> list[str]:
    """The command line of QEMU: a kernel's file, and the serial port on stdin and stdout."""
    architecture = os.uname().machine if architecture is None else architecture
    if architecture not in BOARDS:
        raise BadInput("architecture", architecture, f"must be one of {', '.join(BOARDS)}")
    board = BOARDS[architecture]
    return [board.qemu, *board.arguments, "-accel", "tcg", "-m", str(memory >> 20), "-no-reboot",
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio",
            "-kernel", kernel, "-initrd", initramfs, "-append", f"console={board.console} {KERNEL_PARAMETERS}"]


@contextmanager
def _folder() -> Iterator[str]:
    folder = f"{machine.DATA}/{machine.new_name('vm')}"
    os.makedirs(folder)
    try:
        yield folder
    finally:
        machine.remove_tree(folder)


def _kernel(folder: str) -> str:
    """The running kernel's own file, unpacked where that is known: emulated, the guest would take seconds for it.

    An x86 kernel says where its packed part is: Documentation/arch/x86/boot.rst, payload_offset and payload_length.
    """
    path = f"/boot/vmlinuz-{os.uname().release}"
    with open(path, "rb") as file:
        image = file.read()
    start, length = struct.unpack_from("<II", image, 0x248)
    start += (image[0x1F1] + 1) * 512
    if image[0x202:0x206] != b"HdrS" or not image.startswith(ZSTD, start):
        return path
    packed = io.BytesIO(image[start:start + length - 4])  # the last four bytes are the size, unpacked
    with open(f"{folder}/vmlinux", "wb") as unpacked:
        zstandard.ZstdDecompressor().copy_stream(packed, unpacked)
    return unpacked.name


def _initramfs(folder: str, rootfs: str) -> str:
    """A root filesystem and /init as an archive; the kernel unpacks one after the other (initramfs buffer format)."""
    os.makedirs(f"{folder}/top")
    with open(f"{folder}/top/init", "w", opener=lambda path, flags: os.open(path, flags, 0o755)) as init:
        init.write(INIT)
    with open(f"{folder}/initramfs", "wb") as archive:
        for top in (rootfs, f"{folder}/top"):
            names = subprocess.run(["find", "."], cwd=top, check=True, capture_output=True).stdout
            archive.write(subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], cwd=top, input=names,
                                         check=True, capture_output=True).stdout)
    return f"{folder}/initramfs"
