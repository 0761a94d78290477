from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import (
    BindingError,
    CapacityError,
    EnvelopeError,
    InvalidCiphertextError,
    InvalidScoresError,
    InvalidValueError,
    KeyAtCoordinatorError,
    MissingExtraError,
    ProtectionRefusedError,
    ProtocolError,
    SizeLimitError,
)
from fedinfer_flower.privacy import KeyPair, ScorePlan, base, he_context
from fedinfer_flower.privacy.he import HomomorphicEncryption, ckks_tolerance
from fedinfer_flower.privacy.he_schemes import SCHEMES

RULE = RULES.get("mean-probability")()


def plan_of(n_sites: int, *, width: int = 10, bound: float = 1.0) -> ScorePlan:
    return ScorePlan(
        width=width, bound=bound, sensitivity_l2=1.0, n_sites_max=n_sites, n_classes=width
    )


def run_round(he: HomomorphicEncryption, scores_kbs: np.ndarray, bound: float) -> np.ndarray:
    n_sites, n_queries, width = scores_kbs.shape
    plan = plan_of(n_sites, width=width, bound=bound)
    keys = he.make_keys()
    site = he.site_side(plan, public_key=keys.public_key)
    side = he.coordinator_side(plan, n_queries=n_queries, rule=RULE, public_key=keys.public_key)
    for scores in scores_kbs:
        side.add(site.protect(scores))
    querier = he.querier_side(plan, keys=keys)
    return querier.open(side.total(), n_queries=n_queries, n_sites=n_sites)


@pytest.mark.parametrize("n_sites", [3, 10, 100])
def test_bfv_sum_is_exact_on_the_grid(n_sites: int) -> None:
    rng = np.random.default_rng(n_sites)
    # 210 values of 10: a full ciphertext and a short one.
    on_grid = rng.integers(-(2**16), 2**16 + 1, (n_sites, 210, 10)) / 2.0**16
    on_grid[:, 0, :] = 1.0
    on_grid[:, 1, :] = -1.0

    opened = run_round(HomomorphicEncryption(), on_grid, bound=1.0)

    np.testing.assert_array_equal(opened, on_grid.sum(axis=0))


@pytest.mark.parametrize("n_sites", [3, 10, 100])
def test_ckks_sum_is_within_its_tolerance(n_sites: int) -> None:
    rng = np.random.default_rng(n_sites)
    scores = rng.uniform(-16.0, 16.0, (n_sites, 110, 10))

    opened = run_round(HomomorphicEncryption(scheme="ckks"), scores, bound=16.0)

    assert np.abs(opened - scores.sum(axis=0)).max() <= ckks_tolerance(n_sites)


@pytest.mark.parametrize(
    ("scheme", "bound", "most"),
    [
        ("bfv", 1.0, 4096),  # the measured limit of noise
        ("bfv", 64.0, 2047),  # 8 fraction bits
        ("ckks", 1.0, 4096),
        ("ckks", 16.0, 511),
    ],
)
def test_cohort_capacity_is_asserted_before_a_round(scheme: str, bound: float, most: int) -> None:
    he = HomomorphicEncryption(scheme=scheme)
    keys = he.make_keys()
    he.site_side(plan_of(most, bound=bound), public_key=keys.public_key)

    plan = plan_of(most + 1, bound=bound)
    with pytest.raises(CapacityError, match=f"at most {most} sites"):
        he.site_side(plan, public_key=keys.public_key)
    with pytest.raises(CapacityError):
        he.coordinator_side(plan, n_queries=1, rule=RULE, public_key=keys.public_key)
    with pytest.raises(CapacityError):
        he.querier_side(plan, keys=keys)


@pytest.mark.parametrize("n_sites", [1, 2])
def test_cohort_too_small_to_hide_in_is_refused(n_sites: int) -> None:
    he = HomomorphicEncryption()
    with pytest.raises(InvalidValueError, match="at least 3"):
        he.site_side(plan_of(n_sites), public_key=he.make_keys().public_key)


def test_payload_under_another_key_is_refused() -> None:
    he, plan, scores = HomomorphicEncryption(), plan_of(4), np.zeros((1, 10))
    ours, theirs = he.make_keys(), he.make_keys()
    assert ours.key_id != theirs.key_id
    side = he.coordinator_side(plan, n_queries=1, rule=RULE, public_key=ours.public_key)
    site = he.site_side(plan, public_key=ours.public_key)
    for _ in range(3):
        side.add(site.protect(scores))

    foreign = he.site_side(plan, public_key=theirs.public_key).protect(scores)
    with pytest.raises(BindingError, match="another key"):
        side.add(foreign)
    assert side.n_sites == 3
    with pytest.raises(BindingError, match="another key"):
        he.querier_side(plan, keys=theirs).open(side.total(), n_queries=1, n_sites=3)


def test_payload_of_the_other_scheme_is_refused() -> None:
    bfv, ckks = HomomorphicEncryption(), HomomorphicEncryption(scheme="ckks")
    plan = plan_of(3)
    bfv_keys, ckks_keys = bfv.make_keys(), ckks.make_keys()
    payload = ckks.site_side(plan, public_key=ckks_keys.public_key).protect(np.zeros((1, 10)))
    side = bfv.coordinator_side(plan, n_queries=1, rule=RULE, public_key=bfv_keys.public_key)

    with pytest.raises(BindingError, match="scheme"):
        side.add(payload)
    with pytest.raises(ProtocolError):
        bfv.site_side(plan, public_key=ckks_keys.public_key)


def test_secret_key_in_the_wrong_place_is_refused() -> None:
    he, plan = HomomorphicEncryption(), plan_of(3)
    keys = he.make_keys()
    with pytest.raises(ProtectionRefusedError):
        he.site_side(plan, public_key=keys.secret_key)
    with pytest.raises(KeyAtCoordinatorError):
        he.coordinator_side(plan, n_queries=1, rule=RULE, public_key=keys.secret_key)


def test_key_bytes_that_are_no_key_are_refused() -> None:
    he, plan = HomomorphicEncryption(), plan_of(3)
    public = he.make_keys().public_key
    beyond_prime = public[:-2] + b"\xff\xff"
    for bad in (b"", b"\0", b"key", b"\xff" * 100, public[:-1], b"X" + public[1:], beyond_prime):
        with pytest.raises(EnvelopeError):
            he.site_side(plan, public_key=bad)
        with pytest.raises(EnvelopeError):
            he.coordinator_side(plan, n_queries=1, rule=RULE, public_key=bad)
    for bad in (public + b"\0", bytes(10**6)):
        with pytest.raises(SizeLimitError):
            he.site_side(plan, public_key=bad)


def test_keys_that_are_no_pair_are_refused() -> None:
    he, plan = HomomorphicEncryption(), plan_of(3)
    one, other = he.make_keys(), he.make_keys()
    with pytest.raises(BindingError, match="no pair"):
        he.querier_side(plan, keys=KeyPair(public_key=one.public_key, secret_key=other.secret_key))
    for secret in (b"", one.public_key, one.secret_key[:100], b"FHS\x01\x01\x00"):
        with pytest.raises(EnvelopeError):
            he.querier_side(plan, keys=KeyPair(public_key=one.public_key, secret_key=secret))


def test_public_context_at_a_site_cannot_decrypt() -> None:
    for scheme in SCHEMES.values():
        public, _ = he_context.new_keys(scheme)
        context = he_context.load_public(public, scheme)
        assert not context.is_private()
        assert not context.has_relin_keys()
        assert not context.has_galois_keys()
        packed = memoryview(he_context.encrypt(context, scheme, [1]))
        with pytest.raises(InvalidCiphertextError):
            he_context.decrypt(he_context.read_vector(context, scheme, packed, 1))


def test_sum_beyond_what_the_sites_can_send_does_not_open() -> None:
    for scheme in ("bfv", "ckks"):
        he, plan = HomomorphicEncryption(scheme=scheme), plan_of(5)
        keys = he.make_keys()
        site = he.site_side(plan, public_key=keys.public_key)
        side = he.coordinator_side(plan, n_queries=1, rule=RULE, public_key=keys.public_key)
        for _ in range(5):
            side.add(site.protect(np.ones((1, 10))))
        querier = he.querier_side(plan, keys=keys)
        with pytest.raises(InvalidScoresError):
            querier.open(side.total(), n_queries=1, n_sites=4)
        assert querier.open(side.total(), n_queries=1, n_sites=5).shape == (1, 10)


def test_coordinator_memory_does_not_grow_with_sites() -> None:
    he, plan = HomomorphicEncryption(), plan_of(50)
    keys = he.make_keys()
    site = he.site_side(plan, public_key=keys.public_key)
    side = he.coordinator_side(plan, n_queries=1, rule=RULE, public_key=keys.public_key)
    payload = site.protect(np.ones((1, 10)))
    for _ in range(50):
        side.add(payload)
    assert len(side._sum) == 1


def test_equal_scores_give_different_payloads() -> None:
    he, plan = HomomorphicEncryption(), plan_of(3)
    site = he.site_side(plan, public_key=he.make_keys().public_key)
    assert site.protect(np.zeros((1, 10))) != site.protect(np.zeros((1, 10)))


def test_public_context_is_cached_and_the_cache_is_bounded() -> None:
    he_context._cached_public.cache_clear()
    he, plan = HomomorphicEncryption(), plan_of(3)
    for _ in range(10):
        keys = he.make_keys()
        for _ in range(2):
            he.site_side(plan, public_key=keys.public_key)
    facts = he_context._cached_public.cache_info()
    assert facts.hits == 10
    assert facts.currsize == facts.maxsize == 8


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="bfv, ckks"):
        HomomorphicEncryption(scheme="paillier")


def test_missing_tenseal_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(base.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[he\]"):
        HomomorphicEncryption().make_keys()


FORK = """
import os, signal
import numpy as np
from fedinfer_flower.privacy import ScorePlan, make_protection
he = make_protection("he")
plan = ScorePlan(width=10, bound=1.0, sensitivity_l2=1.0, n_sites_max=3, n_classes=10)
keys = he.make_keys()
he.site_side(plan, public_key=keys.public_key).protect(np.zeros((300, 10)))
child = os.fork()
if child == 0:
    signal.alarm(20)
    payload = he.site_side(plan, public_key=keys.public_key).protect(np.zeros((300, 10)))
    os._exit(0 if payload else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_forked_site_still_encrypts() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_protections_does_not_import_optional_libraries() -> None:
    code = (
        "import sys; from fedinfer_flower.privacy import PROTECTIONS; PROTECTIONS.names();"
        "raise SystemExit(bool({'tenseal', 'scipy', 'opacus', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
