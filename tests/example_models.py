"""The table of models that the properties of guides run over: one line each."""

import pyro
import pyro.distributions as dist
import torch
from bijections import rough
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from torch import nn

from pyro_iaf import AutoIAF


def one_latent():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def vectors():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("w", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))


def plates():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor([0.5, 1.0, -1.0]))


def nested_plates():
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Gamma(2.0, 2.0))
    with rows, columns:
        c = pyro.sample("c", dist.Normal(a, b))
        pyro.sample("d", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(c, 0.5), obs=torch.ones(2, 3))


def supports():
    pyro.sample("positive", dist.HalfCauchy(1.0))
    pyro.sample("unit", dist.Beta(2.0, 2.0))
    pyro.sample("interval", dist.Uniform(-3.0, torch.tensor([-1.0, 5.0])).to_event(1))
    pyro.sample("above", dist.Pareto(2.0, 3.0))
    with pyro.plate("three", 3):
        pyro.sample("bounds", dist.Uniform(torch.tensor([0.0, 1.0, 2.0]), 4.0))
    pyro.sample("skewed", dist.LogNormal(0.0, 1.0))


def simplexes():
    with pyro.plate("two", 2):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    counts = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0]])
    with pyro.plate("two again", 2):
        pyro.sample("y", dist.Multinomial(probs=p, validate_args=False), obs=counts)


def correlations():
    L = pyro.sample("L", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    tril = scale.unsqueeze(-1) * L
    with pyro.plate("data", 2):
        y = torch.tensor([[1.0, 0.5, -0.5], [0.2, -1.0, 0.3]])
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=y)


def orders():
    support = constraints.ordered_vector
    cuts = pyro.sample("cuts", dist.ImproperUniform(support, (), (3,)))
    pyro.sample("y", dist.Normal(cuts, 1.0).to_event(1), obs=torch.tensor([-1.0, 0.0, 2.0]))


def improper():
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(mu, sigma), obs=torch.tensor([1.0, 2.0, 0.5, 1.5]))


def improper_plate():
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (2,), ()))
        w = pyro.sample("w", dist.ImproperUniform(constraints.real_vector, (2,), (3,)))
        pyro.sample("y", dist.Normal(z + w.sum(-1), 0.5), obs=torch.tensor([1.0, 0.0]))
        pyro.sample("v", dist.Normal(w, 0.5).to_event(1), obs=torch.zeros(2, 3))


def deterministic_and_factor():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    w = pyro.deterministic("w", 2 * z)
    pyro.factor("f", -0.5 * (w - 1) ** 2)


def mask_and_scale():
    with poutine.scale(scale=3.0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    on = torch.tensor([True, False, True])
    with pyro.plate("data", 3), poutine.mask(mask=on):
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(w, 0.5), obs=torch.tensor([0.5, 1.0, -1.0]))
    pyro.sample("v", dist.Normal(0, 1).expand([2]).mask(on[:2]).to_event(1))


def arguments(x, y=None, *, noise=1.0):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    mean = (weights * x).sum(-1)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)


def subsampled_data():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=4) as i:
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.linspace(0, 1, 10)[i])


def learnable_prior():
    loc = pyro.param("prior_loc", torch.tensor(0.5))
    width = pyro.param("prior_width", torch.tensor(2.0), constraint=constraints.positive)
    z = pyro.sample("z", dist.Normal(loc, width))
    u = pyro.sample("u", dist.Uniform(-width.detach(), width))
    pyro.sample("y", dist.Normal(z + u, 0.5), obs=torch.tensor(1.0))


def single_precision():
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0, dtype=torch.float32))


class RandomLinear(nn.Linear, PyroModule):
    def __init__(self, *shape):
        super().__init__(*shape)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand(self.weight.shape).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand(self.bias.shape).to_event(1))


class Regression(PyroModule):
    """A model that is a module, with weights to infer and a prior to learn."""

    def __init__(self):
        super().__init__()
        self.linear = RandomLinear(2, 1)
        self.prior_loc = nn.Parameter(torch.tensor(0.0))
        self.prior_scale = PyroParam(torch.tensor(1.0), constraints.positive)

    def forward(self, x, y=None):
        weight, bias = self.linear.weight, self.linear.bias
        mean = (weight.squeeze(-2) * x).sum(-1) + bias.squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(self.prior_loc, self.prior_scale))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


X, Y = torch.tensor([[1.0, 2.0], [0.0, 1.0], [-1.0, 1.0]]), torch.tensor([1.0, 0.0, -0.5])


def data():
    return X.to(torch.get_default_dtype()), Y.to(torch.get_default_dtype())


# For each: a function that makes the model, and one that makes its arguments.
MODELS = {
    "one latent": (lambda: one_latent, tuple),
    "vectors": (lambda: vectors, tuple),
    "plates": (lambda: plates, tuple),
    "nested plates": (lambda: nested_plates, tuple),
    "supports": (lambda: supports, tuple),
    "simplexes": (lambda: simplexes, tuple),
    "correlations": (lambda: correlations, tuple),
    "ordered": (lambda: orders, tuple),
    "improper": (lambda: improper, tuple),
    "improper in a plate": (lambda: improper_plate, tuple),
    "deterministic and factor": (lambda: deterministic_and_factor, tuple),
    "mask and scale": (lambda: mask_and_scale, tuple),
    "arguments": (lambda: arguments, data),
    "subsampled data": (lambda: subsampled_data, tuple),
    "learnable prior": (lambda: learnable_prior, tuple),
    "single precision": (lambda: single_precision, tuple),
    "decentred": (
        lambda: poutine.reparam(plates, config={"z": LocScaleReparam(0.0)}),
        tuple,
    ),
    "module": (lambda: Regression(), data),
}


def make(name, **settings):
    """A guide for a model of the table, moved away from where it starts."""
    model, arguments = (make() for make in MODELS[name])
    guide = AutoIAF(model, **settings)
    guide.setup(*arguments)
    return rough(guide, 0.1), model, arguments


def seeded(guide, *arguments):
    pyro.set_rng_seed(1)
    return guide(*arguments)


def two_sites():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))


def train(guide, model=two_sites, num_steps=3):
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO())
    return [svi.step() for _ in range(num_steps)]


def values(guide):
    return {name: value.clone() for name, value in guide.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reload_store(path):
    """Empties Pyro's parameter store, and fills it from a file."""
    pyro.clear_param_store()
    pyro.get_param_store().load(path)
