"""Captioners: templates, and BLIP and BLIP-2 that are small, random and built here."""

import json
import pickle
import shutil
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from alpha_clip.regions import SampleError
from data_pipeline.captioners.base import Captioner
from data_pipeline.captioners.blip import BlipCaptioner
from data_pipeline.captioners.template import TemplateCaptioner, dominant_colour
from data_pipeline.foreground import Foreground

transformers = pytest.importorskip("transformers")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [*SPECIAL, *"a picture of what is this dog bird cat red small on branch old green".split()]
NAMES = ["cat", "small red bird", "dog", "bird", "small old green cat"]
LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {**LAYERS, "image_size": 32, "patch_size": 8}
TOKENS = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 2}
OPT = {"model_type": "opt", **LAYERS, **TOKENS, "bos_token_id": 1, "word_embed_proj_dim": 32}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
LANGUAGE = {
    "blip": {**LAYERS, **TOKENS, "bos_token_id": 1, "sep_token_id": 2, "encoder_hidden_size": 32},
    "opt": {**OPT, "ffn_dim": 64, "max_position_embeddings": 64},
    "t5": {**T5, **TOKENS, "bos_token_id": 2, "decoder_start_token_id": 0},
}
TEMPLATES = {"blip": "<s> $A </s>", "opt": "<s> $A", "t5": "$A </s>"}
KINDS = [*LANGUAGE]


def tokenizer(kind):
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single=TEMPLATES[kind], special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=["<image>"],
    )


def build(kind):
    """A model whose words depend on the picture, and its processor."""
    torch.manual_seed(0)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    if kind == "blip":
        config = transformers.BlipConfig(vision_config=VISION, text_config=LANGUAGE[kind])
        model = transformers.BlipForConditionalGeneration(config)
        processor = transformers.BlipProcessor(images, tokenizer(kind))
    else:
        config = transformers.Blip2Config(
            vision_config=VISION,
            qformer_config={**LAYERS, "encoder_hidden_size": 32, "vocab_size": len(WORDS)},
            text_config=LANGUAGE[kind],
            num_query_tokens=4,
            image_token_index=4,
        )
        model = transformers.Blip2ForConditionalGeneration(config)
        processor = transformers.Blip2Processor(images, tokenizer(kind), num_query_tokens=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith(("crossattention.output.dense.weight", "projection.weight")):
                parameter.mul_(20 if "vision" not in name else 1)
    return model.eval(), processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind's folder as `save_pretrained` leaves it. Read only."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        for part in build(kind):
            part.save_pretrained(made[kind])
    return made


@pytest.fixture
def copy(folders, tmp_path):
    """BLIP's folder, to be damaged."""
    return shutil.copytree(folders["blip"], tmp_path / "copy")


def blip(path, **options):
    return BlipCaptioner(str(path), device="cpu", **{"max_new_tokens": 6, **options})


def cut_outs(count=5):
    """Pictures of a few large squares."""
    return [
        Foreground(
            np.kron(
                np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8),
                np.ones((10, 10, 1), np.uint8),
            ),
            np.ones((40, 40), bool),
        )
        for seed in range(count)
    ]


def said(results):
    """The captions, and the errors in words: two errors are never equal."""
    return [str(result) for result in results]


def plain(colour, mask=None):
    rgb = np.full((20, 20, 3), colour, np.uint8)
    return Foreground(rgb, np.ones((20, 20), bool) if mask is None else mask)


@dataclass(frozen=True)
class Toy(Captioner):
    """Says the class name, or does what `wrong` says of it."""

    wrong: dict = field(default_factory=dict)
    _secret: int = 3

    def caption(self, foreground, class_name):
        said = self.wrong.get(class_name, f" a  {class_name} ")
        if isinstance(said, Exception):
            raise said
        return said


def test_failure_costs_only_its_picture():
    wrong = {
        **{"dog": ValueError("no dogs"), "bird": " \n", "cat": SampleError("too_cute", "a cat")},
        **{"cow": MemoryError("x")},
    }
    results = Toy({**wrong, "cow": KeyError("cow")}).caption_batch(
        cut_outs(5), ["dog", "hen", "bird", "cat", "cow"]
    )
    assert results[1] == "a hen"
    reasons = [r.reason for r in results if isinstance(r, SampleError)]
    assert reasons == ["captioner_failed", "empty_caption", "too_cute", "captioner_failed"]
    assert "ValueError: no dogs" in str(results[0])


def test_broken_device_stops_everything():
    broken = Toy({"dog": RuntimeError("CUDA error: an illegal memory access was encountered")})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        broken.caption_batch(cut_outs(1), ["dog"])


def test_each_picture_needs_a_class_name():
    for captioner in (Toy(), blip("nowhere")):
        with pytest.raises(ValueError, match="shorter"):
            captioner.caption_batch(cut_outs(2), ["dog"])


def test_public_fields_are_the_settings():
    captioner = Toy({"dog": ""})
    captioner.load()
    captioner.place(1)
    assert captioner.settings() == {"wrong": {"dog": ""}}
    assert captioner.batch_size() == 1


def test_template_takes_the_name_with_its_article():
    foregrounds = [plain((255, 0, 0))] * 3
    captions = TemplateCaptioner().caption_batch(foregrounds, ["cat", "hourglass", "jeans"])
    assert captions == ["a photo of a cat", "a photo of an hourglass", "a photo of jeans"]
    assert TemplateCaptioner("{}, seen").caption(foregrounds[0], "a {}") == "a {}, seen"


def test_template_names_the_colour_of_the_object_alone():
    mask = np.zeros((20, 20), bool)
    mask[8:12, 5:15] = True
    foreground = plain((255, 255, 255), mask)
    foreground.rgb[mask] = (230, 120, 20)
    captioner = TemplateCaptioner(colour=True)
    assert captioner.caption(foreground, "cat") == "a photo of an orange cat"
    assert TemplateCaptioner().caption(foreground, "cat") == "a photo of a cat"
    foreground.rgb[8:10, 5:15] = (0, 0, 200)
    assert captioner.caption(foreground, "cat") in (
        "a photo of an orange cat",
        "a photo of a blue cat",
    )
    one_colour = TemplateCaptioner(colour=True, least_share=0.51)
    assert one_colour.caption(foreground, "cat") == "a photo of a cat"


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((10, 10, 12), "black"),
        ((250, 250, 248), "white"),
        ((128, 128, 128), "grey"),
        ((60, 62, 60), "black"),
        ((200, 30, 30), "red"),
        ((100, 10, 20), "red"),
        ((40, 120, 40), "green"),
        ((90, 110, 30), "green"),
        ((240, 220, 40), "yellow"),
        ((30, 60, 170), "blue"),
        ((130, 180, 230), "blue"),
        ((110, 70, 30), "brown"),
        ((190, 150, 100), "brown"),
        ((240, 130, 20), "orange"),
        ((250, 170, 200), "pink"),
        ((120, 40, 150), "purple"),
    ],
)
def test_colours_have_the_names_that_people_give_them(rgb, name):
    assert dominant_colour(np.array([rgb], np.uint8)) == name


def test_colour_of_many_pixels_is_that_of_most():
    pixels = np.zeros((100_003, 3), np.uint8)
    pixels[:70_000] = (0, 0, 230)
    assert dominant_colour(pixels) == "blue"
    assert dominant_colour(pixels, least_share=0.75) is None
    with pytest.raises(ValueError, match="got none"):
        dominant_colour(pixels[:0])


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}"])
def test_template_must_have_one_place(template):
    with pytest.raises(ValueError, match=r"one \{\} for the class name"):
        TemplateCaptioner(template)


def test_share_must_be_one():
    with pytest.raises(ValueError, match=r"least_share must be in \[0, 1\], got 50"):
        TemplateCaptioner(least_share=50)


def stock(folder, foreground, text, beams):
    """What transformers says of a picture by itself: the words, special tokens left out."""
    auto = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    words = {} if text is None else {"text": text}
    inputs = auto(images=foreground.rgb, return_tensors="pt", **words)
    written = model.generate(**inputs, num_beams=beams, max_new_tokens=6, do_sample=False)
    return auto.batch_decode(written, skip_special_tokens=True)[0].strip()


PROMPTS = [(kind, prompt) for kind in KINDS for prompt in (None, "A picture of")]


# Names of several lengths: prompts that must be padded, on the right side.
@pytest.mark.parametrize(
    ("kind", "prompt"), [*PROMPTS, ("opt", "what is this {}"), ("t5", "what is this {}")]
)
def test_batches_say_what_the_stock_model_says_of_each(folders, kind, prompt):
    pictures, beams = cut_outs(), 1 if kind == "opt" else 3
    captions = blip(
        folders[kind], prompt=prompt, num_beams=beams, images_per_batch=4
    ).caption_batch(pictures, NAMES)
    assert len(set(said(captions))) > 1  # they see the pictures
    for picture, name, caption in zip(pictures, NAMES, captions, strict=True):
        text = None if prompt is None else prompt.replace("{}", name)
        wanted = stock(folders[kind], picture, text, beams)
        wanted = wanted.removeprefix((text or "").lower()).strip()
        assert wanted == ("" if isinstance(caption, SampleError) else caption)


def test_prompt_that_the_model_repeats_is_no_part_of_the_caption(folders):
    prompt = "A  picture of"
    wanted = stock(folders["blip"], cut_outs()[0], prompt, 1)
    assert wanted.startswith("a picture of ")
    captioner = blip(folders["blip"], prompt=prompt, num_beams=1)
    assert "a picture of " + captioner.caption(cut_outs()[0], "cat") == wanted


def test_captions_are_the_same_again_whatever_the_seed(folders):
    captioner = blip(folders["opt"], images_per_batch=2)
    first = said(captioner.caption_batch(cut_outs(), NAMES))
    torch.manual_seed(1)
    assert said(captioner.caption_batch(cut_outs(), NAMES)) == first


def test_length_of_a_caption_is_bounded(folders):
    short = blip(folders["blip"], max_new_tokens=2).caption_batch(cut_outs(), NAMES)
    assert max(len(caption.split()) for caption in short if isinstance(caption, str)) == 2


def test_pictures_may_be_read_only_and_of_any_size(folders):
    foreground = cut_outs()[0]
    captioner = blip(folders["blip"], images_per_batch=2)
    alone = captioner.caption(foreground, "cat")
    foreground.rgb.setflags(write=False)
    other = Foreground(np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), bool))
    assert captioner.caption_batch([foreground, other], ["cat", "cat"])[0] == alone


def test_nothing_to_do_is_no_work(folders):
    assert blip(folders["blip"]).caption_batch([], []) == []


def test_model_that_says_nothing(folders, monkeypatch):
    captioner = blip(folders["blip"], images_per_batch=2)
    captioner.load()
    nothing = torch.tensor([[1, 2, 0], [1, 6, 2]])
    monkeypatch.setattr(captioner._model, "generate", lambda **inputs: nothing)
    empty, picture = captioner.caption_batch(cut_outs(2), NAMES[:2])
    assert (empty.reason, picture) == ("empty_caption", "picture")
    monkeypatch.setattr(captioner._model, "generate", lambda **inputs: nothing[:1])
    with pytest.raises(SampleError, match="empty_caption"):
        captioner.caption(cut_outs(1)[0], "cat")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "captioner_out_of_memory"),
        (RuntimeError("shapes do not fit"), "captioner_failed"),
    ],
)
def test_batch_that_fails_is_halved(folders, monkeypatch, error, reason):
    captioner = blip(folders["opt"], images_per_batch=4, prompt="what is this {}")
    pictures, names = cut_outs(4), NAMES[1:]
    alone = said(
        captioner.caption_batch([picture], [name])[0]
        for picture, name in zip(pictures, names, strict=True)
    )
    generate, batches = captioner._model.generate, []

    def choke(**inputs):
        batches.append(len(inputs["pixel_values"]))
        if any(WORDS.index("dog") in row for row in inputs["input_ids"].tolist()):
            raise error
        return generate(**inputs)

    monkeypatch.setattr(captioner._model, "generate", choke)
    results = captioner.caption_batch(pictures, names)
    assert batches == [4, 2, 1, 1, 2]  # the dog is the second
    assert results[1].reason == reason
    assert [said(results)[i] for i in (0, 2, 3)] == [alone[i] for i in (0, 2, 3)]


def test_broken_device_stops_blip(folders, monkeypatch):
    captioner = blip(folders["blip"])
    captioner.load()

    def fail(**inputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(captioner._model, "generate", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        captioner.caption_batch(cut_outs(2), NAMES[:2])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_must_be_numbers(folders, monkeypatch, kind, beams):
    captioner = blip(folders[kind], images_per_batch=3, num_beams=beams)
    pictures = cut_outs(3)
    alone = captioner.caption_batch(pictures, NAMES[:3])
    forward = captioner._model.vision_model.forward

    def spoil(*arguments, **options):
        seen = forward(*arguments, **options)
        seen.last_hidden_state[1] = float("nan")
        return seen

    monkeypatch.setattr(captioner._model.vision_model, "forward", spoil)
    results = captioner.caption_batch(pictures, NAMES[:3])
    assert results[1].reason == "captioner_not_finite"
    assert [said(results)[i] for i in (0, 2)] == [said(alone)[i] for i in (0, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_of_the_precision_asked_for(folders, kind):
    captioner = blip(folders[kind], precision="bf16", images_per_batch=2)
    assert len(captioner.caption_batch(cut_outs(2), NAMES[:2])) == 2
    assert captioner._model.vision_model.dtype == torch.bfloat16
    alone = blip(folders[kind])
    alone.load()
    assert alone._model.vision_model.dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)]
)
def test_gpus_take_half_precision(monkeypatch, capability, dtype):
    asked = []

    def gpu(name, worker):
        asked.append((name, worker))
        return torch.device("cuda", worker)

    monkeypatch.setattr("data_pipeline.captioners.blip.pick_device", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    captioner = BlipCaptioner()
    captioner.place(1)
    assert captioner._dtype() == dtype
    assert captioner.batch_size() == 16
    assert set(asked) == {("auto", 1)}
    assert BlipCaptioner(precision="fp32")._dtype() == torch.float32


def test_a_processor_that_does_not_know_its_model_is_put_right(folders):
    """Old folders do not say how many tokens a picture takes; the picture was then ignored."""
    model, processor = build("opt")
    processor.num_query_tokens = None
    captioner = blip("memory", prompt="what is this", num_beams=1)
    captioner.use(model, processor)
    wanted = blip(folders["opt"], prompt="what is this", num_beams=1)
    assert said(captioner.caption_batch(cut_outs(), NAMES)) == said(
        wanted.caption_batch(cut_outs(), NAMES)
    )


@pytest.mark.parametrize("token", [None, 9])
def test_tokens_that_stand_for_the_picture_must_agree(token):
    model, processor = build("opt")
    model.config.image_token_index = token
    with pytest.raises(ValueError, match=f"token {token} stands for the picture"):
        blip("memory").use(model, processor)


def test_blip_has_one_prompt_for_all(folders):
    with pytest.raises(ValueError, match="same prompt for all pictures"):
        blip(folders["blip"], prompt="a photo of a {}").load()


def refused(path):
    with pytest.raises(ValueError, match="does not hold BLIP or BLIP-2") as caught:
        blip(path).load()
    return str(caught.value)


def test_folder_that_is_not_there(tmp_path):
    assert "download it" in refused(tmp_path / "blip")


def test_weights_that_are_missing(copy):
    (copy / "model.safetensors").unlink()
    assert "model.safetensors" in refused(copy)


def test_damaged_weights(copy):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "blip", "text_config": 3}'])
def test_damaged_config(copy, content):
    (copy / "config.json").write_text(content)
    refused(copy)


def test_model_of_another_type(copy):
    (copy / "config.json").write_text('{"model_type": "clip"}')
    assert "a model of type 'clip', not one of ['blip', 'blip-2']" in refused(copy)


def test_config_of_more_layers_than_there_are_weights(copy):
    """transformers itself fills them with random numbers."""
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    assert "of its weights are missing, such as vision_model.encoder.layers.2" in refused(copy)


class Exploit:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_pickled_weights_are_never_read(copy):
    trap = copy / "trap"
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(trap), protocol=2))
    assert "its weights are pickled, and are not read; write them as safeten" in refused(copy)
    assert not trap.exists()


def test_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'alpha-clip\[export\]'"):
        BlipCaptioner(device="cpu").load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_batch": 0}, "images_per_batch must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_beams": -1}, "num_beams must be at least 1, got -1"),
        ({"prompt": " "}, "prompt must have a word"),
    ],
)
def test_settings_that_can_not_be(options, message):
    with pytest.raises(ValueError, match=message):
        BlipCaptioner(**options)


def test_settings_can_be_sent_to_a_worker_and_weights_stay_behind(folders):
    settings = blip(folders["opt"], prompt="what is this")
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert len(pickle.dumps(settings)) < 1000
    settings.place(3)
    shown = settings.settings()
    assert str(folders["opt"]) not in str(shown)
    assert "device" not in shown
    assert shown["prompt"] == "what is this"
    assert shown["checkpoint"] != blip(folders["t5"]).settings()["checkpoint"]
    assert BlipCaptioner().settings()["checkpoint"] == "Salesforce/blip-image-captioning-large"


def test_compiled_tower_sees_one_size_only(folders, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    captioner = blip(folders["blip"], compile=True, images_per_batch=3)
    captioner.load()
    generate, batches = captioner._model.generate, []

    def count(**inputs):
        batches.append(len(inputs["pixel_values"]))
        return generate(**inputs)

    monkeypatch.setattr(captioner._model, "generate", count)
    plainly = blip(folders["blip"], images_per_batch=3)
    found = said(captioner.caption_batch(cut_outs(), NAMES))
    assert found == said(plainly.caption_batch(cut_outs(), NAMES))
    assert batches == [3, 3]


def test_tower_that_cannot_be_compiled_stops_before_work(folders, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: setattr(module, "forward", fail))
    with pytest.raises(ValueError, match=r"compiled .*no C\+\+ compiler.*; set compile: false"):
        blip(folders["blip"], compile=True).load()


@pytest.mark.slow
def test_compiled_tower_says_the_same(folders):
    options = {"images_per_batch": 2, "num_beams": 1}
    compiled = blip(folders["blip"], compile=True, **options)
    found = said(compiled.caption_batch(cut_outs(3), NAMES[:3]))
    plainly = blip(folders["blip"], **options)
    assert found == said(plainly.caption_batch(cut_outs(3), NAMES[:3]))
