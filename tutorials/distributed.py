# %% [markdown]
# # More than one process
#
# Blood pressure is two numbers, and a cuff that sits badly shifts both. Given the readings of very
# many patients, what is each patient's own pressure, and what is the mean over patients? If one
# process is too slow for the readings, or can't hold them, PyTorch's `DistributedDataParallel`
# divides them among several. What does it need to find the same posterior as one process?
#
# It takes a quarter of a minute on a CPU. As a notebook, and by `python tutorials/distributed.py`,
# it is one process. For two processes, which are restarted up to three times if one dies, run
#
#     export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#     torchrun --standalone --nproc-per-node 2 --max-restarts 3 tutorials/distributed.py
#
# The variable gives every start its own store of addresses; without it a restarted process may wait
# for a dead one (PyTorch's issue 135712). `--smoke` runs every line in seconds, only to check that
# it runs.

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
import torch.distributed.nn  # before the group exists: its functions keep a reference to one
from pyro.infer import Trace_ELBO
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from pyro_iaf import AutoHierarchicalIAF

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="One posterior by several processes.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--patients", type=int, default=4000)
parser.add_argument("--batch", type=int, default=1000, help="patients per step, over all processes")
parser.add_argument("--epochs", type=int, default=400)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--die-at", type=int, metavar="STEP", help="kills the last rank at this step")
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()
if args.smoke:
    args.patients, args.batch, args.epochs = 200, 100, 3

# %% [markdown]
# ## The ranks
#
# Every process runs this file from top to bottom. `torchrun` gives each process its number, the
# rank, and the address of the others; a process that was started alone is a group of one. If there
# are enough GPUs, each process has one, and they communicate by NCCL; otherwise they run on the CPU
# and communicate by gloo.

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
# A patient's pressures scatter around the mean over patients, and readings around the patient's
# pressures. A step sees a minibatch. The plate has the number of all patients, so it multiplies the
# log density of each in the minibatch by `patients / len(y)`.

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
# In each epoch the sampler shuffles the patients, in the same order on all ranks, and divides them:
# no two ranks read the same rows. All ranks have to get equally many. By default the sampler
# repeats some rows for that; with `drop_last` it omits some, others in each epoch. The readings
# here are simulated and in memory. For data that are larger than memory, use a dataset that reads
# the requested rows from a disk.

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
# The guide has a flow for the mean, and one for patients that depends on the mean and on the
# encoder's output for the reading. It has no parameters of single patients, so its size doesn't
# grow with the data, and ranks exchange little. It starts about as wide as the posterior of a
# patient's pressures given the reading. `setup` builds it, because its parameters must exist before
# they are shared. `Trace_ELBO()(model, guide)` is Pyro's way to make a module of a loss, and
# `DistributedDataParallel` takes any module: it copies the parameters of the first rank to all, and
# after each backward pass gives all ranks the *average* of their gradients.
#
# So each rank's gradient has to be unbiased by itself. Its minibatch of b patients is a random
# sample of all, and the plate multiplies each log density by `patients / b`, not by a share of that
# among the ranks. So the mean of this ELBO is the ELBO of all data, and the same holds for its
# gradient. An average of R such gradients is unbiased too, with the noise of R b patients. If each
# rank scaled only to its own shard, the prior of the mean would have R times the weight that it
# should.

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
# The first rank writes a file beside the checkpoint and then renames it, so that a crash during
# writing leaves the last checkpoint complete. All ranks read it. If one rank is killed, `torchrun`
# stops the others and restarts all, and they resume after the last full epoch. If all die, run the
# same command again. Every epoch has its own seed on each rank: ranks draw different noise, and a
# resumed run draws the same noise as an uninterrupted one. So the state of no generator has to be
# saved.

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
    """The epoch to resume with."""
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
# An ordinary PyTorch loop. `--die-at 100` tests a restart: the last rank kills itself at step 100
# of the first start.

# %%
is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
first = load()
distributed.barrier()  # so that no rank writes before all have read
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
# A step sees `--batch` patients for any number of processes, so more processes do the same work,
# ideally in less time (strong scaling). With a thousand patients per step nothing is gained: most
# of its time is the overhead of Python and Pyro, which every process has.
# `benchmarks/distributed.py` has up to 64,000.

# %%
if rank == 0 and start_epoch < args.epochs:
    rows = (args.epochs - start_epoch) * len(batches) * batches.batch_size * num_ranks
    print(f"{rows / (time.perf_counter() - start):,.0f} rows a second")

# %% [markdown]
# That is all for several processes. All ranks now have the same parameters.

# %%
distributed.barrier()  # no rank may leave while another still communicates
del loss  # it keeps the group, whose threads may crash the program at its end
distributed.destroy_process_group()
if rank:
    sys.exit()
guide.cpu()
torch.save(guide.state_dict(), args.output / "distributed.pt")
checkpoint.unlink(missing_ok=True)  # the run has ended

# %% [markdown]
# ## The answer
#
# All distributions are normal, so the posterior is known: for the mean given all readings, and for
# a patient's pressures given the reading and the mean. The latter also holds for new patients, for
# whom the guide needs no training.

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
# posterior. Both should be tilted, because the errors of the two readings are correlated.

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
# Means should be within 0.3 posterior standard deviations, standard deviations within a quarter,
# and the correlation of a patient's two pressures within 0.1.


# %%
def errors(draws, loc, cov):
    """The largest errors of a mean in sd, of an sd as a share, and of a correlation."""
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
# ## Limitations
#
# Gradients are exchanged after every step, so a step is as slow as its slowest rank. A guide with a
# learned row for each patient, instead of the encoder, would exchange all rows at every step. More
# processes at the same `--batch` don't change the noise of a step; larger batches reduce it, and
# allow a larger learning rate. The checkpoint has to be on a disk that all machines can read.
