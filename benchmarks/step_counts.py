"""Step-count freedom for docs/algorithms/score-as-action.md: train at some steps, use others.

    python benchmarks/step_counts.py --out runs/steps      # about 36 CPU-minutes; also steps.svg
    python benchmarks/step_counts.py --out runs/steps --methods DDPO --trained 5 --seeds 0

The task is the mixture whose optimum is known. Every policy is trained for the same number of
rollouts with one random solver and evaluated with it at other numbers of steps, and with solvers
without noise. J = E[r] - beta KL with the KL of paths in continuous time, its rate held over every
step: it means the same for every solver, and at many steps J is at most J* = .350. Reported beside
it: the KL of paths as they were simulated, exact for every step (steps without noise count for
nothing), and the KL of the law of the samples to the exact mixture, which contains the error of the
solver; it is estimated from distances to nearest neighbours.

DDPO divides rewards by their standard deviation, .66 at the optimum, so its beta is 1 / .66. Score
as Action takes the rate of the KL in continuous time, and in another row that of the simulated
steps, as the others do. Cells already in the output directory are kept.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from scipy.spatial import KDTree
from scipy.special import digamma
from torch import Tensor

from rescore.algorithms.base import Algorithm
from rescore.algorithms.ddpo import Ddpo
from rescore.algorithms.dpok import Dpok
from rescore.algorithms.score_as_action import ScoreAsAction
from rescore.evaluation.path_kl import path_kl
from rescore.models.mixture import GaussianMixture, MixtureNetwork
from rescore.sampling.decoder import GaussianDecoder, Solver
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.tasks.mixture import THREE_MODES, optimum
from rescore.training.mixture import MixtureBase
from rescore.training.rollout import rollout
from rescore.training.run import Run
from rescore.training.session import build_base
from rescore.training.update import update
from rescore.training.world import accelerator_for, build
from rescore_recipes.mixture import mixture_score_as_action

BETA = 1.0
SHOWN = (-0.1, 0.8)
"""J in the plot; what fails lies below."""
METHODS: dict[str, Algorithm] = {
    "Score as Action": ScoreAsAction(
        beta=BETA, kl="continuous", critic_batch=1024, critic_epochs=2
    ),
    "the same, KL of steps": ScoreAsAction(beta=BETA, critic_batch=1024, critic_epochs=2),
    "DDPO": Ddpo(statistics="batch", beta=BETA / 0.66),
    "DPOK": Dpok(beta=BETA, critic_batch=1024, critic_epochs=2),
}
SOLVERS: tuple[Solver, ...] = ("ddim", "dpm_solver_2m_sde")
"""Of training."""
EVALUATED = (2, 5, 10, 25, 50, 200)
"""Steps of the solver of training."""
WITHOUT_NOISE: tuple[Solver, ...] = ("ddim_ode", "dpm_solver_2m", "heun")
"""Other solvers of evaluation,"""
EVALUATED_WITHOUT = (5, 10, 25)
"""and their steps."""
N = 4096
"""Samples of every evaluation, from the same noise for every policy."""
NEIGHBOUR = 4
"""The nearest neighbour whose distance is looked at."""


@dataclass
class Options:
    """What to run."""

    out: Path
    """Cells, table and plot go here."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of ``METHODS``."""
    solvers: tuple[Solver, ...] = SOLVERS
    """Random solvers to train with."""
    trained: tuple[int, ...] = (5, 10, 25, 50)
    """Steps in training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    rollouts: int = 150
    """Of every run, 512 samples each."""


def trained(run: Run) -> MixtureNetwork:
    """The network of a run after its last rollout."""
    accelerator = accelerator_for(run)
    world = build(run, build_base(run, accelerator, print), accelerator)
    for step in range(run.steps):
        credited = run.algorithm.credit(rollout(world, step)[0])
        run.algorithm.fit(world.models, credited)
        update(world, credited, step)
    assert isinstance(world.module, MixtureNetwork)
    return world.module


def exact(mixture: GaussianMixture) -> MixtureNetwork:
    """The network that generates a mixture."""
    base, generator = MixtureBase(), torch.Generator().manual_seed(0)
    return MixtureNetwork(
        mixture, schedule=base.schedule, prediction="score", width=1, generator=generator
    )


def sample_kl(x_0: Float[Tensor, "n D"], mixture: GaussianMixture) -> float:
    """KL(law of the samples || mixture), nats, from an estimate of the entropy of the samples.

    H = psi(n) - psi(k) + log(volume of the unit ball) + D E[log distance to the k-th neighbour],
    by Kozachenko and Leonenko 1987.
    """
    points = x_0.double().numpy()
    n, d = points.shape
    distance = KDTree(points).query(points, k=NEIGHBOUR + 1)[0][:, -1]
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    entropy = digamma(n) - digamma(NEIGHBOUR) + ball + d * float(np.log(distance).mean())
    log_density = mixture.log_density(MixtureBase().schedule, x_0.double(), torch.zeros(n))
    return float(-entropy - log_density.mean())


@torch.no_grad()
def measure(network: MixtureNetwork, decoder: GaussianDecoder) -> dict[str, float]:
    """Reward, J and the KLs of a policy."""
    index = torch.arange(N)
    prompts = THREE_MODES.prompts("test", index)
    policy = GaussianPolicy(network, decoder, forward_rows=N)
    path = policy.sample(prompts, Record(moves="all", outputs=True), SampleRng(1, index))
    reward = float(THREE_MODES.judge(path.x_0.double(), prompts).mean())
    reference = GaussianPolicy(exact(THREE_MODES.mixture), decoder, forward_rows=N)
    kl = float(path_kl(reference, path, "continuous").mean())
    figures = {"reward": reward, "kl": kl, "objective": reward - BETA * kl}
    figures["sample_kl"] = sample_kl(path.x_0, THREE_MODES.mixture)
    if decoder.is_random:
        figures["step_kl"] = float(path_kl(reference, path).mean())
    return figures


def evaluated(network: MixtureNetwork, solver: Solver) -> dict[str, dict[str, float]]:
    """Figures by solver and number of steps."""
    decoders = [GaussianDecoder(steps=n, solver=solver) for n in EVALUATED]
    for other in WITHOUT_NOISE:
        decoders += [GaussianDecoder(steps=n, solver=other) for n in EVALUATED_WITHOUT]
    return {f"{way.solver} {way.steps}": measure(network, way) for way in decoders}


def cell(method: str, solver: Solver, steps: int, seed: int, options: Options) -> dict[str, Any]:
    """One policy, evaluated; trained if it is not there."""
    name = f"{method.replace(' ', '_')}-{solver}-{steps}-{seed}.json"
    kept = options.out / name
    if kept.exists():
        return json.loads(kept.read_text())
    run = replace(
        mixture_score_as_action(),
        algorithm=METHODS[method],
        decoder=GaussianDecoder(steps=steps, solver=solver),
        steps=options.rollouts,
        seed=seed,
    )
    clock = time.process_time()
    network = trained(run)
    between = time.process_time()
    figures: dict[str, Any] = {"evaluated": evaluated(network, solver)}
    figures |= {"train_cpu_s": between - clock, "evaluate_cpu_s": time.process_time() - between}
    kept.write_text(json.dumps(figures, indent=1))
    return figures


def known(mixture: GaussianMixture, solver: Solver, name: str, out: Path) -> dict[str, Any]:
    """As ``cell``, of a policy that is known."""
    kept = out / f"{name}-{solver}.json"
    if not kept.exists():
        kept.write_text(json.dumps({"evaluated": evaluated(exact(mixture), solver)}, indent=1))
    return json.loads(kept.read_text())


def mean_and_error(cells: Sequence[dict[str, Any]], way: str, what: str) -> str:
    """Mean and standard error over seeds."""
    values = [cell["evaluated"][way][what] for cell in cells]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f}" + (f" ± {error:.3f}" if len(values) > 1 else "")


def row(label: str, solver: Solver, steps: str, cells: Sequence[dict[str, Any]]) -> str:
    """A row of the table."""
    ways = [f"{solver} {n}" for n in EVALUATED] + [f"{s} 25" for s in WITHOUT_NOISE]
    figures = [mean_and_error(cells, way, "objective") for way in ways]
    figures += [
        mean_and_error(cells, f"{solver} 25", what)
        for what in ("reward", "kl", "step_kl", "sample_kl")
    ]
    return f"| {label} | {solver} | {steps} | {' | '.join(figures)} |"


def plot(options: Options, table: dict[tuple[str, Solver, int], list[dict[str, Any]]]) -> None:
    """Write ``steps.svg``: J against the steps of evaluation, a line per steps of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n_rows, n_columns = len(options.solvers), len(options.methods)
    size = (3.2 * n_columns, 2.7 * n_rows)
    figure, panels = pyplot.subplots(
        n_rows, n_columns, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    best = optimum(THREE_MODES, beta=BETA).mixture
    for solver, line in zip(options.solvers, panels, strict=True):
        star = known(best, solver, "optimum", options.out)["evaluated"]
        for method, panel in zip(options.methods, line, strict=True):
            for steps in options.trained:
                cells = table[method, solver, steps]
                y = [
                    [cell["evaluated"][f"{solver} {n}"]["objective"] for cell in cells]
                    for n in EVALUATED
                ]
                mean = [statistics.mean(values) for values in y]
                low, high = ([limit(values) for values in y] for limit in (min, max))
                panel.plot(EVALUATED, mean, marker="o", markersize=3, label=f"trained at {steps}")
                panel.fill_between(EVALUATED, low, high, alpha=0.15)
            at_star = [star[f"{solver} {n}"]["objective"] for n in EVALUATED]
            panel.plot(EVALUATED, at_star, color="black", linestyle="--", label="optimal control")
            panel.set(title=f"{method}, {solver.replace('_', ' ')}", xscale="log")
            panel.set_xticks(EVALUATED, [str(n) for n in EVALUATED])
            panel.minorticks_off()
            panel.title.set_size(9)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set(ylabel="E[r] - beta KL")
    for panel in panels[-1]:
        panel.set(xlabel="steps in evaluation")
    panels[0][0].set_ylim(*SHOWN)
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(options.out / "steps.svg")


def main(options: Options) -> None:
    """Run what is missing, print the table as Markdown and draw the plot."""
    options.out.mkdir(parents=True, exist_ok=True)
    heads = [f"J at {n}" for n in EVALUATED] + [f"J, {s} at 25" for s in WITHOUT_NOISE]
    heads += ["reward at 25", "KL at 25", "KL of steps at 25", "KL of samples at 25"]
    lines = [
        f"| method | solver | trained at | {' | '.join(heads)} |",
        "|---" * (len(heads) + 3) + "|",
    ]
    best = optimum(THREE_MODES, beta=BETA).mixture
    table = {}
    for solver in options.solvers:
        for label, mixture in (("pretrained", THREE_MODES.mixture), ("optimum", best)):
            lines.append(row(label, solver, "", [known(mixture, solver, label, options.out)]))
        for method in options.methods:
            for steps in options.trained:
                cells = [cell(method, solver, steps, seed, options) for seed in options.seeds]
                table[method, solver, steps] = cells
                lines.append(row(method, solver, str(steps), cells))
                print(lines[-1], flush=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(options, table)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
