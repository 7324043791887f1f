"""What a flow in the encoder buys: the VAE of the tutorial over several seeds, at equal steps.

The tutorial's own code is run up to its table, once for each seed and posterior. Differences are
paired by seed: between seeds the decoders differ by more than the posteriors do.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
from itertools import pairwise

from .common import save

TUTORIAL = pathlib.Path(__file__).parent.parent / "tutorials" / "vae_iaf.py"
POSTERIORS = ["diagonal", "affine", "gated"]


def work(posterior, seed, settings):
    """What one process measures: ELBO and log-likelihood of the test images."""
    code = TUTORIAL.read_text().split("kinds = {")[0]
    sys.argv = [str(TUTORIAL), *settings, "--seed", str(seed)]
    space = {"__name__": "vae_iaf"}
    exec(compile(code, str(TUTORIAL), "exec"), space)
    args = space["args"]
    vae = space["trained"](posterior, args.latents, args.seed)
    print(json.dumps(space["scores"](vae, space["test"], args.samples)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--name", default="vae", help="of the results' file")
    args, settings = parser.parse_known_args()
    if args.work:
        work(args.work[0], int(args.work[1]), settings)
        return

    def run(posterior, seed):
        command = [sys.executable, "-m", "benchmarks.vae", "--work", posterior, str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *settings], capture_output=True, text=True, check=True, env=environment
        )
        elbo, likelihood = json.loads(done.stdout.splitlines()[-1])
        print(f"{posterior:10} seed {seed}: {elbo:8.3f} {likelihood:8.3f}", flush=True)
        return elbo, likelihood

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            (p, seed): pool.submit(run, p, seed) for seed in range(args.seeds) for p in POSTERIORS
        }
        found = {key: future.result() for key, future in futures.items()}
    shown = ["FOLDER" if before == "--mnist" else s for before, s in pairwise(["", *settings])]
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
                "settings": " ".join(shown),
            }
        )
    save(args.name, "nats a test image; gains over the diagonal posterior, paired by seed", rows)


if __name__ == "__main__":
    main()
