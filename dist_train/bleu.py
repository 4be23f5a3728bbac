"""BLEU by sacrebleu, in counts that can be added up over sentences and ranks (Post 2018, arXiv:1804.08771)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.errors import UserError

COUNTS = 10
"""Matching n-grams of 1 to 4 words, those that were written, the words written, the words of the reference."""


def counts(written: str, reference: str) -> list[int]:
    """The counts of a sentence."""
    found = _library()(effective_order=True).sentence_score(written, [reference])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def score(totals: Sequence[float]) -> float:
    """BLEU from the counts of all sentences, 0 to 100: that of sacrebleu for the whole corpus."""
    *ngrams, written, reference = (round(total) for total in totals)
    made = _library().compute_bleu(ngrams[:4], ngrams[4:], written, reference)
    return float(made.score)


def _library() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UserError("bleu needs sacrebleu: pip install 'dist-train[translation]'") from error
    return BLEU
