"""The schemas that the Open Container Initiative publishes with its specifications, and what they say of a value.

Debian's packages golang-github-opencontainers-specs-dev and golang-github-opencontainers-image-spec-dev install
them. A schema refers to its neighbours by file name ("defs.json#/definitions/Env"), so each folder is read as one
registry, in which the last part of an address is the name of a file.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jsonschema import Draft4Validator
from jsonschema.exceptions import ValidationError, best_match
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

SPECS = Path("/usr/share/gocode/src/github.com/opencontainers")


@cache
def validator(name: str, spec: str = "runtime-spec") -> Draft4Validator:
    """What checks against one schema file, such as "config-schema.json" of the runtime or the image specification."""

    def retrieve(uri: str) -> Resource[Any]:
        file = SPECS / spec / "schema" / Path(urlsplit(uri).path).name
        return DRAFT4.create_resource(json.loads(file.read_text(encoding="utf-8")))

    registry: Registry[Any] = Registry(retrieve=retrieve)  # type: ignore[call-arg]
    return Draft4Validator(retrieve(name).contents, registry=registry)


def errors(value: object, name: str = "config-schema.json", spec: str = "runtime-spec") -> list[str]:
    """What a schema finds wrong, as "field: why" in the order of the fields; an empty list if the value is valid."""
    found = (best_match([error]) or error for error in validator(name, spec).iter_errors(value))
    return [f"{_field(error)}: {error.message}" for error in sorted(found, key=_field)]


def _field(error: ValidationError) -> str:
    """Where in the value: process.args, mounts[2].type; the whole value is $, as in JSONPath."""
    return str(error.json_path).removeprefix("$.")
