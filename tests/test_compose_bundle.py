"""A service and its image as config.json; what comes of it in a container is seen in test_compose_run."""

import pytest

from labs import compose_bundle, errors, machine, oci_config

IMAGE = {"Cmd": ["serve"], "Entrypoint": ["/run"], "Env": ["A=image", "PATH=/bin"], "User": "nobody",
         "WorkingDir": "/srv"}
ROOT = machine.rootfs("busybox")


def made(service, image=IMAGE, **more):
    return compose_bundle.configuration(service, image, name="shop-a-1", rootfs=ROOT, netns="/proc/1/ns/net", **more)


@pytest.mark.parametrize(("service", "words"), [
    ({}, ["/run", "serve"]), ({"command": ["x"]}, ["/run", "x"]), ({"entrypoint": ["/e"]}, ["/e"]),
    ({"entrypoint": ["/e"], "command": ["x"]}, ["/e", "x"]), ({"entrypoint": [], "command": ["x"]}, ["x"]),
    ({"command": None, "entrypoint": None}, ["/run", "serve"])])
def test_words(service, words):
    assert compose_bundle.command(service, IMAGE) == words


def test_the_service_stands_over_the_image():
    config = made({"environment": {"A": "mine", "B": "", "C": None}, "working_dir": "/tmp", "user": "5:6",
                   "hostname": "kyoto", "read_only": True})
    assert config["process"]["env"] == ["PATH=/bin", "A=mine", "B=", "HOME=/"]
    assert (config["process"]["cwd"], config["hostname"], config["root"]["readonly"]) == ("/tmp", "kyoto", True)
    assert config["process"]["user"] == {"uid": 5, "gid": 6, "additionalGids": []}
    assert made({})["process"]["user"]["uid"] == 65534
    assert made({})["process"]["cwd"] == "/srv"


def test_the_runtime_takes_it():
    oci_config.load(made({"mem_limit": "1048576", "cap_add": ["NET_ADMIN"], "sysctls": {"net.core.somaxconn": "5"}}))


def test_a_user_without_a_name_in_the_image_is_refused():
    with pytest.raises(errors.BadInput, match="user: 'nemo': no such user"):
        made({"user": "nemo"})


@pytest.mark.parametrize(("service", "found"), [
    ({"mem_limit": "1048576", "cpus": 0.5, "pids_limit": 9},
     {"memory": {"limit": 1 << 20}, "cpu": {"quota": 50_000, "period": 100_000}, "pids": {"limit": 9}}),
    ({"deploy": {"resources": {"limits": {"memory": "2097152", "cpus": 1.5, "pids": 3}}}},
     {"memory": {"limit": 2 << 20}, "cpu": {"quota": 150_000, "period": 100_000}, "pids": {"limit": 3}}), ({}, {})])
def test_limits(service, found):
    assert compose_bundle.resources(service) == {"devices": [{"allow": False, "access": "rwm"}]} | found


@pytest.mark.parametrize(("service", "held"), [
    ({}, set(compose_bundle.CAPABILITIES)), ({"cap_drop": ["ALL"]}, set()),
    ({"cap_drop": ["ALL"], "cap_add": ["net_admin"]}, {"CAP_NET_ADMIN"}),
    ({"cap_drop": ["CAP_CHOWN"]}, set(compose_bundle.CAPABILITIES) - {"CAP_CHOWN"})])
def test_capabilities(service, held):
    assert set(compose_bundle.capabilities(service)) == held
    sets = made(service, {})["process"]["capabilities"]
    assert set(sets["bounding"]) == set(sets["effective"]) == held
    assert made(service)["process"]["capabilities"]["effective"] == []  # a user that is not root


def test_a_mount_below_another_comes_after_it():
    binds = [compose_bundle.bind("/a", "/run/secrets/key", readonly=True), compose_bundle.bind("/b", "/data")]
    places = [one["destination"] for one in made({"tmpfs": ["/run"]}, mounts=binds)["mounts"]]
    assert places.index("/run") < places.index("/run/secrets/key")
    assert binds[0]["options"] == ["rbind", "rprivate", "ro"]


def test_hosts():
    text = compose_bundle.hosts("box", ["10.0.0.2", "10.1.0.2"], ["far=192.0.2.1", "six=[::1]"])
    assert text == "127.0.0.1\tlocalhost\n10.0.0.2\tbox\n10.1.0.2\tbox\n192.0.2.1\tfar\n::1\tsix\n"
