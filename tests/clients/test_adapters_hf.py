"""Models that transformers saved: classifiers of texts and images, causal language models."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedinfer_flower.clients.adapters import make_model
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.errors import (
    InvalidValueError,
    ModelError,
    PromptTooLongError,
    ShapeError,
)
from fedinfer_flower.query import CountsKind
from fedinfer_flower.wire.text_rows import text_rows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "a", "was", "very"]
TEXTS = ["the film was good", "bad", "a very very bad film", "unheard of"]


def saved_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    unknown = {"unk_token": WORDS[1]}
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, **unknown))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": WORDS[0], **unknown}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=16, **special
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        id2label={0: "negative", 1: "neutral", 2: "positive"},
        label2id={"negative": 0, "neutral": 1, "positive": 2},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    saved_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(text_folder, tmp_path) -> Path:
    return Path(shutil.copytree(text_folder, tmp_path / "copy"))


def rows(texts, after=None):
    return text_rows(texts, after or [""] * len(texts))


# -- texts -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1, 2, 32])
def test_texts_get_the_models_own_logits_whatever_the_batch(text_folder, batch_rows):
    local = make_model("hf-classifier", {"path": str(text_folder), "batch-rows": batch_rows})
    site = prepare(local, name="north", share_counts=CountsKind.WITHHELD)

    found = site.adapter.logits(rows(TEXTS))

    model = transformers.BertForSequenceClassification.from_pretrained(text_folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(text_folder)
    with torch.no_grad():
        expected = [
            model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in TEXTS
        ]
    assert site.adapter.classes == ("negative", "neutral", "positive")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_text_so_far_is_the_second_of_a_pair(text_folder):
    local = make_model("hf-classifier", {"path": str(text_folder)})

    alone, pair = local.model(rows(["good", "good"], ["", "bad film"]))

    assert not np.allclose(alone, pair)


def test_a_long_text_is_refused_unless_it_may_be_cut(text_folder):
    long = rows(["very " * 40])
    with pytest.raises(PromptTooLongError, match="the model reads 16"):
        make_model("hf-classifier", {"path": str(text_folder)}).model(long)

    cut = make_model("hf-classifier", {"path": str(text_folder), "truncate": True}).model(long)
    assert cut.shape == (1, 3)


def test_rows_that_hold_no_text_are_refused(text_folder):
    with pytest.raises(ShapeError):
        make_model("hf-classifier", {"path": str(text_folder)}).model(np.zeros((2, 4)))


def test_classes_may_be_named_at_the_site(text_folder):
    options = {"path": str(text_folder), "classes": ["no", "perhaps", "yes"]}

    assert make_model("hf-classifier", options).classes == ("no", "perhaps", "yes")
    with pytest.raises(ModelError, match="has 3 logits"):
        make_model("hf-classifier", {**options, "classes": ["no", "yes"]})


def test_the_digest_changes_with_weights_and_with_words(text_folder, copy):
    def digest(folder: Path) -> str:
        return make_model("hf-classifier", {"path": str(folder)}).digest

    before = digest(copy)
    assert before == digest(text_folder)
    words = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (copy / "tokenizer.json").write_text(json.dumps(words))
    assert digest(copy) != before


# -- folders that are refused ------------------------------------------------------------


def test_pickled_weights_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")

    with pytest.raises(ModelError, match="with safetensors beside it"):
        make_model("hf-classifier", {"path": str(copy)})


def test_an_index_that_leads_elsewhere_is_refused(copy):
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ModelError, match="same folder"):
        make_model("hf-classifier", {"path": str(copy)})


def test_code_in_the_folder_is_not_run(copy):
    mark = copy / "was-run"
    (copy / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass A: pass\n")
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.A", "AutoConfig": "evil.A"}
    (copy / "config.json").write_text(json.dumps(config))

    with contextlib.suppress(ModelError):
        make_model("hf-classifier", {"path": str(copy)})
    assert not mark.exists()


def test_a_head_that_was_never_trained_is_refused(copy, image_folder, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(copy)
    transformers.BertModel(config).save_pretrained(tmp_path / "headless")
    saved_tokenizer(tmp_path / "headless")

    with pytest.raises(ModelError, match="lacks weights"):
        make_model("hf-classifier", {"path": str(tmp_path / "headless")})


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_what_is_no_classifier_is_refused(copy, problem):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "problem_type": problem}))

    with pytest.raises(ModelError, match="no classifier"):
        make_model("hf-classifier", {"path": str(copy)})


def test_a_folder_without_a_fast_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").unlink()

    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        make_model("hf-classifier", {"path": str(copy)})


def test_a_name_of_a_hub_is_not_looked_up():
    with pytest.raises(ModelError, match=r"no config\.json"):
        make_model("hf-classifier", {"path": "bert-base-uncased"})


def test_damaged_weights_are_a_typed_error(copy):
    (copy / "model.safetensors").write_bytes(b"\0" * 64)

    with pytest.raises(ModelError, match="could not read the model folder"):
        make_model("hf-classifier", {"path": str(copy)})


@pytest.mark.parametrize(
    "more", [{"input": "sound"}, {"batch-rows": 0}, {"max-tokens": -1}], ids=str
)
def test_options_out_of_range_are_refused(text_folder, more):
    with pytest.raises(InvalidValueError):
        make_model("hf-classifier", {"path": str(text_folder), **more})


# -- images ------------------------------------------------------------------------------


def test_images_get_the_models_own_logits(image_folder):
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8))
    local = make_model(
        "hf-classifier", {"path": str(image_folder), "input": "image", "batch-rows": 2}
    )

    found = local.model(images)

    model = transformers.ViTForImageClassification.from_pretrained(image_folder).eval()
    with torch.no_grad():
        expected = model(torch.tensor(images, dtype=torch.float32)).logits.numpy()
    assert local.classes == ("cat", "dog")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rows_that_are_no_images_are_refused(image_folder):
    local = make_model("hf-classifier", {"path": str(image_folder), "input": "image"})
    for bad in (np.zeros((2, 8, 8)), np.zeros((2, 3, 8, 8), dtype=np.uint8)):
        with pytest.raises(ShapeError, match="an image is floating"):
            local.model(bad)


# -- causal language models --------------------------------------------------------------


@pytest.fixture(scope="module")
def causal_folder(tmp_path_factory) -> Path:
    from fedinfer_flower.simulation.facts.checkpoints import load

    folder = tmp_path_factory.mktemp("qwen3")
    model = load("qwen3")
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_without_candidates_it_is_a_language_model(causal_folder):
    from fedinfer_flower.language.model import LanguageModel

    assert isinstance(make_model("hf-causal-lm", {"path": str(causal_folder)}), LanguageModel)


def test_with_candidates_it_is_a_classifier_over_them(causal_folder):
    local = make_model("hf-causal-lm", {"path": str(causal_folder), "candidates": ["butor", "il"]})

    assert isinstance(local, LocalModel)
    assert set(local.classes) <= {"butor", "il"}
    scores = local.model(rows(["who ?"]))
    assert scores.shape == (1, len(local.classes))
    assert len(local.digest) == 64
