"""Stages: rows are taken everywhere at once, and a flat batch keeps every pair's own numbers."""

import dataclasses

import torch

from rescore.types import (
    Actions,
    Credited,
    Kept,
    MaskedTrajectory,
    Prompts,
    Scored,
    Stage,
    joined,
)
from tiny import masked

MASK = 9


def trajectory() -> MaskedTrajectory:
    """Three paths of four positions in two steps; position 0 is given."""
    prompts = Prompts(
        tokens=torch.tensor([[5, 9, 9, 9]] * 3),
        editable=torch.tensor([[False, True, True, True]] * 3),
        group=torch.tensor([0, 0, 1]),
        sample_id=torch.tensor([10, 11, 12]),
        info={"answer": torch.tensor([7, 8, 9])},
    )
    return MaskedTrajectory(
        prompts=prompts,
        x_0=torch.tensor([[5, 0, 1, 2], [5, 2, 2, 0], [5, 1, 0, 1]]),
        rank=torch.tensor([[-1, 0, 4, 1], [-1, 5, 4, 0], [-1, 1, 0, 4]]),
        log_prob=torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]]),
        max_revealed=2,
        max_candidates=3,
        log_time=torch.arange(12).reshape(3, 4) / 8,
        kept=Kept(
            step=torch.tensor([[0], [1], [-1]]),
            step_weight=torch.tensor([[0.75], [1.5], [0.0]]),
            completion=torch.arange(12).reshape(3, 1, 4),
        ),
    )


def credited() -> Credited:
    """Two columns per sample, in another order than the steps; one pair has weight 0."""
    return Credited(
        trajectory=trajectory(),
        step=torch.tensor([[1, 0], [0, 1], [1, 1]]),
        step_weight=torch.ones(3, 2),
        reward=torch.tensor([1.0, 0.0, 0.5]),
        terms={"solved": torch.tensor([1.0, 0.0, 0.5])},
        completion_terms={"solved": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])},
        notes={"log_prob_ref": torch.tensor([[-0.1, -0.2], [-0.3, -0.4], [-0.5, -0.6]])},
        advantage=torch.tensor([[0.5, 0.25], [-0.5, -0.25], [2.0, 1.0]]),
        weight=torch.tensor([[0.1, 0.2], [0.0, 0.4], [0.5, 0.6]]),
    )


def test_states_are_rebuilt_from_ranks():
    """Before step k a position shows its token iff it was given or revealed in an earlier step."""
    path = trajectory()
    assert path.step_of().tolist() == [[-1, 0, 1, 0], [-1, 1, 1, 0], [-1, 0, 0, 1]]
    assert path.revealed().tolist() == [[2, 1], [1, 2], [2, 1]]
    assert path.n_steps == 2
    states = [path.state(torch.full((3,), k), MASK).tolist() for k in range(3)]
    assert states[0] == [[5, 9, 9, 9]] * 3
    assert states[1] == [[5, 0, 9, 2], [5, 9, 9, 0], [5, 1, 0, 9]]
    assert states[2] == path.x_0.tolist()
    assert path.state(torch.tensor([1, 0, 2]), MASK).tolist() == [
        [5, 0, 9, 2], [5, 9, 9, 9], [5, 1, 0, 1],
    ]  # fmt: skip


def test_take_reaches_every_tensor():
    """Rows of nested stages and mappings move together; repeats and boolean masks are allowed."""
    stage = credited()
    for index, rows in (
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.tensor([False, True, True]), [1, 2]),
    ):
        part = stage.take(index)
        path, prompts, full = (
            masked(part.trajectory),
            part.trajectory.prompts,
            masked(stage.trajectory),
        )
        assert path.kept is not None and full.kept is not None
        assert path.kept.completion is not None and full.kept.completion is not None
        assert path.log_time is not None and full.log_time is not None
        for taken, whole in (
            (part.reward, stage.reward),
            (part.terms["solved"], stage.terms["solved"]),
            (part.notes["log_prob_ref"], stage.notes["log_prob_ref"]),
            (path.rank, full.rank),
            (part.completion_terms["solved"], stage.completion_terms["solved"]),
            (path.log_time, full.log_time),
            (path.kept.step, full.kept.step),
            (path.kept.step_weight, full.kept.step_weight),
            (path.kept.completion, full.kept.completion),
            (prompts.sample_id, stage.trajectory.prompts.sample_id),
            (prompts.info["answer"], stage.trajectory.prompts.info["answer"]),
        ):
            assert torch.equal(taken, whole[rows])
        assert path.entropy is None and isinstance(prompts, Prompts) and prompts.attend is None
        assert path.max_revealed == 2


def test_map_and_to_keep_the_type_and_leave_the_original():
    """``map`` returns a new stage; ``to`` moves every tensor of it."""
    stage = credited()
    flipped = stage.map(lambda tensor: tensor.flip(0))
    assert isinstance(flipped, Credited)
    assert flipped.trajectory.log_prob[0, 0].item() == -5
    assert stage.trajectory.log_prob[0, 0].item() == -1
    moved, devices = stage.to("meta"), set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        devices.add(tensor.device.type)
        return tensor

    moved.map(note)
    assert devices == {"meta"}


def test_joined_is_the_inverse_of_splitting():
    """Parts of any size, one after the other, are the whole; plain numbers become the largest."""
    stage = credited()
    small = dataclasses.replace(stage.trajectory, max_revealed=1, max_candidates=2)
    parts = [
        dataclasses.replace(stage, trajectory=small).take(torch.tensor([0])),
        stage.take(torch.tensor([1, 2])),
    ]
    for whole in (joined(parts), joined([stage])):
        assert isinstance(whole, Credited)
        path = masked(whole.trajectory)
        assert (path.max_revealed, path.max_candidates) == (2, 3)
        assert path.entropy is None
        before, after = tensors(stage), tensors(whole)
        assert len(before) == len(after) > 15
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def tensors(stage: Stage) -> list[torch.Tensor]:
    """Every tensor in a stage, in order."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    stage.map(note)
    return found


def test_a_stage_is_built_from_the_fields_of_the_one_before():
    """``fields`` is one level deep: nested stages are handed on, not copied."""
    stage = credited()
    names = set(Scored.__dataclass_fields__)
    scored = Scored(**{n: v for n, v in stage.fields().items() if n in names})
    assert scored.trajectory is stage.trajectory
    assert set(scored.fields()) == names


def test_pairs_leave_out_weight_zero():
    """Every (sample, column) with a coefficient, in order."""
    assert credited().pairs().tolist() == [[0, 0], [0, 1], [1, 1], [2, 0], [2, 1]]


def test_actions_pick_the_numbers_of_their_pair():
    """Column c of sample b stands for step ``step[b, c]`` and carries that step's numbers."""
    stage = credited()
    pairs = torch.tensor([[2, 1], [0, 0], [0, 1], [1, 0]])
    actions = stage.actions(pairs)
    assert isinstance(actions, Actions)
    assert actions.step.tolist() == [1, 1, 0, 0]
    assert actions.log_prob_old.tolist() == [-6.0, -2.0, -1.0, -3.0]
    assert actions.advantage.tolist() == [1.0, 0.5, 0.25, -0.5]
    torch.testing.assert_close(actions.weight, torch.tensor([0.6, 0.1, 0.2, 0.0]))
    noted = actions.notes["log_prob_ref"]
    torch.testing.assert_close(noted, torch.tensor([-0.6, -0.1, -0.2, -0.3]))
    assert actions.trajectory.prompts.sample_id.tolist() == [12, 10, 10, 11]
    assert torch.equal(actions.trajectory.x_0, stage.trajectory.x_0[pairs[:, 0]])
