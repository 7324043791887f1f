"""What each rank of test_distributed.py does, with what the tutorial defines before it trains."""

import pathlib

import threads
import torch
from pyro.infer import Trace_ELBO
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pyro_iaf import DiagonalNormal, TraceSTL_ELBO

PATH = pathlib.Path(__file__).parent.parent / "tutorials" / "distributed.py"


def defined():
    """The tutorial's names, up to where it trains."""
    space = {"__name__": PATH.stem}
    code, found, _ = PATH.read_text().partition("# %% [markdown]\n# ## The fit")
    assert found
    exec(compile(code, str(PATH), "exec"), space)
    return space


def end(space):
    """Ends the tutorial's group of processes, and the threads of gloo with it."""
    del space["loss"]  # it holds the group
    distributed.destroy_process_group()
    assert not threads.of_gloo(), "no thread of gloo should outlive its group"


def held_still(normal, sample_shape=()):
    """Draws with the same noise in each row, so that only rows tell minibatches apart."""
    shape = normal._extended_shape(torch.Size(sample_shape))
    return normal.loc + normal.scale * torch.linspace(-0.7, 1.1, shape[-1]).expand(shape)


def of_all_ranks(thing):
    things = [None] * distributed.get_world_size()
    distributed.all_gather_object(things, thing)
    return things


def gradient(loss, minibatches):
    """Its mean over the minibatches."""
    loss.zero_grad()
    for y in minibatches:
        (loss(y) / len(minibatches)).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in loss.named_parameters()}


def main():
    torch.set_default_dtype(torch.float64)
    space = defined()
    y, args = space["y"], space["args"]

    space["begin"](0)
    first, second = of_all_ranks(torch.rand(3).tolist())
    assert first != second, "ranks should draw different noise"
    rows = [row for shard in of_all_ranks(list(space["sampler"])) for row in shard]
    assert sorted(rows) == list(range(args.patients)), "shards should share out the rows"

    DiagonalNormal.rsample = held_still
    for elbo in (Trace_ELBO(), TraceSTL_ELBO()):
        loss = elbo(space["model"], space["guide"])
        of_one = gradient(loss, [y])
        assert all(of_one[name].norm() > 0 for name in of_one), "a gradient is missing"
        of_many = gradient(DistributedDataParallel(loss), list(space["loader"]))
        torch.testing.assert_close(of_many, of_one, rtol=1e-9, atol=1e-9 * args.patients)
    print(f"Rank {space['rank']} of {space['num_ranks']} agrees", flush=True)
    end(space)


if __name__ == "__main__":
    main()
