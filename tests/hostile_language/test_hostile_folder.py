"""A model folder whose index or adapter leads elsewhere: the digest would not cover that."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedinfer_flower.errors import ModelError
from fedinfer_flower.language.model import LanguageModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(models, tmp_path):
    path = tmp_path / "model"
    models["llama"].model.save_pretrained(path)
    models["llama"].tokenizer.save_pretrained(path)
    return path


def led_elsewhere(folder, target):
    """Put an index in place of the weights, beside weights that are of no use."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, target)}
    (folder / INDEX).write_text(json.dumps(index))
    return state


def load(folder, models):
    return LanguageModel.from_folder(folder, prompts=models["llama"].prompts)


def test_index_into_a_pickle_is_refused(folder, models, monkeypatch):
    state = led_elsewhere(folder, "weights.bin")
    torch.save(state, folder / "weights.bin")
    opened = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a))
    with pytest.raises(ModelError, match="names weights"):
        load(folder, models)
    assert not opened


@pytest.mark.parametrize("target", ["../weights.safetensors", "/weights.safetensors", "", 7, None])
def test_index_out_of_the_folder_is_refused(folder, models, target):
    state = led_elsewhere(folder, target)
    save_file(state, folder.parent / "weights.safetensors")
    with pytest.raises(ModelError, match="names weights"):
        load(folder, models)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_damaged_index_is_refused(folder, models, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match="names weights"):
        load(folder, models)


def test_index_into_the_folder_is_read(folder, models):
    led_elsewhere(folder, "model-1.safetensors")
    whole = {k: v.clone() for k, v in models["llama"].model.state_dict().items()}
    save_file(whole, folder / "model-1.safetensors", {"format": "pt"})
    assert load(folder, models).layout.layers == models["llama"].layout.layers


def test_adapter_is_refused(folder, models):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        load(folder, models)
