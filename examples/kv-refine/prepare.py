"""Trains the fusers into one model, or into all, on public facts; leaves out those that are there.

python prepare.py FOLDER [--receiver qwen3] [--steps 400]
"""

import argparse
from pathlib import Path

import torch

from fedinfer_flower.kv.fuser_bank import FuserBank
from fedinfer_flower.refine.fuser_training import TrainingOptions, default_spec, train_fuser
from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples
from fedinfer_flower.simulation.facts.world import FactWorld


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--receiver", choices=NAMES, action="append")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--documents", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, models = FactWorld(), {name: load(name) for name in NAMES}
    options.folder.mkdir(parents=True, exist_ok=True)
    bank = FuserBank(options.folder)
    for receiver in options.receiver or NAMES:
        for sharer in NAMES:
            ours, theirs = models[receiver], models[sharer]
            if sharer == receiver or (theirs.layout.model_digest, ours.layout.model_digest) in bank:
                continue
            # Facts and documents of the sharer, facts of the receiver, and of nobody: without
            # the last two a fuser unlearns what the receiver knows, and to say "I do not know".
            examples = fuser_examples(
                world,
                sharer=NAMES.index(sharer),
                receiver=NAMES.index(receiver),
                documents=options.documents,
            )
            made = train_fuser(
                ours,
                theirs,
                default_spec(ours, theirs),
                examples,
                TrainingOptions(steps=options.steps),
            )
            bank.add(made.fuser, made.card.to_dict())
            fused, control = made.card.fused["fact"], made.card.shuffled["fact"]
            print(  # noqa: T201
                f"{sharer} -> {receiver}: {made.card.seconds:.0f} s, held-out facts {fused:.2f},"
                f" with another question's cache {control:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
