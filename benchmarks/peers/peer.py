"""The peers: what is installed for each, how it is started and asked, and how its answer reads."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import payload
from benchmarks.payload import Payload
from benchmarks.peers.environments import Environment
from benchmarks.system import HOST, Launch, free_port

SCRIPTS = Path(__file__).resolve().parent
READY_WITHIN_S = 600.0
MODEL = "peer"

Command = Callable[[Environment, str, int, Path, int], list[str]]


@dataclass(frozen=True, slots=True)
class Peer:
    """One system.

    Attributes:
        requirements: what pip installs for it.
        command: from its environment, the scenario, a port, a folder and a number of cores.
        ready_path: answers 200 once it is ready.
        send: a row or a picture as it wants it, by scenario.
        read: numbers of its answer, by scenario: logits, or classes and probabilities.
        variables: of its environment.
    """

    name: str
    requirements: tuple[str, ...]
    command: Command
    ready_path: str
    send: dict[str, Callable[..., Payload]]
    read: dict[str, Callable[[bytes], "Answer"]]
    variables: tuple[tuple[str, str], ...] = ()

    def environment(self, folder: Path) -> Environment:
        """Its own, below `folder`."""
        return Environment(folder / self.name.lower().replace(" ", "-"), self.requirements)

    def launch(
        self, environment: Environment, scenario: str, weights: Path, folder: Path, num_cores: int
    ) -> Launch:
        """How it is started for a scenario (`P` or `R`) with a state_dict."""
        port = free_port()
        environ = environment.environ() | dict(self.variables)
        environ |= {"PEER_WEIGHTS": str(weights), "PYTHONPATH": str(SCRIPTS)}
        own = folder / self.name.replace(" ", "-")
        own.mkdir()
        command = self.command(environment, scenario, port, own, num_cores)
        name = f"{self.name} {scenario}"
        return Launch(name, command, port, self.ready_path, environ, own, READY_WITHIN_S)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system says of one input, comparable over systems.

    Attributes:
        best: index of the class.
        numbers: logits of all classes, or probabilities of the best ones in falling order.
    """

    best: int
    numbers: np.ndarray

    def agrees(self, other: "Answer") -> bool:
        """The same class, and numbers that differ by at most 1e-3 of the largest."""
        largest = float(np.abs(other.numbers).max())
        change = float(np.abs(self.numbers - other.numbers).max())
        return self.best == other.best and change <= 1e-3 * largest


def from_logits(logits: Sequence[float]) -> Answer:
    """Of scenario P."""
    numbers = np.array(logits, dtype=np.float64)
    return Answer(int(numbers.argmax()), numbers)


def from_best(classes: Sequence[int], probabilities: Sequence[float]) -> Answer:
    """Of scenario R."""
    return Answer(int(classes[0]), np.array(probabilities, dtype=np.float64))


def ours_p(answer: bytes) -> Answer:
    """V2 JSON: MLServer's too."""
    return from_logits(json.loads(answer)["outputs"][0]["data"])


def ours_binary(answer: bytes) -> Answer:
    """V2 with raw numbers behind the JSON: the logits are the first."""
    _, end = json.JSONDecoder().raw_decode(answer.decode("latin-1"))
    return from_logits(np.frombuffer(answer[end:], np.float32)[:10])


def ours_r(answer: bytes) -> Answer:
    """Our own `/v1` predict."""
    best = json.loads(answer)["predictions"][0]["top_k"]
    return from_best([one["label"] for one in best], [one["probability"] for one in best])


def _mlserver_r(answer: bytes) -> Answer:
    outputs = {one["name"]: one["data"] for one in json.loads(answer)["outputs"]}
    return from_best(outputs["classes"], outputs["probabilities"])


def _named_logits(answer: bytes) -> Answer:
    return from_logits(json.loads(answer)["logits"])


def _best(answer: bytes) -> Answer:
    return from_best(**json.loads(answer))


def _bento_rows(numbers: list[float]) -> Payload:
    body = json.dumps({"rows": [numbers]}, separators=(",", ":")).encode()
    return Payload("bento", "/predict", body, {"Content-Type": "application/json"})


def _mlserver_picture(picture: bytes) -> Payload:
    tensor = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(picture).decode()],
    }
    body = json.dumps({"inputs": [tensor]}).encode()
    path = f"/v2/models/{MODEL}/infer"
    return Payload("mlserver", path, body, {"Content-Type": "application/json"})


def _v2_rows_at(path: str) -> Callable[[list[float]], Payload]:
    def send(numbers: list[float]) -> Payload:
        v2 = payload.v2_json(MODEL, numbers)
        return Payload("peer", path, v2.body, v2.headers)

    return send


def _litserve(environment: Environment, scenario: str, port: int, *_: object) -> list[str]:
    script = SCRIPTS / "litserve_server.py"
    return [str(environment.python), str(script), scenario, str(port)]


def _ray(environment: Environment, scenario: str, port: int, _: Path, num_cores: int) -> list[str]:
    script = SCRIPTS / "ray_server.py"
    return [str(environment.python), str(script), scenario, str(port), str(num_cores)]


def _bentoml(environment: Environment, scenario: str, port: int, *_: object) -> list[str]:
    service = {"P": "Perceptron", "R": "Pictures"}[scenario]
    options = ["--host", HOST, "--port", str(port), "--working-dir", str(SCRIPTS)]
    bentoml = environment.python.with_name("bentoml")
    return [str(bentoml), "serve", f"bentoml_server:{service}", *options]


def _mlserver(
    environment: Environment, scenario: str, port: int, folder: Path, num_cores: int
) -> list[str]:
    runtime, batch = {"P": ("PerceptronRuntime", 32), "R": ("PictureRuntime", 8)}[scenario]
    settings = {
        "host": HOST,
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "debug": False,
        # a process of its own only pays where there is a core for it
        "parallel_workers": 0 if num_cores == 1 else 1,
    }
    model = {
        "name": MODEL,
        "implementation": f"mlserver_server.{runtime}",
        "max_batch_size": batch,
        "max_batch_time": 0.01,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(environment.python.with_name("mlserver")), "start", str(folder)]


PEERS = (
    Peer(
        "LitServe",
        ("litserve==0.2.19", "python-multipart"),
        _litserve,
        "/health",
        {
            "P": _v2_rows_at("/predict"),
            "R": lambda picture: payload.multipart("/predict", picture),
        },
        {"P": _named_logits, "R": _best},
    ),
    Peer(
        "MLServer",
        # its parallel workers ask uvloop for what uvloop gives no more from 0.22 on
        ("mlserver==1.7.1", "uvloop<0.22"),
        _mlserver,
        f"/v2/models/{MODEL}/ready",
        {"P": _v2_rows_at(f"/v2/models/{MODEL}/infer"), "R": _mlserver_picture},
        {"P": ours_p, "R": _mlserver_r},
    ),
    Peer(
        "BentoML",
        ("bentoml==1.4.39",),
        _bentoml,
        "/readyz",
        {
            "P": _bento_rows,
            "R": lambda picture: payload.multipart("/predict", picture, field_name="pictures"),
        },
        {
            "P": lambda answer: from_logits(json.loads(answer)[0]),
            "R": lambda answer: from_best(**json.loads(answer)[0]),
        },
        (("BENTOML_DO_NOT_TRACK", "True"),),
    ),
    Peer(
        "Ray Serve",
        ("ray[serve]==2.60.0", "python-multipart"),
        _ray,
        "/",
        {"P": _v2_rows_at("/"), "R": lambda picture: payload.multipart("/", picture)},
        {"P": _named_logits, "R": _best},
        (
            ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"),
            ("RAY_USAGE_STATS_ENABLED", "0"),
            ("RAY_AUTH_MODE", "disabled"),
            ("RAY_raylet_start_wait_time_s", "300"),
            # frozen processes must not be taken for dead ones
            ("RAY_health_check_failure_threshold", "1000000"),
        ),
    ),
)
