"""The numbers and tables on the pages, read from ``benchmarks/results``.

``{{ name }}`` in a page is replaced by the result of the function of that name: a table, or a
number within a sentence.
"""

import json
import pathlib
import statistics

__all__ = ["substitutions"]

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
SAID = {}


def said(function):
    """Registers a function for the pages under its name."""
    SAID[function.__name__] = function
    return function


def substitutions():
    """The texts for the pages, by name."""
    return {name: function() for name, function in SAID.items()}


def rows(name):
    """The rows of one file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def only(found):
    """The only element."""
    (one,) = found
    return one


def table(header, body):
    """A table in Markdown, its first column to the left and the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def span(values, digits):
    """The range of the values, as ``1 to 2``."""
    return f"{min(values):{digits}} to {max(values):{digits}}"


def milliseconds(ms):
    """A time in three digits."""
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:,.0f} ms"


def gain(row):
    """The gain by flows, with its standard error."""
    return f"{row['gain']:.2f} ± {row['se of the gain']:.2f}" if row["gain"] else ""


# Guides.

GUIDES = ["AutoIAF", "AutoIAFNormal", "AutoMultivariateNormal", "AutoNormal"]


def by_posterior(cell):
    """A table of posteriors by guides; ``cell`` makes a text of the rows of all seeds."""
    measured = rows("posteriors")
    body = []
    for name in dict.fromkeys(row["posterior"] for row in measured):
        seeds = [[r for r in measured if (r["posterior"], r["guide"]) == (name, g)] for g in GUIDES]
        body.append([name.replace("_", " "), *map(cell, seeds)])
    return table(["Posterior", *GUIDES], body)


def worst(seeds, key, digits):
    """The largest value of the seeds as text."""
    if any(row["failed"] for row in seeds):
        return "failed"
    values = [row[key] for row in seeds]
    return "no k-hat" if None in values else f"{max(values):{digits}}"


@said
def khats():
    return by_posterior(lambda seeds: worst(seeds, "khat", ".2f"))


@said
def mean_errors():
    return by_posterior(lambda seeds: worst(seeds, "mean_error", ".2f"))


@said
def spreads():
    def cell(seeds):
        if any(row["failed"] for row in seeds):
            return "failed"
        smallest = min(row["smallest_spread"] for row in seeds)
        return f"{smallest:.2f} to {max(row['largest_spread'] for row in seeds):.2f}"

    return by_posterior(cell)


@said
def fit_seconds():
    return by_posterior(lambda seeds: worst(seeds, "seconds", ".0f"))


def of_guide(guide, key):
    """The values of ``key`` for a guide over all posteriors and seeds, without failed fits."""
    found = [row[key] for row in rows("posteriors") if row["guide"] == guide and not row["failed"]]
    return [value for value in found if value is not None]


@said
def autoiaf_mean_error():
    return f"{max(of_guide('AutoIAF', 'mean_error')):.2f}"


@said
def autoiaf_spreads():
    low = min(of_guide("AutoIAF", "smallest_spread"))
    return f"{low:.2f} to {max(of_guide('AutoIAF', 'largest_spread')):.2f}"


@said
def autonormal_in_a_funnel():
    found = [
        r["smallest_spread"]
        for r in rows("posteriors")
        if r["posterior"].startswith("funnel") and r["guide"] == "AutoNormal"
    ]
    return f"{min(found):.2f}"


@said
def seconds_of_autoiaf():
    return span(of_guide("AutoIAF", "seconds"), ".0f")


@said
def gradients():
    measured = rows("gradients_posteriors")
    ways = list(dict.fromkeys(row["gradient"] for row in measured))
    body = []
    for name in dict.fromkeys(row["posterior"] for row in measured):
        cells = []
        for way in ways:
            seeds = [r for r in measured if (r["posterior"], r["gradient"]) == (name, way)]
            keys = ("elbo", "mean_error", "khat")
            elbo, error, khat = (statistics.median(r[key] for r in seeds) for key in keys)
            cells.append(f"{elbo:.2f}, {error:.3f}, {khat:.2f}")
        body.append([name.replace("_", " "), *cells])
    return table(["Posterior", *(way.capitalize() for way in ways)], body)


@said
def funnel():
    guides = ["AutoIAF", "AutoIAFNormal, two flows", "AutoIAFNormal", "AutoNormal"]
    measured = {(r["lr"], r["end_lr"], r["guide"]): r for r in rows("guide_funnel")}
    body = []
    for start, end in dict.fromkeys((lr, end_lr) for lr, end_lr, _ in measured):
        found = [measured[start, end, guide] for guide in guides]
        rate = str(start) if start == end else f"{start} to {end}"
        cells = (
            "{median_sd:.2f} ({smallest_sd:.2f} to {largest_sd:.2f})".format(**r) for r in found
        )
        body.append([rate, *cells])
    return table(["Rate", *guides], body)


@said
def poisson():
    guides = ["AutoIAF", "AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"]
    measured = {(r["weights_sd"], r["lr"], r["guide"]): r for r in rows("guide_poisson")}

    def cell(row):
        if row["seeds_with_nan"]:
            return f"NaN in {row['seeds_with_nan']} of 8"
        return f"{row['median_loss']:.{'1f' if row['median_loss'] < 1e6 else '0e'}}"

    settings = dict.fromkeys((spread, lr) for spread, lr, _ in measured)
    body = [
        [f"{spread}, {lr}", *(cell(measured[spread, lr, guide]) for guide in guides)]
        for spread, lr in settings
    ]
    return table(["Weights, rate", *guides], body)


VAES = {
    "vae": "digits",
    "vae_mnist": "MNIST, 10,000 images",
    "vae_mnist_full": "MNIST, all images",
}


@said
def vae():
    body = [
        [f"{images}, {r['posterior']}", f"{r['ELBO']:.2f}", f"{r['log p(x)']:.2f}", gain(r)]
        for name, images in VAES.items()
        for r in rows(name)
    ]
    return table(["Images, posterior", "ELBO", "log p(x)", "Gain"], body)


def vae_gains(posterior):
    """The range of the gain by a kind of flow over the data sets."""
    found = [row["gain"] for name in VAES for row in rows(name) if row["posterior"] == posterior]
    return span(found, ".2f")


@said
def affine_gains():
    return vae_gains("affine")


@said
def gated_gains():
    return vae_gains("gated")


@said
def dmm():
    body = [[r["flows"], f"{r['-ELBO']:.2f}", f"{r['weighted']:.2f}", gain(r)] for r in rows("dmm")]
    return table(["Flows", "Bound", "Weighted", "Gain"], body)


def dmm_gain(flows):
    """The gain by this number of flows at every time step."""
    return gain(only(row for row in rows("dmm") if row["flows"] == flows))


@said
def one_flow_in_time():
    return dmm_gain(1)


@said
def two_flows_in_time():
    return dmm_gain(2)


@said
def dmm_steps():
    header = ["Latents", "Flows", "Time steps", "Calls", "Pyro's calls", "Step", "Pyro's step"]
    body = [
        [
            *(r[key] for key in ("latents", "flows", "time steps", "calls", "calls, Pyro")),
            f"{r['ms']:.0f} ms",
            f"{r['ms, Pyro']:.0f} ms",
        ]
        for r in rows("dmm_steps")
    ]
    return table(header, body)


# Cost.


@said
def operations():
    passes = {
        "draw": "1",
        "draw and score": "1",
        "draw, score, backward": "1, and one backward",
        "draw ten, then score them": "10",
        "score a value from elsewhere": "an inverse, and 1",
    }
    measured = {(r["task"], r["batch"], r["D"]): r for r in rows("flows")}
    sizes = [(16, 10), (128, 128)]

    def cell(row):
        return f"{row['ours_us'] / 1000:.2f} / {row['pyro_us'] / 1000:.2f} ms"

    body = [
        [task.capitalize(), count, *(cell(measured[(task, *size)]) for size in sizes)]
        for task, count in passes.items()
    ]
    header = ["Operation", "Passes a flow", *(f"batch {batch}, D = {D}" for batch, D in sizes)]
    return table(header, body)


LIBRARIES = ["pyro_iaf, gentle", "pyro_iaf, hard", "Pyro", "Zuko", "nflows"]


def inverse_ms(D, task, library):
    """Milliseconds for a batch of 128."""
    where = (D, 128, task, library)
    fields = ("D", "batch", "task", "library")
    return only(r["ms"] for r in rows("inverse") if tuple(r[f] for f in fields) == where)


@said
def inverses():
    body = []
    for D in (8, 32, 128, 512, 1024):
        times = [inverse_ms(D, "forward", LIBRARIES[0])]
        times += [inverse_ms(D, "inverse", library) for library in LIBRARIES]
        body.append([D, *(f"{ms:,.2f}" for ms in times)])
    return table(["D", "one pass", *LIBRARIES], body)


@said
def inverse_with_gradient():
    memory = only(row for row in rows("inverse_memory") if row["D"] == 128)
    body = [
        [
            library,
            f"{inverse_ms(128, 'inverse and gradient', library):.1f} ms",
            f"{memory[library]:.1f} MB",
        ]
        for library in LIBRARIES
    ]
    return table(["At D = 128", "Inverse and gradient", "Memory beyond a pass"], body)


@said
def inverse_in_passes():
    ratios = [
        inverse_ms(D, "inverse", library) / inverse_ms(D, "forward", library)
        for D in (8, 32, 128, 512, 1024)
        for library in LIBRARIES[:2]
    ]
    return span(ratios, ".0f")


@said
def guide_steps():
    measured = {(r["D"], r["widths"]): r for r in rows("guide_steps")}
    body = []
    for D in dict.fromkeys(D for D, _ in measured):
        default, equal = measured[D, "default"], measured[D, "D"]
        times = (default["ours_ms"], default["pyro_ms"], equal["pyro_ms"])
        body.append([D, *map(milliseconds, times)])
    return table(["D", "AutoIAF", "AutoIAFNormal", "AutoIAFNormal, our widths"], body)


@said
def step_of_a_thousand():
    rows_of_1000 = [r for r in rows("guide_steps") if (r["D"], r["widths"]) == (1000, "default")]
    return milliseconds(only(rows_of_1000)["ours_ms"])


@said
def enumeration_steps():
    found = {(r["model"], r["written"], r["way"]): r for r in rows("enumeration")}
    words = {"enumerated": "summed out", "at once": "by `vectorized_markov`", "by hand": "by hand"}
    ways = ["eager", "graph", "compiled"]
    body = []
    for model, how in dict.fromkeys(key[:2] for key in found):
        each = [found[model, how, way] for way in ways]
        steps = ["-" if r["ms a step"] is None else milliseconds(r["ms a step"]) for r in each]
        starts = ["-" if r["start, s"] is None else f"{r['start, s']:.0f} s" for r in each[1:]]
        nodes = next((r["nodes"] for r in each if r["nodes"]), None)
        body.append([f"{model}, {words[how]}", *steps, *starts, nodes])
    return table(["Model", *ways, "recording", "compilation", "operations"], body)


@said
def minibatch_fits():
    found = {}
    for row in rows("minibatches"):
        found.setdefault((row["posterior"], row["contender"]), []).append(row)
    names = {"plate": "a plate", "data": "a `DataLoader`", "pyro": "Pyro", "numpyro": "NumPyro"}
    body = []
    for (posterior, contender), fits in found.items():
        seconds = statistics.median(row["seconds"] for row in fits)
        errors = [max(row[key] for row in fits) for key in ("mean_error", "sd_error")]
        holds = f"{sum(row['holds'] for row in fits)} of {len(fits)}"
        name = names.get(contender, contender)
        body.append([posterior, name, f"{seconds:.0f}", *(f"{e:.2f}" for e in errors), holds])
    body.sort(key=lambda cells: list(found).index(next(k for k in found if k[0] == cells[0])))
    return table(["", "minibatches by", "seconds", "mean", "deviation", "hold"], body)


@said
def noise_left():
    shares = [row["noise"][1] / row["noise"][0] for row in rows("minibatches") if row["noise"]]
    return f"{min(shares):.0e} to {max(shares):.0e}"


@said
def structured_fits():
    found = {(r["posterior"], r.get("contender")): r for r in rows("structure")}
    names = list(dict.fromkeys(name for name, who in found if who == "structure"))
    body = []
    for name in names:
        ours = found[name, "structure"]
        cells = [ours["structure"] or "none", seconds_and_words(ours)]
        cells += [f"{ours['parameters']:,}" if ours["parameters"] else "-"]
        for who in ("dense", "numpyro"):
            other = found.get((name, who))
            cells.append("-" if other is None else seconds_and_words(other))
        body.append([name, *cells])
    columns = ["Posterior", "found", "seconds", "parameters", "one flow", "NUTS"]
    return table(columns, body)


def seconds_and_words(row):
    """Seconds, and whether the draws hold."""
    if row["failed"]:
        return row["failed"]
    return f"{row['seconds']:.1f}, {'holds' if row['holds'] else 'does not hold'}"


@said
def refined_draws():
    found = {(r["posterior"], r["contender"]): r for r in rows("refine")}
    body = []
    for name in dict.fromkeys(name for name, _ in found):
        ours, nuts = found[name, "refine"], found.get((name, "numpyro"))
        cells = [
            ours["seconds"],
            ours["ess"],
            f"{ours['rhat']:.3f}",
            "yes" if ours["holds"] else "no",
        ]
        if nuts is None:
            more = ["-", "-", "-"]
        elif not nuts["holds"]:
            more = ["-", nuts["ess"], "no"]
        else:
            more = [nuts["seconds"], nuts["ess"], "yes"]
        body.append([name, *cells, *more])
    columns = ["Posterior", "seconds", "ESS", "R-hat", "holds", "NUTS, s", "ESS of NUTS", "holds"]
    return table(columns, body)


@said
def refined_summary():
    ours = {r["posterior"]: r for r in rows("refine") if r["contender"] == "refine"}

    def ratio(peer):
        known = [r for r in rows("refine") if r["contender"] == peer and r["holds"]]
        times = statistics.median(ours[r["posterior"]]["seconds"] / r["seconds"] for r in known)
        return f"{times:.2f} times those of {{}} on the {len(known)} where that was run and holds"

    return (
        f"Of {len(ours)} posteriors {sum(r['holds'] for r in ours.values())} hold, and "
        f"{sum(r['converged'] for r in ours.values())} are told to have converged. In the median "
        f"it takes {statistics.median(r['seconds'] for r in ours.values()):.1f} seconds, "
        f"{ratio('numpyro').format('NumPyro')}, and {ratio('neutra').format('Pyro')}."
    )


def fit_rows(contender):
    """The rows of one implementation of a step."""
    return [row for row in rows("svi_step") if row["contender"] == contender]


@said
def svi_steps():
    contenders = ["fit, eager", "fit, graph", "fit, compiled", "Pyro", "NumPyro"]
    times = {
        (r["model"], r["particles"], r["contender"]): r["microseconds"] for r in rows("svi_step")
    }
    body = [
        [f"{model}; {particles}", *(f"{times[model, particles, who]:,.0f}" for who in contenders)]
        for model, particles in dict.fromkeys(key[:2] for key in times)
    ]
    return table(["Model; particles", *contenders], body)


@said
def first_compilation():
    return span([row["first steps, s"] for row in fit_rows("fit, compiled")], ".0f")


@said
def later_compilation():
    return span([row["cached, s"] for row in fit_rows("fit, compiled")], ".0f")


@said
def steps_that_repay():
    found = [row["pays after"] or 0 for row in fit_rows("fit, compiled")]
    found = [steps for steps in found if steps > 0]  # the first also compiles headers
    return span(found, ",.0f")


@said
def compiled_and_pyro():
    found = [row["times as fast as Pyro"] for row in fit_rows("fit, compiled")]
    return span(found, ".1f")


def microseconds(particles):
    """The microseconds of a compiled step of eight schools."""
    one = only(
        row
        for row in fit_rows("fit, compiled")
        if (row["model"], row["particles"]) == ("eight schools", particles)
    )
    return f"{one['microseconds']:.0f}"


@said
def one_particle():
    return microseconds(1)


@said
def sixteen_particles():
    return microseconds(16)


@said
def many_rows():
    ways = {
        "fit": "`fit`",
        "SVI, dense": "`SVI`",
        "SVI, sparse": '`SVI`, `embedding_grad="sparse"`',
    }
    measured = {(r["way"], r["rows"]): r for r in rows("hierarchical")}
    sizes = sorted({size for _, size in measured})
    body = [
        [title, *(milliseconds(measured[way, size]["milliseconds"]) for size in sizes)]
        for way, title in ways.items()
    ]
    return table(["A step of 100 rows, by", *(f"{size:,} rows" for size in sizes)], body)


@said
def processes():
    keys = ("rows a step", "one process", "two processes")
    body = [
        [*(f"{row[key]:,}" for key in keys), f"{row['times as fast']:.2f}"]
        for row in rows("distributed")
    ]
    return table(["Rows a step", "One process", "Two processes", "Times as fast"], body)


@said
def gains_by_processes():
    return span([row["times as fast"] for row in rows("distributed")], ".1f")


@said
def step_of_many_rows():
    return span([r["milliseconds"] for r in rows("hierarchical") if r["way"] == "fit"], ".1f")


@said
def landing_costs():
    return span([row["ratio"] for row in rows("gradients_steps")], ".2f")


@said
def noise_at_start():
    return f"{rows('gradients_noise')[0]['ratio']:.1f}"


@said
def noise_near_the_end():
    row = only(r for r in rows("gradients_noise") if r["share of the way left"] == 0.05)
    return f"{row['ratio']:.2f}"


@said
def diagonal_normal():
    return span([row["ratio"] for row in rows("distributions")], ".2f")
