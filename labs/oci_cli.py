"""The command line of labs-runtime: that of runc, as far as Podman, containerd and a learner use it.

runc(8) and its pages name every option; crun's ``--cgroup-manager`` is understood too.  Any other
option is refused by its name.
"""

from __future__ import annotations

import os
import sys

from labs import oci, oci_config, oci_json
from labs.errors import BadInput, LabError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# option: True where it takes a value
GLOBAL = {"root": True, "log": True, "log-format": True, "systemd-cgroup": False, "cgroup-manager": True,
          "debug": False, "rootless": True, "version": False, "help": False}
CREATE = {"bundle": True, "pid-file": True, "console-socket": True, "preserve-fds": True, "no-pivot": False,
          "no-new-keyring": False, "config": True}
SHORT = {"b": "bundle", "d": "detach", "p": "process", "e": "env", "t": "tty", "u": "user", "f": "force", "a": "all",
         "c": "cap", "q": "quiet", "h": "help", "v": "version", "g": "additional-gids"}
COMMANDS: dict[str, dict[str, bool]] = {
    "create": CREATE,
    "run": CREATE | {"detach": False, "keep": False},
    "start": {}, "state": {}, "pause": {}, "resume": {}, "features": {},
    "kill": {"all": False}, "delete": {"force": False},
    "exec": {"process": True, "detach": False, "pid-file": True, "console-socket": True, "cwd": True, "env": True,
             "tty": False, "user": True, "additional-gids": True, "cap": True, "no-new-privs": False,
             "apparmor": True, "preserve-fds": True, "ignore-paused": False},
    "list": {"format": True, "quiet": False}, "ps": {"format": True},
}
REPEATED = ("env", "cap", "additional-gids")
ANY_OPTIONS = ("ps",)  # what follows the id is for ps(1)
MANAGERS = ("cgroupfs", "systemd", "disabled")


class Usage(LabError):
    """The command line is not one of runc's."""


def parse(words: list[str], known: dict[str, bool], where: str) -> tuple[dict[str, Any], list[str]]:
    """The options before the first plain word, and the words from there on."""
    given: dict[str, Any] = {}
    words = list(words)
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        if word == "--":
            break
        name, has_value, value = word.lstrip("-").partition("=")
        name = SHORT.get(name, name)
        if name not in known:
            raise Usage(f"{where}: option {word.partition('=')[0]} is not known to labs-runtime")
        if known[name] and not has_value:
            if not words:
                raise Usage(f"{where}: option --{name} needs a value")
            value = words.pop(0)
        if known[name]:
            given[name] = [*given.get(name, []), value] if name in REPEATED else value
        else:
            given[name] = not has_value or value in ("true", "1", "t", "T", "TRUE", "True")
    return given, words


def options_of(given: dict[str, Any]) -> oci.Options:
    """The Options that the words stand for."""
    options = oci.Options()
    options.root = os.path.abspath(given.get("root") or oci.ROOT)
    for name in ("bundle", "config", "pid-file", "console-socket"):
        if given.get(name):
            setattr(options, name.replace("-", "_"), given[name])
    for name in ("no-pivot", "no-new-keyring", "detach", "keep"):
        setattr(options, name.replace("-", "_"), bool(given.get(name)))
    for path in ("pid_file", "console_socket"):
        if getattr(options, path):
            setattr(options, path, os.path.abspath(getattr(options, path)))
    options.preserve_fds = _number("--preserve-fds", given.get("preserve-fds") or "0")
    options.preserve_fds += _number("LISTEN_FDS", os.environ.get("LISTEN_FDS") or "0")
    options.manager = given.get("cgroup-manager") or ("systemd" if given.get("systemd-cgroup") else "cgroupfs")
    if options.manager not in MANAGERS:
        raise Usage(f"--cgroup-manager: {options.manager!r}: must be one of {', '.join(MANAGERS)}")
    return options


def _number(field: str, text: str) -> int:
    if not text.isdigit():
        raise BadInput(field, text, "must be a whole number, 0 or more")
    return int(text)


def close_the_rest(preserve: int) -> None:
    """No descriptor of the caller's but 0, 1, 2 and those it asked to keep goes into a container (CVE-2024-21626)."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), int(name) < 3 + preserve)
            except OSError:
                continue  # the one that listed them


# --- the commands ---


def create(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """create ID"""
    close_the_rest(options.preserve_fds)
    options.detach = True
    oci.create(options, words[0])
    return 0


def run(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """run ID: create, start, and unless --detach wait for the end and delete."""
    close_the_rest(options.preserve_fds)
    waiting = _listen(options)
    pid, console = oci.create(options, words[0])
    try:
        oci.start(options, words[0])
        if options.detach:
            return 0
        return _attend(pid, console, waiting)
    except BaseException:
        options.keep = False
        raise
    finally:
        if (not options.detach and not options.keep) or sys.exc_info()[0]:
            oci.delete(options, words[0], force=True)


def execute(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """exec ID COMMAND…, or exec --process FILE ID"""
    close_the_rest(options.preserve_fds)
    waiting = _listen(options)
    pid, console = oci.execute(options, words[0], _process(options, given, words), bool(given.get("ignore-paused")))
    return 0 if options.detach else _attend(pid, console, waiting)


def _listen(options: oci.Options) -> list[int]:
    """The signals that come before the process is there to take them, unless nobody stays for it."""
    if options.detach:
        return []
    from labs import oci_attend
    return oci_attend.listen()


def _attend(pid: int, console: int, waiting: list[int]) -> int:
    """Stay until the process has ended: pass signals on, carry its terminal; its status as a shell shows it."""
    from labs import oci_attend
    return oci_attend.attend(pid, console, waiting)


def _process(options: oci.Options, given: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """The process object of exec: from --process, or that of the container with what the words change."""
    if given.get("process"):
        with open(given["process"], encoding="utf-8") as file:
            value = oci_json.loads(file.read(), "process")
        return oci_config.process(value)
    if len(words) < 2:
        raise Usage("exec: needs a command, or --process FILE")
    process = dict(oci.OciContainer(options.root, words[0]).config["process"])
    env = [*(process.get("env") or []), *given.get("env", [])]
    process.update(args=words[1:], terminal=bool(given.get("tty")), env=env)
    process["cwd"] = given.get("cwd") or process["cwd"]
    if given.get("no-new-privs"):
        process["noNewPrivileges"] = True
    if given.get("apparmor"):
        process["apparmorProfile"] = given["apparmor"]
    if given.get("user") or given.get("additional-gids"):
        process["user"] = _user(dict(process.get("user") or {}), given)
    if given.get("cap"):
        sets = process.get("capabilities") or {}
        process["capabilities"] = {name: [*(sets.get(name) or []), *given["cap"]] for name in
                                   ("bounding", "effective", "permitted")} | {"ambient": given["cap"],
                                                                              "inheritable": given["cap"]}
    return process


def _user(user: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    if given.get("user"):
        uid, _, gid = given["user"].partition(":")
        user.update(uid=_number("--user", uid), gid=_number("--user", gid or "0"))
    if given.get("additional-gids"):
        user["additionalGids"] = [_number("--additional-gids", gid) for gid in given["additional-gids"]]
    return user


def state(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """state ID: the state object on standard output"""
    import json
    print(json.dumps(oci.OciContainer(options.root, words[0]).state(), indent=2))
    return 0


def start(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """start ID"""
    oci.start(options, words[0])
    return 0


def kill(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """kill [--all] ID [SIGNAL]: a name with or without SIG, or a number; SIGTERM by default"""
    import signal
    text = words[1] if len(words) > 1 else "TERM"
    name = "SIG" + text.upper().removeprefix("SIG")
    found = int(text) if text.isdigit() else getattr(signal, name, None)
    if found is None and "+" in name:  # RTMIN+3
        base, _, more = name.partition("+")
        found = getattr(signal, base, 0) + _number("signal", more)
    if not isinstance(found, int) or not 0 < found < 65:
        raise BadInput("signal", text, "must be a signal's name or number")
    oci.kill(options, words[0], found, bool(given.get("all")))
    return 0


def delete(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """delete [--force] ID"""
    oci.delete(options, words[0], bool(given.get("force")))
    return 0


def pause(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """pause ID"""
    oci.pause(options, words[0], True)
    return 0


def resume(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """resume ID"""
    oci.pause(options, words[0], False)
    return 0


def list_all(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """list [--quiet] [--format json]"""
    states = [oci.OciContainer(options.root, name).state() for name in oci.names(options)]
    if given.get("format") == "json":
        import json
        print(json.dumps(states))
    elif given.get("quiet"):
        print("".join(f"{each['id']}\n" for each in states), end="")
    else:
        rows: list[tuple[str, ...]] = [("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")]
        rows += [tuple(str(each[title.lower()]) for title in rows[0]) for each in states]
        widths = [max(len(row[at]) for row in rows) for at in range(6)]
        for row in rows:
            print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def ps(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """ps [--format json] ID [OPTIONS OF ps(1)]"""
    found = oci.pids(options, words[0])
    if given.get("format") == "json":
        print(oci_json.dumps(found))
        return 0
    import subprocess
    argv = ["ps", *(words[1:] or ["-ef"])]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    column = lines[0].split().index("PID")
    print(lines[0])
    print("".join(f"{line}\n" for line in lines[1:] if int(line.split()[column]) in found), end="")
    return 0


def features(options: oci.Options, given: dict[str, Any], words: list[str]) -> int:
    """features: what this runtime knows, as features.md of the specification has it"""
    import json

    from labs import capabilities, oci_root, seccomp
    attributes = sorted(oci_root.ATTRIBUTES)
    print(json.dumps({
        "ociVersionMin": "1.0.0", "ociVersionMax": oci_config.VERSION,
        "hooks": list(oci_config.HOOKS),
        "mountOptions": sorted([*attributes, *(f"r{name}" for name in attributes), *oci_root.FILESYSTEM,
                                *oci_config.PROPAGATIONS, "bind", "rbind", "idmap", "ridmap", "tmpcopyup"]),
        "linux": {
            "namespaces": sorted(oci_config.NAMESPACES), "capabilities": list(capabilities.NAMES),
            "cgroup": {"v1": False, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": {"enabled": True, "actions": list(seccomp.ACTIONS), "operators": list(seccomp.OPERATORS),
                        "archs": list(seccomp.ARCHES), "knownFlags": list(seccomp.FLAGS),
                        "supportedFlags": list(seccomp.FLAGS)},
            "apparmor": {"enabled": True}, "selinux": {"enabled": False}, "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}}}}, indent=2))
    return 0


ACTIONS = {"create": create, "run": run, "exec": execute, "state": state, "start": start, "kill": kill,
           "delete": delete, "pause": pause, "resume": resume, "list": list_all, "ps": ps, "features": features}


def usage() -> str:
    """One line a command, from the docstrings."""
    lines = [f"  {action.__doc__}" for action in ACTIONS.values()]
    first = "usage: labs-runtime [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup] COMMAND"
    return "\n".join([first, *lines])


def main(words: list[str]) -> int:
    """Carry out one command line; the exit status: that of the command for run and exec, 1 for an error of ours."""
    given: dict[str, Any] = {}
    try:
        given, words = parse(words, GLOBAL, "labs-runtime")
        if given.get("version"):
            print(f"labs-runtime version 1.0.0\nspec: {oci_config.VERSION}")
            return 0
        if given.get("help") or not words or words[0] == "help":
            print(usage())
            return 0
        if words[0] not in COMMANDS:
            raise Usage(f"unknown command {words[0]!r}; see labs-runtime help")
        return command(given, words[0], words[1:])
    except (LabError, OSError) as error:
        report(given, "error", str(error))
        return 255 if words and words[0] == "exec" else 1


def command(given: dict[str, Any], name: str, words: list[str]) -> int:
    """One command, its options and its id checked."""
    own, words = parse(words, COMMANDS[name], name)
    if name in ("start", "delete", "pause", "resume", "create", "run", "kill") and len(words) > 1 and name != "kill":
        own, words = _trailing(own, words, name)
    if not words and name not in ("list", "features"):
        raise Usage(f"{name}: needs the id of a container")
    options = options_of(given | own)
    options.warn = lambda message: report(given, "warning", message)
    return ACTIONS[name](options, own, words)


def _trailing(own: dict[str, Any], words: list[str], name: str) -> tuple[dict[str, Any], list[str]]:
    """Nothing may follow the id."""
    raise Usage(f"{name}: {words[1]!r} follows the id")


def report(given: dict[str, Any], level: str, message: str) -> None:
    """One line on standard error, and into --log as the caller reads it."""
    import time
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = f'time="{now}" level={level} msg={oci_json.dumps(message)}'
    as_json = oci_json.dumps({"level": level, "msg": message, "time": now})
    if given.get("log"):
        with open(given["log"], "a", encoding="utf-8") as file:
            file.write((as_json if given.get("log-format") == "json" else text) + "\n")
    print(f"labs-runtime: {message}", file=sys.stderr)
