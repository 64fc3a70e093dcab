"""Mixtures whose KL-regularised optimum is known: what is trained can be held against it.

The pretrained score is exact, a small network that starts at 0 corrects it; there is nothing to
pre-train. J = E[r] - beta KL, with the KL of whole paths, exact for every step.
"python benchmarks/step_counts.py" makes the figure of docs/algorithms/score-as-action.md.
"""

from __future__ import annotations

from dataclasses import replace

from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.sampling.decoder import GaussianDecoder
from rescore.tasks.mixture import GAUSSIAN, THREE_MODES
from rescore.training.mixture import MixtureBase
from rescore.training.optim import Optim
from rescore.training.run import Evaluate, Run


def mixture_score_as_action() -> Run:
    """Three modes in the plane, a linear reward, beta = 1, 25 steps of Euler-Maruyama.

    60 CPU-seconds; expected J 0.31 of the 0.35 that any law can reach, from 0 (reward 0.61).
    """
    return Run(
        task=THREE_MODES,
        base=MixtureBase(),
        decoder=GaussianDecoder(steps=25, solver="euler_maruyama"),
        algorithm=ScoreAsAction(beta=1.0, critic_epochs=2, critic_batch=1024),
        steps=300,
        batch_size=512,
        group_size=1,
        optim=Optim(lr=3e-3, micro_batch=8192),
        forward_rows=8192,
        evaluate=Evaluate(every=50, n=1024, n_test=4096),
        save_every=50,
    )


def gaussian_score_as_action() -> Run:
    """One Gaussian on the line, r = -(x - 2)^2, beta = 1/2, 40 steps; without likelihoods.

    40 CPU-seconds; expected J -0.66 to -0.67, and no more than -0.660 is possible in 40 steps.
    """
    run = mixture_score_as_action()
    return replace(
        run,
        task=GAUSSIAN,
        decoder=replace(run.decoder, steps=40),
        algorithm=replace(run.algorithm, form="score_gradient", beta=0.5),
        steps=150,
    )
