"""A compose file read as Docker reads it: includes, extends and overrides merged, every short form spelled out.

load() gives what `docker compose config --format json` prints (Compose Specification: 13-merge.md, 14-include.md,
15-profiles.md, 12-interpolation.md; `extends` in 05-services.md), with the place of everything that stands in a file.
The schema is the specification's own, from Debian's package golang-github-compose-spec-compose-go-dev.
Every mistake is one ComposeError, "compose.yaml:7:5: services.web.ports: …", and nothing is started for it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path as File
from typing import Any, NamedTuple

from jsonschema import Draft201909Validator
from jsonschema.exceptions import ValidationError, best_match

from labs import compose_env, compose_forms
from labs.compose_forms import BadForm
from labs.compose_yaml import ComposeError, Document, Path, Position, dotted, parse, place_of
from labs.errors import BadInput

SCHEMA = File("/usr/share/gocode/src/github.com/compose-spec/compose-go/schema/compose-spec.json")
NAMES = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")
OVERRIDES = ("compose.override.yaml", "compose.override.yml", "docker-compose.override.yml",
             "docker-compose.override.yaml")
KINDS = ("networks", "volumes", "secrets", "configs")
REPLACED = ("command", "entrypoint")  # the later file's list stands alone (13-merge.md)
_PROJECT = re.compile(r"[a-z0-9][a-z0-9_-]*")
# Where a string becomes a number or a boolean once its variables are replaced: the last one or two parts of the path.
_NUMBERS = {"target", "retries", "replicas", "scale", "cpus", "cpu_count", "cpu_percent", "cpu_period", "cpu_quota",
            "cpu_shares", "pids_limit", "max_attempts", "mode", "soft", "hard", "oom_score_adj", "parallelism"}
_BOOLEANS = {"init", "disable", "privileged", "read_only", "stdin_open", "tty", "external", "internal", "attachable",
             "oom_kill_disable", "nocopy", "required", "create_host_path"}
_NOT_NUMBERS = re.compile(r"services\.[^.]+\.(?:volumes|secrets|configs)\.\d+\.target|.*\.ports\.\d+\.mode|"
                          r"services\.[^.]+\.build\.target|.*develop\..*")
# Below these keys every name is the user's own, and its value stays the string it is.
_FREE = {"environment", "labels", "annotations", "sysctls", "args", "options", "driver_opts", "storage_opt"}
_WHOLE = re.compile(r"services\.[^.]+\.(?:scale|deploy\.replicas|healthcheck\.retries)")
_TRUTH = re.compile(r"services\.[^.]+\.(?:init|privileged|read_only|stdin_open|tty)")


class Project(NamedTuple):
    """A project: its services with long forms only, those of inactive profiles left out."""

    name: str
    directory: str
    services: dict[str, dict[str, Any]]
    networks: dict[str, dict[str, Any]]
    volumes: dict[str, dict[str, Any]]
    secrets: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    places: Mapping[Path, Position]

    def json(self) -> dict[str, Any]:
        """As `docker compose config --format json` has it; what is empty is left out."""
        found: dict[str, Any] = {"name": self.name, "services": self.services}
        return found | {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind)}


def error(places: Project | Mapping[Path, Position], path: Path, value: object, rule: str) -> ComposeError:
    """The error about what stands at a path."""
    known = places.places if isinstance(places, Project) else places
    return ComposeError(place_of(known, path), dotted(path), value, rule)


def load(*files: str, project: str = "", profiles: Collection[str] = (), env: Mapping[str, str] | None = None,
         env_files: Sequence[str] | None = None, directory: str = "") -> Project:
    """Read compose files, later ones over earlier ones; without any: compose.yaml and its override, in directory.

    directory is where relative paths begin: that of the first file if it is not given. env replaces the environment
    of this process; under it lie the variables of env_files (.env in the directory if None). Raises ComposeError.
    """
    paths = [os.path.abspath(file) for file in files] or _found(os.path.abspath(directory or "."))
    folder = os.path.abspath(directory) if directory else os.path.dirname(paths[0])
    outside = dict(os.environ if env is None else env)
    variables = _env(folder, outside, env_files) | outside
    model = _Loader(folder, variables).files(paths)
    name = _name(project or variables.get("COMPOSE_PROJECT_NAME") or "", folder, model)
    active = set(profiles) | set(filter(None, variables.get("COMPOSE_PROFILES", "").split(",")))
    return _Normaliser(model, name, folder, variables, active).project()


def _found(folder: str) -> list[str]:
    """The first of NAMES in a folder, and the first of OVERRIDES if there is one."""
    first, over = ([os.path.join(folder, name) for name in names if os.path.exists(os.path.join(folder, name))][:1]
                   for names in (NAMES, OVERRIDES))
    if not first:
        raise BadInput("directory", os.path.basename(folder), f"holds none of {', '.join(NAMES)}")
    return first + over


def _env(folder: str, outside: Mapping[str, str], files: Sequence[str] | None) -> dict[str, str]:
    """The variables of .env files; a later file sees and replaces the earlier ones."""
    found: dict[str, str] = {}
    for file in [os.path.join(folder, ".env")] if files is None else files:
        if files is None and not os.path.exists(file):
            continue
        given = compose_env.parse(_text(file, "env file"), found | dict(outside), os.path.basename(file))
        found |= {key: value for key, value in given.items() if value is not None}
    return found


def _text(file: str, what: str) -> str:
    try:
        return File(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "must be UTF-8"
        raise BadInput(what, os.path.basename(file), str(reason)) from None


def _name(given: str, folder: str, model: Document) -> str:
    """The project's name: as asked for, else from the file or the directory, less what no name may have."""
    said = model.value.get("name") or os.path.basename(folder)
    name = given or re.sub(r"[^a-z0-9_-]", "", said.lower()).lstrip("_-")
    if not _PROJECT.fullmatch(name):
        raise error(model.places, ("name",), name, "must be lower case letters, digits, - and _, the first no sign")
    return name


@cache
def _schema() -> Any:
    return Draft201909Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _check_schema(document: Document) -> None:
    if not isinstance(document.value, dict):
        raise error(document.places, (), document.value, "must be a mapping with services")
    value = _without(document.value, document.tags, ())
    found = best_match(_schema().iter_errors(value))
    if found is None:
        return
    path = tuple(found.absolute_path)
    extra = _extra_key(found)
    if extra:
        raise error(document.places, (*path, extra), extra, "no such key in the Compose Specification")
    raise error(document.places, path, found.instance, found.message.replace(repr(found.instance), "this", 1))


def _without(value: Any, tags: Mapping[Path, str], path: Path) -> Any:
    """A value without what `!reset` marks: the schema need not know it."""
    if isinstance(value, dict):
        return {key: _without(one, tags, (*path, key)) for key, one in value.items()
                if tags.get((*path, key)) != "!reset"}
    return value


def _extra_key(found: ValidationError) -> str:
    if found.validator != "additionalProperties" or not isinstance(found.instance, dict):
        return ""
    schema = found.schema if isinstance(found.schema, dict) else {}
    patterns = schema.get("patternProperties", {})
    return next((key for key in found.instance if key not in schema.get("properties", {})
                 and not any(re.search(pattern, key) for pattern in patterns)), "")


class _Loader:
    """Reads the files of one project, or of one `include`."""

    def __init__(self, folder: str, variables: Mapping[str, str], chain: tuple[str, ...] = ()) -> None:
        self._folder, self._variables, self._chain = folder, variables, chain

    def files(self, paths: Sequence[str]) -> Document:
        """All files, one over the other."""
        model = Document(os.path.basename(paths[0]), {}, {}, {})
        for path in paths:
            document = self._canonical(self.read(path), self._folder)
            document = self._extended(document, path)
            model = merge(model, _import(document, self._included(document, path)))
        model.value.pop("include", None)
        return model

    def read(self, path: str) -> Document:
        """One file with its variables replaced, valid by the schema."""
        document = parse(_text(path, "compose file"), os.path.basename(path))
        if document.value is None:
            raise error({(): Position(document.file, 0, 0)}, (), None, "the file is empty")
        document = document._replace(value=self._interpolated(document.value, document, ()))
        _check_schema(document)
        return document

    def _interpolated(self, value: Any, document: Document, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: self._interpolated(one, document, (*path, key)) for key, one in value.items()}
        if isinstance(value, list):
            return [self._interpolated(one, document, (*path, number)) for number, one in enumerate(value)]
        if not isinstance(value, str):
            return value
        try:
            return _cast(compose_env.interpolate(value, self._variables.get, dotted(path)), path)
        except BadInput as problem:
            raise error(document.places, path, problem.value, problem.rule) from None

    def _canonical(self, document: Document, folder: str) -> Document:
        """Every short form of one file spelled out, paths absolute."""
        value = dict(document.value)
        locate = partial(_locate, folder)
        if "services" in value:
            value["services"] = {name: _service(service or {}, locate, ("services", name), document)
                                 for name, service in (value["services"] or {}).items()}
        for kind in KINDS:
            if kind in value:
                value[kind] = {name: _resource(dict(given or {}), locate)
                               for name, given in (value[kind] or {}).items()}
        return document._replace(value=value)

    def _included(self, document: Document, file: str) -> Iterator[Document]:
        for number, entry in enumerate(document.value.get("include") or ()):
            given = {"path": entry} if isinstance(entry, str) else entry
            paths = [_locate(self._folder, one) for one in compose_forms.strings(given["path"])]
            place = ("include", number)
            if any(path in (*self._chain, file) for path in paths):
                raise error(document.places, place, os.path.basename(paths[0]), "this file includes itself")
            if missing := [path for path in paths if not os.path.exists(path)]:
                raise error(document.places, place, os.path.basename(missing[0]), "no such file")
            folder = _locate(self._folder, given.get("project_directory") or os.path.dirname(paths[0]))
            files = [_locate(self._folder, one) for one in compose_forms.strings(given["env_file"])] \
                if given.get("env_file") else None
            variables = _env(folder, self._variables, files) | dict(self._variables)
            yield _Loader(folder, variables, (*self._chain, file)).files(paths)

    def _extended(self, document: Document, file: str) -> Document:
        services = dict(document.value.get("services") or {})
        for name in services:
            services[name] = self._extend(name, document, services, file, ())
        return document._replace(value=document.value | {"services": services}) if services else document

    def _extend(self, name: str, document: Document, services: Mapping[str, Any], file: str,
                chain: tuple[tuple[str, str], ...]) -> dict[str, Any]:
        """A service with what it extends beneath it."""
        service: dict[str, Any] = services[name]
        if "extends" not in service:
            return service
        path: Path = ("services", name, "extends")
        given = service["extends"] if isinstance(service["extends"], dict) else {"service": service["extends"]}
        here = (file, name)
        if here in chain:
            round_trip = " → ".join(one for _, one in (*chain[chain.index(here):], here))
            raise error(document.places, path, given["service"], f"a circle of extends: {round_trip}")
        other_file, other, others = file, document, services
        if given.get("file"):
            other_file = _locate(os.path.dirname(file), given["file"])
            if not os.path.exists(other_file):
                raise error(document.places, path, given["file"], "no such file")
            other = self._canonical(self.read(other_file), os.path.dirname(other_file))
            others = other.value.get("services") or {}
        if given["service"] not in others:
            raise error(document.places, path, given["service"], "no such service to extend")
        base = self._extend(given["service"], other, others, other_file, (*chain, here))
        own = {key: value for key, value in service.items() if key != "extends"}
        return _unique(_merged(base, own, ("services", name), document.tags))


def _locate(folder: str, path: str) -> str:
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))


def _cast(text: str, path: Path) -> Any:
    """A number or a boolean where the specification wants one; anything else stays for the schema to judge."""
    key, where = str(path[-1]) if path else "", dotted(path)
    if _FREE & set(path[2:-1]):
        return text
    if key in _BOOLEANS and text.lower() in ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0"):
        return text.lower() in ("true", "yes", "on", "y", "1")
    if (key in _NUMBERS or (len(path) > 2 and path[-2] == "ulimits")) and not _NOT_NUMBERS.fullmatch(where):
        if re.fullmatch(r"-?[0-9]+", text):
            return int(text)  # a quoted "0400" is four hundred, for Docker too
        if re.fullmatch(r"-?[0-9]*\.[0-9]+", text):
            return float(text)
    for pattern, rule in ((_WHOLE, "must be a whole number"), (_TRUTH, "must be true or false")):
        if pattern.fullmatch(where):
            raise BadInput(where, text, rule)
    return text


def _forms(locate: Callable[[str], str]) -> dict[str, Callable[[Any], Any]]:
    """Key of a service → what spells its short forms out."""
    each = compose_forms
    lists = dict.fromkeys(("dns", "dns_search", "dns_opt", "tmpfs", "expose", "group_add", "security_opt", "cap_add",
                           "cap_drop", "profiles", "links", "volumes_from"), each.strings)
    maps = dict.fromkeys(("labels", "annotations", "sysctls"), partial(each.mapping, missing=""))
    sizes = dict.fromkeys(("mem_limit", "mem_reservation", "shm_size"), each.size)
    return {**lists, **maps, **sizes, "environment": each.mapping, "command": each.command, "entrypoint": each.command,
            "depends_on": each.depends_on, "healthcheck": each.healthcheck, "networks": each.networks,
            "build": partial(each.build, locate=locate), "env_file": partial(each.env_file, locate=locate),
            "ports": _each(each.ports), "volumes": _each(lambda one: [each.volume(one, locate)]),
            "secrets": _each(lambda one: [each.grant(one, "/run/secrets/")]),
            "configs": _each(lambda one: [each.grant(one)]), "extra_hosts": each.hosts, "deploy": each.deploy,
            "stop_grace_period": each.duration, "logging": each.options, "memswap_limit": each.swap}


def _each(form: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    def inner(values: list[Any]) -> list[Any]:
        return [one for value in values for one in form(value)]
    return inner


def _service(service: Mapping[str, Any], locate: Callable[[str], str], path: Path, document: Document
             ) -> dict[str, Any]:
    forms, found = _forms(locate), {}
    for key, value in service.items():
        where = (*path, key)
        if document.tags.get(where) == "!reset" or value is None:
            found[key] = None if key not in ("networks", "depends_on") else value
            continue
        try:
            found[key] = forms[key](value) if key in forms else value
        except BadForm as problem:
            raise error(document.places, *_culprit(forms[key], value, where), str(problem)) from None
    return _unique(found)


def _culprit(form: Callable[[Any], Any], value: Any, path: Path) -> tuple[Path, Any]:
    """The entry of a list that has no long form, or the whole value."""
    for number, one in enumerate(value if isinstance(value, list) else ()):
        try:
            form([one])
        except BadForm:
            return (*path, number), one
    return path, value


def _resource(given: dict[str, Any], locate: Callable[[str], str]) -> dict[str, Any]:
    if "file" in given:
        given["file"] = locate(given["file"])
    if "labels" in given:
        given["labels"] = compose_forms.mapping(given["labels"], "")
    return compose_forms.options(given)


def merge(base: Document, over: Document) -> Document:
    """One document over another, by the rules of 13-merge.md."""
    value = _merged(base.value, over.value, (), over.tags)
    if "services" in value:
        value["services"] = {name: _unique(service) for name, service in value["services"].items()}
    return Document(base.file, value, {**_less(base.places, over.places), **over.places}, {})


def _less(places: Mapping[Path, Position], over: Mapping[Path, Position]) -> dict[Path, Position]:
    """Places without those of list entries to which another file adds: their numbers no longer fit."""
    return {path: place for path, place in places.items()
            if not any(isinstance(part, int) and path[:number] in over for number, part in enumerate(path))}


def _merged(base: Any, over: Any, path: Path, tags: Mapping[Path, str]) -> Any:
    if isinstance(base, dict) and isinstance(over, dict) and tags.get(path) != "!override":
        found = dict(base)
        for key, value in over.items():
            where = (*path, key)
            if tags.get(where) == "!reset":
                found.pop(key, None)
            elif key not in found or found[key] is None or tags.get(where) == "!override":
                found[key] = value
            elif value is not None:
                found[key] = _merged(found[key], value, where, tags)
        return found
    if isinstance(base, list) and isinstance(over, list) and not _is_replaced(path):
        return [*base, *over]
    return over


def _is_replaced(path: Path) -> bool:
    return (len(path) == 3 and path[2] in REPLACED) or path[-2:] == ("healthcheck", "test")


_IDENTITY: dict[str, Callable[[Any], Any]] = {
    "ports": lambda one: tuple(str(one.get(key, "")) for key in ("host_ip", "published", "target", "protocol")),
    "volumes": lambda one: one["target"], "env_file": lambda one: one["path"],
    "secrets": lambda one: one.get("target") or one["source"],
    "configs": lambda one: one.get("target") or one["source"]}
_UNIQUE = ("dns", "dns_search", "dns_opt", "expose", "cap_add", "cap_drop", "group_add", "security_opt", "tmpfs",
           "extra_hosts", "profiles")


def _unique(service: dict[str, Any]) -> dict[str, Any]:
    """Entries of lists that name the same thing, once: the last one, in the place of the first."""
    found = dict(service)
    for key in (*_IDENTITY, *_UNIQUE):
        if isinstance(found.get(key), list):
            identity = _IDENTITY.get(key, str)
            found[key] = list({identity(one): one for one in found[key]}.values())
    return found


def _import(model: Document, included: Iterator[Document]) -> Document:
    """What an include brings; the same name may come twice only if it means the same."""
    value, places = dict(model.value), dict(model.places)
    for other in included:
        for kind in ("services", *KINDS):
            known = dict(value.get(kind) or {})
            for name, given in (other.value.get(kind) or {}).items():
                if name in known and known[name] != given:
                    raise error(other.places, (kind, name), name, "differs from what an included file says")
                known[name] = given
            if known:
                value[kind] = known
        places = {**other.places, **places}
    return model._replace(value=value, places=places)


class _Normaliser:
    """A merged model as a Project: profiles, references, names, defaults."""

    def __init__(self, model: Document, name: str, folder: str, variables: Mapping[str, str], active: set[str]) -> None:
        self._model, self._name, self._folder, self._variables = model, name, folder, variables
        services = model.value.get("services") or {}
        self._services = {key: dict(one) for key, one in sorted(services.items())
                          if not one.get("profiles") or "*" in active or active & set(one["profiles"])}
        self._all = services

    def project(self) -> Project:
        """Everything checked and named."""
        if not self._all:
            raise self._error(("services",), None, "there is no service")
        services = {name: self._service(name, service) for name, service in self._services.items()}
        for name, service in services.items():
            self._check_references(name, service)
        _check_ports(services, self._error)
        used = {kind: set(self._used(kind, services)) for kind in KINDS}
        found = {kind: {name: self._resource(kind, name) for name in sorted(used[kind])} for kind in KINDS}
        return Project(self._name, self._folder, services, **found, places=self._model.places)

    def _error(self, path: Path, value: object, rule: str) -> ComposeError:
        return error(self._model.places, path, value, rule)

    def _service(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        service: dict[str, Any] = {"command": None, "entrypoint": None}
        service |= {key: value for key, value in given.items() if not key.startswith("x-")
                    and (value or key in ("attach", "init", "scale", *REPLACED))}
        if "image" not in service and "build" not in service:
            raise self._error(("services", name), name, "has neither an image nor a build context")
        if "network_mode" not in service:
            service["networks"] = given.get("networks") or {"default": None}
        elif given.get("networks"):
            raise self._error(("services", name, "network_mode"), service["network_mode"], "not together with networks")
        service["environment"] = self._environment(name, service)
        if not service["environment"]:
            del service["environment"]
        service.pop("env_file", None)
        if needs := self._needs(name, service):
            service["depends_on"] = needs
        else:
            service.pop("depends_on", None)
        if args := (service.get("build") or {}).get("args"):
            known = {key: value for key, value in self._resolved(args).items() if value is not None}
            service["build"] = service["build"] | {"args": known}
        self._check_limits(name, service)
        return service

    def _check_limits(self, name: str, service: Mapping[str, Any]) -> None:
        deploy = service.get("deploy", {})
        limits = deploy.get("resources", {}).get("limits", {})
        if "scale" in service and service["scale"] != deploy.get("replicas", service["scale"]):
            raise self._error(("services", name, "scale"), service["scale"], "differs from deploy.replicas")
        for key, other in (("mem_limit", "memory"), ("cpus", "cpus"), ("pids_limit", "pids")):
            if key in service and other in limits and str(service[key]) != str(limits[other]):
                raise self._error(("services", name, key), service[key],
                                  f"differs from deploy.resources.limits.{other}")

    def _resolved(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A name without a value takes that of the environment, if there is one."""
        return {key: self._variables.get(key) if value is None else value for key, value in values.items()}

    def _environment(self, name: str, service: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for entry in service.get("env_file") or ():
            if not os.path.exists(entry["path"]):
                if entry["required"]:
                    raise self._error(("services", name, "env_file"), os.path.basename(entry["path"]), "no such file")
                continue
            file = os.path.basename(entry["path"])
            given = compose_env.parse(_text(entry["path"], "env_file"), {**found, **self._variables}, file)
            found |= {key: value for key, value in self._resolved(given).items() if value is not None}
        return dict(sorted((found | self._resolved(service.get("environment") or {})).items()))

    def _needs(self, name: str, service: Mapping[str, Any]) -> dict[str, Any]:
        """depends_on, and what links, volumes_from and a shared namespace imply."""
        implied = {"condition": "service_started", "restart": True, "required": True}
        found = dict(service.get("depends_on") or {})
        for link in service.get("links") or ():
            found.setdefault(link.partition(":")[0], {**implied, "key": "links"})
        for other in service.get("volumes_from") or ():
            if not other.startswith("container:"):
                found.setdefault(other.partition(":")[0],
                                 {"condition": "service_started", "required": True, "key": "volumes_from"})
        for key in ("network_mode", "ipc", "pid"):
            kind, _, other = str(service.get(key, "")).partition(":")
            if kind == "service":
                found.setdefault(other, {**implied, "key": key})
        needs = {}
        for other, given in sorted(found.items()):
            if other in self._services:
                needs[other] = {key: value for key, value in given.items() if key != "key"}
            elif given.get("required", True) or other not in self._all:
                rule = "belongs to a profile that is not active" if other in self._all else "no such service"
                key = given.get("key")  # of what implied it
                raise self._error(("services", name, key) if key else ("services", name, "depends_on", other), other,
                                  rule)
        return needs

    def _check_references(self, name: str, service: Mapping[str, Any]) -> None:
        for kind in KINDS:
            for path, one in _references(kind, service):
                if one not in (self._model.value.get(kind) or {}) and (kind, one) != ("networks", "default"):
                    raise self._error(("services", name, kind, *path), one, f"is not among the {kind} of the file")

    def _used(self, kind: str, services: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
        for service in services.values():
            yield from (one for _, one in _references(kind, service))

    def _resource(self, kind: str, name: str) -> dict[str, Any]:
        given = dict((self._model.value.get(kind) or {}).get(name) or {})
        if given.get("external"):
            external = given["external"]
            given["name"] = given.get("name") or (external.get("name") if isinstance(external, dict) else None) or name
            given["external"] = True
            if kind == "volumes" and (own := {"driver", "driver_opts", "labels"} & set(given)):
                raise self._error((kind, name, min(own)), given[min(own)], "not together with external")
        else:
            given.pop("external", None)
            given.setdefault("name", f"{self._name}_{name}")
            sources = {"file", "environment", "content"} & set(given)
            if kind in ("secrets", "configs") and not sources:
                raise self._error((kind, name), name, "must have a file, an environment variable, or be external")
            if len(sources) > 1:
                raise self._error((kind, name), name, f"has {' and '.join(sorted(sources))}, which exclude each other")
        if kind == "networks":
            given.setdefault("ipam", {})
        return given


def _references(kind: str, service: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """What a service names of one kind: where below the key, and the name."""
    if kind == "networks":
        yield from (((name,), name) for name in service.get("networks") or {})
    elif kind == "volumes":
        yield from (((number,), one["source"]) for number, one in enumerate(service.get("volumes") or ())
                    if one["type"] == "volume" and one.get("source"))
    else:
        yield from (((number,), one["source"]) for number, one in enumerate(service.get(kind) or ()))


def _shared(one: str, other: str) -> bool:
    """Whether two host addresses of published ports meet: "" is all, 0.0.0.0 all of IPv4, :: all of IPv6."""
    if not one or not other or one == other:
        return True
    first, second = ipaddress.ip_address(one), ipaddress.ip_address(other)
    return first.version == second.version and (first.is_unspecified or second.is_unspecified)


def _check_ports(services: Mapping[str, Mapping[str, Any]], fail: Callable[[Path, object, str], ComposeError]) -> None:
    """A published port belongs to one service: the second one could not bind it (EADDRINUSE, bind(2))."""
    owners: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, service in services.items():
        for number, port in enumerate(service.get("ports") or ()):
            if not (published := port.get("published")) or "-" in published:
                continue
            address = port.get("host_ip", "")
            for other, taken in owners.setdefault((published, port["protocol"]), []):
                if other != name and _shared(address, taken):
                    raise fail(("services", name, "ports", number), published, f"is already published by {other}")
            owners[(published, port["protocol"])].append((name, address))
