"""Pin what a line PC runs: every package with version and hash, and the same as a bill of materials (CycloneDX).

    python deploy/lock.py --wheel dist/saae-0.1.0-py3-none-any.whl --extras cpu,line --into dist

Run it with the line's Python version on the line's kind of machine, because wheels differ by both. It installs nothing.
It writes requirements-line.txt and sbom-line.json into a folder, and copies the wheel there. On the line PC, in that
folder:

    pip install --require-hashes -r requirements-line.txt

pip then installs exactly these files or stops. For a PC without a network, `pip download --require-hashes -r
requirements-line.txt -d .` downloads them first, and `pip install --no-index --find-links . ...` installs them there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

REQUIREMENTS, SBOM = "requirements-line.txt", "sbom-line.json"


def resolve(wheel: Path, extras: Sequence[str]) -> list[dict[str, Any]]:
    """What pip would install into an empty environment: entries of its report, saae's own first, then by name."""
    named = f"saae[{','.join(extras)}]" if extras else "saae"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["install", "--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet"]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words, "--report", str(report)]
        done = subprocess.run([*command, f"{named} @ {wheel.resolve().as_uri()}"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"pip found no set of packages for {named}:\n{done.stderr.strip()}")
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["install"]
    return sorted(found, key=lambda item: (item["metadata"]["name"] != "saae", item["metadata"]["name"].lower()))


def sha256_of(item: Mapping[str, Any]) -> str:
    """The hash of a package's file."""
    found = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
    if not found:
        raise SystemExit(f"pip gives no sha256 for {item['metadata']['name']}; use a newer pip")
    return str(found)


def requirements(items: Sequence[Mapping[str, Any]], wheel: Path) -> str:
    """The text of requirements-line.txt."""
    here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    lines = [
        f"# Made by deploy/lock.py with {here}.",
        f"# pip install --require-hashes -r {REQUIREMENTS}",
    ]
    for item in items:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        place = f"./{wheel.name}" if name == "saae" else f"{name}=={version}"
        lines.append(f"{place} \\\n    --hash=sha256:{sha256_of(item)}")
    return "\n".join(lines) + "\n"


def bill_of_materials(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same in CycloneDX 1.5; it depends on nothing but what is installed."""
    components = []
    for item in items:
        metadata = item["metadata"]
        name, version = metadata["name"], metadata["version"]
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": f"{name}=={version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{quote(name.lower().replace('_', '-'))}@{quote(version)}",
            "hashes": [{"alg": "SHA-256", "content": sha256_of(item)}],
        }
        words = metadata.get("license_expression")
        if words:
            component["licenses"] = [{"expression": words}]
        elif metadata.get("license") and len(metadata["license"]) < 100:
            component["licenses"] = [{"license": {"name": metadata["license"]}}]
        components.append(component)
    main, *others = components
    digest = hashlib.sha256(json.dumps(components, sort_keys=True).encode()).digest()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {"component": main | {"type": "application"}},
        "components": others,
    }


def main() -> None:
    """Write both files, and the wheel, into a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True, help="saae's wheel, from python -m build")
    parser.add_argument("--extras", default="cpu", help="with commas; default: cpu")
    parser.add_argument("--into", type=Path, default=Path("dist"), help="folder to write to; default: dist")
    chosen = parser.parse_args()
    if not chosen.wheel.is_file():
        raise SystemExit(f"{chosen.wheel} is not there; python -m build makes it")
    items = resolve(chosen.wheel, [part for part in chosen.extras.split(",") if part])
    chosen.into.mkdir(parents=True, exist_ok=True)
    target = chosen.into / chosen.wheel.name
    if target.resolve() != chosen.wheel.resolve():
        shutil.copyfile(chosen.wheel, target)
    (chosen.into / REQUIREMENTS).write_text(requirements(items, chosen.wheel), encoding="utf-8")
    bill = json.dumps(bill_of_materials(items), indent=2)
    (chosen.into / SBOM).write_text(bill + "\n", encoding="utf-8")
    print(f"{len(items)} packages pinned in {chosen.into / REQUIREMENTS}; listed in {chosen.into / SBOM}")


if __name__ == "__main__":
    main()
