"""Settings: what is refused, and how text becomes a setting."""

from __future__ import annotations

import pytest

from expertmesh.config import AutoscaleConfig, BalanceConfig
from expertmesh.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "sideways"},
        {"policy": "frozen"},
        {"schedule": "linear"},
        {"update_rate": 0.0},
        {"update_rate": float("nan")},
        {"update_rate": float("inf")},
        {"schedule_windows": 0},
        {"schedule": "cosine", "update_rate": 1e-3, "update_rate_floor": 2e-3},
        {"schedule": "inverse", "update_rate_floor": 0.0},
        {"window_tokens": 0},
        {"window_s": 0.0},
        {"decay": 1.0},
        {"decay": -0.1},
        {"max_delta": 0.0},
        {"max_delta": float("nan")},
        {"divergence_ceiling": 0.0},
        {"divergence_ceiling": 1.1},
    ],
    ids=str,
)
def test_a_balance_that_cannot_work_is_refused_by_the_name_of_its_setting(
    wrong: dict[str, object],
) -> None:
    with pytest.raises(ConfigError, match=r"balance\."):
        BalanceConfig(**wrong)  # type: ignore[arg-type]


def test_settings_are_given_as_text_with_or_without_their_section() -> None:
    config = BalanceConfig(divergence_ceiling=0.5).with_settings(
        ["max_delta=0.1", "balance.window_tokens=64", "policy = proportional",
         "divergence_ceiling=none"]
    )  # fmt: skip

    assert config == BalanceConfig(max_delta=0.1, window_tokens=64, policy="proportional")


@pytest.mark.parametrize(
    "setting",
    ["max_delta", "max_dela=1", "max_delta=wide", "window_tokens=1.5", "update_rate=none", "=1"],
)
def test_a_setting_that_is_none_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"balance"):
        BalanceConfig().with_settings([setting])


def test_the_autoscaler_takes_settings_as_text() -> None:
    config = AutoscaleConfig().with_settings(
        ["min_replicas=2", "autoscale.max_replicas=4", "downscale_delay_s=30", "max_step_up=none"]
    )

    assert (config.min_replicas, config.max_replicas) == (2, 4)
    assert (config.downscale_delay_s, config.max_step_up) == (30.0, None)
    with pytest.raises(ConfigError, match="a setting of autoscale is 'replicas=3'"):
        config.with_settings(["replicas=3"])
