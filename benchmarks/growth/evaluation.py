"""`python -m benchmarks.growth.evaluation FOLDER`: one evaluation.

Prints its peak memory in bytes and its processor time in seconds.
"""

import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path

from app.evaluation.evaluator import Evaluator
from app.evaluation.question import Question
from benchmarks.evaluate import PATIENCE_S, publish_cnn, started
from models.store import ModelStore


async def evaluated(data: Path, store: ModelStore) -> float:
    """Seconds of CPU that the evaluation of a folder of pictures takes."""
    question = Question(str(publish_cnn(store)), str(data), data.name)
    async with started(store) as engine:
        await engine.live.get(*question.model.split(":"))
        began = time.process_time()
        await Evaluator(engine.live, 1).evaluate(question, time.monotonic() + PATIENCE_S)
        return time.process_time() - began


def main(data: str) -> None:
    """Evaluate a cnn with random weights on a folder of pictures."""
    with tempfile.TemporaryDirectory() as folder:
        cpu_s = asyncio.run(evaluated(Path(data), ModelStore(Path(folder) / "models")))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, cpu_s)


if __name__ == "__main__":
    main(*sys.argv[1:])
