"""What all tests share."""

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def photos() -> Path:
    folder = REPO.parent / "shared" / "photos"
    if not folder.exists():
        pytest.skip("needs the photographs in ../shared/photos, which are not part of the product")
    return folder
