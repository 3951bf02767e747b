"""A pytest plugin: whatever a test, a module or a notebook leaves on the lab machine is an error of its own.

Processes, mounts, cgroups, namespaces, links and files are compared around every test; nftables rules and what
Docker and Podman hold (slow to ask for) around every module and every notebook, whose kernel is shut down first.
The error stands in the teardown of the test, or of the last one of the module or notebook.
On a machine that is no lab nothing is watched.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from labs import lab, machine, process
from labs.errors import Timeout

IN_LAB = Path(machine.MARKER).exists()
# Notebooks whose cells are being run: the file's node → the machine before its first cell.
_before: dict[pytest.Collector, lab.Snapshot] = {}
# The full state after the last module or notebook, if it was clean: the next one begins with it.
_known: list[lab.Snapshot] = []
# The state after the last test, if nothing was set up since: the next test begins with it.
_settled: list[lab.Snapshot] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one setting."""
    parser.addini("leak_deadline", "seconds that a test's processes have to end after it", default="30")


@pytest.fixture(autouse=True, scope="module")
def module_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare the whole machine around a test module, its own fixtures included."""
    if not _watched(request.path):
        yield
        return
    before = _begin()
    yield
    _finish(before, request.config)


@pytest.fixture(autouse=True)
def test_leaves_nothing(request: pytest.FixtureRequest, module_leaves_nothing: None) -> Iterator[None]:
    """Compare what is cheap to ask for around a test; fixtures of a wider scope belong to what was before."""
    if not _watched(request.path):
        yield
        return
    before = _settled.pop() if _settled else lab.snapshot()
    yield
    _settled[:] = [_settle(before, request.config, full=False)]


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """What a fixture of a wider scope makes between two tests is neither's leak."""
    if fixturedef.scope != "function":
        _settled.clear()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Before the first cell of a notebook, and before its kernel is started."""
    if _is_cell(item) and item.parent not in _before:
        _before[item.parent] = _begin()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """After the last cell of a notebook, when its kernel is gone."""
    result = yield
    if item.parent in _before and (nextitem is None or nextitem.parent is not item.parent):
        _finish(_before.pop(item.parent), item.config)
    return result


def _watched(path: Path) -> bool:
    """tests/lint and tests/site run on any machine and change none."""
    return IN_LAB and not {"lint", "site"} & set(path.parent.parts[-2:])


def _is_cell(item: pytest.Item) -> bool:
    return IN_LAB and item.path.suffix == ".ipynb"


def _begin() -> lab.Snapshot:
    return _known.pop() if _known else lab.snapshot(full=True)


def _finish(before: lab.Snapshot, config: pytest.Config) -> None:
    _settle(before, config, full=True)
    _known.append(before)


def _settle(before: lab.Snapshot, config: pytest.Config, *, full: bool) -> lab.Snapshot:
    """Wait until the machine is as it was, and return what it is then; fail with what is different.

    After a single test only what is new counts: it may end what a fixture of its module began.
    """
    seen = [before]

    def changes() -> list[str]:
        seen[0] = lab.snapshot(full)
        found = before.diff(seen[0])
        return found if full else [line for line in found if line.startswith("+")]

    with suppress(Timeout):
        process.until(lambda: not changes(), float(config.getini("leak_deadline")))
        return seen[0]
    if left := changes():
        pytest.fail("left behind:\n" + "\n".join(left), pytrace=False)
    return seen[0]
