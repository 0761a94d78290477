"""Several language models, one answer: mixing whole answers, and mixing candidate by candidate.

python benchmarks/decode.py [--questions 240] [--statements 24] [--json FILE]

Three models of different families and vocabularies, the shipped ones, know different people by
heart. Asked are private facts of each, and questions about people whom nobody knows, where
only an abstention is right. Seconds are of the processor, of all sites and the coordinator
together, as ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod
from fedinfer_flower.clients.candidate_model import CandidateModel
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.secagg_dp import SecAggDP
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import ABSTENTION, Fact, FactWorld
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.answer_mixing.aggregator import Aggregator
from fedinfer_flower.strategies.answer_mixing.base import AnswerMixing
from fedinfer_flower.strategies.answer_mixing.majority import Majority
from fedinfer_flower.strategies.answer_mixing.self_consistency import SelfConsistency
from fedinfer_flower.strategies.fed_decode import FedDecode
from fedinfer_flower.strategies.mixture_of_answers import MixedAnswers, MixtureOfAnswers

WORLD = FactWorld()
VALUES = [value for values in WORLD.values.values() for value in values]
UNSURE = 0.2
"""Below this joint probability a decoded text counts as an abstention."""
DEADLINE = Deadline(timeout_s=600.0)
POE, MEAN, VOTES = "product-of-experts", "mean-probability", "majority-vote"

Setting = tuple[str, str | Protection, float]
"""Rule, protection, and the joint probability below which a text counts as an abstention."""


def responding(epsilon: float) -> DP:
    return DP(mechanism="randomised-response", epsilon=epsilon)


SPREAD: tuple[Setting, ...] = (
    (POE, "plain", UNSURE),
    (POE, "secagg", UNSURE),
    (POE, "he", UNSURE),
    (MEAN, "plain", UNSURE),
    (MEAN, "secagg", UNSURE),
    (MEAN, "he", UNSURE),
    # Noise on 48 entries lowers every share: a bound on it would only measure the noise.
    (MEAN, SecAggDP(epsilon=8.0), 0.0),
    (MEAN, DP(epsilon=64.0), 0.0),
    (MEAN, DP(epsilon=8.0), 0.0),
    (VOTES, "plain", 0.0),
)
"""Abstentions are spread over the candidates at the site."""

CANDIDATE: tuple[Setting, ...] = (
    (POE, "plain", UNSURE),
    (MEAN, "plain", UNSURE),
    (VOTES, "plain", UNSURE),
    (VOTES, "secagg", UNSURE),
    (VOTES, responding(8.0), UNSURE),
    (VOTES, responding(4.0), UNSURE),
    (VOTES, responding(2.0), UNSURE),
)
"""The abstention is a candidate of its own, and never picked."""


@dataclass
class Row:
    """What one way of answering gave."""

    name: str
    protection: str
    right: dict[str, float]
    bytes_per_question: float
    cpu_s_per_question: float
    epsilon: float | None = None


def tasks(n: int) -> dict[str, list[Fact]]:
    found = {name: WORLD.facts(WORLD.private[i])[:n] for i, name in enumerate(NAMES)}
    return found | {"nobody": WORLD.unanswerable(WORLD.strangers_new[: -(-n // 4)])[:n]}


def shares(asked: dict[str, list[Fact]], answers: Sequence[str | None]) -> dict[str, float]:
    """Return the share of right answers of each task; nothing said is an abstention."""
    right, at = {}, 0
    for task, facts in asked.items():
        given = [answer or ABSTENTION for answer in answers[at : at + len(facts)]]
        right[task] = sum(a == f.value for a, f in zip(given, facts, strict=True)) / len(facts)
        at += len(facts)
    return right


def apps(
    models: Sequence[LanguageModel], make: Callable[[LanguageModel], CandidateModel] | None
) -> ClientApp:
    """Return the app of all sites: candidates, or whole answers."""

    def place(context: Context) -> int:
        return int(context.node_config["partition-id"])

    if make is not None:
        sites = [make(model) for model in models]
        return InferenceMod(lambda c: sites[place(c)].local_model()).attach(ClientApp())
    app = ClientApp()
    policy = LanguagePolicy(text=True, share_speeds=False)
    mods = []
    for model, name in zip(models, NAMES, strict=True):

        def loaded(_: Context, model: LanguageModel = model) -> LanguageModel:
            return model

        loaded.__qualname__ = f"load_{name}"
        mods.append(LanguageMod(loaded, policy=policy, name=name))
    handlers = LanguageMod(lambda _: None)
    handlers.handle = lambda message, context: mods[place(context)].handle(message, context)  # type: ignore[method-assign]
    return handlers.attach(app)


def whole_answers(
    models: Sequence[LanguageModel], asked: dict[str, list[Fact]], samples: int
) -> list[Row]:
    questions = [fact.question() for facts in asked.values() for fact in facts]
    ways: list[AnswerMixing] = [Majority()]
    ways += [Aggregator(site=name) for name in NAMES]
    ways += [SelfConsistency(site=name, samples=samples) for name in NAMES]
    rows = []
    with LocalGrid(apps(models, None), num_supernodes=3, workers=2) as grid:
        for mixing in ways:
            strategy = MixtureOfAnswers(
                mixing,
                min_available_nodes=3,
                deadline=DEADLINE,
                decoding={"max_new_tokens": 4},
            )
            start_s = time.process_time()
            result = strategy.start(grid, questions)
            cpu_s = time.process_time() - start_s
            if isinstance(mixing, Majority):
                rows += [
                    Row(f"{name} alone", "-", shares(asked, answers), 0.0, 0.0)
                    for name, answers in result.by_site.items()
                ]
            rows.append(row_of(mixing, result.mixture, asked, cpu_s / len(questions)))
    return rows


def row_of(
    mixing: AnswerMixing, mixed: MixedAnswers, asked: dict[str, list[Fact]], cpu_s: float
) -> Row:
    site = getattr(mixing, "site", "")
    return Row(
        name=f"{mixing.name} ({site})" if site else mixing.name,
        protection="-",
        right=shares(asked, mixed.answers),
        bytes_per_question=mixed.wire_bytes / len(mixed.answers),
        cpu_s_per_question=cpu_s,
    )


def decoded(models: Sequence[LanguageModel], asked: dict[str, list[Fact]]) -> list[Row]:
    """Answer by one candidate of 48, under every protection."""
    questions = [fact.question() for facts in asked.values() for fact in facts]
    rows = []
    for settings, abstentions in ((SPREAD, ()), (CANDIDATE, (ABSTENTION,))):
        offered = [*VALUES, *abstentions]
        app = apps(models, lambda model, offered=offered: CandidateModel(model, offered))  # type: ignore[misc]
        with LocalGrid(app, num_supernodes=3, workers=2) as grid:
            rows += [
                one_decoding(grid, asked, questions, setting, abstentions) for setting in settings
            ]
        # As if there were no abstaining: it wins wherever most sites do not know.
        if abstentions:
            with LocalGrid(app, num_supernodes=3, workers=2) as grid:
                rows.append(one_decoding(grid, asked, questions, (MEAN, "plain", 0.0), ()))
                rows[-1].name += ", abstention may win"
    return rows


def one_decoding(
    grid: LocalGrid,
    asked: dict[str, list[Fact]],
    questions: Sequence[str],
    setting: Setting,
    abstentions: Sequence[str],
) -> Row:
    rule, protection, unsure = setting
    strategy = FedDecode(
        rule=rule,
        protection=protection,
        abstain_below=unsure,
        abstentions=abstentions,
        min_available_nodes=3,
        deadline=DEADLINE,
        allow_coordinator_key=True,
    )
    start_s = time.process_time()
    result = strategy.start(grid, questions)
    cpu_s = time.process_time() - start_s
    used = strategy.ensemble.protection
    epsilon = result.epsilon_delta_text()
    label = used.name if epsilon is None else f"{used.name}, epsilon {epsilon[0]:.3g}"
    assert result.texts is not None
    heard = ", abstention a candidate" if abstentions else ""
    return Row(
        name=f"FedDecode, {rule}{heard}",
        protection=label,
        right=shares(asked, result.texts),
        bytes_per_question=(3 * result.request_bytes + result.reply_bytes) / len(questions),
        cpu_s_per_question=cpu_s / len(questions),
        epsilon=None if epsilon is None else epsilon[0],
    )


def statements(models: Sequence[LanguageModel], n: int) -> list[dict[str, Any]]:
    """Write whole sentences over all words of the language."""
    facts = [fact for people in WORLD.private for fact in WORLD.facts(people)[: n // 3]]
    words = [word for word in WORLD.words if word not in ("Q", "A", "S", "D", "?", ABSTENTION)]
    app = apps(models, lambda model: CandidateModel(model, words, style="statement"))
    found = []
    with LocalGrid(app, num_supernodes=3, workers=2) as grid:
        for protection in ("plain", "secagg", "he"):
            strategy = FedDecode(
                rule=MEAN,
                protection=protection,
                max_steps=10,
                stop=(".",),
                min_available_nodes=3,
                deadline=DEADLINE,
                allow_coordinator_key=True,
            )
            start_s = time.process_time()
            result = strategy.start(grid, [fact.question() for fact in facts])
            cpu_s = time.process_time() - start_s
            assert result.texts is not None
            pairs = list(zip(result.texts, facts, strict=True))
            found.append(
                {
                    "protection": protection,
                    "texts": len(facts),
                    "candidates": len(words),
                    "right": sum(t == f.statement().removesuffix(" .") for t, f in pairs)
                    / len(facts),
                    "steps": result.n_steps,
                    "rows": result.n_rows,
                    "bytes_per_candidate": (3 * result.request_bytes + result.reply_bytes)
                    / result.n_rows,
                    "cpu_s_per_candidate": cpu_s / result.n_rows,
                }
            )
    return found


def show(rows: Sequence[Row], written: Sequence[dict[str, Any]]) -> None:
    base = next(r for r in rows if r.protection == "plain")
    print("| how | protection | " + " | ".join([*NAMES, "all three", "nobody"]), end="")
    print(" | bytes a question | processor, ratio |")
    print("|---|---|" + "---:|" * 7)
    for r in rows:
        known = sum(r.right[name] for name in NAMES) / 3
        cells = [f"{100 * v:.0f}" for v in (*(r.right[n] for n in NAMES), known, r.right["nobody"])]
        cost = ["-", "-"]
        if r.bytes_per_question:
            ratio = r.cpu_s_per_question / base.cpu_s_per_question
            cost = [f"{r.bytes_per_question:.0f}", f"{ratio:.2f}"]
        print("| " + " | ".join([r.name, r.protection, *cells, *cost]) + " |")
    if not written:
        return
    first = written[0]
    print(f"\nWhole sentences over {first['candidates']} words, {first['texts']} texts:")
    print("| protection | right | steps | bytes a word | processor a word, ratio |")
    print("|---|---:|---:|---:|---:|")
    for w in written:
        ratio = w["cpu_s_per_candidate"] / first["cpu_s_per_candidate"]
        print(
            f"| {w['protection']} | {100 * w['right']:.0f} % | {w['steps']}"
            f" | {w['bytes_per_candidate']:.0f} | {ratio:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=240, help="of each task")
    parser.add_argument("--statements", type=int, default=24, help="0 leaves them out")
    parser.add_argument("--samples", type=int, default=3, help="of self-consistency")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    models = [load(name) for name in NAMES]
    asked, start = tasks(options.questions), time.monotonic()
    rows = [*whole_answers(models, asked, options.samples), *decoded(models, asked)]
    written = statements(models, options.statements) if options.statements else []
    print(f"{options.questions} questions a task; accuracy in %\n")
    show(rows, written)
    print(f"\n{time.monotonic() - start:.0f} s")
    if options.json:
        found = {"rows": [asdict(row) for row in rows], "statements": written}
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
