"""Ray Serve as its documentation advises: a deployment with `serve.batch`, throughput settings on.

`python ray_server.py P|R PORT NUM_CORES`
"""

import asyncio
import os
import signal
import sys

import ray
import torch
from computation import Preprocessing, classify, perceptron, resnet
from ray import serve
from starlette.requests import Request

# A frozen replica must not be taken for a dead one.
PATIENT = {"health_check_timeout_s": 36_000, "health_check_period_s": 3600}


@serve.deployment(max_ongoing_requests=128, **PATIENT)
class Perceptron:
    """Takes the JSON of V2, answers `{"logits": [...]}`."""

    def __init__(self) -> None:
        self.network = perceptron()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    @torch.inference_mode()
    async def predict(self, rows: list[list[float]]) -> list[list[float]]:
        """A batch of rows to logits."""
        return self.network(torch.tensor(rows, dtype=torch.float32)).tolist()

    async def __call__(self, request: Request) -> dict:
        """One request; a GET asks whether this is up, which the proxy is before us."""
        if request.method == "GET":
            return {}
        document = await request.json()
        return {"logits": await self.predict(document["inputs"][0]["data"])}


@serve.deployment(max_ongoing_requests=128, **PATIENT)
class Pictures:
    """Takes a form with a file `file`."""

    def __init__(self) -> None:
        self.network = resnet()
        self.preprocess = Preprocessing()

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def predict(self, pictures: list[bytes]) -> list[dict]:
        """A batch of encoded pictures to their best classes."""
        batch = torch.stack([self.preprocess(one) for one in pictures])
        return await asyncio.to_thread(classify, self.network, batch)

    async def __call__(self, request: Request) -> dict:
        """One request; a GET asks whether this is up, which the proxy is before us."""
        if request.method == "GET":
            return {}
        form = await request.form()
        return await self.predict(await form["file"].read())


if __name__ == "__main__":
    scenario, port, num_cores = sys.argv[1:]
    ray.init(
        num_cpus=int(num_cores),
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        log_to_driver=False,
        _temp_dir=os.path.abspath("ray"),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    deployment = Perceptron if scenario == "P" else Pictures
    actor = {"num_cpus": 0.5}
    serve.run(deployment.options(ray_actor_options=actor).bind(), route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
