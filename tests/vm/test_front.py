"""`./lab` from outside: bad input is one clear line and an exit status, and `up` to `down` works in a fresh clone."""

import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request

import pytest

from vm import front
from vm.guest import LEFT_OUT
from vm.image import REPO
from vm.qemu import free_port

BENCHMARKS = sorted(p.stem for p in (REPO / "bench").glob("[a-z]*.py") if p.stem != "table")


def lab(*args, cwd=REPO, **env):
    return subprocess.run(
        [cwd / "lab", *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_help_lists_every_verb_with_an_example():
    for args in ([], ["help"], ["--help"]):
        done = lab(*args)
        assert done.returncode == 0
        listed = re.findall(r"^  (\w+) .*\S  +(?:\./lab \w+.*|)$", done.stdout, re.MULTILINE)
        assert {*listed, "help"} == {*front.VERBS, "help"}


@pytest.mark.parametrize(
    ("args", "env", "status", "line"),
    [
        (["frobnicate"], {}, 2, "lab: frobnicate: no such verb; ./lab help lists them"),
        (["up"], {"LAB_BACKEND": "docker"}, 2, "lab: LAB_BACKEND: docker: must be qemu or vagrant"),
        (["up"], {"LAB_JUPYTER_PORT": "http"}, 1, "lab: LAB_JUPYTER_PORT: http: must be a number from 1024 to 65535"),
        (["up"], {"LAB_BOOK_PORT": "80"}, 1, "lab: LAB_BOOK_PORT: 80: must be a number from 1024 to 65535"),
        (["up", "now"], {}, 1, "lab: up: now: takes no arguments"),
        (["test", "tests/none.py"], {}, 1, f"lab: tests/none.py: no such file or directory in {REPO}"),
        (["record", "book/none.ipynb"], {}, 1, f"lab: book/none.ipynb: no such file or directory in {REPO}"),
        (["bench", "none"], {}, 1, f"lab: bench: none: no such benchmark; there are: {', '.join(BENCHMARKS)}"),
        (["bench", "--json"], {}, 1, "lab: bench: --json: a file name must follow"),
        (["clean", "--most"], {}, 1, "lab: clean: --most: takes nothing or --all"),
    ],
)
def test_bad_input_is_one_line(args, env, status, line):
    done = lab(*args, **env)
    assert (done.returncode, done.stderr.strip()) == (status, line)


def test_without_root_sudo_or_a_package_it_says_what_is_missing(tmp_path):
    """A path with a shell and little else: the missing packages are named, nothing is tried."""
    for name in ("sh", "cat", "dirname", "uname", "id", "find", "head"):
        (tmp_path / name).symlink_to(shutil.which(name))
    (tmp_path / "id").unlink()
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    done = lab("book", PATH=str(tmp_path))
    assert done.returncode == 1
    assert re.match(
        r"lab: missing packages:.* python3.* \(no root and no sudo here: ask for: apt-get install .*python3",
        done.stderr,
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A fresh clone with its own state, whatever lab runs in this one."""
    place = tmp_path_factory.mktemp("clone") / "book with a space"
    shutil.copytree(REPO, place, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return place


@pytest.fixture(scope="module")
def ports():
    return {"LAB_JUPYTER_PORT": str(free_port()), "LAB_BOOK_PORT": str(free_port())}


def test_a_busy_port_is_named_and_nothing_is_started(clone, ports):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(ports["LAB_BOOK_PORT"])))
        taken.listen()
        done = lab("up", cwd=clone, **ports)
    assert done.returncode == 1
    assert f"lab: LAB_BOOK_PORT: {ports['LAB_BOOK_PORT']}: this port of 127.0.0.1 is in use" in done.stderr
    assert "not running" in lab("doctor", cwd=clone).stdout


def test_from_up_to_down(clone, ports):
    try:
        done = lab("up", cwd=clone, **ports)
        assert done.returncode == 0, done.stdout + done.stderr
        book, jupyter = re.findall(r"http://\S+", done.stdout)
        assert "コンテナ" in urllib.request.urlopen(book, timeout=30).read().decode()
        assert urllib.request.urlopen(jupyter, timeout=60).status == 200
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(jupyter.partition("/lab")[0] + "/api/contents", timeout=60)

        again = lab("up", cwd=clone, **ports)
        assert again.returncode == 0 and re.findall(r"http://\S+", again.stdout) == [book, jupyter]
        assert "restore" not in again.stdout

        assert lab("ssh", "ls /lab/book/01-container/01-process.ipynb && exit 7", cwd=clone).returncode == 7
        left = lab("ssh", "mkdir -p /sys/fs/cgroup/labs/labs-c-000000", cwd=clone)
        assert left.returncode == 0, left.stderr
        assert lab("clean", cwd=clone).returncode == 0
        assert lab("ssh", "test ! -e /sys/fs/cgroup/labs/labs-c-000000", cwd=clone).returncode == 0

        assert lab("ssh", "sleep 1; echo >>/lab/book/01-container/01-process.ipynb", cwd=clone).returncode == 0
        down = lab("down", cwd=clone)
        saved = re.search(r"your changed notebooks: (.*)", down.stdout)
        assert saved and os.listdir(f"{saved[1]}/book/01-container") == ["01-process.ipynb"]
    finally:
        lab("down", cwd=clone)
    for port in ports.values():
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", int(port))) != 0
    assert lab("ssh", "true", cwd=clone).stderr == "lab: no lab runs: start one with ./lab up\n"
