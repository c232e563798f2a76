"""Pictures of the explorer's page, and PNG files that are small enough for a repository."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image

#: Of a picture of the page [pixels].
WIDTH, HEIGHT = 1280, 1130
#: As many as a palette of a PNG file holds.
_COLOURS = 256


def has_browser() -> bool:
    """Whether Chromium and its driver are installed."""
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


def photograph(page: Path, output: Path, *, script: str, height: int = HEIGHT) -> None:
    """A picture of the explorer's page.

    Args:
        page: The file.
        output: A PNG file.
        script: JavaScript that brings the page into the state to show.
        height: Of the picture, in pixels.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.resolve().as_uri())
        browser.execute_script(script)  # type: ignore[no-untyped-call]
        browser.save_screenshot(str(output))


def copy_small(picture: Path, output: Path) -> None:
    """Copy a PNG file with a palette of its own: a third of the bytes, and no difference seen."""
    with Image.open(picture) as image:
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image.getchannel("A") if image.mode == "RGBA" else None)
        opaque.quantize(_COLOURS, dither=Image.Dither.NONE).save(output, optimize=True)
