"""Null models: what the probe says where there is nothing to find, or nothing that was learned about routing."""

import copy

import torch

from attnres.errors import ConfigError
from attnres.model.modeling import Qwen3AttnResForCausalLM
from attnres.model.wraps import follow
from attnres.tables.names import NULLS


def null_model(name: str, trained: Qwen3AttnResForCausalLM, seed: int) -> Qwen3AttnResForCausalLM:
    """A null of a trained model, in eval mode on its device.

    `untrained` has its configuration and the weights that `seed` draws: queries are zero, so that routing is uniform up
    to the configured bias, and effects are those of an untrained body. `shuffled_queries` has its weights, with the
    queries and key-norm weights of its reads exchanged at random, so that none keeps its own; biases stay.

    Raises:
        ConfigError: an unknown name, or a shuffle that could not change anything.
    """
    if name == "untrained":
        torch.manual_seed(seed)
        model = Qwen3AttnResForCausalLM(trained.config)
        follow(model, trained)
        return model.eval()
    if name == "shuffled_queries":
        model = copy.deepcopy(trained)
        shuffle_queries(model, seed)
        return model
    raise ConfigError(f"probe.nulls: expected some of {', '.join(NULLS)}, received {name!r}")


@torch.no_grad()
def shuffle_queries(model: Qwen3AttnResForCausalLM, seed: int) -> None:
    """Passes the query and key-norm weight of every read that routes on to another one, in place.

    Raises:
        ConfigError: fewer than two reads route, or all queries are zero.
    """
    plan = model.model.plan
    stored = zip(model.model.stored_reads(), plan.reads, strict=True)
    pairs = [(read.query, read.key_weight) for read, planned in stored if plan.routing_is_trainable(planned)]
    if len(pairs) < 2 or not any(bool(query.any()) for query, _ in pairs):
        raise ConfigError(
            "probe.nulls: shuffled_queries changes nothing in this model, whose routing has no queries; leave it out"
        )
    before = [(query.clone(), scale.clone()) for query, scale in pairs]
    # One cycle through all reads in random order: a permutation without a fixed point.
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    for to, source in zip(order, order[1:] + order[:1], strict=True):
        for target, value in zip(pairs[to], before[source], strict=True):
            target.copy_(value)
