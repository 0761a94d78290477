"""Entry point of the `fedinfer` command."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedinfer_flower.cli.attack import attack
from fedinfer_flower.cli.budget import budget_app
from fedinfer_flower.cli.fuser import fuser_app
from fedinfer_flower.cli.gateway import gateway_app
from fedinfer_flower.cli.key import key
from fedinfer_flower.cli.ledger import ledger_app
from fedinfer_flower.cli.policy import policy_app
from fedinfer_flower.cli.querier import querier_app
from fedinfer_flower.cli.query import query
from fedinfer_flower.cli.refine import refine
from fedinfer_flower.cli.serve import serve
from fedinfer_flower.cli.site import site_app
from fedinfer_flower.cli.verify import verify
from fedinfer_flower.errors import ConfigError, FedInferError

__all__ = ["app", "run"]

app = typer.Typer(
    help="Federated inference on Flower: what Flower's own commands have no verb for.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(querier_app, name="querier")
app.add_typer(budget_app, name="budget")
app.add_typer(fuser_app, name="fuser")
app.add_typer(ledger_app, name="ledger")
app.add_typer(site_app, name="site")
app.add_typer(policy_app, name="policy")
app.add_typer(gateway_app, name="gateway")
app.command()(attack)
app.command()(key)
app.command()(query)
app.command()(refine)
app.command()(serve)
app.command()(verify)


@app.command()
def demo(
    dataset: Annotated[str, typer.Option(help="digits, breast_cancer or wine")] = "digits",
    sites: Annotated[int, typer.Option(min=1, max=50, help="number of institutions")] = 5,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration; small = skewed")] = 0.1,
    rule: Annotated[str, typer.Option(help="ensemble rule, or auto")] = "auto",
    protect: Annotated[
        str, typer.Option(help="of the main answer: a protection, encrypted-query or mpc")
    ] = "secagg",
    seed: Annotated[int, typer.Option(min=0, help="data split, partition, models")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="only plain and --protect")] = False,
    rewards: Annotated[
        bool, typer.Option("--rewards", help="mix in audits, settle, and pay from a ledger")
    ] = False,
    free_rider: Annotated[
        bool, typer.Option(help="with --rewards: one more site, which answers by lot")
    ] = True,
    selector: Annotated[
        str, typer.Option(help="whom to ask: names with commas, the first for real; or all")
    ] = "",
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("demo-report"),
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Let institutions with skewed data answer queries together, and report on it.

    Example: fedinfer demo --dataset wine --sites 4 --alpha 0.5
    """
    from fedinfer_flower.cli.demo import DemoOptions, run_federation
    from fedinfer_flower.cli.demo_results import results_of
    from fedinfer_flower.cli.demo_rewards import LEDGER_FILE
    from fedinfer_flower.reporting.report import write_report
    from fedinfer_flower.reporting.rewards_section import reward_sentences
    from fedinfer_flower.reporting.table import summary_table

    options = DemoOptions(
        dataset=dataset,
        n_sites=sites,
        alpha=alpha,
        rule=rule,
        protect=protect,
        seed=seed,
        quick=quick,
        rewards=rewards,
        free_rider=free_rider,
        selector=selector,
    )
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedinfer-") as name, _progress(console) as bar:
        folder = Path(name)
        task = bar.add_task("training and asking five kinds of model", total=None)

        def tell(done: int, of: int, label: str) -> None:
            bar.update(task, completed=done, total=of, description=label)

        try:
            run = run_federation(options, folder, progress=tell)
        except FedInferError:
            log = folder / "federation.log"
            if log.exists():
                shutil.copy(log, out / "federation.log")
            raise
        bar.update(task, description="measuring baselines and drawing", total=None)
        results = results_of(run)
        report = write_report(results, out / "report.html")
        (out / "results.json").write_text(json.dumps(results, indent=2))
        if rewards:
            shutil.copy(folder / LEDGER_FILE, out / LEDGER_FILE)
    if as_json:
        typer.echo(json.dumps(results))
    else:
        console.print(summary_table(results))
        console.print(_verdict(results))
        if rewards:
            console.print(" ".join(reward_sentences(results)), markup=False, highlight=False)
    console.print(f"Report: [bold]{report}[/bold]  (figures: {out / 'results.json'})")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="results.json of demo or refine")],
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
) -> None:
    """Draw the HTML report of a run again from its figures.

    Example: fedinfer report demo-report/results.json --out report.html
    """
    from fedinfer_flower.reporting.report import write_report

    data = json.loads(results.read_text())
    if "by_sharers" in data:
        from fedinfer_flower.reporting.refine_report import write_refine_report

        typer.echo(write_refine_report(data, out))
        return
    typer.echo(write_report(data, out))


@app.command()
def doctor(
    deployment: Annotated[
        bool, typer.Option("--deployment", help="look for gaps in a deployment instead")
    ] = False,
    superlink: Annotated[str, typer.Option(help="HOST:PORT, best as sites see it")] = "",
    gateway: Annotated[str, typer.Option(help="URL of a gateway")] = "",
    policy: Annotated[Path | None, typer.Option(help="a site's policy file")] = None,
    config: Annotated[Path | None, typer.Option(help="a gateway's settings")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print findings as JSON")] = False,
) -> None:
    """Say what is installed, what would fail here, and how to mend it.

    With --deployment: what a deployment has open that it should not, on this machine and at
    the addresses and files that are named. Exit status 1 if something would fail or is open.

    Example: fedinfer doctor --deployment --superlink link.example.org:443 --policy site.toml
    """
    from fedinfer_flower.cli.doctor import examine
    from fedinfer_flower.cli.doctor_deployment import examine_deployment

    if deployment:
        findings = examine_deployment(
            superlink=superlink, gateway=gateway, policy=policy, config=config
        )
    elif superlink or gateway or policy or config:
        raise ConfigError("addresses and files are for --deployment", hint="add --deployment")
    else:
        findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in findings]))
    else:
        table = Table("", "what", "is", "to mend", box=None)
        for f in findings:
            table.add_row("[green]ok[/green]" if f.ok else "[red]no[/red]", *_cells(f))
        Console().print(table)
    if not all(f.ok for f in findings):
        raise typer.Exit(1)


def run() -> None:
    """Run the command; a typed error ends it with its text and status 2."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        app()
    except FedInferError as exc:
        Console(stderr=True).print(str(exc), style="red", markup=False, highlight=False)
        raise SystemExit(2) from None


def _cells(finding: Any) -> tuple[str, str, str]:
    return finding.subject, finding.status, finding.mend.replace("[", r"\[")


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _verdict(results: dict[str, Any]) -> str:
    main = next(
        (p for p in results["protections"] if p["name"] == results["protection"]),
        results["protections"][0],
    )
    return (
        f"Together under {main['label']}: [bold]{main['accuracy']:.1%}[/bold] of"
        f" {results['n_queries']} queries right; best site alone"
        f" {results['best_site']['accuracy']:.1%}, mean site"
        f" {results['mean_site']['accuracy']:.1%}, all data in one place"
        f" {results['central']['accuracy']:.1%}.\n"
        f"The coordinator saw {main['coordinator_sees']}."
    )


if __name__ == "__main__":
    run()
