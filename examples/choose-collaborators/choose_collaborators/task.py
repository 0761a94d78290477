"""Twenty sites with skewed digits, each with an owner, a jurisdiction and a price."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

N_SITES = 20
ALPHA = 0.5
LAWS = ("eu", "eu", "ch", "eu", "us")


def split(seed):
    x, y = load_digits(return_X_y=True)
    return train_test_split(x / 16, y, test_size=0.3, stratify=y, random_state=seed)


def site_rows(partition, seed):
    """Return what one site holds: each class is dealt by Dirichlet shares."""
    x, _, y, _ = split(seed)
    rng = np.random.default_rng(seed)
    while True:  # until every site has enough to fit a model of two classes
        holder = np.empty(len(y), dtype=int)
        for label in range(10):
            shares = rng.dirichlet(np.full(N_SITES, ALPHA))
            holder[y == label] = rng.choice(N_SITES, size=(y == label).sum(), p=shares)
        mine = [y[holder == site] for site in range(N_SITES)]
        if min(len(labels) for labels in mine) >= 10 and all(len(set(m)) > 1 for m in mine):
            return x[holder == partition], y[holder == partition]


def card(partition):
    """Return what a site says of itself; sites 5 and 6 have one owner."""
    owner = "lakeside group" if partition in (5, 6) else f"hospital {partition}"
    return {"owner": owner, "jurisdiction": LAWS[partition % len(LAWS)]}


def price(partition):
    """Return credits a query: 1.0 to 2.5."""
    return 1.0 + partition * 7 % 4 / 2
