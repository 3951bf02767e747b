"""The exercises of the notebook on cgroups: each wrong state gives its own hint."""

from contextlib import ExitStack

import pytest

from labs import cgroup, process
from labs.check import container as check

pytestmark = pytest.mark.machine

DOCKER = {"memory": "96M", "swap": "96M", "cpus": 1.5, "pids": 50}
EAT = ["tail", "/dev/zero"]


@pytest.fixture
def group():
    with cgroup.create() as made:
        yield made


def test_leaf_layout_follows_the_learner_step_by_step(group):
    with ExitStack() as undo:
        worker = undo.enter_context(group.spawn(["sleep", "600"]))
        assert "`front back` がありません" in check.leaf_layout(group.path).message
        front, back = (cgroup.create(name, group) for name in ("front", "back"))
        assert "自身にプロセスがいます" in check.leaf_layout(group.path).message
        back.add(worker.pid)
        assert "`memory.max` がありません" in check.leaf_layout(group.path).message
        group.enable(["memory"])
        assert "`back` にいます" in check.leaf_layout(group.path).message
        front.add(worker.pid)
        assert check.leaf_layout(group.path)
        worker.kill()
        worker.wait(30)
        assert "誰もいません" in check.leaf_layout(group.path).message


def test_leaf_layout_of_a_group_that_is_gone():
    assert "カーネルから読めませんでした" in check.leaf_layout("/sys/fs/cgroup/labs/nowhere").message


@pytest.mark.parametrize(("together", "hint"), [(0, "`memory.oom.group` が 0"), (1, "oom_group_kill")])
def test_dies_together(together, hint):
    with ExitStack() as undo:
        group = undo.enter_context(cgroup.create(memory="16M", swap=0, files={"memory.oom.group": together}))
        undo.enter_context(group.spawn(["sleep", "600"]))
        assert "まだ OOM kill が起きていません" in check.dies_together(group.path).message
        undo.enter_context(group.spawn(EAT)).wait(60)
        if together:
            group.wait_event("populated", 0)
        verdict = check.dies_together(group.path)
        assert (verdict.passed, hint in verdict.message) == (bool(together), True)
        group.write("memory.oom.group", 1)
        assert together or "書いたのは倒れたあと" in check.dies_together(group.path).message
        undo.enter_context(group.spawn(["sleep", "600"]))
        assert not together or "別のプロセス" in check.dies_together(group.path).message


def test_dies_together_without_a_wall_or_with_swap(group):
    assert "壁がなければ" in check.dies_together(group.path).message
    group.write("memory.max", "8M")
    with group.spawn(["python3", "-c", "data = b'x' * (24 << 20); input()"]) as holder:
        process.until(lambda: process.readable(holder.pidfd, 0) or int(group.read("memory.swap.current")) > 0, 60)
        assert "スワップへ逃げています" in check.dies_together(group.path).message


@pytest.mark.parametrize(("change", "hint"), [
    ({}, "そろいました"),
    ({"memory": None}, "`memory.max` がまだ `max`"),
    ({"memory": 96_000_000}, "1000×1000"),
    ({"swap": "192M"}, "合計ではなく"),
    ({"swap": 0}, "`memory.swap.max` が 0"),
    ({"cpus": None}, "持ち時間がまだ"),
    ({"cpus": 0.5}, "0.5 CPU 分"),
    ({"pids": None}, "`pids.max` が max"),
])
def test_same_as_docker(change, hint):
    with cgroup.create(**DOCKER | change) as group:
        verdict = check.same_as_docker(group.path)
        assert hint in verdict.message
        assert bool(verdict) is not bool(change)
