"""Text: RLHF in small, with a score-entropy model that the project trains itself.

Protocol: questions across a counter, replies of mixed quality to pre-train on; choices between two
replies, drawn by a hidden rule, train a reward model, and the reward model trains the policy. The
rule reports what its people would think of the result. 16 steps from noise to reply, the question
clamped.
"""

from __future__ import annotations

from rescore.algorithms.sepo import Sepo
from rescore.models.sedd import SeddConfig
from rescore.sampling.decoder import RateDecoder
from rescore.tasks.replies import Replies
from rescore.training.optim import Optim
from rescore.training.pretrain import Pretrain
from rescore.training.run import Evaluate, Run


def text_sepo_rlhf() -> Run:
    """SEPO-PPO: a critic of the question alone, the bound of the likelihood, a KL to the base.

    About 6 CPU-minutes after the base, which takes 5; preference -1.1 to 1.1, rule 0.14 to 0.37
    (one seed).
    """
    task = Replies()
    return Run(
        task=task,
        base=Pretrain(
            model=SeddConfig(vocab_size=task.vocab_size, length=task.length, width=64, depth=3),
            steps=2000,
            batch=64,
            lr=2e-3,
            validate_every=250,
            validation_rows=512,
        ),
        decoder=RateDecoder(steps=16),
        algorithm=Sepo(baseline="critic", normalise_std=False, beta=0.02),
        steps=40,
        batch_size=128,
        group_size=4,
        optim=Optim(lr=1e-4, epochs=2),
        evaluate=Evaluate(every=10, n=256, n_test=512, by="preference"),
        save_every=20,
    )
