"""Where Pyro and PyTorch describe what our pages refer to.

Sphinx looks foreign names up in inventories, which it fetches from their sites. These are small
ones of the same kind, so that a build is the same with a network and without: what a page refers
to, and Sphinx doesn't find, is to be added here. People import ``pyro.infer.SVI``, which is
described as ``pyro.infer.svi.SVI``, so such names are translated.
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

# Which page describes which names.
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
    """Writes the inventories into a folder; the value for ``intersphinx_mapping``."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for project, site in SITES.items():
        path = folder / f"{project}.inv"
        path.write_bytes(inventory(project))
        found[project] = (site, str(path))
    return found


def inventory(project):
    """The bytes of an inventory, as Sphinx reads it."""
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = [
        f"{name} py:{kind_of(thing_called(name))} 1 {page}#$ -\n"
        for page, names in PAGES[project].items()
        for name in names
    ]
    return head.encode() + zlib.compress("".join(lines).encode())


def kind_of(thing):
    """What Sphinx calls it."""
    return "class" if inspect.isclass(thing) else "function"


def thing_called(name):
    """What a name stands for in the packages that are installed."""
    thing = pydoc.locate(name)
    if thing is None:
        raise ValueError(f"There is no {name}; inventories.py should name what there is.")
    return thing


def describe(app, env, node, contnode):
    """Before Sphinx looks for a name elsewhere: puts the name there that is described."""
    node["reftarget"] = described().get(node.get("reftarget"), node.get("reftarget"))


@functools.cache
def described():
    """From names by which things are imported, or defined, to names that are described."""
    found = {"Tensor": "torch.Tensor", "nn.Module": "torch.nn.Module"}  # annotations say so
    for pages in PAGES.values():
        for name in (name for names in pages.values() for name in names):
            thing = thing_called(name)
            *package, last = name.split(".")
            short = ".".join([*package[:-1], last])
            for alias in (f"{thing.__module__}.{thing.__qualname__}", short):
                if pydoc.locate(alias) is thing:
                    found[alias] = name
    return found
