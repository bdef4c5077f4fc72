"""For which hosts the server answers, how a path may be written, and that a Location is the app's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import FakeModel
from fakes import PIXEL, FakeServer, Raw, has_ipv6, post, request
from flask.testing import FlaskClient

from keras_server.api import create_app
from keras_server.hosts import LOOPBACK, allows
from keras_server.settings import Settings, read_settings

LISTED = ("example.org", ".Example.com.", "only.example:8000", "10.1.2.3", "[2001:db8::1]:9000", "192.0.2.0/24")


def allowed_hosts(*texts: str) -> tuple[str, ...]:
    """Return them as they are read from the command line."""
    return read_settings([word for text in texts for word in ("--allowed-hosts", text)]).allowed_hosts


@pytest.mark.parametrize(
    "host",
    [
        "example.org", "EXAMPLE.org", "example.org.", "example.org:5000", "example.org:", "example.org.:5000",
        "example.com", "a.example.com", "a.b.EXAMPLE.com:1", "only.example:8000", "10.1.2.3", "10.1.2.3:5000",
        "[2001:db8::1]:9000", "[2001:0DB8:0:0::1]:9000", "192.0.2.77", "192.0.2.77:1", "[::ffff:192.0.2.77]", "",
    ],
)  # fmt: skip
def test_what_is_on_the_list_is_answered(host: str) -> None:
    assert allows(allowed_hosts(*LISTED), host)


@pytest.mark.parametrize(
    "host",
    [
        "a.example.org", "xexample.org", "example.org.evil.example", "example.org@evil.example",
        "evil.example#example.org",
        "xexample.com", "example.com.evil.example", "only.example", "only.example:80", "10.1.2.4",
        "10.1.2.3.evil.example",
        "[2001:db8::1]", "[2001:db8::2]:9000", "192.0.3.1", "localhost", "127.0.0.1", "evil.example", ".", "..",
        "example.org..", "a" * 30_000, "a." * 15_000, "." * 30_000, "[" + ":" * 30_000 + "]", "example.org:80:80",
        "example.org:x", "example.org:999999", "example.org,evil.example",
        "example.org evil.example", "example.org\t", "exam\xa0ple.org", "[example.org]", "[", "]", "[]", ":", "*", "@",
        "3221226061", "0xc000024d", "192.0.589", ".example.com", "/", "192.0.2.0/24",
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_is_not(host: str) -> None:
    assert not allows(allowed_hosts(*LISTED), host)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True), ("LocalHost:5000", True), ("localhost.", True), ("me.localhost", True), ("127.0.0.1",
        True),
        ("127.9.9.9:80", True), ("[::1]", True), ("[::1]:5000", True), ("[0:0:0:0:0:0:0:1]", True), ("", True),
        ("[::ffff:127.0.0.1]", True), ("rebind.evil.example", False), ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False), ("evillocalhost", False), ("0.0.0.0", False), ("[::]", False),
        ("192.168.1.5", False), ("128.0.0.1", False), ("[::2]", False), ("127.1", False), ("localhost.localdomain",
        False),
    ],
)  # fmt: skip
def test_this_machine_s_own_names(host: str, allowed: bool) -> None:
    assert allows(LOOPBACK, host) is allowed


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("10.9.9.9:8080", True), ("[fd00::7]:8080", True), ("localhost:8080", True), ("example.org", True), ("", True),
        ("evil.example", False), ("10.9.9.9.evil.example", False), ("localhost.evil.example", False),
    ],
)  # fmt: skip
def test_probes_come_by_the_machine_s_address(host: str, allowed: bool) -> None:
    """As Kubernetes, HAProxy and the load balancers of clouds send them."""
    assert allows(("example.org",), host, probe=True) is allowed


def test_the_list_is_read_from_the_environment_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_SERVER_ALLOWED_HOSTS", "Example.org, ::1,10.0.0.5/8,*")
    assert read_settings().allowed_hosts == ("example.org", "[::1]", "10.0.0.0/8", "*")


@pytest.mark.parametrize(
    "text", ["https://example.org", "a b", "", "*.example.org", "example.org:http", "a/8", "..a", "[x]"]
)
def test_what_is_no_host_is_said(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        allowed_hosts(text)
    assert end.value.code == 2
    assert "--allowed-hosts: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def listed() -> Iterator[FakeServer]:
    """A server for one name."""
    with FakeServer("--allowed-hosts", "api.example", any_host=False) as fake:
        yield fake


@pytest.fixture(scope="module")
def local() -> Iterator[FakeServer]:
    """A server as it is by default."""
    with FakeServer(any_host=False) as fake:
        yield fake


TARGETS = ["/", "/metrics", "/docs", "/predict", "/nothing", "/static/page.js", "/v2", "/readyz", "/healthz"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_name_that_leads_elsewhere_by_rights_is_refused_everywhere(local: FakeServer, target: str) -> None:
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        answer = local.ask(request(target, method, Host="rebind.evil.example:5000"))
        assert answer.status == 421
        if method != "HEAD":
            assert "--allowed-hosts" in answer.json["error"]
            assert b"rebind" not in answer.body
    assert local.ask(request(target, Host=f"localhost:{local.port}")).status in (200, 404, 405)


def test_the_log_says_which_name_was_refused_and_never_otherwise() -> None:
    with FakeServer(any_host=False) as fake:
        fake.ask(request("/metrics", Host="rebind.evil.example:5000"))
        fake.ask(request("http://other.example/metrics", Host="localhost"))
        fake.ask(request("/metrics", Host='a\xa0"b'))
        fake.ask(request("/nothing", Host="localhost"))
        lines = [line for line in fake.log.splitlines() if "path=" in line]
    assert [line.partition("host=")[2].strip() for line in lines] == [
        "rebind.evil.example:5000", "other.example", "a%A0%22b", "",
    ]  # fmt: skip


def test_a_body_for_another_name_is_not_read(local: FakeServer) -> None:
    with local.raw() as raw:
        raw.send(b"POST /predict HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1000000\r\n\r\n")
        answer = raw.expect(421)
        assert answer.headers["Connection"] == "close"


def test_pictures_are_answered_under_the_names_of_this_machine(local: FakeServer) -> None:
    for host in ("localhost", f"127.0.0.1:{local.port}", "[::1]:5000", "LOCALHOST."):
        assert local.ask(post(PIXEL, Host=host)).status == 200


def test_a_listed_name_is_answered_and_probes_by_any_address_too(listed: FakeServer) -> None:
    for target, host, status in [
        ("/metrics", "api.example", 200),
        ("/metrics", "API.example.:80", 200),
        ("/metrics", "10.0.0.5:5000", 421),
        ("/metrics", "localhost", 421),
        ("/healthz", "10.0.0.5:5000", 200),
        ("/readyz", "[fd00::1]:5000", 200),
        ("/v2/health/ready", "127.0.0.1", 200),
        ("/healthz", "evil.example", 421),
    ]:
        assert listed.ask(request(target, Host=host)).status == status, (target, host)


def test_a_request_without_a_host_is_answered(listed: FakeServer) -> None:
    """As HAProxy's checks are by default; a browser always says one."""
    for data in (b"GET /metrics HTTP/1.0\r\n\r\n", b"GET /metrics HTTP/1.1\r\nHost:\r\n\r\n"):
        assert listed.ask(data).status == 200


def test_the_target_comes_before_the_host(listed: FakeServer) -> None:
    """RFC 9112, 3.2.2."""
    for authority, host, status in [("api.example", "evil.example", 200), ("evil.example", "api.example", 421)]:
        head = f"GET http://{authority}/metrics HTTP/1.1\r\nHost: {host}\r\n\r\n"
        assert listed.ask(head.encode()).status == status


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_on_all_addresses_any_name_is_answered_unless_some_are_given() -> None:
    with FakeServer("--host", "::", any_host=False) as fake, Raw(fake.port, address="::1") as raw:
        raw.send(request("/metrics", Host="anything.example")).expect(200)


def test_under_another_server_the_app_itself_asks(client: FlaskClient, setting: Callable[..., None]) -> None:
    assert client.get("/metrics", headers={"Host": "evil.example"}).status_code == 200
    setting(allowed_hosts=("api.example",))
    answer = client.get("/metrics", headers={"Host": "evil.example"})
    assert answer.status_code == 421
    assert "--allowed-hosts" in answer.json["error"]
    assert client.get("/metrics", headers={"Host": "api.example"}).status_code == 200
    assert client.get("/healthz", headers={"Host": "10.0.0.5"}).status_code == 200
    assert client.get("/nothing", headers={"Host": "10.0.0.5"}).status_code == 421


# How a path may be written

SPELLINGS = [
    "//metrics", "///metrics", "/./metrics", "/../metrics", "/x/../metrics", "/%2e/metrics", "/%2E%2e/metrics",
    "/%2fmetrics",
    "/%2Fmetrics", "/metrics%2f", "/metrics/", "/metrics//", "/metrics/.", "/metrics;x", "/;/metrics", "/metrics%3fx",
    "/metrics%00", "/metrics%20", "/metrics%0a", "/METRICS", "/Metrics", "/%6detrics", "/%6D%65trics", "/metric%73",
    "/m%45trics",
    "/%4detrics", "/metrics%", "/metrics%2", "/%25%36detrics", "/%256detrics", "/metrics#x", "/\\metrics",
    "/%5cmetrics",
    "/%c0%afmetrics", "/%e2%81%84metrics", "//predict", "/%70redict", "//v2//health/live", "/v2%2fhealth/live",
    "/v2//health/live",
    "//static/page.js", "/static//page.js", "/static/./page.js", "/static/%2e/page.js", "/static%2fpage.js",
    "//healthz",
    "/%68ealthz", "/health%7a", "//",
]  # fmt: skip


@pytest.mark.parametrize("target", SPELLINGS)
@pytest.mark.parametrize("form", ["{}", "http://localhost{}"])
def test_a_path_has_one_spelling(local: FakeServer, target: str, form: str) -> None:
    answer = local.ask(request(form.format(target), Host="localhost"))
    assert answer.status == 404
    assert "Location" not in answer.headers


@pytest.mark.parametrize(
    "target",
    ["metrics", "metrics/", "./metrics", "ftp://localhost/metrics", "?/metrics", "http:/metrics", "http:///metrics"],
)
def test_a_target_that_is_no_path_is_refused(local: FakeServer, target: str) -> None:
    assert local.ask(request(target, Host="localhost")).status in (400, 404)


@pytest.mark.parametrize(
    "target", ["//metrics", "/./metrics", "/x/../metrics", "//v2//health/live", "/static/./page.js"]
)
def test_under_another_server_too(client: FlaskClient, target: str) -> None:
    answer = client.get("/", environ_overrides={"PATH_INFO": target})
    assert answer.status_code == 404
    assert answer.json["error"].startswith("There is nothing at ")


def test_what_clients_encode_needlessly_in_names_is_decoded(local: FakeServer) -> None:
    for target in ("/v2/models/a%20b", "/v2/models/%C3%A4", "/v2/models/a%7Eb", "/v2/models/a%5Fb"):
        answer = local.ask(request(target, Host="localhost"))
        assert answer.status == 404
        assert "There is no model" in answer.json["error"]
    assert local.ask(request("/v1/models/a%3Apredict", "POST", b"{}", Host="localhost")).status == 404
    assert local.ask(request("/v1/models/a%3Apredict", Host="localhost")).status == 405


def test_a_redirect_stays_on_the_server_whatever_the_client_calls_it(model: FakeModel) -> None:
    app = create_app(settings=Settings, model=lambda: model, prepare=lambda image, target: None)  # type: ignore[arg-type]

    @app.get("/mine/")
    def mine() -> dict[str, Any]:
        return {}

    for host in ("evil.example", "localhost"):
        answer = app.test_client().get("/mine?a=b", headers={"Host": host, "X-Forwarded-Host": "evil.example"})
        assert answer.status_code == 308
        assert answer.headers["Location"] == "/mine/?a=b"
