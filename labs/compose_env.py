"""Variables of a compose file: interpolation in all its forms, and .env files.

Compose Specification, "Interpolation" (12-interpolation.md) and Docker's "Syntax for environment files":
$NAME, ${NAME}, ${NAME-default}, ${NAME:-default}, ${NAME?message}, ${NAME:?message}, ${NAME+other}, ${NAME:+other};
with a colon an empty value counts as missing. What stands behind the operator is interpolated itself. $$ is a $, and
so is one that begins no name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from labs.errors import BadInput

_NAME = re.compile(r"[_a-zA-Z][_a-zA-Z0-9]*")
_OPERATOR = re.compile(r":?[-?+]")
_LINE = re.compile(r"\s*(?:export\s+)?(?P<key>[A-Za-z_][\w.\-\[\]]*)[ \t]*(?P<sign>[=:]?)[ \t]*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "\\": "\\", '"': '"',
            "$": "$$"}

Lookup = Callable[[str], str | None]


def interpolate(text: str, lookup: Lookup, field: str = "text") -> str:
    """A text with its variables replaced; lookup(NAME) is None where there is none.

    Raises BadInput for a form that does not exist, and for a required variable that is missing.
    """
    done, position = [], 0
    while (dollar := text.find("$", position)) >= 0:
        done.append(text[position:dollar])
        value, position = _variable(text, dollar, lookup, field)
        done.append(value)
    return "".join([*done, text[position:]])


def _variable(text: str, dollar: int, lookup: Lookup, field: str) -> tuple[str, int]:
    """What stands for the variable at a dollar sign, and where the text goes on."""
    after = text[dollar + 1:dollar + 2]
    if after == "$":
        return "$", dollar + 2
    if after == "{":
        end = _closing(text, dollar + 1, field)
        return _braced(text[dollar + 2:end], lookup, field), end + 1
    if name := _NAME.match(text, dollar + 1):
        return lookup(name[0]) or "", name.end()
    return "$", dollar + 1


def _closing(text: str, opening: int, field: str) -> int:
    """The brace that closes the one at ``opening``; those of variables within are passed over."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == "{" and (position == opening or text[position - 1] == "$"):
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if not depth:
                return position
    raise BadInput(field, text, "${ is not closed")


def _braced(inside: str, lookup: Lookup, field: str) -> str:
    name = _NAME.match(inside)
    operator = _OPERATOR.match(inside, name.end()) if name else None
    if not name or (not operator and name.end() != len(inside)):
        raise BadInput(field, f"${{{inside}}}", "must be ${NAME}, or ${NAME and one of - :- ? :? + :+")
    value = lookup(name[0])
    if not operator:
        return value or ""
    missing = not value if operator[0].startswith(":") else value is None
    rest = inside[operator.end():]
    if operator[0].endswith("+"):
        return "" if missing else interpolate(rest, lookup, field)
    if not missing:
        return value or ""
    other = interpolate(rest, lookup, field)
    if operator[0].endswith("?"):
        raise BadInput(field, f"${{{name[0]}}}", f"required variable {name[0]} is missing a value: {other}")
    return other


def parse(text: str, outside: Mapping[str, str], file: str = ".env") -> dict[str, str | None]:
    """The variables of a .env file in order; a name alone is None: it is taken from outside where it is wanted.

    'single quotes' keep all as it is, "double quotes" know backslash escapes and variables, without quotes
    variables are replaced and " #" begins a comment. A variable sees outside first, then the lines before it.
    """
    found: dict[str, str | None] = {}

    def lookup(name: str) -> str | None:
        return outside[name] if name in outside else found.get(name)

    for field, key, sign, raw, quote in _lines(text, file):
        if quote == "'":
            found[key] = raw
        elif sign or quote:
            found[key] = interpolate(raw, lookup, field)
        else:
            found[key] = None
    return found


def _lines(text: str, file: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Field, key, sign, raw value and quote of every assignment; a quoted value may go over several lines."""
    position, number = 0, 0
    while position < len(text):
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        line, number = text[position:end], number + 1
        if line.strip() and not line.lstrip().startswith("#"):
            field = f"{file}:{number}"
            match = _LINE.match(line)
            if not match or (not match["sign"] and line[match.end():].strip()):
                raise BadInput(field, line.strip(), "must be NAME=value")
            begin = position + match.end()
            quote = text[begin:begin + 1] if match["sign"] else ""
            if quote in ("'", '"') and quote:
                close = _quote_end(text, begin, field)
                raw = text[begin + 1:close]
                number += raw.count("\n")
                end = text.find("\n", close)
                end = len(text) if end < 0 else end
                yield field, match["key"], "=", _unescape(raw) if quote == '"' else raw, quote
            else:
                yield field, match["key"], match["sign"], re.sub(r"\s#.*", "", " " + line[match.end():]).strip(), ""
        position = end + 1


def _quote_end(text: str, begin: int, field: str) -> int:
    position = begin + 1
    while position < len(text):
        if text[position] == "\\" and text[begin] == '"':
            position += 1
        elif text[position] == text[begin]:
            return position
        position += 1
    raise BadInput(field, text[begin:begin + 20], "the quote is not closed")


def _unescape(raw: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), raw)
