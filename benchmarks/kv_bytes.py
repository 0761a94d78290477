"""KV caches on the wire: bytes a token, what each codec loses, last tokens against full caches.

python benchmarks/kv_bytes.py [--json FILE] [--prompts 64]

The three small models are real and so are their messages, hidden state included; scales are
fitted on documents about public people, messages are about private ones. "As sent" is with
header, and with zlib where that is smaller. For published models only the shapes
are used: the length formula, checked against messages of random numbers of that shape.
Milliseconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

import fedinfer_flower
from fedinfer_flower.kv.compress import (
    CODECS,
    CodecKind,
    PayloadLimits,
    StaticScales,
    compression_report,
    decode_entries,
    encode_entries,
    payload_bytes,
)
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.language.model import LanguageModel, Prefill
from fedinfer_flower.simulation.facts.families import FAMILIES
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld, Person

FOLDERS = Path(fedinfer_flower.__file__).parent / "simulation" / "checkpoints"
LIMITS = PayloadLimits(max_bytes=1 << 30, max_entries_bytes=1 << 33)
STATEMENTS, PUBLIC_PROMPTS = 3, 300
PROMPT_TOKENS = 256
LAST = 2  # one prompt token and one decoded token
PAPER_BYTES = 88_000  # FedRefine: "88 KB" a token with four sharers; it does not say how counted
SHARERS = ("Qwen2.5-0.5B", "Qwen2.5-0.5B-code", "Qwen2.5-1.5B", "Llama-3.2-1B")
# Layers, key-value heads, head size, hidden size: from the published config.json of each.
SHAPES = {
    "Qwen2.5-0.5B": (24, 2, 64, 896, "qwen2"),
    "Qwen2.5-0.5B-code": (24, 2, 64, 896, "qwen2"),
    "Qwen2.5-1.5B": (28, 2, 128, 1536, "qwen2"),
    "Llama-3.2-1B": (16, 8, 64, 2048, "llama"),
    "Qwen3-0.6B": (28, 8, 128, 1024, "qwen3"),
}
LEAST_RATIO = 3.5


def cpu_ms(call: Callable[[], object], repeats: int = 3) -> float:
    """Return the median of the processor time, which work beside it hardly changes."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


# -- the small models --------------------------------------------------------------------


def prompts(
    model: LanguageModel, world: FactWorld, people: Sequence[Person], n: int, seed: int
) -> list[str]:
    items = world.documents(n, people=people, statements=STATEMENTS, seed=seed)
    return [model.prompts.ask(fact.question(), documents=[text]) for fact, text in items]


def next_token(model: LanguageModel, read: Prefill, entries: CacheEntries) -> torch.Tensor:
    """Return log-probabilities of the model's next token on these entries of its own."""
    with torch.no_grad():
        logits = model.logits_on(replace(read, entries=entries).past())
    return logits[:, -1].log_softmax(-1)


def small(number: int, world: FactWorld, n_prompts: int) -> list[dict[str, object]]:
    """Return one line a codec and a choice of tokens for one small model."""
    name = FAMILIES[number].name
    model = LanguageModel.from_folder(FOLDERS / name, prompts=FactPrompts(world.words))
    public = prompts(model, world, world.fuser_people[number], PUBLIC_PROMPTS, 1)
    private = prompts(model, world, world.private[number], n_prompts, 2)
    full, fit_full = (model.prefill(p, hidden=True) for p in (private, public))
    last, fit_last = (
        model.prefill(p, decode=1, hidden=True).entries.cut(-LAST) for p in (private, public)
    )
    truth = next_token(model, full, full.entries)
    rows: list[dict[str, object]] = []
    for tokens, entries, fit in (
        ("full prompt", full.entries, fit_full.entries),
        ("1 + 1 decoded", last, fit_last),
    ):
        for codec in CODECS:
            scales = (
                StaticScales.fit(fit, bits=CODECS[codec].bits)
                if CODECS[codec].kind is CodecKind.STATIC
                else None
            )
            one = entries.select([0])
            one = one.cut(one.tokens - int(one.mask.sum()))
            (row,) = compression_report(entries, [codec], scales=scales)
            (alone,) = compression_report(one, [codec], scales=scales)
            there = decode_entries(
                encode_entries(entries, codec=codec, scales=scales), limits=LIMITS, scales=scales
            )
            rows.append(
                {
                    "model": name,
                    "tokens": tokens,
                    "floats_a_token": entries.layout.floats_per_token(hidden=True),
                    "bytes_a_token": row.entries_bytes / int(entries.mask.sum()),
                    "one_prompt_tokens": one.tokens,
                    "one_prompt_bytes": alone.message_bytes,
                    "prompts": entries.rows,
                    **asdict(row),
                    **(agreement(model, full, truth, there) if tokens == "full prompt" else {}),
                }
            )
    return rows


def agreement(
    model: LanguageModel, read: Prefill, truth: torch.Tensor, there: CacheEntries
) -> dict[str, float]:
    """Compare the model's next token on its decoded cache with that on the exact one."""
    found = next_token(model, read, there)
    same = (found.argmax(-1) == truth.argmax(-1)).double().mean()
    divergence = (truth.exp() * (truth - found)).sum(-1).mean()
    return {"top_1": float(same), "divergence": float(divergence)}


# -- published shapes --------------------------------------------------------------------


def layout_of(name: str) -> CacheLayout:
    layers, heads, head_size, hidden_size, architecture = SHAPES[name]
    return CacheLayout(
        layers=layers,
        heads=heads,
        head_size=head_size,
        hidden_size=hidden_size,
        window=32_768,
        rope='{"rope_theta":1000000.0,"rope_type":"default"}',
        architecture=architecture,
        tokenizer_digest="0" * 64,
        model_digest="0" * 64,
    )


def random_cache(layout: CacheLayout, tokens: int) -> CacheEntries:
    draw = torch.Generator().manual_seed(tokens)
    shape = (1, layout.heads, tokens, layout.head_size)
    keys, values = (
        tuple(torch.randn(*shape, generator=draw) for _ in range(layout.layers)) for _ in "kv"
    )
    mask = torch.ones(1, tokens, dtype=torch.long)
    return CacheEntries(keys=keys, values=values, mask=mask, layout=layout)


def published(name: str) -> dict[str, object]:
    """Return lengths by formula; check each against a message of this shape."""
    layout = layout_of(name)
    few, many = random_cache(layout, LAST), random_cache(layout, PROMPT_TOKENS)
    lengths: dict[str, dict[str, float]] = {}
    for codec, how in CODECS.items():
        scales = (
            StaticScales.fit(random_cache(layout, 16), bits=how.bits)
            if how.kind is CodecKind.STATIC
            else None
        )
        full = payload_bytes(layout, PROMPT_TOKENS, codec)
        last = payload_bytes(layout, LAST, codec)
        for cache, length in ((few, last), (many, full)):
            real = encode_entries(cache, codec=codec, scales=scales, squeeze=False)
            assert len(real) == length, f"{name}, {codec}"
        half = payload_bytes(layout, PROMPT_TOKENS, "fp16")
        lengths[codec] = {"full": full, "last": last, "full_fp16_over_last": half / last}
    return {
        "model": name,
        "bf16_bytes_a_token": 2 * layout.floats_per_token(hidden=False),
        "lengths": lengths,
    }


def paper() -> dict[str, float]:
    """Return the paper's bytes a token, and ours for the same four sharers in bf16."""
    ours = sum(2 * layout_of(name).floats_per_token(hidden=False) for name in SHARERS)
    return {"paper": PAPER_BYTES, "computed": ours, "ratio": ours / PAPER_BYTES}


def speeds(name: str) -> list[dict[str, object]]:
    """Return milliseconds to encode and decode the largest shape's full cache."""
    layout = layout_of(name)
    cache = random_cache(layout, PROMPT_TOKENS)
    rows: list[dict[str, object]] = []
    for codec, how in CODECS.items():
        scales = (
            StaticScales.fit(random_cache(layout, 16), bits=how.bits)
            if how.kind is CodecKind.STATIC
            else None
        )
        plain, squeezed = (
            encode_entries(cache, codec=codec, scales=scales, squeeze=squeeze)
            for squeeze in (False, True)
        )
        times = {}
        for word, data, squeeze in (("plain", plain, False), ("squeezed", squeezed, True)):
            times[f"{word}_encode_ms"] = cpu_ms(
                lambda codec=codec, scales=scales, squeeze=squeeze: encode_entries(
                    cache, codec=codec, scales=scales, squeeze=squeeze
                )
            )
            times[f"{word}_decode_ms"] = cpu_ms(
                lambda data=data, scales=scales: decode_entries(data, limits=LIMITS, scales=scales)
            )
        rows.append(
            {"codec": codec, "plain": len(plain), "squeezed": len(squeezed), **times},
        )
    return rows


# -- tables ------------------------------------------------------------------------------


def print_small(rows: list[dict[str, object]]) -> None:
    print(
        f"| model | tokens | codec | bytes a token | smaller than fp16"
        f" | {rows[0]['prompts']} prompts as sent | smaller than in fp16 without zlib"
        " | one prompt as sent | error of keys, values, hidden | own next token: top-1, KL |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        again = f"{100 * row['top_1']:.1f} %, {row['divergence']:.4f}" if "top_1" in row else "-"
        print(
            f"| {row['model']} | {row['tokens']} | {row['codec']} | {row['bytes_a_token']:,.1f}"
            f" | {row['ratio']:.2f} | {row['message_bytes']:,} | {row['sent_ratio']:.2f}"
            f" | {row['one_prompt_bytes']:,} ({row['one_prompt_tokens']} tokens)"
            f" | {row['key_error']:.4f}, {row['value_error']:.4f}, {row['hidden_error']:.4f}"
            f" | {again} |"
        )
    static = [row["ratio"] for row in rows if row["codec"] == "static4"]
    met = "met" if min(static) >= LEAST_RATIO else "MISSED"
    print(f"\nstatic4 against fp16: {min(static):.2f}; at least {LEAST_RATIO}: {met}")


def print_published(rows: list[dict[str, object]]) -> None:
    print(f"\n| model | bf16, B a token | {' | '.join(f'{c}, B a token' for c in CODECS)} |")
    print("|---|---|" + "---|" * len(CODECS))
    for row in rows:
        lengths = row["lengths"]
        cells = [f"{lengths[c]['full'] / PROMPT_TOKENS:,.0f}" for c in CODECS]
        print(f"| {row['model']} | {row['bf16_bytes_a_token']:,} | {' | '.join(cells)} |")
    print(f"\nWhole messages of {PROMPT_TOKENS} tokens over their tokens, without `zlib`.\n")
    print(
        f"| model | full cache, {PROMPT_TOKENS} tokens, fp16 | int4 | 1 + 1 decoded: fp16 | int4"
        " | static4 | full fp16 over last int4 | over last static4 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lengths = row["lengths"]
        print(
            f"| {row['model']} | {lengths['fp16']['full']:,} | {lengths['int4']['full']:,}"
            f" | {lengths['fp16']['last']:,} | {lengths['int4']['last']:,}"
            f" | {lengths['static4']['last']:,}"
            f" | {lengths['int4']['full_fp16_over_last']:.0f}"
            f" | {lengths['static4']['full_fp16_over_last']:.0f} |"
        )


def print_speeds(name: str, rows: list[dict[str, object]]) -> None:
    print(f"\nFull cache of {PROMPT_TOKENS} tokens, shape of {name}, random numbers\n")
    print("| codec | bytes | encode, ms | decode, ms | with `zlib`: bytes | encode | decode |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['codec']} | {row['plain']:,} | {row['plain_encode_ms']:.0f}"
            f" | {row['plain_decode_ms']:.0f} | {row['squeezed']:,}"
            f" | {row['squeezed_encode_ms']:.0f} | {row['squeezed_decode_ms']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = FactWorld()
    ours = [row for i in range(len(FAMILIES)) for row in small(i, world, options.prompts)]
    print_small(ours)
    shapes = [published(name) for name in SHAPES]
    print_published(shapes)
    told = paper()
    print("\n| four sharers, a token | bytes |\n|---|---|")
    print(f"| the paper | {told['paper']:,} |")
    print(f"| bf16 entries by shape | {told['computed']:,} ({told['ratio']:.3f} of it) |")
    timed = speeds("Qwen3-0.6B")
    print_speeds("Qwen3-0.6B", timed)
    if options.json:
        found = {"small": ours, "published": shapes, "paper": told, "speeds": timed}
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
