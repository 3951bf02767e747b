"""The micro VM: booted once for all the tests here, as the emulated boot takes most of a minute."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import machine, microvm, process
from labs.errors import BadInput, ChildFailed, CommandNotFound, Timeout


@pytest.fixture(scope="module")
def vm() -> Iterator[microvm.MicroVM]:
    with microvm.MicroVM() as booted:
        yield booted


def test_both_boards_are_known() -> None:
    for architecture, console in (("x86_64", "ttyS0"), ("aarch64", "ttyAMA0")):
        command = microvm.qemu_command(128 << 20, "/initramfs", architecture, kernel="/kernel")
        assert command[0] == f"qemu-system-{architecture}"
        assert command[command.index("-m") + 1] == "128"
        assert f"console={console}" in command[-1]


def test_no_board_for_an_unknown_architecture() -> None:
    with pytest.raises(BadInput, match=r"architecture: 'riscv64'"):
        microvm.qemu_command(128 << 20, "/initramfs", "riscv64", kernel="/kernel")


@pytest.mark.machine
def test_the_guest_runs_a_kernel_of_its_own(vm: microvm.MicroVM) -> None:
    boot_id = "/proc/sys/kernel/random/boot_id"
    assert vm.run("uname -r").strip() == os.uname().release
    assert vm.run(f"cat {boot_id}") != Path(boot_id).read_text()
    assert vm.boot_seconds > 0


@pytest.mark.machine
def test_an_answer_is_that_of_one_command(vm: microvm.MicroVM) -> None:
    assert vm.run("echo one; echo two >&2; exit 3") == "one\ntwo\n"
    assert vm.run("cat") == ""
    assert vm.run("true") == ""
    assert len(vm.run("head -c 200000 /dev/zero | tr '\\0' x")) == 200_000


@pytest.mark.machine
def test_the_guest_has_the_containers_files(vm: microvm.MicroVM) -> None:
    assert set(vm.run("ls /bin").split()) == set(os.listdir(f"{machine.ROOTFS['busybox']}/bin"))


@pytest.mark.machine
def test_the_guests_memory_is_counted_in_its_cgroup(vm: microvm.MicroVM) -> None:
    assert vm.cgroup.procs() == [vm.pid]
    assert process.status(vm.pid).threads > 1
    assert (16 << 20) < int(vm.cgroup.read("memory.current")) < (1 << 30)


@pytest.mark.machine
def test_one_line_at_a_time(vm: microvm.MicroVM) -> None:
    with pytest.raises(BadInput, match="one line"):
        vm.run("echo a\necho b")


@pytest.mark.machine
def test_a_panic_of_the_guest_ends_qemu_alone(vm: microvm.MicroVM) -> None:
    with pytest.raises(Timeout):
        vm.run("sleep 5", timeout=0.1)
    with pytest.raises(ChildFailed, match="guest: it has ended"):
        vm.run("echo c > /proc/sysrq-trigger")
    assert vm.wait(60).code == 0


@pytest.mark.machine
def test_without_qemu_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    board = microvm.BOARDS[os.uname().machine]._replace(qemu="qemu-that-is-not-there")
    monkeypatch.setitem(microvm.BOARDS, os.uname().machine, board)
    vm = microvm.MicroVM()
    with pytest.raises(CommandNotFound), vm:
        pass
    assert not os.path.exists(vm.cgroup.path)
