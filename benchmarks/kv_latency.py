"""Seconds to the first answer token: a cache against text, at the shapes of published models.

python benchmarks/kv_latency.py [--json FILE] [--plot FILE] [--threads 1] [--repeats 2]

Receiver of Qwen3-0.6B's shape, sharer of Qwen2.5-0.5B's: random bfloat16 weights, because
speed does not depend on them; the package's own code for every step. Compute is measured:
the shortest of the repeats, which take turns; on one thread processor time, which work beside
it hardly changes, on more wall time. The wire is calculated. Sharer and receiver run on
machines of their own: the receiver reads its prompt while it waits for a cache, and can read
a text only when it is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedinfer_flower.kv.fuser import Fuser, FuserSpec, make_fuser
from fedinfer_flower.kv.latency import break_even_bandwidth, predicted_s
from fedinfer_flower.kv.payload import PayloadLimits, decode_entries, encode_entries
from fedinfer_flower.kv.planner import (
    PARTIES,
    Link,
    Medium,
    Plan,
    SharingPolicy,
    Speed,
    Workload,
    plan,
)
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.language.chat import PlainPrompts
from fedinfer_flower.language.decoding import Decoding
from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.sharer import cut_to
from fedinfer_flower.simulation.facts.tokenizer import build_tokenizer

# From the published config.json of each.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
SHARES = {
    "last token + 1 decoded": ShareSpec(last=1, decode=1),
    "last token + hidden": ShareSpec(last=1, decode=0, hidden=True),
}
PROMPTS = (64, 256)
TEXTS = (16, 64)
FUSER_WIDTH = 512
CODEC = "bf16"
RTT_S = 0.05
LEAST_RATIO = 2.0
# What the planner is told of quality: text and cache alike, so that time alone decides
# between them. The own answer would not do.
QUALITY_HELPED, QUALITY_OWN = 0.9, 0.4
LIMITS = PayloadLimits(max_bytes=1 << 24, max_entries_bytes=1 << 26)
WORDS = [a + b for a in "bcdfghklmnprst" for b in "aeiou"]
Times = dict[str, float]


def build(architecture: str, digest: str) -> LanguageModel:
    """Return a model of a published shape; its tokenizer makes one token of one word."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = build_tokenizer(WORDS, piece_length=None, seed=0)
    config = AutoConfig.for_model(architecture, **SHAPES[architecture])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    noise = (0.02 * torch.randn(1 << 20)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            # The same million numbers again and again: drawing all of them takes a minute.
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    # Its table is a buffer, which an empty model does not have.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return LanguageModel(model, tokenizer, prompts=PlainPrompts(), digest=digest * 64)


def prompt_of(tokens: int) -> str:
    """Return words for this many tokens, the start token included."""
    return " ".join(WORDS[i % len(WORDS)] for i in range(tokens - 1))


def shortest(calls: dict[str, Callable[[], object]], repeats: int) -> Times:
    """Return the least seconds of each call; they take turns, so that load hits them alike."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # the first pass of all sets things up
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            best[name] = min(best[name], clock() - start)
    return best


class Pair:
    """Sharer and receiver, and what each step of an exchange takes."""

    def __init__(self, repeats: int) -> None:
        torch.manual_seed(0)
        self.receiver, self.sharer = build("qwen3", "a"), build("qwen2", "b")
        self.repeats = repeats
        self.fuser_parameters: dict[str, int] = {}

    def fuser(self, share: ShareSpec) -> Fuser:
        """Return an untrained fuser of this share."""
        spec = FuserSpec.for_pair(
            "last-token", self.sharer.layout, self.receiver.layout, share, width=FUSER_WIDTH
        )
        return make_fuser(spec).eval()

    def reading(self, tokens: int) -> Times:
        """Time both models' reading of a prompt, and what the sharer does on top."""
        prompt = [prompt_of(tokens)]
        calls: dict[str, Callable[[], object]] = {
            "sharer reads": lambda: self.sharer.prefill(prompt),
            "receiver reads": lambda: self.receiver.prefill(prompt),
        }
        for name, share in SHARES.items():
            calls[f"sharer reads: {name}"] = lambda share=share: self.sharer.prefill(
                prompt, decode=share.decode, hidden=share.hidden
            )
        for n in TEXTS:
            longer = [prompt_of(tokens + n)]
            calls[f"receiver reads: text of {n}"] = lambda longer=longer: self.receiver.prefill(
                longer
            )
        return shortest(calls, self.repeats)

    def writing(self, tokens: int) -> Times:
        """Time the tokens that the sharer writes, and the receiver's first one."""
        prompt = [prompt_of(tokens)]
        theirs, ours = self.sharer.prefill(prompt).past(), self.receiver.prefill(prompt).past()
        some = Decoding(max_new_tokens=TEXTS[0])
        found = shortest(
            {
                "written": lambda: self.sharer.decode_on(theirs, some),
                "first token": lambda: self.receiver.decode_on(ours, Decoding(max_new_tokens=1)),
            },
            self.repeats,
        )
        written = found.pop("written")
        # The longer text at the pace of the short one: a little less than it takes.
        paced = {f"sharer writes {n}": written * n / TEXTS[0] for n in TEXTS}
        return paced | found

    @torch.no_grad()
    def fusing(self, tokens: int, name: str) -> dict[str, Any]:
        """Time codec, fuser and the first answer token of one kind of cache."""
        share, prompt = SHARES[name], [prompt_of(tokens)]
        fuser = self.fuser(share)
        self.fuser_parameters[name] = sum(p.numel() for p in fuser.parameters())
        read = self.sharer.prefill(prompt, decode=share.decode, hidden=share.hidden)
        entries = cut_to(read.entries, share)
        body = encode_entries(entries, codec=CODEC, squeeze=False)
        past = self.receiver.prefill(prompt).past()
        fused = fuser.extend(past, entries)
        found = shortest(
            {
                "codec": lambda: decode_entries(
                    encode_entries(entries, codec=CODEC, squeeze=False), limits=LIMITS
                ),
                "fuser": lambda: fuser.extend(past, entries),
                "first token": lambda: self.receiver.decode_on(fused, Decoding(max_new_tokens=1)),
            },
            self.repeats,
        )
        floats = share.floats(self.sharer.layout, tokens)
        return {**found, "bytes": len(body), "floats": floats}


def measure(pair: Pair, tokens: int) -> dict[str, Any]:
    """Return the seconds of each step and of each way, for prompts of one length."""
    steps = pair.reading(tokens) | pair.writing(tokens)
    own_s = steps["receiver reads"] + steps["first token"]
    ways: dict[str, Any] = {"own": {"seconds": own_s, "bytes": 0}}
    for n in TEXTS:
        seconds = (
            steps["sharer reads"]
            + steps[f"sharer writes {n}"]
            + steps[f"receiver reads: text of {n}"]
            + steps["first token"]
        )
        ways[f"text of {n}"] = {"seconds": seconds, "bytes": 4 * n}
    for name in SHARES:
        found = pair.fusing(tokens, name)
        gc.collect()
        remote = steps[f"sharer reads: {name}"] + found["codec"] + found["fuser"]
        ways[name] = {
            "seconds": max(remote, steps["receiver reads"]) + found["first token"],
            **{k: found[k] for k in ("codec", "fuser", "bytes", "floats")},
        }
    return {"prompt_tokens": tokens, "steps": steps, "ways": ways}


# -- the planner -------------------------------------------------------------------------


def speeds(found: list[dict[str, Any]]) -> dict[str, Speed]:
    """Return each model's speed, as a line through the two prompts."""
    short, long = found[0], found[-1]
    apart = long["prompt_tokens"] - short["prompt_tokens"]
    out = {}
    for who in ("sharer", "receiver"):
        at_short, at_long = (f["steps"][f"{who} reads"] for f in (short, long))
        per_token = max(0.0, (at_long - at_short) / apart)
        first = "first token" if who == "receiver" else f"sharer writes {TEXTS[0]}"
        tokens = 1 if who == "receiver" else TEXTS[0]
        out[who] = Speed(
            prefill_s=max(0.0, at_short - per_token * short["prompt_tokens"]),
            prefill_s_per_token=per_token,
            decode_s_per_token=short["steps"][first] / tokens,
        )
    return out


def media(found: dict[str, Any], name: str, text: int) -> tuple[Medium, Medium]:
    """Return one cache and one text as the planner sees them."""
    way = found["ways"][name]
    cache = Medium.cache(
        SHARES[name],
        floats=way["floats"],
        codec=CODEC,
        codec_s=way["codec"],
        fuse_s=way["fuser"],
    )
    return cache, Medium.text(tokens=text)


def chosen(cache: Medium, text: Medium, work: Workload, fast: dict[str, Speed], link: Link) -> Plan:
    """Let the planner choose on one link."""
    quality = {"own": QUALITY_OWN, cache.name: QUALITY_HELPED, text.name: QUALITY_HELPED}
    return plan(
        [cache, text],
        workload=work,
        quality=quality,
        policies=dict.fromkeys(PARTIES, SharingPolicy.everything()),
        deadline_s=600.0,
        link=link,
        **fast,
    )


def link_of(bytes_per_s: float) -> Link:
    return Link(up_bytes_per_s=bytes_per_s, down_bytes_per_s=bytes_per_s, rtt_s=RTT_S)


def switches(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return break-even bandwidths, and what the planner takes just below and above each."""
    fast, rows = speeds(found), []
    for one in found:
        tokens = one["prompt_tokens"]
        work = Workload(sharer_prompt_tokens=tokens, receiver_prompt_tokens=tokens, answer_tokens=1)
        for name in SHARES:
            for n in TEXTS:
                cache, text = media(one, name, n)
                even = break_even_bandwidth(cache, text, workload=work, rtt_s=RTT_S, **fast)
                below, above = (
                    chosen(cache, text, work, fast, link_of(even * factor)).medium.kind
                    for factor in (0.99, 1.01)
                )
                rows.append(
                    {
                        "prompt_tokens": tokens,
                        "cache": name,
                        "text_tokens": n,
                        "break_even_mbit_s": 8 * even / 1e6,
                        "below": below,
                        "above": above,
                    }
                )
    return rows


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Draw seconds against bandwidth, and mark the planner's choice."""
    from matplotlib.figure import Figure

    fast, name = speeds(found), next(iter(SHARES))
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True)
    # Bytes a second from 2 kbit/s to 20 Mbit/s.
    grid = [250.0 * 10 ** (i / 50) for i in range(201)]
    styles = {"own": ("#777777", ":"), "text": ("#d55e00", "--"), "cache": ("#0072b2", "-")}
    for axis, one in zip(axes, found, strict=True):
        tokens = one["prompt_tokens"]
        work = Workload(sharer_prompt_tokens=tokens, receiver_prompt_tokens=tokens, answer_tokens=1)
        cache, text = media(one, name, TEXTS[0])
        every = [Medium.own(), text, Medium.text(tokens=TEXTS[-1], name="longer"), cache]
        labels = ["own answer", f"text of {TEXTS[0]}", f"text of {TEXTS[-1]}", f"cache: {name}"]
        for medium, label in zip(every, labels, strict=True):
            seconds = [predicted_s(medium, workload=work, link=link_of(b), **fast) for b in grid]
            colour, dash = styles[medium.kind]
            weight = 1.0 if medium.name == "longer" else 1.8
            axis.plot([8 * b / 1e6 for b in grid], seconds, dash, color=colour, lw=weight)
            # The cache's line is steep at the left, and meets that of the own answer at the right.
            at, side = (12, "left") if medium.kind in ("cache", "own") else (-1, "right")
            above = (8, 0) if medium.kind == "cache" else (0, 4)
            axis.annotate(
                label,
                (8 * grid[at] / 1e6, seconds[at]),
                xytext=above,
                textcoords="offset points",
                color=colour,
                ha=side,
                fontsize=8,
            )
        picks = [chosen(cache, text, work, fast, link_of(b)) for b in grid[::8]]
        for kind, marker in (("text", "s"), ("cache", "o"), ("own", "x")):
            at = [
                (8 * b / 1e6, p.predicted_s)
                for b, p in zip(grid[::8], picks, strict=True)
                if p.medium.kind == kind
            ]
            if at:
                x, y = zip(*at, strict=True)
                axis.plot(x, y, marker, color=styles[kind][0], ms=5, label=f"planner takes {kind}")
        even = break_even_bandwidth(cache, text, workload=work, rtt_s=RTT_S, **fast)
        axis.axvline(8 * even / 1e6, color="#000000", lw=0.8, ls=(0, (1, 3)))
        axis.set(xscale="log", yscale="log", xlabel="bandwidth, Mbit/s")
        axis.set_title(f"prompt of {tokens} tokens", fontsize=10)
        axis.grid(color="#dddddd", lw=0.5)
        axis.legend(fontsize=8, loc="upper right")
    axes[0].set_ylabel("predicted seconds to the first answer token")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


# -- tables ------------------------------------------------------------------------------


def print_ways(found: list[dict[str, Any]]) -> None:
    caches = list(SHARES)
    print("| prompt | way | to the first answer token, s | own answer is | bytes |", end="")
    print(f" {' | '.join(f'{c}: times faster' for c in caches)} |")
    print("|---" * (5 + len(caches)) + "|")
    for one in found:
        ways = one["ways"]
        for name, way in ways.items():
            ratios = [
                f"{way['seconds'] / ways[c]['seconds']:.2f}" if name.startswith("text") else ""
                for c in caches
            ]
            print(
                f"| {one['prompt_tokens']} | {name} | {way['seconds']:.2f}"
                f" | {way['seconds'] / ways['own']['seconds']:.2f}x as long | {way['bytes']:,}"
                f" | {' | '.join(ratios)} |"
            )
    for cache in caches:
        ratio = min(o["ways"][f"text of {TEXTS[0]}"]["seconds"] / o["ways"][cache]["seconds"]
                    for o in found)  # fmt: skip
        met = "met" if ratio >= LEAST_RATIO else "MISSED"
        print(
            f"\n{cache} against a text of {TEXTS[0]}: at least {ratio:.2f} times faster;"
            f" target {LEAST_RATIO:g}: {met}"
        )


def print_steps(found: list[dict[str, Any]]) -> None:
    prompts = " | ".join(f"prompt of {one['prompt_tokens']}" for one in found)
    print(f"\n| step, s | {prompts} |")
    print("|---" * (1 + len(found)) + "|")
    for step in found[0]["steps"]:
        cells = " | ".join(f"{one['steps'][step]:.3f}" for one in found)
        print(f"| {step} | {cells} |")
    for name in SHARES:
        for part in ("codec", "fuser"):
            cells = " | ".join(f"{o['ways'][name][part]:.3f}" for o in found)
            print(f"| {part}: {name} | {cells} |")


def print_switches(rows: list[dict[str, Any]]) -> None:
    print(
        f"\nBreak-even on a link with {RTT_S:g} s a request, and the planner's choice at 0.99"
        " and 1.01 times it\n"
    )
    print("| prompt | cache | text of | break-even, Mbit/s | below | above |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['prompt_tokens']} | {row['cache']} | {row['text_tokens']}"
            f" | {row['break_even_mbit_s']:.3f} | {row['below']} | {row['above']} |"
        )
    right = all(row["below"] == "text" and row["above"] == "cache" for row in rows)
    print(f"\nThe planner switches from text to cache at each: {'yes' if right else 'NO'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write the picture of seconds by bandwidth")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = Pair(options.repeats)
    found = [measure(pair, tokens) for tokens in PROMPTS]
    rows = switches(found)
    print_ways(found)
    print_steps(found)
    print_switches(rows)
    sizes = ", ".join(f"{n / 1e6:.0f} M ({name})" for name, n in pair.fuser_parameters.items())
    print(f"\nFuser of width {FUSER_WIDTH}: {sizes} parameters")
    if options.plot:
        plot(found, options.plot)
    if options.json:
        out = {"measured": found, "switches": rows, "fuser_parameters": pair.fuser_parameters}
        options.json.write_text(json.dumps(out, indent=2))


if __name__ == "__main__":
    main()
