"""The exercises of 07-compose/02-order-and-health."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from labs import process
from labs.check import Steps, exercise

NAIVE = """\
services:
  db: {image: redis:lab}
  migrate: {image: busybox:lab, command: "true"}
  app:
    image: busybox:lab
    depends_on: [db, migrate]
"""
CONDITIONS = {"db": "service_healthy", "migrate": "service_completed_successfully"}
WAKES, NOTICED = 40, 20
TIMES, KEYS = ("interval", "timeout", "start_period"), {"interval", "timeout", "retries", "start_period"}
GRACE = 1.0
SERVICE = "com.docker.compose.service"


class Event(NamedTuple):
    """Something that befell a container: seconds after the asked moment, its service, what, and the event's attributes."""

    when: float
    service: str
    action: str
    more: dict[str, str]


def events(since: float) -> Iterator[Event]:
    """What `docker events` tells of containers from that moment (seconds since the epoch) until now.

    The daemon wakes those who wait for a container's end (`docker stop`, `docker wait`) before it writes down that it
    died, and holds the container until then: whoever asks for the container itself, as `docker inspect` does, waits.
    """
    every = subprocess.run(["docker", "ps", "-aq"], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["docker", "inspect", *every], capture_output=True, check=False)
    words = ["docker", "events", "--since", f"{since:.6f}", "--until", f"{time.time():.6f}"]
    words += ["--filter", "type=container", "--format", "json"]
    for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines():
        one = json.loads(line)
        more = one["Actor"]["Attributes"]
        yield Event(one["timeNano"] / 1e9 - since, more.get(SERVICE, ""), one["Action"], more)


def config(text: str) -> tuple[dict[str, Any], str]:
    """The services as `docker compose config` reads them, and what it says where it refuses the file."""
    words = ["docker", "compose", "-p", "labs-check", "-f", "-", "config", "--format", "json"]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}, done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout)["services"], ""


@exercise
def gates(text: str) -> Steps:
    """The app waits until the db is healthy and migrate has ended well, as `docker compose config` reads it."""
    services, wrong = config(text)
    yield not wrong, f"`docker compose config` が断りました（`{wrong}`）。"
    missing = [name for name in ("app", *CONDITIONS) if name not in services]
    yield not missing, f"サービス `{' '.join(missing)}` がありません。"
    needs = services["app"].get("depends_on", {})
    for name, condition in CONDITIONS.items():
        yield name in needs, f"`app` の `depends_on` に `{name}` がありません。"
        found = needs[name]["condition"]
        yield found == condition, f"`app` は `{name}` を `{found}` で待っています。これでは早すぎるか、いつまでも始まりません。"
    test = services["db"].get("healthcheck", {}).get("test", [])
    yield bool(test), "`db` に `healthcheck` の `test` がありません。健康になるときが来ないので、`up` は失敗します。"
    form = "`test` の先頭は `CMD` か `CMD-SHELL` です。`NONE` は検査を消します。"
    yield test[0] in ("CMD", "CMD-SHELL"), form
    yield "redis-cli ping" in " ".join(test[1:]), f"`db` の検査が `{' '.join(test[1:])}` です。`redis-cli ping` にします。"
    return "`app` は、`db` が健康で、`migrate` が 0 で終わってから始まります。"


def seconds(text: str) -> float:
    """A duration of a whole number of seconds, as "40s"; ValueError for another form."""
    if not text.endswith("s"):
        raise ValueError(text)
    return float(int(text[:-1]))


@exercise
def budget(answer: Mapping[str, Any]) -> Steps:
    """A start of WAKES seconds is never unhealthy, and silence is unhealthy within NOTICED seconds."""
    yield set(answer) == KEYS, f"要るのは `{' '.join(sorted(KEYS))}` の四つです。"
    try:
        interval, timeout, start = (seconds(answer[name]) for name in TIMES)
        retries = int(answer["retries"])
    except (AttributeError, TypeError, ValueError):
        yield False, '時間は `"5s"` のような整数の秒、`retries` は整数です。'
        return ""
    yield min(interval, timeout, retries) > 0, "0 は「既定の値」という意味になります。`interval`、`timeout`、`retries` は 1 以上にします。"
    yield retries > 1, "`retries` が 1 では、たまたま遅れた一回の返事で `unhealthy` になります。"
    yield start >= WAKES, f"`start_period` が {start:g} 秒です。起きるのに {WAKES} 秒かかる朝の失敗まで数えてしまいます。"
    worst = (interval + timeout) * retries
    yield worst <= NOTICED, f"返事がないと気づくまでに、最悪で {worst:g} 秒かかります。{NOTICED} 秒までにします。"
    return f"起きるのを {start:g} 秒待ち、返事がなければ遅くとも {worst:g} 秒で気づきます。"


def as_process_1(script: str, grace: float = GRACE) -> tuple[int, str]:
    """Run it as process 1 of a PID namespace, send TERM once it waits: exit code as docker's (137 after KILL), output."""
    words = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as top:
        # A script that has ended already has no process to be found, and gets no signal.
        found = process.until(lambda: process.children(top.pid) if top.poll() is None else [0], 10)
        process.until(lambda: top.poll() is not None or _waits(found[0]), 10)
        _kill(top, found[0], signal.SIGTERM)
        try:
            code = top.wait(grace)
        except subprocess.TimeoutExpired:
            _kill(top, found[0], signal.SIGKILL)
            code = top.wait()
        said = top.stdout.read() if top.stdout else ""
    return (code if code >= 0 else 128 - code), said


def _kill(top: subprocess.Popen[str], pid: int, number: signal.Signals) -> None:
    if top.poll() is None:  # it ends right after its child
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _waits(pid: int) -> bool:
    """It is the shell's own program no more, or has a child: the script has got to where it waits."""
    try:
        return process.status(pid).name != "unshare" and (
            process.status(pid).name != "sh" or bool(process.children(pid)))
    except (FileNotFoundError, ProcessLookupError):
        return True


@exercise
def stops(script: str) -> Steps:
    """As process 1, TERM makes it say bye and end with 0 within GRACE seconds."""
    code, said = as_process_1(script)
    yield code != 137, "TERM では終わらず、KILL されました（137）。`trap` がないか、シェルが前のコマンドを待っています。"
    yield code == 0, f"終了コードが {code} です。0 で終わらせます。"
    yield "bye" in said.split(), "終わりましたが、`bye` と言っていません。TERM を待たずに終わっていないかも確かめてください。"
    return "PID 1 として TERM を受け取り、片づけてから 0 で終わりました。"
