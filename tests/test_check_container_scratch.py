"""The exercises of the notebook 05-container-from-scratch: each wrong state gets its own hint."""

import os
from collections.abc import Iterator

import pytest

from labs import cgroup, container, process
from labs.check import container as check

RIGHT = ["write memory.max", "clone3", "mount overlay", "pivot_root", "mount proc", "umount2", "execve"]


@pytest.fixture
def box() -> Iterator[container.Container]:
    with container.Container(["sleep", "100"], network=True, memory="24M") as running:
        yield running


@pytest.mark.machine
def test_a_container_on_the_hosts_network_passes(box: container.Container) -> None:
    assert check.shares_network(box.pid).passed


@pytest.mark.machine
def test_other_limits_are_named() -> None:
    with container.Container(["sleep", "100"], network=True) as running:
        assert "`max` のまま" in check.shares_network(running.pid).message
        running.cgroup.write("memory.max", 32 << 20)
        assert str(32 << 20) in check.shares_network(running.pid).message


@pytest.mark.machine
def test_a_network_of_its_own_is_too_much() -> None:
    with container.Container(["sleep", "100"], memory="24M") as running:
        assert "`net` だけ" in check.shares_network(running.pid).message


def test_a_process_of_the_host_has_no_pid_namespace() -> None:
    assert "PID の namespace" in check.shares_network(os.getpid()).message


@pytest.mark.parametrize(("flags", "hint"), [
    ([], "`uts` と `mnt` と `ipc`"),
    (["--uts", "--ipc", "--mount"], "`pivot_root`"),
])
def test_unshare_alone_lacks_something(flags: list[str], hint: str) -> None:
    with cgroup.create() as group, group.spawn(["unshare", "--pid", "--fork", "--kill-child", *flags,
                                                "sh", "-c", "echo > /dev/null; sleep 100"]) as unshare:
        process.until(lambda: process.children(unshare.pid), what="the child")
        assert hint in check.shares_network(process.children(unshare.pid)[0]).message


def test_a_process_that_is_gone() -> None:
    with process.spawn(["true"]) as ended:
        ended.wait(30)
    assert "もうありません" in check.shares_network(ended.pid).message


def test_the_order_of_labs_passes() -> None:
    assert check.assembly_order(RIGHT).passed


def moved(name: str, place: int) -> list[str]:
    """The right order with one call elsewhere."""
    order = [call for call in RIGHT if call != name]
    return [*order[:place], name, *order[place:]]


@pytest.mark.parametrize(("order", "hint"), [
    (moved("write memory.max", 1), "上限のない時間"),
    (moved("mount overlay", 1), "ホストの表"),
    (moved("pivot_root", 2), "マウントポイント"),
    (moved("mount proc", 1), "PID namespace を映し"),
    (moved("umount2", 3), "唯一のルート"),
    (moved("execve", 4), "残っていません"),
    (moved("execve", 5), "古いルート"),
])
def test_each_rule_of_the_order_has_its_hint(order: list[str], hint: str) -> None:
    assert hint in check.assembly_order(order).message


def test_a_name_twice_or_missing() -> None:
    assert "一度ずつ" in check.assembly_order(RIGHT[:-1]).message
