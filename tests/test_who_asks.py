"""Who asks, as the log has it: the client's address behind proxies, its trace; and the key of who scrapes."""

import re
from collections.abc import Callable

import pytest
from fakes import PIXEL, FakeServer, post, request, wait_until
from flask.testing import FlaskClient

from keras_server.clients import client_address, trace_of
from keras_server.settings import read_settings

INSIDE = ("10.0.0.0/8", "127.0.0.1/32", "fd00::/8")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"  # the recommendation's example


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("10.0.0.1", "203.0.113.7, 10.2.3.4", "203.0.113.7"),
        ("10.0.0.1", "198.51.100.1, 203.0.113.7, 10.2.3.4", "203.0.113.7"),  # the first says what it likes
        ("10.0.0.1", "10.9.9.9,10.2.3.4", "10.9.9.9"),  # all are proxies, or within
        ("203.0.113.7", "198.51.100.1", "203.0.113.7"),  # a stranger's word
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.7,", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.7, unknown", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.7, _hidden, 10.2.3.4", "10.2.3.4"),
        ("10.0.0.1", "203.0.113.7:51234", "203.0.113.7"),
        ("10.0.0.1", "[2001:db8::1]:443", "2001:db8::1"),
        ("10.0.0.1", '"[2001:DB8::1]"', "2001:db8::1"),
        ("fd00::5", "2001:db8::1", "2001:db8::1"),
        ("::ffff:10.0.0.1", "203.0.113.7", "203.0.113.7"),  # as --host :: sees an address of IPv4
        ("::ffff:203.0.113.7", "", "203.0.113.7"),
        ("10.0.0.1", "fe80::1%a id=forged", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.7\tid=forged", "10.0.0.1"),
        ("10.0.0.1", "010.0.0.1", "10.0.0.1"),
        ("10.0.0.1", ", ".join(["203.0.113.7", *["10.0.0.2"] * 15]), "203.0.113.7"),
        ("10.0.0.1", ", ".join(["203.0.113.7", *["10.0.0.2"] * 16]), "10.0.0.2"),
        ("", "203.0.113.7", ""),
        ("a name", "203.0.113.7", "a name"),
    ],
)
def test_proxies_are_believed_as_far_as_they_are_trusted(peer: str, forwarded: str, client: str) -> None:
    assert client_address(peer, forwarded, INSIDE) == client


def test_without_trusted_proxies_none_is_believed() -> None:
    assert client_address("10.0.0.1", "203.0.113.7", ()) == "10.0.0.1"


@pytest.mark.parametrize(
    ("header", "known"),
    [
        (TRACE, TRACE),
        (TRACE.replace("-01", "-ff"), TRACE.replace("-01", "-ff")),
        ("cc" + TRACE[2:] + "-more", "cc" + TRACE[2:]),  # of a later version what is known
        ("cc" + TRACE[2:], "cc" + TRACE[2:]),
        ("cc" + TRACE[2:] + "more", ""),
        (TRACE + "-more", ""),
        ("ff" + TRACE[2:], ""),
        (TRACE.upper(), ""),
        (TRACE[:-1], ""),
        (TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32), ""),
        (TRACE.replace("00f067aa0ba902b7", "0" * 16), ""),
        (TRACE.replace("-", "_"), ""),
        (f"{TRACE},{TRACE}", ""),  # sent twice
        (f"{TRACE}\n", ""),
        (" " + TRACE, ""),
        ("", ""),
    ],
)
def test_a_trace_is_taken_over_where_it_is_well_formed(header: str, known: str) -> None:
    assert trace_of(header) == known


def test_the_log_says_who_asked() -> None:
    """Whoever answers: the app, or the front; and probes only where they are asked for."""
    with FakeServer("--trusted-proxies", "127.0.0.0/8", "--max-upload-mb", "0.1") as fake:
        name = {"X_Forwarded_For": "203.0.113.7", "traceparent": TRACE}
        for data, status in ((post(PIXEL, **name), 200), (post(bytes(200_000), **name), 413)):
            identity = fake.ask(data)
            assert identity.status == status
            found = wait_until(lambda i=identity: re.search(rf".* id={i.headers['X-Request-ID']}.*", fake.log))[0]
            time, level, rest = found.split(" ", 2)
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", time)
            assert level == "INFO"
            assert f"status={status} " in rest
            assert " client=203.0.113.7 " in rest
            assert rest.endswith(f" traceparent={TRACE}")
        for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
            assert fake.ask(request(path)).status == 200
        fake.ask(request("/last", traceparent="no trace"))
        last = wait_until(lambda: re.search(r".*path=/last .*", fake.log))[0]
        assert "traceparent" not in last
        assert "client=127.0.0.1 " in last
        assert "health" not in fake.log
        assert "readyz" not in fake.log


@pytest.mark.parametrize("text", ["10.0.0.0/33", "here", "10.0.0.1-10.0.0.9", "10.0.0.1 10.0.0.2"])
def test_what_is_no_network_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--trusted-proxies", text])
    assert capsys.readouterr().err.startswith(f"error: --trusted-proxies: {text!r} is no address and no network")


def test_networks_are_read_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_SERVER_TRUSTED_PROXIES", "10.1.2.3/8, 127.0.0.1,FD00::/8")
    assert read_settings().trusted_proxies == INSIDE


# The key of who scrapes


def statuses(client: FlaskClient, key: str) -> list[int]:
    """Return how /metrics, a page with a key, and one without answer to a key."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return [client.get(path, headers=headers).status_code for path in ("/metrics", "/v2", "/healthz")]


def test_a_key_of_its_own_opens_the_metrics_and_nothing_else(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(api_key=("secret",), metrics_key="scrape")
    assert statuses(client, "scrape") == [200, 401, 200]
    assert statuses(client, "secret") == [200, 200, 200]
    assert statuses(client, "") == statuses(client, "other") == [401, 401, 200]
    setting(api_key=("secret",), metrics_key="")
    assert statuses(client, "scrape") == [401, 401, 200]
    setting(api_key=(), metrics_key="scrape")  # which shuts the metrics alone
    assert statuses(client, "scrape") == [200, 200, 200]
    assert statuses(client, "") == [401, 200, 200]


def test_the_document_says_which_routes_ask_for_a_key(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(metrics_key="scrape")
    paths = client.get("/openapi.json").json["paths"]
    assert paths["/metrics"]["get"]["security"] == [{"key": []}]
    assert "security" not in paths["/predict"]["post"]


@pytest.mark.parametrize("key", ["", " ", "schlüssel", "one\ttwo"])
def test_an_empty_one_opens_no_door(
    key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--metrics-key", key])
    assert capsys.readouterr().err.startswith("error: --metrics-key: a key ")
    monkeypatch.setenv("KERAS_SERVER_METRICS_KEY", key)
    with pytest.raises(SystemExit):
        read_settings()
    assert capsys.readouterr().err.startswith("error: KERAS_SERVER_METRICS_KEY: a key ")
    assert read_settings(["--metrics-key", "good"]).metrics_key == "good"
