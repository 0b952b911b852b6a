"""`/v1/models/{model}/aliases`: which version a name means, who else gets its requests, and why."""

import asyncio
from typing import Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from app.api.json_body import read_json
from app.api.permission import key_name, requires
from app.api.schema import error_answers, shown
from app.engine.live import LiveModels
from app.engine.predictor import Predictor
from app.engine.shadow import ShadowCounts
from app.errors import BadInput, LoadFailed, VersionUnusable
from models.aliases import AliasMove, Split
from models.store import ModelStore, UnknownVersion, Version

_MODEL: Final = Path(description="Name of the model.", examples=["digits"], max_length=80)
_ALIAS: Final = Path(description="Name of the alias.", examples=["production"], max_length=80)
_SHADOW: Final = {
    "version": 3,
    "agreed": 1990,
    "differed": 10,
    "agreement": 0.995,
    "largest_difference": 0.21,
    "dropped": 120,
    "failed": 0,
}
_MOVE: Final = {
    "object": "alias.move",
    "id": 4,
    "alias": "production",
    "version": 2,
    "previous": 1,
    "canary": None,
    "canary_share": 0.0,
    "shadow": None,
    "rollback": False,
    "at": "2026-11-25T12:00:00.000+00:00",
    "by": "anna",
    "why": "better on the new photographs",
    "evidence": {"accuracy": 0.98},
}
_STATE: Final = {
    "object": "alias",
    "alias": "production",
    "version": 2,
    "canary": 4,
    "canary_share": 0.05,
    "shadow": _SHADOW,
    "since": "2026-11-25T12:00:00.000+00:00",
    "by": "anna",
    "why": "better on the new photographs",
    "serving": 2,
    "faults": [],
}


class ShadowState(BaseModel):
    """A shadow and how its answers compare, in this process, since it became live."""

    version: int
    agreed: int = Field(description="Inputs that got the same label.")
    differed: int = Field(description="Inputs that got another.")
    agreement: float | None = Field(description="Share that agreed; null before the first.")
    largest_difference: float = Field(description="Between two probabilities of one label.")
    dropped: int = Field(description="Inputs not copied, because others waited.")
    failed: int = Field(description="Inputs that the shadow did not answer.")


class AliasState(BaseModel):
    """What an alias means now."""

    object: Literal["alias"] = "alias"
    alias: str
    version: int
    canary: int | None = Field(description="The version that answers a share of the requests.")
    canary_share: float
    shadow: ShadowState | None
    since: str
    by: str
    why: str
    serving: int | None = Field(description="The version that this process answers with now.")
    faults: list[str] = Field(description="What the store names and this process cannot serve.")


class AliasList(BaseModel):
    """Every alias of a model."""

    object: Literal["list"] = "list"
    data: list[AliasState]


class MoveRecord(BaseModel):
    """One line of the history."""

    object: Literal["alias.move"] = "alias.move"
    id: int = Field(description="Its place in the model's history, from 1.")
    alias: str
    version: int | None
    previous: int | None
    canary: int | None
    canary_share: float
    shadow: int | None
    rollback: bool
    at: str
    by: str
    why: str
    evidence: dict[str, Any]


class MovePage(BaseModel):
    """A page of the history, the newest first."""

    object: Literal["list"] = "list"
    data: list[MoveRecord]
    has_more: bool


class _Wish(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    expected: int | None = Field(None, description="What it must hold now; null for nothing.")
    why: str = Field("", max_length=1000, description="One sentence for the history.")


class AliasWish(_Wish):
    """Where an alias should lead."""

    version: int = Field(ge=1, description="The version that it holds from now on.")
    canary: int | None = Field(None, ge=1, description="The version that answers a share.")
    canary_share: float = Field(0.0, ge=0, lt=1, description="Share of the requests for it.")
    shadow: int | None = Field(None, ge=1, description="The version that gets a copy of them.")
    evidence: dict[str, Any] = Field(default_factory=dict, description="What speaks for it.")


class RollbackWish(_Wish):
    """Why it should go back."""


def alias_routes(store: ModelStore, live: LiveModels) -> APIRouter:
    """The routes of aliases."""
    router = APIRouter(prefix="/v1/models/{model}", tags=["models"])
    _add_reading(router, store, live)
    _add_moving(router, store, live)
    return router


def _add_reading(router: APIRouter, store: ModelStore, live: LiveModels) -> None:
    @router.get(
        "/aliases",
        summary="List the aliases of a model.",
        responses={
            **shown({"object": "list", "data": [_STATE]}),
            **error_answers(400, 401, 403, 404, 422, 500, 503),
        },
        dependencies=[requires("predict")],
    )
    async def list_aliases(model: str = _MODEL) -> AliasList:
        states = await asyncio.to_thread(store.states, model)
        return AliasList(data=[_state(live, model, move) for move in states.values()])

    @router.get(
        "/aliases/{alias}",
        summary="Describe an alias: its version, its canary, and how its shadow compares.",
        responses={**shown(_STATE), **error_answers(400, 401, 403, 404, 422, 500, 503)},
        dependencies=[requires("predict")],
    )
    async def describe_alias(model: str = _MODEL, alias: str = _ALIAS) -> AliasState:
        return await _described(store, live, model, alias)

    @router.get(
        "/history",
        summary="List what moved an alias, the newest first.",
        responses={
            **shown({"object": "list", "data": [_MOVE], "has_more": False}),
            **error_answers(400, 401, 403, 404, 422, 500, 503),
        },
        dependencies=[requires("predict")],
    )
    async def list_history(
        model: str = _MODEL,
        alias: str | None = Query(None, max_length=80, description="Only of this alias."),
        limit: int = Query(20, ge=1, le=100, description="Most moves in the answer."),
        after: int | None = Query(None, ge=1, description="Only moves older than this `id`."),
    ) -> MovePage:
        found = await asyncio.to_thread(_records, store, model, alias, after)
        return MovePage(data=found[:limit], has_more=len(found) > limit)


def _add_moving(router: APIRouter, store: ModelStore, live: LiveModels) -> None:
    @router.put(
        "/aliases/{alias}",
        summary="Let an alias hold a version, if it holds the expected one now.",
        responses={
            **shown(_MOVE),
            **error_answers(400, 401, 403, 404, 408, 409, 413, 422, 500, 503),
        },
        dependencies=[requires("models:activate")],
        openapi_extra=_body_of(AliasWish, {"version": 2, "expected": 1, "why": "better"}),
    )
    async def set_alias(request: Request, model: str = _MODEL, alias: str = _ALIAS) -> MoveRecord:
        wish = await read_json(request, AliasWish, empty=b"{}")
        split = _split_of(wish)
        wanted = {wish.version, *split.versions()}
        versions = await asyncio.to_thread(lambda: [store.version(model, one) for one in wanted])
        held = await _prepared(live, versions, f"{model}@{alias}")
        _check_alike(held)
        move = await asyncio.to_thread(
            lambda: store.move_alias(
                model,
                alias,
                wish.version,
                **_expected(wish),
                by=key_name(request.scope),
                why=wish.why,
                evidence=wish.evidence,
                split=split,
            )
        )
        await live.refresh(model)
        del held  # until now it kept what the alias needs
        return await _newest(store, model, move)

    @router.post(
        "/aliases/{alias}/rollback",
        summary="Let an alias hold what it held before, and end its canary.",
        responses={
            **shown({**_MOVE, "version": 1, "previous": 2, "rollback": True}),
            **error_answers(400, 401, 403, 404, 408, 409, 413, 422, 500, 503),
        },
        dependencies=[requires("models:activate")],
        openapi_extra=_body_of(RollbackWish, {"expected": 2, "why": "slower"}, required=False),
    )
    async def roll_back(request: Request, model: str = _MODEL, alias: str = _ALIAS) -> MoveRecord:
        wish = await read_json(request, RollbackWish, empty=b"{}")
        expected = _expected(wish)
        back = await asyncio.to_thread(lambda: store.rolls_back_to(model, alias, **expected))
        held = await _prepared(live, [back], f"{model}@{alias}")
        move = await asyncio.to_thread(
            lambda: store.roll_back(
                model,
                alias,
                **expected,
                to=back.number,
                by=key_name(request.scope),
                why=wish.why or "rolled back",
            )
        )
        await live.refresh(model)
        del held  # until now it kept what the alias needs
        return await _newest(store, model, move)

    @router.delete(
        "/aliases/{alias}",
        summary="Remove an alias; the versions stay.",
        responses={
            **shown({**_MOVE, "version": None}),
            **error_answers(400, 401, 403, 404, 409, 422, 500, 503),
        },
        dependencies=[requires("models:activate")],
    )
    async def delete_alias(
        request: Request,
        model: str = _MODEL,
        alias: str = _ALIAS,
        expected: int | None = Query(None, ge=1, description="What it must hold now."),
        why: str = Query("", max_length=1000, description="One sentence for the history."),
    ) -> MoveRecord:
        states = await asyncio.to_thread(store.states, model)
        if alias not in states:
            raise UnknownVersion(f"{model} has no alias {alias[:80]!r}")
        holder = states[alias].to if expected is None else expected
        by = key_name(request.scope)
        move = await asyncio.to_thread(
            lambda: store.move_alias(model, alias, None, expected=holder, by=by, why=why)
        )
        await live.refresh(model)
        return await _newest(store, model, move)


def _split_of(wish: AliasWish) -> Split:
    try:
        split = Split(wish.canary, wish.canary_share, wish.shadow)
    except ValueError as error:
        raise BadInput(str(error), param="canary_share") from None
    if wish.version in split.versions():
        raise BadInput("a canary or a shadow is another version than the one that is held")
    return split


async def _prepared(live: LiveModels, versions: list[Version], alias: str) -> list[Predictor]:
    """What `alias` is about to need, live and proven, before it moves."""
    try:
        return await live.prepare(versions)
    except LoadFailed as error:
        raise VersionUnusable(f"{error}; {alias} stays where it is") from error


def _check_alike(held: list[Predictor]) -> None:
    """Requests that are decoded for one version are handed to the others as they are."""
    kinds = [one.manifest.preprocessing for one in held]
    if any(kind != kinds[0] for kind in kinds):
        raise VersionUnusable(
            "versions that share an alias must prepare their inputs alike, and these do not"
        )


def _expected(wish: _Wish) -> dict[str, Any]:
    return {"expected": wish.expected} if "expected" in wish.model_fields_set else {}


async def _described(store: ModelStore, live: LiveModels, model: str, alias: str) -> AliasState:
    states = await asyncio.to_thread(store.states, model)
    if alias not in states:
        listed = ", ".join(sorted(states)) or "none"
        raise UnknownVersion(f"{model} has no alias {alias[:80]!r}; there are: {listed}")
    return _state(live, model, states[alias])


def _state(live: LiveModels, model: str, move: AliasMove) -> AliasState:
    route = live.route(model, move.alias)
    mirror = live.mirrors().get((model, move.alias, move.shadow or 0))
    counts = ShadowCounts() if mirror is None else mirror.counts
    faults = [] if route is None else list(route.faults)
    failure = None if move.to is None else live.loads.failure((model, move.to))
    return AliasState(
        alias=move.alias,
        version=move.to or 0,
        canary=move.canary,
        canary_share=move.share,
        shadow=None if move.shadow is None else _shadow(move.shadow, counts),
        since=move.at,
        by=move.by,
        why=move.why,
        serving=None if route is None else route.holder.version,
        faults=[*faults, *([failure] if failure else [])],
    )


def _shadow(version: int, counts: ShadowCounts) -> ShadowState:
    compared = counts.num_agreed + counts.num_differed
    return ShadowState(
        version=version,
        agreed=counts.num_agreed,
        differed=counts.num_differed,
        agreement=counts.num_agreed / compared if compared else None,
        largest_difference=counts.largest_difference,
        dropped=counts.num_dropped,
        failed=counts.num_failed,
    )


def _records(
    store: ModelStore, model: str, alias: str | None, after: int | None
) -> list[MoveRecord]:
    store.aliases(model)  # an unknown name is an error
    numbered = list(enumerate(store.history(model), start=1))
    return [
        _record(number, move)
        for number, move in reversed(numbered)
        if (alias is None or move.alias == alias) and (after is None or number < after)
    ]


async def _newest(store: ModelStore, model: str, move: AliasMove) -> MoveRecord:
    moves = await asyncio.to_thread(store.history, model)
    number = next((n for n in range(len(moves), 0, -1) if moves[n - 1] == move), len(moves))
    return _record(number, move)


def _record(number: int, move: AliasMove) -> MoveRecord:
    return MoveRecord(
        id=number,
        alias=move.alias,
        version=move.to,
        previous=move.previous,
        canary=move.canary,
        canary_share=move.share,
        shadow=move.shadow,
        rollback=move.rollback,
        at=move.at,
        by=move.by,
        why=move.why,
        evidence=move.evidence,
    )


def _body_of(kind: type[BaseModel], example: Any, *, required: bool = True) -> dict[str, Any]:
    schema = kind.model_json_schema()
    return {
        "requestBody": {
            "required": required,
            "content": {"application/json": {"schema": schema, "example": example}},
        }
    }
