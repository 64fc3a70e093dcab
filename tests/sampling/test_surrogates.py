"""Surrogates of the log-likelihood: drawn sets by enumeration, and what the estimates tend to."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rescore.models.denoiser import SubsScores
from rescore.models.tiny import MlpDenoiser
from rescore.processes.ctmc import Uniform
from rescore.proof.oracle import EnumeratingRng
from rescore.sampling.rng import SampleRng
from rescore.sampling.surrogates import (
    heat_bath,
    hidden_sets,
    masked_log_policy,
    neighbours,
    snis_log_likelihood,
)
from rescore.types import Prompts
from tiny import TableScores

L, MASK = 3, 2


def blank(n: int, length: int = L) -> Prompts:
    row = torch.arange(n)
    return Prompts(
        tokens=torch.full((n, length), MASK),
        editable=torch.ones(n, length, dtype=torch.bool),
        group=row,
        sample_id=row,
        info={},
    )


def some_given() -> Prompts:
    """1000 samples of six positions: 6, 4, 1 and 0 of them editable, in turn."""
    row = torch.arange(1000)
    first = torch.tensor([0, 2, 5, 6])[row % 4]
    editable = torch.arange(6) >= first[:, None]
    tokens = torch.where(editable, MASK, 1)
    return Prompts(tokens=tokens, editable=editable, group=row, sample_id=row, info={})


def every_set(n: int, *, antithetic: bool = False) -> tuple[Tensor, Tensor]:
    """Every outcome of ``hidden_sets`` on a blank canvas with its probability."""
    settings = {"sizes": True, "antithetic": antithetic, "step": 9}
    dry = EnumeratingRng(torch.zeros(1, dtype=torch.long))
    hidden_sets(blank(1), n, rng=dry, **settings)
    rng = EnumeratingRng(torch.arange(dry.n_outcomes))
    return hidden_sets(blank(dry.n_outcomes), n, rng=rng, **settings), rng.probability


# ---- hidden sets ---------------------------------------------------------------------------------


def test_sizes_are_uniform_and_sets_uniform_among_their_size():
    """Each of the three sizes has probability 1/3, shared evenly by its sets."""
    sets, p = every_set(1)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    code = (sets[:, 0].long() * torch.tensor([4, 2, 1])).sum(1)
    found = torch.zeros(8, dtype=torch.float64).index_add(0, code, p)
    of_size = {0: 0.0, 1: 1 / 9, 2: 1 / 9, 3: 1 / 3}
    expected = torch.tensor([of_size[i.bit_count()] for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_sets_of_a_sample_are_independent():
    """Of two sets, every pair of sizes has probability 1/9."""
    sets, p = every_set(2)
    size = sets.sum(-1) - 1
    found = torch.zeros(9, dtype=torch.float64).index_add(0, 3 * size[:, 0] + size[:, 1], p)
    torch.testing.assert_close(
        found, torch.full((9,), 1 / 9, dtype=torch.float64), rtol=0, atol=1e-12
    )
    code = (sets.long() * torch.tensor([4, 2, 1])).sum(-1)
    both = torch.zeros(64, dtype=torch.float64).index_add(0, 8 * code[:, 0] + code[:, 1], p)
    alone = both.view(8, 8).sum(1)
    torch.testing.assert_close(both.view(8, 8), alone[:, None] * alone, rtol=0, atol=1e-12)


def test_antithetic_sets_are_opposite_ends_of_one_order():
    """Sizes c and E + 1 - c, overlapping in exactly one position; each has the law of one set."""
    sets, p = every_set(2, antithetic=True)
    one, other = sets.unbind(1)
    assert bool((one.sum(1) + other.sum(1) == L + 1).all())
    assert bool(((one & other).sum(1) == 1).all()) and bool((one | other).all())
    for half in (one, other):
        code = (half.long() * torch.tensor([4, 2, 1])).sum(1)
        found = torch.zeros(8, dtype=torch.float64).index_add(0, code, p)
        of_size = {0: 0.0, 1: 1 / 9, 2: 1 / 9, 3: 1 / 3}
        expected = torch.tensor([of_size[i.bit_count()] for i in range(8)], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("antithetic", [False, True])
def test_only_editable_positions_are_hidden(antithetic):
    """Sizes in 1 ... E of the sample itself, all of them met; nothing where nothing is editable."""
    prompts = some_given()
    rng = SampleRng(0, prompts.sample_id)
    sets = hidden_sets(prompts, 4, sizes=True, antithetic=antithetic, step=50, rng=rng)
    assert sets.shape == (1000, 4, 6)
    assert not bool((sets & ~prompts.editable[:, None]).any())
    size = sets.sum(-1)
    for kind, count in enumerate((6, 4, 1, 0)):
        met = size[kind::4].unique().tolist()
        assert met == (list(range(1, count + 1)) if count else [0])
    if antithetic:
        pairs = size[::4].view(-1, 2, 2).sum(-1)
        assert bool((pairs == 7).all())
        pairs = size[1::4].view(-1, 2, 2).sum(-1)
        assert bool((pairs == 5).all())
        both = (sets[:, 0] & sets[:, 1]).sum(1)
        assert both.view(-1, 4).unique(dim=0).tolist() == [[1, 1, 1, 0]]
    assert not torch.equal(sets[::4, 0], sets[::4, 2])


def test_single_positions_are_different():
    """One each, in random order; sets beyond the number of editable positions stay empty."""
    prompts = some_given()
    rng = SampleRng(0, prompts.sample_id)
    sets = hidden_sets(prompts, 5, sizes=False, antithetic=False, step=50, rng=rng)
    assert not bool((sets & ~prompts.editable[:, None]).any())
    assert int(sets.sum(1).max()) == 1
    for kind, filled in enumerate((5, 4, 1, 0)):
        expected = [1] * filled + [0] * (5 - filled)
        assert sets[kind::4].sum(-1).unique(dim=0).tolist() == [expected]
    first = sets[::4, 0].long().argmax(-1)
    share = torch.bincount(first, minlength=6) / len(first)
    assert float((share - 1 / 6).abs().max()) < 4 * math.sqrt(5 / 36 / 250)


# ---- the masked surrogate ------------------------------------------------------------------------


def masked_network(length: int = L) -> SubsScores:
    denoiser = MlpDenoiser(2, length, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        denoiser.weight_out.mul_(3)
    return SubsScores(denoiser)


def log_p_of(network: SubsScores, x: Tensor, hidden: list[int], position: int) -> float:
    """log p(x^position | x with these positions hidden), for one canvas."""
    canvas = x.clone()
    canvas[hidden] = MASK
    logits = network.network.predict(canvas[None])[0, position]
    return logits.log_softmax(-1)[x[position]].item()


def test_a_set_counts_as_e_over_c_times_its_log_probs():
    """Two sets by hand: E / c sum over the hidden positions, then the mean."""
    network, x = masked_network(), torch.tensor([0, 1, 1])
    hidden = torch.tensor([[[True, False, True], [False, True, False]]])
    found = masked_log_policy(network, x[None], blank(1), hidden)
    pair = sum(log_p_of(network, x, [0, 2], position) for position in (0, 2))
    single = log_p_of(network, x, [1], 1)
    expected = torch.tensor([(3 / 2 * pair + 3 * single) / 2], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    everything = torch.ones(1, 1, 3, dtype=torch.bool)
    found = masked_log_policy(network, x[None], blank(1), everything)
    expected = sum(log_p_of(network, x, [0, 1, 2], position) for position in range(3))
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("x", [[0, 1, 1], [1, 1, 0]])
def test_the_mean_is_the_bound_averaged_over_orders(x, antithetic):
    """E over sizes and sets = mean over the 3! orders of sum_i log p(x^o_i | those before)."""
    network, x = masked_network(), torch.tensor(x)
    sets, p = every_set(2, antithetic=antithetic)
    each = masked_log_policy(network, x.expand(len(p), -1), blank(len(p)), sets)
    orders = list(itertools.permutations(range(L)))
    bound = sum(
        log_p_of(network, x, list(order[i:]), order[i]) for order in orders for i in range(L)
    ) / len(orders)
    assert float((p * each).sum()) == pytest.approx(bound, abs=1e-12)
    assert float(each.std()) > 0.1


def test_all_single_positions_are_the_pseudo_likelihood():
    """Exactly, whatever the number of sets beyond E; one row of gradient per weight."""
    network, x = masked_network(), torch.tensor([[0, 1, 1], [1, 0, 1]])
    rng = SampleRng(0, torch.arange(2))
    sets = hidden_sets(blank(2), 5, sizes=False, antithetic=False, step=9, rng=rng)
    found = masked_log_policy(network, x, blank(2), sets)
    for b in range(2):
        expected = sum(log_p_of(network, x[b], [position], position) for position in range(L))
        assert found[b].item() == pytest.approx(expected, abs=1e-12)
    assert isinstance(network.network, MlpDenoiser)
    gradient = torch.autograd.grad(found.sum(), list(network.network.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradient)


def test_given_positions_and_padding_play_their_part():
    """E counts editable positions; what is given is seen, padding is not; E = 0 gives 0."""
    network, x = masked_network(), torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1]])
    editable = torch.tensor([[False, True, True]] * 2 + [[False] * 3])
    attend = torch.ones(3, 3, dtype=torch.bool)
    attend[1, 0] = False
    row = torch.arange(3)
    prompts = Prompts(tokens=x, editable=editable, attend=attend, group=row, sample_id=row, info={})
    hidden = editable & torch.tensor([False, True, False])
    found = masked_log_policy(network, x, prompts, hidden[:, None])
    assert found[0].item() == pytest.approx(2 * log_p_of(network, x[0], [1], 1), abs=1e-12)
    assert found[1].item() == pytest.approx(2 * log_p_of(network, x[0], [0, 1], 1), abs=1e-12)
    assert found[0].item() != pytest.approx(found[1].item(), abs=1e-3)
    assert found[2].item() == 0


# ---- neighbours ----------------------------------------------------------------------------------


def law_of(length: int) -> tuple[TableScores, Tensor]:
    """A law pi over 3^length states and the network of its exact ratios, at any noise."""
    network = TableScores(Uniform(3), length)
    weight = torch.randn(3**length, generator=torch.Generator().manual_seed(2)).double()
    log_pi = weight.log_softmax(0).view((3,) * length)
    states = torch.cartesian_prod(*[torch.arange(3)] * length).view(-1, length)
    with torch.no_grad():
        network.table.zero_()
        for number, state in enumerate(states.tolist()):
            for place, v in itertools.product(range(length), range(3)):
                other = [*state[:place], v, *state[place + 1 :]]
                network.table[0, number, place, v] = log_pi[tuple(other)] - log_pi[tuple(state)]
    return network, log_pi


def scores_at(network: TableScores, x: Tensor) -> Tensor:
    return network.log_score(x, torch.ones(len(x))).detach()


def test_the_heat_bath_by_hand():
    """One editable position, evenly, then its conditional law; reversible with respect to pi."""
    network, log_pi = law_of(2)
    pi = log_pi.exp()
    x = torch.tensor([[1, 2]])
    probs = heat_bath(scores_at(network, x), x, torch.tensor([[True, True]]))[0]
    torch.testing.assert_close(probs[0], pi[:, 2] / pi[:, 2].sum() / 2)
    torch.testing.assert_close(probs[1], pi[1] / pi[1].sum() / 2)
    clamped = heat_bath(scores_at(network, x), x, torch.tensor([[False, True]]))[0]
    torch.testing.assert_close(clamped[0], torch.zeros(3).double())
    torch.testing.assert_close(clamped[1], pi[1] / pi[1].sum())
    none = heat_bath(scores_at(network, x), x, torch.tensor([[False, False]]))
    assert bool((none == 0).all())


def test_neighbours_are_draws_of_the_heat_bath():
    """Every outcome changes the one cell that it stands for, with that cell's probability."""
    network, _ = law_of(2)
    x = torch.tensor([[1, 2]]).expand(6, -1)
    log_score, editable = scores_at(network, x), torch.ones(6, 2, dtype=torch.bool)
    rng = EnumeratingRng(torch.arange(6))
    drawn = neighbours(log_score, x, editable, 1, step=5, rng=rng)
    assert drawn[:, 0].tolist() == [[0, 2], [1, 0], [1, 2], [1, 1], [2, 2], [1, 2]]
    expected = heat_bath(log_score, x, editable)[0].T.flatten()  # the position is drawn first
    torch.testing.assert_close(rng.probability, expected, rtol=0, atol=1e-12)
    rng = SampleRng(0, torch.arange(6))
    many = neighbours(log_score, x, editable & torch.tensor([True, False]), 40, step=5, rng=rng)
    assert many.shape == (6, 40, 2) and bool((many[..., 1] == 2).all())
    assert many[0, :, 0].unique().tolist() == [0, 1, 2]


def test_snis_is_exact_for_one_position():
    """Whatever the neighbours drawn, one of them or ten."""
    network, log_pi = law_of(1)
    x = torch.tensor([[0], [1], [2]])
    rng = SampleRng(0, torch.arange(3))
    for n in (1, 10):
        z = neighbours(scores_at(network, x), x, blank(3, 1).editable, n, step=5, rng=rng)
        found = snis_log_likelihood(network, 1.0, scores_at(network, x), x, blank(3, 1), z)
        torch.testing.assert_close(found, log_pi, rtol=0, atol=1e-12)


def test_snis_tends_to_something_else_for_two_positions():
    """pi(x) / pi(x and all its neighbours), as documented: 30000 draws come to within 0.02."""
    network, log_pi = law_of(2)
    pi, x = log_pi.exp(), torch.tensor([[1, 2]])
    log_score = scores_at(network, x)
    z = neighbours(log_score, x, blank(1, 2).editable, 30000, step=5, rng=SampleRng(0, x[:, 0]))
    with torch.no_grad():
        found = snis_log_likelihood(network, 1.0, log_score, x, blank(1, 2), z)
    reached = pi[1].sum() + pi[:, 2].sum() - pi[1, 2]
    assert found.item() == pytest.approx(float((pi[1, 2] / reached).log()), abs=0.02)
    assert abs(found.item() - float(log_pi[1, 2])) > 0.1
