"""Reading volumes as SimpleITK does; bad volumes get one line each."""

import gzip
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

import preprocess_ct
from tests.helpers import SHAPE, SPACING, refused, toy_case, write_volume
from utils.data import volumes
from utils.data.slices import open_dataset, read_image, read_instances

HU, LABELS = toy_case(1)


def image_of(volumes: Path) -> Path:
    return volumes / "images" / "toy_1_0000.nii.gz"


def label_of(volumes: Path) -> Path:
    return volumes / "labels" / "toy_1.nii.gz"


def image(array: np.ndarray, **geometry) -> Callable[[Path], None]:
    return lambda volumes: write_volume(image_of(volumes), array, **geometry)


def label(array: np.ndarray, **geometry) -> Callable[[Path], None]:
    return lambda volumes: write_volume(label_of(volumes), array, **geometry)


def stored(content: bytes, of: Callable[[Path], Path] = image_of) -> Callable[[Path], None]:
    return lambda volumes: of(volumes).write_bytes(content)


def header(
    field: str, value: object, index: object = ..., of: Callable[[Path], Path] = image_of
) -> Callable[[Path], None]:
    """Change a field of a header to what SimpleITK would not write."""
    return lambda volumes: edit_header(of(volumes), {field: (index, value)})


def edit_header(path: Path, fields: dict[str, tuple[object, object]]) -> None:
    content = gzip.decompress(path.read_bytes())
    changed = nibabel.Nifti1Header(content[:348], check=False)
    for field, (index, value) in fields.items():
        changed[field][index] = value
    path.write_bytes(gzip.compress(changed.binaryblock + content[348:]))


def bytes_changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda volumes: image_of(volumes).write_bytes(change(image_of(volumes).read_bytes()))


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda volumes: [change(volumes) for change in changes]


def with_voxel(value: float) -> np.ndarray:
    array = HU.astype(np.float32)
    array[1, 3, 4] = value
    return array


def turned(volumes: Path) -> None:
    labels = sitk.GetImageFromArray(LABELS)
    labels.CopyInformation(sitk.ReadImage(str(image_of(volumes))))
    labels.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(labels, str(label_of(volumes)))


def four_dimensional(volumes: Path) -> None:
    volume = sitk.GetImageFromArray(HU)
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(image_of(volumes)))


def flat(volumes: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(HU[0]), str(image_of(volumes)))


def coloured(volumes: Path) -> None:
    rgb = np.zeros((*SHAPE, 3), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(rgb, isVector=True), str(image_of(volumes)))


def endless(volumes: Path) -> None:
    """A small file that fills a memory: all of it after the last voxel."""
    content = gzip.decompress(image_of(volumes).read_bytes()) + bytes(1 << 25)
    image_of(volumes).write_bytes(gzip.compress(content))


# --- What is refused -----------------------------------------------------------------------------
IMAGE, LABEL = "toy_1_0000.nii.gz: ", "toy_1.nii.gz: "
OFF_GRID, NOT_3D = LABEL + "lies up to {} mm off", IMAGE + "expected one 3D volume of one number"
IDS, NOT_FINITE = LABEL + "label ids must be ", "{} voxels are NaN or infinite"
CUT, NO_NIFTI = IMAGE + "damaged or cut short", IMAGE + "cannot be read as NIfTI"
SCALE, ORIENTATION = (IMAGE + "damaged header: " + word for word in ("scale", "orientation"))
NO_QFORM = several(header("qform_code", 0), header("sform_code", 1))
HUGE = several(*(header("dim", 1000, slice(1, 4), of=f) for f in (image_of, label_of)))
SOME_NAN = np.where(LABELS == 2, np.nan, LABELS)
NRRD = gzip.compress(b"NRRD0004\ntype: short\n" * 99)
BAD = {
    "no label": (lambda v: label_of(v).unlink(), IMAGE + "image without a label"),
    "no image": (lambda v: image_of(v).unlink(), LABEL + "label without an image"),
    "shape": (label(LABELS[:, :-1]), LABEL + "shape (96, 79, 3) differs from the image's"),
    "spacing": (label(LABELS, spacing=(5.0, 2.0, 2.5)), OFF_GRID.format(85.5)),
    "origin": (label(LABELS, origin=(-96.0, -79.0, 10.0)), OFF_GRID.format(1)),
    "direction": (turned, OFF_GRID.format(158)),
    "label ids are fractions": (label(LABELS * np.float32(0.5)), IDS + "whole numbers"),
    "label ids below 0": (label(-LABELS.astype(np.int16)), IDS + "0 to 255, found -2 to 0"),
    "label ids above 255": (label(LABELS * np.int32(200)), IDS + "0 to 255, found 0 to 400"),
    "label ids are NaN": (label(SOME_NAN), LABEL + NOT_FINITE.format((LABELS == 2).sum())),
    "NaN": (image(with_voxel(np.nan)), IMAGE + NOT_FINITE.format(1)),
    "infinite": (image(with_voxel(-np.inf)), IMAGE + NOT_FINITE.format(1)),
    "constant": (image(HU * 0 + 40), IMAGE + "every voxel is 40; is this a CT image?"),
    "not in HU": (image(HU.clip(0, 200) + np.int16(2000)), IMAGE + "its values, 2000 to "),
    "2D": (flat, NOT_3D),
    "4D": (four_dimensional, NOT_3D + " per voxel, found 96 x 80"),
    "RGB": (coloured, NOT_3D),
    "RGB by its type": (header("datatype", 128), NOT_3D),
    "unknown type": (header("datatype", -7), NOT_3D),
    "spacing 0": (header("pixdim", 0, 1), IMAGE + "spacing must be 0.001 to 1000 mm, found 0 x"),
    "spacing negative": (header("pixdim", -2, 2), "found 1.6 x -2 x 5; correct its header"),
    "spacing NaN": (header("pixdim", np.nan, 1), IMAGE + "spacing must be"),
    "other angles": (several(NO_QFORM, header("srow_x", 0.8, 1)), IMAGE + "its axes are not at"),
    "s-form NaN": (several(NO_QFORM, header("srow_y", np.nan)), ORIENTATION),
    "q-form NaN": (several(header("sform_code", 0), header("quatern_b", np.nan)), ORIENTATION),
    "scale NaN": (header("scl_slope", np.nan), SCALE),
    "scale infinite": (header("scl_inter", np.inf), SCALE),
    "dimension 0": (header("dim", 0, 3), IMAGE + "damaged header: dimensions"),
    "more voxels than bytes": (HUGE, LABEL + "damaged or cut short"),
    "offset far away": (header("vox_offset", 1e30), SCALE + " or offset"),
    "cut short": (bytes_changed(lambda b: b[:5000]), CUT),
    "cut short in the header": (bytes_changed(lambda b: b[:100]), CUT),
    "cut short, not compressed": (bytes_changed(lambda b: gzip.decompress(b)[:-1]), CUT),
    "bit flipped": (bytes_changed(lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]), CUT),
    "much more than its voxels": (endless, CUT),
    "0 bytes": (stored(b"", label_of), LABEL + "cannot be read as NIfTI"),
    "a web page": (stored(b"<html>404</html>"), NO_NIFTI),
    "a picture": (stored(b"\x89PNG\r\n\x1a\n" + bytes(500)), NO_NIFTI),
    "another format, compressed": (stored(NRRD), NO_NIFTI),
    "NIfTI-2": (stored((540).to_bytes(4, "little") + bytes(600)), NO_NIFTI + "-1"),
    "two files of one case": (
        lambda v: shutil.copy(image_of(v), v / "images" / "toy_1.nii.gz"),
        IMAGE + "a second file for case toy_1 beside toy_1.nii.gz",
    ),
    "names that differ in case": (
        lambda v: shutil.copy(label_of(v), v / "labels" / "TOY_1.nii.gz"),
        LABEL + "a second file for case toy_1 beside TOY_1.nii.gz",
    ),
    "one image under two names": (
        lambda v: shutil.copy(v / "images" / "toy_0_0000.nii.gz", image_of(v)),
        IMAGE + "the same image as toy_0_0000.nii.gz; remove one",
    ),
    "a name that Windows cannot have": (
        lambda v: image_of(v).rename(v / "images" / "C:toy_0000.nii.gz"),
        "C:toy_0000.nii.gz: this name is not UTF-8, or holds a colon",
    ),
    "a name with a line break": (
        lambda v: image_of(v).rename(v / "images" / "toy\n1_0000.nii.gz"),
        "or what cannot be printed; rename the file",
    ),
    "a name that is not UTF-8": (
        lambda v: os.rename(image_of(v), os.fsencode(v / "images") + b"/caf\xe9_0000.nii.gz"),
        "this name is not UTF-8",
    ),
}
NEVER_SKIPPED = [  # since it is not known which file, or which case, is meant
    kind for kind, (_, line) in BAD.items() if "a second file" in line or kind.startswith("a name")
]
if sys.platform != "linux":
    del BAD["names that differ in case"], BAD["a name that is not UTF-8"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_case_is_named_in_one_line_and_skipped_on_request(
    fails, toy_volumes, tmp_path, capfd, tally, kind
):
    damage, expected = BAD[kind]
    damage(toy_volumes)
    assert expected in refused(fails, toy_volumes, tmp_path / "out")
    tally("bad volumes tried")
    if kind in NEVER_SKIPPED:
        return
    capfd.readouterr()
    meta = run_on(toy_volumes, tmp_path / "out", "--skip-bad")
    assert set(meta) == {"toy_0", "toy_2", "toy_3"}
    shown = capfd.readouterr()
    assert "skipped: " in shown.out and expected in shown.out
    assert "left out 1 bad" in shown.out
    assert "WARNING" not in shown.err and "ITK" not in shown.err  # the library is silent


def run_on(volumes: Path, out: Path, *more: str) -> dict:
    """The slices of the data set that is made of some volumes, by case."""
    where = ("--images", volumes / "images", "--labels", volumes / "labels", "--out", out)
    preprocess_ct.main([*map(str, where), "--workers", "1", *more])
    found: dict[str, list] = {}
    for entry in open_dataset(out).split("all"):
        found.setdefault(entry.case, []).append(entry)
    return found


def write_case(folder: Path, hu: np.ndarray = HU, labels: np.ndarray = LABELS) -> None:
    write_volume(folder / "images" / "a_0000.nii.gz", hu)
    write_volume(folder / "labels" / "a.nii.gz", labels)


def slices_of(tmp_path: Path, hu: np.ndarray = HU, labels: np.ndarray = LABELS) -> list:
    """The slices of one case with these arrays."""
    write_case(tmp_path, hu, labels)
    return run_on(tmp_path, tmp_path / "out", "--split", "0,0,1")["a"]


def run_code(code: str, *argv: object) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_all_bad_cases_are_named_at_once(fails, toy_volumes, tmp_path):
    (toy_volumes / "labels" / "toy_0.nii.gz").unlink()
    BAD["shape"][0](toy_volumes)
    message = refused(fails, toy_volumes, tmp_path / "out")
    assert "toy_0_0000.nii.gz: image without" in message and "toy_1.nii.gz: shape" in message


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_no_permission_to_read(what):
    """By a process without root's rights, to whom nothing is forbidden."""
    code = (
        "import gettext, locale, os, sys, tqdm, preprocess_ct\n"  # may be closed to others, too
        "from utils.data import volumes\nfrom utils.system import command_line as cli\n"
        "preprocess_ct.parse_args(sys.argv[1:])\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "cli.run(lambda: preprocess_ct.main(sys.argv[1:]))"
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        volumes = Path(folder)
        volumes.chmod(0o755)
        write_case(volumes)
        closed = volumes / "images" / ("a_0000.nii.gz" if what == "file" else "")
        closed.chmod(0)
        where = ("--images", volumes / "images", "--labels", volumes / "labels")
        done = run_code(code, *where, "--out", "/tmp/nowhere")
        closed.chmod(0o755)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"{closed}: " in done.stderr and "Permission denied" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_volume_that_finds_no_memory_is_not_called_damaged(tmp_path):
    """A good one of 128 MiB, in a process that may hold little more than it does."""
    write_volume(tmp_path / "a.nii.gz", np.tile(np.arange(256, dtype=np.int16), (128, 512, 4)))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from utils.data import volumes\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "limit = pages * resource.getpagesize() + (100 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: volumes.read_image(Path(sys.argv[1]))\n"
        "except MemoryError: print('no memory')"
    )
    done = run_code(code, tmp_path / "a.nii.gz")
    assert done.stdout == "no memory\n", done.stderr


# --- As SimpleITK reads --------------------------------------------------------------------------
def assert_as_simpleitk(path: Path) -> None:
    """Compare voxels bit by bit, and geometry, with SimpleITK's reader and reorientation."""
    stored = sitk.ReadImage(str(path), sitk.sitkFloat32, "NiftiImageIO")
    expected, volume = sitk.DICOMOrient(stored, "LPS"), volumes.read_image(path)
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, sitk.GetArrayFromImage(expected))
    assert volume.spacing_mm == expected.GetSpacing()[::-1]
    assert volume.origin_mm == pytest.approx(expected.GetOrigin(), abs=1e-3)
    assert volume.direction == pytest.approx(expected.GetDirection(), abs=1e-5)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(stored.GetDirection())
    assert volume.stored_orientation == code


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_every_orientation(tmp_path, dtype):
    """All 48 orders and signs of the axes."""
    letters = ("LR", "PA", "IS")
    for order in itertools.permutations(letters):
        for name in map("".join, itertools.product(*order)):
            write_volume(tmp_path / f"{name}.nii.gz", HU.clip(0).astype(dtype), orientation=name)
            assert_as_simpleitk(tmp_path / f"{name}.nii.gz")
            assert volumes.read_image(tmp_path / f"{name}.nii.gz").stored_orientation == name


def test_oblique_axes(tmp_path):
    for number, turn in enumerate(Rotation.random(25, random_state=0).as_matrix()):
        image = sitk.GetImageFromArray(HU)
        image.SetSpacing((0.7, 1.3, 2.9))
        image.SetOrigin((-31.5, 120.25, 7.125))
        image.SetDirection((turn * [1, 1, (-1) ** number]).ravel())
        sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
        assert_as_simpleitk(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("qfac", [1, -1, 0])
def test_which_of_two_orientations_counts(tmp_path, qfac):
    """The two forms of one file turn it by different angles, or the s-form is skewed."""
    path = tmp_path / "a.nii.gz"
    turn = Rotation.from_euler("z", 0.3).as_matrix() * [1.6, 2.0, 5.0]
    skewed = turn + [[0, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    both = itertools.product((turn, skewed), range(5), range(5))
    for axes, qform, sform in ((a, q, s) for a, q, s in both if q or a is turn):
        write_volume(path, HU)
        rows = {f"srow_{x}": (slice(3), row) for x, row in zip("xyz", axes, strict=True)}
        codes = {"qform_code": (..., qform), "sform_code": (..., sform), "pixdim": (0, qfac)}
        edit_header(path, rows | codes | {"quatern_d": (..., 0.1), "qoffset_x": (..., 4.5)})
        assert_as_simpleitk(path)


@pytest.mark.parametrize("scale", [(2, 0), (1, -1024), (0.1, -3.3), (0, 5), (1e-20, 3), (-1, 0)])
def test_slope_and_intercept(tmp_path, scale):
    path = tmp_path / "a.nii.gz"
    write_volume(path, HU)
    edit_header(path, {"scl_slope": (..., scale[0]), "scl_inter": (..., scale[1])})
    assert_as_simpleitk(path)


def test_big_endian_and_several_gzip_members(tmp_path):
    """As other programs write: bytes swapped, or blocks compressed one by one as bgzip does."""
    path = tmp_path / "a.nii.gz"
    write_volume(path, HU)
    expected = volumes.read_image(path)
    little = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(little[:9000]) + gzip.compress(little[9000:]))
    assert np.array_equal(volumes.read_image(path).array, expected.array)
    swapped = nibabel.Nifti1Header(little[:348]).as_byteswapped(">")
    path.write_bytes(swapped.binaryblock + little[348:352] + HU.astype(">i2").tobytes())
    assert np.array_equal(volumes.read_image(path).array, expected.array)
    assert volumes.read_image(path).origin_mm == expected.origin_mm
    assert_as_simpleitk(path.rename(tmp_path / "a.nii"))


# --- Unusual, and right --------------------------------------------------------------------------
def test_volume_of_one_slice(tmp_path):
    (entry,) = slices_of(tmp_path, HU[1:2], LABELS[1:2])
    assert entry.index == 0 and set(entry.labels) == {1, 2}
    label_map = read_instances(entry)[0]
    assert (entry.frame.labels_to_native(label_map) == LABELS[1]).all()


def test_mask_of_one_pixel(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 40, 30] = 7
    (entry,) = slices_of(tmp_path, labels=labels)
    label_map, found, boxes = read_instances(entry)
    assert entry.labels == {7: 1} and found.tolist() == [7]
    height, width = entry.frame.content[0] / SHAPE[1], entry.frame.content[1] / SHAPE[2]
    edges = [30 * width, 40 * height, 31 * width - 1, 41 * height - 1]
    assert np.abs(boxes[0] - edges).max() <= 1


def test_volume_that_lies_oblique(tmp_path):
    """Turned by 10 degrees about z: the same slices, and the direction is kept."""
    straight = slices_of(tmp_path / "straight")
    direction = Rotation.from_euler("z", 10, degrees=True).as_matrix().ravel()
    for name in ("images/a_0000.nii.gz", "labels/a.nii.gz"):
        volume = sitk.ReadImage(str(tmp_path / "straight" / name))
        volume.SetDirection(direction)
        (tmp_path / "oblique" / name).parent.mkdir(parents=True)
        sitk.WriteImage(volume, str(tmp_path / "oblique" / name))
    out = tmp_path / "oblique" / "out"
    oblique = run_on(tmp_path / "oblique", out, "--split", "0,0,1")["a"]
    for one, other in zip(straight, oblique, strict=True):
        assert one.image_sha256 == other.image_sha256 and one.label_sha256 == other.label_sha256
    found = open_dataset(out).geometry["a"]
    assert found.direction == pytest.approx(direction, abs=1e-6)
    assert found.spacing_mm == pytest.approx(SPACING)


def test_values_beyond_int16_are_clipped_by_the_window(tmp_path):
    hu = HU.astype(np.float64)
    hu[1, :20], hu[1, 20:40], hu[1, 40:60] = 1e6, -1e300, 40
    grey = read_image(slices_of(tmp_path, hu)[0].image_path)
    assert grey[100, 500] == 255 and grey[400, 500] == 0 and grey[640, 500] == 128


def test_one_time_point_is_a_volume(toy_volumes, tmp_path):
    header("dim", [4, 96, 80, 3, 1], slice(5))(toy_volumes)
    assert len(run_on(toy_volumes, tmp_path / "out")["toy_1"]) == 2


def test_case_without_a_label_is_left_out_and_named(toy_volumes, tmp_path, capsys):
    write_volume(label_of(toy_volumes), LABELS * 0)
    assert set(run_on(toy_volumes, tmp_path / "out")) == {"toy_0", "toy_2", "toy_3"}
    assert "toy_1.nii.gz: holds no label; the case is not used" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["a b", "-x", "Ærø 患者", "a.b_0000", "'$HOME'"])
def test_unusual_names_of_cases(toy_volumes, tmp_path, case):
    image_of(toy_volumes).rename(toy_volumes / "images" / f"{case}_0000.nii.gz")
    label_of(toy_volumes).rename(toy_volumes / "labels" / f"{case}.nii.gz")
    found = run_on(toy_volumes, tmp_path / "out")
    assert [len(read_instances(entry)[1]) for entry in found[case]] == [2, 2]
