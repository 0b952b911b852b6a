"""`models/FORMAT.md` says what the code does: every field is in it, and its examples run."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel

from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing, Step

TEXT = (Path(__file__).resolve().parent.parent / "models" / "FORMAT.md").read_text("utf-8")


def block(language: str) -> str:
    """The only code block in this language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return str(found)


def rows(heading: str) -> set[str]:
    """First cells of the table below a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic class in a type, however deep."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in models_in(part)]


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        below = models_in(field.annotation)
        if not below or below[0].__name__ in STEPS:
            yield prefix + name
        else:
            several = "*." if str(field.annotation).startswith("dict") else ""
            yield from leaves(below[0], f"{prefix}{name}.{several}")


STEPS = {step.__name__: step for step in models_in(Step)}


def step_rows() -> Iterator[str]:
    for step in STEPS.values():
        name = step.model_fields["step"].default
        yield name
        yield from (f"{name}.{option}" for option in step.model_fields if option != "step")


def test_every_field_of_the_manifest_is_described_and_no_other() -> None:
    assert rows("manifest.json") == set(leaves(Manifest))


def test_every_step_and_option_is_described_and_no_other() -> None:
    assert len(STEPS) == 9
    assert rows("Preprocessing steps") == set(step_rows())


def test_the_walk_finds_a_field_wherever_it_is() -> None:
    class Deeper(BaseModel):
        depth: int

    class Extended(Manifest):
        author: str
        more: Deeper
        parts: dict[str, Deeper]

    assert set(leaves(Extended)) - set(leaves(Manifest)) == {
        "author",
        "more.depth",
        "parts.*.depth",
    }


def test_the_example_is_a_manifest_that_is_read() -> None:
    manifest = checkpoint.parse_manifest(block("json").encode())
    assert manifest.labels == ("zero", "one", "two")
    assert networks.build(manifest.network.name, manifest.network.options)


def test_every_file_and_limit_is_named() -> None:
    for fact in (checkpoint.WEIGHTS, checkpoint.MANIFEST, checkpoint.GOLDEN):
        assert f"| `{fact}` |" in TEXT
    assert f"at most {checkpoint.MAX_MANIFEST_BYTES // 2**20} MiB" in TEXT
    assert f"up to {checkpoint.MAX_GOLDEN_SAMPLES} of them" in TEXT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose `first` output is always the largest."""
    options = {"inputs": 4, "num_classes": 2, "hidden": []}
    network = networks.build("mlp", options)
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([1.0, 0.0])
    manifest = Manifest(
        network=NetworkSpec(name="mlp", options=options),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [4]}]),
        labels=("first", "second"),
    )
    checkpoint.save(tmp_path / "a", network, manifest, torch.randn(3, 4))
    return tmp_path / "a"


def by_hand(folder: Path) -> subprocess.CompletedProcess[str]:
    """The example, in a process of its own."""
    command = [sys.executable, "-I", "-c", block("python")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.slow  # a process that imports torch
def test_a_checkpoint_is_read_by_hand_as_the_page_says(folder: Path) -> None:
    done = by_hand(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mlp 10\nfirst\n"
    manifest = folder / checkpoint.MANIFEST
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace('"second"', '"third"'))
    assert "the digest is another's" in by_hand(folder).stderr
