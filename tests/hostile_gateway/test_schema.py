"""Requests made from the gateway's own schema, right and wrong, on every route."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.rate_limit import FailureLimit, RequestLimit

pytest.importorskip("schemathesis", reason="fuzzes by the schema")


def test_every_route_keeps_to_the_schema(board, config, keys, key):
    """No status, type or shape that the schema does not name, and no fault of the gateway."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    app = create_app(
        board,
        config,
        keys=keys,
        requests=RequestLimit(per_s=1e6, burst=1e6),
        failures=FailureLimit(per_s=1e6, burst=1e6),
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    n_routes = n_cases = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        n_routes += 1
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=12,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                nonlocal n_cases
                n_cases += 1
                case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, checks=checks)

            with contextlib.suppress(Unsatisfiable):  # nothing about this route can be wrong
                ask()
    assert n_routes >= 15
    assert n_cases >= 100
