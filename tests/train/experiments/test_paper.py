"""The published figures: complete, and consistent with themselves as far as the paper is."""

from __future__ import annotations

import pytest

from saae_train.experiments.paper import CLASSES, MEANS, paper_fps, paper_mean, paper_table, paper_tables


def test_every_table_is_there_with_every_figure() -> None:
    shapes = {name: (len(table.figures), len(table.columns)) for name, table in paper_tables().items()}
    assert shapes == {"2": (18, 8), "3": (18, 8), "4": (3, 3), "5": (18, 13)}
    for table in paper_tables().values():
        rows = [*CLASSES, *MEANS] if table.name != "4" else [*MEANS]
        assert sorted(table.figures) == sorted(rows)
        assert all(15 < value <= 100 for row in table.figures.values() for value in row.values())
    assert paper_table("2").figure("bottle", "Ours") == 97.9
    assert paper_table("3").figure("zipper", "Ours") == 90.3
    assert paper_table("5").figure("toothbrush", "f8") == 60.5
    assert paper_table("4").figure("bottle", "Ours") is None
    assert paper_fps() == {"SAAE": 86, "DFR": 31}


def test_the_printed_means_are_those_of_the_printed_classes_but_for_one_column() -> None:
    odd = set()
    for table in (paper_table(name) for name in "235"):
        for column in table.columns:
            for row, members in MEANS.items():
                mean = sum(table.figures[name][column] for name in members) / len(members)
                # Columns that the paper quotes without a decimal have means without one.
                rounded = 0.51 if all(table.figures[name][column].is_integer() for name in members) else 0.06
                if abs(mean - table.figures[row][column]) > rounded:
                    odd.add((table.name, column, row))
    assert odd == {("5", "f5", "mean of objects"), ("5", "f5", "mean")}


def test_the_same_numbers_in_two_tables_agree() -> None:
    for row in (*CLASSES, *MEANS):
        assert paper_table("5").figure(row, "f1:4") == paper_table("2").figure(row, "Ours")
    for row in MEANS:
        assert paper_table("4").figure(row, "Ours") == paper_table("2").figure(row, "Ours")


def test_a_mean_over_some_classes() -> None:
    table = paper_table("2")
    assert paper_mean(table, "Ours", "mean", CLASSES) == 97.9  # as printed
    assert paper_mean(table, "Ours", "mean of objects", ["bottle", "cable"]) == pytest.approx((97.9 + 96.8) / 2)
    assert paper_mean(paper_table("4"), "Ours", "mean", ["bottle"]) == 97.9  # the classes of Table 2
    assert paper_mean(paper_table("4"), "w/o ViT", "mean", ["bottle"]) is None
    assert paper_mean(paper_table("4"), "w/o ViT", "mean", CLASSES) == 96.5
