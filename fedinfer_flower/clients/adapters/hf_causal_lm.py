"""A causal language model that transformers saved in a local folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedinfer_flower.clients.adapters.registry import MODELS, ModelKind
from fedinfer_flower.clients.candidate_model import CandidateModel
from fedinfer_flower.privacy.base import optional_module

if TYPE_CHECKING:
    from fedinfer_flower.clients.local_model import LocalModel
    from fedinfer_flower.language.model import LanguageModel

__all__ = ["HfCausalLm"]


@MODELS.register("hf-causal-lm")
@dataclass(frozen=True, kw_only=True)
class HfCausalLm(ModelKind):
    """Options of a causal language model in a local folder.

    Parameters
    ----------
    path : Path
        As `LanguageModel.from_folder` takes it: safetensors, ``tokenizer.json``, rotary
        positions. Nothing is downloaded, and no code in it is run.
    dtype : {"float32", "bfloat16"}
    candidates : tuple of str
        With them: a classifier over these continuations, for an `InferenceMod`. Without: the
        language model itself, for a `LanguageMod`.
    style : {"answer", "statement"}
        See `CandidateModel`.
    lead : str
        Between the prompt and a candidate.
    batch_rows : int
        Rows in one pass, with candidates.

    Privacy
    -------
    Candidates are class names, which everybody reads.
    """

    path: Path
    dtype: str = "float32"
    candidates: tuple[str, ...] = ()
    style: str = "answer"
    lead: str = " "
    batch_rows: int = 64

    def make(self) -> LanguageModel | LocalModel:
        """Load the folder.

        Raises
        ------
        ModelError, InvalidValueError, MissingExtraError
        """
        for module in ("torch", "transformers"):
            optional_module(module, extra="llm")
        from fedinfer_flower.language.model import LanguageModel

        model = LanguageModel.from_folder(self.path, dtype=self.dtype)
        if not self.candidates:
            return model
        return CandidateModel(
            model,
            self.candidates,
            style=self.style,
            lead=self.lead,
            batch_rows=self.batch_rows,
        ).local_model()
