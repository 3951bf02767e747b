"""One container's life on the real kernel, without a supervisor: what is asked of Unit is asked of the kernel too."""

import asyncio
import json
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from labs import compose_bundle, compose_unit, machine, mounts, process
from labs.compose_unit import Spec, StartFailed, Unit

READY = "echo ready; while true; do sleep 0.05; done"


class Life:
    """A unit, and what has happened to it so far."""

    def __init__(self, unit):
        self.unit, self.events = unit, unit_events(unit)

    def __getattr__(self, name):
        return getattr(self.unit, name)

    def log(self):
        path = Path(self.folder, "log")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def text(self, stream="stdout"):
        return [row["text"] for row in self.log() if row["stream"] == stream]

    async def says(self, word):
        await self.soon(lambda: word in self.text())

    async def soon(self, condition, seconds=20.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.state, self.events, self.log())
            await asyncio.sleep(0.02)

    async def ends(self):
        await self.until(lambda state: state.status == "exited", 20.0)


def unit_events(unit):
    seen = []
    unit._changed = lambda _, what: seen.append((what, time.monotonic()))
    return seen


@pytest.fixture
def life():
    """An event loop's block with a container that is removed at its end, whatever happens."""
    @asynccontextmanager
    async def inner(*argv, restart="no", healthcheck=None, stop_signal="SIGTERM", grace=0.3, root="busybox", env=None):
        name = f"unit-{os.urandom(3).hex()}"
        folder = f"{machine.STATE}/labs-{name}"
        spec = Spec(name, "unit", "a", 1, "0" * 64, (machine.rootfs(root),), restart, healthcheck, stop_signal, grace,
                    {})
        unit = Unit(spec, folder, lambda unit, what: None)
        found = Life(unit)
        try:
            unit.prepare()
            config = compose_bundle.configuration({"command": list(argv), "environment": env or {}}, {}, name=name,
                                                  rootfs=unit.rootfs, netns="")
            config["linux"]["namespaces"][-1] = {"type": "network"}
            unit.configure(config)
            yield found
        finally:
            try:
                await unit.remove()
            finally:  # what a wrong stop leaves would be every later test's
                await unit.kill(signal.SIGKILL)
                await asyncio.wait({unit._life or asyncio.create_task(asyncio.sleep(0))}, timeout=5)
                unit.undo.close()
        assert not os.path.exists(folder)
        assert not [row for row in mounts.table() if row.target.startswith(folder)]

    return inner


def run(body):
    """Run a test's coroutine; a task that fails unheard is a failure of the test."""
    unheard = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
        await body()

    asyncio.run(main())
    assert not unheard


def test_from_created_to_exited(life):
    async def body():
        async with life("sh", "-c", "read x; exit 3") as one:
            assert (one.state.status, one.state.started) == ("created", 0.0)
            await one.start()
            await one.ends()
            assert (one.state.status, one.state.exit_code, one.state.pid, one.state.restarts) == ("exited", 3, 0, 0)
            assert time.time() - 60 < one.state.started <= one.state.finished <= time.time()
            assert [what for what, _ in one.events] == ["started", "died", "exited"]

    run(body)


@pytest.mark.parametrize("root", ["busybox", "debian"])
def test_the_kernel_knows_the_process(life, root):
    async def body():
        async with life("sleep", "1000", stop_signal="SIGKILL", root=root) as one:
            await one.start()
            await one.soon(lambda: process.cmdline(one.state.pid) == ["sleep", "1000"])
            pid = one.state.pid
            assert process.status(pid).nspid == (pid, 1)
            assert mounts.root(mounts.table(pid)).fstype == "overlay"
            for kind in ("pid", "net", "mnt", "uts", "ipc"):
                assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        assert not os.path.exists(f"/proc/{pid}")

    run(body)


def test_both_streams_are_written_down_with_their_time(life):
    async def body():
        before = time.time()
        async with life("sh", "-c", "echo a; echo b >&2; printf 'no end\\377'") as one:
            await one.start()
            await one.ends()
            assert one.text() == ["a", "no end\N{REPLACEMENT CHARACTER}"]
            assert one.text("stderr") == ["b"] == [one.last_words()]
            assert all(before <= row["time"] <= time.time() for row in one.log())

    run(body)


def test_a_line_of_any_length_holds_nobody_up(life):
    async def body():
        async with life("sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; echo; echo after") as one:
            await one.start()
            await one.ends()
            *parts, last = one.text()
            assert (set("".join(parts)), len("".join(parts)), last) == ({"x"}, 300000, "after")

    run(body)


def test_a_second_start_keeps_what_was_written(life):
    async def body():
        async with life("sh", "-c", "cat /seen; echo was here > /seen") as one:
            for _ in range(2):
                await one.start()
                await one.ends()
            assert one.text() == ["was here"]
            assert Path(one.folder, "upper/seen").read_text() == "was here\n"
            assert not os.path.exists(f"{machine.rootfs('busybox')}/seen")

    run(body)


@pytest.mark.parametrize(("stop_signal", "trap", "code"), [
    ("SIGTERM", "trap 'exit 7' TERM;", 7), ("USR1", "trap 'exit 8' USR1;", 8), ("10", "trap 'exit 9' USR1;", 9),
    ("SIGRTMIN+3", "trap 'exit 6' 37;", 6), ("SIGTERM", "", 137), ("SIGKILL", "", 137)])
def test_the_stop_signal_then_the_grace_period_then_kill(life, stop_signal, trap, code):
    async def body():
        root = "debian" if "RT" in stop_signal else "busybox"
        async with life("sh", "-c", trap + READY, stop_signal=stop_signal, root=root) as one:
            await one.start()
            await one.says("ready")
            began = time.monotonic()
            await one.stop()
            assert one.state.exit_code == code
            if (stop_signal, code) == ("SIGTERM", 137):
                assert time.monotonic() - began >= one.spec.grace

    run(body)


def test_what_has_a_policy_stays_stopped_until_it_is_started(life):
    async def body():
        async with life("sleep", "1000", restart="always", stop_signal="SIGKILL") as one:
            await one.start()
            await one.stop()
            await one.stop()  # twice is no mistake
            await asyncio.sleep(0.3)
            assert (one.state.status, one.state.restarts) == ("exited", 0)
            await one.start()
            await one.start()
            assert one.state.status == "running"
            assert [what for what, _ in one.events].count("started") == 2

    run(body)


@pytest.mark.parametrize("policy", ["always", "unless-stopped", "on-failure"])
def test_what_a_signal_ends_comes_back(life, policy):
    async def body():
        async with life("sleep", "1000", restart=policy, stop_signal="SIGKILL") as one:
            await one.start()
            pid = one.state.pid
            os.kill(pid, signal.SIGKILL)
            await one.soon(lambda: one.state.restarts == 1 and one.state.status == "running")
            assert one.state.pid not in (0, pid)

    run(body)


def test_pauses_double_and_tries_are_counted(life):
    async def body():
        async with life("false", restart="on-failure:3") as one:
            await one.start()
            await one.ends()
            assert (one.state.restarts, one.state.exit_code) == (3, 1)
            died = [at for what, at in one.events if what == "died"]
            again = [at for what, at in one.events if what == "started"][1:]
            assert all(up - down >= 0.1 * 2**number for number, (down, up) in
                       enumerate(zip(died, again, strict=False)))
            await one.start()  # by hand: counted from the beginning, as Docker does
            await one.soon(lambda: [what for what, _ in one.events].count("exited") == 2)
            assert [what for what, _ in one.events].count("started") == 8

    run(body)


def test_a_pause_begins_anew_after_steady_running(life, monkeypatch):
    monkeypatch.setattr(compose_unit, "STEADY", 0.0)

    async def body():
        async with life("false", restart="always") as one:
            await one.start()
            await one.soon(lambda: one.state.restarts >= 4)  # 0.1 + 0.2 + 0.4 + 0.8 s without it
            died = [at for what, at in one.events if what == "restarting"]
            assert died[3] - died[0] < 1.4 + 3 * (died[1] - died[0])

    run(body)


def test_stop_does_not_wait_for_a_pause(life, monkeypatch):
    monkeypatch.setattr(compose_unit, "FIRST_WAIT", 50.0)
    monkeypatch.setattr(compose_unit, "KILLED_LATE", 1.0)

    async def body():
        async with life("false", restart="always", grace=5.0) as one:
            await one.start()
            await one.until(lambda state: state.status == "restarting", 20.0)
            began = time.monotonic()
            await one.stop()
            assert time.monotonic() - began < 1.0
            assert (one.state.status, one.state.exit_code) == ("exited", 1)

    run(body)


def test_stop_reaches_one_that_is_just_starting(life):
    async def body():
        async with life("sh", "-c", "trap 'exit 7' TERM; " + READY, stop_signal="SIGKILL", grace=20.0) as one:
            starting = asyncio.create_task(one.start())
            await asyncio.sleep(0)
            began = time.monotonic()
            await one.stop()
            assert time.monotonic() - began < 10.0
            await starting
            assert (one.state.status, one.state.exit_code) == ("exited", 137)

    run(body)


PROBE = {"test": ["CMD-SHELL", "test -e /ready"], "interval": "50ms", "timeout": "5s", "retries": 2}


def test_health_from_starting_to_healthy_to_unhealthy_and_back(life):
    async def body():
        async with life("sleep", "1000", healthcheck=PROBE | {"start_period": "1m"}, stop_signal="SIGKILL",
                        restart="always") as one:
            await one.start()
            assert one.state.health == "starting"
            for command, health in (("touch", "healthy"), ("rm", "unhealthy"), ("touch", "healthy")):
                assert (await one.execute([command, "/ready"]))[0] == 0
                await one.soon(lambda health=health: one.state.health == health)
            assert one.state.restarts == 0  # nobody restarts what is unhealthy
            await one.stop()
            assert one.state.health == ""

    run(body)


@pytest.mark.parametrize("period", ["0s", "1s"])
def test_failures_count_only_after_the_start_period(life, period):
    async def body():
        async with life("sleep", "1000", healthcheck=PROBE | {"start_period": period}, stop_signal="SIGKILL") as one:
            await one.start()
            await one.soon(lambda: one.state.health == "unhealthy")
            times = dict(one.events)
            assert times["unhealthy"] - times["started"] >= float(period[:-1])

    run(body)


def test_zeros_of_a_healthcheck_stand_for_the_defaults(life, monkeypatch):
    monkeypatch.setattr(compose_unit, "INTERVAL", 0.2)
    zeros = {"test": ["CMD", "false"], "interval": "0s", "timeout": "0s", "retries": 0}

    async def body():
        async with life("sleep", "1000", healthcheck=zeros, stop_signal="SIGKILL") as one:
            await one.start()
            await one.soon(lambda: one.state.health == "unhealthy")
            times = dict(one.events)
            assert times["unhealthy"] - times["started"] >= 3 * 0.2

    run(body)


def test_a_probe_that_hangs_is_ended_and_leaves_no_process(life):
    probe = {"test": ["CMD", "sleep", "999"], "interval": "50ms", "timeout": "300ms", "retries": 2}

    async def body():
        async with life("sleep", "1000", healthcheck=probe, stop_signal="SIGKILL") as one:
            await one.start()
            await one.soon(lambda: one.state.health == "unhealthy")
            space = os.readlink(f"/proc/{one.state.pid}/ns/pid")
            assert len(_sleepers(space)) <= 2  # process 1, and the probe of this moment
            await one.soon(lambda: one.state.health == "unhealthy" and len(_sleepers(space)) == 1)

    run(body)


def _sleepers(space):
    found = []
    for pid in process.pids():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == space and process.cmdline(pid)[:1] == ["sleep"]:
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_execute(life):
    async def body():
        async with life("sleep", "1000", env={"A": "1"}, stop_signal="SIGKILL") as one:
            await one.start()
            found = await one.execute(["sh", "-c", "echo $A $B; echo b >&2; exit 4"], env={"B": "2"})
            assert found == (4, "1 2\n", "b\n")
            assert (await one.execute(["sh", "-c", "kill -9 $$"]))[0] == 137
            assert (await one.execute(["no-such-command"]))[0] != 0
            with pytest.raises(TimeoutError):
                await one.execute(["sleep", "1000"], timeout=0.2)
            await one.stop()
            assert (await one.execute(["true"]))[0] != 0

    run(body)


def test_a_command_that_is_not_there_is_said_and_leaves_nothing(life):
    async def body():
        async with life("no-such-command", restart="always") as one:
            with pytest.raises(StartFailed, match="no-such-command"):
                await one.start()
            assert (one.state.pid, one.state.restarts) == (0, 0)

    run(body)


def test_one_that_can_start_no_more_has_exited(life):
    async def body():
        async with life("sleep", "1000", restart="always", stop_signal="SIGKILL") as one:
            await one.start()
            config = json.loads(Path(one.folder, "config.json").read_text())
            config["process"]["args"] = ["no-such-command"]
            one.configure(config)
            os.kill(one.state.pid, signal.SIGKILL)
            await one.ends()
            assert (one.state.exit_code, one.state.pid) == (127, 0)
            assert "no-such-command" in one.last_words()

    run(body)
