"""A stage while it is being built, and the instructions that make no layer: they only change the configuration.

What they write there is in image-spec/config.md, "Properties"; Healthcheck, Shell and OnBuild are Docker's own.
Each function here is one instruction of Docker's reference and gives back what `docker history` shows of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from labs import dockerfile, process
from labs.dockerfile import Instruction
from labs.image import Descriptor

# "Predefined ARGs": they reach RUN without an ARG instruction, and are kept out of keys and history.
PROXIES = tuple(name for one in ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
                for name in (one, one.lower()))
SHELL = ("/bin/sh", "-c")
CHECK_TIMES = {"interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod",
               "start-interval": "StartInterval"}


@dataclass
class State:
    """A stage as far as it has come.

    key: the cache key of its last layer.  layers: descriptor and diffID, the lowest first.  config, history: as in
    the image's configuration.  args: the values of its ARGs.  given: those of the caller; defaults: those of the
    ARGs before the first FROM.
    """

    key: str
    layers: list[tuple[Descriptor, str]]
    config: dict[str, Any]
    history: list[dict[str, Any]]
    given: Mapping[str, str]
    defaults: Mapping[str, str]
    escape: str
    args: dict[str, str] = field(default_factory=dict)
    has_command: bool = False

    @property
    def env(self) -> dict[str, str]:
        """ENV, by name."""
        return {name: value for name, _, value in (one.partition("=") for one in self.config.get("Env") or [])}

    @property
    def variables(self) -> dict[str, str]:
        """What $NAME stands for: an ENV wins over an ARG of the same name."""
        return self.args | self.env

    @property
    def workdir(self) -> str:
        """Where relative paths begin."""
        return self.config.get("WorkingDir") or "/"

    @property
    def user(self) -> str:
        """Who runs a command; "" is root."""
        return self.config.get("User") or ""

    def absolute(self, path: str) -> str:
        """A path as WORKDIR has it, without . and .. in it."""
        return "/" + os.path.normpath(os.path.join(self.workdir, path)).lstrip("/")

    def expand(self, text: str) -> str:
        """Variables put in, quotes taken off."""
        return dockerfile.expand(text, self.variables, self.escape)

    def pairs(self, instruction: Instruction) -> dict[str, str]:
        """The words NAME=VALUE, expanded; all of one instruction see the variables as they were before it."""
        return {self.expand(name): self.expand(value) for name, _, value in
                (word.partition("=") for word in instruction.words)}

    def words(self, instruction: Instruction) -> list[str]:
        """The words, expanded; of those not quoted, each blank in a value begins a new one."""
        if instruction.exec_form:
            return [self.expand(word) for word in instruction.words]
        return [one for word in instruction.words for one in dockerfile.words(word, self.variables, self.escape)]

    def command(self, instruction: Instruction) -> list[str]:
        """The argv of CMD, ENTRYPOINT and RUN: the words of a JSON array, or the shell and the text."""
        if instruction.exec_form:
            return list(instruction.words)
        return [*(self.config.get("Shell") or SHELL), dockerfile.command(instruction)]

    def set(self, name: str, value: Any) -> None:
        """A property of the configuration; an empty one is left out."""
        self.config.pop(name, None)
        if value:
            self.config[name] = value


def arg(state: State, instruction: Instruction) -> str:
    """ARG: the caller's value, else the one written here, else that of an ARG before the first FROM."""
    values = dict(state.args)
    declare(instruction, values, state.given, state.defaults, state.expand)
    state.args = values
    names = [word.partition("=")[0] for word in instruction.words]
    return " ".join(["ARG", *(f"{name}={values[name]}" if name in values else name for name in names)])


def declare(instruction: Instruction, values: dict[str, str], given: Mapping[str, str], defaults: Mapping[str, str],
            expand: Callable[[str], str]) -> None:
    """Give the names of an ARG their values; a name that has none stays unset."""
    for word in instruction.words:
        name, written, default = word.partition("=")
        if name in given:
            values[name] = given[name]
        elif written:
            values[name] = expand(default)
        elif name in defaults:
            values[name] = defaults[name]


def env(state: State, instruction: Instruction) -> str:
    """ENV: in every later RUN, and in every container."""
    pairs = state.pairs(instruction)
    state.set("Env", [f"{name}={value}" for name, value in (state.env | pairs).items()])
    return _shown("ENV", pairs)


def label(state: State, instruction: Instruction) -> str:
    """LABEL: texts about the image."""
    pairs = state.pairs(instruction)
    state.set("Labels", {**(state.config.get("Labels") or {}), **pairs})
    return _shown("LABEL", pairs)


def _shown(name: str, pairs: Mapping[str, str]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in pairs.items())])


def expose(state: State, instruction: Instruction) -> str:
    """EXPOSE: ports that somebody may publish."""
    ports = dockerfile.ports(state.words(instruction))
    state.set("ExposedPorts", {**(state.config.get("ExposedPorts") or {}), **{port: {} for port in ports}})
    return " ".join(["EXPOSE", *ports])


def volume(state: State, instruction: Instruction) -> str:
    """VOLUME: directories that a container gets a volume on."""
    paths = state.words(instruction)
    state.set("Volumes", {**(state.config.get("Volumes") or {}), **{path: {} for path in paths}})
    return " ".join(["VOLUME", *paths])


def user(state: State, instruction: Instruction) -> str:
    """USER: who runs every later RUN, and every container."""
    state.set("User", state.expand(instruction.words[0]))
    return f"USER {state.config.get('User', '')}"


def stopsignal(state: State, instruction: Instruction) -> str:
    """STOPSIGNAL: what ends a container gently."""
    state.set("StopSignal", state.expand(instruction.words[0]))
    return f"STOPSIGNAL {state.config.get('StopSignal', '')}"


def shell(state: State, instruction: Instruction) -> str:
    """SHELL: what the shell forms of RUN, CMD and ENTRYPOINT are given to."""
    state.set("Shell", list(instruction.words))
    return f"SHELL {json.dumps(instruction.words)}"


def cmd(state: State, instruction: Instruction) -> str:
    """CMD: what runs, or the arguments of ENTRYPOINT."""
    state.set("Cmd", state.command(instruction))
    state.has_command = True
    return f"CMD {json.dumps(state.command(instruction))}"


def entrypoint(state: State, instruction: Instruction) -> str:
    """ENTRYPOINT: what always runs.  A CMD of the base image was meant for another one, and goes."""
    state.set("Entrypoint", state.command(instruction))
    if not state.has_command:
        state.set("Cmd", None)
    return f"ENTRYPOINT {json.dumps(state.command(instruction))}"


def healthcheck(state: State, instruction: Instruction) -> str:
    """HEALTHCHECK: a command that says whether a container is well; times in nanoseconds."""
    kind, *words = instruction.words
    test = [kind, *words] if kind == "NONE" or instruction.exec_form else ["CMD-SHELL", *words]
    check: dict[str, Any] = {"Test": test}
    for flag, name in CHECK_TIMES.items():
        if length := dockerfile.nanoseconds(instruction.flags.get(flag, "0")):
            check[name] = length
    if retries := int(instruction.flags.get("retries", "0")):
        check["Retries"] = retries
    state.set("Healthcheck", check)
    return f"HEALTHCHECK {json.dumps(check)}"


METADATA: dict[str, Callable[[State, Instruction], str]] = {
    "ARG": arg, "ENV": env, "LABEL": label, "EXPOSE": expose, "VOLUME": volume, "USER": user, "CMD": cmd,
    "ENTRYPOINT": entrypoint, "HEALTHCHECK": healthcheck, "SHELL": shell, "STOPSIGNAL": stopsignal,
}


def with_path(config: Mapping[str, Any]) -> dict[str, Any]:
    """A base image's configuration, with a PATH where it has none: a shell could find nothing without."""
    own = list(config.get("Env") or [])
    if not any(one.startswith("PATH=") for one in own):
        own.insert(0, f"PATH={process.DEFAULT_PATH}")
    return {**config, "Env": own}
