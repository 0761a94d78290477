"""The coordinator: plans, asks the chosen, and compares with groups and with everybody."""

from pathlib import Path

import numpy as np
from flwr.serverapp import ServerApp

from choose_collaborators.task import split
from fedinfer_flower import FedEnsemble
from fedinfer_flower.selection import SiteHistory, make_selector
from fedinfer_flower.selection.gates import make_gate
from fedinfer_flower.strategies.config import InferConfig
from fedinfer_flower.strategies.fed_sequential import FedSequential

app = ServerApp()
SHARED = ("rule", "protection", "deadline", "min_available_nodes", "patience_s", "batch_size")
PART = 60


@app.main()
def main(grid, context):
    config = context.run_config
    _, queries, _, truth = split(config["seed"])
    if config["state"]:
        # Sites with a home never add the same row up with other sites: new rows in each run.
        part = slice(PART * config["part"], PART * (config["part"] + 1))
        say(remembered(grid, config, queries[part], truth[part]))
    else:
        say(compared(grid, config, queries, truth))


def remembered(grid, config, queries, truth):
    """Ask the chosen sites; the next run knows how quickly they answered."""
    path = Path(config["state"]) / "history.json"
    history = SiteHistory.load(path, missing_ok=True)
    known = len(history)
    row = ask_chosen(grid, config, queries, truth, history)
    history.save(path)
    return table([row]) + f"\nhistory: {known} sites before, {len(history)} now"


def compared(grid, config, queries, truth):
    """Ask the same rows three ways; sites without a home do not remember that."""
    rows = [ask_chosen(grid, config, queries, truth, SiteHistory())]
    settings = InferConfig.from_run_config(config).strategy_arguments()
    shared = {name: settings[name] for name in SHARED}

    selector = make_selector("early-exit", {"tau": config["tau"]})
    # No budget here: it would have to cover the worst case, in which all groups are asked.
    result = FedSequential(selector=selector, gates=gates(config), **shared).start(grid, queries)
    right, asked = result.prediction.accuracy(truth), result.n_sites_asked.mean()
    rows.append(("early-exit", right, asked, cost(result)))

    result = FedEnsemble(**shared).start(grid, queries)
    prices = [profile.price_per_query for profile in result.profiles.values()]
    right, credits = result.prediction.accuracy(truth), sum(prices) * len(queries)
    rows.append(("everybody, no gates", right, len(prices), credits))
    return table(rows)


def ask_chosen(grid, config, queries, truth, history):
    strategy = FedEnsemble.from_run_config(config, gates=gates(config), history=history)
    plan = strategy.plan(grid, n_queries=len(queries))
    say(plan.summary())  # nobody has been asked yet
    prediction = strategy.start(grid, queries).prediction
    return plan.selector, prediction.accuracy(truth), len(plan.sites), plan.price


def gates(config):
    """Return the gates of the run config, by name, and one that needs an option."""
    named = InferConfig.from_run_config(config).strategy_arguments()["gates"]
    return [*named, make_gate("jurisdiction", {"allowed": config["jurisdictions"]})]


def cost(result):
    """Return the credits of the groups that each query went to, if none of them failed."""
    sizes = [len(group) for group in result.plan.groups]
    earlier = np.cumsum([0, *sizes[:-1]])
    reached = [(result.n_sites_asked > n).mean() for n in earlier]
    return float(np.dot(reached, result.plan.price_per_group))


def table(rows):
    lines = [f"{'asked':<22}{'accuracy':>9}{'sites a query':>15}{'credits':>9}"]
    for name, accuracy, asked, credits in rows:
        lines.append(f"{name:<22}{accuracy:>9.4f}{asked:>15.1f}{credits:>9.0f}")
    return "\n".join(lines)


def say(text):
    print(text, flush=True)  # noqa: T201
