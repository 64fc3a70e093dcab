"""SEDD-medium against a reward model with SEPO-PPO: RLHF. Needs the weights and a GPU.

    rescore train sedd_medium_sepo --task.source prompts.jsonl --task.reward-model FOLDER
    rescore train sedd_medium_sepo --dry-run             # tiny random weights, a CPU

Rows of the source are {"prompt": ...}; the reward model is a sequence classifier of transformers
with one output. SEDD-medium continues text and knows no turns of a chat, so prompts should be text
to continue. Its repository has no tokenizer: GPT-2's is used, with the mask after its 50257 tokens.

All 424 million weights train, in float32: with gradients, Adam's moments and the frozen reference
that is 20 bytes each, 8.5 GB, which leaves two thirds of a card of 24 GB. Adapters would save 6 GB
of it but not what grows with the batch: a table of scores over the vocabulary, 51 MB for each
canvas of 256 positions, of which several are alive at once (forward_rows bounds them while
sampling, optim.micro_batch in the update). And a network of which all weights were trained exports
to the published layout as it is. --precision bfloat16 is faster but rounds the scores to 8 bits.

Never run with the real weights by this project, so no result is stated.
"""

from __future__ import annotations

from rescore.algorithms.sepo import Sepo
from rescore.sampling.decoder import RateDecoder
from rescore.tasks.reward_models import Conversations
from rescore.tasks.tokenizers import AppendedMask
from rescore.training.optim import Optim
from rescore.training.pretrained_sedd import PretrainedSedd
from rescore.training.run import Evaluate, Run


def sedd_medium_sepo() -> Run:
    """SEPO-PPO on SEDD-medium, prompts from a file, a reward model; --dry-run tries it on a laptop.

    128 steps from noise to 128 tokens, the prompt clamped; a critic of the prompt alone, the bound
    of the likelihood, a KL to the base.
    """
    return Run(
        task=Conversations(
            tokenizer=AppendedMask(path="openai-community/gpt2"),
            prompt_length=128,
            completion_length=128,
            source="prompts.jsonl",
            reward_model="reward-model",
            reward_device="cuda",
        ),
        base=PretrainedSedd(weights="louaaron/sedd-medium"),
        decoder=RateDecoder(steps=128),
        algorithm=Sepo(mode="elbo", baseline="critic", normalise_std=False, beta=0.02),
        steps=500,
        batch_size=64,
        group_size=4,
        forward_rows=8,  # so old and new likelihoods come from equal shapes: the ratio starts at 1
        optim=Optim(lr=1e-5, epochs=2, mini_batches=2, micro_batch=1),
        evaluate=Evaluate(every=25, n=64, n_test=256),
        save_every=25,
        device="cuda",
    )
