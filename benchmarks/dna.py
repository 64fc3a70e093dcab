"""Table and frontier of docs/algorithms/sepo.md: methods and KL weights on DNA, rewards matched.

    python benchmarks/dna.py --out runs/dna            # about 70 CPU-minutes; also frontier.svg
    python benchmarks/dna.py --out runs/dna --methods elbo --betas 0 0.01 --seeds 0

Every run asks for the same number of rewards with the same learning rate. Each seed trains its own
bases, which the methods share (the one of uniform noise apart). The checkpoint is chosen on
validation by the oracle that is optimised; everything shown is measured on 512 test samples: the
evaluation oracle, the grammar, statistics beside the most active real sequences, and the bound of
the log-likelihood under the masked base. Runs already in the output directory are kept.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from rescore import cli
from rescore.models.dna import ConvDenoiser
from rescore.rewards.reward import Reward
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.dna import Dna
from rescore.tasks.dna_metrics import log_likelihood_bound
from rescore.training.run import Run
from rescore.training.session import Loading, best_world, build_base
from rescore.training.world import accelerator_for, build
from rescore_recipes import dna

METHODS = {
    "reinforce": dna.dna_reinforce,
    "elbo": dna.dna_sepo,
    "conditional": dna.dna_sepo_uniform,
    "gradient flow": dna.dna_sepo_gf,
}
"""Method to its recipe; "elbo", "conditional" and "gradient flow" are SEPO."""
COMPARED = (0.0, 0.01)
"""KL weights of the methods that have no frontier of their own."""
FRONTIER = ("elbo", "conditional")
"""Methods that are run with every KL weight."""
COLUMNS = (
    "median_activity",
    "median_true_activity",
    "train_activity",
    "kmer_correlation",
    "motif_correlation",
    "log_likelihood",
    "diversity",
    "accessible",
)
N = 512
"""Test samples."""


@dataclass
class Options:
    """What to run."""

    out: Path
    """Run directories, table and plot go here."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of ``METHODS``."""
    betas: tuple[float, ...] = (0.0, 0.01, 0.003, 0.03, 0.1)
    """KL weights; methods other than ``FRONTIER`` take those in ``COMPARED``."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""


def measure(run: Run, masked: ConvDenoiser, directory: Path | None) -> dict[str, float]:
    """Figures of the best checkpoint of a run, or of its base where ``directory`` is None."""
    assert isinstance(run.task, Dna)
    if directory is None:
        accelerator = accelerator_for(run)
        world = build(run, build_base(run, accelerator, print), accelerator)
    else:
        world = best_world(run, directory, Loading(device="cpu", precision="float32"), run.decoder)
    prompts = run.task.prompts("test", torch.arange(N))
    x_0 = world.models.new.sample(prompts, Record(), SampleRng(run.seed, prompts.sample_id)).x_0
    generator = torch.Generator().manual_seed(run.seed)
    likelihood = log_likelihood_bound(masked, x_0, draws=16, generator=generator)
    reward: Reward = run.task.reward
    return {
        **run.task.metrics(x_0),
        "train_activity": reward.terms(x_0, prompts)["activity"].median().item(),
        "log_likelihood": likelihood.median().item(),
    }


def cell(method: str, beta: float, seed: int, out: Path) -> dict[str, float]:
    """Figures of one run, which is made if it is not there."""
    name = f"{method.replace(' ', '_')}-{beta:g}-{seed}"
    kept = out / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    recipe = METHODS[method]
    run = replace(recipe(), seed=seed)
    run = replace(run, algorithm=replace(run.algorithm, beta=beta))
    if not (out / name / "result.json").exists():
        arguments = [recipe.__name__, "--seed", str(seed), "--algorithm.beta", str(beta)]
        again = (out / name / "run.json").exists()
        cli.main(["train", *(["--resume"] if again else [*arguments, "--out"]), str(out / name)])
    masked = masked_base(seed)
    figures = measure(run, masked, out / name)
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").open()]
    figures["network_rows"] = sum(row["network_rows"] for row in rows)
    result = json.loads((out / name / "result.json").read_text())
    figures["cpu_s"] = result["rows"][-1]["cpu_s"]
    kept.write_text(json.dumps(figures, indent=1))
    return figures


def masked_base(seed: int) -> ConvDenoiser:
    """The masked base of a seed, which judges how natural a sequence is."""
    run = replace(dna.dna_reinforce(), seed=seed)
    network = build_base(run, accelerator_for(run), print)
    assert isinstance(network, ConvDenoiser)
    return network


def mean_and_error(values: list[float], digits: int = 2) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def line(label: str, beta: str, cells: list[dict[str, float]]) -> str:
    """A row of the table."""
    values = [mean_and_error([cell[name] for cell in cells]) for name in COLUMNS]
    cost = "" if "cpu_s" not in cells[0] else f"{statistics.mean(c['cpu_s'] for c in cells):.0f}"
    rows = "" if not cost else f"{statistics.mean(c['network_rows'] for c in cells):,.0f}"
    return f"| {label} | {beta} | {' | '.join(values)} | {cost} | {rows} |"


def plot(options: Options, cells: dict[tuple[str, float], list[dict[str, float]]]) -> None:
    """Write ``frontier.svg``: activity against naturalness, a point per KL weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    views = (
        ("log_likelihood", "median log-likelihood bound under the base, nats"),
        ("kmer_correlation", "3-mer correlation with the most active real sequences"),
    )
    for panel, (name, label) in zip(panels, views, strict=True):
        for method in options.methods:
            betas = sorted(beta for name, beta in cells if name == method)
            rows = [cells[method, beta] for beta in betas]
            x = [statistics.mean(cell[name] for cell in row) for row in rows]
            y = [statistics.mean(cell["median_activity"] for cell in row) for row in rows]
            panel.plot(x, y, marker="o", markersize=3, label=method)
            for beta, at, height in zip(betas, x, y, strict=True):
                panel.annotate(f"{beta:g}", (at, height), fontsize=6, alpha=0.7)
        panel.set(xlabel=label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="median activity, evaluation oracle")
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(options.out / "frontier.svg")


def main(options: Options) -> None:
    """Run what is missing, print the table as Markdown and draw the frontier."""
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [
        f"| method | beta | {' | '.join(COLUMNS)} | CPU-s | network rows |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for label, recipe in (
        ("masked base", dna.dna_reinforce),
        ("uniform base", dna.dna_sepo_uniform),
    ):
        runs = [replace(recipe(), seed=seed) for seed in options.seeds]
        lines.append(line(label, "", [measure(run, masked_base(run.seed), None) for run in runs]))
    cells = {}
    for beta in options.betas:
        for method in options.methods:
            if method not in FRONTIER and beta not in COMPARED:
                continue
            cells[method, beta] = [cell(method, beta, seed, options.out) for seed in options.seeds]
            lines.append(line(method, f"{beta:g}", cells[method, beta]))
            print(lines[-1], flush=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(options, cells)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
