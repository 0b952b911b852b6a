"""Payloads of the benchmarks: what is sent is what the service reads."""

import io

import numpy as np
import torch
from PIL import Image

from app.api.predict import read_inputs
from app.api.v2_request import parse_request
from app.api.v2_tensors import Limits
from app.engine.predictor import TensorSpec
from benchmarks import payload

SPEC = TensorSpec("input", "FP32", (784,))


def test_both_forms_of_v2_carry_the_row() -> None:
    numbers = payload.row()
    for sent in (payload.v2_json("m", numbers), payload.v2_binary("m", numbers)):
        header = sent.headers.get("Inference-Header-Content-Length")
        parsed = parse_request(sent.body, header and header.encode(), SPEC, Limits())
        tensor = parsed.inputs[0].data
        assert torch.equal(tensor, torch.tensor([numbers], dtype=torch.float32))


def test_a_form_and_a_raw_body_carry_the_picture() -> None:
    picture = payload.photograph()
    for sent in (payload.multipart("/", picture), payload.raw_picture("/", picture)):
        inputs = read_inputs(sent.headers["Content-Type"], sent.body, None, 1)
        assert inputs.pictures == [picture]


def test_the_picture_is_always_the_same_jpeg_of_500_by_375() -> None:
    picture = payload.photograph(seed=1)
    assert picture == payload.photograph(seed=1) != payload.photograph(seed=2)
    image = Image.open(io.BytesIO(picture))
    assert (image.format, image.size) == ("JPEG", (500, 375))
    assert np.asarray(image).std() > 20


def test_a_message_is_one_http_request() -> None:
    sent = payload.Payload("p", "/x", b"body", {"A": "b"}).with_headers(X_Request_Timeout_Ms="5")
    head, _, body = sent.message(80).partition(b"\r\n\r\n")
    assert body == b"body"
    assert head.split(b"\r\n") == [
        b"POST /x HTTP/1.1",
        b"Host: 127.0.0.1:80",
        b"A: b",
        b"X-Request-Timeout-Ms: 5",
        b"Content-Length: 4",
    ]
