"""LLaDA-8B-Instruct on text Sudoku with EGSPO-SA: the paper's setting. Needs the weights and a GPU.

    rescore train llada_sudoku_egspo_sa --task.tokenizer.path FOLDER   # the weights
    rescore train llada_sudoku_egspo_sa --dry-run                      # tiny random weights, a CPU

Where the weights and the tokenizer are is one option. The paper quantises the base
(--base.quantize nf4); here bfloat16 is the default, and docs/language-models.md has a table of what
fits on which card. Never run with the real weights by this project, so no result is stated.
"""

from __future__ import annotations

from rescore.algorithms.egspo import Egspo
from rescore.models.finetune import Lora
from rescore.models.language import ALL_LINEARS
from rescore.sampling.decoder import Decoder
from rescore.tasks.sudoku_text import SudokuText
from rescore.tasks.tokenizers import PretrainedTokenizer
from rescore.training.optim import Optim
from rescore.training.pretrained import Pretrained
from rescore.training.run import Evaluate, Run


def llada_sudoku_egspo_sa() -> Run:
    """EGSPO-SA on LLaDA-8B-Instruct, 4x4 Sudoku in words; --dry-run tries it on a laptop.

    8 of 128 steps, lambda = 0.5, low-confidence order at temperature 0.9, adapters of rank 128 on
    all seven linear layers.
    """
    return Run(
        task=SudokuText(
            tokenizer=PretrainedTokenizer(path="GSAI-ML/LLaDA-8B-Instruct"),
            prompt_length=320,
            completion_length=256,
            prefill="<reasoning>",
        ),
        base=Pretrained(gradient_checkpointing=True, miniature="llada"),
        decoder=Decoder(steps=128, blocks=8, order="low_confidence", temperature=0.9),
        algorithm=Egspo(n_steps=8, lam=0.5),
        steps=1000,
        batch_size=48,
        group_size=8,
        forward_rows=48,
        lora=Lora(rank=128, alpha=64, targets=ALL_LINEARS),
        optim=Optim(
            lr=3e-5, weight_decay=0.1, clip_norm=0.2, warmup=1, mini_batches=2, micro_batch=8
        ),
        evaluate=Evaluate(every=50, n=64, n_test=256, by="cell_accuracy"),
        save_every=50,
        precision="bfloat16",
        device="cuda",
    )
