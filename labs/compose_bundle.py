"""A service and its image as the config.json of one container (OCI runtime specification, config.md).

What an engine does between `image:` and runc: words of the command, environment, user, capabilities, mounts, limits.
The defaults are Docker's: fourteen capabilities, masked and read-only paths, no new device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from labs import machine
from labs.build_root import Root
from labs.mounts import o_path, opened

Config = dict[str, Any]
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES = ["CAP_" + name for name in (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT")]
_NO = ["nosuid", "noexec", "nodev"]
MOUNTS: list[Config] = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
     "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",  # noqa: S108  in the container
     "options": [*_NO, "mode=1777", "size=65536k"]},
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _NO},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_NO, "ro"]},
    {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*_NO, "relatime", "ro"]}]
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
PERIOD = 100_000  # microseconds of cpu.cfs_period_us


def command(service: Mapping[str, Any], image: Mapping[str, Any]) -> list[str]:
    """The entrypoint and command of the service over those of the image; a new entrypoint drops the image's command."""
    entrypoint, words = service.get("entrypoint"), service.get("command")
    if words is None and entrypoint is None:
        words = image.get("Cmd")
    if entrypoint is None:
        entrypoint = image.get("Entrypoint")
    return [*(entrypoint or []), *(words or [])]


def environment(service: Mapping[str, Any], image: Mapping[str, Any]) -> list[str]:
    """The image's variables, then the service's over them."""
    found = dict(one.partition("=")[::2] for one in [PATH, *(image.get("Env") or [])])
    found |= {key: value for key, value in (service.get("environment") or {}).items() if value is not None}
    return [f"{key}={value}" for key, value in found.items()]


def resources(service: Mapping[str, Any]) -> Config:
    """linux.resources from mem_limit, cpus, pids_limit, or deploy.resources.limits."""
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    memory = service.get("mem_limit") or limits.get("memory")
    cpus = service.get("cpus") or limits.get("cpus")
    pids = service.get("pids_limit") or limits.get("pids")
    found: Config = {"devices": [{"allow": False, "access": "rwm"}]}
    if memory:
        found["memory"] = {"limit": int(memory)}
    if cpus:
        found["cpu"] = {"quota": int(float(cpus) * PERIOD), "period": PERIOD}
    if pids:
        found["pids"] = {"limit": int(pids)}
    return found


def capabilities(service: Mapping[str, Any]) -> list[str]:
    """Docker's fourteen, less cap_drop, plus cap_add; ALL stands for every one of the fourteen."""
    def names(key: str) -> set[str]:
        return {"CAP_" + one.upper().removeprefix("CAP_") for one in service.get(key) or ()}
    dropped, added = names("cap_drop"), names("cap_add")
    base = set() if "CAP_ALL" in dropped else set(CAPABILITIES) - dropped
    return sorted(base | (added - {"CAP_ALL"}) | (set(CAPABILITIES) if "CAP_ALL" in added else set()))


def user(rootfs: str, given: str) -> tuple[Config, str]:
    """process.user and the home directory, by the image's passwd(5)."""
    with opened(o_path(rootfs)) as fd:
        ids, home = Root(fd, "").user(given)
    return {"uid": ids.uid, "gid": ids.gid, "additionalGids": list(ids.groups)}, home


def configuration(service: Mapping[str, Any], image: Mapping[str, Any], *, name: str, rootfs: str, netns: str,
                  mounts: Sequence[Config] = (), annotations: Mapping[str, str] | None = None) -> Config:
    """config.json of a container.

    image: the image's config (config.md): Env, Cmd, Entrypoint, User, WorkingDir.  rootfs: the mounted root, in which
    names of users are looked up.  netns: the path of its network namespace.  mounts: what is bound into it; one below
    another comes after it.
    Raises BadInput for a user that the image does not have.
    """
    who, home = user(rootfs, str(service.get("user") or image.get("User") or "0"))
    env = environment(service, image)
    if not any(one.startswith("HOME=") for one in env):
        env.append(f"HOME={home}")
    held = capabilities(service)
    sets = dict.fromkeys(("bounding", "effective", "permitted"), held)
    if who["uid"]:
        sets = {"bounding": held, "effective": [], "permitted": []}
    spaces: list[Config] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")]
    return {
        "ociVersion": "1.0.2",
        "hostname": str(service.get("hostname") or name),
        "root": {"path": rootfs, "readonly": bool(service.get("read_only"))},
        "process": {"user": who, "args": command(service, image), "env": env, "capabilities": sets,
                    "cwd": service.get("working_dir") or image.get("WorkingDir") or "/", "noNewPrivileges": False},
        "mounts": [*MOUNTS, *sorted([*mounts, *_tmpfs(service)], key=lambda one: one["destination"].split("/"))],
        "annotations": dict(annotations or {}),
        "linux": {"namespaces": [*spaces, {"type": "network", "path": netns}], "resources": resources(service),
                  "sysctl": {key: str(value) for key, value in (service.get("sysctls") or {}).items()},
                  "cgroupsPath": f"/{os.path.basename(machine.CGROUP)}/{machine.PREFIX}{name}",
                  "maskedPaths": MASKED, "readonlyPaths": READONLY}}


def _tmpfs(service: Mapping[str, Any]) -> list[Config]:
    paths = [one.partition(":")[0] for one in service.get("tmpfs") or ()]
    paths += [one["target"] for one in service.get("volumes") or () if one["type"] == "tmpfs"]
    return [{"destination": path, "type": "tmpfs", "source": "tmpfs", "options": _NO} for path in paths]


def bind(source: str, target: str, readonly: bool = False) -> Config:
    """One bind mount."""
    return {"destination": target, "type": "bind", "source": source,
            "options": ["rbind", "rprivate", "ro" if readonly else "rw"]}


def hosts(name: str, addresses: Sequence[str], extra: Sequence[str]) -> str:
    """The text of /etc/hosts: localhost, the container itself on each of its addresses, extra_hosts (hosts(5))."""
    lines = ["127.0.0.1\tlocalhost", *(f"{one}\t{name}" for one in addresses)]
    for given in extra:
        host, _, address = re.sub(r"[\[\]]", "", given).partition("=")
        lines.append(f"{address}\t{host}")
    return "\n".join(lines) + "\n"
