"""Captions against references, as the COCO caption evaluation measures them (arXiv 1504.00325)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from datasets.tokens import normalise
from pretrain.evaluate.cider import Words, cider_d

_BETA = 1.2
"""How much more recall counts than precision in COCO's ROUGE-L."""

_SUFFIX = re.compile(r"(?<=\w)(?=(?:n't|'(?:s|m|d|re|ve|ll))\b)")
_WORD = re.compile(
    r"n't\b|'(?:s|m|d|re|ve|ll)\b"  # what _SUFFIX has cut off
    r"|\d+(?:[.,:]\d+)+"  # 3.5, 10:30
    r"|\w+(?:[-'/]\w+)*"  # t-shirt, o'clock
    r"|[^\w\s.,:;?!'\"`()\[\]{}-]"  # &, %, ...
)


def exact_match(captions: Sequence[str], references: Iterable[Sequence[str]]) -> float:
    """Share of captions that equal one of their references, after normalisation."""
    hits = [
        normalise(caption) in {normalise(reference) for reference in right}
        for caption, right in zip(captions, references, strict=True)
    ]
    return sum(hits) / len(hits)


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr-D, BLEU-1, BLEU-4 and ROUGE-L of one caption per image against one or more references each.

    They are COCO's, over all images together and not times 100: `cider_d` from 0 to 10 (see there),
    `bleu_1`, `bleu_4` (Papineni et al. 2002, over the corpus, without smoothing) and `rouge_l` (Lin 2004)
    from 0 to 1. A caption or reference without words shares nothing with any other and counts as such.
    """
    assert captions, "there is nothing to measure"
    assert all(references), "every image needs a reference"
    # Importing it takes seconds, which a run without captions should not wait for.
    from torchmetrics.functional.text import bleu_score

    said = [words(caption) for caption in captions]
    # The shortest first: BLEU takes the reference of the nearest length, and of two the first.
    right = [sorted(map(words, each), key=len) for each in references]
    joined = [" ".join(each) for each in said]
    joined_right = [[" ".join(one) for one in each] for each in right]
    rouge = [_rouge_l(caption, each) for caption, each in zip(said, right, strict=True)]
    cider = cider_d(said, right)
    return {
        "cider_d": sum(cider) / len(cider),
        "bleu_1": bleu_score(joined, joined_right, n_gram=1).item(),
        "bleu_4": bleu_score(joined, joined_right, n_gram=4).item(),
        "rouge_l": sum(rouge) / len(rouge),
    }


def words(text: str) -> list[str]:
    """Lower case, suffixes such as 's and n't apart, punctuation left out.

    COCO runs the Stanford PTB tokenizer, a Java program, and drops its punctuation; on the captions of
    Flickr8k this gives the same words for 999 of 1000. What differs: abbreviations (mr., d.c.), addresses,
    "cannot" and its like, and brackets, which COCO leaves in by mistake as the words -lrb- and -rrb-.
    """
    return _WORD.findall(_SUFFIX.sub(" ", text.lower().replace("\u2019", "'")))


def _rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """F of the best precision and the best recall, which may be those of two references.

    By hand: torchmetrics has them for one reference at a time only, at ten times the cost.
    """
    common = [_longest_common(caption, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption)
    recall = max(
        length / len(reference) for length, reference in zip(common, references, strict=True) if reference
    )
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(left: Words, right: Words) -> int:
    """Length of the longest common subsequence, by dynamic programming with one row kept."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
