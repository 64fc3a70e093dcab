"""Processes with rates, proven on worlds of a few tokens whose every state is enumerated."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rescore.processes import ctmc
from rescore.processes.convert import score_from_log_probs
from rescore.processes.ctmc import Absorbing, Process, Uniform
from rescore.processes.schedules import LogLinear

INF = torch.inf
N = 3
"""Ordinary tokens."""
L = 2
UNIFORM = Uniform(N)
ABSORBING = Absorbing(N + 1, N)
INNER_MASK = Absorbing(N + 1, 1)
BOTH = (UNIFORM, ABSORBING)
ALL = (UNIFORM, ABSORBING, INNER_MASK)
Law = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- the enumerated world ------------------------------------------------------------------------


def states(process: Process, length: int = L) -> Tensor:
    """Every sequence, [S^L, L]."""
    return torch.tensor(list(itertools.product(range(process.n_states), repeat=length)))


def data_law(process: Process, length: int = L, seed: int = 0) -> Tensor:
    """A random p_0 over ``states``, which gives nothing to the mask."""
    x = states(process, length)
    p = normal(len(x), seed=seed).softmax(0)
    if process.mask_id is not None:
        p = p * ~(x == process.mask_id).any(1)
    return p / p.sum()


def step_matrix(process: Process, probs: Law, length: int = L) -> Tensor:
    """P[y, x] = prod_l probs(x)[l, y_l]: tokens move independently."""
    x = states(process, length)
    law = probs(x)
    columns = [law[:, place, x[:, place]] for place in range(length)]
    return torch.stack(columns).prod(0).T


def marginal(process: Process, p_0: Tensor, noise: float, length: int = L) -> Tensor:
    """p_t by a matrix exponential of the rates of whole sequences."""
    return torch.matrix_exp(noise * sequence_rates(process, length)) @ p_0


def sequence_rates(process: Process, length: int = L) -> Tensor:
    """Q over sequences: the Kronecker sum of the rates of tokens, [S^L, S^L]."""
    one, eye = process.rate_matrix(), torch.eye(process.n_states, dtype=torch.float64)
    total = torch.zeros(process.n_states**length, process.n_states**length, dtype=torch.float64)
    for place in range(length):
        term = torch.ones(1, 1, dtype=torch.float64)
        for other in range(length):
            term = torch.kron(term, one if other == place else eye)
        total += term
    return total


def log_ratios(process: Process, p: Tensor, length: int = L) -> Tensor:
    """log p(x with token l replaced by v) / p(x) of every x, [S^L, L, S]."""
    x = states(process, length)
    strides = torch.tensor([process.n_states ** (length - 1 - place) for place in range(length)])
    index = (x * strides).sum(1)
    v = torch.arange(process.n_states)
    neighbour = index[:, None, None] + (v - x[..., None]) * strides[:, None]
    return p.log()[neighbour] - p.log()[:, None, None]


def corrector_generator(process: Process, log_score: Tensor, length: int = L) -> Tensor:
    """Q^c over sequences from the library's rates of tokens, [S^L, S^L]."""
    x = states(process, length)
    rates = process.forward_rates(x, torch.float64) + ctmc.reverse_rates(process, x, log_score)
    generator = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i, j in itertools.product(range(len(x)), repeat=2):
        differs = (x[i] != x[j]).nonzero().flatten().tolist()
        if len(differs) == 1:
            generator[j, i] = rates[i, differs[0], x[j, differs[0]]]
    return generator - torch.diag(generator.sum(0))


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def kl(p: Tensor, q: Tensor) -> float:
    return float(torch.special.xlogy(p, p / q).sum())


def slope(sizes: list[float], errors: list[float]) -> float:
    """d log error / d log size between the ends."""
    return math.log(errors[-1] / errors[0]) / math.log(sizes[-1] / sizes[0])


# ---- the forward process -------------------------------------------------------------------------


def test_rate_matrices_by_hand():
    """Columns are sources: uniform jumps at 1 / S to each, absorbing ones only into the mask."""
    third = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(Uniform(3).rate_matrix(), third - torch.eye(3).double())
    expected = torch.tensor([[-1.0, 0, 0], [1, 0, 1], [0, 0, -1]]).double()
    torch.testing.assert_close(Absorbing(3, 1).rate_matrix(), expected)
    assert Uniform(3).mask_id is None


@pytest.mark.parametrize("process", ALL)
def test_rates_are_the_columns_and_rows_of_the_matrix(process):
    """Columns of Q sum to 0; forward rates are its columns, backward ones its rows, 0 at x."""
    matrix = process.rate_matrix()
    torch.testing.assert_close(matrix.sum(0), torch.zeros(process.n_states).double())
    off = matrix - torch.diag(matrix.diagonal())
    x = torch.arange(process.n_states)
    torch.testing.assert_close(process.forward_rates(x, torch.float64), off.T)
    torch.testing.assert_close(process.backward_rates(x, torch.float64), off)
    assert process.forward_rates(x).dtype == process.backward_rates(x).dtype == torch.float32


@pytest.mark.parametrize("process", ALL)
def test_noised_law_is_the_matrix_exponential(process):
    """p(x_t | x_0) = exp(n Q)[:, x_0], from hardly any noise to the limit law."""
    x_0 = torch.arange(process.n_states).expand(4, -1)
    noise = torch.tensor([1e-4, 0.3, 2.0, 20.0], dtype=torch.float64)
    law = process.noised_probs(x_0, noise)
    for n, got in zip(noise, law, strict=True):
        torch.testing.assert_close(got, torch.matrix_exp(n * process.rate_matrix()).T)
    limit = process.limit_probs(x_0, torch.float64)
    far = process.noised_probs(x_0, torch.full((4,), 50.0, dtype=torch.float64))
    torch.testing.assert_close(far, limit)


@pytest.mark.parametrize("process", ALL)
@pytest.mark.parametrize("noise", [1e-4, 20.0])
def test_noised_law_keeps_its_digits_in_float32(process, noise):
    """Every entry is right to 1e-6 of itself: moves at little noise, stays of tokens at much."""
    x_0 = torch.arange(process.n_states)[None]
    rounded = torch.tensor([noise])
    law = process.noised_probs(x_0, rounded)
    assert law.dtype == torch.float32
    exact = process.noised_probs(x_0, rounded.double())
    torch.testing.assert_close(law.double(), exact, rtol=1e-6, atol=0)


def test_states_are_checked():
    with pytest.raises(ValueError, match="n_states is 1"):
        Uniform(1)
    with pytest.raises(ValueError, match="n_states is 1"):
        Absorbing(1, 0)
    with pytest.raises(ValueError, match="mask_id is 4, but the states are 0 to 3"):
        Absorbing(4, 4)
    with pytest.raises(ValueError, match="mask_id is -1"):
        Absorbing(4, -1)


# ---- steps of the reverse process ----------------------------------------------------------------


def test_euler_by_hand():
    """Uniform, three states, x = 1, scores 6 and 1.5, size 0.2: moves .4 and .1, stays .5."""
    log_score = torch.tensor([[[6.0, 1.0, 1.5]]]).double().log()
    probs = ctmc.euler_probs(UNIFORM, torch.tensor([[1]]), log_score, 0.2)
    torch.testing.assert_close(probs, torch.tensor([[[0.4, 0.5, 0.1]]]).double())


def test_steps_that_are_too_long_leave_for_certain():
    """At size 1 the moves are 2 and .5: staying would be -1.5, is 0, and the rest is normalised."""
    log_score = torch.tensor([[[6.0, 1.0, 1.5]]]).double().log()
    probs = ctmc.euler_probs(UNIFORM, torch.tensor([[1]]), log_score, 1.0)
    torch.testing.assert_close(probs, torch.tensor([[[0.8, 0.0, 0.2]]]).double())
    # the corrector adds 1 / 3 to both
    probs = ctmc.corrector_probs(UNIFORM, torch.tensor([[1]]), log_score, 1.0)
    by_hand = torch.tensor([[[2 + 1 / 3, 0.0, 0.5 + 1 / 3]]]).double() / (2.5 + 2 / 3)
    torch.testing.assert_close(probs, by_hand)


@pytest.mark.parametrize("process", ALL)
def test_euler_is_onehot_plus_reverse_rates(process):
    """onehot(x) + size diag-completed s_y Q(x, y), with Q from the matrix; a size per sample."""
    x = states(process)
    log_score = normal(len(x), L, process.n_states, scale=0.5)
    size = torch.linspace(0.01, 0.1, len(x), dtype=torch.float64)
    matrix = process.rate_matrix()
    probs = ctmc.euler_probs(process, x, log_score, size)
    rates = ctmc.reverse_rates(process, x, log_score)
    for b, place in itertools.product(range(len(x)), range(L)):
        token = int(x[b, place])
        expected = log_score[b, place].exp() * matrix[token]
        expected[token] = 0
        torch.testing.assert_close(rates[b, place], expected)
        expected *= size[b]
        expected[token] = 1 - expected.sum()
        assert float(expected.min()) >= 0
        torch.testing.assert_close(probs[b, place], expected)


def sedd_analytic(process: Process, x: Tensor, log_score: Tensor, d: float) -> Tensor:
    """SEDD's staggered score times transposed transition, token by token, before any clamp."""
    probs, s = torch.empty_like(log_score), log_score.exp()
    n, mask = process.n_states, process.mask_id
    for index in itertools.product(*map(range, x.shape)):
        token, score = int(x[index]), s[index]
        if mask is None:
            staggered = (math.exp(-d) - 1) / (n * math.exp(-d)) * score.sum() + score * math.exp(d)
            into = torch.full((n,), (1 - math.exp(-d)) / n).double()
            into[token] = 1 - (n - 1) / n * (1 - math.exp(-d))
        else:
            staggered = score * math.exp(d)
            staggered[mask] += (1 - math.exp(d)) * score.sum()
            into = torch.zeros(n).double()
            into[token] = math.exp(-d)
            if token == mask:
                into += 1 - math.exp(-d)
        probs[index] = staggered * into
    return probs


@pytest.mark.parametrize("process", ALL)
@pytest.mark.parametrize("d", [1e-3, 0.1, 3.0])
def test_analytic_step_is_sedds(process, d):
    """Staggered score x transition; the products sum to 1, and where negative are clamped."""
    x = states(process)
    log_score = normal(len(x), L, process.n_states, scale=0.5)
    log_score.scatter_(-1, x[..., None], 0)
    products = sedd_analytic(process, x, log_score, d)
    torch.testing.assert_close(products.sum(-1), torch.ones(len(x), L).double())
    assert (float(products.min()) < 0) == (d > 1), "the last case, and only it, needs the clamp"
    expected = products.clamp(min=0)
    expected /= expected.sum(-1, keepdim=True)
    probs = ctmc.analytic_probs(process, x, log_score, d)
    torch.testing.assert_close(probs, expected)
    per_sample = torch.full((len(x),), d, dtype=torch.float64)
    torch.testing.assert_close(ctmc.analytic_probs(process, x, log_score, per_sample), expected)


@pytest.mark.parametrize("process", ALL)
@pytest.mark.parametrize(("n_t", "n_s"), [(0.1, 0.05), (2.0, 0.01), (6.0, 1.0), (5.0, 0.0)])
def test_analytic_step_is_exact_for_one_token(process, n_t, n_s):
    """L = 1 and exact scores: one step from any noise to any lower one takes p_t to p_s."""
    p_0 = data_law(process, length=1, seed=3)
    p_t, p_s = (marginal(process, p_0, n, length=1) for n in (n_t, n_s))
    log_score = log_ratios(process, p_t, length=1)
    step = step_matrix(
        process,
        lambda x: ctmc.analytic_probs(process, x, log_score, n_t - n_s),
        length=1,
    )
    torch.testing.assert_close(step @ p_t, p_s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("process", ALL)
def test_denoising_is_exact_for_one_token(process):
    """It takes p_t to p_0, and never to the mask, whatever the scores."""
    p_0 = data_law(process, length=1, seed=3)
    p_t = marginal(process, p_0, 1.3, length=1)
    log_score = log_ratios(process, p_t, length=1)
    step = step_matrix(process, lambda x: ctmc.denoise_probs(process, x, log_score, 1.3), length=1)
    torch.testing.assert_close(step @ p_t, p_0, rtol=0, atol=1e-12)
    x = states(process)
    wrong = normal(len(x), L, process.n_states, seed=4)
    probs = ctmc.denoise_probs(process, x, wrong, 0.4)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(x), L).double())
    if process.mask_id is not None:
        assert float(probs[..., process.mask_id].abs().max()) == 0
        masked = x == process.mask_id
        tokens = torch.arange(process.n_states) != process.mask_id
        expected = wrong[masked][:, tokens].softmax(-1)
        torch.testing.assert_close(probs[masked][:, tokens], expected)
        seen = torch.nn.functional.one_hot(x[~masked], process.n_states).double()
        torch.testing.assert_close(probs[~masked], seen)


@pytest.mark.parametrize("process", (ABSORBING, INNER_MASK))
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.5, 0.01), (0.3, 0.0)])
def test_analytic_absorbing_step_is_mdlms(process, t, s):
    """Log-linear noise, SUBS scores: v with (t - s) / t p(v), the mask with s / t, else a copy."""
    x = states(process)
    log_p = normal(len(x), L, N).log_softmax(-1)
    level = LogLinear().total_noise(torch.tensor([t, s], dtype=torch.float64))
    log_score = score_from_log_probs(
        log_p, x, level[:1].expand(len(x)), process.mask_id, process.n_states
    )
    probs = ctmc.analytic_probs(process, x, log_score, float(level[0] - level[1]))
    tokens = torch.arange(process.n_states) != process.mask_id
    expected = torch.nn.functional.one_hot(x, process.n_states).double()
    masked = x == process.mask_id
    row = torch.zeros(int(masked.sum()), process.n_states, dtype=torch.float64)
    row[:, tokens] = (t - s) / t * log_p[masked].exp()
    row[:, process.mask_id] = s / t
    expected[masked] = row
    torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize("process", BOTH)
def test_reverse_chain_of_euler_steps_is_of_first_order(process):
    """Exact scores, L = 2: the chain from p_T back to noise 0.3 misses p by O(h)."""
    start, end = 2.0, 0.3
    p_0 = data_law(process)
    sizes, errors = [], []
    for n_steps in (40, 80, 160):
        h = (start - end) / n_steps
        p = marginal(process, p_0, start)
        for k in range(n_steps):
            log_score = finite(log_ratios(process, marginal(process, p_0, start - k * h)))
            law = ctmc.euler_probs(process, states(process), log_score, h)
            p = step_matrix(process, lambda x, law=law: law) @ p
        sizes.append(h)
        errors.append(total_variation(p, marginal(process, p_0, end)))
    assert errors[-1] > 1e-4
    assert 0.93 < slope(sizes, errors) < 1.07


def finite(log_score: Tensor) -> Tensor:
    """Ratios whose denominator is 0 belong to states that are never met."""
    return log_score.nan_to_num(0.0, posinf=0.0, neginf=-INF)


def test_much_noise_and_flat_scores_in_float32():
    """Scores all equal, and a step over nearly all of 20 units: the law is uniform, not 0 / 0.

    As SEDD's formula has it: the token at x was noise, so that every token is equally likely.
    """
    x = torch.zeros(1, 1, dtype=torch.long)
    for step in (ctmc.analytic_probs, ctmc.denoise_probs):
        probs = step(Uniform(7), x, torch.zeros(1, 1, 7), 19.0)
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs, torch.full((1, 1, 7), 1 / 7))


def test_much_noise_leaves_small_differences_that_count():
    """At d = 16 the staggered scores are e^16 (s - mean) + mean: log-scores of 3e-8 make 25 %.

    float32 holds such log-scores, but not their exponentials.
    """
    log_score = torch.tensor([[[0.0, 3e-8, -2e-8, 1e-8]]])
    probs = ctmc.analytic_probs(Uniform(4), torch.tensor([[0]]), log_score, 16.0)
    s = log_score.double()  # log s = s - 1 to 1e-15
    expected = 1 + math.exp(16) * (s - s.mean())
    torch.testing.assert_close(probs.double(), expected / expected.sum(), rtol=1e-5, atol=0)
    assert float(probs.max() - probs.min()) > 0.1


@pytest.mark.parametrize("process", BOTH)
@pytest.mark.parametrize("d", [1e-4, 0.5, 20.0])
def test_steps_keep_their_digits_in_float32(process, d):
    """The same scores in float32 and float64 give every probability to 1e-5 of itself."""
    x = states(process)
    log_score = normal(len(x), L, process.n_states, scale=1e-3).float() - 2
    log_score.scatter_(-1, x[..., None], 0)
    size = min(d, 0.5)
    for step, length in (
        (ctmc.euler_probs, size),
        (ctmc.corrector_probs, size),
        (ctmc.analytic_probs, d),
        (ctmc.denoise_probs, d),
    ):
        probs = step(process, x, log_score, length)
        assert probs.dtype == torch.float32
        exact = step(process, x, log_score.double(), length)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(probs.double(), exact, rtol=1e-5, atol=0)


# ---- the gradient flow ---------------------------------------------------------------------------


def stationary(process: Process) -> tuple[Tensor, Tensor]:
    """p_t of a random data law, at a noise that reaches every state, and its exact scores."""
    p = marginal(process, data_law(process), 0.7)
    assert float(p.min()) > 0
    return p, log_ratios(process, p)


@pytest.mark.parametrize("process", BOTH)
def test_corrector_keeps_the_law_in_detailed_balance(process):
    """Q^c p = 0 and p(x) Q^c(y, x) = p(y) Q^c(x, y)."""
    p, log_score = stationary(process)
    generator = corrector_generator(process, log_score)
    assert float((generator @ p).abs().max()) < 1e-12
    flow = generator * p
    assert float((flow - flow.T).abs().max()) < 1e-12
    assert float(flow.abs().max()) > 1e-3, "a flow of nothing is balanced too"


@pytest.mark.parametrize("process", BOTH)
def test_corrector_is_a_gradient_flow(process):
    """KL(p_tau || p) falls all the way along the flow, to 0."""
    p, log_score = stationary(process)
    taus = torch.linspace(0, 8, 33, dtype=torch.float64)
    generator = corrector_generator(process, log_score)
    start = normal(len(p), seed=9, scale=3).softmax(0)
    path = [kl(torch.matrix_exp(tau * generator) @ start, p) for tau in taus]
    assert path[0] > 0.5
    assert all(later < earlier for earlier, later in itertools.pairwise(path))
    assert path[-1] < 1e-5


@pytest.mark.parametrize("process", BOTH)
def test_corrector_step_is_stationary_up_to_its_size(process):
    """The law that the discrete step keeps is off by O(size) in total variation."""
    p, log_score = stationary(process)
    sizes, errors = [0.01, 0.005, 0.0025, 0.00125], []
    for size in sizes:
        step = step_matrix(
            process, lambda x, size=size: ctmc.corrector_probs(process, x, log_score, size)
        )
        torch.testing.assert_close(step.sum(0), torch.ones(len(p)).double())
        kept = torch.linalg.matrix_power(step, 2**16) @ p
        assert float((step @ kept - kept).abs().max()) < 1e-12
        errors.append(total_variation(kept, p))
    assert errors[-1] > 1e-5
    assert 0.97 < slope(sizes, errors) < 1.03


def test_corrector_remasks_and_unmasks():
    """Absorbing noise: a token falls into the mask at rate 1, a mask opens to v at rate s_v."""
    x = torch.tensor([[0, N]])
    log_score = torch.tensor([[9.0, 9, 9, 9], [math.log(2), 0, -INF, 9]]).double()[None]
    probs = ctmc.corrector_probs(ABSORBING, x, log_score, 0.1)
    expected = torch.tensor([[[0.9, 0, 0, 0.1], [0.2, 0.1, 0, 0.7]]]).double()
    torch.testing.assert_close(probs, expected)


# ---- the rate of KL ------------------------------------------------------------------------------


@pytest.mark.parametrize("process", ALL)
def test_kl_rate_by_enumeration(process):
    """The sum over neighbours y of Q(x, y) (s log(s / s_ref) - s + s_ref), Q from the matrix."""
    x = states(process)
    a, b = (normal(len(x), L, process.n_states, seed=seed) for seed in (1, 2))
    matrix = process.rate_matrix()
    expected = torch.zeros(len(x), dtype=torch.float64)
    for i, place, v in itertools.product(range(len(x)), range(L), range(process.n_states)):
        if v != x[i, place]:
            s, s_ref = float(a[i, place, v].exp()), float(b[i, place, v].exp())
            rate = float(matrix[x[i, place], v])
            expected[i] += rate * (s * math.log(s / s_ref) - s + s_ref)
    torch.testing.assert_close(ctmc.kl_rate(process, x, a, b), expected)


@pytest.mark.parametrize("process", BOTH)
def test_kl_rate_is_that_of_short_steps(process):
    """KL(step || reference step) / h goes to it as h goes to 0, at first order."""
    x = states(process)
    a, b = (normal(len(x), L, process.n_states, seed=seed, scale=0.5) for seed in (1, 2))
    rate = ctmc.kl_rate(process, x, a, b)
    sizes, errors = [1e-3, 1e-4], []
    for h in sizes:
        p, q = (ctmc.euler_probs(process, x, score, h) for score in (a, b))
        step = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum((1, 2))
        errors.append(float((step / h - rate).abs().max()))
    assert errors[-1] < 1e-3 * float(rate.max())
    assert 0.9 < slope(sizes, errors) < 1.1


@pytest.mark.parametrize("process", BOTH)
def test_kl_rate_is_zero_only_for_equal_scores(process):
    """Exactly 0 and with gradient 0 where they are equal, above 0 where one that counts is not."""
    x = states(process)
    a = normal(len(x), L, process.n_states, seed=1).requires_grad_()
    same = ctmc.kl_rate(process, x, a, a.detach())
    assert bool((same == 0).all())
    assert bool((torch.autograd.grad(same.sum(), a)[0] == 0).all())
    counts = process.backward_rates(x).sum((1, 2)) > 0
    for change in (1e-6, -1e-6, 3.0, -3.0, -200.0):
        rate = ctmc.kl_rate(process, x, a.detach() + change, a.detach())
        assert bool(((rate > 0) == counts).all())
    assert not bool(counts.all()) or process is UNIFORM


def test_kl_rate_keeps_its_digits_in_float32():
    """Scores 1e-3 apart: the textbook form would lose the 5e-7 that differ to cancellation.

    And scores e^100 apart do not overflow: what remains is s_ref.
    """
    x = torch.tensor([[0]])
    a = torch.tensor([[[0.0, 0.5, -0.7]]])
    for shift in (1e-3, -1e-3):
        rate = ctmc.kl_rate(UNIFORM, x, a + shift, a)
        exact = ctmc.kl_rate(UNIFORM, x, (a + shift).double(), a.double())
        torch.testing.assert_close(rate.double(), exact, rtol=1e-3, atol=0)
    rate = ctmc.kl_rate(UNIFORM, x, a - 100, a)
    torch.testing.assert_close(rate, a[0, 0, 1:].exp().sum()[None] / 3)


def test_kl_rate_gradient():
    """By finite differences, for the policy's scores and for the reference's."""
    x = states(UNIFORM)[:4]
    a, b = (normal(4, L, N, seed=seed).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda a, b: ctmc.kl_rate(UNIFORM, x, a, b), (a, b))


# ---- KL of paths ---------------------------------------------------------------------------------


def masked_chain_kl(log_p: Tensor, log_p_ref: Tensor, t: Tensor) -> tuple[float, float, Tensor]:
    """KL of two absorbing chains: over all paths, as a sum of steps, and the times it sums up to.

    ``log_p`` [S^L, L, N] is a denoiser's table, one row per state.
    """
    x = states(ABSORBING)
    noise = LogLinear().total_noise(t)
    laws = []
    for table in (log_p, log_p_ref):
        chain = []
        for n, m in itertools.pairwise(noise.tolist()):
            level = torch.full((len(x),), n, dtype=torch.float64)
            score = score_from_log_probs(table, x, level, N, N + 1)
            step = ctmc.analytic_probs if m > 0 else ctmc.denoise_probs
            probs = step(ABSORBING, x, score, n - m)
            chain.append(step_matrix(ABSORBING, lambda x, probs=probs: probs))
        laws.append(chain)
    # all paths: P(path) and Q(path), one axis per time
    start = torch.zeros(len(x), dtype=torch.float64)
    start[-1] = 1  # everything masked
    p_path, q_path = start, start
    for p_step, q_step in zip(*laws, strict=True):
        p_path = p_path[..., None] * p_step.T
        q_path = q_path[..., None] * q_step.T
    reached = p_path > 0
    by_path = float((p_path[reached] * (p_path[reached] / q_path[reached]).log()).sum())
    # the sum over steps, at the states the policy's chain visits
    kl_token = (log_p.exp() * (log_p - log_p_ref)).sum(-1) * (x == N)
    p, by_step = start, 0.0
    for k, p_step in enumerate(laws[0]):
        share = float((t[k] - t[k + 1]) / t[k])
        by_step += share * float((p * kl_token.sum(1)).sum())
        p = p_step @ p
    return by_path, by_step, p


def test_kl_of_masked_chains_is_a_sum_over_steps():
    """KL(paths) = sum over steps of (t - s) / t E sum over masks of KL(p || p_ref), by enumeration.

    It is positive for different models although the states are hard tokens, and 0 for equal ones.
    """
    t = torch.tensor([1.0, 0.6, 0.25, 0.0], dtype=torch.float64)
    table, other = (normal((N + 1) ** L, L, N, seed=seed).log_softmax(-1) for seed in (1, 2))
    by_path, by_step, final = masked_chain_kl(table, other, t)
    assert by_path > 0.1
    assert by_path == pytest.approx(by_step, rel=1e-10)
    assert float(final[(states(ABSORBING) == N).any(1)].sum()) == 0
    same, same_by_step, _ = masked_chain_kl(table, table, t)
    assert abs(same) < 1e-12 and same_by_step == 0


def test_kl_rate_of_a_masked_chain_is_that_of_its_steps():
    """dt -> 0 of the sum over steps: rate(t) kl_rate = 1 / t sum over masks of KL(p || p_ref)."""
    x = states(ABSORBING)
    t = torch.full((len(x),), 0.4, dtype=torch.float64)
    tables = [normal(len(x), L, N, seed=seed).log_softmax(-1) for seed in (1, 2)]
    noise = LogLinear().total_noise(t)
    a, b = (score_from_log_probs(table, x, noise, N, N + 1) for table in tables)
    kl_token = (tables[0].exp() * (tables[0] - tables[1])).sum(-1) * (x == N)
    rate = LogLinear().rate(t) * ctmc.kl_rate(ABSORBING, x, a, b)
    torch.testing.assert_close(rate, kl_token.sum(1) / 0.4)


# ---- impossible states ---------------------------------------------------------------------------


@pytest.mark.parametrize("process", ALL)
def test_impossible_states_have_rate_zero_and_no_nan(process):
    """Scores of -inf: probability 0, and finite values and gradients everywhere."""
    x = states(process)
    log_score = normal(len(x), L, process.n_states)
    blocked = normal(len(x), L, process.n_states, seed=5) < -0.3
    blocked[..., 2] = False  # no row without a way out
    blocked.scatter_(-1, x[..., None], False)
    log_score = log_score.masked_fill(blocked, -INF).requires_grad_()
    weight = normal(len(x), L, process.n_states, seed=6)
    for step in (ctmc.euler_probs, ctmc.corrector_probs, ctmc.analytic_probs, ctmc.denoise_probs):
        probs = step(process, x, log_score, 0.1)
        assert bool(probs.isfinite().all())
        if step is ctmc.euler_probs:
            assert bool((probs[blocked] == 0).all())
        (gradient,) = torch.autograd.grad((weight * probs).sum(), log_score)
        assert bool(gradient.isfinite().all()) and bool((gradient != 0).any())
        assert bool((gradient[blocked] == 0).all())
    rates = ctmc.reverse_rates(process, x, log_score)
    assert bool((rates[blocked] == 0).all())
    assert bool((rates.gather(-1, x[..., None]) == 0).all())


@pytest.mark.parametrize("process", ALL)
def test_kl_rate_of_impossible_states(process):
    """s = 0 adds s_ref, both 0 add nothing; s_ref = 0 alone is infinite where there is rate."""
    x = states(process)
    a, b = (normal(len(x), L, process.n_states, seed=seed) for seed in (1, 2))
    blocked = normal(len(x), L, process.n_states, seed=5) < -0.3
    blocked.scatter_(-1, x[..., None], False)
    rates = process.backward_rates(x, torch.float64)
    full = ctmc.kl_rate(process, x, a, b)
    term = rates * (a.exp() * (a - b) - a.exp() + b.exp())

    cut = a.masked_fill(blocked, -INF).requires_grad_()
    rate = ctmc.kl_rate(process, x, cut, b)
    expected = full + torch.where(blocked, rates * b.exp() - term, 0).sum((1, 2))
    torch.testing.assert_close(rate, expected)
    (gradient,) = torch.autograd.grad(rate.sum(), cut)
    assert bool(gradient.isfinite().all())
    open_ = ~blocked & (rates > 0)
    by_hand = torch.where(open_, rates * a.exp() * (a - b), 0)
    torch.testing.assert_close(gradient, by_hand)

    rate = ctmc.kl_rate(process, x, cut, b.masked_fill(blocked, -INF))
    torch.testing.assert_close(rate, full - torch.where(blocked, term, 0).sum((1, 2)))

    only_ref = ctmc.kl_rate(process, x, a, b.masked_fill(blocked, -INF))
    ruled_out = (blocked & (rates > 0)).any(-1).any(-1)
    assert bool(((only_ref == INF) == ruled_out).all())
    torch.testing.assert_close(only_ref[~ruled_out], full[~ruled_out])


def test_entry_at_the_present_token_is_never_read():
    """Any number may stand there: laws, rates and KL do not change, and no gradient goes there."""
    for process in BOTH:
        x = states(process)
        a = normal(len(x), L, process.n_states)
        other = a.scatter(-1, x[..., None], 7.0).requires_grad_()
        for step in (
            ctmc.euler_probs,
            ctmc.corrector_probs,
            ctmc.analytic_probs,
            ctmc.denoise_probs,
        ):
            probs = step(process, x, other, 0.2)
            torch.testing.assert_close(probs, step(process, x, a, 0.2))
            (gradient,) = torch.autograd.grad(probs.square().sum(), other)
            assert bool((gradient.gather(-1, x[..., None]) == 0).all())
            assert bool((gradient != 0).any())
        rate = ctmc.kl_rate(process, x, other, a + 0.1)
        torch.testing.assert_close(rate, ctmc.kl_rate(process, x, a, a + 0.1))
