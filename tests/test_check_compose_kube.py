"""The exercises of 07-compose/04-to-orchestration: each wrong answer gives its hint."""

import os

import pytest

from labs import process
from labs.check import UNANSWERED
from labs.check import compose_kube as check


class TestLoop:
    def test_passes(self):
        assert check.loop(lambda desired, observed: (desired - observed, observed - desired))

    def test_unanswered(self):
        assert check.loop(...).message == UNANSWERED

    @pytest.mark.parametrize(("plan", "hint"), [
        (lambda desired, observed: desired - observed, "組にして"),
        (lambda desired, observed: (desired, set()), "もう動いている `a` を起動"),
        (lambda desired, observed: (desired - observed, desired), "無いはずの `a` を消そう"),
        (lambda desired, observed: (desired - observed, observed), "望んでいる `a` を消そう"),
        (lambda desired, observed: (set(), observed - desired), "`a` が足りないまま"),
        (lambda desired, observed: (desired - observed, set()), "`b` が余ったまま"),
    ])
    def test_hints(self, plan, hint):
        verdict = check.loop(plan)
        assert not verdict
        assert hint in verdict.message


class TestShared:
    def test_follows_the_kernel(self):
        with process.spawn(["unshare", "--net", "--uts", "sleep", "1000"]) as child:
            process.until(lambda: process.status(child.pid).name == "sleep")
            right = {"mnt", "pid", "ipc", "user", "cgroup", "time"}
            assert check.shared(os.getpid(), child.pid, right)
            assert "`net` は別々" in check.shared(os.getpid(), child.pid, right | {"net"}).message
            assert "`pid` も同じ" in check.shared(os.getpid(), child.pid, right - {"pid"}).message
            assert "`disk` という" in check.shared(os.getpid(), child.pid, {"disk"}).message


class TestTerms:
    def test_passes(self):
        assert check.terms(check.TERMS)

    @pytest.mark.parametrize(("job", "given", "hint"), [
        ("choose a machine", "kubelet", "機械を選ぶだけ"), ("remember the wish", "scheduler", "覚えるだけ"),
        ("one address for copies", "DNS", "選べる名前"),
        ("keep three copies", "Deployment", "数を保つ者"),
        ("start containers here", "", "答えがまだ"),
        ("roll out a new image", "ReplicaSet", "持ち替える者"),
        ("start containers here", "scheduler", "一人ずつ"),
        ("one address for copies", "etcd", "変わらない入口"),
    ])
    def test_hints(self, job, given, hint):
        verdict = check.terms(check.TERMS | {job: given})
        assert not verdict
        assert hint in verdict.message
