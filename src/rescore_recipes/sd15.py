"""Stable Diffusion 1.5 with DDPO and with Score as Action. Needs the weights and a GPU.

    rescore train sd15_ddpo --base.weights FOLDER         # or the repository on the hub
    rescore train sd15_score_as_action
    rescore train sd15_ddpo --dry-run                     # tiny random weights, a CPU

The reward is the size of the image as a JPEG, to be replaced in a recipe of your own by any
function of images and texts (docs/image-models.md). Never run with the real weights by this
project, so no result is stated.
"""

from __future__ import annotations

from dataclasses import replace

from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.models.finetune import Lora
from rescore.models.images import ATTENTION
from rescore.sampling.decoder import GaussianDecoder
from rescore.tasks.image_prompts import ImagePrompts
from rescore.training.optim import Optim
from rescore.training.pretrained_images import PretrainedPipeline
from rescore.training.run import Evaluate, Run

# fmt: off
ANIMALS = (
    "badger", "bat", "bear", "beaver", "bee", "bird", "bison", "butterfly", "camel", "cat",
    "cheetah", "chicken", "cow", "crab", "deer", "dog", "dolphin", "donkey", "duck", "eagle",
    "elephant", "ferret", "fish", "fox", "frog", "giraffe", "goat", "goose", "gorilla", "hamster",
    "hare", "hedgehog", "hippopotamus", "horse", "kangaroo", "lion", "lizard", "lynx", "monkey",
    "moose", "mouse", "otter", "owl", "panda", "parrot", "penguin", "pig", "rabbit", "raccoon",
    "rat", "raven", "seal", "sheep", "snail", "snake", "spider", "squirrel", "swan", "tiger",
    "turkey", "turtle", "whale", "wolf", "zebra",
)
# fmt: on


def sd15_ddpo() -> Run:
    """DDPO-IS on SD 1.5, JPEG size, 50 steps of DDIM; --dry-run tries it on a laptop.

    Samples, updates, learning rate, clip and adapters as in the released code on 8 GPUs (256 images
    and four updates per rollout). Not as there: advantages from the 8 images of a prompt in the
    rollout, not from a history of its rewards; bfloat16; the list of animals.
    """
    return Run(
        task=ImagePrompts(source=ANIMALS),
        base=PretrainedPipeline(
            kind="sd15",
            weights="stable-diffusion-v1-5/stable-diffusion-v1-5",
            guidance=5.0,
            gradient_checkpointing=True,
        ),
        decoder=GaussianDecoder(steps=50, solver="ddim", eta=1.0, spacing="leading", offset=1),
        algorithm=Ddpo(clip=1e-4 * 4 * 64 * 64),
        steps=100,
        batch_size=256,
        group_size=8,
        forward_rows=16,
        lora=Lora(rank=4, alpha=4, targets=ATTENTION),
        optim=Optim(
            lr=3e-4,
            betas=(0.9, 0.999),
            weight_decay=1e-4,
            warmup=0,
            mini_batches=4,
            micro_batch=16,
        ),
        evaluate=Evaluate(every=10, n=64, n_test=64),
        save_every=10,
        precision="bfloat16",
        device="cuda",
    )


def sd15_score_as_action() -> Run:
    """Score as Action on SD 1.5, JPEG size, 50 steps of DDIM; --dry-run tries it on a laptop.

    Images per GPU, updates, guidance, learning rate, clip, whitening and beta = 0 as in the
    released code. Not as there: the critic is a small network of latents, not a copy of the reward
    model with the reward of what every state stands for, which costs 50 decodings per image; the
    reward and the prompts; bfloat16.
    """
    run = sd15_ddpo()
    return replace(
        run,
        base=replace(run.base, guidance=7.0),
        algorithm=ScoreAsAction(
            form="ppo",
            beta=0.0,
            design="plain",
            whitening="per_step",
            clip_low=0.22,  # 1.5e-5 x 4 x 64 x 64 = 0.25 nats, as factors
            clip_high=0.28,
            advantage_clip=5.0,
        ),
        batch_size=128,
        group_size=4,
        optim=replace(run.optim, lr=5e-5, mini_batches=2),
    )
