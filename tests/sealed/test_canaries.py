"""No error text and no log record holds an input, a score or a key."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.wire.identity import Identity

from .conftest import CANARY_NUMBER, PROTECTIONS, ROWS, replaced

CANARY_ROWS = np.full((2, ROWS.shape[1]), CANARY_NUMBER)
CANARY_TEXT = "1234.56"


def secrets_of(*identities: Identity) -> list[str]:
    return [secret for identity in identities for secret in identity.to_secret().values()]


def assert_clean(texts: list[str], *identities: Identity) -> None:
    assert texts
    for text in texts:
        assert CANARY_TEXT not in text
        for secret in secrets_of(*identities):
            assert secret not in text


def texts_of(caplog, *errors: BaseException) -> list[str]:
    records = [r for r in caplog.records if r.name.startswith("fedinfer_flower")]
    assert all(not record.exc_info for record in records)
    chained = [e for error in errors for e in (error, error.__cause__) if e is not None]
    return [r.getMessage() for r in records] + [str(e) + repr(e) for e in chained]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_answered_query_leaves_no_trace_of_rows(make_federation, debug_log, protection):
    federation = make_federation()
    me = Identity.generate()
    querier, job, result = federation.ask(federation.strategy(protection), CANARY_ROWS, identity=me)
    querier.open(result.combined)
    debug_log.set_level(logging.DEBUG)
    texts = [*texts_of(debug_log), result.summary(), repr(job), repr(result.combined)]
    assert_clean([*texts, repr(querier), repr(result.receipt)], me, querier.identity)


def altered(envelope):
    if envelope.kind.value != "sealed-query":
        return envelope
    body = bytearray(envelope.section("body"))
    body[-1] ^= 1
    return replaced(envelope, sections={"body": bytes(body)})


FAILURES = {
    "altered": {"push": altered},
    "expired": {"ttl_s": 1e-9},
    "unknown querier": {"options": {"querier_key_ids": ["0" * 64]}},
    "unknown peers": {"options": {"peer_key_ids": ["0" * 64]}},
    "protection": {"options": {"protections": ["he"]}},
    "budget": {"budget": 0.01},
    "model": {"rows": np.full((2, 9), CANARY_NUMBER)},
    "classes": {"classes": ("x", "y")},
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("protection", ["secagg", "secagg+dp"])
def test_refused_query_leaves_no_trace_of_rows(
    make_federation, home, debug_log, protection, failure
):
    options = dict(failure.get("options", {}))
    if "budget" in failure:
        cap = failure["budget"]
        options |= {
            "home": home,
            "budget": BudgetPolicy(epsilon_per_querier=cap, epsilon_global=cap),
        }
    federation = make_federation(**options)
    federation.grid.on_push = failure.get("push", federation.grid.on_push)
    me = Identity.generate()
    asked = {k: failure[k] for k in ("ttl_s", "classes") if k in failure}
    with pytest.raises(FedInferError) as caught:
        federation.ask(
            federation.strategy(protection),
            failure.get("rows", CANARY_ROWS),
            identity=me,
            **asked,
        )
    assert_clean(texts_of(debug_log, caught.value), me)
    # Nor do the replies of the sites.
    haystack = b"".join(federation.grid.received)
    for dtype in ("<f4", "<f8"):
        assert np.array(CANARY_NUMBER, dtype=dtype).tobytes() not in haystack
    assert CANARY_TEXT.encode() not in haystack


def test_model_that_quotes_its_rows_is_not_heard(make_federation, debug_log):
    federation = make_federation()

    def load(context):
        def model(rows):
            raise ValueError(f"cannot answer {rows.tolist()}")

        from fedinfer_flower import LocalModel

        return LocalModel(model=model, classes=("a", "b"), outputs="logits")

    federation.load_model = load
    federation.restart()
    with pytest.raises(FedInferError) as caught:
        federation.ask(federation.strategy("secagg"), CANARY_ROWS)
    assert "FI404" in str(caught.value)
    assert_clean(texts_of(debug_log, caught.value))


def test_answer_that_does_not_open_is_refused_without_quoting_it(make_federation, debug_log):
    import dataclasses

    federation = make_federation()
    querier, _, result = federation.ask(federation.strategy("secagg"), CANARY_ROWS)
    (batch,) = result.combined.batches
    total = bytearray(batch.total)
    total[-2] ^= 0x55
    combined = dataclasses.replace(
        result.combined, batches=(dataclasses.replace(batch, total=bytes(total)),)
    )
    with pytest.raises(FedInferError) as caught:
        querier.open(combined)
    text = str(caught.value)
    for score in federation.probabilities(CANARY_ROWS).sum(axis=0).ravel():
        if 0.01 < score % 1.0 < 0.99:
            assert f"{score:.3f}" not in text
    assert_clean(texts_of(debug_log, caught.value), querier.identity)


def test_objects_with_secrets_do_not_show_them(make_federation):
    federation = make_federation()
    directory = federation.strategy("he").directory(federation.grid)
    querier = Querier(protection="he")
    job = querier.ask(CANARY_ROWS, directory=directory)
    objects = (querier, querier.identity, querier._keys, job, job.batches, directory)
    shown = [repr(thing) for thing in objects]
    assert_clean(shown, querier.identity)
