"""The whole road of ImageNet, on drawn pictures: masks, ranking, captions; stopped anywhere."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from test_captioners import build as build_blip
from test_sam import build_tiny_sam

import alpha_clip
from alpha_clip.regions import SampleError, decode_rle
from data_pipeline.__main__ import main
from data_pipeline.candidate_maker import CandidateMaker
from data_pipeline.candidates import CandidateFile, CandidateSample, as_candidates, read_candidates
from data_pipeline.caption_maker import Words
from data_pipeline.captioners.base import Captioner
from data_pipeline.captioners.blip import BlipCaptioner
from data_pipeline.filters import Filters
from data_pipeline.foreground import cut_out
from data_pipeline.imagenet_job import ImageNetJob
from data_pipeline.ranking_record import Keep, load_ranking
from data_pipeline.scorers.clip import ClipScorer
from data_pipeline.scorers.contrast import ContrastScorer
from data_pipeline.segmenters.base import MaskPrediction
from data_pipeline.segmenters.grabcut_everything import GrabCutEverything
from data_pipeline.segmenters.sam_everything import SamEverything
from data_pipeline.shard_files import read_shard
from data_pipeline.shard_maker import ShardTask, StageClock
from data_pipeline.shards import read_manifests
from data_pipeline.sources.imagenet import ImageNetSource
from data_pipeline.verification import verify_shards

CLASSES = {"n01440764": "tench", "n02012849": "crane_(bird), Grus", "n03642806": "hourglass"}
TINY = f"local-dir:{Path(__file__).resolve().parents[2] / 'configs/models/tiny'}"


def draw(path: Path, seed: int, mode: str = "RGB", size: tuple[int, int] = (96, 72)) -> None:
    """An object of one colour on a ground of another, with a little noise."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 110, 3)))
    x, y = int(rng.integers(12, size[0] // 3)), int(rng.integers(10, size[1] // 3))
    colour = tuple(int(v) for v in rng.integers(150, 255, 3))
    ImageDraw.Draw(image).ellipse((x, y, x + size[0] // 2, y + size[1] // 2), fill=colour)
    pixels = np.asarray(image).astype(int) + rng.integers(-6, 7, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(path, "JPEG")


def pixels(file: Path) -> Any:
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of five, four and one picture. Read only."""
    folder = tmp_path_factory.mktemp("imagenet") / "train"
    for seed, (wnid, number) in enumerate(
        (wnid, number)
        for wnid, count in zip(CLASSES, (5, 4, 1), strict=True)
        for number in range(count)
    ):
        draw(folder / wnid / f"{wnid}_{number}.JPEG", seed)
    (folder.parent / "names.json").write_text(json.dumps(CLASSES))
    return folder


def job(train: Path, output: Path, **more: Any) -> ImageNetJob:
    source = ImageNetSource(str(train.parent / "names.json"))
    quick = {"segmenter": GrabCutEverything(max_side_px=64, iterations=1), "workers": 1}
    keep = Keep(top_share=0.5, max_per_image=1)
    return ImageNetJob(str(train), str(output), source=source, keep=keep, **{**quick, **more})


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, but locks."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and ".tmp" not in p.parts
    }


@pytest.fixture(scope="module")
def made(train: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    output = tmp_path_factory.mktemp("made") / "out"
    assert job(train, output).run() == 0
    return output


def test_every_stage_leaves_sound_files(train: Path, made: Path) -> None:
    candidates = [
        candidate
        for _, manifest in sorted(read_manifests(made / "candidates").items())
        for batch in read_candidates(made / "candidates" / str(manifest.sidecar))
        for candidate in as_candidates(batch)
    ]
    assert {c.name for c in candidates} == {"tench", "crane", "hourglass"}
    for candidate in candidates:
        height, width, _ = pixels(train / candidate.wnid / candidate.image).shape
        assert (candidate.w, candidate.h) == (width, height)
        mask = decode_rle(candidate.rle)
        x1, y1, x2, y2 = map(int, candidate.box_xyxy_px)
        assert mask.sum() == mask[y1:y2, x1:x2].sum() == candidate.area
    ranking = load_ranking(made / "ranking")
    assert verify_shards(made / "shards").problems == []
    samples = [s for m in read_manifests(made / "shards").values() for s in m.read(made / "shards")]
    regions = [(sample, region) for sample in samples for region in sample.regions]
    assert len(regions) == sum(c.kept for c in ranking.classes.values()) >= 5
    for sample, region in regions:
        (twin,) = (c for c in candidates if (c.key, c.rid) == (sample.key, region.rid))
        assert (region.score, region.rle["counts"]) == (twin.score, twin.counts)
        article = "an" if twin.name == "hourglass" else "a"
        assert (region.text, region.kind) == (f"{article} {twin.name}", "caption")
        assert sample.caption == f"a photo of {article} {twin.name}"
        assert sample.id == f"{twin.wnid}/{twin.image}"
        rivals = [c.score for c in candidates if c.key == sample.key]
        assert twin.score == max(rivals)  # the best of its picture, by max_per_image
    for name in ("ranking_scores.png", "ranking_sheet.png"):
        assert pixels(made / "ranking" / name).shape[1] > 200


def test_the_drawn_object_is_what_is_found(train: Path, made: Path) -> None:
    samples = [s for m in read_manifests(made / "shards").values() for s in m.read(made / "shards")]
    for sample in samples:
        rgb = pixels(train / sample.id).astype(int)
        truth = rgb.min(2) > 125
        mask = decode_rle(sample.regions[0].rle)
        assert (mask & truth).sum() / (mask | truth).sum() > 0.7


def test_pycocotools_reads_the_same(made: Path) -> None:
    coco = COCO(str(made / "instances.json"))
    samples = [s for m in read_manifests(made / "shards").values() for s in m.read(made / "shards")]
    assert len(coco.imgs) == len(samples)
    for sample in samples:
        (image,) = (i for i in coco.imgs.values() if i["file_name"] == sample.id)
        found = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(found) == len(sample.regions)
        for annotation, region in zip(found, sample.regions, strict=True):
            assert annotation["caption"] == region.text
            (category,) = coco.loadCats(annotation["category_id"])
            assert category["name"] in region.text
            assert category["synset"] == sample.id.split("/")[0]
            assert annotation["segmentation"] == region.rle
            x, y, w, h = annotation["bbox"]
            assert (x, y, x + w, y + h) == region.box


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    train: Path, made: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(made, output)
    assert job(train, output).run() == 0
    assert files(output) == files(made)
    with pytest.raises(ValueError, match="made with other settings"):
        job(train, output, segmenter=GrabCutEverything()).run()
    ranked_anew = replace(job(train, output), keep=Keep(top_k=1))
    with pytest.raises(ValueError, match="rank to another folder, or delete"):
        ranked_anew.run()
    with pytest.raises(ValueError, match="made with other settings"):
        job(train, output, words=Words(merge="{caption}")).run()
    assert files(output) == files(made)


def test_stages_one_by_one_make_the_same(train: Path, made: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for stage in ("masks", "ranking", "captions"):
        assert job(train, output, stages=[stage]).run() == 0
    assert files(output) == files(made)


def test_several_workers_make_the_same(train: Path, made: Path, tmp_path: Path) -> None:
    assert job(train, tmp_path / "out", workers=2).run() == 0
    assert files(tmp_path / "out") == files(made)


RUN = """
import sys
sys.path.insert(0, {tests!r})
sys.path.insert(0, {segmenters!r})
from pathlib import Path
from test_imagenet_job import job
sys.exit(job(Path(sys.argv[1]), Path(sys.argv[2])).run())
"""


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_bytes(
    train: Path, made: Path, tmp_path: Path
) -> None:
    here = Path(__file__).parent
    code = RUN.format(tests=str(here), segmenters=str(here / "segmenters"))
    output = tmp_path / "out"
    marks = [  # killed as soon as one of these is there: in each stage, and between them
        *("candidates/.tmp/00000-*", "candidates/00001.done.json", "candidates/00002.done.json"),
        *("ranking/.tmp", "ranking/ranking.json", "shards/.tmp/00000-*", "shards/00000.done.json"),
        *("shards/00002.done.json", ".instances.json-*"),
    ]
    killed = 0
    for mark in marks:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(train), str(output)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        while process.poll() is None and not any(output.glob(mark)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 5
    assert job(train, output).run() == 0
    found, expected = files(output), files(made)
    assert {k: v for k, v in found.items() if not k.startswith(".instances")} == expected


class TinySam(SamEverything):
    """Random, and built rather than read."""

    def build(self) -> None:
        self.use(build_tiny_sam())


@pytest.mark.parametrize(("look", "kind"), [("white", "blip"), ("alpha", "opt")])
def test_sam_clip_and_blip_go_the_whole_road(
    train: Path, tmp_path: Path, look: Any, kind: str
) -> None:
    """The real classes, small and random: what they say is nonsense, and sound."""
    for part in build_blip(kind):
        part.save_pretrained(tmp_path / "blip")
    sam = TinySam("", device="cpu", points_per_side=3, min_iou=-10.0, min_stability=0.1)
    blip = BlipCaptioner(str(tmp_path / "blip"), device="cpu", max_new_tokens=6, images_per_batch=2)
    assert (
        job(
            train,
            tmp_path / "out",
            segmenter=sam,
            scorer=ClipScorer(TINY, None, look=look, batch_size=3),
            captioner=blip,
            words=Words(cut_out_px=64, merge="{caption}, probably {class_name}."),
            filters=Filters(min_mask_share=0.01),
        ).run()
        == 0
    )
    assert verify_shards(tmp_path / "out/shards").problems == []
    ranking = load_ranking(tmp_path / "out/ranking")
    assert all(-1 <= c.scores["worst"] <= c.scores["best"] <= 1 for c in ranking.classes.values())
    shards = read_manifests(tmp_path / "out/shards").values()
    regions = [r for m in shards for s in m.read(tmp_path / "out/shards") for r in s.regions]
    assert regions
    assert all(r.sam_iou is not None and r.stability is not None for r in regions)
    assert all(
        r.text.endswith((", probably tench.", ", probably crane.", ", probably hourglass."))
        or r.text in ("a tench", "a crane", "an hourglass")
        for r in regions
    )


def test_clip_scores_are_the_cosines_of_the_model(train: Path) -> None:
    model, transform, tokenizer = alpha_clip.create_model(TINY)
    for parameter in model.parameters():
        parameter.data += 0.02  # so that texts and pictures are not all alike
    rgb = pixels(train / "n01440764/n01440764_0.JPEG")
    masks = [np.zeros(rgb.shape[:2], bool) for _ in range(3)]
    for i, mask in enumerate(masks):
        mask[10 * i : 10 * i + 30, 20:60] = True
    prompts = ["a photo of a {}.", "the {} alone"]
    text = model.encode_text(tokenizer([p.format("tench") for p in prompts]), normalize=True).mean(
        0
    )
    text = text / text.norm()
    for look in ("white", "clip_mean", "image", "alpha"):
        scorer = ClipScorer(TINY, None, look=look, templates=prompts, batch_size=2)
        scorer._model = model
        if look == "alpha":
            rgba = transform.stack(Image.fromarray(rgb), masks)
        else:
            cuts = [cut_out(rgb, mask, look, model.image_size).rgb for mask in masks]
            rgba = np.stack([transform(Image.fromarray(cut)) for cut in cuts])  # type: ignore
        features = model.encode_image(torch.as_tensor(rgba), normalize=True)
        expected = (features @ text).tolist()
        assert scorer.score(rgb, masks, "tench") == pytest.approx(expected, abs=1e-5)


def test_clip_scorers_settings_tell_the_weights_and_refuse_nonsense(tmp_path: Path) -> None:
    weights = tmp_path / "alpha.pth"
    weights.write_bytes(b"one")
    first = ClipScorer(checkpoint=str(weights)).settings()
    weights.write_bytes(b"two")
    assert ClipScorer(checkpoint=str(weights)).settings() != first
    assert ClipScorer(batch_size=1).settings() == ClipScorer(batch_size=2).settings()
    with pytest.raises(ValueError, match=r"prompts with one {} for the class name"):
        ClipScorer(templates=["a photo"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ClipScorer(batch_size=0)
    with pytest.raises(ValueError, match="no-such-model"):
        ClipScorer("no-such-model", None).load()


def test_contrast_prefers_what_stands_out_in_the_middle() -> None:
    rgb = np.full((80, 100, 3), 40, np.uint8)
    rgb[30:50, 40:60] = (230, 40, 40)
    rgb[0:20, 0:20] = (230, 40, 40)
    middle, corner, ground = (np.zeros((80, 100), bool) for _ in range(3))
    middle[30:50, 40:60] = corner[0:20, 0:20] = ground[60:78, 60:98] = True
    whole = np.ones((80, 100), bool)
    dot = np.zeros((80, 100), bool)
    dot[40, 50] = True
    scores = ContrastScorer().score(rgb, [middle, corner, ground, whole, dot], "anything")
    assert scores[0] > scores[1] > scores[2]
    assert scores[3] == 0
    assert all(0 <= score <= 1 for score in scores)


@dataclass(frozen=True)
class Failing(ContrastScorer):
    """Fails on some pictures."""

    every: int = 1

    def score(self, rgb: Any, masks: Any, class_name: str) -> list[float]:
        if int(rgb.sum()) % self.every == 0:
            raise RuntimeError("out of ideas")
        return super().score(rgb, masks, class_name)


@dataclass(frozen=True)
class Nothing:
    """Finds nothing, or only specks."""

    found: tuple[MaskPrediction, ...] = ()

    def load(self) -> None: ...

    def settings(self) -> dict[str, Any]:
        return {}

    def segment_everything(self, rgb: Any) -> list[MaskPrediction]:
        return list(self.found)


def candidates(train: Path, tmp_path: Path, wnid: str = "n01440764", **more: Any) -> Any:
    """The manifest and the rejects of one shard."""
    parts = {"segmenter": GrabCutEverything(max_side_px=64, iterations=1), **more}
    parts = {"scorer": ContrastScorer(), **parts}
    maker = CandidateMaker(ImageNetSource(str(train.parent / "names.json")), **parts)
    maker.check()
    manifest = maker.make(ShardTask(str(train / wnid), 0), tmp_path / "out", StageClock())
    lines = (tmp_path / "out/00000.rejects.jsonl").read_text().splitlines()
    return manifest, [json.loads(line) for line in lines]


def test_pictures_of_all_kinds(train: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train" / "n01440764"
    shutil.copytree(train.parent, tmp_path, dirs_exist_ok=True)
    draw(folder / "n01440764_20.JPEG", 20, "L")
    draw(folder / "n01440764_21.JPEG", 21, "CMYK")
    draw(folder / "n01440764_22.JPEG", 22, size=(3000, 2000))
    (folder / "n01440764_23.JPEG").write_bytes(b"no picture")
    manifest, rejects = candidates(
        tmp_path / "train", tmp_path, filters=Filters(min_side_px=50, max_mask_share=0.5)
    )
    assert {r["reason"] for r in rejects if r["rid"] is None} <= {"corrupt_image", "no_mask"}
    assert [r["key"] for r in rejects if r["reason"] == "corrupt_image"] == ["01440764000000023"]
    assert manifest.samples + manifest.rejected_samples == manifest.input["samples"] == 9
    tight = ImageNetSource(str(tmp_path / "names.json"), max_image_px=1_000_000)
    maker = CandidateMaker(tight, GrabCutEverything(max_side_px=64, iterations=1), ContrastScorer())
    maker.make(ShardTask(str(folder), 0), tmp_path / "tight", StageClock())
    lines = (tmp_path / "tight/00000.rejects.jsonl").read_text().splitlines()
    assert "huge_image" in {json.loads(line)["reason"] for line in lines}


def test_a_picture_without_a_mask_is_counted(train: Path, tmp_path: Path) -> None:
    speck = np.zeros((72, 96), bool)
    speck[3, 4] = True
    empty = MaskPrediction(np.zeros((72, 96), bool))
    manifest, rejects = candidates(
        train,
        tmp_path,
        segmenter=Nothing((MaskPrediction(speck), empty)),
        filters=Filters(min_mask_share=0.01),
    )
    assert manifest.samples == 0
    assert {r["reason"] for r in rejects} == {"no_mask"}
    assert manifest.rejected_samples == 5


def test_a_failing_model_costs_its_pictures_and_a_broken_one_the_run(
    train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, rejects = candidates(train, tmp_path / "some", scorer=Failing(every=2))
    failed = [r for r in rejects if r["reason"] == "scorer_failed"]
    assert manifest.samples + len(failed) == 5
    assert failed
    assert "RuntimeError: out of ideas" in failed[0]["detail"]
    monkeypatch.setattr("data_pipeline.candidate_maker._HOPELESS", 4)
    with pytest.raises(RuntimeError, match="failed on every picture: scorer_failed"):
        candidates(train, tmp_path / "all", scorer=Failing(every=1))
    assert read_manifests(tmp_path / "all/out") == {}

    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Failing, "score", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        candidates(train, tmp_path / "device", scorer=Failing())


def test_filters_of_words_have_nothing_to_do(train: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"filters\.max_words has nothing to do here"):
        candidates(train, tmp_path, filters=Filters(max_words=3))


@dataclass(frozen=True)
class Silent(Captioner):
    """Says nothing of some classes."""

    about: str = "crane"

    def caption(self, foreground: Any, class_name: str) -> str:
        return "" if class_name == self.about else f"something like a {class_name}"


def test_a_captioner_that_says_nothing_loses_only_that(
    train: Path, made: Path, tmp_path: Path
) -> None:
    for stage in ("candidates", "ranking"):
        shutil.copytree(made / stage, tmp_path / stage)
    assert job(train, tmp_path, captioner=Silent(), stages=["captions"]).run() == 0
    found = read_manifests(tmp_path / "shards")
    kept = {w: c.kept for w, c in load_ranking(tmp_path / "ranking").classes.items()}
    assert [m.regions for m in found.values()] == [kept["n01440764"], 0, kept["n03642806"]]
    lost = found["00001"]
    assert lost.rejects["empty_caption"] == lost.rejected_regions == kept["n02012849"]
    assert lost.input["regions"] == kept["n02012849"]
    texts = {
        r.text for s in read_shard(tmp_path / "shards" / found["00000"].tar) for r in s.regions
    }
    assert texts == {"something like a tench"}


def test_a_captioners_missing_weights_are_told_before_the_masks(
    train: Path, tmp_path: Path
) -> None:
    blip = BlipCaptioner(str(tmp_path / "none"), device="cpu")
    with pytest.raises(ValueError, match="does not hold BLIP or BLIP-2"):
        job(train, tmp_path / "out", captioner=blip).run()
    assert not (tmp_path / "out").exists()


def test_pictures_that_are_gone_or_others_are_told(train: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(train.parent, tmp_path / "data")
    for stage in ("candidates", "ranking"):
        shutil.copytree(made / stage, tmp_path / "out" / stage)
    (sample,) = read_manifests(made / "shards")["00002"].read(made / "shards")
    (tmp_path / "data/train" / sample.id).unlink()
    draw(tmp_path / "data/train/n01440764/n01440764_0.JPEG", 0, size=(50, 50))
    gone = job(tmp_path / "data/train", tmp_path / "out", stages=["captions"])
    gone.run()
    found = read_manifests(tmp_path / "out/shards")
    assert found["00002"].rejects == {"missing_image": 1}
    expected = load_ranking(made / "ranking")
    total = sum(m.regions + m.rejected_regions for m in found.values())
    assert total == sum(c.kept for c in expected.classes.values())


def test_candidates_that_can_not_be_are_not_written(train: Path, tmp_path: Path) -> None:
    manifest, _ = candidates(train, tmp_path)
    (first, *_) = as_candidates(next(read_candidates(manifest.file(tmp_path / "out"))))
    wrong = [
        {"key": "x"},
        {"key": "²"},
        {"key": "9" * 20},
        {"wnid": ""},
        {"name": " "},
        {"score": float("nan")},
        {"sam_iou": float("inf")},
        {"area": first.area + 1},
        {"box_xyxy_px": (0.0, 0.0, 999.0, 5.0)},
        {"counts": "zz"},
        {"w": first.w + 1},
    ]
    for change in wrong:
        with pytest.raises(SampleError):
            replace(first, **change).check()
    file = CandidateFile(tmp_path / "one.parquet")
    with pytest.raises(SampleError):
        file.write(CandidateSample("1", (first, replace(first, area=1))), b"")
    file.write(CandidateSample(first.key, (first,)), b"")
    file.close()
    assert CandidateFile.read_back(tmp_path / "one.parquet") == (1, 1)
    (tmp_path / "one.parquet").write_bytes((tmp_path / "one.parquet").read_bytes()[:-9])
    with pytest.raises(OSError, match="is damaged"):
        CandidateFile.read_back(tmp_path / "one.parquet")


def test_the_command_makes_the_same(
    train: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["imagenet", "--input", str(train), "--output", str(tmp_path / "out")]
    arguments += ["--source.class_names", str(train.parent / "names.json"), "--workers", "1"]
    arguments += ["--segmenter", "data_pipeline.segmenters.grabcut_everything.GrabCutEverything"]
    arguments += ["--segmenter.max_side_px", "64", "--segmenter.iterations", "1"]
    assert main([*arguments, "--keep.top_share", "0.5", "--keep.max_per_image", "1"]) == 0
    assert files(tmp_path / "out") == files(made)
    assert "annotations in" in capsys.readouterr().out
    assert main(["imagenet", "--input", str(train)]) == 2
    assert "expected --input (ImageNet's train folder" in capsys.readouterr().err
    assert main(["imagenet", "--input", str(tmp_path), "--output", str(tmp_path / "no")]) == 1
    assert "is no synset" in capsys.readouterr().out


def test_what_is_no_class_does_not_stop_the_others(
    train: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(train.parent, tmp_path / "data")
    draw(tmp_path / "data/train/cats/1.JPEG", 1)
    draw(tmp_path / "data/train/n99999999/n99999999_1.JPEG", 1)
    for _ in range(2):  # and again
        assert job(tmp_path / "data/train", tmp_path / "out").run() == 0
        told = capsys.readouterr().out
        assert told.count("cats is no synset") == 1
        assert told.count("has no name for the class 'n99999999'") == 1
        assert told.count("has no candidates; the masks' stage said why") == 2
    ranking = load_ranking(tmp_path / "out/ranking")
    assert {w: c.kept for w, c in ranking.classes.items()} == {
        w: c.kept for w, c in load_ranking(made / "ranking").classes.items()
    }


def test_published_annotations_become_shards(train: Path, made: Path, tmp_path: Path) -> None:
    """Records as MaskImageNet has them, of the regions that another run made."""
    samples = [s for m in read_manifests(made / "shards").values() for s in m.read(made / "shards")]
    said = "a small thing on a white background."
    records = [
        [0, 0, f"data/imagenet-21k/images/{s.id}", r.rle, [1, 1, 5, 5], 0, said]
        for s in samples
        for r in s.regions
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    words = Words(merge="{caption}, probably {class_name}")
    published = job(train, tmp_path / "out", words=words)
    published = replace(published, annotations=str(tmp_path / "annotations.json"))
    assert published.run() == 0
    assert verify_shards(tmp_path / "out/shards").problems == []
    found = [
        s
        for m in read_manifests(tmp_path / "out/shards").values()
        for s in m.read(tmp_path / "out/shards")
    ]
    assert {s.key: s.regions[0].rle for s in found} == {s.key: s.regions[0].rle for s in samples}
    texts = {r.text for s in found for r in s.regions}
    names = {"tench", "crane", "hourglass"}
    assert texts == {f"a small thing, probably {name}" for name in names}
    coco = COCO(str(tmp_path / "out/instances.json"))
    assert {c["name"] for c in coco.cats.values()} == names
    several = replace(published, input=[str(train)])
    with pytest.raises(ValueError, match="expected --input to be one folder"):
        several.run()


@pytest.mark.slow
def test_photographs_go_the_whole_road(photos: Path, tmp_path: Path) -> None:
    arguments = ["imagenet", "--input", str(photos / "imagenet/train"), "--output", str(tmp_path)]
    arguments += ["--segmenter", "data_pipeline.segmenters.grabcut_everything.GrabCutEverything"]
    assert main([*arguments, "--segmenter.max_side_px", "128", "--workers", "1"]) == 0
    assert verify_shards(tmp_path / "shards").problems == []
    found = load_ranking(tmp_path / "ranking")
    assert len(found.classes) == 9
    assert all(c.kept >= 1 for c in found.classes.values())
