"""KL(policy || reference) of whole paths of a Gaussian process, from what was recorded."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.processes.gaussian import AffineStep, TwoStep
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.reference import Kl, path_kls, path_outputs
from rescore.types import GaussianTrajectory


@torch.no_grad()
def path_kl(
    reference: GaussianPolicy, path: GaussianTrajectory, kl: Kl = "step"
) -> Float[Tensor, " B"]:
    """Sum over the steps of the KL of each; its mean over paths is that of the laws of paths, nats.

    Args:
        reference: has the decoder that drew the path.
        path: drawn with ``Record(moves="all", outputs=True)``.
        kl: ``step`` is exact for the chain that was simulated, but for steps without noise, which
            count for nothing. ``continuous`` is the rate of Girsanov's theorem held over each step,
            of solvers without noise what it would be with noise: comparable between solvers and
            numbers of steps.

    Raises:
        ValueError: ``step`` and a solver without noise; outputs that were not recorded.
    """
    if path.output is None:
        raise ValueError(
            'the path has no outputs; record it with Record(moves="all", outputs=True)'
        )
    if kl == "step" and not isinstance(reference.steps, AffineStep | TwoStep):
        raise ValueError(
            f"steps of {reference.decoder.solver} draw no noise, so paths have no KL; use "
            f"kl='continuous'"
        )
    other = path_outputs(reference, path)
    return path_kls(reference, path, path.output, other, kl).sum(1)
