"""`python -m attnres.commands.plan`: what a run costs on a cluster, from `train.py`'s words and `cluster.KEY=VALUE`."""

import sys
from functools import partial

from attnres.commands.hydra_door import Plain, configured_command, plain_words
from attnres.config import build


def main() -> None:
    cluster = [word for word in sys.argv[1:] if word.startswith("cluster.")]
    sys.argv = [word for word in sys.argv if word not in cluster]
    configured_command("train", partial(_estimate, cluster))


def _estimate(cluster: list[str], plain: Plain) -> None:
    from attnres.training.config import TrainConfig
    from attnres.training.cost import ClusterConfig, describe, estimate_cost

    machines = build(ClusterConfig, plain_words(cluster).get("cluster", {}), "cluster")
    config = build(TrainConfig, plain)
    print(describe(config, machines, estimate_cost(config, machines)))


if __name__ == "__main__":
    main()
