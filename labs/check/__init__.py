"""Exercises checked from the state of the kernel, with a hint that fits what the learner did.

An exercise is a generator with the decorator `exercise`. It yields pairs (is it so?, hint) in the order in
which a learner gets there; the first pair that is not so ends the check, and its hint is shown. Whatever
stands after a `yield` can rely on everything before it. What the generator returns is said on success.

    @exercise
    def zombie(pid: int) -> Steps:
        state = process.status(pid).state
        yield state == "Z", f"まだゾンビではありません（状態は `{state}` です）。"
        return "終了したのに wait されていない子です。"

`zombie(pid)` is then a `Verdict`, which a notebook shows as a box.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Generator
from typing import NamedTuple, ParamSpec, TypeAlias

Steps: TypeAlias = Generator[tuple[bool, str], None, str]
P = ParamSpec("P")

UNANSWERED = "まだ答えが入っていません。`...` のところを自分のコードに替えてから、もう一度実行してください。"


class Verdict(NamedTuple):
    """What a check found; true in an `if` when the exercise is solved.

    Attributes:
        passed: whether every step holds.
        message: on success what was shown by it, else the hint; one or more Japanese sentences.
    """

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{'合格' if self.passed else 'ヒント'}: {self.message}"

    def _repr_html_(self) -> str:
        kind, word = ("pass", "合格") if self.passed else ("hint", "ヒント")
        text = re.sub(r"`([^`]+)`|\*\*([^*]+)\*\*", _marked, html.escape(self.message))
        return f'<div class="labs-verdict {kind}"><p class="labs-verdict-title">{word}</p><p>{text}</p></div>'


def _marked(found: re.Match[str]) -> str:
    """Code where it stands in backquotes, else strong."""
    return f"<code>{found[1]}</code>" if found[1] else f"<strong>{found[2]}</strong>"


def exercise(steps: Callable[P, Steps]) -> Callable[P, Verdict]:
    """Turn a generator of (is it so?, hint) into a function that returns a `Verdict`."""

    @functools.wraps(steps)
    def check(*args: P.args, **kwargs: P.kwargs) -> Verdict:
        if any(value is None or value is ... for value in (*args, *kwargs.values())):
            return Verdict(False, UNANSWERED)
        try:
            return _walk(steps(*args, **kwargs))
        except OSError as error:
            return Verdict(False, _refused(error))

    return check


def _walk(steps: Steps) -> Verdict:
    """Take the steps in order; the generator's return value is the message of success."""
    while True:
        try:
            holds, hint = next(steps)
        except StopIteration as end:
            return Verdict(True, end.value or "")
        if not holds:
            return Verdict(False, hint)


def _refused(error: OSError) -> str:
    """Name what the check tried to read: most often a process or a file that has gone in the meantime."""
    where = f" `{error.filename}`" if error.filename else ""
    reason = f"確かめようとした{where} をカーネルから読めませんでした（{error.strerror}）。"
    return reason + "対象がもう消えていないか確かめてください。"
