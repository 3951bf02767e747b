"""The short forms of a service, spelled out: what `docker compose config` prints for "8080:80" or "./data:/data:ro".

Every function takes one value as it stands in a compose file and gives its long form (Compose Specification,
05-services.md, "Short syntax" and "Long syntax"); a broken one raises BadForm with the value and the rule.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
import shlex
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

BYTES = {unit + b: 2**(10 * power) for power, unit in enumerate(("", "k", "m", "g", "t")) for b in ("", "b")}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(b|k|kb|m|mb|g|gb|t|tb)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h|d|w)")
_UNITS = {"w": 604800 * 10**9, "d": 86400 * 10**9, "h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6,
          "us": 10**3, "µs": 10**3, "ns": 1}
_PORT = re.compile(r"(?:(?:(?P<ip>\[[^]]*\]|[0-9.]+):)?(?P<published>[0-9-]*):)?(?P<target>[0-9]+(?:-[0-9]+)?)"
                   r"(?:/(?P<protocol>[a-z]+))?")
PROPAGATION = {"rprivate", "private", "rshared", "shared", "rslave", "slave"}
MODES = {"ro", "rw", "z", "Z", "nocopy", "cached", "delegated", "consistent"} | PROPAGATION
_REMOTE = re.compile(r"[a-z]+://|git@|github\.com/")  # a build context that is no folder


class BadForm(ValueError):
    """A value that has no long form; its text is the rule."""


def nanoseconds(text: object) -> int:
    """A duration such as "1m30s": whole nanoseconds (Go's time.ParseDuration, with d and w)."""
    found = _DURATION.findall(str(text))
    if not found or "".join(number + unit for number, unit in found) != str(text):
        if str(text) == "0":
            return 0
        raise BadForm("must be a duration such as 1m30s")
    return round(sum(float(number) * _UNITS[unit] for number, unit in found))


def seconds(text: object) -> float:
    """A duration in seconds."""
    return nanoseconds(text) / 10**9


def duration(text: object) -> str:
    """A duration as Go prints it: "90s" is 1m30s, "1500ms" is 1.5s."""
    rest = nanoseconds(text)
    if rest < 10**9:
        unit = next((one for one in ("ms", "µs", "ns") if rest >= _UNITS[one]), "s")
        return f"{rest / _UNITS[unit]:.9f}".rstrip("0").rstrip(".") + unit
    hours, rest = divmod(rest, _UNITS["h"])
    minutes, rest = divmod(rest, _UNITS["m"])
    whole = f"{rest / 10**9:.9f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{whole}" if hours else f"{minutes}m{whole}" if minutes else whole


def size(value: object) -> str:
    """Bytes as a decimal string: "64m" is "67108864"."""
    match = _SIZE.fullmatch(str(value))
    if not match:
        raise BadForm("must be a size such as 64m")
    return str(int(float(match[1]) * BYTES[(match[2] or "").lower()]))


def swap(value: object) -> str:
    """memswap_limit: a size, or -1 for no limit."""
    return "-1" if str(value) == "-1" else size(value)


def command(value: Any) -> list[str] | None:
    """A command line: a string is split as a shell would, a list stays."""
    if value is None or isinstance(value, list):
        return value if value is None else [_text(one) for one in value]
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BadForm(f"cannot be split into words: {error}") from None


def mapping(value: Any, missing: Any = None) -> dict[str, Any]:
    """["A=1", "B"] or {A: 1}: {A: "1", B: missing}."""
    if isinstance(value, list):
        pairs = (str(one).partition("=") for one in value)
        return {key: text if sign else missing for key, sign, text in pairs}
    return {key: missing if one is None else _text(one) for key, one in (value or {}).items()}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return _go(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _go(number: float) -> str:
    """As Go's fmt.Sprint has it: 1.0 is 1, from a million on with an exponent (strconv, format 'g')."""
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    power = len(digits) + int(exponent) - 1
    return f"{number:.{len(digits) - 1}e}" if number and not -4 <= power < 6 else repr(number).removesuffix(".0")


def strings(value: Any) -> list[str]:
    """One string or a list of them, as a list."""
    return [_text(one) for one in value] if isinstance(value, list) else [_text(value)]


def hosts(value: Any) -> list[str]:
    """extra_hosts: "name:address", "name=address" or a mapping, as "name=address"."""
    if isinstance(value, dict):
        return [f"{name}={one}" for name, given in value.items() for one in strings(given)]
    return [one if "=" in one else one.replace(":", "=", 1) for one in strings(value)]


def ports(value: Any) -> list[dict[str, Any]]:
    """One entry of ports; a range becomes one entry a port."""
    if isinstance(value, dict):
        long = {"mode": "ingress", **_needed(value, "target")}
        long.setdefault("protocol", "tcp")
        if "published" in long:
            long["published"] = str(long["published"])
        return [long]
    match = _PORT.fullmatch(str(value))
    if not match:
        raise BadForm("must be [[ADDRESS:]PUBLISHED:]TARGET[/PROTOCOL]")
    if match["protocol"] not in (None, "tcp", "udp", "sctp"):
        raise BadForm("the protocol must be tcp, udp or sctp")
    targets, published = _range(match["target"]), _range(match["published"] or "")
    fixed: dict[str, Any] = {"mode": "ingress"}
    if match["ip"]:
        fixed["host_ip"] = _address(match["ip"].strip("[]"))
    if published and len(published) not in (1, len(targets)) and len(targets) > 1:
        raise BadForm("both ranges must be of the same length")
    return [fixed | {"target": target, **_published(published, len(targets), number),
                     "protocol": match["protocol"] or "tcp"} for number, target in enumerate(targets)]


def _published(published: list[int], targets: int, number: int) -> dict[str, str]:
    if not published:
        return {}
    if targets == 1 and len(published) > 1:  # one of a range, chosen by the engine
        return {"published": f"{published[0]}-{published[-1]}"}
    return {"published": str(published[number])}


def _range(text: str) -> list[int]:
    first, _, last = text.partition("-")
    if not first:
        return []
    numbers = list(range(int(first), int(last or first) + 1))
    if not numbers or numbers[-1] > 65535 or numbers[0] < 1:
        raise BadForm("ports are 1 to 65535, a range begins with the smaller one")
    return numbers


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise BadForm("the address must be an IP address") from None


def _needed(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A long form, which must have a key that the schema leaves open."""
    if key not in value:
        raise BadForm(f"must have a {key}")
    return dict(value)


def volume(value: Any, locate: Callable[[str], str]) -> dict[str, Any]:
    """One entry of volumes; locate() makes a path absolute."""
    if isinstance(value, dict):
        return _long_volume(_needed(value, "target"), locate)
    parts = str(value).split(":")
    if len(parts) > 3 or not all(parts):
        raise BadForm("must be [SOURCE:]TARGET[:MODE]")
    if len(parts) == 1:
        return {"type": "volume", "target": posixpath.normpath(parts[0]), "volume": {}}
    modes = set(parts[2].split(",")) if len(parts) == 3 else set()
    if modes - MODES:
        raise BadForm(f"unknown mode {', '.join(sorted(modes - MODES))}")
    is_path = parts[0].startswith((".", "/", "~"))
    kind = "bind" if is_path else "volume"
    long = {"type": kind, "source": locate(parts[0]) if is_path else parts[0],
            "target": posixpath.normpath(parts[1])}
    return long | ({"read_only": True} if "ro" in modes else {}) | {kind: _details(modes, is_path)}


def _long_volume(long: dict[str, Any], locate: Callable[[str], str]) -> dict[str, Any]:
    long["target"] = posixpath.normpath(long["target"])
    if long["type"] == "bind":
        long["source"] = locate(_needed(long, "source")["source"])
    if given := (long.get("tmpfs") or {}).get("size"):
        long["tmpfs"] = long["tmpfs"] | {"size": size(given)}
    return long


def _details(modes: set[str], is_path: bool) -> dict[str, Any]:
    """What a mode says besides ro and rw."""
    if not is_path:
        return {"nocopy": True} if "nocopy" in modes else {}
    found: dict[str, Any] = {"create_host_path": True}
    for key, known in (("propagation", PROPAGATION), ("selinux", {"z", "Z"})):
        if given := modes & known:
            found[key] = given.pop()
    return found


def grant(value: Any, folder: str = "") -> dict[str, Any]:
    """One entry of secrets (folder: /run/secrets/) or configs."""
    if isinstance(value, dict):
        return _needed(value, "source")
    return {"source": value, "target": folder + value} if folder else {"source": value}


def depends_on(value: Any) -> dict[str, dict[str, Any]]:
    """["db"] or {db: {…}}, each with its condition."""
    if isinstance(value, list):
        return {name: {"condition": "service_started", "required": True} for name in value}
    return {name: {"condition": "service_started", "required": True} | given for name, given in value.items()}


def healthcheck(value: Mapping[str, Any]) -> dict[str, Any]:
    """A string is a command for a shell; durations as Go prints them."""
    long = dict(value)
    if isinstance(long.get("test"), str):
        long["test"] = ["CMD-SHELL", long["test"]]
    if (test := long.get("test")) and test[0] not in ("NONE", "CMD", "CMD-SHELL"):
        raise BadForm("test begins with NONE, CMD or CMD-SHELL")
    if long.get("retries", 0) < 0:
        raise BadForm("retries must be 0 or more")
    for key in ("interval", "timeout", "start_period", "start_interval"):
        if key in long:
            long[key] = duration(long[key])
    return long


def build(value: Any, locate: Callable[[str], str]) -> dict[str, Any]:
    """A context alone, or all of build."""
    long = {"context": value} if isinstance(value, str) else dict(value)
    context = long.get("context", ".")
    long["context"] = context if _REMOTE.match(context) else locate(context)
    if "dockerfile_inline" not in long:
        long.setdefault("dockerfile", "Dockerfile")
    for key in ("args", "labels"):
        if key in long:
            long[key] = mapping(long[key], None if key == "args" else "")
    for key, form in (("extra_hosts", hosts), ("shm_size", size)):
        if key in long:
            long[key] = form(long[key])
    if isinstance(long.get("secrets"), list):
        long["secrets"] = [grant(one) for one in long["secrets"]]
    return long


def networks(value: Any) -> dict[str, Any]:
    """["front"] or {front: {…}}."""
    return dict.fromkeys(value) if isinstance(value, list) else dict(value)


def env_file(value: Any, locate: Callable[[str], str]) -> list[dict[str, Any]]:
    """One path, a list of paths, or of {path, required}."""
    entries = value if isinstance(value, list) else [value]
    long = (one if isinstance(one, dict) else {"path": one} for one in entries)
    return [{"required": True} | one | {"path": locate(one["path"])} for one in long]


def options(value: Mapping[str, Any]) -> dict[str, Any]:
    """logging, networks and volumes: the values of options are strings."""
    return {key: mapping(one) if key in ("options", "driver_opts") else one for key, one in value.items()}


def deploy(value: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as strings of bytes, cpus as a number."""
    long = dict(value)
    resources = dict(long.get("resources") or {})
    for kind, given in resources.items():
        resources[kind] = {key: size(one) if key == "memory" else float(one) if key == "cpus" else one
                           for key, one in (given or {}).items()}
    long["resources"] = resources
    if "labels" in long:
        long["labels"] = mapping(long["labels"], "")
    long.setdefault("placement", {})
    return long
