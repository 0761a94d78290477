"""What shared caches and rewritten questions give away, on small language models.

python benchmarks/kv_attacks.py [--sharer qwen3] [--receiver qwen2] [--json FILE]

The sharer reads documents of three statements about people whom nobody knows; the receiver
asks for one of them. Attackers: a look-up in the first layer, candidates (all prompts that
are likely), and a decoder trained on public prompts, which ask for other people; values are drawn
anew. All shares in %; chance is the best constant guess.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedinfer_flower.attacks.cache_decoder import Recovered, train_decoder
from fedinfer_flower.attacks.cache_defences import (
    CacheChange,
    coded,
    noise_spread,
    noisy,
    rotated,
    rounded,
    unchanged,
)
from fedinfer_flower.attacks.cache_disclosure import SharedPrompts, shared_prompts
from fedinfer_flower.attacks.cache_secrets import fact_secrets
from fedinfer_flower.attacks.prompt_inversion import (
    cache_features,
    nearest_prompts,
    prompt_features,
    token_dictionary,
)
from fedinfer_flower.attacks.rephrase_inversion import rephrase_report
from fedinfer_flower.kv.fuser import Fuser
from fedinfer_flower.kv.layout import CacheEntries
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.language.rephrase import make_rephraser
from fedinfer_flower.refine.evaluation import accuracy, answers_fused
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.refine.fuser_training import TrainingOptions, default_spec, train_fuser
from fedinfer_flower.refine.pair_data import prepare_pair
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples, trial_examples
from fedinfer_flower.simulation.facts.world import WORDINGS, FactWorld, Person

DEFAULT = ShareSpec()
PAYLOADS = {
    "last 1": ShareSpec(last=1, decode=0),
    "last 1 + hidden": ShareSpec(last=1, decode=0, hidden=True),
    "last 1 + 1 decoded (default)": DEFAULT,
    "last 1 + 1 decoded + hidden": ShareSpec(last=1, decode=1, hidden=True),
}
STRANGERS_FREE = 270
"""New strangers before this one are in examples of fusers, gates and trials."""
ENGLISH = (
    ("Who wrote Emma?", "who wrote emma?", "Emma was written by whom?", "Author of Emma?"),
    ("What is the dose of Warfarin?", "what is the dose of warfarin?", "Dose of Warfarin?",
     "Which dose of Warfarin is given?"),
    ("Where is Bergen?", "where is bergen?", "Bergen is where?", "Location of Bergen?"),
    ("When was Ada Lovelace born?", "when was ada lovelace born?", "Birthday of Ada Lovelace?",
     "Ada Lovelace was born when?"),
    ("How many patients had Measles in 2019?", "how many patients had measles in 2019?",
     "Number of patients with Measles, 2019?", "Measles in 2019: how many patients?"),
    ("Is Ibuprofen safe with Lithium?", "is ibuprofen safe with lithium?",
     "Ibuprofen with Lithium, is it safe?", "Can Ibuprofen and Lithium be combined?"),
    ("Does Ward 7 have a free bed?", "does ward 7 have a free bed?", "Free bed in Ward 7?",
     "Has Ward 7 a bed that is free?"),
    ("Who treats Maria Keller?", "who treats maria keller?", "Maria Keller is treated by whom?",
     "Which doctor treats Maria Keller?"),
)  # fmt: skip
Row = dict[str, Any]
Change = Callable[[], CacheChange]


class Bench:
    """One pair of models, the examples, and what was measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.world = options, FactWorld()
        self.sharer, self.receiver = load(options.sharer), load(options.receiver)
        world = self.world
        groups = (*world.fuser_people, *world.gate_people)
        everyone = [p for group in groups for p in group] + world.strangers_seen[:1500]
        self.public = self.documents(options.public, everyone, seed=1)
        self.private = self.documents(400, world.strangers_new[STRANGERS_FREE:], seed=2)
        self.tables: dict[str, list[Row]] = {}

    def documents(self, n: int, people: Sequence[Person], *, seed: int) -> list[FuserExample]:
        """Return questions with documents of three statements."""
        drawn = self.world.documents(n, people=people, statements=3, seed=seed)
        return [FuserExample(fact.question(), fact.value, text, "doc3") for fact, text in drawn]

    def show(self, title: str, rows: list[Row]) -> None:
        """Keep a table, and print it."""
        self.tables[title] = rows
        columns = list(dict.fromkeys(column for row in rows for column in row))
        print(f"\n## {title}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for row in rows:
            print(f"| {' | '.join(shown(row.get(c, '')) for c in columns)} |", flush=True)

    # -- look-up -----------------------------------------------------------------------

    def look_up(self) -> None:
        """Read whole prompts off layer 0, with the changes that are said to protect."""
        rows, full = [], ShareSpec(last=0, decode=0)
        for name in NAMES:
            model = load(name)
            dictionary = token_dictionary(model)
            seen = shared_prompts(model, self.private, full)
            row: Row = {"sharer": name, "chance": 0.0}
            for change, make in CHANGES.items():
                (found,) = seen.changed(make()).look_up(dictionary)
                row |= {"chance": found.chance, change: found.share}
            given = shared_prompts(model, self.private, DEFAULT).changed(coded("int8"))
            row["decoded token, int8"] = given.look_up(dictionary)[1].share
            rows.append(row)
        self.show("Look-up in layer 0: tokens recovered, whole cache", rows)

    def layers(self) -> None:
        """Read each token off its own entries in one layer only, by a trained decoder."""
        full, rows = ShareSpec(last=0, decode=0), []
        known = shared_prompts(self.sharer, self.public[:1200], full)
        seen = shared_prompts(self.sharer, self.private, full)
        for layer in range(self.sharer.layout.layers):
            x, truth = tokens_of(known, layer)
            decoder = train_decoder(x, truth, steps=self.options.steps)
            (found,) = decoder.recovered(*tokens_of(seen, layer))
            row = {"layer": layer + 1, "chance": found.chance, "own token": found.share}
            rows.append(row)
        self.show(f"Decoder on one layer of a whole cache, {self.options.sharer}", rows)

    # -- decoder -----------------------------------------------------------------------

    def decode(
        self, public: CacheEntries, private: CacheEntries, *, noise: float = 0.0, longer: int = 1
    ) -> list[Recovered]:
        """Train on public prompts, with noise of one's own, and attack the others."""
        decoder = train_decoder(
            cache_features(public),
            [fact_secrets(e) for e in self.public],
            steps=longer * self.options.steps,
            jitter=noise_spread(public, noise) if noise else None,
        )
        truth = [fact_secrets(e) for e in self.private]
        return decoder.recovered(cache_features(private), truth)

    def payloads(self, fuser: Fuser) -> None:
        """Read secrets off what travels, and off what a fuser makes of it."""
        rows: list[Row] = []
        for name, share in PAYLOADS.items():
            known, seen = (self.shared(part, share, coded("int8")) for part in self.both)
            rows.append(self.line(name, self.decode(known, seen), rows))
            if share == DEFAULT:
                found = self.decode(known, seen, longer=3)
                rows.append(self.line("the same, decoder trained 3 times longer", found, rows))
                with torch.no_grad():
                    projected = fuser.project(known), fuser.project(seen)
                rows.append(self.line("the same after the fuser", self.decode(*projected), rows))
        known, seen = (self.shared(part, ShareSpec(last=8, decode=0)) for part in self.both)
        rows.append(self.line("last 8", self.decode(known, seen), rows))
        self.show(f"Decoder by payload, int8, sharer {self.options.sharer}", rows)

    def sharers(self) -> None:
        """Attack the default payload of the other models too."""
        rows: list[Row] = []
        for name in NAMES:
            model = load(name)
            known, seen = (
                coded("int8")(shared_prompts(model, part, DEFAULT).entries) for part in self.both
            )
            rows.append(self.line(name, self.decode(known, seen), rows))
        self.show("Decoder on the default payload, by sharer", rows)

    @property
    def both(self) -> tuple[list[FuserExample], list[FuserExample]]:
        """Examples to learn from, and those attacked."""
        return self.public, self.private

    def shared(
        self, examples: Sequence[FuserExample], share: ShareSpec, change: CacheChange = unchanged
    ) -> CacheEntries:
        """Return what travels."""
        return change(shared_prompts(self.sharer, examples, share).entries)

    def line(self, name: str, found: list[Recovered], rows: list[Row]) -> Row:
        """Return one row; the first line of a table is chance."""
        if not rows:
            rows.append({"payload": "chance", **{r.secret: r.chance for r in found}})
        return {"payload": name, **{r.secret: r.share for r in found}}

    # -- candidates --------------------------------------------------------------------

    def candidates(self) -> None:
        """Find the question among all that can be asked, and one value in a known document."""
        rows: list[Row] = []
        for name in NAMES:
            model = load(name)
            asked, listed = self.questions(model)
            documents, values = self.values(model)
            for change, make in CHANGES.items():
                row: Row = {"sharer": name, "change": change}
                observed = make()(shared_prompts(model, asked, DEFAULT).entries)
                places = nearest_prompts(cache_features(observed), listed)
                hits = (places == torch.arange(len(asked))).float()
                row[f"question among {len(listed):,}"] = float(hits.mean())
                observed = make()(shared_prompts(model, documents, DEFAULT).entries)
                places = nearest_prompts(cache_features(observed), values)
                row["unasked value among 12"] = float((places == 0).float().mean())
                rows.append(row)
        self.show("Candidates: default payload, model known to the attacker", rows)

    def questions(self, model: LanguageModel) -> tuple[list[FuserExample], torch.Tensor]:
        """Return questions to attack, and the features of all that can be asked."""
        world = self.world
        everyone = [*world.strangers_seen, *world.strangers_new]
        everyone += [p for group in world.people for p in group]
        facts = world.facts(world.private[0])
        rest = [f for f in world.facts(everyone) if f not in set(facts)]
        prompts = [model.prompts.ask(f.question()) for f in [*facts, *rest]]
        asked = [FuserExample(f.question(), f.value) for f in facts]
        return asked, prompt_features(model, prompts, DEFAULT)

    def values(self, model: LanguageModel) -> tuple[list[FuserExample], torch.Tensor]:
        """Return documents whose text is known but for one value; the right one comes first."""
        rng, world, documents, prompts = random.Random(0), self.world, [], []  # noqa: S311
        for example in self.private[:200]:
            statements = [s.strip() for s in example.document.removeprefix("D ").split(" .")[:-1]]
            others = [s for s in statements if s.split()[2:4] != asked_name(example)]
            if not others:
                continue
            line = rng.choice(others)
            relation, value = line.split()[0], line.split()[-1]
            known = [value, *(v for v in world.values[relation] if v != value)]
            documents.append(example)
            for guess in known:
                text = example.document.replace(line, f"{line.rsplit(' ', 1)[0]} {guess}")
                prompts.append(model.prompts.ask(example.question, documents=[text]))
        features = prompt_features(model, prompts, DEFAULT)
        return documents, features.reshape(len(documents), -1, features.shape[1])

    # -- defences ----------------------------------------------------------------------

    def defences(self, fuser: Fuser) -> None:
        """Compare what a change costs the receiver with what it costs the attacker."""
        world, names = self.world, (self.options.sharer, self.options.receiver)
        s, r = (NAMES.index(name) for name in names)
        trial = trial_examples(world, sharer=s, receiver=r)
        data = prepare_pair(self.receiver, self.sharer, trial, DEFAULT)
        known, seen = (self.shared(part, DEFAULT) for part in self.both)
        width = self.sharer.layout.floats_per_token(hidden=False)
        changes: Mapping[str, Change] = CHANGES | {
            "static4": lambda: coded("static4", scales=fuser.scales),
            "noise 4.0": lambda: noisy(4.0),
        }
        rows: list[Row] = []
        for name, make in changes.items():
            changed = replace(data, shared=make()(data.shared))
            answers = answers_fused(self.receiver, fuser, changed)
            right = accuracy(answers, trial, self.receiver.prompts)
            level = float(name.split()[1]) if name.startswith("noise") else 0.0
            learned = known if level else make()(known)
            found = self.decode(learned, make()(seen), noise=level)
            rows.append(
                {"change": name, **{f"right: {k}": v for k, v in right.items()}, **read(found)}
            )
        secret = rotated(width, seed=7)
        for name, learned in (
            ("secret rotation, never seen", known),
            (f"secret rotation, {len(self.public):,} known messages", secret(known)),
        ):
            rows.append({"change": name, **read(self.decode(learned, secret(seen)))})
        self.show(f"Changes to the default payload, {names[0]} to {names[1]}", rows)

    # -- rewriting ---------------------------------------------------------------------

    def rewrites(self) -> None:
        """Attack rewritten questions: the fact grammar, and English."""
        world, rows = self.world, []
        facts = world.facts(world.private[0])
        rng = random.Random(3)  # noqa: S311
        ways = [[w.format(relation=f.relation, first=f.person.first, last=f.person.last)
                 for w in WORDINGS] for f in facts]  # fmt: skip
        asked = [rng.choice(way) for way in ways]
        rest = world.facts([*world.private[1], *world.private[2], *world.strangers_new[:200]])
        listed = [f.question() for f in [*facts, *rest]]
        english = [rng.choice(way) for way in ENGLISH]
        for name in ("none", "template"):
            cases = {
                "fact grammar": (
                    make_rephraser(name, self.receiver),
                    asked,
                    listed,
                    ways,
                    names_of,
                ),
                "English": (
                    make_rephraser(name, None),
                    english,
                    [w[0] for w in ENGLISH],
                    ENGLISH,
                    None,
                ),
            }
            for case, (rephraser, questions, candidates, wordings, entities) in cases.items():
                report = rephrase_report(
                    rephraser, questions, candidates, wordings=wordings, entities=entities
                )
                row: Row = {"questions": case, "rephraser": name, "changed": report.rewritten}
                for one in report.rows:
                    if one.styles[0] == 1:
                        row[one.recovered.secret.split(" among")[0]] = one.recovered.share
                row["candidates"] = str(report.candidates)
                rows.append(row)
        self.show("Rewritten questions, style 1; links between styles 1 and 2", rows)


CHANGES: dict[str, Change] = {
    "none": lambda: unchanged,
    "int8": lambda: coded("int8"),
    "int4": lambda: coded("int4"),
    "2 bits": lambda: rounded(2),
    "noise 0.3": lambda: noisy(0.3),
    "noise 1.0": lambda: noisy(1.0),
    "noise 2.0": lambda: noisy(2.0),
}


def read(found: list[Recovered]) -> Row:
    wanted = ("asked last name", "answer", "unasked value")
    return {f"read: {r.secret}": r.share for r in found if r.secret in wanted}


def asked_name(example: FuserExample) -> list[str]:
    found = fact_secrets(example)
    return [*found["asked first name"], *found["asked last name"]]


def names_of(question: str) -> list[str]:
    found = fact_secrets(FuserExample(question, "-"))
    return [
        word for kind in ("asked first name", "asked last name", "relation") for word in found[kind]
    ]


def tokens_of(
    shared: SharedPrompts, layer: int
) -> tuple[torch.Tensor, list[dict[str, tuple[str]]]]:
    real = shared.ids >= 0
    truth = [{"own token": (str(i),)} for i in shared.ids[real].tolist()]
    return shared.entries.flat(layer)[real], truth


def shown(value: object) -> str:
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sharer", default="qwen3", choices=NAMES)
    parser.add_argument("--receiver", default="qwen2", choices=NAMES)
    parser.add_argument("--public", type=int, default=3000, help="prompts the decoder learns from")
    parser.add_argument("--steps", type=int, default=300, help="of the decoder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.disable_progress_bar()
    start, bench = time.perf_counter(), Bench(options)
    pair = {"sharer": NAMES.index(options.sharer), "receiver": NAMES.index(options.receiver)}
    spec = default_spec(bench.receiver, bench.sharer)
    examples = fuser_examples(bench.world, **pair)
    fuser = train_fuser(bench.receiver, bench.sharer, spec, examples, TrainingOptions()).fuser
    bench.look_up()
    bench.layers()
    bench.payloads(fuser)
    bench.sharers()
    bench.candidates()
    bench.defences(fuser)
    bench.rewrites()
    cost = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
    print(f"\n{cost['seconds']:.0f} s, {cost['cpu_seconds']:.0f} s of one processor")
    if options.json:
        options.json.write_text(json.dumps(bench.tables | cost, indent=2))


if __name__ == "__main__":
    main()
