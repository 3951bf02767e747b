"""The exercises of 07-compose/02-order-and-health: each wrong answer gives its hint, the solution passes."""

import subprocess
import time
from pathlib import Path

import pytest

from labs import process
from labs.check import compose_health as check

GATED = """\
services:
  db:
    image: redis:lab
    healthcheck: {test: [CMD, redis-cli, ping], interval: 1s}
  migrate: {image: busybox:lab, command: "true"}
  app:
    image: busybox:lab
    depends_on:
      db: {condition: service_healthy}
      migrate: {condition: service_completed_successfully}
"""


@pytest.mark.parametrize(("text", "hint"), [
    ("services: [", "`docker compose config` が断りました"),
    ("services: {app: {image: busybox:lab}}", "サービス `db migrate` がありません"),
    (check.NAIVE, "`app` は `db` を `service_started` で待っています"),
    (check.NAIVE.replace("[db, migrate]", "[migrate]"), "`depends_on` に `db` がありません"),
    (GATED.replace("service_completed_successfully", "service_started"), "`app` は `migrate` を `service_started`"),
    (GATED.replace("healthcheck: {test: [CMD, redis-cli, ping], interval: 1s}", ""), "に `healthcheck` の `test` が"),
    (GATED.replace("[CMD, redis-cli, ping]", "[NONE]"), "`NONE` は検査を消します"),
    (GATED.replace("redis-cli, ping", '"true"'), "`db` の検査が `true` です"),
])
def test_gates_hints(text, hint):
    verdict = check.gates(text)
    assert not verdict
    assert hint in verdict.message


def test_gates_passes():
    assert not check.gates(...)
    assert check.gates(GATED)


RIGHT = {"interval": "3s", "timeout": "2s", "retries": 3, "start_period": "40s"}


@pytest.mark.parametrize(("change", "hint"), [
    ({"start_interval": "1s"}, "の四つです"),
    ({"interval": "soon"}, "整数の秒"),
    ({"interval": 3}, "整数の秒"),
    ({"timeout": "0s"}, "「既定の値」"),
    ({"retries": 1}, "たまたま遅れた一回"),
    ({"start_period": "30s"}, "`start_period` が 30 秒です"),
    ({"interval": "30s"}, "最悪で 96 秒"),
])
def test_budget_hints(change, hint):
    verdict = check.budget(RIGHT | change)
    assert not verdict
    assert hint in verdict.message


def test_budget_passes():
    assert not check.budget(...)
    assert "遅くとも 15 秒" in check.budget(RIGHT).message


@pytest.mark.parametrize(("script", "hint"), [
    ("sleep 1000", "KILL されました（137）"),
    ("trap 'echo bye; exit 0' TERM; sleep 1000", "シェルが前のコマンドを待っています"),
    ("trap 'echo bye; exit 3' TERM; sleep 1000 & wait", "終了コードが 3 です"),
    ("trap 'exit 0' TERM; sleep 1000 & wait", "`bye` と言っていません"),
    ("exit 0", "`bye` と言っていません"),
])
def test_stops_hints(script, hint):
    verdict = check.stops(script)
    assert not verdict
    assert hint in verdict.message


def test_stops_passes():
    assert not check.stops(...)
    assert check.stops("trap 'echo bye; exit 0' TERM; sleep 1000 & wait")


@pytest.mark.machine
def test_events_tell_the_life_of_a_container_and_nothing_from_before():
    since = time.time()
    words = ["docker", "run", "--rm", "--name", "labs-events", "--network", "none", "--label", f"{check.SERVICE}=web"]
    subprocess.run([*words, "busybox:lab", "sh", "-c", "exit 3"], check=False)
    seen = [one for one in check.events(since) if one.more["name"] == "labs-events"]
    assert [one.action for one in seen if one.action in ("create", "start", "die")] == ["create", "start", "die"]
    assert {one.service for one in seen} == {"web"}
    assert next(one.more["exitCode"] for one in seen if one.action == "die") == "3"
    assert all(one.when > 0 for one in seen)
    assert not [one for one in check.events(time.time()) if one.more["name"] == "labs-events"]


@pytest.mark.machine
def test_events_wait_for_an_end_that_the_daemon_is_still_writing_down():
    def sh(words):
        return subprocess.run(words.split(), check=True, capture_output=True, text=True).stdout.strip()

    daemon = sh("pidof dockerd")
    sh("docker run -d --name labs-events --network none busybox:lab sleep 1000")
    slow = subprocess.Popen(["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync",
                             "-e", "inject=fsync:delay_enter=300000", "-p", daemon])
    try:
        process.until(lambda: f"TracerPid:\t{slow.pid}" in Path(f"/proc/{daemon}/status").read_text())
        since = time.time()
        sh("docker stop -t 0 labs-events")
        seen = [one.action for one in check.events(since) if one.more["name"] == "labs-events"]
    finally:
        slow.terminate()
        slow.wait()
        sh("docker rm -f labs-events")
    assert "die" in seen
