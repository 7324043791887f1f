import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints
from torch.testing import assert_close

from pyro_iaf import AutoHierarchicalIAF, AutoIAF
from pyro_iaf.models.bijections import CovarianceTransform

SIZES = {1: 1, 2: 3, 3: 6, 4: 10}


@pytest.mark.parametrize("size", SIZES)
def test_covariances_come_there_and_back(size):
    transform, x = CovarianceTransform(), torch.randn(3, 2, SIZES[size])
    y = transform(x)
    assert y.shape == transform.forward_shape(x.shape) == (3, 2, size, size)
    assert x.shape == transform.inverse_shape(y.shape)
    assert transform.codomain.check(y).all()
    assert_close(transform.inv(y), x)
    assert_close(transform(transform.inv(y)), y)


@pytest.mark.parametrize("size", SIZES)
def test_their_log_det_agrees_with_autograd(size):
    transform, x = CovarianceTransform(), torch.randn(SIZES[size])
    rows, columns = torch.tril_indices(size, size)
    slope = torch.func.jacfwd(lambda x: transform(x)[rows, columns])(x)
    assert_close(transform.log_abs_det_jacobian(x, transform(x)), slope.det().abs().log())


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"1, 3, 6, 10.*got 4"):
        CovarianceTransform().forward_shape((2, 4))


def mixture(parts):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)


MIXTURES = {
    "real": lambda: dist.Normal(torch.zeros(2), 1.0),
    "positive": lambda: dist.Gamma(torch.ones(2), 1.0),
    "one interval": lambda: dist.Uniform(torch.full((2,), -1.0), 3.0),
    "intervals of rows": lambda: dist.Uniform(torch.tensor([[0.0], [5.0]]).expand(2, 2), 9.0),
    "simplexes": lambda: dist.Dirichlet(torch.ones(2, 3)),
    "vectors": lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(1),
    "intervals of vectors": lambda: dist.Uniform(
        torch.tensor([0.0, 5.0]).expand(2, 2), 9.0
    ).to_event(1),
    "covariances": lambda: dist.Wishart(torch.full((2,), 5.0), torch.eye(2)),
}


@pytest.mark.filterwarnings("ignore:Singular sample")  # of torch's Wishart, wrongly
@pytest.mark.parametrize("parts", MIXTURES.values(), ids=MIXTURES)
def test_mixtures_have_the_bijection_of_their_components(parts):
    fn = mixture(parts())
    transform = biject_to(fn.support)
    x = torch.randn(transform.inverse_shape(fn.shape()))
    assert transform(x).shape == fn.shape()
    assert parts().support.check(transform(x).unsqueeze(-1 - fn.event_dim)).all()
    assert_close(transform.inv(transform(x)), x)


def test_components_of_different_supports_are_refused_at_the_setup():
    def model():
        pyro.sample("z", mixture(dist.Uniform(torch.tensor([0.0, 1.0]), 2.0)))

    with pytest.raises(NotImplementedError, match=r"'z'.*components.*different supports.*Draw the"):
        AutoIAF(model).setup()


def covariances():
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Wishart(torch.tensor(5.0), torch.eye(3)))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), z), obs=torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore:Singular sample")
@pytest.mark.parametrize("kind", [AutoIAF, AutoHierarchicalIAF])
def test_guides_draw_covariances(kind):
    guide = kind(covariances, hidden_dims=[4])
    guide.setup()
    draws = guide.sample_posterior(5)["z"]
    assert draws.shape == (5, 2, 3, 3)
    assert constraints.positive_definite.check(draws).all()


def test_theirs_stay_where_there_are_some(monkeypatch):
    import pyro_iaf

    def theirs(_):
        return dist.transforms.ExpTransform()

    kind = type(constraints.positive_definite)
    monkeypatch.setitem(biject_to._registry, kind, theirs)
    pyro_iaf.register()
    assert biject_to._registry[kind] is theirs
