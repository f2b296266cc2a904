"""Bad volumes get one line each; unusual ones are read right, and written in place."""

import gzip
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from tests.helpers import (
    SHAPE,
    SPACING,
    edit_nifti,
    preprocess,
    refused,
    toy_case,
    write_cases,
    write_volume,
)
from utils.data import volumes
from utils.data.slices import Slice, open_dataset, read_image, read_instances
from utils.prediction.scan import find_scans
from utils.system import UserError

HU, LABELS = toy_case(1)
IMAGE, LABEL = Path("images", "toy_1_0000.nii.gz"), Path("labels", "toy_1.nii.gz")


def written(array: np.ndarray, **geometry) -> Callable[[Path], None]:
    return lambda path: write_volume(path, array, **geometry)


def header(**fields: tuple[object, object]) -> Callable[[Path], None]:
    return lambda path: edit_nifti(path, fields)


def content(change: Callable[[bytes], bytes] | bytes) -> Callable[[Path], None]:
    made = change if callable(change) else lambda _: change
    return lambda path: path.write_bytes(made(path.read_bytes()))


def renamed(name: str | bytes) -> Callable[[Path], None]:
    return lambda path: os.rename(path, os.path.join(os.fsencode(path.parent), os.fsencode(name)))


def copied(name: str, of: str = "") -> Callable[[Path], None]:
    return lambda path: shutil.copy(path.with_name(of or path.name), path.with_name(name))


def turned(path: Path) -> None:
    labels = sitk.ReadImage(str(path))
    labels.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(labels, str(path))


def of_other_dimensions(path: Path) -> None:
    volume = sitk.GetImageFromArray(HU)
    sitk.WriteImage(sitk.JoinSeries([volume, volume]), str(path))


NOT_3D, NO_NIFTI = "expected one 3D volume with one value per voxel", "cannot be read as NIfTI"
CUT, AXES = "damaged or truncated", "its axes are damaged, or not at right angles"
SFORM = {"qform_code": (..., 0), "sform_code": (..., 1)}
BOTH = {"qform_code": (..., 1), "sform_code": (..., 1)}
SOME_NAN = np.where(LABELS == 2, np.nan, LABELS)
BAD = {  # the damaged file, how, and what is said of it
    "no label": (LABEL, Path.unlink, "image without a label"),
    "no image": (IMAGE, Path.unlink, "label without an image"),
    "shape": (LABEL, written(LABELS.repeat(2, 0)), "shape (96, 80, 6) lies up to"),
    "part": (
        LABEL,
        written(LABELS[:, :-1], origin=(-95, -80, 10)),
        "shape (96, 79, 3) lies up to 1 mm off",
    ),
    "spacing": (LABEL, written(LABELS, spacing=(5.0, 2.0, 2.5)), "lies up to 85.5 mm off"),
    "origin": (LABEL, written(LABELS, origin=(-96.0, -79.0, 10.0)), "lies up to 1 mm off"),
    "direction": (LABEL, turned, "lies up to 158 mm off"),
    "label ids are fractions": (LABEL, written(LABELS / 2), "label ids must be whole numbers"),
    "label ids below 0": (LABEL, written(-LABELS.astype(np.int16)), "0 to 255, found -2 to 0"),
    "label ids above 255": (LABEL, written(LABELS * np.int32(200)), "0 to 255, found 0 to 400"),
    "label ids are NaN": (LABEL, written(SOME_NAN), f"{(LABELS == 2).sum()} voxels are NaN"),
    "NaN": (IMAGE, written(SOME_NAN * 99), f"{(LABELS == 2).sum()} voxels are NaN or infinite"),
    "constant": (IMAGE, written(HU * 0 + 40), "every voxel is 40; is this a CT image?"),
    "not in HU": (IMAGE, written(HU.clip(0, 200) + np.int16(2000)), "its values, 2000 to "),
    "scaled to 0..1": (IMAGE, written((HU + 1000) / 2000), "fill under 1% of the window of -360"),
    "a picture": (IMAGE, written((HU > 50).astype(np.uint8) * 200), "those of an 8-bit picture"),
    "a picture in 16 bits": (
        IMAGE,
        written((HU > 50) * np.int16(255)),
        "those of an 8-bit picture",
    ),
    "2D": (IMAGE, header(dim=(0, 2)), NOT_3D),
    "4D": (IMAGE, of_other_dimensions, NOT_3D + ", found 96 x 80"),
    "RGB": (IMAGE, header(datatype=(..., 128)), NOT_3D),
    "spacing 0": (IMAGE, header(pixdim=(1, 0)), "spacing must be 0.001 to 1000 mm, found 0 x"),
    "spacing negative": (IMAGE, header(pixdim=(2, -2)), "found 1.6 x -2 x 5; correct its header"),
    "other angles": (IMAGE, header(**SFORM, srow_x=(1, 0.8)), AXES),
    "other angles behind the q-form": (LABEL, header(**BOTH, srow_x=(2, 0.8)), AXES),
    "s-form NaN": (IMAGE, header(**BOTH, srow_y=(..., np.nan)), AXES),
    "q-form no rotation": (IMAGE, header(**BOTH, quatern_b=(..., 2)), AXES),
    "pixdim is not the s-form's": (
        *(IMAGE, header(**SFORM, pixdim=(slice(1, 4), 1))),
        "not as long (1.6 x 2 x 5 mm) as its spacing (pixdim) says (1 x 1 x 1 mm)",
    ),
    "two places": (IMAGE, header(**BOTH, qoffset_x=(..., 7)), "the same space (code 1) but lie"),
    "cut short": (IMAGE, content(lambda b: b[:5000]), CUT),
    "cut short, not compressed": (IMAGE, content(lambda b: gzip.decompress(b)[:-1]), CUT),
    "bit flipped": (IMAGE, content(lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]), CUT),
    "0 bytes": (LABEL, content(b""), NO_NIFTI),
    "a web page": (IMAGE, content(b"<html>404</html>"), NO_NIFTI),
    "NIfTI-2": (IMAGE, content((540).to_bytes(4, "little") + bytes(600)), NO_NIFTI),
    "two files of one case": (IMAGE, copied("toy_1.nii.gz"), "a second file for case toy_1"),
    "names that differ in case": (LABEL, copied("TOY_1.nii.gz"), "a second file for case toy_1"),
    "one image under two names": (
        *(IMAGE, copied(IMAGE.name, of="toy_0_0000.nii.gz")),
        f"{IMAGE.name}: is the same image as toy_0_0000.nii.gz; remove one",
    ),
    "a name that Windows cannot have": (IMAGE, renamed("C:a.nii"), "C:a.nii: this name is not"),
    "a name with a line break": (IMAGE, renamed("a\n1.nii"), "unprintable characters; rename"),
    "a name that is not UTF-8": (IMAGE, renamed(b"caf\xe9_0000.nii.gz"), "this name is not UTF-8"),
}
NEVER_SKIPPED = [  # since it is not known which file, or which case, is meant
    kind for kind, (*_, line) in BAD.items() if "a second file" in line or kind.startswith("a name")
]
if sys.platform != "linux":
    del BAD["names that differ in case"], BAD["a name that is not UTF-8"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_case_is_named_in_one_line_and_skipped_on_request(
    fails, toy_volumes, tmp_path, capfd, kind
):
    file, damage, expected = BAD[kind]
    damage(toy_volumes / file)
    message = refused(fails, toy_volumes, tmp_path / "out")
    assert expected in message and ".nii" in message
    if kind in NEVER_SKIPPED:
        return
    capfd.readouterr()
    meta = preprocess(toy_volumes, tmp_path / "out", "--skip-bad")
    assert set(meta["cases"]) == {"toy_0", "toy_2", "toy_3"}
    shown = capfd.readouterr()
    assert "skipped: " in shown.out and expected in shown.out
    assert "left out 1 bad" in shown.out
    assert "WARNING" not in shown.err and "ITK" not in shown.err  # the library is silent


def slices_of(folder: Path, hu: np.ndarray, labels: np.ndarray = LABELS) -> list[Slice]:
    write_volume(folder / "images" / "a_0000.nii.gz", hu)
    write_volume(folder / "labels" / "a.nii.gz", labels)
    preprocess(folder, folder / "out", "--split", "0,0,1")
    return open_dataset(folder / "out").split("all")


def test_all_bad_cases_are_named_at_once(fails, toy_volumes, tmp_path):
    (toy_volumes / "labels" / "toy_0.nii.gz").unlink()
    BAD["shape"][1](toy_volumes / LABEL)
    message = refused(fails, toy_volumes, tmp_path / "out")
    assert "toy_0_0000.nii.gz: image without" in message and "toy_1.nii.gz: shape" in message


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
@pytest.mark.parametrize("name", ["images/toy_0_0000.nii.gz", "images"])
def test_no_permission_to_read(fails, name):
    """By a process without root's rights, to whom nothing is forbidden."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o777)
        write_cases(Path(folder), 1)
        closed, user = Path(folder, name), os.geteuid()
        closed.chmod(0)
        try:
            os.seteuid(user or 65534)
            message = refused(fails, Path(folder), Path(folder, "out"))
        finally:
            os.seteuid(user)
            closed.chmod(0o755)
    assert f"{closed}: Permission denied" in message


def test_one_slice_with_a_mask_of_one_pixel(tmp_path):
    labels = np.zeros((1, *SHAPE[1:]), np.uint8)
    labels[0, 40, 30] = 7
    (sample,) = slices_of(tmp_path, HU[1:2], labels)
    label_map, found, boxes = read_instances(sample)
    assert sample.index == 0 and sample.labels == {7: 1} and found.tolist() == [7]
    assert (sample.frame.labels_to_native(label_map) == labels[0]).all()
    height, width = sample.frame.content[0] / SHAPE[1], sample.frame.content[1] / SHAPE[2]
    edges = [30 * width, 40 * height, 31 * width - 1, 41 * height - 1]
    assert np.abs(boxes[0] - edges).max() <= 1


def test_values_beyond_int16_are_clipped_by_the_window(tmp_path):
    hu = HU.astype(np.float64)
    hu[1, :20], hu[1, 20:40], hu[1, 40:60] = 1e6, -1e300, 40
    grey = read_image(slices_of(tmp_path, hu)[0].image_path)
    assert grey[100, 500] == 255 and grey[400, 500] == 0 and grey[640, 500] == 128


def test_one_time_point_no_scale_and_a_twentieth_of_a_voxel(toy_volumes, tmp_path):
    expected = preprocess(toy_volumes, tmp_path / "a")["cases"]["toy_1"]["slices"]
    write_volume(toy_volumes / LABEL, LABELS, origin=(-95.9, -80.0, 10.0))
    fields = {"dim": (slice(5), [4, 96, 80, 3, 1]), "scl_slope": (..., np.nan)}
    edit_nifti(toy_volumes / IMAGE, fields)
    assert preprocess(toy_volumes, tmp_path / "b")["cases"]["toy_1"]["slices"] == expected


def test_label_ids_are_whole_up_to_the_rounding_of_the_file(toy_volumes, tmp_path):
    """As nibabel stores floats in the type of an image's header; fractions are still refused."""
    expected = preprocess(toy_volumes, tmp_path / "a")["cases"]["toy_1"]["slices"]
    source = nibabel.load(toy_volumes / LABEL)
    labels = np.asarray(source.dataobj) * (1 + 1e-7)
    for number, dtype in enumerate((np.int16, np.uint8, np.float32)):
        source.header.set_data_dtype(dtype)
        nibabel.Nifti1Image(labels, None, source.header).to_filename(toy_volumes / LABEL)
        stored = nibabel.load(toy_volumes / LABEL)
        assert dtype == np.float32 or stored.dataobj.slope not in (1, 0)
        made = preprocess(toy_volumes, tmp_path / f"b{number}")
        assert made["cases"]["toy_1"]["slices"] == expected
    edit_nifti(toy_volumes / LABEL, {"scl_slope": (..., 0.4), "scl_inter": (..., 0)})
    with pytest.raises(UserError, match="must be whole numbers"):
        volumes.read_label_map(toy_volumes / LABEL)


@pytest.mark.parametrize("orientation", ["LPS", "RAI"])
def test_cropped_label_map_is_placed(toy_volumes, tmp_path, capsys, orientation):
    """As 3D Slicer saves a segmentation, in its own format or another."""
    expected = preprocess(toy_volumes, tmp_path / "a")["cases"]["toy_1"]["slices"]
    (toy_volumes / LABEL).unlink()
    z, y, x = (slice(np.min(at), np.max(at) + 1) for at in np.nonzero(LABELS))
    origin = np.array([-96.0, -80.0, 10.0]) + np.array([x.start, y.start, z.start]) * SPACING[::-1]
    path = (toy_volumes / LABEL).with_name("toy_1.seg.nrrd")
    write_volume(path, LABELS[z, y, x], origin=origin, orientation=orientation)
    assert preprocess(toy_volumes, tmp_path / "b")["cases"]["toy_1"]["slices"] == expected
    assert "toy_1.seg.nrrd: covers 2 of 3 slices" in capsys.readouterr().out


def test_values_above_air_are_noted_once(toy_volumes, tmp_path, capsys):
    write_volume(toy_volumes / IMAGE, HU.clip(-150))
    meta = preprocess(toy_volumes, tmp_path / "out", "--workers", 2)
    assert capsys.readouterr().out.count("toy_1_0000.nii.gz: no value is below -200 HU") == 1
    assert "notes" not in meta["cases"]["toy_1"]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_damage_of_other_formats(tmp_path, suffix, compressed):
    path, image = tmp_path / f"a{suffix}", sitk.GetImageFromArray(HU)
    sitk.WriteImage(image, str(path), compressed)
    (data,) = [*tmp_path.glob("a.*raw")] or [path]
    whole = data.read_bytes()
    for keep in (whole[:-99], whole[: len(whole) // 2], b""):
        data.write_bytes(keep)
        with pytest.raises(UserError, match=f"a{suffix}: damaged, truncated, without its data"):
            volumes.read_image(path)
    for volume in (sitk.JoinSeries([image, image]), sitk.Compose(image, image)):
        sitk.WriteImage(volume, str(path))
        with pytest.raises(UserError, match=f"a{suffix}: {NOT_3D}"):
            volumes.read_geometry(path)
    sitk.WriteImage(sitk.GetImageFromArray(SOME_NAN), str(path))
    with pytest.raises(UserError, match=f"a{suffix}: .* voxels are NaN or infinite"):
        volumes.read_image(path)


def test_2d_pictures_are_no_scan(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    for scan in (tmp_path, tmp_path / "a.png"):
        with pytest.raises(UserError, match="a.png is a picture, not a CT volume; 2D slices are"):
            find_scans(scan)


def test_case_without_a_label_is_left_out_and_named(toy_volumes, tmp_path, capsys):
    write_volume(toy_volumes / LABEL, LABELS * 0)
    meta = preprocess(toy_volumes, tmp_path / "out")
    assert set(meta["cases"]) == {"toy_0", "toy_2", "toy_3"}
    assert "toy_1.nii.gz: has no labels; the case is left out" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["a b", "-x", "Ærø 患者", "a.b_0000", "'$HOME'"])
def test_unusual_names_of_cases(toy_volumes, tmp_path, case):
    (toy_volumes / IMAGE).rename(toy_volumes / "images" / f"{case}_0000.NII.GZ")
    (toy_volumes / LABEL).rename(toy_volumes / "labels" / f"{case}.nii.gz")
    preprocess(toy_volumes, tmp_path / "out")
    found = [s for s in open_dataset(tmp_path / "out").split("all") if s.case == case]
    assert [len(read_instances(sample)[1]) for sample in found] == [2, 2]


def test_written_volume_lies_where_its_source_does(tmp_path):
    direction = Rotation.from_euler("zx", (5, 10), degrees=True).as_matrix().ravel()
    for orientation in ("LPS", "RAS", "SPL"):
        expected = sitk.GetImageFromArray(LABELS)
        expected.SetSpacing(SPACING[::-1])
        expected.SetDirection(direction)
        expected = sitk.DICOMOrient(expected, orientation)
        sitk.WriteImage(expected, str(tmp_path / "source.nii.gz"))
        volume = volumes.read_label_map(tmp_path / "source.nii.gz")
        for suffix in (".nii", ".nii.gz"):
            volumes.write_volume(tmp_path / f"copy{suffix}", volume.array, volume)
            found = sitk.ReadImage(str(tmp_path / f"copy{suffix}"))
            assert np.array_equal(*map(sitk.GetArrayFromImage, (found, expected)))
            for read in ("GetOrigin", "GetSpacing", "GetDirection"):
                assert getattr(found, read)() == pytest.approx(getattr(expected, read)(), abs=1e-5)


@pytest.mark.parametrize("codes", [(1, 2), (2, 1), (0, 2), (1, 0), (0, 0)])
def test_written_volume_has_the_forms_of_its_source(toy_volumes, tmp_path, codes):
    """Of a scan and of a case of dataset.json: two spaces, both codes and the unit."""
    fields = {"qform_code": (..., codes[0]), "sform_code": (..., codes[1]), "srow_x": (3, -70)}
    for path in (IMAGE, LABEL):
        edit_nifti(toy_volumes / path, fields | {"xyzt_units": (..., 0)})
    preprocess(toy_volumes, tmp_path / "out")
    source = nibabel.load(toy_volumes / IMAGE).header
    scan, case = volumes.read_image(toy_volumes / IMAGE), open_dataset(tmp_path / "out")
    for geometry in (scan, case.geometry["toy_1"]):
        volumes.write_volume(tmp_path / "copy.nii.gz", LABELS, geometry)
        found = nibabel.load(tmp_path / "copy.nii.gz").header
        for field in ("qform_code", "sform_code", "xyzt_units"):
            assert found[field] == source[field]
        assert np.array_equal(found["pixdim"][:4], source["pixdim"][:4])
        assert np.array_equal(found.get_qform(), source.get_qform())
        assert np.array_equal(found.get_sform(), source.get_sform())
