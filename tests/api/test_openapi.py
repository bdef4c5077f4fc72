"""The OpenAPI document: true of every route, every status and every model; and its page."""

import ast
import base64
import importlib
import io
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
import tiny_models
from conftest import ROOT, FakeModel, encode, serve_with
from fakes import FakeServer, request
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.datastructures import MultiDict
from werkzeug.test import TestResponse

import run_keras_server as server
from keras_server import __version__
from keras_server.api import docs as openapi
from keras_server.api import probes
from keras_server.models.spec import Tensor

MODELS = ["bundled", "digits", "tabular", "tokens", "half_plus_two", "mixed"]


@pytest.fixture(params=MODELS)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    """The test client, with one model after the other behind it."""
    if request.param != "bundled":
        return tiny_models.serve(monkeypatch, request.param)
    monkeypatch.setattr(server, "model", FakeModel())
    return server.app.test_client()


def document(client: FlaskClient) -> dict[str, Any]:
    found = client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json
    assert found
    return found


def operations(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the operations by path and method."""
    return {
        (path, method): operation
        for path, item in found["paths"].items()
        for method, operation in item.items()
        if method in ("get", "post")
    }


def references(value: Any) -> set[str]:
    """Return what a document refers to."""
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_route_is_there_and_no_other(client: FlaskClient) -> None:
    expected = {
        (openapi.path_of(rule.rule), method.lower())
        for rule in server.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert operations(document(client)).keys() == expected


@pytest.mark.parametrize(("route", "own"), [("/predict", {"top"}), ("/explain", {"label"})])
def test_the_model_is_named_in_the_query_or_in_the_path(client: FlaskClient, route: str, own: set[str]) -> None:
    found = document(client)["paths"]
    where = {
        path: {(each["name"], each["in"]) for each in found[path]["post"]["parameters"]}
        for path in (route, f"/models/{{name}}{route}")
    }
    others = {(name, "query") for name in own}
    assert where == {route: others | {("model", "query")}, f"/models/{{name}}{route}": others | {("name", "path")}}


PARTS = [
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in ("front", "api", "explain")
    for path in (ROOT / "keras_server" / folder).rglob("*.py")
]


def test_every_status_of_the_sources_is_there(client: FlaskClient) -> None:
    """What is raised, aborted or returned with, anywhere in the server."""
    statuses: set[Any] = set()
    for name in ("run_keras_server", *PARTS):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in ("abort", "Refusal", "plain") and node.args and isinstance(node.args[0], ast.Constant):
                    statuses.add(node.args[0].value)
            elif isinstance(node, ast.Tuple):  # as in: return {"error": ...}, 404
                statuses |= {element.value for element in node.elts if isinstance(element, ast.Constant)}
    statuses = {status for status in statuses if type(status) is int and 400 <= status < 600}
    assert {400, 404, 413, 415, 503} <= statuses  # or the search is no good
    found = document(client)
    described = {int(status) for operation in operations(found).values() for status in operation["responses"]}
    # 405 is of no operation, but of those that are not there; nobody is left to read 499.
    assert statuses - {405, 499} <= described
    assert {int(name[-3:]) for name in found["components"]["responses"]} == openapi.ERRORS.keys()


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("post", "/predict", {"data": b"x", "content_type": "image/png"}, 400),
        ("post", "/predict", {"data": b"x", "content_type": "text/plain"}, 415),
        ("post", "/predict", {"data": bytes(100_000), "content_type": "image/png"}, 413),
        ("get", "/v2/models/hat", {}, 404),
        ("get", "/static/hat", {}, 404),
        ("get", "/v1/models", {}, 401),
        ("post", "/v2/models/resnet50/infer", {"data": b"x"}, 400),
        ("post", "/v2/models/resnet50/infer", {"data": b"x", "headers": {"Content-Encoding": "br"}}, 415),
        ("post", "/v1/models/resnet50:predict", {"json": {"instances": []}}, 503),
        ("get", "/readyz", {}, 503),
    ],
)
def test_errors_are_as_described(
    client: FlaskClient,
    setting: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    options: dict[str, Any],
    status: int,
) -> None:
    setting(max_upload_mb=0.05, api_key=("secret",) if status == 401 else [])
    described = document(client)
    if status == 503:
        monkeypatch.setattr(server, "model", None)
    answer = client.open(path, method=method, **options)
    assert answer.status_code == status
    patterns = {re.sub(r"{\w+}", "[^/:]+", template): template for template in described["paths"]}
    template = next(found for pattern, found in patterns.items() if re.fullmatch(pattern, path))
    reference = described["paths"][template][method]["responses"][str(status)]["$ref"]
    response = described["components"]["responses"][reference.rpartition("/")[2]]
    (content,) = response["content"].values()
    schema = described["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    assert answer.json
    assert answer.json.keys() == set(schema["required"])
    for name, header in response["headers"].items():
        assert answer.headers[name] == header["schema"].get("const", answer.headers[name])


def test_it_is_whole_for_every_model(served: FlaskClient) -> None:
    found = document(served)
    for reference in references(found):
        value = found
        for key in reference.removeprefix("#/").split("/"):
            value = value[key]
    ids = [operation["operationId"] for operation in operations(found).values()]
    assert len(ids) == len(set(ids))
    tags = {tag["name"] for tag in found["tags"]}
    for (path, _), operation in operations(found).items():
        assert set(operation["tags"]) <= tags
        assert {p["name"] for p in operation["parameters"] if p["in"] == "path"} == set(re.findall(r"{(\w+)}", path))
    assert found["info"]["version"] == __version__


def test_models_without_pictures_have_no_routes_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = document(tiny_models.serve(monkeypatch, "tabular"))
    assert found["paths"]["/predict"].keys() == {"description"}


def test_limits_are_those_of_the_settings(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(max_upload_mb=3, queue_size=7, max_megapixels=11, top=4, api_key=("secret",))
    found = document(client)
    text = json.dumps(found)
    assert "3 MiB" in text
    assert "11 million pixels" in text
    upload = found["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert upload == {"$ref": "#/components/schemas/ImagesForm"}
    assert found["components"]["schemas"]["ImagesForm"]["properties"]["image"]["maxItems"] == 7
    assert found["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert found["paths"]["/predict"]["post"]["security"] == [{"key": []}]
    setting(api_key=())
    assert "security" not in json.dumps(document(client)).replace("securitySchemes", "")


def without_examples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_examples(v) for k, v in value.items() if k not in ("example", "x-codeSamples")}
    return [*map(without_examples, value)] if isinstance(value, list) else value


def test_it_does_not_grow_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the model's name and the examples all models that take pictures have one document, and all others."""
    for first, second in (("digits", "photos"), ("tabular", "mixed")):
        documents = [document(tiny_models.serve(monkeypatch, name)) for name in (first, second)]
        texts = [
            json.dumps(without_examples(found)).replace(name, "NAME")
            for found, name in zip(documents, (first, second), strict=True)
        ]
        assert texts[0] == texts[1]
        assert all(len(json.dumps(found)) < 80_000 for found in documents)


def send(client: FlaskClient, line: str, dog: bytes) -> TestResponse:
    """Do what a line of curl does."""
    words, options = iter(shlex.split(line)), dict[str, Any]()
    assert next(words) == "curl"
    url = ""
    for word in words:
        if word == "-F":
            assert next(words) == "image=@dog.jpg"
            options = {"method": "POST", "data": {"image": (io.BytesIO(dog), "dog.jpg")}}
        elif word == "-d":
            form = "application/x-www-form-urlencoded"  # which curl says, where nothing else is said
            options = {"method": "POST", "data": next(words), "content_type": form}
        elif word == "-X":
            options = {"method": next(words)}
        elif word == "-o":
            next(words)
        elif word != "-O":
            url = word
    assert url.startswith("http://localhost:5000/")
    return client.open(url.removeprefix("http://localhost:5000"), **options)


def test_examples_can_be_sent_and_are_answered_as_described(served: FlaskClient, dog: bytes) -> None:
    described = document(served)
    for (path, method), operation in operations(described).items():
        bodies = [operation["responses"]["200"], operation.get("requestBody", {"content": {}})]
        for body in bodies:
            if content := body["content"].get("application/json"):
                schema = jsonschema.Draft202012Validator(content["schema"] | {"components": described["components"]})
                if "Document" not in content["schema"]["$ref"]:
                    schema.validate(content["example"])
        (sample,) = operation["x-codeSamples"]
        answer = send(served, sample["source"], dog)
        not_here = {"/v2/repository/models/{name}/load": 403, "/v2/repository/models/{name}/unload": 403}
        if isinstance(server.model, FakeModel):  # which has no layers to look into
            not_here |= {"/explain": 422, "/models/{name}/explain": 422}
        if "{label}" in path or path in not_here:
            assert answer.status_code == not_here.get(path, 404)
            assert str(answer.status_code) in operation["responses"]
            continue
        assert answer.status_code == 200, (path, method, answer.text)
        answers = bodies[0]["content"]
        assert answer.mimetype in answers or "*/*" in answers
        if answer.mimetype == "application/json":
            jsonschema.Draft202012Validator(
                answers["application/json"]["schema"] | {"components": described["components"]}
            ).validate(answer.json)


def test_examples_name_the_path_and_the_key(setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve_with(monkeypatch, name="my model's")
    setting(api_key=("secret",), port=8080)
    found = operations(document(client))
    key = 'curl -H "Authorization: Bearer $KEY" '
    assert found["/v1/models/{name}", "get"]["x-codeSamples"][0]["source"] == (
        key + "http://localhost:8080/v1/models/my%20model%27s"
    )
    assert found["/healthz", "get"]["x-codeSamples"][0]["source"] == "curl http://localhost:8080/healthz"
    assert "secret" not in json.dumps(document(client))


@pytest.mark.parametrize(("length", "shown"), [(512, True), (513, False)])
def test_long_rows_are_not_written_out(length: int, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve_with(monkeypatch, inputs=(Tensor("wave", (length,), "float32"),))
    body = operations(document(client))["/v2/models/{name}/infer", "post"]["requestBody"]["content"]
    (tensor,) = body["application/json"]["example"]["inputs"]
    assert (tensor["name"], tensor["shape"]) == (("wave", [1, 512]) if shown else ("measures", [1, 4]))


def test_the_documents_need_no_key_and_then_tell_nothing_of_the_tensors(
    setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape, told in (((3,), False), ((8, 8, 3), False), ((3,), True), ((8, 8, 3), True)):
        client = serve_with(monkeypatch, inputs=(Tensor("salary", shape, "float32"),), labels=("hired", "fired"))
        setting(api_key=() if told else ("secret",))
        for path in ("/openapi.json", "/docs"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert ("salary" in answer.text) is told
            assert "hired" not in answer.text


def test_which_routes_need_the_key_is_the_same_in_front_app_and_document(
    client: FlaskClient, setting: Callable[..., None]
) -> None:
    """Those of the probes need none, which no kubelet has."""
    setting(api_key=("secret",))
    described = operations(document(client))
    with FakeServer("--api-key", "secret") as fake:
        for (path, method), operation in described.items():
            target = re.sub("{[a-z]+}", "x", path)
            free = path in probes(server.app) or target in ("/", "/docs", "/openapi.json", "/static/x")
            assert (client.open(target, method=method).status_code == 401) is not free, path
            assert (fake.ask(request(target, method.upper(), b"")).status == 401) is not free, path
            assert ("security" in operation) is not free, path
            assert ("401" in operation["responses"]) is not free, path
    assert ("/v2/health/ready", "get") in described


def test_why_a_model_is_not_predicted_tells_strangers_nothing(
    setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve_with(monkeypatch, kind="none", reason="Its output salary is no list of classes.")
    assert "salary" in document(client)["paths"]["/predict"]["description"]
    setting(api_key=("secret",))
    assert "salary" not in client.get("/openapi.json").text
    assert document(client)["paths"]["/predict"]["description"].startswith("Each request is answered 400 here")


def test_a_generated_client_predicts(
    client: FlaskClient, dog: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openapi-python-client's, which leaves out what it cannot read."""
    (tmp_path / "openapi.json").write_text(json.dumps(document(client)))
    (tmp_path / "config.json").write_text('{"post_hooks": []}')
    options = ("--path", "openapi.json", "--output-path", "generated", "--meta", "none", "--config", "config.json")
    done = subprocess.run(
        [sys.executable, "-m", "openapi_python_client", "generate", *options],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    problems = {
        line for line in done.stdout.splitlines() if re.match("Unsupported|Cannot|Invalid|Missing|Unable", line)
    }
    # The wildcards are of raw bodies, which application/octet-stream sends as well, and of the pages' files.
    assert all("image/*" in line or "*/*" in line for line in problems), problems
    monkeypatch.syspath_prepend(tmp_path)
    generated = importlib.import_module("generated")
    models, types = importlib.import_module("generated.models"), importlib.import_module("generated.types")
    predict = importlib.import_module("generated.api.images.post_predict").sync
    infer = importlib.import_module("generated.api.open_inference_protocol.post_v2_models_name_infer").sync
    caller = generated.Client("http://test", httpx_args={"transport": httpx.WSGITransport(app=server.app)})
    file = types.File(io.BytesIO(dog), "dog.jpg", "image/jpeg")
    for body in (models.ImagesForm([file]), types.File(io.BytesIO(dog))):
        answer = predict(client=caller, body=body, top=2)
        assert answer.model == "resnet50"
        assert answer.predictions[0].label == "German_shepherd"
        assert len(answer.predictions) == 2
    answer = predict(client=caller, body=models.ImagesForm([types.File(io.BytesIO(dog), name) for name in "ab"]))
    assert [result.predictions[0].label for result in answer.results] == 2 * ["German_shepherd"]
    assert "not an image" in predict(client=caller, body=types.File(io.BytesIO(b"none"))).error
    encoded = base64.b64encode(dog).decode()
    tensor = models.InferInput("image", [1], models.Datatype.BYTES, data=[encoded])
    (output,) = infer("resnet50", client=caller, body=models.InferRequest([tensor])).outputs
    assert output.data.index(max(output.data)) == 235


def test_generators_can_read_it(client: FlaskClient) -> None:
    """No schema is true or false, none has a choice without a name, no list of values is long, and forms stand alone.

    openapi-generator's clients in Java, Python and Go take a form apart into parameters, and call it JSON wherever a
    body may be JSON as well; and they ask for JSON wherever an answer may be that, so it has to be what they return.
    """

    def look(value: Any, path: str) -> None:
        if isinstance(value, dict):
            assert not {"anyOf", "oneOf", "allOf", "prefixItems"} & value.keys(), path
            assert len(value.get("enum", ())) <= 20, path
            assert not isinstance(value.get("const"), bool), path  # which some compare with the text "true"
            for key, schema in value.get("properties", {}).items() if isinstance(value.get("properties"), dict) else ():
                assert isinstance(schema, dict), f"{path}/{key}"
            for key, inner in value.items():
                look(inner, f"{path}/{key}")
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                look(inner, f"{path}/{number}")

    look(document(client), "")
    for key, operation in operations(document(client)).items():
        kinds = [*operation.get("requestBody", {"content": {}})["content"]]
        assert "multipart/form-data" not in kinds or (
            kinds[0] == "multipart/form-data" and "application/json" not in kinds
        )
        answers = [*operation["responses"]["200"]["content"]]
        assert "application/json" not in answers[1:], key


@pytest.mark.parametrize("name", ["digits", "tabular", "tokens", "mixed"])
def test_answers_are_as_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tiny_models.serve(monkeypatch, name)
    described = document(client)
    checker = jsonschema.Draft202012Validator

    def check(path: str, method: str, template: str, **options: Any) -> None:
        answer = client.open(path, method=method, **options)
        assert answer.status_code == 200, answer.text
        schema = described["paths"][template][method.lower()]["responses"]["200"]["content"]["application/json"][
            "schema"
        ]
        checker(schema | {"components": described["components"]}).validate(answer.json)

    inputs = []
    for tensor in client.get(f"/v2/models/{name}").json["inputs"]:  # type: ignore[index]
        shape = [2, *(3 if size == -1 else size for size in tensor["shape"][1:])]
        value = True if tensor["datatype"] == "BOOL" else 1
        inputs.append(
            {"name": tensor["name"], "shape": shape, "datatype": tensor["datatype"], "data": [value] * math.prod(shape)}
        )
    check(f"/v2/models/{name}/infer", "POST", "/v2/models/{name}/infer", json={"inputs": inputs})
    rows = {item["name"]: np.reshape(item["data"], item["shape"]).tolist() for item in inputs}
    check(f"/v1/models/{name}:predict", "POST", "/v1/models/{name}:predict", json={"inputs": rows})
    for path in (
        "/v1/models",
        "/v1/models/{name}",
        "/v1/models/{name}/metadata",
        "/v2",
        "/v2/models/{name}",
        "/readyz",
    ):
        check(path.replace("{name}", name), "GET", path)
    if name == "digits":
        picture = encode(Image.linear_gradient("L"))
        check("/predict?top=2", "POST", "/predict", data=picture, content_type="image/png")
        both = MultiDict([("image", (io.BytesIO(data), "x.png")) for data in (picture, b"none")])
        check("/predict", "POST", "/predict", data=both)
        check(
            "/explain",
            "POST",
            "/explain",
            data=picture,
            content_type="image/png",
            headers={"Accept": "application/json"},
        )


class Page(HTMLParser):
    """What a page refers to, and what it has."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids |= {value for name, value in attrs if name == "id" and value}
        self.links |= {value for name, value in attrs if name in ("href", "src") and value}


def test_the_page_shows_every_route_with_nothing_from_elsewhere(served: FlaskClient) -> None:
    text = served.get("/docs").text
    page = Page(text)
    for (path, method), operation in operations(document(served)).items():
        assert path in text
        if not re.search(r"{version}|{label}|^/models/", path):  # at which routes are also had
            assert operation["operationId"] in page.ids, (path, method)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif link.startswith("static/"):
            assert (ROOT / "keras_server" / "api" / link).is_file()
        else:
            assert link == "openapi.json"
    assert "script" not in page.tags  # as the content security policy has it
    assert "style" not in page.tags
    assert not {name for name in page.attributes if name == "style" or name.startswith("on")}


def test_names_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve_with(monkeypatch, name='"><script>x</script>')
    assert "<script>" not in client.get("/docs").text
    assert document(client)["info"]["description"].startswith('Serves "><script>x</script>.')
