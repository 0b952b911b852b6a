"""Shared by all tests: one thread, so that the suite is quick and repeatable; where real data lies."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data (`PYTORCHLIB_TEST_DATA`); a test that needs it skips without it."""
    folder = Path(os.environ.get("PYTORCHLIB_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"PYTORCHLIB_TEST_DATA names no folder: {folder}")
    return folder


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
