"""Settlement: bytes and milliseconds a role, and exactness, in each form of evidence.

python benchmarks/settlement.py [--json FILE] [--repeats 15] [--sites 10] [--audits 200]

Milliseconds are processor time of one process with one thread, medians over repeats in which
the forms take turns. All rows are audits, in one batch. The scheme is `brier-shapley`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fedinfer_flower.incentives import AuditedAnswers, make_scheme
from fedinfer_flower.settlement import (
    AuditRow,
    EvidenceBook,
    EvidenceForm,
    QuerierDesk,
    SettlementDesk,
    SettlementKeys,
    site_evidence,
)
from fedinfer_flower.wire.identity import Identity

SCHEME = make_scheme("brier-shapley")
FIGURES = (
    "site_bytes",
    "request_bytes",
    "querier_bytes",
    "rows_bytes",
    "site_ms",
    "coordinator_ms",
    "querier_ms",
    "error",
    "noise",
)


class Stopwatch:
    """Adds up the processor time of each role."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {"site": 0.0, "coordinator": 0.0, "querier": 0.0}

    def of(self, role: str, call: Callable[[], object]) -> object:
        """Call, and add what it took to a role."""
        start = time.process_time()
        done = call()
        self.ms[role] += 1e3 * (time.process_time() - start)
        return done


def settled(
    form: EvidenceForm,
    answers_ktc: np.ndarray,
    labels: np.ndarray,
    *,
    sites: list[Identity],
    querier: Identity,
    keys: SettlementKeys,
) -> dict[str, float]:
    """Settle one epoch with real keys; count bytes and time."""
    n_sites, n_audits, n_classes = answers_ktc.shape
    watch, sizes, public = Stopwatch(), {}, keys.public_key
    book = EvidenceBook(form)
    for site, rows in zip(sites, answers_ktc, strict=True):
        payload = watch.of(
            "site",
            lambda site=site, rows=rows: site_evidence(
                form,
                rows,
                querier=querier.public,
                evidence_key=public,
                identity=site,
                query_id="q-0",
            ),
        )
        sizes["site_bytes"] = len(payload)
        watch.of(
            "coordinator",
            lambda site=site, payload=payload: book.add(
                "q-0", site.key_id, payload, n_queries=n_audits, n_classes=n_classes
            ),
        )
    desk = SettlementDesk(book, scheme=SCHEME, querier=querier.public, evidence_key=public)
    request = watch.of("coordinator", desk.request)
    audits = [AuditRow(query_id="q-0", row=t, label=int(y)) for t, y in enumerate(labels)]
    opening = watch.of(
        "querier",
        lambda: QuerierDesk(
            request,
            scheme=SCHEME,
            asked={"q-0": n_audits},
            sites=[site.public for site in sites],
            identity=querier,
            keys=keys,
            noise_std=0.0,
        ),
    )
    reply = watch.of("querier", lambda: opening.settle(audits))
    sizes |= {"request_bytes": len(request.to_bytes()), "querier_bytes": len(reply.to_bytes())}
    sizes["rows_bytes"] = 0
    if form is EvidenceForm.CKKS:
        blinded = watch.of("coordinator", lambda: desk.blind(reply))
        sums = watch.of("querier", lambda: opening.open_sums(blinded))
        done = watch.of("coordinator", lambda: desk.finish_blinded(sums))
        sizes["rows_bytes"] = len(blinded.to_bytes())
        sizes["querier_bytes"] += len(sums.to_bytes())
    else:
        done = watch.of("coordinator", lambda: desk.finish(reply))
    clear = SCHEME.contributions(AuditedAnswers(probabilities_ktc=answers_ktc, labels=labels))
    values = np.array([done.values[site.key_id] for site in sites])
    return {
        **sizes,
        "site_ms": watch.ms["site"] / n_sites,
        "coordinator_ms": watch.ms["coordinator"],
        "querier_ms": watch.ms["querier"],
        "error": float(np.abs(values - clear).max() / np.ptp(clear)),
        "noise": float(done.noise_scale / np.ptp(clear)),
    }


def measure(n_sites: int, n_audits: int, n_classes: int, repeats: int) -> dict[str, dict]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, n_classes, size=n_audits)
    skill = np.linspace(0.0, 3.0, n_sites)[:, None, None]
    logits = skill * np.eye(n_classes)[labels] + rng.normal(size=(n_sites, n_audits, n_classes))
    answers = np.exp(logits)
    answers /= answers.sum(axis=-1, keepdims=True)
    parties = {
        "sites": [Identity.generate() for _ in range(n_sites)],
        "querier": Identity.generate(),
        "keys": SettlementKeys.make(),
    }
    found: dict[str, list[dict[str, float]]] = {form.value: [] for form in EvidenceForm}
    for number in range(-1, repeats):
        for form in EvidenceForm:
            figures = settled(form, answers, labels, **parties)
            if number >= 0:  # the first of each imports and loads
                found[form.value].append(figures)
    return {
        form: {
            name: (max if name == "error" else statistics.median)(run[name] for run in runs)
            for name in FIGURES
        }
        for form, runs in found.items()
    }


def print_table(found: Mapping[str, Mapping[str, float]]) -> None:
    print(
        "| evidence | site, bytes | request, bytes | querier sends, bytes | blinded rows, bytes"
        " | site, ms | coordinator, ms | querier, ms | all roles / clear"
        " | largest error / spread of scores | noise sd / spread |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    n_sites = found["clear"]["n_sites"]
    total = {
        form: n_sites * row["site_ms"] + row["coordinator_ms"] + row["querier_ms"]
        for form, row in found.items()
    }
    for form, row in found.items():
        print(
            f"| {form} | {row['site_bytes']:,} | {row['request_bytes']:,}"
            f" | {row['querier_bytes']:,} | {row['rows_bytes']:,} | {row['site_ms']:.2f}"
            f" | {row['coordinator_ms']:.1f} | {row['querier_ms']:.1f}"
            f" | {total[form] / total['clear']:.1f} | {row['error']:.1e} | {row['noise']:.1e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--audits", type=int, default=200)
    parser.add_argument("--classes", type=int, default=10)
    options = parser.parse_args()
    found = measure(options.sites, options.audits, options.classes, options.repeats)
    for row in found.values():
        row["n_sites"] = options.sites
    print(f"{options.sites} sites, {options.audits} audits, {options.classes} classes\n")
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
