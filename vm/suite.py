"""`./lab test`: every test, each on the machine it belongs to.

The host's own tests (lint, site, vm) run in one lane. In the other the machine's image is built, then what asks for no
lab machine runs in its file system (vm/native.py). When a lane is done, a lab machine goes on in it with the rest: an
emulated machine keeps about one core busy, so two lanes keep two cores busy. The machines share the files of tests and
notebooks one by one: tests/share.py is their end of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from vm import steps
from vm.guest import GUEST_PYTHON, GUEST_REPO, backend, fresh_guest
from vm.image import CACHE, NEED_MEMORY, REPO, image, memory_available
from vm.native import native
from vm.site import build_site, environment
from vm.steps import LabError

# Minutes in a machine, though small files: given out last, one lane would run them alone.
LONG = ("tests/test_compose_three.py", "tests/test_microvm.py")
HOST_TESTS = ("tests/lint", "tests/site", "tests/vm")
FREE = "\x1efree "  # tests/share.py writes it before the files it has not run
# two machines of the suite, and the one that tests/vm starts for itself
MACHINES = 3


def test(paths: Sequence[str]) -> int:
    """Every test, or only those of `paths`; return an exit status. Ends in pytest's own closing lines."""
    began = time.monotonic()
    if not paths and backend() == "qemu" and (os.cpu_count() or 1) > 1 and memory_available() > MACHINES * NEED_MEMORY:
        status = _in_two_lanes()
    else:
        status = _one_after_the_other(paths or [*HOST_TESTS, "tests", "book"])
    print(f"  {time.monotonic() - began:.0f} s in all; exit status {status}", flush=True)
    return status


def _one_after_the_other(paths: Sequence[str]) -> int:
    on_host = [p for p in paths if p.startswith(HOST_TESTS)]
    in_guest = [p for p in paths if not p.startswith(HOST_TESTS)]
    status = 0
    if on_host:
        argv, env = _host_pytest(on_host)
        print(f"▸ on this machine: pytest {' '.join(on_host)}", flush=True)
        status = subprocess.run(argv, cwd=REPO, env=env).returncode
    if in_guest:
        with fresh_guest("test") as guest:
            print(f"▸ in the lab machine: pytest {' '.join(in_guest)}", flush=True)
            status = guest.call(_guest_pytest(*in_guest)) or status
    return status


def _host_pytest(paths: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment, made first where they are not there yet."""
    bin_ = environment("requirements.txt", "tests/requirements.txt")
    if any(p.startswith("tests/site") for p in paths):
        build_site(bin_)
    env = {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}", "LAB_CACHE": str(CACHE)}
    env.setdefault("LAB_PROSE_CACHE", str(CACHE / "prose"))
    return [str(bin_ / "python"), "-m", "pytest", "--durations=5", *paths], env


LEFT_OUT = [f"--ignore={path}" for path in HOST_TESTS]


def _guest_pytest(*arguments: str) -> str:
    book = "--nbval --nbval-current-env --nbval-sanitize-with book/nbval-sanitize.cfg --nbval-cell-timeout 600"
    words = shlex.join([*LEFT_OUT, *arguments])
    return f"cd {GUEST_REPO} && {GUEST_PYTHON} -m pytest --durations=25 {book} {words}"


# ── two lanes ────────────────────────────────────────────────────────────────────────────────────────────────────


class Handout:
    """Which file which machine runs; each is given out once, the long ones first."""

    def __init__(self, weight: Callable[[str], tuple[bool, int]]) -> None:
        self.weight, self.given, self.known = weight, set[str](), set[str]()
        self.lock = threading.Lock()

    def next(self, offered: Sequence[str]) -> str:
        """Return one of the files a machine could run that nobody has, or "" where there is none."""
        with self.lock:
            self.known.update(offered)
            path = max((p for p in offered if p not in self.given), key=self.weight, default="")
            self.given.add(path)
            return path

    def left(self) -> list[str]:
        """Return the files that nobody was given."""
        return sorted(self.known - self.given)


def _weight(path: str) -> tuple[bool, int]:
    """Notebooks and LONG first, then by size: the nearest thing to the time a file takes that needs no keeping."""
    return path.endswith(".ipynb") or path in LONG, (REPO / path).stat().st_size


class Rest(NamedTuple):
    """What is left for the lab machines: pytest's arguments, and bytecode (a tar file) that spares them compiling."""

    arguments: list[str]
    bytecode: bytes


class Lanes:
    """The commands that run now, so that all end when one lane breaks or somebody interrupts."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[str]] = []
        self.print_lock = threading.Lock()
        self.ended = False

    def say(self, text: str) -> None:
        """Print whole lines: two lanes speak at once."""
        with self.print_lock:
            sys.stdout.write(text)
            sys.stdout.flush()

    @contextlib.contextmanager
    def command(self, argv: Sequence[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
        """Start a command whose output is ours, line by line; kill it if the block is left early."""
        self.require_going_on()
        with subprocess.Popen(
            argv,
            cwd=REPO,
            text=True,
            bufsize=1,
            errors="replace",
            stdout=subprocess.PIPE,
            start_new_session=True,
            **how,
        ) as process:
            self.running.append(process)
            try:
                yield process
            except BaseException:
                _kill(process)
                raise

    def require_going_on(self) -> None:
        """Raise LabError after `end`."""
        if self.ended:
            raise LabError("test: ended because the other lane broke")

    def end(self) -> None:
        """End every command, and each that a lane would begin: the lanes then end by themselves."""
        self.ended = True
        for process in self.running:
            _kill(process)

    def host(self, *paths: str) -> int:
        """Run tests of the host's own."""
        argv, env = _host_pytest(paths)
        self.say(f"▸ on this machine: pytest {' '.join(paths)}\n")
        return self.tell(argv, env=env, stdin=subprocess.DEVNULL)

    def natively(self) -> tuple[int, Rest]:
        """Run on this machine's kernel what needs no more; return the status, and what is left."""
        with native(image()) as place:
            if place is None:
                return 0, Rest(["tests", "book"], b"")
            files, bytecode = place.collect(*LEFT_OUT, "tests")
            self.say("▸ in the lab's file system on this kernel: pytest -m 'not machine' tests\n")
            argv = place.command("python", "-m", "pytest", "--durations=10", *LEFT_OUT, "-m", "not machine", "tests")
            with place.tree.open("rb") as tree:
                return self.tell(argv, stdin=tree), Rest(["-m", "machine", *files, "book"], bytecode)

    def tell(self, argv: Sequence[str], **how: Any) -> int:
        """Run a command and print what it prints."""
        with self.command(argv, stderr=subprocess.STDOUT, **how) as process:
            for line in process.stdout or ():
                self.say(line)
        return process.returncode

    def guest(self, number: int, handout: Handout, rest: Rest) -> int:
        """Run in a machine of its own what `handout` gives it."""
        self.require_going_on()  # before a machine is started
        with fresh_guest(f"test{number}") as guest:
            if rest.bytecode:
                subprocess.run([*guest.ssh, f"tar -C {GUEST_REPO} -xf -"], input=rest.bytecode, check=True)
            self.say(f"▸ in lab machine {number}: the machine's tests, and the book\n")
            return self.share(number, [*guest.ssh, _guest_pytest("-p", "tests.share", *rest.arguments)], handout)

    def share(self, number: int, argv: Sequence[str], handout: Handout) -> int:
        """Run one pytest with tests/share.py and answer it; what it says at its end is printed in one piece."""
        last, ending = threading.Event(), [f"▸ lab machine {number} ends\n"]
        with self.command(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            answers = threading.Thread(target=self._answer, args=(process, number, handout, last))
            answers.start()
            for line in process.stdout or ():
                if last.is_set():
                    ending.append(line)
                else:
                    self.say(line)
            answers.join()
        self.say("".join(ending))
        return process.returncode

    def _answer(self, process: subprocess.Popen[str], number: int, handout: Handout, last: threading.Event) -> None:
        """Answer each line that asks for a file, and say how long the one before took; print every other line."""
        path, began = "", time.monotonic()
        for line in process.stderr or ():
            if not line.startswith(FREE):
                self.say(line)
                continue
            if path:
                self.say(f"  {path}: {time.monotonic() - began:.0f} s in lab machine {number}\n")
            path, began = handout.next(json.loads(line.removeprefix(FREE))), time.monotonic()
            if not path:
                last.set()
            with contextlib.suppress(BrokenPipeError):  # it ended meanwhile: its status says so
                print(path, file=process.stdin, flush=True)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a command and what it started: a test of the image has a package manager below it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _in_two_lanes() -> int:
    steps.MOVING = False
    lanes, handout = Lanes(), Handout(_weight)

    def host() -> int:
        status = lanes.host("tests/lint", "tests/site")
        image()  # the other lane may still be building it
        return lanes.host("tests/vm") or status

    def guest(number: int) -> int:
        return lanes.guest(number, handout, natively.result()[1])

    with ThreadPoolExecutor(2) as pool:
        natively = pool.submit(lanes.natively)
        others = [pool.submit(host), pool.submit(guest, 1), pool.submit(guest, 2)]
        everything: list[Future[Any]] = [natively, *others]
        try:
            for future in as_completed(everything):
                future.result()
        except BaseException:
            lanes.end()
            raise
    if left := handout.left():
        raise LabError(f"test: {' '.join(left)}: no machine ran it")
    return next(filter(None, [natively.result()[0], *(other.result() for other in others)]), 0)
