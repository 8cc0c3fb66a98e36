"""A result as detections of the package supervision, which its annotators draw."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import supervision

from saae_runtime.result import Result


def result(image_threshold: float = 1.5) -> Result:
    anomaly_map = np.zeros((40, 60), np.float32)
    anomaly_map[5:9, 10:20] = 3
    anomaly_map[30:33, 50:52] = 2
    mask = (anomaly_map > 1) & (image_threshold < 3)
    return Result(3.0, anomaly_map, mask, 1.0, image_threshold)


def test_boxes_masks_and_scores() -> None:
    found = result().detections()
    assert len(found) == 2
    np.testing.assert_array_equal(found.xyxy, [[10, 5, 20, 9], [50, 30, 52, 33]])
    np.testing.assert_array_equal(found.confidence, [3, 2])
    assert list(found.data["class_name"]) == ["defect", "defect"]
    assert list(found.area) == [40, 6]
    np.testing.assert_array_equal(found.mask[0] | found.mask[1], result().mask)
    assert len(found[found.confidence > 2.5]) == 1
    assert len(result().detections(min_area=10)) == 1


def test_annotators_draw_them() -> None:
    frame = np.full((40, 60, 3), 128, np.uint8)
    drawn = supervision.MaskAnnotator().annotate(frame.copy(), result().detections())
    changed = (drawn != frame).any(axis=2)
    np.testing.assert_array_equal(changed, result().mask)


def test_a_clean_frame_has_none() -> None:
    assert result(image_threshold=5.0).detections().is_empty()


def test_without_the_package_it_says_what_to_install(repo_root: Path) -> None:
    code = """
import sys
sys.modules["supervision"] = None
import numpy as np
from saae_runtime import Result, SaaeError
try:
    Result(1.0, np.zeros((2, 2), np.float32), np.zeros((2, 2), bool), 1.0, 1.0).detections()
except SaaeError as error:
    print(error.cure)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "pip install supervision"
