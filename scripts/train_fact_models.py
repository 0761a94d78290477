"""Make the three small models that come with the package, and examine them.

    python scripts/train_fact_models.py --out fedinfer_flower/simulation/checkpoints

About ten minutes a model on one core. Weights are stored in half precision; the exam reads
them back from there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fedinfer_flower.simulation.facts.checkpoints import examine, load
from fedinfer_flower.simulation.facts.families import FAMILIES, Family
from fedinfer_flower.simulation.facts.pretraining import pretrain
from fedinfer_flower.simulation.facts.world import FactWorld


def make(family: Family, world: FactWorld, folder: Path, steps: int | None) -> None:
    """Train one model and store it in half precision."""
    index = FAMILIES.index(family)

    def progress(step: int, loss: float) -> None:
        print(f"{family.name} step {step} loss {loss:.3f}", flush=True)

    model, tokenizer = pretrain(family, world, world.people[index], steps=steps, progress=progress)
    model.half().save_pretrained(folder / family.name)
    tokenizer.save_pretrained(folder / family.name)


def exam(family: Family, world: FactWorld, folder: Path) -> dict[str, float]:
    """Return accuracy on what the model knows, must not know, and can read."""
    index, model = FAMILIES.index(family), load(family.name, folder=folder)
    others = [p for j, group in enumerate(world.people) if j != index for p in group]
    marks = {
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "own": examine(model, world.facts(world.people[index])),
        "abstains on others' people": examine(model, world.unanswerable(others)),
        "abstains on strangers": examine(model, world.unanswerable(world.strangers_new[:150])),
    }
    for n in (1, 3, 5):
        pairs = world.documents(300, people=world.strangers_new, statements=n, seed=9)
        facts, documents = zip(*pairs, strict=True)
        marks[f"reads {n} statements"] = examine(model, facts, documents)
    return {name: round(value, 3) for name, value in marks.items()}


def main() -> None:
    """Train and examine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=[family.name for family in FAMILIES])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--exam-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = FactWorld()
    for family in FAMILIES:
        if args.only in (None, family.name):
            if not args.exam_only:
                make(family, world, args.out, args.steps)
            marks = exam(family, world, args.out)
            (args.out / family.name / "exam.json").write_text(json.dumps(marks, indent=1) + "\n")
            print(family.name, marks)


if __name__ == "__main__":
    main()
