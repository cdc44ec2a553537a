"""vLLM's and SGLang's released modules on this process's Gloo group, each with a model of tagged experts."""

import importlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import peers
from benchmarks.released import StandIn
from eplb_core import Topology


def fetched(function, *args):
    """What a function that needs a peer's release returns, or a skip that says why there is none."""
    try:
        return function(*args)
    except peers.PeerUnavailable as reason:
        pytest.skip(str(reason))


def skewed(num_layers: int, num_logical: int, seed: int = 0) -> np.ndarray:
    """Integer loads `[layers, logical]`, no two of a layer equal."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_logical * 40)[:num_logical] ** 2 + 1 for _ in range(num_layers)])


def recorded(num_layers: int, num_logical: int, seed: int = 0) -> Tensor:
    """The same loads as SGLang records them, `[2, layers, logical]`: in steps that sum to them."""
    total = skewed(num_layers, num_logical, seed)
    first = np.random.default_rng(seed).integers(0, total + 1)
    return torch.from_numpy(np.stack([first, total - first]))


def tensors(*arrays) -> list[Tensor]:
    """Each array as int64, which is what vLLM passes."""
    return [torch.from_numpy(np.asarray(array, dtype=np.int64)) for array in arrays]


def expert_rows(layer: int, experts: list[int]) -> list[Tensor]:
    """Two tensors whose rows say which expert of which layer they belong to."""
    tag = torch.tensor([[layer * 1000.0 + expert] for expert in experts])
    return [tag + torch.arange(4) / 8, (tag * 3).to(torch.int32).repeat(1, 2)]


def weights_of(placement, topology: Topology, rank: int) -> list[list[Tensor]]:
    """`[layer][tensor] [slots_per_rank, ...]` of one rank under a placement without empty slots."""
    slots = slice(rank * topology.slots_per_rank, (rank + 1) * topology.slots_per_rank)
    return [expert_rows(layer, row) for layer, row in enumerate(placement[:, slots].tolist())]


def same_weights(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    """Whether all tensors of all layers are equal."""
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def entry_point(folder: Path, group: str, target: str) -> str:
    """Write a distribution with one entry point, as `pip install` leaves it, and return the entry point's name."""
    name, info = "eplb_plug_test", folder / "eplb_plug_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    return name


class NoEvent:
    """A device event where there is no device."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.elapsed_time = lambda other: 0.0

    def record(self, stream=None) -> None:
        """Return at once, as there is nothing to wait for."""

    synchronize = wait = record


@contextmanager
def vllm_on_gloo(num_nodes: int = 1):
    """vLLM's `eplb_state` module, whose expert-parallel group is this process's default group."""
    group = SimpleNamespace(device_group=dist.group.WORLD, cpu_group=dist.group.WORLD)
    parallel_state = StandIn(
        "vllm.distributed.parallel_state",
        get_ep_group=lambda: group,
        get_eplb_group=lambda: group,
        get_node_count=lambda: num_nodes,
    )
    with peers.vllm_installed({parallel_state.__name__: parallel_state}), patch.object(torch, "Event", NoEvent):
        yield importlib.import_module("vllm.distributed.eplb.eplb_state")


def vllm_model(num_layers: int, num_logical: int, num_groups: int, topology: Topology, weights) -> SimpleNamespace:
    """What vLLM's `EplbState` wants of a model."""
    return SimpleNamespace(
        num_moe_layers=num_layers,
        num_logical_experts=num_logical,
        num_routed_experts=num_logical,
        num_physical_experts=topology.num_slots,
        num_redundant_experts=topology.num_slots - num_logical,
        num_local_physical_experts=topology.slots_per_rank,
        num_expert_groups=num_groups,
        expert_weights=weights,
        moe_layers=[],
        set_eplb_state=lambda *maps: None,
    )


class SGLang:
    """SGLang's released planner, metadata, updater and manager for one rank of this process's group.

    Args:
        num_logical: experts of each layer.
        num_layers: MoE layers.
        topology: sizes.
        rank: of this process.
        num_groups: of experts; None for none.
        alive: one number per rank for elastic expert parallelism; None for none.
        algorithm: `--eplb-algorithm`.
        dispatch: `--ep-dispatch-algorithm`.
    """

    def __init__(
        self,
        num_layers: int,
        num_logical: int,
        topology: Topology,
        rank: int = 0,
        *,
        num_groups: int | None = None,
        alive: list[int] | None = None,
        algorithm: str = "auto",
        dispatch: str = "dynamic",
    ) -> None:
        self.topology, self.rank = topology, rank
        self.moe = SimpleNamespace(
            ep_num_redundant_experts=topology.num_slots - num_logical,
            eplb_algorithm=algorithm,
            ep_dispatch_algorithm=dispatch,
            moe_a2a_backend="deepep",
            ep_join_mode=None,
            eplb_rebalance_num_iterations=2,
            expert_distribution_recorder_buffer_size=2,
            eplb_rebalance_layers_per_chunk=2,
            eplb_min_rebalancing_utilization_threshold=1.0,
        )
        self.parallel = SimpleNamespace(
            nnodes=topology.num_nodes,
            ep_size=topology.ep_size,
            tp_rank=rank,
            ep_join_rank_offset=0,
            elastic_ep_initial_size=None,
        )
        self.resources = SimpleNamespace(expert_location_metadata=None)
        self.model_class = SimpleNamespace(
            get_model_config_for_expert_location=lambda hf_config: SimpleNamespace(
                num_layers=num_layers, num_logical_experts=num_logical, num_groups=num_groups
            )
        )
        self.elastic = None
        if alive is not None:
            active = torch.tensor(alive, dtype=torch.int32)
            self.elastic = SimpleNamespace(active_ranks=active, active_ranks_cpu=active, has_scaled=False)
        self.counts: Tensor | None = None
        self.reloaded: list[tuple[int, int]] = []
        self.config = SimpleNamespace(hf_config=None)

    def __enter__(self) -> "SGLang":
        self._stack = ExitStack()
        self._stack.enter_context(peers.sglang_installed({module.__name__: module for module in self._stand_ins()}))
        names = ("eplb_algorithms", "expert_location", "expert_location_updater", "eplb_manager")
        loaded = [importlib.import_module(f"sglang.srt.eplb.{name}") for name in names]
        self.algorithms, self.location, self.updating, self.managing = loaded
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _stand_ins(self) -> tuple[StandIn, ...]:
        recorder = SimpleNamespace(recording=True, dump_record=self._dump)
        return (
            StandIn(
                "sglang.srt.runtime_context",
                get_device=lambda: SimpleNamespace(device="cpu"),
                get_exec=lambda: SimpleNamespace(moe=self.moe),
                get_parallel=lambda: self.parallel,
                get_resources=lambda: self.resources,
                get_model=lambda: SimpleNamespace(model_path=None, load_format=None),
            ),
            StandIn(
                "sglang.srt.elastic_ep.elastic_ep",
                ElasticEPStateManager=SimpleNamespace(
                    instance=lambda: self.elastic,
                    healthy_rank_state=lambda: torch.ones(self.topology.ep_size, dtype=torch.int32),
                ),
                elastic_expanded_world_enabled=lambda: False,
            ),
            StandIn(
                "sglang.srt.environ",
                envs=SimpleNamespace(
                    SGLANG_EPLB_P2P_BATCH_CHUNK_SIZE=SimpleNamespace(get=lambda: 3),
                    SGLANG_LOG_EXPERT_LOCATION_METADATA=SimpleNamespace(get=lambda: False),
                ),
            ),
            # SGLang's own canary compares what arrived with the new placement.
            StandIn("sglang.srt.utils", get_bool_env_var=lambda name: name.endswith("CANARY")),
            StandIn("sglang.srt.model_loader", get_model_architecture=lambda config: (self.model_class, None)),
            StandIn("sglang.srt.eplb.expert_distribution", get_global_expert_distribution_recorder=lambda: recorder),
        )

    def _dump(self, output_mode: str) -> dict:
        assert output_mode == "object"
        return {"logical_count": self.counts, "average_utilization_rate_over_window": None}

    @property
    def metadata(self):
        """SGLang's metadata of the placement in force."""
        return self.resources.expert_location_metadata

    def start(self):
        """Set the metadata that SGLang starts from."""
        self.location.set_global_expert_location_metadata(
            self.location.ExpertLocationMetadata.init_trivial(self.config, moe_ep_rank=self.rank)
        )
        return self.metadata

    def manager(self, weights: list[list[Tensor]]):
        """SGLang's `EPLBManager` over the weights of this rank, with a disk to reload lost experts from."""
        updater = self.updating.ExpertLocationUpdater()
        updater._first_execution = False  # would empty the cache of a device
        model = SimpleNamespace(
            routed_experts_weights_of_layer=dict(enumerate(weights)),
            generate_weight_name_filter=lambda missing: missing,
        )

        def reload(path, load_format, weight_name_filter) -> None:
            first = self.rank * self.topology.slots_per_rank
            for layer, experts in weight_name_filter.items():
                held = self.metadata.physical_to_logical_map_cpu[layer, first:][: self.topology.slots_per_rank]
                for expert in set(experts):
                    self.reloaded.append((layer, expert))
                    for tensor, row in zip(weights[layer], expert_rows(layer, [expert]), strict=True):
                        tensor[held == expert] = row

        return self.managing.EPLBManager(
            model_config=self.config,
            get_model=lambda: model,
            get_expert_location_updater=lambda: updater,
            get_expert_backup_client=lambda: None,
            get_weight_updater=lambda: SimpleNamespace(update_weights_from_disk=reload),
        )
