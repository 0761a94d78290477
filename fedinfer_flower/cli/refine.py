"""`fedinfer refine`: language models of three institutions answer together, and a report on it."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["refine"]


def refine(
    questions: Annotated[
        int, typer.Option(min=0, help="of each kind from each institution; 0: 30, or 8 if --quick")
    ] = 0,
    media: Annotated[str, typer.Option(help="what is compared: text, cache, or both")] = (
        "text,cache"
    ),
    seed: Annotated[int, typer.Option(min=0, help="of trainings, questions, documents")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="one receiver, few questions, short trainings")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("refine-report"),
    workdir: Annotated[
        Path, typer.Option(help="where trained fusers and gates are kept for the next run")
    ] = Path(".fedinfer-refine"),
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
    in_process: Annotated[bool, typer.Option("--in-process", hidden=True)] = False,
) -> None:
    """Let three small language models help each other by text and by KV cache, and report on it.

    Models of three families (Qwen3, Llama, Qwen2; half a million parameters each) know other
    facts and hold other documents. A querier seals questions to them; they answer on Flower's
    simulation engine: alone, with text or caches of one or both others, gated, in several
    encodings. The first run trains six fusers and three gates, some minutes; later ones find
    them in --workdir.

    Example: fedinfer refine --quick --out refine-report
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from fedinfer_flower.cli.refine_results import results_of
    from fedinfer_flower.cli.refine_run import run_refine
    from fedinfer_flower.cli.refine_steps import RefineOptions
    from fedinfer_flower.errors import FedInferError
    from fedinfer_flower.reporting.refine_plots import write_figures
    from fedinfer_flower.reporting.refine_report import (
        refine_sentences,
        refine_table,
        write_refine_report,
    )

    options = RefineOptions(
        questions=questions,
        media=tuple(name.strip() for name in media.split(",") if name.strip()),
        seed=seed,
        quick=quick,
        in_process=in_process,
    )
    console = Console(stderr=as_json)
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="fedinfer-") as name,
        Progress(*columns, console=console, transient=True) as bar,
    ):
        folder = Path(name)
        task = bar.add_task("loading models", total=None)

        def tell(done: int, of: int, label: str) -> None:
            bar.update(task, completed=done, total=of, description=label)

        try:
            run = run_refine(options, workdir=workdir, folder=folder, progress=tell)
        except FedInferError:
            log = folder / "federation.log"
            if log.exists():
                shutil.copy(log, out / "federation.log")
            raise
        bar.update(task, description="drawing", total=None)
        results = results_of(run)
        report = write_refine_report(results, out / "report.html")
        write_figures(results, out / "figures")
        (out / "results.json").write_text(json.dumps(results, indent=2))
    if as_json:
        typer.echo(json.dumps(results))
    else:
        console.print(refine_table(results))
        console.print("\n".join(refine_sentences(results)), markup=False, highlight=False)
    console.print(f"Report: {report}  (figures: {out / 'results.json'})", highlight=False)
