"""YAML as Compose reads it, with places."""

import pytest

from labs import compose_yaml


def read(text):
    return compose_yaml.parse(text, "f.yaml")


@pytest.mark.parametrize(("text", "value"), [
    ("22:22", "22:22"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("~", None), ("''", ""),
    ("0400", 256), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("1.5", 1.5), ("1e3", 1000.0), ("'1'", "1"),
    ("2026-11-27", "2026-11-27"), ("-3", -3), (".5", 0.5), ("09", 9.0)])
def test_scalars_of_the_core_schema(text, value):
    found = read(f"a: {text}").value["a"]
    assert (found, type(found)) == (value, type(value))


def test_every_value_has_its_place():
    places = read("a:\n  b: [1, {c: 2}]\n").places
    assert places[("a", "b")] == ("f.yaml", 2, 3)
    assert places[("a", "b", 0)] == ("f.yaml", 2, 7)
    assert places[("a", "b", 1, "c")] == ("f.yaml", 2, 11)
    assert compose_yaml.place_of(places, ("a", "b", 1, "gone")) == ("f.yaml", 2, 10)


def test_merge_keys_first_wins_and_own_wins_over_all():
    text = "x: &x {a: 1, b: 1}\ny: &y {b: 2, c: 2}\nz: {<<: [*x, *y], c: 3}\n"
    assert read(text).value["z"] == {"a": 1, "b": 1, "c": 3}


def test_tags_of_compose_are_kept_by_path():
    document = read("a: !reset null\nb: !override [1]\n")
    assert document.tags == {("a",): "!reset", ("b",): "!override"}
    assert document.value == {"a": None, "b": [1]}


@pytest.mark.parametrize(("text", "message"), [
    ("a: 1\na: 2", "f.yaml:2:1: a: 'a': this key stands twice"), ("a: !x 1", "f.yaml:1:4: a: '!x': unknown tag"),
    ("a: &a [*a]", "f.yaml:1:4: a.0: 'alias': an anchor may not hold itself"), ("a: *b", "f.yaml:1:4: YAML"),
    ("a: [1", "f.yaml:"), ("{[1]: 2}", "f.yaml:1:2: YAML: 'key': a key must be a string"),
    ("a: {<<: 3}", "f.yaml:1:9: a.<<: '<<': must be given a mapping"), ("a\u0007b", "f.yaml: YAML"),
    ("a: 1\n---\nb: 2", "f.yaml:2:1: YAML")])
def test_one_line_with_line_and_column(text, message):
    with pytest.raises(compose_yaml.ComposeError) as caught:
        read(text)
    assert str(caught.value).startswith(message), str(caught.value)
    assert "\n" not in str(caught.value)
