"""Rearranging sharded arrays: what is compiled, what is refused, and what the caller gets back."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from eplb_core import EMPTY, EplbError, MovePlan, Topology, apply_moves, plan_moves, rebalance, schedule_rounds
from eplb_core.sharded import choose_width, lower, rearrange
from eplb_core.sharded.script import write_script
from tests.devices import FIELDS, assert_same_rows, host_rows, make_mesh, num_compiled, shard

TOPOLOGY = Topology(4, 3, num_nodes=2)
NUM_LAYERS = 5
BY_SLOT = PartitionSpec(None, "ep")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(tp=2, ep=4)


def random_placement(rng, topology=TOPOLOGY, num_layers=NUM_LAYERS, num_logical=9) -> np.ndarray:
    spare = topology.num_slots - num_logical
    rows = [np.r_[np.arange(num_logical), rng.integers(0, num_logical, spare)] for _ in range(num_layers)]
    return rng.permuted(np.stack(rows), axis=1).astype(np.int32)


def random_plan(seed: int = 0, topology=TOPOLOGY, num_layers=NUM_LAYERS, **options) -> MovePlan:
    rng = np.random.default_rng(seed)
    old, new = (random_placement(rng, topology, num_layers) for _ in range(2))
    return plan_moves(old, new, topology, **options)


def shuffled(plan: MovePlan, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    layer = np.arange(len(plan.source_slot))[:, None]
    return {name: array[layer, plan.source_slot] for name, array in rows.items()}


def stacked(mesh, *shape: int, dtype=np.float32, spec=BY_SLOT) -> jax.Array:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    return jax.device_put(values, NamedSharding(mesh, spec))


# The caller's view


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("fan_out", ["direct", "node"])
def test_every_dtype_and_sharding(axis_type, fan_out):
    mesh = make_mesh(axis_type, tp=2, ep=4)
    rows, plan = host_rows(NUM_LAYERS, TOPOLOGY.num_slots), random_plan(fan_out=fan_out)
    moved = rearrange(shard(rows, mesh), plan, TOPOLOGY, mesh=mesh)
    assert_same_rows(moved, shuffled(plan, rows))
    for name, array in moved.items():
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, FIELDS[name][2]), array.ndim)


def test_relays_are_followed():
    """With relays each node pulls a row once; here the plan that has them is not the direct one."""
    old = np.asarray([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    new = np.asarray([[0, 1, 2, 3, 4, 5, 0, 7, 8, 0, 10, 11]])
    plan = plan_moves(old, new, TOPOLOGY, fan_out="node")
    assert (plan.relay_slot != EMPTY).any()
    script = write_script(plan, TOPOLOGY)
    crossing = script.num_sent[:2].sum()
    assert crossing == 1
    assert script.num_sent[2:].sum() == 1


def test_rows_stay_in_the_memory_they_had(mesh):
    """Donated arrays are gone, and what is returned lies where they did."""

    def pointers(array):
        return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]

    weights = shard(host_rows(NUM_LAYERS, TOPOLOGY.num_slots), mesh)
    rearrange(weights, random_plan(), TOPOLOGY, mesh=mesh)  # compiles
    weights = shard(host_rows(NUM_LAYERS, TOPOLOGY.num_slots), mesh)
    before = pointers(weights["large"])
    moved = rearrange(weights, random_plan(), TOPOLOGY, mesh=mesh)
    assert weights["large"].is_deleted()
    assert pointers(moved["large"]) == before


def test_any_pytree_and_a_single_array(mesh):
    plan = random_plan()
    array = stacked(mesh, NUM_LAYERS, 12, 2)
    expected = apply_moves(np.asarray(array), plan)
    np.testing.assert_array_equal(rearrange(array, plan, TOPOLOGY, mesh=mesh), expected)
    tree = {"moe": [stacked(mesh, NUM_LAYERS, 12, 2), (stacked(mesh, NUM_LAYERS, 12), None)]}
    moved = rearrange(tree, plan, TOPOLOGY, mesh=mesh)
    assert jax.tree.structure(moved) == jax.tree.structure(tree)
    np.testing.assert_array_equal(moved["moe"][0], expected)
    assert rearrange({}, plan, TOPOLOGY, mesh=mesh) == {}


def test_rows_replicated_over_another_axis_move_in_every_replica(mesh):
    plan = random_plan()
    moved = rearrange(stacked(mesh, NUM_LAYERS, 12, 2), plan, TOPOLOGY, mesh=mesh)
    expected = apply_moves(np.arange(NUM_LAYERS * 24).reshape(NUM_LAYERS, 12, 2), plan)
    for shard_ in moved.addressable_shards:
        np.testing.assert_array_equal(shard_.data, expected[shard_.index])
    assert len(moved.addressable_shards) == 8


def test_one_rank_only_copies_within():
    mesh, topology = make_mesh(ep=1), Topology(1, 6)
    plan = MovePlan(np.asarray([[1, 2, 0, 3, 3, 5]]))
    moved = rearrange(stacked(mesh, 1, 6), plan, topology, mesh=mesh)
    assert moved.tolist() == [[1, 2, 0, 3, 3, 5]]


def test_plans_from_jit_on_the_device(mesh):
    rng = np.random.default_rng(0)
    old, new = random_placement(rng), random_placement(rng)
    plan = jax.jit(plan_moves, static_argnums=2)(jnp.asarray(old), jnp.asarray(new), TOPOLOGY)
    moved = rearrange(stacked(mesh, NUM_LAYERS, 12), plan, TOPOLOGY, mesh=mesh)
    np.testing.assert_array_equal(moved, apply_moves(np.arange(60).reshape(5, 12), plan_moves(old, new, TOPOLOGY)))


def test_chosen_layers_only(mesh):
    plan = random_plan()
    values = np.arange(60).reshape(5, 12)
    moved = rearrange(stacked(mesh, 5, 12), plan, TOPOLOGY, mesh=mesh, layers=[3, 1])
    expected = values.copy()
    expected[[1, 3]] = apply_moves(values, plan)[[1, 3]]
    np.testing.assert_array_equal(moved, expected)


def test_slots_without_a_source_keep_their_rows(mesh):
    old = np.arange(12)[None]
    new = np.asarray([[1, 0, 2, 3, 4, EMPTY, 6, 7, 8, 9, 10, 11]])
    plan = plan_moves(old, new, TOPOLOGY)
    moved = rearrange(stacked(mesh, 1, 12), plan, TOPOLOGY, mesh=mesh, new=new)
    assert moved.tolist() == [[1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


# What is compiled


def test_fifty_plans_share_one_program():
    """Of equal sizes: 50 rebalances under drift; 50 unrelated placements may need one or two more for their staging."""
    mesh, topology, num_layers = make_mesh(ep=8), Topology(8, 9), 6
    rng = np.random.default_rng(0)
    weights = stacked(mesh, num_layers, topology.num_slots)
    nothing = MovePlan(np.tile(np.arange(topology.num_slots, dtype=np.int32), (num_layers, 1)))
    start = num_compiled()
    weights = rearrange(weights, nothing, topology, mesh=mesh)
    assert num_compiled() - start == 1
    np.testing.assert_array_equal(weights, np.arange(num_layers * 72).reshape(num_layers, 72))

    level = rng.normal(size=(num_layers, 64))
    held, seen = rebalance(np.exp(level), topology), set()
    for _ in range(50):
        level = 0.95 * level + 0.3 * rng.normal(size=level.shape)
        new = rebalance(np.exp(level), topology, previous=held)
        plan = plan_moves(held, new, topology)
        seen.add(plan.source_slot.tobytes())
        weights, held = rearrange(weights, plan, topology, mesh=mesh), new
    assert len(seen) > 45
    assert num_compiled() - start == 1
    for seed in range(50):
        weights = rearrange(weights, random_plan(seed, topology, num_layers), topology, mesh=mesh)
    assert num_compiled() - start <= 3


def test_no_weights_are_gathered_and_memory_is_the_rows_in_flight():
    """The only collectives are permutes of `width` rows, one per shift and parcel."""
    mesh, topology, num_layers = make_mesh(ep=8), Topology(8, 9), 26
    row = 4096
    weights = {"large": stacked(mesh, num_layers, 72, row), "small": stacked(mesh, num_layers, 72, 5)}
    row_bytes = 4 * row + 20
    plan = some_moves(num_layers, topology, share=0.1)
    script = write_script(plan, topology, width=choose_width(num_layers, topology))
    compiled = lower(weights, plan, topology, mesh=mesh).compile()
    collectives = re.findall(r"= (\S+) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text())
    assert {name for _, name in collectives} == {"collective-permute"}
    # Both arrays have small rows of one dtype, so they share a message.
    assert len(collectives) == 7
    assert {shape.split("{")[0] for shape, _ in collectives} == {f"f32[1,{row + 5}]"}
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= num_layers * 9 * row_bytes
    assert memory.temp_size_in_bytes <= (1.5 * max(script.num_places, 8) + 4) * row_bytes + 2**15
    assert memory.temp_size_in_bytes <= topology.num_slots * row_bytes / 4


def some_moves(num_layers: int, topology: Topology, share: float) -> MovePlan:
    """A plan in which a share of the slots of every layer exchange their experts."""
    rng = np.random.default_rng(0)
    source = np.tile(np.arange(topology.num_slots, dtype=np.int32), (num_layers, 1))
    for row in source:
        chosen = rng.choice(topology.num_slots, round(share * topology.num_slots), replace=False)
        row[chosen] = np.roll(chosen, 1)
    return MovePlan(source)


@pytest.mark.parametrize(("num_layers", "depth"), [(26, 9), (58, 36)])
def test_padding_adds_at_most_half(num_layers, depth):
    topology = Topology(8, depth)
    for share in (0.1, 1.0):
        plan = some_moves(num_layers, topology, share)
        width = choose_width(num_layers, topology)
        rounds = int(write_script(plan, topology, width=width).num_rounds)
        assert rounds * width * topology.ep_size <= 1.5 * len(schedule_rounds(plan, topology).layer)


def test_small_floats_travel_as_bits():
    """XLA widens bfloat16 on CPU; rows are sent as integers of the same size, at the price of one copy of the array."""
    mesh, topology, num_layers, row = make_mesh(ep=8), Topology(8, 9), 26, 4096
    weights = stacked(mesh, num_layers, 72, row, dtype=jnp.bfloat16)
    compiled = lower(weights, some_moves(num_layers, topology, 0.1), topology, mesh=mesh).compile()
    sent = re.findall(r"= (\S+)\{[^ ]* collective-permute\(", compiled.as_text())
    assert set(sent) == {f"u16[1,{row}]"}
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * row * (num_layers * 9 + 18) + 2**15


def test_staging_can_be_limited():
    mesh, topology, num_layers = make_mesh(ep=8), Topology(8, 6), 16
    rng = np.random.default_rng(0)
    old, new = (random_placement(rng, topology, num_layers, num_logical=40) for _ in range(2))
    plan = plan_moves(old, new, topology)
    rows = rng.normal(size=(num_layers, 48, 3000)).astype(np.float32)
    sharding = NamedSharding(mesh, BY_SLOT)

    def memory(**limit):
        weights = jax.device_put(rows, sharding)
        compiled = lower(weights, plan, topology, mesh=mesh, **limit).compile()
        moved = rearrange(weights, plan, topology, mesh=mesh, **limit)
        np.testing.assert_array_equal(moved, apply_moves(rows, plan))
        return compiled.memory_analysis().temp_size_in_bytes

    free, limited = memory(), memory(max_staging_bytes=4 * 12000)
    most = max(write_script(plan, topology, layers=[layer]).num_places for layer in range(num_layers))
    assert limited <= (max(4, most) + 4) * 12000 + 2**15
    assert limited < 0.8 * free


def test_staging_is_not_rounded_up_beyond_its_limit():
    mesh, topology, num_layers, limit = make_mesh(ep=8), Topology(8, 9), 16, 7
    plan = some_moves(num_layers, topology, 0.5)
    assert write_script(plan, topology, max_places=limit).num_places == limit
    weights = stacked(mesh, num_layers, 72, 3000)
    options = {"max_staging_bytes": limit * 12000}
    text = lower(weights, plan, topology, mesh=mesh, **options).compile().as_text()
    assert f"f32[{limit},3000]" in text
    np.testing.assert_array_equal(
        rearrange(weights, plan, topology, mesh=mesh, **options),
        apply_moves(np.arange(num_layers * 72 * 3000).reshape(num_layers, 72, 3000).astype(np.float32), plan),
    )


# What is refused


def refused(mesh, text, weights=None, plan=None, topology=TOPOLOGY, **options):
    weights = stacked(mesh, NUM_LAYERS, 12) if weights is None else weights
    with pytest.raises(EplbError, match=re.escape(text)):
        rearrange(weights, random_plan() if plan is None else plan, topology, mesh=mesh, **options)
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(weights) if isinstance(leaf, jax.Array))


def test_meshes_that_do_not_fit(mesh):
    refused(mesh, "axis='expert', mesh={'tp': 2, 'ep': 4}, ep_size=4", axis="expert")
    refused(mesh, "axis='tp', mesh={'tp': 2, 'ep': 4}, ep_size=4", axis="tp")
    other = make_mesh(ep=4)
    refused(mesh, "weights: on another mesh", weights=stacked(other, NUM_LAYERS, 12))


@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec(),
        PartitionSpec("ep"),
        PartitionSpec(None, "tp"),
        PartitionSpec(None, ("ep", "tp")),
        PartitionSpec("tp", "ep"),
        PartitionSpec(None, None, "ep"),
    ],
)
def test_arrays_that_are_sharded_otherwise(mesh, spec):
    weights = {"up": stacked(mesh, 8, 16, 4), "down": stacked(mesh, 8, 16, 4, spec=spec)}
    plan = MovePlan(np.tile(np.arange(16), (8, 1)))
    refused(mesh, f"['down']: spec={spec}", weights=weights, plan=plan, topology=Topology(4, 4))


def test_all_arrays_that_do_not_fit_are_named(mesh):
    gone = stacked(mesh, NUM_LAYERS, 12)
    gone.delete()
    weights = {
        "fine": stacked(mesh, NUM_LAYERS, 12, 3),
        "host": np.zeros((NUM_LAYERS, 12)),
        "local": jnp.zeros((NUM_LAYERS, 12)),
        "short": stacked(mesh, NUM_LAYERS - 1, 12),
        "flat": stacked(mesh, 12, spec=PartitionSpec("ep")),
    }
    text = "['flat']: shape=(12,), ['host']: a ndarray, ['local']: sharding=SingleDeviceSharding"
    refused(mesh, text, weights=weights)
    refused(mesh, "['short']: shape=(4, 12)", weights=weights)
    with pytest.raises(EplbError, match="weights: deleted, as it was donated before"):
        rearrange(gone, random_plan(), TOPOLOGY, mesh=mesh)


def test_plans_that_do_not_fit(mesh):
    source = np.tile(np.arange(12), (NUM_LAYERS, 1))
    refused(mesh, "shape=(5, 11)", plan=MovePlan(source[:, :11]))
    refused(mesh, "dtype=float64", plan=MovePlan(source * 1.0))
    source[2, 3] = 12
    refused(mesh, "larger ones at (layer, slot) [(2, 3)]", plan=MovePlan(source))


def test_lost_experts_are_refused(mesh):
    """`plan_moves` cannot look at values under jit and leaves `EMPTY` sources: here they are noticed."""
    old = np.tile(np.arange(12, dtype=np.int32), (NUM_LAYERS, 1))
    new = old.copy()
    new[1, 4] = 12
    plan = jax.jit(plan_moves, static_argnums=2)(jnp.asarray(old), jnp.asarray(new), TOPOLOGY)
    refused(mesh, "EMPTY at (layer, slot) [(1, 4)]", plan=plan)
    refused(mesh, "none at (layer, slot) [(1, 4)]", plan=plan, new=new)
    refused(mesh, "must be `[layers, slots]`", plan=plan, new=new[:, :3])


def test_tracing_is_refused(mesh):
    """By `jax.jit` of the arrays as well as of the plan."""
    weights, plan = stacked(mesh, NUM_LAYERS, 12), random_plan()
    with pytest.raises(EplbError, match=r"weights: traced by jax.jit"):
        jax.jit(lambda w: rearrange(w, plan, TOPOLOGY, mesh=mesh))(weights)
    with pytest.raises(EplbError, match=r"must be called outside `jax.jit`"):
        jax.jit(lambda source: rearrange(weights, MovePlan(source), TOPOLOGY, mesh=mesh))(plan.source_slot)


def test_layers_that_do_not_exist(mesh):
    refused(mesh, "layers=[5]", layers=[5])
