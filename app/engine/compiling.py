"""Compiled forms, made in the background and only kept where they prove themselves.

A child process of the idle scheduling class compiles first and fills the compiler's cache on disk:
it holds no lock that requests need, and may crash or take long. Then this process takes the
functions out of the cache, one batch size after the other.

Functions are compiled for one batch size, without guards: no request can ever start a compiler.
"""

import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from app.engine.device_thread import compute_with
from app.engine.execution import LEAST_GAIN, Execution, Reference, interleaved_best
from app.engine.loading import LoadedVersion
from models import checkpoint
from models.forms import Form, Precision, other_forms, plain_form

log = logging.getLogger(__name__)

CHILD_TIME_S: Final = 600.0
REPETITIONS: Final = 5
CACHE_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True, slots=True)
class Order:
    """What a child is told to compile.

    Attributes:
        folder: of the version.
        precision, arranged: the form, see `models.forms.Form`.
        sizes: batch sizes, in this order.
        num_threads: which the compiled code will use; it is built into it.
    """

    folder: str
    precision: Precision
    arranged: bool
    sizes: tuple[int, ...]
    num_threads: int


class Compiler:
    """One thread that compiles for live versions, one after the other.

    Args:
        cache: folder of the compiler's cache, shared by replicas of this processor type.
        num_threads: that torch computes with.
    """

    def __init__(self, cache: Path, num_threads: int) -> None:
        self._cache = cache
        self._num_threads = num_threads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._child: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._told_missing = False

    def submit(self, loaded: LoadedVersion, sizes: Sequence[int], *, always: bool = False) -> None:
        """Compile for `sizes` in the background, and let `loaded` use what proves itself.

        A version that nobody holds any more by then is skipped. Networks that are too small to
        gain are too, unless `always`; and those on GPUs, and in int8, whose layers are fused.
        """
        if loaded.device.type != "cpu" or self._closing.is_set() or not self._has_compiler():
            return
        execution = loaded.execution
        form = execution.form
        if form.precision != "int8" and (execution.is_worthwhile or always):
            order = Order(
                str(loaded.version.folder),
                form.precision,
                form.arranged,
                tuple(sizes),
                self._num_threads,
            )
            held, name = weakref.ref(execution), str(loaded.version)
            self._thread.submit(self._compile, name, order, held, loaded.reference)

    def close(self) -> None:
        """End the child and the thread; what is half done is left."""
        self._closing.set()
        if self._child is not None:
            self._child.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        # Libraries of the compiler take what is frozen at the end for a leak, and say so at length.
        gc.unfreeze()

    def _has_compiler(self) -> bool:
        found = shutil.which(os.environ.get("CXX", "g++")) is not None
        if not found and not self._told_missing:
            self._told_missing = True
            log.warning("there is no C++ compiler here: networks are served without compilation")
        return found

    def _compile(
        self, name: str, order: Order, held: "weakref.ref[Execution]", reference: Reference
    ) -> None:
        try:
            if self._fill_cache(name, order):
                # On a thread that ends: those that OpenMP gives it end with it. While there are
                # more of them than processors, none spins before it sleeps, and a compiled forward
                # of the device's thread, which waits for its helper a hundred times, takes a
                # quarter longer.
                adopting = threading.Thread(
                    target=self._adopt_all, args=(name, order, held, reference), name="adopt"
                )
                adopting.start()
                adopting.join()
        except Exception:
            # The edge of a background task: eager code serves on.
            log.exception("%s is served without compilation", name)

    def _adopt_all(
        self, name: str, order: Order, held: "weakref.ref[Execution]", reference: Reference
    ) -> None:
        try:
            compute_with(order.num_threads)
            for size in order.sizes:
                self._adopt(name, size, held, reference)
        except Exception:
            log.exception("%s is compiled no further", name)

    def _fill_cache(self, name: str, order: Order) -> bool:
        self._cache.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(CACHE_VARIABLE, str(self._cache))
        command = [sys.executable, "-m", "app.engine.compiling", json.dumps(asdict(order))]
        self._child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, stderr = self._child.communicate(timeout=CHILD_TIME_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            _, stderr = self._child.communicate()
        code = self._child.returncode
        if code and not self._closing.is_set():
            reason = stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"code {code}"]
            log.warning("%s is served without compilation: %s", name, reason[0][:300])
        return code == 0 and not self._closing.is_set()

    def _adopt(
        self, name: str, size: int, held: "weakref.ref[Execution]", reference: Reference
    ) -> None:
        execution = held()
        if execution is None or self._closing.is_set():
            return
        form, rows = execution.form, reference.rows(size)
        # What is there now will stay: the collector need not walk it for every compiled graph,
        # which would stop all threads for a third of a second.
        gc.freeze()
        function = compiled(form, size, rows.shape[1:])
        gc.freeze()

        def whole(batch: Tensor) -> Tensor:
            return form.finish(function(form.begin(batch)))

        with torch.inference_mode():
            _, fault = Reference(rows, _outputs(reference, size)).fault(whole, form.precision)
            eager_s, compiled_s = interleaved_best([form, whole], rows, REPETITIONS)
        if fault:
            log.warning("%s, compiled for %d rows, %s; it is not served", name, size, fault)
        elif compiled_s > (1 - LEAST_GAIN) * eager_s:
            log.info("%s, compiled for %d rows, is no quicker; it is not served", name, size)
        else:
            execution.compiled[size] = function
            log.info(
                "%s is compiled for %d rows: %.2f times as fast", name, size, eager_s / compiled_s
            )


def compiled(form: Form, size: int, row_shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """A function for batches of exactly `size` rows, as `form.begin` gives them."""
    import torch._inductor

    example = form.begin(torch.zeros(size, *row_shape, device=_device_of(form)))
    with torch.no_grad():
        program = torch.export.export(form.network, (example,), strict=False)
        function: Callable[[Tensor], Tensor] = torch._inductor.compile(program.module(), [example])
        function(example)
    return function


def _device_of(form: Form) -> torch.device:
    return next(form.network.parameters()).device


def _outputs(reference: Reference, size: int) -> Tensor | None:
    if reference.outputs is None:
        return None
    return Reference(reference.outputs, None).rows(size)


def main(text: str) -> None:
    """The child: compile everything once, so that the cache holds it."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    document = json.loads(text)
    order = Order(**document | {"sizes": tuple(document["sizes"])})
    torch.set_num_threads(order.num_threads)
    loaded = checkpoint.load(Path(order.folder))
    form = plain_form(loaded.network)
    if order.arranged or order.precision != "fp32":
        form = next(
            one
            for one in other_forms(loaded.network, order.precision)
            if one.arranged is order.arranged
        )
    for size in order.sizes:
        compiled(form, size, loaded.manifest.preprocessing.input_shape)


if __name__ == "__main__":
    main(sys.argv[1])
