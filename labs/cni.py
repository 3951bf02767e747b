"""The Container Network Interface, both sides of the contract: who calls a plugin, and a plugin.

https://www.cni.dev/docs/spec/ (1.1.0).  A plugin is a program: it is told what to do by environment variables
and by JSON on its standard input, answers with JSON on its standard output, and ends.  The network namespace
that it runs in is the host's.

    with cni.attached(host, config, cni.Attachment("web", web.path)) as result:     # ADD … DEL
        print(result["ips"])

`Caller` is a runtime's half (section 3), `main` the plugin's (section 2), which bin/labs-cni starts.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from labs import netlink, network
from labs.errors import BadInput, ChildFailed, LabError
from labs.netns import Netns

PLUGINS = "/usr/lib/cni"  # where Debian's containernetworking-plugins are
OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bin")
VERSIONS = ["0.4.0", "1.0.0", "1.1.0"]
DELEGATED = "1.0.0"  # what Debian's IPAM plugins speak; the results of 1.1.0 differ in optional fields only
NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "STATUS": (),
    "GC": (),
    "VERSION": (),
}
# Section 2, "Parameters".
IDENTIFIER, LINK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*"), re.compile(r"(?!\.{1,2}$)[^\s/:]{1,15}")
SHAPE = {"CNI_CONTAINERID": IDENTIFIER, "CNI_IFNAME": LINK}
# Section 5, "Error"; from 100 on a plugin's own.
INCOMPATIBLE_VERSION, INVALID_ENVIRONMENT, FAILED_TO_DECODE, INVALID_CONFIG, NOT_AVAILABLE = 1, 4, 6, 7, 50
REFUSED_BY_KERNEL, NOT_AS_ADDED = 100, 101
Json = dict[str, Any]


class Attachment(NamedTuple):
    """What one ADD attaches: a container's id, its network namespace, and the name of the link in there.

    netns may be "" for DEL: the namespace is gone already.
    """

    container: str
    netns: str
    ifname: str = "eth0"
    args: str = ""


class PluginFailed(ChildFailed):
    """A plugin answered with an error: its ``code`` (section 5, "Error") and ``message``."""

    def __init__(self, step: str, code: int, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(step, detail=f"{message} (code {code})")


# The caller


def call(host: Netns, command: str, config: Json, attachment: Attachment | None = None,
         path: Sequence[str] = (PLUGINS, OURS)) -> Json:
    """Run the plugin that config["type"] names once, in the host's network namespace; what it answers.

    command: ADD, CHECK, DEL, VERSION, STATUS or GC.  Raises PluginFailed.
    """
    environment = {"PATH": os.environ.get("PATH", ""), "CNI_COMMAND": command, "CNI_PATH": ":".join(path)}
    if attachment is not None:
        environment |= {"CNI_CONTAINERID": attachment.container, "CNI_NETNS": attachment.netns,
                        "CNI_IFNAME": attachment.ifname, "CNI_ARGS": attachment.args}
    with host.open() as descriptor:
        enter = ["nsenter", f"--net=/proc/self/fd/{descriptor}"]
        return _execute([*enter, find(config["type"], path)], command, config, environment, (descriptor,))


def _execute(argv: Sequence[str], command: str, config: Json, environment: Mapping[str, str],
             keep: Sequence[int] = ()) -> Json:
    done = subprocess.run(argv, input=json.dumps(config).encode(), capture_output=True, env=dict(environment),
                          pass_fds=keep, timeout=120)
    step = f"{os.path.basename(argv[-1])} {command}"
    try:
        answer: Json = json.loads(done.stdout or "{}")
    except ValueError:
        raise ChildFailed(step, detail=f"no JSON on standard output: {done.stdout[:80]!r}") from None
    if done.returncode != 0:
        said = answer.get("msg") or done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
        raise PluginFailed(step, answer.get("code", 0), ": ".join(filter(None, [said, answer.get("details")])))
    return answer


def find(kind: str, path: Sequence[str]) -> str:
    """The program of a plugin: the first of that name in the folders of path."""
    for folder in path:
        if "/" not in kind and os.access(program := f"{folder}/{kind}", os.X_OK):
            return program
    raise ChildFailed(f"find plugin {kind}", detail=f"not in {':'.join(path)}")


class Caller:
    """A runtime: runs the plugins of a configuration list, and keeps each attachment's result for CHECK and DEL.

    config: {"cniVersion", "name", "plugins": [{"type", …}, …]}, section 1.
    capabilities: what the plugins that ask for it are told, {"portMappings": […]}.
    """

    def __init__(self, host: Netns, config: Json, capabilities: Json | None = None,
                 path: Sequence[str] = (PLUGINS, OURS)) -> None:
        self.host, self.config, self.path = host, config, path
        self.capabilities = capabilities or {}
        self.results: dict[Attachment, Json] = {}

    def add(self, attachment: Attachment) -> Json:
        """ADD, first plugin to last; each is given the result of the one before.  A failure takes all back."""
        result: Json | None = None
        try:
            for plugin in self.config["plugins"]:
                result = self._call("ADD", plugin, attachment, result)
        except ChildFailed:
            with suppress(ChildFailed):
                self.delete(attachment)
            raise
        self.results[attachment] = result or {}
        return self.results[attachment]

    def check(self, attachment: Attachment) -> None:
        """CHECK, first plugin to last, with the result of ADD; PluginFailed where something is not as it was."""
        if attachment not in self.results:
            raise BadInput("attachment", attachment.container, "has not been added by this caller")
        for plugin in self.config["plugins"]:
            self._call("CHECK", plugin, attachment, self.results[attachment])

    def delete(self, attachment: Attachment) -> None:
        """DEL, last plugin to first, each of them even if one fails; may be called again."""
        result = self.results.pop(attachment, None)
        with ExitStack() as backwards:
            for plugin in self.config["plugins"]:
                backwards.callback(self._call, "DEL", plugin, attachment, result)

    def status(self) -> None:
        """STATUS: PluginFailed if an ADD could not work now."""
        for plugin in self.config["plugins"]:
            self._call("STATUS", plugin, None, None)

    def gc(self) -> None:
        """GC: have every plugin remove what belongs to no attachment of this caller."""
        valid = [{"containerID": one.container, "ifname": one.ifname} for one in self.results]
        for plugin in self.config["plugins"]:
            self._call("GC", plugin | {"cni.dev/valid-attachments": valid}, None, None)

    def _call(self, command: str, plugin: Json, attachment: Attachment | None, result: Json | None) -> Json:
        config = execution_config(self.config, plugin, self.capabilities, result)
        return call(self.host, command, config, attachment, self.path)


def execution_config(network: Json, plugin: Json, capabilities: Json, result: Json | None = None) -> Json:
    """What goes to a plugin's standard input: section 3, "Deriving execution configuration"."""
    config = {"cniVersion": network["cniVersion"], "name": network["name"]}
    config |= {key: value for key, value in plugin.items() if key != "capabilities"}
    wanted = [key for key, on in plugin.get("capabilities", {}).items() if on and key in capabilities]
    if wanted:
        config["runtimeConfig"] = {key: capabilities[key] for key in wanted}
    return config if result is None else config | {"prevResult": result}


@contextmanager
def attached(host: Netns, config: Json, attachment: Attachment, capabilities: Json | None = None,
             path: Sequence[str] = (PLUGINS, OURS)) -> Iterator[Json]:
    """ADD now and DEL at the end of the block; the result of ADD."""
    caller = Caller(host, config, capabilities, path)
    result = caller.add(attachment)
    try:
        yield result
    finally:
        caller.delete(attachment)


# The plugin


class Refusal(LabError):
    """What the plugin answers instead of a result: section 5, "Error"."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        self.code, self.message, self.details = code, message, details
        super().__init__(message)


class Order(NamedTuple):
    """What the plugin was told, checked."""

    command: str
    config: Json
    attachment: Attachment
    path: tuple[str, ...]

    @property
    def bridge(self) -> str:
        """The link that the containers of this network meet at."""
        return str(self.config.get("bridge", "br0"))

    @property
    def veth(self) -> str:
        """The host's end of this attachment: made of its ids, so that DEL needs no memory."""
        return veth_name(self.attachment.container, self.attachment.ifname)


def veth_name(container: str, ifname: str) -> str:
    """A name of 12 characters for the host's end of an attachment."""
    return "veth" + hashlib.sha256(f"{container}/{ifname}".encode()).hexdigest()[:8]


def main(environment: Mapping[str, str], text: bytes) -> int:
    """Do what the environment and the configuration say, and print the answer; the exit status."""
    version = VERSIONS[-1]
    try:
        command = _command(environment)
        config = _config(text)
        version = config["cniVersion"]
        answer = _serve(Order(command, config, _attachment(environment, command), _path(environment)))
    except (Refusal, LabError) as error:
        answer = {"cniVersion": version, **_error(error)}
    if answer is not None:
        print(json.dumps(answer, indent=4))
    return int(answer is not None and "code" in answer)


def _error(error: LabError) -> Json:
    if isinstance(error, Refusal):
        return {"code": error.code, "msg": error.message} | ({"details": error.details} if error.details else {})
    code = error.code if isinstance(error, PluginFailed) else REFUSED_BY_KERNEL
    return {"code": code or REFUSED_BY_KERNEL, "msg": str(error)}


def _command(environment: Mapping[str, str]) -> str:
    command = environment.get("CNI_COMMAND", "")
    if command not in NEEDED:
        raise Refusal(INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}")
    return command


def _config(text: bytes) -> Json:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise Refusal(FAILED_TO_DECODE, "the configuration is no JSON", str(error)) from None
    if not isinstance(config, dict):
        raise Refusal(FAILED_TO_DECODE, "the configuration is no JSON object")
    if config.setdefault("cniVersion", "0.1.0") not in VERSIONS:
        raise Refusal(INCOMPATIBLE_VERSION, "incompatible CNI versions",
                      f"config is {config['cniVersion']}, plugin supports {' '.join(VERSIONS)}")
    return config


def _attachment(environment: Mapping[str, str], command: str) -> Attachment:
    missing = [name for name in NEEDED[command] if not environment.get(name)]
    if missing:
        raise Refusal(INVALID_ENVIRONMENT, f"required env variables [{' '.join(missing)}] missing")
    for name in set(NEEDED[command]) & set(SHAPE):
        if not SHAPE[name].fullmatch(environment[name]):
            raise Refusal(INVALID_ENVIRONMENT, f"{name} {environment[name]!r} is not a valid one")
    return Attachment(*(environment.get(name, "") for name in ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")))


def _path(environment: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(environment.get("CNI_PATH", PLUGINS).split(":"))


def _serve(order: Order) -> Json | None:
    """The answer to a command; None where success has nothing to say."""
    if order.command == "VERSION":
        return {"cniVersion": order.config["cniVersion"], "supportedVersions": VERSIONS}
    _check_config(order.config)
    work: dict[str, Callable[[Order], Json | None]] = {
        "ADD": _add, "CHECK": _check, "DEL": _delete, "STATUS": _status, "GC": _gc}
    return work[order.command](order)


def _check_config(config: Json) -> None:
    """Section 1, and what the keys of this plugin may be."""
    ipam, name, mtu, bridge = (config.get(key, other) for key, other in
                               (("ipam", None), ("name", ""), ("mtu", 0), ("bridge", "br0")))
    rules = {
        "name must be an identifier": isinstance(name, str) and IDENTIFIER.fullmatch(name),
        "bridge must be a name of at most 15 characters": isinstance(bridge, str) and LINK.fullmatch(bridge),
        "mtu must be a number": type(mtu) is int and 0 <= mtu <= 65535,
        "ipam.type must name the plugin that gives addresses":
            isinstance(ipam, dict) and isinstance(ipam.get("type"), str),
        "prevResult must be an object": isinstance(config.get("prevResult", {}), dict),
    }
    for rule, holds in rules.items():
        if not holds:
            raise Refusal(INVALID_CONFIG, rule)


def _ipam(order: Order, command: str = "", attachment: Attachment | None = None) -> Json:
    """Have the IPAM plugin do the same command: section 4, "Plugin Delegation"."""
    config = order.config | {"cniVersion": DELEGATED}
    one = attachment or order.attachment
    environment = {**os.environ, "CNI_COMMAND": command or order.command, "CNI_CONTAINERID": one.container,
                   "CNI_IFNAME": one.ifname, "CNI_NETNS": one.netns}
    return _execute([find(config["ipam"]["type"], order.path)], environment["CNI_COMMAND"], config, environment)


def _host() -> Netns:
    return Netns("host", "/proc/self/ns/net")


def _add(order: Order) -> Json:
    """Addresses first, then the links; what was made is taken back if a later step fails."""
    inside = Netns("container", order.attachment.netns)
    with ExitStack() as undo:
        given = _ipam(order)
        undo.callback(_ipam, order, "DEL")
        if not given.get("ips"):
            raise Refusal(INVALID_CONFIG, f"{order.config['ipam']['type']} gave no address")
        with netlink.connect(_host(), inside) as (host, guest):
            _bridge(host, order, given)
            _veth(host, order, inside, _mac(given["ips"][0]["address"]))
            undo.callback(_unlink, order)
            _configure(guest, order.attachment.ifname, given)
        undo.pop_all()
    return _result(order, given)


def _bridge(host: netlink.Rtnl, order: Order, given: Json) -> None:
    """The bridge is there and up, and bears the gateway's address."""
    with netlink.suppress_errno(errno.EEXIST):
        host.request("add", "link", ifname=order.bridge, kind="bridge", **_gateway_mac(given))
    index = host.index(order.bridge)
    host.request("set", "link", index=index, state="up")
    for ip in given["ips"]:
        if ip.get("gateway"):
            with netlink.suppress_errno(errno.EEXIST):
                host.request("add", "addr", index=index, address=ip["gateway"], prefixlen=_prefix(ip["address"]))


def _gateway_mac(given: Json) -> Json:
    gateway = given["ips"][0].get("gateway")
    return {"address": _mac(gateway)} if gateway else {}


def _mac(address: str) -> str:
    """A MAC address made of the IP address, so that nobody's memory of it (arp(7)) is wrong when it is given again.

    For the bridge it is one that stays: without, it takes that of its ports, which come and go.
    """
    return network.mac_of(ipaddress.ip_interface(address).ip)


def _prefix(address: str) -> int:
    return int(address.partition("/")[2])


def _veth(host: netlink.Rtnl, order: Order, inside: Netns, mac: str) -> None:
    """One end at the bridge, the other in the container; the alias says whose it is, for GC."""
    mtu = order.config.get("mtu") or 1500
    with inside.open() as descriptor:
        peer = {"ifname": order.attachment.ifname, "net_ns_fd": descriptor, "mtu": mtu, "address": mac}
        host.request("add", "link", ifname=order.veth, kind="veth", mtu=mtu, peer=peer)
    index = host.index(order.veth)
    alias = f"{order.attachment.container}/{order.attachment.ifname}"
    host.request("set", "link", index=index, master=host.index(order.bridge), state="up", ifalias=alias)


def _configure(guest: netlink.Rtnl, name: str, given: Json) -> None:
    index = guest.index(name)
    guest.request("set", "link", index=index, state="up")
    for ip in given["ips"]:
        guest.request("add", "addr", index=index, address=ip["address"].partition("/")[0],
                      prefixlen=_prefix(ip["address"]))
    gateways = [ip["gateway"] for ip in given["ips"] if ip.get("gateway")]
    for route in given.get("routes", []):
        guest.request("add", "route", dst=route["dst"], gateway=route.get("gw") or gateways[0], oif=index)


def _result(order: Order, given: Json) -> Json:
    """Section 5, "Success": the links made, and the addresses with the number of the link that bears them."""
    inside = Netns("container", order.attachment.netns)
    macs = {link.name: link.mac for link in netlink.links(_host())}
    own = {link.name: link.mac for link in netlink.links(inside)}
    interfaces = [{"name": name, "mac": macs[name]} for name in (order.bridge, order.veth)]
    ifname = order.attachment.ifname
    interfaces.append({"name": ifname, "mac": own[ifname], "sandbox": inside.path})
    ips = [{"interface": 2, **{key: ip[key] for key in ("address", "gateway") if key in ip}} for ip in given["ips"]]
    return {"cniVersion": order.config["cniVersion"], "interfaces": interfaces, "ips": ips,
            "routes": given.get("routes", []), "dns": given.get("dns", {})}


def _unlink(order: Order) -> None:
    with netlink.connect(_host()) as (host,):
        host.delete_link(order.veth)


def _delete(order: Order) -> None:
    """Both ends go with the host's, whether the container's namespace is there or not."""
    _ipam(order)
    _unlink(order)


def _check(order: Order) -> None:
    """Everything in prevResult is there still: section 2, "CHECK"."""
    if "prevResult" not in order.config:
        raise Refusal(INVALID_CONFIG, "required prevResult missing")
    _ipam(order)
    inside = Netns("container", order.attachment.netns)
    host = {link.name: link for link in netlink.links(_host())}
    guest = {link.name: link for link in netlink.links(inside)}.get(order.attachment.ifname)
    routes = netlink.routes(inside)
    lines = {f"link {order.veth} at {order.bridge}": order.veth in host and host[order.veth].master == order.bridge,
             f"link {order.attachment.ifname} up": guest is not None and guest.up}
    for ip in order.config["prevResult"].get("ips", []):
        lines[f"address {ip['address']}"] = guest is not None and ip["address"] in guest.addresses
    for route in order.config["prevResult"].get("routes", []):
        to = "default" if route["dst"] in ("0.0.0.0/0", "::/0") else route["dst"]
        lines[f"route {to}"] = any(one.destination == to for one in routes)
    missing = [what for what, there in lines.items() if not there]
    if missing:
        raise Refusal(NOT_AS_ADDED, f"no longer there: {', '.join(missing)}")


def _status(order: Order) -> None:
    """Ready when the IPAM plugin can be run."""
    try:
        find(order.config["ipam"]["type"], order.path)
    except ChildFailed as error:
        raise Refusal(NOT_AVAILABLE, str(error)) from None


def _gc(order: Order) -> None:
    """Remove the attachments of this bridge that the caller does not list as valid: section 2, "GC"."""
    listed = order.config.get("cni.dev/valid-attachments", [])
    valid = {(one["containerID"], one["ifname"]) for one in listed}
    for container, ifname in _aliases(order.bridge):
        if (container, ifname) not in valid:
            _delete(order._replace(command="DEL", attachment=Attachment(container, "", ifname)))


def _aliases(bridge: str) -> Iterator[tuple[str, str]]:
    """The attachments whose host's end is at the bridge, by the alias of their link."""
    with netlink.connect(_host()) as (host,):
        index = host.index(bridge)
        found = [link.get("ifalias") or "" for link in host.request("dump", "link") if link.get("master") == index]
    for alias in found:
        container, slash, ifname = alias.rpartition("/")
        if slash:
            yield container, ifname
