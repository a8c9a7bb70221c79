"""What a trainer of Mixture-of-Experts models takes from here: balance losses, no services."""

from expertmesh.training.losses import (
    device_balance_loss,
    expert_balance_loss,
    gshard_loss,
    sequence_balance_loss,
    switch_loss,
)

__all__ = [
    "device_balance_loss",
    "expert_balance_loss",
    "gshard_loss",
    "sequence_balance_loss",
    "switch_loss",
]
