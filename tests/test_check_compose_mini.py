"""The exercises of 07-compose/03-mini-compose: each wrong answer gives its hint."""

import pytest

from labs import compose
from labs.check import UNANSWERED
from labs.check import compose_mini as check

LEVELS = [["assets", "db", "queue"], ["api", "worker"], ["front"]]
RECREATED = {"comment": [], "wait": [], "name": ["api"], "scale": [], "words": ["queue"], "shell": ["assets"]}
GOOD = check.GATE.replace("depends_on: [db]", "depends_on: {db: {condition: service_healthy}}").replace(
    "depends_on: [migrate]", "depends_on: {migrate: {condition: service_completed_successfully}}")


class TestLevels:
    def test_passes(self):
        project = check.read(check.PUZZLE)
        assert check.levels(project, LEVELS)
        assert compose.order(project) == LEVELS

    def test_unanswered(self):
        assert check.levels(check.read(check.PUZZLE), ...).message == UNANSWERED

    @pytest.mark.parametrize(("answer", "hint"), [
        ([*LEVELS, ["cache"]], "`cache` というサービスはありません"),
        (LEVELS[:2], "`front` が、どの段にも"),
        ([*LEVELS, ["db"]], "二つの段"),
        ([["assets", "db", "queue", "worker"], ["api"], ["front"]], "`worker` は `queue` を待ちます"),
        ([["db", "queue"], ["api", "worker", "assets"], ["front"]], "`assets` は、もっと早く"),
        ([["assets"], ["db"], ["queue"], ["api", "worker"], ["front"]], "`db` は、もっと早く"),
    ])
    def test_hints(self, answer, hint):
        verdict = check.levels(check.read(check.PUZZLE), answer)
        assert not verdict
        assert hint in verdict.message


class TestRecreated:
    def test_passes(self):
        assert check.recreated(RECREATED)

    def test_every_edit_changes_the_text(self):
        assert all(old in check.PUZZLE for old, _ in check.EDITS.values())

    @pytest.mark.parametrize(("edit", "given", "hint"), [
        ("comment", ["front"], "注釈は"), ("wait", ["worker"], "起動の順番"), ("scale", ["db"], "足りない分"),
        ("name", [], "見落として"), ("words", ["queue", "worker"], "`worker` の設定は変わりません"),
        ("shell", [], "見落として"),
    ])
    def test_hints(self, edit, given, hint):
        verdict = check.recreated(RECREATED | {edit: given})
        assert not verdict
        assert hint in verdict.message

    def test_one_missing(self):
        assert "`comment` の答えがまだ" in check.recreated({}).message


class TestGated:
    def test_passes(self):
        assert check.gated(GOOD)

    @pytest.mark.parametrize(("text", "hint"), [
        (check.GATE, "`migrate` が、`db` の準備"),
        (GOOD.replace("service_completed_successfully", "service_started"), "`web` が、`migrate` の終わる前"),
        (GOOD.replace("sleep 0.5; exit 0", "exit 0").replace("service_completed_successfully", "service_started"),
         "`web` が、`migrate` の終わる前"),  # it had ended by luck
        (GOOD.replace("exit 0", "exit 4"), "exit 4"),
        (GOOD.replace("  web:", "  page:"), "三つのまま"),
        (GOOD.replace("image: busybox:lab", "picture: x", 1), "no such key"),
        (GOOD.replace("stop_signal", "privileged: true\n    stop_signal", 1), "断られました"),
        (GOOD.replace("touch /ready", "true").replace("retries: 50", "retries: 2"), "unhealthy"),
    ])
    def test_hints(self, text, hint):
        verdict = check.gated(text)
        assert not verdict
        assert hint in verdict.message
