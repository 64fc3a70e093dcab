"""Dream-7B-Instruct on Countdown with EGSPO-SA. Needs the weights and a GPU.

    rescore train dream_countdown_egspo_sa --task.tokenizer.path FOLDER
    rescore train dream_countdown_egspo_sa --dry-run     # tiny random weights, a CPU

Where the weights and the tokenizer are is one option. Never run with the real weights by this
project, so no result is stated.
"""

from __future__ import annotations

from dataclasses import replace

from rescore.tasks.countdown import Countdown
from rescore.tasks.tokenizers import PretrainedTokenizer
from rescore.training.pretrained import Pretrained
from rescore.training.run import Run
from rescore_recipes.llada import llada_sudoku_egspo_sa as _llada


def dream_countdown_egspo_sa() -> Run:
    """EGSPO-SA on Dream-7B-Instruct, Countdown with three numbers; --dry-run tries it on a laptop.

    The settings of llada_sudoku_egspo_sa.
    """
    run = _llada()
    return replace(
        run,
        task=Countdown(
            tokenizer=PretrainedTokenizer(path="Dream-org/Dream-v0-Instruct-7B"),
            prompt_length=320,
            completion_length=256,
            wording="instructions",
            prefill="<reasoning>",
            reward_weights={"solve_rate": 1.0, "numbers_used": 0.1},
        ),
        base=Pretrained(gradient_checkpointing=True, miniature="dream"),
        evaluate=replace(run.evaluate, by="solve_rate"),
    )
