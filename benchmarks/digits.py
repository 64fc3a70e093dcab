"""Table and figures of docs/algorithms/score-as-action.md: methods on digits, samples matched.

    python benchmarks/digits.py --out runs/digits      # about 70 CPU-minutes on one core
    python benchmarks/digits.py --out runs/digits --methods A DDPO --seeds 0 --lengths

Every run draws the same number of samples. Each seed trains its own base, which the methods share.
The checkpoint is chosen on validation by the reward, which is log p(3 | x) of one classifier;
everything shown is measured on 640 test samples, all but reward and KL by the other classifier.
``bound`` is Bayes' rule on base samples, each counting for its p(3 | x): no policy can do better,
and few Gaussian steps of given variance do not reach it. ``table.md`` has the methods at 20 steps,
``lengths.md`` policies trained at 5 and 25 steps and decoded with others, ``frontier.svg`` and
``lengths.svg`` show the two, ``before.png`` and ``<method>.png`` samples on the same noise. What is
already in the output directory is kept.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from rescore import cli
from rescore.evaluation.path_kl import path_kl
from rescore.sampling.decoder import GaussianDecoder
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.digits import Digits
from rescore.training.run import Run
from rescore.training.session import Loading, best_world, build_base
from rescore.training.world import accelerator_for, build
from rescore.types import GaussianTrajectory
from rescore_recipes import digits

METHODS = {
    "A": digits.digits_score_as_action,
    "B": digits.digits_score_as_action_b,
    "DDPO": digits.digits_ddpo,
    "DPOK": digits.digits_dpok,
}
"""Method to its recipe; A and B are the two losses of Score as Action."""
DECODED = (2, 5, 10, 25, 50, 200)
"""Steps that policies trained at ``lengths`` are decoded with."""
COLUMNS = (
    "reward",
    "kl",
    "objective",
    "accuracy",
    "log_prob",
    "frechet",
    "frechet_floor",
    "diversity",
    "real_diversity",
    "class_entropy",
)
N = 640
"""Test samples."""


@dataclass
class Options:
    """What to run."""

    out: Path
    """Run directories, tables and figures go here."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of ``METHODS``."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    lengths: tuple[int, ...] = (5, 25)
    """Numbers of steps that the methods are also trained at; empty: none."""


def base_of(run: Run) -> GaussianPolicy:
    """The pretrained policy of a run."""
    accelerator = accelerator_for(run)
    policy = build(run, build_base(run, accelerator, print), accelerator).models.new
    assert isinstance(policy, GaussianPolicy)
    return policy


def best_of(run: Run, directory: Path) -> GaussianPolicy:
    """The policy of the best checkpoint of a run."""
    loading = Loading(device="cpu", precision="float32")
    policy = best_world(run, directory, loading, run.decoder).models.new
    assert isinstance(policy, GaussianPolicy)
    return policy


def sampled(run: Run, policy: GaussianPolicy) -> GaussianTrajectory:
    """Paths of the test prompts, on the same noise for every policy."""
    prompts = run.task.prompts("test", torch.arange(N))
    record = Record(moves="all", outputs=True)
    return policy.sample(prompts, record, SampleRng(run.seed, prompts.sample_id))


def measure(run: Run, policy: GaussianPolicy, ref: GaussianPolicy) -> dict[str, float]:
    """Figures of a policy, decoded as it is."""
    assert isinstance(run.task, Digits)
    path = sampled(run, policy)
    figures = run.task.metrics(path.x_0, path.prompts)
    reward = run.task.reward.terms(path.x_0, path.prompts)["log_prob"].mean().item()
    kl = path_kl(ref, path).mean().item() if policy.decoder.is_random else float("nan")
    return {"reward": reward, "kl": kl, "objective": reward - kl, **figures}


def bound(run: Run) -> dict[str, float]:
    """What the pretrained law given the classifier's word earns, estimated on base samples."""
    path = sampled(run, base_of(run))
    log_prob = run.task.reward.terms(path.x_0, path.prompts)["log_prob"].double()
    share = log_prob.exp().mean().log().item()
    reward = (log_prob.softmax(0) * log_prob).sum().item()
    return {"reward": reward, "kl": reward - share, "objective": share}


def cell(method: str, steps: int, seed: int, out: Path) -> dict[str, dict[str, float]]:
    """Figures of one run, which is made if it is not there, by how it is decoded."""
    name = f"{method}-{steps}-{seed}"
    kept = out / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    recipe = METHODS[method]
    run = replace(recipe(), seed=seed, decoder=GaussianDecoder(steps=steps))
    if not (out / name / "result.json").exists():
        where = f"{digits.__file__}:{recipe.__name__}"
        arguments = [where, "--seed", str(seed), "--decoder.steps", str(steps), "--out"]
        again = (out / name / "run.json").exists()
        cli.main(["train", *(["--resume"] if again else arguments), str(out / name)])
    policy, ref = best_of(run, out / name), base_of(run)
    decoders = {"as trained": run.decoder}
    if steps != recipe().decoder.steps:
        decoders |= {str(n): GaussianDecoder(steps=n) for n in DECODED}
        decoders["ODE"] = GaussianDecoder(steps=25, solver="ddim_ode")
    figures = {
        label: measure(run, replace(policy, decoder=decoder), replace(ref, decoder=decoder))
        for label, decoder in decoders.items()
    }
    result = json.loads((out / name / "result.json").read_text())
    figures["as trained"]["cpu_s"] = result["rows"][-1]["cpu_s"]
    kept.write_text(json.dumps(figures, indent=1))
    return figures


def mean_and_error(values: list[float], digits: int = 2) -> str:
    """Mean and standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def line(label: str, cells: list[dict[str, float]]) -> str:
    """A row of the table; what was not measured stays empty."""
    values = [
        mean_and_error([cell[name] for cell in cells]) if name in cells[0] else ""
        for name in (*COLUMNS, "cpu_s")
    ]
    return f"| {label} | {' | '.join(values)} |"


def compare(options: Options) -> None:
    """Write ``table.md``, ``frontier.svg`` and the samples."""
    lines = [
        f"| method | {' | '.join(COLUMNS)} | CPU-s |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    runs = [replace(digits.digits_score_as_action(), seed=seed) for seed in options.seeds]
    bases = [base_of(run) for run in runs]
    before = [measure(run, base, base) for run, base in zip(runs, bases, strict=True)]
    best = [bound(run) for run in runs]
    lines += [line("base", before), line("bound", best)]
    steps = runs[0].decoder.steps
    for method in options.methods:
        cells = [cell(method, steps, seed, options.out)["as trained"] for seed in options.seeds]
        lines.append(line(method, cells))
        print(lines[-1], flush=True)
        samples = options.out / f"{method}-{steps}-{options.seeds[0]}" / "samples"
        shutil.copy(samples / "before.png", options.out / "before.png")
        shutil.copy(samples / "after.png", options.out / f"{method}.png")
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot_frontier(options, steps, best)


def course(
    method: str, directory: Path, steps: int, width: int = 5
) -> tuple[list[float], list[float]]:
    """KL of whole paths and reward of the rollouts of a run, means over ``width`` of them.

    The log has the mean KL of the trained steps. The last draws no noise and has none: methods with
    a likelihood leave it out.
    """
    trained = steps - METHODS[method]().algorithm.uses_likelihood
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    rows = [row for row in rows if "kl_new_ref" in row]
    blocks = [rows[i : i + width] for i in range(0, len(rows) - width + 1, width)]
    kl = [trained * statistics.mean(row["kl_new_ref"] for row in block) for block in blocks]
    return kl, [statistics.mean(row["reward"] for row in block) for block in blocks]


def plot_frontier(options: Options, steps: int, best: list[dict[str, float]]) -> None:
    """Write ``frontier.svg``: reward against KL in the course of training."""
    pyplot = matplotlib_pyplot()
    figure, panel = pyplot.subplots(figsize=(5.4, 4.0))
    for number, method in enumerate(options.methods):
        for seed in options.seeds:
            kl, reward = course(method, options.out / f"{method}-{steps}-{seed}", steps)
            label = method if seed == options.seeds[0] else None
            panel.plot(kl, reward, color=f"C{number}", alpha=0.7, linewidth=1, label=label)
            panel.plot(kl[-1:], reward[-1:], "o", color=f"C{number}", markersize=4)
    x, y = (statistics.mean(row[name] for row in best) for name in ("kl", "reward"))
    panel.plot([x], [y], "k*", markersize=9, label="bound")
    panel.set(xlabel="KL to the base, nats per path", ylabel="log p(3 | x), training classifier")
    panel.legend(frameon=False, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(options.out / "frontier.svg")


def free_lengths(options: Options) -> None:
    """Write ``lengths.md`` and ``lengths.svg``: reward by steps of training and of decoding."""
    shown = [*map(str, DECODED), "ODE"]
    lines = [
        f"| method | trained at | {' | '.join(shown)} |",
        "|---" * (len(shown) + 2) + "|",
    ]
    pyplot, n_methods = matplotlib_pyplot(), len(options.methods)
    figure, panels = pyplot.subplots(
        1, n_methods, figsize=(3.0 * n_methods, 3.2), sharey=True, squeeze=False
    )
    for panel, method in zip(panels[0], options.methods, strict=True):
        for steps in options.lengths:
            cells = [cell(method, steps, seed, options.out) for seed in options.seeds]
            rewards = [[cell[label]["reward"] for cell in cells] for label in shown]
            values = [mean_and_error(row) for row in rewards]
            lines.append(f"| {method} | {steps} | {' | '.join(values)} |")
            print(lines[-1], flush=True)
            means = [statistics.mean(row) for row in rewards]
            (drawn,) = panel.plot(DECODED, means[:-1], marker="o", markersize=3, label=f"{steps}")
            panel.axhline(means[-1], color=drawn.get_color(), linestyle=":", linewidth=1)
        panel.set(xscale="log", xticks=DECODED, xticklabels=DECODED, title=method)
        panel.set(xlabel="steps of decoding (dotted: ODE)")
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set(ylabel="log p(3 | x), training classifier")
    panels[0][0].legend(frameon=False, fontsize=8, title="trained at")
    figure.tight_layout()
    figure.savefig(options.out / "lengths.svg")
    (options.out / "lengths.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def matplotlib_pyplot():
    """pyplot without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main(options: Options) -> None:
    """Run what is missing and write the tables and figures."""
    options.out.mkdir(parents=True, exist_ok=True)
    compare(options)
    if options.lengths:
        free_lengths(options)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
