"""The libraries of `benchmarks.peers` that are built on PyTorch."""

import copy
import math
import tempfile
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks.jobs import Programs, emptied, python_rests, solves_the_simulated


class Torch:
    """Methods that all these libraries share."""

    models, context, ran = False, True, 0
    np = torch

    def __init__(self):
        torch.manual_seed(0)

    def asarray(self, x):
        return torch.tensor(x).float()

    def noise(self, *shape):
        return torch.randn(*shape)

    def roughened(self, module):
        """The module with noise on its parameters; fresh, it may be nearly the identity."""
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module

    def counted(self, module):
        calls = []
        module.register_forward_hook(lambda *_: calls.append(1))
        return partial(emptied, calls)

    def kept(self, f, x):
        """How many numbers are stored for the gradient of f at x."""
        sizes = []

        def note(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            f(x.clone().requires_grad_())
        return sum(sizes)

    def hessians(self):
        return {
            "yes": torch.autograd.functional.hessian,
            "by torch.func": lambda f, x: torch.func.hessian(f)(x),
        }

    def there_and_back(self, forward, inverse, D=4):
        x = torch.randn(5, D)
        return torch.allclose(inverse(forward(x).clone()), x, atol=1e-3)


class Pyro(Programs, Torch):
    package, packages = "pyro", ["pyro-ppl", "torch"]

    def __init__(self):
        super().__init__()
        import pyro
        from pyro.infer import autoguide

        pyro.clear_param_store()
        self.ppl, self.dist, self.infer, self.autoguide = (
            pyro,
            pyro.distributions,
            pyro.infer,
            autoguide,
        )
        self.make, self.guide = pyro.distributions.transforms, autoguide.AutoIAFNormal

    def transform(self, D):
        return self.make.affine_autoregressive(D, [2 * D])

    def network(self, transform):
        return transform.arn

    def behind(self, transform, D):
        base = self.dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1)
        return self.dist.TransformedDistribution(base, [transform])

    def flow(self, D):
        transform = self.roughened(self.transform(D))
        q = self.behind(transform, D)

        def draw_and_score():
            y = q.rsample()
            return y, q.log_prob(y)

        return SimpleNamespace(
            forward=lambda x: transform(x.clone()),
            inverse=lambda y: transform.inv(y.clone()),
            log_det=lambda x: transform.log_abs_det_jacobian(x, transform(x)),
            draw=q.rsample,
            score=q.log_prob,
            draw_and_score=draw_and_score,
            calls=self.counted(self.network(transform)),
        )

    def conditional(self, D, C):
        transform = self.roughened(self.make.conditional_affine_autoregressive(D, C, [16]))
        return lambda x, context: transform.condition(context)(x)

    def splines(self):
        coupled = self.make.spline_coupling(4, 2, [16], bound=5.0)
        return self.there_and_back(coupled, coupled.inv)

    def svi(self, model, guide, loss=None):
        optimiser = self.ppl.optim.Adam({"lr": 0.02})
        return self.infer.SVI(model, guide, optimiser, loss or self.infer.Trace_ELBO())

    def train(self, model, guide, steps):
        svi = self.svi(model, guide)
        return [svi.step() for _ in range(steps)]

    def loss(self, model, guide):
        guide()
        return self.infer.Trace_ELBO(num_particles=100).loss(model, guide)

    def subsamples(self):
        """AutoIAFNormal has five rows only; beside AutoNormal it is for the global latents."""
        rows = self.grouped()
        flows = self.guide(rows)
        self.train(rows, flows, 1)
        if flows.latent_dim == 20:
            return True
        block = self.ppl.poutine.block
        guide = self.autoguide.AutoGuideList(self.both, create_plates=self.plates)
        guide.append(self.guide(block(self.both, expose=["shared"])))
        guide.append(self.autoguide.AutoNormal(block(self.both, hide=["shared"])))
        self.train(self.both, guide, 600)
        return self.tells_rows_apart(guide[1].median()["z"]) and "shared latents"

    def losses(self):
        names = {name for name in self.infer.__all__ if name.endswith("ELBO") and "Jit" not in name}
        pairs = {"RenyiELBO", "TraceTailAdaptive_ELBO"}
        two = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 0}
        return [
            getattr(self.infer, name)(**(two if name in pairs else {}))
            for name in sorted(names - {"ELBO"})
        ]

    def landings(self):
        """For each loss, its gradient where flow and target agree, and its network calls."""
        flow = self.roughened(self.transform(8))
        twin = copy.deepcopy(flow)
        calls = self.counted(self.network(flow))

        def program(name, transform):
            self.ppl.module(name, transform)
            self.ppl.sample("z", self.behind(transform, 8))

        def slope(loss):
            flow.zero_grad()
            torch.manual_seed(0)
            loss.loss_and_grads(partial(program, "twin", twin), partial(program, "flow", flow))
            return max(float(p.grad.abs().max()) for p in flow.parameters() if p.grad is not None)

        usual = slope(self.infer.Trace_ELBO())
        calls()
        for loss in self.losses():
            yield slope(loss) / usual, calls()

    def compiled(self):
        """JitTrace_ELBO with the guide; if it fails for parameters of modules, by hand."""
        model, flow = self.simple(), self.transform(2)

        def by_hand():
            self.ppl.module("flow", flow)
            self.ppl.sample("z", self.behind(flow, 2))
            self.ppl.sample("s", self.dist.LogNormal(0.0, 1.0))

        def rests(guide):
            svi = self.svi(model, guide, self.infer.JitTrace_ELBO(ignore_jit_warnings=True))
            return python_rests(self, lambda steps: [svi.step() for _ in range(steps)])

        try:
            return rests(self.guide(model)) and "the loss"
        except AssertionError:
            return rests(by_hand) and "the loss, by hand"

    def simulated(self):
        net = torch.nn.Linear(5, 2)

        def model(observations):
            mu = self.ppl.sample("mu", self.dist.Normal(0.0, 1.0))
            with self.ppl.plate("data", 5):
                self.ppl.sample("y", self.dist.Normal(mu, 1.0), obs=observations["y"])

        def guide(observations):
            self.ppl.module("net", net)
            loc, log_scale = net(observations["y"])
            return self.ppl.sample("mu", self.dist.Normal(loc, log_scale.exp()))

        optimiser, seen = self.ppl.optim.Adam({"lr": 0.02}), {"y": torch.full((5,), 2.0)}
        csis = self.infer.CSIS(model, guide, optimiser, training_batch_size=20)
        for _ in range(300):
            csis.step(observations=seen)
        return solves_the_simulated([guide(seen).item() for _ in range(2000)]) and "guide by hand"

    def khat(self):
        return math.isfinite(self.infer.importance.psis_diagnostic(self.simple(), self.prior))

    def neutra(self):
        from pyro.infer.reparam import NeuTraReparam

        model = self.simple()
        guide = self.guide(model)
        self.train(model, guide, 1)
        reparam = NeuTraReparam(guide)
        kernel = self.infer.NUTS(reparam.reparam(model), max_tree_depth=3)
        mcmc = self.infer.MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
        mcmc.run()
        (noise,) = mcmc.get_samples().values()
        return reparam.transform_sample(noise)["z"].shape == (5, 2)


class PyroIAF(Pyro):
    package, packages = "pyro_iaf", []

    def __init__(self):
        super().__init__()
        import pyro_iaf

        self.ours, self.autoguide, self.guide = pyro_iaf, pyro_iaf, pyro_iaf.AutoIAF

    def transform(self, D):
        return self.ours.inverse_autoregressive_flow(D, [2 * D])

    def network(self, transform):
        return transform.network

    def conditional(self, D, C):
        flow = self.roughened(self.ours.conditional_inverse_autoregressive_flow(D, C, [16]))
        return lambda x, context: flow.condition(context)(x)

    def splines(self):
        """Pyro's spline coupling after a flow of ours."""
        coupled = self.make.spline_coupling(4, 2, [16], bound=5.0).with_cache(1)
        both = self.make.ComposeTransform([self.transform(4), coupled])
        return self.there_and_back(both, both.inv) and "Pyro's"

    def subsamples(self):
        model = self.grouped()
        guide = self.ours.AutoHierarchicalIAF(model)
        self.train(model, guide, 600)
        return self.tells_rows_apart(guide.sample_posterior(500)["z"].mean(0))

    def losses(self):
        return [self.ours.TraceSTL_ELBO()]

    def fit(self, model, guide, steps, **options):
        options = {"num_particles": 4, "compile": False, "progress": False} | options
        return self.ours.fit(model, guide, num_steps=steps, **options)

    def stops(self):
        model = self.simple()
        return len(self.fit(model, self.guide(model), 3000).losses) < 3000

    def resumes(self):
        """Whether a run that an error ended resumes with the same losses."""

        class KilledError(Exception):
            pass

        def losses(folder, killed=math.inf):
            simple = self.simple()

            def model():
                if self.ran > killed:
                    raise KilledError
                simple()

            self.ppl.clear_param_store()
            guide, path = self.guide(model, start="init"), folder + "/checkpoint"
            return self.fit(model, guide, 40, seed=1, checkpoint=path, checkpoint_every=5).losses

        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            whole, self.ran, half = losses(one), 0, self.ran // 2
            try:
                losses(other, killed=half)
            except KilledError:
                return torch.equal(losses(other), whole)

    def compiled(self):
        model = self.simple()
        guide = self.guide(model)
        return python_rests(self, lambda steps: self.fit(model, guide, steps, compile=True))

    def simulated(self):
        net = torch.nn.Linear(5, 4)

        def model(y=None):
            mu = self.ppl.sample("mu", self.dist.Normal(0.0, 1.0))
            with self.ppl.plate("data", 5):
                return self.ppl.sample("y", self.dist.Normal(mu, 1.0), obs=y)

        guide = self.guide(model, encoder=lambda y=None: net(y))
        self.fit(model, guide, 1000, simulate=["y"])
        return solves_the_simulated(guide.sample_posterior(2000, y=torch.full((5,), 2.0))["mu"])

    def khat(self):
        return math.isfinite(self.ours.diagnose(self.simple(), self.prior).khat)

    def neutra(self):
        return super().neutra() and "Pyro's"


class Zuko(Torch):
    package, packages = "zuko", ["zuko"]

    def __init__(self):
        super().__init__()
        import zuko

        self.flows, self.diagonal = zuko.flows, zuko.distributions.DiagNormal

    def transform(self, *sizes):
        make = self.flows.MaskedAutoregressiveTransform
        return self.roughened(make(*sizes, hidden_features=[2 * sizes[0]]))

    def flow(self, D):
        lazy = self.transform(D)
        base = self.flows.UnconditionalDistribution(
            self.diagonal, torch.zeros(D), torch.ones(D), buffer=True
        )
        q = self.flows.Flow(lazy.inv, base)
        return SimpleNamespace(
            forward=lambda x: lazy()(x),
            inverse=lambda y: lazy().inv(y),
            log_det=lambda x: lazy().call_and_ladj(x)[1],
            draw=lambda: q().rsample(),
            score=lambda y: q().log_prob(y),
            draw_and_score=lambda: q().rsample_and_log_prob(),
            calls=self.counted(lazy.hyper),
        )

    def conditional(self, D, C):
        lazy = self.transform(D, C)
        return lambda x, context: lazy(context)(x)

    def splines(self):
        transform = self.flows.NSF(4, passes=2)().transform
        return self.there_and_back(transform, transform.inv)

    def continuous(self):
        transform = self.flows.CNF(4)().transform
        return self.there_and_back(transform, transform.inv)


class Nflows(Torch):
    package, packages = "nflows", ["nflows"]

    def __init__(self):
        super().__init__()
        from nflows import distributions, flows, nn, transforms

        self.make, self.flows, self.nn = transforms, flows, nn
        self.normal = distributions.StandardNormal

    def transform(self, D, C=None):
        make = self.make.MaskedAffineAutoregressiveTransform
        simple = {"num_blocks": 1, "use_residual_blocks": False}
        return self.roughened(make(D, 2 * D, context_features=C, **simple))

    def flow(self, D):
        transform = self.transform(D)
        q = self.flows.Flow(self.make.InverseTransform(transform), self.normal([D]))
        return SimpleNamespace(
            forward=lambda x: transform(x)[0],
            inverse=lambda y: transform.inverse(y)[0],
            log_det=lambda x: transform(x)[1],
            draw=lambda: q.sample(1),
            score=q.log_prob,
            draw_and_score=lambda: q.sample_and_log_prob(1),
            calls=self.counted(transform.autoregressive_net),
        )

    def conditional(self, D, C):
        transform = self.transform(D, C)
        return lambda x, context: transform(x, context)[0]

    def splines(self):
        coupled = self.make.PiecewiseRationalQuadraticCouplingTransform(
            [1, 0, 1, 0], partial(self.nn.nets.ResidualNet, hidden_features=16), tails="linear"
        )
        return self.there_and_back(lambda x: coupled(x)[0], lambda y: coupled.inverse(y)[0])
