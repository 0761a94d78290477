"""Options: what arrives by name is checked like what is written in code."""

import json
import math

import numpy as np
import pytest

from fedinfer_flower.ensemble import make_rule
from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.ensemble.entropy_weighted import EntropyWeighted
from fedinfer_flower.ensemble.trimmed_mean import TrimmedMean
from fedinfer_flower.errors import InvalidValueError, UnknownNameError

# More digits than Python is willing to write out.
HUGE = pytest.param(10**5000, id="huge")


def test_make_rule_without_options_keeps_defaults():
    assert make_rule("trimmed-mean") == TrimmedMean(trim=1)


def test_make_rule_with_options_sets_them():
    assert make_rule("entropy-weighted", {"cap": 0.25}) == EntropyWeighted(cap=0.25)


def test_make_rule_with_whole_number_for_float_stores_float():
    rule = make_rule("entropy-weighted", {"cap": 1})

    assert type(rule.cap) is float
    # The same text at both ends, so that digests of options agree.
    assert json.dumps(rule.options()) == json.dumps(EntropyWeighted().options())


def test_make_rule_with_unknown_name_names_nearest():
    with pytest.raises(UnknownNameError, match="trimmed-mean"):
        make_rule("trimed-mean")


def test_make_rule_with_unknown_option_names_nearest():
    with pytest.raises(InvalidValueError, match="did you mean trim"):
        make_rule("trimmed-mean", {"trimm": 1})


def test_make_rule_with_option_of_rule_without_any_says_so():
    with pytest.raises(InvalidValueError, match="options: none"):
        make_rule("borda", {"trim": 1})


@pytest.mark.parametrize(
    "value",
    ["0.5", None, True, [0.5], {"a": 1}, math.nan, math.inf, -math.inf, 0.0, 1.5, -0.5, HUGE],
)
def test_make_rule_with_bad_float_is_refused(value):
    with pytest.raises(InvalidValueError, match="'cap' of rule 'entropy-weighted' must be"):
        make_rule("entropy-weighted", {"cap": value})


@pytest.mark.parametrize("value", ["1", None, True, 1.0, math.nan, -1, 10**9, HUGE])
def test_make_rule_with_bad_integer_is_refused(value):
    with pytest.raises(InvalidValueError, match="'trim' of rule 'trimmed-mean' must be"):
        make_rule("trimmed-mean", {"trim": value})


@pytest.mark.parametrize("options", [[], "trim", 3, [("trim", 1)]])
def test_make_rule_with_options_that_are_no_mapping_is_refused(options):
    with pytest.raises(InvalidValueError, match="mapping"):
        make_rule("trimmed-mean", options)


def test_rule_constructed_in_code_is_checked_too():
    with pytest.raises(InvalidValueError, match="must be in"):
        EntropyWeighted(cap=2.0)


def test_rule_with_numpy_float_stores_plain_float():
    assert type(EntropyWeighted(cap=np.float64(0.5)).cap) is float


@pytest.mark.parametrize("name", RULES.names())
def test_rule_options_at_both_ends_of_their_range_are_accepted(name):
    fields = RULES.get(name).__dataclass_fields__.values()

    for end in ("low", "high"):
        rule = make_rule(name, {f.name: f.metadata[end] for f in fields if end in f.metadata})
        for n_classes in (1, 2, 1000):
            assert 0.0 < rule.score_bound(n_classes) < math.inf
            assert 0.0 < rule.sensitivity_l2(n_classes) < math.inf
