"""Critics: they see what was given only, learn, and continue from a checkpoint bitwise."""

from dataclasses import replace

import pytest
import torch

from rescore.models.critics import Critic, PromptCritic, ScalarCritic, critic_for
from rescore.types import Prompts

B, L, MASK = 12, 5, 9


def prompts(*, padded: bool = True) -> Prompts:
    """The first two tokens are given; the last position of every third sample is padding."""
    given = torch.stack([torch.arange(B) % 4, torch.arange(B) // 4], 1)
    editable = (torch.arange(L) >= 2).expand(B, -1).clone()
    attend = torch.ones(B, L, dtype=torch.bool)
    if padded:
        editable[::3, 4] = attend[::3, 4] = False
    tokens = torch.cat([given, torch.full((B, L - 2), MASK)], 1)
    row = torch.arange(B)
    return Prompts(
        tokens=tokens, editable=editable, attend=attend, group=row, sample_id=row, info={}
    )


def learned(seed: int = 0) -> PromptCritic:
    """A critic whose output layer is not 0."""
    critic = critic_for(prompts(), MASK + 1, seed)
    assert isinstance(critic, PromptCritic)
    with torch.no_grad():
        critic.out.normal_(generator=torch.Generator().manual_seed(seed))
    return critic


REWARD = (torch.arange(B) % 4 == 1).float() + 0.5 * (torch.arange(B) // 4)


def test_a_prompt_critic_sees_the_prompt_only():
    """Tokens at editable positions and padding change nothing, bitwise; given tokens do."""
    critic, given = learned(), prompts()
    value = critic.value(given)
    assert value.shape == (B,) and value.unique().numel() == B
    generator = torch.Generator().manual_seed(1)
    for spot in (given.editable, ~given.attend if given.attend is not None else given.editable):
        noise = torch.randint(0, MASK, (B, L), generator=generator)
        written = replace(given, tokens=torch.where(spot, noise, given.tokens))
        assert not torch.equal(written.tokens, given.tokens)
        assert torch.equal(critic.value(written), value)
    beyond = replace(given, tokens=torch.where(given.editable, 10**6, given.tokens))
    assert torch.equal(critic.value(beyond), value)
    for position in (0, 1):
        other = given.tokens.clone()
        other[:, position] = 7
        assert bool((critic.value(replace(given, tokens=other)) != value).all())
    swapped = given.tokens.clone()
    swapped[:, :2] = given.tokens[:, :2].flip(1)
    changed = critic.value(replace(given, tokens=swapped)) != value
    assert torch.equal(changed, given.tokens[:, 0] != given.tokens[:, 1])


def test_a_prompt_without_given_tokens_has_a_value():
    """Next to prompts that have some; no 0 / 0."""
    critic, given = learned(), prompts()
    editable = given.editable.clone()
    editable[4] = True
    value = critic.value(replace(given, editable=editable))
    assert bool(value.isfinite().all())
    rest = torch.arange(B) != 4
    assert (
        torch.equal(value[rest], critic.value(given)[rest]) and value[4] != critic.value(given)[4]
    )


def test_a_new_critic_expects_nothing():
    """V = 0 everywhere, and it says that it was never fitted; weights are seeded."""
    new = critic_for(prompts(), MASK + 1, 0)
    assert bool((new.value(prompts()) == 0).all()) and not new.fitted
    new.fit(prompts(), REWARD, lr=0.01, epochs=1)
    assert new.fitted
    one, same, other = (critic_for(prompts(), MASK + 1, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(dict(one.named_parameters())["token"], other.get_parameter("token"))


def test_fit_lowers_the_error_to_what_the_prompt_explains():
    """It returns the mean squared error before its first step."""
    critic = critic_for(prompts(), MASK + 1, 0)
    before = critic.fit(prompts(), REWARD, lr=0.02, epochs=1)
    torch.testing.assert_close(before, REWARD.var(correction=0))  # it starts at the mean
    assert not before.requires_grad
    second = critic.fit(prompts(), REWARD, lr=0.02, epochs=150)
    last = critic.fit(prompts(), REWARD, lr=0.02, epochs=1)
    assert last < 0.01 < second < before


def test_fit_works_where_gradients_are_off_and_uses_its_learning_rate():
    """The trainer rolls out without gradients; a rate of 0 moves nothing."""
    critic = learned()
    critic.fitted.fill_(True)
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    with torch.no_grad():
        critic.fit(prompts(), REWARD, lr=0.0, epochs=3)
        assert all(torch.equal(before[name], p) for name, p in critic.named_parameters())
        critic.fit(prompts(), REWARD.double(), lr=0.01, epochs=1)
    assert all(bool((before[name] != p).any()) for name, p in critic.named_parameters())
    step = (critic.level.detach() - before["level"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 0.01), rtol=0.5, atol=0)


@pytest.mark.parametrize("kind", [PromptCritic, ScalarCritic])
def test_a_restored_critic_continues_bitwise(kind):
    """Weights and the moments of its optimiser; ``saved`` is plain tensors."""

    def fresh(seed: int) -> Critic:
        if kind is ScalarCritic:
            return ScalarCritic()
        return critic_for(prompts(), MASK + 1, seed)

    critic = fresh(0)
    critic.fit(prompts(), REWARD, lr=0.02, epochs=3)
    state = {name: tensor.clone() for name, tensor in critic.saved().items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    other = fresh(1)
    other.restore(state)
    for one in (critic, other):
        one.fit(prompts(), REWARD.flip(0), lr=0.01, epochs=4)
    ended, continued = critic.saved(), other.saved()
    assert ended.keys() == continued.keys() and len(ended) >= 4
    for name, tensor in ended.items():
        assert torch.equal(tensor, continued[name]), name
    without = fresh(1)
    without.restore({name: tensor for name, tensor in state.items() if name[0] == "w"})
    without.fit(prompts(), REWARD.flip(0), lr=0.01, epochs=4)
    assert not torch.equal(without.value(prompts()), critic.value(prompts()))


def test_a_critic_that_was_never_fitted_is_saved_too():
    """Nothing but weights; restored it fits as a new one does."""
    critic, other = critic_for(prompts(), MASK + 1, 0), critic_for(prompts(), MASK + 1, 1)
    other.restore(critic.saved())
    errors = [one.fit(prompts(), REWARD, lr=0.02, epochs=5) for one in (critic, other)]
    assert torch.equal(*errors)
    assert torch.equal(critic.value(prompts()), other.value(prompts()))


def test_the_scalar_critic_finds_the_mean():
    """Where nothing is given there is one number for all; the error left is the variance."""
    blank = replace(prompts(), editable=torch.ones(B, L, dtype=torch.bool), attend=None)
    critic = critic_for(blank, MASK + 1, 0)
    assert isinstance(critic, ScalarCritic)
    critic.fit(blank, REWARD, lr=0.05, epochs=300)
    critic.fit(blank, REWARD, lr=0.001, epochs=300)
    torch.testing.assert_close(
        critic.value(blank), REWARD.mean().expand(B), rtol=0, atol=1e-4, check_stride=False
    )
    error = critic.fit(blank, REWARD, lr=0.001, epochs=1)
    torch.testing.assert_close(error, REWARD.var(correction=0), rtol=0, atol=1e-5)


def test_one_given_token_is_enough_for_a_prompt_critic():
    assert isinstance(critic_for(prompts(), MASK + 1, 0), PromptCritic)
