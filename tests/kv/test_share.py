import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import EnvelopeError, InvalidValueError
from fedinfer_flower.kv.layout import CacheLayout
from fedinfer_flower.kv.share import ShareSpec

LAYOUT = CacheLayout(
    layers=3,
    heads=2,
    head_size=4,
    hidden_size=10,
    window=64,
    rope="{}",
    architecture="llama",
    tokenizer_digest="0" * 64,
    model_digest="1" * 64,
)
shares = st.builds(
    ShareSpec, last=st.integers(0, 4096), decode=st.integers(0, 256), hidden=st.booleans()
)


@given(share=shares)
def test_share_through_json_is_the_same(share):
    assert ShareSpec.from_dict(json.loads(json.dumps(share.to_dict()))) == share


@pytest.mark.parametrize(
    ("share", "prompt", "tokens"),
    [
        (ShareSpec(), 30, 2),
        (ShareSpec(last=3, decode=0), 30, 3),
        (ShareSpec(last=3, decode=2), 2, 4),  # a prompt shorter than what may travel
        (ShareSpec(last=0, decode=1), 30, 31),
    ],
)
def test_tokens_counts_what_travels(share, prompt, tokens):
    assert share.tokens(prompt) == tokens


def test_floats_counts_entries_of_all_layers_and_hidden_state():
    # 2 tokens, 3 layers, keys and values of 2 heads of 4; then 10 more a token.
    assert ShareSpec().floats(LAYOUT, 30) == 2 * 3 * 16
    assert ShareSpec(hidden=True).floats(LAYOUT, 30) == 2 * (3 * 16 + 10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"last": -1},
        {"last": 5000},
        {"last": True},
        {"decode": 1.0},
        {"decode": 257},
        {"hidden": 1},
    ],
)
def test_share_out_of_range_is_refused(wrong):
    with pytest.raises(InvalidValueError):
        ShareSpec(**wrong)
    with pytest.raises(EnvelopeError):
        ShareSpec.from_dict({**ShareSpec().to_dict(), **wrong})


@pytest.mark.parametrize("values", [None, [], "x", {}, {"last": 1, "decode": 1}])
def test_share_of_other_fields_is_refused(values):
    with pytest.raises(EnvelopeError):
        ShareSpec.from_dict(values)


def test_unknown_field_is_refused():
    with pytest.raises(EnvelopeError):
        ShareSpec.from_dict({**ShareSpec().to_dict(), "more": 1})


def test_importing_share_does_not_import_torch():
    code = "import sys, fedinfer_flower.kv.share; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
