"""Plant classic mistakes in a copy of the source, one at a time: the named test must fail.

Each mistake was made in some public code base for RL on diffusion models, or is one we could make.
The patch is exact text, so a refactoring that moves it makes this test fail loudly, not pass
silently.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """A mistake and the test that catches it."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS: list[Mutation] = [
    Mutation(
        name="scored at temperature 1, sampled at another",
        file="rescore/sampling/discrete.py",
        old="score.score_temperature or decoder.temperature",
        new="1.0",
        test="tests/sampling/test_discrete.py::test_recorded_log_probabilities_and_entropies_by_hand[tokens-random]",
    ),
    Mutation(
        name="mean over tokens instead of sum",
        file="rescore/processes/masked.py",
        old="return torch.where(revealed, log_prob, 0.0).sum(-1)",
        new="return torch.where(revealed, log_prob, 0.0).mean(-1)",
        test="tests/processes/test_masked.py::test_tokens_log_prob_sums_the_revealed_rows",
    ),
    Mutation(
        name="clip bounds swapped",
        file="rescore/objectives/policy_gradient.py",
        old="ratio.clamp(1 - clip_low, 1 + clip_high)",
        new="ratio.clamp(1 - clip_high, 1 + clip_low)",
        test="tests/objectives/test_policy_gradient.py::test_clip_by_hand",
    ),
    Mutation(
        name="maximum of the surrogates",
        file="rescore/objectives/policy_gradient.py",
        old="-torch.minimum(",
        new="-torch.maximum(",
        test="tests/objectives/test_policy_gradient.py::test_clip_by_hand",
    ),
    Mutation(
        name="sign of the advantage flipped twice",
        file="rescore/objectives/policy_gradient.py",
        old="loss = -advantage.detach()",
        new="loss = advantage.detach()",
        test="tests/objectives/test_policy_gradient.py::test_the_score_function_is_differentiable_in_the_log_probability_only",
    ),
    Mutation(
        name="k3 with its difference reversed",
        file="rescore/objectives/divergences.py",
        old="return d.exp() - 1 - d",
        new="return (-d).exp() - 1 + d",
        test="tests/objectives/test_divergences.py::test_expected_gradients[k3]",
    ),
    Mutation(
        name="exact KL averaged over the vocabulary",
        file="rescore/objectives/divergences.py",
        old="return torch.where(rows, (log_p.exp() * gap).sum(-1), 0.0).sum(-1)",
        new="return torch.where(rows, (log_p.exp() * gap).mean(-1), 0.0).sum(-1)",
        test="tests/objectives/test_divergences.py::test_categorical_kl_sums_the_chosen_rows",
    ),
    Mutation(
        name="baseline over the batch, not the group",
        file="rescore/objectives/advantages.py",
        old="returns - total / count\n",
        new="returns - returns.mean()\n",
        test="tests/objectives/test_advantages.py::test_baselines_by_hand",
    ),
    Mutation(
        name="leave-one-out that includes the sample",
        file="rescore/objectives/advantages.py",
        old="centred = centred * (count / (count - 1))",
        new="pass",
        test="tests/objectives/test_advantages.py::test_baselines_by_hand",
    ),
    Mutation(
        name="completion added instead of subtracted",
        file="rescore/objectives/advantages.py",
        old="return own - centre(",
        new="return own + centre(",
        test="tests/objectives/test_advantages.py::test_stepwise_advantages_by_hand",
    ),
    Mutation(
        name="worse than its completion is better",
        file="rescore/objectives/advantages.py",
        old="share * (spread - completion_reward)",
        new="share * (completion_reward - spread)",
        test="tests/objectives/test_advantages.py::test_stepwise_advantages_by_hand",
    ),
    Mutation(
        name="unknown returns counted in the mean",
        file="rescore/objectives/advantages.py",
        old="index_add(0, group, known.double())",
        new="index_add(0, group, torch.ones_like(value))",
        test="tests/objectives/test_advantages.py::test_unknown_returns_take_no_part",
    ),
    Mutation(
        name="missing completions centred as if they earned nothing",
        file="rescore/objectives/advantages.py",
        old="completion_reward, group, baseline, known)",
        new="completion_reward, group, baseline)",
        test="tests/objectives/test_advantages.py"
        "::test_stepwise_advantages_sum_to_zero_in_each_group_and_column",
    ),
    Mutation(
        name="adaptive selection stops one step early",
        file="rescore/objectives/advantages.py",
        old="before = value.cumsum(1) - value",
        new="before = value.cumsum(1)",
        test="tests/objectives/test_advantages.py::test_covering_steps_by_hand",
    ),
    Mutation(
        name="steps of lowest entropy selected",
        file="rescore/sampling/slots.py",
        old='entropy.double() if by == "top" else -entropy.double()',
        new='entropy.double() if by != "top" else -entropy.double()',
        test="tests/sampling/test_slots.py::test_top_and_bottom_are_the_choice_of_hindsight",
    ),
    Mutation(
        name="importance weights left out",
        file="rescore/sampling/slots.py",
        old="weight = self.total[:, None] / (self.n * self.key)",
        new="weight = torch.ones_like(self.key)",
        test="tests/algorithms/test_egspo.py::test_importance_draws_are_weighted_by_one_over_k_q",
    ),
    Mutation(
        name="the later of tied steps kept",
        file="rescore/sampling/slots.py",
        old="better = key[:, None] > self.key.gather(1, worst)",
        new="better = key[:, None] >= self.key.gather(1, worst)",
        test="tests/sampling/test_slots.py::test_ties_go_to_the_earlier_step",
    ),
    Mutation(
        name="the earlier of tied steps makes room",
        file="rescore/sampling/slots.py",
        old="torch.where(lowest, self.step, -2).argmax(1, keepdim=True)",
        new="lowest.int().argmax(1, keepdim=True)",
        test="tests/sampling/test_slots.py::test_ties_go_to_the_earlier_step",
    ),
    Mutation(
        name="exchange with odds instead of a probability",
        file="rescore/sampling/slots.py",
        old="torch.stack([self.total, weight], -1)",
        new="torch.stack([self.total + weight, weight], -1)",
        test="tests/sampling/test_slots.py"
        "::test_importance_draws_with_replacement_in_proportion_to_entropy_plus_delta[1]",
    ),
    Mutation(
        name="importance by the entropy alone",
        file="rescore/sampling/slots.py",
        old="entropy + self.plan.delta",
        new="entropy",
        test="tests/sampling/test_slots.py"
        "::test_importance_draws_with_replacement_in_proportion_to_entropy_plus_delta[1]",
    ),
    Mutation(
        name="completion knows the tokens of its own step",
        file="rescore/sampling/discrete.py",
        old="            slots.offer(k, completion, entropy)\n",
        new="            if completion is not None:\n"
        "                guess = completion.gather(1, rows.position)\n"
        "                drawn = torch.where(revealed, rows.token, guess)\n"
        "                completion = completion.scatter(1, rows.position, drawn)\n"
        "            slots.offer(k, completion, entropy)\n",
        test="tests/sampling/test_slots.py"
        "::test_completions_are_the_argmax_of_the_state_before_the_step",
    ),
    Mutation(
        name="completion of the state after the step",
        file="rescore/sampling/policy.py",
        old="paths.state(step[rows], self.denoiser.mask_id)",
        new="paths.state(step[rows] + 1, self.denoiser.mask_id)",
        test="tests/sampling/test_slots.py"
        "::test_completions_are_those_of_the_policy_at_the_kept_steps[top]",
    ),
    Mutation(
        name="KL rewarded instead of penalised",
        file="rescore/algorithms/egspo.py",
        old="terms.loss + self.beta * kl",
        new="terms.loss - self.beta * kl",
        test="tests/algorithms/test_egspo.py::test_loss_by_hand",
    ),
    Mutation(
        name="lambda does not reach its last value",
        file="rescore/algorithms/egspo.py",
        old="lam = lam * (scored.step + 1)",
        new="lam = lam * scored.step",
        test="tests/algorithms/test_egspo.py::test_lambda_rises_with_the_step",
    ),
    Mutation(
        name="ties broken unlike the sampler",
        file="rescore/processes/masked.py",
        old=(
            "    loses = (confidence < lowest[..., None]) | (\n"
            "        (confidence == lowest[..., None]) & (row > last)[..., None]\n"
            "    )"
        ),
        new="    loses = confidence < lowest[..., None]",
        test="tests/processes/test_masked.py::test_low_confidence_is_the_law_of_the_remasking_rule[identical-1]",
    ),
    Mutation(
        name="choice of positions not scored",
        file="rescore/sampling/discrete.py",
        old='    if decoder.order == "low_confidence":',
        new='    if decoder.order == "nothing":',
        test="tests/sampling/test_discrete.py::test_low_confidence_probabilities_are_those_of_the_samplers_own_rule[2-1.5]",
    ),
    Mutation(
        name="choice of positions scored in full whatever its weight",
        file="rescore/sampling/discrete.py",
        old="score.selection_weight * selection.to(log_prob.dtype)",
        new="selection.to(log_prob.dtype)",
        test="tests/sampling/test_policy.py::test_selection_weight_lies_between_the_two_forms",
    ),
    Mutation(
        name="Plackett-Luce denominator does not shrink",
        file="rescore/processes/masked.py",
        old="remaining = log_weight.flip(-1).logcumsumexp(-1).flip(-1)",
        new="remaining = log_weight.logsumexp(-1, keepdim=True)",
        test="tests/processes/test_masked.py::test_plackett_luce_is_a_law_over_ordered_draws[2]",
    ),
    Mutation(
        name="entropy from another law than the sampling law",
        file="rescore/sampling/discrete.py",
        old="masked.entropy(law.detach()), 0.0).sum(1)",
        new="masked.entropy(masked.token_log_probs(logits).detach()), 0.0).sum(1)",
        test="tests/sampling/test_discrete.py::test_recorded_log_probabilities_and_entropies_by_hand[tokens-random]",
    ),
    Mutation(
        name="state of a step includes its own action",
        file="rescore/types.py",
        old="self.step_of() < step[:, None]",
        new="self.step_of() <= step[:, None]",
        test="tests/test_types.py::test_states_are_rebuilt_from_ranks",
    ),
    Mutation(
        name="old log-probability of a column, not of its step",
        file="rescore/types.py",
        old="self.trajectory.log_prob.gather(1, self.step[:, None]).squeeze(1)",
        new="self.trajectory.log_prob[:, 0]",
        test="tests/test_types.py::test_actions_pick_the_numbers_of_their_pair",
    ),
    Mutation(
        name="padding attended in training, not in sampling",
        file="rescore/sampling/policy.py",
        old="x_t, attend=trajectory.prompts.attend, positions=rows.position",
        new="x_t, positions=rows.position",
        test="tests/sampling/test_policy.py::test_a_replay_of_the_same_shape_is_bitwise_the_record[1-tokens-random]",
    ),
    Mutation(
        name="noise depends on the place in the batch",
        file="rescore/sampling/rng.py",
        old="sample, draw = self.sample_id[:, None], step",
        new="sample, draw = torch.arange(len(where))[:, None], step",
        test="tests/sampling/test_rng.py::test_draws_do_not_depend_on_the_batch",
    ),
    Mutation(
        name="noise rounded to bfloat16",
        file="rescore/sampling/rng.py",
        old="return (bits.double() + 0.5) * 2.0**-52",
        new="return ((bits.double() + 0.5) * 2.0**-52).bfloat16().double()",
        test="tests/sampling/test_rng.py::test_a_diffuse_tail_is_drawn_with_its_mass",
    ),
    Mutation(
        name="guidance without the one in 1 + w",
        file="rescore/models/language.py",
        old="torch.lerp(unconditional, conditional, 1 + self.guidance)",
        new="torch.lerp(unconditional, conditional, self.guidance)",
        test="tests/models/test_language.py::test_guidance_is_its_formula[llada]",
    ),
    Mutation(
        name="Dream's logits not shifted",
        file="rescore/models/layouts.py",
        old='return self.family == "dream"',
        new="return False",
        test="tests/models/test_language.py::test_logits_are_those_of_the_architecture_written_out",
    ),
    Mutation(
        name="adapters merged without their scale",
        file="rescore/models/language_files.py",
        old='layer.get_delta_weight("default")',
        new='layer.get_delta_weight("default") / layer.scaling["default"]',
        test="tests/models/test_language.py"
        "::test_merged_weights_take_the_place_of_the_original[llada]",
    ),
    Mutation(
        name="arithmetic in floats",
        file="rescore/rewards/arithmetic.py",
        old="return Fraction(value)",
        new="return float(value)",
        test="tests/rewards/test_arithmetic.py::test_expressions_by_hand",
    ),
    Mutation(
        name="operations that are not understood accepted",
        file="rescore/rewards/arithmetic.py",
        old="            _check(right, text)\n",
        new="",
        test="tests/rewards/test_arithmetic.py::test_what_is_no_expression_is_refused",
    ),
    Mutation(
        name="first answer block instead of the last",
        file="rescore/rewards/answers.py",
        old='close = text.rfind("</answer>")',
        new='close = text.find("</answer>")',
        test="tests/rewards/test_answers.py::test_the_last_answer_block_is_the_answer",
    ),
    Mutation(
        name="first box instead of the last",
        file="rescore/rewards/answers.py",
        old="reversed(list(_BOX.finditer(text)))",
        new="_BOX.finditer(text)",
        test="tests/rewards/test_answers.py::test_the_last_balanced_box_is_found",
    ),
    Mutation(
        name="judged once, and credited to another sample",
        file="rescore/training/rollout.py",
        old="return row[order], order.argsort()[number]",
        new="return row[order], order[number]",
        test="tests/training/test_rollout.py::test_scores_land_where_they_belong",
    ),
    Mutation(
        name="equal outputs of different groups judged once",
        file="rescore/training/rollout.py",
        old="torch.cat([trajectory.prompts.group[sample, None], outputs], 1)",
        new="torch.cat([trajectory.prompts.group[sample, None] * 0, outputs], 1)",
        test="tests/training/test_rollout.py::test_scores_land_where_they_belong",
    ),
    Mutation(
        name="loss averaged over the micro-batch",
        file="rescore/training/update.py",
        old="weight = actions.weight * (0.0 if idle else run.optim.mini_batches)",
        new="weight = actions.weight * run.optim.mini_batches / len(chunk)",
        test="tests/training/test_update.py::test_the_micro_batch_changes_nothing",
    ),
    Mutation(
        name="every process trains on every pair",
        file="rescore/training/update.py",
        old="mine = pairs[accelerator.process_index :: accelerator.num_processes]",
        new="mine = pairs",
        test="tests/training/test_processes.py::test_two_processes_equal_one_in_float64",
    ),
    Mutation(
        name="same prompts for every seed",
        file="rescore/training/rollout.py",
        old="permutation(size, (seed, 0, epoch))",
        new="permutation(size, (0, epoch))",
        test="tests/training/test_rollout.py"
        "::test_the_prompts_of_a_step_depend_on_seed_and_step_only",
    ),
    Mutation(
        name="averaged weights forgotten on resume",
        file="rescore/training/world.py",
        old='updater.ema.load_state_dict(saved.tensors["ema"])',
        new="pass",
        test="tests/training/test_session.py::test_a_killed_run_resumes_bitwise",
    ),
    Mutation(
        name="best checkpoint pruned",
        file="rescore/training/world.py",
        old="keep = [] if state.best_step is None else [state.best_step]",
        new="keep = []",
        test="tests/training/test_loop.py"
        "::test_the_best_checkpoint_survives_and_the_last_ones_are_kept",
    ),
    Mutation(
        name="path KL of a step instead of the path",
        file="rescore/algorithms/sepo.py",
        old=".mean(1) * trajectory.n_steps",
        new=".mean(1)",
        test="tests/algorithms/test_sepo.py::test_the_path_kl_is_the_sum_over_its_steps",
    ),
    Mutation(
        name="policy trained against a critic that saw nothing",
        file="rescore/algorithms/sepo.py",
        old='active = active & scored.notes["fitted"]',
        new="pass",
        test="tests/algorithms/test_sepo.py::test_the_critic_is_subtracted_before_it_learns",
    ),
    Mutation(
        name="clip that bounds what should grow",
        file="rescore/objectives/score_entropy.py",
        old="torch.minimum(ratio * advantage, clipped * advantage)",
        new="torch.maximum(ratio * advantage, clipped * advantage)",
        test="tests/objectives/test_score_entropy.py::test_coefficients_by_hand",
    ),
    Mutation(
        name="gradient through the importance ratio",
        file="rescore/objectives/score_entropy.py",
        old="ratio, advantage = ratio.detach(), advantage.detach()",
        new="pass",
        test="tests/objectives/test_score_entropy.py::test_no_gradient_flows_through_the_coefficient",
    ),
    Mutation(
        name="gradient through the probabilities of the neighbours",
        file="rescore/objectives/score_entropy.py",
        old="log_s).exp().detach()",
        new="log_s).exp()",
        test="tests/objectives/test_score_entropy.py"
        "::test_the_weights_of_the_joint_form_are_constants",
    ),
    Mutation(
        name="conditional law without the token itself",
        file="rescore/objectives/score_entropy.py",
        old="scatter(-1, x[..., None], 0.0), -1)",
        new="scatter(-1, x[..., None], -torch.inf), -1)",
        test="tests/objectives/test_score_entropy.py"
        "::test_conditional_weights_give_the_pseudo_likelihood",
    ),
    Mutation(
        name="hidden sets of all sizes weighted alike",
        file="rescore/sampling/surrogates.py",
        old="flat, count / size.clamp(min=1))",
        new="flat, torch.ones_like(share))",
        test="tests/sampling/test_surrogates.py::test_a_set_counts_as_e_over_c_times_its_log_probs",
    ),
    Mutation(
        name="antithetic set one position short",
        file="rescore/sampling/surrogates.py",
        old="(place >= c - 1)",
        new="(place >= c)",
        test="tests/sampling/test_surrogates.py"
        "::test_antithetic_sets_are_opposite_ends_of_one_order",
    ),
    Mutation(
        name="importance weight upside down",
        file="rescore/sampling/surrogates.py",
        old="(-back - there)",
        new="(back - there)",
        test="tests/sampling/test_surrogates.py"
        "::test_snis_tends_to_something_else_for_two_positions",
    ),
    Mutation(
        name="corrector that only denoises",
        file="rescore/processes/ctmc.py",
        old="process.forward_rates(x, back.dtype) + back, size",
        new="back, size",
        test="tests/processes/test_ctmc.py::test_corrector_step_is_stationary_up_to_its_size",
    ),
    Mutation(
        name="corrector that never masks",
        file="rescore/processes/ctmc.py",
        old="return back + _per_sample(size, back).clamp(max=1) * falls",
        new="return back",
        test="tests/processes/test_ctmc.py::test_corrector_remasks_and_unmasks",
    ),
    Mutation(
        name="analytic step without the staggered score",
        file="rescore/processes/ctmc.py",
        old="earlier = s - moves * s.sum(-1, keepdim=True)",
        new="earlier = s",
        test="tests/processes/test_ctmc.py::test_analytic_step_is_exact_for_one_token",
    ),
    Mutation(
        name="masks left after the last step",
        file="rescore/processes/ctmc.py",
        old="return total_noise if isinstance(process, Uniform) else math.inf",
        new="return total_noise",
        test="tests/processes/test_ctmc.py::test_denoising_is_exact_for_one_token",
    ),
    Mutation(
        name="given tokens written over",
        file="rescore/sampling/rates.py",
        old="moved = torch.where(prompts.editable, drawn, x)",
        new="moved = drawn",
        test="tests/sampling/test_rates.py::test_what_is_given_stays_after_every_step",
    ),
    Mutation(
        name="given tokens scored",
        file="rescore/sampling/rates.py",
        old="torch.where(editable, gather(probs, token), 1.0)",
        new="gather(probs, token)",
        test="tests/sampling/test_rates.py::test_log_probs_by_hand",
    ),
    Mutation(
        name="a critic that reads padding",
        file="rescore/models/critics.py",
        old="else ~prompts.editable & prompts.attend",
        new="else ~prompts.editable",
        test="tests/models/test_critics.py::test_a_prompt_critic_sees_the_prompt_only",
    ),
]


def run_tests(source: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests against the package in ``source``, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source tree to spoil."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src"


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_classic_mistake_is_caught(mutation: Mutation, source: Path):
    """The named test passes on our source and fails once the mistake is planted."""
    path = source / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.old!r} must occur once in {mutation.file}"
    path.write_text(text.replace(mutation.old, mutation.new))
    result = run_tests(source, mutation.test)
    assert result.returncode == 1, f"the mistake survived {mutation.test}:\n{result.stdout}"
    assert " failed" in result.stdout, result.stdout


@pytest.mark.slow
def test_the_named_tests_pass_without_a_mistake(source: Path):
    """A test that always fails would catch every mistake; and the copy must be what is tested."""
    where = [sys.executable, "-c", "import rescore; print(rescore.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(source)}
    found = subprocess.run(where, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(source))
    tests = sorted({mutation.test for mutation in MUTATIONS})
    result = run_tests(source, *tests)
    assert result.returncode == 0, result.stdout
