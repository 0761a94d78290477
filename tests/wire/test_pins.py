"""Pin files: what is believed of a key, and who is named when it is not."""

from __future__ import annotations

import pytest

from fedinfer_flower.errors import ConfigError, UntrustedKeyError
from fedinfer_flower.wire.pins import Pins, read_pins

A, B = "a" * 64, "b" * 64


def test_file_round_trip(tmp_path):
    path = tmp_path / "pins.toml"
    path.write_text(f'[sites]\n"hospital a" = "{A}"\n[queriers]\nregistry = "{B}"\n')
    pins = read_pins(path)
    assert pins == Pins(sites={"hospital a": A}, queriers={"registry": B})
    pins.require_site("hospital a", A)


def test_swapped_key_is_refused_naming_site_and_both_keys():
    with pytest.raises(UntrustedKeyError, match="hospital-a") as caught:
        Pins(sites={"hospital-a": A}).require_site("hospital-a", B)
    assert A[:16] in caught.value.message
    assert B[:16] in caught.value.message
    assert "swapped" in caught.value.message


def test_unpinned_site_is_refused_naming_it():
    with pytest.raises(UntrustedKeyError, match=r"'stranger'.*not in the pin file"):
        Pins(sites={"hospital-a": A}).require_site("stranger", A)


def test_pin_of_a_querier_is_no_pin_of_a_site():
    with pytest.raises(UntrustedKeyError):
        Pins(queriers={"x": A}).require_site("x", A)


def test_key_is_compared_whole():
    with pytest.raises(UntrustedKeyError):
        Pins(sites={"x": A}).require_site("x", A[:-1] + "b")


def test_empty_file_pins_nobody(tmp_path):
    path = tmp_path / "pins.toml"
    path.write_text("")
    assert read_pins(path) == Pins()


BAD = {
    "no toml": "sites = [",
    "unknown table": f'[site]\na = "{A}"',
    "top-level entry": f'a = "{A}"',
    "short key": f'[sites]\na = "{A[:-1]}"',
    "upper case": f'[sites]\na = "{A.upper()}"',
    "no text": "[sites]\na = 7",
    "list": f'[sites]\na = ["{A}"]',
    "table twice": f'[sites]\na = "{A}"\n[sites]\nb = "{B}"',
    "name twice": f'[sites]\na = "{A}"\na = "{B}"',
    "sites is no table": f'sites = "{A}"',
    "nested": f'[sites.a]\nkey = "{A}"',
    "line break": f'[sites]\na = "{A}\\n"',
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_bad_file_is_a_config_error_that_names_the_file(tmp_path, text):
    path = tmp_path / "my-pins.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"my-pins\.toml"):
        read_pins(path)


def test_missing_file_folder_and_bytes_are_config_errors(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in ("missing", "bytes", "."):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_pins(tmp_path / path)
