"""labs.cni: the plugin beside Debian's bridge plugin, called by hand and by containerd's ctr; and the caller."""

import contextlib
import io
import json
import os
import shutil
import subprocess

import pytest

from labs import cni, errors, firewall, machine, netns, network

STATE = "/run/labs/cni"
IPAM = {"type": "host-local", "subnet": "10.43.0.0/24", "dataDir": STATE, "routes": [{"dst": "0.0.0.0/0"}]}
PLUGIN = {"type": "labs-cni", "bridge": "cni0", "isGateway": True, "ipam": IPAM}
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
PORTS = {"portMappings": [{"hostPort": 8081, "containerPort": 80, "protocol": "tcp"}]}


def listed(*plugins, version="1.0.0"):
    return {"cniVersion": version, "name": "labs", "plugins": list(plugins)}


@pytest.fixture(scope="module")
def spaces():
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(netns.namespace(name)) for name in ("host", "web", "client")]


@pytest.fixture
def host(spaces):
    """The host, and after the test neither its bridge nor what host-local has written down."""
    yield spaces[0]
    spaces[0].run(["ip", "link", "delete", "cni0"], check=False)
    machine.remove_tree(STATE)


@pytest.fixture
def web(spaces):
    return spaces[1]


@pytest.fixture
def who(web):
    return cni.Attachment("web", web.path)


def names(ns):
    return [link.name for link in network.links(ns)]


def leases():
    """The addresses that host-local has given out."""
    return sorted(name for name in os.listdir(f"{STATE}/labs") if name[0].isdigit())


def inside(host, config, **environment):
    """The plugin's main() in the host's namespace, in a child without a new Python: status and answer."""
    def serve():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            os.environ.clear()
            os.environ.update(environment)
            status = cni.main(environment, config if isinstance(config, bytes) else json.dumps(config).encode())
        return [status, out.getvalue()]
    status, text = host.call(serve)
    return status, json.loads(text) if text else None


def asked(web, command="ADD", **more):
    return {"CNI_COMMAND": command, "CNI_CONTAINERID": "web", "CNI_NETNS": web.path, "CNI_IFNAME": "eth0",
            "CNI_PATH": cni.PLUGINS, **more}


def execution(plugin=PLUGIN, version="1.0.0", **more):
    return {"cniVersion": version, "name": "labs", **plugin, **more}


# The same contract


def state_of(host, web):
    """What a plugin has made, without what may differ: MAC addresses and the name of the host's end."""
    here, there = {link.name: link for link in network.links(host)}, {link.name: link for link in network.links(web)}
    ends = [link for name, link in here.items() if name.startswith("veth")]
    return {
        "bridge": (here["cni0"].kind, here["cni0"].up, [a for a in here["cni0"].addresses if ":" not in a]),
        "ends": [(link.kind, link.up, link.master, link.mtu) for link in ends],
        "link": (there["eth0"].kind, there["eth0"].up, there["eth0"].mtu),
        "addresses": [address for address in there["eth0"].addresses if ":" not in address],
        "routes": [(route.destination, route.gateway) for route in network.routes(web)],
    }


def shape_of(result):
    """An answer without MAC addresses and the name of the host's end."""
    interfaces = [(link["name"][:4], sorted(link), link.get("sandbox")) for link in result["interfaces"]]
    return {**result, "interfaces": interfaces}


def test_the_same_input_gives_the_same_answer_and_the_same_links(host, web, who):
    found = []
    for kind in ("bridge", "labs-cni"):
        with cni.attached(host, listed({**PLUGIN, "type": kind, "mtu": 1400}), who) as result:
            found.append((shape_of(result), state_of(host, web)))
            assert [link["mac"] for link in result["interfaces"]][::2] == [
                next(link.mac for link in network.links(host) if link.name == "cni0"),
                next(link.mac for link in network.links(web) if link.name == "eth0")]
        assert (names(host), names(web), leases()) == (["lo", "cni0"], ["lo"], [])
        host.run(["ip", "link", "delete", "cni0"])
        machine.remove_tree(STATE)
    assert found[0] == found[1]
    assert found[0][1]["addresses"] == ["10.43.0.2/24"]


def test_both_say_what_they_support(host):
    ours, theirs = (cni.call(host, "VERSION", {"cniVersion": "1.0.0", "type": kind}) for kind in ("labs-cni", "bridge"))
    assert set(ours) == set(theirs) == {"cniVersion", "supportedVersions"}
    assert {"0.4.0", "1.0.0"} <= set(ours["supportedVersions"]) & set(theirs["supportedVersions"])


@pytest.mark.parametrize(("command", "config", "missing"), [
    ("ADD", execution(), "CNI_IFNAME"), ("ADD", execution(), "CNI_NETNS"), ("DEL", execution(), "CNI_CONTAINERID"),
    ("CHECK", execution(prevResult={"cniVersion": "1.0.0"}), "CNI_NETNS"), ("NONSENSE", execution(), ""),
    ("ADD", b"{", ""), ("ADD", execution(version="9.9.9"), ""),
])
def test_both_refuse_with_the_same_code(host, web, command, config, missing):
    environment = asked(web, command)
    environment.pop(missing, None)
    status, answer = inside(host, config, **environment)
    theirs = subprocess.run([f"{cni.PLUGINS}/bridge"], env=environment, capture_output=True,
                            input=config if isinstance(config, bytes) else json.dumps(config).encode())
    assert status == theirs.returncode == 1
    assert answer["code"] == json.loads(theirs.stdout)["code"]
    assert missing in answer["msg"]


@pytest.mark.parametrize(("config", "environment", "code", "words"), [
    (execution(), {"CNI_CONTAINERID": "../web"}, 4, "CNI_CONTAINERID"),
    (execution(), {"CNI_IFNAME": "a-name-of-16-byte"}, 4, "CNI_IFNAME"),
    (execution(), {"CNI_IFNAME": ".."}, 4, "CNI_IFNAME"),
    (execution(), {"CNI_NETNS": "/run/netns/labs-gone"}, 100, "no such network namespace"),
    (b"[]", {}, 6, "no JSON object"),
    (execution(name="-"), {}, 7, "name"),
    (execution(bridge="a/b"), {}, 7, "bridge"),
    (execution(mtu="big"), {}, 7, "mtu"),
    (execution(mtu=True), {}, 7, "mtu"),
    (execution(ipam={}), {}, 7, "ipam.type"),
    (execution(ipam=[]), {}, 7, "ipam.type"),
    (execution(prevResult=[]), {}, 7, "prevResult"),
    (execution(), {"CNI_COMMAND": "CHECK"}, 7, "prevResult"),
    (execution(ipam={"type": "static"}), {}, 7, "static gave no address"),
    (execution(ipam={"type": "nobody"}), {}, 100, "nobody"),
    (execution(ipam={"type": "../cni/host-local"}), {}, 100, "find plugin"),
    (execution(ipam={"type": "host-local"}), {}, 999, "host-local ADD"),
    (execution(bridge="eth9", mtu=60000), {"CNI_IFNAME": "lo"}, 100, "File exists"),
])
def test_what_the_plugin_refuses_leaves_nothing(host, web, config, environment, code, words):
    status, answer = inside(host, config, **(asked(web) | environment))
    assert (status, answer["code"]) == (1, code)
    assert words in answer["msg"] + answer.get("details", "")
    assert [name for name in names(host) if name.startswith("veth")] == []
    assert names(web) == ["lo"]
    assert not os.path.isdir(f"{STATE}/labs") or leases() == []
    host.run(["ip", "link", "delete", "eth9"], check=False)


# Its life


def test_what_is_no_longer_as_it_was_added(host, web):
    """Each damage is named, and mended before the next one."""
    environment = asked(web)
    _, result = inside(host, execution(), **environment)
    known, check = execution(prevResult=result), environment | {"CNI_COMMAND": "CHECK"}
    end = result["interfaces"][1]["name"]
    damages = [
        (host, f"ip link set {end} nomaster", f"ip link set {end} master cni0", f"link {end} at cni0"),
        (web, "ip address delete 10.43.0.2/24 dev eth0", "ip address add 10.43.0.2/24 dev eth0", "10.43.0.2/24"),
        (web, "ip link set eth0 down", "ip link set eth0 up", "link eth0 up"),
        (web, "true", "ip route add default via 10.43.0.1", "route default"),
    ]
    assert inside(host, known, **(environment | {"CNI_COMMAND": "CHECK"})) == (0, None)
    for where, damage, repair, words in damages:
        where.run(damage.split())
        status, answer = inside(host, known, **check)
        assert (status, answer["code"]) == (1, cni.NOT_AS_ADDED)
        assert words in answer["msg"]
        where.run(repair.split())
    assert inside(host, known, **check) == (0, None)
    for _ in range(2):
        assert inside(host, known, **(environment | {"CNI_COMMAND": "DEL"})) == (0, None)
    assert (names(host), names(web), leases()) == (["lo", "cni0"], ["lo"], [])


def test_the_namespace_is_gone_before_del(host):
    with netns.namespace("short") as short:
        status, result = inside(host, execution(), **asked(short))
        assert status == 0
    assert result["ips"][0]["address"] == "10.43.0.2/24"
    assert inside(host, execution(), **asked(short, "DEL", CNI_NETNS="")) == (0, None)
    assert (names(host), leases()) == (["lo", "cni0"], [])


def test_a_name_in_use_takes_everything_back(host, web):
    web.run(["ip", "link", "add", "eth0", "type", "bridge"])
    try:
        status, answer = inside(host, execution(), **asked(web))
        assert (status, answer["code"]) == (1, 100)
        assert "File exists" in answer["msg"]
        assert (names(host), leases()) == (["lo", "cni0"], [])
    finally:
        web.run(["ip", "link", "delete", "eth0"])


def test_gc_removes_whom_nobody_lists(host, web):
    config = execution(version="1.1.0")
    for name in ("kept", "stale"):
        inside(host, config, **asked(web, CNI_CONTAINERID=name, CNI_IFNAME=name))
    valid = {"cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "kept"}]}
    assert inside(host, config | valid, CNI_COMMAND="GC", CNI_PATH=cni.PLUGINS) == (0, None)
    assert names(web) == ["lo", "kept"]
    assert leases() == ["10.43.0.2"]
    assert inside(host, config, CNI_COMMAND="GC", CNI_PATH=cni.PLUGINS) == (0, None)
    assert (names(web), leases()) == (["lo"], [])


def test_status(host):
    assert inside(host, execution(version="1.1.0"), CNI_COMMAND="STATUS", CNI_PATH=cni.PLUGINS) == (0, None)
    status, answer = inside(host, execution(version="1.1.0"), CNI_COMMAND="STATUS", CNI_PATH="/nowhere")
    assert (status, answer["code"]) == (1, cni.NOT_AVAILABLE)


# The caller


def test_the_configuration_that_a_plugin_is_given():
    plugin = {"type": "x", "capabilities": {"portMappings": True, "ips": False, "mac": True}, "own": 1}
    config = cni.execution_config(listed(plugin), plugin, PORTS | {"ips": ["1"]}, {"ips": []})
    assert config == {"cniVersion": "1.0.0", "name": "labs", "type": "x", "own": 1, "runtimeConfig": PORTS,
                      "prevResult": {"ips": []}}
    assert "runtimeConfig" not in cni.execution_config(listed(plugin), {"type": "x"}, PORTS)


def test_a_chain_publishes_a_port_and_takes_it_back(host, web, who, spaces):
    client = spaces[2]
    with network.veth(host, "wan0", client, "eth0"):
        host.run(["ip", "address", "add", "192.0.2.1/24", "dev", "wan0"])
        client.run(["ip", "address", "add", "192.0.2.2/24", "dev", "eth0"])
        host.sysctl("net.ipv4.ip_forward", 1)
        with cni.attached(host, listed(PLUGIN, PORTMAP), who, PORTS), firewall.answering(web, 80):
            said = client.run(["curl", "-s", "-m", "20", "http://192.0.2.1:8081/"])
            assert said == "labs-web sees 192.0.2.2\n"
        assert not [rule for rule in firewall.rules(host) if "10.43.0" in rule.text]
    assert (names(web), leases()) == (["lo"], [])


def test_a_chain_that_breaks_is_taken_back(host, web, who):
    caller = cni.Caller(host, listed({**PLUGIN, "type": "bridge"}, {"type": "nobody"}))
    with pytest.raises(errors.ChildFailed, match="find plugin nobody"):
        caller.add(who)
    assert caller.results == {}
    assert names(web) == ["lo"]


def test_the_words_of_a_plugin_reach_the_caller(host, who):
    with pytest.raises(cni.PluginFailed, match=r"bridge ADD: .*CNI_IFNAME.* \(code 4\)") as caught:
        cni.Caller(host, listed({**PLUGIN, "type": "bridge"})).add(who._replace(ifname=""))
    assert caught.value.code == 4


def test_a_program_that_is_no_plugin(host, who, tmp_path):
    for name, body in (("chatty", "echo hello"), ("mute", "echo broken >&2; exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(errors.ChildFailed, match="chatty ADD: no JSON"):
        cni.Caller(host, listed({"type": "chatty"}), path=[str(tmp_path)]).add(who)
    with pytest.raises(cni.PluginFailed, match="mute ADD: broken"):
        cni.Caller(host, listed({"type": "mute"}), path=[str(tmp_path)]).add(who)


def test_what_was_not_added_cannot_be_checked(host, who):
    with pytest.raises(errors.BadInput, match="has not been added"):
        cni.Caller(host, listed(PLUGIN)).check(who)


@pytest.mark.machine
def test_containerd_calls_it(host, tmp_path):
    (tmp_path / "10-labs.conflist").write_text(json.dumps(listed(PLUGIN)))
    root = shutil.copytree(machine.rootfs("busybox"), tmp_path / "root", symlinks=True)  # ctr makes its mount points
    script = f"""mount --bind {tmp_path} /etc/cni/net.d
mount -t overlay -o lowerdir={cni.OURS}:{cni.PLUGINS} overlay {cni.PLUGINS}
mkdir -p /var/lib/cni; mount -t tmpfs tmpfs /var/lib/cni
ctr run --rm --rootfs --read-only --cni --cgroup /labs/labs-cni {root} labs-cni \\
  /bin/busybox ip -o -4 addr show eth0"""
    said = host.run(["unshare", "-m", "sh", "-ec", script], timeout=120)
    assert " 10.43.0.2/24 " in said
    assert (names(host), leases()) == (["lo", "cni0"], [])
