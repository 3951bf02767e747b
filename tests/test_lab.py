"""labs.lab: the snapshot sees what is made by hand, and clean removes all that bears the prefix and no more."""

import os
import subprocess
from pathlib import Path

import pytest

from labs import cgroup, container, lab, machine, mounts, process


def command(*argv):
    subprocess.run(argv, check=True, capture_output=True)


def changes_by(before):
    return before.diff(lab.snapshot())


def test_a_quiet_machine_does_not_change():
    with lab.unchanged() as before:
        assert any("/sys/fs/cgroup" in line for line in before.mounts)
    assert f"process {' '.join(process.cmdline(os.getpid()))} ({os.getpid()})" in before.processes


def test_a_process_is_seen_with_its_command_line():
    before = lab.snapshot()
    with process.spawn(["sleep", "12345"]) as child:
        assert f"+ process sleep 12345 ({child.pid})" in changes_by(before)
        assert f"- process sleep 12345 ({child.pid})" in lab.snapshot().diff(before)
    assert not [line for line in changes_by(before) if "sleep 12345" in line]


@pytest.mark.machine
def test_a_daemon_that_was_restarted_is_the_same_machine():
    def main_pid():
        words = ["systemctl", "show", "--property=MainPID", "--value", "docker.service"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
    before, pid = lab.snapshot(full=True), main_pid()
    command("systemctl", "restart", "docker.service")
    assert main_pid() != pid
    assert [line for line in before.diff(lab.snapshot(full=True)) if "dockerd" in line or " nft " in line] == []


@pytest.mark.machine
def test_what_a_first_use_leaves_for_good_is_no_change():
    before = lab.snapshot(full=True)
    command("docker", "run", "--rm", "--network=host", "busybox:lab", "true")
    assert "/run/docker/netns/default" in [mount.target for mount in mounts.table()]
    process.until(lambda: before.diff(lab.snapshot(full=True)) == [])


@pytest.mark.machine
def test_what_the_kernel_mounts_by_itself_is_no_change():
    before = lab.snapshot()
    assert os.listdir("/sys/kernel/debug/tracing")
    assert "/sys/kernel/debug/tracing" in [mount.target for mount in mounts.table()]
    assert [line for line in changes_by(before) if " mount " in line] == []


def test_a_zombie_is_seen():
    before = lab.snapshot()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        process.until(lambda: process.status(pid).state == "Z")
        assert [line for line in changes_by(before) if line.endswith(f"<defunct> ({pid})")]
    finally:
        os.waitpid(pid, 0)


def test_namespaces_with_and_without_a_process_are_seen():
    with process.spawn(["unshare", "--uts", "sleep", "1000"]) as child:
        process.until(lambda: process.status(child.pid).name == "sleep")
        link = os.readlink(f"/proc/{child.pid}/ns/uts")
        # The kernel gives the number of one that is gone to the next: no snapshot from before can tell it is new.
        alive = lab.snapshot()
        assert f"namespace {link}" in alive.namespaces
        held = Path("/run/labs-test-ns")
        held.touch()
        command("mount", "--bind", f"/proc/{child.pid}/ns/uts", str(held))
        child.stop()
        try:
            assert f"namespace {link}" in lab.snapshot().namespaces
        finally:
            command("umount", str(held))
            held.unlink()
    after = lab.snapshot()
    assert f"- namespace {link}" in alive.diff(after)
    assert f"+ namespace {link}" in after.diff(alive)


def test_mounts_links_cgroups_and_files_are_seen(tmp_path):
    before = lab.snapshot()
    os.makedirs(f"{machine.STATE}/deep", exist_ok=True)
    Path(machine.STATE, "deep/file").touch()
    command("ip", "link", "add", "labs-test", "type", "bridge")
    with mounts.tmpfs(str(tmp_path)), cgroup.create("labs-g-seen"):
        found = changes_by(before)
    assert f"+ mount tmpfs {tmp_path}" in found
    assert "+ cgroup /sys/fs/cgroup/labs/labs-g-seen" in found
    assert "+ link labs-test" in found
    assert f"+ file {machine.STATE}/deep/file" in found
    lab.clean(engines=False)
    assert not [line for line in changes_by(before) if "labs" in line and "namespace" not in line]


def test_unchanged_raises_with_the_list_of_changes(tmp_path):
    with pytest.raises(lab.Leftover, match="not as it was") as caught, lab.unchanged(timeout=0.2):
        command("mount", "-t", "tmpfs", "tmpfs", str(tmp_path))
    command("umount", str(tmp_path))
    assert f"+ mount tmpfs {tmp_path}" in caught.value.changes


def test_unchanged_waits_for_what_is_on_its_way_out():
    with lab.unchanged(timeout=30):
        command("sh", "-c", "sleep 0.5 > /dev/null 2>&1 &")


def test_nft_rules_are_in_the_full_snapshot_without_their_counters():
    before = lab.snapshot(full=True)
    command("nft", "add table inet labs-test; add chain inet labs-test c; add rule inet labs-test c counter accept")
    found = [line for line in before.diff(lab.snapshot(full=True)) if "nft" in line]
    assert "+ nft table inet labs-test chain c counter accept" in found
    lab.clean(engines=False)
    assert not [line for line in before.diff(lab.snapshot(full=True)) if "nft" in line]


def test_clean_removes_every_trace_and_may_be_called_twice(tmp_path):
    before = lab.snapshot()
    with process.spawn(["sleep", "1000"]) as grouped, \
            process.spawn(["chroot", machine.ROOTFS["busybox"], "sleep", "1000"]) as rooted:
        process.until(lambda: process.status(rooted.pid).name == "sleep")
        group = cgroup.create("labs-g-left")
        cgroup.create("below", group).add(grouped.pid)
        folder = Path(machine.DATA, "labs-c-left/upper/deep")
        folder.mkdir(parents=True)
        (folder / "link").symlink_to("/etc")
        Path(machine.STATE, "ns").mkdir(parents=True, exist_ok=True)
        held = Path(machine.STATE, "ns/held")
        held.touch()
        command("mount", "--bind", "/proc/self/ns/uts", str(held))
        kept = Path("/run/netns/kept")
        command("ip", "netns", "add", "labs-left")
        kept.touch()
        command("ip", "link", "add", "labs-left", "type", "bridge")
        done = lab.clean(engines=False)
        assert grouped.wait(20).signal == rooted.wait(20).signal == 9
    assert {"cgroup labs-g-left", "link labs-left", "netns labs-left", f"mount {held}"} <= set(done)
    assert lab.clean(engines=False) == []
    assert kept.exists()
    kept.unlink()
    assert os.path.exists("/etc/passwd")
    if "mount tmpfs /run/netns" not in before.mounts:
        command("umount", "/run/netns")
    assert [line for line in changes_by(before) if "labs" in line or "netns" in line] == []


def test_clean_while_a_container_runs_ends_it():
    with container.Container(["sleep", "1000"]) as box:
        assert f"process {box.pid}" in lab.clean(engines=False)
        assert process.readable(box.pidfd, 30)
    assert not os.path.exists(box.cgroup.path)
    assert not os.path.exists(box.upper)


def test_clean_keeps_other_data():
    kept = Path(machine.DATA, "store")
    kept.mkdir(parents=True)
    try:
        lab.clean(engines=False)
        assert kept.is_dir()
    finally:
        kept.rmdir()


def test_removing_a_tree_too_deep_for_a_path_touches_nothing_beside_it(tmp_path):
    neighbours = [tmp_path / f"tree.{number}" for number in range(60)]
    for neighbour in neighbours:
        (neighbour / "kept").mkdir(parents=True)
    (tmp_path / "tree").mkdir()
    folder = os.open(tmp_path / "tree", os.O_RDONLY)
    for _ in range(50):
        os.mkdir("d" * 200, dir_fd=folder)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    machine.remove_tree(str(tmp_path / "tree"))
    assert sorted(os.listdir(tmp_path)) == sorted(neighbour.name for neighbour in neighbours)
    assert all((neighbour / "kept").is_dir() for neighbour in neighbours)


def listed(engine):
    """What the engine's own client lists."""
    def lines(*listing):
        return subprocess.run([engine, *listing], capture_output=True, text=True, check=True).stdout.splitlines()
    return {f"{what} {line}" for what, listing in lab.LISTINGS.items() for line in lines(*listing)}


MADE = {
    "image": (["tag", "localhost/busybox:lab", "localhost/labs-t:1"],
              ["untag", "localhost/busybox:lab", "localhost/labs-t:1"]),
    "volume": (["volume", "create", "labs-t"], ["volume", "rm", "labs-t"]),
    "network": (["network", "create", "labs-t"], ["network", "rm", "labs-t"]),
    "container": (["create", "--name", "labs-t", "busybox:lab", "true"], ["rm", "labs-t"]),
}


@pytest.mark.machine
def test_what_docker_holds_is_what_its_client_lists():
    subprocess.run(["docker", "create", "--name", "labs-t", "busybox:lab"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["docker", "volume", "create", "labs-t"], check=True, stdout=subprocess.DEVNULL)
    try:
        assert set(lab._docker()) == listed("docker")
        assert any(line.endswith(" labs-t") for line in lab._docker())
    finally:
        subprocess.run(["docker", "rm", "labs-t"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["docker", "volume", "rm", "labs-t"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.machine
def test_what_podman_holds_is_asked_again_when_it_changed(monkeypatch):
    before = set(lab._podman())
    assert before == listed("podman")
    for what, (make, undo) in MADE.items():
        subprocess.run(["podman", *make], check=True, stdout=subprocess.DEVNULL)
        try:
            assert set(lab._podman()) == listed("podman") != before, what
        finally:
            subprocess.run(["podman", *undo], check=True, stdout=subprocess.DEVNULL)
    assert set(lab._podman()) == before
    monkeypatch.setattr(lab, "_lines", lambda *command: pytest.fail(f"asked again: {command}"))
    assert set(lab._podman()) == before
