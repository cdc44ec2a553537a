"""Public functions of `eplb_torch` with good arguments, for the tests of hostile input."""

import numpy as np
import torch

from eplb_core.costs import Links
from eplb_core.load import last_value
from eplb_torch import (
    BalancerConfig,
    BalancerMetrics,
    DeviceMaps,
    Dispatcher,
    ExpertReload,
    ExpertWeights,
    InProcessWorld,
    LiveModel,
    LoadRecorder,
    Staging,
    count_tokens,
    held_experts,
    mask_padding,
    reload_experts,
    select_slots,
)
from tests.hostile import Argument, Call
from tests.hostile_core import (
    ANY_LAYERS,
    FUNCTIONS,
    OLD,
    count,
    number,
    option,
    placed,
    topology,
    value,
    word,
)

MAPS = DeviceMaps(OLD, 10)
WEIGHTS = ExpertWeights([{"up": torch.zeros(3, 2)} for _ in range(2)])
TOPK = torch.tensor([[0, 1], [9, -1]])

tensor = Argument(TOPK, "value")
switch = value(False)


def some_rows() -> list:
    """New rows for all experts of rank 0."""
    return [(layer, "up", expert, torch.zeros(2)) for layer in range(2) for expert in range(3)]


CALLS = {
    "BalancerConfig": Call(
        BalancerConfig,
        {
            "window_size": count(10, but=("beyond int64", "beyond printing")),
            "step_interval": count(10),
            "num_redundant_experts": option(2),
            "log_balancedness": switch,
            "log_balancedness_interval": count(1),
            "use_async": switch,
            "policy": word("greedy"),
            "num_groups": count(1),
            "max_moves": option(3),
            "max_total_moves": option(4),
            "threshold": number(0.9),
            "hysteresis": number(0.1),
            "min_gain": number(0.1),
            "horizon": option(4),
            "min_return": number(1.0),
            "seconds_per_token": number(1e-6, but=("None",)),
            "links": value(Links()),
            "estimator": value(last_value(), but=("None",)),
            "timeout": number(1.0),
            "max_staging_bytes": count(10, but=("beyond int64", "beyond printing")),
            "checksum": switch,
        },
    ),
    "BalancerConfig.from_dict": Call(BalancerConfig.from_dict, {"values": value({"window_size": 10})}),
    "DeviceMaps": Call(
        DeviceMaps,
        {
            "physical_to_logical": placed._replace(but=(*ANY_LAYERS, "more columns", "fewer columns")),
            "num_logical": count(10),
            "max_replicas": option(4),
            "shares": Argument(np.ones_like(OLD), "ids", ("None",)),
        },
    ),
    "DeviceMaps.update": Call(
        lambda **new: DeviceMaps(OLD, 10).update(**new),
        {"physical_to_logical": placed, "shares": Argument(np.ones_like(OLD), "ids", ("None",))},
    ),
    "DeviceMaps.resize": Call(
        lambda **new: DeviceMaps(OLD, 10).resize(**new),
        {"physical_to_logical": placed._replace(but=("more columns", "fewer columns"))},
    ),
    "DeviceMaps.layer": Call(MAPS.layer, {"index": count(0)}),
    "Dispatcher": Call(Dispatcher, {"maps": value(MAPS), "ep_rank": count(0), "count": word("slots")}),
    "ExpertWeights": Call(ExpertWeights, {"layers": value([{"up": torch.zeros(3, 2)}])}),
    "ExpertWeights, one tensor": Call(
        lambda tensor: ExpertWeights([{"up": tensor}]), {"tensor": value(torch.zeros(3, 2))}
    ),
    "ExpertReload": Call(
        ExpertReload,
        {
            "weights": value(WEIGHTS),
            "physical_to_logical": placed,
            "topology": topology,
            "ep_rank": count(0),
            "names": value(("up",), but=("None",)),
            "in_flight": value(None, but=("None", *FUNCTIONS)),
        },
    ),
    "held_experts": Call(
        held_experts,
        {"physical_to_logical": placed._replace(but=ANY_LAYERS), "topology": topology, "ep_rank": count(0)},
    ),
    "InProcessWorld": Call(InProcessWorld, {"size": count(2, but=("beyond int64", "beyond printing"))}),
    "LiveModel": Call(
        LiveModel,
        {
            "weights": value(WEIGHTS),
            "maps": value(MAPS),
            "topology": topology,
            "physical_to_logical": placed,
        },
    ),
    "LoadRecorder": Call(LoadRecorder, {"num_layers": count(2), "num_ids": count(10), "epoch": count(0)}),
    "Staging": Call(Staging, {"device": value(torch.device("cpu"), but=("text", "huge text"))}),
    "reload_experts": Call(
        reload_experts,
        {
            "weights": value(WEIGHTS),
            "physical_to_logical": placed,
            "topology": topology,
            "ep_rank": count(0),
            "source": value(some_rows(), but=FUNCTIONS),
            "names": value(("up",), but=("None",)),
            "in_flight": value(None, but=("None", *FUNCTIONS)),
        },
    ),
    "BalancerMetrics": Call(
        BalancerMetrics,
        {
            "models": value(("main",), but=("dict",)),
            "registry": value(None, but=("None",)),
            "labels": value({}, but=("None", "dict")),
        },
    ),
    "count_tokens": Call(count_tokens, {"ids": tensor, "num_ids": count(10)}),
    "mask_padding": Call(mask_padding, {"topk_ids": tensor, "unpadded": option(1)}),
    "select_slots": Call(
        select_slots,
        {
            "topk_ids": tensor,
            "maps": value(MAPS.layer(0)),
            "offset": count(0, but=("negative", "most negative")),
            "unpadded": option(1),
        },
    ),
}
