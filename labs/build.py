"""A small builder of images: each instruction of a Dockerfile is carried out in a container, what it wrote is a layer.

RUN is a labs.container on the layers so far, COPY and ADD write into their overlay; the upper directory, packed,
is the next layer.  Every other instruction changes only the configuration.  RUN has no network.

Cache keys are told in labs.build_cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import NamedTuple

from labs import build_config, build_copy, dockerfile, image, machine
from labs.build_cache import Store, key_of, stack
from labs.build_config import PROXIES, State
from labs.build_copy import Copy, Source, Tree
from labs.build_root import forget
from labs.container import Bind, Container
from labs.dockerfile import DockerfileError, Instruction, located
from labs.errors import BadInput, CommandNotFound, NotExecutable
from labs.mounts import opened

HOSTNAME = "labs-build"
SCRIPT = "/dev/pipes/script"  # where a here-document that begins with #! is while it runs
LAST_LINES = 10
PLATFORM = {"PLATFORM": str(image.HOST), "OS": image.HOST.os, "ARCH": image.HOST.architecture}


class Step(NamedTuple):
    """An instruction that was carried out.

    Attributes:
        stage: the name of its stage, or its number from 0.
        line, text: where it begins in the Dockerfile, and the instruction as written.
        key: its cache key, 64 hexadecimal digits; None if it makes no layer.
        cached: whether the layer was taken from the cache.
        layer: None if it makes none.
    """

    stage: str
    line: int
    text: str
    key: str | None
    cached: bool
    layer: image.Descriptor | None


class Built(NamedTuple):
    """The image, and what was done for it, in order."""

    image: image.Image
    steps: list[Step]


class RunFailed(DockerfileError):
    """The command of a RUN ended with ``code`` (128 and its number for a signal); ``output`` is what it wrote."""

    def __init__(self, file: str, instruction: Instruction, code: int, output: str) -> None:
        end = "".join(f"\n  {line}" for line in output.splitlines()[-LAST_LINES:])
        super().__init__(file, instruction.line, "RUN", instruction.words[0], f"exit code {code}{end}")
        self.code, self.output = code, output


def build(context: str, layout: image.Layout, name: str, *, dockerfile: str = "Dockerfile", target: str | None = None,
          args: Mapping[str, str] | None = None, secrets: Mapping[str, str] | None = None, epoch: int | None = None,
          cache: bool = True, bases: image.Layout | None = None, timeout: float = 3600,
          progress: Callable[[Step], object] = bool) -> Built:
    """Build the image that a Dockerfile describes into a layout, under a name.

    context: the directory that COPY and ADD see.  dockerfile: a path relative to it.  target: a stage, the last
    one without.  args: values of ARGs.  secrets: files by id, for RUN --mount=type=secret.  epoch: no time in the
    image is later (SOURCE_DATE_EPOCH, seconds); with it the same input gives the same digest.  cache: whether
    layers made before are used again.  bases: where FROM finds images, the layout itself without; "scratch" is
    none.  timeout: seconds for one RUN.  progress is called with each Step.

    Raises DockerfileError with file and line (RunFailed for a command); nothing half-made stays, and what was
    finished stays in the cache.
    """
    machine.require()
    os.makedirs(machine.DATA, exist_ok=True)
    with ExitStack() as undo:
        folder = tempfile.mkdtemp(prefix=f"{machine.PREFIX}build-", dir=machine.DATA)
        undo.callback(machine.remove_tree, folder)
        tree = undo.enter_context(build_copy.context(context, _ignore(context, dockerfile)))
        options = Asked(bases or layout, dict(args or {}), dict(secrets or {}), timeout, progress)
        builder = _Builder(tree, Store(layout, folder, epoch, cache), dockerfile, options)
        return builder.finish(name, target)


def _ignore(context: str, file: str) -> str:
    """The text of the .dockerignore that goes with a Dockerfile."""
    for name in (f"{file}.dockerignore", ".dockerignore"):
        if os.path.isfile(path := os.path.join(context, name)):
            with open(path, encoding="utf-8") as found:
                return found.read()
    return ""


class Asked(NamedTuple):
    """What build() was asked for."""

    bases: image.Layout
    args: dict[str, str]
    secrets: dict[str, str]
    timeout: float
    progress: Callable[[Step], object]


class _Builder:
    """One build: its Dockerfile, the stages that were built so far, the steps that were taken."""

    def __init__(self, tree: Tree, store: Store, file: str, options: Asked) -> None:
        self.tree, self.store, self.path, self.options = tree, store, file, options
        with opened(tree.open(file, os.O_RDONLY)) as fd, open(fd, encoding="utf-8", closefd=False) as text:
            self.file = dockerfile.parse(text.read(), file)
        self.given = {**options.args, **({} if store.epoch is None else {"SOURCE_DATE_EPOCH": str(store.epoch)})}
        self.defaults = {f"{side}{name}": text for side in ("BUILD", "TARGET") for name, text in PLATFORM.items()}
        for one in self.file.args:
            build_config.declare(one, self.defaults, self.given, {}, self._expand)
        self.names = [stage.name or str(number) for number, stage in enumerate(self.file.stages)]
        self.done: dict[int, State] = {}
        self.steps: list[Step] = []
        self._check_options()

    def _check_options(self) -> None:
        every = [*self.file.args, *(one for stage in self.file.stages for one in stage.instructions)]
        known = {word.partition("=")[0] for one in every if one.name == "ARG" for word in one.words}
        for name in self.options.args.keys() - known.union(PROXIES):
            raise BadInput("args", name, f"must be an ARG of {self.path}: {', '.join(sorted(known)) or 'it has none'}")
        for name, path in self.options.secrets.items():
            if not os.path.isfile(path):
                raise BadInput("secrets", name, "must be the path of a file")

    def _expand(self, text: str) -> str:
        """What stands in a FROM or before the first one: only the ARGs from there count."""
        return dockerfile.expand(text, self.defaults, self.file.escape)

    def finish(self, name: str, target: str | None) -> Built:
        """Build the stage and what it needs, and write its configuration and manifest."""
        number = len(self.names) - 1 if target is None else self._earlier(target, len(self.names))
        if number is None:
            raise BadInput("target", target, f"must be a stage of {self.path}: {', '.join(self.names)}")
        state, epoch = self.stage(number), self.store.epoch
        moment = max(self.store.created, default=int(time.time())) if epoch is None else epoch
        history = [{"created": image.timestamp(moment), **one} for one in state.history]
        return Built(image.add_image(self.store.layout, state.layers, config=state.config, history=history,
                                     epoch=moment, name=name), self.steps)

    def _earlier(self, name: str, before: int) -> int | None:
        """The number of a stage given by name or number, if it stands before another."""
        known = self.names[:before]
        if name.lower() in known:
            return known.index(name.lower())
        return int(name) if name.isdecimal() and int(name) < before else None

    # Stages

    def stage(self, number: int) -> State:
        """The state at the end of a stage, which is built once."""
        if number not in self.done:
            stage = self.file.stages[number]
            for name in (one.flags.get("from", "") for one in stage.instructions):
                if (needed := self._earlier(name, number)) is not None:
                    self.stage(needed)
            with located(self.path, stage.line, "FROM"):
                state = self._from(stage, number)
            self._note(Step(self.names[number], stage.line, f"FROM {stage.base}", state.key, cached=False, layer=None))
            for instruction in stage.instructions:
                with located(self.path, instruction.line, instruction.name):
                    self._carry_out(state, instruction, number)
            self.done[number] = state
        return self.done[number]

    def _from(self, stage: dockerfile.Stage, number: int) -> State:
        """An earlier stage, nothing at all, or an image."""
        base = self._expand(stage.base)
        if self._expand(stage.platform or "") not in ("", str(image.HOST)):
            raise BadInput("platform", stage.platform, f"must be {image.HOST}: nothing else runs here")
        fresh = State(key_of("FROM", base, self.store.epoch), [], build_config.with_path({}), [], self.given,
                      self.defaults, self.file.escape)
        earlier = None if base.isdecimal() else self._earlier(base, number)
        if earlier is not None:
            known = self.stage(earlier)
            return replace(fresh, key=known.key, layers=[*known.layers], config={**known.config},
                           history=[*known.history])
        if base == "scratch":
            return fresh
        found = image.load(self.options.bases, base)
        self.store.take_over(self.options.bases, found.layers)
        return replace(fresh, key=key_of("FROM", found.manifest.digest, self.store.epoch), layers=stack(found),
                       config=build_config.with_path(found.run), history=[*(found.settings.get("history") or [])])

    def _carry_out(self, state: State, instruction: Instruction, number: int) -> None:
        key, layer, cached = None, None, False
        if instruction.name in build_config.METADATA:
            text = build_config.METADATA[instruction.name](state, instruction)
            state.history.append({"created_by": text, "empty_layer": True})
        else:
            if instruction.name == "RUN":
                cached = self._run(state, instruction)
            elif instruction.name == "WORKDIR":
                cached = self._workdir(state, instruction)
            else:
                cached = self._copy(state, instruction, number)
            key, layer = state.key, state.layers[-1][0]
        self._note(Step(self.names[number], instruction.line, instruction.text, key, cached, layer))

    def _note(self, step: Step) -> None:
        self.steps.append(step)
        self.options.progress(step)

    # RUN

    def _run(self, state: State, instruction: Instruction) -> bool:
        argv, env = state.command(instruction), state.variables
        args = [f"{name}={text}" for name, text in state.args.items() if name not in state.env]
        secrets = [one for one in instruction.secrets if one.required or one.id in self.options.secrets]
        for one in secrets:
            if one.id not in self.options.secrets:
                raise BadInput("mount", one.id, "no such secret was given")
        binds = [Bind(self.options.secrets[one.id], one.target, readonly=True) for one in secrets]
        facts = ["RUN", argv, env, state.workdir, state.user, [[one.id, one.target] for one in secrets]]
        shown = " ".join(["RUN", *([f"|{len(args)}", *args] if args else []), *argv])
        return self.store.add(state, shown, facts, lambda: self._ran(state, instruction, argv, binds))

    @contextmanager
    def _ran(self, state: State, instruction: Instruction, argv: list[str], binds: list[Bind]) -> Iterator[str]:
        """Run the command in a container on the layers so far; its upper directory, without the mount points."""
        with self.store.root(state.layers) as root:
            who, home = root.user(state.user)
            before = root.before(["/proc", "/dev", "/sys", *(bind.target for bind in binds)])
        if not instruction.exec_form and argv[-1].startswith("#!"):
            binds, argv = [*binds, Bind(self._script(argv[-1]), SCRIPT, readonly=True)], [SCRIPT]
        proxies = {name: text for name, text in self.options.args.items() if name in PROXIES}
        box = Container(argv, rootfs=self.store.directories(state.layers), hostname=HOSTNAME, cwd=state.workdir,
                        env={**proxies, "HOME": home, **state.variables}, mounts=binds, run_as=who)
        with ExitStack() as undo:
            try:
                result = undo.enter_context(box).wait(self.options.timeout)
            except (CommandNotFound, NotExecutable) as error:
                raise RunFailed(self.path, instruction, error.code, str(error)) from error
            if result.code != 0:
                code = 128 + (result.signal or 0) if result.code is None else result.code
                raise RunFailed(self.path, instruction, code, result.stdout + result.stderr)
            forget(box.upper, before)
            yield box.upper

    def _script(self, text: str) -> str:
        """A here-document that is a script of its own, as a file that can be executed."""
        path = f"{self.store.folder}/script"
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, 0o755)  # noqa: S103  whoever USER is
        return path

    # WORKDIR, COPY, ADD

    def _workdir(self, state: State, instruction: Instruction) -> bool:
        path = state.absolute(state.expand(instruction.words[0]))
        state.set("WorkingDir", path)
        return self.store.add(state, f"WORKDIR {path}", ["WORKDIR", path], lambda: self._folder(state, path))

    @contextmanager
    def _folder(self, state: State, path: str) -> Iterator[str]:
        with self.store.root(state.layers) as root:
            os.close(root.folder(path))
            yield root.upper

    def _copy(self, state: State, instruction: Instruction, number: int) -> bool:
        *given, destination = [state.expand(word) for word in instruction.words]
        chown, chmod = (state.expand(instruction.flags.get(flag, "")) for flag in ("chown", "chmod"))
        with ExitStack() as undo:
            tree = self._tree(instruction.flags.get("from"), number, undo)
            sources = build_copy.collect(tree, [dockerfile.local(one) for one in given], undo)
            sources += self._documents(state, instruction, undo)
            folder = destination.endswith(("/", "/.")) or destination == "."
            if len(sources) > 1 and not folder:
                raise BadInput("destination", destination, "must end with / where there are several sources")
            copy = Copy(sources, state.absolute(destination), folder, chown, dockerfile.mode(chmod) if chmod else None,
                        tree.owned, unpack=instruction.name == "ADD")
            text = " ".join([instruction.name, *given, destination])
            return self.store.add(state, text, [instruction.name, *copy.facts()], lambda: self._put(state, copy))

    @contextmanager
    def _put(self, state: State, copy: Copy) -> Iterator[str]:
        with self.store.root(state.layers) as root:
            copy.put(root, self.store.folder)
            yield root.upper

    def _tree(self, name: str | None, number: int, undo: ExitStack) -> Tree:
        """Where COPY finds its sources: in the context, an earlier stage, or an image."""
        if name is None:
            return self.tree
        earlier, bases = self._earlier(name, number), self.options.bases
        if earlier is not None:
            root = self.store.root(self.stage(earlier).layers)
        elif name in bases.names():
            found = image.load(bases, name)
            root = self.store.root(stack(found), bases)
        else:
            there = ", ".join([*self.names[:number], *bases.names()]) or "there is none"
            raise BadInput("from", name, f"must be an earlier stage or an image: {there}")
        return Tree(undo.enter_context(root).fd, name)

    def _documents(self, state: State, instruction: Instruction, undo: ExitStack) -> list[Source]:
        """The here-documents of COPY and ADD, as files of those names."""
        folder = tempfile.mkdtemp(dir=self.store.folder)
        for one in instruction.heredocs:
            text = dockerfile.expand(one.text, state.variables, state.escape, quotes=False) if one.expand else one.text
            with open(f"{folder}/{one.name}", "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(f"{folder}/{one.name}", 0o644)
        tree = undo.enter_context(build_copy.context(folder))
        return build_copy.collect(tree, [one.name for one in instruction.heredocs], undo)
