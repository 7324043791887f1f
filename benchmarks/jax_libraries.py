"""The libraries of `benchmarks.peers` that are built on JAX; TFP is its JAX substrate."""

import math
import pickle
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jobs import PRIOR, Programs, X, Y, emptied, python_rests, solves_the_simulated


class Jax:
    """Methods that all these libraries share."""

    models, context, ran = False, "by your network", 0
    np, asarray = jnp, staticmethod(jnp.asarray)

    def __init__(self):
        self.keys = iter(jax.random.split(jax.random.key(0), 10_000))

    @property
    def key(self):
        return next(self.keys)

    def noise(self, *shape):
        return jax.random.normal(self.key, shape)

    def counted(self, net):
        """The network with its calls counted, and a function that returns their number."""
        calls = []

        def counting(*args):
            jax.debug.callback(lambda: calls.append(1))
            return net(*args)

        def count():
            jax.effects_barrier()
            return emptied(calls)

        return counting, count

    def kept(self, f, x):
        """How many numbers are stored for the gradient of f at x."""
        _, backward = jax.vjp(f, x)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    def hessians(self):
        return {"yes": lambda f, x: jax.hessian(f)(x)}

    def slopes(self, losses, usual, weights, calls):
        """For each loss, the size of its gradient relative to the usual one, and its network calls.

        Calls are counted without the gradient, which hides them.
        """

        def slope(loss):
            leaves = jax.tree.leaves(jax.grad(loss)(weights))
            return max(float(abs(leaf).max()) for leaf in leaves if leaf.size)

        scale = slope(usual)
        for loss in losses:
            ratio = slope(loss) / scale
            calls()
            loss(weights)
            yield ratio, calls()

    def target(self, z):
        """A log density of two latents, for libraries without probabilistic programs."""
        self.ran += 1
        return -0.5 * ((z - 1.0) ** 2).sum(-1)

    def masked(self, D, C=0):
        """Weights and an autoregressive network, for libraries that have none."""
        upper = jnp.triu(jnp.ones((D, D)), 1)

        def net(weights, x, c=None):
            inner, outer = weights
            h = jnp.tanh(x @ (inner * upper) + (0.0 if c is None else c @ outer))
            return h, h / 2

        return (self.noise(D, D), self.noise(C, D)), net


class NumPyro(Programs, Jax):
    package, packages = "numpyro", ["numpyro", "jax"]

    def __init__(self):
        super().__init__()
        import numpyro
        from numpyro.distributions import flows
        from numpyro.infer import autoguide, reparam
        from numpyro.nn import AutoregressiveNN

        self.ppl, self.dist, self.infer = numpyro, numpyro.distributions, numpyro.infer
        self.autoguide, self.guide, self.reparam = autoguide, autoguide.AutoIAFNormal, reparam
        self.transform, self.made = flows.InverseAutoregressiveTransform, AutoregressiveNN

    def network(self, D):
        init, net = self.made(D, [2 * D])
        return init(self.key, (D,))[1], net

    def behind(self, transform, D):
        base = self.dist.Normal(jnp.zeros(D), 1.0).to_event(1)
        return self.dist.TransformedDistribution(base, [transform])

    def flow(self, D):
        weights, net = self.network(D)
        counting, calls = self.counted(partial(net, weights))
        transform = self.transform(counting)
        q = self.behind(transform, D)

        def draw_and_score():
            y, intermediates = q.sample_with_intermediates(self.key)
            return y, q.log_prob(y, intermediates)

        return SimpleNamespace(
            forward=transform,
            inverse=transform.inv,
            log_det=lambda x: transform.log_abs_det_jacobian(x, transform(x)),
            draw=lambda: q.sample(self.key),
            score=q.log_prob,
            draw_and_score=draw_and_score,
            calls=calls,
        )

    def conditional(self, D, C):
        weights, net = self.masked(D, C)
        return lambda x, context: self.transform(partial(net, weights, c=context))(x)

    def svi(self, model, guide, loss=None):
        optimiser = self.ppl.optim.Adam(0.02)
        return self.infer.SVI(model, guide, optimiser, loss or self.infer.Trace_ELBO())

    def fit(self, model, guide, steps):
        return self.svi(model, guide).run(self.key, steps, progress_bar=False)

    def train(self, model, guide, steps):
        return self.fit(model, guide, steps).losses

    def loss(self, model, guide):
        svi = self.svi(model, guide, self.infer.Trace_ELBO(num_particles=100))
        return float(svi.evaluate(svi.init(self.key)))

    def subsamples(self):
        """AutoIAFNormal raises an error; with AutoSemiDAIS it is for the global latents."""
        rows = self.grouped()
        try:
            self.train(rows, self.guide(rows), 1)
            return True
        except ValueError as error:
            if "local latent" not in str(error):
                raise

        guide, means = self.autoguide.AutoSemiDAIS(self.both, rows, self.guide(self.shared)), []
        params = self.fit(self.both, guide, 600).params
        for start in range(0, 20, 5):
            five = {"rows": jnp.arange(start, start + 5)}
            with self.ppl.handlers.substitute(data=five):
                draws = guide.sample_posterior(self.key, params, sample_shape=(500,))["z"]
            means.extend(draws.mean(0))
        return self.tells_rows_apart(np.array(means)) and "shared latents"

    def landings(self):
        """For each loss, its gradient where flow and target agree, and its network calls."""
        weights, net = self.network(8)
        counting, calls = self.counted(net)
        key = self.key

        def program(net, weights):
            self.ppl.sample("z", self.behind(self.transform(partial(net, weights)), 8))

        def model():
            program(net, weights)

        def guide():
            program(counting, self.ppl.param("weights", weights))

        def at(loss, weights):
            return loss.loss(key, {"weights": weights}, model, guide)

        names = {name for name in self.infer.__all__ if name.endswith("ELBO")}
        names -= {
            "ELBO",
            "TraceEnum_ELBO",
        }  # in this model the same as Trace_ELBO, by another package
        losses = [getattr(self.infer, name)(1 + (name == "RenyiELBO")) for name in sorted(names)]
        usual = partial(at, self.infer.Trace_ELBO())
        return self.slopes([partial(at, loss) for loss in losses], usual, weights, calls)

    def stops(self):
        model = self.simple()
        return len(self.train(model, self.guide(model), 3000)) < 3000

    def resumes(self):
        model = self.simple()
        svi = self.svi(model, self.guide(model))
        start = svi.init(self.key)
        run = partial(svi.run, self.key, progress_bar=False)
        whole, half = run(20, init_state=start).losses, run(10, init_state=start)
        state = pickle.loads(pickle.dumps(half.state))
        rest = run(10, init_state=state).losses
        return np.allclose(whole[10:], rest, rtol=1e-5) and "from its state"

    def compiled(self):
        model = self.simple()
        guide = self.guide(model)
        return python_rests(self, lambda steps: self.train(model, guide, steps))

    def khat(self):
        return math.isfinite(self.infer.psis_diagnostic(self.key, {}, self.simple(), self.prior))

    def neutra(self):
        model = self.simple()
        guide = self.guide(model)
        reparam = self.reparam.NeuTraReparam(guide, self.fit(model, guide, 1).params)
        kernel = self.infer.NUTS(reparam.reparam(model), max_tree_depth=3)
        mcmc = self.infer.MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
        mcmc.run(self.key)
        noise = mcmc.get_samples()["auto_shared_latent"]
        return reparam.transform_sample(noise)["z"].shape == (5, 2)


class TFP(Jax):
    models = True
    package, packages = "tensorflow_probability.substrates.jax", ["tfp-nightly", "jax"]

    def __init__(self):
        super().__init__()
        from tensorflow_probability.substrates import jax as tfp

        self.tfp, self.dist, self.make = tfp, tfp.distributions, tfp.bijectors
        self.loops = [tfp.vi.fit_surrogate_posterior_stateless, tfp.math.minimize_stateless]

    def transform(self, net):
        return self.make.Invert(self.make.MaskedAutoregressiveFlow(net))

    def behind(self, transform, D):
        base = self.dist.Sample(self.dist.Normal(0.0, 1.0), [D])
        return self.dist.TransformedDistribution(base, transform)

    def flow(self, D):
        weights, net = self.masked(D)
        counting, calls = self.counted(partial(net, weights))
        transform = self.transform(counting)
        q = self.behind(transform, D)
        return SimpleNamespace(
            forward=transform.forward,
            inverse=transform.inverse,
            log_det=transform.forward_log_det_jacobian,
            draw=lambda: q.sample(seed=self.key),
            score=q.log_prob,
            draw_and_score=lambda: q.experimental_sample_and_log_prob(seed=self.key),
            calls=calls,
        )

    def conditional(self, D, C):
        weights, net = self.masked(D, C)
        transform = self.transform(partial(net, weights))
        return lambda x, context: transform.forward(x, c=context)

    def there_and_back(self, transform):
        x = self.noise(5, 4)
        y = jnp.array(np.array(transform.forward(x)))  # a copy, which is not in the cache
        return np.allclose(transform.inverse(y), x, atol=1e-3)

    def splines(self):
        def spline(x, rest, **_):
            widths = 2.0 + jax.nn.softmax(jnp.sin(x[..., :1] + jnp.arange(4.0)))
            both = jnp.broadcast_to(widths[..., None, :], (*x.shape[:-1], rest, 4))
            slopes = jnp.ones((*both.shape[:-1], 3))
            return self.make.RationalQuadraticSpline(both, both[..., ::-1], slopes, -4.5)

        return self.there_and_back(self.make.RealNVP(2, bijector_fn=spline))

    def continuous(self):
        exact = self.make.ffjord.trace_jacobian_exact
        flow = self.make.FFJORD(lambda t, x: jnp.tanh(x), trace_augmentation_fn=exact)
        return self.there_and_back(flow)

    def guide_with_flows(self):
        """A guide around a given flow, with a finite gradient."""
        parts = {
            "w": self.dist.MultivariateNormalDiag(jnp.zeros(3), jnp.array(PRIOR)),
            "y": lambda w: self.dist.Independent(self.dist.Normal(w @ X.T, 1.0), 1),
        }
        model = self.dist.JointDistributionNamed(parts).experimental_pin(y=jnp.array(Y))
        weights, net = self.masked(3)
        key = self.key

        def loss(weights):
            q = self.tfp.experimental.vi.build_split_flow_surrogate_posterior(
                model.event_shape,
                self.transform(partial(net, weights)),
                model.experimental_default_event_space_bijector(),
            )
            target = model.unnormalized_log_prob
            return self.tfp.vi.monte_carlo_variational_loss(target, q, seed=key)

        return bool(jnp.isfinite(jax.grad(loss)(weights)[0]).all()) and "around your flow"

    def landings(self):
        """For each loss, its gradient where flow and target agree, and its network calls."""
        weights, net = self.masked(8)
        counting, calls = self.counted(net)
        key, kinds = self.key, self.tfp.vi.GradientEstimators

        def q(net, weights):
            return self.behind(self.transform(partial(net, weights)), 8)

        def at(kind, w):
            doubly = kind is kinds.DOUBLY_REPARAMETERIZED
            stopped = q(counting, jax.lax.stop_gradient(w)) if doubly else None
            return self.tfp.vi.monte_carlo_variational_loss(
                q(net, weights).log_prob,
                q(counting, w),
                gradient_estimator=kind,
                importance_sample_size=1 + (kind is kinds.VIMCO),
                stopped_surrogate_posterior=stopped,
                seed=key,
            )

        usual = partial(at, kinds.REPARAMETERIZATION)
        return self.slopes([partial(at, kind) for kind in kinds], usual, weights, calls)

    def train(self, steps, **options):
        import optax

        weights, net = self.masked(2)
        _, trace = self.tfp.vi.fit_surrogate_posterior_stateless(
            self.target,
            lambda *weights: self.behind(self.transform(partial(net, weights)), 2),
            weights,
            optax.adam(0.02),
            steps,
            jit_compile=True,
            seed=self.key,
            **options,
        )
        return trace

    def stops(self):
        rule = self.tfp.optimizer.convergence_criteria.LossNotDecreasing(rtol=1e-3)
        steps = self.train(3000, convergence_criterion=rule, trace_fn=lambda state: state.step)
        return int(steps[-1]) + 1 < 3000

    def compiled(self):
        return python_rests(self, self.train)

    def neutra(self):
        weights, net = self.masked(3)
        target = self.dist.MultivariateNormalDiag(jnp.ones(3), jnp.arange(1.0, 4.0))
        make, flow = self.tfp.mcmc, self.transform(partial(net, weights))
        nuts = make.NoUTurnSampler(target.log_prob, 0.1, max_tree_depth=3)
        kernel = make.TransformedTransitionKernel(nuts, flow)
        draws = make.sample_chain(5, jnp.zeros(3), kernel=kernel, trace_fn=None, seed=self.key)
        return draws.shape == (5, 3) and bool(jnp.isfinite(draws).all())


class FlowJAX(Jax):
    context = True
    package, packages = "flowjax", ["flowjax", "jax"]

    def __init__(self):
        super().__init__()
        import equinox
        import flowjax.bijections
        import flowjax.distributions
        import flowjax.train
        import paramax

        self.make, self.dist, self.training = (
            flowjax.bijections,
            flowjax.distributions,
            flowjax.train,
        )
        self.loops = [flowjax.train.fit_to_data, flowjax.train.fit_to_key_based_loss]
        self.equinox, self.unwrap = equinox, paramax.unwrap

    def transform(self, D, C=None):
        affine = self.make.Affine()
        return self.make.MaskedAutoregressive(
            self.key, transformer=affine, dim=D, cond_dim=C, nn_width=2 * D, nn_depth=1
        )

    def behind(self, transform, D):
        return self.dist.Transformed(self.dist.StandardNormal((D,)), transform)

    def flow(self, D):
        transform = self.transform(D)
        counting, calls = self.counted(lambda net, x: net(x))

        class Counted(self.equinox.Module):
            net: self.equinox.Module

            def __call__(self, x):
                return counting(self.net, x)

        def place(transform):
            return transform.masked_autoregressive_mlp

        watched = self.equinox.tree_at(place, transform, Counted(place(transform)))
        bare, q = self.unwrap(watched), self.behind(watched, D)
        return SimpleNamespace(
            forward=jnp.vectorize(lambda x: bare.transform(x), signature="(d)->(d)"),
            inverse=jnp.vectorize(lambda y: bare.inverse(y), signature="(d)->(d)"),
            log_det=jax.vmap(lambda x: bare.transform_and_log_det(x)[1]),
            draw=lambda: q.sample(self.key),
            score=q.log_prob,
            draw_and_score=lambda: q.sample_and_log_prob(self.key),
            calls=calls,
            q=q,
            unwatched=self.behind(transform, D),
        )

    def conditional(self, D, C):
        return jax.vmap(self.unwrap(self.transform(D, C)).transform)

    def splines(self):
        spline, x = self.make.RationalQuadraticSpline(knots=5, interval=4), self.noise(4)
        sizes = {"untransformed_dim": 2, "dim": 4, "nn_width": 16, "nn_depth": 1}
        coupled = self.unwrap(self.make.Coupling(self.key, transformer=spline, **sizes))
        return np.allclose(coupled.inverse(coupled.transform(x)), x, atol=1e-3)

    def landings(self):
        """The gradient where flow and target agree, and the network calls."""
        flow, key = self.flow(8), self.key
        weights, rest = self.equinox.partition(flow.q, self.equinox.is_inexact_array)

        def at(stick, weights):
            make, target = self.training.losses.ElboLoss, flow.unwatched.log_prob
            return make(target, 1, stick_the_landing=stick)(weights, rest, key)

        return self.slopes([partial(at, True)], partial(at, False), weights, flow.calls)

    def stops(self):
        data = self.noise(1000, 2)
        _, losses = self.fit(self.behind(self.transform(2), 2), data, max_epochs=1000)
        return len(losses["train"]) < 1000 and "on data"

    def fit(self, q, data, **options):
        fit = self.training.fit_to_data
        return fit(self.key, q, data, learning_rate=0.02, show_progress=False, **options)

    def compiled(self):
        loss = self.training.losses.ElboLoss(self.target, 4)
        q, fit = self.behind(self.transform(2), 2), self.training.fit_to_key_based_loss
        return python_rests(
            self, lambda steps: fit(self.key, q, loss_fn=loss, steps=steps, show_progress=False)
        )

    def simulated(self):
        """One latent, and an unused one, because the network needs two."""
        mu = self.noise(5000, 2)
        y = mu[:, :1] + self.noise(5000, 5)
        q, _ = self.fit(self.behind(self.make.Invert(self.transform(2, 5)), 2), (mu, y))
        draws = q.sample(self.key, (2000,), condition=jnp.full(5, 2.0))
        return solves_the_simulated(draws[:, 0])
