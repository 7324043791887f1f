"""The addresses of names of Pyro and PyTorch that our pages refer to.

Sphinx usually downloads inventories of other projects' names from their sites. This module writes
small ones instead, so that a build needs no network. Add a name to ``PAGES`` if Sphinx does not
find it. Aliases are translated: users import ``pyro.infer.SVI``, and Pyro's documentation has it as
``pyro.infer.svi.SVI``.
"""

import functools
import inspect
import pydoc
import zlib

__all__ = ["describe", "mapping"]

SITES = {
    "pyro": "https://docs.pyro.ai/en/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}

# The names on each page.
PAGES = {
    "pyro": {
        "distributions.html": [
            "pyro.distributions.ConditionalTransformedDistribution",
            "pyro.distributions.Delta",
            "pyro.distributions.MixtureSameFamily",
            "pyro.distributions.TorchDistribution",
            "pyro.distributions.TransformedDistribution",
            "pyro.distributions.transforms.AffineAutoregressive",
        ],
        "infer.autoguide.html": [
            "pyro.infer.autoguide.AutoContinuous",
            "pyro.infer.autoguide.AutoGuideList",
            "pyro.infer.autoguide.AutoIAFNormal",
            "pyro.infer.autoguide.AutoMultivariateNormal",
            "pyro.infer.autoguide.AutoNormal",
            "pyro.infer.autoguide.initialization.init_to_median",
        ],
        "inference_algos.html": [
            "pyro.infer.svi.SVI",
            "pyro.infer.trace_elbo.Trace_ELBO",
            "pyro.infer.trace_mean_field_elbo.TraceMeanField_ELBO",
        ],
        "optimization.html": ["pyro.optim.clipped_adam.ClippedAdam"],
        "nn.html": ["pyro.nn.auto_reg_nn.AutoRegressiveNN"],
        "primitives.html": ["pyro.clear_param_store", "pyro.plate", "pyro.sample"],
    },
    "torch": {
        "data.html": ["torch.utils.data.DataLoader"],
        "distributions.html": [
            "torch.distributions.distribution.Distribution",
            "torch.distributions.transforms.AffineTransform",
            "torch.distributions.transforms.Transform",
        ],
        "generated/torch.compile.html": ["torch.compile"],
        "generated/torch.nn.Module.html": ["torch.nn.Module"],
        "size.html": ["torch.Size"],
        "tensors.html": ["torch.Tensor"],
    },
}


def mapping(folder):
    """Writes the inventories into a folder, and returns the value of ``intersphinx_mapping``."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for project, site in SITES.items():
        path = folder / f"{project}.inv"
        path.write_bytes(inventory(project))
        found[project] = (site, str(path))
    return found


def inventory(project):
    """The bytes of an inventory in Sphinx's format."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = [
        f"{name} py:{'class' if inspect.isclass(located(name)) else 'function'} 1 {page}#$ -\n"
        for page, names in PAGES[project].items()
        for name in names
    ]
    return head.encode() + zlib.compress("".join(lines).encode())


def located(name):
    """The object of a dotted name in the installed packages."""
    thing = pydoc.locate(name)
    if thing is None:
        raise ValueError(f"inventories.py should list existing names; {name} does not exist.")
    return thing


def describe(app, env, node, contnode):
    """Replaces an alias by its documented name, before Sphinx looks it up in the inventories."""
    node["reftarget"] = documented().get(node.get("reftarget"), node.get("reftarget"))


@functools.cache
def documented():
    """The documented name of each alias: of where a thing is imported from, or defined."""
    found = {"Tensor": "torch.Tensor", "nn.Module": "torch.nn.Module"}  # as in annotations
    for pages in PAGES.values():
        for name in (name for names in pages.values() for name in names):
            thing = located(name)
            *package, last = name.split(".")
            short = ".".join([*package[:-1], last])
            for alias in (f"{thing.__module__}.{thing.__qualname__}", short):
                if pydoc.locate(alias) is thing:
                    found[alias] = name
    return found
