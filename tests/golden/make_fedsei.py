"""Write fedsei.json: what FedSEI's formulas give for made-up logits.

Written from the formulas of the paper (arXiv 2603.02214) and its published experiments,
in loops over plain numbers and without a line of the package or of the original, so that
an error would have to be made twice. Run it from anywhere: python make_fedsei.py
"""

import json
import math
import re
from pathlib import Path

SITES, QUERIES, CLASSES, COPIES = 4, 6, 7, 3
RULES = [
    *("majority-vote", "mean-probability", "mean-logit", "entropy-weighted"),
    *("spectral", "consensus", "hybrid"),
    *("tta-soft", "tta-l2", "tta-cosine", "tta-kl", "tta-js"),
]
TOP, GAMMA, BETA, ENTROPY_FLOOR = 5, 1.0, 5.0, 1e-12


def made_up(site, query, label, copy):
    """Return a logit in about [-2, 3]: no probability comes near any floor."""
    base = 1.7 * math.sin(1.3 * site + 2.1 * query + 3.7 * label + 0.4 * site * label)
    base += 1.2 if label == query else 0.0
    shift = 0.35 * math.sin(5.0 * copy + 1.9 * site + 0.7 * query + 2.3 * label)
    return round(base + (shift if copy else 0.0), 6)


def softmax(row):
    powers = [math.exp(z) for z in row]
    return [e / sum(powers) for e in powers]


def entropy(p):
    return -sum(x * math.log(x + ENTROPY_FLOOR) for x in p)


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def weighted(rows, weights):
    """Return sum_k w_k p_k / sum_k w_k."""
    total = sum(weights)
    return [
        sum(w * row[c] for w, row in zip(weights, rows, strict=True)) / total
        for c in range(CLASSES)
    ]


def vote(row):
    return [1.0 if c == row.index(max(row)) else 0.0 for c in range(CLASSES)]


def spectral_weights(confidence):
    """Return |v| / sum |v| for the top eigenvector, by power iteration."""
    centred = [[s - sum(row) / len(row) for s in row] for row in confidence]
    covariance = [
        [sum(a * b for a, b in zip(i, j, strict=True)) / (QUERIES - 1) for j in centred]
        for i in centred
    ]
    v = [1.0] * SITES
    for _ in range(20_000):
        v = [sum(c * x for c, x in zip(row, v, strict=True)) for row in covariance]
        length = math.sqrt(sum(x * x for x in v))
        v = [x / length for x in v]
    return [abs(x) / sum(abs(y) for y in v) for x in v]


def consensus_distances(rows):
    middle = mean(rows)
    return [0.5 * (divergence(p, middle) + divergence(middle, p)) for p in rows]


def instability(original, copies, distance):
    """Return the mean distance over copies, on the top classes of the original's logits."""
    ranked = sorted(range(CLASSES), key=lambda c: -original[c])[:TOP]
    return sum(distance(original, copy, ranked) for copy in copies) / len(copies)


def top_probabilities(row, ranked):
    p = softmax(row)
    return [p[c] / sum(p[i] for i in ranked) for c in ranked]


def l2(original, copy, ranked):
    return math.sqrt(sum((copy[c] - original[c]) ** 2 for c in ranked))


def cosine(original, copy, ranked):
    a, b = [original[c] for c in ranked], [copy[c] for c in ranked]
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1.0 - dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def kl(original, copy, ranked):
    return divergence(top_probabilities(original, ranked), top_probabilities(copy, ranked))


def js(original, copy, ranked):
    p, q = top_probabilities(original, ranked), top_probabilities(copy, ranked)
    middle = [0.5 * (a + b) for a, b in zip(p, q, strict=True)]
    return 0.5 * (divergence(p, middle) + divergence(q, middle))


def main():
    """Return the document that the file holds."""
    grid = range(QUERIES)
    logits = [[[made_up(k, n, c, 0) for c in range(CLASSES)] for n in grid] for k in range(SITES)]
    copies = [
        [
            [[made_up(k, n, c, t) for c in range(CLASSES)] for n in grid]
            for t in range(1, COPIES + 1)
        ]
        for k in range(SITES)
    ]
    probabilities = [[softmax(row) for row in site] for site in logits]
    confidence = [[max(row) for row in site] for site in probabilities]
    alpha = spectral_weights(confidence)

    expected = {name: [] for name in RULES}
    for n in grid:
        z, p = [site[n] for site in logits], [site[n] for site in probabilities]
        near = [math.exp(-BETA * d) for d in consensus_distances(p)]
        steady = [mean([softmax(copy[n]) for copy in site]) for site in copies]
        expected["majority-vote"].append([sum(v) for v in zip(*map(vote, z), strict=True)])
        expected["mean-probability"].append(mean(p))
        expected["mean-logit"].append(mean(z))
        expected["entropy-weighted"].append(weighted(p, [math.exp(-entropy(q)) for q in p]))
        expected["spectral"].append(weighted(p, alpha))
        expected["consensus"].append(weighted(p, near))
        expected["hybrid"].append(weighted(p, [a * g for a, g in zip(alpha, near, strict=True)]))
        expected["tta-soft"].append(mean(steady))
        for name, distance in (("l2", l2), ("cosine", cosine), ("kl", kl), ("js", js)):
            unstable = [
                instability(z[k], [copy[n] for copy in copies[k]], distance) for k in range(SITES)
            ]
            weights = [math.exp(GAMMA * u) for u in unstable]
            expected[f"tta-{name}"].append(weighted(steady, weights))
    return {
        "provenance": (
            "Formulas of FedSEI (arXiv 2603.02214) worked out by make_fedsei.py beside this file"
            " from made-up logits. Combined rows, one a query: sums of votes for majority-vote,"
            " means of logits for mean-logit, weighted means of probabilities for the rest."
            " Spectral weights by power iteration."
        ),
        "logits_kbc": logits,
        "augmented_ktbc": copies,
        "expected_bc": expected,
    }


if __name__ == "__main__":
    target = Path(__file__).with_name("fedsei.json")
    text = json.dumps(main(), indent=1)
    # One row of numbers a line.
    text = re.sub(r"\[\s+([^\[\]]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    target.write_text(text + "\n")
