"""labs-runtime against runc and crun: a table of config.json variants, each run under all of them and compared inside.

A variant is a clause of the runtime specification, a change of the base bundle, and a script that prints
what the clause is about; beside it everything in tests.oci.FACTS is compared in every variant.  What labs
does in another way than the runtime it is compared with stands in DIFFERENCES, with the reason.
"""

import contextlib
import json
import os
import subprocess
from typing import Any, NamedTuple

import pytest

from labs import capabilities, machine, syscalls
from tests import oci

ERRNO, ALLOW, KILL = "SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", "SCMP_ACT_KILL_PROCESS"
ALL = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_SYS_ADMIN",
       "CAP_SYS_CHROOT", "CAP_NET_ADMIN"]
EVERY_SET = {name: ALL for name in ("bounding", "effective", "permitted", "inheritable", "ambient")}
RIGHTS = {"process.capabilities": EVERY_SET, "process.noNewPrivileges": False}
MAPS = [{"containerID": 0, "hostID": 100000, "size": 65536}]
USER = {"linux.namespaces+": [{"type": "user"}], "linux.uidMappings": MAPS, "linux.gidMappings": MAPS}


class Variant(NamedTuple):
    clause: str
    patch: dict[str, Any]
    probe: str = ""
    against: str = "runc"
    needs: tuple[str, ...] = ()
    setup: str = ""
    status: int | None = 0


def without(kind: str) -> dict[str, Any]:
    """Every namespace of the base but one."""
    return {"linux.namespaces": [n for n in oci.BASE["linux"]["namespaces"] if n["type"] != kind]}


def joined(kind: str) -> dict[str, Any]:
    return {"linux.namespaces": [*without(kind)["linux.namespaces"], {"type": kind, "path": f"@{kind}@"}]}


def bind(*options: str, source: str = "data", to: str = "/data", **more: Any) -> dict[str, Any]:
    return {"mounts+": [{"destination": to, "source": f"@BUNDLE@/{source}", "type": "none",
                         "options": ["rbind", *options]} | more]}


def tmpfs(*options: str, to: str = "/data") -> dict[str, Any]:
    return {"mounts+": [{"destination": to, "source": "tmpfs", "type": "tmpfs", "options": [*options]}]}


def filtered(*calls: dict[str, Any], default: str = ALLOW, **more: Any) -> dict[str, Any]:
    return {"linux.seccomp": {"defaultAction": default, "syscalls": [*calls]} | more}


def compared(operator: str, value: int, two: int = 0) -> Variant:
    """ftruncate(fd, length): the length has 64 bits, and the filter compares it in halves."""
    test = {"index": 1, "value": value, "valueTwo": two, "op": f"SCMP_CMP_{operator}"}
    return Variant("config-linux Seccomp args: op", filtered(
        {"names": ["ftruncate", "ftruncate64"], "action": ERRNO, "errnoRet": 28, "args": [test]}) | tmpfs("size=1m"),
        "for n in 0 1 255 256 4294967295 4294967296 4294967297 4294967552 8589934592 8589934593 1099511627776; do "
        "truncate -s $n /data/f 2>/dev/null && echo $n yes || echo $n no; done")


KILLS = "for n in 17 18 23 28; do kill -$n $$ 2>&1 && echo $n sent; done"
DEVICES = ("for d in 'c 1 3' 'c 1 5' 'c 1 11' 'c 10 229' 'b 7 0' 'p'; do set -- $d; rm -f /tmp/n; "
           "mknod /tmp/n $d 2>&1 && ([ $1 = p ] || { head -c 0 /tmp/n; : > /tmp/n; }) 2>&1; echo $d $?; done")
DATA = "mkdir -p data/below; echo one > data/file; cp rootfs/bin/busybox data/busybox"
SHOW = "cat /data/file; echo more 2>&1 > /data/new; cat /data/new; /data/busybox echo run; ls /data; touch /data/below/x"
CGROUP = "cd /sys/fs/cgroup; for f in {}; do echo $f $(cat $f); done"


def resources(files: str, *needs: str, **given: Any) -> Variant:
    return Variant("config-linux Control groups", {f"linux.resources.{name}": value for name, value in given.items()},
                   CGROUP.format(files), needs=needs)


VARIANTS: dict[str, Variant] = {
    "base": Variant("config", {}, "id; ls /; cat /proc/keys /proc/kcore | wc -c; touch /x /dev/x; ls / /sys/firmware"),
    # process
    "user": Variant("config POSIX User", {"process.user": {"uid": 1000, "gid": 1001}}, "id; touch /x"),
    "user-groups": Variant("config additionalGids", {"process.user": {"uid": 7, "gid": 8, "additionalGids": [10, 20]}}, "id"),
    "user-umask": Variant("config umask", {"process.user": {"uid": 0, "gid": 0, "umask": 0o077}}, "touch /f; stat -c %a /f"),
    "user-umask-zero": Variant("config umask", {"process.user": {"uid": 0, "gid": 0, "umask": 0}}, "umask; touch /f; stat -c %a /f"),
    "capabilities-none": Variant("config capabilities", {"process.capabilities": {}}, "chown 1 /bin 2>&1"),
    "capabilities-absent": Variant("config capabilities", {"process.capabilities": None}, "chown 1 /bin 2>&1"),
    "capabilities-bounding": Variant("config bounding", {"process.capabilities": {"bounding": ALL}}),
    "capabilities-effective-less": Variant("config effective", {"process.capabilities": EVERY_SET | {"effective": ["CAP_KILL"]}}),
    "capabilities-inheritable": Variant("config inheritable", {"process.capabilities": EVERY_SET | {"ambient": []}}),
    "capabilities-ambient": Variant("config ambient", RIGHTS | {"process.user": {"uid": 5, "gid": 5}}, "chown 1 /bin && echo may"),
    "capabilities-no-ambient": Variant("config ambient", RIGHTS | {
        "process.user": {"uid": 5, "gid": 5}, "process.capabilities": EVERY_SET | {"ambient": []}}, "chown 1 /bin 2>&1"),
    "capabilities-ambient-alone": Variant("config ambient", {"process.capabilities": {
        "bounding": ALL, "effective": ALL, "permitted": ALL, "ambient": ALL}}),
    "capabilities-unknown": Variant("config capabilities, unknown", {"process.capabilities": {
        name: ["CAP_KILL", "CAP_OF_NOTHING"] for name in EVERY_SET}}),
    "rlimits": Variant("config rlimits", {"process.rlimits": [
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        {"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": (1 << 64) - 1},
        {"type": "RLIMIT_NPROC", "soft": 300, "hard": 300}]}, "ulimit -a"),
    "rlimits-all": Variant("config rlimits", {"process.rlimits": [{"type": f"RLIMIT_{name}", "soft": 40, "hard": 41} for name in (
        "LOCKS MEMLOCK MSGQUEUE RTTIME SIGPENDING NOFILE").split()]}),
    "rlimits-raised": Variant("config rlimits", {"process.rlimits": [
        {"type": "RLIMIT_NOFILE", "soft": 5000, "hard": 5001}], "process.user": {"uid": 9, "gid": 9}}),
    "new-privileges": Variant("config noNewPrivileges", {"process.noNewPrivileges": False}),
    "oom-score": Variant("config oomScoreAdj", {"process.oomScoreAdj": 500}),
    "oom-score-zero": Variant("config oomScoreAdj", {"process.oomScoreAdj": 0}),
    "oom-score-negative": Variant("config oomScoreAdj", {"process.oomScoreAdj": -500}, needs=("CAP_SYS_RESOURCE",)),
    "cwd-made": Variant("config cwd", {"process.cwd": "/not/there/yet"}, "stat -c '%a %u' /not /not/there/yet"),
    "cwd-of-a-user": Variant("config cwd", {"process.cwd": "/home/me", "process.user": {"uid": 5, "gid": 6}}, "stat -c '%a %u %g' ."),
    "cwd-closed-to-root": Variant("config cwd", {"process.cwd": "/closed", "process.user": {"uid": 5, "gid": 5}},
                                  setup="mkdir -m 700 rootfs/closed; chown 5:5 rootfs/closed"),
    "cwd-in-a-mount": Variant("config cwd", {"process.cwd": "/data/below"} | bind(), setup=DATA),
    "env-twice": Variant("config env", {"process.env": [oci.PATH, "A=1", "A=2", "B=x=y", "C="]}),
    "env-path-of-its-own": Variant("config env", {"process.env": ["PATH=/elsewhere:/bin"], "process.cwd": "/tmp"}),
    "home-given-empty": Variant("config env", {"process.env": [oci.PATH, "HOME="]}),
    "home-of-passwd": Variant("config env", {"process.user": {"uid": 77, "gid": 0}},
                              setup="echo 'me:x:77:77::/home/of/me:/bin/sh' >> rootfs/etc/passwd"),
    "home-not-in-passwd": Variant("config env", {"process.user": {"uid": 78, "gid": 0}}),
    "home-without-passwd": Variant("config env", {}, setup="rm rootfs/etc/passwd"),
    "args-relative": Variant("config args", {"process.cwd": "/bin", "process.args": ["./busybox", "sh", "-c", "@FACTS@"]}),
    "args-name": Variant("config args", {"process.args": ["cat", "/proc/self/cmdline", "/proc/self/comm"]}),
    "exit-status": Variant("runtime start", {}, "exit 3", status=3),
    "killed": Variant("runtime start", {"linux.namespaces": without("pid")["linux.namespaces"]}, "kill -KILL $$", status=137),
    # root
    "root-readonly": Variant("config root.readonly", {"root.readonly": True}, "touch /x; touch /dev/shm/x && echo yes"),
    "root-absolute": Variant("config root.path", {"root.path": "@BUNDLE@/rootfs"}, "ls /"),
    "root-readonly-with-a-writable-mount": Variant("config root.readonly", {"root.readonly": True} | bind(to="/tmp"), "touch /tmp/x && ls /tmp",
                                                   setup=DATA),
    # mounts
    "bind": Variant("config mounts", bind(), SHOW, setup=DATA),
    "bind-ro": Variant("config mounts ro", bind("ro"), SHOW, setup=DATA),
    "bind-all-off": Variant("config mounts", bind("nosuid", "nodev", "noexec", "noatime"), SHOW, setup=DATA),
    "bind-nodiratime": Variant("config mounts", bind("nodiratime", "strictatime"), setup=DATA),
    "bind-relatime": Variant("config mounts", bind("relatime"), setup=DATA),
    "bind-nosymfollow": Variant("config mounts nosymfollow", bind("nosymfollow"), "cat /data/link",
                                setup=DATA + "; ln -s file data/link"),
    "bind-type": Variant("config mounts type bind", bind("ro", type="bind", options=["ro"]), SHOW, setup=DATA),
    "bind-plain": Variant("config mounts bind", bind(options=["bind", "rw"]), "ls /data/below", setup=DATA),
    "bind-file": Variant("config mounts", bind("ro", source="data/file", to="/etc/new/file"), "cat /etc/new/file", setup=DATA),
    "bind-over-file": Variant("config mounts", bind(source="data/file", to="/etc/passwd"), "cat /etc/passwd", setup=DATA),
    "bind-relative-source": Variant("config mounts source", bind(source="x", **{"type": "bind"}) | {
        "mounts": [*oci.BASE["mounts"], {"destination": "/data", "source": "data", "type": "bind", "options": ["rbind"]}],
        "mounts+": []}, SHOW, setup=DATA),
    "bind-through-a-link": Variant("config mounts", bind(to="/link/made"), "ls -l /link; ls /inner/made",
                                   setup=DATA + "; mkdir rootfs/inner; ln -s /inner rootfs/link"),
    "bind-tree": Variant("config mounts rbind", bind(source="tree"), "ls /data/sub; touch /data/sub/x", setup="@tree@"),
    "bind-tree-ro": Variant("config mounts ro", bind("ro", source="tree"), "touch /data/x; touch /data/sub/x; ls /data/sub", setup="@tree@"),
    "bind-tree-rro": Variant("config mounts rro", bind("rro", source="tree"), "touch /data/x; touch /data/sub/x; ls /data/sub", setup="@tree@"),
    "bind-tree-recursive": Variant("config mounts rnosuid", bind("rnosuid", "rnoexec", "rnodev", source="tree"), setup="@tree@"),
    "bind-shallow": Variant("config mounts bind", bind(source="tree", options=["bind"]), "ls /data/sub", setup="@tree@"),
    "tmpfs": Variant("config mounts tmpfs", tmpfs("size=1m", "mode=1750", "uid=5", "gid=6", "noexec"),
                     "stat -c '%a %u %g' /data; dd if=/dev/zero of=/data/x bs=1M count=2 2>&1 | head -1; ls -s /data/x"),
    "tmpfs-ro": Variant("config mounts tmpfs", tmpfs("ro"), "touch /data/x"),
    "tmpfs-mode-of-the-image": Variant("config mounts tmpfs", tmpfs(), "stat -c '%a %u %g' /data",
                                       setup="mkdir -m 1711 rootfs/data; chown 3:4 rootfs/data"),
    "tmpfs-copyup": Variant("config mounts tmpcopyup", tmpfs("tmpcopyup", "size=1m"),
                            "cd /data; find . | sort | while read f; do stat -c '%n %F %a %u:%g' $f; done; cat a/b; readlink l",
                            setup="mkdir -p rootfs/data/a; echo text > rootfs/data/a/b; chown 3:4 rootfs/data/a/b;"
                            "chmod 640 rootfs/data/a/b; ln -s a/b rootfs/data/l"),
    "tmpfs-on-tmpfs": Variant("config mounts order", {"mounts+": [
        {"destination": "/a", "type": "tmpfs", "source": "first"}, {"destination": "/a/b", "type": "tmpfs", "source": "second"}]},
        "ls -R /a"),
    "tmpfs-ro-with-one-below": Variant("config mounts order", {"mounts+": [
        {"destination": "/a", "type": "tmpfs", "source": "first", "options": ["ro"]},
        {"destination": "/a/b", "type": "tmpfs", "source": "second"}]}, "touch /a/x; touch /a/b/x && ls /a/b"),
    "dev-ro": Variant("config mounts tmpfs ro", {"mounts": [m | ({"options": [*m["options"], "ro"]} if m["destination"] == "/dev" else {})
                                                            for m in oci.BASE["mounts"]]}, "touch /dev/x"),
    "proc-ro": Variant("config mounts", {"mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["ro"]},
                                                    *oci.BASE["mounts"][1:]]}, "echo x > /proc/self/comm"),
    "proc-hidepid": Variant("config mounts data", {"mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["hidepid=2", "nosuid"]}, *oci.BASE["mounts"][1:]]}),
    "overlay": Variant("config mounts type", {"mounts+": [{"destination": "/data", "type": "overlay", "source": "overlay", "options": [
        "lowerdir=@BUNDLE@/data", "upperdir=@BUNDLE@/up/u", "workdir=@BUNDLE@/up/w"]}]}, SHOW, setup="@overlay@"),
    "no-dev-mount": Variant("config mounts", {"mounts": [oci.BASE["mounts"][0]], "linux.maskedPaths": [], "linux.readonlyPaths": []},
                            setup="rm -rf rootfs/dev/*"),
    "no-mounts": Variant("config mounts", {"mounts": [], "linux.maskedPaths": [], "linux.readonlyPaths": [],
                                           "process.noNewPrivileges": False}, "ls /proc; ls /dev", setup="rm -rf rootfs/dev/*"),
    "dev-bind": Variant("config mounts", {"mounts": [oci.BASE["mounts"][0], {
        "destination": "/dev", "source": "/dev", "type": "bind", "options": ["rbind"]}], "linux.maskedPaths": []},
        "ls -l /dev/null /dev/ptmx"),
    "mount-synchronous": Variant("config mounts sync", tmpfs("sync", "dirsync", "strictatime")),
    "idmap": Variant("config mounts idmap", bind("idmap", uidMappings=MAPS, gidMappings=MAPS), "stat -c '%u %g' /data/file",
                     setup=DATA + "; chown 5:6 data/file", against="crun"),
    "idmap-inverse": Variant("config mounts uidMappings", USER | bind(
        uidMappings=[{"containerID": 0, "hostID": 100000, "size": 65536}],
        gidMappings=[{"containerID": 0, "hostID": 100000, "size": 65536}]), "stat -c '%u %g' /data/file; touch /data/x; stat -c '%u' /data/x",
        setup=DATA + "; chmod 777 data; @mapped@", against="crun"),
    **{f"bind-{kind}": Variant("config mounts propagation", bind(kind, source="tree"), setup="@tree@")
       for kind in ("private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable")},
    # names and namespaces
    "hostname-absent": Variant("config hostname", {"hostname": None}),
    "domainname": Variant("config domainname", {"domainname": "of.the.box"}, against="crun"),
    "no-pid-namespace": Variant("config-linux Namespaces", without("pid"), "[ $$ -gt 1 ] && echo seen"),
    "no-network-namespace": Variant("config-linux Namespaces", without("network")),
    "no-ipc-namespace": Variant("config-linux Namespaces", without("ipc")),
    "no-uts-namespace": Variant("config-linux Namespaces", without("uts") | {"hostname": None}),
    "no-cgroup-namespace": Variant("config-linux Namespaces", without("cgroup"), "sed s/main// /proc/self/cgroup; ls -d /sys/fs/cgroup/cgroup.procs"),
    "join-network": Variant("config-linux Namespaces path", joined("network")),
    "join-uts": Variant("config-linux Namespaces path", joined("uts") | {"hostname": "renamed"}),
    "join-ipc": Variant("config-linux Namespaces path", joined("ipc")),
    "join-pid": Variant("config-linux Namespaces path", joined("pid"), "[ -d /proc/1 ] && echo $(tr '\\0' ' ' < /proc/1/cmdline)"),
    "join-cgroup": Variant("config-linux Namespaces path", joined("cgroup")),
    "user-namespace": Variant("config-linux User mappings", USER, "id; touch /tmp/x; stat -c %u /tmp/x; mknod /tmp/n c 1 3 2>&1",
                              setup="@mapped@"),
    "user-namespace-two-ranges": Variant("config-linux User mappings", {
        "linux.namespaces+": [{"type": "user"}], "process.user": {"uid": 1000, "gid": 1000, "additionalGids": [5]},
        "linux.uidMappings": [{"containerID": 0, "hostID": 100000, "size": 1000}, {"containerID": 1000, "hostID": 300000, "size": 2}],
        "linux.gidMappings": [{"containerID": 0, "hostID": 100000, "size": 1000}, {"containerID": 1000, "hostID": 300000, "size": 2}]},
        "id", setup="@mapped@"),
    "user-namespace-rights": Variant("config-linux User mappings", USER | RIGHTS, "mount -t tmpfs none /tmp && echo mounted; hostname x; hostname",
                                     setup="@mapped@"),
    "time-offsets": Variant("config-linux timeOffsets", {"linux.namespaces+": [{"type": "time"}], "linux.timeOffsets": {
        "boottime": {"secs": 1000000, "nanosecs": 5}, "monotonic": {"secs": 2000}}},
        "[ $(sed 's/[.].*//' /proc/uptime) -gt 1000000 ] && echo later; cat /proc/self/timens_offsets", against="crun"),
    # devices
    "devices": Variant("config-linux Devices", {"linux.devices": [
        {"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6},
        {"type": "b", "path": "/dev/deep/block", "major": 7, "minor": 99, "fileMode": 0o600},
        {"type": "p", "path": "/dev/fifo", "fileMode": 0o622}, {"type": "u", "path": "/dev/u", "major": 1, "minor": 3}]},
        "stat -c '%a' /dev/deep"),
    "devices-elsewhere": Variant("config-linux Devices", {"linux.devices": [
        {"type": "c", "path": "/tmp/here/null", "major": 1, "minor": 3}]}, "stat -c '%F %a %t:%T' /tmp/here/null; echo x > /tmp/here/null"),
    "devices-default-again": Variant("config-linux Devices", {"linux.devices": [
        {"type": "c", "path": "/dev/null", "major": 1, "minor": 3, "fileMode": 0o600, "uid": 1, "gid": 1}]}),
    "device-rules": Variant("config-linux Device rules", RIGHTS, DEVICES),
    "device-rules-none": Variant("config-linux Device rules", RIGHTS | {"linux.resources": None}, DEVICES),
    "device-rules-all": Variant("config-linux Device rules", RIGHTS | {"linux.resources.devices": [{"allow": True, "access": "rwm"}]}, DEVICES),
    "device-rules-one": Variant("config-linux Device rules", RIGHTS | {"linux.resources.devices+": [
        {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "rw"},
        {"allow": True, "type": "c", "major": 10, "access": "rm"}]}, DEVICES),
    "device-rules-taken-back": Variant("config-linux Device rules", RIGHTS | {"linux.resources.devices": [
        {"allow": True, "access": "rwm"}, {"allow": False, "type": "c", "major": 10, "minor": 229, "access": "w"}]}, DEVICES),
    # sysctl, paths, the rest of linux
    "sysctl": Variant("config-linux Sysctl", {
        "linux.sysctl.net.ipv4.ip_unprivileged_port_start": "80", "linux.sysctl.kernel.msgmax": "9000",
        "linux.sysctl.fs.mqueue.msg_max": "12", "linux.sysctl.kernel.shm_rmid_forced": "1", "linux.sysctl.kernel.domainname": "set"},
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax /proc/sys/fs/mqueue/msg_max /proc/sys/kernel/shm_rmid_forced"),
    "sysctl-slashes": Variant("config-linux Sysctl", {"linux.sysctl.net/ipv4/conf/lo/forwarding": "1"},
                              "cat /proc/sys/net/ipv4/conf/lo/forwarding"),
    "masked": Variant("config-linux maskedPaths", {"linux.maskedPaths": [
        "/etc/passwd", "/root", "/not/there", "/etc/passwd/not", "/link"], "process.capabilities": EVERY_SET},
        "cat /etc/passwd; ls -A /root; touch /root/x; touch /inner/x; echo y > /etc/passwd; ls -A /link; ls -A /inner; mount | grep -c inner",
        setup="echo secret > rootfs/root/s; mkdir rootfs/inner; echo s > rootfs/inner/s; ln -s inner rootfs/link"),
    "masked-none": Variant("config-linux maskedPaths", {"linux.maskedPaths": []}, "ls /sys/firmware | head -1"),
    "readonly-paths": Variant("config-linux readonlyPaths", {"linux.readonlyPaths": ["/etc", "/etc/passwd", "/nowhere", "/tmp"]},
                              "touch /etc/x; touch /tmp/x; echo >> /etc/passwd; touch /root/x && echo yes"),
    "readonly-tree": Variant("config-linux readonlyPaths", {"linux.readonlyPaths": ["/data"]} | bind(source="tree"),
                             "touch /data/x; touch /data/sub/x", setup="@tree@"),
    **{f"root-{kind}": Variant("config-linux rootfsPropagation", {"linux.rootfsPropagation": kind})
       for kind in ("private", "shared", "slave", "unbindable", "rprivate", "rshared", "rslave", "runbindable")},
    "personality": Variant("config-linux personality", {"linux.personality": {"domain": "LINUX32"}}, "uname -m", against="crun"),
    "annotations": Variant("config annotations", {"annotations": {"org.example.a": "b", "c": ""}}),
    "scheduler": Variant("config scheduler", {"process.scheduler": {"policy": "SCHED_BATCH", "nice": 5}},
                         "cut -d' ' -f19,41 /proc/self/stat", against="crun"),
    "io-priority": Variant("config ioPriority", {"process.ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 0}}, "ionice -p $$"),
    "io-priority-level": Variant("config ioPriority", {"process.ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 3}}, "ionice -p $$"),
    # seccomp
    "seccomp-errno": Variant("config-linux Seccomp", filtered({"names": ["mkdir", "mkdirat"], "action": ERRNO, "errnoRet": 28}), "mkdir /x 2>&1"),
    "seccomp-errno-default": Variant("config-linux Seccomp", filtered({"names": ["mkdir", "mkdirat"], "action": ERRNO}), "mkdir /x 2>&1"),
    "seccomp-errno-zero": Variant("config-linux Seccomp", filtered({"names": ["mkdir", "mkdirat"], "action": ERRNO, "errnoRet": 0}),
                                  "mkdir /x && ls -d /x 2>&1"),
    "seccomp-kill": Variant("config-linux Seccomp", filtered({"names": ["mkdir", "mkdirat"], "action": KILL}),
                            "(mkdir /x); echo $?"),
    "seccomp-kill-init": Variant("config-linux Seccomp", filtered({"names": ["chdir"], "action": "SCMP_ACT_KILL"}),
                                 "cd /tmp", status=159),
    "seccomp-trap": Variant("config-linux Seccomp", filtered({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_TRAP"}), "(mkdir /x); echo $?"),
    "seccomp-log": Variant("config-linux Seccomp", filtered({"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_LOG"}, flags=[
        "SECCOMP_FILTER_FLAG_LOG"]), "mkdir /x && echo made"),
    "seccomp-unknown-name": Variant("config-linux Seccomp names", filtered({"names": ["mkdir", "no_such_call", "mkdirat"], "action": ERRNO}),
                                    "mkdir /x 2>&1"),
    "seccomp-all-arches": Variant("config-linux Seccomp architectures", filtered(
        {"names": ["mkdir", "mkdirat"], "action": ERRNO}, architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]), "mkdir /x 2>&1"),
    "seccomp-foreign-arch": Variant("config-linux Seccomp architectures", filtered(
        {"names": ["mkdir", "mkdirat"], "action": ERRNO}, architectures=["SCMP_ARCH_ARM"]), "mkdir /x 2>&1"),
    "seccomp-new-privileges": Variant("config-linux Seccomp", RIGHTS | filtered({"names": ["mkdir", "mkdirat"], "action": ERRNO}), "mkdir /x 2>&1"),
    "seccomp-of-a-user": Variant("config-linux Seccomp", {"process.user": {"uid": 5, "gid": 5}, "process.noNewPrivileges": False,
                                 **filtered({"names": ["mkdir", "mkdirat"], "action": ERRNO, "errnoRet": 28})}, "mkdir /tmp/x 2>&1"),
    "seccomp-empty": Variant("config-linux Seccomp", filtered()),
    "seccomp-spec-allow": Variant("config-linux Seccomp flags", filtered({"names": ["mkdir"], "action": ERRNO}, flags=["SECCOMP_FILTER_FLAG_SPEC_ALLOW"])),
    **{f"seccomp-{operator}-{value:#x}": compared(operator, value) for operator in ("EQ", "NE", "LT", "LE", "GT", "GE")
       for value in (0x100, 0x100000001)},
    "seccomp-MASKED_EQ": compared("MASKED_EQ", 0x1_0000_00FF, 0x1_0000_0001),
    "seccomp-two-tests": Variant("config-linux Seccomp args", filtered({"names": ["kill"], "action": ERRNO, "args": [
        {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 20, "op": "SCMP_CMP_GT"}]}), KILLS),
    "seccomp-one-argument-twice": Variant("config-linux Seccomp args", filtered({"names": ["kill"], "action": ERRNO, "args": [
        {"index": 1, "value": 17, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 28, "op": "SCMP_CMP_EQ"}]}), KILLS),
    "seccomp-two-rules": Variant("config-linux Seccomp syscalls", filtered(
        {"names": ["kill"], "action": ERRNO, "args": [{"index": 1, "value": 17, "op": "SCMP_CMP_EQ"}]},
        {"names": ["kill"], "action": ERRNO, "errnoRet": 28, "args": [{"index": 1, "value": 23, "op": "SCMP_CMP_GE"}]}), KILLS),
    # resources
    "pids": resources("pids.max", "pids", pids={"limit": 33}),
    "pids-unlimited": resources("pids.max", "pids", pids={"limit": -1}),
    "memory": resources("memory.max memory.low memory.swap.max", "memory", memory={"limit": 64 << 20, "reservation": 32 << 20}),
    "memory-swap": resources("memory.max memory.swap.max", "memory", memory={"limit": 64 << 20, "swap": 96 << 20}),
    "memory-no-swap": resources("memory.max memory.swap.max", "memory", memory={"limit": 64 << 20, "swap": 64 << 20}),
    "memory-swap-unlimited": resources("memory.max memory.swap.max", "memory", memory={"limit": 64 << 20, "swap": -1}),
    "memory-unlimited": resources("memory.max memory.swap.max", "memory", memory={"limit": -1}),
    "cpu-shares": resources("cpu.weight cpu.max", "cpu", cpu={"shares": 512}),
    "cpu-shares-least": resources("cpu.weight", "cpu", cpu={"shares": 2}),
    "cpu-quota": resources("cpu.max cpu.max.burst", "cpu", cpu={"quota": 20000, "period": 50000, "burst": 1000}),
    "cpu-quota-alone": resources("cpu.max", "cpu", cpu={"quota": 30000}),
    "cpu-period-alone": resources("cpu.max", "cpu", cpu={"period": 50000}),
    "cpu-quota-unlimited": resources("cpu.max", "cpu", cpu={"quota": -1, "period": 50000}),
    "cpu-idle": resources("cpu.idle", "cpu", cpu={"idle": 1}),
    "cpuset": resources("cpuset.cpus cpuset.mems cpuset.cpus.effective", "cpuset", cpu={"cpus": "0", "mems": "0"}),
    "io-throttle": resources("io.max", "io", blockIO={
        "throttleReadBpsDevice": [{"major": 254, "minor": 0, "rate": 1 << 20}],
        "throttleWriteIOPSDevice": [{"major": 254, "minor": 0, "rate": 100}]}),
    "io-weight": resources("io.weight", "io", blockIO={"weight": 500}),
    "hugetlb": resources("hugetlb.2MB.max", "hugetlb", hugepageLimits=[{"pageSize": "2MB", "limit": 4 << 20}]),
    "unified": resources("memory.high pids.max", "memory", "pids", unified={"memory.high": "50000000", "pids.max": "44"}),
    "resources-together": resources("memory.max pids.max cpu.weight", "memory", "pids", "cpu", memory={"limit": 64 << 20},
                                    pids={"limit": 10}, cpu={"shares": 1024}),
}

# (variant, what differs): as which other runtime labs does it ("crun", or "none"), and why.
DIFFERENCES: dict[tuple[str, str], tuple[str, str]] = {}


def _has(controllers: tuple[str, ...]) -> bool:
    there = set(machine.read_file(f"{machine.CGROUP_ROOT}/cgroup.controllers").split())
    return set(controllers) <= there | set(capabilities.names(syscalls.capget().effective))


@pytest.fixture(scope="module")
def others():
    """A process with namespaces of its own, for those that are joined by path."""
    words = ["unshare", "--net", "--uts", "--ipc", "--cgroup", "--pid", "--fork", "sh", "-c",
             "hostname given; echo; exec sleep 1000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as held:
        held.stdout.readline()
        inner = machine.read_file(f"/proc/{held.pid}/task/{held.pid}/children").split()[0]
        yield inner
        subprocess.run(["kill", "-KILL", inner], check=True)
        held.wait()


def prepare(made, setup):
    script = setup.replace("@tree@", "mkdir -p tree/sub; mount -t tmpfs tree tree; mkdir tree/sub; mount -t tmpfs sub tree/sub; touch tree/sub/f")
    script = script.replace("@overlay@", DATA + "; mkdir up; mount -t tmpfs up up; mkdir up/u up/w")
    script = script.replace("@mapped@", "chown -R 100000:100000 rootfs; chmod 755 .")
    subprocess.run(["sh", "-ec", script], cwd=made.path, check=True)


@contextlib.contextmanager
def prepared(variant, other):
    with oci.bundle() as made:
        prepare(made, variant.setup)
        kinds = {"network": "net", "mount": "mnt"}
        text = json.dumps(oci.patched(oci.BASE, variant.patch))
        for kind in ("network", "uts", "ipc", "pid", "cgroup"):
            text = text.replace(f"@{kind}@", f"/proc/{other}/ns/{kinds.get(kind, kind)}")
        script = f"{oci.FACTS}{variant.probe}\nexit 0" if variant.status == 0 else oci.FACTS + variant.probe
        text = text.replace('"@FACTS@"', json.dumps(script))
        made.write_config(json.loads(text), "" if "process.args" in variant.patch else script)
        try:
            yield made
        finally:
            for mount in ("tree/sub", "tree", "up"):
                if os.path.ismount(made.path / mount):
                    subprocess.run(["umount", str(made.path / mount)], check=True)


def seen(variant, runtime, other):
    """The exit status and the facts of one variant under one runtime."""
    with prepared(variant, other) as made:
        known = {os.readlink(f"/proc/{other}/ns/{kind}"): "given" for kind in ("net", "uts", "ipc", "pid", "cgroup")}
        done = made.run(runtime)
        found = oci.facts(done.stdout, made, known)
        left = oci.left(made)
    return done.returncode, found, left, done.stderr


def differing(one, two):
    """The sections that differ, the exit status among them."""
    sections = [name for name in {**one[1], **two[1]} if one[1].get(name) != two[1].get(name)]
    return ["exit"] * (one[0] != two[0]) + sections


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, others):
    variant = VARIANTS[name]
    if not _has(variant.needs):
        pytest.skip(f"this machine lacks {' '.join(variant.needs)}")
    ours, theirs = (seen(variant, runtime, others) for runtime in ("labs", variant.against))
    assert ours[0] == variant.status, ours[3]
    assert not ours[2]
    wanted = {section: allowed for (of, section), allowed in DIFFERENCES.items() if of == name}
    found = differing(ours, theirs)
    shown = {s: (ours[1].get(s), theirs[1].get(s)) for s in found}
    assert sorted(found) == sorted(wanted), (shown, theirs[3])
    third = "crun" if variant.against == "runc" else "runc"
    if third in {who for who, _ in wanted.values()}:
        alike = differing(ours, seen(variant, third, others))
        assert not [s for s, (who, _) in wanted.items() if who == third and s in alike]
