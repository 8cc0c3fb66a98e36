"""The line.toml that `saae-line init` writes, with comments on the usual keys."""

from __future__ import annotations

import json

__all__ = ["example"]

_TEXT = """\
# A line for `saae-line run`. Relative paths are relative to this file. `saae-line check` tests it.

[line]
name = {name}             # in topics and metrics
spool = "spool"           # folder where records wait for their sinks; survives kills and restarts
spool_mb = 1000           # above it, the oldest records that a sink has not taken are discarded for it and counted
sync_seconds = 1.0        # a power loss costs at most this much; 0: each record is on the disk before the next part

# One for each camera. Several stations share one engine for each bundle.
[[station]]
name = "station-1"
camera = {camera}
# camera = "watch:FOLDER" # images that arrive in a folder; "camera:0" a webcam; a video file
# camera_options = {{ interval = 0.5, repeat = true }}   # replays files at the pace of a line
trigger = "free"          # each frame is a part
recipes = ["recipe-1"]    # the first one is active at the start
queue = "block"           # or "drop-oldest": drop and count frames that arrive faster than verdicts
queue_size = 8
verdict_timeout = 2.0     # seconds; a part without a verdict by then is NG

# A bundle with thresholds and masks.
[[recipe]]
name = "recipe-1"
bundle = {bundle}
# false_alarms = 0.01     # acceptable share of good parts called NG; default: the bundle's
# threshold = 1.23        # or the image threshold itself
# roi = [[[10, 10], [500, 10], [500, 500], [10, 500]]]   # polygons in pixels, or "mask.png": judge this area only
# ignore = "ignore.png"   # ignore white pixels
# part_ids = ["A-*"]      # use this recipe for parts with such ids

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

# Images of parts. When space runs out, the oldest OK images are deleted first.
[archive]
folder = "pictures"
ok_share = 0.01           # share of OK parts whose image is kept; all NG images are kept
ok_days = 7
ng_days = 90
max_gb = 20
min_free_gb = 1

[health]
drift_window = 200        # number of latest scores that are compared with the bundle's calibration
drift_false_alarms = 0.001
drift_defects = 0.02      # share of parts that is usually NG

# The page and the HTTP service: http://127.0.0.1:8484/. Needs saae[serve].
# [http]
# port = 8484
# shifts = ["06:00", "14:00", "22:00"]
# host = "0.0.0.0"        # accepts other machines; requires users
# [[http.user]]
# name = "olga"
# role = "operator"       # overrides verdicts, switches recipes; "engineer" also changes thresholds and bundles
# token_env = "LINE_TOKEN_OLGA"
"""


def example(bundle: str, camera: str, name: str = "line-1") -> str:
    """The text of the file.

    Args:
        bundle: the bundle's folder, as written into the file.
        camera: the station's camera.
        name: the line's name.
    """
    # a JSON string is a TOML string
    return _TEXT.format(bundle=json.dumps(bundle), camera=json.dumps(camera), name=json.dumps(name))
