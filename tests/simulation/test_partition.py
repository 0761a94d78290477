"""Data, partitions and institutions of the simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.simulation.data import DATASETS, load_dataset
from fedinfer_flower.simulation.institution import (
    KINDS,
    fit_kind,
    read_institution,
    write_institutions,
)
from fedinfer_flower.simulation.partition import SCHEMES, partition_rows


@pytest.mark.parametrize("name", DATASETS)
def test_load_dataset_known_name_splits_without_overlap(name: str) -> None:
    data = load_dataset(name, seed=1)

    train = {row.tobytes() for row in data.train_inputs}
    held_out = {row.tobytes() for row in data.test_inputs}
    assert len(train & held_out) == 0
    assert set(np.unique(data.test_labels)) == set(range(len(data.classes)))


def test_load_dataset_unknown_name_refused() -> None:
    with pytest.raises(InvalidValueError, match="no dataset"):
        load_dataset("imagenet")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_partition_rows_any_scheme_gives_no_row_twice_and_same_for_a_seed(scheme: str) -> None:
    labels = np.arange(300) % 6

    first = partition_rows(labels, n_sites=3, scheme=scheme, alpha=0.5, seed=4)
    again = partition_rows(labels, n_sites=3, scheme=scheme, alpha=0.5, seed=4)

    rows = np.concatenate(first)
    assert len(set(rows.tolist())) == len(rows)
    if scheme == "pathological":  # classes that fall to nobody are left out
        assert [len(set(labels[part])) for part in first] == [2, 2, 2]
    else:
        assert len(rows) == len(labels)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_partition_rows_dirichlet_keeps_the_minimum_size() -> None:
    labels = np.arange(200) % 4
    rows = partition_rows(labels, n_sites=5, alpha=0.1, min_size=10, seed=0)
    assert min(len(part) for part in rows) >= 10


def test_partition_rows_impossible_minimum_refused() -> None:
    with pytest.raises(InvalidValueError, match="no Dirichlet"):
        partition_rows(np.arange(40) % 4, n_sites=5, alpha=0.01, min_size=8, seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [1, 2])
def test_fit_kind_few_classes_gives_a_model_that_names_them(kind: str, n_classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % n_classes + 3
    inputs = rng.normal(size=(40, 5)) + 4.0 * labels[:, None]

    _, classes = fit_kind(kind, inputs, labels, seed=0)

    assert classes == [str(c) for c in range(3, 3 + n_classes)]


def test_institution_file_round_trip_holds_out_rows_it_does_not_train_on(tmp_path: Path) -> None:
    data = load_dataset("wine", seed=0)
    rows = partition_rows(data.train_labels, n_sites=3, scheme="iid", seed=0)
    write_institutions(tmp_path, data, rows, seed=0)

    site = read_institution(tmp_path, 1)
    trained = {row.tobytes() for row in site.inputs}
    held = {row.tobytes() for row in site.holdout_inputs}

    assert site.kind == KINDS[1]
    assert len(site.labels) + len(site.holdout_labels) == len(rows[1])
    assert not trained & held
    assert site.fit().class_counts == {
        str(c): float((site.labels == c).sum()) for c in np.unique(site.labels)
    }
