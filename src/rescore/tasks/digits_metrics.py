"""How much a set of images resembles real ones and how varied it is, in features of a network."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frechet_distance(
    features: Float[Tensor, "n F"], others: Float[Tensor, "m F"]
) -> Float[Tensor, ""]:
    r"""Squared 2-Wasserstein distance of the normal laws with the moments of two sets.

    $$|\mu_1 - \mu_2|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})$$

    Source: Frechet distance of Dowson and Landau 1982, of features as in FID (Heusel et al. 2017,
    arXiv:1706.08500). In float64; the trace of the root is that of the symmetric
    $(\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}$. Small sets are biased upwards, so compare
    sets of equal size only.

    Raises:
        ValueError: a set has fewer than two rows, so no covariance.
    """
    if min(len(features), len(others)) < 2:
        raise ValueError(
            f"sets of {len(features)} and {len(others)} rows; a Frechet distance needs at least 2"
        )
    a, b = features.double(), others.double()
    cov_a, cov_b = torch.cov(a.T).view(2 * a.shape[1:]), torch.cov(b.T).view(2 * b.shape[1:])
    root_a = _symmetric_root(cov_a)
    mixed = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    between = (a.mean(0) - b.mean(0)).square().sum()
    return between + cov_a.trace() + cov_b.trace() - 2 * mixed


def frechet_beside_floor(
    features: Float[Tensor, "n F"], real: Float[Tensor, "m F"], *, draws: int = 10
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Distance of a set from half of the real rows, and of the other half from that half.

    Both are means over the same random halvings, and of sets of equal size: of ``features`` each
    takes as many rows at random as the other half has.

    Raises:
        ValueError: ``features`` has fewer rows than that.
    """
    n = len(real) // 2
    if len(features) < n:
        raise ValueError(
            f"{len(features)} outputs beside halves of {n} real images; a distance falls with the "
            f"number of rows, so use at least {n} outputs"
        )
    generator = torch.Generator().manual_seed(0)
    distances, floors = [], []
    for _ in range(draws):
        order = torch.randperm(len(real), generator=generator).to(real.device)
        rows = torch.randperm(len(features), generator=generator)[:n].to(features.device)
        half = real[order[n : 2 * n]]
        distances.append(frechet_distance(features[rows], half))
        floors.append(frechet_distance(real[order[:n]], half))
    return torch.stack(distances).mean(), torch.stack(floors).mean()


def mean_distance(features: Float[Tensor, "n F"]) -> Float[Tensor, ""]:
    """Mean Euclidean distance of two different rows."""
    return torch.nn.functional.pdist(features.double()).mean()


def class_entropy(classes: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Entropy of the shares of the classes, nats."""
    shares = classes.bincount().double() / len(classes)
    return torch.special.entr(shares).sum()


def _symmetric_root(matrix: Float[Tensor, "F F"]) -> Float[Tensor, "F F"]:
    """The root of a symmetric matrix without negative eigenvalues, beyond rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
