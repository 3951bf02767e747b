"""Short forms one by one; whole services are held against docker compose in test_compose_file."""

import pytest

from labs import compose_forms


@pytest.mark.parametrize(("text", "nanoseconds", "go"), [
    ("1m30s", 90 * 10**9, "1m30s"), ("90s", 90 * 10**9, "1m30s"), ("1500ms", 1500 * 10**6, "1.5s"), ("0", 0, "0s"),
    ("1h", 3600 * 10**9, "1h0m0s"), ("1d", 86400 * 10**9, "24h0m0s"),
    ("250us", 250_000, "250µs"), ("2.5s", 25 * 10**8, "2.5s")])
def test_durations(text, nanoseconds, go):
    assert compose_forms.nanoseconds(text) == nanoseconds
    assert compose_forms.duration(text) == go
    assert compose_forms.seconds(text) == nanoseconds / 10**9


@pytest.mark.parametrize(("value", "size"), [
    (1024, "1024"), ("64m", "67108864"), ("1.5g", "1610612736"), ("16KB", "16384"), ("3b", "3"), ("1t", str(2**40))])
def test_sizes(value, size):
    assert compose_forms.size(value) == size


@pytest.mark.parametrize(("call", "value"), [
    (compose_forms.nanoseconds, "soon"), (compose_forms.nanoseconds, "5"), (compose_forms.size, "much"),
    (compose_forms.ports, "80:"), (compose_forms.ports, "0:80"), (compose_forms.ports, "90-80:80"),
    (compose_forms.command, "it's"), (compose_forms.healthcheck, {"test": ["curl"]})])
def test_refused(call, value):
    with pytest.raises(compose_forms.BadForm):
        call(value)


def test_one_of_a_range_is_left_to_the_engine():
    [port] = compose_forms.ports("7000-7010:77/udp")
    assert port == {"mode": "ingress", "target": 77, "published": "7000-7010", "protocol": "udp"}
    assert [one["published"] for one in compose_forms.ports("[::1]:81-82:91-92")] == ["81", "82"]


def test_names_without_a_value():
    assert compose_forms.mapping(["A=1", "B", "C="]) == {"A": "1", "B": None, "C": ""}
    assert compose_forms.mapping({"A": True, "B": None}, missing="") == {"A": "true", "B": ""}
