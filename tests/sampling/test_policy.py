"""Replaying recorded paths: the sampler's own numbers, whatever the batch, with gradients."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rescore.models.denoiser import Denoiser
from rescore.models.tiny import MlpDenoiser
from rescore.processes import masked
from rescore.sampling.decoder import Decoder
from rescore.sampling.policy import MaskedPolicy
from rescore.sampling.record import Record, Score
from rescore.sampling.rng import SampleRng
from rescore.types import MaskedTrajectory, Prompts

V, L, T, TAU = 3, 7, 4, 0.7
every_order = pytest.mark.parametrize(
    "order",
    [
        *("random", "left_to_right", "max_prob"),
        *("low_confidence", "soft_low_confidence", "plackett_luce"),
    ],
)
every_form = pytest.mark.parametrize("form", ["tokens", "tokens_and_selection"])
every_blocks = pytest.mark.parametrize("blocks", [1, 2])


def boards() -> Prompts:
    """Blank, prompt and completion, one blank, padded: different numbers revealed in the same step.

    What is given lies outside the vocabulary, as prompts and padding of a language model may.
    """
    first, last = torch.tensor([[0], [2], [3], [1]]), torch.tensor([[6], [6], [3], [4]])
    editable = (torch.arange(L) >= first) & (torch.arange(L) <= last)
    attend = torch.ones_like(editable)
    attend[3, 5:] = attend[3, 0] = attend[1, 0] = False
    tokens = torch.where(editable, V, torch.where(attend, 1, 9))
    return Prompts(
        tokens=tokens,
        editable=editable,
        attend=attend,
        group=torch.arange(4),
        sample_id=torch.arange(4),
        info={},
    )


def policy_of(order: str, blocks: int = 1, steps: int = T, seed: int = 1) -> MaskedPolicy:
    denoiser = MlpDenoiser(V, L, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        denoiser.weight_out.mul_(2)
    decoder = Decoder(steps=steps, blocks=blocks, order=order, temperature=TAU)  # pyright: ignore[reportArgumentType]
    return MaskedPolicy(denoiser, decoder)


def draw(policy: MaskedPolicy, score: Score) -> MaskedTrajectory:
    prompts = boards()
    return policy.sample(prompts, Record(score=score), SampleRng(0, prompts.sample_id))


@every_order
@every_form
@every_blocks
def test_a_replay_of_the_same_shape_is_bitwise_the_record(order, form, blocks):
    """transition(step k of every path) = the recorded column k, exactly, for two tokens a step."""
    policy, score = policy_of(order, blocks), Score(form=form)
    trajectory = draw(policy, score)
    for k in range(T):
        replay = policy.transition(trajectory, torch.full((4,), k), score)
        assert torch.equal(replay.log_prob, trajectory.log_prob[:, k])
        assert torch.equal(replay.revealed.sum(1), trajectory.revealed()[:, k])


@every_form
@pytest.mark.parametrize("order", ["random", "left_to_right"])
def test_rows_are_summed_in_the_order_of_the_record(order, form):
    """Seven tokens in one step: bitwise still where the sampler asks for revealed rows only."""
    policy, score = policy_of(order, steps=1), Score(form=form)
    trajectory = draw(policy, score)
    replay = policy.transition(trajectory, torch.zeros(4, dtype=torch.long), score)
    assert torch.equal(replay.log_prob, trajectory.log_prob[:, 0])


@every_order
@every_form
@pytest.mark.parametrize(("steps", "blocks"), [(4, 1), (4, 2), (2, 1), (2, 2), (8, 1)])
def test_replays_agree_for_every_batch_split(order, form, steps, blocks):
    """Flat (sample, step) pairs in any order and batches of any size: the record to 1e-12."""
    policy, score = policy_of(order, blocks, steps), Score(form=form)
    trajectory = draw(policy, score)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(steps))
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    recorded = trajectory.log_prob[pairs[:, 0], pairs[:, 1]]
    for size in (1, 3, len(pairs)):
        replay = torch.cat(
            [
                policy.transition(trajectory.take(sample), step, score).log_prob
                for sample, step in (part.unbind(1) for part in pairs.split(size))
            ]
        )
        torch.testing.assert_close(replay, recorded, rtol=0, atol=1e-12)


@every_order
def test_the_paths_of_another_policy_are_scored_by_the_same_rule(order):
    """A replay under new weights is the log-probability of the step under their own logits."""
    old, new = policy_of(order), policy_of(order, seed=2)
    trajectory = draw(old, Score())
    for k in range(T):
        step = torch.full((4,), k)
        x_t = trajectory.state(step, V)
        law = (new.denoiser.predict(x_t, attend=trajectory.prompts.attend) / TAU).softmax(-1)
        token = torch.where(trajectory.step_of() == k, trajectory.x_0, 0)
        each = law.gather(-1, token[..., None]).squeeze(-1).log()
        expected = torch.where(trajectory.step_of() == k, each, 0.0).sum(1)
        torch.testing.assert_close(new.transition(trajectory, step, Score()).log_prob, expected)


@dataclass(frozen=True)
class Shifted:
    """Another denoiser's logits plus a table of shifts: something to differentiate in."""

    inner: Denoiser
    shift: Tensor

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def mask_id(self) -> int:
        return self.inner.mask_id

    def predict(
        self, x_t: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        logits = self.inner.predict(x_t, attend=attend).detach() + self.shift
        return logits if positions is None else logits.take_along_dim(positions[..., None], 1)


@every_order
@every_form
def test_the_gradient_of_a_transition(order, form):
    """gradcheck in the logits of every position; the losing sets stay as they are within it."""
    policy, score = policy_of(order), Score(form=form)
    trajectory = draw(policy, score)

    def log_prob(shift: Tensor) -> Tensor:
        shifted = MaskedPolicy(Shifted(policy.denoiser, shift), policy.decoder)
        return shifted.transition(trajectory, torch.tensor([0, 1, 0, 2]), score).log_prob

    zero = torch.zeros(L, V, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_prob, (zero,))
    (gradient,) = torch.autograd.grad(log_prob(zero).sum(), zero)
    assert bool(gradient.any())


def test_no_gradient_while_sampling():
    """sample() is for rollouts: nothing in the trajectory requires a gradient."""
    flags: list[bool] = []

    def note(tensor: Tensor) -> Tensor:
        flags.append(tensor.requires_grad)
        return tensor

    draw(policy_of("plackett_luce"), Score(form="tokens_and_selection")).map(note)
    assert flags and not any(flags)


def test_scores_use_the_sampling_temperature_unless_told_otherwise():
    """score_temperature=1 scores softmax(logits): another number, as in the released EGSPO code."""
    policy = policy_of("random")
    trajectory = draw(policy, Score())
    step = torch.zeros(4, dtype=torch.long)
    law = policy.denoiser.predict(trajectory.state(step, V), attend=trajectory.prompts.attend)
    now = trajectory.step_of() == 0
    token = torch.where(now, trajectory.x_0, 0)[..., None]
    for temperature in (None, 1.0, 0.4):
        log_p = (law / (temperature or TAU)).log_softmax(-1).gather(-1, token).squeeze(-1)
        replay = policy.transition(trajectory, step, Score(score_temperature=temperature))
        torch.testing.assert_close(replay.log_prob, torch.where(now, log_p, 0.0).sum(1))
    recorded = draw(policy, Score(score_temperature=1.0))
    assert torch.equal(recorded.x_0, trajectory.x_0)
    assert not torch.allclose(recorded.log_prob, trajectory.log_prob)


@every_order
def test_the_law_of_a_transition_is_that_of_the_revealed_rows(order):
    """log_p and revealed describe the same rows: the entropy of the step can be read off them."""
    policy = policy_of(order)
    trajectory = draw(policy, Score())
    for k in range(T):
        step = torch.full((4,), k)
        replay = policy.transition(trajectory, step, Score())
        logits = policy.denoiser.predict(
            trajectory.state(step, V), attend=trajectory.prompts.attend
        )
        entropy = masked.entropy(masked.token_log_probs(logits, TAU))
        expected = torch.where(trajectory.step_of() == k, entropy, 0.0).sum(1)
        measured = torch.where(replay.revealed, masked.entropy(replay.log_p), 0.0).sum(1)
        torch.testing.assert_close(measured, expected)


@every_order
def test_selection_weight_lies_between_the_two_forms(order):
    """Recorded and replayed: tokens + weight * choice of positions, so 1 is the exact score."""
    policy, step = policy_of(order), torch.tensor([0, 1, 0, 2])
    scores = {
        0.0: Score(),
        1.0: Score(form="tokens_and_selection"),
        0.375: Score(form="tokens_and_selection", selection_weight=0.375),
    }
    paths = {weight: draw(policy, score) for weight, score in scores.items()}
    recorded = {weight: path.log_prob for weight, path in paths.items()}
    replayed = {
        weight: policy.transition(paths[0.0], step, score).log_prob
        for weight, score in scores.items()
    }
    for value in (recorded, replayed):
        torch.testing.assert_close(value[0.375], 0.625 * value[0.0] + 0.375 * value[1.0])
    decided = order in ("left_to_right", "max_prob")
    assert torch.equal(recorded[0.0], recorded[1.0]) == decided
    none = Score(form="tokens_and_selection", selection_weight=0.0)
    assert torch.equal(draw(policy, none).log_prob, recorded[0.0])
    for weight in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"selection_weight must lie in \[0, 1\]"):
            Score(selection_weight=weight)


@dataclass
class Counting:
    """A denoiser that counts the rows of each call."""

    inner: Denoiser
    rows: list[int]

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    @property
    def mask_id(self) -> int:
        return self.inner.mask_id

    def predict(
        self, x_t: Tensor, *, attend: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        self.rows.append(len(x_t))
        return self.inner.predict(x_t, attend=attend, positions=positions)


@every_order
@every_form
@pytest.mark.parametrize("forward_rows", [1, 5, 12, 1024])
def test_log_probs_are_transitions_whatever_the_parts(order, form, forward_rows):
    """Column by column what ``transition`` says, without gradients, in forwards of bounded size."""
    plain, score = policy_of(order), Score(form=form)
    trajectory = draw(plain, score)
    counting = Counting(plain.denoiser, [])
    policy = MaskedPolicy(counting, plain.decoder, forward_rows)
    step = torch.tensor([[0, 3, 1], [2, 0, 0], [1, 1, 3], [3, 2, 0]])
    found = policy.log_probs(trajectory, step, score)
    assert sum(counting.rows) == 12 and max(counting.rows) == min(forward_rows, 12)
    assert not found.requires_grad
    for column in range(3):
        one = plain.transition(trajectory, step[:, column], score).log_prob
        torch.testing.assert_close(found[:, column], one, rtol=0, atol=1e-12)


@every_order
@pytest.mark.parametrize("forward_rows", [1, 3, 1024])
def test_completions_whatever_the_parts(order, forward_rows):
    """The argmax at every position still masked before the step, one row for each; none: none."""
    plain = policy_of(order)
    trajectory = draw(plain, Score()).take(torch.tensor([3, 0, 1, 0, 2, 1, 3]))
    step = torch.tensor([0, 3, 1, 2, 0, 3, 2])
    counting = Counting(plain.denoiser, [])
    policy = MaskedPolicy(counting, plain.decoder, forward_rows)
    found = policy.completions(trajectory, step)
    assert sum(counting.rows) == 7 and max(counting.rows) <= forward_rows
    x_t = trajectory.state(step, V)
    logits = plain.denoiser.predict(x_t, attend=trajectory.prompts.attend)
    assert torch.equal(found, torch.where(x_t == V, logits.argmax(-1), x_t))
    assert bool((found[trajectory.prompts.editable] < V).all())
    nothing = policy.completions(trajectory.take(torch.arange(0)), torch.arange(0))
    assert nothing.shape == (0, L)
