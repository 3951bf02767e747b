"""labs.build: the same Dockerfiles through buildah and `docker build`, layer by layer; keys, secrets, times, errors.

The tests named docker or podman need the daemons of the lab machine; the others run wherever the lab's images are.
"""

import hashlib
import json
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from labs import build, build_copy, image, machine
from labs.dockerfile import DockerfileError
from labs.errors import BadInput

LAB = image.Layout("/opt/labs/images")
EPOCH = 1_700_000_000
RUNTIME = str(Path(__file__).resolve().parent.parent / "bin" / "labs-runtime")

FILES = """
ARG BASE
FROM ${BASE} AS build
ARG VERSION=1
ENV GREETING="hello $VERSION" EMPTY=
WORKDIR /srv/app
COPY a.txt ./
COPY src src
COPY src/ copy/
COPY --chown=nobody:nogroup --chmod=640 a.txt src/run /owned/
COPY --chown=1234 src /numbered
COPY *.log l?gs/[ab].txt /matched/
COPY link /from-link
COPY . /all
ADD archive.tar.gz /unpacked/
ADD --chown=7:8 archive.tar.zst plain.gz /mine/
RUN echo $GREETING $VERSION > greeting && chmod 600 greeting && ln greeting hard && ln -s greeting soft
RUN ["touch", "/etc/exec form"]
RUN rm a.txt && rm -r src && mkdir -m 700 src && echo new > src/new
USER nobody
RUN id -u > /tmp/id; umask > /tmp/umask; echo $HOME > /tmp/home
WORKDIR mine/deeper
USER 0
RUN true
COPY <<one <<"two" /documents/
$GREETING
one
$GREETING
two
WORKDIR /srv/app

FROM ${BASE}
COPY --from=build /srv /srv
COPY --from=build --chown=1:2 --chmod=600 /owned/a.txt /owned/run /owned/
COPY --from=0 /numbered/run /bin/run
"""

SCRIPTS = """
ARG BASE
FROM ${BASE}
RUN <<EOT
echo one > /one
echo two > /two
EOT
RUN <<EOT
#!/bin/busybox ash
echo $0 | grep -c dev > /script
EOT
"""

SETTINGS = """
ARG BASE
FROM ${BASE} AS parent
CMD ["from", "parent"]
ENV A=1 B="two words" C=$A
ENV OLD a b
LABEL a=b "c d"="e $B"
FROM parent
ENV A=2 D=$A$UNSET
ENTRYPOINT ["/bin/entry", "$A"]
EXPOSE 80 53/udp
EXPOSE 8000/tcp
VOLUME /data /more$A
VOLUME ["/json data"]
WORKDIR /w
WORKDIR x/../y
USER nobody:nogroup
STOPSIGNAL SIGUSR1
HEALTHCHECK --interval=5s --timeout=1m30s --start-period=100ms --retries=4 CMD check $A
SHELL ["/bin/busybox", "ash", "-c"]
CMD echo $A
LABEL a=z
"""

ENTRY = """
ARG BASE
FROM ${BASE}
ENTRYPOINT run this
HEALTHCHECK NONE
"""


def context(folder):
    """The files that the Dockerfiles above copy."""
    for name, text in {"a.txt": "a\n", "b.txt": "b\n", "x.log": "x\n", "y.log": "y\n",
                       "src/run": "#!/bin/sh\necho run\n", "src/sub/deep": "deep\n",
                       "logs/a.txt": "la\n", "logs/b.txt": "lb\n", "logs/c.txt": "lc\n",
                       "secret/key": "k\n", "secret/readme": "r\n", "node/x/y/z.o": "o\n", "node/x/keep": "k\n",
                       ".dockerignore": "# a comment\nsecret\n!secret/readme\n**/*.o\n*.tar*\n!archive*\nDockerfile*\n",
                       "other.tar": "no\n"}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "src/run").chmod(0o755)
    (folder / "src/sub").chmod(0o750)
    (folder / "link").symlink_to("a.txt")
    (folder / "src/link").symlink_to("run")
    archived = folder.parent / "archived"
    (archived / "in").mkdir(parents=True)
    (archived / "in/file").write_text("in\n")
    os.chown(archived / "in/file", 12, 34)
    for path in (archived / "in/file", archived / "in"):
        os.utime(path, (EPOCH + 100, EPOCH + 100))
    with tarfile.open(folder / "archive.tar", "w") as tar:
        tar.add(archived / "in", "in")
    subprocess.run(["zstd", "-q", folder / "archive.tar"], check=True)
    subprocess.run(["gzip", "-n", folder / "archive.tar"], check=True)
    (folder / "plain").write_text("plain\n")
    subprocess.run(["gzip", "-n", folder / "plain"], check=True)
    for folder_, _, names in os.walk(folder):
        for name in [".", *names]:
            os.utime(Path(folder_, name), (EPOCH + 100, EPOCH + 100), follow_symlinks=False)
    return folder


def out(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def entries(layout, name):
    """Layer by layer what is in an image, as Python's own tarfile reads it: path → kind, mode, owner, link, content."""
    found, (manifest, _) = [], documents(layout, name)
    for layer in manifest["layers"]:
        with tarfile.open(layout / "blobs/sha256" / layer["digest"].split(":")[1]) as tar:
            found.append({member.name.rstrip("/"): (
                member.type.decode(), oct(member.mode), member.uid, member.gid, member.linkname,
                hashlib.sha256(tar.extractfile(member).read()).hexdigest()[:8] if member.isreg() else "")
                for member in tar})
    return found


def documents(layout, name):
    """Manifest and configuration of an image in a layout, read without labs."""
    index = json.loads((layout / "index.json").read_text())["manifests"]
    (one,) = [one for one in index if one.get("annotations", {}).get(image.NAME) == name]
    manifest = json.loads((layout / "blobs/sha256" / one["digest"].split(":")[1]).read_text())
    return manifest, json.loads((layout / "blobs/sha256" / manifest["config"]["digest"].split(":")[1]).read_text())


@pytest.fixture
def place(tmp_path):
    """A context with nothing in it, and beside it the layout that is built into."""
    (tmp_path / "context").mkdir()
    image.Layout.create(tmp_path / "labs")
    return tmp_path


def built(place, text, name="made", **options):
    """Build a Dockerfile on busybox in the place's context."""
    (place / "context/Dockerfile").write_text(text)
    return build.build(str(place / "context"), image.Layout(place / "labs"), name, bases=LAB, **options)


def refused(place, text, error=DockerfileError, **options):
    """What is said of a Dockerfile that cannot be built; nothing is left of the attempt."""
    before = set(os.listdir(machine.DATA)) if os.path.isdir(machine.DATA) else set()
    with pytest.raises(error) as caught:
        built(place, text, **options)
    assert {one for one in os.listdir(machine.DATA) if one.startswith(("labs-build", "labs-c-"))} <= before
    assert not (place / "labs/partial").exists()
    assert image.Layout(place / "labs").names() == []
    return str(caught.value)


def added(made, layout, number):
    """What layer number (of those after the base's) adds, without the directories on the way."""
    return entries(layout, made)[number]


# The same Dockerfiles through other builders

# What buildah does otherwise, file by file: labs has it as Docker has.
ON_THE_WAY = {"srv", "srv/app", "etc", "tmp", "bin", "run"}  # buildah lists fewer of the parents
WORKDIRS = {"srv/app/mine", "srv/app/mine/deeper"}  # a layer of its own here, in the next RUN's there
MOUNT_POINTS = {"etc/hosts", "etc/hostname", "etc/resolv.conf"}  # what buildah leaves in the layer of a first RUN
OPAQUE = re.compile(r"srv/app/src/\.wh\..*")  # one opaque whiteout here, a whiteout for each name there
KEPT_OWNERS = {"mine/in", "mine/in/file"}  # --chown does not reach into an archive there


def comparable(layers):
    return [kept for layer in layers if (kept := {
        path: facts for path, facts in layer.items()
        if path not in ON_THE_WAY | WORKDIRS | MOUNT_POINTS | KEPT_OWNERS and not OPAQUE.fullmatch(path)})]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """buildah with a store of its own; a stage built for one test is in its cache for the next."""
    folder = tmp_path_factory.mktemp("buildah")
    command = ["buildah", "--storage-driver=overlay", f"--root={folder}/root", f"--runroot={folder}/run"]
    yield command
    out(*command, "rmi", "--all", "--force")


@pytest.fixture
def buildah(place, store):
    """`buildah build`; what it built as a layout, and its configuration."""

    def run(target=None, source=place, layers="true"):
        out(*store, "build", "--isolation=chroot", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024",
            f"--layers={layers}", "--format=docker", "--build-arg=BASE=oci:/opt/labs/images:busybox", "--tag=made",
            *([f"--target={target}"] if target else []), source / "context")
        config = json.loads(out(*store, "inspect", "--type=image", "made"))["Docker"]["config"]
        out(*store, "push", "--format=oci", "made", f"oci:{place}/buildah:made")
        return config

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What FILES builds from its context, once for all builders: its first stage as "build", the image as "None"."""
    place = tmp_path_factory.mktemp("files")
    (place / "context").mkdir()
    context(place / "context")
    image.Layout.create(place / "labs")
    for target in ("build", None):
        built(place, FILES, name=str(target), args={"BASE": "busybox"}, target=target)
    return place


@pytest.mark.parametrize("target", ["build", None])
def test_layers_as_buildah_makes_them(place, files, buildah, target):
    buildah(target, files)
    mine, theirs = comparable(entries(files / "labs", str(target))), comparable(entries(place / "buildah", "made"))
    assert mine == theirs
    assert len(mine) > (15 if target else 3)


def settings_of(config):
    """The comparable part of a configuration."""
    config = {key: value for key, value in config.items() if value and key in (
        "Env", "Cmd", "Entrypoint", "Labels", "ExposedPorts", "Volumes", "User", "WorkingDir", "Healthcheck",
        "StopSignal", "Shell")}
    config["Env"] = sorted(config["Env"])
    labels = {key: text for key, text in config.pop("Labels", {}).items() if not key.startswith("io.buildah")}
    return config | ({"Labels": labels} if labels else {})


@pytest.mark.parametrize("text", [SETTINGS, ENTRY], ids=["settings", "entrypoint"])
def test_settings_as_buildah_writes_them(place, buildah, text):
    made = built(place, text, args={"BASE": "busybox"})
    theirs = settings_of(buildah(layers="false"))  # one commit in place of twenty
    if "SHELL" in text:
        theirs["Cmd"] = ["/bin/busybox", "ash", "-c", "echo $A"]  # buildah gives CMD to /bin/sh, whatever SHELL says
    assert settings_of(made.image.run) == theirs


@pytest.fixture
def docker(place):
    """`docker build`; what it built as a layout, and its configuration."""

    def run(target=None, source=place):
        out("docker", "build", "--quiet", "--build-arg=BASE=busybox:lab", "--tag=labs-made", "--network=none",
            *([f"--target={target}"] if target else []), source / "context")
        out("skopeo", "copy", "docker-daemon:labs-made:latest", f"oci:{place}/docker:made")
        return json.loads(out("docker", "image", "inspect", "labs-made"))[0]["Config"]

    yield run
    out("docker", "image", "rm", "--force", "labs-made")


@pytest.mark.machine
@pytest.mark.parametrize("target", ["build", None])
def test_layers_as_docker_makes_them(place, files, docker, target):
    docker(target, files)
    mine, theirs = comparable(entries(files / "labs", str(target))), comparable(entries(place / "docker", "made"))
    assert mine == [{path: _whiteout_without_mode(path, entry) for path, entry in one.items()} for one in theirs]


@pytest.mark.machine
def test_here_documents_as_docker_runs_them(place, docker):
    built(place, SCRIPTS, args={"BASE": "busybox"})
    docker()
    assert comparable(entries(place / "labs", "made")) == comparable(entries(place / "docker", "made"))


def _whiteout_without_mode(path, entry):
    """Docker's whiteouts have mode 600; ours and buildah's the 0 of overlay's own, which no reader looks at."""
    kind, mode, *rest = entry
    return (kind, "0o0", *rest) if os.path.basename(path).startswith(".wh.") and mode == "0o600" else entry


@pytest.mark.machine
@pytest.mark.parametrize("text", [SETTINGS, ENTRY], ids=["settings", "entrypoint"])
def test_settings_as_docker_writes_them(place, docker, text):
    made = built(place, text, args={"BASE": "busybox"})
    assert settings_of(made.image.run) == settings_of(docker())


RUNS = """FROM busybox
RUN echo built > /word && adduser -D ann 2>/dev/null || echo 'ann:x:100:100::/:/bin/sh' >> /etc/passwd
WORKDIR /there
ENV MORE=more
USER ann
ENTRYPOINT ["sh", "-c"]
CMD ["cat /word; pwd; echo $MORE; id -u"]
"""


@pytest.mark.parametrize("engine", [["docker"], ["podman"], ["podman", f"--runtime={RUNTIME}"]],
                         ids=["docker", "podman", "labs-runtime"])
@pytest.mark.machine
def test_an_image_runs_under(place, engine):
    built(place, RUNS)
    to = "docker-daemon:labs-made:lab" if engine == ["docker"] else "containers-storage:localhost/labs-made:lab"
    out("skopeo", "copy", f"oci:{place}/labs:made", to)
    try:
        said = out(*engine, "run", "--rm", "--network=none", "labs-made:lab").split()
    finally:
        out(engine[0], "image", "rm", "--force", "labs-made:lab")
    assert said == ["built", "/there", "more", "100"]


def test_here_documents_of_run(place):
    built(place, SCRIPTS, args={"BASE": "busybox"})
    assert [set(layer) for layer in entries(place / "labs", "made")[1:]] == [{"one", "two"}, {"script"}]


# Keys and the cache

ORDER = """FROM busybox
COPY requirements /app/
RUN wc -c < /app/requirements > /app/installed
COPY source /app/
"""


def keys(made):
    return [step.key for step in made.steps]


def hits(made):
    return "".join("+" if step.cached else "-" for step in made.steps if step.layer)


@pytest.fixture
def sources(place):
    for name in ("requirements", "source"):
        (place / "context" / name).write_text(name)
    return place


def test_a_second_build_takes_every_layer_from_the_cache(sources):
    first, second = built(sources, ORDER), built(sources, ORDER)
    assert (hits(first), hits(second)) == ("---", "+++")
    assert first.image == second.image and keys(first) == keys(second)


@pytest.mark.parametrize(("change", "expected"), [("source", "++-"), ("requirements", "---")])
def test_a_changed_file_changes_its_layer_and_those_after_it(sources, change, expected):
    first = built(sources, ORDER)
    (sources / "context" / change).write_text("changed")
    second = built(sources, ORDER)
    assert hits(second) == expected
    assert [a == b for a, b in zip(keys(first), keys(second), strict=True)] == [True, *(hit == "+" for hit in expected)]


def test_a_touched_file_is_the_same_file_and_another_mode_is_not(sources):
    built(sources, ORDER)
    os.utime(sources / "context/source", (1, 1))
    assert hits(built(sources, ORDER)) == "+++"
    (sources / "context/source").chmod(0o700)
    assert hits(built(sources, ORDER)) == "++-"


@pytest.mark.parametrize(("old", "new", "expected"), [
    ("FROM busybox", "FROM busybox\nLABEL a=b", "+++"),
    ("FROM busybox", "FROM busybox\nENV a=b", "+--"),
    ("FROM busybox", "FROM busybox\nARG a=b", "+--"),
    ("FROM busybox", "FROM busybox\nUSER root", "+--"),
    ("wc -c", "wc  -c", "+--"),
    ("source /app/", "source /app/other", "++-"),
    ("COPY source", "COPY --chmod=600 source", "++-")])
def test_what_a_key_is_made_of(sources, old, new, expected):
    built(sources, ORDER)
    assert hits(built(sources, ORDER.replace(old, new))) == expected


def test_a_layer_that_is_gone_is_made_again(sources):
    first = built(sources, ORDER)
    os.unlink(image.Layout(sources / "labs").blob(first.steps[2].layer.digest))
    assert hits(built(sources, ORDER)) == "+-+"


def test_a_stage_that_gives_the_same_files_keeps_what_is_copied_from_it_cached(place):
    text = "FROM busybox AS one\nRUN echo x > /x # {}\nFROM busybox\nCOPY --from=one /x /\nRUN cat /x"
    built(place, text.format("a"))
    assert hits(built(place, text.format("b"))) == "-++"


def test_only_stages_that_are_needed_are_built(place):
    made = built(place, "FROM busybox AS no\nRUN false\nFROM busybox AS yes\nRUN true\nFROM no", target="yes")
    assert [step.stage for step in made.steps] == ["yes", "yes"]


# Times


def test_with_an_epoch_two_builds_from_nothing_have_the_same_digest(place):
    context(place / "context")
    options = {"args": {"BASE": "busybox"}, "epoch": EPOCH, "cache": False}
    first = built(place, FILES, **options)
    for path in (place / "context").rglob("*"):
        os.utime(path, follow_symlinks=False)
    assert built(place, FILES, **options).image.manifest == first.image.manifest
    _, config = documents(place / "labs", "made")
    assert config["created"] == "2023-11-14T22:13:20Z"


def test_without_an_epoch_only_times_differ(place):
    text = "FROM busybox\nRUN echo x > /x"
    first, second = (built(place, text, name, cache=False).image for name in ("one", "two"))
    assert first.diff_ids[-1] != second.diff_ids[-1]
    assert entries(place / "labs", "one") == entries(place / "labs", "two")


def test_the_epoch_is_an_arg(place):
    made = built(place, "FROM busybox\nARG SOURCE_DATE_EPOCH\nRUN echo $SOURCE_DATE_EPOCH > /x", epoch=EPOCH)
    assert "|1 SOURCE_DATE_EPOCH=1700000000 " in made.image.settings["history"][-1]["created_by"]


# Secrets

SECRET = "FROM busybox\nRUN --mount=type=secret,id=key{} cat {} > /seen && wc -c < /seen > /size && rm /seen"


@pytest.mark.parametrize("target", ["", "/var/deep/er/key", "/usr/bin/../key", "/etc/passwd"])
def test_nothing_of_a_secret_stays(place, target):
    (place / "key").write_text("hunter2")
    text = SECRET.format(f",target={target}" if target else "", target or "/run/secrets/key")
    made = built(place, text, secrets={"key": str(place / "key")})
    assert set(entries(place / "labs", "made")[-1]) == {"size"}
    assert "hunter2" not in json.dumps(made.image.settings)
    for blob in (place / "labs").rglob("*"):
        assert blob.is_dir() or b"hunter2" not in blob.read_bytes()


def test_what_run_itself_writes_beside_a_secret_stays(place):
    (place / "key").write_text("x")
    text = "FROM busybox\nRUN --mount=type=secret,id=key touch /run/secrets/own"
    built(place, text, secrets={"key": str(place / "key")})
    assert set(entries(place / "labs", "made")[-1]) == {"run", "run/secrets", "run/secrets/own"}


def test_an_image_without_proc_gets_none_from_run(place):
    built(place, 'FROM scratch\nCOPY --from=busybox /bin/busybox /bin/sh\nRUN ["/bin/sh", "-c", "echo x > /x"]')
    assert set(entries(place / "labs", "made")[-1]) == {"x"}


# Who runs, where to


def run_output(place, text, **options):
    """What the last RUN wrote to /out."""
    made = built(place, text, **options)
    with tarfile.open(image.Layout(place / "labs").blob(made.image.layers[-1].digest)) as tar:
        return tar.extractfile("out").read().decode()


PEOPLE = """FROM busybox
RUN echo 'ann:x:100:200::/home/ann:/bin/sh' >> /etc/passwd; echo 'extra:x:300:bob,ann' >> /etc/group
RUN mkdir -m 777 /w && touch /out && chmod 666 /out
"""


@pytest.mark.parametrize(("user", "expected"), [
    ("ann", "100 200 200 300 /home/ann"), ("100", "100 200 200 300 /home/ann"), ("ann:extra", "100 300 300 /home/ann"),
    ("55", "55 0 0 /"), ("55:66", "55 66 66 /"), ("root", "0 0 0 /root")])
def test_run_is_who_user_says(place, user, expected):
    text = f"{PEOPLE}USER {user}\nRUN echo $(id -u; id -g; id -G) $HOME > /out"
    assert run_output(place, text).split() == expected.split()


def test_proxies_reach_run_and_are_written_nowhere(place):
    text = "FROM busybox\nRUN echo $HTTP_PROXY > /out"
    assert run_output(place, text, args={"HTTP_PROXY": "http://user:pass@proxy"}) == "http://user:pass@proxy\n"
    assert "pass@" not in json.dumps(documents(place / "labs", "made"))


def test_an_arg_of_the_caller_wins_and_env_wins_over_it(place):
    text = "ARG A=1\nFROM busybox\nARG A\nARG B=$A\nENV E=env\nARG E=arg\nRUN echo $A $B $E > /out"
    assert run_output(place, text) == "1 1 env\n"
    assert run_output(place, text, args={"A": "2", "E": "3"}) == "2 2 env\n"


def test_links_of_the_image_lead_within_the_image(place):
    made = built(place, "FROM busybox\nRUN ln -s /srv /link && mkdir /srv && ln -s ../../../../etc /up\n"
                 "COPY Dockerfile /link/\nCOPY Dockerfile /up/file")
    layers = entries(place / "labs", "made")
    assert set(layers[-2]) == {"srv", "srv/Dockerfile"} and set(layers[-1]) == {"etc", "etc/file"}
    assert made.steps[-1].layer is not None


# .dockerignore and patterns


@pytest.mark.parametrize(("lines", "path", "hidden"), [
    ("a", "a", True), ("a", "a/b/c", True), ("a", "b/a", False), ("/a/", "a", True), ("*/a", "b/a", True),
    ("**/a", "b/c/a", True), ("**/a", "a", True), ("a/**", "a/b/c", True), ("**", "x", True), ("*.o", "d/x.o", False),
    ("a\n!a/b", "a/b", False), ("a\n!a/b", "a/c", True), ("!a\na", "a", True), ("# a\na ", "a", True),
    ("#a", "#a", False), ("a?c", "abc", True), ("a?c", "a/c", False), ("[a-c]x", "bx", True), ("[^a-c]x", "bx", False),
    ("a\\*b", "a*b", True), ("a\\*b", "axb", False), ("x/../a", "a", True), (".", "a", False), ("a**b", "axxb", True)])
def test_dockerignore(lines, path, hidden):
    assert build_copy.ignored(lines)(path) is hidden


def test_a_dockerignore_of_its_own_goes_with_a_dockerfile(place):
    (place / "context/a").write_text("")
    (place / "context/.dockerignore").write_text("")
    (place / "context/Dockerfile.dockerignore").write_text("a")
    assert "Dockerfile:2: COPY: 'a': no such file" in refused(place, "FROM busybox\nCOPY a /")


# What is refused


@pytest.mark.parametrize(("text", "said"), [
    ("RUN echo before; echo why >&2; exit 7",
     "Dockerfile:2: RUN: 'echo before; echo why >&2; exit 7': exit code 7\n  before\n  why"),
    ("RUN sh -c 'kill -9 $$'; exit $?",
     """Dockerfile:2: RUN: "sh -c 'kill -9 $$'; exit $?": exit code 137"""),
    ('\nRUN ["nothing"]',
     "Dockerfile:3: RUN: 'nothing': exit code 127\n  execve nothing: command not found"),
    ("COPY missing /", "Dockerfile:2: COPY: 'missing': no such file in the context"),
    ("COPY m*g /", "Dockerfile:2: COPY: 'm*g': no such file in the context"),
    ("COPY ../outside /", "Dockerfile:2: COPY: '../outside': must not lead out of the context"),
    ("COPY out /", "Dockerfile:2: COPY: 'out': a symbolic link leads out of the context"),
    ("COPY up/x /", "Dockerfile:2: COPY: 'up/x': a symbolic link leads out of the context"),
    ("COPY --from=no /a /", "Dockerfile:2: COPY: 'no': must be an earlier stage or an image: busybox"),
    ("FROM busybox AS a\nFROM busybox\nCOPY --from=1 /a /", "Dockerfile:3: COPY: '1': must be an earlier stage"),
    ("FROM no", "Dockerfile:1: FROM: 'no': must be one of busybox"),
    ("FROM --platform=linux/other busybox", "Dockerfile:1: FROM: 'linux/other': must be linux/"),
    ("COPY --chown=no Dockerfile /", "Dockerfile:2: COPY: 'no': no such user in the image's /etc/passwd"),
    ("COPY --chown=0:no Dockerfile /", "Dockerfile:2: COPY: 'no': no such group in the image's /etc/group"),
    ("USER no\nRUN true", "Dockerfile:3: RUN: 'no': no such user"),
    ("COPY Dockerfile Dockerfile /a", "Dockerfile:2: COPY: '/a': must end with /"),
    ("COPY Dockerfile /bin/sh/x", "Dockerfile:2: COPY: '/bin/sh': must be a directory"),
    ("ADD bad.tar /", "Dockerfile:2: ADD: '../x': path must not have .. in it"),
    ("ADD a.bz2 /", "Dockerfile:2: ADD: 'a.bz2': bzip2 is not unpacked here"),
    ("RUN --mount=type=secret,id=k,required=true true", "Dockerfile:2: RUN: 'k': no such secret was given"),
    ("RUM true", "Dockerfile:2: RUM: 'true': no such instruction"),
    ("ONBUILD RUN true", "Dockerfile:2: ONBUILD: 'RUN true': not carried out here"),
])
def test_an_error_names_file_line_and_instruction_and_nothing_stays(place, text, said):
    (place / "context/out").symlink_to("/etc/passwd")
    (place / "context/up").symlink_to("..")
    (place / "outside").write_text("")
    (place / "context/a.bz2").write_bytes(b"BZh91AY")
    with tarfile.open(place / "context/bad.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../x"))
    whole = text if text.startswith("FROM") else f"FROM busybox\n{text}"
    assert refused(place, whole).startswith(said)


@pytest.mark.parametrize(("options", "said"), [
    ({"args": {"NO": "1"}}, "args: 'NO': must be an ARG of Dockerfile: A"),
    ({"secrets": {"k": "/nowhere"}}, "secrets: 'k': must be the path of a file"),
    ({"target": "no"}, "target: 'no': must be a stage of Dockerfile: 0"),
    ({"dockerfile": "Other"}, "source: 'Other': no such file in the context")])
def test_what_build_is_called_with(place, options, said):
    assert refused(place, "FROM busybox\nARG A\nRUN true", BadInput, **options) == said


@pytest.mark.machine
def test_what_was_finished_before_an_error_is_in_the_cache(place):
    refused(place, "FROM busybox\nRUN echo x > /x\nRUN false")
    assert hits(built(place, "FROM busybox\nRUN echo x > /x\nRUN true")) == "+-"
