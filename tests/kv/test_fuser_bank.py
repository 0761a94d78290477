import copy
import dataclasses

import pytest
import torch

from fedinfer_flower.errors import FuserError, InvalidValueError
from fedinfer_flower.kv import fuser_bank
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.kv.fuser_file import read_fuser_card, save_fuser
from fedinfer_flower.kv.layout import CacheLayout

ONE = CacheLayout(
    layers=2,
    heads=1,
    head_size=4,
    hidden_size=6,
    window=64,
    rope="{}",
    architecture="llama",
    tokenizer_digest="0" * 64,
    model_digest="1" * 64,
)
TWO = dataclasses.replace(ONE, layers=3, architecture="qwen3", model_digest="2" * 64)
PAIR = (ONE.model_digest, TWO.model_digest)


def fuser_of(sharer=ONE, receiver=TWO, **options):
    return make_fuser(FuserSpec.for_pair("last-token", sharer, receiver, width=8, **options))


def test_bank_of_a_mapping_returns_its_fusers():
    fuser = fuser_of()

    bank = FuserBank({PAIR: fuser})

    assert bank.get(*PAIR) is fuser
    assert bank.get(ONE, TWO) is fuser
    assert bank.pairs() == [fuser.spec]
    assert PAIR in bank
    assert len(bank) == 1


def test_mapping_that_names_another_pair_is_refused():
    with pytest.raises(InvalidValueError, match="another pair"):
        FuserBank({PAIR[::-1]: fuser_of()})


def test_bank_of_a_folder_reads_weights_on_first_use(tmp_path, monkeypatch):
    loads = []
    read = fuser_bank.load_fuser
    monkeypatch.setattr(fuser_bank, "load_fuser", lambda p: loads.append(p.name) or read(p))
    save_fuser(fuser_of(), tmp_path / "a")
    save_fuser(fuser_of(TWO, ONE), tmp_path / "b")

    bank = FuserBank(tmp_path)
    assert [spec.pair for spec in bank.pairs()] == [PAIR, PAIR[::-1]]
    assert loads == []

    assert bank.get(*PAIR) is bank.get(*PAIR)
    assert loads == ["a"]


def test_fuser_added_to_a_folder_is_there_the_next_time(tmp_path):
    fuser = fuser_of()

    FuserBank(tmp_path).add(fuser, {"steps": 3})
    again = FuserBank(tmp_path).get(*PAIR)

    assert again.card == {"steps": 3}
    expected = fuser.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in again.state_dict().items())


def test_fuser_added_again_takes_the_place_of_the_first(tmp_path):
    bank = FuserBank(tmp_path)
    bank.add(fuser_of(), {"run": 1})
    bank.add(fuser_of(depth=1), {"run": 2})

    again = FuserBank(tmp_path)

    assert [spec.depth for spec in again.pairs()] == [1]
    assert [read_fuser_card(folder)["run"] for folder in tmp_path.iterdir()] == [2]


def test_missing_pair_names_both_models_and_the_text_medium():
    bank = FuserBank({PAIR: fuser_of()})

    with pytest.raises(FuserError, match=r"222222222222.*111111111111") as caught:
        bank.get(*PAIR[::-1])

    assert "text medium" in caught.value.hint
    assert "revision" not in caught.value.hint


@pytest.mark.parametrize(
    ("sharer", "receiver", "known"),
    [
        (dataclasses.replace(ONE, model_digest="3" * 64), TWO, "111111111111 of the sharer"),
        (ONE, dataclasses.replace(TWO, model_digest="3" * 64), "222222222222 of the receiver"),
    ],
)
def test_another_revision_of_a_model_is_named(sharer, receiver, known):
    bank = FuserBank({PAIR: fuser_of()})

    with pytest.raises(FuserError, match="333333333333") as caught:
        bank.get(sharer, receiver)

    assert known in caught.value.hint
    assert "text medium" in caught.value.hint


def test_another_model_is_not_taken_for_a_revision():
    bank = FuserBank({PAIR: fuser_of()})

    with pytest.raises(FuserError) as caught:
        bank.get(dataclasses.replace(ONE, heads=2, model_digest="3" * 64), TWO)

    assert "revision" not in caught.value.hint


def test_two_fusers_for_one_pair_in_a_folder_are_refused(tmp_path):
    for name in ("a", "b"):
        save_fuser(fuser_of(), tmp_path / name)

    with pytest.raises(FuserError, match="a, b"):
        FuserBank(tmp_path)


def test_fuser_replaced_behind_the_bank_is_refused(tmp_path):
    save_fuser(fuser_of(), tmp_path / "a")
    bank = FuserBank(tmp_path)
    save_fuser(fuser_of(depth=1), tmp_path / "a")

    with pytest.raises(FuserError, match="replaced"):
        bank.get(*PAIR)


def test_bank_can_be_copied_to_a_worker_and_still_lends():
    bank = FuserBank({PAIR: fuser_of()})

    there = copy.deepcopy(bank)

    assert there.pairs() == bank.pairs()
    assert there.get(*PAIR).spec == bank.get(*PAIR).spec
