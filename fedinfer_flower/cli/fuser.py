"""`fedinfer fuser`: train what brings one model's cache into another, or look before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedinfer_flower.errors import ModelError, UnknownNameError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fedinfer_flower.language.model import LanguageModel
    from fedinfer_flower.language.prompts import PromptFormat
    from fedinfer_flower.refine.fuser_card import FuserCard
    from fedinfer_flower.refine.fuser_probe import ProbeReport
    from fedinfer_flower.refine.fuser_training import TrainedFuser, TrainingStep

__all__ = ["fuser_app"]

_PROMPTS = ("auto", "chat", "facts", "plain")
_PromptsHelp = "prompt format of both models: auto, chat, plain or facts"

fuser_app = typer.Typer(
    help="Fusers: networks from one model's cache into another's space.", no_args_is_help=True
)


@fuser_app.command()
def train(
    receiver: Annotated[Path, typer.Option(help="folder of the model that answers")],
    sharer: Annotated[Path, typer.Option(help="folder of the model that helps")],
    data: Annotated[
        Path, typer.Option(help="JSON lines of public examples: question, answer, document, task")
    ],
    out: Annotated[Path, typer.Option(help="folder of the fuser")],
    kind: Annotated[str, typer.Option(help="kind of fuser")] = "last-token",
    steps: Annotated[int, typer.Option(min=1)] = 400,
    batch: Annotated[int, typer.Option(min=1, help="examples a step")] = 64,
    lr: Annotated[float, typer.Option(help="learning rate")] = 2e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    patience: Annotated[
        int, typer.Option(min=0, help="looks without a better held-out loss; 0: never end early")
    ] = 4,
    last: Annotated[
        int | None, typer.Option(min=0, help="last prompt tokens that travel; 0: all")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(min=0, help="tokens the sharer decodes; they travel too")
    ] = None,
    hidden: Annotated[
        bool | None, typer.Option("--hidden/--no-hidden", help="the final hidden state travels")
    ] = None,
    layer_map: Annotated[str, typer.Option(help="depth, terminal or bottom")] = "depth",
    width: Annotated[int, typer.Option(min=1, help="most width of the networks")] = 128,
    prompts: Annotated[str, typer.Option(help=_PromptsHelp)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the card as JSON")] = False,
) -> None:
    """Train the fuser of an ordered pair of models on public examples; change neither model.

    Share options that are not given are those of the kind. The network is made as narrow as
    needed to have at most twice the smaller model's parameters. Interrupting writes nothing.

    Example: fedinfer fuser train --receiver a --sharer b --data public.jsonl --out fusers/b-a
    """
    from dataclasses import replace

    from rich.console import Console

    from fedinfer_flower.kv.fuser import FUSERS
    from fedinfer_flower.kv.fuser_file import save_fuser
    from fedinfer_flower.refine.examples import read_examples
    from fedinfer_flower.refine.fuser_training import TrainingOptions, default_spec

    share = FUSERS.get(kind).default_share
    share = replace(
        share,
        last=share.last if last is None else last,
        decode=share.decode if decode is None else decode,
        hidden=share.hidden if hidden is None else hidden,
    )
    options = TrainingOptions(steps=steps, batch=batch, lr=lr, seed=seed, patience=patience)
    examples = read_examples(data)
    console = Console(stderr=True)
    with console.status("loading both models"):
        ours, theirs = _load(receiver, prompts), _load(sharer, prompts)
        spec = default_spec(ours, theirs, kind, share=share, layer_map=layer_map, width=width)
    trained = _with_bar(console, ours, theirs, spec, examples, options)
    save_fuser(trained.fuser, out)
    if as_json:
        typer.echo(json.dumps(trained.card.to_dict()))
        return
    shown = Console()
    shown.print(_card_table(trained.card))
    shown.print(_card_verdict(trained.card), markup=False, highlight=False)
    shown.print(f"Fuser: {out}", markup=False, highlight=False)


@fuser_app.command()
def probe(
    sharer: Annotated[Path, typer.Option(help="folder of the model that would help")],
    data: Annotated[Path, typer.Option(help="JSON lines of public examples")],
    last: Annotated[int, typer.Option(min=1, help="last prompt tokens to look at")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="of what is held out")] = 0,
    prompts: Annotated[str, typer.Option(help=_PromptsHelp)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Find out what of a sharer's cache must travel, before any training.

    A linear probe reads the answer off the cache's layers, the final hidden state, and a
    decoded token. Exit status 1 if nothing that travels holds the answer: use text then.

    Example: fedinfer fuser probe --sharer b --data public.jsonl
    """
    from rich.console import Console

    from fedinfer_flower.refine.examples import read_examples
    from fedinfer_flower.refine.fuser_probe import probe as probe_cache

    examples = read_examples(data)
    with Console(stderr=True).status("reading the examples with the sharer"):
        found = probe_cache(_load(sharer, prompts), examples, last=last, seed=seed)
    advice = found.advice()
    if as_json:
        told = None if advice is None else advice.to_dict()
        typer.echo(json.dumps({**found.to_dict(), "advice": told}))
    else:
        _show_probe(found)
    if advice is None:
        raise typer.Exit(1)


# -- models ----------------------------------------------------------------------------


@fuser_app.command("attack")
def attack_share(
    sharer: Annotated[Path, typer.Option(help="folder of the model that helps")],
    data: Annotated[Path, typer.Option(help="JSON lines of public examples, with documents")],
    fuser: Annotated[
        Path | None, typer.Option(help="folder of a fuser: attack its output too")
    ] = None,
    last: Annotated[int, typer.Option(min=0, help="last prompt tokens that travel; 0: all")] = 1,
    decode: Annotated[int, typer.Option(min=0, help="tokens the sharer decodes")] = 1,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="the final hidden state travels")
    ] = False,
    codec: Annotated[str, typer.Option(help="as it travels")] = "int8",
    steps: Annotated[int, typer.Option(min=1, help="of the attacker's training")] = 300,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    prompts: Annotated[str, typer.Option(help=_PromptsHelp)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
) -> None:
    """Measure what the shared cache of a model gives away, before sharing it.

    With a fuser, what travels is what the fuser was trained for. Nothing above chance proves
    nothing: others have better attackers.

    Example: fedinfer fuser attack --sharer b --data public.jsonl --fuser fusers/b-a
    """
    from fedinfer_flower.attacks.cache_disclosure import disclosure_report
    from fedinfer_flower.attacks.cache_secrets import fact_secrets, word_secrets
    from fedinfer_flower.kv.fuser_file import load_fuser
    from fedinfer_flower.kv.share import ShareSpec
    from fedinfer_flower.refine.examples import read_examples

    found = None if fuser is None else load_fuser(fuser)
    given = ShareSpec(last=last, decode=decode, hidden=hidden)
    report = disclosure_report(
        _load(sharer, prompts),
        read_examples(data),
        given if found is None else found.spec.share,
        found,
        codec,
        secrets=fact_secrets if prompts == "facts" else word_secrets,
        steps=steps,
        seed=seed,
    )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.markdown())


def _load(folder: Path, prompts: str) -> LanguageModel:
    from transformers.utils import logging

    from fedinfer_flower.language.model import LanguageModel

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not folder.is_dir():
        raise ModelError(
            f"there is no model folder {folder.name!r}", hint="give a local folder with weights"
        )
    return LanguageModel.from_folder(folder, prompts=_format(folder, prompts))


def _format(folder: Path, name: str) -> PromptFormat | None:
    """Return the prompt format of that name; None for the tokenizer's own."""
    if name not in _PROMPTS:
        raise UnknownNameError(
            f"no prompt format is called {name[:64]!r}", hint=f"known: {', '.join(_PROMPTS)}"
        )
    if name == "auto":
        return None
    if name == "facts":
        from fedinfer_flower.simulation.facts.prompts import FactPrompts
        from fedinfer_flower.simulation.facts.world import FactWorld

        return FactPrompts(FactWorld().words)
    from transformers import AutoTokenizer

    from fedinfer_flower.language.chat import ChatPrompts, PlainPrompts

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return ChatPrompts(tokenizer) if name == "chat" else PlainPrompts(tokenizer)


# -- training --------------------------------------------------------------------------


def _with_bar(
    console: Console,
    receiver: LanguageModel,
    sharer: LanguageModel,
    spec: Any,
    examples: Any,
    options: Any,
) -> TrainedFuser:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fedinfer_flower.refine.fuser_training import train_fuser

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("both models read the examples", total=options.steps)
        held_out = ""

        def tell(now: TrainingStep) -> None:
            nonlocal held_out
            if now.held_out is not None:
                held_out = f", held out {now.held_out:.3f}"
            words = f"training: loss {now.loss:.3f}{held_out}"
            bar.update(task, completed=now.step, description=words)

        return train_fuser(receiver, sharer, spec, examples, options, tell)


# -- output ----------------------------------------------------------------------------


def _card_table(card: FuserCard) -> Table:
    from rich.table import Table
    from rich.text import Text

    names = ("task", "held out", "alone", "fused", "another question's cache")
    table = Table(*names, box=None)
    for task, count in sorted(card.counts.items()):
        shares = (card.alone[task], card.fused[task], card.shuffled[task])
        # Task names come from a file: shown as text, never as markup.
        table.add_row(Text(task), str(count), *(f"{share:.1%}" for share in shares))
    return table


def _card_verdict(card: FuserCard) -> str:
    words = (
        f"{card.kind}, {card.parameters:,} parameters, {card.steps} steps in"
        f" {card.seconds:.1f} s (reading {card.reading_seconds:.1f} s), held-out loss"
        f" {card.loss:.3f}."
    )
    helped = ", ".join(card.helped())
    words += f"\nThe sharer's cache helps on: {helped or 'no task; use the text medium'}."
    suspect = card.suspect()
    if suspect:
        words += (
            "\nAnother question's cache helps as well on: "
            + ", ".join(suspect)
            + ". There the fuser tuned the receiver; the sharer is not what helps."
        )
    return words


def _show_probe(found: ProbeReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console, tokens = Console(), len(found.layers[0])
    places = [f"last-{tokens - 2 - i}" if i < tokens - 2 else "last" for i in range(tokens - 1)]
    table = Table("layer", *places, "decoded", box=None)
    for layer, row in enumerate(found.layers):
        table.add_row(str(layer), *(f"{share:.0%}" for share in row))
    console.print(table)
    lines = [
        f"{found.known} of {found.asked} examples are answered rightly by the sharer alone;"
        f" {found.held_out} of these are held out, {found.answers} answers, chance"
        f" {found.chance:.0%}.",
        f"last token: {found.plain:.0%}   with hidden state: {found.hidden:.0%}   with one"
        f" decoded token: {found.decoded:.0%}   with both: {found.decoded_hidden:.0%}",
        _advice_words(found),
    ]
    console.print("\n".join(lines), markup=False, highlight=False)


def _advice_words(found: ProbeReport) -> str:
    advice = found.advice()
    if advice is None:
        return "Nothing that would travel holds the answer: use the text medium."
    option = "--hidden" if advice.hidden else "--no-hidden"
    return f"Train with --last {advice.last} --decode {advice.decode} {option}."
