"""One container of a project, from its first start to its removal: log, healthcheck, restart policy, stop.

It is run by bin/labs-runtime as any OCI runtime runs it; here is what stands around a runtime, in Docker the daemon
and its shim: the layers stacked by overlay, the two streams written down, the exit code, and what follows from it.
Health is Docker's HEALTHCHECK (Dockerfile reference), restarts are those of "Start containers automatically":
a wait of 100 ms that doubles up to a minute, and begins anew after ten seconds of running.
Everything here runs in the one event loop of the project's supervisor.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from labs import machine, mounts, process, syscalls
from labs.compose import signal_number
from labs.compose_forms import seconds
from labs.errors import LabError, Timeout

RUNTIME = str(Path(__file__).parent.parent / "bin/labs-runtime")
FIRST_WAIT, LONGEST_WAIT, STEADY = 0.1, 60.0, 10.0  # seconds
INTERVAL, TIMEOUT, RETRIES = 30.0, 30.0, 3  # of a healthcheck that does not say otherwise
LAST_LINES = 5.0  # seconds that what a container wrote has to arrive after its end
KILLED_LATE = 10.0  # seconds that the kernel has to end what got SIGKILL
PIECE = 1 << 14  # bytes of a line that are written down at once, as Docker has it


class StartFailed(LabError):
    """The runtime could not start a container; ``detail`` is its message."""

    code = 127

    def __init__(self, name: str, detail: str) -> None:
        self.name, self.detail = name, detail
        super().__init__(f"{name}: cannot start: {detail}")


class Spec(NamedTuple):
    """What a container is made from.

    Attributes:
        name, project, service, number, hash: who it is.
        layers: directories of its image, the lowest first.
        restart: "no", "always", "unless-stopped" or "on-failure", maybe with ":" and a number of times.
        healthcheck: as compose has it, or None.
        stop_signal: a name such as "SIGTERM".  grace: seconds until SIGKILL follows.
        labels: those of compose.labels.
    """

    name: str
    project: str
    service: str
    number: int
    hash: str
    layers: tuple[str, ...]
    restart: str
    healthcheck: Mapping[str, Any] | None
    stop_signal: str
    grace: float
    labels: Mapping[str, str]


class State(NamedTuple):
    """What a container is at the moment.

    Attributes:
        status: "created", "running", "restarting" or "exited".
        pid: of its process 1 outside, 0 without.
        exit_code: of the last run; 128 and the number of a signal.
        health: "" (none is asked for), "starting", "healthy" or "unhealthy".
        restarts: how many times its policy has started it again.
        started, finished: seconds since the epoch, 0.0 for never.
        networks: network → address.
    """

    name: str
    service: str
    number: int
    hash: str
    status: str = "created"
    pid: int = 0
    exit_code: int = 0
    health: str = ""
    restarts: int = 0
    started: float = 0.0
    finished: float = 0.0
    networks: Mapping[str, str] = {}


class Unit:
    """A container; ``folder`` holds its bundle, its upper directory and its log."""

    def __init__(self, spec: Spec, folder: str, changed: Callable[[Unit, str], object]) -> None:
        self.spec, self.folder, self._changed = spec, folder, changed
        self.state = State(spec.name, spec.service, spec.number, spec.hash)
        self.undo = ExitStack()
        self.stopped = False  # by somebody's wish: no policy starts it again
        self._stop_signal = signal_number(spec.stop_signal)
        self._life: asyncio.Task[None] | None = None
        self._run: asyncio.subprocess.Process | None = None
        self._pidfd = -1
        self._news = asyncio.Event()

    @property
    def rootfs(self) -> str:
        """Where its layers are mounted."""
        return f"{self.folder}/rootfs"

    def prepare(self) -> None:
        """Make its directories and mount its layers, an empty upper one over them (overlayfs.rst)."""
        for name in ("upper", "work", "rootfs"):
            os.makedirs(f"{self.folder}/{name}")
        self.undo.callback(machine.remove_tree, self.folder)
        self.undo.enter_context(mounts.overlay(self.spec.layers[::-1], f"{self.folder}/upper", f"{self.folder}/work",
                                               self.rootfs))
        os.chmod(f"{self.folder}/upper", 0o755)  # noqa: S103  the root directory of a container

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write its config.json."""
        Path(self.folder, "config.json").write_text(json.dumps(config), encoding="utf-8")

    async def start(self) -> None:
        """Start it and return once it runs, or has run; tries of its policy count anew.  Raises StartFailed."""
        if self._life and not self._life.done():
            return
        self.stopped, self.state = False, self.state._replace(status="created", restarts=0)
        self._life = asyncio.create_task(self._live())
        running = asyncio.create_task(self.until(lambda state: state.status in ("running", "exited")))
        await asyncio.wait([self._life, running], return_when=asyncio.FIRST_COMPLETED)
        if self._life.done():
            running.cancel()
            self._life.result()

    async def until(self, condition: Callable[[State], object], timeout: float | None = None) -> None:
        """Wait until the state fulfils a condition."""
        async def wait() -> None:
            while not condition(self.state):
                self._news.clear()
                await self._news.wait()
        await asyncio.wait_for(wait(), timeout)

    def _set(self, what: str, **fields: Any) -> None:
        self.state = self.state._replace(**fields)
        self._news.set()
        self._changed(self, what)

    async def _live(self) -> None:
        """Run it, and again as its policy says.  Raises StartFailed if it cannot be started the first time."""
        pause = FIRST_WAIT
        while True:
            began = time.monotonic()
            try:
                code = await self._run_once()
            except StartFailed as problem:
                if self.state.status == "created":
                    raise
                self._set("exited", status="exited", exit_code=problem.code)
                return
            if self.stopped or not self._again(code):
                self._set("exited", status="exited")
                return
            pause = FIRST_WAIT if time.monotonic() - began >= STEADY else pause
            self._set("restarting", status="restarting")
            with suppress(TimeoutError):
                await self.until(lambda state: self.stopped, pause)
            pause = min(2 * pause, LONGEST_WAIT)
            if self.stopped:
                self._set("exited", status="exited")
                return
            self.state = self.state._replace(restarts=self.state.restarts + 1)

    def _again(self, code: int) -> bool:
        policy, _, times = self.spec.restart.partition(":")
        if policy == "on-failure":
            return code != 0 and (not times or self.state.restarts < int(times))
        return policy in ("always", "unless-stopped")

    async def _run_once(self) -> int:
        """One run of the container, its exit code; 128 and the number of the signal that ended it."""
        pid_file = f"{self.folder}/pid"
        with suppress(FileNotFoundError):
            os.unlink(pid_file)
        run = self._run = await asyncio.create_subprocess_exec(
            *self._runtime("run", "--bundle", self.folder, "--pid-file", pid_file), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, preexec_fn=_end_with_parent)
        pumps = [asyncio.create_task(self._pump(name, stream))
                 for name, stream in (("stdout", run.stdout), ("stderr", run.stderr)) if stream]
        probes: list[asyncio.Task[None]] = []
        try:
            began = await self._appears(pid_file)
            if began:
                self._began(int(Path(pid_file).read_text(encoding="ascii")))
            probes += [asyncio.create_task(self._probe())] if self._has_probe() else []
            code = await run.wait()
            await asyncio.wait(pumps, timeout=LAST_LINES)
        finally:
            for task in (*pumps, *probes):
                task.cancel()
            await asyncio.gather(*pumps, *probes, return_exceptions=True)
        if not began:
            raise StartFailed(self.spec.name, self.last_words() or f"the runtime ended with {code}")
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        code = 128 - code if code < 0 else code
        self._set("died", pid=0, exit_code=code, finished=time.time(), health="")
        return code

    def _began(self, pid: int) -> None:
        with suppress(ProcessLookupError):  # it has ended already
            self._pidfd = os.pidfd_open(pid)
        self._set("started", status="running", pid=pid, started=time.time(), exit_code=0,
                  health="starting" if self._has_probe() else "")

    def _runtime(self, command: str, *words: str) -> list[str]:
        return [RUNTIME, "--root", f"{self.folder}/state", command, *words, machine.PREFIX + self.spec.name]

    async def _appears(self, path: str) -> bool:
        """Wait until process 1 has called execve(2), and hears signals; False if the runtime ended before it was there.

        Until then its command line is that of the runtime, whose copy it is: proc_pid_cmdline(5).
        """
        while self._run and self._run.returncode is None:
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pid = int(Path(path).read_text(encoding="ascii"))
                if process.cmdline(pid) != process.cmdline(self._run.pid):
                    return True
            await asyncio.sleep(0.01)
        return os.path.exists(path)

    # Log

    async def _pump(self, name: str, stream: asyncio.StreamReader) -> None:
        """Write every line down with its stream and its time, as Docker's json-file does."""
        with open(f"{self.folder}/log", "a", encoding="utf-8") as log:
            async for line in _lines(stream):
                text = line.decode(errors="replace")
                log.write(json.dumps({"time": time.time(), "stream": name, "text": text}) + "\n")
                log.flush()

    def last_words(self) -> str:
        """The last line of its standard error."""
        with suppress(FileNotFoundError), open(f"{self.folder}/log", encoding="utf-8") as log:
            rows = [json.loads(line) for line in log]
            return next((str(row["text"]) for row in reversed(rows) if row["stream"] == "stderr"), "")
        return ""

    # Health

    def _has_probe(self) -> bool:
        check = self.spec.healthcheck or {}
        return bool(check.get("test")) and check["test"][0] != "NONE" and not check.get("disable")

    async def _probe(self) -> None:
        """Ask every interval; retries failures in a row after start_period make it unhealthy, one success healthy."""
        check = dict(self.spec.healthcheck or {})
        kind, *words = check["test"]
        words = ["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else words
        interval, timeout, grace = (seconds(check.get(key, "0s")) for key in ("interval", "timeout", "start_period"))
        interval, timeout, retries = interval or INTERVAL, timeout or TIMEOUT, check.get("retries") or RETRIES
        failures, began = 0, time.monotonic()
        while True:
            await asyncio.sleep(interval)
            try:
                code = (await self.execute(words, timeout=timeout))[0]
            except TimeoutError:
                code = -1
            if self.state.status != "running":
                return
            counts = time.monotonic() - began >= grace or self.state.health == "healthy"
            failures = 0 if code == 0 else failures + counts
            health = "healthy" if code == 0 else "unhealthy" if failures >= retries \
                else self.state.health
            if health != self.state.health:
                self._set(health, health=health)

    async def execute(self, argv: Sequence[str], env: Mapping[str, str] | None = None,
                      timeout: float | None = None) -> tuple[int, str, str]:
        """Run a command in it, as labs-runtime exec does: exit code, standard output and error.

        Raises TimeoutError after that many seconds; the command is killed then.
        """
        words = [part for key, value in (env or {}).items() for part in ("--env", f"{key}={value}")]
        run = await asyncio.create_subprocess_exec(
            *self._runtime("exec", *words), *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, preexec_fn=_end_with_parent)
        try:
            out, err = await asyncio.wait_for(run.communicate(), timeout)
        finally:
            if run.returncode is None:
                await _end(run)
        return run.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")

    # End

    async def kill(self, number: int) -> None:
        """Send a signal to its process 1 (pidfd_send_signal(2)); nothing if it does not run."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                process.kill(self._pidfd, number)

    async def stop(self, grace: float | None = None) -> None:
        """Its stop signal, and SIGKILL after the grace period (seconds; None: its own).  A pause ends at once.

        Raises Timeout if the kernel does not end it.
        """
        self.stopped, life = True, self._life
        if not life or life.done():
            return
        self._news.set()
        there = asyncio.create_task(self.until(lambda state: self._pidfd >= 0))
        await asyncio.wait({life, there}, return_when=asyncio.FIRST_COMPLETED)
        there.cancel()
        await self.kill(self._stop_signal)
        for patience in (self.spec.grace if grace is None else grace, KILLED_LATE):
            await asyncio.wait({life}, timeout=patience)
            if life.done():
                return
            await self.kill(signal.SIGKILL)
        raise Timeout(f"the end of {self.spec.name}", KILLED_LATE)

    async def remove(self) -> None:
        """Stop it and take away all that it had."""
        await self.stop()
        self.undo.close()
        self._set("removed", status="removed")


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Every line without its end; one that is longer than PIECE comes in pieces, so that nobody waits for its end."""
    rest = b""
    while data := await stream.read(PIECE):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
        while len(rest) > PIECE:
            yield rest[:PIECE]
            rest = rest[PIECE:]
    if rest:
        yield rest


async def _end(run: asyncio.subprocess.Process) -> None:
    """Kill `labs-runtime exec` and the command in the container, which is its child."""
    for pid in process.children(run.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        run.kill()
    await run.wait()


def _end_with_parent() -> None:
    """Nothing outlives the supervisor: PR_SET_PDEATHSIG(2const)."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
