"""config.json read and checked: every field of the OCI runtime specification, its type and its rule.

config.md and config-linux.md of the specification.  A field that labs does not carry out is refused
by its name; a name that the specification does not know is passed over, as it asks for ("Extensibility").
"""

from __future__ import annotations

from labs import capabilities, seccomp
from labs.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Rule = Callable[[Any], bool] | dict[str, Any] | list[Any]

VERSION = "1.2.0"
NAMESPACES = {"pid": "pid", "network": "net", "mount": "mnt", "ipc": "ipc", "uts": "uts", "user": "user",
              "cgroup": "cgroup", "time": "time"}
RLIMITS = ("AS", "CORE", "CPU", "DATA", "FSIZE", "LOCKS", "MEMLOCK", "MSGQUEUE",
           "NICE", "NOFILE", "NPROC", "RSS", "RTPRIO", "RTTIME", "SIGPENDING", "STACK")
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
PROPAGATIONS = [deep + kind for deep in ("", "r") for kind in ("private", "shared", "slave", "unbindable")]
ON_PROC = {"/proc/" + name for name in ("cpuinfo", "diskstats", "meminfo", "stat", "swaps", "uptime", "loadavg",
                                        "slabinfo", "net/dev", "sys/kernel/ns_last_pid", "sys/crypto/fips_enabled")}
OF_IPC = ("kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax",
          "kernel.shmmni", "kernel.shm_rmid_forced")


def text(value: Any) -> bool:
    """must be a text without NUL"""
    return isinstance(value, str) and "\0" not in value


def flag(value: Any) -> bool:
    """must be true or false"""
    return isinstance(value, bool)


def integer(value: Any) -> bool:
    """must be a whole number"""
    return isinstance(value, int) and not isinstance(value, bool) and -1 << 63 <= value < 1 << 64


def count(value: Any) -> bool:
    """must be a whole number, 0 or more"""
    return integer(value) and value >= 0


def ident(value: Any) -> bool:
    """must be an id, 0 to 4294967295"""
    return count(value) and value < 1 << 32


def absolute(value: Any) -> bool:
    """must be an absolute path"""
    return text(value) and value.startswith("/")


def variable(value: Any) -> bool:
    """must be NAME=VALUE"""
    return text(value) and value.find("=") > 0


def semver(value: Any) -> bool:
    """must be a version that begins with 1."""
    return text(value) and value.startswith("1.") and len(value.split(".")) >= 3


def not_done(value: Any) -> bool:
    """is not done by labs"""
    return value in ([], {}, "", 0, False)


def one_of(*names: str) -> Callable[[Any], bool]:
    """A rule: one of these names."""
    def rule(value: Any) -> bool:
        return value in names
    rule.__doc__ = f"must be one of {', '.join(names)}"
    return rule


# A rule is a function, whose docstring is its sentence; [rule] is a list of such; {name: rule} an object, in which
# a name that ends in ! must be there and "*" stands for any name.
ID_MAP = [{"containerID!": ident, "hostID!": ident, "size!": ident}]
HOOK = [{"path!": absolute, "args": [text], "env": [text], "timeout": integer}]
DEVICE_TYPE = {"type!": one_of("c", "b", "u", "p"), "path!": absolute, "major": integer, "minor": integer,
               "fileMode": ident, "uid": ident, "gid": ident}
THROTTLE = [{"major!": count, "minor!": count, "rate!": count}]
RESOURCES = {
    "devices": [{"allow!": flag, "type": one_of("a", "b", "c", ""), "major": integer, "minor": integer,
                 "access": text}],
    "memory": {"limit": integer, "reservation": integer, "swap": integer, "kernel": integer, "kernelTCP": integer,
               "swappiness": not_done, "disableOOMKiller": not_done, "useHierarchy": flag, "checkBeforeUpdate": flag},
    "cpu": {"shares": count, "quota": integer, "burst": count, "period": count, "realtimeRuntime": not_done,
            "realtimePeriod": not_done, "cpus": text, "mems": text, "idle": integer},
    "pids": {"limit": integer},
    "blockIO": {"weight": count, "leafWeight": not_done, "weightDevice": [{"major!": count, "minor!": count,
                "weight": count, "leafWeight": not_done}], "throttleReadBpsDevice": THROTTLE,
                "throttleWriteBpsDevice": THROTTLE, "throttleReadIOPSDevice": THROTTLE,
                "throttleWriteIOPSDevice": THROTTLE},
    "hugepageLimits": [{"pageSize!": text, "limit!": count}],
    "network": {"classID": not_done, "priorities": not_done},
    "rdma": {"*": {"hcaHandles": count, "hcaObjects": count}},
    "unified": {"*": text},
}
SECCOMP = {
    "defaultAction!": one_of(*seccomp.ACTIONS), "defaultErrnoRet": count, "flags": [one_of(*seccomp.FLAGS)],
    "architectures": [one_of(*seccomp.ARCHES)], "listenerPath": text, "listenerMetadata": text,
    "syscalls": [{"names!": [text], "action!": one_of(*seccomp.ACTIONS), "errnoRet": count, "args": [
        {"index!": count, "value!": count, "valueTwo": count, "op!": one_of(*seccomp.OPERATORS)}]}],
}
PROCESS = {
    "terminal": flag, "consoleSize": {"height!": count, "width!": count}, "cwd!": absolute, "env": [text],
    "args": [text], "commandLine": text, "user": {"uid": ident, "gid": ident, "umask": ident,
    "additionalGids": [ident], "username": not_done}, "capabilities": {name: [text] for name in capabilities.SETS},
    "rlimits": [{"type!": one_of(*(f"RLIMIT_{name}" for name in RLIMITS)), "soft!": count, "hard!": count}],
    "apparmorProfile": text, "selinuxLabel": not_done, "noNewPrivileges": flag, "oomScoreAdj": integer,
    "scheduler": {"policy!": one_of("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE",
    "SCHED_DEADLINE"), "nice": integer, "priority": integer, "flags": [text], "runtime": count, "deadline": count,
    "period": count}, "ioPriority": {"class!": one_of("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"),
    "priority": count}, "execCPUAffinity": not_done,
}
CONFIG = {
    "ociVersion!": semver, "process": PROCESS, "root": {"path!": text, "readonly": flag}, "hostname": text,
    "domainname": text, "mounts": [{"destination!": text, "type": text, "source": text, "options": [text],
    "uidMappings": ID_MAP, "gidMappings": ID_MAP}], "annotations": {"*": text}, "hooks": dict.fromkeys(HOOKS, HOOK),
    "solaris": not_done, "windows": not_done, "vm": not_done, "zos": not_done,
    "linux": {
        "namespaces": [{"type!": one_of(*NAMESPACES), "path": text}], "uidMappings": ID_MAP, "gidMappings": ID_MAP,
        "timeOffsets": {"*": {"secs": integer, "nanosecs": count}}, "devices": [DEVICE_TYPE], "cgroupsPath": text,
        "resources": RESOURCES, "rootfsPropagation": one_of("", *PROPAGATIONS), "sysctl": {"*": text},
        "seccomp": SECCOMP, "maskedPaths": [absolute], "readonlyPaths": [absolute], "mountLabel": not_done,
        "intelRdt": not_done, "personality": {"domain!": one_of("LINUX", "LINUX32"), "flags": [text]},
        "netDevices": not_done, "memoryPolicy": not_done,
    },
}


def check(value: Any, rule: Rule, field: str = "config.json") -> None:
    """Raise BadInput with the field, the value and the rule where value breaks it; null is as if it were not there."""
    if isinstance(rule, dict):
        _require(isinstance(value, dict), field, value, "must be an object")
        _check_object(value, rule, "" if field == "config.json" else field + ".")
    elif isinstance(rule, list):
        _require(isinstance(value, list), field, value, "must be a list")
        for at, item in enumerate(value):
            check(item, rule[0], f"{field}[{at}]")
    else:
        _require(rule(value), field, value, rule.__doc__ or "")


def _check_object(value: dict[str, Any], rules: dict[str, Any], prefix: str) -> None:
    for name, rule in rules.items():
        key = name.rstrip("!")
        if value.get(key) is None:
            _require(key == name, prefix + key, None, "must be there")
            value.pop(key, None)
        else:
            check(value[key], rule, prefix + key)
    if "*" in rules:
        for key, item in value.items():
            check(item, rules["*"], prefix + key)


def _require(holds: bool, field: str, value: Any, rule: str) -> None:
    if not holds:
        raise BadInput(field, value, rule)


def namespaces(config: dict[str, Any]) -> dict[str, str]:
    """The namespaces asked for: kind to path, "" for a new one."""
    return {NAMESPACES[n["type"]]: n.get("path") or "" for n in config.get("linux", {}).get("namespaces") or []}


def process(value: dict[str, Any]) -> dict[str, Any]:
    """A process object, checked: the one of config.json, or that of exec --process."""
    check(value, PROCESS, "process")
    _require(bool(value.get("args")) and bool(value["args"][0]), "process.args", value.get("args"), "must not be empty")
    for at, test in enumerate(value.get("rlimits") or []):
        _require(test["soft"] <= test["hard"], f"process.rlimits[{at}].soft", test["soft"], "must not be above hard")
    kinds = [limit["type"] for limit in value.get("rlimits") or []]
    _require(len(set(kinds)) == len(kinds), "process.rlimits", kinds, "must name each limit once")
    return value


def load(config: dict[str, Any]) -> dict[str, Any]:
    """The whole configuration, checked; what depends on several fields comes after the fields themselves."""
    check(config, CONFIG)
    _require("process" in config, "process", None, "must be there")
    _require("root" in config, "root", None, "must be there")
    process(config["process"])
    linux = config.setdefault("linux", {})
    kinds = [entry["type"] for entry in linux.get("namespaces") or []]
    _require(len(set(kinds)) == len(kinds), "linux.namespaces", kinds, "must name each namespace once")
    _check_namespaces(config, linux, namespaces(config))
    for name in linux.get("sysctl") or {}:
        _check_sysctl(name, namespaces(config))
    for at, mount in enumerate(config.get("mounts") or []):
        _check_mount(f"mounts[{at}]", mount)
    _check_seccomp(linux.get("seccomp") or {})
    return config


def _check_namespaces(config: dict[str, Any], linux: dict[str, Any], have: dict[str, str]) -> None:
    """What needs a namespace of its own needs it to be asked for."""
    needs = [("hostname", config.get("hostname"), "uts"), ("domainname", config.get("domainname"), "uts"),
             ("mounts", config.get("mounts"), "mnt"), ("linux.maskedPaths", linux.get("maskedPaths"), "mnt"),
             ("linux.readonlyPaths", linux.get("readonlyPaths"), "mnt"),
             ("linux.rootfsPropagation", linux.get("rootfsPropagation"), "mnt"),
             ("linux.uidMappings", linux.get("uidMappings"), "user"),
             ("linux.gidMappings", linux.get("gidMappings"), "user"),
             ("linux.timeOffsets", linux.get("timeOffsets"), "time")]
    for field, value, kind in needs:
        _require(not value or kind in have, field, value, f"needs a {kind} namespace in linux.namespaces")
    _require(not linux.get("timeOffsets") or not have["time"], "linux.timeOffsets", linux.get("timeOffsets"),
             "cannot be given with the path of a time namespace")
    clocks = set(linux.get("timeOffsets") or {}) - {"monotonic", "boottime"}
    _require(not clocks, "linux.timeOffsets", sorted(clocks), "must be monotonic or boottime")
    new_user = have.get("user") == ""
    for field in ("uidMappings", "gidMappings"):
        _require(not new_user or bool(linux.get(field)), f"linux.{field}", linux.get(field),
                 "must be given for a new user namespace")


def _check_sysctl(name: str, have: dict[str, str]) -> None:
    """Only what belongs to a namespace of the container's own: namespaces(7), sysctl(8)."""
    dotted = name.replace("/", ".")
    kind = "ipc" if dotted in OF_IPC or dotted.startswith("fs.mqueue.") else \
        "net" if dotted.startswith("net.") else "uts" if dotted == "kernel.domainname" else None
    _require(kind is not None, f"linux.sysctl.{name}", name, "is not of a namespace: it would change the host")
    _require(kind in have, f"linux.sysctl.{name}", name, f"needs a {kind} namespace in linux.namespaces")


def _check_mount(field: str, mount: dict[str, Any]) -> None:
    """What a mount must not cover: /proc, but for the files that lxcfs gives."""
    target = clean(mount["destination"])
    inside = target.startswith("/proc/") and target not in ON_PROC
    _require(not inside, f"{field}.destination", mount["destination"], "must not be inside /proc")
    bound = {"bind", "rbind"} & set(mount.get("options") or [])
    _require(target != "/proc" or mount.get("type") == "proc" or bool(bound), f"{field}.type", mount.get("type"),
             "must be proc, or a bind mount, on /proc")


def clean(path: str) -> str:
    """The path without empty, . and .. parts, as from the container's root."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def _check_seccomp(profile: dict[str, Any]) -> None:
    field = "linux.seccomp"
    _require(profile.get("defaultAction") != "SCMP_ACT_NOTIFY", f"{field}.defaultAction", "SCMP_ACT_NOTIFY",
             "cannot be the default: nothing could start")
    for at, entry in enumerate(profile.get("syscalls") or []):
        if entry["action"] == "SCMP_ACT_NOTIFY":
            _require(bool(profile.get("listenerPath")), f"{field}.listenerPath", None, "must be there for NOTIFY")
            _require("sendmsg" not in entry["names"], f"{field}.syscalls[{at}].names", "sendmsg",
                     "cannot be notified: it carries the listener")
        for index, test in enumerate(entry.get("args") or []):
            _require(test["index"] < 6, f"{field}.syscalls[{at}].args[{index}].index", test["index"], "must be 0 to 5")
