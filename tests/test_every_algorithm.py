"""The contract of an algorithm, for every one that the package holds: nobody has to register.

Each is tried on every kind of process that it does not refuse, its variants on one of each sort.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing

import pytest
import torch
from torch import Tensor, nn

import rescore.algorithms
from gaussians import GaussianTask, linear_network
from rescore.algorithms.base import Algorithm
from rescore.models.critics import Critic, critic_for
from rescore.models.denoiser import SubsScores
from rescore.models.tiny import MlpDenoiser
from rescore.models.value import ValueCritic
from rescore.processes.ctmc import Uniform
from rescore.processes.schedules import LogLinear
from rescore.sampling.decoder import Decoder, Decoding, GaussianDecoder, RateDecoder, Solver
from rescore.sampling.gaussian_policy import GaussianPolicy
from rescore.sampling.policy import MaskedPolicy, Models, Policy, RatePolicy
from rescore.sampling.record import Record
from rescore.sampling.rng import SampleRng
from rescore.types import Credited, Given, MaskedTrajectory, Prompts, Scored, Stage, Terms
from tiny import TableScores

V, L, T, B = 3, 8, 8, 6
RNG = SampleRng(3, torch.arange(B))


def algorithms() -> list[type[Algorithm]]:
    """Every concrete subclass defined in a module of ``rescore.algorithms``."""
    found = []
    for info in pkgutil.iter_modules(rescore.algorithms.__path__):
        module = importlib.import_module(f"rescore.algorithms.{info.name}")
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, Algorithm) and member.__module__ == module.__name__:
                found.append(member)
    return [algorithm for algorithm in found if not inspect.isabstract(algorithm)]


NEEDS = {"lam_schedule": {"lam": 0.5}}
"""What a field has no effect without."""


def variants() -> list[Algorithm]:
    """Every algorithm as it comes, and with each other choice of each field that lists some.

    Also with a KL, where there is one to turn on.
    """
    found = []
    for kind in algorithms():
        found.append(kind())
        if getattr(kind(), "beta", None) == 0:
            found.append(dataclasses.replace(kind(), beta=0.1))
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            for choice in choices(hints[field.name]):
                if choice != field.default:
                    changes = {field.name: choice, **NEEDS.get(field.name, {})}
                    found.append(dataclasses.replace(kind(), **changes))
    return found


def choices(hint: object) -> list[object]:
    """The values of a ``Literal``, or of all of them in a union."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [value for part in typing.get_args(hint) for value in choices(part)]


def name_of(algorithm: Algorithm) -> str:
    """The class and what differs from its defaults."""
    changed = [
        f"{f.name}={getattr(algorithm, f.name)}"
        for f in dataclasses.fields(algorithm)
        if getattr(algorithm, f.name) != getattr(type(algorithm)(), f.name)
    ]
    return " ".join([type(algorithm).__name__, *changed])


def policy(seed: int) -> MaskedPolicy:
    denoiser = MlpDenoiser(V, L, generator=torch.Generator().manual_seed(seed))
    return MaskedPolicy(denoiser, Decoder(steps=T, blocks=2, temperature=0.7))


def rate_policy(seed: int) -> RatePolicy:
    decoder = RateDecoder(steps=T - 1, corrector_steps=1, noise=LogLinear(0.1))
    return RatePolicy(TableScores(Uniform(V), L, seed=seed), decoder)


def masked_rate_policy(seed: int) -> RatePolicy:
    return dataclasses.replace(rate_policy(0), network=SubsScores(policy(seed).denoiser))


def gaussian(solver: Solver, theta: float) -> GaussianPolicy:
    decoder = GaussianDecoder(steps=T, solver=solver, t_max=0.98)
    return GaussianPolicy(linear_network(theta=(theta, -theta)), decoder)


TASK = GaussianTask(labels=3)
WORLDS: dict[str, tuple[Policy, Policy, Policy]] = {
    "masked": (policy(0), policy(1), policy(2)),
    "uniform": (rate_policy(0), rate_policy(1), rate_policy(2)),
    "masked rates": (masked_rate_policy(0), masked_rate_policy(1), masked_rate_policy(2)),
    "gaussian": (gaussian("ddim", 0.0), gaussian("ddim", 0.05), gaussian("ddim", 0.1)),
    "two steps": (
        gaussian("dpm_solver_2m_sde", 0.0),
        gaussian("dpm_solver_2m_sde", 0.05),
        gaussian("dpm_solver_2m_sde", 0.1),
    ),
}
"""Old policy, new policy and reference of every kind of process."""


CONTINUOUS = ("gaussian", "two steps")


def decoder_of(policy: Policy) -> Decoding:
    assert isinstance(policy, MaskedPolicy | RatePolicy | GaussianPolicy)
    return policy.decoder


def serves(algorithm: Algorithm, kind: str) -> bool:
    """Whether the method takes this kind of process."""
    old = WORLDS[kind][0]
    try:
        algorithm.check(decoder_of(old), 3, ["reward"])
        algorithm.check_process(uniform=kind == "uniform")
        algorithm.check_models(Models(old))
    except ValueError:
        return False
    return True


def cases() -> list[tuple[Algorithm, str]]:
    """Every method with every kind of process that it takes; its variants with one of each sort."""
    found = []
    for variant in variants():
        kinds = [kind for kind in WORLDS if serves(variant, kind)]
        if variant != type(variant)():
            sorts = [[k for k in kinds if (k in CONTINUOUS) is sort] for sort in (False, True)]
            kinds = [sort[0] for sort in sorts if sort]
        found += [(variant, kind) for kind in kinds]
    return found


every_algorithm = pytest.mark.parametrize("kind", algorithms(), ids=lambda kind: kind.__name__)
every_case = pytest.mark.parametrize(
    ("algorithm", "kind"),
    cases(),
    ids=lambda part: part if isinstance(part, str) else name_of(part),
)


def models_of(algorithm: Algorithm, kind: str, policy: Policy) -> Models:
    ref, critic = WORLDS[kind][2] if algorithm.uses_reference else None, None
    if algorithm.uses_critic:
        if isinstance(policy, GaussianPolicy):
            critic = algorithm.critic(TASK, policy.decoder, 0)
        else:
            critic = critic_for(prompts(), V + 1, 0)
        assert isinstance(critic, Critic | ValueCritic)
        critic.fitted.fill_(1)  # before that there is nothing to train on
    return Models(policy, ref, critic)


def weights_of(policy: Policy) -> list[nn.Parameter]:
    """The parameters of its network."""
    if isinstance(policy, MaskedPolicy):
        network = policy.denoiser
    else:
        assert isinstance(policy, RatePolicy | GaussianPolicy)
        network = policy.network
        network = network.network if isinstance(network, SubsScores) else network
    assert isinstance(network, nn.Module)
    return list(network.parameters())


GROUP = torch.tensor([0, 1, 1, 0, 1, 0])
"""Two groups of three, interleaved."""


def prompts() -> Prompts:
    """One prompt leaves eight blanks, the other five."""
    group = GROUP
    editable = torch.arange(L)[None] >= 3 * group[:, None]
    return Prompts(
        tokens=torch.where(editable, V, 1),
        editable=editable,
        group=group,
        sample_id=torch.arange(B),
        info={},
    )


def score(algorithm: Algorithm, kind: str) -> Scored:
    """Sample, select, reward at random (also the completions, if there are any), annotate."""
    old = WORLDS[kind][0]
    given: Given = prompts()
    if isinstance(old, GaussianPolicy):
        given = dataclasses.replace(TASK.prompts("train", GROUP), group=GROUP)
    trajectory = old.sample(given, algorithm.record, RNG)
    models = models_of(algorithm, kind, old)
    selected = algorithm.select(models, trajectory)
    generator = torch.Generator().manual_seed(5)
    reward = torch.rand(B, generator=generator, dtype=torch.float64)
    completion_terms = {}
    if selected.completion is not None:
        value = torch.rand(selected.step.shape, generator=generator, dtype=torch.float64)
        completion_terms = {"reward": value}
    scored = Scored(
        **{**selected.fields(), "completion": None},
        reward=reward,
        terms={"reward": reward},
        completion_terms=completion_terms,
    )
    return algorithm.annotate(models, scored, SampleRng(0, scored.trajectory.prompts.sample_id))


def loss(
    algorithm: Algorithm, kind: str, credited: Credited, pairs: Tensor
) -> tuple[Tensor, Terms]:
    """The weighted sum that a micro-batch adds, and its terms."""
    actions = credited.actions(pairs)
    terms = algorithm.loss(models_of(algorithm, kind, WORLDS[kind][1]), actions, RNG)
    return (actions.weight * terms.loss).sum(), terms


def gradient(
    algorithm: Algorithm, kind: str, credited: Credited, pairs: Tensor, size: int
) -> list[Tensor]:
    """The gradient accumulated over micro-batches of ``size`` pairs."""
    weights = weights_of(WORLDS[kind][1])
    total = [torch.zeros_like(weight) for weight in weights]
    for part in pairs.split(size):
        value, _ = loss(algorithm, kind, credited, part)
        found = torch.autograd.grad(value, weights)
        total = [t + g for t, g in zip(total, found, strict=True)]
    return total


def tensors(stage: Stage) -> list[Tensor]:
    """Copies of every tensor in a stage, in order."""
    copies: list[Tensor] = []

    def copy(tensor: Tensor) -> Tensor:
        copies.append(tensor.clone())
        return tensor

    stage.map(copy)
    return copies


def same(a: Stage, b: Stage) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_the_algorithms_are_found():
    """The walk is not empty."""
    assert {"Reinforce", "Egspo"} <= {kind.__name__ for kind in algorithms()}


@pytest.mark.parametrize("algorithm", variants(), ids=name_of)
def test_every_variant_is_tried(algorithm):
    """None escapes by refusing everything."""
    assert any(serves(algorithm, kind) for kind in WORLDS)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Reinforce", ["masked", "uniform", "masked rates", "gaussian", "two steps"]),
        ("Egspo", ["masked"]),
        ("Sepo", ["uniform", "masked rates"]),
        ("Ddpo", ["gaussian", "two steps"]),
        ("Dpok", ["gaussian", "two steps"]),
        ("FlowGrpo", ["gaussian", "two steps"]),
        ("ScoreAsAction", ["gaussian", "two steps"]),
    ],
)
def test_a_method_takes_what_it_is_for(name, kinds):
    """As it comes, and nothing else."""
    (kind,) = [kind for kind in algorithms() if kind.__name__ == name]
    assert [world for world in WORLDS if serves(kind(), world)] == kinds


@every_algorithm
def test_an_algorithm_is_its_own_frozen_configuration(kind):
    """Constructible from defaults, immutable, hashable, equal to its equals."""
    algorithm = kind()
    assert dataclasses.is_dataclass(algorithm)
    assert kind() == algorithm and hash(kind()) == hash(algorithm)
    assert dataclasses.fields(algorithm)
    for field in dataclasses.fields(algorithm):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(algorithm, field.name, getattr(algorithm, field.name))
    with pytest.raises(TypeError):
        kind(*[getattr(algorithm, f.name) for f in dataclasses.fields(algorithm)])


@every_algorithm
def test_an_algorithm_names_its_source(kind):
    """BibTeX that closes its braces; a module docstring with "Source:" and a year."""
    assert re.match(r"@\w+\{[\w-]+,\n", kind.citation) and kind.citation.endswith("\n}")
    assert kind.citation.count("{") == kind.citation.count("}")
    assert {"title", "author", "year"} <= set(re.findall(r"(\w+)\s*=\s*\{", kind.citation))
    source = inspect.getdoc(inspect.getmodule(kind)) or ""
    assert re.search(r"Source: .*?(arXiv:\d{4}\.\d{4,5}|\b(19|20)\d\d\b)", source, re.DOTALL)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")


@every_algorithm
def test_every_field_says_what_it_is(kind):
    """A string under each field that the class itself declares."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            documented = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            assert documented, ast.unparse(node.target)


@every_case
def test_the_stages_have_their_shapes(algorithm, kind):
    """record -> select -> annotate -> credit -> loss on a tiny world; the numbers are finite."""
    assert isinstance(algorithm.record, Record)
    scored = score(algorithm, kind)
    assert scored.step.shape == scored.step_weight.shape
    assert scored.step.dtype == torch.long
    assert scored.trajectory.n_steps == T
    assert bool(((scored.step >= 0) & (scored.step <= T)).all())  # T: the finished sample
    assert bool((scored.step_weight >= 0).all()) and bool((scored.step_weight > 0).any(1).all())
    assert all(note.shape[:2] == scored.step.shape for note in scored.notes.values())
    credited = algorithm.credit(scored)
    assert isinstance(credited, Credited)
    assert credited.advantage.shape == credited.weight.shape == scored.step.shape
    path = credited.trajectory
    acts = path.revealed() > 0 if isinstance(path, MaskedTrajectory) else path.acts()
    acts = acts | (not algorithm.uses_likelihood)
    finished = torch.ones(B, 1, dtype=torch.bool)
    idle = ~torch.cat([acts, finished], 1).gather(1, credited.step)
    assert bool((credited.weight[idle | (credited.step_weight == 0)] == 0).all())
    assert bool((credited.weight >= 0).all())
    pairs = credited.pairs()
    value, terms = loss(algorithm, kind, credited, pairs)
    assert terms.loss.shape == (len(pairs),)
    assert value.requires_grad and bool(terms.loss.isfinite().all())
    for name, metric in terms.metrics.items():
        assert metric.shape == (len(pairs),), name
        assert not metric.requires_grad and bool(metric.isfinite().all()), name


@every_case
def test_credit_is_pure(algorithm, kind):
    """Twice the same result, the input unchanged, and no gradient anywhere in it."""
    scored = score(algorithm, kind)
    before = tensors(scored)
    credited = algorithm.credit(scored)
    assert same(algorithm.credit(scored), credited)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(scored), strict=True))
    assert not any(tensor.requires_grad for tensor in tensors(credited))


@every_case
def test_credit_does_not_depend_on_the_order_of_the_samples(algorithm, kind):
    """Permuting the batch permutes the credit."""
    scored = score(algorithm, kind)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    permuted, whole = algorithm.credit(scored.take(order)), algorithm.credit(scored)
    torch.testing.assert_close(permuted.advantage, whole.advantage[order])
    torch.testing.assert_close(permuted.weight, whole.weight[order])


@every_case
def test_a_term_belongs_to_its_pair(algorithm, kind):
    """Permuting the pairs permutes loss and metrics."""
    credited = algorithm.credit(score(algorithm, kind))
    pairs = credited.pairs()
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    _, terms = loss(algorithm, kind, credited, pairs)
    _, permuted = loss(algorithm, kind, credited, pairs[order])
    torch.testing.assert_close(permuted.loss, terms.loss[order])
    assert set(permuted.metrics) == set(terms.metrics)
    for name, metric in terms.metrics.items():
        torch.testing.assert_close(permuted.metrics[name], metric[order])


@every_case
def test_the_gradient_does_not_depend_on_the_micro_batches(algorithm, kind):
    """Any split of the pairs adds up to the same gradient, which is not zero."""
    credited = algorithm.credit(score(algorithm, kind))
    pairs = credited.pairs()
    whole = gradient(algorithm, kind, credited, pairs, len(pairs))
    assert any(bool(g.abs().max() > 1e-6) for g in whole)
    for size in (1, 5, 16):
        for a, b in zip(gradient(algorithm, kind, credited, pairs, size), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@every_case
def test_the_loss_leaves_the_batch_alone(algorithm, kind):
    """No tensor of the micro-batch is written to, and only the new policy gets a gradient."""
    credited = algorithm.credit(score(algorithm, kind))
    before = tensors(credited)
    value, _ = loss(algorithm, kind, credited, credited.pairs())
    reference = weights_of(WORLDS[kind][2])
    reference = torch.autograd.grad(value, reference, allow_unused=True)
    assert all(g is None for g in reference)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(credited), strict=True))
