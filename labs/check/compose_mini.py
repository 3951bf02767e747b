"""The exercises of 07-compose/03-mini-compose."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from labs import compose, compose_file, compose_run, process
from labs.check import Steps, exercise
from labs.compose_file import Project
from labs.compose_supervisor import UpFailed
from labs.compose_unit import State
from labs.errors import BadInput

NAME = "labs-gate"
PUZZLE = """\
name: puzzle
services:
  front: {image: "busybox:lab", depends_on: [api, assets]}
  api: {image: "busybox:lab", depends_on: [db, queue]}
  worker: {image: "busybox:lab", depends_on: [queue]}
  queue: {image: "busybox:lab"}
  db: {image: "busybox:lab"}
  assets: {image: "busybox:lab"}
"""
# Edit → what it replaces in PUZZLE, and by what.
EDITS = {
    "comment": ("services:", "services:  # of the shop"),
    "wait": ('worker: {image: "busybox:lab", depends_on: [queue]}', 'worker: {image: "busybox:lab"}'),
    "name": ("api: {", "api: {container_name: api, "),
    "scale": ("db: {", "db: {scale: 3, "),
    "words": ('queue: {image: "busybox:lab"}', 'queue: {image: "busybox:lab", command: [sleep, "9"]}'),
    "shell": ('assets: {image: "busybox:lab"}', 'assets: {image: "busybox:lab", command: []}'),
}
GATE = """\
services:
  web:
    image: busybox:lab
    command: sleep 1000
    stop_signal: SIGKILL
    depends_on: [migrate]
  migrate:
    image: busybox:lab
    command: sh -c "sleep 0.5; exit 0"
    depends_on: [db]
  db:
    image: busybox:lab
    command: sh -c "sleep 0.5; touch /ready; exec sleep 1000"
    stop_signal: SIGKILL
    healthcheck: {test: test -e /ready, interval: 200ms, retries: 50}
"""


def read(text: str, name: str = "") -> Project:
    """A compose file from its text; nothing of it stays on disk."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "compose.yaml").write_text(text, encoding="utf-8")
        return compose_file.load(os.path.join(folder, "compose.yaml"), project=name, env={})


@exercise
def levels(project: Project, answer: Sequence[Collection[str]]) -> Steps:
    """Which services may start together, level by level."""
    given = [set(level) for level in answer]
    named = [name for level in given for name in level]
    missing, strange = set(project.services) - set(named), set(named) - set(project.services)
    yield not strange, f"`{min(strange, default='')}` というサービスはありません。"
    yield not missing, f"`{min(missing, default='')}` が、どの段にもありません。"
    yield len(named) == len(set(named)), "二つの段に入っているサービスがあります。"
    at = {name: number for number, level in enumerate(given) for name in level}
    early = [(name, need) for name in sorted(at) for need in compose.needs(project, name) if at[need] >= at[name]]
    name, need = early[0] if early else ("", "")
    yield not early, f"`{name}` は `{need}` を待ちます。`{need}` より後の段に置いてください。"
    late = [name for number, level in enumerate(compose.order(project)) for name in level if at[name] > number]
    yield not late, f"`{''.join(late[:1])}` は、もっと早く起動できます。待つ相手がいる段の、すぐ次に置いてください。"
    return "段は、待つ相手のいちばん深い段の次です。同じ段のサービスは、並べて起動できます。"


def _recreated(edit: str) -> set[str]:
    """The services of PUZZLE that `up` makes anew after an edit, when all of them were running."""
    before = read(PUZZLE)
    have = [State(name, name, 1, compose.config_hash(service), "running") for name, service in before.services.items()]
    after = read(PUZZLE.replace(*EDITS[edit]))
    return {one.service for one in compose.plan(after, have) if one.kind == "recreate"}


@exercise
def recreated(answer: Mapping[str, Collection[str]]) -> Steps:
    """After which edit which services are made anew."""
    for edit in EDITS:
        yield edit in answer, f"`{edit}` の答えがまだありません。"
        given, real = set(answer[edit]), _recreated(edit)
        too_many = given - real
        yield not too_many, _why_not(edit, min(too_many, default=""))
        yield given == real, f"`{edit}` で変わるサービスを見落としています。ハッシュに入るのは、コンテナを決める設定のすべてです。"
    return "比べるのはハッシュだけです。コンテナを決めない言葉（順番、数、注釈）は、ハッシュに入りません。"


def _why_not(edit: str, name: str) -> str:
    if edit == "comment":
        return "注釈は、YAML を読んだ時点で消えます。設定は何も変わりません。"
    if edit == "wait":
        return f"`{name}` の `depends_on` は起動の順番です。できあがるコンテナは同じなので、ハッシュに入りません。"
    if edit == "scale":
        return f"数を増やしても、いまある `{name}` の一つめは、そのままで正しい姿です。足りない分が作られるだけです。"
    return f"`{edit}` の変更で、`{name}` の設定は変わりません。正規化したあとの値を、`compose_file.load` で比べてください。"


@exercise
def gated(text: str) -> Steps:
    """A file in which migrate runs once db is healthy, and web once migrate has ended well."""
    try:
        project = read(text, NAME)
    except BadInput as error:
        yield False, f"読めませんでした。`{error}`"
        return ""
    yield set(project.services) == {"web", "migrate", "db"}, "サービスは `web`、`migrate`、`db` の三つのままにしてください。"
    try:
        compose_run.up(project)
        process.until(lambda: all(one.status != "created" for one in compose_run.ps(NAME)))
        events = [(one.container.split("-")[2], one.what) for one in compose_run.events(NAME)]
        codes = {one.service: one.exit_code for one in compose_run.ps(NAME)}
    except UpFailed as error:
        yield False, f"`up` が失敗しました。`{error.reason}`"
        return ""
    except BadInput as error:
        yield False, f"断られました。`{error}`"
        return ""
    finally:
        compose_run.down(NAME)
    order = {event: number for number, event in reversed(list(enumerate(events)))}
    last = len(events)
    # The order alone may be luck: on a slow machine migrate has ended before web could have started.
    waits = [compose.needs(project, name).get(need) for name, need in (("migrate", "db"), ("web", "migrate"))]
    yield waits[0] == compose.HEALTHY and order["migrate", "started"] > order.get(("db", "healthy"), last), \
        "`migrate` が、`db` の準備ができる前に動きました。`service_healthy` を待たせてください。"
    yield waits[1] == compose.COMPLETED and order["web", "started"] > order.get(("migrate", "exited"), last), \
        "`web` が、`migrate` の終わる前に動きました。終わったことを待つ条件は、どれでしょうか。"
    yield codes["migrate"] == 0, "`migrate` が失敗しています。"
    return "起動の順番ではなく、「使える」「済んだ」という**状態**を待つようになりました。"
