"""What the fork server imports once, so that every rank starts with it in memory."""

import importlib.util

import torch
import torch.distributed  # noqa: F401

import dist_train.run  # noqa: F401

if importlib.util.find_spec("deepspeed") is not None:
    from dist_train.engine import import_deepspeed

    import_deepspeed()
