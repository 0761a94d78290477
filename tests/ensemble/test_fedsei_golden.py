"""FedSEI's rules against vectors from an independent implementation of its formulas."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from fedinfer_flower.ensemble import SiteContext, make_rule

GOLDEN = Path(__file__).parents[1] / "golden"
VECTORS = json.loads((GOLDEN / "fedsei.json").read_text())

# Float64 arithmetic in another order, and FedSEI's 1e-12 inside the entropy's logarithm.
TOLERANCE = 1e-9


def combined(rule):
    logits = np.array(VECTORS["logits_kbc"])
    present = np.ones(logits.shape[-1], dtype=np.bool_)
    sites = [
        SiteContext(present=present, augmented_tbc=np.array(a)) for a in VECTORS["augmented_ktbc"]
    ]
    total = rule.combine(np.stack([rule.score(z, s) for z, s in zip(logits, sites, strict=True)]))
    return total, len(logits)


@pytest.mark.parametrize("name", sorted(set(VECTORS["expected_bc"]) - {"mean-logit"}))
def test_fedsei_rule_for_golden_logits_gives_golden_answer(name):
    rule = make_rule(name)
    expected = np.array(VECTORS["expected_bc"][name])

    total, n_sites = combined(rule)
    normalised = expected / expected.sum(axis=1, keepdims=True)

    np.testing.assert_allclose(
        rule.probabilities(total, n_sites), normalised, rtol=0.0, atol=TOLERANCE
    )
    if name != "mean-probability" and name != "tta-soft":  # whose totals are sums, not means
        np.testing.assert_allclose(rule.class_totals(total), expected, rtol=0.0, atol=TOLERANCE)


def test_mean_logit_for_golden_logits_gives_golden_answer_up_to_a_shift():
    expected = np.array(VECTORS["expected_bc"]["mean-logit"])

    total, n_sites = combined(make_rule("mean-logit"))

    # Only differences between classes mean anything; the rule centres each row.
    centred = expected - expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(total / n_sites, centred, rtol=0.0, atol=TOLERANCE)


def test_golden_file_is_what_its_maker_writes():
    # Exact up to the last digit of another machine's libm.
    again = runpy.run_path(str(GOLDEN / "make_fedsei.py"))["main"]()

    assert again.keys() == VECTORS.keys()
    for name, rows in VECTORS["expected_bc"].items():
        np.testing.assert_allclose(again["expected_bc"][name], rows, rtol=0.0, atol=1e-12)
    for name in ("logits_kbc", "augmented_ktbc"):
        np.testing.assert_allclose(again[name], VECTORS[name], rtol=0.0, atol=1e-12)
