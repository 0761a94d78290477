"""The public checks fail rules that are wrong, and say what is wrong."""

from dataclasses import dataclass

import numpy as np
import pytest

from fedinfer_flower.ensemble.base import EnsembleRule, ScoreKind, softmax
from fedinfer_flower.ensemble.checks import check_rule
from fedinfer_flower.ensemble.majority_vote import MajorityVote
from fedinfer_flower.ensemble.mean_probability import MeanProbability

DOCSTRING = """Do something wrong.

    Privacy
    -------
    None.

    Examples
    --------
    >>> 1 + 1
    2
    """


class Overconfident(MeanProbability):
    def score(self, logits, site):
        return 2.0 * softmax(logits)


class Overflowing(MeanProbability):
    def score(self, logits, site):
        with np.errstate(all="ignore"):
            powers = np.exp(logits)
            return np.asarray(powers / powers.sum(axis=1, keepdims=True))


class TooQuiet(MeanProbability):
    def sensitivity_l2(self, n_classes):
        return 0.5


class TooLoud(MeanProbability):
    def sensitivity_l2(self, n_classes):
        return 1e3


class FirstSite(MeanProbability):
    def combine(self, scores):
        return scores[0]


class LowestClass(MajorityVote):
    def score(self, logits, site):
        return np.eye(logits.shape[1])[logits.argmax(axis=1)]


class TwoVotes(MeanProbability):
    score_kind = ScoreKind.VOTE

    def score(self, logits, site):
        return 0.5 * softmax(logits)


class Contrary(MeanProbability):
    def score(self, logits, site):
        return 1.0 - softmax(logits)


class Scribbler(MeanProbability):
    def score(self, logits, site):
        logits -= logits.max(axis=1, keepdims=True)
        return softmax(logits)


class NoisePicky(MeanProbability):
    def combine(self, scores):
        with np.errstate(invalid="ignore"):
            return np.asarray(np.sqrt(scores).sum(axis=0))


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Overconfident, "outside the bound"),
        (Overflowing, "not finite"),
        (TooQuiet, "sensitivity_l2 says 0.5"),
        (TooLoud, "the whole box"),
        (FirstSite, "order of sites"),
        (LowestClass, "place in the list"),
        (TwoVotes, "sum to one"),
        (Contrary, "are sure of"),
        (Scribbler, "read-only"),
        (NoisePicky, "noisy"),
    ],
)
# The rules that overflow do so on purpose.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_check_rule_of_wrong_rule_says_what_is_wrong(own_registry, cls, sentence):
    wrong = own_registry.register("wrong-rule")(
        dataclass(frozen=True, kw_only=True)(type(cls.__name__, (cls,), {"__doc__": DOCSTRING}))
    )

    with pytest.raises((AssertionError, ValueError), match=sentence):
        check_rule(wrong)


def test_check_rule_of_unregistered_rule_asks_to_register():
    @dataclass(frozen=True, kw_only=True)
    class Nameless(EnsembleRule):
        def score(self, logits, site):
            return softmax(logits)

    with pytest.raises(AssertionError, match=r"@RULES\.register"):
        check_rule(Nameless)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        (DOCSTRING.replace("Privacy", "Secrecy"), "no Privacy section"),
        (DOCSTRING.replace("Examples", "Samples"), "no Examples section"),
        (DOCSTRING.replace("    2\n", "    3\n"), "Expected"),
    ],
)
def test_check_rule_of_badly_documented_rule_says_so(own_registry, docstring, sentence):
    documented = type("Documented", (MeanProbability,), {"__doc__": docstring})
    own_registry.register("documented")(dataclass(frozen=True, kw_only=True)(documented))

    with pytest.raises(AssertionError, match=sentence):
        check_rule(documented)
