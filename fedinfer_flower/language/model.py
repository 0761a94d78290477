"""`LanguageModel`: a local causal model with its tokenizer, and caches in and out of it.

Axes: B prompts, T tokens, P entries of the past, N tokens to read, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fedinfer_flower.errors import CacheError, InvalidValueError, PromptTooLongError
from fedinfer_flower.kv.layout import CacheEntries, CacheLayout
from fedinfer_flower.kv.past import Past
from fedinfer_flower.kv.rotary import rotary_tables, rotate, unrotate
from fedinfer_flower.language.confidence import evidence
from fedinfer_flower.language.decoding import Decoding, GrowingAnswers
from fedinfer_flower.language.folder import describe, load_folder
from fedinfer_flower.language.prompts import PromptFormat

__all__ = ["LanguageModel", "Prefill", "Tokens"]

_MOST_LOGITS: Final = 1 << 27
"""Of one scoring pass: half a gigabyte, and twice that in between."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """A batch of prompts, padded on the left.

    Parameters
    ----------
    ids, mask : int64 tensors (B, T)
    spans : list of list of (int, int)
        Characters of the prompt that each real token covers; (0, 0) for special tokens.
    """

    ids: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    spans: list[list[tuple[int, int]]] = field(repr=False)

    @property
    def positions(self) -> Tensor:
        """Positions from 0 for the first real token."""
        return (self.mask.cumsum(1) - 1).clamp_min(0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prefill:
    """A model's reading of a batch of prompts.

    Parameters
    ----------
    tokens : Tokens
        With the tokens that were decoded on top, if any.
    entries : CacheEntries
    evidence : float32 tensor (B, 4)
        About the first token after the prompt; see `fedinfer_flower.language.confidence`.
    """

    tokens: Tokens
    entries: CacheEntries
    evidence: Tensor = field(repr=False)

    def select(self, index: Tensor) -> Prefill:
        """Return some rows."""
        tokens = Tokens(
            ids=self.tokens.ids[index],
            mask=self.tokens.mask[index],
            spans=[self.tokens.spans[i] for i in index.tolist()],
        )
        return Prefill(
            tokens=tokens, entries=self.entries.select(index), evidence=self.evidence[index]
        )

    def past(self) -> Past:
        """Return the past on which an answer is decoded: all tokens but the last are read."""
        e = self.entries.cut(0, self.entries.tokens - 1)
        positions = self.tokens.positions
        return Past(
            keys=e.keys,
            values=e.values,
            mask=e.mask,
            positions=positions[:, :-1],
            ids=self.tokens.ids[:, -1:],
            ids_positions=positions[:, -1:],
        )


class LanguageModel:
    """A frozen causal model of transformers 5 with rotary positions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerFast
    prompts : PromptFormat
    digest : str, optional
        SHA-256 that names the weights; default from the state dict.

    Raises
    ------
    ModelError
        If its cache cannot be shared: sliding windows, other positions than rotary ones,
        recurrent or latent caches.

    Privacy
    -------
    Entries and hidden states that leave this object contain the prompt: see the threat
    model. Nothing here sends them anywhere.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, prompts: PromptFormat, digest: str = ""
    ) -> None:
        self.model, self.tokenizer, self.prompts = model.eval(), tokenizer, prompts
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.layout: CacheLayout = describe(model, tokenizer, digest=digest)
        # Chat models end a turn with another token than a text.
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        # Logits of every token of a long batch take many times the memory of its cache.
        known = inspect.signature(model.forward).parameters
        # An index copies the row: on a slice of bfloat16 the product takes a path 30 times
        # as slow.
        last = torch.tensor([-1])
        self._last_alone = {"logits_to_keep": last} if "logits_to_keep" in known else {}
        self._ends = frozenset({*ends, tokenizer.eos_token_id} - {None})
        self.abstention_ids = sorted(
            {ids[0] for text in prompts.abstentions if (ids := self._plain_ids(text))}
        )

    @classmethod
    def from_folder(
        cls, path: str | Path, *, prompts: PromptFormat | None = None, dtype: str = "float32"
    ) -> LanguageModel:
        """Load a local folder: safetensors only, no code from it, no network.

        Parameters
        ----------
        path : path
        prompts : PromptFormat, optional
            Default the tokenizer's own chat template, or plain text without one.
        dtype : str
            ``"float32"`` or ``"bfloat16"``.

        Raises
        ------
        ModelError
        """
        model, tokenizer, digest = load_folder(Path(path), dtype=dtype)
        if prompts is None:
            from fedinfer_flower.language.chat import default_prompts

            prompts = default_prompts(tokenizer)
        return cls(model, tokenizer, prompts=prompts, digest=digest)

    # -- text to tokens ----------------------------------------------------------------

    def tokens(self, prompts: Sequence[str], *, room: int = 0) -> Tokens:
        """Tokenize prompts, padded on the left.

        Parameters
        ----------
        prompts : sequence of str
        room : int
            Positions to leave free for what follows.

        Raises
        ------
        PromptTooLongError
            If one does not fit into the model's window.
        """
        # A chat template writes its own special tokens: a second start token is not wanted.
        special = not getattr(self.prompts, "writes_special_tokens", False)
        coded = self.tokenizer(
            list(prompts),
            padding=True,
            padding_side="left",
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        ids, mask = coded["input_ids"], coded["attention_mask"]
        if ids.shape[1] == 0:
            raise PromptTooLongError("a prompt without a single token")
        if ids.shape[1] + room > self.layout.window:
            raise PromptTooLongError(
                f"a prompt of {ids.shape[1]} tokens with {room} to follow;"
                f" the model's window is {self.layout.window}",
                hint="shorten the question or the documents",
            )
        offsets = coded["offset_mapping"].tolist()
        spans = [
            [(a, b) for (a, b), real in zip(row, on, strict=True) if real]
            for row, on in zip(offsets, mask.tolist(), strict=True)
        ]
        return Tokens(ids=ids, mask=mask, spans=spans)

    # -- caches ------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, prompts: Sequence[str], *, decode: int = 0, hidden: bool = False) -> Prefill:
        """Read prompts and export what was computed, free of positions.

        Parameters
        ----------
        prompts : sequence of str
        decode : int
            Tokens that the model decodes greedily on top; their entries are appended.
        hidden : bool
            Export the final hidden state too.
        """
        tokens = self.tokens(prompts, room=decode)
        ids, mask = tokens.ids, tokens.mask
        out = self._forward(ids, mask, tokens.positions, past=None, hidden=hidden)
        first = out.logits[:, -1]
        states = [out.hidden_states[-1]] if hidden else []
        for _ in range(decode):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            at = (mask.cumsum(1) - 1).clamp_min(0)[:, -1:]
            out = self._forward(token, mask, at, past=out.past_key_values, hidden=hidden)
            states += [out.hidden_states[-1]] if hidden else []
        read = Tokens(ids=ids, mask=mask, spans=tokens.spans)
        cos, sin = rotary_tables(self.model, read.positions)
        layers = out.past_key_values.layers
        entries = CacheEntries(
            keys=tuple(unrotate(layer.keys, cos, sin) for layer in layers),
            values=tuple(layer.values for layer in layers),
            mask=mask,
            layout=self.layout,
            hidden=torch.cat(states, 1) if hidden else None,
        )
        shown = evidence(first, self.abstention_ids)
        return Prefill(tokens=read, entries=entries, evidence=shown)

    def logits_on(self, past: Past, labels: Tensor | None = None) -> Tensor:
        """Return logits of the unread tokens, and of labels fed after them.

        Differentiable in the past's keys and values: fusers are trained through it.

        Parameters
        ----------
        past : Past
        labels : int64 tensor (B, L), optional
            Answer tokens to feed (teacher forcing).

        Returns
        -------
        logits : tensor (B, N + L, V)
        """
        ids, at = past.ids, past.ids_positions
        if labels is not None and labels.shape[1]:
            steps = torch.arange(1, labels.shape[1] + 1)[None]
            ids, at = torch.cat([ids, labels], 1), torch.cat([at, at[:, -1:] + steps], 1)
        mask = torch.cat([past.mask, torch.ones_like(ids)], 1)
        logits: Tensor = self._forward(
            ids, mask, at, past=self._import(past), every_logit=True
        ).logits
        return logits

    # -- answers -----------------------------------------------------------------------

    @torch.no_grad()
    def decode_on(self, past: Past, settings: Decoding) -> list[str]:
        """Decode answers on a past.

        Raises
        ------
        PromptTooLongError
            If the answer may not fit into the window.
        """
        cache = self._import(past)
        last = int(past.ids_positions.max()) + settings.max_new_tokens
        if last > self.layout.window:
            raise PromptTooLongError(
                f"the answer may reach position {last}; the model's window is {self.layout.window}"
            )
        ids, at = past.ids, past.ids_positions
        mask = torch.cat([past.mask, torch.ones_like(ids)], 1)
        out = self._forward(ids, mask, at, past=cache)
        sampler, answers = (
            settings.sampler(),
            GrowingAnswers(self.tokenizer, settings, len(ids), self._ends),
        )
        for step in range(settings.max_new_tokens):
            token = sampler.choose(out.logits[:, -1])
            if answers.take(token) or step + 1 == settings.max_new_tokens:
                break
            at, mask = at[:, -1:] + 1, torch.cat([mask, torch.ones_like(token)], 1)
            out = self._forward(token, mask, at, past=out.past_key_values)
        return answers.texts()

    def generate(self, prompts: Sequence[str], settings: Decoding) -> list[str]:
        """Continue prompts."""
        self.tokens(prompts, room=settings.max_new_tokens)
        return self.decode_on(self.prefill(prompts).past(), settings)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], candidates: Sequence[str]) -> Tensor:
        """Return log-probabilities of whole continuations.

        Parameters
        ----------
        prompts : sequence of str
        candidates : sequence of str
            Each is tokenized on its own and scored piece by piece.

        Returns
        -------
        scores : float32 tensor (B, C)
            For C candidates: sums over their pieces, not normalised over candidates.

        Raises
        ------
        InvalidValueError
            If a candidate has no tokens: it would be certain.
        PromptTooLongError
        """
        pieces = [self._plain_ids(text) for text in candidates]
        if not all(pieces):
            raise InvalidValueError("a candidate without a single token")
        longest = max(map(len, pieces), default=0)
        self.tokens(prompts, room=longest)
        # Logits of all pieces' tokens at once: few prompts at a time, or they fill the memory.
        rows = max(1, _MOST_LOGITS // max(1, longest * int(self.model.config.vocab_size)))
        parts = [
            self._scored(prompts[start : start + rows], pieces)
            for start in range(0, len(prompts), rows)
        ]
        return torch.cat(parts)

    def _scored(self, prompts: Sequence[str], pieces: Sequence[list[int]]) -> Tensor:
        past = self.prefill(prompts).past()
        columns = []
        for piece in pieces:
            ids = torch.tensor([piece], dtype=torch.long).expand(len(prompts), -1)
            logp = self.logits_on(past, ids[:, :-1]).float().log_softmax(-1)
            columns.append(logp.gather(2, ids[..., None])[..., 0].sum(1))
        return torch.stack(columns, 1)

    # -- parts -------------------------------------------------------------------------

    def _plain_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _import(self, past: Past) -> Any:
        """Return a fresh cache: every pass writes into the one that it is given."""
        from transformers import DynamicCache

        layout, (n, p) = self.layout, past.mask.shape
        want = (n, layout.heads, p, layout.head_size)
        fits = len(past.keys) == len(past.values) == layout.layers
        fits &= all(tuple(x.shape) == want for x in (*past.keys, *past.values))
        fits &= past.positions.shape == (n, p) and past.ids.shape[0] == n
        if not fits or past.ids.shape != past.ids_positions.shape or not past.ids.shape[1]:
            # transformers itself takes a mask of another length, and answers wrongly.
            raise CacheError("a past whose entries, mask, positions and ids do not fit together")
        cos, sin = rotary_tables(self.model, past.positions)
        dtype = self.model.dtype
        pairs = [
            (rotate(k.to(dtype), cos, sin), v.to(dtype))
            for k, v in zip(past.keys, past.values, strict=True)
        ]
        return DynamicCache(pairs, config=self.model.config)

    def _forward(
        self,
        ids: Tensor,
        mask: Tensor,
        at: Tensor,
        *,
        past: Any,
        hidden: bool = False,
        every_logit: bool = False,
    ) -> Any:
        # The mask covers past and new tokens: one that covers the new ones alone raises no
        # error and gives wrong answers.
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=at,
            past_key_values=past,
            use_cache=True,
            output_hidden_states=hidden,
            **({} if every_logit else self._last_alone),
        )
