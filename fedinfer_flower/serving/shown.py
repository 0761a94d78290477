"""What the gateway shows of itself: its models, and the whole status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fedinfer_flower
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.membership import Membership
from fedinfer_flower.serving.status import Chronicle, site_rows

__all__ = ["gateway_status", "models_shown"]


def models_shown(config: GatewayConfig, *, created_at: float) -> tuple[Mapping[str, Any], ...]:
    """Return what `/v1/models` shows of each model."""
    shown = []
    for name, model in config.models.items():
        facts: dict[str, Any] = {
            "id": name,
            "kind": model.kind,
            "created": int(created_at),
            "strategy": model.strategy,
            "timeout_s": model.timeout_s,
        }
        if model.kind == "classifier":
            protection = make_protection(model.protection, dict(model.protection_options))
            facts |= {
                "rule": model.rule,
                "protection": model.protection,
                "protection_options": dict(protection.options()),
                "clear": model.clear,
                "sealed": model.sealed,
                "quorum": model.quorum,
                "min_sites": model.min_sites,
            }
        if model.price is not None:
            facts["price_per_query"] = model.price
        shown.append(facts)
    return tuple(shown)


def gateway_status(
    config: GatewayConfig,
    membership: Membership,
    chronicle: Chronicle,
    *,
    run_id: int,
    ready: bool,
    why: str,
    queue_rows: int,
    rewards: Mapping[str, int],
) -> dict[str, Any]:
    """Return what the dashboard shows, JSON values."""
    return {
        "gateway": {
            "name": config.name,
            "version": fedinfer_flower.__version__,
            "started_at": chronicle.started_at,
            "ready": ready,
            "why": why,
            "run_id": str(run_id),
            "queue_rows": queue_rows,
        },
        "sites": site_rows(membership.members(), membership.cards()),
        **chronicle.facts(config, rewards=rewards),
    }
