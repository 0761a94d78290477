import pytest

from fedinfer_flower.reporting.answer import (
    LIMITS,
    answer_sentences,
    limit_sentences,
    meter_sentences,
    visibility_sentences,
)


def measured(results, name, **changes):
    """Make `name` the protection of the run, and the only one measured."""
    entry = results["protections"][1]
    results["protection"] = name
    results["protections"] = [entry | {"name": name, "label": name} | changes]
    return results


def test_limits_is_the_agreed_sentence():
    assert LIMITS == (
        "The queries themselves travel in clear: sites and coordinator can read them. Under he, a "
        "querier and a coordinator who pool what they have can open every site's answer."
    )


def test_answer_sentences_name_joint_best_mean_and_central(results):
    text = " ".join(answer_sentences(results))
    for part in (
        "88.0 % of 540",
        "best site (hospital-e) reaches 50.0 %",
        "mean site 40.0 %",
        "96.0 %",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (0.5, "38.0 points above the best single site"),
        (0.86, "does not settle"),
        (0.99, "11.0 points below the best single site"),
    ],
)
def test_answer_sentences_compare_honestly(results, best, expected):
    results["best_site"] |= {"accuracy": best, "low": best - 0.03, "high": best + 0.03}
    assert expected in " ".join(answer_sentences(results))


def test_answer_sentences_unmeasured_protection_falls_back_to_clear(results):
    results["protections"] = []
    assert "rule: open-set-class-share; no protection" in answer_sentences(results)[0]


@pytest.mark.parametrize(
    ("protection", "expected"),
    [
        ("plain", "Under this protection the coordinator sees: each site's scores."),
        ("unknown", "The protection unknown was not measured in this run."),
    ],
)
def test_visibility_sentences_repeat_what_the_coordinator_sees(results, protection, expected):
    results["protection"] = protection
    assert visibility_sentences(results) == [expected]


def test_visibility_sentences_noise_names_epsilon_a_query_and_in_all(results):
    results["protection"] = "dp"
    assert visibility_sentences(results) == [
        "Under this protection the coordinator sees: noisy scores.",
        "One site spends epsilon 0.5 a query and 50 over the 540 queries of this run"
        " (delta 1e-06).",
    ]


@pytest.mark.parametrize("name", ["secagg+dp", "he+dp"])
def test_visibility_sentences_noisy_sums_name_epsilon(results, name):
    noise = {"epsilon_per_query": 1.0, "epsilon_total": 25.0, "delta": 1e-6}
    text = " ".join(visibility_sentences(measured(results, name, **noise)))
    assert "One site spends epsilon 1 a query and 25 over the 540 queries" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("secagg", "their sum can be opened by the querier only"),
        ("secagg+dp", "their sum can be opened by the querier only"),
        ("encrypted-query", "The sites compute on encrypted queries"),
        ("mpc", "Three sites compute together on shares"),
    ],
)
def test_visibility_sentences_say_how_the_protection_works(results, name, expected):
    text = " ".join(visibility_sentences(measured(results, name)))
    assert "the coordinator sees: ciphertexts." in text
    assert expected in text
    assert "epsilon" not in text


def test_visibility_sentences_do_not_say_it_twice(results):
    sees = "masked vectors; only their sum can be opened, by the querier"
    assert visibility_sentences(measured(results, "secagg", coordinator_sees=sees)) == [
        f"Under this protection the coordinator sees: {sees}."
    ]


@pytest.mark.parametrize("name", ["he", "secagg", "encrypted-query"])
def test_visibility_sentences_key_at_coordinator_promise_nothing(results, name):
    sentences = visibility_sentences(measured(results, name, key_at_coordinator=True))
    assert len(sentences) == 2
    assert "so it could open every answer" in sentences[1]


def test_limit_sentences_in_clear_are_the_agreed_ones(results):
    assert " ".join(limit_sentences(results)) == LIMITS


def test_limit_sentences_sealed_do_not_say_in_clear(results):
    results["sealed"] = True
    text = " ".join(limit_sentences(results))
    assert "travelled sealed" in text
    assert "the sites that are asked read the queries" in text
    assert "in clear" not in text
    assert LIMITS.endswith(limit_sentences(results)[1])


def test_limit_sentences_sealed_from_a_coordinator_that_is_the_querier_is_in_clear(results):
    results["sealed"] = True
    results["protections"][1]["key_at_coordinator"] = True
    assert " ".join(limit_sentences(results)) == LIMITS


@pytest.mark.parametrize(
    ("name", "sealed", "expected"),
    [
        ("encrypted-query", False, "travelled encrypted"),
        ("encrypted-query", True, "travelled encrypted"),
        ("mpc", False, "the coordinator that relays all shares can"),
        ("mpc", True, "neither the coordinator nor one site alone can read"),
    ],
)
def test_limit_sentences_hidden_queries(results, name, sealed, expected):
    results["sealed"] = sealed
    assert expected in limit_sentences(measured(results, name))[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("he+dp", "that site's share of the noise only"),
        ("encrypted-query", "Under encrypted-query they can do so too"),
    ],
)
def test_limit_sentences_pooling_beyond_he(results, name, expected):
    assert expected in limit_sentences(measured(results, name))[-1]


def test_meter_sentences_read_at_the_queries_of_the_run(results):
    assert meter_sentences(results) == [
        "Under secagg+dp at epsilon 0.5 a query, 500 distinct queries cost one site epsilon 16.5"
        " in total, at delta 1e-06.",
        "That is 16.5 of a cap of 20 (82.3 %).",
        "Of the points drawn, 500 queries fit under the cap, 1000 do not.",
    ]


def test_meter_sentences_over_the_cap(results):
    results["epsilon_meter"]["cap"] = 4.0
    text = " ".join(meter_sentences(results))
    assert "over the cap of 4" in text
    assert "20 queries fit under the cap, 50 do not" in text


def test_meter_sentences_without_cap_promise_no_end(results):
    results["epsilon_meter"]["cap"] = None
    assert meter_sentences(results)[1:] == ["There is no cap: every new query adds, without end."]


def test_meter_sentences_without_points_are_none(results):
    results["epsilon_meter"]["points"] = []
    assert meter_sentences(results) == []
    results["epsilon_meter"] = None
    assert meter_sentences(results) == []
