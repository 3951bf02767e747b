"""The jobs behind `./lab`, one function a verb. Standard library only: it runs before anything is installed."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from vm import labvm, qemu, suite, vagrant
from vm.guest import GUEST_PYTHON, GUEST_REPO, UP, Guest, backend, fresh_guest, running_guest
from vm.image import CACHE, NEED_DISK, NEED_MEMORY, REPO, as_root, key, memory_available
from vm.labvm import RUN
from vm.site import SITE, build_site
from vm.steps import LabError, run, step

# ── the verbs ────────────────────────────────────────────────────────────────────────────────────────────────────


def up(args: Sequence[str]) -> int:
    """A running lab: JupyterLab in the machine and the rendered book, both on 127.0.0.1 only."""
    _no_arguments("up", args)
    began = time.monotonic()
    jupyter, book = port("LAB_JUPYTER_PORT", 8888), port("LAB_BOOK_PORT", 8000)
    guest = running_guest()
    if guest is None:
        if backend() == "qemu":
            _require_free("LAB_JUPYTER_PORT", jupyter)
        if _book_server() is None:
            _require_free("LAB_BOOK_PORT", book)
        guest = _start_up(jupyter)
    build_site()
    if _book_server() is None:
        _require_free("LAB_BOOK_PORT", book)
        _serve_book(book)
    token = subprocess.run(
        [*guest.ssh, ". /etc/labs-jupyter.env && echo $JUPYTER_TOKEN"], capture_output=True, text=True, check=True
    ).stdout.strip()
    (RUN / "ports").write_text(f"{_kept_ports(jupyter, book)}\n")
    jupyter, book = map(int, (RUN / "ports").read_text().split())
    print(f"\n  the book       http://127.0.0.1:{book}/\n  JupyterLab     http://127.0.0.1:{jupyter}/lab?token={token}")
    print(f"\n  ready in {time.monotonic() - began:.0f} s; ./lab ssh opens a shell in the lab, ./lab down stops it")
    return 0


def _start_up(jupyter: int) -> Guest:
    (RUN / "ports").unlink(missing_ok=True)
    if backend() == "vagrant":
        return Guest.by_config(vagrant.start())
    guest = Guest(labvm.start(UP, {jupyter: 8888}).ssh())
    with step("the book into the machine"):
        guest.push()
        guest.call(f"{GUEST_PYTHON} -m jupyter trust {GUEST_REPO}/book/*/*.ipynb >/dev/null 2>&1")
    with step("JupyterLab answers"):
        _wait_http(f"http://127.0.0.1:{jupyter}/api", 120)
    return guest


def _kept_ports(jupyter: int, book: int) -> str:
    """Return the ports of the running lab: those it was started with, else these."""
    kept = RUN / "ports"
    return kept.read_text().strip() if kept.exists() else f"{jupyter} {book}"


def _wait_http(url: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise LabError(f"{url} did not answer within {timeout:.0f} s: {error}") from None
            time.sleep(0.5)


def _serve_book(book: int) -> None:
    argv = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(SITE), str(book)]
    with (RUN / "book.log").open("wb") as log:
        server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    (RUN / "book.pid").write_text(str(server.pid))
    _wait_http(f"http://127.0.0.1:{book}/", 30)


def _book_server() -> int | None:
    """Return the pid of the book's server when that process is still ours (its command line names our site)."""
    try:
        pid = int((RUN / "book.pid").read_text())
        return pid if str(SITE).encode() in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, ValueError):
        return None


def down(args: Sequence[str]) -> int:
    """Stop what `up` started; notebooks changed in JupyterLab are saved first."""
    _no_arguments("down", args)
    guest = running_guest()
    if guest and backend() == "qemu":
        target = RUN / "saved" / time.strftime("%Y%m%d-%H%M%S")
        changed = guest.pull(
            "find book -name '*.ipynb' -newer .pushed ! -path '*/.ipynb_checkpoints/*' -print0 | tar --null -T - -cf -",
            target,
        )
        if changed:
            print(f"  your changed notebooks: {target}")
        else:
            target.rmdir()
    stopped = vagrant.stop() if backend() == "vagrant" else labvm.stop(UP)
    pid = _book_server()
    if pid:
        os.kill(pid, signal.SIGTERM)
    for name in ("book.pid", "ports"):
        (RUN / name).unlink(missing_ok=True)
    print("  stopped" if stopped or pid else "  nothing was running")
    return 0


def test(paths: Sequence[str]) -> int:
    """Every test, or only those of `paths`; each on the machine it belongs to."""
    _require_paths(paths)
    return suite.test(paths)


def book(args: Sequence[str]) -> int:
    """Build the site, on any machine with Python."""
    _no_arguments("book", args)
    build_site()
    print(f"  {SITE / 'index.html'}")
    return 0


def record(paths: Sequence[str]) -> int:
    """Run notebooks in a clean lab machine from a fresh kernel, normalise them, and bring them back."""
    _require_paths(paths)
    wanted = list(paths) or sorted(
        str(p.relative_to(REPO)) for p in (REPO / "book").rglob("*.ipynb") if "_build" not in p.parts
    )
    with fresh_guest("record") as guest:
        for path in wanted:
            with step(f"record {path}"):
                command = f"cd {GUEST_REPO} && {GUEST_PYTHON} -m tests.lint.normalise --execute {shlex.quote(path)}"
                status = guest.call(command)
            if status:
                raise LabError(f"{path}: a cell failed; the stored notebook is as it was")
            guest.pull(f"tar -cf - {shlex.quote(path)}", REPO)
    return 0


def bench(args: Sequence[str]) -> int:
    """Run a benchmark of bench/ in a clean lab machine; --json FILE writes its rows."""
    args = list(args)
    target = None
    if "--json" in args:
        at = args.index("--json")
        if at + 1 == len(args):
            raise LabError("bench: --json: a file name must follow")
        target = Path(args[at + 1]).absolute()
        del args[at : at + 2]
    known = sorted(p.stem for p in (REPO / "bench").glob("*.py") if p.stem not in ("__init__", "table"))
    for name in args:
        if name not in known:
            raise LabError(f"bench: {name}: no such benchmark; there are: {', '.join(known)}")
    with fresh_guest("bench") as guest:
        for name in args or known:
            status = guest.call(f"cd {GUEST_REPO} && {GUEST_PYTHON} -m bench.{name} --json bench-{name}.json")
            if status:
                return status
            if target:
                guest.pull(f"tar -cf - bench-{name}.json", RUN)
                shutil.move(
                    RUN / f"bench-{name}.json", target if len(args) == 1 else target.with_name(f"{name}-{target.name}")
                )
    return 0


def ssh(args: Sequence[str]) -> int:
    """A root shell in the running lab, or one command there; its exit status is ours."""
    guest = running_guest()
    if guest is None:
        raise LabError("no lab runs: start one with ./lab up")
    if args:
        return guest.call(" ".join(args), terminal=sys.stdin.isatty())
    return guest.call(f"cd {GUEST_REPO} && exec bash -l", terminal=True)


def clean(args: Sequence[str]) -> int:
    """Remove what interrupted labs left in the running machine; with --all also machines, sites, images and caches."""
    if list(args) not in ([], ["--all"]):
        raise LabError(f"clean: {' '.join(args)}: takes nothing or --all")
    guest = running_guest()
    if not args:
        if guest is None:
            print("  no lab runs; every start is a clean machine")
            return 0
        program = "from labs import lab; print(*lab.clean() or ['nothing was left'], sep='\\n')"
        return guest.call(f"{GUEST_PYTHON} -c {shlex.quote(program)}")
    down([])
    for place in RUN.glob("*/vm.json"):
        labvm.stop(place.parent.name)
    for gone in (RUN, REPO / "book/_build", CACHE):
        if gone.exists():
            run([*as_root(), "rm", "-rf", "--one-file-system", gone], Path("/dev/null"))
            print(f"  removed {gone}")
    return 0


def doctor(args: Sequence[str]) -> int:
    """Say line by line what this machine has and lacks; exit status 1 where something is lacking."""
    _no_arguments("doctor", args)
    commands = {
        "qemu": [qemu.arch().qemu, "qemu-img", "mmdebstrap", "zstd", "mke2fs", "ssh", "ssh-keygen"],
        "vagrant": ["vagrant", "ssh"],
    }[backend()]
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    lacks = 0
    for command in ["python3", *commands, "shellcheck", "chromium"]:
        found = shutil.which(command, path=path)
        lacks += not found
        _line(bool(found), command, found or "missing: ./lab up or ./lab test installs it through apt")
    free, memory = shutil.disk_usage(CACHE if CACHE.exists() else Path.home()).free, memory_available()
    _line(
        free >= NEED_DISK,
        "disk",
        f"{free / 2**30:.1f} GiB free, {NEED_DISK >> 30} GiB needed to build the image",
    )
    _line(
        memory >= NEED_MEMORY,
        "memory",
        f"{memory / 2**30:.1f} GiB available, {NEED_MEMORY / 2**30:.1f} GiB needed",
    )
    _line(True, "machine", f"{platform.machine()}, {os.cpu_count()} CPUs, acceleration: {qemu.accelerator()}")
    if backend() == "qemu" and not lacks:
        place = CACHE / f"vm-{key()}"
        _line(True, "image", f"{place}" if place.exists() else "not built yet: the first ./lab up builds it")
    _line(True, "lab", "running" if running_guest() else "not running")
    return 1 if lacks or free < NEED_DISK or memory < NEED_MEMORY else 0


def _line(good: bool, name: str, text: str) -> None:
    print(f"{'✓' if good else '✗'} {name:<20} {text}")


def box(args: Sequence[str]) -> int:
    """Pack the lab machine as a Vagrant box with a catalogue file beside it."""
    _no_arguments("box", args)
    from vm import box as recipe

    catalogue = recipe.pack(REPO / ".lab/box")
    print(f"  LABS_BOX=read.container/lab LABS_BOX_URL=file://{catalogue} vagrant up --provider=libvirt")
    return 0


# ── what the verbs check ─────────────────────────────────────────────────────────────────────────────────────────


def port(variable: str, default: int) -> int:
    """Return the port an environment variable names; LabError unless it is 1024 to 65535."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise LabError(f"{variable}: {text}: must be a number from 1024 to 65535")
    return int(text)


def _require_free(variable: str, number: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", number))
        except OSError:
            raise LabError(
                f"{variable}: {number}: this port of 127.0.0.1 is in use; set {variable} to another"
            ) from None


def _require_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if not (REPO / path.partition("::")[0]).exists():
            raise LabError(f"{path}: no such file or directory in {REPO}")


def _no_arguments(verb: str, args: Sequence[str]) -> None:
    if args:
        raise LabError(f"{verb}: {args[0]}: takes no arguments")


VERBS = {f.__name__: f for f in (up, down, test, book, record, bench, ssh, doctor, clean, box)}


def main(argv: Sequence[str]) -> int:
    """Run one verb; return its exit status."""
    RUN.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return VERBS[argv[0]](argv[1:])
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nlab: interrupted; what was half-made is removed by the next run", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
