"""``GET`` and ``POST /layout``, and the guard in front of what changes the server."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Request

from fly_jax.errors import ConfigError, LayoutError
from fly_jax.policy.names import STATIC, canonical
from serving.engine_client import EngineClient
from serving.errors import AUTHENTICATION, PERMISSION, ApiError
from serving.middleware import bearer_token, same_secret
from serving.protocol import LayoutRequest
from serving.state import state_of

router = APIRouter()

MAX_HISTORY = 20
PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


async def require_admin(request: Request) -> None:
    """Lets an administrator through.

    A web page that the administrator happens to have open can make their browser post to loopback, or to a name that
    it has rebound to loopback: a browser then says where the page is from, and cannot send JSON without being asked.

    Raises:
        ApiError: 415 not JSON; 401 no or a wrong admin key; 403 not from this machine.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "send Content-Type: application/json")
    if not all(_is_loopback_origin(origin) for origin in request.headers.getlist("origin")):
        raise _forbidden("requests from web pages of other hosts are refused")
    admin_key = state_of(request).options.admin_key
    if admin_key is None:
        _require_local(request)
    elif not _has_key(request, admin_key):
        message = "missing or wrong admin key: send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
        headers = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, type=AUTHENTICATION, code="invalid_admin_key", headers=headers)


@router.head("/layout", include_in_schema=False)
@router.get("/layout")
async def get_layout(request: Request) -> dict[str, Any]:
    """Where the engine is, who decides, and the latest switches, oldest first."""
    stats = state_of(request).engine.latest_stats()
    history = [dataclasses.asdict(report) for report in stats.switch_history[-MAX_HISTORY:]]
    return {
        "layout": stats.layout,
        "target_layout": stats.target_layout,
        "policy": stats.policy,
        "strategy": stats.strategy,
        "last_decision": stats.last_decision,
        "decisions": stats.decisions,
        "last_switch": history[-1] if history else None,
        "switch_history": history,
    }


@router.post("/layout", dependencies=[Depends(require_admin)])
async def set_layout(body: LayoutRequest, request: Request) -> dict[str, Any]:
    """Returns when the switch is complete. Whoever asked may leave meanwhile: a switch begun is carried through."""
    engine = state_of(request).engine
    if body.layout is not None:
        return await _switch(engine, body.layout, body.strategy, body.policy)
    assert body.policy is not None
    try:
        policy = await engine.set_policy(body.policy)
    except ConfigError as error:
        raise _invalid_policy(error) from error
    return {"layout": (await engine.stats()).layout, "policy": policy}


async def _switch(engine: EngineClient, layout: str, strategy: str | None, policy: str | None) -> dict[str, Any]:
    try:
        report = await engine.switch(layout, strategy, policy)
    except LayoutError:
        raise
    except ConfigError as error:  # names were checked with the body: the switch was made, the policy cannot follow it
        raise _invalid_policy(error) from error
    # Asking the engine for it could find what somebody else has asked for since.
    after = STATIC if policy is None else canonical(policy)
    return {**dataclasses.asdict(report), "policy": after}


def _invalid_policy(error: ConfigError) -> ApiError:
    return ApiError(400, str(error), param="policy", code="invalid_policy")


def _has_key(request: Request, admin_key: str) -> bool:
    given = (bearer_token(request.headers), request.headers.get("x-api-key", ""))
    return any(same_secret(key, admin_key) for key in given)


def _require_local(request: Request) -> None:
    """Behind a proxy every peer looks local, so a proxy's traces count as a peer from elsewhere."""
    if any(name in request.headers for name in PROXY_HEADERS):
        raise _forbidden("without an admin key, requests through a proxy are refused")
    if request.client is None or not is_loopback(request.client.host):
        raise _forbidden("without an admin key, only requests from this machine are accepted")
    if not _is_loopback_authority(request.headers.get("host", "")):
        raise _forbidden("without an admin key, the Host must be localhost or a loopback address")


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, type=PERMISSION, code="forbidden")


def is_loopback(host: str) -> bool:
    """``localhost`` and loopback addresses, IPv4 written as IPv6 included."""
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _is_loopback_authority(authority: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{authority}").hostname or "")
    except ValueError:
        return False


def _is_loopback_origin(origin: str) -> bool:
    scheme, separator, authority = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and _is_loopback_authority(authority)
