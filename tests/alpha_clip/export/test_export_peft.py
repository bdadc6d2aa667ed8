from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_huggingface import VIT, build
from test_huggingface_towers import siglip

from alpha_clip.export import huggingface

transformers = pytest.importorskip("transformers")
OUTPUT = {"CLIPVisionModelWithProjection": "image_embeds", "SiglipVisionModel": "pooler_output"}
KINDS = {"CLIPVisionModelWithProjection": lambda: build(VIT), "SiglipVisionModel": siglip}


# peft asks transformers in a way that it no longer likes.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_an_exported_tower(tmp_path: Path, kind: str) -> None:
    huggingface.export(KINDS[kind](), tmp_path / "out")
    tower: Any = getattr(transformers, kind).from_pretrained(tmp_path / "out")
    adapted = peft.get_peft_model(
        tower, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "patch_embedding"])
    )
    rgba = torch.randn(4, 4, 32, 32)
    before = huggingface.stock_features(tmp_path / "out", rgba)
    torch.testing.assert_close(
        getattr(adapted(pixel_values=rgba), OUTPUT[kind]), before, atol=1e-5, rtol=1e-4
    )
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.1)
    for _ in range(3):  # half of each adapter is zero at first
        getattr(adapted(pixel_values=rgba), OUTPUT[kind]).square().sum().backward()
        optimizer.step()
    after = getattr(adapted(pixel_values=rgba), OUTPUT[kind])
    assert not torch.allclose(after, before, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        getattr(transformers, kind).from_pretrained(tmp_path / "out"), tmp_path / "adapter"
    )
    torch.testing.assert_close(
        getattr(again(pixel_values=rgba), OUTPUT[kind]), after, atol=1e-5, rtol=1e-4
    )
