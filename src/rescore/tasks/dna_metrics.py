"""How much a set of sequences resembles real ones: counts, correlations, diversity, likelihood."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rescore.models.denoiser import Denoiser
from rescore.objectives.denoising import masked_cross_entropy
from rescore.tasks.dna_sequences import occupancy

ROWS = 256
"""Sequences looked at together."""


def kmer_counts(tokens: Int[Tensor, "n L"], k: int = 3) -> Int[Tensor, " K"]:
    """How often each of the ``4 ** k`` words of k letters occurs, over all sequences."""
    place = 4 ** torch.arange(k - 1, -1, -1, device=tokens.device)
    words = (tokens.unfold(1, k, 1) * place).sum(-1)
    return torch.bincount(words.flatten(), minlength=4**k)


def kmer_correlation(
    tokens: Int[Tensor, "n L"], reference: Int[Tensor, "m L"], k: int = 3
) -> float:
    """Pearson correlation of the k-mer counts of two sets of sequences.

    Raises:
        ValueError: a set has every word equally often.
    """
    return pearson(kmer_counts(tokens, k).double(), kmer_counts(reference, k).double())


def motif_counts(tokens: Int[Tensor, "n L"]) -> Float[Tensor, " M"]:
    """Places at which each motif lies above its threshold, on either strand, over all sequences."""
    hits = [(occupancy(part) > 0.5).any(2).sum((0, 2)) for part in tokens.split(ROWS)]
    return torch.stack(hits).sum(0).double()


def motif_correlation(tokens: Int[Tensor, "n L"], reference: Int[Tensor, "m L"]) -> float:
    """Spearman correlation, over the motifs, of how often each occurs in two sets of sequences.

    Raises:
        ValueError: a set has every motif equally often.
    """
    return pearson(ranks(motif_counts(tokens)), ranks(motif_counts(reference)))


def pearson(x: Float[Tensor, " K"], y: Float[Tensor, " K"]) -> float:
    """Pearson correlation.

    Raises:
        ValueError: the numbers on one side are all equal.
    """
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    if not bool(scale > 0):
        raise ValueError("all counts are equal, so their correlation is not defined")
    return ((x * y).sum() / scale).item()


def ranks(x: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Rank of each number from 0; equal numbers share the mean of their ranks."""
    below, equal = x[:, None] > x, x[:, None] == x
    return below.sum(1).double() + (equal.sum(1) - 1).double() / 2


def diversity(tokens: Int[Tensor, "n L"]) -> float:
    """Mean over pairs of sequences of the fraction of positions in which they differ.

    Raises:
        ValueError: there are fewer than two sequences.
    """
    n = len(tokens)
    if n < 2:
        raise ValueError(f"{n} sequences; the distance of pairs needs at least 2")
    count = torch.nn.functional.one_hot(tokens).sum(0).double()
    equal = (count * (count - 1)).sum(1) / (n * (n - 1))
    return (1 - equal.mean()).item()


def distinct(tokens: Int[Tensor, "n L"]) -> float:
    """Number of different sequences over the number of sequences."""
    return len(torch.unique(tokens, dim=0)) / len(tokens)


@torch.no_grad()
def log_likelihood_bound(
    model: Denoiser, tokens: Int[Tensor, "n L"], *, draws: int, generator: torch.Generator
) -> Float[Tensor, " n"]:
    """An estimate, for each sequence, of a lower bound on log p(x_0), nats.

    Minus the mean over ``draws`` masked copies of L / m times the cross-entropy of the masked
    letters, m uniform in 1 ... L (LLaDA, arXiv:2502.09992, eq. 6). The copies of a sequence share
    the values of m out equally, which keeps the estimate unbiased and lowers its variance.

    Args:
        model: its logits are p(x_0 | x_t); of the pre-trained model for the naturalness of a
            sequence.
        tokens: whole sequences, on the model's device.
        draws: masked copies of each sequence.
        generator: draws numbers of masks and their places, on the CPU.
    """
    n, length = tokens.shape
    total = torch.zeros(n, dtype=torch.float64)
    shift = torch.rand(n, generator=generator, dtype=torch.float64)
    for draw in range(draws):
        part = (draw + shift) / draws
        n_masked = 1 + (part * length).long().clamp(max=length - 1)
        order = torch.rand(n, length, generator=generator).argsort(1).argsort(1)
        hidden = (order < n_masked[:, None]).to(tokens.device)
        weight = (length / n_masked).float().to(tokens.device)
        for rows in torch.arange(n, device=tokens.device).split(ROWS):
            x_0, masked = tokens[rows], hidden[rows]
            logits = model.predict(torch.where(masked, model.mask_id, x_0))
            loss = masked_cross_entropy(logits, x_0, masked, weight[rows])
            total[rows.cpu()] -= loss.double().cpu() / draws
    return total
