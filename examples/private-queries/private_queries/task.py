"""Ten clinics with a tenth of the breast cancer records each; the rest are queries."""

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

N_SITES = 10


def split():
    x, y = load_breast_cancer(return_X_y=True)
    return train_test_split(x, y, test_size=0.3, stratify=y, random_state=0)


def site_rows(partition):
    x, _, y, _ = split()
    kept = np.arange(len(y)) % N_SITES == partition
    return x[kept], y[kept]
