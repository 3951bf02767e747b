"""A pytest plugin (`-p tests.share`): runs the files that somebody outside hands out, one after the other.

Whenever it is free it writes a line to standard error, FREE and a JSON list of the files it has collected and not run;
the answer on standard input is one of them, or an empty line: that is the end. So several machines share one suite, and
nothing that was collected can be forgotten. `./lab test` is the other side: vm/suite.py.
"""

import itertools
import json
import os

import pytest

FREE = "\x1efree "
# pytest puts other files in the place of 0 and 2 before the first test
ANSWERS, QUESTIONS = os.fdopen(os.dup(0)), os.fdopen(os.dup(2), "w")


def pytest_itemcollected(item: pytest.Item) -> None:
    """A cell of the book belongs to the lab machine, whatever it asks for: the reader runs it there."""
    if item.path.suffix == ".ipynb":
        item.add_marker("machine")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Run what is handed out; each file begins and ends as if it were the only one."""
    if session.testsfailed:
        raise session.Interrupted(f"{session.testsfailed} errors while collecting")
    files = {name: list(items) for name, items in itertools.groupby(session.items, _file)}
    while name := _ask(list(files)):
        items = files.pop(name)
        for item, following in itertools.zip_longest(items, items[1:]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell a failure at once: pytest's own summary comes at the end, and a run may be cut short before it."""
    if report.failed:
        print(f"✗ {report.nodeid} ({report.when})\n{report.longreprtext}", file=QUESTIONS, flush=True)


def _file(item: pytest.Item) -> str:
    return str(item.path.relative_to(item.config.rootpath))


def _ask(offered: list[str]) -> str:
    print(f"{FREE}{json.dumps(offered)}", file=QUESTIONS, flush=True)
    return ANSWERS.readline().strip()
