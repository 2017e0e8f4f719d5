"""Gram anchoring against loops over the formula, and the teacher's features brought down."""

import math

import pytest
import torch

from model.losses.gram import as_groups, gram, resize_features


def features(c=3, N=6, D=4, seed=0):
    return torch.randn(c, N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(student, teacher, change=lambda s, t: (s, t)):
    def similarities(patches):
        rows = [[float(value) for value in row] for row in patches]
        norms = [math.sqrt(sum(value * value for value in row)) for row in rows]
        unit = [[value / norm for value in row] for row, norm in zip(rows, norms, strict=True)]
        return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in unit] for x in unit]

    total, entries = 0.0, 0
    for c in range(len(student)):
        S, G = similarities(student[c]), similarities(teacher[c])
        for i in range(len(S)):
            for j in range(len(S)):
                s, t = change(S[i][j], G[i][j])
                total += (s - t) ** 2
        entries += len(S) ** 2
    return total / entries


def test_equals_the_formula():
    student, teacher = features(), features(seed=1)
    found = gram(student, teacher, 3)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(plain(student, teacher), rel=1e-12)


def test_only_angles_count():
    student = features()
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    assert gram(student, 3 * student @ turn, 3).item() == pytest.approx(0, abs=1e-28)


def test_micro_batches_sum_to_the_whole():
    student, teacher = features(), features(seed=1)
    parts = [gram(student[s], teacher[s], 3) for s in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), gram(student, teacher, 3))


def test_gradient():
    student, teacher = features(c=1, N=3, D=3).requires_grad_(), features(c=1, N=3, D=3, seed=1)
    assert torch.autograd.gradcheck(lambda values: gram(values, teacher, 1), student)


def test_huge_and_half_precision_features_stay_finite():
    assert gram((features() * 1e4).bfloat16(), features(seed=1).bfloat16(), 3).isfinite()
    assert gram(features().bfloat16(), features().bfloat16(), 3).dtype == torch.float32


def cubic(x, a=-0.75):
    """Keys' kernel, with the constant that image libraries take."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_features_are_brought_down_bicubically_without_antialiasing():
    (h, w), (to_h, to_w), D = (6, 8), (3, 4), 2
    grid = features(c=1, N=h * w, D=D)
    expected = torch.zeros(1, to_h * to_w, D, dtype=torch.float64)
    for i in range(to_h):
        for j in range(to_w):
            y, x = (i + 0.5) * h / to_h - 0.5, (j + 0.5) * w / to_w - 0.5
            for row in range(math.floor(y) - 1, math.floor(y) + 3):
                for column in range(math.floor(x) - 1, math.floor(x) + 3):
                    inside = min(max(row, 0), h - 1) * w + min(max(column, 0), w - 1)
                    expected[0, i * to_w + j] += cubic(y - row) * cubic(x - column) * grid[0, inside]
    torch.testing.assert_close(resize_features(grid, (h, w), (to_h, to_w)), expected)


def test_features_of_the_same_grid_are_left_as_they_are():
    grid = features(N=6)
    assert resize_features(grid, (2, 3), (2, 3)) is grid


@pytest.mark.parametrize(("options", "change"), [
    ({"clamp": "both"}, lambda s, t: (max(s, 0), max(t, 0))),
    ({"clamp": "teacher"}, lambda s, t: (0 if s < 0 and t < 0 else s, max(t, 0))),
    ({"clamp": "teacher", "clamped_student": False}, lambda s, t: (s, max(t, 0))),
])  # fmt: skip
def test_negative_similarities_may_be_clamped(options, change):
    student, teacher = features(), features(seed=1)
    found = gram(student, teacher, 3, **options)
    assert found.item() == pytest.approx(plain(student, teacher, change), rel=1e-12)
    assert found != gram(student, teacher, 3)


def test_over_a_group_all_patches_meet():
    """2 crops of 4 images in groups of 2: two matrices of 2 x 2 x N patches."""
    student, teacher = features(c=8), features(c=8, seed=1)
    groups = [torch.cat([student[[0, 1, 4, 5]].flatten(0, 1)]), torch.cat([student[[2, 3, 6, 7]].flatten(0, 1)])]
    found = as_groups(student, 2, 2)
    torch.testing.assert_close(found, torch.stack(groups), rtol=0, atol=0)
    together = gram(found, as_groups(teacher, 2, 2), 2)
    assert together.item() == pytest.approx(plain(found, as_groups(teacher, 2, 2)), rel=1e-12)
