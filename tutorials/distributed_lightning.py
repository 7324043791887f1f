# %% [markdown]
# # The same under Lightning
#
# `distributed.py` has its own training loop for several processes. Lightning does most of that by
# itself. How much code is left? The model is the same, readings of blood pressure with errors by
# the cuff, and so is its exact answer.
#
# It takes a quarter of a minute on a CPU, and needs `pip install '.[lightning]'`. For two processes
# run `python tutorials/distributed_lightning.py --processes 2`. `--smoke` runs every line in
# seconds, only to check that it runs.

# %%
import argparse
import pathlib
import sys

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import torch.distributed.nn  # before the group exists: its functions keep a reference to one
from pyro.infer import Trace_ELBO
from torch import distributed, nn
from torch.utils.data import DataLoader

from pyro_iaf import AutoHierarchicalIAF

try:
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy
except ModuleNotFoundError:
    sys.exit("This tutorial needs Lightning: pip install '.[lightning]'")

plt.switch_backend("Agg")  # writes files, opens no window
parser = argparse.ArgumentParser(description="One posterior by Lightning.")
parser.add_argument("--smoke", action="store_true", help="run every line in seconds")
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--patients", type=int, default=4000)
parser.add_argument("--batch", type=int, default=1000, help="patients per step, over all processes")
parser.add_argument("--epochs", type=int, default=400)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("tutorials/output"))
args, _ = parser.parse_known_args()
if args.smoke:
    args.patients, args.batch, args.epochs = 200, 100, 3

# %% [markdown]
# ## The model and the guide
#
# The plate multiplies the log density of each patient in a minibatch by `patients / len(y)`, on
# every rank. Lightning averages the gradients of the ranks, so each rank's gradient has to be
# unbiased by itself.

# %%
spread = torch.eye(2)  # between patients
error = torch.tensor([[0.5, 0.4], [0.4, 0.5]])  # of a reading
maker = torch.Generator().manual_seed(1)
own, off = torch.randn(2, args.patients, 2, generator=maker)
y = torch.tensor([1.0, -2.0]) + own + off @ torch.linalg.cholesky(error).T


def patients(y):
    return pyro.plate("patients", args.patients, subsample=y)


def model(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with patients(y):
        own = pyro.sample("own", dist.MultivariateNormal(mean, spread.to(y)))
        pyro.sample("y", dist.MultivariateNormal(own, error.to(y)), obs=y)


pyro.set_rng_seed(0)
encoder = nn.Sequential(nn.Linear(2, 64), nn.ELU(), nn.Linear(64, 8))
settings = {"num_flows": 1, "hidden_dims": [32, 32], "init_scale": 0.5}
guide = AutoHierarchicalIAF(model, encoder=encoder, create_plates=patients, **settings)
guide.setup(y[:2])

# %% [markdown]
# ## The fit
#
# A `LightningModule` defines the loss of a minibatch and its optimiser. Every process runs this
# file with the same seed, so each rank sets another one before it draws. The Trainer provides the
# sampler, the devices and the checkpoints.


# %%
class Fit(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.loss = Trace_ELBO()(model, guide)

    def on_train_start(self):
        torch.manual_seed(1 + self.global_rank)

    def training_step(self, y):
        return self.loss(y)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), args.lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            args.lr,
            total_steps=self.trainer.estimated_stepping_batches,
            pct_start=0.1,
            cycle_momentum=False,
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


trainer = pl.Trainer(
    strategy=DDPStrategy() if args.processes > 1 else "auto",
    accelerator="gpu" if torch.cuda.device_count() >= args.processes else "cpu",
    devices=args.processes,
    max_epochs=args.epochs,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
batches = DataLoader(y, args.batch // args.processes, shuffle=True, drop_last=True)
trainer.fit(Fit(), batches)
if distributed.is_initialized():
    distributed.barrier()  # no rank may leave while another still communicates
    distributed.destroy_process_group()  # Lightning leaves gloo's threads running at the exit
if not trainer.is_global_zero:
    sys.exit()
print(f"{trainer.world_size} processes took {trainer.global_step} steps")

# %% [markdown]
# ## Is it right?
#
# All distributions are normal, so the posterior of the mean is known. In the picture dots are the
# guide's draws, and the ellipse holds nine tenths of the exact posterior.

# %%
precision = torch.linalg.inv(spread + error)
cov = torch.linalg.inv(args.patients * precision + torch.eye(2) / 3.0**2)
loc, sd = cov @ precision @ y.sum(0), cov.diagonal().sqrt()
draws = guide.cpu().sample_posterior(20_000, y[:1])["mean"]
angles = torch.linspace(0, 2 * torch.pi, 100)
circle = torch.stack([angles.cos(), angles.sin()], -1)
radius = (-2 * torch.tensor(0.1).log()).sqrt()
figure, panel = plt.subplots(figsize=(5, 4.5), layout="constrained")
panel.plot(*draws[:500].T, ".", color="tab:red", markersize=3, alpha=0.4)
panel.plot(*(loc + radius * circle @ torch.linalg.cholesky(cov).T).T, color="0.2", lw=1)
panel.set(title=f"Mean of {args.patients} patients", xlabel="systolic", ylabel="diastolic")
args.output.mkdir(parents=True, exist_ok=True)
picture = args.output / "distributed_lightning.png"
figure.savefig(picture, dpi=120)
print(f"The picture is in {picture}")

of_mean = ((draws.mean(0) - loc) / sd).abs().max().item()
of_spread = (draws.std(0) / sd).log().abs().max().exp().item() - 1
print(f"Largest error of a mean: {of_mean:.2f} sd; of an sd: {of_spread:.0%}")
if not args.smoke:
    assert of_mean < 0.3
    assert of_spread < 0.25

# %% [markdown]
# ## Limitations
#
# `DataLoader` reads rows one by one, which is slower for rows as short as these than reading a
# minibatch at once, as `distributed.py` does. In a notebook several processes need
# `strategy="ddp_notebook"`.
