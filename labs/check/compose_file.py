"""The exercises of 07-compose/01-compose-file."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from labs import engine
from labs.check import Steps, exercise

LABEL = "com.docker.compose."
SERVICE = {"image": "busybox:lab"}
# What each line of the second exercise becomes, by what is set outside: None is a refusal.
LINES: dict[str, tuple[tuple[dict[str, str], str | None], ...]] = {
    "image": (({}, None), ({"TAG": ""}, None), ({"TAG": "lab"}, "webapp:lab")),
    "bind": (({}, "127.0.0.1"), ({"BIND": ""}, "127.0.0.1"), ({"BIND": "192.0.2.1"}, "192.0.2.1")),
    "flag": (({}, ""), ({"DEBUG": ""}, ""), ({"DEBUG": "yes"}, "--verbose")),
    "price": (({}, "5 $USD"), ({"USD": "x"}, "5 $USD")),
}
BASE = """\
services:
  web:
    image: nginx:lab
    ports: ["127.0.0.1:8080:80"]
    environment: {THEME: light, LANG: C, PASSWORD: hunter2}
    volumes: ["./www:/srv", "logs:/var/log/nginx"]
volumes: {logs: }
"""
WANTED = {"THEME": "dark", "LANG": "C"}
NOBODY = 65534
SESAME = "open sesame"


class Judged(NamedTuple):
    """What `docker compose config` said: the model, or the line with which it refused."""

    model: dict[str, Any] | None
    error: str


def judge(*texts: str, env: Mapping[str, str] | None = None) -> Judged:
    """The final form of some files, laid over one another in this order, with nothing set outside but `env`."""
    with tempfile.TemporaryDirectory(prefix="labs-judge-") as folder:
        words = ["docker", "compose", "--project-directory", folder]
        for number, text in enumerate(texts):
            path = os.path.join(folder, f"{number}.yaml")
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            words += ["-f", path]
        outside = {"PATH": os.environ["PATH"], "HOME": folder} | dict(env or {})
        done = subprocess.run([*words, "config", "--format", "json"], env=outside, capture_output=True, text=True)
    if done.returncode:
        return Judged(None, (done.stderr.strip().splitlines() or [""])[-1].replace(f"{folder}/", ""))
    return Judged(json.loads(done.stdout), "")


def _containers(**labels: str) -> list[dict[str, Any]]:
    """The containers, running or not, with all these labels of Compose."""
    rows = engine.ask("GET", "/containers/json?all=1").json
    wanted = {LABEL + key: value for key, value in labels.items()}
    return [row for row in rows if wanted.items() <= row["Labels"].items()]


@exercise
def forged(project: str, service: str) -> Steps:
    """A container that Docker Compose lists as a project's service, although Compose never made it."""
    named = _containers(project=project)
    yield bool(named), f"ラベル `{LABEL}project={project}` を持つコンテナがありません。"
    ours = _containers(project=project, service=service)
    yield bool(ours), f"サービス名がまだです。`{LABEL}service` は、どのサービスのコンテナかを示します。"
    made = [row for row in ours if LABEL + "project.config_files" in row["Labels"]]
    yield not made, "compose が作ったコンテナです。`docker create` で、手で作ってください。"
    words = ["docker", "compose", "-p", project, "ps", "-a", "--format", "{{.Service}}"]
    with tempfile.TemporaryDirectory(prefix="labs-judge-") as folder:
        said = subprocess.run(words, cwd=folder, capture_output=True, text=True).stdout.split()
    hint = "`docker compose ps -a` には、まだ並びません。本物のコンテナにあるラベルのうち、足りないものはどれでしょうか。"
    yield service in said, hint + "作り直すかどうかを決める、あのラベルです。"
    return "compose にとっての「自分のもの」とは、ラベルの合ったコンテナのことです。作ったのが誰かは、問いません。"


def _filled(key: str, form: str, env: Mapping[str, str]) -> Judged:
    """The final form of a project in which one value is this form."""
    return judge(json.dumps({"name": "labs-lines", "services": {"box": SERVICE | {"labels": {key: form}}}}), env=env)


@exercise
def lines(answer: Mapping[str, str]) -> Steps:
    """Four values that become what LINES says in every state of the outside."""
    for key, states in LINES.items():
        form = answer.get(key, "")
        yield form != "", f"`{key}` の答えがまだありません。"
        for env, wanted in states:
            outside = "、".join(f"{name} が `{value}`" if value else f"{name} が空" for name, value in env.items())
            found = _filled(key, form, env)
            yield _agrees(found, key, wanted), _told(key, outside or "何もない", found, wanted)
    return "四つとも、どの場合にも望んだ形になりました。審判は `docker compose config` です。"


def _agrees(found: Judged, key: str, wanted: str | None) -> bool:
    if found.model is None or wanted is None:
        return found.model is None and wanted is None and "required variable" in found.error
    return _value(found.model, key) == wanted


def _value(model: Mapping[str, Any], key: str) -> str:
    """As the container would get it: the output doubles every $, so that it can be read again."""
    return str(model["services"]["box"]["labels"][key]).replace("$$", "$")


def _told(key: str, outside: str, found: Judged, wanted: str | None) -> str:
    got = f"断られました（{found.error}）" if found.model is None else f"`{_value(found.model, key)}` になりました"
    aim = "断ってほしい" if wanted is None else f"`{wanted}` にしてほしい"
    return f"`{key}`：外が「{outside}」のとき、{aim}ところが、{got}。"


@exercise
def overridden(text: str) -> Steps:
    """A file that, laid over BASE, leaves what the exercise wants."""
    found = judge(BASE, text)
    yield found.model is not None, f"審判が読めませんでした。`{found.error}`"
    web = (found.model or {})["services"].get("web", {})
    ports = [port["published"] for port in web.get("ports", ())]
    yield "9090" in ports, "9090 番のポートがありません。"
    yield ports == ["9090"], f"開くポートが {'、'.join(ports)} です。並びは足されます。足さずに置き換える印がありました。"
    env = web.get("environment", {})
    yield "PASSWORD" not in env, "`PASSWORD` がまだ残っています。混ぜるだけでは消えません。消すための印を、その名前に付けます。"
    yield env.get("LANG") == "C", "`LANG` まで消えました。消すのは `PASSWORD` だけです。"
    yield env == WANTED, f"`environment` が `{env}` です。`THEME` は `dark` にします。"
    mounted = {one["target"]: one["type"] for one in web.get("volumes", ())}
    yield mounted.get("/var/log/nginx") == "volume", "`/var/log/nginx` のボリュームが消えました。"
    yield mounted.get("/srv") == "tmpfs", "`/srv` は tmpfs にします。長い形（`type: tmpfs`、`target: /srv`）で書けます。"
    yield len(mounted) == 2, "差し込む場所が増えています。"
    return "足されるもの、混ざるもの、替わるものを使い分けました。"


@exercise
def kept(project: str) -> Steps:
    """A container of the project to which nobody gets SESAME as a file, bound from the host, and in no other way."""
    rows = _containers(project=project)
    yield bool(rows), f"プロジェクト `{project}` のコンテナがありません。`up` か `create` をしましたか。"
    box = engine.ask("GET", f"/containers/{rows[0]['Id']}/json").json
    shown = [line.partition("=")[0] for line in box["Config"]["Env"] if SESAME in line]
    yield not shown, f"環境変数 `{''.join(shown[:1])}` にパスワードがあります。`docker inspect` で誰にでも見えます。"
    yield SESAME not in json.dumps(box), "`docker inspect` のどこかに、まだパスワードが見えています。"
    layer = box["GraphDriver"]["Data"]["UpperDir"]
    yield not _holds(layer), "パスワードが書き込み層に写されています。ホストのファイルからの secret なら、写しは作られません。"
    secrets = [row for row in box["Mounts"] if row["Destination"].startswith("/run/secrets/")]
    yield bool(secrets), "`/run/secrets/` に何も差し込まれていません。"
    source = secrets[0]["Source"]
    yield _holds(source), f"`{source}` にパスワードがありません。"
    seen = os.stat(source)
    yield not seen.st_mode & 0o077, f"ホストの `{source}` を、持ち主でない人も触れます（{seen.st_mode & 0o777:04o}）。"
    yield seen.st_uid == NOBODY, f"ホストの `{source}` の持ち主が {seen.st_uid} 番です。nobody は読めません。"
    return "パスワードは、環境変数にも書き込み層にもなく、nobody だけが読めるファイル一つにあります。"


def _holds(path: str) -> bool:
    """Whether the words are in a file, or in one below a directory."""
    return subprocess.run(["grep", "-rqsF", SESAME, path]).returncode == 0
