"""How many rows of LLaDA-8B fit on a card: memory of adapter training, term by term.

    python benchmarks/llada_memory.py --length 456 --positions 2

A computation, not a measurement on a GPU. With width d, MLP width m, N blocks, H heads, V tokens,
rank r, L positions per row and R of them sent through the vocabulary head, in bytes:

- weights, bfloat16: 2 (2 V d + N (4 d^2 + 3 d m + 2 d) + d)
- weights, nf4: the linear layers of the blocks take 4 bits, an 8-bit scale per 64 weights and a
  32-bit one per 64 * 256, so 4.127 / 8 each; embeddings, head and norms stay in bfloat16, and one
  MLP layer at a time is expanded: 2 d m more
- adapters: P = N r (4 * 2 d + 3 (d + m)) numbers on all seven linear layers; float32 weight,
  gradient and two moments of Adam make 16 P, their bfloat16 copies under autocast 2 P more
- activations of a block, per position: 28 d + 8 m + 14 r + 4 H + 8. Both norms keep a float32 input
  (8 d) and the inverse of its size (8), the adapters' seven inputs 12 d + 2 m and hidden values
  14 r, attention q, k, v and output 8 d with one float32 per head 4 H, SwiGLU 6 m. This is what
  autograd saves for one block under bfloat16 autocast, counted with saved_tensors_hooks on a small
  Llama. Times N L per row
- with gradient checkpointing: the input of each block, 2 d N L per row, and one block at a time as
  above
- gradients inside the block that is being differentiated: at most its activations once more
- logits, per row of R positions: bfloat16, float32, log-softmax in float32 and the gradients of the
  last and the first, (2 + 4 + 4 + 4 + 2) R V
- reserve: CUDA context, workspaces and fragmentation; a guess

The policy sends only the positions that a step reveals through the head while training; sampling
needs every masked position, but no gradient: (2 + 4 + 4) R V with R the completion's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

D, M, BLOCKS, HEADS, VOCAB = 4096, 12288, 32, 32, 126464
GIB = 2**30

Storage = Literal["bfloat16", "nf4"]


@dataclass(frozen=True)
class Options:
    """What is trained, and on what."""

    length: int = 456
    """L: prompt and completion columns; 200 + 256 by default."""
    positions: int = 2
    """R: tokens revealed per trained step, 256 in 128 steps by default."""
    rank: int = 128
    """r of the adapters on all seven linear layers."""
    cards: tuple[int, ...] = (24, 48, 80)
    """Memory of each card, GiB."""
    reserve: float = 1.5
    """GiB left to the driver, workspaces and fragmentation."""


def weight_bytes(storage: Storage) -> float:
    """The frozen weights."""
    linear = BLOCKS * (4 * D * D + 3 * D * M)
    rest = 2 * VOCAB * D + BLOCKS * 2 * D + D
    if storage == "bfloat16":
        return 2 * (linear + rest)
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    return linear * bits / 8 + 2 * rest + 2 * D * M


def adapter_numbers(rank: int) -> int:
    """P: entries of all A and B."""
    return BLOCKS * rank * (4 * 2 * D + 3 * (D + M))


def row_bytes(options: Options, checkpointing: bool) -> float:
    """Activations that grow with every row."""
    block = options.length * (28 * D + 8 * M + 14 * options.rank + 4 * HEADS + 8)
    if checkpointing:
        return BLOCKS * 2 * D * options.length + 2 * block
    return (BLOCKS + 1) * block


def logit_bytes(options: Options) -> float:
    """Logits of one row and what is computed from them."""
    return 16 * options.positions * VOCAB


def table(options: Options) -> str:
    """One line per storage and way of keeping activations, as Markdown."""
    adapters = 18 * adapter_numbers(options.rank)
    lines = [
        f"LLaDA-8B, {options.length} positions per row, {options.positions} through the head, "
        f"adapters of rank {options.rank} on all seven linear layers "
        f"({adapter_numbers(options.rank) / 1e6:.1f} M). Memory in GiB.",
        "",
        "| stored as | checkpointing | weights | adapters, Adam | activations per row | "
        "logits per row | " + " | ".join(f"rows on {card} GiB" for card in options.cards) + " |",
        "|" + "---|" * (6 + len(options.cards)),
    ]
    storages: tuple[Storage, ...] = ("bfloat16", "nf4")
    for storage in storages:
        for checkpointing in (False, True):
            fixed = weight_bytes(storage) + adapters + options.reserve * GIB
            row = row_bytes(options, checkpointing) + logit_bytes(options)
            rows = [max(0, int((card * GIB - fixed) // row)) for card in options.cards]
            parts = [weight_bytes(storage), adapters, row_bytes(options, checkpointing)]
            numbers = [f"{part / GIB:.3f}" for part in (*parts, logit_bytes(options))]
            cells = [storage, "yes" if checkpointing else "no", *numbers, *map(str, rows)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(tyro.cli(Options)))
