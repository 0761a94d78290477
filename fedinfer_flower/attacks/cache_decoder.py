"""A small network, trained on public prompts, that reads words of a prompt from its cache.

Where a look-up has no candidates, a decoder learns what the numbers mean. It needs the
sharer's model, or any way to have public prompts answered by it, and no more.

Axes: N prompts, F numbers of a cache, W words that a kind of secret can take.

References
----------
.. [1] Song and Raghunathan, Information Leakage in Embedding Models, CCS 2020.
.. [2] Morris, Kuleshov, Shmatikov and Rush, Text Embeddings Reveal (Almost) As Much As Text,
   EMNLP 2023.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fedinfer_flower.errors import InvalidValueError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CacheDecoder", "Recovered", "train_decoder"]

Words = Mapping[str, tuple[str, ...]]

_FEATURE_LIMIT: Final = 8.0
_BATCH: Final = 256
_RATE: Final = 3e-3
_DECAY: Final = 0.05
_DROPOUT: Final = 0.2
_MOST_WORDS: Final = 4096
_Z: Final = 3.72
"""Standard errors that chance exceeds once in 10,000 (one-sided, normal)."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """How much of one kind of secret was read.

    Parameters
    ----------
    secret : str
    counted : int
        Prompts that have such a secret.
    share : float
        Mean over prompts of the share of its words among as many best guesses, in [0, 1].
    chance : float
        The same for the best of those who always guess the same words and see nothing.
    error : float
        Standard error of `share`.
    threshold : float
        What one who sees nothing exceeds once in 10,000, prompts compared one by one.

    Examples
    --------
    >>> Recovered.of("answer", [1.0, 1.0, 0.0, 1.0], [0.0] * 4).share
    0.75
    """

    secret: str
    counted: int
    share: float
    chance: float
    error: float
    threshold: float

    @property
    def above_chance(self) -> bool:
        """Whether more was read than chance explains."""
        return self.share > self.threshold

    @classmethod
    def of(cls, secret: str, found: Sequence[float], by_chance: Sequence[float]) -> Recovered:
        """Summarise the shares of single prompts.

        Raises
        ------
        InvalidValueError
            If there are none.
        """
        n = len(found)
        if not n or len(by_chance) != n:
            raise InvalidValueError("no prompts with such a secret")
        gains = [a - b for a, b in zip(found, by_chance, strict=True)]
        chance = sum(by_chance) / n
        return cls(
            secret=secret,
            counted=n,
            share=sum(found) / n,
            chance=chance,
            error=_standard_error(found),
            threshold=chance + _Z * _standard_error(gains),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class CacheDecoder:
    """A trained decoder.

    Parameters
    ----------
    words : mapping of str to tuple of str
        By kind of secret, the words it knows, most frequent first.

    Privacy
    -------
    Its weights tell of the public prompts on which it was trained, and of the model.
    """

    words: Words
    _mean: Tensor = field(repr=False)
    _spread: Tensor = field(repr=False)
    _body: torch.nn.Module = field(repr=False)
    _heads: torch.nn.ModuleDict = field(repr=False)

    def scores(self, features: Tensor) -> dict[str, Tensor]:
        """Return log-probabilities by kind of secret: float32 (N, W)."""
        import torch

        with torch.no_grad():
            state = self._body(_scaled(features, self._mean, self._spread))
            return {
                kind: self._heads[str(i)](state).log_softmax(-1)
                for i, kind in enumerate(self.words)
            }

    def read(self, features: Tensor) -> dict[str, list[str]]:
        """Return the best guess for each prompt, by kind of secret."""
        return {
            kind: [self.words[kind][i] for i in scores.argmax(1).tolist()]
            for kind, scores in self.scores(features).items()
        }

    def recovered(self, features: Tensor, secrets: Sequence[Words]) -> list[Recovered]:
        """Compare guesses with the truth, kind by kind.

        Parameters
        ----------
        features : tensor (N, F)
        secrets : sequence of mappings
            The truth of each prompt. A word that the decoder does not know counts as missed.
        """
        out = []
        for kind, scores in self.scores(features).items():
            words = self.words[kind]
            # Frequencies among the attacked prompts: a better blind guess than anybody has.
            counts = Counter(word for truth in secrets for word in set(truth.get(kind, ())))
            usual = [word for word, _ in counts.most_common()]
            order = scores.argsort(1, descending=True).tolist()
            found, by_chance = [], []
            for row, truth in zip(order, secrets, strict=True):
                wanted = set(truth.get(kind, ()))
                if wanted:
                    guesses = {words[i] for i in row[: len(wanted)]}
                    found.append(len(wanted & guesses) / len(wanted))
                    by_chance.append(len(wanted & set(usual[: len(wanted)])) / len(wanted))
            if found:
                out.append(Recovered.of(kind, found, by_chance))
        return out


def train_decoder(
    features: Tensor,
    secrets: Sequence[Words],
    *,
    steps: int = 300,
    width: int = 192,
    jitter: Tensor | None = None,
    seed: int = 0,
) -> CacheDecoder:
    """Train a decoder of all kinds of secrets at once.

    Parameters
    ----------
    features : tensor (N, F)
        `cache_features` of prompts whose text the attacker knows, changed as what it is
        going to attack is changed: by the same codec. Without noise: see `jitter`.
    secrets : sequence of mappings
        Of the same prompts.
    steps, width, seed : int
    jitter : tensor (F,), optional
        Standard deviation of the noise in what will be attacked: drawn anew in every step,
        it costs the attacker no further prompts.

    Raises
    ------
    InvalidValueError
        If prompts and secrets differ in number, or there is no secret at all.

    Examples
    --------
    >>> import torch
    >>> known = torch.eye(3).repeat(50, 1)
    >>> secrets = [{"pet": (name,)} for name in ("rex", "tom", "kit")] * 50
    >>> train_decoder(known, secrets, steps=50, width=8).read(torch.eye(3))
    {'pet': ['rex', 'tom', 'kit']}
    """
    import torch
    from torch import nn

    if len(features) != len(secrets) or len(secrets) < 2:
        raise InvalidValueError("a decoder needs prompts, each with its secrets")
    words = _vocabulary(secrets)
    if not words:
        raise InvalidValueError("prompts without any secret to read")
    targets = [_targets(kind, words[kind], secrets) for kind in words]
    mean, spread = features.mean(0), features.std(0)
    if jitter is not None:
        spread = (spread**2 + jitter**2).sqrt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(features.shape[1], width), nn.GELU(), nn.Dropout(_DROPOUT))
        heads = nn.ModuleDict(
            {str(i): nn.Linear(width, len(words[kind])) for i, kind in enumerate(words)}
        )
        parameters = [*body.parameters(), *heads.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
        scaled = _scaled(features, mean, spread)
        blur = None if jitter is None else jitter / spread.clamp_min(1e-6) * (spread > 1e-6)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = _RATE * (1.0 - step / steps)
            rows = torch.randint(len(scaled), (min(_BATCH, len(scaled)),))
            drawn = scaled[rows]
            if blur is not None:
                drawn = drawn + blur * torch.randn_like(drawn)
            state = body(drawn)
            loss = torch.zeros(())
            for i, target in enumerate(targets):
                logp = heads[str(i)](state).log_softmax(-1)
                loss = loss - (target[rows] * logp).sum(1).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return CacheDecoder(
        words=words, _mean=mean, _spread=spread, _body=body.eval(), _heads=heads.eval()
    )


def _vocabulary(secrets: Sequence[Words]) -> dict[str, tuple[str, ...]]:
    """Return the words of each kind, most frequent first; rare ones last, some dropped."""
    counts: dict[str, Counter[str]] = {}
    for one in secrets:
        for kind, words in one.items():
            counts.setdefault(kind, Counter()).update(words)
    return {
        kind: tuple(sorted(found, key=lambda word: (-found[word], word))[:_MOST_WORDS])
        for kind, found in counts.items()
        if found
    }


def _targets(kind: str, words: tuple[str, ...], secrets: Sequence[Words]) -> Tensor:
    """Return the distribution over words of each prompt; 0 where it has none."""
    import torch

    place = {word: at for at, word in enumerate(words)}
    out = torch.zeros(len(secrets), len(words))
    for row, one in enumerate(secrets):
        known = [place[word] for word in one.get(kind, ()) if word in place]
        if known:
            out[row, known] = 1.0 / len(known)
    return out


def _scaled(features: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    # Numbers that never changed in training mean nothing, however they change later.
    safe = spread.clamp_min(1e-6)
    out = ((features - mean) / safe).clamp(-_FEATURE_LIMIT, _FEATURE_LIMIT)
    return out * (spread > 1e-6).to(out.dtype)


def _standard_error(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
