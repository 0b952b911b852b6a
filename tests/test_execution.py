"""How a version computes: in the quickest form that answers as published, in no other."""

import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor, nn

from app.engine.compiling import CACHE_VARIABLE, Compiler
from app.engine.execution import Choice, Execution, Reference, choose_form, chosen_before
from app.engine.known_choices import KnownChoices
from app.engine.loading import LoadedVersion, load_version
from models import checkpoint
from models.forms import other_forms
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore, Version

CPU = torch.device("cpu")


class Convolutions(nn.Module):
    """Large enough to be worth a choice, small enough for a test."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Capricious(Convolutions):
    """Whose way depends on its numbers, so that it cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


class Cancelling(Convolutions):
    """What it answers is lost where numbers have eight bits."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + 1000.0) - 1000.0


def reference_of(network: nn.Module) -> Reference:
    torch.manual_seed(0)
    inputs = torch.rand(4, 3, 48, 48)
    with torch.inference_mode():
        return Reference(inputs, network(inputs))


def network_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    network = kind().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return network.requires_grad_(False)


def test_a_tiny_network_is_left_as_it_is(store: ModelStore) -> None:
    loaded = load_version(store.resolve("digits"), CPU, "auto")
    assert loaded.execution.form.network is loaded.network
    assert loaded.execution.trials[0].verdict == "chosen: too small to gain"
    assert not loaded.execution.is_worthwhile


def test_every_form_is_tried_and_one_is_chosen() -> None:
    network = network_of(Convolutions)
    execution = choose_form(network, reference_of(network), "auto")
    verdicts = [trial.verdict for trial in execution.trials]
    assert verdicts.count("chosen") == 1
    assert {trial.form for trial in execution.trials} >= {"fp32", "fp32, channels last"}
    assert all(trial.ms.keys() == {1, 4} for trial in execution.trials)
    chosen = next(trial for trial in execution.trials if trial.verdict == "chosen")
    assert chosen.form == execution.form.name


def test_another_layout_answers_alike_without_its_batch_norms() -> None:
    network = network_of(Convolutions)
    arranged = next(form for form in other_forms(network, "fp32") if form.arranged)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in arranged.network.modules())
    inputs = torch.rand(4, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(arranged(inputs), network(inputs), rtol=1e-4, atol=1e-5)
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_a_network_that_cannot_be_traced_is_arranged_all_the_same() -> None:
    network = network_of(Capricious)
    arranged = next(form for form in other_forms(network, "fp32") if form.arranged)
    inputs = torch.rand(2, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(arranged(inputs), network(inputs), rtol=1e-4, atol=1e-5)


def test_a_form_that_answers_differently_is_never_chosen() -> None:
    network = network_of(Cancelling)
    execution = choose_form(network, reference_of(network), "bf16")
    assert execution.form.precision == "fp32"
    lost = next(trial for trial in execution.trials if trial.form.startswith("bf16"))
    assert "changes golden outputs by" in lost.verdict


def test_without_golden_inputs_nothing_is_rounded() -> None:
    network = network_of(Convolutions)
    reference = replace(reference_of(network), outputs=None)
    execution = choose_form(network, reference, "bf16")
    assert execution.form.precision == "fp32"
    assert "no golden inputs" in execution.trials[1].verdict


@pytest.mark.parametrize(
    ("share", "num_samples", "precision"),
    [(0.994, 400, "fp32"), (0.996, 400, "bf16"), (0.9, 199, "bf16"), ("most", 400, "bf16")],
)
def test_samples_that_were_held_out_have_a_say(
    share: object, num_samples: int, precision: str
) -> None:
    network = network_of(Convolutions)
    agreement = {"bf16": {"share": share, "num_samples": num_samples}}
    reference = replace(reference_of(network), agreement=agreement)
    execution = choose_form(network, reference, "bf16")
    assert execution.form.precision == precision
    if precision == "fp32":
        verdict = "agrees with fp32 on 99.40% of 400 samples; 99.5% are needed"
        assert execution.trials[1].verdict == verdict
        assert chosen_before(network, reference, Choice("bf16", True, [])) is None


def test_a_precision_by_name_is_taken_whatever_its_speed() -> None:
    network = network_of(Convolutions)
    execution = choose_form(network, reference_of(network), "bf16")
    assert execution.form.precision == "bf16"
    with torch.inference_mode():
        assert execution(torch.rand(3, 3, 48, 48)).dtype == torch.float32


def test_what_was_chosen_before_is_chosen_again(tmp_path: Path) -> None:
    network = network_of(Convolutions)
    reference, known = reference_of(network), KnownChoices(tmp_path / "choices", "auto")
    assert known.find("digest", CPU) is None
    execution = choose_form(network, reference, "bf16")
    known.keep("digest", CPU, execution.choice)
    found = known.find("digest", CPU)
    assert found == execution.choice
    assert found is not None
    again = chosen_before(network, reference, found)
    assert again is not None
    assert again.form.name == "bf16, channels last"
    assert KnownChoices(tmp_path / "choices", "fp32").find("digest", CPU) is None
    assert known.find("another", CPU) is None


def test_a_choice_that_no_longer_answers_alike_is_made_again() -> None:
    network = network_of(Cancelling)
    assert chosen_before(network, reference_of(network), Choice("bf16", True, [])) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"precision": "bf16", "trials": 3}'])
def test_a_damaged_choice_is_none(tmp_path: Path, text: str) -> None:
    known = KnownChoices(tmp_path, "auto")
    network = network_of(Convolutions)
    known.keep("digest", CPU, choose_form(network, reference_of(network), "fp32").choice)
    next(tmp_path.glob("*.json")).write_text(text)
    assert known.find("digest", CPU) is None


def test_a_full_disk_costs_only_the_choice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "choices").write_text("a file where a folder should be")
    KnownChoices(tmp_path / "choices", "auto").keep("digest", CPU, Choice("fp32", False, []))
    assert "could not be kept" in caplog.text


def test_what_was_chosen_and_why_is_told(client: TestClient, digit_png: bytes) -> None:
    assert client.post("/v1/models/digits/predict", files={"file": digit_png}).status_code == 200
    production = client.get("/v1/models/digits").json()["production"]
    assert production["execution"]["form"] == "fp32"
    assert production["execution"]["trials"][0]["verdict"].startswith("chosen")


def test_without_a_compiler_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler, loaded = Compiler(tmp_path / "cache", 1), published(tmp_path)
    for _ in range(2):
        compiler.submit(loaded, (1,), always=True)
    compiler.close()
    assert caplog.text.count("no C++ compiler") == 1


def published(tmp_path: Path, options: dict[str, int] | None = None) -> LoadedVersion:
    """A version of `cnn` for 32x32 pictures, loaded."""
    return load_version(version_of(tmp_path, options), CPU, "fp32")


def version_of(tmp_path: Path, options: dict[str, int] | None = None) -> Version:
    from models import networks

    torch.manual_seed(0)
    spec = NetworkSpec(
        name="cnn", options=options or {"channels": 3, "size": 32, "num_classes": 4, "width": 32}
    )
    steps = [
        {"step": "decode"},
        {"step": "color", "mode": "RGB"},
        {"step": "resize", "size": [32, 32]},
        {"step": "scale"},
    ]
    manifest = Manifest(
        network=spec, preprocessing=Preprocessing(steps=steps), labels=("a", "b", "c", "d")
    )
    golden = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    network = networks.build(spec.name, spec.options).eval()
    store = ModelStore(tmp_path / "models")
    return store.publish("small", lambda folder: checkpoint.save(folder, network, manifest, golden))


@pytest.mark.slow
def test_a_compiled_function_serves_once_it_has_proved_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)  # another compiler's in this process
    caplog.set_level(logging.INFO)
    compiler, loaded = Compiler(tmp_path / "cache", 1), published(tmp_path)
    execution = loaded.execution
    compiler.submit(loaded, (1, 2), always=True)
    wrong = Execution(execution.form)
    mistaken = replace(
        loaded,
        execution=wrong,
        reference=replace(loaded.reference, outputs=loaded.reference.outputs + 5.0),  # type: ignore[operator]
    )
    compiler.submit(mistaken, (1,), always=True)
    compiler._thread.submit(lambda: None).result(timeout=400)  # behind the other two
    compiler.close()
    assert "served without compilation" not in caplog.text
    assert not wrong.compiled
    assert "changes golden outputs" in caplog.text
    for size, function in execution.compiled.items():
        rows = execution.form.begin(torch.rand(size, 3, 32, 32))
        with torch.inference_mode():
            torch.testing.assert_close(function(rows), loaded.network(rows), rtol=1e-3, atol=1e-4)
    assert list((tmp_path / "cache").rglob("*.so")), "nothing was kept for the next start"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux tells them")
def test_no_helper_of_a_trial_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads of OpenMP than processors, and those of the device do not spin any more."""
    work = [lambda: None, lambda: torch.rand(1 << 22).exp().sum()]
    num_threads = []
    compiler, loaded = Compiler(tmp_path / "cache", 2), published(tmp_path)
    monkeypatch.setattr(compiler, "_has_compiler", lambda: True)
    monkeypatch.setattr(compiler, "_fill_cache", lambda *_: True)
    for one in work:
        monkeypatch.setattr(compiler, "_adopt", lambda *_, one=one: one())
        compiler.submit(loaded, (1,), always=True)
        compiler._thread.submit(lambda: None).result(timeout=60)
        time.sleep(0.5)
        num_threads.append(len(os.listdir("/proc/self/task")))
    compiler.close()
    assert num_threads[1] <= num_threads[0]


@pytest.mark.slow
def test_a_child_that_fails_leaves_eager_code_serving(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler, loaded = Compiler(tmp_path / "cache", 1), published(tmp_path)
    for file in loaded.version.folder.iterdir():
        file.unlink()
    compiler.submit(loaded, (1,), always=True)
    until = time.monotonic() + 120
    while "served without compilation" not in caplog.text:
        assert time.monotonic() < until
        time.sleep(0.1)
    compiler.close()
    assert not loaded.execution.compiled


@pytest.mark.slow
def test_nobody_imports_the_compiler_on_the_way_to_an_answer() -> None:
    code = "import app.engine.compiling, sys; print('torch._dynamo' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout.strip() == "False", done.stderr
