"""CIDEr-D: how much a caption says what people said of the same picture, in n-grams weighted by how rare they are."""

from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt

NGRAM_LENGTHS = (1, 2, 3, 4)
SIGMA = 6.0

Ngram = tuple[str, ...]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10 (arXiv 1411.5726, section 5, with its clipping and length penalty).

    Args:
        captions: one per picture.
        references: what people said of each picture, at least one caption each. The rarity of n-grams is counted over
            the pictures given, so a score means something only for a corpus: with one picture every score is 0.

    Texts are split at blanks after folding case and taking out punctuation; the published evaluation uses the Penn
    Treebank tokenizer instead, which differs on contractions and hyphens. As in the published code, the length in the
    penalty is the number of two-word sequences.

    Raises:
        ValueError: the two lists differ in length, or a picture has no reference.

    Example:
        >>> [round(score, 6) for score in cider_d(["a red dog", "a cat"], [["a red dog"], ["two cats"]])]
        [7.5, 0.0]
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions, but references for {len(references)} pictures.")
    for index, texts in enumerate(references):
        if not texts:
            raise ValueError(f"Picture {index} has no reference caption: leave it out.")
    all_counts = [[_ngrams(text) for text in texts] for texts in references]
    pictures_with = Counter(ngram for counts in all_counts for ngram in set().union(*counts))
    log_pictures = log(len(captions)) if captions else 0.0

    def vector(ngrams: Counter[Ngram]) -> dict[Ngram, float]:
        return {ngram: count * (log_pictures - log(max(1, pictures_with[ngram]))) for ngram, count in ngrams.items()}

    scores = []
    for caption, counts in zip(captions, all_counts, strict=True):
        ngrams = _ngrams(caption)
        similarities = [
            _similarity(vector(ngrams), vector(reference), _length(ngrams) - _length(reference))
            for reference in counts
        ]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


def _ngrams(text: str) -> Counter[Ngram]:
    words = "".join(c if c.isalnum() or c.isspace() else " " for c in text.casefold()).split()
    return Counter(tuple(words[i : i + n]) for n in NGRAM_LENGTHS for i in range(len(words) - n + 1))


def _length(ngrams: Counter[Ngram]) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)


def _similarity(caption: dict[Ngram, float], reference: dict[Ngram, float], difference: int) -> float:
    """Mean over n-gram lengths of the clipped cosine, times the penalty for a `difference` in length."""
    total = 0.0
    for n in NGRAM_LENGTHS:
        dot = sum(min(w, reference[g]) * reference[g] for g, w in caption.items() if len(g) == n and g in reference)
        norms = [sqrt(sum(w * w for g, w in weights.items() if len(g) == n)) for weights in (caption, reference)]
        if all(norms):
            total += dot / (norms[0] * norms[1])
    return total / len(NGRAM_LENGTHS) * exp(-(difference**2) / (2 * SIGMA**2))
