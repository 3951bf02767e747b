"""The frame around exercises: order of hints, boxes, and what happens to odd answers."""

import os
import subprocess

import pytest

from labs import check
from labs.check import container


@check.exercise
def even(number):
    """A number that is even and small."""
    yield number % 2 == 0, "奇数です。"
    yield number < 10, f"`{number}` は大きすぎます。"
    return "できました。"


@check.exercise
def readable(path):
    with open(path) as file:
        yield bool(file.read()), "空です。"
    return ""


@pytest.mark.parametrize(
    ("answer", "passed", "message"),
    [
        (3, False, "奇数です。"),
        (13, False, "奇数です。"),
        (12, False, "`12` は大きすぎます。"),
        (4, True, "できました。"),
    ],
)
def test_the_first_step_that_fails_gives_the_hint(answer, passed, message):
    verdict = even(answer)
    assert verdict == (passed, message)
    assert bool(verdict) is passed


def test_the_words_of_a_box():
    assert repr(even(4)) == "合格: できました。"
    assert repr(even(3)) == "ヒント: 奇数です。"


def test_the_box_is_html_with_its_class_and_code_marked():
    assert 'class="labs-verdict hint"' in even(12)._repr_html_()
    assert "<code>12</code>" in even(12)._repr_html_()
    assert 'class="labs-verdict pass"' in even(4)._repr_html_()
    assert "<strong>so</strong>, <code>**a, **b</code>" in check.Verdict(False, "**so**, `**a, **b`")._repr_html_()
    assert "&lt;b&gt;" in check.Verdict(False, "<b>")._repr_html_()


@pytest.mark.parametrize("nothing", [None, ...])
def test_an_empty_answer_is_not_a_pass(nothing):
    assert even(nothing) == (False, check.UNANSWERED)
    assert even(number=nothing) == (False, check.UNANSWERED)


def test_what_the_kernel_no_longer_has_is_a_hint():
    verdict = readable("/nowhere")
    assert not verdict
    assert "/nowhere" in verdict.message


def test_a_broken_check_is_not_hidden():
    with pytest.raises(TypeError):
        even("four")


def test_an_exercise_keeps_its_name_and_docstring():
    assert even.__name__ == "even"
    assert "small" in even.__doc__


def test_zombie_reacts_to_what_was_done():
    with subprocess.Popen(["sleep", "300"]) as child:
        assert "まだ動いています" in container.zombie(child.pid).message
        os.kill(child.pid, 19)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        assert "止まっている" in container.zombie(child.pid).message
        os.kill(child.pid, 9)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert container.zombie(child.pid).passed
    assert "もうありません" in container.zombie(child.pid).message
    assert "子ではありません" in container.zombie(1).message
