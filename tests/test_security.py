"""The stage, its layers and its referee: who gets through, who is stopped by what, and what is never started.

On any machine only the attacks run that stay within what the stage made; those that touch the kernel which all share
run in the lab machine alone.
"""

import copy

import pytest

from labs import attacks, machine, process, security
from labs.attacks import ATTACKS
from labs.errors import BadInput, ChildFailed
from labs.security import LAYERS, NO_EFFECT, OPEN

KERNEL = ["sysrq", "core_pattern", "release_agent", "uevent", "kernel module", "clock"]
CONTAINED = [name for name in ATTACKS if name not in KERNEL]
ALONE = {
    "user namespace": {"leaked fd": "EACCES", "/proc/PID/root": "EACCES", "docker.sock": "EACCES", "raw disk": "EPERM",
                       "mount disk": "EPERM", "ptrace": "EPERM", "keyring": "ENOKEY"},
    "capabilities": {"chroot break": "EPERM", "/proc/PID/root": "EACCES", "raw disk": "EPERM", "mount disk": "EPERM",
                     "ptrace": "EPERM", "ARP spoof": "EPERM"},
    "seccomp": {"chroot break": "EPERM", "mount disk": "ENOSYS", "ptrace": "ENOSYS", "keyring": "ENOSYS"},
    "no_new_privs": {"setuid program": NO_EFFECT},
    "network policy": {"ARP spoof": NO_EFFECT, "neighbour's port": "ETIMEDOUT"},
    "non-root": {"chroot break": "EPERM", "leaked fd": "EACCES", "/proc/PID/root": "EACCES", "docker.sock": "EACCES",
                 "raw disk": "EPERM", "mount disk": "EPERM", "ptrace": "EPERM", "ARP spoof": "EPERM",
                 "keyring": "ENOKEY"},
}


def opened(results):
    return [name for name, found in results.items() if found == OPEN]


@pytest.fixture(scope="module")
def stage():
    with security.stage(CONTAINED) as made:
        yield made


def test_without_a_layer_everything_is_open(stage):
    found = stage.measure([], [*CONTAINED, "app"])
    assert opened(found) == [*CONTAINED, "app"], found


@pytest.mark.parametrize("layer", ALONE)
def test_what_a_layer_stops_alone(stage, layer):
    found = stage.measure([layer], [*CONTAINED, "app"])
    assert {name: why for name, why in found.items() if why != OPEN} == ALONE[layer]


@pytest.mark.parametrize("layers", [[], ["user namespace", "paths"], [*ALONE, "paths"]])
def test_another_runtime_makes_the_same_of_config_json(stage, monkeypatch, layers):
    ours = stage.measure(layers)
    monkeypatch.setattr(stage, "runtime", "crun")
    assert stage.measure(layers) == ours


def test_two_containers_one_after_the_other_know_nothing_of_each_other(stage):
    first = stage.measure(["no_new_privs"], ["setuid program", "symlink in volume"])
    second = stage.measure([], ["setuid program"])
    assert (first["setuid program"], second["setuid program"]) == (NO_EFFECT, OPEN)


def test_the_referee_believes_no_evidence_but_its_own(stage):
    plan = {"tasks": 10, "device": "loop0"}
    for name in ("leaked fd", "docker.sock", "ARP spoof", "fork bomb", "setuid program", "keyring"):
        assert not stage._reached(name, "forged", plan), name
    assert stage._reached("docker.sock", stage.token, plan)


# What cannot be put on, layer by layer.
IMPOSSIBLE = {
    "user namespace": {"linux.uidMappings": [{"containerID": 0, "hostID": (1 << 32) - 9, "size": 65536}]},
    "capabilities": {"process.capabilities.ambient": ["CAP_SYS_MAGIC"]},
    "seccomp": {"linux.seccomp.architectures": ["SCMP_ARCH_ABACUS"]},
    "no_new_privs": {"process.noNewPrivileges": "please"},
    "LSM": {"process.apparmorProfile": "labs-nobody-loaded-this"},
    "paths": {"linux.maskedPaths": ["relative\0path"]},
    "cgroup": {"linux.resources": {"pids": {"limit": "few"}}},
    "network policy": {"annotations": {security.POLICY: "only friends"}},
    "non-root": {"process.user": {"uid": 1 << 33, "gid": 0}},
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_cannot_be_put_on_means_that_nothing_starts(stage, layer):
    layers = [] if layer in ("LSM", "cgroup") else [layer]
    with pytest.raises((BadInput, ChildFailed)):
        stage.measure(layers, ["symlink in volume"], IMPOSSIBLE[layer])
    assert not process.readable(stage.referee.fileno(), 0)
    assert not list(machine._entries(stage.volume))


def test_an_id_outside_the_map_is_not_taken_for_another(stage):
    with pytest.raises(ChildFailed, match="Invalid argument"):
        stage.measure(["user namespace"], [], {"process.user": {"uid": 70000, "gid": 0}})


def test_a_layer_changes_only_what_it_names():
    bare = security.configuration([])
    for layer, patch in LAYERS.items():
        found = security.configuration([layer])
        expected = copy.deepcopy(bare)
        for field, value in patch().items():
            security._change(expected, field, value)
        assert found == expected != bare, layer
    assert bare == security.configuration([])


REFUSE = {"action": "SCMP_ACT_ERRNO", "names": ["mkdri"]}
LONG = {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 0, "op": "SCMP_CMP_EQ", "value": 1}]}
ROWS = [{"containerID": 0, "hostID": 100000, "size": 10}, {"containerID": 5, "hostID": 200000, "size": 10}]


@pytest.mark.parametrize(("layers", "changes", "says"), [
    (["tinfoil"], {}, "layer: 'tinfoil': must be one of user namespace, capabilities"),
    ([], {"process.capabilities.bounding": ["CAP_SYS_MAGIC"]}, "capability: 'CAP_SYS_MAGIC'"),
    ([], {"process.capabilities.total": ["CAP_KILL"]}, "process.capabilities: 'total': must be one of bounding"),
    ([], {"linux.seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [REFUSE]}}, "names: 'mkdri'"),
    ([], {"linux.seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [LONG] * 1000}}, "at most 4096"),
    (["user namespace"], {"linux.uidMappings": ROWS},
     "linux.uidMappings: '5 200000 10': overlaps '0 100000 10' inside"),
    (["user namespace"], {"linux.gidMappings": [ROWS[0], ROWS[1] | {"containerID": 10, "hostID": 100009}]},
     "linux.gidMappings: '10 100009 10': overlaps '0 100000 10' outside"),
])
def test_bad_input_is_named(layers, changes, says):
    with pytest.raises(BadInput, match=says):
        security.configuration(layers, changes)


def test_maps_that_only_touch_are_good():
    rows = [ROWS[0], ROWS[1] | {"containerID": 10, "hostID": 100010}]
    assert security.configuration(["user namespace"], {"linux.uidMappings": rows})["linux"]["uidMappings"] == rows


def test_an_unknown_attack_is_named(stage):
    says = "attack: 'wish': must be one of chroot break, leaked fd"
    with pytest.raises(BadInput, match=says), security.stage(["wish"]):
        pass
    with pytest.raises(BadInput, match=says):
        stage.measure([], ["wish"])


def test_an_attack_that_dies_is_no_success():
    def die(_):
        raise SystemExit(3)
    assert attacks.attempt(die, {}) == ("", "SystemExit: 3")
    assert attacks.attempt(lambda _: __import__("os")._exit(0), {}) == ("", "killed")


def test_the_matrix_says_who_is_alone():
    three = dict.fromkeys("abc", OPEN)
    found = security.Matrix(three, three | {"a": "EPERM", "b": "EPERM"},
                            {"X": three | {"a": "EPERM", "b": "EPERM"}, "Y": three | {"b": "EPERM"}},
                            {"X": three | {"b": "EPERM"}, "Y": three | {"a": "EPERM", "b": "EPERM"}})
    assert [found.stoppers(name) for name in "abc"] == [["X"], ["X", "Y"], []]
    assert [found.keys(name) for name in "abc"] == [["X"], [], []]


# --- in the lab machine ---


@pytest.fixture(scope="module")
def whole():
    with security.stage() as made:
        yield made


@pytest.mark.machine
def test_bare_and_full_in_the_lab(whole):
    before = machine.read_file("/proc/sys/kernel/core_pattern")
    assert opened(whole.measure([])) == list(ATTACKS)
    assert opened(whole.measure(list(LAYERS), [*ATTACKS, "app"])) == ["symlink in volume", "app"]
    assert machine.read_file("/proc/sys/kernel/core_pattern") == before


@pytest.mark.machine
@pytest.mark.parametrize(("layer", "stops"), [
    ("LSM", {"/proc/PID/root": "EACCES", "mount disk": "EACCES", "ptrace": "EACCES", "sysrq": "EACCES",
             "core_pattern": "EACCES", "release_agent": "EACCES", "uevent": "EACCES"}),
    ("cgroup", {"raw disk": "EPERM", "fork bomb": "EAGAIN"}),
    ("paths", {"sysrq": "EROFS", "core_pattern": "EROFS", "uevent": "EROFS"}),
])
def test_layers_that_need_the_lab_alone(whole, layer, stops):
    assert {name: why for name, why in whole.measure([layer]).items() if why != OPEN} == stops


@pytest.mark.machine
def test_a_container_of_docker(whole):
    found = whole.engine("--cap-drop=NET_RAW", tried=["ARP spoof", "docker.sock", "kernel module", "app"])
    assert found == {"ARP spoof": "EPERM", "docker.sock": OPEN, "kernel module": "EPERM", "app": OPEN}
    with pytest.raises(ChildFailed, match="unknown flag: --no-such"):
        whole.engine("--no-such")
