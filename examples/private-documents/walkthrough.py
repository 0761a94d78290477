"""Plays a researcher who asks sealed questions about documents that stay at two archives.

Run where `flwr run` works:  python walkthrough.py [CONNECTION] [--fusers FOLDER] [--quick]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from private_documents.task import ARCHIVES, NAMES, RECEIVER, WORLD, documents_of

from fedinfer_flower import Identity
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.querier.language_querier import LanguageQuerier
from fedinfer_flower.simulation.facts.preparation import Recipe, prepare
from fedinfer_flower.strategies.handover import write_whole


def say(text):
    print(text, flush=True)  # noqa: T201


def ask(folder, me, questions, medium, parts, connection):
    """Start the coordinator's run, seal the questions to its sites, and open what comes back."""
    exchange = folder / medium
    exchange.mkdir()
    config = f'exchange="{exchange}" medium="{medium}" querier="{me.key_id}" '
    config += f'fusers="{parts.fusers}" gate="{parts.gates[RECEIVER]}"'
    run = subprocess.Popen(
        [
            *("flwr", "run", ".", *connection, "--stream", "--run-config", config),
            *("--federation-config", f"num-supernodes={len(NAMES)}"),
        ],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (exchange / "cards.ready").exists():
        if run.poll() is not None:
            sys.exit(run.stdout.read())
        try:
            run.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    cards = [path.read_bytes() for path in sorted(exchange.glob("card-*.fi"))]
    # A real querier pins the sites' keys: LanguageQuerier(cards, pins=read_pins(...)).
    querier = LanguageQuerier(cards, identity=me)
    job = querier.ask(
        questions,
        receiver=RECEIVER,
        sharers=ARCHIVES,
        allow=() if medium == "own" else (medium,),
        decoding={"max_new_tokens": 8},
    )
    sealed = job.to_bytes()
    write_whole(exchange / "job.fi", sealed)
    log = run.communicate()[0]
    answer = exchange / "answer.fi"
    if not answer.exists():
        sys.exit(log)
    readable = any(question.encode() in sealed + answer.read_bytes() for question in questions)
    say(f"   the coordinator's files {'show' if readable else 'do not show'} a question")
    return querier.open(answer.read_bytes())[RECEIVER]


def right(opened, asked):
    return sum(a == fact.value for a, (fact, _) in zip(opened.texts, asked, strict=True)) / len(
        asked
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("connection", nargs="*")
    parser.add_argument("--fusers", type=Path, default=Path("trained"))
    parser.add_argument("--quick", action="store_true", help="train less; answers are worse")
    options = parser.parse_args()
    recipe = Recipe(steps=150, documents=450, gate_documents=120) if options.quick else Recipe()
    say(f"0. training the fusers and the gate of {RECEIVER}, on public facts")
    parts = prepare(options.fusers.resolve(), receivers=(RECEIVER,), recipe=recipe)

    asked = [row for name in ARCHIVES for row in documents_of(name)]
    known = [(fact, "") for fact in WORLD.facts(WORLD.private[NAMES.index(RECEIVER)])[:20]]
    questions = [fact.question() for fact, _ in asked + known]
    me = Identity.generate()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, medium in enumerate(("own", "cache", "text"), start=1):
            opened = ask(folder, me, questions, medium, parts, options.connection)
            of_documents, of_own = (
                right(
                    type(opened)(texts=opened.texts[part], used=opened.used[part]),
                    (asked + known)[part],
                )
                for part in (slice(len(asked)), slice(len(asked), None))
            )
            helped = sum(bool(used) for used in opened.used)
            say(
                f"{number}. {medium}: {of_documents:.2f} of the documents' questions right,"
                f" {of_own:.2f} of {RECEIVER}'s own; {helped} of {len(questions)} with help"
            )
    say("   (the archives do not share text: with it, the receiver answers alone)")


if __name__ == "__main__":
    try:
        main()
    except FedInferError as exc:
        sys.exit(str(exc))
