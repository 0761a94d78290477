import base64
import hashlib
import json

import pytest
import torch
from safetensors.torch import load, save

from fedinfer_flower.errors import FuserError, InvalidValueError
from fedinfer_flower.kv.fuser import FuserSpec, make_fuser
from fedinfer_flower.kv.fuser_file import (
    load_fuser,
    load_hub,
    read_fuser_card,
    read_fuser_spec,
    save_fuser,
    save_hub,
)
from fedinfer_flower.kv.fusers.hub import Hub, HubSpec
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.static_scales import StaticScales


def layout(number, layers):
    return CacheLayout(
        layers=layers,
        heads=1,
        head_size=4,
        hidden_size=6,
        window=64,
        rope="{}",
        architecture="llama",
        tokenizer_digest="0" * 64,
        model_digest=str(number) * 64,
    )


ONE, TWO = layout(1, 2), layout(2, 3)


def fuser_of(kind="last-token"):
    return make_fuser(FuserSpec.for_pair(kind, ONE, TWO, width=8))


def scales_of(layout):
    generator = torch.Generator().manual_seed(0)
    drawn = tuple(torch.randn(8, 1, 2, 4, generator=generator) for _ in range(layout.layers))
    mask = torch.ones(8, 2, dtype=torch.long)
    return StaticScales.fit(CacheEntries(keys=drawn, values=drawn, mask=mask, layout=layout))


@pytest.fixture
def folder(tmp_path):
    return save_fuser(fuser_of(), tmp_path / "pair", {"steps": 400})


def edit(folder, **changes):
    """Change the JSON beside the weights."""
    path = folder / "fuser.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def put_weights(folder, data):
    """Put other weights in, with their digest: what somebody who can write the folder can."""
    (folder / "fuser.safetensors").write_bytes(data)
    edit(folder, weights_sha256=hashlib.sha256(data).hexdigest())


def weights(folder):
    return load((folder / "fuser.safetensors").read_bytes())


def test_spec_and_card_are_read_without_weights(folder):
    (folder / "fuser.safetensors").unlink()

    assert read_fuser_spec(folder) == fuser_of().spec
    assert read_fuser_card(folder) == {"steps": 400}


def test_folder_holds_two_files_and_no_rest(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["fuser.json", "fuser.safetensors"]


def test_half_precision_takes_half_the_bytes_and_rounds(tmp_path):
    fuser = fuser_of()

    whole = save_fuser(fuser, tmp_path / "a")
    half = load_fuser(save_fuser(fuser, tmp_path / "b", dtype="float16"))

    sizes = [(tmp_path / name / "fuser.safetensors").stat().st_size for name in "ab"]
    numbers = sum(x.numel() for x in weights(whole).values())
    assert sizes[0] - sizes[1] == pytest.approx(2 * numbers, abs=64)  # headers are alike
    for name, x in fuser.state_dict().items():
        # float16 keeps eleven bits; these weights are above its subnormals or tiny.
        assert torch.allclose(half.state_dict()[name], x, rtol=2**-11, atol=1e-7)
        assert half.state_dict()[name].dtype == torch.float32


def test_scales_travel_with_the_fuser(tmp_path):
    fuser = fuser_of()
    fuser.scales = scales_of(ONE)

    again = load_fuser(save_fuser(fuser, tmp_path))

    assert again.scales.digest == fuser.scales.digest


def test_scales_of_another_model_are_refused_on_both_ways(tmp_path):
    fuser = fuser_of()
    fuser.scales = scales_of(TWO)
    with pytest.raises(FuserError, match="another model"):
        save_fuser(fuser, tmp_path)

    folder = save_fuser(fuser_of(), tmp_path)
    edit(folder, scales=base64.b64encode(scales_of(TWO).to_bytes()).decode())
    with pytest.raises(FuserError, match="another model"):
        load_fuser(folder)


@pytest.mark.parametrize("scales", [None, 5, [], "%%%", "AAAA"])
def test_scales_that_are_none_are_refused(folder, scales):
    edit(folder, scales=scales)

    with pytest.raises(FuserError, match="static scales"):
        load_fuser(folder)


@pytest.mark.parametrize("name", ["fuser.json", "fuser.safetensors"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()

    with pytest.raises(FuserError, match=name):
        load_fuser(folder)


def test_any_flipped_byte_of_the_weights_is_noticed(folder):
    path = folder / "fuser.safetensors"
    good = path.read_bytes()

    for at in (0, 8, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(FuserError, match="not the file"):
            load_fuser(folder)


def test_weights_of_another_fuser_are_noticed(folder, tmp_path):
    other = make_fuser(fuser_of().spec, seed=1)
    data = (save_fuser(other, tmp_path / "other") / "fuser.safetensors").read_bytes()
    (folder / "fuser.safetensors").write_bytes(data)

    with pytest.raises(FuserError, match="not the file"):
        load_fuser(folder)


def changed(state, name, value):
    return {**state, name: value}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda s, n: {k: v for k, v in s.items() if k != n}, "names"),
        (lambda s, n: changed(s, "more", torch.zeros(1)), "names"),
        (lambda s, n: changed(s, n, torch.zeros(1)), "shape"),
        (lambda s, n: changed(s, n, s[n].flatten()), "shape"),
        (lambda s, n: changed(s, n, s[n].half()), "type"),
        (lambda s, n: changed(s, n, s[n].to(torch.int32)), "type"),
        (lambda s, n: changed(s, n, torch.full_like(s[n], torch.nan)), "finite"),
        (lambda s, n: changed(s, n, torch.full_like(s[n], torch.inf)), "finite"),
    ],
)
def test_weights_that_the_spec_does_not_imply_are_refused(folder, alter, message):
    state = weights(folder)
    name = "heads.0.out.weight"
    assert name in state

    put_weights(folder, save(alter(state, name)))

    with pytest.raises(FuserError, match=message):
        load_fuser(folder)


def test_weights_larger_than_the_spec_implies_are_not_read_to_the_end(folder):
    put_weights(folder, bytes(10_000_000))

    with pytest.raises(FuserError, match="larger than"):
        load_fuser(folder)


def test_bytes_that_are_no_safetensors_are_refused(folder):
    put_weights(folder, b"\x80\x04not a pickle either")

    with pytest.raises(FuserError, match="safetensors format"):
        load_fuser(folder)


def test_spec_that_asks_for_more_than_is_read_is_refused_before_it_costs(folder):
    big = {**fuser_of().spec.to_dict(), "width": 16_384, "depth": 8}
    edit(folder, spec=big)

    with pytest.raises(FuserError, match="at most"):
        load_fuser(folder)
    with pytest.raises(FuserError, match="at most 1000 are read"):
        load_fuser(save_fuser(fuser_of(), folder), max_bytes=1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"version": None},
        {"card": []},
        {"spec": None},
        {"spec": {}},
        {"weights_dtype": "int8"},
        {"weights_dtype": ["float32"]},
        {"weights_sha256": 5},
        {"more": 1},
    ],
)
def test_hostile_json_is_refused(folder, changes):
    edit(folder, **changes)

    with pytest.raises(FuserError):
        load_fuser(folder)


@pytest.mark.parametrize("change", [{"width": 9}, {"kind": "concat"}, {"kind": "nobody"}])
def test_spec_of_another_fuser_is_refused(folder, change):
    edit(folder, spec={**fuser_of().spec.to_dict(), **change})

    with pytest.raises(FuserError):
        load_fuser(folder)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}'])
def test_bytes_that_are_no_json_object_are_refused(folder, data):
    (folder / "fuser.json").write_bytes(data)

    with pytest.raises(FuserError, match=r"fuser\.json"):
        load_fuser(folder)


def test_fuser_with_numbers_that_are_not_finite_is_not_written(tmp_path):
    fuser = fuser_of()
    with torch.no_grad():
        fuser.heads[0].out.bias[0] = 1e6  # finite, but not as float16

    save_fuser(fuser, tmp_path / "a")
    with pytest.raises(FuserError, match="float16"):
        save_fuser(fuser, tmp_path / "b", dtype="float16")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("card", [{"a": object()}, {"a": float("nan")}])
def test_card_that_json_cannot_hold_is_refused(tmp_path, card):
    with pytest.raises(InvalidValueError, match="card"):
        save_fuser(fuser_of(), tmp_path, card)


def test_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(InvalidValueError, match="float16"):
        save_fuser(fuser_of(), tmp_path, dtype="int8")


def test_hub_is_the_same_after_a_trip_to_disk(tmp_path):
    hub = Hub(HubSpec(width=8, latent_layers=2))
    for number in (1, 2):
        hub.join(layout(number, number + 1), seed=number)

    again = load_hub(save_hub(hub, tmp_path))

    assert (again.spec, again.layouts) == (hub.spec, hub.layouts)
    expected = hub.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"layouts": []},
        {"layouts": ["{}"]},
        {"layouts": None},
        {"layouts": ["{}"] * 257},
        {"hub": {}},
        {"hub": {**HubSpec(width=8).to_dict(), "width": -1}},
    ],
)
def test_hostile_hub_is_refused(tmp_path, changes):
    hub = Hub(HubSpec(width=8))
    hub.join(ONE)
    edit(save_hub(hub, tmp_path), **changes)

    with pytest.raises(FuserError):
        load_hub(tmp_path)


def test_fuser_of_a_hub_is_saved_as_a_fuser_of_its_own(tmp_path):
    hub = Hub(HubSpec(width=8)).eval()
    for model in (ONE, TWO):
        hub.join(model)
    pair = hub.fuser(ONE.model_digest, TWO.model_digest)

    again = load_fuser(save_fuser(pair, tmp_path))

    assert again.spec == pair.spec
    expected = pair.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in again.state_dict().items())
