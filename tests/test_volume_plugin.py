"""labs.volume_plugin: asked by curl, and used by Docker and Podman as their driver."""

import json
import os
import socket
import subprocess
import threading
from contextlib import contextmanager

import pytest

from labs import machine, storage, volume_plugin
from labs.errors import BadInput

SOCKET = f"{volume_plugin.SOCKETS}/labs-t.sock"


@pytest.fixture
def driver(tmp_path):
    with volume_plugin.serve(storage.Volumes(str(tmp_path / "store")), "labs-t") as driver:
        yield driver


def post(method, body="{}"):
    """What curl gets: the HTTP status and the answer."""
    done = subprocess.run(["curl", "-sS", "--unix-socket", SOCKET, "-X", "POST", "--data", body, "-w", "\n%{http_code}",
                           f"http://plugin/{method}"], capture_output=True, text=True, check=True)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(text)


def ask(method, **request):
    return post(f"VolumeDriver.{method}", json.dumps(request))


def test_the_handshake(driver):
    assert post("Plugin.Activate", "") == (200, {"Implements": ["VolumeDriver"]})
    assert ask("Capabilities") == (200, {"Capabilities": {"Scope": "local"}, "Err": ""})


def test_the_life_of_a_volume(driver):
    assert ask("Create", Name="data") == (200, {"Err": ""})
    path = driver.volumes.get("data").path
    assert ask("Path", Name="data") == (200, {"Mountpoint": path, "Err": ""})
    assert ask("Mount", Name="data", ID="a") == (200, {"Mountpoint": path, "Err": ""})
    status, refused = ask("Remove", Name="data")
    assert status == 500 and "is mounted for a" in refused["Err"] and os.path.isdir(path)
    assert ask("Unmount", Name="data", ID="a") == (200, {"Err": ""})
    (_, got), (_, listed) = ask("Get", Name="data"), ask("List")
    assert listed["Volumes"] == [got["Volume"]] and got["Volume"]["Mountpoint"] == path
    assert ask("Remove", Name="data") == (200, {"Err": ""})
    assert ask("List")[1]["Volumes"] == [] and not os.path.exists(path)
    assert driver.news()[:2] == ["Create", "Path"] and driver.news() == []


@pytest.mark.parametrize(("method", "body", "said"), [
    ("VolumeDriver.Get", '{"Name": "nothing"}', "no such volume"),
    ("VolumeDriver.Create", '{"Name": "../x"}', "must be letters"),
    ("VolumeDriver.Create", '{"Name": "data", "Opts": {"size": "1g"}}', "no options"),
    ("VolumeDriver.Create", "{}", "'Name' is not known"),
    ("VolumeDriver.Fly", "{}", "is not known"),
    ("VolumeDriver.List", "[1]", "no JSON object"),
    ("VolumeDriver.List", "{", "no JSON object")])
def test_what_is_refused(driver, method, body, said):
    status, answer = post(method, body)
    assert status == 500 and said in answer["Err"]
    assert driver.volumes.find() == []


def test_one_driver_a_name_and_a_dead_ones_socket_is_taken_over(driver, tmp_path):
    with pytest.raises(BadInput, match="has a driver already"), \
            volume_plugin.serve(storage.Volumes(str(tmp_path / "other")), "labs-t"):
        pass
    assert post("Plugin.Activate")[0] == 200
    dead = f"{volume_plugin.SOCKETS}/labs-dead.sock"
    subprocess.run(["python3", "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({dead!r})"], check=True)
    with volume_plugin.serve(driver.volumes, "labs-dead"):
        pass
    assert not os.path.exists(dead)


def out(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def podman_knows_it(tmp_path, monkeypatch):
    (tmp_path / "containers.conf").write_text(f'[engine.volume_plugins]\nlabs-t = "{SOCKET}"\n')
    monkeypatch.setenv("CONTAINERS_CONF_OVERRIDE", str(tmp_path / "containers.conf"))


def test_podman_keeps_its_volumes_there(driver, podman_knows_it):
    name = machine.new_name("v")
    out("podman", "volume", "create", "--driver=labs-t", name)
    try:
        assert [volume.name for volume in driver.volumes.find()] == [name]
        assert out("podman", "volume", "ls", "--noheading").split() == ["labs-t", name]
    finally:
        out("podman", "volume", "rm", name)
    assert driver.volumes.find() == [] and {"Plugin.Activate", "Create", "Remove"} <= set(driver.news())


def test_every_connection_is_closed_after_its_answer(driver):
    with socket.socket(socket.AF_UNIX) as engine:
        engine.settimeout(10)
        engine.connect(SOCKET)
        engine.sendall(b"POST /Plugin.Activate HTTP/1.1\r\nHost: plugin\r\nContent-Length: 0\r\n\r\n")
        assert b"".join(iter(lambda: engine.recv(4096), b"")).endswith(b'{"Implements": ["VolumeDriver"]}')


def test_no_thread_and_no_socket_outlives_it(tmp_path):
    threads = threading.active_count()
    with volume_plugin.serve(storage.Volumes(str(tmp_path / "store")), "labs-t"):
        assert post("Plugin.Activate")[0] == 200
    assert threading.active_count() == threads and not os.path.exists(SOCKET)


@pytest.fixture
def docker_forgets():
    """A driver that Docker has met and that has gone costs every listing of its volumes 15 seconds from then on."""
    yield
    subprocess.run(["systemctl", "restart", "docker"], check=True)


@contextmanager
def written_through(engine, driver):
    """A volume of the driver's that a container of an engine has written to, for the block; its name."""
    name = machine.new_name("v")
    out(engine, "volume", "create", "--driver=labs-t", name)
    try:
        out(engine, "run", "--rm", "--network=none", f"--volume={name}:/data", "busybox:lab",
            "sh", "-c", "echo hi > /data/word")
        with open(f"{driver.volumes.get(name).path}/word", encoding="utf-8") as file:
            assert file.read() == "hi\n"
        yield name
    finally:
        out(engine, "volume", "rm", name)
    assert driver.volumes.find() == []


@pytest.mark.machine
def test_docker_uses_it(docker_forgets, driver):
    with written_through("docker", driver) as name:
        assert driver.mounted[name] == set()
    asked = driver.news()
    assert asked.index("Create") < asked.index("Mount") < asked.index("Unmount") < asked.index("Remove")


@pytest.mark.machine
def test_podman_mounts_it(driver, podman_knows_it):
    with written_through("podman", driver):
        pass
    assert {"Mount", "Unmount"} <= set(driver.news())
