"""labs-runtime against runc and crun: a table of config.json variants, each run under all of them and compared inside.

A variant is a clause of the runtime specification, a change of the base bundle, and a script that prints what the
clause is about.  Variants that do not touch each other share a container (a Box), for a container costs a second
in the lab; beside the scripts everything in tests.oci.FACTS is compared in every one.  What labs does in another
way than the runtime it is compared with stands in DIFFERENCES, with the reason.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from labs import capabilities, machine, syscalls
from labs.process import until
from tests import oci

ERRNO, ALLOW = "SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW"
ALL = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID", "CAP_KILL",
       "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_NET_ADMIN"]
EVERY_SET = dict.fromkeys(capabilities.SETS, ALL)
RIGHTS = {"process.capabilities": EVERY_SET, "process.noNewPrivileges": False}
OF_USER_5 = {"process.user": {"uid": 5, "gid": 5}}
MAPS = [{"containerID": 0, "hostID": 100000, "size": 65536}]
TWO_RANGES = [{"containerID": 0, "hostID": 100000, "size": 1000}, {"containerID": 1000, "hostID": 300000, "size": 2}]
BY_PATH = {"network": "net", "uts": "uts", "ipc": "ipc", "pid": "pid", "cgroup": "cgroup"}
UNMASKED = {"linux.maskedPaths": [], "linux.readonlyPaths": []}


class Variant(NamedTuple):
    clause: str
    patch: Mapping[str, Any] = MappingProxyType({})
    probe: str = ""
    setup: str = ""


class Box(NamedTuple):
    variants: dict[str, Variant]
    crun: bool
    needs: tuple[str, ...]
    status: int


def box(*, crun: bool = False, needs: tuple[str, ...] = (), status: int = 0, **variants: Variant) -> Box:
    """Variants in one container: compared with runc, with crun too where that is said."""
    return Box(variants, crun, needs, status)


# --- what a variant changes ---


def process(clause: str, probe: str = "", setup: str = "", **fields: Any) -> Variant:
    return Variant(f"config.md {clause}", {f"process.{name}": value for name, value in fields.items()}, probe, setup)


def caps(probe: str = "", **sets: list[str]) -> Variant:
    return Variant("config.md process.capabilities", {"process.capabilities": sets}, probe)


def mounted(to: str, kind: str, *options: str, source: str = "", probe: str = "", setup: str = "",
            **more: Any) -> Variant:
    mount = {"destination": to, "type": kind, "source": source or kind, "options": [*options]} | more
    return Variant("config.md mounts", {"mounts+": [mount]}, probe, setup)


def bind(to: str, *options: str, source: str = "data", how: str = "rbind", probe: str = "", setup: str = "",
         **more: Any) -> Variant:
    source = source if source.startswith("/") else f"@BUNDLE@/{source}"
    return mounted(to, "none", how, *options, source=source, probe=probe, setup=setup, **more)


def written(to: str, *options: str) -> Variant:
    """A bind mount that is read, written, listed and executed from."""
    return bind(to, *options, probe=f"cd {to}; cat file; echo more > new; cat new; ./busybox echo run; touch below/x")


def tree(to: str, *options: str, how: str = "rbind") -> Variant:
    """A bind mount of a mount that has one below."""
    return bind(to, *options, source="tree", how=how, probe=f"touch {to}/x; touch {to}/sub/x; ls {to}/sub")


def without(*kinds: str) -> dict[str, Any]:
    """Every namespace of the base but these."""
    return {"linux.namespaces": [n for n in oci.BASE["linux"]["namespaces"] if n["type"] not in kinds]}


def joined() -> dict[str, Any]:
    paths = [{"type": kind, "path": f"@{kind}@"} for kind in BY_PATH]
    return {"linux.namespaces": [{"type": "mount"}, *paths]}


def mapped(maps: list[dict[str, int]] = MAPS, **more: Any) -> dict[str, Any]:
    return {"linux.namespaces+": [{"type": "user"}], "linux.uidMappings": maps, "linux.gidMappings": maps, **more}


def filtered(names: str, action: str = ERRNO, probe: str = "", tests: tuple[dict[str, Any], ...] = (),
             **more: Any) -> Variant:
    call = {"names": names.split(), "action": action, **({"args": [*tests]} if tests else {}), **more}
    return Variant("config-linux.md seccomp", {
        "linux.seccomp.defaultAction": ALLOW, "linux.seccomp.syscalls+": [call]}, probe)


def compare(index: int, operator: str, value: int, two: int = 0) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": two, "op": f"SCMP_CMP_{operator}"}


def rules(*entries: str) -> Variant:
    """Device rules as "+c 1:11 rw", and which nodes can be made and opened under them."""
    given = []
    for entry in entries:
        kind, numbers, access = entry[1:].split()
        major, minor = (None if n == "*" else int(n) for n in numbers.split(":"))
        given.append({"allow": entry[0] == "+", "type": kind, "major": major, "minor": minor, "access": access})
    return Variant("config-linux.md Allowed Device list", RIGHTS | {"linux.resources.devices": given or None}, DEVICES)


def resource(files: str, **given: Any) -> Variant:
    """Limits, and the cgroup files in which they are seen."""
    return Variant("config-linux.md Control groups", {
        f"linux.resources.{name}.{key}" if isinstance(value, dict) and name != "unified" else f"linux.resources.{name}":
        inner for name, value in given.items()
        for key, inner in (value.items() if isinstance(value, dict) and name != "unified" else [("", value)])
    }, f"cd /sys/fs/cgroup; for f in {files}; do echo $f $(cat $f); done")


KILLS = "for n in 17 18 23 28; do kill -$n $$ 2>&1 && echo $n sent; done"
DEVICES = ("for d in 'c 1 3' 'c 1 5' 'c 1 11' 'c 10 229' 'b 7 0' 'p'; do set -- $d; rm -f /tmp/n; "
           "mknod /tmp/n $d 2>&1 && ([ $1 = p ] || { head -c 0 /tmp/n; : > /tmp/n; }) 2>&1; echo $d $?; done")
DATA = Variant("its files", setup="mkdir -p data/below; echo one > data/file; cp rootfs/bin/busybox data/busybox")
TREE = Variant("its mounts", setup="mkdir -p tree/sub; mount -t tmpfs tree tree; mkdir tree/sub; "
                                   "mount -t tmpfs sub tree/sub; touch tree/sub/f")
MAPPED = Variant("its owners", setup="chown -R 100000:100000 rootfs; chmod 755 .")
SIZES = "0 1 256 4294967295 4294967296 4294967297 8589934592"
NO_DEV = [oci.BASE["mounts"][0]]
DEV_AND_PROC_RO = [mount | {"/dev": {"options": [*oci.BASE["mounts"][1]["options"], "ro"]},
                            "/proc": {"options": ["ro", "hidepid=2", "nosuid"]}}.get(mount["destination"], {})
                   for mount in oci.BASE["mounts"]]

TABLE: dict[str, Box] = {
    "base": box(
        crun=True,
        plain=Variant("config.md", {}, (
            "id; ls /; cat /proc/keys /proc/kcore | wc -c; touch /x /dev/x; ls / /sys/firmware")),
        annotations=Variant("config.md Annotations", {"annotations": {"org.example.a": "b", "c": ""}}),
        root_absolute=Variant("config.md root.path", {"root.path": "@BUNDLE@/rootfs"}, "ls -d /bin")),
    "process-of-a-user": box(
        crun=True,
        user=process("process.user, additionalGids, umask", "id; umask; touch /tmp/f; stat -c %a /tmp/f; touch /x",
                     "chmod 1777 rootfs/tmp",
                     user={"uid": 1000, "gid": 1001, "additionalGids": [10, 20], "umask": 0o077}),
        rlimits=process("process.rlimits raised", "ulimit -a", rlimits=[
            {"type": "RLIMIT_NOFILE", "soft": 5000, "hard": 5001}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": (1 << 64) - 1},
            {"type": "RLIMIT_NPROC", "soft": 300, "hard": 300}]),
        oom_score=process("process.oomScoreAdj", oomScoreAdj=500),
        cwd_made=process("process.cwd", "stat -c '%a %u %g' . /home/me", cwd="/home/me/deep"),
        env_twice=process("process.env", env=[oci.PATH, "A=1", "A=2", "B=x=y", "C="])),
    "process-of-root": box(
        crun=True,
        umask_zero=process("process.user.umask", "umask; touch /f; stat -c %a /f",
                           user={"uid": 0, "gid": 0, "umask": 0}),
        capabilities_none=caps("chown 1 /bin 2>&1"),
        rlimits=process("process.rlimits", rlimits=[{"type": f"RLIMIT_{name}", "soft": 40, "hard": 41} for name in (
            "LOCKS", "MEMLOCK", "MSGQUEUE", "RTTIME", "SIGPENDING", "NOFILE")]),
        oom_score_zero=process("process.oomScoreAdj", oomScoreAdj=0),
        cwd_made=process("process.cwd", "stat -c '%a %u' /not /not/there/yet", cwd="/not/there/yet"),
        env_path=process("process.env", env=["PATH=/elsewhere:/bin"]),
        home_without_passwd=process("process.env HOME", setup="rm rootfs/etc/passwd")),
    "process-without-fields": box(
        capabilities_absent=process("process.capabilities", "chown 1 /bin 2>&1", capabilities=None),
        new_privileges=process("process.noNewPrivileges", noNewPrivileges=False),
        home_empty=process("process.env HOME", env=[oci.PATH, "HOME="]),
        hostname_absent=Variant("config.md hostname", {"hostname": None})),
    "oom-score-below": box(needs=("CAP_SYS_RESOURCE",), oom_score=process("process.oomScoreAdj", oomScoreAdj=-500)),
    "capabilities-bounding": box(capabilities=caps(bounding=ALL)),
    "capabilities-effective-less": box(crun=True, capabilities=caps(**EVERY_SET | {"effective": ["CAP_KILL"]})),
    "capabilities-ambient-alone": box(capabilities=caps(bounding=ALL, effective=ALL, permitted=ALL, ambient=ALL)),
    "capabilities-unknown": box(capabilities=caps(**{name: ["CAP_KILL", "CAP_OF_NOTHING"] for name in EVERY_SET})),
    "capabilities-of-a-user": box(
        crun=True,
        rights=Variant("config.md ambient", RIGHTS | OF_USER_5, "chown 1 /bin && echo may")),
    "capabilities-of-a-user-without-ambient": box(
        rights=Variant("config.md ambient", RIGHTS | OF_USER_5),
        capabilities=caps("chown 1 /bin 2>&1", **EVERY_SET | {"ambient": []}),
        home=process("process.env HOME", setup="echo 'me:x:5:77::/home/of/me:/bin/sh' > rootfs/etc/passwd"),
        cwd_closed=process("process.cwd", "pwd", "mkdir -m 700 rootfs/closed; chown 5:0 rootfs/closed",
                           cwd="/closed")),
    "args-relative": box(
        args=process("process.args", cwd="/bin", args=["./busybox", "sh", "-c", "@FACTS@"])),
    "args-name": box(args=process("process.args", args=["cat", "/proc/self/cmdline", "/proc/self/comm"])),
    "exit-status": box(status=3, exit=Variant("runtime.md start", {}, "exit 3")),
    "killed": box(status=137, killed=Variant("runtime.md start", without("pid"), "kill -KILL $$")),
    "root-readonly": box(
        crun=True,
        readonly=Variant("config.md root.readonly", {"root.readonly": True}, "touch /x; touch /dev/shm/x && echo yes"),
        data=DATA, writable=bind("/tmp", probe="touch /tmp/x && ls /tmp")),
    # mounts
    "binds": box(
        data=DATA, plain=written("/plain"), ro=written("/ro", "ro"),
        all_off=written("/off", "nosuid", "nodev", "noexec"),
        noatime=bind("/noatime", "noatime"), nodiratime=bind("/nodiratime", "nodiratime", "strictatime"),
        relatime=bind("/relatime", "relatime"), shallow=bind("/shallow", "rw", how="bind", probe="ls /shallow/below"),
        nosymfollow=bind("/nolinks", "nosymfollow", probe="cat /nolinks/link", setup="ln -s file data/link"),
        file=bind("/etc/new/file", "ro", source="data/file", probe="cat /etc/new/file"),
        relative=mounted("/relative", "bind", "rbind", source="data", probe="cat /relative/file"),
        link=bind("/link/made", probe="ls -l /link; ls /inner/made",
                  setup="mkdir rootfs/inner; ln -s /inner rootfs/link"),
        cwd_in_a_mount=process("process.cwd", "pwd; ls", cwd="/plain/below")),
    "bind-over-passwd": box(
        data=DATA, over=bind("/etc/passwd", source="data/file", probe="cat /etc/passwd")),
    "bind-by-type": box(
        data=DATA, typed=mounted("/data", "bind", "ro", source="@BUNDLE@/data", probe="cat /data/file; touch /data/x")),
    "bind-trees": box(
        tree=TREE, ro=tree("/ro", "ro"), rro=tree("/rro", "rro"), shallow=tree("/shallow", how="bind"),
        recursive=tree("/recursive", "rnosuid", "rnoexec", "rnodev"),
        **{kind: tree(f"/{kind}", kind) for kind in (
            "private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable")}),
    "filesystems": box(
        crun=True,
        tmpfs=mounted("/tmpfs", "tmpfs", "size=1m", "mode=1750", "uid=5", "gid=6", "noexec", probe=(
            "stat -c '%a %u %g' /tmpfs; dd if=/dev/zero of=/tmpfs/x bs=1M count=2 2>&1 | head -1; ls -s /tmpfs/x")),
        ro=mounted("/ro", "tmpfs", "ro", probe="touch /ro/x"),
        sync=mounted("/sync", "tmpfs", "sync", "dirsync", "strictatime"),
        mode=mounted("/moded", "tmpfs", probe="stat -c '%a %u %g' /moded",
                     setup="mkdir -m 1711 rootfs/moded; chown 3:4 rootfs/moded"),
        below=mounted("/ro/b", "tmpfs", source="second", probe="ls -R /ro; touch /ro/b/x && ls /ro/b"),
        copied=mounted("/copied", "tmpfs", "tmpcopyup", "size=1m", probe=(
            "cd /copied; find . | sort | xargs stat -c '%n %F %a %u:%g'; cat a/b; readlink l"), setup=(
            "mkdir -p rootfs/copied/a; echo text > rootfs/copied/a/b; chown 3:4 rootfs/copied/a/b; "
            "chmod 640 rootfs/copied/a/b; ln -s a/b rootfs/copied/l")),
        data=DATA,
        overlay=mounted("/overlay", "overlay", "lowerdir=@BUNDLE@/data", "upperdir=@BUNDLE@/up/u",
                        "workdir=@BUNDLE@/up/w", probe="cat /overlay/file; echo more > /overlay/file; ls /overlay",
                        setup="mkdir up; mount -t tmpfs up up; mkdir up/u up/w")),
    "dev-and-proc-ro": box(
        ro=Variant("config.md mounts", {"mounts": DEV_AND_PROC_RO}, "touch /dev/x; echo x > /proc/self/comm")),
    "no-dev-mount": box(
        mounts=Variant("config.md mounts", {"mounts": NO_DEV} | UNMASKED, setup="rm -rf rootfs/dev/*")),
    "no-mounts": box(
        mounts=Variant("config.md mounts", {"mounts": [], "process.noNewPrivileges": False} | UNMASKED,
                       "ls /proc; ls /dev", "rm -rf rootfs/dev/*")),
    "dev-of-the-host": box(
        masked_none=Variant("config-linux.md Masked Paths", {"mounts": NO_DEV, "linux.maskedPaths": []},
                            "head -c 2 /proc/keys | wc -c"),
        dev=bind("/dev", source="/dev", probe="ls -l /dev/null /dev/ptmx")),
    "idmap": box(
        data=DATA, idmap=bind("/data", "idmap", uidMappings=MAPS, gidMappings=MAPS, probe="stat -c '%u %g' /data/file",
                              setup="chown 5:6 data/file")),
    # namespaces
    "no-namespaces": box(
        crun=True,
        absent=Variant("config-linux.md Namespaces", without("pid", "network", "ipc", "uts") | {"hostname": None},
                       "[ $$ -gt 1 ] && echo seen")),
    "no-cgroup-namespace": box(
        absent=Variant("config-linux.md Namespaces", without("cgroup"),
                       "cat /proc/self/cgroup; ls -d /sys/fs/cgroup/*procs")),
    "namespaces-by-path": box(
        crun=True,
        joined=Variant("config-linux.md Namespaces path", joined() | {"hostname": "renamed"},
                       "[ -d /proc/1 ] && echo $(tr '\\0' ' ' < /proc/1/cmdline)")),
    "user-namespace": box(
        owners=MAPPED,
        mapped=Variant("config-linux.md User namespace mappings", RIGHTS | mapped(), (
            "id; touch /tmp/x; stat -c %u /tmp/x; mknod /tmp/n c 1 3 2>&1; mount -t tmpfs none /tmp && echo mounted; "
            "hostname x; hostname")),
        data=DATA,
        idmap=bind("/data", uidMappings=MAPS, gidMappings=MAPS, probe="stat -c '%u %g' /data/file")),
    "user-namespace-two-ranges": box(
        owners=MAPPED,
        mapped=Variant("config-linux.md User namespace mappings", mapped(TWO_RANGES, **{
            "process.user": {"uid": 1000, "gid": 1000, "additionalGids": [5]}}), "id")),
    "time-offsets": box(
        time=Variant("config-linux.md Offset for Time Namespace", {
            "linux.namespaces+": [{"type": "time"}],
            "linux.timeOffsets": {"boottime": {"secs": 1000000, "nanosecs": 5}, "monotonic": {"secs": 2000}}},
            "[ $(sed 's/[.].*//' /proc/uptime) -gt 1000000 ] && echo later; cat /proc/self/timens_offsets")),
    "newer-fields": box(
        domainname=Variant("config.md domainname", {"domainname": "of.the.box"}),
        personality=Variant("config-linux.md Personality", {"linux.personality": {"domain": "LINUX32"}}, "uname -m"),
        scheduler=process("process.scheduler", "cut -d' ' -f19,41 /proc/self/stat",
                          scheduler={"policy": "SCHED_BATCH", "nice": 5}),
        io_priority=process("process.ioPriority", "ionice -p $$",
                            ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 3})),
    # devices
    "devices": box(
        nodes=Variant("config-linux.md Devices", {"linux.devices": [
            {"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6},
            {"type": "b", "path": "/dev/deep/block", "major": 7, "minor": 99, "fileMode": 0o600},
            {"type": "p", "path": "/dev/fifo", "fileMode": 0o622},
            {"type": "u", "path": "/dev/u", "major": 1, "minor": 3},
            {"type": "c", "path": "/tmp/here/null", "major": 1, "minor": 3}]},
            "stat -c '%a' /dev/deep; stat -c '%F %a %t:%T' /tmp/here/null; echo x > /tmp/here/null")),
    "devices-default-again": box(
        null=Variant("config-linux.md Default Devices", {"linux.devices": [
            {"type": "c", "path": "/dev/null", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 1, "gid": 1}]})),
    "device-rules-none": box(rules=rules()),
    "device-rules-all": box(rules=rules("+a *:* rwm")),
    "device-rules-some": box(rules=rules("-a *:* rwm", "+c 1:11 rw", "+c 10:* rm")),
    "device-rules-taken-back": box(rules=rules("+a *:* rwm", "-c 10:229 w")),
    # sysctl, paths, propagation
    "sysctl": box(
        crun=True,
        dots=Variant("config-linux.md Sysctl", {
            "linux.sysctl.net.ipv4.ip_unprivileged_port_start": "80", "linux.sysctl.kernel.msgmax": "9000",
            "linux.sysctl.fs.mqueue.msg_max": "12", "linux.sysctl.kernel.shm_rmid_forced": "1",
            "linux.sysctl.kernel.domainname": "set"}, "cd /proc/sys; cat "
            "net/ipv4/ip_unprivileged_port_start kernel/msgmax fs/mqueue/msg_max kernel/shm_rmid_forced"),
        slashes=Variant("config-linux.md Sysctl", {"linux.sysctl.net/ipv4/conf/lo/forwarding": "1"},
                        "cat /proc/sys/net/ipv4/conf/lo/forwarding")),
    "masked-and-readonly": box(
        masked=Variant("config-linux.md Masked Paths", {
            "linux.maskedPaths": ["/etc/passwd", "/root", "/not/there", "/link"], "process.capabilities": EVERY_SET},
            "cat /etc/passwd; ls -A /root; touch /root/x; touch /inner/x; echo y > /etc/passwd; ls -A /link /inner",
            "echo secret > rootfs/root/s; mkdir rootfs/inner; echo s > rootfs/inner/s; ln -s inner rootfs/link"),
        readonly=Variant("config-linux.md Readonly Paths", {
            "linux.readonlyPaths": ["/etc", "/nowhere", "/tmp", "/data"]},
            "touch /etc/x; touch /tmp/x; echo >> /etc/group; touch /usr/x && echo yes"),
        tree=TREE, below=tree("/data")),
    "masked-under-a-file": box(
        masked=Variant("config-linux.md Masked Paths", {"linux.maskedPaths": ["/etc/passwd/not"]},
                       "wc -l < /etc/passwd")),
    **{f"root-{kind}": box(propagation=Variant("config-linux.md Rootfs Mount Propagation", {
        "linux.rootfsPropagation": kind})) for kind in ("private", "shared", "slave", "unbindable")},
    # seccomp; the tests of arguments are compared with libseccomp's one by one in test_seccomp.py
    "seccomp": box(
        crun=True,
        errno=filtered("mkdir no_such_call mkdirat", probe="mkdir /x 2>&1", errnoRet=28),
        errno_default=filtered("rmdir", probe="mkdir /tmp/y 2>&1; rmdir /dev/shm 2>&1"),
        errno_zero=filtered("symlink symlinkat", probe="ln -s a /y && ls /y 2>&1", errnoRet=0),
        kill=filtered("link linkat", "SCMP_ACT_KILL_PROCESS", probe="(ln /bin/sh /z); echo $?"),
        trap=filtered("mknod mknodat", "SCMP_ACT_TRAP", probe="(mknod /p p); echo $?"),
        log=filtered("chmod fchmodat", "SCMP_ACT_LOG", probe="touch /m; chmod 700 /m && echo changed"),
        length=filtered("ftruncate", tests=(compare(1, "GE", 1 << 32),), errnoRet=28, probe=(
            f"for n in {SIZES}; do truncate -s $n /dev/shm/f 2>/dev/null && echo $n yes || echo $n no; done")),
        two_tests=filtered("kill", tests=(compare(0, "EQ", 1), compare(1, "GT", 20)), probe=KILLS)),
    "seccomp-two-rules": box(
        rule_a=filtered("kill", tests=(compare(1, "EQ", 17),)),
        rule_b=filtered("kill", tests=(compare(1, "GE", 23),), errnoRet=28, probe=KILLS),
        arches=Variant("config-linux.md seccomp.architectures", {
            "linux.seccomp.architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]})),
    "seccomp-one-argument-twice": box(
        rule=filtered("kill", tests=(compare(1, "EQ", 17), compare(1, "EQ", 28)), probe=KILLS),
        arches=Variant("config-linux.md seccomp.architectures", {"linux.seccomp.architectures": ["SCMP_ARCH_ARM"]})),
    "seccomp-of-a-user": box(
        user=process("process.user", user={"uid": 5, "gid": 5}, noNewPrivileges=False),
        errno=filtered("mkdir mkdirat", probe="mkdir /tmp/x 2>&1", errnoRet=28)),
    "seccomp-flags": box(
        flags=Variant("config-linux.md seccomp.flags", {
            "linux.seccomp.flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}),
        errno=filtered("mkdir mkdirat", probe="mkdir /x 2>&1")),
    "seccomp-kills-the-command": box(status=159, killed=filtered("chdir", "SCMP_ACT_KILL", probe="cd /tmp")),
    # resources
    "resources": box(
        needs=("memory", "pids", "cpu", "cpuset", "io"), crun=True,
        pids=resource("pids.max", pids={"limit": 33}),
        memory=resource("memory.max memory.low memory.swap.max",
                        memory={"limit": 64 << 20, "reservation": 32 << 20, "swap": 96 << 20}),
        cpu=resource("cpu.weight cpu.max cpu.max.burst",
                     cpu={"shares": 512, "quota": 20000, "period": 50000, "burst": 1000}),
        cpuset=resource("cpuset.cpus cpuset.mems cpuset.cpus.effective", cpu={"cpus": "0", "mems": "0"}),
        io=resource("io.max", blockIO={
            "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 1 << 20}],
            "throttleWriteIOPSDevice": [{"major": 254, "minor": 0, "rate": 100}]})),
    "resources-unlimited": box(
        needs=("memory", "pids", "cpu"),
        pids=resource("pids.max", pids={"limit": -1}),
        memory=resource("memory.max memory.swap.max", memory={"limit": 64 << 20, "swap": -1}),
        cpu=resource("cpu.max cpu.weight", cpu={"quota": -1, "period": 50000, "shares": 2})),
    "resources-without-swap": box(
        needs=("memory", "cpu"),
        memory=resource("memory.max memory.swap.max", memory={"limit": 64 << 20, "swap": 64 << 20}),
        cpu=resource("cpu.max", cpu={"quota": 30000})),
    "resources-unified": box(
        needs=("memory", "pids", "cpu"),
        unified=resource("memory.high pids.max", unified={"memory.high": "50000000", "pids.max": "44"}),
        memory=resource("memory.max memory.swap.max", memory={"limit": -1}),
        cpu=resource("cpu.max cpu.idle", cpu={"period": 50000, "idle": 1})),
    "hugetlb": box(
        needs=("hugetlb",),
        hugetlb=resource("hugetlb.2MB.max", hugepageLimits=[{"pageSize": "2MB", "limit": 4 << 20}])),
}

# (container, compared with, what differs): who else does it as labs does ("crun", "runc" or "none"), and why.
NEWER = "a field of specification 1.1 and 1.2 that runc has from 1.2 on"
CLONED = ("one clone3(2) makes the user and the IPC namespace: the root of /dev/mqueue is made before any id is "
          "mapped, while runc and crun unshare the IPC namespace as the mapped root")
DIFFERENCES: dict[tuple[str, str, str], tuple[str, str]] = {
    ("bind-by-type", "runc", "exit"): ("none", "type bind alone is a bind mount; the others want the option too"),
    ("no-mounts", "runc", "exit"): ("crun", "runc needs a /proc inside to close its files"),
    ("bind-over-passwd", "runc", "env"): ("crun", "a passwd file of another form leaves HOME=/, and runc an empty one"),
    ("idmap", "runc", "mounts /data"): ("crun", NEWER),
    ("idmap", "runc", "idmap"): ("crun", NEWER),
    ("user-namespace", "runc", "mounts /data"): ("crun", NEWER),
    ("user-namespace", "runc", "idmap"): ("crun", NEWER),
    ("user-namespace", "runc", "dev /dev/mqueue"): ("none", CLONED),
    ("user-namespace-two-ranges", "runc", "dev /dev/mqueue"): ("none", CLONED),
    ("time-offsets", "runc", "exit"): ("crun", NEWER),
    ("newer-fields", "runc", "names"): ("crun", NEWER),
    ("newer-fields", "runc", "personality"): ("crun", NEWER),
    ("newer-fields", "runc", "scheduler"): ("crun", NEWER),
    ("newer-fields", "runc", "io_priority"): ("crun", NEWER),
    ("devices-default-again", "runc", "exit"): (
        "none", "a default device may be given an owner: runc makes it twice and fails, crun leaves the owner out"),
    ("masked-and-readonly", "runc", "mounts /data/sub"): (
        "none", "a read-only path is read-only with what is mounted below; runc and crun leave that writable"),
    ("masked-and-readonly", "runc", "mounts /inner"): (
        "none", "a masked directory is a read-only mount of a tmpfs; in runc the tmpfs itself is read-only"),
    ("masked-and-readonly", "runc", "below"): ("none", "the same, tried"),
    ("masked-under-a-file", "runc", "exit"): (
        "none", "a path below a file is not there, as one below nothing is not: nothing to hide"),
    ("root-shared", "runc", "mounts /"): ("crun", "runc makes the root private for pivot_root, and leaves it so"),
    ("root-unbindable", "runc", "mounts /"): ("crun", "the same"),
    ("resources", "runc", "cpu"): ("crun", "cpu.max.burst: " + NEWER),
    ("resources-unified", "runc", "cpu"): ("crun", "cpu.idle: " + NEWER),
    ("seccomp-flags", "runc", "exit"): ("crun", "runc 1.1 as Debian builds it refuses every flag"),
}


def _has(needs: tuple[str, ...]) -> bool:
    there = set(machine.read_file(f"{machine.CGROUP_ROOT}/cgroup.controllers").split())
    return set(needs) <= there | set(capabilities.names(syscalls.capget().effective))


@pytest.fixture(scope="module")
def others():
    """A process with namespaces of its own, for those that are joined by path."""
    words = ["unshare", "--net", "--uts", "--ipc", "--cgroup", "--pid", "--fork", "sleep", "1000"]
    with subprocess.Popen(words) as held:
        children = f"/proc/{held.pid}/task/{held.pid}/children"
        until(lambda: machine.read_file(children), 60, "a child of unshare")
        inner = machine.read_file(children).split()[0]
        until(lambda: machine.read_file(f"/proc/{inner}/comm") == "sleep\n", 60, "sleep")
        yield inner
        subprocess.run(["kill", "-KILL", inner], check=True)
        held.wait()


@contextlib.contextmanager
def prepared(case, other):
    """A bundle with the changes of all variants of a container, and their scripts one after the other."""
    with oci.bundle() as made:
        config, script = oci.BASE, oci.FACTS
        for name, variant in case.variants.items():
            if variant.setup:
                subprocess.run(["sh", "-ec", variant.setup], cwd=made.path, check=True)
            config = oci.patched(config, variant.patch)
            probe = variant.probe or ":"
            script += f"echo @{name}\n" + (probe if case.status else f"({probe})\n")
        script += "" if case.status else "exit 0\n"
        text = json.dumps(config).replace('"@FACTS@"', json.dumps(script))
        for kind, name in BY_PATH.items():
            text = text.replace(f"@{kind}@", f"/proc/{other}/ns/{name}")
        own = any("process.args" in variant.patch for variant in case.variants.values())
        made.write_config(json.loads(text), "" if own else script)
        try:
            yield made
        finally:
            for mount in ("tree/sub", "tree", "up"):
                if os.path.ismount(made.path / mount):
                    subprocess.run(["umount", str(made.path / mount)], check=True)


def seen(case, runtime, other):
    """Under one runtime: the exit status, what was seen inside, what is left, and what was said of errors."""
    with prepared(case, other) as made:
        known = {os.readlink(f"/proc/{other}/ns/{kind}"): "given" for kind in BY_PATH.values()}
        # crun gives the file it gets as standard input to the container's user: no /dev/null of the host, then
        done = made.call("run", made.name, runtime=runtime, stdin=subprocess.PIPE)
        found = oci.facts(done.stdout, made, known)
        left = oci.left(made)
    return done.returncode, found, left, done.stderr


def differing(ours, theirs):
    """What differs: the exit status alone, or the sections."""
    if ours[0] != theirs[0]:
        return {"exit": (ours[0], theirs[0], theirs[3])}
    return {name: (ours[1].get(name), theirs[1].get(name)) for name in {**ours[1], **theirs[1]}
            if ours[1].get(name) != theirs[1].get(name)}


def explained(name, runtime):
    return {what: who for (case, other, what), (who, _) in DIFFERENCES.items() if (case, other) == (name, runtime)}


@pytest.mark.machine
@pytest.mark.parametrize("name", TABLE)
def test_a_container_is_as_with_the_other_runtimes(name, others):
    case = TABLE[name]
    assert _has(case.needs), f"this machine lacks {' '.join(case.needs)}"
    crun = case.crun or "crun" in explained(name, "runc").values()
    runtimes = ["labs", "runc", *["crun"] * crun]
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(runtimes, pool.map(lambda runtime: seen(case, runtime, others), runtimes), strict=True))
    ours = results["labs"]
    assert (ours[0], ours[2]) == (case.status, []), ours[3]
    found = differing(ours, results["runc"])
    assert set(found) == set(explained(name, "runc")), found
    alike = differing(ours, results["crun"]) if crun else {}
    assert not [what for what, who in explained(name, "runc").items() if who == "crun" and what in alike], alike
    assert not case.crun or set(alike) == set(explained(name, "crun")), alike


def test_the_table_has_at_least_60_variants_and_no_stale_difference():
    clauses = [variant.clause for case in TABLE.values() for variant in case.variants.values()]
    assert sum(clause.startswith(("config", "runtime")) for clause in clauses) >= 60
    assert {(case, who) for case, who, _ in DIFFERENCES} <= {(case, who) for case in TABLE for who in ("runc", "crun")}
