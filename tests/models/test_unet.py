"""The UNet keeps the promises of its protocol, with and without labels."""

import jaxtyping
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from rescore.models.gaussian_network import GaussianNetwork
from rescore.models.unet import UNet, UNetConfig

B = 3
CONFIG = UNetConfig(channels=2, size=4, n_labels=5, widths=(8, 16, 24))


@pytest.fixture
def unchecked():
    """Annotations are not checked, as for users: the functions' own messages come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def build(config=CONFIG, seed=0) -> UNet:
    """A float64 model of which every weight is drawn, those that start at 0 too."""
    model = config.network(torch.Generator().manual_seed(seed)).double()
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(draw, alpha=0.2)
    return model


def given(seed=1, n=B) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn((n, *CONFIG.shape), generator=generator, dtype=torch.float64)
    t = torch.rand(n, generator=generator, dtype=torch.float64)
    return x_t, t, {"label": torch.randint(5, (n,), generator=generator)}


def test_it_is_a_gaussian_network():
    model = build()
    assert isinstance(model, GaussianNetwork)
    assert model.shape == (2, 4, 4)
    assert (model.schedule, model.prediction) == (CONFIG.schedule, CONFIG.prediction)
    out = model.predict(*given())
    assert (out.shape, out.dtype) == ((B, 2, 4, 4), torch.float64)


def test_the_generator_is_the_only_source_of_the_weights():
    """Equal seeds, equal weights, others other ones; the global generator is left alone."""
    before = torch.get_rng_state()
    one, same, other = (CONFIG.network(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name
        if weight.ndim > 1 and bool(weight.any()):
            assert not torch.equal(weight, other.state_dict()[name]), name


def test_the_weights_can_be_stored():
    """Which asks for the usual order in memory, also after a step of an optimiser."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    model.predict(*given()).square().sum().backward()
    optimizer.step()
    assert load(save(model.state_dict())).keys() == model.state_dict().keys()


def test_a_new_network_says_0():
    x_t, t, inputs = given()
    out = CONFIG.network(torch.Generator()).predict(x_t.float(), t.float(), inputs)
    assert torch.equal(out, torch.zeros_like(out))


def test_every_weight_takes_part():
    """A gradient reaches each, and in the table of labels the rows in use only."""
    model = build()
    x_t, t, _ = given(n=2)
    model.predict(x_t, t, {"label": torch.tensor([1, 4])}).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
    assert model.label.weight.grad is not None
    assert model.label.weight.grad.any(1).tolist() == [False, True, False, False, True, False]


def test_no_label_is_the_last_row():
    """Without the input "label", as with the number behind the last one; a label says more."""
    model = build()
    x_t, t, inputs = given()
    none = model.predict(x_t, t, {})
    assert torch.equal(none, model.predict(x_t, t, {"label": torch.full((B,), 5)}))
    assert bool((none != model.predict(x_t, t, inputs)).flatten(1).any(1).all())


def test_samples_do_not_influence_each_other():
    model = build()
    x_t, t, inputs = given()
    whole = model.predict(x_t, t, inputs)
    for row in range(B):
        some = {"label": inputs["label"][row : row + 1]}
        alone = model.predict(x_t[row : row + 1], t[row : row + 1], some)
        torch.testing.assert_close(alone[0], whole[row])


@pytest.mark.parametrize("which", ["t", "label"])
def test_time_and_label_of_a_sample_are_its_own(which):
    """Those of one sample, changed, change its output and no other's."""
    model = build()
    x_t, t, inputs = given()
    before = model.predict(x_t, t, inputs)
    if which == "t":
        t[1] = 0.02  # of about 1 / 1000 the sines should tell
        before = model.predict(x_t, t.clone(), inputs)
        t[1] += 0.001
    else:
        inputs["label"][1] = (inputs["label"][1] + 1) % 5
    change = (model.predict(x_t, t, inputs) - before).abs().flatten(1).amax(1)
    assert change[1] > 0.02 * before[1].std()
    torch.testing.assert_close(change[[0, 2]], torch.zeros(2, dtype=torch.float64))


def test_an_output_sees_the_whole_image():
    """Through the lowest resolution; and its own pixel by the finest one."""
    model = build()
    x_t, t, inputs = given(n=1)
    x_t.requires_grad_()
    (slope,) = torch.autograd.grad(model.predict(x_t, t, inputs)[0, 0, 0, 0], x_t)
    assert bool((slope != 0).all())


def test_the_finest_resolution_is_passed_across():
    """With nothing coming up from below, the image still tells."""
    model = build()
    x_t, t, inputs = given()
    with torch.no_grad():
        for parameter in model.grow[0].parameters():
            parameter.zero_()
    assert not torch.allclose(model.predict(x_t, t, inputs), model.predict(-x_t, t, inputs))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"n_labels": -1}, "n_labels must be at least 0, got -1"),
        ({"widths": ()}, "widths must be positive multiples of 8"),
        ({"widths": (8, 12)}, "widths must be positive multiples of 8"),
        ({"size": 6, "widths": (8, 8, 8)}, "size=6 cannot be halved 2 times"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)


@pytest.mark.parametrize("label", [-1, 6])
def test_an_unknown_label_is_refused(label):
    x_t, t, inputs = given()
    inputs["label"][0] = label
    with pytest.raises(ValueError, match="expected 0 to 4, or 5 for none"):
        build().predict(x_t, t, inputs)


def test_images_of_another_shape_are_refused(unchecked):
    x_t, t, inputs = given()
    with pytest.raises(ValueError, match=r"shape \(2, 2, 4\); expected \(2, 4, 4\)"):
        build().predict(x_t[:, :, :2], t, inputs)
