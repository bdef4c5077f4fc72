"""POST /predict: the contract's table, row by row, through Flask's test client and a fake model."""

import base64
import binascii
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import FakeModel, encode
from flask.testing import FlaskClient
from PIL import Image
from werkzeug.datastructures import MultiDict

import run_keras_server as server


def form(*files: tuple[bytes, str], field: str = "image", **fields: str) -> MultiDict:
    """Return the data of a form that carries these files."""
    parts: list[tuple[str, Any]] = [(field, (io.BytesIO(data), name)) for data, name in files]
    return MultiDict([*parts, *fields.items()])


def test_one_file(client: FlaskClient, dog: bytes) -> None:
    answer = client.post("/predict", data=form((dog, "dog.jpg")))
    assert answer.status_code == 200
    assert [*answer.json] == ["success", "model", "predictions"]
    assert answer.json["success"] is True
    assert answer.json["model"] == "resnet50"
    rows = answer.json["predictions"]
    assert len(rows) == 5
    assert rows[0] == {"label": "German_shepherd", "probability": pytest.approx(0.9)}
    assert [row["probability"] for row in rows] == sorted((row["probability"] for row in rows), reverse=True)


@pytest.mark.parametrize("kind", ["image/jpeg", "image/x-anything", "application/octet-stream"])
def test_raw_body(client: FlaskClient, dog: bytes, kind: str) -> None:
    answer = client.post("/predict", data=dog, content_type=kind)
    assert answer.status_code == 200
    assert answer.json["predictions"][0]["label"] == "German_shepherd"


@pytest.mark.parametrize("n", [1, 5, 17, 1000])
def test_top(client: FlaskClient, dog: bytes, n: int) -> None:
    answer = client.post(f"/predict?top={n}", data=form((dog, "dog.jpg")))
    assert len(answer.json["predictions"]) == n


@pytest.mark.parametrize("top", ["0", "-1", "1001", "five", "", "1.0", "1e2", "٣", "9" * 5000])
def test_top_that_is_no_number_of_rows(client: FlaskClient, model: FakeModel, dog: bytes, top: str) -> None:
    answer = client.post("/predict", query_string={"top": top}, data=form((dog, "dog.jpg")))
    assert answer.status_code == 400
    assert "1 to 1000" in answer.json["error"]
    assert not model.batches, "the model worked for a request that was refused"


def test_top_of_the_settings(client: FlaskClient, dog: bytes, setting: Callable[..., None]) -> None:
    setting(top=2)
    assert len(client.post("/predict", data=form((dog, "dog.jpg"))).json["predictions"]) == 2


def test_several_files(client: FlaskClient, model: FakeModel, dog: bytes) -> None:
    answer = client.post("/predict?top=1", data=form((dog, "a.jpg"), (b"no image", "b.txt"), (dog, "c.jpg")))
    assert answer.status_code == 200
    assert answer.json["success"] is True
    assert answer.json["model"] == "resnet50"
    first, second, third = answer.json["results"]
    assert first == {
        "filename": "a.jpg",
        "success": True,
        "predictions": [{"label": "German_shepherd", "probability": pytest.approx(0.9)}],
    }
    assert second["filename"] == "b.txt"
    assert second["success"] is False
    assert "not an image" in second["error"]
    assert "predictions" not in second
    assert third["filename"] == "c.jpg"
    assert third["success"] is True
    assert [len(batch) for batch in model.batches] == [2]


def test_each_file_gets_its_own_rows(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    class Brightness:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return np.eye(1000, dtype=np.float32)[(batch.mean((1, 2, 3)) > 0).astype(int)]

    monkeypatch.setattr(server, "model", Brightness())
    black, white = (encode(Image.new("RGB", (8, 8), colour)) for colour in ("black", "white"))
    answer = client.post("/predict?top=1", data=form((black, "b"), (b"?", "x"), (white, "w"), (black, "b")))
    labels = [result["predictions"][0]["label"] for result in answer.json["results"] if result["success"]]
    assert labels == ["tench", "goldfish", "tench"]


def test_several_files_and_none_good(client: FlaskClient) -> None:
    answer = client.post("/predict", data=form((b"x", "a"), (b"", "b")))
    assert answer.status_code == 400
    assert answer.json["success"] is False
    assert answer.json["error"]
    assert [result["success"] for result in answer.json["results"]] == [False, False]


PNG = encode(Image.new("RGB", (64, 64), "red"))
BAD_UPLOADS = {
    "empty": b"",
    "text": b"this is text",
    "html": b"<html><img src=x></html>",
    "signature alone": b"\x89PNG\r\n\x1a\n",
    "cut off": encode(Image.effect_noise((64, 64), 50), "JPEG")[:700],
    "cut off PNG": encode(Image.effect_noise((64, 64), 50))[:-500],
    "icon, not on the list": encode(Image.new("RGB", (16, 16)), "ICO"),
    "PPM, not on the list": encode(Image.new("RGB", (16, 16)), "PPM"),
    "PDF": b"%PDF-1.4 " + bytes(100),
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_bad_file(client: FlaskClient, name: str) -> None:
    for answer in (
        client.post("/predict", data=form((BAD_UPLOADS[name], "upload"))),
        client.post("/predict", data=BAD_UPLOADS[name], content_type="image/jpeg"),
    ):
        assert answer.status_code == 400
        assert answer.json["success"] is False
        assert len(answer.json["error"]) > 15


def test_too_many_pixels(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(max_megapixels=0.004)
    answer = client.post("/predict", data=form((PNG, "a.png")))
    assert answer.status_code == 400
    assert "64 x 64" in answer.json["error"]
    setting(max_megapixels=0.005)
    assert client.post("/predict", data=form((PNG, "a.png"))).status_code == 200


def test_no_image(client: FlaskClient, dog: bytes) -> None:
    for answer in (
        client.post("/predict"),
        client.post("/predict", data=form(field="image", other="text"), content_type="multipart/form-data"),
        client.post("/predict", data=b"x", content_type="multipart/form-data"),  # no boundary
    ):
        assert answer.status_code == 400
        assert "-F image=@" in answer.json["error"]


def test_image_as_text(client: FlaskClient) -> None:
    answer = client.post("/predict", data={"image": "dog.jpg"}, content_type="multipart/form-data")
    assert answer.status_code == 400
    assert "@" in answer.json["error"]


@pytest.mark.parametrize("kind", ["text/plain", "video/mp4", "multipart/mixed", "application/xml"])
def test_other_content_types(client: FlaskClient, dog: bytes, kind: str) -> None:
    answer = client.post("/predict", data=dog, content_type=kind)
    assert answer.status_code == 415
    assert "multipart/form-data" in answer.json["error"]


def test_body_over_the_limit(client: FlaskClient, dog: bytes, setting: Callable[..., None]) -> None:
    setting(max_upload_mb=0.01)
    for answer in (
        client.post("/predict", data=form((dog, "dog.jpg"))),
        client.post("/predict", data=dog, content_type="image/jpeg"),
    ):
        assert answer.status_code == 413
        assert "0.01 MiB" in answer.json["error"]


def test_too_many_files(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(queue_size=3)
    assert client.post("/predict", data=form(*[(PNG, "a")] * 3)).status_code == 200
    answer = client.post("/predict", data=form(*[(PNG, "a")] * 4))
    assert answer.status_code == 400
    assert "at most 3" in answer.json["error"]


def test_model_not_loaded(client: FlaskClient, dog: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "model", None)
    answer = client.post("/predict", data=form((dog, "dog.jpg")))
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_model_that_answers_nonsense(client: FlaskClient, dog: bytes, monkeypatch: Any, value: float) -> None:
    class Broken:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return np.full((1, 1000), value)

    monkeypatch.setattr(server, "model", Broken())
    answer = client.post("/predict", data=form((dog, "dog.jpg")))
    assert answer.status_code == 500
    assert "finite" not in answer.json["error"], "what went wrong is for the log"


def test_fake_with_other_classes(client: FlaskClient, dog: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return np.array([[0.25, 0.75]], np.float32)

    monkeypatch.setattr(server, "model", Two())
    rows = client.post("/predict", data=form((dog, "dog.jpg"))).json["predictions"]
    assert rows == [{"label": "1", "probability": 0.75}, {"label": "0", "probability": 0.25}]


ERRORS = [
    ("GET", "/predict", 405),
    ("PUT", "/predict", 405),
    ("DELETE", "/", 405),
    ("GET", "/nothing", 404),
    ("POST", "/nothing", 404),
    ("POST", "/predict", 400),
    ("GET", "/predict/", 404),
    ("GET", "/%00", 404),
    ("GET", "/../etc/passwd", 404),
    ("GET", "/static/../run_keras_server.py", 404),
]


@pytest.mark.parametrize(("method", "path", "status"), ERRORS)
def test_every_error_has_one_shape(client: FlaskClient, method: str, path: str, status: int) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert answer.content_type == "application/json"
    assert answer.json.keys() == {"success", "error"}
    assert answer.json["success"] is False
    assert re.fullmatch(r"[A-Z/].*[.:].*", answer.json["error"]), "a sentence"
    assert (status == 405) == ("Allow" in answer.headers)


def test_a_query_in_another_encoding_is_refused(client: FlaskClient, dog: bytes) -> None:
    answer = client.post("/predict", data=form((dog, "dog.jpg")), environ_overrides={"QUERY_STRING": "\xff=1"})
    assert answer.status_code == 400
    assert "UTF-8" in answer.json["error"]


def test_error_within_the_server(
    client: FlaskClient, dog: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            raise RuntimeError("secret path /srv/x")

    monkeypatch.setattr(server, "model", Broken())
    answer = client.post("/predict", data=form((dog, "dog.jpg")))
    assert answer.status_code == 500
    assert answer.json.keys() == {"success", "error"}
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["X-Request-ID"] in answer.json["error"]
    assert "secret path" in caplog.text, "the log says why"


def test_answers_are_compact_json(client: FlaskClient, dog: bytes) -> None:
    text = client.post("/predict", data=form((dog, "dog.jpg"))).text
    assert text.endswith("}\n")
    assert text.count("\n") == 1
    json.loads(text)


def test_index_says_how_to_post(client: FlaskClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/html"
    assert "resnet50" in answer.text


# As clients write them


def parts(*rows: tuple[str, bytes], boundary: str = "XbX", end: bool = True, eol: bytes = b"\r\n") -> bytes:
    """Return a form by hand, whose rows are the lines before a part's content, and that."""
    mark = b"--" + boundary.encode()
    pieces = [mark + eol + head.replace("\n", "\r\n").encode() + 2 * b"\r\n" + content for head, content in rows]
    return eol.join([*pieces, mark + b"--" + eol if end else b""])


FORM = "multipart/form-data; boundary=XbX"
TAKEN: dict[str, tuple[str, str | None]] = {
    "no file name, a type": ('name="image"', "image/jpeg"),
    "no file name, no type": ('name="image"', None),
    "no file name, octet-stream": ('name="image"', "application/octet-stream"),
    "an empty file name": ('name="image"; filename=""', "image/jpeg"),
    "unquoted": ("name=image; filename=dog.jpg", "image/jpeg"),
    "only filename*": ("name=\"image\"; filename*=UTF-8''h%C3%BCnd.jpg", "image/jpeg"),
    "field file": ('name="file"; filename="dog.jpg"', "image/jpeg"),
    "field image[]": ('name="image[]"; filename="dog.jpg"', "image/jpeg"),
    "field images": ('name="images"; filename="dog.jpg"', "image/jpeg"),
    "field Image": ('name="Image"; filename="dog.jpg"', "image/jpeg"),
    "field photo, without a file name": ('name="photo"', None),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_lone_picture_is_taken_whatever_its_part_says(client: FlaskClient, dog: bytes, name: str) -> None:
    disposition, kind = TAKEN[name]
    head = f"Content-Disposition: form-data; {disposition}" + (f"\nContent-Type: {kind}" if kind else "")
    text = ("Content-Disposition: form-data; name=comment", b"my dog")
    for rows in ([(head, dog)], [text, (head, dog)], [(head, dog), text]):
        answer = client.post("/predict?top=1", data=parts(*rows), content_type=FORM)
        assert answer.status_code == 200, answer.text
        assert answer.json["predictions"][0]["label"] == "German_shepherd"


def test_several_pictures_under_another_name_are_several(client: FlaskClient, dog: bytes) -> None:
    rows = [(f'Content-Disposition: form-data; name="images[]"; filename="{n}.jpg"', dog) for n in range(3)]
    answer = client.post("/predict", data=parts(*rows), content_type=FORM)
    assert [result["filename"] for result in answer.json["results"]] == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_part_in_base64_and_one_as_a_data_uri(client: FlaskClient, dog: bytes, model: FakeModel) -> None:
    text = base64.encodebytes(dog)
    head = 'Content-Disposition: form-data; name="image"'
    for row in (
        (f"{head}; filename=dog.jpg\nContent-Transfer-Encoding: BASE64", text),
        (f"{head}; filename=dog.jpg\nContent-Transfer-Encoding: quoted-printable", binascii.b2a_qp(dog, istext=False)),
        (head, b"data:image/jpeg;base64," + base64.b64encode(dog)),
        (head, base64.b64encode(dog)),
    ):
        assert client.post("/predict", data=parts(row), content_type=FORM).status_code == 200
    assert all(np.array_equal(batch, model.batches[0]) for batch in model.batches)


HEAD = 'Content-Disposition: form-data; name="image"; filename="dog.jpg"'
FLAWS: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "no boundary": (lambda dog: parts((HEAD, dog)), "multipart/form-data", "names no boundary"),
    "another boundary": (lambda dog: parts((HEAD, dog)), "multipart/form-data; boundary=other", "not divided by the boundary"),
    "no end": (lambda dog: parts((HEAD, dog), end=False), FORM, "closing boundary is missing"),
    "cut": (lambda dog: parts((HEAD, dog))[:2000], FORM, "closing boundary is missing"),
    "no part": (lambda dog: b"--XbX--\r\n", FORM, "There is no image"),
    "other fields": (lambda dog: parts(("Content-Disposition: form-data; name=a", b"1"),
                                       ("Content-Disposition: form-data; name=b", b"2")), FORM, "which are 'a', 'b'"),
    "two candidates": (lambda dog: parts((HEAD.replace("image", "left"), dog), (HEAD.replace("image", "right"), dog)),
                       FORM, "pictures as 'left', 'right', and none as 'image'"),
    "an empty file": (lambda dog: parts((HEAD, b"")), FORM, "The file is empty"),
    "text": (lambda dog: parts((HEAD.partition("; filename")[0], b"dog.jpg")), FORM, "holds text instead of a file"),
    "not JSON": (lambda dog: b"image", "application/json", 'The body is not JSON: invalid character (byte 0). Send {"image"'),
    "a picture, as HTTPie sends it": (lambda dog: dog, "application/json", "It is a picture, so say image/jpeg there"),
    "JSON without an image": (lambda dog: b"{}", "application/json", "The JSON has no image"),
    "JSON with both": (lambda dog: b'{"image": "", "images": []}', "application/json", "The JSON has both 'image' and 'images'"),
    "a form that is called JSON": (lambda dog: parts((HEAD, dog)), "application/json", "The body is a form, and its Content-Type"),
    "a form of no type": (lambda dog: parts((HEAD, dog)), "", "The body is a form, and its Content-Type"),
    "a form that is called a file": (lambda dog: parts((HEAD, dog), eol=b"\n"), "application/octet-stream", "The body is a form"),
    "a picture that is called a form": (lambda dog: dog, FORM, "The body is a picture, and its Content-Type"),
    "likewise without a boundary": (lambda dog: dog, "multipart/form-data", "The body is a picture, and its Content-Type"),
    "curl -d @dog.jpg": (lambda dog: re.sub(rb"[\r\n]", b"", dog), "application/x-www-form-urlencoded", "-d takes out"),
    "a list": (lambda dog: b"[]", "application/json", "The body has to be an object, and a list came. Send"),
    "a number": (lambda dog: b'{"image": 7}', "application/json", "has to be text, and 7 came"),
    "no images": (lambda dog: b'{"images": []}', "application/json", "has to be a list"),
    "not base64": (lambda dog: b'{"image": "%%%"}', "application/json", "not in base64"),
    "a data URI of text": (lambda dog: b'{"image": "data:text/plain,hello"}', "application/json", "data URI that is not in base64"),
    "a typed form": (lambda dog: b"image=dog.jpg", "application/x-www-form-urlencoded", "-F image=@dog.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAWS)
def test_what_is_wrong_with_a_body_is_said(client: FlaskClient, dog: bytes, name: str) -> None:
    make, kind, words = FLAWS[name]
    answer = client.post("/predict", data=make(dog), content_type=kind)
    assert answer.status_code == (415 if name == "a typed form" else 400)
    assert words in answer.json["error"]


@pytest.mark.parametrize(
    "kind",
    [None, "*/*", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded", "undefined"],
)
def test_a_picture_is_taken_where_its_type_is_not_said(client: FlaskClient, dog: bytes, kind: str | None) -> None:
    assert client.post("/predict", data=dog, content_type=kind).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [None, "application/x-www-form-urlencoded", "text/plain;charset=UTF-8", "application/json; charset=utf-8",
     "text/json", "application/vnd.api+json", "*/*"],
)  # fmt: skip
def test_json_is_taken_where_its_type_is_not_said(client: FlaskClient, dog: bytes, kind: str | None) -> None:
    """As curl's -d sends it, and the fetch of browsers and Node where the body is text."""
    body = " \n" + json.dumps({"image": base64.b64encode(dog).decode()})
    assert client.post("/predict", data=body, content_type=kind).status_code == 200


@pytest.mark.parametrize(
    "kind",
    ["boundary=XbX", "; charset=UTF-8; boundary=XbX; a=b", '; boundary="XbX"', ";boundary=XbX;", "; BOUNDARY=XbX",
     " boundary=XbX", ", boundary=XbX", "; boundary = XbX", '; boundary = "XbX"; charset=utf-8'],
)  # fmt: skip
def test_the_boundary_is_found_however_it_is_spelled(client: FlaskClient, dog: bytes, kind: str) -> None:
    kind = f"multipart/form-data{kind}" if kind[0] in " ,;" else f"Multipart/Form-Data; {kind}"
    assert client.post("/predict", data=parts((HEAD, dog)), content_type=kind).status_code == 200


def test_json_holds_one_picture_or_several(client: FlaskClient, dog: bytes, model: FakeModel) -> None:
    plain = base64.b64encode(dog).decode()
    forms = [plain, plain.rstrip("="), base64.urlsafe_b64encode(dog).decode(), "data:image/jpeg;base64," + plain,
             "\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))]  # fmt: skip
    for text in forms:
        assert client.post("/predict", json={"image": text}).json["predictions"][0]["label"] == "German_shepherd"
    answer = client.post("/predict?top=1", json={"images": [*forms, "AAAA"]}).json
    assert [result["success"] for result in answer["results"]] == [True] * len(forms) + [False]
    assert all(np.array_equal(batch[0], model.batches[0][0]) for batch in model.batches)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_bodies_may_be_compressed(client: FlaskClient, dog: bytes, coding: str, setting: Callable[..., None]) -> None:
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    headers = {"Content-Encoding": coding}
    for data, kind in ((dog, "image/jpeg"), (parts((HEAD, dog)), FORM)):
        assert client.post("/predict", data=pack(data), content_type=kind, headers=headers).status_code == 200
    answer = client.post("/predict", data=dog, content_type="image/jpeg", headers=headers)
    assert answer.status_code == 400
    assert f"not {coding}" in answer.json["error"]
    assert answer.json["success"] is False
    setting(max_upload_mb=0.01)
    answer = client.post("/predict", data=pack(bytes(10**6)), content_type="image/jpeg", headers=headers)
    assert answer.status_code == 413


def test_codings_may_lie_over_each_other_and_gzip_be_in_pieces(client: FlaskClient, dog: bytes) -> None:
    pieces = b"".join(gzip.compress(dog[n : n + 10_000]) for n in range(0, len(dog), 10_000))
    for data, said, status, words in (
        (gzip.compress(zlib.compress(dog)), "deflate, gzip", 200, ""),
        (gzip.compress(dog), "gzip, gzip", 400, "The body is not gzip"),
        (gzip.compress(dog), "identity, GZIP", 200, ""),
        (gzip.compress(dog), "gzip, ", 200, ""),
        (dog, "identity", 200, ""),
        (dog, "", 200, ""),
        (pieces, "gzip", 200, ""),
        (pieces[:-1], "gzip", 400, "breaks off"),
        (pieces + b"junk", "gzip", 400, "Something follows"),
        (zlib.compress(dog) + zlib.compress(b""), "deflate", 400, "Something follows"),
        (b"", "gzip", 400, "breaks off"),
        (gzip.compress(b"") + b"junk", "gzip", 400, "Something follows"),
        (gzip.compress(b"") * 63 + gzip.compress(dog), "gzip", 200, ""),
        (gzip.compress(b"") * 100_000, "gzip", 400, "Something follows"),
        (dog, "gzip, gzip, gzip", 415, "cannot unpack"),
        (dog, "gzip, br", 415, "cannot unpack"),
    ):
        headers = {"Content-Encoding": said}
        answer = client.post("/predict", data=data, content_type="image/jpeg", headers=headers)
        assert (answer.status_code, words in answer.json.get("error", "")) == (status, True), (said, answer.text)


def test_a_form_of_very_many_parts_is_refused(client: FlaskClient) -> None:
    rows = [(f"Content-Disposition: form-data; name=f{n}", b"") for n in range(1001)]
    answer = client.post("/predict", data=parts(*rows), content_type=FORM)
    assert answer.status_code == 400
    assert "too many fields" in answer.json["error"]


def test_nothing_is_decoded_to_see_what_a_body_is(
    client: FlaskClient, setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of one megabyte, sent without its type, can unpack to gigabytes."""
    setting(max_megapixels=0.001)
    monkeypatch.setattr(server.images.tiff, "read", lambda *_: pytest.fail("it was decoded"))
    out = io.BytesIO()
    Image.new("I;16", (64, 64)).save(out, "TIFF")
    for kind in (None, "application/x-www-form-urlencoded"):
        answer = client.post("/predict", data=out.getvalue(), content_type=kind)
        assert answer.status_code == 400
        assert "64 x 64" in answer.json["error"]


def test_a_part_needs_no_name(client: FlaskClient, dog: bytes) -> None:
    row = ("Content-Disposition: form-data; filename=dog.jpg", dog)
    assert client.post("/predict", data=parts(row), content_type=FORM).status_code == 200


def test_deflate_without_its_head_is_unpacked(client: FlaskClient, dog: bytes) -> None:
    packer = zlib.compressobj(wbits=-15)
    data = packer.compress(dog) + packer.flush()
    headers = {"Content-Encoding": "deflate"}
    assert client.post("/predict", data=data, content_type="image/jpeg", headers=headers).status_code == 200
