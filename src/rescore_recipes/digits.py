"""Digits: an unconditional model of 8 x 8 images turned into one that writes threes.

Protocol: the reward is log p(3 | x) of a classifier, in nats, and the KL of paths costs 1 per nat.
No policy can do better than Bayes' rule, the pretrained law given that the classifier says 3: the
logarithm of the mean p(3 | x) of pretrained samples, -2.5, at a KL of 1.9. Gaussian steps of given
variance do not reach that; to change nothing earns -8.0. A second classifier, fitted to other
images, judges. 20 steps from noise to image, 6400 samples in all. "python benchmarks/digits.py"
makes the table and figures of docs/algorithms/score-as-action.md.
"""

from __future__ import annotations

from dataclasses import replace

from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.models.unet import UNetConfig
from rescore.sampling.decoder import GaussianDecoder
from rescore.tasks.digits import Digits
from rescore.training.optim import Optim
from rescore.training.pretrain import Pretrain
from rescore.training.run import Evaluate, Run


def digits_score_as_action() -> Run:
    """Score as Action with the clipped surrogate of increments of the value.

    Expected on the test split, 3 seeds: reward -7.8 ± 0.2 before, -2.0 ± 0.1 after at a KL of
    2.2 ± 0.3; the judge sees a three in 0.09 of the samples before and 0.51 ± 0.01 after. 2
    CPU-minutes after the base, which takes 80 CPU-seconds.
    """
    return Run(
        task=Digits(conditional=False, target=3),
        base=Pretrain(
            model=UNetConfig(),
            steps=1600,
            batch=128,
            lr=3e-3,
            validate_every=400,
            validation_rows=512,
        ),
        decoder=GaussianDecoder(steps=20),
        algorithm=ScoreAsAction(beta=1.0),
        steps=50,
        batch_size=128,
        group_size=1,
        optim=Optim(lr=2e-4, mini_batches=2),
        evaluate=Evaluate(every=25, n=256, n_test=640),
        save_every=25,
    )


def digits_score_as_action_b() -> Run:
    """Score as Action with the gradient of the value, which reaches into the classifier.

    Expected: reward -2.0 ± 0.1 at a KL of 2.2 ± 0.3, accuracy 0.52 ± 0.01. 3 CPU-minutes after the
    base.
    """
    run = digits_score_as_action()
    return replace(run, algorithm=ScoreAsAction(form="score_gradient", beta=1.0))


def digits_ddpo() -> Run:
    """DDPO, its KL weighted for rewards that are divided by their standard deviation, about 3.

    Expected: reward -1.7 ± 0.1 at a KL of 2.7 ± 0.2, accuracy 0.58 ± 0.03. 70 CPU-seconds after the
    base.
    """
    run = digits_score_as_action()
    return replace(run, algorithm=Ddpo(beta=0.3, statistics="batch"))


def digits_dpok() -> Run:
    """DPOK with the same KL weight.

    Expected: reward -2.0 ± 0.1 at a KL of 2.1 ± 0.2, accuracy 0.50 ± 0.01. 2 CPU-minutes after the
    base.
    """
    run = digits_score_as_action()
    return replace(run, algorithm=Dpok(beta=1.0))
