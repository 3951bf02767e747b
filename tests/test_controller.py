"""The controller in miniature, beside `docker ps`."""

import subprocess
import time

import pytest

from labs import controller, errors

pytestmark = pytest.mark.machine


def listed():
    words = ["docker", "ps", "--filter", f"label={controller.LABEL}", "--format", "{{.Names}}"]
    return {name.removeprefix(controller.PREFIX) for name in
            subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    controller.reconcile(())
    assert listed() == set()


def test_what_is_missing_is_started_and_what_is_too_much_removed():
    assert controller.reconcile({"a", "b"}) == (["a", "b"], [])
    assert listed() == controller.observed() == {"a", "b"}
    assert controller.reconcile({"a", "b"}) == ([], [])
    assert controller.reconcile({"b", "c"}) == (["c"], ["a"])
    assert listed() == {"b", "c"}


def test_news_are_of_the_time_that_is_asked_for():
    controller.reconcile({"a", "b"})
    before = time.time()
    controller.remove("a")
    between = time.time()
    controller.remove("b")
    assert controller.news(before, between) == ["a"]
    assert controller.news(between, time.time()) == ["b"]


def test_what_docker_refuses_is_one_line():
    with pytest.raises(errors.BadInput, match="No such container"):
        controller.remove("gone")
