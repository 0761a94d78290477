"""Five hospitals with unlike many tumour records each, one that has none, and two rounds."""

import zlib

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

CLASSES = ("benign", "malignant")
RECORDS = (70, 52, 40, 29, 18)
FREE_RIDER = len(RECORDS)
N_SITES = len(RECORDS) + 1
ROUNDS = {1: (30, 150), 2: (30, 150)}
"""Questions and audits of each round: few of the one, so that there are enough of the other."""


def rows():
    """Return all records in a fixed random order, and their classes."""
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return x[order], 1 - y[order]


def site_model(partition):
    """Return what a site answers with, and the classes of its columns."""
    if partition == FREE_RIDER:
        return guess, CLASSES
    x, y = rows()
    start = sum(RECORDS[:partition])
    own = slice(start, start + RECORDS[partition])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    return model.fit(x[own], np.array(CLASSES)[y[own]]), None


def guess(inputs):
    """Answer by lot, always sure, and the same row in the same way each time."""
    return np.eye(2)[[zlib.crc32(row.tobytes()) % 2 for row in np.ascontiguousarray(inputs)]]


def asked_in(round_number):
    """Return questions, their truth, audits, and the audits' labels: rows of this round alone."""
    x, y = rows()
    start = sum(RECORDS) + sum(sum(ROUNDS[n]) for n in range(1, round_number))
    n_questions, n_audits = ROUNDS[round_number]
    questions = slice(start, start + n_questions)
    audits = slice(questions.stop, questions.stop + n_audits)
    return x[questions], y[questions], x[audits], y[audits]


def accuracy(partition):
    """Return how often a site is right on all rows of both rounds: only the example can."""
    x, y = rows()
    model, classes = site_model(partition)
    held_out = slice(sum(RECORDS), None)
    if classes is None:
        answers = model.predict(x[held_out])
    else:
        answers = np.array(classes)[model(x[held_out]).argmax(axis=1)]
    return float((answers == np.array(CLASSES)[y[held_out]]).mean())
