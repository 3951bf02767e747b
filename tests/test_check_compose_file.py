"""The exercises of 07-compose/01-compose-file: each wrong state gives its hint; Docker Compose itself is the judge."""

import os
import subprocess

import pytest

from labs.check import UNANSWERED
from labs.check import compose_file as check

RIGHT = {"image": "webapp:${TAG:?}", "bind": "${BIND:-127.0.0.1}", "flag": "${DEBUG:+--verbose}", "price": "5 $$USD"}


class TestLines:
    def test_passes(self):
        assert check.lines(RIGHT)

    def test_unanswered(self):
        assert check.lines(...).message == UNANSWERED

    @pytest.mark.parametrize(("key", "form", "hint"), [
        ("image", "", "`image` の答えがまだ"),
        ("image", "webapp:${TAG}", "「何もない」のとき、断ってほしいところが、`webapp:` になりました"),
        ("image", "webapp:${TAG?}", "「TAG が空」のとき、断ってほしいところが、`webapp:` になりました"),
        ("image", "webapp:${TAG", "断ってほしいところが、断られました（"),
        ("image", "web:${TAG:?}", "「TAG が `lab`」のとき、`webapp:lab` にしてほしいところが、`web:lab`"),
        ("bind", "${BIND-127.0.0.1}", "「BIND が空」のとき、`127.0.0.1` にしてほしいところが、`` になりました"),
        ("flag", "${DEBUG+--verbose}", "「DEBUG が空」のとき、`` にしてほしいところが、`--verbose`"),
        ("price", "5 $USD", "`5 $USD` にしてほしいところが、`5 ` になりました"),
        ("price", "5 ${USD:?}", "にしてほしいところが、断られました（"),
    ])
    def test_hints(self, key, form, hint):
        verdict = check.lines(RIGHT | {key: form})
        assert not verdict
        assert hint in verdict.message


OVER = """\
services:
  web:
    ports: !override ["127.0.0.1:9090:80"]
    environment: {THEME: dark, PASSWORD: !reset null}
    volumes: [{type: tmpfs, target: /srv}]
"""


class TestOverridden:
    def test_passes(self):
        assert check.overridden(OVER)

    def test_the_base_alone_is_read(self):
        assert check.judge(check.BASE).error == ""

    def test_unanswered(self):
        assert check.overridden(...).message == UNANSWERED

    @pytest.mark.parametrize(("old", "new", "hint"), [
        ("services:", "services: [", "審判が読めませんでした"),
        ('    ports: !override ["127.0.0.1:9090:80"]\n', "", "9090 番のポートがありません"),
        ("!override ", "", "開くポートが 8080、9090 です"),
        (", PASSWORD: !reset null", "", "`PASSWORD` がまだ残って"),
        ("{THEME: dark, PASSWORD: !reset null}", "!override {THEME: dark}", "`LANG` まで消えました"),
        ("THEME: dark, ", "", "`THEME` は `dark` にします"),
        ("volumes: [", "volumes: !override [", "`/var/log/nginx` のボリュームが消えました"),
        ("    volumes: [{type: tmpfs, target: /srv}]\n", "", "`/srv` は tmpfs"),
        ("target: /srv}", "target: /srv}, {type: tmpfs, target: /tmp}", "増えています"),
    ])
    def test_hints(self, old, new, hint):
        assert old in OVER
        verdict = check.overridden(OVER.replace(old, new))
        assert not verdict
        assert hint in verdict.message


PROJECT = "labs-test-forged"


def create(**labels):
    words = [f"--label={check.LABEL}{key.replace('__', '.')}={value}" for key, value in labels.items()]
    subprocess.run(["docker", "create", "--name", PROJECT, "--network", "none", *words, "busybox:lab"],
                   check=True, capture_output=True)


@pytest.fixture
def cleared():
    yield
    subprocess.run(["docker", "rm", "-f", PROJECT], check=True, capture_output=True)


@pytest.mark.machine
class TestForged:
    def test_unanswered_and_none(self):
        assert check.forged(..., "db").message == UNANSWERED
        assert "を持つコンテナがありません" in check.forged(PROJECT, "db").message

    @pytest.mark.parametrize(("labels", "hint"), [
        ({}, "サービス名がまだです"),
        ({"service": "web"}, "サービス名がまだです"),
        ({"service": "db"}, "足りないものはどれでしょうか"),
        ({"service": "db", "config-hash": "x", "project__config_files": "compose.yaml"}, "compose が作った"),
        ({"service": "db", "config-hash": "x"}, ""),
    ])
    def test_hints(self, cleared, labels, hint):
        create(project=PROJECT, **labels)
        verdict = check.forged(PROJECT, "db")
        assert bool(verdict) == (hint == "")
        assert hint in verdict.message


SAFE = """\
services:
  box:
    image: busybox:lab
    network_mode: none
    BODY
secrets: {password: {file: ./password}, copied: {environment: PASSWORD}}
"""
ASKED = "secrets: [password]"


@pytest.fixture
def vault(tmp_path):
    """A function: a container with this line in its service, the file with this owner and mode, the verdict."""
    words, env = ["docker", "compose", "-p", PROJECT], os.environ | {"PASSWORD": check.SESAME}

    def run(*more):
        subprocess.run([*words, *more], cwd=tmp_path, env=env, check=True, capture_output=True)

    def made(body, uid=check.NOBODY, mode=0o400, text=check.SESAME):
        (tmp_path / "compose.yaml").write_text(SAFE.replace("BODY", body))
        (tmp_path / "password").write_text(text)
        os.chmod(tmp_path / "password", mode)
        os.chown(tmp_path / "password", uid, uid)
        run("create")
        return check.kept(PROJECT)

    yield made
    run("down", "-t", "0")


@pytest.mark.machine
class TestKept:
    def test_unanswered_and_none(self):
        assert check.kept(...).message == UNANSWERED
        assert "のコンテナがありません" in check.kept(PROJECT).message

    def test_passes(self, vault):
        assert vault(ASKED)

    @pytest.mark.parametrize(("body", "more", "hint"), [
        (f"environment: {{PW: '{check.SESAME}'}}", {}, "環境変数 `PW` に"),
        (f"command: [echo, '{check.SESAME}']", {}, "のどこかに"),
        ("secrets: [copied]", {}, "書き込み層に写されています"),
        ("init: false", {}, "何も差し込まれていません"),
        (ASKED, {"text": "other"}, "にパスワードがありません"),
        (ASKED, {"mode": 0o644}, "持ち主でない人も触れます（0644）"),
        (ASKED, {"uid": 0}, "の持ち主が 0 番です"),
    ])
    def test_hints(self, vault, body, more, hint):
        verdict = vault(body, **more)
        assert not verdict
        assert hint in verdict.message
