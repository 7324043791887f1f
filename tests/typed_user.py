"""What a user with a type checker writes; `make lint` checks it strictly."""

import torch
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor, nn

import pyro_iaf
from pyro_iaf import (
    AutoHierarchicalIAF,
    AutoIAF,
    CompiledTrace_ELBO,
    Diagnosis,
    DiagonalNormal,
    FitResult,
    InverseAutoregressiveFlow,
    InverseAutoregressiveFlowStack,
    MaskedAutoregressiveNetwork,
    TraceSTL_ELBO,
    conditional_inverse_autoregressive_flow,
    diagnose,
    fit,
    inverse_autoregressive_flow,
    invert,
    solve_transposed,
)


def by_hand() -> Tensor:
    network = MaskedAutoregressiveNetwork(3, [16, 16], order=[2, 1, 0])
    shift, log_scale = network(torch.randn(5, 3))
    flow = InverseAutoregressiveFlow(network, univariate="gated")
    y: Tensor = flow(torch.randn(5, 3))
    x: Tensor = invert(flow, y)
    solved: Tensor = solve_transposed(flow, x, shift + log_scale)
    base = DiagonalNormal(torch.zeros(3), torch.ones(3))
    density: Tensor = base.log_prob(x)
    return density + solved.sum(-1) + flow.log_abs_det_jacobian(x, y)


def built() -> InverseAutoregressiveFlow | InverseAutoregressiveFlowStack:
    conditional = conditional_inverse_autoregressive_flow(3, 2, num_flows=2)
    flow = conditional.condition(torch.zeros(4, 2))
    return flow if flow(torch.zeros(3)).dim() else inverse_autoregressive_flow(3)


def model(y: Tensor | None = None) -> None: ...


def trained(encoder: nn.Module, y: Tensor) -> tuple[FitResult, Diagnosis, dict[str, Tensor]]:
    guide = AutoIAF(model, num_flows=3, hidden_dims=32, encoder=encoder)
    result = fit(model, guide, (y,), num_steps=100, loss=TraceSTL_ELBO(), checkpoint="run.pt")
    found = diagnose(model, guide, (y,))
    draws: dict[str, Tensor] = guide.sample_posterior(1000, y, resample=True)
    middle: dict[str, Tensor] = guide.median(y)
    quantiles: dict[str, Tensor] = guide.quantiles([0.05, 0.95], y)
    good: bool = found.khat < 0.7 and len(result.losses) == result.num_steps
    return result, found, draws if good else {**middle, **quantiles}


def stepped() -> float:
    guide = AutoHierarchicalIAF(model, context_dim=4)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.01}), CompiledTrace_ELBO(num_particles=4))
    loss: float = svi.step()
    return loss


version: str = pyro_iaf.__version__
