"""What eight low-rank experts cost beside the anchor: forward time, all active, in one run.

Random weights; every expert says 1/9 at every token, so that all nine are active. The anchor and
the mixture run in turn (A B A B); medians of the paired ratios, since the machine may be shared.
The FLOPs ratio beside each is what arithmetic alone would ask for.

    .venv/bin/python benchmarks/low_rank.py [--threads 1] [--rounds 7] [--ranks 4,8,16,32]
"""

import argparse
import json

import numpy as np
import torch
from against_stock import SIZES, compare, make_anchor

from flexolmo.model.assemble import assemble_mixture
from flexolmo.model.shape import ExpertShape, count_parameters, expert_shapes
from flexolmo.model.statistics import EvidenceSettings
from flexolmo.research.study.cost import dense_flops, mixture_flops

NUM_EXPERTS = 8


def main() -> None:
    """Print one line for each size and rank, and all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", default="4,8,16,32")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    router, results = EvidenceSettings(min_weight=0.0), []
    for size in SIZES:
        anchor = make_anchor(size)
        ids = torch.from_numpy(np.random.default_rng(0).integers(1, 4096, (4, options.tokens // 4)))
        whole = count_parameters(anchor.config, ExpertShape(d_ff=anchor.config.d_ff), router)
        for rank in (int(r) for r in options.ranks.split(",")):
            shape = ExpertShape(d_ff=anchor.config.d_ff, rank=rank)
            uniform = torch.full((4096,), -float(np.log(4096)))
            experts = {}
            for i in range(NUM_EXPERTS):
                tensors = {
                    n: 0.02 * torch.randn(s)
                    for n, s in expert_shapes(anchor.config, shape, router).items()
                }
                experts[f"e{i}"] = tensors | {
                    "router.unigram": uniform,
                    "router.backoff": torch.zeros(4096),
                }
            model = assemble_mixture(anchor, experts, router)
            with torch.inference_mode():
                base, ours, ratio = compare(
                    lambda m=anchor.model, x=ids: m(x), lambda m=model, x=ids: m(x), options.rounds
                )
            shapes = [shape] * NUM_EXPERTS
            flops = mixture_flops(anchor.config, shapes, [1.0] * NUM_EXPERTS) / dense_flops(
                anchor.config
            )
            results.append(
                {
                    "size": size,
                    "rank": rank,
                    "anchor_ms": 1000 * base,
                    "mixture_ms": 1000 * ours,
                    "time_ratio": ratio,
                    "flops_ratio": flops,
                    "bytes_of_whole": count_parameters(anchor.config, shape, router) / whole,
                }
            )
            r = results[-1]
            print(
                f"{size:>4}  rank {rank:>2}: {r['time_ratio']:.2f}x the anchor's time "
                f"({flops:.2f}x its FLOPs), {r['bytes_of_whole']:.0%} of a whole expert's bytes",
                flush=True,
            )
    print(json.dumps({"threads": options.threads, "rounds": options.rounds, "results": results}))


if __name__ == "__main__":
    main()
