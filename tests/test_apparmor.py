"""AppArmor as the kernel does it: what a profile stops, what is recorded, and that nothing runs half-confined."""

import os
import subprocess
from contextlib import ExitStack

import pytest

from labs import apparmor, capabilities, lab, machine, process, syscalls
from labs.errors import BadInput, ChildFailed, KernelError, NotALab

pytestmark = pytest.mark.machine

NAME = "labs-test"


def profile(folder, name=NAME):
    return f"""abi <abi/4.0>,
profile {name} flags=(attach_disconnected) {{
  signal receive,
  /** rmix,
  capability,
  {folder}/open w,
}}
"""


@pytest.fixture
def folder():
    """A place whose path the profile knows: pytest's own is long, and the same for every test."""
    os.makedirs(machine.DATA, exist_ok=True)
    path = f"{machine.DATA}/labs-apparmor"
    os.mkdir(path, 0o777)
    os.chmod(path, 0o777)
    yield path
    machine.remove_tree(path)


def write(path):
    with open(path, "w", encoding="ascii") as file:
        file.write("x")


def written(path, name=NAME):
    """Whether a child of root, put under the profile, can write there."""
    def confined():
        apparmor.change(name)
        try:
            write(path)
        except PermissionError:
            return False
        return True
    return process.call(confined)


def test_a_profile_is_there_for_the_block_only(folder):
    with apparmor.load(NAME, profile(folder)) as name:
        assert apparmor.profiles()[name] == "enforce"
        told = subprocess.check_output(["aa-status"], text=True)
        assert f"\n   {NAME}\n" in told
    assert NAME not in apparmor.profiles()
    with apparmor.load(NAME, profile(folder), complain=True):
        assert apparmor.profiles()[NAME] == "complain"
    assert NAME not in apparmor.profiles()


def test_a_write_that_mode_bits_allow_is_stopped_and_recorded(folder):
    with apparmor.load(NAME, profile(folder)), apparmor.Log() as log:
        assert written(f"{folder}/open")
        assert not written(f"{folder}/shut")
        assert [(one.verdict, one.name, one.requested) for one in log.records(NAME)] == [
            ("DENIED", f"{folder}/shut", "c")]
        assert log.records(NAME) == []
    assert os.listdir(folder) == ["open"]


def test_complaining_denies_nothing_and_records_the_same(folder):
    with apparmor.load(NAME, profile(folder), complain=True), apparmor.Log() as log:
        assert written(f"{folder}/shut")
        assert ("ALLOWED", f"{folder}/shut") in {(one.verdict, one.name) for one in log.records(NAME)}


@pytest.mark.parametrize(("exists", "asked"), [(True, 0), (False, 1)])
def test_mode_bits_are_asked_first_but_for_a_name_that_is_not_there(folder, exists, asked):
    if exists:
        write(f"{folder}/shut")
    os.chmod(folder, 0o755)

    def as_nobody(path):
        capabilities.assume({}, uid=65534)
        return written(path)

    with apparmor.load(NAME, profile(folder)), apparmor.Log() as log:
        assert not process.call(as_nobody, f"{folder}/shut")
        assert len(log.records(NAME)) == asked


def test_under_the_profile_from_the_next_execve_on(folder):
    def start(name):
        apparmor.on_exec(name)
        return subprocess.getoutput("cat /proc/self/attr/apparmor/current")

    with apparmor.load(NAME, profile(folder)):
        ours = process.call(start, NAME)
        assert ours == f"{NAME} (enforce)"
        cat = ["cat", "/proc/self/attr/apparmor/current"]
        assert subprocess.check_output(["aa-exec", "-p", NAME, "--", *cat], text=True).strip() == ours
        child = process.spawn(["sleep", "60"], first=lambda: apparmor.on_exec(NAME))
        with child:
            assert apparmor.of(child.pid) == ours
            apparmor.remove(NAME)
            assert apparmor.of(child.pid) == "unconfined"
            subprocess.run(["apparmor_parser", "--add", "--skip-cache"], input=profile(folder), text=True, check=True)


def test_who_may_not_receive_signals_is_not_killed_even_by_root(folder):
    with apparmor.load(NAME, profile(folder).replace("  signal receive,\n", "")):
        with process.spawn(["sleep", "60"], first=lambda: apparmor.on_exec(NAME)) as child:
            with pytest.raises(PermissionError):
                child.kill()
            apparmor.remove(NAME)  # which sets it free
            assert child.stop().signal == 15
        subprocess.run(["apparmor_parser", "--add", "--skip-cache"], input=profile(folder), text=True, check=True)


def test_no_new_privs_does_not_stop_the_way_into_a_profile(folder):
    def confined():
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        apparmor.on_exec(NAME)
        return subprocess.getoutput("cat /proc/self/attr/apparmor/current")

    with apparmor.load(NAME, profile(folder)):
        assert process.call(confined) == f"{NAME} (enforce)"


def test_out_of_a_profile_leads_no_way(folder):
    def out():
        apparmor.change(NAME)
        apparmor.change("unconfined")

    with apparmor.load(NAME, profile(folder)), pytest.raises((KernelError, ChildFailed)) as caught:
        process.call(out)
    assert caught.value.errno == 13


@pytest.mark.parametrize(("body", "line", "value", "rule"), [
    ("  /etc/passwd q,\n", 2, "/etc/passwd q,", "syntax error, unexpected TOK_ID, expecting TOK_MODE"),
    ("  /etc/passwd rx,\n", 2, "/etc/passwd rx,", "'x' must be preceded by exec qualifier"),
    ("  capability net_rwa,\n", 2, "capability net_rwa,", "Invalid capability net_rwa."),
    ("  /etc/passwd r\n", 3, "}", "expecting TOK_END_OF_RULE"),
    ("  include <abstractions/nonsense>\n", 2, "include <abstractions/nonsense>", "Could not open"),
])
def test_a_profile_that_does_not_parse_is_one_clear_line(body, line, value, rule):
    with pytest.raises(BadInput) as caught, apparmor.load(NAME, f"profile {NAME} {{\n{body}}}\n"):
        pytest.fail("must not begin")
    assert (caught.value.field, caught.value.value) == (f"profile, line {line}", value)
    assert rule in caught.value.rule
    assert "\n" not in str(caught.value)
    assert NAME not in apparmor.profiles()


def test_a_complaint_without_a_line_is_one_line_too():
    with pytest.raises(BadInput) as caught, apparmor.load(NAME, f"profile {NAME} {{\n  @{{nonsense}}/x r,\n}}\n"):
        pytest.fail("must not begin")
    assert caught.value.value == f"profile {NAME} {{"
    assert "nonsense" in caught.value.rule
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text", "rule"), [
    ("docker-default", "profile docker-default {}", "must begin with labs-"),
    (NAME, "profile labs-other {}", "be the one that the text defines"),
    (NAME, f"profile {NAME} {{}}\nprofile labs-other {{}}", "be the one that the text defines"),
])
def test_only_a_profile_of_our_own_is_loaded(name, text, rule):
    before = apparmor.profiles()
    with pytest.raises(BadInput, match=rule), apparmor.load(name, text):
        pytest.fail("must not begin")
    assert apparmor.profiles() == before


def test_a_profile_is_not_replaced_and_one_inside_goes_with_it():
    text = f"profile {NAME} {{\n  profile inner {{\n  }}\n}}\n"
    with apparmor.load(NAME, text):
        assert {NAME, f"{NAME}//inner"} <= set(apparmor.profiles())
        with pytest.raises(BadInput, match="already"), ExitStack() as stack:
            stack.enter_context(apparmor.load(NAME, text))
        assert NAME in apparmor.profiles()
    assert not [name for name in apparmor.profiles() if name.startswith(NAME)]


def test_what_should_be_confined_does_not_start_without_its_profile():
    with pytest.raises(ChildFailed, match="AppArmor profile: 'labs-none': is not in the kernel"):
        process.spawn(["true"], first=lambda: apparmor.on_exec("labs-none"))


def test_the_log_reads_names_with_spaces(folder):
    with apparmor.load(NAME, profile(folder)), apparmor.Log() as log:
        assert not written(f"{folder}/a name")
        assert [one.name for one in log.records(NAME)] == [f"{folder}/a name"]


def test_the_log_loses_nothing_in_a_burst(folder):
    with apparmor.load(NAME, profile(folder)), apparmor.Log() as log:
        paths = [f"{folder}/shut{number}" for number in range(40)]

        def many():
            apparmor.change(NAME)
            return sum(not os.access(path, os.F_OK) and not _made(path) for path in paths)

        assert process.call(many) == len(paths)
        assert [one.name for one in log.records(NAME)] == paths


def _made(path):
    try:
        write(path)
    except PermissionError:
        return False
    return True


def test_a_profile_left_behind_is_seen_and_removed():
    before = lab.snapshot()
    subprocess.run(["apparmor_parser", "--add", "--skip-cache"], input=f"profile {NAME} {{}}", text=True, check=True)
    assert before.diff(lab.snapshot()) == [f"+ apparmor {NAME}"]
    assert f"apparmor {NAME}" in lab.clean(engines=False)
    assert before.diff(lab.snapshot()) == []


def test_a_machine_that_is_no_lab_is_left_alone(monkeypatch):
    monkeypatch.setattr(machine, "MARKER", "/nonexistent")
    with pytest.raises(NotALab), apparmor.load(NAME, f"profile {NAME} {{}}"):
        pytest.fail("must not begin")
