"""Interpolation and .env files, form by form; whole files are held against docker compose in test_compose_file."""

import pytest

from labs import compose_env
from labs.errors import BadInput

KNOWN = {"A": "a", "E": "", "LONG_1": "x"}


@pytest.mark.parametrize(("text", "value"), [
    ("$A ${A} $LONG_1", "a a x"), ("$NO[${NO}]", "[]"), ("$$A $${A}", "$A ${A}"), ("5$ $1 $", "5$ $1 $"),
    ("${A-d}${E-d}${N-d}", "ad"), ("${A:-d}${E:-d}${N:-d}", "add"), ("${A+o}|${E+o}|${N+o}", "o|o|"),
    ("${A:+o}|${E:+o}|${N:+o}", "o||"), ("${N:-${M:-$A}}", "a"), ("${N:-{x}}", "{x}"), ("${N:-a}b}", "ab}"),
    ("${A?m}${E?m}", "a"), ("${A:?m}", "a"), ("${N-}", "")])
def test_forms(text, value):
    assert compose_env.interpolate(text, KNOWN.get) == value


@pytest.mark.parametrize(("text", "rule"), [
    ("${N?gone}", "required variable N is missing a value: gone"), ("${E:?gone $A}", "missing a value: gone a"),
    ("${A", "not closed"), ("${}", "must be"), ("${1}", "must be"), ("${A!b}", "must be"), ("${A:b}", "must be")])
def test_refused(text, rule):
    with pytest.raises(BadInput, match=rule):
        compose_env.interpolate(text, KNOWN.get, "key")


@pytest.mark.parametrize(("text", "found"), [
    ("A=1\n\n# note\n  B = two words  \n", {"A": "1", "B": "two words"}), ("export A=1", {"A": "1"}),
    ("A: yes", {"A": "yes"}), ("A", {"A": None}), ("A=", {"A": ""}), ("A=x # note", {"A": "x"}),
    ("A=x#y", {"A": "x#y"}), ("A='$B \\n'", {"A": "$B \\n"}), ('A="x\\ty\\"z"', {"A": 'x\ty"z'}),
    ('A="one\ntwo"\nB=3', {"A": "one\ntwo", "B": "3"}),
    ("A=1\nB=$A-${OUT}-${N:-d}", {"A": "1", "B": "1-out-d"}), ("OUT=mine\nB=$OUT", {"OUT": "mine", "B": "out"})])
def test_env_files(text, found):
    assert compose_env.parse(text, {"OUT": "out"}) == found


@pytest.mark.parametrize(("text", "rule"), [
    ("A=1\n=2", ".env:2: '=2': must be NAME=value"), ("A=1\nB c", ".env:2"), ("A='x", "quote is not closed"),
    ("\nA=${N:?no}", ".env:2: .*missing a value")])
def test_broken_env_files(text, rule):
    with pytest.raises(BadInput, match=rule):
        compose_env.parse(text, {})
