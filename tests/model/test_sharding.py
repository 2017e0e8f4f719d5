"""Networks cut over real processes: what each holds, where it began, and what is left of it when it is put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from model import config, cut, parallel, sharding
from model.networks.init import create
from model.networks.vit import View, VisionTransformer

SETTINGS = config.Backbone(
    arch="custom", dim=36, depth=2, heads=3, patch_size=8, layer_scale=1.0, untie_local_cls_norm=True
)
FSDP, HSDP = config.Parallel(shard="fsdp"), config.Parallel(shard="hsdp", shard_size=2)


def laid(ways: config.Parallel, settings: config.Backbone = SETTINGS, compute: str = "fp32") -> VisionTransformer:
    precision = config.read(config.Precision, {"compute": compute})
    prepare = sharding.Prepare(ways, precision, torch.device("cpu"))
    return create(lambda: VisionTransformer(settings), 3, "backbone", prepare)


def _rank(rank: int, world: int, ways: config.Parallel, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    network = laid(ways)
    state = network.state_dict()
    own = {name: cut.local(tensor).clone() for name, tensor in state.items()}
    rows = {name: (cut.rows(tensor).start, cut.rows(tensor).stop) for name, tensor in state.items()}
    whole = {name: cut.whole(tensor).clone() for name, tensor in state.items()}
    with torch.no_grad():
        images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
        features = network([View(images)])[0].patches
    after = sum(cut.local(tensor).numel() for tensor in network.state_dict().values())
    torch.save((own, rows, whole, features, after), folder / f"{rank}.pt")
    parallel.leave()


@pytest.mark.jobs
@pytest.mark.parametrize(("world", "ways"), [(1, FSDP), (2, FSDP), (3, FSDP), (4, HSDP)], ids=["1", "2", "3", "2x2"])
def test_initial_weights_are_those_of_one_process_bit_for_bit(
    tmp_path: Path, world: int, ways: config.Parallel
) -> None:
    multiprocessing.spawn(_rank, args=(world, ways, tmp_path), nprocs=world)
    alone = create(lambda: VisionTransformer(SETTINGS), 3, "backbone")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    with torch.no_grad():
        images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
        expected = alone([View(images)])[0].patches
    for own, rows, whole, features, after in ranks:
        assert all(tensor.equal(whole[name]) for name, tensor in alone.state_dict().items())
        for name, tensor in own.items():
            start, stop = rows[name]
            assert tensor.equal(whole[name][start:stop])
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        assert after == sum(tensor.numel() for tensor in own.values()), "a gathered block was not let go"
    shards = world if ways is FSDP else 2
    for name in (name for name in ranks[0][0] if name.endswith(("qkv.weight", "fc1.weight", "proj.weight"))):
        drawn = [own[name] for own, *_ in ranks[:shards]]
        assert not any(a.shape == b.shape and a.equal(b) for i, a in enumerate(drawn) for b in drawn[:i]), name
        assert sum(len(tensor) for tensor in drawn) == len(alone.state_dict()[name])


def _holds(rank: int, world: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    before = _anonymous_bytes()
    network = laid(FSDP, config.Backbone(arch="vitb16"))
    grown, size = _anonymous_bytes() - before, sum(p.numel() * p.element_size() for p in network.parameters())
    (folder / f"{rank}.txt").write_text(f"{grown} {size}")
    parallel.leave()


def _anonymous_bytes() -> int:
    """The most that this process ever had of its own, minus files that it mapped."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return (int(words["VmHWM"].split()[0]) - int(words["RssFile"].split()[0])) * 1024


@pytest.mark.jobs
def test_no_process_ever_holds_a_whole_network(tmp_path: Path) -> None:
    multiprocessing.spawn(_holds, args=(4, tmp_path), nprocs=4)
    for rank in range(4):
        grown, size = map(int, (tmp_path / f"{rank}.txt").read_text().split())
        assert size > 340e6
        assert grown < 0.6 * size
