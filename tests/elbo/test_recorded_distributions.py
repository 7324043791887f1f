"""Whether a model with each of Pyro's distributions is recorded, with the right gradient.

Those of continuous support are latents of an AutoIAF, and the others likelihoods.
"""

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.reparam import (
    LatentStableReparam,
    ProjectedNormalReparam,
    SymmetricStableReparam,
)
from torch import eye, ones, tensor, zeros
from torch.testing import assert_close

from pyro_iaf import AutoIAF, CompiledTrace_ELBO
from pyro_iaf.elbo.trace import Call


class Case(NamedTuple):
    """A distribution with a latent parameter.

    Attributes:
        make: It, as a function of a real latent.
        data: An observed value, if it is a likelihood although its support is continuous, or can't
            be sampled.
        error: The error of a model with it, if it is not recorded.
        why: The reason.
        reparam: A reparameteriser for it.
    """

    make: Any
    data: Any = None
    error: str = ""
    why: str = ""
    reparam: Any = None


def logits(t):
    return torch.stack([t, 0 * t, -t], -1)


def normal(scale=1.0, size=1):
    return dist.MultivariateNormal(zeros(size), eye(size) * scale)


def vector(fn, size=2):
    return fn.expand([size]).to_event(1)


READS_LATENTS = "takes a number out of a tensor"
NO_BIJECTION = "no bijection"
SPHERE = "Consider using ProjectedNormal distribution together with a reparameterizer"

# By name: the distribution; observed data; and if it is not recorded, the error, and why.
CASES = {
    "AffineBeta": Case(lambda t: dist.AffineBeta(t.exp(), tensor(2.0), tensor(-1.0), tensor(3.0))),
    "AsymmetricLaplace": Case(lambda t: dist.AsymmetricLaplace(t, t.exp(), tensor(2.0))),
    "AVFMultivariateNormal": Case(
        lambda t: dist.AVFMultivariateNormal(t.expand(2), eye(2) * t.exp(), zeros(2, 1, 2))
    ),
    "Bernoulli": Case(lambda t: dist.Bernoulli(logits=t)),
    "Beta": Case(lambda t: dist.Beta(t.exp(), 2.0)),
    "BetaBinomial": Case(lambda t: dist.BetaBinomial(t.exp(), tensor(2.0), 5)),
    "Binomial": Case(lambda t: dist.Binomial(5, logits=t)),
    "Categorical": Case(lambda t: dist.Categorical(logits=logits(t))),
    "Cauchy": Case(lambda t: dist.Cauchy(t, t.exp())),
    "Chi2": Case(lambda t: dist.Chi2(t.exp())),
    "CoalescentTimes": Case(
        lambda t: dist.CoalescentTimes(tensor([0.0, 0.0, 1.0]), t.exp()),
        error=NO_BIJECTION,
        why="No bijection leads to times that are bounded by those of the leaves.",
    ),
    "CoalescentTimes of data": Case(
        lambda t: dist.CoalescentTimes(tensor([0.0, 0.0, 1.0]), t.exp()), tensor([-2.0, -1.0])
    ),
    "CoalescentTimesWithRate": Case(
        lambda t: dist.CoalescentTimesWithRate(zeros(3), t.exp().expand(3)),
        error=NO_BIJECTION,
        why="No bijection leads to times that are bounded by those of the leaves.",
    ),
    "CoalescentTimesWithRate of data": Case(
        lambda t: dist.CoalescentTimesWithRate(tensor([2.0, 2.0, 3.0]), t.exp().expand(4)),
        tensor([0.3, 1.2]),
    ),
    "ContinuousBernoulli": Case(lambda t: dist.ContinuousBernoulli(logits=t)),
    "Delta": Case(lambda t: dist.Delta(tensor(0.5), log_density=t), tensor(0.5)),
    "Dirichlet": Case(lambda t: dist.Dirichlet(t.exp() * ones(3))),
    "DirichletMultinomial": Case(
        lambda t: dist.DirichletMultinomial(t.exp() * ones(3), tensor(4.0))
    ),
    "DiscreteHMM": Case(
        lambda t: dist.DiscreteHMM(
            logits(t), logits(t).expand(3, 3), dist.Normal(logits(t), 1.0), duration=3
        )
    ),
    "Empirical": Case(lambda t: dist.Empirical(tensor([0.0, 1.0, 1.0]), logits(t)), tensor(1.0)),
    "Exponential": Case(lambda t: dist.Exponential(t.exp())),
    "ExtendedBetaBinomial": Case(
        lambda t: dist.ExtendedBetaBinomial(t.exp(), tensor(2.0), tensor(5.0))
    ),
    "ExtendedBinomial": Case(lambda t: dist.ExtendedBinomial(tensor(5.0), logits=t)),
    "FisherSnedecor": Case(lambda t: dist.FisherSnedecor(t.exp(), 3.0)),
    "FoldedDistribution": Case(lambda t: dist.FoldedDistribution(dist.Normal(t, 1.0))),
    "Gamma": Case(lambda t: dist.Gamma(t.exp(), 2.0)),
    "GammaGaussianHMM": Case(
        lambda t: dist.GammaGaussianHMM(
            dist.Gamma(t.exp(), 2.0), normal(), eye(1), normal(), eye(1), normal(), duration=3
        )
    ),
    "GammaPoisson": Case(lambda t: dist.GammaPoisson(t.exp(), 2.0)),
    "GaussianHMM": Case(
        lambda t: dist.GaussianHMM(
            normal(), eye(1) * t.sigmoid(), normal(t.exp()), eye(1), normal(), duration=3
        )
    ),
    "GaussianHMM without a length": Case(
        lambda t: dist.GaussianHMM(normal(), eye(1) * t, normal(), eye(1), normal()),
        error="'x' is a time series without a length.*Give duration=",
        why="A guide can't know how many steps to draw.",
    ),
    "GaussianMRF": Case(
        lambda t: dist.GaussianMRF(normal(), normal(t.exp(), 2).expand([3]), normal(1.0, 2)),
        zeros(3, 1),
    ),
    "GaussianScaleMixture": Case(
        lambda t: dist.GaussianScaleMixture(t.exp() * ones(2), zeros(3), ones(3)),
        ones(2),
        error="modified by an inplace operation",
        why="Pyro's log density writes into what its gradient needs.",
    ),
    "GeneralizedPareto": Case(
        lambda t: dist.GeneralizedPareto(0.0, t.exp(), tensor(0.5)),
        error="interval without end",
        why="PyTorch states its support as an interval up to infinity.",
    ),
    "GeneralizedPareto of data": Case(
        lambda t: dist.GeneralizedPareto(0.0, t.exp(), tensor(0.5)), tensor(1.0)
    ),
    "Geometric": Case(lambda t: dist.Geometric(logits=t)),
    "GroupedNormalNormal": Case(
        lambda t: dist.GroupedNormalNormal(
            t.expand(2), t.exp().expand(2), tensor(1.0), tensor([0, 0, 1])
        ),
        tensor([0.5, 1.0, 2.0]),
    ),
    "Gumbel": Case(lambda t: dist.Gumbel(t, t.exp())),
    "HalfCauchy": Case(lambda t: dist.HalfCauchy(t.exp())),
    "HalfNormal": Case(lambda t: dist.HalfNormal(t.exp())),
    "ImproperUniform": Case(lambda t: dist.ImproperUniform(dist.constraints.positive, (), ())),
    "Independent": Case(lambda t: vector(dist.Normal(t, 1.0))),
    "IndependentHMM": Case(
        lambda t: dist.IndependentHMM(
            dist.GaussianHMM(
                normal(), eye(1) * t.sigmoid(), normal(t.exp()), eye(1), normal(), duration=3
            ).expand([2])
        )
    ),
    "InverseGamma": Case(lambda t: dist.InverseGamma(t.exp(), 2.0)),
    "Kumaraswamy": Case(lambda t: dist.Kumaraswamy(t.exp(), 2.0)),
    "Laplace": Case(lambda t: dist.Laplace(t, t.exp())),
    "LinearHMM": Case(
        lambda t: dist.LinearHMM(
            vector(dist.Normal(t, 1.0), 1),
            eye(1),
            vector(dist.StudentT(4.0), 1),
            eye(1),
            vector(dist.Normal(0.0, 1.0), 1),
            duration=3,
        ),
        error="LinearHMM.log_prob",
        why="Pyro has no log density of it; LinearHMMReparam replaces it.",
    ),
    "LKJ": Case(lambda t: dist.LKJ(3, t.exp())),
    "LKJCholesky": Case(lambda t: dist.LKJCholesky(3, t.exp())),
    "Logistic": Case(lambda t: dist.Logistic(t, t.exp())),
    "LogisticNormal": Case(lambda t: dist.LogisticNormal(t.expand(2), ones(2))),
    "LogNormal": Case(lambda t: dist.LogNormal(t, t.exp())),
    "LogNormalNegativeBinomial": Case(
        lambda t: dist.LogNormalNegativeBinomial(tensor(3.0), t, t.exp()), tensor(2.0)
    ),
    "LowRankMultivariateNormal": Case(
        lambda t: dist.LowRankMultivariateNormal(t.expand(2), ones(2, 1), t.exp() * ones(2))
    ),
    "MaskedDistribution": Case(
        lambda t: dist.Normal(t.expand(2), 1.0).mask(tensor([True, True])).to_event(1)
    ),
    "MaskedMixture": Case(
        lambda t: dist.MaskedMixture(
            tensor([True, False]), dist.Normal(t.expand(2), 1.0), dist.Normal(zeros(2), t.exp())
        ).to_event(1)
    ),
    "MixtureOfDiagNormals": Case(
        lambda t: dist.MixtureOfDiagNormals(t * eye(2), ones(2, 2), zeros(2))
    ),
    "MixtureOfDiagNormalsSharedCovariance": Case(
        lambda t: dist.MixtureOfDiagNormalsSharedCovariance(t * eye(2), ones(2), zeros(2))
    ),
    "MixtureSameFamily": Case(
        lambda t: dist.MixtureSameFamily(
            dist.Categorical(logits=logits(t)), dist.Normal(logits(t), 1.0)
        )
    ),
    "Multinomial": Case(lambda t: dist.Multinomial(4, logits=logits(t))),
    "MultivariateNormal": Case(
        lambda t: dist.MultivariateNormal(t.expand(2), scale_tril=eye(2) * t.exp())
    ),
    "MultivariateStudentT": Case(
        lambda t: dist.MultivariateStudentT(t.exp(), zeros(2), eye(2) * t.exp())
    ),
    "NanMaskedMultivariateNormal": Case(
        lambda t: dist.NanMaskedMultivariateNormal(t.expand(2), eye(2)),
        error=READS_LATENTS,
        why="It is for data: it asks whether a value is NaN.",
    ),
    "NanMaskedMultivariateNormal of data": Case(
        lambda t: dist.NanMaskedMultivariateNormal(t.expand(2), eye(2)), tensor([1.0, torch.nan])
    ),
    "NanMaskedNormal": Case(
        lambda t: dist.NanMaskedNormal(t, 1.0),
        error=READS_LATENTS,
        why="It is for data: it asks whether a value is NaN.",
    ),
    "NanMaskedNormal of data": Case(
        lambda t: dist.NanMaskedNormal(t.expand(2), 1.0).to_event(1), tensor([1.0, torch.nan])
    ),
    "NegativeBinomial": Case(lambda t: dist.NegativeBinomial(3.0, logits=t)),
    "Normal": Case(lambda t: dist.Normal(t, t.exp())),
    "OMTMultivariateNormal": Case(
        lambda t: dist.OMTMultivariateNormal(t.expand(2), eye(2) * t.exp())
    ),
    "OneHotCategorical": Case(lambda t: dist.OneHotCategorical(logits=logits(t))),
    "OneHotCategoricalStraightThrough": Case(
        lambda t: dist.OneHotCategoricalStraightThrough(logits=logits(t))
    ),
    "OneOneMatching": Case(lambda t: dist.OneOneMatching(t * eye(3)), tensor([0, 2, 1])),
    "OneOneMatching, approximate": Case(
        lambda t: dist.OneOneMatching(t * eye(3), bp_iters=5),
        tensor([0, 2, 1]),
    ),
    "OneTwoMatching": Case(lambda t: dist.OneTwoMatching(t * eye(4)[:, :2]), tensor([0, 1, 0, 1])),
    "OneTwoMatching, approximate": Case(
        lambda t: dist.OneTwoMatching(t * eye(4)[:, :2], bp_iters=5),
        tensor([0, 1, 0, 1]),
    ),
    "OrderedLogistic": Case(lambda t: dist.OrderedLogistic(t, tensor([-1.0, 0.0, 1.0]))),
    "Pareto": Case(lambda t: dist.Pareto(1.0, t.exp())),
    "Poisson": Case(lambda t: dist.Poisson(t.exp())),
    "ProjectedNormal": Case(
        lambda t: dist.ProjectedNormal(torch.stack([t, t.exp()], -1)),
        error=SPHERE,
        why="A sphere has no bijection from real vectors.",
    ),
    "ProjectedNormal, reparameterised": Case(
        lambda t: dist.ProjectedNormal(torch.stack([t, t.exp()], -1)),
        reparam=ProjectedNormalReparam(),
    ),
    "RelaxedBernoulli": Case(lambda t: dist.RelaxedBernoulli(tensor(0.5), logits=t)),
    "RelaxedBernoulliStraightThrough": Case(
        lambda t: dist.RelaxedBernoulliStraightThrough(tensor(0.5), logits=t)
    ),
    "RelaxedOneHotCategorical": Case(
        lambda t: dist.RelaxedOneHotCategorical(tensor(0.5), logits=logits(t))
    ),
    "RelaxedOneHotCategoricalStraightThrough": Case(
        lambda t: dist.RelaxedOneHotCategoricalStraightThrough(tensor(0.5), logits=logits(t))
    ),
    "SineBivariateVonMises": Case(
        lambda t: dist.SineBivariateVonMises(t, t, t.exp(), t.exp(), correlation=tensor(0.3)),
        error=READS_LATENTS,
        why="Its constructor checks concentrations by an assert.",
    ),
    "SineSkewed": Case(
        lambda t: dist.SineSkewed(vector(dist.VonMises(t, t.exp())), tensor([0.2, 0.3]))
    ),
    "SkewLogistic": Case(lambda t: dist.SkewLogistic(t, t.exp(), tensor(2.0))),
    "SoftAsymmetricLaplace": Case(
        lambda t: dist.SoftAsymmetricLaplace(t, t.exp(), tensor(2.0), tensor(1.0))
    ),
    "SoftLaplace": Case(lambda t: dist.SoftLaplace(t, t.exp())),
    "SpanningTree": Case(lambda t: dist.SpanningTree(logits(t))),
    "Stable": Case(
        lambda t: dist.Stable(tensor(1.5), tensor(0.0), t.exp(), t),
        error=READS_LATENTS,
        why="Its log density is an integral, and its grid depends on values.",
    ),
    "Stable, reparameterised": Case(
        lambda t: dist.Stable(tensor(1.5), tensor(0.0), t.exp(), t),
        reparam=LatentStableReparam(),
    ),
    "Stable, symmetric and reparameterised": Case(
        lambda t: dist.Stable(tensor(1.5), tensor(0.0), t.exp(), t),
        tensor(1.0),
        reparam=SymmetricStableReparam(),
    ),
    "StudentT": Case(lambda t: dist.StudentT(3.0, t, t.exp())),
    "TransformedDistribution": Case(
        lambda t: dist.TransformedDistribution(
            dist.Normal(t, 1.0), [dist.transforms.SigmoidTransform()]
        )
    ),
    "TruncatedPolyaGamma": Case(lambda t: dist.TruncatedPolyaGamma(t)),
    "Uniform": Case(lambda t: dist.Uniform(-1.0, 2.0)),
    "Unit": Case(lambda t: dist.Unit(t), torch.empty(0)),
    "VonMises": Case(lambda t: dist.VonMises(t, t.exp())),
    "VonMises3D": Case(
        lambda t: dist.VonMises3D(logits(t)),
        error=SPHERE,
        why="A sphere has no bijection from real vectors.",
    ),
    "VonMises3D of data": Case(lambda t: dist.VonMises3D(logits(t)), tensor([0.0, 1.0, 0.0])),
    "Weibull": Case(lambda t: dist.Weibull(t.exp(), 2.0)),
    "Wishart": Case(lambda t: dist.Wishart(tensor(4.0), scale_tril=eye(2) * t.exp())),
    "Wishart of latent df": Case(
        lambda t: dist.Wishart(3 + t.exp(), scale_tril=eye(2)),
        error=READS_LATENTS,
        why="Its constructor checks that df is large enough.",
    ),
    "ZeroInflatedDistribution": Case(
        lambda t: dist.ZeroInflatedDistribution(dist.Poisson(t.exp()), gate=tensor(0.3))
    ),
    "ZeroInflatedNegativeBinomial": Case(
        lambda t: dist.ZeroInflatedNegativeBinomial(3.0, logits=t, gate=tensor(0.3))
    ),
    "ZeroInflatedPoisson": Case(lambda t: dist.ZeroInflatedPoisson(t.exp(), gate=tensor(0.3))),
}

# Bases of others, and what only wraps them.
ABSTRACT = {"ExpandedDistribution", "ExponentialFamily", "Rejector", "TorchDistribution"}
# The same under another name.
ALIASES = {"LKJCorrCholesky": "LKJCholesky", "StableWithLogProb": "Stable"}


def model_of(case):
    data = case.data
    if data is None and case.make(tensor(0.3)).support.is_discrete:
        data = case.make(tensor(0.3)).sample()

    def model():
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", case.make(t), obs=data)
        if data is None:
            pyro.sample("y", dist.Normal((x * x).sum() + x.sum(), 1.0), obs=tensor(1.0))

    return poutine.reparam(model, {"x": case.reparam}) if case.reparam else model


def record(model):
    """The recorded step and the guide."""
    guide = AutoIAF(model, hidden_dims=[2], num_flows=1, start="init")
    guide.setup()
    loss = CompiledTrace_ELBO(backend="graph")
    return loss.recorder.make(Call(model, guide, (), {})), guide


@pytest.mark.filterwarnings("ignore:Singular sample")  # of torch's Wishart, wrongly
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_model_with_it_is_recorded_or_says_why_not(case):
    model = model_of(case)
    if case.error:
        with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=case.error):
            record(model)
        return
    step, guide = record(model)
    assert step is not None
    pyro.set_rng_seed(1)
    loss, gradients = step(Call(model, guide, (), {}))
    pyro.set_rng_seed(1)
    expected = Trace_ELBO().loss_and_grads(model, guide)
    assert_close(loss, tensor(expected))
    for leaf, gradient in zip(step.leaves, gradients, strict=True):
        assert_close(gradient, leaf.grad)


def test_the_table_has_all_distributions():
    names = {name.split(" of ")[0].split(",")[0] for name in CASES}
    theirs = {
        name
        for name in dist.__all__
        if isinstance(kind := getattr(dist, name), type)
        and issubclass(kind, torch.distributions.Distribution)
        and not kind.__module__.startswith("pyro_iaf")
    }
    assert theirs - names - ABSTRACT - ALIASES.keys() == set()
    for alias, name in ALIASES.items():
        assert issubclass(getattr(dist, alias), getattr(dist, name)) or alias in theirs
    assert all(bool(case.error) == bool(case.why) for case in CASES.values())
