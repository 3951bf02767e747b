"""labs-runtime against images and commands that want out: each test runs the attack, and sees that it gets nowhere.

Where a single line of the runtime is the defence, the attack is run a second time on a copy without that line
(`weakened`), and must succeed there: a test that cannot fail proves nothing.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import oci
from tests.test_oci import quietly

PYTHON = os.path.realpath("/usr/bin/python3")
HOST_LIBRARIES = {"mounts+": [{"destination": path, "source": path, "type": "none", "options": ["rbind", "ro"]}
                              for path in ("/usr", "/lib", "/lib64")]}
# CVE-2019-5736 in the runtime's own language: whoever is executed keeps the runtime's file open, lets the runtime
# end, and opens it for writing.  Opened to append, and nothing is written, so that a hole costs no more than the test;
# and the tests' own Python keeps the file busy, so what tells is whether its mount may be written.
OVERWRITE = """#!/proc/self/exe
import os
held = os.open("/proc/self/exe", os.O_RDONLY)
os.set_inheritable(held, True)
mount = "read-only" if os.fstatvfs(held).f_flag & os.ST_RDONLY else "writable"
script = f"echo {mount}; exec 2>&1; : >> /proc/self/fd/{held} && echo opened"
os.execve("/bin/sh", ["sh", "-c", script], {})
"""


@pytest.fixture
def made():
    with oci.bundle() as one:
        yield one


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weakened(made, file, line, instead):
    """A copy of the runtime in which one piece of a file is another: its program."""
    here, copy = Path(oci.LABS).parent.parent, made.path / "weak"
    if not copy.exists():
        for folder in ("bin", "labs"):
            shutil.copytree(here / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "check"))
    text = (here / file).read_text()
    assert text.count(line) == 1, f"{file} has changed: the weakened runtime would be a whole one"
    (copy / file).write_text(text.replace(line, instead))
    return str(copy / "bin/labs-runtime")


def clean_end(made, done):
    """The attack was refused by one line, and nothing is left of the container."""
    assert done.returncode, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert oci.left(made) == []


@pytest.fixture
def overwriting(made):
    (made.rootfs / "entry").write_text(OVERWRITE)
    (made.rootfs / "entry").chmod(0o755)
    before = digest(PYTHON)
    yield made
    assert digest(PYTHON) == before


def test_the_runtimes_binary_cannot_be_overwritten_by_its_container(overwriting):
    """CVE-2019-5736: the command is a link to the program that starts it."""
    overwriting.write("", {"process.args": ["/entry"], **HOST_LIBRARIES})
    done = overwriting.run()
    assert done.stdout.startswith("read-only\n") and "opened" not in done.stdout, done
    weak = weakened(overwriting, "bin/labs-runtime", "if enters_a_container(sys.argv[1:])", "if False")
    assert overwriting.run(weak).stdout.startswith("writable\n")


def test_the_runtimes_binary_cannot_be_overwritten_through_exec(overwriting):
    overwriting.write("exec sleep 1000", HOST_LIBRARIES)
    quietly(overwriting, "run", "-d", overwriting.name)
    done = overwriting.call("exec", overwriting.name, "/entry")
    assert done.stdout.startswith("read-only\n") and "opened" not in done.stdout, done


def test_a_joining_process_shows_its_file_to_nobody(made):
    """The other way to the same file: a process inside watches for the one that joins, and opens /proc/PID/exe."""
    watch = ("while :; do for p in /proc/[0-9]*; do case $p in /proc/1|/proc/$$) ;; *) "
             "if readlink $p/exe | grep -q python; then (: >> $p/exe) 2>&1 && echo $p opened; fi;; esac; done; done")
    made.write(f"({watch}) > /seen 2>&1", {"process.capabilities": {
        name: ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"] for name in ("bounding", "effective", "permitted")}})
    quietly(made, "run", "-d", made.name)
    for _ in range(10):
        assert made.call("exec", made.name, "true").returncode == 0
    assert "opened" not in (made.rootfs / "seen").read_text()


def test_a_working_directory_is_never_a_leaked_descriptor(made):
    """CVE-2024-21626: process.cwd is /proc/self/fd/N, and N is a directory of the host."""
    (made.path / "witness").write_text("of the host")
    held = [os.open(made.path, os.O_RDONLY) for _ in range(4)]
    for fd in held:
        os.set_inheritable(fd, True)
    numbers = sorted({*range(3, 9), *held})

    def attacks(runtime):
        for number in numbers:
            made.write("cat witness", {"process.cwd": f"/proc/self/fd/{number}"})
            yield made.call("run", made.name, runtime=runtime, close_fds=False)

    for done in attacks("labs"):
        clean_end(made, done)
    weak = weakened(made, "labs/oci_process.py", "    if not inside:\n", "    if False:\n")
    assert any("of the host" in done.stdout for done in attacks(weak))
    for fd in held:
        os.close(fd)


def test_a_working_directory_of_exec_is_never_a_leaked_descriptor(made):
    made.write("exec sleep 1000")
    quietly(made, "run", "-d", made.name)
    for number in range(3, 10):
        done = made.call("exec", "--cwd", f"/proc/self/fd/{number}", made.name, "ls", "..")
        assert done.returncode and not done.stdout, (number, done)


def test_no_descriptor_of_the_runtime_is_inside(made):
    for script in ("ls -l /proc/self/fd", "exec ls -l /proc/1/fd"):
        done = made.write(script).run()
        links = [line.partition(" -> ")[2] for line in done.stdout.splitlines() if " -> " in line]
        assert len(links) == 3 and "/" not in "".join(links).replace("/dev/null", ""), done.stdout
    quietly(made.write("exec sleep 1000"), "run", "-d", made.name)
    assert len(made.good("exec", made.name, "ls", "/proc/self/fd").split()) == 4


MASK = {"linux.maskedPaths": ["/etc/passwd"], "linux.readonlyPaths": []}
SHOW_MASK = "cat /etc/passwd; stat -c '%F %t:%T' /etc/passwd; grep -c core_pattern /proc/self/mountinfo"


@pytest.mark.parametrize("null", ["link", "file"])
def test_a_null_device_of_the_image_that_is_none_is_refused(made, null):
    if null == "link":
        (made.rootfs / "dev/null").symlink_to("/proc/sys/kernel/core_pattern")
    else:
        (made.rootfs / "dev/null").write_text("not a device")
    clean_end(made, made.write(SHOW_MASK, MASK | {"mounts": [oci.BASE["mounts"][0]]}).run())


def test_a_mask_is_the_hosts_null_whatever_the_image_has(made):
    """CVE-2025-31133: /dev/null is a link when the mask is made of it, and a file of the host's becomes writable."""
    (made.path / "dev").mkdir()
    (made.path / "dev/null").symlink_to("/proc/sys/kernel/core_pattern")
    own = {"destination": "/dev", "source": "dev", "type": "none", "options": ["bind"]}
    made.write(SHOW_MASK, MASK | {"mounts": [oci.BASE["mounts"][0], own]})
    assert made.run().stdout.splitlines() == ["character special file 1:3", "0"]
    weak = weakened(made, "labs/oci_root.py", 'S.open_tree("/dev/null", CLONE)',
                    'S.open_tree("", CLONE | S.AT_EMPTY_PATH, self.open("/dev/null"))')
    assert made.run(weak).stdout.splitlines()[-1] == "1"


@pytest.mark.parametrize("link", ["/proc/sys/kernel/core_pattern", "/target", "../../../../../../target"])
def test_the_console_is_mounted_through_no_link(made, link):
    """CVE-2025-52565: /dev/console of the image is a link, and the terminal would be mounted where it leads."""
    (made.rootfs / "target").write_text("x")
    (made.rootfs / "dev/console").symlink_to(link)
    (made.rootfs / "dev/pts").mkdir()
    mounts = [mount for mount in oci.BASE["mounts"] if mount["destination"] in ("/proc", "/dev/pts")]
    made.write("cat /proc/self/mountinfo", {"process.terminal": True, "mounts": mounts, "linux.readonlyPaths": []})
    done = made.run()
    clean_end(made, done)
    assert (made.rootfs / "target").read_text() == "x"
    if link == "/target":
        weak = weakened(made, "labs/oci_root.py", 'self.open("/dev/console", RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS)',
                        'self.open("/dev/console")')
        assert " /target " in made.run(weak).stdout


def test_what_is_written_for_the_container_goes_to_the_hosts_proc(made):
    """CVE-2025-52881: the container's /proc is replaced, and labels and sysctl land in a file of the image."""
    (made.rootfs / "proc/sys/kernel").mkdir(parents=True)
    (made.rootfs / "proc/sys/kernel/msgmax").write_text("")
    (made.rootfs / "proc/self/attr").mkdir(parents=True)
    (made.rootfs / "proc/self/attr/exec").write_text("")
    made.write("cat /proc/sys/kernel/msgmax", {
        "linux.sysctl": {"kernel.msgmax": "9001"}, "mounts": oci.BASE["mounts"][1:5], "linux.maskedPaths": [],
        "linux.readonlyPaths": []})
    assert made.run().returncode == 0
    assert (made.rootfs / "proc/sys/kernel/msgmax").read_text() == ""
    made.write("cat /proc/sys/kernel/msgmax", {"linux.sysctl": {"kernel.msgmax": "9001"}})
    assert made.run().stdout == "9001\n"


@pytest.mark.parametrize("target", ["/", "../../../../../../..", "/../../..", "/proc/self/root", "/tmp/.."])
def test_a_mount_point_that_is_a_link_stays_beneath_the_root(made, target):
    outside = made.path / "outside"
    outside.mkdir()
    (made.path / "data").mkdir()
    (made.path / "data/witness").touch()
    (made.rootfs / "mnt").symlink_to(target)
    (made.rootfs / "escape").symlink_to(str(outside))
    places = [{"destination": to, "source": "data", "type": "none", "options": ["bind"]}
              for to in (f"/mnt{made.path}/outside", "/escape/in", "/../../../up")]
    made.write("find / -xdev -name witness; grep -c witness /proc/self/mountinfo", {"mounts+": places})
    made.run()
    assert not list(outside.iterdir())
    assert not os.path.exists("/up") and not os.path.exists("/mnt/tmp")
    assert oci.left(made) == []


def test_a_mount_point_that_changes_all_the_time_stays_beneath_the_root(made):
    """A directory of the image and a link out of it change places while the runtime makes and mounts what is below."""
    outside = made.path / "outside"
    outside.mkdir()
    (made.path / "data").mkdir()
    (made.rootfs / "place").mkdir()
    (made.rootfs / "link").symlink_to(outside)
    changing = ("import ctypes, sys\nexchange = ctypes.CDLL(None).renameat2\n"
                "while True: exchange(-100, sys.argv[1].encode(), -100, sys.argv[2].encode(), 2)")
    below = [{"destination": f"/place/{n}", "source": "data", "type": "none", "options": ["bind"]} for n in range(20)]
    made.write("true", {"mounts+": below})
    weak = weakened(made, "labs/oci_root.py", "def open(self, path: str, resolve: int = RESOLVE_IN_ROOT,",
                    "def open(self, path: str, resolve: int = 0,")
    with subprocess.Popen([sys.executable, "-c", changing, made.rootfs / "place", made.rootfs / "link"]) as changer:
        for _ in range(5):
            made.run()
        escaped = os.listdir(outside)
        for _ in range(10):
            made.run(weak)
            if os.listdir(outside):
                break
        changer.kill()
    assert not escaped
    assert os.listdir(outside)


@pytest.mark.parametrize("kind", ["proc", "sysfs"])
def test_proc_and_sysfs_are_mounted_through_no_link(made, kind):
    place = {"proc": "proc", "sysfs": "sys"}[kind]
    (made.rootfs / place).rmdir()
    (made.rootfs / "elsewhere").mkdir()
    (made.rootfs / place).symlink_to("/elsewhere")
    made.write("true", {"linux.maskedPaths": [], "linux.readonlyPaths": []})
    clean_end(made, made.run())
    assert made.run("runc").returncode


def test_nothing_of_the_runtime_is_loaded_from_the_image(made):
    """Modules and libraries of the image with the names that the runtime would look for, in every place."""
    marker = "import os; os.write(2, b'LOADED FROM THE IMAGE')\n"
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folders = [f"usr/lib/{version}", f"usr/local/lib/{version}", f"lib/{version}", "usr/lib/python3/dist-packages",
               "srv", "."]
    for folder in folders:
        there = made.rootfs / folder
        for name in ("encodings", "json", "labs", "shutil", "resource", "signal", "subprocess", "time", "traceback",
                     "codecs", "stat"):
            (there / name).mkdir(parents=True, exist_ok=True)
            (there / name / "__init__.py").write_text(marker)
            (there / f"{name}.py").write_text(marker)
    here = Path(oci.LABS).parent.parent
    for name in sorted(path.name for path in (here / "labs").glob("*.py")):
        copy = made.rootfs / str(here / "labs").lstrip("/") / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(marker)
    for folder in ("lib", "usr/lib", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64"):
        (made.rootfs / folder).mkdir(parents=True, exist_ok=True)
        for name in ("libseccomp.so.2", "libc.so.6", "libnss_files.so.2", "libgcc_s.so.1"):
            (made.rootfs / folder / name).write_text("not a library")
    (made.rootfs / "full").mkdir()
    (made.rootfs / "full/file").write_text("x")
    blocked = [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]
    everything = {
        "process.env": [oci.PATH, "PYTHONPATH=/srv", "PYTHONHOME=/usr", "LD_LIBRARY_PATH=/lib",
                        "LD_PRELOAD=/lib/libc.so.6"],
        "linux.seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": blocked},
        "process.rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 99}],
        "mounts+": [{"destination": "/full", "type": "tmpfs", "source": "t", "options": ["tmpcopyup"]}],
        "hooks": {kind: [{"path": "/bin/true"}]
                  for kind in ("createRuntime", "createContainer", "startContainer", "poststop")}}
    done = made.write("unset LD_PRELOAD; cat /full/file; echo good", everything).run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "xgood\n", "")
    for words in (["nothing"], ["/etc"]):  # the ways to an error have imports of their own
        refused = made.write("", everything | {"process.args": words}).run()
        assert refused.returncode and "LOADED" not in refused.stderr
    quietly(made.write("exec sleep 1000", everything), "run", "-d", made.name)
    assert made.good("exec", made.name, "cat", "/full/file") == "x"
    assert "LOADED" not in made.call("exec", made.name, "nothing").stderr


@pytest.mark.parametrize("content", [
    b"\0\xff" * 1000, b":::::::\n" * 9, b"root:x:0:0\n", b"x" * (8 << 20), b"a:b:0:0:c:/" + b"d" * 5000 + b":\n",
], ids=["binary", "colons", "short", "long", "long-home"])
def test_a_passwd_file_of_any_content_starts_the_container(made, content):
    (made.rootfs / "etc/passwd").write_bytes(content)
    done = made.write("echo good").run()
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


def test_a_passwd_file_that_is_no_file(made):
    (made.rootfs / "etc/passwd").unlink()
    os.mkfifo(made.rootfs / "etc/passwd")
    done = made.write("echo good").run()
    assert (done.returncode, done.stdout) == (0, "good\n"), done.stderr


def test_a_process_that_was_not_asked_for_cannot_start_the_container(made):
    """The socket of start is the host's: nothing inside sees it, and state says nothing of the caller's secrets."""
    made.write("ls -A /run 2>/dev/null; exec sleep 1000")
    quietly(made, "create", made.name)
    shown = json.loads(made.good("state", made.name))
    assert shown["status"] == "created" and "env" not in json.dumps(shown)
    assert subprocess.run(["stat", "-c", "%a", str(made.state / made.name)], capture_output=True, text=True,
                          check=True).stdout == "711\n"
