"""Runs in an environment of its own: calls of the real `tritonclient`, one JSON line in, one JSON line out.

It does not know our code, and must not import it: two sets of stubs of one package cannot live in one process.
Read first: `{"target", "call", "kwargs"}` calls the method of that name; "infer" and "stream" take prompts as texts.
"""

# ruff: noqa: ANN001, ANN003, ANN201, T201 - it runs apart, without types of ours, and speaks by printing

import json
import sys

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

MESSAGES = {
    "get_server_metadata",
    "get_model_metadata",
    "get_model_config",
    "get_inference_statistics",
    "get_model_repository_index",
}


def arguments(model, text, outputs=(), datatype="BYTES", **options):
    tensor = InferInput("text_input", [1], datatype)
    dtype = np.object_ if datatype == "BYTES" else np.int64
    tensor.set_data_from_numpy(np.array([text.encode() if datatype == "BYTES" else 7], dtype=dtype))
    wanted = [InferRequestedOutput(name) for name in outputs] or None
    return {"model_name": model, "inputs": [tensor], "outputs": wanted, **options}


def shown(result):
    response = result.get_response(as_json=True)
    tensors = {output["name"]: result.as_numpy(output["name"]).tolist() for output in response.get("outputs", ())}
    return {
        "id": response.get("id", ""),
        "model": f"{response['model_name']}/{response['model_version']}",
        "parameters": {name: next(iter(value.values())) for name, value in response.get("parameters", {}).items()},
        "outputs": json.loads(json.dumps(tensors, default=bytes.decode)),
    }


def failed(error):
    return {"error": error.message(), "status": error.status()}


def stream(client, requests, headers=None):
    got = []
    client.start_stream(lambda result, error: got.append(failed(error) if error else shown(result)), headers=headers)
    for request in requests:
        client.async_stream_infer(**arguments(**request))
    client.stop_stream()
    return got


def answer(target, call, kwargs):
    with InferenceServerClient(target) as client:
        try:
            if call == "infer":
                return shown(client.infer(**arguments(**kwargs)))
            if call == "stream":
                return stream(client, **kwargs)
            if call in MESSAGES:
                kwargs["as_json"] = True
            return getattr(client, call)(**kwargs)
        except InferenceServerException as error:
            return failed(error)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
