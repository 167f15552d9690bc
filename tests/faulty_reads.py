"""Reads with one fault each, and one without, called with the contract's keywords. Imports torch only."""

import os

import torch


def read(sources, query, key_weight, bias=None, eps=1e-6, fault=""):
    if fault == "bf16 accumulation" and sources[0].dtype == torch.bfloat16:
        values = torch.stack(list(sources), -2)
    else:
        values = torch.stack(list(sources), -2).float()
        query, key_weight = query.float(), key_weight.float()
    if fault == "gradient of the key weight dropped":
        key_weight = key_weight.detach()
    mean_square = values.square().mean(-1)
    rms = 1 / (mean_square.sqrt() + eps) if fault == "eps outside of the root" else torch.rsqrt(mean_square + eps)
    logits = rms * (values @ (query * key_weight))
    if bias is not None:
        bias = bias if bias.ndim == 1 else bias[:, None]
        if fault == "newest source without its bias":
            bias = torch.cat([bias[..., :-1], torch.zeros_like(bias[..., -1:])], -1)
        logits = logits + (bias.masked_fill(bias.isneginf(), 0) if fault == "mask not renormalised" else bias)
    if fault == "temperature":
        logits = logits / 2
    weights = torch.softmax(logits, 1 if fault == "softmax over tokens" else -1)
    if fault == "largest logit not subtracted":
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    if fault == "mask not renormalised" and bias is not None:
        weights = weights * ~bias.isneginf()
    mixed = (weights.unsqueeze(-1) * values).sum(-2)
    if fault == "batch and tokens merged":
        mixed = mixed.flatten(0, 1)
    return mixed.to(sources[0].dtype), weights


def cold(sources, query, key_weight, bias=None, eps=1e-6):
    return read(sources, query, key_weight, bias, eps, "temperature")


def dies(sources, **others):
    if len(sources) == 1:
        os._exit(9)
    return read(sources, **others)


def stacked_only(sources, query, key_weight, bias=None, eps=1e-6):
    return read(sources.unbind(0), query, key_weight, bias, eps)


def other_names(function):
    """An adapter, for a function that is the read already."""
    return lambda sources, query, key_weight, bias=None, eps=1e-6: function(sources, query, key_weight, bias, eps)
