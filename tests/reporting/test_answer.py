import pytest

from fedinfer_flower.reporting.answer import LIMITS, answer_sentences, visibility_sentences


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
        ("dp", "Under this protection the coordinator sees: noisy scores."),
        ("unknown", "The protection unknown was not measured in this run."),
    ],
)
def test_visibility_sentences_repeat_what_the_coordinator_sees(results, protection, expected):
    results["protection"] = protection
    assert visibility_sentences(results) == [expected]
