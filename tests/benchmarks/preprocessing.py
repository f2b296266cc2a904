"""Preprocessing against MedSAM's recipe, in slices per second of one core.

    python -m tests.benchmarks.preprocessing
    python -m tests.benchmarks.preprocessing --images CT/images --labels CT/labels

The recipe is that of MedSAM's pre_CT_MR.py; ours is preprocess_ct.py with all its checks. Both
read the volumes, which are synthetic ones of 512 x 512 without --images. Afterwards ours runs with
two workers, and the memory of one worker is measured for one volume and for all.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from skimage import transform

import preprocess_ct
from tests.benchmarks.common import goal, machine, medians
from tests.helpers import call, write_volume
from utils.data.layouts import Case, Volumes
from utils.data.synthetic import make_patient

WINDOW = (-160.0, 240.0)  # that of --window medsam
RECIPE_SLICES = 3  # two seconds each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of <case>_0000.nii.gz (default: synthetic)")
    parser.add_argument("--labels", help="folder of <case>.nii.gz")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slices", type=int, default=60, help="per synthetic volume")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        images, labels = Path(args.images or root / "images"), Path(args.labels or root / "labels")
        if not args.images:
            write_volumes(root, 2, args.slices)
        pairs, _ = Volumes(images, labels).cases()
        one = root / "one"
        copy_case(pairs[0], one)
        tasks = {
            "ours": partial(run, one / "images", one / "labels", root / "out"),
            "volume": partial(recipe_volume, pairs[0]),
            "slices": partial(recipe_slices, *recipe_volume(pairs[0]), root / "recipe"),
        }
        seconds = medians(tasks, args.repeats)
        slices = len(list((root / "out" / "imgs").iterdir()))
        bytes_ours = size(root / "out" / "imgs") / slices
        bytes_recipe = size(root / "recipe" / "imgs") / RECIPE_SLICES
        print(f"machine: {machine()}; {pairs[0].name}: {slices} labelled slices; one core each")
        each = seconds["ours"] / slices
        theirs = seconds["volume"] / slices + seconds["slices"] / RECIPE_SLICES
        print(f"seconds per slice: ours {each:.4f}, recipe {theirs:.2f}")
        goal("recipe / ours", theirs / each, 60, at_least=True)
        goal("image bytes, recipe / ours", bytes_recipe / bytes_ours, 20, at_least=True)

        everything = {n: partial(run, images, labels, root / "out", n) for n in (1, 2)}
        seconds = medians(everything, min(3, args.repeats))
        faster = seconds[1] / seconds[2]
        print(f"{len(pairs)} volumes, 1 worker / 2 workers: {faster:.3g} times as fast")
        peaks = [peak(one / "images", one / "labels", root), peak(images, labels, root)]
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(pairs[0].images[0]))).size
        print(
            f"peak memory of one worker: {peaks[0]:.2f} GiB for one volume, {peaks[1]:.2f} GiB for "
            f"{len(pairs)}; a volume's voxels in float32 are {voxels * 4 / 2**30:.2f} GiB"
        )


def write_volumes(root: Path, count: int, slices: int) -> None:
    """Synthetic patients of 512 x 512 pixels, by doubling those of 256."""
    for n in range(count):
        patient = make_patient(np.random.default_rng(n), slices)
        spacing = tuple(np.divide(patient.spacing, (1, 2, 2)))
        for array, name in ((patient.hu, f"images/{n}_0000"), (patient.labels, f"labels/{n}")):
            doubled = array.repeat(2, axis=1).repeat(2, axis=2)
            write_volume(root / f"{name}.nii.gz", doubled, spacing)


def copy_case(pair: Case, folder: Path) -> None:
    for path, name in ((pair.images[0], "images"), (pair.labels[0], "labels")):
        (folder / name).mkdir(parents=True)
        shutil.copy(path, folder / name / path.name)


def words(images: Path, labels: Path, out: Path, workers: int) -> list[str]:
    words = ["--images", images, "--labels", labels, "--out", out, "--workers", workers]
    return [*map(str, words), "--window", "medsam"]


def run(images: Path, labels: Path, out: Path, workers: int = 1) -> None:
    shutil.rmtree(out, ignore_errors=True)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with contextlib.redirect_stdout(None):
        call(preprocess_ct, *words(images, labels, out, workers))


def recipe_volume(pair: Case) -> tuple[np.ndarray, np.ndarray]:
    """Image and label map of a case as MedSAM's recipe holds them before the slices."""
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(pair.labels[0]))).astype(np.uint8)
    volume = sitk.GetArrayFromImage(sitk.ReadImage(str(pair.images[0])))
    volume = np.clip(volume, *WINDOW)
    return (volume - volume.min()) / (volume.max() - volume.min()) * 255.0, labels


def recipe_slices(volume: np.ndarray, labels: np.ndarray, out: Path) -> None:
    """The first RECIPE_SLICES labelled slices by MedSAM's recipe."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "imgs").mkdir(parents=True)
    (out / "gts").mkdir()
    for z in np.flatnonzero(labels.any(axis=(1, 2)))[:RECIPE_SLICES]:
        three = np.repeat(np.uint8(volume[z])[:, :, None], 3, axis=-1)
        kept = {"preserve_range": True, "mode": "constant"}
        image = transform.resize(three, (1024, 1024), order=3, anti_aliasing=True, **kept)
        image = (image - image.min()) / np.clip(image.max() - image.min(), 1e-8, None)
        label = transform.resize(labels[z], (1024, 1024), order=0, anti_aliasing=False, **kept)
        np.save(out / "imgs" / f"{z}.npy", image)
        np.save(out / "gts" / f"{z}.npy", label.astype(np.uint8))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def peak(images: Path, labels: Path, root: Path) -> float:
    """Peak memory in GiB of preprocess_ct.py with one worker, which is its own process then."""
    shutil.rmtree(root / "out", ignore_errors=True)
    # Not from the parent's os.wait4: that counts the parent's own pages before exec.
    report = "; print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    code = f"import preprocess_ct as p; p.main(p.parse_options()){report}"
    command = [sys.executable, "-c", code, *words(images, labels, root / "out", 1)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(run.stdout.split()[-1]) / 2**20


if __name__ == "__main__":
    main()
