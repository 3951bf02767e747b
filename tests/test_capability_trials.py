"""What each capability is for: every trial is refused without it, and with it alone the kernel lets it through."""

import os

import pytest

from labs import capabilities, capability_trials
from labs.capability_trials import OTHER, TRIALS, attempt

BY_NAME = {trial.capability.removeprefix("CAP_"): trial for trial in TRIALS}
# Each for a reason of its own: Smack alone asks for two of them, and nothing asks for the third (capabilities(7)).
UNTRIED = {"CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_NET_BROADCAST"}
# What a kernel may have been built without, or a machine may not have to give.
OF_THE_LAB_MACHINE = ("SYS_MODULE", "SYS_RESOURCE", "BLOCK_SUSPEND", "PERFMON")
# Where the call is let through, and then fails, so that nothing is changed.
BEYOND = {"SYS_PACCT": "ENOENT", "SYS_BOOT": "EINVAL", "SYS_MODULE": "ENOEXEC", "SYS_RAWIO": "EINVAL"}
# Where Debian's kernel asks for more first: kernel.perf_event_paranoid is 3, which wants CAP_SYS_ADMIN of everybody.
STRICTER = {"PERFMON": "EACCES"}
# Where another capability is as good.
COVERED = {"DAC_READ_SEARCH": "DAC_OVERRIDE", "PERFMON": "SYS_ADMIN", "BPF": "SYS_ADMIN",
           "CHECKPOINT_RESTORE": "SYS_ADMIN"}


def test_every_capability_is_tried_once():
    tried = [trial.capability for trial in TRIALS]
    assert len(set(tried)) == len(tried)
    assert set(capabilities.NAMES) - set(tried) == UNTRIED
    assert tried == [name for name in capabilities.NAMES if name in tried]


def check(name):
    own = capabilities.parse([name])
    refused = {"FSETID": "bit lost", "BLOCK_SUSPEND": "flag lost"}.get(name)
    found = attempt(BY_NAME[name], 0)
    assert found == refused or found in ("EPERM", "EACCES")
    assert attempt(BY_NAME[name], own) == (BEYOND | STRICTER).get(name, "ok")
    assert attempt(BY_NAME[name], capabilities.ALL & ~own) == (found if name not in COVERED else "ok")


@pytest.mark.parametrize("name", [name for name in BY_NAME if name not in OF_THE_LAB_MACHINE])
def test_a_capability_alone_opens_its_door(name):
    check(name)


@pytest.mark.machine
@pytest.mark.parametrize("name", OF_THE_LAB_MACHINE)
def test_a_capability_alone_opens_its_door_on_the_lab_machine(name):
    check(name)


@pytest.mark.parametrize(("name", "other"), COVERED.items())
def test_another_capability_that_is_as_good(name, other):
    assert attempt(BY_NAME[name], capabilities.parse([other])) == "ok"
    assert attempt(BY_NAME[name], capabilities.ALL & ~capabilities.parse([name, other])) in ("EPERM", "EACCES")


def test_a_trial_leaves_the_caller_as_it_was():
    before = capabilities.of(), os.getcwd(), os.uname(), os.listdir(capability_trials.PLACE)
    attempt(BY_NAME["MKNOD"], capabilities.ALL)
    assert (capabilities.of(), os.getcwd(), os.uname(), os.listdir(capability_trials.PLACE)) == before
    assert os.getresuid() != (OTHER,) * 3


def test_an_errno_that_nobody_knows_is_not_taken_for_success():
    def fails():
        raise OSError(0, "odd")

    assert attempt(capability_trials.Trial("CAP_CHOWN", "odd", lambda: fails), 0) == "?"
