"""The coordinator: puts the same questions in every medium, and counts right answers."""

from flwr.serverapp import ServerApp

from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.facts.checkpoints import NAMES
from fedinfer_flower.strategies.fed_refine import FedRefine
from kv_refine.task import facts_of_everybody

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    facts = facts_of_everybody(config["questions"])
    for medium in config["media"].split(","):
        strategy = FedRefine(
            receiver=config["receiver"],
            medium=medium,
            allow=("text", "cache"),
            decoding={"max_new_tokens": 8},
            deadline=Deadline(timeout_s=120.0),
            min_available_nodes=len(NAMES),
        )
        result = strategy.start(grid, [fact.question() for fact in facts])
        for name, answers in result.answers.items():
            right = sum(a == fact.value for a, fact in zip(answers, facts, strict=True))
            print(f"{medium}: {name} {right / len(facts):.3f} right", flush=True)  # noqa: T201
        for failure in result.failures:
            print(f"{medium}: {failure.sharer} {failure.error_code}", flush=True)  # noqa: T201
