"""The gain by a flow in the encoder: the tutorial's VAE over several seeds, at equal steps.

The tutorial's own code is run up to its table, once for each seed and posterior. Differences are
paired by seed, because the seed changes the likelihood by more than the posterior does.
"""

import argparse
import json
import statistics

from .common import save
from .tutorials import in_processes, shown, tutorial

POSTERIORS = ["diagonal", "affine", "gated"]


def work(posterior, seed, settings):
    """The measurement of one process: ELBO and log likelihood of the test images."""
    vae = tutorial("vae_iaf.py", [*settings, "--seed", seed], until="kinds = {")
    args = vae["args"]
    trained = vae["trained"](posterior, args.latents, args.seed)
    print(json.dumps(vae["scores"](trained, vae["test"], args.samples)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--name", default="vae", help="of the results' file")
    args, settings = parser.parse_known_args()
    if args.work:
        work(*args.work, settings)
        return
    jobs = [(posterior, seed) for seed in range(args.seeds) for posterior in POSTERIORS]
    found = in_processes("benchmarks.vae", jobs, settings)
    rows = []
    for posterior in POSTERIORS:
        own = [found[posterior, seed] for seed in range(args.seeds)]
        peer = [found["diagonal", seed] for seed in range(args.seeds)]
        gains = [a[1] - b[1] for a, b in zip(own, peer, strict=True)]
        rows.append(
            {
                "posterior": posterior,
                "ELBO": round(statistics.mean(elbo for elbo, _ in own), 3),
                "log p(x)": round(statistics.mean(likelihood for _, likelihood in own), 3),
                "gain": round(statistics.mean(gains), 3),
                "se of the gain": round(statistics.stdev(gains) / len(gains) ** 0.5, 3),
                "seeds": args.seeds,
                "settings": shown(settings),
            }
        )
    save(args.name, "nats a test image; gains over the diagonal posterior, paired by seed", rows)


if __name__ == "__main__":
    main()
