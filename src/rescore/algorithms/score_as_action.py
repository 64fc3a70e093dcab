r"""Score as Action: fine-tuning in continuous time, where the score is the control.

The reverse equation is steered by the network's output, the *action* a_k = a_theta(x_k, t_k). The
reward comes at the end, the KL to the pretrained model is a running cost by Girsanov, and

    J = E[r(x_0)] - beta sum_k KL_k,        V_k(x) = E[r(x_0) - beta sum_{j >= k} KL_j | x_k = x].

Two losses share everything else (T steps, noise first; V_T = r):

- ``ppo``: the clipped surrogate of every step's ratio with the *increment* of the value,
  A_k = V_{k+1} - V_k - beta KL_k, whose sum over a path is r - V_0 - beta sum KL.
- ``score_gradient``: the deterministic policy gradient, -<next state of a_theta, grad V_{k+1}>, for
  any solver, random or not; it asks for no likelihood.

To both, beta KL_k(theta) is added: the running cost depends on the mean action, so its gradient is
not in that of the likelihood.

Source: Zhao, Chen, Zhang, Yao and Tang, ICML 2025, arXiv:2502.01819.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rescore.algorithms.base import Algorithm
from rescore.models.value import Design, ValueCritic, value_critic_for
from rescore.objectives.policy_gradient import clipped_surrogate
from rescore.processes.convert import score_coefficients
from rescore.processes.gaussian import (
    DeterministicTwoStep,
    TwoStep,
    mean,
)
from rescore.sampling.base import Policy
from rescore.sampling.decoder import Decoding, GaussianDecoder
from rescore.sampling.gaussian_policy import At, GaussianPolicy
from rescore.sampling.policy import Models
from rescore.sampling.record import Record, Score
from rescore.sampling.reference import kl_at, path_kls, path_outputs
from rescore.sampling.rng import Rng
from rescore.sampling.slots import some_steps
from rescore.sampling.values import path_slopes, path_values, visited
from rescore.tasks.task import ContinuousTask, Task
from rescore.types import (
    Actions,
    Credited,
    GaussianTrajectory,
    Scored,
    State,
    Terms,
    Trajectory,
)


@dataclass(frozen=True, kw_only=True)
class ScoreAsAction(Algorithm):
    """Continuous-time policy optimisation with a value of noised samples."""

    form: Literal["ppo", "score_gradient"] = "ppo"
    """The loss, see above."""
    beta: float = 0.01
    """Weight of the KL to the pretrained model, reward units per nat; 0 keeps no reference."""
    beta_end: float | None = None
    """``beta`` of the last rollout, reached from ``beta`` in equal steps; None = the same
    throughout."""
    kl: Literal["step", "continuous"] = "step"
    """What KL is: exact of every step that is simulated, which grows as steps become fewer; or the
    rate of Girsanov's theorem held over the step, which hardly depends on their number; over long
    steps it undercounts, and policies find out: for some 25 steps and more."""
    n_steps: int | None = None
    """Steps of each path to train on, drawn at random and weighted by T / n; None = all."""
    design: Design = "cos_sin"
    """Of the critic. All but ``plain`` judge what every state stands for: T rewards per sample."""
    td_lambda: float = 1.0
    """Targets of the critic: 1 = the return from each step on, 0 = one step and the next value."""
    whitening: Literal["none", "global", "per_step"] = "none"
    """``ppo``: advantages less their mean, divided by their standard deviation, over the batch or
    for each step. Biased; ``per_step``, as in the released code, takes the weights of time away.
    beta is divided as well, so that reward and KL keep their proportion."""
    clip_low: float = 0.2
    """``ppo``: the ratio gains nothing below ``1 - clip_low``; of the summed log-probability."""
    clip_high: float = 0.2
    """``ppo``: the ratio gains nothing above ``1 + clip_high``."""
    advantage_clip: float = math.inf
    """``ppo``: advantages beyond this count as this."""
    weighting: Literal["solver", "continuous"] = "solver"
    """``score_gradient``: ``solver`` differentiates the step itself and takes the value's gradient
    at the next state, exact for the chain that is simulated. ``continuous`` is the theorem's
    integral of g^2 <score, grad V> with both at the present state, for every solver."""
    through_score: bool = True
    """``score_gradient``: differentiate hat x_0 in full, through the network, one backward pass per
    step. With the output held, hat x_0 changes by 1 / alpha_t per x, far too much at high noise."""
    proximal: float = 0.0
    """Weight of KL(new || old) of each step, reward units per nat: a soft trust region for several
    updates per rollout."""
    critic_rollouts: int = 1
    """Rollouts that train the critic alone, on paths of the pretrained model."""
    critic_lr: float = 1e-3
    """Learning rate of the critic."""
    critic_epochs: int = 4
    """Passes of the critic over every rollout."""
    critic_batch: int = 256
    """States per step of the critic."""

    citation: ClassVar[str] = """@inproceedings{zhao2025score,
  title     = {Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time
               Reinforcement Learning},
  author    = {Zhao, Hanyang and Chen, Haoxian and Zhang, Ji and Yao, David D. and Tang, Wenpin},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
  note      = {arXiv:2502.01819}
}"""

    @property
    def record(self) -> Record:
        return Record(moves="all", outputs=True)

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0 or self.beta_end is not None

    @property
    def uses_critic(self) -> bool:
        return True

    @property
    def warm_up(self) -> int:
        return self.critic_rollouts

    @property
    def uses_likelihood(self) -> bool:
        return self.form == "ppo"

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
        if isinstance(decoder, GaussianDecoder) and self.form == "ppo" and not decoder.is_random:
            raise ValueError(
                f"score_as_action: {decoder.solver} draws no noise, so its steps have no "
                f"likelihood, which form='ppo' needs; use form='score_gradient', or a random "
                f"solver, such as ddim with eta=1"
            )
        super().check(decoder, group_size, terms)
        if not isinstance(decoder, GaussianDecoder):
            raise ValueError(
                f"score_as_action is for continuous samples; got a {type(decoder).__name__}, "
                f"expected a GaussianDecoder"
            )
        for name in ("beta", "beta_end", "proximal"):
            if not 0 <= (getattr(self, name) or 0.0) < math.inf:
                raise ValueError(
                    f"score_as_action: {name}={getattr(self, name)} must be 0 or more, and finite"
                )
        most = {"clip_low": 1.0, "clip_high": math.inf, "advantage_clip": math.inf}
        for name, largest in most.items():
            if not 0 < getattr(self, name) <= largest:
                raise ValueError(
                    f"score_as_action: {name}={getattr(self, name)}; expected more than 0 and at "
                    f"most {largest:g}, which clips nothing"
                )
        if not 0 < self.critic_lr < math.inf:
            raise ValueError(
                f"score_as_action: critic_lr={self.critic_lr} must be positive, and finite"
            )
        for name in ("critic_rollouts", "critic_epochs", "critic_batch"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"score_as_action: {name}={getattr(self, name)} must be at least 1"
                )
        if not 0 <= self.td_lambda <= 1:
            raise ValueError(f"score_as_action: td_lambda={self.td_lambda} must lie in [0, 1]")
        if self.n_steps is not None and not 1 <= self.n_steps <= decoder.steps:
            raise ValueError(
                f"score_as_action: n_steps={self.n_steps}, but paths have {decoder.steps} steps"
            )
        needs_kl = self.uses_reference or self.proximal != 0
        if self.kl == "step" and needs_kl and not decoder.is_random:
            raise ValueError(
                f"score_as_action: steps of {decoder.solver} have no KL; use kl='continuous', the "
                f"penalty that would be the KL with noise, or beta=0 and proximal=0"
            )
        if decoder.window is not None and "continuous" in (self.kl, self.weighting):
            raise ValueError(
                "score_as_action: steps outside the window follow another equation; with a "
                "window use kl='step' and weighting='solver'"
            )
        looks = self.form == "score_gradient" and self.weighting == "continuous"
        if self.kl == "step" and needs_kl and looks:
            raise ValueError(
                "score_as_action: weighting='continuous' looks at states, so there is no "
                "KL of steps; use kl='continuous' with it"
            )
        if "continuous" in (self.kl, self.weighting) and decoder.solver == "flow_match_stochastic":
            raise ValueError(
                "score_as_action: flow_match_stochastic solves no equation, so there is no rate of "
                "anything; use kl='step' and weighting='solver'"
            )
        if decoder.solver == "heun" and self.weighting == "solver":
            raise ValueError(
                "score_as_action: a step of heun looks at a state in between; use "
                "weighting='continuous'"
            )

    def check_models(self, models: Models) -> None:
        """Refuse to look at a rate where it is infinite.

        Raises:
            ValueError: a start at pure noise where g^2 has no bound.
        """
        policy, instead = _gaussian(models.new), {}
        if self.kl == "continuous" and (self.uses_reference or self.proximal != 0):
            instead["kl"] = "step"
        if self.weighting == "continuous" and self.form == "score_gradient":
            instead["weighting"] = "solver"
        schedule, t = policy.network.schedule, policy.times[:-1]
        if instead and not bool(schedule.g2(t).isfinite().all()):
            asked = " and ".join(f"{name}='continuous'" for name in instead)
            other = " and ".join(f"{name}='{value}'" for name, value in instead.items())
            raise ValueError(
                f"score_as_action: {asked} needs a finite g^2, but that of a "
                f"{type(schedule).__name__} is infinite at t={float(t[0]):g}, where paths start; "
                f"start below it (decoder: t_max, with spacing='linear'), or use {other}"
            )

    def at(self, progress: float) -> ScoreAsAction:
        if self.beta_end is None:
            return self
        return replace(self, beta=self.beta + progress * (self.beta_end - self.beta))

    def critic(self, task: Task, decoder: Decoding, seed: int) -> ValueCritic:
        assert isinstance(task, ContinuousTask) and isinstance(decoder, GaussianDecoder)
        prompts = task.prompts("train", torch.zeros(1, dtype=torch.long))
        return value_critic_for(
            task.shape,
            prompts.inputs,
            n_labels=task.n_labels,
            n_states=1 + decoder.two_step,
            design=self.design,
            reward=None if self.design == "plain" else task.reward.value,
            seed=seed,
        )

    @torch.no_grad()
    def annotate(self, models: Models, scored: Scored, rng: Rng) -> Scored:
        """Draw the steps, and value every state that they leave and reach."""
        policy, path, critic = _gaussian(models.new), _states(scored.trajectory), _critic(models)
        notes: dict[str, Tensor] = {}
        if self.form == "score_gradient" or self.proximal:
            notes["old"] = _said(path)
        if self.n_steps is not None:
            step, weight = some_steps(self._counts(path), self.n_steps, rng)
            scored = replace(scored, step=step, step_weight=weight)
        kl = torch.zeros_like(path.log_prob)
        if models.ref is not None:
            notes["ref"] = path_outputs(_gaussian(models.ref), path)
            kl = path_kls(policy, path, _said(path), notes["ref"], self.kl)
            kl = torch.where(self._counts(path), kl, 0.0)  # nor is it trained elsewhere
        value, skip = path_values(policy, critic, path)
        value = torch.cat([value, scored.reward.to(value)[:, None]], 1)
        notes |= {
            "kl": kl,
            "advantage": value[:, 1:] - value[:, :-1] - self.beta * kl,
            "target": self._targets(value, kl),
        }
        notes |= {} if skip is None else {"skip": skip}
        chosen = {name: _columns(note, scored.step) for name, note in notes.items()}
        earlier = (scored.step - 1).clamp(min=0)
        if isinstance(policy.steps, TwoStep | DeterministicTwoStep):
            for name in {"old", "ref"} & set(notes):
                chosen[f"{name}_before"] = _columns(notes[name], earlier)
        if self.form == "score_gradient":
            chosen["slope"] = path_slopes(
                policy,
                critic,
                path,
                scored.step,
                after=self.weighting == "solver",
                through_network=self.through_score,
            )
        chosen["fitted"] = critic.fitted.expand(scored.step.shape)
        bare = replace(path, output=None)
        return replace(scored, trajectory=bare, notes={**scored.notes, **chosen})

    def credit(self, scored: Scored) -> Credited:
        path = _states(scored.trajectory)
        active = scored.notes["fitted"] >= self.critic_rollouts
        active = active & self._counts(path).gather(1, scored.step)
        weight = torch.where(active, scored.step_weight / len(scored.reward), 0.0)
        if self.form == "score_gradient":
            advantage = torch.ones_like(weight)
            return Credited(**scored.fields(), advantage=advantage, weight=weight)
        advantage, scale = self._whitened(scored.notes["advantage"], scored.step, active)
        advantage = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        fields = {**scored.fields(), "notes": {**scored.notes, "scale": scale}}
        return Credited(**fields, advantage=advantage, weight=weight)

    def fit(self, models: Models, credited: Credited) -> dict[str, float]:
        path, critic, notes = _states(credited.trajectory), _critic(models), credited.notes
        policy, step = _gaussian(models.new), credited.step
        sample = torch.arange(len(step), device=step.device)[:, None].expand_as(step)
        skip, target = notes.get("skip"), notes["target"]
        if skip is None:  # nothing else would tell V at the data end
            step = torch.nn.functional.pad(step, (0, 1), value=path.n_steps)
            sample = torch.cat([sample, sample[:, :1]], 1)
            target = torch.cat([target, credited.reward.to(target)[:, None]], 1)
        sample, step = sample.flatten(), step.flatten()
        explained = critic.fit(
            lambda rows: visited(policy, path, sample[rows], step[rows]),
            None if skip is None else skip.flatten(),
            target.flatten(),
            lr=self.critic_lr,
            epochs=self.critic_epochs,
            batch=self.critic_batch,
        )
        return {"value_explained": explained}

    def loss(self, models: Models, actions: Actions, rng: Rng) -> Terms:
        policy, path, notes = _gaussian(models.new), _states(actions.trajectory), actions.notes
        if self.form == "ppo":
            new = policy.transition(path, actions.step, Score())
            at, scale = new.at, notes["scale"]
            terms = clipped_surrogate(
                new.log_prob,
                actions.log_prob_old,
                actions.advantage,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
            )
        else:
            at = self._look(policy, path, actions.step)
            scale = torch.ones_like(actions.weight)
            terms = self._score_gradient(policy, at, notes)
        loss, metrics = terms.loss, dict(terms.metrics)
        if models.ref is not None:
            kl = kl_at(policy, at, notes["ref"], notes.get("ref_before"), self.kl)
            loss = loss + self.beta * kl / scale
            metrics["kl_new_ref"] = kl.detach()
        if self.proximal:
            moved = kl_at(policy, at, notes["old"], notes.get("old_before"), self.kl)
            loss = loss + self.proximal * moved / scale
        return Terms(loss=loss, metrics=metrics)

    # ---- parts -----------------------------------------------------------------------------------

    def _counts(self, path: GaussianTrajectory) -> Bool[Tensor, "B T"]:
        """Steps that can be trained on: those with noise, or all where neither loss nor KL asks.

        A step without noise has no KL; with a reward, but without its cost, a policy would run away
        there.
        """
        costs = self.kl == "step" and (self.uses_reference or self.proximal != 0)
        return path.acts() if self.form == "ppo" or costs else torch.ones_like(path.acts())

    def _look(self, policy: GaussianPolicy, path: GaussianTrajectory, step: Tensor) -> At:
        if self.weighting == "continuous":
            return policy.now(path, step)
        return policy.at(path, step)

    def _score_gradient(self, policy: GaussianPolicy, at: At, notes: Mapping[str, Tensor]) -> Terms:
        """-<what the policy moves, grad V>; "ratio" is exp -|a - a_old|, 1 at the start."""
        if self.weighting == "solver":
            assert at.step is not None
            moved = mean(at.step, at.x_t, at.a, x_before=at.x_before, a_before=at.a_before)
        else:
            moved = _pull(policy, at)
        gain = _dot(moved, notes["slope"])
        with torch.no_grad():
            apart = at.a - notes["old"].to(at.a)
            ratio = torch.exp(-_dot(apart, apart).sqrt())
        return Terms(loss=-gain, metrics={"ratio": ratio})

    def _targets(
        self, value: Float[Tensor, "B M"], kl: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        """G_k = -beta KL_k + (1 - lambda) V_{k+1} + lambda G_{k+1}, G_T = r."""
        target, columns = value[:, -1], []
        for k in range(kl.shape[1] - 1, -1, -1):
            ahead = (1 - self.td_lambda) * value[:, k + 1] + self.td_lambda * target
            target = ahead - self.beta * kl[:, k]
            columns.append(target)
        return torch.stack(columns[::-1], 1)

    def _whitened(
        self, advantage: Tensor, step: Int[Tensor, "B K"], active: Bool[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
        """Advantages, and what they were divided by."""
        if self.whitening == "none":
            return advantage, torch.ones_like(advantage)
        kind = step if self.whitening == "per_step" else torch.zeros_like(step)
        number = torch.where(active, kind, -1).flatten() + 1
        flat = advantage.flatten().double()

        def average(values: Tensor) -> Tensor:
            size = int(number.max()) + 1
            count = torch.zeros(size, dtype=flat.dtype, device=flat.device)
            count = count.index_add(0, number, torch.ones_like(flat))
            total = torch.zeros_like(count).index_add(0, number, values)
            return (total / count.clamp(min=1))[number]

        centred = flat - average(flat)
        scale = average(centred.square()).sqrt()
        scale = torch.where(scale > 1e-8, scale, 1.0)  # where nothing varies
        white, scale = (centred / scale).to(advantage), scale.to(advantage)
        return white.view_as(advantage), scale.view_as(advantage)


def _pull(policy: GaussianPolicy, at: At) -> State:
    """The integral of (1 + eta^2) / 2 g^2 over the step, times the score; eta = 0 without noise."""
    schedule, network = policy.network.schedule, policy.network
    eta = policy.decoder.noise_eta if policy.decoder.is_random else 0.0
    on_a = score_coefficients(network.prediction, schedule.alpha(at.t), schedule.sigma(at.t))[1]
    weight = (1 + eta**2) / 2 * schedule.g2_integral(at.s, at.t) * on_a
    return weight.to(at.a).view(-1, *(1,) * (at.a.ndim - 1)) * at.a


def _columns(note: Tensor, step: Int[Tensor, "B K"]) -> Tensor:
    """The entries of the chosen steps."""
    return note[torch.arange(len(step), device=step.device)[:, None], step]


def _dot(x: Tensor, y: Tensor) -> Float[Tensor, " N"]:
    return (x * y.to(x)).flatten(1).sum(1)


def _said(path: GaussianTrajectory) -> Float[Tensor, "B T *shape"]:
    assert path.output is not None
    return path.output


def _states(trajectory: Trajectory) -> GaussianTrajectory:
    assert isinstance(trajectory, GaussianTrajectory)
    return trajectory


def _gaussian(policy: Policy) -> GaussianPolicy:
    assert isinstance(policy, GaussianPolicy)
    return policy


def _critic(models: Models) -> ValueCritic:
    assert isinstance(models.critic, ValueCritic)
    return models.critic
