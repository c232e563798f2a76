"""How large weights and inputs are, as `measure` notes it in the table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated import calibrate_folder, some_tokens, space_of
from rounding import apart
from safetensors.torch import load_file
from test_table import header, weight_row

from mofq.evidence.calibration.sequence_file import SequenceFile
from mofq.evidence.calibration.stats import Stats
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.measure.magnitudes import group_profiles, tokens_extent
from mofq.evidence.table import Extent, Profile, open_table, read_table
from mofq.exceptions import TableError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FusionGroup, LinearLayer, find_layers


def layer(name: str, in_features: int, module: str = "q_proj") -> LinearLayer:
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        out_features=2,
        in_features=in_features,
        dtype="BF16",
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=0,
        module=module,
        shares_scale=name,
    )


def profile_of(weight_OI: torch.Tensor) -> Profile:
    one = layer("q", weight_OI.shape[1])
    [profile] = group_profiles(FusionGroup("g", (one,)), {"q": tokens_extent(weight_OI)}, {"q": {}})
    return profile


def test_a_wall_and_a_spike_worked_out_by_hand() -> None:
    weight_OI = torch.ones(2, 32)
    weight_OI[:, 3] = torch.tensor([8.0, -8.0])  # a wall: the whole channel is large
    weight_OI[1, 20] = -8.0  # a spike
    weight = profile_of(weight_OI).weight
    assert weight.amax == tuple(8.0 if i in (3, 20) else 1.0 for i in range(32))
    assert weight.rms[3] == 8.0
    assert weight.rms[20] == pytest.approx(math.sqrt((1 + 64) / 2), rel=1e-6)
    # Groups of 16: [wall, ones] and [wall, spike]; one 8 among 15 ones is 8 / sqrt(79 / 16).
    with_8, of_ones = 8 / math.sqrt(79 / 16), 1.0
    assert weight.crest["g16"] == pytest.approx((3 * with_8 + of_ones) / 4, rel=1e-6)
    rows = (8 / math.sqrt(95 / 32), 8 / math.sqrt(158 / 32))
    assert weight.crest["g32"] == pytest.approx(sum(rows) / 2, rel=1e-6)
    assert weight.crest["channel"] == weight.crest["g32"]
    assert "g64" not in weight.crest


def test_many_channels_are_shown_as_equal_ranges_and_no_wall_is_lost() -> None:
    weight_OI = torch.full((2, 600), 0.5)
    weight_OI[0, 599] = -7.0
    profile = profile_of(weight_OI)
    assert (profile.channels, len(profile.weight.amax)) == (600, 200)
    assert profile.weight.amax[-1] == 7.0
    assert profile.weight.rms[-1] == pytest.approx(math.sqrt((49 + 0.25) / 2), rel=1e-6)
    assert set(profile.weight.amax[:-1]) == set(profile.weight.rms[:-1]) == {0.5}


def test_scale_groups_of_zeros_have_no_crest_factor() -> None:
    weight_OI = torch.zeros(2, 32)
    weight_OI[0, 0] = 1.0
    assert profile_of(weight_OI).weight.crest["g16"] == pytest.approx(4.0)
    assert profile_of(torch.zeros(2, 32)).weight.crest == {}


def test_blocks_of_rows_add_up_and_experts_of_a_kind_are_taken_together() -> None:
    generator = torch.Generator().manual_seed(0)
    first_OI, second_OI = torch.randn(2, 6, 48, generator=generator)
    names = ("experts.0.up", "experts.1.up")
    group = FusionGroup("g", tuple(layer(name, 48, "experts.up") for name in names))
    weights = dict(zip(names, map(tokens_extent, (first_OI, second_OI)), strict=True))
    inputs = {names[0]: {"a": tokens_extent(first_OI)}, names[1]: {}}
    [profile] = group_profiles(group, weights, inputs)
    whole = profile_of(torch.cat([first_OI, second_OI])).weight
    assert profile.weight.amax == whole.amax
    assert profile.weight.rms == pytest.approx(whole.rms, rel=1e-6)
    assert profile.weight.crest == pytest.approx(whole.crest)
    assert profile.inputs["a"].amax == profile_of(first_OI).weight.amax
    assert "token" in profile.inputs["a"].crest


@pytest.fixture(scope="module")
def stats(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return calibrate_folder(
        tiny("llama"), tmp_path_factory.mktemp("stats"), {"a": some_tokens(2, 16)}
    )


def fill(model: Path, path: Path, stats: Stats | None, *schemes: str) -> None:
    checkpoint = open_checkpoint(str(model))
    space = space_of(*schemes)
    measure(checkpoint, find_layers(checkpoint), space, table_path=path, stats=stats)


def test_measure_notes_the_weights_and_inputs_of_the_checkpoint(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    fill(tiny_llama, tmp_path / "table.jsonl", stats, "int4.g32")
    table = read_table(tmp_path / "table.jsonl")
    modules = {(group.name, la.module) for group in table.header.groups for la in group.layers}
    assert {profile.key for profile in table.profiles} == modules
    name = "model.layers.1.mlp.down_proj"
    [profile] = [one for one in table.profiles if one.key == ("layers.1.mlp.down", "down_proj")]
    weight_OI = load_file(tiny_llama / "model.safetensors")[f"{name}.weight"].double().numpy()
    assert profile.weight.amax == tuple(np.abs(weight_OI).max(0))
    assert profile.weight.rms == pytest.approx(np.sqrt((weight_OI**2).mean(0)), rel=1e-6)
    files = [SequenceFile(file) for file in stats.sequence_files("a")]
    x_TI = np.concatenate([file.read(name).x_TI.double().numpy() for file in files])
    for file in files:
        file.__exit__(None, None, None)
    assert profile.inputs["a"].amax == tuple(np.abs(x_TI).max(0))
    crest_T = np.abs(x_TI).max(1) / np.sqrt((x_TI**2).mean(1))
    assert profile.inputs["a"].crest["token"] == pytest.approx(
        crest_T.mean(), rel=apart(x_TI.shape[1])
    )


def test_profiles_cut_off_in_the_middle_are_written_again_to_the_same_bytes(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    fill(tiny_llama, path, stats, "int4.g32")
    whole = path.read_bytes()
    second_profile = whole.index(b'"module":"k_proj"')
    for end in (second_profile, whole.index(b"\n", second_profile) + 1):
        path.write_bytes(whole[:end])
        fill(tiny_llama, path, stats, "int4.g32")
        assert path.read_bytes() == whole


def test_a_further_scheme_adds_no_second_profile(
    tiny_llama: Path, stats: Stats, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    fill(tiny_llama, path, stats, "int4.g32")
    before = read_table(path).profiles
    fill(tiny_llama, path, stats, "int4.g32", "int8.channel")
    assert read_table(path).profiles == before
    assert path.read_bytes().count(b'"kind":"profile"') == len(before)


ONES = Extent((1.0,) * 16, (1.0,) * 16, {"channel": 1.0})
PROFILE = Profile("layers.0.attn.o", "o", 16, ONES, {"wiki": ONES})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": "layers.0.attn.oo"}, "no fusion group 'layers.0.attn.oo'. Did you mean"),
        ({"module": "q"}, "has no 'q' of 16 input channels in layers.0.attn.o; it has {'o': 16}"),
        ({"channels": 8}, "has no 'o' of 8 input channels"),
        ({"inputs": {"wikki": ONES}}, "no corpus 'wikki'. Did you mean 'wiki'"),
        ({"weight": replace(ONES, amax=(1.0,) * 15)}, "need 16 numbers .* found 15 and 16"),
        ({"weight": replace(ONES, rms=(math.nan,) * 16)}, r"rms\[0\]: .*finite.* too large for"),
        ({"weight": replace(ONES, crest={"g16": -1.0})}, "g16: must be at least 0.* damaged"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "table.jsonl"
    with open_table(path, header()) as writer, pytest.raises(TableError, match=message):
        writer.add_group([weight_row()], profiles=[replace(PROFILE, **changes)])
    assert read_table(path).rows == ()


def test_a_profile_is_read_back_as_it_was_written_and_none_contradicts_it(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    with open_table(path, header()) as writer:
        writer.add_group([weight_row()], profiles=[PROFILE])
    assert read_table(path).profiles == (PROFILE,)
    with path.open() as file:
        line = file.readlines()[1]
    with path.open("a") as file:
        file.write(line)
    assert read_table(path).profiles == (PROFILE,)
    with path.open("a") as file:
        file.write(line.replace('"channel":1.0', '"channel":2.0'))
    with pytest.raises(TableError, match=r"profile of o in layers\.0\.attn\.o stands twice"):
        read_table(path)
