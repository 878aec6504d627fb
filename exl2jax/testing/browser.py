"""The headless browser that shows reports and cards."""

import shutil

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The path of the first of `BROWSERS` that is installed, None without any."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)
