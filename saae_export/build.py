"""`saae-export build`: the whole road from a folder of good pictures to a verified bundle, in named stages.

Every stage writes whole files or none, so the command can be stopped at any moment and given again: drawn images,
features, a half-done fit and the finished model are reused, and the bundle that was there before stays until the new
one is complete.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from saae_runtime.bundle import Bundle, is_bundle, write_bundle
from saae_runtime.engine import Engine
from saae_runtime.errors import BackendError, ConfigError, SaaeError
from saae_runtime.files import canonical_json, sha256_bytes, sha256_file
from saae_runtime.manifest import Calibration, Manifest, Thresholds
from saae_runtime.stages import Stages
from saae_runtime.version import saae_version
from saae_train.backbone import build_backbone, choose_layers
from saae_train.calibrate import OBJECT_FPR, TEXTURE_FPR, calibrate
from saae_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from saae_train.data import MIN_HELD_OUT, Category, Sample, content_digest, content_hashes, split_held_out
from saae_train.evaluate import Evaluation, evaluate
from saae_train.fit import Reporter, fit
from saae_train.presets import TEXTURES, FitConfig, preset
from saae_train.validate import check
from saae_train.weights import PACKAGED_NAME, packaged_path

from .build_int8 import Int8Images, add_int8
from .build_report import Findings, examples, manifest_metrics, report_data, write_heatmaps
from .engines import build_engine
from .int8 import require_frames
from .latency import measure
from .parity import ParityReport, parity_table, require
from .reference import ReferenceFrame, write_reference
from .report import write_report
from .report_data import Example, LatencyRow
from .sources import Request, find_images, shared_size
from .staging import (
    CPU,
    artefact_parity,
    bf16_missing,
    describe,
    export_graphs,
    named_frames,
    onnx_artefact,
    open_artefact,
    parse_frame_size,
    provisional_bundle,
    with_thresholds,
    without_artefact,
)
from .torch_reference import TorchReference
from .verify import engine_scorer

__all__ = ["BuildOptions", "BuildResult", "build"]

_STAGES = 10
_AUTO_LIBRARIES = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class BuildOptions:
    """What a build is asked for.

    Attributes:
        request: where the images are.
        out: the bundle's folder; None: bundles/<category>.
        work: where fitted models and drawn images are kept between runs.
        config: how to fit.
        checkpoint: a fitted model to take instead of fitting one.
        refit: fit again even where a model of the same images and configuration is there.
        weights: backbone weights, see `saae_train.weights.load_state_dict`.
        texture: whether the product is a texture (MLP size, default pixel FPR); None: what the given checkpoint was
            fitted as, or by its name.
        device: torch device for fitting.
        frame_size: `auto`, `model` or HEIGHTxWIDTH.
        precisions: graphs to export, `fp32` first.
        half_weights: store the FP32 graph's large weights in FP16; it computes in FP32 all the same.
        int8: add an INT8 graph, if it passes its quality gate.
        engines: `auto` (for what this machine has), `none`, or libraries (`tensorrt`, `tensorrt-rtx`).
        pixel_fpr: default acceptable pixel FPR; None: the paper's, 0 for textures and 0.001 for objects.
        image_fpr: default acceptable share of normal images called anomalous.
        parity_images: images that every artefact is compared on.
        samples: frames kept in the bundle with PyTorch's answers, for `verify` on other machines; 0 keeps none.
        measure_latency: whether to time the backends.
        cache: feature cache; None: the user's.
    """

    request: Request
    out: Path | None = None
    work: Path = Path("runs")
    config: FitConfig = field(default_factory=lambda: preset("fast"))
    checkpoint: Path | None = None
    refit: bool = False
    weights: str | None = None
    texture: bool | None = None
    device: str | None = None
    frame_size: str = "auto"
    precisions: tuple[str, ...] = ("fp32", "fp16")
    half_weights: bool = False
    int8: bool = False
    engines: tuple[str, ...] = ("auto",)
    pixel_fpr: float | None = None
    image_fpr: float = 0.0
    parity_images: int = 8
    samples: int = 4
    measure_latency: bool = True
    cache: Path | None = None


@dataclass(frozen=True)
class BuildResult:
    """What a build ended with.

    Attributes:
        bundle: written and opened.
        evaluation: on the test set; None where there are no defect images.
        parity: one report per artefact that was compared.
        latency: one row per backend and precision.
        category: the images.
        where: the bundle's folder as it was asked for.
    """

    bundle: Bundle
    evaluation: Evaluation | None
    parity: tuple[ParityReport, ...]
    latency: tuple[LatencyRow, ...]
    category: Category
    where: Path


def build(options: BuildOptions, console: Console) -> BuildResult:
    """Builds a bundle and writes it in one piece at the end.

    Raises:
        SaaeError: of the kind that the failing stage raises; ParityError where an artefact disagrees with PyTorch.
            What was done before is kept for the next run, and an earlier bundle is untouched.
        KeyboardInterrupt: Ctrl-C, likewise.
    """
    stages = Stages(console, _STAGES + options.int8)
    _check_options(options)
    category, source = _find(options, stages)
    target = options.out or Path("bundles") / category.name
    _refuse_foreign(target)
    _validate(category, stages)
    if options.int8:
        fitting, _ = split_held_out(category.train, options.config.held_out, seed=options.config.seed)
        require_frames(len(fitting))
    work = options.work / category.name
    checkpoint, held_out, unseen = _fitted(options, category, work, stages)
    frame_size = parse_frame_size(options.frame_size, shared_size(category.train))
    staged, graphs = work / "staged", work / "onnx"
    try:
        calibration = Calibration(len(held_out), content_digest(held_out), held_out=unseen)
        files, manifest = _exported(options, checkpoint, category, calibration, frame_size, graphs, stages)
        pixel_fpr = _pixel_fpr(options, checkpoint, category)
        bundle, scores = _calibrated(options, manifest, files, held_out, pixel_fpr, staged, stages)
        if options.int8:
            bundle = _quantised(options, bundle, files["fp32"], category, held_out, pixel_fpr, work / "int8", stages)
        bundle = _compiled(options, bundle, stages)
        reference = TorchReference(checkpoint.detector, (bundle.manifest.frame.height, bundle.manifest.frame.width))
        bundle, reports, not_compared = _compared(options, bundle, reference, category, held_out, stages)
        evaluation = _evaluated(bundle, category, stages)
        latency = _timed(options, bundle, held_out, stages)
        with stages.stage("bundle and report") as stage:
            shown, shown_with = _shown(bundle, category, evaluation, held_out)
            findings = Findings(
                held_out_scores=scores,
                evaluation=evaluation,
                parity=reports,
                not_compared=not_compared,
                latency=latency,
                examples=shown,
                fit=checkpoint.facts,
                source=source,
                calibrated_with=CPU,
                shown_with=shown_with,
            )
            kept = named_frames(_mixed(category, held_out, options.samples))
            stored = [reference.stored(name, frame) for name, frame in kept]
            final = _written(target, bundle, reports, findings, stored)
            stage.note(str(target))
    finally:
        for folder in (staged, graphs):
            shutil.rmtree(folder, ignore_errors=True)
    return BuildResult(final, evaluation, tuple(reports), tuple(latency), category, target)


def _check_options(options: BuildOptions) -> None:
    known = ("fp32", "fp16", "bf16")
    wrong = [name for name in options.precisions if name not in known]
    if wrong or not options.precisions:
        raise ConfigError(
            f"A bundle cannot be built as {', '.join(wrong) or 'nothing'}.", "", f"--precision {','.join(known)}"
        )
    if "bf16" in options.precisions:
        why = bf16_missing()
        if why or "fp32" not in options.precisions:
            raise ConfigError(
                "bf16 cannot be calibrated here.",
                why or "It is the FP32 graph, computed in bf16.",
                "pip install 'saae[openvino]' on a processor with bf16, or leave bf16 out" if why else "add fp32",
            )
    if options.int8 and "fp32" not in options.precisions:
        raise ConfigError("INT8 is made from the FP32 graph, which is not built.", "", "add it: --precision fp32")
    if options.half_weights and "fp32" not in options.precisions:
        raise ConfigError("--half-weights is for the FP32 graph, which is not built.", "", "add it: --precision fp32")
    if options.parity_images < 1:
        raise ConfigError("Parity needs at least one image.", "It is the gate of a build.", "--parity-images 8")
    parse_frame_size(options.frame_size, None)


def _refuse_foreign(target: Path) -> None:
    """Says before the work, not after it, that the bundle has no place to go."""
    if target.exists() and not is_bundle(target) and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            f"{target} is there and is not a bundle.",
            "Writing a bundle replaces the whole folder.",
            "choose another folder with --out, or remove this one yourself",
        )


def _find(options: BuildOptions, stages: Stages) -> tuple[Category, str]:
    with stages.stage("find images") as stage:
        category, source = find_images(options.request, options.work / "demo", stage)
        stage.note(f"{category.name}: {len(category.train)} normal, {len(category.test)} for testing, {source}")
    if category.synthetic:
        stages.say(
            "These images are DRAWN, not photographed. Everything below shows that the road works; "
            "its numbers say nothing about a real line.",
            "bold yellow",
        )
    return category, source


def _validate(category: Category, stages: Stages) -> None:
    with stages.stage("check images") as stage:
        report = check(category, progress=stage)
        report.raise_if_bad()
        stage.note(f"{report.images} good" + (f", {len(report.warnings)} warnings" if report.warnings else ""))
    for warning in report.warnings[:5]:
        stages.say(f"  note: {warning}", "yellow")


def _fitted(
    options: BuildOptions, category: Category, work: Path, stages: Stages
) -> tuple[Checkpoint, tuple[Sample, ...], bool]:
    """The fitted model, reused where the same one is there; the images to calibrate on; whether it saw none of them."""
    with stages.stage("fit") as stage:
        if options.checkpoint is not None:
            checkpoint = load_checkpoint(options.checkpoint)
            stage.note(f"taken from {options.checkpoint}")
            return dataclasses.replace(checkpoint, category=category.name), *_unseen(checkpoint, category, stages)
        fitting, held_out = split_held_out(category.train, options.config.held_out, seed=options.config.seed)
        weights = options.weights
        if weights is None and category.synthetic and options.config.backbone == PACKAGED_NAME and packaged_path():
            weights = "packaged"  # the demo needs no network
        folder = work / "models" / _key(options, category, fitting, weights)
        if not options.refit and (folder / "config.json").is_file():
            try:
                checkpoint = load_checkpoint(folder)
                stage.note(f"reused {folder}")
                return checkpoint, held_out, True
            except SaaeError as error:
                stages.say(f"  {error.what} Fitting again.", "yellow")
        layers = options.config.layers or _default_layers(options.config.backbone, stages)
        backbone = build_backbone(options.config.backbone, layers, options.config.input_size, weights)
        stage.note(f"weights: {backbone.weights.source}")
        reporter = Reporter(
            features=lambda done, total: stage(done, total, "images, features"),
            steps=lambda done, total, loss: stage(done, total, f"steps, loss {loss:.4f}"),
            say=lambda text: stages.say(f"  {text}"),
        )
        facts = {"held_out": sorted(sample.path.name for sample in held_out), "synthetic": category.synthetic}
        checkpoint = fit(
            backbone,
            fitting,
            options.config,
            category.name,
            device=options.device,
            cache=options.cache,
            texture=options.texture,
            reporter=reporter,
            facts=facts,
        )
        save_checkpoint(folder, checkpoint)
        stage.note(f"{len(fitting)} images, {len(held_out)} held out")
    return checkpoint, held_out, True


def _default_layers(backbone: str, stages: Stages) -> tuple[int, ...]:
    layers, measured = choose_layers(backbone)
    if not measured:
        listed = ", ".join(map(str, layers))
        stages.say(
            f"  layers {listed}: the middle third, a guess; this backbone was not measured. Choose: --layers", "yellow"
        )
    return layers


def _key(options: BuildOptions, category: Category, fitting: Sequence[Sample], weights: str | None) -> str:
    """Names a fitted model after everything that shaped it."""
    shaped = {
        "saae": saae_version(),
        "config": options.config.to_json(),
        "images": content_digest(fitting),
        "weights": sha256_file(weights) if weights is not None and Path(weights).is_file() else weights,
        "category": category.name,
        "texture": category.name in TEXTURES if options.texture is None else options.texture,
    }
    return sha256_bytes(canonical_json(shaped).encode())[:16]


def _unseen(checkpoint: Checkpoint, category: Category, stages: Stages) -> tuple[tuple[Sample, ...], bool]:
    """Images to calibrate a given model on, and whether it was fitted on none of them; compared by content."""
    config = checkpoint.config
    fitting, held_out = split_held_out(category.train, config.held_out, seed=config.seed)
    if "fitted_on" not in checkpoint.facts:
        if checkpoint.facts.get("digest") == content_digest(fitting):
            return held_out, True
        stages.say(
            "  The model does not say which images it was fitted on: it may have seen some of those it is "
            "calibrated on. The bundle says so, too.",
            "bold yellow",
        )
        return held_out, False
    seen = set(checkpoint.facts["fitted_on"])
    overlap = sum(key in seen for key in content_hashes(held_out))
    if not overlap:
        return held_out, True
    every = zip(content_hashes(category.train), category.train, strict=True)
    new = {key: sample for key, sample in every if key not in seen}
    if len(new) >= MIN_HELD_OUT:
        stages.say(
            f"  These are not just the images that the model was fitted on: calibrating on the {len(new)} that it "
            "has not seen.",
            "yellow",
        )
        return tuple(new[key] for key in sorted(new)), True
    stages.say(
        f"  {overlap} of the {len(held_out)} images to calibrate on were FITTED ON: thresholds come out too low, and "
        "good parts will be called defective. Add normal images that the model has not seen.",
        "bold yellow",
    )
    return held_out, False


def _exported(
    options: BuildOptions,
    checkpoint: Checkpoint,
    category: Category,
    calibration: Calibration,
    frame_size: tuple[int, int] | None,
    graphs: Path,
    stages: Stages,
) -> tuple[dict[str, Path], Manifest]:
    """Graphs in the folder `graphs`, and their manifest with thresholds yet to come."""
    with stages.stage("export ONNX") as stage:
        graphs.mkdir(parents=True, exist_ok=True)
        precisions = [name for name in options.precisions if name != "bf16"]
        files = export_graphs(checkpoint, graphs, frame_size, precisions, stage, options.half_weights)
        manifest = describe(
            checkpoint,
            synthetic=category.synthetic,
            frame_size=frame_size,
            calibration=calibration,
            thresholds={},
        )
        if "fp32" in files and not bf16_missing():  # free: the same file, thresholds of its own
            precisions.append("bf16")
        stage.note(f"{', '.join(precisions)}, frame {manifest.frame.height} x {manifest.frame.width}")
    artefacts = tuple(onnx_artefact(name, options.half_weights) for name in precisions)
    return files, dataclasses.replace(manifest, artefacts=artefacts)


def _pixel_fpr(options: BuildOptions, checkpoint: Checkpoint, category: Category) -> float:
    """The default pixel FPR: the one asked for, or the paper's for what the product is."""
    if options.pixel_fpr is not None:
        return options.pixel_fpr
    texture = options.texture
    if texture is None:
        texture = bool(checkpoint.facts.get("texture", category.name in TEXTURES))
    return TEXTURE_FPR if texture else OBJECT_FPR


def _calibrated(
    options: BuildOptions,
    manifest: Manifest,
    files: dict[str, Path],
    held_out: Sequence[Sample],
    pixel_fpr: float,
    staged: Path,
    stages: Stages,
) -> tuple[Bundle, tuple[float, ...]]:
    """A bundle with thresholds that were calibrated on its very files, and the first precision's image scores."""
    with stages.stage("calibrate") as stage:
        artefacts = manifest.artefacts
        bundle = provisional_bundle(staged, manifest, files)
        tables: dict[str, Thresholds] = {}
        scores: tuple[float, ...] = ()
        for number, artefact in enumerate(artefacts):
            with open_artefact(bundle, artefact) as engine:
                found = calibrate(
                    engine_scorer(engine),
                    held_out,
                    pixel_fpr,
                    options.image_fpr,
                    lambda done, total, number=number: stage(number * total + done, len(artefacts) * total),  # type: ignore[misc]
                )
            tables[artefact.precision] = Thresholds(found.pixel, found.image)
            scores = scores or found.scores
        words = "held-out images" if manifest.calibration.held_out else "images, some FITTED ON"
        stage.note(f"{len(held_out)} {words}, T at pixel FPR {pixel_fpr:g}")
        bundle = with_thresholds(staged, manifest, files, tables)
    return bundle, scores


def _quantised(
    options: BuildOptions,
    bundle: Bundle,
    graph: Path,
    category: Category,
    held_out: Sequence[Sample],
    pixel_fpr: float,
    work: Path,
    stages: Stages,
) -> Bundle:
    """The bundle with INT8 where it passes its gate; what was found is said either way."""
    calibrating = {sample.path for sample in held_out}
    fitting = [sample for sample in category.train if sample.path not in calibrating]
    with stages.stage("INT8") as stage:
        images = Int8Images(fitting, held_out, category, pixel_fpr, options.image_fpr)
        bundle, outcome = add_int8(bundle, graph, images, work, stage)
        stage.note(", ".join(outcome.shipped) or "refused")
    for line in outcome.lines:
        stages.say(f"  {line}", "" if outcome.shipped else "yellow")
    return bundle


def _compiled(options: BuildOptions, bundle: Bundle, stages: Stages) -> Bundle:
    """Engines for what this machine has; what it has not is said, not hidden."""
    with stages.stage("engines") as stage:
        auto = "auto" in options.engines
        libraries = _AUTO_LIBRARIES if auto else tuple(name for name in options.engines if name != "none")
        precision = "fp16" if "fp16" in options.precisions else options.precisions[0]
        built = []
        for library in libraries:
            try:
                result = build_engine(bundle, library=library, precision=precision, console=None)
            except (BackendError, ConfigError) as error:  # ConfigError: a GPU that the library does not build for
                if not auto:
                    raise
                stages.say(f"  no {library} engine: {error.what} {error.why}".rstrip())
                continue
            bundle = result.bundle
            built.append(result.artefact.file)
            if auto:
                break
        stage.note(", ".join(built) or "none; the ONNX graphs run everywhere")
    return bundle


def _compared(
    options: BuildOptions,
    bundle: Bundle,
    reference: TorchReference,
    category: Category,
    held_out: Sequence[Sample],
    stages: Stages,
) -> tuple[Bundle, list[ParityReport], dict[str, str]]:
    """The gate: every artefact that runs here against PyTorch, on normal and defective images.

    bf16 that was not asked for, and INT8, leave the bundle where they disagree; anything else ends the build.
    """
    reports: list[ParityReport] = []
    dropped: list[ParityReport] = []
    not_compared: dict[str, str] = {}
    with stages.stage("parity") as stage:
        frames = named_frames(_mixed(category, held_out, options.parity_images))
        artefacts = bundle.manifest.artefacts
        for number, artefact in enumerate(artefacts):
            stage(number, len(artefacts), artefact.file)
            try:
                report = artefact_parity(bundle, artefact, reference, frames)
                extra = artefact.precision not in options.precisions and artefact.kind == "onnx"
                if extra and not report.passed:
                    bundle = without_artefact(bundle, artefact)
                    dropped.append(report)
                else:
                    reports.append(report)
            except BackendError as error:
                if artefact.kind == "onnx":
                    raise
                not_compared[artefact.file] = error.what
        stage.note(f"{len(frames)} images against PyTorch FP32")
    stages.console.print(parity_table([*reports, *dropped]))
    for report in dropped:
        stages.say(f"  {report.precision} disagrees with PyTorch on these images and is left out.", "yellow")
    require(reports, f"the model is kept in {options.work / category.name}; try --precision fp32")
    return bundle, reports, not_compared


def _mixed(category: Category, held_out: Sequence[Sample], count: int) -> list[Sample]:
    """Half normal, half defective images where there are both, evenly spread."""
    defective = [sample for sample in category.test if sample.is_anomalous]
    bad = _spread(defective, count // 2)
    return [*_spread(held_out, count - len(bad)), *bad]


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    if count >= len(samples):
        return list(samples)
    return [samples[index * len(samples) // count] for index in range(count)]


def _evaluated(bundle: Bundle, category: Category, stages: Stages) -> Evaluation | None:
    with stages.stage("evaluate") as stage:
        if not any(sample.is_anomalous for sample in category.test):
            stage.note("no defect images, so no metrics")
            return None
        with _deployed(bundle) as engine:
            done = [0]

            def score(frame: object) -> object:
                stage(done[0], len(category.test))
                done[0] += 1
                return engine(frame)  # type: ignore[call-overload]

            evaluation = evaluate(score, category, progress=False)  # type: ignore[arg-type]
            stage.note(f"{len(category.test)} test images with {engine.backend.name} {engine.backend.precision}")
    stages.console.print(evaluation.table())
    return evaluation


def _timed(options: BuildOptions, bundle: Bundle, held_out: Sequence[Sample], stages: Stages) -> list[LatencyRow]:
    with stages.stage("latency") as stage:
        if not options.measure_latency:
            stage.note("not measured")
            return []
        frames = [frame for _, frame in named_frames(held_out[:4])]
        rows = []
        for row in measure(bundle, frames, skipped=lambda text: stages.say(f"  not timed: {text}")):
            rows.append(row)
            stage.note(f"{row.backend} {row.precision} {row.median_ms:.0f} ms")
    return rows


def _deployed(bundle: Bundle) -> Engine:
    """The engine as `saae-run` would open it here."""
    return Engine(bundle, verify=False, cache=False)


def _shown(
    bundle: Bundle, category: Category, evaluation: Evaluation | None, held_out: Sequence[Sample]
) -> tuple[list[Example], str]:
    """Examples for the report, and what computed them (the same as the metrics)."""
    with _deployed(bundle) as engine:
        return examples(engine, category, evaluation, held_out), f"{engine.backend.name}: {engine.backend.description}"


def _written(
    target: Path,
    staged: Bundle,
    reports: Sequence[ParityReport],
    findings: Findings,
    stored: Sequence[ReferenceFrame],
) -> Bundle:
    """The final bundle, whole or not at all."""
    parity = {(report.artefact, report.precision): report.summary() for report in reports}
    manifest = dataclasses.replace(
        staged.manifest,
        artefacts=tuple(
            dataclasses.replace(item, parity=parity.get((item.file, item.precision)))
            for item in staged.manifest.artefacts
        ),
        metrics=manifest_metrics(findings.evaluation),
    )

    def fill(folder: Path) -> None:
        for name in staged.manifest.files:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(staged.file(name), place)
        write_reference(folder, stored, "PyTorch FP32")
        write_heatmaps(folder / "heatmaps", findings.examples)
        write_report(folder / "report.html", report_data(manifest, findings, str(target)))

    return write_bundle(target, manifest, fill)
