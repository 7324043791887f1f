# %% [markdown]
# # More than one process
#
# Blood pressure is two numbers, and a cuff that sits badly is off in both. Given the readings of
# very many patients, where is each patient's own pressure, and where are patients on average? When
# one process is too slow for the readings, or can't hold them, PyTorch's own engine shares them
# out. What has to be said to it, so that many processes find the posterior that one would?
#
# It takes a quarter of a minute on a CPU. As a notebook, and by `python tutorials/distributed.py`,
# it is one process; two, begun anew up to three times where one of them dies, are
#
#     export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#     torchrun --standalone --nproc-per-node 2 --max-restarts 3 tutorials/distributed.py
#
# The variable gives every start a store of addresses of its own; without it, one that begins anew
# may look for the dead (PyTorch's issue 135712). `--smoke` runs every line in seconds, to no
# purpose but to show that it runs.

# %%
import argparse
import os
import pathlib
import signal
import sys
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.distributed.nn  # before there is a group: its functions hold one that they find
from pyro.infer import Trace_ELBO
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from pyro_iaf import AutoHierarchicalIAF

plt.switch_backend("Agg")  # a file, no window
parser = argparse.ArgumentParser(description="One posterior by several processes.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--patients", type=int, default=4000)
parser.add_argument("--batch", type=int, default=1000, help="patients a step, of all processes")
parser.add_argument("--epochs", type=int, default=400)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--die-at", type=int, metavar="STEP", help="of the last rank: a fire drill")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()
if args.smoke:
    args.patients, args.batch, args.epochs = 200, 100, 3

# %% [markdown]
# ## The ranks
#
# Every process runs this file from top to bottom. `torchrun` tells each of them its number, the
# rank, and where the others are; a process that was started alone is a group of one. Each has a GPU
# where there are enough, and they talk by NCCL then; otherwise they are on the CPU, and talk by
# gloo.

# %%
alone = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
has_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else "cpu"
if has_gpu:
    torch.cuda.set_device(device)
distributed.init_process_group(
    "nccl" if has_gpu else "gloo", **({} if "RANK" in os.environ else alone)
)
rank, num_ranks = distributed.get_rank(), distributed.get_world_size()

# %% [markdown]
# ## The model
#
# A patient's pressures scatter around the mean of all, and a reading around the patient's. What a
# step sees is a minibatch. The plate says how many patients there are, and counts each that came
# for `patients / len(y)`.

# %%
spread = torch.eye(2)  # between patients
error = torch.tensor([[0.5, 0.4], [0.4, 0.5]])  # of a reading


def patients(y):
    return pyro.plate("patients", args.patients, subsample=y)


def model(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with patients(y):
        own = pyro.sample("own", dist.MultivariateNormal(mean, spread.to(y)))
        pyro.sample("y", dist.MultivariateNormal(own, error.to(y)), obs=y)


# %% [markdown]
# ## The shards
#
# In each epoch the sampler puts the patients in a new order, the same on all ranks, and deals them
# out: no rank reads the rows of another. It has to deal out equally many. By default it repeats
# some for that; with `drop_last` it leaves some out, others in each epoch. The readings here are
# made up and in memory. A dataset that reads the rows it is asked for from a disk takes their place
# when they outgrow it.

# %%
maker = torch.Generator().manual_seed(1)


def readings(how_many):
    own, off = (
        torch.randn(how_many, 2, generator=maker) @ torch.linalg.cholesky(covariance).T
        for covariance in (spread, error)
    )
    return torch.tensor([1.0, -2.0]) + own + off


y, new = readings(args.patients), readings(100)
sampler = DistributedSampler(y, seed=args.seed, drop_last=True)
batches = BatchSampler(sampler, args.batch // num_ranks, drop_last=True)
loader = DataLoader(y, sampler=batches, batch_size=None)  # rows of a batch are read at once

# %% [markdown]
# ## The guide, and why the gradient is right
#
# The guide has a flow for the mean, and one for patients that listens to the mean and to what an
# encoder makes of the reading. It has no parameter that belongs to a patient, so its size doesn't
# grow with the data, and ranks have little to tell each other. It starts about as wide as a reading
# leaves a patient's pressures. `setup` builds it, since its parameters must be there before they
# are shared. `Trace_ELBO()(model, guide)` is Pyro's own way to make a module of a loss, and
# `DistributedDataParallel` asks for no more: it gives all ranks the parameters of the first, and
# after each backward pass the *average* of their gradients.
#
# So each rank has to be right by itself. Its minibatch of b patients is as likely as any other b,
# and the plate counts each for `patients / b`, not for a share of that among the ranks: the ELBO of
# this is, in mean, the ELBO of all data, and so is its gradient. An average of R such gradients is
# unbiased too, with the noise of R b patients. Had each rank counted for its shard alone, the prior
# of the mean would have counted R times as much as it should.

# %%
pyro.set_rng_seed(args.seed)
encoder = nn.Sequential(nn.Linear(2, 64), nn.ELU(), nn.Linear(64, 8))
settings = {"num_flows": 1, "hidden_dims": [32, 32], "init_scale": 0.5}
guide = AutoHierarchicalIAF(model, encoder=encoder, create_plates=patients, **settings)
guide.to(device).setup(y[:2].to(device))
loss = DistributedDataParallel(Trace_ELBO()(model, guide))
optimizer = torch.optim.Adam(loss.parameters(), args.lr, betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, args.lr, total_steps=args.epochs * len(batches), pct_start=0.1, cycle_momentum=False
)

# %% [markdown]
# ## Checkpoints
#
# The first rank writes, into a file beside the checkpoint that then takes its place, so that a
# death in the middle leaves the last one whole. All ranks read it. If one is killed, `torchrun`
# ends the others and begins anew with all of them, and they go on after the last full epoch; if all
# die, the same command once more does it. Every epoch has a seed of its own on each rank: ranks
# draw different noise, and a run that went on draws what it would have drawn. So no generator has
# to be written down.

# %%
args.output.mkdir(parents=True, exist_ok=True)
checkpoint = args.output / "distributed_run.pt"
run = [args.patients, args.batch, args.epochs, args.lr, args.seed]
parts = {"guide": guide, "optimizer": optimizer, "schedule": schedule}


def save(epoch):
    state = {name: part.state_dict() for name, part in parts.items()}
    beside = checkpoint.with_suffix(".new")
    torch.save({"run": run, "epoch": epoch, **state}, beside)
    os.replace(beside, checkpoint)


def load():
    """The epoch to go on with."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location=device, weights_only=True)
    if state["run"] != run:
        raise ValueError(
            f"{checkpoint} is of a run with other settings, which did not end. Give these again, "
            "or take the file away."
        )
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["epoch"]


def begin(epoch):
    sampler.set_epoch(epoch)
    torch.manual_seed(args.seed + epoch * num_ranks + rank)


# %% [markdown]
# ## The fit
#
# An ordinary loop of PyTorch. The fire drill: `--die-at 100` has the last rank kill itself at step
# 100, at the first start.

# %%
is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
first = load()
distributed.barrier()  # nobody writes before all have read
if rank == 0:
    print(f"{num_ranks} processes" if num_ranks > 1 else "One process", f"from epoch {first} on")
start, start_epoch = time.perf_counter(), first
for epoch in range(first, args.epochs):
    begin(epoch)
    for step, part in enumerate(loader, epoch * len(batches)):
        optimizer.zero_grad()
        loss(part.to(device)).backward()
        if step == args.die_at and rank == num_ranks - 1 and is_first_start:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        schedule.step()
    if rank == 0:
        save(epoch + 1)
    if epoch == first:  # the first epoch sets things up
        start, start_epoch = time.perf_counter(), epoch + 1

# %% [markdown]
# A step sees `--batch` patients whatever the number of processes, so more of them do the same work,
# if all goes well in less time (strong scaling). With a thousand patients a step nothing is gained:
# most of its time is Python's and Pyro's own, which no process can share with another.
# `benchmarks/distributed.py` has up to 64,000.

# %%
if rank == 0 and start_epoch < args.epochs:
    rows = (args.epochs - start_epoch) * len(batches) * batches.batch_size * num_ranks
    print(f"{rows / (time.perf_counter() - start):,.0f} rows a second")

# %% [markdown]
# That was all there is to do for many. What the first rank has now, each has.

# %%
distributed.barrier()  # nobody hangs up while another still listens
del loss  # it holds the group, and the group its threads, which may end the program in an error
distributed.destroy_process_group()
if rank:
    sys.exit()
guide.cpu()
torch.save(guide.state_dict(), args.output / "distributed.pt")
checkpoint.unlink(missing_ok=True)  # the run has ended

# %% [markdown]
# ## The answer
#
# All is normal, so the posterior is known: of the mean by what all readings say of it, of a
# patient's own pressures by the reading and the mean. The latter holds for new patients too, and
# the guide has an answer for these: nobody has to train it on them.

# %%
with torch.no_grad():
    of_all = y.double()
    spread, error = spread.double(), error.double()
    precision = torch.linalg.inv(spread + error)
    mean_cov = torch.linalg.inv(len(y) * precision + torch.eye(2) / 3.0**2)
    mean_loc = mean_cov @ precision @ of_all.sum(0)
    weight = spread @ precision  # of the reading, against the mean
    rest = torch.eye(2) - weight
    own_loc = new.double() @ weight.T + rest @ mean_loc
    own_cov = weight @ error + rest @ mean_cov @ rest.T
    draws = guide.sample_posterior(100 if args.smoke else 20_000, new)
    draws = {name: values.double() for name, values in draws.items()}

# %% [markdown]
# In the picture, dots are the guide's draws, and ellipses hold half and nine tenths of the exact
# posterior. Look for the lean of both: readings lean together, and so does what they leave open.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
angles = torch.linspace(0, 2 * torch.pi, 100, dtype=torch.float64)
circle = torch.stack([angles.cos(), angles.sin()], -1)


def show(panel, draws, loc, cov, color):
    panel.plot(*draws[:500].T, ".", color=color, markersize=3, alpha=0.4)
    for share in (0.5, 0.9):
        radius = (-2 * torch.tensor(1 - share).log()).sqrt()
        panel.plot(*(loc + radius * circle @ torch.linalg.cholesky(cov).T).T, color=color)


show(left, draws["mean"], mean_loc, mean_cov, "tab:red")
for k in range(3):
    show(right, draws["own"][:, k], own_loc[k], own_cov, f"C{k}")
left.set(title=f"Mean of {len(y)} patients", xlabel="systolic", ylabel="diastolic")
right.set(title="Three new patients", xlabel="systolic")
picture = args.output / "distributed.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

# %% [markdown]
# ## Is it right?
#
# Means within 0.3 posterior standard deviations, spreads within a quarter of theirs, and the
# correlation of a patient's two pressures within 0.1.


# %%
def errors(draws, loc, cov):
    """The worst of a mean in standard deviations, of a spread as a share, of a correlation."""
    sd = cov.diagonal().sqrt()
    found = torch.einsum("n...i,n...j->...ij", draws - draws.mean(0), draws - draws.mean(0))
    found = found / (len(draws) - 1)
    spreads = found.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = found[..., 0, 1] / spreads.prod(-1)
    return (
        ((draws.mean(0) - loc) / sd).abs().max().item(),
        (spreads / sd).log().abs().max().exp().item() - 1,
        (correlation - cov[0, 1] / sd.prod()).abs().max().item(),
    )


for title, *exact in [("mean", mean_loc, mean_cov), ("own", own_loc, own_cov)]:
    of_mean, of_spread, of_correlation = errors(draws[title], *exact)
    print(
        f"{title:5} Largest error of a mean: {of_mean:.2f} sd; of a spread: {of_spread:.0%}; "
        f"of a correlation: {of_correlation:.2f}"
    )
    if not args.smoke:
        assert of_mean < 0.3
        assert of_spread < 0.25
        assert title == "mean" or of_correlation < 0.1

# %% [markdown]
# ## Where it bends
#
# Gradients travel after every step, so a step is as slow as its slowest rank, and a guide with a
# learned row for each patient, in place of the encoder, would send all rows each time. More
# processes at the same `--batch` change nothing in the noise of a step; larger batches lessen it,
# and the rate may rise. And a checkpoint lies where all ranks can read it: on several machines, on
# a disk that they share.
