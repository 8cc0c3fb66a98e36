"""Building the memory: what it covers, and what is left out."""

from __future__ import annotations

import pytest
import torch

from saae_runtime.errors import FitError
from saae_train.fitting.memory import _cover, balance, build_memory, level_exponent
from saae_train.model.memory import Memory, Nearest

WIDTH, POSITIONS = 12, 20


def patches(images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_a_memory_of_every_patch_finds_each_at_no_distance() -> None:
    g = patches(4)
    memory, left_out = build_memory(lambda i: g[i], 4, 10_000, 0)
    assert len(memory) == 4 * POSITIONS
    # The kernel's width is a share of the smallest distance: on an entry nothing else counts.
    assert float(memory(g).distance.max()) < 1e-3
    assert left_out.distance.shape == left_out.radius.shape == (4, POSITIONS)
    assert float(left_out.distance.min()) > 0.1  # a patch does not vouch for itself


@pytest.mark.parametrize("reach", [0, 1])
def test_left_out_is_what_entries_and_radii_of_the_other_images_say(reach: int) -> None:
    g = patches(6)
    memory, left_out = build_memory(lambda i: g[i], 6, 10_000, 0, reach)
    image_of = (memory.entries[:, None] == (g.flatten(0, 1) * memory.weight)[None]).all(dim=2).int().argmax(dim=1)
    image_of = image_of // POSITIONS
    near = torch.stack(
        [memory.choose(g[i : i + 1] * memory.weight, (image_of - i).abs() <= reach)[0] for i in range(6)]
    )
    family = (memory.entries[:, None] - memory.entries[None]).norm(dim=2).argsort(dim=1)[:, :5]  # itself and four more
    mean = left_out.distance.square().mean()

    def radius(entry: int, without: range) -> torch.Tensor:
        counts = torch.isin(near[:, :, 0], family[entry])
        counts[[i for i in without if 0 <= i < 6]] = False
        return ((left_out.distance.square()[counts].sum() + 3 * mean) / (counts.sum() + 3)).sqrt()

    everybody = torch.stack([radius(entry, range(0)) for entry in range(len(memory))])
    torch.testing.assert_close(memory.radius, everybody)
    others = torch.stack([radius(entry, range(2 - reach, 3 + reach)) for entry in range(len(memory))])
    assert not torch.allclose(others, everybody)
    alone = Memory(memory.entries, others, memory.weight)(g[2:3], (image_of - 2).abs() <= reach)
    torch.testing.assert_close(left_out.distance[2], alone.distance[0])
    torch.testing.assert_close(left_out.radius[2], alone.radius[0])


def test_copies_do_not_vouch_for_each_other() -> None:
    g = patches(3)
    g = torch.stack([g, g + 1e-4], dim=1).flatten(0, 1)  # each image is followed by its copy
    _, apart = build_memory(lambda i: g[i], 6, 10_000, 0)
    _, sequence = build_memory(lambda i: g[i], 6, 10_000, 0, reach=1)
    assert float(apart.distance.max()) < 0.01
    assert float(sequence.distance.min()) > 0.1


@pytest.mark.parametrize(("images", "reach"), [(1, 0), (3, 2)])
def test_copies_alone_are_an_error(images: int, reach: int) -> None:
    g = patches(images)
    with pytest.raises(FitError, match="not copies of each other") as caught:
        build_memory(lambda i: g[i], images, 10, 0, reach)
    assert "add normal images" in caught.value.cure


def test_few_entries_of_some_images() -> None:
    """An image that has most of the entries leaves fewer candidates than the others have."""
    g = patches(4)
    memory, left_out = build_memory(lambda i: g[i] * (10.0 if i == 0 else 1.0), 4, 18, 0)
    assert len(memory) == 18
    assert bool(torch.isfinite(left_out.distance).all())
    with pytest.raises(FitError, match="one image"):
        build_memory(lambda i: g[i] * (10.0 if i == 0 else 1e-3), 4, 1, 0)


def test_entries_cover_the_points_nearly_as_well_as_one_by_one() -> None:
    points = torch.randn(3000, 8, generator=torch.Generator().manual_seed(3))
    found = _cover(points, 200)
    assert len(set(found.tolist())) == 200

    def covered(chosen: torch.Tensor) -> float:
        return float(torch.cdist(points, points[chosen]).amin(dim=1).max())

    one_by_one = [int(points.square().sum(dim=1).argmin())]
    far = torch.full((3000,), torch.inf)
    while len(one_by_one) < 200:
        far = torch.minimum(far, (points - points[one_by_one[-1]]).square().sum(dim=1))
        one_by_one.append(int(far.argmax()))
    assert covered(found) <= 1.1 * covered(torch.tensor(one_by_one))
    by_chance = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:200]
    assert covered(found) < 0.9 * covered(by_chance)


def test_a_noisy_autoencoder_counts_less() -> None:
    generator = torch.Generator().manual_seed(0)
    nearest = Nearest(torch.rand(50, 20, generator=generator) + 1, torch.ones(50, 20))
    calm, noisy = (torch.exp(spread * torch.randn(50, 20, generator=generator)) for spread in (0.2, 2.0))
    assert balance(nearest, calm) == pytest.approx(10 * balance(nearest, noisy), rel=0.2)
    score = (nearest.distance.log().std(), (balance(nearest, noisy) * noisy.log()).std())
    assert float(score[1]) == pytest.approx(0.75 * float(score[0]), rel=1e-4)


def drawn_scores(slope: float, count: int = 60) -> torch.Tensor:
    """Maps of normal images: a common level for each, its peak follows the level with a slope in logarithms."""
    generator = torch.Generator().manual_seed(4)
    level = (0.2 * torch.randn(count, 1, 1, generator=generator)).exp()
    scores = level * (1 + 0.01 * torch.rand(count, 12, 12, generator=generator))
    scores[:, 5, 7] = 3.0 * level[:, 0, 0] ** slope
    return scores


def test_what_the_level_says_about_the_largest_score_is_taken_out_in_part() -> None:
    assert level_exponent(drawn_scores(0.45), 0.0) == pytest.approx(0.15, abs=0.01)
    assert level_exponent(drawn_scores(0.3), 0.0) == pytest.approx(0.1, abs=0.01)
    assert level_exponent(drawn_scores(3.0), 0.0) == 0.2
    assert level_exponent(drawn_scores(-1.0), 0.0) == 0.0
    # smoothing mixes the peak with its surroundings, which follow the level fully
    assert level_exponent(drawn_scores(0.3), 1.0) > 0.15


def test_a_slope_needs_three_images_and_a_level_that_varies() -> None:
    assert level_exponent(drawn_scores(0.6, 2), 0.0) == 0.0
    assert level_exponent(torch.ones(5, 4, 4), 0.5) == 0.0
    assert level_exponent(torch.zeros(5, 4, 4), 0.5) == 0.0
