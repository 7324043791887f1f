import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.training.optimizers import Adam, FlatAdam, RowAdam

RATE, NUM_ROWS = 0.03, 6


class Eager:
    """As fit takes its steps uncompiled."""

    def __init__(self, table):
        self.table = table.clone().requires_grad_()
        self.optimizer = Adam(1)
        self.optimizer.groups[0].append(self.table)

    def take(self, gradient):
        self.table.grad = gradient.clone()
        if gradient.isfinite().all():
            self.optimizer.step([RATE])

    def state(self):
        return self.optimizer.state_dict()

    def restore(self, state):
        self.optimizer.load_state_dict(state)


class ByRule(Eager):
    """As they do on devices and dtypes that PyTorch's kernel lacks."""

    def take(self, gradient):
        self.table.grad = gradient.clone()
        if gradient.isfinite().all():
            with torch.no_grad():
                self.optimizer._step_by_rule([self.table], RATE)


class Flat(Eager):
    """As compiled steps do, which take over what the eager ones left, and give it back."""

    def take(self, gradient):
        adam = FlatAdam([self.table], self.optimizer, [1.0])
        with torch.no_grad():
            loss, ess, largest = torch.zeros(()), torch.zeros(()), torch.tensor(torch.inf)
            numbers = loss, ess, gradient.reshape(-1), torch.tensor(RATE), largest
            FlatAdam.step(adam.tensors, *numbers)
        adam.store()
        adam.store_state()


class Rows:
    """As those of tables of contexts do."""

    def __init__(self, table):
        self.table = table.clone().requires_grad_()
        self.optimizer = RowAdam([self.table])

    def take(self, gradient, rows=None):
        rows = torch.arange(NUM_ROWS) if rows is None else rows
        shape = self.table.shape
        sparse = torch.sparse_coo_tensor(rows[None], gradient, shape, check_invariants=True)
        self.table.grad = sparse
        self.optimizer.gradients()
        if gradient.isfinite().all():
            self.optimizer.step(RATE)

    def state(self):
        return self.optimizer.state()

    def restore(self, state):
        self.optimizer.restore(state)


OPTIMIZERS = {"eager": Eager, "by rule": ByRule, "flat": Flat, "row-sparse": Rows}


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS)
def kind(request):
    return request.param


def gradients(num_steps):
    """Of all sizes, some of them not finite."""
    for k in range(num_steps):
        gradient = torch.randn(NUM_ROWS, 3) * 10.0 ** (k % 7 - 4)
        if k % 11 in (0, 5):
            gradient[k % NUM_ROWS, 0] = torch.nan if k % 2 else torch.inf
        yield gradient


def expected(table, steps):
    """What torch.optim.Adam makes of the steps that are finite."""
    table = table.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=RATE)
    for gradient in steps:
        if gradient.isfinite().all():
            table.grad = gradient
            optimizer.step()
    return table.detach()


def test_steps_are_those_of_torch(kind):
    start, steps = torch.randn(NUM_ROWS, 3), list(gradients(300))
    ours = kind(start)
    for gradient in steps:
        ours.take(gradient)
    assert_close(ours.table.detach(), expected(start, steps), rtol=1e-12, atol=1e-12)


def test_a_checkpoint_has_all_of_their_state(kind, tmp_path):
    start, steps = torch.randn(NUM_ROWS, 3), list(gradients(60))
    whole, part = kind(start), kind(start)
    for gradient in steps:
        whole.take(gradient)
    for gradient in steps[:25]:
        part.take(gradient)
    torch.save(part.state(), tmp_path / "state")
    rest = kind(part.table.detach())
    rest.restore(torch.load(tmp_path / "state", weights_only=True))
    for gradient in steps[25:]:
        rest.take(gradient)
    assert torch.equal(rest.table, whole.table)


def test_eager_and_compiled_steps_take_turns():
    start, steps = torch.randn(NUM_ROWS, 3), list(gradients(40))
    ours = Flat(start)
    for k, gradient in enumerate(steps):
        take = Eager.take if k // 5 % 2 else Flat.take
        take(ours, gradient)
    assert_close(ours.table.detach(), expected(start, steps), rtol=1e-12, atol=1e-12)


def test_each_row_has_a_count_of_its_own():
    start = torch.randn(NUM_ROWS, 3)
    ours, by_row = Rows(start), [[] for _ in range(NUM_ROWS)]
    for gradient in gradients(200):
        rows = torch.randperm(NUM_ROWS)[:2]
        ours.take(gradient[rows], rows)
        for row in rows.tolist():
            if gradient[rows].isfinite().all():
                by_row[row].append(gradient[row])
    for row, steps in enumerate(by_row):
        found = ours.table.detach()[row]
        assert_close(found, expected(start[row], steps), rtol=1e-12, atol=1e-12)
    assert ours.optimizer.visits == sum(map(len, by_row)) / NUM_ROWS


def test_rates_differ_by_group_and_large_gradients_are_clipped():
    params = [torch.randn(3).requires_grad_(), torch.randn(2, 2).requires_grad_()]
    twins = [param.detach().clone().requires_grad_() for param in params]
    optimizer = Adam(2)
    for group, param in zip(optimizer.groups, params, strict=True):
        group.append(param)
    adam = FlatAdam(params, optimizer, [1.0, 4.0])
    usual = torch.optim.Adam(
        [{"params": [t], "lr": f * RATE} for t, f in zip(twins, (1, 4), strict=True)]
    )
    for _ in range(20):
        slopes = [10 * torch.randn_like(twin) for twin in twins]
        for twin, slope in zip(twins, slopes, strict=True):
            twin.grad = slope.clone()
        norm = torch.nn.utils.clip_grad_norm_(twins, 2.0)
        usual.step()
        with torch.no_grad():
            flat = torch.cat([slope.reshape(-1) for slope in slopes])
            numbers = torch.zeros(()), torch.zeros(()), flat, torch.tensor(RATE), torch.tensor(2.0)
            assert_close(FlatAdam.step(adam.tensors, *numbers), norm)
    adam.store()
    assert_close(params, twins, rtol=1e-12, atol=1e-12)


def test_complex_parameters_move_as_those_of_torch():
    start, *steps = torch.randn(20, NUM_ROWS, 3, dtype=torch.complex128)
    ours = Eager(start)
    for gradient in steps:
        ours.take(gradient)
    assert_close(ours.table.detach(), expected(start, steps), rtol=1e-12, atol=1e-12)
