"""Capabilities: names and masks against capsh, and what a process becomes against the kernel's own account of it."""

import json
import os
import re
import subprocess

import pytest

from labs import capabilities, machine, syscalls

LINES = {"CapBnd": "bounding", "CapEff": "effective", "CapPrm": "permitted", "CapInh": "inheritable",
         "CapAmb": "ambient"}
SOME = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]


def sets(pid="self"):
    found = re.findall(r"(Cap\w+):\t(\w+)", machine.read_file(f"/proc/{pid}/status"))
    return {LINES[name]: int(bits, 16) for name, bits in found}


def of_a_child(action):
    """The five sets of a child after the action, and whether it was able to carry it out."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os.write(writer, json.dumps(sets()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="ascii") as said:
        text = said.read()
    os.waitpid(child, 0)
    assert text, "the child failed"
    return {name: capabilities.names(bits) for name, bits in json.loads(text).items()}


def test_names_are_in_the_order_of_capsh():
    assert len(capabilities.NAMES) == 41
    for number, name in enumerate(capabilities.NAMES):
        assert capabilities.names(1 << number) == [name]
    everything = (1 << len(capabilities.NAMES)) - 1
    done = subprocess.run(["capsh", f"--decode={everything:x}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip().partition("=")[2].upper().split(",") == list(capabilities.NAMES)


def test_a_mask_and_its_names_are_the_same_thing():
    assert capabilities.mask(SOME) == 1 << 0 | 1 << 5 | 1 << 10
    assert capabilities.names(capabilities.mask(SOME)) == SOME
    assert capabilities.mask(["CAP_OF_NOTHING", *SOME, *SOME]) == capabilities.mask(SOME)


def test_the_kernel_knows_the_capabilities_up_to_its_last():
    last = int(machine.read_file("/proc/sys/kernel/cap_last_cap"))
    assert capabilities.known(last)
    assert not capabilities.known(last + 1)


def test_what_is_dropped_from_the_bounding_set_is_gone():
    had = set(capabilities.names(sets()["bounding"]))
    found = of_a_child(lambda: capabilities.limit(capabilities.mask(SOME)))
    assert set(found["bounding"]) == had & set(SOME)


@pytest.mark.parametrize(("given", "ambient"), [
    ({"effective": SOME, "permitted": SOME, "inheritable": SOME, "ambient": SOME}, SOME),
    ({"effective": SOME[:1], "permitted": SOME, "inheritable": [], "ambient": []}, []),
    ({"effective": SOME, "permitted": SOME, "inheritable": SOME[:2], "ambient": SOME}, SOME[:2]),
    ({}, [])])
def test_a_process_has_the_sets_that_it_took(given, ambient):
    masks = {name: capabilities.mask(names) for name, names in given.items()}
    found = of_a_child(lambda: capabilities.become(masks))
    wanted = {name: given.get(name, []) for name in ("effective", "permitted", "inheritable")}
    assert {name: found[name] for name in wanted} == wanted
    assert found["ambient"] == ambient


def test_a_right_given_up_is_refused_by_the_kernel():
    def unshare_without_the_right():
        capabilities.become({})
        try:
            syscalls.unshare(syscalls.CLONE_NEWUTS)
        except OSError:
            return
        os._exit(1)

    assert of_a_child(unshare_without_the_right)["effective"] == []
