"""KL(policy || reference) of whole paths of a Gaussian process, from what was recorded."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rescore.processes.gaussian import AffineStep, TwoStep, continuous_kl, step_kl
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.types import GaussianTrajectory


@torch.no_grad()
def path_kl(
    reference: GaussianPolicy, path: GaussianTrajectory, kl: Literal["step", "continuous"] = "step"
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
    network, steps, times = reference.network, reference.steps, reference.times.to(path.x_0.device)
    if kl == "step" and not isinstance(steps, AffineStep | TwoStep):
        raise ValueError(
            f"steps of {reference.decoder.solver} draw no noise, so paths have no KL; use "
            f"kl='continuous'"
        )
    total = torch.zeros_like(path.log_prob[:, 0])
    before: dict[str, Tensor] = {}
    for k in range(path.n_steps):
        a, t = path.output[:, k], times[k : k + 1]
        a_ref = network.predict(path.path[:, k], t.to(a).expand(len(a)), path.prompts.inputs)
        if kl == "continuous":
            total = total + continuous_kl(
                network.schedule,
                t,
                times[k + 1 : k + 2],
                a,
                a_ref,
                prediction=network.prediction,
                eta=reference.decoder.noise_eta,
            )
            continue
        assert isinstance(steps, AffineStep | TwoStep)
        step, now = steps.take(slice(k, k + 1)).to(total.device), {}
        if isinstance(step, TwoStep):
            now = {"a_before": a, "a_before_ref": a_ref}
        if bool(step.is_random):
            total = total + step_kl(step, a, a_ref, **(before or now))  # a first has no past
        before = now
    return total
