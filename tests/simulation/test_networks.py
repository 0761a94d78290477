"""Networks and data of sites that answer without reading the query."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from fedinfer_flower.encrypted_query.network import EncryptedNetwork
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.mpc import NetworkSpec
from fedinfer_flower.simulation import networks
from fedinfer_flower.simulation.data import DATASETS, load_dataset
from fedinfer_flower.simulation.institution import read_institution, write_institutions


@pytest.mark.parametrize("name", DATASETS)
def test_inputs_are_in_the_box_and_fill_it(name):
    boxed = networks.in_unit_box(load_dataset(name))
    rows = np.vstack([boxed.train_inputs, boxed.test_inputs])
    assert np.abs(rows).max() == 1.0
    if name != "digits":
        np.testing.assert_allclose(rows.min(axis=0), -1.0)
        np.testing.assert_allclose(rows.max(axis=0), 1.0)


@pytest.fixture(scope="module")
def wine():
    return networks.in_unit_box(load_dataset("wine"))


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_network_has_a_logit_for_a_class_that_the_site_never_saw(wine, kind):
    import torch

    seen = wine.train_labels < 2
    network = networks.fit_network(
        kind, wine.train_inputs[seen], wine.train_labels[seen], n_classes=3, seed=0
    )
    with torch.inference_mode():
        logits = network(torch.tensor(wine.train_inputs[seen], dtype=torch.float32)).numpy()
    assert logits.shape[1] == 3
    assert (logits.argmax(axis=1) == wine.train_labels[seen]).mean() > 0.95
    assert 2 not in logits.argmax(axis=1)


def test_square_network_loses_nothing_under_encryption(wine):
    network = networks.fit_network(
        networks.SQUARE_NETWORK, wine.train_inputs, wine.train_labels, n_classes=3, seed=0
    )
    form = EncryptedNetwork.from_torch(network, wine.train_inputs, classes=wine.classes)
    assert form.fidelity.agreement == 1.0


def test_relu_network_runs_on_shares(wine):
    network = networks.fit_network(
        networks.RELU_NETWORK, wine.train_inputs, wine.train_labels, n_classes=3, seed=0
    )
    spec, weights = NetworkSpec.from_torch(network, (13,))
    assert spec.input_shape == (13,)
    assert len(weights) == 4


def test_unknown_network_is_refused(wine):
    with pytest.raises(InvalidValueError, match="no network"):
        networks.fit_network("deep", wine.train_inputs, wine.train_labels, n_classes=3, seed=0)


def test_institution_keeps_kind_and_agreed_classes(wine, tmp_path):
    rows = networks.dirichlet_rows(wine.train_labels, n_sites=3, alpha=0.5, min_size=32, seed=0)
    write_institutions(tmp_path, wine, rows, seed=0, kinds=(networks.RELU_NETWORK,))
    local = read_institution(tmp_path, 1).fit()
    assert local.classes == ["0", "1", "2"]
    assert sum(local.class_counts.values()) < len(rows[1])  # some are held out


def test_dirichlet_rows_small_alpha_is_skewed_and_impossible_sizes_are_refused(wine):
    def widest(alpha):
        rows = networks.dirichlet_rows(
            wine.train_labels, n_sites=3, alpha=alpha, min_size=5, seed=1
        )
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(wine.train_labels)))
        shares = [np.bincount(wine.train_labels[r], minlength=3) / len(r) for r in rows]
        return max(share.max() for share in shares)

    assert widest(0.1) > widest(1000.0) + 0.2
    with pytest.raises(InvalidValueError, match="no Dirichlet"):
        networks.dirichlet_rows(wine.train_labels, n_sites=9, alpha=0.1, min_size=32, seed=0)


def test_doctests():
    result = doctest.testmod(networks)
    assert result.attempted > 0
    assert result.failed == 0
