import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.testing import assert_close

from pyro_iaf.compiler import lowering, persistent_buffers
from pyro_iaf.compiler.lowering import lower

pytestmark = pytest.mark.skipif(
    not lowering.has_compiler(torch.device("cpu")), reason="there is no C++ compiler"
)

FUNCTIONS = {
    "a buffer": lambda x: (torch.cumsum(x, 0) @ x,),
    "a buffer and views of it": lambda x: ((y := x @ x.T), y[1:], y.reshape(-1), y.T),
    "one buffer twice": lambda x: ((y := x @ x), y),
    "views that look like their buffers": lambda x: (
        (y := x @ x).t().t(),
        (x @ x.T).reshape(-1).reshape(4, 4),
        (y @ x).unsqueeze(0).squeeze(0),
        (y + x).as_strided((4, 4), (4, 1)),
    ),
    "the same bits": lambda x: ((x @ x).view(torch.int64), (x @ x.T).tril().T.T),
    "an argument": lambda x: (x, x[0], (x @ x).exp()),
    "what a library made": lambda x: torch.linalg.qr(x),
    "views of what a library made": lambda x: ((q := torch.linalg.qr(x)[0]), q.T, q[2:]),
    "chains of products": lambda x: (((x @ x).tanh() @ x.T).exp().sum(0), (x @ x @ x).sum()),
    "a buffer too large to keep": lambda x: (
        (y := x.repeat(200, 200)).sum(0),
        (y * 2).tanh() @ y.T[:, :3],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_code_gives_the_same_at_every_call_and_nothing_it_gave_changes(name):
    function = FUNCTIONS[name]
    inputs = [torch.randn(4, 4) for _ in range(3)]
    run, backend = lower(function, inputs[:1], "inductor")
    assert backend == "inductor"
    found = [run([x]) for x in inputs]  # compared when all is done
    for x, outputs in zip(inputs, found, strict=True):
        assert_close(list(outputs), list(function(x)))


def test_what_it_writes_into_is_the_argument():
    def count(state, x):
        state.add_(x @ x)
        return (state.sum(),)

    x, state = torch.randn(4, 4), torch.zeros(4, 4)
    run, _ = lower(count, [state, x], "inductor")
    for k in range(1, 4):
        (total,) = run([state, x])
        assert_close(state, k * (x @ x))
        assert_close(total, state.sum())


def test_buffers_stay_where_they_are():
    run, _ = lower(lambda x: ((x @ x).exp() @ x,), [torch.randn(8, 8)], "inductor")
    x = torch.randn(8, 8)
    run([x])
    with torch.profiler.profile(profile_memory=True) as profile:
        run([x])
    made = [event for event in profile.events() if event.name == "[memory]"]
    taken = sum(event.cpu_memory_usage > 0 for event in made)
    assert taken <= 1  # the copy that is returned


def test_threads_do_not_write_into_each_others_buffers():
    run, _ = lower(lambda x: ((x @ x).tanh() @ x,), [torch.randn(64, 64)], "inductor")
    inputs = [torch.randn(64, 64) for _ in range(4)]
    found = [[] for _ in inputs]

    def work(k):
        found[k] += [run([inputs[k]])[0] for _ in range(200)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, outputs in zip(inputs, found, strict=True):
        assert_close(outputs, [run([x])[0]] * len(outputs))


def test_a_program_keeps_so_much_and_no_more(monkeypatch):
    def run(x):
        for _ in range(6):
            x = (x @ x).tanh()
        return (x.sum(),)

    kept_numbers = []
    usual = persistent_buffers._wrapper_class

    def spy():
        class Spied(usual()):
            @staticmethod
            def create(*_, **__):
                return Spied()

            def generate_return(self, refs):
                kept_numbers.append(self.num_kept)
                super().generate_return(refs)

        return Spied

    monkeypatch.setattr(persistent_buffers, "_wrapper_class", spy)
    monkeypatch.setattr(persistent_buffers, "MOST_NUMBERS", 300)
    x = torch.randn(11, 11)
    from torch._inductor import config

    with config.patch(force_disable_caches=True):
        compiled, backend = lower(run, [x], "inductor")
    assert backend == "inductor"
    assert_close(compiled([x])[0], run(x)[0])
    assert 0 < kept_numbers[-1] <= 300


def test_a_forked_process_compiles_by_itself(tmp_path):
    program = """
import os, torch
from pyro_iaf.compiler.inductor import warm_up
from pyro_iaf.compiler.lowering import lower
warm_up()
child = os.fork()
run, backend = lower(lambda x: ((x @ x).exp(),), [torch.ones(3, 3)], "inductor")
assert backend == "inductor"
if not child:
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    settings = {"capture_output": True, "text": True, "timeout": 1800}  # a hang has to end
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, **settings)
    assert done.returncode == 0, done.stderr


def test_two_threads_that_compile_leave_nothing_behind():
    from torch._inductor.codegen import common

    common.init_backend_registration()
    usual = common.device_codegens["cpu"]
    inside = threading.Event()

    def other():
        inside.wait()
        with persistent_buffers.kept_buffers():
            pass

    thread = threading.Thread(target=other)
    thread.start()
    with persistent_buffers.kept_buffers():
        inside.set()
        thread.join(0.2)
        assert thread.is_alive()  # it waits
    thread.join()
    assert common.device_codegens["cpu"] is usual


def test_others_that_compile_are_left_alone():
    from torch._inductor.codegen import common

    common.init_backend_registration()
    usual = common.device_codegens["cpu"]
    with persistent_buffers.kept_buffers():
        assert common.device_codegens["cpu"] is not usual
    assert common.device_codegens["cpu"] is usual
