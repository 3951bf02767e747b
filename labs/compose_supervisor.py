"""The one process that holds a project: its networks, its containers, and what turns what is into what is wanted.

Docker's daemon holds the containers of every project, and compose only talks to it; here each project has a holder of
its own, started by compose_run, that outlives whoever asked. It listens on a Unix socket in FOLDER/NAME; a request is
one line of JSON, the answer lines of JSON: {"say": …} while it works, at last {"done": …} or {"error": …}.

The project's network namespace labs-NAME plays the host: bridges, published ports and DNS are there and nowhere else.
Everything it makes is held by one ExitStack, and is gone when it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from labs import compose, compose_bundle, dns, firewall, machine, netns, network, storage
from labs.compose import COMPLETED, HEALTHY, Action
from labs.compose_bundle import Config, bind
from labs.compose_file import Project
from labs.compose_forms import seconds
from labs.compose_unit import Spec, State, Unit
from labs.errors import BadInput, LabError

FOLDER = f"{machine.STATE}/compose"
DNS_ADDRESS = "127.0.0.11"  # as in Docker's containers
GRACE = 10.0
LINE = 1 << 24  # bytes that one request may have
ANY_PORT = range(32768, 61000)  # net.ipv4.ip_local_port_range of ip-sysctl.rst, for a port that is not given
FOR_ITS_CLIENT = ("up", "exec")  # what ends when nobody waits for the answer any more


class UpFailed(LabError):
    """Something a project needs did not come about; ``left`` are the containers that stay as they are."""

    def __init__(self, reason: str, left: Sequence[str] = ()) -> None:
        self.reason, self.left = reason, list(left)
        stays = f"; left as they are: {', '.join(left)}" if left else "; nothing is left"
        super().__init__(reason + stays)


class Event(NamedTuple):
    """What happened: seconds since the epoch, the container, "started", "healthy", "died", "removed" …, a detail."""

    time: float
    container: str
    what: str
    detail: str


class Image(NamedTuple):
    """What a container needs of an image: its layers as directories, the lowest first, and config.md's config."""

    layers: tuple[str, ...]
    run: Mapping[str, Any]


class Net:
    """A network of the project: a bridge in the project's namespace."""

    def __init__(self, host: netns.Netns, key: str, given: Mapping[str, Any], number: int) -> None:
        self.key, self.given, self.undo = key, given, ExitStack()
        self.subnet = _ipam(given, "subnet") or f"10.88.{number}.0/24"
        self.bridge = f"br{number}"
        self.made = self.undo.enter_context(network.network(
            host, self.bridge, self.subnet, gateway=_ipam(given, "gateway"), internal=bool(given.get("internal"))))


def _ipam(given: Mapping[str, Any], key: str) -> str:
    return next((one[key] for one in given.get("ipam", {}).get("config") or () if key in one), "")


class Supervisor:
    """The state of one project, and what may be asked of it."""

    def __init__(self, name: str, folder: str, undo: ExitStack) -> None:
        self.name, self.folder, self._undo = name, folder, undo
        self.host = undo.enter_context(netns.namespace(name))
        self.project: Project | None = None
        self.scale: dict[str, int] = {}
        self.images: dict[str, Image] = {}
        self.made_of: dict[tuple[str, int], Image] = {}
        self.ports: dict[str, list[str]] = {}
        self.units: dict[tuple[str, int], Unit] = {}
        self.nets: dict[str, Net] = {}
        self.spaces: dict[str, netns.Netns] = {}
        self.servers: dict[str, tuple[dns.Server, frozenset[str]]] = {}
        self.events: list[Event] = []
        self._numbers = iter(range(250))
        self._busy = asyncio.Lock()
        self._up: asyncio.Task[Any] | None = None
        self.over = asyncio.Event()

    # Up

    async def up(self, request: Mapping[str, Any], say: Callable[[str], None]) -> list[Action]:
        """Make what is into what is wanted; see compose.plan.  Raises UpFailed, with what was begun left in place."""
        self._up = asyncio.current_task()
        try:
            return await self._reconcile(request, say)
        finally:
            self._up = None

    async def _reconcile(self, request: Mapping[str, Any], say: Callable[[str], None]) -> list[Action]:
        project = self.project = Project(**request["project"], places={})
        self.images |= {name: Image(tuple(one["layers"]), one["run"]) for name, one in request["images"].items()}
        self.scale = request["scale"]
        planned = compose.plan(project, self.states(), self.scale, request["services"])
        actions = [self._outdated(project, one) for one in planned]
        await self._make_networks(project, actions)
        for key in [(one.service, one.number) for one in actions if one.kind == "remove"]:
            if key in self.units:
                await self._remove(key)
        await self._in_order(project, actions, say)
        self._drop_networks(project)
        if request.get("wait"):
            await self._wait_all(project, actions)
        return actions

    def _outdated(self, project: Project, action: Action) -> Action:
        """What has the right hash may still have been made from another image, or be in a network as it was."""
        key = (action.service, action.number)
        if action.kind not in ("keep", "start"):
            return action
        why = ["image changed"] if self.made_of[key] != self.images[action.service] else []
        why += [f"network {net} changed" for net in self._old_networks(project)
                if net in self.units[key].state.networks]
        return action._replace(kind="recreate", why=why[0]) if why else action

    async def _in_order(self, project: Project, actions: Sequence[Action], say: Callable[[str], None]) -> None:
        """Every service as soon as what it depends on is ready: what the graph lets run side by side, does."""
        levels = [name for level in compose.order(project) for name in level]
        changed: set[str] = set()
        tasks: dict[str, asyncio.Task[None]] = {}

        async def service(name: str) -> None:
            before = {other: tasks[other] for other in compose.needs(project, name) if other in tasks}
            await asyncio.gather(*before.values())
            for other, condition in compose.needs(project, name).items():
                await self._gate(project, name, other, condition)
            mine = [one for one in actions if one.service == name and one.kind != "remove"]
            pulled = {other for other, given in (project.services[name].get("depends_on") or {}).items()
                      if given.get("restart") and other in changed}
            await asyncio.gather(*(self._act(project, one, bool(pulled), say) for one in mine))
            if any(one.kind == "recreate" for one in mine):
                changed.add(name)

        for name in levels:
            if any(one.service == name for one in actions):
                tasks[name] = asyncio.create_task(service(name))
        try:
            await asyncio.gather(*tasks.values())
        except Exception:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            raise

    async def _gate(self, project: Project, name: str, other: str, condition: str) -> None:
        """Wait until a dependency is what its condition says."""
        required = project.services[name]["depends_on"][other].get("required", True)
        for unit in [one for key, one in self.units.items() if key[0] == other]:
            if (problem := await _problem(unit, condition)) and required:
                raise UpFailed(problem, self.names())

    async def _act(self, project: Project, action: Action, pulled: bool, say: Callable[[str], None]) -> None:
        key = (action.service, action.number)
        if action.kind == "recreate" and key in self.units:
            await self._remove(key)
        if action.kind in ("create", "recreate"):
            say(f"{compose.container_name(project, *key)} {action.why}")
            self._create(project, *key)
        unit = self.units[key]
        if pulled and action.kind == "keep":
            await unit.stop()
        if action.kind != "keep" or pulled:
            self._write_files(unit)
            await unit.start()

    async def _wait_all(self, project: Project, actions: Sequence[Action]) -> None:
        """--wait: everything runs, what has a healthcheck is healthy, and nothing ends that nobody wants to."""
        pairs = [pair for name in project.services for pair in compose.needs(project, name).items()]
        one_shots = {name for name, condition in pairs if condition == COMPLETED}
        units = [unit for key, unit in self.units.items() if key[0] in {one.service for one in actions}]
        for unit in units:
            condition = COMPLETED if unit.spec.service in one_shots else HEALTHY if unit.spec.healthcheck else "running"
            if problem := await _problem(unit, condition):
                raise UpFailed(problem, self.names())
        for unit in units:
            if unit.state.status == "exited" and unit.spec.service not in one_shots:
                raise UpFailed(f"{unit.spec.name} exited ({unit.state.exit_code})", self.names())

    def names(self) -> list[str]:
        """Of all its containers."""
        return sorted(unit.spec.name for unit in self.units.values())

    # Networks

    def _old_networks(self, project: Project) -> list[str]:
        return [key for key, net in self.nets.items() if project.networks.get(key, net.given) != net.given]

    async def _make_networks(self, project: Project, actions: Sequence[Action]) -> None:
        """The networks that are missing; one whose settings changed is made anew, and so is whoever is in it."""
        again = {(one.service, one.number) for one in actions if one.kind in ("recreate", "remove")}
        old = self._old_networks(project)
        inside = {key: unit for key, unit in self.units.items() if set(old) & set(unit.state.networks)}
        for net in old:
            for key, unit in inside.items():
                if net in unit.state.networks and key not in again:
                    raise UpFailed(f"network {net} changed, but {unit.spec.name} is in it", self.names())
        for key in inside:
            await self._remove(key)
        for net in old:
            self.nets.pop(net).undo.close()
        for net, given in project.networks.items():
            if net not in self.nets:
                self.nets[net] = Net(self.host, net, given, next(self._numbers))

    def _drop_networks(self, project: Project) -> None:
        used = {key for unit in self.units.values() for key in unit.state.networks}
        for key in [key for key in self.nets if key not in project.networks and key not in used]:
            self.nets.pop(key).undo.close()

    def _records(self, nets: Collection[str]) -> dict[str, list[str]]:
        """Names that somebody in those networks may ask for: service, container, aliases."""
        found: dict[str, list[str]] = {}
        for (service, _), unit in sorted(self.units.items()):
            own = (self.project.services.get(service, {}) if self.project else {}).get("networks") or {}
            for net, address in unit.state.networks.items():
                if net in nets and unit.state.status in ("running", "created"):
                    for name in {service, unit.spec.name, *((own.get(net) or {}).get("aliases") or ())}:
                        found.setdefault(name, []).append(address)
        return found

    def _tell_servers(self) -> None:
        for server, nets in self.servers.values():
            server.update(self._records(nets))

    # One container

    def _create(self, project: Project, service: str, number: int) -> None:
        """Everything of a container but its process."""
        given, image = project.services[service], self.images[service]
        name = compose.container_name(project, service, number)
        unit = Unit(self._spec(project, service, number, image), f"{self.folder}/units/{name}", self._changed)
        try:
            unit.prepare()
            space = self._namespace(project, unit, given)
            self.units[service, number], self.made_of[service, number] = unit, image
            self._write_files(unit)
            binds = [*self._standard_files(unit), *self._volumes(project, unit, given),
                     *self._grants(project, unit, given)]
            unit.configure(compose_bundle.configuration(given, image.run, name=name, rootfs=unit.rootfs,
                                                        netns=space.path, mounts=binds, annotations=unit.spec.labels))
            self._publish(unit, given)
        except BaseException:
            self.units.pop((service, number), None)
            self.made_of.pop((service, number), None)
            unit.undo.close()
            raise
        self._changed(unit, "created")

    def _spec(self, project: Project, service: str, number: int, image: Image) -> Spec:
        given = project.services[service]
        stop_signal = given.get("stop_signal") or image.run.get("StopSignal") or "SIGTERM"
        return Spec(compose.container_name(project, service, number), project.name, service, number,
                    compose.config_hash(given), image.layers, str(given.get("restart", "no")),
                    _healthcheck(given.get("healthcheck"), image.run), str(stop_signal),
                    seconds(given.get("stop_grace_period", f"{GRACE}s")), compose.labels(project, service, number))

    def _namespace(self, project: Project, unit: Unit, given: Mapping[str, Any]) -> netns.Netns:
        """Its network namespace: one of its own, the project's ("host"), or that of another service."""
        mode, name = str(given.get("network_mode", "")), unit.spec.name
        shared = {"host": self.host, "service": self.spaces.get(self._owner(unit).spec.name)}
        space = shared.get(mode.partition(":")[0]) or unit.undo.enter_context(netns.namespace(name))
        self.spaces[name] = space
        unit.undo.callback(self.spaces.pop, name, None)
        addresses = {}
        for number, key in enumerate(given.get("networks") or {}):
            wanted = (given["networks"][key] or {}).get("ipv4_address", "")
            made = unit.undo.enter_context(self.nets[key].made.attach(space, f"eth{number}", address=wanted))
            addresses[key] = made.address.partition("/")[0]
        unit.state = unit.state._replace(networks=addresses)
        if addresses:
            server = unit.undo.enter_context(dns.serve(space, DNS_ADDRESS, {}))
            self.servers[name] = (server, frozenset(addresses))
            Path(unit.folder, "dns").write_text(server.folder, encoding="utf-8")  # for who clears up after a kill -9
            unit.undo.callback(self.servers.pop, name, None)
        return space

    def _owner(self, unit: Unit) -> Unit:
        """The container whose network namespace one lives in: its own, or by network_mode that of another service."""
        given = self.project.services.get(unit.spec.service, {}) if self.project else {}
        kind, _, service = str(given.get("network_mode", "")).partition(":")
        if kind != "service":
            return unit
        other = self.units.get((service, 1))
        if other is None:
            raise UpFailed(f"{unit.spec.name}: network_mode: {service} has no container")
        return self._owner(other)

    def _write_files(self, unit: Unit) -> None:
        """hosts, hostname and resolv.conf, as an engine writes them (hosts(5), resolv.conf(5))."""
        given = self.project.services[unit.spec.service] if self.project else {}
        host = str(given.get("hostname") or unit.spec.name)
        addresses = list(unit.state.networks.values())
        up = self.nets[next(iter(unit.state.networks))].made.gateway if addresses else "127.0.0.1"
        extra = [one.replace("host-gateway", up) for one in given.get("extra_hosts") or ()]
        texts = {"hosts": compose_bundle.hosts(host, addresses, extra), "hostname": host + "\n",
                 "resolv.conf": dns.resolv_conf([DNS_ADDRESS], options=["ndots:0"])}
        for name, text in texts.items():
            Path(unit.folder, name).write_text(text, encoding="utf-8")

    def _standard_files(self, unit: Unit) -> list[Config]:
        """Those three, bound; whoever lives in another's network has that one's."""
        owner = self._owner(unit)
        names = ["hosts", "hostname", *(["resolv.conf"] if owner.state.networks else [])]
        return [bind(f"{owner.folder}/{name}", f"/etc/{name}") for name in names]

    def _volumes(self, project: Project, unit: Unit, given: Mapping[str, Any]) -> Iterator[Config]:
        """Binds as they are; named volumes from the store, filled from the image at first; others in its own folder."""
        for number, one in enumerate(given.get("volumes") or ()):
            if one["type"] == "bind":
                if not os.path.exists(one["source"]):
                    os.makedirs(one["source"])
                source = one["source"]
            elif one["type"] == "volume" and one.get("source"):
                resource = project.volumes[one["source"]]
                store = storage.Volumes()
                source = store.create(resource["name"], {compose.LABEL + "project": project.name,
                                                         compose.LABEL + "volume": one["source"]}).path
                if not (one.get("volume") or {}).get("nocopy"):
                    store.fill(resource["name"], unit.rootfs, one["target"])
            elif one["type"] == "volume":
                source = f"{unit.folder}/volume{number}"
                os.makedirs(source)
            else:
                continue  # tmpfs: configuration() has it
            yield bind(source, one["target"], bool(one.get("read_only")))

    def _grants(self, project: Project, unit: Unit, given: Mapping[str, Any]) -> Iterator[Config]:
        """Secrets below /run/secrets, configs below /, each a file bound read-only."""
        for kind, top in (("secrets", "/run/secrets/"), ("configs", "/")):
            for one in given.get(kind) or ():
                resource = getattr(project, kind)[one["source"]]
                target = one.get("target") or one["source"]
                source = resource.get("file") or _own_file(unit, kind, one, resource)
                yield bind(source, target if target.startswith("/") else top + target, readonly=True)

    def _publish(self, unit: Unit, given: Mapping[str, Any]) -> None:
        """Every published port leads to the container's first address (nft(8), dnat)."""
        said = self.ports[unit.spec.name] = []
        unit.undo.callback(self.ports.pop, unit.spec.name, None)
        for port in given.get("ports") or ():
            address = port.get("host_ip") or firewall.ANY
            number = self._open(unit, port, address)
            said.append(f"{address}:{number}->{port['target']}/{port['protocol']}")

    def _open(self, unit: Unit, port: Mapping[str, Any], address: str) -> int:
        """Publish a port at the first free number that it may have; that number."""
        key, to = next(iter(unit.state.networks.items()))
        for number in _numbers(str(port.get("published") or "")):
            try:
                unit.undo.enter_context(firewall.published(
                    self.host, number, to, int(port["target"]), protocol=port["protocol"], address=address,
                    bridge=self.nets[key].bridge, subnet=self.nets[key].subnet))
            except BadInput as problem:
                if problem.field != "port":
                    raise
            else:
                return number
        raise UpFailed(f"{unit.spec.name}: port: {port.get('published')!r}: is in use")

    def _changed(self, unit: Unit, what: str) -> None:
        detail = f"exit {unit.state.exit_code}" if what == "died" else ""
        self.events.append(Event(time.time(), unit.spec.name, what, detail))
        if what in ("created", "started", "exited", "removed"):
            self._tell_servers()

    async def _remove(self, key: tuple[str, int]) -> None:
        unit = self.units[key]
        await unit.stop()
        self.units.pop(key)
        self.made_of.pop(key)
        await unit.remove()

    # What else may be asked

    def states(self) -> list[State]:
        """Every container, by service and number."""
        return [unit.state for _, unit in sorted(self.units.items())]

    def _chosen(self, names: Collection[str]) -> list[Unit]:
        """Those of the services named, all without; in the order of start."""
        levels = [name for level in compose.order(self.project) for name in level] if self.project else []
        rank = {name: number for number, name in enumerate(levels)}
        found = sorted(self.units.items(), key=lambda item: (rank.get(item[0][0], -1), item[0]))
        return [unit for key, unit in found if not names or key[0] in names or unit.spec.name in names]

    async def stop(self, names: Collection[str], grace: float | None) -> None:
        """Stop containers, each after those that depend on it."""
        waiting = {unit.spec.name: unit for unit in self._chosen(names)}
        while waiting:
            held = {need for unit in waiting.values() for need in self._needs(unit.spec.service)}
            free = [unit for unit in waiting.values() if unit.spec.service not in held]
            await asyncio.gather(*(unit.stop(grace) for unit in free or list(waiting.values())))
            for unit in free or list(waiting.values()):
                waiting.pop(unit.spec.name)

    async def start(self, names: Collection[str]) -> None:
        """Start containers again, each when what it depends on is ready."""
        if self.project:
            for level in compose.order(self.project):
                units = [unit for unit in self._chosen(names) if unit.spec.service in level]
                await asyncio.gather(*(self._start(self.project, unit) for unit in units))

    async def _start(self, project: Project, unit: Unit) -> None:
        for other, condition in self._needs(unit.spec.service).items():
            await self._gate(project, unit.spec.service, other, condition)
        await unit.start()

    def _needs(self, service: str) -> dict[str, str]:
        known = self.project is not None and service in self.project.services
        return compose.needs(self.project, service) if known and self.project else {}

    async def down(self, volumes: bool) -> None:
        """Stop and remove everything; then this process ends."""
        await self.stop((), None)
        for unit in self._chosen(())[::-1]:
            await self._remove((unit.spec.service, unit.spec.number))
        for net in self.nets.values():
            net.undo.close()
        if volumes:
            remove_volumes(self.name)
        self.over.set()

    async def answer(self, request: Mapping[str, Any], say: Callable[[str], None]) -> Any:
        """Do what a request asks: at once what only looks or concerns one container, the rest one after the other."""
        what, names = request["do"], request.get("services") or ()
        at_once: dict[str, Callable[[], Any]] = {
            "ps": lambda: [one._asdict() for one in self.states()], "events": lambda: self.events,
            "ports": lambda: self.ports}
        if what in at_once:
            return at_once[what]()
        if what == "exec":
            return await self._named(request["container"]).execute(request["argv"], request["env"])
        if what == "kill":
            return await self._named(request["container"]).kill(request["signal"])
        changes: dict[str, Callable[[], Awaitable[Any]]] = {
            "up": lambda: self.up(request, say), "start": lambda: self.start(names),
            "stop": lambda: self.stop(names, request["grace"]), "down": lambda: self.down(request["volumes"])}
        if what not in changes:
            raise BadInput("do", what, f"must be one of {', '.join([*at_once, 'exec', 'kill', *changes])}")
        if what in ("stop", "down") and self._up:
            self._up.cancel()  # it may be waiting for what will never come
        async with self._busy:
            return await changes[what]()

    def _named(self, name: str) -> Unit:
        """By the name of a container, or of a service: its first one."""
        found = self._chosen([name])
        if not found:
            raise UpFailed(f"{name}: no such container or service", self.names())
        return found[0]


def remove_volumes(project: str) -> None:
    """Remove the named volumes of a project, and the store if it is empty then."""
    store = storage.Volumes()
    for volume in store.find({compose.LABEL + "project": project}):
        store.remove(volume.name)
    if not store.find():
        machine.remove_tree(store.store)


def _own_file(unit: Unit, kind: str, one: Mapping[str, Any], resource: Mapping[str, Any]) -> str:
    path = Path(unit.folder, f"{kind}-{one['source']}")
    path.write_text(str(resource.get("content", "")), encoding="utf-8")
    path.chmod(int(one.get("mode") or 0o444))
    return str(path)


def _healthcheck(given: Mapping[str, Any] | None, image: Mapping[str, Any]) -> dict[str, Any] | None:
    """A service's healthcheck over that of its image (Dockerfile, HEALTHCHECK); None where neither asks for one."""
    theirs = image.get("Healthcheck") or {}
    times = {"interval": "Interval", "timeout": "Timeout", "start_period": "StartPeriod"}
    found = {key: f"{theirs[name]}ns" for key, name in times.items() if theirs.get(name)}
    found |= {key: theirs[name] for key, name in (("test", "Test"), ("retries", "Retries")) if theirs.get(name)}
    found |= {key: value for key, value in (given or {}).items() if value is not None}
    off = found.get("disable") or not found.get("test") or found["test"][0] == "NONE"
    return None if off else found


def _numbers(published: str) -> range:
    """The ports of the host that "8080", "8080-8085" or "" (any) may mean."""
    first, _, last = published.partition("-")
    return range(int(first), int(last or first) + 1) if first else ANY_PORT


async def _problem(unit: Unit, condition: str) -> str:
    """Wait for a condition; what made it impossible, or ""."""
    name = unit.spec.name
    if condition == COMPLETED:
        await unit.until(lambda state: state.status == "exited")
        code = unit.state.exit_code
        return f'service "{unit.spec.service}" didn\'t complete successfully: exit {code}' if code else ""
    if condition == HEALTHY:
        if not unit.spec.healthcheck:
            return f"{name} has no healthcheck"
        await unit.until(lambda state: state.health in ("healthy", "unhealthy") or state.status == "exited")
        if unit.state.status == "exited":
            return f"{name} exited ({unit.state.exit_code})"
        return "" if unit.state.health == "healthy" else f"{name} is unhealthy"
    await unit.until(lambda state: state.status in ("running", "exited"))
    return ""


# The process


async def _serve(name: str, folder: str) -> None:
    with ExitStack() as undo:
        supervisor = Supervisor(name, folder, undo)

        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async with _line(writer):
                if text := await reader.readline():
                    await _attend(supervisor, json.loads(text), reader, writer)

        server = await asyncio.start_unix_server(client, f"{folder}/socket", limit=LINE)
        told: list[asyncio.Task[Any]] = []
        def end() -> None:
            told.append(asyncio.create_task(supervisor.answer({"do": "down", "volumes": False}, print)))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, end)
        await supervisor.over.wait()
        server.close()
        await asyncio.sleep(0)
        machine.remove_tree(folder)


@asynccontextmanager
async def _line(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        with suppress(ConnectionError):
            writer.close()


async def _attend(supervisor: Supervisor, request: Mapping[str, Any], reader: asyncio.StreamReader,
                  writer: asyncio.StreamWriter) -> None:
    """Answer a request; an `up` or `exec` whose client goes away (end of file) ends there, the rest is finished."""
    answer = asyncio.create_task(_reply(supervisor, request, writer))
    gone = asyncio.create_task(reader.read(1))
    await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if request["do"] in FOR_ITS_CLIENT and not answer.done():
        answer.cancel()
    await asyncio.wait({answer})


async def _reply(supervisor: Supervisor, request: Mapping[str, Any], writer: asyncio.StreamWriter) -> None:
    def tell(**what: object) -> None:
        with suppress(ConnectionError):
            writer.write(json.dumps(what).encode() + b"\n")
    try:
        tell(done=await supervisor.answer(request, lambda text: tell(say=text)))
    except (LabError, OSError) as problem:
        tell(error=getattr(problem, "reason", str(problem)), left=supervisor.names())
    except asyncio.CancelledError:
        tell(error=f"{request['do']} was ended by another call, or because its client went away",
             left=supervisor.names())
    except Exception as problem:  # noqa: BLE001  whatever it is, whoever asked must hear of it
        traceback.print_exc()
        tell(error=f"{type(problem).__name__}: {problem}", left=supervisor.names())
    with suppress(ConnectionError):
        await writer.drain()


def main(name: str) -> None:
    """Hold a project until `down`."""
    machine.require()
    os.chdir(f"{FOLDER}/{name}")  # by which lab.clean() knows it
    asyncio.run(_serve(name, f"{FOLDER}/{name}"))


if __name__ == "__main__":
    main(sys.argv[1])
