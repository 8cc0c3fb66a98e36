"""The line.toml that `saae-line init` writes: it runs as it is, and explains every key."""

from __future__ import annotations

import json

__all__ = ["example"]

_TEXT = """\
# A line for `saae-line run`. Relative paths are relative to this file. `saae-line check` opens everything it names.

[line]
name = {name}             # in topics and metrics
spool = "spool"           # folder where records wait for their sinks; survives kills and restarts
spool_mb = 1000           # beyond, the oldest records that a sink has not taken are given up for it, and counted
sync_seconds = 1.0        # a power cut loses no more than that; 0: each record is on the disk before the next part

# One for each camera. Several stations share one engine for each bundle.
[[station]]
name = "station-1"
camera = {camera}
# camera = "watch:FOLDER" # pictures that come into a folder; "camera:0" a webcam; a video file
# camera_options = {{ interval = 0.5, repeat = true }}   # plays files as if they came from a line
trigger = "free"          # each frame is a part
recipes = ["recipe-1"]    # the first one is in force at the start
queue = "block"           # or "drop-oldest": frames that come faster than verdicts are counted and thrown away
queue_size = 8
verdict_timeout = 2.0     # seconds; without a verdict by then the part is NG

# A bundle with thresholds and masks.
[[recipe]]
name = "recipe-1"
bundle = {bundle}
# false_alarms = 0.01     # acceptable share of good parts called NG; default: the bundle's
# threshold = 1.23        # or the image threshold itself
# roi = [[[10, 10], [500, 10], [500, 500], [10, 500]]]   # polygons in pixels, or "mask.png": only there is judged
# ignore = "ignore.png"   # white pixels do not count
# part_ids = ["A-*"]      # parts that are judged by this recipe, by their id

# Where the record of each part goes: any number of sinks, each at its own pace.
[[sink]]
kind = "jsonl"            # one JSON object a line
path = "records.jsonl"
rotate = "day"
keep = 90

[[sink]]
kind = "sqlite"           # tables `parts` and `events`
path = "records.sqlite"

# [[sink]]
# kind = "csv"
# path = "records.csv"

# [[sink]]
# kind = "mqtt"           # TOPIC/STATION/parts, QoS 1; TOPIC/status says online or offline
# host = "broker.example"
# username = "line"
# password_env = "MQTT_PASSWORD"

# [[sink]]
# kind = "webhook"        # a POST for each part
# url = "https://mes.example/parts"
# token_env = "MES_TOKEN"
# only_ng = true

# Pictures; the oldest OK ones go first when there is too little room.
[archive]
folder = "pictures"
ok_share = 0.01           # of OK parts so many keep their picture; NG parts all do
ok_days = 7
ng_days = 90
max_gb = 20
min_free_gb = 1

[health]
drift_window = 200        # so many scores together are compared with the bundle's good parts
drift_false_alarms = 0.001
drift_defects = 0.02      # share of parts that are usually NG
"""


def example(bundle: str, camera: str, name: str = "line-1") -> str:
    """The text of the file.

    Args:
        bundle: its folder, as it is written.
        camera: what the station looks at.
        name: of the line.
    """
    # A JSON string of these is a TOML string.
    return _TEXT.format(bundle=json.dumps(bundle), camera=json.dumps(camera), name=json.dumps(name))
