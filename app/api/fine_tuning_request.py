"""What a request for fine-tuning asks, checked: it becomes the options of a job."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from app.errors import BadInput, NotFound
from app.evaluation.question import Question
from app.evaluation.rule import Rule
from app.examiner import options_of
from app.jobs.job import Kind
from models import networks
from models.device import choose_device, thread_count
from models.networks import TORCHVISION
from models.store import PRODUCTION, ModelStore
from models.store_error import StoreError
from training.config import ConfigError, NumProcesses
from training.dataset_store import DatasetStore
from training.faults import DatasetError
from training.methods import FROM_SCRATCH, LINEAR_PROBE, METHODS, ONE_IS_ENOUGH, schemas

MAX_METADATA: Final = 16
NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9_-])?")
Short = Annotated[str, StringConstraints(max_length=64)]
Long = Annotated[str, StringConstraints(max_length=512)]


def _hyperparameters(method: str) -> Any:
    """Any object here, so that all that is wrong with it is said at once; in /docs, each option."""
    return Annotated[dict[str, Any], WithJsonSchema(schemas()[method])]


class ProbeOptions(BaseModel):
    """Of a linear probe."""

    model_config = ConfigDict(extra="forbid")
    hyperparameters: _hyperparameters("linear_probe") = Field(  # type: ignore[valid-type]
        default_factory=dict, description="What is not given has its default."
    )


class TuneOptions(BaseModel):
    """Of fine-tuning all layers."""

    model_config = ConfigDict(extra="forbid")
    hyperparameters: _hyperparameters("fine_tune") = Field(  # type: ignore[valid-type]
        default_factory=dict, description="What is not given has its default."
    )


class FreshOptions(BaseModel):
    """Of training from fresh weights."""

    model_config = ConfigDict(extra="forbid")
    hyperparameters: _hyperparameters("from_scratch") = Field(  # type: ignore[valid-type]
        default_factory=dict, description="What is not given has its default."
    )


class MethodRequest(BaseModel):
    """How the weights are made; only the options of the method that is named may be given."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["linear_probe", "fine_tune", "from_scratch"] = Field(
        "linear_probe", description="`GET /v1/fine_tuning/methods` describes each."
    )
    linear_probe: ProbeOptions | None = Field(None, description="Options of `linear_probe`.")
    fine_tune: TuneOptions | None = Field(None, description="Options of `fine_tune`.")
    from_scratch: FreshOptions | None = Field(None, description="Options of `from_scratch`.")


def wanted_metadata(query: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What `metadata[NAME]=VALUE` in an address asks for.

    Raises:
        BadInput: it is written in another way.
    """
    found = {}
    for key, value in query:
        name = re.fullmatch(r"metadata\[(.{1,64})\]", key, re.DOTALL)
        if name is not None:
            found[name[1]] = value
        elif key.startswith("metadata"):
            raise BadInput("jobs are chosen by metadata[NAME]=VALUE", param="metadata")
    if len(found) > MAX_METADATA:
        raise BadInput(f"a job has {MAX_METADATA} metadata at most", param="metadata")
    return found


class PromoteRequest(BaseModel):
    """An alias that moves to the new version if a rule holds."""

    model_config = ConfigDict(extra="forbid")

    alias: str = Field(
        PRODUCTION, description="The alias to move.", pattern=r"^[a-z][a-z0-9_-]{0,63}$"
    )
    rule: Rule = Field(
        Rule.model_validate({"min_absolute_change": 0.0}),
        description="What must hold; not worse than the holder, if not given.",
    )
    dataset: str | None = Field(
        None,
        max_length=64,
        description="Dataset to measure both on, of which only what neither has seen counts. If "
        "not given, the validation file, or what the training file holds out: its validation or "
        "test part, or all of it in folds.",
    )


class JobRequest(BaseModel):
    """One run: from what, with what, how."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "model": "digits",
                "training_file": "digits",
                "method": {"type": "linear_probe"},
            }
        },
    )

    model: str = Field(
        min_length=1,
        max_length=200,
        description="The base: `digits`, `digits@production`, `digits:3`, or `torchvision/NAME` "
        "with weights that are here; for `from_scratch` any network of `/v1/fine_tuning/bases`, or "
        "`cnn`, `mlp` and every `torchvision/NAME`.",
        examples=["digits"],
    )
    training_file: str = Field(
        max_length=64, description="Id of a dataset.", examples=["dset-6730e52205eb541f8a97d7e3"]
    )
    validation_file: str | None = Field(
        None, max_length=64, description="Id of a dataset that the result is measured on."
    )
    method: MethodRequest = Field(
        default_factory=lambda: MethodRequest.model_validate({}),
        description="How the weights are made.",
    )
    seed: int = Field(
        0, ge=0, lt=1 << 53, description="Everything random in the run follows from this number."
    )
    suffix: str | None = Field(
        None,
        max_length=64,
        description="The model that the result becomes a version of; that of the base, if not "
        "given.",
        examples=["parts"],
    )
    picture_size: int = Field(
        0, ge=0, le=1024, description="Pixels a side for `from_scratch`; 0 keeps a common size."
    )
    num_processes: NumProcesses = 1
    metadata: dict[Short, Long] | None = Field(
        None, max_length=MAX_METADATA, description="Sixteen short texts of your own at most."
    )
    promote: PromoteRequest | None = Field(
        None, description="Move an alias to the new version if a rule holds."
    )
    webhook: str | None = Field(
        None,
        max_length=2000,
        description="A URL that is told when the job has ended or was paused, if whoever runs the "
        "server lists its host.",
        examples=["https://hooks.example.com/tuned"],
    )
    dry_run: bool = Field(
        False, description="Whether to answer what would happen, and create nothing."
    )

    @property
    def fingerprint(self) -> str:
        """Of what was asked, for an idempotency key."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class Places:
    """Where a request's names are looked up.

    Attributes:
        home: the home folder.
        datasets: the folder of datasets.
        data_root: the folder of built-in ones.
        device: where jobs compute.
        max_processes: that may share one job; 0 is one a GPU or processor of this machine.
    """

    home: Path
    datasets: Path
    data_root: Path
    device: str
    max_processes: int = 0


def job_options(wanted: JobRequest, store: ModelStore, places: Places) -> dict[str, Any]:
    """The options of the job that `wanted` asks for; reads the disk.

    Raises:
        BadInput: an option is unknown or out of range; `param` is its name.
        NotFound: there is no such base or dataset.
    """
    method = wanted.method.type
    given = _given(wanted.method)
    _check_processes(wanted.num_processes, method, places)
    base = _base(wanted.model, method, store, places.home)
    for name in ("training_file", "validation_file"):
        _check_dataset(getattr(wanted, name), name, places.datasets)
    request = {
        "base": base,
        "dataset": wanted.training_file,
        "validation_dataset": wanted.validation_file,
        "method": method,
        "hyperparameters": given,
        "name": _name(wanted, base),
        "seed": wanted.seed,
        "picture_size": wanted.picture_size,
        "compute": {"device": places.device, "num_processes": wanted.num_processes},
    }
    options: dict[str, Any] = {
        "method": method,
        "name": request["name"],
        "request": request,
        "suffix": wanted.suffix,
        "metadata": wanted.metadata,
    }
    return {**options, **_judgement(wanted, str(request["name"]), places)}


def _given(method: MethodRequest) -> dict[str, Any]:
    """The hyperparameters, each of them known and within its bounds."""
    for other in METHODS:
        if other != method.type and getattr(method, other) is not None:
            raise BadInput(f"{other} has options, and the method is {method.type}", param=other)
    options = getattr(method, method.type)
    given: dict[str, Any] = options.hyperparameters if options else {}
    try:
        METHODS[method.type].model_validate(given)
    except ValidationError as error:
        param = str(error.errors()[0]["loc"][0])
        try:
            METHODS[method.type].of(**given)
        except ConfigError as told:
            raise BadInput(str(told), param=param) from None
    return given


def _check_processes(num_processes: int, method: str, places: Places) -> None:
    """That they are of use, and no more than a job may take."""
    if num_processes == 1:
        return
    if method == LINEAR_PROBE:
        raise BadInput(ONE_IS_ENOUGH, param="num_processes")
    most = places.max_processes or _num_here(places.device)
    if num_processes > most:
        raise BadInput(
            f"num_processes is {num_processes}, and a job takes {most} at most here",
            param="num_processes",
        )


def _num_here(device: str) -> int:
    """GPUs of this machine where jobs compute on such, else its processors."""
    if choose_device(device).type == "cuda":
        return torch.cuda.device_count()
    return thread_count()


def _base(reference: str, method: str, store: ModelStore, home: Path) -> str:
    """The base by its exact name: a version, not an alias that may have moved when it begins."""
    is_network = networks.is_built_in(reference) and reference not in store.names()
    if is_network and (method == FROM_SCRATCH or reference.startswith(TORCHVISION)):
        _check_network(reference, method, home)
        return reference
    try:
        return str(store.resolve(reference))
    except StoreError as error:
        if is_network:
            raise BadInput(
                f"{reference} is a network without weights: only from_scratch begins with none",
                param="model",
            ) from None
        raise NotFound(
            f"{error}; a base is a version of the store or torchvision/NETWORK", param="model"
        ) from None


def _check_network(reference: str, method: str, home: Path) -> None:
    from training.backbone import imported_versions, weights_file

    if not networks.is_registered(reference):
        raise NotFound(f"there is no network {reference[:80]!r}", param="model")
    if method == FROM_SCRATCH or weights_file(reference, home) is not None:
        return
    versions = imported_versions(ModelStore(home / "models"))
    if not any(one.manifest().network.name == reference for one in versions):
        raise NotFound(
            f"there are no weights of {reference} here; import them, or take from_scratch",
            param="model",
        )


def _check_dataset(dataset_id: str | None, param: str, folder: Path) -> None:
    if dataset_id is None:
        return
    try:
        stored = DatasetStore(folder).get(dataset_id)
    except DatasetError as error:
        raise NotFound(str(error), param=param) from None
    try:
        stored.check_usable()
    except DatasetError as error:
        raise BadInput(str(error), param=param) from None


def _name(wanted: JobRequest, base: str) -> str:
    """The model that the result is a version of."""
    name = wanted.suffix or base.removeprefix(TORCHVISION).partition(":")[0]
    if not NAME.fullmatch(name):
        raise BadInput(
            f"{name!r} cannot be a model's name: lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit",
            param="suffix",
        )
    return name


def _judgement(wanted: JobRequest, name: str, places: Places) -> dict[str, Any]:
    """What is asked of the version once it is made: the gate, or else an evaluation."""
    promote = wanted.promote
    named = None if promote is None else promote.dataset
    _check_dataset(named, "promote.dataset", places.datasets)
    dataset = named or wanted.validation_file or wanted.training_file
    question = Question(
        model=name,
        dataset=str(places.datasets / dataset),
        shown_as=dataset,
        data_root=str(places.data_root),
    )
    if promote is None:
        return {Kind.EVALUATION.value: options_of(question)}
    rule = promote.rule.model_dump(exclude_none=True)
    proposal = {"name": name, "alias": promote.alias, "rule": rule}
    return {Kind.PROMOTION.value: options_of(question, proposal)}
