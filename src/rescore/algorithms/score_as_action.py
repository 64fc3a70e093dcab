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
from rescore.models.value import Design, ValueCritic, coefficients, value_critic_for
from rescore.objectives.policy_gradient import clipped_surrogate
from rescore.processes.convert import convert_prediction, score_coefficients
from rescore.processes.gaussian import (
    DeterministicTwoStep,
    HeunStep,
    TwoStep,
    continuous_kl,
    mean,
    step_kl,
)
from rescore.sampling.base import Policy
from rescore.sampling.chunks import over_rows
from rescore.sampling.decoder import Decoding, GaussianDecoder
from rescore.sampling.gaussian_policy import At, GaussianPolicy
from rescore.sampling.policy import Models
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import Rng
from rescore.sampling.slots import random_steps
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
    rate of Girsanov's theorem over the step, which hardly depends on their number."""
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
        return self.beta != 0 or bool(self.beta_end)

    @property
    def uses_critic(self) -> bool:
        return True

    @property
    def uses_likelihood(self) -> bool:
        return self.form == "ppo"

    def check(self, decoder: Decoding, group_size: int, terms: Sequence[str]) -> None:
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
        for name in ("clip_low", "clip_high", "advantage_clip", "critic_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"score_as_action: {name}={getattr(self, name)} must be positive")
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

    def at(self, progress: float) -> ScoreAsAction:
        if self.beta_end is None:
            return self
        return replace(self, beta=self.beta + progress * (self.beta_end - self.beta))

    def critic(self, task: Task, seed: int) -> ValueCritic:
        assert isinstance(task, ContinuousTask)
        prompts = task.prompts("train", torch.zeros(1, dtype=torch.long))
        return value_critic_for(
            task.shape,
            prompts.inputs,
            n_labels=task.n_labels,
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
            counts = self._counts(path)
            step = random_steps(counts, self.n_steps, rng)
            drawn = step >= 0  # fewer than asked for, where fewer draw noise
            share = counts.sum(1, keepdim=True) / drawn.sum(1, keepdim=True)
            weight = torch.where(drawn, share.to(path.log_prob), 0.0)
            scored = replace(scored, step=step.clamp(min=0), step_weight=weight)
        kl = torch.zeros_like(path.log_prob)
        if models.ref is not None:
            notes["ref"] = _outputs(_gaussian(models.ref), path)
            kl = self._path_kl(policy, path, _said(path), notes["ref"])
            kl = torch.where(self._counts(path), kl, 0.0)  # nor is it trained elsewhere
        value, skip = self._values(policy, critic, path)
        value = torch.cat([value, scored.reward.to(value)[:, None]], 1)
        notes |= {
            "kl": kl,
            "advantage": value[:, 1:] - value[:, :-1] - self.beta * kl,
            "target": self._targets(value, kl),
        }
        notes |= {} if skip is None else {"skip": skip}
        if self.form == "score_gradient":
            notes["slope"] = self._slopes(policy, critic, path)
        chosen = {name: _columns(note, scored.step) for name, note in notes.items()}
        earlier = (scored.step - 1).clamp(min=0)
        if isinstance(policy.steps, TwoStep | DeterministicTwoStep):
            for name in {"old", "ref"} & set(notes):
                chosen[f"{name}_before"] = _columns(notes[name], earlier)
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

    def fit(self, models: Models, credited: Credited) -> None:
        path, critic, notes = _states(credited.trajectory), _critic(models), credited.notes
        policy = _gaussian(models.new)
        sample = torch.arange(len(path.x_0), device=path.x_0.device)[:, None]
        sample = sample.expand(credited.step.shape).flatten()
        step = credited.step.flatten()
        x_t, t = path.path[sample, step], policy.times.to(step.device)[step]
        inputs = {name: value[sample] for name, value in path.prompts.inputs.items()}
        skip = notes["skip"].flatten() if "skip" in notes else None
        target = notes["target"].flatten()
        if skip is None:  # nothing else would tell V at the data end
            end = torch.arange(len(path.x_0), device=step.device)
            x_t, t = torch.cat([x_t, path.x_0]), torch.cat([t, torch.zeros_like(t[: len(end)])])
            inputs = {n: torch.cat([v, path.prompts.inputs[n]]) for n, v in inputs.items()}
            target = torch.cat([target, credited.reward.to(target)])
        generator = torch.Generator().manual_seed(int(critic.fitted))
        critic.fit(
            x_t,
            t,
            inputs,
            skip,
            target,
            lr=self.critic_lr,
            epochs=self.critic_epochs,
            batch=self.critic_batch,
            generator=generator,
        )

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
            kl = self._kl(policy, at, notes["ref"], notes.get("ref_before"))
            loss = loss + self.beta * kl / scale
            metrics["kl_new_ref"] = kl.detach()
        if self.proximal:
            moved = self._kl(policy, at, notes["old"], notes.get("old_before"))
            loss = loss + self.proximal * moved / scale
        return Terms(loss=loss, metrics=metrics)

    # ---- parts -----------------------------------------------------------------------------------

    def _counts(self, path: GaussianTrajectory) -> Bool[Tensor, "B T"]:
        """Steps that can be trained on: those with noise, or all where no likelihood is asked."""
        return path.acts() if self.form == "ppo" else torch.ones_like(path.acts())

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

    def _kl(
        self, policy: GaussianPolicy, at: At, other: State, other_before: State | None
    ) -> Float[Tensor, " N"]:
        """KL(policy || who said ``other``) of each step, in the definition of ``kl``."""
        if self.kl == "continuous":
            return continuous_kl(
                policy.network.schedule,
                at.t,
                at.s,
                at.a,
                other,
                prediction=policy.network.prediction,
                eta=policy.decoder.noise_eta,
            )
        step, random = at.with_density()
        before = {}
        if isinstance(step, TwoStep):
            before = {"a_before": at.a_before, "a_before_ref": other_before}
        return torch.where(random, step_kl(step, at.a, other, **before), 0.0)

    def _path_kl(
        self, policy: GaussianPolicy, path: GaussianTrajectory, said: Tensor, other: Tensor
    ) -> Float[Tensor, "B T"]:
        """``_kl`` of every step of every path, from outputs at all states."""
        columns = []
        times = policy.times.to(said.device)
        for k in range(path.n_steps):
            before = max(k - 1, 0)
            rows = slice(k, k + 1)
            step = None if isinstance(policy.steps, HeunStep) else policy.steps.take(rows)
            at = At(
                step if step is None else step.to(said.device),
                times[rows],
                times[k + 1 : k + 2],
                path.path[:, k],
                said[:, k],
                path.path[:, before],
                said[:, before],
            )
            columns.append(self._kl(policy, at, other[:, k], other[:, before]))
        return torch.stack(columns, 1).to(path.log_prob)

    def _values(
        self, policy: GaussianPolicy, critic: ValueCritic, path: GaussianTrajectory
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"] | None]:
        """V before every step, and r(hat x_0) there unless the critic has no use for it.

        Where c_skip is 0, at the noise end, nothing is judged.
        """
        n_steps, said = path.n_steps, _said(path)
        times = policy.times.to(said.device)
        judged = coefficients(self.design, times)[0][:n_steps] > 1e-6

        def part(rows: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
            sample, k = (rows // n_steps).to(said.device), (rows % n_steps).to(said.device)
            x, given, skip = path.path[sample, k], path.prompts.take(sample), None
            if critic.reward is not None:
                some = judged[k].nonzero()[:, 0]
                hat = _stands_for(policy, said[sample, k][some], x[some], times[k][some])
                seen = critic.reward(policy.finished(hat), given.take(some))
                skip = torch.zeros_like(times[k]).to(x).index_copy(0, some, seen.to(x))
            value = critic.value(x, times[k], given.inputs, skip)
            return value, value if skip is None else skip

        parts = over_rows(part, said.shape[0] * n_steps, at_most=policy.forward_rows)
        value, skip = (torch.cat(column).view(-1, n_steps) for column in zip(*parts, strict=True))
        return value, None if critic.reward is None else skip

    def _slopes(
        self, policy: GaussianPolicy, critic: ValueCritic, path: GaussianTrajectory
    ) -> Float[Tensor, "B T *shape"]:
        """grad V in x, at the state after every step, or before it (``weighting``)."""
        n_steps, said = path.n_steps, _said(path)
        times = policy.times.to(said.device)
        times = torch.where(torch.arange(len(times), device=said.device) == n_steps, 0.0, times)

        def part(rows: Int[Tensor, " n"]) -> Tensor:
            sample, k = (rows // n_steps).to(said.device), (rows % n_steps).to(said.device)
            k = k + (self.weighting == "solver")
            t, given = times[k], path.prompts.take(sample)
            x = path.path[sample, k].requires_grad_()
            skip = None
            if critic.reward is not None:
                output = said[sample, k.clamp(max=n_steps - 1)]
                if self.through_score:
                    output = policy.network.predict(x, t.to(x), given.inputs)
                noisy = torch.where(k < n_steps, t, times[0])  # any time with noise, at the end
                end = (k == n_steps).view(-1, *(1,) * (x.ndim - 1))
                hat = torch.where(end, x, _stands_for(policy, output, x, noisy))
                skip = critic.reward(policy.finished(hat), given)
                if not skip.requires_grad:
                    raise ValueError(
                        f"score_as_action: form='score_gradient' with design='{self.design}' "
                        f"differentiates the reward, but its gradient does not reach the sample "
                        f"(a black box, or a decoder in between); use design='plain'"
                    )
            value = critic.value(x, t, given.inputs, skip)
            (slope,) = torch.autograd.grad(value.sum(), x)
            return slope

        with torch.enable_grad():
            parts = over_rows(part, said.shape[0] * n_steps, at_most=policy.forward_rows)
        return torch.cat(parts).view_as(said)

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
    if not bool(weight.isfinite().all()):
        raise ValueError(
            f"score_as_action: g^2 of {schedule} is infinite at pure noise; start below "
            f"it (t_max), or use weighting='solver'"
        )
    return weight.to(at.a).view(-1, *(1,) * (at.a.ndim - 1)) * at.a


def _stands_for(policy: GaussianPolicy, a: State, x: State, t: Float[Tensor, " N"]) -> State:
    """hat x_0, what the network takes each state for."""
    schedule = policy.network.schedule
    return convert_prediction(
        a, x, schedule.alpha(t), schedule.sigma(t), source=policy.network.prediction, target="x_0"
    )


def _outputs(policy: GaussianPolicy, path: GaussianTrajectory) -> Float[Tensor, "B T *shape"]:
    """What a policy says of every state that is left, a part at a time."""
    n_steps, states = path.n_steps, path.path
    times = policy.times.to(states.device)

    def part(rows: Int[Tensor, " n"]) -> Tensor:
        sample, k = (rows // n_steps).to(states.device), (rows % n_steps).to(states.device)
        inputs = {name: value[sample] for name, value in path.prompts.inputs.items()}
        x = states[sample, k]
        return policy.network.predict(x, times[k].to(x), inputs).to(x.dtype)

    parts = over_rows(part, len(states) * n_steps, at_most=policy.forward_rows)
    return torch.cat(parts).view_as(states[:, :-1])


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
