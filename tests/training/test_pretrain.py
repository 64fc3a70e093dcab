"""Pre-training: reproducible, learns what there is to learn, and cached whole or not at all."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from jaxtyping import Int
from torch import Tensor, nn

from gaussians import GaussianTask
from rescore.models.transformer import Transformer, TransformerConfig
from rescore.models.unet import UNetConfig
from rescore.processes.gaussian_schedules import DiscreteTable
from rescore.processes.schedules import Cosine
from rescore.rewards.reward import Reward
from rescore.tasks.task import Split, TokenTask
from rescore.training.pretrain import Pretrain, cached_base, pretrain
from rescore.training.supervised import MIN_T, bound, rate, stratified_times, validation_bound
from rescore.types import Examples, Points, Prompts

V, L = 3, 4


@dataclass(frozen=True, kw_only=True)
class Repeat(TokenTask):
    """Sequences of one repeated token: the exact likelihood of each is 1 / V."""

    copies: int = 4
    first: int = 0

    @property
    def vocab_size(self) -> int:
        return V

    def symbol(self, token: int) -> str:
        return "abc"[token]

    @property
    def length(self) -> int:
        return L

    @property
    def reward(self) -> Reward:
        raise NotImplementedError

    def size(self, split: Split) -> int:
        raise NotImplementedError

    def prompts(self, split: Split, index: Int[Tensor, " B"]) -> Prompts:
        raise NotImplementedError

    def clean(self, split: Split) -> Examples:
        x_0 = torch.arange(V).roll(self.first)[:, None].expand(V, L).repeat(self.copies, 1)
        return Examples(x_0=x_0, editable=torch.ones_like(x_0, dtype=torch.bool))

    def gold(self, prompts: Prompts) -> Int[Tensor, "B L"]:
        raise NotImplementedError

    def read(self, texts: Sequence[str]) -> Prompts:
        raise NotImplementedError

    def show(self, tokens: Int[Tensor, " L"]) -> str:
        raise NotImplementedError


SHAPE = TransformerConfig(vocab_size=V, length=L, width=16, depth=1, heads=2)
SHORT = Pretrain(
    model=SHAPE, steps=6, batch=8, lr=0.01, warmup=2, validate_every=4, validation_rows=20
)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns_the_law_of_the_data():
    """The bound falls from L log V towards its floor log V, and a seen token is repeated."""
    config = dataclasses.replace(
        SHORT, steps=150, batch=32, validate_every=50, validation_rows=240, weight_decay=0.0
    )
    rows = []
    model = pretrain(config, Repeat(), progress=rows.append)
    assert [row.step for row in rows] == [0, 50, 100, 150]
    assert rows[0].validation == pytest.approx(L * math.log(V), rel=0.05)
    assert 0 < rows[-1].validation - math.log(V) < 0.1
    assert rows[-1].train == pytest.approx(math.log(V), rel=0.2)
    assert isinstance(model, Transformer)
    probs = model.predict(torch.tensor([[2, V, V, V]])).softmax(-1)
    assert bool((probs[0, 1:, 2] > 0.95).all())


def test_the_same_arguments_give_the_same_bits():
    """Weights and log depend on configuration and data, not on the global generator."""
    first_rows, second_rows = [], []
    state = torch.get_rng_state()
    first = pretrain(SHORT, Repeat(), progress=first_rows.append)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second = pretrain(SHORT, Repeat(), progress=second_rows.append)
    assert equal(first, second)
    assert first_rows == second_rows
    assert [row.step for row in first_rows] == [0, 4, 6]
    other = pretrain(SHORT, Repeat(), seed=1)
    assert not equal(first, other)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"weight_decay": 3.0},
        {"warmup": 0},
        {"clip": 1e-6},
        {"schedule": Cosine()},
        {"batch": 9},
    ],
)
def test_every_field_of_the_training_matters(change):
    """No dead option."""
    changed = pretrain(dataclasses.replace(SHORT, **change), Repeat())
    assert not equal(changed, pretrain(SHORT, Repeat()))


def test_watching_more_often_changes_nothing():
    """Validation draws from a generator of its own."""
    often = dataclasses.replace(SHORT, validate_every=1, validation_rows=7)
    assert equal(pretrain(often, Repeat()), pretrain(SHORT, Repeat()))


def test_the_validation_masks_are_fixed():
    """With a learning rate of nearly 0 every row reports the same number."""
    rows = []
    still = dataclasses.replace(SHORT, lr=1e-30, validate_every=1)
    pretrain(still, Repeat(), progress=rows.append)
    assert len({row.validation for row in rows}) == 1


def test_start_continues_from_a_copy():
    """The given network is where training starts, and it is left as it was."""
    base = pretrain(SHORT, Repeat())
    before = {name: value.clone() for name, value in base.state_dict().items()}
    rows = []
    further = pretrain(SHORT, Repeat(), start=base, progress=rows.append)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not equal(base, further)
    ended = []
    pretrain(SHORT, Repeat(), progress=ended.append)
    assert rows[0].validation == ended[-1].validation


def test_times_are_stratified():
    """One time in each of B equal parts of [MIN_T, 1], and each part is covered to its ends."""
    low = stratified_times(torch.zeros(5, dtype=torch.float64))
    high = stratified_times(torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(low[0], torch.tensor(MIN_T).double())
    torch.testing.assert_close(high[-1], torch.tensor(1.0).double())
    torch.testing.assert_close(low[1:], high[:-1])
    torch.testing.assert_close(high - low, torch.full((5,), (1 - MIN_T) / 5).double())


def test_bound_of_a_uniform_model_by_hand():
    """Each masked token costs log V, weighted by 1 / t; the rest is free."""
    model = Transformer(SHAPE, generator=torch.Generator())
    with torch.no_grad():
        model.head.weight.zero_()
    x_0 = torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1]])
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)
    u = torch.tensor([[0.1, 0.6, 0.7, 0.2], [0.74, 0.76, 0.1, 0.2]], dtype=torch.float64)
    examples = Examples(x_0=x_0, editable=torch.ones_like(x_0, dtype=torch.bool))
    expected = torch.tensor([2 * math.log(V) / 0.5, math.log(V) / 0.25])
    torch.testing.assert_close(bound(model, examples, t, u, SHORT).detach(), expected)


def test_the_validation_bound_of_a_known_law_is_exact():
    """All sequences of one repeated token: once a token is seen the rest cost nothing.

    A denoiser that knows this pays log V for each of the L tokens of a fully masked canvas, which
    is one canvas in L. Without that knowledge it pays log V for every token.
    """
    model = Transformer(SHAPE, generator=torch.Generator())
    with torch.no_grad():
        model.head.weight.zero_()
    assert validation_bound(model, Repeat().clean("validation"), SHORT) == pytest.approx(
        L * math.log(V), abs=1e-6
    )

    class Knows(Transformer):
        def predict(self, x_t, *, attend=None, positions=None):
            seen = torch.where(x_t == V, -1, x_t).amax(1)
            return 50.0 * torch.nn.functional.one_hot(seen + 1, V + 1)[:, None, 1:].expand(-1, L, V)

    model = Knows(SHAPE, generator=torch.Generator())
    got = validation_bound(model, Repeat().clean("validation"), SHORT)
    assert got == pytest.approx(math.log(V), abs=1e-6)


# ---- examples with prompts and padding -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Copy(Repeat):
    """Two given tokens, the same two again to be written, and padding that means nothing."""

    filler: int = 0

    @property
    def length(self) -> int:
        return 5

    def clean(self, split: Split) -> Examples:
        pair = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        x_0 = torch.cat([pair, pair, torch.full((len(pair), 1), self.filler)], 1)
        x_0[1::2, 4] = (self.filler + 1) % V
        editable = torch.tensor([False, False, True, True, False]).expand(len(pair), -1)
        attend = torch.tensor([True, True, True, True, False]).expand(len(pair), -1)
        return Examples(x_0=x_0, editable=editable, attend=attend)


LONGER_SHAPE = dataclasses.replace(SHAPE, length=5)
LONGER = dataclasses.replace(SHORT, model=LONGER_SHAPE)


class Watched(Transformer):
    """Remembers the canvases it was shown."""

    def predict(self, x_t, *, attend=None, positions=None):
        SEEN.append((x_t.clone(), attend))
        return super().predict(x_t, attend=attend, positions=positions)


SEEN: list[tuple[Tensor, Tensor | None]] = []


def test_only_editable_positions_are_masked():
    """Prompts and padding are shown as they are, in training and in validation."""
    SEEN.clear()
    start, task = Watched(LONGER_SHAPE, generator=torch.Generator()), Copy()
    pretrain(LONGER, task, start=start)
    shown = torch.cat([x_t for x_t, _ in SEEN])
    masked = shown == V
    assert not bool(masked[:, [0, 1, 4]].any())
    assert bool(masked[:, [2, 3]].any(0).all()) and not bool(masked[:, [2, 3]].all())
    unmasked = ~masked[:, 2:4]
    assert torch.equal(shown[:, 2:4][unmasked], shown[:, 0:2][unmasked])
    assert all(
        attend is not None and attend.shape == x_t.shape and not bool(attend[:, 4].any())
        for x_t, attend in SEEN
    )


def test_padding_has_no_influence():
    """Other tokens under ``attend`` False: the same losses and weights; else they would count."""
    first, second = [], []
    model = pretrain(LONGER, Copy(), progress=first.append)
    assert equal(model, pretrain(LONGER, Copy(filler=2), progress=second.append))
    assert first == second

    class Unpadded(Copy):
        def clean(self, split: Split) -> Examples:
            return dataclasses.replace(super().clean(split), attend=None)

    read = pretrain(LONGER, Unpadded())
    assert not equal(read, model)
    assert not equal(read, pretrain(LONGER, Unpadded(filler=2)))


def test_a_conditional_task_is_learned():
    """Given the first two tokens the others are certain: the bound falls from 2 log V to 0."""
    config = dataclasses.replace(
        LONGER, steps=150, batch=32, validate_every=150, validation_rows=180, weight_decay=0.0
    )
    rows, task = [], Copy()
    model = pretrain(config, task, progress=rows.append)
    assert rows[0].validation == pytest.approx(2 * math.log(V), rel=0.1)
    assert rows[-1].validation < 0.1
    data = task.clean("test")
    x_t = torch.where(data.editable, V, data.x_0)
    assert isinstance(model, Transformer)
    filled = model.predict(x_t, attend=data.attend).argmax(-1)
    assert torch.equal(filled[data.editable], data.x_0[data.editable])


def test_the_validation_bound_counts_editable_positions():
    """A uniform model pays log V for each of them, whatever else is on the canvas."""
    model = Transformer(LONGER_SHAPE, generator=torch.Generator())
    with torch.no_grad():
        model.head.weight.zero_()
    data = Copy().clean("validation")
    assert validation_bound(model, data, LONGER) == pytest.approx(2 * math.log(V), abs=1e-6)
    uneven = data.editable.clone()
    uneven[::3, 3] = False  # three of nine sequences have one editable position
    some = dataclasses.replace(data, editable=uneven)
    config = dataclasses.replace(LONGER, validation_rows=180)
    mean = (3 * 1 + 6 * 2) / 9 * math.log(V)
    assert validation_bound(model, some, config) == pytest.approx(mean, abs=1e-6)


def test_the_cache_knows_prompts_and_padding(tmp_path):
    """The same tokens with other editable positions, or other padding, are another base."""

    class Shifted(Copy):
        def clean(self, split: Split) -> Examples:
            data = super().clean(split)
            return dataclasses.replace(data, editable=data.editable.roll(-1, 1))

    class Unpadded(Copy):
        def clean(self, split: Split) -> Examples:
            return dataclasses.replace(super().clean(split), attend=None)

    for n, task in enumerate((Copy(), Shifted(), Unpadded()), start=1):
        cached_base(LONGER, task, tmp_path)
        assert len(list(tmp_path.iterdir())) == n


@dataclass(frozen=True, kw_only=True)
class Squares(GaussianTask):
    """Images of 2 x 2."""

    dims: int = 4

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, 2, 2)

    def clean(self, split: Split) -> Points:
        return Points(x_0=super().clean(split).x_0.view(-1, 1, 2, 2))


def test_the_cache_knows_every_entry_of_a_table(tmp_path):
    """The text of a long tensor leaves out what is in between; the same table is found again."""
    table = (1 - torch.linspace(1e-4, 0.02, 1200, dtype=torch.float64)).cumprod(0)
    other = table.clone()
    other[600] *= 1 + 1e-12
    for n, entries in ((1, table), (2, other), (2, table.clone())):
        model = UNetConfig(size=2, widths=(8,), schedule=DiscreteTable(entries), prediction="v")
        cached_base(dataclasses.replace(SHORT, model=model), Squares(), tmp_path)
        assert len(list(tmp_path.iterdir())) == n
    logs = [json.loads(path.read_text()) for path in tmp_path.glob("*/base.json")]
    stored = [log["config"]["model"]["schedule"]["alphas_cumprod"] for log in logs]
    assert sorted(stored) == sorted([table.tolist(), other.tolist()])


def test_the_learning_rate_rises_linearly_and_falls_along_a_half_cosine():
    """By hand for 2 steps of warm-up out of 6."""
    expected = [1 / 3, 2 / 3 * (1 + math.cos(math.pi / 6)) / 2, 0.75, 0.5, 0.25]
    for step, value in enumerate(expected):
        assert rate(step, SHORT) == pytest.approx(value)


def test_the_cache_returns_the_trained_weights_without_training(tmp_path):
    """The second call loads: no progress, the same bits; the log is beside the weights."""
    rows, silence = [], []
    first = cached_base(SHORT, Repeat(), tmp_path / "cache", progress=rows.append)
    second = cached_base(SHORT, Repeat(), tmp_path / "cache", progress=silence.append)
    assert equal(first, second)
    assert equal(first, pretrain(SHORT, Repeat()))
    assert silence == []
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["base.json", "base.safetensors"]
    written = json.loads((folder / "base.json").read_text())
    assert written["log"] == [dataclasses.asdict(row) for row in rows]
    assert written["config"]["schedule"] == "Linear"
    assert written["config"]["model"]["width"] == 16


def test_another_configuration_or_other_data_is_another_base(tmp_path):
    """The key covers every field, the kind of schedule and the data."""
    cached_base(SHORT, Repeat(), tmp_path)
    cached_base(SHORT, Repeat(), tmp_path, seed=1)
    cached_base(dataclasses.replace(SHORT, schedule=Cosine()), Repeat(), tmp_path)
    cached_base(SHORT, Repeat(copies=5), tmp_path)
    cached_base(SHORT, Repeat(first=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    path.write_bytes(b"not a safetensors file")


@pytest.mark.parametrize("damage", [truncate, foreign, lambda path: path.unlink()])
def test_a_damaged_base_is_refused_with_its_folder_named(tmp_path, damage):
    """Never half-loaded, never silently replaced."""
    cached_base(SHORT, Repeat(), tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder / "base.safetensors")
    with pytest.raises(ValueError, match=f"{folder} is damaged .* delete that folder"):
        cached_base(SHORT, Repeat(), tmp_path)


def test_build_trains_or_loads_the_base_of_the_given_seed(tmp_path):
    """The seed of the run is the seed of its base; the second call loads."""
    lines, silence = [], []
    task, device = Repeat(), "cpu"
    model = SHORT.build(task, seed=5, cache=tmp_path, device=device, note=lines.append)
    again = SHORT.build(task, seed=5, cache=tmp_path, device=device, note=silence.append)
    assert equal(model, pretrain(SHORT, Repeat(), seed=5))
    assert equal(model, again)
    assert [line.split(":")[0] for line in lines] == [f"pre-training step {k}" for k in (0, 4, 6)]
    assert silence == []


def test_continued_trains_a_copy_for_longer_the_more_time_it_gets():
    """The base stays as it was; a budget of CPU-seconds buys steps."""
    base = pretrain(SHORT, Repeat())
    before = {name: value.clone() for name, value in base.state_dict().items()}
    last_step = []
    for cpu_s in (0.0, 0.3):
        lines = []
        further = SHORT.continued(base, Repeat(), seed=0, cpu_s=cpu_s, note=lines.append)
        last_step.append(int(lines[-1].split(":")[0].rpartition(" ")[2]))
        assert not equal(base, further)
    assert last_step[0] == 1
    assert last_step[1] > 3
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_an_interrupted_training_leaves_nothing_behind(tmp_path):
    """Only a finished base is ever visible in the cache."""

    def interrupt(row):
        if row.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_base(SHORT, Repeat(), tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_race_for_the_same_base(tmp_path):
    """The one that finishes second keeps the first one's files and removes its own."""

    def other_process(row):
        if row.step == 6:
            cached_base(SHORT, Repeat(), tmp_path)

    model = cached_base(SHORT, Repeat(), tmp_path, progress=other_process)
    assert equal(model, pretrain(SHORT, Repeat()))
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unwritable_cache_is_an_error(tmp_path):
    """A folder below a regular file cannot be made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        cached_base(SHORT, Repeat(), tmp_path / "file" / "cache")


def test_a_model_that_does_not_fit_the_task_is_refused():
    """The message states both shapes."""
    config = dataclasses.replace(SHORT, model=dataclasses.replace(SHAPE, vocab_size=5))
    with pytest.raises(ValueError, match="vocab_size 5 and length 4 for a task of vocab_size 3"):
        pretrain(config, Repeat())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    """The message names the field."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **change)
