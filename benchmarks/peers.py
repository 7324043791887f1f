"""Features of seven libraries with inverse autoregressive flows.

Each row of the README's table is tried on every library, in a process of its own. Features of flows
are tried on the flow that `torch_libraries` and `jax_libraries` build with the library's own
parts; the other rows are jobs there. If a library has no method for a job, its public names are
searched, or the parameters of its training loops. So "no" means that it failed, or that nothing was
found, and "-" that the library has no models, guides or loops. If a search finds something, this
stops with an error: a new version may have the feature.
"""

import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import re
import subprocess
import sys

import jax
import numpy as np

from benchmarks import jax_libraries, torch_libraries
from benchmarks.common import save

LIBRARIES = {
    "Pyro": torch_libraries.Pyro,
    "NumPyro": jax_libraries.NumPyro,
    "Zuko": torch_libraries.Zuko,
    "nflows": torch_libraries.Nflows,
    "TFP": jax_libraries.TFP,
    "FlowJAX": jax_libraries.FlowJAX,
    "pyro_iaf": torch_libraries.PyroIAF,
}


def sums_the_log_determinant_over_the_vector(lib):
    flow = lib.flow(4)
    return tuple(flow.log_det(lib.noise(5, 4)).shape) == (5,)


def draws_and_scores_in_one_network_pass(lib):
    flow = lib.flow(6)
    flow.draw_and_score()
    calls = flow.calls()
    return calls == 1 or f"{calls} passes"


def scores_draws_handed_back_later_without_inverting(lib):
    flow = lib.flow(6)
    draws = [flow.draw() for _ in range(10)]
    flow.calls()
    for y in draws:
        flow.score(y)
    return flow.calls() <= 10


def takes_a_context(lib):
    """One context for each row, which affects no other row."""
    carry, x = lib.conditional(4, 2), lib.noise(5, 4)
    context = np.ones((5, 2))
    other = context.copy()
    other[2] = -1.0
    one, two = (np.asarray(detached(carry(x, lib.asarray(c)))) for c in (context, other))
    moved = (one != two).any(-1)
    return moved.tolist() == [False, False, True, False, False] and lib.context


def inverts_in_fewer_passes_than_coordinates(lib):
    flow = lib.flow(40)
    y = lib.asarray(np.asarray(detached(flow.forward(lib.noise(1, 40)))))
    flow.calls()
    x = flow.inverse(y)
    calls = flow.calls()
    assert np.allclose(detached(flow.forward(x)), y, atol=1e-3)
    return calls < 40


def differentiates_an_inverse_without_a_graph_for_each_coordinate(lib):
    flow, x = lib.flow(40), lib.noise(200, 40)
    return lib.kept(flow.inverse, x) < 5 * lib.kept(flow.forward, x)


def differentiates_an_inverse_twice(lib):
    flow, y = lib.flow(4), lib.noise(4)
    for how, hessian in lib.hessians().items():
        try:
            curvature = hessian(lambda y: flow.inverse(y[None]).sum(), y)
        except RuntimeError:
            continue
        return bool(np.isfinite(detached(curvature)).all()) and how
    return False


def runs_through_xla(lib):
    return isinstance(lib.flow(4).draw(), jax.Array)


def starts_a_guide_near_the_posterior(lib):
    """Whether the ELBO is within a nat of the evidence before the first step."""
    return lib.start() < 1 if hasattr(lib, "start") else "-"


def sticks_the_landing(lib):
    """Whether some loss has a zero gradient where a flow of 8 coordinates is its own target."""
    if not hasattr(lib, "landings"):
        return job("landings", "elbo|stick_?the|landing")(lib)
    calls = [calls for slope, calls in lib.landings() if slope < 1e-3]
    return bool(calls) and (min(calls) < 8 or "by inverting")


def detached(x):
    return x.detach() if hasattr(x, "detach") else x


def job(method, words, *, models=False, loops=False):
    """A row by a job of the library, or by its public names or its loops' parameters."""

    def feature(lib):
        if hasattr(lib, method):
            return getattr(lib, method)()
        if (models and not lib.models) or (loops and not hasattr(lib, "loops")):
            return "-"
        found = parameters(lib.loops, words) if loops else public_names(lib.package, words)
        if found:
            raise LookupError(f"{lib.package} may do it by now: {sorted(found)[:20]}")
        return False

    return feature


def parameters(functions, words):
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return {name for name in names if re.search(words, name)}


def public_names(package, words):
    """Names of modules and of their contents that contain one of the words."""
    root = importlib.import_module(package)
    found = set()
    for module in pkgutil.walk_packages(root.__path__, package + ".", onerror=lambda _: None):
        parts = module.name.removeprefix(package).split(".")
        if any(part.startswith("_") or part in ("internal", "conftest") for part in parts):
            continue
        try:
            found |= {parts[-1], *dir(importlib.import_module(module.name))}
        except Exception:  # it needs a package that isn't installed
            found.add(parts[-1])
    return {name for name in found if name[0] != "_" and re.search(words, name.lower())}


def titled(*features):
    return {feature.__name__.replace("_", " "): feature for feature in features}


FEATURES = {
    **titled(
        sums_the_log_determinant_over_the_vector,
        draws_and_scores_in_one_network_pass,
        scores_draws_handed_back_later_without_inverting,
        takes_a_context,
        inverts_in_fewer_passes_than_coordinates,
        differentiates_an_inverse_without_a_graph_for_each_coordinate,
        differentiates_an_inverse_twice,
    ),
    "runs through XLA": runs_through_xla,
    "has coupling layers of splines": job("splines", "spline|coupling"),
    "has continuous flows": job("continuous", "ffjord|^cnf|free_?form"),
    "makes a guide with flows from a model": job("guide_with_flows", "guide", models=True),
    "follows subsampled plates with flows": job(
        "subsamples", "(^|_)plates?$|subsampl", models=True
    ),
    "has a guide that takes an encoder": job("encoder", "encoder|amorti", models=True),
    **titled(starts_a_guide_near_the_posterior, sticks_the_landing),
    "compiles a step": job("compiled", "compile|jit", models=True),
    "stops training once it has settled": job("stops", "stop|patience|converge", loops=True),
    "goes on with a broken run": job("resumes", "resume|checkpoint|state", loops=True),
    "trains on simulated data": job("simulated", "csis$|simulat|amorti|^npe"),
    "diagnoses by k-hat": job("khat", "psis|k_?hat|pareto_?smooth"),
    "runs NUTS in a flow's coordinates": job("neutra", "neutra|nuts|hmc"),
}


def answer(feature, kind):
    found = feature(kind())
    return found if isinstance(found, str) else "yes" if found else "no"


def column(name):
    """All results of a library, from a process of its own."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.peers", name],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    if len(sys.argv) > 1:
        kind = LIBRARIES[sys.argv[1]]
        print(json.dumps({name: answer(feature, kind) for name, feature in FEATURES.items()}))
        return
    columns = {name: column(name) for name in LIBRARIES}
    rows = [
        {"feature": feature} | {name: answers[feature] for name, answers in columns.items()}
        for feature in FEATURES
    ]
    packages = sorted({package for kind in LIBRARIES.values() for package in kind.packages})
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in packages}
    save("peers", "what each library gives", rows, versions=versions)


if __name__ == "__main__":
    main()
