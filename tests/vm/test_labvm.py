"""The QEMU backend: the cache and its damage, the build without mounts, and real machines restored side by side."""

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from vm import image, labvm, qemu
from vm.steps import LabError


@pytest.fixture
def fake_image(tmp_path):
    """A small directory that looks like a finished image to `broken`."""
    for name in image.FILES:
        (tmp_path / name).write_bytes(os.urandom(5000))
    files = {name: ((tmp_path / name).stat().st_size, image.checksum(tmp_path / name)) for name in image.FILES}
    (tmp_path / "meta.json").write_text(json.dumps({"files": files}))
    return tmp_path


def test_a_whole_image_is_not_broken(fake_image):
    assert image.broken(fake_image) is None


def test_a_flipped_byte_is_found(fake_image):
    data = bytearray((fake_image / "boot.qcow2").read_bytes())
    data[4000] ^= 1
    (fake_image / "boot.qcow2").write_bytes(data)
    assert "boot.qcow2 has another checksum" in image.broken(fake_image)


def test_a_truncated_file_is_found(fake_image):
    os.truncate(fake_image / "ram.zst", 4999)
    assert "ram.zst has another size" in image.broken(fake_image)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {}}'])
def test_a_broken_meta_file_is_found(fake_image, text):
    (fake_image / "meta.json").write_text(text)
    assert "meta.json" in image.broken(fake_image)


def test_a_broken_image_is_built_again_and_a_good_one_is_not(tmp_path, fake_image, monkeypatch):
    built = []
    monkeypatch.setattr(image, "CACHE", tmp_path.with_name(tmp_path.name + "-cache"))
    monkeypatch.setattr(image, "key", lambda: "0123456789ab")
    monkeypatch.setattr(
        image, "build", lambda place: (built.append(place), subprocess.run(["cp", "-a", fake_image, place], check=True))
    )
    place = image.image()
    assert image.image() == place and built == [place]
    (place / "token").write_text("damaged")
    assert image.image() == place and built == [place, place]
    assert image.broken(place) is None


def test_the_checksum_reads_all_data_and_no_more(tmp_path):
    """Zeros that a file system stores are the same as a hole: only contents and their places count."""
    sparse, stored, moved = (tmp_path / name for name in ("sparse", "stored", "moved"))
    for path, at in ((sparse, 5 << 20), (stored, 5 << 20), (moved, 6 << 20)):
        with path.open("wb") as file:
            file.truncate(8 << 20)
            file.seek(at)
            file.write(b"data")
    with stored.open("r+b") as file:
        file.write(bytes(3 << 20))
    assert stored.stat().st_blocks > sparse.stat().st_blocks
    assert image.checksum(stored) == image.checksum(sparse) != image.checksum(moved)
    with sparse.open("r+b") as file:
        file.seek((5 << 20) + 3)
        file.write(b"A")
    assert image.checksum(stored) != image.checksum(sparse)


def test_the_key_follows_every_input(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "REPO", tmp_path)
    for path in (
        "vm/image.py",
        "vm/qemu.py",
        "vm/provision.sh",
        "vm/packages.txt",
        "vm/requirements.txt",
        "vm/images/a/b",
        "requirements.txt",
        "constraints.txt",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    keys = [image.key()]
    for path in image.inputs():
        path.write_text("2")
        keys.append(image.key())
    assert len(set(keys)) == len(keys) == 9


@pytest.mark.parametrize(
    ("name", "value", "line"), [("NEED_DISK", 1 << 60, "disk at"), ("NEED_MEMORY", 1 << 60, "memory: ")]
)
def test_too_little_disk_or_memory_is_one_clear_line(tmp_path, monkeypatch, name, value, line):
    monkeypatch.setattr(image, "CACHE", tmp_path)
    monkeypatch.setattr(image, name, value)
    with pytest.raises(LabError, match=rf"^{line}.*GiB free, 1073741824.0 GiB needed$"):
        image.build(tmp_path / "vm-0123456789ab")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing_that_a_next_run_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(image, "CACHE", tmp_path)

    def interrupted(part, log):
        (part / "root").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "_file_system", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            image.build(tmp_path / "vm-0123456789ab")
    assert {p.name for p in tmp_path.iterdir()} == {"vm-0123456789ab.partial", "build.log"}


def test_packages_are_those_of_this_architecture(monkeypatch):
    here = set(image.packages())
    monkeypatch.setattr(image, "arch", lambda: qemu.ARCHES["aarch64"])
    assert set(image.packages()) ^ here == {"qemu-system-x86", "qemu-system-arm"}


def test_the_file_system_is_built_without_the_right_to_mount(tmp_path, monkeypatch):
    """The image that every other test runs on was built so: an ordinary container's root can build it too."""
    ran = []
    monkeypatch.setattr(image, "run", lambda argv, log: ran.append(argv))
    image._keys(tmp_path)
    image._file_system(tmp_path, tmp_path / "log")
    (argv,) = ran
    before = argv[: argv.index("mmdebstrap")]
    mount = ["mount", "-t", "tmpfs", "none", tmp_path]
    refused = subprocess.run([*before, *mount], capture_output=True, text=True)
    assert refused.returncode != 0 and "permission denied" in refused.stderr
    assert subprocess.run([*before, "chroot", "/", "true"]).returncode == 0


# ── real machines ────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def machine(name):
    name = f"{name}-{os.getpid()}"
    try:
        yield labvm.start(name, {})
    finally:
        labvm.stop(name)
        assert labvm.machine(name) is None and not (labvm.RUN / name).exists()


def guest(vm, command, **kwargs):
    return subprocess.run([*vm.ssh(), command], capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def one():
    with machine("one") as vm:
        yield vm


def test_two_machines_from_one_snapshot_are_clean_and_apart(one):
    assert guest(one, "touch /root/mine && sync").returncode == 0
    with machine("two") as two:
        assert guest(two, "test -e /root/mine").returncode == 1
        assert guest(two, "ls /sys/fs/cgroup/cgroup.controllers").returncode == 0
    assert guest(one, "test -e /root/mine").returncode == 0


def test_the_clock_is_right_after_a_restore(one):
    here = int(subprocess.run(["date", "+%s"], capture_output=True, text=True).stdout)
    assert abs(int(guest(one, "date +%s").stdout) - here) < 60


def test_nothing_listens_beyond_loopback(one):
    listening = subprocess.run(["ss", "-Hlntup"], capture_output=True, text=True).stdout.splitlines()
    ours = [line.split()[4] for line in listening if f"pid={one.pid()}," in line]
    assert ours and all(address.startswith("127.0.0.1:") for address in ours)


def test_the_guest_has_no_way_out(one):
    """No name resolves and no address outside answers, so every lab in it runs offline."""
    assert guest(one, "ip -4 addr show eth0 | grep -q 10.0.2.15").returncode == 0
    assert guest(one, "getent hosts example.com").returncode != 0
    for address in ("10.0.2.2", "192.0.2.1"):
        assert guest(one, f"curl -sS --max-time 5 http://{address}/").returncode in (7, 28)


def test_the_build_left_what_is_needed_and_nothing_of_the_host(one):
    """The host's certificates and package settings were for the build alone."""
    left = "/etc/labs-host-ca.pem /etc/apt/apt.conf.d/99mmdebstrap /var/cache/apt/archives/*.deb"
    assert guest(one, f"ls -d {left}").stdout == ""
    assert guest(one, "ls /opt/labs/rootfs").stdout.split() == ["busybox", "debian"]
    assert guest(one, "test -x /opt/labs/venv/bin/jupyter-lab").returncode == 0
    assert json.loads(guest(one, "cat /etc/labs-machine").stdout)["backend"] == "qemu"


def test_the_images_stand_under_their_names(one):
    names = sorted(["busybox", "debian", "webapp", "redis", "nginx"])
    docker = guest(one, "docker images --format '{{.Repository}}:{{.Tag}}'").stdout.split()
    podman = guest(one, "podman images --format '{{.Repository}}:{{.Tag}}'").stdout.split()
    registry = json.loads(guest(one, "curl -s http://127.0.0.1:5000/v2/_catalog").stdout)["repositories"]
    assert sorted(docker) == [f"{name}:lab" for name in names]
    assert sorted(podman) == [f"localhost/{name}:lab" for name in names]
    assert sorted(registry) == names


def test_the_provisioner_runs_again_and_changes_nothing(one):
    state = "docker images -q | sort; podman images -q | sort; swapon --show=NAME,SIZE; stat -c %Y /opt/labs/*/.inputs"
    before = guest(one, state).stdout
    guest(one, "mkdir -p /lab")
    pack = ["tar", "-C", str(image.REPO), "-cf", "-", "vm", "requirements.txt", "constraints.txt"]
    with subprocess.Popen(pack, stdout=subprocess.PIPE) as tree:
        subprocess.run([*one.ssh(), "tar -C /lab -xf -"], stdin=tree.stdout, check=True)
    assert tree.returncode == 0
    done = guest(one, "LABS_BACKEND=qemu /lab/vm/provision.sh install && /lab/vm/provision.sh start")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "into Docker" not in done.stdout and guest(one, state).stdout == before


def test_a_machine_that_is_gone_is_told(tmp_path):
    with machine("gone") as vm:
        vm.kill()
        with pytest.raises(LabError, match="QEMU ended"):
            vm.wait_ssh(60)


def test_qemu_is_told_to_use_the_accelerator_that_works():
    flags = Path("/proc/cpuinfo").read_text()
    able = re.search(r"\b(vmx|svm)\b", flags) is not None
    assert qemu.accelerator() == ("kvm" if able and os.access("/dev/kvm", os.W_OK) else "tcg")
