"""What the clients of others are made to say to a server: tritonclient and kserve, as they come from the package index.

    .venv-clients/bin/python tests/real_clients.py FILE NAME=URL...

It has an environment of its own, for these clients hold back packages that the server is tested with. NAME is a
model's and FILE an image for `digits`; all else is in the model's metadata. Says each name, and ends with a traceback
where a client gets something that it does not understand.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

COMPRESSIONS: tuple[dict[str, str], ...] = (
    {},
    {"request_compression_algorithm": "gzip"},
    {"request_compression_algorithm": "deflate", "response_compression_algorithm": "gzip"},
)


def arrays_for(metadata: dict[str, Any], rows: int) -> dict[str, np.ndarray]:
    """Return ones for each input that a model's metadata name, three where any length will do."""
    return {
        item["name"]: np.ones(
            [rows, *(3 if n == -1 else n for n in item["shape"][1:])], triton_to_np_dtype(item["datatype"])
        )
        for item in metadata["inputs"]
    }


def triton_inputs(arrays: dict[str, np.ndarray], metadata: dict[str, Any], binary: bool) -> list[Any]:
    """Return arrays as tritonclient sends them."""
    found = []
    for item in metadata["inputs"]:
        found.append(triton.InferInput(item["name"], arrays[item["name"]].shape, item["datatype"]))
        found[-1].set_data_from_numpy(arrays[item["name"]], binary_data=binary)
    return found


def use_triton(url: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Ask with tritonclient, in JSON and in binary; returns the model's metadata and what it answered."""
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert client.is_model_ready(name)
        assert client.is_model_ready(name, "1")
        assert not client.is_model_ready("hat")
        metadata = client.get_model_metadata(name)
        outputs = [item["name"] for item in metadata["outputs"]]
        arrays = arrays_for(metadata, 2)
        answers = []
        for binary_in in (True, False):
            inputs = triton_inputs(arrays, metadata, binary_in)
            answers.append(client.infer(name, inputs, request_id="7"))
            answers.append(client.async_infer(name, inputs, request_id="7").get_result())
            for binary_out in (True, False):
                wanted = [triton.InferRequestedOutput(output, binary_data=binary_out) for output in outputs]
                for options in COMPRESSIONS:
                    answers.append(client.infer(name, inputs, outputs=wanted, request_id="7", **options))
        first = {output: answers[0].as_numpy(output) for output in outputs}
        for answer in answers:
            assert answer.get_response()["id"] == "7"
            for output in outputs:
                assert np.allclose(answer.as_numpy(output), first[output], atol=1e-5), output
        for binary in (True, False):
            inputs = triton_inputs(arrays, metadata, True)
            wanted = [triton.InferRequestedOutput(outputs[0], binary_data=binary, class_count=1)]
            found = client.infer(name, inputs, outputs=wanted).as_numpy(outputs[0])
            text = found[0, 0].decode() if binary else found[0, 0]
            assert int(text.split(":")[1]) == first[outputs[0]][0].argmax()
            assert found.shape == (2, 1)
        with contextlib.suppress(InferenceServerException):  # which reads the sentence out of the error's JSON
            client.infer(name, [])
            raise AssertionError("a request without inputs was answered")
    return metadata, first


def show_triton(url: str, metadata: dict[str, Any], file: bytes) -> None:
    """Have tritonclient send encoded images, as bytes and as base64."""
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        spelled = []
        for binary in (True, False):
            image = triton.InferInput(metadata["inputs"][0]["name"], [2], "BYTES")
            image.set_data_from_numpy(np.array(2 * [file if binary else base64.b64encode(file)], object), binary)
            output = metadata["outputs"][0]["name"]
            wanted = [triton.InferRequestedOutput(output, binary_data=binary, class_count=3)]
            found = client.infer(metadata["name"], [image], outputs=wanted).as_numpy(output)
            assert found.shape == (2, 3)
            spelled.append([text.decode() if binary else text for text in found[1]])
        assert spelled[0] == spelled[1]


async def use_kserve(url: str, metadata: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    """Ask with KServe's client, in both of its protocols."""
    name, arrays = metadata["name"], arrays_for(metadata, 2)
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, name)
        for binary_in in (True, False):
            inputs = []
            for item in metadata["inputs"]:
                inputs.append(InferInput(item["name"], [*arrays[item["name"]].shape], item["datatype"]))
                inputs[-1].set_data_from_numpy(arrays[item["name"]], binary_data=binary_in)
            for binary_out in (True, False):
                parameters = {"binary_data_output": binary_out}
                request = InferRequest(name, inputs, request_id="9", parameters=parameters)
                answer: Any = await client.infer(url, request, model_name=name)
                assert answer.id == "9"
                for output in answer.outputs:
                    assert np.allclose(output.as_numpy(), expected[output.name], atol=1e-5)
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        assert await client.is_model_ready(url, name)
        columns = {key: array.tolist() for key, array in arrays.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for instances in [rows] if len(columns) > 1 else [rows, *columns.values()]:
            found: Any = await client.infer(url, {"instances": instances}, model_name=name)
            for key, values in expected.items():
                got = [row[key] if len(expected) > 1 else row for row in found["predictions"]]
                assert np.allclose(got, values, atol=1e-5)


if __name__ == "__main__":
    photo, *servers = sys.argv[1:]  # importing the clients takes longer than asking three servers
    for model, address in (words.split("=", 1) for words in servers):
        print(model)
        described, computed = use_triton(address, model)
        asyncio.run(use_kserve(address, described, computed))
        if model == "digits":
            show_triton(address, described, Path(photo).read_bytes())
