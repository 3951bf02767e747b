"""YAML of a compose file as plain values, each with its place: what an error needs to name line and column.

PyYAML reads version 1.1, in which an unquoted 22:22 is the number 1342 and `no` is False; Compose reads the core
schema of YAML 1.2.2 (chapter 10.3), with 0400 still octal, as Docker's reader does. A key that stands twice, a tag
other than Compose's own `!reset` and `!override`, an anchor that holds itself and aliases that unfold into more
than MAX_NODES values are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from labs.errors import BadInput

MAX_NODES = 100_000
TAGS = ("!reset", "!override")

Path = tuple[str | int, ...]


class Position(NamedTuple):
    """Where something stands: line and column count from 1."""

    file: str
    line: int
    column: int


class ComposeError(BadInput):
    """``key`` at a place holds ``value``, which breaks ``rule``: "compose.yaml:7:5: services.web.image: 7: …"."""

    def __init__(self, place: Position, key: str, value: object, rule: str) -> None:
        super().__init__(key, value, rule)
        self.file, self.line, self.column = place
        self.key = key
        where = f"{place.file}:{place.line}:{place.column}: " if place.line else f"{place.file}: "
        self.args = (where + str(self),)


class Document(NamedTuple):
    """One file: its value, the place of every path in it, and the tags `!reset` and `!override` by path."""

    file: str
    value: Any
    places: dict[Path, Position]
    tags: dict[Path, str]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  as PyYAML has it


_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0[0-7_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"))
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"),
                                  ["" if one == "\0" else one for one in _first])


def dotted(path: Path) -> str:
    """A path as Compose writes it: services.web.ports.0."""
    return ".".join(map(str, path))


def parse(text: str, file: str = "compose.yaml") -> Document:
    """The one document in a text.  Raises ComposeError with line and column."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Position(file, mark.line + 1, mark.column + 1) if mark else Position(file, 0, 0)
        raise ComposeError(place, "YAML", _line_of(text, place), str(error.problem or error.context)) from None
    except yaml.YAMLError as error:  # a character that no YAML may hold
        raise ComposeError(Position(file, 0, 0), "YAML", file, str(error).splitlines()[0]) from None
    except RecursionError:
        raise ComposeError(Position(file, 0, 0), "YAML", file, "is nested too deeply") from None
    document = Document(file, None, {}, {})
    return document if root is None else document._replace(value=_Reader(document).value(root, ()))


def _line_of(text: str, place: Position) -> str:
    lines = text.splitlines()
    return lines[place.line - 1].strip()[:60] if 0 < place.line <= len(lines) else ""


class _Reader:
    """Turns nodes into values and notes their places; an alias is read again at each of its uses."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._open: list[int] = []
        self._nodes = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        """The value of a node, and of all below it."""
        self._count(node, path)
        self._document.places.setdefault(path, self._place(node))
        if node.tag in TAGS:
            self._document.tags[path] = node.tag
        elif node.tag.startswith("!"):
            raise self._error(node, path, node.tag, f"unknown tag; there are {', '.join(TAGS)}")
        self._open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(one, (*path, number)) for number, one in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self._open.pop()

    def _count(self, node: yaml.Node, path: Path) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._error(node, path, f"{MAX_NODES} values", "aliases unfold into more values than are allowed")
        if id(node) in self._open:
            raise self._error(node, path, "alias", "an anchor may not hold itself")

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                for one in self._merged(value_node, path):
                    merged = one | merged
                continue
            key = self._key(key_node, path)
            if key in found:
                raise self._error(key_node, (*path, key), key, "this key stands twice")
            self._document.places[(*path, key)] = self._place(key_node)
            found[key] = self.value(value_node, (*path, key))
        return {**{key: value for key, value in merged.items() if key not in found}, **found} if merged else found

    def _merged(self, node: yaml.Node, path: Path) -> Iterator[dict[str, Any]]:
        """The mappings after `<<`: the first one that has a key wins (yaml.org/type/merge.html)."""
        for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(one, yaml.MappingNode):
                raise self._error(one, (*path, "<<"), "<<", "must be given a mapping, or a list of mappings")
            self._count(one, path)
            yield self._mapping(one, path)

    def _key(self, node: yaml.Node, path: Path) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            raise self._error(node, path, "key", "a key must be a string")
        return str(node.value)

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        text = str(node.value)
        plain = _Loader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        tag = plain if node.tag in TAGS else node.tag
        kind = str(tag).rpartition(":")[2]
        try:
            return _SCALAR_OF.get(kind, str)(text)
        except ValueError:
            raise self._error(node, path, text, f"is no {kind} that JSON could hold") from None

    def _place(self, node: yaml.Node) -> Position:
        return Position(self._document.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def _error(self, node: yaml.Node, path: Path, value: object, rule: str) -> ComposeError:
        return ComposeError(self._place(node), dotted(path) or "YAML", value, rule)


def _integer(text: str) -> int:
    """Decimal, 0x, 0o, 0b, and 0400 as octal (chmod's modes are written so)."""
    text = text.replace("_", "")
    digits = text.lstrip("+-")
    base = 8 if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit() else 0
    return int(text, base)


def _float(text: str) -> float:
    """A finite number; ValueError for .inf and .nan, which JSON does not have."""
    number = float(text.replace("_", ""))  # ".inf" and ".nan" are none to Python
    if not math.isfinite(number):
        raise ValueError(text)
    return number


_SCALAR_OF: dict[str, Callable[[str], Any]] = {
    "int": _integer, "float": _float, "bool": lambda text: text.lower() == "true", "null": lambda _: None}


def place_of(places: Mapping[Path, Position], path: Path) -> Position:
    """The place of a path, or of the nearest thing above it that stands in a file."""
    while path and path not in places:
        path = path[:-1]
    return places.get(path, Position("compose.yaml", 0, 0))
