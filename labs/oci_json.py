"""JSON without the json package: its import alone (with re and enum) costs a runtime a third of its start.

The scanner and the encoder are the C functions that json itself uses; json is loaded only to word an error.
"""

from __future__ import annotations

import _json

from labs.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Settings:
    """What json.JSONDecoder tells the scanner."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int, memo = True, None, None, float, int, None

    @staticmethod
    def parse_constant(name: str) -> None:
        """NaN and Infinity are not JSON."""
        raise ValueError(f"{name} is not JSON")


_scan: Any = _json.make_scanner(_Settings)  # type: ignore[arg-type]
_encode: Any = _json.make_encoder(
    None, None, _json.encode_basestring_ascii, None, ":", ",", False, False, True)  # type: ignore[arg-type]
SPACE = " \t\n\r"


def loads(text: str, field: str = "JSON") -> Any:
    """The value that the text is; BadInput with the place where it is none."""
    try:
        value, end = _scan(text, len(text) - len(text.lstrip(SPACE)))
    except StopIteration as stop:
        raise BadInput(field, text[stop.value:stop.value + 20], f"is not JSON at character {stop.value}") from None
    except ValueError as error:
        raise BadInput(field, text[:20], f"is not JSON: {error}") from None
    except RecursionError:
        raise BadInput(field, text[:20], "is nested too deep") from None
    if text[end:].strip(SPACE):
        raise BadInput(field, text[end:end + 20], f"is more than one JSON value, at character {end}")
    return value


def dumps(value: object) -> str:
    """The value as JSON on one line."""
    return "".join(_encode(value, 0))
